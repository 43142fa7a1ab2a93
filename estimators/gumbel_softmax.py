"""Gumbel-Softmax and straight-through Gumbel-Softmax (Jang et al. 2017; Maddison et al. 2017)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from estimators.contract import (
    CostFunction,
    Estimate,
    Estimator,
    Schedule,
    at_least,
    is_weighted,
    kl_from,
    log_mean_exp,
    log_ratio,
    mean_of_draws,
    positive,
    temperature_at,
)
from estimators.relaxations import (
    Temperature,
    exp_concrete_log_density,
    gumbel,
    log_probabilities,
    relaxed,
    straight_through,
)

KL = Literal["analytic", "sampled", "relaxed"]


class GumbelSoftmax(Estimator):
    """mean_s f(y_s), y_s ~ Concrete(q, tau), differentiated through the draw: biased for tau > 0.

    `kl` chooses the loss of Maddison et al. 2017: `analytic` (eq. 22), the closed form of the categorical KL;
    `sampled` (eq. 21), sum_k y_k log(q_k / p_k) at the relaxed draw; `relaxed` (eq. 20), the log-density ratio of the
    Concrete posterior at tau and the Concrete prior at p(y) and `prior_temperature`, which alone bounds the relaxed
    model's evidence. A bound of several samples has `sampled` and `relaxed` inside the logarithm, draw by draw; the
    closed form of `analytic` is of no draw, and is refused there.

    With K = 2 classes y is BinConcrete (Maddison et al. 2017, appendix B): logit y_1 = (l_1 - l_2 + Logistic) / tau,
    from logits l.

    Raises ValueError for num_samples < 1, a temperature <= 0 or prior_temperature <= 0.
    """

    calls_once = True
    takes_several_samples = True

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
        return None

    def draw(self, log_y: Tensor) -> Tensor:
        """The class vectors [S, B, N, K] that f sees, from relaxed log y [S, B, N, K]."""
        return log_y.exp()

    def forward(
        self, f: CostFunction, logits: Tensor, *, step: int, context: Tensor, generator: torch.Generator
    ) -> Estimate:
        temperature = temperature_at(self.temperature, step)
        log_q = log_probabilities(logits)
        log_y, y = self._draws(log_q, self.num_samples, temperature, generator)
        if self.kl == "analytic":
            kl = kl_from(log_q, self.log_prior)
        else:
            kl = mean_of_draws(self._log_ratio(log_q, log_y, y, temperature))
        return Estimate(
            value=mean_of_draws(f(y)),
            kl=kl,
            auxiliary=logits.new_zeros(()),
            metrics={"evaluations": float(self.num_samples), "temperature": temperature},
        )

    def multi_sample(
        self,
        f: CostFunction,
        logits: Tensor,
        num_samples: int,
        *,
        ratio_weight: float | Tensor,
        step: int,
        context: Tensor,
        generator: torch.Generator,
    ) -> Estimate:
        """L_m at m relaxed draws, differentiated through them: biased for tau > 0.

        With kl=relaxed log w_j has Concrete densities, and L_m bounds the relaxed model's evidence (Maddison et al.
        2017, eq. 20, of several samples); with kl=sampled (eq. 21) it bounds nothing. kl=analytic is refused where
        importance-weighted.
        """
        self.check_several_samples(importance_weighted=is_weighted(ratio_weight))
        at_least("num_samples", num_samples, 1)
        temperature = temperature_at(self.temperature, step)
        log_q = log_probabilities(logits)
        log_y, y = self._draws(log_q, num_samples, temperature, generator)
        log_w = f(y)
        if is_weighted(ratio_weight):
            log_w = log_w - ratio_weight * self._log_ratio(log_q, log_y, y, temperature)
        return Estimate(
            value=log_mean_exp(log_w),
            kl=logits.new_zeros(logits.shape[0]),
            auxiliary=logits.new_zeros(()),
            metrics={"evaluations": float(num_samples), "temperature": temperature},
        )

    def check_several_samples(self, *, importance_weighted: bool) -> None:
        if importance_weighted and self.kl == "analytic":
            raise ValueError("kl must be sampled or relaxed in a bound of several samples, got analytic")

    def _draws(
        self, log_q: Tensor, num_samples: int, temperature: Temperature, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Relaxed log y, and the y that f sees, both [S, B, N, K]."""
        log_y = relaxed(log_q, gumbel((num_samples, *log_q.shape), generator=generator), temperature)
        return log_y, self.draw(log_y)

    def _log_ratio(self, log_q: Tensor, log_y: Tensor, y: Tensor, temperature: Temperature) -> Tensor:
        """log q(y|x) - log p(y) [S, B] as kl=sampled or kl=relaxed has it."""
        if self.kl == "sampled":
            return log_ratio(log_q, y, self.log_prior)
        posterior = exp_concrete_log_density(log_y, log_q, temperature)
        prior_logits = torch.zeros_like(log_q) if self.log_prior is None else self.log_prior
        prior = exp_concrete_log_density(log_y, prior_logits, self.prior_temperature)
        return (posterior - prior).sum(dim=-1)


class StraightThroughGumbelSoftmax(GumbelSoftmax):
    """As Gumbel-Softmax, with f at one_hot(argmax y) and the gradient of the relaxed y (Jang et al. 2017, 2.2)."""

    def draw(self, log_y: Tensor) -> Tensor:
        return straight_through(log_y.exp())
