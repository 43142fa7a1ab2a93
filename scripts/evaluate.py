"""Evaluates the newest checkpoint of a run folder again, and prints JSON with the names of result.json.

uv run python -m scripts.evaluate outputs/DATE/TIME-NAME
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from scripts.command import refusing_bad_input


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a run folder")
    parser.add_argument("--part", choices=("val", "test", "both"), default="both", help="what to measure on")
    arguments = parser.parse_args()
    with refusing_bad_input():
        from training.run import stored_run

        run = stored_run(arguments.folder)
        measured = {"steps": float(run.step)}
        if arguments.part != "test":
            measured |= run.measure("val")
        if arguments.part != "val":
            measured |= run.measure("test")
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
