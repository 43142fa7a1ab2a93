"""What scripts.gradient_quality writes: a table, a CSV file and a picture."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from configs.schema import ConfigError

if TYPE_CHECKING:  # what is slow to import is imported where it is used, so that --help is quick
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from models.gradient_quality import Measurement, Quality

ROUNDING = 1e-9  # of a bias² next to the gradient's square


def mean_over_runs(measured: list[dict[str, Measurement]]) -> dict[str, Measurement]:
    """The mean of every number over models, of the estimators that all of them can have.

    The error of bias^2 is that of its mean, by how much models differ, or by the errors of each where those are larger,
    as a few models may agree by chance. Raises ConfigError where models have nothing in common.
    """
    from models.gradient_quality import Measurement, Quality

    first, runs = measured[0], len(measured)
    if runs == 1:
        return first
    names = [name for name in first if all(name in other for other in measured)]
    if not names:
        raise ConfigError("run folders must have models with an estimator in common")
    if len(families := {tuple(next(iter(one.values())).parts) for one in measured}) > 1:
        got = " and ".join(", ".join(parts) for parts in sorted(families))
        raise ConfigError(f"run folders must be of one family of models, got parts {got}")

    def quality(name: str, part: str) -> Quality:
        of_models = [one[name].parts[part] for one in measured]
        means = {key: fmean(getattr(q, key) for q in of_models) for key in Quality.__dataclass_fields__}
        biases = [q.bias_squared for q in of_models]
        if not all(map(math.isfinite, biases)):
            return Quality(**means)
        error = max(stdev(biases) / math.sqrt(runs), math.hypot(*(q.bias_squared_error for q in of_models)) / runs)
        return Quality(**means | {"bias_squared_error": error})

    def error(part: str) -> float:
        return fmean(one[names[0]].reference_error.get(part, 0.0) for one in measured)

    return {
        name: Measurement(
            parts={part: quality(name, part) for part in first[name].parts},
            evaluations=fmean(one[name].evaluations for one in measured),
            seconds=fmean(one[name].seconds for one in measured),
            reference_draws=first[name].reference_draws,
            reference_error={part: error(part) for part in first[name].reference_error},
        )
        for name in names
    }


def table(measured: dict[str, Measurement], about: str) -> str:
    """A block a part, the smallest mean squared error of one draw (bias^2 + variance) first."""
    blocks = []
    for part in next(iter(measured.values())).parts:
        head = [part, "bias²", "", "variance", "cosine", "signal/noise", "calls", "ms"]
        ranked = sorted(measured, key=lambda name: squared_error(measured[name].parts[part]))
        rows = [head, *(cells(name, measured[name].parts[part], measured[name]) for name in ranked)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        left = (0, 2)  # columns whose texts start at the left
        lines = [
            "  ".join(
                text.ljust(width) if column in left else text.rjust(width)
                for column, (text, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        blocks.append("\n".join(lines))
    explained = (
        "bias² (± its standard error) and variance of one draw are relative to the exact gradient's squared norm, and\n"
        "rows are in the order of their sum; cosine is the mean over draws; calls of the generator per image; ms per "
        "gradient"
    )
    return "\n\n".join([about, *blocks, "\n".join(filter(None, [explained, verdict(measured), reference(measured)]))])


def verdict(measured: dict[str, Measurement]) -> str:
    """Which estimators are seen to be biased, in the first part: of ten and more draws chance does that in 0.1 %."""
    part = next(iter(next(iter(measured.values())).parts))
    qualities = {name: one.parts[part] for name, one in measured.items()}
    seen = [short(name) for name, q in qualities.items() if q.bias_squared > max(ROUNDING, 3 * q.bias_squared_error)]
    return f"bias² is above three of its standard errors, {part}: {', '.join(seen) or 'of none'}"


def reference(measured: dict[str, Measurement]) -> str:
    """A line about the reference where it is not exact, with its squared error relative to the gradient's, by part."""
    one = next(iter(measured.values()))
    if not one.reference_draws:
        return ""
    errors = ", ".join(f"{part} {error:.2g}" for part, error in one.reference_error.items())
    return (
        f"exact is here the mean of {one.reference_draws} draws of an unbiased estimator; its relative squared error: "
        f"{errors}"
    )


