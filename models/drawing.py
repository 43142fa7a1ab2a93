"""Charts by Pillow, which draws in milliseconds: what they are made of."""

from __future__ import annotations

import unicodedata
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

Colour = tuple[int, int, int]
WHITE, BLACK, GREY = (255, 255, 255), (0, 0, 0), (150, 150, 150)
BLUE, RED = (31, 119, 180), (214, 39, 40)
WIDTH = 350  # pixels, as wide as TensorBoard shows a picture: others are scaled, and their text is hard to read
TEXT, SMALL_TEXT = 13, 11


@lru_cache
def ascii_font(size: int) -> Any:
    """Pillow's own, which has the letters of ASCII alone."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


@lru_cache
def _wide_font(size: int) -> Any:
    """One with the letters of most alphabets: Matplotlib's, or else the system's; None where there is neither."""
    from PIL import ImageFont

    names, matplotlib = ["DejaVuSans.ttf", "Arial.ttf", "arial.ttf"], find_spec("matplotlib")
    if matplotlib and matplotlib.origin:
        names.insert(0, str(Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"))
    for name in names:
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return None


@lru_cache(maxsize=1024)
def _lettered(text: str, size: int) -> tuple[str, Any]:
    """The text and a font that draws it without boxes: a letter that the font lacks becomes its ASCII, or ?."""
    if text.isascii():
        return text, ascii_font(size)
    font = _wide_font(size) or ascii_font(size)
    box = bytes(font.getmask("\uffff"))  # no letter
    drawn = []
    for letter in text:
        is_there = letter.isprintable() and font is not ascii_font(size) and bytes(font.getmask(letter)) != box
        if letter.isascii() or is_there:
            drawn.append(letter)
        else:
            plain = unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()
            drawn.append(plain or ("" if unicodedata.combining(letter) else "?"))
    return "".join(drawn), font


def text_length(text: str) -> float:
    text, font = _lettered(text, TEXT)
    return float(font.getlength(text))


def blank(width: int, height: int) -> tuple[Image, ImageDraw]:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, height), WHITE)
    return image, ImageDraw.Draw(image)


def centred(draw: ImageDraw, text: str, x: float, y: float, colour: Colour = BLACK, size: int = TEXT) -> None:
    text, font = _lettered(text, size)
    draw.text((x, y), text, colour, font, anchor="mm")


def mixed(first: Colour, second: Colour, share: float) -> Colour:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def as_tensor(image: Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def fitting(text: str, width: float) -> str:
    """The text, or as much of it as the width takes, and dots."""
    if text_length(text) <= width - 2:
        return text
    shorter = (text[:end] + ".." for end in range(len(text) - 1, 0, -1))
    return next((part for part in shorter if text_length(part) <= width - 2), text[:1])
