"""Samplers and densities of the relaxations, held to closed forms and to torch.distributions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import integrate, stats
from torch import Tensor
from torch.distributions import Distribution, RelaxedOneHotCategorical
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical

from estimators import relaxations as R

DRAWS = 200_000
LOGITS = torch.tensor([1.0, -0.5, 0.3, -2.0]) + 7.0  # not normalised
PROBABILITIES = LOGITS.softmax(dim=-1)
TEMPERATURES = [0.1, 0.5, 1.0, 2.0, 100.0]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(draws: int = DRAWS, num_classes: int = 4, seed: int = 0) -> Tensor:
    return R.gumbel((draws, num_classes), generator=seeded(seed))


def chi_square_p(classes: Tensor, probabilities: Tensor) -> float:
    """The p-value of class indices [N] under `probabilities` [K]."""
    counts = classes.bincount(minlength=len(probabilities)).numpy()
    expected = probabilities.double() / probabilities.double().sum() * len(classes)
    return float(stats.chisquare(counts, expected.numpy()).pvalue)


def assert_mean(draws: Tensor, expected: Tensor | float) -> None:
    """|z| < 4 for the mean of draws [N, ...], per coordinate."""
    draws = draws.double()
    error = draws.std(dim=0) / math.sqrt(len(draws))
    assert bool(((draws.mean(dim=0) - expected).abs() < 4 * error).all())


# Gumbel noise


def test_gumbel_noise_has_the_mean_variance_and_distribution_of_a_gumbel() -> None:
    draws = noise().flatten()
    euler = 0.5772156649015329
    assert_mean(draws, euler)
    assert_mean((draws - euler).square(), math.pi**2 / 6)
    assert stats.kstest(draws[:10_000].numpy(), stats.gumbel_r.cdf).pvalue > 1e-3


@pytest.mark.parametrize("drawn", [0.0, 1e-45, 100.0])
def test_gumbel_noise_is_finite_at_the_ends_of_its_uniforms(drawn: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exponential draw of exactly 0 is one in billions on a CPU, and no less fatal for that."""
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda tensor, *, generator: tensor.fill_(drawn))
    assert R.gumbel((3,), generator=seeded()).isfinite().all()


def test_gumbel_noise_comes_from_its_generator_alone() -> None:
    before = torch.get_rng_state()
    assert torch.equal(noise(10, seed=3), noise(10, seed=3))
    assert not torch.equal(noise(10, seed=3), noise(10, seed=4))
    assert torch.equal(torch.get_rng_state(), before)


def test_gumbel_noise_is_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert noise(10).dtype == torch.float32


# Log-probabilities


def test_log_probabilities_are_normalised_float32_and_finite() -> None:
    hard = torch.tensor([[1e4, -1e4, 0.0], [0.0, -math.inf, 0.0]], dtype=torch.bfloat16)
    log_p = R.log_probabilities(hard)
    assert log_p.dtype == torch.float32
    assert log_p.isfinite().all()
    torch.testing.assert_close(log_p.exp(), torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.0, 0.5]]))


# Draws


def test_one_hot_sets_the_class_it_is_given() -> None:
    index = torch.tensor([[2, 0], [1, 1]])
    assert torch.equal(R.one_hot(index, 3), torch.eye(3)[index])


def test_gumbel_max_draws_the_categorical() -> None:
    y = R.gumbel_max(LOGITS, noise())
    assert torch.equal(y.sum(dim=-1), torch.ones(DRAWS))
    assert chi_square_p(y.argmax(dim=-1), PROBABILITIES) > 1e-3


def test_the_chi_square_test_has_teeth() -> None:
    y = R.gumbel_max(LOGITS, noise())
    assert chi_square_p(y.argmax(dim=-1), (LOGITS + torch.tensor([0.05, 0, 0, 0])).softmax(dim=-1)) < 1e-6
    assert chi_square_p((LOGITS / 0.9 + noise()).argmax(dim=-1), PROBABILITIES) < 1e-6


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_rounding_a_relaxed_draw_gives_the_class_probabilities(temperature: float) -> None:
    y = R.gumbel_softmax(LOGITS, noise(), temperature)
    assert chi_square_p(y.argmax(dim=-1), PROBABILITIES) > 1e-3


@pytest.mark.parametrize("temperature", [1e-3, *TEMPERATURES, 1e3])
def test_relaxed_draws_lie_on_the_simplex(temperature: float) -> None:
    y = R.gumbel_softmax(LOGITS, noise(1000), temperature)
    assert (y >= 0).all()
    torch.testing.assert_close(y.sum(dim=-1), torch.ones(1000))


def test_relaxed_draws_are_one_hot_in_the_limit_of_temperature_zero() -> None:
    y = R.gumbel_softmax(LOGITS, noise(), 1e-6)
    assert (y.max(dim=-1).values > 0.999).double().mean() > 0.9999
    assert_mean(y, PROBABILITIES)


def test_relaxed_draws_are_uniform_in_the_limit_of_infinite_temperature() -> None:
    y = R.gumbel_softmax(LOGITS, noise(), 1e5)
    torch.testing.assert_close(y, torch.full_like(y, 0.25), rtol=0, atol=1e-4)


def test_relaxed_draws_follow_the_closed_form_for_two_classes() -> None:
    """For K = 2, tau * logit(y_1) - (l_1 - l_2) is logistic."""
    logits, temperature = torch.tensor([0.7, -0.4]), 0.6
    log_y = R.concrete_log_sample(logits, noise(10_000, 2), temperature)
    standard = temperature * (log_y[:, 0] - log_y[:, 1]) - (logits[0] - logits[1])
    assert stats.kstest(standard.numpy(), stats.logistic.cdf).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_log_sample_is_the_log_of_the_sample(temperature: float) -> None:
    log_y = R.concrete_log_sample(LOGITS, noise(1000), temperature)
    expected = ((LOGITS + noise(1000)).double() / temperature).softmax(dim=-1)
    torch.testing.assert_close(log_y.exp(), expected.float())
    torch.testing.assert_close(R.gumbel_softmax(LOGITS, noise(1000), temperature), expected.float())


