"""The runner delivers everything once, isolates what is refused, and never lets one sink delay another."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from cloud.dead_letters import DeadLetters, DeadLettersError, NewLetter
from cloud.decode import Decoder
from cloud.journal.contract import Entry, EntryDamaged, Stored
from cloud.journal.sqlite import SqliteJournal
from cloud.registry import SeriesGuard
from cloud.runner import MAX_FAILURES, MAX_LETTERS, MAX_PIECE_BYTES, SinkRunner
from cloud.sinks.contract import (
    GapRecord,
    Rejection,
    RetryLater,
    ScanRecord,
    SinkBroken,
    StoreChanged,
)
from cloud.sinks.embedded import EmbeddedSink
from drivers.contract import Point, Scan, ValueType
from sync.wire import (
    ClockRow,
    EventFrame,
    GapFrame,
    Packing,
    encode_frame,
    encode_scan,
    layout_of,
    seal,
)
from tests.fakes.memory_sink import MemorySink
from tests.sink_conformance import RefusingSinkConformance, Store, Told, now_ns, scan

S = 1_000_000_000
GATEWAY = "acme/plant-1"
EPOCH = 7
WALL_NS = 1_795_000_000 * S
POINTS = tuple(Point(name=name, type=ValueType.U16) for name in ("a", "b", "c"))
LAYOUT = layout_of("boiler", "modbus", "heating", POINTS)
PACKING = Packing(LAYOUT)
UNKNOWN_FRAME = b"\x91\x63"  # of a kind that no version knows yet
CLOCKS = (ClockRow(1, "boot", 0, WALL_NS, True),)


def frame(seq: int) -> bytes:
    return encode_scan(PACKING, Scan(seq * S, POINTS, (seq, 2, 3)), boot=1)


def entry(first: int, frames: Sequence[bytes], *, gateway: str = GATEWAY) -> Entry:
    sealed = seal(gateway, EPOCH, first, frames, [LAYOUT], CLOCKS, 3 * len(frames))
    return Entry(
        gateway,
        EPOCH,
        first,
        sealed.last,
        3 * len(frames),
        WALL_NS + (sealed.last + 1) * S,
        sealed.payload,
    )


def batch(first: int, count: int, *, gateway: str = GATEWAY) -> Entry:
    return entry(first, [frame(seq) for seq in range(first, first + count)], gateway=gateway)


async def until(done: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, "it never came to that"
        await asyncio.sleep(0.002)


class Fixture:
    """A journal, dead letters and a sink; runners are made of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.journal = SqliteJournal(folder / "journal.db", commit_interval_s=0.0)
        self.dead_letters = DeadLetters(folder / "dead_letters.db")
        self.sink = MemorySink()

    def runner(
        self,
        sink: MemorySink | EmbeddedSink | None = None,
        *,
        guard: SeriesGuard | None = None,
        rng: random.Random | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
        dead_letters: DeadLetters | None = None,
        maintain_s: float = 3600.0,
    ) -> SinkRunner:
        return SinkRunner(
            sink or self.sink, self.journal, dead_letters or self.dead_letters, guard=guard, rng=rng, clock_ns=clock_ns,
            retry_base_s=0.01, retry_cap_s=0.05, broken_retry_s=0.05, maintain_s=maintain_s,
        )  # fmt: skip

    async def append(self, *entries: Entry) -> int:
        return max(done.offset or 0 for done in await self.journal.append(entries))

    async def settled(self, offset: int, sink: str = "memory") -> None:
        deadline = time.monotonic() + 20
        while await self.journal.cursor(sink) < offset:
            assert time.monotonic() < deadline, f"the cursor stays at {await self.journal.cursor(sink)}"
            await asyncio.sleep(0.002)


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Fixture]:
    fixture = Fixture(tmp_path)
    await fixture.journal.open()
    await fixture.dead_letters.open()
    yield fixture
    await fixture.dead_letters.close()
    await fixture.journal.close()


@contextlib.asynccontextmanager
async def running(*runners: SinkRunner) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(runner.run()) for runner in runners]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert result is None or isinstance(result, asyncio.CancelledError), result


