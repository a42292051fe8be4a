"""An event loop whose waiting takes no time, to see how long a scan of a modelled line would take."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _NoWaiting(selectors.DefaultSelector):
    """Does not wait, and notes how long it should have."""

    skipped_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout:
            self.skipped_s += timeout
        return ready


class QuickLoop(asyncio.SelectorEventLoop):
    """Its clock jumps to the next timer where there is nothing else to do. For what waits for nobody outside."""

    def __init__(self) -> None:
        self._no_waiting = _NoWaiting()
        super().__init__(self._no_waiting)

    def time(self) -> float:
        return super().time() + self._no_waiting.skipped_s


def run_quickly(work: Coroutine[Any, Any, T]) -> tuple[T, float]:
    """What it gives, and how long it would have taken."""
    with asyncio.Runner(loop_factory=QuickLoop) as runner:
        loop = runner.get_loop()
        began_s = loop.time()
        return runner.run(work), loop.time() - began_s
