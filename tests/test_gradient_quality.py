"""The laboratory: gradients against the exact one, by closed forms; diagnostics in a run; and the script."""

from __future__ import annotations

import csv
import math
import shlex
import subprocess
import sys
from functools import partial
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn

from configs.check import typed
from configs.schema import ConfigError
from configs.targets import build
from estimators.contract import Estimate, Estimator, with_gradient_of
from estimators.gumbel_softmax import GumbelSoftmax
from estimators.marginalization import Marginalization
from estimators.schedules import constant
from estimators.score_function import LearnedBaseline, LeaveOneOut, MovingAverage, NoBaseline, ScoreFunction
from models.gradient_quality import Measurement, Quality, gradient_quality, squared_mean, warm_up
from models.m2.model import SemiSupervisedVAE
from models.networks import ImageShape, conv, mlp
from scripts import benchmark
from scripts import gradient_quality as script
from scripts import gradient_report as report
from tests.runs import (
    CONV,
    ESTIMATORS,
    FAMILIES,
    MLP,
    SLOWLY,
    Ended,
    checkpoint,
    command,
    curve,
    equal,
    events,
    resume,
    run,
)
from training.run import Run
from training.saved import stored_run
from training.state import plain

PARTS = ("logits", "classifier", "inference", "generator")

SHAPE, CLASSES, IMAGES = ImageShape(1, 4, 4), 3, 5


@pytest.fixture(scope="module")
def model() -> SemiSupervisedVAE:
    """Small, and with parameters large enough that the bounds of the classes differ by some nats."""
    torch.manual_seed(0)
    made = SemiSupervisedVAE(mlp(SHAPE, CLASSES, latent_size=2, hidden=6, dropout=0.5, scale="softplus"))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3)
    return made


def images() -> Tensor:
    return torch.rand(IMAGES, 1, 4, 4, generator=torch.Generator().manual_seed(0)).round()


def measure(model: SemiSupervisedVAE, estimator: Estimator, *, draws: int = 40, seed: int = 0) -> Measurement:
    return gradient_quality(model, estimator, images(), step=0, draws=draws, seed=seed)


# ---- estimators whose bias and variance are known ----


