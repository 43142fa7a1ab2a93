"""Bounds of several samples: L_m by each estimator that has it, against enumeration of all (K^N)^m outcomes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import pytest
import torch
from scipy import integrate
from torch import Tensor

from estimators.contract import CostFunction, Estimate, Estimator, log_mean_exp
from estimators.gumbel_softmax import KL, GumbelSoftmax, StraightThroughGumbelSoftmax
from estimators.relaxations import binary_concrete_logit_log_density
from estimators.schedules import constant
from estimators.score_function import VIMCO, NoBaseline, ScoreFunction, bounds_of_the_others
from tests.test_estimators import CASES, CONTEXT_SIZE, Case, Spy, at_one, each, seeded, worst_z
from tests.test_variables import cost, problem

DRAWS = 2**17  # > 1e5
SIZES = [(1, 3, 2), (2, 2, 2), (1, 2, 4), (2, 3, 2), (1, 3, 1)]  # N, K, m
sizes = pytest.mark.parametrize(("num_variables", "num_classes", "m"), SIZES, ids=lambda size: str(size))
weighted = pytest.mark.parametrize("ratio_weight", [1.0, 0.4, 0.0], ids=["weighted", "warmed_up", "of_the_prior"])
KLS: list[KL] = ["sampled", "relaxed"]
RELAXED: list[Callable[[], Estimator]] = [
    *(partial(make, at_one, kl=kl) for make in (GumbelSoftmax, StraightThroughGumbelSoftmax) for kl in KLS)
]


def bound(
    estimator: Estimator, f: CostFunction, logits: Tensor, m: int, *, ratio_weight: float = 1.0, seed: int = 4
) -> Estimate:
    context = torch.zeros(len(logits), CONTEXT_SIZE)
    return estimator.multi_sample(
        f, logits, m, ratio_weight=ratio_weight, step=0, context=context, generator=seeded(seed)
    )


@dataclass
class Bounds:
    """L_m and its gradients; from an estimator each has a leading axis of independent draws."""

    value: Tensor
    logits: Tensor
    weight: Tensor  # of W, inside f
    prior: Tensor  # of log p(y) as numbers, not normalised


def unequal_prior(num_variables: int, num_classes: int) -> Tensor:
    """log p(y) [N, K]."""
    return torch.randn(num_variables, num_classes, generator=seeded(5)).log_softmax(dim=-1)


def enumerated(logits: Tensor, weight: Tensor, log_prior: Tensor, m: int, *, ratio_weight: float) -> Bounds:
    """In float64, by a loop over the outcomes of m draws of N variables."""
    leaves = [tensor.double().requires_grad_() for tensor in (logits, weight, log_prior)]
    logits, weight, log_prior = leaves
    log_q, (num_variables, num_classes) = logits.log_softmax(dim=-1), logits.shape
    classes = list(product(range(num_classes), repeat=num_variables))
    y = torch.nn.functional.one_hot(torch.tensor(classes), num_classes).double()
    f = cost(weight.unsqueeze(0))(y.unsqueeze(1)).squeeze(1)
    chance, ratio = ((y * rows).sum(dim=(-2, -1)) for rows in (log_q, log_prior - log_q))
    log_w = f + ratio_weight * ratio
    value = torch.zeros((), dtype=torch.float64)
    for outcome in map(list, product(range(len(classes)), repeat=m)):
        value = value + chance[outcome].sum().exp() * (log_w[outcome].logsumexp(dim=0) - math.log(m))
    return Bounds(value.detach(), *torch.autograd.grad(value, leaves, materialize_grads=True))


def drawn(
    estimator: Estimator,
    logits: Tensor,
    weight: Tensor,
    log_prior: Tensor,
    m: int,
    *,
    ratio_weight: float,
    draws: int = DRAWS,
) -> Bounds:
    """A batch of equal images, each with its own copy of all that has a gradient: an image's gradient is one draw."""
    leaves = [tensor.expand(draws, *tensor.shape).clone().requires_grad_() for tensor in (logits, weight, log_prior)]
    logits, weight, estimator.log_prior = leaves
    value = bound(estimator, cost(weight), logits, m, ratio_weight=ratio_weight).value
    return Bounds(value.detach(), *torch.autograd.grad(value.sum(), leaves, materialize_grads=True))


def z_scores(
    estimator: Estimator, num_variables: int, num_classes: int, m: int, *, ratio_weight: float
) -> dict[str, float]:
    logits, weight = problem(num_variables, num_classes)
    leaves = logits, weight, unequal_prior(num_variables, num_classes)
    found = drawn(estimator, *leaves, m, ratio_weight=ratio_weight)
    truth = enumerated(*leaves, m, ratio_weight=ratio_weight)
    names = ("value", "logits", "weight", "prior")
    return {name: worst_z(getattr(found, name), getattr(truth, name)) for name in names}


# VIMCO is unbiased, and what is not fails


@weighted
@sizes
def test_vimco_is_unbiased(num_variables: int, num_classes: int, m: int, ratio_weight: float) -> None:
    z = z_scores(VIMCO(), num_variables, num_classes, m, ratio_weight=ratio_weight)
    assert max(z.values()) < 4, z


