"""Images that stay in their file, or on the host, are the same images, and train to the same bits."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from data import arrays, npz
from data.batches import Ahead, Batches, fit, training_data
from data.facts import Images
from data.splits import Split
from data.stored import InFile
from tests.runs import checkpoint, equal, resume, run
from tests.test_arrays import contents, line, stored

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


def test_only_what_is_asked_for_comes_to_memory(tmp_path: Path) -> None:
    images = arrays.load(str(stored(tmp_path)), "train", mapped=True).images
    assert isinstance(images, InFile)
    assert isinstance(images.mapped, np.memmap)
    seen = []
    watched = InFile(images.mapped, lambda rows: seen.append(len(rows)) or npz.as_pixels(rows), images.rows)  # type: ignore[func-returns-value]
    watched[np.array([1, 2, 3])]
    assert seen == [3]


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
