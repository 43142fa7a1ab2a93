"""What SLURM says of jobs: which of them are preempted, and how they ended where it keeps no accounting."""

from __future__ import annotations

import os
import signal
import subprocess
import time

from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob, SlurmJobEnvironment

WARNING = getattr(signal, f"SIG{SlurmJobEnvironment.USR_SIG}")  # of the time limit; submitit's handler requeues the job
OVER = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
ASK_AGAIN = 5.0  # seconds


def requeue_if_preempted(code: int) -> None:
    """Puts this job, which a signal has ended and which is saved, back into the queue, and exits, if it must.

    Preemption is SIGCONT and SIGTERM, and after GraceTime SIGKILL and a requeue: of a job that is still there, so
    that one which has saved and left would be over for good. scancel, `scontrol requeue` and a person send SIGTERM too.
    """
    if code == 128 + WARNING or (code == 128 + signal.SIGTERM and _is_preempted()):
        signal.raise_signal(WARNING)


def _is_preempted() -> bool:
    """Asks until there is an answer: where the controller is gone, SLURM's SIGKILL comes, which requeues as well."""
    job = SlurmJobEnvironment().job_id  # of an array's job not SLURM_JOB_ID, which is the whole array's for its last one
    while True:
        asked = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=False)
        if asked.returncode == 0:
            said = dict(word.partition("=")[::2] for word in asked.stdout.split())
            return said["JobState"] == "RUNNING" and said.get("PreemptTime", "None") != "None"
        if "Invalid job id" in asked.stderr:
            return False
        time.sleep(ASK_AGAIN)


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


def watch_queue_without_accounting() -> str | None:
    """Where sacct fails, submitit says so every few seconds and knows of no job's end: asks squeue, and returns why."""
    try:
        subprocess.run(["sacct", "--noheader", "--allocations"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as failed:
        SlurmJob.watcher = QueueWatcher(delay_s=60)
        return " ".join((getattr(failed, "stderr", "") or str(failed)).split())
    return None
