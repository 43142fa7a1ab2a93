"""Measures gradient estimators against the exact gradient, on the model of a run folder: bias, variance and cost.

uv run python -m scripts.gradient_quality outputs/DATE/TIME-NAME estimators=gumbel_softmax,rebar draws=1000

Prints a table, and writes gradient_quality.csv and a picture. Of several run folders or checkpoints, or of a sweep's
folder, the table and the picture have the mean over their models, and the file each by itself. The gradient is that of
the mean over images of the term of J that needs an estimator, E_q(y|x)[b(x, y)] or its like without labels, for the
logits of y and for each network's parameters apart, in float32 and evaluation mode. The images are some of the run's
unlabelled training images, evenly spread; they and all noise but y's are the same for all estimators. Where y has too
many joint classes to enumerate, the exact gradient is the mean of many draws of an unbiased estimator (reference=). The
run's own estimator is measured as it was trained; others are made anew, and those with parameters or running state are
warmed up first, on training images and with the model fixed (models.gradient_quality.warm_up).
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from itertools import count
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from configs.schema import ConfigError
from configs.trust import add_trust
from configs.wording import CONFIGS, unknown_key
from data.folders import made
from scripts.command import add_data_path, composed, refusing_bad_input, searchpath
from scripts.gradient_report import mean_over_runs, picture, table, write_csv

if TYPE_CHECKING:  # what is slow to import is imported where it is used, so that --help is quick
    from torch import Tensor

    from estimators.contract import Estimator
    from models.gradient_quality import Measurement
    from training.run import Run

FIGURES = ("png", "svg", "pdf")
ESTIMATORS = CONFIGS / "estimator"
OWN = "run"  # the name of the run's own estimator where no configuration is like it


def setting(default: Any, help: str, minimum: int = 0) -> Any:
    return field(default=default, metadata={"help": help, "minimum": minimum})


@dataclass
class Settings:
    """The key=value arguments."""

    estimators: str = setting(
        "",
        "names with commas between: a configuration as in estimator=NAME, NAME/BASELINE, 'NAME(KEY=VALUE ...)' with "
        "further arguments of train.py, or run for the run's own (default: all that the model can have)",
    )
    draws: int = setting(200, "gradients of each estimator", minimum=3)
    reference: int = setting(
        200,
        "where the exact gradient cannot be enumerated, draws whose mean stands for it; each calls the generator once "
        "for every class of every variable",
        minimum=3,
    )
    batch_size: int = setting(100, "images", minimum=1)
    warmup: int = setting(200, "steps by which an estimator with state of its own is fitted to the model")
    seed: int = setting(0, "draws pixels, z, y, the estimators' parameters and their warm-up")
    output: str = setting(
        "",
        "folder to write to (default: gradient_quality/ in the run folder, or in the one that several have in common)",
    )
    figure: str = setting("png", f"what the picture is written as: {', '.join(FIGURES)}")


def folders_and_settings(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """Run folders and checkpoints, each once, and settings: what has an equals sign or is a key, and is no folder."""
    keys = [key.name for key in fields(Settings)]
    settings = [given for given in arguments if ("=" in given or given in keys) and not Path(given).is_dir()]
    named = [Path(argument) for argument in arguments if argument not in settings]
    return list(dict.fromkeys(run for folder in named for run in runs_in(folder))), settings


def runs_in(folder: Path) -> list[Path]:
    """The runs of a sweep, in the order of its jobs; what is no sweep's folder is taken for a run."""
    jobs = [] if (folder / "checkpoints").is_dir() else [found.parent for found in folder.glob("*/checkpoints")]
    return sorted(jobs, key=lambda job: (len(job.name), job.name)) or [folder]


