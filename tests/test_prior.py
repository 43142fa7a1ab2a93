"""A prior p(y) of unequal classes: in J, exact evaluation, every estimator's KL and drawing, and what it is worth."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, distributions

from configs.check import check, typed
from configs.schema import ConfigError
from data.splits import class_prior
from estimators.contract import CostFunction, Estimate, categorical_kl
from estimators.marginalization import Marginalization
from estimators.partial_enumeration import SparsemaxSum, sparsemax
from models.contract import Weights
from models.m2.model import SemiSupervisedVAE
from models.m2.objective import objective
from models.networks import mlp
from scripts.command import composed
from tests.runs import ESTIMATORS, MLP, checkpoint, resume, run
from tests.test_estimators import CASES, Case, assert_same_with_gradient, cost, each, estimate, small_batch
from tests.test_objective import (
    DATA,
    LOG_MASSES,
    NOISE,
    SHAPE,
    X_LABELLED,
    X_UNLABELLED,
    Y_LABELLED,
    K,
    at_nodes,
    broad_model,
    expected_bound,
    generator,
    measure,
    small_model,
)

# torch.distributions is not annotated
# mypy: disable-error-code="no-untyped-call"

PRIOR = [0.7, 0.05, 0.25]


def with_prior(model: SemiSupervisedVAE, prior: list[float]) -> SemiSupervisedVAE:
    """The same weights under another p(y)."""
    networks = mlp(SHAPE, K, latent_size=model.latent_size, hidden=4, dropout=0.0, scale="softplus")
    other = SemiSupervisedVAE(networks, prior=prior)
    other.load_state_dict(model.state_dict())
    return other


def test_l_and_u_in_j_are_those_of_torch_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_prior(small_model(), PRIOR)
    monkeypatch.setattr(model, "noise", lambda number, generator: NOISE[:number])
    estimator = Marginalization()
    estimator.log_prior = model.log_prior
    x = torch.cat([X_LABELLED, X_UNLABELLED])
    terms = objective(model, estimator, Weights(1, 1, 1), x, Y_LABELLED, step=0, generator=generator()).terms

    p_y = distributions.Categorical(probs=torch.tensor(PRIOR))
    classes = Y_LABELLED.argmax(dim=-1)
    labelled = expected_bound(model, X_LABELLED, NOISE[:2])[classes, torch.arange(2)] + p_y.log_prob(classes)
    torch.testing.assert_close(terms["labelled_bound"], labelled.mean())
    q = distributions.Categorical(logits=model.classifier(X_UNLABELLED))
    expectation = (q.probs.T * expected_bound(model, X_UNLABELLED, NOISE[2:])).sum(dim=0)
    kl = distributions.kl_divergence(q, distributions.Categorical(probs=torch.tensor(PRIOR).expand(3, K)))
    torch.testing.assert_close(terms["kl_y"], kl.mean())
    torch.testing.assert_close(terms["unlabelled_bound"], (expectation - kl).mean())
    torch.testing.assert_close(
        terms["J"], terms["labelled_bound"] + terms["unlabelled_bound"] + terms["classification"]
    )


@torch.no_grad()
def test_evaluation_and_log_p_x_are_under_the_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = broad_model()
    model = with_prior(plain, PRIOR)
    x = DATA.x[:] / 255
    z = distributions.Normal(torch.zeros(len(x), 1), torch.ones(len(x), 1))
    rows = [
        (at_nodes(model, x, k, z) + LOG_MASSES.unsqueeze(1)).logsumexp(dim=0) + math.log(PRIOR[k]) for k in range(K)
    ]
    exact = torch.stack(rows).logsumexp(dim=0)
    found = model.measure(x, 2000, generator(), lambda: None)[0]["log_likelihood"]
    torch.testing.assert_close(found, exact, rtol=0, atol=0.1)

    uniform, unequal = measure(plain), measure(model)
    q = model.classifier(x).softmax(dim=-1)
    worth = (q * (torch.tensor(PRIOR).log() + math.log(K))).sum(dim=-1).mean().item()
    assert unequal.bound - uniform.bound == pytest.approx(worth, abs=1e-4)
    assert unequal.kl_y is not None
    assert uniform.kl_y is not None
    assert unequal.kl_y - uniform.kl_y == pytest.approx(-worth, abs=1e-4)
    assert (unequal.reconstruction, unequal.kl_z) == (uniform.reconstruction, uniform.kl_z)


def test_a_list_of_equal_probabilities_is_the_uniform_prior_to_the_bit() -> None:
    model = small_model()
    assert measure(with_prior(model, [1 / 3] * 3)) == measure(model)


LOG_PRIOR = torch.tensor([0.5, 0.02, 0.08, 0.1, 0.1, 0.2]).log()


@each([case for case in CASES if case.name not in ("concrete", "sparsemax")])
def test_every_estimator_s_kl_is_that_from_the_prior(case: Case) -> None:
    """And nothing else of an estimate changes: what is unbiased stays so."""
    logits, weight = small_batch()
    uniform = estimate(case.build(6), cost(weight), logits)
    estimator = case.build(6)
    estimator.log_prior = LOG_PRIOR
    found = estimate(estimator, cost(weight), logits)
    assert torch.equal(found.value, uniform.value)
    assert torch.equal(found.auxiliary, uniform.auxiliary)
    assert all(
        torch.equal(a, b) for a, b in zip(gradients(found.value, logits), gradients(uniform.value, logits), strict=True)
    )
    same = logits.detach().double().requires_grad_()
    p_y = distributions.Categorical(logits=LOG_PRIOR.double().expand(5, 6))
    expected = distributions.kl_divergence(distributions.Categorical(logits=same), p_y)
    assert_same_with_gradient(found.kl, expected, (logits, same))


def gradients(value: Tensor, at: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value.sum(), at, retain_graph=True)


def test_sparsemax_has_the_kl_of_its_own_p() -> None:
    logits, weight = small_batch()
    estimator = SparsemaxSum()
    estimator.log_prior = LOG_PRIOR
    found = estimate(estimator, cost(weight), logits).kl
    p = sparsemax(logits.detach())
    expected = torch.special.xlogy(p, p).sum(dim=-1) - (p * LOG_PRIOR).sum(dim=-1)
    torch.testing.assert_close(found, expected)


class KnowsOfNoPrior(Marginalization):
    """As an estimator from outside that was written before there was a prior."""

    def forward(
        self, f: CostFunction, logits: Tensor, *, step: int, context: Tensor, generator: torch.Generator
    ) -> Estimate:
        estimate = super().forward(f, logits, step=step, context=context, generator=generator)
        return replace(estimate, kl=categorical_kl(logits))


def test_an_estimator_whose_kl_is_from_a_uniform_prior_is_refused_another() -> None:
    own = "estimator._target_=tests.test_prior.KnowsOfNoPrior"
    check(typed(composed("data=digits", "estimator=marginalization", own)))
    with pytest.raises(
        ConfigError, match=r"prior must be uniform .* got labelled with tests.test_prior.KnowsOfNoPrior"
    ):
        check(typed(composed("data=digits", "estimator=marginalization", own, "prior=labelled")))


def test_it_is_refused_a_prior_that_is_learned() -> None:
    small = ["model=categorical_mlp", "model.variables=2", "model.classes=3", "estimator=marginalization"]
    own = ["data=digits", *small, "estimator._target_=tests.test_prior.KnowsOfNoPrior"]
    check(typed(composed(*own, "model.prior=uniform")))
    with pytest.raises(ConfigError, match=r"model\.prior must be uniform .* got one that is learned with tests"):
        check(typed(composed(*own)))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_each_estimator_takes_a_prior(name: str) -> None:
    check(typed(composed("data=digits", *shlex.split(ESTIMATORS[name]), "prior=labelled")))


# ---- which prior, and what is drawn from it ----


def test_the_labels_frequencies() -> None:
    labels = np.array([0] * 15 + [1] * 1)
    assert class_prior("labelled", labels, 2) == [0.9375, 0.0625]
    assert class_prior("uniform", labels, 2) == [0.5, 0.5]
    assert class_prior([0.2, 0.8], labels, 2) == [0.2, 0.8]
    with pytest.raises(
        ValueError, match=r"prior must be .* where a class has no labelled image, got labelled, and class 2"
    ):
        class_prior("labelled", labels, 3)


@pytest.mark.parametrize(
    "prior",
    ["[0.5,0.5]", "[0.2,0,0.8]", "[0.5,0.6,0.7]", "[1,-1,1]", "often", "3", "null", "[a,b,c]", "[.nan,0.5,0.5]"],
)
def test_what_is_no_prior_is_refused_with_what_would_be(prior: str) -> None:
    config = composed("data=digits", "data.random_classes=3", "data.num_labelled=30", f"prior={prior}")
    with pytest.raises(ConfigError, match=r"^prior must be uniform, labelled or a list of 3 positive numbers .*, got "):
        typed(config)


def test_a_rounded_list_is_divided_by_its_sum() -> None:
    config = composed("data=digits", "data.random_classes=3", "data.num_labelled=30", "prior=[0.33,0.33,0.33]")
    assert typed(config).prior == pytest.approx([1 / 3] * 3, abs=1e-15)


def test_classes_are_drawn_from_the_prior() -> None:
    model, number = with_prior(small_model(), PRIOR), 100_000
    counts = model.draw_classes(number, generator()).sum(dim=0)
    p = torch.tensor(PRIOR)
    assert ((counts - number * p).abs() < 4.5 * (number * p * (1 - p)).sqrt()).all()


def test_a_run_keeps_its_prior_and_no_resume_changes_it(tmp_path: Path) -> None:
    prior = [0.28, *[0.08] * 9]
    folder = tmp_path / "run"
    run(f"{MLP} train.steps=4 'prior={prior}'", folder)
    assert checkpoint(folder)["facts"]["prior"] == pytest.approx(prior)
    assert checkpoint(folder)["facts"]["likelihood"] == "bernoulli"
    result = json.loads((folder / "result.json").read_text())
    assert result["prior"] == pytest.approx(prior)
    refused = resume(folder, "train.steps=6 prior=uniform", code=2)
    assert "resume cannot change the experiment: prior=uniform" in refused.said
    resume(folder, "train.steps=6")
    assert checkpoint(folder)["step"] == 6


# ---- what it is worth ----


@torch.no_grad()
def test_with_classes_of_15_to_1_it_is_worth_log_k_minus_their_entropy() -> None:
    """In a bound whose classifier is sure and right: E[log p(y)] + log K = 0.459 nats."""
    labels = torch.tensor([0] * 15 + [1])
    p = torch.tensor([15 / 16, 1 / 16])
    logits = torch.nn.functional.one_hot(labels, 2).unsqueeze(1) * 60.0
    gain = (categorical_kl(logits) - categorical_kl(logits, p.log())).mean()
    assert gain.item() == pytest.approx(math.log(2) - distributions.Categorical(probs=p).entropy().item(), abs=1e-6)
    assert gain.item() == pytest.approx(0.459, abs=1e-3)


def two_classes(path: Path) -> Path:
    """1,500 threes and 100 eights of scikit-learn's digits, in noise that makes some of them doubtful."""
    from sklearn.datasets import load_digits

    digits, random = load_digits(), np.random.default_rng(0)
    rows = [random.choice(np.flatnonzero(digits.target == k), number) for k, number in ((3, 1500), (8, 100))]
    clean = np.rint(digits.images[np.concatenate(rows)] * 255 / 16)
    images = (clean + random.normal(0, 60, clean.shape)).clip(0, 255).astype(np.uint8)
    np.savez(path, images=images, labels=np.repeat([0, 1], [1500, 100]))
    return path


@pytest.mark.slow
def test_training_with_classes_of_15_to_1_is_better_with_their_prior(tmp_path: Path) -> None:
    path = two_classes(tmp_path / "two.npz")
    line = f"data=arrays data.path={path} data.num_labelled=20 data.balanced=true data.num_validation=400 "
    line += "data.stratified=false model=mlp model.hidden=64 "
    line += "train.steps=600 train.validate_every=600 evaluation.importance_samples=1 "

    def results(prior: str) -> list[dict[str, float]]:
        for seed in (0, 1):
            run(f"{line} prior={prior} seed={seed} data.split_seed={seed}", tmp_path / f"{prior}{seed}")
        return [json.loads((tmp_path / f"{prior}{seed}" / "result.json").read_text()) for seed in (0, 1)]

    for uniform, unequal in zip(results("uniform"), results("[0.9375,0.0625]"), strict=True):
        assert 0 < unequal["val_bound"] - uniform["val_bound"] < 0.6
        assert unequal["val_accuracy"] > uniform["val_accuracy"]
