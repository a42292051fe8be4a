"""What every driver must do, as checks that any driver's own tests run. With pytest::

    @pytest.mark.headgate_driver(kind=MyDriver)
    async def test_conforms(headgate_check: Check, subject: Subject) -> None:
        await headgate_check(subject)

(`drivers.pytest_plugin` gives `headgate_check`, once for each check of this kind of driver), or by hand::

    @pytest.mark.parametrize("check", conformance.PULL, ids=conformance.title)
    async def test_conforms(check: conformance.Check) -> None:
        await check(conformance.Subject(build=lambda: build("x", "mine", OPTIONS, POINTS)))

Rules:
- A check asks one thing and fails with an `AssertionError` that says what the contract asks.
- The device itself (a server on loopback, a pty, a simulated adapter) is the test's affair; it must be there and answer
  while the checks run. The more of `Subject` a test gives, the more is shown: `lacks` tells what cannot be.
- Here nothing knows pytest.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import math
import os
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import msgspec

from drivers.codec import limits_of
from drivers.conformance_watch import LoopWatch, busy_threads, open_files, traced
from drivers.contract import (
    DeviceUnreachable,
    Driver,
    DriverError,
    LineClaim,
    Point,
    PointRefused,
    PushDriver,
    Reason,
    Scan,
    Value,
    ValueType,
    boot_ns,
)

Pull: TypeAlias = Driver[Any, Any]
Push: TypeAlias = PushDriver[Any, Any]
Action: TypeAlias = Callable[[], Awaitable[None] | None]
"""Something done to the device; a plain function or an async one."""

READS: Final = int(
    os.environ.get("HEADGATE_READS", "1000")
)  #: of `many_reads_leak_nothing`; a full run has 10,000
ALL_READS: Final = "HEADGATE_READS" in os.environ  #: asked for: then no time limit shortens them
BLOCKED_S: Final = 0.5  #: other devices are polled every 20 ms at most; a busy machine needs the rest
END_S: Final = 2.0  #: for a cancelled call to end (the poller gives `close` as long)
REMEMBERED_BYTES: Final = 65_536  #: "small"
_LEAK_BYTES: Final = 16  #: a read may keep; the smallest Python object is larger
_LEAK_FLOOR_BYTES: Final = 16_384  #: what caches and the interpreter do meanwhile


class Fault(msgspec.Struct, frozen=True):
    """Something that happens to the device or its line, and how it ends. `inject` returns when it has happened."""

    inject: Action
    heal: Action


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """A driver with a device to drive. Every call of `build` gives a fresh driver of the same device."""

    build: Callable[[], Pull | Push]
    absent: Callable[[], Pull | Push] | None = None  #: the same driver, where no device answers
    provoke: Action | None = None  #: makes a pushing device say something
    change: Action | None = None  #: makes every point's value in the device another one
    truth: Callable[[], Mapping[str, Value]] | None = (
        None  #: the raw values that the device holds now, by point
    )
    silence: Fault | None = None  #: the device says nothing at all, its line stays open
    faults: Mapping[
        str, Fault
    ] = {}  #: what else befalls it: unplugged, garbage, a cut message, restarted, ...
    deadline_s: float = 10.0  #: for one call
    recovery_s: float = (
        10.0  #: after a fault is healed, until a right scan (a device back is read within 10 s)
    )
    try_s: float = 1.0  #: for one call while the device is in trouble (more than the driver's own timeout)
    reads_s: float = 8.0  #: `many_reads_leak_nothing` stops after this, unless HEADGATE_READS is set
    peer_files: tuple[str, ...] = ()  #: the test's own side of the wire, whose memory is not judged


Check: TypeAlias = Callable[[Subject], Awaitable[None]]


def title(check: Check) -> str:
    """A check's name, for pytest's `ids`."""
    return getattr(check, "__name__", str(check))


def lacks(check: Check, subject: Subject) -> str | None:
    """What `subject` would have to give for this check to show anything; `None`: it can be run."""
    needed = _NEEDS.get(check, ())
    missing = [name for name in needed if not getattr(subject, name)]
    return f"not shown: the subject gives no {' and no '.join(missing)}" if missing else None


# ---------------------------------------------------------------------------------------- any driver


async def building_opens_nothing(subject: Subject) -> None:
    """`__init__` keeps the configuration and does no IO: `config check` builds every device of a file, with no event
    loop running."""
    trouble: list[BaseException] = []

    def without_loop() -> None:
        try:
            subject.build()
        except BaseException as err:  # noqa: BLE001 - told below
            trouble.append(err)

    thread = threading.Thread(target=without_loop)
    thread.start()
    thread.join()
    _must(
        not trouble,
        f"a driver could not be built with no event loop running: {trouble[:1]}; make it in connect",
    )
    tasks, files = asyncio.all_tasks(), open_files()
    driver = subject.build()
    _must(asyncio.all_tasks() <= tasks, "building a driver started a task; start it in connect")
    _must(open_files() <= files, "building a driver opened a file; open it in connect")
    await _within(subject, driver.close())


async def its_line_is_told_by_its_configuration(subject: Subject) -> None:
    """`line` is pure: the same before `connect`, while connected and after, and it opens nothing."""
    driver = subject.build()
    files = open_files()
    told = driver.line()
    _must(told is None or isinstance(told, LineClaim), f"line() gave {told!r}; it gives a LineClaim or None")
    _must(driver.line() == told, "line() gave two answers to one question")
    _must(open_files() <= files, "line() opened a file; it is asked before anything runs")
    try:
        await _within(subject, driver.connect())
        _must(driver.line() == told, "line() changed with connect; it is told by the configuration alone")
    finally:
        await _within(subject, driver.close())
    _must(subject.build().line() == told, "line() of the same device built again is another one")


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
    tasks, files = asyncio.all_tasks(), open_files()
    for _ in range(10):
        await _life(subject)
    if await _until(lambda: asyncio.all_tasks() <= tasks and open_files() <= files):
        return
    left = [task.get_name() for task in asyncio.all_tasks() - tasks]
    raise AssertionError(f"after close: tasks {left}, {open_files() - files} more open files than before")


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


async def the_event_loop_is_never_held_up(subject: Subject) -> None:
    """All devices share one event loop: a call that blocks it (a serial read, time.sleep, a long sum) stops them all.
    Use asyncio, or `asyncio.to_thread` for what cannot; or say `isolate = true`."""
    watch = LoopWatch()
    async with watch.watching(), _connected(subject) as driver:
        await _one_scan(subject, driver)
        if subject.silence is not None:
            async with _under(subject.silence):
                await _tried(driver, subject)
    _must(
        watch.longest_s < BLOCKED_S,
        f"the event loop stood still for {watch.longest_s:.1f} s at {watch.where}",
    )


async def a_hanging_device_holds_up_nobody(subject: Subject) -> None:
    """While the device is silent, every call returns or raises within its deadline, or can be cancelled at once; and
    `close` is not kept waiting either."""
    if subject.silence is None:
        return
    driver = subject.build()
    closed = False
    try:
        await _within(subject, driver.connect())
        await _one_scan(subject, driver)
        async with _under(subject.silence):
            for name in ("read", "connect"):
                call = _call(driver, name)
                done, _ = await asyncio.wait({call}, timeout=min(subject.deadline_s, subject.try_s))
                if not done:
                    call.cancel()
                    done, _ = await asyncio.wait({call}, timeout=END_S)
                _must(bool(done), f"{name} of a silent device could not be cancelled within {END_S:g} s")
                if not call.cancelled():
                    call.exception()
            closing = asyncio.ensure_future(driver.close())
            closed = True
            done, _ = await asyncio.wait({closing}, timeout=END_S)
            if not done:
                await _ended(closing)
            _must(bool(done), f"close took longer than {END_S:g} s, as its device is silent")
            closing.result()
    finally:
        if not closed:
            with contextlib.suppress(TimeoutError):
                await _within(subject, driver.close())


async def only_the_contracts_errors_leave_it(subject: Subject) -> None:
    """`DeviceUnreachable` (the poller tries again) or `ConfigError` (a human must help); anything else counts as the
    driver's own fault. And what a driver calls unreachable has a reason that stands for "no value"."""
    for name, fault in _all_faults(subject).items():
        driver = subject.build()
        try:
            await _within(subject, driver.connect())
            await _one_scan(subject, driver)
            async with _under(fault):
                for _ in range(2):
                    for call in ("read", "connect"):
                        _judge_error(await _tried(driver, subject, call), f"{call} under {name!r}")
        finally:
            await _within(subject, driver.close())
    driver = subject.build()
    if isinstance(driver, Driver):
        try:
            _judge_error(await _tried(driver, subject, "read"), "read before connect")
        finally:
            await _within(subject, driver.close())


