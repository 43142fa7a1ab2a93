"""A non-finite number stops training before the update, by name and step, whether the guard looks now or later."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import train
from configs.schema import Config
from data.batches import Batches
from scripts.benchmark import compose_run
from tests.runs import ESTIMATORS, MLP, run
from training.divergence import Diverged, FiniteGuard
from training.run import Run

CPU = torch.device("cpu")
PARTS = ("labelled_bound", "unlabelled_bound", "classification", "kl_y", "kl_z", "reconstruction", "entropy_y")
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, fused=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
}
each_bad_value = pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
each_mode = pytest.mark.parametrize("deferred", [False, True], ids=["at once", "deferred"])


class Loop:
    """The trainer's order of calls on two parameters, with terms and gradients that a test chooses."""

    def __init__(self, optimizer: str = "adam", deferred: bool = False) -> None:
        self.parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
        self.named = dict(zip(("first", "second"), self.parameters, strict=True))
        self.optimizer = OPTIMIZERS[optimizer](self.parameters)
        self.guard = FiniteGuard(self.optimizer, self.named, CPU)
        assert not self.guard.deferred  # on a CPU, looking is free
        self.guard.deferred = deferred

    def step(self, step: int, *, gradient: float = 0.5, **bad_terms: float) -> None:
        for parameter in self.parameters:
            parameter.grad = torch.full_like(parameter, 0.5)
        last = self.parameters[-1].grad
        assert last is not None
        last[1, 1] = gradient
        values = {"J": -120.0} | {name: float(i) for i, name in enumerate(PARTS)} | bad_terms
        terms = {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}
        self.guard.before_update(step, terms)
        self.optimizer.step()

    def state(self) -> list[Tensor]:
        """Copies of the parameters and of the optimizer's own state."""
        own = [
            value
            for parameter in self.parameters
            for value in self.optimizer.state[parameter].values()
            if isinstance(value, Tensor)
        ]
        return [tensor.detach().clone() for tensor in [*self.parameters, *own]]


def same(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@each_mode
def test_finite_steps_update_as_without_a_guard(optimizer: str, deferred: bool) -> None:
    loop = Loop(optimizer, deferred)
    bare = [nn.Parameter(parameter.detach().clone()) for parameter in loop.parameters]
    bare_optimizer = OPTIMIZERS[optimizer](bare)
    for step in range(3):
        loop.step(step)
        loop.guard.raise_if_diverged()
        for parameter in bare:
            parameter.grad = torch.full_like(parameter, 0.5)
        bare_optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(loop.parameters, bare, strict=True))
    assert not torch.equal(loop.parameters[0], torch.ones(3))


def test_nothing_to_raise_before_the_first_step() -> None:
    Loop().guard.raise_if_diverged()


@each_bad_value
@pytest.mark.parametrize("term", ["J", *PARTS])
def test_bad_term_stops_before_the_update(term: str, bad: float) -> None:
    loop = Loop()
    loop.step(0)
    before = loop.state()
    with pytest.raises(Diverged, match=f"^{term} is {bad} at step 1$"):
        loop.step(1, **{term: bad})
    assert same(before, loop.state())


@each_bad_value
def test_one_bad_gradient_stops_before_the_update(bad: float) -> None:
    loop = Loop()
    loop.step(0)
    before = loop.state()
    norm = abs(bad)  # nan or inf
    with pytest.raises(Diverged, match=f"^the gradient of second is {norm} at step 1$"):
        loop.step(1, gradient=bad)
    assert same(before, loop.state())


@each_mode
@each_bad_value
def test_a_bad_parameter_is_named_before_the_terms_that_it_spoils(deferred: bool, bad: float) -> None:
    loop = Loop(deferred=deferred)
    loop.step(0)
    with torch.no_grad():
        loop.parameters[0][2] = bad
    before = loop.state()

    def step_and_look() -> None:
        loop.step(1, J=float("nan"), kl_z=float("nan"), gradient=float("nan"))
        loop.guard.raise_if_diverged()

    with pytest.raises(Diverged, match=f"^first is {bad} at step 1$"):
        step_and_look()
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(before, loop.state(), strict=True))


def test_the_part_to_blame_is_named_rather_than_j_or_the_gradient() -> None:
    with pytest.raises(Diverged, match=r"^kl_z is inf at step 4$"):
        Loop().step(4, J=float("nan"), kl_z=float("inf"), gradient=float("nan"))


def test_parameters_without_a_gradient_are_no_divergence() -> None:
    loop = Loop()
    loop.named["third"] = nn.Parameter(torch.ones(1))
    loop.step(0)


