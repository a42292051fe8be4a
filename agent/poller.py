"""Reads the devices: one task each, on a schedule that neither drifts nor piles up.

Rules:
1. A scan's way is read → judge → encode → append, in one go; nothing is awaited between, nothing is made per value.
2. The schedule is absolute, on the monotonic clock: slot k is at `phase + k * period`. A slot whose time passes while
   the one before is still being read is skipped and counted as an overrun; it is never made up for.
3. Every call into a driver has a deadline. A device that does not answer is tried again with full-jitter backoff, on
   its own schedule, so that it takes no more of a shared line than a living one; each failed attempt is kept as one
   scan of bad readings with the reason, at most one per period.
4. What one device or driver does never reaches another: `DeviceUnreachable` is retried, `ConfigError` stops this
   device with the remedy, and any other exception is the driver's own fault: a new driver is built, with backoff.
5. A change of state is logged once, when it happens; retries in between are DEBUG. One damaged message is a bad scan,
   not a change of state; a device that comes and goes is told of a few times an hour, and its health tells the rest.
6. What a technician asks of a device (`ask_read`, `ask_write`) is served by its own task, between two polls, so calls
   into a driver never overlap. It waits until after the next poll where it would probably delay that; what it read is
   shown, not kept. A device that is down is tried at once.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import struct
import zlib
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from time import perf_counter_ns
from typing import Any, Final, Protocol, TypeVar

import msgspec

from agent.backoff import full_jitter
from agent.health import Gauge, State, duration_in_words
from agent.validation import Rules, ScanShapeError
from drivers.contract import (
    ConfigError,
    DeviceUnreachable,
    Driver,
    DriverError,
    Point,
    PointRefused,
    Priority,
    PushDriver,
    Reason,
    Scan,
    Value,
    boot_ns,
)
from drivers.registry import AnyDriver
from sync.wire import Layout, Packing, WireError, encode_scan, layout_of

log = logging.getLogger(__name__)

_T = TypeVar("_T")

BACKOFF_CAP_S: Final = 8.0  #: with the wait for a slot, a device that is back is read within 10 s
RESTART_MIN_S: Final = 1.0
RESTART_CAP_S: Final = 60.0  #: a driver that fails by itself is restarted no more rarely than this
_PROVEN_S: Final = (
    10.0  #: one that has run for so long is restarted at once again; one good scan proves nothing
)
DEADLINE_S: Final = 5.0  #: of a read, where nothing is configured and the period is shorter
LONGEST_DEADLINE_S: Final = 30.0
CLOSE_S: Final = 2.0  #: for a driver to let go of its device; leaving takes at most 5 s in all
_ALIGN_UP_TO_S: Final = 2.0  #: with longer periods a lost device is tried between its slots too
_GRACE: Final = 0.1  #: of a period: a slot this little late is served late instead of skipped
_SHARE_EVERY: Final = 16  #: scans of a device that never waits, until the others get a turn
_SHARE_AFTER_S: Final = 0.01  #: and after so long, for a driver that blocks instead of waiting
_BAD_IN_A_ROW: Final = 3  #: scans without one usable value until the device counts as down
_CHANGES_TOLD: Final = 12  #: changes of one device's state in an hour that the log tells
PUSH_READ_S: Final = 30.0  #: how long somebody who asks waits for a device that speaks when it likes
_MOST_ASKED: Final = 64  #: requests that wait for one device
_WATCH_SIZE: Final = 64  #: scans that a slow onlooker may be behind
_MOST_PACKINGS: Final = 256  #: selections of points in one device's messages, until the cache starts afresh


_SILENT: Final = frozenset(
    {Reason.STALE, Reason.TIMEOUT, Reason.DISCONNECTED}
)  #: not a matter of one message


class Store(Protocol):
    """Where scans go: `agent.buffer.Buffer`, as a poller sees it. Nothing here waits for the disk."""

    boot: int

    def register(self, layout: Layout) -> Packing: ...

    def append(self, frame: bytes, readings: int, priority: Priority = Priority.NORMAL) -> bool: ...

    def record_event(self, code: str, text: str, device: str = "") -> None: ...

    def record_gap(
        self, reason: str, *, device: str, scans: int, readings: int, from_boot_ns: int, to_boot_ns: int
    ) -> None: ...


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One device, ready to be polled. `build` makes its driver, anew after every fault."""

    name: str
    driver: str
    measurement: str
    tags: tuple[tuple[str, str], ...]
    points: tuple[Point, ...]
    period_s: float  #: 0: as fast as it answers (benchmarks)
    phase_s: float
    deadline_s: float
    build: Callable[[], AnyDriver]
    priority: Priority = Priority.NORMAL  #: of the points that have none of their own


