"""Gumbel-Softmax and straight-through Gumbel-Softmax (Jang et al. 2017; Maddison et al. 2017)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from estimators.contract import (
    CostFunction,
    Estimate,
    Estimator,
    Schedule,
    at_least,
    categorical_kl,
    positive,
    temperature_at,
)
from estimators.relaxations import (
    concrete_log_sample,
    exp_concrete_log_density,
    gumbel,
    log_probabilities,
    straight_through,
)

KL = Literal["analytic", "sampled", "relaxed"]


class GumbelSoftmax(Estimator):
    """mean_s f(y_s), y_s ~ Concrete(q, tau), differentiated through the draw: biased for tau > 0.

    `kl` chooses the loss of Maddison et al. 2017: `analytic` (eq. 22), the closed form of the categorical KL;
    `sampled` (eq. 21), sum_k y_k log(q_k / p_k) at the relaxed draw; `relaxed` (eq. 20), the log-density ratio of the
    Concrete posterior at tau and the Concrete prior at p(y) and `prior_temperature`, which alone bounds the relaxed
    model's evidence.

    Raises ValueError for num_samples < 1, a temperature <= 0 or prior_temperature <= 0.
    """

    calls_once = True

    def __init__(
        self,
        temperature: Schedule,
        num_samples: int = 1,
        kl: KL = "analytic",
        prior_temperature: float = 0.5,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.num_samples = at_least("num_samples", num_samples, 1)
        self.kl = kl
        self.prior_temperature = positive("prior_temperature", prior_temperature)
        temperature_at(temperature, 0)

    def depends_on(self, step: int) -> object:
        return self.temperature(step)

    def draw(self, log_y: Tensor) -> Tensor:
        """The class vectors [S, B, N, K] that f sees, from relaxed log y [S, B, N, K]."""
        return log_y.exp()

    def forward(
        self, f: CostFunction, logits: Tensor, *, step: int, context: Tensor, generator: torch.Generator
    ) -> Estimate:
        temperature = temperature_at(self.temperature, step)
        gumbels = gumbel((self.num_samples, *logits.shape), generator=generator)
        log_y = concrete_log_sample(logits, gumbels, temperature)
        y = self.draw(log_y)
        return Estimate(
            value=f(y).mean(dim=0),
            kl=self._kl(logits, log_y, y, temperature),
            auxiliary=logits.new_zeros(()),
            metrics={"evaluations": float(self.num_samples), "temperature": temperature},
        )

    def _kl(self, logits: Tensor, log_y: Tensor, y: Tensor, temperature: float) -> Tensor:
        if self.kl == "analytic":
            return categorical_kl(logits, self.log_prior)
        if self.kl == "sampled":
            log_p = -math.log(logits.shape[-1]) if self.log_prior is None else self.log_prior
            log_ratio = log_probabilities(logits) - log_p
            return (y * log_ratio).sum(dim=(-2, -1)).mean(dim=0)
        posterior = exp_concrete_log_density(log_y, logits, temperature)
        prior_logits = torch.zeros_like(logits) if self.log_prior is None else self.log_prior
        prior = exp_concrete_log_density(log_y, prior_logits, self.prior_temperature)
        return (posterior - prior).sum(dim=-1).mean(dim=0)


class StraightThroughGumbelSoftmax(GumbelSoftmax):
    """As Gumbel-Softmax, with f at one_hot(argmax y) and the gradient of the relaxed y (Jang et al. 2017, 2.2)."""

    def draw(self, log_y: Tensor) -> Tensor:
        return straight_through(log_y.exp())
