"""Which training image is labelled, unlabelled or held out, and the manifest that proves it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Indices into a dataset's training part, each sorted. Training sees `unlabelled` without its labels."""

    labelled: Indices
    unlabelled: Indices
    validation: Indices
    digest: str = ""  # of the images, where the dataset's name does not tell them

    @property
    def hash(self) -> str:
        """SHA-256 over the three index lists and the digest: equal hashes are equal splits."""
        return hashlib.sha256(json.dumps(self._lists()).encode() + self.digest.encode()).hexdigest()

    def manifest(self, dataset: str, split_seed: int) -> dict[str, Any]:
        digest = {"digest": self.digest} if self.digest else {}
        return {"dataset": dataset, "split_seed": split_seed, "hash": self.hash, **digest, **self._lists()}

    def _lists(self) -> dict[str, list[int]]:
        return {
            "labelled": self.labelled.tolist(),
            "unlabelled": self.unlabelled.tolist(),
            "validation": self.validation.tolist(),
        }


def check_sizes(num_known: int, num_classes: int, num_labelled: int, num_validation: int) -> None:
    """Raises ValueError, naming the key, for a split that `num_known` images with a known label cannot give."""
    if num_labelled < num_classes or num_labelled % num_classes:
        raise ValueError(
            f"data.num_labelled must be a positive multiple of the {num_classes} classes "
            f"(labels are balanced), got {num_labelled}"
        )
    if num_validation < 1:
        raise ValueError(f"data.num_validation must be >= 1, got {num_validation}")
    if num_labelled + num_validation > num_known:
        raise ValueError(
            f"data.num_labelled + data.num_validation must be <= the {num_known} training images with a known label, "
            f"got {num_labelled} + {num_validation}"
        )


def class_prior(prior: str | list[float], labels: Indices, num_classes: int) -> list[float]:
    """p(y) [K] as the configuration's `prior` asks for it, given the labels of the labelled images.

    Raises ValueError where the labels should tell and a class has none.
    """
    if isinstance(prior, list):
        return prior
    if prior == "uniform":
        return [1 / num_classes] * num_classes
    counts = np.bincount(labels, minlength=num_classes)
    if not counts.all():
        raise ValueError(
            "prior must be uniform or a list of probabilities where a class has no labelled image, got labelled, "
            f"and class {int(counts.argmin())} has none"
        )
    return [int(count) / len(labels) for count in counts]


def draw_split(
    labels: Indices,
    num_classes: int,
    *,
    num_labelled: int,
    num_validation: int,
    split_seed: int,
    labelled_in_unlabelled: bool,
    digest: str = "",
) -> Split:
    """Draws `num_labelled` images balanced over classes and `num_validation` others; the rest is unlabelled.

    An image whose label is -1 can only be unlabelled.
    Depends on `split_seed` and nothing else; the validation images are drawn first, so that they are the same
    whatever num_labelled is. With `labelled_in_unlabelled` the labelled images are also seen without their labels.
    Raises ValueError for sizes that cannot be drawn.
    """
    check_sizes(int((labels >= 0).sum()), num_classes, num_labelled, num_validation)
    order = np.random.default_rng(split_seed).permutation(len(labels))
    validation = order[labels[order] >= 0][:num_validation]
    rest = order[np.isin(order, validation, invert=True)]
    per_class = num_labelled // num_classes
    chosen = [rest[labels[rest] == k][:per_class] for k in range(num_classes)]
    for k, rows in enumerate(chosen):
        if len(rows) < per_class:
            raise ValueError(
                f"data.num_labelled={num_labelled} needs {per_class} images of class {k}, "
                f"and {len(rows)} are left after validation"
            )
    labelled = np.concatenate(chosen)
    unlabelled = rest if labelled_in_unlabelled else np.setdiff1d(rest, labelled)
    return Split(np.sort(labelled), np.sort(unlabelled), np.sort(validation), digest)
