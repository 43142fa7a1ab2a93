"""The arrays of an .npz file, or of a folder of .npy files, with images and labels: checked before pixels are read."""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from data.facts import Array, DataError
from data.pictures import SMALLEST_SIDE
from data.splits import Indices
from data.stored import InFile, Placed

MOST_CHANNELS = 16  # more are taken for a side, of images whose channels are last
WANTED = "an .npz file has images (uint8 [N, H, W] or [N, C, H, W]) and labels (integers [N], -1 without a label)"
TAKEN = (np.uint8, np.uint16, np.bool_)  # as pixels
Header = tuple[tuple[int, ...], np.dtype[Any]]


def read_images(file: Path, key: str) -> tuple[Array, tuple[str, ...]]:
    """The images uint8 [N, C, H, W] of a checked array, and sentences on what was made of it."""
    array = _read(file, key)
    return as_pixels(array), notes_on(file, key, array)


def image_shape(file: Path, key: str = "images") -> tuple[int, tuple[int, int, int]]:
    """The number of images and their shape [C, H, W], by the header alone. Raises DataError."""
    headers = read_headers(file)
    if key not in headers:
        raise DataError(f"{file}: {key} is missing, and the file has the keys {', '.join(headers) or 'none'}; {WANTED}")
    return headers[key][0][0], _check_images(file, key, headers[key])