async def a_fault_gives_no_wrong_value(subject: Subject) -> None:
    """Whatever happens on the line: a value is what the device holds, or there is a reason instead."""
    if subject.truth is None:
        return
    for name, fault in _all_faults(subject).items():
        async with _connected(subject) as driver:
            _judge_truth(subject, await _one_scan(subject, driver), "with nothing wrong")
            async with _under(fault):
                for _ in range(3):
                    for scan in await _seen(driver, subject):
                        _judge_truth(subject, scan, f"under {name!r}")
            for scan in await _seen(driver, subject):
                _judge_truth(subject, scan, f"just after {name!r}")


async def it_recovers_after_each_fault(subject: Subject) -> None:
    """A device that is back is read again, all of it, by the same driver: `connect` and read as the poller does."""
    for name, fault in _all_faults(subject).items():
        driver = subject.build()
        try:
            await _within(subject, driver.connect())
            first = await _one_scan(subject, driver)
            good = {point.name for i, point in enumerate(first.points) if i not in first.reasons}
            async with _under(fault):
                for _ in range(2):
                    await _tried(driver, subject)
            seen = "nothing"
            loop = asyncio.get_running_loop()
            give_up_s = loop.time() + subject.recovery_s
            while good:
                try:
                    scan = await _one_scan(subject, driver)
                    bad = {
                        point.name: scan.reasons[i].name
                        for i, point in enumerate(scan.points)
                        if i in scan.reasons
                    }
                    seen = f"reasons {bad}"
                    if good <= {point.name for point in scan.points if point.name not in bad}:
                        break
                except TimeoutError:
                    seen = "no answer"
                except Exception as err:  # noqa: BLE001 - which errors are right is another check's affair
                    seen = f"{type(err).__name__}: {err}"
                    with contextlib.suppress(Exception):
                        await _within(subject, driver.connect())
                _must(
                    loop.time() < give_up_s,
                    f"{subject.recovery_s:g} s after {name!r} ended, points that were good are not: {seen}",
                )
                await asyncio.sleep(0.02)
        finally:
            await _within(subject, driver.close())


