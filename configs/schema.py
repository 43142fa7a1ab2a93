"""The typed configuration: every key, its type, and the values that make sense. Imports nothing heavy."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from data.datasets import NAMES, OWN, facts, load
from data.facts import DatasetFacts
from data.pictures import size_of
from data.splits import Indices, Split, check_sizes, count_of, draw_split
from data.stored import Images


class ConfigError(Exception):
    """An unusable configuration; the message names the key, the value and what is allowed."""


class Binarization(Enum):
    dynamic = "dynamic"
    fixed = "fixed"
    threshold = "threshold"
    none = "none"


class Placement(Enum):
    auto = "auto"
    device = "device"
    host = "host"


DEVICES = r"auto|cpu|cuda(:\d+)?"


class Precision(Enum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Likelihood(Enum):
    """Of models.likelihoods; `auto` follows the pixels."""

    auto = "auto"
    bernoulli = "bernoulli"
    continuous_bernoulli = "continuous_bernoulli"
    gaussian = "gaussian"
    discretized_logistic = "discretized_logistic"


class ClassifyBy(Enum):
    classifier = "classifier"  # q(y|x)
    bound = "bound"  # Bayes' rule, with b(x, y) for log p(x|y)
    both = "both"  # the mean of both


class OnDivergence(Enum):
    stop = "stop"
    rollback = "rollback"


def _at_least(minimum: int, **values: int) -> None:
    for key, value in values.items():
        if value < minimum:
            raise ValueError(f"{key.replace('__', '.')} must be >= {minimum}, got {value}")


@dataclass
class DataConfig:
    name: str = MISSING  # one of data.datasets.NAMES
    root: str = MISSING  # where files are kept, torchvision's layout
    path: str | None = None  # of data=arrays, and of that alone: an .npz file or a folder
    checksum: bool = True  # files other than those published are refused
    # any: OmegaConf has no union that may be missing
    num_labelled: Any = MISSING  # a number, or all that have a label; 0 is training without labels
    num_validation: Any = MISSING  # a number; below 1: of the images with a label; 0 is none
    num_test: Any = None  # of data=arrays, likewise; null is a sixth of each class
    balanced: bool = True  # as many labelled images of each class; else in proportion to how many there are
    stratified: bool = False  # validation images are drawn by class, in proportion; else over all that have a label
    resize: str | None = None  # of data=arrays: HEIGHTxWIDTH to bring all images to
    placement: Placement = Placement.auto  # of the images; on the host, or in their file, what is larger than a device
    split_seed: int = 0  # draws the split, and nothing else
    labelled_in_unlabelled: bool = True  # labelled images are also seen without their labels
    binarization: Binarization = Binarization.dynamic
    random_classes: int | None = None  # every label replaced by one of so many at random: for timing

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"data.name must be one of {', '.join(NAMES)}, got {self.name}")
        for key in ("path", "num_test", "resize"):
            if (value := getattr(self, key)) is not None and self.name != OWN:
                raise ValueError(f"data.{key} is read by data={OWN} alone, got {value} with data={self.name}")
        if self.num_test is not None:
            count_of("data.num_test", self.num_test, 0)
        if self.resize is not None:
            size_of(self.resize)
        if self.random_classes is not None:
            _at_least(2, data__random_classes=self.random_classes)
        self.check_sizes()
        _at_least(0, data__split_seed=self.split_seed)

    def check_sizes(self, needs_labels: bool = False) -> None:
        """Raises ValueError, DataError for a split that cannot be drawn; with `needs_labels`, for one without any."""
        check_sizes(
            self.known(needs_labels),
            num_labelled=self.num_labelled,
            num_validation=self.num_validation,
            balanced=self.balanced,
            stratified=self.stratified,
            labelled_in_unlabelled=self.labelled_in_unlabelled,
            needs_labels=needs_labels,
        )

    def known(self, needs_labels: bool = False) -> DatasetFacts:
        """What is known of the dataset without reading pixels; if no label is asked for, it needs none.

        Raises DataError.
        """
        return facts(
            self.name,
            self.path,
            self.random_classes,
            num_test=self.num_test,
            resize=self.resize,
            needs_labels=needs_labels or self.num_labelled != 0,
        )

    def load(self, part: str, mapped: bool = False) -> Images:
        """The `train` or `test` part, as data.datasets.load gives it. Raises DataError."""
        return load(
            self.name,
            self.root,
            part,
            self.checksum,
            self.path,
            self.random_classes,
            num_test=self.num_test,
            resize=self.resize,
            mapped=mapped,
            needs_labels=self.num_labelled != 0,
        )

    def split(self, labels: Indices, num_classes: int, class_names: tuple[str, ...] = (), digest: str = "") -> Split:
        """The split that is drawn of the training part's labels. Raises ValueError."""
        return draw_split(
            labels,
            num_classes,
            num_labelled=self.num_labelled,
            num_validation=self.num_validation,
            split_seed=self.split_seed,
            labelled_in_unlabelled=self.labelled_in_unlabelled,
            balanced=self.balanced,
            stratified=self.stratified,
            class_names=class_names,
            digest=digest,
        )


