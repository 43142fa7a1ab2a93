"""data.binarization=fixed: every image's pixels are drawn once, and are the same wherever it is looked at."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data import arrays
from data.batches import Batches, binarize, evaluation_data, training_data
from data.datasets import load
from data.facts import Array
from data.fixed import ROWS, SEED, fixed_pixels
from data.splits import Split, draw_split
from data.stored import Images
from scripts import baselines, evaluate, generate, predict
from tests.runs import MLP, checkpoint, command, equal, resume, run
from tests.test_arrays import folder_of_files, line, stored
from tests.test_data import REAL_MNIST, needs_mnist
from training.saved import stored_run
from training.trained import open_run

CPU = torch.device("cpu")
FIXED = MLP.replace("data.binarization=dynamic", "data.binarization=fixed")
GREY = np.random.default_rng(0).integers(0, 256, (40, 3, 5, 7)).astype(np.uint8)  # D is no multiple of a block
ORDER = np.random.default_rng(1).permutation(40)


def drawn(part: str) -> Array:
    """All fixed pixels of digits."""
    return load("digits", "", part).fixed().images[:]


def sha256(images: Array) -> str:
    return hashlib.sha256(np.packbits(images > 0).tobytes()).hexdigest()


# ---- the draw ----


def philox(counter: int, key: tuple[int, int]) -> list[int]:
    """Philox4x64 of ten rounds, as Salmon et al. (2011) write it."""
    mask = 2**64 - 1
    c, k = [counter >> 64 * place & mask for place in range(4)], list(key)
    for _ in range(10):
        first, second = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [second >> 64 ^ c[1] ^ k[0], second & mask, first >> 64 ^ c[3] ^ k[1], first & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return c


@pytest.mark.parametrize(("part", "number"), [("train", 0), ("test", 1)])
def test_pixels_are_those_of_the_published_recipe(part: str, number: int) -> None:
    """In whole numbers, without NumPy: whoever reads the docstring of data/fixed.py has the same pixels."""
    assert philox(0, (0, 0))[0] == 0x16554D9ECA36314C  # Random123's known answer
    size, blocks = 3 * 5 * 7, 7
    for row in (0, 1, 33):
        words = [word for block in range(blocks) for word in philox(row * blocks + block, (SEED, number))]
        uniform = [word >> 16 * place & 0xFFFF for word in words for place in range(4)][:size]
        expected = [255 * (max(u, 1) <= 257 * int(v)) for u, v in zip(uniform, GREY[row].flat, strict=True)]
        assert fixed_pixels(GREY[row : row + 1], np.array([row]), part).ravel().tolist() == expected


def test_the_published_seed_cannot_change_unseen() -> None:
    assert sha256(drawn("train")[:100]) == "787087467c419e109be6e5ca6e6c4d31625c13e858c3c456732d741b0a0e07b0"
    assert sha256(drawn("test")[:100]) == "b41fab549ac329a500ad118f9171b15ce389db0f9d4d0eeb9fe44918b8fd7010"


@needs_mnist
@pytest.mark.parametrize("part", ["train", "test"])
def test_frequencies_are_the_intensities(part: str) -> None:
    """Of each grey level over all images, and of each pixel of the picture."""
    source = load("mnist", str(REAL_MNIST), part)
    grey, white = source.images[:], source.fixed().images[:] == 255
    p = np.arange(256) / 255
    number = np.bincount(grey.ravel(), minlength=256)
    found = np.bincount(grey.ravel(), weights=white.ravel(), minlength=256)
    assert (found[0], found[255]) == (0, number[255])
    z = ((found - number * p) / np.sqrt(np.maximum(number * p * (1 - p), 1)))[1:255]
    assert abs((z**2).sum() - 254) < 4 * np.sqrt(2 * 254)
    p = grey.reshape(len(grey), -1) / 255
    variance = (p * (1 - p)).sum(axis=0)
    often = variance > 20
    z = (white.reshape(len(grey), -1).sum(axis=0) - p.sum(axis=0))[often] / np.sqrt(variance[often])
    assert abs((z**2).sum() - often.sum()) < 4 * np.sqrt(2 * often.sum())


def test_pixels_of_an_image_and_images_of_a_part_are_independent() -> None:
    half = np.full((20_000, 1, 4, 5), 128, dtype=np.uint8)
    bits = (fixed_pixels(half, np.arange(20_000), "train") > 0).reshape(20_000, 20)
    assert np.abs(np.corrcoef(bits.T) - np.eye(20)).max() < 5 / 20_000**0.5
    for lag in (1, 2, 7):  # rows
        assert abs(np.corrcoef(bits[lag:].ravel(), bits[:-lag].ravel())[0, 1]) < 4 / bits.size**0.5


def test_training_and_test_part_have_draws_of_their_own() -> None:
    half, rows = np.full((500, 1, 8, 8), 128, dtype=np.uint8), np.arange(500)
    train, test = (fixed_pixels(half, rows, part) > 0 for part in ("train", "test"))
    assert abs(np.corrcoef(train.ravel(), test.ravel())[0, 1]) < 4 / train.size**0.5


# ---- the same bits wherever an image is looked at ----


def test_an_image_alone_has_the_pixels_that_it_has_among_others() -> None:
    whole = fixed_pixels(GREY, np.arange(40), "train")
    assert set(np.unique(whole)) == {0, 255}
    assert np.array_equal(fixed_pixels(GREY[ORDER], ORDER, "train"), whole[ORDER])
    source = Images(GREY, np.arange(40) % 2, 2).fixed()
    for size in (1, 3, 40):
        parts = [source.images[first : first + size] for first in range(0, 40, size)]
        assert np.array_equal(np.concatenate(parts), whole)
    assert source.images[ORDER[:0]].shape == (0, 3, 5, 7)
    assert source.images.shape == GREY.shape
    many = np.full((ROWS + 3, 1, 2, 2), 100, dtype=np.uint8)  # more than are drawn in one go
    rows = np.arange(len(many))
    assert np.array_equal(fixed_pixels(many, rows, "test")[-5:], fixed_pixels(many[-5:], rows[-5:], "test"))


def own_file(folder: Path) -> Path:
    """Digits as somebody's own images, which may stay in their file."""
    path = folder / "mine.npz"
    source = load("digits", "", "train")
    np.savez(path, images=source.images[:300], labels=source.labels[:300])
    return path


