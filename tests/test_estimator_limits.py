"""Each estimator at its own limit: where it is exact, or without variance, or another estimator, draw by draw.

A wrong term cannot hide there. tests/test_estimators.py holds all of them to what they have in common.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from itertools import combinations, pairwise, permutations
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from scipy import integrate, special, stats
from torch import Tensor
from torch.distributions import Distribution, RelaxedBernoulli
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli

from estimators import relaxations as R
from estimators.contract import CostFunction, Estimator
from estimators.gumbel_softmax import GumbelSoftmax, StraightThroughGumbelSoftmax
from estimators.partial_enumeration import SumAndSample, UnorderedSet, ratios
from estimators.relaxed_control import REBAR, RELAX
from estimators.schedules import constant
from estimators.score_function import LearnedBaseline, LeaveOneOut, MovingAverage, MuProp, NoBaseline, ScoreFunction
from estimators.straight_through import (
    GappedStraightThrough,
    GumbelRao,
    ReinMax,
    ReinMaxCV,
    ReinMaxRao,
    StraightThrough,
    conditional_softmax,
    heun,
    heun_middle,
)
from tests.test_estimators import (
    CASES,
    CONTEXT_SIZE,
    THROUGH,
    Case,
    CostFamily,
    Moments,
    Spy,
    at_one,
    cost,
    draws_of,
    each,
    estimate,
    exact,
    make_logits,
    make_weight,
    seeded,
    small_batch,
    worst_z,
)

MANY = 2**16

# f of the first, second and third degree, from W [B, K, K + 1]


def linear(weight: Tensor) -> CostFunction:
    """f(y) = b y."""
    return lambda y: torch.einsum("sbk,bk->sb", y, weight[..., 0])


def quadratic(weight: Tensor) -> CostFunction:
    """f(y) = y A y + b y, A with no symmetry."""

    def f(y: Tensor) -> Tensor:
        return torch.einsum("sbk,bkj,sbj->sb", y, weight[..., 1:], y) + linear(weight)(y)

    return f


def cubic(weight: Tensor) -> CostFunction:
    """f(y) = (y A y + b y) b y."""

    def f(y: Tensor) -> Tensor:
        return quadratic(weight)(y) * linear(weight)(y)

    return f


def coefficients(num_classes: int) -> Tensor:
    return torch.randn(num_classes, num_classes + 1, generator=seeded(8))


def uneven_logits(num_classes: int) -> Tensor:
    return torch.randn(num_classes, generator=seeded(9))


def spread(draws: Tensor) -> float:
    """The variance of draws [N, ...], summed over coordinates."""
    return draws.double().var(dim=0).sum().item()


def error(found: Moments, truth: Moments) -> dict[str, float]:
    """The largest |found - truth| of each moment."""
    return {
        name: (getattr(found, name).double() - getattr(truth, name)).abs().max().item()
        for name in ("value", "logits", "weight")
    }


def prepared(estimator: Estimator, num_classes: int = 6) -> Estimator:
    """With networks of its own as they start."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        estimator.prepare(CONTEXT_SIZE, 1, num_classes)
    return estimator


# The exact mean over all outcomes, for those estimators whose only noise is the classes that they draw

Probability = Callable[[Tensor, frozenset[int]], float]  # of the classes that f was given, from q [K]


def mean_over_outcomes(
    estimator: Estimator, logits: Tensor, weight: Tensor, *, of: CostFamily, probability: Probability
) -> Moments:
    """Each outcome's own value and gradients, weighted by its probability: the estimator's mean without noise."""
    spies: list[Spy] = []

    def watched(weight: Tensor) -> CostFunction:
        spies.append(Spy(of(weight)))
        return spies[-1]

    draws = draws_of(estimator, logits, weight, of=watched, draws=8192)
    q = logits.double().softmax(dim=0)
    outcomes, which = spies[0].seen[0].sum(dim=0).unique(dim=0, return_inverse=True)
    chances, mean = [], [torch.zeros(()).double() for _ in range(3)]
    for number, outcome in enumerate(outcomes):
        chances.append(probability(q, frozenset(outcome.nonzero().flatten().tolist())))
        for place, tensor in enumerate((draws.value, draws.logits, draws.weight)):
            same = tensor[which == number].double()
            torch.testing.assert_close(same, same[:1].expand_as(same), rtol=1e-5, atol=1e-6)
            mean[place] = mean[place] + chances[-1] * same.mean(dim=0)
    assert sum(chances) == pytest.approx(1)  # every outcome was seen, as often as it should be
    assert stats.chisquare(which.bincount().numpy(), [chance * len(which) for chance in chances]).pvalue > 1e-3
    return Moments(*mean)


def of_one_draw(q: Tensor, chosen: frozenset[int]) -> float:
    (drawn,) = chosen
    return q[drawn].item()


def of_the_rest(q: Tensor, chosen: frozenset[int], *, num_exact: int) -> float:
    """v ~ q(. | not C), C the `num_exact` most probable classes."""
    summed = q.topk(num_exact).indices
    (drawn,) = chosen - set(summed.tolist())
    return (q[drawn] / (1 - q[summed].sum())).item()


def in_order(q: Tensor, order: tuple[int, ...]) -> float:
    """The probability of these classes in this order, drawn without replacement."""
    left, chance = float(q.sum()), 1.0
    for drawn in order:
        chance *= q[drawn].item() / left
        left -= q[drawn].item()
    return chance


