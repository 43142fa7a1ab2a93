"""A trained model out of its run folder, to be used without its training data: `open_run`.

from training.trained import open_run

model = open_run("outputs/DATE/TIME-NAME")
q = model.classify(images)  # [N, K]
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from configs.check import check_device
from configs.schema import DEVICES, ConfigError, Likelihood
from configs.targets import build
from configs.trust import stored_config
from data.batches import Binarization, binarize_by_itself, own_generators
from data.datasets import facts
from data.facts import DataError
from data.pictures import picture_files, read_pictures
from models.contract import ClassifyBy, Model, Networks
from models.evaluation import classified, evaluating, mean_over_draws, naming_memory, rows_at_once
from models.likelihoods import likelihood
from models.networks import ImageShape
from training import checkpoints
from training.process import choose_device

BOUNDS = 1001  # of the validation images' bounds, at most, that a checkpoint keeps: steps of 0.1 % in their ranks


@dataclass(frozen=True)
class Facts:
    """What a model was told of its data, and what its checkpoint holds of it."""

    shape: tuple[int, int, int]  # channels, height, width
    class_names: tuple[str, ...]  # in the order of the labels
    binarization: Binarization
    resize: str | None  # "HxW" where pictures of every size are brought to one
    likelihood: str  # of models.likelihoods
    prior: list[float]  # p(y) [K]


@dataclass(frozen=True)
class Prediction:
    """What a model of classes says of N images: q [N, K], the exact bound [N], nats, novelty [N], mean z [N, Z].

    q is q(y|x), or the probabilities of classes that the run's `evaluation.classify_by` asks for.
    `novelty` is the share of the validation images whose bound is higher: 1 is an image that the model finds stranger
    than all of those. NaN where the checkpoint has no validation bounds.
    """

    q: Tensor
    bound: Tensor
    novelty: Tensor
    z: Tensor


class Trained:
    """A model as a checkpoint has it, in evaluation mode.

    Images are uint8 [N, C, H, W], or [N, H, W] of one channel, as NumPy arrays or tensors; others raise ValueError, as
    do several images without a pixel above 1, which are of another range.
    What is drawn by chance (binary pixels, a model's noise) is drawn from a key that the image itself is, so that an
    image has the same numbers whatever images it comes with, but for the rounding of floats. Results are tensors on
    the CPU.
    """

    def __init__(self, state: dict[str, Any], device: torch.device) -> None:
        self.facts = facts_of(state)
        self.step: int = state["step"]
        self.device = device
        with torch.random.fork_rng(devices=[]):  # whoever opens a model keeps his own random numbers
            self.model = build_model(state["config"]["model"], self.facts)
        load_parameters(self.model, state)
        self.model.to(device).to(memory_format=torch.channels_last).eval()
        self.batch_size = min(state["config"]["evaluation"]["batch_size"], rows_at_once(math.prod(self.facts.shape)))
        drawn = self.model.has_labels and self.facts.binarization == "dynamic"
        self.pixel_draws: int = state["config"]["evaluation"].get("pixel_draws", 1) if drawn else 1
        self.classify_by: ClassifyBy = state["config"]["evaluation"].get("classify_by", "classifier")
        self.validation_bounds = torch.tensor(state.get("validation_bounds", []), dtype=torch.float64)
        data = state["config"]["data"]
        self.own_images = [Path(data["path"]).expanduser()] if data.get("path") else []  # that it was trained on
        self.has_validation = data.get("num_validation") != 0

    @property
    def batch_size(self) -> int:
        """Images at once. Raises ValueError if it is set to less than 1."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, number: int) -> None:
        self._batch_size = _positive(number, "batch_size")

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.facts.class_names

    def read_pictures(self, paths: str | Path | Iterable[str | Path]) -> npt.NDArray[np.uint8]:
        """Pictures as the model was trained on them, uint8 [N, C, H, W], of files and of all below folders, in order.

        Turned as EXIF says, on white, in grey or colour, and brought to data.resize. Raises DataError, which names all
        that cannot be read.
        """
        files: list[Path] = []
        for path in [paths] if isinstance(paths, (str, Path)) else paths:
            place = _as_path(path, "paths")
            files += picture_files(place) if place.is_dir() else [place]
        return read_pictures(files, self.facts.shape, self.facts.resize is not None)

    def classify(self, images: npt.NDArray[np.uint8] | Tensor) -> Tensor:
        """q(y|x), or as the run's `evaluation.classify_by` says, [N, K], classes in the order of `class_names`.

        Raises ValueError for a model without classes.
        """
        self._check_classes("classify")
        with self._at_work():
            parts = [self._posterior(*drawn).cpu() for drawn in self._batches(images)]
            return torch.cat([self.model.posterior(self._no_images()).cpu(), *parts])

    def encode(self, images: npt.NDArray[np.uint8] | Tensor) -> Tensor:
        """The mean of q(z|x,y) [N, Z] at each image's most probable y; of a model without classes q(y|x) [N, N' K]."""
        with self._at_work():
            parts = [self._embed(*drawn) for drawn in self._batches(images)]
            return torch.cat([self._embed([self._no_images()], []), *parts])

    def predict(self, images: npt.NDArray[np.uint8] | Tensor, in_range: bool = False) -> Prediction:
        """All that scripts.predict writes of images; `in_range` if they are a part of more, which are no black ones.

        Raises ValueError for a model without classes.
        """
        self._check_classes("predict")
        with self._at_work():
            none = self._no_images()
            q, bound, z = [self.model.posterior(none).cpu()], [torch.empty(0)], [self._embed([none], [])]
            for (x, *others), generators in self._batches(images, in_range):
                _, seen = self.model.terms_by(x, self._noise(generators))
                more = [self._classified(other, generators) for other in others]
                of_images = mean_over_draws([seen.classified(self.classify_by), *more])
                q.append(of_images.cpu())
                bound.append(seen.bound.cpu())
                z.append(self.model.embed(x, of_images).cpu())
        bounds = torch.cat(bound)
        return Prediction(torch.cat(q), bounds, self._novelty(bounds), torch.cat(z))

    def log_likelihood(self, images: npt.NDArray[np.uint8] | Tensor, samples: int = 100) -> Tensor:
        """log p(x) [N] in nats, by importance weighting with `samples` draws of z a class: a lower bound on average.

        Of a model without classes, draws of y; of one that completes images, of their lower halves given the upper
        ones. Of pixels as the model takes them: binary ones are drawn once an image where it was trained so. Raises
        ValueError for samples < 1.
        """
        samples = _positive(samples, "samples")
        parts = []
        with self._at_work():
            for (x, *_), generators in self._batches(images):
                draws = (self._noise(generators) for _ in range(samples))
                parts.append(self.model.log_likelihood_by(x, draws).cpu())
        return torch.cat(parts) if parts else torch.empty(0)

    def generate(self, class_name: str, number: int = 1, seed: int = 0) -> Tensor:
        """Mean pictures of p(x|y,z) of a class at `number` draws of z, uint8 [number, C, H, W].

        The same seed draws the same styles for every class, on every device. Raises ValueError for an unknown class, a
        model without classes, number < 1 and what is no integer.
        """
        self._check_classes("generate")
        if class_name not in self.class_names:
            raise ValueError(f"class_name must be one of {', '.join(self.class_names)}, got {class_name}")
        number, seed = _positive(number, "number"), _of_64_bits(seed, "seed")
        index = self.class_names.index(class_name)
        styles = self.model.styles(number, torch.Generator().manual_seed(seed))
        with self._at_work():
            drawn = [self.model.of_class(index, part.to(self.device)).cpu() for part in styles.split(self.batch_size)]
        return self._as_images(torch.cat(drawn))

    def sample(self, number: int = 1, seed: int = 0) -> Tensor:
        """Mean pictures of draws of the model, uint8 [number, C, H, W].

        Raises ValueError for number < 1, what is no integer, and a model that draws no whole images.
        """
        number, seed = _positive(number, "number"), _of_64_bits(seed, "seed")
        generator, parts = torch.Generator(self.device).manual_seed(seed), []
        with self._at_work():
            for first in range(0, number, self.batch_size):
                parts.append(self.model.sample(min(self.batch_size, number - first), generator).cpu())
        return self._as_images(torch.cat(parts))

    def _as_images(self, pixels: Tensor) -> Tensor:
        return (pixels * 255).round().to(torch.uint8).view(-1, *self.facts.shape)

    def _check_classes(self, method: str) -> None:
        if not self.model.has_labels:
            raise ValueError(
                f"{method} needs a model that tells classes, and this one has none: encode gives the probabilities of "
                "its variables, log_likelihood how well it knows an image"
            )

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        with evaluating(self.model), naming_memory(self.batch_size, "batch_size"):
            yield

    def _batches(
        self, images: npt.NDArray[np.uint8] | Tensor, in_range: bool = False
    ) -> Iterator[tuple[list[Tensor], list[torch.Generator]]]:
        """Pixels [B, C, H, W] as the networks take them, `pixel_draws` times, and each image's own generator."""
        self._check(images)
        if len(images) > 1 and not in_range and images.max() <= 1:
            raise ValueError(
                f"images must be grey levels of 0 to 255, got none above {int(images.max())} in {len(images)} images; "
                "pixels of 0 and 1 are to be multiplied by 255"
            )
        for first in range(0, len(images), self.batch_size):
            part = images[first : first + self.batch_size]
            pixels = part.cpu() if isinstance(part, Tensor) else torch.from_numpy(np.array(part))
            pixels = pixels.contiguous().view(len(pixels), *self.facts.shape)
            generators = own_generators(pixels)
            how = self.facts.binarization
            draws = [binarize_by_itself(pixels, how, generators) for _ in range(self.pixel_draws)]
            yield [x.to(self.device) for x in draws], generators

    def _posterior(self, draws: Sequence[Tensor], generators: list[torch.Generator]) -> Tensor:
        """Probabilities of classes [B, K], or q(y|x) [B, N, K], of images whose pixels are so drawn."""
        return mean_over_draws([self._classified(x, generators) for x in draws])

    def _classified(self, x: Tensor, generators: list[torch.Generator]) -> Tensor:
        by = self.classify_by if len(x) else "classifier"
        return classified(self.model, x, by, lambda: self._noise(generators))

    def _embed(self, draws: Sequence[Tensor], generators: list[torch.Generator]) -> Tensor:
        return self.model.embed(draws[0], self._posterior(draws, generators)).cpu()

    def _no_images(self) -> Tensor:
        """[0, C, H, W], which has results of the right shapes."""
        return torch.empty(0, *self.facts.shape, device=self.device)

    def _check(self, images: npt.NDArray[np.uint8] | Tensor) -> None:
        """Raises ValueError, in one sentence, for what are no images of the model's shape."""
        channels, height, width = self.facts.shape
        wanted = f"[N, {channels}, {height}, {width}]"
        if channels == 1:
            wanted += f" or [N, {height}, {width}]"
        shape, dtype = list(getattr(images, "shape", [])), getattr(images, "dtype", type(images).__name__)
        if dtype not in (np.uint8, torch.uint8):
            scale = "; pixels in 0..1 are to be multiplied by 255" if "float" in str(dtype) else ""
            raise ValueError(f"images must be uint8 {wanted}, got {dtype} {shape}{scale}")
        if shape[1:] != [channels, height, width] and not (channels == 1 and shape[1:] == [height, width]):
            alone = "; one image alone is images[None]" if shape in ([channels, height, width], [height, width]) else ""
            raise ValueError(f"images must be uint8 {wanted}, got {shape}{alone}")

    def _noise(self, generators: list[torch.Generator]) -> Tensor:
        """The model's noise [B, ...], each row by its image's own generator."""
        return torch.cat([self.model.noise(1, generator) for generator in generators]).to(self.device)

    def _novelty(self, bound: Tensor) -> Tensor:
        known = self.validation_bounds
        if not len(known):
            return torch.full_like(bound, math.nan)
        return 1 - torch.searchsorted(known, bound.double(), right=True) / len(known)


def _positive(number: Any, name: str) -> int:
    if not isinstance(number, (int, np.integer)) or isinstance(number, bool) or number < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {number}")
    return int(number)


def _of_64_bits(number: Any, name: str) -> int:
    if not isinstance(number, (int, np.integer)) or not -(2**63) <= number < 2**64:
        raise ValueError(f"{name} must be an integer of 64 bits, got {number}")
    return int(number)


def open_run(
    folder: str | Path, device: str = "cpu", checkpoint: str | Path | None = None, trusted: str | Collection[str] = ()
) -> Trained:
    """The model of a run folder as its newest checkpoint has it, or as the one named; its training data is not needed.

    `folder` may be a checkpoint in it. `device` is auto, cpu, cuda or a GPU such as cuda:1. Networks that are not of
    this program are called if their module is among `trusted`. Raises CheckpointError, ConfigError, DataError, each
    with one sentence.
    """
    if not isinstance(device, str) or not re.fullmatch(DEVICES, device):
        raise ConfigError(f"device must be one of auto, cpu, cuda, or a GPU such as cuda:1, got {device}")
    check_device(device)
    named = None if checkpoint is None else _as_path(checkpoint, "checkpoint")
    trusted = [trusted] if isinstance(trusted, str) else trusted
    if wrong := [name for name in trusted if not isinstance(name, str)]:
        raise ConfigError(f"trusted must be names of modules, got {wrong[0]}")
    return Trained(stored_state(_as_path(folder, "folder"), named, trusted), choose_device(device))


def _as_path(path: Any, name: str) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(f"{name} must be a path, got {path}")
    return Path(path).expanduser()


def stored_state(folder: Path, checkpoint: Path | None = None, trusted: Collection[str] = ()) -> dict[str, Any]:
    """The newest checkpoint of a run folder, or the one named, on the CPU, with a configuration that may be built.

    `folder` may be a checkpoint itself, if none is named. Raises CheckpointError, ConfigError.
    """
    if checkpoint is None and folder.is_file():
        folder, checkpoint = folder.parent.parent, folder.absolute()
    cpu = torch.device("cpu")
    state = checkpoints.load_named(folder, checkpoint, cpu) if checkpoint else checkpoints.load(folder, cpu)
    return state | {"config": stored_config(state, trusted)}


def build_model(config: Any, known: Facts) -> Model:
    """The model as it is before training, its networks by `config.model`, on the default device. Raises ConfigError."""
    networks: Networks = build(config, "model", ImageShape(*known.shape), len(known.class_names) or 1)
    model = networks.model(likelihood(known.likelihood, known.shape[0]), known.prior or [1.0])
    if model.has_labels and not known.class_names:
        raise ConfigError("the checkpoint's facts name no classes, which its model tells; is it of this program?")
    return model


def load_parameters(model: Model, state: dict[str, Any]) -> None:
    """Raises ConfigError for a checkpoint of other layers."""
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, TypeError, AttributeError) as error:  # the latter two of what are no parameters at all
        raise ConfigError(
            "the checkpoint has other layers than the networks have now; use the version of the program that made it, "
            "whose git_commit is in its result.json, or start a new run"
        ) from error