def parsed(arguments: list[str]) -> Settings:
    """Raises ConfigError for an unknown key or a value that it cannot have."""
    known = {key.name: key for key in fields(Settings)}
    settings = Settings()
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals:
            raise ConfigError(f"an argument must be key=value, got {argument}")
        if name not in known:
            raise ConfigError(unknown_key(argument, name, list(known), owner="scripts.gradient_quality"))
        value: str | int = text
        if isinstance(known[name].default, int):
            minimum = known[name].metadata["minimum"]
            if not text.isdecimal() or int(text) < minimum:
                raise ConfigError(f"{name} must be an integer >= {minimum}, got {text or 'nothing'}")
            value = int(text)
        setattr(settings, name, value)
    if settings.figure not in FIGURES:
        raise ConfigError(f"figure must be one of {', '.join(FIGURES)}, got {settings.figure or 'nothing'}")
    return settings


# ---- which estimators ----


def all_names(config_dir: Path | None = None) -> list[str]:
    """Every estimator in configs/estimator/, and in the one of a person's own, once for each baseline if it takes one.

    Raises ConfigError for a file that cannot be read.
    """
    from omegaconf import OmegaConf
    from yaml import YAMLError

    folders = [ESTIMATORS, *([config_dir / "estimator"] if config_dir else [])]
    baselines = sorted({path.stem for folder in folders for path in (folder / "baseline").glob("*.yaml")})
    names = []
    for path in [path for folder in folders for path in sorted(folder.glob("*.yaml"))]:
        try:
            defaults: Any = OmegaConf.to_container(OmegaConf.load(path))
            has_baseline = any("baseline" in default for default in defaults.get("defaults", []))
        except (YAMLError, AttributeError, TypeError) as error:
            raise ConfigError(f"{path} is no configuration of an estimator: {error}") from error
        names += [f"{path.stem}/{baseline}" for baseline in baselines] if has_baseline else [path.stem]
    return list(dict.fromkeys(names))


def split_names(text: str, config_dir: Path | None = None) -> list[str]:
    """The names between commas, other than commas in parentheses, each once. Raises ConfigError for an unknown one."""
    names = [name.strip() for name in re.findall(r"[^,(]+(?:\([^)]*\))?", text)]
    known = [OWN, *all_names(config_dir)]
    for name in names:
        choice, more = name.partition("(")[0], "" if config_dir else "; --config-dir DIR has it find your own"
        if choice not in {*known, *(other.partition("/")[0] for other in known)}:
            raise ConfigError(f"estimators must be names out of {', '.join(known)}, got {choice}{more}")
    return list(dict.fromkeys(names))


def compose_estimator(name: str, config: Any, config_dir: Path | None = None) -> Any:
    """The section that estimator=NAME and its further arguments give, with what it refers to from the run's `config`.

    NAME may be that of a file in `config_dir`/estimator/, as for train.py. A baseline gets as many samples as it
    needs. Raises ConfigError.
    """
    from hydra.utils import get_class
    from omegaconf import OmegaConf

    from configs.check import COMPOSING_ERRORS
    from configs.wording import explain
    from training.state import plain

    choice, _, arguments = name.removesuffix(")").partition("(")
    estimator, _, baseline = choice.partition("/")
    overrides = [f"estimator={estimator}"]
    overrides += [f"estimator/baseline={baseline}"] if baseline else []
    try:
        further = shlex.split(arguments)
        for argument in further:
            key = argument.lstrip("+~").partition("=")[0].rpartition("@")[2].replace("/", ".")
            if key.partition(".")[0] != "estimator":
                raise ConfigError(f"in parentheses must be settings of the estimator alone, got {argument}")
        overrides += further
        whole = OmegaConf.create(plain(config))
        whole.estimator = composed(*searchpath(config_dir), *overrides).estimator
        node: Any = OmegaConf.to_container(whole.estimator, resolve=True)
    except COMPOSING_ERRORS as error:
        raise ConfigError(explain(error, overrides)) from error
    if baseline:
        minimum = get_class(node["baseline"]["_target_"]).minimum_samples  # type: ignore[attr-defined]
        node["num_samples"] = max(node["num_samples"], minimum)
    return node


def kind(node: Any) -> tuple[Any, Any]:
    """What makes an estimator, and its baseline."""
    return node["_target_"], node.get("baseline", {}).get("_target_")


