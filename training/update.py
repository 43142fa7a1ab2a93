"""One step of training, and the same step as a CUDA graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from data.randomness import key
from estimators.contract import Schedule, temperature_at
from models.contract import Objective
from training.divergence import FiniteGuard
from training.half import HalfWeights
from training.run import Run

log = logging.getLogger("catvae")
Result = TypeVar("Result")
# a recording has to be told of its generators; a no-op that warns since
NEEDS_GENERATORS = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)
WARM_UP = 3  # steps before one is recorded, in which libraries allocate what they need


class Held:
    """What a module's schedule of temperatures gives at the step last written, as a tensor [] on a device.

    In float64, which rounds to what a number of Python's would.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module
        self.schedule: Schedule = module.temperature  # type: ignore[assignment]
        self.value = torch.zeros((), dtype=torch.float64, device=device)
        self.written: object = None

    def write(self, step: int) -> None:
        temperature = temperature_at(self.schedule, step)
        if temperature != self.written:  # most schedules change it seldom
            self.value.fill_(temperature)
            self.written = temperature

    def __call__(self, step: int) -> Tensor:
        return self.value

    def __enter__(self) -> None:
        """Has the module ask here."""
        self.module.temperature = self  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        self.module.temperature = self.schedule  # type: ignore[assignment]


def held(estimator: nn.Module, device: torch.device) -> list[Held]:
    """The temperatures of an estimator, of each layer where it has several."""
    schedules = ((module, getattr(module, "temperature", None)) for module in estimator.modules())
    found = (m for m, schedule in schedules if callable(schedule) and not isinstance(schedule, nn.Module))
    return [Held(module, device) for module in found]


class Update:
    """A step of training: minibatch, J, gradient, guard, optimizer. `after` is told of each part that is done."""

    def __init__(self, run: Run, guard: FiniteGuard, after: Callable[[str], None] = lambda part: None) -> None:
        self.run, self.guard, self.after = run, guard, after
        self.generator = torch.Generator(run.device)
        if run.together:
            sizes = run.batches.labelled.batch_size, run.batches.unlabelled.batch_size
            self.generator = run.together.generator(run.device, *sizes)
        # dJ/dJ, which backward() would write anew, by one more kernel; on a CPU half a second of imports look at it
        self.one = torch.ones((), device=run.device) if run.device.type == "cuda" else None
        self.temperatures: list[Held] = []
        self.weights = run.weights
        self.written = dict.fromkeys(run.weights.at_step(0), 1.0)
        self.half = HalfWeights(run.model) if run.device.type == "cuda" and run.precision == "bf16" else None
        for group in run.optimizer.param_groups:
            group["lr"] = float(group["lr"])  # a run of a GPU may go on elsewhere
        if run.device.type == "cuda" and run.optimizer.defaults.get("fused"):
            self.read_on_device()

    def read_on_device(self) -> None:
        """Has a step read its learning rate, in float32, and temperatures where they are written before.

        A recorded step can read them nowhere else, and one that is run does the same arithmetic.
        """
        self.temperatures = held(self.run.estimator, self.run.device)
        for group in self.run.optimizer.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=self.run.device)
        ones = {name: torch.ones((), device=self.run.device) for name in self.written}
        self.weights = replace(self.weights, **ones)  # type: ignore[arg-type]

    def __call__(self, step: int) -> Objective:
        self.prepare(step)
        return self.work(step, step, self.run.batches.rows(step))

    def prepare(self, step: int) -> None:
        """Writes what differs between steps to where they read it."""
        self.run.set_learning_rate(step)
        self.generator.manual_seed(key(self.run.config.seed, "step", step))
        for temperature in self.temperatures:
            temperature.write(step)
        for name, weight in self.run.weights.at_step(step).items():
            if weight != self.written[name]:
                self.write_weight(name, weight)

    def write_weight(self, name: str, weight: float) -> None:
        self.written[name] = weight
        on_device = getattr(self.weights, name)
        if isinstance(on_device, Tensor):
            on_device.fill_(weight)
        else:
            self.weights = replace(self.weights, **{name: weight})  # type: ignore[arg-type]

    def work(self, step: int, number: int | Tensor, rows: tuple[Tensor, ...]) -> Objective:
        """The step's arithmetic, from the rows of its minibatch; `number` is the step for the guard."""
        run = self.run
        batch = run.batches.take(rows, self.generator)
        if run.together:
            batch = run.together.own(*batch)
        self.after("data")
        with run.autocast(), self.half or nullcontext(), ExitStack() as stack:
            for temperature in self.temperatures:
                stack.enter_context(temperature)
            result = run.model.objective(run.estimator, self.weights, *batch, step=step, generator=self.generator)
        self.after("forward")
        run.optimizer.zero_grad(set_to_none=True)
        result.loss.backward(self.one)
        if self.half:
            self.half.hand_over_gradients()
        if run.together:
            run.together.average(run.parameters.values(), run.estimator, result)
        self.after("backward")
        self.guard.before_update(number, result.terms)
        self.after("guard")
        if (limit := run.config.train.clip_gradient) is not None:
            clip([p.grad for p in run.model.parameters() if p.grad is not None], limit)
        run.optimizer.step()
        self.after("optimizer")
        return detached(result)


