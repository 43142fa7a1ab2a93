"""Holds every estimator to the contract of estimators/contract.py. A new estimator is one row of CASES."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import pytest
import torch
from scipy import integrate, stats
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, kl_divergence
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical

from estimators.contract import ContractError, CostFunction, Estimate, Estimator, Schedule
from estimators.gumbel_softmax import KL, GumbelSoftmax, StraightThroughGumbelSoftmax
from estimators.local_expectations import IndeCateR
from estimators.marginalization import Marginalization
from estimators.partial_enumeration import SparsemaxSum, SumAndSample, UnorderedSet
from estimators.relaxed_control import REBAR, RELAX
from estimators.schedules import constant
from estimators.score_function import (
    VIMCO,
    Baseline,
    LearnedBaseline,
    LeaveOneOut,
    MovingAverage,
    MuProp,
    NoBaseline,
    ScoreFunction,
)
from estimators.straight_through import (
    GappedStraightThrough,
    GumbelRao,
    ReinMax,
    ReinMaxCV,
    ReinMaxRao,
    StraightThrough,
)

CostFamily = Callable[[Tensor], CostFunction]  # f from parameters W [B, K, H], some for each image

at_one = partial(constant, value=1.0)


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], Estimator]
    unbiased: bool  # the mean gradient is the exact one
    discrete: bool  # the value is f's at one-hot vectors, which its first call is given
    evaluations: int  # calls of f per image of `small_batch`
    random: bool = True
    softmax: bool = True  # q(y|x) is softmax(logits), and kl its KL

    def build(self, num_classes: int, *, num_variables: int = 1, seed: int = 0) -> Estimator:
        """With parameters of its own away from where they start, where a wrong term could hide behind a zero."""
        estimator = self.make()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            estimator.prepare(CONTEXT_SIZE, num_variables, num_classes)
        generator = seeded(4 + seed)
        with torch.no_grad():
            for parameter in estimator.parameters():
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
        return estimator


CASES = [
    Case("marginalization", Marginalization, True, True, 6, random=False),
    Case("gumbel_softmax", lambda: GumbelSoftmax(at_one), False, False, 1),
    Case("concrete", lambda: GumbelSoftmax(at_one, kl="relaxed", prior_temperature=0.4), False, False, 1),
    Case("st_gumbel_softmax", lambda: StraightThroughGumbelSoftmax(at_one, num_samples=3), False, True, 3),
    Case("score_function", lambda: ScoreFunction(NoBaseline()), True, True, 1),
    Case("moving_average", lambda: ScoreFunction(MovingAverage(0.9)), True, True, 1),
    Case("leave_one_out_2", lambda: ScoreFunction(LeaveOneOut(), num_samples=2), True, True, 2),
    Case("leave_one_out_4", lambda: ScoreFunction(LeaveOneOut(), num_samples=4), True, True, 4),
    Case("learned", lambda: ScoreFunction(LearnedBaseline(hidden=3)), True, True, 1),
    Case("learned_2", lambda: ScoreFunction(LearnedBaseline(hidden=3), num_samples=2), True, True, 2),
    Case("vimco", lambda: VIMCO(num_samples=3), True, True, 3),
    Case("muprop", lambda: MuProp(), True, True, 2),
    Case("muprop_3", lambda: MuProp(num_samples=3), True, True, 4),
    Case("muprop_leave_one_out", lambda: MuProp(2, LeaveOneOut()), True, True, 3),
    Case("muprop_learned", lambda: MuProp(baseline=LearnedBaseline(hidden=3)), True, True, 2),
    Case("rebar", REBAR, True, True, 2),
    Case("rebar_2", lambda: REBAR(num_samples=2), True, True, 4),
    Case("relax", lambda: RELAX(hidden=3), True, True, 2),
    Case("straight_through", lambda: StraightThrough(at_one), False, True, 1),
    Case("reinmax", lambda: ReinMax(at_one, num_samples=2), False, True, 2),
    Case("reinmax_rao", lambda: ReinMaxRao(at_one, num_conditional=3), False, True, 1),
    Case("reinmax_cv", lambda: ReinMaxCV(at_one, num_samples=2, num_conditional=3), False, True, 2),
    Case("gumbel_rao", lambda: GumbelRao(at_one, num_conditional=3), False, True, 1),
    Case("gapped_straight_through", lambda: GappedStraightThrough(at_one), False, True, 1),
    Case("sum_and_sample_1", lambda: SumAndSample(num_exact=1), True, True, 2),
    Case("sum_and_sample_3", lambda: SumAndSample(num_exact=3), True, True, 4),
    Case("unordered_set_2", lambda: UnorderedSet(num_samples=2), True, True, 2),
    Case("unordered_set_3", lambda: UnorderedSet(num_samples=3), True, True, 3),
    Case("unordered_set_4", lambda: UnorderedSet(num_samples=4), True, True, 4),
    Case("indecater", IndeCateR, True, True, 6, random=False),  # of one variable
    Case("indecater_2", lambda: IndeCateR(num_samples=2), True, True, 12, random=False),
    Case("sparsemax", SparsemaxSum, False, True, 2, random=False, softmax=False),
]


def each(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


CLASSES = [2, 3, 10]
SHAPES = ["flat", "moderate", "nearly_one_hot"]
CONTEXT_SIZE = 2
DRAWS = 49 * 2**11  # > 1e5
ROUNDING = 1e-6  # what float32 may add to a mean; standard errors here are about 1e-3

UNBIASED = [case for case in CASES if case.unbiased]
BIASED = [case for case in CASES if not case.unbiased]
RANDOM = [case for case in CASES if case.random]
SOFTMAX = [case for case in CASES if case.softmax]
RELAXED = [GumbelSoftmax, StraightThroughGumbelSoftmax]
THROUGH = [StraightThrough, ReinMax, ReinMaxRao, ReinMaxCV, GumbelRao, GappedStraightThrough]
TEMPERED: list[Callable[[Schedule], Estimator]] = [*RELAXED, *THROUGH]
UNUSABLE_TEMPERATURES = [0.0, -1.0, math.nan, math.inf]


# A nonlinear f, its exact gradients, and an estimator's gradients draw by draw


def make_logits(shape: str, num_classes: int) -> Tensor:
    """Logits [K]; `nearly_one_hot` leaves each other class about 0.2 %, some 300 of the draws."""
    if shape == "flat":
        return torch.zeros(num_classes)
    if shape == "moderate":
        return torch.linspace(-1.0, 1.0, num_classes)
    return 6.0 * torch.eye(num_classes)[0]


def make_weight(num_classes: int) -> Tensor:
    return torch.randn(num_classes, 2, generator=seeded(1))


def cost(weight: Tensor) -> CostFunction:
    """f(y) = 1 + 3 h_1 - 2 h_1 h_2, h = tanh(y W), with a W [B, K, 2] of its own for each image."""

    def f(y: Tensor) -> Tensor:
        hidden = torch.einsum("sbk,bkh->sbh", y, weight).tanh()
        return 1 + 3 * hidden[..., 0] - 2 * hidden[..., 0] * hidden[..., 1]

    return f


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def estimate(estimator: Estimator, f: CostFunction, logits: Tensor, *, seed: int = 0, step: int = 0) -> Estimate:
    """Of one variable, whose axis neither f's y [S, B, K] nor the logits [B, K] have here."""
    context = torch.linspace(-1, 1, len(logits)).unsqueeze(-1).expand(-1, CONTEXT_SIZE)
    result = estimator(
        lambda y: f(y.squeeze(-2)), logits.unsqueeze(-2), step=step, context=context, generator=seeded(seed)
    )
    assert isinstance(result, Estimate)
    return result


