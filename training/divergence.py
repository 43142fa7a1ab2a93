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
    """Looks at J's terms and the gradient norm before each update.

    Where looking is free (CPU) it raises at once. Where it would wait for the device, the update is switched off on
    the device by the optimizer's own `found_inf`, and stays off, until `raise_if_diverged` is called on a logging step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.optimizer = optimizer
        self.deferred = device.type == "cuda" and bool(optimizer.defaults.get("fused"))
        self.names: list[str] = []
        self.norm = torch.zeros(())  # of the whole gradient at the last step, on the device
        self.first_bad: Tensor | None = None  # [step, terms...] of the first bad step; step -1 before

    def before_update(self, step: int, terms: dict[str, Tensor], parameters: list[nn.Parameter]) -> None:
        """Raises Diverged, or on a device that runs ahead, blocks this and all later updates."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        self.norm = norm = nn.utils.get_total_norm(gradients)
        self.names = [*terms, "the gradient"]
        # float64, in which the step's number is exact
        values = torch.stack([*(term.detach().double() for term in terms.values()), norm.double()])
        row = torch.cat([values.new_full((1,), step), values])
        if self.first_bad is None:
            self.first_bad = torch.full_like(row, -1.0)
        is_first = (self.first_bad[0] < 0) & ~values.isfinite().all()
        self.first_bad = torch.where(is_first, row, self.first_bad)
        if self.deferred:
            self.optimizer.found_inf = (self.first_bad[0] >= 0).float()  # type: ignore[attr-defined]
        else:
            self.raise_if_diverged()

    def raise_if_diverged(self) -> None:
        if self.first_bad is None:
            return
        step, *values = self.first_bad.tolist()
        if step >= 0:
            bad = [(n, v) for n, v in zip(self.names, values, strict=True) if not abs(v) < float("inf")]
            # J is the sum of the others: name a part of it where one is to blame
            name, value = next((pair for pair in bad if pair[0] != "J"), bad[0])
            raise Diverged(f"{name} is {value} at step {int(step)}")
