"""What TensorBoard shows of a run: layout, pictures, projector, texts and alarms."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf import text_format  # type: ignore[import-untyped]
from PIL import Image
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from torch import Tensor

import train
from configs.schema import TrainConfig
from models import drawing
from models.contract import Alarm
from models.evaluation import calibration_error
from models.m2.alarms import classes_collapsed, generator_ignores_y, z_unused
from tests.runs import ANNEALED, MLP, command, curve, events, resume, run
from training.alarms import ENOUGH_NORMS, bound_fell, gradient_exploded
from training.charts import confusion, draw_calibration, draw_confusion, draw_mistakes, worst_mistakes
from training.names import LONGEST, run_name
from training.report import draws_pictures
from training.run_folder import events_folder
from training.tensorboard import LAYOUT, TensorBoard, coloured_by_class

LINE = f"{MLP} estimator=gumbel_softmax{ANNEALED} train.steps="
PICTURES = {"reconstructions", "generated", "analogies", "walk_through_z"}
PICTURES |= {"confusion_matrix", "worst_mistakes", "calibration"}
ALARMS = {"classes_collapsed", "generator_ignores_y", "z_unused", "gradient_exploded", "bound_fell"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps, resumed and finished at 12."""
    folder = tmp_path_factory.mktemp("tensorboard") / "run"
    run(f"{LINE}6 lr_factor=constant", folder)
    resume(folder, "train.steps=12")
    return folder


def layouts(folder: Path) -> list[layout_pb2.Layout]:
    found = events(folder).Tensors("custom_scalars__config__")
    return [layout_pb2.Layout.FromString(event.tensor_proto.string_val[0]) for event in found]


def test_one_layout_a_run_and_its_tags_exist(finished: Path) -> None:
    (layout,) = layouts(finished)
    assert [category.title for category in layout.category] == list(LAYOUT)
    tags = {tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag}
    assert tags <= set(events(finished).Tags()["scalars"])
    assert {f"warning/{name}" for name in ALARMS} <= tags


def test_one_layout_after_a_rollback(tmp_path: Path) -> None:
    line = f"{LINE}4 train.checkpoint_every=1 optimizer.lr=1e30 on_divergence=rollback"
    run(line, tmp_path / "run", code=3)
    assert len(list((tmp_path / "run").glob("*/*tfevents*"))) > 1
    assert len(layouts(tmp_path / "run")) == 1


def test_pictures_and_texts(finished: Path) -> None:
    read = events(finished)
    assert set(read.Tags()["images"]) == PICTURES
    for tag in PICTURES:
        assert [event.step for event in read.Images(tag)] == [6, 12]
    (first, second) = read.Tensors("config/text_summary")
    assert (first.step, second.step) == (0, 6)
    assert "steps: 12" in second.tensor_proto.string_val[0].decode()
    assert second.tensor_proto.string_val[0].decode().startswith("```yaml\n")


def test_projector_after_a_resume(finished: Path) -> None:
    board = events_folder(finished)
    assert board is not None
    config = text_format.Parse((board / "projector_config.pbtxt").read_text(), ProjectorConfig())
    (embedding,) = config.embeddings
    points = (board / embedding.tensor_path).read_text().splitlines()
    header, *classes = (board / embedding.metadata_path).read_text().splitlines()
    assert len(points) == len(classes) == 200
    assert {len(point.split("\t")) for point in points} == {2}
    assert header == "class\tpredicted"
    assert tuple(embedding.sprite.single_image_dim) == (8, 8)
    with Image.open(board / embedding.sprite.image_path) as sprite:
        assert sprite.size == (15 * 8, 15 * 8)  # 200 images in a square


def test_the_projector_opens_in_the_colours_of_classes() -> None:
    """Its images say the class: those of one class are alike in colour, and of different classes are not."""
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    alike = labels.unsqueeze(0) == labels.unsqueeze(1)
    for channels in (1, 2, 3):
        tiles = coloured_by_class(torch.zeros(6, channels, 8, 8), labels, 3)
        assert tiles.shape[1] == 3
        corners = tiles[:, :, 0, 0]
        assert torch.equal(torch.cdist(corners, corners) < 0.2, alike)
    images = torch.rand(6, 3, 8, 8)
    assert torch.equal(coloured_by_class(images, labels, 3)[:, :, 2:-2, 2:-2], images)
    one, other = coloured_by_class(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), labels[:1].expand(2), 3)
    assert (other - one).amin() >= 0
    assert other.amin() == 1


