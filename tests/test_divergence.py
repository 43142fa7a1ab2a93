"""A non-finite number stops training before the update, by name and step, whether the guard looks now or later."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from training.divergence import Diverged, FiniteGuard

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
        self.optimizer = OPTIMIZERS[optimizer](self.parameters)
        self.guard = FiniteGuard(self.optimizer, CPU)
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
        self.guard.before_update(step, terms, self.parameters)
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
    with pytest.raises(Diverged, match=f"^the gradient is {norm} at step 1$"):
        loop.step(1, gradient=bad)
    assert same(before, loop.state())


def test_the_part_to_blame_is_named_rather_than_j_or_the_gradient() -> None:
    with pytest.raises(Diverged, match=r"^kl_z is inf at step 4$"):
        Loop().step(4, J=float("nan"), kl_z=float("inf"), gradient=float("nan"))


def test_parameters_without_a_gradient_are_no_divergence() -> None:
    loop = Loop()
    loop.parameters.append(nn.Parameter(torch.ones(1)))
    loop.guard.before_update(0, {"J": torch.zeros(())}, loop.parameters)


def test_high_step_numbers_are_named_exactly() -> None:
    """Beyond 2^24, where float32 skips odd numbers."""
    with pytest.raises(Diverged, match=r"at step 16777217$"):
        Loop().step(2**24 + 1, J=float("nan"))


# --- deferred, as on a GPU


def test_guard_defers_on_a_gpu_where_the_optimizer_can_switch_its_update_off() -> None:
    parameters = [nn.Parameter(torch.ones(3))]
    gpu = torch.device("cuda")
    assert FiniteGuard(torch.optim.Adam(parameters, fused=True), gpu).deferred
    assert not FiniteGuard(torch.optim.Adam(parameters), gpu).deferred


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
    with pytest.raises(Diverged, match=r"^the gradient is nan at step 0$"):
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
