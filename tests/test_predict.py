"""A trained model without its data: open_run, scripts.predict, and checkpoints from before; evaluation that fits."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from configs.schema import ConfigError
from data.batches import EvaluationData
from data.datasets import load
from data.facts import Array, DataError
from models import evaluation
from models.evaluation import evaluate
from models.m2 import evaluation as m2_evaluation
from models.m2.model import SemiSupervisedVAE
from models.m2.pictures import KINDS
from models.networks import ImageShape, mlp
from scripts import evaluate as evaluate_script
from scripts import generate, predict
from scripts.command import apart
from tests.runs import MLP, ROOT, Ended, checkpoint, command, equal, resume, run
from tests.test_readme import block_with
from training import checkpoints
from training.trained import Trained, open_run

NAMES = tuple(f"digit {k}" for k in range(10))
COLUMNS = ("class", "probability", "second_class", "second_probability", "entropy", "bound", "novelty")
OWN = MLP.replace("data=digits", "data=arrays").replace("data.binarization=dynamic", "")


@pytest.fixture(scope="module")
def images() -> Array:
    return load("digits", "", "test").images[:]


BY_BOTH = "dynamic evaluation.pixel_draws=3 evaluation.classify_by=both"


@pytest.fixture(scope="module", params=["none", "dynamic", BY_BOTH, "fixed"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a person's own data, which is gone by now."""
    path = tmp_path_factory.mktemp(request.param.partition(" ")[0])
    source = load("digits", "", "train")
    np.savez(path / "mine.npz", images=source.images[:], labels=source.labels, class_names=np.array(NAMES))
    run(f"{OWN} data.path={path}/mine.npz data.binarization={request.param} train.steps=8", path / "run")
    (path / "mine.npz").unlink()
    return path / "run"


@pytest.fixture
def model(folder: Path) -> Trained:
    return open_run(folder)


def predicted(line: str, output: Path) -> list[dict[str, str]]:
    ended = command(predict.main, f"{line} --output {output}")
    assert (ended.code, ended.out) == (0, f"{output}\n"), ended.said
    with output.open(newline="") as file:
        return list(csv.DictReader(file))


def assert_refused(ended: Ended, *words: str) -> None:
    assert ended.code == 2, ended.said
    assert ended.err.startswith("catvae: "), ended.err
    assert ended.err.count("\n") == 1, ended.err
    for word in words:
        assert word in ended.err, ended.err


# ---- in Python ----


def test_a_model_opens_without_its_data_and_knows_its_classes(model: Trained, images: Array) -> None:
    assert model.class_names == NAMES
    assert not model.model.training
    q = model.classify(images)
    assert q.shape == (360, 10)
    torch.testing.assert_close(q.sum(dim=1), torch.ones(360))
    assert model.encode(images).shape == (360, 2)
    found = model.predict(images)
    assert torch.equal(found.q, q)
    assert torch.equal(found.z, model.encode(images))
    assert (found.bound < 0).all()
    assert (model.log_likelihood(images[:50], samples=50) - found.bound[:50]).mean() > 0  # a tighter bound


def test_classes_are_told_as_the_run_says(folder: Path, model: Trained, images: Array) -> None:
    """Each image's pixels and noise are its own, and so the same however it is classified."""
    told, by = {}, json.loads((folder / "result.json").read_text())["config"]["evaluation.classify_by"]
    for how in ("classifier", "bound", "both"):
        other = open_run(folder)
        other.classify_by = how
        told[how] = other.classify(images[:50])
    assert torch.equal(model.classify(images[:50]), told[by])
    torch.testing.assert_close(told["both"], (told["classifier"] + told["bound"]) / 2)
    assert (told["classifier"] - told["bound"]).abs().max() > 0.01


def test_images_as_arrays_or_tensors_with_or_without_a_channel(model: Trained, images: Array) -> None:
    q = model.classify(images)
    for same in (images[:, 0], torch.from_numpy(images), torch.from_numpy(images[:, 0]), np.asfortranarray(images)):
        assert torch.equal(model.classify(same), q)
    assert model.classify(images[:0]).shape == (0, 10)
    assert model.predict(images[:0]).bound.shape == (0,)


