"""How far an estimator's gradient is from the exact one, in bias and in variance, on one minibatch of a model.

The gradient is that of mean_b E_q(y|x_b)[b(x_b, y)] alone, the term that an estimator estimates: no KL of y, no
auxiliary loss. The minibatch and the noise of z are the same for every draw and every estimator, so only y varies, and
the exact gradient, by enumerating y, is the same for all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from data.randomness import keyed_generator
from estimators.contract import CostFunction, Estimator, check_estimate
from estimators.joint import all_classes, outer
from models.vae import SemiSupervisedVAE

NETWORKS = ("classifier", "inference", "generator")
PARTS = ("logits", *NETWORKS)  # of the gradient: at the classifier's logits [B, N, K], and at each network's parameters
GROUPS = 10  # of draws, whose means are stored; the draws themselves are not
MINIMUM_DRAWS = 3  # a group each, which the jackknife needs
WARM_UP_RATE = 1e-2


@dataclass(frozen=True)
class Quality:
    """A part of the gradient over draws g_1 .. g_M, next to that part's exact gradient g.

    bias_squared        ||E g_m - g||^2 / ||g||^2, estimated without bias: as often below 0 as above where there is none
    bias_squared_error  its standard error, by the jackknife over groups of draws
    variance            tr Cov(g_m) / ||g||^2, of one draw
    cosine              the mean over draws of cos(g_m, g); 0 for a draw of zeros
    signal_to_noise     ||E g_m|| / sqrt(tr Cov(g_m)), ||E g_m||^2 estimated without bias; infinite where nothing varies
    """

    bias_squared: float
    bias_squared_error: float
    variance: float
    cosine: float
    signal_to_noise: float


@dataclass(frozen=True)
class Measurement:
    """Quality by part, calls of f per image, and seconds per gradient of all parts (the median over draws)."""

    parts: dict[str, Quality]
    evaluations: float
    seconds: float


def gradient_quality(
    model: SemiSupervisedVAE,
    estimator: Estimator,
    x: Tensor,
    *,
    step: int,
    draws: int,
    seed: int,
    after_draw: Callable[[], object] = lambda: None,
) -> Measurement:
    """Measures the estimator at `step` on images x [B, C, H, W], by `draws` >= 3 gradients of its own.

    In evaluation mode and float32, so that neither dropout nor rounding is taken for variance or bias. The classifier
    and whatever else depends on x alone are evaluated once, which `seconds` leaves out. The model, the estimator and
    the global random state are left as they were.
    """
    if draws < MINIMUM_DRAWS:
        raise ValueError(f"draws must be >= {MINIMUM_DRAWS}, got {draws}")
    with _evaluating(model, estimator, x.device):
        logits, cost = _categorical_term(model, x, keyed_generator(x.device, seed, "gradient quality"))
        networks = [list(getattr(model, name).parameters()) for name in NETWORKS]
        networks[-1] += model.likelihood.parameters()  # the generator's, as both are p(x|y,z)
        parts = [[logits], *([p for p in network if p.requires_grad] for network in networks)]
        sizes = [sum(tensor.numel() for tensor in part) for part in parts]
        inputs = [tensor for part in parts for tensor in part]

        def gradients(value: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(value.mean(), inputs, retain_graph=True, materialize_grads=True)

        q = outer(logits.softmax(dim=-1), torch.mul)
        exact = _joined(gradients((q.T * cost(all_classes(logits))).sum(dim=0)))
        groups = min(GROUPS, draws)
        sums = exact.new_zeros(groups, len(exact))
        squares, cosines = exact.new_zeros(draws, len(PARTS)), exact.new_zeros(draws, len(PARTS))
        seconds, evaluations = [], []
        for draw in range(draws):
            # other draws at each step, so that a curve over steps does not keep the same luck
            generator = keyed_generator(x.device, seed, f"gradient quality at step {step}", draw)
            started = _clock(x.device)
            estimate = estimator(cost, logits, step=step, context=x, generator=generator)
            check_estimate(estimate, len(x))
            drawn = gradients(estimate.value)
            seconds.append(_clock(x.device) - started)
            evaluations.append(float(estimate.metrics["evaluations"]))
            gradient = _joined(drawn)
            if draw == 0:
                first = gradient
            # from the first draw, not from zero: a variance far below the gradient's square is not rounded away
            deviation = gradient - first
            sums[draw % groups] += deviation
            squares[draw] = torch.stack([part.square().sum() for part in deviation.split(sizes)])
            cosines[draw] = torch.stack(list(map(_cosine, gradient.split(sizes), exact.split(sizes))))
            after_draw()

    counts = exact.new_tensor([len(range(group, draws, groups)) for group in range(groups)])
    means = sums / counts.unsqueeze(1) + first
    mean_squares = torch.stack([part.square().sum() for part in sums.sum(dim=0).split(sizes)]) / draws
    variances = ((squares.sum(dim=0) - mean_squares) / (draws - 1)).clamp(min=0)
    rows = zip(exact.split(sizes), means.split(sizes, dim=1), variances.tolist(), cosines.mean(dim=0), strict=True)
    qualities = [_quality(g, mean, variance, cosine.item()) for g, mean, variance, cosine in rows]
    return Measurement(dict(zip(PARTS, qualities, strict=True)), sum(evaluations) / draws, median(seconds))


def warm_up(
    model: SemiSupervisedVAE, estimator: Estimator, minibatches: Iterable[Tensor], *, step: int, seed: int
) -> None:
    """Fits an estimator's own parameters and running state to a model that stays as it is.

    One step a minibatch [B, C, H, W], each with its own noise of z: the estimator in training mode, its auxiliary loss
    minimised by Adam with a learning rate of 0.01.
    """
    parameters = list(estimator.parameters())
    optimizer = torch.optim.Adam(parameters, lr=WARM_UP_RATE) if parameters else None
    for index, x in enumerate(minibatches):
        generator = keyed_generator(x.device, seed, "warm-up", index)
        with _evaluating(model, estimator, x.device):
            estimator.train()
            logits, cost = _categorical_term(model, x, generator)
            estimate = estimator(cost, logits, step=step, context=x, generator=generator)
            if optimizer is not None:
                optimizer.zero_grad()
                estimate.auxiliary.backward(inputs=parameters)
                optimizer.step()


@contextmanager
def _evaluating(model: SemiSupervisedVAE, estimator: Estimator, device: torch.device) -> Iterator[None]:
    """Evaluation mode with gradients, in float32; leaves modes and the global random state as they were."""
    modes = [(module, module.training) for module in (*model.modules(), *estimator.modules())]
    model.eval()
    estimator.eval()
    try:
        # no estimator should draw from the global state, and yet looking at one that does must not change its run
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def _categorical_term(model: SemiSupervisedVAE, x: Tensor, generator: torch.Generator) -> tuple[Tensor, CostFunction]:
    """logits [B, 1, K] of q(y|x), and f = y [S, B, 1, K] -> b(x, y) [S, B] by one draw of z's noise."""
    features, noise = model.inference.features(x), model.draw_noise(x, generator)

    def cost(y: Tensor) -> Tensor:
        return model.bound(x, features, y.squeeze(-2), noise).value

    return model.classifier(x).unsqueeze(-2), cost


