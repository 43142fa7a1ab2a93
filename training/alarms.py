"""What goes wrong quietly in training, each as a number held against a threshold.

54 runs of 18 estimators on MNIST with 100 labels ended far from the thresholds: with 9.8 to 10 effective classes, a
spread over y of 31 to 72 nats and a KL of z of 13.1 to 14.1 nats.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

LEAST_CLASSES = 0.5  # of all classes, that predictions must be spread over
LEAST_SPREAD = 1.0  # nats: the standard deviation of b(x,y) over y
LEAST_KL_Z = 0.1  # nats
MOST_GROWTH = 100.0  # times the gradient norm of the first steps
ENOUGH_NORMS = 50  # steps, before any norm is usual


@dataclass(frozen=True)
class Alarm:
    """Whether something is wrong, and a sentence about it."""

    name: str
    up: bool
    sentence: str


def classes_collapsed(q: Tensor) -> Alarm:
    """From q(y|x) [N, K]: whether exp H(mean q), the effective number of classes, is under half of K.

    It takes evaluation data in which the classes are about as frequent.
    """
    mean = q.double().mean(dim=0)
    effective, all_classes = mean.xlogy(mean).sum().neg().exp().item(), q.shape[-1]
    return Alarm(
        "classes_collapsed",
        effective < LEAST_CLASSES * all_classes,
        f"q(y|x) has collapsed: it uses as many as {effective:.1f} of {all_classes} classes",
    )


def generator_ignores_y(spread: Tensor) -> Alarm:
    """From the standard deviations of b(x,y) over y [N], nats: whether y hardly changes the bound of an image."""
    mean = spread.double().mean().item()
    return Alarm(
        "generator_ignores_y",
        mean < LEAST_SPREAD,
        f"the generator ignores y: the bound differs by {mean:.2g} nats between classes, less than {LEAST_SPREAD:g}",
    )


def z_unused(kl_z: float) -> Alarm:
    """From the mean KL of q(z|x,y), nats per image: whether z says nothing about the image (posterior collapse)."""
    return Alarm("z_unused", kl_z < LEAST_KL_Z, f"z is unused: its KL is {kl_z:.2g} nats, less than {LEAST_KL_Z:g}")


def gradient_exploded(norms: Sequence[float], early: Sequence[float]) -> Alarm:
    """Whether the largest of the gradient's latest norms is far above the median of its first ones.

    Not of those just before, which are next to nothing once a few labels have been learnt by heart.
    """
    usual = statistics.median(early) if len(early) >= ENOUGH_NORMS else math.inf
    largest = max(norms, default=0.0)
    return Alarm(
        "gradient_exploded",
        largest > MOST_GROWTH * usual,
        f"the gradient exploded: its norm was {largest:.3g}, and {usual:.3g} was usual in the first steps",
    )
