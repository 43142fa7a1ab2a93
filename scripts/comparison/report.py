"""What scripts.compare says: tables for the terminal and in Markdown, and a CSV file of runs."""

from __future__ import annotations

import csv
import io
import shlex
from collections import Counter
from collections.abc import Sequence
from textwrap import fill

from scripts.comparison.figures import p_value
from scripts.comparison.groups import Comparison, Group
from scripts.comparison.runs import METRICS, Metric, Record
from scripts.comparison.statistics import Summary
from training.resume import has_own_code, own_path

DASH = "–"
COSTS = ("evaluations", "seconds", "steps_per_second")


def columns(comparison: Comparison) -> list[str]:
    """The metrics to show: the one that sorts, what is reported of it, and the others that any group has."""
    first = [comparison.metric, comparison.reported]
    hidden = (*first, "val_bound", "val_log_likelihood")
    wanted = [*dict.fromkeys(first), *(name for name in METRICS if name not in hidden)]
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
    said = f"{counted(runs, 'finished run')} in {counted(len(comparison.groups), 'group')}"
    is_ranked = any(comparison.metric in group.summaries for group in comparison.groups)
    if not is_ranked or (comparison.apart and len({part.metric for part in comparison.parts}) > 1):
        return said
    return f"{said}, {better} {METRICS[comparison.metric].title} first"


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
    name = next(g.runs[0].evidence for g in comparison.groups if g.pixels == comparison.pixels)
    return f"bounds are from below, of {name}, for {comparison.pixels.removesuffix(f', {name}')}"


def part_title(part: Comparison) -> str:
    """What the groups of a part have in common."""
    own = part.data or (f"Bounds of {part.pixels}" if part.pixels else "Without a bound")
    return ": ".join(filter(None, [part.kind, own]))


def choice(comparison: Comparison) -> str:
    """Which group is best, by what, and what is reported of it."""
    best = comparison.groups[0]
    by, reported = METRICS[comparison.metric], METRICS[comparison.reported]
    chosen, measured = best.summaries.get(comparison.metric), best.summaries.get(comparison.reported)
    if chosen is None or measured is None:
        return ""
    if by is not reported:
        same = [
            group.name
            for group in comparison.groups
            if group is not best and (one := group.summaries.get(comparison.metric)) and one.mean == chosen.mean
        ]
        tie = f" ({', '.join(same)} {'has' if len(same) == 1 else 'have'} the same)" if same else ""
        return (
            f"Chosen by {by.title}: {best.name}{tie}; its {reported.title}, on which nothing was chosen, is "
            f"{plus_minus(measured, reported, measured.n)} ({counted(measured.n, 'run')})."
        )
    said = f"On top: {best.name}, with {by.title} {plus_minus(chosen, by, chosen.n)} ({counted(chosen.n, 'run')})."
    if comparison.metric.startswith("test_"):
        said += " It was chosen on that very number, which flatters it: validation data, the default, do not."
    return said


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
    title = METRICS[comparison.reported].title
    said = [
        f"Difference in {title} from {comparison.baseline.name}, over pairs of runs with the same split and seed: "
        "mean ± half of its 95 % interval, and the p-value of Student's paired test, then adjusted for "
        f"{counted(tests, 'test')} (Holm); the intervals are not adjusted."
    ]
    if not comparison.baseline_is_chosen and comparison.reported == comparison.metric:
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
    """A row a group, of all or of `groups`, with standard deviations of what sorts and what is reported."""
    with_sd = (comparison.metric, comparison.reported)
    rows = [["", "group", "n"]]
    for name in names:
        rows[0] += [METRICS[name].title, *(["sd"] if name in with_sd else [])]
    for group in comparison.groups if groups is None else groups:
        row = [str(comparison.groups.index(group) + 1), group.name, str(len(group.runs))]
        for name in names:
            summary = group.summaries.get(name)
            row.append(plus_minus(summary, METRICS[name], len(group.runs)))
            if name in with_sd:
                row.append(optional(summary.sd if summary else None, METRICS[name]))
        rows.append(row)
    return rows


def test_table(comparison: Comparison) -> list[list[str]]:
    rows = [["", "group", "pairs", "difference", "p", "p, Holm"]]
    metric = METRICS[comparison.reported]
    for place, group in enumerate(comparison.groups, 1):
        test = group.against_baseline
        if group is comparison.baseline:
            continue
        if test is None:
            reason = "no shared draws" if comparison.reported in group.summaries else f"no {metric.title}"
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
    blocks += [fill(explained(comparison), 118), *([fill(chosen, 118)] if (chosen := choice(comparison)) else [])]
    if said := about_test(comparison):
        blocks += ["\n".join(fill(sentence, 118) for sentence in said), aligned(test_table(comparison))]
    for part in comparison.parts:
        table = aligned(quality_table(comparison, pixel_columns(part), part.groups))
        blocks += [f"== {part_title(part)}, not ranked ==", table, fill(about_pixels(part), 118)]
    return blocks


def as_text(comparison: Comparison) -> str:
    blocks = []
    if not comparison.groups:
        blocks.append("no finished run")
    elif comparison.apart:
        blocks.append(f"{headline(comparison)}, ranked apart for each {comparison.apart}")
        for part in comparison.parts:
            blocks += [f"== {part_title(part)} ==", *text_tables(part)]
    else:
        blocks += text_tables(comparison)
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
    blocks += [chosen] if (chosen := choice(comparison)) else []
    if tested := about_test(comparison):
        blocks += [" ".join(tested), markdown_table(test_table(comparison))]
    if any(len(group.runs) > 1 for group in comparison.groups):
        blocks += ["Every run:", markdown_table(run_table(comparison, columns(comparison)))]
    for part in comparison.parts:
        names = pixel_columns(part)
        blocks += [f"## {part_title(part)}", markdown_groups(comparison, names, part.groups)]
        blocks.append(f"Not ranked; {about_pixels(part)}.")
        if any(len(group.runs) > 1 for group in part.groups):
            blocks.append(markdown_table(run_table(part, names)))
    return blocks


def as_markdown(comparison: Comparison) -> str:
    blocks = ["# Comparison of runs"]
    for part in comparison.parts if comparison.apart else [comparison]:
        blocks += [f"## {part_title(part)}"] if comparison.apart else []
        blocks += markdown_tables(part) if part.groups else []
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
            rows.append([*draw, *(optional(run.counted.get(name), METRICS[name]) for name in names)])
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
    words = [*flags, *run.overrides]
    return (own_path() if has_own_code(words) else "") + shlex.join(["uv", "run", *script, *words])