def test_pixels_are_the_same_over_placements_and_splits(tmp_path: Path) -> None:
    """Of an image in memory, on the host and in its file, in whatever part of whatever split it is."""
    path = own_file(tmp_path)
    expected = fixed_pixels(load("digits", "", "train").images[:300], np.arange(300), "train")
    for mapped in (False, True):
        for num_test in (None, 0, 100):
            for part in ("train", "test") if num_test != 0 else ("train",):
                source = arrays.load(str(path), part, num_test=num_test, mapped=mapped)
                assert source.rows is not None
                assert np.array_equal(source.fixed().images[:], expected[source.rows])
    source = arrays.load(str(path), "train", num_test=0, mapped=True).fixed()
    for split_seed in (0, 1):
        split = draw_split(
            source.labels,
            10,
            num_labelled=20,
            num_validation=50,
            split_seed=split_seed,
            labelled_in_unlabelled=True,
        )
        for on_host in (False, True):
            data = training_data(source, split, CPU, on_host)
            assert np.array_equal(data.x_labelled[:].numpy(), expected[split.labelled])
            assert np.array_equal(data.x_unlabelled[:].numpy(), expected[split.unlabelled])
            held_out = evaluation_data(source, split.validation, CPU, on_host)
            assert np.array_equal(held_out.x[:].numpy(), expected[split.validation])


def test_test_images_of_an_own_file_are_drawn_as_a_test_part(tmp_path: Path) -> None:
    digits = load("digits", "", "train")
    images, labels = digits.images[:60], digits.labels[:60]
    np.savez(tmp_path / "mine.npz", images=images, labels=labels, test_images=images, test_labels=labels)
    for part in ("train", "test"):
        source = arrays.load(str(tmp_path / "mine.npz"), part)
        assert np.array_equal(source.fixed().images[:], fixed_pixels(images, np.arange(60), part))


