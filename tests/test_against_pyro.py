"""Holds the bounds, J, its gradients and the unbiased estimators to Pyro, a reference that nobody here wrote.

M2 and the auxiliary models are written here once more as a Pyro program and its guide; Pyro enumerates y and weighs
densities. The networks are the only thing that both sides share.

Where y is enumerated, Pyro takes log q(z|x,y) - log p(z) at the draw of z instead of KL(q(z|x,y) || p(z)). That
difference is quadratic in z's noise and has no products of two coordinates, so over noise vectors whose mean is 0 and
mean square is 1 in each coordinate its mean *is* the KL. Every image here comes NODES times, with such noise
(`matched`), and both sides then agree to rounding, with no integral left to approximate. An auxiliary a is the same in
all of them, as what z's KL is depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data.batches import EvaluationData
from estimators.contract import Estimator
from estimators.marginalization import Marginalization
from models.auxiliary.model import AuxiliaryVAE
from models.auxiliary.networks import auxiliary_conv, auxiliary_mlp
from models.contract import Objective, Weights
from models.evaluation import evaluate
from models.m2.model import SemiSupervisedVAE
from models.m2.objective import objective
from models.networks import ImageShape, conv, mlp
from tests.test_estimators import BIASED, UNBIASED, Case, each

pytest.importorskip("pyro", reason="needs pyro-ppl, which is among the development dependencies")
import pyro
import pyro.distributions as dist
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger

K = 4
Z = 2
A = 3
SHAPE = ImageShape(1, 9, 8)
LABELLED, UNLABELLED, NODES = 2, 3, 3
WEIGHTS = Weights(labelled=0.7, unlabelled=1.3, alpha=5.0)
REPEATS, COPIES = 100, 128  # gradients of an estimator, and draws of y in each for every image and noise vector
ROUNDING = 1e-11  # what float64 may add to a mean gradient


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matched(images: int, seed: int) -> Tensor:
    """Noise [NODES * images, Z] whose mean is 0 and mean square 1 over each image's NODES rows."""
    noise = torch.randn(NODES, images, Z, generator=seeded(seed), dtype=torch.float64)
    noise -= noise.mean(dim=0)
    noise /= noise.square().mean(dim=0).sqrt()
    return noise.flatten(0, 1)


@dataclass
class Batch:
    """Labelled and unlabelled images [N, 1, 9, 8], their noise [N, Z], and one-hot labels [N, K]."""

    x_labelled: Tensor
    y_labelled: Tensor
    x_unlabelled: Tensor
    noise: tuple[Tensor, Tensor]

    def rows(self, image: int) -> Batch:
        """The NODES rows of one image of each kind."""
        labelled, unlabelled = slice(image % LABELLED, None, LABELLED), slice(image, None, UNLABELLED)
        return Batch(
            self.x_labelled[labelled],
            self.y_labelled[labelled],
            self.x_unlabelled[unlabelled],
            (self.noise[0][labelled], self.noise[1][unlabelled]),
        )

    def copies(self, count: int) -> Batch:
        return Batch(
            self.x_labelled,
            self.y_labelled,
            self.x_unlabelled.repeat(count, 1, 1, 1),
            (self.noise[0], self.noise[1].repeat(count, 1)),
        )


def images(count: int, seed: int) -> Tensor:
    return torch.rand(count, SHAPE.channels, SHAPE.height, SHAPE.width, generator=seeded(seed)).round()


BATCH = Batch(
    images(LABELLED, 0).double().repeat(NODES, 1, 1, 1),
    torch.eye(K, dtype=torch.float64)[[2, 0]].repeat(NODES, 1),
    images(UNLABELLED, 1).double().repeat(NODES, 1, 1, 1),
    (matched(LABELLED, 2), matched(UNLABELLED, 3)),
)


def make_mlp() -> SemiSupervisedVAE:
    return randomised(SemiSupervisedVAE(mlp(SHAPE, K, latent_size=Z, hidden=5, dropout=0.0, scale="softplus")))


def make_conv() -> SemiSupervisedVAE:
    networks = conv(SHAPE, K, latent_size=Z, channels=3, hidden=5, dropout=0.0, scale="exp")
    return randomised(SemiSupervisedVAE(networks))


def make_adgm() -> SemiSupervisedVAE:
    sizes: Any = {"latent_size": Z, "auxiliary_size": A, "hidden": 5, "dropout": 0.0, "scale": "softplus"}
    return randomised(AuxiliaryVAE(auxiliary_mlp(SHAPE, K, **sizes, skip=False)))


def make_sdgm() -> SemiSupervisedVAE:
    sizes: Any = {"latent_size": Z, "auxiliary_size": A, "hidden": 5, "dropout": 0.0, "scale": "softplus"}
    return randomised(AuxiliaryVAE(auxiliary_conv(SHAPE, K, **sizes, channels=3, skip=True)))


