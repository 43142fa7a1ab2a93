"""What a run sets of its process: memory, threads, device and precision."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from configs.schema import ConfigError
from training.run_folder import hold

CARD = ".card"  # files in a sweep's folder, each held by the process of a job that uses that GPU
log = logging.getLogger("catvae")


def tune_process() -> None:
    """Has this process train faster on a CPU; what each line buys is in docs/performance.md.

    Numbers below the normal ones are zero: Adam's means of pixels that are always black come to 1e-38 after 800 steps,
    stay there, and are slow. It must come before the first operation that is split, whose threads take it over.
    glibc keeps what a step frees for the next one, in huge pages, instead of asking for it anew, page by page. Other C
    libraries have no mallopt, other systems no such advice. On a GPU float32 is float32: by default convolutions there
    round to the 10 bits of TF32.
    """
    torch.set_flush_denormal(True)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    mmap_threshold, trim_threshold, top_pad, huge_pages = -3, -1, -2, 14  # malloc.h, mman.h
    reserved = 2**30  # addresses, not memory
    with suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 32 * 2**20)  # the most that it takes
        libc.mallopt(trim_threshold, reserved)
        libc.mallopt(top_pad, reserved)
        libc.malloc.restype = ctypes.c_void_p
        block = libc.malloc(ctypes.c_size_t(31 * 2**20))  # more than is left: the heap grows by what is reserved
        libc.madvise(ctypes.c_void_p(block & -(2**21)), ctypes.c_size_t(reserved), huge_pages)
        libc.free(ctypes.c_void_p(block))


def share_cores(pixels: int) -> None:
    """One thread for a minibatch of so few pixels that PyTorch would not split it (its grain is 2^15 elements).

    More gain nothing there, and on a busy machine each operation waits for the slowest. OMP_NUM_THREADS overrules it.
    """
    if pixels < 2**15 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def warn_of_busy_cores(device: torch.device) -> None:
    """Says so where other processes leave fewer cores than this one has threads, which no setting of ours mends.

    Two threads beside a busy process on two cores are up to 15 times slower than one. OMP_NUM_THREADS is a choice.
    """
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    if device.type != "cpu" or threads == 1 or "OMP_NUM_THREADS" in os.environ:
        return
    others = min(threads_of_others(), cores)
    if threads + others > cores:
        log.warning(
            "other processes keep %d of %d cores busy, and each step waits for the slowest of its %d threads: "
            "OMP_NUM_THREADS=%d is faster while they do",
            others,
            cores,
            threads,
            max(1, cores - others),
        )


def threads_of_others(looks: int = 5, seconds: float = 0.004) -> int:
    """How many threads of other processes run, the fewest of a few looks; 0 where the system is not Linux."""
    found = []
    try:
        for _ in range(looks):
            running = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])  # man proc_loadavg
            states = [stat.read_text().rpartition(") ")[2][0] for stat in Path("/proc/self/task").glob("*/stat")]
            found.append(running - states.count("R"))
            time.sleep(seconds)
    except (OSError, ValueError, IndexError):
        return 0
    return max(0, min(found))


@contextmanager
def threads_kept() -> Iterator[None]:
    """Puts the number of threads back in the end: the next job of a sweep chooses its own."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def choose_device(name: str) -> torch.device:
    """The device, and of several GPUs this process's own, which it then uses throughout."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


@functools.cache  # a process uses one
def take_card(folder: Path, job: int) -> None:
    """Of several visible GPUs, has this process of a sweep in `folder` use one that the fewest others have taken.

    Where files cannot be locked, its job's number says which.
    """
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for turn in range(job + 1 if cards > 1 else 0):
        for card in ((job + other) % cards for other in range(cards)):
            with suppress(ConfigError):
                hold(folder / f"{CARD}_{card}_{turn}")
                torch.cuda.set_device(card)
                return


def choose_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 where the hardware multiplies in it, and fp32 elsewhere."""
    if device.type == "cuda":
        in_hardware = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        in_hardware = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if name == "auto":
        return "bf16" if in_hardware else "fp32"
    if name == "bf16" and not in_hardware:
        log.warning("this %s has no bf16 instructions: precision=bf16 is several times slower than fp32", device.type)
    return name