# ---- what tells runs apart ----


def record(line: str, varied: Sequence[str] = (), **choices: str) -> dict[str, Any]:
    return {"overrides": shlex.split(line), "varied": varied, "choices": {"estimator": "rebar"} | choices}


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        (record(""), "rebar"),
        (record("estimator=rebar seed=3 optimizer.lr=1e-3"), "rebar, seed=3, lr=0.001"),
        (record("optimizer.lr=1e-3 seed=3", ["seed=3"]), "rebar, seed=3, lr=0.001"),
        (record("train.log_every=7 data.root=/x train.pictures_every=0"), "rebar"),
        (record("data.path=/home/me/müll/für,mich=1.npz"), "rebar, path=für,mich=1.npz"),
        (record("+estimator.a.b=x/y 'prior=[0.5,0.5]'"), "rebar, a.b=x_y, prior=[0.5,0.5]"),
        (record("estimator.scale=2 model.scale=exp"), "rebar, estimator.scale=2, model.scale=exp"),
        (record("estimator/baseline=none", **{"estimator/baseline": "none"}), "rebar, baseline=none"),
        (record("deterministic=true seed=${data.split_seed}"), "rebar, deterministic=true, seed=3"),
        (
            record(" ".join(f"model.size_{i}={i}" for i in range(99))),
            "rebar, " + ", ".join(f"size_{i}={i}" for i in range(10)) + ", 89 more",
        ),
        (record("seed=3", estimator="schätzer\n" + "日" * 99), f"schätzer_{'日' * 16}, seed=3"),
        (record("optimizer.eps=1e+20 model.a=50%&b#c;d"), "rebar, eps=1e20, a=50__b_c_d"),
        ({}, "REBAR"),
    ],
)
def test_a_name_tells_the_estimator_and_what_was_overridden(asked: dict[str, Any], name: str, tmp_path: Path) -> None:
    config = {"estimator._target_": "estimators.REBAR", "seed": 3, "optimizer.lr": 0.001, "deterministic": True}
    told = run_name(asked, config)
    assert told == name
    assert len(told.encode()) <= LONGEST
    (tmp_path / told).mkdir()  # which a file system takes
    assert [path.name for path in tmp_path.iterdir()] == [told]


JOBLIB = "hydra/launcher=joblib hydra.launcher.n_jobs=2"


@pytest.mark.parametrize("launcher", ["", pytest.param(JOBLIB, marks=pytest.mark.slow)])
def test_runs_of_a_sweep_are_told_apart(launcher: str, tmp_path: Path) -> None:
    """Their names, and TensorBoard's own columns of HParams: first what differs; the same name after a resume."""
    line = f"-m {MLP} estimator=marginalization,sparsemax seed=0,1 deterministic=false hydra.sweep.dir={tmp_path}/sweep"
    ended = command(train.main, f"{line} {launcher} train.steps=2")
    assert ended.code == 0, ended.said
    names = {
        f"{number}/{estimator}, seed={seed}, data=digits, num_labelled=50"
        for number, (estimator, seed) in enumerate(product(("marginalization", "sparsemax"), (0, 1)))
    }
    runs = multiplexer(tmp_path / "sweep").Runs()
    assert {", ".join(run.split(", ")[:4]) for run in runs} == names
    assert command(train.main, f"{line} {launcher} train.steps=4").code == 0
    assert multiplexer(tmp_path / "sweep").Runs().keys() == runs.keys()
    if not launcher:
        found = hparams_tab(tmp_path / "sweep")
        shown = [(info.name, info.differs) for info in found.hparam_infos]
        assert shown[:3] == [("estimator", True), ("seed", True), ("data", False)]
        assert {"data.root", "train.log_every", "evaluation.importance_samples"}.isdisjoint(dict(shown))
        assert list(next(info for info in found.hparam_infos if info.name == "deterministic").domain_discrete) == [
            "false"
        ]
        metrics = [info.name.tag for info in found.metric_infos]
        assert metrics[:2] == ["Overview/J", "Overview/accuracy"]
        assert {"val/accuracy", "val/bound", "test/accuracy", "test/bound", "test/log_likelihood"} <= set(metrics)


