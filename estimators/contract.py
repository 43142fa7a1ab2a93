"""The contract that every gradient estimator keeps.

    estimator(f, logits, step=..., context=..., generator=...) -> Estimate

y is N categorical variables of K classes each; the semi-supervised model has N = 1. `f` maps class vectors
y [S, B, N, K] to costs [S, B]; it is deterministic in y and does not close over `logits` [B, N, K]. The estimator
estimates E_{q(y|x)}[f(y)] and its gradient, for q(y|x) = prod_n Categorical(logits_n). Gradients must be enabled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor, nn

from estimators.relaxations import Temperature, log_probabilities

CostFunction = Callable[[Tensor], Tensor]
Schedule = Callable[[int], float]
LEAST_TEMPERATURE = 1e-30


@dataclass
class Estimate:
    """What an estimator returns for a minibatch of B images.

    value      [B]  estimates E_q[f] as a number; its gradient is the estimator's gradient
    kl         [B]  KL(q(y|x) || p(y)), summed over variables, in nats per image; p(y) is the estimator's `log_prior`
    auxiliary  []   a loss for the estimator's own parameters alone
    metrics         scalars to log; `evaluations`, the calls of f per image, is always there
    """

    value: Tensor
    kl: Tensor
    auxiliary: Tensor
    metrics: dict[str, Tensor | float] = field(default_factory=dict)


class Estimator(nn.Module):
    """A gradient estimator: parameters and buffers are its own state, and travel in checkpoints.

    State changes in training mode alone. Whatever needs the sizes of the data is made in `prepare`.
    `log_prior` is log p(y) [K], or [N, K] where variables differ; None where p(y) is uniform. It is set before the
    first call.
    An estimator sets `calls_once` if it calls f once and leaves the gradient through f to the loss: f then takes other
    work along in the same pass. One that defines `multi_sample` sets `takes_several_samples`.
    One with a temperature keeps its schedule in `temperature`, and asks it at each call: while a GPU trains it gives a
    tensor [], so that a step that is recorded once can be replayed at any temperature.
    """

    calls_once = False
    takes_several_samples = False
    log_prior: Tensor | None = None

    @property
    def name(self) -> str:
        """The class's, for logs and results."""
        return type(self).__name__

    def depends_on(self, step: int) -> object:
        """What of `step` an estimate depends on: equal at two steps that do the same but for randomness and data.

        What `temperature` gives does not count. The step itself where a class does not say, which is always right; a
        step is recorded as a CUDA graph only while this stays equal.
        """
        return step

    def prepare(self, context_size: int, num_variables: int, num_classes: int) -> None:
        """Called once, before parameters are counted: makes networks of the estimator's own, if it has any.

        `context_size` is the number of pixels of an image. Raises ValueError for an N and K that it cannot do.
        """

    def __call__(
        self, f: CostFunction, logits: Tensor, *, step: int, context: Tensor, generator: torch.Generator
    ) -> Estimate:
        """`forward`, held to the contract: raises ContractError for a y or an estimate of other shapes."""

        def cost(y: Tensor) -> Tensor:
            if y.shape[-3:] != logits.shape:  # which networks might broadcast, and take other images' classes
                wanted = ", ".join(map(str, logits.shape))
                raise ContractError(f"f must be called with y [S, {wanted}], got {list(y.shape)}")
            return f(y)

        estimate = super().__call__(cost, logits, step=step, context=context, generator=generator)
        check_estimate(estimate, len(logits))
        if logits.requires_grad and not estimate.value.requires_grad:
            raise ContractError("an estimate's value must have a gradient, got one without")
        return estimate

    def forward(
        self, f: CostFunction, logits: Tensor, *, step: int, context: Tensor, generator: torch.Generator
    ) -> Estimate:
        """Estimates E_q[f] for q = prod_n Categorical(logits_n [B, K]); `context` [B, ...] is the images.

        `generator` is the only source of randomness; `step` drives schedules.
        """
        raise TypeError(f"{type(self).__name__} must define forward(f, logits, *, step, context, generator)")

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
        """Estimates L_m = E_{y_1..y_m ~ q}[log (1/m) sum_j w_j], m = num_samples (Burda et al. 2016, eq. 8), in nats.

        f(y_j) [S, B] is log p(x|y_j), and `context` and `generator` are as in `forward`.
        log w_j = f(y_j) + r (log p(y_j) - log q(y_j|x)), with r = `ratio_weight` and p(y) the estimator's `log_prior`.
        At r = 1 L_m is a bound of log p(x); r is below 1, perhaps a tensor [] in (0, 1], while it is warmed up; and 0
        where y is drawn from the model's own p(y|x), as in structured prediction (Raiko et al. 2015). The estimate's
        `value` is the whole bound, and its `kl` is zero; the estimator's own `num_samples`, of `forward`, plays no
        part. Raises ValueError as `check_several_samples` does, and for num_samples < 1.
        """
        self.check_several_samples(importance_weighted=is_weighted(ratio_weight))
        raise TypeError(f"{type(self).__name__} must define multi_sample(f, logits, num_samples, *, ...)")

    def check_several_samples(self, *, importance_weighted: bool) -> None:
        """Raises ValueError where `multi_sample` cannot be asked of this estimator, before any work."""
        if not self.takes_several_samples:
            raise ValueError(
                "estimator must be one that takes several samples in one bound: vimco, gumbel_softmax, "
                f"st_gumbel_softmax or concrete, got {type(self).__name__}"
            )