def own_name(nodes: dict[str, Any], own: Any) -> str:
    """The name, without further arguments, of the section that makes the run's estimator; the most alike of several."""
    from training.state import flat

    def differences(name: str) -> int:
        one, other = flat(nodes[name]), flat(own)
        return sum(one.get(key) != other.get(key) for key in one.keys() | other.keys())

    alike = [name for name, node in nodes.items() if "(" not in name and kind(node) == kind(own)]
    return min(alike, key=differences, default=OWN)


@dataclass
class Candidates:
    """The estimators by name, which name is the run's own, and those that the model cannot have."""

    made: dict[str, Estimator]
    own: str
    left_out: list[str]


def make_estimators(run: Run, settings: Settings, config_dir: Path | None = None) -> Candidates:
    """Those that are named, or all that the model can have. Raises ConfigError for a named one that it cannot."""
    import torch

    from configs.check import check_kind
    from configs.targets import build
    from estimators.contract import Estimator
    from models.gradient_quality import check_images

    try:
        check_images(run.model, settings.batch_size, "batch_size")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    names = split_names(settings.estimators, config_dir) or all_names(config_dir)
    nodes = {name: compose_estimator(name, run.config, config_dir) for name in names if name != OWN}
    own = OWN if OWN in names else own_name(nodes, run.config.estimator)
    if not settings.estimators and own == OWN:
        names.append(OWN)
    known = run.config.data.known()
    found = Candidates({}, own, [])
    for name in names:
        if name == own:
            found.made[name] = run.estimator
            continue
        torch.manual_seed(settings.seed)  # so that its parameters do not depend on the other names
        with run.device:
            built = build(nodes[name], "estimator")
            check_kind(nodes[name], "estimator", built, Estimator)
            try:
                found.made[name] = run.model.prepared(built, math.prod(known.shape))
            except ValueError as error:
                if settings.estimators:
                    message = f"estimators must be ones that this model can have, got {name}: {error}"
                    raise ConfigError(message) from error
                found.left_out.append(name)
    return found


def measure(run: Run, estimators: dict[str, Estimator], settings: Settings) -> dict[str, Measurement]:
    """The measurements by name, all against the same reference."""
    from data.progress import progress, telling
    from data.randomness import keyed_generator
    from models.gradient_quality import gradient_quality, reference_gradient, warm_up

    x, measured = run.unlabelled_minibatch(settings.batch_size, settings.seed), {}

    def training_images(name: str) -> Iterator[Tensor]:
        for index in progress(range(settings.warmup), f"{name}, warm-up", "steps"):
            generator = keyed_generator(run.device, settings.seed, "warm-up images", index)
            x, y_labelled = run.batches(index, generator)
            yield x[len(y_labelled) :]

    with telling("reference", "draws", settings.reference) as tell:
        reference = reference_gradient(
            run.model,
            x,
            step=run.step,
            draws=settings.reference,
            seed=settings.seed,
            after_draw=functools.partial(tell, 1),
        )
    for name, estimator in estimators.items():
        if needs_warm_up(estimator, run):
            warm_up(run.model, estimator, training_images(name), step=run.step, seed=settings.seed)
        with telling(name, "draws", settings.draws) as tell:
            measured[name] = gradient_quality(
                run.model,
                estimator,
                x,
                step=run.step,
                draws=settings.draws,
                seed=settings.seed,
                reference=reference,
                after_draw=functools.partial(tell, 1),
            )
    return measured


def needs_warm_up(estimator: Estimator, run: Run) -> bool:
    return estimator is not run.estimator and bool([*estimator.parameters(), *estimator.buffers()])


def conditions(run: Run, candidates: Candidates, settings: Settings) -> str:
    """What was measured, in up to four lines."""
    number = len(run.batches.data.x_unlabelled[: settings.batch_size])
    lines = [
        f"{number} unlabelled training images of {run.config.data.name}, evenly spread, model at step {run.step}, "
        f"{settings.draws} draws, float32 on {run.device}, seed {settings.seed}"
    ]
    if candidates.own in candidates.made:
        lines.append(f"{candidates.own} is the run's own, as trained")
    if (samples := run.config.objective.samples) > 1:
        lines.append(
            f"the run was trained with the bound of {samples} samples; the gradient here is that of one sample's"
        )
    warmed = [name for name, estimator in candidates.made.items() if needs_warm_up(estimator, run)]
    if warmed:
        lines.append(f"warmed up over {settings.warmup} steps: {', '.join(warmed)}")
    if candidates.left_out:
        sizes = ", ".join(f"{variables} variables of {classes} classes" for variables, classes in run.model.latents)
        lines.append(f"left out, as this model ({sizes}) cannot have them: {', '.join(candidates.left_out)}")
    return "\n".join(lines)


