"""scripts.compare: its statistics against SciPy, its groups and their names, and what it writes and refuses."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import shutil
import struct
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.tensorboard.writer import SummaryWriter

from scripts import compare
from scripts.comparison import figures
from scripts.comparison.events import read_pictures, read_scalars
from scripts.comparison.groups import Comparison
from scripts.comparison.groups import compare as compared
from scripts.comparison.page import page
from scripts.comparison.report import COSTS, as_csv, as_markdown, headline
from scripts.comparison.runs import METRICS, find, read_all
from scripts.comparison.statistics import holm, paired, summarize, t_quantile, t_two_sided
from tests.runs import MLP, Ended, command, events, run

TARGETS = {
    "marginalization": "estimators.marginalization.Marginalization",
    "concrete": "mine.Concrete",
    "gumbel_softmax": "estimators.gumbel_softmax.GumbelSoftmax",
    "score_function": "estimators.score_function.ScoreFunction",
}


def make_run(
    folder: Path,
    accuracy: float,
    estimator: str = "gumbel_softmax",
    seed: int = 0,
    choices: dict[str, str] | None = None,
    overrides: list[str] | None = None,
    events: bool = False,
    result: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A finished run's folder; keys of `config` have __ for a dot."""
    (folder / ".hydra").mkdir(parents=True)
    flat = {"estimator._target_": TARGETS.get(estimator, estimator), "train.steps": 100, "seed": seed}
    flat |= {"data.split_seed": seed, "data.name": "digits", "optimizer.lr": 0.003}
    flat |= {key.replace("__", "."): value for key, value in config.items()}
    content = {"estimator": "X", "split_hash": f"hash{seed}", "steps": flat["train.steps"], "start_step": 0}
    content |= {"seconds": 10.0 + seed, "steps_per_second": 5.0, "device": "cpu", "precision": "fp32"}
    content |= {"val_accuracy": accuracy, "val_bound": -20.0, "test_accuracy": accuracy, "test_bound": -21.0 - seed}
    content |= {"val_log_likelihood": -18.0, "test_log_likelihood": -19.0, "test_bits_per_dimension": 1.5}
    content |= {"test_calibration_error": 0.01, "git_commit": "abc", "versions": {}}
    content |= {"config": flat, **(result or {})}
    (folder / "result.json").write_text(json.dumps(content))
    written = overrides or [f"estimator={estimator}", f"seed={seed}"]
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(written))
    runtime = {"choices": {"estimator": estimator, "hydra/help": "catvae", **(choices or {})}}
    (folder / ".hydra" / "hydra.yaml").write_text(json.dumps({"hydra": {"runtime": runtime}}))
    if events:
        write_events(folder)
    return folder


def write_events(folder: Path) -> None:
    with SummaryWriter(str(folder)) as writer:
        for step in (50, 100):
            writer.add_scalar("estimator/evaluations", step / 25, step)
            writer.add_scalar("val/accuracy", step / 200, step)
            writer.add_scalar("val/bound", -step, step)
        writer.add_image("generated", torch.zeros(1, 8, 8, dtype=torch.uint8), 100)


def comparison(*folders: Path, metric: str | None = None, baseline: str | None = None) -> Comparison:
    records, notes = read_all(folders)
    return compared(records, notes, metric, baseline)


def names(of: Comparison) -> list[str]:
    return [group.name for group in of.groups]


def run_compare(*folders: Path, more: str = "") -> Ended:
    return command(compare.main, f"{shlex.join(map(str, folders))} {more}")


ACCURACIES = {"marginalization": [0.91, 0.94, 0.95, 0.93], "gumbel_softmax": [0.90, 0.935, 0.93, 0.915]}


@pytest.fixture
def two_groups(tmp_path: Path) -> Path:
    for estimator, accuracies in ACCURACIES.items():
        for seed, accuracy in enumerate(accuracies):
            make_run(tmp_path / f"{estimator}-{seed}", accuracy, estimator, seed)
    return tmp_path


# ---- statistics ----


@pytest.mark.parametrize("df", [1, 2, 3, 4, 10, 29, 100, 10_000])
def test_students_distribution_is_scipys(df: int) -> None:
    for t in (0.0, 1e-3, 0.3, -1.0, 2.5, 12.0, 200.0):
        assert t_two_sided(t, df) == pytest.approx(2 * stats.t.sf(abs(t), df), rel=1e-9, abs=1e-300)
    for probability in (0.6, 0.975, 0.999):
        assert t_quantile(probability, df) == pytest.approx(stats.t.ppf(probability, df), rel=1e-9)


@pytest.mark.parametrize("n", [2, 3, 12])
def test_mean_deviation_and_interval_are_numpys_and_scipys(n: int) -> None:
    values = np.random.default_rng(n).normal(5, 2, n)
    summary = summarize(values.tolist())
    assert summary is not None
    assert summary.sd is not None
    assert summary.half is not None
    assert (summary.n, summary.mean, summary.sd) == pytest.approx((n, values.mean(), values.std(ddof=1)))
    low, high = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
    assert (summary.mean - summary.half, summary.mean + summary.half) == pytest.approx((low, high))


def test_one_value_has_no_deviation_and_none_no_summary() -> None:
    one = summarize([3.0])
    assert one is not None
    assert (one.mean, one.sd, one.half) == (3.0, None, None)
    assert summarize([]) is None


def test_the_paired_test_is_scipys_over_the_keys_that_both_have() -> None:
    draws = np.random.default_rng(0)
    a, b = draws.normal(0, 1, 6), draws.normal(0.5, 1, 6)
    group = dict(enumerate(a)) | {"only here": 100.0}
    test = paired(group, dict(enumerate(b)) | {"only there": -100.0})
    assert test is not None
    expected = stats.ttest_rel(a, b)
    assert test.difference.n == 6
    assert test.p == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval(0.95)
    assert test.difference.half is not None
    assert test.difference.mean - test.difference.half == pytest.approx(low)
    assert test.difference.mean + test.difference.half == pytest.approx(high)


def test_without_shared_keys_or_variation_there_is_no_p_value() -> None:
    assert paired({1: 0.5}, {2: 0.5}) is None
    for group, baseline in (({1: 0.5}, {1: 0.4}), ({1: 0.5, 2: 0.6}, {1: 0.4, 2: 0.5})):
        test = paired(group, baseline)
        assert test is not None
        assert test.p is None
        assert test.difference.mean == pytest.approx(0.1)


def test_holms_adjustment_against_the_definition() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


# ---- groups ----


