"""In what runs differ, and what that has them called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from configs.wording import shown
from scripts.comparison.runs import Record

REPLICATES = {"seed", "data.split_seed"}


def no_effect() -> set[str]:
    """Keys that make no group: those a resume may change, but for train.steps and how images are classified."""
    from training.state import FREE_TO_CHANGE

    return (FREE_TO_CHANGE - {"train.steps", "evaluation.pixel_draws", "evaluation.classify_by"}) | REPLICATES


def differing(records: Sequence[Record]) -> list[str]:
    """The keys that make groups: those that the runs differ in, in the configuration's order."""
    ignored = no_effect()
    keys = list(dict.fromkeys(key for record in records for key in record.config))
    sections = {id(record): {_section(key) for key in record.config} for record in records}
    return [
        key
        for key in keys
        if key not in ignored
        and not all(key in record.derived for record in records if key in record.config)
        and len({value_of(r, key) for r in records if _section(key) in sections[id(r)] and not _is_unknown(r, key)}) > 1
    ]


def _section(key: str) -> str:
    """A run without any key of a section, as a nearest neighbour is without a model, does not differ in it."""
    return key.partition(".")[0]


def _is_unknown(record: Record, key: str) -> bool:
    """Whether it is left to the machine, which an unfinished run does not tell."""
    return key in ("device", "precision") and record.config.get(key) == "auto"


def value_of(record: Record, key: str) -> str:
    """A value of a configuration as text: two runs with the same text do not differ in it."""
    value = record.config.get(key, "")
    return f"{value:.10g}" if isinstance(value, float) else shown(value)


class Naming:
    """Names runs by the choices of Hydra's groups and the keys in which they differ.

    What comes along with a choice is not named: a key below a group whose choice differs is, only if it differs between
    runs of the same choice.
    """

    def __init__(self, records: Sequence[Record], keys: Sequence[str]) -> None:
        self.records = records
        known = list(dict.fromkeys(["estimator", *(group for record in records for group in record.choices)]))
        # a choice without a section of its own, such as a preset, is told by the keys it sets
        groups = [
            group
            for group in known
            if any(key.startswith(f"{package(group)}.") for key in keys) and self._varies(group)
        ]
        self.groups = sorted(groups, key=lambda group: package(group).count("."))
        self.keys = list(keys)
        self.short = self._short_names()

    def _varies(self, group: str) -> bool:
        return len({choice(record, group) for record in self.records}) > 1

    def _covers(self, aspect: str) -> list[str]:
        """The groups that `aspect`, a group or a key, comes along with; for a key also those beside it."""
        path = package(aspect)
        above = [group for group in self.groups if path.startswith(f"{package(group)}.")]
        if aspect in self.groups:
            return above
        return [g for g in self.groups if any(f"{package(g)}.".startswith(f"{package(a)}.") for a in above)]

    def _value(self, record: Record, aspect: str) -> str | None:
        return choice(record, aspect) if aspect in self.groups else value_of(record, aspect)

    def _is_named(self, record: Record, aspect: str) -> bool:
        covers = self._covers(aspect)
        alike = [
            other for other in self.records if all(choice(other, cover) == choice(record, cover) for cover in covers)
        ]
        return len({self._value(other, aspect) for other in alike}) > 1

    def _short_names(self) -> dict[str, str]:
        """Keys without their first section, where that is clear."""
        aspects = [*self.groups, *self.keys]
        ends = {aspect: package(aspect).partition(".")[2] or package(aspect) for aspect in aspects}
        count = Counter(ends.values())
        return {aspect: end if count[end] == 1 else package(aspect) for aspect, end in ends.items()}

    def name(self, record: Record) -> str:
        """Such as `score_function/learned lr=0.001`: the estimator without a key, all else with one."""
        named = [aspect for aspect in [*self.groups, *self.keys] if self._is_named(record, aspect)]
        parts, head = [], ""
        for aspect in named:
            value = self._value(record, aspect)
            if value in (None, ""):
                continue
            if aspect == "estimator":
                head = str(value)
            elif aspect == "estimator/baseline" and head:
                head += f"/{value}"
            else:
                parts.append(f"{self.short[aspect]}={value}")
        return " ".join([head, *parts] if head else parts) or choice(record, "estimator") or "all"


def package(aspect: str) -> str:
    """The section that a group's choice fills; of a key, itself: schedule@estimator.temperature, estimator/baseline."""
    return aspect.rpartition("@")[2].replace("/", ".")


def choice(record: Record, group: str) -> str | None:
    """What a run has of a group; without a record of it, the class that its section names."""
    if group in record.choices:
        return record.choices[group]
    target = record.config.get(f"{package(group)}._target_")
    return str(target).rpartition(".")[2] if target else None
