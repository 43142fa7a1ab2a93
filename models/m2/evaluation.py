"""Exact evaluation of M2: classes are enumerated as one-hot vectors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from estimators.contract import categorical_kl
from models.contract import PerImage
from models.evaluation import rows_at_once

if TYPE_CHECKING:
    from models.m2.model import Rows, SemiSupervisedVAE

FIRST = 10  # draws that every class has a part in
NEGLIGIBLE = 15.0  # nats: by the first draws nine such classes have 3e-6 of an image's probability


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
    values = joined.value.T
    joint = values if model.log_prior is None else values + model.log_prior
    return terms, PerImage(q, bound, values.std(dim=-1, correction=0), joint.softmax(dim=-1))


def importance_weighted(model: SemiSupervisedVAE, x: Tensor, draws: Iterable[Tensor]) -> Tensor:
    """log p(x) ~ log sum_y p(y) (1/S) sum_s p(x|y,z_ys) p(z_ys) / q(z_ys|x,y), [B], nats; y enumerated.

    By these S draws of z's noise, each [B, Z], for images x [B, C, H, W]; with an auxiliary a of that of a and z, and
    p(a|.) / q(a|x) in the weights. A lower bound in expectation that tightens with S (Burda et al. 2016, eq. 8).

    After FIRST draws the classes that then have less than e^-NEGLIGIBLE of the most probable one's weight are left
    off: of ten classes of MNIST one or two go on. They count by what they have so far, over all S, so that this is
    never above what all classes give at the same draws.
    """
    draws, rows_of = iter(draws), model.rows_by_noise(x)
    weights = []
    for noise in itertools.islice(draws, FIRST):
        rows = rows_of(noise)
        weights.append(torch.cat([model.log_weight_at(y, rows) for y in class_chunks(model.num_classes, x)]))
    number = len(weights)
    total = torch.stack(weights).logsumexp(dim=0).double()  # [K, B]; thousands of small terms are added to it
    if model.log_prior is not None:
        total = total + model.log_prior.unsqueeze(-1)
    classes, images = (total >= total.max(dim=0).values - NEGLIGIBLE).nonzero(as_tuple=True)
    log_prior = 0.0 if model.log_prior is None else model.log_prior[classes]
    at_once = rows_at_once(math.prod(x.shape[1:]))
    parts = list(zip(classes.split(at_once), images.split(at_once), strict=True))
    for noise in draws:
        rows = rows_of(noise)
        more = [log_weights_of_pairs(model, rows, *part) for part in parts]
        total[classes, images] = total[classes, images].logaddexp(torch.cat(more) + log_prior)
        number += 1
    evidence = total.logsumexp(dim=0) - math.log(number)
    return (evidence - math.log(model.num_classes) if model.log_prior is None else evidence).float()


def log_weights_of_pairs(model: SemiSupervisedVAE, rows: Rows, classes: Tensor, images: Tensor) -> Tensor:
    """Log weights [P] of pairs of a class [P] and an image [P], which the rows [B, ...] have at the latter's number."""
    y = F.one_hot(classes, model.num_classes).float()
    return model.log_weight_at(y.unsqueeze(0), tuple(row[images] for row in rows))[0]
