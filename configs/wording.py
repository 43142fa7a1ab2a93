"""What is said about an unusable configuration: one sentence that names the key, the value and what is allowed."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import io
import re
import shlex
import sys
import types
import typing
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)
from yaml import YAMLError

from configs.schema import Config, ConfigError
from data.facts import DataError

WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
WORDS |= {list: "a list", dict: "a section", Any: "a section with a _target_"}
PLURALS: dict[Any, str] = {int: "integers", float: "numbers"}

# choices that an optional package brings, and the extra of pyproject.toml that brings the package
EXTRAS = {"joblib": "joblib", "submitit": "slurm", "optuna": "optuna"}
CONFIGS = Path(__file__).parent
# what people call a key
ALSO_CALLED = {"learning_rate": "lr", "epochs": "steps", "iterations": "steps", "tau": "temperature"}
PATHS = ("data.path", "data.root", "hydra.run.dir", "hydra.sweep.dir", "resume")
ARGUMENT = "an argument must be key=value or group=choice, with quotes around special characters"
# what Hydra says on one line, and what is said instead
HYDRA_SAYS = (
    (
        r"Could not override '\S+'\. Did you mean to override (?P<near>\S+)\? .* use \+(?P<given>.+)",
        "{given} is not a choice here; did you mean {near}?",
    ),
    (
        r"Could not override '(?P<key>\S+)'\. No match .* use \+(?P<given>.+)",
        "{given} is not a choice here: no group in use has {key}{which}",
    ),
    (
        r"Multiple values for (?P<key>\S+)\. To override .*'override \S+: (?P<value>.+)'",
        "{key} must be given without +, got +{key}={value}",
    ),
    (
        r"Could not append to config\. .* remove \+ prefix: '(?P<given>.+?)'",
        "{given} must be given without +, got +{given}",
    ),
    (
        r"(Ambiguous value for argument|Sweep parameters) '(?P<given>.+?)'( 1\. To use| requires)",
        "{given} is several values; add -m to run a sweep over them, or write a list as [1,2]",
    ),
    (r"Could not delete.* '(?P<key>\S+)'( does not exist|\. No match)", "{key} is not a key with a value, got ~{key}"),
    (
        r"Could not delete.* value of '(?P<key>\S+)' is .* and not (?P<given>.+)\.",
        "{key} is not {given}, got ~{key}",
    ),
    (r"Cannot find primary config '(?P<given>.+?)'", "--config-name must name a configuration file, got {given}"),
    (r"Additional config directory '(?P<given>.+?)'", "--config-dir must be a folder, got {given}"),
    (r"Primary config directory .* '(?P<given>.+?)' exists", "--config-path must be a folder, got {given}"),
)


def print_anywhere() -> None:
    """A terminal, or a log, of an encoding without some letter gets a question mark for it, and not an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def explain(error: Exception, arguments: Sequence[str] = ()) -> str:
    """One sentence for what Hydra, OmegaConf or YAML refuses in the command line `arguments`; ours are one already."""
    if isinstance(error, (ConfigError, DataError)):
        return str(error)
    if isinstance(error.__cause__, OSError):  # such as a log file that logging cannot open
        error = error.__cause__
    if isinstance(error, OverrideParseException):
        if not str(error.override).isascii() and str(error.override) != printable(str(error.override)):
            return f"an argument must be in UTF-8 and without control characters, got {error.override}"
        return f"{ARGUMENT}, got {error.override}{_in_quotes(str(error.override))}"
    if isinstance(error, MissingConfigException) and "/" in (error.missing_cfg_file or ""):
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        choices = f"one of {', '.join(error.options)}" if error.options else "the name of a choice"
        extra = next((extra for name, extra in EXTRAS.items() if choice.startswith(name)), "")
        near = next(iter(difflib.get_close_matches(choice, error.options or [], n=1, cutoff=0.7)), "")
        own = "" if {"--config-dir", "-cd"} & {*sys.argv} else "; --config-dir DIR finds one of your own"
        way_on = f"; it comes by: uv sync --extra {extra}" if extra else f"; did you mean {near}?" if near else own
        return f"{group} must be {choices}, got {choice}{way_on}"
    nameless = [argument for argument in arguments if re.fullmatch(r"([+~]*=.*|[+~]+)", argument)]
    if nameless:
        return f"{ARGUMENT}, got {nameless[0]}"
    text = " ".join(str(error).split())
    for pattern, sentence in HYDRA_SAYS:
        if said := re.search(pattern, text):
            if "several values" in sentence and _names_a_path(said["given"]):
                return has_a_comma(said["given"])
            return sentence.format(**said.groupdict(), which=_which_have(said.groupdict().get("key", "")))
    if isinstance(error, FileNotFoundError) and "temporary directory" in text:  # Python's own search for one
        return (
            f"no folder for temporary files can be written to ({text.partition(' in ')[2]}); set TMPDIR to one that can"
        )
    if isinstance(error, OSError) and error.filename:
        return f"cannot use {error.filename}: {error.strerror}"
    if isinstance(error, YAMLError):
        return f"cannot read a configuration file: {text}"
    if "group override" in text:
        return explain_group(arguments) or text
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    if isinstance(cause, OmegaConfBaseException):
        override = re.search(r"(?: use \+|merging override )(.+)", text)
        return _explain_key(cause, override[1] if override else "")
    return text