def multiplexer(folder: Path) -> EventMultiplexer:
    found = EventMultiplexer().AddRunsFromDirectory(str(folder))
    found.Reload()
    return found


def hparams_tab(folder: Path) -> Any:
    """What TensorBoard shows on its HParams tab: the Experiment that its own back end makes of the runs."""
    provider = MultiplexerDataProvider(multiplexer(folder), str(folder))
    backend, request = Context(TBContext(data_provider=provider, logdir=str(folder))), RequestContext()
    return backend.experiment_from_metadata(request, "", True, backend.hparams_metadata(request, ""), [])


def test_a_run_from_before_goes_on_where_its_events_are(tmp_path: Path) -> None:
    run(f"{LINE}6", tmp_path / "run")
    board = events_folder(tmp_path / "run")
    assert board is not None
    for path in board.iterdir():
        path.rename(tmp_path / "run" / path.name)
    board.rmdir()
    resume(tmp_path / "run", "train.steps=12")
    assert not board.exists()
    assert [step for step, _ in curve(tmp_path / "run", "val/accuracy")] == [6, 12]


# ---- how large it gets ----


def drawn(steps: int, validate_every: int, pictures_every: int | None) -> list[int]:
    settings = TrainConfig(steps, 50, 100, 100, validate_every, 1000, pictures_every)
    looked = [*range(validate_every, steps, validate_every), steps]
    return [step for step in looked if draws_pictures(step, settings)]


def test_a_process_with_a_lower_number_goes_on_within_the_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, step in ((99_999, 1), (111, 2), (5, 3)):
        monkeypatch.setattr(os, "getpid", lambda number=number: number)
        board = TensorBoard(tmp_path, step - 1, {"seed": 0})
        board.scalars({"train/J": float(-step)}, step)
        board.close()
    monkeypatch.undo()
    assert curve(tmp_path, "train/J") == [(1, -1.0), (2, -2.0), (3, -3.0)]


def test_pictures_are_drawn_ever_more_rarely() -> None:
    assert drawn(4000, 1000, None) == [1000, 2000, 3000, 4000]
    assert drawn(10_500, 1000, None) == [*range(1000, 9000, 1000), 10_000, 10_500]
    assert len(drawn(1_000_000, 1000, None)) <= 36
    assert len(drawn(1_000_000, 1, None)) <= 76


def test_pictures_are_drawn_as_often_as_is_asked_for() -> None:
    assert drawn(12, 3, 0) == []
    assert drawn(12, 3, 1) == drawn(12, 3, 3) == [3, 6, 9, 12]
    assert drawn(13, 3, 6) == [6, 12, 13]
    assert drawn(30, 3, 10) == [12, 21, 30]


def test_events_stay_small(tmp_path: Path) -> None:
    """By what one logging step, one validation and its pictures take, a million steps with the defaults."""
    run(f"{LINE}12 train.log_every=12 train.validate_every=12", tmp_path / "one")
    run(f"{LINE}12 train.log_every=6 train.validate_every=12", tmp_path / "logs")
    run(f"{LINE}12 train.log_every=12 train.validate_every=6", tmp_path / "pictures")
    run(f"{LINE}12 train.log_every=12 train.validate_every=6 train.pictures_every=0", tmp_path / "looks")
    one, logs, pictures, looks = (size(tmp_path / name) for name in ("one", "logs", "pictures", "looks"))
    drawing = (pictures - looks) / 2
    look = pictures - drawing - one
    assert 0 < look < drawing
    total = one + 10_000 * (logs - one) + 1000 * look + len(drawn(1_000_000, 1000, None)) * drawing
    assert total < 30e6, f"{total / 1e6:.1f} MB"


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("events.out.tfevents.*"))


# ---- pictures ----


def some_predictions() -> tuple[Tensor, Tensor]:
    """q(y|x) of four images of classes 0, 1, 1, 2: the third is taken for 2 with 0.6, the fourth for 0 with 0.9."""
    q = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.3, 0.6], [0.9, 0.05, 0.05]])
    return q, torch.tensor([0, 1, 1, 2])


def test_confusion_has_true_rows_and_predicted_columns() -> None:
    counts = confusion(*some_predictions())
    assert counts.tolist() == [[1, 0, 0], [0, 1, 1], [1, 0, 0]]


