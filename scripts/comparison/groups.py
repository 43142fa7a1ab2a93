"""Groups of runs by what differs in their configurations, and how they compare."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from configs.schema import ConfigError
from scripts.comparison.naming import Naming, differing, value_of
from scripts.comparison.runs import METRICS, Record
from scripts.comparison.statistics import Paired, Summary, holm, paired, summarize

ON_TEST_DATA = {
    "val_accuracy": "test_accuracy",
    "val_bound": "test_bound",
    "val_log_likelihood": "test_log_likelihood",
}


@dataclass
class Group:
    """Runs that differ in nothing but their draws."""

    name: str
    runs: list[Record]
    summaries: dict[str, Summary] = field(default_factory=dict)
    against_baseline: Paired | None = None

    @property
    def data(self) -> str:
        return self.runs[0].data

    @property
    def pixels(self) -> str:
        """What its bounds are about; empty where it has none."""
        has_any = any(METRICS[name].of_pixels for name in self.summaries)
        return self.runs[0].pixels if has_any else ""


@dataclass
class Comparison:
    """All that the reports show, best group first."""

    metric: str
    groups: list[Group]
    baseline: Group | None
    baseline_is_chosen: bool  # by a person, before looking
    unfinished: list[tuple[str, Record]]  # with the name of the group that each would be in
    repeats: list[tuple[str, Record]]  # finished, and in no mean
    notes: list[str]
    pixels: str = ""  # what the bounds are about; empty where that differs
    data: str = ""  # of a part that is ranked apart: what its groups have in common
    kind: str = ""  # likewise: whether its models tell classes
    parts: list[Comparison] = field(
        default_factory=list
    )  # one for each kind of pixels or data, where there are several
    apart: str = ""  # what the parts differ in if each has a ranking of its own; empty where the whole has one

    @property
    def reported(self) -> str:
        """The metric of what was chosen: where validation data choose, that of test data, on which nothing is chosen.

        Not where the baseline, or all others, left test data for later.
        """
        test = ON_TEST_DATA.get(self.metric, self.metric)
        measured = [group for group in self.groups if test in group.summaries]
        has_enough = len(measured) >= min(2, len(self.groups)) and (self.baseline is None or self.baseline in measured)
        return test if has_enough else self.metric


# ---- grouping ----


def make_groups(records: Sequence[Record]) -> list[Group]:
    """Groups, named by what makes them differ."""
    keys = differing(records)
    by_value: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        by_value.setdefault(tuple(value_of(record, key) for key in keys), []).append(record)
    naming = Naming(records, keys)
    return [Group(naming.name(runs[0]), runs) for runs in by_value.values()]


def name_beside(record: Record, groups: Sequence[Group], records: Sequence[Record]) -> str:
    """The name of the group that an unfinished run would be in, or one that tells it from all other runs."""
    for group in groups:
        if not differing([record, group.runs[0]]):
            return group.name
    return Naming(records, differing(records)).name(record)


# ---- comparing ----


def compare(
    records: Sequence[Record], notes: Sequence[str], metric: str | None = None, baseline: str | None = None
) -> Comparison:
    """Groups with their summaries, best first, and their differences from the baseline. Raises ConfigError.

    By val accuracy, where no metric is given: test data are not what anything is chosen by. Models that tell no classes
    are ranked apart from those that do, by log p(x) or the bound of validation images.
    """
    said = list(notes)
    groups = make_groups([record for record in records if record.finished])
    unfinished = [(name_beside(record, groups, records), record) for record in records if not record.finished]
    repeats = [(group.name, run) for group in groups for run in _take_out_repeats(group)]
    said += [f"{run.folder} repeats another run of {name} with the same draw, and is left out" for name, run in repeats]
    sides = [(metric, "", groups)] if metric else _sides(groups)
    for *_, side in sides:
        said += _exclude_what_is_not_comparable([run for group in side for run in group.runs])
    for group in groups:
        values = {name: [run.counted[name] for run in group.runs if name in run.counted] for name in METRICS}
        group.summaries = {name: s for name, numbers in values.items() if (s := summarize(numbers))}
        group.runs.sort(key=lambda run: (run.config.get("data.split_seed", 0), run.config.get("seed", 0)))
    ranked = [_sorted(side, given or _metric_of(side, said)) for given, _, side in sides]
    named = None if baseline is None else _named(baseline, [group for _, side in ranked for group in side])
    compared = [_compared(side, by, named, said) for by, side in ranked]
    whole = compared[0]
    if len(sides) > 1:
        parts = []
        for (_, kind, _), one in zip(sides, compared, strict=True):
            for part in one.parts if one.apart else [one]:
                part.kind = kind
                parts.append(part)
        every = [group for part in parts for group in part.groups]
        whole = Comparison(parts[0].metric, every, named, baseline is not None, [], [], [], parts=parts)
        whole.apart = "kind of model"
        said.append(APART_BY_MODEL)
    several = [SEVERAL_PIXELS] if len(_kinds(whole.groups)) > 1 else []
    if any("val_accuracy" in group.summaries for group in whole.groups):
        several = [note + BY_ACCURACY for note in several]
    whole.unfinished, whole.repeats = unfinished, repeats
    whole.notes = [*several, *said]
    return whole


WITH_CLASSES, WITHOUT_CLASSES = "Models that tell classes", "Models without classes"
APART_BY_MODEL = (
    "models that tell classes are ranked by accuracy, and apart from them those that tell none, by their bound or "
    "log p(x); --metric val_bound, or another number that all have, ranks them together"
)


def _sides(groups: list[Group]) -> list[tuple[str | None, str, list[Group]]]:
    """All groups, or those whose models tell classes and those that have a bound alone; what each side is called."""
    without = [group for group in groups if all(not run.tells_classes and run.has_bound for run in group.runs)]
    others = [group for group in groups if group not in without]
    if not without or not others:
        return [(None, "", groups)]
    return [(None, WITH_CLASSES, others), (None, WITHOUT_CLASSES, without)]


def _metric_of(groups: Sequence[Group], said: list[str], of: str = "") -> str:
    """What sorts, where no metric is given; adds a sentence to `said` where that is of test data, with ` of ...`."""

    def have(name: str) -> list[bool]:
        return [name in group.summaries for group in groups]

    if not groups or any(have("val_accuracy")):
        return "val_accuracy"
    if any(have("test_accuracy")):
        said.append(f"no run{of} has validation images: test accuracy sorts, which flatters what is on top")
        return "test_accuracy"
    if all(have("val_log_likelihood")):
        return "val_log_likelihood"
    if any(have("val_bound")):
        return "val_bound"
    name = "test_log_likelihood" if all(have("test_log_likelihood")) else "test_bound"
    if any(have(name)):
        said.append(f"no run{of} has validation images: {METRICS[name].title} sorts, which flatters what is on top")
    return name


def _sorted(groups: list[Group], metric: str) -> tuple[str, list[Group]]:
    """The metric, and the groups, best first. Raises ConfigError for a metric that none has."""
    if groups and not any(metric in group.summaries for group in groups):
        raise ConfigError(f"--metric must be one that a finished run has, got {metric}; none of these runs has it")
    return metric, sorted(groups, key=lambda group: rank(group.summaries.get(metric), metric))


def _compared(groups: list[Group], metric: str, named: Group | None, said: list[str]) -> Comparison:
    """Groups, which are sorted by a metric, and their differences from the one that is named, or the best.

    Adds a sentence to `said` for parts that have to be sorted by another metric, if that is of test data.
    """
    chosen = named is not None and named in groups
    base = named if chosen else next(iter(groups), None)
    compared = Comparison(metric, groups, base, chosen, [], [], [])
    kinds, data = _kinds(groups), sorted({group.data for group in groups})
    if METRICS[metric].of_pixels and len(kinds) > 1:
        compared.apart = "kind of pixels"
        compared.parts = [
            _ranked(compared, [group for group in groups if group.pixels == kind], said)
            for kind in (*kinds, *([""] if any(not group.pixels for group in groups) else []))
        ]
    elif len(data) > 1:
        compared.apart = "data set"
        compared.parts = [
            _ranked(compared, [group for group in groups if group.data == name], said, name) for name in data
        ]
    if compared.apart:
        compared.groups = [group for part in compared.parts for group in part.groups]
    else:
        _finish(compared)
    return compared


def _kinds(groups: Sequence[Group]) -> list[str]:
    """What bounds of these groups are about, in no order of merit."""
    return sorted({group.pixels for group in groups if group.pixels})


def _ranked(whole: Comparison, groups: list[Group], said: list[str], data: str = "") -> Comparison:
    """Some of the groups, with a baseline and a ranking of their own: by another metric if none has the whole's."""
    metric = whole.metric
    if not any(metric in group.summaries for group in groups):
        metric = _metric_of(groups, said, f" of {data or groups[0].pixels or 'those without a bound'}")
        groups = sorted(groups, key=lambda group: rank(group.summaries.get(metric), metric))
    chosen = whole.baseline_is_chosen and whole.baseline in groups
    part = Comparison(metric, groups, whole.baseline if chosen else groups[0], chosen, [], [], [], data=data)
    _finish(part)
    return part


