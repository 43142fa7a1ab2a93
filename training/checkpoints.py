"""Checkpoints: plain containers and tensors, written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from configs.schema import ConfigError

if TYPE_CHECKING:  # importing PyTorch takes seconds, and what only looks at a run folder does not need it
    import torch

FORMAT_VERSION = 1
NEEDED = ("config", "split_hash", "model", "estimator", "optimizer", "random_state")
KEPT = 2
SEAL, LAST_RECORD = b"sha256 ", 22  # bytes of an archive's last record without a comment (APPNOTE.TXT, section 4.3.16)


class CheckpointError(ConfigError):
    """A checkpoint is missing or unusable; the message says which and why."""


@contextmanager
def written(path: Path) -> Iterator[IO[bytes]]:
    """Another file to write to, which is moved into place at the end: `path` is never seen half-written.

    Nothing is left of it after an error. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.unlink(missing_ok=True)  # perhaps a link to elsewhere, in a folder that somebody else made
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk every byte counts
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all. Raises OSError, with the sizes on a full disk."""
    try:
        with written(path) as file:
            file.write(content)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        size, free = len(content) / 1e6, shutil.disk_usage(path.parent).free / 1e6
        reason = f"{error.strerror}: it takes {size:.2f} MB, and {free:.2f} MB are left"
        raise OSError(error.errno, reason, str(path)) from error


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Writes checkpoints/step_XXXXXXXX.pt in a run folder and deletes all but the newest two."""
    import torch

    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    path = checkpoints / f"step_{step:08d}.pt"
    content = io.BytesIO()  # PyTorch's own file writer does not say why it cannot write
    torch.save({"format_version": FORMAT_VERSION, "step": step, **state}, content)
    write_atomically(path, _sealed(content.getvalue()))
    prune(folder)
    return path


def _sealed(content: bytes) -> bytes:
    """An archive with the SHA-256 of all before its last record as its comment: PyTorch heeds parts without a CRC."""
    comment = SEAL + hashlib.sha256(content[:-LAST_RECORD]).hexdigest().encode()
    return content[:-2] + len(comment).to_bytes(2, "little") + comment


def _is_broken(content: bytes, comment: bytes) -> bool:
    """Whether an archive's comment is a seal, and of another content. Those from before have none."""
    digest = hashlib.sha256(memoryview(content)[: -LAST_RECORD - len(comment)])
    return comment.startswith(SEAL) and comment != SEAL + digest.hexdigest().encode()


def prune(folder: Path) -> None:
    """Deletes all checkpoints but the newest two."""
    for old in stored(folder)[:-KEPT]:
        old.unlink()


def drop_newest(folder: Path) -> None:
    """Deletes the newest checkpoint where there is one before it."""
    for newest in stored(folder)[1:][-1:]:
        newest.unlink()


def stored(folder: Path) -> list[Path]:
    """The run folder's checkpoints, oldest first."""
    return sorted((folder / "checkpoints").glob("step_*.pt"))


def load(folder: Path, device: torch.device) -> dict[str, Any]:
    """The newest checkpoint of a run folder, nothing in it unpickled but tensors and plain containers.

    Raises CheckpointError if there is none, or if it is damaged, foreign or of another format version.
    """
    paths = stored(folder)
    if not paths:
        raise CheckpointError(f"{folder} has no checkpoint in checkpoints/; is it a run folder?")
    way_out = f"delete it to go on from {paths[-2].name}" if len(paths) > 1 else "there is none before it"
    try:
        return _load(paths[-1], device, way_out)
    except CheckpointError:
        if paths[-1].exists():
            raise
    return load(folder, device)  # a run that still trains has written newer ones and deleted this one


def load_named(folder: Path, checkpoint: Path, device: torch.device) -> dict[str, Any]:
    """A checkpoint by its name in the run folder, or by its path. Raises CheckpointError."""
    inside = folder / "checkpoints" / checkpoint
    path = inside if inside.is_file() else checkpoint
    others = ", ".join(path.name for path in stored(folder)) or "none"
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {checkpoint}; {folder} has {others}")
    return _load(path, device, f"{folder} has {others}")


def _load(path: Path, device: torch.device, way_out: str) -> dict[str, Any]:
    import torch

    try:
        content = path.read_bytes()  # once: a run that still trains may put another of this step in its place
        with zipfile.ZipFile(io.BytesIO(content)) as archive:  # torch.load compares no checksums
            damaged = archive.testzip()
            if damaged or _is_broken(content, archive.comment):
                raise zipfile.BadZipFile(f"the checksum of {damaged or 'the file'} is wrong")
        state = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except Exception as error:  # a damaged archive fails in many ways, and each means the same to a person
        reason = f"{type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0]}"
        raise CheckpointError(f"{path} cannot be read ({reason}); {way_out}") from error
    version = state.get("format_version") if isinstance(state, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, and this program reads {FORMAT_VERSION}; {way_out}"
        )
    if lacking := [name for name in NEEDED if name not in state]:
        raise CheckpointError(f"{path} is not a run's: it has no {lacking[0]}; {way_out}")
    return dict(state)
