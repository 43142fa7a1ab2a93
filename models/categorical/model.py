"""The variational autoencoder whose latents are categorical, in one layer or more, and its bound."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from estimators.contract import Estimate, Estimator, check_estimate, entropy
from estimators.layers import in_layers, of_layer
from estimators.relaxations import log_probabilities
from models.categorical import evaluation, pictures
from models.contract import Alarm, Estimation, Evaluation, Model, Objective, PerImage, Weights, maximised
from models.likelihoods import Likelihood


class CategoricalVAE(Model):
    """q(y_l|y_l-1), y_0 = x, and p(y_l-1|y_l), for l = 1..L; p(y_L) is uniform or learned; p(x|y_1) by `likelihood`.

    Of each layer from the lowest: `posteriors` [R, ...] -> logits [R, N, K], and `generators` y [S, B, N, K] -> pixels'
    parameters [S, B, D], or logits [S, B, N K] of the layer below. A layer's y are one-hot, or in the simplex.
    """

    kinds = pictures.KINDS
    charts: ClassVar[Mapping[str, Mapping[str, Sequence[str]]]] = {
        "Bound by data (nats per image)": {"log-likelihood": ["val/log_likelihood", "test/log_likelihood"]},
        "Alarms (1 is up)": {"alarms": ["warning/variables_unused"]},
    }

    def __init__(
        self,
        posteriors: Sequence[nn.Module],
        generators: Sequence[nn.Module],
        latents: Sequence[tuple[int, int]],
        likelihood: Likelihood,
        learned_prior: bool,
    ) -> None:
        super().__init__()
        self.posteriors, self.generators = nn.ModuleList(posteriors), nn.ModuleList(generators)
        self.latents, self.likelihood = list(latents), likelihood
        self.prior_logits = nn.Parameter(torch.zeros(latents[-1])) if learned_prior else None

    # ---- probabilities ----

    @property
    def log_prior(self) -> Tensor | None:  # type: ignore[override]
        """log p(y_L) [N, K] of the uppermost layer; None where it is uniform."""
        return None if self.prior_logits is None else log_probabilities(self.prior_logits)

    @property
    def estimated(self) -> str:  # type: ignore[override]
        return "E_q(y|x)[log p(x|y)]" if len(self.latents) == 1 else "E_q(y_1|x)[log p(x|y_1) + what is above]"

    @property
    def is_exact(self) -> bool:  # type: ignore[override]
        return evaluation.is_enumerable(self)

    def logits(self, layer: int, below: Tensor) -> Tensor:
        """Of q(y|below) [R, N, K], from images [R, C, H, W] or the layer below [R, N, K]."""
        logits: Tensor = self.posteriors[layer](below)
        return logits

    def log_prob(self, layer: int, below: Tensor, y: Tensor) -> Tensor:
        """log p(below|y) [S, B], nats, at y [S, B, N, K] of a layer.

        `below` is images [B, C, H, W], or the layer below [B, N, K], which may be relaxed: sum_k below_k log p_k.
        """
        outputs = self.generators[layer](y)
        if layer == 0:
            return self.likelihood.log_prob(outputs, below.flatten(1))
        return (log_probabilities(outputs.unflatten(-1, self.latents[layer - 1])) * below).sum(dim=(-2, -1))

    def pixels(self, y: Tensor) -> Tensor:
        """Mean pictures [S, B, D] in [0, 1] at y [S, B, N, K] of the lowest layer."""
        return self.likelihood.mean(self.generators[0](y)).clamp(0, 1)

    # ---- training ----

    def estimate(
        self,
        layer: int,
        below: Tensor,
        estimator: Estimator,
        *,
        logits: Tensor | None = None,
        context: Tensor,
        step: int,
        generator: torch.Generator,
        auxiliaries: list[Tensor],
    ) -> Estimate:
        """E_q(y|below)[log p(below|y) + what the layers above add], [R], of a layer given what is below it [R, ...].

        What the layers above add is their own value less their KL, by their own estimate, at each y. p(y) of all layers
        but the uppermost is there: what is left of their KL is -H(q) = KL(q || uniform) - N log K. Gradients for all
        layers come through `value` and `kl`. Auxiliary losses of all layers are added to `auxiliaries`; `evaluations`
        are the calls of the uppermost layer's cost, of all in its turn the most.
        """
        own, is_top = of_layer(estimator, layer), layer == len(self.latents) - 1
        calls: Tensor | float = 0.0
        called_at = 0  # samples of y
        own.log_prior = self.log_prior if is_top else None

        def f(y: Tensor) -> Tensor:
            nonlocal calls, called_at
            value = self.log_prob(layer, below, y)
            if is_top:
                return value
            samples, rows = y.shape[:2]
            above = self.estimate(
                layer + 1,
                y.flatten(0, 1),
                estimator,
                context=context.expand(samples, *context.shape).flatten(0, 1),
                step=step,
                generator=generator,
                auxiliaries=auxiliaries,
            )
            calls += samples * above.metrics["evaluations"]
            called_at += samples
            return value + (above.value - above.kl).view(samples, rows)

        logits = self.logits(layer, below) if logits is None else logits
        estimate = own(f, logits, step=step, context=context, generator=generator)
        auxiliaries.append(estimate.auxiliary)
        if not is_top:
            estimate.kl = estimate.kl - self.latents[layer][0] * math.log(self.latents[layer][1])
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
        """J = E_q(y|x)[log p(x|y)] - KL(q(y|x) || p(y)) (Jang et al. 2017, section 4.2), a mean over x [B, C, H, W].

        With weights.samples = m > 1 the bound of m samples, E log (1/m) sum_j p(x, y_j) / q(y_j|x) (Burda et al. 2016,
        eq. 8), of one layer. While the KL, or log p(y)/q(y|x) there, is warmed up it has a weight below 1, and J is a
        bound from then on. Raises ContractError for an estimate of other shapes.
        """
        logits, auxiliaries = self.logits(0, x), list[Tensor]()
        if weights.samples > 1:
            estimator.log_prior = self.log_prior
            estimate = estimator.multi_sample(
                lambda y: self.log_prob(0, x, y),
                logits,
                weights.samples,
                ratio_weight=weights.kl_weight if weights.kl_warmup else 1.0,
                step=step,
                context=x,
                generator=generator,
            )
            check_estimate(estimate, len(x))
            auxiliaries.append(estimate.auxiliary)
        else:
            estimate = self.estimate(
                0,
                x,
                estimator,
                logits=logits,
                context=x,
                step=step,
                generator=generator,
                auxiliaries=auxiliaries,
            )
        kl, metrics = estimate.kl, estimate.metrics
        if weights.kl_warmup:
            kl, metrics = weights.kl_weight * kl, {**metrics, "kl_weight": weights.kl_weight}
        terms = {"J": weights.unlabelled * (estimate.value - kl).mean()}
        if weights.samples == len(self.latents) == 1:  # else no part of `value` alone is log p(x|y)
            terms |= {"reconstruction": estimate.value.mean(), "kl_y": estimate.kl.mean()}
        terms["entropy_y"] = entropy(logits).sum(dim=-1).mean()
        return maximised(terms, metrics, torch.stack(auxiliaries).sum())

    def describe_objective(self, weights: Weights, labelled: int, unlabelled: int) -> str:
        of = f"the bound of {weights.samples} samples" if weights.samples > 1 else "E_q(y|x)[log p(x|y)] - KL(q || p)"
        of += f", KL warmed up in {weights.kl_warmup} steps" if weights.kl_warmup else ""
        sizes = ", ".join(f"{variables} variables of {classes} classes" for variables, classes in self.latents)
        return f"J = {weights.unlabelled:g} x {of}, a mean over {unlabelled} images; y is {sizes}"

    def prepared(self, estimator: Estimator, context_size: int) -> Estimator:
        return in_layers(estimator, self.latents, context_size)

    def check(self, weights: Weights, estimator: Estimator) -> None:
        check_weights(weights, estimator, len(self.latents))

    # ---- the rest of the contract of models/contract.py ----

    def alarms(self, measured: Evaluation, labels: Tensor, weights: Weights) -> list[Alarm]:
        return pictures.alarms(measured)

    def pictures(self, x: Tensor, generator: torch.Generator, seen: PerImage | None) -> dict[str, Tensor]:
        return pictures.pictures(self, x, generator, seen)

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
        return self.logits(0, x).softmax(dim=-1)

    def noise(self, number: int, generator: torch.Generator) -> Tensor:
        """A number in [0, 1) for each variable of each layer, [number, N + ..]."""
        variables = sum(number for number, _ in self.latents)
        return torch.rand(number, variables, device=generator.device, generator=generator)

    def terms_by(self, x: Tensor, noise: Tensor) -> tuple[dict[str, Tensor], PerImage]:
        return evaluation.terms(self, x, noise)

    def log_likelihood_by(self, x: Tensor, draws: Iterable[Tensor]) -> Tensor:
        return evaluation.importance_weighted(self, x, draws)

    def sample(self, number: int, generator: torch.Generator, draw_pixels: bool = False) -> Tensor:
        """y_L from p(y_L), the layers below it in turn, and p(x|y_1)."""
        outputs = self.generators[0](evaluation.draw_prior(self, number, generator).unsqueeze(0))
        pixels = self.likelihood.sample(outputs, generator) if draw_pixels else self.likelihood.mean(outputs)
        return pixels[0].clamp(0, 1)

    def networks(self) -> dict[str, list[nn.Parameter]]:
        """The posteriors, the generators with the likelihood's parameters, and the prior where it is learned."""
        prior = {} if self.prior_logits is None or len(self.latents) == 1 else {"prior": [self.prior_logits]}
        generators = [*self.generators.parameters(), *self.likelihood.parameters()]
        return {"posterior": list(self.posteriors.parameters()), "generator": generators} | prior

    def categorical_term(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Estimation]:
        """The lowest layer's logits [B, N, K], and E_q(y|x) of log p(x|y) and of what the layers above add."""
        logits = self.logits(0, x)

        def estimate(estimator: Estimator, step: int, generator: torch.Generator) -> Estimate:
            auxiliaries: list[Tensor] = []
            estimate = self.estimate(
                0, x, estimator, logits=logits, context=x, step=step, generator=generator, auxiliaries=auxiliaries
            )
            estimate.auxiliary = torch.stack(auxiliaries).sum()  # of all layers
            return estimate

        return logits, estimate


def check_weights(weights: Weights, estimator: Estimator, layers: int, *, importance_weighted: bool = True) -> None:
    """Raises ValueError for what a model without labels, in so many layers, cannot do."""
    for name in ("labelled", "alpha", "labels_first"):
        if (value := getattr(weights, name)) != 0:
            raise ValueError(f"objective.{name} must be 0 with a model without labels, got {value:g}")
    if (fades := weights.distortion_fades) is not None:
        raise ValueError(f"objective.distortion_fades must be null with a model without labels, got {fades}")
    if weights.samples > 1 and layers > 1:
        raise ValueError(f"objective.samples must be 1 with a model of {layers} layers, got {weights.samples}")
    if weights.kl_warmup and layers > 1:
        raise ValueError(f"objective.kl_warmup must be 0 with a model of {layers} layers, got {weights.kl_warmup}")
    if weights.samples > 1:
        estimator.check_several_samples(importance_weighted=importance_weighted)
