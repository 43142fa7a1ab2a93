"""Pictures as every viewer shows them: the picture files of a folder, and the pixels of one.

Training and prediction read pictures by these functions alone, and so alike.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from data.facts import Array, DataError
from data.progress import progress

if TYPE_CHECKING:  # --help does not need it
    from PIL.Image import Image

Result = TypeVar("Result")
# formats that Pillow knows by name alone, or hands to another program
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
GREY = {"1", "L", "LA", "La", "F"}  # Pillow's modes without colour, and those that start with I
NAMED = 5  # damaged files at most that a message names
KINDS = 6  # of files that are left out, each named in the sentence
SMALLEST_SIDE = 4  # pixels; the networks halve the sides twice
LARGEST_RESIZE = 512  # more pixels than the networks here are for, or memory has room for


@dataclass
class LeftOut:
    """Files that are not read: how many of each kind, and the first of each."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, path: str) -> None:
        self.counts[kind] += 1
        self.first.setdefault(kind, path)

    def update(self, other: LeftOut) -> None:
        self.counts.update(other.counts)
        self.first = other.first | self.first

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
    """What a picture's header tells: height and width as it is shown, colour, and more than 8 bits a channel.

    A palette of greys is grey. Three channels are colour, whatever is in them, as those of every WebP are.
    """

    size: tuple[int, int]
    in_colour: bool
    deep: bool
    has_frames: bool = False  # more than one, of which the first is read


@functools.cache
def suffixes() -> frozenset[str]:
    """Of the files that Pillow reads, in lower case, such as ".png"."""
    from PIL import Image

    known = Image.registered_extensions()
    return frozenset(suffix for suffix, name in known.items() if name in Image.OPEN and name not in NOT_DECODED)


def picture_files(folder: Path, left_out: LeftOut | None = None, places: set[str] | None = None) -> Iterator[Path]:
    """The picture files in `folder` and below, in the order of their names, those of a folder before its sub-folders.

    Holds the names of one folder's files at a time. Hidden files, files that are no pictures by their suffix and links
    that lead nowhere are added to `left_out`; links to folders are followed, and each folder is read once: those that
    were are added to `places`. Raises DataError.
    """
    return _walk(str(folder), LeftOut() if left_out is None else left_out, set() if places is None else places)


def _walk(folder: str, left_out: LeftOut, places: set[str]) -> Iterator[Path]:
    place = os.path.realpath(folder)
    if place in places:
        return
    places.add(place)
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
            yield from _walk(os.path.join(folder, name), left_out, places)


def size_of(resize: str) -> tuple[int, int]:
    """Height and width of data.resize. Raises ValueError."""
    sides = re.fullmatch(r"(\d{1,5})x(\d{1,5})", resize)
    if not sides or not all(SMALLEST_SIDE <= int(side) <= LARGEST_RESIZE for side in sides.groups()):
        raise ValueError(
            f"data.resize must be HEIGHTxWIDTH in pixels, such as 32x32, each {SMALLEST_SIDE} to {LARGEST_RESIZE}, "
            f"got {resize}"
        )
    return int(sides[1]), int(sides[2])


def resized(images: Array, size: tuple[int, int]) -> Array:
    """Images uint8 [N, C, H, W] squeezed to (height, width) as `read_picture` does, channel by channel."""
    from PIL import Image

    if images.shape[2:] == size:
        return images
    small = np.empty((*images.shape[:2], *size), dtype=np.uint8)
    for index in np.ndindex(*images.shape[:2]):
        small[index] = Image.fromarray(images[index]).resize(size[::-1], Image.Resampling.LANCZOS)
    return small


