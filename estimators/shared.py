"""Noise of a minibatch that several processes share: each draws all of it, as one process would, and keeps its rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class SharedGenerator(torch.Generator):
    """The generator of a minibatch of labelled and unlabelled images, of which each process has an equal part.

    `labelled` and `unlabelled` are the numbers of a process's own images.
    """

    def __new__(cls, device: torch.device, *_: int) -> SharedGenerator:
        return super().__new__(cls, device)  # type: ignore[call-arg]

    def __init__(self, device: torch.device, process: int, processes: int, labelled: int, unlabelled: int) -> None:
        self.process, self.processes = process, processes
        self.labelled, self.unlabelled = labelled, unlabelled
        self.rows: dict[int, Tensor] = {}  # what `own` has told before

    def own(self, rows: int) -> Tensor:
        """Which rows of the whole minibatch's noise [processes * rows] are those of this process's `rows`.

        They are of labelled images and then unlabelled ones, of one of the two, or of several such blocks in a row.
        """
        if rows in self.rows:
            return self.rows[rows]
        blocks = [self.labelled, self.unlabelled], [self.unlabelled], [self.labelled]
        parts = next((parts for parts in blocks if sum(parts) and rows % sum(parts) == 0), [rows])
        whole = torch.arange(self.processes * rows, device=self.device).view(-1, self.processes * sum(parts))
        of_parts = whole.split([self.processes * size for size in parts], dim=1)
        own = [part.narrow(1, self.process * size, size) for part, size in zip(of_parts, parts, strict=True)]
        self.rows[rows] = torch.cat(own, dim=1).flatten()
        return self.rows[rows]


def drawn(draw: Callable[[tuple[int, ...]], Tensor], shape: Any, rows: int, generator: torch.Generator) -> Tensor:
    """Noise of a shape whose dimension `rows` is the images of a minibatch, by `draw`, which uses the generator."""
    if not isinstance(generator, SharedGenerator):
        return draw(tuple(shape))
    whole = list(shape)
    whole[rows] *= generator.processes
    return draw(tuple(whole)).index_select(rows, generator.own(shape[rows]))