@weighted
@pytest.mark.parametrize(
    "make", RELAXED, ids=["gumbel-sampled", "gumbel-relaxed", "through-sampled", "through-relaxed"]
)
@pytest.mark.parametrize(("num_variables", "num_classes"), [(1, 3), (2, 2)])
def test_relaxed_bounds_fail_the_test_of_unbiasedness(
    make: Callable[[], Estimator], num_variables: int, num_classes: int, ratio_weight: float
) -> None:
    assert z_scores(make(), num_variables, num_classes, 2, ratio_weight=ratio_weight)["logits"] > 4


def test_a_baseline_with_the_draws_own_weight_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "estimators.score_function.bounds_of_the_others", lambda log_w: log_mean_exp(log_w).expand_as(log_w) / 2
    )
    z = z_scores(VIMCO(), 1, 3, 2, ratio_weight=1.0)
    assert z.pop("logits") > 4
    assert max(z.values()) < 4


def test_baselines_are_the_bounds_with_the_geometric_mean_of_the_others() -> None:
    """By a loop, in float64."""
    log_w = 5 * torch.randn(4, 3, generator=seeded(0)) - 100
    found = bounds_of_the_others(log_w)
    for j in range(4):
        others = [log_w[i].double() for i in range(4) if i != j]
        geometric = torch.stack([w.exp() for w in others]).prod(dim=0) ** (1 / 3)
        expected = ((sum(w.exp() for w in others) + geometric) / 4).log()
        torch.testing.assert_close(found[j], expected.float())
    changed = log_w.clone()
    changed[2] += 7
    torch.testing.assert_close(bounds_of_the_others(changed)[2], found[2])
    assert torch.equal(bounds_of_the_others(log_w[:1]), torch.zeros(1, 3))


def test_the_baselines_lower_the_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = *problem(2, 3), unequal_prior(2, 3)

    def variance() -> float:
        return float(drawn(VIMCO(), *leaves, 5, ratio_weight=1.0, draws=2**14).logits.var(dim=0).sum())

    with_them = variance()
    monkeypatch.setattr("estimators.score_function.bounds_of_the_others", torch.zeros_like)
    assert with_them < 0.7 * variance()


# One sample