class Scaled(Marginalization):
    """factor times the exact gradient, whatever the value."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, *arguments: Any, **keywords: Any) -> Estimate:
        estimate = super().forward(*arguments, **keywords)
        estimate.value = with_gradient_of(7 - estimate.value.detach(), self.factor * estimate.value)
        estimate.kl = estimate.kl * 100
        estimate.auxiliary = estimate.kl.sum()
        return estimate


class Shifted(Marginalization):
    """The exact gradient at the logits, plus `shift`, plus `spread` with a random sign, all [B, 1, K]."""

    def __init__(self, shift: Tensor, spread: Tensor, normal: float = 0.0) -> None:
        super().__init__()
        self.shift, self.spread, self.normal = shift, spread, normal

    def forward(self, f: Any, logits: Tensor, *, generator: torch.Generator, **keywords: Any) -> Estimate:
        estimate = super().forward(f, logits, generator=generator, **keywords)
        sign = 2 * torch.randint(2, (), generator=generator) - 1
        noise = self.normal * torch.randn(logits.shape, generator=generator)
        # value is averaged
        added = len(logits) * (logits * (self.shift + sign * self.spread + noise)).sum(dim=(-2, -1))
        estimate.value = with_gradient_of(estimate.value, added)
        return estimate


@pytest.fixture(scope="module")
def exact(model: SemiSupervisedVAE) -> Tensor:
    """The exact gradient at the logits [B, 1, K], as an estimator is asked for it."""
    found = []

    class Spy(Marginalization):
        def forward(self, f: Any, logits: Tensor, **keywords: Any) -> Estimate:
            estimate = super().forward(f, logits, **keywords)
            found.append(torch.autograd.grad(estimate.value.mean(), logits, retain_graph=True)[0])
            return estimate

    measure(model, Spy(), draws=3)
    return found[0]


def jacobian_products(model: SemiSupervisedVAE, vectors: Tensor) -> Tensor:
    """J'v [N, P] for vectors v [N, B, 1, K], J the derivative of the logits by the classifier's parameters."""
    logits = model.classifier(images()).unsqueeze(1)
    parameters = list(model.classifier.parameters())  # type: ignore[attr-defined]
    products = [torch.autograd.grad(logits, parameters, v, retain_graph=True) for v in vectors]
    return torch.stack([torch.cat([g.flatten() for g in product]) for product in products])


def square(a: Tensor) -> float:
    return float(a.double().square().sum())


def test_marginalization_is_exact(model: SemiSupervisedVAE) -> None:
    """To the bit: the same minibatch, the same noise of z, and no randomness left in evaluation mode."""
    measured = measure(model, Marginalization(), draws=5)
    assert measured.evaluations == CLASSES
    assert measured.seconds > 0
    assert tuple(measured.parts) == PARTS
    for quality in measured.parts.values():
        assert quality == Quality(0.0, 0.0, 0.0, quality.cosine, math.inf)
        assert quality.cosine == pytest.approx(1)


@pytest.mark.parametrize(("factor", "cosine"), [(3.0, 1.0), (-1.0, -1.0), (0.5, 1.0)])
def test_scaled_gradient(model: SemiSupervisedVAE, factor: float, cosine: float) -> None:
    """A bias of (factor - 1)^2 in every part; neither value, KL nor auxiliary loss is looked at."""
    for quality in measure(model, Scaled(factor), draws=5).parts.values():
        assert quality.bias_squared == pytest.approx((factor - 1) ** 2, rel=1e-5)
        assert quality.bias_squared_error == pytest.approx(0, abs=1e-9)
        assert quality.cosine == pytest.approx(cosine)
        assert quality.variance == 0
        assert quality.signal_to_noise == math.inf


def test_gradient_of_zero_has_no_direction(model: SemiSupervisedVAE) -> None:
    for quality in measure(model, Scaled(0.0), draws=5).parts.values():
        assert quality == Quality(quality.bias_squared, quality.bias_squared_error, 0.0, 0.0, 0.0)
        assert quality.bias_squared == pytest.approx(1)


def test_exact_gradient_of_zero_gives_no_nan(model: SemiSupervisedVAE, exact: Tensor) -> None:
    silent = SemiSupervisedVAE(mlp(SHAPE, CLASSES, latent_size=2, hidden=6, dropout=0.5, scale="softplus"))
    with torch.no_grad():
        for parameter in silent.parameters():
            parameter.zero_()
    none = measure(silent, Marginalization(), draws=3).parts["logits"]
    assert none == Quality(0.0, 0.0, 0.0, 0.0, 0.0)
    noisy = measure(silent, Shifted(0 * exact, 0 * exact, normal=1.0), draws=20).parts["logits"]
    assert noisy.variance == math.inf
    assert not math.isnan(noisy.bias_squared + noisy.cosine + noisy.signal_to_noise)


def test_known_bias_variance_cosine_and_signal(model: SemiSupervisedVAE, exact: Tensor) -> None:
    """A sign at random of a vector that is orthogonal to g and as long: variance 1, cosine 1/sqrt 2."""
    draws = 400
    other = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    other -= exact * (other * exact).sum() / square(exact)
    other *= math.sqrt(square(exact) / square(other))
    found = measure(model, Shifted(0 * exact, other), draws=draws).parts["logits"]
    assert found.variance == pytest.approx(1, abs=0.02)
    assert found.cosine == pytest.approx(math.sqrt(0.5), rel=1e-4)
    assert found.signal_to_noise == pytest.approx(1, abs=0.02)
    assert abs(found.bias_squared) < 4 * found.bias_squared_error < 0.05

    found = measure(model, Shifted(2 * exact, other), draws=draws).parts["logits"]
    assert found.variance == pytest.approx(1, abs=0.02)
    assert found.cosine == pytest.approx(3 / math.sqrt(10), rel=1e-4)
    assert found.signal_to_noise == pytest.approx(3, abs=0.05)
    assert found.bias_squared == pytest.approx(4, abs=4 * found.bias_squared_error)
    assert found.bias_squared_error < 0.02  # the noise is orthogonal to the bias


def test_parts_are_measured_apart(model: SemiSupervisedVAE, exact: Tensor) -> None:
    """What is added at the logits reaches the classifier through its Jacobian, and the other networks not at all."""
    shift = torch.randn(exact.shape, generator=torch.Generator().manual_seed(2)) * exact.abs().mean()
    scale = 0.5 * float(exact.abs().mean())
    measured = measure(model, Shifted(shift, 0 * exact, normal=scale), draws=400)
    jacobian = jacobian_products(model, torch.eye(exact.numel()).view(-1, *exact.shape))
    at_classifier = {v: jacobian_products(model, vector.unsqueeze(0)) for v, vector in (("g", exact), ("b", shift))}
    expected = {
        "logits": (square(exact), square(shift), scale**2 * exact.numel()),
        "classifier": (square(at_classifier["g"]), square(at_classifier["b"]), scale**2 * square(jacobian)),
    }
    for part, (size, bias_squared, variance) in expected.items():
        found = measured.parts[part]
        assert found.variance == pytest.approx(variance / size, rel=0.15)
        assert found.bias_squared == pytest.approx(bias_squared / size, abs=4 * found.bias_squared_error)
        assert found.bias_squared_error < 0.1 * bias_squared / size
    for part in ("inference", "generator"):
        assert measured.parts[part].bias_squared == measured.parts[part].variance == 0


def test_squared_mean_is_unbiased_and_knows_its_error() -> None:
    """Over many repetitions: the mean is ||E r||^2, where that of the plain square is off by tr Cov / G."""
    generator = torch.Generator().manual_seed(0)
    for mean in (0.0, 0.5):
        rows = mean + torch.randn(2000, 10, 6, generator=generator, dtype=torch.float64)
        values, errors = torch.tensor([squared_mean(r) for r in rows]).T
        standard_error = float(values.std()) / math.sqrt(len(values))
        assert float(values.mean()) == pytest.approx(6 * mean**2, abs=4 * standard_error)
        assert 4 * standard_error < 0.1 < 6 / 10
        # without a mean the jackknife is known to be up to sqrt 2 too large, never too small
        assert 0.95 < float(errors.square().mean().sqrt() / values.std()) < 1.5


def test_draws_that_do_not_fill_the_groups(model: SemiSupervisedVAE, exact: Tensor) -> None:
    estimator = Shifted(exact, 0 * exact, normal=1e-3 * float(exact.abs().mean()))
    for draws in (3, 9, 10, 11, 25):
        found = measure(model, estimator, draws=draws).parts["logits"]
        assert found.bias_squared == pytest.approx(1, abs=0.01)
        assert 0 < found.bias_squared_error < 0.01
    with pytest.raises(ValueError, match="draws must be >= 3, got 2"):
        measure(model, estimator, draws=2)


def test_small_variance_next_to_a_large_gradient(model: SemiSupervisedVAE, exact: Tensor) -> None:
    """Sums of squares about zero would lose it."""
    tiny = 1e-3 * exact
    found = measure(model, Shifted(1000 * exact, tiny), draws=50).parts["logits"]
    assert found.variance == pytest.approx(1e-6, rel=0.2)


def test_unbiased_and_biased_estimators(model: SemiSupervisedVAE) -> None:
    unbiased = [ScoreFunction(NoBaseline()), ScoreFunction(LeaveOneOut(), num_samples=2)]
    for estimator in unbiased:
        measured = measure(model, estimator, draws=200)
        assert measured.evaluations == estimator.num_samples
        for quality in measured.parts.values():
            assert abs(quality.bias_squared) < 4 * quality.bias_squared_error
            assert quality.variance > 0
            assert 0 < quality.cosine < 1
    hot = measure(model, GumbelSoftmax(partial(constant, value=10.0)), draws=50)
    for quality in hot.parts.values():
        assert quality.bias_squared > max(0.01, 10 * quality.bias_squared_error)
    assert hot.parts["logits"].variance < measured.parts["logits"].variance


@pytest.mark.parametrize("draws", [3, 10, 25])
def test_against_the_definitions(model: SemiSupervisedVAE, exact: Tensor, draws: int) -> None:
    """With every draw kept, groups that differ in size, and a loop over pairs of them."""
    kept = []

    class Kept(GumbelSoftmax):
        def forward(self, f: Any, logits: Tensor, **keywords: Any) -> Estimate:
            estimate = super().forward(f, logits, **keywords)
            kept.append(torch.autograd.grad(estimate.value.mean(), logits, retain_graph=True)[0])
            return estimate

    found = measure(model, Kept(partial(constant, value=0.5)), draws=draws).parts["logits"]
    g, drawn = exact.double().flatten(), torch.stack(kept).double().flatten(1)
    means = [drawn[group::10].mean(dim=0) for group in range(min(10, draws))]

    def over_pairs(rows: list[Tensor]) -> float:
        return float(torch.stack([a @ b for a, b in permutations(rows, 2)]).mean())

    without_one = torch.tensor([over_pairs([m - g for m in means if m is not left_out]) for left_out in means])
    jackknife = (len(means) - 1) * without_one.var(correction=0)
    variance = float(drawn.var(dim=0).sum())
    assert found.bias_squared == pytest.approx(over_pairs([mean - g for mean in means]) / square(g), rel=1e-5)
    assert found.bias_squared_error == pytest.approx(float(jackknife.sqrt()) / square(g), rel=1e-4)
    assert found.variance == pytest.approx(variance / square(g), rel=1e-5)
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(drawn, g, dim=1).mean()), rel=1e-5)
    assert found.signal_to_noise == pytest.approx(math.sqrt(max(over_pairs(means), 0) / variance), rel=1e-5)


def test_what_an_estimator_is_given(model: SemiSupervisedVAE) -> None:
    """The same images, logits and f each time, its step, and a generator that belongs to seed and draw."""
    calls = []

    class Spy(Marginalization):
        def forward(self, f: Any, logits: Tensor, **keywords: Any) -> Estimate:
            estimate = super().forward(f, logits, **keywords)
            calls.append({**keywords, "values": estimate.value.detach(), "logits": logits.detach()})
            calls[-1]["noise"] = torch.rand((), generator=calls[-1].pop("generator")).item()
            return estimate

    for seed in (0, 0, 1):
        gradient_quality(model, Spy(), images(), step=17, draws=3, seed=seed)
    gradient_quality(model, Spy(), images(), step=18, draws=3, seed=0)
    first, again, other, later = calls[:3], calls[3:6], calls[6:9], calls[9:]
    assert equal(first, again)
    assert len({call["noise"] for call in first + other + later}) == 9
    assert [call["step"] for call in calls] == [17] * 9 + [18] * 3
    assert all(torch.equal(call["context"], images()) for call in calls)
    assert all(equal(call["logits"], calls[0]["logits"]) for call in calls)
    assert all(equal(call["values"], first[0]["values"]) for call in first + later)
    assert all(equal(call["values"], other[0]["values"]) for call in other)
    assert not equal(first[0]["values"], other[0]["values"])  # by z


# ---- what is left behind ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a running baseline."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(f"{MLP} {ESTIMATORS['score_function/moving_average']} train.steps=4", folder)
    return folder


@pytest.fixture(scope="module")
def trained_run(trained: Path) -> Run:
    return stored_run(trained)


@pytest.mark.parametrize("name", script.all_names())
def test_measuring_leaves_everything_as_it_was(name: str, trained_run: Run) -> None:
    torch.manual_seed(0)
    model = SemiSupervisedVAE(conv(SHAPE, CLASSES, latent_size=2, channels=2, hidden=4, dropout=0.5, scale="softplus"))
    estimator = build(script.compose_estimator(name, trained_run.config), "estimator")
    estimator.prepare(SHAPE.size, 1, CLASSES)
    modules: list[nn.Module] = [model, estimator]
    model.inference.eval()  # type: ignore[attr-defined]
    modes = [part.training for module in modules for part in module.modules()]
    states = [{key: value.clone() for key, value in module.state_dict().items()} for module in modules]
    random_state = torch.get_rng_state()
    measured = measure(model, estimator, draws=3)
    assert equal([dict(module.state_dict()) for module in modules], states)
    assert [part.training for module in modules for part in module.modules()] == modes
    assert all(parameter.grad is None for module in modules for parameter in module.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(not math.isnan(v) for quality in measured.parts.values() for v in vars(quality).values())


class Learner(Marginalization):
    """Its parameter goes to 0.1; that its auxiliary loss reaches the model as well is against the contract."""

    def __init__(self) -> None:
        super().__init__()
        self.mine = nn.Parameter(torch.zeros(()))

    def forward(self, *arguments: Any, **keywords: Any) -> Estimate:
        estimate = super().forward(*arguments, **keywords)
        estimate.auxiliary = (self.mine - 0.1).square() + estimate.kl.sum()
        return estimate


def test_warm_up_fits_the_estimator_and_leaves_the_model(model: SemiSupervisedVAE) -> None:
    torch.manual_seed(0)
    estimator = ScoreFunction(LearnedBaseline(hidden=4, decay=0.9))
    estimator.prepare(SHAPE.size, 1, CLASSES)
    before = measure(model, estimator)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    warm_up(model, estimator, [images()] * 60, step=0, seed=0)
    assert equal(dict(model.state_dict()), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    after = measure(model, estimator)
    assert after.parts["logits"].variance < 0.5 * before.parts["logits"].variance
    assert after.parts["generator"] == before.parts["generator"]

    learner = Learner()
    warm_up(model, learner, [images()] * 200, step=0, seed=0)
    assert learner.mine.item() == pytest.approx(0.1, abs=1e-3)
    assert all(parameter.grad is None for parameter in model.parameters())

    centred = ScoreFunction(MovingAverage(0.9))
    warm_up(model, centred, [images()] * 30, step=0, seed=0)
    assert float(centred.baseline.weight) == pytest.approx(1 - 0.9**30, rel=1e-4)  # type: ignore[arg-type]


# ---- diagnostics while training ----

SEEN = "diagnostics.every=2 diagnostics.draws=3 diagnostics.batch_size=4"
TAGS = {f"diagnostics/{name}_{part}" for name in Quality.__dataclass_fields__ for part in PARTS}

UNRULY_PLUGIN = """
import torch
from estimators.marginalization import Marginalization

