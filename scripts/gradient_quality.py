"""Measures gradient estimators against the exact gradient, on the model of a run folder: bias, variance and cost.

uv run python -m scripts.gradient_quality outputs/DATE/TIME-NAME estimators=gumbel_softmax,rebar draws=1000

Prints a table, and writes gradient_quality.csv and gradient_quality.png. The gradient is that of the mean over images
of E_q(y|x)[b(x, y)], for the classifier's logits and for each network's parameters apart, in float32 and evaluation
mode. The images are the first of the run's unlabelled training images; they and the noise of z are the same for all
estimators. The run's own estimator is measured as it was trained; others are made anew, and those with parameters or
running state are warmed up first, on training images and with the model fixed (models.gradient_quality.warm_up).
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from configs.schema import ConfigError
from configs.targets import CONFIGS
from configs.wording import unknown_key
from scripts.command import refusing_bad_input

if TYPE_CHECKING:  # what is slow to import is imported where it is used, so that --help is quick
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from estimators.contract import Estimator
    from models.gradient_quality import Measurement, Quality
    from training.run import Run

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
        "further arguments of train.py, or run for the run's own (default: all of them)",
    )
    draws: int = setting(200, "gradients of each estimator", minimum=3)
    batch_size: int = setting(100, "images", minimum=1)
    warmup: int = setting(200, "steps by which an estimator with state of its own is fitted to the model")
    seed: int = setting(0, "draws pixels, z, y, the estimators' parameters and their warm-up")
    output: str = setting("", "folder to write to (default: gradient_quality/ in the run folder)")


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
    return settings


# ---- which estimators ----


def all_names() -> list[str]:
    """Every estimator in configs/estimator/, once for each baseline if it takes one."""
    from omegaconf import OmegaConf

    baselines = sorted(path.stem for path in (ESTIMATORS / "baseline").glob("*.yaml"))
    names = []
    for path in sorted(ESTIMATORS.glob("*.yaml")):
        defaults: Any = OmegaConf.to_container(OmegaConf.load(path))
        has_baseline = any("baseline" in default for default in defaults.get("defaults", []))
        names += [f"{path.stem}/{baseline}" for baseline in baselines] if has_baseline else [path.stem]
    return names


def split_names(text: str) -> list[str]:
    """The names between commas, other than commas in parentheses, each once. Raises ConfigError for an unknown one."""
    names = [name.strip() for name in re.findall(r"[^,(]+(?:\([^)]*\))?", text)]
    known = [OWN, *all_names()]
    for name in names:
        choice = name.partition("(")[0]
        if choice not in {*known, *(other.partition("/")[0] for other in known)}:
            raise ConfigError(f"estimators must be names out of {', '.join(known)}, got {choice}")
    return list(dict.fromkeys(names))


def compose_estimator(name: str, config: Any) -> Any:
    """The section that estimator=NAME and its further arguments give, with what it refers to from the run's `config`.

    A baseline gets as many samples as it needs. Raises ConfigError.
    """
    from hydra import compose, initialize_config_dir
    from hydra.utils import get_class
    from omegaconf import OmegaConf

    from configs.check import COMPOSING_ERRORS
    from configs.wording import explain
    from training.run import plain

    choice, _, arguments = name.removesuffix(")").partition("(")
    estimator, _, baseline = choice.partition("/")
    overrides = [f"estimator={estimator}"]
    overrides += [f"estimator/baseline={baseline}"] if baseline else []
    try:
        overrides += shlex.split(arguments)
        with initialize_config_dir(str(CONFIGS), version_base=None):
            composed = compose("config", overrides)
        whole = OmegaConf.create(plain(config))
        whole.estimator = composed.estimator
        node: Any = OmegaConf.to_container(whole.estimator, resolve=True)
    except COMPOSING_ERRORS as error:
        raise ConfigError(explain(error, overrides)) from error
    if baseline:
        minimum = get_class(node["baseline"]["_target_"]).minimum_samples  # type: ignore[attr-defined]
        node["num_samples"] = max(node["num_samples"], minimum)
    return node


def own_name(nodes: dict[str, Any], own: Any) -> str:
    """The name, without further arguments, of the section that makes the run's estimator; the most alike of several."""
    from training.run import flat

    def kind(node: Any) -> tuple[Any, Any]:
        return node["_target_"], node.get("baseline", {}).get("_target_")

    def differences(name: str) -> int:
        one, other = flat(nodes[name]), flat(own)
        return sum(one.get(key) != other.get(key) for key in one.keys() | other.keys())

    alike = [name for name, node in nodes.items() if "(" not in name and kind(node) == kind(own)]
    return min(alike, key=differences, default=OWN)


