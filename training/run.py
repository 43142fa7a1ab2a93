"""Everything that a run is made of, put together from its configuration."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from configs.check import build_optimizer, check, check_labels, prepared_estimator, typed
from configs.schema import Config, ConfigError
from configs.targets import build
from data.batches import Batches, Binarization, EvaluationData, binarize, evaluation_data, fit, training_data
from data.facts import DataError
from data.randomness import keyed_generator
from data.splits import Indices, class_prior
from data.stored import Images
from estimators.contract import Estimator, Schedule
from models.contract import Evaluation, Objective, Weights
from models.evaluation import evaluate
from models.gradient_quality import Measurement, gradient_quality
from models.likelihoods import log_likelihood_name
from models.networks import ImageShape
from training import checkpoints
from training.divergence import Diverged, raise_unless_finite
from training.process import choose_device, choose_precision, share_cores, tune_process
from training.state import CONSTANT, changes, flat, from_anywhere, plain
from training.trained import Facts, build_model, load_parameters, spread_out, stored_state

log = logging.getLogger("catvae")
Part = Literal["val", "test", "labelled", "unlabelled"]
ROLLBACKS = 5  # at most, each with half the learning rate of the one before
USUAL = 1000  # first steps, whose gradient norms tell what is usual
ENOUGH = 10  # checkpoints that a disk should have room for; events take room as well


class Run:
    """A run's data, model, estimator and optimizer, and the number of steps done. Raises ConfigError, DataError."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.asked: dict[str, Any] = {}  # the command line's overrides, choices and references
        self.step = 0
        self.rollbacks = 0
        self.unlooked = False  # the looks that are due at `step` are still to come
        self.logged: dict[str, float] | None = None  # then: the scalars of `step` so far
        self.bounds: tuple[int, list[float]] = (0, [])  # of the validation images, and the step that they are of
        self.sums: dict[str, Tensor] = {}  # of J's terms since the last logging step, on the device
        self.summed = 0
        self.norms: list[Tensor] = []  # of the gradient, in the same steps
        self.early_norms: list[float] = []  # of the first USUAL steps
        self.device = choose_device(config.device.value)
        self.precision = choose_precision(config.precision.value, self.device)
        tune_process()
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is refused as not deterministic
        torch.use_deterministic_algorithms(config.deterministic)
        self.binarization: Binarization = config.data.binarization.value
        self.contents: dict[str, str] = {}  # digests of the files that images came from
        source = self.load_images("train")
        self.notes = source.notes
        self.split = config.data.split(source.labels, source.num_classes, source.class_names, source.digest)
        channels, height, width = source.images.shape[1:]
        self.facts = Facts(
            shape=(channels, height, width),
            class_names=source.class_names,
            binarization=self.binarization,
            resize=config.data.resize,
            likelihood=config.likelihood.value,
            prior=class_prior(config.prior, source.labels[self.split.labelled], source.num_classes),
        )
        shape = ImageShape(channels, height, width)
        torch.manual_seed(config.seed)
        with self.device:
            self.model = build_model(config.model, self.facts)
            check_labels(config, self.model)  # a search's settings come here unseen
            self.estimator: Estimator = prepared_estimator(config, self.model, shape.size)
        share_cores(shape.size * (config.train.batch_size_labelled + config.train.batch_size_unlabelled))
        self.model.to(memory_format=torch.channels_last)
        self.parameters = dict(self.model.named_parameters())
        self.parameters |= {f"estimator.{name}": p for name, p in self.estimator.named_parameters()}
        self.optimizer = build_optimizer(config, list(self.parameters.values()))
        self.lr_factor: Schedule = build(config.lr_factor, "lr_factor")
        self.weights = Weights(**asdict(config.objective))
        self.batches = Batches(
            training_data(source, self.split, self.device, self._on_host(source)),
            batch_size_labelled=config.train.batch_size_labelled,
            batch_size_unlabelled=config.train.batch_size_unlabelled,
            binarization=self.binarization,
            seed=config.seed,
        )
        self.validation = evaluation_data(source, self.split.validation, self.device, self._on_host(source))

    def load_images(self, part: str) -> Images:
        """The images of the `train` or `test` part, their fixed pixels if those are asked for. Raises DataError."""
        source = self.config.data.load(part, mapped=True)
        self._check_contents(source.contents)
        return source.fixed() if self.binarization == "fixed" else source

    def look_at(self, binarization: Binarization) -> None:
        """Has evaluation look at other pixels than those that the run is trained with."""
        self.binarization = binarization
        source = self.load_images("train")
        self.validation = evaluation_data(source, self.split.validation, self.device, self._on_host(source))

    def _on_host(self, source: Images) -> bool:
        """Whether images stay on the host, or in their file, and come to the device a minibatch at a time."""
        placement = self.config.data.placement.value
        return placement == "host" or (placement == "auto" and not fit(source.images, self.device))

    def _check_contents(self, contents: dict[str, str]) -> None:
        """Raises DataError where a file that was read before has other contents now."""
        for file, digest in contents.items():
            if self.contents.setdefault(file, digest) != digest:
                where = self.config.data.path or f"{file} in {self.config.data.root}"
                raise DataError(
                    f"{where} has changed since this run read it, and what is now its test part may have been trained "
                    "on; put back what was there and resume the run from its checkpoint, or start a new run"
                )

    def load_test(self) -> EvaluationData:
        """The test part: looked at once, when training is over, or by scripts.evaluate."""
        return evaluation_data(self.load_images("test"), slice(None), self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def evaluate(
        self,
        data: EvaluationData,
        importance_samples: int = 0,
        after_batch: Callable[[], None] = lambda: None,
        doing: str = "evaluation",
    ) -> Evaluation:
        return evaluate(
            self.model,
            data,
            binarization=self.binarization,
            batch_size=self.config.evaluation.batch_size,
            importance_samples=importance_samples,
            after_batch=after_batch,
            doing=doing,
        )

    def validate(self, after_batch: Callable[[], None] = lambda: None) -> Evaluation:
        """Evaluation of the validation images, whose bounds are kept for the checkpoint."""
        samples = self.config.evaluation.validation_samples
        evaluation = self.evaluate(self.validation, samples, after_batch, doing="validation")
        if evaluation.per_image is not None:
            self.bounds = self.step, spread_out(evaluation.per_image.bound)
        return evaluation

    def rows(self, part: Literal["labelled", "unlabelled"]) -> Indices:
        """The training images of a part. The labelled ones are not among the unlabelled, though J may use them so."""
        if part == "labelled":
            return self.split.labelled
        return np.setdiff1d(self.split.unlabelled, self.split.labelled)

    def load_training(self, part: Literal["labelled", "unlabelled"]) -> EvaluationData:
        """Training images with their true labels, -1 where there is none: to look at, never to train with."""
        return evaluation_data(self.load_images("train"), self.rows(part), self.device)

    def measure(self, part: Part, importance_samples: int | None = None) -> dict[str, float]:
        """Evaluation of a part under the names of result.json.

        PART_n is the number of its images, which means are over, and PART_n_with_label that of those with a known
        label, which accuracy and calibration are over.

        log p(x) is by `importance_samples`; None for the configuration's on the test and the validation part, and
        without it elsewhere.
        """
        settings = self.config.evaluation
        if part == "test":
            data, samples = self.load_test(), settings.importance_samples
        elif part == "val":
            data, samples = self.validation, settings.validation_samples
        else:
            data, samples = self.load_training(part), 0
        if not len(data.labels):
            return {}
        samples = samples if importance_samples is None else importance_samples
        evaluation = self.evaluate(data, samples, doing=f"evaluation of {part}")
        return {f"{part}_{name}": value for name, value in asdict(evaluation).items() if value is not None}

    def unlabelled_minibatch(self, size: int, seed: int) -> Tensor:
        """The first `size` unlabelled training images [B, C, H, W], or all; `seed` draws their binarization."""
        generator = keyed_generator(self.device, seed, "unlabelled minibatch")
        return binarize(self.batches.data.x_unlabelled[:size], self.binarization, generator)

    def add(self, result: Objective, gradient_norm: Tensor) -> None:
        """Takes in a step's terms, without waiting for the device."""
        self.norms.append(gradient_norm.clone())  # a recorded step writes the next one to the same place
        for name, term in result.terms.items():
            self.sums[name] = self.sums.get(name, 0) + term.detach()
        self.summed += 1

    def take_means(self) -> tuple[dict[str, float], list[float]]:
        """Means of J's terms and gradient norms since the last call, however often the run was resumed in between."""
        means = {name: (total / self.summed).item() for name, total in self.sums.items()}
        norms: list[float] = torch.stack(self.norms).tolist()
        self.sums, self.summed, self.norms = {}, 0, []
        self.early_norms = (self.early_norms + norms)[:USUAL]
        return means, norms

    def diagnose(self, after_draw: Callable[[], None] = lambda: None) -> Measurement:
        """The estimator's gradient against the exact one, by new draws of y from the same images and z's noise."""
        settings, seed = self.config.diagnostics, self.config.seed
        x = self.unlabelled_minibatch(settings.batch_size, seed)
        return gradient_quality(
            self.model,
            self.estimator,
            x,
            step=self.step,
            draws=settings.draws,
            seed=seed,
            after_draw=after_draw,
        )

    def save(self, folder: Path) -> Path:
        """Writes a checkpoint that `restore` goes on from to the bit. Raises Diverged rather than keep a bad number."""
        for name, value in [*self.model.state_dict().items(), *self.estimator.state_dict().items()]:
            raise_unless_finite(name, value.double().sum().item(), self.step)
        state = {
            "rollbacks": self.rollbacks,
            "unlooked": self.unlooked,
            "sums": self.sums,
            "summed": self.summed,
            "norms": self.norms,
            "early_norms": self.early_norms,
            "logged": self.logged,
            "facts": asdict(self.facts),
            "validation_bounds": self.bounds[1] if self.bounds[0] == self.step and not self.unlooked else [],
            "config": from_anywhere(plain(self.config)),
            "asked": self.asked,
            "split_hash": self.split.hash,
            "contents": self.contents,
            "model": self.model.state_dict(),
            "estimator": self.estimator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            # our own draws are keyed by the step; this is for networks and estimators from outside
            "random_state": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["random_state_cuda"] = torch.cuda.get_rng_state(self.device)
        path = checkpoints.save(folder, self.step, state)
        free, size = shutil.disk_usage(folder).free, path.stat().st_size + self._yet_to_come()
        if free < ENOUGH * size:
            log.warning("%s has %.1f MB left, and a checkpoint takes %.1f MB", folder, free / 1e6, size / 1e6)
        return path

    def _yet_to_come(self) -> int:
        """Bytes that the first step adds to a checkpoint: the optimizer's state, by what it keeps of one parameter."""
        if self.optimizer.state:
            return 0
        with torch.random.fork_rng(devices=[]):
            one = torch.nn.Parameter(torch.zeros(1000, device=self.device))
            optimizer, one.grad = build_optimizer(self.config, [one]), torch.zeros_like(one)
            optimizer.step()
        kept = sum(value.nbytes for value in optimizer.state[one].values() if isinstance(value, Tensor))
        return sum(parameter.numel() for parameter in self.parameters.values()) * kept // 1000

    def set_learning_rate(self, step: int) -> None:
        """optimizer.lr times lr_factor(step), halved by each rollback."""
        rate = self.optimizer.defaults["lr"] * self.lr_factor(step) * 0.5**self.rollbacks
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # a recorded step reads it there
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def roll_back(self, folder: Path, diverged: Diverged) -> None:
        """Takes up the newest checkpoint, with half the learning rate; raises `diverged` if it may not."""
        if self.config.on_divergence.value != "rollback" or self.rollbacks == ROLLBACKS:
            raise diverged
        rollbacks = self.rollbacks + 1
        self.restore_newest(folder)
        self.rollbacks = rollbacks
        log.warning("%s; back to step %d, with the learning rate times %g", diverged, self.step, 0.5**rollbacks)

    def restore_newest(self, folder: Path) -> None:
        """Takes up the newest checkpoint of a run folder. Raises CheckpointError, ConfigError."""
        self.restore(checkpoints.load(folder, self.device))

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up a checkpoint. Raises ConfigError if it belongs to another experiment."""
        if changed := changes(flat(state["config"]), self.config):
            raise ConfigError(f"resume cannot change the experiment: {changed}; start a new run for that")
        contents = state.get("contents", {})
        if self.config.data.path is None:  # a person's own images are in the split's hash
            self._check_contents(contents)
        if state["split_hash"] != self.split.hash:
            where = self.config.data.path or self.config.data.name
            raise ConfigError(
                f"the data of {where} are not those of this run: the split's hash differs; put back what was there, or "
                "start a new run (scripts.predict on a folder or a file does without)"
            )
        self._check_contents(contents)
        load_parameters(self.model, state)
        self.estimator.load_state_dict(state["estimator"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random_state"].cpu())
        if "random_state_cuda" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_state_cuda"].cpu(), self.device)
        # runs from before have none of these
        self.rollbacks = state.get("rollbacks", 0)
        self.unlooked = state.get("unlooked", False)
        self.logged = state.get("logged")
        self.bounds = state["step"], state.get("validation_bounds", [])
        self.sums, self.summed = state.get("sums", {}), state.get("summed", 0)
        self.norms = state.get("norms", [])
        self.early_norms = state.get("early_norms", [])
        self.asked = state.get("asked", {})
        self.step = state["step"]

    def describe(self) -> str:
        """The run in a line or two, for the log."""
        count = sum(parameter.numel() for parameter in self.model.parameters())
        split = self.split
        return (
            f"{self.config.data.name}: {len(split.labelled)} labelled, {len(split.unlabelled)} unlabelled, "
            f"{len(split.validation)} validation images (split {split.hash[:12]}); "
            f"{self.estimator.name}, {self.config.likelihood.value}, {count:,} parameters, "
            f"{self.device}, {self.precision}"
        )

    @property
    def log_likelihood_name(self) -> str:
        """What the results' log_likelihood is a lower bound of, or equal to."""
        return log_likelihood_name(self.config.likelihood.value, self.binarization, self.model.evidence)

    def describe_objective(self) -> str:
        """J with its weights, and what each image weighs in it."""
        return self.model.describe_objective(self.weights, len(self.split.labelled), len(self.split.unlabelled))


def stored_run(folder: Path, checkpoint: Path | None = None, trusted: Collection[str] = ()) -> Run:
    """The run in `folder` as its newest checkpoint left it, configuration included, for scripts; or as `checkpoint`.

    With its data, which `training.trained.open_run` does without. Its configuration calls nothing but what is this
    program's own, or of the modules `trusted`. Raises CheckpointError, ConfigError, DataError.
    """
    state = stored_state(folder, checkpoint, trusted)
    if not torch.cuda.is_available():  # and it may have been trained on a machine that has one
        state["config"] |= {"device": "cpu", "cuda_graph": False}
    state["config"].setdefault("lr_factor", CONSTANT)
    config = typed(OmegaConf.create(state["config"]))
    check(config)
    run = Run(config)
    run.restore(state)
    return run
