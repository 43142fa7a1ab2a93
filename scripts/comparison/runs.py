"""The runs that scripts.compare finds: what they were asked for, what they came to, and what is damaged."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from configs.schema import Config, ConfigError, EvaluationConfig
from configs.wording import key_of, shown
from data.datasets import OWN
from data.progress import progress
from scripts.comparison.events import DamagedEvents, read_scalars

OVERRIDES = Path(".hydra", "overrides.yaml")


@dataclass(frozen=True)
class Metric:
    title: str
    form: str
    higher_is_better: bool
    unit: str = ""
    of_pixels: bool = False  # about the pixels as a run has them: no number to hold against that of other pixels


# under the names of result.json, and the generator's calls under that of TensorBoard
METRICS = {
    "test_accuracy": Metric("test accuracy", ".4f", True),
    "test_bound": Metric("test bound", ".2f", True, "nats", of_pixels=True),
    "test_log_likelihood": Metric("log p(x)", ".2f", True, "nats", of_pixels=True),
    "test_bits_per_dimension": Metric("bits per dimension", ".3f", False, of_pixels=True),
    "test_calibration_error": Metric("calibration error", ".4f", False),
    "val_accuracy": Metric("val accuracy", ".4f", True),
    "val_bound": Metric("val bound", ".2f", True, "nats", of_pixels=True),
    "val_log_likelihood": Metric("val log p(x)", ".2f", True, "nats", of_pixels=True),
    "evaluations": Metric("calls per image", ".3g", False),
    "seconds": Metric("seconds", ".1f", False),
    "steps_per_second": Metric("steps/s", ".1f", True),
}
ALONE = "classifier alone"  # the name of a run whose objective has no bound in it
DIGEST = "data.digest"  # of a person's own images, which their path does not tell
DATA = ("data.name", DIGEST)
PIXELS = (*DATA, "data.binarization", "likelihood")
CALLS = "estimator/evaluations"
CURVES = {"val_accuracy": "val/accuracy", "val_bound": "val/bound", "val_log_likelihood": "val/log_likelihood"}


class Damaged(Exception):
    """A run that cannot be used; the message says why."""


@dataclass
class Record:
    """What is known of a run. An unfinished one has no test values."""

    folder: Path
    finished: bool
    steps: int
    config: dict[str, Any]  # flat
    values: dict[str, float]
    facts: dict[str, Any]  # the rest of result.json: device, precision, git_commit, ...
    choices: dict[str, str] = field(default_factory=dict)  # of Hydra's groups
    overrides: list[str] = field(default_factory=list)
    config_dir: list[str] = field(default_factory=list)  # of configurations of a person's own
    derived: set[str] = field(default_factory=set)  # keys that follow others, as lr_factor.steps does train.steps
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    last_words: str = ""  # the log's
    excluded: set[str] = field(default_factory=set)  # values that would mislead in a mean

    @property
    def counted(self) -> dict[str, float]:
        """The values that go into means."""
        return {name: value for name, value in self.values.items() if name not in self.excluded}

    @property
    def draw(self) -> tuple[Any, Any]:
        """What pairs this run with those of other groups: the labelled images, and all other randomness."""
        return self.facts.get("split_hash"), self.config.get("seed")

    @property
    def data(self) -> str:
        """Which images it is about: accuracy on one data set says nothing of another's."""
        return ", ".join(f"{key}={self.config[key]}" for key in DATA if self.config.get(key) is not None)

    @property
    def pixels(self) -> str:
        """What its bounds are about. Those of other data, other pixels or another likelihood are other numbers."""
        parts = [f"{key}={self.config[key]}" for key in PIXELS if self.config.get(key) is not None]
        return ", ".join([*parts, *([self.evidence] if self.evidence != self._evidence_of_whole_images else [])])

    @property
    def evidence(self) -> str:
        """What its bounds bound, such as log p(x); by its configuration where it is not finished or from before."""
        return str(self.facts.get("log_likelihood_of") or self._evidence_of_whole_images)

    @property
    def _evidence_of_whole_images(self) -> str:
        from training.names import log_likelihood_name

        likelihood, binarization = (str(self.config.get(key)) for key in ("likelihood", "data.binarization"))
        return log_likelihood_name(likelihood, binarization).rstrip(",")

    @property
    def tells_classes(self) -> bool:
        return any(name in self.values for name in ("val_accuracy", "test_accuracy"))

    @property
    def has_bound(self) -> bool:
        return any(METRICS[name].of_pixels for name in self.values)


