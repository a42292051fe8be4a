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
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import struct
import zlib
from collections import deque
from collections.abc import AsyncGenerator, Callable
from time import perf_counter_ns
from typing import Any, Final, Protocol

import msgspec

from agent.backoff import full_jitter
from agent.health import Gauge, State, duration_in_words
from agent.validation import Rules, ScanShapeError
from drivers.contract import (
    ConfigError,
    DeviceUnreachable,
    Driver,
    Point,
    PushDriver,
    Reason,
    Scan,
    boot_ns,
)
from drivers.registry import AnyDriver
from sync.wire import Layout, Packing, WireError, encode_scan, layout_of

log = logging.getLogger(__name__)

BACKOFF_CAP_S: Final = 8.0  #: with the wait for a slot, a device that is back is read within 10 s
RESTART_MIN_S: Final = 1.0
RESTART_CAP_S: Final = 60.0  #: a driver that fails by itself is restarted no more rarely than this
DEADLINE_S: Final = 5.0  #: of a read, where nothing is configured and the period is shorter
LONGEST_DEADLINE_S: Final = 30.0
CLOSE_S: Final = 2.0  #: for a driver to let go of its device; leaving takes at most 5 s in all
_ALIGN_UP_TO_S: Final = 2.0  #: with longer periods a lost device is tried between its slots too
_GRACE: Final = 0.1  #: of a period: a slot this little late is served late instead of skipped
_SHARE_EVERY: Final = 16  #: scans of a device that never waits, until the others get a turn
_BAD_IN_A_ROW: Final = 3  #: scans without one usable value until the device counts as down
_CHANGES_TOLD: Final = 12  #: changes of one device's state in an hour that the log tells
_MOST_PACKINGS: Final = 256  #: selections of points in one device's messages, until the cache starts afresh


_SILENT: Final = frozenset(
    {Reason.STALE, Reason.TIMEOUT, Reason.DISCONNECTED}
)  #: not a matter of one message


class Store(Protocol):
    """Where scans go: `agent.buffer.Buffer`, as a poller sees it. Nothing here waits for the disk."""

    boot: int

    def register(self, layout: Layout) -> Packing: ...

    def append(self, frame: bytes, readings: int) -> bool: ...

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


