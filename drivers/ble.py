"""Bluetooth LE sensors that advertise BTHome v2: each advertisement becomes one scan of the points it carried.

Rules:

- One scanner per adapter, shared by all devices of the process: it runs while somebody listens, and hands an advert to
  the devices of its address by one look-up.
- An advert is heard once. BlueZ signals a change of signal strength together with the data of an *earlier* advert, and
  keeps the data of devices it heard long ago: neither is a new reading. Repeats of one packet id are one message.
- Silence of `stale_after_s` gives one scan of `STALE`, then nothing until the sensor speaks. A point that its sensor
  has never sent in that time is `MISSING`, once.
- An adapter that is pulled or powered off, a bluetoothd or D-Bus that ends, raise `DeviceUnreachable` at once; a scan
  that hears nobody for `RESTART_AFTER_S` is started afresh, since BlueZ can be stuck without saying so.

What reaches out of here is the real `bleak`; it is imported in `connect`. `bleak` does not tell when its adapter or bus
is gone, so a second, quiet D-Bus connection watches for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import re
import stat
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, Protocol

import msgspec

from config.load import nearest
from drivers.bthome import PROPERTIES, SERVICE_UUID, Advert, BTHomeError, Key, Property, decode
from drivers.contract import (
    ConfigError,
    DeviceUnreachable,
    Found,
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
    from bleak import BleakScanner
    from bleak.backends.device import BLEDevice
    from bleak.backends.scanner import AdvertisementData
    from dbus_fast import Message
    from dbus_fast.aio import MessageBus

_log = logging.getLogger(__name__)

CALL_S = 10.0  # for one call to BlueZ; it answers in milliseconds, or a controller hangs
STOP_S = 2.0  # for the polite end of a scan, where all may be gone already
RESTART_AFTER_S = 90.0  # without any advert; habluetooth's figure, which its recoveries are built on
REPEAT_S = 4.0  # one packet id within this time is one message; the same as bthome-ble
REPLAY_RESTART = 100  # a counter below this may be a sensor with a new battery; the same as bthome-ble
DISCOVER_S = 8.0  # most sensors advertise every second to five
_NO_RSSI = -127  # bleak's word for "not told"

_RSSI = Property("rssi", ValueType.I16, unit="dBm")
_ADDRESS = re.compile(r"(?:[0-9A-F]{2}:){5}[0-9A-F]{2}")
_REPEATED = re.compile(r"(.+?)_([1-9]\d?)")


class BleOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[device.options]` of a Bluetooth sensor; every key is explained in ble.toml."""

    address: str
    adapter: str = ""
    stale_after_s: float = 300.0
    key_file: str = ""