@dataclass
class Moments:
    """E_q[f] and its gradients; from an estimator each has a leading axis of independent draws."""

    value: Tensor
    logits: Tensor
    weight: Tensor


def exact(logits: Tensor, weight: Tensor, *, of: CostFamily = cost) -> Moments:
    """By enumeration in float64, from logits [K] and W [K, H]."""
    logits, weight = logits.double().requires_grad_(), weight.double().requires_grad_()
    classes = torch.eye(len(logits), dtype=torch.float64).unsqueeze(1)
    value = logits.softmax(dim=0) @ of(weight.unsqueeze(0))(classes).squeeze(1)
    return Moments(value.detach(), *torch.autograd.grad(value, (logits, weight)))


def draws_of(
    estimator: Estimator,
    logits: Tensor,
    weight: Tensor,
    *,
    of: CostFamily = cost,
    draws: int = DRAWS,
    seed: int = 0,
) -> Moments:
    """A batch of equal images, each with its own copy of logits and W: an image's gradient is one draw."""
    logits = logits.repeat(draws, 1).requires_grad_()
    weight = weight.repeat(draws, 1, 1).requires_grad_()
    value = estimate(estimator, of(weight), logits, seed=seed).value
    return Moments(value.detach(), *torch.autograd.grad(value.sum(), (logits, weight)))


def worst_z(draws: Tensor, expected: Tensor) -> float:
    """The largest |mean - expected| in standard errors, over the coordinates of draws [N, ...]."""
    draws = draws.double()
    error = draws.std(dim=0) / math.sqrt(len(draws)) + ROUNDING
    return float(((draws.mean(dim=0) - expected).abs() / error).max())


def z_scores(estimator: Estimator, shape: str, num_classes: int) -> dict[str, float]:
    """The test of unbiasedness: worst |z| of the mean value and of its mean gradients, against enumeration."""
    logits, weight = make_logits(shape, num_classes), make_weight(num_classes)
    for seed in (1, 2, 3):  # earlier steps, so that a running baseline is not at its start
        draws_of(estimator, logits, weight, draws=8, seed=seed)
    found, truth = draws_of(estimator, logits, weight), exact(logits, weight)
    return {name: worst_z(getattr(found, name), getattr(truth, name)) for name in ("value", "logits", "weight")}


@cache
def z_scores_of(case: Case, shape: str, num_classes: int) -> dict[str, float]:
    """Of an estimator in training mode: drawn once, and read by several tests."""
    return z_scores(case.build(num_classes), shape, num_classes)


def worst_gradient(z: dict[str, float]) -> float:
    return max(z["logits"], z["weight"])


@dataclass
class Spy:
    """f, keeping each y that it was given."""

    f: CostFunction
    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, y: Tensor) -> Tensor:
        self.seen.append(y.detach().clone())
        return self.f(y)


def small_batch() -> tuple[Tensor, Tensor]:
    """Logits [5, 6] and W [5, 6, 2] of five different images, both requiring a gradient."""
    logits = 1.5 * torch.randn(5, 6, generator=seeded(2))
    return logits.requires_grad_(), torch.randn(5, 6, 2, generator=seeded(3)).requires_grad_()


# Gradients: the mean is the exact one


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_classes", CLASSES)
@each(UNBIASED)
def test_mean_gradient_is_exact(case: Case, num_classes: int, shape: str) -> None:
    assert worst_gradient(z_scores_of(case, shape, num_classes)) < 4


@each(UNBIASED)
def test_mean_gradient_is_exact_in_evaluation_mode(case: Case) -> None:
    assert worst_gradient(z_scores(case.build(3).eval(), "moderate", 3)) < 4


@pytest.mark.parametrize("num_classes", CLASSES)
@each(BIASED)
def test_biased_estimators_fail_the_test_of_unbiasedness(case: Case, num_classes: int) -> None:
    assert z_scores_of(case, "moderate", num_classes)["logits"] > 4


class OwnCostInBaseline(Baseline):
    """Wrong: the mean over draws contains the cost that it is subtracted from."""

    def forward(self, costs: Tensor, context: Tensor) -> Tensor:
        return costs.mean(dim=0)


