"""Every estimator with N = 2 and 3 variables, against enumeration of their K^N joint classes."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from estimators.contract import CostFunction, Estimator
from estimators.gumbel_softmax import KL, GumbelSoftmax
from estimators.joint import MOST, all_classes, classes_of, outer
from estimators.local_expectations import IndeCateR
from estimators.marginalization import Marginalization
from estimators.partial_enumeration import SparsemaxSum, SumAndSample, UnorderedSet
from estimators.relaxations import exp_concrete_log_density
from estimators.score_function import LeaveOneOut, ScoreFunction
from tests.test_estimators import (
    BIASED,
    CASES,
    CONTEXT_SIZE,
    DRAWS,
    UNBIASED,
    Case,
    Moments,
    Spy,
    at_one,
    each,
    seeded,
    worst_gradient,
    worst_z,
)

SIZES = [(2, 3), (3, 2)]  # N, K
sizes = pytest.mark.parametrize(("num_variables", "num_classes"), SIZES, ids=["N2K3", "N3K2"])
ENUMERATING = [Marginalization, SumAndSample, UnorderedSet, SparsemaxSum]


def cost(weight: Tensor) -> CostFunction:
    """f(y) = 1 + 3 h_1 - 2 h_1 h_2, h = tanh(sum_n y_n W_n): no sum over variables. W [B, N, K, 2]."""

    def f(y: Tensor) -> Tensor:
        hidden = torch.einsum("sbnk,bnkh->sbh", y, weight).tanh()
        return 1 + 3 * hidden[..., 0] - 2 * hidden[..., 0] * hidden[..., 1]

    return f


def problem(num_variables: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Logits [N, K] and W [N, K, 2], different for each variable."""
    logits = torch.randn(num_variables, num_classes, generator=seeded(9))
    return logits, torch.randn(num_variables, num_classes, 2, generator=seeded(1))


def enumerated(logits: Tensor, weight: Tensor) -> Moments:
    """E_q[f] and its gradients in float64, by a loop over the joint classes."""
    logits, weight = logits.double().requires_grad_(), weight.double().requires_grad_()
    q, f = logits.softmax(dim=-1), cost(weight.unsqueeze(0))
    value = torch.zeros((), dtype=torch.float64)
    for joint in product(range(logits.shape[1]), repeat=len(logits)):
        y = torch.nn.functional.one_hot(torch.tensor(joint), logits.shape[1]).double()
        value = value + torch.stack([q[n, k] for n, k in enumerate(joint)]).prod() * f(y.view(1, 1, *y.shape)).squeeze()
    return Moments(value.detach(), *torch.autograd.grad(value, (logits, weight)))


def drawn(estimator: Estimator, logits: Tensor, weight: Tensor, *, draws: int = DRAWS, seed: int = 4) -> Moments:
    """A batch of equal images, each with its own copy of logits and W: an image's gradient is one draw."""
    logits = logits.repeat(draws, 1, 1).requires_grad_()
    weight = weight.repeat(draws, 1, 1, 1).requires_grad_()
    context = torch.linspace(-1, 1, draws).unsqueeze(-1).expand(-1, CONTEXT_SIZE)
    value = estimator(cost(weight), logits, step=0, context=context, generator=seeded(seed)).value
    return Moments(value.detach(), *torch.autograd.grad(value.sum(), (logits, weight)))


def z_scores(case: Case, num_variables: int, num_classes: int) -> dict[str, float]:
    logits, weight = problem(num_variables, num_classes)
    estimator = case.build(num_classes, num_variables=num_variables)
    for seed in (1, 2, 3):  # earlier steps, so that a running baseline is not at its start
        drawn(estimator, logits, weight, draws=8, seed=seed)
    found, truth = drawn(estimator, logits, weight), enumerated(logits, weight)
    return {name: worst_z(getattr(found, name), getattr(truth, name)) for name in ("value", "logits", "weight")}


@sizes
@each(UNBIASED)
def test_mean_value_and_gradient_are_exact(case: Case, num_variables: int, num_classes: int) -> None:
    z = z_scores(case, num_variables, num_classes)
    assert worst_gradient(z) < 4
    assert z["value"] < 4


@sizes
@each(BIASED)
def test_biased_estimators_fail_the_test_of_unbiasedness(case: Case, num_variables: int, num_classes: int) -> None:
    assert z_scores(case, num_variables, num_classes)["logits"] > 4