class Memory(Store):
    remembers = True

    def __init__(self) -> None:
        self.one = MemorySink(remembers=True)
        self.one.reject[99] = Rejection(0, "not this one")

    def sink(self) -> MemorySink:
        return self.one

    def refusable(self) -> ScanRecord:
        return scan(99, (1.0, 2.0, 3), at_ns=now_ns())

    async def readings(self) -> list[Told]:
        return sorted(
            Told(f"{r.tenant}/{r.gateway}", r.layout.device, name, r.taken_at_ns, value)
            for r in self.one.scans()
            for name, value in zip(r.layout.names, r.values, strict=True)
            if value is not None
        )


class TestTheFakeItself(RefusingSinkConformance):
    @pytest.fixture
    def store(self) -> Memory:
        return Memory()


async def test_everything_is_delivered_in_order_and_the_cursor_follows(here: Fixture) -> None:
    runner = here.runner()
    async with running(runner):
        last = await here.append(batch(1, 10), batch(11, 5))
        await here.settled(last)
        last = await here.append(batch(16, 1))
        await here.settled(last)
        state = await runner.state()
    assert here.sink.seqs() == list(range(1, 17))
    assert [seq for seqs, _ in here.sink.calls for seq in seqs] == list(range(1, 17))
    assert here.sink.scans()[0].values == [1, 2, 3]
    assert here.sink.scans()[0].taken_at_ns == WALL_NS + S
    assert (state.word, state.position, state.lag_s, state.error) == ("running", last, 0.0, "")
    assert (state.accepted_records, state.accepted_readings, state.rejected_records) == (16, 48, 0)
    assert here.sink.closed


async def test_one_poison_record_is_isolated_within_2_log2_n_plus_1_tries(here: Fixture) -> None:
    runner = here.runner()
    first = 1
    async with running(runner):
        for n in (1, 2, 3, 5, 6, 7, 8, 11, 16, 17):
            for at in range(n):
                here.sink.poison, here.sink.calls = {first + at}, []
                await here.settled(await here.append(batch(first, n)))
                tries = [seqs for seqs, _ in here.sink.calls if seqs]
                assert len(tries) <= 2 * math.log2(n) + 1, (n, at, tries)
                first += n
    letters = await here.dead_letters.letters(limit=10_000)
    assert len(letters) == 76  # one for each position of each size
    assert {letter.reason for letter in letters} == {"something in there is refused"}
    assert len(here.sink.seqs()) == first - 1 - len(letters)
    assert not set(here.sink.seqs()) & {letter.first for letter in letters}


async def test_several_poison_records_are_all_found_and_the_rest_goes_on(here: Fixture) -> None:
    here.sink.poison = {3, 4, 40, 99, 100}
    runner = here.runner()
    async with running(runner):
        await here.settled(await here.append(batch(1, 100)))
    assert here.sink.seqs() == [seq for seq in range(1, 101) if seq not in here.sink.poison]
    assert [x.first for x in await here.dead_letters.letters()] == [3, 4, 40, 99, 100]


async def test_retry_later_is_the_same_call_again_after_what_the_store_asks(here: Fixture) -> None:
    here.sink.fails.extend([RetryLater("busy", after_s=0.15), RetryLater("busy", after_s=0.15)])
    runner = here.runner()
    last = await here.append(batch(1, 3))
    started = time.monotonic()
    async with running(runner):
        await until(lambda: bool(here.sink.calls))
        await asyncio.sleep(0.01)
        state = await runner.state()
        await here.settled(last)
        assert time.monotonic() - started >= 0.3
        after = await runner.state()
    assert (state.word, state.error) == ("retrying", "busy")
    assert state.lag_s > 0
    assert (after.word, after.error, after.retries) == ("running", "", 2)
    assert here.sink.calls == [((1, 2, 3), last)] * 3


