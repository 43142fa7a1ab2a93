"""Ctrl-C and what ends a run from outside finish the step in hand; one more, later, ends the process at once."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

# of a terminal that closes, and of clusters: SIGTERM ends a job, SIGUSR1 and SIGUSR2 warn of its time limit
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))  # Windows has two of them
HANGUP = getattr(signal, "SIGHUP", None)
IN_SLURM = "SLURM_JOB_ID"  # which warns by several signals, minutes apart, and ends what does not heed them by SIGKILL
ONE_STOP = 2.0  # seconds in which several are one: a scheduler sends a signal to a process and to its group


class ProcessLost(Exception):
    """Another process of this run is no more."""


class Interrupted(Exception):
    """Work was left off because of a signal."""


class Interruption:
    """While entered, remembers the first of SIGNALS instead of dying of it; what nohup has ignored stays ignored."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._first = 0.0

    def __enter__(self) -> Interruption:
        heeded = [number for number in SIGNALS if number != HANGUP or signal.getsignal(number) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._remember) for number in heeded}
        return self

    def __exit__(self, kind: object, error: object, *_: object) -> None:
        for number, handler in self._previous.items():  # torchrun ends all processes of a run once it has lost one
            signal.signal(number, signal.SIG_IGN if isinstance(error, ProcessLost) else handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._first = number, time.monotonic()
        elif IN_SLURM in os.environ and number != signal.SIGINT:
            return
        elif time.monotonic() - self._first > ONE_STOP:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def heed(self, code: int) -> None:
        """Stops as if there had been the signal of an exit code, which another process of the run was sent."""
        self.signal = self.signal or code - 128

    def check(self) -> None:
        """Raises Interrupted if there was a signal: for work that takes longer than a person waits."""
        if self.signal is not None:
            raise Interrupted

    @property
    def exit_code(self) -> int | None:
        """128 + the signal's number, as shells have it; None while there was none."""
        return None if self.signal is None else 128 + self.signal
