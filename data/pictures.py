"""Pictures as every viewer shows them: the picture files of a folder, and the pixels of one.

Training and prediction read pictures by these functions alone, and so alike.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.facts import Array, DataError

if TYPE_CHECKING:  # --help does not need it
    from PIL.Image import Image

# formats that Pillow knows by name alone, or hands to another program
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
GREY = {"1", "L", "LA", "La", "F"}  # Pillow's modes without colour, and those that start with I
KINDS = 6  # of files that are left out, each named in the sentence
HIGHER_BYTE = "pictures of 16 bits a channel keep the higher 8"


@dataclass
class LeftOut:
    """Files that are not read: how many of each kind, and the first of each."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, path: str) -> None:
        self.counts[kind] += 1
        self.first.setdefault(kind, path)

    def sentence(self, folder: Path) -> str:
        """Such as: 3 files of FOLDER are left out: 2 .txt (such as cats/a.txt), 1 hidden (cats/.b); empty for none."""
        if not self.counts:
            return ""
        number, kinds = self.counts.total(), self.counts.most_common(KINDS)
        named = [
            f"{count} {kind} ({'such as ' if count > 1 else ''}{os.path.relpath(self.first[kind], folder)})"
            for kind, count in kinds
        ]
        rest = number - sum(count for _, count in kinds)
        named += [f"{rest} of other kinds"] if rest else []
        return (
            f"{number} {'file' if number == 1 else 'files'} of {folder} {'is' if number == 1 else 'are'} left out: "
            + (", ".join(named))
        )


@dataclass(frozen=True)
class Looks:
    """What a picture's header tells: height and width as it is shown, colour, and more than 8 bits a channel."""

    size: tuple[int, int]
    in_colour: bool
    deep: bool


@functools.cache
def suffixes() -> frozenset[str]:
    """Of the files that Pillow reads, in lower case, such as ".png"."""
    from PIL import Image

    known = Image.registered_extensions()
    return frozenset(suffix for suffix, name in known.items() if name in Image.OPEN and name not in NOT_DECODED)


def picture_files(folder: Path, left_out: LeftOut | None = None) -> Iterator[Path]:
    """The picture files in `folder` and below, in the order of their names, those of a folder before its sub-folders.

    Holds the names of one folder's files at a time. Hidden files, files that are no pictures by their suffix and links
    that lead nowhere are added to `left_out`; links to folders are followed, once. Raises DataError.
    """
    left_out = LeftOut() if left_out is None else left_out
    return _walk(str(folder), left_out, ())


def _walk(folder: str, left_out: LeftOut, above: tuple[str, ...]) -> Iterator[Path]:
    place = os.path.realpath(folder)
    if place in above:  # a link to a folder that it lies in
        return
    try:
        with os.scandir(folder) as entries:
            inside = sorted((entry.name, entry.is_dir(), entry.is_file()) for entry in entries)
    except OSError as error:
        raise DataError(f"cannot read the folder {folder} ({error.strerror}); mend that, or set data.path") from error
    for name, is_folder, is_file in inside:
        path = os.path.join(folder, name)
        suffix = os.path.splitext(name)[1].lower()
        if is_folder:
            continue
        if name.startswith("."):
            left_out.add("hidden", path)
        elif not is_file:
            left_out.add("links that lead nowhere", path)
        elif suffix not in suffixes():
            left_out.add(suffix or "without a suffix", path)
        else:
            yield Path(path)
    for name, is_folder, _ in inside:
        if is_folder and not name.startswith("."):
            yield from _walk(os.path.join(folder, name), left_out, (*above, place))


def look(file: Path) -> Looks:
    """What the header of a picture tells. Raises DataError."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            width, height = image.size
            deep = image.mode.startswith("I") or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
            in_colour = image.mode not in GREY and not image.mode.startswith("I")
            # Pillow decodes a PNG to find its orientation, which a square one does not need, and turns a TIFF by itself
            turns = width != height and image.format != "TIFF"
            lies = turns and image.getexif().get(0x0112) in (5, 6, 7, 8)
    except Exception as error:  # a damaged picture fails in many ways, and each means the same to a person
        raise unreadable(file, error) from error
    return Looks((width, height) if lies else (height, width), in_colour, deep)


def read_picture(file: Path, shape: tuple[int, int, int], resize: bool = False) -> Array:
    """The pixels uint8 [C, H, W] of a picture in `shape`, C = 1 (grey) or 3 (RGB), as a viewer shows it.

    It is turned as its EXIF orientation says, composed onto white where it is transparent, brought to 8 bits (the
    higher byte of 16), and to grey (ITU-R 601-2) or to RGB. With `resize` it is then squeezed to H x W by Pillow's
    LANCZOS; a JPEG that is much larger is decoded at a half, a quarter or an eighth of its size, at least twice H x W.
    Of several frames the first is taken. Raises DataError, also for another size without `resize`.
    """
    from PIL import Image, ImageOps

    channels, height, width = shape
    if channels not in (1, 3):
        raise DataError(f"{file}: a picture gives 1 or 3 channels, and {channels} are wanted; give an .npz file")
    try:
        with Image.open(file) as opened:
            if resize:
                opened.draft(None, (2 * max(height, width),) * 2)
            image = _on_white(_eight_bits(ImageOps.exif_transpose(opened))).convert("L" if channels == 1 else "RGB")
    except Exception as error:
        raise unreadable(file, error) from error
    if resize and image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    if image.size != (width, height):
        raise DataError(f"{file} is {image.size[1]}x{image.size[0]} pixels (height x width), not {height}x{width}")
    pixels: Array = np.asarray(image, dtype=np.uint8)
    return pixels.transpose(2, 0, 1) if channels == 3 else pixels[None]


def _eight_bits(image: Image) -> Image:
    """Grey pictures of more bits brought to 8; Pillow itself keeps the higher byte of 16-bit colour."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is not told: write 8 bits a channel")
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() >= 2**16:
        raise ValueError("it has more than 16 bits a channel: write 8")
    return Image.fromarray((pixels >> 8).astype(np.uint8))


def _on_white(image: Image) -> Image:
    from PIL import Image

    if not image.has_transparency_data:
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def unreadable(file: Path, error: Exception) -> DataError:
    if isinstance(error, DataError):
        return error
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return DataError(f"{file} cannot be read as an image ({reason}); mend or remove it")
