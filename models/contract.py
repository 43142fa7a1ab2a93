"""The contract that every family of models keeps: what the trainer, evaluation, pictures and scripts ask of one.

A family is a folder of this package. Its networks, which `config.model` builds from an image's shape and the number of
the data's classes, are `Networks` and make a `Model` of it. All numbers are nats per image; classes are one-hot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import InitVar, asdict, dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from estimators.contract import Estimate, Estimator, check_estimate, entropy
from estimators.reference import reference
from models.likelihoods import Likelihood

ClassifyBy = Literal["classifier", "bound", "both"]  # what tells an image's class
Estimation = Callable[[Estimator, int, torch.Generator], Estimate]  # by an estimator at a step


@dataclass(frozen=True)
class Weights:
    """Weights of J's three terms; Jang et al. 2017 have labelled = unlabelled = 1 and alpha free."""

    labelled: float
    unlabelled: float
    alpha: float
    samples: int = 1  # of y in the bound, where there are no labels
    kl_warmup: int = 0  # steps in which the KL's weight grows to 1, there
    labels_first: int = 0  # steps in which U does not teach q(y|x), then those in which its weight there grows to 1
    distortion_fades: int | None = None  # steps, after those, in which q(y|x)'s images are less and less distorted
    kl_weight: float | Tensor = 1.0  # these weights at the step in hand; tensors [] where they are read on the device
    teaching_weight: float | Tensor = 1.0
    distortion_share: float | Tensor = 1.0

    def kl_weight_at(self, step: int) -> float:
        """The KL's weight at a step, on a straight line (Sønderby et al. 2016; Bowman et al. 2016 bend it)."""
        return min(1.0, (step + 1) / self.kl_warmup) if self.kl_warmup else 1.0

    def teaching_weight_at(self, step: int) -> float:
        """The weight of U in the gradient of q(y|x)'s logits at a step: 0 at first, then on a straight line to 1."""
        return min(1.0, max(0.0, (step + 1) / self.labels_first - 1)) if self.labels_first else 1.0

    @property
    def fading(self) -> int:
        """Steps in which the distortion fades: None is as many as U takes to come in."""
        return self.labels_first if self.distortion_fades is None else self.distortion_fades

    def distortion_share_at(self, step: int) -> float:
        """The part of the distortion that is left at a step: 1 while labels are first, then on a straight line to 0."""
        return min(1.0, max(0.0, 1 - (step + 1 - self.labels_first) / self.fading)) if self.fading else 1.0

    def at_step(self, step: int) -> dict[str, float]:
        """Those that differ between steps, by name."""
        return {
            "kl_weight": self.kl_weight_at(step),
            "teaching_weight": self.teaching_weight_at(step),
            "distortion_share": self.distortion_share_at(step),
        }


@dataclass
class Objective:
    """The loss to minimise, J's terms (scalars, nats per image) and what the estimator reports."""

    loss: Tensor
    terms: dict[str, Tensor]
    metrics: dict[str, Tensor | float]


def maximised(
    terms: dict[str, Tensor], metrics: dict[str, Tensor | float], auxiliary: Tensor | float = 0.0
) -> Objective:
    """J, which is among its terms, to be maximised beside an estimator's auxiliary loss. Here alone J has a sign."""
    return Objective(auxiliary - terms["J"], terms, metrics)