def stream_images(file: Path, size: int, key: str = "images") -> Iterator[Array]:
    """The images of a checked array, `size` at a time: uint8 [size, C, H, W], read as `read_images` does.

    Memory holds those alone, whether the file is compressed or not; but for an array in Fortran's order, whose images
    do not lie one after another. Raises DataError.
    """
    try:
        with _opened(file, key) as stream:
            shape, is_fortran, dtype = _header(stream)
            if is_fortran:
                whole = _read(file, key)
            for first in range(0, shape[0], size):
                rows = min(size, shape[0] - first)
                if is_fortran:
                    part = whole[first : first + rows]
                else:
                    content = stream.read(rows * math.prod(shape[1:]) * dtype.itemsize)
                    part = np.frombuffer(content, dtype).reshape(rows, *shape[1:])
                yield as_pixels(part)
    except (OSError, EOFError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise _unreadable(file, error) from error


def map_images(file: Path, key: str) -> tuple[InFile, tuple[str, ...]] | None:
    """The same, left in their file; None where the file is compressed, or its arrays are not in C order.

    None on Windows too, which has no os.pread.
    """
    if not hasattr(os, "pread"):
        return None
    try:
        if (place := _place(file, key)) is None:
            return None
        placed = Placed(*place)
    except (OSError, ValueError, KeyError, struct.error, zipfile.BadZipFile) as error:
        raise _unreadable(file, error) from error
    return InFile(placed, as_pixels, np.arange(placed.shape[0])), notes_on(file, key, placed)


def as_pixels(array: npt.NDArray[Any]) -> Array:
    """uint8 [N, C, H, W] of an array that may be bool, of 16 bits, without channels, or with its channels last."""
    if array.dtype == np.bool_:
        array = array.view(np.uint8) * np.uint8(255)
    if array.dtype.itemsize == 2:
        array = (array >> 8).astype(np.uint8)
    if _has_channels_last(array.shape):
        array = np.ascontiguousarray(array.transpose(0, 3, 1, 2))
    return array if array.ndim == 4 else array[:, None]


def notes_on(file: Path, key: str, array: npt.NDArray[Any] | Placed) -> tuple[str, ...]:
    notes = []
    if array.dtype == np.bool_:
        notes.append(f"{key} of {file} are bool, read as the grey levels 0 and 255")
    if array.dtype.itemsize == 2:
        notes.append(f"{key} of {file} have 16 bits, of which the higher 8 are read")
    if _has_channels_last(array.shape):
        notes.append(f"{key} of {file} have their channels last, and are read so")
    return tuple(notes)


def read_labels(file: Path, needs_labels: bool = True) -> tuple[tuple[int, int, int], Indices, Indices | None]:
    """The shape [C, H, W] of all images, the labels, and those of the test images if there are any.

    A file without labels is refused, or, if not `needs_labels`, has -1 for all of them.
    """
    headers = read_headers(file)
    needed = ("images", "labels") if needs_labels or "test_labels" in headers else ("images",)
    missing = [key for key in needed if key not in headers]
    if missing:
        has = ", ".join(headers) or "none"
        raise DataError(f"{file}: {missing[0]} is missing, and the file has the keys {has}; {WANTED}")
    shape = _check_images(file, "images", headers["images"])
    if "labels" not in headers:
        return shape, _no_labels(headers["images"]), _unlabelled_test(file, headers, shape)
    labels = _check_labels(file, "labels", headers["labels"], headers["images"][0][0], lowest=-1)
    if ("test_images" in headers) != ("test_labels" in headers):
        there, absent = sorted(("test_images", "test_labels"), key=headers.__contains__, reverse=True)
        raise DataError(f"{file}: {absent} is missing, and {there} is there; both belong together")
    if "test_images" not in headers:
        return shape, labels, None
    _check_test_images(file, headers["test_images"], shape)
    number = headers["test_images"][0][0]
    test_labels = _check_labels(file, "test_labels", headers["test_labels"], number, lowest=0)
    if test_labels.max() > labels.max():
        raise DataError(
            f"{file}: test_labels must be classes that labels has, 0 to {labels.max()}, got {test_labels.max()}"
        )
    return shape, labels, test_labels


def _no_labels(images: Header) -> Indices:
    return np.full(images[0][0], -1, dtype=np.int64)


def _unlabelled_test(file: Path, headers: dict[str, Header], shape: tuple[int, int, int]) -> Indices | None:
    """-1 for each test image of a file without labels; None where it has no test images."""
    if "test_images" not in headers:
        return None
    _check_test_images(file, headers["test_images"], shape)
    return _no_labels(headers["test_images"])


def _check_test_images(file: Path, header: Header, shape: tuple[int, int, int]) -> None:
    test_shape = _check_images(file, "test_images", header)
    if test_shape != shape:
        raise DataError(
            f"{file}: test_images must be as images are, {_by(shape)} (channels, height, width), got {_by(test_shape)}"
        )


def _check_images(file: Path, key: str, header: Header) -> tuple[int, int, int]:
    """The shape [C, H, W] of each image."""
    shape, dtype = header
    wanted = f"{file}: {key} must be uint8 [N, H, W] or [N, C, H, W]"
    if dtype.newbyteorder("=") not in TAKEN:
        whole = f" ({key}.astype(numpy.uint8), of pixels in 0..255)"
        scale = {"f": " (pixels in 0..1 times 255, rounded)", "i": whole, "u": whole}.get(dtype.kind, "")
        raise DataError(f"{wanted}, got {dtype}{'' if dtype.hasobject else f' {list(shape)}'}; convert it{scale}")
    if len(shape) not in (3, 4):
        raise DataError(f"{wanted}, got {list(shape)}")
    if shape[0] == 0:
        raise DataError(f"{wanted} with N >= 1, got {list(shape)}")
    if _has_channels_last(shape):
        shape = (shape[0], shape[3], *shape[1:3])
    channels, height, width = (1, *shape[1:]) if len(shape) == 3 else shape[1:]
    if len(shape) == 4 and width == SMALLEST_SIDE < channels and height > SMALLEST_SIDE:
        raise DataError(f"{wanted}, got {list(shape)}, with channels last; use {key}.transpose(0, 3, 1, 2)")
    if not 1 <= channels <= MOST_CHANNELS:
        raise DataError(f"{wanted} with 1 to {MOST_CHANNELS} channels C, got {list(shape)}")
    if min(height, width) < SMALLEST_SIDE:
        raise DataError(f"{wanted} with sides of at least {SMALLEST_SIDE} pixels, got {list(shape)}")
    return channels, height, width


def _has_channels_last(shape: tuple[int, ...]) -> bool:
    """Whether the last axis is too narrow for a side, and the others are wide enough."""
    return len(shape) == 4 and 1 <= shape[3] < SMALLEST_SIDE <= min(shape[1:3])


def _check_labels(file: Path, key: str, header: Header, number: int, lowest: int) -> Indices:
    shape, dtype = header
    wanted = f"{file}: {key} must be integers [{number}], one for each image"
    if dtype.kind not in "iu":
        raise DataError(f"{wanted}, got {dtype}{'' if dtype.hasobject else f' {list(shape)}'}")
    if shape != (number,):
        raise DataError(f"{wanted}, got {list(shape)}")
    labels = _read(file, key)
    if labels.min() < lowest:
        without = " (-1 is an image without a label)" if lowest < 0 else ": a test image needs its label"
        raise DataError(f"{file}: {key} must be >= {lowest}{without}, got {labels.min()}")
    if labels.max() >= 2**31:
        raise DataError(f"{file}: {key} must be classes 0, 1, 2 and so on, got {labels.max()}")
    return labels.astype(np.int64)


def read_names(file: Path, num_classes: int) -> tuple[str, ...]:
    """The classes' names, if the file has them."""
    headers = read_headers(file)
    if "class_names" not in headers:
        return ()
    shape, dtype = headers["class_names"]
    wanted = f"{file}: class_names must be strings [{num_classes}], one for each class in the order of the labels"
    if dtype.kind != "U" or shape != (num_classes,):
        raise DataError(f"{wanted}, got {dtype}{'' if dtype.hasobject else f' {list(shape)}'}")
    names = tuple(map(str, _read(file, "class_names")))
    if not all(name.strip() for name in names) or len(set(names)) < len(names):
        raise DataError(f"{wanted}, none of them empty or there twice, got {', '.join(map(repr, names))}")
    return names


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def is_one(path: Path) -> bool:
    """Whether a folder has the arrays as .npy files, and no pictures."""
    return (path / "images.npy").is_file()


def read_headers(file: Path) -> dict[str, Header]:
    """Shape and dtype of each array, whose data must be as long as its header tells."""
    found = {}
    try:
        for name, size, stream in _entries(file):
            shape, _, dtype = _header(stream)
            length = stream.tell() + math.prod(shape) * dtype.itemsize
            if not dtype.hasobject and length != size:
                raise ValueError(f"{name} has {size} bytes where {length} are promised")
            found[name.removesuffix(".npy")] = (shape, dtype)
    except Exception as error:  # a damaged archive fails in many ways, and each means the same to a person
        raise _unreadable(file, error) from error
    return found


def _entries(file: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Name, bytes and content of each array."""
    if file.is_dir():
        for path in sorted(file.glob("*.npy")):
            with path.open("rb") as stream:
                yield path.name, path.stat().st_size, stream
        return
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as inside:
                yield entry.filename, entry.file_size, inside


@contextmanager
def _opened(file: Path, key: str) -> Iterator[IO[bytes]]:
    """An array's header and data, unpacked."""
    if file.is_dir():
        with (file / f"{key}.npy").open("rb") as stream:
            yield stream
        return
    with zipfile.ZipFile(file) as archive, archive.open(f"{key}.npy") as inside:
        yield inside


def is_bool(file: Path) -> bool:
    return read_headers(file)["images"][1] == np.bool_


def is_deep(file: Path) -> bool:
    """Whether the images have 16 bits."""
    return read_headers(file)["images"][1].itemsize == 2


def _place(file: Path, key: str) -> tuple[Path, int, tuple[int, ...], np.dtype[Any]] | None:
    """Where an array's data begin, in which file, with shape and dtype; None where they are not there as they are."""
    path, offset = (file / f"{key}.npy", 0) if file.is_dir() else (file, _offset(file, f"{key}.npy"))
    if offset is None:
        return None
    with path.open("rb") as stream:
        stream.seek(offset)
        shape, fortran_order, dtype = _header(stream)
        return None if fortran_order else (path, stream.tell(), shape, dtype)


def _offset(file: Path, name: str) -> int | None:
    """Where an entry of an archive begins; None if it is compressed (APPNOTE.TXT of PKWARE, section 4.3.7)."""
    with zipfile.ZipFile(file) as archive:
        entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED:
        return None
    with file.open("rb") as stream:
        stream.seek(entry.header_offset + 26)
        lengths = struct.unpack("<HH", stream.read(4))  # of the name and of what else is told of the entry
    return entry.header_offset + 30 + sum(lengths)


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran's order, and dtype."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(stream)
    return shape, fortran_order, dtype


def _read(file: Path, key: str) -> npt.NDArray[Any]:
    """An array whose header is checked; pickles are never read."""
    try:
        if file.is_dir():
            return np.asarray(np.load(file / f"{key}.npy", allow_pickle=False))
        with np.load(file, allow_pickle=False) as arrays:
            array: npt.NDArray[Any] = arrays[key]
    except (OSError, EOFError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise _unreadable(file, error) from error
    return array


def _unreadable(file: Path, error: Exception) -> DataError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    kind, way = (
        ("a folder of .npy files", "write them with numpy.save")
        if file.is_dir()
        else ("an .npz file", "write it with numpy.savez")
    )
    return DataError(f"{file} cannot be read as {kind} ({reason}); {way}")
