"""Labelled image datasets as uint8 arrays, and the facts that are known before a file is opened."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.uint8]


class DataError(Exception):
    """A dataset is missing or unusable; the message says which file and what to do."""


@dataclass(frozen=True)
class DatasetFacts:
    """What a configuration is checked against before any work; `folder` and `source` name torchvision's dataset."""

    train_images: int
    num_classes: int
    shape: tuple[int, int, int]  # channels, height, width
    folder: str = ""
    source: str = ""


DATASETS = {
    "mnist": DatasetFacts(60_000, 10, (1, 28, 28), "MNIST", "MNIST"),
    "fashion_mnist": DatasetFacts(60_000, 10, (1, 28, 28), "FashionMNIST", "FashionMNIST"),
    "kmnist": DatasetFacts(60_000, 10, (1, 28, 28), "KMNIST", "KMNIST"),
    "digits": DatasetFacts(1_437, 10, (1, 8, 8)),
}
DIGITS_TEST_IMAGES = 360  # the last writers of the file, so that test digits come from hands not seen in training
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


@dataclass(frozen=True)
class Images:
    """Images uint8 [N, C, H, W] with labels int64 [N] in 0..num_classes-1."""

    images: Array
    labels: npt.NDArray[np.int64]
    num_classes: int


def load(name: str, root: str, part: str) -> Images:
    """The `train` or `test` part of a dataset; torchvision downloads it on first use. Raises DataError."""
    if name == "digits":
        return _load_digits(part)
    raw = Path(root).expanduser() / DATASETS[name].folder / "raw"
    paths = [raw / file for file in FILES[part]]
    if not all(_present(path) for path in paths):
        _download(name, Path(root).expanduser())
    images, labels = (_read_idx(path) for path in paths)
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise DataError(f"{paths[0]} and {paths[1]} do not belong together; delete {raw} to download it again")
    num_classes, highest = DATASETS[name].num_classes, labels.max(initial=0)
    if highest >= num_classes:
        raise DataError(
            f"{paths[1]} has the label {highest}, and data={name} has {num_classes} classes; "
            f"delete {raw} to download it again"
        )
    return Images(images[:, None], labels.astype(np.int64), num_classes)


def _load_digits(part: str) -> Images:
    from sklearn.datasets import load_digits

    bundle: Any = load_digits()
    images = np.rint(bundle.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = bundle.target.astype(np.int64)
    rows = slice(-DIGITS_TEST_IMAGES) if part == "train" else slice(-DIGITS_TEST_IMAGES, None)
    return Images(images[rows], labels[rows], 10)


def _present(path: Path) -> bool:
    return path.exists() or path.with_name(path.name + ".gz").exists()


def _download(name: str, root: Path) -> None:
    import torchvision.datasets  # seconds to import, and only a download needs it

    try:
        getattr(torchvision.datasets, DATASETS[name].source)(str(root), download=True)
    except (RuntimeError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"data={name} is not in {root} and could not be downloaded ({reason}); "
            f"put its files into {root / DATASETS[name].folder / 'raw'}, "
            "set data.root or CATVAE_DATA to where they are, "
            "or try data=digits, which needs no download"
        ) from error


def _read_idx(path: Path) -> Array:
    """An unsigned-byte IDX file, plain or gzipped, as an array."""
    packed = path.with_name(path.name + ".gz")
    file = path if path.exists() else packed
    try:
        content = gzip.decompress(file.read_bytes()) if file == packed else file.read_bytes()
        zero, kind, rank = struct.unpack_from(">HBB", content)
        if zero != 0 or kind != 8:
            raise DataError(f"{file} is not an IDX file of unsigned bytes; delete it to download it again")
        shape = struct.unpack_from(f">{rank}I", content, 4)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise DataError(f"cannot read {file} ({error}); delete it to download it again") from error
    header = 4 + 4 * rank
    expected = math.prod(shape)
    if len(content) - header != expected:
        raise DataError(
            f"{file} is damaged: {len(content) - header} bytes of data where its header promises {expected}; "
            "delete it to download it again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape).copy()
