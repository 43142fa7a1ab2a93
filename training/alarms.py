"""What goes wrong quietly in the training of any model, as a number held against a threshold."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from models.contract import Alarm

MOST_GROWTH = 100.0  # times the gradient norm of the first steps
ENOUGH_NORMS = 50  # steps, before any norm is usual
MOST_LOSS = 0.05  # of the highest bound's size, and
MOST_LOSS_A_PIXEL = 0.005  # at least so many nats


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


def bound_fell(bound: float, highest: float, step: int, pixels: int) -> Alarm:
    """Whether the bound of validation images of so many pixels, nats, is far below the highest, that of `step`.

    As where few images are learnt by heart, or where J is not of discrete classes and q(y|x) makes use of that.
    """
    return Alarm(
        "bound_fell",
        highest - bound > max(MOST_LOSS * abs(highest), MOST_LOSS_A_PIXEL * pixels),
        f"the bound of validation images fell: it was {highest:.4g} nats at step {step}, and is {bound:.4g}",
    )
