"""Images to use a trained model on: pictures in a folder, or the arrays of data.npz, read a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from data import npz
from data.arrays import BLACK
from data.facts import Array, DataError
from data.pictures import LeftOut, Looks, look, notes_on, picture_files, read_picture, resized, size_of, suffixes

LOOKED_AT = 64  # images at once, until one is bright enough


@dataclass
class Inputs:
    """Images of the shape [C, H, W] in a folder or a file; with `resize`, brought to it from every size."""

    source: Path
    shape: tuple[int, int, int]
    resize: bool
    number: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)
    reasons: dict[str, str] = field(default_factory=dict)  # of each kind of picture that is left out, the first
    deep: int = 0  # pictures of 16 bits a channel
    moving: int = 0  # pictures of several frames
    notes: tuple[str, ...] = ()  # what is made of an array

    def __post_init__(self) -> None:
        """Counts the images, and looks whether they can be used, before the model sees any. Raises DataError."""
        if self.has_pictures:
            if self.shape[0] not in (1, 3):
                raise DataError(f"{self.source}: pictures have 1 or 3 channels, and the model {self.shape[0]}")
            self.number = sum(1 for _ in self._files(LeftOut()))
            if not self.number:
                raise DataError(f"{self.source} must have picture files, in it or below, got none")
        elif self.source.exists():
            self.number, shape = npz.image_shape(self.source)
            if shape != self.shape and not (self.resize and shape[0] == self.shape[0]):
                by = "x".join(map(str, self.shape))
                raise DataError(
                    f"{self.source}: images must be as those that the model was trained on, {by} (channels, height, "
                    f"width), got {'x'.join(map(str, shape))}"
                )
            stored, dtype = npz.read_headers(self.source)["images"]
            self.notes = npz.notes_on(self.source, "images", np.broadcast_to(np.zeros((), dtype), stored))
        else:
            raise DataError(f"{self.source} must be a folder of pictures or an .npz file, and it does not exist")
        self._check_range()

    @property
    def has_pictures(self) -> bool:
        if self.source.is_dir():
            return not npz.is_one(self.source)
        return self.source.is_file() and self.source.suffix.lower() in suffixes()

    @property
    def column(self) -> str:
        """What names an image: its file below the folder, or its index in the array."""
        return "file" if self.has_pictures else "index"

    def said(self) -> list[str]:
        """What a person should know of how images were read, once all were."""
        left_out = self.left_out.sentence(self.source)
        read = notes_on(self.source, self.deep, self.moving)
        return [*self.notes, *([left_out] if left_out else []), *self.reasons.values(), *read]

    def chunks(self, size: int) -> Iterator[tuple[list[str], Array]]:
        """The images uint8 [size, C, H, W], with what names each, `size` at a time. Raises DataError."""
        self.left_out, self.reasons, self.deep, self.moving = LeftOut(), {}, 0, 0
        return self._of_pictures(size) if self.has_pictures else self._of_arrays(size)

    def _check_range(self) -> None:
        """Raises DataError if of several images none has a pixel that is brighter than black, as training does."""
        brightest = 0
        for _, images in self.chunks(LOOKED_AT):
            brightest = max(brightest, int(images.max()))
            if brightest > BLACK or self.number == 1:
                return
        way_on = f"multiply them by {255 // max(1, brightest)}"
        if any("16 bits" in note for note in self.said()):
            way_on = "of 16 bits the higher 8 are read; write grey levels of 0 to 255 as 8 bits, such as uint8"
        raise DataError(
            f"{self.source} must have grey levels of 0 to 255, as the model was trained on, got none above {brightest} "
            f"in its {self.number} images, which is black; {way_on}"
        )

    def _of_arrays(self, size: int) -> Iterator[tuple[list[str], Array]]:
        first = 0
        for images in npz.stream_images(self.source, size):
            yield [str(first + row) for row in range(len(images))], resized(images, self.shape[1:])
            first += len(images)

    def _files(self, left_out: LeftOut) -> Iterator[Path]:
        return picture_files(self.source, left_out) if self.source.is_dir() else iter([self.source])

    def _of_pictures(self, size: int) -> Iterator[tuple[list[str], Array]]:
        """What cannot be read is left out, and counted; if that is all there is, DataError is raised."""
        files, done = self._files(self.left_out), 0
        folder = self.source if self.source.is_dir() else self.source.parent
        with ThreadPoolExecutor() as pool:
            while part := list(islice(files, size)):
                names, images = [], []
                for file, read in zip(part, pool.map(self._read, part), strict=True):
                    if isinstance(read, DataError):
                        self._leave_out(file, read)
                        continue
                    pixels, looks = read
                    names.append(file.relative_to(folder).as_posix())
                    images.append(pixels)
                    self.deep += looks.deep
                    self.moving += looks.has_frames
                if images:
                    done += len(images)
                    yield names, np.stack(images)
        if not done:
            raise DataError(next(iter(self.reasons.values())))

    def _read(self, file: Path) -> tuple[Array, Looks] | DataError:
        try:
            return read_picture(file, self.shape, self.resize), look(file, turned=False)
        except DataError as error:
            return error

    def _leave_out(self, file: Path, error: DataError) -> None:
        kind = "that cannot be read"
        if not self.resize:
            with suppress(DataError):
                kind = kind if look(file).size == self.shape[1:] else "of another size"
        self.left_out.add(kind, str(file))
        self.reasons.setdefault(kind, str(error))


def inputs(source: Path, shape: tuple[int, int, int], resize: str | None) -> Inputs:
    """The images in `source` for a model of images [C, H, W], trained with data.resize. Raises DataError."""
    return Inputs(source, (shape[0], *size_of(resize)) if resize else shape, resize is not None)
