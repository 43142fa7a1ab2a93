"""Drawn for TensorBoard from probabilities of classes: the confusion matrix, mistakes and calibration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data.batches import OnHost
from models.drawing import (
    BLACK,
    BLUE,
    GREY,
    RED,
    SMALL_TEXT,
    TEXT,
    WHITE,
    WIDTH,
    as_tensor,
    ascii_font,
    blank,
    centred,
    fitting,
    mixed,
    text_length,
)
from models.evaluation import calibration_bins


def confusion(told: Tensor, labels: Tensor) -> Tensor:
    """How often class i [K rows] was predicted as class j [K columns], from probabilities [N, K] and labels [N]."""
    classes = told.shape[-1]
    return torch.bincount(labels * classes + told.argmax(dim=-1), minlength=classes**2).view(classes, classes)


def worst_mistakes(told: Tensor, labels: Tensor, number: int) -> list[tuple[int, int, int, float]]:
    """(image, true class, predicted class, confidence) of the most confident mistakes, the worst first."""
    confidence, predicted = told.max(dim=-1)
    wrong = (predicted != labels).nonzero().squeeze(-1)
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)[:number]]
    columns = (worst, labels[worst], predicted[worst], confidence[worst])
    return list(zip(*(column.tolist() for column in columns), strict=True))


def draw_confusion(counts: Tensor, names: Sequence[str]) -> Tensor:
    """A picture uint8 [3, H, W] of counts [K, K]; the colour is a count's share of its row, red off the diagonal."""
    classes, height, top, right = len(counts), 26, 62, 42
    left = max(28, min(WIDTH // 3, 8 + round(max(map(text_length, names)))))
    width = max(28, (WIDTH - left - right) // classes)
    image, draw = blank(left + width * classes + right, top + height * classes + 8)
    centred(draw, "right", left + width * classes + right / 2, 48)
    draw.text((4, 12), "row: true class; column: predicted class", BLACK, ascii_font(TEXT))
    for row, numbers in enumerate(counts.tolist()):
        y, total = top + height * row, max(sum(numbers), 1)
        centred(draw, fitting(names[row], width), left + width * (row + 0.5), 48)
        centred(draw, fitting(names[row], left), left / 2, y + height / 2)
        centred(draw, f"{numbers[row] / total:.0%}", left + width * classes + right / 2, y + height / 2)
        for column, number in enumerate(numbers):
            x, share = left + width * column, number / total
            # by the root, or a share of a few hundredths could not be seen
            ground = mixed(WHITE, BLUE if row == column else RED, share**0.5)
            draw.rectangle((x, y, x + width - 1, y + height - 1), ground, outline=(225, 225, 225))
            centred(draw, str(number), x + width / 2, y + height / 2, WHITE if share > 0.4 else BLACK, SMALL_TEXT)
    return as_tensor(image)


def draw_mistakes(
    x: Tensor | OnHost, mistakes: list[tuple[int, int, int, float]], names: Sequence[str], columns: int = 5
) -> Tensor:
    """A picture uint8 [3, H, W] of images from x, uint8 [N, C, H, W], each above "true -> predicted" and confidence."""
    title = "most confident mistakes: true -> predicted, probability" if mistakes else "no mistakes"
    width = WIDTH // columns
    tiles = [
        (
            x[index : index + 1][0].double().mean(dim=0, keepdim=True),
            f"{_arrow(names[label], names[guess], width)}\n{confidence:.2%}",
        )
        for index, label, guess, confidence in mistakes
    ]
    return draw_tiles(title, tiles, columns, width)


def draw_tiles(title: str, tiles: Sequence[tuple[Tensor, str]], columns: int, width: int) -> Tensor:
    """A picture uint8 [3, H, W] of images [C, H, W] of 0..255, each above its lines of text, in tiles of one width."""
    from PIL import Image

    side = width - 14
    lines = max((caption.count("\n") + 1 for _, caption in tiles), default=2)
    height, top = side + 12 + 15 * lines, 30
    image, draw = blank(width * columns, top + height * max(1, -(-len(tiles) // columns)))
    draw.text((6, 7), title, BLACK, ascii_font(TEXT))
    for place, (pixels, caption) in enumerate(tiles):
        down, across = divmod(place, columns)
        left, upper = across * width, top + down * height
        if len(pixels) not in (1, 3):
            pixels = pixels.double().mean(dim=0, keepdim=True)
        array = pixels.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        tile = Image.fromarray(array if len(pixels) == 3 else array[..., 0])
        zoom = side / max(tile.size)
        size = max(1, round(tile.width * zoom)), max(1, round(tile.height * zoom))
        small = tile.resize(size, Image.Resampling.NEAREST if zoom >= 1 else Image.Resampling.LANCZOS)
        image.paste(small, (left + (width - small.width) // 2, upper + 4))
        for line, text in enumerate(caption.split("\n")):
            centred(draw, fitting(text, width), left + width / 2, upper + side + 14 + 15 * line)
    return as_tensor(image)


def _arrow(true: str, predicted: str, width: int) -> str:
    room = (width - ascii_font(TEXT).getlength(" -> ")) / 2
    return f"{fitting(true, room)} -> {fitting(predicted, room)}"


def draw_calibration(told: Tensor, labels: Tensor) -> Tensor:
    """A reliability diagram uint8 [3, H, W]: accuracy by confidence, the images in each bin, and the ECE."""
    images, confidence, correct = calibration_bins(told, labels).cpu()
    error = ((correct - confidence).abs().sum() / images.sum()).item()
    left, top, foot, between = 36, 52, 60, 30
    side = WIDTH - left - 14
    image, draw = blank(WIDTH, top + side + between + foot + 46)
    centred(draw, f"expected calibration error {error:.2%}", left + side / 2, 14)
    bottom, last = top + side, top + side + between + foot
    bin_width = side / len(images)
    for index, (number, right) in enumerate(zip(images.tolist(), correct.tolist(), strict=True)):
        x = left + bin_width * index
        if number:
            draw.rectangle((x, bottom - side * right / number, x + bin_width - 1, bottom), BLUE)
            share = number / images.max().item()
            draw.rectangle((x, last - max(foot * share, 1), x + bin_width - 1, last), GREY)
    draw.rectangle((left, top, left + side, bottom), outline=BLACK)
    draw.rectangle((left, last - foot, left + side, last), outline=BLACK)
    draw.line((left, bottom, left + side, top), RED, 2)
    for tick in (0.0, 0.5, 1.0):
        centred(draw, f"{tick:g}", left - 16, bottom - side * tick)
        centred(draw, f"{tick:g}", left + side * tick, last + 14)
    centred(draw, "confidence: largest probability of a class", left + side / 2, last + 32)
    draw.text((left, top - 19), "accuracy (bars), and what confidence promises (line)", BLACK, ascii_font(SMALL_TEXT))
    draw.text(
        (left, last - foot - 18), f"images: {int(images.max())} in the largest bin", BLACK, ascii_font(SMALL_TEXT)
    )
    return as_tensor(image)
