"""What scripts.compare writes: tables for the terminal and in Markdown, a CSV file of runs, and a page."""

from __future__ import annotations

import base64
import csv
import io
import shlex
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from textwrap import fill

from scripts.comparison.figures import COLOURS, against, both_curves, breakable, chip, forest, number, p_value, tag
from scripts.comparison.groups import Comparison, Group, rank
from scripts.comparison.runs import METRICS, Metric, Record
from scripts.comparison.statistics import Summary

DASH = "–"
COSTS = ("evaluations", "seconds", "steps_per_second")


def columns(comparison: Comparison) -> list[str]:
    """The metrics to show: the one that sorts, and the others that any group has."""
    wanted = [comparison.metric, *(name for name in METRICS if name not in (comparison.metric, "val_bound"))]
    if comparison.parts:
        wanted = [name for name in wanted if not METRICS[name].of_pixels]
    return [name for name in wanted if any(name in group.summaries for group in comparison.groups)]


def pixel_columns(part: Comparison) -> list[str]:
    """The metrics that a part has and the whole does not show."""
    return [name for name in columns(part) if METRICS[name].of_pixels]


def quality_and_cost(comparison: Comparison) -> tuple[list[str], list[str]]:
    """The metrics to show, in two tables; the one that sorts is in the first."""
    shown = columns(comparison)
    cost = [name for name in shown if name in COSTS and name != comparison.metric]
    return [name for name in shown if name not in cost], cost


def plus_minus(summary: Summary | None, metric: Metric, runs: int) -> str:
    """Mean ± half of the 95 % interval: a dash for what one run does not tell, and n where not all runs have it."""
    if summary is None:
        return DASH
    n = f" [n {summary.n}]" if summary.n != runs else ""
    return f"{summary.mean:{metric.form}} ± {optional(summary.half, metric)}{n}"


def optional(value: float | None, metric: Metric) -> str:
    return DASH if value is None else f"{value:{metric.form}}"


def counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def headline(comparison: Comparison) -> str:
    runs = sum(len(group.runs) for group in comparison.groups)
    better = "highest" if METRICS[comparison.metric].higher_is_better else "lowest"
    return (
        f"{counted(runs, 'finished run')} in {counted(len(comparison.groups), 'group')}, "
        f"{better} {METRICS[comparison.metric].title} first"
    )


EXPLAINED = (
    "mean ± half of its 95 % interval (Student's t over the runs of a group); sd is that of runs, with n - 1; "
    "bounds and log p(x) in nats per image; calls are of the generator, per unlabelled image and step"
)


def explained(comparison: Comparison) -> str:
    """How to read a table, and what its bounds are about."""
    about = f"; {about_pixels(comparison)}" if comparison.pixels else ""
    return EXPLAINED + about


def about_pixels(comparison: Comparison) -> str:
    """What the bounds of one kind of pixels bound."""
    from models.likelihoods import log_likelihood_name

    config = next(g.runs[0].config for g in comparison.groups if g.pixels == comparison.pixels)
    name = log_likelihood_name(str(config.get("likelihood")), str(config.get("data.binarization")))
    return f"bounds are from below, of {name.rstrip(',')}, for {comparison.pixels}"


def part_title(part: Comparison) -> str:
    return f"Bounds of {part.pixels}" if part.pixels else "Without a bound"


def about_test(comparison: Comparison) -> list[str]:
    """What the paired differences are, and what they are not."""
    if comparison.baseline is None or len(comparison.groups) < 2:
        return []
    compared = [group.against_baseline for group in comparison.groups if group.against_baseline]
    if not compared:
        return [
            f"No group has a draw (same split, same seed) in common with {comparison.baseline.name}: none is tested."
        ]
    tests = sum(test.p is not None for test in compared)
    title = METRICS[comparison.metric].title
    said = [
        f"Difference in {title} from {comparison.baseline.name}, over pairs of runs with the same split and seed: "
        "mean ± half of its 95 % interval, and the p-value of Student's paired test, then adjusted for "
        f"{counted(tests, 'test')} (Holm); the intervals are not adjusted."
    ]
    if not comparison.baseline_is_chosen:
        said.append(
            "The baseline is the best of these groups on the same numbers, which flatters it: differences look larger, "
            "and p-values smaller, than for a baseline named beforehand with --baseline."
        )
    return said


