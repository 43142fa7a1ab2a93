"""Builds what a configuration names and throws it away, so that an unusable one is refused before any work."""

from __future__ import annotations

import functools
import inspect
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any, NoReturn

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)
from yaml import YAMLError

from configs.schema import ClassifyBy, Config, ConfigError
from configs.targets import build, with_line
from configs.trust import OWN
from configs.uncompiled import leave_compiler_out
from configs.wording import explain, keys, printable, shown, unknown_key
from data.datasets import load
from data.splits import Indices, class_prior

# what composing a configuration raises; Hydra refuses some arguments with ValueError
COMPOSING_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError)

# limits that hold for every optimizer that has the setting; torch itself lets infinity and some NaN pass
OPTIMIZER_LIMITS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lr": ("> 0 and finite", lambda value: 0 < value < math.inf),
    "eps": (">= 0 and finite", lambda value: 0 <= value < math.inf),
    "weight_decay": (">= 0 and finite", lambda value: 0 <= value < math.inf),
    "momentum": (">= 0 and finite", lambda value: 0 <= value < math.inf),
    "betas": ("numbers in [0, 1)", lambda value: all(0 <= beta < 1 for beta in value)),
}


def typed(config: DictConfig) -> Config:
    """The composed configuration as a Config, checked key by key. Raises ConfigError."""
    plain: Any = None
    try:
        try:
            plain = OmegaConf.to_container(config, resolve=True)
        except InterpolationResolutionError:  # what it points at may be at fault, and is then named below
            plain = OmegaConf.to_container(config, resolve=False)
        # merging again into the schema is what catches a misspelt key that was added with +
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))  # type: ignore[return-value]
    except (ConfigKeyError, ConfigAttributeError) as error:
        key = str(error.full_key)
        known = [other for other in keys(plain) if other != key]
        value = functools.reduce(dict.__getitem__, key.split("."), plain)
        raise ConfigError(unknown_key(f"{key}={shown(value)}", key, known)) from error
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check(config: Config) -> None:
    """Builds what `_target_` names and throws it away, so that a bad setting is found now. Raises ConfigError."""
    import torch

    from estimators.contract import Estimator

    known, model = config.data.known(), built_model(config)
    estimator = build(config.estimator, "estimator")
    check_kind(config.estimator, "estimator", estimator, Estimator)
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    parameter = torch.nn.Parameter(torch.zeros(1, device="cuda" if on_gpu else "cpu"))
    optimizer = build_optimizer(config, [parameter])
    check_kind(config.optimizer, "optimizer", optimizer, torch.optim.Optimizer)
    factor = build(config.lr_factor, "lr_factor")(0)
    if not isinstance(factor, (int, float)):
        got = f"{config.lr_factor['_target_']}: it gives a {type(factor).__name__}"
        raise ConfigError(f"lr_factor._target_ must make a schedule, which gives a number at each step, got {got}")
    _try_step(config, optimizer, parameter)
    try:
        inspect.signature(estimator.forward).bind("f", "logits", step=0, context=None, generator=None)
    except TypeError:
        call = "(f, logits, *, step, context, generator)"
        got = config.estimator["_target_"]
        raise ConfigError(f"estimator._target_ must make an estimator, called with {call}, got {got}") from None
    if config.prior != "uniform" or model.log_prior is not None:
        _check_reads_prior(config, estimator, model)
    check_labels(config, model)
    if config.prior != "uniform" and not model.has_labels:
        raise ConfigError(
            f"prior must be uniform with {config.model['_target_']}, whose y is no class that labels tell, got "
            f"{shown(config.prior)}; model.prior is that of its variables"
        )
    prepared = prepared_estimator(config, model, math.prod(known.shape))
    is_ours = {key: _is_ours(getattr(config, key)) for key in ("model", "estimator")}
    if not all(is_ours.values()):
        x = torch.zeros(4, *known.shape, device=parameter.device)
        _try_images(config, model, prepared, x, "estimator" if is_ours["model"] else "model")
    if config.diagnostics.every:
        if config.objective.samples > 1:
            raise ConfigError(
                f"diagnostics.every must be 0 with objective.samples={config.objective.samples}, as it measures the "
                f"gradient of one sample's bound, got {config.diagnostics.every}"
            )
        from models.gradient_quality import check_images

        try:
            check_images(model, config.diagnostics.batch_size, "diagnostics.batch_size")
        except ValueError as error:
            raise ConfigError(str(error)) from error


def built_model(config: Config) -> Any:
    """A model of the family and of the sizes that the configuration names, on the CPU. Raises ConfigError."""
    from models.contract import Networks
    from models.likelihoods import likelihood
    from models.networks import ImageShape

    known = config.data.known()
    num_classes = known.num_classes or 1  # without labels: a layer for no class is no error, and PyTorch warns of it
    networks = build(config.model, "model", ImageShape(*known.shape), num_classes)
    check_kind(config.model, "model", networks, Networks)
    return networks.model(likelihood(config.likelihood.value, known.shape[0]), [1 / num_classes] * num_classes)