def _finish(comparison: Comparison) -> None:
    """Tests the groups against the baseline; bounds of several kinds of pixels are put into parts, not ranked."""
    kinds = _kinds(comparison.groups)
    if len(kinds) > 1:
        of_kind = {kind: [group for group in comparison.groups if group.pixels == kind] for kind in kinds}
        comparison.parts = [
            Comparison(comparison.metric, groups, None, False, [], [], [], kind) for kind, groups in of_kind.items()
        ]
    else:
        comparison.pixels = max(kinds, default="")
    if comparison.baseline is not None:
        _test(comparison)


SEVERAL_PIXELS = (
    "bounds, log p(x) and bits per dimension of other data, other treatments of pixels (data.binarization), another "
    "likelihood or halves of images are numbers about different things: they are in tables of their own, and neither "
    "ranked nor subtracted across them"
)
BY_ACCURACY = "; a likelihood is chosen by val accuracy"


def rank(summary: Summary | None, metric: str) -> float:
    """Smaller is better; without a value last."""
    if summary is None:
        return math.inf
    return -summary.mean if METRICS[metric].higher_is_better else summary.mean


def _named(name: str, groups: Sequence[Group]) -> Group:
    for group in groups:
        if group.name == name:
            return group
    names = ", ".join(f"'{group.name}'" for group in groups) or "no finished run"
    raise ConfigError(f"--baseline must be one of {names}; got '{name}'")


