"""TensorBoard: scalars under the tags that the README lists, pictures, and the HParams tab."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.batches import EvaluationData, binarize
from data.randomness import keyed_generator
from models.vae import SemiSupervisedVAE
from training.pictures import generated, grid, reconstructions

HPARAM_METRICS = ("val/accuracy", "val/bound", "test/accuracy", "test/bound", "test/log_likelihood")


class TensorBoard:
    """Writes a run's events; after a resume, what was logged past `start` is dropped."""

    def __init__(self, folder: Path, start: int, hyper_parameters: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.writer = SummaryWriter(str(folder), purge_step=start + 1)  # the first step to drop
        plain = (int, float, str, bool)
        flat = {key: value if isinstance(value, plain) else str(value) for key, value in hyper_parameters.items()}
        # written into the run's own folder: add_hparams would make a second run of it
        for summary in hparams(flat, dict.fromkeys(HPARAM_METRICS, 0.0)):
            self.writer._get_file_writer().add_summary(summary)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def text(self, tag: str, text: str) -> None:
        self.writer.add_text(tag, text)

    def pictures(self, model: SemiSupervisedVAE, data: EvaluationData, binarization: Any, step: int) -> None:
        """Held-out images above their reconstructions, and generated images, a row a class, a column a style."""
        generator = keyed_generator(data.x.device, 0, "pictures")
        images = binarize(data.x[:10], binarization, generator)
        self.writer.add_image("reconstructions", grid(reconstructions(model, images), columns=10), step)
        self.writer.add_image("generated", grid(generated(model, images.shape[1:], generator), columns=10), step)

    def close(self) -> None:
        self.writer.close()
