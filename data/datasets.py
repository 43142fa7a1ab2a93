"""Labelled image datasets by name: the published ones, read here, and a person's own."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import math
import struct
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data.facts import Array, DataError, DatasetFacts
from data.folders import made
from data.stored import Images

# as their publishers name them (Xiao et al. 2017; Clanuwat et al. 2018)
FASHION = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
KUZUSHIJI = "o,ki,su,tsu,na,ha,ma,ya,re,wo"
DATASETS = {
    "mnist": DatasetFacts(60_000, 10, (1, 28, 28), folder="MNIST", source="MNIST"),
    "fashion_mnist": DatasetFacts(
        60_000, 10, (1, 28, 28), folder="FashionMNIST", source="FashionMNIST", class_names=tuple(FASHION.split(","))
    ),
    "kmnist": DatasetFacts(
        60_000, 10, (1, 28, 28), folder="KMNIST", source="KMNIST", class_names=tuple(KUZUSHIJI.split(","))
    ),
    "digits": DatasetFacts(1_437, 10, (1, 8, 8)),
}
OWN = "arrays"  # a person's own images, whose facts are in their file
NAMES = (*DATASETS, OWN)
RANDOM_LABELS = 5  # the seed that draws them
DIGITS_TEST_IMAGES = 360  # the last writers of the file, so that test digits come from hands not seen in training
# of the files as they are published; of the unpacked ones where they are known
MD5 = {
    "mnist": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    "fashion_mnist": {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    "kmnist": {
        "train-images-idx3-ubyte.gz": "bdb82020997e1d708af4cf47b453dcf7",
        "train-labels-idx1-ubyte.gz": "e144d726b3acfaa3e44228e80efcd344",
        "t10k-images-idx3-ubyte.gz": "5c965bf0a639b31b8f53240b1b52f4d7",
        "t10k-labels-idx1-ubyte.gz": "7320c461ea6c1c855c0b718fb2a4b134",
    },
}
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def facts(
    name: str,
    path: str | None,
    random_classes: int | None = None,
    *,
    num_test: float | None = None,
    resize: str | None = None,
    needs_labels: bool = True,
) -> DatasetFacts:
    """The facts of a dataset; those of data=arrays are read from `path`, without its pixels. Raises DataError.

    Images of one's own without any label are refused, or, if not `needs_labels`, have 0 classes.
    """
    if random_classes is not None:
        known = facts(name, path, num_test=num_test, resize=resize, needs_labels=needs_labels)
        return replace(known, num_classes=random_classes, class_names=(), class_sizes=())
    if name == OWN:
        from data import arrays

        return arrays.facts(path, num_test, resize, needs_labels)
    return DATASETS[name]


def load(
    name: str,
    root: str,
    part: str,
    checksum: bool = True,
    path: str | None = None,
    random_classes: int | None = None,
    *,
    num_test: float | None = None,
    resize: str | None = None,
    mapped: bool = False,
    needs_labels: bool = True,
) -> Images:
    """The `train` or `test` part of a dataset; torchvision downloads it on first use.

    With `mapped`, images of data=arrays stay in their file if that can be; without any label they are refused, or, if
    not `needs_labels`, have 0 classes.
    With `checksum`, files other than those published are refused. With `random_classes` = K every known label is
    replaced by one of 0..K-1 at random, the same each time: for timing (Jang et al. 2017, figure 5). Raises DataError.
    """
    if random_classes is not None:
        how: dict[str, Any] = {"num_test": num_test, "resize": resize, "mapped": mapped, "needs_labels": needs_labels}
        source = load(name, root, part, checksum, path, **how)
        drawn = np.random.default_rng(RANDOM_LABELS).integers(random_classes, size=len(source.labels))
        return replace(
            source, labels=np.where(source.labels < 0, -1, drawn), num_classes=random_classes, class_names=()
        )
    if name == OWN:
        from data import arrays

        return arrays.load(path, part, num_test, resize, mapped, needs_labels)
    if name == "digits":
        return _load_digits(part)
    folder = _at_home(root)
    raw = folder / DATASETS[name].folder / "raw"
    if not all(_stored(raw / file, {}) for file in FILES[part]):
        _download(name, folder)
    md5 = MD5[name] if checksum else {}
    contents = _contents(raw)
    paths = [_stored(raw / file, md5) or raw / file for file in FILES[part]]
    images, labels = (_read_idx(path, md5.get(path.name)) for path in paths)
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise DataError(f"{paths[0]} and {paths[1]} do not belong together; delete {raw} to download it again")
    num_classes, highest = DATASETS[name].num_classes, labels.max(initial=0)
    if highest >= num_classes:
        raise DataError(
            f"{paths[1]} has the label {highest}, and data={name} has {num_classes} classes; "
            f"delete {raw} to download it again"
        )
    names = DATASETS[name].class_names
    return Images(
        images[:, None], labels.astype(np.int64), num_classes, class_names=names, contents=contents, part=part
    )


def _contents(raw: Path) -> dict[str, str]:
    """SHA-256 of each file that is there, of both parts: by them a later reading is known to be of the same data."""
    there = [file for part in FILES.values() for name in part if (file := _stored(raw / name, {}))]
    contents = {}
    for file in there:
        with file.open("rb") as stream:
            contents[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return contents


def _at_home(root: str) -> Path:
    try:
        return Path(root).expanduser()
    except RuntimeError as error:  # nobody's home: no HOME, and no such user
        reason = f"data.root must be a folder, got {root}, and there is no home folder here"
        raise DataError(f"{reason}; set data.root or CATVAE_DATA, or try data=digits") from error


def _load_digits(part: str) -> Images:
    package = importlib.util.find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    file = Path(package.origin).parent / "datasets/data/digits.csv.gz"  # importing scikit-learn takes over a second
    pixels, labels = np.split(np.loadtxt(file, delimiter=",", dtype=np.int64), [64], axis=1)
    images = np.rint(pixels.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = labels[:, 0]
    rows = slice(-DIGITS_TEST_IMAGES) if part == "train" else slice(-DIGITS_TEST_IMAGES, None)
    return Images(images[rows], labels[rows], 10, part=part)


def _stored(path: Path, md5: dict[str, str]) -> Path | None:
    """The file or its gzipped form, whichever is there; of both, the one whose checksum is known."""
    packed = path.with_name(path.name + ".gz")
    there = [file for file in (path, packed) if file.exists()]
    return max(there, key=lambda file: file.name in md5, default=None)


def _download(name: str, root: Path) -> None:
    """Into a folder of its own, and moved into place file by file: a download that breaks off leaves nothing behind.

    Not even the folders that it made.
    """
    import torchvision.datasets  # seconds to import, and only a download needs it

    folder = Path(DATASETS[name].folder, "raw")
    try:
        with made(root), tempfile.TemporaryDirectory(prefix="download-", dir=root) as own:
            getattr(torchvision.datasets, DATASETS[name].source)(own, download=True)
            with made(root / folder):
                for file in sorted(Path(own, folder).iterdir()):
                    file.replace(root / folder / file.name)
    except (RuntimeError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip("<>")  # torchvision's last attempt
        raise DataError(
            f"data={name} is not in {root} and could not be downloaded ({reason}); "
            f"put its files into {root / DATASETS[name].folder / 'raw'}, "
            "set data.root or CATVAE_DATA to where they are, "
            "or try data=digits, which needs no download"
        ) from error


def _read_idx(file: Path, md5: str | None) -> Array:
    """An unsigned-byte IDX file, plain or gzipped, as an array; other bytes than `md5` tells of are refused."""
    try:
        content = file.read_bytes()
        if md5 and hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            raise DataError(
                f"{file} is not the published file: its checksum differs; delete it to download it again, "
                "or set data.checksum=false to use it as it is"
            )
        if file.suffix == ".gz":
            content = gzip.decompress(content)
        zero, kind, rank = struct.unpack_from(">HBB", content)
        if zero != 0 or kind != 8:
            raise DataError(f"{file} is not an IDX file of unsigned bytes; delete it to download it again")
        shape = struct.unpack_from(f">{rank}I", content, 4)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise DataError(f"cannot read {file} ({error}); delete it to download it again") from error
    header = 4 + 4 * rank
    expected = math.prod(shape)
    if len(content) - header != expected:
        raise DataError(
            f"{file} is damaged: {len(content) - header} bytes of data where its header promises {expected}; "
            "delete it to download it again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape).copy()
