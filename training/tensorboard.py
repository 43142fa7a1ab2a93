"""TensorBoard: scalars under the tags that the README lists, pictures, and the HParams tab."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.batches import EvaluationData, binarize
from data.randomness import keyed_generator
from models.evaluation import one_hot_classes
from models.vae import SemiSupervisedVAE
from training.pictures import grid

HPARAM_METRICS = ("val/accuracy", "val/bound", "test/accuracy", "test/bound", "test/log_likelihood")


class TensorBoard:
    """Writes a run's events; after a resume, what was logged past `start` is dropped."""

    def __init__(self, folder: Path, start: int, hyper_parameters: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.writer = SummaryWriter(str(folder), purge_step=start if start > 0 else None)
        flat = {key: value if isinstance(value, (int, float, str, bool)) else str(value)
                for key, value in hyper_parameters.items()}  # fmt: skip
        # written into the run's own folder: add_hparams would make a second run of it
        for summary in hparams(flat, dict.fromkeys(HPARAM_METRICS, 0.0)):
            self.writer.file_writer.add_summary(summary)

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


def reconstructions(model: SemiSupervisedVAE, x: Tensor) -> Tensor:
    """x [B, C, H, W] followed by p(x|y,z) at the most probable y and the mean of q(z|x,y), [2B, C, H, W]."""
    with torch.no_grad():
        y = torch.nn.functional.one_hot(model.classifier(x).argmax(dim=-1), model.num_classes).float()
        loc, _ = model.inference(model.inference.features(x), y.unsqueeze(0))
        return torch.cat([x, model.generate(y.unsqueeze(0), loc)[0].view_as(x)])


def generated(model: SemiSupervisedVAE, shape: torch.Size, generator: torch.Generator, styles: int = 10) -> Tensor:
    """p(x|y,z) for every class at the same `styles` draws of z, [K * styles, C, H, W], class by class."""
    z = torch.randn(styles, model.latent_size, generator=generator, device=generator.device)
    classes = one_hot_classes(model.num_classes, styles, z.device)
    with torch.no_grad():
        return model.generate(classes, z.expand(model.num_classes, -1, -1)).view(-1, *shape)
