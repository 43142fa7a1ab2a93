"""The evidence of an auxiliary deep generative model: y is enumerated, a and z are weighed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.m2.evaluation import class_chunks, over_draws_and_classes

if TYPE_CHECKING:
    from models.auxiliary.model import AuxiliaryVAE


def importance_weighted(model: AuxiliaryVAE, x: Tensor, draws: Iterable[Tensor]) -> Tensor:
    """log p(x) ~ log sum_y p(y) (1/S) sum_s w_ys [B], nats, w = p(x|.) p(a|.) p(z) / (q(a|x) q(z|a,x,y)).

    By these S draws of the noise of a and z, each [B, A + Z], for images x [B, C, H, W]; classes share the draws of a.
    A lower bound in expectation that tightens with S (Burda et al. 2016, eq. 8).
    """
    log_weights = []
    for noise in draws:
        rows = model.infer(x, noise=noise)[1]()
        log_weights.append(torch.cat([model.log_weight_at(y, rows) for y in class_chunks(model.num_classes, x)]))
    return over_draws_and_classes(log_weights, model.log_prior)
