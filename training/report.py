"""What a person sees while a run goes on: the progress bar, the log and TensorBoard."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from configs.schema import ConfigError, TrainConfig
from data.progress import Line, is_silent
from models.contract import Alarm, Evaluation, Objective
from models.gradient_quality import Measurement
from training.alarms import bound_fell, gradient_exploded
from training.names import hyper_parameters, run_name
from training.process import warn_of_busy_cores
from training.run import Run
from training.run_folder import events_folder
from training.state import flat, plain
from training.tensorboard import FIRST, PROJECTOR, TensorBoard

log = logging.getLogger("catvae")


class Report:
    """The bar, the log and the events of one command: a resumed run has a new one."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run = run
        self.folder = folder
        self.start = run.step
        self.board = self._board()
        self.steps = 0  # timed since the last logging step
        self.metrics: dict[str, Tensor | float] = {}
        self.shown: dict[str, str] = {}
        self.line = Line()
        self.raised: set[str] = set()
        self.seconds = 0.0  # spent training, without evaluation and writing
        self.logged_at = 0.0
        self.ticking_since = time.perf_counter()

    def _board(self) -> TensorBoard:
        config = flat(plain(self.run.config))
        folder = events_folder(self.folder) or self.folder / run_name(self.run.asked, config)
        for place in (folder, folder / PROJECTOR):
            if place.is_symlink() and place != self.folder:  # of somebody else's making
                raise ConfigError(f"{place} is a link, and would be written through: remove it")
        charts = self.run.model.charts
        return TensorBoard(folder, self.run.step, hyper_parameters(self.run.asked, config), charts, self.run.logged)

    def logged_at_step(self, step: int) -> dict[str, float]:
        """The scalars that were written of a step."""
        return self.board.newest if self.board.newest_step == step else {}

    def __enter__(self) -> Report:
        self.stack = ExitStack()
        self.bar = self.stack.enter_context(
            tqdm(
                initial=self.start,
                total=self.run.config.train.steps,
                # quiet where the output is not a terminal, or is that of several jobs
                disable=is_silent() or None,
                unit="step",
                dynamic_ncols=True,
            )
        )
        if not self.bar.disable:
            self.stack.enter_context(logging_redirect_tqdm())
        self.stack.callback(lambda: self.board.close())  # the one there is then
        log.info("%s\n%s", self.run.describe(), self.run.describe_objective())
        for note in self.run.notes:
            log.info(note)
        warn_of_busy_cores(self.run.device)
        if not len(self.run.validation.labels):
            log.info("data.num_validation=0: no accuracy, bound, pictures or alarms while it trains")
        self.board.text("objective", self.run.describe_objective())
        self.board.text("config", f"```yaml\n{OmegaConf.to_yaml(plain(self.run.config))}\n```", self.start)
        self.ticking_since = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def add(self, result: Objective, gradient_norm: Tensor) -> None:
        """Takes in a step's terms, without waiting for the device."""
        self.run.add(result, gradient_norm)
        self.steps += 1
        self.metrics = result.metrics
        self.bar.update()
        if self.line.is_due():
            shown = "".join(f", {name} {value}" for name, value in self.shown.items())
            print(f"step {self.run.step} of {self.run.config.train.steps}{shown}", file=sys.stderr, flush=True)

    def log_step(self, step: int) -> None:
        """Writes the means since the last call."""
        early = self.run.early_norms
        means, norms = self.run.take_means()
        values = {f"train/{name}": mean for name, mean in means.items()}
        self._count()
        values["train/steps_per_second"] = self.steps / (self.seconds - self.logged_at)
        values["train/learning_rate"] = float(self.run.optimizer.param_groups[0]["lr"])
        annealed = {"temperature", *self.run.weights.at_step(step)}
        for name, metric in self.metrics.items():
            tag = f"train/{name}" if name in annealed else f"estimator/{name}"
            values[tag] = float(metric)
        values["train/gradient_norm"] = norms[-1]
        self.board.scalars(values | {f"{FIRST}/J": values["train/J"]}, step)
        self.alarm(step, gradient_exploded(norms, early))
        self.shown["J"] = f"{values['train/J']:.2f}"
        if "train/temperature" in values:
            self.shown["temperature"] = f"{values['train/temperature']:.3f}"
        self.bar.set_postfix(self.shown)
        self.steps, self.logged_at = 0, self.seconds

    def validation(self, step: int, measured: Evaluation) -> None:
        values = {f"val/{name}": value for name, value in measured.means.items()}
        first = next(name for name in ("accuracy", "log_likelihood", "bound") if name in measured.means)
        values[f"{FIRST}/{first}"] = measured.means[first]
        self.board.scalars(values, step)
        seen, model, labels = measured.per_image, self.run.model, self.run.validation.labels
        draws = draws_pictures(step, self.run.config.train)
        if draws:
            self.board.pictures(model, self.run.validation, self.run.binarization, seen, step)
        if seen is not None:
            if draws and model.has_labels:
                assert seen.told is not None
                self.board.predictions(seen.told, self.run.validation, self.run.facts.class_names, step)
            alarms = model.alarms(measured, labels, self.run.weights)
            if self.run.weights.labelled or self.run.weights.unlabelled:  # else the bound means nothing
                of_step, highest = self.run.highest_bound
                pixels = model.num_pixels(self.run.validation.x.shape[1:])
                alarms.append(bound_fell(measured.bound, highest, of_step, pixels))
            # a healthy model has yet to learn to use its latents: it is no warning before half of the steps are done
            self.alarm(step, *alarms, aloud=2 * step >= self.run.config.train.steps)
        if step == self.run.config.train.steps:
            names = self.run.facts.class_names
            self.board.project(self.run.model, self.run.validation, self.run.binarization, names)
        if measured.accuracy is not None:
            self.shown["val accuracy"] = f"{measured.accuracy:.4f}"
        self.bar.set_postfix(self.shown)
        said = [f"{name} {value}" for name, value in self.shown.items()] + [f"val bound {measured.bound:.2f}"]
        if measured.log_likelihood is not None:
            said.append(f"val {self.run.log_likelihood_name.rstrip(',')} {measured.log_likelihood:.2f}")
        log.info("step %d: %s (%d images)", step, ", ".join(said), measured.n)

    def alarm(self, step: int, *alarms: Alarm, aloud: bool = True) -> None:
        """Writes each alarm as 0 or 1, and says in a sentence, if `aloud`, when one is first found up."""
        for alarm in alarms:
            self.board.scalars({f"warning/{alarm.name}": float(alarm.up)}, step)
            if aloud and alarm.up and alarm.name not in self.raised:
                self.raised.add(alarm.name)
                self.board.text(f"warning/{alarm.name}", f"step {step}: {alarm.sentence}", step)
                log.warning("step %d: %s", step, alarm.sentence)

    def diagnostics(self, step: int, measured: Measurement) -> None:
        tags = {
            f"diagnostics/{name}_{part}": value
            for part, quality in measured.parts.items()
            for name, value in asdict(quality).items()
        }
        self.board.scalars(tags, step)

    def roll_back(self, step: int) -> None:
        """Goes on from an earlier step, and drops what was logged past it."""
        self.board.close()
        self.board = self._board()
        self.raised = set()
        self.steps, self.logged_at = 0, self.seconds
        self.bar.n = step
        self.bar.refresh()

    def final(self, values: dict[str, float]) -> None:
        self.board.scalars(values, self.run.step)

    def flush(self) -> None:
        """Waits until all that was reported is in its file."""
        self.board.writer.flush()

    def say(self, message: str) -> None:
        log.info(message)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock that steps per second are counted by."""
        self._count()
        yield
        self.ticking_since = time.perf_counter()

    def _count(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self.ticking_since
        self.ticking_since = now


def draws_pictures(step: int, settings: TrainConfig) -> bool:
    """Whether the validation at `step` draws pictures: after the last step, and as train.pictures_every says.

    By itself at the first eight validations, then at four to each doubling of their number (those of three binary
    digits and zeros): 35 of 1000.
    """
    every = settings.pictures_every
    if every == 0 or step == settings.steps:
        return every != 0
    if every is not None:
        return step // every > (step - settings.validate_every) // every
    number = step // settings.validate_every
    return not number % 2 ** max(0, number.bit_length() - 3)
