"""J, its terms and evaluation on a model that is small enough to enumerate y and to integrate over z."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributions
from torch.distributions import kl_divergence

from data.batches import EvaluationData
from data.randomness import keyed_generator
from estimators.contract import ContractError, CostFunction, Estimate, Estimator, categorical_kl, entropy
from estimators.gumbel_softmax import GumbelSoftmax
from estimators.marginalization import Marginalization
from estimators.partial_enumeration import SparsemaxSum, SumAndSample, UnorderedSet
from estimators.schedules import constant
from estimators.score_function import LeaveOneOut, ScoreFunction
from estimators.straight_through import ReinMax
from models.contract import ClassifyBy, Evaluation, Objective, PerImage, Weights
from models.evaluation import EVALUATION_SEED, calibration_error, evaluate
from models.likelihoods import bernoulli_log_likelihood
from models.m2.model import Bound, SemiSupervisedVAE, gaussian_kl
from models.m2.objective import objective
from models.networks import MINIMUM_SCALE, GaussianHead, ImageShape, ScaleFunction, conv, mlp
from models.parts import RandomMotion

# torch.distributions is not annotated
Bernoulli: Any = distributions.Bernoulli
Categorical: Any = distributions.Categorical
Normal: Any = distributions.Normal

K = 3
SHAPE = ImageShape(1, 2, 2)
WEIGHT = 0.5
WEIGHTS = Weights(labelled=0.7, unlabelled=1.3, alpha=5.0)
NOISE = torch.tensor([[0.3], [-1.2], [0.8], [0.1], [-0.4]])  # for two labelled and three unlabelled images
X = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1], [1, 0, 1, 0]]).float().view(5, 1, 2, 2)
X_LABELLED, X_UNLABELLED = X[:2], X[2:]
Y_LABELLED = torch.eye(K)[[2, 0]]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_model(latent_size: int = 1, dropout: float = 0.0, seed: int = 0) -> SemiSupervisedVAE:
    """A model with weights so large that classes, images and z matter to the bound."""
    model = SemiSupervisedVAE(mlp(SHAPE, K, latent_size=latent_size, hidden=4, dropout=dropout, scale="softplus"))
    random = generator(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=WEIGHT, generator=random)
    return model


def one_hot_rows(k: int, batch: int) -> Tensor:
    return torch.eye(K)[k].expand(1, batch, K)


def features(model: SemiSupervisedVAE, x: Tensor) -> Tensor:
    return model.inference.features(x)


def posterior(model: SemiSupervisedVAE, x: Tensor, k: int) -> Any:
    """q(z|x,y=k)."""
    loc, scale = model.inference(features(model, x), one_hot_rows(k, len(x)))
    return Normal(loc[0], scale[0])


def log_likelihood(model: SemiSupervisedVAE, x: Tensor, k: int, z: Tensor) -> Tensor:
    """log p(x|y=k,z) [B] by torch.distributions, for z [B, Z]."""
    logits = model.generator(one_hot_rows(k, len(x)), z.unsqueeze(0))[0]
    pixels: Tensor = Bernoulli(logits=logits).log_prob(x.flatten(1))
    return pixels.sum(dim=-1)


def expected_parts(model: SemiSupervisedVAE, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """log p(x|y,z) and KL(q(z|x,y) || p(z)), each [K, B], by torch.distributions, class by class."""
    reconstruction, kl_z = [], []
    for k in range(K):
        q = posterior(model, x, k)
        reconstruction.append(log_likelihood(model, x, k, q.mean + q.stddev * noise))
        kl_z.append(kl_divergence(q, Normal(0.0, 1.0)).sum(dim=-1))
    return torch.stack(reconstruction), torch.stack(kl_z)


def expected_bound(model: SemiSupervisedVAE, x: Tensor, noise: Tensor) -> Tensor:
    """b [K, B]."""
    reconstruction, kl_z = expected_parts(model, x, noise)
    return reconstruction - kl_z


def class_posterior(model: SemiSupervisedVAE, x: Tensor) -> Any:
    return Categorical(logits=model.classifier(x))


def uniform(batch: int) -> Any:
    return Categorical(probs=torch.full((batch, K), 1 / K))


def expected_unlabelled(model: SemiSupervisedVAE, x: Tensor, noise: Tensor) -> Tensor:
    """U [B] = sum_y q(y|x) L(x, y) + H(q(y|x)), DESIGN's second form, which the code does not use."""
    q = class_posterior(model, x)
    labelled = expected_bound(model, x, noise) + uniform(len(x)).log_prob(torch.zeros(len(x)))
    expectation = sum(q.probs[:, k] * labelled[k] for k in range(K))
    result: Tensor = expectation + q.entropy()
    return result


def expected_terms(model: SemiSupervisedVAE) -> tuple[Tensor, Tensor, Tensor]:
    """E[L], E[U] and E[log q(y|x)] of the batch at NOISE."""
    classes = Y_LABELLED.argmax(dim=-1)
    b = expected_bound(model, X_LABELLED, NOISE[:2])[classes, torch.arange(2)]
    return (
        (b + uniform(2).log_prob(classes)).mean(),
        expected_unlabelled(model, X_UNLABELLED, NOISE[2:]).mean(),
        class_posterior(model, X_LABELLED).log_prob(classes).mean(),
    )