def in_any_order(q: Tensor, chosen: frozenset[int]) -> float:
    return sum(in_order(q, order) for order in permutations(chosen))


@pytest.mark.parametrize(
    ("make", "probability"),
    [
        (lambda: ScoreFunction(NoBaseline()), of_one_draw),
        (MuProp, of_one_draw),
        *[(partial(SumAndSample, k), partial(of_the_rest, num_exact=k)) for k in (1, 2, 3)],
        *[(partial(UnorderedSet, k), in_any_order) for k in (2, 3, 4)],
    ],
    ids=["score_function", "muprop", "sum_1", "sum_2", "sum_3", "unordered_2", "unordered_3", "unordered_4"],
)
def test_mean_over_all_outcomes_is_exact_to_rounding(make: Callable[[], Estimator], probability: Probability) -> None:
    logits, weight = uneven_logits(5), make_weight(5)
    found = mean_over_outcomes(make(), logits, weight, of=cost, probability=probability)
    assert max(error(found, exact(logits, weight)).values()) < 5e-6


# No variance on a constant f: where the baseline is a cost of the same image, or a gradient, or everything is summed

WITH_OTHER_BASELINES = {"score_function", "moving_average", "learned", "learned_2", "muprop_learned"}


@each(CASES)
def test_a_cost_that_y_does_not_enter(case: Case) -> None:
    logits, _ = small_batch()
    theta = torch.tensor(2.0, requires_grad=True)
    result = estimate(prepared(case.make()), lambda y: theta.expand(y.shape[:2]), logits)
    torch.testing.assert_close(result.value, torch.full((5,), 2.0))
    (gradient,) = torch.autograd.grad(result.value.sum(), theta, retain_graph=True)
    torch.testing.assert_close(gradient, torch.tensor(5.0))
    assert result.auxiliary.isfinite()


@each([case for case in CASES if case.name not in WITH_OTHER_BASELINES])
def test_no_gradient_on_a_constant(case: Case) -> None:
    logits, _ = small_batch()
    result = estimate(prepared(case.make()), lambda y: 2 * y.sum(dim=-1), logits)
    torch.testing.assert_close(result.value, torch.full((5,), 2.0))
    torch.testing.assert_close(torch.autograd.grad(result.value.sum(), logits)[0], torch.zeros(5, 6), rtol=0, atol=2e-6)


# Partial enumeration


@pytest.mark.parametrize("more", [0, 2])
@pytest.mark.parametrize("num_classes", [2, 3, 5])
@pytest.mark.parametrize("make", [SumAndSample, UnorderedSet])
def test_all_classes_at_once_are_marginalization(
    make: type[SumAndSample] | type[UnorderedSet], num_classes: int, more: int
) -> None:
    logits, weight = uneven_logits(num_classes), make_weight(num_classes)
    estimator, truth = make(num_classes + more), exact(logits, weight)
    assert estimate(estimator, cost(weight.unsqueeze(0)), logits.unsqueeze(0)).metrics["evaluations"] == num_classes
    for seed in range(3):
        found = draws_of(estimator, logits, weight, draws=8, seed=seed)
        assert max(error(found, truth).values()) < 2e-6


def test_sum_and_sample_sums_the_most_probable_and_draws_among_the_rest() -> None:
    logits = torch.tensor([0.5, 3.0, -1.0, 2.0, 0.0])
    spy = Spy(lambda y: y.sum(dim=-1))
    estimate(SumAndSample(num_exact=2), spy, logits.repeat(MANY, 1))
    summed, drawn = spy.seen[0][:2], spy.seen[0][2].argmax(dim=-1)
    assert torch.equal(summed.sum(dim=0), torch.tensor([0.0, 1, 0, 1, 0]).expand(MANY, -1))
    counts = drawn.bincount(minlength=5)
    assert counts[1] == counts[3] == 0
    rest = [0, 2, 4]
    expected = logits[rest].double().softmax(dim=0) * MANY
    assert stats.chisquare(counts[rest].numpy(), expected.numpy()).pvalue > 1e-3


def test_variance_falls_with_every_class_that_is_summed() -> None:
    """Down to none where one class is left, which is then drawn for sure."""
    logits, costs = torch.tensor([-0.3, 1.6, -0.6, 0.0, 1.0]), torch.tensor([2.4, 1.1, -0.4, -1.1, -2.1]).unsqueeze(1)
    estimators = [ScoreFunction(NoBaseline()), *map(SumAndSample, range(1, 6))]
    draws = [draws_of(estimator, logits, costs, of=linear, draws=MANY) for estimator in estimators]
    variances = [spread(moments.logits) for moments in draws]
    assert all(less < 0.9 * more for more, less in pairwise(variances[:4]))
    assert max(variances[4:]) < 1e-10


@pytest.mark.parametrize("size", [2, 3, 5])
def test_ratios_agree_with_every_order_of_the_draws(size: int) -> None:
    """R(S, s) = P(S | s first) / P(S), and R^{-s}(S, s') the same among the classes other than s."""
    q = uneven_logits(5).double().softmax(dim=0)
    for chosen in map(frozenset, combinations(range(5), size)):
        members, others = sorted(chosen), sorted(set(range(5)) - chosen)
        first, second = ratios(q[members].log().unsqueeze(1), q[others].sum().log().unsqueeze(0))
        for i, s in enumerate(members):
            without = q.clone()
            without[s] = 0
            given_s = in_any_order(without, chosen - {s})
            assert first[i].exp().item() == pytest.approx(given_s / in_any_order(q, chosen), rel=1e-9)
            for j, t in enumerate(members):
                both = without.clone()
                both[t] = 0
                expected = 1.0 if s == t else in_any_order(both, chosen - {s, t}) / given_s
                assert second[i, j].exp().item() == pytest.approx(expected, rel=1e-9)
        weights = q[members].unsqueeze(1)
        assert (weights * first.exp()).sum().item() == pytest.approx(1, rel=1e-9)
        torch.testing.assert_close((weights * second.exp()).sum(dim=1), torch.ones(size, 1).double())


