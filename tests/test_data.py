"""Datasets, splits and minibatches: what training is given, and what it can never be given."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import re
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import train
from configs.check import check_labels, typed
from configs.schema import ConfigError
from data import datasets
from data.batches import (
    STEPS_AT_ONCE,
    Batches,
    Binarization,
    ShuffledIndices,
    TrainingData,
    binarize,
    evaluation_data,
    training_data,
)
from data.datasets import load
from data.facts import Array, DataError
from data.randomness import random_int16
from data.splits import ALL, Split, class_prior, draw_split
from data.stored import Images
from scripts import evaluate
from scripts.command import composed
from tests.runs import MLP, SMALL, checkpoint, command, resume
from training.process import threads_kept
from training.run import Run

CPU = torch.device("cpu")
CLASSES = 10
TRAIN_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
REAL_MNIST = Path(os.environ.get("CATVAE_DATA") or "~/.cache/catvae").expanduser()
LABELS = np.random.default_rng(0).integers(0, CLASSES, 600)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def split_of(labels: Any = LABELS, **changes: Any) -> Split:
    settings: dict[str, Any] = {"num_labelled": 50, "num_validation": 100, "split_seed": 0}
    settings["labelled_in_unlabelled"] = True
    return draw_split(labels, CLASSES, **(settings | changes))


def numbered_images() -> Images:
    """600 images of two pixels, which spell the image's row number in base 256."""
    rows = np.arange(len(LABELS))
    return Images(np.stack([rows // 256, rows % 256], -1).astype(np.uint8)[:, None, None], LABELS, CLASSES)


def row_numbers(x: torch.Tensor) -> list[int]:
    """What images [B, 1, 1, 2] of `numbered_images` spell, as uint8 or as intensities in [0, 1]."""
    pixels = (x if x.dtype == torch.uint8 else x * 255).round().long()
    return [int(row) for row in 256 * pixels[:, 0, 0, 0] + pixels[:, 0, 0, 1]]


# --- splits


@pytest.mark.parametrize("split_seed", range(5))
@pytest.mark.parametrize("num_labelled", [10, 50, 200])
def test_labels_are_balanced_over_classes(split_seed: int, num_labelled: int) -> None:
    split = split_of(num_labelled=num_labelled, split_seed=split_seed)
    assert np.bincount(LABELS[split.labelled]).tolist() == [num_labelled // CLASSES] * CLASSES


@pytest.mark.parametrize("split_seed", range(5))
def test_parts_without_labelled_in_unlabelled_are_disjoint_and_cover_all(split_seed: int) -> None:
    split = split_of(split_seed=split_seed, labelled_in_unlabelled=False)
    parts = [split.labelled, split.unlabelled, split.validation]
    assert [len(part) for part in parts] == [50, 450, 100]
    assert np.sort(np.concatenate(parts)).tolist() == list(range(600))


@pytest.mark.parametrize("split_seed", range(5))
def test_labelled_in_unlabelled_is_all_but_validation(split_seed: int) -> None:
    split = split_of(split_seed=split_seed, labelled_in_unlabelled=True)
    assert set(split.labelled) < set(split.unlabelled)
    assert np.sort(np.concatenate([split.unlabelled, split.validation])).tolist() == list(range(600))


def test_split_depends_on_split_seed_alone() -> None:
    np.random.seed(1)
    torch.manual_seed(1)
    first = split_of()
    np.random.seed(2)
    torch.manual_seed(2)
    assert split_of().hash == first.hash
    assert split_of(split_seed=1).hash != first.hash


def test_hash_is_equal_exactly_where_the_split_is() -> None:
    split = split_of()
    same = Split(split.labelled.copy(), split.unlabelled.copy(), split.validation.copy())
    assert same.hash == split.hash
    for name in ("labelled", "unlabelled", "validation"):
        part = getattr(split, name).copy()
        part[3] += 1
        assert replace(split, **{name: part}).hash != split.hash
    joined = np.concatenate([split.labelled[-1:], split.unlabelled])
    moved = replace(split, labelled=split.labelled[:-1], unlabelled=joined)
    assert moved.hash != split.hash  # the same numbers, with the border between two lists shifted


def test_manifest_tells_the_split_and_where_it_comes_from() -> None:
    split = split_of(split_seed=3)
    manifest = split.manifest("digits", 3)
    assert (manifest["dataset"], manifest["split_seed"], manifest["hash"]) == ("digits", 3, split.hash)
    for name in ("labelled", "unlabelled", "validation"):
        assert manifest[name] == getattr(split, name).tolist()


def test_validation_is_the_same_whatever_is_labelled() -> None:
    validation = [
        split_of(num_labelled=number, labelled_in_unlabelled=both).validation.tolist()
        for number in (10, 50, 200)
        for both in (True, False)
    ]
    assert all(rows == validation[0] for rows in validation)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_labelled": 7}, r"data\.num_labelled must be all, or a positive multiple of the 10 classes.*got 7;"),
        ({"num_labelled": -10}, r"data\.num_labelled must be all, or a positive multiple.*got -10;"),
        ({"num_labelled": False}, r"data\.num_labelled must be all, or a positive multiple.*got false;"),
        (
            {"num_labelled": 0, "num_validation": 600},
            r"must fit into the 600 .*got 0 \+ 600; .* data\.num_validation=599",
        ),
        (
            {"num_labelled": 0, "num_validation": 600, "labels": LABELS * 0 - 1},
            r"must fit into the 600 training images, got 0 \+ 600; possible are at most data\.num_validation=599 with",
        ),
        ({"labels": LABELS * 0 - 1}, r"data\.num_labelled \+ data\.num_validation.*got 50 \+ 100"),
        ({"num_labelled": 15}, r"data\.num_labelled must be all, or a positive multiple.*got 15;"),
        ({"num_labelled": 9, "balanced": False}, r"data\.num_labelled must be all, or at least the 10 classes, got 9;"),
        ({"num_labelled": "some"}, r"data\.num_labelled must be all, or a positive multiple.*got some;"),
        ({"num_labelled": True}, r"data\.num_labelled must be all, or a positive multiple.*got true;"),
        ({"num_validation": -1}, r"data\.num_validation must be a number of images, a fraction below 1, or 0.*got -1"),
        ({"num_validation": 1.0}, r"data\.num_validation must be a number of images, a fraction below 1.*got 1\.0"),
        ({"num_validation": math.nan}, r"data\.num_validation must be a number of images.*got nan"),
        ({"num_validation": None}, r"data\.num_validation must be a number of images.*got null"),
        ({"num_labelled": 700}, r"data\.num_labelled \+ data\.num_validation must fit into the 600.*got 700 \+ 100"),
        ({"num_validation": 551}, r"data\.num_labelled \+ data\.num_validation must fit into.*got 50 \+ 551"),
        ({"labels": np.minimum(LABELS, 8)}, r"0 of 9\), got 50 \+ 100; possible are at most none, as each class"),
    ],
)
def test_impossible_sizes_are_refused_by_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_of(**changes)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_labelled": 50, "num_validation": 200, "split_seed": 0}, "82e8667e2178d29a"),
        ({"num_labelled": 50, "num_validation": 200, "split_seed": 2}, "07727e96e7a7b661"),
        ({"num_labelled": 20, "num_validation": 200, "split_seed": 0}, "ab0b35262b0bbc3d"),
        ({"num_labelled": 20, "num_validation": 200, "split_seed": 2}, "61883a5c82f10ce2"),
        ({"num_labelled": 100, "num_validation": 37, "split_seed": 0}, "91200d6d87ffd4de"),
        ({"num_labelled": 100, "num_validation": 37, "split_seed": 2}, "e1595c05431b7c8c"),
    ],
)
def test_splits_of_before_are_the_same(settings: dict[str, Any], expected: str) -> None:
    source = load("digits", "", "train")
    assert draw_split(source.labels, 10, labelled_in_unlabelled=True, **settings).hash.startswith(expected)