def fix_noise(model: SemiSupervisedVAE, noise: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "noise", lambda number, generator: noise[:number])


def bound(model: SemiSupervisedVAE, x: Tensor, noise: Tensor) -> Bound:
    """The model's own bound of every class, [K, B]."""
    classes = torch.eye(K).unsqueeze(1).expand(-1, len(x), -1)
    return model.bound(x, features(model, x), classes, noise)


def run(model: SemiSupervisedVAE, estimator: Estimator, weights: Weights = WEIGHTS, seed: int = 0) -> Objective:
    x = torch.cat([X_LABELLED, X_UNLABELLED])
    return objective(model, estimator, weights, x, Y_LABELLED, step=17, generator=generator(seed))


# --- the bound of one class


@pytest.mark.parametrize("latent_size", [1, 3])
def test_bound_and_its_parts_at_given_noise(latent_size: int) -> None:
    model = small_model(latent_size)
    noise = torch.randn(5, latent_size, generator=generator(1))
    reconstruction, kl_z = expected_parts(model, X, noise)
    actual = bound(model, X, noise)
    torch.testing.assert_close(actual.reconstruction, reconstruction)
    torch.testing.assert_close(actual.kl_z, kl_z)
    torch.testing.assert_close(actual.value, reconstruction - kl_z)


NODES = torch.linspace(-9, 9, 3601)  # in standard deviations
LOG_MASSES = -0.5 * NODES.square() - 0.5 * math.log(2 * math.pi) + math.log(18 / 3600)


def at_nodes(model: SemiSupervisedVAE, x: Tensor, k: int, over: Any) -> Tensor:
    """log p(x|y=k,z) [nodes, B] on a grid of one-dimensional z around the Gaussian `over`.

    By the trapezoidal rule: the rectifier's kinks cost Gauss-Hermite its precision (0.01 nats at 100 nodes).
    """
    z = (over.mean + over.stddev * NODES).T.reshape(-1, 1)
    images = x.repeat(len(NODES), 1, 1, 1)
    return log_likelihood(model, images, k, z).view(len(NODES), len(x))


def integrated_bound(model: SemiSupervisedVAE, x: Tensor) -> Tensor:
    """b [K, B] with its expectation over z."""
    rows = []
    for k in range(K):
        q = posterior(model, x, k)
        kl = kl_divergence(q, Normal(0.0, 1.0)).sum(dim=-1)
        rows.append(LOG_MASSES.exp() @ at_nodes(model, x, k, q) - kl)
    return torch.stack(rows)


def integrated_log_likelihood(model: SemiSupervisedVAE, x: Tensor) -> Tensor:
    """log p(x) [B] = log sum_y p(y) E_p(z)[p(x|y,z)]."""
    prior = Normal(torch.zeros(len(x), 1), torch.ones(len(x), 1))
    rows = [(at_nodes(model, x, k, prior) + LOG_MASSES.unsqueeze(1)).logsumexp(dim=0) for k in range(K)]
    return torch.stack(rows).logsumexp(dim=0) - math.log(K)


@torch.no_grad()
def test_mean_of_the_bound_over_draws_of_z_is_its_integral() -> None:
    model, draws = small_model(), 100_000
    for row in range(len(X)):
        image = X[row : row + 1]
        samples = bound(model, image.expand(draws, -1, -1, -1), torch.randn(draws, 1, generator=generator(row)))
        mean, error = samples.value.double().mean(dim=1), samples.value.double().std(dim=1) / draws**0.5
        assert (error < 0.01).all()  # or the test would tell nothing
        assert ((mean - integrated_bound(model, image)[:, 0]).abs() < 4 * error).all()


@torch.no_grad()
@pytest.mark.parametrize("seed", range(5))
def test_log_likelihood_is_above_the_bounds(seed: int) -> None:
    model = small_model(seed=seed)
    b = integrated_bound(model, X)
    q = class_posterior(model, X)
    unlabelled = (q.probs.T * b).sum(dim=0) - kl_divergence(q, uniform(len(X)))
    log_px = integrated_log_likelihood(model, X)
    assert (log_px > unlabelled).all()
    assert (log_px > b - math.log(K)).all()  # log p(x) >= log p(x, y) >= L(x, y)


@torch.no_grad()
def test_probabilities_of_all_images_sum_to_one() -> None:
    pixels = torch.tensor([[(code >> bit) & 1 for bit in range(4)] for code in range(16)]).float()
    total = integrated_log_likelihood(small_model(), pixels.view(16, 1, 2, 2)).exp().sum()
    torch.testing.assert_close(total, torch.ones(()))


def broad_model() -> SemiSupervisedVAE:
    """A model whose q(z|x,y) is broader than the prior, so that importance weights are bounded."""
    model = small_model()
    inference: Any = model.inference
    with torch.no_grad():
        inference.head.parameters_of_z.bias[1] += 2.0
        assert all((posterior(model, X, k).stddev > 1).all() for k in range(K))
    return model


def log_p(model: SemiSupervisedVAE, x: Tensor, samples: int, seed: int) -> Tensor:
    """The importance-weighted estimate [B]."""
    return model.measure(x, samples, generator(seed), lambda: None)[0]["log_likelihood"]


