"""A sink in memory that does as it is told: for the runner's tests. It passes the sinks' conformance suite."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from cloud.decode import at_ns
from cloud.sinks.contract import Record, Rejection, ScanRecord, Settled, SinkRefused


class MemorySink:
    """Remembers what it was given by (gateway, epoch, seq), and every call."""

    def __init__(self, name: str = "memory", *, remembers: bool = False) -> None:
        self.name = name
        self.max_records = 1_000
        self.max_bytes = 1024 * 1024
        self.linger_s = 0.0
        self.remembers = remembers
        self.held: dict[tuple[str, int, int], Record] = {}
        self.offset = 0
        self.calls: list[tuple[tuple[int, ...], int]] = []  #: the seqs and the offset of each write
        self.opened = self.closed = self.maintained = 0
        self.fails: deque[Exception] = (
            deque()
        )  #: raised by the next writes, one each, before anything is held
        self.fails_open: deque[Exception] = deque()
        self.poison: set[int] = set()  #: seqs that make a whole call fail with `SinkRefused`
        self.crashes: set[int] = set()  #: seqs that make it fail with an error of no contract
        self.reject: dict[int, Rejection] = {}  #: seq to how it is rejected (index is filled in)
        self.gate = asyncio.Event()  #: cleared: writes wait
        self.gate.set()
        self.on_write: Callable[[], None] = lambda: None

    async def open(self) -> int | None:
        self.opened += 1
        if self.fails_open:
            raise self.fails_open.popleft()
        return self.offset if self.remembers else None

    async def write(self, records: Sequence[Record], upto_offset: int) -> Settled:
        await self.gate.wait()
        self.calls.append((tuple(record.seq for record in records), upto_offset))
        if self.fails:
            raise self.fails.popleft()
        for record in records:
            if record.seq in self.crashes:
                raise KeyError(f"seq {record.seq}")
            if record.seq in self.poison:
                raise SinkRefused("something in there is refused")
        rejected = []
        for index, record in enumerate(records):
            rejection = self.reject.get(record.seq)
            if rejection is not None:
                rejected.append(Rejection(index, rejection.reason, rejection.points))
                if not rejection.points:
                    continue
            self.held[f"{record.tenant}/{record.gateway}", record.epoch, record.seq] = record
        self.offset = upto_offset
        self.on_write()
        return Settled(tuple(rejected))

    async def remove(self, records: Sequence[Record]) -> None:
        for record in records:
            key = (f"{record.tenant}/{record.gateway}", record.epoch, record.seq)
            held = self.held.get(key)
            if held is not None and at_ns(held) == at_ns(record):
                del self.held[key]

    async def maintain(self, now_ns: int) -> None:
        self.maintained += 1

    async def close(self) -> None:
        self.closed += 1

    def seqs(self) -> list[int]:
        """What is held, in order."""
        return sorted(seq for _, _, seq in self.held)

    def scans(self) -> list[ScanRecord]:
        return [record for _, record in sorted(self.held.items()) if isinstance(record, ScanRecord)]