def short(name: str) -> str:
    """A name with its further arguments relative to the estimator."""
    return re.sub(r"(schedule@)?estimator[./]", "", name)


def squared_error(quality: Quality) -> float:
    return max(quality.bias_squared, 0.0) + quality.variance


def cells(name: str, quality: Quality, measurement: Measurement) -> list[str]:
    bias, error = plus_minus(quality.bias_squared, quality.bias_squared_error)
    return [
        short(name),
        bias,
        error,
        f"{quality.variance:.3g}",
        f"{quality.cosine:.4f}",
        f"{quality.signal_to_noise:.3g}",
        f"{measurement.evaluations:g}",
        f"{1000 * measurement.seconds:.1f}",
    ]


def plus_minus(value: float, error: float) -> tuple[str, str]:
    """("0.0123", "± 0.0045"): as far as the error's second digit; no error where it is only rounding."""
    if not 1e-6 * abs(value) < error < math.inf:
        return f"{value:.3g}", ""
    decimals = max(0, 1 - math.floor(math.log10(error)))
    form = f".{decimals}f" if decimals <= 6 and abs(value) < 1e6 else ".1e"
    return f"{value:{form}}", f"± {error:{form}}"


def write_csv(found: dict[Path, dict[str, Measurement]], path: Path) -> None:
    """A row a run folder, estimator and part."""
    with path.open("w", newline="") as file:
        rows = [
            {
                "run": str(folder),
                "estimator": name,
                "part": part,
                **asdict(quality),
                "evaluations": m.evaluations,
                "seconds": m.seconds,
                "reference_draws": m.reference_draws,  # 0 where the gradient is exact
                "reference_error": m.reference_error.get(part, 0.0),
            }
            for folder, measured in found.items()
            for name, m in measured.items()
            for part, quality in m.parts.items()
        ]
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


# ---- the picture ----

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
MARKERS = ("o", "s", "^", "D", "v")
LARGEST = 20  # calls, from which on areas are the same: a few hundred would hide all others
ROUNDING = 1e-10  # relative squares below this are float32's


