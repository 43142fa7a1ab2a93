"""Models of N x K categorical variables and of structured prediction, against enumeration of everything discrete."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

import train
from data.batches import EvaluationData
from estimators import marginalization
from estimators.contract import Estimator
from estimators.gumbel_softmax import GumbelSoftmax
from estimators.layers import Layers, in_layers, of_layer
from estimators.local_expectations import IndeCateR
from estimators.marginalization import Marginalization
from estimators.relaxed_control import RELAX
from estimators.schedules import constant
from estimators.score_function import VIMCO, LearnedBaseline, LeaveOneOut, MovingAverage, ScoreFunction
from models import contract
from models.categorical import evaluation
from models.categorical.model import CategoricalVAE
from models.categorical.networks import Prior, ToLogits, categorical_mlp, categorical_two_layers
from models.categorical.pictures import UNUSED, alarms, information, use_of_variables
from models.contract import Evaluation, Model, PerImage, Weights
from models.evaluation import evaluate
from models.gradient_quality import gradient_quality
from models.likelihoods import Bernoulli
from models.parts import ImageShape
from models.structured import model as structured
from models.structured.model import StructuredModel, halves
from models.structured.networks import structured_mlp
from tests.runs import assert_same_events, checkpoint, command, equal, events, resume, run

SHAPE = ImageShape(1, 4, 2)
N, K = 2, 3
WEIGHTS = Weights(labelled=0, unlabelled=1, alpha=0)
X = (
    torch.tensor([[0, 1, 1, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 0, 0, 1, 0]])
    .float()
    .view(3, 1, 4, 2)
)
NONE = torch.zeros(0, 10)  # the classes of no labelled image


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_large_parameters(model: Model) -> Model:
    """So that variables and images matter to the bound."""
    random = seeded(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.7, generator=random)
    return model


def one_layer(
    prior: Prior = "learned", hidden: int = 5, encoder: Sequence[int] = (), layer_norm: bool = False
) -> CategoricalVAE:
    networks = categorical_mlp(
        SHAPE,
        10,
        variables=N,
        classes=K,
        encoder=list(encoder),
        decoder=[hidden],
        activation="tanh",
        prior=prior,
        layer_norm=layer_norm,
    )
    model = networks.model(Bernoulli(), [0.1] * 10)
    with_large_parameters(model)
    return model


def two_layers() -> CategoricalVAE:
    networks = categorical_two_layers(
        SHAPE,
        10,
        variables=N,
        classes=K,
        upper_variables=1,
        encoder=[],
        decoder=[],
        between=[],
        activation="tanh",
        prior="learned",
    )
    model = networks.model(Bernoulli(), [1.0])
    with_large_parameters(model)
    return model


def structured_model(layers: int = 2) -> StructuredModel:
    networks = structured_mlp(
        SHAPE, 10, layers=layers, variables=N, classes=K, encoder=[], between=[], decoder=[5], activation="tanh"
    )
    model = networks.model(Bernoulli(), [1.0])
    with_large_parameters(model)
    return model


MODELS: dict[str, Callable[[], Model]] = {
    "one layer, uniform prior": partial(one_layer, "uniform"),
    "one layer, learned prior": one_layer,
    "two layers": two_layers,
    "structured, one layer": partial(structured_model, 1),
    "structured, two layers": structured_model,
}
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
ENUMERABLE = {name: make for name, make in MODELS.items() if "two" not in name}


def joint(variables: int) -> list[Tensor]:
    """All joint classes [N, K]."""
    return [torch.eye(K)[list(classes)] for classes in product(range(K), repeat=variables)]


def log_q(logits: Tensor, y: Tensor) -> Tensor:
    """[B] of logits [B, N, K] at y [N, K]."""
    return (logits.log_softmax(dim=-1) * y).sum(dim=(-2, -1))


def at(model: CategoricalVAE, layer: int, below: Tensor, y: Tensor) -> Tensor:
    """log p(below|y) [B] at one y [N, K], by the likelihood's own formula."""
    outputs = model.generators[layer](y.expand(1, len(below), *y.shape))[0]
    if layer == 0:
        return -torch.nn.functional.binary_cross_entropy_with_logits(outputs, below.flatten(1), reduction="none").sum(
            dim=-1
        )
    return log_q(outputs.unflatten(-1, (N, K)), below[0])


