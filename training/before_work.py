"""Refuses a run or a sweep that cannot be done: before a run's folder is made, and before a sweep's first job."""

from __future__ import annotations

import itertools
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from configs.check import COMPOSING_ERRORS, check, check_machine, number_of_processes, refuse, typed
from configs.schema import Config, ConfigError
from configs.wording import explain, has_a_comma
from data import npz
from data.facts import DataError
from data.folders import made
from training.names import SEEDS
from training.resume import resume_command


class CheckBeforeWork(Callback):
    """Exits with status 2 and one sentence if the configuration, or that of any job of a sweep, cannot be used."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with _refusing():
            checked = _check_job(config, _same_experiment)
            folder = Path(config.hydra.run.dir)
            _check_utf8(folder, "hydra.run.dir")
            _check_outside(folder, "hydra.run.dir", checked)
            _check_folder(config, folder)
            check_machine(checked)
            _hold_folder(config, folder)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        is_search = _is_search(config)
        with _refusing():
            if number_of_processes() > 1:
                raise ConfigError(
                    "-m must be left out under torchrun, which is for one run; hydra/launcher=joblib deals the jobs of "
                    "a sweep over the GPUs"
                )
            if config.hydra.job.chdir:
                raise ConfigError("hydra.job.chdir must be false in a sweep, whose folder it would move, got true")
            if config.get("resume") is not None:
                raise ConfigError(f"resume must be given without -m, one run at a time, got {config.resume}")
            if is_search:
                from training import search

                search.prepare(config)
            jobs = sweep_jobs(config)
            _ = config.hydra.sweep.dir  # the jobs' configurations take over what its time and number came to
        checked = []
        for number, job in enumerate(jobs):
            with _refusing(job):
                job_config = _compose_job(config, number, job)
                job_checked = _check_job(job_config)
                checked.append((job, folder := _job_folder(job_config), job_checked))
                _check_utf8(folder, "hydra.sweep.dir")
                _check_outside(folder, "hydra.sweep.dir", job_checked)
        with _refusing():
            _check_apart([(job, folder) for job, folder, _ in checked])
            if is_search and jobs:  # it may try the same values twice
                _check_apart([(jobs[0], _job_folder(_compose_job(config, number, jobs[0]))) for number in (0, 1)])
        from training import sweep

        if sweep.launcher(config.hydra) == sweep.SIDE_BY_SIDE:
            from training import launcher

            launcher.register()
            with _refusing():
                sweep.check_side_by_side(config.hydra.launcher, [job_checked for *_, job_checked in checked])
        for job, _, job_checked in checked:
            if is_search and job_checked.data.num_validation == 0:
                with _refusing(job):
                    raise ConfigError("a search needs validation images to choose by: data.num_validation must be > 0")
            with _refusing(job):
                if sweep.launcher(config.hydra) in sweep.ON_THIS_MACHINE:
                    check_machine(job_checked)
        with _refusing(), sweep.begun(config):
            varied = [override.get_key_element() for override in _given(config) if override.is_sweep_override()]
            sweep.tell_number(config.hydra.sweeper.get("n_trials") if is_search else len(jobs), varied)
            if is_search:
                sweep.check_search(config)
                search.begin(config)
                return
            for job, folder, job_checked in checked:
                with _refusing(job):
                    sweep.check_folder(folder, job_checked)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from training import sweep

        code = sweep.end()
        if _is_search(config):
            from training import search

            fixed = {
                override.get_key_element(): override.get_value_element_as_str()
                for override in _given(config)
                if not override.is_sweep_override()
            }

            def composed(values: Mapping[str, Any]) -> Any:
                job = _compose_job(config, 0, [f"{key}={value}" for key, value in {**fixed, **values}.items()])
                own = OmegaConf.masked_copy(job, [str(key) for key in job if key != "hydra"])
                return OmegaConf.to_container(own, resolve=True)

            if code < 128:  # not stopped by a signal
                code = max(code, search.end(config, fixed, composed))
        if code:
            sys.exit(code)


def _check_apart(jobs: Sequence[tuple[list[str], Path]]) -> None:
    """Of jobs in one folder, or one within another, some are never run or taken for others. Raises ConfigError."""
    places = sorted((Path(os.path.abspath(folder)).parts, number) for number, (_, folder) in enumerate(jobs))
    for (outer, one), (inner, other) in itertools.pairwise(places):
        if inner[: len(outer)] == outer:
            pair = " and ".join(f"job {number} ({' '.join(jobs[number][0])})" for number in sorted((one, other)))
            raise ConfigError(
                "hydra.sweep.subdir must give every job a folder of its own, and none within another's, got "
                f"{Path(*outer)} for {pair}; leave it out, or have ${{hydra:job.num}} in it"
            )


def _job_folder(job: DictConfig) -> Path:
    HydraConfig.instance().set_config(job)  # of which ${hydra:job.num} is read
    return Path(job.hydra.sweep.dir, job.hydra.sweep.subdir)


def sweep_jobs(config: DictConfig) -> list[list[str]]:
    """The overrides of each job of a sweep; of a search, which makes up its jobs as it goes, the ends of its ranges."""
    overrides = _given(config)
    if _is_search(config):
        for override in overrides:
            if override.is_sweep_override() and override.get_key_element() in SEEDS:
                must = f"{override.get_key_element()} must be one number in a search"
                raise ConfigError(f"{must}, which would choose the luckiest, got {override.input_line}")
        return [_end_of_search(overrides, end) for end in (0, -1)]
    for override in overrides:
        if override.is_sweep_override() and not override.is_discrete_sweep():
            key = override.key_or_group
            raise ConfigError(f"{key} must be values to sweep over, such as 1,2 or range(3), got {override.input_line}")
        text = str(override.input_line).partition("=")[2]
        if override.is_sweep_override() and "," in text and Path(text).exists():
            raise ConfigError(has_a_comma(str(override.input_line)))
    return BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]


def _given(config: DictConfig) -> list[Override]:
    """What a sweep or search was asked for, its preset before its command line."""
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    given: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    return OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides([*params, *given])


def _is_search(config: DictConfig) -> bool:
    return config.hydra.runtime.choices["hydra/sweeper"] != "basic"


def _end_of_search(overrides: Sequence[Override], end: int) -> list[str]:
    """A job with the first (0) or the last (-1) value of everything that a search tries."""
    job = {}
    for override in overrides:
        key, value = override.get_key_element(), override.value()
        if isinstance(value, IntervalSweep):
            job[key] = f"{key}={(value.start, value.end)[end]}"
        elif override.is_sweep_override():
            job[key] = f"{key}={list(override.sweep_string_iterator())[end]}"
        else:
            job[key] = f"{key}={override.get_value_element_as_str()}"
    return list(job.values())


def _compose_job(config: DictConfig, number: int, overrides: list[str]) -> DictConfig:
    try:
        job = GlobalHydra.instance().config_loader().load_sweep_config(config, overrides)
    except COMPOSING_ERRORS as error:
        raise ConfigError(explain(error, overrides)) from error
    with read_write(job.hydra.job), open_dict(job.hydra.job):
        job.hydra.job.num, job.hydra.job.id = number, str(number)
    return job


def _check_job(config: DictConfig, check_first: Callable[[Config], None] = lambda config: None) -> Config:
    HydraConfig.instance().set_config(config)  # for a configuration that reads ${hydra:...}
    checked = typed(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))
    if config.hydra.job.chdir:
        _check_absolute(checked)
    check_first(checked)
    try:
        check(checked)
    except ConfigError as error:
        raise ConfigError(f"{error}{_left_out_by(config, str(error))}") from error
    return checked


def _left_out_by(config: DictConfig, refusal: str) -> str:
    """How a key goes that a preset has set, and that the choice of another estimator or model does not know."""
    found = re.match(r"(\S+?)=.* is not a key", refusal)
    preset = config.hydra.runtime.choices.get("experiment")
    if not found or preset is None or any(found[1] in override for override in config.hydra.overrides.task):
        return ""
    return f"; experiment={preset} sets it, and ~{found[1]} leaves it out"


def _check_absolute(config: Config) -> None:
    """Of a run that changes its folder: data are looked at before that, and read after it. Raises ConfigError."""
    for key, place in (("path", config.data.path), ("root", config.data.root)):
        if place is not None and not Path(place).expanduser().is_absolute():
            raise ConfigError(f"data.{key} must be an absolute path with hydra.job.chdir=true, got {place}")


def _same_experiment(config: Config) -> None:
    """Of what a resume may not change nothing is built. Raises ConfigError, CheckpointError."""
    if config.resume is None:
        return
    from training.state import changes, flat

    state = _state_in(Path(config.resume))
    before = flat(state["config"])
    if changed := changes(before, config):
        followed = state.get("asked", {}).get("references", {}).items()
        kept = [
            f", or add {key}={before[key]}, as it follows {other}" for key, other in followed if f"{key}=" in changed
        ]
        raise ConfigError(f"resume cannot change the experiment: {changed}; start a new run for that{''.join(kept)}")


def _state_in(folder: Path) -> dict[str, Any]:
    """The newest checkpoint of the run in a folder. Raises CheckpointError."""
    import torch

    from training.checkpoints import load

    return load(folder, torch.device("cpu"))


def _check_folder(config: DictConfig, folder: Path) -> None:
    """Among another run's checkpoints, a run would lose its own and be taken for the other. Raises ConfigError."""
    if config.get("resume") is None and any((folder / "checkpoints").glob("step_*.pt")):
        stored: Any = {}
        with suppress(ConfigError):  # a damaged one is told of by resume
            stored = _state_in(folder)["config"]
        way_on = resume_command(folder, stored)
        raise ConfigError(f"hydra.run.dir must be without a run, got {folder}; go on with that one by: {way_on}")
    if config.get("resume") is None and (folder / "result.json").exists():
        raise ConfigError(f"hydra.run.dir must be without a run, got {folder}, which has the result.json of one")