class _Part(msgspec.Struct, frozen=True):
    """The points of one priority within a scan, ready to be cut out of it."""

    priority: Priority
    at: tuple[int, ...]  #: where they are in the scan; () where they are all of it
    points: tuple[Point, ...]
    packing: Packing


def phase_of(name: str, period_s: float) -> float:
    """A phase for a device that was given none: spread evenly over the period by its name."""
    return period_s * (zlib.crc32(name.encode()) / 2**32)


class Schedule:
    """When a device is read: slot k is at `phase_s + k * period_s` of the loop's clock. Pure."""

    __slots__ = ("_last", "period_s", "phase_s")

    def __init__(self, period_s: float, phase_s: float) -> None:
        self.period_s = period_s
        self.phase_s = phase_s
        self._last: int | None = None

    def start(self, now_s: float) -> int:
        """A read begins now, on or off the grid. How many slots went by since the last one."""
        if not self.period_s:
            return 0
        slot = math.floor((now_s - self.phase_s) / self.period_s + _GRACE)
        passed = 0 if self._last is None else max(0, slot - self._last - 1)
        self._last = slot
        return passed

    def next(self, now_s: float) -> tuple[float, int]:
        """When to read next (it may be a moment ago), and how many slots were skipped because their time passed."""
        if not self.period_s:
            return now_s, 0
        due = self._due(now_s)
        last = due - 1 if self._last is None else self._last
        slot = max(last + 1, due)
        self._last = slot
        return self.phase_s + slot * self.period_s, slot - last - 1

    def slot_after(self, now_s: float) -> float:
        """The first slot that is not before `now_s`; nothing is marked as read."""
        return self.phase_s + self._due(now_s) * self.period_s if self.period_s else now_s

    def _due(self, now_s: float) -> int:
        return math.ceil((now_s - self.phase_s) / self.period_s - _GRACE)


class _Asked(msgspec.Struct):
    """What somebody asks of a device: to be read, or (with a point) to be written and that point read back."""

    answer: asyncio.Future[Scan]
    point: Point | None = None
    raw: Value = 0
    waits_for_s: float | None = None  #: the slot of a poll that goes first; it is served before the next one


class Watch:
    """One device's scans, for somebody who looks on: as they were judged, failed attempts too. Who is too slow misses
    the oldest."""

    __slots__ = ("_ended", "_scans", "_wake", "missed")

    def __init__(self) -> None:
        self._scans: deque[Scan] = deque()
        self._wake = asyncio.Event()
        self._ended = False
        self.missed = 0  #: scans

    def show(self, scan: Scan) -> None:
        if len(self._scans) >= _WATCH_SIZE:
            self._scans.popleft()
            self.missed += 1
        self._scans.append(scan)
        self._wake.set()

    def end(self) -> None:
        self._ended = True
        self._wake.set()

    async def next(self) -> Scan | None:
        """The next scan; `None` once the device is polled no more."""
        while not self._scans:
            if self._ended:
                return None
            self._wake.clear()
            await self._wake.wait()
        return self._scans.popleft()


