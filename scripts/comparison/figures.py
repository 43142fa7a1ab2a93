"""The figures of scripts.compare as inline SVG: sizes in CSS pixels, colours from the page's style sheet."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean, median

from scripts.comparison.groups import Comparison, Group
from scripts.comparison.runs import METRICS
from scripts.gradient_report import spread

COLOURS = 8  # in the style sheet, as many as can be told apart
RADIUS = 8.0  # of a dot with a number
BEHIND = 8  # groups in grey in every panel: with all of them the page would grow with their square
MOST_SPREAD = 50  # dots: of more the figure is full, and finding places for them takes long
Curve = Sequence[tuple[int, float]]


def tag(name: str, content: str = "", /, **attributes: object) -> str:
    """An element; `class_` is class, and stroke_width stroke-width. Attributes are escaped, `content` is not."""
    pairs = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    written = "".join(
        f' {key}="{round(value, 2) if isinstance(value, float) else escape(str(value))}"'
        for key, value in pairs.items()
        if value is not None
    )
    return f"<{name}{written}>{content}</{name}>"


def text(words: str, x: float, y: float, anchor: str = "start", class_: str = "") -> str:
    return tag("text", escape(words), x=x, y=y, text_anchor=anchor, class_=class_ or None)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def number(value: float, form: str) -> str:
    """With a true minus, and no minus before zero."""
    written = f"{value:{form}}"
    return written.lstrip("-") if not any(digit in written for digit in "123456789") else written.replace("-", "−")


def colour(comparison: Comparison, group: Group) -> str:
    """A group's class in all figures: of its own as long as there are enough, else the baseline's or the others'."""
    if len(comparison.groups) <= COLOURS:
        return f"c{comparison.groups.index(group)}"
    return "c1" if group is comparison.baseline else "c0"


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` onto pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        def f(v: float) -> float:
            return math.log(v) if self.log else v

        along = (f(value) - f(self.low)) / (f(self.high) - f(self.low))
        return self.start + along * (self.end - self.start)

    def clipped(self, value: float) -> float:
        return self(min(max(value, self.low), self.high))

    def ticks(self, most: int) -> list[float]:
        """Round values, `most` of them at most."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1) if self.log else ()
        for digits in ((1, 2, 5), (1,)):
            ticks = [digit * 10.0**decade for decade in decades for digit in digits]
            ticks = [tick for tick in ticks if self.low <= tick <= self.high]
            if 3 <= len(ticks) <= most:
                return ticks
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / most))
        step = next(step * m for m in (1, 2, 5, 10, 20, 50) if (self.high - self.low) / (step * m) <= most)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(index * step, 12) for index in range(first, last + 1)]


def padded(values: Sequence[float], share: float = 0.07) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = share * (high - low) or max(abs(high), 1e-3) * share
    return low - pad, high + pad


def interval_ends(means: Sequence[float], halves: Sequence[float | None]) -> list[float]:
    """Where an axis has to reach: one wild interval, beyond twice the median, does not squeeze the others."""
    known = [half for half in halves if half is not None]
    reach = 2 * median(known) if known else 0.0
    pairs = [(mean, min(half or 0.0, reach)) for mean, half in zip(means, halves, strict=True)]
    return [end for mean, half in pairs for end in (mean - half, mean + half)]


def padded_log(values: Sequence[float]) -> tuple[float, float]:
    pad = (max(values) / min(values)) ** 0.1 if min(values) < max(values) else 1.5
    return min(values) / pad, max(values) * pad


def axes(x: Axis, y: Axis, title: str, most: int) -> str:
    """Grid lines, tick labels and the title of the axis below."""
    parts = []
    for value in y.ticks(5):
        parts += [line(x.start, y(value), x.end, y(value), "grid")]
        parts += [text(tick(value), x.start - 6, y(value) + 4, "end")]
    for value in x.ticks(most):
        parts += [line(x(value), y.start, x(value), y.start + 4, "axis")]
        parts += [text(tick(value), x(value), y.start + 17, "middle")]
    parts.append(line(x.start, y.start, x.end, y.start, "axis"))
    return "".join(parts) + text(title, (x.start + x.end) / 2, y.start + 35, "middle")


def tick(value: float) -> str:
    return number(value, ",.0f" if abs(value) >= 1000 else ".6g").replace(",", " ")


def svg(content: str, width: float, height: float, label: str, class_: str) -> str:
    box = f"0 0 {width:g} {height:g}"
    return tag("svg", content, viewBox=box, role="img", aria_label=label, class_=class_)


def both(draw: Callable[[float], tuple[str, float]], label: str) -> str:
    """A figure for a desktop and one for a phone; the style sheet shows one of them."""
    drawn = [(width, *draw(width)) for width in (760.0, 350.0)]
    classes = ("wide", "narrow")
    return "".join(svg(c, w, h, label, class_) for (w, c, h), class_ in zip(drawn, classes, strict=True))


def breakable(name: str) -> str:
    """A name as HTML that a narrow place breaks where a person would."""
    return re.sub("([/_=. ])", r"\1<wbr/>", escape(name))


def dot(x: float, y: float, rank: int, class_: str) -> str:
    return tag("circle", cx=x, cy=y, r=RADIUS, class_=f"dot {class_}") + text(
        str(rank), x, y + 4, "middle", f"rank {class_}"
    )


# ---- learning curves ----


@dataclass(frozen=True)
class Curves:
    """Of a group: each run's, and where all have a value the mean with the lowest and the highest."""

    runs: list[Curve]
    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def curves_of(group: Group, name: str) -> Curves | None:
    """None where no run has any."""
    runs = [run.curves[name] for run in group.runs if run.curves.get(name)]
    runs = [[(step, value) for step, value in curve if math.isfinite(value)] for curve in runs]
    if not any(runs):
        return None
    steps = sorted(set.intersection(*({step for step, _ in curve} for curve in runs)))
    columns = [[dict(curve)[step] for curve in runs] for step in steps]
    return Curves([*runs], steps, [fmean(c) for c in columns], [min(c) for c in columns], [max(c) for c in columns])


def points(x: Axis, y: Axis, curve: Curve) -> str:
    return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in curve)


def inside(x: Axis, y: Axis, content: str) -> str:
    """`content` without what goes below or above the axes; sideways there is room for half a dot."""
    left, top, width, height = x.start - 4, y.end, x.end - x.start + 8, y.start - y.end
    return tag("svg", content, x=left, y=top, width=width, height=height, viewBox=f"{left} {top} {width} {height}")


def drawn_curves(curves: Curves, x: Axis, y: Axis, class_: str) -> str:
    """Thin lines for runs, a band from the lowest to the highest, and the mean."""
    up = [*zip(curves.steps, curves.high, strict=True)]
    down = [*zip(curves.steps, curves.low, strict=True)]
    parts = [tag("polyline", points=points(x, y, curve), class_=f"thin {class_}") for curve in curves.runs]
    alone = [curve[0] for curve in curves.runs if len(curve) == 1]  # no line
    parts += [tag("circle", cx=x(step), cy=y(value), r=2.0, class_=f"thin {class_}") for step, value in alone]
    parts.append(tag("polygon", points=points(x, y, [*up, *reversed(down)]), class_=f"band {class_}"))
    mean = [*zip(curves.steps, curves.mean, strict=True)]
    parts.append(tag("polyline", points=points(x, y, mean), class_=f"mean {class_}"))
    parts += [tag("circle", cx=x(s), cy=y(v), r=2.5, class_=f"dot {class_}") for s, v in mean if len(mean) < 8]
    return "".join(parts)


def curve_limits(all_curves: Sequence[Curves]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Of steps and values. Where training starts far below where it ends, the start is cut off."""
    steps = [step for curves in all_curves for curve in curves.runs for step, _ in curve]
    values = [value for curves in all_curves for curve in curves.runs for _, value in curve]
    last = [curve[-1][1] for curves in all_curves for curve in curves.runs if curve]
    top, bottom = max(values), min(last)
    early = sorted(values)[len(values) // 6]
    floor = max(min(values), min(bottom, early) - 0.5 * (top - bottom))
    first, final = min(steps), max(steps)
    return (float(min(0, first)), float(final or 1)), padded([floor, top])


def groups_with(comparison: Comparison, name: str, pixels: str | None) -> list[tuple[int, Group, Curves]]:
    """Place, group and curves of those that have any; only those of these pixels, where they are given."""
    return [
        (place, group, curves)
        for place, group in enumerate(comparison.groups, 1)
        if pixels in (None, group.pixels) and (curves := curves_of(group, name))
    ]


def curve_chart(comparison: Comparison, name: str, pixels: str | None) -> str:
    """All groups in one figure, each with its number where it ends."""
    shown = groups_with(comparison, name, pixels)
    if not shown:
        return ""
    steps, values = curve_limits([curves for *_, curves in shown])

    def draw(width: float) -> tuple[str, float]:
        height = 340.0
        x, y = Axis(*steps, 52, width - 34), Axis(*values, height - 44, 12)
        parts = [axes(x, y, "step", most=int(width / 75))]
        ends = [next(iter(reversed(c.mean)), c.runs[0][-1][1]) for *_, c in shown]
        span = y.start - y.end
        heights = spread([(y.start - y.clipped(end)) / span for end in ends], min(2 * RADIUS / span, 1 / len(ends)))
        drawn = [drawn_curves(curves, x, y, colour(comparison, group)) for _, group, curves in shown]
        parts.append(inside(x, y, "".join(drawn)))
        for (rank, group, _), end, at in zip(shown, ends, heights, strict=True):
            class_ = colour(comparison, group)
            parts.append(line(x.end, y.clipped(end), x.end + 14, y.start - at * span, f"lead {class_}"))
            parts.append(dot(x.end + 20, y.start - at * span, rank, class_))
        return "".join(parts), height

    return both(draw, f"{METRICS[name].title} against steps, a line a group")


def curve_panels(comparison: Comparison, name: str, pixels: str | None) -> str:
    """A small figure a group, with the means of the best groups behind it in grey."""
    shown = groups_with(comparison, name, pixels)
    if not shown:
        return ""
    steps, values = curve_limits([curves for *_, curves in shown])
    width, height = 210.0, 150.0
    x, y = Axis(*steps, 46, width - 6), Axis(*values, height - 22, 8)
    behind = "".join(
        tag("polyline", points=points(x, y, [*zip(c.steps, c.mean, strict=True)]), class_="other")
        for *_, c in shown[:BEHIND]
        if len(c.steps) > 1
    )
    panels = []
    for _, group, curves in shown:
        grid = [line(x.start, y(value), x.end, y(value), "grid") for value in y.ticks(4)]
        grid += [text(tick(value), x.start - 5, y(value) + 4, "end") for value in y.ticks(4)]
        grid += [text(tick(v), x(v), height - 6, "end" if v == steps[1] else "middle") for v in x.ticks(2)]
        content = "".join(grid) + inside(x, y, behind + drawn_curves(curves, x, y, colour(comparison, group)))
        drawing = svg(content, width, height, f"{METRICS[name].title} of {group.name} against steps", "")
        panels.append(tag("figure", tag("figcaption", f"{chip(comparison, group)} {breakable(group.name)}") + drawing))
    return tag("div", "".join(panels), class_="panels")


def learning_curves(comparison: Comparison, name: str, pixels: str | None = None) -> str:
    """Of all groups, or of those with the same pixels. Empty where no run has the curve."""
    draw = curve_chart if len(comparison.groups) <= COLOURS else curve_panels
    return draw(comparison, name, pixels)


def chip(comparison: Comparison, group: Group) -> str:
    """A group's number on its colour, for the page."""
    rank = str(comparison.groups.index(group) + 1)
    return tag("span", rank, class_=f"chip {colour(comparison, group)}")


# ---- against cost ----


def side_by_side(centres: Sequence[tuple[float, float]], gap: float, low: float, high: float) -> list[float]:
    """x of dots moved as little as needs be for no two centres to be nearer than `gap`.

    One for which nothing is free from `low` to `high` stays where it is, and so do all where there are many.
    """
    if len(centres) > MOST_SPREAD:
        return [x for x, _ in centres]
    placed: list[tuple[float, float]] = []
    for x, y in centres:
        tries = (x + sign * 0.25 * gap * k for k in range(4 * len(centres) + 1) for sign in (1, -1))
        within = (at for at in tries if low <= at <= high)
        free = (at for at in within if all(math.hypot(at - a, y - b) >= gap for a, b in placed))
        placed.append((next(free, x), y))
    return [x for x, _ in placed]


def quality_of(comparison: Comparison) -> str:
    """What costs are held against where one of them sorts: of models without classes no accuracy."""
    qualities = ("test_accuracy", "test_log_likelihood", "test_bound")
    found = (name for name in qualities if any(name in group.summaries for group in comparison.groups))
    return next(found, qualities[0])


def against(comparison: Comparison, cost: str) -> str:
    """The mean of what is reported against the mean of a cost on a logarithmic axis."""
    metric = comparison.reported if comparison.metric != cost else quality_of(comparison)
    shown = [
        (i, group, group.summaries[cost].mean, group.summaries[metric])
        for i, group in enumerate(comparison.groups, 1)
        if metric in group.summaries and cost in group.summaries and group.summaries[cost].mean > 0
    ]
    if not shown:
        return ""
    with_intervals = len(comparison.groups) <= COLOURS
    means = [s.mean for *_, s in shown]
    limits = padded(interval_ends(means, [s.half if with_intervals else None for *_, s in shown]))
    title = METRICS[cost].title

    def draw(width: float) -> tuple[str, float]:
        height = 360.0
        x = Axis(*padded_log([at for _, _, at, _ in shown]), 58, width - 14, log=True)
        y = Axis(*limits, height - 44, 12)
        parts = [axes(x, y, f"{title}, logarithmic", most=int(width / 80))]
        centres = [(x(at), y(s.mean)) for _, _, at, s in shown]
        moved = side_by_side(centres, 17.0, x.start, x.end)
        for (rank, group, _, s), across, (_, up) in zip(shown, moved, centres, strict=True):
            class_ = colour(comparison, group)
            if with_intervals and s.half is not None:
                top, bottom = y.clipped(s.mean + s.half), y.clipped(s.mean - s.half)
                parts.append(line(across, top, across, bottom, f"whisker {class_}"))
            parts.append(dot(across, up, rank, class_))
        return "".join(parts), height

    heading = f"{METRICS[metric].title} against {title}"
    return tag("h3", heading) + tag("figure", both(draw, heading))


# ---- paired differences ----


def forest(comparison: Comparison) -> str:
    """A row a group: its mean difference from the baseline over shared draws, with the 95 % interval."""
    rows = [(i, g, g.against_baseline) for i, g in enumerate(comparison.groups, 1) if g.against_baseline]
    if not rows:
        return ""
    form = METRICS[comparison.reported].form
    means = [test.difference.mean for *_, test in rows]
    ends = interval_ends(means, [test.difference.half for *_, test in rows])
    low, high = padded([*ends, 0.0])

    def draw(width: float) -> tuple[str, float]:
        is_wide = width > 500
        height_of_row = 27.0 if is_wide else 46.0
        height = 14 + height_of_row * len(rows) + 44
        x = Axis(low, high, 232.0 if is_wide else 14.0, width - (232.0 if is_wide else 14.0))
        bottom = height - 44
        parts = [line(x(value), 6, x(value), bottom, "grid") for value in x.ticks(int((x.end - x.start) / 48))]
        parts += [line(x(0), 6, x(0), bottom, "axis"), line(x.start, bottom, x.end, bottom, "axis")]
        parts += [text(tick(v), x(v), bottom + 17, "middle") for v in x.ticks(int((x.end - x.start) / 48))]
        title = f"difference in {METRICS[comparison.reported].title}"
        parts.append(text(title, (x.start + x.end) / 2, bottom + 35, "middle"))
        for index, (rank, group, test) in enumerate(rows):
            y = 14 + height_of_row * (index + (0.5 if is_wide else 0.72))
            class_, mean, half = colour(comparison, group), test.difference.mean, test.difference.half
            parts.append(interval(x, y, mean, half, class_))
            parts.append(tag("circle", cx=x(mean), cy=y, r=4.5, class_=f"dot {class_}"))
            width_of_mean = f" ± {number(half, form)}" if half is not None and is_wide else ""
            words = number(mean, f"+{form}") + width_of_mean + p_value(test.p_holm, ", p ")
            above = y + 4 if is_wide else y - 18
            parts.append(text(cut(f"{rank}  {group.name}", 34 if is_wide else 32), 4.0, above, "start", "name"))
            parts.append(text(words, width - 4, above, "end", "small"))
        return "".join(parts), height

    baseline = f", {comparison.baseline.name}" if comparison.baseline else ""
    return both(draw, f"differences in {METRICS[comparison.reported].title} from the baseline{baseline}")


def interval(x: Axis, y: float, mean: float, half: float | None, class_: str) -> str:
    """A line, with an arrowhead where it goes beyond the axis."""
    if half is None:
        return ""
    parts = [line(x.clipped(mean - half), y, x.clipped(mean + half), y, f"whisker {class_}")]
    for end, out in ((mean - half, -1), (mean + half, 1)):
        if not x.low <= end <= x.high:
            at = x.clipped(end)
            corners = f"{at + 5 * out:.1f},{y:.1f} {at - 2 * out:.1f},{y - 4:.1f} {at - 2 * out:.1f},{y + 4:.1f}"
            parts.append(tag("polygon", points=corners, class_=f"arrow {class_}"))
    return "".join(parts)


def p_value(p: float | None, before: str = "") -> str:
    if p is None:
        return ""
    return before + ("< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.0995 else f"{p:.2f}")


def cut(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def both_curves(comparison: Comparison) -> str:
    """Validation accuracy, bound and log p(x), under a heading each; figures of these for each kind of pixels."""
    kinds: list[str | None] = [part.pixels for part in comparison.parts] or [None]
    drawn = [(METRICS["val_accuracy"].title, learning_curves(comparison, "val_accuracy"))]
    for pixels, name in itertools.product(kinds, ("val_bound", "val_log_likelihood")):
        heading = f"{METRICS[name].title}, {METRICS[name].unit} per image" + (f", of {pixels}" if pixels else "")
        drawn.append((heading, learning_curves(comparison, name, pixels)))
    return "".join(
        tag("h3", escape(heading)) + (figure if figure.startswith("<div") else tag("figure", figure))
        for heading, figure in drawn
        if figure
    )
