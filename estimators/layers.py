"""An estimator for each layer of variables, where a model has several."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from estimators.contract import Estimator


class Layers(Estimator):
    """One estimator a layer, each with state of its own: a baseline never contains the cost it is subtracted from."""

    def __init__(self, estimators: Sequence[Estimator]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(estimators)

    @property
    def name(self) -> str:
        own: str = of_layer(self, 0).name
        return own

    def depends_on(self, step: int) -> object:
        return tuple(of_layer(self, layer).depends_on(step) for layer in range(len(self.layers)))


def in_layers(estimator: Estimator, latents: Sequence[tuple[int, int]], context_size: int) -> Estimator:
    """The estimator itself for one layer of (N, K), else one like it for each, prepared.

    Raises ValueError as `prepare`, and for a KL that is a ratio of relaxed densities, which the prior of a layer below
    another has not.
    """
    if len(latents) == 1:
        estimator.prepare(context_size, *latents[0])
        return estimator
    if getattr(estimator, "kl", "analytic") == "relaxed":
        raise ValueError(f"kl must be analytic or sampled with {len(latents)} layers of variables, got relaxed")
    estimators = [estimator, *(copy.deepcopy(estimator) for _ in latents[1:])]
    for one, sizes in zip(estimators, latents, strict=True):
        one.prepare(context_size, *sizes)
    return Layers(estimators)


def of_layer(estimator: Estimator, layer: int) -> Estimator:
    """The estimator of a layer of variables, counted from 0, the lowest."""
    if not isinstance(estimator, Layers):
        return estimator
    own = estimator.layers[layer]
    assert isinstance(own, Estimator)
    return own