async def old_values_get_no_new_time(subject: Subject) -> None:
    """A value that the device no longer holds is not told again with a later time: not from a cache after it changed,
    and not while the device is silent."""
    async with _connected(subject) as driver:
        first = await _one_scan(subject, driver)
        if subject.change is not None:
            for _ in range(3):
                before = _values(first)
                await _do(subject.change)
                changed_ns = boot_ns()
                first = await _one_scan(subject, driver, after_ns=changed_ns)
                for name, value in _values(first).items():
                    _must(
                        name not in before or before[name] != value,
                        f"{name}: {value!r} again, stamped after the device changed to another value",
                    )
        if subject.silence is None:
            return
        async with _stream(subject, driver) as scan_once:
            await scan_once()
            async with _under(subject.silence):
                silent_ns = boot_ns()
                for _ in range(3):
                    with contextlib.suppress(TimeoutError, StopAsyncIteration, DriverError):
                        async with asyncio.timeout(subject.try_s):
                            scan = await scan_once()
                        told = _values(scan)
                        _must(
                            scan.taken_at_ns < silent_ns or not told,
                            f"{', '.join(told)}: told with a new time while the device said nothing",
                        )


async def many_reads_leak_nothing(subject: Subject) -> None:
    """10,000 reads keep no memory, no task, no open file. (HEADGATE_READS says how many; unset it is a short run.)"""
    loop = asyncio.get_running_loop()
    async with _connected(subject) as driver:
        async with _stream(subject, driver) as scan_once:
            async with _deadline(subject.reads_s + subject.deadline_s, "the first reads"):
                warm_s = loop.time() + subject.reads_s / 4
                for read in range(max(min(READS, 1000) // 10, 20)):  # caches fill
                    if read >= 20 and loop.time() > warm_s:
                        break
                    await scan_once()
            tasks, files = asyncio.all_tasks(), open_files()
            with traced() as watch:
                memory = watch((*subject.peer_files, _file_of(subject.build)))
                memory.look()
                grown: list[tuple[int, int, str]] = []
                for _half in range(2):
                    read, give_up_s = 0, loop.time() + subject.reads_s / 2
                    while read < READS // 2 and (ALL_READS or read < 50 or loop.time() < give_up_s):
                        async with _deadline(subject.reads_s + subject.deadline_s, "25 reads"):
                            for _ in range(25):
                                await scan_once()
                        read += 25
                    bytes_more, most = memory.look()
                    grown.append((bytes_more - read * _LEAK_BYTES, read, f"{bytes_more} bytes: {most}"))
            for over, read, text in [min(grown)]:  # a cache that is still filling grows in one half only
                _must(over < _LEAK_FLOOR_BYTES, f"{read} reads, and what is held grew by {text}")
        if not await _until(lambda: len(asyncio.all_tasks()) <= len(tasks) and open_files() <= files):
            left = [task.get_name() for task in asyncio.all_tasks() - tasks]
            raise AssertionError(f"after many reads: tasks {left}, {open_files() - files} more open files")
    gc.collect()


async def what_it_remembers_may_be_lost_or_damaged(subject: Subject) -> None:
    """`recall` ignores what it does not understand and never raises; `remembered` is small, and told once."""
    driver = subject.build()
    try:
        await _within(subject, driver.connect())
        await _one_scan(subject, driver)
        told = driver.remembered()
        if told is not None:
            _must(
                isinstance(told, bytes), f"remembered() gave a {type(told).__name__}; it gives bytes or None"
            )
            _must(
                len(told) <= REMEMBERED_BYTES,
                f"remembered() gave {len(told)} bytes; {REMEMBERED_BYTES} is much",
            )
            _must(driver.remembered() is None, "remembered() told the same again; None means nothing new")
    finally:
        await _within(subject, driver.close())
    chance = random.Random(9)
    sound = told or b""
    damaged = [b"", b"\x00", sound[: len(sound) // 2], sound[::-1], sound * 2, b"\xff" * 1000, b"{" * 10_000]
    damaged += [chance.randbytes(chance.randrange(1, 200)) for _ in range(100)]
    for _ in range(100 if sound else 0):
        bits = bytearray(sound)
        bits[chance.randrange(len(bits))] ^= 1 << chance.randrange(8)
        damaged.append(bytes(bits))
    for data in damaged:
        driver = subject.build()
        try:
            driver.recall(data)
        except Exception as err:
            raise AssertionError(
                f"recall of {data[:40]!r} raised {type(err).__name__}: {err}; what is not understood is ignored"
            ) from err
    driver = subject.build()
    driver.recall(damaged[-1])
    try:
        await _within(subject, driver.connect())
        _judge(driver, await _one_scan(subject, driver))
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
            scan = await _one_scan(subject, driver)
            _judge(driver, scan)
            _judge_truth(subject, scan, f"after a read that was cancelled at step {turns}")


async def a_read_that_is_over_goes_on_nowhere(subject: Subject) -> None:
    """Reads never overlap: when one has ended or was cancelled, no task and no thread of it still works, or it would
    meet the next one on the device's line. (A thread cannot be cancelled: give its call a timeout of its own.)"""
    async with _connected(subject) as device:
        driver = _pulled(device)
        await _one_scan(subject, driver)
        await asyncio.sleep(0.05)
        tasks, threads = asyncio.all_tasks(), busy_threads()
        if subject.silence is None:
            await _cancelled_midway(driver)
        else:
            async with _under(subject.silence):
                await _cancelled_midway(driver)
                await _judge_idle(tasks, threads)
        await _judge_idle(tasks, threads)


async def a_write_that_cannot_be_is_refused(subject: Subject) -> None:
    """`PointRefused` for a value of another kind, or for any where the device or the driver writes nothing."""
    async with _connected(subject) as device:
        driver = _pulled(device)
        for point in driver.points:
            wrong: Value = 1 if point.type is ValueType.STR else "not a number"
            try:
                await _within(subject, driver.write(point, wrong))
            except PointRefused as err:
                _must(err.point == point.name, f"the refusal of {point.name} names {err.point}")
            except DriverError:
                continue
            except Exception as err:
                raise AssertionError(
                    f"writing {wrong!r} to {point.name} raised {type(err).__name__}: {err}; raise PointRefused"
                ) from err
            else:
                raise AssertionError(f"{wrong!r} was written to {point.name}, a {point.type}")


# ------------------------------------------------------------------------------------- push drivers


async def scans_tell_what_the_device_said(subject: Subject) -> None:
    """Own points only, each once, with a value or a reason, stamped as they come and in that order."""
    async with _connected(subject) as driver:
        before_ns = boot_ns()
        scan = await _one_scan(subject, driver)
        _judge(driver, scan)
        _must(before_ns <= scan.taken_at_ns <= boot_ns(), "taken_at_ns is not the time the message arrived")
        async with _stream(subject, driver) as following, _deadline(3 * subject.deadline_s, "3 scans"):
            for _ in range(3):
                after = await following()
                _judge(driver, after)
                _must(after.taken_at_ns >= scan.taken_at_ns, "taken_at_ns went back")
                before_ns, scan = scan.taken_at_ns, after
            _must(scan.taken_at_ns > before_ns, "taken_at_ns stood still from one message to the next")


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
    building_opens_nothing,
    its_line_is_told_by_its_configuration,
    close_is_safe_at_any_time,
    connect_may_be_called_again,
    nothing_is_left_behind,
    an_absent_device_is_unreachable,
    the_event_loop_is_never_held_up,
    a_hanging_device_holds_up_nobody,
    only_the_contracts_errors_leave_it,
    a_fault_gives_no_wrong_value,
    it_recovers_after_each_fault,
    old_values_get_no_new_time,
    what_it_remembers_may_be_lost_or_damaged,
    many_reads_leak_nothing,
)
PULL: Final[tuple[Check, ...]] = (
    *_ANY,
    points_come_in_the_order_asked,
    a_scan_is_stamped_when_it_arrived,
    reading_before_connect_is_unreachable,
    a_cancelled_read_does_no_harm,
    a_read_that_is_over_goes_on_nowhere,
    a_write_that_cannot_be_is_refused,
)
PUSH: Final[tuple[Check, ...]] = (
    *_ANY,
    scans_tell_what_the_device_said,
    listening_can_be_cancelled_and_resumed,
)
_NEEDS: Final[Mapping[Check, tuple[str, ...]]] = {
    an_absent_device_is_unreachable: ("absent",),
    a_hanging_device_holds_up_nobody: ("silence",),
    only_the_contracts_errors_leave_it: ("faults",),
    a_fault_gives_no_wrong_value: ("faults", "truth"),
    it_recovers_after_each_fault: ("faults",),
    old_values_get_no_new_time: ("change", "silence"),
}


def checks_of(kind: type[Pull | Push]) -> tuple[Check, ...]:
    """The checks for this class of driver."""
    return PULL if issubclass(kind, Driver) else PUSH


# ------------------------------------------------------------------------------------------- inside


def _must(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def _pulled(driver: Pull | Push) -> Pull:
    if not isinstance(driver, Driver):
        raise AssertionError("this check is for a Driver")
    return driver


async def _do(action: Action) -> None:
    done = action()
    if inspect.isawaitable(done):
        await done


class _NoAnswer(AssertionError, TimeoutError):
    """A call took longer than the subject's deadline."""


@contextlib.asynccontextmanager
async def _deadline(limit_s: float, what: str) -> AsyncIterator[None]:
    deadline = asyncio.timeout(limit_s)
    try:
        async with deadline:
            yield
    except TimeoutError as err:
        if not deadline.expired():
            raise
        raise _NoAnswer(f"{what}: nothing within the deadline of {limit_s:g} s") from err


async def _within(subject: Subject, call: Awaitable[Any]) -> Any:
    async with _deadline(subject.deadline_s, getattr(call, "__qualname__", "a call")):
        return await call


async def _until(true: Callable[[], bool], limit_s: float = END_S) -> bool:
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + limit_s
    while not true():
        if loop.time() > give_up_s:
            return False
        await asyncio.sleep(0.02)
    return True


def _all_faults(subject: Subject) -> dict[str, Fault]:
    faults = dict(subject.faults)
    if subject.silence is not None:
        faults["silence"] = subject.silence
    return faults


@contextlib.asynccontextmanager
async def _under(fault: Fault) -> AsyncIterator[None]:
    await _do(fault.inject)
    try:
        yield
    finally:
        await _do(fault.heal)


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


async def _one_scan(
    subject: Subject, driver: Pull | Push, *, provoke: bool = True, after_ns: int = 0
) -> Scan:
    """The next scan (of a pushing device: stamped after `after_ns`), connecting again where that is asked for."""
    if isinstance(driver, Driver):
        try:
            scan: Scan = await _within(subject, driver.read(driver.points))
        except DeviceUnreachable:
            await _within(subject, driver.connect())
            scan = await _within(subject, driver.read(driver.points))
        return scan
    heard = asyncio.ensure_future(_first(driver.scans(), after_ns))
    try:
        await asyncio.sleep(0)
        if provoke and subject.provoke is not None:
            await _do(subject.provoke)
        async with _deadline(subject.deadline_s, "listening for a scan"):
            return await heard
    finally:
        await _ended(heard)


async def _ended(task: asyncio.Future[Any]) -> None:
    """Cancelled where it still runs, and over."""
    task.cancel()
    await asyncio.wait({task}, timeout=END_S)
    if task.done() and not task.cancelled():
        task.exception()


async def _message(scans: AsyncIterator[Scan]) -> Scan:
    """The next scan that carries points; one without only says that the device is well."""
    while True:
        scan = await anext(scans)
        if scan.points:
            return scan
        _must(not scan.values and not scan.reasons, "a scan without points has values or reasons")


async def _first(scans: AsyncIterator[Scan], after_ns: int = 0) -> Scan:
    try:
        while True:
            scan = await _message(scans)
            if scan.taken_at_ns >= after_ns:
                return scan
    finally:
        # An async generator left half-way keeps what it holds until the collector comes.
        closing = getattr(scans, "aclose", None)
        if closing is not None:
            await closing()


@contextlib.asynccontextmanager
async def _stream(subject: Subject, driver: Pull | Push) -> AsyncIterator[Callable[[], Awaitable[Scan]]]:
    """One scan after another, as the poller takes them: a pushing driver is listened to without a break. The caller
    sets the deadline: one for many, as each leaves a timer behind for a while."""
    if isinstance(driver, Driver):
        pulled = driver

        async def read() -> Scan:
            scan: Scan = await pulled.read(pulled.points)
            return scan

        yield read
        return
    scans = driver.scans()

    async def listen() -> Scan:
        coming = asyncio.ensure_future(_message(scans))
        try:
            await asyncio.sleep(0)
            if subject.provoke is not None and not coming.done():
                await _do(subject.provoke)
            return await coming
        finally:
            if not coming.done():
                await _ended(coming)

    try:
        yield listen
    finally:
        closing = getattr(scans, "aclose", None)
        if closing is not None:
            await closing()


def _call(driver: Pull | Push, name: str) -> asyncio.Task[Any]:
    """`connect`, or the next scan."""
    if name == "connect":
        return asyncio.create_task(driver.connect())
    if isinstance(driver, Driver):
        return asyncio.create_task(driver.read(driver.points))
    return asyncio.create_task(_first(driver.scans()))


async def _tried(driver: Pull | Push, subject: Subject, name: str = "read") -> BaseException | Scan | None:
    """What a call gave or raised; `None` where it was cancelled at its deadline, as the poller does."""
    call = _call(driver, name)
    if name == "read" and isinstance(driver, PushDriver) and subject.provoke is not None:
        await asyncio.sleep(0)
        with contextlib.suppress(OSError):  # nobody is there to be provoked
            await _do(subject.provoke)
    await asyncio.wait({call}, timeout=min(subject.try_s, subject.deadline_s))
    if not call.done():
        await _ended(call)
        return None
    if call.cancelled():
        return asyncio.CancelledError("raised by the driver itself")
    error = call.exception()
    result = call.result() if error is None else None
    return error if error is not None else result if isinstance(result, Scan) else None


async def _seen(driver: Pull | Push, subject: Subject) -> list[Scan]:
    """One try as the poller makes it, with a new `connect` where it failed; what came of it."""
    got = await _tried(driver, subject)
    if isinstance(got, Scan):
        return [got]
    await _tried(driver, subject, "connect")
    return []


async def _cancelled_midway(driver: Pull) -> None:
    for pause_s in (0.0, 0.01, 0.1):
        reading = asyncio.ensure_future(driver.read(driver.points))
        await asyncio.sleep(pause_s)
        await _ended(reading)


async def _judge_idle(tasks: set[asyncio.Task[Any]], threads: Mapping[int, str]) -> None:
    """Nothing works that did not before."""
    idle = await _until(lambda: asyncio.all_tasks() <= tasks and busy_threads().keys() <= threads.keys(), 1.0)
    if idle:
        return
    left = [repr(task.get_coro()) for task in asyncio.all_tasks() - tasks]
    left += [where for ident, where in busy_threads().items() if ident not in threads]
    raise AssertionError(f"1 s after a read was cancelled it still goes on: {'; '.join(left)}")


def _judge_error(got: BaseException | Scan | None, where: str) -> None:
    if not isinstance(got, BaseException):
        return
    _must(
        isinstance(got, DriverError) and not isinstance(got, PointRefused),
        f"{where} raised {type(got).__name__}: {got}; a driver raises DeviceUnreachable or ConfigError only",
    )
    if isinstance(got, DeviceUnreachable):
        _must(
            not got.reason.has_value, f"{where}: reason {got.reason.name} goes on points that have no value"
        )


def _judge_truth(subject: Subject, scan: Scan, when: str) -> None:
    if subject.truth is None:
        return
    held = subject.truth()
    for name, value in _values(scan).items():
        if name not in held:
            continue
        right = held[name]
        same = (
            math.isclose(value, right, rel_tol=1e-6, abs_tol=1e-12)
            if isinstance(value, float) and isinstance(right, float | int)
            else value == right
        )
        _must(same, f"{when}, {name} was read as {value!r}; the device holds {right!r}")


def _values(scan: Scan) -> dict[str, Value]:
    """The values that may be used, by point."""
    return {
        point.name: value
        for i, (point, value) in enumerate(zip(scan.points, scan.values, strict=False))
        if value is not None and i not in scan.reasons
    }


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


def _file_of(build: Callable[..., object]) -> str:
    code = getattr(build, "__code__", None)
    return code.co_filename if code is not None else "-"
