"""Random generators keyed by what they are for and by the step, so that a resumed run needs no stored state."""

from __future__ import annotations

import zlib

import torch


def keyed_generator(device: torch.device, seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """A generator that depends on (seed, purpose, index) alone.

    Only 32 bits reach PyTorch's Mersenne twister, so the index is spread by an odd constant: within 2^32 indices of
    one purpose no two generators are alike.
    """
    key = zlib.crc32(f"{seed}/{purpose}".encode()) + index * 0x9E3779B1
    return torch.Generator(device).manual_seed(key % 2**32)
