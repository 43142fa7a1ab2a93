"""What of a stored configuration may be imported and called: a run folder may come from anybody.

What a command line says is its writer's own. A configuration that lies in a folder names in `_target_` what is called
to build it, so each of these is looked at before it is imported: it must be a class or a function of the kind that its
place asks for, defined in this program or torch.optim, or in a module that the command line names by `--trust MODULE`.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields
from importlib import import_module
from typing import Any, Union

from configs.schema import Config, ConfigError
from configs.wording import shown

OWN = ("models", "estimators", "training", "torch.optim")
BUILT = ("models", "estimators")  # whose classes do nothing but compute, whatever they are given
HELP = "a module, or a target in it, that the configuration in the folder may use: its code is run. May be repeated"
DEEPEST = 20  # nested sections; a configuration has five


def add_trust(parser: argparse.ArgumentParser) -> None:
    """The option of a script that opens a run folder."""
    parser.add_argument("--trust", action="append", default=[], metavar="MODULE", help=HELP)


def take_trusted(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments of train.py without `--trust MODULE`, and the modules. Raises ConfigError."""
    others, trusted = [], []
    given = iter(arguments)
    for argument in given:
        name, equals, module = argument.partition("=")
        if name != "--trust":
            others.append(argument)
            continue
        module = module if equals else next(given, "")
        if not module.replace(".", "_").isidentifier():
            raise ConfigError(f"--trust must name a module, such as --trust my_estimators, got {module or 'nothing'}")
        trusted.append(module)
    return others, trusted


def stored_config(state: Mapping[str, Any], trusted: Collection[str] = ()) -> dict[str, Any]:
    """The configuration in a checkpoint, for every command that opens a run folder; nothing of it was called yet.

    Raises ConfigError unless it has the sections of a configuration, plain values, and targets that may be called.
    """
    config, known = state.get("config"), [key.name for key in fields(Config)]
    if not isinstance(config, dict):
        raise ConfigError(f"the checkpoint has no configuration, but {shown(config)}; is it of this program?")
    if foreign := [key for key in config if key not in known]:
        raise ConfigError(f"{foreign[0]} is not a section of a stored configuration, which has {', '.join(known)}")
    _check_plain(config, "", 0)
    kinds = _kinds()
    for key, node in config.items():
        _check_node(node, key, kinds.get(key), trusted)
    return config


def foreign_modules(config: Any) -> list[str]:
    """What `--trust` must name for the configuration of a run that this process has built, Hydra's own part aside."""
    named: list[str] = []
    for key, kind, node in _targets(config):
        target = node["_target_"]
        if isinstance(target, str) and not key.startswith("hydra.") and _fault(node, kind, ()):
            parts = target.split(".")
            prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
            module = next((prefix for prefix in prefixes if prefix in sys.modules), target)
            named.append(target if _fault(node, kind, (module,)) else module)
    return list(dict.fromkeys(named))


# ---- one target ----


def _check_node(node: Any, key: str, kind: Any, trusted: Collection[str]) -> None:
    for place, expected, section in _targets(node, key, kind):
        if fault := _fault(section, expected, trusted):
            target = section["_target_"]
            begun = f"{place}._target_ in the folder is {shown(target)}, and was not called"
            given = [name for name in trusted if _is_under(str(target), (name,))]
            if given and given[0] not in sys.modules:
                raise ConfigError(
                    f"{begun}: {given[0]} is trusted, and cannot be imported; is its folder on PYTHONPATH (in Python, "
                    "in sys.path)?"
                )
            trust = target if given else str(target).rpartition(".")[0] or str(target)
            raise ConfigError(
                f"{begun}: {fault}; a run folder may come from anybody. If you know this code and want to run it, add "
                f'--trust {trust} (in Python, trusted=["{trust}"])'
            )


def _targets(node: Any, key: str = "", kind: Any = None) -> Iterator[tuple[str, Any, dict[Any, Any]]]:
    """Every section with a `_target_`, at any depth, with its key and the kind of object that its place asks for.

    The outer one comes first, and is looked at before its parameters are.
    """
    parameters: dict[str, Any] = {} if key else _kinds()
    if isinstance(node, dict) and "_target_" in node:
        yield key, kind, node
        parameters = _parameters(node["_target_"])
    if isinstance(node, (dict, list)):
        for name, item in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _targets(item, f"{key}.{name}" if key else str(name), parameters.get(str(name)))


