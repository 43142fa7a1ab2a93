"""scripts.benchmark: it times the trainer's own step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scripts import benchmark
from scripts.gradient_quality import all_names
from tests.runs import MLP, checkpoint, command, run


def test_every_estimator_is_timed() -> None:
    ended = command(benchmark.main, f"--rounds 1 {MLP}")
    assert (ended.code, ended.err) == (0, "")
    head, _, names, *rows = ended.out.splitlines()
    assert head.startswith("digits, fp32 on cpu")
    assert names.split() == ["estimator", "calls", "ms", "a", "step", "steps/s"]
    cells = [row.split() for row in rows]
    assert {name for name, *_ in cells} == set(all_names())
    milliseconds = [float(row[2]) for row in cells]
    assert milliseconds == sorted(milliseconds)
    assert all(float(row[2]) * float(row[3]) == pytest.approx(1000, rel=0.2) for row in cells)
    assert dict((row[0], row[1]) for row in cells)["marginalization"] == "10"


def test_a_timed_step_is_the_trainers(tmp_path: Path) -> None:
    line = f"{MLP} train.steps=3"
    run(f"{line} estimator=reinmax", tmp_path / "run")
    timed = benchmark.compose_run(line.split(), "reinmax")
    for _ in range(3):
        benchmark.timed(timed)
    trained = checkpoint(tmp_path / "run")["model"]
    assert all(torch.equal(value, trained[name]) for name, value in timed.model.state_dict().items())


def test_a_bad_argument_is_refused_in_one_sentence() -> None:
    ended = command(benchmark.main, "data=digts")
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert "data must be one of" in ended.err
