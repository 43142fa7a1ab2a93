"""Runs of the commands in this process, each as a new process would see it, and what they leave behind."""

from __future__ import annotations

import contextlib
import io
import logging.config
import os
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

import train
from training import checkpoints
from training.process import threads_kept
from training.run_folder import events_folder

ROOT = Path(train.__file__).parent
# says all that has to do with the numbers, so that another default changes no golden run
SMALL = (
    "data=digits data.num_labelled=50 data.num_validation=200 data.labelled_in_unlabelled=true "
    "data.binarization=dynamic model.latent_size=2 model.scale=softplus "
    "estimator=sum_and_sample optimizer=adam optimizer.lr=3e-3 lr_factor=constant "
    "likelihood=bernoulli prior=uniform "
    "objective=semi_supervised objective.labelled=1 objective.unlabelled=1 objective.alpha=1 "
    "objective.labels_first=0 "
    "train.batch_size_labelled=10 train.batch_size_unlabelled=10 device=cpu precision=fp32 "
    "train.log_every=1 train.validate_every=6 train.checkpoint_every=4 evaluation.importance_samples=2 "
)
# without dropout: some PyTorch builds draw its masks differently on other makes of CPU, see tests.golden
MLP = SMALL + "model=mlp model.hidden=16 model.dropout=0 model.rotation=0 model.shift=0 "
CONV = SMALL + "model=conv model.channels=2 model.hidden=8 model.dropout=0.5 model.rotation=0 model.shift=0 "
SLOWLY = "schedule@estimator.temperature=exponential estimator.temperature.minimum=0.5 "
ANNEALED = f" {SLOWLY}estimator.temperature.rate=0.05 estimator.temperature.every=4"
STEADY = " schedule@estimator.temperature=constant estimator.temperature.value="
ONE = " estimator.num_samples=1"
SCORE = "estimator=score_function estimator/baseline="
CONTROL = ONE + " estimator.temperature=0.5 estimator.scale=1.0"
ESTIMATORS = {
    "marginalization": "estimator=marginalization",
    "gumbel_softmax": "estimator=gumbel_softmax estimator.kl=analytic" + ONE + ANNEALED,
    "st_gumbel_softmax": "estimator=st_gumbel_softmax estimator.kl=analytic" + ONE + ANNEALED,
    "concrete": "estimator=concrete estimator.kl=relaxed" + ONE + STEADY + "0.7 estimator.prior_temperature=0.4",
    "straight_through": "estimator=straight_through" + ONE + STEADY + "1.0",
    "reinmax": "estimator=reinmax" + ONE + STEADY + "1.0",
    "reinmax_rao": "estimator=reinmax_rao estimator.num_conditional=10" + ONE + STEADY + "1.0",
    "reinmax_cv": "estimator=reinmax_cv estimator.num_conditional=10 estimator.eta=0.5" + ONE + STEADY + "1.0",
    "gumbel_rao": "estimator=gumbel_rao estimator.num_conditional=10" + ONE + ANNEALED,
    "gapped_straight_through": "estimator=gapped_straight_through estimator.gap=1.0" + ONE + ANNEALED,
    "sum_and_sample": "estimator=sum_and_sample estimator.num_exact=1",
    "unordered_set": "estimator=unordered_set estimator.num_samples=2",
    "indecater": "estimator=indecater",
    "sparsemax": "estimator=sparsemax",
    "muprop": "estimator=muprop" + ONE,
    "rebar": "estimator=rebar" + CONTROL,
    "relax": "estimator=relax estimator.hidden=10" + CONTROL,
    "score_function/none": SCORE + "none" + ONE,
    "score_function/moving_average": SCORE + "moving_average estimator.baseline.decay=0.99" + ONE,
    "score_function/learned": SCORE + "learned estimator.baseline.hidden=10 estimator.baseline.decay=0.99" + ONE,
    "score_function/leave_one_out": SCORE + "leave_one_out estimator.num_samples=2",
    "vimco": "estimator=vimco estimator.num_samples=3",
}
# of each family without labels
UNLABELLED = "data=digits data.num_validation=200 data.binarization=fixed model.activation=tanh optimizer=adam "
UNLABELLED += "optimizer.lr=1e-2 lr_factor=constant likelihood=bernoulli objective=unsupervised objective.unlabelled=1 "
UNLABELLED += "train.batch_size_unlabelled=10 device=cpu precision=fp32 train.log_every=1 train.validate_every=6 "
UNLABELLED += "train.checkpoint_every=4 evaluation.importance_samples=2 evaluation.validation_samples=0 "
UNLABELLED += "model.variables=3 model.classes=4 "
FAMILIES = {
    "categorical_mlp": UNLABELLED + "model=categorical_mlp model.encoder=[6] model.decoder=[5] model.prior=learned "
    "estimator=score_function estimator/baseline=leave_one_out estimator.num_samples=2",
    "categorical_two_layers": UNLABELLED + "model=categorical_two_layers model.upper_variables=2 model.encoder=[] "
    "model.decoder=[5] model.between=[] model.prior=learned estimator=gumbel_softmax estimator.kl=sampled"
    + ONE
    + ANNEALED,
    "structured_mlp": UNLABELLED
    + "model=structured_mlp model.layers=2 model.encoder=[] model.between=[] model.decoder=[] "
    "estimator=reinmax" + ONE + STEADY + "1.0",
    "auxiliary_mlp": SMALL
    + "model=auxiliary_mlp model.auxiliary_size=3 model.hidden=16 model.hidden_layers=2 model.dropout=0 "
    "model.skip=false model.rotation=0 model.shift=0",
    "auxiliary_skip": SMALL
    + "model=auxiliary_mlp model.auxiliary_size=3 model.hidden=16 model.hidden_layers=2 model.dropout=0 "
    "model.skip=true model.rotation=0 model.shift=0",
    "several_samples": UNLABELLED + "model=categorical_mlp model.encoder=[] model.decoder=[] model.prior=uniform "
    "estimator=vimco objective.samples=3",
}
STEPS = 12


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it said."""

    code: object
    out: str
    err: str

    @property
    def said(self) -> str:
        return self.out + self.err


def command(main: Callable[[], object], line: str) -> Ended:
    """`main` with the arguments `line`, in the state that a new process would have."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ),
        mock.patch.object(sys, "argv", ["command", *shlex.split(line)]),
        mock.patch.object(threading, "excepthook", threading.excepthook),
        # events are read in the order of their files' names, which have a second, a process and this number in them
        mock.patch.object(event_file_writer, "_global_uid", mock.Mock(get=event_files.__next__)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        threads_kept(),
    ):
        code: object = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        finally:
            GlobalHydra.instance().clear()
            HydraConfig.instance().cfg = None
            fresh = {"level": "WARNING", "handlers": []}
            logging.config.dictConfig({"version": 1, "disable_existing_loggers": False, "root": fresh})
    return Ended(code, out.getvalue(), err.getvalue())


