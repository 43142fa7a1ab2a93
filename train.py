"""Trains a VAE with categorical latents. `uv run train.py --help` lists the choices; README.md explains them."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from configs.check import COMPOSING_ERRORS, is_follower, number_of_processes, refuse, typed
from configs.schema import Config, ConfigError
from configs.trust import take_trusted
from configs.wording import explain, explain_group, print_anywhere
from training.ended import ended_by, errors, is_saved, is_to_say, quiet_on_full_disks, way_to_resume
from training.resume import asked_later, references, resume_arguments, resume_command

if TYPE_CHECKING:  # importing PyTorch takes seconds, and --help does not need it
    from training.distributed import Together
    from training.interruption import Interruption
    from training.report import Report
    from training.run import Run

log = logging.getLogger("catvae")
OmegaConf.register_new_resolver("unique", lambda: secrets.token_hex(3), use_cache=True)


def train(run: Run, report: Report, folder: Path) -> int:
    """Trains from the run's step to its last; returns 0, or 128 + the number of the signal that stopped it."""
    from training.divergence import FiniteGuard
    from training.side_by_side import interruption_here, update_of

    settings = run.config.train
    guard = FiniteGuard(run.optimizer, run.parameters, run.device)
    update = update_of(run, guard)
    with interruption_here() as interruption:
        if run.unlooked:
            with others_told(run, interruption):
                look(run, report, folder, interruption)
            if interruption.exit_code:
                return stopped(run, folder, interruption)
        for step in range(run.step, settings.steps):
            result = update(step)
            run.step = done = step + 1
            report.add(result, guard.norm)

            run.unlooked, last = any(looks_due(run)), done == settings.steps
            save_is_due = done % settings.checkpoint_every == 0 or last or run.unlooked
            with others_told(run, interruption):
                if done % settings.log_every == 0 or last:
                    guard.raise_if_diverged()
                    report.log_step(done)
                if save_is_due:
                    guard.raise_if_diverged()
                    save(run, report, folder)
                if run.unlooked:
                    look(run, report, folder, interruption)
            if interruption.exit_code:
                if not save_is_due:
                    guard.raise_if_diverged()
                    save(run, report, folder)
                return stopped(run, folder, interruption)
    return 0


@contextmanager
def others_told(run: Run, interruption: Interruption) -> Iterator[None]:
    """What the first process of a run does between steps, while others wait; then all go on, or stop, alike."""
    from training.divergence import Diverged

    try:
        yield
    except Diverged:
        if run.together:
            run.together.agree(run.together.DIVERGED)
        raise
    if run.together and (code := run.together.agree(interruption.exit_code or 0)):
        interruption.heed(code)


def train_along(run: Run) -> int:
    """The same steps in a process that neither writes nor looks; returns the exit code."""
    from training.divergence import Diverged, FiniteGuard
    from training.interruption import Interruption
    from training.update import Update

    assert run.together
    update = Update(run, FiniteGuard(run.optimizer, run.parameters, run.device))
    with Interruption() as interruption:
        code = run.together.agree(0) if run.unlooked else 0
        while run.step < run.config.train.steps and not code:
            update(run.step)
            run.step += 1
            code = run.together.agree(interruption.exit_code or 0)
        if code == run.together.DIVERGED:
            raise Diverged
    return code


def save(run: Run, report: Report, folder: Path) -> None:
    """Writes a checkpoint. A run that goes on from it logs nothing again, but what belongs to a look still to come."""
    from training import saved

    with report.paused():
        report.flush()
        run.logged = report.logged_at_step(run.step) if run.unlooked else None
        saved.save(run, folder)


def stopped(run: Run, folder: Path, interruption: Interruption) -> int:
    """Says how to go on, and returns the exit code."""
    from training.state import plain

    log.warning("stopped at step %d; go on with: %s", run.step, resume_command(folder, plain(run.config)))
    return interruption.exit_code or 0


def looks_due(run: Run) -> tuple[bool, bool]:
    """Whether validation and diagnostics are due at the run's step."""
    every, diagnose_every = run.config.train.validate_every, run.config.diagnostics.every
    last = run.step == run.config.train.steps
    validate = len(run.validation.labels) > 0 and (run.step % every == 0 or last)
    return validate, diagnose_every > 0 and (run.step % diagnose_every == 0 or last)


