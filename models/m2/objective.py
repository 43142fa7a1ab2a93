"""The objective J of semi-supervised learning."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from estimators.contract import Estimator, entropy
from models.contract import Objective, Weights, maximised
from models.parts import RandomMotion

if TYPE_CHECKING:
    from models.m2.model import Bound, SemiSupervisedVAE


def objective(
    model: SemiSupervisedVAE,
    estimator: Estimator,
    weights: Weights,
    x: Tensor,
    y_labelled: Tensor,
    *,
    step: int,
    generator: torch.Generator,
) -> Objective:
    """J = E_labelled[L] + E_unlabelled[U] + alpha E_labelled[log q(y|x)] (Jang et al. 2017, eq. 11), by minibatch.

    x [B + B', C, H, W] is the labelled images, whose one-hot classes are y_labelled [B, K], and then the unlabelled.
    L(x, y) = b(x, y) + log p(y) for the labelled; U(x) = E_q(y|x)[b(x, y)] - KL(q(y|x) || p(y)) for the unlabelled,
    its first term by the estimator. Where both bounds have no weight, the control of the classifier alone, they are not
    computed, and unlabelled images are not looked at, by which batch normalisation would go. The model and the
    estimator have the same p(y). For the first `labels_first` steps U's gradient leaves out the logits, which labels
    alone then teach, and it grows to what it is in as many more; J has the same value. What else is drawn given x, as
    an auxiliary a, has U's gradient all along.
    Raises ContractError for an estimate of other shapes.
    """
    assert estimator.log_prior is model.log_prior
    labelled, num_classes = y_labelled.shape
    labels = y_labelled.argmax(dim=-1)  # as log q(y|x) of others may be -inf, which times 0 is NaN
    fading = distortions(model) if weights.fading else []
    for motion in fading:  # labels alone gain by distorted images, and U loses by them in the end (docs/race.md)
        motion.share = weights.distortion_share
    at_this_step: dict[str, Tensor | float] = {"distortion_share": weights.distortion_share} if fading else {}
    if weights.labelled == weights.unlabelled == 0:
        logits, _ = model.infer(x[:labelled], generator)
        cross_entropy = F.cross_entropy(logits, labels)
        terms = {"J": -weights.alpha * cross_entropy, "classification": -cross_entropy.detach()}
        return maximised(terms | {"entropy_y": entropy(logits).mean()}, {"evaluations": 0.0, **at_this_step})
    logits, rest = model.infer(x, generator)
    parts = labelled, len(x) - labelled
    logits_labelled, logits_unlabelled = logits.split(parts)
    if weights.labels_first:  # the same numbers, and a part of the gradient
        logits_unlabelled = torch.as_tensor(Weighed.apply(logits_unlabelled, weights.teaching_weight))
        at_this_step["teaching_weight"] = weights.teaching_weight
    cross_entropy = F.cross_entropy(logits_labelled, labels)
    rows = rest()
    rows_labelled, rows_unlabelled = zip(*(row.split(parts) for row in rows), strict=True)
    bound: Bound | None = None  # of the labelled images

    def cost(y: Tensor) -> Tensor:
        nonlocal bound
        y = y.squeeze(-2)  # of one variable
        if estimator.calls_once:  # the labelled images share the pass, which saves one (docs/performance.md)
            samples, batch, _ = y.shape
            classes = torch.cat([y_labelled, y.flatten(0, 1)]).unsqueeze(0)
            both = model.bound_at(classes, tuple(in_pairs(row, parts, samples) for row in rows))
            bound, drawn = both.split(labelled, samples * batch)
            return drawn.value.view(samples, batch)
        return model.bound_at(y, rows_unlabelled).value

    estimate = estimator(cost, logits_unlabelled.unsqueeze(-2), step=step, context=x[labelled:], generator=generator)
    if bound is None:
        bound = model.bound_at(y_labelled.unsqueeze(0), rows_labelled)
    log_prior = -math.log(num_classes) if model.log_prior is None else (y_labelled * model.log_prior).sum(dim=-1).mean()
    reconstruction, kls = bound.reconstruction.mean(), {name: kl.mean() for name, kl in bound.kls.items()}
    # the mean of bound.value, by means that are terms anyway
    labelled_bound = functools.reduce(torch.sub, kls.values(), reconstruction) + log_prior
    unlabelled_bound = (estimate.value - estimate.kl).mean()

    j = torch.add(weights.labelled * labelled_bound, unlabelled_bound, alpha=weights.unlabelled)
    j = torch.add(j, cross_entropy, alpha=-weights.alpha)
    terms = {
        "J": j,
        "labelled_bound": labelled_bound,
        "unlabelled_bound": unlabelled_bound,
        "classification": -cross_entropy.detach(),
        "kl_y": estimate.kl.mean(),
        **kls,
        "reconstruction": reconstruction,
        "entropy_y": entropy(logits_unlabelled).mean(),
    }
    return maximised(terms, estimate.metrics | at_this_step, estimate.auxiliary)


class Weighed(torch.autograd.Function):
    """The same numbers, -inf among them, whose gradient has a weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float | Tensor) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.weight, None


def in_pairs(of_images: Tensor, parts: tuple[int, int], samples: int) -> Tensor:
    """A row for each labelled image, and one for each sample of each unlabelled image."""
    if samples == 1:
        return of_images
    of_labelled, of_unlabelled = of_images.split(parts)
    return torch.cat([of_labelled, *[of_unlabelled] * samples])


def distortions(model: nn.Module) -> list[RandomMotion]:
    """What distorts the images that q(y|x) sees, wherever networks of somebody's own have it."""
    return [module for module in model.modules() if isinstance(module, RandomMotion) and module.distortion]


def describe(model: SemiSupervisedVAE, weights: Weights, labelled: int, unlabelled: int) -> str:
    """J with its weights, and what each of so many labelled and unlabelled images weighs in it."""
    w = weights
    first = f"; labels alone teach q(y|x) for {w.labels_first} steps, and U with all its weight after as many more"
    fades = f"; distortion fades from step {w.labels_first} to {w.labels_first + w.fading}"
    return (
        f"J = {w.labelled:g} E_labelled[L] + {w.unlabelled:g} E_unlabelled[U] + {w.alpha:g} E_labelled[log q(y|x)]"
        "; effective weight per image: "
        f"L {w.labelled / labelled:.3g}, U {w.unlabelled / unlabelled:.3g}, log q(y|x) {w.alpha / labelled:.3g}"
        + (first if w.labels_first else "")
        + (fades if w.fading and distortions(model) else "")
    )