class HalfThePathIntoF(ScoreFunction):
    """Wrong: parameters inside f get half their gradient."""

    def forward(
        self, f: CostFunction, logits: Tensor, *, step: int, context: Tensor, generator: torch.Generator
    ) -> Estimate:
        def half(y: Tensor) -> Tensor:
            costs = f(y)
            return (costs + costs.detach()) / 2

        return super().forward(half, logits, step=step, context=context, generator=generator)


class OnePathDropped(REBAR):
    """Wrong: the control is not differentiated through z ("free"), or through z' ("given")."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.which = which

    def moved(self, z: Tensor, y: Tensor) -> Tensor:
        both = super().moved(z, y)
        return both - 1 if self.which == "free" else torch.ones_like(both)


@pytest.mark.parametrize("num_classes", CLASSES)
@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        (ScoreFunction(OwnCostInBaseline(), num_samples=4), "logits"),
        (HalfThePathIntoF(NoBaseline()), "weight"),
        (OnePathDropped("free"), "logits"),
        (OnePathDropped("given"), "logits"),
    ],
    ids=["own_cost_in_baseline", "half_the_path_into_f", "rebar_without_the_path", "rebar_without_the_path_given_y"],
)
def test_wrong_estimators_fail_where_they_are_wrong(wrong: Estimator, where: str, num_classes: int) -> None:
    z = z_scores(wrong, "moderate", num_classes)
    assert z.pop(where) > 4
    assert max(z.values()) < 4


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_classes", CLASSES)
def test_every_marginalized_gradient_is_exact(num_classes: int, shape: str) -> None:
    logits, weight = make_logits(shape, num_classes), make_weight(num_classes)
    found, truth = draws_of(Marginalization(), logits, weight, draws=1), exact(logits, weight)
    torch.testing.assert_close(found.value[0], truth.value.float())
    torch.testing.assert_close(found.logits[0], truth.logits.float())
    torch.testing.assert_close(found.weight[0], truth.weight.float())


# The value as a number, and what f is given


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_classes", CLASSES)
@each([case for case in SOFTMAX if case.discrete])
def test_mean_value_of_discrete_draws_is_exact(case: Case, num_classes: int, shape: str) -> None:
    assert z_scores_of(case, shape, num_classes)["value"] < 4


@pytest.mark.parametrize("num_classes", CLASSES)
def test_mean_relaxed_value_is_exact_only_in_the_limit_of_low_temperature(num_classes: int) -> None:
    logits, weight = make_logits("moderate", num_classes), make_weight(num_classes)
    truth = exact(logits, weight).value
    cold, warm = (GumbelSoftmax(partial(constant, value=value)) for value in (1e-4, 1.0))
    assert worst_z(draws_of(cold, logits, weight).value, truth) < 4
    assert worst_z(draws_of(warm, logits, weight).value, truth) > 4


@each(CASES)
def test_shapes_of_the_estimate(case: Case) -> None:
    logits, weight = small_batch()
    result = estimate(case.build(6), cost(weight), logits)
    assert (result.value.shape, result.kl.shape, result.auxiliary.shape) == ((5,), (5,), ())


@each(CASES)
def test_metrics_are_plain_scalars(case: Case) -> None:
    """A metric with a graph would keep the step's memory until it is logged."""
    logits, weight = small_batch()
    metrics = estimate(case.build(6), cost(weight), logits).metrics
    assert "evaluations" in metrics
    for metric in map(torch.as_tensor, metrics.values()):
        assert metric.shape == ()
        assert not metric.requires_grad


@each(CASES)
def test_f_may_hold_work_that_was_done_once(case: Case) -> None:
    """What depends on x alone is computed before f is bound, and every call of f shares its graph."""
    logits, weight = small_batch()
    done_once = (2 * weight).tanh()
    result = estimate(case.build(6), cost(done_once), logits)
    found = torch.autograd.grad(result.value.sum() + result.auxiliary, weight)[0]
    apart = done_once.detach().requires_grad_()
    result = estimate(case.build(6), cost(apart), logits)
    (through,) = torch.autograd.grad(result.value.sum(), apart)
    torch.testing.assert_close(found, through * 2 * (1 - apart.detach().square()))


@each(CASES)
def test_f_sees_valid_class_vectors(case: Case) -> None:
    logits, weight = small_batch()
    spy = Spy(cost(weight))
    estimate(case.build(6), spy, logits)
    assert spy.seen
    for y in spy.seen:
        assert y.shape[1:] == logits.shape
        assert (y >= 0).all()
        torch.testing.assert_close(y.sum(dim=-1), torch.ones(y.shape[:-1]))
    assert bool(((spy.seen[0] == 0) | (spy.seen[0] == 1)).all()) == case.discrete


@each(CASES)
def test_calls_once_is_said_of_those_that_do(case: Case) -> None:
    """f then takes other work along: it must be called so, and its gradient left to the loss."""
    estimator, logits = case.build(4), torch.zeros(3, 1, 4, requires_grad=True)
    weight, called = torch.randn(4, generator=seeded(0)).requires_grad_(), []

    def f(y: Tensor) -> Tensor:
        called.append(y.shape[0])
        return (y * weight).sum(dim=(-2, -1)).square()

    value = estimator(f, logits, step=0, context=torch.zeros(3, CONTEXT_SIZE), generator=seeded(0)).value
    assert not estimator.calls_once or len(called) == 1
    value.sum().backward()  # the first call's graph is still whole
    assert weight.grad is not None


@each(CASES)
def test_evaluations_are_the_calls_of_f_per_image(case: Case) -> None:
    logits, weight = small_batch()
    spy = Spy(cost(weight))
    metrics = estimate(case.build(6), spy, logits).metrics
    assert metrics["evaluations"] == sum(len(y) for y in spy.seen) == case.evaluations


# Sparsemax: exact for a q(y|x) of its own