def test_the_groups_numbers_are_those_of_the_files(two_groups: Path) -> None:
    found = comparison(two_groups)
    assert names(found) == ["marginalization", "gumbel_softmax"]
    a, b = (np.array(ACCURACIES[group.name]) for group in found.groups)
    best, other = found.groups
    accuracy = best.summaries["test_accuracy"]
    assert (accuracy.mean, accuracy.sd) == pytest.approx((a.mean(), a.std(ddof=1)))
    assert best.summaries["test_bound"].mean == pytest.approx(-22.5)
    assert best.summaries["seconds"].mean == pytest.approx(11.5)
    assert best.against_baseline is None
    assert other.against_baseline is not None
    assert other.against_baseline.difference.mean == pytest.approx((b - a).mean())
    assert other.against_baseline.p == pytest.approx(stats.ttest_rel(b, a).pvalue)
    assert other.against_baseline.p_holm == other.against_baseline.p


def test_the_metric_says_what_is_best_and_the_baseline_can_be_named(two_groups: Path) -> None:
    slow = make_run(two_groups / "slow", 0.99, "concrete", result={"seconds": 99.0})
    assert names(comparison(two_groups))[0] == "concrete"
    assert names(comparison(two_groups, metric="seconds"))[-1] == "concrete"
    named = comparison(two_groups, baseline="gumbel_softmax")
    assert named.baseline is not None
    assert named.baseline.name == "gumbel_softmax"
    ended = run_compare(two_groups, slow, more="--baseline nothing")
    assert ended.code == 2
    assert "one of 'concrete', 'marginalization', 'gumbel_softmax'; got 'nothing'" in ended.err


@pytest.fixture
def other_on_test(tmp_path: Path) -> Path:
    """The group that is best on validation images is not so on test images."""
    for seed in range(4):
        for estimator, val, test in (("marginalization", 0.95, 0.90), ("gumbel_softmax", 0.93, 0.92)):
            on_test = {"test_accuracy": test + seed / 500 * (1 + test)}
            make_run(tmp_path / f"{estimator}-{seed}", val + seed / 1000, estimator, seed, result=on_test)
    return tmp_path


def test_validation_chooses_and_test_is_reported(other_on_test: Path) -> None:
    found = comparison(other_on_test)
    assert (found.metric, found.reported) == ("val_accuracy", "test_accuracy")
    best, other = found.groups
    assert [best.name, other.name] == ["marginalization", "gumbel_softmax"]
    assert found.baseline is best
    assert other.against_baseline is not None
    assert other.against_baseline.difference.mean == pytest.approx(
        other.summaries["test_accuracy"].mean - best.summaries["test_accuracy"].mean
    )
    said = " ".join(run_compare(other_on_test).out.split())
    assert "highest val accuracy first" in said
    test = best.summaries["test_accuracy"]
    words = f"its test accuracy, on which nothing was chosen, is {test.mean:.4f} ± {test.half:.4f} (4 runs)."
    assert f"Chosen by val accuracy: marginalization; {words}" in said
    assert "Difference in test accuracy from marginalization" in said
    assert "flatters" not in said
    for file in ("compare.md", "compare.html"):
        assert words in (other_on_test / "compare" / file).read_text()


def test_another_metric_is_taken_and_told_to_flatter(other_on_test: Path) -> None:
    assert names(comparison(other_on_test, metric="test_accuracy")) == ["gumbel_softmax", "marginalization"]
    said = " ".join(run_compare(other_on_test, more="--metric test_accuracy").out.split())
    assert "On top: gumbel_softmax, with test accuracy" in said
    assert "It was chosen on that very number, which flatters it" in said
    assert "The baseline is the best of these groups on the same numbers, which flatters it" in said
    assert comparison(other_on_test, metric="val_bound").reported == "test_bound"
    assert comparison(other_on_test, metric="seconds").reported == "seconds"


def test_without_validation_images_test_accuracy_sorts_and_that_is_said(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.8, 0.9)):
        left_out = {"val_accuracy": None, "val_bound": None}
        make_run(tmp_path / str(seed), accuracy, optimizer__lr=seed + 1.0, result=left_out)
    found = comparison(tmp_path)
    assert (found.metric, names(found)) == ("test_accuracy", ["lr=2", "lr=1"])
    assert any("test accuracy sorts, which flatters" in note for note in found.notes)


def test_p_values_are_adjusted_for_all_groups(two_groups: Path) -> None:
    for seed, accuracy in enumerate([0.80, 0.84, 0.81, 0.85]):
        make_run(two_groups / f"concrete-{seed}", accuracy, "concrete", seed)
    tests = [group.against_baseline for group in comparison(two_groups).groups[1:]]
    p = [test.p for test in tests if test and test.p is not None]
    assert len(p) == 2
    assert [test.p_holm for test in tests if test] == pytest.approx([max(2 * min(p), q) for q in p])


def test_choices_name_groups_and_what_comes_along_with_them_does_not(tmp_path: Path) -> None:
    score: dict[str, Any] = {"estimator": "score_function", "estimator__num_samples": 1}
    for number, (baseline, samples) in enumerate([("learned", 1), ("leave_one_out", 2), ("leave_one_out", 4)]):
        target = {"estimator.baseline._target_": f"estimators.score_function.{baseline}"}
        config = score | target | {"estimator__num_samples": samples}
        make_run(tmp_path / f"{number}", 0.9 - number / 100, choices={"estimator/baseline": baseline}, **config)
    annealed: dict[str, Any] = {"estimator__temperature___target_": "estimators.schedules.exponential"}
    constant: dict[str, Any] = {
        "estimator__temperature___target_": "estimators.schedules.constant",
        "estimator__kl": "relaxed",
    }
    make_run(tmp_path / "3", 0.5, "gumbel_softmax", choices={"schedule@estimator.temperature": "e"}, **annealed)
    make_run(tmp_path / "4", 0.4, "concrete", choices={"schedule@estimator.temperature": "c"}, **constant)
    assert names(comparison(tmp_path)) == [
        "score_function/learned",
        "score_function/leave_one_out num_samples=2",
        "score_function/leave_one_out num_samples=4",
        "gumbel_softmax",
        "concrete",
    ]


def test_keys_name_groups_where_the_choice_is_the_same(tmp_path: Path) -> None:
    for number, (lr, steps) in enumerate([(0.003, 100), (0.01, 100), (0.01, 200)]):
        make_run(tmp_path / f"{number}", 0.9 - number / 100, optimizer__lr=lr, train__steps=steps)
    assert names(comparison(tmp_path)) == ["steps=100 lr=0.003", "steps=100 lr=0.01", "steps=200 lr=0.01"]


def test_what_has_no_effect_makes_no_group(tmp_path: Path) -> None:
    make_run(tmp_path / "0", 0.9, seed=0, data__root="/here", train__log_every=1, resume=None)
    make_run(tmp_path / "1", 0.8, seed=1, data__root="/there", train__log_every=2, resume="x", deterministic=False)
    (group,) = comparison(tmp_path).groups
    assert (group.name, len(group.runs)) == ("gumbel_softmax", 2)