def _which_have(group: str) -> str:
    """The estimators that have a group of choices, as estimator/baseline or schedule@estimator.temperature."""
    name, _, section = group.partition("@")
    own = f"/{name}@{section.removeprefix('estimator.')}:" if section else f"{name.removeprefix('estimator/')}:"
    files = sorted((CONFIGS / "estimator").glob("*.yaml"))
    having = [file.stem for file in files if re.search(rf"^  - (override )?{re.escape(own)}", file.read_text(), re.M)]
    return f"; of the estimators {', '.join(having)} have it" if having else ""


def _explain_key(error: OmegaConfBaseException, override: str) -> str:
    key, first_line = error.full_key or "the configuration", str(error).splitlines()[0]
    if isinstance(error, (ConfigKeyError, ConfigAttributeError)):
        root = OmegaConf.to_container(error.parent_node._get_root(), throw_on_missing=False)
        known = [other for other in keys(root) if other.startswith("hydra") == key.startswith("hydra")]
        return unknown_key(override or key, key, known)
    if key == "_dummy_":  # where Hydra looks up the ${...} in the name of a choice
        return f"the name of a choice cannot be used: {first_line}"
    annotation = _annotation(key)
    if isinstance(error, InterpolationResolutionError) or annotation is None:
        return f"{key} cannot be used: {first_line}" + (f", got {override}" if override else "")
    got = shown(error.value) if isinstance(error, ValidationError) else override or "nothing"
    if annotation is Any and "." in key:  # a number or a word, which the schema checks itself
        return f"{key} must be given, got {got}"
    return f"{key} must be {allowed(annotation)}, got {got}"


def explain_group(arguments: Sequence[str]) -> str | None:
    """The sentence for the argument that gives a group something else than the name of a choice."""
    texts = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    for override in OverridesParser.create().parse_overrides(texts):
        key, value = override.key_or_group, override.value()
        is_group = (CONFIGS / key.partition("@")[0]).is_dir()
        is_choice = isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))
        if not key:
            return f"{ARGUMENT}, got {override.input_line}"
        if is_group and not is_choice:
            return f"{key} must be the name of a choice, got {shown(value)}"
    return None


