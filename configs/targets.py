"""Checks and builds the parts of a configuration that name their class in `_target_`."""

from __future__ import annotations

import difflib
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, Union

from configs.schema import ConfigError

SPECIAL = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")


def build(node: Any, key: str, *arguments: Any) -> Any:
    """The object that `node` describes, called with `arguments` first; nested nodes are built before.

    Raises ConfigError, naming the key below `key`, for an unknown class, an unknown or badly typed argument, and for
    whatever the class itself refuses with ValueError.
    """
    if not isinstance(node, dict) or "_target_" not in node:
        raise ConfigError(f"{key} must name a class in {key}._target_, got {node}")
    target = _find(node["_target_"], key)
    given = {name: value for name, value in node.items() if name not in SPECIAL}
    _check_names(target, given, key, len(arguments), bool(node.get("_partial_")))
    for name, value in given.items():
        if isinstance(value, dict) and "_target_" in value:
            given[name] = build(value, f"{key}.{name}")
        else:
            _check_type(_annotations(target).get(name, Any), value, f"{key}.{name}")
    if node.get("_partial_"):
        return _Partial(target, given, key)
    return _call(target, key, *arguments, **given)


class _Partial:
    """functools.partial whose ValueErrors name the configuration key."""

    def __init__(self, function: Callable[..., Any], given: dict[str, Any], key: str) -> None:
        self.function, self.given, self.key = function, given, key

    def __call__(self, *arguments: Any) -> Any:
        return _call(self.function, self.key, *arguments, **self.given)


def _call(function: Callable[..., Any], key: str, *arguments: Any, **given: Any) -> Any:
    try:
        return function(*arguments, **given)
    except (ValueError, TypeError) as error:
        message = str(error)
        named = any(message.startswith(f"{name} ") for name in given)
        settings = ", ".join(f"{key}.{name}={value}" for name, value in given.items())
        raise ConfigError(f"{key}.{message}" if named else f"{key}: {message}, given {settings}") from error


def _find(path: Any, key: str) -> Callable[..., Any]:
    from hydra.utils import get_object

    try:
        target = get_object(str(path))
    except Exception as error:  # importing a person's own module can fail in any way
        cause = error.__cause__ or error
        raise ConfigError(
            f"{key}._target_ must be an importable class or function, got {path} "
            f"({type(cause).__name__}: {str(cause).splitlines()[0]}); is its folder on PYTHONPATH?"
        ) from error
    if not callable(target):
        raise ConfigError(f"{key}._target_ must be a class or function, got {path}")
    return typing.cast(Callable[..., Any], target)


def _check_names(
    target: Callable[..., Any], given: dict[str, Any], key: str, positional: int, partial: bool
) -> None:
    parameters = list(inspect.signature(target).parameters.values())
    keywords = [p for p in parameters[positional:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = [p.name for p in keywords]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for name in given:
            if name not in names:
                raise ConfigError(unknown_key(f"{key}.{name}", given[name], [f"{key}.{n}" for n in names]))
    required = [p.name for p in keywords if p.default is p.empty and p.name not in given]
    if required and not partial:
        raise ConfigError(f"{key}.{required[0]} must be given: {target.__qualname__} needs it")


def unknown_key(key: str, value: Any, known: list[str]) -> str:
    """The sentence for a key that nothing reads, with the nearest one that something does."""
    nearest = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"known keys: {', '.join(sorted(known)) or 'none'}"
    return f"{key}={value} is not a key; {hint}"


def _annotations(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):  # annotations that only a type checker can resolve are not checked
        return {}


def _check_type(annotation: Any, value: Any, key: str) -> None:
    if not _fits(annotation, value):
        allowed = getattr(annotation, "__name__", str(annotation))
        if typing.get_origin(annotation) is Literal:
            allowed = "one of " + ", ".join(map(str, typing.get_args(annotation)))
        raise ConfigError(f"{key} must be {allowed}, got {value}")


def _fits(annotation: Any, value: Any) -> bool:
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return value in typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(_fits(option, value) for option in typing.get_args(annotation))
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in (bool, str, dict, list):
        return isinstance(value, annotation)
    if annotation is type(None):
        return value is None
    if annotation is Any or isinstance(value, (list, dict)):
        return True
    return not isinstance(value, (str, int, float)) and value is not None
