"""What a run leaves in its folder besides checkpoints and TensorBoard events."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from training.checkpoints import write_atomically

RESULT = "result.json"
SPLIT = "split.json"


def write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def git_commit() -> str | None:
    """The commit of this program's checkout, with `-dirty` where it was changed; None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str]:
    packages = ("torch", "hydra-core", "omegaconf", "numpy", "tensorboard")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