def unknown_key(given: str, key: str, known: Sequence[str], owner: str = "") -> str:
    """The sentence for a key that nothing reads: what its section has, and the nearest key that something reads."""
    section, written = key.rpartition(".")[0], given.partition("=")[0].lstrip("+~")
    if section.endswith("temperature"):  # has the same names, and means another
        known = [other for other in known if not other.startswith("lr_factor.")]
    if written.startswith(f"{key}."):  # its section is not there either: a last name alone tells too little
        alike = difflib.get_close_matches(written, known, n=1, cutoff=0.7)
    else:
        meant = ALSO_CALLED.get(_name(written), _name(written))
        names = difflib.get_close_matches(meant, [_name(other) for other in known], n=1, cutoff=0.7)
        alike = [other for other in known if names and _name(other) == names[0]]
    nearest = max(alike, key=lambda other: difflib.SequenceMatcher(None, written, other).ratio(), default="")
    neighbours = [_name(other) for other in known if other.rpartition(".")[0] == section]
    has = f" ({owner or section or 'the configuration'} has {', '.join(neighbours) or 'none'})"
    return f"{given} is not a key{has}" + (f"; did you mean {nearest}?" if nearest else "")


def keys(node: Any, prefix: str = "") -> list[str]:
    """Every key of nested dictionaries, sections included, with dots."""
    found = []
    for name, value in node.items() if isinstance(node, dict) else ():
        found += [f"{prefix}{name}", *keys(value, f"{prefix}{name}.")]
    return found


def allowed(annotation: Any) -> str:
    """A type in words."""
    origin, options = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(map(str, options))
    if origin in (Union, types.UnionType):  # those of them that a command line can write
        plain = [option for option in options if option in WORDS or typing.get_origin(option)]
        return " or ".join(map(allowed, plain or options))
    if origin is tuple and Ellipsis not in options:
        return "[" + ", ".join(map(allowed, options)) + "]"
    if origin is list and options and options[0] in PLURALS:
        return f"a list of {PLURALS[options[0]]}"
    kind = origin or annotation
    if kind in WORDS:
        return WORDS[kind]
    if inspect.isclass(kind) and issubclass(kind, Enum):
        return "one of " + ", ".join(str(member.value) for member in kind)
    if dataclasses.is_dataclass(kind):
        return "a section with the keys " + ", ".join(field.name for field in dataclasses.fields(kind))
    return f"a section whose _target_ makes a {getattr(kind, '__name__', kind)}"


def shown(value: Any) -> str:
    """A value as a command line writes it; of a section that makes an object, what it makes."""
    if isinstance(value, dict) and "_target_" in value:
        return str(value["_target_"])
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(shown, value)) + "]"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def key_of(override: str) -> str:
    """The key, or group, that an override of a command line sets."""
    return override.lstrip("+").partition("=")[0]


def has_a_comma(argument: str) -> str:
    """The sentence for a path that is taken for several values."""
    return f"{argument} has a comma, which separates values{_in_quotes(argument)}"


def _names_a_path(argument: str) -> bool:
    key, _, value = argument.partition("=")
    return key.lstrip("+") in PATHS or "/" in value or "\\" in value


def _in_quotes(argument: str) -> str:
    """What to type instead of key=PATH, whose special characters are meant as they are; empty where none is meant."""
    key, equals, value = argument.partition("=")
    if not equals or not value or value[0] in "'\"[{" or not _names_a_path(argument):
        return ""
    return f"; write it in quotes: {shlex.quote(f'{key}={quoted(value)}')}"


def quoted(text: object) -> str:
    """Text in the quotes in which Hydra takes it as it is, commas, equals signs and dollars too."""
    escaped = re.sub(r"(\\*)(\$\{)", r"\1\1\\\2", str(text))  # OmegaConf's, then those of Hydra's grammar
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", escaped)
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"


def as_argument(text: object) -> str:
    """A value as Hydra reads it in key=VALUE: in quotes where it has more than letters, digits and ./-_."""
    return str(text) if re.fullmatch(r"[\w./-]+", str(text), flags=re.ASCII) else quoted(text)


def printable(text: str) -> str:
    """Text for a terminal, without what would steer it: names and settings may be somebody else's."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _annotation(key: str) -> Any:
    """The schema's type of a key, None for a key that it does not have."""
    node: Any = Config
    for name in key.split("."):
        node = typing.get_type_hints(node).get(name) if dataclasses.is_dataclass(node) else None
    return node


def _name(key: str) -> str:
    return key.rpartition(".")[2]