@pytest.mark.parametrize("on_host", [False, True])
def test_steps_seeds_and_batch_sizes_draw_nothing(on_host: bool) -> None:
    source = Images(GREY, np.arange(40) % 2, 2)
    expected = {image.tobytes() for image in fixed_pixels(GREY, np.arange(40), "train")}
    split = Split(np.arange(10), np.arange(35), np.arange(35, 40))
    for seed, size in ((0, 4), (1, 9)):
        batches = Batches(
            training_data(source.fixed(), split, CPU, on_host),
            batch_size_labelled=size,
            batch_size_unlabelled=2 * size,
            binarization="fixed",
            seed=seed,
        )
        for step in range(6):
            generator = torch.Generator().manual_seed(step)
            before = generator.get_state()
            x, _ = batches(step, generator)
            assert torch.equal(generator.get_state(), before)
            assert set(x.unique().tolist()) <= {0.0, 1.0}
            assert {(image * 255).to(torch.uint8).numpy().tobytes() for image in x} <= expected


# ---- runs ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fixed") / "run"
    run(f"{FIXED} train.steps=8", path)
    return path


def measured(line: str) -> dict[str, float]:
    ended = command(evaluate.main, line)
    assert ended.code == 0, ended.said
    return dict(json.loads(ended.out))


def test_a_resumed_run_equals_one_that_was_not_stopped(folder: Path, tmp_path: Path) -> None:
    run(f"{FIXED} train.steps=4", tmp_path / "half")
    resume(tmp_path / "half", "train.steps=8")
    assert equal(checkpoint(tmp_path / "half")["model"], checkpoint(folder)["model"])


@pytest.mark.parametrize("form", ["npz", "pictures"])
def test_placement_changes_no_bit_of_a_run(form: str, tmp_path: Path) -> None:
    path = stored(tmp_path) if form == "npz" else folder_of_files(tmp_path / "pictures")
    for placement in ("device", "host"):
        run(f"{line(path)} data.binarization=fixed data.placement={placement} train.steps=6", tmp_path / placement)
        assert checkpoint(tmp_path / placement)["facts"]["binarization"] == "fixed"
    assert equal(checkpoint(tmp_path / "device"), checkpoint(tmp_path / "host"))


def test_a_run_says_what_its_numbers_are(folder: Path) -> None:
    result = json.loads((folder / "result.json").read_text())
    assert (result["config"]["likelihood"], result["log_likelihood_of"]) == ("bernoulli", "log p(x)")
    assert checkpoint(folder)["facts"]["binarization"] == "fixed"


def test_evaluation_looks_at_the_same_pixels_each_time(folder: Path) -> None:
    """Whatever the batch size is, and in every part: they are those of data/fixed.py."""
    trained, expected = stored_run(folder), drawn("train")
    assert np.array_equal(trained.validation.x[:].numpy(), expected[trained.split.validation])
    assert np.array_equal(trained.load_training("labelled").x[:].numpy(), expected[trained.split.labelled])
    assert np.array_equal(trained.load_test().x[:].numpy(), drawn("test"))
    assert measured(f"{folder}") == measured(f"{folder}")
    whole = trained.measure("val")["val_accuracy"]
    trained.config.evaluation.batch_size = 7
    assert trained.measure("val")["val_accuracy"] == whole


def test_other_pixels_at_evaluation(folder: Path, tmp_path: Path) -> None:
    """Of a run with fixed pixels any other, from its grey levels; and fixed ones of a run with others."""
    own = measured(f"{folder} --part both")
    assert measured(f"{folder} --part both --binarization fixed") == own
    found = {how: measured(f"{folder} --part both --binarization {how}") for how in ("dynamic", "threshold", "none")}
    for part in ("val_bound", "test_bound"):
        assert len({own[part], *(numbers[part] for numbers in found.values())}) == 4
    run(f"{MLP} train.steps=8", tmp_path / "dynamic")
    other = stored_run(tmp_path / "dynamic")
    before = measured(f"{tmp_path / 'dynamic'} --part val")
    assert measured(f"{tmp_path / 'dynamic'} --part val --binarization fixed") != before
    other.look_at("fixed")
    assert np.array_equal(other.validation.x[:].numpy(), drawn("train")[other.split.validation])
    other.look_at("dynamic")
    assert other.measure("val")["val_bound"] == before["val_bound"]


