"""The networks: shapes at any size, work on x done once, images and draws that do not disturb each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from estimators.contract import Estimator
from estimators.gumbel_softmax import GumbelSoftmax, StraightThroughGumbelSoftmax
from estimators.marginalization import Marginalization
from estimators.score_function import LeaveOneOut, MovingAverage, ScoreFunction
from models.contract import Objective, Weights
from models.m2.model import SemiSupervisedVAE
from models.m2.objective import objective
from models.networks import Networks, TransposedConvDoubleSize, TransposedConvSameSize, conv, mlp
from models.parts import (
    Dropout,
    ImageShape,
    RandomMotion,
    distorted,
    distortion_noise,
    halvings,
    joined_linear,
    over_latent_and_class,
    redrawn,
    uniform,
)

LATENT = 3
LABELLED, UNLABELLED = 2, 4
SIZES = {"28x28": ImageShape(1, 28, 28), "8x8": ImageShape(1, 8, 8), "9x10": ImageShape(1, 9, 10)}
COLOUR = ImageShape(3, 7, 5)


def build_mlp(shape: ImageShape, num_classes: int, **changes: Any) -> Networks:
    settings: dict[str, Any] = {"latent_size": LATENT, "hidden": 16, "dropout": 0.5, "scale": "softplus"}
    return mlp(shape, num_classes, **(settings | changes))


def build_conv(shape: ImageShape, num_classes: int, **changes: Any) -> Networks:
    settings: dict[str, Any] = {"latent_size": LATENT, "channels": 4, "hidden": 16, "dropout": 0.5}
    return conv(shape, num_classes, **({"scale": "softplus"} | settings | changes))


Builder = Callable[..., Networks]
BUILDERS: dict[str, Builder] = {"mlp": build_mlp, "conv": build_conv}
each_builder = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
each_shape = pytest.mark.parametrize("shape", [*SIZES.values(), COLOUR], ids=[*SIZES, "3x7x5"])
each_number_of_classes = pytest.mark.parametrize("num_classes", [2, 10])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model_of(build: Builder, shape: ImageShape, num_classes: int, **changes: Any) -> SemiSupervisedVAE:
    torch.manual_seed(0)
    return SemiSupervisedVAE(build(shape, num_classes, **changes))


def images(shape: ImageShape, number: int) -> Tensor:
    return torch.rand(number, shape.channels, shape.height, shape.width, generator=generator(7)).round()


def classes(num_classes: int, batch: int) -> Tensor:
    return torch.eye(num_classes).unsqueeze(1).expand(-1, batch, -1)


def features(model: SemiSupervisedVAE, x: Tensor) -> Tensor:
    return model.inference.features(x)


def bounds(model: SemiSupervisedVAE, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    return model.bound(x, features(model, x), y, noise).value


def noise_for(batch: int) -> Tensor:
    return torch.randn(batch, LATENT, generator=generator(8))


def run(model: SemiSupervisedVAE, estimator: Estimator, shape: ImageShape) -> Objective:
    x = images(shape, LABELLED + UNLABELLED)
    y = torch.eye(model.num_classes)[:LABELLED]
    return objective(model, estimator, Weights(1.0, 1.0, 1.0), x, y, step=0, generator=generator())


# --- shapes


@pytest.mark.parametrize(
    "sides", [(8, 8), (9, 31), (16, 16), (28, 28), (33, 20), (64, 48), (97, 101), (128, 128), (8, 128)]
)
def test_convolutions_halve_an_image_of_any_size_until_a_few_pixels_are_left(sides: tuple[int, int]) -> None:
    """What is left to the linear layers keeps a few pixels of each side, and not a hundred times as many."""
    shape = ImageShape(3, *sides)
    assert [min(halvings(shape, 4)[-1]), min(halvings(shape, 7)[-1])] in ([3, 5], [3, 6], [4, 4], [4, 7], [3, 3])
    model = model_of(build_conv, shape, 3)
    x, y = images(shape, 2), classes(3, 2)
    logits, bound = model.classifier(x, generator()), bounds(model, x, y, noise_for(2))
    (logits.sum() + bound.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.ndim > 1)


def test_images_of_mnist_s_size_have_the_layers_of_the_paper() -> None:
    """Three convolutions in q(y|x) and q(z|x,y), and after the linear layer three transposed ones in p(x|y,z)."""
    networks = build_conv(SIZES["28x28"], 10)
    convolutions = [m for m in networks.classifier.modules() if isinstance(m, nn.Conv2d)]  # type: ignore[attr-defined]
    assert [c.weight.shape[:2] for c in convolutions] == [(4, 1), (8, 4), (16, 8)]
    assert [layer.stride for layer in networks.inference.trunk.layers] == [(2, 2), (2, 2), (1, 1)]  # type: ignore[attr-defined]
    assert [layer.stride for layer in networks.generator.layers] == [(1, 1), (2, 2), (2, 2)]  # type: ignore[attr-defined]


@each_builder
@each_shape
@each_number_of_classes
def test_shapes(build: Builder, shape: ImageShape, num_classes: int) -> None:
    model = model_of(build, shape, num_classes)
    x, y = images(shape, 5), classes(num_classes, 5)
    assert model.classifier(x).shape == (5, num_classes)
    loc, scale = model.inference(features(model, x), y)
    assert loc.shape == scale.shape == (num_classes, 5, LATENT)
    assert (scale > 0).all()
    z = torch.randn(num_classes, 5, LATENT, generator=generator())
    assert model.generator(y, z).shape == (num_classes, 5, shape.size)
    bound = model.bound(x, features(model, x), y, noise_for(5))
    assert bound.reconstruction.shape == bound.kl_z.shape == bound.value.shape == (num_classes, 5)
    probabilities = model.generate(y, z)
    assert probabilities.shape == (num_classes, 5, shape.size)
    assert ((probabilities > 0) & (probabilities < 1)).all()


@each_builder
def test_networks_tell_their_sizes(build: Builder) -> None:
    networks = build(SIZES["8x8"], 7, latent_size=4)
    assert (networks.num_classes, networks.latent_size) == (7, 4)


@each_builder
def test_every_pixel_and_class_matters(build: Builder) -> None:
    """No pixel is cropped away on the way in, none is constant on the way out, and y reaches z and x."""
    shape = SIZES["9x10"]
    model = model_of(build, shape, 3)
    x = images(shape, 2).requires_grad_()
    for output in (model.classifier(x), features(model, x)):
        (gradient,) = torch.autograd.grad(output.square().sum(), x)
        assert (gradient != 0).all()
    y, z = classes(3, 2), torch.randn(3, 2, LATENT, generator=generator())
    assert (model.generator(y, z).flatten(0, 1).std(dim=0) > 0).all()
    loc, scale = model.inference(features(model, x), y)
    same_z = model.generator(y, z[:1].expand(3, -1, -1))
    for by_class in (loc, scale, same_z):
        assert (by_class.std(dim=0) > 0).any(dim=-1).all()


@each_builder
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_size": 0}, "^latent_size must be >= 1, got 0"),
        ({"hidden": 0}, "^hidden must be >= 1, got 0"),
        ({"dropout": 1.0}, r"^dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"^dropout must be in \[0, 1\), got -0.1"),
        ({"dropout": float("nan")}, r"^dropout must be in \[0, 1\), got nan"),
    ],
)
def test_impossible_settings_are_refused(build: Builder, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(SIZES["8x8"], 10, **changes)


# --- the cost of a step


def output_shapes(module: Any) -> list[torch.Size]:
    """The shape of what `module` returns in each of its calls from now on."""
    shapes: list[torch.Size] = []
    module.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    return shapes


ESTIMATORS: dict[str, tuple[Callable[[], Estimator], int]] = {  # with the calls of f per image
    "marginalization": (Marginalization, 10),
    "gumbel_softmax": (lambda: GumbelSoftmax(lambda step: 0.7, num_samples=3), 3),
    "st_gumbel_softmax": (lambda: StraightThroughGumbelSoftmax(lambda step: 0.7), 1),
    "score_function": (lambda: ScoreFunction(MovingAverage()), 1),
    "leave_one_out": (lambda: ScoreFunction(LeaveOneOut(), num_samples=4), 4),
}


@each_builder
@pytest.mark.parametrize(("estimator", "evaluations"), ESTIMATORS.values(), ids=ESTIMATORS)
def test_work_on_x_is_done_once_whatever_the_estimator(
    build: Builder, estimator: Callable[[], Estimator], evaluations: int
) -> None:
    """Classifier and image features see each image once; the work per class or sample is what `evaluations` says."""
    shape = SIZES["8x8"]
    model = model_of(build, shape, 10)
    inference: Any = model.inference
    on_x = [model.classifier, inference.from_image]
    if build is build_conv:
        on_x += [inference.trunk, *inference.trunk.layers]
    once = [output_shapes(module) for module in on_x]
    generated = output_shapes(model.generator)
    result = run(model, estimator(), shape)
    for shapes in once:
        assert [size[0] for size in shapes] == [LABELLED + UNLABELLED]
    rows = [size[:-1].numel() for size in generated]
    assert sum(rows) == LABELLED + evaluations * UNLABELLED
    assert result.metrics["evaluations"] == evaluations


# --- f: b as a function of y


@each_builder
@each_number_of_classes
def test_bounds_of_all_classes_in_one_call_are_those_of_separate_calls(build: Builder, num_classes: int) -> None:
    model = model_of(build, SIZES["9x10"], num_classes)
    x, y, noise = images(SIZES["9x10"], 3), classes(num_classes, 3), noise_for(3)
    together = bounds(model, x, y, noise)
    separate = torch.cat([bounds(model, x, y[k : k + 1], noise) for k in range(num_classes)])
    torch.testing.assert_close(together, separate)
    assert (together.std(dim=0) > 5e-4).all()  # well above assert_close's 1e-4, or classes could be mixed up unseen


@each_builder
def test_bound_is_deterministic_in_y_and_draws_nothing(build: Builder) -> None:
    """In training mode and with dropout configured: the noise of z is all that there is, and it is given."""
    model = model_of(build, SIZES["8x8"], 10).train()
    x, y, noise = images(SIZES["8x8"], 3), classes(10, 3), noise_for(3)
    state = torch.get_rng_state()
    first = bounds(model, x, y, noise)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(bounds(model, x, y, noise), first)
    assert not torch.equal(bounds(model, x, y, noise + 0.1), first)


@each_builder
def test_noise_is_shared_over_samples(build: Builder) -> None:
    model = model_of(build, SIZES["8x8"], 10)
    x, noise = images(SIZES["8x8"], 3), noise_for(3)
    value = bounds(model, x, classes(10, 3)[4].expand(6, -1, -1), noise)
    torch.testing.assert_close(value, value[:1].expand(6, -1))


@each_builder
def test_bound_takes_relaxed_classes_and_passes_their_gradient(build: Builder) -> None:
    model = model_of(build, SIZES["8x8"], 10)
    x, noise = images(SIZES["8x8"], 3), noise_for(3)
    y = torch.full((2, 3, 10), 0.1, requires_grad=True)
    (gradient,) = torch.autograd.grad(bounds(model, x, y, noise).sum(), y)
    assert (gradient != 0).all()


@each_builder
def test_images_of_a_batch_do_not_influence_each_other(build: Builder) -> None:
    """f has no batch statistics, in training mode too; the classifier, outside f, has none when it is evaluated."""
    shape = SIZES["9x10"]
    model = model_of(build, shape, 10).train()
    x, noise = images(shape, 4), noise_for(4)
    value = bounds(model, x, classes(10, 4), noise)
    model.eval()
    logits = model.classifier(x)
    for i in range(4):
        alone = slice(i, i + 1)
        torch.testing.assert_close(model.classifier(x[alone]), logits[alone])
        model.train()
        value_alone = bounds(model, x[alone], classes(10, 1), noise[alone])
        model.eval()
        torch.testing.assert_close(value_alone, value[:, alone])


@each_builder
def test_channels_last_memory_changes_nothing(build: Builder) -> None:
    """The trainer converts the model; images come as they are."""
    shape = COLOUR
    model = model_of(build, shape, 10)
    x, y, noise = images(shape, 3), classes(10, 3), noise_for(3)
    expected = bounds(model, x, y, noise)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(bounds(model, x, y, noise), expected)


@each_builder
def test_logits_gaussian_and_bound_stay_in_float32_under_bf16(build: Builder) -> None:
    shape = SIZES["28x28"]
    model = model_of(build, shape, 10)
    x, y, noise = images(shape, 3), classes(10, 3), noise_for(3)
    expected = bounds(model, x, y, noise)
    with torch.autocast("cpu", torch.bfloat16):
        assert features(model, x).dtype == torch.bfloat16  # autocast is on
        assert model.classifier(x).dtype == torch.float32
        assert all(part.dtype == torch.float32 for part in model.inference(features(model, x), y))
        actual = bounds(model, x, y, noise)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0.01, atol=0)


@each_builder
def test_gradient_of_j_reaches_every_parameter(build: Builder) -> None:
    model = model_of(build, SIZES["28x28"], 10)
    run(model, Marginalization(), SIZES["28x28"]).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


# --- dropout


def test_dropout_is_the_identity_without_a_generator_or_at_probability_zero() -> None:
    x = torch.randn(50, 20, generator=generator())
    for module in (Dropout(0.5).train(), Dropout(0.5).eval()):
        assert torch.equal(module(x, None), x)
    assert torch.equal(Dropout(0.0)(x, generator()), x)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_dropout_zeroes_its_share_and_keeps_the_mean(probability: float) -> None:
    number, rounded = 100_000, 1 - round((1 - probability) * 2**16) / 2**16
    assert abs(rounded - probability) <= 2**-17
    probability = rounded
    output = Dropout(probability)(torch.ones(number), generator())
    kept = output != 0
    torch.testing.assert_close(output[kept], torch.full((int(kept.sum()),), 1 / (1 - probability)))
    deviation = (probability * (1 - probability) / number) ** 0.5
    assert abs(kept.double().mean().item() - (1 - probability)) < 4 * deviation
    assert abs(output.double().mean().item() - 1) < 4 * deviation / (1 - probability)


def test_dropout_draws_from_its_generator_alone() -> None:
    dropout, x = Dropout(0.5), torch.ones(100)
    state = torch.get_rng_state()
    random = generator(3)
    first, second = dropout(x, random), dropout(x, random)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, second)
    torch.rand(5)
    assert torch.equal(dropout(x, generator(3)), first)


@each_builder
def test_classifier_drops_out_only_where_a_generator_is_given(build: Builder) -> None:
    model, x = model_of(build, SIZES["8x8"], 10).train(), images(SIZES["8x8"], 3)
    plain = model.classifier(x)
    assert torch.equal(model.classifier(x), plain)
    dropped = model.classifier(x, generator(1))
    assert not torch.equal(dropped, plain)
    assert torch.equal(model.classifier(x, generator(1)), dropped)
    without = model_of(build, SIZES["8x8"], 10, dropout=0.0)
    assert torch.equal(without.classifier(x, generator(1)), without.classifier(x))


# --- images turned and shifted by chance


def test_motion_is_the_identity_without_a_generator_or_limits() -> None:
    x = images(COLOUR, 4)
    assert torch.equal(RandomMotion(20.0, 0.1)(x, None), x)
    assert torch.equal(RandomMotion(0.0, 0.0)(x, generator()), x)


@pytest.mark.parametrize("shift", [2 / 9, 1.2 / 9], ids=["two pixels", "rounded up to two"])
def test_motion_shifts_within_its_limit_and_fills_with_zeros(shift: float) -> None:
    """A single pixel of an image lands at every place within the limit, and nowhere else; what leaves is gone."""
    x = torch.zeros(2000, 2, 9, 9)
    x[:, 0, 4, 4] = x[:, 1, 0, 0] = 1
    moved = RandomMotion(0.0, shift)(x, generator())
    reached = moved.amax(dim=0)
    expected = torch.zeros(2, 9, 9)
    expected[0, 2:7, 2:7] = expected[1, :3, :3] = 1
    assert torch.equal(reached, expected)
    assert set(moved.sum(dim=(2, 3)).flatten().tolist()) == {0.0, 1.0}
    assert (moved[:, 0].sum(dim=(1, 2)) == 1).all()


def test_motion_turns_to_both_sides_within_its_limit_and_keeps_binary_pixels() -> None:
    x = torch.zeros(2000, 1, 21, 21)
    x[..., 10, 11:] = 1  # a hand that points to the right
    moved = RandomMotion(30.0, 0.0)(x, generator())
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    angles = torch.tensor(
        [
            math.degrees(math.atan2(10 - i[:, 1].float().mean(), i[:, 2].float().mean() - 10))
            for i in (image.nonzero() for image in moved)
        ]
    )
    assert -32 < angles.min() < -27
    assert 27 < angles.max() < 32
    assert abs(angles.mean()) < 4 * 30 / 3**0.5 / 2000**0.5


def test_motion_draws_from_its_generator_alone_and_for_each_image() -> None:
    x, motion = images(SIZES["28x28"], 1).expand(20, -1, -1, -1), RandomMotion(15.0, 0.07)
    first = motion(x, generator(3))
    torch.rand(5)
    assert torch.equal(motion(x, generator(3)), first)
    assert not torch.equal(motion(x, generator(4)), first)
    assert len({tuple(image.flatten().tolist()) for image in first}) > 15


def test_only_the_classifier_s_images_are_moved_and_only_in_training() -> None:
    still, moving = (model_of(build_conv, SIZES["28x28"], 10, dropout=0.0, rotation=r) for r in (0.0, 20.0))
    x = images(SIZES["28x28"], 3)
    assert torch.equal(still.classifier(x), moving.classifier(x))
    assert not torch.equal(still.classifier(x, generator(1)), moving.classifier(x, generator(1)))
    assert torch.equal(features(still, x), features(moving, x))


def test_activation_is_of_all_layers_but_the_classifier_s() -> None:
    """With the same weights q(y|x) is the same, and each of the other networks another."""
    before, after = (model_of(build_conv, SIZES["8x8"], 10, activation=name) for name in ("relu", "silu"))
    x, y, z = images(SIZES["8x8"], 3), classes(10, 3), torch.randn(10, 3, LATENT, generator=generator())
    assert torch.equal(before.classifier(x), after.classifier(x))
    assert not torch.equal(features(before, x), features(after, x))
    assert not torch.equal(before.style(x, y), after.style(x, y))
    assert not torch.equal(before.generate(y, z), after.generate(y, z))


@pytest.mark.parametrize(
    "limits", [{"rotation": -1.0}, {"rotation": 181.0}, {"shift": -0.5}, {"shift": 2.0}, {"distortion": 1.5}]
)
def test_impossible_motion_is_refused(limits: dict[str, float]) -> None:
    ((name, value),) = limits.items()
    with pytest.raises(ValueError, match=rf"^{name} must be in \[0, .* got {value}$"):
        build_conv(SIZES["8x8"], 10, **limits)


# --- images distorted by chance


def test_distortion_keeps_binary_pixels_and_moves_each_image_otherwise() -> None:
    x = images(SIZES["28x28"], 1).round().expand(20, -1, -1, -1)
    moved = RandomMotion(distortion=1.0)(x, generator())
    assert moved.shape == x.shape
    assert set(moved.abs().unique().tolist()) == {0.0, 1.0}
    assert len({tuple(image.flatten().tolist()) for image in moved}) == 20


def test_distortion_grows_with_its_number_and_is_none_at_zero() -> None:
    """A square's pixels differ from those that it had; at most a few at a tenth, and none at zero."""
    x = torch.zeros(500, 1, 28, 28)
    x[..., 8:20, 8:20] = 1
    changed = [(RandomMotion(distortion=d)(x, generator()) - x).abs().sum(dim=(1, 2, 3)).mean() for d in (0, 0.1, 1)]
    assert changed[0] == 0
    assert 0 < changed[1] < 0.3 * changed[2]