def test_an_image_has_the_same_numbers_whatever_it_comes_with(model: Trained, images: Array) -> None:
    whole, likelihood = model.predict(images[:40]), model.log_likelihood(images[:40], samples=3)
    model.batch_size = 7
    turned = model.predict(images[:40][::-1].copy())
    for field in ("q", "bound", "z"):
        torch.testing.assert_close(getattr(turned, field).flip(0), getattr(whole, field), atol=1e-4, rtol=1e-4)
    alone = torch.cat([model.log_likelihood(images[row : row + 1], samples=3) for row in range(40)])
    torch.testing.assert_close(alone, likelihood, atol=1e-4, rtol=1e-4)


def test_a_person_keeps_his_own_random_numbers(folder: Path, images: Array) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = open_run(folder)
    model.predict(images[:3])
    model.generate(NAMES[0], number=2, seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_generated_pictures_are_those_of_their_class_and_seed(model: Trained) -> None:
    drawn = model.generate("digit 3", number=4, seed=1)
    assert (drawn.shape, drawn.dtype) == ((4, 1, 8, 8), torch.uint8)
    assert torch.equal(model.generate("digit 3", number=4, seed=1), drawn)
    assert not torch.equal(model.generate("digit 4", number=4, seed=1), drawn)
    assert not torch.equal(model.generate("digit 3", number=4, seed=2), drawn)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (np.zeros((2, 8, 8)), "must be uint8 [N, 1, 8, 8] or [N, 8, 8], got float64 [2, 8, 8]; pixels in 0..1"),
        (np.zeros((8, 8), np.uint8), "got [8, 8]; one image alone is images[None]"),
        (np.zeros((2, 8, 9), np.uint8), "got [2, 8, 9]"),
        (np.zeros((2, 3, 8, 8), np.uint8), "got [2, 3, 8, 8]"),
        ([[1, 2]], "got list []"),
    ],
)
def test_what_are_no_images_is_said(wrong: Any, words: str, model: Trained) -> None:
    for ask in (model.classify, model.encode, model.predict, model.log_likelihood):
        with pytest.raises(ValueError, match=re.escape(words)):
            ask(wrong)


def test_what_is_no_class_is_said(model: Trained) -> None:
    with pytest.raises(ValueError, match=r"class_name must be one of digit 0, digit 1, .*, got 3"):
        model.generate("3")
    with pytest.raises(ValueError, match="samples must be an integer >= 1, got 0"):
        model.log_likelihood(np.zeros((1, 8, 8), np.uint8), samples=0)
    for number in (0, 1.5, "2", True):
        with pytest.raises(ValueError, match=f"number must be an integer >= 1, got {number}"):
            model.generate(NAMES[0], number)  # type: ignore[arg-type]
    for seed in ("a", 1.5, 2**80):
        with pytest.raises(ValueError, match=f"seed must be an integer of 64 bits, got {seed}"):
            model.generate(NAMES[0], seed=seed)  # type: ignore[arg-type]
    for size in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"batch_size must be an integer >= 1, got {size}"):
            model.batch_size = size  # type: ignore[assignment]


def test_what_is_no_run_is_said_and_a_checkpoint_opens_its_run(folder: Path, images: Array, tmp_path: Path) -> None:
    for wrong in (3, None):
        with pytest.raises(ConfigError, match=f"folder must be a path, got {wrong}"):
            open_run(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="checkpoint must be a path, got 3"):
        open_run(folder, checkpoint=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"device must be .*, got 0"):
        open_run(folder, device=0)  # type: ignore[arg-type]
    newest = checkpoints.stored(folder)[-1]
    assert torch.equal(open_run(newest).classify(images), open_run(folder).classify(images))
    np.savez(tmp_path / "new.npz", images=images[:9])
    assert len(predicted(f"{newest} {tmp_path}/new.npz", tmp_path / "p.csv")) == 9
    ended = command(predict.main, f"{newest} {tmp_path}/new.npz --output {folder}/checkpoints/p.csv")
    assert_refused(ended, "--output must be no file of the run itself")


