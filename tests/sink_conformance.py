"""What every sink must do. A test module subclasses `SinkConformance` (and `RefusingSinkConformance`,
`ServerSinkConformance` where they apply) and gives the fixture `store`.

The store is asked through its own public interface (`Store.readings`), by code that shares nothing with the sink.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from agent.buffer import Buffer
from agent.clock import SystemClock
from cloud.sinks.contract import EventRecord, GapRecord, Record, RetryLater, ScanRecord, Settled, Sink
from config.agent import Buffer as BufferSettings
from drivers.contract import Point, Priority, Reason, Scan, Value, ValueType
from sync.identity import GatewayName
from sync.wire import EventFrame, GapFrame, Layout, encode_scan, layout_id, layout_of
from tests.fakes.whole_path import receiving, send_all

S = 1_000_000_000
DAY = 86_400 * S
EPOCH = 4_611_686_018_427_387_905  # above 2**53: no double holds it


class Told(msgspec.Struct, frozen=True, order=True):
    """One reading as an auditor finds it."""

    gateway: str
    device: str
    point: str
    taken_at_ns: int
    value: Value | None


class Store(ABC):
    """One empty store, and the sinks on it."""

    remembers: bool  #: whether `open` gives back the offset

    @abstractmethod
    def sink(self) -> Sink:
        """A new sink on this store; several calls give several sinks on the same data."""

    @abstractmethod
    async def readings(self) -> list[Told]:
        """All that is stored, sorted; readings without a value may be left out."""

    def refusable(self) -> Record:
        """A record that this store refuses for what it is."""
        raise NotImplementedError

    def stop(self) -> None:
        """Make the store unreachable."""
        raise NotImplementedError

    def start(self) -> None:
        """Make it reachable again, with its data; returns once it answers."""
        raise NotImplementedError


def layout(*points: tuple[str, str, str], device: str = "boiler", measurement: str = "heating") -> Layout:
    """(name, type, unit) each."""
    n = len(points)
    return Layout(
        device, "modbus", measurement, tuple(p[0] for p in points), tuple(p[1] for p in points),
        tuple(p[2] for p in points), (1.0,) * n, (0.0,) * n, (("site", "north"),),
    )  # fmt: skip


HEATING = layout(("flow", "f64", "Cel"), ("return", "f64", "Cel"), ("starts", "u32", ""))


def scan(
    seq: int,
    values: Sequence[Value | None],
    *,
    at_ns: int,
    of: Layout = HEATING,
    gateway: str = "plant-1",
    reasons: dict[int, Reason] | None = None,
    offset: int | None = None,
    synchronized: bool = True,
    received_at_ns: int | None = None,
) -> ScanRecord:
    return ScanRecord(
        offset if offset is not None else seq, "acme", gateway, EPOCH, seq, of, layout_id(of), at_ns, synchronized,
        received_at_ns if received_at_ns is not None else at_ns + S, list(values), reasons or {},
    )  # fmt: skip


def gap(seq: int, first: int, last: int, readings: int, *, at_ns: int) -> GapRecord:
    said = GapFrame(EPOCH, first, last, last - first + 1, readings, "evicted", "boiler", 1, at_ns - S, at_ns)
    return GapRecord(seq, "acme", "plant-1", EPOCH, seq, said, at_ns - S, at_ns, at_ns + S)


def event(seq: int, *, at_ns: int, text: str = "agent 0.1.0") -> EventRecord:
    said = EventFrame(1, at_ns, "start", text)
    return EventRecord(seq, "acme", "plant-1", EPOCH, seq, said, at_ns, at_ns + S)


def now_ns() -> int:
    """A whole second, a little ago."""
    return (time.time_ns() // S - 60) * S


def some(count: int, *, at_ns: int, first: int = 1) -> list[Record]:
    """`count` scans, a second apart."""
    return [
        scan(seq, (20.5 + seq, 18.25, seq), at_ns=at_ns + (seq - first) * S)
        for seq in range(first, first + count)
    ]


class SinkConformance:
    """Every sink."""

    async def test_what_is_accepted_is_stored_as_it_is(self, store: Store) -> None:
        sink = store.sink()
        await sink.open()
        at_ns = now_ns()
        of = layout(
            ("temperature", "f32", "Cel"), ("count", "i32", ""), ("running", "bool", ""), ("state", "str", ""),
        )  # fmt: skip
        settled = await sink.write(
            [scan(1, (21.5, -7, True, "heißer „Zustand“, ok=1\\"), at_ns=at_ns, of=of)], 1
        )
        assert settled == Settled()
        await sink.close()
        assert await store.readings() == [
            Told("acme/plant-1", "boiler", "count", at_ns, -7),
            Told("acme/plant-1", "boiler", "running", at_ns, True),
            Told("acme/plant-1", "boiler", "state", at_ns, "heißer „Zustand“, ok=1\\"),
            Told("acme/plant-1", "boiler", "temperature", at_ns, 21.5),
        ]

    async def test_written_again_changes_nothing(self, store: Store) -> None:
        sink = store.sink()
        await sink.open()
        records = some(20, at_ns=now_ns())
        await sink.write(records, 20)
        once = await store.readings()
        assert len(once) == 60
        await sink.write(records, 20)
        await sink.write(records[5:15], 20)
        await sink.close()
        again = store.sink()
        await again.open()
        await again.write(records, 20)
        await again.close()
        assert await store.readings() == once

    async def test_two_scans_at_one_instant_are_both_kept(self, store: Store) -> None:
        sink = store.sink()
        await sink.open()
        at_ns = now_ns()
        twins = [scan(1, (20.0, 18.0, 1), at_ns=at_ns), scan(2, (21.0, 18.0, 2), at_ns=at_ns)]
        await sink.write(twins[:1], 1)
        await sink.write(twins[1:], 2)
        await sink.write(twins, 2)
        await sink.close()
        told = await store.readings()
        assert sorted(float(t.value or 0) for t in told if t.point == "flow") == [20.0, 21.0]
        assert len(told) == 6
        assert all(abs(t.taken_at_ns - at_ns) < 1_000_000 for t in told), "its time is right to a millisecond"

    async def test_two_readings_of_one_point_at_one_instant_with_two_priorities_both_arrive(
        self, store: Store, tmp_path: Path
    ) -> None:
        """From the gateway's buffer over intake and journal: an alarm's frame and a normal one, of layouts that name
        the same device and point. The alarm goes first, though it was taken second."""
        layouts = [
            layout_of("boiler", "modbus", "heating", tuple(Point(name=n, type=ValueType.F64) for n in names))
            for names in (("flow", "return"), ("flow",))
        ]
        clock, name = SystemClock(), GatewayName("acme", "plant-1")
        buffer = await Buffer.open(tmp_path / "buffer.db", name, BufferSettings(ballast_kb=0), clock)
        try:
            normal, alarm = map(buffer.register, layouts)
            at_ns = clock.boot_ns()
            flow, back = (Point(name=n, type=ValueType.F64) for n in ("flow", "return"))
            plain = encode_scan(normal, Scan(at_ns, (flow, back), [20.0, 18.0]), buffer.boot)
            urgent = encode_scan(alarm, Scan(at_ns, (flow,), [95.0]), buffer.boot)
            assert buffer.append(plain, 2, Priority.NORMAL)
            assert buffer.append(urgent, 1, Priority.ALARM)
            assert await buffer.commit()
            async with receiving(tmp_path, name) as cloud:
                while await send_all(buffer, cloud):
                    pass
                records = [r for r in await cloud.records() if isinstance(r, ScanRecord)]
        finally:
            await buffer.close()
        assert [list(r.values) for r in records] == [[95.0], [20.0, 18.0]]
        assert len({r.taken_at_ns for r in records}) == 1
        sink = store.sink()
        await sink.open()
        await sink.write(records, 1)
        await sink.write(records, 2)
        await sink.close()
        told = await store.readings()
        assert sorted((t.point, t.value) for t in told) == [("flow", 20.0), ("flow", 95.0), ("return", 18.0)]
        assert max(t.taken_at_ns for t in told) - min(t.taken_at_ns for t in told) < 1_000_000

    async def test_a_thousand_scans_at_one_instant_are_all_kept_whatever_is_sent_again(
        self, store: Store
    ) -> None:
        """In batches, each sent twice, once out of turn, by a sink that is closed and opened in between."""
        sink = store.sink()
        await sink.open()
        at_ns = now_ns()
        crowd: list[Record] = [
            scan(seq, (float(seq), 18.0, seq), at_ns=at_ns) for seq in range(4_990, 5_990)
        ]  # fmt: skip
        for start in range(0, 1_000, 250):
            await sink.write(crowd[start : start + 250], start + 250)
            await sink.write(crowd[start : start + 250], start + 250)
        await sink.close()
        again = store.sink()
        await again.open()
        for start in (500, 125, 0, 750):
            await again.write(crowd[start : start + 250], 1_000)
        await again.close()
        told = await store.readings()
        assert len(told) == 3_000
        assert sorted(float(t.value or 0) for t in told if t.point == "flow") == [
            float(seq) for seq in range(4_990, 5_990)
        ]
        assert all(abs(t.taken_at_ns - at_ns) < 1_000 for t in told)

    async def test_what_is_removed_goes_and_nothing_else(self, store: Store) -> None:
        """A stretch that is all of one kind, scans among others, one of two at an instant, what was never there."""
        sink = store.sink()
        await sink.open()
        at_ns = now_ns() - 3_600 * S
        pump = layout(("flow", "f64", "Cel"), device="pump")
        wrong = [
            scan(seq, (1.0, 1.0, seq), at_ns=at_ns + (seq - 1_000) * S, synchronized=False)
            for seq in range(1_001, 1_101)
        ]
        between = [scan(500 + i, (2.0, 2.0, i), at_ns=at_ns + (40 + i) * S + S // 2) for i in range(3)]
        twin = scan(700, (3.0, 3.0, 3), at_ns=wrong[10].taken_at_ns)
        others: list[Record] = [*between, twin, scan(800, (4.0,), at_ns=at_ns + 20 * S, of=pump)]
        said: list[Record] = [event(900, at_ns=at_ns + 5 * S), gap(901, 4, 8, 15, at_ns=at_ns + 6 * S)]
        await sink.write([*wrong, *others, *said], 1_000)
        never = scan(999, (9.0, 9.0, 9), at_ns=at_ns + 30 * S + 7)
        await sink.remove([*wrong, *said, never])
        await sink.remove([*wrong[:5], never])
        left = await store.readings()
        assert sorted((t.device, t.value) for t in left if t.point == "flow") == [
            ("boiler", 2.0), ("boiler", 2.0), ("boiler", 2.0), ("boiler", 3.0), ("pump", 4.0),
        ]  # fmt: skip
        right = [
            msgspec.structs.replace(r, taken_at_ns=r.taken_at_ns + 30 * S, clock_synchronized=True)
            for r in wrong
        ]
        await sink.write([*right, *said], 1_000)
        await sink.write([*right, *others], 1_000)
        await sink.close()
        flow = sorted(
            t.taken_at_ns // S for t in await store.readings() if t.value == 1.0 and t.point == "flow"
        )
        assert flow == [r.taken_at_ns // S for r in right]
        assert len(await store.readings()) == 313

    async def test_the_offset_is_remembered_with_the_records_or_not_at_all(self, store: Store) -> None:
        sink = store.sink()
        first = await sink.open()
        assert first in ((0,) if store.remembers else (None,))
        at_ns = now_ns()
        await sink.write(some(3, at_ns=at_ns), 3)
        await sink.write((), 9)
        await sink.close()
        again = store.sink()
        assert await again.open() == (9 if store.remembers else None)
        # The same offset with other records: a bisection's halves come so.
        await again.write(some(3, at_ns=at_ns, first=4), 9)
        await again.close()
        assert len(await store.readings()) == 18

    async def test_out_of_order_and_30_days_late_are_accepted(self, store: Store) -> None:
        sink = store.sink()
        await sink.open()
        at_ns = now_ns()
        late = [
            scan(n, (1.0 * n, 18.0, n), at_ns=at_ns - days * DAY, received_at_ns=at_ns)
            for n, days in enumerate((0, 29, 3, 15, 1, 2), start=1)
        ]
        assert await sink.write(late, 6) == Settled()
        assert await sink.write([scan(7, (0.5, 18.0, 7), at_ns=at_ns - 29 * DAY - S, received_at_ns=at_ns)], 7) == (
            Settled()
        )  # fmt: skip
        await sink.close()
        flow = [t for t in await store.readings() if t.point == "flow"]
        assert sorted((t.taken_at_ns, t.value) for t in flow) == sorted(
            [(r.taken_at_ns, r.values[0]) for r in late] + [(at_ns - 29 * DAY - S, 0.5)]
        )

    async def test_readings_without_a_value_do_not_hide_the_others(self, store: Store) -> None:
        sink = store.sink()
        await sink.open()
        at_ns = now_ns()
        records: list[Record] = [
            scan(1, (None, 18.0, 1), at_ns=at_ns, reasons={0: Reason.TIMEOUT}),
            scan(2, (None, None, None), at_ns=at_ns + S, reasons=dict.fromkeys(range(3), Reason.DISCONNECTED)),
            scan(3, (99.0, 18.5, 2), at_ns=at_ns + 2 * S, reasons={0: Reason.RANGE}, synchronized=False),
        ]  # fmt: skip
        assert await sink.write(records, 3) == Settled()
        await sink.close()
        told = [t for t in await store.readings() if t.value is not None]
        assert [(t.point, t.value) for t in told] == [
            ("flow", 99.0), ("return", 18.0), ("return", 18.5), ("starts", 1), ("starts", 2),
        ]  # fmt: skip

    async def test_gaps_and_events_are_settled_once_and_harm_nothing(self, store: Store) -> None:
        sink = store.sink()
        await sink.open()
        at_ns = now_ns()
        records: list[Record] = [
            event(1, at_ns=at_ns), *some(2, at_ns=at_ns, first=2), gap(9, 4, 8, 15, at_ns=at_ns),
        ]  # fmt: skip
        assert await sink.write(records, 1) == Settled()
        assert await sink.write(records, 1) == Settled()
        await sink.close()
        assert len(await store.readings()) == 6

    async def test_closing_twice_or_unopened_and_maintaining_are_harmless(self, store: Store) -> None:
        sink = store.sink()
        await sink.close()
        await sink.open()
        at_ns = now_ns()
        await sink.write(some(2, at_ns=at_ns), 2)
        await sink.maintain(time.time_ns())
        await sink.close()
        await sink.close()
        await sink.open()
        await sink.write(some(2, at_ns=at_ns), 2)
        await sink.close()
        assert len(await store.readings()) == 6


class RefusingSinkConformance(SinkConformance):
    """A sink that refuses some records for what they are; its store gives one by `refusable`."""

    async def test_a_refused_record_leaves_the_rest(self, store: Store) -> None:
        sink = store.sink()
        await sink.open()
        records = some(4, at_ns=now_ns())
        records.insert(2, store.refusable())
        settled = await sink.write(records, 5)
        await sink.close()
        assert [r.index for r in settled.rejected] == [2]
        assert settled.rejected[0].reason
        assert len(await store.readings()) == 12


class ServerSinkConformance(SinkConformance):
    """A sink with a server behind it; its store can `stop` and `start` that."""

    async def test_a_stopped_store_asks_for_patience_and_then_takes_all(self, store: Store) -> None:
        sink = store.sink()
        await sink.open()
        at_ns = now_ns()
        await sink.write(some(2, at_ns=at_ns), 2)
        store.stop()
        more = some(3, at_ns=at_ns + 2 * S, first=3)
        with pytest.raises(RetryLater):
            await sink.write(more, 5)
        other = store.sink()
        with pytest.raises(RetryLater):
            await other.open()
        await other.close()
        store.start()
        deadline = time.monotonic() + 60
        while True:
            try:
                settled = await sink.write(more, 5)
                break
            except RetryLater:
                assert time.monotonic() < deadline
        assert settled == Settled()
        await sink.close()
        assert len(await store.readings()) == 15
