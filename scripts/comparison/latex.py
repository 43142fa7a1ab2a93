"""The comparison as tables for a paper."""

from __future__ import annotations

from collections.abc import Sequence

from scripts.comparison.groups import Comparison, Group
from scripts.comparison.report import (
    DASH,
    about_pixels,
    explained,
    optional,
    part_title,
    pixel_columns,
    quality_and_cost,
)
from scripts.comparison.runs import METRICS

SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SPECIAL |= {character: f"\\{character}" for character in "&%$#_{}"}


def as_latex(comparison: Comparison) -> str:
    """A table of the groups for each data set and treatment of pixels, with booktabs' rules."""
    blocks = [r"% \usepackage{booktabs}; sd in brackets"]
    for part in comparison.parts if comparison.apart else [comparison]:
        names, _ = quality_and_cost(part)
        blocks += [f"% {part_title(part)}"] if comparison.apart else []
        blocks += [f"% {explained(part)}", tabular(names, part.groups)] if part.groups else []
        for pixels in part.parts if not comparison.apart else []:
            blocks += [f"% {part_title(pixels)}; {about_pixels(pixels)}", tabular(pixel_columns(pixels), pixels.groups)]
    return "\n".join(blocks) + "\n"


def tabular(names: Sequence[str], groups: Sequence[Group]) -> str:
    """A row a group: how many runs, and each metric's mean, half of its 95 % interval and standard deviation."""
    head = ["group", "$n$", *(escaped(METRICS[name].title) for name in names)]
    rows = [[escaped(group.name), str(len(group.runs)), *(cell(group, name) for name in names)] for group in groups]
    lines = [" & ".join(row) + r" \\" for row in (head, *rows)]
    begin, end = rf"\begin{{tabular}}{{lr{'r' * len(names)}}}", r"\end{tabular}"
    return "\n".join([begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", end])


def cell(group: Group, name: str) -> str:
    """A mean ± half (sd), of one run its value alone, and of how many where not all runs have it."""
    metric, summary = METRICS[name], group.summaries.get(name)
    if summary is None:
        return "--"
    mean, half, sd = (optional(value, metric) for value in (summary.mean, summary.half, summary.sd))
    spread = "" if half == DASH else rf" \pm {half}"
    n = f" [{summary.n}]" if summary.n != len(group.runs) else ""
    return f"${mean}{spread}$" + (f" (${sd}$)" if spread else "") + n


def escaped(text: str) -> str:
    return "".join(SPECIAL.get(character, character) for character in text)