@dataclass
class ObjectiveConfig:
    labelled: float = 1.0
    unlabelled: float = 1.0
    alpha: float = 1.0
    samples: int = 1  # of y in the bound, of models without labels
    kl_warmup: int = 0  # steps, of models without labels
    labels_first: int = 0  # steps, of models with labels
    distortion_fades: int | None = None  # steps, of models with labels; null is as many as labels_first

    def __post_init__(self) -> None:
        _at_least(1, objective__samples=self.samples)
        _at_least(0, objective__kl_warmup=self.kl_warmup, objective__labels_first=self.labels_first)
        if self.distortion_fades is not None and self.distortion_fades < 1:
            raise ValueError(f"objective.distortion_fades must be null or >= 1, got {self.distortion_fades}")
        for key in ("labelled", "unlabelled", "alpha"):
            value = getattr(self, key)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"objective.{key} must be >= 0 and finite, got {value}")
        if self.labelled == self.unlabelled == self.alpha == 0:
            raise ValueError("objective.unlabelled (or .alpha, with labels) must be > 0 when the others are 0, got 0.0")


@dataclass
class TrainConfig:
    steps: int = MISSING
    batch_size_labelled: int = MISSING  # 0 where the model trains without labels
    batch_size_unlabelled: int = MISSING
    log_every: int = MISSING
    validate_every: int = MISSING
    checkpoint_every: int = MISSING
    pictures_every: int | None = None  # steps between validations that draw; 0 is never, null ever more rarely
    clip_gradient: float | None = None  # the largest norm of the model's gradient, to which a longer one is shortened

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            if value is not None and key != "clip_gradient":
                _at_least(0 if key in ("pictures_every", "batch_size_labelled") else 1, **{f"train__{key}": value})
        if (limit := self.clip_gradient) is not None and not 0 < limit < math.inf:
            raise ValueError(f"train.clip_gradient must be null, or > 0 and finite, got {limit}")


@dataclass
class EvaluationConfig:
    batch_size: int = MISSING
    importance_samples: int = MISSING  # draws, of M2 those of z per class, in the estimate of log p(x) of test images
    validation_samples: int = 0  # the same of validation images
    test: bool = True  # at the end of the run; a default, so that runs from before have it
    pixel_draws: int = 1  # of a grey image's binary pixels, over which q(y|x) is a mean where images are classified
    classify_by: ClassifyBy = ClassifyBy.classifier

    def __post_init__(self) -> None:
        _at_least(1, evaluation__batch_size=self.batch_size, evaluation__importance_samples=self.importance_samples)
        _at_least(1, evaluation__pixel_draws=self.pixel_draws)
        _at_least(0, evaluation__validation_samples=self.validation_samples)


@dataclass
class DiagnosticsConfig:
    """The running estimator's gradient against the exact one; defaults, so that runs from before have the section."""

    every: int = 0  # steps; 0 is never
    draws: int = 20  # gradients of the estimator
    batch_size: int = 50  # unlabelled training images, the same each time

    def __post_init__(self) -> None:
        _at_least(0, diagnostics__every=self.every)
        _at_least(3, diagnostics__draws=self.draws)
        _at_least(1, diagnostics__batch_size=self.batch_size)


