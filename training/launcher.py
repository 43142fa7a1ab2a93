"""hydra/launcher=side_by_side: the jobs of a sweep in one process (side_by_side.py)."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from training import sweep
from training.interruption import Interruption
from training.side_by_side import train_side_by_side


class SideBySideLauncher(Launcher):
    """Trains `n_jobs` jobs of a sweep at once, then as many more."""

    __module__ = "hydra_plugins.catvae"  # see `register`

    def __init__(self, n_jobs: int) -> None:
        self.n_jobs = n_jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        setup_globals()
        jobs = [self._job(initial_job_idx + n, overrides) for n, overrides in enumerate(job_overrides)]
        returned: list[JobReturn] = []
        with Interruption() as interruption:  # signals come to this thread; the jobs are in others
            for first in range(0, len(jobs), self.n_jobs):
                returned += train_side_by_side(jobs[first : first + self.n_jobs], interruption)
        if interruption.signal is not None:
            sweep.stopped_by(interruption.signal)
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        return returned

    def _job(self, number: int, overrides: Sequence[str]) -> functools.partial[JobReturn]:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return functools.partial(
            run_job,
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )


def register() -> None:
    """Has Hydra know the launcher by the name in configs/hydra/launcher/side_by_side.yaml.

    Hydra takes launchers from the package hydra_plugins alone, so this module is also found there.
    """
    with suppress(ImportError):  # of other plugins, if any are installed
        importlib.import_module("hydra_plugins")
    package: Any = sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins"))
    sys.modules["hydra_plugins.catvae"] = package.catvae = sys.modules[__name__]
    Plugins.instance().register(SideBySideLauncher)