def test_a_key_that_follows_another_is_not_named(tmp_path: Path) -> None:
    for steps in (100, 200):
        folder = make_run(tmp_path / f"{steps}", 0.9, train__steps=steps, lr_factor__steps=steps)
        text = "train:\n  steps: 1\nlr_factor:\n  steps: ${train.steps}\n"
        (folder / ".hydra" / "config.yaml").write_text(text)
    assert set(names(comparison(tmp_path))) == {"steps=100", "steps=200"}


def test_what_the_machine_chose_counts_and_not_auto(tmp_path: Path) -> None:
    for number, precision in enumerate(["fp32", "bf16"]):
        make_run(tmp_path / precision, 0.9 - number / 10, precision="auto", result={"precision": precision})
    assert names(comparison(tmp_path)) == ["precision=fp32", "precision=bf16"]


def test_a_table_for_a_paper(other_on_test: Path) -> None:
    """A row a group, of which booktabs makes a table: no character of a name is taken for a command."""
    make_run(other_on_test / "one", 0.5, rf"{NASTY} 50% of a_b^c, $5 #1 {{x}} ~\y")
    assert run_compare(other_on_test).code == 0
    table = (other_on_test / "compare" / "compare.tex").read_text()
    rows = [line for line in table.splitlines() if line.endswith(r" \\")]
    assert [row.count(" & ") for row in rows] == [rows[0].count(" & ")] * 4
    assert rows[0].startswith("group & $n$ & val accuracy & test accuracy")
    best = comparison(other_on_test).groups[0].summaries["val_accuracy"]
    assert rows[1].startswith(f"marginalization & 4 & ${best.mean:.4f} \\pm {best.half:.4f}$ (${best.sd:.4f}$) & ")
    assert rows[3].partition(" & ")[2].startswith("1 & $0.5000$ & ")
    assert not re.search(r"(?<!\\)[%&#_$]", rows[3].partition(" & ")[0])


def test_a_tie_is_said(tmp_path: Path) -> None:
    for estimator, accuracy in (("marginalization", 0.9), ("gumbel_softmax", 0.9), ("rebar", 0.8)):
        make_run(tmp_path / estimator, accuracy, estimator, result={"test_accuracy": 0.5})
    said = " ".join(run_compare(tmp_path).out.split())
    assert re.search(r"Chosen by val accuracy: (marginalization|gumbel_softmax) \((?!\1)\w+ has the same\); its", said)


def test_a_run_of_ones_own_code_is_repeated_with_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/home/me/mine")
    overrides = ["estimator=sparsemax", "estimator._target_=mine.Mine"]
    asked = {"overrides": overrides, "choices": {"estimator": "sparsemax"}, "references": {}}
    make_run(tmp_path / "run", 0.9, "sparsemax", result={"asked": asked})
    assert f"PYTHONPATH=/home/me/mine uv run train.py {' '.join(overrides)}" in as_csv(comparison(tmp_path))


def test_without_a_record_of_choices_the_class_is_the_name(tmp_path: Path) -> None:
    for number, estimator in enumerate(["marginalization", "concrete"]):
        folder = make_run(tmp_path / estimator, 0.9 - number / 10, estimator)
        for path in (folder / ".hydra").iterdir():
            path.unlink()
    assert names(comparison(tmp_path)) == ["Marginalization", "Concrete"]


def test_a_run_is_what_its_result_says(tmp_path: Path) -> None:
    """And not what another job has written to .hydra/ since."""
    for number, estimator in enumerate(["gumbel_softmax", "marginalization"]):
        asked = {"overrides": [f"estimator={estimator}", "a b"], "choices": {"estimator": estimator}, "references": {}}
        folder = make_run(tmp_path / f"new{number}", 0.9 - number / 10, estimator, result={"asked": asked})
        (folder / ".hydra" / "hydra.yaml").write_text('{"hydra": {"runtime": {"choices": {"estimator": "rebar"}}}}')
    found = comparison(tmp_path)
    assert names(found) == ["gumbel_softmax", "marginalization"]
    assert "uv run train.py estimator=marginalization 'a b'" in as_csv(found)
    for number, estimator in enumerate(["gumbel_softmax", "marginalization"]):
        folder = make_run(tmp_path / "old" / f"{number}", 0.9 - number / 10, estimator, choices={"estimator": "rebar"})
        (folder / ".hydra" / "config.yaml").write_text("estimator: {_target_: another.one}")
    found = comparison(tmp_path / "old")
    assert names(found) == ["GumbelSoftmax", "Marginalization"]


def test_a_repeated_draw_counts_once(tmp_path: Path) -> None:
    old = make_run(tmp_path / "old", 0.5)
    make_run(tmp_path / "new", 0.9)
    os.utime(old / "result.json", (1, 1))
    found = comparison(tmp_path)
    assert [len(group.runs) for group in found.groups] == [1]
    assert found.groups[0].summaries["test_accuracy"].mean == 0.9
    assert any("old repeats" in note for note in found.notes)
    assert [row["status"] for row in rows_of(tmp_path)] == ["counted", "repeat"]


# ---- bounds of other pixels ----


KINDS: dict[str, dict[str, Any]] = {
    "none": {"likelihood": "bernoulli", "data__binarization": "none"},
    "dynamic": {"likelihood": "bernoulli", "data__binarization": "dynamic"},
    "fixed": {"likelihood": "bernoulli", "data__binarization": "fixed"},
    "grey": {"likelihood": "discretized_logistic", "data__binarization": "none"},
    "other data": {"likelihood": "bernoulli", "data__binarization": "dynamic", "data__name": "mnist"},
}


@pytest.fixture
def other_pixels(tmp_path: Path) -> Path:
    """Two estimators with two draws for each kind of pixels; bounds of each kind are far from those of the others."""
    for place, (kind, config) in enumerate(KINDS.items()):
        for estimator in ("marginalization", "gumbel_softmax"):
            for seed in (0, 1):
                bound = -100.0 * (place + 1) - (estimator == "gumbel_softmax") - 0.1 * seed
                make_run(
                    tmp_path / kind / f"{estimator}-{seed}",
                    0.9 + place / 100,
                    estimator,
                    seed,
                    result={"test_bound": bound, "test_log_likelihood": bound + 1},
                    events=True,
                    **config,
                )
    return tmp_path


@pytest.mark.parametrize("metric", [name for name in METRICS if METRICS[name].of_pixels])
def test_bounds_are_ranked_and_subtracted_among_the_same_pixels_alone(metric: str, other_pixels: Path) -> None:
    found = comparison(other_pixels, metric=metric)
    assert len(found.parts) == len(KINDS)
    assert sorted(map(len, [part.groups for part in found.parts])) == [2] * len(KINDS)
    for part in found.parts:
        assert len({run.pixels for group in part.groups for run in group.runs}) == 1
        base, other = part.groups
        assert part.baseline is base
        assert other.against_baseline is not None
        assert abs(other.against_baseline.difference.mean) < 50
    said = run_compare(other_pixels, more=f"--metric {metric}").out
    assert said.count("== Bounds of data.name=") == len(KINDS)
    assert "neither ranked nor subtracted across them" in " ".join(said.split())
    for text in (as_markdown(found), page(found)):
        for part in found.parts:
            assert part.pixels in text
    ElementTree.fromstring(page(found))