def outcomes(model: Model, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(log q, log p(x, y) - log q or, of a structured model, log p(lower half|y)) [B] of everything that y can be."""
    found = []
    if isinstance(model, StructuredModel):
        upper, lower = halves(x)

        def go(layer: int, logits: Tensor, so_far: Tensor) -> None:
            for y in joint(N):
                probability = so_far + log_q(logits, y)
                if layer + 1 < len(model.latents):
                    go(layer + 1, model.layers[layer + 1](y.expand(len(x), N, K)), probability)
                else:
                    outputs = model.generator(y.expand(1, len(x), N, K))[0]
                    pixels = torch.distributions.Bernoulli(logits=outputs).log_prob(lower)
                    found.append((probability, pixels.sum(dim=-1)))

        go(0, model.layers[0](upper), torch.zeros(len(x)))
        return found
    assert isinstance(model, CategoricalVAE)
    logits = model.posteriors[0](x)
    top = torch.zeros(model.latents[-1]) if model.prior_logits is None else model.prior_logits
    for y in joint(N):
        first, pixels = log_q(logits, y), at(model, 0, x, y)
        if len(model.latents) == 1:
            found.append((first, pixels + log_q(top.expand(len(x), -1, -1), y) - first))
            continue
        below = y.expand(len(x), N, K)
        for above in joint(1):
            second = log_q(model.posteriors[1](below), above)
            ratio = pixels + at(model, 1, below, above) + log_q(top.expand(len(x), -1, -1), above) - first - second
            found.append((first + second, ratio))
    return found


def exact_bound(model: Model, x: Tensor) -> Tensor:
    """[B]."""
    return torch.stack([probability.exp() * value for probability, value in outcomes(model, x)]).sum(dim=0)


def exact_log_likelihood(model: Model, x: Tensor) -> Tensor:
    """[B]: log sum_y q(y) p(x, y) / q(y)."""
    return torch.stack([probability + value for probability, value in outcomes(model, x)]).logsumexp(dim=0)


def gradients(model: Model, value: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(model.parameters())))


def by_objective(model: Model, estimator: Estimator, x: Tensor, seed: int = 0, weights: Weights = WEIGHTS) -> Tensor:
    """J."""
    estimator = model.prepared(estimator, SHAPE.size)
    found = model.objective(estimator, weights, x, NONE, step=0, generator=seeded(seed))
    torch.testing.assert_close(found.loss, -found.terms["J"])
    return found.terms["J"]


@models
def test_marginalization_gives_the_bound_and_its_gradient(make: Callable[[], Model]) -> None:
    model = make()
    exact, found = exact_bound(model, X).mean(), by_objective(model, Marginalization(), X)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(model, found), gradients(model, exact), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def z_of_gradients(model: Model, estimator: Estimator) -> float:
    """The largest |z| of a coordinate of the mean gradient over 10^5 draws an image, and float32's rounding."""
    exact = torch.cat([part.flatten() for part in gradients(model, exact_bound(model, X).mean())])
    prepared, x, calls = model.prepared(estimator, SHAPE.size), X.repeat(500, 1, 1, 1), 200
    rows = []
    for seed in range(calls):
        found = model.objective(prepared, WEIGHTS, x, NONE, step=0, generator=seeded(seed))
        rows.append(torch.cat([part.flatten() for part in gradients(model, found.terms["J"])]))
    found_rows = torch.stack(rows).double()
    error = found_rows.std(dim=0) / math.sqrt(calls)
    return ((found_rows.mean(dim=0) - exact).abs() / (error + 1e-6)).max().item()


@models
@pytest.mark.parametrize("estimator", [lambda: ScoreFunction(LeaveOneOut(), 2), IndeCateR], ids=["score", "indecater"])
def test_unbiased_estimators_are_unbiased_through_all_layers(
    make: Callable[[], Model], estimator: Callable[[], Estimator]
) -> None:
    assert z_of_gradients(make(), estimator()) < 4.5


@models
def test_a_relaxation_fails_the_same_test(make: Callable[[], Model]) -> None:
    assert z_of_gradients(make(), GumbelSoftmax(partial(constant, value=1.0))) > 10


@pytest.mark.parametrize("make", ENUMERABLE.values(), ids=ENUMERABLE)
def test_evaluation_is_exact_where_y_can_be_enumerated(make: Callable[[], Model]) -> None:
    model = make()
    found = measured(model, samples=3)
    assert found.bound == pytest.approx(exact_bound(model, X).mean().item(), abs=1e-5)
    assert found.log_likelihood == pytest.approx(exact_log_likelihood(model, X).mean().item(), abs=1e-5)


@models
def test_evaluation_by_draws_comes_to_the_same(make: Callable[[], Model]) -> None:
    """One discrete draw an image, unbiased; and the importance-weighted bound, which tightens from below."""
    model, many = make(), X.repeat(4000, 1, 1, 1)
    with mock.patch.object(evaluation, "MOST", 1), mock.patch.object(structured, "MOST", 1):
        bound = measured(model, many)
        few, more = measured(model, X.repeat(200, 1, 1, 1), samples=1), measured(model, samples=20_000)
    assert bound.per_image is not None
    error = bound.per_image.bound.std().item() / math.sqrt(len(many))
    exact = exact_bound(model, X).mean().item()
    assert abs(bound.bound - exact) < 4 * error
    likelihood = exact_log_likelihood(model, X).mean().item()
    assert few.log_likelihood is not None
    assert few.log_likelihood < likelihood - 0.05
    q, weight = (torch.stack(column).exp() for column in zip(*outcomes(model, X), strict=True))
    mean = (q * weight).sum(dim=0)
    relative = ((q * weight.square()).sum(dim=0) / mean.square() - 1).sqrt() / math.sqrt(20_000)
    assert more.log_likelihood == pytest.approx(likelihood, abs=4 * relative.norm().item() / len(X))


def measured(model: Model, x: Tensor = X, samples: int = 0) -> Evaluation:
    data = EvaluationData((255 * x).to(torch.uint8), torch.full((len(x),), -1))
    return evaluate(model, data, binarization="none", batch_size=64, importance_samples=samples)


def test_evaluation_does_not_depend_on_the_estimator_and_repeats(tmp_path: Path) -> None:
    model = two_layers()
    assert measured(model, samples=5).means == measured(model, samples=5).means


def test_normalised_layers_keep_images_apart() -> None:
    """Statistics of a minibatch would make f depend on the other images' y."""
    model, other = one_layer(encoder=[4], layer_norm=True), one_layer(encoder=[4])
    together = exact_bound(model, X)
    alone = torch.cat([exact_bound(model, X[row : row + 1]) for row in range(len(X))])
    torch.testing.assert_close(together, alone)
    assert len(list(model.parameters())) == len(list(other.parameters())) + 4


def test_draws_have_their_probabilities() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0]])
    q = logits.softmax(dim=-1)
    drawn = evaluation.classes_at(q, torch.rand(10**5, 1, generator=seeded()))
    assert drawn.sum(dim=-1).eq(1).all()
    assert ((drawn.mean(dim=0) - q).abs() < 4 * (q * (1 - q) / 10**5).sqrt()).all()