def look(run: Run, report: Report, folder: Path, interruption: Interruption) -> None:
    """Validation and diagnostics where they are due, of a run that is saved, and then saves it as looked at.

    A signal puts them off to when the run is resumed. A checkpoint whose validation diverges is not kept.
    """
    from training.checkpoints import drop_newest
    from training.divergence import Diverged, raise_unless_finite
    from training.interruption import Interrupted

    validate, diagnose = looks_due(run)
    with report.paused():
        try:
            if validate:
                measured = run.validate(interruption.check)
                raise_unless_finite("the validation bound", measured.bound, run.step)
            if diagnose:
                diagnosed = run.diagnose(after_draw=interruption.check)
        except Interrupted:
            return
        except Diverged:
            drop_newest(folder)
            raise
        if validate:
            report.validation(run.step, measured)
        if diagnose:
            report.diagnostics(run.step, diagnosed)
    run.unlooked = False
    save(run, report, folder)


def run_job(config: DictConfig, folder: Path) -> int:
    """One run, from its configuration to result.json; returns the exit code."""
    from training.distributed import begin
    from training.run_folder import locked

    checked, hydra_config = typed(config), HydraConfig.get()
    if hydra_config.mode == RunMode.RUN and (search := hydra_config.runtime.choices.get("search")):
        log.warning("search=%s searches with -m alone: this is one run", search)
    with locked(folder):
        return run_in(folder, checked, asked_for(config), begin(checked.device))


def asked_for(config: DictConfig) -> dict[str, Any]:
    """What a configuration was composed of, for TensorBoard, scripts.compare and resume."""
    from training import sweep

    hydra_config = HydraConfig.get()
    sources = hydra_config.runtime.config_sources
    return {
        "overrides": list(hydra_config.overrides.task),
        "choices": {group: made for group, made in hydra_config.runtime.choices.items() if "hydra/" not in group},
        "config_dir": [source.path for source in sources if source.provider == "command-line"],
        "references": references(config),
        "varied": sweep.varied(hydra_config) if hydra_config.mode == RunMode.MULTIRUN else [],
    }


def run_in(folder: Path, checked: Config, asked: dict[str, Any], together: Together | None) -> int:
    """A run in a folder that no other process writes to, trained with others, if any; returns the exit code."""
    from training import saved
    from training.checkpoints import prune
    from training.divergence import Diverged
    from training.process import threads_kept
    from training.report import Report
    from training.result import finish, is_finished
    from training.run import Run
    from training.run_folder import SPLIT, write_json
    from training.state import plain

    with threads_kept():
        if together:
            together.tell({"config": plain(checked), "folder": str(folder)})
        run = Run(checked, together)
        run.asked = asked  # which a checkpoint has from the run's beginning
        if checked.resume:
            saved.restore_newest(run, folder)
            run.asked = asked_later(run.asked, asked)
            prune(folder)  # a run that was killed right after saving has one too many
            if is_finished(folder, checked):
                log.info("%s is finished already, and stays as it is", folder)
                if together:
                    together.tell({})
                    together.part()
                return 0
            if run.step > checked.train.steps:
                raise ConfigError(
                    f"train.steps must be >= {run.step}, which this run has done, got {checked.train.steps}"
                )
        else:
            write_json(folder / SPLIT, run.split.manifest(checked.data.name, checked.data.split_seed))
            saved.save(run, folder)
        with Report(run, folder) as report:
            while True:
                if together:
                    together.tell(saved.state_of(run))
                try:
                    code = train(run, report, folder)
                    break
                except Diverged as diverged:
                    saved.roll_back(run, folder, diverged)
                    report.roll_back(run.step)
            if code == 0:
                finish(run, report, folder)
        if together:
            together.part()
        return code


