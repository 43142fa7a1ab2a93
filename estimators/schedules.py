"""Temperature schedules: pure functions of the step."""

from __future__ import annotations

import math


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be > 0 and finite, got {value}")


def constant(step: int, *, value: float) -> float:
    """tau(t) = value. Raises ValueError unless value > 0."""
    _positive("value", value)
    return value


def exponential(step: int, *, rate: float, minimum: float, every: int) -> float:
    """tau(t) = max(minimum, exp(-rate t)), updated every `every` steps (Jang et al. 2017, section 4.3).

    Raises ValueError unless rate >= 0, minimum > 0 and every >= 1.
    """
    if not (math.isfinite(rate) and rate >= 0):
        raise ValueError(f"rate must be >= 0 and finite, got {rate}")
    _positive("minimum", minimum)
    if every < 1:
        raise ValueError(f"every must be >= 1, got {every}")
    return max(minimum, math.exp(-rate * (step // every * every)))


def linear(step: int, *, start: float, end: float, steps: int) -> float:
    """tau(t) goes from `start` to `end` in a straight line over `steps` steps, and stays at `end`."""
    return start + _progress(step, start, end, steps) * (end - start)


def cosine(step: int, *, start: float, end: float, steps: int) -> float:
    """tau(t) = end + (start - end) (1 + cos(pi t / steps)) / 2, and stays at `end`."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * _progress(step, start, end, steps)))


def _progress(step: int, start: float, end: float, steps: int) -> float:
    _positive("start", start)
    _positive("end", end)
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    return min(step / steps, 1.0)