class Unruly(Marginalization):
    def forward(self, f, logits, **keywords):
        estimate = super().forward(f, logits, **keywords)
        estimate.value = estimate.value * torch.rand(())  # from no generator, as no estimator should
        return estimate
"""


@pytest.mark.parametrize(
    "line",
    [
        f"{CONV} {ESTIMATORS['score_function/moving_average']}",
        f"{MLP} estimator=score_function estimator/baseline=learned",
        f"{MLP} estimator=sparsemax estimator._target_=catvae_unruly_plugin.Unruly",
    ],
)
def test_diagnostics_change_nothing(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "catvae_unruly_plugin.py").write_text(UNRULY_PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    run(f"{line} train.steps=4", tmp_path / "off")
    run(f"{line} train.steps=4 {SEEN}", tmp_path / "on")
    assert equal(checkpoint(tmp_path / "off"), checkpoint(tmp_path / "on"))
    tags = set(events(tmp_path / "on").Tags()["scalars"])
    assert tags - set(events(tmp_path / "off").Tags()["scalars"]) == TAGS


def test_diagnostics_of_the_exact_estimator(tmp_path: Path) -> None:
    run(f"{MLP} estimator=marginalization precision=bf16 train.steps=5 {SEEN}", tmp_path / "run")
    for part in PARTS:
        for name, value in {"bias_squared": 0, "bias_squared_error": 0, "variance": 0, "cosine": 1}.items():
            found = curve(tmp_path / "run", f"diagnostics/{name}_{part}")
            assert [step for step, _ in found] == [2, 4, 5]
            assert [logged for _, logged in found] == pytest.approx([value] * 3)
    resume(tmp_path / "run", "diagnostics.every=1 diagnostics.draws=4 diagnostics.batch_size=3 train.steps=6")
    assert curve(tmp_path / "run", "diagnostics/variance_logits")[-1] == (6, 0)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("diagnostics.every=-1", "diagnostics.every must be >= 0, got -1"),
        ("diagnostics.draws=2", "diagnostics.draws must be >= 3, got 2"),
        ("diagnostics.batch_size=0", "diagnostics.batch_size must be >= 1, got 0"),
        ("diagnostics.evry=5", "did you mean diagnostics.every?"),
    ],
)
def test_diagnostics_that_cannot_be(setting: str, words: str, tmp_path: Path) -> None:
    assert_one_sentence(run(f"{MLP} {setting}", tmp_path / "run", code=2), words)


def test_run_from_before_diagnostics_can_be_read(trained_run: Run) -> None:
    config = plain(trained_run.config)
    del config["diagnostics"]
    assert typed(OmegaConf.create(config)).diagnostics.every == 0


# ---- the script ----


def laboratory(folder: Path, line: str = "") -> Ended:
    return command(script.main, f"{shlex.quote(str(folder))} {line}")


def assert_one_sentence(ended: Ended, *words: str) -> None:
    assert ended.code == 2
    assert ended.err.startswith("catvae: "), ended.err
    assert ended.err.count("\n") == 1, ended.err
    assert all(word in ended.err for word in words), ended.err
    assert "Traceback" not in ended.said


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_script_measures_every_estimator(trained: Path) -> None:
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    ended = laboratory(trained, "draws=3 batch_size=4 warmup=2")
    assert ended.code == 0, ended.said
    assert ended.err == ""  # quiet in a pipe
    output = trained / "gradient_quality"
    assert ended.out.endswith(f"{output / 'gradient_quality.csv'}\n{output / 'gradient_quality.png'}\n")
    assert "score_function/moving_average is the run's own, as trained" in ended.out
    warmed = "muprop/learned, muprop/moving_average, rebar, relax, score_function/learned"
    assert f"warmed up over 2 steps: {warmed}\n" in ended.out
    assert "4 unlabelled training images of digits, evenly spread, model at step 4, 3 draws" in ended.out
    rows = read(output / "gradient_quality.csv")
    names = script.all_names()
    assert len(names) >= 18
    assert [(row["estimator"], row["part"]) for row in rows] == [(name, part) for name in names for part in PARTS]
    for row in rows:
        assert not any(math.isnan(float(row[key])) for key in row.keys() - {"run", "estimator", "part"})
        shown = [line.split() for line in ended.out.splitlines() if line.startswith(f"{row['estimator']} ")]
        # a block each, and a line about the run's own
        assert len(shown) == len(PARTS) + (row["estimator"] == "score_function/moving_average")
    with Image.open(output / "gradient_quality.png") as image:
        assert image.format == "PNG"
        assert image.width > 1000
    assert {path: path.read_bytes() for path in before} == before


def test_script_finds_the_numbers_of_the_diagnostics(tmp_path: Path) -> None:
    """At the last step of the run, with its temperature, for the same images, seed and number of draws."""
    annealed = f"estimator=gumbel_softmax {SLOWLY}estimator.temperature.rate=0.1 estimator.temperature.every=1"
    diagnostics = "diagnostics.every=3 diagnostics.draws=6 diagnostics.batch_size=7"
    run(f"{MLP} {annealed} seed=3 train.steps=4 {diagnostics}", tmp_path / "run")
    line = f"estimators=gumbel_softmax draws=6 batch_size=7 seed=3 output={tmp_path}"
    assert laboratory(tmp_path / "run", line).code == 0
    for row in read(tmp_path / "gradient_quality.csv"):
        for name in Quality.__dataclass_fields__:
            logged = curve(tmp_path / "run", f"diagnostics/{name}_{row['part']}")
            assert [step for step, _ in logged] == [3, 4]
            assert logged[-1][1] == pytest.approx(float(row[name]), rel=1e-5, abs=1e-7)


def test_script_takes_further_arguments_of_an_estimator(trained: Path, tmp_path: Path) -> None:
    hot, warm = (
        f"gumbel_softmax(schedule@estimator.temperature=constant estimator.temperature.value={tau})" for tau in (50, 1)
    )
    line = shlex.quote(f"estimators={hot}, {warm},run, score_function/moving_average")
    ended = laboratory(trained, f"{line} draws=20 batch_size=20 output={tmp_path}")
    assert ended.code == 0, ended.said
    rows = {(row["estimator"], row["part"]): row for row in read(tmp_path / "gradient_quality.csv")}
    assert {name for name, _ in rows} == {hot, warm, "run", "score_function/moving_average"}
    assert "run is the run's own, as trained" in ended.out
    variances = [float(rows[name, "logits"]["variance"]) for name in (hot, warm, "run")]
    assert variances == sorted(variances)
    assert variances[0] < 0.1 * variances[1]


def test_script_takes_the_mean_over_runs(tmp_path: Path) -> None:
    """Each run is in the file with the numbers that it has alone, and their mean is in the table."""
    one, other = tmp_path / "sweep" / "0", tmp_path / "sweep" / "1"
    for seed, folder in enumerate((one, other)):
        run(f"{MLP} seed={seed} train.steps=4", folder)
    checkpoint = next((other / "checkpoints").iterdir())
    names = "estimators=marginalization,straight_through draws=4 batch_size=9"
    ended = laboratory(one, f"{shlex.quote(str(checkpoint))} {names}")
    assert ended.code == 0, ended.said
    assert "mean over the models of 2 runs\n9 unlabelled training images" in ended.out
    rows = read(tmp_path / "sweep" / "gradient_quality" / "gradient_quality.csv")
    assert [row["run"] for row in rows] == [str(one)] * 8 + [str(checkpoint)] * 8
    alone = []
    for folder in (one, other):
        assert laboratory(folder, names).code == 0
        alone += read(folder / "gradient_quality" / "gradient_quality.csv")
    for together, single in zip(rows, alone, strict=True):
        assert all(together[key] == single[key] for key in single.keys() - {"run", "seconds"})
    logits = [row for row in rows if (row["estimator"], row["part"]) == ("straight_through", "logits")]
    bias = np.array([float(row["bias_squared"]) for row in logits])
    shown = next(line.split() for line in ended.out.splitlines() if line.startswith("straight_through "))
    assert float(shown[1]) == pytest.approx(bias.mean(), rel=0.06)
    errors = np.array([float(row["bias_squared_error"]) for row in logits])
    error = max(bias.std(ddof=1) / math.sqrt(2), math.hypot(*errors) / 2)
    assert float(shown[3]) == pytest.approx(error, rel=0.06)
    assert float(shown[4]) == pytest.approx(np.mean([float(row["variance"]) for row in logits]), rel=0.01)
    assert float(shown[5]) == pytest.approx(np.mean([float(row["cosine"]) for row in logits]), abs=1e-4)


def test_the_folder_of_a_sweep_is_its_runs(tmp_path: Path) -> None:
    for job in (10, 9, 2):
        (tmp_path / "sweep" / str(job) / "checkpoints").mkdir(parents=True)
    (tmp_path / "sweep" / "compare").mkdir()
    (tmp_path / "a=b" / "checkpoints").mkdir(parents=True)
    one, named = tmp_path / "sweep" / "9", [str(tmp_path / "sweep"), "draws=3", str(tmp_path / "a=b")]
    jobs = [tmp_path / "sweep" / job for job in ("2", "9", "10")]
    assert script.folders_and_settings([*named, str(one)]) == ([*jobs, tmp_path / "a=b"], ["draws=3"])
    assert script.folders_and_settings([str(one)])[0] == [one]
    assert script.output_folder(jobs, script.Settings()) == tmp_path / "sweep" / "gradient_quality"


def test_mean_over_runs_is_of_what_all_of_them_have() -> None:
    infinite = Quality(math.inf, math.inf, math.inf, 0, 0)

    def models(names: str, parts: str = "logits", quality: Quality = infinite) -> dict[str, Measurement]:
        return {name: Measurement(dict.fromkeys(parts.split(), quality), 2, 0.1) for name in names.split()}

    common = report.mean_over_runs([models("a b"), models("b c", quality=Quality(0.5, 0.1, 1, 0.5, 1))])
    assert common == {"b": Measurement({"logits": Quality(math.inf, math.inf, math.inf, 0.25, 0.5)}, 2, 0.1)}
    for biases, error in (((2, 2, 2), 0.3), ((1, 2, 3), 1)):  # that of each model; how much they differ
        means = report.mean_over_runs([models("a", quality=Quality(bias, 0.3, 1, 1, 1)) for bias in biases])
        found = means["a"].parts["logits"]
        assert (found.bias_squared, found.bias_squared_error) == pytest.approx((2, error / math.sqrt(3)))
    with pytest.raises(ConfigError, match="models with an estimator in common"):
        report.mean_over_runs([models("a"), models("b")])
    with pytest.raises(ConfigError, match="of one family of models, got parts logits and logits, prior"):
        report.mean_over_runs([models("a"), models("a", "logits prior")])
    of_one = models("a")
    assert report.mean_over_runs([of_one]) is of_one


def test_script_warms_up_what_it_makes_anew(trained: Path, tmp_path: Path) -> None:
    variances = []
    for warmup in (0, 60):
        output = tmp_path / str(warmup)
        line = f"estimators=score_function/learned draws=20 batch_size=20 warmup={warmup} output={output}"
        assert laboratory(trained, line).code == 0
        variances.append(float(read(output / "gradient_quality.csv")[0]["variance"]))
    assert variances[1] < 0.5 * variances[0]


def test_run_of_an_estimator_from_outside(trained_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained_run.config, "estimator", {"_target_": "mine.Mine"})
    found = script.make_estimators(trained_run, script.Settings())
    made, own = found.made, found.own
    assert list(made) == [*script.all_names(), own]
    assert made[own] is trained_run.estimator
    assert own == "run"


MINE = """
from dataclasses import replace
from estimators.marginalization import Marginalization

