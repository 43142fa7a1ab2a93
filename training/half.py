"""Weights in bf16 for a step on a GPU, where each small operation costs as much as a large one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


class HalfWeights:
    """Weights of linear maps and convolutions rounded to bf16 all at once, and their gradients brought back likewise.

    Autocast does the same rounding one weight and one gradient at a time. Inside, the modules have the copies.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = [module for module in model.modules() if isinstance(module, (nn.Linear, _ConvNd))]
        self.places = [(m._parameters, name, p) for m in modules for name, p in m._parameters.items() if p is not None]
        self.weights: list[Tensor] = [weight for *_, weight in self.places]
        self.copies: list[Tensor] = [nn.Parameter(weight.detach().bfloat16()) for weight in self.weights]

    def __enter__(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.copies, self.weights)
        for (parameters, name, _), copy in zip(self.places, self.copies, strict=True):
            parameters[name] = copy  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        for parameters, name, weight in self.places:
            parameters[name] = weight

    def hand_over_gradients(self) -> None:
        """To the weights, after the backward pass."""
        pairs = [(weight, copy.grad) for weight, copy in zip(self.weights, self.copies, strict=True)]
        halves = [gradient for _, gradient in pairs if gradient is not None]
        whole = [torch.empty_like(weight) for weight, gradient in pairs if gradient is not None]
        if halves:
            torch._foreach_copy_(whole, halves)
        gradients = iter(whole)
        for weight, copy in zip(self.weights, self.copies, strict=True):
            weight.grad = None if copy.grad is None else next(gradients)
            copy.grad = None
