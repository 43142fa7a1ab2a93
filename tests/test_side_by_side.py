"""Jobs of a sweep as branches of one recording, which is emulated as in test_update.py: each is as it is alone."""

from __future__ import annotations

import math
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train
from tests.runs import MLP, Ended, assert_same_events, checkpoint, command, equal
from tests.test_update import Recording, recordings
from training import side_by_side, update
from training.divergence import FiniteGuard
from training.run import Run
from training.run_folder import read_json
from training.update import ReplayedUpdate

__all__ = ["recordings"]
LINE = f"-m {MLP} optimizer.lr=0.00390625 train.steps=12 "
OF_THE_COMMAND = {"seconds", "steps_per_second"}


@pytest.fixture(autouse=True)
def recorded(recordings: list[Recording], monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """Has every step recorded, and no number looked at in between, as on a GPU."""

    def update_of(run: Run, guard: FiniteGuard) -> ReplayedUpdate:
        guard.deferred = True
        return ReplayedUpdate(run, guard, side_by_side.here())

    monkeypatch.setattr(side_by_side, "update_of", update_of)
    return recordings


def sweep_of(jobs: str, folder: Path, launcher: str = "side_by_side", *, code: int = 0) -> Ended:
    ended = command(train.main, f"{LINE}{jobs} hydra/launcher={launcher} hydra.sweep.dir={folder}")
    assert ended.code == code, ended.said
    return ended


def assert_same(one: Path, other: Path, jobs: range) -> None:
    for job in map(str, jobs):
        assert equal(checkpoint(one / job), checkpoint(other / job))
        results = [read_json(folder / job / "result.json") for folder in (one, other)]
        for result in results:
            for key in (*OF_THE_COMMAND, "start_step"):
                del result[key]
            del result["config"]
        assert results[0] == results[1]
        assert_same_events(one / job, other / job)


def test_jobs_side_by_side_have_the_bits_that_they_have_alone(tmp_path: Path, recorded: list[Recording]) -> None:
    line = "estimator=relax,sparsemax seed=1,2 model.hidden=8,16"
    sweep_of(line, tmp_path / "alone", "basic")
    assert len(recorded) == 4, "none of sparsemax, whose calls depend on the numbers"
    ended = sweep_of(line, tmp_path / "beside")
    assert len(recorded) == 5, "one for all"
    assert "catvae: no GPU trains: the jobs are done one after another; hydra/launcher=joblib" in ended.err
    assert_same(tmp_path / "alone", tmp_path / "beside", range(8))
    for job in range(8):
        log = (tmp_path / "beside" / str(job) / "train.log").read_text()
        assert log.count("INFO step 12: ") == log.count("INFO test accuracy ") == 1
        assert f"job {job + 1}: step 12: " in ended.out


def test_one_that_diverges_or_ends_leaves_the_others_as_they_are(tmp_path: Path, recorded: list[Recording]) -> None:
    line = "'optimizer.lr=1e30,3e-3' 'train.steps=9,12'"
    sweep_of(line, tmp_path / "alone", "basic", code=3)
    alone = len(recorded)
    ended = sweep_of(line, tmp_path / "beside", code=3)
    assert alone < len(recorded) <= alone + 4
    assert f"failed with exit code 3: {tmp_path}/beside/0: " in ended.err
    assert f"failed with exit code 3: {tmp_path}/beside/1: " in ended.err
    assert_same(tmp_path / "alone", tmp_path / "beside", range(2, 4))


def at_step_7(monkeypatch: pytest.MonkeyPatch, seed: int, act: Callable[[Run], object]) -> None:
    """Has something happen to the run of a seed, once."""
    set_rate, left = Run.set_learning_rate, [act]

    def and_act(run: Run, step: int) -> None:
        set_rate(run, step)
        if step == 7 and run.config.seed == seed and left:
            left.pop()(run)

    monkeypatch.setattr(Run, "set_learning_rate", and_act)


def test_one_that_goes_back_leaves_the_others_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "seed=1,2 on_divergence=rollback"
    for launcher in ("basic", "side_by_side"):
        with monkeypatch.context() as patch:
            at_step_7(patch, 1, lambda run: next(iter(run.parameters.values())).data.fill_(math.nan))
            sweep_of(line, tmp_path / launcher, launcher)
    assert [read_json(tmp_path / "side_by_side" / f"{job}" / "result.json")["rollbacks"] for job in (0, 1)] == [1, 0]
    assert_same(tmp_path / "basic", tmp_path / "side_by_side", range(2))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_stops_all_and_the_command_goes_on(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "seed=1,2,3 train.checkpoint_every=1000 train.validate_every=1000"
    sweep_of(line, tmp_path / "whole")
    with monkeypatch.context() as patch:
        at_step_7(patch, 2, lambda run: os.kill(os.getpid(), number))
        stopped = sweep_of(line, tmp_path / "halves", code=128 + number)
    assert "Traceback" not in stopped.said
    assert "go on with the sweep by: " in stopped.err
    for job in range(3):
        assert re.search(f"job {job + 1}: stopped at step [789]; go on with: ", stopped.out)
    sweep_of(line, tmp_path / "halves")
    assert_same(tmp_path / "whole", tmp_path / "halves", range(3))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("deterministic=true,false", "deterministic must be the same in all jobs side by side, got False and True"),
        ("device=cpu,auto", "device must be the same in all jobs side by side, got auto and cpu"),
        ("seed=1,2 hydra.launcher.n_jobs=0", "hydra.launcher.n_jobs must be a number >= 1, got 0"),
        ("seed=1,2 hydra.launcher.n_jobs=x", "hydra.launcher.n_jobs must be a number >= 1, got x"),
    ],
)
def test_what_cannot_be_side_by_side_is_refused(line: str, said: str, tmp_path: Path) -> None:
    assert sweep_of(line, tmp_path / "sweep", code=2).err == f"catvae: {said}\n"


def test_more_jobs_than_at_once_come_later(tmp_path: Path, recorded: list[Recording]) -> None:
    sweep_of("seed=1,2,3 hydra.launcher.n_jobs=2", tmp_path)
    assert len(recorded) == 2
    assert all((tmp_path / f"{job}" / "result.json").exists() for job in range(3))


def test_too_little_memory_for_all_is_one_sentence_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def record(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(update, "record", record)
    ended = sweep_of("seed=1,2", tmp_path, code=2)
    assert "Traceback" not in ended.said
    sentence = "the GPU has not the memory for 2 runs side by side: lower hydra.launcher.n_jobs"
    assert [f"failed with exit code 2: {tmp_path}/{job}: {sentence}" in ended.err for job in (0, 1)] == [True, True]