def picture(measured: dict[str, Measurement], about: str, estimated: str = "E_q(y|x)[b(x, y)]") -> Figure:
    """A panel a part: bias across, variance up, the area of a point its calls of the generator."""
    from matplotlib.figure import Figure

    longest = max(len(short(name)) for name in measured)
    figure = Figure(figsize=(11.5 + 0.13 * longest, 11), layout="constrained")
    figure.suptitle(
        f"Gradients of {estimated}: how far their mean is from the exact one, and how much a draw varies",
        fontsize=13,
    )
    legend = (
        f"areas (to {LARGEST}), and numbers in brackets: calls of the generator per image; "
        "≈ 0: no bias within two standard errors, or no variance"
    )
    lines = filter(None, [legend, about, reference(measured)])
    figure.supxlabel("\n".join(lines), fontsize=8.5, color="0.3")
    parts = list(next(iter(measured.values())).parts)
    places = list(figure.subplots(-(-len(parts) // 2), 2, squeeze=False).flat)
    for axes, part in zip(places, parts, strict=False):
        panel(axes, part, measured)
    for axes in places[len(parts) :]:
        axes.remove()
    return figure


def panel(axes: Axes, part: str, measured: dict[str, Measurement]) -> None:
    """One part. What has no bias within two standard errors, or no variance, is put into a strip along the axis."""
    qualities = {name: measurement.parts[part] for name, measurement in measured.items()}
    exact = [name for name, quality in qualities.items() if squared_error(quality) < ROUNDING]
    shown = {name: q for name, q in qualities.items() if ROUNDING <= squared_error(q) < math.inf}
    across = Scale([bias(quality) for quality in shown.values()])
    up = Scale([quality.variance if quality.variance > ROUNDING else 0.0 for quality in shown.values()])
    axes.set(xscale="log", yscale="log", xlim=across.limits, ylim=up.limits)
    axes.set(xlabel="bias: ‖E g − exact‖ / ‖exact‖", ylabel="variance of a draw: tr Cov(g) / ‖exact‖²")
    axes.set_xticks(list(across.ticks), across.ticks.values())
    axes.set_yticks(list(up.ticks), up.ticks.values())
    axes.minorticks_off()
    axes.grid(color="0.9", linewidth=0.6)
    axes.axvspan(0, across.strip_end, color="0.92", zorder=0)
    axes.axhspan(0, up.strip_end, color="0.92", zorder=0)
    axes.set_title(part, loc="left", fontweight="bold")
    axes.set_title(f"exact: {', '.join(exact)}" if exact else "", loc="right", fontsize=9)
    heights = spread([up.fraction(y) for y in up.places], gap=min(0.05, 1 / len(measured)))
    for name, x, y, height in zip(shown, across.places, up.places, heights, strict=True):
        index, calls = list(measured).index(name), measured[name].evaluations
        look: Any = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        axes.scatter(
            x,
            y,
            s=30 * min(calls, LARGEST),
            alpha=0.75,
            edgecolors="white",
            linewidths=0.5,
            zorder=3 + 1 / calls,
            **look,
        )
        axes.scatter(1.05, height, s=30, clip_on=False, transform=axes.transAxes, **look)
        axes.annotate(
            "",
            (x, y),
            (1.04, height),
            textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": look["color"], "linewidth": 0.6, "alpha": 0.6, "shrinkA": 0},
        )
        axes.text(1.07, height, f"{short(name)} ({calls:g})", fontsize=8.5, va="center", transform=axes.transAxes)


def bias(quality: Quality) -> float:
    """||E g - exact|| / ||exact||, 0 where it is within two standard errors of that."""
    is_clear = quality.bias_squared > max(2 * quality.bias_squared_error, ROUNDING)
    return math.sqrt(quality.bias_squared) if is_clear else 0.0


class Scale:
    """Where values >= 0 lie on a logarithmic axis of at least a decade, with a strip at its lower end if one is 0."""

    def __init__(self, values: list[float]) -> None:
        logs = [math.log10(value) for value in values if value > 0] or [0.0]
        middle, width = (max(logs) + min(logs)) / 2, max(max(logs) - min(logs), 1.0)
        end, high = middle - 0.57 * width, middle + 0.57 * width
        strip = 0.16 * width if 0.0 in values else 0.0
        self.limits = 10 ** (end - strip), 10**high
        self.strip_end, in_strip = 10**end, 10 ** (end - strip / 2)
        self.places = [value or in_strip for value in values]
        for digits in ((1, 2, 5), (1,)):
            ticks = [digit * 10.0**decade for decade in range(math.floor(end), math.ceil(high)) for digit in digits]
            ticks = [tick for tick in ticks if 10 ** (end + 0.04 * width) < tick < self.limits[1]]  # clear of the strip
            if len(ticks) <= 6:
                break
        self.ticks = {tick: f"{tick:g}" for tick in ticks} | ({in_strip: "≈ 0"} if strip else {})

    def fraction(self, place: float) -> float:
        """How far along the axis, from 0 to 1."""
        low, high = map(math.log, self.limits)
        return (math.log(place) - low) / (high - low)


def spread(heights: list[float], gap: float) -> list[float]:
    """Heights in [0, 1] moved as little as needs be for `gap` between neighbours, in the same order."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    moved = list(heights)
    for below, above in pairwise(order):
        moved[above] = max(moved[above], moved[below] + gap)
    ceiling = 1.0
    for index in reversed(order):
        moved[index] = min(moved[index], ceiling)
        ceiling = moved[index] - gap
    return moved