class EstimatorError(ConfigError):
    """An estimator that cannot be had with a model."""


def prepared_estimator(config: Config, model: Any, context_size: int) -> Any:
    """The estimator that the configuration names, prepared for the model. Raises EstimatorError, ConfigError."""
    from models.contract import Weights

    estimator = build(config.estimator, "estimator")
    try:
        estimator = model.prepared(estimator, context_size)
        model.check(Weights(**asdict(config.objective)), estimator)
    except ValueError as error:
        key, message = str(error).partition(" ")[0], str(error)
        raise EstimatorError(message if key == "estimator" or "." in key else f"estimator.{message}") from error
    return estimator


def check_labels(config: Config, model: Any) -> None:
    """Raises ConfigError, DataError where there are no labels and `model` learns from them, or the other way round."""
    num_labelled, batch_size = config.data.num_labelled, config.train.batch_size_labelled
    if model.has_labels:
        if num_labelled == 0:
            try:
                config.data.check_sizes(needs_labels=True)
            except ValueError as error:
                raise ConfigError(str(error)) from error
        if not batch_size:
            raise ConfigError("train.batch_size_labelled must be >= 1 with a model that learns from labels, got 0")
        return
    for key, value in (("data.num_labelled", num_labelled), ("train.batch_size_labelled", batch_size)):
        if value != 0:
            raise ConfigError(f"{key} must be 0 with a model without labels, got {value}")
    if (by := config.evaluation.classify_by) is not ClassifyBy.classifier:
        raise ConfigError(
            f"evaluation.classify_by must be classifier with a model that tells no classes, got {by.value}"
        )
    if (draws := config.evaluation.pixel_draws) > 1:
        raise ConfigError(f"evaluation.pixel_draws must be 1 with a model that tells no classes, got {draws}")


def _check_reads_prior(config: Config, estimator: Any, model: Any) -> None:
    """Somebody's own estimator may know of no p(y): its KL, and so J, would be those of a uniform one."""
    import torch

    num_classes = model.latents[-1][1]  # of the uppermost variables, which have p(y)
    logits = torch.zeros(1, 1, num_classes, requires_grad=True)
    prior = torch.arange(1.0, num_classes + 1).log_softmax(dim=0)
    kls = []
    with torch.random.fork_rng([]), suppress(Exception):  # what it fails by, training will say
        estimator.prepare(1, 1, num_classes)
        for estimator.log_prior in (None, prior):
            generator, context = torch.Generator().manual_seed(0), torch.zeros(1, 1, 1, 1)
            estimate = estimator(
                lambda y: y.square().sum(dim=(-2, -1)), logits, step=0, context=context, generator=generator
            )
            kls.append(estimate.kl.detach())
    if len(kls) == 2 and torch.equal(*kls):
        key, got = "prior", shown(config.prior)
        if config.prior == "uniform":
            key, got = "model.prior", "one that is learned"
        raise ConfigError(
            f"{key} must be uniform with an estimator whose kl is not from self.log_prior, got {got} "
            f"with {config.estimator['_target_']}; categorical_kl(logits, self.log_prior) is"
        )


def _is_ours(node: Any) -> bool:
    return bool(node["_target_"].startswith(tuple(f"{package}." for package in OWN)))


def _try_images(config: Config, model: Any, estimator: Any, x: Any, key: str) -> None:
    """A person's own networks or estimator may not be called as the family calls them, or give other shapes.

    On the device of the images x [B, C, H, W], that of training, as they may be for no other. Raises ConfigError.
    """
    import torch

    from estimators.contract import ContractError
    from models.contract import Weights

    makes = {"model": f"networks for images {list(x.shape[1:])}", "estimator": "an estimator of the contract"}
    must = f"{key}._target_ must make {makes[key]}, got {getattr(config, key)['_target_']}"
    images, generator = 2 if model.has_labels else 0, torch.Generator(x.device)
    y = torch.eye(model.latents[0][1], device=x.device)[:1].expand(images, -1)
    try:
        model, estimator = model.to(x.device), estimator.to(x.device)
        for name, value, wanted in model.shapes(x):
            if tuple(value.shape) != wanted:
                raise ConfigError(
                    f"{must}: {name} must be {list(wanted)} for {len(x)} of them, got {list(value.shape)}"
                )
        model.objective(estimator, Weights(**asdict(config.objective)), x, y, step=0, generator=generator)
    except ConfigError:
        raise
    except ContractError as error:
        raise ConfigError(f"{must}: {error}") from error
    except Exception as error:  # code of a person's own can fail in any way
        raise ConfigError(f"{must}: {with_line(error)}") from error


