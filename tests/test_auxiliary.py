"""Auxiliary deep generative models, against numerical integration, M2 and enumeration."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from data.randomness import keyed_generator
from estimators.marginalization import Marginalization
from models.auxiliary.model import AuxiliaryVAE
from models.auxiliary.networks import auxiliary_conv, auxiliary_mlp
from models.contract import Weights
from models.gradient_quality import gradient_quality
from models.m2 import evaluation
from models.m2.model import Rows, SemiSupervisedVAE
from models.networks import mlp
from models.parts import ImageShape
from tests.test_estimators import UNBIASED, Case, each

K = 3
SHAPE = ImageShape(1, 4, 4)
Vae = TypeVar("Vae", bound=SemiSupervisedVAE)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def untrained(skip: bool = False, size: int = 1, kind: str = "mlp", prior: list[float] | None = None) -> AuxiliaryVAE:
    sizes: Any = {"latent_size": size, "auxiliary_size": size, "hidden": 5, "dropout": 0.0, "scale": "softplus"}
    if kind == "mlp":
        networks = auxiliary_mlp(SHAPE, K, **sizes, hidden_layers=2, skip=skip)
    else:
        networks = auxiliary_conv(SHAPE, K, **sizes, channels=2, skip=skip)
    return AuxiliaryVAE(networks, prior=prior)


def with_large_weights(model: Vae) -> Vae:
    """So that a, y and z matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4, generator=seeded(parameter.numel()))
    return model.eval()


def tiny(skip: bool = False, size: int = 1, kind: str = "mlp") -> AuxiliaryVAE:
    return with_large_weights(untrained(skip, size, kind))


def of_prior(has_auxiliary: bool, prior: list[float] | None) -> SemiSupervisedVAE:
    """ADGM or M2 with this p(y)."""
    if has_auxiliary:
        return with_large_weights(untrained(prior=prior))
    networks = mlp(SHAPE, K, latent_size=1, hidden=5, dropout=0.0, scale="softplus")
    return with_large_weights(SemiSupervisedVAE(networks, prior=prior))


def images(number: int) -> Tensor:
    return torch.rand(number, 1, 4, 4, generator=seeded(1)).round()


@torch.no_grad()
@pytest.mark.parametrize("skip", [False, True])
def test_evidence_and_bound_are_those_of_numerical_integration(skip: bool) -> None:
    """p(x) by p's densities alone on a grid of z and a: the mean weight is it, and the mean bound below it."""
    model, x = tiny(skip), images(2)
    grid = torch.linspace(-6, 6, 241)
    z = grid.view(1, -1, 1)
    evidence = torch.zeros(2)
    for image in range(2):
        for k in range(K):
            y = torch.eye(K)[k].expand(1, len(grid), K)
            features = model.auxiliary_generator.features(x[image : image + 1])
            features = features.expand(len(grid), -1)
            loc, scale = model.auxiliary_generator(features, y, z)
            p_z = torch.distributions.Normal(0, 1).log_prob(z)[..., 0].exp()
            if not skip:  # a integrates to 1
                log_x = model.likelihood.log_prob(model.generator(y, z), x[image].flatten())
                evidence[image] += (p_z * log_x.exp()).sum() * 0.05 / K
                continue
            for value in grid:
                a = value.expand(1, len(grid), 1)
                log_x = model.likelihood.log_prob(model.generator(y, torch.cat([z, a], dim=-1)), x[image].flatten())
                p_a = torch.distributions.Normal(loc, scale).log_prob(a)[..., 0].exp()
                evidence[image] += (p_z * p_a * log_x.exp()).sum() * 0.05**2 / K
    steps = torch.linspace(-24, 24, 241)  # so far out, as q is narrower than p
    noise = torch.cartesian_prod(steps, steps)
    log_density = torch.distributions.Normal(0, 1).log_prob(noise).sum(dim=-1) + 2 * math.log(0.2)
    y = torch.eye(K).unsqueeze(1).expand(-1, len(noise), -1)
    for image in range(2):
        repeated = x[image].expand(len(noise), 1, 4, 4)
        log_weights = model.log_weight_at(y, model.infer(repeated, noise=noise)[1]()) - math.log(K)
        found = (log_weights + log_density).flatten().logsumexp(dim=0)
        torch.testing.assert_close(found.exp(), evidence[image], rtol=1e-3, atol=0)
        bound = (log_density.exp() * model.terms_by(repeated, noise)[0]["bound"]).sum()
        assert bound < evidence[image].log()


