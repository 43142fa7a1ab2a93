"""The end of a run: the one look at test data, and result.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs.schema import Config
from training.report import Report
from training.run import Run, flat, plain
from training.run_folder import RESULT, git_commit, read_json, versions, write_json


def is_finished(folder: Path, config: Config) -> bool:
    """Whether the run in `folder` has a result of at least as many steps as are asked for."""
    path = folder / RESULT
    return path.exists() and bool(read_json(path)["steps"] >= config.train.steps)


def finish(run: Run, report: Report, folder: Path) -> None:
    """Measures on validation and test data, writes result.json and the final TensorBoard values."""
    measured = run.measure("val") | run.measure("test")
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
        "git_commit": git_commit(),
        "versions": versions(),
        "config": flat(plain(run.config)),
        "asked": run.asked,
    }
    # the last step's validation is logged already
    report.final({n.replace("_", "/", 1): value for n, value in measured.items() if n.startswith("test_")})
    report.flush()  # a finished run is not resumed
    write_json(folder / RESULT, result)
    report.say(
        f"test accuracy {measured['test_accuracy']:.4f}, bound {measured['test_bound']:.2f}, "
        f"log p(x) >= {measured['test_log_likelihood']:.2f} nats; {folder / RESULT}"
    )