def look(file: Path, turned: bool = True) -> Looks:
    """What the header of a picture tells; its size without regard to EXIF if not `turned`. Raises DataError."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            width, height = image.size
            deep = image.mode.startswith("I") or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
            in_colour = image.mode not in GREY and not image.mode.startswith("I") and not _has_greys(image)
            has_frames = getattr(image, "n_frames", 1) > 1
            # Pillow decodes a PNG to find its orientation, which a square one does not need, and turns a TIFF by itself
            turns = turned and width != height and image.format != "TIFF"
            lies = turns and image.getexif().get(0x0112) in (5, 6, 7, 8)
    except Exception as error:  # a damaged picture fails in many ways, and each means the same to a person
        raise unreadable(file, error) from error
    return Looks((width, height) if lies else (height, width), in_colour, deep, has_frames)


def _has_greys(image: Image) -> bool:
    """Whether a picture has a palette, and it is one of greys."""
    if image.mode != "P":
        return False
    palette = image.getpalette("RGB") or []
    return palette[::3] == palette[1::3] == palette[2::3]


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
    eight = (pixels >> 8).astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):  # the grey level that is, of 16 bits
        eight[pixels == transparent] = 255
    return Image.fromarray(eight)


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


# ---- all the pictures of a data set ----


def stamped(files: list[Path]) -> tuple[tuple[Path, int], ...]:
    return tuple((file, file.stat().st_mtime_ns) for file in files)


@functools.lru_cache(maxsize=1)  # a configuration is checked several times, and there may be many files
def shape_of_all(stamped: tuple[tuple[Path, int], ...], resize: str | None) -> tuple[tuple[int, int, int], int, int]:
    """The shape [C, H, W] that all files are read in, in colour if one is; how many have 16 bits; several frames."""
    files = [file for file, _ in stamped]
    looks = _each(lambda index: look(files[index], turned=resize is None), files, "looking at the pictures")
    channels = 3 if any(one.in_colour for one in looks) else 1
    deep, moving = sum(one.deep for one in looks), sum(one.has_frames for one in looks)
    if resize:
        return (channels, *size_of(resize)), deep, moving
    sizes = [one.size for one in looks]
    if (number := len(set(sizes))) > 1:
        other = next(index for index, size in enumerate(sizes) if size != sizes[0])
        raise DataError(
            "all images must have one size, or data.resize brings them to one, such as data.resize=32x32: "
            f"{files[0]} is {_by(sizes[0])} pixels (height x width), {files[other]} is {_by(sizes[other])}, and "
            f"there are {number} sizes"
        )
    if min(sizes[0]) < SMALLEST_SIDE:
        raise DataError(
            f"{files[0]} must have sides of at least {SMALLEST_SIDE} pixels, got {_by(sizes[0])}; data.resize=32x32 "
            "brings all to that size"
        )
    shape = (channels, *sizes[0])
    if len(files) * math.prod(shape) > memory():
        raise DataError(
            f"{len(files)} images of {_by(sizes[0])} pixels do not fit into memory; bring them to a smaller size, such "
            "as data.resize=64x64"
        )
    return shape, deep, moving


def notes_on(place: Path, deep: int, moving: int) -> list[str]:
    """Sentences on so many pictures of 16 bits, and so many of several frames."""
    read = {"16 bits a channel, of which the higher 8 are read": deep}
    read |= {"several frames or pages, of which the first is read": moving}
    have = {number: "picture in {} has" if number == 1 else "pictures in {} have" for number in read.values()}
    return [f"{number} {have[number].format(place)} {what}" for what, number in read.items() if number]


def memory() -> float:
    """Bytes that this machine has."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # not on every system
        return math.inf


def read_pictures(files: list[Path], shape: tuple[int, int, int], resize: bool) -> Array:
    """uint8 [N, C, H, W]."""
    images = np.empty((len(files), *shape), dtype=np.uint8)

    def read(index: int) -> None:
        images[index] = read_picture(files[index], shape, resize)

    _each(read, files, "reading the pictures")
    return images


def _each(do: Callable[[int], Result], files: Sequence[Path], what: str) -> list[Result]:
    """What `do` gives for the index of each file, on all cores. Raises DataError that names all that are damaged."""

    def attempt(index: int) -> Result | DataError:
        try:
            return do(index)
        except DataError as error:
            return error

    with ThreadPoolExecutor() as pool:
        done = list(progress(pool.map(attempt, range(len(files))), what, "pictures", len(files)))
    if errors := [(file, one) for file, one in zip(files, done, strict=True) if isinstance(one, DataError)]:
        more = ", ".join(str(file) for file, _ in errors[1:NAMED]) + (" and others" if len(errors) > NAMED else "")
        raise DataError(str(errors[0][1]) + (f"; so must {more}, {len(errors)} in all" if more else ""))
    return [one for one in done if not isinstance(one, DataError)]


def _by(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))
