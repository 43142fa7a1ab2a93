"""data=arrays: your own images train as the known datasets do, and an unusable file is refused in one sentence."""

from __future__ import annotations

import json
import math
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import train
from configs.check import typed
from data import arrays
from data.batches import training_data
from data.facts import DataError
from data.splits import draw_split
from scripts import evaluate, generate, gradient_quality, predict
from scripts.command import composed
from tests.runs import SMALL, Ended, checkpoint, command, curve, equal, resume, run

NETWORKS = {"mlp": "model=mlp model.hidden=8", "conv": "model=conv model.channels=2 model.hidden=8"}
SIZES = "data.num_labelled=6 data.num_validation=6 train.steps=2 evaluation.batch_size=20"
OF_DATA = ("data=", "data.")
DEFAULTS = " ".join(word for word in SMALL.split() if not word.startswith(OF_DATA))  # and those of data=arrays
DEFAULTS += f" {NETWORKS['mlp']} data=arrays train.steps=2 evaluation.batch_size=200"
Contents = dict[str, Any]


def contents(shape: tuple[int, ...] = (8, 8), per_class: int = 12, unknown: int = 10) -> Contents:
    """Three classes, sorted, each of a brightness of its own, and `unknown` images without a label."""
    labels = np.repeat([0, 1, 2, -1], [per_class] * 3 + [unknown])
    noise = np.random.default_rng(0).integers(60, size=(len(labels), *shape))
    bright = (labels * 60 + 60).reshape(-1, *[1] * len(shape))
    return {"images": (noise + bright).astype(np.uint8), "labels": labels}


IMAGES = contents()["images"]
LABELS = contents()["labels"]


def stored(folder: Path, **changes: Any) -> Path:
    """An .npz file of `contents` with changes; None leaves a key out."""
    all_of_them = contents() | changes
    path = folder / "mine.npz"
    given: Contents = {key: value for key, value in all_of_them.items() if value is not None}
    np.savez(path, **given)
    return path


def folder_of_files(folder: Path, channels: int = 1) -> Path:
    """Three classes of 12 pictures, and `unlabelled` with 5."""
    noise = np.random.default_rng(0)
    for name, number in (("cats", 12), ("dogs", 12), ("owls", 12), ("unlabelled", 5)):
        (folder / name).mkdir(parents=True)
        for index in range(number):
            pixels = noise.integers(256, size=(8, 6, channels), dtype=np.uint8)
            picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
            picture.save(folder / name / f"{index:02}.{'png' if index % 2 else 'jpg'}")
    return folder


def line(path: Path, model: str = "mlp") -> str:
    return f"{SMALL} {NETWORKS[model]} data=arrays data.path={path} {SIZES}"


def result(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "result.json").read_text()))


def refusal(path: Path | str, more: str = "") -> Ended:
    ended = command(train.main, f"data=arrays data.path={path} {SIZES} {more} hydra.run.dir='{Path(path).parent}/run'")
    assert ended.code == 2, ended.said
    assert ended.out == ""
    assert ended.err.startswith("catvae: "), ended.err
    assert ended.err.count("\n") == 1, ended.err
    assert not (Path(path).parent / "run").exists(), "not refused before any work"
    return ended


# ---- trains ----


