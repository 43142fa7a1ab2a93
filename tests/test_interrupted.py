"""A signal at any moment of the training loop: the run stops in time, and resumed it is as if it had never stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from data.batches import Batches
from models import gradient_quality
from models.m2 import evaluation
from tests.runs import MLP, ROOT, assert_same_events, checkpoint, equal, resume, run
from training import checkpoints, interruption

LINE = f"{MLP} train.steps=12 diagnostics.every=6 diagnostics.draws=3 diagnostics.batch_size=4 "


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run that never stopped."""
    folders: dict[str, Path] = {}

    def find(line: str) -> Path:
        if line not in folders:
            folders[line] = tmp_path_factory.mktemp("whole") / "run"
            run(line, folders[line])
        return folders[line]

    return find


def signalling(
    function: Callable[..., Any], call: int, *, number: int = signal.SIGTERM, times: int = 1
) -> Callable[..., Any]:
    """`function`, sending a signal to this process at its call number `call`."""
    calls = 0

    def signalled(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return function(*arguments, **keywords)

    return signalled


MOMENTS = {
    "a step": (Batches, "rows", 7),
    "the first batch of a validation": (evaluation, "exact_terms", 1),
    "the last batch of a validation": (evaluation, "exact_terms", 4),
    "the validation of the last step": (evaluation, "exact_terms", 5),
    "diagnostics": (gradient_quality, "_joined", 2),
    "diagnostics of the last step": (gradient_quality, "_joined", 6),
}


@pytest.mark.parametrize(
    ("log_every", "moment"),
    [*((1, moment) for moment in MOMENTS), (5, "a step"), (5, "the last batch of a validation")],  # of means begun
)
def test_signal_at_any_moment(log_every: int, moment: str, whole: Callable[[str], Path], tmp_path: Path) -> None:
    line, folder = f"{LINE} train.log_every={log_every} evaluation.batch_size=50", tmp_path / "run"
    owner, name, call = MOMENTS[moment]
    with mock.patch.object(owner, name, signalling(getattr(owner, name), call)):
        run(line, folder, code=143)
    assert not (folder / "result.json").exists()
    assert checkpoint(folder)["unlooked"] == (moment != "a step")
    resume(folder)
    assert equal(checkpoint(whole(line)), checkpoint(folder))
    assert_same_events(whole(line), folder)


def test_a_second_signal_in_the_missed_validation(whole: Callable[[str], Path], tmp_path: Path) -> None:
    line, folder = f"{LINE} evaluation.batch_size=50", tmp_path / "run"
    for _ in range(2):
        with mock.patch.object(evaluation, "exact_terms", signalling(evaluation.exact_terms, 2)):
            if checkpoints.stored(folder):
                resume(folder, code=143)
            else:
                run(line, folder, code=143)
        assert checkpoint(folder)["step"] == 6
    resume(folder)
    assert equal(checkpoint(whole(line)), checkpoint(folder))
    assert_same_events(whole(line), folder)


def test_a_long_validation_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """A validation, which is minutes for a large model on a slow machine, is left off after the batch in hand."""
    batches = mock.Mock(side_effect=signalling(evaluation.exact_terms, 3))
    with mock.patch.object(evaluation, "exact_terms", batches):
        run(f"{LINE} evaluation.batch_size=10", tmp_path / "run", code=143)
    assert batches.call_count == 3  # of 20


def test_a_run_killed_right_after_saving_keeps_two_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with mock.patch.object(checkpoints, "prune"):
        run(LINE, folder)
    (folder / "result.json").unlink()
    assert len(checkpoints.stored(folder)) > 2
    resume(folder)
    assert [path.name for path in checkpoints.stored(folder)] == ["step_00000008.pt", "step_00000012.pt"]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_closed_terminal_and_a_cluster_s_warning_save_as_well(
    number: int, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored, and stays so
    with mock.patch.object(Batches, "rows", signalling(Batches.rows, 7, number=number)):
        ended = run(LINE, tmp_path / "run", code=128 + number)
    signal.signal(number, before)
    assert "stopped at step 7; go on with" in ended.out
    resume(tmp_path / "run")
    assert equal(checkpoint(whole(LINE)), checkpoint(tmp_path / "run"))


def test_several_signals_at_once_are_one_stop(whole: Callable[[str], Path], tmp_path: Path) -> None:
    """A scheduler tells a process, and its group as well, within milliseconds."""
    with mock.patch.object(Batches, "rows", signalling(Batches.rows, 7, times=3)):
        run(LINE, tmp_path / "run", code=143)
    assert checkpoint(tmp_path / "run")["step"] == 7


def test_a_signal_some_seconds_later_ends_the_process_at_once() -> None:
    program = """
import os, signal, time
from training import interruption
interruption.ONE_STOP = 0.2
with interruption.Interruption():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.4)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20)
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=15)
    assert ended.returncode == -signal.SIGTERM


def test_slurm_s_signals_are_one_stop_however_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM at the beginning of the grace time, SIGTERM at its end, and no SIGKILL before the checkpoint is due."""
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setattr(interruption, "ONE_STOP", -1.0)
    with mock.patch.object(Batches, "rows", signalling(Batches.rows, 7, times=2)):
        run(LINE, tmp_path / "run", code=143)
    assert checkpoint(tmp_path / "run")["step"] == 7


def test_what_nohup_has_ignored_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with mock.patch.object(Batches, "rows", signalling(Batches.rows, 7, number=signal.SIGHUP)):
            run(LINE, tmp_path / "run")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert checkpoint(tmp_path / "run")["step"] == 12
