"""The score function with a relaxation as its control variate: REBAR and RELAX. Both are unbiased."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from estimators.contract import (
    CostFunction,
    Estimate,
    Estimator,
    at_least,
    at_logits,
    categorical_kl,
    mean_of_draws,
    only_to,
    positive,
    slope,
    with_gradient_of,
)
from estimators.relaxations import gumbel, log_probabilities, one_hot

LOG_RANGE = math.log(1e3)  # of a learned temperature, from 1/1000 to 1000


class REBAR(Estimator):
    """grad = mean_s [(f(y) - c(z')) grad log q(y) + grad c(z) - grad c(z')]: REBAR (Tucker et al. 2017).

    As in eq. 9 of Grathwohl et al. 2018: y = one_hot(argmax z), z = log q + Gumbel, z' a draw of z given y, c(z) =
    scale f(softmax(z / tau)), and both paths, through z and through z', are differentiated. The noise of z' is tied
    to that of z, as in REBAR's published implementation, so that z' = z as a number and f is called twice a draw, not
    three times; `moved` is what is left of the paths. `scale` and tau are learned: `auxiliary` is the mean squared
    norm of grad at the logits, with the gradient of the variance, because the mean depends on neither (their eq. 7).

    Raises ValueError for num_samples < 1, a temperature outside [1e-3, 1e3] or a scale that is not finite.
    """

    def __init__(self, temperature: float = 0.5, scale: float = 1.0, num_samples: int = 1) -> None:
        super().__init__()
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")
        if not abs(math.log(positive("temperature", temperature))) <= LOG_RANGE:
            raise ValueError(f"temperature must be in [1e-3, 1e3], got {temperature}")
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.num_samples = at_least("num_samples", num_samples, 1)

    def depends_on(self, step: int) -> object:
        return None

    def control(self, relaxed_costs: Tensor, relaxed: Tensor, context: Tensor) -> Tensor:
        """c [S, B] at relaxed y [S, B, N, K], given f there [S, B]."""
        return self.scale * relaxed_costs

    def moved(self, z: Tensor, y: Tensor) -> Tensor:
        """d(z_k - z'_k) / d log q_k [S, B, N, K] at z' = z: exp(z_k - z_y).

        z_k = log q_k + Gumbel moves by 1. The largest, z'_y, is a standard Gumbel at every q, and the others are
        z'_k = -log(exp(-g_k) / q_k + exp(-z'_y)) (`conditional_perturbed`), which move by 1 - exp(z'_k - z'_y).
        """
        return (z - (y * z).sum(dim=-1, keepdim=True)).exp()

    def forward(
        self, f: CostFunction, logits: Tensor, *, step: int, context: Tensor, generator: torch.Generator
    ) -> Estimate:
        log_q = log_probabilities(logits.detach())
        q = log_q.exp()
        z = (log_q + gumbel((self.num_samples, *logits.shape), generator=generator)).requires_grad_()
        y = one_hot(z.argmax(dim=-1), z.shape[-1])
        temperature = self.log_temperature.clamp(-LOG_RANGE, LOG_RANGE).exp()
        relaxed = (z / temperature).softmax(dim=-1)

        costs = f(y)
        control = self.control(f(relaxed), relaxed, context)
        path = slope(control, z, create_graph=self.training) * self.moved(z.detach(), y)
        path = path - q * path.sum(dim=-1, keepdim=True)  # from log q to the logits
        signal = costs.detach() - control
        gradient = (signal[..., None, None] * (y - q) + path).sum(dim=0) / self.num_samples  # y - q is grad log q(y)

        value = with_gradient_of(mean_of_draws(costs), at_logits(logits, gradient))
        auxiliary = logits.new_zeros(())
        if self.training:
            auxiliary = only_to(list(self.parameters()), gradient.square().sum(dim=(-2, -1)).mean())
        metrics: dict[str, Tensor | float] = {
            "evaluations": 2.0 * self.num_samples,
            "control_temperature": temperature.detach(),
            "control_scale": self.scale.detach(),
            "signal_variance": signal.detach().var(correction=0),
        }
        return Estimate(value, categorical_kl(logits, self.log_prior), auxiliary, metrics)


class RELAX(REBAR):
    """REBAR with a control that is learned: c(z) = scale f(y) + r(y, x), y = softmax(z / tau) (Grathwohl et al. 2018).

    r is a network with one hidden layer that starts at zero, so training starts from REBAR. It sees x as well, on
    which the cost depends, and the relaxed y in place of z, which is bounded. Raises ValueError also for hidden < 1.
    """

    def __init__(self, temperature: float = 0.5, scale: float = 1.0, num_samples: int = 1, hidden: int = 100) -> None:
        super().__init__(temperature, scale, num_samples)
        self.hidden = at_least("hidden", hidden, 1)

    def prepare(self, context_size: int, num_variables: int, num_classes: int) -> None:
        self.from_context = nn.Linear(context_size, self.hidden)
        self.from_class = nn.Linear(num_variables * num_classes, self.hidden, bias=False)
        self.output = nn.Linear(self.hidden, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def control(self, relaxed_costs: Tensor, relaxed: Tensor, context: Tensor) -> Tensor:
        hidden = (self.from_context(context.flatten(1)) + self.from_class(relaxed.flatten(-2))).tanh()
        return super().control(relaxed_costs, relaxed, context) + self.output(hidden).float().squeeze(-1)
