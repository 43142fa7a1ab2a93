"""The score-function estimator (REINFORCE, Williams 1992) and its baselines."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from estimators.contract import CostFunction, Estimate, Estimator, categorical_kl, with_gradient_of
from estimators.relaxations import gumbel, gumbel_max, log_probabilities


class NoBaseline(nn.Module):
    """b = 0."""

    minimum_samples = 1

    def forward(self, costs: Tensor) -> Tensor:
        return torch.zeros_like(costs)


class MovingAverage(nn.Module):
    """b = the exponential moving average of earlier minibatches' mean cost (Mnih & Gregor 2014, section 2.3.1).

    The cost that it is subtracted from is never in it: the average is updated after it is used. Raises ValueError
    unless 0 <= decay < 1.
    """

    minimum_samples = 1
    average: Tensor
    weight: Tensor

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("weight", torch.zeros(()))

    def forward(self, costs: Tensor) -> Tensor:
        """Baseline for costs [S, B], broadcastable; updates its state in training mode."""
        tiny = torch.finfo(self.weight.dtype).tiny
        baseline = (self.average / self.weight.clamp(min=tiny)).clone()
        if self.training:
            self.average.lerp_(costs.mean().to(self.average.dtype), 1 - self.decay)
            self.weight.lerp_(torch.ones_like(self.weight), 1 - self.decay)
        return baseline


class LeaveOneOut(nn.Module):
    """b_s = the mean cost of the other S - 1 draws for the same image (Mnih & Rezende 2016; Kool et al. 2019)."""

    minimum_samples = 2

    def forward(self, costs: Tensor) -> Tensor:
        return (costs.sum(dim=0) - costs) / (costs.shape[0] - 1)


class ScoreFunction(Estimator):
    """grad = mean_s [(f(y_s) - b_s) grad log q(y_s) + grad f(y_s)], y_s ~ q: unbiased (Williams 1992).

    Raises ValueError for num_samples below 1, or below 2 with the leave-one-out baseline.
    """

    def __init__(self, baseline: nn.Module, num_samples: int = 1) -> None:
        super().__init__()
        minimum = getattr(baseline, "minimum_samples", 1)
        if num_samples < minimum:
            raise ValueError(
                f"num_samples must be >= {minimum} with the baseline {type(baseline).__name__}, got {num_samples}"
            )
        self.baseline = baseline
        self.num_samples = num_samples

    def forward(
        self, f: CostFunction, logits: Tensor, *, step: int, context: Tensor, generator: torch.Generator
    ) -> Estimate:
        y = gumbel_max(logits.detach(), gumbel((self.num_samples, *logits.shape), generator=generator))
        costs = f(y)
        log_q = (y * log_probabilities(logits)).sum(dim=-1)
        signal = costs.detach() - self.baseline(costs.detach())
        value = with_gradient_of(costs.mean(dim=0), (signal * log_q).mean(dim=0))
        metrics: dict[str, Tensor | float] = {
            "evaluations": float(self.num_samples),
            "signal_variance": signal.var(correction=0),
        }
        return Estimate(value, categorical_kl(logits), logits.new_zeros(()), metrics)
