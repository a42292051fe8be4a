"""Named places where a test may end the process: proof that a crash there loses nothing.

Rules:
1. Nothing happens unless `HEADGATE_FAILPOINT` is set when the process starts; then `reached` is one comparison.
2. `HEADGATE_FAILPOINT=store.before_commit:3` kills the process (SIGKILL: no clean-up, as in a power cut of the
   process) when that place is reached for the third time.
3. A name says the part and the moment: `part.before_x` / `part.after_x`. Each name stands in the code exactly once;
   `tests/torture/crash_points.py` finds them all there and kills at each.
4. A place is reached per batch or transaction, never per reading.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Final

VARIABLE: Final = "HEADGATE_FAILPOINT"


class Failpoint:
    """Counts how often one name is reached, and ends the process at the given time."""

    __slots__ = ("_end", "left", "name")

    def __init__(self, told: str, end: Callable[[], object]) -> None:
        """`told`: "name" or "name:n" with n from 1. Raises `ValueError`."""
        self.name, _, nth = told.partition(":")
        self.left = int(nth or 1)
        if not self.name or self.left < 1:
            raise ValueError(f"{VARIABLE}={told!r}: give a name, or name:n with n from 1")
        self._end = end

    def reached(self, name: str) -> None:
        if name == self.name:
            self.left -= 1
            if self.left == 0:
                self._end()


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


_armed: Final = Failpoint(told, _kill) if (told := os.environ.get(VARIABLE)) else None


def reached(name: str) -> None:
    """The program is at the place `name`. May not return."""
    if _armed is not None:
        _armed.reached(name)
