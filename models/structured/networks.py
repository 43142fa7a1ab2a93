"""The networks from the upper half of an image to the lower one, through layers of categorical variables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from models import contract
from models.categorical.networks import FromClasses, ToLogits, check_latents, check_widths
from models.likelihoods import Likelihood
from models.parts import Activation, ImageShape, positive
from models.structured.model import StructuredModel


@dataclass
class Networks(contract.Networks):
    """`layers`, p(y_1|upper half) and p(y_l|y_l-1), each [R, ...] -> logits [R, N, K]; and p(lower half|y_L)."""

    layers: list[nn.Module]
    generator: nn.Module
    latents: list[tuple[int, int]]

    def model(self, likelihood: Likelihood, prior: Sequence[float]) -> StructuredModel:
        return StructuredModel(self.layers, self.generator, self.latents, likelihood)


def structured_mlp(
    shape: ImageShape,
    num_classes: int,
    *,
    layers: int,
    variables: int,
    classes: int,
    encoder: list[int],
    between: list[int],
    decoder: list[int],
    activation: Activation,
    layer_norm: bool = False,  # runs from before have no such key
) -> Networks:
    """Fully connected: 392-(20x10)-(20x10)-392 of Jang et al. 2017, section 4.1, is two layers without hidden ones.

    `encoder`, `between` and `decoder` are the hidden widths before, between and after the layers of variables. The
    data's classes have no part in it. Raises ValueError for sizes below 1, fewer than two classes, images of one row.
    """
    positive("layers", layers)
    latents = [check_latents(variables, classes)] * layers
    check_widths(encoder=encoder, between=between, decoder=decoder)
    if shape.height < 2:
        raise ValueError(f"model must be another for images of one row, got {shape.height} x {shape.width} pixels")
    upper = shape.channels * (shape.height // 2) * shape.width
    first = ToLogits(upper, encoder, variables, classes, activation, layer_norm)
    others = [
        ToLogits(math.prod(latents[0]), between, variables, classes, activation, layer_norm) for _ in range(layers - 1)
    ]
    generator = FromClasses(variables, classes, decoder, shape.size - upper, activation, layer_norm)
    return Networks([first, *others], generator, latents)
