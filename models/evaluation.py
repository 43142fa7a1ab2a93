"""Exact evaluation: classes are always enumerated as one-hot vectors, whatever estimator trained the model."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import InitVar, asdict, dataclass

import torch
from torch import Tensor

from data.batches import Binarization, EvaluationData, binarize
from data.progress import telling
from data.randomness import keyed_generator
from estimators.contract import categorical_kl
from models.vae import SemiSupervisedVAE

CALIBRATION_BINS = 15
ROWS = 8192  # of images and classes that go through the generator at once, at most
BYTES = ROWS * 28 * 28 * 4  # of those rows as float32: larger images go in fewer rows, see `rows_at_once`
EVALUATION_SEED = 0  # the same binarization and noise for every run of one batch size, so that runs can be compared


class OutOfMemoryError(Exception):
    """Memory did not suffice for an evaluation; the message names the setting that asks for less."""


@dataclass
class PerImage:
    """Of each image: q(y|x) [N, K], how b(x, y) is spread over y [N], and the exact bound [N], nats."""

    q: Tensor
    bound_spread: Tensor
    bound: Tensor


@dataclass
class Evaluation:
    """Means over a data set of n images; bounds, KLs and log-likelihood in nats per image.

    Bits per dimension are -bound / (D log 2), no fewer than -log2 p(x) / D, for images of D whole grey levels.
    Accuracy and calibration are those of the n_with_label images with a label, None where no image has one.
    """

    accuracy: float | None
    bound: float
    reconstruction: float
    kl_y: float
    kl_z: float
    calibration_error: float | None
    log_likelihood: float | None = None
    bits_per_dimension: float | None = None  # where p(x) is a probability of whole grey levels
    n: int = 0
    n_with_label: int = 0
    seen: InitVar[PerImage | None] = None

    def __post_init__(self, seen: PerImage | None) -> None:
        self.per_image = seen  # no field: fields are what is kept in result.json

    @property
    def means(self) -> dict[str, float]:
        """What was measured, by its name, without the numbers of images."""
        counts = ("n", "n_with_label")
        return {name: value for name, value in asdict(self).items() if value is not None and name not in counts}


def one_hot_classes(num_classes: int, batch: int, device: torch.device) -> Tensor:
    """Every class for every image, [K, B, K]."""
    return torch.eye(num_classes, device=device).unsqueeze(1).expand(-1, batch, -1)


def rows_at_once(pixels: int) -> int:
    """How many images of so many pixels (times channels) go through the networks at once, whatever their size."""
    return max(1, min(ROWS, BYTES // (4 * pixels)))


def class_chunks(num_classes: int, x: Tensor) -> tuple[Tensor, ...]:
    """Every class for every image of x [B, ...], in parts [S, B, K] of as many rows as go at once."""
    at_once = rows_at_once(math.prod(x.shape[1:]))
    return one_hot_classes(num_classes, len(x), x.device).split(max(1, at_once // len(x)))


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
def evaluating(model: SemiSupervisedVAE) -> Iterator[None]:
    """Without gradients and in evaluation mode, so that looking leaves the model (batch statistics too) as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def evaluate(
    model: SemiSupervisedVAE,
    data: EvaluationData,
    *,
    binarization: Binarization,
    batch_size: int,
    importance_samples: int = 0,
    after_batch: Callable[[], None] = lambda: None,
    doing: str = "evaluation",
) -> Evaluation:
    """Accuracy, exact bound and calibration in float32; with `importance_samples` > 0 also log p(x).

    The bound is U(x) = sum_y q(y|x) b(x, y) - KL(q(y|x) || p(y)), exact in y, with one draw of z an image.
    An exception of `after_batch` ends it. How far `doing` it is, is told in passes of a batch through the networks.
    """
    sums: dict[str, Tensor] = {}
    probabilities, spreads, bounds = [], [], []
    size = min(batch_size, len(data.x), rows_at_once(math.prod(data.x.shape[1:])))
    batches = range(0, len(data.x), size)
    passes = telling(doing, "passes", len(batches) * (1 + importance_samples))
    with evaluating(model), naming_memory(size, "evaluation.batch_size"), passes as tell:
        for index, first in enumerate(batches):
            images = data.x[first : first + size]
            generator = keyed_generator(images.device, EVALUATION_SEED, "evaluation", index)
            x = binarize(images, binarization, generator)
            q, spread, measured = exact_terms(model, x, model.draw_noise(x, generator))
            tell(1)
            if importance_samples > 0:
                after_draw = functools.partial(tell, 1)
                measured["log_likelihood"] = importance_weighted(model, x, importance_samples, generator, after_draw)
            for name, value in measured.items():
                sums[name] = sums.get(name, 0) + value.double().sum()
            probabilities.append(q)
            spreads.append(spread)
            bounds.append(measured["bound"])
            after_batch()
    q, known = torch.cat(probabilities), data.labels >= 0
    labels, q_known = data.labels[known], q[known]
    means = {name: (value / len(q)).item() for name, value in sums.items()}
    if model.likelihood.of_grey_levels:
        means["bits_per_dimension"] = -means["bound"] / (math.log(2) * math.prod(data.x.shape[1:]))
    return Evaluation(
        accuracy=(q_known.argmax(dim=-1) == labels).double().mean().item() if len(labels) else None,
        calibration_error=calibration_error(q_known, labels) if len(labels) else None,
        **means,
        n=len(q),
        n_with_label=len(labels),
        seen=PerImage(q, torch.cat(spreads), torch.cat(bounds)),
    )