def test_no_uniform_number_draws_an_impossible_class() -> None:
    logits = torch.randn(10_000, 1, 10, generator=seeded())
    logits[..., -1] = -60  # with sums of float32, the uniform below 1 draws it for every fifth row
    for uniform in (0.0, 1 - 2**-24):
        drawn = evaluation.classes_at(logits.softmax(dim=-1), torch.full((10_000, 1), uniform))
        assert not drawn[..., -1].any()
    first = torch.tensor([[-200.0, 0.0, 0.0]]).softmax(dim=-1)
    assert evaluation.classes_at(first, torch.zeros(1)).argmax() == 1


@pytest.mark.parametrize("make", [one_layer, partial(structured_model, 1)], ids=["categorical", "structured"])
def test_thousands_of_equal_weights_are_their_mean(make: Callable[[], Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """One draw at a time, of images as improbable as large ones in colour: float32 loses 1.4 nats."""
    model, log_p = make(), -68_000.25
    monkeypatch.setattr(evaluation, "is_enumerable", lambda model: False)
    monkeypatch.setattr(StructuredModel, "is_exact", False)
    monkeypatch.setattr(evaluation, "log_weights", lambda model, x, logits, u: torch.full(u.shape[:2], log_p))
    monkeypatch.setattr(StructuredModel, "log_prob", lambda self, lower, y: torch.full(y.shape[:2], log_p))
    for module in (evaluation, structured):
        monkeypatch.setattr(module, "rows_at_once", lambda pixels: 1)
    draws = [model.noise(len(X), seeded())] * 1000
    assert model.log_likelihood_by(X, draws).tolist() == pytest.approx([log_p] * len(X), abs=0.01)


@pytest.mark.parametrize("make", [one_layer, two_layers])
def test_samples_are_those_of_the_model(make: Callable[[], CategoricalVAE]) -> None:
    """The frequency of each image against sum_y p(y) p(x|y)."""
    model = make()
    drawn = model.sample(20_000, seeded(), draw_pixels=True)
    assert drawn.shape == (20_000, SHAPE.size)
    for x in X:
        p = exact_log_likelihood(model, x.unsqueeze(0)).exp().item()
        share = (drawn == x.flatten()).all(dim=1).float().mean().item()
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / 20_000)


@pytest.mark.parametrize("make", [one_layer, partial(structured_model, 1)], ids=["categorical", "structured"])
def test_the_bound_of_several_samples(make: Callable[[], Model]) -> None:
    """Its mean over draws against enumeration of two y, and it lies between the bound of one and log p(x)."""
    model, weights = make(), Weights(0, 1, 0, samples=2)
    exact = torch.zeros(len(X))
    for (log_a, a), (log_b, b) in product(outcomes(model, X), repeat=2):
        exact += (log_a + log_b).exp() * (torch.logaddexp(a, b) - math.log(2))
    values = [by_objective(model, VIMCO(), X.repeat(500, 1, 1, 1), seed, weights) for seed in range(60)]
    found = torch.stack(values)
    assert abs(found.mean() - exact.mean()) < 4 * found.std() / math.sqrt(60)
    assert exact_bound(model, X).mean() < exact.mean() < exact_log_likelihood(model, X).mean()


def test_the_weight_of_the_bound_scales_j() -> None:
    model = one_layer()
    one, half = (by_objective(model, Marginalization(), X, weights=Weights(0, w, 0)) for w in (1.0, 0.5))
    torch.testing.assert_close(half, one / 2)


def test_the_kl_is_warmed_up() -> None:
    """Steps 0, 1, ... of a warm-up of 4: J less 1/4, 2/4, ... of the KL, and from step 3 on the bound."""
    model, weights = one_layer("uniform"), Weights(0, 1, 0, kl_warmup=4)
    q = model.posterior(X)
    kl = (q * (q.log() + math.log(K))).sum(dim=(-2, -1)).mean()
    for step, weight in enumerate((0.25, 0.5, 0.75, 1.0, 1.0)):
        found = by_objective(
            model, Marginalization(), X, weights=replace(weights, kl_weight=weights.kl_weight_at(step))
        )
        torch.testing.assert_close(found, exact_bound(model, X).mean() + (1 - weight) * kl, rtol=1e-5, atol=1e-5)


def test_the_ratio_is_warmed_up_in_the_bound_of_several_samples() -> None:
    """At weight w each log w_j is w (log p(y)/q(y|x)) + log p(x|y): between log p(x|y) alone and the bound."""
    model = one_layer()

    def j(weight: float) -> Tensor:
        weights = Weights(0, 1, 0, samples=2, kl_warmup=4, kl_weight=weight)
        return by_objective(model, VIMCO(), X, weights=weights)

    torch.testing.assert_close(j(1.0), by_objective(model, VIMCO(), X, weights=Weights(0, 1, 0, samples=2)))
    h = 1e-3  # at the same draws: what grows with w is the mean of the ratio under the weights w_j
    slopes = [(j(w + h) - j(w - h)) / (2 * h) for w in (0.25, 0.75)]
    assert slopes[0] < slopes[1] < 0, slopes  # convex in w, and log p(y)/q(y|x) is negative on average
    assert j(1.0) < j(0.5) < j(0.0)


def test_the_first_logits_are_scaled() -> None:
    def difference(scale: float) -> Tensor:
        torch.manual_seed(0)
        posterior = ToLogits(SHAPE.size, [6], N, K, "relu", layer_norm=True, scale=scale)
        return posterior(X[1:]) - posterior(X[:1])

    torch.testing.assert_close(difference(20.0), 20 * difference(1.0))


def test_the_learned_prior_learns() -> None:
    """At the best prior, the mean of q over images, its gradient vanishes."""
    model = one_layer()
    assert model.prior_logits is not None
    with torch.no_grad():
        model.prior_logits.copy_(model.posterior(X).mean(dim=0).log())
    (gradient,) = torch.autograd.grad(by_objective(model, Marginalization(), X), model.prior_logits)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


# ---- layers ----


def test_each_layer_has_an_estimator_with_state_of_its_own() -> None:
    model, estimator = two_layers(), ScoreFunction(MovingAverage())
    prepared = model.prepared(estimator, SHAPE.size)
    assert isinstance(prepared, Layers)
    model.objective(prepared, WEIGHTS, X, NONE, step=0, generator=seeded())
    first, second = (of_layer(prepared, layer) for layer in (0, 1))
    assert isinstance(first, ScoreFunction)
    assert isinstance(second, ScoreFunction)
    assert first.baseline.average != second.baseline.average
    assert prepared.name == "ScoreFunction"
    assert prepared.depends_on(3) == (None, None)
    assert len([name for name in prepared.state_dict() if "average" in name]) == 2


@pytest.mark.parametrize("make", [lambda: ScoreFunction(LearnedBaseline(4)), lambda: RELAX(0.5, 1.0, 1, 4)])
def test_losses_of_estimators_of_all_layers_are_there(make: Callable[[], Estimator]) -> None:
    """And reach no parameter of the model."""
    model = two_layers()
    prepared = model.prepared(make(), SHAPE.size)
    found = model.objective(prepared, WEIGHTS, X, NONE, step=0, generator=seeded())
    auxiliary = found.loss + found.terms["J"]
    for layer in (0, 1):
        own = list(of_layer(prepared, layer).parameters())
        grads = torch.autograd.grad(auxiliary, own, retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().sum() > 0 for g in grads)
    with_loss, without = (
        torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
        for value in (-found.loss, found.terms["J"])
    )
    for a, b in zip(with_loss, without, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_relaxed_kl_needs_one_layer() -> None:
    relaxed = GumbelSoftmax(partial(constant, value=1.0), kl="relaxed")
    assert in_layers(relaxed, [(2, 3)], 8) is relaxed
    with pytest.raises(ValueError, match="kl must be analytic or sampled with 2 layers"):
        in_layers(relaxed, [(2, 3), (1, 3)], 8)


@pytest.mark.parametrize("kl", ["analytic", "sampled"])
def test_relaxed_training_of_two_layers_raises_the_bound(kl: str) -> None:
    torch.manual_seed(0)
    model = two_layers()
    prepared = model.prepared(GumbelSoftmax(partial(constant, value=0.5), kl=kl), SHAPE.size)  # type: ignore[arg-type]
    optimizer, before = torch.optim.Adam(model.parameters(), lr=0.03), exact_bound(model, X).mean()
    for step in range(150):
        optimizer.zero_grad()
        model.objective(prepared, WEIGHTS, X, NONE, step=step, generator=seeded(step)).loss.backward()
        optimizer.step()
    assert exact_bound(model, X).mean() > before + 2


# ---- the laboratory, pictures, alarms ----


@models
def test_gradient_quality_of_the_exact_estimator(make: Callable[[], Model]) -> None:
    found = gradient_quality(make(), Marginalization(), X, step=0, draws=3, seed=0)
    assert found.reference_draws == 0
    for part in found.parts.values():
        assert abs(part.bias_squared) < 1e-9
        assert part.variance < 1e-9


def test_gradient_quality_without_enumeration_says_the_same() -> None:
    """A long average of an unbiased estimator, and its error, instead of the exact gradient."""
    model, estimator = one_layer(), GumbelSoftmax(partial(constant, value=1.0))
    exact = gradient_quality(model, estimator, X, step=0, draws=400, seed=0)
    with mock.patch.object(contract, "reference", return_value=(IndeCateR(), False)):
        found = gradient_quality(model, estimator, X, step=0, draws=400, seed=0, reference_draws=400)
        unbiased = gradient_quality(model, IndeCateR(), X, step=0, draws=400, seed=1, reference_draws=400)
    assert found.reference_draws == 400
    assert list(found.parts) == ["logits", "posterior", "generator"]
    for name, part in found.parts.items():
        wanted = exact.parts[name]
        assert abs(part.bias_squared - wanted.bias_squared) < 4 * (part.bias_squared_error + wanted.bias_squared_error)
        assert part.variance == pytest.approx(wanted.variance, rel=0.05)
        assert 0 < found.reference_error[name] < 0.05
        other = unbiased.parts[name]
        assert abs(other.bias_squared) < 4 * other.bias_squared_error


@models
def test_pictures(make: Callable[[], Model]) -> None:
    model = make()
    seen = measured(model).per_image
    with torch.no_grad():
        for tag, picture in model.pictures(X, seeded(), seen).items():
            assert picture.dtype == torch.uint8, tag
            assert picture.shape[0] in (1, 3), tag
            assert picture.float().std() > 0, tag
        for kind, takes_images in model.kinds.items():
            picture = model.draw(kind, X.shape[1:], 4, seeded(), X if takes_images else None)
            assert picture.dtype == torch.uint8


def test_completions_keep_the_upper_half() -> None:
    model = structured_model()
    with torch.no_grad():
        sheet = model.draw("completions", X.shape[1:], 3, seeded(), X)
    tile = sheet[0, 2:6, 2:4].float() / 255
    assert torch.equal(tile, X[0, 0])
    drawn = sheet[0, 2:6, 2 + 2 * 4 : 2 + 2 * 4 + 2].float() / 255  # after the whole and the half
    assert torch.equal(drawn[:2], X[0, 0, :2])


def test_what_variables_tell() -> None:
    """One that always tells the image, one that never does: log 2 and 0 nats."""
    q = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]])
    torch.testing.assert_close(information(q).float(), torch.tensor([math.log(2), 0.0]))
    assert use_of_variables(q).shape[0] == 3


