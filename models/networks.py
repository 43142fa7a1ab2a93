"""The three networks, convolutional and fully connected.

Whatever depends on x alone is computed once per image: an inference network first turns x into features [B, H], then
features and class vectors y [S, B, K] into a Gaussian over z; so the classes of one image share its features. A linear
layer over (features, y) or (y, z) is the sum of two linear layers, which is how classes and samples share work.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.randomness import random_int16
from models.m2.model import Networks as Networks  # for networks of a person's own

ScaleFunction = Literal["softplus", "exp"]
MINIMUM_SCALE = 1e-4


@dataclass(frozen=True)
class ImageShape:
    """Channels and sides of an image, in pixels."""

    channels: int
    height: int
    width: int

    @property
    def size(self) -> int:
        return self.channels * self.height * self.width


class Dropout(nn.Module):
    """Inverted dropout whose mask comes from the generator that it is given; without one it is the identity.

    The probability is rounded to a multiple of 2^-16, and the scale is that of the rounded one.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        if not 0 <= probability < 1:
            raise ValueError(f"dropout must be in [0, 1), got {probability}")
        self.probability = probability
        self.kept = max(1, round((1 - probability) * 2**16))  # of 2^16

    def forward(self, input: Tensor, generator: torch.Generator | None) -> Tensor:
        if generator is None or self.kept == 2**16:
            return input
        mask = random_int16(input.shape, generator) < self.kept - 2**15
        return input * mask.to(input.dtype).mul_(2**16 / self.kept)


