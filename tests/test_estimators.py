"""Holds every estimator to the contract of estimators/contract.py. A new estimator is one row of CASES."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from scipy import integrate, stats
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, kl_divergence
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical

from estimators.contract import CostFunction, Estimate, Estimator
from estimators.gumbel_softmax import KL, GumbelSoftmax, StraightThroughGumbelSoftmax
from estimators.marginalization import Marginalization
from estimators.partial_enumeration import SumAndSample, UnorderedSet
from estimators.relaxed_control import REBAR, RELAX
from estimators.schedules import constant
from estimators.score_function import (
    Baseline,
    LearnedBaseline,
    LeaveOneOut,
    MovingAverage,
    MuProp,
    NoBaseline,
    ScoreFunction,
)
from estimators.straight_through import GappedStraightThrough, GumbelRao, ReinMax, StraightThrough

at_one = partial(constant, value=1.0)


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], Estimator]
    unbiased: bool  # the mean gradient is the exact one
    discrete: bool  # the value is f's at one-hot vectors, which its first call is given
    evaluations: int | None  # calls of f per image; None: one a class, without randomness

    def build(self, num_classes: int) -> Estimator:
        """With parameters of its own away from where they start, where a wrong term could hide behind a zero."""
        estimator = self.make()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            estimator.prepare(CONTEXT_SIZE, num_classes)
        generator = seeded(4)
        with torch.no_grad():
            for parameter in estimator.parameters():
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
        return estimator


CASES = [
    Case("marginalization", Marginalization, True, True, None),
    Case("gumbel_softmax", lambda: GumbelSoftmax(at_one), False, False, 1),
    Case("st_gumbel_softmax", lambda: StraightThroughGumbelSoftmax(at_one, num_samples=3), False, True, 3),
    Case("score_function", lambda: ScoreFunction(NoBaseline()), True, True, 1),
    Case("moving_average", lambda: ScoreFunction(MovingAverage(0.9)), True, True, 1),
    Case("leave_one_out_2", lambda: ScoreFunction(LeaveOneOut(), num_samples=2), True, True, 2),
    Case("leave_one_out_4", lambda: ScoreFunction(LeaveOneOut(), num_samples=4), True, True, 4),
    Case("learned", lambda: ScoreFunction(LearnedBaseline(hidden=3), num_samples=2), True, True, 2),
    Case("muprop", lambda: MuProp(), True, True, 2),
    Case("muprop_3", lambda: MuProp(num_samples=3), True, True, 4),
    Case("rebar", REBAR, True, True, 3),
    Case("rebar_2", lambda: REBAR(num_samples=2), True, True, 6),
    Case("relax", lambda: RELAX(hidden=3), True, True, 3),
    Case("straight_through", lambda: StraightThrough(at_one), False, True, 1),
    Case("reinmax", lambda: ReinMax(at_one, num_samples=2), False, True, 2),
    Case("gumbel_rao", lambda: GumbelRao(at_one, num_conditional=3), False, True, 1),
    Case("gapped_straight_through", lambda: GappedStraightThrough(at_one), False, True, 1),
    Case("sum_and_sample_1", lambda: SumAndSample(num_exact=1), True, True, 2),
    Case("unordered_set_2", lambda: UnorderedSet(num_samples=2), True, True, 2),
]


def each(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


UNBIASED = [case for case in CASES if case.unbiased]
BIASED = [case for case in CASES if not case.unbiased]
RANDOM = [case for case in CASES if case.evaluations is not None]
RELAXED = [GumbelSoftmax, StraightThroughGumbelSoftmax]

CLASSES = [2, 3, 10]
SHAPES = ["flat", "moderate", "nearly_one_hot"]
CONTEXT_SIZE = 2
DRAWS = 2**17  # > 1e5
ROUNDING = 1e-6  # what float32 may add to a mean; standard errors here are about 1e-3


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
    context = torch.linspace(-1, 1, len(logits)).unsqueeze(-1).expand(-1, CONTEXT_SIZE)
    result = estimator(f, logits, step=step, context=context, generator=seeded(seed))
    assert isinstance(result, Estimate)
    return result


@dataclass
class Moments:
    """E_q[f] and its gradients; from an estimator each has a leading axis of independent draws."""

    value: Tensor
    logits: Tensor
    weight: Tensor


def exact(logits: Tensor, weight: Tensor) -> Moments:
    """By enumeration in float64, from logits [K] and W [K, 2]."""
    logits, weight = logits.double().requires_grad_(), weight.double().requires_grad_()
    classes = torch.eye(len(logits), dtype=torch.float64).unsqueeze(1)
    value = logits.softmax(dim=0) @ cost(weight.unsqueeze(0))(classes).squeeze(1)
    return Moments(value.detach(), *torch.autograd.grad(value, (logits, weight)))


def draws_of(estimator: Estimator, logits: Tensor, weight: Tensor, *, draws: int = DRAWS, seed: int = 0) -> Moments:
    """A batch of equal images, each with its own copy of logits and W: an image's gradient is one draw."""
    logits = logits.repeat(draws, 1).requires_grad_()
    weight = weight.repeat(draws, 1, 1).requires_grad_()
    value = estimate(estimator, cost(weight), logits, seed=seed).value
    return Moments(value.detach(), *torch.autograd.grad(value.sum(), (logits, weight)))


