"""Pictures of what a model does, as grids and as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.evaluation import evaluating, one_hot_classes
from models.vae import SemiSupervisedVAE


def grid(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """Images [N, C, H, W] in [0, 1], row by row on a grey ground, as uint8 [C, rows (H + gap) + gap, ...].

    Images of other than 1 or 3 channels are drawn as the mean over their channels.
    """
    if images.shape[1] not in (1, 3):
        images = images.mean(dim=1, keepdim=True)
    number, channels, height, width = images.shape
    rows = -(-number // columns)
    sheet = torch.full((channels, rows * (height + gap) + gap, columns * (width + gap) + gap), 0.5)
    for index, image in enumerate(images.cpu()):
        top, left = divmod(index, columns)
        top, left = gap + top * (height + gap), gap + left * (width + gap)
        sheet[:, top : top + height, left : left + width] = image
    return (sheet.clamp(0, 1) * 255).round().to(torch.uint8)


def beside(left: Tensor, right: Tensor, gap: int = 6) -> Tensor:
    """Two pictures uint8 [C, H, W] of one height, with a white gap between them."""
    return torch.cat([F.pad(left, (0, gap), value=255), right], dim=2)


def turn_about(labels: Tensor) -> Tensor:
    """The rows of labels [N], ordered so that the classes take turns: the first of each, then the second of each."""
    earlier = F.one_hot(labels).cumsum(dim=0).gather(1, labels.unsqueeze(1)).squeeze(1)
    return torch.argsort(earlier * (labels.max() + 1) + labels)


def save_png(sheet: Tensor, path: Path | IO[bytes], zoom: int) -> None:
    """Writes a uint8 picture [C, H, W] with 1 or 3 channels, each pixel `zoom` times as large."""
    from PIL import Image

    large = sheet.repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2)
    array = large.permute(1, 2, 0).numpy()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(path, format="PNG")


def save_figure(panels: Sequence[tuple[str, Tensor]], path: Path, width: float = 7) -> None:
    """Writes captioned pictures uint8 [C, H, W] side by side, about `width` inches wide, .png of 300 dpi, .pdf or .svg.

    A pixel takes a whole number of dots, so that none is blurred or wider than another.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    dots = 300
    space, foot = 0.15 * dots, 0.25 * dots if any(caption for caption, _ in panels) else 0
    widths, heights = [picture.shape[2] for _, picture in panels], [picture.shape[1] for _, picture in panels]
    zoom = max(1, round((width * dots - space * (len(panels) - 1)) / sum(widths)))
    total_width = zoom * sum(widths) + space * (len(panels) - 1)
    total_height = zoom * max(heights) + foot
    figure = Figure(figsize=(total_width / dots, total_height / dots), dpi=dots)
    left = 0.0
    for (caption, picture), columns, rows in zip(panels, widths, heights, strict=True):
        height, middle = zoom * rows / total_height, (left + zoom * columns / 2) / total_width
        axes = figure.add_axes((left / total_width, 1 - height, zoom * columns / total_width, height))
        axes.set_axis_off()
        axes.imshow(picture.expand(3, -1, -1).permute(1, 2, 0).numpy(), interpolation="none", aspect="auto")
        below = 1 - height - 0.6 * foot / total_height
        figure.text(middle, below, caption, ha="center", va="center", fontsize=8)
        left += zoom * columns + space
    dates: dict[str, Any] = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
    with rc_context({"svg.hashsalt": "catvae"}):  # the same bytes each time
        figure.savefig(path, dpi=dots, metadata=dates.get(path.suffix.lower()))


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


def samples(
    model: SemiSupervisedVAE, shape: torch.Size, generator: torch.Generator, number: int, draw_pixels: bool = False
) -> Tensor:
    """Draws of the model, [number, C, H, W]: y from p(y), z from p(z), and p(x|y,z)'s mean, or pixels drawn from it."""
    y = model.draw_classes(number, generator).unsqueeze(0)
    z = torch.randn(1, number, model.latent_size, generator=generator, device=generator.device)
    with evaluating(model):
        x = model.draw_pixels(y, z, generator) if draw_pixels else model.generate(y, z)
    return x.view(number, *shape)


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