@pytest.mark.parametrize(("dead", "up"), [(4, True), (3, True), (2, False), (0, False)])
def test_the_alarm_of_unused_variables(dead: int, up: bool) -> None:
    q = torch.eye(2).repeat(50, 1).unsqueeze(1).repeat(1, 4, 1)
    q[:, :dead] = torch.tensor([0.7, 0.3])
    found = alarms(Evaluation(None, -1.0, -1.0, seen=PerImage(q, torch.zeros(len(q)))))
    assert [alarm.up for alarm in found] == [up]
    assert f"{dead} of 4 variables" in found[0].sentence
    assert f"{UNUSED:g} nats" in found[0].sentence


# ---- runs ----

LINE = "data=digits model={} train.steps=8 train.validate_every=4 train.checkpoint_every=3 train.log_every=1 "
LINE += "train.batch_size_unlabelled=20 evaluation.importance_samples=3 evaluation.validation_samples=2 device=cpu "
LINE += "precision=fp32 data.num_validation=40 model.variables=3 model.classes=4 "
LINES = {
    "one layer": LINE.format("categorical_mlp") + "model.decoder=[8]",
    "two layers": LINE.format("categorical_two_layers")
    + "model.upper_variables=2 estimator=score_function diagnostics.every=4 diagnostics.draws=3",
    "structured": LINE.format("structured_mlp") + "estimator=st_gumbel_softmax diagnostics.every=4 diagnostics.draws=3",
    "several samples": LINE.format("categorical_mlp") + "estimator=vimco objective.samples=5 data.binarization=fixed",
    "not enumerable": LINE.format("categorical_mlp").replace("variables=3", "variables=9")
    + "estimator=reinmax diagnostics.every=4 diagnostics.draws=3 diagnostics.batch_size=5",
}
lines = pytest.mark.parametrize("line", LINES.values(), ids=LINES)