class Times(Marginalization):
    def __init__(self, times: float) -> None:
        super().__init__()
        self.times = times

    def forward(self, *given, **named):
        estimate = super().forward(*given, **named)
        return replace(estimate, value=self.times * estimate.value)
"""


def test_an_estimator_from_outside_the_repository(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By --config-dir and PYTHONPATH, as for train.py; nothing has to be trusted that this command line names."""
    place = tmp_path / "mine, too"
    (place / "estimator").mkdir(parents=True)
    (place / "outside_of_it.py").write_text(MINE)
    for name, yaml in (
        ("twice", "_target_: outside_of_it.Times\ntimes: 2.0\n"),
        ("no_estimator", "_target_: os.getcwd\n"),
        ("no_module", "_target_: nowhere.X\n"),
    ):
        (place / "estimator" / f"{name}.yaml").write_text(yaml)
    monkeypatch.syspath_prepend(place)
    own = f"--config-dir {shlex.quote(str(place))}"
    names = shlex.quote("estimators=twice,twice(estimator.times=4.0)")
    ended = laboratory(trained, f"{own} {names} draws=3 batch_size=4 figure=svg output={tmp_path / 'out'}")
    assert ended.code == 0, ended.said
    rows = [row for row in read(tmp_path / "out" / "gradient_quality.csv") if row["part"] == "logits"]
    bias = {row["estimator"]: float(row["bias_squared"]) for row in rows}
    assert bias == pytest.approx({"twice": 1.0, "twice(estimator.times=4.0)": 9.0}, rel=1e-3)
    assert ElementTree.parse(tmp_path / "out" / "gradient_quality.svg").getroot().tag.endswith("}svg")
    for name, words in (("no_estimator", "must make an estimators.contract.Estimator"), ("no_module", "PYTHONPATH?")):
        assert_one_sentence(laboratory(trained, f"{own} draws=3 estimators={name}"), "estimator._target_", words)


