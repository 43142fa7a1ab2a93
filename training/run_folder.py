"""What a run leaves in its folder besides checkpoints and TensorBoard events."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from configs.schema import ConfigError
from training.checkpoints import write_atomically

RESULT = "result.json"
SPLIT = "split.json"
LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in `folder`. The system drops the lock when this one ends, however it ends.

    Raises ConfigError if another process has it. Windows has no such lock, and there this does nothing.
    """
    with (folder / LOCK).open("a") as file:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                message = f"{folder} is in use: another process trains there; wait for it, or stop it"
                raise ConfigError(message) from None
        yield


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


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
