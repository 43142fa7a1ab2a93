"""scripts.baselines: train.py's split and pixels, no label that may not be seen, and rows of scripts.compare."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from sklearn.semi_supervised import LabelSpreading

from configs.schema import Binarization, Config
from configs.wording import CONFIGS
from data.batches import binarize
from data.datasets import load
from data.splits import Split
from data.stored import Images
from models import evaluation
from scripts import baseline_methods, baselines, compare
from scripts.baseline_methods import GRIDS, METHODS, Known, choose, grid, predict, usable
from tests.runs import Ended, command
from training.saved import stored_run

SKLEARN = [name for name in baselines.NAMES if name != baselines.CLASSIFIER]
# one nearest neighbour on the 50 labels of draws 0 to 4 of digits, test accuracy in %, as it was found by hand
NEAREST = [83.1, 82.2, 85.3, 83.6, 86.4]
FEW = {
    "logistic_regression": grid(C=[1]),
    "svm": grid(C=[10], gamma=[1]),
    "label_spreading": grid(kernel=["rbf"], gamma=[36], alpha=[0.2])
    + grid(kernel=["knn"], n_neighbors=[7], alpha=[0.2]),
    "self_training": grid(C=[10], threshold=[0.75]),
}
DIGITS = "data=digits data.num_labelled=50 data.num_validation=200 data.binarization=none"
QUICK = f"{DIGITS} estimator=gumbel_softmax model=mlp model.hidden=16 train.steps=4 device=cpu precision=fp32"


@pytest.fixture(autouse=True, scope="module")
def few_settings() -> Iterator[None]:
    with mock.patch.dict(GRIDS, FEW):
        yield


def run(line: str, code: int = 0) -> Ended:
    ended = command(baselines.main, line)
    assert ended.code == code, ended.said
    return ended


def result(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "result.json").read_text()))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method on draw 1; the classifier is a run of train.py."""
    output = tmp_path_factory.mktemp("baselines") / "out put"
    run(f"{QUICK} --draws 1 --output '{output}'")
    return output / "data.split_seed=1"


def split_of(source: Images, config: Config) -> Split:
    return config.data.split(source.labels, source.num_classes)


@pytest.fixture
def digits() -> tuple[Images, Config]:
    config, _ = baselines.composed(DIGITS.split())
    return load("digits", "", "train"), config


# ---- the split, the pixels and the labels ----


def test_the_split_is_that_of_a_run_of_train_py(done: Path) -> None:
    ours = result(done / "classifier")
    assert (ours["config"]["objective.labelled"], ours["config"]["objective.unlabelled"]) == (0, 0)
    for name in SKLEARN:
        assert result(done / name)["split_hash"] == ours["split_hash"]
        assert (done / name / "split.json").read_text() == (done / "classifier" / "split.json").read_text()


def test_one_nearest_neighbour_has_its_known_accuracy(tmp_path: Path) -> None:
    run(f"{DIGITS} --draws 0-4 --methods nearest_neighbour --output {tmp_path}")
    found = [result(tmp_path / f"data.split_seed={n}" / "nearest_neighbour")["test_accuracy"] for n in range(5)]
    assert [round(100 * accuracy, 1) for accuracy in found] == NEAREST


@pytest.mark.parametrize("at_once", [8192, 30])  # of small images, and of large ones
def test_drawn_pixels_are_those_that_a_run_is_evaluated_on(
    at_once: int, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "rows_at_once", lambda pixels: at_once)
    trained = stored_run(done / "classifier")
    trained.binarization = "dynamic"
    trained.config.data.binarization = Binarization.dynamic
    seen: list[torch.Tensor] = []

    def remember(*given: Any) -> torch.Tensor:
        seen.append(binarize(*given))
        return seen[-1]

    with mock.patch.object(evaluation, "binarize", remember):
        trained.evaluate(trained.validation)
    pixels = baselines.as_evaluated(trained.validation.x[:].numpy(), trained.config)
    assert np.array_equal(pixels, torch.cat(seen).flatten(1).numpy())
    assert set(np.unique(pixels)) == {0, 1}


