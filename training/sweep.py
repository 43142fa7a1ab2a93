"""A sweep's jobs, perhaps in processes of their own: what they hold on to, how they stop, and how they ended."""

from __future__ import annotations

import functools
import logging
import math
import os
import platform
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from configs.schema import Config, ConfigError
from data.folders import made
from training import checkpoints
from training.checkpoints import CheckpointError, stored
from training.process import CARD, take_card
from training.resume import sweep_command
from training.run_folder import LOCK, RESULT, chosen_by, held, holder, in_use, is_held, read_json, release, write_json
from training.state import changes, flat

errors = logging.getLogger("catvae.errors")
SWEEP_LOCK = ".sweep_lock"  # held by the process that started the sweep, as long as its jobs should go on
THIS_LOCK, THIS_SWEEP = "CATVAE_SWEEP_LOCK", "CATVAE_SWEEP"  # tell a job's process which lock, and what is in it
THESE_JOBS = "CATVAE_SWEEP_JOBS"  # how many there are, and the keys in which they differ
FAILED = "failed.json"
SEARCH = "search.json"
BASIC, JOBLIB, LOCAL, SLURM = "BasicLauncher", "JoblibLauncher", "LocalLauncher", "SlurmLauncher"
SIDE_BY_SIDE = "SideBySideLauncher"
IN_THIS_PROCESS = (BASIC, SIDE_BY_SIDE)
PARALLEL = (JOBLIB, LOCAL)
ON_THIS_MACHINE = (*IN_THIS_PROCESS, *PARALLEL)
LET_GO = 20.0  # seconds that jobs of a killed sweep have for the step in hand and a checkpoint
ROOT = Path(__file__).parent.parent
WORST = -math.inf  # of a job that diverged: less than any accuracy or bound
_begun: list[Path] = []  # the folder that this process sweeps in
_stopped: list[int] = []  # the signal that stops it
_busy = threading.Event()  # a job is done in this process


# ---- the process that starts the sweep ----


@contextmanager
def begun(config: DictConfig) -> Iterator[None]:
    """Makes the sweep's folder this process's own; if what is checked inside refuses the sweep, as if it had not.

    Raises ConfigError if another process has it.
    """
    folder = Path(config.hydra.sweep.dir)
    with ExitStack() as taken_back:
        try:
            taken_back.enter_context(made(folder))
            taken_back.enter_context(held(folder / SWEEP_LOCK))
        except OSError as error:
            raise ConfigError(f"hydra.sweep.dir cannot be used: {error.filename}: {error.strerror}") from error
        except ConfigError:
            message = f"hydra.sweep.dir must be a folder that no other process sweeps in, got {folder}"
            raise ConfigError(f"{message}; {holder(folder / SWEEP_LOCK)} does: wait for it, or stop it") from None
        _tell_jobs(config, folder)
        yield


def _tell_jobs(config: DictConfig, folder: Path) -> None:
    """What the jobs' processes must know; jobs of a sweep in this folder that was killed see that it is another's."""
    _begun[:], _stopped[:] = [folder], []
    if config.hydra.launcher._target_.endswith(JOBLIB):
        config.hydra.launcher.n_jobs = n_jobs(config.hydra.launcher)
        config.hydra.launcher.batch_size = "1"  # joblib's own guess, after jobs that were skipped, is many in a row
    if launcher(config.hydra) in IN_THIS_PROCESS:
        return
    # the jobs' processes start with the current folder on their path, and not with this program's
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if launcher(config.hydra) == SLURM:
        from training import slurm

        if why := slurm.prepare(config.hydra.launcher):
            _say(f"sacct fails ({why}): how jobs end is read from squeue")
    if launcher(config.hydra) in PARALLEL:
        lock = folder.resolve() / SWEEP_LOCK
        token = f"{os.getpid()} {platform.node()} {secrets.token_hex(8)}"
        lock.write_text(token)
        os.environ |= {THIS_LOCK: str(lock), THIS_SWEEP: token}
        _stop_by_signal(lock)


