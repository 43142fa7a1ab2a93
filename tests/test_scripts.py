"""scripts.evaluate on any checkpoint and part, and the pictures of scripts.generate."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.datasets import load
from data.facts import Array
from models.evaluation import calibration_error
from models.m2.model import SemiSupervisedVAE
from models.m2.pictures import KINDS, analogies, interpolation, reconstructions
from models.networks import ImageShape, conv
from models.pictures import beside, grid, turn_about
from scripts import evaluate, generate
from scripts.benchmark import compose_run
from tests.runs import CONV, MLP, ROOT, Ended, command, run
from training import checkpoints
from training.pictures import save_figure
from training.run import Run
from training.saved import stored_run
from training.state import changes, flat, plain

K, SHAPE = 3, torch.Size((2, 6, 5))
NAMES = ("accuracy", "bound", "reconstruction", "kl_y", "kl_z", "calibration_error")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps with checkpoints at 6 and 8; it keeps the intensities, so that no pixel is drawn."""
    path = tmp_path_factory.mktemp("scripts") / "run"
    run(MLP + "estimator=marginalization train.steps=8 data.binarization=none", path)
    return path


def measured(line: str) -> dict[str, Any]:
    ended = command(evaluate.main, line)
    assert ended.code == 0, ended.said
    return dict(json.loads(ended.out))


def assert_refused(ended: Ended, *words: str) -> None:
    assert ended.code == 2, ended.said
    assert ended.out == ""
    assert ended.err.startswith("catvae: "), ended.err
    assert ended.err.count("\n") == 1, ended.err
    for word in words:
        assert word in ended.err, ended.err


@pytest.mark.parametrize("unbuffered", ["", "1"])  # it is found where something is printed, or at the end
def test_a_reader_that_has_seen_enough_ends_a_command_without_a_word(unbuffered: str, folder: Path) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "scripts.evaluate", str(folder), "--part", "val"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    ended = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    os.close(writes)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")


# ---- evaluate ----


@pytest.mark.parametrize("part", ["labelled", "unlabelled"])
def test_training_images_are_measured_with_their_true_labels(part: str, folder: Path) -> None:
    found = measured(f"{folder} --part {part}")
    assert found.keys() == {"steps", *(f"{part}_{name}" for name in (*NAMES, "n", "n_with_label"))}
    source = load("digits", "", "train")
    split = json.loads((folder / "split.json").read_text())
    rows = sorted({*split[part]} - ({*split["labelled"]} if part == "unlabelled" else set()))
    assert len(rows) == {"labelled": 50, "unlabelled": 1437 - 200 - 50}[part]
    assert found[f"{part}_n"] == found[f"{part}_n_with_label"] == len(rows)
    q, labels = classified(stored_run(folder), source.images[rows]), torch.from_numpy(source.labels[rows])
    assert found[f"{part}_accuracy"] == (q.argmax(dim=-1) == labels).double().mean().item()
    assert found[f"{part}_calibration_error"] == pytest.approx(calibration_error(q, labels), abs=1e-6)


def classified(run: Run, images: Array) -> Tensor:
    run.model.eval()
    with torch.no_grad():
        return run.model.posterior(torch.from_numpy(images) / 255)


def test_images_without_a_label_count_for_the_bound_alone(folder: Path) -> None:
    run = stored_run(folder)
    data = run.load_training("unlabelled")
    whole = run.evaluate(data)
    data.labels[100:] = -1
    some = run.evaluate(data)
    assert (some.bound, some.kl_z) == (whole.bound, whole.kl_z)
    assert (some.n, some.n_with_label, whole.n_with_label) == (whole.n, 100, whole.n)
    right = classified(run, data.x[:100].numpy()).argmax(dim=-1) == data.labels[:100]
    assert some.accuracy == right.double().mean().item() != whole.accuracy
    data.labels[:] = -1
    none = run.evaluate(data)
    assert (none.accuracy, none.calibration_error, none.bound) == (None, None, whole.bound)


def test_any_checkpoint(folder: Path) -> None:
    newest, older = measured(f"{folder} --part val"), measured(f"{folder} --part val --checkpoint step_00000006.pt")
    assert (newest["steps"], older["steps"]) == (8, 6)
    assert newest["val_bound"] != older["val_bound"]
    path = folder / "checkpoints" / "step_00000006.pt"
    assert measured(f"{folder} --part val --checkpoint {path}") == older


def test_importance_samples(folder: Path) -> None:
    own = measured(f"{folder}")
    assert "val_log_likelihood" not in own
    more = measured(f"{folder} --importance-samples 20")
    assert more["val_log_likelihood"] > more["val_bound"]
    assert more["test_log_likelihood"] > own["test_log_likelihood"]  # tighter
    assert more["test_accuracy"] == own["test_accuracy"]


def test_the_first_images_alone(folder: Path) -> None:
    whole, some, one = (measured(f"{folder} --part val{first}") for first in ("", " --first 9", " --first 1"))
    assert (whole["val_n"], some["val_n"], one["val_n"]) == (200, 9, 1)
    assert len({whole["val_bound"], some["val_bound"], one["val_bound"]}) == 3
    assert measured(f"{folder} --part val --first 1000") == whole
    assert command(evaluate.main, f"{folder} --first 0").code == 2