def test_names_and_sections(trained_run: Run) -> None:
    config = trained_run.config
    for baseline, number in (("leave_one_out", 2), ("learned", 1)):  # as many as it needs
        node = script.compose_estimator(f"score_function/{baseline}(estimator.num_samples=1)", config)
        assert node["num_samples"] == number
    # schedules are as long as the run
    temperature = script.compose_estimator("reinmax(schedule@estimator.temperature=linear)", config)["temperature"]
    assert temperature["steps"] == 4
    nodes = {name: script.compose_estimator(name, config) for name in script.all_names()}
    for name, own in nodes.items():
        assert script.own_name(nodes, own | {"num_samples": 7}) == name
    assert script.own_name(nodes, {"_target_": "mine.Mine"}) == script.OWN
    hot = "a(schedule@estimator.temperature=constant estimator.temperature.value=5)"
    assert report.short(hot) == "a(temperature=constant temperature.value=5)"
    assert script.split_names(" rebar,gumbel_softmax(a=[1,2] b=3),rebar") == ["rebar", "gumbel_softmax(a=[1,2] b=3)"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("drws=3", "drws=3 is not a key"),
        ("drws=3", "did you mean draws?"),
        ("draws", "an argument must be key=value, got draws"),
        ("dras", "dras has no checkpoint in checkpoints/; is it a run folder?"),
        ("draws=2", "draws must be an integer >= 3, got 2"),
        ("draws=many", "draws must be an integer >= 3, got many"),
        ("batch_size=0", "batch_size must be an integer >= 1, got 0"),
        ("warmup=-1", "warmup must be an integer >= 0, got -1"),
        ("seed=", "seed must be an integer >= 0, got nothing"),
        ("estimators=rebar,nope", "estimators must be names out of run, "),
        ("estimators=rebar,nope", "got nope"),
        ("estimators=rebar/none", "got rebar/none"),
        ("'estimators=rebar(estimator.tau=1)'", "estimator.tau=1 is not a key"),
        ("'estimators=rebar(estimator.scale=x)'", "estimator.scale must be a number, got x"),
        ("'estimators=muprop(estimator.num_samples=0)'", "estimator.num_samples must be >= 1, got 0"),
        ("'estimators=rebar(train.steps=9)'", "settings of the estimator alone, got train.steps=9"),
        ("output=FOLDER/train.log/x", "train.log/x"),
        ("figure=gif", "figure must be one of png, svg, pdf, got gif"),
        ("estimators=mine", "got mine; --config-dir DIR has it find your own"),
        ("--config-dir nowhere estimators=mine", "--config-dir must be a folder, got nowhere"),
    ],
)
def test_script_refuses_in_one_sentence(line: str, words: str, trained: Path) -> None:
    before = set(trained.rglob("*"))
    line = line.replace("FOLDER", str(trained))
    assert_one_sentence(laboratory(trained, f"draws=3 estimators=marginalization {line}"), words)
    assert set(trained.rglob("*")) == before


