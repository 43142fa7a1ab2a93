"""Minibatches from tensors that live on the training device, or from images on the host a step ahead."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from data.facts import Array
from data.pictures import memory
from data.randomness import keyed_generator, random_int16
from data.splits import Indices, Split
from data.stored import Drawn, Images, InFile

Binarization = Literal["dynamic", "fixed", "threshold", "none"]
AHEAD = 2  # minibatches that are read before they are asked for
STEPS_AT_ONCE = 256  # whose rows come to the device in one copy; fewer of large minibatches


class OnHost:
    """Images uint8 [N, C, H, W] that stay on the host or in their file; those that are asked for come to the device."""

    def __init__(self, images: Array | InFile | Drawn, rows: Indices, device: torch.device) -> None:
        self.images, self.rows, self.device = images, rows, device

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self.images.shape[1:]))

    def __getitem__(self, chosen: slice | Sequence[int] | Tensor) -> Tensor:
        return self.read(chosen).to(self.device)

    def read(self, chosen: slice | Sequence[int] | Tensor) -> Tensor:
        """On the host."""
        rows = self.rows[chosen if isinstance(chosen, slice) else np.asarray(chosen)]
        return torch.from_numpy(self.images[rows])


def fit(images: Array | InFile | Drawn, device: torch.device) -> bool:
    """Whether images fit into half of a GPU's free memory, or a quarter of the machine's, beside the training."""
    free, part = (torch.cuda.mem_get_info(device)[0], 2) if device.type == "cuda" else (memory(), 4)
    return math.prod(images.shape) * part <= free


class Ahead:
    """What is read of a step, by a thread, while the steps before it are worked on."""

    def __init__(self, read: Callable[[int], tuple[Tensor, Tensor]]) -> None:
        self.read = read
        self.reader = ThreadPoolExecutor(1)  # one: the rows of steps are told in turn
        self.begun: dict[int, Future[tuple[Tensor, Tensor]]] = {}

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        wanted = range(step, step + 1 + AHEAD)
        self.begun = {n: self.begun.get(n) or self.reader.submit(self.read, n) for n in wanted}
        return self.begun[step].result()


@dataclass(frozen=True)
class TrainingData:
    """All that training can see: an unlabelled image's label is not in it."""

    x_labelled: Tensor | OnHost  # uint8 [L, C, H, W]
    y_labelled: Tensor  # one-hot float [L, K]
    x_unlabelled: Tensor | OnHost  # uint8 [U, C, H, W]


@dataclass(frozen=True)
class EvaluationData:
    """Images uint8 [N, C, H, W] and labels int64 [N] to measure with."""

    x: Tensor | OnHost
    labels: Tensor


def training_data(source: Images, split: Split, device: torch.device, on_host: bool = False) -> TrainingData:
    """On the device, or with images that stay on the host and come to the device a minibatch at a time."""
    y_labelled = torch.eye(source.num_classes)[torch.from_numpy(source.labels[split.labelled])].to(device)
    x_labelled, x_unlabelled = (OnHost(source.images, rows, device) for rows in (split.labelled, split.unlabelled))
    if on_host:
        return TrainingData(x_labelled, y_labelled, x_unlabelled)
    return TrainingData(x_labelled[:], y_labelled, x_unlabelled[:])


def evaluation_data(
    source: Images, rows: Indices | slice, device: torch.device, on_host: bool = False
) -> EvaluationData:
    x = OnHost(source.images, np.arange(len(source.labels))[rows], device)
    return EvaluationData(x if on_host else x[:], torch.from_numpy(source.labels[rows]).to(device))


def binarize(images: Tensor, binarization: Binarization, generator: torch.Generator) -> Tensor:
    """Pixels in [0, 1] as float, from uint8.

    `dynamic` draws each pixel anew, Bernoulli(intensity / 255) (Salakhutdinov & Murray 2008), its probability exact at
    0 and 255 and within 2^-16 between; `threshold` is 1 above half intensity; `none` keeps the intensity, and so does
    `fixed`, whose images are black or white since they were read (data/fixed.py).
    """
    if binarization == "dynamic":
        uniform = random_int16(images.shape, generator).clamp_(min=1 - 2**15)
        return torch.le(uniform, _highest_that_lights(images), out=torch.empty_like(images, dtype=torch.float32))
    intensity = images.float() / 255
    if binarization == "threshold":
        return (intensity > 0.5).float()
    return intensity


def own_generators(images: Tensor) -> list[torch.Generator]:
    """A generator on the CPU for each image uint8 [N, C, H, W] there, whose key the image itself is."""
    return [torch.Generator().manual_seed(zlib.crc32(image.numpy())) for image in images.contiguous()]


def binarize_by_itself(images: Tensor, binarization: Binarization, generators: Sequence[torch.Generator]) -> Tensor:
    """Pixels [N, C, H, W] of images on the CPU that are of no part, each image's drawn by its own generator.

    `fixed` draws them too, as they have no row; images whose pixels are drawn already stay as they are.
    """
    if binarization in ("dynamic", "fixed"):
        return torch.stack([binarize(image, "dynamic", own) for image, own in zip(images, generators, strict=True)])
    return binarize(images, binarization, generators[0])  # nothing is drawn


