"""Everything that a run is made of, put together from its configuration."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from configs.check import build_optimizer, check_labels, prepared_estimator
from configs.schema import Config
from configs.targets import build
from data.batches import Batches, Binarization, EvaluationData, binarize, evaluation_data, fit, training_data
from data.facts import DataError
from data.randomness import keyed_generator
from data.splits import Indices, class_prior
from data.stored import Images
from estimators.contract import Estimator, Schedule
from models.contract import ClassifyBy, Evaluation, Objective, Weights
from models.evaluation import evaluate
from models.gradient_quality import Measurement, gradient_quality
from models.networks import ImageShape
from training.distributed import Together
from training.names import log_likelihood_name
from training.process import choose_device, choose_precision, share_cores, tune_process
from training.trained import Facts, build_model, spread_out

log = logging.getLogger("catvae")
Part = Literal["val", "test", "labelled", "unlabelled"]
USUAL = 1000  # first steps, whose gradient norms tell what is usual


class Run:
    """A run's data, model, estimator and optimizer, and the number of steps done. Raises ConfigError, DataError."""

    def __init__(self, config: Config, together: Together | None = None) -> None:
        self.config = config
        self.together = together  # with the other processes, where several share each minibatch
        self.asked: dict[str, Any] = {}  # the command line's overrides, choices and references
        self.step = 0
        self.rollbacks = 0
        self.unlooked = False  # the looks that are due at `step` are still to come
        self.logged: dict[str, float] | None = None  # then: the scalars of `step` so far
        self.highest_bound: tuple[int, float] = (0, -math.inf)  # of a validation, and its step
        self.bounds: tuple[int, list[float]] = (0, [])  # of the validation images, and the step that they are of
        self.sums: dict[str, Tensor] = {}  # of J's terms since the last logging step, on the device
        self.summed = 0
        self.norms: list[Tensor] = []  # of the gradient, in the same steps
        self.early_norms: list[float] = []  # of the first USUAL steps
        self.device = choose_device(config.device)
        self.precision = choose_precision(config.precision.value, self.device)
        tune_process()
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is refused as not deterministic
        # use_deterministic_algorithms would tell PyTorch's compiler too, and import it for that
        torch.set_deterministic_debug_mode("error" if config.deterministic else "default")
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
        if together:
            together.share_batch_norm(self.model)
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
        self.validation = self._to_measure(source, self.split.validation)

    def load_images(self, part: str) -> Images:
        """The images of the `train` or `test` part, their fixed pixels if those are asked for. Raises DataError."""
        source = self.config.data.load(part, mapped=True)
        self.check_contents(source.contents)
        return source.fixed() if self.binarization == "fixed" else source

    def look_at(self, binarization: Binarization) -> None:
        """Has evaluation look at other pixels than those that the run is trained with."""
        self.binarization = binarization
        source = self.load_images("train")
        self.validation = self._to_measure(source, self.split.validation)

    def _to_measure(self, source: Images, rows: Indices | slice) -> EvaluationData:
        return evaluation_data(source, rows, self.device, self._on_host(source))

    def _on_host(self, source: Images) -> bool:
        """Whether images stay on the host, or in their file, and come to the device a minibatch at a time."""
        placement = self.config.data.placement.value
        return placement == "host" or (placement == "auto" and not fit(source.images, self.device))

    def check_contents(self, contents: dict[str, str]) -> None:
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
        return self._to_measure(self.load_images("test"), slice(None))

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def evaluate(
        self,
        data: EvaluationData,
        importance_samples: int = 0,
        after_batch: Callable[[], None] = lambda: None,
        doing: str = "evaluation",
        pixel_draws: int | None = None,
        classify_by: ClassifyBy | None = None,
    ) -> Evaluation:
        settings = self.config.evaluation
        return evaluate(
            self.model,
            data,
            binarization=self.binarization,
            batch_size=settings.batch_size,
            importance_samples=importance_samples,
            pixel_draws=settings.pixel_draws if pixel_draws is None else pixel_draws,
            classify_by=classify_by or settings.classify_by.value,
            after_batch=after_batch,
            doing=doing,
        )

    def validate(self, after_batch: Callable[[], None] = lambda: None) -> Evaluation:
        """Evaluation of the validation images, whose bounds are kept for the checkpoint."""
        samples = self.config.evaluation.validation_samples
        evaluation = self.evaluate(self.validation, samples, after_batch, doing="validation")
        if evaluation.per_image is not None:
            self.bounds = self.step, spread_out(evaluation.per_image.bound)
        if evaluation.bound > self.highest_bound[1]:
            self.highest_bound = self.step, evaluation.bound
        return evaluation

    def rows(self, part: Literal["labelled", "unlabelled"]) -> Indices:
        """The training images of a part. The labelled ones are not among the unlabelled, though J may use them so."""
        if part == "labelled":
            return self.split.labelled
        return np.setdiff1d(self.split.unlabelled, self.split.labelled)

    def load_training(self, part: Literal["labelled", "unlabelled"]) -> EvaluationData:
        """Training images with their true labels, -1 where there is none: to look at, never to train with."""
        return self._to_measure(self.load_images("train"), self.rows(part))

    def measure(
        self,
        part: Part,
        importance_samples: int | None = None,
        first: int | None = None,
        pixel_draws: int | None = None,
        classify_by: ClassifyBy | None = None,
    ) -> dict[str, float]:
        """Evaluation of a part, or of its `first` images alone, under the names of result.json.

        PART_n is the number of its images, which means are over, and PART_n_with_label that of those with a known
        label, which accuracy and calibration are over.

        log p(x) is by `importance_samples`; None for the configuration's on the test and the validation part, and
        without it elsewhere. `pixel_draws` and `classify_by` likewise, on all parts.
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
        data = EvaluationData(data.x[:first], data.labels[:first]) if first else data
        samples = samples if importance_samples is None else importance_samples
        doing = f"evaluation of {part}"
        evaluation = self.evaluate(data, samples, doing=doing, pixel_draws=pixel_draws, classify_by=classify_by)
        return {f"{part}_{name}": value for name, value in asdict(evaluation).items() if value is not None}

    def unlabelled_minibatch(self, size: int, seed: int) -> Tensor:
        """`size` unlabelled training images [B, C, H, W], or all; `seed` draws their binarization.

        They are evenly spread over all, which may be sorted by class.
        """
        generator, images = keyed_generator(self.device, seed, "unlabelled minibatch"), self.batches.data.x_unlabelled
        every = max(1, len(images) // size)
        return binarize(images[: size * every : every], self.binarization, generator)

    def add(self, result: Objective, gradient_norm: Tensor) -> None:
        """Takes in a step's terms, without waiting for the device."""
        # a recorded step writes the next numbers to the same place
        self.norms.append(gradient_norm.clone())
        if self.sums:
            torch._foreach_add_(list(self.sums.values()), [result.terms[name].detach() for name in self.sums])
        else:
            self.sums = {name: term.detach().clone() for name, term in result.terms.items()}
        self.summed += 1

    def take_means(self) -> tuple[dict[str, float], list[float]]:
        """Means of J's terms and gradient norms since the last call, however often the run was resumed in between."""
        means = dict(zip(self.sums, (torch.stack(list(self.sums.values())) / self.summed).tolist(), strict=True))
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

    def set_learning_rate(self, step: int) -> None:
        """optimizer.lr times lr_factor(step), halved by each rollback."""
        rate = self.optimizer.defaults["lr"] * self.lr_factor(step) * 0.5**self.rollbacks
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # a recorded step reads it there
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def describe(self) -> str:
        """The run in a line or two, for the log."""
        count = sum(parameter.numel() for parameter in self.model.parameters())
        split = self.split
        return (
            f"{self.config.data.name}: {len(split.labelled)} labelled, {len(split.unlabelled)} unlabelled, "
            f"{len(split.validation)} validation images (split {split.hash[:12]}); "
            f"{self.estimator.name}, {self.config.likelihood.value}, {count:,} parameters, "
            f"{self.device}, {self.precision}{f', {self.together.size} processes' if self.together else ''}"
        )

    @property
    def log_likelihood_name(self) -> str:
        """What the results' log_likelihood is a lower bound of, or equal to."""
        return log_likelihood_name(self.config.likelihood.value, self.binarization, self.model.evidence)

    @property
    def is_exact(self) -> bool:
        """Whether the results' log_likelihood is that number; of pixels drawn from grey levels it bounds a mean's."""
        is_drawn = self.config.likelihood.value == "bernoulli" and self.binarization == "none"
        return self.model.is_exact and not is_drawn

    def describe_objective(self) -> str:
        """J with its weights, and what each image weighs in it."""
        return self.model.describe_objective(self.weights, len(self.split.labelled), len(self.split.unlabelled))
