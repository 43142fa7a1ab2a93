"""Checkpoints: plain containers and tensors, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

FORMAT_VERSION = 1
KEPT = 2


class CheckpointError(Exception):
    """A checkpoint is missing or unusable; the message says which and why."""


def write_atomically(path: Path, write: Any) -> None:
    """Calls write(temporary file's path), then moves it into place: `path` is never seen half-written."""
    temporary = path.with_name(f".{path.name}.partial")
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Writes checkpoints/step_XXXXXXXX.pt in a run folder and deletes all but the newest two."""
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    path = checkpoints / f"step_{step:08d}.pt"
    content = {"format_version": FORMAT_VERSION, "step": step, **state}
    write_atomically(path, lambda temporary: torch.save(content, temporary))
    for old in stored(folder)[:-KEPT]:
        old.unlink()
    return path


def stored(folder: Path) -> list[Path]:
    """The run folder's checkpoints, oldest first."""
    return sorted((folder / "checkpoints").glob("step_*.pt"))


def load(folder: Path, device: torch.device) -> dict[str, Any]:
    """The newest checkpoint of a run folder. Raises CheckpointError."""
    paths = stored(folder)
    if not paths:
        raise CheckpointError(f"{folder} has no checkpoint in checkpoints/; is it a run folder?")
    try:
        state: dict[str, Any] = torch.load(paths[-1], map_location=device, weights_only=True)
    except Exception as error:  # a damaged archive fails in many ways, and each means the same to a person
        raise CheckpointError(
            f"{paths[-1]} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "delete it to go on from the one before"
        ) from error
    if state.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{paths[-1]} has format version {state.get('format_version')}, this program reads {FORMAT_VERSION}"
        )
    return state