def clip(gradients: list[Tensor], limit: float) -> None:
    """Shortens a gradient whose norm, over all its parts, is above the limit (Pascanu et al. 2013, algorithm 1)."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    torch._foreach_mul_(gradients, (limit / norm).clamp(max=1))


def detached(result: Objective) -> Objective:
    """The numbers alone: a graph that is held on to would keep what its next one needs on another stream."""
    numbers = {k: value.detach() if isinstance(value, Tensor) else value for k, value in result.metrics.items()}
    return Objective(result.loss.detach(), {k: term.detach() for k, term in result.terms.items()}, numbers)


class ReplayedUpdate(Update):
    """The step as a CUDA graph: recorded once, then launched as a whole, with the numbers of `Update`.

    What differs between steps is the generator's seed, and tensors that are written before: the minibatch's rows, the
    step's number, the learning rate, temperatures. Where the estimator depends on the step by more, the step is
    recorded anew once that has changed; while it changes with every step, nothing is recorded, which is said once.
    """

    def __init__(self, run: Run, guard: FiniteGuard, launcher: Launcher | None = None) -> None:
        super().__init__(run, guard)
        self.launcher = launcher or Recording()
        self.number = torch.zeros((), dtype=torch.float64, device=run.device)  # of the step, and counts on by itself
        self.before: int | None = None  # the step that was worked on last
        self.rows = tuple(rows.clone() for rows in run.batches.rows(run.step))
        self.done, self.changes = 0, 0
        self.state: object = None  # what of the step a recording of it is for
        self.recorded: object = None  # and the one that was recorded last
        self.is_eager = True  # run, rather than replayed
        self.stream: Any = torch.cuda.Stream(run.device) if run.device.type == "cuda" else None
        self.read_on_device()
        for group in run.optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = True

    def __call__(self, step: int) -> Objective:
        depends_on = self.run.estimator.depends_on
        self.prepare(step)
        self.done += 1
        self.state = depends_on(step)
        changes = self.state != self.recorded and self.state != depends_on(step + 1)
        self.say_that_nothing_is_recorded(changes)
        self.is_eager = self.done <= WARM_UP or changes
        return self.launcher.launch([self])[0]

    def say_that_nothing_is_recorded(self, changes: bool) -> None:
        """Once, when three steps in a row are each another step's."""
        self.changes = self.changes + 1 if changes else 0
        if self.changes == 3:
            log.warning(
                "cuda_graph=true records no step while what %s does changes with every step; its depends_on says so",
                self.run.estimator.name,
            )

    def prepare(self, step: int) -> None:
        super().prepare(step)
        if self.before != step - 1:
            self.number.fill_(step - 1)
        self.before = step
        for static, rows in zip(self.rows, self.run.batches.rows(step), strict=True):
            static.copy_(rows)

    def work_prepared(self) -> Objective:
        assert self.before is not None
        return self.work(self.before, self.number.add_(1), self.rows)


class Launcher(Protocol):
    def launch(self, updates: Sequence[ReplayedUpdate]) -> list[Objective]: ...


class Recording:
    """Prepared steps of runs, each on a stream of its own, as one CUDA graph."""

    def __init__(self) -> None:
        self.of: dict[ReplayedUpdate, object] = {}  # the steps that are recorded, and each one's state
        self.results: dict[ReplayedUpdate, Objective] = {}
        self.replay: Callable[[], None] | None = None

    def launch(self, updates: Sequence[ReplayedUpdate]) -> list[Objective]:
        """Their results: eager ones are run, the others replayed, recorded anew if need be."""
        eager = {update: beside(update.stream, update.work_prepared) for update in updates if update.is_eager}
        replayed = {update: update.state for update in updates if not update.is_eager}
        if replayed and replayed != self.of:
            self._record(replayed)
        if replayed:
            assert self.replay
            self.replay()
        return [(eager if update.is_eager else self.results)[update] for update in updates]

    def _record(self, steps: dict[ReplayedUpdate, object]) -> None:
        self.replay, self.results, self.of = None, {}, {}  # frees what the recording before holds
        works = [(update.stream, update.work_prepared) for update in steps]
        self.replay, results = record(lambda: branches(works), *(update.generator for update in steps))
        self.results, self.of = dict(zip(steps, results, strict=True)), steps
        for update, state in steps.items():
            update.recorded = state


def branches(works: Sequence[tuple[torch.cuda.Stream, Callable[[], Result]]]) -> list[Result]:
    """Does works that do not wait for each other, each on its stream; one alone on the stream that there is."""
    if len(works) == 1:
        return [works[0][1]()]
    here, results = torch.cuda.current_stream(), []
    for stream, work in works:
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            results.append(work())
    for stream, _ in works:
        here.wait_stream(stream)
    return results


def beside(stream: torch.cuda.Stream, work: Callable[[], Result]) -> Result:
    """Does the work on another stream, as is asked for before a recording."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = work()
    torch.cuda.current_stream().wait_stream(stream)
    return result


def record(work: Callable[[], Result], *generators: torch.Generator) -> tuple[Callable[[], None], Result]:
    """Records the work without doing it: what does it, as often as called, and where its result is then found."""
    graph = torch.cuda.CUDAGraph()
    if NEEDS_GENERATORS:
        for generator in generators:
            graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        result = work()
    return graph.replay, result
