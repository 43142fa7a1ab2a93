"""Images that stay in their file, for data larger than memory: read row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from data.facts import Array

BLOCK = 2**26  # bytes that are looked at in one go


@dataclass(frozen=True)
class InFile:
    """Images uint8 [N, C, H, W] as an array has them, of which only the rows that are asked for come to memory."""

    mapped: npt.NDArray[Any]  # a memory map of all images, as the file has them
    as_pixels: Callable[[npt.NDArray[Any]], Array]  # makes uint8 [B, C, H, W] of some rows of it
    rows: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self.as_pixels(self.mapped[:1]).shape[1:])

    def __getitem__(self, chosen: Any) -> Array:
        """Some images, in memory."""
        return self.as_pixels(np.asarray(self.mapped[self.rows[chosen]]))

    def of(self, chosen: npt.NDArray[np.int64]) -> InFile:
        """Some images, still in their file."""
        return replace(self, rows=self.rows[chosen])

    def blocks(self) -> Iterator[Array]:
        """All images, some at a time."""
        size = max(1, BLOCK // int(np.prod(self.shape[1:])))
        for start in range(0, len(self), size):
            yield self[start : start + size]
