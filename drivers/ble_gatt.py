"""Bluetooth LE devices that one connects to: characteristics that are read (`ble_gatt`), or that notify
(`ble_gatt_notify`).

Rules:

- A fresh client for every connection. Connections take turns for the adapter's few places (`ble_radio.Slots`); a device
  is waited for before it takes one, and gives it back with the link. Nothing is paired.
- A connection may take longer than a poller waits: it goes on in a task of its own, at least 10 s, and the next read
  finds it done. A link that drops is `DeviceUnreachable`, and the next `connect` makes a new one.
- A characteristic that the device refuses, or has not, is its own points' trouble; the others are read.
- BlueZ remembers a device's services for ever. If a configured characteristic is missing, what it remembers is dropped
  once and the services are asked for afresh.

What makes connections is the real `bleak`; it is imported when the first is made.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import struct
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Literal

import msgspec
from msgspec import Meta

from drivers.advert import Heard, uuid_of
from drivers.ble import check_adapter, checked_address
from drivers.ble_radio import Need, Scanner, hub, translated
from drivers.contract import (
    ConfigError,
    DeviceUnreachable,
    Driver,
    Point,
    PushDriver,
    Reason,
    Scan,
    Value,
    ValueType,
    boot_ns,
)
from drivers.scan_queue import ScanQueue

if TYPE_CHECKING:
    from bleak import BleakClient
    from bleak.backends.characteristic import BleakGATTCharacteristic

_log = logging.getLogger(__name__)

LEAST_CONNECT_S = (
    10.0  # a device that wakes up every few seconds needs them (Home Assistant's rule for integrations)
)
DISCONNECT_S = 5.0
READ_S = (
    5.0  # for one characteristic; ATT gives up after 30 (Core 5.4, vol. 3, part F, 3.3.3), a poller sooner
)
LONGEST_VALUE = 512  # bytes (Core 5.4, vol. 3, part F, 3.2.9)

_WIDTHS: Final = {
    ValueType.BOOL: 1,
    ValueType.U8: 1,
    ValueType.I8: 1,
    ValueType.U16: 2,
    ValueType.I16: 2,
    ValueType.U32: 4,
    ValueType.I32: 4,
    ValueType.F32: 4,
    ValueType.U64: 8,
    ValueType.I64: 8,
    ValueType.F64: 8,
}
_SIGNED: Final = frozenset({ValueType.I8, ValueType.I16, ValueType.I32, ValueType.I64})
_FLOATS: Final = frozenset({ValueType.F32, ValueType.F64})
_SHORT = re.compile(r"(?:0x)?([0-9a-f]{4})")
_LONG = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")

# ATT's errors (Core 5.4, vol. 3, part F, 3.4.1.1) that mean "not you", "not this" or "not so", whenever it is asked.
_REFUSALS: Final = frozenset({0x01, 0x02, 0x05, 0x06, 0x08, 0x0A, 0x0C, 0x0F})


class GattOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[device.options]` of a device that is connected to; every key is explained in ble_gatt.toml."""

    address: str
    adapter: str = ""
    connect_timeout_s: Annotated[float, Meta(ge=LEAST_CONNECT_S, le=120.0)] = 20.0
    stay_connected: bool = False


class GattNotifyOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[device.options]` of a device that notifies; every key is explained in ble_gatt_notify.toml."""

    address: str
    adapter: str = ""
    connect_timeout_s: Annotated[float, Meta(ge=LEAST_CONNECT_S, le=120.0)] = 20.0
    stale_after_s: Annotated[float, Meta(ge=0.0, le=31_536_000.0)] = 300.0


class GattPoint(Point, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A point is a part of a characteristic's value."""

    characteristic: str  #: "2a6e", or a whole UUID
    service: str = ""  #: where the device has the same characteristic in several services
    type: ValueType = ValueType.I16
    at: Annotated[int, Meta(ge=0, lt=LONGEST_VALUE)] = 0  #: its first byte
    size: Annotated[int, Meta(ge=0, le=LONGEST_VALUE)] = (
        0  #: bytes; 0: as wide as its type, text: all that is left
    )
    order: Literal["little", "big"] = "little"
    bit: Annotated[int, Meta(ge=0, le=7)] | None = None  #: of a bool


# ---------------------------------------------------------------------------------------------------------- decoding


def decode(point: GattPoint, data: bytes) -> tuple[Value | None, Reason]:
    """A point's raw value out of its characteristic's. Pure."""
    if point.type is ValueType.STR:
        part = data[point.at : point.at + point.size] if point.size else data[point.at :]
        try:
            return part.rstrip(b"\0").decode("utf-8"), Reason.GOOD
        except UnicodeDecodeError:
            return None, Reason.DECODE
    size = point.size or _WIDTHS[point.type]
    part = data[point.at : point.at + size]
    if len(part) < size:
        return None, Reason.FRAMING
    if point.type is ValueType.BOOL:
        return (bool(part[0] >> point.bit & 1) if point.bit is not None else bool(part[0])), Reason.GOOD
    if point.type in _FLOATS:
        (number,) = struct.unpack(
            ("<" if point.order == "little" else ">") + ("f" if size == 4 else "d"), part
        )
        if math.isnan(number):
            return None, Reason.NAN
        return (number, Reason.GOOD) if math.isfinite(number) else (None, Reason.INFINITE)
    return int.from_bytes(part, point.order, signed=point.type in _SIGNED), Reason.GOOD


def _checked(point: GattPoint) -> GattPoint:
    """With whole UUIDs. Raises `ConfigError`."""
    where = f"point {point.name!r}"
    if point.type not in (ValueType.STR, ValueType.BOOL):
        width = _WIDTHS[point.type]
        if point.size and (point.size > width or (point.type in _FLOATS and point.size != width)):
            raise ConfigError(f"{where}: size is {point.size}, but {point.type} has {width} bytes")
    elif point.type is ValueType.BOOL and point.size > 1:
        raise ConfigError(
            f"{where}: size is {point.size}, but a bool is one byte, or a bit of it; use at and bit"
        )
    if point.bit is not None and point.type is not ValueType.BOOL:
        raise ConfigError(f'{where}: bit is for type "bool", and this one is {point.type}')
    if point.type in (ValueType.STR, ValueType.BOOL) and (point.scale != 1.0 or point.offset):
        raise ConfigError(
            f"{where}: {point.type} is no number, so scale and offset mean nothing; leave them out"
        )
    return msgspec.structs.replace(
        point,
        characteristic=_uuid(point.characteristic, f"{where}: characteristic"),
        service=_uuid(point.service, f"{where}: service") if point.service else "",
    )


def _uuid(text: str, where: str) -> str:
    found = text.strip().lower()
    short = _SHORT.fullmatch(found)
    if short:
        return uuid_of(int(short[1], 16))
    if not _LONG.fullmatch(found):
        raise ConfigError(f'{where} is {text!r}; write four hexadecimal digits ("2a6e") or a whole UUID')
    return found


_Place = tuple[str, str]
"""Service (or empty) and characteristic."""


def _places(points: Sequence[GattPoint]) -> dict[_Place, list[int]]:
    """Which points stand in one characteristic, in the order of the first of each."""
    found: dict[_Place, list[int]] = {}
    for index, point in enumerate(points):
        found.setdefault((point.service, point.characteristic), []).append(index)
    return found


# -------------------------------------------------------------------------------------------------------- connection


class _Link:
    """One device: looked for, connected to, let go. It listens to the adapter only for its end."""

    def __init__(self, name: str, address: str, adapter: str, connect_timeout_s: float) -> None:
        self._name = name
        self._address = address
        self._adapter = adapter
        self._connect_timeout_s = connect_timeout_s
        self._scanner: Scanner | None = None
        self._client: BleakClient | None = None
        self._slot_of = ""  #: the adapter whose place is held
        self._opening: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[DeviceUnreachable] | None = None
        self._forgotten = False  #: BlueZ was made to forget it, in this driver's life

    # the adapter's listener

    def heard(self, heard: Heard) -> None:
        """It is looked for by `sighting`, which needs no data."""

    def lost(self, error: DeviceUnreachable) -> None:
        self._end(error)

    def _end(self, error: DeviceUnreachable) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(error)

    @property
    def is_open(self) -> bool:
        return self._client is not None and self._ended is not None and not self._ended.done()

    @property
    def ended(self) -> asyncio.Future[DeviceUnreachable]:
        """Done when the link is gone. Only of an open one."""
        if self._ended is None:
            raise DeviceUnreachable("not connected")
        return self._ended

    async def attend(self) -> None:
        """Be told of the adapter's end. Raises `DeviceUnreachable`."""
        if self._scanner is not None and self._scanner.failure is None:
            return
        await self._leave()
        async with hub().scanner(self._adapter) as scanner:
            await scanner.add(self._address, self, Need.WATCH)
            self._scanner = scanner

    async def _leave(self) -> None:
        scanner, self._scanner = self._scanner, None
        if scanner is not None:
            scanner.remove(self._address, self)
            await hub().leave(scanner)

    async def open(self) -> None:
        """Connected, by an attempt of its own that outlives a caller who cannot wait. Raises `DeviceUnreachable`."""
        if self.is_open:
            return
        opening = self._opening
        if opening is None or opening.done():
            opening = asyncio.create_task(self._open(), name=f"ble-connect[{self._name}]")
            opening.add_done_callback(_retrieved)
            self._opening = opening
        try:
            await asyncio.shield(opening)
        except asyncio.CancelledError:
            if opening.cancelled():  # not the caller, but `close` meanwhile
                raise DeviceUnreachable("the connection was given up") from None
            raise

    async def _open(self) -> None:
        await self.let_go()
        await self.attend()
        scanner = self._scanner
        if scanner is None:
            raise DeviceUnreachable("not connected")
        self._ended = asyncio.get_running_loop().create_future()
        try:
            path = await self._look_for(scanner)
            await hub().slots(scanner.adapter).take(self._name, self._connect_timeout_s)
            self._slot_of = scanner.adapter
            if not scanner.knows(self._address):  # BlueZ drops a device that it has not heard for 30 s
                path = await self._look_for(scanner)
            await self._connect(scanner, path)
        except BaseException:
            await self.let_go()
            raise

    async def _look_for(self, scanner: Scanner) -> str:
        """The scan is not needed for connecting, which it would only slow down."""
        await scanner.want(self, Need.ACTIVE)
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                return await scanner.sighting(self._address)
        except TimeoutError as exc:
            raise DeviceUnreachable(
                f"{self._address} did not advertise within {self._connect_timeout_s:g} s; "
                "is it in reach, and not connected to something else?",
                Reason.TIMEOUT,
            ) from exc
        finally:
            with contextlib.suppress(DeviceUnreachable):  # its listeners are told
                await scanner.want(self, Need.WATCH)

    async def _connect(self, scanner: Scanner, path: str) -> None:
        from bleak import BleakClient
        from bleak.backends.device import BLEDevice

        device = BLEDevice(self._address, None, {"path": path, "props": {"Adapter": path.rpartition("/")[0]}})
        client = BleakClient(device, disconnected_callback=self._dropped, timeout=self._connect_timeout_s)
        async with hub().slots(scanner.adapter).making():
            with _bleak_translated(f"connecting to {self._address}", self._connect_timeout_s):
                async with asyncio.timeout(self._connect_timeout_s):
                    await client.connect()
        self._client = client
        if not client.is_connected:
            raise DeviceUnreachable(f"the connection to {self._address} was lost at once")

    def _dropped(self, client: BleakClient) -> None:
        if client is self._client:
            self._end(DeviceUnreachable(f"the connection to {self._address} was lost"))

    async def let_go(self) -> None:
        """Disconnected, and the place given back."""
        client, self._client = self._client, None
        self._end(DeviceUnreachable("not connected"))
        try:
            if client is not None:
                with (
                    contextlib.suppress(DeviceUnreachable),
                    _bleak_translated(f"disconnecting from {self._address}", DISCONNECT_S),
                ):
                    async with asyncio.timeout(DISCONNECT_S):
                        await client.disconnect()
        finally:
            if self._slot_of:
                adapter, self._slot_of = self._slot_of, ""
                hub().slots(adapter).give_back(self._name)

    async def rest(self) -> None:
        """Let go until the next read; but a connection that is being made goes on, for that read."""
        if self._opening is None or self._opening.done():
            await self.let_go()

    async def close(self) -> None:
        opening, self._opening = self._opening, None
        if opening is not None and not opening.done():
            opening.cancel()
            await asyncio.wait({opening})
        await self.let_go()
        await self._leave()

    # what it has

    def find(self, place: _Place) -> BleakGATTCharacteristic | None:
        """The first of that UUID; None: the device has none."""
        client = self._client
        if client is None:
            raise self._why()
        service, characteristic = place
        for each in client.services.characteristics.values():
            if each.uuid == characteristic and service in ("", each.service_uuid):
                return each
        return None

    def _why(self) -> DeviceUnreachable:
        ended = self._ended
        return ended.result() if ended is not None and ended.done() else DeviceUnreachable("not connected")

    async def missing(self, places: Sequence[_Place]) -> bool:
        """Is one of them not there, and is there hope that it is only BlueZ that does not know it? Then it forgets what
        it knew, and the link is let go. Once."""
        if self._forgotten or all(self.find(place) is not None for place in places):
            return False
        self._forgotten = True
        _log.info("%s: a characteristic is missing; BlueZ asks for its services afresh", self._name)
        scanner = self._scanner
        await self.let_go()
        return scanner is not None and await scanner.forget(self._address)

    async def read(self, place: _Place) -> tuple[bytes | None, Reason]:
        """A characteristic's value, or why there is none. Raises `DeviceUnreachable` if the link is gone."""
        found = self.find(place)
        client = self._client
        if found is None or client is None:
            return None, Reason.REFUSED
        try:
            with _bleak_translated(f"reading {place[1]}", READ_S):
                async with asyncio.timeout(READ_S):
                    return bytes(await client.read_gatt_char(found)), Reason.GOOD
        except _Refused as exc:
            return None, exc.reason
        except DeviceUnreachable as exc:
            if not self.is_open:
                raise self._why() from exc
            if exc.reason is Reason.TIMEOUT:
                return None, Reason.TIMEOUT
            raise

    async def notify(self, place: _Place, queue: _Notified) -> Reason:
        """From now on its notifications go to `queue`."""
        found = self.find(place)
        client = self._client
        if found is None or client is None:
            return Reason.REFUSED
        try:
            with _bleak_translated(f"asking {place[1]} to notify", READ_S):
                async with asyncio.timeout(READ_S):
                    await client.start_notify(found, lambda _, data: queue.notified(place, bytes(data)))
        except _Refused as exc:
            return exc.reason
        return Reason.GOOD


def _retrieved(task: asyncio.Task[None]) -> None:
    """Its error is the next caller's affair, if there is one."""
    if not task.cancelled():
        task.exception()


class _Notified:
    """What a notification is handed to."""

    def notified(self, place: _Place, data: bytes) -> None:
        raise NotImplementedError


class _Refused(Exception):
    """The device has refused one characteristic; the link is fine."""

    def __init__(self, text: str, reason: Reason) -> None:
        super().__init__(text)
        self.reason = reason


@contextlib.contextmanager
def _bleak_translated(what: str, within_s: float) -> Iterator[None]:
    """The seam to bleak: what it raises about the world is `DeviceUnreachable`, about a characteristic `_Refused`."""
    from bleak.exc import BleakCharacteristicNotFoundError, BleakDBusError, BleakError, BleakGATTProtocolError

    try:
        with translated(what):
            try:
                yield
            except TimeoutError as exc:
                raise DeviceUnreachable(f"{what}: no answer within {within_s:g} s", Reason.TIMEOUT) from exc
    except BleakGATTProtocolError as exc:
        code = int(exc.code)
        raise _Refused(f"{what}: {exc}", Reason.REFUSED if code in _REFUSALS else Reason.EXCEPTION) from exc
    except BleakCharacteristicNotFoundError as exc:
        raise _Refused(f"{what}: {exc}", Reason.REFUSED) from exc
    except BleakDBusError as exc:
        if exc.dbus_error in ("org.bluez.Error.NotPermitted", "org.bluez.Error.NotSupported"):
            raise _Refused(f"{what}: {exc}", Reason.REFUSED) from exc
        raise DeviceUnreachable(f"{what}: {exc}") from exc
    except (BleakError, AssertionError) as exc:
        # bleak asserts that its bus is there (bleak.backends.bluezdbus.client), which a dying bus makes untrue
        raise DeviceUnreachable(f"{what}: {str(exc) or type(exc).__name__}") from exc


# ----------------------------------------------------------------------------------------------------------- drivers


def _checked_points(points: Sequence[GattPoint]) -> list[GattPoint]:
    if not points:
        raise ConfigError("has no points; add a [[device.point]] table")
    return [_checked(point) for point in points]


class GattDriver(Driver[GattOptions, GattPoint]):
    """A device whose characteristics are read."""

    options_type: ClassVar[type[msgspec.Struct]] = GattOptions
    point_type: ClassVar[type[Point]] = GattPoint
    patience_s = 30.0  #: its turn, and a connection, which alone may take 10 s and more

    def __init__(self, name: str, options: GattOptions, points: Sequence[GattPoint]) -> None:
        super().__init__(name, options, _checked_points(points))
        check_adapter(options.adapter)
        self._link = _Link(name, checked_address(options.address), options.adapter, options.connect_timeout_s)
        self._connected = False

    async def connect(self) -> None:
        await self._link.attend()
        self._connected = True
        if self.options.stay_connected:
            await self._link.open()

    async def read(self, points: Sequence[GattPoint]) -> Scan:
        if not self._connected:
            raise DeviceUnreachable("not connected")
        if self.options.stay_connected and not self._link.is_open:
            # Said once, so that the points go bad; `connect` makes the next link.
            self._connected = False
            await self._link.let_go()
            raise DeviceUnreachable(f"the connection to {self.options.address} was lost")
        try:
            await self._link.open()
            places = _places(points)
            if await self._link.missing(list(places)):
                await self._link.open()
            return await self._read(points, places)
        finally:
            if not self.options.stay_connected:
                await self._link.rest()

    async def _read(self, points: Sequence[GattPoint], places: dict[_Place, list[int]]) -> Scan:
        values: list[Value | None] = [None] * len(points)
        reasons: dict[int, Reason] = {}
        answered_ns = 0
        for place, indexes in places.items():
            data, why = await self._link.read(place)
            if data is not None:
                answered_ns = boot_ns()
            for index in indexes:
                reason = why
                if data is not None:
                    values[index], reason = decode(points[index], data)
                if reason is not Reason.GOOD:
                    reasons[index] = reason
        if not answered_ns and set(reasons.values()) == {Reason.TIMEOUT}:
            raise DeviceUnreachable(f"{self.options.address} answers no read", Reason.TIMEOUT)
        return Scan(answered_ns or boot_ns(), tuple(points), values, reasons)

    async def close(self) -> None:
        self._connected = False
        await self._link.close()


class GattNotifyDriver(PushDriver[GattNotifyOptions, GattPoint], _Notified):
    """A device whose characteristics notify: each notification is one scan of its points."""

    options_type: ClassVar[type[msgspec.Struct]] = GattNotifyOptions
    point_type: ClassVar[type[Point]] = GattPoint
    patience_s = 30.0  #: its turn, and a connection, which alone may take 10 s and more

    def __init__(self, name: str, options: GattNotifyOptions, points: Sequence[GattPoint]) -> None:
        super().__init__(name, options, _checked_points(points))
        check_adapter(options.adapter)
        self.overruns = 0
        self._link = _Link(name, checked_address(options.address), options.adapter, options.connect_timeout_s)
        self._places = {
            place: tuple(self.points[index] for index in indexes)
            for place, indexes in _places(self.points).items()
        }
        self._queue = ScanQueue()
        self._watch: asyncio.Task[None] | None = None
        self._heard_at_s = 0.0

    async def connect(self) -> None:
        await self._stop_watching()
        await self._link.open()
        if await self._link.missing(list(self._places)):
            await self._link.open()
        self._queue.begin()
        self._heard_at_s = asyncio.get_running_loop().time()
        refused: dict[str, Reason] = {}
        for place, points in self._places.items():
            why = await self._link.notify(place, self)
            if why is not Reason.GOOD:
                refused |= {point.name: why for point in points}
        if len(refused) == len(self.points):
            await self._link.let_go()
            raise DeviceUnreachable(
                f"{self.options.address} lets none of these characteristics notify",
                next(iter(refused.values())),
            )
        if refused:
            points = tuple(point for point in self.points if point.name in refused)
            self._put(_bad(points, [refused[point.name] for point in points]))
        self._watch = asyncio.create_task(self._until_lost(), name=f"ble-notify[{self.name}]")

    async def close(self) -> None:
        await self._stop_watching()
        self._queue.end(DeviceUnreachable("not connected"))
        await self._link.close()

    async def _stop_watching(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.cancel()
            await asyncio.wait({watch})

    async def _until_lost(self) -> None:
        """Says once that the device is silent, and that its link is gone."""
        loop, stale_after_s = asyncio.get_running_loop(), self.options.stale_after_s
        ended, silent_since_s = self._link.ended, -1.0
        while not ended.done():
            due_s = self._heard_at_s + stale_after_s
            told = silent_since_s == self._heard_at_s or not stale_after_s
            await asyncio.wait(
                {ended}, timeout=stale_after_s or None if told else max(due_s - loop.time(), 0.01)
            )
            if (
                not ended.done()
                and stale_after_s
                and loop.time() >= self._heard_at_s + stale_after_s
                and not told
            ):
                silent_since_s = self._heard_at_s
                self._put(_bad(self.points, [Reason.STALE] * len(self.points)))
        self._queue.end(ended.result())

    def notified(self, place: _Place, data: bytes) -> None:
        taken_at_ns = boot_ns()
        self._heard_at_s = asyncio.get_running_loop().time()
        points = self._places[place]
        values: list[Value | None] = []
        reasons: dict[int, Reason] = {}
        for index, point in enumerate(points):
            value, reason = decode(point, data)
            values.append(value)
            if reason is not Reason.GOOD:
                reasons[index] = reason
        self._put(Scan(taken_at_ns, points, values, reasons))

    def _put(self, scan: Scan) -> None:
        self.overruns += self._queue.put(scan)

    def scans(self) -> AsyncIterator[Scan]:
        return self._queue.drain()


def _bad(points: tuple[GattPoint, ...], reasons: Sequence[Reason]) -> Scan:
    values: list[Value | None] = [None] * len(points)
    return Scan(boot_ns(), points, values, dict(enumerate(reasons)))