class DevicePoller:
    """One device's task. `run` returns only where the configuration stops the device; else it is cancelled."""

    def __init__(
        self,
        plan: Plan,
        driver: AnyDriver,
        store: Store,
        gauge: Gauge,
        rng: random.Random,
        memory: bytes | None = None,
    ) -> None:
        """`driver` is the first one, already built; `memory` is what it remembered in an earlier life. Raises
        `ConfigError` for rules that cannot be judged, and for more points than can travel together."""
        self.plan = plan
        self.gauge = gauge
        self._driver = driver
        self._store = store
        self._rng = rng
        self._points: tuple[Any, ...] = tuple(driver.points)
        self._rules = Rules(self._points)
        self._parts = self._parts_of(self._points)
        self._packing = self._parts[0].packing
        self._plain = len(self._parts) == 1 and self._parts[0].priority is Priority.NORMAL
        self._selections: dict[tuple[str, ...], tuple[_Part, ...]] = {}
        self._schedule = Schedule(plan.period_s, plan.phase_s)
        self._attempt = 0  #: since the last good scan
        self._faults = 0  #: of drivers that did not run for long
        self._built_s = -math.inf  #: when the present driver was
        self._trouble_since_s: float | None = None
        self._bad_kept_s = -math.inf  #: when the last scan of a failed attempt was kept
        self._bad_in_a_row = 0
        self._told_s: deque[float] = deque(maxlen=_CHANGES_TOLD)  #: when changes of state were logged
        self._unshared = 0
        self._shared_s = 0.0
        self._dropped_before = 0  #: by the driver's own queue
        self._memory = memory
        self._unsaved: bytes | None = None  #: of what the driver learnt
        self._asked: deque[_Asked] = deque()
        self._waker: asyncio.Future[None] | None = None  #: while the task waits for its next slot
        self._watches: list[Watch] = []
        self._over: DriverError | None = None  #: why `run` ended

    # --- for others, on the same loop ---

    @property
    def points(self) -> tuple[Point, ...]:
        return self._points

    @property
    def driver(self) -> AnyDriver:
        return self._driver

    async def ask_read(self) -> Scan:
        """A fresh read; of a pushing device its next message. Raises `DeviceUnreachable`, `ConfigError`."""
        asked = self._ask(_Asked(asyncio.get_running_loop().create_future()))
        if isinstance(self._driver, Driver):
            return await asked.answer
        try:
            async with asyncio.timeout(PUSH_READ_S):
                return await asked.answer
        except TimeoutError:
            raise DeviceUnreachable(f"it said nothing within {PUSH_READ_S:g} s", Reason.TIMEOUT) from None

    async def ask_write(self, point: Point, raw: Value) -> Scan:
        """Write one raw value, and read that point back. Raises `PointRefused` too. Who stops waiting before the
        write began has undone it; after that it is carried out."""
        if not isinstance(self._driver, Driver):
            raise PointRefused(point.name, "the device speaks by itself and cannot be written")
        return await self._ask(_Asked(asyncio.get_running_loop().create_future(), point, raw)).answer

    def watch(self) -> Watch:
        """Every scan from now on. Given back by `unwatch`."""
        watch = Watch()
        if self._over is not None:
            watch.end()
        self._watches.append(watch)
        return watch

    def unwatch(self, watch: Watch) -> None:
        if watch in self._watches:
            self._watches.remove(watch)

    def learnt(self) -> bytes | None:
        """What the driver has learnt since this was last asked, if anything; also after `run` has ended."""
        self._learn()
        learnt, self._unsaved = self._unsaved, None
        return learnt

    def _learn(self) -> None:
        try:
            learnt = self._driver.remembered()
        except Exception as err:  # noqa: BLE001 - a driver's fault is told, and stays with its device
            log.warning(
                "%s: its driver cannot say what it learnt: %s: %s", self.plan.name, type(err).__name__, err
            )
            return
        if learnt is not None:
            self._memory = self._unsaved = learnt

    def _ask(self, asked: _Asked) -> _Asked:
        if self._over is not None:
            raise self._over
        if len(self._asked) >= _MOST_ASKED:
            # Those who stopped waiting take no place: a sensor that is silent for hours gathers many of them.
            self._asked = deque(each for each in self._asked if not each.answer.done())
        if len(self._asked) >= _MOST_ASKED:
            raise DeviceUnreachable(f"{len(self._asked)} requests wait for it already", Reason.BUSY)
        self._asked.append(asked)
        if self._waker is not None and not self._waker.done():
            self._waker.set_result(None)
        return asked

    # --- its task ---

    async def run(self) -> None:
        """Connect, read, and go on after every failure."""
        broken = False
        self._recall()
        ending = _ending()
        try:
            while True:
                try:
                    if broken:
                        self._built_s = asyncio.get_running_loop().time()
                        self._driver = self.plan.build()
                        self._points = tuple(self._driver.points)
                        self._rules = Rules(self._points)
                        self._dropped_before = 0
                        self._recall()
                        broken = False
                    if isinstance(self._driver, Driver):
                        await self._poll(self._driver)
                    else:
                        await self._listen(self._driver)
                except DeviceUnreachable as err:
                    wait_s = self._unreachable(err)
                    self._refuse_asked(err)
                except ConfigError as err:
                    self._misconfigured(err)
                    self._over = err
                    return
                except asyncio.CancelledError as err:
                    task = asyncio.current_task()
                    if task is None or task.cancelling():
                        raise
                    wait_s = self._fault(err)  # the driver raised it by itself
                    broken = True
                except Exception as err:  # noqa: BLE001 - whatever a driver raises must stay with its device
                    wait_s = self._fault(err)
                    broken = True
                if ending():  # its driver made something else of it
                    raise asyncio.CancelledError
                if broken:
                    self._refuse_asked(DeviceUnreachable(self.gauge.health.why, Reason.DRIVER))
                    self._learn()
                    await self._close()
                await self._pause(asyncio.get_running_loop().time() + wait_s, None)
        finally:
            self._over = self._over or DeviceUnreachable("it is not polled any more")
            self._refuse_asked(self._over)
            for watch in self._watches:
                watch.end()
            self._learn()
            await self._close()
            if self.gauge.health.state is not State.MISCONFIGURED:
                self.gauge.enter(State.STOPPED)

    # --- a device that is asked ---

    async def _poll(self, driver: Driver[Any, Any]) -> None:
        await self._connect(driver)
        loop = asyncio.get_running_loop()
        health, schedule, points = self.gauge.health, self._schedule, self._points
        read, deadline_s, took, keep = driver.read, self.plan.deadline_s, self.gauge.took, self._keep
        ending = _ending()
        if self._asked:
            await self._serve(driver, loop.time())
        health.missed += schedule.start(loop.time())
        while True:
            started = perf_counter_ns()
            deadline = asyncio.timeout(deadline_s)
            try:
                async with deadline:
                    scan = await read(points)
            except TimeoutError:
                if not deadline.expired():
                    raise
                raise DeviceUnreachable(f"no answer within {deadline_s:g} s", Reason.TIMEOUT) from None
            took(perf_counter_ns() - started)
            if scan.points is not points and tuple(scan.points) != points:
                raise ScanShapeError(
                    f"asked for {len(points)} points, given a scan of {len(scan.points)} others"
                )
            keep(scan)
            if ending():  # its driver swallowed it: what is removed is read no more, whatever it does
                raise asyncio.CancelledError
            when_s, skipped = schedule.next(now_s := loop.time())
            if skipped:
                health.overruns += skipped
            if when_s > now_s:
                self._unshared = 0
                await self._pause(when_s, driver)
            else:
                if self._asked:
                    await self._serve(driver, now_s)
                await self._share(now_s)

    async def _pause(self, until_s: float, driver: Driver[Any, Any] | None) -> None:
        """Until then, serving what is asked meanwhile. Without a driver (the device is down) what is asked ends the
        pause, so that it is tried at once."""
        loop = asyncio.get_running_loop()
        while loop.time() < until_s:
            if self._asked:
                if driver is None:
                    return
                await self._serve(driver, until_s)
            self._waker = waker = loop.create_future()
            timer = loop.call_at(until_s, _wake, waker)
            try:
                await waker
            finally:
                timer.cancel()
                self._waker = None

    async def _serve(self, driver: Driver[Any, Any], due_s: float) -> None:
        """What is asked, one after the other, but nothing that would probably delay the poll due at `due_s`."""
        loop = asyncio.get_running_loop()
        while self._asked:
            asked = self._asked[0]
            now_s = loop.time()
            if asked.waits_for_s in (None, due_s) and now_s < due_s < now_s + self.gauge.typical_s():
                for each in self._asked:
                    each.waits_for_s = due_s
                return
            self._asked.popleft()
            if asked.answer.done():
                continue  # nobody waits for it any more
            try:
                scan = await self._answered(driver, asked)
            except PointRefused as err:
                _refuse(asked, err)
            except DriverError as err:
                _refuse(asked, err)
                raise
            except asyncio.CancelledError:
                _refuse(asked, DeviceUnreachable("it is not polled any more"))
                raise
            except Exception as err:  # what it is, `run` judges
                _refuse(
                    asked,
                    DeviceUnreachable(f"its driver failed: {type(err).__name__}: {err}", Reason.DRIVER),
                )
                raise
            else:
                if not asked.answer.done():
                    asked.answer.set_result(scan)

    async def _answered(self, driver: Driver[Any, Any], asked: _Asked) -> Scan:
        points = self._points
        if asked.point is not None:
            await self._within(driver.write(asked.point, asked.raw))
            points = (asked.point,)
        return self._rules.glance(await self._within(driver.read(points)))

    async def _within(self, call: Awaitable[_T]) -> _T:
        deadline = asyncio.timeout(self.plan.deadline_s)
        try:
            async with deadline:
                return await call
        except TimeoutError:
            if not deadline.expired():
                raise
            raise DeviceUnreachable(f"no answer within {self.plan.deadline_s:g} s", Reason.TIMEOUT) from None

    def _refuse_asked(self, err: DriverError) -> None:
        while self._asked:
            _refuse(self._asked.popleft(), err)

    # --- a device that speaks ---

    async def _listen(self, driver: PushDriver[Any, Any]) -> None:
        await self._connect(driver)
        loop = asyncio.get_running_loop()
        scans = driver.scans()
        since_ns, readings = boot_ns(), len(self._points)
        ending = _ending()
        try:
            async for scan in scans:
                if ending():
                    raise asyncio.CancelledError
                if not scan.points and not scan.values:
                    self._well("it is there, with nothing new yet")
                    self._dropped(driver, since_ns, readings)
                    await self._share(loop.time())
                    continue
                judged = self._keep(scan)
                while self._asked:
                    answer = self._asked.popleft().answer
                    if not answer.done():
                        answer.set_result(judged)
                since_ns, readings = scan.taken_at_ns, len(scan.values)
                self._dropped(driver, since_ns, readings)
                await self._share(loop.time())
        finally:
            self._dropped(driver, since_ns, readings)  # also where the driver fails: a new one counts from 0
            if isinstance(scans, AsyncGenerator):
                await scans.aclose()
        raise RuntimeError("its driver stopped giving scans without saying why")

    def _dropped(self, driver: PushDriver[Any, Any], since_ns: int, readings: int) -> None:
        """The driver's queue was full: what it dropped becomes a gap, of `readings` a scan."""
        dropped = driver.overruns - self._dropped_before
        self._dropped_before = driver.overruns
        if dropped <= 0:
            return
        self.gauge.health.overruns += dropped
        self._store.record_gap(
            "overrun", device=self.plan.name, scans=dropped, readings=dropped * readings,
            from_boot_ns=since_ns, to_boot_ns=max(boot_ns(), since_ns),
        )  # fmt: skip

    async def _connect(self, driver: AnyDriver) -> None:
        deadline_s = max(self.plan.deadline_s, DEADLINE_S)
        deadline = asyncio.timeout(deadline_s)
        try:
            async with deadline:
                await driver.connect()
        except TimeoutError:
            if not deadline.expired():
                raise
            raise DeviceUnreachable(f"no connection within {deadline_s:g} s", Reason.TIMEOUT) from None

    async def _share(self, now_s: float) -> None:
        """Let the others have their turn, now and then, where a device never makes us wait."""
        self._unshared += 1
        if self._unshared >= _SHARE_EVERY or now_s - self._shared_s > _SHARE_AFTER_S:
            self._unshared, self._shared_s = 0, now_s
            await asyncio.sleep(0)

    # --- a scan's way ---

    def _keep(self, scan: Scan) -> Scan:
        """Judge, encode, append: the whole cost of a scan on our side. The scan as it was judged."""
        scan = self._rules.apply(scan)
        values = scan.values
        if self._append(scan, len(values)):
            self.gauge.count(scan)
        else:
            self.gauge.health.overruns += 1
        if self._watches:
            self._show(scan)
        if self.gauge.health.state is State.OK and len(scan.reasons) < len(values):
            self._bad_in_a_row = 0
        else:
            self._noticed(scan)
        return scan

    def _show(self, scan: Scan) -> None:
        for watch in self._watches:
            watch.show(scan)

    def _append(self, scan: Scan, readings: int) -> bool:
        if not self._plain or scan.points is not self._points:
            return self._append_parts(scan)
        store = self._store
        try:
            frame = encode_scan(self._packing, scan, store.boot)
        except (struct.error, TypeError, OverflowError, UnicodeEncodeError):
            # Some value is not of its type. Which one is looked for only now, so that a good scan pays nothing.
            frame = encode_scan(self._packing, self._rules.examine(scan), store.boot)
        return store.append(frame, readings)

    def _append_parts(self, scan: Scan) -> bool:
        """One frame per priority, each with a layout of its own."""
        parts = self._parts if scan.points is self._points else self._parts_for(scan)
        store = self._store
        try:
            frames = [encode_scan(part.packing, _cut(scan, part), store.boot) for part in parts]
        except (struct.error, TypeError, OverflowError, UnicodeEncodeError):
            scan = self._rules.examine(scan)
            frames = [encode_scan(part.packing, _cut(scan, part), store.boot) for part in parts]
        kept = True
        for part, frame in zip(parts, frames, strict=True):
            kept &= store.append(frame, len(part.points), part.priority)
        return kept

    def _parts_for(self, scan: Scan) -> tuple[_Part, ...]:
        names = tuple(point.name for point in scan.points)
        parts = self._selections.get(names)
        if parts is None:
            if len(self._selections) >= _MOST_PACKINGS:
                self._selections.clear()
            parts = self._selections[names] = self._parts_of(scan.points)
        return parts

    def _parts_of(self, points: tuple[Point, ...]) -> tuple[_Part, ...]:
        """The points by priority, alarms first. Points of one priority are all of one part, which cuts nothing."""
        wanted = [point.priority or self.plan.priority for point in points]
        if not wanted:
            self._register(points)  # says what is wrong
        parts = []
        for priority in Priority:
            at = tuple(i for i, each in enumerate(wanted) if each is priority)
            if at:
                chosen = points if len(at) == len(points) else tuple(points[i] for i in at)
                parts.append(
                    _Part(priority, at if chosen is not points else (), chosen, self._register(chosen))
                )
        return tuple(parts)

    def _register(self, points: tuple[Point, ...]) -> Packing:
        plan = self.plan
        try:
            return self._store.register(
                layout_of(plan.name, plan.driver, plan.measurement, points, plan.tags)
            )
        except WireError as err:
            raise ConfigError(str(err)) from err

    def _keep_bad(self, reason: Reason) -> None:
        """A failed attempt as readings: every point bad with the reason, at most once per period."""
        now_s = asyncio.get_running_loop().time()
        if now_s - self._bad_kept_s < max(self.plan.period_s, 1.0) * (1 - _GRACE):
            return
        self._bad_kept_s = now_s
        count = len(self._points)
        scan = Scan(boot_ns(), self._points, (None,) * count, dict.fromkeys(range(count), reason))
        if self._append(scan, count):
            self.gauge.count(scan)
        else:
            self.gauge.health.overruns += 1
        self._show(scan)

    # --- states, each said once ---

    def _noticed(self, scan: Scan) -> None:
        """A scan came while the device was not fine, or a scan without one usable value."""
        if len(scan.reasons) == len(scan.values) and not any(r.has_value for r in scan.reasons.values()):
            reason = next(iter(scan.reasons.values()))
            self._bad_in_a_row += 1
            if reason in _SILENT:
                self._down("says nothing" if reason is Reason.STALE else "does not answer", reason)
            elif self._bad_in_a_row >= _BAD_IN_A_ROW:
                self._down(f"gives no usable value ({reason.name.lower()})", reason)
            return
        self._well(f"first scan, {len(scan.values) - len(scan.reasons)} of {len(scan.values)} points good")

    def _well(self, first: str) -> None:
        """The device is fine; said once, as `first` where it was never otherwise."""
        self._attempt = self._bad_in_a_row = 0
        if not self.gauge.enter(State.OK):
            return
        now_s = asyncio.get_running_loop().time()
        if self._trouble_since_s is None:
            log.info("%s: %s", self.plan.name, first)
        else:
            lasted = duration_in_words(now_s - self._trouble_since_s)
            self._trouble_since_s = None
            self._tell(logging.INFO, f"answers again after {lasted}")

    def _tell(self, level: int, text: str, err: BaseException | None = None) -> None:
        """Log a change of state, unless this device's have been told too often within the hour."""
        now_s = asyncio.get_running_loop().time()
        told = self._told_s
        if len(told) == _CHANGES_TOLD and now_s - told[0] < 3600:
            log.debug("%s: %s", self.plan.name, text)
            return
        told.append(now_s)
        if len(told) == _CHANGES_TOLD and now_s - told[0] < 3600:
            text += "; it comes and goes: not told again within the hour, see headgate status"
        log.log(level, "%s: %s", self.plan.name, text, exc_info=err)

    def _down(self, why: str, reason: Reason) -> None:
        if self._trouble_since_s is None:
            self._trouble_since_s = asyncio.get_running_loop().time()
        if self.gauge.enter(State.DOWN, why, reason):
            self._tell(logging.WARNING, f"{why}; trying on. Remedy: {self.gauge.health.remedy}")
        else:
            log.debug("%s: %s", self.plan.name, why)

    def _unreachable(self, err: DeviceUnreachable) -> float:
        """The device did not answer: how long to wait before the next try."""
        self.gauge.health.failures += 1
        self._down(str(err), err.reason)
        self._keep_bad(err.reason)
        period_s = self.plan.period_s
        cap_s = BACKOFF_CAP_S if err.retry_within_s is None else min(BACKOFF_CAP_S, err.retry_within_s)
        jitter_s = full_jitter(self._attempt, min(max(period_s, 0.1), 1.0), cap_s, self._rng)
        self._attempt += 1
        now_s = asyncio.get_running_loop().time()
        if isinstance(self._driver, Driver) and 0 < period_s <= _ALIGN_UP_TO_S:
            # Only at its own slots, so that a dead device takes no more of a shared line than a living one. At least
            # one hundredth of the period: the slot just used is not used again.
            return self._schedule.slot_after(now_s + max(jitter_s, period_s * (_GRACE + 0.01))) - now_s
        return max(jitter_s, 0.05)

    def _fault(self, err: BaseException) -> float:
        """The driver failed by itself: how long to wait before a new one is built."""
        health = self.gauge.health
        health.failures += 1
        health.restarts += 1
        if self._trouble_since_s is None:
            self._trouble_since_s = asyncio.get_running_loop().time()
        why = f"driver {self.plan.driver!r} failed: {type(err).__name__}: {err}"
        if self.gauge.enter(State.FAULT, why, Reason.DRIVER):
            self._tell(logging.ERROR, f"{why}; it is restarted with backoff", err)
            self._store.record_event("driver-fault", why, self.plan.name)
        else:
            log.debug("%s: %s", self.plan.name, why)
        self._keep_bad(Reason.DRIVER)
        if asyncio.get_running_loop().time() - self._built_s > _PROVEN_S:
            self._faults = 0
        wait_s = RESTART_MIN_S / 10 + full_jitter(self._faults, RESTART_MIN_S, RESTART_CAP_S, self._rng)
        self._faults += 1
        return wait_s

    def _misconfigured(self, err: ConfigError) -> None:
        """Only a human can help: stop this device, and say what to change."""
        self.gauge.enter(State.MISCONFIGURED, str(err))
        self.gauge.health.remedy = "change its configuration, then reload it: systemctl reload headgate"
        self._keep_bad(Reason.DRIVER)
        log.error("%s: stopped, its configuration cannot work: %s", self.plan.name, err)
        self._store.record_event("misconfigured", str(err), self.plan.name)

    def _recall(self) -> None:
        if self._memory is None:
            return
        try:
            self._driver.recall(self._memory)
        except Exception as err:  # noqa: BLE001 - promised not to raise; and it can learn again
            log.warning(
                "%s: what its driver had learnt is of no use: %s: %s",
                self.plan.name,
                type(err).__name__,
                err,
            )

    async def _close(self) -> None:
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._driver.close()
        except Exception as err:  # noqa: BLE001 - a driver that cannot even close must not hold up the others
            log.warning("%s: its driver failed to close: %s: %s", self.plan.name, type(err).__name__, err)


def _cut(scan: Scan, part: _Part) -> Scan:
    """What of a scan belongs to a part."""
    if not part.at:
        return scan
    reasons, values = scan.reasons, scan.values
    told = {new: reasons[old] for new, old in enumerate(part.at) if old in reasons} if reasons else {}
    return Scan(scan.taken_at_ns, part.points, [values[i] for i in part.at], told)


def _ending() -> Callable[[], int]:
    """Whether the current task has been told to end."""
    task = asyncio.current_task()
    return int if task is None else task.cancelling


def _wake(waker: asyncio.Future[None]) -> None:
    if not waker.done():
        waker.set_result(None)


def _refuse(asked: _Asked, err: DriverError) -> None:
    if not asked.answer.done():
        asked.answer.set_exception(err)
