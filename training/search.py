"""A search by Optuna: its numbers are round ones, test data wait for its end, and the end tells what was found."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from configs.schema import ConfigError
from configs.wording import key_of
from training.result import is_left
from training.resume import ROOT, best_command, resume_command, resume_words
from training.run_folder import RESULT, chosen_by, read_json
from training.sweep import SLURM, launcher

LEFT = "evaluation.test"
FOUND = "optimization_results.yaml"  # by Optuna's sweeper
DIGITS = 3


def prepare(config: DictConfig) -> None:
    """What every search is: it maximises, as a job gives its validation accuracy or bound, and leaves test data alone.

    An evaluation.test on the command line overrules the latter. Raises ConfigError.
    """
    sweeper = config.hydra.sweeper
    if "direction" not in sweeper:  # not Optuna's
        return
    # as they were given: ${hydra:..} has no value yet
    given: Any = OmegaConf.to_container(config.hydra.overrides.hydra, resolve=False)
    if "hydra.sweeper.direction=minimize" in given:
        raise ConfigError(
            "hydra.sweeper.direction must be maximize, got minimize: a job gives its validation accuracy or bound"
        )
    sweeper.direction = "maximize"
    sweeper.params = {LEFT: "false", **(sweeper.params or {})}


def begin(config: DictConfig) -> None:
    """Puts `Rounded` around the sampler, unless that goes through a grid, and drops what an earlier search found."""
    (Path(config.hydra.sweep.dir) / FOUND).unlink(missing_ok=True)
    if not sys.stderr.isatty():
        os.environ.setdefault("NO_COLOR", "1")  # Optuna's log of trials has colours otherwise
    settings: Any = OmegaConf.to_container(config.hydra.sweeper, resolve=True, enum_to_str=True)
    if "sampler" in settings and not settings["sampler"].get("_partial_"):
        settings["sampler"] = {"_target_": f"{__name__}.Rounded", "sampler": settings["sampler"]}
        config.hydra.sweeper = settings


class Rounded:
    """An Optuna sampler whose numbers are rounded as they are drawn, so that what is printed is what ran."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)

    def sample_relative(self, study: Any, trial: Any, search_space: Mapping[str, Any]) -> dict[str, Any]:
        drawn = self.sampler.sample_relative(study, trial, search_space)
        return {name: rounded(value, search_space[name]) for name, value in drawn.items()}

    def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
        return rounded(self.sampler.sample_independent(study, trial, name, distribution), distribution)


def rounded(value: Any, distribution: Any) -> Any:
    """A number of an interval to three digits, more where the interval is narrower than the number is large.

    Inside the interval, whose upper end is no part of it. What is no floating-point number stays.
    """
    if not isinstance(value, float) or not value or not hasattr(distribution, "low"):
        return value
    low, high = distribution.low, distribution.high
    if hasattr(distribution, "q"):  # steps, whose sums have errors in the last digits
        return float(f"{value:.10g}")
    first = DIGITS - 1 - math.floor(math.log10(min(abs(value), (high - low) or math.inf)))
    return next((near for places in range(first, first + 15) if low <= (near := round(value, places)) < high), value)


# ---- the end ----


def end(config: DictConfig, fixed: Mapping[str, str], composed: Callable[[Mapping[str, Any]], Any]) -> int:
    """Says which trial is best and how to repeat it, and looks at test data for that one; returns an exit code.

    `fixed` are the values that no trial varies; `composed` makes a trial's configuration of those that it does.
    """
    folder = Path(config.hydra.sweep.dir)
    if not (folder / FOUND).exists():
        return 0
    found: Any = OmegaConf.to_container(OmegaConf.load(folder / FOUND))
    best: dict[str, Any] = found["best_params"]
    trials = sorted(folder.rglob(RESULT), key=lambda path: (len(path.parent.name), path.parent.name))
    results = {path.parent: read_json(path) for path in trials}
    asked = {f"{key}={value}" for key, value in best.items()}
    place = next((place for place in results if asked <= _overrides(results[place])), None)
    if place is None:  # all diverged
        return 0
    title, value = chosen_by(results[place]) or ("val accuracy", math.nan)
    form = ".4f" if title == "val accuracy" else ".2f"
    say(f"best of {len(results)} finished trials: {place}, with {title} {value:{form}}")
    typed = {key_of(argument) for argument in config.hydra.overrides.task}
    preset = {key: value for key, value in fixed.items() if key != LEFT and key.lstrip("+") not in typed}
    say(f"its command: {best_command(sys.argv[1:], preset | best)}")
    return look_at_test(config, place, composed(best)) if is_left(results[place]) else 0


def _overrides(result: Any) -> set[str]:
    asked = result.get("asked") if isinstance(result, dict) else None
    return set(map(str, asked.get("overrides", []))) if isinstance(asked, dict) else set()


def look_at_test(config: DictConfig, place: Path, made_of: Any) -> int:
    """The one look at test data of a search, for the best trial, by the command that a person would type."""
    line = f"{resume_command(place, made_of)} {LEFT}=true"
    if launcher(config.hydra) == SLURM:  # this machine may have neither the data nor a GPU
        say(f"test data were not looked at; for the best trial do so by: {line}")
        return 0
    say("test data are looked at for the best trial alone")
    code = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *resume_words(place, made_of), f"{LEFT}=true"], check=False
    ).returncode
    if code:
        say(f"that failed; do so by: {line}")
    return code


def say(sentence: str) -> None:
    print(f"catvae: {sentence}", file=sys.stderr, flush=True)