def test_high_step_numbers_are_named_exactly() -> None:
    """Beyond 2^24, where float32 skips odd numbers."""
    with pytest.raises(Diverged, match=r"at step 16777217$"):
        Loop().step(2**24 + 1, J=float("nan"))


# --- deferred, as on a GPU


def test_guard_defers_on_a_gpu_where_the_optimizer_can_switch_its_update_off() -> None:
    parameters = [nn.Parameter(torch.ones(3))]
    gpu = torch.device("cuda")
    assert FiniteGuard(torch.optim.Adam(parameters, fused=True), {}, gpu).deferred
    assert not FiniteGuard(torch.optim.Adam(parameters), {}, gpu).deferred


@each_bad_value
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_deferred_guard_blocks_the_bad_update_and_all_later_ones(optimizer: str, bad: float) -> None:
    loop = Loop(optimizer, deferred=True)
    loop.step(0)
    before = loop.state()
    loop.step(1, unlabelled_bound=bad)
    assert same(before, loop.state())
    for step in range(2, 5):  # finite again
        loop.step(step)
        assert same(before, loop.state())
    with pytest.raises(Diverged, match=f"^unlabelled_bound is {bad} at step 1$"):
        loop.guard.raise_if_diverged()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_deferred_guard_blocks_a_bad_gradient_at_the_very_first_step(optimizer: str) -> None:
    loop = Loop(optimizer, deferred=True)
    loop.step(0, gradient=float("nan"))
    loop.step(1, kl_z=float("inf"))
    assert all(torch.equal(parameter, torch.ones_like(parameter)) for parameter in loop.parameters)
    with pytest.raises(Diverged, match=r"^the gradient of second is nan at step 0$"):
        loop.guard.raise_if_diverged()


def test_deferred_guard_names_the_first_bad_step_and_its_term() -> None:
    loop = Loop(deferred=True)
    loop.step(10)
    loop.step(11, kl_y=float("inf"))
    loop.step(12, J=float("nan"), labelled_bound=float("nan"), gradient=float("nan"))
    loop.step(13, classification=-float("inf"))
    with pytest.raises(Diverged, match=r"^kl_y is inf at step 11$"):
        loop.guard.raise_if_diverged()


def test_deferred_guard_is_silent_while_all_is_finite() -> None:
    loop = Loop(deferred=True)
    for step in range(3):
        loop.step(step)
        loop.guard.raise_if_diverged()


# --- planted in each place of a real run

LINE = f"{MLP} {ESTIMATORS['score_function/learned']} train.steps=4 train.log_every=100"
Plant = Callable[[Run], None]


def before_the_third_step(plant: Plant, made: list[Run]) -> Any:
    """Has `plant` called with the run, which is the last one of `made`."""
    original = Batches.rows

    def rows(self: Batches, step: int) -> tuple[Tensor, ...]:
        if step == 2:
            plant(made[-1])
        return original(self, step)

    return mock.patch.object(Batches, "rows", rows)


def said_by_the_command(plant: Plant, tmp_path: Path) -> str:
    made: list[Run] = []
    make = Run.__init__

    def remember(self: Run, config: Config, *others: Any) -> None:
        make(self, config, *others)
        made.append(self)

    with before_the_third_step(plant, made), mock.patch.object(Run, "__init__", remember):
        ended = run(LINE, tmp_path / "run", code=3)
    return ended.err.removeprefix("catvae: ").strip()


def said_by_the_loop(plant: Plant, tmp_path: Path) -> str:
    made = compose_run(LINE.split(), "score_function/learned")
    with before_the_third_step(plant, [made]), pytest.raises(Diverged) as caught:
        train.train(made, mock.MagicMock(), tmp_path)
    return str(caught.value)


def poison(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.view(-1)[-1] = float("nan")


def test_nan_in_every_parameter_and_every_gradient_is_named(tmp_path: Path) -> None:
    everyone = list(compose_run(LINE.split(), "score_function/learned").parameters)
    assert {name.partition(".")[0] for name in everyone} == {"classifier", "inference", "generator", "estimator"}
    for name in everyone:

        def poison_parameter(run: Run, name: str = name) -> None:
            poison(run.parameters[name])

        assert said_by_the_loop(poison_parameter, tmp_path) == f"{name} is nan at step 2"

        def poison_gradient(run: Run, name: str = name) -> None:
            run.parameters[name].register_hook(lambda gradient: gradient * float("inf"))

        said = said_by_the_loop(poison_gradient, tmp_path)
        assert re.fullmatch(f"the gradient of {re.escape(name)} is (nan|inf) at step 2", said), said
    assert said_by_the_command(poison_gradient, tmp_path) == said
