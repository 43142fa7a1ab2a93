"""Somebody else's run folder runs nothing: every command that opens one, on folders that were made to run something."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import train
from configs.schema import ConfigError
from configs.trust import foreign_modules, stored_config, take_trusted
from scripts import compare, evaluate, generate, gradient_quality, predict
from tests.runs import ANNEALED, MLP, Ended, command, resume, run
from training import checkpoints
from training.run_folder import events_folder
from training.trained import open_run

GUMBEL = "estimator=gumbel_softmax estimator.kl=analytic estimator.num_samples=1" + ANNEALED
LINE = f"{MLP} {GUMBEL} train.steps=4 train.validate_every=4 "
SYSTEM = {"_target_": "os.system", "command": "touch MARK"}
# what is changed in the configuration of a checkpoint, and what the sentence names
ATTACKS: dict[str, tuple[dict[str, Any], str]] = {
    **{section: ({section: SYSTEM}, "os.system") for section in ("model", "estimator", "optimizer", "lr_factor")},
    "partial": ({"lr_factor": {**SYSTEM, "_partial_": True}}, "lr_factor._target_"),
    "nested": ({"estimator.temperature": {**SYSTEM, "_partial_": True}}, "estimator.temperature._target_"),
    "deep": ({"estimator.temperature.start": {"a": [{"b": SYSTEM}]}}, "estimator.temperature.start.a.0.b._target_"),
    "args": ({"estimator": {"_target_": "builtins.eval", "_args_": ["open('MARK', 'w')"]}}, "builtins.eval"),
    "imported": ({"estimator": {**SYSTEM, "_target_": "estimators.contract.torch.os.system"}}, "estimators.contract"),
    "scheduler": ({"optimizer": {**SYSTEM, "_target_": "torch.optim.lr_scheduler.os.system"}}, "lr_scheduler.os"),
    "globals": ({"model._target_": "models.networks.conv.__globals__"}, "models.networks.conv.__globals__"),
    "class": ({"estimator._target_": "estimators.gumbel_softmax.GumbelSoftmax.__class__"}, "GumbelSoftmax.__class__"),
    "method": ({"estimator._target_": "estimators.gumbel_softmax.GumbelSoftmax.load_state_dict"}, "load_state_dict"),
    "kind": ({"estimator": {"_target_": "training.checkpoints.write_atomically", "path": "MARK"}}, "write_atomically"),
    "other": (
        {"estimator._target_": "training.saved.stored_run", "estimator.folder": "."},
        "training.saved.stored_run",
    ),
    "swapped": ({"estimator._target_": "torch.optim.SGD"}, "does not make what belongs there, Estimator"),
    "schedule": ({"lr_factor._target_": "estimators.contract.at_least"}, "estimators.contract.at_least"),
    "module": ({"estimator._target_": "evil_module.Mine"}, "--trust evil_module"),
    "package": ({"estimator._target_": "estimators.evil_module.Mine"}, "estimators.evil_module.Mine"),
    "near": ({"estimator._target_": "estimators_evil.Mine"}, "estimators_evil.Mine"),
    "number": ({"estimator._target_": 3}, "estimator._target_"),
    "environment": ({"data.path": "${oc.env:HOME}"}, "${oc.env:HOME}"),
    "decoded": ({"estimator.num_samples": "${oc.decode:'1'}"}, "estimator.num_samples"),
    "callback": ({"hydra": {"callbacks": {"x": SYSTEM}}}, "hydra is not a section"),
    "defaults": ({"defaults": [{"override hydra/launcher": "joblib"}]}, "defaults is not a section"),
    "tensor": ({"seed": torch.zeros(())}, "seed of the stored configuration is a Tensor"),
}
DOORS: dict[str, Callable[[Path], Ended]] = {
    "resume": lambda folder: command(train.main, f"resume={folder}"),
    "evaluate": lambda folder: command(evaluate.main, f"{folder} --part val"),
    "generate": lambda folder: command(generate.main, f"{folder} --output picture.png"),
    "predict": lambda folder: command(predict.main, f"{folder} val --output predictions.csv"),
    "gradient_quality": lambda folder: command(gradient_quality.main, f"{folder} estimators=run draws=3 batch_size=2"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trust") / "run"
    run(LINE, folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, on the path, with modules that leave a mark when they are imported."""
    for name in ("evil_module", "estimators_evil"):
        (tmp_path / f"{name}.py").write_text("open('MARK', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def changed(folder: Path, place: Path, changes: dict[str, Any]) -> Path:
    """A copy of a run folder, whose checkpoint has another configuration."""
    copy = place / "theirs"
    shutil.copytree(folder, copy)
    newest = checkpoints.stored(copy)[-1]
    state = torch.load(newest, weights_only=True)
    for key, value in changes.items():
        *sections, name = key.split(".")
        node = state["config"]
        for section in sections:
            node = node[section]
        node[name] = value
    torch.save(state, newest)
    return copy


def assert_refused(ended: Ended, word: str, place: Path) -> None:
    assert ended.code == 2, ended.said
    assert ended.err.startswith("catvae: "), ended.err
    assert ended.err.count("\n") == 1, ended.err
    assert word in ended.err, ended.err
    assert not (place / "MARK").exists()


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_that_a_checkpoint_names_is_run(attack: str, made: Path, place: Path) -> None:
    changes, word = ATTACKS[attack]
    folder = changed(made, place, changes)
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for door in DOORS.values():
        assert_refused(door(folder), word, place)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == files


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("facts", "none"),
        ("facts", {"shape": [1, 8]}),
        ("shape", [1, 8, 10**9]),
        ("class_names", [1, 2]),
        ("prior", [0.5, 0.5]),
        ("prior", ["a"] * 10),
        ("binarization", "os.system"),
        ("likelihood", "os.system"),
        ("model", {"a": 1}),
        ("model", [1]),
    ],
)
def test_what_a_checkpoint_says_of_its_model_is_checked(key: str, value: Any, made: Path, place: Path) -> None:
    folder = changed(made, place, {})
    newest = checkpoints.stored(folder)[-1]
    state = torch.load(newest, weights_only=True)
    (state if key in state else state["facts"])[key] = value
    torch.save(state, newest)
    for door in ("generate", "predict"):
        assert_refused(DOORS[door](folder), "the checkpoint", place)