def batch_for(model: SemiSupervisedVAE) -> Batch:
    """BATCH, for a model with an auxiliary a with noise [N, A + Z], of which a's is the same over an image's rows."""
    if not isinstance(model, AuxiliaryVAE):
        return BATCH
    of_a = (torch.randn(number, A, generator=seeded(number)).repeat(NODES, 1) for number in (LABELLED, UNLABELLED))
    labelled, unlabelled = (torch.cat(both, dim=1) for both in zip(of_a, BATCH.noise, strict=True))
    return replace(BATCH, noise=(labelled, unlabelled))


def by_variable(model: SemiSupervisedVAE, noise: Tensor) -> tuple[Tensor, ...]:
    """The noise of a row in the order in which the guide draws, where there is an a that of a first."""
    return noise.split([A, Z], dim=1) if isinstance(model, AuxiliaryVAE) else (noise,)


def randomised(model: SemiSupervisedVAE) -> SemiSupervisedVAE:
    """With weights so large that classes, images and z matter; evaluation mode, where an image is on its own."""
    generator = seeded(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5, generator=generator)
    return model.eval()


@pytest.fixture(autouse=True)
def in_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All is computed in float64, what the program brings to float32 too: no CPU's rounding is taken for bias."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


MODELS = [make_mlp, make_conv, make_adgm, make_sdgm]
on_each_model = pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__.removeprefix("make_"))
Make = Callable[[], SemiSupervisedVAE]


# --- the models in Pyro


def p(model: SemiSupervisedVAE, name: str, x: Tensor, y: Tensor | None = None) -> Tensor | None:
    """p(y) p(z) [p(a|x,y,z)] p(x|y,z[,a]), with x and, where it is given, y observed; a, if there is one."""
    y = pyro.sample(f"y_{name}", dist.OneHotCategorical(probs=torch.full((K,), 1 / K)), obs=y)
    z = pyro.sample(f"z_{name}", dist.Normal(torch.zeros(Z), torch.ones(Z)).to_event(1))
    latent, a = with_samples(z), None
    if isinstance(model, AuxiliaryVAE):
        loc, scale = model.auxiliary_generator(model.auxiliary_generator.features(x), with_samples(y), latent)
        shape = (*z.shape[:-1], A)
        a = pyro.sample(f"a_{name}", dist.Normal(loc.reshape(shape), scale.reshape(shape)).to_event(1))
        if model.skip:
            latent = torch.cat([latent, with_samples(a).expand(*latent.shape[:2], A)], dim=-1)
    logits = model.generator(with_samples(y), latent).reshape(*z.shape[:-1], SHAPE.size)
    pyro.sample(f"x_{name}", dist.Bernoulli(logits=logits).to_event(1), obs=x.flatten(1))
    return a


def q_of_a(model: SemiSupervisedVAE, name: str, x: Tensor) -> Tensor | None:
    if not isinstance(model, AuxiliaryVAE):
        return None
    return torch.as_tensor(pyro.sample(f"a_{name}", dist.Normal(*model.auxiliary(x)).to_event(1)))


def q_of_y(model: SemiSupervisedVAE, x: Tensor, a: Tensor | None = None) -> Any:
    if a is None:
        return dist.OneHotCategorical(logits=model.classifier(x))
    assert isinstance(model, AuxiliaryVAE)
    return dist.OneHotCategorical(logits=model.classifier(model.classifier.features(x), a))


def q_of_z(model: SemiSupervisedVAE, name: str, x: Tensor, y: Tensor, a: Tensor | None = None) -> None:
    given = (x,) if a is None else (x, a)
    features = model.inference.features(*given)
    loc, scale = model.inference(features, with_samples(y))
    shape = (*torch.broadcast_shapes(y.shape[:-1], (len(x),)), Z)
    pyro.sample(f"z_{name}", dist.Normal(loc.reshape(shape), scale.reshape(shape)).to_event(1))


def with_samples(y: Tensor) -> Tensor:
    """[S, B, ...] as the networks take it, where Pyro has no axis to the left of the images unless it enumerates."""
    return y.reshape(-1, *y.shape[-2:])


def labelled_program(model: SemiSupervisedVAE, x: Tensor, y: Tensor) -> Tensor | None:
    with pyro.plate("labelled", len(x)):
        return p(model, "labelled", x, y)


def labelled_guide(model: SemiSupervisedVAE, x: Tensor, y: Tensor) -> None:
    with pyro.plate("labelled", len(x)):
        q_of_z(model, "labelled", x, y, q_of_a(model, "labelled", x))


def unlabelled_program(model: SemiSupervisedVAE, x: Tensor) -> None:
    with pyro.plate("unlabelled", len(x)):
        p(model, "unlabelled", x)


