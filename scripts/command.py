"""What every command in scripts/ does about input that it cannot use."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.check import refuse
from configs.schema import ConfigError
from configs.wording import CONFIGS, explain, print_anywhere
from data.facts import DataError

COME_BY = {
    "matplotlib": "drawing this needs Matplotlib; it comes by: uv sync --extra figures",
    "pyro": "--peer pyro needs Pyro; it comes by: uv sync --group dev",
}


@functools.cache
def composed(*overrides: str) -> Any:
    """What train.py composes of `overrides`, once: it takes longer than making a run of it. Not to be changed."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONFIGS), version_base=None):
        return compose("config", list(overrides))


@contextmanager
def refusing_bad_input() -> Iterator[None]:
    """Says in one sentence what is wrong with a run folder, its data or its settings, and exits with status 2."""
    from training.checkpoints import CheckpointError

    print_anywhere()
    try:
        yield
    except (ConfigError, DataError, CheckpointError) as error:
        refuse(str(error))
    except OSError as error:
        refuse(explain(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in COME_BY:
            raise
        refuse(COME_BY[package])


def writable(output: Path, suffixes: tuple[str, ...], option: str = "--output") -> None:
    """Refuses, before any work, a file that cannot be written or whose format is unknown. Raises ConfigError."""
    if output.suffix.lower() not in suffixes:
        raise ConfigError(f"{option} must end in {' or '.join(suffixes)}, got {output}")
    if not output.parent.is_dir():
        raise ConfigError(f"{option} must be in a folder that exists, got {output}")


def positive(text: str) -> int:
    """An argument that must be an integer >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text}")
    return int(text)