def test_an_earlier_measurement_is_kept(trained: Path, tmp_path: Path) -> None:
    line = f"draws=3 batch_size=5 output={tmp_path} estimators=marginalization"
    assert laboratory(trained, f"{line} figure=svg").code == 0
    table, drawing = (tmp_path / f"gradient_quality.{suffix}" for suffix in ("csv", "svg"))
    before = table.read_bytes(), drawing.read_bytes()
    ended = laboratory(trained, f"{line} seed=1")
    assert "the measurement before is gradient_quality_1 now" in ended.err
    assert laboratory(trained, f"{line} seed=2").code == 0
    assert tuple((tmp_path / f"gradient_quality_1.{suffix}").read_bytes() for suffix in ("csv", "svg")) == before
    names = ["gradient_quality.csv", "gradient_quality.png", "gradient_quality_1.csv", "gradient_quality_1.svg"]
    names += ["gradient_quality_2.csv", "gradient_quality_2.png"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names


def test_the_run_s_own_is_one_estimator(tmp_path: Path) -> None:
    for name in ("marginalization", "sum_and_sample"):
        run(f"{MLP} estimator={name} train.steps=1", tmp_path / name)
    ended = command(script.main, f"{tmp_path} draws=3 estimators=run,rebar")
    assert_one_sentence(ended, "what run stands for, which is not one in", f"{tmp_path}/marginalization")


def test_what_is_measured_of_the_bound_of_several_samples_is_said(tmp_path: Path) -> None:
    run(f"{FAMILIES['several_samples']} train.steps=1", tmp_path / "run")
    ended = laboratory(tmp_path / "run", "draws=3 batch_size=5 reference=3 estimators=run")
    assert "trained with the bound of 3 samples; " in ended.out
    assert ended.code == 0


def test_script_refuses_what_is_no_run_folder(tmp_path: Path) -> None:
    assert_one_sentence(laboratory(tmp_path, "draws=3"), str(tmp_path), "is it a run folder?")
    assert list(tmp_path.iterdir()) == []


def test_the_minibatch_has_all_classes_of_images_that_are_sorted(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(4), 30)
    pixels = np.random.default_rng(0).integers(60, size=(120, 8, 8)) + 60 * labels[:, None, None]
    np.savez(tmp_path / "mine.npz", images=pixels.astype(np.uint8), labels=labels)
    line = f"data=arrays data.path={tmp_path}/mine.npz data.num_labelled=8 data.num_validation=0 model=mlp"
    made = benchmark.compose_run([*line.split(), "data.binarization=none"], "marginalization")
    levels = made.unlabelled_minibatch(20, 0).mean(dim=(1, 2, 3)).mul(255).div(60).long()
    assert levels.bincount().tolist() == [5, 5, 5, 5]
    assert len(made.unlabelled_minibatch(1000, 0)) == 100


def test_help_explains_each_key_without_importing_torch() -> None:
    program = (
        "import sys, scripts.gradient_quality as script\n"
        "sys.argv = ['gradient_quality', '--help']\n"
        "try:\n    script.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for key in script.Settings.__dataclass_fields__:
        assert f"\n  {key}=" in done.stdout


# ---- how numbers and labels are shown ----


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (0.012345, 0.0045, ("0.0123", "± 0.0045")),
        (-0.0001, 0.02, ("-0.000", "± 0.020")),
        (12345.6, 678.0, ("12346", "± 678")),
        (2e-8, 3e-9, ("2.0e-08", "± 3.0e-09")),
        (0.25, 1e-12, ("0.25", "")),
        (0.0, 0.0, ("0", "")),
        (math.inf, math.inf, ("inf", "")),
    ],
)
def test_numbers_with_their_errors(value: float, error: float, shown: tuple[str, str]) -> None:
    assert report.plus_minus(value, error) == shown


@pytest.mark.parametrize("heights", [[0.5] * 10, [0.0, 0.0, 1.0, 1.0], [0.9, 0.1, 0.5], []])
def test_labels_do_not_overlap(heights: list[float]) -> None:
    moved = report.spread(heights, gap=0.05)
    assert all(b - a > 0.0499 for a, b in pairwise(sorted(moved)))
    assert all(0 <= height <= 1 for height in moved)
    if heights == [0.9, 0.1, 0.5]:
        assert moved == heights


def test_picture_of_estimators_that_are_all_exact_or_without_measure() -> None:
    exact, infinite = Quality(0, 0, 0, 1, math.inf), Quality(math.inf, math.inf, math.inf, 0, 0)
    measured = {
        "exact": Measurement(dict.fromkeys(PARTS, exact), 10, 0.1),
        "none": Measurement(dict.fromkeys(PARTS, infinite), 1, 0.1),
    }
    figure = report.picture(measured, "about")
    figure.canvas.draw()
    assert [axes.get_title("right") for axes in figure.axes] == ["exact: exact"] * len(PARTS)


def test_unknown_key_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError):
        script.parsed(["x=1"])
    assert script.parsed(["draws=5", "output=a=b"]).output == "a=b"
