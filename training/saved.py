"""What a checkpoint holds of a run, and runs as their checkpoints left them."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from configs.check import build_optimizer, check, check_device, typed
from configs.schema import ConfigError
from data.datasets import OWN
from data.facts import DataError
from training import checkpoints
from training.divergence import Diverged, raise_unless_finite
from training.run import Run
from training.state import CONSTANT, changes, flat, from_anywhere, plain
from training.trained import load_parameters, stored_state

log = logging.getLogger("catvae")
ROLLBACKS = 5  # at most, each with half the learning rate of the one before
ENOUGH = 10  # checkpoints that a disk should have room for; events take room as well


def state_of(run: Run) -> dict[str, Any]:
    """What `restore` goes on from to the bit."""
    state = {
        "step": run.step,
        "rollbacks": run.rollbacks,
        "unlooked": run.unlooked,
        "sums": run.sums,
        "summed": run.summed,
        "norms": run.norms,
        "early_norms": run.early_norms,
        "highest_bound": run.highest_bound,
        "logged": run.logged,
        "facts": asdict(run.facts),
        "validation_bounds": run.bounds[1] if run.bounds[0] == run.step and not run.unlooked else [],
        "config": from_anywhere(plain(run.config)),
        "asked": run.asked,
        "split_hash": run.split.hash,
        "contents": run.contents,
        "model": run.model.state_dict(),
        "estimator": run.estimator.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        # our own draws are keyed by the step; this is for networks and estimators from outside
        "random_state": torch.get_rng_state(),
    }
    if run.device.type == "cuda":
        state["random_state_cuda"] = torch.cuda.get_rng_state(run.device)
    return state


def save(run: Run, folder: Path) -> Path:
    """Writes a checkpoint. Raises Diverged rather than keep a bad number."""
    for name, value in [*run.model.state_dict().items(), *run.estimator.state_dict().items()]:
        raise_unless_finite(name, value.double().sum().item(), run.step)
    path = checkpoints.save(folder, run.step, state_of(run))
    free, size = shutil.disk_usage(folder).free, path.stat().st_size + _yet_to_come(run)
    if free < ENOUGH * size:
        log.warning("%s has %.1f MB left, and a checkpoint takes %.1f MB", folder, free / 1e6, size / 1e6)
    return path


def _yet_to_come(run: Run) -> int:
    """Bytes that the first step adds to a checkpoint: the optimizer's state, by what it keeps of one parameter."""
    if run.optimizer.state:
        return 0
    with torch.random.fork_rng(devices=[]):
        one = torch.nn.Parameter(torch.zeros(1000, device=run.device))
        optimizer, one.grad = build_optimizer(run.config, [one]), torch.zeros_like(one)
        optimizer.step()
    kept = sum(value.nbytes for value in optimizer.state[one].values() if isinstance(value, Tensor))
    return sum(parameter.numel() for parameter in run.parameters.values()) * kept // 1000


def roll_back(run: Run, folder: Path, diverged: Diverged) -> None:
    """Takes up the newest checkpoint, with half the learning rate; raises `diverged` if it may not."""
    if run.config.on_divergence.value != "rollback" or run.rollbacks == ROLLBACKS:
        raise diverged
    rollbacks = run.rollbacks + 1
    restore_newest(run, folder)
    run.rollbacks = rollbacks
    log.warning("%s; back to step %d, with the learning rate times %g", diverged, run.step, 0.5**rollbacks)


def restore_newest(run: Run, folder: Path) -> None:
    """Takes up the newest checkpoint of a run folder. Raises CheckpointError, ConfigError."""
    restore(run, checkpoints.load(folder, run.device))


def restore(run: Run, state: dict[str, Any]) -> None:
    """Takes up a checkpoint. Raises ConfigError if it belongs to another experiment."""
    if changed := changes(flat(state["config"]), run.config):
        raise ConfigError(f"resume cannot change the experiment: {changed}; start a new run for that")
    contents = state.get("contents", {})
    if run.config.data.path is None:  # a person's own images are in the split's hash
        run.check_contents(contents)
    if state["split_hash"] != run.split.hash:
        where = run.config.data.path or run.config.data.name
        raise ConfigError(
            f"the data of {where} are not those of this run: the split's hash differs; put back what was there, or "
            "start a new run (scripts.predict on a folder or a file does without)"
        )
    run.check_contents(contents)
    load_parameters(run.model, state)
    run.estimator.load_state_dict(state["estimator"])
    run.optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random_state"].cpu())
    if "random_state_cuda" in state and run.device.type == "cuda":
        torch.cuda.set_rng_state(state["random_state_cuda"].cpu(), run.device)
    # runs from before have none of these
    run.rollbacks = state.get("rollbacks", 0)
    run.unlooked = state.get("unlooked", False)
    run.logged = state.get("logged")
    run.bounds = state["step"], state.get("validation_bounds", [])
    run.sums, run.summed = state.get("sums", {}), state.get("summed", 0)
    run.norms = state.get("norms", [])
    run.early_norms = state.get("early_norms", [])
    run.highest_bound = state.get("highest_bound", (0, -math.inf))
    run.asked = state.get("asked", {})
    run.step = state["step"]


def device_here(trained_on: str) -> dict[str, Any]:
    """What a stored configuration must have changed where it was trained on another machine, which has more GPUs."""
    if not torch.cuda.is_available():
        return {"device": "cpu", "cuda_graph": False}
    try:
        check_device(trained_on)
    except ConfigError:
        return {"device": "cuda"}
    return {}


def stored_run(
    folder: Path, checkpoint: Path | None = None, trusted: Collection[str] = (), data_path: Path | None = None
) -> Run:
    """The run in `folder` as its newest checkpoint left it, configuration included, for scripts; or as `checkpoint`.

    With its data, which `training.trained.open_run` does without: of a person's own images those in `data_path`, if
    they were moved. Its configuration calls nothing but what is this program's own, or of the modules `trusted`. Raises
    CheckpointError, ConfigError, DataError.
    """
    state = stored_state(folder, checkpoint, trusted)
    state["config"] |= device_here(state["config"]["device"])
    data, here = state["config"]["data"], os.environ.get("CATVAE_DATA")
    if here and not Path(data["root"]).is_dir():  # its images lay elsewhere; what they are is checked
        data["root"] = here
    if data_path is not None:
        if data["name"] != OWN:
            raise ConfigError(f"--data-path is for a run of data={OWN}; CATVAE_DATA tells where {data['name']} is")
        data["path"] = os.fspath(data_path)
    elif data["name"] == OWN and not os.path.exists(os.path.expanduser(str(data["path"]))):
        raise DataError(f"the run's images are not in {data['path']} any more; --data-path PATH tells where they are")
    state["config"].setdefault("lr_factor", CONSTANT)
    config = typed(OmegaConf.create(state["config"]))
    check(config)
    run = Run(config)
    restore(run, state)
    return run
