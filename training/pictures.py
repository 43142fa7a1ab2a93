"""Image grids, as tensors and as PNG files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


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


def save_png(sheet: Tensor, path: Path, zoom: int = 1) -> None:
    """Writes a uint8 picture [C, H, W] with 1 or 3 channels, each pixel `zoom` times as large."""
    from PIL import Image

    large = sheet.repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2)
    array = large.permute(1, 2, 0).numpy()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(path)