async def test_a_store_that_asks_for_no_wait_at_all_is_not_hammered(here: Fixture) -> None:
    here.sink.fails.extend(RetryLater("busy", after_s=0.0) for _ in range(100_000))
    runner = here.runner()
    await here.append(batch(1, 3))
    async with running(runner):
        await until(lambda: len(here.sink.calls) >= 5)
        before = len(here.sink.calls)
        await asyncio.sleep(0.5)
        assert len(here.sink.calls) - before < 300  # 5 ms apart in the mean


async def test_backoff_is_full_jitter_below_a_growing_ceiling(here: Fixture) -> None:
    class Told(random.Random):
        ceilings: ClassVar[list[float]] = []

        def uniform(self, a: float, b: float) -> float:
            assert a == 0.0
            self.ceilings.append(b)
            return 0.0

    here.sink.fails.extend(RetryLater("down") for _ in range(6))
    async with running(here.runner(rng=Told())):
        await here.settled(await here.append(batch(1, 1)))
        here.sink.fails.append(RetryLater("down"))
        await here.settled(await here.append(batch(2, 1)))
    assert Told.ceilings == [0.01, 0.02, 0.04, 0.05, 0.05, 0.05, 0.01]


async def test_a_broken_sink_says_so_and_is_opened_again_until_it_works(here: Fixture) -> None:
    here.sink.fails_open.extend([SinkBroken("wrong password"), RetryLater("starting up")])
    here.sink.fails.append(SinkBroken("password changed"))
    runner = here.runner()
    last = await here.append(batch(1, 3))
    async with running(runner):
        words = set()
        while await here.journal.cursor("memory") < last:
            state = await runner.state()
            words.add((state.word, state.error))
            assert state.lag_s > 0 or state.position == last
            await asyncio.sleep(0.001)
    assert {
        ("broken", "wrong password"),
        ("retrying", "starting up"),
        ("broken", "password changed"),
    } <= words
    assert here.sink.opened == 4
    assert here.sink.seqs() == [1, 2, 3]


async def test_a_store_that_changed_is_opened_again_and_tells_where_to_resume(here: Fixture) -> None:
    here.sink.remembers = True
    async with running(here.runner()):
        first = await here.append(batch(1, 3))
        await here.settled(first)
        second = await here.append(batch(4, 3))
        await here.settled(second)
        here.sink.held.clear()  # it was restored from a backup made in between
        here.sink.offset = first
        here.sink.fails.append(StoreChanged("not as it was left"))
        await here.settled(await here.append(batch(7, 3)))
    assert here.sink.seqs() == [4, 5, 6, 7, 8, 9]


async def test_a_sick_sink_delays_only_itself(here: Fixture) -> None:
    sick, well = MemorySink("sick"), MemorySink("well")
    sick.gate.clear()
    stuck, healthy = here.runner(sick), here.runner(well)
    async with running(stuck, healthy):
        last = await here.append(batch(1, 50))
        await here.settled(last, "well")
        state = await stuck.state()
        assert state.position == 0
        assert state.lag_s > 0
        assert (await healthy.state()).lag_s == 0
        sick.gate.set()
        await here.settled(last, "sick")
    assert sick.seqs() == well.seqs()


async def test_refusals_reach_the_dead_letters_even_if_the_crash_comes_after_the_stores_commit(
    here: Fixture,
) -> None:
    class Full(DeadLetters):
        async def add(self, letters: Sequence[NewLetter]) -> None:
            raise DeadLettersError("the disk is full")

    here.sink.remembers = True
    here.sink.reject[2] = Rejection(0, "too hot", (1,))
    here.sink.reject[5] = Rejection(0, "too cold")
    last = await here.append(batch(1, 3), batch(4, 3))
    stuck = here.runner(dead_letters=Full(here.folder / "full.db"))
    async with running(stuck):
        await until(lambda: here.sink.offset == last)
        await asyncio.sleep(0.02)
        assert (await stuck.state()).error == "the disk is full"
        assert await here.journal.cursor("memory") == 0
    # The process ended there: the store says `last`, the cursor says 0, and nobody holds the refusals.
    async with running(here.runner()):
        await here.settled(last)
    assert [(x.first, x.points, x.reason, x.readings) for x in await here.dead_letters.letters()] == [
        (2, (1,), "too hot", 1),
        (5, (), "too cold", 3),
    ]
    assert here.sink.seqs() == [1, 2, 3, 4, 6]


