"""A real SLURM on this machine: what is preempted, requeued, cancelled or lost goes on to the same bits.

Needs root and Debian's packages slurmctld, slurmd, slurm-client and munge; `uv run pytest -m slurm -n 0`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import train
from tests.runs import ESTIMATORS, MLP, ROOT, Ended, checkpoint, command, equal, on_path
from training import checkpoints

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "squeue", "srun")
MISSING = [program for program in PROGRAMS if shutil.which(program) is None]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(MISSING), reason=f"needs Debian's slurmctld, slurmd, slurm-client, munge: no {MISSING}"),
    pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="SLURM's daemons are started by root"),
]

# Jobs of the partition low make room for those of high within GRACE seconds; no accounting, so that sacct fails.
# A job that is requeued waits for cred_expire, and one that is killed has KillWait seconds. JobRequeue=0: only jobs
# that ask for it are requeued
GRACE = 20
CONFIGURATION = """
ClusterName=catvae
SlurmctldHost={host}(127.0.0.1)
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=now Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SchedulerParameters=bf_interval=2,sched_min_interval=500000
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=15
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
SlurmctldPort={controller_port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
"""
# From step 20 on takes its time, and says which step it is at, as long as there is a folder to say so in
SLOW = """
import os, time
from pathlib import Path
import torch
from estimators.marginalization import Marginalization

class Slow(Marginalization):
    def forward(self, *given, step, **named):
        folder = Path(os.environ.get("SLOW", "no folder"))
        if step >= 20 and folder.is_dir():
            (folder / f"seed_{torch.initial_seed()}").write_text(str(step))
            time.sleep(0.2)
        return super().forward(*given, step=step, **named)
"""
STEPS, EVERY = 600, 50
LINE = (
    f"-m {MLP} {ESTIMATORS['marginalization']} estimator._target_=slow_estimator.Slow seed=1,2 train.steps={STEPS} "
    "train.checkpoint_every=100000 train.validate_every=100000 train.log_every=20 "
)
ON_SLURM = "hydra/launcher=slurm hydra.launcher.cpus_per_task=1 hydra.launcher.mem_gb=null hydra.launcher.partition="
WITHOUT_ACCOUNTING = "catvae: sacct fails (Slurm accounting storage is disabled): how jobs end is read from squeue\n"


@dataclass
class Cluster:
    """A SLURM with one node, this machine."""

    folder: Path
    daemons: dict[str, int] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def ask(self, *words: str) -> str:
        asked = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
        assert asked.returncode == 0, asked
        return asked.stdout

    def start(self, *words: str, pid: str) -> None:
        subprocess.run(words, env=self.environment, check=True, timeout=60)
        wait_for((self.folder / pid).exists, self)
        wait_for(lambda: (self.folder / pid).read_text().strip(), self)
        self.daemons[pid] = int((self.folder / pid).read_text())

    def start_node(self) -> None:
        self.start("slurmd", pid="slurmd.pid")

    def begin(self) -> None:
        (self.folder / "munge.key").write_bytes(os.urandom(256))
        (self.folder / "munge.key").chmod(0o400)
        with contextlib.closing(socket.socket()) as one, contextlib.closing(socket.socket()) as other:
            one.bind(("127.0.0.1", 0))
            other.bind(("127.0.0.1", 0))
            ports = {"controller_port": one.getsockname()[1], "node_port": other.getsockname()[1]}
        host = socket.gethostname().partition(".")[0]
        lines = CONFIGURATION.format(host=host, folder=self.folder, grace=GRACE, **ports)
        (self.folder / "slurm.conf").write_text(lines)
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        places = [f"--{option}={self.folder}/munge.{ending}" for option, ending in files.items()]
        self.start("munged", "--force", *places, pid="munge.pid")
        self.start("slurmctld", "-c", pid="slurmctld.pid")
        self.start_node()
        wait_for(lambda: self.ask("sinfo", "--noheader", "--format=%T").split() == ["idle"], self)

    def processes(self, *words: str) -> list[int]:
        """Those whose command line has one of the words, and whose environment or files are this cluster's."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                said = (entry / "cmdline").read_bytes().decode(errors="replace")
                ours = str(self.folder) in said + (entry / "environ").read_bytes().decode(errors="replace")
                if ours and any(word in said for word in words):
                    found.append(int(entry.name))
        return found

    def kill_node(self) -> None:
        """As when its power goes: nothing is told, and nothing is saved."""
        kill([self.daemons.pop("slurmd.pid"), *self.processes("slurmstepd", "slurm_script", "srun", "submitit.core")])

    def clear(self) -> None:
        """Nothing of a test is left for the next one."""
        self.ask("scancel", "--user=root")
        wait_for(lambda: not self.jobs(), self)

    def end(self) -> None:
        kill(self.processes("slurmstepd", "slurm_script", "srun", "submitit.core", "train.py"))
        kill(list(self.daemons.values()))

    def jobs(self) -> dict[str, str]:
        """The state of each job that is not over, by its number in the queue."""
        lines = self.ask("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)

    def of_sweep(self) -> dict[str, str]:
        lines = self.ask("squeue", "--noheader", "--array", "--name=catvae", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)

    def about(self, job: str) -> dict[str, str]:
        return dict(word.partition("=")[::2] for word in self.ask("scontrol", "show", "job", job).split())

    def preempt(self) -> None:
        self.ask("sbatch", "--partition=high", "--ntasks=2", "--time=5", "--output=/dev/null", "--wrap=sleep 1")


def kill(processes: list[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def wait_for(happened: Callable[[], object], cluster: Cluster, *, seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > until:
            logs = "\n".join(log.read_text()[-2000:] for log in cluster.folder.glob("*.log"))
            pytest.fail(f"did not happen in {seconds} s; {logs}")
        time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A SLURM of its own: keys, ports, state. Its daemons end with the tests, however these end."""
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # munge's socket needs a short path
    made = Cluster(folder)
    try:
        made.begin()
        yield made
    finally:
        made.end()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def slow_estimator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with on_path(tmp_path_factory.mktemp("estimators"), "slow_estimator", SLOW):
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("undisturbed") / "sweep"
    ended = command(train.main, f"{LINE} hydra.sweep.dir={folder}")
    assert ended.code == 0, ended.said
    return [outcome(folder / job) for job in ("0", "1")]


def outcome(folder: Path) -> dict[str, Any]:
    """What does not depend on when a job was stopped: its numbers, and its last checkpoint."""
    result = json.loads((folder / "result.json").read_text())
    numbers = {key: value for key, value in result.items() if key.startswith(("val_", "test_", "split"))}
    return numbers | {"checkpoint": checkpoint(folder)}


@dataclass
class Sweep:
    """`train.py -m hydra/launcher=slurm` with two jobs, which are slow until they are let go."""

    cluster: Cluster
    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def slow(self) -> Path:
        return self.folder.parent / "slow"

    def wait_until_at_work(self) -> None:
        """Until both jobs are in their training loops."""

        def at_work() -> bool:
            assert self.process.poll() is None, self.said()
            return all((self.slow / f"seed_{seed}").exists() for seed in (1, 2))

        wait_for(at_work, self.cluster)

    def wait_until_requeued(self) -> list[int]:
        """Until both have gone back into the queue without losing a step, perhaps one after the other; their steps.

        Then they are let go, and have time: on a busy machine one minute may go into starting Python.
        """
        saved: dict[int, int] = {}

        def requeued() -> bool:
            for job, state in self.cluster.of_sweep().items():
                number = int(job.partition("_")[2])
                if state == "PENDING" and number not in saved:
                    begun = int((self.slow / f"seed_{number + 1}").read_text()) + 1
                    saved[number] = self.saved()[number]
                    assert saved[number] == begun
                    self.cluster.ask("scontrol", "update", f"jobid={job}", "timelimit=30")
            return len(saved) == 2

        wait_for(requeued, self.cluster)
        self.let_go()
        return [saved[0], saved[1]]

    def let_go(self) -> None:
        self.slow.rename(self.folder.parent / "was_slow")

    def steps(self) -> list[int]:
        """How many steps the jobs had begun, when they were slow."""
        return [int((self.folder.parent / "was_slow" / f"seed_{seed}").read_text()) + 1 for seed in (1, 2)]

    def saved(self) -> list[int]:
        return [int(checkpoint(self.folder / job)["step"]) for job in ("0", "1")]

    def start_steps(self) -> list[int]:
        return [json.loads((self.folder / job / "result.json").read_text())["start_step"] for job in ("0", "1")]

    def said(self) -> Ended:
        out, err = (self.folder.parent / name for name in ("out", "err"))
        return Ended(self.process.poll(), out.read_text(), err.read_text())

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob(".submitit/*/*_log.*")))

    def end(self) -> Ended:
        wait_for(lambda: self.process.poll() is not None, self.cluster)
        return self.said()

    def assert_ends_at(self, undisturbed: list[dict[str, Any]]) -> None:
        """All is done, to the same bits, and the screen has no more than that there is no accounting."""
        ended = self.end()
        assert ended.code == 0, (ended.said, self.logs())
        assert ended.said == WITHOUT_ACCOUNTING
        for job, expected in zip(("0", "1"), undisturbed, strict=True):
            assert equal(outcome(self.folder / job), expected)


@pytest.fixture
def start(cluster: Cluster, tmp_path: Path) -> Iterator[Callable[[str], Sweep]]:
    """Starts the sweep, from another directory than the repository; what of it is left after a test is ended."""
    started: list[Sweep] = []

    def start_sweep(settings: str) -> Sweep:
        if not started:
            (tmp_path / "slow").mkdir()
        words = shlex.split(f"{LINE} {ON_SLURM}{settings} hydra.sweep.dir={tmp_path}/sweep")
        variables = {"PYTHONPATH": sys.path[0], "SLOW": str(tmp_path / "slow"), "OMP_NUM_THREADS": "1"}
        with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
            process = subprocess.Popen(
                [sys.executable, ROOT / "train.py", *words],
                stdout=out,
                stderr=err,
                cwd=tmp_path,
                env=cluster.environment | variables,
            )
        started.append(Sweep(cluster, tmp_path / "sweep", process))
        return started[-1]

    yield start_sweep
    for sweep in started:
        sweep.process.kill()
        sweep.process.wait()
    cluster.clear()


def test_a_preempted_job_loses_no_step(
    start: Callable[[str], Sweep], cluster: Cluster, undisturbed: list[dict[str, Any]]
) -> None:
    """Within the grace time it saves, makes room, goes back into the queue and goes on."""
    sweep = start("low")
    sweep.wait_until_at_work()
    asked = time.monotonic()
    cluster.preempt()
    saved = sweep.wait_until_requeued()
    assert time.monotonic() - asked < GRACE, "it was SLURM that ended them"
    assert all(cluster.about(job)["Restarts"] == "1" for job in cluster.of_sweep())
    wait_for(lambda: "RUNNING" in cluster.of_sweep().values(), cluster)
    assert {cluster.about(job)["PreemptTime"] for job in cluster.of_sweep()} == {"None"}, "what a stop is known by"
    sweep.assert_ends_at(undisturbed)
    assert sweep.start_steps() == saved


def test_preemption_without_a_grace_time(
    start: Callable[[str], Sweep], cluster: Cluster, undisturbed: list[dict[str, Any]]
) -> None:
    """SLURM requeues at once, and sends two SIGTERM within milliseconds, and SIGKILL after KillWait."""
    sweep = start("now")
    sweep.wait_until_at_work()
    cluster.preempt()
    saved = sweep.wait_until_requeued()
    sweep.assert_ends_at(undisturbed)
    assert sweep.start_steps() == saved


def test_preempted_while_it_starts(
    start: Callable[[str], Sweep], cluster: Cluster, undisturbed: list[dict[str, Any]]
) -> None:
    """Python itself, or submitit, has the signal then."""
    sweep = start("low")
    sweep.let_go()
    wait_for(lambda: "RUNNING" in cluster.of_sweep().values(), cluster)
    cluster.preempt()
    sweep.assert_ends_at(undisturbed)


def test_the_time_limit(start: Callable[[str], Sweep], cluster: Cluster, undisturbed: list[dict[str, Any]]) -> None:
    """SIGUSR2 comes signal_delay_s before it, or half a minute sooner: here after 60 to 90 seconds."""
    sweep = start("low hydra.launcher.timeout_min=2 hydra.launcher.signal_delay_s=30")
    sweep.wait_until_at_work()
    saved = sweep.wait_until_requeued()
    assert "Caught signal SIGUSR2" in sweep.logs()
    sweep.assert_ends_at(undisturbed)
    assert sweep.start_steps() == saved


def test_requeued_by_a_person(
    start: Callable[[str], Sweep], cluster: Cluster, undisturbed: list[dict[str, Any]]
) -> None:
    sweep = start("low")
    sweep.wait_until_at_work()
    for job in cluster.of_sweep():
        cluster.ask("scontrol", "requeue", job)
    saved = sweep.wait_until_requeued()
    sweep.assert_ends_at(undisturbed)
    assert sweep.start_steps() == saved


def test_cancelled(start: Callable[[str], Sweep], cluster: Cluster, undisturbed: list[dict[str, Any]]) -> None:
    """scancel saves, and the job does not come back. The sweep waits for the other one, says so, and can go on."""
    sweep = start("low")
    sweep.wait_until_at_work()
    cluster.ask("scancel", min(cluster.of_sweep()))
    wait_for(lambda: len(cluster.of_sweep()) == 1, cluster)
    sweep.let_go()
    saved = sweep.saved()[0]
    assert saved == sweep.steps()[0]
    ended = sweep.end()
    assert ended.code == 1, ended.said
    assert (sweep.folder / "1" / "result.json").exists()
    screen = ended.said.splitlines()
    assert len(screen) == 5, ended.said
    assert "(state: CANCELLED)" in screen[1]
    assert screen[3] == f"catvae: not done: {sweep.folder}/0"
    assert "go on with the sweep by: " in screen[4]
    again = start("low")
    again.assert_ends_at(undisturbed)
    assert again.start_steps() == [saved, 0]


def test_a_partition_that_there_is_not(start: Callable[[str], Sweep]) -> None:
    ended = start("nope").end()
    assert ended.code == 2, ended.said
    assert "invalid partition specified: nope" in ended.err
    assert "Traceback" not in ended.said
    assert ended.err.splitlines()[-1].startswith("catvae: sbatch refused the jobs: ")


def test_a_node_that_vanishes(
    start: Callable[[str], Sweep], cluster: Cluster, undisturbed: list[dict[str, Any]]
) -> None:
    """What ran there starts again elsewhere, here when the node is back, from its last checkpoint."""
    sweep = start(f"low train.checkpoint_every={EVERY}")
    sweep.wait_until_at_work()
    wait_for(lambda: all(checkpoints.stored(sweep.folder / job)[-1].name > "step_00000000.pt" for job in "01"), cluster)
    saved = sweep.saved()
    cluster.kill_node()
    (node,) = cluster.ask("sinfo", "--noheader", "--format=%n").split()[:1]
    cluster.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=vanished")
    wait_for(lambda: set(cluster.of_sweep().values()) == {"PENDING"}, cluster)
    sweep.let_go()
    cluster.start_node()
    sweep.assert_ends_at(undisturbed)
    assert all(step % EVERY == 0 and step >= before for step, before in zip(sweep.start_steps(), saved, strict=True))