@pytest.mark.parametrize("model", NETWORKS)
@pytest.mark.parametrize("shape", [(8, 8), (3, 9, 7), (2, 4, 5)], ids=["grey", "RGB", "two channels"])
def test_trains_evaluates_and_draws(model: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(line(stored(tmp_path, **contents(shape)), model), folder)
    assert all(math.isfinite(value) for _, value in curve(folder, "train/J"))
    found = result(folder)
    assert math.isfinite(found["test_log_likelihood"])
    again = json.loads(command(evaluate.main, str(folder)).out)
    assert again == {"steps": 2} | {key: value for key, value in found.items() if key.startswith(("val_", "test_"))}
    picture = tmp_path / "picture.png"
    assert command(generate.main, f"{folder} --output {picture}").code == 0
    with Image.open(picture) as image:
        assert image.mode == ("RGB" if shape[0] == 3 else "L")


def test_sweep_over_files(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = stored(tmp_path), stored(tmp_path / "other", **contents((3, 8, 8)))
    both = line(paths[0]).replace(str(paths[0]), f"{paths[0]},{paths[1]}")
    ended = command(train.main, f"-m {both} hydra.sweep.dir={tmp_path}/sweep")
    assert ended.code == 0, ended.said
    hashes = {result(tmp_path / "sweep" / job)["split_hash"] for job in ("0", "1")}
    assert len(hashes) == 2


def test_a_folder_trains_with_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    source = folder_of_files(tmp_path / "mine", channels=3)
    run(line(source, "conv"), tmp_path / "run")
    assert math.isfinite(result(tmp_path / "run")["test_bound"])
    train_part, test_part = arrays.load(str(source), "train"), arrays.load(str(source), "test")
    assert train_part.images.shape[1:] == (3, 8, 6)
    assert np.bincount(train_part.labels + 1).tolist() == [5, 10, 10, 10]
    assert np.bincount(test_part.labels).tolist() == [2, 2, 2]
    everything = np.concatenate([train_part.images, test_part.images])
    with Image.open(source / "owls" / "01.png") as image:
        owl = np.asarray(image).transpose(2, 0, 1)
    rows = np.flatnonzero((everything == owl).all(axis=(1, 2, 3)))
    assert np.concatenate([train_part.labels, test_part.labels])[rows].tolist() == [2]


def test_one_coloured_file_makes_all_coloured(tmp_path: Path) -> None:
    source = folder_of_files(tmp_path / "mine")
    assert arrays.facts(str(source)).shape == (1, 8, 6)
    Image.new("RGB", (6, 8), (255, 0, 0)).save(source / "dogs" / "red.png")
    assert arrays.facts(str(source)).shape == (3, 8, 6)
    images = np.concatenate([arrays.load(str(source), part).images for part in ("train", "test")])
    assert (images == images[:, :1]).all(axis=(1, 2, 3)).sum() == len(images) - 1


# ---- names ----


def test_classes_have_the_names_that_their_folders_or_their_file_gives_them(tmp_path: Path) -> None:
    numbers = stored(tmp_path)
    (tmp_path / "named").mkdir()
    named = stored(tmp_path / "named", class_names=np.array(["owl", "a cat", "Bär"]))
    folders = folder_of_files(tmp_path / "mine")
    for path, names in (
        (numbers, ("0", "1", "2")),
        (named, ("owl", "a cat", "Bär")),
        (folders, ("cats", "dogs", "owls")),
    ):
        assert arrays.facts(str(path)).class_names == names
        assert arrays.load(str(path), "train").class_names == names
        assert arrays.load(str(path), "test").class_names == names


@pytest.mark.parametrize(
    ("names", "got"),
    [
        (["owl", "cat"], "got <U3 [2]"),
        ([0, 1, 2], "got int64 [3]"),
        (["owl", "cat", "owl"], "there twice, got 'owl', 'cat', 'owl'"),
        (["owl", " ", "cat"], "none of them empty"),
        (np.array(["owl", None, 3], dtype=object), "got object"),
    ],
)
def test_class_names_that_name_no_classes_are_refused(names: Any, got: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        arrays.facts(str(stored(tmp_path, class_names=np.array(names))))
    assert f"{tmp_path / 'mine.npz'}: class_names must be strings [3]" in str(caught.value)
    assert got in str(caught.value)


# ---- pixels ----


def test_bool_16_bits_and_channels_last_are_taken_with_a_sentence(tmp_path: Path) -> None:
    colour = contents((3, 8, 6))["images"]
    dark = IMAGES > 90
    for images, expected, words in (
        (dark, np.where(dark, 255, 0)[:, None], "are bool, read as the grey levels 0 and 255"),
        (IMAGES.astype(np.uint16) * 256 + 7, IMAGES[:, None], "have 16 bits, of which the higher 8"),
        (colour.transpose(0, 2, 3, 1), colour, "have their channels last"),
        (IMAGES[..., None], IMAGES[:, None], "have their channels last"),
        (IMAGES, IMAGES[:, None], ""),
    ):
        path = str(stored(tmp_path, images=images, test_images=images, test_labels=LABELS.clip(0)))
        assert arrays.facts(path).shape == expected.shape[1:]
        for part in ("train", "test"):
            source = arrays.load(path, part)
            assert source.images[:].dtype == np.uint8
            assert np.array_equal(source.images[:], expected)
            notes = [note for note in source.notes if words and words in note]
            assert [note.split()[0] for note in notes] == (["images", "test_images"] if words else [])
            assert len(notes) == len(source.notes)


def reduced(levels: int) -> Contents:
    return {"images": (contents()["images"].astype(int) * (levels - 1) // 255).astype(np.uint8)}


RANGES: dict[str, tuple[Contents, tuple[str, ...]]] = {
    "0 and 1": ({"images": (IMAGES > 90).astype(np.uint8)}, ("got none above 1,", "write images * 255 or bool")),
    "0 to 16": (reduced(17), ("must be grey levels of 0 to 255, got none above", "write images * ")),
    "12 of 16 bits": ({"images": IMAGES.astype(np.uint16) * 16}, ("have 16 bits", "give 8 bits of each pixel")),
    "8 bits in 16": ({"images": IMAGES.astype(np.uint16)}, ("have 16 bits", "give 8 bits of each pixel")),
    "black": ({"images": IMAGES * 0}, ("images are all the same",)),
    "white": ({"images": IMAGES * 0 + 255}, ("images are all the same",)),
    "one picture again and again": ({"images": np.stack([IMAGES[0]] * 46)}, ("images are all the same",)),
    "test images": (
        {"test_images": (IMAGES > 90).astype(np.uint8), "test_labels": LABELS.clip(0)},
        ("test_images must be grey levels of 0 to 255", "write test_images * 255 or bool"),
    ),
}


@pytest.mark.parametrize("kind", RANGES)
def test_pixels_that_cannot_be_grey_levels_are_refused_with_what_to_write(kind: str, tmp_path: Path) -> None:
    changes, words = RANGES[kind]
    ended = refusal(stored(tmp_path, **changes))
    for word in (str(tmp_path / "mine.npz"), *words):
        assert word in ended.err, ended.err


def test_pictures_that_cannot_be_grey_levels_are_refused(tmp_path: Path) -> None:
    source = folder_of_files(tmp_path / "mine")
    for file in source.rglob("*.*"):
        Image.fromarray(np.eye(8, 6, dtype=np.uint8) * (int(file.stem) % 2)).save(file.with_suffix(".png"))
    for file in source.rglob("*.jpg"):
        file.unlink()
    assert "got none above 1, which is black; write them brighter, or give an .npz" in refusal(source).err
    for file in source.rglob("*.png"):
        Image.new("L", (6, 8), 99).save(file)
    assert f"the pictures in {source} are all the same, pixel by pixel" in refusal(source).err


@pytest.mark.parametrize("channels", [1, 3])
def test_resize_brings_a_file_and_a_folder_to_the_same_pixels(channels: int, tmp_path: Path) -> None:
    source = folder_of_files(tmp_path / "mine", channels)
    given = arrays.load(str(source), "train", num_test=0)
    path = stored(tmp_path, images=given.images, labels=given.labels)
    settings: dict[str, Any] = {"num_test": 0, "resize": "5x9"}
    small = arrays.load(str(source), "train", **settings)
    assert small.images.shape == (41, channels, 5, 9)
    assert arrays.facts(str(source), **settings).shape == arrays.facts(str(path), **settings).shape == (channels, 5, 9)
    assert np.array_equal(small.images[:], arrays.load(str(path), "train", **settings).images[:])


def test_large_images_need_a_word(tmp_path: Path) -> None:
    source = folder_of_files(tmp_path / "mine")
    large = np.random.default_rng(0).integers(256, size=(300, 8), dtype=np.uint8)
    for file in [*source.rglob("*.jpg"), *source.rglob("*.png")]:
        Image.fromarray(large).save(file)
    path = stored(tmp_path, images=np.stack([large] * 46))
    for given in (source, path):
        ended = refusal(given)
        assert f"{given} has images of 300x8 pixels (height x width): data.resize=64x64 brings them" in ended.err
        assert "data.resize=300x8 leaves them as they are" in ended.err
        assert arrays.facts(str(given), resize="300x8").shape == (1, 300, 8)
        assert arrays.facts(str(given), resize="8x8").shape == (1, 8, 8)


def messy(folder: Path) -> Path:
    """What a person has: several sizes, formats, depths and colours, sub-folders, and files that are no pictures."""
    source = folder_of_files(folder)
    another_size(source)
    Image.new("RGBA", (40, 30), (255, 0, 0, 99)).save(source / "dogs" / "large.webp")
    (source / "cats" / "more" / "still").mkdir(parents=True)
    Image.fromarray(np.full((9, 9), 40_000, dtype=np.uint16)).save(source / "cats" / "more" / "still" / "deep.tif")
    Image.new("L", (9, 12), 77).save(source / "beside.png")
    for name in ("notes.txt", "dogs/.DS_Store", "cats/more/Thumbs.db", "cats/table.csv", "owls/table.csv"):
        (source / name).write_text("no picture")
    (source / "owls" / "gone.png").symlink_to("/nowhere/gone.png")
    (source / "unlabelled").rename(source / "Unlabeled Images")
    return source


def test_a_messy_folder_trains_with_one_key_and_says_what_it_left_out(tmp_path: Path) -> None:
    source = messy(tmp_path / "mine")
    ended = command(
        train.main,
        f"{DEFAULTS} data.path={source} data.resize=8x8 hydra.run.dir={tmp_path}/run",
    )
    assert ended.code == 0, ended.said
    log = (tmp_path / "run" / "train.log").read_text()
    assert f"7 files of {source} are left out: 2 .csv (such as cats/table.csv), " in log
    for words in (".txt (notes.txt)", "hidden (dogs/.DS_Store)", ".db (cats/more/Thumbs.db)", "gone.png", "beside.png"):
        assert words in log
    assert f"1 picture in {source} has 16 bits a channel" in log
    assert f"the pictures in Unlabeled Images of {source} are taken as those without a label" in log
    facts = arrays.facts(str(source), resize="8x8")
    assert (facts.shape, facts.class_names, facts.unknown_labels) == ((3, 8, 8), ("cats", "dogs", "owls"), 5)
    assert facts.class_sizes == (11, 12, 10)


@pytest.mark.parametrize(
    "name",
    ["unlabelled", "unlabeled", "Unlabelled", "UNLABELED", "no_label", "no labels", "not-labelled", "un_labelled"],
)
def test_every_spelling_of_unlabelled_is_without_a_label(name: str, tmp_path: Path) -> None:
    source = folder_of_files(tmp_path / "mine")
    (source / "unlabelled").rename(source / name)
    assert (arrays.facts(str(source)).num_classes, arrays.facts(str(source)).unknown_labels) == (3, 5)
    told = [note for note in arrays.load(str(source), "train").notes if f"in {name} of" in note]
    assert len(told) == (name != "unlabelled")


@pytest.mark.parametrize("name", ["unlabled", "unlabelledd", "unlabellled", "unlabbeled"])
def test_a_slip_of_the_pen_in_unlabelled_is_no_class(name: str, tmp_path: Path) -> None:
    source = folder_of_files(tmp_path / "mine")
    (source / "unlabelled").rename(source / name)
    assert f"{source / name} may be a class, or the images without a label" in refusal(source).err


def test_other_words_are_classes(tmp_path: Path) -> None:
    source = folder_of_files(tmp_path / "mine")
    (source / "unlabelled").rename(source / "unripe")
    assert arrays.facts(str(source)).class_names == ("cats", "dogs", "owls", "unripe")


# ---- who sees what ----


def test_images_without_a_label_are_unlabelled_and_nothing_else(tmp_path: Path) -> None:
    source = arrays.load(str(stored(tmp_path)), "train")
    for seed in range(20):
        split = draw_split(
            source.labels,
            3,
            num_labelled=3,
            num_validation=12,
            split_seed=seed,
            labelled_in_unlabelled=False,
        )
        assert (source.labels[split.labelled] >= 0).all()
        assert (source.labels[split.validation] >= 0).all()
        assert (source.labels[split.unlabelled] < 0).sum() == 10
        assert training_data(source, split, torch.device("cpu")).y_labelled.sum(dim=0).tolist() == [1, 1, 1]
    assert (arrays.load(str(tmp_path / "mine.npz"), "test").labels >= 0).all()


def test_the_held_out_test_part_is_a_sixth_of_each_class_and_always_the_same(tmp_path: Path) -> None:
    path = str(stored(tmp_path))
    test, rest = arrays.load(path, "test"), arrays.load(path, "train")
    assert np.bincount(test.labels).tolist() == [2, 2, 2]
    assert len(rest.labels) == 36 + 10 - 6
    assert (arrays.load(path, "test").images[:] == test.images[:]).all()
    of_test, of_rest = ({image.tobytes() for image in part.images[:]} for part in (test, rest))
    assert not of_test & of_rest
    facts = arrays.facts(path)
    assert (facts.train_images, facts.unknown_labels, facts.num_classes, facts.shape) == (40, 10, 3, (1, 8, 8))


def test_test_images_of_the_file_are_the_test_part(tmp_path: Path) -> None:
    given = contents(per_class=2, unknown=0)
    path = str(stored(tmp_path, test_images=given["images"], test_labels=given["labels"]))
    assert (arrays.load(path, "test").images[:, 0] == given["images"]).all()
    assert len(arrays.load(path, "train").labels) == arrays.facts(path).train_images == 46


@pytest.mark.parametrize(("number", "expected"), [(None, 6), (0, 0), (1, 1), (0.5, 18), (30, 30)])
def test_the_test_part_is_as_large_as_asked_by_class(number: Any, expected: int, tmp_path: Path) -> None:
    for path in (stored(tmp_path), folder_of_files(tmp_path / "mine")):
        test, rest = (arrays.load(str(path), part, num_test=number) for part in ("test", "train"))
        assert len(test.labels) == expected
        assert np.ptp(np.bincount(test.labels, minlength=3)) <= 1
        assert np.bincount(rest.labels + 1)[1:].tolist() == (12 - np.bincount(test.labels, minlength=3)).tolist()
        assert arrays.facts(str(path), num_test=number).held_out == expected


def test_a_class_with_one_image_keeps_it(tmp_path: Path) -> None:
    labels = np.where(np.arange(46) == 0, 3, LABELS)
    path = str(stored(tmp_path, labels=labels))
    assert arrays.facts(path).class_sizes == (10, 10, 10, 1)
    assert 3 not in arrays.load(path, "test").labels


def test_num_test_beside_test_images_is_refused(tmp_path: Path) -> None:
    path = stored(tmp_path, test_images=IMAGES, test_labels=LABELS.clip(0))
    assert "data.num_test must be null where the file has test_images" in refusal(path, "data.num_test=0.1").err


# ---- labels as they come ----


def five_classes(folder: Path, unlabelled: int = 60) -> Path:
    """20 labels in each of 5 classes, and many without."""
    noise = np.random.default_rng(0)
    for name in ("ant", "bee", "cow", "dog", "eel", "unlabelled"):
        (folder / name).mkdir(parents=True)
        for index in range(unlabelled if name == "unlabelled" else 20):
            Image.fromarray(noise.integers(256, size=(8, 8), dtype=np.uint8)).save(folder / name / f"{index}.bmp")
    return folder


def split(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "split.json").read_text()))


def test_twenty_labels_in_each_of_five_classes_are_used_without_a_key(tmp_path: Path) -> None:
    source = five_classes(tmp_path / "mine")
    run(f"{DEFAULTS} data.path={source}", tmp_path / "run")
    made = split(tmp_path / "run")
    assert [len(made[part]) for part in ("labelled", "validation", "unlabelled")] == [68, 17, 128]
    assert len(arrays.load(str(source), "test").labels) == 15
    assert made["class_names"] == ["ant", "bee", "cow", "dog", "eel"]


def test_every_label_trains_without_validation_and_test_and_the_run_says_so(tmp_path: Path) -> None:
    source = five_classes(tmp_path / "mine")
    none = f"{DEFAULTS} data.path={source} data.num_validation=0 data.num_test=0 train.validate_every=1"
    run(none, tmp_path / "run")
    assert len(split(tmp_path / "run")["labelled"]) == 100
    found = result(tmp_path / "run")
    measured = [name for name in found if name.startswith(("val_", "test_"))]
    assert {"val_accuracy", "val_bound", "test_accuracy", "test_bound", "test_log_likelihood"} <= set(measured)
    counts = {"val_n", "val_n_with_label", "test_n", "test_n_with_label"}
    assert {found[name] for name in counts} == {0}
    assert {found[name] for name in measured if name not in counts} == {None}
    assert curve(tmp_path / "run", "train/J")
    with pytest.raises(KeyError, match="val/bound"):
        curve(tmp_path / "run", "val/bound")
    log = (tmp_path / "run" / "train.log").read_text()
    assert "data.num_validation=0: no accuracy" in log
    assert "data.num_test=0: nothing is measured on test images" in log
    resume(tmp_path / "run", "train.steps=3")
    assert result(tmp_path / "run")["steps"] == 3
    for ended in (
        command(evaluate.main, str(tmp_path / "run")),
        command(generate.main, f"{tmp_path}/run --kind reconstructions --output {tmp_path}/picture.png"),
    ):
        assert ended.code == 2
        assert "the run has no" in ended.err
    assert command(generate.main, f"{tmp_path}/run --output {tmp_path}/picture.png").code == 0


def test_unequal_classes_train_with_what_there_is(tmp_path: Path) -> None:
    labels = np.repeat([0, 1, 2, -1], [2, 6, 28, 10])
    path = stored(tmp_path, labels=labels)
    run(f"{DEFAULTS} data.path={path} data.num_test=0 data.num_labelled=13", tmp_path / "run")
    assert np.bincount(labels[split(tmp_path / "run")["labelled"]]).tolist() == [1, 2, 10]


# ---- resume ----


def test_resumed_run_equals_one_that_never_stopped_wherever_the_file_is_now(tmp_path: Path) -> None:
    path = stored(tmp_path)
    run(f"{line(path)} train.steps=4", tmp_path / "whole")
    run(line(path), tmp_path / "halves")
    moved = path.rename(tmp_path / "moved.npz")
    resume(tmp_path / "halves", f"train.steps=4 data.path={moved}")
    assert equal(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "halves"))


def test_scripts_are_told_where_the_file_is_now(tmp_path: Path) -> None:
    path, folder = stored(tmp_path), tmp_path / "run"
    run(line(path), folder)
    before = command(evaluate.main, str(folder)).out
    moved = path.rename(tmp_path / "moved.npz")
    scripts = (
        (evaluate.main, ""),
        (generate.main, f"--kind reconstructions --output {tmp_path}/picture.png"),
        (predict.main, f"val --output {tmp_path}/predictions.csv"),
        (gradient_quality.main, f"draws=3 estimators=straight_through output={tmp_path}/quality"),
    )
    for main, arguments in scripts:
        refused = command(main, f"{folder} {arguments}")
        assert (refused.code, refused.err.count("\n")) == (2, 1), refused.said
        assert f"are not in {path} any more; --data-path PATH tells" in refused.err
        assert command(main, f"{folder} {arguments} --data-path {moved}").code == 0
    assert command(evaluate.main, f"{folder} --data-path {moved}").out == before
    other = stored(tmp_path, **contents(per_class=9))
    assert "are not those of this run" in command(evaluate.main, f"{folder} --data-path {other}").err
    run("data=digits model=mlp model.hidden=8 train.steps=1", tmp_path / "digits")
    assert (
        "--data-path is for a run of data=arrays"
        in command(evaluate.main, f"{tmp_path}/digits --data-path {moved}").err
    )


@pytest.mark.parametrize("key", ["images", "labels", "test_images", "test_labels"])
def test_a_changed_file_is_not_gone_on_with(key: str, tmp_path: Path) -> None:
    test = contents(per_class=2, unknown=0)
    given = contents() | {"test_images": test["images"], "test_labels": test["labels"]}
    run(line(stored(tmp_path, **given)), tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "split.json").read_text())
    assert manifest["dataset"] == "arrays"
    assert len(manifest["digest"]) == 64
    changed = given[key].copy()
    changed[0] += 1
    stored(tmp_path, **given | {key: changed})
    ended = resume(tmp_path / "run", "train.steps=4", code=2)
    assert "are not those of this run" in ended.err


def test_the_same_arrays_packed_differently_are_the_same(tmp_path: Path) -> None:
    path = stored(tmp_path)
    before = arrays.load(str(path), "train").digest
    np.savez_compressed(path, **contents())
    assert arrays.load(str(path), "train").digest == before


# ---- no labels ----


def flat(folder: Path) -> Path:
    """30 pictures, of no class."""
    noise = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for index in range(30):
        Image.fromarray(noise.integers(256, size=(8, 6), dtype=np.uint8)).save(folder / f"{index:02}.png")
    return folder


def below(folder: Path) -> Path:
    flat(folder / "album" / "2024")
    (folder / "readme.txt").write_text("no picture")
    return folder


NO_LABELS: dict[str, Callable[[Path], Path]] = {
    "a flat folder": lambda folder: flat(folder / "mine"),
    "a folder in a folder": lambda folder: below(folder / "mine"),
    "unlabelled alone": lambda folder: flat(folder / "mine" / "unlabelled").parent,
    "no key": lambda folder: stored(folder, images=IMAGES[:30], labels=None),
    "-1": lambda folder: stored(folder, images=IMAGES[:30], labels=np.full(30, -1)),
    "test images": lambda folder: stored(
        folder, images=IMAGES[:25], labels=None, test_images=IMAGES[25:30], test_labels=None
    ),
}


@pytest.mark.parametrize("kind", NO_LABELS)
def test_images_without_any_label(kind: str, tmp_path: Path) -> None:
    """Are all unlabelled; validation and test part are drawn over all of them."""
    path = str(NO_LABELS[kind](tmp_path))
    known = arrays.facts(path, needs_labels=False)
    assert (known.train_images, known.unknown_labels, known.num_classes, known.class_names) == (25, 25, 0, ())
    train_part, test_part = (arrays.load(path, part, needs_labels=False) for part in ("train", "test"))
    assert (train_part.labels.tolist(), test_part.labels.tolist()) == ([-1] * 25, [-1] * 5)
    assert (train_part.num_classes, train_part.digest) == (0, test_part.digest)
    both = np.concatenate([train_part.images[:], test_part.images[:]])
    assert len(np.unique(both.reshape(30, -1), axis=0)) == 30
    given = f"data=arrays data.path={path} data.num_labelled=0 train.batch_size_labelled=0"
    config = typed(composed(*given.split()))
    split = config.data.split(train_part.labels, 0)
    assert [len(rows) for rows in (split.labelled, split.unlabelled, split.validation)] == [0, 20, 5]
    source = config.data.load("train", mapped=True)
    assert np.array_equal(source.images[:], train_part.images[:])


@pytest.mark.parametrize("kind", NO_LABELS)
def test_a_model_with_labels_refuses_images_without_any(kind: str, tmp_path: Path) -> None:
    """With the sentence that it has always said, whatever data.num_labelled is."""
    path = NO_LABELS[kind](tmp_path)
    before = refusal(path).err
    assert "2 or more classes" in before or "labels is missing" in before or "at least 2 classes, got 0" in before
    asked = f"data=arrays data.path={path} data.num_labelled=0 train.batch_size_labelled=0"
    ended = command(train.main, f"{asked} hydra.run.dir='{tmp_path}/run'")
    assert (ended.code, ended.err) == (2, before)
    assert not (tmp_path / "run").exists()


def test_what_is_left_out_of_a_folder_without_labels_is_told(tmp_path: Path) -> None:
    notes = arrays.load(str(below(tmp_path / "mine")), "train", needs_labels=False).notes
    assert notes == (
        f"1 file of {tmp_path}/mine is left out: 1 .txt (readme.txt)",
        f"all pictures in {tmp_path}/mine and below are taken as those without a label",
    )


@pytest.mark.parametrize(
    ("number", "words"),
    [
        ("data.num_test=30", "data.num_test=30 is too many for the 30 images of"),
        (
            "data.num_validation=25",
            "the 25 training images (data.num_test holds out 5 more), got 0 + 25; possible are ",
        ),
    ],
)
def test_numbers_of_images_without_labels(number: str, words: str, tmp_path: Path) -> None:
    path = flat(tmp_path / "mine")
    asked = f"data=arrays data.path={path} data.num_labelled=0 train.batch_size_labelled=0 {number}"
    ended = command(train.main, asked)
    assert ended.code == 2, ended.said
    assert words in ended.err


def test_folders_and_files_that_are_no_images_without_labels_either(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="must have pictures in a format that Pillow reads, in it or below, got none"):
        arrays.facts(str(tmp_path / "empty"), needs_labels=False)
    path = stored(tmp_path, labels=None, test_images=IMAGES, test_labels=LABELS)
    with pytest.raises(DataError, match="labels is missing"):
        arrays.facts(str(path), needs_labels=False)
    path = stored(tmp_path, labels=None, test_images=IMAGES[:, :7])
    with pytest.raises(DataError, match="test_images must be as images are, 1x8x8"):
        arrays.facts(str(path), needs_labels=False)


def test_labels_that_are_there_stay_for_measuring(tmp_path: Path) -> None:
    """With data.num_labelled=0 an image's label is seen by nothing but an accuracy."""
    path = str(stored(tmp_path))
    for part in ("train", "test"):
        with_labels, without = (arrays.load(path, part, needs_labels=needed) for needed in (True, False))
        assert np.array_equal(with_labels.labels, without.labels)
        assert with_labels.digest == without.digest


# ---- refusals ----

BAD: dict[str, tuple[Contents, tuple[str, ...]]] = {
    "no images": ({"images": None}, ("images is missing", "the keys labels")),
    "no labels": ({"labels": None}, ("labels is missing", "the keys images")),
    "no test labels": ({"test_images": IMAGES}, ("test_labels is missing", "test_images is there")),
    "no test images": ({"test_labels": LABELS}, ("test_images is missing", "test_labels is there")),
    "floats": ({"images": IMAGES / 255}, ("images must be uint8", "got float64 [46, 8, 8]", "times 255")),
    "NaN": ({"images": np.full(IMAGES.shape, np.nan)}, ("images must be uint8", "got float64")),
    "wide integers": (
        {"images": IMAGES.astype(np.int64)},
        ("must be uint8", "got int64", "images.astype(numpy.uint8)"),
    ),
    "flat": ({"images": IMAGES.reshape(46, 64)}, ("[N, H, W] or [N, C, H, W]", "got [46, 64]")),
    "five axes": ({"images": IMAGES[:, None, None]}, ("[N, H, W] or [N, C, H, W]", "got [46, 1, 1, 8, 8]")),
    "one number": ({"images": np.uint8(3)}, ("[N, H, W] or [N, C, H, W]", "got []")),
    "pickled": ({"images": np.array([{}, {}])}, ("images must be uint8", "got object")),
    "pickled labels": ({"labels": np.array([None] * 46)}, ("labels must be integers", "got object")),
    "empty": ({"images": IMAGES[:0], "labels": LABELS[:0]}, ("images", "N >= 1", "got [0, 8, 8]")),
    "small": ({"images": IMAGES[:, :3]}, ("images", "at least 4 pixels", "got [46, 3, 8]")),
    "no pixels": ({"images": IMAGES[:, :0]}, ("images", "at least 4 pixels", "got [46, 0, 8]")),
    "channels last, or a narrow image": (
        {"images": np.stack([IMAGES] * 4, axis=-1)},
        ("got [46, 8, 8, 4]", "channels last", "images.transpose(0, 3, 1, 2)"),
    ),
    "many channels": ({"images": np.stack([IMAGES] * 17, axis=1)}, ("1 to 16 channels", "got [46, 17, 8, 8]")),
    "no channels": ({"images": np.zeros((46, 0, 8, 8), np.uint8)}, ("1 to 16 channels", "got [46, 0, 8, 8]")),
    "float labels": ({"labels": LABELS * 1.0}, ("labels must be integers [46]", "got float64")),
    "boolean labels": ({"labels": LABELS > 0}, ("labels must be integers [46]", "got bool")),
    "words": ({"labels": np.array(["cat"] * 46)}, ("labels must be integers [46]", "got <U3")),
    "too few labels": ({"labels": LABELS[:9]}, ("labels must be integers [46]", "got [9]")),
    "one-hot labels": ({"labels": np.eye(46, dtype=int)}, ("labels must be integers [46]", "got [46, 46]")),
    "labels below -1": ({"labels": LABELS - 1}, ("labels must be >= -1", "without a label", "got -2")),
    "large labels": ({"labels": LABELS.astype(np.uint64) * 2**62}, ("labels must be classes 0, 1, 2",)),
    "a missing class": ({"labels": np.where(LABELS == 1, 3, LABELS)}, ("classes 0 to 3", "no image of class 1")),
    "one class": ({"labels": LABELS * 0}, ("at least 2 classes", "got 1")),
    "nothing labelled": ({"labels": LABELS * 0 - 1}, ("at least 2 classes", "got 0")),
    "a test image without a label": (
        {"test_images": IMAGES, "test_labels": LABELS},
        ("test_labels must be >= 0", "a test image needs its label", "got -1"),
    ),
    "a test class that is not trained": (
        {"test_images": IMAGES, "test_labels": np.full(46, 3)},
        ("test_labels must be classes that labels has, 0 to 2", "got 3"),
    ),
    "test images of another size": (
        {"test_images": IMAGES[:, :7], "test_labels": LABELS.clip(0)},
        ("test_images must be as images are, 1x8x8", "got 1x7x8"),
    ),
    "empty test part": ({"test_images": IMAGES[:0], "test_labels": LABELS[:0]}, ("test_images", "N >= 1")),
}


@pytest.mark.parametrize("kind", BAD)
def test_unusable_arrays_are_refused(kind: str, tmp_path: Path) -> None:
    changes, words = BAD[kind]
    with pytest.raises(DataError) as caught:
        arrays.facts(str(stored(tmp_path, **changes)))
    for word in (str(tmp_path / "mine.npz"), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("kind", ["no images", "pickled", "a missing class"])
def test_unusable_arrays_are_refused_by_the_command(kind: str, tmp_path: Path) -> None:
    changes, words = BAD[kind]
    ended = refusal(stored(tmp_path, **changes))
    for word in (str(tmp_path / "mine.npz"), *words):
        assert word in ended.err, ended.err


SETTINGS = {
    "data.num_labelled=2": ("data.num_labelled must be all, or at least the 3 classes", "got 2"),
    "data.balanced=true data.num_labelled=7": (
        "all, or a positive multiple of the 3 classes while data.balanced",
        "got 7",
    ),
    "data.num_labelled=27": (
        "must fit into the 30 training images with a known label (10 of 0, 10 of 1, 10 of 2; ",
        "data.num_test holds out 6 more)",
        "got 27 + 6; possible are at most data.num_labelled=24 with data.num_validation=6, or ",
        "or data.num_validation=3 with data.num_labelled=27",
    ),
    "data.num_validation=31": ("got 6 + 31; possible are at most data.num_validation=24 with data.num_labelled=6",),
    "data.num_validation=28 data.num_labelled=all": ("at most data.num_validation=27 with data.num_labelled=all",),
    "data.num_validation=1.0": ("data.num_validation must be a number of images, a fraction below 1", "got 1.0"),
    "data.num_test=-1": ("data.num_test must be a number of images, a fraction below 1, or 0 for none", "got -1"),
    "data.num_test=34": ("data.num_test=34 is too many for the 36 images", "at most 33, as each class keeps"),
    "data.resize=32": ("data.resize must be HEIGHTxWIDTH in pixels, such as 32x32", "got 32"),
    "data.resize=3x32": ("data.resize must be HEIGHTxWIDTH in pixels", "each 4 to 512, got 3x32"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_sizes_that_the_file_cannot_give(setting: str, tmp_path: Path) -> None:
    ended = refusal(stored(tmp_path), setting)
    for word in SETTINGS[setting]:
        assert word in ended.err, ended.err


def damaged(kind: str, path: Path) -> None:
    content = path.read_bytes()
    middle = content.index(IMAGES[20].tobytes())
    path.write_bytes(
        {
            "empty": b"",
            "text": b"no archive",
            "cut": content[: len(content) // 2],
            "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "longer than it is": content.replace(b"(46, 8, 8)", b"(99, 8, 8)"),
        }[kind]
    )


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "flipped", "longer than it is"])
def test_a_damaged_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = stored(tmp_path)
    damaged(kind, path)
    assert f"{path} cannot be read as an .npz file" in refusal(path).err


def test_a_header_that_promises_more_than_there_is(tmp_path: Path) -> None:
    header, plain = b"(46, 8, 8), }" + b" " * 13, stored(tmp_path)
    path = tmp_path / "lying.npz"
    with zipfile.ZipFile(plain) as honest, zipfile.ZipFile(path, "w") as lying:  # whose checksums are right
        for name in honest.namelist():
            lying.writestr(name, honest.read(name).replace(header, b"(46, 8, 8000000000000), } "))
    assert "bytes where 2944000000000128 are promised" in refusal(path).err


def test_a_plain_npy_file_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "mine.npy", IMAGES)
    assert "cannot be read as an .npz file" in refusal(tmp_path / "mine.npy").err


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    ended = refusal(tmp_path / "nowhere.npz")
    assert "data.path" in ended.err
    assert "nowhere.npz, which does not exist" in ended.err


@pytest.mark.parametrize("path", ["~nobody-here/mine.npz", "x" * 300, "mine.npz/inside"])
def test_a_path_that_cannot_be_one(path: str, tmp_path: Path) -> None:
    stored(tmp_path)
    with pytest.raises(DataError, match=r"data\.path"):
        arrays.facts(path if path.startswith("~") else str(tmp_path / path))


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", forbidden)
    with pytest.raises(DataError, match=r"cannot read the folder .*Permission denied"):
        arrays.facts(str(tmp_path))


def another_size(folder: Path) -> None:
    Image.new("L", (7, 8)).save(folder / "dogs" / "zzz.png")


def empty_class(folder: Path) -> None:
    (folder / "birds").mkdir()


def only_owls(folder: Path) -> None:
    shutil.rmtree(folder / "cats")
    shutil.rmtree(folder / "dogs")


def several_damaged(folder: Path) -> None:
    for name in ("cats/01.png", "dogs/02.jpg", "unlabelled/00.jpg"):
        (folder / name).write_bytes((folder / name).read_bytes()[:30])


def strange_formats(folder: Path) -> None:
    (folder / "birds").mkdir()
    for index in range(3):
        (folder / "birds" / f"{index}.heic").write_text("no format of Pillow's")


def a_part(folder: Path) -> None:
    only_owls(folder)
    (folder / "owls").rename(folder / "labelled")


def parts(folder: Path) -> None:
    for name in ("train", "test"):
        (folder / name).mkdir()
        for class_folder in ("cats", "dogs", "owls"):
            shutil.copytree(folder / class_folder, folder / name / class_folder)
    for name in ("cats", "dogs", "owls"):
        shutil.rmtree(folder / name)


FOLDERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "another size": (
        another_size,
        (
            "one size",
            "data.resize=32x32",
            "dogs/zzz.png is 8x7",
            "cats/00.jpg is 8x6 pixels (height x width)",
            "2 sizes",
        ),
    ),
    "no picture": (lambda folder: (folder / "cats" / "01.png").write_text("no"), ("cats/01.png cannot be read",)),
    "cut picture": (
        lambda folder: (folder / "owls" / "03.png").write_bytes((folder / "owls" / "03.png").read_bytes()[:60]),
        ("owls/03.png cannot be read",),
    ),
    "several damaged": (
        several_damaged,
        ("cats/01.png cannot be read", "mend or remove it; so must ", "dogs/02.jpg, ", "unlabelled/00.jpg, 3 in all"),
    ),
    "empty class": (empty_class, ("birds must have pictures in a format that Pillow reads", "got none")),
    "class in a format that nobody reads": (
        strange_formats,
        ("birds must have pictures", "got none (3 files of", "3 .heic (such as 0.heic)"),
    ),
    "one class": (only_owls, ("a sub-folder of pictures for each of 2 or more classes, got owls",)),
    "parts": (parts, ("got test, train, which are names of parts", "such as data.path=", "/train\n")),
    "a name that is not UTF-8": (
        lambda folder: (folder / "cats").rename(folder / os.fsdecode(b"caf\xe9")),
        ("must have a name in UTF-8, which names its class",),
    ),
    "a part": (a_part, ("got labelled, which are names of parts",)),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_unusable_folders_are_refused(kind: str, tmp_path: Path) -> None:
    change, words = FOLDERS[kind]
    source = folder_of_files(tmp_path / "mine")
    change(source)
    ended = refusal(source)
    for word in words:
        assert word in ended.err, ended.err


def test_a_picture_that_another_takes_the_place_of_is_looked_at_again(tmp_path: Path) -> None:
    source = folder_of_files(tmp_path / "mine")
    arrays.facts(str(source))
    Image.new("L", (7, 8)).save(source / "owls" / "01.png")
    with pytest.raises(DataError, match=r"owls.01\.png is 8x7"):
        arrays.facts(str(source))


def rewritten(path: Path) -> None:
    given = contents()
    order = np.random.default_rng(7).permutation(len(given["labels"]))
    np.savez(path, images=given["images"][order], labels=given["labels"][order])


def another_picture(path: Path) -> None:
    Image.new("L", (6, 8), 3).save(path / "owls" / "01.png")


def picture_moved(path: Path) -> None:
    (path / "owls" / "01.png").rename(path / "unlabelled" / "01.png")


def in_a_folder(path: Path) -> Path:
    return folder_of_files(path / "mine")


CHANGED: dict[str, tuple[Callable[[Path], Path], Callable[[Path], None], str]] = {
    "the file is written anew": (stored, rewritten, "mine.npz has changed since this run read it"),
    "a picture is another": (in_a_folder, another_picture, "has changed since this run read it"),
    "a label is taken back": (in_a_folder, picture_moved, "has changed since this run read it"),
    "the folder is gone": (in_a_folder, shutil.rmtree, "which does not exist"),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_data_that_change_while_a_run_trains_end_it_with_the_checkpoint_kept(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, change, words = CHANGED[kind]
    path, original = make(tmp_path), train.train

    def meanwhile(*arguments: Any) -> int:
        change(path)
        return original(*arguments)

    monkeypatch.setattr(train, "train", meanwhile)
    ended = command(train.main, f"{line(path)} hydra.run.dir={tmp_path}/run")
    assert ended.code == 2, ended.said
    assert str(path) in ended.said
    assert words in ended.said
    assert "Traceback" not in ended.said
    assert checkpoint(tmp_path / "run")["step"] == 2
    assert not (tmp_path / "run" / "result.json").exists()
    assert command(evaluate.main, f"{tmp_path}/run").code == 2


def test_a_changed_picture_changes_the_digest(tmp_path: Path) -> None:
    source = folder_of_files(tmp_path / "mine")
    before = arrays.load(str(source), "train").digest
    Image.new("L", (6, 8), 3).save(source / "owls" / "01.png")
    assert arrays.load(str(source), "train").digest != before


def test_data_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mine\.npz: labels is missing"):
        arrays.facts(str(stored(tmp_path, labels=None)))


def test_folders_whose_label_is_in_doubt_are_refused(tmp_path: Path) -> None:
    doubtful = {
        "unlabelled (copy)": "may be a class, or the images without a label",
        "my_unlabeled_ones": "may be a class, or the images without a label",
        "cats/unlabelled": "is within the class cats",
        "cats/2021/no label": "is within the class cats",
    }
    for number, (place, words) in enumerate(doubtful.items()):
        source = folder_of_files(tmp_path / str(number) / "mine")
        shutil.move(source / "unlabelled", source / "aside")
        (source / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(source / "aside", source / place)
        assert words in refusal(source).err
    source = folder_of_files(tmp_path / "linked" / "mine")
    (source / "lions").symlink_to(source / "cats")
    assert "lions is a link to another class" in refusal(source).err
    (source / "lions").unlink()
    (source / "cats" / "more").symlink_to(source / "owls")
    assert "owls is within " in refusal(source).err


def test_folders_that_links_lead_to_twice_are_read_once(tmp_path: Path) -> None:
    source = folder_of_files(tmp_path / "mine")
    before = arrays.load(str(source), "train", num_test=0)
    (source / "cats" / "2021").mkdir()
    for file in (source / "cats").glob("0*"):
        file.rename(source / "cats" / "2021" / file.name)
    (source / "cats" / "again").symlink_to(source / "cats" / "2021")
    assert len(arrays.load(str(source), "train", num_test=0).images) == len(before.images)


def test_a_run_may_lie_beside_the_arrays_that_it_reads(tmp_path: Path) -> None:
    for key, value in contents().items():
        np.save(tmp_path / f"{key}.npy", value)
    run(line(tmp_path), tmp_path / "run")


@pytest.mark.parametrize("place", [".", "run", "cats/run", "unlabelled/deep/run"])
def test_a_run_among_the_pictures_that_it_reads_is_refused(place: str, tmp_path: Path) -> None:
    source = folder_of_files(tmp_path / "mine")
    there = sorted(source.rglob("*"))
    for where in ("hydra.run.dir", "-m seed=0,1 hydra.sweep.dir"):
        ended = command(train.main, f"{where}={source / place} data=arrays data.path={source} {SIZES}")
        assert ended.code == 2
        assert "must be outside of data.path=" in ended.err
    assert sorted(source.rglob("*")) == there


def test_pictures_of_several_sizes_train_with_every_likelihood(tmp_path: Path) -> None:
    """data.resize and data.num_test count wherever the data are asked about, which `auto` does too."""
    source = messy(tmp_path / "mine")
    for likelihood in ("auto", "gaussian"):
        one = f"{DEFAULTS} data.path={source} data.resize=8x8 data.num_test=3 data.num_validation=3"
        run(f"{one} likelihood={likelihood} 'prior=[0.4,0.4,0.2]'", tmp_path / likelihood)
    assert checkpoint(tmp_path / "auto")["facts"]["likelihood"] == "discretized_logistic"