def test_evaluate_with_other_pixels_than_the_runs(folder: Path) -> None:
    own = measured(f"{folder} --part val")
    assert measured(f"{folder} --part val --binarization none") == own
    binary = ("dynamic", "fixed", "threshold")
    bounds = {measured(f"{folder} --part val --binarization {how}")["val_bound"] for how in binary}
    assert len(bounds | {own["val_bound"]}) == 4


def test_evaluate_by_more_draws_of_the_pixels(folder: Path) -> None:
    drawn = f"{folder} --part val --binarization dynamic"
    one, nine = measured(drawn), measured(f"{drawn} --pixel-draws 9")
    assert measured(f"{drawn} --pixel-draws 1") == one
    assert nine.pop("val_calibration_error") != one.pop("val_calibration_error")
    del nine["val_accuracy"], one["val_accuracy"]  # which may be the same
    assert nine == one


def test_evaluate_by_what_else_tells_the_class(folder: Path) -> None:
    q, bound, both = (measured(f"{folder} --part val --classify-by {by}") for by in ("classifier", "bound", "both"))
    assert measured(f"{folder} --part val") == q
    assert len({found.pop("val_calibration_error") for found in (q, bound, both)}) == 3
    for found in (q, bound, both):
        del found["val_accuracy"]  # which may be the same
    assert q == bound == both


def test_a_generator_that_was_not_trained_tells_no_classes(tmp_path: Path) -> None:
    run(f"{MLP} objective.labelled=0 objective.unlabelled=0 train.steps=2", tmp_path / "run")
    assert measured(f"{tmp_path}/run --part val --classify-by classifier")["val_n"] > 0
    ended = command(evaluate.main, f"{tmp_path}/run --part val --classify-by both")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "catvae: --classify-by must be classifier for this run of q(y|x) alone, got both\n"


def test_evaluate_writes_what_it_prints(folder: Path, tmp_path: Path) -> None:
    printed = measured(f"{folder} --part val --output {tmp_path}/found.json")
    assert json.loads((tmp_path / "found.json").read_text()) == printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--checkpoint step_00000005.pt", ("no checkpoint step_00000005.pt", "step_00000006.pt, step_00000008.pt")),
        ("--checkpoint result.json", ("no checkpoint result.json",)),
        ("--output nowhere/found.json", ("folder that exists", "nowhere/found.json")),
        ("--pixel-draws 2", ("--pixel-draws must be 1", "binarization=none", "got 2")),
        ("--output found.txt", ("must end in .json", "found.txt")),
    ],
)
def test_evaluate_refuses(arguments: str, words: tuple[str, ...], folder: Path) -> None:
    assert_refused(command(evaluate.main, f"{folder} {arguments}"), *words)