@sizes
def test_every_marginalized_gradient_is_exact(num_variables: int, num_classes: int) -> None:
    logits, weight = problem(num_variables, num_classes)
    found, truth = drawn(Marginalization(), logits, weight, draws=1), enumerated(logits, weight)
    torch.testing.assert_close(found.value[0], truth.value.float())
    torch.testing.assert_close(found.logits[0], truth.logits.float())
    torch.testing.assert_close(found.weight[0], truth.weight.float())


@sizes
@each(CASES)
def test_shapes_classes_and_kl(case: Case, num_variables: int, num_classes: int) -> None:
    logits = torch.randn(5, num_variables, num_classes, generator=seeded(2))
    spy = Spy(cost(torch.randn(5, num_variables, num_classes, 2, generator=seeded(3))))
    estimator = case.build(num_classes, num_variables=num_variables)
    context = torch.zeros(5, CONTEXT_SIZE)
    result = estimator(spy, logits.requires_grad_(), step=0, context=context, generator=seeded(0))
    assert (result.value.shape, result.kl.shape, result.auxiliary.shape) == ((5,), (5,), ())
    for y in spy.seen:
        assert y.shape[1:] == logits.shape
        torch.testing.assert_close(y.sum(dim=-1), torch.ones(y.shape[:-1]))
    if case.softmax and case.name != "concrete":
        q = Categorical(logits=logits)
        uniform = Categorical(logits=torch.zeros(5, num_variables, num_classes))
        torch.testing.assert_close(result.kl, kl_divergence(q, uniform).sum(dim=-1))


@sizes
def test_indecater_varies_less_than_the_score_function(num_variables: int, num_classes: int) -> None:
    logits, weight = problem(num_variables, num_classes)
    local = drawn(IndeCateR(), logits, weight).logits.var(dim=0).sum()
    several = ScoreFunction(LeaveOneOut(), num_samples=num_variables * num_classes)  # at as many calls of f
    assert local < drawn(several, logits, weight).logits.var(dim=0).sum()


@pytest.mark.parametrize("kl", ["sampled", "relaxed"])
def test_relaxed_kls_are_sums_over_variables(kl: KL) -> None:
    logits = torch.randn(5, 2, 3, generator=seeded(2))
    spy = Spy(lambda y: y.sum(dim=(-2, -1)))
    context = torch.zeros(5, CONTEXT_SIZE)
    found = GumbelSoftmax(at_one, kl=kl, prior_temperature=0.4)(
        spy, logits, step=0, context=context, generator=seeded(0)
    ).kl
    (y,) = spy.seen
    if kl == "sampled":
        expected = (y * (logits.log_softmax(dim=-1) + torch.tensor(3.0).log())).sum(dim=(0, 2, 3))
    else:
        posterior, prior = (
            exp_concrete_log_density(y.log(), at, tau) for at, tau in ((logits, 1.0), (torch.zeros(5, 2, 3), 0.4))
        )
        expected = (posterior - prior).sum(dim=(0, 2))
    torch.testing.assert_close(found, expected)


def test_joint_classes_are_all_there_and_in_the_order_of_their_probabilities() -> None:
    logits = torch.randn(4, 3, 2, generator=seeded(0))
    y, q = all_classes(logits), outer(logits.softmax(dim=-1), torch.mul)
    assert y.shape == (8, 4, 3, 2)
    assert len(y[:, 0].flatten(1).unique(dim=0)) == 8
    each_q = (y * logits.softmax(dim=-1)).sum(dim=-1).prod(dim=-1).T
    torch.testing.assert_close(q, each_q)
    torch.testing.assert_close(q.sum(dim=-1), torch.ones(4))
    assert torch.equal(classes_of(torch.tensor([5]), 3, 2)[0].argmax(dim=-1), torch.tensor([1, 0, 1]))


@pytest.mark.parametrize("make", ENUMERATING)
def test_too_many_joint_classes_are_refused(make: type[Estimator]) -> None:
    estimator = make()
    estimator.prepare(1, 12, 2)
    assert MOST == 2**12
    with pytest.raises(ValueError, match=r"10\^20 are more than 4096; all work but marginalization"):
        estimator.prepare(1, 20, 10)
    estimator.prepare(1, 1, 5000)  # of one variable it is what was asked for
