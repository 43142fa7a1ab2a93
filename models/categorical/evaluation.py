"""Evaluation by one-hot classes: exact where the joint classes are few, else by draws of the posterior."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from estimators.contract import categorical_kl
from estimators.joint import MOST, all_classes, outer
from estimators.relaxations import log_probabilities, one_hot
from models.contract import PerImage
from models.evaluation import rows_at_once

if TYPE_CHECKING:
    from models.categorical.model import CategoricalVAE


def is_enumerable(model: CategoricalVAE) -> bool:
    """Whether one layer has few enough joint classes that none has to be drawn."""
    (variables, classes), *others = model.latents
    return not others and classes**variables <= MOST


def classes_at(q: Tensor, uniform: Tensor) -> Tensor:
    """One-hot draws [..., N, K] of probabilities q [..., N, K], each by one uniform number [..., N] in [0, 1).

    Sums in float32 may end short of 1, and what is left would go to the last class, however improbable it is.
    """
    sums = q.double().cumsum(dim=-1)
    below = (sums / sums[..., -1:]).float()[..., :-1]
    return one_hot((uniform.unsqueeze(-1) >= below).sum(dim=-1), q.shape[-1])


def draw_prior(model: CategoricalVAE, number: int, generator: torch.Generator) -> Tensor:
    """One-hot y [number, N, K] of the lowest layer, drawn from p(y_L) and downwards."""
    device = generator.device
    log_prior = model.log_prior
    logits = torch.zeros(model.latents[-1], device=device) if log_prior is None else log_prior
    for layer in reversed(range(len(model.latents))):
        uniform = torch.rand(number, model.latents[layer][0], device=device, generator=generator)
        y = classes_at(logits.softmax(dim=-1), uniform)
        if layer > 0:
            logits = model.generators[layer](y.unsqueeze(0))[0].unflatten(-1, model.latents[layer - 1])
    return y


def terms(model: CategoricalVAE, x: Tensor, uniform: Tensor) -> tuple[dict[str, Tensor], PerImage]:
    """The bound E_q[log p(x|y)] - KL(q(y|x) || p(y)) and its parts, each [B], at a draw by uniform numbers [B, N + ..].

    Exact where y can be enumerated; the KL of one layer always is. Of several, `kl_y` is what is left of the bound.
    """
    logits = model.logits(0, x)
    q = logits.softmax(dim=-1)
    if is_enumerable(model):
        costs = enumerated(model, x, logits)
        reconstruction = (outer(q, torch.mul).T * costs).sum(dim=0)
        kl_y = categorical_kl(logits, model.log_prior)
    else:
        reconstruction, kl_y = drawn_terms(model, x, logits, uniform)
    bound = reconstruction - kl_y
    return {"bound": bound, "reconstruction": reconstruction, "kl_y": kl_y}, PerImage(q, bound)


def drawn_terms(model: CategoricalVAE, x: Tensor, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """log p(x|y_1) [B] at a draw of all layers, and the KL of all layers [B], that of each layer in closed form."""
    below, reconstruction, kl = x, None, torch.zeros(len(x), device=x.device)
    for layer, (variables, classes) in enumerate(model.latents):
        own, uniform = uniform[:, :variables], uniform[:, variables:]
        if layer > 0:
            logits = model.logits(layer, below)
        y = classes_at(logits.softmax(dim=-1), own)
        log_prob = model.log_prob(layer, below, y.unsqueeze(0))[0]
        if reconstruction is None:
            reconstruction = log_prob
        else:
            kl = kl - log_prob  # log p(y_l-1|y_l), whose layer has left it to this one
        is_top = layer == len(model.latents) - 1
        kl = kl + categorical_kl(logits, model.log_prior if is_top else None)
        if not is_top:
            kl = kl - variables * math.log(classes)
        below = y
    assert reconstruction is not None
    return reconstruction, kl


def enumerated(model: CategoricalVAE, x: Tensor, logits: Tensor) -> Tensor:
    """log p(x|y) [K^N, B] at every joint class of one layer, as many at once as memory is meant for."""
    at_once = max(1, rows_at_once(math.prod(x.shape[1:])) // max(1, len(x)))
    return torch.cat([model.log_prob(0, x, y) for y in all_classes(logits).split(at_once)])


def importance_weighted(model: CategoricalVAE, x: Tensor, draws: Iterable[Tensor]) -> Tensor:
    """log (1/S) sum_s p(x, y_s) / q(y_s|x) [B], nats (Burda et al. 2016, eq. 8), y_s by uniform numbers [B, N + ..].

    Exact, log sum_y p(x, y), where y can be enumerated.
    """
    logits = model.logits(0, x)
    if is_enumerable(model):
        log_prior = model.log_prior
        prior = torch.zeros_like(logits) if log_prior is None else log_prior.expand_as(logits)
        for _ in draws:  # whoever draws them counts how far this is
            pass
        return (enumerated(model, x, logits) + outer(log_probabilities(prior)).T).logsumexp(dim=0)
    number, at_a_time = 0, max(1, rows_at_once(math.prod(x.shape[1:])) // max(1, len(x)))
    total = torch.full((len(x),), -math.inf, device=x.device).double()  # thousands of small terms are added to it
    for uniform in at_once(draws, at_a_time):
        total = torch.logaddexp(total, log_weights(model, x, logits, uniform).double().logsumexp(dim=0))
        number += len(uniform)
    return (total - math.log(number)).float()


def at_once(draws: Iterable[Tensor], number: int) -> Iterator[Tensor]:
    """Draws [B, ...] stacked to [S, B, ...], S at most `number`."""
    held: list[Tensor] = []
    for draw in draws:
        held.append(draw)
        if len(held) == number:
            yield torch.stack(held)
            held = []
    if held:
        yield torch.stack(held)


def log_weights(model: CategoricalVAE, x: Tensor, logits: Tensor, uniform: Tensor) -> Tensor:
    """log p(x, y) - log q(y|x) [S, B] at draws of all layers by uniform numbers [S, B, N + ..]."""
    samples, batch = uniform.shape[:2]
    below = x
    weights = torch.zeros(samples, batch, device=x.device)
    for layer, (variables, _) in enumerate(model.latents):
        own, uniform = uniform[..., :variables], uniform[..., variables:]
        log_q = log_probabilities(logits)  # of the lowest layer [B, N, K], the same for all draws
        y = classes_at(log_q.exp(), own)
        if layer == 0:
            weights = weights + model.log_prob(0, below, y)
        else:  # a row for each draw of the layer below
            weights = weights + model.log_prob(layer, below, y.flatten(0, 1).unsqueeze(0)).view(samples, batch)
        weights = weights - (y * log_q).sum(dim=(-2, -1))
        below = y.flatten(0, 1)
        if layer < len(model.latents) - 1:
            logits = model.logits(layer + 1, below).unflatten(0, (samples, batch))
    log_prior = model.log_prior
    if log_prior is None:
        variables, classes = model.latents[-1]
        return weights - variables * math.log(classes)
    return weights + (y * log_prior).sum(dim=(-2, -1))
