"""The semi-supervised VAE: a classifier, an inference network and a generator, wired into the bound b(x, y)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from estimators.contract import Estimate, Estimator
from estimators.shared import drawn
from models import contract
from models.contract import Alarm, Estimation, Evaluation, Model, Objective, PerImage, Weights
from models.likelihoods import Bernoulli, Likelihood
from models.m2 import alarms, evaluation, pictures
from models.m2.objective import describe, distortions, objective


@dataclass
class Bound:
    """b(x, y) = reconstruction - kl_z [- kl_a], each [S, B], in nats per image."""

    reconstruction: Tensor
    kl_z: Tensor
    kl_a: Tensor | None = None  # of models with an auxiliary a

    @property
    def kls(self) -> dict[str, Tensor]:
        """By the names of `Evaluation`."""
        return {"kl_z": self.kl_z} if self.kl_a is None else {"kl_z": self.kl_z, "kl_a": self.kl_a}

    @property
    def value(self) -> Tensor:
        without_a = self.reconstruction - self.kl_z
        return without_a if self.kl_a is None else without_a - self.kl_a

    def split(self, *images: int) -> list[Bound]:
        """Of so many images each, in order."""
        parts = (part.split(images, dim=1) for part in (self.reconstruction, *self.kls.values()))
        return [Bound(*part) for part in zip(*parts, strict=True)]

    @classmethod
    def joined(cls, bounds: Sequence[Bound]) -> Bound:
        """Of one set of images at more and more y."""
        return cls(
            *(torch.cat(part) for part in zip(*((b.reconstruction, *b.kls.values()) for b in bounds), strict=True))
        )


def gaussian_kl(loc: Tensor, scale: Tensor) -> Tensor:
    """KL(N(loc, scale^2) || N(0, I)) summed over the last axis, nats (Kingma & Welling 2014, appendix B)."""
    return torch.as_tensor(GaussianKL.apply(loc, scale))


class GaussianKL(torch.autograd.Function):
    """With its gradient written out, loc and scale - 1 / scale, in 3 operations for 11."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(loc, scale)
        terms = (loc * loc).addcmul_(scale, scale).sub_(1).sub_(scale.log(), alpha=2)
        return terms.sum(dim=-1).mul_(0.5)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = ctx.saved_tensors
        gradient = gradient.unsqueeze(-1)
        return gradient * loc, (gradient * scale).addcdiv_(gradient, scale, value=-1)


Rows = tuple[Tensor, ...]  # what a bound needs beside y, each [B, ...], a row an image


