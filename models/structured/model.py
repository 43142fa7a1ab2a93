"""Predicts the lower half of an image from the upper one, through layers of categorical variables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from estimators.contract import Estimate, Estimator, check_estimate, entropy
from estimators.joint import MOST, all_classes, outer
from estimators.layers import in_layers, of_layer
from models.categorical.evaluation import at_once, classes_at
from models.categorical.model import check_weights
from models.categorical.pictures import alarms, use_of_variables
from models.contract import Alarm, Estimation, Evaluation, Model, Objective, PerImage, Weights, maximised
from models.evaluation import rows_at_once
from models.likelihoods import Likelihood
from models.pictures import grid


class StructuredModel(Model):
    """p(y_1|upper half) p(y_2|y_1) .. p(lower half|y_L), y_l of N x K; J is E[log p(lower half|y_L)].

    There is no posterior: y is drawn from the model itself (Raiko et al. 2015), so J has no KL.
    """

    kinds: ClassVar[Mapping[str, bool]] = {"completions": True}
    kinds_of_pixels = ("completions",)
    charts: ClassVar[Mapping[str, Mapping[str, Sequence[str]]]] = {
        "Bound by data (nats per image)": {"log-likelihood": ["val/log_likelihood", "test/log_likelihood"]},
        "Alarms (1 is up)": {"alarms": ["warning/variables_unused"]},
    }
    estimated = "E_p(y|upper half)[log p(lower half|y)]"
    evidence = "log p(lower half|upper half)"
    log_prior = None
    embedding = "p(y_1|upper half): the probabilities of all variables"

    def __init__(
        self,
        layers: Sequence[nn.Module],
        generator: nn.Module,
        latents: Sequence[tuple[int, int]],
        likelihood: Likelihood,
    ) -> None:
        super().__init__()
        self.layers, self.generator = nn.ModuleList(layers), generator
        self.latents, self.likelihood = list(latents), likelihood

    def log_prob(self, lower: Tensor, y: Tensor) -> Tensor:
        """log p(lower half|y_L) [S, B], nats, of pixels [B, D] at y [S, B, N, K]."""
        return self.likelihood.log_prob(self.generator(y), lower)

    # ---- training ----

    def estimate(
        self,
        layer: int,
        logits: Tensor,
        lower: Tensor,
        estimator: Estimator,
        *,
        context: Tensor,
        step: int,
        generator: torch.Generator,
        auxiliaries: list[Tensor],
    ) -> Estimate:
        """E[log p(lower half|y_L)] [R] given the logits [R, N, K] of a layer; auxiliary losses go to `auxiliaries`.

        `evaluations` are calls of log p(lower half|y_L).
        """
        is_last = layer == len(self.latents) - 1
        calls: Tensor | float = 0.0
        called_at = 0  # samples of y

        def f(y: Tensor) -> Tensor:
            nonlocal calls, called_at
            samples, rows = y.shape[:2]
            if is_last:
                return self.log_prob(lower, y)
            onward = self.estimate(
                layer + 1,
                self.layers[layer + 1](y.flatten(0, 1)),
                lower.expand(samples, -1, -1).flatten(0, 1),
                estimator,
                context=context.expand(samples, *context.shape).flatten(0, 1),
                step=step,
                generator=generator,
                auxiliaries=auxiliaries,
            )
            calls += samples * onward.metrics["evaluations"]
            called_at += samples
            return onward.value.view(samples, rows)

        own = of_layer(estimator, layer)
        estimate = own(f, logits, step=step, context=context, generator=generator)
        auxiliaries.append(estimate.auxiliary)
        if not is_last:
            # by a mean, as enumeration may have tried what f takes, which counts for nothing
            estimate.metrics["evaluations"] = estimate.metrics["evaluations"] * (calls / max(1, called_at))
        return estimate

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
        """J = E[log p(lower half|y_L)], a mean over x [B, C, H, W] (Jang et al. 2017, section 4.1).

        With weights.samples = m > 1, E log (1/m) sum_j p(lower half|y_j), y_j drawn from p(y|upper half), of one layer
        (Raiko et al. 2015). Raises ContractError for an estimate of other shapes.
        """
        (upper, lower), auxiliaries = halves(x), list[Tensor]()
        logits = self.layers[0](upper)
        if weights.samples > 1:
            estimate = estimator.multi_sample(
                lambda y: self.log_prob(lower, y),
                logits,
                weights.samples,
                ratio_weight=0.0,
                step=step,
                context=x,
                generator=generator,
            )
            check_estimate(estimate, len(x))
            auxiliaries.append(estimate.auxiliary)
        else:
            estimate = self.estimate(
                0, logits, lower, estimator, context=x, step=step, generator=generator, auxiliaries=auxiliaries
            )
        terms = {"J": weights.unlabelled * estimate.value.mean(), "entropy_y": entropy(logits).sum(dim=-1).mean()}
        return maximised(terms, estimate.metrics, torch.stack(auxiliaries).sum())

    def describe_objective(self, weights: Weights, labelled: int, unlabelled: int) -> str:
        of = f"log (1/{weights.samples}) sum_j p(lower half|y_j)" if weights.samples > 1 else "log p(lower half|y)"
        sizes = ", ".join(f"{variables} variables of {classes} classes" for variables, classes in self.latents)
        return f"J = {weights.unlabelled:g} x E[{of}], a mean over {unlabelled} images; y is {sizes}"

    def prepared(self, estimator: Estimator, context_size: int) -> Estimator:
        if (kl := getattr(estimator, "kl", "analytic")) != "analytic":
            raise ValueError(f"kl must be analytic where J has no KL, got {kl}")
        return in_layers(estimator, self.latents, context_size)

    def check(self, weights: Weights, estimator: Estimator) -> None:
        if weights.kl_warmup:
            raise ValueError(f"objective.kl_warmup must be 0 where J has no KL, got {weights.kl_warmup}")
        check_weights(weights, estimator, len(self.latents), importance_weighted=False)

    # ---- evaluation ----

    @property
    def is_exact(self) -> bool:  # type: ignore[override]
        """Whether y can be enumerated."""
        (variables, classes), *others = self.latents
        return not others and classes**variables <= MOST

    def num_pixels(self, shape: torch.Size) -> int:
        channels, height, width = shape
        return channels * (height - height // 2) * width

    def noise(self, number: int, generator: torch.Generator) -> Tensor:
        """A number in [0, 1) for each variable of each layer, [number, N + ..]."""
        variables = sum(number for number, _ in self.latents)
        return torch.rand(number, variables, device=generator.device, generator=generator)

    def at(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """One-hot y_L [S, B, N, K] from y_1's logits [B, N, K], by uniform numbers [S, B, N + ..] for all layers."""
        samples, batch = uniform.shape[:2]
        for layer, (variables, _) in enumerate(self.latents):
            own, uniform = uniform[..., :variables], uniform[..., variables:]
            y = classes_at(logits.softmax(dim=-1), own)
            if layer < len(self.latents) - 1:
                logits = self.layers[layer + 1](y.flatten(0, 1)).unflatten(0, (samples, batch))
        return y

    def terms_by(self, x: Tensor, noise: Tensor) -> tuple[dict[str, Tensor], PerImage]:
        """E[log p(lower half|y_L)] [B], by one draw, or exact where y can be enumerated."""
        upper, lower = halves(x)
        logits = self.layers[0](upper)
        q = logits.softmax(dim=-1)
        if self.is_exact:
            bound = (outer(q, torch.mul).T * self.enumerated(lower, logits)).sum(dim=0)
        else:
            bound = self.log_prob(lower, self.at(logits, noise.unsqueeze(0)))[0]
        return {"bound": bound, "reconstruction": bound}, PerImage(q, bound)

    def enumerated(self, lower: Tensor, logits: Tensor) -> Tensor:
        """log p(lower half|y) [K^N, B] at every joint class of one layer."""
        number = max(1, rows_at_once(lower.shape[-1]) // max(1, len(lower)))
        return torch.cat([self.log_prob(lower, y) for y in all_classes(logits).split(number)])

    def log_likelihood_by(self, x: Tensor, draws: Iterable[Tensor]) -> Tensor:
        """log (1/S) sum_s p(lower half|y_s) [B], nats; exact where y can be enumerated."""
        upper, lower = halves(x)
        logits = self.layers[0](upper)
        if self.is_exact:
            for _ in draws:  # whoever draws them counts how far this is
                pass
            return (self.enumerated(lower, logits) + outer(logits.log_softmax(dim=-1)).T).logsumexp(dim=0)
        number, at_a_time = 0, max(1, rows_at_once(lower.shape[-1]) // max(1, len(x)))
        total = torch.full((len(x),), -math.inf, device=x.device).double()  # thousands of small terms are added to it
        for uniform in at_once(draws, at_a_time):
            total = torch.logaddexp(total, self.log_prob(lower, self.at(logits, uniform)).double().logsumexp(dim=0))
            number += len(uniform)
        return (total - math.log(number)).float()

    def alarms(self, measured: Evaluation, labels: Tensor, weights: Weights) -> list[Alarm]:
        return alarms(measured)

    # ---- pictures and scripts ----

    def pictures(self, x: Tensor, generator: torch.Generator, seen: PerImage | None) -> dict[str, Tensor]:
        """Held-out images with their lower halves drawn several times, and the use of each variable of y_1."""
        drawn = {"completions": self.draw("completions", x.shape[1:], 8, generator, x)}
        return drawn if seen is None else drawn | {"use_of_variables": use_of_variables(seen.q)}

    def draw(
        self,
        kind: str,
        shape: torch.Size,
        columns: int,
        generator: torch.Generator,
        x: Tensor | None = None,
        draw_pixels: bool = False,
    ) -> Tensor:
        """A row an image x [B, C, H, W]: the whole, its upper half, and that with `columns` draws of the lower one."""
        assert x is not None
        upper, lower = x[:, :, : x.shape[2] // 2], x[:, :, x.shape[2] // 2 :]
        uniform = self.noise(columns * len(x), generator).unflatten(0, (columns, len(x)))
        outputs = self.generator(self.at(self.layers[0](upper.flatten(1)), uniform))
        pixels = self.likelihood.sample(outputs, generator) if draw_pixels else self.likelihood.mean(outputs)
        unseen = torch.full_like(lower, 0.5).unsqueeze(0)
        lowers = torch.cat([lower.unsqueeze(0), unseen, pixels.clamp(0, 1).view(columns, *lower.shape)])
        wholes = torch.cat([upper.expand(len(lowers), *upper.shape), lowers], dim=3)
        return grid(wholes.transpose(0, 1).flatten(0, 1), columns=len(lowers))

    def sample(self, number: int, generator: torch.Generator, draw_pixels: bool = False) -> Tensor:
        """Raises ValueError."""
        raise ValueError("this model draws lower halves of given images, and has no images of its own")

    def posterior(self, x: Tensor) -> Tensor:
        return self.layers[0](halves(x)[0]).softmax(dim=-1)

    def networks(self) -> dict[str, list[nn.Parameter]]:
        generator = [*self.generator.parameters(), *self.likelihood.parameters()]
        return {"layers": list(self.layers.parameters()), "generator": generator}

    def categorical_term(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Estimation]:
        """The logits of y_1 [B, N, K], and E[log p(lower half|y_L)]."""
        upper, lower = halves(x)
        logits = self.layers[0](upper)

        def estimate(estimator: Estimator, step: int, generator: torch.Generator) -> Estimate:
            auxiliaries: list[Tensor] = []
            estimate = self.estimate(
                0, logits, lower, estimator, context=x, step=step, generator=generator, auxiliaries=auxiliaries
            )
            estimate.auxiliary = torch.stack(auxiliaries).sum()  # of all layers
            return estimate

        return logits, estimate


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower rows of images [B, C, H, W], each as pixels [B, D]; of odd ones the middle is lower."""
    middle = x.shape[2] // 2
    return x[:, :, :middle].flatten(1), x[:, :, middle:].flatten(1)
