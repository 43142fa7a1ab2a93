"""data=arrays: a person's own images, from an .npz file or from a folder of PNG and JPEG files."""

from __future__ import annotations

import functools
import hashlib
import math
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from data.facts import DataError, DatasetFacts, Images
from data.splits import Indices

SMALLEST_SIDE = 4  # pixels; the networks halve the sides twice
MOST_CHANNELS = 16  # more are taken for a side, of images whose channels are last
TEST_SHARE = 6  # without test images, every sixth labelled one of a class is held out as the test part
UNLABELLED = "unlabelled"  # the sub-folder of images without a label
SUFFIXES = (".png", ".jpg", ".jpeg")
GREY, COLOUR = ("1", "L", "LA"), ("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr")  # Pillow's modes of 8 bits
WANTED = (
    "data=arrays needs data.path, an .npz file with images (uint8 [N, H, W] or [N, C, H, W]) and labels "
    "(integers [N], -1 without a label), or a folder with a sub-folder of PNG or JPEG files for each class"
)
Header = tuple[tuple[int, ...], np.dtype[Any]]


def facts(path: str | None) -> DatasetFacts:
    """What is known without reading the pixels: from the headers and the labels. Raises DataError."""
    file = _found(path)
    if file.is_dir():
        files, labels, names = _listed(file)
        shape, has_test = _shape_of_all(_stamped(files)), False
    else:
        shape, labels, test_labels = _read_labels(file)
        has_test, names = test_labels is not None, ()
    num_classes = _check_classes(labels, str(file))
    names = names or _read_names(file, num_classes)
    rows, _ = parts(labels, num_classes, has_test)
    return DatasetFacts(len(rows), num_classes, shape, int((labels[rows] < 0).sum()), class_names=names)


def load(path: str | None, part: str) -> Images:
    """The `train` or `test` part, and a digest of all pixels and labels. Raises DataError."""
    file = _found(path)
    test: tuple[npt.NDArray[np.uint8], Indices] | None = None
    names: tuple[str, ...] = ()
    if file.is_dir():
        files, labels, names = _listed(file)
        images = _decoded(files, _shape_of_all(_stamped(files)))
    else:
        shape, labels, test_labels = _read_labels(file)
        images = _read(file, "images").reshape(-1, *shape)
        if test_labels is not None:
            test = _read(file, "test_images").reshape(-1, *shape), test_labels
    num_classes = _check_classes(labels, str(file))
    names = names or _read_names(file, num_classes)
    digest = _digest(images, labels, *(test or ()))
    if test and part == "test":
        return Images(*test, num_classes, digest, names)
    rows = parts(labels, num_classes, bool(test))[part == "test"]
    return Images(images[rows], labels[rows], num_classes, digest, names)


