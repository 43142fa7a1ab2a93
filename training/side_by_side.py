"""Jobs of a sweep that train side by side in one process: on a GPU as branches of one CUDA graph.

Each job is a thread that does what it would do alone. They take turns: one works, the others wait, so that nothing of
the process is used by two. They meet at each step, where the last one that comes launches the steps of all. On a CPU,
where no step is recorded, a job keeps its turn to its end.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch

from models.contract import Objective
from training.divergence import FiniteGuard
from training.interruption import Interruption
from training.run import Run
from training.update import Recording, ReplayedUpdate, Update

Returned = TypeVar("Returned")
LOGGERS = (logging.root, logging.getLogger("catvae.errors"))  # those to which Hydra gives each job handlers
_thread = threading.local()


class SideBySide:
    """What the threads of some jobs share. Of `Recording` it has `launch`, which here waits for the other jobs."""

    def __init__(self, jobs: int, interruption: Interruption) -> None:
        self.interruption = interruption
        self.turn = threading.Condition()  # held by the thread that works
        self.begun: set[threading.Thread] = set()  # those that have come to their first step, or to their end
        self.unfinished = jobs
        self.waiting: list[ReplayedUpdate] = []  # for the steps of the others
        self.results: dict[ReplayedUpdate, Objective | Exception] = {}  # of steps, until their jobs take them
        self.recording = Recording()
        self.handlers: dict[threading.Thread, dict[logging.Logger, list[logging.Handler]]] = {}

    @contextmanager
    def taking_turns(self) -> Iterator[None]:
        """A job, from its beginning to its end."""
        with self.turn:
            _thread.jobs = self
            try:
                yield
            finally:
                self.unfinished -= 1
                self._go_on()

    def launch(self, updates: Sequence[ReplayedUpdate]) -> list[Objective]:
        """A job's step, once all that still train have come to theirs. What ends the recording ends all of them."""
        (update,) = updates
        random_state = torch.get_rng_state()  # of which the process has one
        self.waiting.append(update)
        self._go_on()
        self.turn.wait_for(lambda: update in self.results)
        torch.set_rng_state(random_state)
        result = self.results.pop(update)
        if isinstance(result, Exception):
            raise result
        return [result]

    def _go_on(self) -> None:
        """Launches the steps of all if all wait, and has other threads look whether it is their turn."""
        self.begun.add(threading.current_thread())
        self.turn.notify_all()
        if not self.waiting or len(self.waiting) < self.unfinished:
            return
        updates, self.waiting = self.waiting, []
        try:
            self.results |= zip(updates, self.recording.launch(updates), strict=True)
        except Exception as error:
            self.results |= dict.fromkeys(updates, error)

    def set_handlers(self) -> None:
        for logger in LOGGERS:
            logger.handlers = [handler for of_job in self.handlers.values() for handler in of_job[logger]]


def train_side_by_side(jobs: Sequence[Callable[[], Returned]], interruption: Interruption) -> list[Returned]:
    """Does the jobs, which begin in their order; returns what each does. Raises what one of them has raised."""
    returned: dict[int, Returned] = {}
    raised: list[BaseException] = []

    def work(number: int) -> None:
        with shared.taking_turns():
            try:
                returned[number] = jobs[number]()
            except BaseException as error:
                raised.append(error)

    shared = SideBySide(len(jobs), interruption)
    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
        with shared.turn:
            while thread not in shared.begun:
                shared.turn.wait()
    while any(thread.is_alive() for thread in threads):
        threads[-1].join(timeout=0.2)  # signals are handled in between
    if raised:
        raise raised[0]
    return [returned[number] for number in range(len(jobs))]


def beside() -> SideBySide | None:
    """The jobs among which this thread has one, if it has."""
    return getattr(_thread, "jobs", None)


def interruption_here() -> AbstractContextManager[Interruption]:
    """That of a run alone, or the one that all jobs side by side heed."""
    return nullcontext(jobs.interruption) if (jobs := beside()) else Interruption()


def update_of(run: Run, guard: FiniteGuard) -> Update:
    """A run's step: replayed if cuda_graph asks for that, and side by side wherever it can be."""
    jobs = beside()
    if run.config.cuda_graph or (jobs and run.device.type == "cuda" and run.optimizer.defaults.get("fused")):
        return ReplayedUpdate(run, guard, jobs)
    return Update(run, guard)


def is_stopped() -> bool:
    """Whether a signal has come that this thread's job, which has not begun, heeds."""
    return (jobs := beside()) is not None and jobs.interruption.signal is not None


@contextmanager
def own_log(number: int) -> Iterator[None]:
    """Has the handlers that Hydra has just made take the records of this thread's job alone, and keeps the others'."""
    jobs, own = beside(), threading.current_thread()
    assert jobs
    made = {logger: logger.handlers for logger in LOGGERS}
    for handler in (handler for handlers in made.values() for handler in handlers):
        handler.addFilter(lambda record: threading.current_thread() is own)
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(logging.Formatter(f"job {number}: %(message)s"))
    jobs.handlers[own] = made
    jobs.set_handlers()
    try:
        yield
    finally:
        for handlers in jobs.handlers.pop(own).values():
            for handler in handlers:
                handler.close()
        jobs.set_handlers()
