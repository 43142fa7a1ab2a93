"""Which training image is labelled, unlabelled or held out, and the manifest that proves it."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data.facts import DatasetFacts

ALL = "all"  # of data.num_labelled
NAMED = 12  # classes at most, whose sizes a message lists

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Indices into a dataset's training part, each sorted. Training sees `unlabelled` without its labels."""

    labelled: Indices
    unlabelled: Indices
    validation: Indices
    digest: str = ""  # of the images, where the dataset's name does not tell them
    class_names: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        """SHA-256 over the three index lists and the digest: equal hashes are equal splits."""
        return hashlib.sha256(json.dumps(self._lists()).encode() + self.digest.encode()).hexdigest()

    def manifest(self, dataset: str, split_seed: int) -> dict[str, Any]:
        digest = {"digest": self.digest} if self.digest else {}
        names = {"class_names": list(self.class_names)} if self.class_names else {}
        return {"dataset": dataset, "split_seed": split_seed, "hash": self.hash, **digest, **names, **self._lists()}

    def _lists(self) -> dict[str, list[int]]:
        return {
            "labelled": self.labelled.tolist(),
            "unlabelled": self.unlabelled.tolist(),
            "validation": self.validation.tolist(),
        }


def count_of(key: str, value: Any, total: int) -> int:
    """The number of images that a count, or a fraction below 1 of `total`, stands for. Raises ValueError."""
    is_count = isinstance(value, int) and not isinstance(value, bool)
    if not ((is_count and value >= 0) or (isinstance(value, float) and 0 <= value < 1)):
        raise ValueError(f"{key} must be a number of images, a fraction below 1, or 0 for none, got {written(value)}")
    return int(value) if is_count or not value else max(1, round(value * total))