async def test_no_call_crosses_the_offset_that_the_store_remembers(here: Fixture) -> None:
    here.sink.remembers = True
    offsets = [await here.append(batch(n * 10 + 1, 10)) for n in range(4)]
    here.sink.offset = offsets[1]
    async with running(here.runner()):
        await here.settled(offsets[3])
    assert here.sink.calls == [
        (tuple(range(1, 21)), offsets[1]),
        (tuple(range(21, 41)), offsets[3]),
    ]


async def test_a_store_of_another_journal_is_given_everything(
    here: Fixture, caplog: pytest.LogCaptureFixture
) -> None:
    here.sink.remembers = True
    here.sink.offset = 1_000_000
    async with running(here.runner()):
        await here.settled(await here.append(batch(1, 3)))
    assert here.sink.seqs() == [1, 2, 3]
    assert "another journal" in caplog.text


async def test_what_was_trimmed_before_the_sink_had_it_is_counted(here: Fixture) -> None:
    here.sink.remembers = True
    runner = here.runner()
    async with running(runner):
        await here.settled(await here.append(batch(1, 3)))
        await here.settled(await here.append(batch(4, 3)))
        await here.settled(await here.append(batch(7, 3)))
    assert await here.journal.trim(["memory"], keep_s=0, max_bytes=0) == 3
    here.sink.offset = 1  # a backup of long ago
    again = here.runner()
    async with running(again):
        await here.settled(await here.append(batch(10, 1)))
        assert (await again.state()).missed_entries == 2


async def test_frames_and_bodies_that_do_not_decode_are_kept_and_the_rest_goes_on(here: Fixture) -> None:
    frames = [frame(1), UNKNOWN_FRAME, UNKNOWN_FRAME, frame(4)]
    whole = batch(5, 3)
    broken = Entry(GATEWAY, EPOCH, 5, 7, 9, whole.received_at_ns, whole.payload[:-4] + b"\0\0\0\0")
    async with running(here.runner()):
        await here.settled(await here.append(entry(1, frames), broken, batch(8, 2)))
    assert here.sink.seqs() == [1, 4, 8, 9]
    letters = await here.dead_letters.letters()
    assert [(x.first, x.last, x.readings) for x in letters] == [(2, 3, 6), (5, 7, 9)]
    assert letters[0].reason.startswith("frame: ")
    assert letters[1].reason.startswith("crc: ")


