"""Minibatches from tensors that live on the training device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from data.facts import Images
from data.randomness import keyed_generator, random_int16
from data.splits import Indices, Split

Binarization = Literal["dynamic", "threshold", "none"]


@dataclass(frozen=True)
class TrainingData:
    """All that training can see: an unlabelled image's label is not in it."""

    x_labelled: Tensor  # uint8 [L, C, H, W]
    y_labelled: Tensor  # one-hot float [L, K]
    x_unlabelled: Tensor  # uint8 [U, C, H, W]


@dataclass(frozen=True)
class EvaluationData:
    """Images uint8 [N, C, H, W] and labels int64 [N] to measure with."""

    x: Tensor
    labels: Tensor


def training_data(source: Images, split: Split, device: torch.device) -> TrainingData:
    images = torch.from_numpy(source.images)
    labels = torch.from_numpy(source.labels[split.labelled])
    return TrainingData(
        images[split.labelled].to(device),
        torch.nn.functional.one_hot(labels, source.num_classes).float().to(device),
        images[split.unlabelled].to(device),
    )


def evaluation_data(source: Images, rows: Indices | slice, device: torch.device) -> EvaluationData:
    return EvaluationData(
        torch.from_numpy(source.images[rows]).to(device), torch.from_numpy(source.labels[rows]).to(device)
    )


def binarize(images: Tensor, binarization: Binarization, generator: torch.Generator) -> Tensor:
    """Pixels in [0, 1] as float, from uint8.

    `dynamic` draws each pixel anew, Bernoulli(intensity / 255) (Salakhutdinov & Murray 2008), its probability exact at
    0 and 255 and within 2^-16 between; `threshold` is 1 above half intensity; `none` keeps the intensity.
    """
    if binarization == "dynamic":
        uniform = random_int16(images.shape, generator).clamp_(min=1 - 2**15)
        return uniform.le_(_highest_that_lights(images)).float()
    intensity = images.float() / 255
    if binarization == "threshold":
        return (intensity > 0.5).float()
    return intensity


def _highest_that_lights(images: Tensor) -> Tensor:
    """257 v - 2^15 as int16 for v in 0..255, from the lowest int16 to the highest, without overflow on the way."""
    intensity = images.to(torch.int16)
    return (intensity - 128).mul_(256).add_(intensity)


class ShuffledIndices:
    """Row numbers of minibatch `step` out of `size` rows, a new permutation each epoch; a function of the step alone.

    A minibatch may span epochs, so every row is seen equally often whatever the sizes are.
    """

    def __init__(self, size: int, batch_size: int, seed: int, purpose: str, device: torch.device) -> None:
        self.size, self.batch_size = size, batch_size
        self.seed, self.purpose, self.device = seed, purpose, device
        self._epochs: dict[int, Tensor] = {}

    def __call__(self, step: int) -> Tensor:
        first = step * self.batch_size
        epochs = range(first // self.size, (first + self.batch_size - 1) // self.size + 1)
        self._epochs = {epoch: self._permutation(epoch) for epoch in epochs}
        rows = torch.cat(list(self._epochs.values())) if len(epochs) > 1 else self._epochs[epochs[0]]
        offset = first - epochs[0] * self.size
        return rows[offset : offset + self.batch_size]

    def _permutation(self, epoch: int) -> Tensor:
        if epoch in self._epochs:
            return self._epochs[epoch]
        generator = keyed_generator(self.device, self.seed, self.purpose, epoch)
        return torch.randperm(self.size, device=self.device, generator=generator)


class Batches:
    """The images [B + B', C, H, W] of a step, binarized, the labelled ones first; and their classes [B, K]."""

    def __init__(
        self,
        data: TrainingData,
        *,
        batch_size_labelled: int,
        batch_size_unlabelled: int,
        binarization: Binarization,
        seed: int,
    ) -> None:
        self.data = data
        self.binarization = binarization
        device = data.x_labelled.device
        sizes = len(data.x_labelled), len(data.x_unlabelled)
        self.labelled = ShuffledIndices(sizes[0], batch_size_labelled, seed, "labelled order", device)
        self.unlabelled = ShuffledIndices(sizes[1], batch_size_unlabelled, seed, "unlabelled order", device)

    def __call__(self, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.take(self.rows(step), generator)

    def rows(self, step: int) -> tuple[Tensor, Tensor]:
        """The numbers of the labelled and of the unlabelled images of a step."""
        return self.labelled(step), self.unlabelled(step)

    def take(self, rows: Sequence[Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The images of these rows, binarized by the generator, and the classes of the labelled ones."""
        labelled, unlabelled = rows
        x_labelled = self.data.x_labelled.index_select(0, labelled)
        x_unlabelled = self.data.x_unlabelled.index_select(0, unlabelled)
        x = binarize(torch.cat([x_labelled, x_unlabelled]), self.binarization, generator)
        return x, self.data.y_labelled.index_select(0, labelled)
