"""What takes seconds to import and is not needed is not imported; a process tells, as this one has it all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.runs import MLP, ROOT, run

TRAINED = """
import inspect, sys, train
train.main()
assert "torch" in sys.modules
slow = {"torch._dynamo.eval_frame", "torch._inductor", "torch.fx.experimental.symbolic_shapes", "sklearn", "scipy"}
assert not slow & sys.modules.keys(), slow & sys.modules.keys()

import torch
inspect.getmodule(inspect.currentframe())  # looks at every module
assert "torch._dynamo.eval_frame" not in sys.modules
layer, breaks = torch.nn.Linear(2, 1), []
compiled = torch.compile(layer, backend=lambda graph, inputs: breaks.append(graph) or graph.forward)
optimizer = torch.optim.Adam(layer.parameters(), lr=0.5)
before = compiled(torch.ones(1, 2))
before.sum().backward()
optimizer.step()
assert breaks and "torch._dynamo.eval_frame" in sys.modules
assert torch.allclose(before - compiled(torch.ones(1, 2)), torch.tensor(1.5))
"""
COMPARED = """
import sys, scripts.compare
scripts.compare.main()
assert not {"torch", "sklearn", "matplotlib"} & sys.modules.keys()
"""


def process(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_imports_no_compiler_until_somebody_compiles(tmp_path: Path) -> None:
    process(TRAINED, *MLP.split(), "train.steps=2", f"hydra.run.dir={tmp_path}/run")
    assert (tmp_path / "run" / "result.json").is_file()


def test_comparing_finished_runs_imports_no_pytorch(tmp_path: Path) -> None:
    run(f"{MLP} train.steps=1", tmp_path / "run")
    assert "1 finished run" in process(COMPARED, str(tmp_path / "run"))