def conditions(comparison: Comparison) -> list[str]:
    """Device, precision, commit and versions of the finished runs, with counts where they differ."""
    runs = [run for group in comparison.groups for run in group.runs]
    lines = []
    for title, key in (("device", "device"), ("precision", "precision"), ("git commit", "git_commit")):
        lines.append(f"{title}: {tally([run.facts.get(key) or 'not known' for run in runs])}")
    lines.append(f"data: {tally([run.config.get('data.name', 'not known') for run in runs])}")
    packages = list(dict.fromkeys(name for run in runs for name in run.facts.get("versions", {})))
    for name in packages:
        lines.append(f"{name}: {tally([run.facts.get('versions', {}).get(name, 'not known') for run in runs])}")
    return lines if runs else []


def tally(values: Sequence[object]) -> str:
    count = Counter(map(str, values))
    return ", ".join(value if len(count) == 1 else f"{value} ({n})" for value, n in count.most_common())


def unfinished_rows(comparison: Comparison) -> list[list[str]]:
    """Group, folder, steps done of those asked for, the last validation values, and the log's last line."""
    rows = []
    for name, run in comparison.unfinished:
        values = [optional(run.values.get(key), METRICS[key]) for key in ("val_accuracy", "val_bound")]
        steps = f"{run.steps} of {run.config.get('train.steps')}"
        rows.append([name, str(run.folder), steps, *values, run.last_words or DASH])
    return rows


UNFINISHED = ["group", "folder", "steps", "val accuracy", "val bound", "the log's last line"]
UNFINISHED_SAID = "Without result.json (killed, failed, or still running), and in no mean above; last values"


# ---- the terminal, Markdown and CSV ----


def quality_table(
    comparison: Comparison, names: Sequence[str], groups: Sequence[Group] | None = None
) -> list[list[str]]:
    """A row a group, of all or of `groups`, with the standard deviation of the metric that sorts."""
    rows = [["", "group", "n"]]
    for name in names:
        rows[0] += [METRICS[name].title, *(["sd"] if name == comparison.metric else [])]
    for group in comparison.groups if groups is None else groups:
        row = [str(comparison.groups.index(group) + 1), group.name, str(len(group.runs))]
        for name in names:
            summary = group.summaries.get(name)
            row.append(plus_minus(summary, METRICS[name], len(group.runs)))
            if name == comparison.metric:
                row.append(optional(summary.sd if summary else None, METRICS[name]))
        rows.append(row)
    return rows


def test_table(comparison: Comparison) -> list[list[str]]:
    rows = [["", "group", "pairs", "difference", "p", "p, Holm"]]
    metric = METRICS[comparison.metric]
    for place, group in enumerate(comparison.groups, 1):
        test = group.against_baseline
        if group is comparison.baseline:
            continue
        if test is None:
            reason = "no shared draws" if comparison.metric in group.summaries else f"no {metric.title}"
            rows.append([str(place), group.name, "0", reason, DASH, DASH])
            continue
        mean, half = f"{test.difference.mean:+{metric.form}}", optional(test.difference.half, metric)
        p_values = [p_value(p) or DASH for p in (test.p, test.p_holm)]
        rows.append([str(place), group.name, str(test.difference.n), f"{mean} ± {half}", *p_values])
    return rows


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Names at the left, numbers at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def text_tables(comparison: Comparison) -> list[str]:
    quality, cost = quality_and_cost(comparison)
    blocks = [headline(comparison), aligned(quality_table(comparison, quality))]
    if cost:
        blocks.append(aligned(quality_table(comparison, cost)))
    blocks.append(fill(explained(comparison), 118))
    if said := about_test(comparison):
        blocks += ["\n".join(fill(sentence, 118) for sentence in said), aligned(test_table(comparison))]
    return blocks


