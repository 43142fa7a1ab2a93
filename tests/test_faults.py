"""What goes wrong around a run: the disk, permissions, a second process. Each by the real command."""

from __future__ import annotations

import fcntl
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
from pathlib import Path
from unittest import mock

import pytest
import torch

from configs.wording import explain
from tests.runs import MLP, ROOT, checkpoint, curve, equal, resume, run
from training import checkpoints
from training.run_folder import LOCK

FEW = f"{MLP} train.steps=20 train.checkpoint_every=2 train.validate_every=2 "


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small disk with the given options, or skips."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"needs to mount a tmpfs: {done.stderr.strip()}")
        return place

    try:
        yield mount
    finally:
        if place.is_mount():
            subprocess.run(["umount", place], check=True)


def one_line(said: str) -> str:
    lines = [line for line in said.splitlines() if line.startswith("catvae: ")]
    assert len(lines) == 1
    assert "Traceback" not in said
    return lines[0]


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of FEW that had a disk with room."""
    folder = tmp_path_factory.mktemp("roomy") / "run"
    run(FEW, folder)
    return folder


@pytest.mark.parametrize("kilobytes", [100, 200, 300])
def test_full_disk(disk: Callable[[str], Path], roomy: Path, kilobytes: int) -> None:
    place = disk(f"size={kilobytes}k")
    ended = run(FEW, place / "run", code=1)
    said = one_line(ended.err)
    assert "No space left on device" in said
    assert f"resume={place / 'run'}" in said
    assert not list(place.rglob("*.partial"))
    assert "MB left, and a checkpoint takes" in ended.said
    left = checkpoint(place / "run")["step"]
    subprocess.run(["mount", "-o", "remount,size=20m", place], check=True)
    resume(place / "run")
    assert left < checkpoint(place / "run")["step"] == 20
    assert equal(checkpoint(place / "run"), checkpoint(roomy))


def test_disk_that_is_full_from_the_start(disk: Callable[[str], Path]) -> None:
    place = disk("size=24k")
    said = one_line(run(FEW, place / "run", code=1).err)
    assert "No space left on device" in said
    assert "start again" in said


def test_read_only_folder(disk: Callable[[str], Path]) -> None:
    place = disk("size=20m")
    run(FEW + "train.steps=4", place / "run")
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    for ended in (resume(place / "run", "train.steps=20", code=2), run(FEW, place / "new", code=2)):
        assert "Read-only file system" in one_line(ended.err)
    assert checkpoint(place / "run")["step"] == 4


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(FEW + "train.steps=4", folder)
    before = checkpoint(folder)
    with (folder / LOCK).open("r+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for written, holder in (("", "another process"), ("77 there", "process 77 on there"), ("rm -rf /", "another")):
            (folder / LOCK).write_text(written)
            said = one_line(resume(folder, "train.steps=6", code=2).err)
            assert f"{folder} is in use: {holder}" in said
    assert equal(checkpoint(folder), before)
    resume(folder, "train.steps=6")
    assert checkpoint(folder)["step"] == 6


@pytest.mark.parametrize("optimizer", ["adam", "sgd optimizer.momentum=0.9"])
def test_the_size_that_a_checkpoint_will_have(optimizer: str, tmp_path: Path) -> None:
    """The first one has no state of the optimizer yet, which makes it three times as large, or twice."""
    line = f"{MLP} model.hidden=100 optimizer={optimizer} train.steps=1 train.validate_every=1"
    with mock.patch("shutil.disk_usage", return_value=mock.Mock(free=10)):
        said = run(line, tmp_path / "run").said
    first, *_, last = (float(size) for size in re.findall(r"a checkpoint takes ([\d.]+) MB", said))
    assert first == pytest.approx(last, abs=0.15)
    assert last == pytest.approx(checkpoints.stored(tmp_path / "run")[-1].stat().st_size / 1e6, abs=0.06)


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    line = f"{FEW} train.steps=100000 hydra.run.dir={folder}"
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *shlex.split(line)],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        while len(checkpoints.stored(folder)) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        assert f"{folder} is in use" in one_line(resume(folder, code=2).err)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    state = checkpoints.load(folder, torch.device("cpu"))
    resume(folder, f"train.steps={state['step'] + 2}")
    assert checkpoint(folder)["step"] == state["step"] + 2


# ---- bad numbers ----

FLAWED = '''
import torch
from estimators.marginalization import Marginalization

FAILURES = []


class Flawed(Marginalization):
    """Gives a value that is not finite at step 5, `times` times."""

    def __init__(self, times):
        super().__init__()
        self.times = times

    def forward(self, f, logits, *, step, context, generator):
        estimate = super().forward(f, logits, step=step, context=context, generator=generator)
        if step == 5 and len(FAILURES) < self.times:
            FAILURES.append(step)
            estimate.value = estimate.value * float("inf")
        return estimate


class FailsAt(Marginalization):
    def __init__(self, at):
        super().__init__()
        self.at = at

    def forward(self, f, logits, *, step, context, generator):
        if step == self.at:
            {}["no such key"]
        return super().forward(f, logits, step=step, context=context, generator=generator)


class ReturnsNoneLater(Marginalization):
    def forward(self, f, logits, *, step, context, generator):
        if step < 4:
            return super().forward(f, logits, step=step, context=context, generator=generator)


class NotDeterministic(Marginalization):
    def forward(self, f, logits, *, step, context, generator):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
        return super().forward(f, logits, step=step, context=context, generator=generator)
'''


@pytest.fixture
def flawed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The start of a command line with an estimator that fails."""
    (tmp_path / "flawed_plugin.py").write_text(FLAWED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flawed_plugin", raising=False)
    return f"{FEW} estimator=sparsemax train.steps=8 train.checkpoint_every=2 estimator._target_=flawed_plugin."


def test_a_fault_of_ones_own_estimator_names_its_line(flawed: str, tmp_path: Path) -> None:
    said = one_line(run(f"{flawed}FailsAt +estimator.at=0", tmp_path / "first", code=2).err)
    assert re.search(r"got flawed_plugin.FailsAt: KeyError in \S+/flawed_plugin.py, line \d+: 'no such key'$", said)
    assert not (tmp_path / "first").exists()
    ended = run(f"{flawed}FailsAt +estimator.at=5", tmp_path / "later", code=1)
    assert re.search(r"^catvae: a fault in \S+/flawed_plugin.py, line \d+$", ended.err, re.MULTILINE)
    assert "KeyError: 'no such key'" in ended.err
    said = one_line(run(f"{flawed}ReturnsNoneLater", tmp_path / "none", code=2).err)
    assert said == "catvae: an estimator must return an Estimate, got a NoneType"


def test_the_way_on_in_a_folder_is_that_of_the_run_in_it(flawed: str, tmp_path: Path) -> None:
    run(f"{flawed}NotDeterministic", tmp_path / "run")
    said = one_line(run(FEW, tmp_path / "run", code=2).err)
    assert said.endswith(f"resume={tmp_path}/run --trust flawed_plugin")


def test_divergence_stops_by_default(flawed: str, tmp_path: Path) -> None:
    said = one_line(run(f"{flawed}Flawed +estimator.times=1", tmp_path / "run", code=3).err)
    assert said == "catvae: unlabelled_bound is -inf at step 5"
    assert checkpoint(tmp_path / "run")["step"] == 4


def test_rollback_goes_on_from_the_last_checkpoint_with_half_the_step(flawed: str, tmp_path: Path) -> None:
    ended = run(f"{flawed}Flawed +estimator.times=2 on_divergence=rollback", tmp_path / "run")
    assert ended.said.count("unlabelled_bound is -inf at step 5; back to step 4") == 2
    rates = curve(tmp_path / "run", "train/learning_rate")
    assert [step for step, _ in rates] == list(range(1, 9))
    assert [rate / rates[0][1] for _, rate in rates] == pytest.approx([1.0] * 4 + [0.25] * 4)
    assert checkpoint(tmp_path / "run")["rollbacks"] == 2
    assert json.loads((tmp_path / "run" / "result.json").read_text())["rollbacks"] == 2
    resume(tmp_path / "run", "train.steps=10 --trust flawed_plugin")
    assert curve(tmp_path / "run", "train/learning_rate")[-1][1] == pytest.approx(rates[0][1] / 4)


def test_rollback_is_tried_a_bounded_number_of_times(flawed: str, tmp_path: Path) -> None:
    ended = run(f"{flawed}Flawed +estimator.times=1000 on_divergence=rollback", tmp_path / "run", code=3)
    assert ended.said.count("back to step 4") == 5
    assert one_line(ended.err) == "catvae: unlabelled_bound is -inf at step 5"


@pytest.mark.parametrize(
    ("optimizer", "rate", "code"),
    [
        ("adam", 1e-30, 0),
        ("sgd", 1e-30, 0),
        ("adam", 1e3, 0),
        ("sgd", 1e3, 3),
        ("adam", 1e30, 3),
        ("sgd", 1e30, 3),
        ("adam", 1e38, 3),
        ("sgd", 1e38, 3),
    ],
)
def test_an_absurd_learning_rate_never_ends_in_a_silent_nan(
    tmp_path: Path, optimizer: str, rate: float, code: int
) -> None:
    """All that is kept is finite, and a run that diverged says where."""
    line = f"{FEW} train.steps=6 train.validate_every=100 optimizer={optimizer} optimizer.lr={rate}"
    ended = run(line, tmp_path / "run", code=code)
    assert (" at step " in one_line(ended.err)) if code else not ended.err
    for path in checkpoints.stored(tmp_path / "run"):
        for name, value in torch.load(path, weights_only=True)["model"].items():
            assert value.isfinite().all(), name


def test_an_operation_that_is_not_deterministic_is_named(flawed: str, tmp_path: Path) -> None:
    run(f"{flawed}NotDeterministic", tmp_path / "without")
    said = one_line(run(f"{flawed}NotDeterministic deterministic=true", tmp_path / "with", code=2).err)
    assert said == "catvae: deterministic must be false here: put_ does not have a deterministic implementation"


def test_deterministic_runs_train(tmp_path: Path, roomy: Path) -> None:
    run(f"{FEW} deterministic=true", tmp_path / "run")
    assert torch.are_deterministic_algorithms_enabled()
    run(f"{FEW} train.steps=1", tmp_path / "without")
    assert not torch.are_deterministic_algorithms_enabled()
    assert equal(checkpoint(tmp_path / "run"), checkpoint(roomy))


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as Lustre mounted without -o flock: trains, one after the other and in parallel, and says so once."""
    library = tmp_path / "library"
    library.mkdir()
    lock = "import fcntl, errno\ndef flock(file, operation): raise OSError(errno.ENOSYS, 'Function not implemented')\n"
    (library / "sitecustomize.py").write_text(f"{lock}fcntl.flock = flock\n")
    monkeypatch.setenv("PYTHONPATH", str(library))
    trainer, line = [sys.executable, str(ROOT / "train.py")], f"{FEW} train.steps=4".split()
    alone = subprocess.run([*trainer, *line, f"hydra.run.dir={tmp_path}/run"], capture_output=True, text=True, cwd=ROOT)
    parallel = ["seed=0,1", f"hydra.sweep.dir={tmp_path}/sweep", "hydra/launcher=joblib"]
    swept = subprocess.run([*trainer, "-m", *line, *parallel], capture_output=True, text=True, cwd=ROOT)
    assert alone.returncode == swept.returncode == 0, alone.stderr + swept.stderr
    assert "no locks (Function not implemented)" in one_line(alone.stderr)
    assert all((tmp_path / folder / "result.json").exists() for folder in ("run", "sweep/0", "sweep/1"))


def test_a_terminal_of_another_encoding(roomy: Path, tmp_path: Path) -> None:
    for encoding in ("latin-1", "ascii"):
        command = [sys.executable, "-m", "scripts.compare", str(roomy), "--output", str(tmp_path / encoding)]
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        ended = subprocess.run(command, capture_output=True, cwd=ROOT, env=environment)
        assert ended.returncode == 0, ended.stderr
        assert b"test accuracy" in ended.stdout


def test_a_machine_without_a_folder_for_temporary_files_trains(tmp_path: Path) -> None:
    # PyTorch's compiler looks for one unless a variable, which it sets itself for processes below, says where
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TORCH", "TRITON"))}
    command = [sys.executable, "-c", NO_TEMPORARY_FOLDER]
    environment["PYTHONPATH"] = str(ROOT)
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert ended.returncode == 0, ended.stderr
    none = FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")  # as somebody's own network may ask
    assert explain(none) == "no folder for temporary files can be written to (['/tmp']); set TMPDIR to one that can"


NO_TEMPORARY_FOLDER = """
import sys, tempfile
def none():
    raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp', '/var/tmp']")
tempfile._get_default_tempdir = none
sys.argv = ["train.py", "data=digits", "train.steps=1", "deterministic=true"]
import train
train.main()
"""


# ---- names, other people's folders, no log ----


@pytest.mark.parametrize("line", ["", "-m "])
def test_a_path_that_is_not_utf8_is_refused(line: str, tmp_path: Path) -> None:
    """TensorBoard's own error for it is a traceback after the folder was made."""
    foreign = tmp_path / os.fsdecode(b"caf\xe9")
    foreign.mkdir()
    done = train(line + FEW, foreign)
    assert done.returncode == 2
    assert "must be a folder whose path is in UTF-8" in one_line(done.stderr)
    assert not list(foreign.iterdir())


def test_an_argument_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    done = train(FEW + os.fsdecode(b"hydra.run.dir=caf\xe9"), tmp_path)
    assert done.returncode == 2
    assert "must be in UTF-8" in one_line(done.stderr)
    assert not list(tmp_path.iterdir())


def test_a_comparison_of_folders_with_names_of_another_encoding(roomy: Path, tmp_path: Path) -> None:
    shutil.copytree(roomy, tmp_path / os.fsdecode(b"caf\xe9"))
    done = script("compare .", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "caf" in (tmp_path / "compare" / "compare.html").read_text()


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("train.py", "hydra.run.dir=FOLDER"),
        ("train.py -m", "hydra.sweep.dir"),
        ("-m scripts.baselines data=digits --methods svm", "--output"),
    ],
)
def test_a_second_user_in_one_checkout_learns_where_else_to_write(line: str, key: str, tmp_path: Path) -> None:
    """Root without its privileges is anybody: a folder that nobody may write to stands for somebody else's."""
    (tmp_path / "outputs").mkdir(mode=0o555)
    anybody = ["setpriv", "--bounding-set=-dac_override,-fowner"] if os.getuid() == 0 else []
    command = [sys.executable, *line.replace("train.py", f"{ROOT}/train.py").split()]
    overrides = [] if "scripts" in line else FEW.split()
    done = subprocess.run([*anybody, *command, *overrides], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    said = one_line(done.stderr)
    assert key in said
    assert "Permission denied" in said


def test_what_ends_a_run_is_said_with_logging_off(tmp_path: Path) -> None:
    done = train(FEW + "hydra/job_logging=disabled optimizer=sgd optimizer.lr=1e30", tmp_path)
    assert done.returncode == 3
    assert "labelled_bound is" in one_line(done.stderr)
    assert not done.stdout


def test_scripts_run_from_any_folder(tmp_path: Path) -> None:
    """Also from one that has folders of the names of ours."""
    for name in ("scripts", "data", "models"):
        (tmp_path / name).mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for module in sorted((ROOT / "scripts").glob("*.py")):
        if "__main__" in module.read_text():
            done = script(f"{module.stem} --help", tmp_path, environment)
            assert done.returncode == 0, done.stderr


def train(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "train.py", *line.split()], cwd=cwd, capture_output=True, text=True)


def script(line: str, cwd: Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *f"scripts.{line}".split()]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