@pytest.mark.parametrize("how", Binarization)
def test_training_images_keep_what_is_known_of_their_pixels(how: Binarization, digits: tuple[Images, Config]) -> None:
    source, config = digits
    config.data.binarization = how
    source = source.fixed() if how is Binarization.fixed else source
    known = baselines.known_of(source, split_of(source, config), config)
    grey = how in (Binarization.dynamic, Binarization.none)
    assert (len(np.unique(known.x)) > 2) == grey
    assert (len(np.unique(known.x_validation)) > 2) == (how is Binarization.none)
    assert 0 <= known.x.min() < known.x.max() <= 1


@pytest.mark.parametrize("name", SKLEARN)
def test_no_label_is_seen_but_those_of_labelled_images(name: str, digits: tuple[Images, Config]) -> None:
    source, config = digits
    split = split_of(source, config)
    hidden = np.setdiff1d(np.arange(len(source.labels)), split.labelled)
    wrong = source.labels.copy()
    wrong[hidden] = (wrong[hidden] + 1) % 10
    test = baselines.as_evaluated(load("digits", "", "test").images, config)
    predictions = []
    for labels in (source.labels, wrong):
        known = baselines.known_of(replace(source, labels=labels), split, config)
        (setting, *_), _ = usable(name, known)
        fitted = METHODS[name].prepare(known)(setting)
        predictions.append(predict(METHODS[name], fitted, test)[0])
    assert np.array_equal(predictions[0], predictions[1])
    assert len(np.unique(predictions[0])) == 10


def test_labelled_images_are_not_unlabelled_ones_as_well(digits: tuple[Images, Config]) -> None:
    source, config = digits
    assert config.data.labelled_in_unlabelled
    known = baselines.known_of(source, split_of(source, config), config)
    assert (len(known.x_labelled), len(known.x), len(known.x_validation)) == (50, 1237, 200)


# ---- the methods ----


@pytest.fixture
def known(digits: tuple[Images, Config]) -> Known:
    return baselines.known_of(digits[0], split_of(*digits), digits[1])


def test_spreading_over_one_graph_is_scikit_learns(known: Known) -> None:
    fit = METHODS["label_spreading"].prepare(known)
    fitted = fit({"kernel": "knn", "n_neighbors": 7, "alpha": 0.2})
    theirs = LabelSpreading(kernel="knn", n_neighbors=7, alpha=0.2, max_iter=200).fit(known.x, known.y)
    _, q = predict(METHODS["label_spreading"], fitted, known.x_validation)
    assert q is not None
    np.testing.assert_allclose(q, theirs.predict_proba(known.x_validation), atol=1e-6)


def test_validation_chooses_the_first_of_the_best(known: Known) -> None:
    settings = grid(C=[1e-6, 1, 1.0, 1e-5])
    with mock.patch.dict(GRIDS, logistic_regression=settings):
        chosen = choose("logistic_regression", known)
    accuracies = [tried["val_accuracy"] for tried in chosen.tried]
    assert accuracies[1] == accuracies[2] == max(accuracies) > accuracies[0]
    assert isinstance(chosen.settings["C"], int)  # 1, and not 1.0
    labels, q = chosen.predict(known.x_validation)
    assert (labels == known.y_validation).mean() == max(accuracies)
    assert q is not None
    assert q.sum(axis=1) == pytest.approx(1)