def worst_z(draws: Tensor, expected: Tensor) -> float:
    """The largest |mean - expected| in standard errors, over the coordinates of draws [N, ...]."""
    draws = draws.double()
    error = draws.std(dim=0) / math.sqrt(len(draws)) + ROUNDING
    return float(((draws.mean(dim=0) - expected).abs() / error).max())


def gradient_z(estimator: Estimator, shape: str, num_classes: int) -> dict[str, float]:
    """The test of unbiasedness: worst |z| of the mean gradient, against enumeration."""
    logits, weight = make_logits(shape, num_classes), make_weight(num_classes)
    for seed in (1, 2, 3):  # earlier steps, so that a running baseline is not at its start
        draws_of(estimator, logits, weight, draws=8, seed=seed)
    found, truth = draws_of(estimator, logits, weight), exact(logits, weight)
    return {"logits": worst_z(found.logits, truth.logits), "weight": worst_z(found.weight, truth.weight)}


@dataclass
class Spy:
    """f, keeping each y that it was given."""

    f: CostFunction
    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, y: Tensor) -> Tensor:
        self.seen.append(y.detach().clone())
        return self.f(y)


def small_batch() -> tuple[Tensor, Tensor]:
    """Logits [5, 4] and W [5, 4, 2] of five different images, both requiring a gradient."""
    logits = 1.5 * torch.randn(5, 4, generator=seeded(2))
    return logits.requires_grad_(), torch.randn(5, 4, 2, generator=seeded(3)).requires_grad_()


# Gradients: the mean is the exact one


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_classes", CLASSES)
@each(UNBIASED)
def test_mean_gradient_is_exact(case: Case, num_classes: int, shape: str) -> None:
    assert max(gradient_z(case.build(num_classes), shape, num_classes).values()) < 4


@each(UNBIASED)
def test_mean_gradient_is_exact_in_evaluation_mode(case: Case) -> None:
    assert max(gradient_z(case.build(3).eval(), "moderate", 3).values()) < 4


@pytest.mark.parametrize("num_classes", CLASSES)
@each(BIASED)
def test_biased_estimators_fail_the_test_of_unbiasedness(case: Case, num_classes: int) -> None:
    assert gradient_z(case.build(num_classes), "moderate", num_classes)["logits"] > 4


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


@pytest.mark.parametrize("num_classes", CLASSES)
@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        (ScoreFunction(OwnCostInBaseline(), num_samples=4), "logits"),
        (HalfThePathIntoF(NoBaseline()), "weight"),
    ],
    ids=["own_cost_in_baseline", "half_the_path_into_f"],
)
def test_wrong_estimators_fail_where_they_are_wrong(wrong: Estimator, where: str, num_classes: int) -> None:
    z = gradient_z(wrong, "moderate", num_classes)
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
@each([case for case in CASES if case.discrete])
def test_mean_value_of_discrete_draws_is_exact(case: Case, num_classes: int, shape: str) -> None:
    logits, weight = make_logits(shape, num_classes), make_weight(num_classes)
    assert worst_z(draws_of(case.build(num_classes), logits, weight).value, exact(logits, weight).value) < 4


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
    result = estimate(case.build(4), cost(weight), logits)
    assert (result.value.shape, result.kl.shape, result.auxiliary.shape) == ((5,), (5,), ())


@each(CASES)
def test_f_sees_valid_class_vectors(case: Case) -> None:
    logits, weight = small_batch()
    spy = Spy(cost(weight))
    estimate(case.build(4), spy, logits)
    assert spy.seen
    for y in spy.seen:
        assert y.shape[1:] == logits.shape
        assert (y >= 0).all()
        torch.testing.assert_close(y.sum(dim=-1), torch.ones(y.shape[:-1]))
    assert bool(((spy.seen[0] == 0) | (spy.seen[0] == 1)).all()) == case.discrete


