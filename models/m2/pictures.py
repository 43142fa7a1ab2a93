"""What M2 makes of images, classes and z."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from models.evaluation import evaluating
from models.m2.evaluation import one_hot_classes
from models.pictures import beside, grid

if TYPE_CHECKING:
    from models.m2.model import SemiSupervisedVAE

KINDS = {
    "classes": False,
    "analogies": True,
    "interpolation": False,
    "reconstructions": True,
    "samples": False,
}
MOST_CLASSES = 40  # in a picture that has a place for each


def pictures(model: SemiSupervisedVAE, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """What the model makes of images x [B, C, H, W] and of z, as grids by their tags.

    Held-out images above their reconstructions; generated images, a row a class, a column a style; held-out
    images before their analogies in every class; and one walk through z, a row a class. With more than
    MOST_CLASSES, nothing that is drawn class by class.
    """
    shape = x.shape[1:]
    drawn = {"reconstructions": grid(reconstructions(model, x), columns=len(x))}
    if model.num_classes > MOST_CLASSES:
        return drawn
    drawn["generated"] = grid(generated(model, shape, generator), columns=10)
    drawn["analogies"] = grid(analogies(model, x), columns=model.num_classes + 1)
    drawn["walk_through_z"] = grid(interpolation(model, shape, generator, 10), columns=10)
    return drawn


def draw(
    model: SemiSupervisedVAE,
    kind: str,
    shape: torch.Size,
    columns: int,
    generator: torch.Generator,
    x: Tensor | None = None,
    draw_pixels: bool = False,
) -> Tensor:
    """The picture uint8 [C, H, W] of a kind; x [B, C, H, W] is for those that take images."""
    if kind == "classes":
        return grid(generated(model, shape, generator, columns), columns)
    if kind == "samples":
        return grid(model.sample(columns**2, generator, draw_pixels).view(-1, *shape), columns)
    if kind == "interpolation":
        return grid(interpolation(model, shape, generator, columns), columns)
    assert x is not None
    if kind == "reconstructions":
        return grid(reconstructions(model, x), len(x))
    styles = analogies(model, x).unflatten(0, (len(x), -1))
    return beside(grid(styles[:, 0], 1), grid(styles[:, 1:].flatten(0, 1), model.num_classes))


def reconstructions(model: SemiSupervisedVAE, x: Tensor) -> Tensor:
    """x [B, C, H, W] followed by p(x|y,z) at the most probable y and the mean of q(z|x,y), [2B, C, H, W]."""
    with evaluating(model):
        y = F.one_hot(model.posterior(x).argmax(dim=-1), model.num_classes).float()
        loc = model.style(x, y.unsqueeze(0))
        return torch.cat([x, model.generate(y.unsqueeze(0), loc)[0].view_as(x)])


def generated(model: SemiSupervisedVAE, shape: torch.Size, generator: torch.Generator, styles: int = 10) -> Tensor:
    """p(x|y,z) for every class at the same `styles` draws of z, [K * styles, C, H, W], class by class."""
    z = model.styles(styles, generator)
    classes = one_hot_classes(model.num_classes, styles, z.device)
    with evaluating(model):
        return model.generate(classes, z.expand(model.num_classes, -1, -1)).view(-1, *shape)


def analogies(model: SemiSupervisedVAE, x: Tensor) -> Tensor:
    """Each image of x [B, C, H, W] followed by p(x|y,z) in every class in its own style, [B (K + 1), C, H, W].

    The style is the mean of q(z|x,y) at the most probable y (Kingma et al. 2014, figure 1b).
    """
    with evaluating(model):
        y = F.one_hot(model.posterior(x).argmax(dim=-1), model.num_classes).float()
        loc = model.style(x, y.unsqueeze(0))
        classes = one_hot_classes(model.num_classes, len(x), x.device)
        drawn = model.generate(classes, loc.expand(model.num_classes, -1, -1)).view(-1, *x.shape)
        return torch.cat([x.unsqueeze(0), drawn]).transpose(0, 1).flatten(0, 1)


def interpolation(model: SemiSupervisedVAE, shape: torch.Size, generator: torch.Generator, columns: int) -> Tensor:
    """p(x|y,z) for every class along one walk between two draws of z, [K * columns, C, H, W], class by class.

    The walk is the quarter circle cos(t) z_0 + sin(t) z_1, t from 0 to pi / 2: each point of it is a draw of N(0, I),
    where the straight line between them passes nearer to the origin than draws do.
    """
    ends = model.styles(2, generator)
    angles = torch.linspace(0, torch.pi / 2, columns, device=generator.device).unsqueeze(-1)
    z = angles.cos() * ends[0] + angles.sin() * ends[1]
    classes = one_hot_classes(model.num_classes, columns, z.device)
    with evaluating(model):
        return model.generate(classes, z.expand(model.num_classes, -1, -1)).view(-1, *shape)