SIZES = np.array([1, 4, 30, 200, 365])  # unequal classes
UNEQUAL = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3, 4, -1], [*SIZES, 100]))


def unequal_split(num_labelled: Any = ALL, num_validation: Any = 0.2, **changes: Any) -> Split:
    settings: dict[str, Any] = {"balanced": False, "stratified": True, "split_seed": 0} | changes
    settings |= {"num_labelled": num_labelled, "num_validation": num_validation, "labelled_in_unlabelled": True}
    return draw_split(UNEQUAL, 5, **settings)


def counts(rows: Any) -> list[int]:
    return np.bincount(UNEQUAL[rows], minlength=5).tolist()


@pytest.mark.parametrize("split_seed", range(3))
@pytest.mark.parametrize("stratified", [True, False])
def test_all_labels_are_all_that_validation_leaves(stratified: bool, split_seed: int) -> None:
    many = np.maximum(UNEQUAL, 1)  # by chance, validation would take the only image of a class
    split = draw_split(
        np.where(UNEQUAL < 0, -1, many - 1),
        4,
        num_labelled=ALL,
        num_validation=0.25,
        split_seed=split_seed,
        labelled_in_unlabelled=False,
        stratified=stratified,
    )
    assert len(split.validation) == 150
    assert (UNEQUAL[split.unlabelled] < 0).all()
    assert np.array_equal(np.sort(np.concatenate([split.labelled, split.validation])), np.flatnonzero(UNEQUAL >= 0))


@pytest.mark.parametrize("number", [5, 6, 17, 60, 300, 480])
def test_labels_in_proportion_are_within_one_of_it_and_leave_no_class_out(number: int) -> None:
    split = unequal_split(number)
    got, available = np.array(counts(split.labelled)), SIZES - counts(split.validation)
    assert got.sum() == number
    assert got.min() >= 1
    assert (got <= available).all()
    expected = np.maximum(number * available / available.sum(), 1)
    assert np.abs(got - expected).max() <= (1 if number >= 60 else 3)  # small classes take from large ones


@pytest.mark.parametrize(("number", "expected"), [(0.2, 120), (60, 60), (1, 1), (0, 0), (595, 595), (0.001, 1)])
def test_validation_by_class_is_in_proportion_and_leaves_each_class_a_label(number: float, expected: int) -> None:
    split = unequal_split(ALL, number)
    got = np.array(counts(split.validation))
    assert got.sum() == expected
    assert (got < SIZES).all()
    assert np.abs(got - np.minimum(SIZES - 1, expected * SIZES / 600)).max() < (1.5 if expected < 595 else 3)
    assert counts(split.labelled) == (SIZES - got).tolist()