def test_what_does_not_fit_into_memory_is_left_out_and_said(known: Known, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(baseline_methods, "MOST_DENSE", 1236):
        chosen = choose("label_spreading", known)
    assert [tried["kernel"] for tried in chosen.tried] == ["knn"]
    (sentence,) = chosen.skipped
    assert sentence == "label spreading without kernel=rbf: 1,237 x 1,237 take 0.0122 GB"
    assert sentence in capsys.readouterr().out


def test_an_image_that_no_label_reaches_has_no_class_more_than_another(known: Known) -> None:
    far = known.x[known.y < 0][:20] + 100  # each other's neighbours alone
    both = replace(known, x=np.concatenate([known.x_labelled, far]), y=np.append(known.y_labelled, [-1] * 20))
    fitted = METHODS["label_spreading"].prepare(both)({"kernel": "knn", "n_neighbors": 7, "alpha": 0.2})
    _, q = predict(METHODS["label_spreading"], fitted, far)
    assert q == pytest.approx(0.1)


def test_neighbours_are_looked_for_once_for_all_numbers_of_labels(digits: tuple[Images, Config]) -> None:
    source, config = digits
    few = replace(config, data=replace(config.data, num_labelled=20))
    baseline_methods.Neighbours.found.clear()
    for each in (config, few):
        known = baselines.known_of(source, split_of(source, each), each)
        METHODS["label_spreading"].prepare(known)({"kernel": "knn", "n_neighbors": 7, "alpha": 0.2})
    assert len(baseline_methods.Neighbours.found) == 1


# ---- its folders ----


def test_a_result_has_what_a_run_has_and_no_bound(done: Path) -> None:
    for name in SKLEARN:
        found = result(done / name)
        assert (found["method"], found["seed"], found["steps"], found["device"]) == (name, 1, None, "cpu")
        assert 0.5 < found["test_accuracy"] < 1
        assert max(tried["val_accuracy"] for tried in found["tried"]) == found["val_accuracy"]
        assert found["settings"].items() <= found["tried"][0].items() | found["tried"][-1].items()
        assert ("test_calibration_error" in found) == METHODS[name].has_probabilities
        assert not [key for key in found if "bound" in key or "likelihood" in key]
        assert found["versions"]["scikit-learn"]
        assert found["config"]["data.split_seed"] == 1


def test_compare_has_a_row_for_each_beside_a_vae(done: Path, tmp_path: Path) -> None:
    vae = shutil.copytree(done / "classifier", tmp_path / "vae")
    made = result(vae)  # as if the same had been trained with the whole of J
    made["config"] |= {"objective.labelled": 1.0, "objective.unlabelled": 1.0, "objective.alpha": 500.0}
    (vae / "result.json").write_text(json.dumps(made))
    ended = command(compare.main, f"'{done}' {vae} --output {tmp_path / 'out'} --baseline 'label spreading'")
    assert (ended.code, ended.err) == (0, ""), ended.said
    rows = [line for line in ended.out.splitlines() if line[:1].isdigit()]
    titles = {method.title for method in METHODS.values()} | {"classifier alone", "gumbel_softmax"}
    for title in titles:
        cells = [row[3:].removeprefix(title).split() for row in rows if row[3:].startswith(f"{title}  ")]
        quality, cost, *tested = cells
        assert quality[0] == "1"
        assert (quality[9] == "–") == (title != "gumbel_softmax")  # test bound
        has_steps = title in ("gumbel_softmax", "classifier alone")
        assert (cost[-2] == "–") != has_steps  # steps/s
        assert [row[0] for row in tested] == ([] if title == "label spreading" else ["1"])  # pairs
    assert "note:" not in ended.out
    table = (tmp_path / "out" / "compare.csv").read_text()
    assert "uv run python -m scripts.baselines --methods svm data=digits" in table
    assert "<svg" in (tmp_path / "out" / "compare.html").read_text()


@pytest.mark.parametrize("metric", ["test_bound", "seconds", "evaluations"])
def test_compare_sorts_by_what_baselines_have_not(metric: str, done: Path, tmp_path: Path) -> None:
    vae = shutil.copytree(done / "classifier", tmp_path / "vae")
    made = result(vae)
    made["config"] |= {"objective.labelled": 1.0}
    (vae / "result.json").write_text(json.dumps(made))
    ended = command(compare.main, f"'{done}' {vae} --output {tmp_path / 'out'} --metric {metric}")
    assert ended.code == 0, ended.said
    if metric != "seconds":
        first = next(line for line in ended.out.splitlines() if line.startswith("1  "))
        assert first.startswith("1  gumbel_softmax")
        assert "no shared draws" not in ended.out


# ---- going on ----


def test_what_is_finished_is_skipped_and_the_rest_is_done(tmp_path: Path) -> None:
    line = f"data=digits data.num_labelled=20,50 --methods nearest_neighbour,svm --output {tmp_path}"
    run(line)
    folders = {path.parent.relative_to(tmp_path) for path in tmp_path.rglob("result.json")}
    names = [f"data.num_labelled={n}/{method}" for n in (20, 50) for method in ("nearest_neighbour", "svm")]
    assert folders == set(map(Path, names))
    whole = {name: (tmp_path / name / "result.json").read_text() for name in names}
    (tmp_path / names[3] / "result.json").unlink()
    ended = run(line)
    assert ended.out.count("is finished already") == 3
    for name in names[:3]:
        assert (tmp_path / name / "result.json").read_text() == whole[name]
    assert result(tmp_path / names[3])["test_accuracy"] == json.loads(whole[names[3]])["test_accuracy"]
    other = run(f"data=digits data.split_seed=3 data.num_labelled=20,50 --methods svm --output {tmp_path}", code=2)
    assert "data.split_seed=3 (was 0)" in other.err


def test_a_classifier_of_other_steps_is_another_command(tmp_path: Path) -> None:
    line = f"data=digits model=mlp model.hidden=8 --methods classifier --output {tmp_path}"
    run(f"{line} train.steps=2")
    assert "train.steps=3 (was 2)" in run(f"{line} train.steps=3", code=2).err


def trainer(folder: Path, source: str) -> Any:
    """A program in the place of train.py."""
    (folder / "trainer.py").write_text(source)
    return mock.patch.object(baselines, "TRAINER", folder / "trainer.py")


def test_a_signal_goes_on_to_the_trainer_once_and_ends_the_command(tmp_path: Path) -> None:
    waits = f"""
import pathlib, signal, sys, time
caught = []
signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
pathlib.Path({str(tmp_path / "ready")!r}).touch()
while not caught: time.sleep(0.01)
time.sleep(0.2)
sys.exit(130 if len(caught) == 1 else 1)
"""

    def interrupt() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # a shell's background command is started with it ignored
    with trainer(tmp_path, waits):
        threading.Thread(target=interrupt).start()
        ended = run(f"{QUICK} --draws 0,1 --methods classifier --output {tmp_path / 'out'}", code=130)
    assert f"the same command with --output {tmp_path / 'out'} goes on" in ended.err
    assert signal.getsignal(signal.SIGINT) is before


def test_a_classifier_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    with trainer(tmp_path, "raise SystemExit(3)"):
        run(f"{QUICK} --draws 0-1 --methods classifier,nearest_neighbour --output {tmp_path / 'out'}", code=3)
    assert len(list(tmp_path.rglob("result.json"))) == 2


# ---- refusals ----


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--methods nearest", "--methods must be out of nearest_neighbour, logistic_regression"),
        ("--draws 4-0", "--draws must be numbers such as 0-4 or 0,3,7, got 4-0"),
        ("--draws 0-1 data.split_seed=3", "data.split_seed must be left out with --draws"),
        ("data.num_labelled=20,15", "data.num_labelled must be all, or a positive multiple of the 10 classes"),
        ("data=nosuch", "data must be one of arrays, digits"),
        ("data.nosuch=1", "data.nosuch=1 is not a key"),
        ("nosuch", "an argument must be key=value"),
        ("optimizer.lr=interval(0,1)", "optimizer.lr must be values with commas between"),
        ("model.hidden=-1", "model"),
        ("hydra.run.dir=x", "hydra.run.dir must be left to train.py"),
        ("resume=x", "resume must be left to train.py"),
        ("--config-dir nosuch", "--config-dir must be a folder, got nosuch"),
        (f"--output {Path(__file__).name}", "--output must be a folder"),
    ],
)
def test_refused_in_one_sentence_before_any_work(
    line: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    there = tmp_path / Path(__file__).name
    there.touch()
    data = "" if line.startswith("data=") else "data=digits "
    ended = run(data + line, code=2)
    assert (ended.out, ended.err.count("\n")) == ("", 1), ended.said
    assert ended.err.startswith("catvae: ")
    assert words in ended.err
    assert [*tmp_path.iterdir()] == [there]


def test_choices_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text((CONFIGS / "model" / "mlp.yaml").read_text())
    (job,) = baselines.made_jobs(["data=digits", "model=mine"], None, tmp_path, [])
    assert job.choices["model"] == "mine"
    assert job.flags == ["--config-dir", str(tmp_path)]
