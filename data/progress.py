"""How far long work is: a bar on a terminal, and a line every half minute elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
LINE_EVERY = 30.0  # seconds, where there is no terminal for a bar
BAR_AFTER = 1.0  # seconds, on a terminal


def progress(items: Iterable[Item], doing: str, units: str, total: int | None = None) -> Iterator[Item]:
    """The same items, and how many of them are done; `total` where they have no length."""
    number = total if total is not None else len(items) if isinstance(items, Sized) else 0
    with telling(doing, units, number) as tell:
        for item in items:
            yield item
            tell(1)


@contextmanager
def telling(doing: str, units: str, total: int) -> Iterator[Callable[[int], None]]:
    """What is called with how much more of `total` is done. Silent in the jobs of a parallel sweep (TQDM_DISABLE)."""
    from tqdm import tqdm

    line, done = Line(), 0
    with tqdm(
        total=total,
        desc=doing,
        unit=units,
        delay=BAR_AFTER,
        leave=False,
        dynamic_ncols=True,
        disable=is_silent() or None,  # None is: where standard error is no terminal
    ) as bar:

        def tell(more: int) -> None:
            nonlocal done
            done += more
            bar.update(more)
            if done < total and line.is_due():
                print(f"{doing}: {done} of {total} {units}", file=sys.stderr, flush=True)

        yield tell


def is_silent() -> bool:
    return bool(os.environ.get("TQDM_DISABLE"))


class Line:
    """Whether another line is due, half a minute after the one before; never where a bar tells it, or is unwanted."""

    def __init__(self) -> None:
        self.said = time.monotonic()

    def is_due(self) -> bool:
        now = time.monotonic()
        if now - self.said < LINE_EVERY or sys.stderr.isatty() or is_silent():
            return False
        self.said = now
        return True
