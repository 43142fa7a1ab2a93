"""Is the VAE worth it? scikit-learn's methods, and the classifier q(y|x) alone, on the split and pixels of train.py.

uv run python -m scripts.baselines data=digits --draws 0-4
uv run python -m scripts.baselines data.num_labelled=20,100 --methods nearest_neighbour,label_spreading
uv run python -m scripts.compare outputs

OVERRIDE is an argument of train.py; with commas between values, each of them is done. Settings are chosen by validation
accuracy, out of the grids in scripts/baseline_methods.py; test images are looked at once, at the end, and are
predicted one by one: no method has seen them. Every method writes a folder that scripts.compare shows as a row.
Pixels are those of train.py. Where it draws them (data.binarization=dynamic, as of MNIST), it draws a training image
anew at each step, and here that image keeps its intensities, which is kinder than a draw; validation and test images
are drawn as the evaluation of a run draws them. With data.binarization=fixed all are drawn once, for the runs too; with
data.binarization=none all are grey.
What is finished in --output is skipped, so that the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import math
import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from configs.schema import Config, ConfigError
from configs.wording import CONFIGS
from scripts.command import refusing_bad_input, searchpath

if TYPE_CHECKING:  # what is slow to import is imported where it is used, so that --help is quick
    from data.batches import Binarization
    from data.splits import Split
    from data.stored import Images
    from scripts.baseline_methods import Chosen, Known, Pixels

CLASSIFIER = "classifier"  # trained by train.py
NAMES = ("nearest_neighbour", "logistic_regression", "svm", "label_spreading", "self_training", CLASSIFIER)
# whatever a preset says
ALONE = ["objective=supervised_only", *(f"objective.{name}=0" for name in ("labelled", "unlabelled", "labels_first"))]
ALONE += ["objective.distortion_fades=null", "evaluation.classify_by=classifier"]
TRAINER = CONFIGS.parent / "train.py"


@dataclass(frozen=True)
class Job:
    """A split, and what all methods have in common on it."""

    name: str  # of its folder in --output, "" for --output itself
    overrides: list[str]
    config: Config
    choices: dict[str, str]  # of Hydra's groups
    alone: Config | None  # of the classifier on the labels alone, if it is asked for
    flags: list[str]  # of train.py


# ---- what is asked for ----


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="such as data=digits data.num_labelled=20")
    parser.add_argument(
        "--draws", metavar="LIST", help="0-4 or 0,3,7: data.split_seed=N seed=N for each; a seed=... given stays"
    )
    parser.add_argument("--methods", default=",".join(NAMES), help=f"out of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="of train.py: a folder with choices of your own")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: outputs/baselines/DATE/TIME-xxxxxx")
    arguments = parser.parse_intermixed_args()
    with refusing_bad_input():
        methods = method_names(arguments.methods)
        jobs = made_jobs(arguments.overrides, arguments.draws, arguments.config_dir, methods)
        check_jobs(jobs)
        now = f"{datetime.now():%Y-%m-%d/%H-%M-%S}-{secrets.token_hex(3)}"
        output = arguments.output or Path("outputs", "baselines", now)
        check_output(output, jobs, methods)
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--output must be a folder that can be written to, got {output}: {error.strerror}"
            ) from error
        try:
            code = run(output, jobs, methods)
        except KeyboardInterrupt:
            code = 130
        if code >= 128:
            print(f"catvae: stopped; the same command with --output {output} goes on", file=sys.stderr)
        else:
            print(f"{output}\nbeside your runs: uv run python -m scripts.compare {shlex.quote(str(output))} FOLDER...")
        sys.exit(code)


def method_names(text: str) -> list[str]:
    """The methods between commas, each once, quick ones first. Raises ConfigError for an unknown one."""
    given = [name.strip() for name in text.split(",")]
    for name in given:
        if name not in NAMES:
            raise ConfigError(f"--methods must be out of {', '.join(NAMES)}, got {name or 'nothing'}")
    return [name for name in NAMES if name in given]


def draw_numbers(text: str) -> list[int]:
    """0, 1, 2, 5 of "0-2,5". Raises ConfigError."""
    numbers: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not ends or int(ends[2] or ends[1]) < int(ends[1]):
            raise ConfigError(f"--draws must be numbers such as 0-4 or 0,3,7, got {text or 'nothing'}")
        numbers += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    return list(dict.fromkeys(numbers))


def made_jobs(
    overrides: Sequence[str], draws: str | None, config_dir: Path | None, methods: Sequence[str]
) -> list[Job]:
    """A job for each combination of values and draws. Raises ConfigError."""
    keys = {override.lstrip("+~").partition("=")[0] for override in overrides}
    for key in keys & {"resume", "search"} | {key for key in keys if key.startswith("hydra")}:
        raise ConfigError(f"{key} must be left to train.py; --output names the folder here")
    if draws is not None and "data.split_seed" in keys:
        raise ConfigError("data.split_seed must be left out with --draws, which sets it")
    found = searchpath(config_dir)
    flags = [] if config_dir is None else ["--config-dir", str(config_dir.resolve())]
    jobs = []
    for varied, combined in combinations(overrides):
        for draw in [None] if draws is None else draw_numbers(draws):
            drawn = [] if draw is None else [f"data.split_seed={draw}", *([] if "seed" in keys else [f"seed={draw}"])]
            name = quote(",".join([*varied, *drawn[:1]]), safe="=,.@+")
            own = [*combined, *drawn]
            alone = composed([*found, *own, *ALONE])[0] if CLASSIFIER in methods else None
            jobs.append(Job(name, own, *composed([*found, *own]), alone, flags))
    return jobs


def check_jobs(jobs: Sequence[Job]) -> None:
    """As train.py checks its configuration, before any work. Raises ConfigError, DataError."""
    from configs.check import built_model, check, check_machine

    for job in jobs:
        if not built_model(job.config).has_labels:
            raise ConfigError(
                f"model must be one that learns from labels, got {job.config.model['_target_']}: accuracies are what "
                "baselines compare, of a classifier on the labels alone too"
            )
        check(job.alone or job.config)
        check_machine(job.config)
        for key in ("num_validation", "num_test"):  # settings are chosen on the ones, and compared on the others
            if getattr(job.config.data, key) == 0:
                raise ConfigError(f"data.{key} must be > 0 for baselines, got 0")


def combinations(overrides: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    """For each combination of values: the overrides that have several, and all overrides. Raises ConfigError."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from configs.wording import explain

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        for override in parsed:
            if override.is_sweep_override() and not override.is_discrete_sweep():
                raise ConfigError(
                    f"{override.key_or_group} must be values with commas between, got {override.input_line}"
                )
        (combined,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    except HydraException as error:
        raise ConfigError(explain(error, overrides)) from error
    has_several = {override.get_key_element(): override.is_sweep_override() for override in parsed}  # a key's last one
    return [([text for text, it in zip(one, has_several.values(), strict=True) if it], one) for one in combined]


def composed(overrides: list[str]) -> tuple[Config, dict[str, str]]:
    """The configuration that train.py would have, and the choices of Hydra's groups. Raises ConfigError."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from configs.check import COMPOSING_ERRORS, typed
    from configs.wording import explain

    try:
        with initialize_config_dir(str(CONFIGS), version_base=None):
            whole = compose("config", overrides, return_hydra_config=True)
    except COMPOSING_ERRORS as error:
        raise ConfigError(explain(error, overrides)) from error
    choices = {str(group): str(choice) for group, choice in whole.hydra.runtime.choices.items() if choice is not None}
    return typed(OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])), choices


def check_output(output: Path, jobs: Sequence[Job], methods: Sequence[str]) -> None:
    """Refuses a folder that has something else in the place of a job. Raises ConfigError."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output must be a folder, got {output}")
    for job in jobs:
        for name in methods:
            if changed := differs(output / job.name / name, job, name):
                folder = output / job.name / name
                raise ConfigError(f"--output must be of the same command or a new folder, got {folder}: {changed}")


