"""Refuses an unusable configuration before any work: before a run's folder is made, and before a sweep's first job."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from configs.schema import Config, ConfigError
from configs.targets import build, unknown_key


def typed(config: DictConfig) -> Config:
    """The composed configuration as a Config, checked key by key. Raises ConfigError."""
    plain = OmegaConf.to_container(config, resolve=True)
    try:
        # merging again into the schema is what catches a misspelt key that was added with +
        checked = OmegaConf.merge(OmegaConf.structured(Config), plain)
        return OmegaConf.to_object(checked)  # type: ignore[return-value]
    except ValueError as error:
        if isinstance(error, OmegaConfBaseException):
            raise ConfigError(explain(error)) from error
        raise ConfigError(str(error)) from error
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error


def check(config: Config) -> None:
    """Builds, on no data and no device, what `_target_` names, so that a bad setting is found now. Raises ConfigError."""
    import torch

    from data.datasets import DATASETS
    from models.networks import ImageShape

    facts = DATASETS[config.data.name]
    build(config.estimator, "estimator")
    with torch.device("meta"):
        build(config.model, "model", ImageShape(*facts.shape), facts.num_classes)
    build_optimizer(config, [torch.nn.Parameter(torch.zeros(1))])
    if config.device.value == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device must be auto or cpu on this machine, got cuda: PyTorch finds no CUDA device")


def build_optimizer(config: Config, parameters: list[Any]) -> Any:
    """The optimizer that the configuration names, over `parameters`. Raises ConfigError."""
    lr = config.optimizer.get("lr") if isinstance(config.optimizer, dict) else None
    if isinstance(lr, (int, float)) and not (math.isfinite(lr) and lr > 0):
        raise ConfigError(f"optimizer.lr must be > 0 and finite, got {lr}")
    return build(config.optimizer, "optimizer", parameters)


def explain(error: Exception) -> str:
    """One sentence for an error of Hydra or OmegaConf: the key, the value and what is allowed."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = getattr(cause, "full_key", None)
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and key:
        return unknown_key(key, "...", _known_keys()).replace("=...", "", 1)
    first = str(error).strip().splitlines()
    message = str(cause).strip().splitlines()[0]
    if key:
        return f"{key}: {message}"
    return " ".join(line.strip() for line in first[:2])


def _known_keys(node: Any = None, prefix: str = "") -> list[str]:
    keys = []
    for name, value in OmegaConf.structured(Config).items() if node is None else node.items():
        key = f"{prefix}{name}"
        keys.append(key)
        if isinstance(value, DictConfig):
            keys += _known_keys(value, f"{key}.")
    return keys


class CheckBeforeWork(Callback):
    """Exits with status 2 and one sentence if the configuration, or that of any job of a sweep, cannot be used."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        _check_or_exit(config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        for overrides in sweep_jobs(config):
            _check_or_exit(_compose(config, overrides), f" (in the job {' '.join(overrides)})")


def sweep_jobs(config: DictConfig) -> list[list[str]]:
    """The overrides of each job of a sweep; ranges that only a search fills in are left out."""
    texts = list(config.hydra.overrides.task)
    params = OmegaConf.select(config, "hydra.sweeper.params")
    texts += [f"{key}={value}" for key, value in (params or {}).items()]
    choices = []
    for override in OverridesParser.create().parse_overrides(texts):
        if not override.is_sweep_override():
            choices.append([override.input_line or ""])
        elif override.is_discrete_sweep():
            choices.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
    return [list(job) for job in itertools.product(*choices)]


def _compose(config: DictConfig, overrides: list[str]) -> DictConfig:
    from hydra import compose

    try:
        return compose(config_name=config.hydra.job.config_name, overrides=overrides)
    except Exception as error:  # whatever composing refuses is the user's to mend, and none of it is ours
        refuse(explain(error) + f" (in the job {' '.join(overrides)})")


def _check_or_exit(config: DictConfig, where: str = "") -> None:
    plain = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    try:
        check(typed(plain))
    except ConfigError as error:
        refuse(f"{error}{where}")


def refuse(message: str) -> Any:
    """Says why, on standard error, and exits with status 2."""
    print(f"catvae: {message}", file=sys.stderr)
    raise SystemExit(2)