# Straight-through


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_straight_through_has_no_variance_on_a_linear_f_and_is_exact(num_classes: int) -> None:
    logits, weight = uneven_logits(num_classes), coefficients(num_classes)
    found = draws_of(StraightThrough(at_one), logits, weight, of=linear, draws=64)
    truth = exact(logits, weight, of=linear)
    torch.testing.assert_close(found.logits, truth.logits.float().expand_as(found.logits))


EXACT_TO = [(StraightThrough, linear, True), (StraightThrough, quadratic, False), (ReinMax, linear, True)]
EXACT_TO += [(ReinMax, quadratic, True), (ReinMax, cubic, False)]


@pytest.mark.parametrize("num_classes", [2, 3, 5])
@pytest.mark.parametrize(("make", "of", "is_exact"), EXACT_TO)
def test_mean_is_exact_up_to_the_degree_of_the_estimator(
    make: type[StraightThrough], of: CostFamily, is_exact: bool, num_classes: int
) -> None:
    """Straight-through is of the first order, ReinMax of the second."""
    logits, weight = uneven_logits(num_classes), coefficients(num_classes)
    found = mean_over_outcomes(make(at_one), logits, weight, of=of, probability=of_one_draw)
    off = error(found, exact(logits, weight, of=of))
    assert max(off["value"], off["weight"]) < 5e-6
    assert off["logits"] < 5e-6 if is_exact else off["logits"] > 0.01


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize(("make", "of"), [(StraightThrough, linear), (ReinMax, quadratic)])
def test_exactness_is_lost_at_other_temperatures(
    make: type[StraightThrough], of: CostFamily, temperature: float
) -> None:
    logits, weight = uneven_logits(3), coefficients(3)
    decoupled = make(partial(constant, value=temperature))
    found = mean_over_outcomes(decoupled, logits, weight, of=of, probability=of_one_draw)
    off = error(found, exact(logits, weight, of=of))
    assert max(off["value"], off["weight"]) < 5e-6  # y is still drawn from q
    assert off["logits"] > 0.01


@pytest.mark.parametrize("temperature", [0.2, 5.0])
@pytest.mark.parametrize("make", [StraightThroughGumbelSoftmax, *THROUGH, REBAR])
def test_classes_are_drawn_from_q_at_every_temperature(make: Callable[..., Estimator], temperature: float) -> None:
    logits = uneven_logits(5)
    estimator = make(temperature if make is REBAR else partial(constant, value=temperature))
    spy = Spy(lambda y: y.sum(dim=-1))
    estimate(estimator, spy, logits.repeat(MANY, 1))
    expected = logits.double().softmax(dim=0) * MANY
    assert stats.chisquare(spy.seen[0].sum(dim=(0, 1)).numpy(), expected.numpy()).pvalue > 1e-3


# Gumbel-Rao


def compare(one: Estimator, other: Estimator, *, seeds: tuple[int, int] = (1, 2)) -> tuple[float, float]:
    """Worst |z| between two mean gradients at the logits, and the ratio of their variances."""
    logits, weight = make_logits("moderate", 3), make_weight(3)
    a, b = (
        draws_of(estimator, logits, weight, draws=2**17, seed=seed).logits.double()
        for estimator, seed in zip((one, other), seeds, strict=True)
    )
    standard = ((a.var(dim=0) + b.var(dim=0)) / len(a)).sqrt()
    return ((a.mean(dim=0) - b.mean(dim=0)).abs() / standard).max().item(), spread(a) / spread(b)


class DifferentiatedNoise(GumbelRao):
    """Wrong: the Gumbels given y move with the logits."""

    def surrogate(self, log_q: Tensor, y: Tensor, temperature: R.Temperature, generator: torch.Generator) -> Tensor:
        fresh = R.gumbel((self.num_conditional, *y.shape), generator=generator)
        return (R.conditional_perturbed(log_q, y, fresh) / temperature).softmax(dim=-1).mean(dim=0)


@pytest.mark.parametrize("value", [0.3, 1.0])
def test_gumbel_rao_has_the_mean_of_straight_through_gumbel_softmax_and_less_variance(value: float) -> None:
    temperature = partial(constant, value=value)
    z, ratio = compare(GumbelRao(temperature, num_conditional=10), StraightThroughGumbelSoftmax(temperature))
    assert z < 4
    assert ratio < 0.95
    z, _ = compare(DifferentiatedNoise(temperature, num_conditional=10), StraightThroughGumbelSoftmax(temperature))
    assert z > 4