class BlePoint(Point, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A point is one BTHome property. Its type, step and unit are BTHome's: `type` stays away, and `scale` and `offset`
    are applied on top (1.8 and 32 make degrees Fahrenheit of a temperature)."""

    object: str  #: "temperature", "temperature_2" for the second of a message, …, or "rssi"


@dataclasses.dataclass(slots=True)
class AdvertCounts:
    """What was heard of a sensor since its driver was built; never reset."""

    adverts: int = 0  #: that gave a scan
    repeats: int = 0  #: of a message that gave one
    replays: int = 0  #: encrypted, with a counter from the past
    undecodable: int = 0  #: not BTHome v2, cut off, or not decrypted
    pointless: int = 0  #: carried nothing that is configured


class Listener(Protocol):
    """What a scanner hands adverts to."""

    def heard(self, data: bytes, rssi: int, taken_at_ns: int) -> None:
        """A new BTHome message of the address listened to."""

    def lost(self, error: DeviceUnreachable) -> None:
        """The scanner is gone."""


# ------------------------------------------------------------------------------------------------------------- radio


class _Radio:
    """The watching D-Bus connection of one adapter: is it there, and when does it go away."""

    def __init__(self, bus: MessageBus, adapter: str) -> None:
        self._bus = bus
        self.adapter = adapter  #: "hci0"
        self._gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()  # why
        self._ended = asyncio.create_task(_ended(bus), name=f"ble-bus[{adapter}]")

    @classmethod
    async def open(cls, wanted: str) -> _Radio:
        """`wanted` is an adapter's name, or empty for the first that is powered. Raises `DeviceUnreachable`."""
        from dbus_fast import BusType
        from dbus_fast.aio import MessageBus

        bus = MessageBus(bus_type=BusType.SYSTEM)
        try:
            with _translated("D-Bus"):
                async with asyncio.timeout(CALL_S):
                    await bus.connect()
                    return await cls._open(bus, wanted)
        except BaseException:
            bus.disconnect()
            raise

    @classmethod
    async def _open(cls, bus: MessageBus, wanted: str) -> _Radio:
        from dbus_fast import MessageType

        await _match(bus, "sender='org.freedesktop.DBus',member='NameOwnerChanged',arg0='org.bluez'")
        reply = await _call(bus, "org.bluez", "/", "org.freedesktop.DBus.ObjectManager", "GetManagedObjects")
        if reply.message_type is MessageType.ERROR:
            raise DeviceUnreachable(
                f"BlueZ does not answer ({reply.error_name}); is bluetoothd running? systemctl status bluetooth"
            )
        objects = reply.body[0]
        radio = cls(bus, _adapter(objects, wanted))
        bus.add_message_handler(radio._on_message)
        path = f"/org/bluez/{radio.adapter}"
        await _match(bus, f"sender='org.bluez',path='{path}',interface='org.freedesktop.DBus.Properties'")
        await _match(bus, f"sender='org.bluez',member='InterfacesRemoved',arg0path='{path}'")
        return radio

    def _on_message(self, message: Message) -> None:
        body = message.body
        match message.member:
            case "NameOwnerChanged" if body[0] == "org.bluez":
                self._say("bluetoothd has ended" if not body[2] else "bluetoothd was restarted")
            case "InterfacesRemoved" if "org.bluez.Adapter1" in body[1]:
                self._say(f"the adapter {self.adapter} is gone; is it plugged in?")
            case "PropertiesChanged" if body[0] == "org.bluez.Adapter1":
                powered = body[1].get("Powered")
                if powered is not None and not powered.value:
                    self._say(f"the adapter {self.adapter} is powered off; bluetoothctl power on")

    def _say(self, why: str) -> None:
        if not self._gone.done():
            self._gone.set_result(why)

    async def wait_gone(self) -> str:
        """Until the adapter, bluetoothd or the bus is gone; says which."""
        waiting: set[asyncio.Future[str] | asyncio.Task[None]] = {self._gone, self._ended}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        return self._gone.result() if self._gone.done() else "the connection to D-Bus is gone"

    async def close(self) -> None:
        """Hang up, and wait until the socket is closed."""
        self._bus.disconnect()
        await asyncio.wait({self._ended}, timeout=STOP_S)


async def _ended(bus: MessageBus) -> None:
    """Until the bus is closed by either side."""
    with contextlib.suppress(Exception):  # by what error it ended is no matter here
        # Never to be cancelled: it awaits a future that the bus itself needs.
        await bus.wait_for_disconnect()  # type: ignore[no-untyped-call]  # dbus-fast leaves this one without types


def _adapter(objects: Mapping[str, Mapping[str, Mapping[str, object]]], wanted: str) -> str:
    adapters = {
        path.rpartition("/")[2]: bool(
            getattr(interfaces["org.bluez.Adapter1"].get("Powered"), "value", False)
        )
        for path, interfaces in sorted(objects.items())
        if "org.bluez.Adapter1" in interfaces
    }
    if not adapters:
        raise DeviceUnreachable(
            "there is no Bluetooth adapter; is it plugged in? `rfkill` shows if it is blocked"
        )
    if wanted and wanted not in adapters:
        raise DeviceUnreachable(f"there is no adapter {wanted}; there is {', '.join(adapters)}")
    powered = [name for name, on in adapters.items() if on and wanted in ("", name)]
    if not powered:
        raise DeviceUnreachable(
            f"the adapter {wanted or ', '.join(adapters)} is powered off; bluetoothctl power on"
        )
    return powered[0]


async def _call(bus: MessageBus, to: str, path: str, interface: str, member: str, *body: str) -> Message:
    from dbus_fast import Message

    call = Message(
        destination=to,
        path=path,
        interface=interface,
        member=member,
        signature="s" * len(body),
        body=list(body),
    )
    reply = await bus.call(call)
    if reply is None:
        raise DeviceUnreachable(f"D-Bus: no reply to {member}")
    return reply


async def _match(bus: MessageBus, rule: str) -> None:
    name = "org.freedesktop.DBus"
    await _call(bus, name, "/org/freedesktop/DBus", name, "AddMatch", f"type='signal',{rule}")


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """The seam to bleak and D-Bus: all that they raise about the world becomes `DeviceUnreachable`."""
    from bleak.exc import BleakError
    from dbus_fast import DBusFastError

    try:
        yield
    except FileNotFoundError as exc:
        raise DeviceUnreachable(
            f"{what}: there is no system bus; is D-Bus running? systemctl status dbus"
        ) from exc
    except PermissionError as exc:
        raise DeviceUnreachable(
            f"{what}: permission denied; add the agent's user to the group `bluetooth`"
        ) from exc
    except TimeoutError as exc:
        raise DeviceUnreachable(f"{what}: no answer within {CALL_S:g} s", Reason.TIMEOUT) from exc
    except (BleakError, DBusFastError, OSError, EOFError, AssertionError) as exc:
        # bleak asserts that its bus is there (bleak.backends.bluezdbus.manager), which a dying bus makes untrue
        raise DeviceUnreachable(f"{what}: {str(exc) or type(exc).__name__}") from exc


# ----------------------------------------------------------------------------------------------------------- scanner


class _Scanner:
    """One running scan of one adapter, for all who listen."""

    def __init__(self, radio: _Radio) -> None:
        self._radio = radio
        self._scanner: BleakScanner | None = None
        self._by_address: dict[str, tuple[Listener, ...]] = {}
        self._everybody: list[_Survey] = []
        self._seen: dict[str, object] = {}  #: the data that was last handed on, by address
        self._loop = asyncio.get_running_loop()
        self._last_advert_s = self._loop.time()
        self._watch: asyncio.Task[None] | None = None
        self.failure: DeviceUnreachable | None = None

    @property
    def adapter(self) -> str:
        return self._radio.adapter

    @property
    def idle(self) -> bool:
        return not self._by_address and not self._everybody

    @classmethod
    async def open(cls, radio: _Radio) -> _Scanner:
        """Scan with this radio, which is the scanner's from then on. Raises `DeviceUnreachable`."""
        scanner = cls(radio)
        try:
            await scanner._start()
        except BaseException:
            await radio.close()
            raise
        scanner._watch = asyncio.create_task(scanner._guard(), name=f"ble-guard[{radio.adapter}]")
        return scanner

    async def _start(self) -> None:
        from bleak import BleakScanner

        # DuplicateData: BlueZ would otherwise signal an advert only when its data change, and a sensor whose value
        # stands still could not be told from one that is dead.
        scanner = BleakScanner(
            self._heard, bluez={"adapter": self.adapter, "filters": {"DuplicateData": True}}
        )
        with _translated(f"scanning on {self.adapter}"):
            async with asyncio.timeout(CALL_S):
                self._seen.update(await _kept_data())
                await scanner.start()
        self._scanner = scanner
        self._last_advert_s = self._loop.time()

    async def _stop(self) -> None:
        """End the scan, politely if there is somebody to be polite to."""
        scanner, self._scanner = self._scanner, None
        if scanner is None:
            return
        try:
            with _translated(f"end of scanning on {self.adapter}"):
                async with asyncio.timeout(STOP_S):
                    await scanner.stop()
        except DeviceUnreachable as exc:
            _log.debug("%s", exc)

    async def close(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None and watch is not asyncio.current_task():
            watch.cancel()
            await asyncio.wait({watch})
        await self._stop()
        await self._radio.close()

    # --------------------------------------------------------------------------------------------- listeners

    def add(self, address: str, listener: Listener) -> None:
        self._by_address[address] = (*self._by_address.get(address, ()), listener)

    def remove(self, address: str, listener: Listener) -> None:
        rest = tuple(other for other in self._by_address.get(address, ()) if other is not listener)
        if rest:
            self._by_address[address] = rest
        else:
            self._by_address.pop(address, None)

    def survey(self, survey: _Survey) -> None:
        self._everybody.append(survey)

    def end_survey(self, survey: _Survey) -> None:
        self._everybody.remove(survey)

    def _heard(self, device: BLEDevice, advert: AdvertisementData) -> None:
        """Every signal of every device in reach: keep it short."""
        self._last_advert_s = self._loop.time()
        if self._everybody:
            for survey in self._everybody:
                survey.heard(device, advert)
        address = device.address
        listeners = self._by_address.get(address)
        if listeners is None:
            return
        data = advert.service_data.get(SERVICE_UUID)
        if data is None or not self._is_new(address, advert):
            return
        taken_at_ns = boot_ns()
        for listener in listeners:
            listener.heard(data, advert.rssi, taken_at_ns)

    def _is_new(self, address: str, advert: AdvertisementData) -> bool:
        """Was the data part of this signal, or is it what an earlier advert left behind? bleak merges both and passes
        its store: the very same object is the earlier one."""
        stored = _stored_data(advert)
        if stored is None:
            return True
        before, self._seen[address] = self._seen.get(address), stored
        return before is not stored

    # ------------------------------------------------------------------------------------------------- guard

    async def _guard(self) -> None:
        """Watch for the end of the adapter and for a scan that has gone deaf."""
        gone = asyncio.create_task(self._radio.wait_gone(), name=f"ble-gone[{self.adapter}]")
        try:
            while True:
                wait_s = self._last_advert_s + RESTART_AFTER_S - self._loop.time()
                await asyncio.wait({gone}, timeout=max(wait_s, 0.01))
                if gone.done():
                    raise DeviceUnreachable(f"Bluetooth: {gone.result()}")
                if self._last_advert_s + RESTART_AFTER_S <= self._loop.time():
                    _log.warning(
                        "Bluetooth: no advertisement on %s for %g s; scanning is started afresh",
                        self.adapter,
                        RESTART_AFTER_S,
                    )
                    await self._stop()
                    await self._start()
        except DeviceUnreachable as exc:
            self._fail(exc)
        except Exception as exc:  # noqa: BLE001 - a guard that ends unseen would leave all listeners deaf for ever
            self._fail(DeviceUnreachable(f"Bluetooth: {type(exc).__name__}: {exc}"))
        finally:
            gone.cancel()

    def _fail(self, error: DeviceUnreachable) -> None:
        self.failure = error
        for listeners in list(self._by_address.values()):
            for listener in listeners:
                listener.lost(error)
        for survey in self._everybody:
            survey.lost(error)


async def _kept_data() -> dict[str, object]:
    """bleak's own store of what BlueZ has kept of BTHome sensors, by address; nothing if this bleak keeps it elsewhere
    (the first signal of such a sensor may then be an old one)."""
    from bleak.backends.bluezdbus.manager import get_global_bluez_manager

    manager = await get_global_bluez_manager()
    kept: dict[str, object] = {}
    with contextlib.suppress(AttributeError, KeyError):
        for interfaces in manager._properties.values():
            device = interfaces.get("org.bluez.Device1", {})
            data = device.get("ServiceData", {})
            if SERVICE_UUID in data:
                kept[device["Address"]] = data
    return kept


def _stored_data(advert: AdvertisementData) -> object | None:
    """bleak's own store of a device's service data; None if this bleak keeps it elsewhere (it is not a promise)."""
    try:
        stored: object = advert.platform_data[1]["ServiceData"]
    except (IndexError, KeyError, TypeError):
        return None
    return stored


class _Hub:
    """The scanners of one event loop. Joining and leaving are one at a time."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._scanners: dict[str, _Scanner] = {}

    @contextlib.asynccontextmanager
    async def scanner(self, adapter: str) -> AsyncIterator[_Scanner]:
        """The running scanner of an adapter, with the right to join it. Raises `DeviceUnreachable`."""
        async with self._lock:
            scanner = self._scanners.get(adapter)
            if scanner is None or scanner.failure is not None:
                if scanner is not None:
                    await self._drop(scanner)
                scanner = await self._open(adapter)
            try:
                yield scanner
            finally:
                if scanner.idle:
                    await self._drop(scanner)

    async def leave(self, scanner: _Scanner) -> None:
        """The last who leaves ends the scan."""
        async with self._lock:
            if scanner.idle:
                await self._drop(scanner)

    async def _open(self, adapter: str) -> _Scanner:
        radio = await _Radio.open(adapter)
        # "" and "hci0" may be the same adapter, and BlueZ lets a client scan it once.
        scanner = self._scanners.get(radio.adapter)
        if scanner is not None and scanner.failure is None:
            await radio.close()
        else:
            if scanner is not None:
                await self._drop(scanner)
            scanner = await _Scanner.open(radio)
        self._scanners[adapter] = self._scanners[scanner.adapter] = scanner
        return scanner

    async def _drop(self, scanner: _Scanner) -> None:
        for name in [name for name, known in self._scanners.items() if known is scanner]:
            del self._scanners[name]
        await scanner.close()


_hubs: Final[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Hub]] = weakref.WeakKeyDictionary()


def _hub() -> _Hub:
    loop = asyncio.get_running_loop()
    hub = _hubs.get(loop)
    if hub is None:
        hub = _hubs[loop] = _Hub()
    return hub


# ------------------------------------------------------------------------------------------------------------ driver


class BleDriver(PushDriver[BleOptions, BlePoint]):
    """One Bluetooth sensor. `points` carry the type, scale and unit that its BTHome properties have."""

    options_type: ClassVar[type[msgspec.Struct]] = BleOptions
    point_type: ClassVar[type[Point]] = BlePoint

    def __init__(self, name: str, options: BleOptions, points: Sequence[BlePoint]) -> None:
        super().__init__(name, options, [_effective(point) for point in points])
        if not self.points:
            raise ConfigError("has no points; add a [[device.point]] table")
        self._address = options.address.upper().replace("-", ":")
        if not _ADDRESS.fullmatch(self._address):
            raise ConfigError(
                f'options.address is {options.address!r}; write six pairs of digits, as in "A4:C1:38:0B:5F:2E"'
            )
        if not 0 <= options.stale_after_s <= 31_536_000:
            raise ConfigError(f"options.stale_after_s is {options.stale_after_s}; allowed is 0 to 31536000")
        if options.adapter and not re.fullmatch(r"[a-z]+\d+", options.adapter):
            raise ConfigError(f'options.adapter is {options.adapter!r}; write a name such as "hci0"')
        self.overruns = 0  #: scans dropped because nobody took them in time
        self.counts = AdvertCounts()
        self._queue = ScanQueue()
        self._scanner: _Scanner | None = None
        self._key: Key | None = None
        self._by_object: dict[str, list[BlePoint]] = {}
        for point in self.points:
            self._by_object.setdefault(point.object, []).append(point)
        self._wants_rssi = "rssi" in self._by_object
        self._shapes: dict[tuple[str, ...], tuple[tuple[BlePoint, ...], tuple[str, ...]]] = {}
        self._never_sent: set[str] = set()
        self._silence_timer: asyncio.TimerHandle | None = None
        self._silent = False
        self._triggered = False  #: the sensor sends only when something happens
        self._now_s: Callable[[], float] = time.monotonic  # the loop's clock once connected
        self._connected_at_s = 0.0
        self._heard_at_s = 0.0
        self._last_packet: tuple[int, float] | None = None  #: id, and when it was heard
        self._last_counter = -1

    # --------------------------------------------------------------------------------------------- connection

    async def connect(self) -> None:
        await self.close()
        self._key = self._read_key()
        loop = asyncio.get_running_loop()
        async with _hub().scanner(self.options.adapter) as scanner:
            self._scanner = scanner
            self._queue.begin()
            self._now_s = loop.time
            self._connected_at_s = self._heard_at_s = loop.time()
            self._silent = self._triggered = False
            self._last_packet = None
            self._never_sent = set(self._by_object)
            scanner.add(self._address, self)
        if self.options.stale_after_s:
            self._silence_timer = loop.call_later(self.options.stale_after_s, self._watch_silence)

    async def close(self) -> None:
        if self._silence_timer is not None:
            self._silence_timer.cancel()
            self._silence_timer = None
        self._queue.end(DeviceUnreachable("not connected"))
        scanner, self._scanner = self._scanner, None
        if scanner is not None:
            scanner.remove(self._address, self)
            await _hub().leave(scanner)

    def lost(self, error: DeviceUnreachable) -> None:
        if self._silence_timer is not None:
            self._silence_timer.cancel()
            self._silence_timer = None
        self._queue.end(error)

    def _read_key(self) -> Key | None:
        path = self.options.key_file
        if not path:
            return None
        where = f"options.key_file {path}"
        try:
            public = Path(path).stat().st_mode & stat.S_IROTH
            text = Path(path).read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"{where}: cannot be read ({exc})") from exc
        if public:
            raise ConfigError(f"{where}: everybody can read it; chmod 600")
        if not re.fullmatch(r"\s*[0-9A-Fa-f]{32}\s*", text):
            raise ConfigError(f"{where}: must hold the key as 32 hexadecimal digits and nothing else")
        return Key(bytes.fromhex(text.strip()), self._address)

    # ------------------------------------------------------------------------------------------------ adverts

    def heard(self, data: bytes, rssi: int, taken_at_ns: int) -> None:
        self._heard_at_s = now_s = self._now_s()
        self._silent = False
        try:
            advert = decode(data, self._key)
        except BTHomeError as exc:
            self.counts.undecodable += 1
            self._put(_bad(taken_at_ns, self.points, exc.reason))
            return
        self._triggered = advert.triggered
        if self._is_repeat(advert, now_s):
            return
        values = advert.values
        if self._wants_rssi:
            values["rssi"] = rssi
        shape = tuple(values)
        points, objects = self._shapes.get(shape) or self._shape(shape)
        if not points:
            self.counts.pointless += 1
            return
        self.counts.adverts += 1
        if self._never_sent:
            self._never_sent.difference_update(objects)
        found = [values[name] for name in objects]
        reasons: dict[int, Reason] = {}
        if None in found:
            reasons = {index: Reason.DECODE for index, value in enumerate(found) if value is None}
        if rssi == _NO_RSSI and self._wants_rssi:
            for index, name in enumerate(objects):
                if name == "rssi":
                    found[index] = None
                    reasons[index] = Reason.MISSING
        self._put(Scan(taken_at_ns, points, found, reasons))

    def _shape(self, shape: tuple[str, ...]) -> tuple[tuple[BlePoint, ...], tuple[str, ...]]:
        """Which points a message of these properties carries. Sensors send a few shapes, over and over."""
        carried = set(shape)
        points = tuple(point for point in self.points if point.object in carried)
        found = (
            points if len(points) < len(self.points) else self.points,
            tuple(point.object for point in points),
        )
        if found[1] == ("rssi",) * len(found[1]):
            found = (), ()  # the strength of a signal that says nothing is no reading
        if len(self._shapes) >= 64:  # a hostile or broken sensor may make up many
            self._shapes.clear()
        self._shapes[shape] = found
        return found

    def _is_repeat(self, advert: Advert, now_s: float) -> bool:
        counter = advert.counter
        if counter is not None:
            last, self._last_counter = self._last_counter, counter
            if counter == last:
                self.counts.repeats += 1
                return True
            if counter < last and counter >= REPLAY_RESTART:
                self._last_counter = last
                self.counts.replays += 1
                return True
        packet = advert.packet_id
        if packet is None:
            return False
        before = self._last_packet
        # Ids count up and roll over at 256: a step of 0, or of 64 and more, is a repeat or an older message, late.
        if before is not None and now_s - before[1] <= REPEAT_S and not 0 < (packet - before[0]) % 256 < 64:
            self.counts.repeats += 1
            return True
        self._last_packet = packet, now_s
        return False

    def _watch_silence(self) -> None:
        """Say once that the sensor is silent, or that it never sends some point; look again when it may be so."""
        loop = asyncio.get_running_loop()
        now_s, stale_after_s = loop.time(), self.options.stale_after_s
        if now_s - self._heard_at_s >= stale_after_s:
            if not self._silent and not self._triggered:
                self._silent = True
                self._put(_bad(boot_ns(), self.points, Reason.STALE))
        elif self._never_sent and now_s - self._connected_at_s >= stale_after_s:
            absent = tuple(point for point in self.points if point.object in self._never_sent)
            self._never_sent = set()
            self._put(_bad(boot_ns(), absent, Reason.MISSING))
        due_s = self._heard_at_s + stale_after_s
        self._silence_timer = loop.call_at(
            due_s if due_s > now_s else now_s + stale_after_s, self._watch_silence
        )

    def _put(self, scan: Scan) -> None:
        self.overruns += self._queue.put(scan)

    def scans(self) -> AsyncIterator[Scan]:
        return self._queue.drain()

    # ----------------------------------------------------------------------------------------------- discover

    @classmethod
    async def discover(cls) -> AsyncIterator[Found]:
        """What advertises in reach within `DISCOVER_S`, BTHome sensors first. Raises `DeviceUnreachable`."""
        survey = _Survey()
        async with _hub().scanner("") as scanner:
            scanner.survey(survey)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DISCOVER_S):
                    await asyncio.shield(survey.failed)
        finally:
            scanner.end_survey(survey)
            await _hub().leave(scanner)
        for found in survey.found():
            yield found


@dataclasses.dataclass(slots=True)
class _Sighting:
    name: str = ""
    rssi: int = _NO_RSSI
    properties: dict[str, None] = dataclasses.field(default_factory=dict)  # in the order of their sight
    bthome: str = ""


class _Survey:
    """Everything that was heard of anybody."""

    def __init__(self) -> None:
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._seen: dict[str, _Sighting] = {}

    def lost(self, error: DeviceUnreachable) -> None:
        if not self.failed.done():
            self.failed.set_exception(error)

    def heard(self, device: BLEDevice, advert: AdvertisementData) -> None:
        sighting = self._seen.setdefault(device.address, _Sighting())
        sighting.name = advert.local_name or sighting.name
        sighting.rssi = max(sighting.rssi, advert.rssi)
        data = advert.service_data.get(SERVICE_UUID)
        if data is not None:
            try:
                sighting.properties |= dict.fromkeys(decode(data).values)
                sighting.bthome = "BTHome v2"
            except BTHomeError as exc:
                encrypted = exc.reason is Reason.DECRYPT
                sighting.bthome = (
                    "BTHome v2, encrypted: needs key_file" if encrypted else f"BTHome, but {exc}"
                )

    def found(self) -> list[Found]:
        found = []
        for address, sighting in self._seen.items():
            carried = ", ".join(sighting.properties)
            parts = (sighting.name, sighting.bthome, carried, f"{sighting.rssi} dBm")
            found.append(
                Found(
                    driver="ble",
                    address=address,
                    description="; ".join(part for part in parts if part),
                    options={"address": address},
                    likelihood=1.0 if carried else 0.5 if sighting.bthome else 0.05,
                )
            )
        return sorted(found, key=lambda one: (-one.likelihood, one.address))


def _effective(point: BlePoint) -> BlePoint:
    """The point with the type, scale and unit of its property; `scale` and `offset` of the configuration on top."""
    where = f"point {point.name!r}"
    name = re.sub(r"[ .-]", "_", point.object.lower())
    repeated = _REPEATED.fullmatch(name)
    stem = repeated[1] if repeated and name not in PROPERTIES else name
    found = _RSSI if name == "rssi" else PROPERTIES.get(stem)
    if found is None:
        raise ConfigError(f"{where}: unknown object {point.object!r}{nearest(stem, [*PROPERTIES, 'rssi'])}")
    if point.type not in (ValueType.F64, found.type):
        raise ConfigError(
            f"{where}: type is {point.type}, but BTHome's {stem} is {found.type}; leave type out"
        )
    if found.type in (ValueType.STR, ValueType.BOOL) and (point.scale != 1.0 or point.offset):
        raise ConfigError(f"{where}: {stem} is no number, so scale and offset mean nothing; leave them out")
    # The first of a kind has no number in a message.
    name = stem if repeated and name == f"{stem}_1" else name
    return msgspec.structs.replace(
        point,
        object=name,
        type=found.type,
        scale=_times(found.scale, point.scale),
        unit=point.unit or found.unit,
    )


def _times(step: float, scale: float) -> float:
    """Their product as one would write it: 0.01 * 1.8 is 0.018 and not 0.018000000000000002."""
    return float(f"{step * scale:.15g}")


def _bad(taken_at_ns: int, points: tuple[BlePoint, ...], reason: Reason) -> Scan:
    values: list[Value | None] = [None] * len(points)
    return Scan(taken_at_ns, points, values, dict.fromkeys(range(len(points)), reason))