def follow() -> int:
    """What a process does that is not the first of its run; returns the exit code.

    The first one tells the configuration, the state to start from, and whether there is anything to do.
    """
    from training import distributed, saved
    from training.divergence import Diverged
    from training.interruption import ProcessLost
    from training.run import Run

    os.environ["TQDM_DISABLE"] = "1"
    log.disabled = True  # the first process has said it
    told: dict[str, Any] = {}
    try:
        if not (together := distributed.join()):
            return 0
        told = together.tell(None)
        run = Run(typed(OmegaConf.create(told["config"])), together)
        while state := together.tell(None):
            saved.restore(run, state)
            try:
                code = train_along(run)
                together.part()
                return code
            except Diverged:
                continue
        together.part()
        return 0
    except KeyboardInterrupt:  # outside the training loop; the first process says it
        return 130
    except Exception as error:
        if isinstance(error, ProcessLost):
            time.sleep(distributed.AWHILE)
        if not distributed.says():
            return 1
        return ended_by(error, OmegaConf.create(told.get("config", {})), Path(told.get("folder", ".")))


@hydra.main(version_base=None, config_path="configs", config_name="config")
def hydra_main(config: DictConfig) -> float | None:
    """Runs a job; returns what a search maximises in a sweep, and exits with its code elsewhere."""
    if errors.disabled:  # hydra/job_logging=disabled is about what a run logs, not about what ends it
        errors.disabled, errors.handlers = False, []  # without any, it comes to standard error
    folder = Path(HydraConfig.get().runtime.output_dir)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return job_of_sweep(config, folder)
    if code := ending(config, folder)[0]:
        sys.exit(code)
    return None


def ending(config: DictConfig, folder: Path) -> tuple[int, str]:
    """Runs a job, and turns what ended it into an exit code and a reason."""
    try:
        return run_job(config, folder), ""
    except Exception as error:
        return (ended_by(error, config, folder) if is_to_say() else 1), str(error)
    except (KeyboardInterrupt, SystemExit):  # outside the training loop, which would have taken a checkpoint first
        if is_to_say() and is_saved(folder):
            log.warning("stopped; go on with: %s", way_to_resume(config, folder))
        raise


def job_of_sweep(config: DictConfig, folder: Path) -> float | None:
    """Does what is left to do of a job; the others go on if it fails, and the sweep's exit code tells of it."""
    from training import sweep

    hydra_config = HydraConfig.get()
    if sweep.is_stopped(hydra_config):
        return None
    if sweep.failed_for_good(folder, config):
        errors.error("catvae: %s diverged, and would again; delete it to try anew", folder)
        return sweep.WORST
    if sweep.is_done(folder):
        log.info("%s is finished already, and stays as it is", folder)
        return sweep.after_job(hydra_config, config, folder, 0, "")
    if is_saved(folder):  # the sweep was started again, and CheckBeforeWork has compared the configurations
        config.resume = str(folder)
    (folder / sweep.FAILED).unlink(missing_ok=True)
    sweep.announce(hydra_config)
    with sweep.beside_others(hydra_config):
        try:
            code, reason = ending(config, folder)
        except (KeyboardInterrupt, SystemExit) as stop:
            code, reason = getattr(stop, "code", 130), ""
    return sweep.after_job(hydra_config, config, folder, code, reason)


def main() -> None:
    """The command. Exit codes: 0 done, 1 a fault, 2 unusable configuration or data, 3 diverged, 130/143 interrupted."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on, and they are explained here
    logging.raiseExceptions = False  # a log that cannot be written is said once, by what else cannot be
    threading.excepthook = quiet_on_full_disks(threading.excepthook)
    print_anywhere()
    for name in ("SIGTERM", "SIGHUP"):
        # Windows has no SIGHUP, and nohup has it ignored
        if (number := getattr(signal, name, None)) and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        try:
            if is_follower():
                sys.exit(follow())
            sys.argv[1:] = resume_arguments(*take_trusted(sys.argv[1:]))
        except ConfigError as error:
            refuse(str(error))
        hydra_main()
    except KeyboardInterrupt:  # outside the training loop, which has a checkpoint to write first
        print("catvae: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:  # a job's own errors do not come here
        sweep = sys.modules.get("training.sweep")
        if sweep and (code := sweep.broken(error)):
            sys.exit(code)
        if isinstance(error, (*COMPOSING_ERRORS, ConfigError)):
            refuse(explain(error, sys.argv[1:]))
        # how Hydra ends on a group that is given something else than names
        if isinstance(error, TypeError) and (sentence := explain_group(sys.argv[1:])):
            refuse(sentence)
        raise
    finally:
        if number_of_processes() > 1 and not is_follower():
            from training.distributed import over

            over()


if __name__ == "__main__":
    main()
