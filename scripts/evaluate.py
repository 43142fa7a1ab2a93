"""Evaluates a checkpoint of a run folder again, and prints JSON with the names of result.json.

uv run python -m scripts.evaluate outputs/DATE/TIME-NAME
uv run python -m scripts.evaluate outputs/DATE/TIME-NAME --part unlabelled --checkpoint step_00005000.pt
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from configs.schema import Binarization, ClassifyBy, ConfigError, Likelihood, resolved_likelihood
from configs.trust import add_trust
from data.facts import DataError
from scripts.command import add_data_path, apart, positive, refusing_bad_input, writable

if TYPE_CHECKING:
    from training.run import Part, Run

PARTS: dict[str, tuple[Part, ...]] = {
    "val": ("val",),
    "test": ("test",),
    "both": ("val", "test"),
    "labelled": ("labelled",),
    "unlabelled": ("unlabelled",),
}


def _check_pixels(likelihood: Likelihood, binarization: str) -> None:
    try:
        resolved_likelihood(likelihood, Binarization(binarization))
    except ValueError as error:
        raise ConfigError(f"--binarization must be none for this run: {error}") from error


def _check_classifying(run: Run, pixel_draws: int, classify_by: str | None) -> None:
    """Raises ConfigError for what this run cannot classify by."""
    has_labels, weights = run.model.has_labels, run.config.objective
    if pixel_draws > 1 and not (has_labels and run.binarization == "dynamic"):
        what = "tells no classes" if not has_labels else f"has pixels as binarization={run.binarization}"
        raise ConfigError(f"--pixel-draws must be 1 for this run, which {what}, got {pixel_draws}")
    if classify_by and not has_labels:
        raise ConfigError("--classify-by must be left out for this run, whose model tells no classes")
    if classify_by not in (None, "classifier") and not (weights.labelled or weights.unlabelled):
        raise ConfigError(f"--classify-by must be classifier for this run of q(y|x) alone, got {classify_by}")


def _part(run: Run, folder: Path) -> str:
    """What to measure on where nobody says it: test data that a run has left for later are looked at by wish alone."""
    from training.result import LEFT, is_left
    from training.run_folder import RESULT, read_json

    result = folder / RESULT
    if not (is_left(read_json(result)) if result.exists() else not run.config.evaluation.test):
        return "both"
    print(f"catvae: {LEFT}; --part test measures on them", file=sys.stderr)
    return "val"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a run folder")
    parser.add_argument("--checkpoint", type=Path, help="a file in its checkpoints/, or a path; default: the newest")
    parser.add_argument(
        "--part",
        choices=PARTS,
        help="what to measure on; if not given, both, or val where evaluation.test=false left test data for later; "
        "labelled and unlabelled are the training images, measured with their true labels (accuracy and calibration: "
        "those that have one)",
    )
    parser.add_argument(
        "--importance-samples",
        type=positive,
        help="draws for log p(x), of z per class or of y without labels; if not given, as the run has it",
    )
    parser.add_argument(
        "--pixel-draws",
        type=positive,
        help="draws of an image's binary pixels, over which q(y|x) is a mean where it is classified; "
        "if not given, the run's own number",
    )
    parser.add_argument(
        "--classify-by",
        choices=[by.value for by in ClassifyBy],
        help="what tells an image's class: q(y|x), Bayes' rule with the bound, or the mean of both; "
        "if not given, what does so in the run",
    )
    parser.add_argument(
        "--first",
        type=positive,
        help="only so many images of each part, the first of them, as many draws take long; where images are sorted by "
        "class, as those of a folder are, they have few classes",
    )
    parser.add_argument(
        "--binarization", choices=[how.value for how in Binarization], help="other pixels than the run was trained with"
    )
    parser.add_argument("--output", type=Path, help="a .json file to write the same to")
    add_data_path(parser)
    add_trust(parser)
    arguments = parser.parse_args()
    with refusing_bad_input():
        if arguments.output:
            writable(arguments.output, (".json",))
            apart({"--output": arguments.output}, (), arguments.folder)

        from training.saved import stored_run

        run = stored_run(arguments.folder, arguments.checkpoint, arguments.trust, arguments.data_path)
        if arguments.binarization:
            _check_pixels(run.config.likelihood, arguments.binarization)
            run.look_at(arguments.binarization)
        _check_classifying(run, arguments.pixel_draws or 1, arguments.classify_by)
        chosen = arguments.part or _part(run, arguments.folder)
        measured = {"steps": float(run.step)}
        for part in PARTS[chosen]:
            measured |= run.measure(
                part, arguments.importance_samples, arguments.first, arguments.pixel_draws, arguments.classify_by
            )
        if len(measured) == 1:
            raise DataError(f"--part {chosen}: the run has no such images")
        text = json.dumps(measured, indent=2)
        if arguments.output:
            arguments.output.write_text(text + "\n")
        print(text)


if __name__ == "__main__":
    main()
