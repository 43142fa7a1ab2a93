"""The networks between images and categorical variables, fully connected."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from models import contract
from models.categorical.model import CategoricalVAE
from models.likelihoods import Likelihood
from models.parts import ACTIVATIONS, Activation, ImageShape, positive

Prior = Literal["uniform", "learned"]


class Dense(nn.Sequential):
    """Fully connected layers [..., widths[0]] -> [..., widths[-1]]; with two widths, a linear map.

    Hidden layers may be normalised, each row by itself (Ba et al. 2016), so that a row's outputs are its own.
    """

    def __init__(self, widths: Sequence[int], activation: Activation, layer_norm: bool) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths[:-1]):
            normalised = [nn.LayerNorm(outputs)] if layer_norm else []
            layers += [nn.Linear(inputs, outputs), *normalised, ACTIVATIONS[activation]()]
        super().__init__(*layers, nn.Linear(widths[-2], widths[-1]))


class ToLogits(nn.Module):
    """Float32 logits [R, N, K] of variables, from what is below them: images [R, C, H, W] or variables [R, N', K'].

    The last layer's first weights are `scale` times PyTorch's.
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        variables: int,
        classes: int,
        activation: Activation,
        layer_norm: bool,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.layers = Dense([inputs, *hidden, variables * classes], activation, layer_norm)
        with torch.no_grad():
            self.layers[-1].get_parameter("weight").mul_(scale)
        self.sizes = variables, classes

    def forward(self, below: Tensor) -> Tensor:
        return self.layers(below.flatten(1)).float().unflatten(-1, self.sizes)


class FromClasses(nn.Module):
    """A number a pixel [S, B, D] for the likelihood, or a number a class, from variables y [S, B, N, K]."""

    def __init__(
        self,
        variables: int,
        classes: int,
        hidden: Sequence[int],
        outputs: int,
        activation: Activation,
        layer_norm: bool,
    ) -> None:
        super().__init__()
        self.layers = Dense([variables * classes, *hidden, outputs], activation, layer_norm)

    def forward(self, y: Tensor) -> Tensor:
        return self.layers(y.flatten(-2))


@dataclass
class Networks(contract.Networks):
    """Of each layer of variables, from the lowest: q(y|what is below), and p(what is below|y).

    `posteriors` [R, ...] -> logits [R, N, K]; `generators` [S, B, N, K] -> [S, B, D], or the layer below [S, B, N' K'].
    """

    posteriors: list[nn.Module]
    generators: list[nn.Module]
    latents: list[tuple[int, int]]
    learned_prior: bool

    def model(self, likelihood: Likelihood, prior: Sequence[float]) -> CategoricalVAE:
        return CategoricalVAE(self.posteriors, self.generators, self.latents, likelihood, self.learned_prior)


def check_latents(variables: int, classes: int, key: str = "variables") -> tuple[int, int]:
    """Raises ValueError for fewer than one variable, which `key` is for, or two classes."""
    positive(key, variables)
    if classes < 2:
        raise ValueError(f"classes must be >= 2, got {classes}")
    return variables, classes


def check_widths(**widths: list[int]) -> None:
    """Raises ValueError for a hidden layer without units."""
    for key, of_layers in widths.items():
        if any(width < 1 for width in of_layers):
            raise ValueError(f"{key} must be widths >= 1, got {of_layers}")


def categorical_mlp(
    shape: ImageShape,
    num_classes: int,
    *,
    variables: int,
    classes: int,
    encoder: list[int],
    decoder: list[int],
    activation: Activation,
    prior: Prior,
    layer_norm: bool = False,  # runs from before have no such key, nor the next
    logits_scale: float = 1.0,
) -> Networks:
    """One layer: q(y|x) and p(x|y) by fully connected networks, `encoder` and `decoder` their hidden widths.

    No hidden layer is the linear model of Maddison et al. 2017, 784-(20x10)-200-784 the one of Jang et al. 2017. The
    data's classes have no part in it. q(y|x) starts the surer of y the larger `logits_scale`: in many variables that
    start undecided, training finds codes of which each variable says a little, and wrongly (docs/categorical.md).
    Raises ValueError for sizes below 1, fewer than two classes, and a scale that is not above 0.
    """
    latents = check_latents(variables, classes)
    check_widths(encoder=encoder, decoder=decoder)
    if not (math.isfinite(logits_scale) and logits_scale > 0):
        raise ValueError(f"logits_scale must be > 0 and finite, got {logits_scale}")
    posterior = ToLogits(shape.size, encoder, *latents, activation, layer_norm, logits_scale)
    generator = FromClasses(*latents, decoder, shape.size, activation, layer_norm)
    return Networks([posterior], [generator], [latents], prior == "learned")


def categorical_two_layers(
    shape: ImageShape,
    num_classes: int,
    *,
    variables: int,
    classes: int,
    upper_variables: int,
    encoder: list[int],
    decoder: list[int],
    between: list[int],
    activation: Activation,
    prior: Prior,
    layer_norm: bool = False,  # runs from before have no such key
) -> Networks:
    """Two layers, q(y_2|y_1) q(y_1|x) and p(y_2) p(y_1|y_2) p(x|y_1), `between` the widths of what is in between.

    Raises ValueError as `categorical_mlp`.
    """
    lower, upper = check_latents(variables, classes), check_latents(upper_variables, classes, "upper_variables")
    check_widths(encoder=encoder, decoder=decoder, between=between)
    return Networks(
        [
            ToLogits(shape.size, encoder, *lower, activation, layer_norm),
            ToLogits(math.prod(lower), between, *upper, activation, layer_norm),
        ],
        [
            FromClasses(*lower, decoder, shape.size, activation, layer_norm),
            FromClasses(*upper, between[::-1], math.prod(lower), activation, layer_norm),
        ],
        [lower, upper],
        prior == "learned",
    )
