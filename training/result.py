"""The end of a run: the one look at test data, and result.json."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from configs.schema import Config
from models.evaluation import Evaluation
from training.report import Report
from training.run import Run, flat, plain
from training.run_folder import RESULT, git_commit, read_json, versions, write_json


def is_finished(folder: Path, config: Config) -> bool:
    """Whether the run in `folder` has a result of at least as many steps as are asked for."""
    path = folder / RESULT
    return path.exists() and bool(read_json(path)["steps"] >= config.train.steps)


def finish(run: Run, report: Report, folder: Path) -> None:
    """Measures on validation and test data, writes result.json and the final TensorBoard values."""
    measured: dict[str, float | None] = {**run.measure("val"), **run.measure("test")}
    for part in ("val", "test"):
        if f"{part}_bound" not in measured:  # there are no such images
            measured |= {f"{part}_{field.name}": None for field in fields(Evaluation)}
            measured |= {f"{part}_n": 0, f"{part}_n_with_label": 0}
    steps_here = run.step - report.start
    result: dict[str, Any] = {
        "estimator": type(run.estimator).__name__,
        "seed": run.config.seed,
        "split_hash": run.split.hash,
        "steps": run.step,
        "start_step": report.start,  # > 0 after a resume; the next two count from there
        "rollbacks": run.rollbacks,  # each has halved the learning rate
        "seconds": report.seconds,
        "steps_per_second": steps_here / report.seconds if report.seconds else None,
        "device": run.device.type,
        "precision": run.precision,
        **measured,
        "class_names": run.facts.class_names,
        "log_likelihood_of": run.log_likelihood_name.rstrip(","),  # what the bounds and log_likelihood are below
        "prior": run.model.prior,
        "git_commit": git_commit(),
        "versions": versions(),
        "config": flat(plain(run.config)),
        "asked": run.asked,
    }
    # the last step's validation is logged already
    test = {name: value for name, value in measured.items() if name.startswith("test_") and "_n" not in name}
    report.final({name.replace("_", "/", 1): value for name, value in test.items() if value is not None})
    report.flush()  # a finished run is not resumed
    write_json(folder / RESULT, result)
    if measured["test_accuracy"] is None:
        report.say(f"data.num_test=0: nothing is measured on test images; {folder / RESULT}")
        return
    report.say(
        f"test accuracy {measured['test_accuracy']:.4f}, bound {measured['test_bound']:.2f}, "
        f"{run.log_likelihood_name} >= {measured['test_log_likelihood']:.2f} nats ({measured['test_n']} images); "
        f"{folder / RESULT}"
    )