def test_validation_by_class_is_the_same_whatever_is_labelled_and_follows_the_seed() -> None:
    first = unequal_split(ALL).validation.tolist()
    assert unequal_split(17).validation.tolist() == unequal_split(5, balanced=True).validation.tolist() == first
    assert unequal_split(ALL, split_seed=1).validation.tolist() != first


def largest(message: str) -> list[dict[str, int]]:
    """The settings that a refusal calls possible."""
    said = message.partition("possible are at most ")[2].replace("data.", "")
    found = []
    for choice in said.split(", or "):
        number = re.search(r"num_labelled=(\d+) \(balanced=false: (\d+)\) with num_validation=(\d+)", choice)
        if number:
            found += [{"num_labelled": int(number[1]), "num_validation": int(number[3])}]
            found += [{"num_labelled": int(number[2]), "num_validation": int(number[3]), "balanced": False}]
        else:
            found += [{key: int(value) for key, value in re.findall(r"(num_\w+)=(\d+)", choice)}]
    return found


@pytest.mark.parametrize("split_seed", range(2))
@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize(("num_labelled", "num_validation"), [(500, 200), (7, 100), (50, 580), (550, 0)])
def test_what_a_refusal_calls_possible_is_and_one_more_is_not(
    num_labelled: int, num_validation: int, stratified: bool, split_seed: int
) -> None:
    def draw(**changes: Any) -> Split:
        return split_of(stratified=stratified, split_seed=split_seed, **changes)

    with pytest.raises(ValueError, match="possible are at most") as refused:
        draw(num_labelled=num_labelled, num_validation=num_validation)
    choices = largest(str(refused.value))
    assert choices
    for choice in choices:
        draw(**choice)
        is_labelled = choice["num_labelled"] != num_labelled
        key = "num_labelled" if is_labelled else "num_validation"
        step = CLASSES if is_labelled and choice.get("balanced", True) else 1
        with pytest.raises(ValueError, match="must fit into"):
            draw(**choice | {key: choice[key] + step})


# --- no labels


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("both", [True, False])
def test_without_labels_all_but_validation_is_unlabelled(both: bool, balanced: bool, stratified: bool) -> None:
    """And the validation images are those of a split with labels."""
    how: dict[str, Any] = {"balanced": balanced, "stratified": stratified, "labelled_in_unlabelled": both}
    for num_validation in (100, 0.2, 0, 590 if stratified else 599):
        split = split_of(num_labelled=0, num_validation=num_validation, **how)
        assert len(split.labelled) == 0
        assert split.labelled.dtype == np.int64
        assert np.array_equal(np.sort(np.concatenate([split.unlabelled, split.validation])), np.arange(600))
        if num_validation in (100, 0.2):
            with_labels = split_of(num_validation=num_validation, **how)
            assert np.array_equal(split.validation, with_labels.validation)
            assert split.hash != with_labels.hash


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("num_classes", [0, CLASSES])
def test_where_no_image_has_a_label_validation_is_drawn_over_all(num_classes: int, stratified: bool) -> None:
    unknown = np.full(50, -1)
    how: dict[str, Any] = {"labelled_in_unlabelled": True, "stratified": stratified}
    splits = [
        draw_split(unknown, num_classes, num_labelled=0, num_validation=0.2, split_seed=seed, **how)
        for seed in (0, 1, 0)
    ]
    for split in splits:
        assert (len(split.labelled), len(split.validation)) == (0, 10)
        assert np.array_equal(np.sort(np.concatenate([split.unlabelled, split.validation])), np.arange(50))
    assert splits[0].hash == splits[2].hash != splits[1].hash


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("size", [0, 50])
def test_minibatches_without_labels(size: int, on_host: bool) -> None:
    """Whether there are no labelled images, or none of them are asked for."""
    split = split_of(num_labelled=size)
    batches = Batches(
        training_data(numbered_images(), split, CPU, on_host),
        batch_size_labelled=0,
        batch_size_unlabelled=125,
        binarization="none",
        seed=0,
    )
    seen: list[int] = []
    for step in range(4):
        x, y = batches(step, generator())
        assert (x.shape, x.dtype, y.shape, y.dtype) == ((125, 1, 1, 2), torch.float32, (0, CLASSES), torch.float32)
        seen += row_numbers(x)
    assert sorted(seen) == split.unlabelled.tolist()
    labelled = batches.rows(7)[0][:-125]
    assert (labelled.shape, labelled.dtype) == ((0,), torch.int64)


def test_images_without_any_class_are_trained_on_and_measured() -> None:
    source = Images(numbered_images().images, np.full(600, -1), 0)
    split = draw_split(source.labels, 0, num_labelled=0, num_validation=100, split_seed=0, labelled_in_unlabelled=True)
    data = training_data(source, split, CPU)
    assert (data.x_labelled.shape, data.y_labelled.shape, len(data.x_unlabelled)) == ((0, 1, 1, 2), (0, 0), 500)
    held_out = evaluation_data(source, split.validation, CPU)
    assert held_out.labels.tolist() == [-1] * 100
    assert row_numbers(held_out.x[:]) == split.validation.tolist()
    assert class_prior("uniform", source.labels[split.labelled], 0) == []