def _joined(gradients: Iterable[Tensor]) -> Tensor:
    """One vector [P] in float64."""
    return torch.cat([gradient.flatten() for gradient in gradients]).double()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a, b, dim=0, eps=torch.finfo(a.dtype).tiny)


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _quality(exact: Tensor, means: Tensor, variance: float, cosine: float) -> Quality:
    """From the exact gradient [P], the means [G, P] of groups of draws, and a draw's variance and mean cosine."""
    size = exact.square().sum().item()
    bias_squared, error = squared_mean(means - exact)
    signal_squared, _ = squared_mean(means)
    return Quality(
        bias_squared=_ratio(bias_squared, size),
        bias_squared_error=_ratio(error, size),
        variance=_ratio(variance, size),
        cosine=cosine,
        signal_to_noise=_ratio(math.sqrt(max(signal_squared, 0.0)), math.sqrt(variance)),
    )


def squared_mean(rows: Tensor) -> tuple[float, float]:
    """||E r||^2 from independent rows r [G, P], G >= 3, and its standard error by the jackknife.

    The U-statistic: the mean of r_i . r_j over pairs i != j. It is unbiased, which the square of the mean is not, by
    tr Cov(r) / G.
    """
    number = len(rows)
    products = (rows @ rows.T).fill_diagonal_(0)
    by_row, total = products.sum(dim=1), products.sum()
    without_one = (total - 2 * by_row) / ((number - 1) * (number - 2))
    error = ((number - 1) * without_one.var(correction=0)).sqrt()
    return (total / (number * (number - 1))).item(), error.item()


def _ratio(a: float, b: float) -> float:
    """a / b, with 0 / 0 = 0, so that a gradient that vanishes shows as 0 or inf and not as NaN."""
    return a / b if b else math.copysign(math.inf, a) if a else 0.0
