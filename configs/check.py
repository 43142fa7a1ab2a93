"""Refuses an unusable configuration before any work: before a run's folder is made, and before a sweep's first job."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)
from yaml import YAMLError

from configs.resume import resume_command
from configs.schema import Config, ConfigError
from configs.targets import build
from configs.wording import explain, has_a_comma, keys, printable, shown, unknown_key
from data.datasets import load
from data.facts import DataError
from data.folders import made
from data.splits import Indices, class_prior

# what composing a configuration raises; Hydra refuses some arguments with ValueError
COMPOSING_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError)

# limits that hold for every optimizer that has the setting; torch itself lets infinity and some NaN pass
OPTIMIZER_LIMITS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lr": ("> 0 and finite", lambda value: 0 < value < math.inf),
    "eps": (">= 0 and finite", lambda value: 0 <= value < math.inf),
    "weight_decay": (">= 0 and finite", lambda value: 0 <= value < math.inf),
    "momentum": (">= 0 and finite", lambda value: 0 <= value < math.inf),
    "betas": ("numbers in [0, 1)", lambda value: all(0 <= beta < 1 for beta in value)),
}


def typed(config: DictConfig) -> Config:
    """The composed configuration as a Config, checked key by key. Raises ConfigError."""
    plain: Any = None
    try:
        try:
            plain = OmegaConf.to_container(config, resolve=True)
        except InterpolationResolutionError:  # what it points at may be at fault, and is then named below
            plain = OmegaConf.to_container(config, resolve=False)
        # merging again into the schema is what catches a misspelt key that was added with +
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))  # type: ignore[return-value]
    except (ConfigKeyError, ConfigAttributeError) as error:
        key = str(error.full_key)
        known = [other for other in keys(plain) if other != key]
        value = functools.reduce(dict.__getitem__, key.split("."), plain)
        raise ConfigError(unknown_key(f"{key}={shown(value)}", key, known)) from error
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check(config: Config) -> None:
    """Builds what `_target_` names and throws it away, so that a bad setting is found now. Raises ConfigError."""
    import torch

    from estimators.contract import Estimator
    from models.networks import ImageShape, Networks

    known = config.data.known()
    model = build(config.model, "model", ImageShape(*known.shape), known.num_classes)
    check_kind(config.model, "model", model, Networks)
    estimator = build(config.estimator, "estimator")
    check_kind(config.estimator, "estimator", estimator, Estimator)
    on_gpu = config.device.value != "cpu" and torch.cuda.is_available()
    parameter = torch.nn.Parameter(torch.zeros(1, device="cuda" if on_gpu else "cpu"))
    optimizer = build_optimizer(config, [parameter])
    check_kind(config.optimizer, "optimizer", optimizer, torch.optim.Optimizer)
    factor = build(config.lr_factor, "lr_factor")(0)
    if not isinstance(factor, (int, float)):
        got = f"{config.lr_factor['_target_']}: it gives a {type(factor).__name__}"
        raise ConfigError(f"lr_factor._target_ must make a schedule, which gives a number at each step, got {got}")
    _try_step(config, optimizer, parameter)
    try:
        inspect.signature(estimator.forward).bind("f", "logits", step=0, context=None, generator=None)
    except TypeError:
        call = "(f, logits, *, step, context, generator)"
        got = config.estimator["_target_"]
        raise ConfigError(f"estimator._target_ must make an estimator, called with {call}, got {got}") from None
    if config.prior != "uniform":
        _check_reads_prior(config, estimator, known.num_classes)


def _check_reads_prior(config: Config, estimator: Any, num_classes: int) -> None:
    """Somebody's own estimator may know of no p(y): its KL, and so J, would be those of a uniform one."""
    import torch

    logits = torch.zeros(1, 1, num_classes, requires_grad=True)
    prior = torch.arange(1.0, num_classes + 1).log_softmax(dim=0)
    kls = []
    with torch.random.fork_rng([]), suppress(Exception):  # what it fails by, training will say
        estimator.prepare(1, 1, num_classes)
        for estimator.log_prior in (None, prior):
            generator, context = torch.Generator().manual_seed(0), torch.zeros(1, 1, 1, 1)
            estimate = estimator(
                lambda y: y.square().sum(dim=(-2, -1)), logits, step=0, context=context, generator=generator
            )
            kls.append(estimate.kl.detach())
    if len(kls) == 2 and torch.equal(*kls):
        raise ConfigError(
            f"prior must be uniform with an estimator whose kl is not from self.log_prior, got {shown(config.prior)} "
            f"with {config.estimator['_target_']}; categorical_kl(logits, self.log_prior) is"
        )


