"""What every command in scripts/ does about input that it cannot use."""

from __future__ import annotations

import argparse
import functools
import os
import signal
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.check import refuse
from configs.schema import ConfigError
from configs.wording import CONFIGS, explain, print_anywhere, quoted
from data.facts import DataError

COME_BY = {
    "matplotlib": "drawing this needs Matplotlib; it comes by: uv sync --extra figures",
    "pyro": "--peer pyro needs Pyro; it comes by: uv sync --group dev",
    "jax": "--peer jax needs JAX; it comes by: uv sync --extra jax",
    "optax": "--peer jax needs Optax; it comes by: uv sync --extra jax",
}


@functools.cache
def composed(*overrides: str) -> Any:
    """What train.py composes of `overrides`, once: it takes longer than making a run of it. Not to be changed."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONFIGS), version_base=None):
        return compose("config", list(overrides))


def searchpath(config_dir: Path | None) -> list[str]:
    """The argument by which Hydra finds choices in a folder of a person's own. Raises ConfigError."""
    if config_dir is None:
        return []
    if not config_dir.is_dir():
        raise ConfigError(f"--config-dir must be a folder, got {config_dir}")
    return [f"hydra.searchpath=[{quoted(f'file://{config_dir.resolve()}')}]"]


@contextmanager
def refusing_bad_input() -> Iterator[None]:
    """Says in one sentence what is wrong with a run folder, its data or its settings, and exits with status 2.

    Where a reader of what is printed, such as head, has seen enough, it ends without a word, as that signal does.
    """
    print_anywhere()
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes as it ends
        raise SystemExit(128 + signal.SIGPIPE) from None
    except (ConfigError, DataError) as error:
        refuse(str(error))
    except ValueError as error:
        from estimators.contract import ContractError  # which imports PyTorch, and comparing runs needs none

        if not isinstance(error, ContractError):
            raise
        refuse(str(error))
    except OSError as error:
        refuse(explain(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in COME_BY:
            raise
        refuse(COME_BY[package])


def add_data_path(parser: argparse.ArgumentParser) -> None:
    """The option of a script that reads a run's own images."""
    parser.add_argument(
        "--data-path", type=Path, metavar="PATH", help="of a run with data.path: where these images are now, if moved"
    )


def writable(output: Path, suffixes: tuple[str, ...], option: str = "--output") -> None:
    """Refuses, before any work, a file that cannot be written or whose format is unknown. Raises ConfigError."""
    if output.suffix.lower() not in suffixes:
        allowed = " or ".join(filter(None, (", ".join(suffixes[:-1]), suffixes[-1])))
        raise ConfigError(f"{option} must end in {allowed}, got {output}")
    if not output.parent.is_dir():
        raise ConfigError(f"{option} must be in a folder that exists, got {output}")
    if output.is_dir():
        raise ConfigError(f"{option} must be a file, got {output}, which is a folder")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{option} must be in a folder that may be written to, got {output}")
    if output.exists() and not os.access(output, os.W_OK):
        raise ConfigError(f"{option} must be a file that may be written to, got {output}, which may not")


def apart(outputs: Mapping[str, Path], read: Collection[Path], run: Path) -> None:
    """Refuses outputs, by option, that would destroy what is `read`, the run folder's own files, or one another.

    Raises ConfigError, before any work.
    """
    from data import npz
    from data.pictures import picture_files, suffixes
    from training.run_folder import RESULT, SPLIT

    for option, output in outputs.items():
        place = Path(os.path.realpath(output))
        for other, second in outputs.items():
            if other > option and _are_same(output, second):
                raise ConfigError(f"{option} and {other} must be two files, got {output} and {second}")
        own = Path(os.path.realpath(run.parent.parent if run.is_file() else run))
        if own / "checkpoints" in place.parents or (place.parent == own and place.name in (RESULT, SPLIT)):
            raise ConfigError(f"{option} must be no file of the run itself, got {output}")
        for source in read:
            if _are_same(output, source):
                raise ConfigError(f"{option} must be another file than what is read, got {output}")
            if place.suffix.lower() not in suffixes() or not source.is_dir() or npz.is_one(source):
                continue
            folders = {source, *(file.parent for file in picture_files(source))}  # by links, they may be elsewhere
            if not {Path(os.path.realpath(folder)) for folder in folders}.isdisjoint(place.parents):
                raise ConfigError(
                    f"{option} must be outside of {source}, whose pictures are read, as it would be one of them the "
                    f"next time, got {output}"
                )


def _are_same(first: Path, second: Path) -> bool:
    if os.path.realpath(first) == os.path.realpath(second):
        return True
    return first.exists() and second.exists() and first.samefile(second)


def positive(text: str) -> int:
    """An argument that must be an integer >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text}")
    return int(text)
