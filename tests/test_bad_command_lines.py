"""Command lines that must be refused in one sentence, before any work, and some that must not be."""

from __future__ import annotations

import logging.config
import os
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

import train
from configs.check import typed
from configs.schema import Config, ConfigError
from data.facts import DataError
from scripts import benchmark, compare, evaluate, generate, gradient_quality, show_relaxation
from scripts.command import composed
from tests.runs import command
from training import before_work
from training.checkpoints import NEEDED, save
from training.resume import resume_arguments
from training.state import plain

ROOT = Path(train.__file__).parent

TOO_LONG = "x" * 300
GUMBEL = "estimator=gumbel_softmax"
EXPONENTIAL = f"{GUMBEL} schedule@estimator.temperature=exponential"
# command line; what the sentence must contain: the key, the value, what is allowed
BAD = [
    # keys that nothing reads
    ("train.lrr=1", "train.lrr=1 is not a key", "train has steps", "did you mean optimizer.lr?"),
    ("trian.steps=1", "trian.steps=1 is not a key", "did you mean train.steps?"),
    ("foo=1", "foo=1 is not a key", "the configuration has data, model, estimator"),
    (f"{GUMBEL} estimator.num_sample=3", "estimator.num_sample=3 is not a key", "did you mean estimator.num_samples?"),
    ("objective=supervised_only evaluation.classify_by=both", "must be classifier where J has no bound", "got both"),
    ("evaluation.classify_by=z", "evaluation.classify_by", "classifier, bound, both", "got z"),
    ("evaluation.pixel_draws=0", "evaluation.pixel_draws must be >= 1, got 0"),
    ("data.binarization=threshold evaluation.pixel_draws=4", "evaluation.pixel_draws must be 1", "draws no pixels"),
    ("optimizer=adam optimizer.lrr=1", "optimizer.lrr=1 is not a key", "did you mean optimizer.lr?"),
    ("data.nope.x=1", "data.nope.x=1 is not a key", "data has name"),
    ("+train.lrr=3", "train.lrr=3 is not a key", "did you mean optimizer.lr?"),
    ("++x.y=1", "x={y: 1} is not a key", "the configuration has data"),
    ("optimizer.learning_rate=1", "optimizer.learning_rate=1 is not a key", "did you mean optimizer.lr?"),
    ("train.epochs=1", "train.epochs=1 is not a key", "did you mean train.steps?"),
    (
        f"{EXPONENTIAL} estimator.temperature.end=1",
        "(estimator.temperature has _target_, _partial_, rate, minimum, every)\n",
    ),
    (
        "estimator=relax estimator/baseline=learned",
        "has estimator/baseline; of the estimators muprop, score_function have",
    ),
    (
        "estimator=rebar schedule@estimator.temperature=cosine",
        "no group in use has schedule@estimator.temperature; of the estimators concrete, gapped_straight_through",
    ),
    ("estimator=table_control", "got table_control; --config-dir DIR finds one of your own\n"),
    (f"{GUMBEL} +estimator.foo=1", "estimator.foo=1 is not a key", "GumbelSoftmax has temperature, num_samples"),
    ("+objective.beta=1", "objective.beta=1 is not a key", "objective has labelled, unlabelled, alpha"),
    ("hydra.nope=1", "hydra.nope=1 is not a key", "hydra has run, sweep"),
    ("~nope", "nope is not a key", "~nope"),
    # what is no key=value at all
    ("=3", "key=value", "got =3"),
    ("data", "key=value or group=choice", "got data"),
    ("estimator=a=b", "key=value", "got estimator=a=b"),
    ("train.steps=[1,", "key=value", "got train.steps=[1,"),
    ("-m train.steps=[1,", "key=value", "got train.steps=[1,"),
    ("seed=1,2", "seed=1,2", "-m"),
    ("--resolve", "--resolve"),
    ("data=digits --estimator rebar", "--estimator is not an option: settings are given as key=value"),
    ("--lr=1e-3", "--lr is not an option"),
    # places that do not exist
    ("--config-dir nonexistent", "--config-dir must be a folder", "nonexistent"),
    ("--config-name nope", "--config-name must name a configuration file", "nope"),
    ("resume=nonexistent", "resume must be a run folder", "nonexistent"),
    # places that cannot be used, where some of what they need can be made
    ("data=digits hydra.run.dir=RUN/.hydra/overrides.yaml/x", "overrides.yaml/x", "Not a directory"),
    (f"data=digits hydra.run.dir=new/{TOO_LONG}/run", TOO_LONG, "File name too long"),
    (f"-m data=digits seed=1,2 hydra.sweep.dir=new/{TOO_LONG}", "hydra.sweep.dir cannot be used", TOO_LONG),
    (
        """data=mnist "data.root='~nobody-at-all/x'" """,
        "data.root must be a folder, got ~nobody-at-all/x",
        "set data.root or",
    ),
    ("""resume="'~nobody-at-all/x'" """, "resume must be a run folder, got"),
    ("data=mnist data.root=new/root", "data=mnist is not in new/root and could not be downloaded"),
    ("-m data=mnist data.root=new/root seed=1,2", "data=mnist is not in new/root", "(in the job "),
    ("data=digits hydra.run.dir=DONE", "hydra.run.dir must be without a run", "which has the result.json of one"),
    ("data=digits hydra.run.dir=RUN", "hydra.run.dir must be without a run", "resume=", "/RUN\n"),
    ("data=digits estimator.temprature.start=2", "estimator.temprature.start=2 is not a key", "_target_, num_exact)\n"),
    (
        "estimator=gumbel_sotfmax",
        "estimator must be one of concrete, ",
        "got gumbel_sotfmax; did you mean gumbel_softmax?",
    ),
    ("optimiser.lr=1", "optimiser.lr=1 is not a key", "did you mean optimizer.lr?"),
    ("-m data=digits seed=1,2 hydra.job.chdir=true", "hydra.job.chdir must be false in a sweep", "got true"),
    ("data=mnist data.root=../mnist hydra.job.chdir=true", "data.root must be an absolute path with", "got ../mnist"),
    ("-m data=digits seed=1 hydra.sweep.dir=RUN hydra.sweep.subdir=.", "must be new", "seed=1 (was 0)"),
    ("-m data=digits seed=1,2 hydra.sweep.subdir=.", "hydra.sweep.subdir must give every job a folder of its own"),
    (
        "-m data=digits seed=0,1 estimator=rebar,relax hydra.sweep.dir=RUN 'hydra.sweep.subdir=${seed}'",
        *("hydra.sweep.subdir must", "RUN/0 for job 0 (", "seed=0 estimator=rebar", ") and job 1 (", "hydra:job.num"),
    ),
    ("-m data=digits data.split_seed=0,1 'hydra.sweep.subdir=${seed}'", "hydra.sweep.subdir must", "job 1"),
    ("-m data=digits seed=0,1 'hydra.sweep.subdir=a/${data.split_seed}'", "hydra.sweep.subdir must", "a/0 for job 0"),
    ("-m data=digits estimator.num_exact=1,1 hydra.sweep.subdir=x", "hydra.sweep.subdir must"),
    (
        "data=arrays data.path=/x/a,b.npz",
        *("data.path=/x/a,b.npz has a comma", "which separates values", """'data.path='"'"'/x/a,b.npz'"'"''"""),
    ),
    ("data=digits hydra.run.dir=/x/lr=1", """write it in quotes: 'hydra.run.dir='"'"'/x/lr=1'"'"''"""),
    ("data=digits seed=1,2", "seed=1,2 is several values; add -m"),
    (
        "-m data=digits seed=0,1 'hydra.sweep.subdir=${hydra:job.override_dirname}' "
        "hydra.job.config.override_dirname.exclude_keys=[seed]",
        "hydra.sweep.subdir must",
    ),
    ("-m data=digits hydra/sweeper=optuna model=mlp,conv 'hydra.sweep.subdir=${seed}'", "hydra.sweep.subdir must"),
    # groups and sections
    ("data=nope", "data must be one of arrays, digits, fashion_mnist, kmnist, mnist", "got nope"),
    ("estimator=nope", "estimator must be one of", "marginalization", "got nope"),
    ("estimator=[a,b]", "estimator must be the name of a choice", "got b"),
    ("estimator=null", "estimator must be the name of a choice", "got null"),
    ("data=null", "data must be the name of a choice", "got null"),
    ("model=3", "model must be the name of a choice", "got 3"),
    (f"{GUMBEL} schedule@estimator.temperature=nope", "schedule must be one of constant, cosine", "got nope"),
    (f"{GUMBEL} schedule=constant", "schedule=constant", "did you mean schedule@estimator.temperature?"),
    (f"{GUMBEL} estimator/baseline=none", "estimator/baseline=none", "no group in use has estimator/baseline"),
    ("estimator=score_function estimator/baseline=nope", "estimator/baseline must be one of", "got nope"),
    ("estimator=score_function estimator.baseline=none", "estimator.baseline", "got none", "estimator/baseline="),
    (
        f"{GUMBEL} estimator.temperature=0.5",
        "estimator.temperature must be a schedule",
        "schedule@estimator.temperature=",
    ),
    ("+data=digits", "data must be given without +", "+data=digits"),
    ("+train.steps=3", "train.steps=3 must be given without +"),
    ("~train", "train must be a section with the keys steps", "got nothing"),
    ("~train.steps", "train.steps must be an integer", "got ~train.steps"),
    ("train=5", "train must be a section with the keys steps", "got 5"),
    # types
    ("train.steps=1.5", "train.steps must be an integer", "got 1.5"),
    ("train.steps=null", "train.steps must be an integer", "got null"),
    (
        "experiment=best_structured data.num_validation=100 estimator=muprop",
        "estimator.temperature={end: 1.0} is not a key",
        "experiment=best_structured sets it, and ~estimator.temperature leaves it out",
    ),
    (
        "model.distortion=1 train.steps=10 objective.labels_first=2 objective.distortion_fades=9",
        "objective.distortion_fades must be <= the 8 steps that objective.labels_first=2 leaves of train.steps, got 9",
    ),
    ("objective.labels_first=-1", "objective.labels_first must be >= 0", "got -1"),
    ("train.steps=9 objective.labels_first=5", "objective.labels_first must be <= half of train.steps, 9", "got 5"),
    (
        "objective.alpha=0 objective.labels_first=5",
        "objective.labels_first must be 0 where objective.alpha is 0",
        "got 5",
    ),
    (
        "objective=supervised_only objective.labels_first=5",
        "objective.labels_first must be 0 where objective.unlabelled is 0",
        "got 5",
    ),
    ("objective.distortion_fades=0", "objective.distortion_fades must be null or >= 1", "got 0"),
    (
        "objective.distortion_fades=5",
        "objective.distortion_fades must be null where model.distortion is 0",
        "got 5",
    ),
    ("train.clip_gradient=0", "train.clip_gradient must be null, or > 0 and finite", "got 0"),
    ("train.clip_gradient=inf", "train.clip_gradient must be null, or > 0 and finite", "got inf"),
    ("train.clip_gradient=yes", "train.clip_gradient must be a number", "got"),
    ("train.steps='???'", "train.steps must be an integer", "got nothing"),
    ("train.steps='${nope}'", "train.steps", "'nope' not found"),
    ("seed=x", "seed must be an integer", "got x"),
    ("optimizer.lr=abc", "optimizer.lr must be a number", "got abc"),
    ("optimizer=adam optimizer.betas=3", "optimizer.betas must be [a number, a number]", "got 3"),
    ("optimizer=adam optimizer.betas=[0.9]", "optimizer.betas must be [a number, a number]", "got [0.9]"),
    (f"{GUMBEL} estimator.num_samples=two", "estimator.num_samples must be an integer", "got two"),
    ("data.labelled_in_unlabelled=maybe", "data.labelled_in_unlabelled must be true or false", "got maybe"),
    # choices
    ("precision=fp8", "precision must be one of auto, fp32, bf16", "got fp8"),
    ("device=tpu", "device must be one of auto, cpu, cuda, or a GPU such as cuda:1", "got tpu"),
    ("device=cuda", "device must be auto or cpu", "got cuda"),
    ("device=cuda:1", "device must be auto or cpu", "got cuda:1"),
    ("device=cuda:", "device must be one of auto, cpu, cuda", "got cuda:"),
    ("model=mlp model.scale=relu", "model.scale must be one of softplus, exp", "got relu"),
    (f"{GUMBEL} estimator.kl=exact", "estimator.kl must be one of analytic, sampled, relaxed", "got exact"),
    ("data.name=cifar", "data.name must be one of mnist", "got cifar"),
    ("data=mnist data.path=mine.npz", "data.path is read by data=arrays alone", "got mine.npz with data=mnist"),
    ("data=arrays", "data=arrays needs data.path, an .npz file", "got nothing"),
    ("data.binarization=always", "data.binarization must be one of dynamic, fixed, threshold, none", "got always"),
    ("likelihood=poisson", "likelihood must be one of auto, bernoulli, continuous_bernoulli, gaussian", "got poisson"),
    ("likelihood=gaussian", "likelihood must be bernoulli (or auto) where data.binarization=dynamic", "got gaussian"),
    (
        "data.binarization=fixed likelihood=gaussian",
        "where data.binarization=fixed makes pixels 0 or 1",
        "got gaussian",
    ),
    (
        "data.binarization=threshold likelihood=discretized_logistic",
        "data.binarization=none keeps the grey levels",
        "got discretized_logistic",
    ),
    ("prior=equal", "prior must be uniform, labelled or a list of 10 positive numbers that sum to 1", "got equal"),
    ("prior=[0.5,0.5]", "prior must be uniform, labelled or a list of 10 positive numbers", "got [0.5, 0.5]"),
    # limits
    ("seed=-1", "seed must be >= 0", "got -1"),
    ("seed=18446744073709551616", "seed must be >= 0 and < 2**64", "got 18446744073709551616"),
    ("objective.alpha=-1", "objective.alpha must be >= 0 and finite", "got -1"),
    ("objective.alpha=nan", "objective.alpha must be >= 0 and finite", "got nan"),
    ("objective.alpha=inf", "objective.alpha must be >= 0 and finite", "got inf"),
    ("optimizer.lr=0", "optimizer.lr must be > 0 and finite", "got 0"),
    ("optimizer.lr=nan", "optimizer.lr must be > 0 and finite", "got nan"),
    ("optimizer=adam optimizer.betas=[2,0.9]", "optimizer.betas must be numbers in [0, 1)", "got [2, 0.9]"),
    ("optimizer=sgd optimizer.momentum=-1", "optimizer.momentum must be >= 0 and finite", "got -1"),
    ("optimizer=sgd optimizer.momentum=0 +optimizer.nesterov=true", "Nesterov", "optimizer.momentum=0"),
    (
        "optimizer=adam optimizer.fused=true +optimizer.foreach=true",
        "optimizer cannot be built",
        "optimizer.foreach=true",
    ),
    ("model=mlp model.latent_size=0", "model.latent_size must be >= 1", "got 0"),
    ("model=mlp model.hidden=-3", "model.hidden must be >= 1", "got -3"),
    ("model=mlp model.dropout=1", "model.dropout must be in [0, 1)", "got 1"),
    (f"{GUMBEL} estimator.num_samples=0", "estimator.num_samples must be >= 1", "got 0"),
    (f"{GUMBEL} estimator.prior_temperature=-1", "estimator.prior_temperature must be > 0 and finite", "got -1"),
    (f"{EXPONENTIAL} estimator.temperature.minimum=0", "estimator.temperature.minimum must be > 0 and finite", "got 0"),
    (f"{EXPONENTIAL} estimator.temperature.rate=-1", "estimator.temperature.rate must be >= 0 and finite", "got -1"),
    (f"{EXPONENTIAL} estimator.temperature.every=0", "estimator.temperature.every must be >= 1", "got 0"),
    (f"{EXPONENTIAL} ~estimator.temperature.rate", "estimator.temperature.rate must be given"),
    (
        "estimator=score_function estimator/baseline=leave_one_out estimator.num_samples=1",
        "estimator.num_samples must be >= 2",
        "got 1",
    ),
    ("train.batch_size_unlabelled=0", "train.batch_size_unlabelled must be >= 1", "got 0"),
    (
        "data=mnist train.batch_size_labelled=0",
        "train.batch_size_labelled must be >= 1 with a model that learns from labels",
        "got 0",
    ),
    ("data=digits model=mlp train.batch_size_labelled=0", "train.batch_size_labelled must be >= 1", "got 0"),
    ("train.batch_size_labelled=-1", "train.batch_size_labelled must be >= 0", "got -1"),
    ("train.log_every=0", "train.log_every must be >= 1", "got 0"),
    ("evaluation.importance_samples=0", "evaluation.importance_samples must be >= 1", "got 0"),
    ("data.split_seed=-1", "data.split_seed must be >= 0", "got -1"),
    (
        "data=mnist data.num_labelled=7",
        "data.num_labelled must be all, or a positive multiple of the 10 classes",
        "got 7",
    ),
    (
        "data=mnist data.num_labelled=0",
        "data.num_labelled must be all, or a positive multiple of the 10 classes",
        "got 0",
    ),
    (
        "data=digits model=mlp data.num_labelled=0 train.batch_size_labelled=0",
        "data.num_labelled must be all, or a positive multiple of the 10 classes",
        "got 0; possible are at most data.num_labelled=1230 (data.balanced=false: 1237) with data.num_validation=200",
    ),
    (
        "data=digits data.num_labelled=0 train.batch_size_labelled=0 prior=labelled",
        "prior must be uniform where data.num_labelled=0 leaves no label to count",
        "got labelled",
    ),
    (
        "data=digits data.num_labelled=0 train.batch_size_labelled=0 data.num_validation=1437",
        "got 0 + 1437; possible are at most data.num_validation=1436 with data.num_labelled=0",
    ),
    ("data=mnist data.num_labelled=[1]", "data.num_labelled must be all, or a positive multiple", "got [1]"),
    ("data=mnist data.num_labelled=null", "data.num_labelled must be all, or a positive multiple", "got null"),
    ("data=mnist data.num_labelled='???'", "data.num_labelled must be given", "got nothing"),
    ("data=mnist data.num_labelled=some", "data.num_labelled must be all, or a positive multiple", "got some"),
    (
        "data=mnist data.num_labelled=100000",
        "must fit into the 60000 training images",
        "got 100000 + 10000; possible are at most data.num_labelled=50000 with data.num_validation=10000",
    ),
    (
        "data=digits data.balanced=false data.num_labelled=9",
        "data.num_labelled must be all, or at least the 10",
        "got 9",
    ),
    (
        "data=digits data.num_validation=-1",
        "data.num_validation must be a number of images, a fraction below 1",
        "got -1",
    ),
    ("data=digits data.num_validation=1.0", "data.num_validation must be a number of images, a fraction", "got 1.0"),
    ("data=digits data.num_validation=all", "data.num_validation must be a number of images, a fraction", "got all"),
    ("data=digits data.num_test=0", "data.num_test is read by data=arrays alone", "got 0 with data=digits"),
    ("data=digits data.resize=8x8", "data.resize is read by data=arrays alone", "got 8x8 with data=digits"),
    (
        "data=digits data.num_labelled=all data.num_validation=0 data.labelled_in_unlabelled=false",
        "data.labelled_in_unlabelled must be true when no other training image is left",
        "got false",
    ),
    (
        "data=mnist data.num_labelled=100 data.num_validation=60000",
        "data.num_validation",
        "the 60000 training images",
        "got 100 + 60000",
    ),
    (
        "data=digits data.num_labelled=1330 data.num_validation=100",
        "must fit into the 1437 training images",
        "of 9), got 1330 + 100; possible are at most data.num_labelled=",
    ),
    # classes
    ("model._target_=nope.Nope", "model._target_ must be an importable class or function", "got nope.Nope"),
    (
        "model=mlp model.latent_size=8 model._target_=os.getcwd",
        "model.latent_size=8 is not a key",
        "os.getcwd has none",
    ),
    (f"{GUMBEL} estimator._target_=torch.nn.Linear", "is not a key", "torch.nn.Linear has in_features"),
    ("estimator=sparsemax estimator._target_=torch.nn.Identity", "estimator._target_ must make an estimator"),
    ("lr_factor=constant lr_factor._target_=torch.nn.Identity", "lr_factor._target_ must make a schedule", "number"),
    ("lr_factor=[1.5]", "lr_factor must be the name of a choice", "got [1.5]"),
    (
        "optimizer=sgd optimizer._target_=torch.optim.LBFGS "
        "~optimizer.momentum ~optimizer.weight_decay ~optimizer.fused",
        "optimizer must be able to take a step",
        "closure",
    ),
    ("estimator=sparsemax estimator._target_=builtins.dict", "estimator._target_", "got builtins.dict"),
    # sweeps: no job is started
    ("-m seed=1,-2", "seed must be >= 0", "got -2", "(in the job seed=-2)"),
    ("objective.alpha=1,-1 -m", "objective.alpha must be >= 0", "(in the job objective.alpha=-1)"),
    ("-m estimator=gumbel_softmax,nope", "estimator must be one of", "got nope", "(in the job estimator=nope)"),
    ("-m data=digits train.batch_size_labelled=10,0", "train.batch_size_labelled must be >= 1", "(in the job "),
    ("-m data=digits data.num_labelled=50,0", "got 0; possible are at most", "(in the job "),
    ("-m seed=1,2 train.steps=0", "train.steps must be >= 1", "(in the job seed=1 train.steps=0)"),
    ("-m +train.lrr=1,2", "train.lrr=1 is not a key", "(in the job +train.lrr=1)"),
    ("-m model=null,conv", "model must be the name of a choice", "got null"),
    ("-m seed=interval(0,1)", "seed must be values to sweep over", "interval(0,1)"),
    ("-m seed=1,2 resume=RUN", "resume must be given without -m", "RUN"),
]