def test_a_batch_without_rows_is_empty_at_every_step() -> None:
    for size in (0, 7):
        assert [order(size, 0)(step).shape for step in (0, 1, 9)] == [(0,)] * 3


@pytest.mark.parametrize(
    ("overrides", "validation"),
    [
        ("data=digits", 200),
        ("data=digits data.balanced=false data.stratified=true data.num_validation=0.1", 144),
        ("data=digits data.labelled_in_unlabelled=false data.num_validation=0", 0),
        ("data=digits data.random_classes=3 data.binarization=fixed", 200),
    ],
)
def test_a_configuration_without_labels(overrides: str, validation: int) -> None:
    """Its keys make sense; whether the model trains without labels is asked of the model."""
    config = typed(composed(*overrides.split(), "data.num_labelled=0", "train.batch_size_labelled=0"))
    source = config.data.load("train")
    split = config.data.split(source.labels, source.num_classes, source.class_names, source.digest)
    assert (len(split.labelled), len(split.validation), len(split.unlabelled)) == (0, validation, 1437 - validation)
    with pytest.raises(ConfigError, match=r"data\.num_labelled must be all, or .* got 0; possible are at most"):
        check_labels(config, SimpleNamespace(has_labels=True))
    check_labels(config, SimpleNamespace(has_labels=False))
    config.train.batch_size_labelled = 10
    with pytest.raises(ConfigError, match=r"batch_size_labelled must be 0 with a model without labels, got 10"):
        check_labels(config, SimpleNamespace(has_labels=False))


def test_a_run_whose_model_trains_without_labels_has_its_data() -> None:
    without = "data.num_labelled=0 train.batch_size_labelled=0"
    with pytest.raises(ConfigError, match=r"data\.num_labelled must be all, or"):  # such as of a search, unseen before
        Run(typed(composed(*f"{MLP} {without}".split())))
    config = typed(composed(*["data=digits", "model=categorical_mlp", "train.batch_size_unlabelled=10", "device=cpu"]))
    with threads_kept():
        made = Run(config)
        x, y = made.batches(3, generator())
        assert (x.shape, y.shape) == ((10, 1, 8, 8), (0, 10))
        found = made.validate()
        held_out = replace(made.validation, labels=made.validation.labels * 0 - 1)
        unknown = made.evaluate(held_out, config.evaluation.validation_samples)
    assert (found.accuracy, found.n, found.n_with_label) == (None, 200, 200)
    assert (unknown.n, unknown.n_with_label) == (200, 0)
    assert unknown.means == found.means


def test_classes_are_named_in_a_refusal() -> None:
    with pytest.raises(ValueError, match=r"\(1 of ant, 4 of bee, 30 of cat, 200 of dog, 365 of eel\), got 700 \+ 120"):
        unequal_split(700, class_names=("ant", "bee", "cat", "dog", "eel"))


def test_published_files_have_a_digest_each_of_both_parts(tmp_path: Path) -> None:
    images, labels = write(tmp_path)
    before = load("mnist", str(tmp_path), "train", checksum=False).contents
    assert sorted(before) == sorted([images.name, labels.name])
    (images.parent / "t10k-images-idx3-ubyte").write_bytes(b"any")
    assert load("mnist", str(tmp_path), "train", checksum=False).contents.items() > before.items()
    labels.write_bytes(idx(SMALL_LABELS[::-1].copy()))
    after = load("mnist", str(tmp_path), "train", checksum=False).contents
    assert after[images.name] == before[images.name]
    assert after[labels.name] != before[labels.name]


ON_BOTH = (
    f"{SMALL} model=mlp model.hidden=8 data=mnist data.checksum=false data.num_labelled=10 data.num_validation=10 "
    "train.steps=2"
)


def write_both_parts(root: Path) -> Path:
    """A training and a test part as MNIST's files have them; returns their folder."""
    noise, raw = np.random.default_rng(0), root / "MNIST" / "raw"
    labels = (np.arange(40) % CLASSES).astype(np.uint8)
    write(root, idx(noise.integers(256, size=(40, 28, 28)).astype(np.uint8)), idx(labels))
    (raw / "t10k-images-idx3-ubyte").write_bytes(idx(noise.integers(256, size=(10, 28, 28)).astype(np.uint8)))
    (raw / "t10k-labels-idx1-ubyte").write_bytes(idx(labels[:10]))
    return raw