def projected(logits: Tensor) -> Tensor:
    """The point of the simplex closest to logits [K], in float64: its threshold is found by bisection."""
    low, high = logits.max() - 1, logits.max()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (logits - middle).clamp(min=0).sum() > 1 else (low, middle)
    return (logits - low).clamp(min=0)


@pytest.mark.parametrize("scale", [0.0, 0.1, 0.5, 2.0], ids=["all", "most", "some", "one"])
@pytest.mark.parametrize("num_classes", CLASSES)
def test_sparsemax_is_exact_for_the_projection_onto_the_simplex(num_classes: int, scale: float) -> None:
    """Value, KL and their gradients, against bisection, enumeration and central differences in float64."""
    logits = scale * torch.randn(num_classes, generator=seeded(6)) + 3.0
    weight = make_weight(num_classes).double().requires_grad_()
    costs = cost(weight.unsqueeze(0))(torch.eye(num_classes).double().unsqueeze(1)).squeeze(1)

    def losses(logits: Tensor) -> Tensor:
        p = projected(logits)
        return torch.stack([p @ costs, torch.special.xlogy(p, p).sum() + math.log(num_classes)])

    truth, step = losses(logits.double()), 1e-5
    bumps = [losses(logits.double() + step * e) - losses(logits.double() - step * e) for e in torch.eye(num_classes)]
    slopes = torch.stack(bumps, dim=1).detach() / (2 * step)
    (slope_weight,) = torch.autograd.grad(truth[0], weight)

    leaf, own_weight = logits.unsqueeze(0).requires_grad_(), weight.detach().float().unsqueeze(0).requires_grad_()
    result = estimate(SparsemaxSum(), cost(own_weight), leaf)
    torch.testing.assert_close(torch.cat([result.value, result.kl]), truth.float())
    for loss, slope in zip((result.value, result.kl), slopes, strict=True):
        (found,) = torch.autograd.grad(loss.sum(), leaf, retain_graph=True)
        torch.testing.assert_close(found[0], slope.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(result.value.sum(), own_weight)[0][0], slope_weight.float())


def test_sparsemax_calls_f_for_the_largest_support_alone() -> None:
    logits = torch.tensor([[9.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.9, -5.0], [-5.0, 2.0, 0.0, 2.0]])
    spy = Spy(lambda y: y.sum(dim=-1))
    metrics = estimate(SparsemaxSum(), spy, logits).metrics
    assert metrics["evaluations"] == sum(len(y) for y in spy.seen) == 3
    assert metrics["support"] == 2  # 1, 3 and 2
    torch.testing.assert_close(spy.seen[0].sum(dim=0)[1], torch.tensor([1.0, 1.0, 1.0, 0.0]))


# Isolation: the model and the estimator's own parameters learn from different losses


def reaches(loss: Tensor, tensors: list[Tensor]) -> bool:
    if not (tensors and loss.requires_grad):
        return False
    gradients = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)


def leaks(estimator: Estimator) -> list[str]:
    """What breaks the two rules of isolation: every loss that moves what it must not."""
    logits, weight = small_batch()
    result = estimate(estimator, cost(weight), logits)
    own: list[Tensor] = list(estimator.parameters())
    found = {
        "value -> own": reaches(result.value.sum(), own),
        "kl -> own": reaches(result.kl.sum(), own),
        "auxiliary -> logits": reaches(result.auxiliary, [logits]),
        "auxiliary -> f": reaches(result.auxiliary, [weight]),
    }
    return [path for path, leak in found.items() if leak]


class Leaky(Estimator):
    """Wrong: breaks both rules of isolation, in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(
        self, f: CostFunction, logits: Tensor, *, step: int, context: Tensor, generator: torch.Generator
    ) -> Estimate:
        value = self.scale * f(logits.softmax(dim=-1).unsqueeze(0)).squeeze(0)
        return Estimate(value, self.scale * value, value.sum(), {"evaluations": 1.0})


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@each(CASES)
def test_value_and_auxiliary_keep_to_their_own_parameters(case: Case, training: bool) -> None:
    assert leaks(case.build(6).train(training)) == []


def test_leaks_are_found() -> None:
    assert leaks(Leaky()) == ["value -> own", "kl -> own", "auxiliary -> logits", "auxiliary -> f"]


@each(CASES)
def test_value_and_kl_reach_the_model(case: Case) -> None:
    logits, weight = small_batch()
    result = estimate(case.build(6), cost(weight), logits)
    assert reaches(result.value.sum(), [logits])
    assert reaches(result.value.sum(), [weight])
    assert reaches(result.kl.sum(), [logits])


# The auxiliary loss of the estimators that learn

LEARNING = [case for case in CASES if list(case.build(3).parameters())]


def test_learning_estimators_are_those_with_a_baseline_or_a_control_that_learns() -> None:
    assert [case.name for case in LEARNING] == [
        "learned",
        "learned_2",
        "muprop_learned",
        "rebar",
        "rebar_2",
        "relax",
    ]


@each(CASES)
def test_auxiliary_reaches_every_parameter_of_the_estimators_own(case: Case) -> None:
    logits, weight = small_batch()
    estimator = case.build(6)
    auxiliary = estimate(estimator, cost(weight), logits).auxiliary
    if case in LEARNING:
        assert all(reaches(auxiliary, [parameter]) for parameter in estimator.parameters())
    else:
        assert auxiliary == 0
        assert not auxiliary.requires_grad


@each(LEARNING)
def test_auxiliary_is_what_is_to_be_small(case: Case) -> None:
    """The squared error of a baseline, the squared norm of a controlled gradient: both seen in what value delivers."""
    logits, weight = small_batch()
    spy = Spy(cost(weight))
    result = estimate(case.build(6), spy, logits)
    (gradient,) = torch.autograd.grad(result.value.sum(), logits)
    if "learned" in case.name:
        costs, score = spy.f(spy.seen[0]).detach(), spy.seen[0] - logits.detach().softmax(dim=-1)
        known = torch.zeros_like(logits)
        if case.name.startswith("muprop"):
            costs, known = without_taylor(spy.f, spy.seen[0], logits)
        without_baseline = (costs.unsqueeze(-1) * score).mean(dim=0) + known
        baseline = ((without_baseline - gradient) / score.mean(dim=0))[:, 0]
        expected = (costs - baseline).square().mean()
    else:
        expected = gradient.square().sum(dim=-1).mean()
    torch.testing.assert_close(result.auxiliary, expected)


def without_taylor(f: CostFunction, y: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The remainders of MuProp at y [S, B, K], and the gradient of what is taken away, f'(q) grad q."""
    q = logits.softmax(dim=-1)
    at_mean = f(q.unsqueeze(0)).squeeze(0)
    (slopes,) = torch.autograd.grad(at_mean.sum(), q, retain_graph=True)
    remainder = f(y) - at_mean - (slopes * (y - q)).sum(dim=-1)
    return remainder.detach(), torch.autograd.grad((slopes * q).sum(), logits)[0]


