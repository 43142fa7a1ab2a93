"""Pixels of data.binarization=fixed: drawn once for every image, by its row and a published seed, and for everybody.

Philox4x64 of ten rounds (Salmon et al. 2011) is a function of a key and a counter: a block of four words, which are
sixteen numbers of 16 bits, the lowest bits of the first word first. An image of D = C H W pixels has ceil(D / 16)
blocks of its own, from row * ceil(D / 16) on; the key is (SEED, 0) of the training part and (SEED, 1) of the test part.
Pixel d, counted channel by channel and line by line, is white where max(u_d, 1) <= 257 v_d, of u_d its number in
0..65535 and v_d its grey level in 0..255.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from data.facts import Array

SEED = 2011  # published: with another, every number that was ever measured on these pixels would be of other images
PARTS = ("train", "test")
BLOCK = 16  # numbers of 16 bits that Philox4x64 gives for a counter
ROWS = 4096  # images that are drawn in one go, at most


def fixed_pixels(images: Array, rows: npt.NDArray[np.int64], part: str) -> Array:
    """Images [B, C, H, W] of 0 and 255, Bernoulli(intensity / 255), of grey ones that are these rows [B] of a part.

    The probability is exact at 0 and 255 and within 2^-16 between, as that of `dynamic`. Depends on nothing else: an
    image has the same pixels alone and among others.
    """
    size = int(np.prod(images.shape[1:]))
    drawn = np.empty_like(images, order="C")
    edges = np.union1d(np.flatnonzero(np.diff(rows, prepend=-2) != 1), np.arange(0, len(rows), ROWS))
    for first, end in pairwise([*edges.tolist(), len(rows)]):  # what follows one another is drawn together
        uniform = _numbers(int(rows[first]), end - first, size, part)
        highest = images[first:end].reshape(-1, size).astype(np.uint16) * np.uint16(257)
        drawn[first:end] = (np.maximum(uniform, 1) <= highest).reshape(-1, *images.shape[1:])
    drawn *= np.uint8(255)
    return drawn


def _numbers(row: int, rows: int, size: int, part: str) -> npt.NDArray[np.uint16]:
    """`size` numbers for each of so many rows that follow one another, uniform over all of 16 bits."""
    blocks = -(-size // BLOCK)
    # NumPy adds 1 to the counter before each block
    philox = np.random.Philox(key=[SEED, PARTS.index(part)], counter=(row * blocks - 1) % 2**256)
    words = philox.random_raw(rows * blocks * 4).astype("<u8")
    return words.view("<u2").reshape(rows, blocks * BLOCK)[:, :size]