@pytest.mark.parametrize("changed", ["train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"])
def test_a_published_file_that_changes_while_a_run_trains_ends_it(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, original = write_both_parts(tmp_path), train.train

    def meanwhile(*arguments: Any) -> int:
        content = (raw / changed).read_bytes()
        (raw / changed).write_bytes(content[:20] + content[20:][::-1])
        return original(*arguments)

    line = f"{ON_BOTH} data.root={tmp_path} hydra.run.dir={tmp_path}/run"
    monkeypatch.setattr(train, "train", meanwhile)
    ended = command(train.main, line)
    assert ended.code == 2, ended.said
    assert f"{changed} in {tmp_path} has changed since this run read it" in ended.said
    assert checkpoint(tmp_path / "run")["step"] == 2
    assert not (tmp_path / "run" / "result.json").exists()
    said = resume(tmp_path / "run", "train.steps=4", code=2).said
    assert f"{changed} in {tmp_path} has changed" in said


def test_scripts_find_published_images_where_they_are_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_both_parts(tmp_path / "then")
    line = f"{ON_BOTH} data.root={tmp_path}/then hydra.run.dir={tmp_path}/run"
    assert command(train.main, line).code == 0
    before = command(evaluate.main, f"{tmp_path}/run").out
    assert "test_accuracy" in before
    (tmp_path / "then").rename(tmp_path / "now")
    monkeypatch.setenv("CATVAE_DATA", str(tmp_path / "now"))
    assert command(evaluate.main, f"{tmp_path}/run").out == before


# --- what training sees


def test_training_data_has_no_field_for_an_unlabelled_image_s_label() -> None:
    assert [field.name for field in fields(TrainingData)] == ["x_labelled", "y_labelled", "x_unlabelled"]


@pytest.mark.parametrize("labelled_in_unlabelled", [True, False])
def test_labels_outside_the_labelled_images_do_not_reach_training(labelled_in_unlabelled: bool) -> None:
    """Poisons all labels but the labelled images' after the split is drawn: training sees no change."""
    source = numbered_images()
    split = split_of(labelled_in_unlabelled=labelled_in_unlabelled)
    poisoned = (LABELS + 1) % CLASSES
    poisoned[split.labelled] = LABELS[split.labelled]
    clean = training_data(source, split, CPU)
    tainted = training_data(replace(source, labels=poisoned), split, CPU)
    for field in fields(TrainingData):
        assert torch.equal(getattr(clean, field.name), getattr(tainted, field.name))
    everywhere = training_data(replace(source, labels=(LABELS + 1) % CLASSES), split, CPU)
    assert not torch.equal(everywhere.y_labelled, clean.y_labelled)


def test_over_epochs_only_labelled_images_come_with_a_label_and_it_is_theirs() -> None:
    """A peer keyed the label mask by batch position over a shuffled loader: in time every label leaked."""
    split = split_of(labelled_in_unlabelled=False)
    batches = Batches(
        training_data(numbered_images(), split, CPU),
        batch_size_labelled=7,
        batch_size_unlabelled=40,
        binarization="none",
        seed=0,
    )
    labels: dict[int, int] = {}
    unlabelled: set[int] = set()
    for step in range(40):
        x, y = batches(step, generator())
        assert torch.equal(y.sum(dim=-1), torch.ones(7))
        labels |= dict(zip(row_numbers(x[:7]), y.argmax(dim=-1).tolist(), strict=True))
        unlabelled |= set(row_numbers(x[7:]))
    assert labels == {row: LABELS[row] for row in split.labelled}
    assert unlabelled == set(split.unlabelled)


def test_batches_depend_on_step_seed_and_generator_alone() -> None:
    def make(seed: int) -> Batches:
        data = training_data(numbered_images(), split_of(), CPU)
        return Batches(data, batch_size_labelled=10, batch_size_unlabelled=20, binarization="dynamic", seed=seed)

    batches = make(0)
    later = batches(11, generator(1))
    batches(3, generator(2))
    again = batches(11, generator(1))
    fresh = make(0)(11, generator(1))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(later, again, fresh, strict=True))
    assert not torch.equal(later[0], make(1)(11, generator(1))[0])


def test_evaluation_data_keeps_rows_and_labels_together() -> None:
    split = split_of()
    part = evaluation_data(numbered_images(), split.validation, CPU)
    assert row_numbers(part.x[:]) == split.validation.tolist()
    assert part.labels.tolist() == LABELS[split.validation].tolist()
    assert len(evaluation_data(numbered_images(), slice(None), CPU).x) == len(LABELS)


def test_published_classes_have_their_published_names() -> None:
    assert datasets.facts("mnist", None).class_names == tuple("0123456789")
    assert load("digits", "", "test").class_names == tuple("0123456789")
    assert datasets.facts("fashion_mnist", None).class_names[::9] == ("T-shirt/top", "Ankle boot")
    assert datasets.facts("kmnist", None).class_names[::9] == ("o", "wo")
    assert datasets.facts("fashion_mnist", None, random_classes=3).class_names == ("0", "1", "2")
    assert load("digits", "", "train", random_classes=12).class_names == tuple(map(str, range(12)))
    for facts in datasets.DATASETS.values():
        assert len(set(facts.class_names)) == facts.num_classes


# --- order of the rows


def order(size: int, batch_size: int, seed: int = 0, purpose: str = "order") -> ShuffledIndices:
    return ShuffledIndices(size, batch_size, seed, purpose)