def _check_outside(folder: Path, key: str, config: Config) -> None:
    """Among a person's own pictures, those that a run draws would be taken for some of them. Raises ConfigError."""
    if config.data.path is None:
        return
    source = Path(config.data.path).expanduser()
    if not source.is_dir() or npz.is_one(source):
        return
    place, own = Path(os.path.realpath(folder)), Path(os.path.realpath(source))
    if place == own or own in place.parents:
        raise ConfigError(
            f"{key} must be outside of data.path={config.data.path}, whose pictures are read, got {folder}; give it "
            f"another, such as {key}=/tmp/run"
        )


def _check_utf8(folder: Path, key: str) -> None:
    """Under another name TensorBoard cannot write, or writes elsewhere. Raises ConfigError."""
    place = str(folder.absolute())
    with suppress(UnicodeEncodeError):
        if os.fsencode(place) == place.encode():
            return
    raise ConfigError(
        f"{key} must be a folder whose path is in UTF-8, which TensorBoard needs, got {place}; give it another, such "
        f"as {key}=/tmp/run"
    )


def _hold_folder(config: DictConfig, folder: Path) -> None:
    """Makes a run's folder this process's own before Hydra writes there.

    Raises ConfigError if it cannot be made or is another's, and then leaves nothing of it.
    """
    from training.run_folder import LOCK, hold

    try:
        with made(folder):
            with suppress(OSError):  # the run says it, who can also log it
                hold(folder / LOCK)
            _check_folder(config, folder)  # another process may have had it meanwhile
    except OSError as error:
        raise ConfigError(f"{explain(error)}; hydra.run.dir=FOLDER names another place for a run") from error


@contextmanager
def _refusing(job: Sequence[str] = ()) -> Iterator[None]:
    """Ends the program on any error: Hydra would make a warning of it and go on."""
    try:
        yield
    except (ConfigError, DataError, HydraException, OmegaConfBaseException, OSError) as error:
        refuse(explain(error) + (f" (in the job {' '.join(job)})" if job else ""))
    except Exception:
        traceback.print_exc()
        sys.exit(1)