def differs(folder: Path, job: Job, name: str) -> str:
    """What a result in `folder` was asked for otherwise; empty without one. Raises ConfigError for a damaged one."""
    from training.run_folder import RESULT, read_json
    from training.state import changes, flat, plain

    if not (folder / RESULT).exists():
        return ""
    try:
        before = dict(read_json(folder / RESULT)["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / RESULT} cannot be read ({error!r}); delete it to do that again") from error
    if name == CLASSIFIER:
        assert job.alone is not None
        if before["train.steps"] != job.alone.train.steps:
            return f"train.steps={job.alone.train.steps} (was {before['train.steps']})"
        return changes(before, job.alone)
    now = flat(plain(job.config))
    return changes(now | {key: value for key, value in before.items() if is_of_all(key)}, job.config)


def is_of_all(key: str) -> bool:
    """Whether a key of the configuration is one of scikit-learn's methods too."""
    return key == "seed" or key.startswith("data.")


# ---- doing it ----


def run(output: Path, jobs: Sequence[Job], methods: Sequence[str]) -> int:
    """What is left to do of all jobs; returns the worst exit code of train.py, and stops at 128 or more."""
    from training.run_folder import locked

    worst = 0
    with locked(output):
        for job in jobs:
            folder = output / job.name
            left = [name for name in methods if not is_done(folder / name, job.config)]
            for name in methods:
                if name not in left:
                    print(f"{folder / name} is finished already, and stays as it is", flush=True)
            if classical := [name for name in left if name != CLASSIFIER]:
                run_classical(job, folder, classical)
            if CLASSIFIER in left:
                worst = max(worst, train_classifier(job, folder / CLASSIFIER))
                if worst >= 128:
                    return worst
    return worst


def is_done(folder: Path, config: Config) -> bool:
    """Whether a method has its result, of test data too if these are asked for."""
    from training.run_folder import RESULT, read_json

    if not (folder / RESULT).exists():
        return False
    return not config.evaluation.test or read_json(folder / RESULT).get("test_accuracy") is not None


def train_classifier(job: Job, folder: Path) -> int:
    """train.py on the labels alone, or what is left of it; returns its exit code. Signals go on to it."""
    quoted = "'" + str(folder.resolve()).replace("'", "\\'") + "'"
    line = [*job.overrides, *ALONE, f"hydra.run.dir={quoted}"]
    if any((folder / "checkpoints").glob("step_*.pt")):
        line = [f"resume={quoted}", f"evaluation.test={str(job.config.evaluation.test).lower()}"]
    child = subprocess.Popen([sys.executable, str(TRAINER), *job.flags, *line], start_new_session=True)
    before = {
        number: signal.signal(number, lambda number, frame: child.send_signal(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code == 0:
        say(folder)
    return code if code >= 0 else 128 - code


def run_classical(job: Job, folder: Path, names: Sequence[str]) -> None:
    """Chooses each method's settings, measures it on test images, and writes its folder."""
    from scripts.baseline_methods import METHODS, choose

    source = pixels_of("train", job.config)
    split = job.config.data.split(source.labels, source.num_classes, source.class_names, source.digest)
    known = known_of(source, split, job.config)
    for name in names:
        import_module(METHODS[name].target.rpartition(".")[0])  # seconds that are not the method's
        start = time.perf_counter()
        chosen = choose(name, known)
        seconds = time.perf_counter() - start
        measured = scores("val", *chosen.predict(known.x_validation), known.y_validation)
        if job.config.evaluation.test:
            test = pixels_of("test", job.config)
            measured |= scores("test", *chosen.predict(as_evaluated(test.images[:], job.config)), test.labels)
        write(job, folder / name, split, name, chosen, {"seconds": seconds, **measured})
        say(folder / name)


def pixels_of(part: str, config: Config) -> Images:
    """The `train` or `test` part as a run has it."""
    source = config.data.load(part)
    return source.fixed() if config.data.binarization.value == "fixed" else source


def known_of(source: Images, split: Split, config: Config) -> Known:
    """What methods may see of the training part: no label but those of labelled and of validation images."""
    import numpy as np
    import torch

    from data.batches import binarize
    from scripts.baseline_methods import Known

    how: Binarization = config.data.binarization.value
    kept: Binarization = "none" if how == "dynamic" else how
    rows = np.union1d(split.labelled, split.unlabelled)
    x = binarize(torch.from_numpy(source.images[rows]), kept, torch.Generator()).flatten(1).numpy()  # nothing is drawn
    return Known(
        x,
        np.where(np.isin(rows, split.labelled), source.labels[rows], -1),
        as_evaluated(source.images[split.validation], config),
        source.labels[split.validation],
    )


def as_evaluated(images: Any, config: Config) -> Pixels:
    """Pixels [N, D] of images uint8 [N, C, H, W]: where they are drawn, as models.evaluation draws them on a CPU."""
    import torch

    from data.batches import binarize
    from data.randomness import keyed_generator
    from models.evaluation import EVALUATION_SEED, rows_at_once

    parts = []
    size = min(config.evaluation.batch_size, rows_at_once(math.prod(images.shape[1:])))
    for index, batch in enumerate(torch.from_numpy(images).split(size)):
        generator = keyed_generator(batch.device, EVALUATION_SEED, "evaluation", index)
        parts.append(binarize(batch, config.data.binarization.value, generator))
    pixels: Pixels = torch.cat(parts).flatten(1).numpy()
    return pixels


def scores(part: str, predicted: Any, probabilities: Any, labels: Any) -> dict[str, float]:
    """Accuracy, and the calibration error where there are probabilities, under the names of result.json."""
    import torch

    from models.evaluation import calibration_error

    measured = {f"{part}_accuracy": float((predicted == labels).mean())}
    if probabilities is not None:
        q = torch.from_numpy(probabilities)
        measured[f"{part}_calibration_error"] = calibration_error(q, torch.from_numpy(labels))
    return measured


def write(job: Job, folder: Path, split: Split, name: str, chosen: Chosen, measured: dict[str, float]) -> None:
    """A folder that scripts.compare reads, result.json last: with it the method is finished."""
    from omegaconf import OmegaConf

    from training.run_folder import RESULT, SPLIT, git_commit, versions, write_json
    from training.state import flat, plain

    method, config = chosen.method, plain(job.config)
    own = {"data": config["data"], "seed": config["seed"], "estimator": {"_target_": method.target}}
    choices = {"data": job.choices["data"], "estimator": method.title}
    hidden = folder / ".hydra"
    hidden.mkdir(parents=True, exist_ok=True)
    for file, content in (
        ("config", own),
        ("overrides", job.overrides),
        ("hydra", {"hydra": {"runtime": {"choices": choices}}}),
    ):
        (hidden / f"{file}.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(content)))
    write_json(folder / SPLIT, split.manifest(config["data"]["name"], config["data"]["split_seed"]))
    result: dict[str, Any] = {
        "method": name,  # of --methods; no run of train.py has it
        "estimator": method.target.rpartition(".")[2],
        "seed": config["seed"],
        "split_hash": split.hash,
        "steps": None,
        "device": "cpu",
        "precision": "fp32",
        **measured,  # seconds are those of the search: every setting's fit, and its prediction of validation images
        "settings": chosen.settings,
        "tried": chosen.tried,
        "skipped": chosen.skipped,
        "git_commit": git_commit(),
        "versions": {**versions(), "scikit-learn": version("scikit-learn")},
        "config": flat(own),
    }
    write_json(folder / RESULT, result)


def say(folder: Path) -> None:
    """A line about a finished method."""
    from training.run_folder import RESULT, read_json

    result = read_json(folder / RESULT)
    settings = "".join(f" {key}={value}" for key, value in result.get("settings", {}).items())
    accuracy = f"val accuracy {result['val_accuracy']:.4f}"
    if result.get("test_accuracy") is not None:
        accuracy = f"test accuracy {result['test_accuracy']:.4f} (val {result['val_accuracy']:.4f})"
    print(f"{folder}: {accuracy}, {result['seconds']:.1f} s{settings}", flush=True)


if __name__ == "__main__":
    main()