def unlabelled_guide(model: SemiSupervisedVAE, x: Tensor) -> None:
    with pyro.plate("unlabelled", len(x)):
        a = q_of_a(model, "unlabelled", x)
        y = pyro.sample("y_unlabelled", q_of_y(model, x, a), infer={"enumerate": "parallel"})
        q_of_z(model, "unlabelled", x, y, a)


def program(model: SemiSupervisedVAE, batch: Batch, weights: Weights) -> None:
    """J: both bounds and, as one more observation, the label given the image."""
    labelled, unlabelled = len(batch.x_labelled), len(batch.x_unlabelled)
    with pyro.poutine.scale(scale=weights.labelled / labelled):
        a = labelled_program(model, batch.x_labelled, batch.y_labelled)
    with pyro.poutine.scale(scale=weights.unlabelled / unlabelled):
        unlabelled_program(model, batch.x_unlabelled)
    with pyro.plate("classified", labelled), pyro.poutine.scale(scale=weights.alpha / labelled):
        pyro.sample("label", q_of_y(model, batch.x_labelled, a), obs=batch.y_labelled)


def guide(model: SemiSupervisedVAE, batch: Batch, weights: Weights) -> None:
    with pyro.poutine.scale(scale=weights.labelled / len(batch.x_labelled)):
        labelled_guide(model, batch.x_labelled, batch.y_labelled)
    with pyro.poutine.scale(scale=weights.unlabelled / len(batch.x_unlabelled)):
        unlabelled_guide(model, batch.x_unlabelled)


class WithNoise(Messenger):
    """Makes each a and z of a guide loc + scale * noise, of the next noise, differentiable; densities count."""

    def __init__(self, *noise: Tensor) -> None:
        super().__init__()
        self.noise: Iterator[Tensor] = cycle(noise)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"].startswith(("a_", "z_")):
            normal = msg["fn"].base_dist
            msg["value"] = normal.loc + normal.scale * next(self.noise)


def gradient(value: Tensor, module: nn.Module) -> Tensor:
    """With respect to all parameters of a module, in one vector."""
    inputs = list(module.parameters())
    found = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([one.flatten() for one in found])


def pyro_bound(elbo: Any, program: Any, guide: Any, *arguments: Any, noise: tuple[Tensor, ...]) -> Tensor:
    """The evidence's lower bound by Pyro, which keeps no parameters and draws nothing here."""
    before, kept_before = torch.get_rng_state(), list(pyro.get_param_store())  # other tests train with Pyro
    loss: Tensor = elbo.differentiable_loss(program, WithNoise(*noise)(guide), *arguments)
    assert torch.equal(torch.get_rng_state(), before)
    assert list(pyro.get_param_store()) == kept_before
    return -loss


def pyro_j(model: SemiSupervisedVAE) -> Tensor:
    elbo, batch = TraceEnum_ELBO(max_plate_nesting=1), batch_for(model)
    noise = tuple(part for rows in batch.noise for part in by_variable(model, rows))
    return pyro_bound(elbo, program, guide, model, batch, WEIGHTS, noise=noise)


def ours(
    model: SemiSupervisedVAE, batch: Batch, estimator: Estimator, monkeypatch: pytest.MonkeyPatch, seed: int = 0
) -> Objective:
    noise = torch.cat(batch.noise)
    monkeypatch.setattr(model, "noise", lambda number, generator: noise)
    return objective(
        model,
        estimator,
        WEIGHTS,
        torch.cat([batch.x_labelled, batch.x_unlabelled]),
        batch.y_labelled,
        step=0,
        generator=seeded(seed),
    )