def test_a_damaged_checkpoint_by_name(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    path.write_bytes(checkpoints.stored(folder)[0].read_bytes()[:1000])
    assert_refused(command(evaluate.main, f"{folder} --checkpoint {path}"), str(path), "cannot be read")


# ---- generate ----


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
@pytest.mark.parametrize("kind", [*KINDS, generate.SHEET])
def test_every_kind_in_every_format(kind: str, suffix: str, folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / f"picture.{suffix}"
    ended = command(generate.main, f"{folder} --kind {kind} --columns 4 --output {picture}")
    assert (ended.code, ended.out) == (0, f"{picture}\n"), ended.said
    if suffix != "png":
        content = picture.read_bytes()
        assert content.startswith(b"%PDF") if suffix == "pdf" else ElementTree.fromstring(content).tag.endswith("}svg")
        command(generate.main, f"{folder} --kind {kind} --columns 4 --output {picture}")
        assert picture.read_bytes() == content
        return
    cell, gap = 8 + 2, 2
    with Image.open(picture) as image:
        if kind == "sheet":
            assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
            assert 6 * 300 < image.width < 8 * 300
            return
        width, height = {
            "classes": (4 * cell + gap, 10 * cell + gap),
            "interpolation": (4 * cell + gap, 10 * cell + gap),
            "analogies": (11 * cell + 2 * gap + 6, 4 * cell + gap),
            "reconstructions": (4 * cell + gap, 2 * cell + gap),
            "samples": (4 * cell + gap, 4 * cell + gap),
        }[kind]
        assert image.size == (2 * width, 2 * height)


def test_a_checkpoint_and_a_seed_are_drawn(folder: Path, tmp_path: Path) -> None:
    pictures = set()
    for index, more in enumerate(("", "--seed 1", "--checkpoint step_00000006.pt", "--kind interpolation")):
        picture = tmp_path / f"{index}.png"
        assert command(generate.main, f"{folder} --output {picture} {more}").code == 0
        pictures.add(picture.read_bytes())
    assert len(pictures) == 4


@pytest.mark.parametrize("name", ["picture.jpg", "picture", "picture.tiff"])
def test_generate_refuses_an_unknown_suffix(name: str, folder: Path, tmp_path: Path) -> None:
    ended = command(generate.main, f"{folder} --output {tmp_path}/{name}")
    assert_refused(ended, "--output must end in .png, .pdf or .svg", name)
    assert list(tmp_path.iterdir()) == []


def test_generate_refuses_images_that_it_would_not_look_at(folder: Path, tmp_path: Path) -> None:
    ended = command(generate.main, f"{folder} --kind classes --images {tmp_path}/in --output {tmp_path}/a.png")
    assert_refused(ended, "--images must be left out with --kind classes")


# ---- what is drawn ----


@pytest.fixture
def model() -> SemiSupervisedVAE:
    torch.manual_seed(0)
    networks = conv(ImageShape(*SHAPE), K, latent_size=4, channels=2, hidden=8, dropout=0.5, scale="softplus")
    return SemiSupervisedVAE(networks)


def one_by_one(model: SemiSupervisedVAE, k: int, z: Tensor) -> Tensor:
    """p(x|y=k, z) [C, H, W] at one z [Z]."""
    model.eval()
    with torch.no_grad():
        return model.generate(torch.eye(K)[k].view(1, 1, K), z.view(1, 1, -1)).view(SHAPE)


def test_analogies_are_each_image_and_its_style_in_all_classes(model: SemiSupervisedVAE) -> None:
    x = torch.rand(5, *SHAPE)
    drawn = analogies(model, x)
    assert drawn.shape == (5 * (K + 1), *SHAPE)
    model.eval()
    for image, row in zip(x, drawn.view(5, K + 1, *SHAPE), strict=True):
        assert torch.equal(row[0], image)
        with torch.no_grad():
            y = torch.eye(K)[model.classifier(image[None]).argmax()].view(1, 1, K)
            z = model.inference(model.inference.features(image[None]), y)[0][0, 0]
        for k in range(K):
            torch.testing.assert_close(row[1 + k], one_by_one(model, k, z))
    best = model.classifier(x).argmax(dim=-1)  # in its own class the analogy is the reconstruction
    torch.testing.assert_close(drawn.view(5, K + 1, *SHAPE)[range(5), 1 + best], reconstructions(model, x)[5:])


def test_interpolation_is_the_same_quarter_circle_in_every_class(model: SemiSupervisedVAE) -> None:
    drawn = interpolation(model, SHAPE, torch.Generator().manual_seed(3), 5)
    assert drawn.shape == (K * 5, *SHAPE)
    first, last = torch.randn(2, 4, generator=torch.Generator().manual_seed(3))
    for k, row in enumerate(drawn.view(K, 5, *SHAPE)):
        for index, image in enumerate(row):
            angle = math.pi / 2 * index / 4
            torch.testing.assert_close(image, one_by_one(model, k, math.cos(angle) * first + math.sin(angle) * last))


def test_looking_leaves_the_model_as_it_was(model: SemiSupervisedVAE) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    analogies(model, torch.rand(2, *SHAPE))
    interpolation(model, SHAPE, torch.Generator(), 1)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_classes_take_turns() -> None:
    labels = torch.tensor([2, 2, 0, 0, 0, 1, 2])
    assert turn_about(labels).tolist() == [2, 5, 0, 3, 1, 4, 6]


def test_other_channels_are_drawn_as_their_mean() -> None:
    images = torch.rand(3, 2, 4, 4)
    assert torch.equal(grid(images, 3), grid(images.mean(dim=1, keepdim=True), 3))
    assert grid(torch.rand(3, 3, 4, 4), 3).shape[0] == 3


def test_beside_and_figure_keep_the_pixels(tmp_path: Path) -> None:
    left, right = (torch.randint(256, (3, 8, width), dtype=torch.uint8) for width in (5, 7))
    both = beside(left, right)
    assert torch.equal(both[:, :, :5], left)
    assert torch.equal(both[:, :, -7:], right)
    assert both[:, :, 5:-7].unique().tolist() == [255]
    save_figure([("", both)], tmp_path / "figure.png", width=1)
    with Image.open(tmp_path / "figure.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    zoom = round(300 / both.shape[2])
    assert pixels.shape == (zoom * 8, zoom * both.shape[2], 3)
    assert (pixels[zoom // 2 :: zoom, zoom // 2 :: zoom].transpose(2, 0, 1) == both.numpy()).all()


def test_runs_from_before_a_key_was_there_can_be_read(folder: Path, tmp_path: Path) -> None:
    state = torch.load(checkpoints.stored(folder)[-1], weights_only=True)
    config = state["config"]
    for section, key in ((config, "deterministic"), (config, "cuda_graph"), (config["data"], "path")):
        del section[key]
    torch.save(state, tmp_path / "old.pt")
    assert stored_run(folder, tmp_path / "old.pt").step == 8


def test_a_run_from_before_motion_is_the_same_experiment_with_none() -> None:
    config = compose_run([*CONV.split(), "train.steps=1"], "marginalization").config
    before = flat(plain(config))
    del before["model.rotation"], before["model.shift"]
    assert changes(before, config) == ""
    config.model["rotation"] = 10.0
    assert changes(before, config) == "model.rotation=10.0 (was 0.0)"
