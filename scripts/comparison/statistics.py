"""What scripts.compare says about numbers: means with Student's intervals, and paired tests."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any


@dataclass(frozen=True)
class Summary:
    """Of n values: mean, standard deviation with n - 1, half of the mean's 95 % interval; of one only a mean."""

    n: int
    mean: float
    sd: float | None = None
    half: float | None = None


@dataclass(frozen=True)
class Paired:
    """A group less the baseline over the draws that both have. No p where all differences are equal or there is one."""

    difference: Summary
    p: float | None
    p_holm: float | None = None


def summarize(values: Sequence[float]) -> Summary | None:
    """None of no values."""
    n = len(values)
    if n < 2:
        return Summary(1, values[0]) if values else None
    sd = stdev(values)
    return Summary(n, fmean(values), sd, t_quantile(0.975, n - 1) * sd / math.sqrt(n))


def paired(group: Mapping[Any, float], baseline: Mapping[Any, float]) -> Paired | None:
    """Student's paired test over the keys that both have, two-sided; None if there is none."""
    difference = summarize([group[key] - baseline[key] for key in group if key in baseline])
    if difference is None:
        return None
    if difference.sd is None or difference.sd <= 1e-12 * abs(difference.mean):
        return Paired(difference, None)
    t = difference.mean / (difference.sd / math.sqrt(difference.n))
    return Paired(difference, t_two_sided(t, difference.n - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being several (Holm 1979): P(any false positive among them) stays below the level."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = list(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def t_two_sided(t: float, df: int) -> float:
    """P(|T| >= |t|) for Student's T: I_x(df/2, 1/2) at x = df / (df + t^2) (DLMF 8.17, Abramowitz & Stegun 26.5.27)."""
    a, b, x = df / 2, 0.5, df / (df + t * t)
    if t == 0 or x == 0:
        return float(t == 0)
    rest = t * t / (df + t * t)  # 1 - x without cancellation
    logs = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    factor = math.exp(logs + a * math.log(x) + b * math.log(rest))
    if x < (a + 1) / (a + b + 2):
        return factor * _continued_fraction(a, b, x) / a
    return 1 - factor * _continued_fraction(b, a, rest) / b


def _continued_fraction(a: float, b: float, x: float) -> float:
    """Of the incomplete beta function, DLMF 8.17.22, by Lentz's method; quick for x < (a + 1) / (a + b + 2)."""
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            c, d = 1 + term / c, 1 / (1 + term * d)
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return value


@functools.cache
def t_quantile(probability: float, df: int) -> float:
    """The t with P(T <= t) = probability, for probability > 1/2, by bisection to the last bit."""
    low, high = 0.0, 1.0
    while t_two_sided(high, df) > 2 * (1 - probability):
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if t_two_sided(middle, df) > 2 * (1 - probability) else (low, middle)
    return high
