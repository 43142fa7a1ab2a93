"""Figures of a metric against a number that was swept over, a line for each other setting, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scripts.comparison.figures import (
    COLOURS,
    Axis,
    axes,
    both,
    cut,
    interval_ends,
    line,
    padded,
    padded_log,
    tag,
    text,
)
from scripts.comparison.groups import Comparison, Group
from scripts.comparison.naming import Naming, differing, value_of
from scripts.comparison.runs import METRICS
from scripts.comparison.statistics import Summary


@dataclass(frozen=True)
class Swept:
    """A key, and the groups that differ in nothing else, by increasing value; a name for each line of them."""

    key: str
    lines: list[tuple[str, list[tuple[float, Group]]]]

    @property
    def is_log(self) -> bool:
        """Whether its values are positive and span more than a decade."""
        values = [value for _, points in self.lines for value, _ in points]
        return min(values) > 0 and max(values) > 10 * min(values)


def swept_numbers(comparison: Comparison) -> list[Swept]:
    """Every key with several numbers among groups that are equal in all else; the line with the best group first."""
    records = [run for group in comparison.groups for run in group.runs]
    keys, found = differing(records), []
    for key in keys:
        others = [other for other in keys if other != key]
        by_others: dict[tuple[str, ...], list[tuple[float, Group]]] = {}
        for group in comparison.groups:
            value = group.runs[0].config.get(key)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                shared = tuple(value_of(group.runs[0], other) for other in others)
                by_others.setdefault(shared, []).append((float(value), group))
        naming = Naming(records, others)
        lines = [
            (naming.name(points[0][1].runs[0]), sorted(points, key=lambda point: point[0]))
            for points in by_others.values()
            if len(points) > 1
        ]
        if lines:
            found.append(Swept(key, lines))
    return found


def against_number(comparison: Comparison, swept: Swept, metric: str) -> str:
    """The metric's mean with its 95 % interval; empty where no line has two values of it."""
    lines = [
        (name, [(x, group.summaries[metric]) for x, group in points if metric in group.summaries])
        for name, points in swept.lines
    ]
    lines = [(name, points) for name, points in lines if len(points) > 1]
    if not lines:
        return ""
    title = f"{METRICS[metric].title} against {swept.key}"
    summaries = [summary for _, points in lines for _, summary in points]
    limits = padded(interval_ends([s.mean for s in summaries], [s.half for s in summaries]))
    values = [x for _, points in lines for x, _ in points]
    ends = padded_log(values) if swept.is_log else padded(values)

    def draw(width: float) -> tuple[str, float]:
        height = 340.0
        x, y = Axis(*ends, 58, width - 24, log=swept.is_log), Axis(*limits, height - 44, 12)
        label = swept.key + (", logarithmic" if swept.is_log else "")
        parts = [axes(x, y, label, most=int(width / 75))]
        for place, (_, points) in enumerate(lines):
            aside = 3.0 * (place - (len(lines) - 1) / 2)  # or intervals would hide each other
            parts.append(drawn_line(points, x, y, aside, f"c{place % COLOURS}"))
        names, below = legend([name for name, _ in lines], width, height + 4)
        return "".join([*parts, names]), below

    return tag("h3", title) + tag("figure", both(draw, title))


def drawn_line(points: Sequence[tuple[float, Summary]], x: Axis, y: Axis, aside: float, class_: str) -> str:
    places = [(x(at) + aside, s) for at, s in points]
    corners = " ".join(f"{at:.1f},{y.clipped(s.mean):.1f}" for at, s in places)
    parts: list[Any] = [tag("polyline", points=corners, class_=f"mean {class_}")]
    for at, s in places:
        if s.half is not None:
            parts.append(line(at, y.clipped(s.mean + s.half), at, y.clipped(s.mean - s.half), f"whisker {class_}"))
        parts.append(tag("circle", cx=at, cy=y(s.mean), r=4.0, class_=f"dot {class_}"))
    return "".join(parts)


def legend(names: Sequence[str], width: float, top: float) -> tuple[str, float]:
    """A row a line below the figure, none where there is one line alone; and where it ends."""
    if len(names) == 1:
        return "", top
    parts = []
    for place, name in enumerate(names):
        y, class_ = top + 18.0 * (place + 0.5), f"c{place % COLOURS}"
        parts += [line(58, y, 82, y, f"mean {class_}"), tag("circle", cx=70.0, cy=y, r=4.0, class_=f"dot {class_}")]
        parts.append(text(cut(name, int((width - 100) / 6.5)), 90, y + 4, "start", "name"))
    return "".join(parts), top + 18.0 * len(names) + 8


def swept_section(comparison: Comparison) -> str:
    """A figure for what sorts and one for what is reported of it, for each number that was swept over."""
    metrics = dict.fromkeys((comparison.metric, comparison.reported))
    return "".join(
        against_number(comparison, swept, metric) for swept in swept_numbers(comparison) for metric in metrics
    )