async def test_a_damaged_entry_of_the_journal_is_counted_and_passed(
    here: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = await here.append(batch(1, 3))
    await here.append(batch(4, 3))
    read = here.journal.read

    async def damaged(after: int, *, max_entries: int, max_bytes: int) -> list[Stored]:
        if after < last:
            raise EntryDamaged(
                "its CRC disagrees", offset=last, gateway=GATEWAY, epoch=EPOCH, first=1, last=3
            )
        return await read(after, max_entries=max_entries, max_bytes=max_bytes)

    monkeypatch.setattr(here.journal, "read", damaged)
    async with running(here.runner()):
        await here.settled(last + 1)
    assert here.sink.seqs() == [4, 5, 6]
    assert [(x.first, x.last, x.reason) for x in await here.dead_letters.letters()] == [
        (1, 3, "damaged in the journal: its CRC disagrees")
    ]


async def test_a_call_waits_for_company_and_a_drain_does_not(here: Fixture) -> None:
    here.sink.linger_s = 3600.0
    runner = here.runner(clock_ns=lambda: WALL_NS + 3 * S)
    async with running(runner):
        await here.append(batch(1, 1))
        await here.append(batch(2, 1))
        await asyncio.sleep(0.2)
        assert not here.sink.calls
        await here.append(batch(3, 1))
        assert await runner.drain(20.0)
    assert here.sink.calls == [((1, 2, 3), 3)]
    assert (await runner.state()).word == "stopped"


async def test_a_call_that_is_full_waits_no_longer(here: Fixture) -> None:
    here.sink.linger_s = 3600.0
    here.sink.max_bytes = len(batch(1, 50).payload) + len(batch(51, 50).payload)
    async with running(here.runner(clock_ns=lambda: WALL_NS)):
        await here.append(batch(1, 50))
        await asyncio.sleep(0.1)
        assert not here.sink.calls
        await here.settled(await here.append(batch(51, 50)))
    assert [offset for _, offset in here.sink.calls] == [2]


async def test_a_drain_with_the_store_down_ends_in_time_and_the_journal_keeps_the_rest(here: Fixture) -> None:
    here.sink.fails.extend(RetryLater("down", after_s=30.0) for _ in range(100))
    runner = here.runner()
    task = asyncio.create_task(runner.run())
    await here.append(batch(1, 3))
    await until(lambda: bool(here.sink.calls))
    started = time.monotonic()
    assert not await runner.drain(10.0)
    assert time.monotonic() - started < 5
    await task
    here.sink.gate.clear()
    here.sink.fails.clear()
    stuck = here.runner()
    task = asyncio.create_task(stuck.run())
    await asyncio.sleep(0.05)
    assert not await stuck.drain(0.1)  # it hangs: it is cancelled
    assert task.done()
    assert await here.journal.cursor("memory") == 0


async def test_a_letter_is_replayed_once_the_sink_takes_it_and_only_then_leaves(here: Fixture) -> None:
    here.sink.reject = {2: Rejection(0, "too hot", (1,)), 5: Rejection(0, "too cold")}
    runner = here.runner()
    async with running(runner):
        await here.settled(await here.append(batch(1, 6)))
        hot, cold = await here.dead_letters.letters()
        del here.sink.reject[5]
        here.sink.reject[2] = Rejection(0, "still too hot")
        done = await runner.replay([hot.id, cold.id, 999])
        assert done.delivered == (cold.id,)
        assert done.refused == ((hot.id, "still too hot"),)
        assert done.unknown == (999,)
        (left,) = await here.dead_letters.letters()
        assert (left.id, left.reason, left.tries) == (hot.id, "still too hot", 2)
        replayed = here.sink.held[GATEWAY, EPOCH, 5]
        assert isinstance(replayed, ScanRecord)
        assert (list(replayed.values), replayed.taken_at_ns) == ([5, 2, 3], WALL_NS + 5 * S)
        here.sink.poison = {2}
        here.sink.reject = {}
        assert (await runner.replay([hot.id])).refused == ((hot.id, "something in there is refused"),)
        here.sink.fails.append(RetryLater("down"))
        with pytest.raises(RetryLater):
            await runner.replay([hot.id])
        here.sink.poison = set()
        assert (await runner.replay([hot.id])).delivered == (hot.id,)
        assert await here.dead_letters.letters() == []
    with pytest.raises(RetryLater, match="stopped"):
        await runner.replay([1])


async def test_poison_that_a_newer_decoder_reads_is_replayed(
    here: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = here.runner()
    async with running(runner):
        await here.settled(await here.append(entry(1, [frame(1), UNKNOWN_FRAME, frame(3)])))
        (letter,) = await here.dead_letters.letters()
        done = await runner.replay([letter.id])
        assert done.refused[0][1].startswith("frame: ")
        known = Decoder.decode
        readable = entry(1, [frame(1), frame(2), frame(3)])

        def newer(self: Decoder, stored: Stored) -> object:
            import msgspec

            return known(self, msgspec.structs.replace(stored, payload=readable.payload))

        monkeypatch.setattr(Decoder, "decode", newer)
        assert (await runner.replay([letter.id])).delivered == (letter.id,)
    assert here.sink.seqs() == [1, 2, 3]


async def test_a_gap_says_what_the_journal_holds_after_all(here: Fixture) -> None:
    gap = encode_frame(GapFrame(EPOCH, 1, 6, 6, 18, "evicted", "boiler", 1, S, 6 * S))
    overrun = encode_frame(GapFrame(EPOCH, 0, 0, 2, 6, "overrun", "boiler", 1, S, 6 * S))
    event = encode_frame(EventFrame(1, S, "start", "agent 0.1.0"))
    async with running(here.runner()):
        await here.append(batch(2, 3))
        await here.settled(await here.append(entry(10, [gap, overrun, event])))
    found = [record for record in here.sink.held.values() if isinstance(record, GapRecord)]
    assert [record.held for record in found] == [((2, 4),), ()]
    assert [(record.from_ns, record.to_ns) for record in found] == [(WALL_NS + S, WALL_NS + 6 * S)] * 2


async def test_new_series_above_the_limit_are_dead_letters_and_a_replay_admits_them(here: Fixture) -> None:
    guard = SeriesGuard(here.folder / "series.db", per_hour=2)
    runner = here.runner(guard=guard)
    async with running(runner):
        await here.settled(await here.append(batch(1, 2)))
        stored = here.sink.scans()
        assert [(r.layout.names, list(r.values)) for r in stored] == [(("a", "b"), [n, 2]) for n in (1, 2)]
        letters = await here.dead_letters.letters()
        assert [(x.points, x.readings) for x in letters] == [((2,), 1), ((2,), 1)]
        assert "limits.new_series_per_hour" in letters[0].reason
        assert guard.refused_total == {GATEWAY: 2}
        state = await runner.state()
        assert (state.accepted_readings, state.rejected_readings) == (4, 2)
        done = await runner.replay([x.id for x in letters])
        assert len(done.delivered) == 2
        await here.settled(await here.append(batch(3, 1)))
        assert [r.layout.names for r in here.sink.scans()] == [("a", "b", "c")] * 3
    await guard.close()


async def test_a_rejected_point_of_a_reduced_record_is_named_as_in_its_own_layout(here: Fixture) -> None:
    guard = SeriesGuard(here.folder / "series.db", per_hour=2)
    # The guard knows b and c, so that a is what it refuses.
    known = layout_of("boiler", "modbus", "heating", POINTS[1:])
    await guard.admit(scan(1, (1, 2), at_ns=now_ns(), of=known))
    here.sink.reject[1] = Rejection(0, "too hot", (1,))
    async with running(here.runner(guard=guard)):
        await here.settled(await here.append(batch(1, 1)))
    assert sorted(x.points for x in await here.dead_letters.letters()) == [(0,), (2,)]
    await guard.close()


async def test_an_entry_larger_than_a_call_is_split_and_the_cursor_moves_at_its_end(here: Fixture) -> None:
    here.sink.max_records = 4
    seen: list[int] = []
    last = await here.append(batch(1, 10), batch(11, 3))
    here.sink.on_write = lambda: seen.append(len(here.sink.held))
    async with running(here.runner()):
        await here.settled(last)
    assert here.sink.seqs() == list(range(1, 14))
    assert [(len(seqs), offset) for seqs, offset in here.sink.calls] == [(4, 0), (4, 0), (2, 1), (3, 2)]


async def test_a_body_that_is_large_is_decoded_piece_by_piece(here: Fixture) -> None:
    points = tuple(Point(name=f"p{i}", type=ValueType.U8) for i in range(4096))
    layout = layout_of("wide", "modbus", "heating", points)
    packing = Packing(layout)
    frames = [encode_scan(packing, Scan(n * S, points, (n % 200,) * 4096), boot=1) for n in range(900)]
    sealed = seal(GATEWAY, EPOCH, 1, frames, [layout], CLOCKS, 900 * 4096)
    assert 3 * MAX_PIECE_BYTES < 900 * 4096
    async with running(here.runner()):
        await here.settled(
            await here.append(
                Entry(GATEWAY, EPOCH, 1, 900, 900 * 4096, WALL_NS + 901 * S, sealed.payload), batch(901, 2)
            )
        )
    assert len(here.sink.seqs()) == 902
    assert max(len(seqs) for seqs, _ in here.sink.calls) <= 64
    assert [offset for _, offset in here.sink.calls][-1] == 2


async def test_a_rewind_delivers_again_what_the_journal_holds(here: Fixture) -> None:
    runner = here.runner()
    async with running(runner):
        first = await here.append(batch(1, 3))
        last = await here.append(batch(4, 3))
        await here.settled(last)
        here.sink.held.clear()
        await runner.rewind(first)
        await here.settled(last)
        await until(lambda: here.sink.seqs() == [4, 5, 6])


async def test_a_sink_that_fails_on_one_record_loses_that_one_alone(here: Fixture) -> None:
    here.sink.crashes = {7}
    async with running(here.runner()):
        await here.settled(await here.append(batch(1, 20)))
    assert here.sink.seqs() == [n for n in range(1, 21) if n != 7]
    (letter,) = await here.dead_letters.letters()
    assert (letter.first, letter.reason) == (7, "the sink failed: KeyError: 'seq 7'")


async def test_a_sink_that_fails_on_everything_is_broken_and_empties_nothing(here: Fixture) -> None:
    here.sink.crashes = set(range(1, 101))
    runner = here.runner()
    async with running(runner):
        last = await here.append(batch(1, 100))
        await until(lambda: len(here.sink.calls) > MAX_FAILURES)
        deadline = time.monotonic() + 20
        while (await runner.state()).word != "broken":
            assert time.monotonic() < deadline
            await asyncio.sleep(0.001)
        assert await here.dead_letters.letters() == []
        here.sink.crashes = set()  # repaired
        await here.settled(last)
    assert len(here.sink.seqs()) == 100


async def test_maintenance_comes_about_hourly_and_its_trouble_stops_nothing(here: Fixture) -> None:
    class Rusty(MemorySink):
        async def maintain(self, now_ns: int) -> None:
            await super().maintain(now_ns)
            if self.maintained == 1:
                raise RetryLater("busy")

    sink = Rusty()
    async with running(here.runner(sink, maintain_s=0.01)):
        for n in range(1, 50):
            await here.settled(await here.append(batch(n, 1)))
            if sink.maintained > 2:
                break
            await asyncio.sleep(0.01)
    assert sink.maintained > 2


async def test_the_embedded_store_holds_every_reading_once_over_restarts(here: Fixture) -> None:
    """Runner, journal and store, cancelled at any point: stored = journaled."""
    rng = random.Random(20261123)
    total = 0
    for _ in range(12):
        sink = EmbeddedSink(here.folder, retention_days=0.0)
        task = asyncio.create_task(here.runner(sink).run())
        for _ in range(rng.randrange(1, 6)):
            count = rng.randrange(1, 60)
            await here.append(batch(total + 1, count))
            total += count
            await asyncio.sleep(rng.uniform(0.0, 0.01))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    sink = EmbeddedSink(here.folder, retention_days=0.0)
    runner = here.runner(sink)
    task = asyncio.create_task(runner.run())
    assert await runner.drain(30.0)
    await task
    import sqlite3

    with contextlib.closing(sqlite3.connect(here.folder / "readings.sqlite")) as db:
        assert db.execute("SELECT count(*), count(DISTINCT seq) FROM readings").fetchone() == (
            total * 3,
            total,
        )
        assert db.execute("SELECT upto_offset FROM cursors").fetchone() == (
            (await here.journal.state()).last_offset,
        )


class Counted(DeadLetters):
    """Remembers how many letters came at once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.came: list[int] = []

    async def add(self, letters: Sequence[NewLetter]) -> None:
        self.came.append(len(letters))
        await super().add(letters)


async def test_a_flood_of_refusals_is_kept_piece_by_piece_and_none_is_lost(here: Fixture) -> None:
    guard = SeriesGuard(here.folder / "series.db", per_hour=0)
    kept = Counted(here.folder / "counted.db")
    await kept.open()
    runner = here.runner(guard=guard, dead_letters=kept)
    async with running(runner):
        await here.settled(await here.append(batch(1, 1250), batch(1251, 1250)))
        state = await runner.state()
    found = await kept.letters(limit=10_000)
    assert [letter.first for letter in found] == list(range(1, 2501))
    assert sum(letter.readings for letter in found) == state.rejected_readings == 7500
    assert max(kept.came) <= MAX_LETTERS
    assert here.sink.seqs() == []
    await kept.close()
    await guard.close()