def test_gumbel_rao_with_one_conditional_draw_is_distributed_as_straight_through_gumbel_softmax() -> None:
    logits, weight = make_logits("moderate", 3), make_weight(3)
    rao, plain = (
        draws_of(estimator, logits, weight, draws=20_000, seed=seed).logits
        for seed, estimator in enumerate((GumbelRao(at_one, num_conditional=1), StraightThroughGumbelSoftmax(at_one)))
    )
    for k in range(3):
        assert stats.ks_2samp(rao[:, k].numpy(), plain[:, k].numpy()).pvalue > 1e-3


# ReinMax-Rao and ReinMax-CV


@pytest.mark.parametrize("value", [0.02, 0.5, 1.0])
def test_reinmax_rao_of_two_classes_is_its_integral_and_half_the_gradient_of_a_linear_f_at_low_temperature(
    value: float,
) -> None:
    """J_GR given y: E[s (1 - s)] / tau, s = sigmoid(D / tau), D logistic about logit pi_D(y) and kept above zero."""
    q = 0.7
    logits, slopes = torch.tensor([math.log(q / (1 - q)), 0.0]), torch.tensor([3.0, 0.0])

    def jacobian(middle: float) -> float:
        above = stats.logistic(loc=special.logit(middle))

        def density(noise: float) -> float:
            soft = special.expit(noise / value)
            return float(soft * (1 - soft) / value * above.pdf(noise))

        return float(integrate.quad(density, 0, min(40 * value, 40), limit=500)[0] / above.sf(0))

    mean = q * jacobian((1 + q) / 2) + (1 - q) * jacobian((2 - q) / 2)
    exact_slope = 3 * q * (1 - q)
    expected = 2 * 3 * mean - exact_slope / 2
    weight = torch.stack([slopes, torch.zeros(2), torch.zeros(2)], dim=1)
    rao = ReinMaxRao(partial(constant, value=value), num_conditional=20)
    found = draws_of(rao, logits, weight, of=linear, draws=MANY).logits
    assert worst_z(found, torch.tensor([expected, -expected])) < 4
    assert worst_z(found[:, 0], torch.tensor(exact_slope)) > 4
    if value == 0.02:
        assert expected == pytest.approx(exact_slope / 2, rel=0.05)


def test_reinmax_rao_at_high_temperature_is_minus_half_of_straight_through() -> None:
    hot, plain = ReinMaxRao(partial(constant, value=1e6)), StraightThrough(at_one)
    found, expected = seen_and_gradients(hot), seen_and_gradients(plain)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[2], -expected[2] / 2, rtol=1e-4, atol=1e-5)


def test_reinmax_cv_without_its_control_is_reinmax() -> None:
    cold = partial(constant, value=0.3)
    for found, expected in zip(
        seen_and_gradients(ReinMaxCV(cold, eta=0.0)), seen_and_gradients(ReinMax(at_one)), strict=True
    ):
        assert torch.equal(found, expected)


class ControlOfTheNoiseOfY(ReinMaxCV):
    """Wrong: r_0 has the Gumbels that y came from, those given that it is the argmax at log q."""

    def surrogate(self, log_q: Tensor, y: Tensor, temperature: R.Temperature, generator: torch.Generator) -> Tensor:
        fresh = R.gumbel((self.num_conditional, *y.shape), generator=generator)
        middle = heun_middle(log_q.exp(), y)
        soft = conditional_softmax(log_q, middle, y, fresh, temperature).mean(dim=0)
        noise = R.conditional_perturbed(log_q, y, R.gumbel(tuple(y.shape), generator=generator)) - 2 * log_q + middle
        return heun(log_q, y, 1.0) + self.eta * (soft - ((log_q + noise.detach()) / temperature).softmax(dim=-1))


@pytest.mark.parametrize("eta", [1.5, -1.0])
@pytest.mark.parametrize("value", [0.3, 1.0])
def test_reinmax_cv_has_the_mean_of_reinmax_and_more_variance(value: float, eta: float) -> None:
    control, plain = ReinMaxCV(partial(constant, value=value), num_conditional=5, eta=eta), ReinMax(at_one)
    z, ratio = compare(control, plain)
    assert z < 4
    assert ratio > 1.02
    z, _ = compare(ControlOfTheNoiseOfY(partial(constant, value=value), num_conditional=5, eta=eta), plain)
    assert z > 4


# Perturbed logits given their argmax


