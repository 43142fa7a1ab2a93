"""scripts.benchmark: it times the trainer's own step, and what it is compared with."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.schema import ConfigError
from models.m2.model import Networks, SemiSupervisedVAE
from scripts import benchmark, peers
from scripts.gradient_quality import all_names
from tests.runs import MLP, ROOT, checkpoint, command, run


def test_every_estimator_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # images this small take one thread, unless it says otherwise
    ended = command(benchmark.main, f"--rounds 1 {MLP} --output {tmp_path / 'figures.json'}")
    assert (ended.code, ended.err) == (0, "")
    head, _, names, *rows = ended.out.splitlines()
    assert head.startswith("mlp on digits, 10 + 10 images, fp32, ")
    assert names.split() == ["estimator", "calls", "ms", "steps/s", "products", "floor", *benchmark.PARTS]
    cells = [row.split() for row in rows[: len(all_names())]]
    assert {name for name, *_ in cells} == set(all_names())
    milliseconds = [float(row[2]) for row in cells]
    assert milliseconds == sorted(milliseconds)
    for row in cells:
        assert float(row[2]) * float(row[3]) == pytest.approx(1000, rel=0.05)
        assert sum(float(share.rstrip("%")) for share in row[6:]) == pytest.approx(100, abs=0.5)
    assert dict((row[0], row[1]) for row in cells)["marginalization"] == "10"
    found = json.loads((tmp_path / "figures.json").read_text())
    assert {row["estimator"] for row in found["estimators"]} == set(all_names())
    assert found["threads"] == 1


@pytest.mark.parametrize(
    "settings",
    ["", "objective.labels_first=1 objective.distortion_fades=2 model.distortion=0.5 train.clip_gradient=0.1"],
)
def test_a_timed_step_is_the_trainers(settings: str, tmp_path: Path) -> None:
    line = f"{MLP} train.steps=3 {settings}"
    run(f"{line} estimator=reinmax", tmp_path / "run")
    trainer = benchmark.Trainer(benchmark.compose_run(line.split(), "reinmax"))
    for _ in range(3):
        trainer.step()
    trained = checkpoint(tmp_path / "run")["model"]
    assert all(torch.equal(value, trained[name]) for name, value in trainer.run.model.state_dict().items())


def test_the_floor_counts_the_products_of_a_step() -> None:
    """Marginalization of an MLP: each layer's product forward, for its weights, and for its input unless that is x."""
    batch, pixels, hidden, size, classes = 10, 64, 16, 2, 10
    trainer = benchmark.Trainer(benchmark.compose_run(MLP.split(), "marginalization"))
    operations = peers.operations_of(trainer.step)
    rows = batch * (1 + classes)  # labelled, and unlabelled in every class
    from_x = 2 * (2 * batch) * pixels * hidden  # classifier and inference network
    per_row = hidden * 2 * size + (size + classes) * hidden + hidden * pixels
    from_classes = rows * classes * hidden  # of the inference network, whose y needs no gradient
    expected = 2 * (2 * from_x + 3 * (2 * batch) * hidden * classes + 3 * rows * per_row + 2 * from_classes)
    assert operations == expected


def test_growth_is_timed_and_drawn(tmp_path: Path) -> None:
    line = MLP.replace("data.num_labelled=50", "data.num_labelled=\\${data.random_classes}")
    ended = command(
        benchmark.main,
        f"--classes 2,20 --rounds 1 --estimators marginalization,gumbel_softmax {line} "
        f"--output {tmp_path / 'growth.json'} --picture {tmp_path / 'growth.svg'}",
    )
    assert ended.code == 0, ended.said
    rows = json.loads((tmp_path / "growth.json").read_text())["growth"]
    assert [row["classes"] for row in rows] == [2, 20]
    assert all(seconds > 0 for row in rows for seconds in row["seconds"].values())
    assert (tmp_path / "growth.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("make", "networks_from"),
    [
        (peers.plain_loop, lambda ours: ours),
        (peers.pyro_svi, lambda ours: ours),
        (peers.pyro_svi, peers.concatenating),
        (peers.pyro_example, peers.concatenating),
    ],
)
@pytest.mark.parametrize("sampled", [False, True])
def test_peers_learn(make: peers.MakeStep, networks_from: Callable[[Networks], Networks], sampled: bool) -> None:
    """They are timed at real work: their bound rises."""
    trainer = benchmark.Trainer(benchmark.compose_run([*MLP.split(), "objective.alpha=1"], "marginalization"))
    networks = networks_from(benchmark.networks_of(trainer.run.model))
    trainer.run.model = SemiSupervisedVAE(networks)
    step = make(trainer.run, networks, sampled)
    before = trainer.run.evaluate(trainer.run.validation).bound
    for _ in range(60):
        step()
    assert trainer.run.evaluate(trainer.run.validation).bound > before + 1