def own_parameters() -> list[tuple[Case, str]]:
    return [(case, name) for case in LEARNING for name, _ in case.build(6).named_parameters()]


@pytest.mark.parametrize(("case", "name"), own_parameters(), ids=lambda part: getattr(part, "name", part))
def test_gradient_of_auxiliary_is_that_of_its_number(case: Case, name: str) -> None:
    """A fourth-order central difference at the same draws, along a random direction in one parameter."""
    logits, weight = small_batch()

    def auxiliary(shift: float) -> tuple[float, float]:
        """As a number, and its derivative, at the parameter plus `shift` times the direction."""
        estimator = case.build(6)
        parameter = estimator.get_parameter(name)
        direction = torch.randn(parameter.shape, generator=seeded(5)).sign()
        with torch.no_grad():
            parameter.add_(shift * direction)
        loss = estimate(estimator, cost(weight), logits).auxiliary
        (gradient,) = torch.autograd.grad(loss, parameter)
        return loss.item(), (gradient * direction).sum().item()

    step = 0.02
    near, far = ((auxiliary(k * step)[0] - auxiliary(-k * step)[0]) / (2 * k * step) for k in (1, 2))
    expected = (4 * near - far) / 3
    assert abs(expected) > 1e-3
    assert auxiliary(0)[1] == pytest.approx(expected, rel=2e-3, abs=2e-4)


@each(LEARNING)
def test_minimising_auxiliary_lowers_the_variance_of_the_gradient(case: Case) -> None:
    logits, weight = make_logits("moderate", 3), make_weight(3)
    estimator = case.build(3)

    def variance() -> float:
        return draws_of(estimator, logits, weight, draws=2**14, seed=1).logits.var(dim=0).sum().item()

    estimator.eval()
    before = variance()
    estimator.train()
    optimizer = torch.optim.Adam(estimator.parameters(), lr=0.03)
    for step in range(100):
        auxiliary = estimate(estimator, cost(weight.repeat(64, 1, 1)), logits.repeat(64, 1), seed=10 + step).auxiliary
        optimizer.zero_grad()
        auxiliary.backward()
        optimizer.step()
    estimator.eval()
    assert variance() < 0.75 * before


# The KL of q(y|x) and its three losses


def analytic_kl(logits: Tensor) -> Tensor:
    return kl_divergence(Categorical(logits=logits), Categorical(logits=torch.zeros_like(logits)))


def assert_same_with_gradient(found: Tensor, expected: Tensor, at: tuple[Tensor, Tensor]) -> None:
    """Compares two losses [B], and their gradients at their own leaves, of which the second is in float64."""
    torch.testing.assert_close(found, expected.to(found.dtype))
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), at[0])[0], torch.autograd.grad(expected.sum(), at[1])[0].float()
    )


@each([case for case in SOFTMAX if case.name != "concrete"])
def test_analytic_kl_is_the_default(case: Case) -> None:
    logits, weight = small_batch()
    same = logits.detach().double().requires_grad_()
    result = estimate(case.build(6), cost(weight), logits)
    assert_same_with_gradient(result.kl, analytic_kl(same), (logits, same))


@pytest.mark.parametrize("shape", SHAPES)
def test_mean_sampled_kl_of_one_hot_draws_is_the_analytic_one(shape: str) -> None:
    logits = make_logits(shape, 3).repeat(DRAWS, 1)
    estimator = StraightThroughGumbelSoftmax(at_one, kl="sampled")
    kl = estimate(estimator, lambda y: y.sum(dim=-1), logits).kl
    assert worst_z(kl, analytic_kl(logits[0].double())) < 4


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.0])
@pytest.mark.parametrize("kl", ["sampled", "relaxed"])
@pytest.mark.parametrize("prior", [None, [0.5, 0.02, 0.08, 0.1, 0.1, 0.2]])
def test_kl_of_a_relaxed_draw_agrees_with_torch_distributions(
    prior: list[float] | None, kl: KL, temperature: float
) -> None:
    """The draw is seen through f, its noise solved for, and the loss built anew from that noise."""
    logits, weight = small_batch()
    spy = Spy(cost(weight))
    estimator = GumbelSoftmax(partial(constant, value=temperature), 3, kl=kl, prior_temperature=0.7)
    p_y = torch.tensor(prior or [1 / 6] * 6)
    estimator.log_prior = None if prior is None else p_y.log()
    found = estimate(estimator, spy, logits).kl

    same = logits.detach().double().requires_grad_()
    noise = temperature * spy.seen[0].double().log() - same.detach()  # up to a constant, which cancels
    log_y = ((same + noise) / temperature).log_softmax(dim=-1)
    if kl == "sampled":
        expected = (log_y.exp() * (same.log_softmax(dim=-1) - p_y.log())).sum(dim=-1)
    else:
        posterior: Distribution = ExpRelaxedCategorical(torch.tensor(temperature), logits=same)
        relaxed_prior: Distribution = ExpRelaxedCategorical(torch.tensor(0.7), logits=p_y.log().expand_as(same))
        expected = posterior.log_prob(log_y) - relaxed_prior.log_prob(log_y)
    assert_same_with_gradient(found, expected.mean(dim=0), (logits, same))


