"""The objective J of semi-supervised learning. This is the one place that knows its sign."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from estimators.contract import Estimator, entropy
from models.vae import SemiSupervisedVAE


@dataclass(frozen=True)
class Weights:
    """Weights of J's three terms; Jang et al. 2017 have labelled = unlabelled = 1 and alpha free."""

    labelled: float
    unlabelled: float
    alpha: float


@dataclass
class Objective:
    """The loss to minimise, J's terms (scalars, nats per image) and what the estimator reports."""

    loss: Tensor
    terms: dict[str, Tensor]
    metrics: dict[str, Tensor | float]


def objective(
    model: SemiSupervisedVAE,
    estimator: Estimator,
    weights: Weights,
    x_labelled: Tensor,
    y_labelled: Tensor,
    x_unlabelled: Tensor,
    *,
    step: int,
    generator: torch.Generator,
) -> Objective:
    """J = E_labelled[L] + E_unlabelled[U] + alpha E_labelled[log q(y|x)] (Jang et al. 2017, eq. 12), by minibatch.

    L(x, y) = b(x, y) + log p(y) for images x_labelled [B, C, H, W] with one-hot classes y_labelled [B, K];
    U(x) = E_q(y|x)[b(x, y)] - KL(q(y|x) || p(y)) for images x_unlabelled, its first term by the estimator.
    The loss is -J plus the estimator's auxiliary loss.
    """
    x = torch.cat([x_labelled, x_unlabelled])
    labelled = x_labelled.shape[0]
    logits = model.classifier(x, generator)
    logits_labelled, logits_unlabelled = logits[:labelled], logits[labelled:]
    classification = (y_labelled * torch.log_softmax(logits_labelled, dim=-1)).sum(dim=-1).mean()
    features = model.inference.features(x)
    noise = model.draw_noise(x, generator)

    bound = model.bound(x_labelled, features[:labelled], y_labelled.unsqueeze(0), noise[:labelled])
    log_prior = -math.log(y_labelled.shape[-1])
    labelled_bound = (bound.value + log_prior).mean()

    def cost(y: Tensor) -> Tensor:
        return model.bound(x_unlabelled, features[labelled:], y, noise[labelled:]).value

    estimate = estimator(cost, logits_unlabelled, step=step, context=x_unlabelled, generator=generator)
    unlabelled_bound = (estimate.value - estimate.kl).mean()

    j = weights.labelled * labelled_bound + weights.unlabelled * unlabelled_bound + weights.alpha * classification
    terms = {
        "J": j,
        "labelled_bound": labelled_bound,
        "unlabelled_bound": unlabelled_bound,
        "classification": classification,
        "kl_y": estimate.kl.mean(),
        "kl_z": bound.kl_z.mean(),
        "reconstruction": bound.reconstruction.mean(),
        "entropy_y": entropy(logits_unlabelled).mean(),
    }
    return Objective(estimate.auxiliary - j, terms, estimate.metrics)
