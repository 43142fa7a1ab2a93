"""Auxiliary deep generative models (Maaloe et al. 2016), wired from M2's networks and those of an auxiliary a."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models import contract
from models.contract import PerImage
from models.likelihoods import Likelihood
from models.m2 import model as m2
from models.m2.model import Bound, Rows, SemiSupervisedVAE, drawn_unless_given, gaussian_kl, normal
from models.parts import RandomMotion

DRAWS = 10  # of a, in q(y|x) of an image


class Classifier(Protocol):
    """q(y|a,x): features [B, H] once an image; logits [..., B, K] from features and a [..., B, A].

    Dropout only where a random generator is given.
    """

    def features(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor: ...

    def __call__(self, features: Tensor, a: Tensor) -> Tensor: ...


class Auxiliary(Protocol):
    """q(a|x): loc and scale, each [B, A], of images [B, C, H, W]."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]: ...


class Inference(Protocol):
    """q(z|a,x,y): features [B, H] once an image, of x and a [B, A]; loc and scale [S, B, Z] at y [S, B, K]."""

    def features(self, x: Tensor, a: Tensor) -> Tensor: ...

    def __call__(self, features: Tensor, y: Tensor) -> tuple[Tensor, Tensor]: ...


class AuxiliaryGenerator(Protocol):
    """p(a|x,y,z), or p(a|y,z) whose features are [B, 0]: loc and scale [S, B, A] at y [S, B, K] and z [S, B, Z]."""

    def features(self, x: Tensor) -> Tensor: ...

    def __call__(self, features: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass
class Networks(contract.Networks):
    """The networks (torch modules) of an auxiliary deep generative model, and its sizes.

    With `skip`, the generator takes (z, a) [S, B, Z + A] for z.
    """

    motion: RandomMotion
    auxiliary: Auxiliary
    classifier: Classifier
    inference: Inference
    generator: m2.Generator
    auxiliary_generator: AuxiliaryGenerator
    num_classes: int
    latent_size: int
    auxiliary_size: int
    skip: bool

    def model(self, likelihood: Likelihood, prior: Sequence[float]) -> AuxiliaryVAE:
        return AuxiliaryVAE(self, likelihood, prior)


class AuxiliaryVAE(SemiSupervisedVAE):
    """q(a|x) q(y|a,x) q(z|a,x,y); p(y) p(z) p(x|y,z) p(a|x,y,z), or with skip p(y) p(z) p(a|y,z) p(x|a,y,z).

    ADGM and SDGM (Maaloe et al. 2016, sections 2.2 and 2.3). All that M2 does with its bound is done with
    b(x, y) = E_q(a,z|x,y)[log p(x|.) + log p(a|.) - log q(a|x)] - KL(q(z|a,x,y) || p(z)), by one draw of a and z.

    q(y|x) = E_q(a|x)[q(y|a,x)], by which images are classified, is a mean over 10 draws of a, the same noise for
    every image, so that an image's class depends on no other; the authors' code takes a mean of as many as it is told.
    Training and the bound draw one a an image. Where images are turned and shifted by chance, q(a|x) and q(y|a,x) see
    them so: a would otherwise tell the classifier which image it is. J stays a bound, as any q(a|x) will do for one.
    """

    embedding = "z: mean of q(z|a,x,y) at the most probable y and the mean of q(a|x)"
    estimated = "E_q(y|a,x)[b(x, y)]"
    classifier: Any  # those of `Networks`, which take a too
    inference: Any
    draws_of_a: Tensor  # [DRAWS, 1, A]

    def __init__(
        self, networks: Networks, likelihood: Likelihood | None = None, prior: Sequence[float] | None = None
    ) -> None:
        super().__init__(networks, likelihood, prior)  # type: ignore[arg-type]  # features take a too
        self.motion = networks.motion
        self.auxiliary = networks.auxiliary
        self.auxiliary_generator = networks.auxiliary_generator
        self.auxiliary_size = networks.auxiliary_size
        self.skip = networks.skip
        cpu = torch.Generator().manual_seed(0)  # wherever the model is made: q(y|x) is the same on every device
        drawn = torch.randn(DRAWS, 1, self.auxiliary_size, generator=cpu, device="cpu")
        self.register_buffer("draws_of_a", drawn.to(torch.get_default_device()), persistent=False)

    def shapes(self, x: Tensor) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
        y = torch.eye(self.num_classes, device=x.device)[:1].expand(1, len(x), -1)
        a, scale_of_a = self.auxiliary(x)
        yield "auxiliary's loc", a, (len(x), self.auxiliary_size)
        yield "auxiliary's scale", scale_of_a, (len(x), self.auxiliary_size)
        yield "classifier's logits", self.classifier(self.classifier.features(x), a), (len(x), self.num_classes)
        z, scale = self.inference(self.inference.features(x, a), y)
        yield "inference's loc", z, (1, len(x), self.latent_size)
        yield "inference's scale", scale, (1, len(x), self.latent_size)
        loc, scale = self.auxiliary_generator(self.auxiliary_generator.features(x), y, z)
        yield "auxiliary_generator's loc", loc, (1, len(x), self.auxiliary_size)
        yield "auxiliary_generator's scale", scale, (1, len(x), self.auxiliary_size)
        yield "generator's outputs", self.generator(y, self.with_auxiliary(z, a)), (1, len(x), x[0].numel())

    def noise(self, number: int, generator: torch.Generator) -> Tensor:
        """Standard normal noise [number, A + Z] for a and z, a row an image."""
        return normal((number, self.auxiliary_size + self.latent_size), generator)

    def infer(
        self, x: Tensor, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Callable[[], Rows]]:
        """As M2's; the logits are those of q(y|a,x) at one draw of a, that of the rows."""
        given = drawn_unless_given(noise, self, len(x), generator)
        noise_a, noise_z = given.split([self.auxiliary_size, self.latent_size], dim=1)
        seen = self.motion(x, generator)
        loc, scale = self.auxiliary(seen)
        a = loc + scale * noise_a
        logits = self.classifier(self.classifier.features(seen, generator), a)

        def rows() -> Rows:
            return self.rows_at(x, a, scale, noise_a, noise_z, self.auxiliary_generator.features(x))

        return logits, rows

    def rows_at(
        self, x: Tensor, a: Tensor, scale: Tensor, noise_a: Tensor, noise_z: Tensor, of_auxiliary: Tensor
    ) -> Rows:
        """The rows at a = loc + scale * noise_a; `of_auxiliary` is what p(a|.) has of the images."""
        log_q = (-0.5 * noise_a.square() - scale.log()).sum(dim=-1)  # and what log p(a|.) has too
        return x, self.inference.features(x, a), noise_z, a, log_q, of_auxiliary

    def bound_at(self, y: Tensor, rows: Rows) -> Bound:
        """b(x, y) at y [S, B, K] by one draw of a and z; the KL of z in closed form, that of a at the draw.

        It has no closed form, as z depends on a, and is zero at every draw where p(a|.) and q(a|x) are the same.
        """
        loc, scale = self.inference(rows[1], y)
        reconstruction, kl_a = self.at(y, loc + scale * rows[2], rows)
        return Bound(reconstruction, gaussian_kl(loc, scale), kl_a)

    def rows_by_noise(self, x: Tensor) -> Callable[[Tensor], Rows]:
        """As M2's; q(y|a,x) has no part in it."""
        loc, scale = self.auxiliary(x)
        of_auxiliary = self.auxiliary_generator.features(x)

        def rows(noise: Tensor) -> Rows:
            noise_a, noise_z = noise.split([self.auxiliary_size, self.latent_size], dim=1)
            return self.rows_at(x, loc + scale * noise_a, scale, noise_a, noise_z, of_auxiliary)

        return rows

    def log_weight_at(self, y: Tensor, rows: Rows) -> Tensor:
        """log [p(x|.) p(a|.) p(z) / (q(a|x) q(z|a,x,y))] [S, B] at the a and z of `bound_at`."""
        loc, scale = self.inference(rows[1], y)
        z = loc + scale * rows[2]
        reconstruction, kl_a = self.at(y, z, rows)
        return reconstruction - kl_a + (0.5 * (rows[2].square() - z.square()) + scale.log()).sum(dim=-1)

    def at(self, y: Tensor, z: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """log p(x|.) and log q(a|x) - log p(a|.), each [S, B], at y [S, B, K], z [S, B, Z] and the a of the rows."""
        x, _, _, a, log_q, features = rows
        loc, scale = self.auxiliary_generator(features, y, z)
        log_p = (-0.5 * ((a - loc) / scale).square() - scale.log()).sum(dim=-1)
        outputs = self.generator(y, self.with_auxiliary(z, a))
        return self.likelihood.log_prob(outputs, x.flatten(1)), log_q - log_p

    def with_auxiliary(self, z: Tensor, a: Tensor) -> Tensor:
        """What p(x|.) depends on beside y: z [S, B, Z], and with skip a [B, A] or [S, B, A] too."""
        return torch.cat([z, a.expand(*z.shape[:2], -1)], dim=-1) if self.skip else z

    # ---- what is seen, and drawn ----

    def posterior(self, x: Tensor) -> Tensor:
        """q(y|x) [B, K], a mean over DRAWS draws of a."""
        loc, scale = self.auxiliary(x)
        logits = self.classifier(self.classifier.features(x), loc + scale * self.draws_of_a)
        return logits.softmax(dim=-1).mean(dim=0)

    def terms_by(self, x: Tensor, noise: Tensor) -> tuple[dict[str, Tensor], PerImage]:
        """The bound with q(y|a,x) at one draw of a, exact in y; images are classified by q(y|x)."""
        terms, seen = super().terms_by(x, noise)
        seen.q = self.posterior(x)
        return terms, seen

    def style(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean of q(z|a,x,y) [S, B, Z] at the mean of q(a|x)."""
        return self.inference(self.inference.features(x, self.auxiliary(x)[0]), y)[0]

    def outputs(self, y: Tensor, z: Tensor, noise: Tensor | None = None) -> Tensor:
        """As M2's; with skip at the mean of p(a|y,z), or a draw of it by noise [S, B, A]."""
        if not self.skip:
            return self.generator(y, z)
        loc, scale = self.auxiliary_generator(z.new_empty(z.shape[1], 0), y, z)
        return self.generator(y, self.with_auxiliary(z, loc if noise is None else loc + scale * noise))

    def styles(self, number: int, generator: torch.Generator) -> Tensor:
        return torch.randn(number, self.latent_size, device=generator.device, generator=generator)

    def sample(self, number: int, generator: torch.Generator, draw_pixels: bool = False) -> Tensor:
        """y from p(y), z from p(z), with skip a from p(a|y,z)."""
        y = self.draw_classes(number, generator).unsqueeze(0)
        noise_a, z = self.noise(number, generator).split([self.auxiliary_size, self.latent_size], dim=1)
        outputs = self.outputs(y, z.unsqueeze(0), noise_a.unsqueeze(0))
        drawn = self.likelihood.sample(outputs, generator) if draw_pixels else self.likelihood.mean(outputs)
        return drawn.clamp(0, 1)[0]

    def networks(self) -> dict[str, list[nn.Parameter]]:
        """As M2's, and those of a."""
        own = {name: list(getattr(self, name).parameters()) for name in ("auxiliary", "auxiliary_generator")}
        return super().networks() | own
