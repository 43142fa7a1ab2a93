"""The three networks, convolutional and fully connected.

Whatever depends on x alone is computed once per image: an inference network first turns x into features [B, H], then
features and class vectors y [S, B, K] into a Gaussian over z; so the classes of one image share its features. A linear
layer over (features, y) or (y, z) is the sum of two linear layers, which is how classes and samples share work.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.m2.model import Networks as Networks  # for networks of a person's own, as ImageShape is
from models.parts import (
    ACTIVATIONS,
    Activation,
    Dropout,
    RandomMotion,
    halvings,
    joined_linear,
    once_if_shared,
    over_latent_and_class,
    positive,
)
from models.parts import ImageShape as ImageShape

ScaleFunction = Literal["softplus", "exp"]
MINIMUM_SCALE = 1e-4


class GaussianHead(nn.Module):
    """q(z|x,y) from the hidden layer [S, B, H]: loc and scale, each [S, B, Z]."""

    def __init__(self, features: int, latent_size: int, scale: ScaleFunction) -> None:
        super().__init__()
        self.parameters_of_z = nn.Linear(features, 2 * latent_size)
        self.scale = scale

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        loc, raw_scale = self.parameters_of_z(hidden).float().chunk(2, dim=-1)
        scale = F.softplus(raw_scale) if self.scale == "softplus" else raw_scale.exp()
        return loc, scale + MINIMUM_SCALE


class MLPClassifier(nn.Module):
    """q(y|x): logits [B, K] from images [B, C, H, W]."""

    def __init__(
        self,
        shape: ImageShape,
        num_classes: int,
        hidden: int,
        dropout: float,
        motion: RandomMotion | None = None,
    ) -> None:
        super().__init__()
        self.motion = motion or RandomMotion()
        self.hidden = nn.Linear(shape.size, hidden)
        self.dropout = Dropout(dropout)
        self.logits = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        hidden = F.relu(self.hidden(self.motion(x, generator).flatten(1)), inplace=True)
        return self.logits(self.dropout(hidden, generator)).float()


class MLPInference(nn.Module):
    """q(z|x,y): one hidden layer over (x, y)."""

    def __init__(
        self, shape: ImageShape, num_classes: int, latent_size: int, hidden: int, scale: ScaleFunction
    ) -> None:
        super().__init__()
        self.from_image, self.from_class = joined_linear(shape.size, num_classes, hidden)
        self.head = GaussianHead(hidden, latent_size, scale)

    def features(self, x: Tensor) -> Tensor:
        return self.from_image(x.flatten(1))

    def forward(self, features: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(F.relu(features.unsqueeze(0) + self.from_class(once_if_shared(y)), inplace=True))


class MLPGenerator(nn.Module):
    """p(x|y,z): a number a pixel [S, B, D], from y [S, B, K] and z [S, B, Z], one hidden layer."""

    def __init__(self, shape: ImageShape, num_classes: int, latent_size: int, hidden: int) -> None:
        super().__init__()
        self.from_latent, self.from_class = joined_linear(latent_size, num_classes, hidden)
        self.pixels = nn.Linear(hidden, shape.size)

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return self.pixels(F.relu(over_latent_and_class(self.from_latent, self.from_class, z, y), inplace=True))


class ConvTrunk(nn.Module):
    """Convolutional layers, [B, C, H, W] -> [B, F], that halve the sides until one is at most 7, and one layer more."""

    def __init__(self, shape: ImageShape, channels: int, activation: Activation = "relu") -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]()
        sides = halvings(shape, 7)
        strides = [2] * (len(sides) - 1) + [1]
        widths = [shape.channels, channels] + [2 * channels] * (len(strides) - 1)
        self.layers = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], size := 5 if i == 0 else 3, stride=stride, padding=size // 2)
            for i, stride in enumerate(strides)
        )
        self.size = widths[-1] * math.prod(sides[-1])

    def forward(self, x: Tensor) -> Tensor:
        hidden = x
        for layer in self.layers:
            hidden = self.activation(layer(hidden))
        return hidden.flatten(1)


class ConvClassifier(nn.Module):
    """q(y|x): logits [B, K] from images [B, C, H, W], three convolutions or more (Jang et al. 2017, section 4.3).

    Overlapping max-pooling halves the sides until one is at most 4. It and batch normalisation are what 100 labels
    need: on MNIST they take a classifier trained on the labels alone from 81 % to 90 %.
    """

    def __init__(
        self, shape: ImageShape, num_classes: int, channels: int, dropout: float, motion: RandomMotion | None = None
    ) -> None:
        super().__init__()
        self.motion = motion or RandomMotion()
        sides = halvings(shape, 4)
        poolings = len(sides) - 1
        layers = max(3, poolings)
        self.strides = [1] * (layers - poolings) + [2] * poolings
        widths = [shape.channels, channels, 2 * channels] + [4 * channels] * (layers - 2)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], size := 5 if i == 0 else 3, padding=size // 2) for i in range(layers)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.dropout = Dropout(dropout)
        self.logits = nn.Linear(widths[-1] * math.prod(sides[-1]), num_classes)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        hidden = self.motion(x, generator)
        for convolution, norm, stride in zip(self.convolutions, self.norms, self.strides, strict=True):
            hidden = convolution(hidden)
            if stride == 2:
                hidden = F.max_pool2d(hidden, 3, stride=2, padding=1)
            hidden = F.relu(norm(hidden))
        return self.logits(self.dropout(hidden.flatten(1), generator)).float()


class ConvInference(nn.Module):
    """q(z|x,y): three convolutional layers over x, then y joins (Jang et al. 2017, section 4.3)."""

    def __init__(
        self,
        shape: ImageShape,
        num_classes: int,
        latent_size: int,
        channels: int,
        hidden: int,
        scale: ScaleFunction,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]()
        self.trunk = ConvTrunk(shape, channels, activation)
        self.from_image, self.from_class = joined_linear(self.trunk.size, num_classes, hidden)
        self.head = GaussianHead(hidden, latent_size, scale)

    def features(self, x: Tensor) -> Tensor:
        return self.from_image(self.trunk(x))

    def forward(self, features: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.activation(features.unsqueeze(0) + self.from_class(once_if_shared(y))))


class TransposedConvSameSize(nn.ConvTranspose2d):
    """A transposed convolution of kernel 3, stride 1, padding 1, computed as the convolution that it is.

    [B, I, H, W] -> [B, O, H, W]. For 1,000 images that takes half the time on a CPU (docs/performance.md).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return F.conv2d(input, self.weight.flip(2, 3).transpose(0, 1), self.bias, padding=1)


