"""data=arrays: a person's own images, from an .npz file or from a folder of pictures with a sub-folder a class."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data import npz
from data.facts import Array, DataError, DatasetFacts
from data.pictures import (
    LeftOut,
    notes_on,
    picture_files,
    read_pictures,
    resized,
    shape_of_all,
    size_of,
    stamped,
    suffixes,
)
from data.progress import telling
from data.splits import Indices, by_class, count_of, first_of_each
from data.stored import Images, InFile

TEST_SHARE = 6  # without test images, every sixth labelled one of a class is held out as the test part
UNLABELLED = "unlabelled"  # the sub-folder of images without a label, and how others write it
SPELLINGS = {
    UNLABELLED,
    "unlabeled",
    "nolabel",
    "nolabels",
    "notlabelled",
    "notlabeled",
    "withoutlabel",
    "withoutlabels",
}
SPELLINGS |= {f"{name}{what}" for name in (UNLABELLED, "unlabeled") for what in ("data", "images", "pictures")}
TO_TRAIN = {"train", "training", "labelled", "labeled"}
PARTS = TO_TRAIN | {"test", "testing", "val", "valid", "validation", "dev"}
LARGEST_SIDE = 256  # pixels; networks of larger images are chosen with open eyes, as they take all memory
BLACK = 16  # of 255: images without a brighter pixel have another range
WANTED = (
    "data=arrays needs data.path, an .npz file with images (uint8 [N, H, W] or [N, C, H, W]) and labels "
    "(integers [N], -1 without a label), or a folder with a sub-folder of pictures for each class"
)


def facts(
    path: str | None, num_test: float | None = None, resize: str | None = None, needs_labels: bool = True
) -> DatasetFacts:
    """What is known without reading the pixels: from the headers and the labels. Raises DataError.

    Images without any label are refused, or, if not `needs_labels`, have 0 classes.
    """
    file = _found(path)
    if _has_pictures(file):
        files, labels = _listed(file, needs_labels=needs_labels)
        shape, test_labels, names = shape_of_all(stamped(files), resize)[0], None, _names(file, needs_labels)
    else:
        shape, labels, test_labels = npz.read_labels(file, needs_labels)
        shape, names = (shape[0], *size_of(resize)) if resize else shape, ()
    if not resize and max(shape[1:]) > LARGEST_SIDE:
        size = "x".join(map(str, shape[1:]))
        raise DataError(
            f"{file} has images of {size} pixels (height x width): data.resize=64x64 brings them to a size that "
            f"trains, and data.resize={size} leaves them as they are"
        )
    num_classes = _check_classes(labels, str(file), needs_labels)
    names = names or npz.read_names(file, num_classes)
    rows, test = parts(labels, num_classes, test_labels is not None, num_test, str(file))
    sizes = np.bincount(labels[rows] + 1, minlength=num_classes + 1).tolist()
    return DatasetFacts(
        len(rows),
        num_classes,
        shape,
        sizes[0],
        class_names=names,
        class_sizes=tuple(sizes[1:]),
        is_binary=not _has_pictures(file) and resize is None and npz.is_bool(file),
        held_out=len(test),
    )


def load(
    path: str | None,
    part: str,
    num_test: float | None = None,
    resize: str | None = None,
    mapped: bool = False,
    needs_labels: bool = True,
) -> Images:
    """The `train` or `test` part, and a digest of all pixels and labels. Raises DataError.

    With `mapped` the images stay in their file, where it is one that lets them: .npy, or .npz without compression.
    Images without any label are refused, or, if not `needs_labels`, have 0 classes.
    """
    file = _found(path)
    test: tuple[Array | InFile, Indices] | None = None
    images: Array | InFile
    inside: tuple[str, ...] = ()
    if _has_pictures(file):
        left_out = LeftOut()
        files, labels = _listed(file, left_out, needs_labels)
        shape, deep, moving = shape_of_all(stamped(files), resize)
        are_deep = deep == len(files)
        images, names = read_pictures(files, shape, resize is not None), _names(file, needs_labels)
        notes, inside = (
            _notes(file, left_out, deep, moving, needs_labels),
            tuple(path.relative_to(file).as_posix() for path in files),
        )
    else:
        _, labels, test_labels = npz.read_labels(file, needs_labels)
        are_deep = npz.is_deep(file)
        images, notes = _arrays(file, "images", resize, mapped)
        names = ()
        if test_labels is not None:
            test_images, more = _arrays(file, "test_images", resize, mapped)
            test, notes = (test_images, test_labels), notes + more
    num_classes = _check_classes(labels, str(file), needs_labels)
    names = names or npz.read_names(file, num_classes)
    digest = _checked_digest(file, images, labels, test, resize, are_deep)
    whole = Images(images, labels, num_classes, digest, names, notes, {"data.path": digest})
    rows = parts(labels, num_classes, bool(test), num_test, str(file))
    if test and part == "test":
        return replace(whole, images=test[0], labels=test[1], part="test")
    chosen = rows[part == "test"]
    inside = tuple(inside[row] for row in chosen) if inside else ()
    chosen_images = images.of(chosen) if isinstance(images, InFile) else images[chosen]
    return replace(whole, images=chosen_images, labels=labels[chosen], files=inside, rows=chosen)


def _has_pictures(file: Path) -> bool:
    return file.is_dir() and not npz.is_one(file)


def _arrays(file: Path, key: str, resize: str | None, mapped: bool) -> tuple[Array | InFile, tuple[str, ...]]:
    """Images, in their file if they are to be `mapped` and can be, and sentences on what was made of them."""
    size = size_of(resize) if resize else None
    if mapped and (there := npz.map_images(file, key)):
        images, notes = there
        as_pixels = images.as_pixels
        return (replace(images, as_pixels=lambda rows: resized(as_pixels(rows), size)) if size else images), notes
    in_memory, notes = npz.read_images(file, key)
    return (resized(in_memory, size) if size else in_memory), notes


def parts(
    labels: Indices, num_classes: int, has_test: bool, num_test: float | None, where: str
) -> tuple[Indices, Indices]:
    """The rows of the training and the test part, each sorted. Raises DataError.

    Without test images in the file, `num_test` labelled ones are the test part, a number or a fraction of the labelled,
    by class in proportion; if None, a sixth of each class, at least one. Each class keeps a labelled image. Where no
    image has a label (0 classes) they are drawn over all. They are drawn by a generator of their own, so that they are
    the same whatever data.split_seed is.
    """
    are_labelled = num_classes > 0
    if not are_labelled:
        labels, num_classes = np.zeros_like(labels), 1
    everything = np.arange(len(labels))
    if has_test:
        if num_test is not None:
            raise DataError(
                f"data.num_test must be null where the file has test_images, as {where} has, got {num_test}"
            )
        return everything, everything[:0]
    sizes = np.bincount(labels[labels >= 0], minlength=num_classes)
    if num_test is None:
        numbers = np.minimum(np.maximum(1, sizes // TEST_SHARE), sizes - 1)
    else:
        try:
            numbers = by_class(sizes, count_of("data.num_test", num_test, int(sizes.sum())))
        except ValueError as error:
            reason = f" with a label: {error}" if are_labelled else f": at most {sizes.sum() - 1}"
            raise DataError(
                f"data.num_test={num_test} is too many for the {sizes.sum()} images of {where}{reason}"
            ) from error
    order = np.random.default_rng(0).permutation(len(labels))
    test = np.sort(first_of_each(order, labels, numbers))
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


def _check_classes(labels: Indices, where: str, needs_labels: bool) -> int:
    """The number of classes, each of which has an image; 0 where no image has a label, if it may. Raises DataError."""
    there = np.unique(labels[labels >= 0])
    if not len(there) and not needs_labels:
        return 0
    if len(there) < 2:
        raise DataError(f"{where}: labels must have at least 2 classes, got {len(there)}")
    if len(there) <= there[-1]:
        missing = int(np.argmax(there != np.arange(len(there))))
        raise DataError(
            f"{where}: labels must be the classes 0 to {there[-1]} without a gap, as the highest is {there[-1]}, "
            f"got no image of class {missing}" + ("" if needs_labels else "; this model needs none: leave them out")
        )
    return len(there)


def _checked_digest(
    file: Path,
    images: Array | InFile,
    labels: Indices,
    test: tuple[Array | InFile, Indices] | None,
    resize: str | None,
    are_deep: bool,
) -> str:
    """SHA-256 over shapes and contents; images in a file are read once a process, as long as the file has its stamp."""
    inside = [path for path in (file, file / "images.npy", file / "test_images.npy") if path.is_file()]
    stamp = (
        str(file),
        resize,
        *((path.stat().st_mtime_ns, path.stat().st_size, path.stat().st_ino) for path in inside),
    )
    in_file = isinstance(images, InFile) and (test is None or isinstance(test[0], InFile))
    digest = _digests.get(stamp) if in_file else None
    if digest is None:
        whole = hashlib.sha256()
        for key, pixels, classes in [("images", images, labels), *([("test_images", *test)] if test else [])]:
            _read_through(file, key, pixels, are_deep, whole)
            whole.update(str(classes.shape).encode())
            whole.update(np.ascontiguousarray(classes).data)
        digest = whole.hexdigest()
        if in_file:
            _digests[stamp] = digest
    return digest


_digests: dict[tuple[object, ...], str] = {}


def _shown(images: InFile, what: str) -> Iterator[Array]:
    """All images block by block, and how far that is where it takes long."""
    with telling(what, "images", len(images)) as tell:
        for block in images.blocks():
            yield block
            tell(len(block))


def _read_through(file: Path, key: str, images: Array | InFile, are_deep: bool, digest: Any) -> None:
    """Takes images into a digest. Raises DataError if all are the same, or all but black as grey levels of 0 to 255."""
    what = f"the pictures in {file}" if _has_pictures(file) else f"{file}: {key}"
    brightest, first, are_same = 0, images[:1], True
    digest.update(str(images.shape).encode())
    for block in _shown(images, what) if isinstance(images, InFile) else [images]:
        digest.update(np.ascontiguousarray(block).data)
        brightest = max(brightest, int(block.max()))
        are_same = are_same and all(np.array_equal(image, first[0]) for image in block)
    if are_deep and brightest <= BLACK:
        raise DataError(
            f"{what} have 16 bits, of which the higher 8 are read, and none of those is above {brightest}: black; "
            f"give 8 bits of each pixel as uint8, such as ({key} * (255 / {key}.max())).astype('uint8')"
        )
    if len(images) > 1 and are_same:
        raise DataError(f"{what} are all the same, pixel by pixel; look at them")
    if brightest <= BLACK:
        scaled = f"{key} * {255 // max(1, brightest)}"
        way_on = f"write {scaled}" + (" or bool" if brightest == 1 else "")
        if _has_pictures(file):
            way_on = f"write them brighter, or give an .npz file with {scaled}"
        raise DataError(f"{what} must be grey levels of 0 to 255, got none above {brightest}, which is black; {way_on}")


# ---- folders ----


def _listed(folder: Path, left_out: LeftOut | None = None, needs_labels: bool = True) -> tuple[list[Path], Indices]:
    """The picture files, sub-folder by sub-folder in the order of their names, and their labels."""
    left_out = LeftOut() if left_out is None else left_out
    classes, unlabelled = _sub_folders(folder, left_out, needs_labels)
    files: list[Path] = []
    labels: list[int] = []
    read: dict[Path, set[str]] = {}  # the folders in each
    for path in sorted([*classes, *unlabelled]):
        of_this, within = LeftOut(), set[str]()
        own = list(picture_files(path, of_this, within))
        for other, places in read.items():
            if twice := places & within:
                raise DataError(f"{min(twice)} is within {path} and within {other}, by a link; remove one of the two")
        read[path] = within
        if not own and path in classes:
            rest = of_this.sentence(path)
            raise DataError(
                f"{path} must have pictures in a format that Pillow reads, as each sub-folder is a class, got none"
                + (f" ({rest})" if rest else "")
            )
        if path in classes:
            _check_labelled(path, own)
        left_out.update(of_this)
        files += own
        labels += [classes.index(path) if path in classes else -1] * len(own)
    if not files:
        raise DataError(f"{folder} must have pictures in a format that Pillow reads, in it or below, got none")
    return files, np.array(labels, dtype=np.int64)


def _check_labelled(folder: Path, files: list[Path]) -> None:
    """Raises DataError where a class has a folder within that is called as images without a label are."""
    for place in sorted({above for file in files for above in file.parents if folder in above.parents}):
        if _means_unlabelled(place):
            raise DataError(
                f"{place} is within the class {folder.name}, whose label its pictures would have; move it beside the "
                "class folders, or call it something else"
            )


def _names(folder: Path, needs_labels: bool) -> tuple[str, ...]:
    return tuple(path.name for path in _sub_folders(folder, LeftOut(), needs_labels)[0])


def _sub_folders(folder: Path, left_out: LeftOut, needs_labels: bool) -> tuple[list[Path], list[Path]]:
    """Those of the classes, and those of images without a label. Raises DataError.

    One of fewer than two classes has no labels: it is refused, or, if not `needs_labels`, all in it is without a label.
    """
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"cannot read the folder {folder} ({error.strerror}); mend that, or set data.path") from error
    classes: list[Path] = []
    unlabelled: list[Path] = []
    beside = LeftOut()
    for path in inside:
        if path.name.startswith("."):
            beside.add("hidden", str(path))
        elif not path.is_dir():
            is_picture = path.suffix.lower() in suffixes()
            beside.add(
                "beside the class folders" if is_picture else path.suffix.lower() or "without a suffix", str(path)
            )
        else:
            (unlabelled if _means_unlabelled(path) else classes).append(path)
    if classes and all(path.name.casefold() in PARTS for path in classes):
        names = ", ".join(path.name for path in classes)
        to_train = next((f", such as data.path={path}" for path in classes if path.name.casefold() in TO_TRAIN), "")
        raise DataError(
            f"{folder} must have a sub-folder of pictures for each class, got {names}, which are names of parts; give "
            f"the folder that has the classes{to_train}"
        )
    if foreign := [path for path in classes if any("\ud800" <= letter <= "\udfff" for letter in path.name)]:
        raise DataError(f"{foreign[0]} must have a name in UTF-8, which names its class; give that folder another")
    twice = [path for path in classes if any(path.samefile(other) for other in classes if other < path)]
    if twice:
        raise DataError(f"{twice[0]} is a link to another class of {folder}; remove one of the two")
    if len(classes) < 2 and not needs_labels:
        return [], [folder]
    if len(classes) < 2:
        got = ", ".join(path.name for path in classes) or "none"
        raise DataError(f"{folder} must have a sub-folder of pictures for each of 2 or more classes, got {got}")
    left_out.update(beside)
    return classes, unlabelled


def _means_unlabelled(path: Path) -> bool:
    """Raises DataError for a name that may be a slip of the pen."""
    name = re.sub("[^a-z]", "", path.name.casefold())
    if name in SPELLINGS:
        return True
    has_the_word = re.search("unlabel|nolabel|notlabel|withoutlabel", name)
    if has_the_word or (name.startswith("un") and difflib.get_close_matches(name, SPELLINGS, cutoff=0.85)):
        raise DataError(
            f"{path} may be a class, or the images without a label; call it {UNLABELLED} for these, or give the class "
            "a name that is less like it"
        )
    return False


def _notes(folder: Path, left_out: LeftOut, deep: int, moving: int, needs_labels: bool) -> tuple[str, ...]:
    """What a person should know of how a folder was read."""
    unlabelled = _sub_folders(folder, LeftOut(), needs_labels)[1]
    others = [path.name for path in unlabelled if path.name != UNLABELLED]
    notes = [left_out.sentence(folder)] if left_out.counts else []
    if unlabelled == [folder]:
        notes.append(f"all pictures in {folder} and below are taken as those without a label")
    elif others:
        notes.append(f"the pictures in {' and in '.join(others)} of {folder} are taken as those without a label")
    return (*notes, *notes_on(folder, deep, moving))
