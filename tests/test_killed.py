"""Runs that are killed, in processes of their own, and go on as if nothing had been; and what changes no bits."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.runs import ESTIMATORS, MLP, ROOT, checkpoint, curve, equal, resume, run
from training import checkpoints

RUN = f"{MLP} {ESTIMATORS['score_function/learned']} lr_factor=cosine train.checkpoint_every=2 train.validate_every=3 "
FEW = f"{RUN} train.steps=8"
MANY = f"{RUN} train.steps=40"

# A sitecustomize.py, which Python runs before the command. Files that must be whole change at few moments: a file that
# is to be moved into place has nothing in it, half of it, or all; it is in its place; an old checkpoint is gone. Events
# for TensorBoard, which another thread writes, reach the disk slowly.
KILLER = """
import os, signal, time
from tensorboard.summary.writer.record_writer import RecordWriter

at, *others = map(int, os.environ["KILLED_AT"].split(","))
if others:  # a process for each, which need not import everything anew
    import sklearn.datasets, torch.utils.tensorboard, training.report, training.result

    for at in at, *others:
        child = os.fork()
        if not child:
            break
        os.waitpid(child, 0)
    else:
        os._exit(0)
os.environ["KILLED_AT"] = str(at)
log = os.environ["MOMENTS"] + str(at)
fsync, replace, unlink = os.fsync, os.replace, os.unlink
count = 0

def moment(name):
    global count
    count += 1
    with open(log, "a") as file:
        print(name, file=file)
    if count == at:
        os.kill(os.getpid(), signal.SIGKILL)

