"""Which of several GPUs a run, and each job of a sweep, is trained on; PyTorch is told that it sees so many."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from configs.check import check_device, check_processes
from configs.schema import Config, ConfigError
from training import run_folder
from training.process import choose_device, take_card, tune_process
from training.saved import device_here


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Three GPUs, and those that were made the process's own."""
    taken: list[int] = [0]

    def set_device(device: torch.device | int) -> None:
        taken.append(device if isinstance(device, int) else device.index)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: taken[-1])
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    return taken


def taken_by_jobs(folder: Path, jobs: range, used: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The cards of jobs that run side by side, each as in a process of its own."""
    before = len(used)
    for job in jobs:
        monkeypatch.setattr(run_folder, "_held", {})
        take_card.__wrapped__(folder, job)
    return used[before:]


def test_jobs_are_dealt_over_the_cards(tmp_path: Path, used: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert Counter(taken_by_jobs(tmp_path, range(3), used, monkeypatch)) == {0: 1, 1: 1, 2: 1}
    assert Counter(taken_by_jobs(tmp_path, range(3, 7), used, monkeypatch)) == {0: 2, 1: 1, 2: 1}


def test_a_job_takes_the_card_that_is_free(tmp_path: Path, used: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder.hold(tmp_path / ".card_0_0")
    run_folder.hold(tmp_path / ".card_2_0")
    assert taken_by_jobs(tmp_path, range(5, 6), used, monkeypatch) == [1]


def test_jobs_are_dealt_where_files_cannot_be_locked(
    tmp_path: Path, used: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "_lock", lambda file, exclusive: None)
    assert taken_by_jobs(tmp_path, range(5), used, monkeypatch) == [0, 1, 2, 0, 1]


def test_one_card_is_everybody_s(tmp_path: Path, used: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert taken_by_jobs(tmp_path, range(5), used, monkeypatch) == []
    assert not list(tmp_path.iterdir())


def test_a_run_uses_its_card_throughout(used: list[int]) -> None:
    assert choose_device("cuda:2") == torch.device("cuda:2")
    assert used[-1] == 2
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda:2")  # as take_card has chosen, say
    assert choose_device("cpu") == torch.device("cpu")


def test_a_card_that_is_not_there_is_refused(used: list[int]) -> None:
    for name in ("auto", "cpu", "cuda", "cuda:0", "cuda:2"):
        check_device(name)
    with pytest.raises(ConfigError, match=r"one of auto, cpu, cuda, cuda:0, cuda:1, cuda:2, got cuda:3"):
        check_device("cuda:3")


def test_processes_of_one_run_take_a_card_each(used: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def config(**given: Any) -> Config:
        sizes = SimpleNamespace(batch_size_labelled=0, batch_size_unlabelled=60)
        return cast(Config, SimpleNamespace(train=sizes, **{"device": "auto", "cuda_graph": False} | given))

    for name, value in {"RANK": "2", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    check_processes(config())  # six on two machines of three cards
    with pytest.raises(ConfigError, match="device must be auto, cpu or cuda"):
        check_processes(config(device="cuda:1"))
    with pytest.raises(ConfigError, match="cuda_graph must be false in a run of several processes"):
        check_processes(config(cuda_graph=True))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    with pytest.raises(ConfigError, match="at most the 3 GPUs that are seen, got 6"):
        check_processes(config())


def test_scripts_on_a_run_of_a_card_that_is_not_there_use_another(
    used: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert device_here("cuda:2") == device_here("cuda") == device_here("auto") == device_here("cpu") == {}
    assert device_here("cuda:3") == {"device": "cuda"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_here("cuda:2") == {"device": "cpu", "cuda_graph": False}


def test_float32_is_not_rounded_to_tf32() -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    tune_process()
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