@pytest.mark.parametrize(("size", "batch_size"), [(12, 3), (10, 3), (10, 10), (10, 25), (7, 1), (1, 4)])
def test_each_epoch_visits_every_row_once_whatever_the_batch_size(size: int, batch_size: int) -> None:
    indices = order(size, batch_size)
    batches = [indices(step) for step in range(4 * size)]
    assert all(len(batch) == batch_size for batch in batches)
    epochs = torch.cat(batches).view(-1, size)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(size).expand_as(epochs))


def test_epochs_are_shuffled_anew() -> None:
    indices = order(50, 50)
    epochs = {tuple(indices(epoch).tolist()) for epoch in range(20)}
    assert len(epochs) == 20
    assert tuple(range(50)) not in epochs


@pytest.mark.parametrize("batch_size", [3, 10, 25])
def test_rows_are_a_function_of_the_step_alone(batch_size: int) -> None:
    indices = order(10, batch_size)
    in_order = [indices(step) for step in range(12)]
    for step in (7, 0, 11, 11, 3, 2, 9):
        assert torch.equal(indices(step), in_order[step])
        assert torch.equal(order(10, batch_size)(step), in_order[step])


@pytest.mark.parametrize("images", [50, 2**19])
def test_rows_of_a_step_come_with_those_of_many(images: int) -> None:
    """In steps that follow each other or go back, within a table and from one to the next."""
    data = TrainingData(torch.zeros(10, 1), torch.eye(10), torch.zeros(images, 1))
    batches = Batches(data, batch_size_labelled=3, batch_size_unlabelled=images, binarization="none", seed=0)
    assert len(batches.steps_in_table) == 0
    for step in (
        (0, 1, STEPS_AT_ONCE - 1, STEPS_AT_ONCE, STEPS_AT_ONCE + 1, 5, 0) if images < STEPS_AT_ONCE else (0, 1, 2, 0)
    ):
        (rows,) = batches.rows(step)
        assert torch.equal(rows, torch.cat([batches.labelled(step), batches.unlabelled(step)]))
        assert step in batches.steps_in_table
        assert len(batches.steps_in_table) * len(rows) <= 2**20


def test_seed_and_purpose_change_the_order() -> None:
    first = order(100, 100)(0)
    assert not torch.equal(order(100, 100, seed=1)(0), first)
    assert not torch.equal(order(100, 100, purpose="other")(0), first)


# --- binarization


def test_dynamic_binarization_is_bernoulli_of_the_intensity() -> None:
    draws = 100_000
    intensity = torch.tensor([0, 1, 64, 128, 200, 254, 255], dtype=torch.uint8)
    x = binarize(intensity.expand(draws, -1), "dynamic", generator())
    assert ((x == 0) | (x == 1)).all()
    p = intensity.double() / 255
    deviation = (p * (1 - p) / draws).sqrt()
    assert ((x.double().mean(dim=0) - p).abs() <= 4 * deviation).all()  # 0 and 255 exactly
    correlation = torch.corrcoef(x[:, 1:-1].T) - torch.eye(5)
    assert correlation.abs().max() < 5 / draws**0.5


def test_random_int16_is_uniform_in_both_of_its_bytes() -> None:
    number = 200_003  # not a multiple of the four that come from one word
    drawn = random_int16(torch.Size([number]), generator())
    assert drawn.dtype == torch.int16
    for byte in (drawn.to(torch.int64) & 255, (drawn.to(torch.int64) >> 8) + 128):
        counts = torch.bincount(byte, minlength=256).double()
        chi_squared = ((counts - number / 256).square() / (number / 256)).sum().item()
        assert abs(chi_squared - 255) < 4 * (2 * 255) ** 0.5
    neighbours = torch.corrcoef(torch.stack([drawn[:-1], drawn[1:]]).double())[0, 1]
    assert neighbours.abs() < 4 / number**0.5
    assert random_int16(torch.Size([3, 0, 2]), generator()).shape == (3, 0, 2)


def test_threshold_is_one_above_half_intensity() -> None:
    pixels = torch.tensor([0, 127, 128, 255], dtype=torch.uint8)
    assert binarize(pixels, "threshold", generator()).tolist() == [0, 0, 1, 1]


def test_without_binarization_the_intensity_stays() -> None:
    pixels = torch.arange(256).to(torch.uint8)
    torch.testing.assert_close(binarize(pixels, "none", generator()), torch.linspace(0, 1, 256))