@dataclass
class PerImage:
    """Of each image: q(y|x) [N, ..., K] and its bound [N].

    Where y is enumerated also how b(x, y) is spread over y [N], and softmax_y [b(x, y) + log p(y)] [N, K], which is
    p(y|x) by Bayes' rule with b(x, y) for log p(x|y). Of an evaluation, the probabilities by which it is classified.
    """

    q: Tensor
    bound: Tensor
    bound_spread: Tensor | None = None
    by_bound: Tensor | None = None
    told: Tensor | None = None  # [N, ..., K], as `classified` has them, a mean over draws of binary pixels

    @classmethod
    def joined(cls, parts: Sequence[PerImage]) -> PerImage:
        def all_of(values: list[Tensor | None]) -> Tensor | None:
            found = [value for value in values if value is not None]
            return torch.cat(found) if found else None

        return cls(
            torch.cat([part.q for part in parts]),
            torch.cat([part.bound for part in parts]),
            all_of([part.bound_spread for part in parts]),
            all_of([part.by_bound for part in parts]),
            all_of([part.told for part in parts]),
        )

    def classified(self, by: ClassifyBy) -> Tensor:
        """Probabilities of classes: q(y|x), those by the bound, or the mean of both.

        Raises ValueError for a family that does not tell those by the bound, and for what is none of these.
        """
        if by not in get_args(ClassifyBy):
            raise ValueError(f"evaluation.classify_by must be one of {', '.join(get_args(ClassifyBy))}, got {by}")
        if by == "classifier":
            return self.q
        if self.by_bound is None:
            raise ValueError(f"evaluation.classify_by must be classifier with a model without `by_bound`, got {by}")
        return self.by_bound if by == "bound" else (self.q + self.by_bound) / 2


@dataclass
class Evaluation:
    """Means over a data set of n images; bounds, KLs and log-likelihood in nats per image; None is not measured.

    Bits per dimension are -bound / (D log 2), no fewer than -log2 p(x) / D, for images of D whole grey levels.
    Accuracy and calibration are those of the n_with_label images with a label, of a model that tells classes.
    """

    accuracy: float | None
    bound: float
    reconstruction: float
    kl_y: float | None = None
    kl_z: float | None = None
    kl_a: float | None = None  # of models with an auxiliary a
    calibration_error: float | None = None
    log_likelihood: float | None = None
    bits_per_dimension: float | None = None  # where p(x) is a probability of whole grey levels
    n: int = 0
    n_with_label: int = 0
    seen: InitVar[PerImage | None] = None

    def __post_init__(self, seen: PerImage | None) -> None:
        self.per_image = seen  # no field: fields are what is kept in result.json

    @property
    def means(self) -> dict[str, float]:
        """What was measured, by its name, without the numbers of images."""
        counts = ("n", "n_with_label")
        return {name: value for name, value in asdict(self).items() if value is not None and name not in counts}


@dataclass(frozen=True)
class Alarm:
    """Whether something is wrong, and a sentence about it."""

    name: str
    up: bool
    sentence: str


