"""Samplers and densities of the categorical distribution and its relaxations, as pure functions.

Logits need not be normalised. All noise is drawn in float32, whatever the precision around it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from estimators.shared import drawn

Temperature = float | Tensor  # a tensor [] where it is read on the device
TINY = torch.finfo(torch.float32).tiny
LOG_ZERO = -1e6  # stands for log 0: far below any log-probability of use, and finite after division by tau


def log_probabilities(logits: Tensor) -> Tensor:
    """Normalised log-probabilities [..., K] in float32, finite also for classes of probability zero."""
    log_q = torch.log_softmax(logits.float(), dim=-1)
    return torch.nn.functional.threshold(log_q, LOG_ZERO, LOG_ZERO)  # a clamp whose gradient is one operation


def log_of(temperature: Temperature) -> Temperature:
    return temperature.log() if isinstance(temperature, Tensor) else math.log(temperature)


def gumbel(shape: tuple[int, ...], *, generator: torch.Generator, rows: int = -3) -> Tensor:
    """Standard Gumbel noise g = -log(E), E ~ Exponential(1), always finite, on the generator's device.

    Dimension `rows` of the shape is the images of the minibatch.
    """
    return -exponential(shape, generator=generator, rows=rows).log()


def exponential(shape: tuple[int, ...], *, generator: torch.Generator, rows: int = -3) -> Tensor:
    """Standard exponential noise, never 0, on the generator's device; `rows` as in `gumbel`."""

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, device=generator.device).exponential_(generator=generator)

    return drawn(draw, shape, rows, generator).clamp(min=TINY)


def one_hot(index: Tensor, num_classes: int) -> Tensor:
    """One-hot float vectors [..., K] of class indices [...]."""
    return torch.zeros(*index.shape, num_classes, device=index.device).scatter_(-1, index.unsqueeze(-1), 1.0)


def gumbel_max(logits: Tensor, gumbels: Tensor) -> Tensor:
    """Exact categorical draws y = one_hot(argmax_k(log pi_k + g_k)) [..., K] (Jang et al. 2017, eq. 1)."""
    return one_hot((logits + gumbels).argmax(dim=-1), logits.shape[-1])


def gumbel_softmax(logits: Tensor, gumbels: Tensor, temperature: Temperature) -> Tensor:
    """Relaxed draws y_k = softmax_k((log pi_k + g_k) / tau) [..., K] (Jang et al. 2017, eq. 2).

    P(argmax y = k) = pi_k at every temperature.
    """
    return concrete_log_sample(logits, gumbels, temperature).exp()


def concrete_log_sample(logits: Tensor, gumbels: Tensor, temperature: Temperature) -> Tensor:
    """log y of a relaxed draw, y ~ Concrete(pi, tau) [..., K]: ExpConcrete (Maddison et al. 2017, C.3)."""
    return relaxed(log_probabilities(logits), gumbels, temperature)


def relaxed(log_q: Tensor, gumbels: Tensor, temperature: Temperature) -> Tensor:
    """`concrete_log_sample` of what `log_probabilities` gives."""
    return torch.log_softmax((log_q + gumbels) / temperature, dim=-1)


def conditional_perturbed(logits: Tensor, y: Tensor, gumbels: Tensor) -> Tensor:
    """log pi + G given that one-hot y [..., K] is its argmax, from fresh standard Gumbels [..., K], differentiable.

    Where y_i = 1 it is g_i, the largest of log pi + G being a standard Gumbel; elsewhere
    -log(exp(-g_k) / pi_k + exp(-g_i)) (Maddison et al. 2014; Tucker et al. 2017, appendix C).
    """
    top = (y * gumbels).sum(dim=-1, keepdim=True)
    below = -torch.logaddexp(-gumbels - log_probabilities(logits), -top)
    return torch.where(y > 0, top, below)


def straight_through(soft: Tensor) -> Tensor:
    """one_hot(argmax soft) forward, the gradient of `soft` backward (Jang et al. 2017, section 2.2)."""
    hard = one_hot(soft.argmax(dim=-1), soft.shape[-1])
    return hard + (soft - soft.detach())


def exp_concrete_log_density(log_y: Tensor, logits: Tensor, temperature: Temperature) -> Tensor:
    """log density of log y under ExpConcrete(pi, tau) (Maddison et al. 2017, C.3), [...] from [..., K]:

    log (K-1)! + (K-1) log tau + sum_k s_k - K logsumexp_k s_k,  s_k = log pi_k - tau log y_k.

    The density is with respect to the K - 1 log-ratios log y_k - log y_K.
    """
    num_classes = logits.shape[-1]
    score = log_probabilities(logits) - temperature * log_y
    return (
        math.lgamma(num_classes)
        + (num_classes - 1) * log_of(temperature)
        + (score - score.logsumexp(dim=-1, keepdim=True)).sum(dim=-1)
    )


def concrete_log_density(log_y: Tensor, logits: Tensor, temperature: Temperature) -> Tensor:
    """log density of y itself under Concrete(pi, tau) on the simplex (Maddison et al. 2017, eq. 11), at log y."""
    return exp_concrete_log_density(log_y, logits, temperature) - log_y.sum(dim=-1)


def logistic(shape: tuple[int, ...], *, generator: torch.Generator) -> Tensor:
    """Standard logistic noise, the difference of two Gumbels, always finite, on the generator's device."""
    return gumbel(shape, generator=generator) - gumbel(shape, generator=generator)


def binary_concrete_logit_sample(logit: Tensor, noise: Tensor, temperature: Temperature) -> Tensor:
    """logit y of a relaxed binary draw, y ~ BinConcrete (Maddison et al. 2017, eq. 16): (logit pi + L) / tau.

    P(y > 1/2) = pi at every temperature. With K = 2 classes it is logit y_1 of `concrete_log_sample`.
    """
    return (logit + noise) / temperature


def binary_concrete_logit_log_density(y_logit: Tensor, logit: Tensor, temperature: Temperature) -> Tensor:
    """log density of logit y under BinConcrete(pi, tau) (Maddison et al. 2017, C.3.2), [...] from [...]:

    log tau + s - 2 softplus(s),  s = logit pi - tau logit y.
    """
    score = logit - temperature * y_logit
    return log_of(temperature) + score - 2 * torch.nn.functional.softplus(score)


def binary_concrete_log_density(y_logit: Tensor, logit: Tensor, temperature: Temperature) -> Tensor:
    """log density of y itself on (0, 1) under BinConcrete(pi, tau) (Maddison et al. 2017, eq. 17), at logit y."""
    log_jacobian = torch.nn.functional.softplus(y_logit) + torch.nn.functional.softplus(-y_logit)
    return binary_concrete_logit_log_density(y_logit, logit, temperature) + log_jacobian
