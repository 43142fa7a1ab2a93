"""Stops training before a non-finite number reaches the parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Diverged(Exception):
    """Training produced a non-finite number; the message names the term and the step."""


def raise_unless_finite(name: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise Diverged(f"{name} is {value} at step {step}")


class FiniteGuard:
    """Looks at J's terms and every parameter's gradient before each update.

    Where looking is free (CPU) it raises at once. Where it would wait for the device, the update is switched off on
    the device by the optimizer's own `found_inf`, and stays off, until `raise_if_diverged` is called on a logging step.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], device: torch.device
    ) -> None:
        self.optimizer = optimizer
        self.parameters = parameters
        self.deferred = device.type == "cuda" and bool(optimizer.defaults.get("fused"))
        self.names: list[str] = []
        self.norm = torch.zeros(())  # of the whole gradient at the last step, on the device
        self.first_bad: Tensor | None = (
            None  # terms and norms of the first bad step, or as long as all are good the last
        )

    def before_update(self, step: int | Tensor, terms: dict[str, Tensor]) -> None:
        """Raises Diverged, or on a device that runs ahead, blocks this and all later updates.

        Nothing here depends on the step but by its value, which a recorded step has as a tensor [].
        """
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        if not self.deferred and self._sums_are_finite(terms, gradients):
            return
        self.names = [*terms, *(f"the gradient of {name}" for name in gradients)]
        row = torch.stack([*(term.detach() for term in terms.values()), *torch._foreach_norm(list(gradients.values()))])
        self.norm = torch.linalg.vector_norm(row[len(terms) :])
        if self.first_bad is None:
            self.first_bad, self.found_inf = torch.zeros_like(row), torch.zeros((), device=row.device)
            self.at_step = torch.zeros((), dtype=torch.float64, device=row.device)  # in which step numbers are exact
            self.one = torch.ones((), device=row.device)
        number = step if isinstance(step, Tensor) else torch.full_like(self.at_step, step)
        stays = self.found_inf > 0
        torch.where(stays, self.first_bad, row, out=self.first_bad)
        torch.where(stays, self.at_step, number, out=self.at_step)
        torch._amp_foreach_non_finite_check_and_unscale_([row], self.found_inf, self.one)  # sets it to 1 if one is not
        if self.deferred:
            self.optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]
        else:
            self.raise_if_diverged()

    def _sums_are_finite(self, terms: dict[str, Tensor], gradients: dict[str, Tensor]) -> bool:
        """Whether the terms' sum and the gradients' squared norm are, which is a quick look at all of them."""
        flat = (gradient.reshape(-1) for gradient in gradients.values())
        squares = torch.stack([torch.dot(gradient, gradient) for gradient in flat])
        self.norm = squares.sum().sqrt()
        return math.isfinite(self.norm) and math.isfinite(sum(term.item() for term in terms.values()))

    def raise_if_diverged(self) -> None:
        if self.first_bad is None:
            return
        found, step, *values = torch.cat([self.found_inf.view(1), self.at_step.view(1), self.first_bad]).tolist()
        if found:
            for name, parameter in self.parameters.items():  # not updated since: it was so before the terms were
                raise_unless_finite(name, _bad_or_zero(parameter), int(step))
            bad = [(n, v) for n, v in zip(self.names, values, strict=True) if not math.isfinite(v)]
            # J is the sum of the others: name a part of it where one is to blame
            name, value = next((pair for pair in bad if pair[0] != "J"), bad[0])
            raise Diverged(f"{name} is {value} at step {int(step)}")


def _bad_or_zero(tensor: Tensor) -> float:
    """The first non-finite number of a tensor, 0 if there is none."""
    bad = tensor.detach()[~tensor.isfinite()]
    return bad[0].item() if len(bad) else 0.0