def test_an_image_from_outside_draws_its_own_pixels(folder: Path) -> None:
    """It has no row: as with `dynamic`, its key is the image itself. One that is drawn already stays as it is."""
    images = load("digits", "", "test").images[:20]
    model = open_run(folder)
    together, alone = model.predict(images), torch.cat([model.predict(image[None]).bound for image in images])
    torch.testing.assert_close(together.bound, alone, atol=1e-4, rtol=1e-4)
    ((x,), _), *_ = model._batches(images)
    assert set(x.unique().tolist()) == {0.0, 1.0}
    ((again,), _), *_ = model._batches((x * 255).to(torch.uint8))
    assert torch.equal(again, x)


def test_a_part_is_predicted_with_its_fixed_pixels(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    whole = predict.predict
    monkeypatch.setattr(predict, "predict", lambda model, chunks, *rest: whole(model, remembered(chunks, seen), *rest))
    ended = command(predict.main, f"{folder} test --output {tmp_path}/found.csv")
    assert ended.code == 0, ended.said
    assert np.array_equal(np.concatenate(seen), drawn("test"))
    with (tmp_path / "found.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    labels = load("digits", "", "test").labels
    accuracy = np.mean([int(row["class"]) == label for row, label in zip(rows, labels, strict=True)])
    assert accuracy == pytest.approx(json.loads((folder / "result.json").read_text())["test_accuracy"])


def remembered(chunks: Any, seen: list[Any]) -> Any:
    for names, images in chunks:
        seen.append(images)
        yield names, images


@pytest.mark.parametrize("images", ["", "--images {}/mine.npz"], ids=["validation images", "others"])
def test_pictures_are_drawn_of_fixed_pixels(images: str, folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", images=load("digits", "", "test").images[:30])
    found = []
    for seed in (0, 1):
        picture = tmp_path / f"{seed}.png"
        asked = f"{folder} --kind reconstructions --columns 4 --seed {seed} --output {picture}"
        ended = command(generate.main, f"{asked} {images.format(tmp_path)}")
        assert ended.code == 0, ended.said
        found.append(picture.read_bytes())
    assert found[0] == found[1]  # the seed draws no pixels


def test_baselines_see_what_a_run_sees(tmp_path: Path) -> None:
    asked = ["data=digits", "data.num_labelled=50", "data.num_validation=200", "data.binarization=fixed"]
    config, _ = baselines.composed(asked)
    expected = drawn("train").reshape(-1, 64) / 255
    source = baselines.pixels_of("train", config)
    split = config.data.split(source.labels, source.num_classes)
    known = baselines.known_of(source, split, config)
    assert np.array_equal(known.x, expected[np.union1d(split.labelled, split.unlabelled)])
    assert np.array_equal(known.x_validation, expected[split.validation])
    ended = command(baselines.main, f"{' '.join(asked)} --methods nearest_neighbour --output {tmp_path}/found")
    assert ended.code == 0, ended.said
    near = ((drawn("test").reshape(-1, 1, 64) / 255 - expected[split.labelled]) ** 2).sum(axis=2).argmin(axis=1)
    right = np.mean(source.labels[split.labelled][near] == load("digits", "", "test").labels)
    result = json.loads((tmp_path / "found" / "nearest_neighbour" / "result.json").read_text())
    assert result["test_accuracy"] == pytest.approx(right, abs=0.02)  # ties


def test_black_and_white_pixels_stay_what_they_are() -> None:
    images = np.where(GREY > 127, 255, 0).astype(np.uint8)
    assert np.array_equal(fixed_pixels(images, np.arange(40), "train"), images)
    x = torch.from_numpy(images)
    assert torch.equal(binarize(x, "fixed", torch.Generator()), (x > 0).float())
