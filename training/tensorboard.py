"""TensorBoard: scalars under the tags of docs/measuring.md, pictures, the projector, and the HParams tab."""

from __future__ import annotations

import colorsys
import io
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.batches import EvaluationData, binarize
from data.randomness import keyed_generator
from models.contract import Model, PerImage
from models.evaluation import evaluating, rows_at_once
from models.pictures import grid
from training.charts import confusion, draw_calibration, draw_confusion, draw_mistakes, worst_mistakes
from training.checkpoints import write_atomically
from training.pictures import save_png
from training.run_folder import EVENTS

# J and validation accuracy, or what stands for it, once more, before all other tags, which TensorBoard sorts by letters
FIRST = "Overview"
# what the custom scalars tab shows of every family of models: {section: {chart: tags}}
LAYOUT = {
    "Objective (nats per image)": {
        "J": ["train/J"],
    },
    "Bound by data (nats per image)": {
        "bound": ["val/bound", "test/bound"],
    },
    "Accuracy": {},  # the place of what a model that tells classes has there
    "Temperature and entropy": {"temperature, and entropy of q(y|x) in nats": ["train/temperature", "train/entropy_y"]},
    "Speed": {"steps per second": ["train/steps_per_second"]},
    "Alarms (1 is up)": {
        "alarms": ["warning/gradient_exploded", "warning/bound_fell"],
        "gradient norm": ["train/gradient_norm"],
    },
}
Layout = Mapping[str, Mapping[str, Sequence[str]]]
LAYOUT_TAG, HEAD = b"custom_scalars__config__", 100_000  # the layout is among an event file's first bytes
MOST_CLASSES = 40  # in the confusion matrix
PROJECTED = 1000  # images in the projector
PROJECTOR = "projector"  # the folder of its files
PROJECTOR_CONFIG = """embeddings {{
  tensor_name: "{embedding}"
  tensor_path: "projector/z.tsv"
  metadata_path: "projector/classes.tsv"
  sprite {{
    image_path: "projector/images.png"
    single_image_dim: {width}
    single_image_dim: {height}
  }}
}}
"""


