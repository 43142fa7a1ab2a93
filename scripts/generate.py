"""Writes a PNG of generated images from a run folder: a row a class, a column a style (the same z down a column).

uv run python -m scripts.generate outputs/DATE/TIME-NAME --output digits.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from scripts.command import positive, refusing_bad_input


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a run folder")
    parser.add_argument("--output", type=Path, default=Path("generated.png"), help="the picture to write")
    parser.add_argument("--columns", type=positive, default=10, help="how many styles")
    parser.add_argument("--seed", type=int, default=0, help="draws the styles")
    parser.add_argument("--zoom", type=positive, default=2, help="how many screen pixels a pixel takes")
    arguments = parser.parse_args()
    with refusing_bad_input():
        from data.randomness import keyed_generator
        from training.pictures import generated, grid, save_png
        from training.run import stored_run

        run = stored_run(arguments.folder)
        generator = keyed_generator(run.device, arguments.seed, "generate")
        images = generated(run.model, run.validation.x.shape[1:], generator, arguments.columns)
        save_png(grid(images, arguments.columns), arguments.output, arguments.zoom)
    print(arguments.output)


if __name__ == "__main__":
    main()