def find(folders: Sequence[Path]) -> list[Path]:
    """The run folders in `folders`, each once, in the order of their names. Raises ConfigError where there is none."""
    from training.checkpoints import stored

    found: dict[Path, Path] = {}
    for top in folders:
        if not top.is_dir():
            raise ConfigError(f"{top} is not a folder; give run folders, a sweep's folder, or a folder above some")
        runs, seen = [], set()
        for name, below, files in os.walk(top, followlinks=True):
            folder = Path(name)
            if (place := os.path.realpath(name)) in seen:  # by a link
                below.clear()
                continue
            seen.add(place)
            is_begun = "checkpoints" in below and ((folder / OVERRIDES).is_file() or stored(folder))
            if is_begun or "result.json" in files:
                runs.append(folder)
                below.clear()
            below[:] = sorted(other for other in below if not other.startswith("."))
        if not runs:
            needed = "a run folder has checkpoints/ with a checkpoint, or result.json"
            raise ConfigError(f"no run in {top}: {needed}")
        found |= {folder.resolve(): folder for folder in runs if folder.resolve() not in found}
    return list(found.values())


def read(folder: Path) -> Record:
    """A run, finished or not, without its events; of its configuration nothing is looked up. Raises Damaged."""
    record, asked = _finished(folder) if (folder / "result.json").exists() else _unfinished(folder)
    try:
        if asked or not (folder / OVERRIDES.parent).is_dir():
            _add_asked(record, asked)
        else:
            _add_asked(record, _from_hydra(record))
    except Exception as error:  # YAML and OmegaConf fail in many ways, and each means the same to a person
        raise Damaged(f"its {'result' if asked else '.hydra/'} cannot be read ({_reason(error)})") from error
    if digest := _digest(record):
        record.config[DIGEST] = digest
    return record


def _digest(record: Record) -> str:
    """The first letters of the digest of a person's own images, or else where they lay; empty for published ones."""
    from training.run_folder import SPLIT, read_json

    if record.config.get("data.name") != OWN:
        return ""
    try:
        return str(read_json(record.folder / SPLIT)["digest"])[:12]
    except (OSError, ValueError, KeyError, TypeError):
        return str(record.config.get("data.path"))


def _finished(folder: Path) -> tuple[Record, dict[str, Any]]:
    """A run that has a result, and what its command line asked for, if the result tells."""
    from training.run_folder import read_json

    try:
        result = read_json(folder / "result.json")
        config, steps = dict(result["config"]), int(result["steps"] or 0)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"its result.json cannot be read ({_reason(error)})") from error
    foreign = [
        key
        for key, kind in (("versions", dict), ("split_hash", str))
        if not isinstance(result.get(key), (kind, NoneType))
    ]
    if foreign:
        raise Damaged(f"its result.json is not one of a run: {foreign[0]} is {shown(result[foreign[0]])}")
    values = {name: float(result[name]) for name in METRICS if isinstance(result.get(name), (int, float))}
    facts = {key: value for key, value in result.items() if key not in METRICS and key != "config"}
    facts["versions"] = facts.get("versions") or {}
    if "method" in facts:  # of scripts.baselines; what the schema has besides is not its own
        return Record(folder, True, steps, config, values, facts), {}
    config |= {key: result[key] for key in ("device", "precision") if key in result}  # rather than auto
    return Record(folder, True, steps, _defaults() | config, values, facts), facts.pop("asked", {})


