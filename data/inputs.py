"""Images to use a trained model on: a folder of pictures or an .npz file, read a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from data import npz
from data.facts import Array, DataError
from data.pictures import LeftOut, picture_files, read_picture, resized, size_of


@dataclass
class Inputs:
    """Images of the shape [C, H, W] in a folder or an .npz file; with `resize`, brought to it from every size."""

    source: Path
    shape: tuple[int, int, int]
    resize: bool
    number: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)
    reason: str = ""  # why the first of the pictures that are left out is

    def __post_init__(self) -> None:
        """Counts the images, and looks whether they can be used, before any is read. Raises DataError."""
        if self.source.is_dir():
            if self.shape[0] not in (1, 3):
                raise DataError(f"{self.source}: pictures have 1 or 3 channels, and the model {self.shape[0]}")
            self.number = sum(1 for _ in picture_files(self.source))
            if not self.number:
                raise DataError(f"{self.source} must have picture files, in it or below, got none")
        elif self.source.is_file():
            self.number, shape = npz.image_shape(self.source)
            if shape != self.shape and not (self.resize and shape[0] == self.shape[0]):
                by = "x".join(map(str, self.shape))
                raise DataError(
                    f"{self.source}: images must be as those that the model was trained on, {by} (channels, height, "
                    f"width), got {'x'.join(map(str, shape))}"
                )
        else:
            raise DataError(f"{self.source} must be a folder of pictures or an .npz file, and it does not exist")

    @property
    def column(self) -> str:
        """What names an image: its file below the folder, or its index in the array."""
        return "file" if self.source.is_dir() else "index"

    def said(self) -> list[str]:
        """What a person should know of images that were left out, once all others were read."""
        sentence = self.left_out.sentence(self.source)
        return [sentence, *([self.reason] if self.reason else [])] if sentence else []

    def chunks(self, size: int) -> Iterator[tuple[list[str], Array]]:
        """The images uint8 [size, C, H, W], with what names each, `size` at a time. Raises DataError."""
        return self._of_folder(size) if self.source.is_dir() else self._of_file(size)

    def _of_file(self, size: int) -> Iterator[tuple[list[str], Array]]:
        first = 0
        for images in npz.stream_images(self.source, size):
            yield [str(first + row) for row in range(len(images))], resized(images, self.shape[1:])
            first += len(images)

    def _of_folder(self, size: int) -> Iterator[tuple[list[str], Array]]:
        """What cannot be read is left out, and counted; if that is all there is, DataError is raised."""
        files, done = picture_files(self.source, self.left_out), 0
        with ThreadPoolExecutor() as pool:
            while part := list(islice(files, size)):
                read = [pair for pair in zip(part, pool.map(self._read, part), strict=True) if pair[1] is not None]
                if read:
                    done += len(read)
                    names = [file.relative_to(self.source).as_posix() for file, _ in read]
                    yield names, np.stack([pixels for _, pixels in read if pixels is not None])
        if not done:
            raise DataError(self.reason)

    def _read(self, file: Path) -> Array | None:
        try:
            return read_picture(file, self.shape, self.resize)
        except DataError as error:
            self.left_out.add("that cannot be used", str(file))
            self.reason = self.reason or str(error)
            return None


def inputs(source: Path, shape: tuple[int, int, int], resize: str | None) -> Inputs:
    """The images in `source` for a model of images [C, H, W], trained with data.resize. Raises DataError."""
    return Inputs(source, (shape[0], *size_of(resize)) if resize else shape, resize is not None)