def test_a_share_of_a_distortion_is_a_smaller_one() -> None:
    x = images(SIZES["28x28"], 1).round().expand(20, -1, -1, -1)
    motion, half = RandomMotion(15.0, 0.07, 1.0), RandomMotion(15.0, 0.07, 0.5)(x, generator())
    for share in (0.5, torch.tensor(0.5)):
        motion.share = share
        assert torch.equal(motion(x, generator()), half)
    plain = RandomMotion(15.0, 0.07)(x, generator())
    for none in (0.0, torch.tensor(0.0)):
        motion.share = none
        assert torch.equal(motion(x, generator()), plain)
    assert not torch.equal(half, plain)


def test_what_is_drawn_after_a_distortion_is_the_same_whatever_its_share() -> None:
    """A step that is recorded has its share on the device, and cannot leave the drawing out."""
    x, motion = images(SIZES["28x28"], 1), RandomMotion(distortion=1.0)
    after = []
    for share in (1.0, 0.0, torch.tensor(0.0)):
        motion.share, random = share, generator()
        motion(x, random)
        after.append(torch.rand(5, generator=random))
    assert torch.equal(after[0], after[1])
    assert torch.equal(after[0], after[2])


def test_distortion_warps_about_the_point_that_it_says() -> None:
    """The mean place of pixels is where it was, and each image's differs by the warp, a pixel of 28 at 4 x 4 points."""
    rows = torch.arange(28.0).view(1, 28, 1).expand(4000, 28, 28) - 13.5
    columns = rows.transpose(1, 2)
    from_rows, from_columns = distorted(rows, columns, 1.0, *distortion_noise(4000, rows.device, generator()))
    for found, before in ((from_rows, rows), (from_columns, columns)):
        middle = (found - before)[:, 13:15, 13:15].mean(dim=(1, 2))
        assert abs(middle.mean()) < 4 * middle.std() / 4000**0.5
        assert 0.4 < middle.std() < 1.0  # between the grid's points the field is a mean of them
    slant = (from_columns[:, 27] - from_columns[:, 0]).mean(dim=1)
    assert 0.3 * 27 * 0.8 < slant.abs().quantile(0.95) < 0.3 * 27 * 1.3


