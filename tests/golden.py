"""Golden runs: J of the first steps of a tiny run, for every estimator and family of models, in tests/golden.json.

A change that is meant to change these numbers writes them anew, and says so:

    uv run python -m tests.golden
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from data.randomness import random_int16
from tests.runs import ESTIMATORS, FAMILIES, MLP, STEPS, curve, run

FILE = Path(__file__).with_name("golden.json")


def line(name: str) -> str:
    """The run of an estimator, on the semi-supervised model, or of a family."""
    of = FAMILIES[name] if name in FAMILIES else f"{MLP} {ESTIMATORS[name]}"
    return f"{of} train.steps={STEPS}"


def draws() -> list[float]:
    """Random numbers of each kind that the runs draw: builds of PyTorch that differ in these cannot be compared."""
    generator = torch.Generator().manual_seed(0)
    kinds = (
        torch.empty(20, 10).exponential_(generator=generator),
        torch.randn(20, 2, generator=generator),
        random_int16(torch.Size([20, 63]), generator).double(),
    )
    permutation = torch.randperm(50, generator=generator)
    torch.manual_seed(0)
    return [*(kind.mean().item() for kind in kinds), permutation[0].item(), torch.empty(100).uniform_().mean().item()]


def curves() -> dict[str, list[float]]:
    """train/J of each step by the real command."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate([*ESTIMATORS, *FAMILIES]):
            run(line(name), Path(folder, str(number)))
            found[name] = [value for _, value in curve(Path(folder, str(number)), "train/J")]
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps({"draws": draws(), "J": curves()}, indent=1) + "\n")
    print(FILE)
