"""Everything beside training with models that learn no classes: it works, or is refused before any work."""

from __future__ import annotations

import csv
import json
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

import train
from models.pictures import turn_about
from scripts import baselines, benchmark, compare, evaluate, generate, gradient_quality, predict
from scripts.comparison.groups import WITH_CLASSES, WITHOUT_CLASSES
from tests.runs import MLP, Ended, command, curve, events, resume, run
from training.run_folder import chosen_by, events_folder, read_json
from training.sweep import WORST
from training.trained import Trained, open_run

BASE = (
    "data=digits train.steps=6 train.validate_every=3 train.log_every=3 train.batch_size_unlabelled=10 "
    "evaluation.importance_samples=3 evaluation.validation_samples=2 device=cpu precision=fp32 "
)
SIZES = {  # joint classes of the first are too many to enumerate, those of the second are few
    "many": "model=categorical_mlp model.variables=5 model.classes=8 model.decoder=[12]",
    "few": "model=categorical_mlp model.variables=2 model.classes=3 model.decoder=[12] estimator=marginalization",
    "layers": "model=categorical_two_layers model.variables=2 model.classes=3 model.upper_variables=2",
    "structured": "model=structured_mlp model.variables=3 model.classes=3",
}
LEFT_OUT = ("marginalization", "sum_and_sample", "unordered_set", "sparsemax")
REFUSED_BY_PREDICT = "has a model without classes to predict; in Python, encode and log_likelihood"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp("runs") / name for name in SIZES}
    for name, folder in folders.items():
        said = run(f"{BASE}{SIZES[name]}", folder).said
        assert ": , val bound" not in said
    return folders


@pytest.fixture(scope="module")
def with_labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels") / "m2"
    run(f"{MLP} train.steps=6", folder)
    return folder


@pytest.fixture(scope="module")
def models(runs: dict[str, Path]) -> dict[str, Trained]:
    return {name: open_run(folder) for name, folder in runs.items()}


def assert_refused(ended: Ended, *words: str) -> None:
    assert ended.code == 2, ended.said
    assert ended.err.startswith("catvae: ")
    assert ended.err.count("\n") == 1
    for word in words:
        assert word in ended.err


def images(number: int = 3) -> Any:
    return np.random.default_rng(0).integers(0, 256, (number, 8, 8), dtype=np.uint8)


# ---- a run, and what it says ----


def test_the_end_says_what_log_likelihood_is_of_and_whether_it_is_exact(runs: dict[str, Path], tmp_path: Path) -> None:
    evidence = {"structured": "log p(lower half|upper half)"}
    for name, folder in runs.items():
        result = read_json(folder / "result.json")
        assert result["log_likelihood_of"] == evidence.get(name, "log p(x)")
        said = (folder / "train.log").read_text()
        sign = "=" if name == "few" else ">="
        assert f"{evidence.get(name, 'log p(x)')} {sign} {result['test_log_likelihood']:.2f} nats" in said
        assert f"val {evidence.get(name, 'log p(x)')} {result['val_log_likelihood']:.2f} (200 images)" in said
        assert "accuracy" not in said


