"""What a driver does to the process it runs in, measured: the event loop held up, files, tasks, threads, memory.

Nothing here judges; `drivers.conformance` does. Only the standard library.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import threading
import traceback
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Final

_LOOK_S: Final = 0.02  #: between two looks at the loop
_NAME: Final = "headgate-watch"
#: What a test's own side of the wire keeps (a log of requests, say) is no leak of the driver's.
_NOT_THE_DRIVERS: Final = (
    tracemalloc.Filter(inclusive=False, filename_pattern="<*"),
    tracemalloc.Filter(inclusive=False, filename_pattern=tracemalloc.__file__),
    tracemalloc.Filter(inclusive=False, filename_pattern=__file__),
    tracemalloc.Filter(inclusive=False, filename_pattern="*/conformance.py"),
    tracemalloc.Filter(inclusive=False, filename_pattern="*/_pytest/*"),
    tracemalloc.Filter(inclusive=False, filename_pattern="*/linecache.py"),
    # Timers that were cancelled stay in the loop's heap until there are a hundred; what they would call is counted.
    tracemalloc.Filter(inclusive=False, filename_pattern="*/asyncio/base_events.py"),
    tracemalloc.Filter(inclusive=False, filename_pattern="*/asyncio/events.py"),
    tracemalloc.Filter(inclusive=False, filename_pattern="*/asyncio/timeouts.py"),
)


def open_files() -> int:
    """How many descriptors this process holds; 0 where that cannot be told."""
    files = Path("/proc/self/fd")
    return sum(1 for _ in files.iterdir()) if files.exists() else 0


def busy_threads() -> dict[int, str]:
    """Every other thread that is at work, and where. An idle worker of a thread pool is not."""
    found: dict[int, str] = {}
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        if ident == threading.get_ident() or names.get(ident, _NAME) == _NAME:
            continue
        waits = frame.f_code.co_name == "_worker" and "concurrent" in frame.f_code.co_filename
        if not waits:
            found[ident] = _where(frame)
    return found


class LoopWatch:
    """How long the event loop stood still at most, and in which line.

    A thread looks at the loop's own tick. It counts its own looks rather than the clock, so that a machine too busy to
    run either of them is not taken for a driver that blocks.
    """

    def __init__(self) -> None:
        self.longest_s = 0.0
        self.where = ""
        self._ticks = 0
        self._over = threading.Event()

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        ticking = asyncio.create_task(self._tick(), name=_NAME)
        looking = threading.Thread(target=self._look, args=(threading.get_ident(),), name=_NAME, daemon=True)
        looking.start()
        try:
            yield
            await asyncio.sleep(2 * _LOOK_S)  # what blocked last is seen too
        finally:
            self._over.set()
            ticking.cancel()
            looking.join()

    async def _tick(self) -> None:
        while True:
            self._ticks += 1
            await asyncio.sleep(_LOOK_S)

    def _look(self, loop_thread: int) -> None:
        seen, looks = -1, 0
        while not self._over.wait(_LOOK_S):
            if self._ticks != seen:
                seen, looks = self._ticks, 0
                continue
            looks += 1
            if looks * _LOOK_S > self.longest_s:
                self.longest_s = looks * _LOOK_S
                frame = sys._current_frames().get(loop_thread)
                self.where = _where(frame) if frame is not None else "an unknown place"


class MemoryWatch:
    """Bytes that were allocated since `start` and are still held, by line."""

    def __init__(self, peer_files: tuple[str, ...] = ()) -> None:
        """`peer_files`: the files of the test's own side of the wire."""
        self._filters = (
            *_NOT_THE_DRIVERS,
            *(tracemalloc.Filter(inclusive=False, filename_pattern=name) for name in peer_files),
        )
        self._before: tracemalloc.Snapshot | None = None

    def look(self) -> tuple[int, str]:
        """Bytes more than at the last look, and the three lines that hold most of them."""
        gc.collect()
        now = tracemalloc.take_snapshot().filter_traces(self._filters)
        before, self._before = self._before, now
        if before is None:
            return 0, ""
        grown = now.compare_to(before, "lineno")
        most = [
            f"{stat.size_diff:+d} B at {stat.traceback[0].filename}:{stat.traceback[0].lineno}"
            for stat in sorted(grown, key=lambda stat: -stat.size_diff)[:3]
        ]
        return sum(stat.size_diff for stat in grown), "; ".join(most)


@contextlib.contextmanager
def traced() -> Iterator[Callable[[tuple[str, ...]], MemoryWatch]]:
    """Memory is traced inside."""
    was_on = tracemalloc.is_tracing()
    if not was_on:
        tracemalloc.start()
    try:
        yield MemoryWatch
    finally:
        if not was_on:
            tracemalloc.stop()


def _where(frame: FrameType) -> str:
    """The innermost line of a stack, and the innermost that is not the standard library's."""
    stack = traceback.extract_stack(frame)
    last = stack[-1]
    ours = next((at for at in reversed(stack) if "/lib/python" not in at.filename), last)
    text = f"{ours.filename}:{ours.lineno} in {ours.name}: {ours.line}"
    return text if ours is last else f"{text} (inside {last.name} of {Path(last.filename).name})"