def test_beside_accuracies_bounds_are_in_tables_of_their_own(other_pixels: Path) -> None:
    """And accuracies of other data sets in rankings of their own."""
    found = comparison(other_pixels)
    assert found.apart == "data set"
    assert len(found.parts) == 2
    for part in found.parts:
        assert len({group.data for group in part.groups}) == 1
        tested = [group for group in part.groups if group.against_baseline is not None]
        assert len(tested) == len(part.groups) - 1  # accuracies of other pixels can be subtracted
    out = run_compare(other_pixels).out
    assert "ranked apart for each data set" in out
    ranked, *apart = out.split("== Bounds of ")
    assert "test bound" not in ranked.partition("mean ±")[0]
    assert all("test bound" in part and "not ranked ==" in part for part in apart)
    (several,) = (part for part in found.parts if part.parts)
    assert len(apart) == len(several.parts) == len(KINDS) - 1
    html = page(found)
    assert all(f"Bounds of {part.pixels}" in html for part in several.parts)
    assert all(f"Groups: {part.data}" in html for part in found.parts)


def test_what_bounds_are_of_is_said_of_one_kind_too(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 0.9, **KINDS["none"])
    assert "bounds are from below, of E[log p(b)], b drawn from the grey levels, for data" in " ".join(
        run_compare(tmp_path).out.split()
    )
    make_run(tmp_path / "b", 0.9, seed=1, **KINDS["none"] | {"prior": "labelled"})
    assert not comparison(tmp_path).parts  # the same pixels under another p(y) are the same numbers


def test_own_images_are_told_apart_by_their_digest(tmp_path: Path) -> None:
    """Not by their path: the same images may have been moved, and others put in their place."""
    for seed, (folder, digest) in enumerate({"here": "abc", "there": "abc", "moved": "def"}.items()):
        data: dict[str, Any] = {"data__name": "arrays", "data__path": f"{folder}.npz", "data__binarization": "none"}
        made = make_run(tmp_path / folder, 0.9, seed=seed, **data)
        (made / "split.json").write_text(json.dumps({"digest": digest}))
    found = comparison(tmp_path, metric="test_bound")
    assert sorted(len(group.runs) for group in found.groups) == [1, 2]
    assert len(found.parts) == 2


def test_a_run_from_before_there_was_a_setting_did_what_the_program_then_did(tmp_path: Path) -> None:
    """SiLU became the default of convolutional networks when `model.activation` came; older runs are ReLU's."""
    conv: dict[str, Any] = {"model___target_": "models.networks.conv"}
    other: dict[str, Any] = {"model___target_": "models.networks.mlp"}
    now: dict[str, Any] = {"model__distortion": 0.0, "train__clip_gradient": None}
    folders = [
        make_run(tmp_path / "old", 0.90, seed=0, **conv),
        make_run(tmp_path / "relu", 0.92, seed=1, **conv, **now, model__activation="relu"),
        make_run(tmp_path / "silu", 0.94, seed=2, **conv, **now, model__activation="silu"),
    ]
    groups = {group.name: len(group.runs) for group in comparison(*folders).groups}
    assert groups == {"activation=silu": 1, "activation=relu": 2}
    records, _ = read_all([*folders, make_run(tmp_path / "mlp", 0.9, seed=3, **other)])
    assert "model.activation" not in records[-1].config  # which no run of that model has


def test_a_run_from_before_there_was_a_rate_s_schedule_had_a_constant_one(tmp_path: Path) -> None:
    cosine = {"lr_factor___target_": "estimators.schedules.cosine", "lr_factor__start": 1.0}
    make_run(tmp_path / "old", 0.9, seed=0)
    make_run(tmp_path / "new", 0.8, seed=1, **cosine)  # type: ignore[arg-type]
    assert [len(group.runs) for group in comparison(tmp_path).groups] == [1, 1]


def test_a_classifier_alone_changes_no_other_s_name(tmp_path: Path) -> None:
    for name, estimator, weight in (("a", "gumbel_softmax", 1.0), ("b", "marginalization", 1.0), ("c", "rebar", 0.0)):
        weights: dict[str, Any] = {"objective__labelled": weight, "objective__unlabelled": weight}
        make_run(tmp_path / name, 0.9, estimator, **weights, objective__samples=1, objective__kl_warmup=0)
    make_run(tmp_path / "old", 0.9, "marginalization", seed=1, objective__labelled=1.0, objective__unlabelled=1.0)
    groups = {group.name: len(group.runs) for group in comparison(tmp_path).groups}
    assert groups == {"gumbel_softmax": 1, "marginalization": 2, "classifier alone": 1}
    of_pixels = {name for name, metric in METRICS.items() if metric.of_pixels}
    (alone,) = (group for group in comparison(tmp_path).groups if group.name == "classifier alone")
    assert not of_pixels & set(alone.summaries)  # the generator was not trained


def test_settings_are_named_in_their_order_though_an_older_run_has_not_all(tmp_path: Path) -> None:
    make_run(tmp_path / "0 old", 0.9, optimizer__lr=0.001)
    for balanced in (True, False):
        make_run(tmp_path / f"{balanced}", 0.8, optimizer__lr=0.01, data__balanced=balanced)
    names = {group.name for group in comparison(tmp_path).groups}
    assert names == {"lr=0.001 balanced=true", "lr=0.01 balanced=true", "lr=0.01 balanced=false"}


def test_a_run_from_before_there_was_a_choice_is_bernoulli(tmp_path: Path) -> None:
    make_run(tmp_path / "old", 0.9, data__binarization="none")
    make_run(tmp_path / "new", 0.9, seed=1, **KINDS["none"])
    assert len(comparison(tmp_path, metric="test_bound").groups) == 1


def test_log_likelihoods_of_other_data_have_their_own_number_of_samples(tmp_path: Path) -> None:
    for seed, (name, samples) in enumerate([("digits", 10), ("digits", 10), ("mnist", 1000)]):
        make_run(tmp_path / f"{seed}", 0.9, seed=seed, data__name=name, evaluation__importance_samples=samples)
    found = comparison(tmp_path)
    assert {group.data: group.summaries["test_log_likelihood"].n for group in found.groups} == {
        "data.name=digits": 2,
        "data.name=mnist": 1,
    }
    assert not any("importance_samples" in note for note in found.notes)


def test_runs_are_found_behind_links_and_once(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path / "runs" / f"{seed}", 0.9, seed=seed)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a").symlink_to(tmp_path / "runs" / "0")
    (tmp_path / "links" / "again").symlink_to(tmp_path / "runs" / "0")
    (tmp_path / "links" / "around").symlink_to(tmp_path / "links")
    make_run(tmp_path / "links" / "own", 0.8, seed=2)
    assert [path.name for path in find([tmp_path / "links"])] == ["a", "own"]
    assert len(find([tmp_path])) == 3


