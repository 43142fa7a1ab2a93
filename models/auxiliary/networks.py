"""The networks of auxiliary deep generative models: those of M2, and what a adds to them.

A network that a joins has one linear layer more, from a to its first hidden layer over (x, y): a depends on no class,
so that is done once an image, as what depends on x is. Nothing inside b(x, y) has batch statistics.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.auxiliary.model import Networks
from models.networks import (
    ConvClassifier,
    ConvGenerator,
    ConvInference,
    ConvTrunk,
    GaussianHead,
    MLPClassifier,
    MLPGenerator,
    MLPInference,
    ScaleFunction,
)
from models.parts import (
    ACTIVATIONS,
    Activation,
    ImageShape,
    RandomMotion,
    joined_linears,
    over_latent_and_class,
    positive,
)


class Auxiliary(nn.Module):
    """q(a|x) from a network of images [B, C, H, W] to its last hidden layer [B, H], before the nonlinearity."""

    def __init__(
        self,
        from_image: nn.Module,
        hidden: int,
        auxiliary_size: int,
        scale: ScaleFunction,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self.from_image = from_image
        self.activation = ACTIVATIONS[activation]()
        self.head = GaussianHead(hidden, auxiliary_size, scale)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.activation(self.from_image(x)))


class Classifier(nn.Module):
    """q(y|a,x) from M2's classifier, with `hidden` outputs for K, that a joins."""

    def __init__(self, from_image: nn.Module, hidden: int, auxiliary_size: int, num_classes: int) -> None:
        super().__init__()
        self.from_image = from_image
        self.from_auxiliary = from_auxiliary(auxiliary_size, hidden)
        self.logits = nn.Linear(hidden, num_classes)

    def features(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        features: Tensor = self.from_image(x, generator)
        return features

    def forward(self, features: Tensor, a: Tensor) -> Tensor:
        return self.logits(F.relu(features + self.from_auxiliary(a))).float()


class Inference(nn.Module):
    """q(z|a,x,y) from M2's q(z|x,y), that a joins."""

    def __init__(self, from_image_and_class: MLPInference | ConvInference, hidden: int, auxiliary_size: int) -> None:
        super().__init__()
        self.from_image_and_class = from_image_and_class
        self.from_auxiliary = from_auxiliary(auxiliary_size, hidden)

    def features(self, x: Tensor, a: Tensor) -> Tensor:
        return self.from_image_and_class.features(x) + self.from_auxiliary(a)

    def forward(self, features: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = self.from_image_and_class(features, y)
        return loc, scale


class AuxiliaryGenerator(nn.Module):
    """p(a|x,y,z), one hidden layer over (z, y) and what a network of images gives [B, H]; without one p(a|y,z)."""

    def __init__(
        self,
        from_image: nn.Module | None,
        num_classes: int,
        latent_size: int,
        hidden: int,
        auxiliary_size: int,
        scale: ScaleFunction,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self.from_image = from_image
        self.activation = ACTIVATIONS[activation]()
        self.from_latent, self.from_class = joined_linears([latent_size, num_classes], hidden)
        self.head = GaussianHead(hidden, auxiliary_size, scale)

    def features(self, x: Tensor) -> Tensor:
        return x.new_empty(len(x), 0) if self.from_image is None else self.from_image(x)

    def forward(self, features: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        hidden = over_latent_and_class(self.from_latent, self.from_class, z, y)
        return self.head(self.activation(hidden if self.from_image is None else hidden + features))


def from_auxiliary(auxiliary_size: int, hidden: int) -> nn.Linear:
    """From a to a hidden layer that it joins, no stronger at first than one of as many inputs as that layer's width."""
    layer = nn.Linear(auxiliary_size, hidden, bias=False)
    limit = (auxiliary_size + hidden) ** -0.5
    nn.init.uniform_(layer.weight, -limit, limit)
    return layer


def deeper(network: nn.Module, last: str, hidden: int, layers: int) -> None:
    """Puts further hidden layers before the last layer of a network of one hidden layer, to so many in all."""
    more = [nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU()) for _ in range(layers - 1)]
    if more:
        setattr(network, last, nn.Sequential(*more, getattr(network, last)))


def check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        positive(name, size)


def auxiliary_mlp(
    shape: ImageShape,
    num_classes: int,
    *,
    latent_size: int,
    auxiliary_size: int,
    hidden: int,
    dropout: float,
    scale: ScaleFunction,
    skip: bool,
    hidden_layers: int = 1,
    rotation: float = 0.0,
    shift: float = 0.0,
    distortion: float = 0.0,
) -> Networks:
    """Networks of `hidden_layers`, and two in q(y|a,x); a of `auxiliary_size`; SDGM where `skip`.

    y, z and a join x in the first hidden layer, a in q(y|a,x) in the second. In training q(a|x) and q(y|a,x) see images
    moved by chance, as q(y|x) of M2 does. Raises ValueError for sizes below 1, dropout outside [0, 1), and what
    `RandomMotion` refuses.
    """
    check_sizes(latent_size=latent_size, auxiliary_size=auxiliary_size, hidden=hidden, hidden_layers=hidden_layers)

    def image() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(shape.size, hidden))

    auxiliary = Auxiliary(image(), hidden, auxiliary_size, scale)
    inference = MLPInference(shape, num_classes, latent_size, hidden, scale)
    generator = MLPGenerator(shape, num_classes, latent_size + (auxiliary_size if skip else 0), hidden)
    of_auxiliary = AuxiliaryGenerator(
        None if skip else image(), num_classes, latent_size, hidden, auxiliary_size, scale
    )
    for network, last in ((auxiliary, "head"), (inference, "head"), (generator, "pixels"), (of_auxiliary, "head")):
        deeper(network, last, hidden, hidden_layers)
    return Networks(
        RandomMotion(rotation, shift, distortion),
        auxiliary,
        Classifier(MLPClassifier(shape, hidden, hidden, dropout), hidden, auxiliary_size, num_classes),
        Inference(inference, hidden, auxiliary_size),
        generator,
        of_auxiliary,
        num_classes,
        latent_size,
        auxiliary_size,
        skip,
    )


def auxiliary_conv(
    shape: ImageShape,
    num_classes: int,
    *,
    latent_size: int,
    auxiliary_size: int,
    channels: int,
    hidden: int,
    dropout: float,
    scale: ScaleFunction,
    skip: bool,
    activation: Activation = "relu",
    rotation: float = 0.0,
    shift: float = 0.0,
    distortion: float = 0.0,
) -> Networks:
    """M2's convolutional networks with an auxiliary a of `auxiliary_size`; SDGM where `skip`.

    In training q(a|x) and q(y|a,x) see images moved by chance, as q(y|x) of M2 does. Raises ValueError for sizes below
    1, dropout outside [0, 1), and what `RandomMotion` refuses.
    """
    check_sizes(latent_size=latent_size, auxiliary_size=auxiliary_size, channels=channels, hidden=hidden)

    def image() -> nn.Module:
        trunk = ConvTrunk(shape, channels, activation)
        return nn.Sequential(trunk, nn.Linear(trunk.size, hidden))

    classifier = ConvClassifier(shape, hidden, channels, dropout)
    return Networks(
        RandomMotion(rotation, shift, distortion),
        Auxiliary(image(), hidden, auxiliary_size, scale, activation),
        Classifier(classifier, hidden, auxiliary_size, num_classes),
        Inference(
            ConvInference(shape, num_classes, latent_size, channels, hidden, scale, activation), hidden, auxiliary_size
        ),
        ConvGenerator(shape, num_classes, latent_size + (auxiliary_size if skip else 0), channels, activation),
        AuxiliaryGenerator(
            None if skip else image(), num_classes, latent_size, hidden, auxiliary_size, scale, activation
        ),
        num_classes,
        latent_size,
        auxiliary_size,
        skip,
    )