def test_straight_through_shares_the_relaxed_kl_of_its_relaxed_draw() -> None:
    logits, weight = small_batch()
    plain, through = (estimate(make(at_one, kl="relaxed"), cost(weight), logits).kl for make in RELAXED)
    assert torch.equal(plain, through)


def test_relaxed_kl_is_zero_where_posterior_and_prior_are_one() -> None:
    estimator = GumbelSoftmax(at_one, kl="relaxed", prior_temperature=1.0)
    kl = estimate(estimator, lambda y: y.sum(dim=-1), torch.full((5, 6), 3.0)).kl
    torch.testing.assert_close(kl, torch.zeros(5))


# Closed forms on constant and linear f


@pytest.mark.parametrize("num_samples", [2, 4])
def test_leave_one_out_has_no_variance_on_a_constant(num_samples: int) -> None:
    logits, _ = small_batch()
    theta = torch.tensor(2.0, requires_grad=True)
    value = estimate(ScoreFunction(LeaveOneOut(), num_samples), lambda y: theta.expand(y.shape[:2]), logits).value
    gradient_logits, gradient_theta = torch.autograd.grad(value.sum(), (logits, theta))
    assert torch.equal(value, torch.full((5,), 2.0))
    assert torch.equal(gradient_logits, torch.zeros(5, 6))
    assert gradient_theta == 5


def test_score_function_without_baseline_has_mean_zero_and_variance_on_a_constant() -> None:
    logits = make_logits("moderate", 3).repeat(DRAWS, 1).requires_grad_()
    value = estimate(ScoreFunction(NoBaseline()), lambda y: torch.full(y.shape[:2], 2.0), logits).value
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert worst_z(gradient, torch.zeros(3)) < 4
    q = logits[0].detach().softmax(dim=0)
    torch.testing.assert_close(gradient.var(dim=0), 4 * q * (1 - q), rtol=0.02, atol=0)  # Var[2 (y_k - q_k)]


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("relaxed", RELAXED)
def test_relaxed_gradient_of_a_linear_f_is_that_of_the_mean_relaxed_draw(
    relaxed: type[GumbelSoftmax], temperature: float
) -> None:
    """K = 2: y_1 = sigmoid((l_1 - l_2 + L) / tau), L logistic. Its mean's gradient is not that of q_1."""
    difference, slope = 1.0, 3.0

    def density(noise: float) -> float:
        y = 1 / (1 + math.exp(-(difference + noise) / temperature))
        return float(slope * y * (1 - y) / temperature * stats.logistic.pdf(noise))

    expected = integrate.quad(density, -30, 30)[0]
    q = 1 / (1 + math.exp(-difference))
    logits = torch.tensor([difference, 0.0]).repeat(DRAWS, 1).requires_grad_()
    value = estimate(relaxed(partial(constant, value=temperature)), lambda y: slope * y[..., 0], logits).value
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert worst_z(gradient, torch.tensor([expected, -expected])) < 4
    assert worst_z(gradient[:, 0], torch.tensor(slope * q * (1 - q))) > 4


# The running baseline


def test_moving_average_at_batch_size_one_holds_earlier_costs_alone() -> None:
    """The gradient is (cost - b)(y - q), b the bias-corrected average of the costs before; 0 at first."""
    decay = 0.8
    earlier: list[float] = []
    estimator = ScoreFunction(MovingAverage(decay))
    for step in range(6):
        logits = torch.tensor([[0.5, -0.5, 0.0]], requires_grad=True)
        table = torch.randn(3, generator=seeded(step)) + 5
        spy = Spy(lambda y, table=table: y @ table)  # type: ignore[misc]
        value = estimate(estimator, spy, logits, seed=step).value
        (gradient,) = torch.autograd.grad(value.sum(), logits)

        weights = [(1 - decay) * decay**age for age in reversed(range(step))]
        average = sum(w * c for w, c in zip(weights, earlier, strict=True)) / (sum(weights) or 1)
        y = spy.seen[0][0]
        torch.testing.assert_close(gradient, (value.detach() - average) * (y - logits.detach().softmax(dim=-1)))
        earlier.append(value.item())


def test_moving_average_rests_in_evaluation_mode() -> None:
    baseline = MovingAverage(0.5)
    context = torch.zeros(2, CONTEXT_SIZE)
    baseline(torch.tensor([[4.0, 8.0]]), context)
    baseline.eval()
    assert baseline(torch.tensor([[100.0]]), context) == 6
    assert baseline(torch.tensor([[0.0]]), context) == 6


# State

STATEFUL = [case for case in CASES if case.build(3).state_dict()]


def test_stateful_estimators_are_those_with_a_running_average_or_a_network() -> None:
    assert [case.name for case in STATEFUL] == ["moving_average", *(case.name for case in LEARNING)]


@each(CASES)
def test_state_rests_in_evaluation_mode(case: Case) -> None:
    estimator = case.build(6).eval()
    before = deepcopy(estimator.state_dict())
    bits(estimator, seed=7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in estimator.state_dict().items())


@each(STATEFUL)
def test_running_averages_alone_move_in_training_mode(case: Case) -> None:
    """Parameters are the optimizer's."""
    estimator = case.build(6)
    before = deepcopy(estimator.state_dict())
    bits(estimator, seed=7)
    moved = {name for name, tensor in estimator.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name, _ in estimator.named_buffers()}