class RandomMotion(nn.Module):
    """Turns and shifts each image [B, C, H, W] by chance; without a generator, as in evaluation, it is the identity.

    The angle is uniform within +-`rotation` degrees and each shift within +-`shift` of that side, rounded up to whole
    pixels, as less than half of one would move nothing: a pixel's value is the nearest one's, so that binary images
    stay so, and 0 where the image has none. Raises ValueError for a rotation outside [0, 180] and a shift outside
    [0, 1].
    """

    def __init__(self, rotation: float, shift: float) -> None:
        super().__init__()
        if not 0 <= rotation <= 180:
            raise ValueError(f"rotation must be in [0, 180] degrees, got {rotation}")
        if not 0 <= shift <= 1:
            raise ValueError(f"shift must be in [0, 1], a part of the image's sides, got {shift}")
        self.rotation, self.shift = rotation, shift

    def forward(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        if generator is None or not (self.rotation or self.shift):
            return x
        batch, channels, height, width = x.shape
        chance = 2 * torch.rand(3, batch, 1, 1, device=x.device, generator=generator) - 1
        angle = chance[0] * math.radians(self.rotation)
        right = chance[1] * math.ceil(round(self.shift * width, 6))
        down = chance[2] * math.ceil(round(self.shift * height, 6))
        row = torch.arange(height, device=x.device).view(height, 1) - (height - 1) / 2
        column = torch.arange(width, device=x.device) - (width - 1) / 2
        from_row = (angle.cos() * row + angle.sin() * column + down + (height - 1) / 2).round().long()
        from_column = (angle.cos() * column - angle.sin() * row + right + (width - 1) / 2).round().long()
        inside = (from_row >= 0) & (from_row < height) & (from_column >= 0) & (from_column < width)
        source = from_row.clamp(0, height - 1) * width + from_column.clamp(0, width - 1)
        pixels = x.flatten(2).gather(2, source.view(batch, 1, -1).expand(-1, channels, -1))
        return (pixels * inside.view(batch, 1, -1)).view(x.shape)


def joined_linear(first: int, num_classes: int, out: int) -> tuple[nn.Linear, nn.Linear]:
    """A linear layer over the concatenation of `first` inputs and a class vector, as two layers to be added.

    Initialised as the one layer would be: with a scale of its own, y would outweigh the rest from the start, and the
    bounds of the classes differ by tens of nats before the classifier has learned anything.
    """
    layers = nn.Linear(first, out), nn.Linear(num_classes, out, bias=False)
    limit = (first + num_classes) ** -0.5
    for parameter in (layers[0].weight, layers[0].bias, layers[1].weight):
        nn.init.uniform_(parameter, -limit, limit)
    return layers


def once_if_shared(y: Tensor) -> Tensor:
    """y [S, 1, K] instead of y [S, B, K] where all images are given the same classes, as in an enumeration.

    What depends on y alone is then computed once, and enumeration costs as many steps as there are classes, not their
    square.
    """
    return y[:, :1] if y.stride(1) == 0 else y


def over_latent_and_class(from_latent: nn.Linear, from_class: nn.Linear, z: Tensor, y: Tensor) -> Tensor:
    """from_latent(z) + from_class(y) [S, B, H], for z [S, B, Z] and y [S, B, K].

    In one product of the joined weights, unless images share their classes, or there are more classes than rows S B
    and joining would cost more than it spares.
    """
    y = once_if_shared(y)
    *rows, num_classes = y.shape
    if y.shape[:-1] != z.shape[:-1] or num_classes > math.prod(rows):
        return from_class(y) + from_latent(z)
    weight = torch.cat([from_latent.weight, from_class.weight], dim=1)
    return F.linear(torch.cat([z, y], dim=-1), weight, from_latent.bias)


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
        rotation: float = 0.0,
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.motion = RandomMotion(rotation, shift)
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


def halvings(shape: ImageShape, side: int) -> list[tuple[int, int]]:
    """An image's sides as it is halved, rounding up, until the shorter is at most `side`: from the first to the last.

    So networks fit images of any size: 28 x 28 is halved three times to 4 x 4, 8 x 8 once, 128 x 96 five times.
    """
    sides = [(shape.height, shape.width)]
    while min(sides[-1]) > side:
        height, width = sides[-1]
        sides.append(((height + 1) // 2, (width + 1) // 2))
    return sides


class ConvTrunk(nn.Module):
    """Convolutional layers, [B, C, H, W] -> [B, F], that halve the sides until one is at most 7, and one layer more."""

    def __init__(self, shape: ImageShape, channels: int) -> None:
        super().__init__()
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
            hidden = F.relu(layer(hidden))
        return hidden.flatten(1)


class ConvClassifier(nn.Module):
    """q(y|x): logits [B, K] from images [B, C, H, W], three convolutions or more (Jang et al. 2017, section 4.3).

    Overlapping max-pooling halves the sides until one is at most 4. It and batch normalisation are what 100 labels
    need: on MNIST they take a classifier trained on the labels alone from 81 % to 90 %.
    """

    def __init__(
        self, shape: ImageShape, num_classes: int, channels: int, dropout: float, rotation: float, shift: float
    ) -> None:
        super().__init__()
        self.motion = RandomMotion(rotation, shift)
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
    ) -> None:
        super().__init__()
        self.trunk = ConvTrunk(shape, channels)
        self.from_image, self.from_class = joined_linear(self.trunk.size, num_classes, hidden)
        self.head = GaussianHead(hidden, latent_size, scale)

    def features(self, x: Tensor) -> Tensor:
        return self.from_image(self.trunk(x))

    def forward(self, features: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(F.relu(features.unsqueeze(0) + self.from_class(once_if_shared(y))))


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
    kernel where p = 0, and -, 2, 0 where p = 1 (Shi et al. 2016, section 3.2). With O = 1 a CPU takes half the time.
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

    def __init__(self, shape: ImageShape, num_classes: int, latent_size: int, channels: int) -> None:
        super().__init__()
        self.shape = shape
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
            hidden = layer(F.relu(hidden))
        pixels = hidden[:, :, : self.shape.height, : self.shape.width]
        return pixels.reshape(samples, batch, self.shape.size)


NetworkBuilder = Callable[[ImageShape, int], Networks]


def _check_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")


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
) -> Networks:
    """The M2 model of Kingma et al. 2014: one hidden layer in each network.

    In training q(y|x) sees its images turned and shifted by chance, within `rotation` degrees and `shift` of a side;
    J stays a bound, as any q(y|x) will do for one. Raises ValueError for sizes below 1, dropout outside [0, 1), and
    what `RandomMotion` refuses.
    """
    _check_positive(latent_size=latent_size, hidden=hidden)
    return Networks(
        MLPClassifier(shape, num_classes, hidden, dropout, rotation, shift),
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
    rotation: float = 0.0,
    shift: float = 0.0,
) -> Networks:
    """The networks of Jang et al. 2017, section 4.3: `channels` at half resolution, twice as many at a quarter.

    In training q(y|x) sees its images turned and shifted by chance, within `rotation` degrees and `shift` of a side;
    J stays a bound, as any q(y|x) will do for one. Raises ValueError for sizes below 1, dropout outside [0, 1), and
    what `RandomMotion` refuses.
    """
    _check_positive(latent_size=latent_size, channels=channels, hidden=hidden)
    return Networks(
        ConvClassifier(shape, num_classes, channels, dropout, rotation, shift),
        ConvInference(shape, num_classes, latent_size, channels, hidden, scale),
        ConvGenerator(shape, num_classes, latent_size, channels),
        num_classes,
        latent_size,
    )