class TransposedConvDoubleSize(nn.ConvTranspose2d):
    """A transposed convolution of kernel 4, stride 2, padding 1, computed as a convolution of kernel 3.

    [B, I, H, W] -> [B, O, 2H, 2W]. Each of the four pixels that an input pixel becomes sees 3 x 3 inputs, through the
    taps that reach it and zeros: row 2h + p of the output sees the rows h - 1, h, h + 1 through rows 3, 1, - of the
    kernel where p = 0, and -, 2, 0 where p = 1 (Shi et al. 2016, section 2.2). With O = 1 a CPU takes half the time.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 4, stride=2, padding=1)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        inputs, outputs, _, _ = self.weight.shape
        taps = F.pad(self.weight, (1, 1, 1, 1)).reshape(inputs, outputs, 3, 2, 3, 2).flip(2, 4)
        kernels = taps.permute(1, 3, 5, 0, 2, 4).reshape(4 * outputs, inputs, 3, 3)
        assert self.bias is not None
        return F.pixel_shuffle(F.conv2d(input, kernels, self.bias.repeat_interleave(4), padding=1), 2)


class ConvGenerator(nn.Module):
    """p(x|y,z): a number a pixel [S, B, D], transposed convolutions, four for 28 x 28 (Jang et al. 2017, section 4.3).

    The first one, from 1 x 1 to sides of at most 7, is written as the linear layer that it is.
    """

    def __init__(
        self,
        shape: ImageShape,
        num_classes: int,
        latent_size: int,
        channels: int,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self.shape = shape
        self.activation = ACTIVATIONS[activation]()
        *doubled, last = halvings(shape, 7)
        self.grid = (2 * channels, *last)
        self.from_latent, self.from_class = joined_linear(latent_size, num_classes, math.prod(self.grid))
        self.layers = nn.ModuleList([TransposedConvSameSize(2 * channels, 2 * channels)])
        width = 2 * channels
        for left in range(len(doubled) - 1, 0, -1):
            narrower = channels if left == 1 else width
            self.layers.append(nn.ConvTranspose2d(width, narrower, 4, stride=2, padding=1))
            width = narrower
        to_pixels = TransposedConvDoubleSize if doubled else TransposedConvSameSize
        self.layers.append(to_pixels(width, shape.channels))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        samples, batch, _ = z.shape
        channels, height, width = self.grid
        hidden = over_latent_and_class(self.from_latent, self.from_class, z, y)
        # channels last in memory, which convolutions are faster on
        hidden = hidden.view(samples * batch, height, width, channels).permute(0, 3, 1, 2)
        for layer in self.layers:
            hidden = layer(self.activation(hidden))
        pixels = hidden[:, :, : self.shape.height, : self.shape.width]
        return pixels.reshape(samples, batch, self.shape.size)


def mlp(
    shape: ImageShape,
    num_classes: int,
    *,
    latent_size: int,
    hidden: int,
    dropout: float,
    scale: ScaleFunction,
    rotation: float = 0.0,
    shift: float = 0.0,
    distortion: float = 0.0,
) -> Networks:
    """The M2 model of Kingma et al. 2014: one hidden layer in each network.

    In training q(y|x) sees its images turned and shifted by chance, within `rotation` degrees and `shift` of a side,
    and distorted; J stays a bound, as any q(y|x) will do for one. Raises ValueError for sizes below 1, dropout outside
    [0, 1), and what `RandomMotion` refuses.
    """
    positive("latent_size", latent_size)
    positive("hidden", hidden)
    return Networks(
        MLPClassifier(shape, num_classes, hidden, dropout, RandomMotion(rotation, shift, distortion)),
        MLPInference(shape, num_classes, latent_size, hidden, scale),
        MLPGenerator(shape, num_classes, latent_size, hidden),
        num_classes,
        latent_size,
    )


def conv(
    shape: ImageShape,
    num_classes: int,
    *,
    latent_size: int,
    channels: int,
    hidden: int,
    dropout: float,
    scale: ScaleFunction,
    activation: Activation = "relu",
    rotation: float = 0.0,
    shift: float = 0.0,
    distortion: float = 0.0,
) -> Networks:
    """The networks of Jang et al. 2017, section 4.3: `channels` at half resolution, twice as many at a quarter.

    In training q(y|x) sees its images turned and shifted by chance, within `rotation` degrees and `shift` of a side,
    and distorted; J stays a bound, as any q(y|x) will do for one. Raises ValueError for sizes below 1, dropout outside
    [0, 1), and what `RandomMotion` refuses.
    """
    positive("latent_size", latent_size)
    positive("channels", channels)
    positive("hidden", hidden)
    return Networks(
        ConvClassifier(shape, num_classes, channels, dropout, RandomMotion(rotation, shift, distortion)),
        ConvInference(shape, num_classes, latent_size, channels, hidden, scale, activation),
        ConvGenerator(shape, num_classes, latent_size, channels, activation),
        num_classes,
        latent_size,
    )
