"""Puts runs side by side: groups them by what differs in their configurations, and compares the groups.

uv run python -m scripts.compare outputs/sweeps/DATE/TIME-NAME

A FOLDER is a run folder, a sweep's folder, or any folder above some. Runs that differ in nothing but seed and
data.split_seed are draws of one group, with a mean, a standard deviation and a 95 % interval (Student's t). Validation
accuracy sorts, and chooses what is best; differences from a baseline group are in test accuracy, on which nothing is
chosen, over the draws that both have: same split, same seed. Runs without result.json count in no mean, and are listed.
Prints tables, and writes compare.html, compare.md, compare.tex and compare.csv, and by --figures each figure.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from configs.schema import ConfigError
from configs.wording import printable
from data.folders import made
from scripts.command import refusing_bad_input
from scripts.comparison.runs import METRICS, OVERRIDES, read_all

OUTPUT = "compare"  # folder and files


def output_folder(folders: Sequence[Path], given: Path | None) -> Path:
    """compare/ in the first folder, or next to it if it is a run's. Raises ConfigError for a link and for a file."""
    if given is not None:
        if given.suffix in (".csv", ".md", ".tex", ".html"):
            raise ConfigError(f"--output must be a folder, which gets a file of each kind, got {given}")
        return given
    first = folders[0].resolve()
    is_run = (first / OVERRIDES).is_file() or (first / "result.json").exists()
    output = (first.parent if is_run else first) / OUTPUT
    if output.is_symlink():
        raise ConfigError(f"{output} is a link, to be written through; --output DIR writes to another folder, or to it")
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="runs, or folders that have some below")
    parser.add_argument("--metric", choices=list(METRICS), help="what to sort and choose by (default: val_accuracy)")
    parser.add_argument("--baseline", metavar="GROUP", help="a group's name in the table (default: the best group)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="default: compare/ in the first FOLDER, or next to it if it is a run"
    )
    parser.add_argument("--figures", action="store_true", help="also write each figure of the page as an .svg file")
    arguments = parser.parse_args()
    with refusing_bad_input():
        from scripts.comparison.figure_files import figure_files
        from scripts.comparison.groups import compare
        from scripts.comparison.latex import as_latex
        from scripts.comparison.page import page
        from scripts.comparison.report import as_csv, as_markdown, as_text
        from training.checkpoints import write_atomically

        output = output_folder(arguments.folders, arguments.output)
        records, notes = read_all(arguments.folders)
        comparison = compare(records, notes, arguments.metric, arguments.baseline)
        html = page(comparison)
        tables = {"csv": as_csv, "md": as_markdown, "tex": as_latex}
        contents = {**{suffix: table(comparison) for suffix, table in tables.items()}, "html": html}
        files = {f"{OUTPUT}.{suffix}": content for suffix, content in contents.items()}
        files |= figure_files(html) if arguments.figures else {}
        with made(output):
            for name, content in files.items():
                write_atomically(output / name, content.encode(errors="replace"))
        print(printable(as_text(comparison)), end="\n\n")
        for name in files:
            print(output / name)


if __name__ == "__main__":
    main()
