"""Draws what the model of a run folder has learned, as .png, .pdf or .svg. Of a model that learns from labels:

classes          generated images, a row a class, a column a style (the same z down a column)
interpolation    generated images, a row a class, along the columns the same walk through z between two styles: a
                 quarter of a circle, so that each point of it is as likely as a draw
analogies        validation images on the left, one of each class in turn, and to the right their style z from q(z|x,y)
                 in every class
reconstructions  validation images above p(x|y,z) at their most probable class and style
samples          draws of the model, y from its p(y) (see `prior`) and z from p(z): classes as often as it has them;
                 with --pixels drawn the pixels too are drawn, from the likelihood
sheet            classes, analogies and interpolation side by side with captions, for a paper: 7 inches, 300 dpi

Of a model of categorical variables without labels (model=categorical_mlp, categorical_two_layers):

samples          draws of the model, all variables from p(y), and with --pixels drawn the pixels too
reconstructions  validation images above p(x|y) at the most probable y
variables        the first validation image as reconstructed, and beside it each variable turned through its classes, a
                 row each, the one that changes most first

Of a model that completes images (model=structured_mlp):

completions      validation images, a row each: the whole, its upper half, and that with --columns draws of the lower
                 one, of which --pixels drawn draws the pixels too

The default is the model's first kind. Only the validation images need the data that the run was trained on; --images
takes others for them.

uv run python -m scripts.generate outputs/DATE/TIME-NAME --output digits.png
uv run python -m scripts.generate outputs/DATE/TIME-NAME --kind sheet --output figure.pdf
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from configs.schema import ConfigError
from configs.trust import add_trust
from scripts.command import add_data_path, apart, positive, refusing_bad_input, writable

if TYPE_CHECKING:
    from torch import Tensor

    from training.trained import Trained

SHEET = "sheet"
CAPTIONS = {"classes": "(a) class by style", "analogies": "(b) analogies", "interpolation": "(c) walk between styles"}


def kinds_of(model: Trained) -> list[str]:
    """What can be drawn of a model: its own kinds, and a sheet where it has all of its panels."""
    own = list(model.model.kinds)
    return [*own, SHEET] if CAPTIONS.keys() <= model.model.kinds.keys() else own


def kind_of(arguments: argparse.Namespace, model: Trained) -> str:
    """The kind that is asked for, or the model's first. Raises ConfigError for one that the model has not."""
    kinds = kinds_of(model)
    if not kinds:
        raise ConfigError(f"a model of the family {type(model.model).__name__} has no pictures of its own")
    kind: str = arguments.kind or kinds[0]
    if kind not in kinds:
        raise ConfigError(f"--kind must be one that this model has, {', '.join(kinds)}, got {kind}")
    with_pixels = model.model.kinds_of_pixels
    if arguments.pixels == "drawn" and kind not in with_pixels:
        others = ", ".join(f"--kind {other}" for other in with_pixels)
        raise ConfigError(f"--pixels must be mean for --kind {kind}, got drawn; {others} draws them")
    return kind


def takes_images(model: Trained, kind: str) -> bool:
    return any(model.model.kinds[panel] for panel in (CAPTIONS if kind == SHEET else [kind]))


def held_out(arguments: argparse.Namespace, model: Trained, kind: str) -> Tensor:
    """Images uint8 [N, C, H, W] to encode: those of --images, or the validation images, whose classes take turns."""
    import torch

    from data.facts import DataError
    from data.inputs import inputs
    from models.pictures import turn_about
    from training.saved import stored_run

    if arguments.images:
        source = inputs(arguments.images, model.facts.shape, model.facts.resize)
        number = max(arguments.columns, len(model.class_names))
        images = torch.from_numpy(next(source.chunks(number))[1].copy())
        for note in source.said():
            print(f"catvae: {note}", file=sys.stderr)
        return images
    run = stored_run(arguments.folder, arguments.checkpoint, arguments.trust, arguments.data_path)
    if not len(run.validation.labels):
        raise DataError(
            f"--kind {kind} draws validation images, and the run has none: data.num_validation=0; --images takes others"
        )
    return run.validation.x[turn_about(run.validation.labels)].cpu()


def drawn(
    model: Trained, kind: str, columns: int, seed: int, images: Tensor | None = None, draw_pixels: bool = False
) -> Tensor:
    """The picture uint8 [C, H, W] of a kind; `images` are for those that encode some."""
    import torch

    from data.batches import binarize, binarize_by_itself, own_generators
    from data.randomness import keyed_generator
    from models.evaluation import evaluating

    generator = keyed_generator(model.device, seed, "generate")
    with evaluating(model.model):
        x = None
        if images is not None and model.model.kinds[kind]:
            images, how = images[:columns], model.facts.binarization
            if how == "fixed":  # of validation images they are drawn already, and others have no row
                x = binarize_by_itself(images, how, own_generators(images)).to(model.device)
            else:
                x = binarize(images.to(model.device), how, generator)
        return model.model.draw(kind, torch.Size(model.facts.shape), columns, generator, x, draw_pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a run folder")
    parser.add_argument("--kind", help="what to draw, see above; default: the first that the model has")
    parser.add_argument("--checkpoint", type=Path, help="a file in its checkpoints/, or a path; default: the newest")
    parser.add_argument(
        "--output", type=Path, default=Path("generated.png"), help="the picture to write, .png, .pdf or .svg"
    )
    parser.add_argument(
        "--columns", type=positive, default=10, help="how many styles, steps, draws or validation images"
    )
    parser.add_argument(
        "--pixels",
        choices=("mean", "drawn"),
        default="mean",
        help="of samples and completions: the mean picture, or a draw of pixels",
    )
    parser.add_argument("--images", type=Path, help="a folder of pictures or an .npz file, for validation images")
    parser.add_argument("--seed", type=int, default=0, help="makes the draws")
    parser.add_argument("--zoom", type=positive, default=2, help="how many screen pixels a pixel takes; not of a sheet")
    add_data_path(parser)
    add_trust(parser)
    arguments = parser.parse_args()
    with refusing_bad_input():
        writable(arguments.output, (".png", ".pdf", ".svg"))
        from training.pictures import save_figure, save_png
        from training.trained import open_run

        model = open_run(arguments.folder, "auto", arguments.checkpoint, arguments.trust)
        own = [*model.own_images, *filter(None, [arguments.data_path])]
        read = [arguments.images] if arguments.images else own
        apart({"--output": arguments.output}, read, arguments.folder)
        kind = kind_of(arguments, model)
        if arguments.images and not takes_images(model, kind):
            raise ConfigError(f"--images must be left out with --kind {kind}, which draws without any")
        images = held_out(arguments, model, kind) if takes_images(model, kind) else None
        if kind == SHEET:
            counts = {"analogies": len(model.class_names)}  # one of each class: as high as the others
            panels = [
                (caption, drawn(model, panel, counts.get(panel, arguments.columns), arguments.seed, images))
                for panel, caption in CAPTIONS.items()
            ]
            save_figure(panels, arguments.output)
        else:
            pixels = arguments.pixels == "drawn"
            picture = drawn(model, kind, arguments.columns, arguments.seed, images, pixels)
            if arguments.output.suffix.lower() != ".png":
                save_figure([("", picture)], arguments.output, width=picture.shape[-1] * arguments.zoom / 72)
            else:
                save_png(picture, arguments.output, arguments.zoom)
        print(arguments.output)


if __name__ == "__main__":
    main()