def test_worst_mistakes_come_first() -> None:
    mistakes = worst_mistakes(*some_predictions(), number=5)
    assert [mistake[:3] for mistake in mistakes] == [(3, 2, 0), (2, 1, 2)]
    assert [mistake[3] for mistake in mistakes] == pytest.approx([0.9, 0.6])
    assert worst_mistakes(*some_predictions(), number=1) == mistakes[:1]


@pytest.mark.parametrize("has_font", [True, False])
def test_no_letter_is_drawn_as_a_box(has_font: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = drawing._wide_font(13)
    if has_font and found is None:
        pytest.skip("this machine has no font beyond Pillow's own")
    drawing._lettered.cache_clear()
    monkeypatch.setattr(drawing, "_wide_font", lambda size: found if has_font else None)
    expected = {
        "Ärger": ("Ärger", "Arger"),
        "ﬁn": ("ﬁn", "fin"),
        "日\udcff": ("??", "??"),
        "A\u0308": ("A\u0308", "A"),
        "cat": ("cat", "cat"),
    }
    for text, (whole, plain) in expected.items():
        assert drawing._lettered(text, 13)[0] == (whole if has_font else plain)
    names = ["Ärger", "日本"]
    assert draw_confusion(torch.ones(2, 2), names).shape[0] == 3
    drawing._lettered.cache_clear()


@pytest.mark.parametrize("channels", [1, 3])
def test_charts_are_pictures(channels: int) -> None:
    q, labels = some_predictions()
    x = torch.randint(256, (4, channels, 8, 8), dtype=torch.uint8)
    mistakes = worst_mistakes(q, labels, 5)
    names = ("a class with a long name", "b", "")
    pictures = draw_confusion(confusion(q, labels), names), draw_mistakes(x, mistakes, names)
    charts = *pictures, draw_calibration(q, labels)
    for chart in (*charts, draw_mistakes(x, [], names)):
        assert chart.dtype == torch.uint8
        assert chart.shape[0] == 3
        assert chart.float().std() > 5
    assert calibration_error(q, labels) == pytest.approx((0.2 + 0.3 + 0.6 + 0.9) / 4)


# ---- alarms ----


def balanced(confidence: float) -> Tensor:
    """q(y|x) of 100 images, ten predicted as each of 10 classes."""
    return torch.full((100, 10), (1 - confidence) / 9).index_put(
        (torch.arange(100), torch.arange(100) % 10), torch.tensor(confidence)
    )


LABELS = torch.arange(100) % 10
USUAL = [10.0] * ENOUGH_NORMS


@pytest.mark.parametrize(
    ("raised", "healthy"),
    [
        (
            lambda: classes_collapsed(balanced(1.0)[:4].repeat(25, 1), LABELS),
            lambda: classes_collapsed(balanced(1.0), LABELS),
        ),
        (lambda: generator_ignores_y(torch.zeros(9)), lambda: generator_ignores_y(torch.full((9,), 30.0))),
        (lambda: z_unused(0.01), lambda: z_unused(13.0)),
        (lambda: gradient_exploded([10.0, 5000.0, 10.0], USUAL), lambda: gradient_exploded([10.0, 500.0], USUAL)),
        (lambda: bound_fell(-95.0, -90.0, 100, 784), lambda: bound_fell(-94.0, -90.0, 100, 784)),
        (lambda: bound_fell(5.0, 10.0, 100, 784), lambda: bound_fell(7.0, 10.0, 100, 784)),
    ],
)
def test_alarms(raised: Callable[[], Alarm], healthy: Callable[[], Alarm]) -> None:
    assert raised().up
    assert not healthy().up
    assert raised().name == healthy().name
    assert raised().name in ALARMS


def predictions_of(labels: Tensor, right: float) -> Tensor:
    """q(y|x) that is sure of the label for a part of the images, and of class 0 for the rest."""
    said = torch.where(torch.arange(len(labels)) % 100 < 100 * right, labels, 0)
    return torch.nn.functional.one_hot(said, 7).float()


@pytest.mark.parametrize("counts", [[2000, 100, 100, 60, 60, 40, 40], [50] * 7, [1500, 100, 0, 0, 0, 0, 0]])
def test_a_collapse_is_held_against_the_labels_spread(counts: list[int]) -> None:
    """With any frequencies: quiet where q is right, up where it says one class of everything."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(7).repeat_interleave(torch.tensor(counts))[torch.randperm(sum(counts), generator=random)]
    for right in (1.0, 0.9):
        assert not classes_collapsed(predictions_of(labels, right), labels).up
    assert classes_collapsed(predictions_of(labels, 0.0), labels).up
    unknown = torch.full_like(labels, -1)
    both = torch.cat([labels, unknown])
    assert not classes_collapsed(torch.cat([predictions_of(labels, 1.0), predictions_of(labels, 0.0)]), both).up


def test_without_any_label_a_collapse_is_held_against_all_classes() -> None:
    unknown = torch.full((100,), -1)
    assert not classes_collapsed(balanced(1.0), unknown).up
    assert classes_collapsed(balanced(1.0)[:4], unknown[:4]).up


def test_no_norm_is_usual_at_the_start() -> None:
    assert not gradient_exploded([1e9], USUAL[1:]).up


def test_what_u_teaches_has_the_weight_of_the_step_in_a_run(tmp_path: Path) -> None:
    fading = "model.distortion=0.5 objective.distortion_fades=2"
    run(f"{MLP} estimator=marginalization train.steps=10 objective.labels_first=4 {fading}", tmp_path / "run")
    weights = [value for _, value in curve(tmp_path / "run", "train/teaching_weight")]
    assert weights == [0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    shares = [value for _, value in curve(tmp_path / "run", "train/distortion_share")]
    assert shares == [1, 1, 1, 1, 0.5, 0, 0, 0, 0, 0]


def test_a_collapsed_run_says_so_once(tmp_path: Path) -> None:
    """A learning rate of nearly 0: the model stays as it was drawn, and its generator hardly uses y."""
    folder = tmp_path / "run"
    run(f"{LINE}12 optimizer.lr=1e-12 train.validate_every=4", folder)
    assert curve(folder, "warning/generator_ignores_y") == [(4, 1), (8, 1), (12, 1)]
    assert (folder / "train.log").read_text().count("the generator ignores y") == 1
    (text,) = events(folder).Tensors("warning/generator_ignores_y/text_summary")
    assert text.step == 8  # from half of the steps on
    assert {value for _, value in curve(folder, "warning/gradient_exploded")} == {0}


def test_a_healthy_run_raises_none(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = run(f"{LINE}300 optimizer.lr=1e-2 train.log_every=50 train.validate_every=300", folder)
    for name in ALARMS:
        assert {value for _, value in curve(folder, f"warning/{name}")} == {0}, ended.said
    assert all(norm > 0 for _, norm in curve(folder, "train/gradient_norm"))


def test_a_generator_that_learns_ten_images_by_heart_says_so(tmp_path: Path) -> None:
    """And a run that was stopped past the highest bound knows it still."""
    few = "data.num_labelled=10 objective.unlabelled=0 objective.labelled=1 optimizer.lr=1e-2 train.validate_every=50"
    ended = run(f"{LINE}400 {few}", tmp_path / "run")
    assert ended.said.count("the bound of validation images fell") == 1
    raised, bounds = (curve(tmp_path / "run", tag) for tag in ("warning/bound_fell", "val/bound"))
    assert raised[0] == (50, 0)
    assert raised[-1] == (400, 1)
    assert bounds[-1][1] < 1.05 * max(bound for _, bound in bounds[:4])
    run(f"{LINE}200 {few}", tmp_path / "stopped")
    resume(tmp_path / "stopped", "train.steps=400")
    assert curve(tmp_path / "stopped", "warning/bound_fell") == raised


def test_untrained_networks_raise_no_alarm(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(f"{LINE}2 objective=supervised_only objective.labelled=0 objective.unlabelled=0", folder)
    assert not {"warning/z_unused", "warning/generator_ignores_y", "warning/bound_fell"} & set(
        events(folder).Tags()["scalars"]
    )


def test_many_classes_are_not_drawn_one_by_one(tmp_path: Path) -> None:
    run(f"{LINE}2 data.random_classes=41 data.num_labelled=41", tmp_path / "run")
    assert set(events(tmp_path / "run").Tags()["images"]) == {"reconstructions", "worst_mistakes", "calibration"}