@each(STATEFUL)
def test_state_travels_in_the_state_dict(case: Case) -> None:
    trained, resumed, fresh = case.build(6), case.build(6, seed=1), case.build(6, seed=1)
    bits(trained, seed=7)
    resumed.load_state_dict(trained.state_dict())
    expected, found, other = (bits(estimator, seed=8) for estimator in (trained, resumed, fresh))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(torch.cat([x.flatten() for x in other]), torch.cat([x.flatten() for x in expected]))


# Randomness and the temperature


def bits(estimator: Estimator, seed: int) -> list[Tensor]:
    """All that an estimator gives for a minibatch: y, value, kl, auxiliary, and the gradients."""
    logits, weight = small_batch()
    spy = Spy(cost(weight))
    result = estimate(estimator, spy, logits, seed=seed)
    gradients = torch.autograd.grad((result.value + result.kl).sum(), (logits, weight), retain_graph=True)
    own = list(estimator.parameters()) if result.auxiliary.requires_grad else []
    own_gradients = torch.autograd.grad(result.auxiliary, own) if own else ()
    return [*spy.seen, result.value, result.kl, result.auxiliary, *gradients, *own_gradients]


@each(CASES)
def test_generator_is_the_only_source_of_randomness(case: Case) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = bits(case.build(6), seed=7)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        assert all(torch.equal(a, b) for a, b in zip(first, bits(case.build(6), seed=7), strict=True))


@each(RANDOM)
def test_another_seed_gives_other_draws(case: Case) -> None:
    assert not torch.equal(bits(case.build(6), seed=7)[0], bits(case.build(6), seed=8)[0])


@each([case for case in CASES if not case.random])
def test_the_seed_is_nothing_to_those_that_do_not_draw(case: Case) -> None:
    assert all(torch.equal(a, b) for a, b in zip(bits(case.build(6), 7), bits(case.build(6), 8), strict=True))


@pytest.mark.parametrize("make", TEMPERED)
def test_temperature_is_the_schedule_at_this_step(make: Callable[[Schedule], Estimator]) -> None:
    def found(temperature: Schedule, step: int) -> tuple[float | Tensor, Tensor]:
        """The metric, and the gradient that the temperature shapes."""
        logits, weight = small_batch()
        result = estimate(make(temperature), cost(weight), logits, step=step)
        return result.metrics["temperature"], torch.autograd.grad((result.value + result.kl).sum(), logits)[0]

    def annealed(step: int) -> float:
        return 1 / (1 + step)

    metric, gradient = found(annealed, 3)
    assert metric == 0.25
    assert torch.equal(gradient, found(partial(constant, value=0.25), 0)[1])
    assert not torch.equal(gradient, found(annealed, 0)[1])


# Hard inputs


def relaxed_cases() -> list[Case]:
    """Both relaxed estimators at far temperatures, with each KL."""
    kls: list[KL] = ["analytic", "sampled", "relaxed"]
    return [
        Case(
            f"{relaxed.__name__}-{kl}-{tau}",
            partial(relaxed, partial(constant, value=tau), 2, kl, prior_temperature=prior),
            unbiased=False,
            discrete=relaxed is StraightThroughGumbelSoftmax,
            evaluations=2,
        )
        for relaxed in RELAXED
        for kl in kls
        for tau, prior in [(1e-3, 1e3), (1e-3, 1e-3), (1.0, 0.5), (1e3, 1e3), (1e3, 1e-3)]
    ]


def tempered_cases() -> list[Case]:
    """All others with a temperature, near and far; those that learn theirs also just inside its bounds."""
    through: list[Callable[[Schedule, int], Estimator]] = [
        StraightThrough,
        ReinMax,
        *(partial(make, num_conditional=3) for make in (GumbelRao, ReinMaxRao, ReinMaxCV)),
        partial(ReinMaxCV, num_conditional=1, eta=-2.0),
        GappedStraightThrough,
        partial(GappedStraightThrough, gap=0.0),
        partial(GappedStraightThrough, gap=1e4),
    ]
    scheduled = [
        Case(f"through_{number}-{tau}", partial(make, partial(constant, value=tau), 2), False, True, 2)
        for number, make in enumerate(through)
        for tau in (1e-3, 1.0, 1e3)
    ]
    learned = [
        Case(f"{control.__name__}-{tau}", partial(control, tau, num_samples=2), True, True, 4)
        for control in (REBAR, RELAX)
        for tau in (1e-3, 4e-3, 1.0, 250.0, 1e3)
    ]
    return scheduled + learned