class TensorBoard:
    """Writes a run's events; after a resume, what was logged past `start` is dropped.

    With `logged`, the scalars of `start` itself, all of that step is dropped and they are written anew: the process
    before this one may have got as far as a part of what else belongs to that step.
    """

    def __init__(
        self,
        folder: Path,
        start: int,
        hyper_parameters: dict[str, Any],
        charts: Layout | None = None,
        logged: dict[str, float] | None = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        laid_out = has_layout(folder)
        first_to_drop = start + (logged is None)
        wait_for_a_name_that_sorts_last(folder)
        self.writer = SummaryWriter(str(folder), purge_step=first_to_drop)
        self.newest_step = start
        self.newest: dict[str, float] = {}  # scalars of the step last written of
        # written beside the scalars: add_hparams would make a second run of it. Without the list of columns, the first
        # of these: TensorBoard takes that of one run for all, and else finds those in which its runs differ
        for summary in hparams(hyper_parameters, {})[1:]:
            self.writer._get_file_writer().add_summary(summary)
        if not laid_out:
            self.writer.add_custom_scalars(laid(LAYOUT, charts or {}))
        self.scalars(logged or {}, start)

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.newest = (self.newest if step == self.newest_step else {}) | values
        self.newest_step = step
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def text(self, tag: str, text: str, step: int | None = None) -> None:
        self.writer.add_text(tag, text, step)

    def pictures(self, model: Model, data: EvaluationData, binarization: Any, seen: PerImage | None, step: int) -> None:
        """What the model makes of the first held-out images and of its latents."""
        generator = keyed_generator(data.x.device, 0, "pictures")
        images = binarize(data.x[:10], binarization, generator)
        with evaluating(model):
            for tag, picture in model.pictures(images, generator, seen).items():
                self.writer.add_image(tag, picture, step)

    def predictions(self, told: Tensor, data: EvaluationData, names: Sequence[str], step: int) -> None:
        """What probabilities [N, K] say of held-out images: the confusion matrix, the worst mistakes, calibration."""
        if told.shape[-1] <= MOST_CLASSES:
            self.writer.add_image("confusion_matrix", draw_confusion(confusion(told, data.labels), names), step)
        mistakes = draw_mistakes(data.x, worst_mistakes(told, data.labels, 20), names)
        self.writer.add_image("worst_mistakes", mistakes, step)
        self.writer.add_image("calibration", draw_calibration(told, data.labels), step)

    def project(self, model: Model, data: EvaluationData, binarization: Any, names: Sequence[str]) -> None:
        """Writes the projector's files anew: points of the first held-out images, with true class and that by q(y|x).

        add_embedding would leave a folder for each step, and forget the others when the run is resumed.
        """
        number = min(PROJECTED, rows_at_once(math.prod(data.x.shape[1:])))
        images, labels = data.x[:number], data.labels[:number].tolist()
        x = binarize(images, binarization, keyed_generator(images.device, 0, "projector"))
        z, predicted = embedded(model, x)
        files = self.folder / PROJECTOR
        files.mkdir(exist_ok=True)
        points = ("\t".join(f"{value:.5g}" for value in row) for row in z.tolist())
        words = [" ".join(name.split()) for name in names]  # a tab would be another column
        unknown = "" if model.has_labels else "unknown"  # TensorBoard would leave out a line of nothing
        classes = [words[label] if label >= 0 else unknown for label in labels]
        if predicted is not None:
            guesses = [words[guess] for guess in predicted.tolist()]
            classes = ["class\tpredicted", *(f"{true}\t{guess}" for true, guess in zip(classes, guesses, strict=True))]
        write_atomically(files / "z.tsv", "".join(f"{row}\n" for row in points).encode())
        write_atomically(files / "classes.tsv", "".join(f"{row}\n" for row in classes).encode())
        side = math.ceil(len(images) ** 0.5)
        tiles = coloured_by_class(images.float().cpu() / 255, data.labels[:number].cpu(), len(names))
        spare = torch.full((side**2 - len(images), *tiles.shape[1:]), 0.5)  # the projector takes a square
        sprite = io.BytesIO()
        save_png(grid(torch.cat([tiles, spare]), columns=side, gap=0), sprite, 1)
        write_atomically(files / "images.png", sprite.getvalue())
        height, width = tiles.shape[2:]
        config = PROJECTOR_CONFIG.format(embedding=model.embedding, width=width, height=height)
        write_atomically(self.folder / "projector_config.pbtxt", config.encode())

    def close(self) -> None:
        self.writer.close()


def laid(layout: Layout, more: Layout) -> dict[str, Any]:
    """A layout as SummaryWriter takes it, each section with more of its charts, or more tags of a chart; none empty."""
    sections: dict[str, Any] = {}
    for section in [*layout, *(other for other in more if other not in layout)]:
        charts = {chart: list(tags) for chart, tags in layout.get(section, {}).items()}
        for chart, tags in more.get(section, {}).items():
            charts[chart] = charts.get(chart, []) + list(tags)
        sections[section] = {chart: ["Multiline", tags] for chart, tags in charts.items()}
    return {section: charts for section, charts in sections.items() if charts}


def wait_for_a_name_that_sorts_last(folder: Path) -> None:
    """TensorBoard reads event files by name: by the second, then by the process, whose number may be lower than before.

    It would read what an earlier process wrote last, and drop what came after it as steps that were undone.
    """
    seconds = (path.name.removeprefix(EVENTS.rstrip("*")).partition(".")[0] for path in folder.glob(EVENTS))
    newest = max((int(second) for second in seconds if second.isdigit()), default=0)
    time.sleep(min(max(newest + 1 - time.time(), 0.0), 1.0))


def has_layout(folder: Path) -> bool:
    """Whether a run has its layout already: a second one, from a resumed run, would lie beside it."""
    for path in sorted(folder.glob(EVENTS)):  # all, or the folder stays open
        with path.open("rb") as file:
            if LAYOUT_TAG in file.read(HEAD):
                return True
    return False


def coloured_by_class(images: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Images [N, C, H, W] in [0, 1] in the colours of their classes, [N, 3, H', W'].

    The projector opens without a colouring, and cannot be told another; but it shows the images' own colours. Black
    becomes the class's colour, and colour images have a frame of it; grey is an unknown class, labelled -1.
    """
    of_classes = [colorsys.hsv_to_rgb(k / num_classes, 1 - k % 2 / 3, 0.85) for k in range(num_classes)]
    colours = torch.tensor([*of_classes, (0.5, 0.5, 0.5)])
    ground = colours[labels].view(-1, 3, 1, 1)
    if images.shape[1] == 3:
        width = max(2, images.shape[-1] // 10)
        framed = ground.expand(-1, -1, images.shape[2] + 2 * width, images.shape[3] + 2 * width).clone()
        framed[:, :, width:-width, width:-width] = images
        return framed
    return ground + (1 - ground) * images.mean(dim=1, keepdim=True)


def embedded(model: Model, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The model's point [B, E] for each image x [B, C, H, W], and the class [B] that it tells, if it does."""
    with evaluating(model):
        parts = [(model.embed(images, q := model.posterior(images)), q) for images in x.split(250)]
    predicted = torch.cat([q for _, q in parts]).argmax(dim=-1) if model.has_labels else None
    return torch.cat([points for points, _ in parts]), predicted
