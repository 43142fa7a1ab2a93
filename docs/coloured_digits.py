"""Makes a small set of colour images to try likelihoods with: scikit-learn's digits, 16x16, each on a ground.

uv run python docs/coloured_digits.py coloured.npz

Digit and ground have a colour of their own, drawn for each image, so that colour says nothing about the class.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from sklearn.datasets import load_digits


def coloured_digits(seed: int = 0) -> dict[str, Any]:
    """`images` uint8 [1797, 3, 16, 16] and `labels` [1797], as data=arrays takes them."""
    bundle: Any = load_digits()
    ink = bundle.images[:, None].repeat(2, axis=2).repeat(2, axis=3) / 16
    ink = sum(np.roll(ink, shift, axis=(2, 3)) for shift in ((0, 0), (0, 1), (1, 0), (1, 1))) / 4  # smooth edges
    random = np.random.default_rng(seed)
    digit, ground = random.uniform(0.5, 1, (len(ink), 3, 1, 1)), random.uniform(0, 0.4, (len(ink), 3, 1, 1))
    images = ground + ink * (digit - ground)
    return {"images": np.rint(255 * images).astype(np.uint8), "labels": bundle.target.astype(np.int64)}


if __name__ == "__main__":
    np.savez_compressed(sys.argv[1], **coloured_digits())