def is_weighted(ratio_weight: float | Tensor) -> bool:
    """Whether the `ratio_weight` of `multi_sample` is above 0, which a tensor always is."""
    return isinstance(ratio_weight, Tensor) or ratio_weight > 0


class ContractError(ValueError):
    """An estimator, perhaps somebody's own, gave something else than the contract says."""


def check_estimate(estimate: Estimate, batch: int) -> None:
    """Raises ContractError unless it is an estimate of `batch` images, with the shapes that it must have."""
    if not isinstance(estimate, Estimate):
        raise ContractError(f"an estimator must return an Estimate, got a {type(estimate).__name__}")
    wanted = {"value": (batch,), "kl": (batch,), "auxiliary": ()}
    for name, shape in wanted.items():
        got = getattr(estimate, name)
        if not isinstance(got, Tensor) or got.shape != shape:
            found = list(got.shape) if isinstance(got, Tensor) else type(got).__name__
            raise ContractError(f"an estimate's {name} must be a tensor {list(shape)}, got {found}")
    if "evaluations" not in estimate.metrics:
        raise ContractError("an estimate's metrics must have evaluations, the calls of f per image")
    for name, metric in estimate.metrics.items():
        if metric.shape if isinstance(metric, Tensor) else not isinstance(metric, Real):
            found = f"one of {list(metric.shape)}" if isinstance(metric, Tensor) else f"a {type(metric).__name__}"
            raise ContractError(f"an estimate's metric {name} must be a number or a tensor [], got {found}")


def with_gradient_of(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value` as a number, with the gradients of both `value` and `surrogate`."""
    return value + (surrogate - surrogate.detach())


def at_logits(logits: Tensor, gradient: Tensor) -> Tensor:
    """A surrogate [B] whose gradient at logits [B, N, K] is `gradient` [B, N, K], which must sum to zero over K.

    A gradient through a softmax does. The surrogate is finite also for logits of -inf.
    """
    return (log_probabilities(logits) * gradient.detach()).sum(dim=(-2, -1))


def slope(costs: Tensor, at: Tensor, create_graph: bool = False) -> Tensor:
    """The gradient of sum(costs) at a tensor that they were computed from; zero where they do not depend on it."""
    if not costs.requires_grad:
        return torch.zeros_like(at)
    (gradient,) = torch.autograd.grad(costs.sum(), at, create_graph=create_graph, materialize_grads=True)
    return gradient


def only_to(parameters: list[nn.Parameter], loss: Tensor) -> Tensor:
    """`loss` as a number, with its gradient to `parameters` and to nothing else: an auxiliary loss."""
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    linear = sum((p * g).sum() for p, g in zip(parameters, gradients, strict=True))
    return with_gradient_of(loss.detach(), torch.as_tensor(linear))


def at_least(name: str, value: int, minimum: int) -> int:
    """`value`. Raises ValueError if it is below `minimum`."""
    if value < minimum:
        raise ValueError(f"{name} must be >= {minimum}, got {value}")
    return value


def positive(name: str, value: float) -> float:
    """`value`. Raises ValueError unless it is > 0 and finite."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be > 0 and finite, got {value}")
    return value


def temperature_at(schedule: Callable[[int], Temperature], step: int) -> Temperature:
    """tau at `step`. Raises ContractError unless logits, which are -1e6 at least, can be divided by it in float32."""
    temperature = schedule(step)
    if isinstance(temperature, Tensor):  # of a schedule that is held, and was looked at when it was written
        return temperature
    if not (math.isfinite(temperature) and temperature >= LEAST_TEMPERATURE):
        raise ContractError(
            f"temperature must be >= {LEAST_TEMPERATURE:g} and finite, got {temperature} at step {step}"
        )
    return temperature


def categorical_kl(logits: Tensor, log_prior: Tensor | None = None) -> Tensor:
    """KL(q(y|x) || p(y)) = sum_n -H(q(y_n|x)) - E_q[log p(y_n)] [B], in nats, from logits [B, N, K].

    `log_prior` is as an estimator's.
    """
    return kl_from(log_probabilities(logits), log_prior)


def kl_from(log_q: Tensor, log_prior: Tensor | None = None) -> Tensor:
    """`categorical_kl` of log q, for estimators that need it for more and normalise once: the log-ratio at y = q."""
    return log_ratio(log_q, log_q.exp(), log_prior)


def log_ratio(log_q: Tensor, y: Tensor, log_prior: Tensor | None = None) -> Tensor:
    """sum_n sum_k y_nk (log q_nk - log p_nk) [S, B], in nats, at y [S, B, N, K] and from log q [B, N, K].

    It is log q(y|x) - log p(y) where y is one-hot. `log_prior` is as an estimator's.
    """
    log_p = -math.log(log_q.shape[-1]) if log_prior is None else log_prior
    return (y * (log_q - log_p)).sum(dim=(-2, -1))


def mean_of_draws(costs: Tensor) -> Tensor:
    """The mean [B] of the costs [S, B] of S draws; that of one without an operation."""
    return costs.squeeze(0) if len(costs) == 1 else costs.mean(dim=0)


def log_mean_exp(log_w: Tensor) -> Tensor:
    """log (1/m) sum_j w_j [...] from log w [m, ...], in nats."""
    return log_w.float().logsumexp(dim=0) - math.log(len(log_w))


def entropy(logits: Tensor) -> Tensor:
    """H(q) = -sum_k q_k log q_k [...] in nats, of each variable, from logits [..., K]; 0 log 0 = 0. No gradient."""
    q = logits.detach().float().softmax(dim=-1)
    return -torch.xlogy(q, q).sum(dim=-1)
