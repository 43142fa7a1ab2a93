"""Times a training step: of every estimator, its parts, the arithmetic alone, a loop as first written, Pyro and JAX.

uv run python -m scripts.benchmark model=mlp train.batch_size_labelled=100
uv run python -m scripts.benchmark --estimators marginalization,gumbel_softmax --peer pyro precision=fp32 model=mlp
uv run python -m scripts.benchmark --classes 2,10,100,1000 experiment=jang2017_figure5 --estimators gumbel_softmax

All of it in one sitting and turn by turn, so that a busy moment slows all alike. A step is the trainer's own, logging
and guard included; a logging step's work is spread over train.log_every steps. Prints medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from configs.schema import Config, ConfigError
from scripts.command import composed, positive, refusing_bad_input, writable
from scripts.gradient_quality import all_names, compose_estimator, split_names

if TYPE_CHECKING:
    from models.contract import Model
    from models.m2.model import Networks
    from training.report import Report
    from training.run import Run

WARM_UP = 3  # steps before the first that counts
TURN = 20  # steps in a row, as in training, of which the first does not count: it finds its memory cold
LONGEST = 30.0  # seconds for one contender; fewer rounds where a step is slow
PARTS = ("data", "forward", "backward", "guard", "optimizer", "logging")
YARDSTICKS = ("plain loop, class by class", "plain loop, Gumbel-Softmax")
PYRO_EXAMPLE = ("Pyro's example, enumerated in parallel", "Pyro's example, sampled")
PYRO = ("Pyro's M2 in one step, enumerated in parallel", "Pyro's M2 in one step, sampled")
JAX = ("M2 in JAX, one jitted step, enumerated", "M2 in JAX, one jitted step, Gumbel-Softmax")
PYRO_OURS = ("Pyro, our networks, enumerated in parallel", "Pyro, our networks, sampled")


def composed_config(overrides: list[str]) -> Config:
    """The configuration that train.py would make of `overrides`. Raises ConfigError."""
    from configs.check import COMPOSING_ERRORS, typed
    from configs.wording import explain

    try:
        return typed(composed(*overrides))
    except COMPOSING_ERRORS as error:
        raise ConfigError(explain(error, overrides)) from error


def compose_run(overrides: list[str], estimator: str) -> Run:
    """The run that train.py would make of `overrides`, with the named estimator. Raises ConfigError, DataError."""
    from training.run import Run

    config = composed_config(overrides)
    config.estimator = compose_estimator(estimator, config)
    return Run(config)


class Trainer:
    """train.py's step on a run, each part timed."""

    def __init__(self, run: Run) -> None:
        from training.divergence import FiniteGuard
        from training.update import Update

        self.run = run
        self.guard = FiniteGuard(run.optimizer, run.parameters, run.device)
        self.update = Update(run, self.guard, self.after)
        self.seconds: dict[str, float] = {}  # of each part of the last step
        self.metrics: dict[str, Any] = {}

    def after(self, part: str) -> None:
        self.seconds[part] = self.mark()

    def step(self, report: Report | None = None) -> dict[str, float]:
        """One step; returns the seconds of each part, until the device has done it."""
        self.seconds, self.mark = {}, Stopwatch(self.run.device)
        result = self.update(self.run.step)
        self.run.step += 1
        if report is not None:
            report.add(result, self.guard.norm)
            self.after("logging")
        self.metrics = result.metrics
        return self.seconds


class Stopwatch:
    """Seconds since the last call, until the device has done all that it was given."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.last = time.perf_counter()

    def __call__(self) -> float:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self.last = self.last, time.perf_counter()
        return self.last - before


def time_estimators(trainers: dict[str, Trainer], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of each part of a step, for each estimator, taken in turns."""
    import tempfile

    from training.report import Report

    with tempfile.TemporaryDirectory() as folder:
        reports = {name: Report(trainer.run, Path(folder, name)) for name, trainer in trainers.items()}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in trainers}
        for name, trainer in trainers.items():
            reports[name].__enter__()
            for _ in range(WARM_UP):
                trainer.step(reports[name])
        for _ in range(rounds):
            for name, trainer in trainers.items():
                if sum(sum(seconds.values()) for seconds in found[name]) < LONGEST:
                    found[name] += [trainer.step(reports[name]) for _ in range(TURN)][1:]
        medians = {name: {part: median(s[part] for s in steps) for part in PARTS} for name, steps in found.items()}
        for name, trainer in trainers.items():
            mark = Stopwatch(trainer.run.device)
            reports[name].log_step(trainer.run.step)
            medians[name]["logging"] += mark() / trainer.run.config.train.log_every
            reports[name].__exit__()
    return medians


