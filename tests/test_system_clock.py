"""Clocks that lie: the real buffer, wire, intake, journal, decoder and embedded store, with a clock that is told.

What must hold: nothing is lost, order is kept, what waited for its clock is right to a second, what could not wait is
flagged with bounds that hold, and a replay puts it right.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
import pytest

from agent.buffer import Buffer
from agent.store import Batch
from cloud.clocks import Clocks
from cloud.dead_letters import DeadLetters
from cloud.decode import Decoder
from cloud.intake import Arrival, Intake
from cloud.journal.sqlite import SqliteJournal
from cloud.metrics import Metrics
from cloud.runner import SinkRunner
from cloud.sinks.contract import ScanRecord
from cloud.sinks.embedded import FILE, EmbeddedSink
from config.agent import Buffer as BufferSettings
from drivers.contract import Priority
from sync.wire import Ack
from tests.fakes.buffer import GATEWAY, PACKING, StillClock, scan

S = 10**9
HOUR = 3_600 * S
YEAR = 365 * 86_400 * S
START_NS = 1_790_000_000 * S  #: 2026-09-21: when the first boot began
HOLD = BufferSettings(commit_interval_s=3600, clock_hold_s=3600)


class World:
    """A gateway with one clock and a cloud with the right one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.true_ns = START_NS  #: what a right clock shows
        self.clock = StillClock("none")
        self.live: list[Batch] = []
        self.taken: dict[int, int] = {}  #: the true time of each scan, by its number
        self.journal = SqliteJournal(folder / "journal.db", commit_interval_s=0.0)
        self.letters = DeadLetters(folder / "letters.db")
        self.clocks = Clocks(folder / "clocks.db")
        self.intake = Intake(self.journal, self.journal, Metrics(), clock_ns=lambda: self.true_ns)
        self.runner = SinkRunner(
            EmbeddedSink(folder, retention_days=400, clock_ns=lambda: self.true_ns), self.journal, self.letters,
            clocks=self.clocks, clock_ns=lambda: self.true_ns,
        )  # fmt: skip
        self.buffer: Buffer | None = None

    @property
    def on(self) -> Buffer:
        assert self.buffer is not None
        return self.buffer

    async def boot(
        self, name: str, *, off_ns: int = 0, shows_ns: int | None = None, synchronized: bool = False
    ) -> None:
        """Power on: the boot clock begins anew, the wall clock is off by so much, or shows just this."""
        if self.buffer is not None:
            await self.buffer.close()
        self.clock = StillClock(name)
        self.clock.now_ns = 20 * S  # the kernel, and what starts before the agent
        self.true_ns += 20 * S
        self.set(off_ns=off_ns, shows_ns=shows_ns, synchronized=synchronized)
        self.buffer = await Buffer.open(self.folder / "buffer.db", GATEWAY, HOLD, self.clock)
        self.buffer.register(PACKING.layout)
        self.buffer.on_live = self.live.extend

    def set(self, *, off_ns: int = 0, shows_ns: int | None = None, synchronized: bool) -> None:
        wall_ns = self.true_ns + off_ns if shows_ns is None else shows_ns
        self.clock.offset_ns = wall_ns - self.clock.now_ns
        self.clock.synchronized = synchronized

    def pass_s(self, seconds: float) -> None:
        self.clock.pass_s(seconds)
        self.true_ns += int(seconds * S)

    async def read(self, count: int, every_s: float = 1.0, *, priority: Priority = Priority.NORMAL) -> None:
        """So many scans are taken and kept."""
        for _ in range(count):
            self.pass_s(every_s)
            number = len(self.taken) + 1
            self.taken[number] = self.true_ns
            frame = scan(number, boot=self.on.boot, taken_at_ns=self.clock.now_ns)
            assert self.on.append(frame, 2, priority)
        assert await self.on.commit()

    async def deliver(self) -> int:
        """The link is up for a moment: all that the buffer gives; how many frames the cloud took."""
        taken = 0
        while True:
            await self.on.commit()
            batches = self.live[:] or await self.on.claim(8)
            self.live.clear()
            if not batches:
                return taken
            arrivals = [Arrival(str(GATEWAY), b.sealed.payload, time.monotonic()) for b in batches]
            self.pass_s(0.001)
            for verdict in await self.intake.accept(arrivals, door="test"):
                assert isinstance(verdict.reply, Ack)
                self.on.settle(verdict.reply)
                taken += sum(last - first + 1 for first, last in verdict.reply.ranges)

    async def stored(self) -> list[tuple[int, int, bool]]:
        """(number, taken_at_ns, synchronized) of all scans in the store, in the order of their seqs."""
        last = (await self.journal.state()).last_offset
        deadline = time.monotonic() + 30
        while await self.journal.cursor("embedded") < last:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        with sqlite3.connect(f"file:{self.folder / FILE}?mode=ro", uri=True) as db:
            rows = db.execute(
                "SELECT r.value, r.taken_at_ns, r.clock_synchronized FROM readings r JOIN points p ON p.id = r.point_id"
                " WHERE p.name = 'n' ORDER BY r.epoch, r.seq"
            ).fetchall()
        db.close()
        return [(int(value), at_ns, bool(synchronized)) for value, at_ns, synchronized in rows]

    def off_s(self, rows: Sequence[tuple[int, int, bool]]) -> list[float]:
        return [abs(at_ns - self.taken[number]) / S for number, at_ns, _ in rows]

    async def scans(self) -> dict[int, ScanRecord]:
        """As decoded from the journal, by number."""
        decoder = Decoder()
        found: dict[int, ScanRecord] = {}
        for entry in await self.journal.read(0, max_entries=10_000, max_bytes=2**30):
            for record in decoder.decode(entry).records:
                if isinstance(record, ScanRecord):
                    found[int(record.values[0] or 0)] = record
        return found


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path)
    await made.journal.open()
    await made.letters.open()
    await made.clocks.open()
    task = asyncio.create_task(made.runner.run())
    yield made
    if made.buffer is not None:
        await made.buffer.close()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await made.clocks.close()
    await made.letters.close()
    await made.journal.close()


