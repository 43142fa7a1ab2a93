"""Pictures of what a model does, as grids and as PNG files."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from models.evaluation import evaluating, one_hot_classes
from models.vae import SemiSupervisedVAE


def grid(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """Images [N, C, H, W] in [0, 1], row by row on a grey ground, as uint8 [C, rows (H + gap) + gap, ...]."""
    number, channels, height, width = images.shape
    rows = -(-number // columns)
    sheet = torch.full((channels, rows * (height + gap) + gap, columns * (width + gap) + gap), 0.5)
    for index, image in enumerate(images.cpu()):
        top, left = divmod(index, columns)
        top, left = gap + top * (height + gap), gap + left * (width + gap)
        sheet[:, top : top + height, left : left + width] = image
    return (sheet.clamp(0, 1) * 255).round().to(torch.uint8)


def save_png(sheet: Tensor, path: Path, zoom: int) -> None:
    """Writes a uint8 picture [C, H, W] with 1 or 3 channels, each pixel `zoom` times as large."""
    from PIL import Image

    large = sheet.repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2)
    array = large.permute(1, 2, 0).numpy()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(path, format="PNG")


def reconstructions(model: SemiSupervisedVAE, x: Tensor) -> Tensor:
    """x [B, C, H, W] followed by p(x|y,z) at the most probable y and the mean of q(z|x,y), [2B, C, H, W]."""
    with evaluating(model):
        y = F.one_hot(model.classifier(x).argmax(dim=-1), model.num_classes).float()
        loc, _ = model.inference(model.inference.features(x), y.unsqueeze(0))
        return torch.cat([x, model.generate(y.unsqueeze(0), loc)[0].view_as(x)])


def generated(model: SemiSupervisedVAE, shape: torch.Size, generator: torch.Generator, styles: int = 10) -> Tensor:
    """p(x|y,z) for every class at the same `styles` draws of z, [K * styles, C, H, W], class by class."""
    z = torch.randn(styles, model.latent_size, generator=generator, device=generator.device)
    classes = one_hot_classes(model.num_classes, styles, z.device)
    with evaluating(model):
        return model.generate(classes, z.expand(model.num_classes, -1, -1)).view(-1, *shape)


def analogies(model: SemiSupervisedVAE, x: Tensor) -> Tensor:
    """Each image of x [B, C, H, W] followed by p(x|y,z) in every class in its own style, [B (K + 1), C, H, W].

    The style is the mean of q(z|x,y) at the most probable y (Kingma et al. 2014, figure 1b).
    """
    with evaluating(model):
        y = F.one_hot(model.classifier(x).argmax(dim=-1), model.num_classes).float()
        loc, _ = model.inference(model.inference.features(x), y.unsqueeze(0))
        classes = one_hot_classes(model.num_classes, len(x), x.device)
        drawn = model.generate(classes, loc.expand(model.num_classes, -1, -1)).view(-1, *x.shape)
        return torch.cat([x.unsqueeze(0), drawn]).transpose(0, 1).flatten(0, 1)


def interpolation(model: SemiSupervisedVAE, shape: torch.Size, generator: torch.Generator, columns: int) -> Tensor:
    """p(x|y,z) for every class along one walk between two draws of z, [K * columns, C, H, W], class by class.

    The walk is the quarter circle cos(t) z_0 + sin(t) z_1, t from 0 to pi / 2: each point of it is a draw of N(0, I),
    where the straight line between them passes nearer to the origin than draws do.
    """
    ends = torch.randn(2, model.latent_size, generator=generator, device=generator.device)
    angles = torch.linspace(0, torch.pi / 2, columns, device=generator.device).unsqueeze(-1)
    z = angles.cos() * ends[0] + angles.sin() * ends[1]
    classes = one_hot_classes(model.num_classes, columns, z.device)
    with evaluating(model):
        return model.generate(classes, z.expand(model.num_classes, -1, -1)).view(-1, *shape)
