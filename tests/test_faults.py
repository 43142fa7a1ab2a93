"""What goes wrong around a run: the disk, permissions, a second process. Each by the real command."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.runs import MLP, ROOT, checkpoint, equal, resume, run
from training import checkpoints
from training.run_folder import LOCK

FEW = f"{MLP} train.steps=20 train.checkpoint_every=2 train.validate_every=2 "


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small disk with the given options, or skips."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"needs to mount a tmpfs: {done.stderr.strip()}")
        return place

    try:
        yield mount
    finally:
        if place.is_mount():
            subprocess.run(["umount", place], check=True)


def one_line(said: str) -> str:
    lines = [line for line in said.splitlines() if line.startswith("catvae: ")]
    assert len(lines) == 1
    assert "Traceback" not in said
    return lines[0]


@pytest.mark.parametrize("kilobytes", [100, 200, 300])
def test_full_disk(disk: Callable[[str], Path], tmp_path: Path, kilobytes: int) -> None:
    place = disk(f"size={kilobytes}k")
    ended = run(FEW, place / "run", code=1)
    said = one_line(ended.err)
    assert "No space left on device" in said
    assert f"resume={place / 'run'}" in said
    assert not list(place.rglob("*.partial"))
    assert "MB left, and a checkpoint takes" in ended.said
    left = checkpoint(place / "run")["step"]
    subprocess.run(["mount", "-o", "remount,size=20m", place], check=True)
    resume(place / "run")
    assert left < checkpoint(place / "run")["step"] == 20
    run(FEW, tmp_path / "roomy")
    assert equal(checkpoint(place / "run"), checkpoint(tmp_path / "roomy"))


def test_disk_that_is_full_from_the_start(disk: Callable[[str], Path]) -> None:
    place = disk("size=24k")
    said = one_line(run(FEW, place / "run", code=1).err)
    assert "No space left on device" in said
    assert "start again" in said


def test_read_only_folder(disk: Callable[[str], Path]) -> None:
    place = disk("size=20m")
    run(FEW + "train.steps=4", place / "run")
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    for ended in (resume(place / "run", "train.steps=20", code=2), run(FEW, place / "new", code=2)):
        assert "Read-only file system" in one_line(ended.err)
    assert checkpoint(place / "run")["step"] == 4


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(FEW + "train.steps=4", folder)
    before = checkpoint(folder)
    with (folder / LOCK).open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert f"{folder} is in use" in one_line(resume(folder, "train.steps=6", code=2).err)
    assert equal(checkpoint(folder), before)
    resume(folder, "train.steps=6")
    assert checkpoint(folder)["step"] == 6


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    line = f"{FEW} train.steps=100000 hydra.run.dir={folder}"
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *shlex.split(line)],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        while len(checkpoints.stored(folder)) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        assert f"{folder} is in use" in one_line(resume(folder, code=2).err)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    state = checkpoints.load(folder, torch.device("cpu"))
    resume(folder, f"train.steps={state['step'] + 2}")
    assert checkpoint(folder)["step"] == state["step"] + 2