def test_tensorboard_has_no_place_for_an_accuracy(runs: dict[str, Path]) -> None:
    for name, folder in runs.items():
        board = events(folder)
        tags = board.Tags()["scalars"]
        assert [tag for tag in sorted(tags) if tag.startswith("Overview/")] == ["Overview/J", "Overview/log_likelihood"]
        assert not any("accuracy" in tag or "calibration" in tag for tag in tags)
        layout = Layout()
        layout.ParseFromString(board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
        assert all(category.chart for category in layout.category)
        drawn = {tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag}
        assert drawn - {"train/temperature"} <= set(tags), name
        assert (curve(folder, "val/log_likelihood")) == curve(folder, "Overview/log_likelihood")
        below = events_folder(folder)
        assert below is not None
        points, classes = ((below / "projector" / file).read_text().splitlines() for file in ("z.tsv", "classes.tsv"))
        assert len(points) == len(classes) == 200


def test_resume_goes_on_and_evaluate_finds_the_same(runs: dict[str, Path]) -> None:
    before = read_json(runs["structured"] / "result.json")
    assert "is finished already" in resume(runs["structured"]).said
    found = json.loads(command(evaluate.main, str(runs["structured"])).out)
    for key, value in found.items():
        assert before[key] == pytest.approx(value)
    assert "test_accuracy" not in found
    assert_refused(command(evaluate.main, f"{runs['structured']} --part labelled"), "the run has no such images")


def test_images_of_ones_own_without_any_label(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", images=images(90))
    run(f"{BASE}{SIZES['few']} data=arrays data.path={tmp_path / 'own.npz'}", tmp_path / "run")
    model = open_run(tmp_path / "run")
    assert model.class_names == ()
    assert model.log_likelihood(images()).shape == (3,)
    for kind in ("", "--kind reconstructions"):
        ended = command(generate.main, f"{tmp_path / 'run'} {kind} --output {tmp_path / 'x.png'}")
        assert ended.code == 0, ended.said


def test_unknown_classes_come_last() -> None:
    assert turn_about(torch.tensor([-1, 1, 1, 0, -1, 0])).tolist() == [3, 1, 5, 2, 0, 4]
    assert turn_about(torch.tensor([-1, -1])).tolist() == [0, 1]


# ---- a trained model, and what it predicts and draws ----


def test_trained_models(models: dict[str, Trained]) -> None:
    for name, model in models.items():
        q = model.encode(images())
        (variables, classes), *_ = model.model.latents
        assert q.shape == (3, variables * classes)
        assert torch.allclose(q.view(3, variables, classes).sum(dim=-1), torch.ones(3, variables))
        assert model.encode(images(0)).shape == (0, variables * classes)
        assert torch.isfinite(model.log_likelihood(images(), samples=4)).all()
        for call in (model.classify, model.predict, lambda x, model=model: model.generate("0")):
            with pytest.raises(ValueError, match="needs a model that tells classes, and this one has none: encode"):
                call(images())
        if name == "structured":
            with pytest.raises(ValueError, match="has no images of its own"):
                model.sample()
            continue
        drawn = model.sample(5, seed=3)
        assert (drawn.dtype, drawn.shape) == (torch.uint8, (5, 1, 8, 8))
        assert torch.equal(drawn, model.sample(5, seed=3))
        assert not torch.equal(drawn, model.sample(5, seed=4))
        with pytest.raises(ValueError, match="number must be an integer >= 1, got 0"):
            model.sample(0)


def test_a_model_with_labels_can_be_sampled_too(with_labels: Path) -> None:
    model = open_run(with_labels)
    model.batch_size = 2
    assert model.sample(5).shape == (5, 1, 8, 8)


def test_where_y_is_enumerated_the_log_likelihood_does_not_depend_on_draws(models: dict[str, Trained]) -> None:
    one, many = (models["few"].log_likelihood(images(), samples=number) for number in (1, 7))
    assert torch.equal(one, many)


def test_predict_refuses(runs: dict[str, Path], tmp_path: Path) -> None:
    for name in ("many", "structured"):
        ended = command(predict.main, f"{runs[name]} val --output {tmp_path / 'x.csv'}")
        assert_refused(ended, REFUSED_BY_PREDICT, "training.trained.open_run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "line", "size"),
    [
        ("many", "", (32, 32)),  # samples, the first of its kinds
        ("many", "--kind samples --pixels drawn", (32, 32)),
        ("many", "--kind reconstructions", (32, 22)),
        ("layers", "--kind variables", None),
        ("structured", "", (52, 32)),
        ("structured", "--kind completions --pixels drawn", (52, 32)),
    ],
)
def test_generate(name: str, line: str, size: tuple[int, int] | None, runs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    ended = command(generate.main, f"{runs[name]} {line} --columns 3 --zoom 1 --output {path}")
    assert (ended.code, ended.out) == (0, f"{path}\n"), ended.said
    with Image.open(path) as image:
        assert size is None or image.size == size


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        (
            "many",
            "--kind classes",
            "--kind must be one that this model has, samples, reconstructions, variables, got cl",
        ),
        ("many", "--kind sheet", "got sheet"),
        (
            "many",
            "--kind variables --pixels drawn",
            "must be mean for --kind variables, got drawn; --kind samples draws",
        ),
        ("structured", "--kind samples", "--kind must be one that this model has, completions, got samples"),
    ],
)
def test_generate_refuses(name: str, line: str, words: str, runs: dict[str, Path], tmp_path: Path) -> None:
    assert_refused(command(generate.main, f"{runs[name]} {line} --output {tmp_path / 'x.png'}"), words)
    assert list(tmp_path.iterdir()) == []


# ---- the laboratory ----


def test_the_laboratory_measures_what_the_model_can_have(runs: dict[str, Path], tmp_path: Path) -> None:
    ended = command(
        gradient_quality.main, f"{runs['many']} draws=3 batch_size=2 warmup=1 reference=4 output={tmp_path}"
    )
    assert ended.code == 0, ended.said
    left = ended.out.partition("left out, as this model (5 variables of 8 classes) cannot have them: ")[2]
    assert sorted(left.splitlines()[0].split(", ")) == sorted(LEFT_OUT)
    assert (
        "exact is here the mean of 4 draws of an unbiased estimator; its relative squared error: logits " in ended.out
    )
    with (tmp_path / "gradient_quality.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [name for name in gradient_quality.all_names() if name not in LEFT_OUT]
    parts = ("logits", "posterior", "generator")
    assert [(row["estimator"], row["part"]) for row in rows] == [(name, part) for name in names for part in parts]
    assert {row["reference_draws"] for row in rows} == {"4"}
    assert len({row["reference_error"] for row in rows}) == len(parts)  # the same one for all estimators
    assert all(0 < float(row["reference_error"]) < math.inf for row in rows)
    assert (tmp_path / "gradient_quality.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["few", "layers", "structured"])
def test_the_laboratory_is_exact_where_it_can_be(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    line = f"{runs[name]} draws=3 batch_size=2 warmup=1 estimators=marginalization,relax output={tmp_path}"
    ended = command(gradient_quality.main, line)
    assert ended.code == 0, ended.said
    assert "exact is here" not in ended.out
    with (tmp_path / "gradient_quality.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["reference_draws"], row["reference_error"]) for row in rows} == {("0", "0.0")}
    assert all(float(row["variance"]) < 1e-8 for row in rows if row["estimator"] == "marginalization")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("estimators=rebar,marginalization", "estimators must be ones that this model can have, got marginalization: "),
        ("reference=2", "reference must be an integer >= 3, got 2"),
    ],
)
def test_the_laboratory_refuses(line: str, words: str, runs: dict[str, Path], tmp_path: Path) -> None:
    assert_refused(command(gradient_quality.main, f"{runs['many']} {line} output={tmp_path / 'x'}"), words)
    assert list(tmp_path.iterdir()) == []


def test_diagnostics_while_training(tmp_path: Path) -> None:
    seen = "diagnostics.every=3 diagnostics.draws=3 diagnostics.batch_size=2"
    run(f"{BASE}{SIZES['many']} {seen}", tmp_path / "run")
    for part in ("logits", "posterior", "generator"):
        assert [step for step, _ in curve(tmp_path / "run", f"diagnostics/variance_{part}")] == [3, 6]
    ended = run(f"{BASE}model=structured_mlp diagnostics.every=3", tmp_path / "no", code=2)
    assert_refused(ended, "diagnostics.batch_size must be <= 6 with 2 layers of variables", "40,000 calls", "got 50")
    assert not (tmp_path / "no").exists()


# ---- times and baselines ----


def test_benchmark_leaves_out_what_the_model_cannot_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "all_names", lambda: ["marginalization", "gumbel_softmax"])
    monkeypatch.setattr(benchmark, "TURN", 2)
    output = tmp_path / "times.json"
    ended = command(benchmark.main, f"{BASE}{SIZES['many']} --rounds 1 --output {output}")
    assert ended.code == 0, ended.said
    assert "left out, as this model cannot have them: marginalization\n" in ended.out
    assert [row["estimator"] for row in json.loads(output.read_text())["estimators"]] == ["gumbel_softmax"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--estimators gumbel_softmax --peer plain", "--peer must be none with this model"),
        ("--classes 2,3", "--classes must be left out with a model that the data's classes have no part in"),
        ("--estimators marginalization", "estimator must be one that does not enumerate joint classes"),
    ],
)
def test_benchmark_refuses(line: str, words: str) -> None:
    ended = command(benchmark.main, f"{BASE}{SIZES['many']} {line}")
    assert_refused(ended, words)
    assert ended.out == ""


@pytest.mark.parametrize("methods", ["", "--methods classifier", "--methods svm"])
def test_baselines_need_labels(methods: str, tmp_path: Path) -> None:
    ended = command(baselines.main, f"data=digits {SIZES['many']} {methods} --output {tmp_path / 'x'}")
    assert_refused(ended, "model must be one that learns from labels, got models.categorical.networks.categorical_mlp")
    assert list(tmp_path.iterdir()) == []


# ---- comparisons and searches ----


def test_without_accuracies_the_log_likelihood_sorts(runs: dict[str, Path], tmp_path: Path) -> None:
    ended = command(compare.main, f"{runs['many']} {runs['few']} --output {tmp_path}")
    assert ended.code == 0, ended.said
    out = " ".join(ended.out.split())
    assert "2 finished runs in 2 groups, highest val log p(x) first" in out
    results = {name: read_json(runs[name] / "result.json") for name in ("many", "few")}
    best = max(results, key=lambda name: float(results[name]["val_log_likelihood"]))
    found = f"its log p(x), on which nothing was chosen, is {results[best]['test_log_likelihood']:.2f}"
    assert "Chosen by val log p(x)" in out
    assert found in out
    assert "accuracy" not in out
    page = (tmp_path / "compare.html").read_text()
    assert "val log p(x), nats per image" in page
    with (tmp_path / "compare.csv").open() as file:
        values = {float(row["val_log_likelihood"]) for row in csv.DictReader(file)}
    assert values == {result["val_log_likelihood"] for result in results.values()}


def test_runs_with_accuracies_are_ranked_apart(runs: dict[str, Path], with_labels: Path, tmp_path: Path) -> None:
    line = f"{with_labels} {runs['many']} {runs['structured']} --output {tmp_path} --figures"
    ended = command(compare.main, line)
    assert ended.code == 0, ended.said
    assert "3 finished runs in 3 groups, ranked apart for each kind of model" in ended.out
    titles = [line for line in ended.out.splitlines() if line.startswith("== ")]
    assert [title.startswith(f"== {WITH_CLASSES}: ") for title in titles] == [True, False, False]
    assert [title.startswith(f"== {WITHOUT_CLASSES}: ") for title in titles] == [False, True, True]
    assert any("log p(lower half|upper half)" in title for title in titles)  # which no log p(x) is subtracted from
    assert "highest val accuracy first" in ended.out
    assert ended.out.count("highest val log p(x) first") == 2
    for name in ("compare.md", "compare.html"):
        assert WITHOUT_CLASSES in (tmp_path / name).read_text()


def test_a_search_maximises_the_log_likelihood(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    line = f"-m search=temperature_lr {SIZES['many']} {BASE} hydra.sweeper.n_trials=2 evaluation.test=true"
    ended = command(train.main, f"{line} {shlex.quote(f'hydra.sweep.dir={tmp_path}')}")
    assert ended.code == 0, ended.said
    values = [read_json(tmp_path / str(number) / "result.json")["val_log_likelihood"] for number in (0, 1)]
    best = values.index(max(values))
    assert f"best of 2 finished trials: {tmp_path / str(best)}, with val log p(x) {max(values):.2f}" in ended.err


def test_what_a_run_is_chosen_by() -> None:
    numbers = {"val_accuracy": 0.5, "val_log_likelihood": -80.0, "val_bound": -90.0}
    assert chosen_by(numbers) == ("val accuracy", 0.5)
    assert chosen_by(numbers | {"val_accuracy": None}) == ("val log p(x)", -80.0)
    assert chosen_by({"val_accuracy": None, "val_bound": -90.0}) == ("val bound", -90.0)
    assert chosen_by({"val_accuracy": None}) is None
    assert WORST < -1e300
