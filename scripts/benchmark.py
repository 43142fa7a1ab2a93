"""Times a training step of every estimator, in one sitting and turn by turn, so that a busy moment slows all alike.

uv run python -m scripts.benchmark --rounds 20 model=mlp precision=fp32

A step is the trainer's own: minibatch, J, backward, optimizer; nothing is logged. Prints the median over rounds.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import TYPE_CHECKING, Any

from configs.schema import ConfigError
from scripts.command import positive, refusing_bad_input
from scripts.gradient_quality import all_names, compose_estimator

if TYPE_CHECKING:
    from training.run import Run

WARM_UP = 3  # steps before the first that counts


def compose_run(overrides: list[str], estimator: str) -> Run:
    """The run that train.py would make of `overrides`, with the named estimator. Raises ConfigError, DataError."""
    from hydra import compose, initialize_config_dir

    from configs.check import COMPOSING_ERRORS, typed
    from configs.wording import CONFIGS, explain
    from training.run import Run

    try:
        with initialize_config_dir(str(CONFIGS), version_base=None):
            config = typed(compose("config", overrides))
    except COMPOSING_ERRORS as error:
        raise ConfigError(explain(error, overrides)) from error
    config.estimator = compose_estimator(estimator, config)
    return Run(config)


def step(run: Run) -> Any:
    """One training step; returns the estimator's metrics."""
    from data.randomness import keyed_generator
    from models.objective import objective

    generator = keyed_generator(run.device, run.config.seed, "step", run.step)
    batch = run.batches(run.step, generator)
    with run.autocast():
        result = objective(run.model, run.estimator, run.weights, *batch, step=run.step, generator=generator)
    run.optimizer.zero_grad(set_to_none=True)
    result.loss.backward()
    run.optimizer.step()
    run.step += 1
    return result.metrics


def timed(run: Run) -> float:
    """Seconds of a step, until the device has done it."""
    import torch

    start = time.perf_counter()
    step(run)
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="arguments of train.py")
    parser.add_argument("--rounds", type=positive, default=20, help="steps of each estimator")
    arguments = parser.parse_args()
    with refusing_bad_input():
        import torch

        runs = {name: compose_run(arguments.overrides, name) for name in all_names()}
        calls = {name: [step(run) for _ in range(WARM_UP)][-1]["evaluations"] for name, run in runs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(arguments.rounds):
            for name, run in runs.items():
                seconds[name].append(timed(run))
    first = next(iter(runs.values()))
    threads = f", {torch.get_num_threads()} threads" if first.device.type == "cpu" else ""
    print(f"{first.config.data.name}, {first.precision} on {first.device}{threads}, {arguments.rounds} rounds\n")
    print(f"{'estimator':<30}{'calls':>6}{'ms a step':>11}{'steps/s':>9}")
    for name in sorted(runs, key=lambda name: median(seconds[name])):
        middle = median(seconds[name])
        print(f"{name:<30}{calls[name]:>6.3g}{1000 * middle:>11.1f}{1 / middle:>9.1f}")


if __name__ == "__main__":
    main()
