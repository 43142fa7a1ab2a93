"""Straight-through estimators: f at a discrete draw y ~ q, and a gradient of y that is made up.

All are biased, and call f once a draw. The gradient of f at y comes from f's continuation to the simplex.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from estimators.contract import (
    CostFunction,
    Estimate,
    Estimator,
    Schedule,
    at_least,
    kl_from,
    mean_of_draws,
    temperature_at,
)
from estimators.relaxations import (
    LOG_ZERO,
    Temperature,
    conditional_perturbed,
    gumbel,
    gumbel_max,
    log_probabilities,
)


class StraightThrough(Estimator):
    """y ~ q with the gradient of softmax(logits / tau) (Bengio, Leonard, Courville 2013; exact for linear f at tau 1).

    tau != 1 is the decoupled estimator of Shah et al. 2024 with their forward temperature at 1, so that y ~ q.
    Raises ValueError for num_samples < 1 or a temperature <= 0.
    """

    calls_once = True

    def __init__(self, temperature: Schedule, num_samples: int = 1) -> None:
        super().__init__()
        self.temperature = temperature
        self.num_samples = at_least("num_samples", num_samples, 1)
        temperature_at(temperature, 0)

    def depends_on(self, step: int) -> object:
        return None

    def surrogate(self, log_q: Tensor, y: Tensor, temperature: Temperature, generator: torch.Generator) -> Tensor:
        """What y [S, B, N, K] has its gradient from, broadcastable to y, given log q [B, N, K]."""
        return (log_q / temperature).softmax(dim=-1)

    def forward(
        self, f: CostFunction, logits: Tensor, *, step: int, context: Tensor, generator: torch.Generator
    ) -> Estimate:
        temperature = temperature_at(self.temperature, step)
        log_q = log_probabilities(logits)
        y = gumbel_max(log_q.detach(), gumbel((self.num_samples, *logits.shape), generator=generator))
        soft = self.surrogate(log_q, y, temperature, generator)
        return Estimate(
            value=mean_of_draws(f(y + (soft - soft.detach()))),
            kl=kl_from(log_q, self.log_prior),
            auxiliary=logits.new_zeros(()),
            metrics={"evaluations": float(self.num_samples), "temperature": temperature},
        )


def heun_middle(q: Tensor, y: Tensor) -> Tensor:
    """log((y + q) / 2) [S, B, N, K], finite, from q [B, N, K]: log pi_D of Liu et al. 2023."""
    return ((y + q) / 2).log().clamp(min=LOG_ZERO)


class ReinMax(StraightThrough):
    """y ~ q with the gradient of 2 p_1 - q / 2 (Liu et al. 2023, algorithm 2), exact for quadratic f at tau 1.

    p_1 = softmax(log q + sg(log((y + softmax(logits / tau)) / 2) - log q)), sg stopping the gradient: a softmax that
    is half y and half q.
    """

    def surrogate(self, log_q: Tensor, y: Tensor, temperature: Temperature, generator: torch.Generator) -> Tensor:
        return heun(log_q, y, temperature)


def heun(log_q: Tensor, y: Tensor, temperature: Temperature) -> Tensor:
    """2 p_1 - q / 2 [S, B, N, K] as in ReinMax."""
    shift = (heun_middle((log_q / temperature).softmax(dim=-1), y) - log_q).detach()
    return 2 * (log_q + shift).softmax(dim=-1) - log_q.exp() / 2


class GumbelRao(StraightThrough):
    """Straight-through Gumbel-Softmax, averaged over M draws of the Gumbels given y (Paulus et al. 2021, eq. 10).

    Its mean is straight-through Gumbel-Softmax's, its variance lower. The conditional noise is not differentiated.
    Raises ValueError also for num_conditional < 1.
    """

    def __init__(self, temperature: Schedule, num_samples: int = 1, num_conditional: int = 10) -> None:
        super().__init__(temperature, num_samples)
        self.num_conditional = at_least("num_conditional", num_conditional, 1)

    def surrogate(self, log_q: Tensor, y: Tensor, temperature: Temperature, generator: torch.Generator) -> Tensor:
        fresh = gumbel((self.num_conditional, *y.shape), generator=generator)
        return conditional_softmax(log_q, log_q, y, fresh, temperature).mean(dim=0)


def conditional_softmax(log_q: Tensor, at: Tensor, y: Tensor, fresh: Tensor, temperature: Temperature) -> Tensor:
    """softmax((at + G) / tau), G the Gumbels given that y is the argmax of at + G; its gradient goes to log q alone.

    `fresh` are standard Gumbels [M, S, B, N, K], and so is what comes back.
    """
    noise = (conditional_perturbed(at, y, fresh) - log_q).detach()
    return ((log_q + noise) / temperature).softmax(dim=-1)


class ReinMaxRao(GumbelRao):
    """y ~ q with the gradient of 2 r - q / 2: ReinMax with Gumbel-Rao in its first term (Wang & Bui 2026).

    r is softmax((log pi_D + G) / tau), pi_D = (y + q) / 2, averaged over M draws of the Gumbels G given that y is the
    argmax of log pi_D + G. It does not Rao-Blackwellise ReinMax, which has no noise given y, but has another mean: on a
    linear f, where ReinMax is exact, half the exact gradient as tau -> 0, and minus a half as tau -> infinity.
    """

    def surrogate(self, log_q: Tensor, y: Tensor, temperature: Temperature, generator: torch.Generator) -> Tensor:
        fresh = gumbel((self.num_conditional, *y.shape), generator=generator)
        soft = conditional_softmax(log_q, heun_middle(log_q.exp(), y), y, fresh, temperature)
        return 2 * soft.mean(dim=0) - log_q.exp() / 2


class ReinMaxCV(GumbelRao):
    """ReinMax at tau 1 plus eta (r - r_0) (Wang & Bui 2026): r as in ReinMax-Rao, r_0 one more such draw.

    r - r_0 has mean zero given y, as a control variate must, because both have their Gumbels given that y is the argmax
    at log pi_D: those that y came from, given its argmax at log q, would move the mean. So the mean is ReinMax's for
    every eta and tau; and as ReinMax has no noise given y, the variance is ReinMax's plus eta^2 times that of r - r_0:
    it can only add, and is least at eta = 0. Raises ValueError also for an eta that is not finite.
    """

    def __init__(
        self, temperature: Schedule, num_samples: int = 1, num_conditional: int = 10, eta: float = 0.5
    ) -> None:
        super().__init__(temperature, num_samples, num_conditional)
        if not math.isfinite(eta):
            raise ValueError(f"eta must be finite, got {eta}")
        self.eta = eta

    def surrogate(self, log_q: Tensor, y: Tensor, temperature: Temperature, generator: torch.Generator) -> Tensor:
        fresh = gumbel((self.num_conditional + 1, *y.shape), generator=generator)
        soft = conditional_softmax(log_q, heun_middle(log_q.exp(), y), y, fresh, temperature)
        return heun(log_q, y, 1.0) + self.eta * (soft[1:].mean(dim=0) - soft[0])


class GappedStraightThrough(StraightThrough):
    """y ~ q with the gradient of softmax((logits + m_1 - m_2) / tau) (Fan et al. 2022, section 4).

    m_1 lifts y's logit to the largest, m_2 pushes the others at least `gap` below it, and neither is differentiated:
    the argmax is y without any Gumbel noise. Raises ValueError also for a gap < 0.
    """

    def __init__(self, temperature: Schedule, num_samples: int = 1, gap: float = 1.0) -> None:
        super().__init__(temperature, num_samples)
        if not 0 <= gap < float("inf"):
            raise ValueError(f"gap must be >= 0 and finite, got {gap}")
        self.gap = gap

    def surrogate(self, log_q: Tensor, y: Tensor, temperature: Temperature, generator: torch.Generator) -> Tensor:
        fixed = log_q.detach()
        largest = fixed.max(dim=-1, keepdim=True).values
        lift = y * (largest - fixed)
        push = (1 - y) * (fixed - (largest - self.gap)).clamp(min=0)
        return ((log_q + lift - push) / temperature).softmax(dim=-1)
