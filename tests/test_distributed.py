"""One run of several processes has the numbers of one process, writes once, and stops whole.

The processes are forks of this one, which saves the seconds in which PyTorch is imported; the last test has torchrun.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

import train
from tests.runs import CONV, ESTIMATORS, MLP, ROOT, UNLABELLED, Ended, checkpoint, command, curve, resume, run
from training.distributed import Together
from training.update import Update

# Python 3.12 says that a fork has none of the threads, of which the children need none
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
fork = multiprocessing.get_context("fork")
STEPS = " train.steps=12 evaluation.test=false train.validate_every=6 train.pictures_every=0 "
Trouble = Callable[[], Any]  # what happens to a process, as long as it is entered


def signalled(number: int, at: int = 5) -> Any:
    """The process is sent a signal before a step."""
    work = Update.__call__

    def call(self: Update, step: int) -> Any:
        if step == at:
            os.kill(os.getpid(), number)
        return work(self, step)

    return mock.patch.object(Update, "__call__", call)


def bad_images(at: int = 5) -> Any:
    """The process's images are no numbers in a step."""
    own, calls = Together.own, iter(range(1000))

    def nan(self: Together, x: torch.Tensor, y: torch.Tensor) -> Any:
        x, y = own(self, x, y)
        return (x * torch.nan if next(calls) == at else x), y

    return mock.patch.object(Together, "own", nan)