@pytest.mark.parametrize("name", ["a", os.fsdecode(b"caf\xe9")])
def test_what_a_page_cannot_hold_stops_no_figures(name: str, tmp_path: Path) -> None:
    """A log that a power cut has left, and a name that is not UTF-8."""
    make_run(tmp_path / "runs" / "whole", 0.9)
    begun = make_run(tmp_path / "runs" / name, 0.9, seed=1)
    (begun / "result.json").unlink()
    (begun / "checkpoints").mkdir()
    (begun / ".hydra" / "config.yaml").write_text("train: {steps: 100}\n")
    (begun / "train.log").write_bytes(b"half a line\0\0\x1b\xff")
    ended = run_compare(tmp_path / "runs", more=f"--output {tmp_path / 'out'} --figures")
    assert ended.code == 0, ended.said
    html = (tmp_path / "out" / "compare.html").read_text()
    assert "half a line" in html
    ElementTree.fromstring(html)
    assert list((tmp_path / "out").glob("*.svg"))


@pytest.mark.parametrize("strange", [{"versions": 3}, {"split_hash": ["a"]}])
def test_a_result_of_something_else_is_left_out(strange: dict[str, Any], tmp_path: Path) -> None:
    make_run(tmp_path / "own", 0.9)
    make_run(tmp_path / "other", 0.9, seed=1, result=strange)
    ended = run_compare(tmp_path)
    assert ended.code == 0, ended.said
    assert f"result.json is not one of a run: {next(iter(strange))} is" in " ".join(ended.out.split())
    assert "1 finished run in 1 group" in ended.out


def test_log_likelihoods_by_different_numbers_of_samples_are_not_mixed(tmp_path: Path) -> None:
    for seed, (samples, value) in enumerate([(5, -10.0), (5, -12.0), (1, -30.0)]):
        result = {"test_log_likelihood": value}
        make_run(tmp_path / f"{seed}", 0.9, seed=seed, evaluation__importance_samples=samples, result=result)
    found = comparison(tmp_path)
    (group,) = found.groups
    assert (group.summaries["test_log_likelihood"].n, group.summaries["test_log_likelihood"].mean) == (2, -11.0)
    assert group.summaries["test_accuracy"].n == 3
    assert any("importance_samples=5" in note for note in found.notes)
    assert float(rows_of(tmp_path)[2]["test_log_likelihood"]) == -30.0
    assert "-11.00 ± 12.71 [n 2]" in run_compare(tmp_path).out
    every_run = as_markdown(found).partition("Every run:")[2]
    assert "-10.00" in every_run
    assert "-30.00" not in every_run


@pytest.mark.parametrize(("key", "usual", "other"), [("pixel_draws", 1, 10), ("classify_by", "classifier", "both")])
def test_runs_that_classify_otherwise_are_different_groups(key: str, usual: Any, other: Any, tmp_path: Path) -> None:
    for seed, accuracy in enumerate([0.8, 0.6]):
        make_run(tmp_path / f"from before {seed}", accuracy, seed=seed)
    make_run(tmp_path / "usual", 0.7, seed=2, **{f"evaluation__{key}": usual})
    make_run(tmp_path / "other", 0.99, seed=3, **{f"evaluation__{key}": other})
    first, second = sorted(comparison(tmp_path).groups, key=lambda group: len(group.runs), reverse=True)
    assert first.summaries["test_accuracy"].n == 3
    assert first.summaries["test_accuracy"].mean == pytest.approx(0.7)
    assert f"{key}={other}" in second.name


def test_numbers_that_would_mislead_are_left_out_and_said(tmp_path: Path) -> None:
    make_run(tmp_path / "0", 0.9, seed=0, result={"test_bound": float("nan")})
    make_run(tmp_path / "1", 0.8, seed=1, result={"start_step": 50, "seconds": 1.0})
    found = comparison(tmp_path)
    (group,) = found.groups
    assert (group.summaries["test_bound"].n, group.summaries["seconds"].n) == (1, 1)
    assert group.summaries["seconds"].mean == 10.0
    assert len(found.notes) == 3  # and no events


def test_groups_without_shared_draws_are_not_tested(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 0.9, "marginalization", seed=0)
    make_run(tmp_path / "b", 0.8, "gumbel_softmax", seed=1)
    ended = run_compare(tmp_path)
    assert ended.code == 0, ended.said
    assert "No group has a draw (same split, same seed) in common with marginalization" in ended.out
    assert "no shared draws" in ended.out
    assert re.search(r"marginalization +1 +0\.9000 ± – +–", ended.out)
    ElementTree.fromstring((tmp_path / "compare" / "compare.html").read_text())


# ---- finished, killed and damaged runs ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two estimators by two draws, and one that diverged."""
    folder = tmp_path_factory.mktemp("trained")
    for estimator in ("marginalization", "gumbel_softmax"):
        for seed in (0, 1):
            line = f"{MLP} estimator={estimator} seed={seed} data.split_seed={seed} train.steps=12"
            run(line, folder / f"{estimator}-{seed}")
    run(f"{MLP} estimator=gumbel_softmax train.steps=12 optimizer.lr=1e30", folder / "diverged", code=3)
    return folder


def rows_of(folder: Path) -> list[dict[str, str]]:
    assert run_compare(folder).code == 0
    return list(csv.DictReader(io.StringIO((folder / "compare" / "compare.csv").read_text())))


def test_runs_of_the_trainer(trained: Path) -> None:
    rows = rows_of(trained)
    assert [row["status"] for row in rows] == ["counted"] * 4 + ["unfinished"]
    for row in rows[:4]:
        result = json.loads(Path(row["folder"], "result.json").read_text())
        assert all(float(row[name]) == result[name] for name in METRICS if name in result)
        assert float(row["evaluations"]) == {"marginalization": 10, "gumbel_softmax": 1}[row["group"]]
        assert f"estimator={row['group']}" in row["command"]
    assert rows[4]["test_accuracy"] == ""
    assert "lr=1e+30" in rows[4]["group"]


def test_a_killed_run_is_told_apart_and_counts_in_no_mean(trained: Path, tmp_path: Path) -> None:
    killed = tmp_path / "gumbel_softmax-0"
    shutil.copytree(trained / "gumbel_softmax-0", killed)
    (killed / "result.json").unlink()
    config = killed / ".hydra" / "config.yaml"  # what auto came to is only in result.json
    config.write_text(config.read_text().replace("precision: fp32", "precision: auto"))
    folders = [trained / "marginalization-0", trained / "marginalization-1", trained / "gumbel_softmax-1", killed]
    found = comparison(*folders)
    assert {group.name: len(group.runs) for group in found.groups} == {"marginalization": 2, "gumbel_softmax": 1}
    ((name, record),) = found.unfinished
    assert (name, record.steps, record.folder) == ("gumbel_softmax", 12, killed)
    ended = run_compare(*folders, more=f"--output {tmp_path / 'out'}")
    assert "in no mean above" in ended.out
    assert f"{killed} (gumbel_softmax): 12 of 12 steps, val accuracy" in ended.out
    for path in ("compare.md", "compare.html"):
        assert "gumbel_softmax-0" in (tmp_path / "out" / path).read_text()