def time_in_a_row(overrides: list[str], name: str, number: int) -> dict[str, float]:
    """Seconds of a step on a GPU, run and replayed as a CUDA graph, where nothing waits for the device in between."""
    from functools import partial

    from scripts.peers import timed
    from training.divergence import FiniteGuard
    from training.update import ReplayedUpdate, Update

    found = {}
    for label, kind in (("eager", Update), ("graph", ReplayedUpdate)):
        run = compose_run(overrides, name)
        update = kind(run, FiniteGuard(run.optimizer, run.parameters, run.device))
        for step in range(2 * WARM_UP):
            update(step)
        steps = range(2 * WARM_UP, 2 * WARM_UP + number)
        found[label] = timed(partial(list, map(update, steps)), run.device) / number
    return found


def made_trainers(arguments: argparse.Namespace) -> tuple[dict[str, Trainer], list[str]]:
    """Those of the named estimators, or of all that the model can have, and the names of the others.

    Raises ConfigError, DataError, for a named one too.
    """
    from configs.check import EstimatorError

    if arguments.estimators:
        return {name: Trainer(compose_run(arguments.overrides, name)) for name in split_names(arguments.estimators)}, []
    trainers, left_out, reason = {}, [], ConfigError("there is no estimator")
    for name in all_names():
        try:
            trainers[name] = Trainer(compose_run(arguments.overrides, name))
        except EstimatorError as error:
            reason = error
            left_out.append(name)
    if not trainers:
        raise reason
    return trainers, left_out


def networks_of(model: Model) -> Networks:
    """What the peers are made of: each of them is M2. Raises ConfigError for another model."""
    from models.m2.model import Networks, SemiSupervisedVAE

    if type(model) is not SemiSupervisedVAE:  # nor one with more networks
        raise ConfigError("--peer must be none with this model: what there is to compare with is M2, as model=mlp is")
    return Networks(model.classifier, model.inference, model.generator, model.num_classes, model.latent_size)


def check_peer(peer: str, run: Run) -> None:
    """Refuses, before any work, what a peer would do another step of. Raises ConfigError."""
    from models.networks import MLPClassifier

    classifier, config = networks_of(run.model).classifier, run.config
    if config.likelihood.value != "bernoulli" or config.prior != "uniform":
        raise ConfigError("--peer must go with likelihood=bernoulli and prior=uniform, as peers have")
    if peer != "jax":
        return
    if not isinstance(classifier, MLPClassifier):
        raise ConfigError("--peer jax must go with model=mlp, whose step it writes once more")
    if classifier.motion.moves:
        raise ConfigError("--peer jax must go with model.rotation=0 model.shift=0 model.distortion=0")


def time_peers(run: Run, rounds: int, peer: str) -> dict[str, float]:
    """Median seconds of a step of each yardstick, in turns."""
    from copy import deepcopy

    from models.networks import MLPClassifier
    from scripts.peers import MakeStep, concatenating, plain_loop, pyro_example, pyro_svi, timed

    ours = networks_of(run.model)
    makers: list[tuple[MakeStep, Networks, tuple[str, str]]] = [(plain_loop, ours, YARDSTICKS)]
    if peer == "jax":
        from scripts.peer_in_jax import jax_step

        makers += [(jax_step, ours, JAX)]
    if peer == "pyro":
        if isinstance(ours.classifier, MLPClassifier):
            makers += [(pyro_example, concatenating(ours), PYRO_EXAMPLE), (pyro_svi, concatenating(ours), PYRO)]
        makers += [(pyro_svi, ours, PYRO_OURS)]
    steps = {
        name: make(run, deepcopy(networks), index == 1)
        for make, networks, names in makers
        for index, name in enumerate(names)
    }
    found: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    for _ in range(rounds):
        for name, step in steps.items():
            if sum(found[name]) < LONGEST:
                found[name] += [timed(step, run.device) for _ in range(TURN)][1:]
    return {name: median(seconds) for name, seconds in found.items()}


def apart(*arguments: str) -> str:
    """What this script prints with other arguments, in a process of its own. Raises ConfigError where that fails."""
    command = [sys.executable, "-m", "scripts.benchmark", *arguments]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if ended.returncode:  # it has said why
        raise ConfigError(f"{' '.join(arguments[:2])} in a process of its own ended with exit code {ended.returncode}")
    return ended.stdout


