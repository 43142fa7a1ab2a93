"""Long work is never silent: a bar on a terminal, and a line every half minute where there is none."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from data import progress
from scripts import compare, evaluate
from tests.runs import MLP, command, run


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without waiting for the half minute, or for the second that a bar waits."""
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    monkeypatch.setattr(progress, "BAR_AFTER", 0.0)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    return monkeypatch


def test_a_line_in_a_pipe_and_not_on_standard_output(
    told: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(progress.progress("abc", "reading", "letters")) == ["a", "b", "c"]
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "reading: 1 of 3 letters\nreading: 2 of 3 letters\n"


def test_the_lines_are_half_a_minute_apart(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    seconds = iter(range(0, 10_000, 10))  # each look at the clock is ten seconds after the one before
    monkeypatch.setattr("data.progress.time.monotonic", lambda: float(next(seconds)))
    with progress.telling("counting", "numbers", 100) as tell:
        for _ in range(9):
            tell(2)
    assert capsys.readouterr().err.splitlines() == [f"counting: {n} of 100 numbers" for n in (6, 12, 18)]


def test_a_bar_on_a_terminal_and_no_line(told: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    told.setattr(sys, "stderr", terminal)
    told.setattr("tqdm.tqdm.monitor_interval", 0)
    list(progress.progress(range(3), "reading", "runs"))
    assert "\rreading: " in terminal.getvalue()
    assert "reading: 1 of 3 runs" not in terminal.getvalue()


def test_a_job_of_a_parallel_sweep_is_silent(told: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told.setenv("TQDM_DISABLE", "1")
    for stream in (sys.stderr, Terminal()):
        told.setattr(sys, "stderr", stream)
        assert list(progress.progress(range(3), "reading", "runs")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_a_run_its_end_evaluate_and_compare_tell_how_far_they_are(told: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line = f"{MLP} train.steps=4 train.validate_every=4 evaluation.batch_size=100"
    lines = run(line, tmp_path / "0").err.splitlines()
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    assert "step 1 of 4" in lines
    assert "validation: 1 of 2 passes" in lines
    assert "evaluation of test: 11 of 12 passes" in lines  # 4 batches, each once for the bound and by 2 draws of z
    measured = command(evaluate.main, f"{tmp_path / '0'} --part test --importance-samples 5")
    assert json.loads(measured.out)["test_n"] == 360
    assert "evaluation of test: 23 of 24 passes" in measured.err.splitlines()
    compared = command(compare.main, str(tmp_path))
    assert "reading: 1 of 2 runs" in compared.err.splitlines()