@pytest.fixture(autouse=True)
def fresh_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The state that a new process would have, in an empty folder and on a machine without a GPU, data or network."""

    def offline(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    torchvision, datasets = types.ModuleType("torchvision"), types.ModuleType("torchvision.datasets")
    monkeypatch.setattr(torchvision, "datasets", datasets, raising=False)
    monkeypatch.setattr(datasets, "MNIST", offline, raising=False)
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CATVAE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False, "root": {"handlers": []}})


def exit_code(line: str, monkeypatch: pytest.MonkeyPatch) -> object:
    """What train.py ends with, in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", *shlex.split(line)])
    try:
        train.main()
    except SystemExit as end:
        return end.code
    return 0


def assert_one_sentence(error: str, words: tuple[str, ...]) -> None:
    assert error.startswith("catvae: ")
    assert error.count("\n") == 1, error
    assert "Traceback" not in error
    for word in words:
        assert word in error


def run_folder(folder: Path) -> Path:
    """A folder as a run leaves it, as far as resume= looks."""
    whole = composed("data=digits", "train.steps=5")
    config = typed(OmegaConf.masked_copy(whole, [key.name for key in fields(Config)]))
    for below in ("checkpoints", ".hydra"):
        (folder / below).mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("[data=digits, train.steps=5]")
    save(folder, 1, {**dict.fromkeys(NEEDED, ""), "config": plain(config), "asked": {"references": {}}})
    return folder