def _test(comparison: Comparison) -> None:
    """The groups' differences from the baseline, in what is reported."""
    metric, groups, baseline = comparison.reported, comparison.groups, comparison.baseline
    assert baseline is not None

    def by_draw(group: Group) -> dict[object, float]:
        return {run.draw: run.counted[metric] for run in group.runs if metric in run.counted}

    for group in groups:
        group.against_baseline = None if group is baseline else paired(by_draw(group), by_draw(baseline))
    tested = [group.against_baseline for group in groups if group.against_baseline]
    with_p = [(test, test.p) for test in tested if test.p is not None]
    adjusted = holm([p for _, p in with_p])
    for group in groups:
        for (test, p), p_holm in zip(with_p, adjusted, strict=True):
            if group.against_baseline is test:
                group.against_baseline = Paired(test.difference, p, p_holm)


def _take_out_repeats(group: Group) -> list[Record]:
    """Leaves the newest of runs with the same draw, and returns the others: a repeat is no new evidence."""
    newest: dict[object, Record] = {}
    for run in sorted(group.runs, key=lambda run: (run.folder / "result.json").stat().st_mtime):
        newest[run.draw] = run
    repeats = [run for run in group.runs if newest[run.draw] is not run]
    group.runs = [run for run in group.runs if newest[run.draw] is run]
    return repeats


NUMBERS_OF_SAMPLES = {
    "test_log_likelihood": "evaluation.importance_samples",
    "val_log_likelihood": "evaluation.validation_samples",
}


def _exclude_what_is_not_comparable(runs: Sequence[Record]) -> list[str]:
    """Values that are not finite, log p(x) by other importance samples than most of its pixels, resumed clocks."""
    said = []
    for run in runs:
        for name in [name for name, value in run.values.items() if not math.isfinite(value)]:
            run.excluded.add(name)
            said.append(f"{METRICS[name].title} of {run.folder} is {run.values[name]}, and is left out")
    kinds = dict.fromkeys(run.pixels for run in runs)
    for pixels, (name, key) in itertools.product(kinds, NUMBERS_OF_SAMPLES.items()):
        alike = [run for run in runs if run.pixels == pixels and name in run.counted]
        counts = Counter(run.config[key] for run in alike if key in run.config)
        if len(counts) < 2:
            continue
        most = max(counts, key=lambda samples: (counts[samples], samples))
        others = [run for run in alike if run.config.get(key) != most]
        for run in others:
            run.excluded.add(name)
        said.append(
            f"{METRICS[name].title}{f' of {pixels}' if len(kinds) > 1 else ''} is of the {counts[most]} runs with "
            f"{key}={most}; {len(others)} with another are left out"
        )
    if left := [run for run in runs if "test_n" in run.facts and run.facts["test_n"] is None]:
        said.append(
            f"{len(left)} of {len(runs)} runs have left test data for later (evaluation.test=false); of one that is "
            "chosen, resume=FOLDER evaluation.test=true adds them to its result"
        )
    resumed = [run for run in runs if run.facts.get("start_step")]
    for run in resumed:
        run.excluded.add("seconds")
    if resumed:
        said.append(f"seconds leave out resumed runs ({len(resumed)}), whose clock began at the resume")
    return said
