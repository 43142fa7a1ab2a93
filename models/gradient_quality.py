"""How far an estimator's gradient is from the exact one, in bias and in variance, on one minibatch of a model.

The gradient is that of the mean over images of the term alone that an estimator estimates, as E_q(y|x)[b(x, y)] of M2:
no auxiliary loss. The minibatch and all noise but y's are the same for every draw and every estimator, so only y
varies, and the exact gradient is the same for all: by enumerating y, or where that is too much by a long average.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from data.randomness import keyed_generator
from estimators.contract import Estimator, check_estimate
from estimators.joint import MOST
from models.contract import Model

LOGITS = "logits"  # the part of the gradient at the logits [B, N, K]; the others are at each network's parameters
GROUPS = 10  # of draws, whose means are stored; the draws themselves are not
MINIMUM_DRAWS = 3  # a group each, which the jackknife needs
WARM_UP_RATE = 1e-2
MOST_CALLS = 2**18  # of the generator at once by a reference through several layers, which one cannot take in parts


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
    """Quality by part, calls of f per image, and seconds per gradient of all parts (the median over draws).

    Where y has too many joint classes to enumerate, the exact gradient is the mean of so many `reference_draws` of an
    unbiased estimator of small variance, whose squared error next to the gradient is `reference_error`, by part.
    """

    parts: dict[str, Quality]
    evaluations: float
    seconds: float
    reference_draws: int = 0
    reference_error: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    """The gradient that estimators are held against: of one exact draw, or of several of an unbiased estimator."""

    found: Draws
    is_exact: bool


def check_images(model: Model, number: int, key: str) -> None:
    """Raises ValueError, naming the key, where the reference of a model in layers has no room for so many images."""
    if len(model.latents) == 1:
        return
    enumerates = all(classes**variables <= MOST for variables, classes in model.latents)
    calls = math.prod(classes**variables if enumerates else classes * variables for variables, classes in model.latents)
    most = max(1, MOST_CALLS // calls)
    if number > most:
        raise ValueError(
            f"{key} must be <= {most} with {len(model.latents)} layers of variables, where what gradients are held "
            f"against takes {calls:,} calls of the generator an image, got {number}"
        )


def reference_gradient(
    model: Model, x: Tensor, *, step: int, draws: int, seed: int, after_draw: Callable[[], object] = lambda: None
) -> Reference:
    """The exact gradient on images x [B, C, H, W], or where that is too much to enumerate the mean of `draws` >= 3.

    It depends on no estimator: several can share it.
    """
    _enough(reference_draws=draws)
    unbiased, is_exact = model.reference(math.prod(x.shape[1:]))
    with _evaluating(model, unbiased, x.device):
        term = _Term(model, x, step, seed)
        found = Draws(1 if is_exact else draws, term.sizes)
        for draw in range(found.number):
            found.add(term.gradient(unbiased, "reference", draw))
            after_draw()
    return Reference(found, is_exact)


def gradient_quality(
    model: Model,
    estimator: Estimator,
    x: Tensor,
    *,
    step: int,
    draws: int,
    seed: int,
    reference_draws: int | None = None,
    reference: Reference | None = None,
    after_draw: Callable[[], object] = lambda: None,
) -> Measurement:
    """Measures the estimator at `step` on images x [B, C, H, W], by `draws` >= 3 gradients of its own.

    In evaluation mode and float32, so that neither dropout nor rounding is taken for variance or bias. The logits and
    whatever else depends on x alone are evaluated once, which `seconds` leaves out. The model, the estimator and
    the global random state are left as they were. `reference` is that of the same model, images, step and seed; without
    it, it is made here, by `reference_draws`, which are as many as `draws` where they are not given.
    """
    _enough(draws=draws)
    if reference is None:
        many = draws if reference_draws is None else reference_draws
        reference = reference_gradient(model, x, step=step, draws=many, seed=seed, after_draw=after_draw)
    exact = reference.found
    with _evaluating(model, estimator, x.device):
        term = _Term(model, x, step, seed)
        drawn, direction = Draws(draws, term.sizes), exact.mean
        cosines = direction.new_zeros(draws, len(term.sizes))
        for draw in range(draws):
            one = term.gradient(estimator, "gradient quality", draw)
            drawn.add(one)
            cosines[draw] = torch.stack(list(map(_cosine, one.split(term.sizes), direction.split(term.sizes))))
            after_draw()

    groups = drawn.groups if reference.is_exact else min(drawn.groups, exact.groups)
    means, references = drawn.group_means(groups), exact.group_means(groups).expand(groups, -1)
    columns = zip(
        references.split(term.sizes, dim=1),
        means.split(term.sizes, dim=1),
        drawn.variances,
        cosines.mean(dim=0).tolist(),
        strict=True,
    )
    qualities = dict(zip(term.parts, (_quality(*column) for column in columns), strict=True))
    found = Measurement(qualities, sum(term.evaluations) / draws, median(term.seconds))
    if reference.is_exact:
        return found
    squares = [part.square().sum().item() for part in direction.split(term.sizes)]
    errors = [_ratio(v / exact.number, square) for v, square in zip(exact.variances, squares, strict=True)]
    return replace(found, reference_draws=exact.number, reference_error=dict(zip(term.parts, errors, strict=True)))


def _enough(**numbers: int) -> None:
    """Raises ValueError for too few draws, naming what they are."""
    for name, number in numbers.items():
        if number < MINIMUM_DRAWS:
            raise ValueError(f"{name} must be >= {MINIMUM_DRAWS}, got {number}")


class _Term:
    """The term of J that needs an estimator, on some images, and its gradients by parts, which are timed."""

    def __init__(self, model: Model, x: Tensor, step: int, seed: int) -> None:
        self.x, self.step, self.seed = x, step, seed
        logits, self.estimated = model.categorical_term(x, keyed_generator(x.device, seed, "gradient quality"))
        self.parts: dict[str, list[Tensor]] = {LOGITS: [logits]}
        self.parts |= {name: [p for p in network if p.requires_grad] for name, network in model.networks().items()}
        self.sizes = [sum(tensor.numel() for tensor in part) for part in self.parts.values()]
        self.seconds: list[float] = []
        self.evaluations: list[float] = []

    def gradient(self, estimator: Estimator, purpose: str, draw: int) -> Tensor:
        """Of the mean over images by an estimator, [P] over all parts."""
        # other draws at each step, so that a curve over steps does not keep the same luck
        generator = keyed_generator(self.x.device, self.seed, f"{purpose} at step {self.step}", draw)
        inputs = [tensor for part in self.parts.values() for tensor in part]
        started = _clock(self.x.device)
        estimate = self.estimated(estimator, self.step, generator)
        check_estimate(estimate, len(self.x))
        mean = estimate.value.mean()
        gradients = torch.autograd.grad(mean, inputs, retain_graph=True, materialize_grads=True)
        self.seconds.append(_clock(self.x.device) - started)
        self.evaluations.append(float(estimate.metrics["evaluations"]))
        return _joined(gradients)


class Draws:
    """Sums over gradients [P] that are drawn one by one, for their means in groups and their variance by part."""

    def __init__(self, number: int, sizes: list[int]) -> None:
        self.number, self.sizes, self.groups = number, sizes, min(GROUPS, number)
        self.seen, self.squares = 0, torch.zeros(len(sizes), dtype=torch.float64)

    def add(self, gradient: Tensor) -> None:
        if self.seen == 0:
            self.first, self.sums = gradient, gradient.new_zeros(self.groups, len(gradient))
        # from the first draw, not from zero: a variance far below the gradient's square is not rounded away
        deviation = gradient - self.first
        self.sums[self.seen % self.groups] += deviation
        self.squares += torch.stack([part.square().sum() for part in deviation.split(self.sizes)]).cpu()
        self.seen += 1

    def group_means(self, groups: int) -> Tensor:
        """[G, P], of so many groups at most."""
        groups, counts = min(groups, self.groups), torch.arange(self.number, device=self.sums.device) % self.groups
        sums = self.sums.new_zeros(groups, self.sums.shape[1])
        sums.index_add_(0, torch.arange(self.groups, device=sums.device) % groups, self.sums)
        return sums / torch.bincount(counts % groups).unsqueeze(1) + self.first

    @property
    def mean(self) -> Tensor:
        return self.sums.sum(dim=0) / self.number + self.first

    @property
    def variances(self) -> list[float]:
        """tr Cov of one draw, by part; 0 of a single one."""
        squared_sums = torch.stack([part.square().sum() for part in self.sums.sum(dim=0).split(self.sizes)]).cpu()
        variances = (self.squares - squared_sums / self.number) / max(1, self.number - 1)
        return variances.clamp(min=0).tolist()


def warm_up(model: Model, estimator: Estimator, minibatches: Iterable[Tensor], *, step: int, seed: int) -> None:
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
            estimate = model.categorical_term(x, generator)[1](estimator, step, generator)
            if optimizer is not None:
                optimizer.zero_grad()
                estimate.auxiliary.backward(inputs=parameters)
                optimizer.step()


@contextmanager
def _evaluating(model: Model, estimator: Estimator, device: torch.device) -> Iterator[None]:
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
    """From means [G, P] of groups of draws, of the exact gradient too, and a draw's variance and mean cosine."""
    size = exact.mean(dim=0).square().sum().item()
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
