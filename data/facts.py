"""What is known of a dataset before its pixels are read; below all that reads one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.uint8]


class DataError(Exception):
    """A dataset is missing or unusable; the message says which file and what to do."""


@dataclass(frozen=True)
class DatasetFacts:
    """What a configuration is checked against before any work; `folder` and `source` name torchvision's dataset."""

    train_images: int
    num_classes: int
    shape: tuple[int, int, int]  # channels, height, width
    unknown_labels: int = 0  # of the training images
    folder: str = ""
    source: str = ""
    class_names: tuple[str, ...] = ()  # in the order of the labels; the numbers where nothing names them
    class_sizes: tuple[int, ...] = ()  # training images of each class, where that is known without reading them
    is_binary: bool = False  # whether the pixels are known to be black or white
    held_out: int = 0  # labelled images that are the test part, of those of a dataset without one

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", self.class_names or numbered(self.num_classes))


def numbered(num_classes: int) -> tuple[str, ...]:
    """The names of classes that nobody has named: "0", "1", "2" and so on."""
    return tuple(map(str, range(num_classes)))