def facts_of(state: dict[str, Any]) -> Facts:
    """What a checkpoint knows of its data. One from before it held that needs the data, unless it is a published one.

    Raises DataError.
    """
    if stored := state.get("facts"):
        return _checked(stored)
    data = state["config"]["data"]
    try:
        known = facts(data["name"], data.get("path"), data.get("random_classes"), resize=data.get("resize"))
    except DataError as error:
        raise DataError(f"the checkpoint is from before it held its images' shape and classes: {error}") from error
    names = known.class_names
    return Facts(known.shape, names, data["binarization"], None, "bernoulli", [1 / len(names)] * len(names))


def _checked(stored: Any) -> Facts:
    """The facts in a checkpoint, which may be anybody's. Raises ConfigError."""
    try:
        known = Facts(**stored | {"shape": tuple(stored["shape"]), "class_names": tuple(stored["class_names"])})
        is_possible = (
            len(known.shape) == 3
            and all(isinstance(side, int) and 0 < side < 2**16 for side in known.shape)
            and len(known.prior) == len(known.class_names) != 1
            and all(isinstance(p, float) and 0 < p < 1 for p in known.prior)
            and all(isinstance(name, str) for name in known.class_names)
            and known.binarization in get_args(Binarization)
            and known.likelihood in {name.value for name in Likelihood} - {"auto"}
        )
    except (TypeError, KeyError) as error:
        raise ConfigError(f"the checkpoint's facts are not those of a model ({error})") from error
    if not is_possible:
        raise ConfigError("the checkpoint's facts are not those of a model; is it of this program?")
    return known


def spread_out(bounds: Tensor) -> list[float]:
    """Validation bounds [N] in order, and of more than BOUNDS as many quantiles, from the lowest to the highest."""
    ordered = bounds.double().cpu().sort().values
    if len(ordered) > BOUNDS:
        ordered = ordered[torch.linspace(0, len(ordered) - 1, BOUNDS).round().long()]
    return [float(bound) for bound in ordered]