def conditional(draws: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """log q [4], classes y ~ q [N, 4], and perturbed logits given y [N, 4]."""
    logits, generator = uneven_logits(4), seeded(seed)
    y = R.gumbel_max(logits, R.gumbel((draws, 4), generator=generator))
    return (
        logits.log_softmax(dim=0),
        y,
        R.conditional_perturbed(logits, y, R.gumbel((draws, 4), generator=generator)),
    )


def test_argmax_of_the_conditional_perturbed_logits_is_y() -> None:
    _, y, perturbed = conditional(100_000)
    assert torch.equal(perturbed.argmax(dim=-1), y.argmax(dim=-1))


def test_conditional_perturbed_logits_are_gumbels_when_y_is_drawn_too() -> None:
    log_q, _, perturbed = conditional(50_000)
    for k in range(4):
        assert stats.kstest(perturbed[:, k].numpy(), stats.gumbel_r(loc=log_q[k].item()).cdf).pvalue > 1e-3
    correlation = perturbed.T.corrcoef() - torch.eye(4)
    assert correlation.abs().max() < 4 / math.sqrt(50_000)  # and independent


@pytest.mark.parametrize("given", range(4))
def test_conditional_perturbed_logits_are_those_that_have_this_argmax(given: int) -> None:
    """Against rejection: coordinates, and their distances from the largest."""
    log_q, y, perturbed = conditional(40_000)
    here = perturbed[y[:, given] == 1]
    free = log_q + R.gumbel((40_000, 4), generator=seeded(1))
    kept = free[free.argmax(dim=-1) == given]
    for k in range(4):
        assert stats.ks_2samp(here[:, k].numpy(), kept[:, k].numpy()).pvalue > 1e-3
        if k != given:
            below, kept_below = ((rows[:, given] - rows[:, k]).numpy() for rows in (here, kept))
            assert stats.ks_2samp(below, kept_below).pvalue > 1e-3
    euler = 0.5772156649015329
    top = here[:, given]  # a standard Gumbel, whichever class it is
    assert worst_z(top, torch.tensor(euler)) < 4
    assert worst_z((top - euler).square(), torch.tensor(math.pi**2 / 6)) < 4


def test_conditional_perturbed_logits_are_differentiable_at_the_logits() -> None:
    """In float64 from exponentials: -log(E_k / q_k + E_i), and -log E_i at y's class i, where q has no part."""
    logits = uneven_logits(4).repeat(100, 1)
    gumbels = R.gumbel((100, 4), generator=seeded(3))
    y = R.gumbel_max(logits, R.gumbel((100, 4), generator=seeded(4)))
    direction = torch.randn(100, 4, generator=seeded(5))

    leaf, same = logits.clone().requires_grad_(), logits.double().requires_grad_()
    waits = (-gumbels.double()).exp()
    ahead = (waits * y).sum(dim=-1, keepdim=True)
    expected = -(waits / same.softmax(dim=-1) * (1 - y) + ahead).log()
    found = R.conditional_perturbed(leaf, y, gumbels)
    torch.testing.assert_close(found, expected.float())
    (slope,) = torch.autograd.grad(found, leaf, direction)
    (expected_slope,) = torch.autograd.grad(expected, same, direction.double())
    torch.testing.assert_close(slope, expected_slope.float(), rtol=1e-4, atol=1e-5)


def test_conditional_perturbed_logits_are_finite_for_classes_of_probability_zero() -> None:
    logits = torch.tensor([0.0, -math.inf, 1.0, -1e4]).repeat(1000, 1).requires_grad_()
    y = R.one_hot(torch.arange(1000) % 2 * 2, 4)
    perturbed = R.conditional_perturbed(logits, y, R.gumbel((1000, 4), generator=seeded(0)))
    (slope,) = torch.autograd.grad(perturbed.sum(), logits)
    assert perturbed.isfinite().all()
    assert slope.isfinite().all()
    assert torch.equal(perturbed.argmax(dim=-1), y.argmax(dim=-1))


# Gapped straight-through


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("gap", [0.0, 1.0, 3.0])
def test_gapped_straight_through_is_the_softmax_at_logits_whose_argmax_is_y(gap: float, temperature: float) -> None:
    """y's logit is raised to the largest, the others lowered as far as the gap needs; a step later only J is left."""
    logits, weight = uneven_logits(5), coefficients(5)
    spy = Spy(linear(weight.repeat(200, 1, 1)))
    leaf = logits.repeat(200, 1).requires_grad_()
    value = estimate(GappedStraightThrough(partial(constant, value=temperature), gap=gap), spy, leaf).value
    (found,) = torch.autograd.grad(value.sum(), leaf)

    chosen = spy.seen[0][0]
    assert torch.equal(chosen.sum(dim=-1), torch.ones(200))
    assert bool(((chosen == 0) | (chosen == 1)).all())
    torch.testing.assert_close(value.detach(), linear(weight.repeat(200, 1, 1))(chosen.unsqueeze(0))[0])
    assert (chosen.sum(dim=0) > 0).all()
    for row, y in zip(found, chosen.argmax(dim=-1).tolist(), strict=True):
        perturbed = logits.double().clamp(max=logits.max().item() - gap)
        perturbed[y] = logits.max()
        assert perturbed.argmax() == y or gap == 0
        soft = (perturbed / temperature).softmax(dim=0)
        slope = weight[:, 0].double()
        torch.testing.assert_close(row, (soft * (slope - soft @ slope) / temperature).float(), rtol=1e-4, atol=1e-6)


# MuProp


def test_muprop_has_no_variance_on_a_linear_f_and_is_exact() -> None:
    logits, weight = uneven_logits(5), coefficients(5)
    found, truth = draws_of(MuProp(), logits, weight, of=linear, draws=64), exact(logits, weight, of=linear)
    torch.testing.assert_close(found.logits, truth.logits.float().expand_as(found.logits))


def test_muprop_learns_from_the_remainder_of_a_quadratic_f() -> None:
    """gradient = f'(q) grad q + r(y) grad log q(y), r(y) = (y - q) A (y - q)."""
    logits, weight = uneven_logits(4), coefficients(4)
    spy = Spy(quadratic(weight.repeat(200, 1, 1)))
    leaf = logits.repeat(200, 1).requires_grad_()
    result = estimate(MuProp(), spy, leaf)
    (found,) = torch.autograd.grad(result.value.sum(), leaf)

    q, slopes, bend = logits.double().softmax(dim=0), weight[:, 0].double(), weight[:, 1:].double()
    away = spy.seen[0][0].double() - q
    remainder = torch.einsum("nk,kj,nj->n", away, bend, away)
    slope = (bend + bend.T) @ q + slopes
    expected = q * (slope - q @ slope) + remainder.unsqueeze(1) * away
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)
    assert float(result.metrics["signal_variance"]) == pytest.approx(remainder.var(correction=0).item(), rel=1e-4)