@pytest.mark.parametrize("size", [(28, 28), (9, 64)])
def test_what_lies_between_a_grid_s_points_is_bicubic(size: tuple[int, int]) -> None:
    still = torch.zeros(3, *size)
    chances, field = distortion_noise(3, still.device, generator())
    with torch.autocast("cpu", torch.bfloat16):  # in which places are told in float32
        found = distorted(still, still, 1.0, chances, field)
    expected = nn.functional.interpolate(field / 28, size=size, mode="bicubic", align_corners=False)
    for places, side, warp in zip(found, size, expected.unbind(dim=1), strict=True):
        torch.testing.assert_close(places, side * warp)


def test_strokes_get_thicker_and_thinner_by_a_pixel_as_often_as_said() -> None:
    x = torch.zeros(5000, 1, 9, 9)
    x[..., 3:6, 3:6] = 1
    sides = redrawn(x, 0.2, uniform((1, len(x), 1, 1), x.device, generator())).sum(dim=(1, 2, 3)).sqrt()
    assert set(sides.tolist()) == {2.0, 3.0, 4.0}
    for side in (2.0, 4.0):
        assert (sides == side).float().mean() == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / 5000) ** 0.5)


# --- the joined linear layer


def test_joined_linear_is_a_linear_layer_over_the_concatenation() -> None:
    first, second = joined_linear(6, 3, 5)
    joined = nn.Linear(9, 5)
    with torch.no_grad():
        joined.weight.copy_(torch.cat([first.weight, second.weight], dim=1))
        joined.bias.copy_(first.bias)
    x, y = torch.randn(4, 6, generator=generator()), classes(3, 4)
    expected = joined(torch.cat([x.expand(3, -1, -1), y], dim=-1))
    torch.testing.assert_close(first(x) + second(y), expected)
    assert second.bias is None


