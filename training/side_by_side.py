"""Jobs of a sweep that train side by side in one process: on a GPU as branches of one CUDA graph.

Each job is a greenlet: a function that can be left off and gone on with. It does what it would do alone, and is left
off at each step, until all have come to theirs, which are then launched at once. On a CPU, where no step is recorded, a
job goes on to its end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from greenlet import getcurrent, greenlet

from configs.schema import ConfigError
from models.contract import Objective
from training.divergence import FiniteGuard
from training.interruption import Interruption
from training.run import Run
from training.update import Recording, ReplayedUpdate, Update

Returned = TypeVar("Returned")
LOGGERS = (logging.root, logging.getLogger("catvae.errors"))  # those to which Hydra gives each job handlers


class Job(greenlet):  # type: ignore[misc]  # it comes without types
    """What `do` does, from step to step, beside others."""

    def __init__(self, do: Callable[[], Any], beside: list[Job], interruption: Interruption) -> None:
        super().__init__(self._do_all)
        self.do, self.beside, self.interruption = do, beside, interruption
        self.update: ReplayedUpdate | None = None  # whose step it waits for
        self.handlers: dict[logging.Logger, list[logging.Handler]] = {}
        self.returned: Any = None
        self.raised: BaseException | None = None

    def _do_all(self) -> None:
        try:
            self.returned = self.do()
        except BaseException as error:
            self.raised = error
        self.update = None  # and with it the memory of the run

    def launch(self, updates: Sequence[ReplayedUpdate]) -> list[Objective]:
        """As that of a `Recording`; the step is launched with those of the other jobs."""
        (self.update,) = updates
        random_state = torch.get_rng_state()  # of which the process has one
        result = self.parent.switch()
        torch.set_rng_state(random_state)
        return [result]


def train_side_by_side(jobs: Sequence[Callable[[], Returned]], interruption: Interruption) -> list[Returned]:
    """Does the jobs; returns what each does. Raises what one of them has raised, once all are at their end."""
    greenlets: list[Job] = []
    greenlets += [Job(do, greenlets, interruption) for do in jobs]
    recording = Recording()
    for job in greenlets:
        job.switch()  # to its first step
    while training := [job for job in greenlets if not job.dead]:
        try:
            results = recording.launch([job.update for job in training if job.update])
        except torch.OutOfMemoryError:
            too_many = f"the GPU has not the memory for {len(training)} runs side by side: lower hydra.launcher.n_jobs"
            for job in training:
                job.throw(ConfigError(too_many))
        else:
            for job, result in zip(training, results, strict=True):
                job.switch(result)
    for job in greenlets:
        if job.raised:
            raise job.raised
    return [job.returned for job in greenlets]


def here() -> Job | None:
    """This job among others, if it is one."""
    job = getcurrent()
    return job if isinstance(job, Job) else None


def interruption_here() -> AbstractContextManager[Interruption]:
    """That of a run alone, or the one that all jobs side by side heed."""
    return nullcontext(job.interruption) if (job := here()) else Interruption()


def update_of(run: Run, guard: FiniteGuard) -> Update:
    """A run's step: replayed if cuda_graph asks for that, and side by side wherever it can be."""
    job = here()
    if run.config.cuda_graph or (job and run.device.type == "cuda" and run.optimizer.defaults.get("fused")):
        return ReplayedUpdate(run, guard, job)
    return Update(run, guard)


def is_stopped() -> bool:
    """Whether a signal has come that this job, which has not begun, heeds."""
    return (job := here()) is not None and job.interruption.signal is not None


@contextmanager
def own_log(number: int) -> Iterator[None]:
    """Has the handlers that Hydra has just made take this job's records alone, and keeps those of other jobs."""
    job = here()
    assert job
    job.handlers = {logger: logger.handlers for logger in LOGGERS}
    for handler in (handler for handlers in job.handlers.values() for handler in handlers):
        handler.addFilter(lambda record: getcurrent() is job)
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(logging.Formatter(f"job {number}: %(message)s"))
    for logger in LOGGERS:
        logger.handlers = [handler for other in job.beside for handler in other.handlers.get(logger, [])]
    try:
        yield
    finally:
        for logger, handlers in job.handlers.items():
            for handler in handlers:
                logger.removeHandler(handler)
                handler.close()
        job.handlers = {}
