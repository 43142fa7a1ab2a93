"""Parts that networks of every family are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.randomness import random_int16
from estimators.shared import drawn

Activation = Literal["relu", "leaky_relu", "silu", "tanh"]
ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


def positive(name: str, size: int) -> None:
    """Raises ValueError for a size below 1."""
    if size < 1:
        raise ValueError(f"{name} must be >= 1, got {size}")


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
        chance = drawn(lambda shape: random_int16(torch.Size(shape), generator), input.shape, 0, generator)
        mask = torch.lt(chance, self.kept - 2**15, out=torch.empty_like(input, requires_grad=False))  # 0 and 1
        return input * mask.mul_(2**16 / self.kept)


class RandomMotion(nn.Module):
    """Turns, shifts and distorts each image [B, C, H, W] by chance; without a generator, as in evaluation, it does not.

    The angle is uniform within +-`rotation` degrees and each shift within +-`shift` of that side, rounded up to whole
    pixels, as less than half of one would move nothing: a pixel's value is the nearest one's, so that binary images
    stay so, and 0 where the image has none. What a `distortion` of 1 does is in `distorted` and `redrawn`, and a
    smaller one does less; an objective may set the `share` of it that a step has. Raises ValueError for a rotation
    outside [0, 180], a shift or a distortion outside [0, 1].
    """

    def __init__(self, rotation: float = 0.0, shift: float = 0.0, distortion: float = 0.0) -> None:
        super().__init__()
        if not 0 <= rotation <= 180:
            raise ValueError(f"rotation must be in [0, 180] degrees, got {rotation}")
        if not 0 <= shift <= 1:
            raise ValueError(f"shift must be in [0, 1], a part of the image's sides, got {shift}")
        if not 0 <= distortion <= 1:
            raise ValueError(f"distortion must be in [0, 1], got {distortion}")
        self.rotation, self.shift, self.distortion = rotation, shift, distortion
        self.moves = rotation > 0 or shift > 0 or distortion > 0
        self.share: float | Tensor = 1.0

    def forward(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        if generator is None or not self.moves:
            return x
        batch, channels, height, width = x.shape
        chance = uniform((3, batch, 1, 1), x.device, generator)
        angle = chance[0] * math.radians(self.rotation)
        right = chance[1] * math.ceil(round(self.shift * width, 6))
        down = chance[2] * math.ceil(round(self.shift * height, 6))
        row = torch.arange(height, device=x.device).view(height, 1) - (height - 1) / 2
        column = torch.arange(width, device=x.device) - (width - 1) / 2
        rows, columns = angle.cos() * row + angle.sin() * column, angle.cos() * column - angle.sin() * row
        by: float | Tensor = 0.0
        if self.distortion:
            by = self.share * self.distortion
            chances, field = distortion_noise(batch, x.device, generator)  # of a share of 0 too: others draw after it
        distorts = isinstance(by, Tensor) or by > 0
        if distorts:
            rows, columns = distorted(rows, columns, by, chances, field)
        from_row = (rows + down + (height - 1) / 2).round().long()
        from_column = (columns + right + (width - 1) / 2).round().long()
        inside = (from_row >= 0) & (from_row < height) & (from_column >= 0) & (from_column < width)
        source = from_row.clamp(0, height - 1) * width + from_column.clamp(0, width - 1)
        pixels = x.flatten(2).gather(2, source.view(batch, 1, -1).expand(-1, channels, -1))
        moved = (pixels * inside.view(batch, 1, -1)).view(x.shape)
        return redrawn(moved, 0.2 * by, chances[3]) if distorts else moved


def uniform(shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> Tensor:
    """Uniform within +-1, of a shape whose second dimension is the images."""
    return 2 * drawn(lambda whole: torch.rand(whole, device=device, generator=generator), shape, 1, generator) - 1


def distortion_noise(batch: int, device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """By what images are distorted: uniform within +-1 [4, B, 1, 1], and normal [B, 2, 4, 4]."""

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    return uniform((4, batch, 1, 1), device, generator), drawn(normal, (batch, 2, 4, 4), 0, generator)


def distorted(
    rows: Tensor, columns: Tensor, by: float | Tensor, chances: Tensor, field: Tensor
) -> tuple[Tensor, Tensor]:
    """Where each pixel comes from, each [B, H, W], of images that are sheared, stretched and warped too, by the noise.

    With `by` 1 the slant is within +-0.3, each side's factor within exp(+-0.2), and a smooth field moves each point by
    about a 28th of a side, either way: normal on a grid of 4 x 4, bicubic in between (Simard et al. 2003 blur noise).
    """
    height, width = rows.shape[1:]
    slant, taller, wider = by * chances[:3]
    field = by / 28 * field
    with torch.autocast(field.device.type, enabled=False):  # a place in bf16 may be a fifth of a pixel off
        down, right = (bicubic(height, field).mT @ field @ bicubic(width, field)).unbind(dim=1)
    columns = (columns + 0.3 * slant * rows) * (0.2 * wider).exp() + width * right
    return rows * (0.2 * taller).exp() + height * down, columns


def bicubic(size: int, like: Tensor) -> Tensor:
    """The weights [4, size] of four numbers in each of `size` that are interpolated between them.

    A CPU does two products with them far sooner than `F.interpolate` of a field.
    """
    corners = torch.eye(4, device=like.device, dtype=like.dtype)
    return F.interpolate(corners[None, None], size=(4, size), mode="bicubic", align_corners=False)[0, 0]


def redrawn(x: Tensor, chance: float | Tensor, number: Tensor) -> Tensor:
    """Images [B, C, H, W] of which a part `chance` has strokes a pixel thicker, and as many a pixel thinner.

    Which they are, a `number` [B, 1, 1] within +-1 says for each. A pixel becomes the brightest, or the darkest, of
    itself and those above, to its left, and between these.
    """
    of_each = number.view(-1, 1, 1, 1)
    thicker, thinner = (extreme(x, of_two) for of_two in (torch.maximum, torch.minimum))
    return torch.where(of_each < 2 * chance - 1, thicker, torch.where(of_each > 1 - 2 * chance, thinner, x))


def extreme(x: Tensor, of_two: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """At each pixel of x [B, C, H, W] the greatest or least of it and those above, left, and between; 0 outside."""
    padded = F.pad(x, (1, 0, 1, 0))
    rows = of_two(padded[..., 1:, :], padded[..., :-1, :])
    return of_two(rows[..., 1:], rows[..., :-1])


def joined_linear(first: int, num_classes: int, out: int) -> tuple[nn.Linear, nn.Linear]:
    """A linear layer over the concatenation of `first` inputs and a class vector, as two layers to be added.

    Initialised as the one layer would be: with a scale of its own, y would outweigh the rest from the start, and the
    bounds of the classes differ by tens of nats before the classifier has learned anything.
    """
    from_first, from_class = joined_linears([first, num_classes], out)
    return from_first, from_class


def joined_linears(sizes: Sequence[int], out: int) -> list[nn.Linear]:
    """A linear layer over the concatenation of so many inputs, as layers to be added, of which the first has the bias.

    Initialised as the one layer would be.
    """
    layers = [nn.Linear(size, out, bias=index == 0) for index, size in enumerate(sizes)]
    limit = sum(sizes) ** -0.5
    for parameter in (layers[0].weight, layers[0].bias, *(layer.weight for layer in layers[1:])):
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


def halvings(shape: ImageShape, side: int) -> list[tuple[int, int]]:
    """An image's sides as it is halved, rounding up, until the shorter is at most `side`: from the first to the last.

    So networks fit images of any size: 28 x 28 is halved three times to 4 x 4, 8 x 8 once, 128 x 96 five times.
    """
    sides = [(shape.height, shape.width)]
    while min(sides[-1]) > side:
        height, width = sides[-1]
        sides.append(((height + 1) // 2, (width + 1) // 2))
    return sides