@each(CASES)
def test_evaluations_are_the_calls_of_f_per_image(case: Case) -> None:
    logits, weight = small_batch()
    spy = Spy(cost(weight))
    metrics = estimate(case.build(4), spy, logits).metrics
    expected = case.evaluations or logits.shape[-1]
    assert metrics["evaluations"] == sum(len(y) for y in spy.seen) == expected


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


@each(CASES)
def test_value_and_auxiliary_keep_to_their_own_parameters(case: Case) -> None:
    assert leaks(case.build(4)) == []


def test_leaks_are_found() -> None:
    assert leaks(Leaky()) == ["value -> own", "kl -> own", "auxiliary -> logits", "auxiliary -> f"]


@each(CASES)
def test_value_and_kl_reach_the_model(case: Case) -> None:
    logits, weight = small_batch()
    result = estimate(case.build(4), cost(weight), logits)
    assert reaches(result.value.sum(), [logits])
    assert reaches(result.value.sum(), [weight])
    assert reaches(result.kl.sum(), [logits])


# The KL of q(y|x) and its three losses


def analytic_kl(logits: Tensor) -> Tensor:
    return kl_divergence(Categorical(logits=logits), Categorical(logits=torch.zeros_like(logits)))


def assert_same_with_gradient(found: Tensor, expected: Tensor, at: tuple[Tensor, Tensor]) -> None:
    """Compares two losses [B], and their gradients at their own leaves, of which the second is in float64."""
    torch.testing.assert_close(found, expected.to(found.dtype))
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), at[0])[0], torch.autograd.grad(expected.sum(), at[1])[0].float()
    )


@each(CASES)
def test_analytic_kl_is_the_default(case: Case) -> None:
    logits, weight = small_batch()
    same = logits.detach().double().requires_grad_()
    result = estimate(case.build(4), cost(weight), logits)
    assert_same_with_gradient(result.kl, analytic_kl(same), (logits, same))


@pytest.mark.parametrize("shape", SHAPES)
def test_mean_sampled_kl_of_one_hot_draws_is_the_analytic_one(shape: str) -> None:
    logits = make_logits(shape, 3).repeat(DRAWS, 1)
    estimator = StraightThroughGumbelSoftmax(at_one, kl="sampled")
    kl = estimate(estimator, lambda y: y.sum(dim=-1), logits).kl
    assert worst_z(kl, analytic_kl(logits[0].double())) < 4


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.0])
@pytest.mark.parametrize("kl", ["sampled", "relaxed"])
def test_kl_of_a_relaxed_draw_agrees_with_torch_distributions(kl: KL, temperature: float) -> None:
    """The draw is seen through f, its noise solved for, and the loss built anew from that noise."""
    logits, weight = small_batch()
    spy = Spy(cost(weight))
    estimator = GumbelSoftmax(partial(constant, value=temperature), 3, kl=kl, prior_temperature=0.7)
    found = estimate(estimator, spy, logits).kl

    same = logits.detach().double().requires_grad_()
    noise = temperature * spy.seen[0].double().log() - same.detach()  # up to a constant, which cancels
    log_y = ((same + noise) / temperature).log_softmax(dim=-1)
    if kl == "sampled":
        expected = (log_y.exp() * (same.log_softmax(dim=-1) + math.log(4))).sum(dim=-1)
    else:
        posterior: Distribution = ExpRelaxedCategorical(torch.tensor(temperature), logits=same)
        prior: Distribution = ExpRelaxedCategorical(torch.tensor(0.7), logits=torch.zeros_like(same))
        expected = posterior.log_prob(log_y) - prior.log_prob(log_y)
    assert_same_with_gradient(found, expected.mean(dim=0), (logits, same))


def test_straight_through_shares_the_relaxed_kl_of_its_relaxed_draw() -> None:
    logits, weight = small_batch()
    plain, through = (estimate(make(at_one, kl="relaxed"), cost(weight), logits).kl for make in RELAXED)
    assert torch.equal(plain, through)


def test_relaxed_kl_is_zero_where_posterior_and_prior_are_one() -> None:
    estimator = GumbelSoftmax(at_one, kl="relaxed", prior_temperature=1.0)
    kl = estimate(estimator, lambda y: y.sum(dim=-1), torch.full((5, 4), 3.0)).kl
    torch.testing.assert_close(kl, torch.zeros(5))