@pytest.mark.parametrize("binarization", ["dynamic", "fixed", "threshold", "none"])
def test_same_generator_gives_the_same_bits_and_global_randomness_is_left_alone(
    binarization: Binarization,
) -> None:
    pixels = torch.arange(256).to(torch.uint8)
    before = torch.get_rng_state()
    first = binarize(pixels, binarization, generator(5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(binarize(pixels, binarization, generator(5)), first)


def test_dynamic_binarization_draws_anew_each_time() -> None:
    pixels, random = torch.full((1000,), 128, dtype=torch.uint8), generator()
    assert not torch.equal(binarize(pixels, "dynamic", random), binarize(pixels, "dynamic", random))


# --- files

IMAGES: Array = np.random.default_rng(1).integers(0, 256, (5, 4, 3)).astype(np.uint8)
SMALL_LABELS: Array = np.array([3, 1, 4, 1, 9], dtype=np.uint8)


def idx(array: Array) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write(
    root: Path, images: bytes = idx(IMAGES), labels: bytes = idx(SMALL_LABELS), suffix: str = ""
) -> tuple[Path, Path]:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    paths = raw / (TRAIN_FILES[0] + suffix), raw / (TRAIN_FILES[1] + suffix)
    paths[0].write_bytes(images)
    paths[1].write_bytes(labels)
    return paths


def refusal(root: Path) -> str:
    with pytest.raises(DataError) as caught:
        load("mnist", str(root), "train", checksum=False)
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_read_plain_and_gzipped(tmp_path: Path, suffix: str) -> None:
    images, labels = idx(IMAGES), idx(SMALL_LABELS)
    if suffix:
        images, labels = gzip.compress(images), gzip.compress(labels)
    write(tmp_path, images, labels, suffix)
    source = load("mnist", str(tmp_path), "train", checksum=False)
    assert np.array_equal(source.images[:], IMAGES[:, None])
    assert source.images[:].dtype == np.uint8
    assert source.labels.tolist() == [3, 1, 4, 1, 9]
    assert source.labels.dtype == np.int64
    assert source.num_classes == 10


@pytest.mark.parametrize(
    ("name", "folder", "last"), [("fashion_mnist", "FashionMNIST", "Ankle boot"), ("kmnist", "KMNIST", "wo")]
)
def test_datasets_of_mnist_s_layout_train_from_files_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, folder: str, last: str
) -> None:
    """The published files are not here: these are made, so that they are not the ones of the published checksums."""
    noise, raw = np.random.default_rng(2), tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    for (images, labels), rows in zip(datasets.FILES.values(), (120, 40), strict=True):
        made = noise.integers(256, size=(rows, 28, 28)).astype(np.uint8), (np.arange(rows) % 10).astype(np.uint8)
        for file, content in zip((images, labels), made, strict=True):
            (raw / f"{file}.gz").write_bytes(gzip.compress(idx(content)))
    monkeypatch.setenv("CATVAE_DATA", str(tmp_path))
    line = f"data={name} model=mlp model.hidden=8 data.num_labelled=20 data.num_validation=20 train.steps=2 device=cpu "
    line += f"train.batch_size_labelled=10 train.batch_size_unlabelled=10 hydra.run.dir={tmp_path / 'run'} "
    refused = command(train.main, line)
    assert refused.code == 2, refused.said
    assert re.fullmatch(f"catvae: .*{folder}.*checksum.*\n", refused.err), refused.err
    ended = command(train.main, line + "data.checksum=false")
    assert ended.code == 0, ended.said
    assert checkpoint(tmp_path / "run")["facts"]["class_names"][-1] == last
    assert "test_accuracy" in (tmp_path / "run" / "result.json").read_text()


@pytest.mark.parametrize("kept", [0, 3, 10, 16, len(idx(IMAGES)) - 1])
def test_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    images, _ = write(tmp_path, images=idx(IMAGES)[:kept])
    message = refusal(tmp_path)
    assert f"{images} " in message
    assert "delete it to download it again" in message


def test_file_with_too_much_in_it_is_named(tmp_path: Path) -> None:
    _, labels = write(tmp_path, labels=idx(SMALL_LABELS) + b"\0")
    assert f"{labels} is damaged: 6 bytes of data where its header promises 5" in refusal(tmp_path)


@pytest.mark.parametrize("magic", [b"\0\0\x0d\x03", b"\0\1\x08\x03", b"<!DO"], ids=repr)
def test_wrong_magic_number_is_named(tmp_path: Path, magic: bytes) -> None:
    images, _ = write(tmp_path, images=magic + idx(IMAGES)[4:] + bytes(400))
    message = refusal(tmp_path)
    assert f"{images} is not an IDX file of unsigned bytes" in message
    assert "delete it to download it again" in message


@pytest.mark.parametrize("damage", ["truncated", "not gzip", "bits flipped"])
def test_damaged_gzip_is_named_as_it_lies_on_the_disk(tmp_path: Path, damage: str) -> None:
    packed = gzip.compress(idx(IMAGES))
    broken = {
        "truncated": packed[:-20],
        "not gzip": b"<html>",
        "bits flipped": packed[:10] + b"\xff" * 20 + packed[30:],
    }
    images, _ = write(tmp_path, images=broken[damage], labels=gzip.compress(idx(SMALL_LABELS)), suffix=".gz")
    assert f"cannot read {images} (" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (idx(IMAGES), idx(SMALL_LABELS[:4])),
        (idx(SMALL_LABELS), idx(SMALL_LABELS)),
        (idx(IMAGES), idx(IMAGES)),
    ],
    ids=["numbers differ", "labels twice", "images twice"],
)
def test_images_and_labels_that_do_not_belong_together_are_named(tmp_path: Path, images: bytes, labels: bytes) -> None:
    paths = write(tmp_path, images, labels)
    message = refusal(tmp_path)
    assert f"{paths[0]} and {paths[1]} do not belong together" in message
    assert str(paths[0].parent) in message