class DevicePoller:
    """One device's task. `run` returns only where the configuration stops the device; else it is cancelled."""

    def __init__(self, plan: Plan, driver: AnyDriver, store: Store, gauge: Gauge, rng: random.Random) -> None:
        """`driver` is the first one, already built. Raises `ConfigError` for rules that cannot be judged,
        and for more points than can travel together."""
        self.plan = plan
        self.gauge = gauge
        self._driver = driver
        self._store = store
        self._rng = rng
        self._points: tuple[Any, ...] = tuple(driver.points)
        self._rules = Rules(self._points)
        self._packing = self._register(self._points)
        self._packings: dict[tuple[str, ...], Packing] = {}
        self._schedule = Schedule(plan.period_s, plan.phase_s)
        self._attempt = 0  #: since the last good scan
        self._faults = 0  #: since the last good scan
        self._trouble_since_s: float | None = None
        self._bad_kept_s = -math.inf  #: when the last scan of a failed attempt was kept
        self._bad_in_a_row = 0
        self._told_s: deque[float] = deque(maxlen=_CHANGES_TOLD)  #: when changes of state were logged
        self._unshared = 0
        self._dropped_before = 0  #: by the driver's own queue

    async def run(self) -> None:
        """Connect, read, and go on after every failure."""
        broken = False
        try:
            while True:
                try:
                    if broken:
                        self._driver = self.plan.build()
                        self._points = tuple(self._driver.points)
                        self._rules = Rules(self._points)
                        self._dropped_before = 0
                        broken = False
                    if isinstance(self._driver, Driver):
                        await self._poll(self._driver)
                    else:
                        await self._listen(self._driver)
                except DeviceUnreachable as err:
                    wait_s = self._unreachable(err)
                except ConfigError as err:
                    self._misconfigured(err)
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
                if broken:
                    await self._close()
                await asyncio.sleep(wait_s)
        finally:
            await self._close()
            if self.gauge.health.state is not State.MISCONFIGURED:
                self.gauge.enter(State.STOPPED)

    # --- a device that is asked ---

    async def _poll(self, driver: Driver[Any, Any]) -> None:
        await self._connect(driver)
        loop = asyncio.get_running_loop()
        health, schedule, points = self.gauge.health, self._schedule, self._points
        read, deadline_s, took, keep = driver.read, self.plan.deadline_s, self.gauge.took, self._keep
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
            when_s, skipped = schedule.next(now_s := loop.time())
            if skipped:
                health.overruns += skipped
            if when_s > now_s:
                self._unshared = 0
                await asyncio.sleep(when_s - now_s)
            else:
                await self._share()

    # --- a device that speaks ---

    async def _listen(self, driver: PushDriver[Any, Any]) -> None:
        await self._connect(driver)
        scans = driver.scans()
        since_ns, readings = boot_ns(), len(self._points)
        try:
            async for scan in scans:
                self._keep(scan)
                since_ns, readings = scan.taken_at_ns, len(scan.values)
                self._dropped(driver, since_ns, readings)
                await self._share()
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

    async def _share(self) -> None:
        """Let the others have their turn, now and then, where a device never makes us wait."""
        self._unshared += 1
        if self._unshared >= _SHARE_EVERY:
            self._unshared = 0
            await asyncio.sleep(0)

    # --- a scan's way ---

    def _keep(self, scan: Scan) -> None:
        """Judge, encode, append: the whole cost of a scan on our side."""
        scan = self._rules.apply(scan)
        values = scan.values
        if self._append(scan, len(values)):
            self.gauge.count(scan)
        else:
            self.gauge.health.overruns += 1
        if self.gauge.health.state is State.OK and len(scan.reasons) < len(values):
            self._bad_in_a_row = 0
            return
        self._noticed(scan)

    def _append(self, scan: Scan, readings: int) -> bool:
        packing = self._packing if scan.points is self._points else self._packing_of(scan)
        store = self._store
        try:
            frame = encode_scan(packing, scan, store.boot)
        except (struct.error, TypeError, OverflowError, UnicodeEncodeError):
            # Some value is not of its type. Which one is looked for only now, so that a good scan pays nothing.
            frame = encode_scan(packing, self._rules.examine(scan), store.boot)
        return store.append(frame, readings)

    def _packing_of(self, scan: Scan) -> Packing:
        names = tuple(point.name for point in scan.points)
        packing = self._packings.get(names)
        if packing is None:
            if len(self._packings) >= _MOST_PACKINGS:
                self._packings.clear()
            packing = self._packings[names] = self._register(scan.points)
        return packing

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
        self._attempt = self._faults = self._bad_in_a_row = 0
        if not self.gauge.enter(State.OK):
            return
        now_s = asyncio.get_running_loop().time()
        if self._trouble_since_s is None:
            good, all_of_it = len(scan.values) - len(scan.reasons), len(scan.values)
            log.info("%s: first scan, %d of %d points good", self.plan.name, good, all_of_it)
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
        jitter_s = full_jitter(self._attempt, min(max(period_s, 0.1), 1.0), BACKOFF_CAP_S, self._rng)
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
        wait_s = RESTART_MIN_S / 10 + full_jitter(self._faults, RESTART_MIN_S, RESTART_CAP_S, self._rng)
        self._faults += 1
        return wait_s

    def _misconfigured(self, err: ConfigError) -> None:
        """Only a human can help: stop this device, and say what to change."""
        self.gauge.enter(State.MISCONFIGURED, str(err))
        self.gauge.health.remedy = "change its configuration, then restart the agent"
        self._keep_bad(Reason.DRIVER)
        log.error("%s: stopped, its configuration cannot work: %s", self.plan.name, err)
        self._store.record_event("misconfigured", str(err), self.plan.name)

    async def _close(self) -> None:
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._driver.close()
        except Exception as err:  # noqa: BLE001 - a driver that cannot even close must not hold up the others
            log.warning("%s: its driver failed to close: %s: %s", self.plan.name, type(err).__name__, err)
