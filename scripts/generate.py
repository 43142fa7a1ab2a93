"""Draws what the model of a run folder has learned, as .png or .pdf.

classes          generated images, a row a class, a column a style (the same z down a column)
interpolation    generated images, a row a class, along the columns the same walk through z between two styles: a
                 quarter of a circle, so that each point of it is as likely as a draw
analogies        validation images on the left, one of each class in turn, and to the right their style z from q(z|x,y)
                 in every class
reconstructions  validation images above p(x|y,z) at their most probable class and style
sheet            classes, analogies and interpolation side by side with captions, for a paper: 7 inches, 300 dpi

uv run python -m scripts.generate outputs/DATE/TIME-NAME --output digits.png
uv run python -m scripts.generate outputs/DATE/TIME-NAME --kind sheet --output figure.pdf
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from configs.trust import add_trust
from scripts.command import positive, refusing_bad_input, writable

if TYPE_CHECKING:
    from torch import Tensor

    from training.run import Run

KINDS = ("classes", "analogies", "interpolation", "sheet", "reconstructions")
CAPTIONS = {"classes": "(a) class by style", "analogies": "(b) analogies", "interpolation": "(c) walk between styles"}


def drawn(run: Run, kind: str, columns: int, seed: int) -> Tensor:
    """The picture uint8 [C, H, W] of a kind."""
    from data.batches import binarize
    from data.randomness import keyed_generator
    from training.pictures import analogies, beside, generated, grid, interpolation, reconstructions, turn_about

    generator = keyed_generator(run.device, seed, "generate")
    shape = run.validation.x.shape[1:]
    if kind == "classes":
        return grid(generated(run.model, shape, generator, columns), columns)
    if kind == "interpolation":
        return grid(interpolation(run.model, shape, generator, columns), columns)
    rows = turn_about(run.validation.labels)[:columns]
    x = binarize(run.validation.x[rows], run.binarization, generator)
    if kind == "reconstructions":
        return grid(reconstructions(run.model, x), len(x))
    images = analogies(run.model, x).unflatten(0, (len(x), -1))
    return beside(grid(images[:, 0], 1), grid(images[:, 1:].flatten(0, 1), run.model.num_classes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a run folder")
    parser.add_argument("--kind", choices=KINDS, default="classes", help="what to draw, see above")
    parser.add_argument("--checkpoint", type=Path, help="a file in its checkpoints/, or a path; default: the newest")
    parser.add_argument("--output", type=Path, default=Path("generated.png"), help="the picture to write, .png or .pdf")
    parser.add_argument("--columns", type=positive, default=10, help="how many styles, steps or validation images")
    parser.add_argument("--seed", type=int, default=0, help="draws the styles")
    parser.add_argument("--zoom", type=positive, default=2, help="how many screen pixels a pixel takes; not of a sheet")
    add_trust(parser)
    arguments = parser.parse_args()
    with refusing_bad_input():
        writable(arguments.output, (".png", ".pdf"))

        from training.pictures import save_figure, save_png
        from training.run import stored_run

        run = stored_run(arguments.folder, arguments.checkpoint, arguments.trust)
        if arguments.kind == "sheet":
            counts = {"analogies": run.model.num_classes}  # one of each class: as high as the others
            panels = [
                (caption, drawn(run, kind, counts.get(kind, arguments.columns), arguments.seed))
                for kind, caption in CAPTIONS.items()
            ]
            save_figure(panels, arguments.output)
        else:
            picture = drawn(run, arguments.kind, arguments.columns, arguments.seed)
            if arguments.output.suffix.lower() == ".pdf":
                save_figure([("", picture)], arguments.output, width=picture.shape[-1] * arguments.zoom / 72)
            else:
                save_png(picture, arguments.output, arguments.zoom)
    print(arguments.output)


if __name__ == "__main__":
    main()