def test_muprop_takes_a_baseline_of_its_remainders() -> None:
    """On f = |y - q|^2 + c y, c large, the remainder is near 1 at every draw: the other draw's leaves little of it."""
    logits = torch.zeros(8)
    weight = torch.cat([torch.full((8, 1), 5.0), torch.eye(8)], dim=1)
    none, other = (
        draws_of(estimator, logits, weight, of=quadratic, draws=4096).logits.var(dim=0).sum()
        for estimator in (MuProp(2), MuProp(2, LeaveOneOut()))
    )
    assert other < 0.01 * none, (none, other)


# REBAR and RELAX


def seen_and_gradients(estimator: Estimator) -> list[Tensor]:
    """The first y that f is given, the value, and the gradients at the logits and at W."""
    logits, weight = small_batch()
    spy = Spy(cost(weight))
    value = estimate(estimator, spy, logits).value
    return [spy.seen[0], value.detach(), *torch.autograd.grad(value.sum(), (logits, weight))]


@pytest.mark.parametrize("num_samples", [1, 3])
def test_rebar_without_its_control_is_the_score_function(num_samples: int) -> None:
    plain = seen_and_gradients(ScoreFunction(NoBaseline(), num_samples))
    for found, expected in zip(seen_and_gradients(REBAR(scale=0.0, num_samples=num_samples)), plain, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_rebar_is_its_equation_draw_by_draw(scale: float) -> None:
    """In float64 from the y and the relaxed y of z that f is given, by autograd through z and z'.

    z is known from its softmax but for a constant, on which nothing depends. z'_y is the same at every q, and of the
    others the noise.
    """
    temperature = 0.8
    logits, weight = small_batch()
    spy = Spy(cost(weight))
    result = estimate(REBAR(temperature, scale), spy, logits)
    (found,) = torch.autograd.grad(result.value.sum(), logits)

    leaf, f = logits.detach().double().requires_grad_(), cost(weight.detach().double())
    log_q = leaf.log_softmax(dim=-1)
    y, relaxed = (seen[0].double() for seen in spy.seen)
    z = temperature * relaxed.log()
    free = log_q + (z - log_q).detach()
    top = (y * z).sum(dim=-1, keepdim=True)
    noise = ((-z).exp() - (-top).exp()) * log_q.detach().exp()
    given = torch.where(y > 0, z, -(noise / log_q.exp() + (-top).exp()).log())
    torch.testing.assert_close(given, z)
    control, conditional = (scale * f((each / temperature).softmax(dim=-1)[None])[0] for each in (free, given))
    signal = f(y[None])[0] - conditional.detach()
    objective = signal * (y * log_q).sum(dim=-1) + control - conditional
    (expected,) = torch.autograd.grad(objective.sum(), leaf)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)
    assert float(result.metrics["signal_variance"]) == pytest.approx(signal.var(correction=0).item(), rel=1e-4)


@pytest.mark.parametrize(("log_temperature", "bound"), [(-20.0, 1e-3), (20.0, 1e3)])
@pytest.mark.parametrize("make", [REBAR, RELAX])
def test_a_learned_temperature_keeps_to_its_bounds(make: type[REBAR], log_temperature: float, bound: float) -> None:
    """The optimizer knows nothing of them."""
    estimator = prepared(make())
    logits, weight = small_batch()
    with torch.no_grad():
        estimator.get_parameter("log_temperature").fill_(log_temperature)
    result = estimate(estimator, cost(weight), logits)
    assert float(result.metrics["control_temperature"]) == pytest.approx(bound)
    loss = result.value.sum() + result.auxiliary
    for gradient in torch.autograd.grad(loss, [logits, weight, *estimator.parameters()]):
        assert gradient.isfinite().all()


def test_relax_starts_as_rebar() -> None:
    """And then has a control of its own."""
    rebar, relax = REBAR(num_samples=2), prepared(RELAX(num_samples=2))
    assert isinstance(relax, RELAX)
    for found, expected in zip(seen_and_gradients(relax), seen_and_gradients(rebar), strict=True):
        assert torch.equal(found, expected)
    with torch.no_grad():
        relax.output.weight.fill_(0.5)
    assert not torch.allclose(seen_and_gradients(relax)[2], seen_and_gradients(rebar)[2])


@pytest.mark.parametrize("make", [REBAR, RELAX])
def test_the_control_is_the_cost_itself_at_low_temperature(make: type[REBAR]) -> None:
    """c(z') is f(y) where z' is nearly one-hot: nothing is left of the signal."""
    logits, weight = make_logits("moderate", 3).repeat(2**13, 1), make_weight(3).repeat(2**13, 1, 1)
    variance = [
        float(estimate(prepared(make(temperature), 3), cost(weight), logits).metrics["signal_variance"])
        for temperature in (1.0, 0.03, 1e-3)
    ]
    assert variance[1] < 0.1 * variance[0]
    assert variance[2] < 0.003 * variance[0]


@pytest.mark.parametrize("make", [REBAR, RELAX])
def test_the_control_is_a_constant_at_high_temperature(make: type[REBAR]) -> None:
    """c is f at the centre of the simplex: the score function with that baseline."""
    logits, weight = small_batch()
    y, _, found, _ = seen_and_gradients(prepared(make(1e3)))
    centre = cost(weight)(torch.full((1, 5, 6), 1 / 6))
    expected = (cost(weight)(y) - centre)[0].detach().unsqueeze(-1) * (y[0] - logits.detach().softmax(dim=-1))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)


