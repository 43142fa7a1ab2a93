"""Temperature schedules: pure functions of the step."""

from __future__ import annotations

import math

from estimators.contract import at_least, positive


def constant(step: int, *, value: float) -> float:
    """tau(t) = value. Raises ValueError unless value > 0."""
    return positive("value", value)


def exponential(step: int, *, rate: float, minimum: float, every: int) -> float:
    """tau(t) = max(minimum, exp(-rate t)), updated every `every` steps (Jang et al. 2017, sections 4.2 and 4.3).

    Raises ValueError unless rate >= 0, minimum > 0 and every >= 1.
    """
    if not (math.isfinite(rate) and rate >= 0):
        raise ValueError(f"rate must be >= 0 and finite, got {rate}")
    positive("minimum", minimum)
    at_least("every", every, 1)
    return max(minimum, math.exp(-rate * (step // every * every)))


def geometric(step: int, *, start: float, end: float, steps: int, every: int) -> float:
    """tau(t) = start (end / start)^(t / steps): `exponential` with the rate that ends at `end`, whatever `steps` is.

    Updated every `every` steps, and `end` from the last step on. Raises ValueError unless start > 0, end > 0,
    steps >= 1 and every >= 1.
    """
    at_least("every", every, 1)
    progress = _progress(step if step >= steps else step // every * every, start, end, steps)
    return start * (end / start) ** progress


def linear(step: int, *, start: float, end: float, steps: int) -> float:
    """tau(t) goes from `start` to `end` in a straight line over `steps` steps, and stays at `end`."""
    return start + _progress(step, start, end, steps) * (end - start)


def cosine(step: int, *, start: float, end: float, steps: int) -> float:
    """tau(t) = end + (start - end) (1 + cos(pi t / steps)) / 2, and stays at `end`."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * _progress(step, start, end, steps)))


def _progress(step: int, start: float, end: float, steps: int) -> float:
    positive("start", start)
    positive("end", end)
    at_least("steps", steps, 1)
    return min(step / steps, 1.0)