def test_only_unfinished_runs_are_still_listed(trained: Path, tmp_path: Path) -> None:
    ended = run_compare(trained / "diverged", more=f"--output {tmp_path}")
    assert ended.code == 0, ended.said
    assert "no finished run" in ended.out
    assert "labelled_bound is nan at step 1" in ended.out
    ElementTree.fromstring((tmp_path / "compare.html").read_text())


def test_a_damaged_run_is_named_and_the_others_are_compared(two_groups: Path) -> None:
    (two_groups / "marginalization-0" / "result.json").write_text('{"steps": ')
    (two_groups / "marginalization-1" / "result.json").write_text("[]")
    (two_groups / "marginalization-2" / ".hydra" / "hydra.yaml").write_text("{")
    write_events(two_groups / "gumbel_softmax-0")
    (event_file,) = (two_groups / "gumbel_softmax-0").glob("events*")
    event_file.write_bytes(b"\xff" * 100)
    ended = run_compare(two_groups)
    assert (ended.code, ended.err) == (0, "")
    said = " ".join(ended.out.split())
    for name, reason in (("0", "result.json cannot be read"), ("1", "result.json cannot"), ("2", ".hydra/ cannot be")):
        assert re.search(rf"marginalization-{name} is left out: its {re.escape(reason)}", said)
    assert "gumbel_softmax-0" in said[said.index("no curves and no calls of") :]
    assert re.search(r"gumbel_softmax +4 ", ended.out)
    assert re.search(r"marginalization +1 ", ended.out)


def test_events_are_read_as_tensorboard_reads_them(trained: Path, tmp_path: Path) -> None:
    """Of a run, of one that was stopped and resumed, which made some events void, and of one cut short."""
    shutil.copytree(trained / "marginalization-0", tmp_path / "whole")
    shutil.copytree(trained / "marginalization-1", tmp_path / "cut")
    (file,) = (tmp_path / "cut").rglob("events*")
    file.write_bytes(file.read_bytes()[:-7])
    resumed = tmp_path / "resumed"
    for purge in (None, 3, 2):
        with SummaryWriter(str(resumed), purge_step=purge, filename_suffix=f".{purge}") as writer:
            for step in range(purge or 1, 6):
                writer.add_scalar("val/accuracy", step / (purge or 1), step)
                writer.add_image("generated", torch.full((1, 8, 8), step, dtype=torch.uint8), step)
    for folder in (tmp_path / "whole", tmp_path / "cut", resumed):
        theirs = events(folder)
        tags = theirs.Tags()["scalars"]
        assert tags
        assert read_scalars(folder, tags) == {tag: [(e.step, e.value) for e in theirs.Scalars(tag)] for tag in tags}
        last = {tag: theirs.Images(tag)[-1] for tag in theirs.Tags()["images"]}
        assert read_pictures(folder) == {tag: (e.encoded_image_string, e.step) for tag, e in last.items()}
    assert read_scalars(tmp_path / "whole", ["val/bound"]).keys() == {"val/bound"}


def test_pictures_cost_no_time(tmp_path: Path) -> None:
    """Their CRCs, which are wrong here, are not computed: in Python that takes seconds for these 60 MB."""
    folder = make_run(tmp_path / "run", 0.9, events=True)
    (file,) = folder.glob("events*")
    picture = bytes(2**20)
    with file.open("ab") as out:
        for _ in range(60):
            out.write(struct.pack("<QI", len(picture), 0) + picture + struct.pack("<I", 0))
    start = time.process_time()
    assert read_scalars(folder, ["val/accuracy"]) == {"val/accuracy": [(50, 0.25), (100, 0.5)]}
    assert time.process_time() - start < 1


@pytest.mark.slow
def test_200_runs_of_a_real_length_take_15_seconds(tmp_path: Path) -> None:
    """3.4 MB of events each, as 300 steps of digits with a validation, and pictures, every 8 write."""
    run(
        "data=digits model=mlp train.steps=300 train.log_every=1 train.validate_every=8 train.pictures_every=8",
        tmp_path / "one",
    )
    for number in range(200):
        folder = tmp_path / "many" / str(number)
        shutil.copytree(tmp_path / "one", folder, copy_function=os.link)
        changed = json.loads((folder / "result.json").read_text())
        (folder / "result.json").unlink()
        changed["seed"] = changed["config"]["seed"] = changed["config"]["data.split_seed"] = number % 5
        changed["config"]["objective.alpha"] = 1.1 ** (number // 5)
        (folder / "result.json").write_text(json.dumps(changed))
    assert sum(file.stat().st_size for file in (tmp_path / "one").rglob("events*")) > 3e6
    start = time.process_time()
    assert run_compare(tmp_path / "many").code == 0
    assert time.process_time() - start < 15


def test_bad_input_is_refused_in_one_sentence(tmp_path: Path) -> None:
    good, empty = make_run(tmp_path / "good", 0.9), tmp_path / "empty"
    empty.mkdir()
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "result.json").write_text("{}")
    for folders, said in (
        ([empty], "no run in"),
        ([good, empty], "no run in"),
        ([tmp_path / "nowhere"], "nowhere is not a folder"),
        ([good / "result.json"], "result.json is not a folder"),
        ([bad], "no run can be read: "),
    ):
        ended = run_compare(*folders)
        assert (ended.code, ended.out) == (2, "")
        assert ended.err.startswith("catvae: ")
        assert ended.err.count("\n") == 1
        assert said in ended.err


def test_a_metric_that_no_run_has_is_refused(two_groups: Path) -> None:
    ended = run_compare(two_groups, more="--metric evaluations")
    assert (ended.code, ended.out) == (2, "")
    assert "--metric must be one that a finished run has, got evaluations" in ended.err


def test_a_folder_given_twice_counts_once_and_reports_go_beside_a_run(tmp_path: Path) -> None:
    one, other = make_run(tmp_path / "one", 0.9), make_run(tmp_path / "other", 0.8, seed=1)
    ended = run_compare(one, other, one, tmp_path)
    assert "2 finished runs in 1 group" in ended.out
    written = [tmp_path / "compare" / f"compare.{suffix}" for suffix in ("csv", "md", "tex", "html")]
    assert ended.out.splitlines()[-4:] == list(map(str, written))
    assert sorted((tmp_path / "compare").iterdir()) == sorted(written)


# ---- what it writes ----


