"""Pictures as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from torch import Tensor


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
