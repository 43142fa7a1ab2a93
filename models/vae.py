"""The semi-supervised VAE: a classifier, an inference network and a generator, wired into the bound b(x, y)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def bernoulli_log_likelihood(pixel_logits: Tensor, x: Tensor) -> Tensor:
    """log p(x | logits) = sum_d x_d l_d - softplus(l_d), nats: [S, B] from logits [S, B, D] and pixels x [B, D]."""
    return torch.as_tensor(BernoulliLogLikelihood.apply(pixel_logits, x))


class BernoulliLogLikelihood(torch.autograd.Function):
    """With its gradient g (x - sigmoid(l)) written out, which takes half the passes over [S, B, D]."""

    @staticmethod
    def forward(ctx: Any, pixel_logits: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(pixel_logits, x)
        logits = pixel_logits.float()
        return (x * logits).sub_(F.softplus(logits)).sum(dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        pixel_logits, x = ctx.saved_tensors
        # in bf16 the difference would be 0 for every white pixel that is likelier than 0.998
        residual = x - pixel_logits.to(torch.promote_types(pixel_logits.dtype, torch.float32)).sigmoid()
        return residual.mul_(gradient.unsqueeze(-1)).to(pixel_logits.dtype), None


class SemiSupervisedVAE(nn.Module):
    """M2 (Kingma et al. 2014): q(y|x), q(z|x,y) = N(loc, scale^2), p(x|y,z) Bernoulli, p(y) uniform, p(z) = N(0, I)."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.classifier = networks.classifier
        self.inference = networks.inference
        self.generator = networks.generator
        self.num_classes = networks.num_classes
        self.latent_size = networks.latent_size

    def bound(self, x: Tensor, features: Tensor, y: Tensor, noise: Tensor) -> Bound:
        """b(x, y) at y [S, B, K] for images x [B, C, H, W] with features [B, H], by one draw of z a class.

        z = loc + scale * noise (Kingma & Welling 2014, section 2.4); noise [B, Z] is shared over S.
        """
        loc, scale = self.inference(features, y)
        pixel_logits = self.generator(y, loc + scale * noise)
        return Bound(bernoulli_log_likelihood(pixel_logits, x.flatten(1)), gaussian_kl(loc, scale))

    def log_weight(self, x: Tensor, features: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        """log [p(x|y,z) p(z) / q(z|x,y)] [S, B] at the z of `bound`: its mean is b(x, y), its mean exp p(x|y)."""
        loc, scale = self.inference(features, y)
        z = loc + scale * noise
        log_prior_ratio = (0.5 * (noise.square() - z.square()) + scale.log()).sum(dim=-1)
        return bernoulli_log_likelihood(self.generator(y, z), x.flatten(1)) + log_prior_ratio

    def draw_noise(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Standard normal noise [B, Z] for z, a row an image."""
        return torch.randn(x.shape[0], self.latent_size, device=x.device, generator=generator)

    def generate(self, y: Tensor, z: Tensor) -> Tensor:
        """Pixel probabilities [S, B, D] at y [S, B, K] and z [S, B, Z]."""
        return self.generator(y, z).float().sigmoid()
