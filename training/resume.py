"""`resume=RUN_FOLDER`: the command line that goes on with a run where it stopped, and what a person is told to type."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from yaml import YAMLError

from configs.schema import ConfigError
from configs.trust import foreign_modules, stored_config
from configs.wording import CONFIGS, as_argument, key_of, quoted
from training.state import FREE_TO_CHANGE

RESUMED = "resumed"  # the name under which the run's configuration takes the place of config.yaml
ROOT = CONFIGS.parent
CONFIG_DIR = ("--config-dir", "-cd")
WITH_VALUE = (*CONFIG_DIR, "--config-path", "-cp", "--config-name", "-cn", "--package", "-p", "--cfg", "-c")
WITHOUT_VALUE = ("--help", "--hydra-help", "--version", "--resolve", "--run", "--multirun", "--info")
OPTIONS = (*WITH_VALUE, *WITHOUT_VALUE, "--shell-completion", "--experimental-rerun")
REFERENCE = re.compile(r"\$\{([A-Za-z_][\w.]*)\}")  # to another key, and to nothing else


def resume_arguments(arguments: list[str], trusted: Collection[str] = ()) -> list[str]:
    """With resume=FOLDER among them: the arguments that go on in FOLDER with the configuration in its checkpoint.

    What the checkpoint says takes the place of configs/config.yaml and its choices; nothing else of the folder reaches
    Hydra. Raises ConfigError, CheckpointError if FOLDER is no run folder, or names what may not be called.
    """
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("--") and not any(option.startswith(name) for option in OPTIONS):  # or its first letters
            raise ConfigError(f"{name} is not an option: settings are given as key=value, such as train.steps=100")
    resumed = [argument for argument in arguments if argument.lstrip("+").startswith("resume=")]
    if not resumed or (given := resumed[-1].partition("=")[2]) in ("", "null"):
        return _unbroken(arguments)
    flags = [argument for argument in arguments if not _is_override(argument)]
    if any(flag in ("-m", "--multirun") for flag in flags):
        raise ConfigError(f"resume must be given without -m, one run at a time, got {given}")
    folder = _folder(given)
    overrides = [argument for argument in arguments if _is_override(argument) and argument not in resumed]
    _store(folder, {*trusted, *_targets(overrides)})
    # output_subdir=null leaves .hydra as the first run wrote it
    added = [f"resume={quoted(folder)}", f"hydra.run.dir={quoted(folder)}", "hydra.output_subdir=null"]
    return [f"--config-name={RESUMED}", *flags, *map(_appended(overrides), overrides), *added]


def _unbroken(arguments: list[str]) -> list[str]:
    """With all overrides before the flags, where a flag is among them, as in `data=digits -m seed=0,1`.

    Hydra's parser takes the first flag for the end of the overrides.
    """
    after = ["", *arguments]  # what a flag's own value may be: a folder with = in its name
    are = [_is_override(word) and before not in WITH_VALUE for before, word in zip(after, arguments, strict=False)]
    if True not in are or all(are[are.index(True) : len(are) - are[::-1].index(True)]):
        return arguments
    parts = zip(arguments, are, strict=True)
    return [word for word, _ in sorted(parts, key=lambda part: not part[1])]


def _folder(given: str) -> Path:
    """The run folder that is meant: as it is written, or as Hydra reads what is in quotes. Raises ConfigError."""
    folder = Path(os.path.expanduser(given))
    if not folder.is_dir():
        try:
            folder = Path(os.path.expanduser(str(OverridesParser.create().parse_override(f"resume={given}").value())))
        except HydraException:  # it says nothing that a person could use
            folder = Path(os.path.expanduser(given.strip("'\"")))
    folder = folder.resolve()
    if not any((folder / "checkpoints").glob("step_*.pt")):
        raise ConfigError(f"resume must be a run folder, got {folder}: it has no checkpoint in checkpoints/")
    if links := [name for name in ("train.log", ".lock", "checkpoints") if (folder / name).is_symlink()]:
        raise ConfigError(f"resume must be a run folder, got {folder}: its {links[0]} is a link, to be written through")
    return folder


def _store(folder: Path, trusted: Collection[str]) -> None:
    """Gives Hydra the configuration in the newest checkpoint, with this program's own settings of Hydra."""
    import torch

    from training.checkpoints import load

    state = load(folder, torch.device("cpu"))
    config = OmegaConf.create(stored_config(state, trusted))
    for key, other in _references(state, folder).items():
        if OmegaConf.select(config, key, default=None) == OmegaConf.select(config, other, default=state) is not None:
            OmegaConf.update(config, key, f"${{{other}}}")
    ours: Any = OmegaConf.load(CONFIGS / "config.yaml")
    # a choice of this command line would be another experiment, or the same one again
    defaults = [default if isinstance(default, str) else _unchosen(default) for default in ours.defaults]
    node = OmegaConf.create({"defaults": defaults, "hydra": OmegaConf.to_container(ours.hydra, resolve=False)})
    ConfigStore.instance().store(name=RESUMED, node=OmegaConf.merge(node, config))


def _unchosen(default: Mapping[str, Any]) -> dict[str, Any]:
    return {group: made if group.startswith("override ") else None for group, made in default.items()}


