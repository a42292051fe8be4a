"""The field without an agent: this process opens the lines itself, and is their one owner while it lives.

Rules:
1. What is opened stays open until `close`: a series of commands on one line does not open its port every time.
2. A line asked for with other settings than before is closed and opened anew (a scan tries speeds); one that a device
   of this field holds is not.
3. Every call into a driver has the deadline that the poller would give it, and a driver's calls never overlap.
4. `watch` never ends because a device is away: it shows every point bad with the reason, and goes on trying.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

from agent.configuration import Checked, check
from agent.devices import Built, build_device
from agent.field import (
    FieldError,
    LineInUse,
    LineTaken,
    Look,
    Reloaded,
    disabled,
    point_of,
    raw_of,
    shown,
    unknown_device,
    wall_ns_of,
)
from agent.poller import CLOSE_S, DEADLINE_S, PUSH_READ_S
from agent.validation import Rules, ScanShapeError
from config.agent import Device
from drivers.contract import (
    ConfigError,
    DeviceUnreachable,
    Driver,
    DriverError,
    LineClaim,
    PointRefused,
    Reason,
    Scan,
    Value,
    boot_ns,
)
from drivers.modbus_line import Address, Line, Replies, Request, line_of
from drivers.registry import AnyDriver

T = TypeVar("T")

_MOST_LINES: Final = 16  #: kept open by one technician; the one not used for longest is closed
_MOST_LOCKS: Final = 1024  #: a scan asks on hundreds of lines
_WATCH_AGAIN_S: Final = 1.0  #: a device that is away is tried no more often


class Lines:
    """The lines that one technician has asked on. Belongs to one event loop."""

    def __init__(self, user: str) -> None:
        self._user = user
        self._held: dict[str, Line] = {}  #: by the line's key, the longest unused first
        self._locks: dict[str, asyncio.Lock] = {}

    async def ask(self, address: Address, series: Sequence[Request], connect_timeout_s: float) -> Replies:
        """See `agent.field.Field.ask`."""
        key = address.key
        # A line carries one request at a time anyway, so its users may as well stand in this queue.
        async with self._locks.setdefault(key, asyncio.Lock()):
            line = self._line(key, address)
            try:
                await line.open(connect_timeout_s)
                return await line.exchange(series, force=True)  # a person asks, whatever was seen before
            except (DriverError, asyncio.CancelledError):
                self._release(key)
                raise
            finally:
                self._trim()

    def _line(self, key: str, address: Address) -> Line:
        line = self._held.pop(key, None)
        if line is not None and line.address != address:
            line.release(self._user)
            line = None
        if line is None:
            try:
                line = line_of(address, self._user)
            except ConfigError as err:
                raise LineTaken(str(err)) from err
        self._held[key] = line  # last: the most recently used
        return line

    def _release(self, key: str) -> None:
        line = self._held.pop(key, None)
        if line is not None:
            line.release(self._user)

    def _trim(self) -> None:
        for key in list(self._held):
            if len(self._held) <= _MOST_LINES:
                break
            if not self._locks[key].locked():
                self._release(key)
        if len(self._locks) > _MOST_LOCKS and not any(lock.locked() for lock in self._locks.values()):
            self._locks.clear()

    def close(self) -> None:
        for key in list(self._held):
            self._release(key)


class _Opened:
    """One configured device, opened by this process."""

    def __init__(self, built: Built) -> None:
        self.plan = built.plan
        self.driver = built.driver
        self._lock = asyncio.Lock()
        self._rules = Rules(built.driver.points)
        self._connected = False

    async def read(self) -> Scan:
        async with self._turn():
            await self._connect()
            return self._judged(await self._told(one_scan(self.driver, self.plan.deadline_s)))

    async def write(self, name: str, value: Value) -> Scan:
        """Write, and read that point back."""
        point = point_of(self.plan.name, self.driver.points, name)
        raw = raw_of(point, value)
        driver = self.driver
        if not isinstance(driver, Driver):
            raise PointRefused(name, "the device speaks by itself and cannot be written")
        async with self._turn():
            await self._connect()
            await self._told(within(self.plan.deadline_s, driver.write(point, raw)))
            return self._judged(await self._told(within(self.plan.deadline_s, driver.read((point,)))))

    async def scans(self) -> AsyncGenerator[Scan, None]:
        """Every scan, and a scan of bad readings where there is none."""
        loop = asyncio.get_running_loop()
        while True:
            began_s = loop.time()
            try:
                if isinstance(self.driver, Driver):
                    yield await self.read()
                else:
                    async with self._turn():
                        await self._connect()
                        scans = self.driver.scans()
                        try:
                            async for scan in scans:
                                if scan.points:  # else it only says that it is well
                                    yield self._judged(scan)
                        finally:
                            if isinstance(scans, AsyncGenerator):
                                await scans.aclose()
                    raise DeviceUnreachable("its driver stopped giving scans", Reason.DRIVER)
                await asyncio.sleep(max(0.0, began_s + self.plan.period_s - loop.time()))
            except DeviceUnreachable as err:
                self._connected = False
                points = self.driver.points
                yield Scan(
                    boot_ns(), points, (None,) * len(points), dict.fromkeys(range(len(points)), err.reason)
                )
                await asyncio.sleep(max(_WATCH_AGAIN_S, began_s + self.plan.period_s - loop.time()))

    async def close(self) -> None:
        await let_go(self.driver)

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """The device for one call. Only a watch of a pushing device holds it for longer than a deadline."""
        await within(PUSH_READ_S, self._lock.acquire())
        try:
            yield
        finally:
            self._lock.release()

    async def _connect(self) -> None:
        if not self._connected:
            await connect(self.driver, self.plan.deadline_s)
            self._connected = True

    async def _told(self, call: Awaitable[T]) -> T:
        """The call; what leaves the driver in doubt makes it connect anew."""
        try:
            return await call
        except PointRefused:
            raise
        except BaseException:
            self._connected = False
            raise

    def _judged(self, scan: Scan) -> Scan:
        try:
            return self._rules.apply(scan)
        except ScanShapeError as err:
            raise DeviceUnreachable(f"its driver failed: {err}", Reason.DRIVER) from err


class DirectField:
    """`agent.field.Field` for a machine on which no agent runs."""

    through_agent = False

    def __init__(self, config_file: Path | None = None) -> None:
        """Without a file (or with one that cannot be used) lines and attempts work all the same."""
        self._file = config_file
        self._checked: Checked | None = None
        self._lines = Lines("headgate")
        self._open: dict[str, _Opened] = {}

    async def ask(
        self, address: Address, series: Sequence[Request], *, connect_timeout_s: float = 3.0
    ) -> Replies:
        return await self._lines.ask(address, series, connect_timeout_s)

    async def lines(self) -> list[LineInUse]:
        return []

    async def read(self, device: str) -> Look:
        return _look(device, await self._opened(device).read())

    async def watch(self, device: str) -> AsyncIterator[Look]:
        scans = self._opened(device).scans()
        try:
            async for scan in scans:
                yield _look(device, scan)
        finally:
            await scans.aclose()

    async def write(self, device: str, point: str, value: Value) -> Look:
        return _look(device, await self._opened(device).write(point, value))

    async def attempt(self, device: Device, *, timeout_s: float = 10.0) -> Look:
        return await attempt(device, timeout_s, {})

    async def reload(self) -> Reloaded:
        raise FieldError(
            "no agent runs here, so there is nothing to reload; it takes the file when it starts"
        )

    async def close(self) -> None:
        opened, self._open = list(self._open.values()), {}
        await asyncio.gather(*(device.close() for device in opened))
        self._lines.close()

    def _opened(self, name: str) -> _Opened:
        opened = self._open.get(name)
        if opened is None:
            opened = self._open[name] = _Opened(build_device(self._configured(name)))
        return opened

    def _configured(self, name: str) -> Device:
        if self._file is None:
            raise FieldError("no configuration is given; name one with --config")
        if self._checked is None:
            self._checked = check(self._file)
        config = self._checked.config
        if config is None:
            raise FieldError("; ".join(str(error) for error in self._checked.errors))
        found = next((device for device in config.device if device.name == name), None)
        if found is None:
            raise unknown_device(name, [device.name for device in config.device], str(self._file))
        if not found.enabled:
            raise disabled(name)
        return found


# --- what the agent's side of the socket does in the same way ---


async def attempt(device: Device, timeout_s: float, taken: Mapping[str, tuple[str, LineClaim]]) -> Look:
    """Build, connect, read once, let go. `taken` is who holds which line, by its key: a device that cannot share it
    is refused before anything is opened. Raises `LineTaken`, `DriverError`."""
    built = build_device(device)
    claim = built.driver.line()
    if claim is not None and claim.key in taken:
        holder, held = taken[claim.key]
        if not (claim.shared and held.shared):
            raise LineTaken(f"{claim.key} is in use by {holder}, which needs it for itself", [holder])
        if claim.settings != held.settings:
            raise LineTaken(
                f"{claim.key} is in use by {holder} with {held.settings}; {device.name} wants {claim.settings}",
                [holder],
            )
    try:
        async with asyncio.timeout(timeout_s):
            await connect(built.driver, timeout_s)
            scan = await one_scan(built.driver, timeout_s, push_s=timeout_s)
        return _look(device.name, Rules(built.driver.points).apply(scan))
    except TimeoutError:
        raise DeviceUnreachable(f"no answer within {timeout_s:g} s", Reason.TIMEOUT) from None
    finally:
        await let_go(built.driver)


async def connect(driver: AnyDriver, deadline_s: float) -> None:
    """Raises `DeviceUnreachable`, `ConfigError`."""
    await within(max(deadline_s, DEADLINE_S), driver.connect())


async def one_scan(driver: AnyDriver, deadline_s: float, *, push_s: float = PUSH_READ_S) -> Scan:
    """One read, or the next message. Raises `DeviceUnreachable`, `ConfigError`."""
    if isinstance(driver, Driver):
        scan: Scan = await within(deadline_s, driver.read(driver.points))
        return scan
    scans = driver.scans()
    try:
        return await within(push_s, _message(scans))
    except StopAsyncIteration:
        raise DeviceUnreachable("its driver stopped giving scans", Reason.DRIVER) from None
    finally:
        if isinstance(scans, AsyncGenerator):
            await scans.aclose()


async def _message(scans: AsyncIterator[Scan]) -> Scan:
    """The next scan that carries points; one without only says that the device is well."""
    while True:
        scan = await anext(scans)
        if scan.points:
            return scan


async def within(deadline_s: float, call: Awaitable[T]) -> T:
    """The call, with its deadline. Raises `DriverError`s only."""
    deadline = asyncio.timeout(deadline_s)
    try:
        async with deadline:
            return await call
    except (DriverError, StopAsyncIteration):
        raise
    except Exception as err:
        if isinstance(err, TimeoutError) and deadline.expired():
            raise DeviceUnreachable(f"no answer within {deadline_s:g} s", Reason.TIMEOUT) from None
        raise DeviceUnreachable(f"its driver failed: {type(err).__name__}: {err}", Reason.DRIVER) from err


async def let_go(driver: AnyDriver) -> None:
    """Close it, whatever it does."""
    with contextlib.suppress(Exception):  # a driver that cannot even close has nothing more to tell a person
        async with asyncio.timeout(CLOSE_S):
            await driver.close()


def _look(device: str, scan: Scan) -> Look:
    return shown(device, scan, wall_ns=wall_ns_of(scan.taken_at_ns))
