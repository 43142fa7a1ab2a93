"""The semi-supervised VAE: a classifier, an inference network and a generator, wired into the bound b(x, y)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.likelihoods import Bernoulli, Likelihood
from models.networks import Networks


@dataclass
class Bound:
    """b(x, y) = reconstruction - kl_z, each [S, B], in nats per image."""

    reconstruction: Tensor
    kl_z: Tensor

    @property
    def value(self) -> Tensor:
        return self.reconstruction - self.kl_z

    def of_images(self, rows: slice) -> Bound:
        return Bound(self.reconstruction[:, rows], self.kl_z[:, rows])


def gaussian_kl(loc: Tensor, scale: Tensor) -> Tensor:
    """KL(N(loc, scale^2) || N(0, I)) summed over the last axis, nats (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (loc.square() + scale.square() - 1 - 2 * scale.log()).sum(dim=-1)


class SemiSupervisedVAE(nn.Module):
    """M2 (Kingma et al. 2014): q(y|x), q(z|x,y) = N(loc, scale^2), p(x|y,z) by `likelihood`, p(y), p(z) = N(0, I).

    `likelihood` is Bernoulli and `prior`, the K probabilities p(y), uniform where they are not given.
    """

    log_prior: Tensor | None  # log p(y) [K]; None where it is uniform

    def __init__(
        self, networks: Networks, likelihood: Likelihood | None = None, prior: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        self.classifier = networks.classifier
        self.inference = networks.inference
        self.generator = networks.generator
        self.num_classes = networks.num_classes
        self.latent_size = networks.latent_size
        self.likelihood = Bernoulli() if likelihood is None else likelihood
        self.prior = [1 / self.num_classes] * self.num_classes if prior is None else list(prior)
        is_uniform = len(set(self.prior)) == 1
        log_prior = None if is_uniform else torch.tensor([math.log(probability) for probability in self.prior])
        self.register_buffer("log_prior", log_prior, persistent=False)  # a checkpoint has it from the configuration

    def bound(self, x: Tensor, features: Tensor, y: Tensor, noise: Tensor) -> Bound:
        """b(x, y) at y [S, B, K] for images x [B, C, H, W] with features [B, H], by one draw of z a class.

        z = loc + scale * noise (Kingma & Welling 2014, section 2.4); noise [B, Z] is shared over S.
        """
        loc, scale = self.inference(features, y)
        outputs = self.generator(y, loc + scale * noise)
        return Bound(self.likelihood.log_prob(outputs, x.flatten(1)), gaussian_kl(loc, scale))

    def log_weight(self, x: Tensor, features: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        """log [p(x|y,z) p(z) / q(z|x,y)] [S, B] at the z of `bound`: its mean is b(x, y), its mean exp p(x|y)."""
        loc, scale = self.inference(features, y)
        z = loc + scale * noise
        log_prior_ratio = (0.5 * (noise.square() - z.square()) + scale.log()).sum(dim=-1)
        return self.likelihood.log_prob(self.generator(y, z), x.flatten(1)) + log_prior_ratio

    def draw_noise(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Standard normal noise [B, Z] for z, a row an image."""
        return torch.randn(x.shape[0], self.latent_size, device=x.device, generator=generator)

    def generate(self, y: Tensor, z: Tensor) -> Tensor:
        """Mean pictures [S, B, D] in [0, 1] at y [S, B, K] and z [S, B, Z], clipped where a Gaussian's leaves that."""
        return self.likelihood.mean(self.generator(y, z)).clamp(0, 1)

    def draw_pixels(self, y: Tensor, z: Tensor, generator: torch.Generator) -> Tensor:
        """Pictures [S, B, D] in [0, 1] drawn from p(x|y,z) at y [S, B, K] and z [S, B, Z], clipped likewise."""
        return self.likelihood.sample(self.generator(y, z), generator).clamp(0, 1)

    def draw_classes(self, number: int, generator: torch.Generator) -> Tensor:
        """One-hot classes [number, K] drawn from p(y)."""
        probabilities = torch.tensor(self.prior, device=generator.device)
        drawn = torch.multinomial(probabilities, number, replacement=True, generator=generator)
        return torch.nn.functional.one_hot(drawn, self.num_classes).float()