# NVIL


def of_context(num_images: int) -> CostFunction:
    """f = 10 sin(2 x) + y_1: most of its variance is x's, as `estimate` gives it."""
    offset = 10 * (2 * torch.linspace(-1, 1, num_images)).sin()
    return lambda y: offset + y[..., 0]


def test_learned_baseline_explains_what_a_running_average_cannot() -> None:
    f, logits = of_context(64), torch.zeros(64, 3)
    learned = prepared(ScoreFunction(LearnedBaseline(hidden=20, decay=0.9)), 3)
    average = ScoreFunction(MovingAverage(0.9))
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.03)
    for step in range(200):
        estimate(average, f, logits, seed=step)
        auxiliary = estimate(learned, f, logits, seed=step).auxiliary
        optimizer.zero_grad()
        auxiliary.backward()
        optimizer.step()
    found, plain = (
        estimate(estimator, f, logits, seed=1000).metrics["signal_variance"] for estimator in (learned, average)
    )
    assert float(plain) > 30
    assert float(found) < 0.02 * float(plain)


@pytest.mark.parametrize("make", [LearnedBaseline, MovingAverage])
def test_a_baseline_is_the_same_whatever_the_cost_it_is_subtracted_from(
    make: type[LearnedBaseline] | type[MovingAverage],
) -> None:
    estimator = prepared(ScoreFunction(make()), 6)
    logits, weight = small_batch()
    estimate(estimator, cost(weight), logits)  # so that the average has begun

    def baseline(shift: float) -> Tensor:
        """What was subtracted, from the gradient (cost - baseline)(y - q)."""
        spy = Spy(lambda y: cost(weight)(y) + shift)
        value = estimate(deepcopy(estimator), spy, logits, seed=1).value
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        score = spy.seen[0][0] - logits.detach().softmax(dim=-1)
        return value.detach() - (gradient / score)[:, 0]

    assert baseline(0.0).abs().min() > 0.01
    torch.testing.assert_close(baseline(100.0), baseline(0.0), rtol=0, atol=1e-3)


# Two classes: the Concrete distribution is BinConcrete

