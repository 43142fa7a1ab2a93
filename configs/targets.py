"""Checks and builds the parts of a configuration that name their class in `_target_`."""

from __future__ import annotations

import inspect
import sysconfig
import traceback
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union

from configs.schema import ConfigError
from configs.wording import CONFIGS, allowed, shown, unknown_key


def build(node: Any, key: str, *arguments: Any) -> Any:
    """The object that `node` describes, called with `arguments` first; nested nodes are built before.

    `_partial_: true` leaves the call to whoever gets the object. Raises ConfigError, naming the key below `key`, for an
    unknown class, an unknown or badly typed argument, and for whatever the class itself refuses.
    """
    if not isinstance(node, dict) or "_target_" not in node:
        raise ConfigError(f"{key} must be a section with a _target_, got {shown(node)}")
    path, partial = node["_target_"], node.get("_partial_", False)
    target = _find(path, key)
    given = {name: value for name, value in node.items() if name not in ("_target_", "_partial_")}
    _check_type(bool, partial, partial, f"{key}._partial_")
    _check_names(target, path, given, key, len(arguments), partial)
    annotations = _annotations(target)
    for name, value in given.items():
        if isinstance(value, dict) and "_target_" in value:
            given[name] = build(value, f"{key}.{name}")
        _check_type(annotations.get(name, Any), given[name], value, f"{key}.{name}")
    if partial:
        return _Partial(target, given, key)
    return _call(target, key, *arguments, **given)


class _Partial:
    """functools.partial whose errors name the configuration key."""

    def __init__(self, function: Callable[..., Any], given: dict[str, Any], key: str) -> None:
        self.function, self.given, self.key = function, given, key

    def __call__(self, *arguments: Any) -> Any:
        return _call(self.function, self.key, *arguments, **self.given)


def _call(function: Callable[..., Any], key: str, *arguments: Any, **given: Any) -> Any:
    try:
        return function(*arguments, **given)
    except (ValueError, TypeError, RuntimeError) as error:
        message = str(error)
        if any(message.startswith(f"{name} ") for name in given):
            raise ConfigError(f"{key}.{message}") from error
        if not isinstance(error, ValueError):
            message = with_line(error)
        settings = ", ".join(f"{key}.{name}={shown(value)}" for name, value in given.items())
        raise ConfigError(f"{key} cannot be built: {message.rstrip('.')}, got {settings or 'no settings'}") from error


def with_line(error: Exception) -> str:
    """An error as a sentence, with the line of a person's own file that it comes from, if there is one."""
    where = own_line(error)
    return f"{type(error).__name__}{f' in {where}' if where else ''}: {error}"


def own_line(error: Exception) -> str:
    """The innermost line of a person's own file on the way to an error, and nothing where there is none."""
    where, others = "", {CONFIGS.parent, Path(sysconfig.get_path("stdlib"))}
    for line in traceback.extract_tb(error.__traceback__):
        if "site-packages" not in line.filename and others.isdisjoint(Path(line.filename).parents):
            where = f"{line.filename}, line {line.lineno}"
    return where


def _find(path: Any, key: str) -> Callable[..., Any]:
    import pydoc

    must = f"{key}._target_ must be an importable class or function, got {shown(path)}"
    try:
        target = pydoc.locate(path) if isinstance(path, str) else None
    except pydoc.ErrorDuringImport as error:  # importing a person's own module can fail in any way
        raise ConfigError(f"{must} ({error})") from error
    if target is None:
        raise ConfigError(f"{must}; is its folder on PYTHONPATH?")
    if not callable(target):
        raise ConfigError(must)
    return typing.cast(Callable[..., Any], target)


def _check_names(
    target: Callable[..., Any], path: str, given: dict[str, Any], key: str, positional: int, partial: bool
) -> None:
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except ValueError:  # some built-in functions do not tell; calling them does
        return
    keywords = [p for p in parameters[positional:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = [p.name for p in keywords]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for name, value in given.items():
            if name not in names:
                setting, known = f"{key}.{name}={shown(value)}", [f"{key}.{n}" for n in names]
                raise ConfigError(unknown_key(setting, f"{key}.{name}", known, owner=path))
    for p in keywords:
        later = partial and p.kind is p.POSITIONAL_OR_KEYWORD
        if p.default is p.empty and p.name not in given and not later:
            raise ConfigError(f"{key}.{p.name} must be given, got nothing: {path} needs it")


def _annotations(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):  # annotations that only a type checker can resolve are not checked
        return {}


def _check_type(annotation: Any, value: Any, written: Any, key: str) -> None:
    if _fits(annotation, value):
        return
    message = f"{key} must be {allowed(annotation)}, got {shown(written)}"
    if (CONFIGS / key.replace(".", "/")).is_dir():
        message += f"; write {key.replace('.', '/')}=CHOICE"
    elif typing.get_args(annotation) == ([int], float):
        choice = written if isinstance(written, str) else f"constant {key}.value=NUMBER"
        message = f"{key} must be a schedule, got {shown(written)}; write schedule@{key}={choice}"
    raise ConfigError(message)


def _fits(annotation: Any, value: Any) -> bool:
    """Whether a value from YAML, or an object built from it, is of the annotated type; what cannot be told is."""
    origin, options = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if origin is Literal:
        return value in options
    if origin in (Union, types.UnionType):
        return any(_fits(option, value) for option in options)
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is tuple and options and Ellipsis not in options:
        return isinstance(value, list) and len(value) == len(options) and all(map(_fits, options, value))
    if origin in (tuple, list):
        return isinstance(value, list) and all(_fits(options[0], item) for item in value if options)
    if inspect.isclass(origin) and origin is not Any and not getattr(origin, "_is_protocol", False):
        return isinstance(value, origin)
    return True