def test_pictures_are_read_in_python_as_in_training(photographs: Path, images: Array) -> None:
    model = open_run("run")
    Image.fromarray(255 - images[2, 0]).convert("RGBA").save("colour.png")
    read = model.read_pictures(["in", "colour.png"])
    assert np.array_equal(read, np.stack([images[0], images[1], 255 - images[2]]))
    assert np.array_equal(model.read_pictures("in"), read[:2])
    assert model.read_pictures([]).shape == (0, 1, 8, 8)
    with pytest.raises(DataError, match=r"nowhere\.png cannot be read as an image"):
        model.read_pictures(Path("nowhere.png"))


def test_any_file_name_is_one_field(folder: Path, images: Array, tmp_path: Path) -> None:
    names = ["a\rb.png", 'c"d,e.png', "f\ng.png"]
    (tmp_path / "in").mkdir()
    for name, image in zip(names, images[:3], strict=True):
        Image.fromarray(image[0]).save(tmp_path / "in" / name)
    assert [row["file"] for row in predicted(f"{folder} {tmp_path}/in", tmp_path / "p.csv")] == names


def test_without_validation_images_novelty_is_empty_and_why_is_said(tmp_path: Path, images: Array) -> None:
    run(f"{MLP} train.steps=1 data.num_validation=0", tmp_path / "run")
    np.savez(tmp_path / "new.npz", images=images[:9])
    ended = command(predict.main, f"{tmp_path}/run {tmp_path}/new.npz --output {tmp_path}/p.csv")
    assert ended.code == 0, ended.said
    assert "novelty is empty: the run has no validation images to compare with, as data.num_validation=0" in ended.err


def test_the_readme_s_example_runs_from_another_folder(folder: Path, images: Array, tmp_path: Path) -> None:
    """In a process of its own, twice: as a notebook runs a cell, with no main module of ours."""
    np.save(tmp_path / "images.npy", images[:20])
    if "dynamic" in folder.parent.name:
        pytest.skip("once is enough")
    code = block_with("python", "open_run").replace("RUN_FOLDER", str(folder))
    twice = f"for _ in range(2): exec({code!r})\nprint(names[0], pictures.shape)"
    ended = subprocess.run(
        [sys.executable, "-c", twice],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("digit ")
    assert ended.stderr == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.npy"]


# ---- scripts.predict ----


def test_a_row_an_image_with_the_columns_that_are_promised(
    folder: Path, model: Trained, images: Array, tmp_path: Path
) -> None:
    np.savez(tmp_path / "new.npz", images=images)
    rows = predicted(f"{folder} {tmp_path}/new.npz", tmp_path / "p.csv")
    assert list(rows[0]) == ["index", *COLUMNS, *(f"p_{name}" for name in NAMES)]
    assert [row["index"] for row in rows] == [str(index) for index in range(360)]
    found = model.predict(images)
    for row, q, bound, novelty in zip(rows, found.q, found.bound, found.novelty, strict=True):
        values, classes = q.topk(2)
        assert (row["class"], row["second_class"]) == tuple(NAMES[k] for k in classes.tolist())
        assert float(row["probability"]) == pytest.approx(values[0].item(), rel=1e-4)
        assert float(row["entropy"]) == pytest.approx(torch.special.entr(q).sum().item(), rel=1e-4)
        assert float(row["bound"]) == pytest.approx(bound.item(), rel=1e-4)
        assert float(row["novelty"]) == pytest.approx(novelty.item(), abs=1e-4)
        assert sum(float(row[f"p_{name}"]) for name in NAMES) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("how", ["compressed", "channel", "fortran", "bool"])
def test_however_an_array_is_stored(how: str, folder: Path, images: Array, tmp_path: Path) -> None:
    if how == "bool":
        images = (images > 128).astype(np.uint8) * 255
    np.savez(tmp_path / "a.npz", images=images[:, 0])
    stored = {"channel": images, "fortran": np.asfortranarray(images), "bool": images > 0}.get(how, images)
    (np.savez_compressed if how == "compressed" else np.savez)(tmp_path / "b.npz", images=stored)
    line = f"{folder} {tmp_path}/%s.npz --batch-size 100"
    assert predicted(line % "a", tmp_path / "a.csv") == predicted(line % "b", tmp_path / "b.csv")


def test_pictures_at_any_depth_and_what_is_left_out_is_told(folder: Path, images: Array, tmp_path: Path) -> None:
    files = ["a.png", "deep/er/b.bmp", "deep/er/c.gif", "deep/d.webp"]
    for file, image in zip(files, images, strict=False):
        (tmp_path / "in" / file).parent.mkdir(parents=True, exist_ok=True)
        lossless: dict[str, Any] = {"lossless": True} if file.endswith("webp") else {}
        Image.fromarray(image[0]).save(tmp_path / "in" / file, **lossless)
    (tmp_path / "in" / "notes.txt").write_text("notes")
    (tmp_path / "in" / "deep" / "broken.png").write_text("no picture")
    output = tmp_path / "p.csv"
    ended = command(predict.main, f"{folder} {tmp_path}/in --output {output}")
    assert ended.code == 0, ended.said
    assert "2 files of" in ended.err
    assert "notes.txt" in ended.err
    assert "broken.png" in ended.err
    with output.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["file"] for row in rows} == set(files)
    q = open_run(folder).classify(images[:4])
    for file, probabilities in zip(files, q, strict=True):
        (row,) = [row for row in rows if row["file"] == file]
        assert float(row["p_digit 0"]) == pytest.approx(probabilities[0].item(), rel=1e-3)