def _try_step(config: Config, optimizer: Any, parameter: Any) -> None:
    """Some optimizers refuse their settings, or to be called without a closure, only at the first step."""
    parameter.grad = parameter.detach().clone()
    try:
        optimizer.step()
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        reason, got = " ".join(str(error).split()), config.optimizer["_target_"]
        raise ConfigError(f"optimizer must be able to take a step, got {got}: {reason}") from error


def check_kind(node: Any, key: str, built: Any, kind: type) -> None:
    if not isinstance(built, kind):
        name = f"{kind.__module__}.{kind.__name__}"
        target, made, article = node["_target_"], type(built).__name__, "an" if name[0] in "aeiou" else "a"
        raise ConfigError(f"{key}._target_ must make {article} {name}, got {target}: it makes a {made}")


def build_optimizer(config: Config, parameters: list[Any]) -> Any:
    """The optimizer that the configuration names, over `parameters`. Raises ConfigError."""
    for name, value in config.optimizer.items() if isinstance(config.optimizer, dict) else ():
        limit, is_within = OPTIMIZER_LIMITS.get(name, ("", lambda value: True))
        try:
            if not is_within(value):
                raise ConfigError(f"optimizer.{name} must be {limit}, got {shown(value)}")
        except TypeError:  # not a number: building the optimizer says so
            continue
    settings = config.optimizer
    if isinstance(settings, dict) and isinstance(settings.get("betas"), list):  # torch refuses [0, 0], integers
        betas = [float(beta) if isinstance(beta, int) else beta for beta in settings["betas"]]
        settings = settings | {"betas": betas}
    return build(settings, "optimizer", parameters)


def check_machine(config: Config) -> None:
    """Finds the device and the data, downloaded if need be. Raises ConfigError, DataError."""
    import torch

    if config.device.value == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device must be auto or cpu where PyTorch finds no CUDA device, got cuda")
    if config.cuda_graph and (config.device.value == "cpu" or not torch.cuda.is_available()):
        raise ConfigError("cuda_graph must be false where no CUDA device trains, got true")
    if config.cuda_graph and not config.optimizer.get("fused"):
        raise ConfigError("cuda_graph must be false where optimizer.fused is not true, got true")
    data = config.data
    try:
        labels, num_classes = _labels(
            data.name, data.root, data.checksum, data.path, data.random_classes, data.num_test, data.resize
        )
        split = data.split(labels, num_classes)
        class_prior(config.prior, labels[split.labelled], num_classes)
    except ValueError as error:
        raise ConfigError(str(error)) from error


@functools.cache
def _labels(
    name: str,
    root: str,
    checksum: bool,
    path: str | None,
    random_classes: int | None,
    num_test: float | None,
    resize: str | None,
) -> tuple[Indices, int]:
    """The training images' labels, and the number of classes."""
    source = load(name, root, "train", checksum, path, random_classes, num_test=num_test, resize=resize, mapped=True)
    return source.labels, source.num_classes


class CheckBeforeWork(Callback):
    """Exits with status 2 and one sentence if the configuration, or that of any job of a sweep, cannot be used."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with _refusing():
            checked = _check_job(config, _same_experiment)
            folder = Path(config.hydra.run.dir)
            _check_utf8(folder, "hydra.run.dir")
            _check_folder(config, folder)
            check_machine(checked)
            _hold_folder(config, folder)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        is_search = _is_search(config)
        with _refusing():
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
        with _refusing():
            _check_apart([(job, folder) for job, folder, _ in checked])
            if is_search and jobs:  # it may try the same values twice
                _check_apart([(jobs[0], _job_folder(_compose_job(config, number, jobs[0]))) for number in (0, 1)])
        from training import sweep

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
    check_first(checked)
    check(checked)
    return checked


def _same_experiment(config: Config) -> None:
    """Of what a resume may not change nothing is built. Raises ConfigError, CheckpointError."""
    if config.resume is None:
        return
    import torch

    from training.checkpoints import load
    from training.run import changes, flat

    if changed := changes(flat(load(Path(config.resume), torch.device("cpu"))["config"]), config):
        raise ConfigError(f"resume cannot change the experiment: {changed}; start a new run for that")


def _check_folder(config: DictConfig, folder: Path) -> None:
    """Among another run's checkpoints, a run would lose its own and be taken for the other. Raises ConfigError."""
    if config.get("resume") is None and any((folder / "checkpoints").glob("step_*.pt")):
        way_on = resume_command(folder, OmegaConf.to_container(config, resolve=False))
        raise ConfigError(f"hydra.run.dir must be without a run, got {folder}; go on with that one by: {way_on}")


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


def refuse(message: str) -> NoReturn:
    """Says why, on standard error and in one line, and exits with status 2."""
    print(f"catvae: {printable(' '.join(message.split()))}", file=sys.stderr)
    raise SystemExit(2)
