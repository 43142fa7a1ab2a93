"""How a job ends for a person: one sentence, the way out, and an exit code. Imports PyTorch only where it is used."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from configs.check import number_of_processes
from configs.schema import ConfigError
from configs.targets import own_line
from data.facts import DataError
from training.resume import resume_command

errors = logging.getLogger("catvae.errors")  # to standard error and the run's train.log


def ended_by(error: Exception, config: DictConfig, folder: Path) -> int:
    """Says in one sentence what ended a job, if a person can mend it, and returns the exit code."""
    from estimators.contract import ContractError
    from models.evaluation import OutOfMemoryError
    from training.checkpoints import CheckpointError
    from training.divergence import Diverged
    from training.interruption import ProcessLost

    if isinstance(error, OutOfMemoryError):
        way_on = f"go on with: {way_to_resume(config, folder)} evaluation.batch_size=NUMBER"
        errors.error("catvae: %s; nothing is lost, %s", error, way_on)
        return 2
    if isinstance(error, (ConfigError, DataError, CheckpointError, ContractError, Diverged)):
        errors.error("catvae: %s", error)
        return 3 if isinstance(error, Diverged) else 2
    if isinstance(error, ProcessLost):
        way_on = "start it again"
        if is_saved(folder):
            way_on = f"what was saved is whole: go on with: {way_to_resume(config, folder)}"
        errors.error("catvae: another process of this run has ended, and the run with it; %s", way_on)
        return 1
    if isinstance(error, OSError):  # a full disk, a folder that may not be written to any more
        way_on = "mend that and start again"
        if is_saved(folder):
            way_on = f"what was saved is whole: mend that, and go on with: {way_to_resume(config, folder)}"
        errors.error("catvae: cannot use %s: %s; %s", error.filename or folder, error.strerror or error, way_on)
        return 1
    if isinstance(error, RuntimeError) and "deterministic implementation" in str(error):
        errors.error("catvae: deterministic must be false here: %s", str(error).split(", but you set")[0])
        return 2
    where = own_line(error)
    errors.error("catvae: %s", f"a fault in {where}" if where else "a fault of the program", exc_info=error)
    return 1


def is_saved(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("step_*.pt"))


def way_to_resume(config: DictConfig, folder: Path) -> str:
    return resume_command(folder, OmegaConf.to_container(config, resolve=False))


def is_to_say() -> bool:
    """Whether this process tells what ended the run: of several, the first that asks."""
    if number_of_processes() == 1:
        return True
    from training.distributed import says

    return says()


def quiet_on_full_disks(hook: Callable[[threading.ExceptHookArgs], Any]) -> Callable[[threading.ExceptHookArgs], Any]:
    """TensorBoard's thread shows a traceback for what the main thread is told too, and says in one sentence."""
    return lambda failed: None if isinstance(failed.exc_value, OSError) else hook(failed)