def drawn_unless_given(noise: Tensor | None, model: Model, number: int, generator: torch.Generator | None) -> Tensor:
    """The noise of so many images."""
    if noise is not None:
        return noise
    assert generator is not None
    return model.noise(number, generator)


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal noise, a row an image: of the whole minibatch, where several processes have parts of it."""

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, device=generator.device, generator=generator)

    return drawn(draw, shape, 0, generator)


class Classifier(Protocol):
    """q(y|x): logits [B, K] from images [B, C, H, W]; dropout only where a random generator is given."""

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor: ...


class Inference(Protocol):
    """q(z|x,y): features [B, H] once an image; loc and scale [S, B, Z] from features and y [S, B, K]."""

    def features(self, x: Tensor) -> Tensor: ...

    def __call__(self, features: Tensor, y: Tensor) -> tuple[Tensor, Tensor]: ...


class Generator(Protocol):
    """p(x|y,z): a number a pixel for the likelihood [S, B, D], from y [S, B, K] and z [S, B, Z]."""

    def __call__(self, y: Tensor, z: Tensor) -> Tensor: ...


@dataclass
class Networks(contract.Networks):
    """The three networks (torch modules) of a semi-supervised VAE, the number of classes and the size of z."""

    classifier: Classifier
    inference: Inference
    generator: Generator
    num_classes: int
    latent_size: int

    def model(self, likelihood: Likelihood, prior: Sequence[float]) -> SemiSupervisedVAE:
        return SemiSupervisedVAE(self, likelihood, prior)


class SemiSupervisedVAE(Model):
    """M2 (Kingma et al. 2014): q(y|x), q(z|x,y) = N(loc, scale^2), p(x|y,z) by `likelihood`, p(y), p(z) = N(0, I).

    `likelihood` is Bernoulli and `prior`, the K probabilities p(y), uniform where they are not given.
    """

    has_labels = True
    kinds = pictures.KINDS
    charts: ClassVar = {
        "Objective (nats per image)": {
            "labelled and unlabelled bound": ["train/labelled_bound", "train/unlabelled_bound"],
            "classification": ["train/classification"],
        },
        "Bound by data (nats per image)": {"bound": ["train/labelled_bound", "train/unlabelled_bound"]},
        "Accuracy": {"accuracy": ["val/accuracy", "test/accuracy"]},
        "Alarms (1 is up)": {
            "alarms": ["warning/classes_collapsed", "warning/generator_ignores_y", "warning/z_unused"]
        },
    }
    embedding = "z: mean of q(z|x,y) at the most probable y"
    estimated = "E_q(y|x)[b(x, y)]"
    log_prior: Tensor | None  # log p(y) [K]; None where it is uniform

    def __init__(
        self, networks: Networks, likelihood: Likelihood | None = None, prior: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        self.classifier = networks.classifier
        self.inference = networks.inference
        self.generator = networks.generator
        self.num_classes = networks.num_classes
        self.latents = [(1, networks.num_classes)]
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
        outputs = self.generator(y, torch.addcmul(loc, scale, noise))
        return Bound(self.likelihood.log_prob(outputs, x.flatten(1)), gaussian_kl(loc, scale))

    def infer(
        self, x: Tensor, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Callable[[], Rows]]:
        """The logits [B, K] of q(y|x), and what gives the rows of these images that `bound_at` needs.

        Training draws dropout, motion and noise by the generator; evaluation gives the noise [B, ...] and draws none.
        """
        logits = self.classifier(x, generator)

        def rows() -> Rows:
            features = self.inference.features(x)
            return x, features, drawn_unless_given(noise, self, len(x), generator)

        return logits, rows

    def bound_at(self, y: Tensor, rows: Rows) -> Bound:
        """`bound` at y [S, B, K] for images of which `infer` gave these rows."""
        x, features, noise = rows
        return self.bound(x, features, y, noise)

    def style(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean of q(z|x,y) [S, B, Z] of images x [B, C, H, W] at y [S, B, K]."""
        return self.inference(self.inference.features(x), y)[0]

    def outputs(self, y: Tensor, z: Tensor) -> Tensor:
        """What the likelihood reads of a picture [S, B, D] at y [S, B, K] and z [S, B, Z]."""
        return self.generator(y, z)

    def rows_by_noise(self, x: Tensor) -> Callable[[Tensor], Rows]:
        """What gives the rows of images x [B, C, H, W] for one noise [B, ...] after another; x is looked at once."""
        features = self.inference.features(x)
        return lambda noise: (x, features, noise)

    def log_weight_at(self, y: Tensor, rows: Rows) -> Tensor:
        """log [p(x|y,z) p(z) / q(z|x,y)] [S, B] at the z of `bound`: its mean is b(x, y), its mean exp p(x|y)."""
        x, features, noise = rows
        loc, scale = self.inference(features, y)
        z = loc + scale * noise
        log_prior_ratio = (0.5 * (noise.square() - z.square()) + scale.log()).sum(dim=-1)
        return self.likelihood.log_prob(self.generator(y, z), x.flatten(1)) + log_prior_ratio

    def noise(self, number: int, generator: torch.Generator) -> Tensor:
        """Standard normal noise [number, Z] for z, a row an image."""
        return normal((number, self.latent_size), generator)

    def generate(self, y: Tensor, z: Tensor) -> Tensor:
        """Mean pictures [S, B, D] in [0, 1] at y [S, B, K] and z [S, B, Z], clipped where a Gaussian's leaves that."""
        return self.likelihood.mean(self.outputs(y, z)).clamp(0, 1)

    def draw_pixels(self, y: Tensor, z: Tensor, generator: torch.Generator) -> Tensor:
        """Pictures [S, B, D] in [0, 1] drawn from p(x|y,z) at y [S, B, K] and z [S, B, Z], clipped likewise."""
        return self.likelihood.sample(self.outputs(y, z), generator).clamp(0, 1)

    def draw_classes(self, number: int, generator: torch.Generator) -> Tensor:
        """One-hot classes [number, K] drawn from p(y)."""
        probabilities = torch.tensor(self.prior, device=generator.device)
        drawn = torch.multinomial(probabilities, number, replacement=True, generator=generator)
        return F.one_hot(drawn, self.num_classes).float()

    # ---- the contract of models/contract.py ----

    def shapes(self, x: Tensor) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
        y = torch.eye(self.num_classes, device=x.device)[:1].expand(1, len(x), -1)
        yield "classifier's logits", self.classifier(x), (len(x), self.num_classes)
        loc, scale = self.inference(self.inference.features(x), y)
        yield "inference's loc", loc, (1, len(x), self.latent_size)
        yield "inference's scale", scale, (1, len(x), self.latent_size)
        yield "generator's outputs", self.generator(y, loc), (1, len(x), x[0].numel())

    def objective(
        self,
        estimator: Estimator,
        weights: Weights,
        x: Tensor,
        y_labelled: Tensor,
        *,
        step: int,
        generator: torch.Generator,
    ) -> Objective:
        return objective(self, estimator, weights, x, y_labelled, step=step, generator=generator)

    def check(self, weights: Weights, estimator: Estimator) -> None:
        if weights.samples != 1:
            raise ValueError(
                f"objective.samples must be 1 with a model that learns from labels, got {weights.samples}; "
                "model=categorical_mlp takes several"
            )
        if weights.kl_warmup:
            raise ValueError(
                f"objective.kl_warmup must be 0 with a model that learns from labels, got {weights.kl_warmup}"
            )
        if weights.distortion_fades is not None and not distortions(self):
            raise ValueError(
                f"objective.distortion_fades must be null where model.distortion is 0, got {weights.distortion_fades}"
            )
        for name in ("alpha", "unlabelled"):  # no labels that teach first, or no U that does later
            if weights.labels_first and not getattr(weights, name):
                raise ValueError(
                    f"objective.labels_first must be 0 where objective.{name} is 0, got {weights.labels_first}"
                )

    def describe_objective(self, weights: Weights, labelled: int, unlabelled: int) -> str:
        return describe(self, weights, labelled, unlabelled)

    def alarms(self, measured: Evaluation, labels: Tensor, weights: Weights) -> list[Alarm]:
        return alarms.alarms(measured, labels, weights)

    def pictures(self, x: Tensor, generator: torch.Generator, seen: PerImage | None) -> dict[str, Tensor]:
        return pictures.pictures(self, x, generator)

    def draw(
        self,
        kind: str,
        shape: torch.Size,
        columns: int,
        generator: torch.Generator,
        x: Tensor | None = None,
        draw_pixels: bool = False,
    ) -> Tensor:
        return pictures.draw(self, kind, shape, columns, generator, x, draw_pixels)

    def posterior(self, x: Tensor) -> Tensor:
        return self.classifier(x).softmax(dim=-1)

    def embed(self, x: Tensor, q: Tensor) -> Tensor:
        """The mean of q(z|x,y) [B, Z] at the most probable y."""
        y = F.one_hot(q.argmax(dim=-1), self.num_classes).float().unsqueeze(0)
        return self.style(x, y)[0]

    def terms_by(self, x: Tensor, noise: Tensor) -> tuple[dict[str, Tensor], PerImage]:
        return evaluation.exact_terms(self, x, noise)

    def log_likelihood_by(self, x: Tensor, draws: Iterable[Tensor]) -> Tensor:
        return evaluation.importance_weighted(self, x, draws)

    def sample(self, number: int, generator: torch.Generator, draw_pixels: bool = False) -> Tensor:
        """y from p(y), z from p(z)."""
        y, z = self.draw_classes(number, generator).unsqueeze(0), self.styles(number, generator).unsqueeze(0)
        return (self.draw_pixels(y, z, generator) if draw_pixels else self.generate(y, z))[0]

    def styles(self, number: int, generator: torch.Generator) -> Tensor:
        """Draws of z from p(z), [number, Z]."""
        return self.noise(number, generator)

    def of_class(self, index: int, styles: Tensor) -> Tensor:
        y = F.one_hot(torch.tensor(index, device=styles.device), self.num_classes).float()
        return self.generate(y.expand(1, len(styles), -1), styles.unsqueeze(0))[0]

    def networks(self) -> dict[str, list[nn.Parameter]]:
        """By what it stands for: the likelihood's parameters are the generator's, as both are p(x|y,z)."""
        parts = {name: list(getattr(self, name).parameters()) for name in ("classifier", "inference", "generator")}
        return parts | {"generator": parts["generator"] + list(self.likelihood.parameters())}

    def categorical_term(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Estimation]:
        """The logits [B, 1, K] of q(y|x), and E_q(y|x)[b(x, y)] by one draw of z's noise."""
        logits, rest = self.infer(x, noise=self.noise(len(x), generator))
        logits, rows = logits.unsqueeze(-2), rest()

        def cost(y: Tensor) -> Tensor:
            return self.bound_at(y.squeeze(-2), rows).value

        def estimate(estimator: Estimator, step: int, generator: torch.Generator) -> Estimate:
            return estimator(cost, logits, step=step, context=x, generator=generator)

        return logits, estimate
