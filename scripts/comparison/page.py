"""The page that scripts.compare writes: the tables, figures and pictures in one file that loads nothing."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from pathlib import Path

from scripts.comparison.events import DamagedEvents, read_pictures
from scripts.comparison.figures import BEHIND, COLOURS, against, both_curves, breakable, chip, forest, number, tag
from scripts.comparison.groups import Comparison, Group, rank
from scripts.comparison.report import (
    DASH,
    UNFINISHED,
    UNFINISHED_SAID,
    about_pixels,
    about_test,
    choice,
    command,
    conditions,
    explained,
    headline,
    part_title,
    pixel_columns,
    quality_and_cost,
    test_table,
    unfinished_rows,
)
from scripts.comparison.runs import METRICS, Metric, Record
from scripts.comparison.statistics import Summary
from scripts.comparison.swept import swept_section


def best_run(comparison: Comparison) -> Record | None:
    runs = [run for group in comparison.groups for run in group.runs if comparison.metric in run.counted]
    return min(runs, key=lambda run: rank(Summary(1, run.values[comparison.metric]), comparison.metric), default=None)


NOT_OF_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # such as a log after a power cut
ALLOWED = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # nothing is loaded


def page(comparison: Comparison) -> str:
    """A page that loads nothing: style, figures and pictures are in it. It is well-formed XML besides."""
    style = (Path(__file__).parent / "page.css").read_text()
    head = (
        '<meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>'
        '<meta name="color-scheme" content="light dark"/>'
        f'<meta http-equiv="Content-Security-Policy" content="{ALLOWED}"/>'
        f"<title>Comparison of runs</title><style>{style}</style>"
    )
    ranked = comparison.parts if comparison.apart else [comparison]
    titles = [part_title(part) if part.kind else part.pixels or part_title(part) for part in ranked]
    titles = titles if comparison.apart else [""]
    results = list(zip(titles, map(results_sections, ranked), strict=True))
    sections = [
        tag("header", tag("h1", "Comparison of runs") + paragraph(headline_of_page(comparison), "lede")),
        *(
            tag("section", tag("h2", escape(title)) + content)
            for title, content in (
                *((f"{title}: {of}" if of else title, content) for of, found in results for title, content in found),
                ("Unfinished and failed runs", unfinished_section(comparison)),
                ("Notes", items(comparison.notes)),
                ("Commands", "".join(map(commands_section, ranked))),
                ("Made with", items(conditions(comparison))),
            )
            if content
        ),
    ]
    body = tag("main", "".join(sections))
    whole = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'
    return NOT_OF_XML.sub("\N{REPLACEMENT CHARACTER}", whole)


def results_sections(comparison: Comparison) -> list[tuple[str, str]]:
    return [
        ("Groups", groups_section(comparison)),
        *((part_title(part), bounds_section(comparison, part)) for part in comparison.parts),
        ("Against what was swept", against_section(comparison)),
        ("Learning curves", curves_section(comparison)),
        ("What it costs", cost_section(comparison)),
        ("Differences over the same draws", test_section(comparison)),
        ("What the best run draws", pictures_section(comparison)),
    ]


def bounds_section(whole: Comparison, part: Comparison) -> str:
    """The bounds of one kind of pixels, in the order of the whole, which is not theirs."""
    said = about_pixels(part)
    table = summary_table(whole, pixel_columns(part), part.groups)
    return table + paragraph(f"Not ranked; {said}.", "caption")


def headline_of_page(comparison: Comparison) -> str:
    if not comparison.groups:
        return "No run is finished."
    said = f"{headline(comparison)}."
    if comparison.apart:
        return f"{said} They are ranked apart for each {comparison.apart}."
    return f"{said} {choice(comparison).replace('-', '−')}" if len(comparison.groups) > 1 else said


def paragraph(words: str, class_: str = "") -> str:
    return tag("p", escape(words), class_=class_ or None)


def items(lines: Sequence[str]) -> str:
    return tag("ul", "".join(tag("li", escape(line)) for line in lines)) if lines else ""


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], class_: str = "") -> str:
    """Cells are HTML; the first column stays in sight when the table is wider than the screen."""
    heads = tag("thead", tag("tr", "".join(tag("th", cell, scope="col") for cell in head)))
    body = "".join(
        tag("tr", tag("th", row[0], scope="row") + "".join(tag("td", cell) for cell in row[1:])) for row in rows
    )
    return tag("div", tag("table", heads + tag("tbody", body), class_=class_ or None), class_="scroll", tabindex="0")


def name_cell(comparison: Comparison, group: Group) -> str:
    return tag("span", chip(comparison, group) + tag("span", breakable(group.name)), class_="named")


def groups_section(comparison: Comparison) -> str:
    if not comparison.groups:
        return ""
    words = explained(comparison)
    said = words[0].upper() + words[1:] + "."
    if len(comparison.groups) > COLOURS:
        said += " Numbers stand for groups in the figures; orange is the baseline, blue are all others."
    return summary_table(comparison, quality_and_cost(comparison)[0]) + paragraph(said, "caption")


def summary_table(comparison: Comparison, names: Sequence[str], groups: Sequence[Group] | None = None) -> str:
    head = ["group", "n"]
    for name in names:
        unit = tag("small", METRICS[name].unit) if METRICS[name].unit else ""
        head.append(METRICS[name].title + unit)
    rows = []
    for group in comparison.groups if groups is None else groups:
        cells = [value_cell(group.summaries.get(name), METRICS[name], len(group.runs)) for name in names]
        rows.append([name_cell(comparison, group), str(len(group.runs)), *cells])
    return html_table(head, rows)


def value_cell(summary: Summary | None, metric: Metric, runs: int) -> str:
    if summary is None:
        return DASH
    half, sd = (DASH if v is None else number(v, metric.form) for v in (summary.half, summary.sd))
    n = f", n {summary.n}" if summary.n != runs else ""
    return f"{number(summary.mean, metric.form)} ± {half}" + tag("small", f"sd {sd}{n}")


def key(comparison: Comparison) -> str:
    names = "".join(tag("li", name_cell(comparison, group)) for group in comparison.groups)
    return tag("ul", names, class_="key")


def curves_section(comparison: Comparison) -> str:
    content = both_curves(comparison)
    if not content:
        return ""
    said = (
        "On held-out images while training. Thin lines, or circles, are runs; the strong line is their mean and the "
        "band goes from the lowest to the highest, at the steps at which all runs of the group were looked at. Where "
        "training starts far below where it ends, its start is cut off."
    )
    in_one_figure = len(comparison.groups) <= COLOURS
    said += "" if in_one_figure else f" Grey are the means of the {BEHIND} best groups."
    return content + (key(comparison) if in_one_figure else "") + paragraph(said, "caption")


def against_section(comparison: Comparison) -> str:
    content = swept_section(comparison)
    said = "Means of groups that differ in nothing but that number, with their 95 % intervals (Student's t)."
    return content + paragraph(said, "caption") if content else ""


def cost_section(comparison: Comparison) -> str:
    figures = [figure for cost in ("evaluations", "seconds") if (figure := against(comparison, cost))]
    costs = quality_and_cost(comparison)[1]
    if not costs:
        return ""
    said = (
        "Dots are means of a group; those that would hide each other are moved sideways where there is room. Calls of "
        "the generator are per unlabelled image and step, and depend on no machine; seconds are those of the runs, and "
        "tell of whatever else the machine did at the time."
    )
    drawn = "".join(figures) + key(comparison) + paragraph(said, "caption") if figures else ""
    return drawn + summary_table(comparison, costs)


def test_section(comparison: Comparison) -> str:
    said = "".join(paragraph(sentence) for sentence in about_test(comparison))
    if not said:
        return ""
    head, *rows = test_table(comparison)
    others = [group for group in comparison.groups if group is not comparison.baseline]
    cells = [
        [name_cell(comparison, group), *(escape(cell.replace("-", "−")) for cell in row[2:])]
        for group, row in zip(others, rows, strict=True)
    ]
    drawn = forest(comparison)
    better = "right" if METRICS[comparison.reported].higher_is_better else "left"
    figure = tag("figure", drawn) + paragraph(
        f"To the {better} of the line is better than the baseline. An arrowhead: the interval goes further. "
        "p is adjusted for the number of tests.",
        "caption",
    )
    return said + (figure if drawn else "") + html_table(head[1:], cells)


def pictures_section(comparison: Comparison) -> str:
    best = best_run(comparison)
    found: dict[str, tuple[bytes, int]] = {}
    if best:
        with suppress(DamagedEvents, OSError):  # said already, when its scalars were read
            found = read_pictures(best.folder)
    if best is None or not found:
        return ""
    shown = dict.fromkeys((comparison.metric, comparison.reported))
    values = [f"{METRICS[n].title} {number(best.values[n], METRICS[n].form)}" for n in shown if n in best.values]
    said = {
        "reconstructions": "Held-out images, and below each what the model makes of it.",
        "generated": "Generated images: a row is a class, a column a style.",
    }
    parts = [paragraph(f"{best.folder}: {', '.join(values)}")]
    for name, (png, step) in found.items():
        words = f"{said.get(name, name)} Step {step}."
        picture = f'<img alt="{escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"/>'
        parts.append(tag("figure", picture + tag("figcaption", escape(words)), class_="picture"))
    return "".join(parts)


def unfinished_section(comparison: Comparison) -> str:
    if not comparison.unfinished:
        return ""
    rows = [
        [breakable(name), *map(escape, (folder, steps, accuracy, bound.replace("-", "−"), words))]
        for name, folder, steps, accuracy, bound, words in unfinished_rows(comparison)
    ]
    return paragraph(f"{UNFINISHED_SAID}.") + html_table(UNFINISHED, rows, "words")


def commands_section(comparison: Comparison) -> str:
    """The command of every run, folded up by group."""
    folded = []
    for group in comparison.groups:
        lines = []
        for run in group.runs:
            lines.append(f"# {run.folder}" + resumed(run))
            lines.append(command(run) or "# it has no record of its command")
        code = tag("pre", tag("code", escape("\n".join(lines))))
        folded.append(tag("details", tag("summary", name_cell(comparison, group)) + code))
    return "".join(folded)


def resumed(run: Record) -> str:
    start = run.facts.get("start_step")
    return f", resumed at step {start} and trained to {run.steps}" if start else ""
