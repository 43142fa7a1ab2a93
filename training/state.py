"""What makes two configurations the same experiment, and a configuration as checkpoints and results hold it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from enum import Enum
from typing import Any

from configs.schema import Config

# settings that change when a run stops or looks, and not what it computes
FREE_TO_CHANGE = {
    "resume",
    "train.steps",
    "train.log_every",
    "train.validate_every",
    "train.checkpoint_every",
    "train.pictures_every",
    "on_divergence",
}
FREE_TO_CHANGE |= {
    "data.root",
    "data.path",
    "data.placement",
    "data.checksum",
    "evaluation.batch_size",
    "evaluation.importance_samples",
    "evaluation.validation_samples",
    "evaluation.test",
    "evaluation.pixel_draws",
    "evaluation.classify_by",
}
FREE_TO_CHANGE |= {"device", "cuda_graph"}  # a run may go on where there is a machine for it
FREE_TO_CHANGE |= {"diagnostics.every", "diagnostics.draws", "diagnostics.batch_size"}
# keys that older runs do not have, and what those did
SINCE: dict[str, Any] = {"deterministic": False, "cuda_graph": False, "model.rotation": 0.0, "model.shift": 0.0}
SINCE |= {
    "model.distortion": 0.0,
    "model.activation": "relu",
    "objective.samples": 1,
    "objective.kl_warmup": 0,
    "objective.labels_first": 0,
    "objective.distortion_fades": None,
    "model.layer_norm": False,
    "model.logits_scale": 1.0,
    "train.clip_gradient": None,
    "evaluation.pixel_draws": 1,
    "evaluation.classify_by": "classifier",
    "likelihood": "bernoulli",
    "prior": "uniform",
}
SINCE |= {
    "data.num_test": None,
    "data.resize": None,
    "data.placement": "auto",
    "data.balanced": True,
    "data.stratified": False,
}
CONSTANT = {"_target_": "estimators.schedules.constant", "_partial_": True, "value": 1.0}  # before there was lr_factor


def plain(config: Any) -> Any:
    """The configuration as plain dictionaries, lists and scalars."""
    return json.loads(
        json.dumps(asdict(config), default=lambda value: value.value if isinstance(value, Enum) else value)
    )


def from_anywhere(config: Any) -> Any:
    """The configuration with absolute paths, so that a checkpoint can be opened from any working directory."""
    data = config["data"]
    for key in ("path", "root"):
        if data[key] and not data[key].startswith("~"):
            data[key] = os.path.abspath(data[key])
    return config


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train.steps": 1, ...} from nested dictionaries."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def changes(before: dict[str, Any], config: Config) -> str:
    """What makes `config` another experiment than the flat one before; empty if nothing does."""
    now = flat(plain(config))
    before = {key: value for key, value in SINCE.items() if key in now} | before
    changed = {key for key in now.keys() | before.keys() if before.get(key) != now.get(key)} - FREE_TO_CHANGE
    return ", ".join(f"{key}={now.get(key)} (was {before.get(key)})" for key in sorted(changed))