@lines
def test_a_stopped_run_goes_on_as_if_it_was_not(line: str, tmp_path: Path) -> None:
    run(line, tmp_path / "whole")
    run(line.replace("train.steps=8", "train.steps=8 hydra.job.chdir=false"), tmp_path / "again")
    assert equal(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "again"))
    short = f"{line} lr_factor=constant schedule@estimator.temperature=constant" if "vimco" not in line else line
    short = short.replace(" schedule@estimator.temperature=constant", "") if "score" in line else short
    short = short.replace("train.steps=8", "train.steps={}") + " lr_factor=constant"
    run(short.format(8), tmp_path / "one")
    run(short.format(5), tmp_path / "two")
    resume(tmp_path / "two", "train.steps=8")
    assert equal(checkpoint(tmp_path / "one")["model"], checkpoint(tmp_path / "two")["model"])
    assert_same_events(tmp_path / "whole", tmp_path / "again")


@lines
def test_what_a_run_leaves(line: str, tmp_path: Path) -> None:
    from training.run_folder import read_json

    ended = run(line, tmp_path / "run")
    result = read_json(tmp_path / "run" / "result.json")
    assert result["test_accuracy"] is None
    assert result["val_bound"] < result["val_log_likelihood"]
    assert result["test_bound"] < result["test_log_likelihood"]
    assert f"bound {result['test_bound']:.2f}" in ended.said
    tags = events(tmp_path / "run").Tags()
    assert {"train/J", "train/entropy_y", "val/bound", "val/log_likelihood"} <= set(tags["scalars"])
    assert "warning/variables_unused" in tags["scalars"]
    assert {"use_of_variables"} <= set(tags["images"])
    if "diagnostics.every" in line:
        assert "diagnostics/bias_squared_logits" in tags["scalars"]


