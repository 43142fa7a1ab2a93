"""One step of training, and the same step as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from data.randomness import key
from models.contract import Objective
from training.divergence import FiniteGuard
from training.run import Run

WARM_UP = 3  # steps before one is recorded, in which libraries allocate what they need


class Update:
    """A step of training: minibatch, J, gradient, guard, optimizer."""

    def __init__(self, run: Run, guard: FiniteGuard) -> None:
        self.run, self.guard = run, guard
        self.generator = torch.Generator(run.device)

    def __call__(self, step: int) -> Objective:
        self.run.set_learning_rate(step)
        self.generator.manual_seed(key(self.run.config.seed, "step", step))
        return self.work(step, step, self.run.batches.rows(step))

    def work(self, step: int, number: int | Tensor, rows: tuple[Tensor, ...]) -> Objective:
        """The step's arithmetic, from the rows of its minibatch; `number` is the step for the guard."""
        run = self.run
        batch = run.batches.take(rows, self.generator)
        with run.autocast():
            result = run.model.objective(run.estimator, run.weights, *batch, step=step, generator=self.generator)
        run.optimizer.zero_grad(set_to_none=True)
        result.loss.backward()
        self.guard.before_update(number, result.terms)
        run.optimizer.step()
        return result


class ReplayedUpdate(Update):
    """The step as a CUDA graph: recorded once, then launched as a whole, with the numbers of `Update`.

    What differs between steps is the generator's seed, and tensors that are written before: the minibatch's rows, the
    step's number, the learning rate. Where the estimator depends on the step by more, as by a temperature, the step is
    recorded anew once that has changed; while it changes with every step, nothing is recorded.
    """

    def __init__(self, run: Run, guard: FiniteGuard) -> None:
        super().__init__(run, guard)
        self.number = torch.zeros((), dtype=torch.float64, device=run.device)
        self.rows = tuple(rows.clone() for rows in run.batches.rows(run.step))
        self.done = 0
        self.replay: Callable[[], None] | None = None
        self.recorded: object = None  # what of the step the recording is for
        for group in run.optimizer.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=run.device)
            if "capturable" in group:
                group["capturable"] = True

    def __call__(self, step: int) -> Objective:
        depends_on = self.run.estimator.depends_on
        self.prepare(step)
        self.done += 1
        if self.replay is None or depends_on(step) != self.recorded:
            if self.done <= WARM_UP or depends_on(step) != depends_on(step + 1):
                return beside(lambda: self.work(step, self.number, self.rows))
            self.replay = None  # frees what the recording before holds
            self.replay, self.result = record(lambda: self.work(step, self.number, self.rows), self.generator)
            self.recorded = depends_on(step)
        self.replay()
        return self.result

    def prepare(self, step: int) -> None:
        """Writes what differs between steps to where the recording reads it."""
        self.run.set_learning_rate(step)
        self.generator.manual_seed(key(self.run.config.seed, "step", step))
        self.number.fill_(step)
        for static, rows in zip(self.rows, self.run.batches.rows(step), strict=True):
            static.copy_(rows)


def beside(work: Callable[[], Objective]) -> Objective:
    """Does the work on a stream of its own, as is asked for before a recording."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = work()
    torch.cuda.current_stream().wait_stream(stream)
    return result


def record(work: Callable[[], Objective], generator: torch.Generator) -> tuple[Callable[[], None], Objective]:
    """Records the work without doing it: what does it, as often as called, and where its result is then found."""
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        result = work()
    return graph.replay, result
