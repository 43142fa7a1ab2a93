"""Sweeps: in processes of their own, killed and started again, failed in part, and searched by earlier results."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

import train
from data.facts import DataError
from tests.runs import ESTIMATORS, MLP, ROOT, Ended, checkpoint, command, equal, on_path, run
from training import checkpoints, search, sweep
from training.run_folder import hold, release

EVERY = "train.checkpoint_every=20 train.log_every=20 train.validate_every=60"
LINE = f"-m {MLP} {ESTIMATORS['marginalization']} {EVERY} "
JOBS = LINE + "seed=1,2,3 train.steps=60 estimator._target_=told.Told"
DRAWN = ("objective.alpha", "estimator.temperature.start", "estimator.temperature.end", "optimizer.lr")
DIVERGES = LINE + "optimizer.lr=1e30,3e-3 train.steps=20"
# Says how many threads a job has; with SLOW, jobs but that of seed=1 say when they are at work, and take their time
TOLD = """
import os, time
from pathlib import Path
import torch
from estimators.marginalization import Marginalization

class Told(Marginalization):
    def forward(self, *given, step, **named):
        if "TOLD" in os.environ and step > 0:  # before work it is tried in another process
            Path(os.environ["TOLD"], f"threads{torch.get_num_threads()}").touch()
        if "SLOW" in os.environ and step > 20 and torch.initial_seed() > 1:
            Path(os.environ["SLOW"], f"at_work_{torch.initial_seed()}").touch()
            time.sleep(0.25)
        return super().forward(*given, step=step, **named)