def _references(state: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """The keys that follow others, as lr_factor.steps does train.steps; of runs from before, as .hydra/ has them."""
    asked = state.get("asked")
    if isinstance(asked, dict) and isinstance(asked.get("references"), dict):
        found = asked["references"]
        return {k: v for k, v in found.items() if REFERENCE.fullmatch(f"${{{k}}}") and REFERENCE.fullmatch(f"${{{v}}}")}
    try:
        return references(OmegaConf.load(folder / ".hydra" / "config.yaml"))
    except (OSError, ValueError, YAMLError):
        return {}


def references(config: Any, prefix: str = "") -> dict[str, str]:
    """The keys of a composed configuration whose value is that of another key, and the other keys."""
    if prefix == "":
        config = OmegaConf.to_container(config, resolve=False)
    found: dict[str, str] = {}
    for key, value in config.items() if isinstance(config, dict) else ():
        if isinstance(value, dict):
            found |= references(value, f"{prefix}{key}.")
        elif isinstance(value, str) and (reference := REFERENCE.fullmatch(value)):
            found[f"{prefix}{key}"] = reference[1]
    return found


def _appended(overrides: Sequence[str]) -> Any:
    """A choice in a section, as schedule@estimator.temperature, has no place among the choices but with its section."""

    def append(override: str) -> str:
        group = override.partition("=")[0]
        section = re.split(r"[./]", group.rpartition("@")[2])[0]
        is_nested = ("@" in group or "/" in group) and section != "hydra"
        if not is_nested or override[0] in "+~" or any(other.startswith(f"{section}=") for other in overrides):
            return override
        return f"+{override}"

    return append


def asked_later(first: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's first command line asked for, and what this one, which goes on with it, has set anew."""
    keys = ((key_of(override), override) for override in now["overrides"])
    again = {key: override for key, override in keys if key in FREE_TO_CHANGE - {"resume"}}
    known = first.get("overrides", [])
    later = {key: one for key, one in {**first.get("later", {}), **again}.items() if one not in known}
    kept = {key: value for key, value in first.items() if key != "later"}
    return {**kept, "later": later} if first and later else kept


def _targets(overrides: Sequence[str]) -> list[str]:
    """What this very command line names to be called."""
    pairs = (override.partition("=") for override in overrides)
    return [value.strip("'\"") for key, _, value in pairs if key.endswith("._target_")]


def _is_override(argument: str) -> bool:
    return argument.startswith("~") or ("=" in argument and not argument.startswith("-"))


# ---- what a person is told to type ----


def resume_command(folder: Path, config: Any) -> str:
    """The command that goes on with a run of this process in `folder`, from any working directory."""
    return command(resume_words(folder, config), bool(foreign_modules(config)))


def resume_words(folder: Path, config: Any) -> list[str]:
    """The arguments of that command."""
    trust = [word for module in foreign_modules(config) for word in ("--trust", module)]
    return [f"resume={folder.resolve()}", *trust]  # resume_arguments needs no quotes


def sweep_command(arguments: Sequence[str], folder: Path) -> str:
    """The command that goes on with a sweep in `folder` that was started with `arguments`."""
    before = [argument for argument in arguments if not argument.lstrip("+").startswith("hydra.sweep.dir=")]
    return command([*_from_anywhere(before), f"hydra.sweep.dir={as_argument(folder.absolute())}"], has_own_code(before))


def best_command(arguments: Sequence[str], values: Mapping[str, Any]) -> str:
    """The command of one trial, with these values, of a search that was started with `arguments`."""
    given, parser = {key.lstrip("+") for key in values}, OverridesParser.create()

    def stays(argument: str) -> bool:
        key = key_of(argument)
        if not _is_override(argument):
            return argument not in ("-m", "--multirun")
        of_search = key.startswith(("hydra/", "hydra.")) and key != "hydra.searchpath"
        return not (of_search or key in given or parser.parse_override(argument).is_sweep_override())

    kept = [argument for argument in arguments if stays(argument)]
    found = [f"{key}={value}" for key, value in values.items()]
    return command([*_from_anywhere(kept), *found], has_own_code(kept))


def has_own_code(arguments: Sequence[str]) -> bool:
    return any(word in argument for argument in arguments for word in ("_target_=", "config-dir", "searchpath"))


def _from_anywhere(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments with absolute paths, where one names what lies below the working directory."""
    flag = ""
    for argument in arguments:
        key, equals, value = argument.partition("=")
        path = Path((value if equals else argument).strip("'\""))
        is_path = flag in CONFIG_DIR or key in CONFIG_DIR or key.lstrip("+") in ("data.path", "data.root")
        flag = argument
        if not is_path or path.is_absolute() or not path.exists():
            yield argument
        elif not equals:
            yield str(path.absolute())
        else:
            yield f"{key}={path.absolute() if key in CONFIG_DIR else as_argument(path.absolute())}"


def command(arguments: Sequence[str], with_own_code: bool) -> str:
    """A command line of train.py for a shell, that works where it is printed and wherever its arguments do.

    With code of a person's own it says PYTHONPATH too.
    """
    script, ours = ["train.py"], []
    if Path.cwd() != ROOT:
        script, ours = [str(ROOT / "train.py")], ["--project", str(ROOT)]
    start = ["uv", "run", *ours] if "UV" in os.environ or shutil.which("uv") else [sys.executable]
    return (own_path() if with_own_code else "") + shlex.join([*start, *script, *arguments])


def own_path() -> str:
    """How a shell sets PYTHONPATH as it is here, before a command; nothing where it is not set."""
    path = [str(Path(entry).absolute()) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    path = [entry for entry in path if entry != str(ROOT)]
    return f"PYTHONPATH={shlex.quote(os.pathsep.join(path))} " if path else ""