class Model(nn.Module):
    """A family of models, as everything outside of its folder sees it.

    A family gives its latents, likelihood, `posterior` and `categorical_term`; the rest here does for one layer of few
    enough variables, without labels, and is there to be defined by those that can do more.
    """

    has_labels: ClassVar[bool] = False  # whether it learns the data's classes from labels, and tells them
    kinds: ClassVar[Mapping[str, bool]] = {}  # what `draw` can draw, and whether it takes images
    kinds_of_pixels: ClassVar[Collection[str]] = ("samples",)  # those of them whose pixels can be drawn
    charts: ClassVar[Mapping[str, Mapping[str, Sequence[str]]]] = {}  # custom scalars: section, chart, tags
    embedding: ClassVar[str] = "q(y|x): the probabilities of all variables"  # what the points of `embed` are
    estimated: str = "E_q(y|x)[f(x, y)]"  # the term of J that needs an estimator, as a formula
    evidence: ClassVar[str] = "log p(x)"  # what `log_likelihood` is of
    is_exact: bool = False  # `log_likelihood` is no bound: everything that is not seen is enumerated
    likelihood: Likelihood
    latents: Sequence[tuple[int, int]]  # categorical variables and their classes, by layer
    log_prior: Tensor | None  # log p(y) [K] or [N, K] of the first layer; None where it is uniform

    # ---- what every family has of its own ----

    def posterior(self, x: Tensor) -> Tensor:
        """q(y|x) of images x [B, C, H, W]: [B, K] where y is the class of an image, else [B, N, K]."""
        raise TypeError(f"{type(self).__name__} must define posterior(x)")

    def categorical_term(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Estimation]:
        """The logits [B, N, K] of images x [B, C, H, W], and the term of J that needs an estimator, by one.

        What else is drawn by chance is drawn here, by the generator, and is the same for all estimates.
        """
        raise TypeError(f"{type(self).__name__} must define categorical_term(x, generator)")

    # ---- training ----

    def shapes(self, x: Tensor) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
        """What each network gives for images x [B, C, H, W], by its name, and the shape that it must have.

        Networks may be a person's own: these are looked at before work.
        """
        (variables, classes), *upper = self.latents
        if not upper:
            of_image = (classes,) if self.has_labels else (variables, classes)
            yield "posterior", self.posterior(x), (len(x), *of_image)

    def prepared(self, estimator: Estimator, context_size: int) -> Estimator:
        """The estimator, told its sizes and p(y), once, before its parameters are counted.

        Of a model with several layers of variables, one for each. Raises ValueError as the estimator's `prepare`.
        """
        num_variables, num_classes = self.latents[0]
        estimator.prepare(context_size, num_variables, num_classes)
        estimator.log_prior = self.log_prior
        return estimator

    def check(self, weights: Weights, estimator: Estimator) -> None:
        """Raises ValueError, naming the key, for what this family cannot do with a prepared estimator."""
        for name, wanted in (("labelled", 0), ("alpha", 0), ("labels_first", 0), ("kl_warmup", 0), ("samples", 1)):
            if (value := getattr(weights, name)) != wanted:
                raise ValueError(f"objective.{name} must be {wanted} with this model, got {value:g}")
        if weights.distortion_fades is not None:
            raise ValueError(f"objective.distortion_fades must be null with this model, got {weights.distortion_fades}")
        if type(self).terms_by is Model.terms_by and not reference(*self.latents[0])[1]:
            raise ValueError(
                f"model.latents must be few enough to enumerate, or terms_by be defined, got {self.latents}"
            )

    def objective(
        self,
        estimator: Estimator,
        weights: Weights,
        x: Tensor,
        y_labelled: Tensor,
        *,
        step: int,
        generator: torch.Generator,
    ) -> Objective:
        """J of a minibatch: x [L + U, C, H, W] is L labelled images of classes y_labelled [L, K], then U unlabelled.

        Here J = E_q(y|x)[f(x, y)] - KL(q(y|x) || p(y)), f that of `categorical_term`. A function of its arguments and
        the parameters: the generator is the only source of randomness. Raises ContractError for an estimate of other
        shapes.
        """
        logits, estimated = self.categorical_term(x, generator)
        estimator.log_prior = self.log_prior  # of this step, where it is learned
        estimate = estimated(estimator, step, generator)
        check_estimate(estimate, len(x))
        terms = {
            "J": weights.unlabelled * (estimate.value - estimate.kl).mean(),
            "reconstruction": estimate.value.mean(),
            "kl_y": estimate.kl.mean(),
            "entropy_y": entropy(logits).sum(dim=-1).mean(),
        }
        return maximised(terms, estimate.metrics, estimate.auxiliary)

    def describe_objective(self, weights: Weights, labelled: int, unlabelled: int) -> str:
        """J with its weights, and what each image weighs in it, of so many labelled and unlabelled images."""
        return f"J = {weights.unlabelled:g} x the bound, a mean over {unlabelled} images"

    # ---- evaluation ----

    def num_pixels(self, shape: torch.Size) -> int:
        """Of how many pixels, times channels, p(x|...) tells the probability, in images [C, H, W] of this shape."""
        return math.prod(shape)

    def noise(self, number: int, generator: torch.Generator) -> Tensor:
        """What images need of chance for `terms_by`, [number, ...]; nothing, where y is enumerated and all there is."""
        return torch.empty(number, 0, device=generator.device)

    def terms_by(self, x: Tensor, noise: Tensor) -> tuple[dict[str, Tensor], PerImage]:
        """Terms of the bound, each [B], under the names of `Evaluation`, and what is kept of each image x [B, C, H, W].

        y is enumerated, or drawn as one-hot classes where it has too many, by `noise` [B, ...]: no estimator that
        trains has a part in it.
        """
        exact, _ = self.reference(math.prod(x.shape[1:]))
        nothing = torch.Generator(x.device)  # is drawn
        estimate = self.categorical_term(x, nothing)[1](exact, 0, nothing)
        bound = estimate.value - estimate.kl
        terms = {"bound": bound, "reconstruction": estimate.value, "kl_y": estimate.kl}
        return terms, PerImage(self.posterior(x), bound)

    def log_likelihood_by(self, x: Tensor, draws: Iterable[Tensor]) -> Tensor:
        """log p(x) [B], nats, by importance weighting: a lower bound on average. Each draw is noise [B, ...].

        A family that does not define it has no such number.
        """
        raise ValueError(f"a model of the family {type(self).__name__} has no log p(x)")

    def measure(
        self, x: Tensor, importance_samples: int, generator: torch.Generator, after_draw: Callable[[], None]
    ) -> tuple[dict[str, Tensor], PerImage]:
        """`terms_by` of images x [B, C, H, W], and `log_likelihood` if importance_samples > 0, by so many draws.

        `after_draw` is called after each, 1 + them.
        """

        def draws(number: int) -> Iterator[Tensor]:
            for _ in range(number):
                yield self.noise(len(x), generator)
                after_draw()

        (one,) = draws(1)
        terms, seen = self.terms_by(x, one)
        if importance_samples > 0 and type(self).log_likelihood_by is not Model.log_likelihood_by:
            terms["log_likelihood"] = self.log_likelihood_by(x, draws(importance_samples))
        return terms, seen

    def alarms(self, measured: Evaluation, labels: Tensor, weights: Weights) -> list[Alarm]:
        """What goes wrong quietly, from an evaluation of images with these labels [N], -1 where unknown."""
        return []

    # ---- the laboratory ----

    def reference(self, context_size: int) -> tuple[Estimator, bool]:
        """What estimators are held against, prepared, and whether it is exact."""
        estimator, is_exact = reference(*max(self.latents, key=lambda latents: latents[1] ** latents[0]))
        return self.prepared(estimator, context_size), is_exact

    def networks(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of each network, by its name: parts of the gradient that gradient_quality tells apart."""
        return {name: parameters for name, part in self.named_children() if (parameters := list(part.parameters()))}

    # ---- pictures, and a model that is used ----

    def pictures(self, x: Tensor, generator: torch.Generator, seen: PerImage | None) -> dict[str, Tensor]:
        """Pictures uint8 [C, H, W] by their tags, of the first held-out images x [B, C, H, W], and what all came to."""
        return {}

    def draw(
        self,
        kind: str,
        shape: torch.Size,
        columns: int,
        generator: torch.Generator,
        x: Tensor | None = None,
        draw_pixels: bool = False,
    ) -> Tensor:
        """A picture uint8 [C, H, W] of a kind in `kinds`; images x [B, C, H, W] are for those that take some."""
        raise ValueError(f"a model of the family {type(self).__name__} has no pictures of its own")

    def embed(self, x: Tensor, q: Tensor) -> Tensor:
        """A point [B, E] for each image x [B, C, H, W], whose `posterior` is q."""
        return q.flatten(1)

    def sample(self, number: int, generator: torch.Generator, draw_pixels: bool = False) -> Tensor:
        """Draws of the model [number, D] in [0, 1]: the mean of p(x|...), or pixels drawn from it."""
        raise ValueError(f"a model of the family {type(self).__name__} has no draws")

    def styles(self, number: int, generator: torch.Generator) -> Tensor:
        """What pictures of one class differ in, [number, ...], drawn: of a model with labels alone, as the next."""
        raise ValueError(f"a model of the family {type(self).__name__} has no classes to draw")

    def of_class(self, index: int, styles: Tensor) -> Tensor:
        """Mean pictures [number, D] in [0, 1] of a class, in these styles [number, ...]."""
        raise ValueError(f"a model of the family {type(self).__name__} has no classes to draw")


class Networks:
    """What `config.model` builds: networks of a family, which make a model of it."""

    def model(self, likelihood: Likelihood, prior: Sequence[float]) -> Model:
        """The model, with p(x|...) by `likelihood`; `prior` is the probabilities of the data's classes."""
        raise TypeError(f"{type(self).__name__} must define model(likelihood, prior)")