def _unfinished(folder: Path) -> tuple[Record, dict[str, Any]]:
    """A run that has none yet, as its newest checkpoint tells; without one that can be read, as .hydra/ does."""
    import torch

    from training.checkpoints import CheckpointError, load
    from training.state import flat

    try:
        state = load(folder, torch.device("cpu"))
        config, asked = flat(state["config"]), state.get("asked", {})
    except CheckpointError:
        config, asked = _written(folder, "config.yaml"), {}
        if not config:
            raise Damaged("it has no checkpoint and no .hydra/config.yaml that can be read") from None
        config = {key: _looked_up(value, config) for key, value in config.items()}
    except Exception as error:
        raise Damaged(f"its checkpoint has no configuration ({_reason(error)})") from error
    record = Record(folder, False, _steps_saved(folder), _defaults() | config, {}, {}, last_words=_last_words(folder))
    return record, asked


def _written(folder: Path, name: str) -> dict[str, Any]:
    """A file of .hydra/, flat and as it is written: nothing that it refers to is looked up; empty without one."""
    from omegaconf import OmegaConf

    from training.state import flat

    path = folder / ".hydra" / name
    return flat(OmegaConf.to_container(OmegaConf.load(path), resolve=False)) if path.is_file() else {}  # type: ignore[arg-type]


def _looked_up(value: Any, config: dict[str, Any]) -> Any:
    """The value of the key that a value refers to, as ${train.steps}; any other value is itself."""
    return config.get(value[2:-1], value) if isinstance(value, str) and value.startswith("${") else value


def _from_hydra(record: Record) -> dict[str, Any]:
    """What a run from before asked for, by .hydra/; nothing where another run has written that."""
    from omegaconf import OmegaConf

    from training.state import FREE_TO_CHANGE

    written, prefix = _written(record.folder, "config.yaml"), "hydra.runtime.choices."
    ignored = {"device", "precision", *FREE_TO_CHANGE}
    references = {key: str(value) for key, value in written.items() if str(value).startswith("${")}
    for key in written.keys() & record.config.keys() - ignored - references.keys():
        if written[key] != record.config[key]:
            return {}
    choices = {key: choice for key, choice in _written(record.folder, "hydra.yaml").items() if key.startswith(prefix)}
    overrides: Any = []
    if (record.folder / OVERRIDES).is_file():
        overrides = OmegaConf.to_container(OmegaConf.load(record.folder / OVERRIDES), resolve=False)
    return {
        "overrides": overrides,
        "choices": {key.removeprefix(prefix): choice for key, choice in choices.items()},
        "references": references,
    }


def _add_asked(record: Record, asked: dict[str, Any]) -> None:
    """The command line, the choices of groups and the derived keys, as far as a run tells."""
    record.config_dir = [str(path) for path in asked.get("config_dir", [])]
    later = {str(key): str(override) for key, override in asked.get("later", {}).items()}  # by resume
    first = (str(override) for override in asked.get("overrides", []))
    record.overrides = [*(one for one in first if key_of(one) not in later), *later.values()]
    record.choices = {
        str(group): str(choice)
        for group, choice in asked.get("choices", {}).items()
        if choice is not None and not str(group).startswith("hydra/")
    }
    record.derived = set(map(str, asked.get("references", {})))


@functools.cache
def _defaults() -> dict[str, Any]:
    """What the schema says of keys that runs from before do not have."""
    from omegaconf import OmegaConf

    from training.state import flat

    def of(section: type) -> Any:
        return OmegaConf.to_container(OmegaConf.structured(section), enum_to_str=True)

    schema = of(Config) | {"evaluation": of(EvaluationConfig)}  # a section that is "???"
    return {key: value for key, value in flat(schema).items() if value != "???"}


def _steps_saved(folder: Path) -> int:
    steps = [path.stem.partition("_")[2] for path in (folder / "checkpoints").glob("step_*.pt")]
    return max((int(step) for step in steps if step.isdecimal()), default=0)