def _kinds() -> dict[str, Any]:
    from torch.optim import Optimizer

    from estimators.contract import Estimator, Schedule
    from models.contract import Networks

    return {"model": Networks, "estimator": Estimator, "optimizer": Optimizer, "lr_factor": Schedule}


def _parameters(target: Any) -> dict[str, Any]:
    """The annotated parameters of a target that was looked at."""
    function = _resolve(target, sys.modules)
    try:
        return typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except (NameError, TypeError):
        return {}


def _fault(node: Mapping[Any, Any], kind: Any, trusted: Collection[str]) -> str:
    """Why the target of a section may not be called; empty if it may."""
    target, is_partial = node["_target_"], node.get("_partial_", False) is True
    if not isinstance(target, str):
        return "it is not the name of a class or a function"
    if target in trusted and target not in sys.modules:  # this very target, whatever made it
        return ""
    if _is_under(target, OWN):
        function, is_own = _resolve(target, OWN), True
    elif _is_under(target, trusted):
        function, is_own = _resolve(target, (*OWN, *trusted)), _is_under(target, OWN)
    else:
        return "it is neither this program's nor PyTorch's"
    if function is None:
        return "no class or function of that name is defined there"
    if not _is_kind(function, kind, is_partial, is_own):
        wanted = "a schedule" if _is_schedule(kind) else getattr(kind, "__name__", "a part of a model")
        return f"it does not make what belongs there, {wanted}"
    return ""


def _resolve(target: Any, modules: Collection[str]) -> Any:
    """The class or function of that name, defined in one of `modules`, which alone are imported; None if there is none.

    Modules are reached by importing them, and never as an attribute of another one, as os is of whatever imports it.
    """
    parts = target.split(".") if isinstance(target, str) else [""]
    if not all(part.isidentifier() and not part.startswith("__") for part in parts):
        return None
    found, rest = None, parts
    for number in range(1, len(parts) + 1):
        name = ".".join(parts[:number])
        if not (_is_under(name, modules) or any(_is_under(module, (name,)) for module in modules)):
            break
        try:
            found = import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise ConfigError(f"cannot import {name}: {error}") from error
            break
        except Exception as error:  # importing a person's own module can fail in any way
            raise ConfigError(f"cannot import {name}: {type(error).__name__}: {error}") from error
        rest = parts[number:]
    if found is None or not rest:
        return None
    code: Any = found
    for part in rest:
        code = getattr(code, part, None)
        is_code = inspect.isclass(code) or isinstance(code, (types.FunctionType, types.MethodType))
        if not is_code or not _is_under(str(code.__module__), modules):
            return None
    return code


def _is_under(name: str, modules: Collection[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _is_schedule(kind: Any) -> bool:
    return typing.get_origin(kind) is Callable


def _is_kind(function: Any, kind: Any, is_partial: bool, is_own: bool) -> bool:
    """Whether a class or function makes what its place asks for; of a person's own function, a call must tell."""
    if typing.get_origin(kind) in (Union, types.UnionType):
        return any(_is_kind(function, option, is_partial, is_own) for option in typing.get_args(kind))
    is_class = inspect.isclass(function)
    if not is_own and not is_class:
        return True
    try:
        made = function if is_class else typing.get_type_hints(function).get("return")
    except (NameError, TypeError):
        return False
    if _is_schedule(kind):
        return is_partial and made is float
    if inspect.isclass(kind):
        return inspect.isclass(made) and issubclass(made, kind)
    # a place that says nothing of what it takes, as of a function(**given)
    return not is_own or (is_partial and made is float) or (inspect.isclass(made) and _is_under(made.__module__, BUILT))


# ---- plain values ----


def _check_plain(value: Any, key: str, depth: int) -> None:
    """Raises ConfigError for a value that is no plain one, or that composing would replace: ${oc.env:NAME} and such."""
    if depth > DEEPEST:
        raise ConfigError(f"{key} of the stored configuration is nested too deeply")
    if isinstance(value, str) and "${" in value:
        raise ConfigError(f"{key} of the stored configuration must be a value, and not refer to another, got {value}")
    if isinstance(value, (dict, list)):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            if not isinstance(name, (str, int)) or "${" in str(name):
                raise ConfigError(f"{key} of the stored configuration has the key {name!r}, which is none")
            _check_plain(item, f"{key}.{name}" if key else str(name), depth + 1)
    elif value is not None and not isinstance(value, (str, bool, int, float)):
        raise ConfigError(f"{key} of the stored configuration is a {type(value).__name__}, and must be a plain value")