def test_the_terminals_table_is_aligned_and_best_first(two_groups: Path) -> None:
    lines = run_compare(two_groups).out.splitlines()
    head, first, second = lines[2:5]
    assert first.split()[:3] == ["1", "marginalization", "4"]
    assert second.split()[:3] == ["2", "gumbel_softmax", "4"]
    assert first.split()[3:7] == ["0.9325", "±", "0.0272", "0.0171"]
    assert head.index("val accuracy") + len("val accuracy") == first.index("0.0272") + 6
    assert len({len(line) for line in (head, first, second)}) == 1


def test_markdown_has_a_row_a_group(two_groups: Path) -> None:
    run_compare(two_groups)
    lines = (two_groups / "compare" / "compare.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| 1 ")]
    assert rows[0].startswith("| 1 | `marginalization` | 4 | 0.9325 ± 0.0272 (0.0171) | 0.9325 ± 0.0272 (0.0171) |")
    head = next(line for line in lines if "test accuracy" in line and line.startswith("|"))
    assert head.count("|") == rows[0].count("|")


def test_markdown_shows_every_run_in_the_order_of_its_seed(tmp_path: Path) -> None:
    for seed in (10, 2, 0):
        make_run(tmp_path / str(seed), 0.9 + seed / 1000, seed=seed)
    (table,) = [block for block in as_markdown(comparison(tmp_path)).split("\n\n") if "| split_seed |" in block]
    cells = [[cell.strip() for cell in row.split("|")] for row in table.splitlines()[2:]]
    seed, accuracy = (table.splitlines()[0].split("|").index(f" {name} ") for name in ("seed", "test accuracy"))
    assert [(row[seed], row[accuracy]) for row in cells] == [("0", "0.9000"), ("2", "0.9020"), ("10", "0.9100")]


NASTY = """<script>&"'|`x"""


def test_the_page_is_well_formed_loads_nothing_and_escapes_names(tmp_path: Path) -> None:
    for number in range(3):
        for seed in (0, 1):
            folder = tmp_path / f"<{number}&-{seed}"
            accuracy = 0.9 - number / 50 - seed / (20 + number)
            config: dict[str, Any] = {"estimator__kl": f"{NASTY}{number}"}
            make_run(folder, accuracy, seed=seed, events=True, overrides=[NASTY], **config)
    html = page(comparison(tmp_path))
    root = ElementTree.fromstring(html)
    assert not list(root.iter("script"))
    assert not list(root.iter("link"))
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html
    sources = [value for element in root.iter() for key, value in element.items() if key in ("src", "href")]
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png;base64,")
    shown = " ".join("".join(root.itertext()).split())
    assert f"kl={NASTY}0" in shown
    assert f"uv run train.py {shlex.quote(NASTY)}" in shown


def many(folder: Path, groups: int) -> Comparison:
    for number in range(groups):
        for seed in (0, 1):
            path = make_run(folder / f"{number}-{seed}", 0.9 - number / 100, seed=seed, optimizer__lr=number + 1.0)
            write_events(path)
    return comparison(folder)


@pytest.mark.parametrize("groups", [1, 3, 9])
def test_the_figures_show_every_group(groups: int, tmp_path: Path) -> None:
    found = many(tmp_path, groups)
    root = ElementTree.fromstring(page(found))
    drawings = list(root.iter("svg"))
    labels = [drawing.get("aria-label") or "" for drawing in drawings]
    in_panels = groups > figures.COLOURS
    assert sum("against steps" in label for label in labels) == (2 * groups if in_panels else 4)
    assert sum("against calls" in label for label in labels) == 2  # for a desktop and a phone
    assert sum("differences" in label for label in labels) == (2 if groups > 1 else 0)
    against_calls = next(d for d in drawings if "against calls" in (d.get("aria-label") or ""))
    assert sum("rank" in (t.get("class") or "") for t in against_calls.iter("text")) == groups
    numbers = [float(x) for d in drawings for c in d.iter("circle") for x in (c.get("cx") or "", c.get("cy") or "")]
    assert all(0 <= x <= 760 for x in numbers)
    colours = {figures.colour(found, group) for group in found.groups}
    assert len(colours) == (2 if in_panels else groups)


def swept(folder: Path, key: str, values: list[Any], **more: Any) -> None:
    for place, value in enumerate(values):
        for estimator in ("marginalization", "gumbel_softmax"):
            for seed in (0, 1):
                accuracy = 0.9 + place / 100 + seed / 500 - (estimator == "gumbel_softmax") / 50
                path = folder / f"{estimator}-{value}-{seed}"
                make_run(path, accuracy, estimator, seed, **{key.replace(".", "__"): value}, **more)


@pytest.mark.parametrize(
    ("key", "values", "is_log"),
    [
        ("objective.alpha", [0.1, 1, 10.0], True),
        ("data.num_labelled", [20, 50, 100], False),
        ("objective.alpha", [0, 1, 100], False),  # no logarithm of 0
    ],
)
def test_a_figure_against_a_swept_number(key: str, values: list[float], is_log: bool, tmp_path: Path) -> None:
    """A line for each other setting, with a point and an interval for each value."""
    swept(tmp_path, key, values)
    root = ElementTree.fromstring(page(comparison(tmp_path)))
    for metric in ("val accuracy", "test accuracy"):
        drawings = [d for d in root.iter("svg") if d.get("aria-label") == f"{metric} against {key}"]
        assert len(drawings) == 2  # for a desktop and a phone
        lines = [line.get("points", "").split() for line in drawings[0].iter("polyline")]
        assert [len(line) for line in lines] == [3, 3]
        places = [float(point.partition(",")[0]) for point in lines[0]]
        steps = np.diff(np.log(values) if is_log else values)
        assert np.diff(places) / steps == pytest.approx([(places[2] - places[0]) / steps.sum()] * 2, abs=0.1)
        heights = [float(point.partition(",")[2]) for point in lines[0]]
        assert heights == sorted(heights, reverse=True)  # better is higher
        assert sum("whisker" in (part.get("class") or "") for part in drawings[0].iter("line")) == 6
        words = [text.text or "" for text in drawings[0].iter("text")]
        assert {"marginalization", "gumbel_softmax"} <= set(words)
        assert (f"{key}, logarithmic" in words) == is_log


@pytest.mark.parametrize("values", [["all", "none", "some"], [True, False, True]])
def test_what_is_no_number_has_no_such_figure(values: list[Any], tmp_path: Path) -> None:
    swept(tmp_path / "runs", "data.labelled", values[: len(set(values))])
    assert "against data.labelled" not in page(comparison(tmp_path))


def test_numbers_that_come_along_with_a_choice_have_no_such_figure(tmp_path: Path) -> None:
    make_run(tmp_path / "1", 0.9, "marginalization", estimator__num_samples=1)
    make_run(tmp_path / "2", 0.8, "gumbel_softmax", estimator__num_samples=5)
    assert "against estimator.num_samples" not in page(comparison(tmp_path))


