"""Exact evaluation of M2: classes are enumerated as one-hot vectors."""

from __future__ import annotations

import math
from collections.abc import Iterable
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
    logits = model.classifier(x)
    q = logits.softmax(dim=-1)
    features = model.inference.features(x)
    bounds = [model.bound(x, features, classes, noise) for classes in class_chunks(model.num_classes, x)]
    reconstructions, kls = (
        torch.cat(parts) for parts in zip(*((b.reconstruction, b.kl_z) for b in bounds), strict=True)
    )
    reconstruction, kl_z = (q.T * reconstructions).sum(dim=0), (q.T * kls).sum(dim=0)
    kl_y = categorical_kl(logits.unsqueeze(-2), model.log_prior)
    bound = reconstruction - kl_z - kl_y
    terms = {"bound": bound, "reconstruction": reconstruction, "kl_z": kl_z, "kl_y": kl_y}
    return terms, PerImage(q, bound, (reconstructions - kls).std(dim=0, correction=0))


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
    per_class = torch.stack(log_weights).logsumexp(dim=0) - math.log(len(log_weights))
    if model.log_prior is not None:
        return (per_class + model.log_prior.unsqueeze(-1)).logsumexp(dim=0)
    return per_class.logsumexp(dim=0) - math.log(model.num_classes)