def test_doubt_comes_first_and_embeddings_go_along(folder: Path, images: Array, tmp_path: Path) -> None:
    np.savez(tmp_path / "new.npz", images=images)
    more = f"--sort doubt --sheet {tmp_path}/s.png --embeddings {tmp_path}/e.npz --batch-size 64"
    rows = predicted(f"{folder} {tmp_path}/new.npz {more}", tmp_path / "sorted.csv")
    entropies = [float(row["entropy"]) for row in rows]
    assert entropies == sorted(entropies, reverse=True)
    unsorted = predicted(f"{folder} {tmp_path}/new.npz --batch-size 64", tmp_path / "p.csv")
    assert sorted(rows, key=lambda row: int(row["index"])) == unsorted
    with np.load(tmp_path / "e.npz") as stored:
        assert (stored["z"].shape, stored["q"].shape) == ((360, 2), (360, 10))
        assert stored["q"][:, 3] == pytest.approx([float(row["p_digit 3"]) for row in rows], rel=1e-4)
        z = open_run(folder).encode(images)[[int(row["index"]) for row in rows]]
        np.testing.assert_allclose(stored["z"], z.numpy(), atol=1e-4)
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.width > 500


def test_a_part_is_named_by_the_rows_of_split_json(tmp_path: Path) -> None:
    run(f"{MLP} train.steps=2", tmp_path / "run")
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    rows = predicted(f"{tmp_path}/run unlabelled", tmp_path / "p.csv")
    assert [int(row["index"]) for row in rows] == sorted({*split["unlabelled"]} - {*split["labelled"]})
    rows = predicted(f"{tmp_path}/run val", tmp_path / "p.csv")
    assert [int(row["index"]) for row in rows] == split["validation"]
    # of the validation images themselves, about as many are stranger as are not
    assert np.mean([float(row["novelty"]) for row in rows]) == pytest.approx(0.5, abs=0.05)
    assert len(predicted(f"{tmp_path}/run test", tmp_path / "p.csv")) == 360