def assert_same(actual: Tensor, expected: Tensor, model: SemiSupervisedVAE, *, classified: bool = True) -> None:
    """The same value and gradient, to rounding; the gradient is nonzero in each network, or all but the classifier."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    networks = {name: module for name, module in model.named_children() if list(module.parameters())}
    for name, network in networks.items():
        found, truth = gradient(actual, network), gradient(expected, network)
        largest = float(truth.abs().max())
        assert (largest > 0.01) == (classified or name != "classifier")
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-12 * largest)


# --- the bounds, J, and evaluation


@on_each_model
@pytest.mark.parametrize("image", range(UNLABELLED))
def test_unlabelled_bound_is_the_one_that_pyro_enumerates(
    make: Make, image: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    rows = batch_for(model).rows(image)
    actual = ours(model, rows, Marginalization(), monkeypatch).terms["unlabelled_bound"]
    elbo, noise = TraceEnum_ELBO(max_plate_nesting=1), by_variable(model, rows.noise[1])
    expected = pyro_bound(elbo, unlabelled_program, unlabelled_guide, model, rows.x_unlabelled, noise=noise)
    assert_same(actual, expected / NODES, model)


@pytest.mark.parametrize("image", range(LABELLED))
@pytest.mark.parametrize(
    ("make", "elbo"),
    # the KL of a has no closed form
    [*((make, Trace_ELBO) for make in MODELS), *((make, TraceMeanField_ELBO) for make in (make_mlp, make_conv))],
)
def test_labelled_bound_is_pyro_s(make: Make, image: int, elbo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    rows = batch_for(model).rows(image)
    actual = ours(model, rows, Marginalization(), monkeypatch).terms["labelled_bound"]
    arguments, noise = (model, rows.x_labelled, rows.y_labelled), by_variable(model, rows.noise[0])
    expected = pyro_bound(elbo(), labelled_program, labelled_guide, *arguments, noise=noise)
    assert_same(actual, expected / NODES, model, classified=False)


@on_each_model
def test_j_is_one_pyro_program(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    result = ours(model, batch_for(model), Marginalization(), monkeypatch)
    expected = pyro_j(model)
    assert_same(result.terms["J"], expected, model)
    assert_same(result.loss, -expected, model)


def test_evaluation_measures_pyro_s_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_mlp()
    monkeypatch.setattr(model, "noise", lambda number, generator: BATCH.noise[1])
    x = BATCH.x_unlabelled
    data = EvaluationData((255 * x).to(torch.uint8), torch.zeros(len(x), dtype=torch.long))
    actual = evaluate(model, data, binarization="none", batch_size=len(x)).bound
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    expected = pyro_bound(elbo, unlabelled_program, unlabelled_guide, model, x, noise=BATCH.noise[1:])
    assert actual == pytest.approx(expected.item() / len(x), rel=1e-12)


def test_log_weights_give_pyro_s_bound_at_any_noise() -> None:
    """sum_y q(y|x) log [p(x|y,z) p(z) / q(z|x,y)] - KL(q(y|x) || p(y)), at noise of no particular moments."""
    model, x = make_mlp(), BATCH.x_unlabelled
    noise = torch.randn(len(x), Z, generator=seeded(5))
    classes = torch.eye(K).unsqueeze(1).expand(-1, len(x), -1)
    weights = model.log_weight_at(classes, model.rows_by_noise(x)(noise))
    logits = model.classifier(x).unsqueeze(1)
    estimate = Marginalization()(lambda y: weights, logits, step=0, context=x, generator=seeded(0))
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    expected = pyro_bound(elbo, unlabelled_program, unlabelled_guide, model, x, noise=(noise,))
    assert_same((estimate.value - estimate.kl).sum(), expected, model)


@torch.no_grad()
@on_each_model
@pytest.mark.parametrize("samples", [1, 5])
def test_importance_weighted_estimate_is_pyro_s(make: Make, samples: int) -> None:
    """Pyro's importance-weighted bound of log p(x, y), class by class: a sum over y is all that is added to it."""
    model = make()
    noise = list(torch.randn(samples, UNLABELLED, batch_for(model).noise[0].shape[1], generator=seeded(6)))
    actual = model.log_likelihood_by(BATCH.x_unlabelled[:UNLABELLED], noise)
    elbo = RenyiELBO(alpha=0, num_particles=samples)
    for image in range(UNLABELLED):
        x = BATCH.x_unlabelled[image : image + 1]
        joint = []
        for k in range(K):
            fixed = WithNoise(*(part for one in noise for part in by_variable(model, one[image : image + 1])))
            joint.append(-elbo.loss(labelled_program, fixed(labelled_guide), model, x, torch.eye(K)[k : k + 1]))
        expected = torch.tensor(joint).logsumexp(dim=0)
        torch.testing.assert_close(actual[image], expected, rtol=1e-11, atol=0)


# --- estimators inside the model: their mean gradient is the one that Pyro enumerates


def gradient_z(case: Case, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """|mean gradient of J - Pyro's| in standard errors, for every parameter of the model, over REPEATS minibatches."""
    model, batch, estimator = make_mlp(), BATCH.copies(COPIES), case.make()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        estimator.prepare(SHAPE.size, 1, K)
        with torch.no_grad():
            for parameter in estimator.parameters():  # away from zero, where a wrong term could hide
                parameter.add_(0.5 * torch.randn_like(parameter))
    losses = (ours(model, batch, estimator, monkeypatch, seed).loss for seed in range(REPEATS))
    found = -torch.stack([gradient(loss, model) for loss in losses])
    assert found.dtype == torch.float64
    error = found.std(dim=0) / math.sqrt(len(found)) + ROUNDING
    return (found.mean(dim=0) - gradient(pyro_j(model), model)).abs() / error


@each(UNBIASED)
def test_mean_gradient_of_j_is_pyro_s(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gradient_z(case, monkeypatch).max() < 4


@each(BIASED)
def test_biased_estimators_are_found_out(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gradient_z(case, monkeypatch).max() > 4
