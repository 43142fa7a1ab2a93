"""README.md and the pages on how to use it: their files are there, examples run, and commands are accepted."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from omegaconf import OmegaConf
from sklearn.datasets import load_digits

import train
from scripts import generate, gradient_quality
from scripts.command import composed
from tests.runs import MLP, ROOT, command, events, resume, run
from training.trained import open_run

README = (ROOT / "README.md").read_text()
USED = ("settings", "data", "extending", "many_runs", "measuring")  # other pages say what was measured
PAGES = "\n".join([README, *((ROOT / "docs" / f"{name}.md").read_text() for name in USED)])
TINY = "data=digits train.steps=2 train.log_every=1 evaluation.importance_samples=1 device=cpu"


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGES, flags=re.MULTILINE | re.DOTALL)


def block_with(kind: str, text: str) -> str:
    (found,) = [block for block in blocks(kind) if text in block]
    return found


def commands() -> list[str]:
    """Every command line of train.py, in blocks and in running text."""
    running = re.sub(r"^```.*?^```", "", PAGES, flags=re.MULTILINE | re.DOTALL)
    texts = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines() + re.findall(r"`([^`]+)`", running)
    lines = (re.sub(r"\s+#.*", "", " ".join(text.split())) for text in texts)
    return [line.partition("train.py")[2].strip() for line in lines if "uv run train.py" in line]


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda page: page.stem)
def test_linked_files_are_there(page: Path) -> None:
    for link in re.findall(r"\]\(((?!http)[^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_every_page_is_linked_from_the_first() -> None:
    pages = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert pages == set(re.findall(r"\]\(docs/(\w+\.md)\)", README))


def test_pictures_are_small() -> None:
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert len(pictures) >= 3
    assert all((ROOT / picture).stat().st_size < 250_000 for picture in pictures)


# what stands for a name of the reader's own, and what another test here runs
PLACEHOLDERS = ("...", "FOLDER", "resume=", "--config-dir", "NAME", "FILE", "--help", "mine.npz")
WHOLE = sorted(line for line in set(commands()) if not any(word in line for word in PLACEHOLDERS))


@pytest.mark.parametrize("line", WHOLE)
def test_command_is_accepted(line: str, tmp_path: Path) -> None:
    if line.startswith("-m") or " -m " in line:
        line = line.replace("hydra/launcher=slurm", "").replace("search=alpha_temperature_lr", "")
        arguments = [word for word in shlex.split(line) if word != "-m" and not word.startswith("hydra.launcher")]
        first = [re.sub(r"=range\(.*|=([^,]*),.*", lambda m: "=" + (m[1] or "0"), word) for word in arguments]
        line = shlex.join(first)
    ended = command(train.main, f"{line} --cfg job")
    assert ended.code == 0, ended.said


def plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, module_text: str, group: str, name: str, yaml: str
) -> str:
    """The arguments that find a person's own module, the block with `module_text`, and its configuration."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"{module}.py").write_text(block_with("python", module_text))
    (tmp_path / group).mkdir()
    (tmp_path / group / f"{name}.yaml").write_text(yaml)
    return f"--config-dir {tmp_path} {group}={name}"


def test_estimator_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yaml = block_with("yaml", "SoftmaxMean")
    line = plugin(tmp_path, monkeypatch, "estimators_of_mine", "SoftmaxMean", "estimator", "softmax_mean", yaml)
    run(f"{line} {TINY} estimator.noise=0.2", tmp_path / "run")
    (tmp_path / "estimator" / "reinforce.yaml").write_text("_target_: estimators_of_mine.Reinforce\n")
    found = tmp_path / "gradient_quality"
    named = f"--config-dir {tmp_path} --trust estimators_of_mine estimators=softmax_mean,reinforce"
    measured = command(gradient_quality.main, f"{tmp_path}/run {named} draws=400 batch_size=5 output={found}")
    assert measured.code == 0
    table = csv.DictReader((found / "gradient_quality.csv").read_text().splitlines())
    rows = [row for row in table if row["part"] == "logits"]
    z = {row["estimator"]: float(row["bias_squared"]) / float(row["bias_squared_error"]) for row in rows}
    assert z["reinforce"] < 3 < z["softmax_mean"], z
    assert "bias² is above three of its standard errors, logits: softmax_mean\n" in measured.out


def test_networks_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yaml = "_target_: networks_of_mine.wide\nlatent_size: 10\nhidden: 300\n"
    for setting in yaml.split("\n")[:-1]:
        assert f"`{setting}`" in PAGES
    line = plugin(tmp_path, monkeypatch, "networks_of_mine", "wide(", "model", "wide", yaml)
    run(f"{line} {TINY}", tmp_path / "run")


def test_schedule_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yaml = block_with("yaml", "schedules_of_mine.sawtooth")
    plugin(tmp_path, monkeypatch, "schedules_of_mine", "def sawtooth", "schedule", "sawtooth", yaml)
    (line,) = [line for line in commands() if "=sawtooth" in line]
    line = line.replace("~/mine", str(tmp_path))
    run(f"{line} {TINY} estimator.temperature.period=2", tmp_path / "run")
    tags = events(tmp_path / "run")
    assert [point.value for point in tags.Scalars("train/temperature")] == [1.0, 0.75]


