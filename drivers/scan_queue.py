"""Between a callback that must not wait and a consumer that may be late: scans in order, bounded, and how it ended.

When it is full the oldest scan goes, since the newest tells more about now; the driver counts it in its `overruns`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from drivers.contract import DeviceUnreachable, Scan

SIZE_SCANS = 1_024


class ScanQueue:
    """One producer on the event loop, one consumer on the same loop."""

    __slots__ = ("_end", "_scans", "_size_scans", "_wake")

    def __init__(self, size_scans: int = SIZE_SCANS) -> None:
        self._size_scans = size_scans
        self._scans: deque[Scan] = deque()
        self._wake = asyncio.Event()
        self._end: DeviceUnreachable | None = DeviceUnreachable("not connected")

    def __len__(self) -> int:
        return len(self._scans)

    def begin(self) -> None:
        """Connected: what was there before is of no interest."""
        self._scans.clear()
        self._end = None

    def put(self, scan: Scan) -> int:
        """How many scans had to go: 0 or 1."""
        dropped = 0
        if len(self._scans) >= self._size_scans:
            self._scans.popleft()
            dropped = 1
        self._scans.append(scan)
        self._wake.set()
        return dropped

    def end(self, error: DeviceUnreachable) -> None:
        """Nothing more comes until `begin`; what is here is still given out first."""
        self._end = error
        self._wake.set()

    async def drain(self) -> AsyncIterator[Scan]:
        """The scans as they come; raises what `end` was given."""
        scans = self._scans
        while True:
            while scans:
                yield scans.popleft()
            if self._end is not None:
                raise self._end
            self._wake.clear()
            await self._wake.wait()
