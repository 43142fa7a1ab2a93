"""What every command in scripts/ does about input that it cannot use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from configs.check import refuse
from configs.schema import ConfigError
from data.datasets import DataError


@contextmanager
def refusing_bad_input() -> Iterator[None]:
    """Says in one sentence what is wrong with a run folder, its data or its settings, and exits with status 2."""
    from training.checkpoints import CheckpointError

    try:
        yield
    except (ConfigError, DataError, CheckpointError) as error:
        refuse(str(error))
