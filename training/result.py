"""The end of a run: the one look at test data, unless that is left for later, and result.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from configs.schema import Config
from models.contract import Evaluation
from training import saved
from training.report import Report
from training.run import Run
from training.run_folder import RESULT, git_commit, read_json, versions, write_json
from training.state import SINCE, flat, plain

OF_VALIDATION = {f"evaluation.{key}" for key in ("batch_size", "classify_by", "pixel_draws", "validation_samples")}
LEFT = "test data are left for later (evaluation.test=false)"


def is_finished(folder: Path, config: Config) -> bool:
    """Whether the run in `folder` has a result of at least as many steps as are asked for, and of what is asked for."""
    path = folder / RESULT
    if not path.exists():
        return False
    result = read_json(path)
    return bool(result["steps"] >= config.train.steps) and not (config.evaluation.test and is_left(result))


def is_left(result: Mapping[str, Any]) -> bool:
    """Whether a result has yet to be measured on test data."""
    return result.get("test_n", 0) is None


def finish(run: Run, report: Report, folder: Path) -> None:
    """Measures on validation and test data, writes result.json and the final TensorBoard values.

    Of a finished run that has left test data for later it makes up for that, and measures validation data again only
    where that is done otherwise now. Its checkpoint then has the new settings too, by which scripts go.
    """
    path = folder / RESULT
    before = read_json(path) if path.exists() else {}
    if is_left(before) and before["steps"] == run.step == report.start:
        how = {key: value for key, value in flat(plain(run.config)).items() if key.startswith("evaluation.")}
        was = SINCE | before["config"]
        changed = {key for key in how if was.get(key) != how[key]} - {"evaluation.test"}
        is_changed, again = bool(changed), measure(run, "val") if changed & OF_VALIDATION else {}
        result = before | again | measure(run, "test") | {"config": before["config"] | how}
        result |= {"asked": run.asked} if "asked" in before else {}
    else:
        is_changed = run.step == report.start > 0  # what a resume set after the last step, and before its result
        result = whole_result(run, report)
    if is_changed:
        saved.save(run, folder)
    # the last step's validation is logged already
    test = {name: value for name, value in result.items() if name.startswith("test_") and "_n" not in name}
    report.final({name.replace("_", "/", 1): value for name, value in test.items() if value is not None})
    report.flush()  # a finished run is not resumed
    write_json(path, result)
    if result["test_bound"] is None:
        why = "data.num_test=0" if run.config.data.num_test == 0 else "no labelled image is left for a test part"
        reason = f"{why}: nothing is measured on test images" if run.config.evaluation.test else LEFT
        report.say(f"{reason}; {path}")
        return
    accuracy = "" if result["test_accuracy"] is None else f"accuracy {result['test_accuracy']:.4f}, "
    likelihood = ""  # which not every family has
    if result.get("test_log_likelihood") is not None:
        sign = "=" if run.is_exact else ">="
        likelihood = f", {run.log_likelihood_name} {sign} {result['test_log_likelihood']:.2f}"
    report.say(f"test {accuracy}bound {result['test_bound']:.2f}{likelihood} nats ({result['test_n']} images); {path}")


def measure(run: Run, part: Literal["val", "test"]) -> dict[str, float | None]:
    """The numbers of a part, all None where there are no such images or test data are left for later."""
    for_later = part == "test" and not run.config.evaluation.test
    measured: dict[str, float | None] = {} if for_later else {**run.measure(part)}
    if f"{part}_bound" not in measured:
        measured |= {f"{part}_{field.name}": None for field in fields(Evaluation)}
        measured |= dict.fromkeys((f"{part}_n", f"{part}_n_with_label"), None if for_later else 0)
    of_classes = (f"{part}_accuracy", f"{part}_calibration_error")  # of a model that tells some
    return dict.fromkeys(of_classes) | measured


def whole_result(run: Run, report: Report) -> dict[str, Any]:
    steps_here = run.step - report.start
    return {
        "estimator": run.estimator.name,
        "seed": run.config.seed,
        "split_hash": run.split.hash,
        "steps": run.step,
        "start_step": report.start,  # > 0 after a resume; the next two count from there
        "rollbacks": run.rollbacks,  # each has halved the learning rate
        "seconds": report.seconds,
        "steps_per_second": steps_here / report.seconds if report.seconds else None,
        "device": run.device.type,
        "precision": run.precision,
        **measure(run, "val"),
        **measure(run, "test"),
        "class_names": run.facts.class_names,
        "log_likelihood_of": run.log_likelihood_name.rstrip(","),  # what the bounds and log_likelihood are below
        "prior": run.facts.prior,
        "git_commit": git_commit(),
        "versions": versions(),
        "config": flat(plain(run.config)),
        "asked": run.asked,
    }
