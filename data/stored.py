"""Images of a dataset with their labels: in memory, or, larger than that, in their file and read row by row."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data.facts import Array, DataError, numbered
from data.fixed import fixed_pixels

BLOCK = 2**26  # bytes that are looked at in one go


class Placed:
    """An array in a file that is kept open. A memory map of a file that is cut short would end the process.

    Raises OSError if the file cannot be opened, and DataError at a reading if it has been written to since.
    """

    def __init__(self, path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.path, self.offset, self.shape, self.dtype = path, offset, shape, dtype
        self.file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.file)
        self.stamp = self._stamp()

    def read(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Some rows, those that lie one after another in one go."""
        size = self.dtype.itemsize * int(np.prod(self.shape[1:]))
        found = np.empty((len(rows), size), dtype=np.uint8)
        edges = [*np.flatnonzero(np.diff(rows, prepend=-2) != 1), len(rows)]
        for start, stop in pairwise(edges):
            content = self._bytes(self.offset + int(rows[start]) * size, (stop - start) * size)
            found[start:stop] = np.frombuffer(content, dtype=np.uint8).reshape(-1, size)
        if self._stamp() != self.stamp:
            raise self._changed()
        return found.view(self.dtype).reshape(len(rows), *self.shape[1:])

    def _bytes(self, offset: int, length: int) -> bytes:
        parts: list[bytes] = []
        while length > 0:
            part = os.pread(self.file, length, offset)
            if not part:
                raise self._changed()
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return b"".join(parts)

    def _stamp(self) -> tuple[int, int]:
        now = os.fstat(self.file)
        return now.st_mtime_ns, now.st_size

    def _changed(self) -> DataError:
        return DataError(
            f"{self.path} has changed since it was opened, and steps after that may have been trained on other images; "
            "put back what was there and resume the run from its checkpoint, or start a new run"
        )


@dataclass(frozen=True)
class InFile:
    """Images uint8 [N, C, H, W] as a file has them, of which only the rows that are asked for come to memory."""

    placed: Placed
    as_pixels: Callable[[npt.NDArray[Any]], Array]  # makes uint8 [B, C, H, W] of some rows of it
    rows: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        one = np.zeros((1, *self.placed.shape[1:]), dtype=self.placed.dtype)
        return (len(self), *self.as_pixels(one).shape[1:])

    def __getitem__(self, chosen: Any) -> Array:
        """Some images, in memory. Raises DataError if the file has changed."""
        return self.as_pixels(self.placed.read(self.rows[chosen]))

    def of(self, chosen: npt.NDArray[np.int64]) -> InFile:
        """Some images, still in their file."""
        return replace(self, rows=self.rows[chosen])

    def blocks(self) -> Iterator[Array]:
        """All images, some at a time."""
        size = max(1, BLOCK // int(np.prod(self.shape[1:])))
        for start in range(0, len(self), size):
            yield self[start : start + size]


@dataclass(frozen=True)
class Drawn:
    """Images whose fixed pixels are drawn as they are read: uint8 [N, C, H, W] of 0 and 255."""

    images: Array | InFile
    rows: npt.NDArray[np.int64]  # each image's, in the array that it comes from
    part: str

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.images.shape

    def __getitem__(self, chosen: Any) -> Array:
        """Some images, in memory. Raises DataError if their file has changed."""
        return fixed_pixels(self.images[chosen], self.rows[chosen], self.part)


@dataclass(frozen=True)
class Images:
    """Images uint8 [N, C, H, W] with labels int64 [N] in 0..num_classes-1, or -1 where no label is known.

    Of images that stay in their file, those come to memory that are asked for by images[rows].
    """

    images: Array | InFile | Drawn
    labels: npt.NDArray[np.int64]
    num_classes: int
    digest: str = ""  # of the whole dataset, where it is not a published one
    class_names: tuple[str, ...] = ()  # in the order of the labels; the numbers where nothing names them
    notes: tuple[str, ...] = ()  # sentences for the log: what was left out, and what was made of the rest
    contents: dict[str, str] = field(default_factory=dict)  # a digest of each file that train and test come from
    files: tuple[str, ...] = ()  # each image's, below the folder that they were read from
    rows: npt.NDArray[np.int64] | None = None  # each image's, in the array of a file that has more
    part: str = "train"  # whose fixed pixels these are; of an array that both parts are taken from, train

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", self.class_names or numbered(self.num_classes))

    def fixed(self) -> Images:
        """The same with the pixels of data.binarization=fixed, which are drawn once for each row of a part."""
        assert not isinstance(self.images, Drawn)
        rows = np.arange(len(self.labels)) if self.rows is None else self.rows
        return replace(self, images=Drawn(self.images, rows, self.part))