"""
Process = subprocess.Popen[bytes]


def needs(package: str, extra: str) -> pytest.MarkDecorator:
    try:
        version(package)
    except PackageNotFoundError:
        return pytest.mark.skip(reason=f"needs: uv sync --extra {extra}")
    return pytest.mark.skipif(False, reason="")


needs_joblib = needs("hydra-joblib-launcher", "joblib")
needs_submitit = needs("hydra-submitit-launcher", "slurm")
needs_optuna = needs("hydra-optuna-sweeper", "optuna")
old_sqlalchemy = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Optuna 2 is written for it
launchers = pytest.mark.parametrize(
    "launcher",
    [
        "basic",
        pytest.param("side_by_side", marks=pytest.mark.slow),
        pytest.param("joblib hydra.launcher.n_jobs=2", marks=[needs_joblib, pytest.mark.slow], id="joblib"),
        pytest.param("submitit_local", marks=[needs_submitit, pytest.mark.slow]),
    ],
)


def here(line: str, folder: Path) -> Ended:
    """The command in this process."""
    return command(train.main, f"{line} hydra.sweep.dir={folder}")


def start(line: str, folder: Path, **variables: str) -> Process:
    """The command in a process group of its own, elsewhere than in the repository; what it says goes to files."""
    with (folder.parent / "out").open("w") as out, (folder.parent / "err").open("w") as err:
        return subprocess.Popen(
            [sys.executable, ROOT / "train.py", *shlex.split(line), f"hydra.sweep.dir={folder}"],
            stdout=out,
            stderr=err,
            cwd=folder.parent,
            env=os.environ | {"PYTHONPATH": sys.path[0]} | variables,
            start_new_session=True,
        )


def end(process: Process, folder: Path) -> Ended:
    code = process.wait(timeout=180)
    return Ended(code, (folder.parent / "out").read_text(), (folder.parent / "err").read_text())


def wait_for(happened: Callable[[], object], process: Process | None = None) -> None:
    until = time.monotonic() + 120
    while not happened():
        assert process is None or process.poll() is None, "the process ended too soon"
        assert time.monotonic() < until
        time.sleep(0.005)


def at_work(sweep: Path) -> bool:
    """Whether the first of the JOBS is done, and the second past its first steps."""
    return (sweep / "0" / "result.json").exists() and (sweep.parent / "at_work_2").exists()


def outcomes(folder: Path) -> list[dict[str, Any]]:
    """Of the three JOBS, what does not depend on when they were stopped: all results, and the last checkpoint."""
    found = []
    for number in range(3):
        result = json.loads((folder / str(number) / "result.json").read_text())
        kept = {key: value for key, value in result.items() if key.startswith(("val_", "test_", "split", "steps"))}
        del kept["steps_per_second"]
        found.append(kept | {"checkpoint": checkpoint(folder / str(number))})
    return found


def processes_in(folder: Path) -> list[int]:
    """The processes whose current folder is `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "cwd").resolve(strict=True) == folder:
                found.append(int(entry.name))
    return found


def times(folder: Path) -> dict[Path, int]:
    """When the results and checkpoints of a sweep were written."""
    files = [*folder.rglob("result.json"), *folder.rglob("step_*.pt")]
    return {file: file.stat().st_mtime_ns for file in files}


@pytest.fixture(scope="module", autouse=True)
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Puts the estimator TOLD where processes find it."""
    with on_path(tmp_path_factory.mktemp("told"), "told", TOLD):
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("undisturbed") / "sweep"
    ended = here(JOBS, folder)
    assert ended.code == 0, ended.said
    return outcomes(folder)


def one_sentence(error: str) -> str:
    assert error.startswith("catvae: ")
    assert error.count("\n") == 1, error
    return error


# ---- stopped, and started again ----


@launchers
def test_killed_and_started_again(launcher: str, undisturbed: list[dict[str, Any]], tmp_path: Path) -> None:
    """While it runs, the same command again is refused and harms nothing; after kill -9 it goes on."""
    folder, line = tmp_path / "sweep", f"{JOBS} hydra/launcher={launcher}"
    process = start(line, folder, SLOW=str(tmp_path))
    wait_for(lambda: at_work(folder), process)
    if launcher == "basic":
        process.send_signal(signal.SIGSTOP)  # or it might end meanwhile
        refused = here(line, folder)
        assert refused.code == 2
        assert "hydra.sweep.dir must be a folder that no other process sweeps in" in one_sentence(refused.err)
    process.kill()
    process.wait()
    killed = time.monotonic()
    wait_for(lambda: not processes_in(tmp_path))  # its jobs' processes do not outlive it
    assert time.monotonic() - killed < 5
    assert not (folder / "1" / "result.json").exists()

    before = times(folder / "0")
    assert_goes_on(line, folder, undisturbed)
    assert times(folder / "0") == before
    before = times(folder)
    ended = here(f"{JOBS} hydra/launcher=basic", folder)  # by any launcher
    assert ended.code == 0
    assert f"{folder}/0 is finished already" in ended.out
    assert times(folder) == before


def assert_goes_on(line: str, folder: Path, undisturbed: list[dict[str, Any]]) -> None:
    """The same command skips the first job, resumes the second, and ends with the same bits."""
    again = here(line, folder) if "launcher=basic" in line else end(start(line, folder), folder)
    assert again.code == 0, again.said
    starts = [json.loads((folder / f"{job}" / "result.json").read_text())["start_step"] for job in range(3)]
    assert starts[0] == 0
    assert 20 <= starts[1] < 60
    for outcome, expected in zip(outcomes(folder), undisturbed, strict=True):
        assert equal(outcome, expected)


@launchers
@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGHUP))]
)
def test_interrupted_and_continued(
    number: int, launcher: str, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Ctrl-C and a terminal that closes save what runs, say how to go on, and that command goes on."""
    folder, line = tmp_path / "sweep", f"{JOBS} hydra/launcher={launcher} train.checkpoint_every=100000"
    process = start(line, folder, SLOW=str(tmp_path))
    wait_for(lambda: at_work(folder), process)
    if number != signal.SIGTERM:
        os.killpg(process.pid, number)  # as a terminal does it
    else:
        process.send_signal(number)
    stopped = end(process, folder)
    assert stopped.code == 128 + number, stopped.said
    assert "Traceback" not in stopped.said
    assert len(checkpoints.stored(folder / "1")) == 2, "nothing but the checkpoint of the start"
    wait_for(lambda: not processes_in(tmp_path))

    said = next(said for said in stopped.err.splitlines() if "go on with the sweep by: " in said)
    line, _, place = said.partition("/train.py ")[2].rpartition(" ")
    assert place == f"hydra.sweep.dir={folder}"
    assert_goes_on(line, folder, undisturbed)


def test_each_job_says_which_it_is_and_how_many_are_done(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    ended = here(LINE + "train.steps=1 seed=7,8", folder)
    told = [line for line in ended.err.splitlines() if line.startswith("job ")]
    assert told == [
        f"job 1 of 2: seed=7, 0 done; in {folder}/0",
        f"job 2 of 2: seed=8, 1 done; in {folder}/1",
    ]


def test_overrides_may_stand_on_both_sides_of_a_flag(tmp_path: Path) -> None:
    ended = here(f"{MLP} -m train.steps=1 seed=7,8", tmp_path / "sweep")
    assert ended.code == 0, ended.said
    assert len(times(tmp_path / "sweep")) >= 4


def test_folder_of_another_sweep_is_refused(tmp_path: Path) -> None:
    folder, line = tmp_path / "sweep", LINE + "train.steps=2 seed="
    assert here(line + "1,2", folder).code == 0
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    refused = here(line + "1,3", folder)
    assert refused.code == 2
    for words in (f"{folder}/1 with another run: seed=3 (was 2)", "(in the job ", "seed=3)"):
        assert words in one_sentence(refused.err)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert here(line + "1,2,3", folder).code == 0  # more jobs are the same sweep
    assert sorted(path.name for path in folder.glob("*/")) == ["0", "1", "2"]


def test_finished_job_without_checkpoints_is_skipped(tmp_path: Path) -> None:
    folder, line = tmp_path / "sweep", LINE + "train.steps=2 seed="
    here(line + "1,2", folder)
    for number in (0, 1):
        shutil.rmtree(folder / str(number) / "checkpoints")
    before = times(folder)
    assert here(line + "1,2", folder).code == 0
    assert times(folder) == before
    assert "with another run: seed=3 (was 2)" in one_sentence(here(line + "1,3", folder).err)
    longer = here(line.replace("steps=2", "steps=3") + "1,2", folder)
    assert (longer.code, "the result of its 2 steps and no checkpoint" in one_sentence(longer.err)) == (2, True)
    assert here(line + "1,2,3", folder).code == 0
    assert times(folder).items() > before.items()


def test_diverged_job_is_not_tried_again_for_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    for attempt in range(2):
        ended = here(DIVERGES, folder)
        assert ended.code == 3, ended.said
        assert f"failed with exit code 3: {folder}/0: " in ended.err
        assert ("diverged, and would again; delete it to try anew" in ended.err) == (attempt == 1)
        assert (folder / "1" / "result.json").exists()
        assert "#1 : " not in (folder / "0" / "train.log").read_text()  # which Hydra says before the next job
        if attempt == 0:
            before = times(folder)
    assert times(folder) == before
    ended = here(DIVERGES + " on_divergence=rollback", folder)  # another way to go on from the same checkpoints
    assert ended.code == 3
    assert "back to step 0" in ended.out
    (folder / "0" / "checkpoints").rename(tmp_path / "gone")
    (folder / "0" / "failed.json").unlink()
    assert here(DIVERGES.replace("1e30", "1e-3"), folder).code == 0


def test_job_that_was_refused_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise DataError("no such file")

    folder, line = tmp_path / "sweep", LINE + "train.steps=2 seed=1,2"
    with monkeypatch.context() as patched:
        patched.setattr(train, "run_job", fail)
        ended = here(line, folder)
    assert ended.code == 2
    assert ended.err.count("no such file") == 4  # when it happens, and at the end
    assert here(line, folder).code == 0
    assert not list(folder.rglob("failed.json"))


def test_job_in_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "LET_GO", 0.1)
    folder = tmp_path / "sweep"
    line = LINE + "train.steps=2 seed=1,2"
    assert here(line, folder).code == 0
    hold(folder / "1" / ".lock")
    refused = here(line, folder)
    release(folder / "1" / ".lock")
    assert refused.code == 2
    assert f"{folder}/1 is in use" in one_sentence(refused.err)


def test_job_of_a_killed_sweep_does_not_go_on_under_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, hydra = tmp_path / sweep.SWEEP_LOCK, OmegaConf.create({"launcher": {"_target_": "x.LocalLauncher"}})
    monkeypatch.setenv(sweep.THIS_LOCK, str(lock))
    monkeypatch.setenv(sweep.THIS_SWEEP, "one")
    hold(lock)
    lock.write_text("one")
    assert not sweep.is_stopped(hydra)
    lock.write_text("next")
    assert sweep.is_stopped(hydra)
    lock.write_text("one")
    release(lock)
    assert sweep.is_stopped(hydra)


# ---- launchers ----


@needs_joblib
@pytest.mark.slow
def test_joblib_tells_of_a_failed_job_and_shares_the_cores(tmp_path: Path) -> None:
    folder, line = tmp_path / "sweep", f"{DIVERGES} hydra/launcher=joblib hydra.launcher.n_jobs=2 "
    line += "estimator._target_=told.Told"
    ended = end(start(line, folder, OMP_NUM_THREADS="7", TOLD=str(tmp_path)), folder)
    assert ended.code == 3, ended.said
    assert f"failed with exit code 3: {folder}/0: " in ended.err
    assert "job 2: test accuracy" in ended.out
    assert f"; in {folder}/1" in next(line for line in ended.err.splitlines() if "job 2 of 2: optimizer.lr=" in line)
    assert "step/s" not in ended.said
    assert [path.name for path in tmp_path.glob("threads*")] == [f"threads{max(1, sweep.usable_cores() // 2)}"]


@needs_joblib
def test_joblib_with_one_job_at_a_time_stays_in_this_process(tmp_path: Path) -> None:
    line, group, handler = LINE + "hydra/launcher=joblib", os.getpgrp(), signal.getsignal(signal.SIGINT)
    ended = here(f"{line} hydra.launcher.n_jobs=1 train.steps=2 optimizer.lr=1e30,3e-3", tmp_path / "sweep")
    assert ended.code == 3, ended.said
    assert (tmp_path / "sweep" / "1" / "result.json").exists()
    assert (os.getpgrp(), signal.getsignal(signal.SIGINT)) == (group, handler)


def test_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "usable_cores", lambda: 8)
    for settings, jobs, threads in (
        ({"n_jobs": -1}, 8, 1),
        ({"n_jobs": -2}, 7, 1),
        ({"n_jobs": -99}, 1, 8),
        ({"n_jobs": 3}, 3, 2),
        ({"n_jobs": 16}, 16, 1),
        ({"cpus_per_task": 4}, 1, 4),
        ({"cpus_per_task": None}, 1, 8),
    ):
        assert (sweep.n_jobs(settings), sweep.threads(settings)) == (jobs, threads)
    assert os.sched_getaffinity(0)
    assert sweep.usable_cores() >= 1


@needs_joblib
def test_job_of_joblib_is_checked_before_work(tmp_path: Path) -> None:
    refused = here(LINE + "hydra/launcher=joblib seed=1,-2", tmp_path / "sweep")
    assert refused.code == 2
    assert "seed must be >= 0" in one_sentence(refused.err)
    assert not (tmp_path / "sweep").exists()


@needs_submitit
@pytest.mark.slow
def test_submitit_puts_a_preempted_job_back(undisturbed: list[dict[str, Any]], tmp_path: Path) -> None:
    """SIGUSR2 is submitit's warning before preemption or the time limit: the job saves and starts again."""
    folder = tmp_path / "sweep"
    line = f"{JOBS} hydra/launcher=submitit_local train.checkpoint_every=100000"
    process = start(line, folder, SLOW=str(tmp_path))
    wait_for(lambda: at_work(folder), process)

    def submitted() -> list[int]:
        return [pid for pid in processes_in(tmp_path) if b"core._submit" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    wait_for(lambda: (folder / "0" / "result.json").exists() and len(submitted()) == 2, process)  # the slow ones
    for pid in submitted():
        os.kill(pid, signal.SIGUSR2)
    ended = end(process, folder)
    assert ended.code == 0, ended.said
    assert json.loads((folder / "1" / "result.json").read_text())["start_step"] >= 20
    for outcome, expected in zip(outcomes(folder), undisturbed, strict=True):
        assert equal(outcome, expected)


@needs_submitit
@pytest.mark.slow
def test_submitit_tells_of_a_failed_job(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    ended = end(start(f"{DIVERGES} hydra/launcher=submitit_local", folder), folder)
    assert ended.code == 3, ended.said
    assert f"failed with exit code 3: {folder}/0: " in ended.err
    assert (folder / "1" / "result.json").exists()


@needs_submitit
def test_slurm_preset_has_the_keys_of_the_plugin() -> None:
    shown = command(train.main, "hydra/launcher=slurm hydra.launcher.partition=gpu --cfg hydra")
    launcher = OmegaConf.create(shown.out).hydra.launcher
    assert shown.code == 0, shown.said
    assert launcher._target_.endswith(".SlurmLauncher")
    assert (launcher.timeout_min, launcher.max_num_timeout, launcher.partition) == (240, 20, "gpu")


@needs_submitit
def test_slurm_where_there_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    refused = here(LINE + "hydra/launcher=slurm train.steps=2 seed=1,2", tmp_path / "sweep")
    assert refused.code == 2
    assert "srun is not on PATH" in one_sentence(refused.err)
    assert not (tmp_path / "sweep").exists()


@needs_submitit
@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [
        (143, "JobState=RUNNING Reason=None PreemptEligibleTime=2026-11-27 PreemptTime=2026-11-28", True),
        (143, "JobState=RUNNING Reason=None PreemptEligibleTime=2026-11-27 PreemptTime=None", False),  # a person
        (143, "JobState=CANCELLED Reason=None PreemptTime=2026-11-28", False),
        (143, "JobState=PENDING Reason=None PreemptTime=2026-11-28", False),  # by SLURM already
        (0, "JobState=RUNNING Reason=None PreemptTime=2026-11-28", False),
        (3, "JobState=RUNNING Reason=None PreemptTime=2026-11-28", False),
    ],
)
def test_batch_script_puts_back_what_is_preempted(code: int, state: str, requeued: bool, tmp_path: Path) -> None:
    """A real SLURM is in tests/test_slurm.py."""
    from training.slurm import AFTER_JOB

    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\necho "{state}"\n')
    (tmp_path / "scontrol").chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "8"}
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
    for job, more in (("8", {}), ("7_0", array)):
        ended = subprocess.run(["bash", "-c", f"(exit {code})\n{AFTER_JOB}"], env=variables | more)
        assert ended.returncode == code
        asked = (tmp_path / "asked").read_text() if code == 143 else ""
        assert (f"requeue {job}\n" in asked) == requeued


@needs_submitit
def test_queue_tells_how_jobs_ended() -> None:
    from training.slurm import QueueWatcher

    watcher = QueueWatcher()
    for job in "0123456":
        watcher.register_job(f"7_{job}")
    queue = "7_0|RUNNING\n7_1|CONFIGURING\n7_2|COMPLETED\n7_3|CANCELLED\n7_4|PENDING\n7_5|COMPLETING\n1|FAILED\n"
    watcher._info_dict.update(watcher.read_info(queue))
    assert [job for job in "0123456" if watcher.is_done(f"7_{job}", mode="cache")] == ["2", "3", "6"]
    assert watcher.get_state("7_6", mode="cache") == "GONE"


# ---- searches ----


@needs_optuna
@old_sqlalchemy
def test_search_maximises_validation_accuracy_and_starts_again(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    line = LINE.replace("optimizer.lr=3e-3 ", "") + "estimator=gumbel_softmax search=alpha_temperature_lr "
    line += "train.steps=20 hydra.sweeper.n_trials="
    ended = here(line + "3", folder)
    assert ended.code == 0, ended.said
    results = [json.loads((folder / f"{job}" / "result.json").read_text()) for job in range(3)]
    assert len({result["config"]["optimizer.lr"] for result in results}) == 3
    best = OmegaConf.load(folder / "optimization_results.yaml")
    assert best.best_value == max(result["val_accuracy"] for result in results)
    assert_round_and_repeatable(results, ended.err, tmp_path)
    before = times(folder)
    again = here(line + "4", folder)
    assert again.code == 0, again.said
    assert (folder / "3" / "result.json").exists()
    assert {file: written for file, written in times(folder).items() if file in before} == before
    other = here(line + "4 seed=9", folder)
    assert other.code == 2
    assert "that of the same search" in one_sentence(other.err)
    assert ": seed=9 was not said; the same has" in one_sentence(other.err)
    for trial in folder.glob("[0-9]"):
        shutil.rmtree(trial / "checkpoints")
    done = times(folder)
    assert here(line + "4", folder).code == 0  # of results whose checkpoints somebody has deleted
    assert times(folder) == done
    assert OmegaConf.load(folder / "optimization_results.yaml").best_value >= best.best_value


def assert_round_and_repeatable(results: list[dict[str, Any]], said: str, tmp_path: Path) -> None:
    """Numbers of three digits; test data looked at for the best alone; its command has its validation numbers."""
    for result in results:
        drawn = [word.partition("=")[2] for word in result["asked"]["overrides"] if word.split("=")[0] in DRAWN]
        assert len(drawn) == len(DRAWN)
        assert all(len(number.replace(".", "").strip("0")) <= 3 for number in drawn), drawn
    best = max(results, key=lambda result: result["val_accuracy"])
    assert [result["test_accuracy"] is not None for result in results] == [result is best for result in results]
    (line,) = re.findall(r"its command: .*/train\.py (.*)|its command: .* train\.py (.*)", said)
    again = command(train.main, f"{''.join(line)} hydra.run.dir={tmp_path / 'again'}")
    assert again.code == 0, again.said
    repeated = json.loads((tmp_path / "again" / "result.json").read_text())
    assert all(repeated[name] == best[name] for name in repeated if name.startswith(("val_", "test_")))


def test_numbers_are_rounded_inside_their_interval() -> None:
    def interval(low: float, high: float) -> Any:
        return SimpleNamespace(low=low, high=high)

    for value, low, high, expected in (
        (0.0032345, 3e-4, 1e-2, 0.00323),
        (543.21, 1.0, 1000.0, 543.0),
        (1.37777, 0.5, 2.0, 1.38),
        (1000.4567, 1000.0, 1001.0, 1000.46),  # of a narrow interval hundredths
        (0.99996, 0.5, 1.0, 0.99996),  # whose upper end is no part of it
        (0.123449, 0.12345 - 1e-5, 0.2, 0.12345),
        (-0.51234, -1.0, 1.0, -0.512),
        (0.0, -1.0, 1.0, 0.0),
    ):
        found = search.rounded(value, interval(low, high))
        assert found == expected
        assert low <= found < high
    assert search.rounded(0.1 + 0.2, SimpleNamespace(low=0.0, high=1.0, q=0.1)) == 0.3
    assert search.rounded(7, interval(1, 1000)) == 7
    assert search.rounded("conv", SimpleNamespace(choices=("conv", "mlp"))) == "conv"


@needs_optuna
@old_sqlalchemy
def test_search_outlives_trials_that_diverge(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    line = LINE.replace("optimizer.lr=3e-3 ", "") + "train.steps=4 hydra/sweeper=optuna hydra.sweeper.n_trials=4 "
    line += "hydra.sweeper.direction=maximize hydra.sweeper.n_jobs=1 hydra.sweeper.sampler.seed=1 "
    line += "optimizer.lr=1e30,1e-3 evaluation.test=true "  # which overrules what searches do
    line += "'hydra.sweep.subdir=t${hydra:job.num}'"
    for _ in range(2):
        ended = here(line, folder)
        assert ended.code == 3, ended.said
        assert "Traceback" not in ended.said
        assert len(list(folder.glob("*/"))) == 4
        assert OmegaConf.load(folder / "optimization_results.yaml").best_params == {"optimizer.lr": 0.001}
    done = [json.loads(path.read_text()) for path in folder.rglob("result.json")]
    assert all(result["test_accuracy"] is not None for result in done)


@needs_optuna
@old_sqlalchemy
def test_search_that_cannot_go_on_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise DataError("no such file")

    monkeypatch.setattr(train, "run_job", fail)
    line = LINE + "hydra/sweeper=optuna hydra.sweeper.n_trials=2 hydra.sweeper.n_jobs=1 hydra.sweeper.sampler.seed=1 "
    ended = here(line + "objective.alpha=1,2", tmp_path / "sweep")
    assert ended.code == 2, ended.said
    assert f"failed with exit code 2: {tmp_path}/sweep/0: no such file" in ended.err
    assert "go on with the sweep by: " in ended.err
    assert "Traceback" not in ended.said


@needs_optuna
def test_a_search_without_m_is_one_run_and_says_so(tmp_path: Path) -> None:
    ended = run(f"{MLP} estimator=gumbel_softmax search=alpha_temperature_lr train.steps=1", tmp_path / "run")
    assert "search=alpha_temperature_lr searches with -m alone: this is one run" in ended.said


@needs_optuna
@old_sqlalchemy
@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("optimizer.lr=interval(-1,1)", "optimizer.lr must be"),
        ("objective.alpha=interval(0,-1)", "objective.alpha must be"),
        (
            "objective.alpha=interval(1,2) hydra.sweeper.direction=minimize",
            "hydra.sweeper.direction must be maximize, got minimize",
        ),
        ("optimizer.lr=interval(0.1,1) data.num_validation=0", "data.num_validation must be > 0"),
        ("optimizer.lr=interval(0.1,1) seed=0,1", "seed must be one number in a search"),
        ("data.split_seed=range(3)", "data.split_seed must be one number in a search"),
    ],
)
def test_search_is_checked_before_work(line: str, sentence: str, tmp_path: Path) -> None:
    refused = here(f"-m data=digits hydra/sweeper=optuna {line}", tmp_path / "sweep")
    assert refused.code == 2
    assert sentence in one_sentence(refused.err)
    assert not (tmp_path / "sweep").exists()


# ---- single runs ----


@pytest.mark.slow
def test_of_two_new_runs_in_a_folder_one_trains(tmp_path: Path) -> None:
    """Both start at the same moment; the other is refused and leaves no trace."""
    for attempt in range(5):
        folder = tmp_path / f"{attempt}" / "run"
        places = [tmp_path / f"{attempt}" / f"{seed}" / "sweep" for seed in (1, 2)]
        processes = []
        for seed, place in enumerate(places, 1):
            place.parent.mkdir(parents=True)
            line = LINE.removeprefix("-m ") + f"train.steps=20 hydra.run.dir={folder} seed={seed}"
            processes.append(start(line, place))
        one, other = (end(process, place) for process, place in zip(processes, places, strict=True))
        assert {one.code, other.code} == {0, 2}, one.said + other.said
        seed, refused = (1, other) if one.code == 0 else (2, one)
        assert str(folder) in one_sentence(refused.err)  # in use, or with a run by now
        assert refused.out == ""
        assert f"seed={seed}" in (folder / ".hydra" / "overrides.yaml").read_text()
        assert json.loads((folder / "result.json").read_text())["seed"] == seed
        assert f"seed={3 - seed}" not in (folder / "train.log").read_text()