@pytest.mark.parametrize("num_classes", [3, 8, 9])
@pytest.mark.parametrize("shared", [True, False])
def test_linear_layer_over_z_and_y_is_the_sum_of_the_two(shared: bool, num_classes: int) -> None:
    first, second = joined_linear(6, num_classes, 5)
    z = torch.randn(4, 2, 6, generator=generator())
    given = torch.rand(4, 1 if shared else 2, num_classes, generator=generator())
    y = given.requires_grad_().expand(-1, 2, -1)
    joined = over_latent_and_class(first, second, z, y)
    torch.testing.assert_close(joined, first(z) + second(y))
    inputs = (given, *first.parameters(), *second.parameters())
    for gradient, expected in zip(
        torch.autograd.grad(joined.square().sum(), inputs),
        torch.autograd.grad((first(z) + second(y)).square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(gradient, expected)


def test_joined_linear_is_initialised_as_the_one_layer_would_be() -> None:
    """A class vector's column has the scale of any other input's: 1 / sqrt(all inputs)."""
    torch.manual_seed(0)
    layers = joined_linear(190, 10, 1000)
    limit = 200**-0.5
    for parameter in (layers[0].weight, layers[0].bias, layers[1].weight):
        assert 0.99 * limit < parameter.abs().max() <= limit
        assert parameter.std().item() == pytest.approx(limit / 3**0.5, rel=0.05)


@pytest.mark.parametrize("kind", [TransposedConvSameSize, TransposedConvDoubleSize])
@pytest.mark.parametrize("outputs", [1, 3, 5])
def test_transposed_convolutions_keep_their_output_and_gradients(
    kind: Callable[[int, int], nn.ConvTranspose2d], outputs: int
) -> None:
    torch.manual_seed(0)
    layer = kind(5, outputs).double()
    x = torch.randn(4, 5, 7, 6, dtype=torch.double, requires_grad=True)
    expected = nn.ConvTranspose2d.forward(layer, x)
    output = layer(x)
    torch.testing.assert_close(output, expected)
    direction = torch.randn_like(expected)
    inputs = (x, *layer.parameters())
    for gradient, correct in zip(
        torch.autograd.grad(output, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        torch.testing.assert_close(gradient, correct)