def tree(folder: Path) -> dict[Path, bytes | None]:
    """Every folder and file below a folder, with the content of each file."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("case", BAD, ids=[case[0].replace(TOO_LONG, "TOO_LONG") for case in BAD])
def test_refused_in_one_sentence(
    case: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing is left behind: no folder, no file."""
    line, *words = case
    if "RUN" in line:
        run_folder(tmp_path / "RUN")
    if "DONE" in line:
        (tmp_path / "DONE").mkdir()
        (tmp_path / "DONE" / "result.json").touch()
    before = tree(tmp_path)
    assert exit_code(line, monkeypatch) == 2
    said = capsys.readouterr()
    assert_one_sentence(said.err, tuple(words))
    assert said.out == ""
    assert tree(tmp_path) == before


def test_there_are_fifty_bad_lines() -> None:
    assert len({case[0] for case in BAD}) >= 50


@pytest.mark.parametrize("line", ["=3", "-m seed=-1,1"])
def test_refused_by_a_process_of_its_own(line: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), *line.split()]
    done = subprocess.run(command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert_one_sentence(done.stderr, (line.removeprefix("-m ").partition("=")[0],))
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


SCRIPTS: list[tuple[Any, ...]] = [
    (compare, f"RUNS --output new/{TOO_LONG}", TOO_LONG),
    (compare, "RUNS --metric test_bound --output new/place", "none of these runs has it"),
    (compare, "RUNS --output 'paper table.tex'", "--output must be a folder, which gets a file of each kind"),
    (compare, "nonexistent --output new/place", "nonexistent is not a folder"),
    (gradient_quality, "RUNS/1 output=new/place", "the split's hash differs"),
    (evaluate, "nonexistent --output found.json", "nonexistent", "is it a run folder?"),
    (generate, "RUNS/1 --output drawn.png", "the checkpoint has other layers"),
    (benchmark, "estimator=nope --output figures.json", "estimator must be one of"),
    (show_relaxation, "--draws 2000000 --output drawn.png", "--draws must be at most"),
]


@pytest.mark.parametrize("case", SCRIPTS, ids=[f"{case[0].__name__} {case[1][:40]}" for case in SCRIPTS])
def test_a_script_that_refuses_leaves_nothing_behind(case: tuple[Any, ...], tmp_path: Path) -> None:
    script, line, *words = case
    run_folder(tmp_path / "RUNS" / "1")
    (tmp_path / "RUNS" / "2").mkdir()
    (tmp_path / "RUNS" / "2" / "result.json").write_text('{"config": {}, "steps": 1, "test_accuracy": 0.5}')
    before = tree(tmp_path)
    ended = command(script.main, line)
    assert ended.code == 2
    assert_one_sentence(ended.err, tuple(words))
    assert tree(tmp_path) == before


def test_unknown_flag_shows_the_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("-x", monkeypatch) == 2
    error = capsys.readouterr().err
    assert "usage:" in error
    assert error.endswith("unrecognized arguments: -x\n")
    assert list(tmp_path.iterdir()) == []


def test_data_that_cannot_be_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("data=mnist", monkeypatch) == 2
    assert_one_sentence(capsys.readouterr().err, ("data=mnist", str(tmp_path / "data"), "data=digits"))
    assert list(tmp_path.iterdir()) == []


def test_damaged_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (raw / name).write_bytes(b"<html>")
    before = tree(tmp_path)
    assert exit_code("data=mnist", monkeypatch) == 2
    assert_one_sentence(capsys.readouterr().err, (str(raw / "train-images-idx3-ubyte"), "delete it"))
    assert tree(tmp_path) == before


def test_unreadable_configuration_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "broken.yaml").write_text("a: [")
    assert exit_code("--config-dir . model=broken", monkeypatch) == 2
    assert_one_sentence(capsys.readouterr().err, ("broken.yaml", "line 1"))