@dataclass
class Config:
    """`model`, `estimator` and `optimizer` name their class in `_target_`, so that any importable one can be used."""

    data: DataConfig = MISSING
    model: Any = MISSING
    estimator: Any = MISSING
    optimizer: Any = MISSING
    objective: ObjectiveConfig = MISSING
    train: TrainConfig = MISSING
    evaluation: EvaluationConfig = MISSING
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    lr_factor: Any = MISSING  # a schedule that multiplies optimizer.lr
    seed: int = 0
    device: str = "auto"  # cpu, cuda, or one of several GPUs, such as cuda:1
    precision: Precision = Precision.auto
    resume: str | None = None  # a run folder to go on with
    on_divergence: OnDivergence = OnDivergence.stop  # or back to the last checkpoint, with half the learning rate
    cuda_graph: bool = False  # a step is recorded once and replayed; on a GPU alone
    likelihood: Likelihood = Likelihood.bernoulli  # of the pixels; runs from before had no other
    prior: Any = "uniform"  # p(y): uniform, labelled (frequencies among the labels), or a list of K probabilities
    deterministic: bool = False  # same seed, same bits on a GPU too, or a refusal that names the operation

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be >= 0 and < 2**64, got {self.seed}")
        if not re.fullmatch(DEVICES, self.device):
            raise ValueError(f"device must be one of auto, cpu, cuda, or a GPU such as cuda:1, got {self.device}")
        if self.objective.kl_warmup > self.train.steps:
            wanted = f"<= train.steps, {self.train.steps}, got {self.objective.kl_warmup}"
            raise ValueError(f"objective.kl_warmup must be {wanted}: J would never be the bound")
        if (first := self.objective.labels_first) > self.train.steps // 2:
            wanted = f"<= half of train.steps, {self.train.steps}, got {first}"
            raise ValueError(f"objective.labels_first must be {wanted}: U would never teach q(y|x) with all its weight")
        left = self.train.steps - first
        if (fades := self.objective.distortion_fades) is not None and fades > left:
            wanted = f"<= the {left} steps that objective.labels_first={first} leaves of train.steps, got {fades}"
            raise ValueError(f"objective.distortion_fades must be {wanted}: the distortion would stay to the end")
        data = self.data
        if (draws := self.evaluation.pixel_draws) > 1 and data.binarization is not Binarization.dynamic:
            raise ValueError(
                f"evaluation.pixel_draws must be 1 where data.binarization={data.binarization.value} draws no pixels "
                f"anew, got {draws}"
            )
        by = self.evaluation.classify_by
        if by is not ClassifyBy.classifier and not (self.objective.labelled or self.objective.unlabelled):
            raise ValueError(f"evaluation.classify_by must be classifier where J has no bound in it, got {by.value}")
        if self.likelihood is Likelihood.auto and data.known().is_binary:
            self.likelihood = Likelihood.bernoulli
        self.likelihood = resolved_likelihood(self.likelihood, data.binarization)
        if self.prior == "labelled" and data.num_labelled == 0:
            raise ValueError("prior must be uniform where data.num_labelled=0 leaves no label to count, got labelled")
        if self.prior not in ("uniform", "labelled"):
            self.prior = _probabilities(self.prior, data.known())


def resolved_likelihood(likelihood: Likelihood, binarization: Binarization) -> Likelihood:
    """`auto` as what the pixels are: binary ones are Bernoulli, whole grey levels have a discretized logistic.

    Raises ValueError where the likelihood would be a density at binary pixels, which has no upper limit there, or
    would spread its probability over grey levels that never come. Bernoulli on grey levels has to be asked for.
    """
    if likelihood is Likelihood.auto:
        grey = binarization is Binarization.none
        return Likelihood.discretized_logistic if grey else Likelihood.bernoulli
    if binarization is not Binarization.none and likelihood is not Likelihood.bernoulli:
        raise ValueError(
            f"likelihood must be bernoulli (or auto) where data.binarization={binarization.value} makes pixels 0 or 1, "
            f"got {likelihood.value}; data.binarization=none keeps the grey levels that it is for"
        )
    return likelihood


def _probabilities(prior: Any, known: DatasetFacts) -> list[float]:
    """A list of K positive numbers whose sum is 1 within a hundredth, divided by their sum. Raises ValueError."""
    numbers = prior if isinstance(prior, list) else []
    total = sum(p for p in numbers if isinstance(p, (int, float)))
    if (
        len(numbers) == known.num_classes
        and all(isinstance(p, (int, float)) and not isinstance(p, bool) and 0 < p < math.inf for p in numbers)
        and abs(total - 1) < 0.01 + 1e-9
    ):
        return numbers if abs(total - 1) < 1e-9 else [p / total for p in numbers]  # so that dividing again changes none
    raise ValueError(
        f"prior must be uniform, labelled or a list of {known.num_classes} positive numbers that sum to 1, "
        f"one for each class, got {prior}"
    )


ConfigStore.instance().store(name="schema", node=Config)
# Hydra copies all of the store 109 times to list the choices of --help, and writes to no copy: 1.05 s, and 0.45 s so
ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]