@pytest.mark.parametrize("make", [two_layers, structured_model])
@pytest.mark.parametrize(
    "estimator",
    [
        Marginalization(),
        IndeCateR(),
        ScoreFunction(LeaveOneOut(), 2),
        RELAX(0.7),
        GumbelSoftmax(partial(constant, value=0.7)),
    ],
    ids=lambda estimator: estimator.name,
)
def test_evaluations_are_the_rows_of_the_innermost_cost(make: Callable[[], Model], estimator: Estimator) -> None:
    model = make()
    estimator, rows = model.prepared(estimator, 8), 0
    innermost = model.generators[-1] if isinstance(model, CategoricalVAE) else model.generator

    def count(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal rows
        samples, batch = inputs[0].shape[:2]
        rows += samples * batch

    assert isinstance(innermost, torch.nn.Module)
    innermost.register_forward_pre_hook(count)
    made = model.objective(estimator, WEIGHTS, X, NONE, step=0, generator=seeded())
    assert made.metrics["evaluations"] == rows / len(X) > 0


@pytest.mark.parametrize("make", [two_layers, structured_model])
def test_what_enumeration_tries_beforehand_counts_for_nothing(
    make: Callable[[], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marginalization, "FEW", 2)
    model = make()
    estimator = model.prepared(Marginalization(), 8)
    for step in range(2):
        made = model.objective(estimator, WEIGHTS, X, NONE, step=step, generator=seeded())
        assert made.metrics["evaluations"] == math.prod(classes**variables for variables, classes in model.latents)


def test_only_one_layer_tells_the_parts_of_its_bound() -> None:
    """In layers the estimate's value has the layers above in it, and its KL is no KL."""
    for make, parts in ((one_layer, {"reconstruction", "kl_y"}), (two_layers, set())):
        model = make()
        estimator = model.prepared(Marginalization(), 8)
        made = model.objective(estimator, WEIGHTS, X, NONE, step=0, generator=seeded())
        assert set(made.terms) == {"J", "entropy_y"} | parts


def test_what_pixels_drawn_from_grey_levels_have_is_a_bound(tmp_path: Path) -> None:
    """E[log p(b)] over b is no less than its terms by mean pixels, also where y is enumerated."""
    small = "model=categorical_mlp model.variables=2 model.classes=3 estimator=marginalization"
    for pixels, sign in (
        ("threshold", "log p(x) ="),
        ("none likelihood=bernoulli", "b drawn from the grey levels, >="),
    ):
        said = run(f"data=digits {small} data.binarization={pixels} train.steps=2", tmp_path / pixels[:4]).said
        assert f"{sign} -" in said


REFUSED = [
    ("model=categorical_mlp estimator=marginalization", "10^20", "marginalization, sum_and_sample"),
    ("model=categorical_mlp estimator=sum_and_sample", "10^20"),
    ("model=structured_mlp estimator=sparsemax", "10^20"),
    ("model=categorical_mlp data.num_labelled=50", "data.num_labelled must be 0", "got 50"),
    ("model=categorical_mlp train.batch_size_labelled=5", "train.batch_size_labelled must be 0"),
    ("model=categorical_mlp objective.alpha=1", "objective.alpha must be 0", "got 1"),
    ("model=categorical_mlp objective=semi_supervised", "objective.labelled must be 0"),
    ("model=categorical_mlp prior=labelled", "prior must be uniform"),
    ("model=categorical_mlp prior=[0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1]", "prior must be uniform", "model.prior"),
    ("model=categorical_mlp model.variables=0", "model.variables must be >= 1, got 0"),
    ("model=categorical_mlp model.classes=1", "model.classes must be >= 2, got 1"),
    ("model=categorical_mlp model.logits_scale=0", "model.logits_scale must be > 0 and finite, got 0"),
    ("model=categorical_mlp model.prior=some", "model.prior must be one of uniform, learned"),
    ("model=categorical_mlp model.decoder=200", "model.decoder must be"),
    ("model=categorical_mlp 'model.decoder=[x]'", "model.decoder must be a list of integers, got [x]"),
    ("model=categorical_mlp 'model.encoder=[300,0]'", "model.encoder must be widths >= 1, got [300, 0]"),
    ("model=structured_mlp 'model.between=[-1]'", "model.between must be widths >= 1, got [-1]"),
    ("model=categorical_two_layers model.upper_variables=0", "model.upper_variables must be >= 1, got 0"),
    ("model=categorical_mlp objective.unlabelled=0", "objective.unlabelled (or .alpha, with labels) must be > 0"),
    ("model=structured_mlp estimator=concrete", "estimator.kl must be analytic where J has no KL, got relaxed"),
    (
        "model=categorical_mlp estimator=vimco objective.samples=3 diagnostics.every=2",
        "diagnostics.every must be 0 with objective.samples=3",
        "got 2",
    ),
    ("model=categorical_mlp model.latent_size=50", "model.latent_size"),
    ("model=categorical_two_layers objective.samples=2", "objective.samples must be 1 with a model of 2 layers"),
    ("model=categorical_two_layers estimator.kl=relaxed", "estimator.kl must be analytic or sampled", "got relaxed"),
    ("model=categorical_mlp estimator=reinmax objective.samples=5", "vimco, gumbel_softmax"),
    ("model=categorical_mlp objective.samples=5", "kl must be sampled or relaxed"),
    ("model=categorical_mlp objective.samples=0", "objective.samples must be >= 1, got 0"),
    ("model=categorical_mlp objective.kl_warmup=-1", "objective.kl_warmup must be >= 0, got -1"),
    (
        "model=categorical_mlp train.steps=5 objective.kl_warmup=9",
        "objective.kl_warmup must be <= train.steps, 5, got 9",
    ),
    ("model=categorical_two_layers objective.kl_warmup=9", "objective.kl_warmup must be 0 with a model of 2 layers"),
    ("model=structured_mlp objective.kl_warmup=9", "objective.kl_warmup must be 0 where J has no KL, got 9"),
    ("model=structured_mlp model.layers=1 estimator.kl=sampled", "estimator.kl must be analytic where J has no KL"),
    ("model=categorical_mlp objective.labels_first=9", "objective.labels_first must be 0 with a model without labels"),
    (
        "model=categorical_mlp +objective.distortion_fades=9",
        "objective.distortion_fades must be null with a model without labels",
    ),
    ("objective.kl_warmup=9", "objective.kl_warmup must be 0 with a model that learns from labels, got 9"),
    ("model=categorical_mlp evaluation.classify_by=both", "classifier with a model that tells no classes, got both"),
    (
        "model=categorical_mlp data.binarization=dynamic evaluation.pixel_draws=3",
        "1 with a model that tells no classes",
    ),
    ("objective.samples=5", "objective.samples must be 1 with a model that learns from labels", "categorical_mlp"),
    ("model=structured_mlp model.layers=0", "model.layers must be >= 1, got 0"),
    ("model=categorical_mlp estimator=score_function estimator.temperature=1", "estimator.temperature"),
    ("data.num_labelled=0", "data.num_labelled must be"),
]


class LearnedClusters(Model):
    """p(y) p(x|y) with p(y) learned, as somebody may write it by models/contract.py alone."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.likelihood = [(1, 3)], Bernoulli()
        self.encoder, self.decoder = torch.nn.Linear(4, 3), torch.nn.Linear(3, 4)
        self.prior_logits = torch.nn.Parameter(torch.tensor([[0.0, 1.0, -1.0]]))

    @property
    def log_prior(self) -> Tensor:  # type: ignore[override]
        return self.prior_logits.log_softmax(dim=-1)

    def categorical_term(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, contract.Estimation]:
        logits = self.encoder(x.flatten(1)).unsqueeze(1)

        def f(y: Tensor) -> Tensor:
            return self.likelihood.log_prob(self.decoder(y.flatten(-2)), x.flatten(1))

        return logits, lambda estimator, step, generator: estimator(
            f, logits, step=step, context=x, generator=generator
        )


def test_a_prior_that_a_family_of_ones_own_learns_is_that_of_each_step() -> None:
    torch.manual_seed(0)
    model, x = LearnedClusters(), torch.rand(5, 1, 2, 2).round()
    estimator = model.prepared(Marginalization(), 4)
    optimizer, nothing = torch.optim.SGD(model.parameters(), lr=1.0), torch.Generator()
    for step in range(3):
        made = model.objective(estimator, Weights(0, 1, 0), x, torch.empty(0, 10), step=step, generator=nothing)
        q = model.encoder(x.flatten(1)).softmax(dim=-1)
        kl = (q * (q.log() - model.log_prior)).sum(dim=-1).mean()
        torch.testing.assert_close(made.terms["kl_y"], kl)
        optimizer.zero_grad()
        made.loss.backward()
        optimizer.step()


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[0])
def test_refused_in_one_sentence(case: tuple[str, ...], tmp_path: Path) -> None:
    line, *parts = case
    ended = command(train.main, f"data=digits {line} hydra.run.dir={tmp_path / 'run'}")
    assert ended.code == 2, ended.said
    assert len(ended.err.strip().splitlines()) == 1
    assert "Traceback" not in ended.said
    for part in parts:
        assert part in ended.err
    assert not (tmp_path / "run").exists()
