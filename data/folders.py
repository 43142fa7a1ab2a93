"""Folders that a command makes, and takes back where it is refused after all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Makes a folder, and those above it, for what is done inside.

    If that ends with an error, or the folder cannot be made, those that were not there before go again; of these, one
    that has something in it stays. Raises OSError.
    """
    missing = [place for place in (folder, *folder.parents) if not os.path.exists(place)]  # innermost first
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for place in missing:
            with suppress(OSError):
                place.rmdir()
        raise
