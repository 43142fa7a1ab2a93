"""Random generators keyed by what they are for and by the step, so that a resumed run needs no stored state."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor


def key(seed: int, purpose: str, index: int = 0) -> int:
    """A generator's seed that depends on (seed, purpose, index) alone.

    Only 32 bits reach PyTorch's Mersenne twister, so the index is spread by an odd constant: within 2^32 indices of
    one purpose no two keys are alike.
    """
    return (zlib.crc32(f"{seed}/{purpose}".encode()) + index * 0x9E3779B1) % 2**32


def keyed_generator(device: torch.device, seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """A new generator with the key of (seed, purpose, index)."""
    return torch.Generator(device).manual_seed(key(seed, purpose, index))


def random_int16(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Uniform over all int16, on the generator's device: a quarter of the random words that one number a draw takes."""
    number = math.prod(shape)
    words = torch.empty(-(-number // 4), dtype=torch.int64, device=generator.device)
    return words.random_(-(2**63), None, generator=generator).view(torch.int16)[:number].view(shape)