JAX = """
import sys
from scripts.benchmark import compose_run, networks_of
from scripts.peer_in_jax import jax_step
run = compose_run(sys.argv[2:], "marginalization")
step = jax_step(run, networks_of(run.model), sampled=sys.argv[1] == "True")
print(*(float(step()) for _ in range(60)))
"""


@pytest.mark.parametrize("sampled", [False, True])
def test_the_peer_in_jax_learns(sampled: bool) -> None:
    """In a process of its own, as JAX does not bear the forks of other tests."""
    for module in ("jax", "optax"):
        if find_spec(module) is None:
            pytest.skip("needs JAX: uv sync --extra jax")
    arguments = [sys.executable, "-c", JAX, str(sampled), *MLP.split(), "objective.alpha=1"]
    ended = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=ROOT)
    losses = [float(loss) for loss in ended.stdout.split()]
    assert sum(losses[-10:]) < sum(losses[:10]) - 10


@pytest.mark.parametrize(
    ("peer", "said"),
    [
        ("pyro", "--peer pyro needs Pyro; it comes by: uv sync --group dev"),
        ("jax", "--peer jax needs JAX; it comes by: uv sync --extra jax"),
    ],
)
def test_without_the_peer_it_says_how_to_get_it(peer: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, peer, None)
    ended = command(benchmark.main, f"--peer {peer} --rounds 1 --estimators marginalization {MLP}")
    assert ended.code == 2
    assert ended.err == f"catvae: {said}\n"


def test_a_bad_argument_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", sys)  # as if it were there
    for line, said in (
        ("data=digts", "data must be one of"),
        ("--estimators nope", "estimators must be names out of"),
        ("--output figures.txt", "--output must end in .json"),
        ("--peer plain --estimators gumbel_softmax data=digits model=auxiliary_mlp", "--peer must be none"),
        (f"--peer plain {MLP} data.binarization=none likelihood=gaussian", "--peer must go with likelihood=bernoulli"),
        (f"--peer plain {MLP} prior=labelled", "--peer must go with likelihood=bernoulli"),
        (f"--peer jax {MLP} model.rotation=9", "--peer jax must go with model.rotation=0"),
        ("--peer jax data=digits data.binarization=dynamic", "--peer jax must go with model=mlp"),
        (f"--picture speed.png {MLP}", "--picture must go with --classes"),
        (f"--classes 2 --memory {MLP}", "--classes must go without --memory and --peer"),
    ):
        ended = command(benchmark.main, line)
        assert ended.code == 2
        assert ended.err.count("\n") == 1
        assert said in ended.err


def test_what_is_measured_apart_finds_files_as_this_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = np.arange(60) % 3
    np.savez(tmp_path / "mine.npz", images=(np.arange(60 * 64) % 256).astype(np.uint8).reshape(60, 8, 8), labels=labels)
    monkeypatch.chdir(tmp_path)
    line = "data=arrays data.path=mine.npz data.num_labelled=6 data.num_validation=6 model=mlp model.hidden=8"
    assert benchmark.peak_memory(line.split(), "marginalization") > 0
    with pytest.raises(ConfigError, match="--peak-of marginalization in a process of its own ended with exit code 2"):
        benchmark.peak_memory([line.replace("mine", "yours")], "marginalization")