def _try_step(config: Config, optimizer: Any, parameter: Any) -> None:
    """Some optimizers refuse their settings, or to be called without a closure, only at the first step."""
    parameter.grad = parameter.detach().clone()
    try:
        optimizer.step()
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        reason, got = " ".join(str(error).split()), config.optimizer["_target_"]
        raise ConfigError(f"optimizer must be able to take a step, got {got}: {reason}") from error


def check_kind(node: Any, key: str, built: Any, kind: type) -> None:
    if not isinstance(built, kind):
        name = f"{kind.__module__}.{kind.__name__}"
        target, made, article = node["_target_"], type(built).__name__, "an" if name[0] in "aeiou" else "a"
        raise ConfigError(f"{key}._target_ must make {article} {name}, got {target}: it makes a {made}")


def build_optimizer(config: Config, parameters: list[Any]) -> Any:
    """The optimizer that the configuration names, over `parameters`. Raises ConfigError."""
    for name, value in config.optimizer.items() if isinstance(config.optimizer, dict) else ():
        limit, is_within = OPTIMIZER_LIMITS.get(name, ("", lambda value: True))
        try:
            if not is_within(value):
                raise ConfigError(f"optimizer.{name} must be {limit}, got {shown(value)}")
        except TypeError:  # not a number: building the optimizer says so
            continue
    settings = config.optimizer
    if isinstance(settings, dict) and isinstance(settings.get("betas"), list):  # torch refuses [0, 0], integers
        betas = [float(beta) if isinstance(beta, int) else beta for beta in settings["betas"]]
        settings = settings | {"betas": betas}
    leave_compiler_out()
    return build(settings, "optimizer", parameters)


def check_device(name: str) -> None:
    """Raises ConfigError for a GPU that this process does not see."""
    import torch

    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name in ("auto", "cpu") or (cards and name in ("cuda", *(f"cuda:{card}" for card in range(cards)))):
        return
    if not cards:
        raise ConfigError(f"device must be auto or cpu where PyTorch finds no CUDA device, got {name}")
    seen = ", ".join(f"cuda:{card}" for card in range(cards))
    raise ConfigError(f"device must be one of auto, cpu, cuda, {seen}, got {name}")


def number_of_processes() -> int:
    """How many share this run, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ and "MASTER_ADDR" in os.environ else 1


def is_follower() -> bool:
    """Whether another process of this run, the first, reads the command line and writes."""
    return number_of_processes() > 1 and os.environ["RANK"] != "0"


def check_processes(config: Config) -> None:
    """Raises ConfigError for what several processes of one run cannot do."""
    import torch

    if (processes := number_of_processes()) == 1:
        return
    for part in ("labelled", "unlabelled"):
        key = f"train.batch_size_{part}"
        if (size := getattr(config.train, f"batch_size_{part}")) % processes:
            raise ConfigError(f"{key} must be divisible by the {processes} processes that share it, got {size}")
    if config.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu or cuda where processes take a GPU each, got {config.device}")
    if config.cuda_graph:
        raise ConfigError("cuda_graph must be false in a run of several processes, got true")
    here, cards = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if config.device != "cpu" and torch.cuda.is_available() and here > cards:
        raise ConfigError(f"torchrun --nproc-per-node must be at most the {cards} GPUs that are seen, got {here}")


def check_machine(config: Config) -> None:
    """Finds the device and the data, downloaded if need be. Raises ConfigError, DataError."""
    import torch

    check_device(config.device)
    check_processes(config)
    if config.cuda_graph and (config.device == "cpu" or not torch.cuda.is_available()):
        raise ConfigError("cuda_graph must be false where no CUDA device trains, got true")
    if config.cuda_graph and not config.optimizer.get("fused"):
        raise ConfigError("cuda_graph must be false where optimizer.fused is not true, got true")
    data = config.data
    try:
        labels, num_classes = _labels(
            data.name,
            data.root,
            data.checksum,
            data.path,
            data.random_classes,
            data.num_test,
            data.resize,
            data.num_labelled != 0,
        )
        split = data.split(labels, num_classes)
        class_prior(config.prior, labels[split.labelled], num_classes)
    except ValueError as error:
        raise ConfigError(str(error)) from error


@functools.cache
def _labels(
    name: str,
    root: str,
    checksum: bool,
    path: str | None,
    random_classes: int | None,
    num_test: float | None,
    resize: str | None,
    needs_labels: bool,
) -> tuple[Indices, int]:
    """The training images' labels, and the number of classes."""
    how: dict[str, Any] = {"num_test": num_test, "resize": resize, "needs_labels": needs_labels}
    source = load(name, root, "train", checksum, path, random_classes, mapped=True, **how)
    return source.labels, source.num_classes


def refuse(message: str) -> NoReturn:
    """Says why, on standard error and in one line, and exits with status 2."""
    print(f"catvae: {printable(' '.join(message.split()))}", file=sys.stderr)
    raise SystemExit(2)
