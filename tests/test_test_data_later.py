"""evaluation.test=false: nothing looks at test data, until somebody asks for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.schema import DataConfig
from scripts import baselines, compare, evaluate
from tests.runs import MLP, command, resume, run
from training import checkpoints
from training.trained import open_run

LINE = f"{MLP} train.steps=4 estimator=marginalization "


def result(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "result.json").read_text()))


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Test data that nothing may read."""
    load: Callable[..., Any] = DataConfig.load

    def guarded(self: DataConfig, part: str, mapped: bool = False) -> Any:
        assert part != "test", "test data were looked at"
        return load(self, part, mapped)

    monkeypatch.setattr(DataConfig, "load", guarded)
    return monkeypatch


def test_what_was_left_is_made_up_for(tmp_path: Path, unread: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    said = run(f"{LINE} evaluation.test=false", folder).out
    assert "test data are left for later (evaluation.test=false)" in said
    before = result(folder)
    assert all(value is None for name, value in before.items() if name.startswith("test_"))
    assert before["val_accuracy"] is not None
    assert "is finished already" in resume(folder).out
    assert result(folder) == before
    unread.undo()
    measured = json.loads(command(evaluate.main, f"{folder} --part test").out)
    assert result(folder) == before
    written = checkpoints.stored(folder)[-1].stat().st_mtime_ns
    resume(folder, "evaluation.test=true")
    after = result(folder)
    assert all(after[name] == measured.get(name) for name in after if name.startswith("test_"))
    changed = {name for name in after if after[name] != before[name]}
    assert {name for name in changed if not name.startswith("test_")} == {"config", "asked"}  # evaluation.test=true
    assert checkpoints.stored(folder)[-1].stat().st_mtime_ns == written
    assert "is finished already" in resume(folder, "evaluation.test=true").out
    run(LINE, tmp_path / "at once")
    clock = ("seconds", "steps_per_second", "asked")
    at_once = result(tmp_path / "at once")
    assert all(after[name] == value for name, value in at_once.items() if name not in clock)


def test_evaluating_again_looks_at_them_by_wish_alone(tmp_path: Path, unread: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    run(f"{LINE} evaluation.test=false", folder)
    before = result(folder)
    stopped = tmp_path / "stopped before its result"
    shutil.copytree(folder, stopped, ignore=shutil.ignore_patterns("result.json"))
    for place in (folder, stopped):
        ended = command(evaluate.main, f"'{place}'")
        found = json.loads(ended.out)
        assert found == {name: before[name] for name in found}
        assert ended.err.count("\n") == 1
        assert "--part test measures on them" in ended.err
    unread.undo()
    assert json.loads(command(evaluate.main, f"{folder} --part both").out)["test_n"] == 360
    resume(folder, "evaluation.test=true")
    assert json.loads(command(evaluate.main, str(folder)).out)["test_n"] == 360


def test_validation_images_are_classified_as_test_images_are(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(f"{LINE} evaluation.test=false", folder)
    before = result(folder)
    resume(folder, "evaluation.test=true evaluation.classify_by=bound")
    after = result(folder)
    for part in ("val", "test"):
        measured = json.loads(command(evaluate.main, f"{folder} --part {part} --classify-by bound").out)
        assert all(after[name] == value for name, value in measured.items() if name.startswith(part))
    assert after["val_calibration_error"] != before["val_calibration_error"]


def test_scripts_go_by_what_a_resume_asks_of_evaluation(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(f"{LINE} evaluation.test=false", folder)
    resume(folder, "evaluation.test=true evaluation.classify_by=both evaluation.importance_samples=3")
    after, measured = result(folder), json.loads(command(evaluate.main, str(folder)).out)
    assert all(after[name] == value for name, value in measured.items())
    assert measured["test_log_likelihood"] is not None
    assert open_run(folder).classify_by == "both"


def test_a_run_that_ended_before_its_result_goes_by_what_its_resume_asks(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(LINE, folder)
    (folder / "result.json").unlink()
    resume(folder, "evaluation.classify_by=bound")
    after, measured = result(folder), json.loads(command(evaluate.main, str(folder)).out)
    assert all(after[name] == value for name, value in measured.items())
    assert open_run(folder).classify_by == "bound"


def test_a_run_that_was_left_is_trained_longer(tmp_path: Path) -> None:
    run(f"{LINE} evaluation.test=false", tmp_path / "run")
    resume(tmp_path / "run", "train.steps=6 evaluation.test=true")
    found = result(tmp_path / "run")
    assert (found["steps"], found["start_step"], found["test_n"]) == (6, 4, 360)


def test_a_comparison_of_runs_that_were_left(tmp_path: Path, unread: pytest.MonkeyPatch) -> None:
    for seed in (0, 1):
        run(f"{LINE} evaluation.test=false seed={seed}", tmp_path / str(seed))
    run(f"{LINE} evaluation.test=false objective.alpha=2", tmp_path / "other")
    ended = command(compare.main, str(tmp_path))
    assert ended.code == 0, ended.said
    said = " ".join(ended.out.split())
    assert "highest val accuracy first" in said
    assert "3 of 3 runs have left test data for later" in said
    assert "test accuracy" not in said
    unread.undo()
    resume(tmp_path / "1", "evaluation.test=true")
    said = " ".join(command(compare.main, str(tmp_path)).out.split())
    assert "2 of 3 runs have left test data for later" in said
    assert "test accuracy" in said
    assert "Difference in val accuracy" in said  # none of the other group is known on test data


def test_baselines_leave_test_data_too(tmp_path: Path, unread: pytest.MonkeyPatch) -> None:
    line = "data=digits data.binarization=none evaluation.test=false --methods nearest_neighbour"
    ended = command(baselines.main, f"{line} --output {tmp_path / 'out'}")
    assert ended.code == 0, ended.said
    assert "val accuracy 0." in ended.out
    (path,) = (tmp_path / "out").rglob("result.json")
    assert not any(name.startswith("test_") for name in result(path.parent))


@pytest.mark.parametrize("method", ["nearest_neighbour", "classifier"])
def test_what_a_baseline_left_is_made_up_for(method: str, tmp_path: Path) -> None:
    line = f"{MLP} train.steps=4 data.binarization=none --methods {method} --output {tmp_path / 'out'}"
    assert command(baselines.main, f"{line} evaluation.test=false").code == 0
    before = result(tmp_path / "out" / method)
    ended = command(baselines.main, line)
    assert ended.code == 0, ended.said
    after = result(tmp_path / "out" / method)
    assert before.get("test_accuracy") is None
    assert 0 < after["test_accuracy"] <= 1
    assert after["val_accuracy"] == before["val_accuracy"]
    assert "is finished already" in command(baselines.main, line).out