def exact_terms(model: SemiSupervisedVAE, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """q(y|x) [B, K], the standard deviation of b(x, y) over y [B], and the exact bound and its parts, each [B].

    Of images x [B, C, H, W] and z's noise [B, Z].
    """
    logits = model.classifier(x)
    q = logits.softmax(dim=-1)
    features = model.inference.features(x)
    bounds = [model.bound(x, features, classes, noise) for classes in class_chunks(model.num_classes, x)]
    reconstructions, kls = (
        torch.cat(parts) for parts in zip(*((b.reconstruction, b.kl_z) for b in bounds), strict=True)
    )
    reconstruction, kl_z = (q.T * reconstructions).sum(dim=0), (q.T * kls).sum(dim=0)
    kl_y = categorical_kl(logits.unsqueeze(-2), model.log_prior)
    return (
        q,
        (reconstructions - kls).std(dim=0, correction=0),
        {
            "bound": reconstruction - kl_z - kl_y,
            "reconstruction": reconstruction,
            "kl_z": kl_z,
            "kl_y": kl_y,
        },
    )


def importance_weighted(
    model: SemiSupervisedVAE,
    x: Tensor,
    samples: int,
    generator: torch.Generator,
    after_draw: Callable[[], None] = lambda: None,
) -> Tensor:
    """log p(x) ~ log sum_y p(y) (1/S) sum_s p(x|y,z_ys) p(z_ys) / q(z_ys|x,y), [B], nats; y enumerated.

    A lower bound in expectation that tightens with S (Burda et al. 2016, eq. 8).
    """

    def draws() -> Iterator[Tensor]:
        for _ in range(samples):
            yield model.draw_noise(x, generator)
            after_draw()

    return importance_weighted_by(model, x, draws())


def importance_weighted_by(model: SemiSupervisedVAE, x: Tensor, draws: Iterable[Tensor]) -> Tensor:
    """`importance_weighted` by these S draws of z's noise, each [B, Z]."""
    features = model.inference.features(x)
    log_weights = []
    for noise in draws:
        parts = [model.log_weight(x, features, classes, noise) for classes in class_chunks(model.num_classes, x)]
        log_weights.append(torch.cat(parts))
    per_class = torch.stack(log_weights).logsumexp(dim=0) - math.log(len(log_weights))
    if model.log_prior is not None:
        return (per_class + model.log_prior.unsqueeze(-1)).logsumexp(dim=0)
    return per_class.logsumexp(dim=0) - math.log(model.num_classes)


def calibration_error(q: Tensor, labels: Tensor) -> float:
    """Expected calibration error of q(y|x) [N, K], 15 equal bins of confidence (Guo et al. 2017, eq. 3)."""
    _, confidence, correct = calibration_bins(q, labels)
    return ((correct - confidence).abs().sum() / len(q)).item()


def calibration_bins(q: Tensor, labels: Tensor) -> Tensor:
    """Number of images, sum of their confidences and number of right predictions, [3, 15 bins of confidence]."""
    confidence, predicted = q.max(dim=-1)
    columns = torch.stack([torch.ones_like(confidence), confidence, (predicted == labels).to(q.dtype)]).double()
    bins = (confidence * CALIBRATION_BINS).long().clamp(0, CALIBRATION_BINS - 1)  # a NaN stays one below
    return columns.new_zeros(3, CALIBRATION_BINS).index_add_(1, bins, columns)