def _stop_by_signal(lock: Path) -> None:
    """The first Ctrl-C, SIGTERM or SIGHUP lets the running jobs save, by letting go of the lock; a second ends at once.

    What nohup has ignored stays ignored.
    """
    of_terminal = [signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        of_terminal.append(signal.SIGHUP)

    def stop(number: int, frame: FrameType | None) -> None:
        for again, handler in before.items():
            signal.signal(again, handler)
        stopped_by(number)
        lock.write_text("")  # where there are no locks, this alone tells the jobs
        release(lock)
        _say("stopping; the running jobs save first")

    before = {number: signal.signal(number, stop) for number in (*of_terminal, signal.SIGTERM)}
    if hasattr(signal, "pthread_sigmask"):
        # a terminal sends these to the jobs' processes too, which would kill their jobs; started by this thread, they
        # do not take them. Another thread takes them here
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        signal.pthread_sigmask(signal.SIG_BLOCK, of_terminal)


def stopped_by(number: int) -> None:
    """Has the sweep of this process end as stopped by a signal."""
    _stopped.append(number)


def tell_number(jobs: int, varied: Sequence[str]) -> None:
    """Has the jobs know, in processes of their own too, how many they are and in which keys they differ."""
    os.environ[THESE_JOBS] = " ".join(map(str, (jobs, *varied)))


def check_side_by_side(launcher: DictConfig, jobs: Sequence[Config]) -> None:
    """Raises ConfigError for what jobs that train in one process cannot differ in."""
    if not isinstance(launcher.n_jobs, int) or launcher.n_jobs < 1:
        raise ConfigError(f"hydra.launcher.n_jobs must be a number >= 1, got {launcher.n_jobs}")
    for key in ("device", "deterministic"):
        if len(values := {str(getattr(job, key)) for job in jobs}) > 1:
            raise ConfigError(f"{key} must be the same in all jobs side by side, got {' and '.join(sorted(values))}")
    if not torch.cuda.is_available() or any(job.device == "cpu" for job in jobs):
        _say("no GPU trains: the jobs are done one after another; hydra/launcher=joblib does several at once")


def check_search(config: DictConfig) -> None:
    """A search makes up the same trials again if it is the same. Raises ConfigError if its folder has another's."""
    folder, sweeper = Path(config.hydra.sweep.dir), config.hydra.sweeper
    search: dict[str, Any] = OmegaConf.to_container(sweeper, resolve=True, enum_to_str=True)  # type: ignore[assignment]
    del search["n_trials"]
    search["overrides"] = OmegaConf.to_container(config.hydra.overrides.task)
    search["numbers"] = "rounded"  # a search from before drew others
    if any(folder.rglob("checkpoints")) or any(folder.rglob(RESULT)):
        before = read_json(folder / SEARCH) if (folder / SEARCH).exists() else {}
        if before != search or sweeper.storage or sweeper.sampler.get("seed") is None:
            message = f"hydra.sweep.dir must be new, or that of the same search, got {folder}"
            old, new = (set(one.get("overrides", [])) for one in (before, search))
            now, was = " ".join(sorted(new - old)) or "what is left out", " ".join(sorted(old - new)) or "not said"
            differs = f": {now} was {was}" if before and old != new else ""
            raise ConfigError(
                f"{message}{differs}; the same has hydra.sweeper.sampler.seed, all settings but "
                "hydra.sweeper.n_trials, and no storage"
            )
    write_json(folder / SEARCH, search)


def check_folder(folder: Path, config: Config) -> None:
    """Raises ConfigError if a job cannot be done in `folder`: it has another run, or a process trains in it."""
    until = time.monotonic() + LET_GO
    while is_held(folder / LOCK):  # perhaps by a job that has yet to see that its sweep was killed
        if time.monotonic() > until:
            raise ConfigError(in_use(folder / LOCK))
        time.sleep(0.1)
    if (folder / "checkpoints").is_symlink():
        raise ConfigError(f"hydra.sweep.dir must have no links in it, to be written through, got {folder}/checkpoints")
    try:
        if stored(folder):
            before = flat(checkpoints.load(folder, torch.device("cpu"))["config"])
        elif (folder / RESULT).exists():  # of a job that is done, whose checkpoints somebody has deleted
            before = dict(read_json(folder / RESULT)["config"])
        else:
            return
    except (CheckpointError, ValueError, KeyError, TypeError) as error:
        what = error if isinstance(error, CheckpointError) else f"{folder / RESULT} cannot be read ({error!r})"
        raise ConfigError(str(what)) from error
    if changed := changes(before, config):
        raise ConfigError(f"hydra.sweep.dir must be new, or this sweep's, got {folder} with another run: {changed}")
    if not stored(folder) and before["train.steps"] < config.train.steps:
        has = f"its {before['train.steps']} steps and no checkpoint to go on from"
        raise ConfigError(f"train.steps must be more in a new hydra.sweep.dir, as {folder} has the result of {has}")


def end() -> int:
    """Says how the jobs ended, if not all are done; returns the sweep's exit code, the worst of theirs."""
    folder = _begun[0]
    release(folder / SWEEP_LOCK)
    for taken in folder.glob(f"{CARD}_*"):
        taken.unlink(missing_ok=True)
    failed = {path.parent: read_json(path) for path in sorted(folder.rglob(FAILED))}
    for job, outcome in failed.items():
        _say(f"failed with exit code {outcome['exit_code']}: {job}: {outcome['reason']}")
    codes = [outcome["exit_code"] for outcome in failed.values()]
    for job in sorted(path.parent for path in folder.rglob("checkpoints")):
        if not _stopped and job not in failed and not (job / RESULT).exists():
            _say(f"not done: {job}")
            codes.append(1)
    code = 128 + _stopped[0] if _stopped else max(codes, default=0)
    if code:
        _say(f"go on with the sweep by: {sweep_command(sys.argv[1:], folder)}")
    return code


def broken(error: Exception) -> int | None:
    """Says how the sweep of this process ended if its jobs made it end with `error`; returns the exit code then."""
    if _begun and isinstance(error.__cause__, subprocess.CalledProcessError):  # submitit has shown what sbatch said
        release(_begun[0] / SWEEP_LOCK)
        _say(
            "sbatch refused the jobs: set the hydra.launcher keys by what the cluster has (sinfo shows its partitions)"
        )
        return 2
    lost = type(error).__name__ in (
        "TerminatedWorkerError",
        "BrokenProcessPool",
        "UncompletedJobError",
        "FailedJobError",
    )
    if not _begun or not (lost or _stopped or any(_begun[0].rglob(FAILED))):
        return None
    if lost and not _stopped:
        _say(f"the process of a job ended early: {_reason(error)}")
        if slurm := sys.modules.get("training.slurm"):
            _say("the other jobs go on, and are waited for; Ctrl-C ends the waiting, and not the jobs")
            with suppress(KeyboardInterrupt):
                slurm.wait_for_others()
    return end() or 1


def _reason(error: Exception) -> str:
    """The beginning of a message, or the last line of a traceback in it."""
    lines = str(error).splitlines()
    if any(line.startswith("Traceback") for line in lines):
        rules = [number for number, line in enumerate(lines) if line.startswith("-----")]
        lines = lines[rules[-1] - 1 : rules[-1]] if rules else lines[-1:]
    return " ".join(" ".join(lines).split()[:20])


# ---- a job ----


def announce(hydra: Any) -> None:
    """Says which of how many jobs begins, what is its own, and how many are done."""
    total = os.environ.get(THESE_JOBS, "").partition(" ")[0]
    own = varied(hydra) if total else hydra.overrides.task
    done = sum(1 for _ in Path(hydra.sweep.dir).rglob(RESULT))
    of = f" of {total}" if total else ""
    words = f"job {hydra.job.num + 1}{of}: {' '.join(own) or 'nothing of its own'}, {done} done"
    print(f"{words}; in {hydra.runtime.output_dir}", file=sys.stderr, flush=True)


def launcher(hydra: Any) -> str:
    """The name of the class, which a preset of another name has too; joblib does one job at a time in this process."""
    name = str(hydra.launcher._target_).rpartition(".")[2]
    return BASIC if name == JOBLIB and n_jobs(hydra.launcher) == 1 else name


def is_stopped(hydra: Any) -> bool:
    """Whether the process that started this job wants no more of it, or is gone: another may have its lock by then."""
    if launcher(hydra) == SIDE_BY_SIDE:
        from training.side_by_side import is_stopped

        return bool(_stopped) or is_stopped()
    return launcher(hydra) in PARALLEL and _is_let_go()


def _is_let_go() -> bool:
    lock = Path(os.environ[THIS_LOCK])
    return is_held(lock) is False or lock.read_text() != os.environ[THIS_SWEEP]


@contextmanager
def beside_others(hydra: Any) -> Iterator[None]:
    """In a process of its own, a job has its share of the cores, a quiet terminal, and stops when the sweep does."""
    if launcher(hydra) == SIDE_BY_SIDE:
        from training.side_by_side import own_log

        os.environ["TQDM_DISABLE"] = "1"
        with own_log(hydra.job.num + 1):
            yield
        return
    if launcher(hydra) == BASIC:
        yield
        return
    torch.set_num_threads(min(threads(hydra.launcher), torch.get_num_threads()))
    if launcher(hydra) in PARALLEL:
        take_card(Path(hydra.sweep.dir).resolve(), hydra.job.num)
    os.environ["TQDM_DISABLE"] = "1"
    signal.signal(signal.SIGTERM, _end_job)  # submitit takes none of it
    _busy.set()
    try:
        if launcher(hydra) in PARALLEL:
            _within_sweep(hydra)
        yield
    finally:
        _busy.clear()


def _within_sweep(hydra: Any) -> None:
    """A job on this machine says which one it is, and stops when its sweep does."""
    for handler in [*logging.root.handlers, *errors.handlers]:
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(logging.Formatter(f"job {hydra.job.num + 1}: %(message)s"))
    if hasattr(os, "setpgid") and os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # out of reach of Ctrl-C on the terminal, which joblib's processes take
    _end_with_sweep(os.getppid())


def _end_job(number: int, frame: FrameType | None) -> None:
    if _busy.is_set():  # or it is done, and its result is on the way
        sys.exit(128 + number)


@functools.cache  # once a process
def _end_with_sweep(parent: int) -> None:
    """Ends the job when the sweep is stopped, and the process, which would wait for another job, with its parent."""

    def watch() -> None:
        told = False
        while os.getppid() == parent or _busy.is_set():
            if _busy.is_set() and not told and _is_let_go():
                told = True
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
        os._exit(143)

    threading.Thread(target=watch, daemon=True).start()


def threads(settings: Any) -> int:
    """PyTorch's threads in a job beside others, from the launcher's settings: its share of the cores, at least one."""
    return int(settings.get("cpus_per_task") or max(1, usable_cores() // n_jobs(settings)))


def n_jobs(settings: Any) -> int:
    """Jobs at once: hydra.launcher.n_jobs, where -1 is as many as there are cores and -2 is one less, as in joblib."""
    number = settings.get("n_jobs") or 1
    return int(number) if number > 0 else max(1, usable_cores() + 1 + int(number))


def usable_cores() -> int:
    """Physical cores that this process may use: fewer under taskset, in a container or in a cluster's allocation."""
    from joblib import cpu_count

    return int(cpu_count(only_physical_cores=True))


def varied(hydra: Any) -> list[str]:
    """Those of a job's overrides that the sweep or the search has several values of."""
    _, _, keys = os.environ.get(THESE_JOBS, "").partition(" ")
    return [override for override in hydra.overrides.task if override.partition("=")[0] in keys.split()]


def is_done(folder: Path) -> bool:
    """Whether the job has a result, and no checkpoints any more. CheckBeforeWork has compared its settings."""
    return not stored(folder) and (folder / RESULT).exists()


def failed_for_good(folder: Path, config: DictConfig) -> bool:
    """Whether the job diverged before, and would again: the same settings take the same steps."""
    if not (folder / FAILED).exists():
        return False
    outcome = read_json(folder / FAILED)
    return outcome["exit_code"] == 3 and outcome["on_divergence"] == config.on_divergence.value


def after_job(hydra: Any, config: DictConfig, folder: Path, code: Any, reason: str) -> float | None:
    """Keeps a failure for the sweep's end; gives a search what it maximises, which is never of test data."""
    if code in (1, 2, 3):
        write_json(folder / FAILED, {"exit_code": code, "reason": reason, "on_divergence": config.on_divergence.value})
        return WORST if code == 3 else None
    if launcher(hydra) in (LOCAL, SLURM) and code == 128 + signal.SIGUSR2:
        signal.raise_signal(signal.SIGUSR2)  # submitit's handler puts the job, which is saved, back into the queue
    if code in (130, 143) and launcher(hydra) in PARALLEL:  # whoever started the sweep says so
        return None
    if isinstance(code, int) and code > 128 and launcher(hydra) == SIDE_BY_SIDE:  # any signal stops all
        return None
    if code:
        if launcher(hydra) == BASIC:
            _say(f"go on with the sweep by: {sweep_command(sys.argv[1:], Path(hydra.sweep.dir))}")
        sys.exit(code)
    if (folder / RESULT).exists():
        found = chosen_by(read_json(folder / RESULT))
        return None if found is None else found[1]
    return None


def _say(sentence: str) -> None:
    print(f"catvae: {sentence}", file=sys.stderr)