def test_an_unchanged_folder_is_opened(made: Path, place: Path) -> None:
    for door in DOORS.values():
        ended = door(changed(made, place, {}))
        shutil.rmtree(place / "theirs")
        assert ended.code == 0, ended.said


def test_nothing_that_hydras_files_name_is_run(made: Path, place: Path) -> None:
    """resume reads the checkpoint; compare reads names and numbers, and resolves nothing."""
    folder = changed(made, place, {})
    system = "{_target_: os.system, command: touch MARK}"
    overrides = [
        *(f"+hydra.callbacks.x={system}", f"hydra.launcher={system}", f"estimator={system}", "--config-dir=."),
        *(
            "hydra.searchpath=[file://.]",
            "estimator=../../evil",
            "hydra.run.dir=elsewhere",
            "data.path=${oc.env:SECRET}",
        ),
        *("hydra.job_logging.handlers.x={(): os.system, command: touch MARK}", "$(touch MARK)", "; touch MARK"),
    ]
    hidden = folder / ".hydra"
    (hidden / "overrides.yaml").write_text(json.dumps(overrides))
    choices = {"estimator": "<script>alert(1)</script>", "data": "${oc.env:SECRET}"}
    (hidden / "hydra.yaml").write_text(json.dumps({"hydra": {"runtime": {"choices": choices}}}))
    config = OmegaConf.load(hidden / "config.yaml")
    config.estimator, config.data.path = SYSTEM, "${oc.env:SECRET}"
    OmegaConf.save(config, hidden / "config.yaml")
    (folder / "result.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECRET", "hunter2")
        compared = command(compare.main, f"{folder} --output report")
        assert compared.code == 0, compared.said
        shown = compared.out + "".join(path.read_text() for path in (place / "report").iterdir())
        assert "hunter2" not in shown
        assert "<script" not in shown
    resume(folder)
    assert sorted(path.name for path in place.iterdir()) == sorted(
        ["estimators_evil.py", "evil_module.py", "report", "theirs"]
    )
    assert (folder / "result.json").exists()