TEMPERATURES = [0.3, 1.0, 2.0]
DENSITIES = [R.concrete_log_density, R.exp_concrete_log_density]  # of y, and of log y


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_concrete_of_two_classes_is_binary_concrete(temperature: float) -> None:
    """The same draw from the difference of the noise, and the same densities there."""
    logits = torch.randn(100, 2, generator=seeded(1)).double()
    noise = R.gumbel((100, 2), generator=seeded(2)).double()
    log_y = R.concrete_log_sample(logits, noise, temperature)
    logit, difference = logits[:, 0] - logits[:, 1], noise[:, 0] - noise[:, 1]
    y_logit = R.binary_concrete_logit_sample(logit, difference, temperature)
    torch.testing.assert_close(log_y[:, 0] - log_y[:, 1], y_logit, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        R.exp_concrete_log_density(log_y, logits, temperature),
        R.binary_concrete_logit_log_density(y_logit, logit, temperature),
        rtol=1e-5,
        atol=1e-5,
    )
    torch.testing.assert_close(
        R.concrete_log_density(log_y, logits, temperature),
        R.binary_concrete_log_density(y_logit, logit, temperature),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("logits", [[0.4, -0.3], [-2.0, 0.5]])
def test_concrete_of_two_classes_is_binary_concrete_as_published(logits: list[float], temperature: float) -> None:
    """Maddison et al. 2017, appendix B: X = 1 / (1 + exp(-(log a + L) / t)), L = log U - log(1 - U), with the density

    t a x^(-t-1) (1 - x)^(-t-1) / (a x^-t + (1 - x)^-t)^2, and that of log x - log(1 - x) by dx = x (1 - x) d(logit x).
    """
    pi, t = torch.tensor(logits), temperature
    a = math.exp(logits[0] - logits[1])
    gumbels = R.gumbel((20_000, 2), generator=seeded(3))
    log_y = R.concrete_log_sample(pi, gumbels, t)
    x, log_a = log_y[:, 0].double().exp(), math.log(a)

    u = (gumbels[:, 0] - gumbels[:, 1]).double().sigmoid()
    published = 1 / (1 + (-(log_a + u.log() - (1 - u).log()) / t).exp())
    torch.testing.assert_close(x, published, rtol=1e-4, atol=1e-6)
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    of_the_logit = stats.logistic(loc=log_a / t, scale=1 / t)
    assert stats.kstest((log_y[:, 0] - log_y[:, 1]).numpy(), of_the_logit.cdf).pvalue > 1e-3

    x = torch.linspace(0.01, 0.99, 99).double()
    log_x = torch.stack([x, 1 - x], dim=-1).log()
    density = t * a * (x * (1 - x)) ** (-t - 1) / (a * x**-t + (1 - x) ** -t) ** 2
    of_x, of_its_logit = (log_density(log_x, pi, t).exp() for log_density in DENSITIES)
    torch.testing.assert_close(of_x, density, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(of_its_logit, density * x * (1 - x), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(of_its_logit, torch.tensor(of_the_logit.pdf(x.logit().numpy())), rtol=1e-5, atol=1e-8)


def test_the_concrete_estimator_of_two_classes_has_the_binary_concrete_bound() -> None:
    """With the settings of configs/estimator/concrete.yaml: KL and its gradient at the draw that f was given."""
    config = OmegaConf.load(Path(__file__).parent.parent / "configs/estimator/concrete.yaml")
    assert config.kl == "relaxed"
    tau, prior_tau = config.temperature.value, config.prior_temperature
    estimator = GumbelSoftmax(partial(constant, value=tau), 3, kl=config.kl, prior_temperature=prior_tau)
    logits = torch.randn(50, 2, generator=seeded(3)).requires_grad_()
    spy = Spy(lambda y: y[..., 0])
    kl = estimate(estimator, spy, logits).kl

    same = logits.detach().double().requires_grad_()
    logit, seen = same[:, 0] - same[:, 1], spy.seen[0].double()
    noise = tau * (seen[..., 0].log() - seen[..., 1].log()) - logit.detach()
    y_logit = R.binary_concrete_logit_sample(logit, noise, tau)
    posterior = R.binary_concrete_logit_log_density(y_logit, logit, tau)
    prior = R.binary_concrete_logit_log_density(y_logit, torch.zeros_like(logit), prior_tau)
    expected = (posterior - prior).mean(dim=0)
    torch.testing.assert_close(kl, expected.float(), rtol=1e-4, atol=1e-4)
    (found_slope,) = torch.autograd.grad(kl.sum(), logits)
    (expected_slope,) = torch.autograd.grad(expected.sum(), same)
    torch.testing.assert_close(found_slope, expected_slope.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("logit", [-2.0, 0.0, 0.7])
def test_binary_concrete_densities_integrate_to_the_distribution_function(logit: float, temperature: float) -> None:
    """P(Y < y) = sigmoid(tau logit y - logit pi): of logit y over the whole line, and of y between two points."""
    at = torch.tensor(logit, dtype=torch.float64)

    def of_logit(y_logit: float) -> float:
        return float(
            R.binary_concrete_logit_log_density(torch.tensor(y_logit, dtype=torch.float64), at, temperature).exp()
        )

    def of_y(y: float) -> float:
        return float(R.binary_concrete_log_density(torch.tensor(y, dtype=torch.float64).logit(), at, temperature).exp())

    def below(y: float) -> float:
        return float(special.expit(temperature * special.logit(y) - logit))

    mode, width = logit / temperature, 40 / temperature
    assert integrate.quad(of_logit, mode - width, mode + width)[0] == pytest.approx(1, abs=1e-6)
    for low, high in pairwise([1e-3, 0.1, 0.7, 0.999]):
        expected = below(high) - below(low)
        assert integrate.quad(of_logit, special.logit(low), special.logit(high))[0] == pytest.approx(expected, rel=1e-6)
        assert integrate.quad(of_y, low, high)[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_binary_concrete_densities_agree_with_torch_distributions(temperature: float) -> None:
    logit = torch.randn(200, generator=seeded(4)).double()
    y_logit = R.binary_concrete_logit_sample(logit, R.logistic((200,), generator=seeded(5)).double(), temperature)
    at = torch.tensor(temperature).double()
    of_logit: Distribution = LogitRelaxedBernoulli(at, logits=logit)
    of_y: Distribution = RelaxedBernoulli(at, logits=logit)
    found = R.binary_concrete_logit_log_density(y_logit, logit, temperature)
    torch.testing.assert_close(found, of_logit.log_prob(y_logit))
    inside = y_logit.abs() < 15  # theirs clamps y, and loses the tails
    found = R.binary_concrete_log_density(y_logit, logit, temperature)
    torch.testing.assert_close(found[inside], of_y.log_prob(y_logit.sigmoid())[inside], rtol=1e-5, atol=1e-5)
    assert inside.sum() > 150


def test_logistic_noise_is_logistic() -> None:
    noise = R.logistic((50_000,), generator=seeded(6))
    assert stats.kstest(noise.numpy(), stats.logistic.cdf).pvalue > 1e-3
    assert torch.equal(noise, R.logistic((50_000,), generator=seeded(6)))


@pytest.mark.parametrize("temperature", [0.01, *TEMPERATURES, 100.0])
def test_rounding_a_binary_draw_gives_its_probability(temperature: float) -> None:
    logit = torch.tensor([-2.0, 0.3, 1.5])
    y = R.binary_concrete_logit_sample(logit, R.logistic((MANY, 3), generator=seeded(7)), temperature).sigmoid()
    assert worst_z((y > 0.5).double(), logit.double().sigmoid()) < 4
    assert worst_z((y > 0.5).double(), (logit * 1.1).double().sigmoid()) > 4


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("logit", [-1e4, 0.0, 1e4])
def test_binary_concrete_stays_finite(logit: float, temperature: float) -> None:
    leaf = torch.full((1000,), logit, requires_grad=True)
    y_logit = R.binary_concrete_logit_sample(leaf, R.logistic((1000,), generator=seeded(8)), temperature)
    of_logit = R.binary_concrete_logit_log_density(y_logit, leaf, temperature)
    of_y = R.binary_concrete_log_density(y_logit, leaf, temperature)
    (slope,) = torch.autograd.grad((of_logit + of_y).sum(), leaf)
    for tensor in (y_logit, y_logit.sigmoid(), of_logit, of_y, slope):
        assert tensor.isfinite().all()
