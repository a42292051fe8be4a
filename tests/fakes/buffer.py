"""What tests of the buffer share: clocks that stand still, frames that can be told apart, and a model of the cloud."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import msgspec

from agent.clock import ClockReading
from agent.store import Batch, Group, Limits, Store
from drivers.contract import Point, Scan, ValueType
from sync.identity import GatewayName
from sync.wire import (
    Ack,
    EventFrame,
    Frame,
    GapFrame,
    Packing,
    ScanFrame,
    decode_frame,
    encode_scan,
    layout_of,
    open_body,
)

GATEWAY = GatewayName("acme", "plant-1")
START_NS = 1_000 * 10**9
WALL_NS = 1_700_000_000 * 10**9


class StillClock:
    """Time moves only when told."""

    def __init__(self, boot_id: str = "boot-a") -> None:
        self.boot_id = boot_id
        self.now_ns = START_NS
        self.offset_ns = WALL_NS
        self.synchronized = True

    def boot_ns(self) -> int:
        return self.now_ns

    def read(self) -> ClockReading:
        return ClockReading(self.now_ns, self.now_ns + self.offset_ns, self.synchronized, 1_000)

    def pass_s(self, seconds: float) -> None:
        self.now_ns += int(seconds * 1e9)


POINTS = (Point(name="n", type=ValueType.U32), Point(name="text", type=ValueType.STR))
PACKING = Packing(layout_of("boiler", "test", "boiler", POINTS))
READINGS = len(POINTS)


def scan(number: int, *, boot: int = 1, taken_at_ns: int | None = None, size: int = 10) -> bytes:
    """A frame that carries its own number."""
    at_ns = START_NS + number * 10**6 if taken_at_ns is None else taken_at_ns
    return encode_scan(PACKING, Scan(at_ns, POINTS, [number, "x" * size]), boot)


def number_of(frame: bytes | msgspec.Raw) -> int | None:
    """The number of a frame made by `scan`; None for gaps and events."""
    decoded = decode_frame(frame)
    if not isinstance(decoded, ScanFrame):
        return None
    value = PACKING.unpack(decoded.values, decoded.texts)[0]
    assert isinstance(value, int)
    return value


def group(*numbers: int, size: int = 10, boot: int = 1) -> Group:
    frames = [scan(n, size=size, boot=boot) for n in numbers]
    return Group(
        frames, [READINGS] * len(frames), [PACKING.layout], size_bytes=sum(len(f) + 16 for f in frames)
    )


def opened(
    folder: Path, clock: StillClock | None = None, *, max_bytes: int = 64 * 2**20, max_age_ns: int = 0
) -> Store:
    store = Store(
        folder / "buffer.db",
        str(GATEWAY),
        Limits(max_bytes=max_bytes, max_age_ns=max_age_ns),
        clock or StillClock(),
    )
    store.open()
    return store


def bounds(batch: Batch) -> tuple[int, int]:
    return batch.sealed.first, batch.sealed.last


class Failing:
    """A connection that fails at a statement, before or after it is carried out, with SQLite's own code."""

    def __init__(self, conn: sqlite3.Connection, at: str, code: int, *, late: bool) -> None:
        self._conn, self._at, self._code, self._late = conn, at, code, late
        self.failures = 1

    def execute(self, sql: str, *args: object) -> sqlite3.Cursor:
        if sql.startswith(self._at) and self.failures:
            self.failures -= 1
            if self._late:
                self._conn.execute(sql, *args)  # type: ignore[arg-type]  # passed through as it came
            error = sqlite3.OperationalError("made to fail")
            error.sqlite_errorcode = self._code
            raise error
        return self._conn.execute(sql, *args)  # type: ignore[arg-type]  # passed through as it came

    def __getattr__(self, name: str) -> object:
        return getattr(self._conn, name)


class ModelCloud:
    """Holds what was sent to it, each (epoch, seq) once, and never believes two contents for one."""

    def __init__(self) -> None:
        self.held: dict[tuple[int, int], bytes] = {}
        self.seen: dict[tuple[int, int, int], bytes] = {}
        self.needs_clocks = True  #: a salvaged frame whose clock row was lost has none

    def take(self, payload: bytes) -> Ack:
        head, body = open_body(payload)
        assert head.gateway == str(GATEWAY)
        key = (head.epoch, head.first, head.last)
        same = self.seen.setdefault(key, payload) == payload
        assert same or not self.needs_clocks, f"{key} was sent with other bytes than before"
        named = {packing.id for packing in map(Packing, body.layouts)}
        clocked = {row.boot for row in body.clocks}
        readings = 0
        for seq, raw in enumerate(body.frames, head.first):
            frame = decode_frame(raw)
            if isinstance(frame, ScanFrame):
                assert frame.layout in named
                readings += READINGS
            assert frame.boot in clocked or not self.needs_clocks
            held = self.held.setdefault((head.epoch, seq), bytes(raw))
            assert held == bytes(raw), f"seq {seq} came with two contents"
        assert readings == head.readings
        return Ack(head.epoch, ((head.first, head.last),))

    def frames(self) -> list[Frame]:
        return [decode_frame(data) for data in self.held.values()]

    def numbers(self) -> list[int]:
        """The numbers of the scans held, in order of seq."""
        found = (number_of(self.held[key]) for key in sorted(self.held))
        return [n for n in found if n is not None]

    def gaps(self) -> list[GapFrame]:
        return [frame for frame in self.frames() if isinstance(frame, GapFrame)]

    def events(self) -> list[EventFrame]:
        return [frame for frame in self.frames() if isinstance(frame, EventFrame)]


def drain(store: Store, cloud: ModelCloud) -> None:
    """Send everything, acknowledge everything."""
    for _ in range(10_000):
        settled: list[tuple[int, int]] = []
        for record in store.recorded():
            for batch in store.rebuild(record.first, record.last):
                settled += cloud.take(batch.sealed.payload).ranges
        settled += [r for batch in store.claim(4, settled) for r in cloud.take(batch.sealed.payload).ranges]
        store.commit(Group([], []), settled, 0)
        if store.ledger.held_frames == 0:
            return
    raise AssertionError(f"{store.ledger.held_frames} frames never went out")
