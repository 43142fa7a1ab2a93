"""Writes what the model of a run folder says of images, a row an image, as a .csv file.

INPUT is a folder of pictures (all below it), one picture, an .npz file with `images` or a folder with images.npy, or a
part of the run's own data: unlabelled (without the labelled ones), val or test. Only a part needs that data; `./test`
is a folder of that name. Columns:

file or index       the picture below the folder; or the row in the array of the file; of a published data set, in its
                    training or test images
class, probability  the most probable class by its name, and its probability; then the second one
entropy             of these probabilities, in nats: how unsure the model is which class it is
bound               the lower bound of log p(x), in nats: how well the model knows such an image
novelty             the share of the validation images whose bound is higher: near 1 is an image of nothing known;
                    empty for a checkpoint that was not validated
p_NAME              the probability of each class: q(y|x), or what evaluation.classify_by of the run says

uv run python -m scripts.predict outputs/DATE/TIME-NAME FOLDER --output predictions.csv
uv run python -m scripts.predict outputs/DATE/TIME-NAME unlabelled --sort doubt --sheet doubtful.png
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import io
import math
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from configs.schema import ConfigError
from configs.trust import add_trust
from scripts.command import add_data_path, apart, positive, refusing_bad_input, writable

if TYPE_CHECKING:
    from torch import Tensor

    from data.facts import Array
    from data.splits import Indices
    from training.trained import Prediction, Trained

PARTS = ("unlabelled", "val", "test")
OUTPUTS = {"--output": ".csv", "--sheet": ".png", "--embeddings": ".npz"}
ON_SHEET = 60  # images
MANY = 100_000  # images, from which on memory should not grow by any of them
Chunks = Iterator[tuple[list[str], "Array"]]


class Table:
    """The .csv file's rows as they come, in a temporary file, from where `write` puts them in order.

    Of a row, memory keeps where it ends and how doubtful it is.
    """

    def __init__(self, rows: IO[bytes], column: str, class_names: Sequence[str]) -> None:
        self.rows = rows
        self.ends: list[Any] = []
        self.doubts: list[Any] = []
        columns = ("class", "probability", "second_class", "second_probability", "entropy", "bound", "novelty")
        self.names = class_names
        self.header = as_line([column, *columns, *(f"p_{name}" for name in class_names)])

    def add(self, names: list[str], prediction: Prediction, entropy: Tensor) -> None:
        import numpy as np

        values, classes = prediction.q.topk(2, dim=-1)
        measured = zip(
            *(column.tolist() for column in (values, classes, entropy, prediction.bound, prediction.novelty)),
            prediction.q.tolist(),
            strict=True,
        )
        lines = []
        for name, ((first, second), (k, j), doubt, bound, novelty, q) in zip(names, measured, strict=True):
            novel = "" if math.isnan(novelty) else f"{novelty:.4f}"
            best = [self.names[k], f"{first:.6g}", self.names[j], f"{second:.6g}"]
            lines.append(as_line([name, *best, f"{doubt:.6g}", f"{bound:.6g}", novel, *(f"{p:.6g}" for p in q)]))
        self.ends.append(self.rows.tell() + np.cumsum([len(line) for line in lines]))
        self.doubts.append(entropy.numpy())
        self.rows.write(b"".join(lines))

    def order(self, by_doubt: bool) -> Indices | None:
        """The rows, the most doubtful first; None as they came."""
        import numpy as np

        return np.argsort(-np.concatenate(self.doubts), kind="stable") if by_doubt else None

    def write(self, file: IO[bytes], order: Indices | None) -> None:
        import numpy as np

        file.write(self.header)
        self.rows.seek(0)
        if order is None:
            shutil.copyfileobj(self.rows, file)
            return
        ends = np.concatenate([[0], *self.ends])
        for row in order:
            self.rows.seek(ends[row])
            file.write(self.rows.read(ends[row + 1] - ends[row]))


class Embeddings:
    """z [N, Z] and q [N, K] of all images in temporary files, from where `write` makes an .npz file of them."""

    def __init__(self, z: IO[bytes], q: IO[bytes]) -> None:
        self.parts = {"z": z, "q": q}
        self.number = 0

    def add(self, prediction: Prediction) -> None:
        self.number += len(prediction.q)
        for name, file in self.parts.items():
            file.write(getattr(prediction, name).numpy().tobytes())

    def write(self, file: IO[bytes], order: Indices | None) -> None:
        import numpy as np

        with zipfile.ZipFile(file, "w") as archive:
            for name, stored in self.parts.items():
                stored.flush()
                rows = np.memmap(stored, dtype=np.float32, mode="r").reshape(self.number, -1)
                header = {"descr": "<f4", "fortran_order": False, "shape": rows.shape}
                with archive.open(f"{name}.npy", "w", force_zip64=True) as array:
                    np.lib.format.write_array_header_1_0(array, header)
                    for first in range(0, self.number, 4096):
                        part = slice(first, first + 4096)
                        array.write(rows[part if order is None else order[part]].tobytes())


class Doubtful:
    """The images that the model is most in doubt about, of all that were added."""

    def __init__(self) -> None:
        self.images: list[tuple[float, Tensor, str]] = []

    def add(self, names: list[str], images: Array, guesses: list[str], entropy: Tensor) -> None:
        import torch

        for row in entropy.topk(min(ON_SHEET, len(entropy))).indices.tolist():
            pixels = torch.from_numpy(images[row].copy())
            self.images.append((entropy[row].item(), pixels, f"{Path(names[row]).name}\n{guesses[row]}"))
        self.images = sorted(self.images, key=lambda image: -image[0])[:ON_SHEET]

    def write(self, file: IO[bytes]) -> None:
        from training.charts import draw_tiles
        from training.pictures import save_png

        tiles = [(pixels, caption) for _, pixels, caption in self.images]
        title = "the images that the model is most in doubt about: its two guesses"
        save_png(draw_tiles(title, tiles, columns=6, width=110), file, 1)


def as_line(fields: Sequence[str]) -> bytes:
    line = io.StringIO()
    csv.writer(line).writerow(fields)  # with another end of a line, \r in a file's name would not be quoted
    return line.getvalue().removesuffix("\r\n").encode("utf-8", "surrogateescape") + b"\n"


def of_part(arguments: argparse.Namespace, size: int) -> tuple[str, int, Chunks]:
    """What names an image of a part of the run's data, their number, and the images. It reads the data."""
    import numpy as np

    from data.facts import DataError
    from training.saved import stored_run

    part = arguments.input
    run = stored_run(arguments.folder, arguments.checkpoint, arguments.trust, arguments.data_path)
    source = run.load_images("test" if part == "test" else "train")
    rows = np.arange(len(source.images))
    if part != "test":
        rows = run.split.validation if part == "val" else run.rows("unlabelled")
    if not len(rows):
        raise DataError(f"the run has no images in its part {part}")
    places = rows if source.rows is None else source.rows[rows]
    names = [source.files[row] for row in rows] if source.files else [str(row) for row in places.tolist()]
    chunks = (
        (names[first : first + size], source.images[rows[first : first + size]]) for first in range(0, len(rows), size)
    )
    return "file" if source.files else "index", len(rows), chunks