# Closed forms on constant and linear f


@pytest.mark.parametrize("num_samples", [2, 4])
def test_leave_one_out_has_no_variance_on_a_constant(num_samples: int) -> None:
    logits, _ = small_batch()
    theta = torch.tensor(2.0, requires_grad=True)
    value = estimate(ScoreFunction(LeaveOneOut(), num_samples), lambda y: theta.expand(y.shape[:2]), logits).value
    gradient_logits, gradient_theta = torch.autograd.grad(value.sum(), (logits, theta))
    assert torch.equal(value, torch.full((5,), 2.0))
    assert torch.equal(gradient_logits, torch.zeros(5, 4))
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


def test_moving_average_travels_in_the_state_dict() -> None:
    logits, weight = small_batch()
    trained, resumed, fresh = (ScoreFunction(MovingAverage()) for _ in range(3))
    estimate(trained, cost(weight), logits)
    resumed.load_state_dict(trained.state_dict())

    def gradient(estimator: Estimator) -> Tensor:
        value = estimate(estimator, cost(weight), logits, seed=1).value
        return torch.autograd.grad(value.sum(), logits)[0]

    expected = gradient(trained)
    assert torch.equal(gradient(resumed), expected)
    assert not torch.equal(gradient(fresh), expected)


# Randomness and the temperature


def bits(case: Case, seed: int) -> list[Tensor]:
    """All that an estimator gives for a minibatch: y, value, kl, and the gradients."""
    logits, weight = small_batch()
    spy = Spy(cost(weight))
    result = estimate(case.build(4), spy, logits, seed=seed)
    gradients = torch.autograd.grad((result.value + result.kl).sum(), (logits, weight))
    return [*spy.seen, result.value, result.kl, *gradients]


@each(CASES)
def test_generator_is_the_only_source_of_randomness(case: Case) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = bits(case, seed=7)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        assert all(torch.equal(a, b) for a, b in zip(first, bits(case, seed=7), strict=True))


@each(RANDOM)
def test_another_seed_gives_other_draws(case: Case) -> None:
    assert not torch.equal(bits(case, seed=7)[0], bits(case, seed=8)[0])


@pytest.mark.parametrize("relaxed", RELAXED)
def test_temperature_is_the_schedule_at_this_step(relaxed: type[GumbelSoftmax]) -> None:
    logits, weight = small_batch()
    annealed = relaxed(lambda step: 1 / (1 + step), kl="relaxed")
    fixed = relaxed(partial(constant, value=0.25), kl="relaxed")
    found, expected = (estimate(estimator, cost(weight), logits, step=3) for estimator in (annealed, fixed))
    assert found.metrics["temperature"] == 0.25
    assert torch.equal(found.kl, expected.kl)
    assert not torch.equal(found.kl, estimate(annealed, cost(weight), logits, step=0).kl)


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
@each(CASES + relaxed_cases())
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
        gradients = torch.autograd.grad(loss, (logits, weight))
        for tensor in (*spy.seen, result.value, result.kl, result.auxiliary, *gradients):
            assert tensor.isfinite().all()
        assert all(math.isfinite(metric) for metric in result.metrics.values())


@each([case for case in CASES if case.discrete and case.evaluations])
def test_a_class_of_probability_zero_is_never_drawn(case: Case) -> None:
    spy = Spy(lambda y: y.sum(dim=-1))
    estimate(case.build(3), spy, torch.tensor([0.0, -INFINITY, 1.0]).repeat(1000, 1))
    assert spy.seen[0].sum(dim=(0, 1))[1] == 0


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("num_samples", lambda: GumbelSoftmax(at_one, num_samples=0)),
        ("num_samples", lambda: StraightThroughGumbelSoftmax(at_one, num_samples=0)),
        ("num_samples", lambda: ScoreFunction(NoBaseline(), num_samples=0)),
        ("num_samples", lambda: ScoreFunction(MovingAverage(), num_samples=0)),
        ("num_samples", lambda: ScoreFunction(LeaveOneOut(), num_samples=1)),
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


def test_a_schedule_that_falls_to_zero_is_refused_at_that_step() -> None:
    logits, weight = small_batch()
    estimator = GumbelSoftmax(lambda step: 1.0 - step)
    with pytest.raises(ValueError, match=r"^temperature must be > 0 and finite, got 0\.0 at step 1$"):
        estimate(estimator, cost(weight), logits, step=1)
