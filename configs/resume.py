"""`resume=RUN_FOLDER`: the command line that goes on with a run where it stopped."""

from __future__ import annotations

import os
from pathlib import Path

from omegaconf import OmegaConf
from yaml import YAMLError

from configs.schema import ConfigError


def resume_arguments(arguments: list[str]) -> list[str]:
    """With resume=FOLDER among them: flags, the run's own overrides, these overrides, then the folder to run in.

    Raises ConfigError if FOLDER is not a run folder.
    """
    resumed = [argument for argument in arguments if argument.lstrip("+").startswith("resume=")]
    if not resumed or resumed[-1].partition("=")[2] in ("", "null"):
        return arguments
    folder = Path(os.path.expanduser(resumed[-1].partition("=")[2].strip("'\""))).resolve()
    recorded = folder / ".hydra" / "overrides.yaml"
    if not recorded.is_file():
        raise ConfigError(f"resume must be a run folder, got {folder}: it has no .hydra/overrides.yaml")
    if not any((folder / "checkpoints").glob("step_*.pt")):
        raise ConfigError(f"resume must be a run folder, got {folder}: it has no checkpoint in checkpoints/")
    try:
        before = [str(override) for override in OmegaConf.load(recorded)]
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise ConfigError(f"resume must be a run folder, got {folder}: its {recorded} is unreadable") from error
    configuration = folder / ".hydra" / "config.yaml"
    if configuration.is_file() and "\nlikelihood:" not in "\n" + configuration.read_text(errors="replace"):
        before = ["likelihood=bernoulli", *before]  # the only one there was, whatever the pixels
    quoted = "'" + str(folder).replace("'", "\\'") + "'"
    # output_subdir=null leaves .hydra as the first run wrote it
    added = [f"resume={quoted}", f"hydra.run.dir={quoted}", "hydra.output_subdir=null"]
    flags = [argument for argument in arguments if not _is_override(argument)]
    overrides = [argument for argument in arguments if _is_override(argument) and argument not in resumed]
    return [*flags, *before, *overrides, *added]


def _is_override(argument: str) -> bool:
    return argument.startswith("~") or ("=" in argument and not argument.startswith("-"))