event_files = count(10_000)


def run(line: str, folder: Path, *, code: int = 0) -> Ended:
    """train.py with the arguments `line`, into `folder`, which must end with `code`."""
    to_folder = shlex.quote(f"hydra.run.dir='{folder}'")
    ended = command(train.main, f"{line} {to_folder}")
    assert ended.code == code, ended.said
    return ended


def resume(folder: Path, line: str = "", *, code: int = 0) -> Ended:
    ended = command(train.main, f"{shlex.quote(f'resume={folder}')} {line}")
    assert ended.code == code, ended.said
    return ended


def checkpoint(folder: Path) -> dict[str, Any]:
    """The newest checkpoint, without the configuration and the command line."""
    state = torch.load(checkpoints.stored(folder)[-1], weights_only=True)
    del state["config"], state["asked"]
    return dict(state)


def equal(a: Any, b: Any) -> bool:
    """Whether two nested containers are equal, tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def events(folder: Path) -> EventAccumulator:
    """What TensorBoard shows of a run folder, all of it."""
    kinds = ("scalars", "images", "tensors", "histograms", "compressedHistograms")
    read = EventAccumulator(str(events_folder(folder) or folder), size_guidance=dict.fromkeys(kinds, 0))
    read.Reload()
    return read


@contextlib.contextmanager
def on_path(folder: Path, module: str, source: str) -> Iterator[None]:
    """Puts a module of somebody's own where this process, and those that it starts, find it."""
    (folder / f"{module}.py").write_text(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) of a scalar, as TensorBoard shows it."""
    return [(event.step, event.value) for event in events(folder).Scalars(tag)]


def assert_same_events(whole: Path, halves: Path) -> None:
    """The curves of a run that never stopped: nothing missing, nothing twice; but the test part of each end."""
    one, other = events(whole), events(halves)
    assert one.Tags()["scalars"] == other.Tags()["scalars"]
    for tag in one.Tags()["scalars"]:
        a, b = ([(event.step, event.value) for event in read.Scalars(tag)] for read in (one, other))
        if tag == "train/steps_per_second":
            a, b = [(step, 0) for step, _ in a], [(step, 0) for step, _ in b]
        assert a == (b[-1:] if tag.startswith("test/") else b), tag
        assert len({step for step, _ in b}) == len(b), tag
    for tag in one.Tags()["images"]:
        a_images, b_images = ([(e.step, e.encoded_image_string) for e in read.Images(tag)] for read in (one, other))
        assert a_images == b_images
