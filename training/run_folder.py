"""What a run leaves in its folder besides checkpoints and TensorBoard events."""

from __future__ import annotations

import errno
import functools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from configs.schema import ConfigError
from training.checkpoints import write_atomically

RESULT = "result.json"
SPLIT = "split.json"
LOCK = ".lock"
EVENTS = "events.out.tfevents.*"
CHOSEN_BY = {"val_accuracy": "val accuracy", "val_log_likelihood": "val log p(x)", "val_bound": "val bound"}
# of file systems without locks, such as Lustre mounted without -o flock
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)

_held: dict[Path, int] = {}  # locks of this process: the files, and their descriptors


def hold(lock: Path) -> None:
    """Takes a lock for this process, which the system drops when the process ends, however it ends.

    Raises ConfigError if another process has it. Windows and some file systems have no such lock, and there this does
    nothing.
    """
    if lock.resolve() in _held:
        return
    file = os.open(lock, os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o666)
    for tries in reversed(range(5)):
        if _lock(file, exclusive=True) is not False:
            break
        if tries:
            time.sleep(0.02)  # is_held of another process has it for a moment
            continue
        os.close(file)
        raise ConfigError(in_use(lock))
    _held[lock.resolve()] = file
    with suppress(OSError):  # on a full disk, or one that has just become read-only, the lock is what counts
        os.ftruncate(file, 0)
        os.write(file, f"{os.getpid()} {platform.node()}".encode())


def in_use(lock: Path) -> str:
    """The sentence for a lock that another process has, and which one has it."""
    return f"{lock.parent} is in use: {holder(lock)} trains there; wait for it, or stop it"


def holder(lock: Path) -> str:
    """The process that has a lock, as it wrote itself down: its number, and its machine if that is another one."""
    try:
        number, _, machine = lock.read_text(errors="replace").partition(" ")
    except OSError:
        number, machine = "", ""
    if not number.isdecimal():
        return "another process"
    return f"process {number}" + (f" on {machine}" if machine.split()[:1] != [platform.node()] else "")


def release(lock: Path) -> None:
    if (file := _held.pop(lock.resolve(), None)) is not None:
        os.close(file)


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """Takes a lock that this process keeps, unless what is done inside ends with an error. Raises ConfigError."""
    is_new = not lock.exists()
    hold(lock)
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):
                lock.unlink()
        release(lock)
        raise


def is_held(lock: Path) -> bool | None:
    """Whether another process has the lock; on Windows, whether it may have had it; None where there are no locks."""
    if sys.platform == "win32" or not lock.exists():
        return lock.exists()
    with lock.open() as file:
        taken = _lock(file.fileno(), exclusive=False)
    return None if taken is None else not taken


def _lock(file: int, *, exclusive: bool) -> bool | None:
    """Whether the file is this process's now, or another has it; None where there are no locks. Raises OSError."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _say_unguarded(error.strerror)
        return None
    return True


@functools.cache  # once a process
def _say_unguarded(reason: str) -> None:
    sentence = f"this file system has no locks ({reason}): nothing keeps a second process out of the folder of a run"
    print(f"catvae: {sentence}", file=sys.stderr)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in `folder`. Raises ConfigError if another process has it."""
    hold(folder / LOCK)  # a run has it since the check before work
    try:
        yield
    finally:
        release(folder / LOCK)


def events_folder(folder: Path) -> Path | None:
    """Where a run's TensorBoard events are: in a folder of their own, whose name TensorBoard shows.

    Runs from before have them in the run folder itself; None where there are none yet.
    """
    below = (file for file in sorted(folder.glob(f"*/{EVENTS}")) if not file.parent.is_symlink())
    return next((file.parent for file in (*folder.glob(EVENTS), *below)), None)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def chosen_by(result: Mapping[str, Any]) -> tuple[str, float] | None:
    """What a result is chosen by, the larger the better: its name, and it; None where nothing was measured.

    Validation accuracy, of a model without classes log p(x) of validation images if it was measured, else the bound.
    """
    for name, title in CHOSEN_BY.items():
        if result.get(name) is not None:
            return title, float(result[name])
    return None


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
