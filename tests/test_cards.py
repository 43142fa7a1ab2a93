"""Which of several GPUs a run, and each job of a sweep, is trained on; PyTorch is told that it sees so many."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from configs.check import check_device
from configs.schema import ConfigError
from training import run_folder
from training.process import choose_device, take_card, tune_process


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


def test_float32_is_not_rounded_to_tf32() -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    tune_process()
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