def watched_fsync(descriptor):
    fsync(descriptor)
    size = os.fstat(descriptor).st_size
    for length, name in ((0, "nothing"), (size // 2, "half")):
        if count + 1 == at:
            os.truncate(descriptor, length)
        moment(f"{name} of a file")

def watched_replace(source, target, **keywords):
    moment(f"all of {os.path.basename(source)}")
    replace(source, target, **keywords)
    moment(f"{os.path.basename(target)} in place")

def watched_unlink(path, **keywords):
    unlink(path, **keywords)
    if str(path).endswith(".pt"):
        moment(f"{os.path.basename(path)} gone")

def slow_write(self, data):
    time.sleep(0.005)
    write_record(self, data)

write_record, RecordWriter.write = RecordWriter.write, slow_write
os.fsync, os.replace, os.unlink = watched_fsync, watched_replace, watched_unlink
"""
# of FEW: four for split.json, result.json, three files of the projector and each checkpoint: 0, 2, 4 and, before
# and after they are looked at, 3, 6 and 8; and four checkpoints that go
MOMENTS = 64
DRAWN = random.Random(0)
AT_START, AT_WORK = [DRAWN.random() for _ in range(4)], [DRAWN.random() for _ in range(15)]
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Starts the real command, which kills itself at the moment number `at`, or one after another, at each of `at`."""
    hook = tmp_path_factory.mktemp("hook")
    (hook / "sitecustomize.py").write_text(KILLER)

    def start(line: str, folder: Path, *at: int) -> subprocess.Popen[str]:
        moments = ",".join(map(str, at or [0]))
        hooked = {"PYTHONPATH": f"{hook}:{ROOT}", "KILLED_AT": moments, "MOMENTS": f"{folder}.moments."}
        return subprocess.Popen(
            [sys.executable, ROOT / "train.py", *shlex.split(line), f"hydra.run.dir={folder}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | hooked,
        )

    return start


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the run of a command line that was never killed."""
    folders: dict[str, Path] = {}

    def find(line: str) -> Path:
        if line not in folders:
            folders[line] = tmp_path_factory.mktemp("whole") / "run"
            run(line, folders[line])
        return folders[line]

    return find


@pytest.fixture(scope="module")
def seconds(start: Start, tmp_path_factory: pytest.TempPathFactory) -> tuple[float, float]:
    """How long MANY takes until its first file is there, and from there to its end."""
    folder = tmp_path_factory.mktemp("timed") / "run"
    begun = time.monotonic()
    process = start(MANY, folder)
    wait_for_work(process, folder)
    working = time.monotonic()
    assert not died(process)
    return working - begun, time.monotonic() - working


def wait_for_work(process: subprocess.Popen[str], folder: Path) -> None:
    while not (folder / "split.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


def died(process: subprocess.Popen[str]) -> bool:
    """Waits for the end of a process, and tells whether it was SIGKILL's."""
    _, err = process.communicate(timeout=120)
    assert process.returncode in (0, -signal.SIGKILL), err
    return process.returncode != 0


def assert_whole(folder: Path) -> None:
    """What has its name is complete, whatever else lies around."""
    for path in checkpoints.stored(folder):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        assert torch.load(path, weights_only=True)["step"] == int(path.stem.removeprefix("step_"))
    for name in ("split.json", "result.json"):
        if (folder / name).exists():
            json.loads((folder / name).read_text())


def numbers(folder: Path) -> dict[str, Any]:
    """result.json without the times and what else depends on when a run was stopped."""
    found = json.loads((folder / "result.json").read_text())
    others = {"seconds", "steps_per_second", "start_step", "config", "git_commit"}
    return {key: value for key, value in found.items() if key not in others}


def assert_goes_on(folder: Path, line: str, never_killed: Path) -> None:
    """Resuming a killed run, or starting it again where it had nothing to resume, ends with the same bits."""
    assert_whole(folder)
    for file in folder.glob("*/events.out.tfevents.*"):  # read in the order of the seconds in their names
        time.sleep(max(0.0, int(file.name.split(".")[3]) + 1 - time.time()))
    if checkpoints.stored(folder):
        resume(folder)
    else:
        said = resume(folder, code=2).err
        assert said.startswith("catvae: ")
        assert said.count("\n") == 1
        assert str(folder) in said
        run(line, folder)
    assert equal(checkpoint(folder), checkpoint(never_killed))
    assert numbers(folder) == numbers(never_killed)
    assert json.loads((folder / "split.json").read_text()) == json.loads((never_killed / "split.json").read_text())
    assert not list(folder.rglob("*.partial"))
    for tag in ("train/J", "val/bound"):
        assert curve(folder, tag) == curve(never_killed, tag), tag
    # twice if killed between the last value and result.json, and the same
    assert set(curve(folder, "test/bound")) == set(curve(never_killed, "test/bound"))


def test_killed_while_writing(start: Start, whole: Callable[[str], Path], tmp_path: Path) -> None:
    """Half of the first checkpoint is written, all of a later one, half of result.json, or all but the old is gone.

    At 34 a validation is over, and its events may be written, but not the checkpoint that knows of it.
    """
    moments = {
        6: "half of a file",
        29: "all of .step_00000006.pt.partial",
        31: "step_00000003.pt gone",
        34: "all of .step_00000006.pt.partial",
        58: "half of a file",
    }
    _, err = start(FEW, tmp_path / "at${oc.env:KILLED_AT}", *moments).communicate(timeout=120)
    assert err == ""
    for at, name in moments.items():
        assert moments_until_death(tmp_path / "at${oc.env:KILLED_AT}", at)[at - 1 :] == [name]
        assert_goes_on(tmp_path / f"at{at}", FEW, whole(FEW))


def moments_until_death(folder: Path, at: int = 0) -> list[str]:
    return Path(f"{folder}.moments.{at}").read_text().splitlines()


@pytest.mark.slow
def test_every_moment_is_known(start: Start, tmp_path: Path) -> None:
    assert not died(start(FEW, tmp_path / "run"))
    names = moments_until_death(tmp_path / "run")
    assert len(names) == MOMENTS
    assert names.count("half of a file") == 15
    assert names[-1] == "result.json in place"


@pytest.mark.slow
@pytest.mark.parametrize("at", range(1, MOMENTS + 1))
def test_killed_at_moment(at: int, start: Start, whole: Callable[[str], Path], tmp_path: Path) -> None:
    assert died(start(FEW, tmp_path / "run", at))
    assert_goes_on(tmp_path / "run", FEW, whole(FEW))


@pytest.mark.slow
@pytest.mark.parametrize("fraction", AT_START)
def test_killed_while_starting(
    fraction: float, seconds: tuple[float, float], start: Start, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    process = start(MANY, tmp_path / "run")
    time.sleep(fraction * seconds[0])
    process.kill()
    assert died(process)
    assert_goes_on(tmp_path / "run", MANY, whole(MANY))


@pytest.mark.slow
@pytest.mark.parametrize("fraction", AT_WORK)
def test_killed_at_work(
    fraction: float, seconds: tuple[float, float], start: Start, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    for attempt in range(5):
        folder = tmp_path / f"{attempt}"
        process = start(MANY, folder)
        wait_for_work(process, folder)
        time.sleep(fraction * seconds[1] / 2**attempt)
        process.kill()
        if died(process):
            break
    else:
        pytest.fail("the run was always done already")
    assert_goes_on(folder, MANY, whole(MANY))


@pytest.mark.slow
def test_killed_again_and_again(start: Start, whole: Callable[[str], Path], tmp_path: Path) -> None:
    """Each process gets a little further, and is killed at some write of a checkpoint or of result.json."""
    folder, kills = tmp_path / "run", 0
    assert died(start(FEW, folder, 11))
    while died(start(f"resume={folder}", folder, 3 + kills)):
        kills += 1
        assert_whole(folder)
    assert kills >= 3
    assert_goes_on(folder, FEW, whole(FEW))


# ---- runs at once ----

SAME_SECOND = """
import hydra.core.utils
from datetime import datetime

class Stopped(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 2, 3, 4, 5)

hydra.core.utils.datetime = Stopped
"""


@pytest.mark.slow
def test_ten_runs_in_the_same_second_get_ten_folders(tmp_path: Path) -> None:
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(SAME_SECOND)
    processes = [
        subprocess.Popen(
            [sys.executable, ROOT / "train.py", *shlex.split(MLP), "train.steps=2", f"seed={seed}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path / "hook")},
        )
        for seed in range(10)
    ]
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    folders = list((tmp_path / "outputs" / "2026-01-02").iterdir())
    assert len(folders) == 10
    assert all(folder.name.startswith("03-04-05-sum_and_sample-") for folder in folders)
    assert sorted(json.loads((folder / "result.json").read_text())["seed"] for folder in folders) == list(range(10))
    assert {checkpoint(folder)["step"] for folder in folders} == {2}


# ---- looking changes nothing ----


NOT_SLOW = ("relax", "score_function/moving_average")  # parameters, and a running state, of an estimator's own


@pytest.mark.parametrize(
    "estimator", [pytest.param(name, marks=[] if name in NOT_SLOW else pytest.mark.slow) for name in ESTIMATORS]
)
def test_looking_changes_no_estimator(estimator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logging, validation, diagnostics and checkpoints after each step, and none but at the end, without TensorBoard.

    By dropout, the global generator's state matters too.
    """
    line = f"{MLP} {ESTIMATORS[estimator]} model.dropout=0.5 train.steps=5"
    every = "train.log_every={0} train.validate_every={0} train.checkpoint_every={0} diagnostics.every={1}"
    run(f"{line} {every.format(1, 1)} diagnostics.draws=3 diagnostics.batch_size=4", tmp_path / "looked at")
    monkeypatch.setattr("training.report.TensorBoard", mock.Mock())
    run(f"{line} {every.format(100, 0)}", tmp_path / "alone")
    assert not list((tmp_path / "alone").rglob("*tfevents*"))
    assert len(checkpoints.stored(tmp_path / "looked at")) == 2
    assert equal(checkpoint(tmp_path / "looked at"), checkpoint(tmp_path / "alone"))
