"""p(x|y,z) of the pixels given what the generator puts out, one number a pixel: four likelihoods.

A grey level v in 0..255 is the pixel x = v / 255, and pixels are independent given (y, z). All is computed in float32,
or float64 where the generator's output is. Scales are learned, one a channel for all pixels: with one of its own for
each pixel a generator is sure of the background and blind to the rest (as in Rybkin et al. 2021).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 256
HALF_LEVEL = 0.5 / (LEVELS - 1)
FIRST_SCALE = 0.1  # of the logistic and the Gaussian, before training
SMALL = 0.1  # below it series stand for quotients of two small numbers


class Likelihood(nn.Module):
    """What each likelihood gives, for generator outputs [S, B, D]; D pixels are channel by channel."""

    name = ""
    of_grey_levels = False  # whether log_prob is a log-probability of whole grey levels, which bits can be counted of

    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        """log p(x|y,z) [S, B], nats per image, of pixels x [B, D] in [0, 1]: normalised over all that x can be."""
        raise TypeError(f"{type(self).__name__} must define log_prob(outputs, x)")

    def mean(self, outputs: Tensor) -> Tensor:
        """E[x|y,z] [S, B, D], the picture to look at."""
        raise TypeError(f"{type(self).__name__} must define mean(outputs)")

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """A draw of x [S, B, D], from the generator alone."""
        raise TypeError(f"{type(self).__name__} must define sample(outputs, generator)")


class Bernoulli(Likelihood):
    """Outputs are logits of pixels 0 or 1.

    Of grey levels, log_prob is E[log p(b|y,z)], b the binary pixels drawn with the grey levels as probabilities. The
    bounds made from it bound E[log p(b)], by Jensen's inequality; none of them is a log-probability of the grey levels.
    """

    name = "bernoulli"

    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        return bernoulli_log_likelihood(outputs, x)

    def mean(self, outputs: Tensor) -> Tensor:
        return precise(outputs).sigmoid()

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        return torch.bernoulli(self.mean(outputs), generator=generator)


class ContinuousBernoulli(Likelihood):
    """A density on [0, 1], by logits l: log p(x|l) = x l - log((e^l - 1) / l).

    Loaiza-Ganem & Cunningham 2019. With u = l / 2 that is (x - 1/2) l - log(sinh(u) / u), which has no cancellation
    near l = 0, their lambda = 1/2.
    """

    name = "continuous_bernoulli"

    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        logits = precise(outputs)
        return ((x - 0.5) * logits - log_sinhc(logits / 2)).sum(dim=-1)

    def mean(self, outputs: Tensor) -> Tensor:
        """1/2 + (coth(u) - 1/u) / 2."""
        u = precise(outputs) / 2
        small = u.abs() < SMALL
        away = torch.where(small, 1.0, u)
        series = u / 3 * (1 - u.square() / 15 * (1 - u.square() * 2 / 21))
        return 0.5 + 0.5 * torch.where(small, series, 1 / away.tanh() - 1 / away)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """By the inverse of the distribution function, log(1 + r (e^l - 1)) / l, mirrored for l > 0."""
        logits = precise(outputs)
        uniform = torch.rand(logits.shape, dtype=logits.dtype, device=logits.device, generator=generator)
        downward = -logits.abs()
        near_half = downward > -1e-3
        away = torch.where(near_half, -1.0, downward)
        drawn = torch.where(near_half, uniform, torch.log1p(uniform * away.expm1()) / away).clamp(0, 1)
        return torch.where(logits > 0, 1 - drawn, drawn)


class LocationScale(Likelihood):
    """With a location 1/2 + output / 4 and a learned scale for each channel, which stays above `floor`.

    That line touches the sigmoid at 0: outputs are about as large as a Bernoulli's logits, and start at grey.
    """

    floor = 0.0

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((channels, 1), math.log(FIRST_SCALE)))

    @property
    def scale(self) -> Tensor:
        """[C, 1], never below the floor, and with a gradient even next to it."""
        return self.floor + self.log_scale.exp()

    def location(self, outputs: Tensor) -> Tensor:
        """[S, B, C, D / C] from outputs [S, B, D]."""
        return 0.5 + self.by_channel(outputs) / 4

    def by_channel(self, pixels: Tensor) -> Tensor:
        """[..., C, D / C] from [..., D], in float32 at least."""
        return precise(pixels).unflatten(-1, (len(self.log_scale), -1))


class Gaussian(LocationScale):
    """N(location, scale^2), a density on the real line in units of the range from black (0) to white (1).

    No noise is added to whole grey levels: it stays a density at them, and no probability. The floor, half of a grey
    level, keeps it finite where all images agree.
    """

    name = "gaussian"
    floor = HALF_LEVEL

    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        squares = (self.by_channel(x) - self.location(outputs)).square()
        pixels = squares.shape[-1]
        scale = self.scale.squeeze(-1)
        per_channel = -0.5 * squares.sum(dim=-1) / scale.square() - pixels * (scale.log() + 0.5 * math.log(2 * math.pi))
        return per_channel.sum(dim=-1)

    def mean(self, outputs: Tensor) -> Tensor:
        return self.location(outputs).flatten(-2)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        loc = self.location(outputs)
        noise = torch.randn(loc.shape, dtype=loc.dtype, device=loc.device, generator=generator)
        return (loc + self.scale * noise).flatten(-2)


class DiscretizedLogistic(LocationScale):
    """A probability of each whole grey level: the logistic's mass within half a level of it.

    Levels 0 and 255 have all that lies beyond them as well (Salimans et al. 2017, eq. 2). The logistic's location may
    leave [0, 1].
    """

    name = "discretized_logistic"
    of_grey_levels = True
    floor = 0.5 * math.exp(-7)  # that of PixelCNN++, whose pixels range over 2

    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        """With a and b the upper and the lower edge of x's bin, in scales from the location,

        log(sigmoid(a) - sigmoid(b)) = log sigmoid(a) + log sigmoid(-b) + log(1 - e^(b - a)),

        which is exact however far the bin is in a tail; at level 255 a is infinite, at level 0 -b.
        """
        pixels = self.by_channel(x)
        black, white = pixels < HALF_LEVEL, pixels > 1 - HALF_LEVEL
        half = HALF_LEVEL / self.scale
        centred = (pixels - self.location(outputs)) / self.scale
        below_upper = F.logsigmoid(half + centred).masked_fill(white, 0)
        above_lower = F.logsigmoid(half - centred).masked_fill(black, 0)
        between = (~(black | white)).sum(dim=-1) * (-torch.expm1(-2 * half)).log().squeeze(-1)
        return (below_upper + above_lower).sum(dim=(-2, -1)) + between.sum(dim=-1)

    def mean(self, outputs: Tensor) -> Tensor:
        """sum_v P(level >= v) / 255 over v = 1..255."""
        loc, scale = self.location(outputs), self.scale
        total = torch.zeros_like(loc)
        for level in range(1, LEVELS):
            total += ((loc + HALF_LEVEL - level / (LEVELS - 1)) / scale).sigmoid()
        return (total / (LEVELS - 1)).flatten(-2)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        loc = self.location(outputs)
        uniform = torch.rand(loc.shape, dtype=loc.dtype, device=loc.device, generator=generator)
        drawn = loc + self.scale * torch.logit(uniform, eps=torch.finfo(loc.dtype).eps)
        return ((drawn.clamp(0, 1) * (LEVELS - 1)).round() / (LEVELS - 1)).flatten(-2)


def likelihood(name: str, channels: int) -> Likelihood:
    """The likelihood of that name for images of so many channels, as it is before training."""
    made = {"bernoulli": Bernoulli, "continuous_bernoulli": ContinuousBernoulli}
    if name in made:
        return made[name]()
    return {"gaussian": Gaussian, "discretized_logistic": DiscretizedLogistic}[name](channels)


def precise(values: Tensor) -> Tensor:
    """In float32, or in float64 where it is."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def log_sinhc(u: Tensor) -> Tensor:
    """log(sinh(u) / u), 0 at 0, by |u| + log(1 - e^(-2|u|)) - log(2|u|), and by its series where u is small."""
    square, small = u.square(), u.abs() < SMALL
    series = square / 6 * (1 - square / 30 * (1 - square * 4 / 63))
    away = torch.where(small, 1.0, u).abs()
    return torch.where(small, series, away + (-(-2 * away).expm1()).log() - (2 * away).log())


def bernoulli_log_likelihood(pixel_logits: Tensor, x: Tensor) -> Tensor:
    """log p(x | logits) = sum_d x_d l_d - softplus(l_d), nats: [S, B] from logits [S, B, D] and pixels x [B, D]."""
    return torch.as_tensor(BernoulliLogLikelihood.apply(pixel_logits, x))


class BernoulliLogLikelihood(torch.autograd.Function):
    """With its gradient g (x - sigmoid(l)) written out, which takes half the passes over [S, B, D]."""

    @staticmethod
    def forward(ctx: Any, pixel_logits: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(pixel_logits, x)
        logits = precise(pixel_logits)
        return (x * logits).sub_(F.softplus(logits)).sum(dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        pixel_logits, x = ctx.saved_tensors
        # in bf16 the difference would be 0 for every white pixel that is likelier than 0.998
        residual = x - precise(pixel_logits).sigmoid()
        return residual.mul_(gradient.unsqueeze(-1)).to(pixel_logits.dtype), None
