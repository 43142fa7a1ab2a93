"""SLURM: a preempted job goes back into the queue, and how jobs ended is known where it keeps no accounting."""

from __future__ import annotations

import os
import shutil
import subprocess
import time

from omegaconf import DictConfig, OmegaConf
from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

from configs.schema import ConfigError

OVER = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
# Preemption is SIGTERM, and after GraceTime SIGKILL and a requeue of what is still there: a job that has saved and left
# would be over for good. SIGTERM is also what scancel, `scontrol requeue` and persons send. SLURM_JOB_ID would not do:
# of an array's last job it is the whole array's
AFTER_JOB = """\
code=$?
job=$SLURM_JOB_ID
if [ "$SLURM_ARRAY_JOB_ID" ]; then job="$SLURM_ARRAY_JOB_ID"_"$SLURM_ARRAY_TASK_ID"; fi
if [ $code = 143 ]; then
    until said=$(scontrol show job "$job"); do sleep 5; done
    case $said in
        *PreemptTime=None*) ;;
        *JobState=RUNNING*) scontrol requeue "$job" ;;
    esac
fi
exit $code"""


def prepare(launcher: DictConfig) -> str | None:
    """Prepares the launcher; returns why sacct fails, if it does. Raises ConfigError where there is no SLURM."""
    if shutil.which("srun") is None:
        raise ConfigError(
            "hydra/launcher must be submitit_local or joblib where there is no SLURM: srun is not on PATH"
        )
    OmegaConf.update(launcher, "teardown", AFTER_JOB.splitlines(), force_add=True)
    try:
        subprocess.run(["sacct", "--noheader", "--allocations"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as failed:
        # submitit would say so every few seconds, and know of no job's end that left no result
        SlurmJob.watcher = QueueWatcher(delay_s=60)
        return " ".join((getattr(failed, "stderr", "") or str(failed)).split())
    return None


def wait_for_others() -> None:
    """After a job that ended without a result, at which the launcher gives up while the others still wait or run."""
    watcher = SlurmJob.watcher
    while not all(watcher.is_done(job) for job in list(watcher._registered)):
        time.sleep(1)


class QueueWatcher(SlurmInfoWatcher):
    """Reads from the queue how jobs ended: SLURM keeps them there for some minutes (MinJobAge)."""

    def _make_command(self) -> list[str] | None:
        if not self._registered - self._finished:
            return None
        return ["squeue", f"--user={os.getuid()}", "--all", "--array", "--states=all", "--noheader", "--format=%i|%T"]

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        text = string if isinstance(string, str) else string.decode()
        states = dict(line.strip().split("|") for line in text.splitlines())
        # submitit takes what it does not know, such as CONFIGURING, for an end
        shown = {job: state if state in OVER else "RUNNING" for job, state in states.items()}
        return {job: {"State": shown.get(job, "GONE")} for job in self._registered}
