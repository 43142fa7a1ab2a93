"""What a model of categorical variables makes of images, and what it uses its variables for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from estimators.contract import entropy
from estimators.relaxations import one_hot
from models.contract import Alarm, Evaluation, PerImage
from models.drawing import BLACK, BLUE, GREY, RED, SMALL_TEXT, TEXT, WIDTH, as_tensor, ascii_font, blank, centred
from models.pictures import beside, grid

if TYPE_CHECKING:
    from models.categorical.model import CategoricalVAE

KINDS = {"samples": False, "reconstructions": True, "variables": True}
MOST_VARIABLES = 20  # in a picture that has a row for each
UNUSED = 0.01  # nats that a variable tells of an image
MOST_UNUSED = 0.5  # of the variables


def information(q: Tensor) -> Tensor:
    """What each variable tells of an image, in nats: the mean of KL(q(y_n|x) || mean q(y_n|x)) [N], of q [B, N, K].

    It is no more than the mean KL of q(y_n|x) and any p(y_n).
    """
    tiny = torch.finfo(torch.float32).tiny
    q = q.double()
    return (q * (q.clamp(min=tiny).log() - q.mean(dim=0).clamp(min=tiny).log())).sum(dim=-1).mean(dim=0)


def alarms(measured: Evaluation) -> list[Alarm]:
    """Whether most variables have died."""
    assert measured.per_image is not None
    told = information(measured.per_image.q)
    unused = int((told < UNUSED).sum())
    sentence = f"{unused} of {len(told)} variables are unused: they tell less than {UNUSED:g} nats of an image"
    return [Alarm("variables_unused", unused > MOST_UNUSED * len(told), sentence)]


def pictures(model: CategoricalVAE, x: Tensor, generator: torch.Generator, seen: PerImage | None) -> dict[str, Tensor]:
    """Held-out images x [B, C, H, W] above their reconstructions, draws of the model, what each variable does to the
    first of the images, and how much each variable is used over all of them.
    """
    shape = x.shape[1:]
    drawn = {
        "reconstructions": reconstructions(model, x),
        "samples": draw(model, "samples", shape, 10, generator),
        "variables": variables(model, x[:1]),
    }
    if seen is not None:
        drawn["use_of_variables"] = use_of_variables(seen.q)
    return drawn


def draw(
    model: CategoricalVAE,
    kind: str,
    shape: torch.Size,
    columns: int,
    generator: torch.Generator,
    x: Tensor | None = None,
    draw_pixels: bool = False,
) -> Tensor:
    """The picture uint8 [C, H, W] of a kind; x [B, C, H, W] is for those that take images."""
    if kind == "samples":
        return grid(model.sample(columns**2, generator, draw_pixels).view(-1, *shape), columns)
    assert x is not None
    return reconstructions(model, x) if kind == "reconstructions" else variables(model, x[:1])


def most_probable(model: CategoricalVAE, x: Tensor) -> Tensor:
    """One-hot y [B, N, K] of the lowest layer, the most probable by q(y|x)."""
    logits = model.logits(0, x)
    return one_hot(logits.argmax(dim=-1), logits.shape[-1])


def reconstructions(model: CategoricalVAE, x: Tensor) -> Tensor:
    """x [B, C, H, W] above p(x|y) at the most probable y."""
    again = model.pixels(most_probable(model, x).unsqueeze(0))[0].view_as(x)
    return grid(torch.cat([x, again]), columns=len(x))


def variables(model: CategoricalVAE, x: Tensor) -> Tensor:
    """An image [1, C, H, W] as reconstructed, and beside it each variable turned through its classes, a row each.

    The first MOST_VARIABLES, those with the largest spread of pixels first.
    """
    y = most_probable(model, x)
    _, num_variables, num_classes = y.shape
    turned = y.repeat(num_variables * num_classes, 1, 1).unflatten(0, (num_variables, num_classes))
    each = torch.eye(num_classes, device=y.device)
    for variable in range(num_variables):
        turned[variable, :, variable] = each
    pixels = model.pixels(turned.flatten(0, 1).unsqueeze(0))[0].view(num_variables, num_classes, *x.shape[1:])
    shown = pixels.std(dim=1, correction=0).flatten(1).sum(dim=1).argsort(descending=True)[:MOST_VARIABLES]
    whole = grid(model.pixels(y.unsqueeze(0))[0].view_as(x), columns=1)
    rows = grid(pixels[shown].flatten(0, 1), columns=num_classes)
    left = torch.full((whole.shape[0], rows.shape[1], whole.shape[2]), 255, dtype=torch.uint8)
    left[:, : whole.shape[1]] = whole
    return beside(left, rows)


def use_of_variables(q: Tensor) -> Tensor:
    """A picture uint8 [3, H, W] of two bars a variable, from q(y|x) [B, N, K], those that tell most first.

    Blue is what a variable tells of an image, red the mean entropy of q(y_n|x), how unsure it is. The height is log K,
    and what is missing is what the mean of q(y_n|x) falls short of being uniform.
    """
    told, unsure = information(q).cpu(), entropy(q.clamp(min=1e-30).log()).mean(dim=0).cpu()
    order, most = told.argsort(descending=True), math.log(q.shape[-1])
    return draw_bars(
        f"use of {len(told)} variables, as a part of log K = {most:.2f} nats",
        [("tells of an image", BLUE), ("entropy of q(y|x)", RED)],
        [(told[order] / most).tolist(), (unsure[order] / most).tolist()],
    )


def draw_bars(title: str, names: Sequence[tuple[str, tuple[int, int, int]]], bars: Sequence[Sequence[float]]) -> Tensor:
    """Bars of height 0 to 1, drawn 150 pixels high, of several kinds side by side, uint8 [3, H, W]."""
    left, top, height, foot = 36, 62, 150, 12
    number = len(bars[0])
    width = max(1, (WIDTH - left - 8) // number)
    image, canvas = blank(left + width * number + 8, top + height + foot)
    canvas.text((4, 6), title, BLACK, ascii_font(TEXT))
    for place, (name, colour) in enumerate(names):
        canvas.rectangle((left + 160 * place, 33, left + 160 * place + 9, 42), colour)
        canvas.text((left + 160 * place + 14, 30), name, BLACK, ascii_font(SMALL_TEXT))
    for tick in (0.0, 0.5, 1.0):
        y = round(top + height * (1 - tick))
        canvas.line((left, y, left + width * number, y), GREY)
        centred(canvas, f"{tick:g}", left - 16, y)
    each = width / (len(bars) + 0.5)
    for kind, (values, (_, colour)) in enumerate(zip(bars, names, strict=True)):
        for place, value in enumerate(values):
            x, bar = left + width * place + each * kind, height * min(1.0, max(0.0, value))
            if bar >= 1:
                canvas.rectangle((x, top + height - bar, x + max(0, each - 1), top + height), colour)
    return as_tensor(image)