def make_estimators(run: Run, settings: Settings) -> tuple[dict[str, Estimator], str]:
    """The estimators by name, and which name is the run's own. Raises ConfigError."""
    import torch

    from configs.targets import build
    from data.datasets import DATASETS

    names = split_names(settings.estimators) or all_names()
    nodes = {name: compose_estimator(name, run.config) for name in names if name != OWN}
    own = OWN if OWN in names else own_name(nodes, run.config.estimator)
    if not settings.estimators and own == OWN:
        names.append(OWN)
    facts = DATASETS[run.config.data.name]
    made = {}
    for name in names:
        if name == own:
            made[name] = run.estimator
            continue
        torch.manual_seed(settings.seed)  # so that its parameters do not depend on the other names
        with run.device:
            made[name] = build(nodes[name], "estimator")
            made[name].prepare(math.prod(facts.shape), facts.num_classes)
    return made, own


def measure(run: Run, estimators: dict[str, Estimator], settings: Settings) -> dict[str, Measurement]:
    """The measurements by name."""
    from tqdm import tqdm

    from data.randomness import keyed_generator
    from models.gradient_quality import gradient_quality, warm_up

    x, measured = run.unlabelled_minibatch(settings.batch_size, settings.seed), {}

    def training_images(name: str) -> Iterator[Tensor]:
        for index in tqdm(range(settings.warmup), f"{name}, warm-up", disable=None, leave=False):
            generator = keyed_generator(run.device, settings.seed, "warm-up images", index)
            yield run.batches(index, generator)[2]

    for name, estimator in estimators.items():
        if needs_warm_up(estimator, run):
            warm_up(run.model, estimator, training_images(name), step=run.step, seed=settings.seed)
        with tqdm(total=settings.draws, desc=name, unit="draw", disable=None, leave=False) as bar:
            measured[name] = gradient_quality(
                run.model,
                estimator,
                x,
                step=run.step,
                draws=settings.draws,
                seed=settings.seed,
                after_draw=bar.update,
            )
    return measured


def needs_warm_up(estimator: Estimator, run: Run) -> bool:
    return estimator is not run.estimator and bool([*estimator.parameters(), *estimator.buffers()])


def conditions(run: Run, estimators: dict[str, Estimator], own: str, settings: Settings) -> str:
    """What was measured, in up to three lines."""
    number = len(run.batches.data.x_unlabelled[: settings.batch_size])
    lines = [
        f"the first {number} unlabelled training images of {run.config.data.name}, model at step {run.step}, "
        f"{settings.draws} draws, float32 on {run.device}, seed {settings.seed}"
    ]
    if own in estimators:
        lines.append(f"{own} is the run's own, as trained")
    warmed = [name for name, estimator in estimators.items() if needs_warm_up(estimator, run)]
    if warmed:
        lines.append(f"warmed up over {settings.warmup} steps: {', '.join(warmed)}")
    return "\n".join(lines)


# ---- what is written ----