def _highest_that_lights(images: Tensor) -> Tensor:
    """257 v - 2^15 as int16 for v in 0..255, from the lowest int16 to the highest."""
    return images.to(torch.int16).mul_(257).add_(-(2**15))  # modulo 2^16, as int16 counts


class ShuffledIndices:
    """Row numbers of minibatch `step` out of `size` rows, a new permutation each epoch; a function of the step alone.

    A minibatch may span epochs, so every row is seen equally often whatever the sizes are. One of size 0 has no rows.
    They are drawn and told on the CPU: the same on every device.
    """

    def __init__(self, size: int, batch_size: int, seed: int, purpose: str) -> None:
        self.size, self.batch_size = size, batch_size
        self.seed, self.purpose = seed, purpose
        self._epochs: dict[int, Tensor] = {}

    def __call__(self, step: int) -> Tensor:
        if not self.batch_size:
            return torch.empty(0, dtype=torch.int64)
        first = step * self.batch_size
        epochs = range(first // self.size, (first + self.batch_size - 1) // self.size + 1)
        self._epochs = {epoch: self._permutation(epoch) for epoch in epochs}
        rows = torch.cat(list(self._epochs.values())) if len(epochs) > 1 else self._epochs[epochs[0]]
        offset = first - epochs[0] * self.size
        return rows[offset : offset + self.batch_size]

    def _permutation(self, epoch: int) -> Tensor:
        if epoch in self._epochs:
            return self._epochs[epoch]
        generator = keyed_generator(torch.device("cpu"), self.seed, self.purpose, epoch)
        return torch.randperm(self.size, generator=generator)


class Batches:
    """The images [B + B', C, H, W] of a step, binarized, the labelled ones first; and their classes [B, K].

    B is 0 where training is without labels.
    """

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
        self.device = data.y_labelled.device
        sizes = len(data.x_labelled), len(data.x_unlabelled)
        self.labelled = ShuffledIndices(sizes[0], batch_size_labelled, seed, "labelled order")
        self.unlabelled = ShuffledIndices(sizes[1], batch_size_unlabelled, seed, "unlabelled order")
        self.ahead = Ahead(self._read) if isinstance(data.x_unlabelled, OnHost) else None
        self.steps_in_table = range(0)
        self.table = torch.empty(0, dtype=torch.int64)  # [T, B + B'], on the device, the rows of those steps

    def __call__(self, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.take(self.rows(step), generator)

    def rows(self, step: int) -> tuple[Tensor, ...]:
        """What differs between steps: the numbers [B + B'] of the labelled and the unlabelled images of a step.

        Of images on the host, the labelled ones' numbers and the images themselves, of both.
        """
        if self.ahead is None:
            if step not in self.steps_in_table:
                self._fill_table(step)
            return (self.table[step - self.steps_in_table.start],)
        labelled, images = self.ahead(step)
        return labelled.to(self.device, non_blocking=True), images.to(self.device, non_blocking=True)

    def _fill_table(self, step: int) -> None:
        """Brings the rows of this step and of those after it to the device, in one copy."""
        images = self.labelled.batch_size + self.unlabelled.batch_size
        self.steps_in_table = range(step, step + max(1, min(STEPS_AT_ONCE, 2**20 // images)))
        rows = [torch.cat([self.labelled(number), self.unlabelled(number)]) for number in self.steps_in_table]
        self.table = self._pinned(torch.stack(rows)).to(self.device, non_blocking=True)

    def _read(self, step: int) -> tuple[Tensor, Tensor]:
        """The numbers of the labelled images of a step, and its images, on the host."""
        labelled, unlabelled = self.labelled(step), self.unlabelled(step)
        assert isinstance(self.data.x_labelled, OnHost)
        assert isinstance(self.data.x_unlabelled, OnHost)
        images = torch.cat([self.data.x_labelled.read(labelled), self.data.x_unlabelled.read(unlabelled)])
        return labelled, self._pinned(images)

    def _pinned(self, tensor: Tensor) -> Tensor:
        """In memory that a GPU copies from while it computes."""
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def take(self, rows: Sequence[Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The images of these rows, binarized by the generator, and the classes of the labelled ones."""
        x_labelled, x_unlabelled = self.data.x_labelled, self.data.x_unlabelled
        if isinstance(x_labelled, OnHost) or isinstance(x_unlabelled, OnHost):
            labelled, images = rows
        else:
            labelled, unlabelled = rows[0].split([self.labelled.batch_size, self.unlabelled.batch_size])
            images = torch.cat([x_labelled.index_select(0, labelled), x_unlabelled.index_select(0, unlabelled)])
        return binarize(images, self.binarization, generator), self.data.y_labelled.index_select(0, labelled)
