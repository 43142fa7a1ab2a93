"""On a GPU: what the other tests show on a CPU, and what only a GPU can get wrong. `uv run pytest -m gpu -n 0`"""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from data.batches import binarize
from estimators.relaxations import gumbel
from models.parts import Dropout
from scripts.benchmark import compose_run
from scripts.gradient_quality import all_names
from tests.runs import checkpoint, command, equal, resume
from tests.runs import run as run_line
from tests.test_update import assert_replayed_is_the_same
from training import checkpoints
from training.divergence import Diverged, FiniteGuard
from training.update import ReplayedUpdate, Update

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU = torch.device("cuda")
SMALL = "data=digits data.num_labelled=50 data.num_validation=200 device=cuda "
MLP, CONV = SMALL + "model=mlp model.hidden=64", SMALL + "model=conv model.channels=4"
UNLABELLED = "data=digits data.num_validation=200 data.binarization=fixed device=cuda model=categorical_mlp"
AUXILIARY = MLP.replace("model=mlp", "model=auxiliary_mlp model.auxiliary_size=8")
LINES = {"mlp": MLP, "conv": CONV, "auxiliary": AUXILIARY}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
@pytest.mark.parametrize("estimator", all_names())
def test_a_replayed_step_has_the_bits_of_one_that_is_run(estimator: str, line: str) -> None:
    assert_replayed_is_the_same(f"{line} deterministic=true", estimator)


@pytest.mark.parametrize("kind", [Update, ReplayedUpdate])
@pytest.mark.parametrize("estimator", [name for name in all_names() if name != "sparsemax"])
def test_no_step_waits_for_the_device_or_warns(estimator: str, kind: type[Update]) -> None:
    run = compose_run(MLP.split(), estimator)
    guard = FiniteGuard(run.optimizer, run.parameters, run.device)
    update = kind(run, guard)
    torch.set_warn_always(True)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            for step in range(12):
                result = update(step)  # held while the next one is run, as train.py does
                run.add(result, guard.norm)
                if step == 5:
                    torch.cuda.set_sync_debug_mode("error")
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.set_warn_always(False)
    assert not [str(w.message) for w in warned if "AccumulateGrad" in str(w.message)]


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_every_optimizer_is_recorded(optimizer: str) -> None:
    assert_replayed_is_the_same(f"{MLP} optimizer={optimizer} deterministic=true", "gumbel_softmax")


def test_a_model_without_labels_is_recorded() -> None:
    assert_replayed_is_the_same(f"{UNLABELLED} deterministic=true", "concrete")


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_float32_on_the_gpu_is_float32(line: str) -> None:
    """Without TF32: b(x, y) and its gradient are the CPU's to some 1e-5."""
    run = compose_run([*line.split(), "precision=fp32"], "marginalization")
    x = (run.validation.x[:64].float() / 255).round()
    model: Any = run.model.eval()
    y, noise = torch.eye(10, device=GPU).unsqueeze(1).expand(-1, 64, -1), torch.randn(64, model.latent_size).to(GPU)
    on_cpu: Any = copy.deepcopy(model).cpu()
    found = []
    for m, device in ((model, GPU), (on_cpu, torch.device("cpu"))):
        x_, y_, noise_ = x.to(device), y.to(device), noise.to(device)
        value = m.bound(x_, m.inference.features(x_), y_, noise_).value
        generator = torch.Generator(device)
        gradient = torch.autograd.grad(
            value.mean() + m.classifier(x_, generator).square().mean(), list(m.parameters()), allow_unused=True
        )
        found.append([value.detach().cpu(), *(g.cpu() for g in gradient if g is not None)])
    for on_gpu, reference in zip(*found, strict=True):
        assert (on_gpu - reference).norm() <= 1e-4 * reference.norm() + 1e-6


def test_draws_on_the_gpu_have_their_distributions() -> None:
    generator = torch.Generator(GPU).manual_seed(1)
    logits, number = torch.tensor([0.0, 1.0, 2.0, -1.0], device=GPU), 10**6
    noise = gumbel((number, 4), generator=generator)
    assert noise.isfinite().all()
    shares = torch.bincount((logits + noise).argmax(dim=-1), minlength=4) / number
    assert torch.allclose(shares, logits.softmax(dim=-1), atol=4e-3)
    for value in (0, 1, 64, 254, 255):
        image = torch.full((number,), value, dtype=torch.uint8, device=GPU)
        assert binarize(image, "dynamic", generator).mean().item() == pytest.approx(value / 255, abs=3e-3)
    dropped = Dropout(0.3)(torch.ones(number, device=GPU), generator)
    assert dropped.mean().item() == pytest.approx(1, abs=4e-3)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=3e-3)
    for size in (100, 60_000):
        rows = torch.randperm(size, device=GPU, generator=generator)
        assert torch.equal(rows.sort().values, torch.arange(size, device=GPU))


def test_a_diverged_step_blocks_the_updates_of_a_recording() -> None:
    run = compose_run(MLP.split(), "marginalization")
    guard = FiniteGuard(run.optimizer, run.parameters, run.device)
    update = ReplayedUpdate(run, guard)
    for step in range(6):
        update(step)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.batches.data.y_labelled.fill_(math.nan)
    for step in range(6, 9):
        update(step)
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    with pytest.raises(Diverged, match=r"at step 6$"):
        guard.raise_if_diverged()


@pytest.mark.parametrize("graph", ["false", "true"])
def test_a_resumed_run_has_the_bits_of_one_that_was_never_stopped(graph: str, tmp_path: Path) -> None:
    line = f"{MLP} estimator=gumbel_softmax deterministic=true cuda_graph={graph} lr_factor=constant "
    line += "schedule@estimator.temperature=constant train.steps="
    run_line(f"{line}20", tmp_path / "whole")
    run_line(f"{line}9", tmp_path / "stopped")
    resume(tmp_path / "stopped", "train.steps=20")
    whole, stopped = (checkpoints.load(tmp_path / name, GPU)["model"] for name in ("whole", "stopped"))
    assert all(torch.equal(value, stopped[name]) for name, value in whole.items())


def test_runs_side_by_side_have_the_bits_that_they_have_alone(tmp_path: Path) -> None:
    line = f"-m {MLP} estimator=gumbel_softmax,relax seed=1,2 deterministic=true train.steps=20 "
    for folder, launcher in (("alone", "basic cuda_graph=true"), ("beside", "side_by_side")):
        ended = command(train.main, f"{line} hydra/launcher={launcher} hydra.sweep.dir={tmp_path / folder}")
        assert ended.code == 0, ended.said
    for job in map(str, range(4)):
        alone, beside = (checkpoint(tmp_path / folder / job) for folder in ("alone", "beside"))
        for part in ("model", "estimator", "optimizer"):
            assert equal(alone[part], beside[part]), part
