"""Exact evaluation of M2: classes are enumerated as one-hot vectors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from estimators.contract import categorical_kl
from models.contract import PerImage
from models.evaluation import rows_at_once

if TYPE_CHECKING:
    from models.m2.model import SemiSupervisedVAE


def one_hot_classes(num_classes: int, batch: int, device: torch.device) -> Tensor:
    """Every class for every image, [K, B, K]."""
    return torch.eye(num_classes, device=device).unsqueeze(1).expand(-1, batch, -1)


def class_chunks(num_classes: int, x: Tensor) -> tuple[Tensor, ...]:
    """Every class for every image of x [B, ...], in parts [S, B, K] of as many rows as go at once."""
    at_once = rows_at_once(math.prod(x.shape[1:]))
    return one_hot_classes(num_classes, len(x), x.device).split(max(1, at_once // len(x)))


def exact_terms(model: SemiSupervisedVAE, x: Tensor, noise: Tensor) -> tuple[dict[str, Tensor], PerImage]:
    """The exact bound and its parts, each [B], of images x [B, C, H, W] and z's noise [B, Z], and what is kept of each.

    The bound is U(x) = sum_y q(y|x) b(x, y) - KL(q(y|x) || p(y)), with one draw of z an image.
    """
    logits, rest = model.infer(x, noise=noise)
    q, rows = logits.softmax(dim=-1), rest()
    bounds = [model.bound_at(classes, rows) for classes in class_chunks(model.num_classes, x)]
    joined = type(bounds[0]).joined(bounds)
    reconstruction = (q.T * joined.reconstruction).sum(dim=0)
    kls = {name: (q.T * kl).sum(dim=0) for name, kl in joined.kls.items()}
    kls["kl_y"] = categorical_kl(logits.unsqueeze(-2), model.log_prior)
    bound = reconstruction - torch.stack(list(kls.values())).sum(dim=0)
    terms = {"bound": bound, "reconstruction": reconstruction, **kls}
    return terms, PerImage(q, bound, joined.value.std(dim=0, correction=0))


def importance_weighted(model: SemiSupervisedVAE, x: Tensor, draws: Iterable[Tensor]) -> Tensor:
    """log p(x) ~ log sum_y p(y) (1/S) sum_s p(x|y,z_ys) p(z_ys) / q(z_ys|x,y), [B], nats; y enumerated.

    By these S draws of z's noise, each [B, Z], for images x [B, C, H, W]. A lower bound in expectation that tightens
    with S (Burda et al. 2016, eq. 8).
    """
    features = model.inference.features(x)
    log_weights = []
    for noise in draws:
        parts = [model.log_weight(x, features, classes, noise) for classes in class_chunks(model.num_classes, x)]
        log_weights.append(torch.cat(parts))
    return over_draws_and_classes(log_weights, model.log_prior)


def over_draws_and_classes(log_weights: Sequence[Tensor], log_prior: Tensor | None) -> Tensor:
    """log sum_y p(y) (1/S) sum_s w_ys [B], of log w [K, B], one tensor a draw."""
    per_class = torch.stack(list(log_weights)).logsumexp(dim=0) - math.log(len(log_weights))
    if log_prior is not None:
        return (per_class + log_prior.unsqueeze(-1)).logsumexp(dim=0)
    return per_class.logsumexp(dim=0) - math.log(len(per_class))