def test_noise_is_novel(model: Trained) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (50, 8, 8), dtype=np.uint8)
    assert model.predict(noise).novelty.mean() > 0.7  # of a model of 8 steps


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nowhere", ("nowhere must be a folder of pictures or an .npz file",)),
        ("empty", ("empty must have picture files", "got none")),
        ("other.npz", ("images must be as those that the model was trained on, 1x8x8", "got 3x9x9")),
        ("keyless.npz", ("images is missing", "the file has the keys x")),
        ("cut.npz", ("cannot be read as an .npz file",)),
        ("broken", ("broken.png cannot be read as an image",)),
        ("good.npz --output p.txt", ("--output must end in .csv",)),
        ("good.npz --sheet s.jpg", ("--sheet must end in .png",)),
        ("good.npz --embeddings nowhere/e.npz", ("--embeddings must be in a folder that exists",)),
        ("test", ("mine.npz any more", "--data-path PATH tells where they are")),
    ],
)
def test_refused_and_nothing_left_behind(
    line: str, words: tuple[str, ...], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "broken.png").write_text("no picture")
    np.savez("good.npz", images=np.zeros((9, 8, 8), np.uint8))
    np.savez("other.npz", images=np.zeros((9, 3, 9, 9), np.uint8))
    np.savez("keyless.npz", x=np.zeros((9, 8, 8), np.uint8))
    Path("cut.npz").write_bytes(Path("good.npz").read_bytes()[:300])
    before = sorted(tmp_path.rglob("*"))
    assert_refused(command(predict.main, f"{folder} {line}"), *words)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def photographs(folder: Path, images: Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: `run` is the run folder, `in` has pictures, and `linked` leads to some by a link."""
    monkeypatch.chdir(tmp_path)
    Path("run").symlink_to(folder)
    Path("in/deep").mkdir(parents=True)
    Path("linked").mkdir()
    Path("linked/there").symlink_to(tmp_path / "in")
    for row, name in enumerate(("0.png", "deep/1.png")):
        Image.fromarray(images[row, 0]).save(Path("in", name))
    np.savez("ok.npz", images=images[:9])
    Path("link.npz").symlink_to("ok.npz")
    Path("dir.csv").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ok.npz --embeddings ok.npz", "--embeddings must be another file than what is read, got ok.npz"),
        ("link.npz --embeddings ./in/../ok.npz", "--embeddings must be another file than what is read"),
        ("ok.npz --embeddings link.npz", "--embeddings must be another file than what is read, got link.npz"),
        ("in --sheet in/0.png", "--sheet must be outside of in, whose pictures are read"),
        ("in --sheet in/new.png", "--sheet must be outside of in"),
        ("in --sheet in/deep/new.PNG", "--sheet must be outside of in"),
        ("linked --sheet in/new.png", "--sheet must be outside of linked"),
        ("ok.npz --output run/checkpoints/p.csv", "--output must be no file of the run itself"),
        ("ok.npz --embeddings e.npz --output dir.csv", "--output must be a file, got dir.csv, which is a folder"),
        ("ok.npz --output in/0.png/p.csv", "--output must be in a folder that exists, got in/0.png/p.csv"),
    ],
)
def test_no_output_destroys_what_is_read(line: str, words: str, photographs: Path) -> None:
    before = {path: path.read_bytes() for path in sorted(photographs.rglob("*")) if path.is_file()}
    assert_refused(command(predict.main, f"run {line}"), words)
    assert {path: path.read_bytes() for path in sorted(photographs.rglob("*")) if path.is_file()} == before


def test_no_picture_of_a_model_destroys_what_is_read(photographs: Path) -> None:
    before = (photographs / "in" / "0.png").read_bytes()
    for kind in ("analogies", "classes"):
        ended = command(generate.main, f"run --kind {kind} --images in --output in/0.png")
        assert_refused(ended, "--output must be outside of in")
    assert (photographs / "in" / "0.png").read_bytes() == before
    ended = command(evaluate_script.main, "run --output run/result.json")
    assert_refused(ended, "--output must be no file of the run itself, got run/result.json")


def test_the_run_s_own_images_are_not_written_over(photographs: Path) -> None:
    """They are gone here; a file of that name must not become theirs."""
    model = open_run("run")
    ended = command(predict.main, f"run val --embeddings {model.own_images[0]}")
    assert_refused(ended, "--embeddings must be another file than what is read")


def test_two_outputs_are_two_files(photographs: Path) -> None:
    one, other = Path("one.png"), Path("in/../one.png")
    with pytest.raises(ConfigError, match=r"--output and --sheet must be two files, got one.png and in/../one.png"):
        apart({"--output": one, "--sheet": other}, (), Path("run"))
    apart({"--output": one, "--sheet": Path("two.png")}, [Path("in"), Path("ok.npz")], Path("run"))


def test_a_folder_that_may_not_be_written_to_is_said_before_work(photographs: Path) -> None:
    with mock.patch.object(os, "access", lambda place, how: str(place) != "in"):
        ended = command(predict.main, "run ok.npz --output in/p.csv")
    assert_refused(ended, "--output must be in a folder that may be written to, got in/p.csv")
    Path("kept.csv").write_text("mine")
    with mock.patch.object(os, "access", lambda place, how: str(place) != "kept.csv"):
        ended = command(predict.main, "run ok.npz --output kept.csv")
    assert_refused(ended, "--output must be a file that may be written to, got kept.csv")
    assert Path("kept.csv").read_text() == "mine"


@pytest.mark.parametrize(
    ("divided", "dtype", "words"),
    [
        (255, np.uint8, "got none above 1 in its 9 images, which is black; multiply them by 255"),
        (16, np.uint8, "got none above 15 in its 9 images, which is black; multiply them by 17"),
        (1, np.uint16, "got none above 0 in its 9 images, which is black; of 16 bits the higher 8 are read"),
    ],
)
def test_images_of_another_range_are_refused(
    divided: int, dtype: Any, words: str, photographs: Path, images: Array
) -> None:
    np.savez("dark.npz", images=(images[:9] // divided).astype(dtype))
    assert_refused(command(predict.main, "run dark.npz --output p.csv"), "dark.npz", words)
    assert_refused(command(generate.main, "run --images dark.npz --kind analogies --output a.png"), words)
    assert not Path("p.csv").exists()


def test_a_dark_part_of_bright_images_is_predicted(photographs: Path, images: Array) -> None:
    np.savez("some.npz", images=np.concatenate([np.zeros_like(images[:4]), images[:4]]))
    assert len(predicted("run some.npz --batch-size 2", Path("p.csv"))) == 8
    np.savez("one.npz", images=np.zeros_like(images[:1]))
    assert len(predicted("run one.npz", Path("p.csv"))) == 1


def test_images_of_zeros_and_ones_are_said_in_python(model: Trained, images: Array) -> None:
    binary = (images[:5] > 128).astype(np.uint8)
    for ask in (model.classify, model.encode, model.predict, model.log_likelihood):
        with pytest.raises(ValueError, match=r"got none above 1 in 5 images; .* to be multiplied by 255"):
            ask(binary)
        with pytest.raises(ValueError, match="to be multiplied by 255"):
            ask(torch.from_numpy(binary))
        ask(binary[:1] * 0)  # an image may be black


@pytest.mark.parametrize(
    ("how", "words"),
    [("bool", "are bool, read as the grey levels 0 and 255"), ("uint16", "have 16 bits"), ("last", "channels last")],
)
def test_what_is_made_of_an_array_is_said(how: str, words: str, photographs: Path, images: Array) -> None:
    shown = images[:9, 0]
    stored = {"bool": shown > 128, "uint16": shown.astype(np.uint16) << 8, "last": shown[..., None]}[how]
    np.savez_compressed("a.npz", images=stored)
    Path("arrays").mkdir()
    np.save("arrays/images.npy", stored)
    for source in ("a.npz", "arrays"):  # as in training, a folder of .npy files is one of arrays
        ended = command(predict.main, f"run {source} --output p.csv")
        assert ended.code == 0, ended.said
        assert words in ended.err
        assert Path("p.csv").read_text().startswith("index,")


def test_one_picture_and_why_others_are_left_out(photographs: Path, images: Array) -> None:
    (row,) = predicted("run in/deep/1.png", Path("p.csv"))
    assert row["file"] == "1.png"
    Image.fromarray(images[0, 0].astype(np.uint16) << 8).save("in/deep/16.png")
    pages = [Image.fromarray(page) for page in images[:2, 0]]
    pages[0].save("in/pages.tif", save_all=True, append_images=pages[1:])
    Image.fromarray(images[0, 0, :5]).save("in/wide.png")
    Image.fromarray(images[0, 0, :4]).save("in/wider.png")
    Path("in/broken.png").write_text("no picture")
    ended = command(predict.main, "run in --output p.csv")
    assert ended.code == 0, ended.said
    assert "3 files of in are left out: 2 of another size (such as wide.png), 1 that cannot be read" in ended.err
    assert "in/wide.png is 5x8 pixels" in ended.err
    assert "in/broken.png cannot be read as an image" in ended.err
    assert "1 picture in in has 16 bits a channel, of which the higher 8 are read" in ended.err
    assert "1 picture in in has several frames or pages, of which the first is read" in ended.err
    ended = command(generate.main, "run --kind analogies --images in --output a.png")
    assert ended.code == 0, ended.said
    assert "of in are left out: " in ended.err


def test_a_part_that_is_none_is_said(photographs: Path) -> None:
    ended = command(predict.main, "run labelled")
    assert_refused(ended, "labelled must be a folder", f"parts of the run's own data are {', '.join(predict.PARTS)}")


def test_pictures_are_drawn_without_the_data(folder: Path, images: Array, tmp_path: Path) -> None:
    np.savez(tmp_path / "new.npz", images=images)
    for kind in (*KINDS, generate.SHEET):
        given = f"--images {tmp_path}/new.npz" if KINDS.get(kind, True) else ""
        ended = command(generate.main, f"{folder} --kind {kind} {given} --output {tmp_path}/{kind}.png")
        assert ended.code == 0, ended.said
    assert_refused(command(generate.main, f"{folder} --kind analogies --output {tmp_path}/a.png"), "mine.npz")


# ---- checkpoints from before ----


def test_a_checkpoint_from_before_of_published_data(images: Array) -> None:
    model = open_run(ROOT / "tests" / "checkpoints" / "3a7a541")
    assert model.class_names == tuple("0123456789")
    found = model.predict(images)
    assert found.bound.mean() == pytest.approx(-46.25, abs=0.05)
    assert found.novelty.isnan().all()
    ended = command(evaluate_script.main, f"{ROOT}/tests/checkpoints/3a7a541 --part test")
    assert json.loads(ended.out)["test_bound"] == pytest.approx(-46.247154, abs=1e-3)


def test_a_checkpoint_from_before_of_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its path is mine.npz: what the model was told of the data is read from there."""
    monkeypatch.chdir(tmp_path)
    folder, source = ROOT / "tests" / "checkpoints" / "c0c9512", load("digits", "", "train")
    np.savez("new.npz", images=source.images[:])
    said = command(predict.main, f"{folder} new.npz")
    assert_refused(said, "is from before it held its images' shape and classes", "mine.npz, which does not exist")
    np.savez("mine.npz", images=source.images[:200], labels=source.labels[:200])
    ended = command(predict.main, f"{folder} new.npz")
    assert ended.code == 0, ended.said
    assert "novelty is empty" in ended.err


def test_a_checkpoint_from_before_of_other_layers(tmp_path: Path) -> None:
    np.savez(tmp_path / "new.npz", images=np.zeros((9, 8, 8), np.uint8))
    line = f"{ROOT}/tests/checkpoints/27698da {tmp_path}/new.npz --output {tmp_path}/p.csv"
    assert_refused(command(predict.main, line), "other layers than the networks have now")


def test_a_checkpoint_of_a_gpu_is_used_on_a_cpu(folder: Path, images: Array, tmp_path: Path) -> None:
    """As far as a machine without one can show: the configuration asks for a device that is not there."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    state = torch.load(next((folder / "checkpoints").glob("step_*8.pt")), weights_only=True)
    state["config"] |= {"device": "cuda", "cuda_graph": True, "precision": "bf16"}
    (tmp_path / "checkpoints").mkdir()
    torch.save(state, tmp_path / "checkpoints" / "step_00000008.pt")
    assert torch.equal(open_run(tmp_path).classify(images), open_run(folder).classify(images))


# ---- evaluation that fits, and whose end loses nothing ----


def test_large_images_go_in_few_rows() -> None:
    shape = ImageShape(3, 300, 300)
    model = SemiSupervisedVAE(mlp(shape, 4, latent_size=2, hidden=2, dropout=0.0, scale="softplus"))
    x = torch.zeros(50, 3, 300, 300, dtype=torch.uint8)
    seen = []

    def watched(y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        seen.append(y.shape[0] * z.shape[1] * shape.size * 4)
        return torch.zeros(y.shape[0], z.shape[1], shape.size)

    with mock.patch.object(model.generator, "forward", watched):
        evaluate(model, EvaluationData(x, torch.zeros(50, dtype=torch.long)), binarization="none", batch_size=500)
    assert sum(seen) == 50 * 4 * shape.size * 4
    assert max(seen) <= evaluation.BYTES


def test_rows_of_mnist_and_digits_are_as_many_as_before() -> None:
    assert [evaluation.rows_at_once(pixels) for pixels in (64, 784, 3 * 128**2, 10**8)] == [8192, 8192, 130, 1]


@pytest.mark.parametrize(
    "error", [RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), MemoryError()]
)
def test_out_of_memory_at_a_look_loses_nothing(error: Exception, tmp_path: Path) -> None:
    line, folder = f"{MLP} train.steps=8 train.validate_every=5 train.checkpoint_every=100", tmp_path / "run"
    with mock.patch.object(m2_evaluation, "exact_terms", mock.Mock(side_effect=error)):
        ended = run(line, folder, code=2)
    assert "evaluation.batch_size must be less than 200 here" in ended.err
    assert f"resume={folder} evaluation.batch_size=NUMBER" in ended.err
    assert "Traceback" not in ended.err
    assert checkpoint(folder)["step"] == 5
    assert checkpoint(folder)["unlooked"]
    resume(folder)
    run(line, tmp_path / "whole")
    assert equal(checkpoint(folder), checkpoint(tmp_path / "whole"))


def test_other_errors_of_an_evaluation_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), evaluation.naming_memory(3, "key"):
        raise RuntimeError("shapes do not fit")


def test_the_index_of_a_part_is_the_row_in_the_file(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    labels = np.where(np.arange(60) % 2, -1, np.arange(60) // 2 % 3)
    np.savez(tmp_path / "mine.npz", images=images, labels=labels)
    run(
        f"{OWN} data.path={tmp_path}/mine.npz data.num_labelled=all data.num_validation=6 train.steps=1",
        tmp_path / "run",
    )
    seen: dict[str, list[int]] = {}
    for part in ("unlabelled", "val", "test"):
        output = tmp_path / f"{part}.csv"
        assert command(predict.main, f"{tmp_path}/run {part} --output {output}").code == 0
        with output.open() as file:
            rows = list(csv.DictReader(file))
        seen[part] = [int(row["index"]) for row in rows]
        np.savez(tmp_path / "part.npz", images=images[seen[part]])
        assert command(predict.main, f"{tmp_path}/run {tmp_path}/part.npz --output {output}").code == 0
        with output.open() as file:
            assert [row["bound"] for row in csv.DictReader(file)] == [row["bound"] for row in rows]
    assert seen["unlabelled"] == list(range(1, 60, 2))
    assert all(labels[row] >= 0 for part in ("val", "test") for row in seen[part])


def test_bool_images_are_bernoulli(tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((40, 8, 8)) < 0.5
    np.savez(tmp_path / "mine.npz", images=images, labels=np.arange(40) % 2)
    few = "data.num_labelled=10 data.num_validation=6 train.steps=1"
    run(f"{OWN} data.path={tmp_path}/mine.npz data.binarization=none {few}", tmp_path / "run")
    assert checkpoint(tmp_path / "run")["facts"]["likelihood"] == "bernoulli"
