"""What every driver must do, as checks that its own tests run::

    @pytest.mark.parametrize("check", conformance.PULL, ids=conformance.title)
    async def test_conforms(check: conformance.Check) -> None:
        await check(conformance.Subject(build=lambda: build("x", "mine", OPTIONS, POINTS)))

A check fails with an `AssertionError` that says what the contract asks. The device itself (a server on loopback, a pty,
a simulated adapter) is the test's affair; it must be there and answer while the checks run. Needs no pytest.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec

from drivers.codec import limits_of
from drivers.contract import (
    DeviceUnreachable,
    Driver,
    DriverError,
    Point,
    PushDriver,
    Reason,
    Scan,
    Value,
    ValueType,
    boot_ns,
)

Pull: TypeAlias = Driver[Any, Any]
Push: TypeAlias = PushDriver[Any, Any]


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """A driver with a device to drive. Every call of `build` gives a fresh driver of the same device."""

    build: Callable[[], Pull | Push]
    absent: Callable[[], Pull | Push] | None = None  #: the same driver, where no device answers
    provoke: Callable[[], Awaitable[None]] | None = None  #: makes a pushing device say something
    deadline_s: float = 10.0  #: for one call


Check: TypeAlias = Callable[[Subject], Awaitable[None]]


def title(check: Check) -> str:
    """A check's name, for pytest's `ids`."""
    return getattr(check, "__name__", str(check))


# ---------------------------------------------------------------------------------------- any driver


async def close_is_safe_at_any_time(subject: Subject) -> None:
    """Without `connect`, after it, and twice."""
    driver = subject.build()
    await _within(subject, driver.close())
    await _within(subject, driver.close())
    driver = subject.build()
    await _within(subject, driver.connect())
    await _within(subject, driver.close())
    await _within(subject, driver.close())


async def connect_may_be_called_again(subject: Subject) -> None:
    """The poller does so after every `DeviceUnreachable`."""
    async with _connected(subject) as driver:
        await _within(subject, driver.connect())
        _judge(driver, await _one_scan(subject, driver))


async def nothing_is_left_behind(subject: Subject) -> None:
    """Ten lives leave no task and no open file."""
    await _life(subject)  # what is opened once for all (a resolver's thread, a bus) is opened now
    tasks, files = asyncio.all_tasks(), _open_files()
    for _ in range(10):
        await _life(subject)
    for _ in range(100):
        if asyncio.all_tasks() <= tasks and _open_files() <= files:
            return
        await asyncio.sleep(0.02)
    left = [task.get_name() for task in asyncio.all_tasks() - tasks]
    raise AssertionError(f"after close: tasks {left}, {_open_files() - files} more open files than before")


async def an_absent_device_is_unreachable(subject: Subject) -> None:
    """`DeviceUnreachable` from `connect` or from the first read, within the deadline, and `close` still works."""
    if subject.absent is None:
        return
    driver = subject.absent()
    try:
        await _within(subject, driver.connect())
        await _one_scan(subject, driver, provoke=False)
    except DeviceUnreachable as err:
        _must(not err.reason.has_value, f"reason {err.reason.name} goes on points that have no value")
    except TimeoutError:
        # A device that speaks when it likes may as well be silent.
        _must(isinstance(driver, PushDriver), "neither an answer nor an error within the deadline")
    else:
        raise AssertionError("a device that is not there was read")
    finally:
        await _within(subject, driver.close())


# ------------------------------------------------------------------------------------- pull drivers


async def points_come_in_the_order_asked(subject: Subject) -> None:
    """All, reversed, one alone: exactly these, in this order."""
    async with _connected(subject) as device:
        driver = _pulled(device)
        points = list(driver.points)
        for asked in (points, points[::-1], points[:1], points[-1:], tuple(points)):
            _judge(driver, await _within(subject, driver.read(asked)), asked)


async def a_scan_is_stamped_when_it_arrived(subject: Subject) -> None:
    """On the boot clock, between the call and its return, and never backwards."""
    async with _connected(subject) as device:
        driver = _pulled(device)
        last_ns = 0
        for _ in range(5):
            before_ns = boot_ns()
            scan = await _within(subject, driver.read(driver.points))
            _must(
                before_ns <= scan.taken_at_ns <= boot_ns(),
                "taken_at_ns is not the time of this read's response",
            )
            _must(scan.taken_at_ns > last_ns, "taken_at_ns went back or stood still")
            last_ns = scan.taken_at_ns


async def reading_before_connect_is_unreachable(subject: Subject) -> None:
    driver = _pulled(subject.build())
    try:
        await _within(subject, driver.read(driver.points))
    except DeviceUnreachable:
        return
    finally:
        await _within(subject, driver.close())
    raise AssertionError("a read before connect gave a scan")


async def a_cancelled_read_does_no_harm(subject: Subject) -> None:
    """Cancelled at any point, the next read (after a `connect`, if it asks for one) is right."""
    async with _connected(subject) as device:
        driver = _pulled(device)
        for turns in range(12):
            reading = asyncio.ensure_future(driver.read(driver.points))
            for _ in range(turns):
                await asyncio.sleep(0)
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError, DriverError):
                await reading
            _judge(driver, await _one_scan(subject, driver))


# ------------------------------------------------------------------------------------- push drivers


async def scans_tell_what_the_device_said(subject: Subject) -> None:
    """Own points only, each once, with a value or a reason, stamped as they come."""
    async with _connected(subject) as driver:
        before_ns = boot_ns()
        scan = await _one_scan(subject, driver)
        _judge(driver, scan)
        _must(before_ns <= scan.taken_at_ns <= boot_ns(), "taken_at_ns is not the time the message arrived")


async def listening_can_be_cancelled_and_resumed(subject: Subject) -> None:
    async with _connected(subject) as driver:
        if not isinstance(driver, PushDriver):
            raise AssertionError("this check is for a PushDriver")
        waiting = asyncio.ensure_future(_first(driver.scans()))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        _judge(driver, await _one_scan(subject, driver))


_ANY: Final[tuple[Check, ...]] = (
    close_is_safe_at_any_time,
    connect_may_be_called_again,
    nothing_is_left_behind,
    an_absent_device_is_unreachable,
)
PULL: Final[tuple[Check, ...]] = (
    *_ANY,
    points_come_in_the_order_asked,
    a_scan_is_stamped_when_it_arrived,
    reading_before_connect_is_unreachable,
    a_cancelled_read_does_no_harm,
)
PUSH: Final[tuple[Check, ...]] = (
    *_ANY,
    scans_tell_what_the_device_said,
    listening_can_be_cancelled_and_resumed,
)


# ------------------------------------------------------------------------------------------- inside


def _must(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def _pulled(driver: Pull | Push) -> Pull:
    if not isinstance(driver, Driver):
        raise AssertionError("this check is for a Driver")
    return driver


async def _within(subject: Subject, call: Awaitable[Any]) -> Any:
    async with asyncio.timeout(subject.deadline_s):
        return await call


@contextlib.asynccontextmanager
async def _connected(subject: Subject) -> AsyncIterator[Pull | Push]:
    driver = subject.build()
    try:
        await _within(subject, driver.connect())
        yield driver
    finally:
        await _within(subject, driver.close())


async def _life(subject: Subject) -> None:
    async with _connected(subject) as driver:
        await _one_scan(subject, driver)


async def _one_scan(subject: Subject, driver: Pull | Push, *, provoke: bool = True) -> Scan:
    if isinstance(driver, Driver):
        try:
            scan: Scan = await _within(subject, driver.read(driver.points))
        except DeviceUnreachable:
            await _within(subject, driver.connect())
            scan = await _within(subject, driver.read(driver.points))
        return scan
    heard = asyncio.ensure_future(_first(driver.scans()))
    try:
        await asyncio.sleep(0)
        if provoke and subject.provoke is not None:
            await subject.provoke()
        async with asyncio.timeout(subject.deadline_s):
            return await heard
    finally:
        heard.cancel()


async def _first(scans: AsyncIterator[Scan]) -> Scan:
    try:
        return await anext(scans)
    finally:
        # An async generator left half-way keeps what it holds until the collector comes.
        closing = getattr(scans, "aclose", None)
        if closing is not None:
            await closing()


def _judge(driver: Pull | Push, scan: Scan, asked: Sequence[Point] | None = None) -> None:
    """The rules of a scan."""
    if asked is None and isinstance(driver, Driver):
        asked = driver.points
    if asked is not None:
        _must(list(scan.points) == list(asked), "the scan's points are not those asked, in that order")
    own = {point.name: point for point in driver.points}
    _must(
        all(own.get(point.name) == point for point in scan.points),
        "the scan names a point the device has not",
    )
    _must(len({point.name for point in scan.points}) == len(scan.points), "a point comes twice in one scan")
    _must(len(scan.values) == len(scan.points), "there is not one value per point")
    _must(all(0 <= i < len(scan.points) for i in scan.reasons), "a reason belongs to no point")
    for i, (point, value) in enumerate(zip(scan.points, scan.values, strict=True)):
        reason = scan.reasons.get(i, Reason.GOOD)
        if value is None:
            _must(
                not reason.has_value,
                f"{point.name}: there is no value, and {reason.name} is no reason for that",
            )
        else:
            _must(reason.has_value, f"{point.name}: a value, but {reason.name} says there is none")
            _must(_is_of(value, point.type), f"{point.name}: {value!r} is not a raw {point.type}")


def _is_of(value: Value, type_: ValueType) -> bool:
    if type_ is ValueType.BOOL:
        return isinstance(value, bool)
    if type_ is ValueType.STR:
        return isinstance(value, str)
    if isinstance(value, bool | str):
        return False
    if type_ in (ValueType.F32, ValueType.F64):
        return isinstance(value, float) and math.isfinite(value)
    low, high = limits_of(type_)
    return isinstance(value, int) and low <= value <= high


def _open_files() -> int:
    files = Path("/proc/self/fd")
    return sum(1 for _ in files.iterdir()) if files.exists() else 0
