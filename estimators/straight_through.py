"""Straight-through estimators: f at a discrete draw y ~ q, and a gradient of y that is made up.

All are biased, and call f once a draw. The gradient of f at y comes from f's continuation to the simplex.
"""

from __future__ import annotations

import torch
from torch import Tensor

from estimators.contract import CostFunction, Estimate, Estimator, Schedule, at_least, categorical_kl, temperature_at
from estimators.relaxations import LOG_ZERO, conditional_perturbed, gumbel, gumbel_max, log_probabilities


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
        return self.temperature(step)

    def surrogate(self, log_q: Tensor, y: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
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
            value=f(y + (soft - soft.detach())).mean(dim=0),
            kl=categorical_kl(logits, self.log_prior),
            auxiliary=logits.new_zeros(()),
            metrics={"evaluations": float(self.num_samples), "temperature": temperature},
        )


class ReinMax(StraightThrough):
    """y ~ q with the gradient of 2 p_1 - q / 2 (Liu et al. 2023, algorithm 2), exact for quadratic f at tau 1.

    p_1 = softmax(log q + sg(log((y + softmax(logits / tau)) / 2) - log q)), sg stopping the gradient: a softmax that
    is half y and half q.
    """

    def surrogate(self, log_q: Tensor, y: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        middle = (y + (log_q / temperature).softmax(dim=-1)) / 2
        shift = (middle.log().clamp(min=LOG_ZERO) - log_q).detach()
        return 2 * (log_q + shift).softmax(dim=-1) - log_q.exp() / 2


class GumbelRao(StraightThrough):
    """Straight-through Gumbel-Softmax, averaged over M draws of the Gumbels given y (Paulus et al. 2021, eq. 8).

    Its mean is straight-through Gumbel-Softmax's, its variance lower. The conditional noise is not differentiated.
    Raises ValueError also for num_conditional < 1.
    """

    def __init__(self, temperature: Schedule, num_samples: int = 1, num_conditional: int = 10) -> None:
        super().__init__(temperature, num_samples)
        self.num_conditional = at_least("num_conditional", num_conditional, 1)

    def surrogate(self, log_q: Tensor, y: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        fresh = gumbel((self.num_conditional, *y.shape), generator=generator)
        noise = (conditional_perturbed(log_q, y, fresh) - log_q).detach()
        return ((log_q + noise) / temperature).softmax(dim=-1).mean(dim=0)


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

    def surrogate(self, log_q: Tensor, y: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        fixed = log_q.detach()
        largest = fixed.max(dim=-1, keepdim=True).values
        lift = y * (largest - fixed)
        push = (1 - y) * (fixed - (largest - self.gap)).clamp(min=0)
        return ((log_q + lift - push) / temperature).softmax(dim=-1)