def test_label_that_is_no_class_is_refused(tmp_path: Path) -> None:
    _, labels = write(tmp_path, labels=idx(SMALL_LABELS + np.uint8(1)))
    assert f"{labels} has the label 10, and data=mnist has 10 classes" in refusal(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nTried https://..."),
        OSError("Network is unreachable"),
        TimeoutError(),
    ],
)
def test_missing_dataset_without_network_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def no_network(root: str, download: bool) -> None:
        assert Path(root).parent == tmp_path
        assert download
        raise error

    monkeypatch.setattr("torchvision.datasets.MNIST", no_network)
    message = refusal(tmp_path)
    for hint in ("data=mnist", str(tmp_path / "MNIST" / "raw"), "data.root", "CATVAE_DATA", "data=digits"):
        assert hint in message
    assert "\n" not in message


class Site:
    """Stands for torchvision's dataset: writes its files one by one, and may break off after some."""

    def __init__(self, breaks_off_after: int = 2) -> None:
        self.breaks_off_after = breaks_off_after

    def __call__(self, root: str, download: bool) -> None:
        raw = Path(root, "MNIST", "raw")
        raw.mkdir(parents=True)
        contents = idx(IMAGES), idx(SMALL_LABELS)
        for number, (name, content) in enumerate(zip(TRAIN_FILES, contents, strict=True)):
            if number == self.breaks_off_after:
                (raw / name).write_bytes(content[:3])
                raise OSError("connection reset")
            (raw / name).write_bytes(content)


@pytest.mark.parametrize("after", [0, 1])
def test_a_download_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    monkeypatch.setattr("torchvision.datasets.MNIST", Site(breaks_off_after=after))
    assert "could not be downloaded (connection reset)" in refusal(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("torchvision.datasets.MNIST", Site())
    assert load("mnist", str(tmp_path), "train", checksum=False).labels.tolist() == [3, 1, 4, 1, 9]


def test_two_downloads_at_once_do_each_other_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(4)

    def site(root: str, download: bool) -> None:
        together.wait(timeout=10)
        Site()(root, download)
        together.wait(timeout=10)

    monkeypatch.setattr("torchvision.datasets.MNIST", site)
    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(load, "mnist", str(tmp_path), "train", checksum=False) for _ in range(4)]
    assert all(done.result().labels.tolist() == [3, 1, 4, 1, 9] for done in loads)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["MNIST", "raw", *TRAIN_FILES]


def test_digits_need_no_files(tmp_path: Path) -> None:
    train, test = (load("digits", str(tmp_path / "nonexistent"), part) for part in ("train", "test"))
    assert list(tmp_path.iterdir()) == []
    assert train.images.shape == (1437, 1, 8, 8)
    assert test.images.shape == (360, 1, 8, 8)
    for part in (train, test):
        assert part.images[:].dtype == np.uint8
        assert (part.images[:].min(), part.images[:].max()) == (0, 255)
        assert set(part.labels) == set(range(10))
        assert len(part.labels) == len(part.images)
    assert train.labels[:5].tolist() == [0, 1, 2, 3, 4]


needs_mnist = pytest.mark.skipif(
    not all((REAL_MNIST / "MNIST" / "raw" / name).exists() for name in TRAIN_FILES),
    reason="needs CATVAE_DATA to hold MNIST/raw",
)


@needs_mnist
def test_real_mnist() -> None:
    train, test = (load("mnist", str(REAL_MNIST), part) for part in ("train", "test"))
    assert train.images.shape == (60_000, 1, 28, 28)
    assert test.images.shape == (10_000, 1, 28, 28)
    assert train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert np.bincount(train.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert abs(train.images[:].mean() / 255 - 0.1307) < 1e-4  # the mean that torchvision's examples subtract


@needs_mnist
@pytest.mark.parametrize("damage", ["a flipped bit", "truncated", "swapped"])
def test_damaged_mnist_is_found_by_its_checksum(tmp_path: Path, damage: str) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    names = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
    contents = {name: (REAL_MNIST / "MNIST" / "raw" / name).read_bytes() for name in names}
    images = contents[names[0]]
    flipped = bytearray(images)
    flipped[5_000_000] ^= 1
    half = 16 + 5_000 * 784  # the first half of the images after the second
    swapped = images[:16] + images[half:] + images[16:half]
    contents[names[0]] = {"a flipped bit": bytes(flipped), "truncated": images[:-1], "swapped": swapped}[damage]
    for name, content in contents.items():
        (raw / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{names[0]} is not the published file"):
        load("mnist", str(tmp_path), "test")
    if damage != "truncated":
        assert len(load("mnist", str(tmp_path), "test", checksum=False).labels) == 10_000


def test_of_a_plain_and_a_packed_file_the_one_with_a_known_checksum_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = {name: gzip.compress(idx(array)) for name, array in zip(TRAIN_FILES, (IMAGES, SMALL_LABELS), strict=True)}
    known = {f"{name}.gz": hashlib.md5(content).hexdigest() for name, content in packed.items()}
    monkeypatch.setitem(datasets.MD5, "mnist", known)
    plain = write(tmp_path, images=idx(IMAGES[::-1]))  # unpacked by a program that broke off, or worse
    for name, content in packed.items():
        plain[0].with_name(name + ".gz").write_bytes(content)
    assert np.array_equal(load("mnist", str(tmp_path), "train").images[:], IMAGES[:, None])