def as_text(comparison: Comparison) -> str:
    blocks = []
    if not comparison.groups:
        blocks.append("no finished run")
    elif comparison.parts and comparison.ranks_pixels:
        blocks.append(headline(comparison) + ", ranked apart for each kind of pixels")
        for part in comparison.parts:
            blocks += [f"== {part_title(part)} ==", *text_tables(part)]
    else:
        blocks += text_tables(comparison)
        for part in comparison.parts:
            table = aligned(quality_table(comparison, pixel_columns(part), part.groups))
            blocks += [f"== {part_title(part)}, not ranked ==", table, fill(about_pixels(part), 118)]
    if comparison.unfinished:
        lines = [
            f"{folder} ({name}): {steps} steps, val accuracy {accuracy}, val bound {bound}\n    {words}"
            for name, folder, steps, accuracy, bound, words in unfinished_rows(comparison)
        ]
        blocks.append("\n".join([f"{UNFINISHED_SAID}:", *lines]))
    if comparison.notes:
        blocks.append("\n".join(fill(f"note: {note}", 118) for note in comparison.notes))
    return "\n\n".join(blocks)


def markdown_groups(comparison: Comparison, names: Sequence[str], groups: Sequence[Group]) -> str:
    rows = [["", "group", "n", *(METRICS[name].title for name in names)]]
    for group in groups:
        cells = []
        for name in names:
            summary = group.summaries.get(name)
            sd = f" ({optional(summary.sd, METRICS[name])})" if summary else ""
            cells.append(plus_minus(summary, METRICS[name], len(group.runs)) + sd)
        rows.append([str(comparison.groups.index(group) + 1), f"`{group.name}`", str(len(group.runs)), *cells])
    return markdown_table(rows)


def markdown_tables(comparison: Comparison) -> list[str]:
    said = explained(comparison)
    blocks = [f"{headline(comparison)}. {said[0].upper()}{said[1:]}; sd in brackets."]
    blocks.append(markdown_groups(comparison, columns(comparison), comparison.groups))
    if tested := about_test(comparison):
        blocks += [" ".join(tested), markdown_table(test_table(comparison))]
    if any(len(group.runs) > 1 for group in comparison.groups):
        blocks += ["Every run:", markdown_table(run_table(comparison, columns(comparison)))]
    return blocks


def as_markdown(comparison: Comparison) -> str:
    blocks = ["# Comparison of runs"]
    if comparison.groups and not (comparison.parts and comparison.ranks_pixels):
        blocks += markdown_tables(comparison)
    for part in comparison.parts:
        blocks.append(f"## {part_title(part)}")
        if comparison.ranks_pixels:
            blocks += markdown_tables(part)
        else:
            names = pixel_columns(part)
            blocks += [markdown_groups(comparison, names, part.groups), f"Not ranked; {about_pixels(part)}."]
            if any(len(group.runs) > 1 for group in part.groups):
                blocks.append(markdown_table(run_table(part, names)))
    if comparison.unfinished:
        blocks += [f"{UNFINISHED_SAID}:", markdown_table([UNFINISHED, *unfinished_rows(comparison)])]
    if comparison.notes:
        blocks.append("\n".join(f"- {note}" for note in comparison.notes))
    if lines := conditions(comparison):
        blocks.append("\n".join(f"- {line}" for line in lines))
    return "\n\n".join(blocks) + "\n"


def run_table(comparison: Comparison, names: Sequence[str]) -> list[list[str]]:
    """Every run that counts, by group and draw, so that a published mean shows what it is the mean of."""
    table = [["", "group", "split_seed", "seed", *(METRICS[name].title for name in names)]]
    for place, group in enumerate(comparison.groups, 1):
        rows = []
        for run in group.runs:
            draw = [str(run.config.get(key, DASH)) for key in ("data.split_seed", "seed")]
            rows.append([*draw, *(optional(run.values.get(name), METRICS[name]) for name in names)])
        rows.sort(key=lambda row: [seed.rjust(20) for seed in row[:2]])  # 2 before 10
        table += [[str(place), f"`{group.name}`", *row] for row in rows]
    return table


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def as_csv(comparison: Comparison) -> str:
    """A row a run, those in the means first, values as they were stored."""
    counted = [(group.name, run) for group in comparison.groups for run in group.runs]
    facts = ("device", "precision", "git_commit", "split_hash", "start_step")
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["group", "folder", "status", "steps", "seed", "split_seed", *METRICS, "pixels", *facts, "command"])
    rows = [(*row, "counted") for row in counted] + [(*row, "repeat") for row in comparison.repeats]
    for name, run, status in [*rows, *((*row, "unfinished") for row in comparison.unfinished)]:
        values = [repr(run.values[metric]) if metric in run.values else "" for metric in METRICS]
        seeds = [run.config.get("seed", ""), run.config.get("data.split_seed", "")]
        known = [run.facts.get(fact, "") for fact in facts]
        steps = "" if "method" in run.facts else run.steps
        writer.writerow([name, run.folder, status, steps, *seeds, *values, run.pixels, *known, command(run)])
    return file.getvalue()