def test_wrong_type_in_a_configuration_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "objective").mkdir()
    (tmp_path / "objective" / "mine.yaml").write_text("alpha: much")
    assert exit_code("--config-dir . objective=mine", monkeypatch) == 2
    assert_one_sentence(capsys.readouterr().err, ("objective.alpha must be a number", "got much"))


def test_module_that_fails_to_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "catvae_broken_plugin.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    assert exit_code("estimator._target_=catvae_broken_plugin.Mine", monkeypatch) == 2
    words = ("estimator._target_", "catvae_broken_plugin.Mine", "division by zero")
    assert_one_sentence(capsys.readouterr().err, words)


def test_class_that_fails_names_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["class Mine:", "    def __init__(self, size=1):", "        self.size = size + None"]
    (tmp_path / "catvae_failing_plugin.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    line = "estimator=sparsemax estimator._target_=catvae_failing_plugin.Mine +estimator.size=3"
    assert exit_code(line, monkeypatch) == 2
    words = ("estimator cannot be built", "catvae_failing_plugin.py, line 3", "estimator.size=3")
    assert_one_sentence(capsys.readouterr().err, words)


# ---- what must not be refused ----


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "configs" / group).glob("*.yaml"))


GOOD = [
    "",
    *(f"data={name}" for name in choices("data") if name != "arrays"),  # which tests/test_arrays.py runs
    *(f"{group}={name}" for group in ("model", "estimator", "optimizer") for name in choices(group)),
    *(f"{group}={name}" for group in ("objective", "experiment") for name in choices(group)),
    *(f"estimator=gumbel_softmax schedule@estimator.temperature={name}" for name in choices("schedule")),
    *(
        f"estimator=score_function estimator/baseline={name} estimator.num_samples=2"
        for name in choices("estimator/baseline")
    ),
    "estimator=gumbel_softmax schedule@estimator.temperature=constant estimator.temperature.value=0.5",
    "optimizer=sgd +optimizer.nesterov=true",
    "optimizer=adam optimizer.betas=[0.5,0.9]",
    "objective.alpha=0",
    "objective.alpha=1e3",
    "device=cpu precision=fp32",
    "hydra.run.dir=elsewhere hydra.job.chdir=true",
    "++train.steps=3",
    "data.root='${hydra:runtime.cwd}/data'",
]
GOOD_SWEEPS = [
    ("-m seed=1,2 estimator=marginalization,score_function", 4),
    ("-m 'seed=${hydra:job.num}' train.steps=range(1,4)", 3),
    ("-m estimator=glob(*gumbel_softmax)", 2),
    ("-m estimator=marginalization hydra.sweep.dir=elsewhere", 1),
]
QUIET = " hydra/job_logging=disabled hydra/hydra_logging=disabled"
PLUGIN = """
from estimators.marginalization import Marginalization

class Mine(Marginalization):
    def __init__(self, sharpness: float) -> None:
        super().__init__()
"""


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[DictConfig]:
    """The configurations of the jobs that are started; nothing is trained."""
    started: list[DictConfig] = []

    def run_job(config: DictConfig, folder: Path) -> int:
        started.append(config)
        return 0

    monkeypatch.setattr(train, "run_job", run_job)
    return started