@torch.no_grad()
@pytest.mark.parametrize("at_once", [6, 100])
@pytest.mark.parametrize("has_auxiliary", [False, True])
@pytest.mark.parametrize("prior", [None, [0.2, 0.5, 0.3]])
def test_classes_that_turn_out_negligible_are_left_off(
    at_once: int, has_auxiliary: bool, prior: list[float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They count by their first draws, over all: just below what all classes give, for fewer rows.

    A draw is one call of the generator where memory allows, and no call has more rows than it does.
    """
    monkeypatch.setattr(evaluation, "FIRST", 2)
    monkeypatch.setattr(evaluation, "NEGLIGIBLE", 0.5)
    monkeypatch.setattr(evaluation, "rows_at_once", lambda pixels: at_once)
    model, x, rows = of_prior(has_auxiliary, prior), images(6), []
    draws = [model.noise(6, seeded(seed)) for seed in range(7)]
    classes = torch.eye(K).unsqueeze(1).expand(-1, 6, -1)
    weights = torch.stack([model.log_weight_at(classes, model.infer(x, noise=noise)[1]()) for noise in draws])
    joint = weights + torch.tensor(prior or [1 / K] * K).log().view(1, K, 1)
    kept = (first := joint[:2].logsumexp(dim=0)) >= first.max(dim=0).values - 0.5
    assert 6 < kept.sum() < 6 * K
    joint[2:][:, ~kept] = -math.inf
    network: Any = model.generator
    network.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[:-1].numel()))
    found = model.log_likelihood_by(x, draws)
    torch.testing.assert_close(found, joint.flatten(0, 1).logsumexp(dim=0) - math.log(7))
    assert sum(rows) == 2 * 6 * K + 5 * kept.sum()
    assert max(rows) <= at_once
    assert len(rows) == (7 if at_once > 6 * K else 2 * K + 5 * math.ceil(kept.sum() / 6))


@torch.no_grad()
def test_thousands_of_draws_add_up_as_exactly_as_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log weights of thousands of nats, as large images have, of which each draw adds little."""
    model, x = of_prior(False, None), images(4)
    weight_at, seen = model.log_weight_at, []

    def far_down(y: Tensor, rows: Rows) -> Tensor:
        seen.append(weight_at(y, rows) - 2000)
        return seen[-1]

    monkeypatch.setattr(model, "log_weight_at", far_down)
    monkeypatch.setattr(evaluation, "NEGLIGIBLE", math.inf)
    found = model.log_likelihood_by(x, (model.noise(4, seeded(seed)) for seed in range(2000)))
    weights = torch.stack([weight.reshape(K, 4) for weight in seen]).double()
    expected = weights.flatten(0, 1).logsumexp(dim=0) - math.log(2000 * K)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-4)  # float32 has steps of 1.2e-4 there


@torch.no_grad()
@pytest.mark.parametrize("has_auxiliary", [False, True])
def test_left_off_classes_change_no_digit_that_is_told(has_auxiliary: bool) -> None:
    """At classes some of which are further apart than that, and more draws than all classes have a part in."""
    model, x = of_prior(has_auxiliary, None), images(6)
    model.generator.from_class.weight.mul_(30)  # type: ignore[attr-defined]
    draws = [model.noise(6, seeded(seed)) for seed in range(40)]
    classes = torch.eye(K).unsqueeze(1).expand(-1, 6, -1)
    weights = torch.stack([model.log_weight_at(classes, model.infer(x, noise=noise)[1]()) for noise in draws])
    gap = weights.logsumexp(dim=0).sort(dim=0, descending=True).values
    assert (gap[0] - gap[1]).max() > evaluation.NEGLIGIBLE
    everything = weights.flatten(0, 1).logsumexp(dim=0) - math.log(40 * K)
    torch.testing.assert_close(model.log_likelihood_by(x, draws), everything, rtol=0, atol=1e-4)


@torch.no_grad()
def test_an_auxiliary_that_is_ignored_gives_m2_s_bound() -> None:
    """Where p(a|x,y,z) = q(a|x) and nothing reads a, every b(x, y) is M2's, of the networks without a."""
    model, x = tiny(size=2), images(4)
    for layer in (model.classifier.from_auxiliary, model.inference.from_auxiliary):
        layer.weight.zero_()
    for head in (model.auxiliary.head[-1], model.auxiliary_generator.head[-1]):  # type: ignore[attr-defined]
        head.parameters_of_z.weight.zero_()
        head.parameters_of_z.bias.fill_(0.3)
    noise = model.noise(4, seeded(3))
    y = torch.eye(K).unsqueeze(1).expand(-1, 4, -1)
    bound = model.bound_at(y, model.infer(x, noise=noise)[1]())
    assert bound.kl_a is not None
    assert bound.kl_a.abs().max() < 1e-5
    without = model.inference.from_image_and_class
    loc, scale = without(without.features(x), y)
    outputs = model.generator(y, loc + scale * noise[:, 2:])
    normal = torch.distributions.Normal(loc, scale)
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0, 1)).sum(dim=-1)
    log_x = torch.distributions.Bernoulli(logits=outputs).log_prob(x.flatten(1)).sum(dim=-1)
    torch.testing.assert_close(bound.value, log_x - kl, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("skip", [False, True])
def test_f_has_no_chance_in_it(kind: str, skip: bool) -> None:
    model, x = tiny(skip, 2, kind).train(), images(3)
    rows = model.infer(x, seeded(0))[1]()
    y = torch.eye(K).unsqueeze(1).expand(-1, 3, -1)
    together = model.bound_at(y, rows).value
    alone = torch.cat([model.bound_at(y[k : k + 1], rows).value for k in range(K)])
    torch.testing.assert_close(together, alone)
    assert len({value.item() for value in together.flatten()}) == 3 * K


@each(UNBIASED)
def test_unbiased_estimators_are_unbiased(case: Case) -> None:
    model, x = tiny(size=2), images(2)
    estimator = model.prepared(case.make(), SHAPE.size)
    found = gradient_quality(model, estimator, x, step=0, draws=60, seed=0)
    for part in found.parts.values():
        assert abs(part.bias_squared) < 5 * part.bias_squared_error + 1e-8


@pytest.mark.parametrize("skip", [False, True])
def test_labels_alone_teach_the_logits_at_first_and_u_the_auxiliary(skip: bool) -> None:
    model, x, y = tiny(skip), images(5), torch.eye(K)[:2]
    estimator = model.prepared(Marginalization(), SHAPE.size)
    found = []
    for weights in (Weights(1, 1, 5, labels_first=4, teaching_weight=0.0), Weights(0, 0, 5)):
        loss = model.objective(estimator, weights, x, y, step=0, generator=seeded(0)).loss
        modules: list[Any] = [model.classifier, model.auxiliary]
        found.append([torch.autograd.grad(loss, list(m.parameters()), retain_graph=True) for m in modules])
    (logits, auxiliary), (logits_of_labels, auxiliary_of_labels) = found
    torch.testing.assert_close(logits, logits_of_labels)
    assert not any(map(torch.allclose, auxiliary, auxiliary_of_labels))


@torch.no_grad()
def test_class_of_an_image_depends_on_no_other() -> None:
    model, x = tiny(size=2), images(5)
    torch.testing.assert_close(model.posterior(x)[3:], model.posterior(x[3:]))
    generator = keyed_generator(torch.device("cpu"), 0, "drawn")
    assert model.sample(4, generator).shape == (4, 16)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_it_is_made_on_the_device_that_it_shall_be_on(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU does not draw by a CPU's generator; the meta device, which stands for one here, does not mind."""
    randn = torch.randn

    def as_on_a_gpu(*size: int, generator: torch.Generator, device: str | None = None) -> Tensor:
        assert generator.device == torch.device(device or torch.get_default_device())
        return randn(*size, generator=generator, device=device)

    monkeypatch.setattr(torch, "randn", as_on_a_gpu)
    with torch.device("meta"):
        model = untrained(kind=kind)
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}