def command(run: Record) -> str:
    """What repeats a run; empty where it has no record of that."""
    if not run.overrides and not run.choices:
        return ""
    method = run.facts.get("method")
    script = ["python", "-m", "scripts.baselines", "--methods", str(method)] if method else ["train.py"]
    flags = [word for path in run.config_dir for word in ("--config-dir", path)]
    return shlex.join(["uv", "run", *script, *flags, *run.overrides])


# ---- the page ----


def best_run(comparison: Comparison) -> Record | None:
    runs = [run for group in comparison.groups for run in group.runs if comparison.metric in run.counted]
    return min(runs, key=lambda run: rank(Summary(1, run.values[comparison.metric]), comparison.metric), default=None)


def pictures(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The last picture under each tag, as a PNG, with its step; none where the events cannot be read."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from training.run_folder import events_folder

    events = EventAccumulator(
        str(events_folder(folder) or folder), size_guidance={"scalars": 1, "images": 1, "tensors": 1}
    )
    try:
        events.Reload()
        last = {tag_: events.Images(tag_)[-1] for tag_ in events.Tags()["images"]}
    except Exception:  # said already, when its scalars were read
        return {}
    return {tag_: (image.encoded_image_string, image.step) for tag_, image in last.items()}


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
    ranked = comparison.parts if comparison.parts and comparison.ranks_pixels else [comparison]
    if ranked is comparison.parts:
        results = [(part.pixels or part_title(part), results_sections(part)) for part in ranked]
    else:
        bounds = [(part_title(part), bounds_section(comparison, part)) for part in comparison.parts]
        first, *others = results_sections(comparison)
        results = [("", [first, *bounds, *others])]
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
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def results_sections(comparison: Comparison) -> list[tuple[str, str]]:
    return [
        ("Groups", groups_section(comparison)),
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
    best = comparison.groups[0]
    metric, summary = METRICS[comparison.metric], best.summaries.get(comparison.metric)
    said = f"{headline(comparison)}."
    if comparison.parts and comparison.ranks_pixels:
        return f"{said} They are ranked apart for each kind of pixels."
    if summary is None or len(comparison.groups) < 2:
        return said
    half = "" if summary.half is None else f" ± {number(summary.half, metric.form)}"
    return f"{said} On top: {best.name}, with {number(summary.mean, metric.form)}{half} ({counted(summary.n, 'run')})."


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
    return content + (key(comparison) if in_one_figure else "") + paragraph(said, "caption")


def cost_section(comparison: Comparison) -> str:
    figures = [figure for cost in ("evaluations", "seconds") if (figure := against(comparison, cost))]
    costs = quality_and_cost(comparison)[1]
    if not costs:
        return ""
    said = (
        "Dots are means of a group; those that would hide each other are moved sideways. Calls of the generator are "
        "per unlabelled image and step, and depend on no machine; seconds are those of the runs, and tell of whatever "
        "else the machine did at the time."
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
    better = "right" if METRICS[comparison.metric].higher_is_better else "left"
    figure = tag("figure", drawn) + paragraph(
        f"To the {better} of the line is better than the baseline. An arrowhead: the interval goes further. "
        "p is adjusted for the number of tests.",
        "caption",
    )
    return said + (figure if drawn else "") + html_table(head[1:], cells)


def pictures_section(comparison: Comparison) -> str:
    best = best_run(comparison)
    found = pictures(best.folder) if best else {}
    if best is None or not found:
        return ""
    metric = METRICS[comparison.metric]
    said = {
        "reconstructions": "Held-out images, and below each what the model makes of it.",
        "generated": "Generated images: a row is a class, a column a style.",
    }
    parts = [paragraph(f"{best.folder}: {metric.title} {number(best.values[comparison.metric], metric.form)}")]
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