def table(measured: dict[str, Measurement], about: str) -> str:
    """A block a part, the smallest mean squared error of one draw (bias^2 + variance) first."""
    blocks = []
    for part in next(iter(measured.values())).parts:
        head = [part, "bias²", "", "variance", "cosine", "signal/noise", "calls", "ms"]
        ranked = sorted(measured, key=lambda name: squared_error(measured[name].parts[part]))
        rows = [head, *(cells(name, measured[name].parts[part], measured[name]) for name in ranked)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        left = (0, 2)  # columns whose texts start at the left
        lines = [
            "  ".join(
                text.ljust(width) if column in left else text.rjust(width)
                for column, (text, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        blocks.append("\n".join(lines))
    explained = (
        "bias² (± its standard error) and variance of one draw are relative to the exact gradient's squared norm, and\n"
        "rows are in the order of their sum; cosine is the mean over draws; calls of b per image; ms per gradient"
    )
    return "\n\n".join([about, *blocks, explained])


def short(name: str) -> str:
    """A name with its further arguments relative to the estimator."""
    return re.sub(r"(schedule@)?estimator[./]", "", name)


def squared_error(quality: Quality) -> float:
    return max(quality.bias_squared, 0.0) + quality.variance


def cells(name: str, quality: Quality, measurement: Measurement) -> list[str]:
    bias, error = plus_minus(quality.bias_squared, quality.bias_squared_error)
    return [
        short(name),
        bias,
        error,
        f"{quality.variance:.3g}",
        f"{quality.cosine:.4f}",
        f"{quality.signal_to_noise:.3g}",
        f"{measurement.evaluations:g}",
        f"{1000 * measurement.seconds:.1f}",
    ]


def plus_minus(value: float, error: float) -> tuple[str, str]:
    """("0.0123", "± 0.0045"): as far as the error's second digit; no error where it is only rounding."""
    if not 1e-6 * abs(value) < error < math.inf:
        return f"{value:.3g}", ""
    decimals = max(0, 1 - math.floor(math.log10(error)))
    form = f".{decimals}f" if decimals <= 6 and abs(value) < 1e6 else ".1e"
    return f"{value:{form}}", f"± {error:{form}}"


def write_csv(measured: dict[str, Measurement], path: Path) -> None:
    """A row an estimator and part."""
    with path.open("w", newline="") as file:
        rows = [
            {"estimator": name, "part": part, **asdict(quality), "evaluations": m.evaluations, "seconds": m.seconds}
            for name, m in measured.items()
            for part, quality in m.parts.items()
        ]
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


# ---- the picture ----

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
MARKERS = ("o", "s", "^", "D", "v")
ROUNDING = 1e-10  # relative squares below this are float32's


def picture(measured: dict[str, Measurement], about: str) -> Figure:
    """A panel a part: bias across, variance up, the area of a point its calls of b."""
    from matplotlib.figure import Figure

    longest = max(len(short(name)) for name in measured)
    figure = Figure(figsize=(11.5 + 0.13 * longest, 11), layout="constrained")
    figure.suptitle(
        "Gradients of E_q(y|x)[b(x, y)]: how far their mean is from the exact one, and how much a draw varies",
        fontsize=13,
    )
    legend = (
        "areas, and numbers in brackets: calls of b per image; ≈ 0: no bias within two standard errors, or no variance"
    )
    figure.supxlabel(f"{legend}\n{about}", fontsize=8.5, color="0.3")
    parts = list(next(iter(measured.values())).parts)
    for axes, part in zip(figure.subplots(2, 2).flat, parts, strict=True):
        panel(axes, part, measured)
    return figure


def panel(axes: Axes, part: str, measured: dict[str, Measurement]) -> None:
    """One part. What has no bias within two standard errors, or no variance, is put into a strip along the axis."""
    qualities = {name: measurement.parts[part] for name, measurement in measured.items()}
    exact = [name for name, quality in qualities.items() if squared_error(quality) < ROUNDING]
    shown = {name: q for name, q in qualities.items() if ROUNDING <= squared_error(q) < math.inf}
    across = Scale([bias(quality) for quality in shown.values()])
    up = Scale([quality.variance if quality.variance > ROUNDING else 0.0 for quality in shown.values()])
    axes.set(xscale="log", yscale="log", xlim=across.limits, ylim=up.limits)
    axes.set(xlabel="bias: ‖E g − exact‖ / ‖exact‖", ylabel="variance of a draw: tr Cov(g) / ‖exact‖²")
    axes.set_xticks(list(across.ticks), across.ticks.values())
    axes.set_yticks(list(up.ticks), up.ticks.values())
    axes.minorticks_off()
    axes.grid(color="0.9", linewidth=0.6)
    axes.axvspan(0, across.strip_end, color="0.92", zorder=0)
    axes.axhspan(0, up.strip_end, color="0.92", zorder=0)
    axes.set_title(part, loc="left", fontweight="bold")
    axes.set_title(f"exact: {', '.join(exact)}" if exact else "", loc="right", fontsize=9)
    heights = spread([up.fraction(y) for y in up.places], gap=min(0.05, 1 / len(measured)))
    for name, x, y, height in zip(shown, across.places, up.places, heights, strict=True):
        index, calls = list(measured).index(name), measured[name].evaluations
        look: Any = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        axes.scatter(x, y, s=30 * calls, alpha=0.75, edgecolors="white", linewidths=0.5, zorder=3 + 1 / calls, **look)
        axes.scatter(1.05, height, s=30, clip_on=False, transform=axes.transAxes, **look)
        axes.annotate(
            "",
            (x, y),
            (1.04, height),
            textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": look["color"], "linewidth": 0.6, "alpha": 0.6, "shrinkA": 0},
        )
        axes.text(1.07, height, f"{short(name)} ({calls:g})", fontsize=8.5, va="center", transform=axes.transAxes)


def bias(quality: Quality) -> float:
    """||E g - exact|| / ||exact||, 0 where it is within two standard errors of that."""
    is_clear = quality.bias_squared > max(2 * quality.bias_squared_error, ROUNDING)
    return math.sqrt(quality.bias_squared) if is_clear else 0.0


class Scale:
    """Where values >= 0 lie on a logarithmic axis of at least a decade, with a strip at its lower end if one is 0."""

    def __init__(self, values: list[float]) -> None:
        logs = [math.log10(value) for value in values if value > 0] or [0.0]
        middle, width = (max(logs) + min(logs)) / 2, max(max(logs) - min(logs), 1.0)
        end, high = middle - 0.57 * width, middle + 0.57 * width
        strip = 0.16 * width if 0.0 in values else 0.0
        self.limits = 10 ** (end - strip), 10**high
        self.strip_end, in_strip = 10**end, 10 ** (end - strip / 2)
        self.places = [value or in_strip for value in values]
        for digits in ((1, 2, 5), (1,)):
            ticks = [digit * 10.0**decade for decade in range(math.floor(end), math.ceil(high)) for digit in digits]
            ticks = [tick for tick in ticks if 10 ** (end + 0.04 * width) < tick < self.limits[1]]  # clear of the strip
            if len(ticks) <= 6:
                break
        self.ticks = {tick: f"{tick:g}" for tick in ticks} | ({in_strip: "≈ 0"} if strip else {})

    def fraction(self, place: float) -> float:
        """How far along the axis, from 0 to 1."""
        low, high = map(math.log, self.limits)
        return (math.log(place) - low) / (high - low)


def spread(heights: list[float], gap: float) -> list[float]:
    """Heights in [0, 1] moved as little as needs be for `gap` between neighbours, in the same order."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    moved = list(heights)
    for below, above in pairwise(order):
        moved[above] = max(moved[above], moved[below] + gap)
    ceiling = 1.0
    for index in reversed(order):
        moved[index] = min(moved[index], ceiling)
        ceiling = moved[index] - gap
    return moved


# ---- the command ----


def main() -> None:
    explained = ((key, fill(key.metadata["help"], 100).replace("\n", "\n      ")) for key in fields(Settings))
    keys = "\n".join(f"  {key.name}={key.default}\n      {text}" for key, text in explained)
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"keys and defaults:\n{keys}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a run folder")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="see below")
    arguments = parser.parse_args()
    with refusing_bad_input():
        from training.run import stored_run

        settings = parsed(arguments.settings)
        run = stored_run(arguments.folder)
        estimators, own = make_estimators(run, settings)
        output = Path(settings.output or arguments.folder / "gradient_quality")
        output.mkdir(parents=True, exist_ok=True)
        measured, about = measure(run, estimators, settings), conditions(run, estimators, own, settings)
        print(table(measured, about), end="\n\n")
        write_csv(measured, output / "gradient_quality.csv")
        picture(measured, about).savefig(output / "gradient_quality.png", dpi=130)
    print(output / "gradient_quality.csv")
    print(output / "gradient_quality.png")


if __name__ == "__main__":
    main()
