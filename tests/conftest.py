"""What holds for every test: none of it is what a test proves, and all of it is time."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hydra._internal.hydra import Hydra

from configs.wording import CONFIGS


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tensors are small here: a second thread gains little, and on a busy machine each operation waits for it.

    OMP_NUM_THREADS overrules it, as in a run.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


os.environ["TQDM_DISABLE"] = "1"  # where tests are slow, lines of how far a run is would be among what it is read for


@pytest.fixture(scope="session", autouse=True)
def composed_once() -> Iterator[None]:
    """Hydra composes a command's configuration once more beforehand, to see whether that sets hydra.mode: none does."""
    assert not any("mode:" in file.read_text() for file in CONFIGS.rglob("*.yaml"))
    with mock.patch.object(Hydra, "get_mode", return_value=None):
        yield


def pytest_collection_finish() -> None:
    """What is imported and collected stays: looking for garbage among it takes a tenth of a run."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Or modules that look for what was left of them at the end would find all of it."""
    gc.unfreeze()
