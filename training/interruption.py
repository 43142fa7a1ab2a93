"""Ctrl-C, SIGTERM and SIGUSR2 (a cluster's warning) finish the step in hand; a second one ends the process at once."""

from __future__ import annotations

import signal
from types import FrameType

# Windows has no SIGUSR2
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR2") if hasattr(signal, name))


class Interrupted(Exception):
    """Work was left off because of a signal."""


class Interruption:
    """While entered, remembers the first of SIGNALS instead of dying of it."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> Interruption:
        self._previous = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)

    def check(self) -> None:
        """Raises Interrupted if there was a signal: for work that takes longer than a person waits."""
        if self.signal is not None:
            raise Interrupted

    @property
    def exit_code(self) -> int | None:
        """128 + the signal's number, as shells have it; None while there was none."""
        return None if self.signal is None else 128 + self.signal