def test_a_sweep_that_goes_on_runs_nothing_of_its_folder(made: Path, place: Path) -> None:
    line = f"-m {LINE} seed=0,1 hydra.sweep.dir=sweep"
    assert command(train.main, line).code == 0
    folder = changed(place / "sweep" / "0", place, {"estimator": SYSTEM})
    shutil.copy(checkpoints.stored(folder)[-1], checkpoints.stored(place / "sweep" / "0")[-1])
    for job in ("0", "1"):
        for path in (place / "sweep" / job / ".hydra").iterdir():
            path.write_text(json.dumps([f"+hydra.callbacks.x={SYSTEM}"]))
    for name in ("search.json", "optimization_results.yaml"):
        (place / "sweep" / name).write_text(json.dumps({"_target_": "os.system", "best": SYSTEM}))
    assert_refused(
        command(train.main, line), "estimator._target_=estimators.gumbel_softmax.GumbelSoftmax (was os", place
    )


def test_pickles_in_data_and_checkpoints_are_not_read(made: Path, place: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("touch MARK",)

    images = np.array([Evil()] * 40, dtype=object)
    np.savez("theirs.npz", images=images, labels=np.arange(40) % 2)
    np.savez("labels.npz", images=np.zeros((40, 8, 8), np.uint8), labels=images)
    for name in ("theirs", "labels"):
        line = f"data=arrays data.path={name}.npz data.num_labelled=4"
        assert_refused(command(train.main, line), f"{name}.npz", place)
    folder = changed(made, place, {"data.name": "arrays", "data.path": str(place / "theirs.npz")})
    for name, door in DOORS.items():
        if name != "generate":  # it needs no data
            assert_refused(door(folder), "theirs.npz", place)
    newest = checkpoints.stored(folder)[-1]
    torch.save({**torch.load(newest, weights_only=True), "config": Evil()}, newest)
    for door in DOORS.values():
        assert_refused(door(folder), "cannot be read", place)
    (folder / "result.json").unlink()
    (folder / "events.out.tfevents.1.x").write_bytes(pickle.dumps(Evil()))
    ended = command(compare.main, f"{folder} --output report")
    assert ended.code == 0, ended.said
    assert not (place / "MARK").exists()


def test_links_out_of_a_folder_are_not_written_through(made: Path, place: Path) -> None:
    folder = changed(made, place, {})
    mine = place / "mine"
    for name in ("train.log", ".lock"):
        mine.write_text("mine")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(mine)
        assert_refused(command(train.main, f"resume={folder}"), f"{name} is a link", place)
        (folder / name).unlink()
    shutil.move(folder / "checkpoints", place / "of_another")
    (folder / "checkpoints").symlink_to(place / "of_another")
    assert_refused(command(train.main, f"resume={folder}"), "checkpoints is a link", place)
    (folder / "checkpoints").unlink()
    shutil.move(place / "of_another", folder / "checkpoints")
    (folder / "gradient_quality").symlink_to(place)
    assert_refused(command(gradient_quality.main, f"{folder} draws=3"), "gradient_quality is a link", place)
    (folder / ".result.json.partial").symlink_to(mine)
    (folder / "result.json").unlink()
    board, elsewhere = events_folder(folder), place / "elsewhere"
    assert board is not None
    for link in (board / "projector", board):
        shutil.move(link, elsewhere)
        link.symlink_to(elsewhere)
        before = sorted(elsewhere.rglob("*"))
        assert_refused(command(train.main, f"resume={folder}"), "is a link", place)
        assert sorted(elsewhere.rglob("*")) == before
        link.unlink()
        shutil.move(elsewhere, link)
    resume(folder)
    assert mine.read_text() == "mine"


# ---- a person's own ----

OWN = """
import functools
from estimators.gumbel_softmax import GumbelSoftmax
from os import system

class Mine(GumbelSoftmax):
    @classmethod
    def make(cls, **given):
        return cls(**given)

def made(**given):
    return Mine(**given)

curried = functools.partial(Mine)
"""


@pytest.fixture
def own(made: Path, place: Path) -> Path:
    """The folder of a run with an estimator from outside the repository."""
    (place / "my_estimators.py").write_text(OWN)
    sys.modules.pop("my_estimators", None)
    changed(made, place, {"estimator._target_": "my_estimators.Mine"}).rename(place / "own")
    return place / "own"


def test_ones_own_estimator_trains_without_a_word(own: Path, place: Path) -> None:
    run(LINE + "estimator._target_=my_estimators.Mine train.steps=1", place / "new")
    assert (place / "new" / "result.json").exists()


def test_ones_own_module_is_trusted_by_name(own: Path, place: Path) -> None:
    for door in DOORS.values():
        assert_refused(door(own), "--trust my_estimators", place)
    assert "my_estimators" not in sys.modules
    for line in ("--trust my_estimators", "--trust=my_estimators", "estimator._target_=my_estimators.Mine"):
        resume(own, line)
    assert_refused(command(train.main, f"resume={own} --trust my"), "--trust my_estimators", place)
    assert_refused(command(train.main, f"resume={own} --trust"), "must name a module, such as", place)
    for main in (evaluate.main, generate.main):
        ended = command(main, f"{own} --trust my_estimators")
        assert ended.code == 0, ended.said
    ended = command(gradient_quality.main, f"{own} --trust my_estimators estimators=run draws=3 batch_size=2")
    assert ended.code == 0, ended.said


def test_a_trusted_module_that_is_nowhere_is_said(made: Path, own: Path, place: Path) -> None:
    folder = changed(made, place, {"estimator._target_": "elsewhere.networks.Mine"})
    for module in ("elsewhere", "elsewhere.networks"):
        ended = command(evaluate.main, f"{folder} --trust {module}")
        assert_refused(ended, f"{module} is trusted, and cannot be imported; is its folder on PYTHONPATH", place)
        assert "--trust" not in ended.err
        with pytest.raises(ConfigError, match="cannot be imported"):
            open_run(folder, trusted=module)
    with pytest.raises(ConfigError, match=r'in Python, trusted=\["elsewhere.networks"\]'):
        open_run(folder)
    open_run(own, trusted="my_estimators")
    with pytest.raises(ConfigError, match="trusted must be names of modules, got 3"):
        open_run(own, trusted=[3])  # type: ignore[list-item]


def test_a_trusted_module_gives_nothing_that_it_imported(made: Path, own: Path, place: Path) -> None:
    for target in ("my_estimators.system", "my_estimators.functools.os.system", "my_estimators.Mine.make.__func__"):
        folder = changed(made, place, {"estimator": {**SYSTEM, "_target_": target}})
        for door in (f"{folder} --trust my_estimators",):
            assert_refused(command(evaluate.main, door), target, place)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("my_estimators.Mine", ["my_estimators"]),
        ("my_estimators.Mine.make", ["my_estimators"]),
        ("my_estimators.made", ["my_estimators"]),
        ("my_estimators.curried", ["my_estimators.curried"]),
        ("my_estimators.GumbelSoftmax", ["my_estimators"]),
        ("estimators.gumbel_softmax.GumbelSoftmax", []),
        ("estimators.gumbel_softmax.StraightThroughGumbelSoftmax", []),
    ],
)
def test_what_the_program_names_is_what_it_takes(target: str, named: list[str], made: Path, own: Path) -> None:
    config = checkpoints.load(made, torch.device("cpu"))["config"]
    config["estimator"]["_target_"] = target
    __import__("my_estimators")
    assert foreign_modules(config) == named
    assert stored_config({"config": config}, named) == config
    if named:
        with pytest.raises(ConfigError, match=target):
            stored_config({"config": config})


def test_trust_is_taken_out_of_the_arguments() -> None:
    line = ["a=1", "--trust", "x", "--trust=y.z", "-m"]
    assert take_trusted(line) == (["a=1", "-m"], ["x", "y.z"])
    for bad in (["--trust"], ["--trust="], ["--trust", "a=1"]):
        with pytest.raises(ConfigError, match="must name a module"):
            take_trusted(bad)
