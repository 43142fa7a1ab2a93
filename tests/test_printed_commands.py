"""Every command that the program prints is one that it takes: run through a shell, as it is printed, from elsewhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from tests.runs import MLP, Ended
from tests.test_bad_command_lines import ODD_NAMES
from training import checkpoints
from training.resume import ROOT, resume_command, sweep_command

FEW = f"{MLP} train.steps=4 train.validate_every=4"
OWN = """
import os, signal
from estimators.marginalization import Marginalization

class Mine(Marginalization):
    def forward(self, *given, step, **named):
        if step == 2 and "STOP" in os.environ:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(*given, step=step, **named)
"""
NASTY = """a "run", größe=1 it's $HOME"""


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A working directory with an estimator and its configuration in mine/, and a uv that runs this Python."""
    place = tmp_path / "else where"
    (place / "mine" / "estimator").mkdir(parents=True)
    (place / "mine" / "my_estimators.py").write_text(OWN)
    (place / "mine" / "estimator" / "mine.yaml").write_text(
        "defaults:\n  - marginalization\n_target_: my_estimators.Mine\n"
    )
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    # as uv does, it takes the project from the working directory if it is not told
    uv.write_text(
        '#!/bin/sh\nshift\n[ "$1" = --project ] && { cd_=$2; shift 2; } || cd_=.\n'
        f'[ -f "$cd_/pyproject.toml" ] || exit 77\nexec {shlex.quote(sys.executable)} "$@"\n'
    )
    uv.chmod(0o755)
    return place


def shell(line: str, cwd: Path, **variables: str) -> Ended:
    """A command line as a person types it in a shell, who has nothing in PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "UV")}
    environment |= {"OMP_NUM_THREADS": "1", "PATH": f"{cwd.parent / 'bin'}:{os.environ['PATH']}", **variables}
    ended = subprocess.run(
        ["sh", "-c", line], cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=300
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def printed(said: str) -> str:
    """The command that a message ends with."""
    (found,) = re.findall(r"go on with(?: the sweep by)?: (.*)", said)
    return str(found)


def start(line: str) -> str:
    return f"uv run --project {shlex.quote(str(ROOT))} {shlex.quote(str(ROOT / 'train.py'))} {line}"


def test_stopped_run_of_ones_own_estimator(elsewhere: Path, tmp_path: Path) -> None:
    """Without .hydra/, with relative paths in PYTHONPATH and --config-dir; and gone on with from another directory."""
    folder = elsewhere / NASTY
    place = shlex.quote("""hydra.run.dir='a "run", größe=1 it\\'s $HOME'""")
    line = start(f"--config-dir mine {FEW} estimator=mine hydra.output_subdir=null {place}")
    stopped = shell(line, elsewhere, PYTHONPATH="mine", STOP="1")
    assert stopped.code == 143, stopped.said
    assert not (folder / ".hydra").exists()
    (tmp_path / "third").mkdir()
    again = shell(printed(stopped.out), tmp_path / "third")
    assert again.code == 0, again.said
    result = json.loads((folder / "result.json").read_text())
    assert (result["steps"], result["start_step"], result["estimator"]) == (4, 3, "Mine")


@pytest.mark.slow
def test_sweep_with_a_job_that_failed(elsewhere: Path, tmp_path: Path) -> None:
    """In a folder with blanks, commas, equals signs and quotes, with an estimator of one's own."""
    place = shlex.quote("""hydra.sweep.dir='a "run", größe=1 it\\'s $HOME'""")
    line = start(f"-m --config-dir mine {FEW} estimator=mine optimizer.lr=1e30,1e-3 {place}")
    ended = shell(line, elsewhere, PYTHONPATH="mine")
    assert ended.code == 3, ended.said
    (tmp_path / "third").mkdir()
    again = shell(f"{printed(ended.err)} on_divergence=rollback", tmp_path / "third")
    assert "back to step 0" in again.out, again.said
    results = {path.parent.name for path in (elsewhere / NASTY).rglob("result.json")}
    assert "1" in results


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Optuna 2 is written for another SQLAlchemy
def test_best_of_a_search(elsewhere: Path, tmp_path: Path) -> None:
    """Of an estimator of one's own, at random; from another directory it has the numbers that the trial had."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    sweeper = "hydra/sweeper=optuna hydra/sweeper/sampler=random hydra.sweeper.sampler.seed=1 hydra.sweeper.n_jobs=1"
    space = shlex.quote("objective.alpha=interval(1.0,10.0)")
    place = shlex.quote("""hydra.sweep.dir='a "run", größe=1 it\\'s $HOME'""")
    few = FEW.replace("objective.alpha=1 ", "")
    line = start(f"-m --config-dir mine {few} estimator=mine {sweeper} hydra.sweeper.n_trials=2 {space} {place}")
    ended = shell(line, elsewhere, PYTHONPATH="mine")
    assert ended.code == 0, ended.said
    results = [json.loads((elsewhere / NASTY / str(job) / "result.json").read_text()) for job in (0, 1)]
    assert [result["test_n"] is not None for result in results].count(True) == 1
    (best,) = [result for result in results if result["test_n"] is not None]
    assert best["val_accuracy"] == max(result["val_accuracy"] for result in results)
    (tmp_path / "third").mkdir()
    (found,) = re.findall(r"its command: (.*)", ended.err)
    again = shell(f"{found} hydra.run.dir=again", tmp_path / "third")
    assert again.code == 0, again.said
    repeated = json.loads((tmp_path / "third" / "again" / "result.json").read_text())
    assert all(repeated[name] == best[name] for name in repeated if name.startswith(("val_", "test_")))
    assert repeated["config"]["objective.alpha"] == best["config"]["objective.alpha"]


@pytest.mark.slow
def test_data_by_a_relative_path_are_found_again(elsewhere: Path) -> None:
    """And what the refusals say is what to type."""
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    np.savez(elsewhere / "mine, all.npz", images=(digits.images * 15).astype(np.uint8), labels=digits.target)
    model = FEW.replace("data=digits", "data=arrays")
    line = start(f"{model} estimator=marginalization hydra.run.dir=run data.path=")
    refused = shell(f"{line}'mine, all.npz'", elsewhere)
    assert refused.code == 2
    (argument,) = re.findall(r"in quotes: (.*)", refused.err)
    ended = shell(line.removesuffix("data.path=") + argument, elsewhere)
    assert ended.code == 0, ended.said
    assert checkpoints.stored(elsewhere / "run")
    refused = shell(line.removesuffix("data.path=") + argument, elsewhere)
    assert refused.code == 2
    (way_on,) = re.findall(r"go on with that one by: (.*)", refused.err)
    again = shell(f"{way_on} train.log_every=3", elsewhere.parent)
    assert again.code == 0, again.said
    assert "is finished already" in again.out


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_shell_and_hydra_read_the_folder_that_is_meant(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / name
    for cwd in (ROOT, tmp_path):
        monkeypatch.chdir(cwd)
        words = shlex.split(resume_command(folder, {}))
        assert words[-1] == f"resume={folder}"
        arguments = ["-m", "seed=range(3)", "hydra.sweep.dir=old", "--config-dir", "nowhere"]
        words = shlex.split(sweep_command(arguments, folder))
        assert words[-5:-1] == ["-m", "seed=range(3)", "--config-dir", "nowhere"]
        assert OverridesParser.create().parse_override(words[-1]).value() == str(folder)
        assert ("--project" in words) == (cwd == tmp_path)