def parts(labels: Indices, num_classes: int, has_test: bool) -> tuple[Indices, Indices]:
    """The rows of the training and the test part, each sorted.

    Without test images in the file, a sixth of each class's labelled images (at least one) is the test part. They are
    drawn by a generator of their own, so that they are the same whatever data.split_seed is.
    """
    everything = np.arange(len(labels))
    if has_test:
        return everything, everything[:0]
    order = np.random.default_rng(0).permutation(len(labels))
    classes = (order[labels[order] == k] for k in range(num_classes))
    test = np.sort(np.concatenate([rows[: max(1, len(rows) // TEST_SHARE)] for rows in classes]))
    return np.setdiff1d(everything, test), test


def _found(path: str | None) -> Path:
    if not path:
        raise DataError(f"{WANTED}; got nothing")
    try:
        file = Path(path).expanduser()
        there = file.exists()
    except (OSError, RuntimeError):  # such as a name that is too long, or the home of nobody
        there = False
    if not there:
        raise DataError(f"{WANTED}; got {path}, which does not exist")
    return file


def _check_classes(labels: Indices, where: str, name: str = "labels") -> int:
    """The number of classes, each of which has an image. Raises DataError."""
    there = np.unique(labels[labels >= 0])
    if len(there) < 2:
        raise DataError(f"{where}: {name} must have at least 2 classes, got {len(there)}")
    if len(there) <= there[-1]:
        missing = int(np.argmax(there != np.arange(len(there))))
        raise DataError(
            f"{where}: {name} must be the classes 0 to {there[-1]} without a gap, as the highest is {there[-1]}, "
            f"got no image of class {missing}"
        )
    return len(there)


def _digest(*arrays: npt.NDArray[Any]) -> str:
    """SHA-256 over shapes and contents."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(str(array.shape).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


# ---- .npz files ----


def _read_labels(file: Path) -> tuple[tuple[int, int, int], Indices, Indices | None]:
    """The shape [C, H, W] of all images, the labels, and those of the test images if there are any."""
    headers = _headers(file)
    missing = [key for key in ("images", "labels") if key not in headers]
    if missing:
        has = ", ".join(headers) or "none"
        raise DataError(f"{file}: {missing[0]} is missing, and the file has the keys {has}; {WANTED}")
    shape = _check_images(file, "images", headers["images"])
    labels = _check_labels(file, "labels", headers["labels"], headers["images"][0][0], lowest=-1)
    if ("test_images" in headers) != ("test_labels" in headers):
        there, absent = sorted(("test_images", "test_labels"), key=headers.__contains__, reverse=True)
        raise DataError(f"{file}: {absent} is missing, and {there} is there; both belong together")
    if "test_images" not in headers:
        return shape, labels, None
    test_shape = _check_images(file, "test_images", headers["test_images"])
    if test_shape != shape:
        raise DataError(
            f"{file}: test_images must be as images are, {_by(shape)} (channels, height, width), got {_by(test_shape)}"
        )
    number = headers["test_images"][0][0]
    test_labels = _check_labels(file, "test_labels", headers["test_labels"], number, lowest=0)
    if test_labels.max() > labels.max():
        raise DataError(
            f"{file}: test_labels must be classes that labels has, 0 to {labels.max()}, got {test_labels.max()}"
        )
    return shape, labels, test_labels


def _check_images(file: Path, key: str, header: Header) -> tuple[int, int, int]:
    """The shape [C, H, W] of each image."""
    shape, dtype = header
    wanted = f"{file}: {key} must be uint8 [N, H, W] or [N, C, H, W]"
    if dtype != np.uint8:
        scale = " (pixels in 0..1 times 255, rounded)" if dtype.kind == "f" else ""
        raise DataError(f"{wanted}, got {dtype}{'' if dtype.hasobject else f' {list(shape)}'}; convert it{scale}")
    if len(shape) not in (3, 4):
        raise DataError(f"{wanted}, got {list(shape)}")
    if shape[0] == 0:
        raise DataError(f"{wanted} with N >= 1, got {list(shape)}")
    channels, height, width = (1, *shape[1:]) if len(shape) == 3 else shape[1:]
    if len(shape) == 4 and width <= SMALLEST_SIDE < channels and height > SMALLEST_SIDE:
        raise DataError(f"{wanted}, got {list(shape)}, with channels last; use {key}.transpose(0, 3, 1, 2)")
    if not 1 <= channels <= MOST_CHANNELS:
        raise DataError(f"{wanted} with 1 to {MOST_CHANNELS} channels C, got {list(shape)}")
    if min(height, width) < SMALLEST_SIDE:
        raise DataError(f"{wanted} with sides of at least {SMALLEST_SIDE} pixels, got {list(shape)}")
    return channels, height, width


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


def _read_names(file: Path, num_classes: int) -> tuple[str, ...]:
    """The classes' names, if the file has them."""
    headers = _headers(file)
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


def _headers(file: Path) -> dict[str, Header]:
    """Shape and dtype of each array, whose data must be as long as its header tells."""
    found = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                with archive.open(entry) as stream:
                    shape, dtype = _header(stream)
                    length = stream.tell() + math.prod(shape) * dtype.itemsize
                if not dtype.hasobject and length != entry.file_size:
                    raise ValueError(f"{entry.filename} has {entry.file_size} bytes where {length} are promised")
                found[entry.filename.removesuffix(".npy")] = (shape, dtype)
    except Exception as error:  # a damaged archive fails in many ways, and each means the same to a person
        raise _unreadable(file, error) from error
    return found


def _header(stream: IO[bytes]) -> Header:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype


def _read(file: Path, key: str) -> npt.NDArray[Any]:
    """An array whose header is checked; pickles are never read."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            array: npt.NDArray[Any] = arrays[key]
    except (OSError, EOFError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise _unreadable(file, error) from error
    return array


def _unreadable(file: Path, error: Exception) -> DataError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return DataError(f"{file} cannot be read as an .npz file ({reason}); write it with numpy.savez")


# ---- folders ----


def _listed(folder: Path) -> tuple[list[Path], Indices, tuple[str, ...]]:
    """The image files, class by class in the order of the sub-folders' names, their labels, and those names."""
    inside = [path for path in _inside(folder) if path.is_dir() and not path.name.startswith(".")]
    classes = [path for path in inside if path.name != UNLABELLED]
    if len(classes) < 2:
        raise DataError(f"{folder} must have a sub-folder of PNG or JPEG files for each of 2 or more classes")
    files, labels = [], []
    for path in inside:
        own = [file for file in _inside(path) if file.suffix.lower() in SUFFIXES and file.is_file()]
        if not own and path.name != UNLABELLED:
            raise DataError(f"{path} must have PNG or JPEG files, as each sub-folder is a class, got none")
        files += own
        labels += [classes.index(path) if path in classes else -1] * len(own)
    return files, np.array(labels, dtype=np.int64), tuple(path.name for path in classes)


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"cannot read the folder {folder} ({error.strerror}); mend that, or set data.path") from error


def _stamped(files: list[Path]) -> tuple[tuple[Path, int], ...]:
    return tuple((file, file.stat().st_mtime_ns) for file in files)


@functools.lru_cache(maxsize=1)  # a configuration is checked several times, and there may be many files
def _shape_of_all(stamped: tuple[tuple[Path, int], ...]) -> tuple[int, int, int]:
    """The shape [C, H, W] of all files, in colour if one is."""
    from PIL import Image

    first, size, in_colour = stamped[0][0], None, False
    for file, _ in stamped:
        try:
            with Image.open(file) as image:
                own, mode = image.size, image.mode
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise _no_picture(file, error) from error
        size = size or own
        if own != size:
            sizes = f"{own[0]}x{own[1]}", f"{size[0]}x{size[1]}"
            raise DataError(f"all images must have one size: {file} is {sizes[0]} pixels, and {first} is {sizes[1]}")
        if mode not in GREY + COLOUR:
            raise DataError(f"{file} must be a grey or RGB image of 8 bits a channel, got Pillow's mode {mode}")
        in_colour |= mode in COLOUR
    assert size is not None  # _listed gives at least two files
    if min(size) < SMALLEST_SIDE:
        raise DataError(f"{first} must have sides of at least {SMALLEST_SIDE} pixels, got {size[0]}x{size[1]}")
    return (3 if in_colour else 1), size[1], size[0]


def _decoded(files: list[Path], shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """uint8 [N, C, H, W]."""
    from PIL import Image

    images = np.empty((len(files), *shape), dtype=np.uint8)
    for index, file in enumerate(files):
        try:
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("RGB" if shape[0] == 3 else "L"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise _no_picture(file, error) from error
        images[index] = pixels.transpose(2, 0, 1) if shape[0] == 3 else pixels
    return images


def _no_picture(file: Path, error: Exception) -> DataError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return DataError(f"{file} cannot be read as an image ({reason}); mend or remove it")
