"""Images put together to one picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """The rows of labels [N], ordered so that the classes take turns: the first of each, then the second of each.

    Labels of -1, which are unknown, come last.
    """
    unknown = (labels < 0).nonzero().flatten()
    rows = (labels >= 0).nonzero().flatten()
    if not len(rows):
        return unknown
    labels = labels[rows]
    earlier = F.one_hot(labels).cumsum(dim=0).gather(1, labels.unsqueeze(1)).squeeze(1)
    return torch.cat([rows[torch.argsort(earlier * (labels.max() + 1) + labels)], unknown])