async def a_good_first_boot(world: World) -> None:
    await world.boot("boot-1", synchronized=True)
    await world.read(5)
    assert await world.deliver() >= 5
    world.pass_s(120)


LIES = {
    "10 years behind": {"off_ns": -10 * YEAR},
    "10 years ahead": {"off_ns": 10 * YEAR},
    "1970": {"shows_ns": 25 * S},
    "an hour behind": {"off_ns": -HOUR},
    "an hour ahead": {"off_ns": HOUR},
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_day_without_network_and_time_is_exact_once_the_clock_is_set(world: World, lie: str) -> None:
    """The network comes back a while before the time does, as it always is."""
    await a_good_first_boot(world)
    await world.boot("boot-2", **LIES[lie])  # type: ignore[arg-type]  # names and integers
    await world.read(1_440, every_s=60)
    assert await world.deliver() == 0, "they wait for their clock"
    assert world.on.state.clock_waiting
    assert not world.on.has_backlog, "nobody is kept asking for what waits"
    await world.read(3, every_s=10)
    assert await world.deliver() == 0
    world.set(synchronized=True)
    await world.read(2)
    assert await world.deliver() >= 1_445
    assert not world.on.state.clock_expected
    rows = await world.stored()
    assert [number for number, _, _ in rows] == list(range(1, 1_451)), "nothing lost, in order"
    assert all(synchronized for _, _, synchronized in rows)
    assert max(world.off_s(rows)) < 1.0
    assert [at_ns for _, at_ns, _ in rows] == sorted(at_ns for _, at_ns, _ in rows)


async def test_what_has_waited_an_hour_goes_as_an_estimate_with_bounds_and_a_replay_puts_it_right(
    world: World,
) -> None:
    await a_good_first_boot(world)
    await world.boot("boot-2", shows_ns=25 * S)
    await world.read(60, every_s=30)
    assert await world.deliver() == 0
    await world.read(58, every_s=60)
    assert await world.deliver() == 0, "58 minutes after the first try"
    await world.read(3, every_s=60)
    assert await world.deliver() >= 121, "an hour after the first try"
    await world.read(10)
    assert await world.deliver() >= 10, "and from then on nothing waits in this boot"
    rows = await world.stored()
    assert [number for number, _, _ in rows] == list(range(1, 137))
    late = rows[5:]
    assert not any(synchronized for _, _, synchronized in late)
    assert [at_ns for _, at_ns, _ in late] == sorted(at_ns for _, at_ns, _ in late)
    for number, record in (await world.scans()).items():
        if number > 5:
            assert START_NS < record.earliest_ns <= world.taken[number] <= record.latest_ns
            assert record.latest_ns - record.earliest_ns < 3 * HOUR
    world.set(synchronized=True)
    await world.read(1)
    await world.deliver()
    await world.stored()
    done = await world.runner.send_back(0)
    assert done.corrected_scans >= 131
    rows = await world.stored()
    assert [number for number, _, _ in rows] == list(range(1, 138))
    assert all(synchronized for _, _, synchronized in rows)
    assert max(world.off_s(rows)) < 1.0


async def test_a_boot_that_never_had_the_time_lies_between_the_boots_around_it(world: World) -> None:
    await a_good_first_boot(world)
    await world.boot("boot-2", shows_ns=25 * S)
    await world.read(50)
    world.pass_s(30)
    await world.boot("boot-3", shows_ns=25 * S)
    await world.read(10)
    assert await world.deliver() == 0, (
        "while this boot may still learn the time, the one before waits with it"
    )
    world.set(synchronized=True)
    await world.read(1)
    world.pass_s(7_200)
    assert await world.deliver() >= 61
    found = await world.scans()
    assert sorted(found) == list(range(1, 67))
    for number in range(6, 56):
        record = found[number]
        assert not record.clock_synchronized
        assert record.earliest_ns <= world.taken[number] <= record.latest_ns
        assert record.latest_ns - record.earliest_ns < 600 * S, (
            "known to ten minutes, though sent two hours later"
        )
        assert record.earliest_ns <= record.taken_at_ns <= record.latest_ns
    assert all(found[number].clock_synchronized for number in range(56, 67))
    rows = await world.stored()
    assert [at_ns for _, at_ns, _ in rows] == sorted(at_ns for _, at_ns, _ in rows)


async def test_a_gateway_that_never_had_a_time_server_is_not_made_to_wait(world: World) -> None:
    for name in ("boot-1", "boot-2"):
        await world.boot(name, off_ns=-40 * S)
        await world.read(5)
        assert await world.deliver() >= 5
        assert not world.on.state.clock_expected
        world.pass_s(60)
    rows = await world.stored()
    assert len(rows) == 10
    assert not any(synchronized for _, _, synchronized in rows)
    assert max(world.off_s(rows)) < 41


async def test_an_alarm_does_not_wait_for_the_clock(world: World) -> None:
    await a_good_first_boot(world)
    await world.boot("boot-2", shows_ns=25 * S)
    await world.read(20)
    assert await world.deliver() == 0
    await world.read(1, priority=Priority.ALARM)
    assert await world.deliver() == 1
    await world.read(20)
    assert await world.deliver() == 0
    world.on.live_room = 4
    await world.read(1, priority=Priority.ALARM)
    assert await world.deliver() == 1
    world.set(synchronized=True)
    await world.read(1)
    assert await world.deliver() >= 41
    rows = await world.stored()
    assert sorted(number for number, _, _ in rows) == list(range(1, 49))
    exact = [row for row in rows if row[2]]
    assert len(exact) == 46
    assert max(world.off_s(exact)) < 1.0
    await world.runner.send_back(0)
    rows = await world.stored()
    assert len(rows) == 48
    assert max(world.off_s(rows)) < 1.0


@pytest.mark.parametrize("step_s", [3_600, -3_600, 10 * 365 * 86_400, -10 * 365 * 86_400])
async def test_a_step_of_a_clock_that_was_set_is_told_and_moves_nothing(world: World, step_s: int) -> None:
    """Somebody sets the clock by hand, and wrongly; the kernel then says that it is not synchronized."""
    await world.boot("boot-1", synchronized=True)
    await world.read(10)
    world.set(off_ns=step_s * S, synchronized=False)
    await world.read(10)
    assert await world.deliver() >= 20
    world.set(synchronized=True)
    await world.read(10)
    assert await world.deliver() >= 10
    rows = await world.stored()
    assert [number for number, _, _ in rows] == list(range(1, 31))
    assert max(world.off_s(rows)) < 1.0
    with sqlite3.connect(f"file:{world.folder / FILE}?mode=ro", uri=True) as db:
        told = [
            text for (text,) in db.execute("SELECT text FROM events WHERE code = 'clock_step' ORDER BY seq")
        ]
    db.close()
    assert told == [f"the wall clock was set by {step:+.3f} s" for step in (step_s, -step_s)]


async def test_a_step_is_seen_within_a_second_or_two_while_nothing_is_read(world: World) -> None:
    await a_good_first_boot(world)
    await world.boot("boot-2", shows_ns=25 * S)
    await world.read(5)
    assert await world.deliver() == 0
    running = asyncio.create_task(world.on.run())
    try:
        await asyncio.sleep(1.2)  # the clock is looked at each second of real time
        before = world.on.state.commits
        woken = asyncio.Event()

        def live(batches: Sequence[Batch]) -> None:
            world.live.extend(batches)
            woken.set()

        world.on.on_live = live
        world.pass_s(10)
        world.set(synchronized=True)
        started_s = time.monotonic()
        async with asyncio.timeout(10):
            await woken.wait()
        assert time.monotonic() - started_s < 5, "two looks, and the slack of a busy machine"
        assert world.on.state.commits > before
        assert world.on.has_backlog
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
    assert await world.deliver() >= 5
    rows = await world.stored()
    assert all(synchronized for _, _, synchronized in rows)
    assert max(world.off_s(rows)) < 1.0


async def test_no_hold_where_it_is_turned_off(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "HOLD", msgspec.structs.replace(HOLD, clock_hold_s=0.0))
    await a_good_first_boot(world)
    await world.boot("boot-2", shows_ns=25 * S)
    await world.read(5)
    assert await world.deliver() >= 5