@pytest.mark.parametrize("line", GOOD)
def test_accepted(
    line: str, jobs: list[DictConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(before_work, "check_machine", lambda config: None)  # data that would be downloaded
    assert exit_code(line + QUIET, monkeypatch) == 0, capsys.readouterr().err
    assert len(jobs) == 1


@pytest.mark.parametrize(("line", "count"), GOOD_SWEEPS)
def test_accepted_sweep(
    line: str,
    count: int,
    jobs: list[DictConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert exit_code(line + " data=digits" + QUIET, monkeypatch) == 0, capsys.readouterr().err
    assert len(jobs) == count


def test_sweep_of_a_file_is_checked_too(
    tmp_path: Path, jobs: list[DictConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "study").mkdir()
    for name, seeds in (("good", "1,2"), ("bad", "1,-2")):
        text = f'# @package _global_\nhydra:\n  sweeper:\n    params:\n      seed: "{seeds}"\n'
        (tmp_path / "study" / f"{name}.yaml").write_text(text)
    line = "--config-dir . -m data=digits +study="
    assert exit_code(line + "good" + QUIET, monkeypatch) == 0, capsys.readouterr().err
    assert [job.seed for job in jobs] == [1, 2]
    capsys.readouterr()
    assert exit_code(line + "bad", monkeypatch) == 2
    assert_one_sentence(capsys.readouterr().err, ("seed must be >= 0", "(in the job seed=-2"))
    assert len(jobs) == 2


def test_digits_are_there_without_a_download(jobs: list[DictConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    assert exit_code("data=digits" + QUIET, monkeypatch) == 0
    assert len(jobs) == 1


def test_estimator_from_outside(
    tmp_path: Path, jobs: list[DictConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "catvae_plugin.py").write_text(PLUGIN)
    (tmp_path / "mine" / "estimator").mkdir(parents=True)
    (tmp_path / "mine" / "estimator" / "own.yaml").write_text("_target_: catvae_plugin.Mine\nsharpness: 2.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    by_target = "data=digits estimator=sparsemax estimator._target_=catvae_plugin.Mine +estimator.sharpness=1"
    by_file = "--config-dir mine data=digits estimator=own"
    for line in (by_target, by_file, "-m " + by_file):
        assert exit_code(line + QUIET, monkeypatch) == 0, capsys.readouterr().err
    assert [job.estimator.sharpness for job in jobs] == [1, 2.0, 2.0]
    capsys.readouterr()
    assert exit_code(by_file + " estimator.sharpness=much", monkeypatch) == 2
    assert_one_sentence(capsys.readouterr().err, ("estimator.sharpness must be a number", "got much"))
    assert exit_code(by_file + " estimator.sharpnes=2", monkeypatch) == 2
    assert_one_sentence(capsys.readouterr().err, ("did you mean estimator.sharpness?",))


ODD_NAMES = ("it's a run", "lr=1,2", 'a "run"', "{x} [y]", "größe", "$HOME `x`", "back\\slash\\", "'")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_resume_lets_new_settings_win_in_any_folder(name: str, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / name)
    arguments = ["--config-dir", str(tmp_path), "train.steps=9", f"resume={folder}"]
    *flags, steps, again, place, subdir = resume_arguments(arguments)
    assert flags == ["--config-name=resumed", "--config-dir", str(tmp_path)]
    assert (steps, subdir) == ("train.steps=9", "hydra.output_subdir=null")
    for key, override in zip(("resume", "hydra.run.dir"), (again, place), strict=True):
        read = OverridesParser.create().parse_override(override)
        assert (read.key_or_group, read.value()) == (key, str(folder))


def test_resume_runs_in_the_folder_of_the_run(
    tmp_path: Path, jobs: list[DictConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path / "it's a run")
    line = shlex.join(["train.log_every=9", f"resume={folder}"]) + QUIET
    assert exit_code(line, monkeypatch) == 0, capsys.readouterr()
    job = jobs[0]
    assert (job.resume, job.train.log_every, job.train.steps, job.data.name) == (str(folder), 9, 5, "digits")
    assert not (tmp_path / "outputs").exists()


# ---- errors that are found later, and faults of the program ----


@pytest.mark.parametrize("error", [ConfigError("resume cannot change the seed"), DataError("no such file")])
def test_refusal_inside_a_job(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_job(config: DictConfig, folder: Path) -> int:
        raise error

    monkeypatch.setattr(train, "run_job", run_job)
    assert exit_code("data=digits hydra.run.dir=run", monkeypatch) == 2
    assert_one_sentence(capsys.readouterr().err, (str(error),))
    assert str(error) in (tmp_path / "run" / "train.log").read_text()


def test_fault_inside_a_job_is_shown_and_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_job(config: DictConfig, folder: Path) -> int:
        raise ValueError("a fault")

    monkeypatch.setattr(train, "run_job", run_job)
    assert exit_code("data=digits hydra.run.dir=run", monkeypatch) == 1
    for text in (capsys.readouterr().err, (tmp_path / "run" / "train.log").read_text()):
        assert "Traceback" in text
        assert "ValueError: a fault" in text


def test_sweep_goes_on_after_a_failed_job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seeds = []

    def run_job(config: DictConfig, folder: Path) -> int:
        seeds.append(config.seed)
        if config.seed == 1:
            raise DataError("no such file")
        return 0

    monkeypatch.setattr(train, "run_job", run_job)
    assert exit_code("-m data=digits seed=1,2" + QUIET, monkeypatch) == 2
    assert seeds == [1, 2]


@pytest.mark.parametrize("line", ["data=digits", "-m data=digits"])
def test_fault_in_the_check_is_no_warning(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: object) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(before_work, "check", fail)
    assert exit_code(line, monkeypatch) == 1
    assert "ZeroDivisionError: a fault" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
