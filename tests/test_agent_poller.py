"""The poller: a schedule that neither drifts nor piles up, and faults that stay with their device."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.devices import build_device
from agent.health import DeviceHealth, Gauge, State
from agent.poller import DevicePoller, Plan, Schedule, phase_of
from config.agent import Device
from drivers.contract import (
    ConfigError,
    DeviceUnreachable,
    Driver,
    Point,
    PointRefused,
    Priority,
    PushDriver,
    Reason,
    Scan,
    Value,
    ValueType,
    boot_ns,
)
from drivers.registry import AnyDriver
from sync.wire import Layout, Packing, ScanFrame, decode_frame, layout_id, unpack_reasons
from tests.fakes.quick_loop import run_quickly

POINTS = (Point(name="a", type=ValueType.U16, valid_max=1000), Point(name="b", type=ValueType.U16))


class Kept(msgspec.Struct):
    """One scan, as whoever decodes the frame sees it."""

    device: str
    names: tuple[str, ...]
    values: list[Value | None]
    reasons: dict[int, Reason]
    taken_at_ns: int


class ListStore:
    """A store that keeps all it is given in memory, decoded by the wire format itself."""

    def __init__(self) -> None:
        self.boot = 1
        self.full = False
        self.frames: list[bytes] = []
        self.priorities: list[Priority] = []
        self.readings = 0
        self.gaps: list[tuple[str, str, int, int]] = []
        self.events: list[tuple[str, str]] = []
        self._packings: dict[int, Packing] = {}

    def register(self, layout: Layout) -> Packing:
        return self._packings.setdefault(layout_id(layout), Packing(layout))

    def append(self, frame: bytes, readings: int, priority: Priority = Priority.NORMAL) -> bool:
        if self.full:
            return False
        self.frames.append(frame)
        self.priorities.append(priority)
        self.readings += readings
        return True

    def record_event(self, code: str, text: str, device: str = "") -> None:
        self.events.append((code, device))

    def record_gap(
        self, reason: str, *, device: str, scans: int, readings: int, from_boot_ns: int, to_boot_ns: int
    ) -> None:
        assert from_boot_ns <= to_boot_ns
        self.gaps.append((reason, device, scans, readings))

    @property
    def kept(self) -> list[Kept]:
        found = []
        for data in self.frames:
            frame = decode_frame(data)
            assert isinstance(frame, ScanFrame)
            packing = self._packings[frame.layout]
            names = packing.layout.names
            reasons = unpack_reasons(frame.reasons, len(names))
            values = packing.unpack(frame.values, frame.texts)
            shown = [None if not reasons.get(i, Reason.GOOD).has_value else v for i, v in enumerate(values)]
            found.append(Kept(packing.layout.device, names, shown, reasons, frame.taken_at_ns))
        return found


class NoOptions(msgspec.Struct, frozen=True):
    pass


class Asked(Driver[NoOptions, Point]):
    """A device whose every read is told by the test."""

    options_type = NoOptions
    point_type = Point

    def __init__(self, on_read: Callable[[int], Awaitable[Scan]], name: str = "boiler") -> None:
        super().__init__(name, NoOptions(), POINTS)
        self.on_read = on_read
        self.on_connect: Callable[[], Awaitable[None]] | None = None
        self.reads = self.connects = self.closes = 0
        self.overlaps = self._inside = 0

    async def connect(self) -> None:
        self.connects += 1
        if self.on_connect is not None:
            await self.on_connect()

    async def read(self, points: Sequence[Point]) -> Scan:
        self._inside += 1
        self.overlaps += self._inside > 1
        self.reads += 1
        try:
            return await self.on_read(self.reads)
        finally:
            self._inside -= 1

    async def close(self) -> None:
        self.closes += 1


class Speaking(PushDriver[NoOptions, Point]):
    options_type = NoOptions
    point_type = Point

    def __init__(self, source: Callable[[], AsyncIterator[Scan]]) -> None:
        super().__init__("scale", NoOptions(), POINTS)
        self.source = source

    async def connect(self) -> None: ...

    async def close(self) -> None: ...

    def scans(self) -> AsyncIterator[Scan]:
        return self.source()


def scan_of(*values: Value | None, reasons: dict[int, Reason] | None = None) -> Scan:
    return Scan(boot_ns(), POINTS, values, reasons or {})


async def good(n: int) -> Scan:
    return scan_of(n, n)


def poller_of(
    driver: AnyDriver,
    store: ListStore,
    *,
    period_s: float = 0.02,
    deadline_s: float = 5.0,
    build: Callable[[], AnyDriver] | None = None,
) -> DevicePoller:
    plan = Plan(
        name=driver.name,
        driver="fake",
        measurement="fake",
        tags=(),
        points=tuple(driver.points),
        period_s=period_s,
        phase_s=0.0,
        deadline_s=deadline_s,
        build=build or (lambda: driver),
    )
    gauge = Gauge(DeviceHealth(name=plan.name, driver=plan.driver), time.time_ns)
    return DevicePoller(plan, driver, store, gauge, random.Random(1))


@contextlib.asynccontextmanager
async def running(*pollers: DevicePoller) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(p.run(), name=f"poll[{p.plan.name}]") for p in pollers]
        yield
        for task in tasks:
            task.cancel()


async def until(holds: Callable[[], object], within_s: float = 20.0) -> None:
    async with asyncio.timeout(within_s):
        while not holds():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.002)


# --- the schedule ---


@settings(max_examples=300)
@given(
    period_ms=st.integers(20, 5000),
    phase=st.floats(0, 1),
    start=st.floats(0, 1e6),
    works=st.lists(st.floats(0, 4), min_size=1, max_size=30),
)
def test_every_slot_is_read_once_or_counted_once(
    period_ms: int, phase: float, start: float, works: list[float]
) -> None:
    period = period_ms / 1000
    schedule = Schedule(period, phase * period)
    schedule.start(start)
    first = math.floor((start - schedule.phase_s) / period + 0.1)
    now, served, skipped_all = start, 1, 0
    for work in works:
        now += work * period
        when, skipped = schedule.next(now)
        assert skipped >= 0
        # On the grid, to what a float can tell of it.
        slot = round((when - schedule.phase_s) / period)
        assert abs(schedule.phase_s + slot * period - when) < 1e-6
        # Never late by more than the grace, and no further away than that and a period.
        assert now - 0.1 * period - 1e-6 <= when <= now + 1.1 * period + 1e-6
        served, skipped_all = served + 1, skipped_all + skipped
        assert slot == first + served + skipped_all - 1
        now = max(now, when)


def test_a_slow_read_skips_slots_and_never_catches_up() -> None:
    schedule = Schedule(1.0, 0.0)
    schedule.start(10.0)
    assert schedule.next(10.2) == (11.0, 0)
    assert schedule.next(13.5) == (14.0, 2)  # 12 and 13 passed during the read of slot 11
    assert schedule.next(14.1) == (15.0, 0)


def test_a_read_that_ends_a_moment_late_costs_no_slot() -> None:
    schedule = Schedule(0.05, 0.0)
    schedule.start(1.0)
    when, skipped = schedule.next(1.052)
    assert (round(when, 6), skipped) == (1.05, 0)


def test_the_schedule_does_not_drift() -> None:
    schedule = Schedule(0.05, 0.01)
    schedule.start(0.0)
    now, when = 0.0, 0.0
    for _ in range(100_000):
        when, skipped = schedule.next(now)
        assert skipped == 0
        now = when + 0.0049
    assert when == pytest.approx(0.01 + 0.05 * 99_999, abs=0.06)


def test_phases_spread_devices_over_the_period() -> None:
    phases = sorted(phase_of(f"meter-{n}", 1.0) for n in range(200))
    assert phases[0] >= 0
    assert phases[-1] < 1
    assert max(b - a for a, b in itertools.pairwise(phases)) < 0.1
    assert phase_of("boiler", 1.0) == phase_of("boiler", 1.0)


# --- a device that answers ---


async def test_scans_are_judged_encoded_and_stored() -> None:
    async def read(n: int) -> Scan:
        return scan_of(1001, 7)

    store = ListStore()
    async with running(poller := poller_of(Asked(read), store)):
        await until(lambda: len(store.frames) >= 3)
    kept = store.kept[0]
    assert (kept.device, kept.names, kept.values) == ("boiler", ("a", "b"), [1001, 7])
    assert kept.reasons == {0: Reason.RANGE}
    health = poller.gauge.told(boot_ns())
    assert health.readings == 2 * health.scans == store.readings
    assert health.reasons == {"RANGE": health.scans}
    assert health.bad_readings == health.scans
    assert health.p50_ms is not None
    assert health.last_good_ns is not None


async def test_a_period_of_50_ms_is_held() -> None:
    driver, store = Asked(good), ListStore()
    async with running(poller := poller_of(driver, store, period_s=0.05)):
        await until(lambda: driver.reads >= 21)
    times = [kept.taken_at_ns / 1e9 for kept in store.kept]
    # The machine may be busy: slots may be skipped and are then counted, but the grid stays.
    took = times[20] - times[1]
    slots = 19 + poller.gauge.health.overruns
    assert took == pytest.approx(slots * 0.05, abs=0.05 * (1 + poller.gauge.health.overruns))


async def test_a_period_of_50_ms_is_held_on_modbus_tcp() -> None:
    """A real connection to a process of its own: the count is the clock's, and what is skipped is counted, not made
    up for."""
    peer = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.fakes.fast_modbus",
        stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    try:
        assert peer.stdout is not None
        options: dict[str, object] = {"host": "127.0.0.1", "port": int(await peer.stdout.readline())}
        points = [{"name": f"p{n}", "register": n} for n in range(100)]
        device = Device(name="meter", driver="modbus", period_ms=50, options=options, point=points)
        made, store = build_device(device), ListStore()
        gauge = Gauge(DeviceHealth(name="meter", driver="modbus"), time.time_ns)
        async with running(DevicePoller(made.plan, made.driver, store, gauge, random.Random(1))):
            await until(lambda: store.frames)
            before, begun_s = gauge.health.scans + gauge.health.overruns, time.monotonic()
            await until(lambda: time.monotonic() - begun_s >= 3.0)
            slots = (time.monotonic() - begun_s) / 0.05
            served = gauge.health.scans + gauge.health.overruns - before
            overruns = gauge.health.overruns
    finally:
        peer.kill()
        await peer.wait()
    assert served == pytest.approx(slots, rel=0.05, abs=1)
    assert overruns < slots / 2  # more would be a machine too busy for any 50 ms
    assert gauge.health.failures == gauge.health.bad_readings == 0
    assert gauge.health.p50_ms is None or gauge.health.p50_ms < 50


async def test_reads_of_one_device_never_overlap_and_overruns_are_counted() -> None:
    async def slow(n: int) -> Scan:
        await asyncio.sleep(0.05)
        return scan_of(n, n)

    driver, store = Asked(slow), ListStore()
    async with running(poller := poller_of(driver, store, period_s=0.02)):
        await until(lambda: driver.reads >= 6)
    assert driver.overlaps == 0
    assert poller.gauge.health.overruns >= 2 * 4
    assert poller.gauge.health.state is State.STOPPED


async def test_a_device_that_never_waits_lets_the_others_have_their_turn() -> None:
    greedy, modest, store = Asked(good, "greedy"), Asked(good, "modest"), ListStore()
    async with running(poller_of(greedy, store, period_s=0.0), poller_of(modest, store, period_s=0.02)):
        await until(lambda: modest.reads >= 5)
    assert greedy.reads > modest.reads


async def test_a_value_that_does_not_fit_is_set_aside_and_the_rest_is_kept() -> None:
    async def read(n: int) -> Scan:
        return scan_of(5, 70_000)  # no rule looks at b; only encoding it finds out

    store = ListStore()
    async with running(poller_of(Asked(read), store)):
        await until(lambda: store.frames)
    assert store.kept[0].values == [5, None]
    assert store.kept[0].reasons == {1: Reason.OVERFLOW}


async def test_scans_the_store_refuses_are_counted_as_overruns() -> None:
    driver, store = Asked(good), ListStore()
    store.full = True
    async with running(poller := poller_of(driver, store)):
        await until(lambda: driver.reads >= 3)
    assert poller.gauge.health.scans == 0
    assert poller.gauge.health.overruns >= 3


# --- a device that does not ---


async def test_a_device_that_hangs_is_cut_off_at_its_deadline_and_connected_again() -> None:
    async def hang_once(n: int) -> Scan:
        if n == 2:
            await asyncio.sleep(3600)
        return scan_of(n, n)

    driver, store = Asked(hang_once), ListStore()
    async with running(poller := poller_of(driver, store, deadline_s=0.05)):
        await until(lambda: driver.reads >= 4 and len(store.frames) >= 4)
        assert poller.gauge.health.state is State.OK
    assert driver.connects == 2
    assert store.kept[1].values == [None, None]
    assert store.kept[1].reasons == {0: Reason.TIMEOUT, 1: Reason.TIMEOUT}
    assert store.kept[2].values == [3, 3]


async def test_an_outage_is_said_once_and_its_end_once(caplog: pytest.LogCaptureFixture) -> None:
    async def read(n: int) -> Scan:
        if 2 <= n <= 5:
            raise DeviceUnreachable("connection refused", Reason.DISCONNECTED)
        return scan_of(n, n)

    driver, store = Asked(read), ListStore()
    with caplog.at_level(logging.INFO, "agent"):
        async with running(poller := poller_of(driver, store)):
            await until(lambda: driver.reads >= 7)
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.INFO]
    assert len([text for text in said if "connection refused" in text]) == 1
    assert len([text for text in said if "answers again after" in text]) == 1
    assert poller.gauge.health.failures == 4
    assert driver.connects == 5


async def test_a_failed_attempt_is_kept_as_bad_readings_at_most_once_per_second() -> None:
    async def read(n: int) -> Scan:
        raise DeviceUnreachable("gone", Reason.DISCONNECTED)

    driver, store = Asked(read), ListStore()
    async with running(poller_of(driver, store)):
        await until(lambda: driver.reads >= 4)
    times = [kept.taken_at_ns for kept in store.kept]
    assert times
    assert all(b - a >= 0.8e9 for a, b in itertools.pairwise(times))
    assert all(kept.reasons == {0: Reason.DISCONNECTED, 1: Reason.DISCONNECTED} for kept in store.kept)


async def test_retries_of_a_dead_device_stay_on_its_own_slots() -> None:
    at: list[float] = []

    async def read(n: int) -> Scan:
        at.append(asyncio.get_running_loop().time())
        raise DeviceUnreachable("no answer", Reason.TIMEOUT)

    driver, store = Asked(read), ListStore()
    async with running(poller_of(driver, store, period_s=0.2)):
        await until(lambda: len(at) >= 5)
    # The first read is at once, the others at slots: never before one, and never two in one.
    assert all(b - a > 0.2 * 0.85 for a, b in itertools.pairwise(at[1:]))


async def test_a_scan_without_one_value_is_a_device_that_is_down() -> None:
    async def read(n: int) -> Scan:
        if n < 6:
            return scan_of(None, None, reasons={0: Reason.EXCEPTION, 1: Reason.EXCEPTION})
        return scan_of(1, 1)

    driver, store = Asked(read), ListStore()
    async with running(poller := poller_of(driver, store, period_s=0.05)):
        await until(lambda: poller.gauge.health.state is State.DOWN)
        assert driver.reads >= 3
        assert "exception" in poller.gauge.health.why
        await until(lambda: poller.gauge.health.state is State.OK)
    assert driver.connects == 1


async def test_one_damaged_message_is_no_outage(caplog: pytest.LogCaptureFixture) -> None:
    async def read(n: int) -> Scan:
        return scan_of(None, None, reasons={0: Reason.CRC, 1: Reason.CRC}) if n % 2 else scan_of(n, n)

    driver, store = Asked(read), ListStore()
    with caplog.at_level(logging.INFO, "agent"):
        async with running(poller := poller_of(driver, store)):
            await until(lambda: driver.reads >= 10)
            assert poller.gauge.health.state is State.OK
    assert len(caplog.records) == 1  # the first scan
    assert poller.gauge.health.reasons["CRC"] >= 8


async def test_a_device_that_comes_and_goes_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def read(n: int) -> Scan:
        reason = Reason.TIMEOUT
        return scan_of(None, None, reasons={0: reason, 1: reason}) if n % 2 else scan_of(n, n)

    driver, store = Asked(read), ListStore()
    with caplog.at_level(logging.INFO, "agent"):
        async with running(poller_of(driver, store)):
            await until(lambda: driver.reads >= 60)
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 12
    assert "not told again within the hour" in said[-1]


async def test_a_device_down_does_not_slow_its_neighbour() -> None:
    async def hang(n: int) -> Scan:
        await asyncio.sleep(3600)
        return scan_of(0, 0)

    dead, alive, store = Asked(hang, "dead"), Asked(good, "alive"), ListStore()
    async with running(
        poller_of(dead, store, deadline_s=0.1), poller := poller_of(alive, store, period_s=0.05)
    ):
        await until(lambda: alive.reads >= 20)
    took = [k.taken_at_ns for k in store.kept if k.device == "alive"]
    assert (took[-1] - took[1]) / 1e9 == pytest.approx(
        0.05 * (len(took) - 2 + poller.gauge.health.overruns), abs=0.1
    )


# --- a driver that fails by itself ---


async def test_a_failing_driver_is_built_anew_and_the_others_never_notice() -> None:
    async def fail(n: int) -> Scan:
        raise ZeroDivisionError("division by zero")

    first, second, neighbour = Asked(fail), Asked(good), Asked(good, "neighbour")
    store = ListStore()
    poller = poller_of(first, store, build=lambda: second)
    async with running(poller, poller_of(neighbour, store)):
        await until(lambda: poller.gauge.health.state is State.OK)
    assert first.closes == 1
    assert poller.gauge.health.restarts == 1
    assert ("driver-fault", "boiler") in store.events
    mine = [k for k in store.kept if k.device == "boiler"]
    assert mine[0].reasons == {0: Reason.DRIVER, 1: Reason.DRIVER}
    assert mine[1].values == [1, 1]
    assert neighbour.closes == 1


@pytest.mark.parametrize(
    "outcome",
    [
        Scan(1, POINTS, (1,)),
        Scan(1, POINTS[:1], (1,)),
        Scan(1, tuple(reversed(POINTS)), (1, 2)),
        asyncio.CancelledError("by itself"),
        TimeoutError("its own"),
        KeyError("x"),
    ],
    ids=["too-few-values", "too-few-points", "other-order", "cancelled", "timeout", "key"],
)
async def test_whatever_a_driver_does_wrong_stays_with_its_device(outcome: Scan | BaseException) -> None:
    async def wrong(n: int) -> Scan:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    store = ListStore()
    second = Asked(good)
    poller = poller_of(Asked(wrong), store, build=lambda: second)
    async with running(poller):
        await until(lambda: second.reads >= 2)
    assert store.kept[0].reasons == {0: Reason.DRIVER, 1: Reason.DRIVER}
    assert all(kept.values[0] == n for n, kept in enumerate(store.kept[1:], start=1))


@pytest.mark.parametrize(
    ("reads", "at_least", "at_most"),
    [(1, 60, 250), (60, 45, 60)],
    ids=["fails after one good read", "runs for a minute each time"],
)
def test_a_driver_that_fails_again_and_again_is_restarted_ever_more_rarely(
    reads: int, at_least: int, at_most: int
) -> None:
    """One good scan proves nothing: a process each second would be all that a small board can do."""

    async def one_more(n: int) -> Scan:
        await asyncio.sleep(0)
        if n > reads:
            raise ZeroDivisionError("again")
        return scan_of(n, n)

    async def hour() -> int:
        poller = poller_of(Asked(one_more), ListStore(), period_s=1.0, build=lambda: Asked(one_more))
        async with running(poller):
            await asyncio.sleep(3600.0)
        return poller.gauge.health.restarts

    restarts, _ = run_quickly(hour())
    assert at_least <= restarts <= at_most


async def test_a_driver_that_cannot_even_close_holds_up_nobody(caplog: pytest.LogCaptureFixture) -> None:
    driver, store = Asked(good), ListStore()

    async def fail() -> None:
        raise OSError("no such device")

    driver.close = fail  # type: ignore[method-assign]
    async with running(poller_of(driver, store)):
        await until(lambda: driver.reads >= 1)
    assert "failed to close" in caplog.text


async def test_a_configuration_that_cannot_work_stops_the_device_and_says_what_to_change() -> None:
    async def refuse() -> None:
        raise ConfigError("unit 300: give 0 to 247")

    driver, other, store = Asked(good), Asked(good, "other"), ListStore()
    driver.on_connect = refuse
    poller = poller_of(driver, store)
    async with running(poller, poller_of(other, store)):
        await until(lambda: poller.gauge.health.state is State.MISCONFIGURED)
        await until(lambda: other.reads >= 3)
    assert driver.connects == 1
    assert driver.closes == 1
    assert "give 0 to 247" in poller.gauge.health.why
    assert poller.gauge.health.state is State.MISCONFIGURED
    assert ("misconfigured", "boiler") in store.events


# --- a device that speaks by itself ---


async def test_what_a_device_says_is_kept_as_it_comes() -> None:
    async def source() -> AsyncIterator[Scan]:
        yield scan_of(1, 2)
        yield Scan(boot_ns(), (POINTS[1],), (3,))
        await asyncio.sleep(3600)

    store = ListStore()
    async with running(poller_of(Speaking(source), store)):
        await until(lambda: len(store.frames) >= 2)
    assert [(k.names, k.values) for k in store.kept] == [(("a", "b"), [1, 2]), (("b",), [3])]


async def test_a_sign_of_life_ends_the_trouble_once_and_is_kept_nowhere(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "agent.poller")
    again = asyncio.Event()
    lives = 0

    async def source() -> AsyncIterator[Scan]:
        nonlocal lives
        lives += 1
        if lives == 1:
            yield scan_of(1, 2)
            raise DeviceUnreachable("the host is gone", Reason.DISCONNECTED)
        await again.wait()
        for _ in range(3):
            yield Scan(boot_ns(), (), ())
        yield scan_of(3, 4)
        await asyncio.sleep(3600)

    store = ListStore()
    async with running(poller := poller_of(Speaking(source), store)):
        await until(lambda: poller.gauge.health.state is State.DOWN)
        watch = poller.watch()
        asked = asyncio.ensure_future(poller.ask_read())
        await asyncio.sleep(0)
        before = poller.gauge.health.scans
        again.set()
        await until(lambda: store.kept[-1].values == [3, 4])
        assert poller.gauge.health.state is State.OK
        assert poller.gauge.health.why == ""
        assert poller.gauge.health.scans == before + 1
        seen = await watch.next()
        assert seen is not None
        assert list(seen.values) == [3, 4]
        assert list((await asked).values) == [3, 4]  # not the sign of life
    assert [k.values for k in store.kept] == [[1, 2], [None, None], [3, 4]]
    assert sum("answers again" in record.getMessage() for record in caplog.records) == 1


async def test_a_sign_of_life_alone_is_enough_to_be_well() -> None:
    async def source() -> AsyncIterator[Scan]:
        yield Scan(boot_ns(), (), ())
        await asyncio.sleep(3600)

    store = ListStore()
    async with running(poller := poller_of(Speaking(source), store)):
        await until(lambda: poller.gauge.health.state is State.OK)
        assert (poller.gauge.health.scans, poller.gauge.health.readings) == (0, 0)
    assert store.frames == []


async def test_what_a_full_queue_dropped_becomes_a_gap() -> None:
    async def source() -> AsyncIterator[Scan]:
        yield scan_of(1, 2)
        driver.overruns += 5
        yield scan_of(3, 4)
        await asyncio.sleep(3600)

    driver, store = Speaking(source), ListStore()
    async with running(poller := poller_of(driver, store)):
        await until(lambda: len(store.frames) >= 2 and store.gaps)
    assert store.gaps == [("overrun", "scale", 5, 10)]
    assert poller.gauge.health.overruns == 5


async def test_what_a_queue_dropped_before_its_driver_failed_is_told_all_the_same() -> None:
    async def source() -> AsyncIterator[Scan]:
        yield scan_of(1, 2)
        driver.overruns += 3
        raise ValueError("the driver's own fault")

    async def goes_on() -> AsyncIterator[Scan]:
        yield scan_of(5, 6)
        await asyncio.sleep(3600)

    driver, store = Speaking(source), ListStore()
    async with running(poller_of(driver, store, build=lambda: Speaking(goes_on))):
        await until(lambda: any(k.values == [5, 6] for k in store.kept))
    assert store.gaps == [("overrun", "scale", 3, 6)]


async def test_a_source_that_ends_or_breaks_is_started_again() -> None:
    async def ends() -> AsyncIterator[Scan]:
        yield scan_of(1, 2)

    async def breaks() -> AsyncIterator[Scan]:
        yield scan_of(3, 4)
        raise DeviceUnreachable("cable pulled", Reason.DISCONNECTED)

    async def goes_on() -> AsyncIterator[Scan]:
        yield scan_of(5, 6)
        await asyncio.sleep(3600)

    drivers = iter([Speaking(breaks), Speaking(goes_on)])
    store = ListStore()
    poller = poller_of(Speaking(ends), store, build=lambda: next(drivers))
    async with running(poller):
        await until(lambda: poller.gauge.health.restarts == 1 and poller.gauge.health.failures >= 2)
    assert [1, 2] in [kept.values for kept in store.kept]
    assert [3, 4] in [kept.values for kept in store.kept]


# --- what a technician asks of it ---


async def test_what_is_asked_never_overlaps_a_poll_and_is_not_kept() -> None:
    async def slow(n: int) -> Scan:
        await asyncio.sleep(0.004)
        return scan_of(n, n)

    driver, store = Asked(slow), ListStore()
    poller = poller_of(driver, store, period_s=0.02)
    async with running(poller):
        answers = await asyncio.gather(*(poller.ask_read() for _ in range(30)))
        await until(lambda: len(store.kept) >= 5)
    assert driver.overlaps == 0
    asked = {scan.values[0] for scan in answers}
    assert len(asked) == 30  # each a read of its own
    assert asked.isdisjoint(kept.values[0] for kept in store.kept)


async def test_a_look_changes_no_judgement_of_what_is_kept() -> None:
    """A jump between two kept readings is doubtful, whoever saw it happen in between."""
    points = (Point(name="a", type=ValueType.U16, max_rate_per_s=10.0),)
    jumped = False

    async def jump(n: int) -> Scan:
        return Scan(boot_ns(), points, (1000 if jumped else 0,))

    driver, store = Asked(jump), ListStore()
    driver.points = points
    poller = poller_of(driver, store, period_s=1.0)
    async with running(poller):
        await until(lambda: store.frames)
        kept = len(store.frames)
        jumped = True
        assert (await poller.ask_read()).reasons == {0: Reason.RATE}
        assert (await poller.ask_read()).reasons == {0: Reason.RATE}
        assert len(store.frames) == kept
        await until(lambda: len(store.frames) > kept)
        assert store.kept[kept].reasons == {0: Reason.RATE}


async def test_what_is_asked_waits_where_it_would_delay_a_poll() -> None:
    async def slow(n: int) -> Scan:
        await asyncio.sleep(0.05)
        return scan_of(n, n)

    driver, store = Asked(slow), ListStore()
    poller = poller_of(driver, store, period_s=0.4)
    loop = asyncio.get_running_loop()
    async with running(poller):
        await until(lambda: len(store.kept) >= 2)
        for late_s in (0.01, 0.03):
            # Just before its slot: slots are at whole multiples of the period.
            slot_s = math.ceil(loop.time() / 0.4 + 0.5) * 0.4
            await asyncio.sleep(slot_s - late_s - loop.time())
            polls = len(store.kept)
            await poller.ask_read()
            assert len(store.kept) == polls + 1  # the poll came first
    starts_s = [kept.taken_at_ns / 1e9 - 0.05 for kept in store.kept[2:]]
    gaps = [b - a for a, b in itertools.pairwise(starts_s)]
    assert all(gap == pytest.approx(round(gap / 0.4) * 0.4, abs=0.04) for gap in gaps), gaps


async def test_a_device_that_is_down_is_tried_at_once_for_who_asks() -> None:
    away = True

    async def answer(n: int) -> Scan:
        if away:
            raise DeviceUnreachable("no power", Reason.TIMEOUT)
        return scan_of(n, n)

    driver = Asked(answer)
    poller = poller_of(driver, ListStore(), period_s=30.0)
    async with running(poller):
        await until(lambda: poller.gauge.health.state is State.DOWN)
        with pytest.raises(DeviceUnreachable, match="no power") as caught:
            await poller.ask_read()
        assert caught.value.reason is Reason.TIMEOUT
        away = False
        async with asyncio.timeout(5):
            assert (await poller.ask_read()).values[0] in (driver.reads, driver.reads - 1)


async def test_a_write_is_one_call_read_back_and_gone_if_given_up_before_it_began() -> None:
    class Writable(Asked):
        written: list[Value] = []  # noqa: RUF012 - of one test

        async def write(self, point: Point, value: Value) -> None:
            if value == 13:
                raise PointRefused(point.name, "not this one")
            if value == 99:
                await asyncio.sleep(3600)
            self.written.append(value)

        async def read(self, points: Sequence[Point]) -> Scan:
            await super().read(points)
            return Scan(boot_ns(), tuple(points), [len(self.written)] * len(points))

    driver, store = Writable(good), ListStore()
    poller = poller_of(driver, store, deadline_s=0.2)
    async with running(poller):
        back = await poller.ask_write(POINTS[1], 7)
        assert (back.points, back.values) == ((POINTS[1],), [1])
        with pytest.raises(PointRefused, match="not this one"):
            await poller.ask_write(POINTS[0], 13)
        given_up = asyncio.ensure_future(poller.ask_write(POINTS[0], 8))
        await asyncio.sleep(0)
        given_up.cancel()
        assert (await poller.ask_write(POINTS[0], 9)).values == [2]
        assert driver.connects == 1  # a refusal is no fault
        with pytest.raises(DeviceUnreachable, match=r"no answer within 0.2 s"):
            await poller.ask_write(POINTS[0], 99)
        await until(lambda: driver.connects == 2)
    assert driver.written == [7, 9]
    assert driver.overlaps == 0


async def test_who_looks_on_sees_every_scan_judged_and_the_failures_too() -> None:
    async def answer(n: int) -> Scan:
        if n == 3:
            raise DeviceUnreachable("away", Reason.TIMEOUT)
        return scan_of(2000 if n == 2 else n, n)

    driver, store = Asked(answer), ListStore()
    poller = poller_of(driver, store)
    watch = poller.watch()
    async with running(poller):
        async with asyncio.timeout(20):
            seen = [await watch.next() for _ in range(4)]
        poller.unwatch(watch)
    first, judged, failed, after = [scan for scan in seen if scan is not None]
    assert first.values[0] == 1
    assert judged.reasons == {0: Reason.RANGE}
    assert failed.reasons == {0: Reason.TIMEOUT, 1: Reason.TIMEOUT}
    assert after.values[0] == 4
    assert poller.watch().missed == 0
    assert await poller.watch().next() is None  # it is polled no more


async def test_an_onlooker_that_is_too_slow_misses_the_oldest() -> None:
    driver, store = Asked(good), ListStore()
    poller = poller_of(driver, store, period_s=0.0)
    watch = poller.watch()
    async with running(poller):
        await until(lambda: driver.reads > 500)
    assert watch.missed > 400
    first = await watch.next()
    assert first is not None
    assert isinstance(first.values[0], int)
    assert first.values[0] == watch.missed + 1


async def test_a_pushing_device_answers_with_its_next_message() -> None:
    go = asyncio.Event()

    async def source() -> AsyncIterator[Scan]:
        for n in itertools.count(1):
            await go.wait()
            await asyncio.sleep(0.002)
            yield scan_of(n, 5000)

    store = ListStore()
    poller = poller_of(Speaking(source), store)
    async with running(poller):
        asking = asyncio.ensure_future(poller.ask_read())
        await asyncio.sleep(0.02)
        assert not asking.done()
        go.set()
        assert (await asking).values == (1, 5000)
        with pytest.raises(PointRefused, match="speaks by itself"):
            await poller.ask_write(POINTS[0], 1)
    with pytest.raises(DeviceUnreachable):
        await poller.ask_read()


async def test_who_asks_a_driver_that_fails_is_told_and_the_driver_is_built_anew() -> None:
    async def fail(n: int) -> Scan:
        if n > 2:
            raise ZeroDivisionError("division by zero")
        return scan_of(n, n)

    second = Asked(good)
    poller = poller_of(Asked(fail), ListStore(), period_s=3600.0, build=lambda: second)
    async with running(poller):
        await poller.ask_read()
        with pytest.raises(DeviceUnreachable, match="ZeroDivisionError") as caught:
            await poller.ask_read()
        assert caught.value.reason is Reason.DRIVER
        assert (await poller.ask_read()).values == (1, 1)
    assert poller.gauge.health.restarts == 1


async def test_a_driver_that_blocks_gives_the_others_a_turn_after_each_read() -> None:
    async def block(n: int) -> Scan:
        time.sleep(0.03)  # noqa: ASYNC251 - as a bad driver does
        return scan_of(n, n)

    blocking, neighbour = Asked(block, "bad"), Asked(good, "neighbour")
    async with running(poller_of(blocking, ListStore()), poller_of(neighbour, ListStore())):
        await until(lambda: blocking.reads >= 20)
    assert neighbour.reads >= 10


async def test_what_a_driver_learnt_is_told_once_and_given_to_its_successor() -> None:
    class Learning(Asked):
        recalled: bytes | None = None
        news: bytes | None = None

        def remembered(self) -> bytes | None:
            news, self.news = self.news, None
            return news

        def recall(self, remembered: bytes) -> None:
            self.recalled = remembered

    async def fail(n: int) -> Scan:
        first.news = b"refuses 7"
        raise ZeroDivisionError

    first, second = Learning(fail), Learning(good)
    poller = poller_of(first, ListStore(), build=lambda: second)
    poller._memory = b"of last year"
    async with running(poller):
        await until(lambda: second.reads >= 1)
        assert first.recalled == b"of last year"
        assert second.recalled == b"refuses 7"
        assert poller.learnt() == b"refuses 7"
        assert poller.learnt() is None
        second.news = b"refuses 8"
    assert poller.learnt() == b"refuses 8"


# --- whatever a driver makes of being told to end ---


async def swallows(n: int) -> Scan:
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(0.005)
    return scan_of(n, n)


async def calls_it_unreachable(n: int) -> Scan:
    try:
        await asyncio.sleep(0.005)
    except asyncio.CancelledError as err:
        raise DeviceUnreachable("interrupted") from err
    return scan_of(n, n)


async def calls_it_a_fault(n: int) -> Scan:
    try:
        await asyncio.sleep(0.005)
    except asyncio.CancelledError as err:
        raise OSError("interrupted") from err
    return scan_of(n, n)


async def speaks_on() -> AsyncIterator[Scan]:
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0.005)
        yield scan_of(1, 1)


@pytest.mark.parametrize(
    "driver",
    [Asked(swallows), Asked(calls_it_unreachable), Asked(calls_it_a_fault), Speaking(speaks_on)],
    ids=["swallows", "unreachable", "fault", "pushes on"],
)
async def test_a_device_that_is_removed_is_read_no_more_whatever_its_driver_does(driver: AnyDriver) -> None:
    """Else a reload would leave it running, and start its successor beside it."""
    store = ListStore()
    poller = poller_of(driver, store, period_s=0.01)
    task = asyncio.create_task(poller.run())
    await until(lambda: store.readings > 4)
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=1.0)
    assert done
    assert task.cancelled()
    kept = store.readings
    await asyncio.sleep(0.1)
    assert store.readings == kept


async def test_who_stopped_waiting_for_a_silent_device_keeps_nobody_else_from_asking() -> None:
    speak = asyncio.Event()

    async def silent() -> AsyncIterator[Scan]:
        await speak.wait()
        yield scan_of(7, 7)
        await asyncio.Event().wait()

    poller = poller_of(Speaking(silent), ListStore())
    async with running(poller):
        for _ in range(200):
            asked = asyncio.ensure_future(poller.ask_read())
            await asyncio.sleep(0)
            asked.cancel()
        asked = asyncio.ensure_future(poller.ask_read())
        await asyncio.sleep(0)
        speak.set()
        assert (await asked).values == (7, 7)


async def test_points_of_different_priority_travel_in_frames_of_their_own_and_none_is_lost() -> None:
    points = (
        Point(name="a", type=ValueType.U16),
        Point(name="door", type=ValueType.BOOL, priority=Priority.ALARM),
        Point(name="b", type=ValueType.U16),
        Point(name="wave", type=ValueType.F32, priority=Priority.BULK),
    )
    store = ListStore()
    scan = Scan(1000, points, (1, True, None, 2.5), {2: Reason.TIMEOUT})

    async def read(number: int) -> Scan:
        return scan

    driver = Asked(read)
    driver.points = points
    assert poller_of(driver, store)._append(scan, 4)
    kept = store.kept
    assert store.priorities == [Priority.ALARM, Priority.NORMAL, Priority.BULK]
    assert [k.names for k in kept] == [("door",), ("a", "b"), ("wave",)]
    assert [list(k.values) for k in kept] == [[True], [1, None], [2.5]]
    assert [k.reasons for k in kept] == [{}, {1: Reason.TIMEOUT}, {}]
    assert {k.taken_at_ns for k in kept} == {1000}
    assert store.readings == 4