def _last_words(folder: Path) -> str:
    """The last line of train.log, without date and level."""
    try:
        lines = (folder / "train.log").read_text(errors="replace").split("\n")
    except OSError:
        return ""
    last = next((line for line in reversed(lines) if line.strip()), "")
    words = last.split(" ", 3)
    return words[3] if len(words) == 4 and words[2].isupper() else last


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0]}"


def read_events(record: Record) -> None:
    """Adds curves and the generator's calls, and of an unfinished run the steps done. Raises Damaged."""
    try:
        found = read_scalars(record.folder, (*CURVES.values(), CALLS, "train/J"))
    except (DamagedEvents, OSError) as error:
        raise Damaged(f"TensorBoard events that cannot be read ({_reason(error)})") from error
    if record.finished and not found:
        raise Damaged("no TensorBoard events, or none with scalars")
    if not record.finished:
        record.steps = max([record.steps, *(step for scalars in found.values() for step, _ in scalars)])
    within = {tag: [one for one in scalars if one[0] <= record.steps] for tag, scalars in found.items()}
    record.curves = {name: within[tag] for name, tag in CURVES.items() if within.get(tag)}
    if calls := within.get(CALLS):
        record.values["evaluations"] = sum(value for _, value in calls) / len(calls)
    if not record.finished:
        record.values |= {name: curve[-1][1] for name, curve in record.curves.items()}


def _leave_the_classifier(record: Record) -> None:
    """Of a run on the labels alone, whose generator and estimator were never trained: neither has a say in it."""

    def stays(name: str) -> bool:
        return name.rpartition("@")[2].replace("/", ".").partition(".")[0] not in ("estimator", "objective")

    own = {"estimator._target_": ALONE, "estimator.alpha": record.config.get("objective.alpha")}
    record.config = {key: value for key, value in record.config.items() if stays(key)} | own
    record.choices = {group: made for group, made in record.choices.items() if stays(group)} | {"estimator": ALONE}
    for name in [*(name for name, metric in METRICS.items() if metric.of_pixels), "evaluations"]:
        record.values.pop(name, None)
    for name in ("val_bound", "val_log_likelihood"):
        record.curves.pop(name, None)


def _add_what_older_runs_did(records: Sequence[Record]) -> None:
    """Settings that came later, where another run of the same model has them: an older run did what SINCE says."""
    from training.state import CONSTANT, SINCE, flat

    model, rate = "model._target_", "lr_factor"
    runs = [record for record in records if "method" not in record.facts]
    has: dict[Any, set[str]] = {}
    for record in runs:
        has.setdefault(record.config.get(model), set()).update(record.config)
    for record in runs:
        alike = has[record.config.get(model)]
        did = {key: value for key, value in SINCE.items() if key in alike}
        if f"{rate}._target_" in alike and not any(key.startswith(f"{rate}.") for key in record.config):
            did |= flat(CONSTANT, f"{rate}.")
        record.config |= {key: value for key, value in did.items() if key not in record.config}


def read_all(folders: Sequence[Path]) -> tuple[list[Record], list[str]]:
    """Runs, and a sentence for each that is damaged in whole or in part. Raises ConfigError if none is left."""
    records, notes = [], []
    without_events: dict[str, list[Path]] = {}
    for folder in progress(find(folders), "reading", "runs"):
        try:
            record = read(folder)
        except Damaged as damaged:
            notes.append(f"{folder} is left out: {damaged}")
            continue
        try:
            if "method" not in record.facts:
                read_events(record)
        except Damaged as damaged:
            without_events.setdefault(str(damaged), []).append(folder)
        records.append(record)
    _add_what_older_runs_did(records)
    for record in records:
        if record.config.get("objective.labelled") == record.config.get("objective.unlabelled") == 0:
            _leave_the_classifier(record)
    for reason, affected in without_events.items():
        more = f" and {len(affected) - 2} more" if len(affected) > 2 else ""
        notes.append(f"no curves and no calls of {', '.join(map(str, affected[:2]))}{more}: {reason}")
    if not records:
        raise ConfigError("no run can be read: " + "; ".join(notes))
    return records, notes
