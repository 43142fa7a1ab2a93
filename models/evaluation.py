"""Evaluation of any family of models, by one-hot classes whatever estimator trained it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from data.batches import Binarization, EvaluationData, binarize
from data.progress import telling
from data.randomness import keyed_generator
from models.contract import ClassifyBy, Evaluation, Model, PerImage

CALIBRATION_BINS = 15
ROWS = 8192  # of images and classes that go through the generator at once, at most
BYTES = ROWS * 28 * 28 * 4  # of those rows as float32: larger images go in fewer rows, see `rows_at_once`
EVALUATION_SEED = 0  # the same binarization and noise for every run of one batch size, so that runs can be compared


class OutOfMemoryError(Exception):
    """Memory did not suffice for an evaluation; the message names the setting that asks for less."""


def rows_at_once(pixels: int) -> int:
    """How many images of so many pixels (times channels) go through the networks at once, whatever their size."""
    return max(1, min(ROWS, BYTES // (4 * pixels)))


@contextmanager
def naming_memory(batch: int, key: str) -> Iterator[None]:
    """Raises OutOfMemoryError where PyTorch finds no memory for `batch` images at once, which `key` sets."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # PyTorch has a class of its own for a device's memory alone
        signs = ("out of memory", "allocate memory", "not enough memory", "bad_alloc")
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in signs):
            raise
        message = f"memory does not suffice for {batch} images at once: {key} must be less than {batch} here"
        if batch == 1:
            message = "memory does not suffice for one image: a smaller model is what is left"
        raise OutOfMemoryError(message) from error


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Without gradients and in evaluation mode, so that looking leaves the model (batch statistics too) as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def evaluate(
    model: Model,
    data: EvaluationData,
    *,
    binarization: Binarization,
    batch_size: int,
    importance_samples: int = 0,
    pixel_draws: int = 1,
    classify_by: ClassifyBy = "classifier",
    after_batch: Callable[[], None] = lambda: None,
    doing: str = "evaluation",
) -> Evaluation:
    """The bound and its parts in float32, of a model that tells classes accuracy and calibration too.

    With `importance_samples` > 0 also log p(x). All as the model's `measure` has it. Accuracy and calibration are of
    q(y|x), or of what `classify_by` says, as a mean over `pixel_draws` draws of binary pixels, the first of which the
    bound is of too. An exception of `after_batch` ends it. How far `doing` it is, is told in passes of a batch through
    the networks.
    """
    sums: dict[str, Tensor] = {}
    parts: list[PerImage] = []
    size = min(batch_size, len(data.x), rows_at_once(math.prod(data.x.shape[1:])))
    batches = range(0, len(data.x), size)
    more_draws = pixel_draws - 1 if model.has_labels and binarization == "dynamic" else 0
    passes = telling(doing, "passes", len(batches) * (1 + importance_samples + more_draws))
    with evaluating(model), naming_memory(size, "evaluation.batch_size"), passes as tell:
        for index, first in enumerate(batches):
            images = data.x[first : first + size]
            generator = keyed_generator(images.device, EVALUATION_SEED, "evaluation", index)
            x = binarize(images, binarization, generator)
            measured, seen = model.measure(x, importance_samples, generator, functools.partial(tell, 1))
            told = [seen.classified(classify_by)]
            for _ in range(more_draws):
                noise = functools.partial(model.noise, len(x), generator)
                told.append(classified(model, binarize(images, binarization, generator), classify_by, noise))
                tell(1)
            seen.told = mean_over_draws(told)
            for name, value in measured.items():
                sums[name] = sums.get(name, 0) + value.double().sum()
            parts.append(seen)
            after_batch()
    number, known = len(data.x), data.labels >= 0
    per_image, labels = PerImage.joined(parts), data.labels[known]
    means = {name: (value / number).item() for name, value in sums.items()}
    if model.likelihood.of_grey_levels:
        means["bits_per_dimension"] = -means["bound"] / (math.log(2) * model.num_pixels(data.x.shape[1:]))
    assert per_image.told is not None
    probabilities, tells = per_image.told[known], model.has_labels and len(labels) > 0
    return Evaluation(
        accuracy=(probabilities.argmax(dim=-1) == labels).double().mean().item() if tells else None,
        calibration_error=calibration_error(probabilities, labels) if tells else None,
        **means,
        n=number,
        n_with_label=len(labels),
        seen=per_image,
    )


def classified(model: Model, x: Tensor, by: ClassifyBy, noise: Callable[[], Tensor]) -> Tensor:
    """Probabilities of classes [B, K] of images x [B, C, H, W] by the classifier alone, or with noise by the bound."""
    return model.posterior(x) if by == "classifier" else model.terms_by(x, noise())[1].classified(by)


def mean_over_draws(told: Sequence[Tensor]) -> Tensor:
    """Probabilities of classes [B, K] of grey images: the mean over draws of their binary pixels."""
    return told[0] if len(told) == 1 else torch.stack(list(told)).mean(dim=0)


def calibration_error(told: Tensor, labels: Tensor) -> float:
    """Expected calibration error of probabilities [N, K], 15 equal bins of confidence (Guo et al. 2017, eq. 3)."""
    _, confidence, correct = calibration_bins(told, labels)
    return ((correct - confidence).abs().sum() / len(told)).item()


def calibration_bins(told: Tensor, labels: Tensor) -> Tensor:
    """Number of images, sum of their confidences and number of right predictions, [3, 15 bins of confidence]."""
    confidence, predicted = told.max(dim=-1)
    columns = torch.stack([torch.ones_like(confidence), confidence, (predicted == labels).to(told.dtype)]).double()
    bins = (confidence * CALIBRATION_BINS).long().clamp(0, CALIBRATION_BINS - 1)  # a NaN stays one below
    return columns.new_zeros(3, CALIBRATION_BINS).index_add_(1, bins, columns)