def print_peers(overrides: list[str], name: str, rounds: int, peer: str) -> None:
    """`time_peers` in a process as their users have it, without what a run sets for its own."""
    from unittest.mock import patch

    with patch("training.run.tune_process"):
        run = compose_run(overrides, name)
    print(json.dumps(time_peers(run, rounds, peer)))


def peak_memory(overrides: list[str], name: str) -> float:
    """MiB that a process needs at most for three steps, or that the GPU does; of a process of its own."""
    return float(apart("--peak-of", name, *overrides))


def print_peak(overrides: list[str], name: str) -> None:
    import resource

    import torch

    trainer = Trainer(compose_run(overrides, name))
    for _ in range(WARM_UP):
        trainer.step()
    if trainer.run.device.type == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**20)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def machine(run: Run) -> dict[str, Any]:
    """What the figures depend on besides the program."""
    import platform

    import torch

    from training.run_folder import git_commit, versions

    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = models[0].partition(": ")[2] if models else processor
    if run.device.type == "cuda":
        processor = torch.cuda.get_device_name(run.device)
    threads = torch.get_num_threads()
    return {
        "processor": processor,
        "threads": threads,
        "precision": run.precision,
        "git_commit": git_commit(),
        "versions": versions(),
    }


def steps_table(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything about one configuration, printed and as a dictionary."""
    from scripts.peers import best_rate, operations_of, seconds_of_products

    trainers, left_out = made_trainers(arguments)
    names, run = list(trainers), next(iter(trainers.values())).run
    if arguments.peer != "none":
        check_peer(arguments.peer, run)
    about = machine(run) | {"command": sys.argv[1:], "rounds": arguments.rounds}
    model, data, settings = run.config.model["_target_"].rpartition(".")[2], run.config.data.name, run.config.train
    print(
        f"{model} on {data}, {settings.batch_size_labelled} + {settings.batch_size_unlabelled} images, "
        f"{about['precision']}, {about['threads']} threads of {about['processor']}, {arguments.rounds} rounds"
    )
    if left_out:
        print(f"left out, as this model cannot have them: {', '.join(left_out)}")
    print()
    medians = time_estimators(trainers, arguments.rounds)
    on_gpu, rows = run.device.type == "cuda", []  # where a step is launches, and its products say nothing of it
    rate = None if on_gpu else best_rate(run)
    print(f"{'estimator':<30}{'calls':>6}{'ms':>9}{'steps/s':>9}", end="")
    print("" if on_gpu else f"{'products':>10}{'floor':>8}", end="")
    print("".join(f"{part:>10}" for part in PARTS) + (f"{'MiB':>8}" if arguments.memory else ""), end="")
    print(f"{'eager ms':>10}{'graph ms':>10}" if on_gpu else "")
    for name in sorted(names, key=lambda name: sum(medians[name].values())):
        parts, trainer = medians[name], trainers[name]
        seconds = sum(parts.values())
        operations = operations_of(trainer.step)
        row = {"estimator": name, "evaluations": trainer.metrics["evaluations"], "seconds": seconds, "parts": parts}
        row |= {"floating_point_operations": operations}
        shares = "".join(f"{parts[part] / seconds:>10.1%}" for part in PARTS)
        print(f"{name:<30}{row['evaluations']:>6.3g}{1000 * seconds:>9.2f}{1 / seconds:>9.1f}", end="")
        if rate is not None:
            row |= {"products_seconds": seconds_of_products(trainer.step), "floor_seconds": operations / rate}
            print(f"{row['products_seconds'] / seconds:>10.0%}{row['floor_seconds'] / seconds:>8.0%}", end="")
        print(shares, end="")
        if arguments.memory:
            row["peak_mib"] = peak_memory(arguments.overrides, name)
            print(f"{row['peak_mib']:>8.0f}", end="")
        if on_gpu:
            row["in_a_row"] = time_in_a_row(arguments.overrides, name, TURN * arguments.rounds)
            print("".join(f"{1000 * seconds:>10.3f}" for seconds in row["in_a_row"].values()), end="")
        print()
        rows.append(row)
    if on_gpu:
        print("\neager, graph: a step where nothing waits for the device in between, run and replayed")
    else:
        print("\nproducts: the step's products and convolutions alone, each by itself and its best try, over its time")
        print("floor: the same, at the best rate of any square product on this machine")
    peers = {}
    if arguments.peer != "none":
        options = ("--peers-of", names[0], "--peer", arguments.peer, "--rounds", str(arguments.rounds))
        peers = json.loads(apart(*options, *arguments.overrides))
        print(f"\n{'fp32':<46}{'ms':>9}{'steps/s':>9}")
        for name, seconds in peers.items():
            print(f"{name:<46}{1000 * seconds:>9.2f}{1 / seconds:>9.1f}")
    return about | {"best_rate": rate, "estimators": rows, "peers": peers}


def growth_table(arguments: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a step against the number of classes, printed and as a dictionary. Raises ConfigError, DataError."""
    from configs.check import built_model

    first = composed_config([*arguments.overrides, f"data.random_classes={arguments.classes[0]}"])
    if not built_model(first).has_labels:
        raise ConfigError("--classes must be left out with a model that the data's classes have no part in")
    names = split_names(arguments.estimators) if arguments.estimators else ["marginalization", "gumbel_softmax"]
    rows = []
    print(f"{'classes':>8}" + "".join(f"{name:>24}" for name in names) + "    ms a step")
    for number in arguments.classes:
        overrides = [*arguments.overrides, f"data.random_classes={number}"]
        trainers = {name: Trainer(compose_run(overrides, name)) for name in names}
        medians = time_estimators(trainers, arguments.rounds)
        seconds = {name: sum(medians[name].values()) for name in names}
        rows.append({"classes": number, "seconds": seconds})
        print(f"{number:>8}" + "".join(f"{1000 * seconds[name]:>24.2f}" for name in names), flush=True)
    about = machine(trainers[names[0]].run) | {"command": sys.argv[1:], "rounds": arguments.rounds}
    return about | {"growth": rows}


def picture(rows: list[dict[str, Any]], about: str) -> Any:
    """Steps a second against the number of classes (Jang et al. 2017, figure 5), a line an estimator."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    classes = [row["classes"] for row in rows]
    for name in rows[0]["seconds"]:
        axes.loglog(classes, [1 / row["seconds"][name] for row in rows], marker="o", markersize=4, label=name)
    axes.legend(frameon=False, loc="lower left")
    axes.set_xlabel("classes")
    axes.set_ylabel("steps per second")
    axes.set_title(about, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return figure


def numbers_of_classes(text: str) -> list[int]:
    return [positive(number) for number in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="arguments of train.py")
    parser.add_argument("--rounds", type=positive, default=20, help="turns of each contender, of some steps each")
    parser.add_argument("--estimators", help="names between commas; by default all that the model can have")
    parser.add_argument("--peer", choices=("none", "plain", "pyro", "jax"), default="none", help="time these as well")
    parser.add_argument("--memory", action="store_true", help="peak memory of each, in processes of their own")
    parser.add_argument("--classes", type=numbers_of_classes, help="time against the number of classes, random labels")
    parser.add_argument("--picture", type=Path, help="of --classes: steps a second, as .png, .pdf or .svg")
    parser.add_argument("--output", type=Path, help="a .json file for all figures")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--peers-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with refusing_bad_input():
        if arguments.output:
            writable(arguments.output, (".json",))
        if arguments.picture:
            writable(arguments.picture, (".png", ".pdf", ".svg"), "--picture")
        if arguments.picture and not arguments.classes:
            raise ConfigError("--picture must go with --classes: it draws steps a second against their number")
        if arguments.classes and (arguments.memory or arguments.peer != "none"):
            raise ConfigError("--classes must go without --memory and --peer, which are of one number of classes")
        if arguments.picture:
            import_module("matplotlib")  # refused before any work, as these
        if arguments.peer in ("pyro", "jax"):
            import_module(arguments.peer)
        if arguments.peak_of:
            print_peak(arguments.overrides, arguments.peak_of)
            return
        if arguments.peers_of:
            print_peers(arguments.overrides, arguments.peers_of, arguments.rounds, arguments.peer)
            return
        found = growth_table(arguments) if arguments.classes else steps_table(arguments)
        if arguments.output:
            arguments.output.write_text(json.dumps(found, indent=2) + "\n")
        if arguments.picture:
            about = f"{found['precision']}, {found['threads']} threads of {found['processor']}"
            picture(found["growth"], about).savefig(arguments.picture, dpi=130)


if __name__ == "__main__":
    main()