@torch.no_grad()
@pytest.mark.parametrize("samples", [1, 4])
def test_importance_weighted_estimate_of_p_x_is_unbiased(samples: int) -> None:
    """exp of the estimate has the mean p(x), with any number of samples (Burda et al. 2016, section 3)."""
    model, draws = broad_model(), 50_000
    exact = integrated_log_likelihood(model, X).exp()
    for row in range(len(X)):
        image = X[row : row + 1]
        estimate = model.measure(image.expand(draws, -1, -1, -1), samples, generator(row), lambda: None)[0][
            "log_likelihood"
        ]
        weights = estimate.double().exp()
        mean, error = weights.mean(), weights.std() / draws**0.5
        assert error < 0.01 * exact[row]
        assert (mean - exact[row]).abs() < 4 * error


@torch.no_grad()
def test_importance_weighted_estimate_rises_to_log_p_x() -> None:
    model, draws = broad_model(), 500
    x = X.repeat_interleave(draws, dim=0)
    exact = integrated_log_likelihood(model, X)
    gaps = [
        exact
        - model.measure(x, samples, generator(samples), lambda: None)[0]["log_likelihood"].view(-1, draws).mean(dim=1)
        for samples in (1, 10, 500)
    ]
    assert gaps[0].mean() > 0.2
    assert ((gaps[0] > gaps[1]) & (gaps[1] > gaps[2])).all()
    torch.testing.assert_close(gaps[2], torch.zeros(len(X)), atol=0.01, rtol=0)


# --- J