def two_guesses(q: Tensor, names: Sequence[str]) -> list[str]:
    values, classes = q.topk(2, dim=-1)
    pairs = zip(values.tolist(), classes.tolist(), strict=True)
    return [f"{names[k]} {first:.0%}\n{names[j]} {second:.0%}" for (first, second), (k, j) in pairs]


def predict(
    model: Trained, chunks: Chunks, table: Table, embeddings: Embeddings | None, sheet: Doubtful | None
) -> None:
    import torch

    for names, images in chunks:
        prediction = model.predict(images, in_range=True)
        entropy = torch.special.entr(prediction.q).sum(dim=-1)
        table.add(names, prediction, entropy)
        if embeddings:
            embeddings.add(prediction)
        if sheet:
            sheet.add(names, images, two_guesses(prediction.q, model.class_names), entropy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a run folder")
    parser.add_argument("input", help="a folder of pictures, an .npz file, or unlabelled, val or test")
    parser.add_argument("--output", type=Path, default=Path("predictions.csv"), help="the .csv file to write")
    parser.add_argument("--sort", choices=("input", "doubt"), default="input", help="doubt: the highest entropy first")
    parser.add_argument("--sheet", type=Path, help=f"a .png file to draw the {ON_SHEET} most doubtful images in")
    parser.add_argument(
        "--embeddings", type=Path, help="an .npz file for z (mean) and q (p_NAME), rows as in the .csv file"
    )
    parser.add_argument("--checkpoint", type=Path, help="a file in its checkpoints/, or a path; default: the newest")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, or a GPU such as cuda:1 (default: auto)")
    parser.add_argument("--batch-size", type=positive, help="images at once; default: the run's evaluation.batch_size")
    add_data_path(parser)
    add_trust(parser)
    arguments = parser.parse_args()
    with refusing_bad_input():
        for option, place in outputs(arguments).items():
            writable(place, (OUTPUTS[option],), option)
        for sentence in run(arguments):
            print(f"catvae: {sentence}", file=sys.stderr)
        print(arguments.output)


def outputs(arguments: argparse.Namespace) -> dict[str, Path]:
    """The files to write, by the option that names each."""
    named = {option: getattr(arguments, option.removeprefix("--")) for option in OUTPUTS}
    return {option: place for option, place in named.items() if place}


def give_memory_back() -> None:
    """Has glibc give every large block back at once: its own growing limit leaves memory in pieces, 0.3 kB an image.

    That takes a third more time. Other C libraries have no mallopt.
    """
    mmap_threshold = -3  # malloc.h
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(mmap_threshold, 2**19)


def run(arguments: argparse.Namespace) -> list[str]:
    """Predicts, writes the files, whole or not at all, and returns what a person should know."""
    from data.facts import DataError
    from data.inputs import inputs
    from data.progress import progress
    from training.checkpoints import written
    from training.trained import open_run

    model = open_run(arguments.folder, arguments.device, arguments.checkpoint, arguments.trust)
    if not model.model.has_labels:
        raise ConfigError(
            f"{arguments.folder} has a model without classes to predict; in Python, encode and log_likelihood of "
            "training.trained.open_run(FOLDER) say what it makes of images"
        )
    model.batch_size = arguments.batch_size or model.batch_size
    size, found = model.batch_size, None
    source = Path(arguments.input).expanduser()
    own = [*model.own_images, *filter(None, [arguments.data_path])]
    read = own if arguments.input in PARTS else [source, *own]
    apart(outputs(arguments), read, arguments.folder)
    if arguments.input not in PARTS and not source.exists():
        raise DataError(
            f"{arguments.input} must be a folder of pictures or an .npz file, and it does not exist; parts of the "
            f"run's own data are {', '.join(PARTS)}"
        )
    if arguments.input in PARTS:
        column, number, chunks = of_part(arguments, size)
    else:
        found = inputs(source, model.facts.shape, model.facts.resize)
        column, number, chunks = found.column, found.number, found.chunks(size)
    if number > MANY:
        give_memory_back()
    with ExitStack() as stack:

        def temporary(beside: Path) -> IO[bytes]:
            return stack.enter_context(tempfile.TemporaryFile(dir=beside.parent))

        table = Table(temporary(arguments.output), column, model.class_names)
        place, sheet = arguments.embeddings, Doubtful() if arguments.sheet else None
        embeddings = Embeddings(temporary(place), temporary(place)) if place else None
        predict(model, progress(chunks, "prediction", "batches", -(-number // size)), table, embeddings, sheet)
        order = table.order(arguments.sort == "doubt")
        with written(arguments.output) as file:
            table.write(file, order)
        if embeddings:
            with written(place) as file:
                embeddings.write(file, order)
        if sheet:
            with written(arguments.sheet) as file:
                sheet.write(file)
    said = found.said() if found else []
    if not model.has_validation:
        said.append("novelty is empty: the run has no validation images to compare with, as data.num_validation=0")
    elif not len(model.validation_bounds):
        said.append("novelty is empty: this checkpoint was not validated, or is from before that was kept in it")
    return said


if __name__ == "__main__":
    main()