def output_folder(folders: list[Path], settings: Settings) -> Path:
    """The folder to write to. Raises ConfigError for a link that nobody named."""
    if settings.output:
        return Path(settings.output)
    own = list(dict.fromkeys(folder.absolute().parents[1] if folder.is_file() else folder for folder in folders))
    together = own[0] if len(own) == 1 else Path(os.path.commonpath([folder.resolve() for folder in own]))
    if (output := together / "gradient_quality").is_symlink():  # of somebody else's making
        raise ConfigError(f"{output} is a link, to be written through; output=FOLDER names another place")
    return output


def put_aside(output: Path) -> None:
    """The files of an earlier measurement there get a number, so that a table and its picture stay together."""
    names = [f"gradient_quality.{suffix}" for suffix in ("csv", *FIGURES)]
    if earlier := [output / name for name in names if (output / name).exists()]:
        number = next(n for n in count(1) if not any(output.glob(f"gradient_quality_{n}.*")))
        for file in earlier:
            file.rename(output / f"gradient_quality_{number}{file.suffix}")
        print(f"the measurement before is gradient_quality_{number} now", file=sys.stderr)


# ---- the command ----


def main() -> None:
    explained = ((key, fill(key.metadata["help"], 100).replace("\n", "\n      ")) for key in fields(Settings))
    keys = "\n".join(f"  {key.name}={key.default}\n      {text}" for key, text in explained)
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"keys and defaults:\n{keys}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "arguments",
        nargs="+",
        metavar="FOLDER | key=value",
        help="run folders, checkpoints or a sweep's folder, and keys as below",
    )
    parser.add_argument(
        "--config-dir", type=Path, metavar="DIR", help="of train.py: a folder with choices of your own, in estimator/"
    )
    add_data_path(parser)
    add_trust(parser)
    arguments = parser.parse_intermixed_args()
    with refusing_bad_input():
        from training.saved import stored_run
        from training.trained import stored_state

        folders, rest = folders_and_settings(arguments.arguments)
        settings = parsed(rest)
        if not folders:
            parser.error("a run folder is required")
        output = output_folder(folders, settings)
        searchpath(arguments.config_dir)  # refused before any work, and so names
        names = split_names(settings.estimators, arguments.config_dir)
        states = {folder: stored_state(folder, trusted=arguments.trust) for folder in folders}
        own = {kind(state["config"]["estimator"]): str(folder) for folder, state in states.items()}
        if OWN in names and len(own) > 1:
            raise ConfigError(
                f"estimators must name what {OWN} stands for, which is not one in {', '.join(own.values())}"
            )
        found: dict[Path, dict[str, Measurement]] = {}
        lines: list[str] = []
        with made(output):
            for folder in folders:
                run = stored_run(folder, trusted=arguments.trust, data_path=arguments.data_path)
                candidates = make_estimators(run, settings, arguments.config_dir)
                found[folder] = measure(run, candidates.made, settings)
                lines += conditions(run, candidates, settings).splitlines()
                means = mean_over_runs(list(found.values()))  # refused as soon as one has nothing in common
            over = [f"mean over the models of {len(folders)} runs"] if len(folders) > 1 else []
            about = "\n".join([*over, *dict.fromkeys(lines)])
            drawing = output / f"gradient_quality.{settings.figure}"
            put_aside(output)
            try:
                write_csv(found, output / "gradient_quality.csv")
                picture(means, about, run.model.estimated).savefig(drawing, dpi=130)
            finally:  # on a full disk the table is all there is
                print(table(means, about), end="\n\n")
        print(output / "gradient_quality.csv")
        print(drawing)


if __name__ == "__main__":
    main()