def written(value: Any) -> str:
    """As a command line writes it."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def apportion(sizes: Indices, number: int, least: int, most: Indices) -> Indices:
    """`number` shared among classes in proportion to their sizes, by largest remainders, `least` to `most` [K] each."""
    ideal = number * sizes / sizes.sum()
    given = np.clip(number * sizes // sizes.sum(), least, most)
    while missing := number - given.sum():
        step = 1 if missing > 0 else -1
        free = given < most if step > 0 else given > least
        given[np.where(free, step * (ideal - given), -np.inf).argmax()] += step
    return given


def by_class(sizes: Indices, number: int) -> Indices:
    """How many of each class are held out, by class: in proportion, and each class keeps one. Raises ValueError."""
    if number > (sizes - 1).sum():
        raise ValueError(f"at most {(sizes - 1).sum()}, as each class keeps a labelled image")
    return apportion(sizes, number, 0, sizes - 1)


@dataclass(frozen=True)
class Room:
    """What a split can be drawn of: `known` images with a label, and those of each class [K] that validation leaves."""

    left: Callable[[int], Indices]  # by the number of validation images
    known: int
    num_classes: int
    balanced: bool
    described: str = " with a known label"  # the images, for messages
    needs_labels: bool = False  # whether a split without any is refused

    def check(self, num_labelled: Any, num_validation: int) -> None:
        """Raises ValueError that names what is wrong, and the largest numbers that are possible."""
        got, is_count = num_labelled, isinstance(num_labelled, int) and not isinstance(num_labelled, bool)
        multiple = "a positive multiple of the" if self.balanced else "at least the"
        problem = f"data.num_labelled must be {ALL}, or {multiple} {self.num_classes} classes"
        problem += f" while data.balanced is true, got {written(got)}" if self.balanced else f", got {written(got)}"
        possible = got == ALL or (
            is_count and got >= self.num_classes and not (self.balanced and got % self.num_classes)
        )
        possible = possible or (is_count and got == 0 and not self.needs_labels)
        if possible and self._fits(got, num_validation):
            return
        if possible:
            problem = (
                f"data.num_labelled + data.num_validation must fit into the {self.known} training images"
                f"{self.described}, got {got} + {num_validation}"
            )
        largest = []
        if most := self._most_labelled(num_validation, self.balanced):
            more = self._most_labelled(num_validation, balanced=False)
            unbalanced = f" (data.balanced=false: {more})" if more > most else ""
            largest.append(f"data.num_labelled={most}{unbalanced} with data.num_validation={num_validation}")
        if possible and self._fits(got, 0):
            numbers = range(self.known + 1)
            first_not = bisect_left(numbers, True, key=lambda number: not self._fits(got, number))
            largest.append(f"data.num_validation={first_not - 1} with data.num_labelled={got}")
        if not largest and (most := self._most_labelled(0, self.balanced)):
            largest.append(f"data.num_labelled={most} with data.num_validation=0")
        raise ValueError(f"{problem}; possible are at most {', or '.join(largest) or 'none, as each class needs one'}")

    def _most_labelled(self, num_validation: int, balanced: bool) -> int:
        """0 where a class would be left without any."""
        left = self.left(num_validation) if num_validation <= self.known else np.zeros(self.num_classes, dtype=np.int64)
        return int(left.min() * self.num_classes if balanced else left.sum() if left.min() > 0 else 0)

    def _fits(self, num_labelled: int | str, num_validation: int) -> bool:
        if num_labelled == 0:  # an image that validation could take is left to train on
            return num_validation <= self.known and self.left(num_validation).sum() > 0
        most = self._most_labelled(num_validation, self.balanced and num_labelled != ALL)
        return most > 0 if num_labelled == ALL else int(num_labelled) <= most


def check_sizes(
    facts: DatasetFacts,
    *,
    num_labelled: Any,
    num_validation: Any,
    balanced: bool,
    stratified: bool,
    labelled_in_unlabelled: bool,
    needs_labels: bool = False,
) -> None:
    """Raises ValueError, naming the keys, for a split that a dataset with these facts cannot give.

    With `needs_labels` also for one without any labelled image.
    """
    known, num_classes = facts.train_images - facts.unknown_labels, facts.num_classes
    sizes, names = np.array(facts.class_sizes, dtype=np.int64), facts.class_names
    if num_labelled == 0 and not known:  # images without any label are all alike
        known, num_classes, sizes, names = facts.train_images, 1, np.array([facts.train_images]), ()

    def left(number: int) -> Indices:
        if stratified and len(sizes):
            return _left(sizes, number)
        rest = known - number  # at best they are of all classes alike
        even = min([rest // num_classes, *sizes])
        return np.array([even] * (num_classes - 1) + [rest - even * (num_classes - 1)])

    held_out = f"data.num_test holds out {facts.held_out} more" if facts.held_out else ""
    inside = "; ".join(filter(None, [_described(sizes, names) if len(sizes) == len(names) else "", held_out]))
    described = (" with a known label" if names else "") + (f" ({inside})" if inside else "")
    number = count_of("data.num_validation", num_validation, known)
    Room(left, known, num_classes, balanced, described, needs_labels).check(num_labelled, number)
    taken = known if num_labelled == ALL else num_labelled + number
    if not labelled_in_unlabelled and taken == facts.train_images:
        raise ValueError(NONE_UNLABELLED)


NONE_UNLABELLED = "data.labelled_in_unlabelled must be true when no other training image is left, got false"


def _left(sizes: Indices, number: int) -> Indices:
    """Images of each class that `number` validation images leave which are drawn by class."""
    return sizes - by_class(sizes, number) if number <= (sizes - 1).sum() else sizes * 0


def _described(sizes: Indices, names: Sequence[str]) -> str:
    if len(sizes) <= NAMED:
        return ", ".join(f"{size} of {name}" for size, name in zip(sizes, names, strict=True))
    smallest = int(sizes.argmin())
    return f"the smallest class, {names[smallest]}, has {sizes[smallest]}"


def class_prior(prior: str | list[float], labels: Indices, num_classes: int) -> list[float]:
    """p(y) [K] as the configuration's `prior` asks for it, given the labels of the labelled images.

    Raises ValueError where the labels should tell and a class has none.
    """
    if isinstance(prior, list):
        return prior
    if prior == "uniform":
        return [1 / num_classes for _ in range(num_classes)]
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
    num_labelled: int | str,
    num_validation: float,
    split_seed: int,
    labelled_in_unlabelled: bool,
    balanced: bool = True,
    stratified: bool = False,
    class_names: Sequence[str] = (),
    digest: str = "",
) -> Split:
    """Draws validation images and, of the others, `num_labelled` with their labels; the rest is unlabelled.

    `num_labelled` is a number, 0 for none, or "all" that have a label. A number is `balanced`, as many of each class,
    or by class in proportion to how many there are, at least one. `num_validation` is a number or a fraction of the
    images with a label, drawn over all of them or, `stratified`, by class in proportion. An image whose label is -1 can
    only be unlabelled; but where none has a label, validation images are drawn over all.
    Depends on `split_seed` and nothing else; the validation images are drawn first, so that they are the same
    whatever num_labelled is. With `labelled_in_unlabelled` the labelled images are also seen without their labels.
    Raises ValueError for sizes that cannot be drawn, with the largest that can.
    """
    has_labels = bool((labels >= 0).any())
    if num_labelled == 0 and not has_labels:  # all are alike
        labels, num_classes = np.zeros_like(labels), 1
    order = np.random.default_rng(split_seed).permutation(len(labels))
    with_label = order[labels[order] >= 0]
    sizes = np.bincount(labels[with_label], minlength=num_classes)
    number = count_of("data.num_validation", num_validation, len(with_label))

    def left(number: int) -> Indices:
        return _left(sizes, number) if stratified else np.bincount(labels[with_label[number:]], minlength=num_classes)

    names = class_names or tuple(map(str, range(num_classes)))
    described = f" with a known label ({_described(sizes, names)})" if has_labels else ""
    Room(left, len(with_label), num_classes, balanced, described).check(num_labelled, number)
    validation = first_of_each(with_label, labels, sizes - left(number)) if stratified else with_label[:number]
    rest = order[np.isin(order, validation, invert=True)]
    available = left(number)
    if num_labelled == ALL:
        per_class = available
    elif balanced or num_labelled == 0:
        per_class = np.full(num_classes, int(num_labelled) // num_classes)
    else:
        per_class = apportion(available, int(num_labelled), 1, available)
    labelled = first_of_each(rest, labels, per_class)
    unlabelled = rest if labelled_in_unlabelled else np.setdiff1d(rest, labelled)
    if not len(unlabelled):
        raise ValueError(NONE_UNLABELLED)
    return Split(np.sort(labelled), np.sort(unlabelled), np.sort(validation), digest, tuple(class_names))


def first_of_each(rows: Indices, labels: Indices, per_class: Indices) -> Indices:
    """The first rows of each class, as many as `per_class` [K] says, or all it has."""
    rows = rows[np.argsort(labels[rows], kind="stable")]
    starts = np.searchsorted(labels[rows], np.arange(len(per_class) + 1))
    numbers = np.minimum(per_class, np.diff(starts))
    return np.concatenate([rows[start : start + n] for start, n in zip(starts[:-1], numbers, strict=True)])
