"""Exact evaluation: classes are always enumerated as one-hot vectors, whatever estimator trained the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from data.batches import Binarization, EvaluationData, binarize
from data.randomness import keyed_generator
from estimators.contract import categorical_kl
from models.vae import SemiSupervisedVAE

CALIBRATION_BINS = 15
EVALUATION_SEED = 0  # the same binarization and noise for every run of one batch size, so that runs can be compared


@dataclass
class Evaluation:
    """Means over a data set; bounds, KLs and log-likelihood in nats per image.

    Accuracy and calibration are those of the images with a label, None where no image has one.
    """

    accuracy: float | None
    bound: float
    reconstruction: float
    kl_y: float
    kl_z: float
    calibration_error: float | None
    log_likelihood: float | None = None


def one_hot_classes(num_classes: int, batch: int, device: torch.device) -> Tensor:
    """Every class for every image, [K, B, K]."""
    return torch.eye(num_classes, device=device).unsqueeze(1).expand(-1, batch, -1)


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
) -> Evaluation:
    """Accuracy, exact bound and calibration in float32; with `importance_samples` > 0 also log p(x).

    The bound is U(x) = sum_y q(y|x) b(x, y) - KL(q(y|x) || p(y)), exact in y, with one draw of z an image.
    An exception of `after_batch` ends it.
    """
    sums: dict[str, Tensor] = {}
    probabilities = []
    with evaluating(model):
        for index, images in enumerate(data.x.split(min(batch_size, len(data.x)))):
            generator = keyed_generator(images.device, EVALUATION_SEED, "evaluation", index)
            x = binarize(images, binarization, generator)
            q, measured = _exact_terms(model, x, generator)
            if importance_samples > 0:
                measured["log_likelihood"] = importance_weighted(model, x, importance_samples, generator)
            for name, value in measured.items():
                sums[name] = sums.get(name, 0) + value.double().sum()
            probabilities.append(q)
            after_batch()
    known = data.labels >= 0
    q, labels = torch.cat(probabilities)[known], data.labels[known]
    return Evaluation(
        accuracy=(q.argmax(dim=-1) == labels).double().mean().item() if len(q) else None,
        calibration_error=calibration_error(q, labels) if len(q) else None,
        **{name: (value / len(data.x)).item() for name, value in sums.items()},
    )


def _exact_terms(model: SemiSupervisedVAE, x: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """q(y|x) [B, K], and the exact bound and its parts, each [B]."""
    logits = model.classifier(x)
    q = logits.softmax(dim=-1)
    classes = one_hot_classes(model.num_classes, len(x), x.device)
    bound = model.bound(x, model.inference.features(x), classes, model.draw_noise(x, generator))
    reconstruction = (q.T * bound.reconstruction).sum(dim=0)
    kl_z = (q.T * bound.kl_z).sum(dim=0)
    kl_y = categorical_kl(logits)
    return q, {
        "bound": reconstruction - kl_z - kl_y,
        "reconstruction": reconstruction,
        "kl_z": kl_z,
        "kl_y": kl_y,
    }


def importance_weighted(model: SemiSupervisedVAE, x: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """log p(x) ~ log sum_y p(y) (1/S) sum_s p(x|y,z_ys) p(z_ys) / q(z_ys|x,y), [B], nats; y enumerated.

    A lower bound in expectation that tightens with S (Burda et al. 2016, eq. 8).
    """
    features = model.inference.features(x)
    classes = one_hot_classes(model.num_classes, len(x), x.device)
    log_weights = []
    for _ in range(samples):
        noise = model.draw_noise(x, generator)
        log_weights.append(model.log_weight(x, features, classes, noise))
    per_class = torch.stack(log_weights).logsumexp(dim=0) - math.log(samples)
    return per_class.logsumexp(dim=0) - math.log(model.num_classes)


def calibration_error(q: Tensor, labels: Tensor) -> float:
    """Expected calibration error of q(y|x) [N, K], 15 equal bins of confidence (Guo et al. 2017, eq. 3)."""
    confidence, predicted = q.max(dim=-1)
    correct = (predicted == labels).double()
    bins = (confidence * CALIBRATION_BINS).long().clamp(0, CALIBRATION_BINS - 1)  # a NaN stays one below
    gaps = torch.zeros(CALIBRATION_BINS, dtype=torch.double, device=q.device)
    gaps.index_add_(0, bins, correct - confidence.double())
    return (gaps.abs().sum() / len(q)).item()
