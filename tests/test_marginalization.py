"""Enumeration in parts: the same numbers in bounded memory, and a cost that grows with K and not with its square."""

from __future__ import annotations

import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch import Tensor

from estimators import marginalization
from estimators.marginalization import Marginalization, affordable_chunk, kept_bytes
from models.contract import Weights
from models.m2.model import SemiSupervisedVAE
from models.m2.objective import objective
from models.networks import conv, mlp
from models.parts import ImageShape, once_if_shared
from tests.runs import ROOT
from training.process import choose_precision

SHAPE, BATCH = ImageShape(1, 8, 8), 5


def model(kind: str, num_classes: int) -> SemiSupervisedVAE:
    torch.manual_seed(0)
    if kind == "mlp":
        return SemiSupervisedVAE(
            mlp(SHAPE, num_classes, latent_size=3, hidden=16, dropout=0.5, scale="softplus"),
        )
    networks = conv(SHAPE, num_classes, latent_size=3, channels=2, hidden=8, dropout=0.5, scale="softplus")
    return SemiSupervisedVAE(networks)


def gradient(vae: SemiSupervisedVAE, estimator: Marginalization, precision: str = "fp32") -> tuple[float, Tensor]:
    random = torch.Generator().manual_seed(1)
    x = torch.rand(2 * BATCH, 1, 8, 8, generator=random).round()
    y = torch.eye(vae.num_classes)[:BATCH]
    vae.zero_grad()
    estimator.prepare(SHAPE.size, 1, vae.num_classes)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        result = objective(vae, estimator, Weights(1, 1, 1), x, y, step=0, generator=random)
    result.loss.backward()
    return result.loss.item(), torch.cat([p.grad.flatten() for p in vae.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("num_classes", "chunk", "expected"),
    [(10, None, True), (16, None, True), (17, None, False), (10, 10, True), (10, 9, False), (1000, 1000, False)],
)
def test_labelled_images_share_the_pass_of_few_classes_in_one_chunk(
    num_classes: int, chunk: int | None, expected: bool
) -> None:
    """Beyond, a row of x for every class would be memory that chunks are there to bound."""
    estimator = Marginalization(chunk)
    estimator.prepare(SHAPE.size, 1, num_classes)
    assert estimator.calls_once == expected


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunks_give_the_gradient_of_the_whole(kind: str, chunk: int) -> None:
    vae = model(kind, 7)
    whole_loss, whole = gradient(vae, Marginalization())
    loss, parts = gradient(vae, Marginalization(chunk))
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_chunks_give_the_gradient_of_the_whole_in_bf16() -> None:
    vae = model("mlp", 7)
    loss, parts = gradient(vae, Marginalization(2), "bf16")
    whole_loss, whole = gradient(vae, Marginalization(), "bf16")
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert (parts - whole).norm() < 0.01 * whole.norm()


def test_a_chunk_is_chosen_where_all_classes_would_keep_too_much() -> None:
    features = torch.randn(BATCH, 1000, requires_grad=True)

    def f(y: Tensor) -> Tensor:  # keeps [S, B, 1000] floats for the square, as the networks keep their layers
        return ((y.sum(dim=-1, keepdim=True) * features).square()).sum(dim=-1)

    classes = torch.eye(100).unsqueeze(1).expand(-1, BATCH, -1)
    each = kept_bytes(f, classes[:2]) - kept_bytes(f, classes[:1])
    assert 4 * BATCH * 1000 <= each < 1.1 * 4 * BATCH * 1000
    assert affordable_chunk(f, classes) == 100
    for limit, chunk in ((100 * each, 100), (100 * each - 1, 49), (20 * each, 10), (1, 1)):
        with mock.patch.object(marginalization, "KEPT_BYTES", limit):
            assert affordable_chunk(f, classes) == chunk


def test_chosen_chunks_are_used_and_f_is_kept_for_none_of_them() -> None:
    vae = model("mlp", 50)
    whole_loss, whole = gradient(vae, Marginalization())
    with mock.patch.object(marginalization, "KEPT_BYTES", 20_000):
        estimator = Marginalization()
        loss, parts = gradient(vae, estimator)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    sizes: list[int] = []
    features, noise = torch.randn(BATCH, 16), torch.randn(BATCH, 3)
    x = torch.rand(BATCH, 1, 8, 8).round()

    def f(y: Tensor) -> Tensor:
        sizes.append(len(y))
        return vae.bound(x, features, y.squeeze(-2), noise).value

    with mock.patch.object(marginalization, "KEPT_BYTES", 20_000):
        chunk = affordable_chunk(f, torch.eye(50).view(50, 1, 1, 50).expand(-1, BATCH, -1, -1))
        assert 1 <= chunk < 25
        sizes.clear()
        random = torch.Generator().manual_seed(0)
        logits = torch.zeros(BATCH, 1, 50, requires_grad=True)
        value = Marginalization()(f, logits, step=0, context=x, generator=random).value
        value.sum().backward()
    assert max(sizes) == chunk
    assert sum(sizes) == 1 + 2 + 50 + 50  # measured with one and two classes, then evaluated forward and backward


def test_chunk_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"^chunk must be >= 1, got 0$"):
        Marginalization(0)


def test_shared_classes_are_seen_once_and_others_are_left_alone() -> None:
    eye = torch.eye(4)
    assert once_if_shared(eye.unsqueeze(1).expand(-1, 3, -1)).shape == (4, 1, 4)
    assert once_if_shared(eye.unsqueeze(1).repeat(1, 3, 1)).shape == (4, 3, 4)
    vae = model("mlp", 4)
    x, noise = torch.rand(3, 1, 8, 8).round(), torch.randn(3, 3)
    shared, own = (eye.unsqueeze(1).expand(-1, 3, -1), eye.unsqueeze(1).repeat(1, 3, 1))
    features = vae.inference.features(x)
    torch.testing.assert_close(vae.bound(x, features, shared, noise).value, vae.bound(x, features, own, noise).value)


MEMORY = """
import resource, sys, torch
from models.networks import mlp
from models.parts import ImageShape
from models.contract import Weights
from models.m2.objective import objective
from models.m2.model import SemiSupervisedVAE
from estimators.marginalization import Marginalization
from training.process import tune_process

vae = SemiSupervisedVAE(mlp(ImageShape(1, 28, 28), 1000, latent_size=50, hidden=500, dropout=0.5, scale="softplus"))
x, y = torch.rand(200, 1, 28, 28).round(), torch.eye(1000)[:100]
random = torch.Generator().manual_seed(0)
tune_process()
with torch.autocast("cpu", torch.bfloat16, enabled=sys.argv[1] == "bf16"):
    result = objective(vae, Marginalization(), Weights(1, 1, 1), x, y, step=0, generator=random)
result.loss.backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


# a minute or two on a CPU without instructions for it, where nobody trains in bf16 either
in_bf16 = [] if choose_precision("auto", torch.device("cpu")) == "bf16" else [pytest.mark.slow]


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux alone")
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=in_bf16)])
def test_a_thousand_classes_take_less_than_two_gibibytes(precision: str) -> None:
    command = [sys.executable, "-c", MEMORY, precision]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 2 * 2**20, ended.stdout