INFINITY = math.inf
HARD_LOGITS = [
    [1e4, -1e4, 0.0],
    [1e4, 1e4, 1e4],
    [-1e4, -1e4, -1e4],
    [0.0, 1.0, -INFINITY],
    [-INFINITY, -1e4, -INFINITY],
    [1e4, -INFINITY, -1e4],
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@each(CASES + relaxed_cases() + tempered_cases())
def test_everything_stays_finite(case: Case, precision: str) -> None:
    logits = torch.tensor(HARD_LOGITS, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    logits.requires_grad_()
    weight = make_weight(3).repeat(len(HARD_LOGITS), 1, 1).requires_grad_()
    estimator = case.build(3)
    for seed in range(3):
        spy = Spy(cost(weight))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            result = estimate(estimator, spy, logits, seed=seed)
            loss = (result.value + result.kl).sum() + result.auxiliary
        gradients = torch.autograd.grad(loss, (logits, weight, *estimator.parameters()))
        for tensor in (*spy.seen, result.value, result.kl, result.auxiliary, *gradients):
            assert tensor.isfinite().all()
        assert all(math.isfinite(metric) for metric in result.metrics.values())


@each([case for case in RANDOM if case.discrete])
def test_a_class_of_probability_zero_is_never_drawn(case: Case) -> None:
    """Among enough others for the estimators that draw without replacement."""
    spy = Spy(lambda y: y.sum(dim=-1))
    estimate(case.build(6), spy, torch.tensor([0.0, -INFINITY, 1.0, -1.0, 0.5, -0.5]).repeat(1000, 1))
    drawn = spy.seen[0].sum(dim=(0, 1))
    assert drawn[1] == 0
    assert (drawn > 0).sum() == 5


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("num_samples", lambda: GumbelSoftmax(at_one, num_samples=0)),
        ("num_samples", lambda: StraightThroughGumbelSoftmax(at_one, num_samples=0)),
        ("num_samples", lambda: ScoreFunction(NoBaseline(), num_samples=0)),
        ("num_samples", lambda: ScoreFunction(MovingAverage(), num_samples=0)),
        ("num_samples", lambda: ScoreFunction(LeaveOneOut(), num_samples=1)),
        ("num_samples", lambda: VIMCO(num_samples=1)),
        *(("num_samples", partial(make, num_samples=0)) for make in (MuProp, REBAR, RELAX)),
        *(("num_samples", partial(make, at_one, num_samples=0)) for make in THROUGH),
        ("num_samples", lambda: UnorderedSet(num_samples=1)),
        ("num_samples", lambda: ScoreFunction(LearnedBaseline(), num_samples=0)),
        ("num_exact", lambda: SumAndSample(num_exact=0)),
        *(("num_conditional", partial(m, at_one, num_conditional=0)) for m in (GumbelRao, ReinMaxRao, ReinMaxCV)),
        *(("eta", partial(ReinMaxCV, at_one, eta=eta)) for eta in (math.nan, math.inf)),
        ("gap", lambda: GappedStraightThrough(at_one, gap=-0.1)),
        ("gap", lambda: GappedStraightThrough(at_one, gap=math.nan)),
        ("gap", lambda: GappedStraightThrough(at_one, gap=math.inf)),
        ("hidden", lambda: LearnedBaseline(hidden=0)),
        ("hidden", lambda: RELAX(hidden=0)),
        *(("scale", partial(make, scale=scale)) for make in (REBAR, RELAX) for scale in (math.nan, math.inf)),
        *(("temperature", partial(make, value)) for make in (REBAR, RELAX) for value in UNUSABLE_TEMPERATURES),
        *(("temperature", partial(make, lambda step: 0.0)) for make in THROUGH),
        *(("temperature", partial(make, lambda step: math.inf)) for make in THROUGH),
        ("decay", lambda: LearnedBaseline(decay=1.0)),
        ("decay", lambda: LearnedBaseline(decay=math.nan)),
        ("prior_temperature", lambda: GumbelSoftmax(at_one, prior_temperature=0.0)),
        ("prior_temperature", lambda: GumbelSoftmax(at_one, prior_temperature=-1.0)),
        ("prior_temperature", lambda: GumbelSoftmax(at_one, prior_temperature=math.nan)),
        ("temperature", lambda: GumbelSoftmax(lambda step: 0.0)),
        ("temperature", lambda: GumbelSoftmax(lambda step: math.nan)),
        ("decay", lambda: MovingAverage(1.0)),
        ("decay", lambda: MovingAverage(-0.1)),
        ("decay", lambda: MovingAverage(math.nan)),
    ],
)
def test_unusable_settings_are_refused_by_name(name: str, make: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be"):
        make()


class Slips(Estimator):
    """What a person's own estimator gets wrong, and no shape of its value tells."""

    def __init__(self, slip: str) -> None:
        super().__init__()
        self.slip = slip

    def forward(self, f: CostFunction, logits: Tensor, **context: Any) -> Any:
        y, zero = logits.softmax(dim=-1).unsqueeze(0), logits.new_zeros(())
        if self.slip == "tuple":
            return f(y)[0], zero
        if self.slip == "detached":
            return Estimate(f(y)[0].detach(), torch.zeros(len(logits)), zero, {"evaluations": 1.0})
        costs = f(y.transpose(0, 1) if self.slip == "swapped" else y[..., :2])
        return Estimate(costs.mean(dim=1), torch.zeros(len(logits)), zero, {"evaluations": 1.0})


@pytest.mark.parametrize(
    ("slip", "sentence"),
    [
        ("tuple", "an estimator must return an Estimate, got a tuple"),
        ("detached", "an estimate's value must have a gradient, got one without"),
        ("swapped", r"f must be called with y \[S, 2, 1, 4\], got \[2, 1, 1, 4\]"),
        ("classes", r"f must be called with y \[S, 2, 1, 4\], got \[1, 2, 1, 2\]"),
    ],
)
def test_what_the_contract_does_not_allow_is_named(slip: str, sentence: str) -> None:
    logits = torch.zeros(2, 4, requires_grad=True)
    with pytest.raises(ContractError, match=f"^{sentence}$"):
        estimate(Slips(slip), lambda y: y[..., 0], logits)


def test_more_sums_than_a_step_has_time_for_are_refused() -> None:
    UnorderedSet(num_samples=100).prepare(4, 1, 12)
    with pytest.raises(ValueError, match=r"^num_samples must be <= 12, .* got 13$"):
        UnorderedSet(num_samples=13).prepare(4, 2, 4)


@pytest.mark.parametrize("make", TEMPERED)
def test_a_temperature_that_logits_cannot_be_divided_by_is_refused(make: Callable[[Schedule], Estimator]) -> None:
    assert estimate(make(lambda step: 2e-30), lambda y: y[..., 0], torch.tensor([[0.0, -1e6]])).value.isfinite()
    with pytest.raises(ContractError, match=r"^temperature must be >= 1e-30 and finite, got 1e-31 at step 0$"):
        make(lambda step: 1e-31)


@pytest.mark.parametrize("make", TEMPERED)
def test_a_schedule_that_falls_to_zero_is_refused_at_that_step(make: Callable[[Schedule], Estimator]) -> None:
    logits, weight = small_batch()
    estimator = make(lambda step: 1.0 - step)
    with pytest.raises(ContractError, match=r"^temperature must be >= 1e-30 and finite, got 0\.0 at step 1$"):
        estimate(estimator, cost(weight), logits, step=1)
