"""hydra/launcher=side_by_side. Hydra looks for launchers in a package of this name, and nowhere else."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from hydra.core.utils import JobReturn, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict


class SideBySideLauncher(Launcher):
    """Trains `n_jobs` jobs of a sweep at once in this process (training/side_by_side.py), then as many more."""

    def __init__(self, n_jobs: int) -> None:
        self.n_jobs = n_jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from training import sweep
        from training.interruption import Interruption
        from training.side_by_side import train_side_by_side

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
