"""p(x|y,z) of each likelihood: against SciPy and torch, by summing and integrating, and by finite differences."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor, distributions

from configs.schema import Binarization, Likelihood, resolved_likelihood
from models import likelihoods
from models.likelihoods import DiscretizedLogistic, Gaussian, LocationScale
from models.m2.model import SemiSupervisedVAE
from models.networks import ImageShape, conv
from scripts import evaluate, generate
from tests.runs import CONV, MLP, command, resume, run
from training.checkpoints import stored
from training.names import log_likelihood_name

# torch.distributions is not annotated
# mypy: disable-error-code="no-untyped-call"

NAMES = [name.value for name in Likelihood if name is not Likelihood.auto]
LEVELS = torch.arange(256, dtype=torch.float64) / 255
OUTPUTS = torch.tensor(
    [-40.0, -3.0, -0.2, -1e-4, 0.0, 1e-9, 0.04, 0.3, 0.5, 0.998, 1.2, 7.0, 60.0], dtype=torch.float64
)


def made(name: str, channels: int = 1, scale: float | None = None) -> likelihoods.Likelihood:
    """In float64, with that scale in the first channel, and more in the others."""
    likelihood = likelihoods.likelihood(name, channels).double()
    if scale is not None and isinstance(likelihood, LocationScale):
        scales = scale * torch.arange(1, channels + 1, dtype=torch.float64).unsqueeze(1)
        likelihood.log_scale.data.copy_((scales - likelihood.floor).log())
    return likelihood


def log_prob_of_pixels(likelihood: likelihoods.Likelihood, outputs: Tensor, x: Tensor) -> Tensor:
    """log p [N] of single pixels x [N] at outputs [N]."""
    return likelihood.log_prob(outputs.view(1, -1, 1), x.view(-1, 1))[0]


SCALES = [0.002, 0.02, 0.3, 4.0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", SCALES)
def test_log_prob_is_that_of_scipy_and_torch(name: str, scale: float) -> None:
    levels = torch.tensor([0.0, 1.0]) if name == "bernoulli" else LEVELS
    outputs, x = (grid.flatten() for grid in torch.meshgrid(OUTPUTS, levels.double(), indexing="ij"))
    if name == "bernoulli":
        expected = distributions.Bernoulli(logits=outputs).log_prob(x)
    elif name == "continuous_bernoulli":
        outputs = outputs.clamp(-8, 8)  # torch's own loses digits beyond
        expected = distributions.ContinuousBernoulli(logits=outputs).log_prob(x)
    elif name == "gaussian":
        expected = distributions.Normal(0.5 + outputs / 4, scale).log_prob(x)
    else:
        half = np.where((x > 0) & (x < 1), 0.5, np.inf)[:, None] * np.array([[-1.0, 1.0]])
        half[x == 0, 1], half[x == 1, 0] = 0.5, -0.5
        low, high = (((x + torch.from_numpy(side) / 255) - (0.5 + outputs / 4)) / scale for side in half.T)
        # of a bin above the mean from the upper tail, where the distribution function is 1 for all of it
        upper = (low > 0).numpy()
        mass = np.where(
            upper,
            stats.logistic.sf(low) - stats.logistic.sf(high),
            stats.logistic.cdf(high) - stats.logistic.cdf(low),
        )
        expected = torch.from_numpy(np.log(np.maximum(mass, 1e-300)))
    actual = log_prob_of_pixels(made(name, scale=scale), outputs, x)
    there = expected > -600
    assert there.sum() > 10
    torch.testing.assert_close(actual[there], expected[there], rtol=2e-6, atol=1e-6)
    assert (actual[~there] < -500).all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("output", OUTPUTS.tolist())
def test_probabilities_of_the_grey_levels_sum_to_one(scale: float, output: float) -> None:
    at = torch.full_like(LEVELS, output)
    log_p = log_prob_of_pixels(made("discretized_logistic", scale=scale), at, LEVELS)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-10)
    binary = log_prob_of_pixels(made("bernoulli"), at[:2], torch.tensor([0.0, 1.0]))
    assert binary.exp().sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("output", [-40.0, -3.0, -0.19, -1e-4, 0.0, 0.04, 0.21, 1.2, 60.0])
@pytest.mark.parametrize("name", ["continuous_bernoulli", "gaussian"])
def test_densities_integrate_to_one_and_mean_is_their_mean(name: str, output: float) -> None:
    likelihood, at = made(name, scale=0.3), torch.tensor([output], dtype=torch.float64)

    def density(x: float) -> float:
        return log_prob_of_pixels(likelihood, at, torch.tensor([x], dtype=torch.float64)).exp().item()

    low, high = (0.0, 1.0) if name == "continuous_bernoulli" else (output / 4 - 4, output / 4 + 5)
    kwargs = {"epsabs": 1e-10, "epsrel": 1e-10, "limit": 200}
    assert integrate.quad(density, low, high, **kwargs)[0] == pytest.approx(1, abs=1e-8)
    mean = integrate.quad(lambda x: x * density(x), low, high, **kwargs)[0]
    assert likelihood.mean(at).item() == pytest.approx(mean, abs=1e-8)


@pytest.mark.parametrize("scale", SCALES)
def test_the_mean_of_grey_levels_is_their_mean(scale: float) -> None:
    likelihood = made("discretized_logistic", scale=scale)
    for output in OUTPUTS:
        p = log_prob_of_pixels(likelihood, output.expand(256), LEVELS).exp()
        assert likelihood.mean(output.view(1, 1, 1)).item() == pytest.approx((p * LEVELS).sum().item(), abs=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_differences(name: str) -> None:
    """At outputs on both sides of where series take over, and at the edges of the grey levels."""
    likelihood = made(name, channels=3, scale=0.07)
    outputs = torch.linspace(-0.3, 1.3, 2 * 2 * 9, dtype=torch.float64).view(2, 2, 9).requires_grad_()
    x = torch.tensor([[0, 255, 3, 128, 0, 255, 77, 254, 1], [255] * 5 + [0] * 4], dtype=torch.float64) / 255
    if name == "bernoulli":  # its own gradient is in float32: tests/test_objective.py
        expected = distributions.Bernoulli(logits=outputs, validate_args=False).log_prob(x).sum()
        found = torch.autograd.grad(likelihood.log_prob(outputs, x).sum().double(), outputs)
        torch.testing.assert_close(found, torch.autograd.grad(expected, outputs), rtol=1e-5, atol=1e-6)
        return
    parameters = tuple(likelihood.parameters())
    assert torch.autograd.gradcheck(lambda outputs, *_: likelihood.log_prob(outputs, x), (outputs, *parameters))
    assert torch.autograd.gradgradcheck(lambda outputs: likelihood.log_prob(outputs, x), (outputs[:1, :1],))


@pytest.mark.parametrize("name", NAMES)
def test_each_channel_has_its_scale_and_images_are_summed(name: str) -> None:
    """log_prob of an image is the sum over its pixels alone, each with its channel's scale."""
    likelihood = made(name, channels=3, scale=0.1)
    random = torch.Generator().manual_seed(0)
    outputs = torch.randn(2, 4, 12, dtype=torch.float64, generator=random)
    x = (torch.rand(4, 12, dtype=torch.float64, generator=random) * 255).round() / 255
    total = torch.zeros(2, 4, dtype=torch.float64)
    for pixel in range(12):
        alone = made(name, scale=0.1 * (pixel // 4 + 1))
        total += alone.log_prob(outputs[..., pixel : pixel + 1], x[:, pixel : pixel + 1])
    torch.testing.assert_close(likelihood.log_prob(outputs, x).double(), total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("output", [-2.0, 1e-5, 0.3, 0.6, 9.0])
def test_draws_follow_log_prob(name: str, output: float) -> None:
    """The empirical distribution is within what 100,000 draws may differ by (Dvoretzky, Kiefer, Wolfowitz), 1e-6."""
    likelihood, number = made(name, scale=0.1), 100_000
    outputs = torch.full((1, 1, number), output, dtype=torch.float64)
    drawn = likelihood.sample(outputs, torch.Generator().manual_seed(0)).flatten()
    again = likelihood.sample(outputs, torch.Generator().manual_seed(0)).flatten()
    assert torch.equal(drawn, again)
    if name == "gaussian":
        points = 0.5 + output / 4 + torch.linspace(-0.5, 0.5, 201, dtype=torch.float64)
        expected = torch.from_numpy(stats.norm.cdf(points, 0.5 + output / 4, 0.1))
    else:
        assert ((drawn >= 0) & (drawn <= 1)).all()
        points = torch.tensor([0.0, 1.0], dtype=torch.float64) if name == "bernoulli" else LEVELS
        p = log_prob_of_pixels(likelihood, torch.full_like(points, output), points).exp()
        expected = p.cumsum(dim=0)
        if name == "continuous_bernoulli":
            expected = torch.from_numpy(integrate.cumulative_trapezoid(p, points, initial=0))
        else:
            assert (drawn.unsqueeze(-1) == points.to(drawn)).any(dim=-1).all()
    found = torch.searchsorted(drawn.sort().values, points + 1e-9, right=True) / number
    assert (found - expected).abs().max().item() < math.sqrt(math.log(2 / 1e-6) / (2 * number)) + 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_rounded_once_and_extremes_stay_finite(name: str) -> None:
    likelihood = likelihoods.likelihood(name, 1)
    x = torch.tensor([[0.0, 1.0, 128 / 255, 1 / 255]])
    outputs = (torch.randn(3, 1, 4, generator=torch.Generator().manual_seed(0)) * 2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        rough = likelihood.log_prob(outputs, x)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, likelihood.log_prob(outputs.float(), x), rtol=0, atol=0)
    extreme = torch.tensor([-1e4, 1e4, 0.0, 1e-30]).view(1, 1, 4).requires_grad_()
    for pixels in (x, x.flip(1)):
        value = likelihood.log_prob(extreme, pixels)
        gradients = torch.autograd.grad(value.sum(), [extreme, *likelihood.parameters()])
        assert value.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients)
    for picture in (likelihood.mean(extreme), likelihood.sample(extreme, torch.Generator().manual_seed(0))):
        assert picture.isfinite().all()


@pytest.mark.parametrize("kind", [Gaussian, DiscretizedLogistic])
def test_a_scale_stays_above_its_floor_and_can_come_back(kind: type[LocationScale]) -> None:
    likelihood = kind(1)
    likelihood.log_scale.data.fill_(-100)
    assert likelihood.scale.item() == pytest.approx(kind.floor)
    likelihood.log_scale.data.fill_(-9)
    likelihood.log_prob(torch.full((1, 1, 2), 0.4), torch.tensor([[0.2, 0.6]])).sum().backward()
    assert likelihood.log_scale.grad is not None
    assert likelihood.log_scale.grad.item() > 0


# ---- which likelihood, and what its numbers are ----


def test_the_default_follows_the_pixels() -> None:
    for how in Binarization:
        grey = how is Binarization.none
        expected = Likelihood.discretized_logistic if grey else Likelihood.bernoulli
        assert resolved_likelihood(Likelihood.auto, how) is expected
        for likelihood in Likelihood:
            if grey or likelihood in (Likelihood.auto, Likelihood.bernoulli):
                resolved_likelihood(likelihood, how)
            else:
                with pytest.raises(ValueError, match=f"likelihood must be bernoulli .* got {likelihood.value}"):
                    resolved_likelihood(likelihood, how)


def test_only_a_log_probability_is_called_one() -> None:
    called = {name: log_likelihood_name(name, "none") for name in NAMES}
    assert [name for name, title in called.items() if title == "log p(x)"] == ["discretized_logistic"]
    for how in ("dynamic", "fixed", "threshold"):
        assert log_likelihood_name("bernoulli", how) == "log p(x)"
    halves = log_likelihood_name("bernoulli", "none", "log p(lower half|upper half)")
    assert halves == "E[log p(b|upper half)], b drawn from the grey levels,"


def test_of_grey_levels_a_bernoulli_gives_the_mean_over_drawn_pixels() -> None:
    """What `log_likelihood_name` says: E[log p(b)], here over all b of an image of three pixels."""
    likelihood, x = made("bernoulli"), torch.tensor([[0.1, 0.5, 0.8]], dtype=torch.float64)
    outputs = torch.tensor([[[-2.0, 0.3, 1.0]]], dtype=torch.float64)
    images = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 3)
    weights = torch.where(images == 1, x, 1 - x).prod(dim=1)
    values = likelihood.log_prob(outputs.expand(1, 8, 3), images)[0]
    assert likelihood.log_prob(outputs, x).item() == pytest.approx((weights * values).sum().item(), abs=1e-6)


def test_bernoulli_s_own_gradient_in_float64() -> None:
    logits = (
        6 * torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ).requires_grad_()
    x = torch.rand(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda outputs: made("bernoulli").log_prob(outputs, x), logits)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_with_each_likelihood(name: str, tmp_path: Path) -> None:
    """Says what its numbers are, and counts bits of grey levels alone."""
    run(f"{CONV} train.steps=4 data.binarization=none likelihood={name} precision=fp32", tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["config"]["likelihood"] == name
    assert result["log_likelihood_of"] == log_likelihood_name(name, "none").rstrip(",")
    if name == "discretized_logistic":
        assert result["test_bits_per_dimension"] == pytest.approx(-result["test_bound"] / (64 * math.log(2)))
        assert 1 < result["val_bits_per_dimension"] < 20
    else:
        assert not [key for key in result if "bits" in key]


def test_grey_pixels_have_grey_levels_unless_bernoulli_is_asked_for(tmp_path: Path) -> None:
    line = f"{MLP} train.steps=1 data.binarization=none likelihood=auto"
    run(line, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["config"]["likelihood"] == "discretized_logistic"


def test_a_run_from_before_goes_on_as_bernoulli_whatever_its_pixels(tmp_path: Path) -> None:
    """Of grey images of one's own, which now have another default: its files are made as they were then."""
    rows = np.arange(300)
    images = np.random.default_rng(0).integers(0, 256, (300, 6, 5), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", images=images, labels=rows % 3)
    folder = tmp_path / "run"
    line = f"{MLP} data=arrays data.path={tmp_path}/mine.npz data.num_labelled=30 data.num_validation=30 train.steps=4"
    run(f"{line} data.binarization=none likelihood=bernoulli", folder)
    overrides, config = folder / ".hydra" / "overrides.yaml", folder / ".hydra" / "config.yaml"
    for file in (overrides, config):
        kept = [row for row in file.read_text().splitlines() if "likelihood" not in row and "prior: " not in row]
        file.write_text("\n".join(row for row in kept if "prior=" not in row) + "\n")
    for path in stored(folder):
        state = torch.load(path, weights_only=True)
        for key in ("likelihood", "prior"):
            del state["config"][key]
        del state["facts"]
        torch.save(state, path)
    assert command(evaluate.main, f"{folder} --part val").code == 0
    resume(folder, "train.steps=6")
    assert json.loads((folder / "result.json").read_text())["config"]["likelihood"] == "bernoulli"


def test_grey_levels_are_not_measured_as_binary_pixels(tmp_path: Path) -> None:
    run(f"{MLP} train.steps=1 data.binarization=none likelihood=discretized_logistic", tmp_path / "run")
    ended = command(evaluate.main, f"{tmp_path / 'run'} --binarization dynamic")
    assert ended.code == 2
    assert "--binarization must be none for this run" in ended.err
    assert command(evaluate.main, f"{tmp_path / 'run'} --part val --binarization none").code == 0
    for pixels in ("mean", "drawn"):
        line = f"{tmp_path / 'run'} --kind samples --columns 3 --pixels {pixels} --output {tmp_path / pixels}.png"
        assert command(generate.main, line).code == 0
    assert (tmp_path / "mean.png").read_bytes() != (tmp_path / "drawn.png").read_bytes()
    ended = command(generate.main, f"{tmp_path / 'run'} --pixels drawn --output {tmp_path / 'no'}.png")
    assert (ended.code, "--pixels must be mean for --kind classes" in ended.err) == (2, True)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_in_range_and_gradients_reach_the_scale(name: str) -> None:
    torch.manual_seed(0)
    shape = ImageShape(3, 9, 10)
    networks = conv(shape, 3, latent_size=2, channels=2, hidden=4, dropout=0.0, scale="softplus")
    model = SemiSupervisedVAE(networks, likelihoods.likelihood(name, 3))
    y, z = model.draw_classes(5, torch.Generator().manual_seed(0)).unsqueeze(0), torch.randn(1, 5, 2)
    for picture in (model.generate(y, z), model.draw_pixels(y, z, torch.Generator().manual_seed(0))):
        assert picture.shape == (1, 5, shape.size)
        assert ((picture >= 0) & (picture <= 1)).all()
    x = torch.randint(256, (5, 3, 9, 10)) / 255
    with torch.autocast("cpu", torch.bfloat16):
        bound = model.bound(x, model.inference.features(x), y, torch.randn(5, 2))
    bound.value.sum().backward()
    for parameter in [*model.likelihood.parameters(), *networks.generator.parameters()]:  # type: ignore[attr-defined]
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0
