"""Score-function estimators (REINFORCE, Williams 1992): baselines that need no relaxation, VIMCO and MuProp."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from estimators.contract import (
    CostFunction,
    Estimate,
    Estimator,
    at_least,
    is_weighted,
    kl_from,
    log_mean_exp,
    log_ratio,
    mean_of_draws,
    slope,
    with_gradient_of,
)
from estimators.relaxations import gumbel, gumbel_max, log_probabilities


class Baseline(nn.Module):
    """What is subtracted from a cost. It never contains that cost, and its state changes in training mode alone."""

    minimum_samples = 1

    def prepare(self, context_size: int, num_variables: int, num_classes: int) -> None:
        """Makes networks of its own, if it has any."""

    def forward(self, costs: Tensor, context: Tensor) -> Tensor:
        """b for costs [S, B] of the images in `context` [B, ...], broadcastable to the costs.

        Where b depends on parameters they are fitted to the costs by least squares.
        """
        raise TypeError(f"{type(self).__name__} must define forward(costs, context)")


class NoBaseline(Baseline):
    """b = 0."""

    def forward(self, costs: Tensor, context: Tensor) -> Tensor:
        return torch.zeros_like(costs)


class MovingAverage(Baseline):
    """b = the exponential moving average of earlier minibatches' mean cost (Mnih & Gregor 2014, appendix A).

    The cost that it is subtracted from is never in it: the average is updated after it is used. Raises ValueError
    unless 0 <= decay < 1.
    """

    average: Tensor
    weight: Tensor

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("weight", torch.zeros(()))

    def forward(self, costs: Tensor, context: Tensor) -> Tensor:
        tiny = torch.finfo(self.weight.dtype).tiny
        baseline = (self.average / self.weight.clamp(min=tiny)).clone()
        if self.training:
            self.average.lerp_(costs.mean().to(self.average.dtype), 1 - self.decay)
            self.weight.lerp_(torch.ones_like(self.weight), 1 - self.decay)
        return baseline


class LearnedBaseline(MovingAverage):
    """b(x) = c + a network of x, c the moving average: NVIL (Mnih & Gregor 2014, section 2.3.1), by least squares.

    NVIL's division of the signal by its running deviation is left out: it rescales the gradient.
    Raises ValueError for hidden < 1, or a decay outside [0, 1).
    """

    def __init__(self, hidden: int = 100, decay: float = 0.99) -> None:
        super().__init__(decay)
        self.hidden = at_least("hidden", hidden, 1)

    def prepare(self, context_size: int, num_variables: int, num_classes: int) -> None:
        self.network = nn.Sequential(
            nn.Flatten(), nn.Linear(context_size, self.hidden), nn.Tanh(), nn.Linear(self.hidden, 1)
        )

    def forward(self, costs: Tensor, context: Tensor) -> Tensor:
        return super().forward(costs, context) + self.network(context).float().squeeze(-1)


class LeaveOneOut(Baseline):
    """b_s = the mean cost of the other S - 1 draws for the same image (Mnih & Rezende 2016; Kool et al. 2019)."""

    minimum_samples = 2

    def forward(self, costs: Tensor, context: Tensor) -> Tensor:
        return (costs.sum(dim=0) - costs) / (costs.shape[0] - 1)


class ScoreFunction(Estimator):
    """grad = mean_s [(f(y_s) - b_s) grad log q(y_s) + grad f(y_s)], y_s ~ q: unbiased (Williams 1992).

    Raises ValueError for num_samples below 1, or below 2 with the leave-one-out baseline.
    """

    calls_once = True

    def __init__(self, baseline: Baseline, num_samples: int = 1) -> None:
        super().__init__()
        minimum = getattr(baseline, "minimum_samples", 1)
        if num_samples < minimum:
            reason = f" with the baseline {type(baseline).__name__}" if minimum > 1 else ""
            raise ValueError(f"num_samples must be >= {minimum}{reason}, got {num_samples}")
        self.baseline = baseline
        self.num_samples = num_samples

    def prepare(self, context_size: int, num_variables: int, num_classes: int) -> None:
        self.baseline.prepare(context_size, num_variables, num_classes)

    def depends_on(self, step: int) -> object:
        return None

    def forward(
        self, f: CostFunction, logits: Tensor, *, step: int, context: Tensor, generator: torch.Generator
    ) -> Estimate:
        log_q = log_probabilities(logits)
        y = gumbel_max(log_q.detach(), gumbel((self.num_samples, *logits.shape), generator=generator))
        costs = f(y)
        baseline = self.baseline(costs.detach(), context)
        signal = costs.detach() - baseline.detach()
        value = with_gradient_of(mean_of_draws(costs), (signal * (y * log_q).sum(dim=(-2, -1))).mean(dim=0))
        metrics: dict[str, Tensor | float] = {
            "evaluations": float(self.num_samples),
            "signal_variance": signal.var(correction=0),
        }
        error = squared_error(costs.detach(), baseline)
        return Estimate(value, kl_from(log_q, self.log_prior), error, metrics)


def squared_error(costs: Tensor, baseline: Tensor) -> Tensor:
    """What a learned baseline is fitted by, a scalar; 0 where nothing of it is learned."""
    return (costs - baseline).square().mean() if baseline.requires_grad else costs.new_zeros(())


class VIMCO(ScoreFunction):
    """The score function for bounds of several samples, each with a baseline from the others (Mnih & Rezende 2016).

    `forward`, of one sample, is the score function with the leave-one-out baseline, at `num_samples` draws. Raises
    ValueError for num_samples < 2.
    """

    takes_several_samples = True

    def __init__(self, num_samples: int = 2) -> None:
        super().__init__(LeaveOneOut(), num_samples)

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
        """grad = sum_j [(L - L_-j) grad log q(y_j) + w_j / (sum_i w_i) grad log w_j]: unbiased (eqs. 7-10).

        L = log (1/m) sum_i w_i, and L_-j is L with the others' mean for w_j (`bounds_of_the_others`).
        """
        at_least("num_samples", num_samples, 1)
        log_q = log_probabilities(logits)
        y = gumbel_max(log_q.detach(), gumbel((num_samples, *logits.shape), generator=generator))
        log_w = f(y).float()
        if is_weighted(ratio_weight):
            log_w = log_w - ratio_weight * log_ratio(log_q, y, self.log_prior)
        bound = log_mean_exp(log_w)
        signal = bound.detach() - bounds_of_the_others(log_w.detach())
        metrics: dict[str, Tensor | float] = {
            "evaluations": float(num_samples),
            "signal_variance": signal.var(correction=0),
        }
        value = with_gradient_of(bound, (signal * (y * log_q).sum(dim=(-2, -1))).sum(dim=0))
        return Estimate(value, logits.new_zeros(logits.shape[0]), logits.new_zeros(()), metrics)


def bounds_of_the_others(log_w: Tensor) -> Tensor:
    """log (1/m) sum_i w_i with w_j replaced by the geometric mean of the other m - 1, for each j; from log w [m, B].

    Mnih & Rezende 2016, eq. 10. 0 where there is no other. Takes memory for m^2 B numbers.
    """
    if len(log_w) == 1:
        return torch.zeros_like(log_w)
    of_others = (log_w.sum(dim=0) - log_w) / (len(log_w) - 1)
    is_own = torch.eye(len(log_w), dtype=torch.bool, device=log_w.device).unsqueeze(-1)
    return log_mean_exp(torch.where(is_own, of_others, log_w.unsqueeze(1)))


class MuProp(ScoreFunction):
    """The score function with the mean-field Taylor expansion of f as its baseline: unbiased (Gu et al. 2016, eq. 3).

    grad = mean_s [(r_s - b_s) grad log q(y_s) + grad f(y_s)] + f'(q) grad q,  r_s = f(y_s) - f(q) - f'(q)(y_s - q),

    y_s ~ q, with f continued to the simplex, at S + 1 calls of f; b_s is a baseline of the r_s, none in eq. 3.
    Raises ValueError for num_samples < 1, or below 2 with the leave-one-out baseline.
    """

    calls_once = False

    def __init__(self, num_samples: int = 1, baseline: Baseline | None = None) -> None:
        super().__init__(NoBaseline() if baseline is None else baseline, num_samples)

    def forward(
        self, f: CostFunction, logits: Tensor, *, step: int, context: Tensor, generator: torch.Generator
    ) -> Estimate:
        log_q = log_probabilities(logits)
        mean = log_q.exp().detach().requires_grad_()
        y = gumbel_max(log_q.detach(), gumbel((self.num_samples, *logits.shape), generator=generator))
        costs, at_mean = f(y), f(mean.unsqueeze(0)).squeeze(0)
        slope_at_mean = slope(at_mean, mean)
        taylor = at_mean.detach() + (slope_at_mean * (y - mean.detach())).sum(dim=(-2, -1))
        remainder = costs.detach() - taylor
        baseline = self.baseline(remainder, context)
        signal = remainder - baseline.detach()
        score = (signal * (y * log_q).sum(dim=(-2, -1))).mean(dim=0)
        surrogate = score + (slope_at_mean * log_q.exp()).sum(dim=(-2, -1))
        metrics: dict[str, Tensor | float] = {
            "evaluations": float(self.num_samples + 1),
            "signal_variance": signal.var(correction=0),
        }
        value = with_gradient_of(mean_of_draws(costs), surrogate)
        return Estimate(value, kl_from(log_q, self.log_prior), squared_error(remainder, baseline), metrics)