def _work(rank: int, size: int, port: int, line: str, trouble: Trouble | None, tell: Any) -> None:
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {**store, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    with trouble() if trouble else nullcontext():
        tell.send(command(train.main, line))


def in_processes(line: str, size: int = 2, trouble: Trouble | None = None, of: int = 1) -> list[Ended | None]:
    """train.py in so many processes of one run, `trouble` in the process `of`; None for one that was killed."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # which torchrun has
    pipes = [fork.Pipe(duplex=False) for _ in range(size)]
    troubles = [trouble if rank == of else None for rank in range(size)]
    workers = [
        fork.Process(target=_work, args=(rank, size, store.port, line, troubles[rank], pipes[rank][1]))
        for rank in range(size)
    ]
    for worker in workers:
        worker.start()
    ended: list[Ended | None] = []
    for (receive, send), worker in zip(pipes, workers, strict=True):
        send.close()
        try:
            assert receive.poll(60), "the run hangs"
            ended.append(receive.recv())
        except EOFError:
            ended.append(None)
        finally:
            worker.kill()
    return ended


def codes(ended: list[Ended | None]) -> list[object]:
    return [one and one.code for one in ended]


def sentences(ended: list[Ended | None]) -> list[str]:
    return [line for one in ended if one for line in one.err.splitlines() if line.startswith("catvae: ")]


def assert_same_run(one: Path, several: Path, tolerance: float = 2e-6) -> None:
    """J at every step, and all that is trained: within the rounding of sums of float32 in another order."""
    a, b = curve(one, "train/J"), curve(several, "train/J")
    assert [step for step, _ in a] == [step for step, _ in b]
    torch.testing.assert_close([j for _, j in b], [j for _, j in a], rtol=1e-5, atol=0)
    before, after = checkpoint(one), checkpoint(several)
    for part in ("model", "estimator"):
        for name, expected in before[part].items():
            torch.testing.assert_close(after[part][name], expected, rtol=1e-4, atol=tolerance, msg=f"{part}: {name}")


# by SGD where a gradient is zero but for rounding, of which Adam makes whole steps: of a weight in the first step here
# (4e-8, where others have 2e-3), and of biases before batch normalisation
RUNS = {
    "sum_and_sample": MLP.replace("optimizer=adam", "optimizer=sgd") + ESTIMATORS["sum_and_sample"],
    "learned baseline": MLP + ESTIMATORS["score_function/learned"],
    "relax": MLP + ESTIMATORS["relax"],
    "gumbel_rao, two draws": MLP + "estimator=gumbel_rao estimator.num_samples=2 estimator.num_conditional=3",
    "batch norm, dropout, motion": CONV.replace("optimizer=adam", "optimizer=sgd")
    + "estimator=gumbel_softmax model.rotation=10 model.shift=0.1 model.distortion=0.5 "
    "diagnostics.every=6 diagnostics.draws=3",
    "two layers": UNLABELLED + "model=categorical_two_layers model.encoder=[] model.decoder=[5] model.between=[] "
    "estimator=score_function estimator/baseline=leave_one_out estimator.num_samples=2",
}


@pytest.mark.parametrize("line", RUNS.values(), ids=RUNS)
def test_two_processes_have_the_numbers_of_one(tmp_path: Path, line: str) -> None:
    run(line + STEPS, tmp_path / "one")
    ended = in_processes(f"{line}{STEPS} hydra.run.dir={tmp_path}/two")
    assert codes(ended) == [0, 0], ended
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_a_run_goes_on_with_two_processes_and_back(tmp_path: Path) -> None:
    """A signal to either stops both after the step in hand, the first time with a validation still to come."""
    line = MLP + ESTIMATORS["score_function/moving_average"] + STEPS
    run(line, tmp_path / "whole")
    run(line.replace("train.steps=12", "train.steps=3"), tmp_path / "halves")
    for of, at in ((0, 5), (1, 8)):
        trouble = partial(signalled, signal.SIGTERM, at)
        ended = in_processes(f"resume={tmp_path}/halves train.steps=12", trouble=trouble, of=of)
        assert codes(ended) == [143, 143], ended
        state = checkpoint(tmp_path / "halves")
        assert (state["step"], state["unlooked"]) == (at + 1, of == 0)
    assert codes(in_processes(f"resume={tmp_path}/halves", size=1)) == [0]
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    assert json.loads((tmp_path / "halves" / "result.json").read_text())["start_step"] == 9
    assert len(list((tmp_path / "halves").rglob("events.out.tfevents.*"))) == 4


def test_numbers_that_are_not_finite_stop_all_with_one_sentence(tmp_path: Path) -> None:
    line = f"{MLP}{ESTIMATORS['sum_and_sample']}{STEPS}hydra.run.dir={tmp_path}/run"
    ended = in_processes(line, trouble=bad_images)
    assert codes(ended) == [3, 1]
    (sentence,) = sentences(ended[:1])
    assert "is nan at step 5" in sentence
    assert sentences(ended) == [sentence]


def test_all_go_back_to_a_checkpoint_together(tmp_path: Path) -> None:
    line = f"{MLP}{ESTIMATORS['sum_and_sample']}{STEPS}on_divergence=rollback hydra.run.dir={tmp_path}/run"
    ended = in_processes(line, trouble=bad_images)
    assert codes(ended) == [0, 0], ended
    assert json.loads((tmp_path / "run" / "result.json").read_text())["rollbacks"] == 1


def test_a_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    line = f"{MLP}{ESTIMATORS['sum_and_sample']}{STEPS}hydra.run.dir={tmp_path}/run"
    assert codes(in_processes(line)) == [0, 0]
    before = (tmp_path / "run" / "result.json").read_bytes()
    ended = in_processes(f"resume={tmp_path}/run")
    assert codes(ended) == [0, 0], ended
    assert not sentences(ended)
    assert (tmp_path / "run" / "result.json").read_bytes() == before


def test_a_killed_process_ends_all_with_one_sentence(tmp_path: Path) -> None:
    line = f"{MLP}{ESTIMATORS['sum_and_sample']}{STEPS}hydra.run.dir={tmp_path}/run"
    line = line.replace("size_labelled=10", "size_labelled=12").replace("size_unlabelled=10", "size_unlabelled=12")
    ended = in_processes(line, size=3, trouble=partial(signalled, signal.SIGKILL))
    assert codes(ended) == [1, None, 1]
    (sentence,) = sentences(ended)
    assert "another process of this run has ended" in sentence
    resume(tmp_path / "run")


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ("train.batch_size_labelled=9", "train.batch_size_labelled must be divisible by the 2 processes that share it"),
        ("-m seed=1,2", "-m must be left out under torchrun"),
        ("estimator=no", "estimator"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_by_the_first(tmp_path: Path, changed: str, sentence: str) -> None:
    ended = in_processes(f"{changed} data=digits hydra.run.dir={tmp_path}/run")
    assert codes(ended) == [2, 0]  # there was nothing to do
    assert sentence in "".join(sentences(ended))
    assert len(sentences(ended)) == 1
    assert not list(tmp_path.iterdir())


def test_torchrun(tmp_path: Path) -> None:
    """As a person starts it: one folder, one log, and nothing but the first process's lines."""
    line = f"{MLP}{ESTIMATORS['sum_and_sample']}{STEPS.replace('12', '3')}hydra.run.dir={tmp_path}/run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    ended = subprocess.run([*torchrun, *line.split()], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.count("50 labelled") == 1, ended.stdout
    assert (tmp_path / "run" / "train.log").read_text().count("50 labelled") == 1
    assert len(list((tmp_path / "run").rglob("events.out.tfevents.*"))) == 1
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 3