def test_a_family_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains by any estimator, is evaluated exactly, held against the exact gradient, resumed and told nothing."""
    yaml = block_with("yaml", "clusters: 20")
    line = plugin(tmp_path, monkeypatch, "clusters_of_mine", "class Clusters", "model", "clusters", yaml)
    small = f"{line} {TINY} model.clusters=5 lr_factor=constant diagnostics.every=2 diagnostics.draws=3"
    for estimator in ("marginalization", "score_function"):
        folder = tmp_path / estimator
        ended = run(f"{small} estimator={estimator}", folder)
        assert "test bound" in ended.said
        scalars = events(folder).Tags()["scalars"]
        assert {"train/kl_y", "val/bound", "diagnostics/variance_encoder"} <= set(scalars)
        resume(folder, "train.steps=3 --trust clusters_of_mine")
    model = open_run(folder, trusted="clusters_of_mine")
    images = np.zeros((1, 8, 8), np.uint8)
    assert model.encode(images).shape == (1, 5)
    for ask in (model.sample, lambda: model.log_likelihood(images)):
        with pytest.raises(ValueError, match="of the family Clusters has no"):
            ask()
    ended = command(generate.main, f"{folder} --trust clusters_of_mine --output {tmp_path / 'picture.png'}")
    assert ended.code == 2
    assert "has no pictures of its own" in ended.err
    ended = command(train.main, f"{line} {TINY} objective.alpha=1 hydra.run.dir={tmp_path / 'refused'}")
    assert ended.code == 2
    assert "objective.alpha must be 0" in ended.err
    ended = command(train.main, f"{line} {TINY} objective.kl_warmup=1 hydra.run.dir={tmp_path / 'refused'}")
    assert ended.code == 2
    assert "objective.kl_warmup must be 0" in ended.err


def test_images_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = load_digits()
    images = (digits.images * 15).astype(np.uint8)
    monkeypatch.chdir(tmp_path)
    exec(
        block_with("python", "np.savez"),
        {"np": np, "images": images, "labels": digits.target, "names": list("abcdefghij")},
    )
    (line,) = [line for line in commands() if "mine.npz" in line]
    model = re.sub(r"data\S+", "", MLP)
    run(f"{line} {model} train.steps=2", tmp_path / "run")


def choices(group: str) -> list[str]:
    return sorted(file.stem for file in (ROOT / "configs" / group).glob("*.yaml"))


def keys_of(config: dict[str, Any]) -> set[str]:
    """Dotted names of all that a composed configuration lets a person set."""
    keys = set()
    for name, value in config.items():
        below = keys_of(value) if isinstance(value, dict) else {""}
        keys |= {f"{name}.{key}".rstrip(".") for key in below if not name.startswith("_")}
    return keys


def test_the_table_of_settings_has_every_key_and_no_other() -> None:
    rows = re.findall(r"^\| (`[^|]+`) \|", (ROOT / "docs" / "settings.md").read_text(), re.M)
    told = set[str]()
    for row in rows:
        first, *more = re.findall(r"`([\w./@]+)`", row)
        told |= {first, *(first.rpartition(".")[0] + name if name[0] == "." else name for name in more)}
    lines = {"data=arrays", "estimator=score_function estimator/baseline=learned"}
    for group in ("model", "estimator", "optimizer", "lr_factor"):
        lines |= {f"{group}={choice}" for choice in choices(group)}
    lines |= {f"estimator=gumbel_softmax schedule@estimator.temperature={choice}" for choice in choices("schedule")}
    plain = (cast(dict[str, Any], OmegaConf.to_container(composed(*line.split()))) for line in lines)
    keys = set[str]().union(*map(keys_of, plain))
    keys -= {"estimator.temperature.steps", "lr_factor.steps", "data.name"}  # which others say
    assert keys - told == set()
    groups = {name for name in told if (ROOT / "configs" / name).is_dir()}
    assert told - keys - groups == {"schedule@estimator.temperature"}


def test_what_to_type_in_trouble_is_accepted() -> None:
    table = README[README.index("## Troubleshooting") : README.index("## Exit codes")]
    columns = [row.split(" | ")[-1] for row in table.splitlines() if row.startswith("| ")]
    typed = [text for column in columns for text in re.findall(r"`([^`]+)`", column)]
    settings = [text for text in typed if re.fullmatch(r"[\w.@/]+=[^ ]+", text) and not text.startswith("resume=")]
    settings = [text for text in settings if text.islower() or "." in text.partition("=")[0]]
    assert len(settings) >= 9
    for setting in settings:
        if "FOLDER" not in setting:
            ended = command(train.main, f"data=digits estimator=marginalization {setting} --cfg job")
            assert ended.code == 0, ended.said