def test_a_class_of_probability_zero_gets_no_mass() -> None:
    y = R.gumbel_softmax(torch.tensor([0.0, -math.inf, 1.0]), noise(1000, 3), 1.0)
    assert torch.equal(y[:, 1], torch.zeros(1000))


# Straight-through


def test_straight_through_is_one_hot_forward_and_soft_backward() -> None:
    logits = torch.randn(6, 4, generator=seeded(1)).requires_grad_()
    soft = logits.softmax(dim=-1)
    hard = R.straight_through(soft)
    assert torch.equal(hard, torch.eye(4)[soft.argmax(dim=-1)])

    direction = torch.randn(6, 4, generator=seeded(2))
    (expected,) = torch.autograd.grad(soft, logits, direction, retain_graph=True)
    (found,) = torch.autograd.grad(hard, logits, direction)
    assert torch.equal(found, expected)


# Densities


def log_draws(temperature: float, num_classes: int) -> tuple[Tensor, Tensor]:
    """Logits [K] and relaxed draws log y [50, K], in float64."""
    logits = torch.randn(num_classes, generator=seeded(5))
    return logits, R.concrete_log_sample(logits, noise(50, num_classes).double(), temperature)


@pytest.mark.parametrize("num_classes", [2, 3, 10])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 2.0])
def test_exp_concrete_density_agrees_with_torch_distributions(temperature: float, num_classes: int) -> None:
    logits, log_y = log_draws(temperature, num_classes)
    theirs: Distribution = ExpRelaxedCategorical(torch.tensor(temperature).double(), logits=logits.double())
    found = R.exp_concrete_log_density(log_y, logits, temperature)
    torch.testing.assert_close(found, theirs.log_prob(log_y), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_classes", [2, 3, 10])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_concrete_density_agrees_with_torch_distributions(temperature: float, num_classes: int) -> None:
    logits, log_y = log_draws(temperature, num_classes)
    theirs: Distribution = RelaxedOneHotCategorical(torch.tensor(temperature).double(), logits=logits.double())
    found = R.concrete_log_density(log_y, logits, temperature)
    torch.testing.assert_close(found, theirs.log_prob(log_y.exp()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_concrete_density_integrates_to_one_over_two_classes(temperature: float) -> None:
    logits = torch.tensor([0.7, -0.4])

    def density(y: float) -> float:
        log_y = torch.tensor([y, 1 - y], dtype=torch.float64).log()
        return float(R.concrete_log_density(log_y, logits, temperature).exp())

    assert integrate.quad(density, 0, 1)[0] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_concrete_density_integrates_to_one_over_three_classes(temperature: float) -> None:
    logits = torch.tensor([0.7, -0.4, 0.1])

    def density(y_2: float, y_1: float) -> float:
        log_y = torch.tensor([y_1, y_2, 1 - y_1 - y_2], dtype=torch.float64).log()
        return float(R.concrete_log_density(log_y, logits, temperature).exp())

    total = integrate.dblquad(density, 0, 1, 0, lambda y_1: 1 - y_1, epsabs=1e-5, epsrel=1e-5)[0]
    assert total == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_exp_concrete_density_integrates_to_one_over_log_ratios(temperature: float, num_classes: int) -> None:
    """Its K - 1 coordinates are log y_k - log y_K; a trapezoid over all of them, the tails below 1e-8."""
    logits = torch.tensor([0.7, -0.4, 0.1])[:num_classes]
    axis = torch.linspace(-25, 25, 501, dtype=torch.float64) / temperature
    ratios = torch.cartesian_prod(*[axis] * (num_classes - 1)).reshape(-1, num_classes - 1)
    log_y = torch.cat([ratios, torch.zeros(len(ratios), 1)], dim=-1).log_softmax(dim=-1)
    cell = float(axis[1] - axis[0]) ** (num_classes - 1)
    total = R.exp_concrete_log_density(log_y, logits, temperature).exp().sum() * cell
    assert total == pytest.approx(1, abs=1e-6)


def test_relaxed_draws_follow_the_concrete_density() -> None:
    """Frequencies of three-class draws in 16 cells of the simplex, against the integral of the density."""
    logits, temperature, bins = torch.tensor([0.7, -0.4, 0.1]), 0.8, [-25.0, -1.5, 0.0, 1.5, 25.0]
    log_y = R.concrete_log_sample(logits, noise(num_classes=3), temperature)
    ratios = log_y[:, :2] - log_y[:, 2:]

    def density(b: float, a: float) -> float:
        log_y = torch.tensor([a, b, 0.0], dtype=torch.float64).log_softmax(dim=-1)
        return float(R.exp_concrete_log_density(log_y, logits, temperature).exp())

    cells = list(itertools.product(itertools.pairwise(bins), repeat=2))
    inside = [
        ((ratios[:, 0] > a) & (ratios[:, 0] <= b) & (ratios[:, 1] > c) & (ratios[:, 1] <= d))
        for (a, b), (c, d) in cells
    ]
    counts = torch.stack(inside).sum(dim=-1)
    expected = torch.tensor([integrate.dblquad(density, a, b, c, d, epsabs=1e-4)[0] for (a, b), (c, d) in cells])
    assert int(counts.sum()) == DRAWS
    assert stats.chisquare(counts.numpy(), (expected / expected.sum() * DRAWS).numpy()).pvalue > 1e-3
