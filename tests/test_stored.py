"""Images that stay in their file, or on the host, are the same images, and train to the same bits."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch

from data import arrays
from data.batches import Ahead, Batches, OnHost, fit, training_data
from data.splits import Split
from data.stored import Images, InFile
from tests.runs import checkpoint, equal, resume, run
from tests.test_arrays import contents, line, stored
from training.saved import stored_run

Contents = dict[str, npt.NDArray[Any]]


def as_npy(folder: Path, arrays_of_it: Contents) -> Path:
    folder.mkdir()
    for key, array in arrays_of_it.items():
        np.save(folder / f"{key}.npy", array)
    return folder


def deep(images: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return images.astype(np.uint16) * 257


FORMS = {
    "grey": lambda: contents()["images"],
    "colour": lambda: contents((3, 8, 9))["images"],
    "channels last": lambda: contents((8, 9, 3))["images"],
    "16 bits": lambda: deep(contents()["images"]),
    "16 bits, the higher byte first": lambda: deep(contents()["images"]).astype(">u2"),
    "bool": lambda: contents()["images"] > 100,
    "Fortran's order": lambda: np.asfortranarray(contents()["images"]),
}


@pytest.mark.parametrize("resize", [None, "5x6"])
@pytest.mark.parametrize("form", FORMS)
def test_what_stays_in_its_file_is_what_is_read(form: str, resize: str | None, tmp_path: Path) -> None:
    images, labels = FORMS[form](), contents()["labels"]
    folder, file = as_npy(tmp_path / "npy", {"images": images, "labels": labels}), tmp_path / "mine.npz"
    np.savez(file, images=images, labels=labels)
    read = arrays.load(str(file), "train", resize=resize)
    for path in (file, folder):
        there = arrays.load(str(path), "train", resize=resize, mapped=True)
        assert isinstance(there.images, InFile) == (form != "Fortran's order")
        assert there.images.shape == read.images.shape
        assert np.array_equal(there.images[:], read.images[:])
        assert np.array_equal(there.images[np.array([5, 3])], read.images[np.array([5, 3])])
        assert there.digest == read.digest
        assert np.array_equal(there.labels, read.labels)


def test_a_compressed_file_is_read_whole(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "mine.npz", **contents())
    assert not isinstance(arrays.load(str(tmp_path / "mine.npz"), "train", mapped=True).images, InFile)


def test_only_what_is_asked_for_comes_to_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = arrays.load(str(stored(tmp_path)), "train", mapped=True).images
    read: list[int] = []
    pread = os.pread

    def watched(file: int, length: int, offset: int) -> bytes:
        read.append(length)
        return pread(file, length, offset)

    monkeypatch.setattr(os, "pread", watched)
    assert len(images[np.array([5, 6, 1])]) == 3
    assert read == [128, 64]  # those that lie one after another in one go


def rewritten(path: Path) -> None:
    np.savez(path, **contents() | {"images": contents()["images"][::-1]})


def cut_short(path: Path) -> None:
    os.truncate(path, 700)


def altered_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(8))


@pytest.mark.parametrize("change", [rewritten, cut_short, altered_in_place])
def test_a_file_that_changes_while_a_run_trains_ends_it(change: Callable[[Path], None], tmp_path: Path) -> None:
    """At the next minibatch, with the checkpoint kept; put back, the run goes on to what it would have been."""
    path, read, steps = stored(tmp_path), Batches.rows, []
    before = path.read_bytes()

    def reading(batches: Batches, step: int) -> Any:
        steps.append(step)
        if step == 6:
            time.sleep(0.02)  # a file system's clock is coarse
            change(path)
        return read(batches, step)

    asked = f"{line(path)} data.placement=host train.checkpoint_every=2 train.steps=20"
    with mock.patch.object(Batches, "rows", reading):
        ended = run(asked, tmp_path / "run", code=2)
    assert f"{path} has changed since it was opened" in ended.err
    assert steps[-1] <= 9  # two minibatches were read before
    assert checkpoint(tmp_path / "run")["step"] >= 6
    path.write_bytes(before)
    resume(tmp_path / "run")
    run(asked, tmp_path / "whole")
    assert equal(checkpoint(tmp_path / "run")["model"], checkpoint(tmp_path / "whole")["model"])


def test_a_file_that_is_written_anew_has_another_digest(tmp_path: Path) -> None:
    path = stored(tmp_path)
    before = arrays.load(str(path), "train", mapped=True).digest
    stored(tmp_path, images=contents()["images"][::-1])
    assert arrays.load(str(path), "train", mapped=True).digest != before


@pytest.mark.parametrize("form", ["npz", "npy"])
def test_placement_changes_no_bit(form: str, tmp_path: Path) -> None:
    path = stored(tmp_path) if form == "npz" else as_npy(tmp_path / "npy", contents())
    for placement in ("device", "host"):
        run(f"{line(path)} data.placement={placement} train.steps=8", tmp_path / placement)
    assert equal(checkpoint(tmp_path / "device"), checkpoint(tmp_path / "host"))
    run(f"{line(path)} data.placement=host train.steps=4", tmp_path / "half")
    resume(tmp_path / "half", "train.steps=8 data.placement=device")
    assert equal(checkpoint(tmp_path / "half")["model"], checkpoint(tmp_path / "host")["model"])
    measured = [json.loads((tmp_path / placement / "result.json").read_text()) for placement in ("device", "host")]
    assert measured[0]["test_bound"] == measured[1]["test_bound"]


def test_every_part_is_where_placement_says(tmp_path: Path) -> None:
    """The test images too, which are looked at when training has taken its hours."""
    for placement, kind in (("device", torch.Tensor), ("host", OnHost)):
        run(f"{line(stored(tmp_path))} data.placement={placement} train.steps=1", tmp_path / placement)
        opened = stored_run(tmp_path / placement)
        trained = [opened.load_training("labelled"), opened.load_training("unlabelled")]
        parts = [opened.validation, opened.load_test(), *trained]
        assert all(isinstance(part.x, kind) for part in parts)


def test_what_is_larger_than_a_quarter_of_memory_stays_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.zeros((10, 1, 8, 8), dtype=np.uint8)
    monkeypatch.setattr("data.batches.memory", lambda: 2560)
    assert fit(images, torch.device("cpu"))
    monkeypatch.setattr("data.batches.memory", lambda: 2559)
    assert not fit(images, torch.device("cpu"))


def test_minibatches_are_read_before_they_are_asked_for() -> None:
    begun, seen = threading.Event(), []

    def read(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(step)
        if step == 2:
            begun.set()
        return torch.tensor(step), torch.tensor(step)

    ahead = Ahead(read)
    assert ahead(0)[0] == 0
    assert begun.wait(10)  # before step 1 is asked for
    assert [int(ahead(step)[0]) for step in (1, 2, 3)] == [1, 2, 3]
    time.sleep(0.05)
    assert seen == sorted(set(seen))  # each once


def test_minibatches_from_the_host_are_those_from_the_device() -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 1, 4, 4), dtype=np.uint8)
    source = Images(images, np.arange(30) % 3, 3)
    split = Split(np.arange(5), np.arange(4, 25), np.arange(25, 30))
    cpu = torch.device("cpu")
    batches = [
        Batches(
            training_data(source, split, cpu, on_host),
            batch_size_labelled=4,
            batch_size_unlabelled=6,
            binarization="dynamic",
            seed=1,
        )
        for on_host in (False, True)
    ]
    for step in (0, 1, 2, 3, 9, 4):  # also after a rollback
        one, other = (batch(step, torch.Generator().manual_seed(step)) for batch in batches)
        assert equal(one, other)