def test_figures_as_files_of_their_own(tmp_path: Path) -> None:
    for value in (0.1, 1, 10.0):
        for seed in (0, 1):
            make_run(tmp_path / f"{value}-{seed}", 0.9 + value / 200, seed=seed, objective__alpha=value, events=True)
    ended = run_compare(tmp_path, more="--figures")
    written = sorted((tmp_path / "compare").glob("*.svg"))
    assert [str(path) for path in written] == sorted(line for line in ended.out.splitlines() if line.endswith(".svg"))
    kinds = {"val_accuracy_against_objective_alpha", "test_accuracy_against_objective_alpha"}
    kinds |= {"val_accuracy_against_steps", "val_bound_against_steps", "test_accuracy_against_calls_per_image"}
    kinds |= {"test_accuracy_against_seconds", "differences_in_test_accuracy_from_the_baseline"}
    assert {path.stem for path in written} == {f"compare_{kind}" for kind in kinds}
    for path in written:
        content = path.read_text()
        root = ElementTree.fromstring(content)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in content
        assert "undefined" not in content
        words = "".join(root.itertext())
        assert all(f"alpha={value}" in words for value in ("0.1", "1", "10")) or "against_objective_alpha" in path.stem


def test_curves_and_calls_are_the_events(tmp_path: Path) -> None:
    (group,) = many(tmp_path, 1).groups
    curves = figures.curves_of(group, "val_accuracy")
    assert curves is not None
    assert (curves.steps, curves.mean, curves.low, curves.high) == ([50, 100], [0.25, 0.5], [0.25, 0.5], [0.25, 0.5])
    assert group.summaries["evaluations"].mean == 3.0
    assert group.summaries["evaluations"].half == 0.0


@pytest.mark.parametrize("metric", list(METRICS))
def test_any_metric_sorts_and_is_in_the_first_table(metric: str, two_groups: Path) -> None:
    write_events(two_groups / "marginalization-0")
    ended = run_compare(two_groups, more=f"--metric {metric}")
    assert ended.code == 0, ended.said
    assert METRICS[metric].title in ended.out.splitlines()[2]
    assert metric in METRICS
    assert set(COSTS) <= set(METRICS)


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0.91, 0.95, False), (-130, -110, False), (1, 10, True), (60, 90, True)]
)
def test_ticks_are_few_round_and_inside(low: float, high: float, log: bool) -> None:
    axis = figures.Axis(low, high, 0, 100, log)
    ticks = axis.ticks(5)
    assert 2 <= len(ticks) <= 7
    assert all(low <= tick <= high for tick in ticks)
    assert all(0 <= axis(tick) <= 100 for tick in ticks)
    assert (axis(low), axis(high)) == pytest.approx((0, 100))


def test_dots_do_not_hide_each_other() -> None:
    centres = [(10.0, 5.0), (10.0, 6.0), (10.0, 5.0), (50.0, 5.0)]
    moved = figures.side_by_side(centres, 4.0, 0.0, 60.0)
    placed = np.array([(x, y) for x, (_, y) in zip(moved, centres, strict=True)])
    distances = np.linalg.norm(placed[:, None] - placed[None], axis=-1)[np.triu_indices(4, 1)]
    assert distances.min() >= 4.0
    assert (moved[0], moved[3]) == (10.0, 50.0)


@pytest.mark.parametrize("dots", [12, 300])
def test_dots_for_which_there_is_no_room_stay_where_they_are(dots: int) -> None:
    """Inside the figure; and finding that takes no time."""
    moved = figures.side_by_side([(2.0, 5.0)] * dots, 4.0, 0.0, 20.0)
    assert all(0 <= x <= 20 for x in moved)
    assert len(set(moved)) == (5 if dots == 12 else 1)
    assert moved[-1] == 2.0


def test_a_panel_has_the_best_groups_behind_it_and_not_all(tmp_path: Path) -> None:
    found = many(tmp_path, 11)
    html = page(found)
    panels = [d for d in ElementTree.fromstring(html).iter("svg") if "against steps" in (d.get("aria-label") or "")]
    assert len(panels) == 2 * 11
    assert {sum(c.get("class") == "other" for c in panel.iter("polyline")) for panel in panels} == {8}
    assert "Grey are the means of the 8 best groups." in html


def test_long_names_of_groups_are_cut_in_names_of_files_which_stay_different(tmp_path: Path) -> None:
    for number in range(9):
        own: dict[str, Any] = {"estimator__kl": "long" * 80 + str(number)}
        make_run(tmp_path / f"{number}", 0.9 - number / 100, events=True, **own)
    ended = run_compare(tmp_path, more="--figures")
    assert ended.code == 0, ended.said
    written = list((tmp_path / "compare").glob("compare_val_*.svg"))
    assert len(written) == 2 * 9  # accuracy and bound of each group
    for number in range(9):
        assert sum(f"long{number} against steps" in path.read_text() for path in written) == 2


def test_t_quantiles_are_found_once() -> None:
    t_quantile.cache_clear()
    for _ in range(3):
        summarize([1.0, 2.0, 4.0])
    assert t_quantile.cache_info().misses == 1


def test_a_part_without_what_sorts_the_others_is_sorted_by_what_it_has(tmp_path: Path) -> None:
    left_out = {"val_accuracy": None, "val_bound": None, "val_log_likelihood": None}
    for number, accuracy in enumerate((0.7, 0.9)):
        own: dict[str, Any] = {"optimizer__lr": number + 1.0}
        make_run(tmp_path / f"with-{number}", accuracy, **own)
        make_run(tmp_path / f"without-{number}", accuracy, result=left_out, data__name="mnist", **own)
        nothing = {name: None for name in METRICS if name.startswith(("val", "test"))}
        make_run(tmp_path / f"nothing-{number}", accuracy, result=nothing, data__name="svhn", **own)
    found = comparison(tmp_path)
    assert found.apart == "data set"
    heads = {part.data: headline(part).partition("groups")[2] for part in found.parts}
    assert heads == {
        "data.name=digits": ", highest val accuracy first",
        "data.name=mnist": ", highest test accuracy first",
        "data.name=svhn": "",
    }
    (without,) = (part for part in found.parts if part.data == "data.name=mnist")
    assert [group.summaries["test_accuracy"].mean for group in without.groups] == [0.9, 0.7]
    assert without.baseline is without.groups[0]
    assert [note for note in found.notes if "flatters" in note] == [
        "no run of data.name=mnist has validation images: test accuracy sorts, which flatters what is on top"
    ]
    assert run_compare(tmp_path).code == 0


def test_a_default_output_that_is_a_link_is_refused(two_groups: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere, link = tmp_path_factory.mktemp("elsewhere"), two_groups / "compare"
    link.symlink_to(elsewhere)
    ended = run_compare(two_groups)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"catvae: {link} is a link")
    assert "--output" in ended.err
    assert ended.err.count("\n") == 1
    assert not list(elsewhere.iterdir())
    assert run_compare(two_groups, more=f"--output {link}").code == 0
    assert (elsewhere / "compare.html").exists()