def test_terms_of_j_by_enumeration(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    fix_noise(model, NOISE, monkeypatch)
    terms = run(model, Marginalization()).terms
    labelled, unlabelled, classification = expected_terms(model)
    torch.testing.assert_close(terms["labelled_bound"], labelled)
    torch.testing.assert_close(terms["unlabelled_bound"], unlabelled)
    torch.testing.assert_close(terms["classification"], classification)
    classes = Y_LABELLED.argmax(dim=-1), torch.arange(2)
    reconstruction, kl_z = expected_parts(model, X_LABELLED, NOISE[:2])
    torch.testing.assert_close(terms["reconstruction"], reconstruction[classes].mean())
    torch.testing.assert_close(terms["kl_z"], kl_z[classes].mean())
    q = class_posterior(model, X_UNLABELLED)
    torch.testing.assert_close(terms["entropy_y"], q.entropy().mean())
    torch.testing.assert_close(terms["kl_y"], kl_divergence(q, uniform(3)).mean())


@pytest.mark.parametrize("weights", [WEIGHTS, Weights(1, 1, 1), Weights(0, 0, 1), Weights(1, 0, 0)])
def test_j_is_the_weighted_sum_and_the_loss_its_negative(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    fix_noise(model, NOISE, monkeypatch)
    labelled, unlabelled, classification = expected_terms(model)
    expected = weights.labelled * labelled + weights.unlabelled * unlabelled + weights.alpha * classification
    result = run(model, Marginalization(), weights)
    torch.testing.assert_close(result.terms["J"], expected)
    torch.testing.assert_close(result.loss, -expected)


def test_the_control_trains_the_classifier_and_calls_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no weight on either bound, neither is computed, and the classifier's gradient is what it was."""
    model = small_model()
    monkeypatch.setattr(model, "bound", lambda *inputs: pytest.fail("a bound of no weight was computed"))
    result = run(model, Marginalization(), Weights(0, 0, 1))
    assert set(result.terms) == {"J", "classification", "entropy_y"}
    result.loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {f"classifier.{name}" for name, _ in model.classifier.named_parameters()}  # type: ignore[attr-defined]


def test_the_control_does_not_look_at_unlabelled_images() -> None:
    """Batch normalisation would else take the labelled ones by what the unlabelled ones are like."""
    found = []
    for unlabelled in (torch.zeros(5, 1, 8, 8), torch.ones(5, 1, 8, 8)):
        torch.manual_seed(0)
        shape = ImageShape(1, 8, 8)
        model = SemiSupervisedVAE(
            conv(shape, K, latent_size=1, channels=2, hidden=4, dropout=0.0, scale="softplus", activation="relu")
        )
        labelled = torch.rand(2, 1, 8, 8, generator=generator(1)).round()
        x, estimator = torch.cat([labelled, unlabelled]), Marginalization()
        made = objective(model, estimator, Weights(0, 0, 1), x, Y_LABELLED, step=0, generator=generator(0))
        made.loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        found.append([made.terms["J"], *gradients, *model.buffers()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


class Masking(torch.nn.Module):
    """q(y|x) of a person's own, that leaves a class out."""

    def __init__(self, classifier: torch.nn.Module, left_out: int) -> None:
        super().__init__()
        self.classifier, self.left_out = classifier, left_out

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        logits: Tensor = self.classifier(x, generator)
        return logits.index_fill(-1, torch.tensor(self.left_out), -math.inf)


@pytest.mark.parametrize("weights", [WEIGHTS, Weights(0, 0, 1)])
def test_j_is_finite_where_a_class_is_left_out(weights: Weights) -> None:
    model = small_model()
    (left_out,) = set(range(K)) - set(Y_LABELLED.argmax(dim=-1).tolist())
    logits = model.classifier(X_LABELLED)
    others = torch.tensor([k for k in range(K) if k != left_out])
    expected = logits.index_select(-1, others).log_softmax(dim=-1)
    expected = (expected * Y_LABELLED.index_select(-1, others)).sum(dim=-1).mean()
    model.classifier = Masking(model.classifier, left_out)  # type: ignore[arg-type]
    made = run(model, Marginalization(), weights)
    torch.testing.assert_close(made.terms["classification"], expected)
    made.loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


def test_gradient_of_the_loss_is_that_of_minus_j(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    fix_noise(model, NOISE, monkeypatch)
    labelled, unlabelled, classification = expected_terms(model)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(0.7 * labelled + 1.3 * unlabelled + 5.0 * classification, parameters)
    actual = torch.autograd.grad(run(model, Marginalization()).loss, parameters)
    for gradient, of_j in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, -of_j, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "estimator",
    [Marginalization(), SumAndSample(), ScoreFunction(LeaveOneOut(), 2), GumbelSoftmax(partial(constant, value=0.7))],
)
def test_u_s_part_in_the_gradient_of_the_classifier_has_the_weight_of_the_step(estimator: Estimator) -> None:
    """At weight 0 what labels alone give, at 1 J's, on a line in between; that of the other networks is J's."""
    model = small_model()
    estimator.prepare(4, 1, K)
    first = replace(WEIGHTS, labels_first=4)
    found = {}
    for weight in (0.0, 0.25, 1.0):
        result = run(model, estimator, replace(first, teaching_weight=weight))
        gradients = torch.autograd.grad(result.loss, list(model.parameters()))
        found[weight] = dict(zip((name for name, _ in model.named_parameters()), gradients, strict=True))
        assert result.terms["J"] == run(model, estimator).terms["J"]
        assert result.metrics["teaching_weight"] == weight
    of_j = torch.autograd.grad(run(model, estimator).loss, list(model.parameters()))
    own = {name: p for name, p in model.named_parameters() if name.startswith("classifier.")}
    labels_alone = torch.autograd.grad(run(model, estimator, Weights(0, 0, WEIGHTS.alpha)).loss, list(own.values()))
    of_labels = dict(zip(own, labels_alone, strict=True))
    for (name, at_one), full in zip(found[1.0].items(), of_j, strict=True):
        torch.testing.assert_close(at_one, full)
        if name in own:
            assert not torch.allclose(full, of_labels[name])
            torch.testing.assert_close(found[0.0][name], of_labels[name])
            torch.testing.assert_close(found[0.25][name], torch.lerp(of_labels[name], full, 0.25))
        else:
            torch.testing.assert_close(found[0.0][name], full)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_a_class_that_is_ruled_out_stays_so_while_labels_come_first(weight: float) -> None:
    model = small_model()
    ruled_out = torch.tensor([0.0, -math.inf, 0.0])
    assert isinstance(model.classifier, torch.nn.Module)
    model.classifier.register_forward_hook(lambda module, inputs, logits: logits + ruled_out)
    usual, first = (
        run(model, Marginalization(), w) for w in (WEIGHTS, replace(WEIGHTS, labels_first=4, teaching_weight=weight))
    )
    assert first.loss == usual.loss
    assert first.loss.isfinite()
    first.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("fading", [{"labels_first": 4}, {"distortion_fades": 4}])
def test_images_are_distorted_by_the_share_of_the_step(fading: dict[str, int]) -> None:
    networks = mlp(SHAPE, K, latent_size=1, hidden=4, dropout=0.0, scale="softplus", distortion=0.8)
    model = SemiSupervisedVAE(networks)
    (motion,) = (module for module in model.modules() if isinstance(module, RandomMotion))
    assert "distortion_share" not in run(model, Marginalization()).metrics
    assert motion.share == 1
    for share in (1.0, 0.25, 0.0):
        weights = replace(WEIGHTS, distortion_share=share, **fading)
        assert run(model, Marginalization(), weights).metrics["distortion_share"] == share
        alone = replace(weights, labelled=0.0, unlabelled=0.0)
        assert run(model, Marginalization(), alone).metrics["distortion_share"] == share
        assert motion.share == share


def test_distortion_fades_as_u_comes_in_or_as_is_said() -> None:
    def shares(**settings: int) -> list[float]:
        weights = Weights(1, 1, 1, **settings)
        return [weights.distortion_share_at(step) for step in range(9)]

    assert shares() == [1] * 9
    assert shares(labels_first=4) == [1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert shares(labels_first=4, distortion_fades=2) == [1, 1, 1, 1, 0.5, 0, 0, 0, 0]
    assert shares(distortion_fades=8) == [0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0, 0]


def test_labels_teach_the_classifier_first_and_then_u_too() -> None:
    weights = Weights(1, 1, 1, labels_first=4)
    assert [weights.teaching_weight_at(step) for step in range(9)] == [0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert Weights(1, 1, 1).teaching_weight_at(0) == 1


class Recorder(Estimator):
    """Returns fixed numbers and remembers what it was called with."""

    def forward(
        self, f: CostFunction, logits: Tensor, *, step: int, context: Tensor, generator: torch.Generator
    ) -> Estimate:
        self.called_with = {
            "f": f,
            "logits": logits,
            "step": step,
            "context": context,
            "generator": generator,
        }
        batch = logits.shape[0]
        return Estimate(
            value=torch.arange(batch) * 10.0 + 0 * logits.sum(dim=(-2, -1)),
            kl=torch.arange(batch) + 1.0,
            auxiliary=torch.tensor(2.5),
            metrics={"evaluations": 7.0},
        )


def test_estimate_enters_j_and_the_auxiliary_loss_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    fix_noise(model, NOISE, monkeypatch)
    result = run(model, Recorder())
    labelled, _, classification = expected_terms(model)
    torch.testing.assert_close(result.terms["unlabelled_bound"], torch.tensor(10.0 - 2.0))
    torch.testing.assert_close(result.terms["kl_y"], torch.tensor(2.0))
    torch.testing.assert_close(result.terms["J"], 0.7 * labelled + 1.3 * 8.0 + 5.0 * classification)
    torch.testing.assert_close(result.loss, 2.5 - result.terms["J"])
    assert result.metrics == {"evaluations": 7.0}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"value": torch.zeros(2)}, r"value must be a tensor \[3\], got \[2\]"),
        ({"kl": torch.zeros(3, 1)}, r"kl must be a tensor \[3\], got \[3, 1\]"),
        ({"kl": 0.5}, r"kl must be a tensor \[3\], got float"),
        ({"auxiliary": torch.zeros(3)}, r"auxiliary must be a tensor \[\], got \[3\]"),
        ({"metrics": {}}, "metrics must have evaluations"),
        (
            {"metrics": {"evaluations": torch.ones(3)}},
            r"metric evaluations must be a number or a tensor \[\], got one of \[3\]",
        ),
        (
            {"metrics": {"evaluations": 1.0, "mood": "good"}},
            r"metric mood must be a number or a tensor \[\], got a str",
        ),
    ],
)
def test_an_estimate_of_other_shapes_is_refused(change: dict[str, Any], sentence: str) -> None:
    class Wrong(Recorder):
        def forward(self, *arguments: Any, **named: Any) -> Estimate:
            return replace(super().forward(*arguments, **named), **change)

    with pytest.raises(ContractError, match=sentence):
        run(small_model(), Wrong())


def test_estimator_is_called_by_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    model, estimator = small_model(), Recorder()
    fix_noise(model, NOISE, monkeypatch)
    run(model, estimator)
    called: dict[str, Any] = estimator.called_with
    torch.testing.assert_close(called["logits"], model.classifier(X_UNLABELLED).unsqueeze(1))
    assert called["step"] == 17
    assert torch.equal(called["context"], X_UNLABELLED)
    assert isinstance(called["generator"], torch.Generator)
    classes = torch.eye(K).view(K, 1, 1, K).expand(-1, 3, -1, -1)
    cost = called["f"](classes)
    torch.testing.assert_close(cost, expected_bound(model, X_UNLABELLED, NOISE[2:]))
    through_f = torch.autograd.grad(cost.sum(), called["logits"], allow_unused=True)
    assert through_f == (None,)  # f does not close over the logits


@pytest.mark.parametrize(
    "make",
    [
        partial(GumbelSoftmax, partial(constant, value=0.7)),
        partial(GumbelSoftmax, partial(constant, value=0.7), num_samples=3),
        partial(ReinMax, partial(constant, value=0.7)),
        partial(ScoreFunction, LeaveOneOut(), num_samples=2),
        SumAndSample,
        UnorderedSet,
        SparsemaxSum,
        Marginalization,
    ],
)
def test_a_pass_shared_with_the_labelled_images_changes_no_number(make: Callable[[], Estimator]) -> None:
    model = small_model(dropout=0.5)
    found = []
    for calls_once in (True, False):
        estimator = make()
        estimator.prepare(SHAPE.size, 1, K)
        assert estimator.calls_once
        estimator.calls_once = calls_once
        result = run(model, estimator)
        gradients = torch.autograd.grad(result.loss, list(model.parameters()))
        found.append([*result.terms.values(), *gradients])
    for shared, alone in zip(*found, strict=True):
        torch.testing.assert_close(shared, alone)


def test_noise_comes_from_the_generator_alone() -> None:
    model = small_model()
    first = run(model, Marginalization(), seed=1).loss
    torch.rand(5)
    assert torch.equal(run(model, Marginalization(), seed=1).loss, first)
    assert not torch.equal(run(model, Marginalization(), seed=2).loss, first)


def test_each_image_has_noise_of_its_own() -> None:
    noise = small_model(latent_size=2).noise(len(X), generator())
    assert noise.shape == (5, 2)
    assert len(set(noise.flatten().tolist())) == 10


def test_certain_classifier_makes_the_unlabelled_bound_the_labelled_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The classes are weighted by q(y|x): where it is one class, U(x) = L(x, y)."""
    model = small_model()
    fix_noise(model, NOISE, monkeypatch)
    b = expected_bound(model, X_UNLABELLED, NOISE[2:])
    classifier: Any = model.classifier
    for k in range(K):
        with torch.no_grad():
            classifier.logits.bias.copy_(1e4 * torch.eye(K)[k])
        terms = run(model, Marginalization()).terms
        torch.testing.assert_close(terms["unlabelled_bound"], (b[k] - math.log(K)).mean())
        torch.testing.assert_close(terms["kl_y"], torch.tensor(math.log(K)))
        assert terms["entropy_y"] == 0


# --- the divergences


def test_kl_of_y_is_log_k_minus_entropy() -> None:
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0]])
    kl = categorical_kl(probabilities.log().unsqueeze(1))
    torch.testing.assert_close(kl, torch.tensor([math.log(3) - 1.5 * math.log(2), 0.0, math.log(3)]))
    logits = 3 * torch.randn(200, 10, generator=generator())
    q, p = Categorical(logits=logits), Categorical(probs=torch.full((200, 10), 0.1))
    torch.testing.assert_close(categorical_kl(logits.unsqueeze(1)), kl_divergence(q, p))
    torch.testing.assert_close(categorical_kl(logits.view(50, 4, 10)), kl_divergence(q, p).view(50, 4).sum(dim=1))
    torch.testing.assert_close(entropy(logits), q.entropy())


def test_gaussian_kl_agrees_with_torch() -> None:
    random = generator()
    loc = 3 * torch.randn(50, 4, generator=random)
    scale = torch.randn(50, 4, generator=random).mul(3).exp()  # from about 1e-4 to 1e4
    expected = kl_divergence(Normal(loc, scale), Normal(0.0, 1.0)).sum(dim=-1)
    torch.testing.assert_close(gaussian_kl(loc, scale), expected)
    assert gaussian_kl(torch.zeros(1, 4), torch.ones(1, 4)).item() == 0


def test_the_gradient_of_gaussian_kl_and_its_own_are_those_of_finite_differences() -> None:
    """RELAX and REBAR differentiate the gradient."""
    random = torch.Generator().manual_seed(0)
    loc = torch.randn(2, 3, 4, dtype=torch.float64, generator=random).requires_grad_()
    scale = (torch.rand(2, 3, 4, dtype=torch.float64, generator=random) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(gaussian_kl, (loc, scale))
    assert torch.autograd.gradgradcheck(gaussian_kl, (loc, scale))


def test_log_likelihood_agrees_with_torch_and_is_finite_at_extreme_logits() -> None:
    logits = torch.tensor([-1e30, -1e4, -100.0, -20.5, -1.0, 0.0, 0.1, 19.5, 20.5, 100.0, 1e4, 1e30])
    for pixel in (0.0, 1.0, 0.3):
        x = torch.full_like(logits, pixel)
        actual = bernoulli_log_likelihood(logits.view(1, -1, 1), x.view(-1, 1))[0]
        assert actual.isfinite().all()
        torch.testing.assert_close(actual, Bernoulli(logits=logits, validate_args=False).log_prob(x))


def test_log_likelihood_s_written_gradient_is_its_gradient_twice_over() -> None:
    random = generator()
    logits = torch.randn(3, 2, 5, generator=random, dtype=torch.double, requires_grad=True)
    x = torch.rand(2, 5, generator=random, dtype=torch.double)

    def written(logits: Tensor) -> Tensor:  # the value is taken in float32, the gradient is not
        return torch.autograd.grad(bernoulli_log_likelihood(logits, x).sum(), logits, create_graph=True)[0]

    expected = torch.autograd.grad((x * logits - torch.nn.functional.softplus(logits)).sum(), logits)[0]
    torch.testing.assert_close(written(logits), expected)
    assert torch.autograd.gradcheck(written, logits)


def test_log_likelihood_s_gradient_in_bf16_is_that_of_float32_rounded_once() -> None:
    """A white pixel of probability 0.999 has a gradient of 0.001, which 1 - sigmoid in bf16 would make 0."""
    logits = torch.linspace(-12, 12, 50).bfloat16().view(1, 1, -1).requires_grad_()
    for pixel in (0.0, 1.0):
        x = torch.full((1, 50), pixel)
        (gradient,) = torch.autograd.grad(bernoulli_log_likelihood(logits, x).sum(), logits)
        exact = x - logits.detach().double().sigmoid()
        torch.testing.assert_close(gradient.double(), exact, rtol=2**-8, atol=1e-7)
        assert gradient.dtype == torch.bfloat16


def test_log_likelihood_is_summed_over_pixels_in_float32() -> None:
    random = generator()
    logits, x = torch.randn(3, 2, 784, generator=random), torch.rand(2, 784, generator=random).round()
    expected = Bernoulli(logits=logits).log_prob(x).sum(dim=-1)
    torch.testing.assert_close(bernoulli_log_likelihood(logits, x), expected)
    rough = bernoulli_log_likelihood(logits.bfloat16(), x)
    torch.testing.assert_close(rough, bernoulli_log_likelihood(logits.bfloat16().float(), x), rtol=0, atol=0)


@pytest.mark.parametrize("scale", ["softplus", "exp"])
def test_scale_of_z_goes_below_and_above_one(scale: ScaleFunction) -> None:
    """A peer's softplus on the log-variance forced every variance to be at least 1."""
    head = GaussianHead(1, 1, scale)
    raw = torch.tensor([-200.0, -3.0, 0.0, 3.0])
    with torch.no_grad():
        head.parameters_of_z.weight.copy_(torch.tensor([[0.0], [1.0]]))
        head.parameters_of_z.bias.zero_()
        _, actual = head(raw.view(1, 4, 1))
    function = torch.nn.functional.softplus if scale == "softplus" else torch.exp
    torch.testing.assert_close(actual.flatten(), function(raw) + MINIMUM_SCALE)
    assert 0 < actual.min() < 0.001
    assert actual.max() > 3


# --- evaluation


PIXELS = (255 * torch.cat([X, X.flip(0).roll(1, dims=-1)])[:7]).to(torch.uint8)
DATA = EvaluationData(PIXELS, torch.tensor([0, 1, 2, 0, 1, 2, 0]))


def measure(model: SemiSupervisedVAE, data: EvaluationData = DATA, **changes: Any) -> Evaluation:
    settings: dict[str, Any] = {"binarization": "none", "batch_size": 3}
    return evaluate(model, data, **(settings | changes))


@torch.no_grad()
def test_evaluation_is_the_enumeration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over minibatches of unequal sizes, so that a mean of means would differ."""
    model = small_model()
    noise = torch.full((7, 1), 0.4)
    fix_noise(model, noise, monkeypatch)
    x = DATA.x[:] / 255
    q = class_posterior(model, x)
    reconstruction, kl_z = ((q.probs.T * part).sum(dim=0) for part in expected_parts(model, x, noise))
    actual = measure(model)
    expected = expected_unlabelled(model, x, noise).mean().item()
    assert actual.bound == pytest.approx(expected, rel=1e-5)
    assert actual.reconstruction == pytest.approx(reconstruction.mean().item(), rel=1e-5)
    assert actual.kl_z == pytest.approx(kl_z.mean().item(), rel=1e-5)
    assert actual.kl_y == pytest.approx(kl_divergence(q, uniform(7)).mean().item(), rel=1e-5)
    assert actual.accuracy == (q.probs.argmax(dim=-1) == DATA.labels).sum().item() / 7
    assert actual.log_likelihood is None


@torch.no_grad()
def test_evaluation_s_log_likelihood_tends_to_log_p_x() -> None:
    model = broad_model()
    actual = measure(model, importance_samples=2000)
    exact = integrated_log_likelihood(model, DATA.x[:] / 255).mean().item()
    assert actual.log_likelihood == pytest.approx(exact, abs=0.04)


def test_importance_samples_do_not_change_the_rest_of_the_evaluation() -> None:
    model = small_model()
    with_samples, without = measure(model, importance_samples=2, batch_size=7), measure(model, batch_size=7)
    assert with_samples.log_likelihood is not None
    with_samples.log_likelihood = None
    assert with_samples == without


@torch.no_grad()
def test_accuracy_is_of_q_as_a_mean_over_draws_of_the_pixels() -> None:
    """Against all 16 binary images that a grey one of four pixels may become."""
    model = small_model()
    grey = torch.tensor([[51, 128, 255, 200], [0, 77, 30, 128]], dtype=torch.uint8).view(2, 1, 2, 2)
    binary = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4).view(16, 1, 2, 2)
    lit = (grey / 255).unsqueeze(1)
    chances = torch.where(binary > 0, lit, 1 - lit).flatten(2).prod(dim=-1)  # [2, 16]
    expected = chances @ model.posterior(binary)
    data = EvaluationData(grey, torch.tensor([0, 1]))
    one, many = (measure(model, data, binarization="dynamic", pixel_draws=draws) for draws in (1, 2000))
    assert one.per_image is not None
    assert many.per_image is not None
    assert many.per_image.told is not None
    torch.testing.assert_close(many.per_image.told, expected, atol=0.01, rtol=0)
    assert (one.per_image.q - expected).abs().max() > 0.05
    assert one.per_image.told is not None
    assert torch.equal(one.per_image.told, one.per_image.q)
    assert many.bound == one.bound
    assert measure(model, data, pixel_draws=9) == measure(model, data)  # whose pixels are not drawn


@torch.no_grad()
@pytest.mark.parametrize("prior", [None, [0.7, 0.1, 0.2]])
def test_classes_by_the_bound_are_by_bayes_rule_and_by_both_the_mean(prior: list[float] | None) -> None:
    """At z's noise of the bound, and at that of each draw of the pixels."""
    networks = mlp(SHAPE, K, latent_size=1, hidden=4, dropout=0.0, scale="softplus")
    model = SemiSupervisedVAE(networks, prior=prior)
    model.load_state_dict(small_model().state_dict())
    one_hot = torch.eye(K).unsqueeze(1).expand(-1, 7, -1)
    by: dict[str, Evaluation] = {
        how: measure(model, classify_by=how, batch_size=7) for how in ("classifier", "bound", "both")
    }
    noise = model.noise(7, keyed_generator(torch.device("cpu"), EVALUATION_SEED, "evaluation", 0))
    x = DATA.x[:] / 255
    joint = model.bound_at(one_hot, model.infer(x, noise=noise)[1]()).value
    joint = joint + torch.tensor(prior or [1 / K] * K).log().unsqueeze(-1)
    q, bayes = model.posterior(x), (joint.exp() / joint.exp().sum(dim=0)).T
    for how, expected in (("classifier", q), ("bound", bayes), ("both", (q + bayes) / 2)):
        found = by[how].per_image
        assert found is not None
        torch.testing.assert_close(found.told, expected)
        torch.testing.assert_close(found.q, q)
        assert by[how].accuracy == (expected.argmax(dim=-1) == DATA.labels).sum().item() / 7
        assert by[how].bound == by["classifier"].bound
    assert (q - bayes).abs().max() > 0.1


@torch.no_grad()
def test_classes_by_the_bound_are_a_mean_over_draws_of_pixels_and_noise() -> None:
    model = small_model()
    grey = EvaluationData(torch.tensor([51, 128, 255, 200], dtype=torch.uint8).view(1, 1, 2, 2), torch.tensor([0]))
    binary = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4).view(16, 1, 2, 2)
    lit = grey.x[:] / 255
    chances = torch.where(binary > 0, lit, 1 - lit).flatten(1).prod(dim=-1)
    noise = Normal(0, 1).icdf((torch.arange(400) + 0.5) / 400)
    seen = [model.terms_by(x.expand(400, 1, 2, 2), noise.unsqueeze(-1))[1].classified("bound").mean(0) for x in binary]
    found = measure(model, grey, binarization="dynamic", pixel_draws=4000, classify_by="bound").per_image
    assert found is not None
    assert found.told is not None
    torch.testing.assert_close(found.told[0], chances @ torch.stack(seen), atol=0.01, rtol=0)


def test_a_family_that_tells_no_classes_by_the_bound_is_refused_them() -> None:
    seen = PerImage(torch.ones(1, K) / K, torch.zeros(1))
    assert seen.classified("classifier") is seen.q
    with pytest.raises(ValueError, match=r"evaluation\.classify_by must be classifier .* got both"):
        seen.classified("both")
    with pytest.raises(ValueError, match=r"evaluation\.classify_by must be one of classifier, bound, both, got all"):
        seen.classified("all")  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize("by", ["classifier", "bound", "both"])
def test_a_classifier_that_collapsed_is_told_whatever_images_are_classified_by(by: ClassifyBy) -> None:
    model = small_model()
    *others, bias = model.classifier.parameters()  # type: ignore[attr-defined]
    for parameter in others:
        parameter.zero_()
    bias.copy_(torch.tensor([20.0, 0.0, 0.0]))
    collapsed = model.alarms(measure(model, classify_by=by), DATA.labels, Weights(1, 1, 1))[0]
    assert (collapsed.name, collapsed.up) == ("classes_collapsed", True)


def test_evaluation_sees_each_class_as_one_hot_whatever_estimator_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "estimator" not in inspect.signature(evaluate).parameters
    model = small_model()
    seen: list[Tensor] = []
    original = model.bound

    def spy(x: Tensor, features: Tensor, y: Tensor, noise: Tensor) -> Bound:
        seen.append(y)
        return original(x, features, y, noise)

    monkeypatch.setattr(model, "bound", spy)
    measure(model)
    assert [y.shape[1] for y in seen] == [3, 3, 1]
    for y in seen:
        assert torch.equal(y, torch.eye(K).unsqueeze(1).expand_as(y))


def test_evaluation_uses_the_labels_for_accuracy_and_calibration_alone() -> None:
    model = small_model()
    predicted = class_posterior(model, DATA.x[:] / 255).probs.argmax(dim=-1)
    first = measure(model, EvaluationData(DATA.x[:], predicted))
    other = measure(model, EvaluationData(DATA.x[:], (predicted + 1) % K))
    assert (first.accuracy, other.accuracy) == (1, 0)
    assert first.calibration_error != other.calibration_error
    assert (other.bound, other.kl_y, other.kl_z) == (first.bound, first.kl_y, first.kl_z)


def test_evaluation_repeats_itself_and_leaves_the_model_and_global_randomness_alone() -> None:
    model = small_model(dropout=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first = measure(model, binarization="dynamic", importance_samples=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert measure(model, binarization="dynamic", importance_samples=2) == first
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluation_is_without_dropout() -> None:
    assert measure(small_model(dropout=0.5)) == measure(small_model(dropout=0.0))


def plain_calibration_error(q: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    """Guo et al. 2017, equation 3, bin by bin."""
    confidence, correct = q.max(axis=1), q.argmax(axis=1) == labels
    total = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 5.0])
def test_calibration_error_agrees_with_a_plain_loop(sharpness: float) -> None:
    random = generator()
    q = (sharpness * torch.randn(2000, 10, generator=random)).softmax(dim=-1)
    labels = torch.where(
        torch.rand(2000, generator=random) < 0.6,
        q.argmax(dim=-1),
        torch.randint(10, (2000,), generator=random),
    )
    expected = plain_calibration_error(q.double().numpy(), labels.numpy())
    assert expected > 0.01
    assert calibration_error(q, labels) == pytest.approx(expected, rel=1e-5)


def test_calibration_error_at_its_ends() -> None:
    certain = torch.eye(10)
    assert calibration_error(certain, torch.arange(10)) == 0
    assert calibration_error(certain, torch.arange(10).roll(1)) == 1