def test_vimco_of_one_sample_is_the_score_function_without_baseline() -> None:
    """Draw by draw; where importance-weighted too in mean, as held above: log q in the cost has mean zero."""
    logits, weight = (tensor.repeat(5, *[1] * tensor.dim()).requires_grad_() for tensor in problem(2, 3))
    context = torch.zeros(5, CONTEXT_SIZE)
    plain = ScoreFunction(NoBaseline())(cost(weight), logits, step=0, context=context, generator=seeded(4)).value
    found = bound(VIMCO(), cost(weight), logits, 1, ratio_weight=0.0).value
    torch.testing.assert_close(found, plain)
    for a, b in zip(*(torch.autograd.grad(value.sum(), (logits, weight)) for value in (found, plain)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("make", [GumbelSoftmax, StraightThroughGumbelSoftmax])
@pytest.mark.parametrize("prior", [None, unequal_prior(2, 3)], ids=["uniform", "unequal"])
def test_a_relaxed_bound_of_one_sample_is_that_of_forward(
    make: type[GumbelSoftmax], kl: KL, prior: Tensor | None
) -> None:
    logits, weight = (tensor.repeat(5, *[1] * tensor.dim()).requires_grad_() for tensor in problem(2, 3))
    estimator = make(partial(constant, value=0.6), kl=kl, prior_temperature=0.4)
    estimator.log_prior = prior
    context = torch.zeros(5, CONTEXT_SIZE)
    single = estimator(cost(weight), logits, step=0, context=context, generator=seeded(4))
    found, expected = bound(estimator, cost(weight), logits, 1).value, single.value - single.kl
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(value.sum(), (logits, weight)) for value in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


# Many samples


def test_the_bound_grows_to_the_evidence() -> None:
    """log p(x) = log sum_y p(y) p(x|y), by enumeration; q is not the posterior."""
    logits, weight = problem(2, 3)
    prior = unequal_prior(2, 3)
    classes = torch.tensor(list(product(range(3), repeat=2)))
    y = torch.nn.functional.one_hot(classes, 3).float()
    evidence = (cost(weight.unsqueeze(0))(y.unsqueeze(1)).squeeze(1) + (y * prior).sum(dim=(-2, -1))).logsumexp(dim=0)
    estimator = VIMCO()
    estimator.log_prior = prior
    means = []
    for m, images in ((1, 2**15), (3, 2**15), (10, 2**13), (1000, 64)):
        f = cost(weight.expand(images, -1, -1, -1))
        means.append(float(bound(estimator, f, logits.expand(images, -1, -1), m).value.mean()))
    assert means == sorted(means)
    assert means[0] < float(evidence) - 0.1
    assert means[-1] == pytest.approx(float(evidence), abs=0.02)


def test_the_relaxed_bound_grows_to_the_evidence_of_the_relaxed_model() -> None:
    """Of two classes, by an integral over BinConcrete; whatever q and its temperature are."""
    weight, prior, prior_temperature = problem(1, 2)[1], torch.tensor([0.3, 0.7]).log(), 0.5

    def density(y_logit: float) -> float:
        at = torch.tensor(y_logit, dtype=torch.float64)
        y = torch.stack([at.sigmoid(), (-at).sigmoid()]).view(1, 1, 1, 2)
        log_p = binary_concrete_logit_log_density(at, (prior[0] - prior[1]).double(), prior_temperature)
        return float((cost(weight.double().unsqueeze(0))(y).squeeze() + log_p).exp())

    evidence = math.log(integrate.quad(density, -60, 60, limit=500)[0])
    for logit, temperature in ((0.5, 0.7), (-0.4, 1.0)):
        estimator = GumbelSoftmax(
            partial(constant, value=temperature), kl="relaxed", prior_temperature=prior_temperature
        )
        estimator.log_prior = prior
        logits = torch.tensor([logit, 0.0]).expand(64, 1, 2)
        one, many = (bound(estimator, cost(weight.expand(64, -1, -1, -1)), logits, m).value.mean() for m in (1, 4000))
        assert float(one) < evidence - 0.05
        assert float(many) == pytest.approx(evidence, abs=0.02)


# The contract


@each([case for case in CASES if case.build(3).takes_several_samples])
@weighted
def test_shapes_isolation_and_calls(case: Case, ratio_weight: float) -> None:
    logits = torch.randn(5, 2, 3, generator=seeded(2)).requires_grad_()
    weight = torch.randn(5, 2, 3, 2, generator=seeded(3)).requires_grad_()
    estimator = case.build(3, num_variables=2)
    if isinstance(estimator, GumbelSoftmax) and estimator.kl == "analytic":
        estimator.kl = "sampled"
    spy = Spy(cost(weight))
    result = bound(estimator, spy, logits, 4, ratio_weight=ratio_weight)
    assert result.value.shape == (5,)
    assert torch.equal(result.kl, torch.zeros(5))
    assert result.auxiliary == 0
    assert [tuple(y.shape) for y in spy.seen] == [(4, 5, 2, 3)]
    assert result.metrics["evaluations"] == 4
    assert all(gradient.any() for gradient in torch.autograd.grad(result.value.sum(), (logits, weight)))
    again, other = (
        bound(estimator, cost(weight), logits, 4, ratio_weight=ratio_weight, seed=seed).value for seed in (4, 5)
    )
    assert torch.equal(result.value, again)
    assert not torch.equal(result.value, other)


@pytest.mark.parametrize("make", [VIMCO, *RELAXED], ids=["vimco", *map(str, range(4))])
@weighted
def test_bounds_stay_finite(make: Callable[[], Estimator], ratio_weight: float) -> None:
    infinity = math.inf
    rows = [[1e4, -1e4, 0.0], [1e4, 1e4, 1e4], [0.0, 1.0, -infinity], [-infinity, -1e4, -infinity]]
    logits = torch.tensor(rows).unsqueeze(1).requires_grad_()
    weight = torch.randn(4, 1, 3, 2, generator=seeded(3)).requires_grad_()
    value = bound(make(), cost(weight), logits, 5, ratio_weight=ratio_weight).value
    assert value.isfinite().all()
    for gradient in torch.autograd.grad(value.sum(), (logits, weight)):
        assert gradient.isfinite().all()


@each([case for case in CASES if not case.build(3).takes_several_samples])
def test_all_others_refuse_before_any_work(case: Case) -> None:
    estimator = case.build(3)
    words = "estimator must be one that takes several samples in one bound: vimco, gumbel_softmax, "
    with pytest.raises(ValueError, match=words):
        estimator.check_several_samples(importance_weighted=True)
    spy = Spy(lambda y: y.sum(dim=(-2, -1)))
    with pytest.raises(ValueError, match=words):
        bound(estimator, spy, torch.zeros(2, 1, 3), 2)
    assert not spy.seen


def test_the_analytic_kl_is_refused_where_there_is_a_ratio() -> None:
    estimator = GumbelSoftmax(at_one)
    with pytest.raises(ValueError, match=r"^kl must be sampled or relaxed"):
        bound(estimator, lambda y: y.sum(dim=(-2, -1)), torch.zeros(2, 1, 3), 2)
    of_the_prior = bound(estimator, lambda y: 2 * y.sum(dim=(-2, -1)), torch.zeros(2, 1, 3), 2, ratio_weight=0.0)
    torch.testing.assert_close(of_the_prior.value, torch.full((2,), 2.0))


@pytest.mark.parametrize("make", [VIMCO, *RELAXED], ids=["vimco", *map(str, range(4))])
def test_no_samples_are_refused(make: Callable[[], Estimator]) -> None:
    with pytest.raises(ValueError, match=r"^num_samples must be >= 1, got 0$"):
        bound(make(), lambda y: y.sum(dim=(-2, -1)), torch.zeros(2, 1, 3), 0)
