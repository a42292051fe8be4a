"""A Bluetooth adapter, shared: one scan for all who listen, a bounded number of connections, and who notices its end.

Rules:

- One scan per adapter and process. It runs while somebody needs it, as sparing as its listeners allow (`Need`), and
  hands an advertisement to those who listen to its sender by one look-up.
- An advertisement is heard once, and only what it carried itself is handed on: BlueZ signals a change of signal
  strength without data, keeps what it heard long ago, and repeats a sender's other data along with the new.
- **A fresh D-Bus connection for every start of a scan.** To BlueZ a scan belongs to its connection: whatever it thinks
  of an earlier one (a start that was answered late, a stop that was refused) ends with the old connection.
- An adapter that is pulled or powered off, a bluetoothd or D-Bus that ends, is told to every listener at once. A scan
  that hears nothing for `RESTART_AFTER_S` is started afresh, and where that does not help the adapter is switched off
  and on: BlueZ and controllers can be stuck without saying so.
- Connections take turns: at most so many at once, in the order of asking, and one of them being made at a time.

Why not bleak's scanner? It merges what a signal carried with what BlueZ knew before, so that a repeated old value
cannot be told from a new one by what it makes public; and its one D-Bus connection lives as long as the event loop, so
that a scan stuck in BlueZ (`InProgress` for ever) ends only with the process. Connections are bleak's (`ble_gatt`).
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import logging
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import msgspec

from drivers.advert import Heard
from drivers.contract import DeviceUnreachable, Reason, boot_ns

if TYPE_CHECKING:
    from dbus_fast import Message, Variant
    from dbus_fast.aio import MessageBus

_log = logging.getLogger(__name__)

CALL_S = 10.0  # for one call to BlueZ; it answers in milliseconds, or a controller hangs
STOP_S = 2.0  # for the polite end of a scan, where all may be gone already
RESTART_AFTER_S = 90.0  # without any data; habluetooth's figure, which its recoveries are built on
RESET_AFTER_S = 30.0  # after such a restart, and still nothing: the adapter is switched off and on
START_TRIES = 4  # habluetooth's too
START_PAUSE_S = 0.5  # between them: what is in progress is another program's scan, starting or ending
POWER_PAUSE_S = 0.5
CONNECTIONS = 3  # at once; controllers hold 3 to 10, and the smallest of them share that with a scan

BLUEZ: Final = "org.bluez"
ADAPTER: Final = "org.bluez.Adapter1"
DEVICE: Final = "org.bluez.Device1"
MONITORS: Final = "org.bluez.AdvertisementMonitorManager1"
MONITOR: Final = "org.bluez.AdvertisementMonitor1"
OBJECT_MANAGER: Final = "org.freedesktop.DBus.ObjectManager"
PROPERTIES: Final = "org.freedesktop.DBus.Properties"
_IN_PROGRESS: Final = "org.bluez.Error.InProgress"

# What a passive scan asks the adapter to report: service data (AD type 0x16) of the formats' UUIDs, and manufacturer
# data (0xFF) of their companies, each little-endian at the start (Core Specification Supplement, part A, 1.4, 1.11).
_SERVICE_DATA, _COMPANY_DATA = 0x16, 0xFF
# In one monitor. bluetoothd (5.66, and its main branch of 2026 too) counts the bytes of them all in 8 bits, 34 for each
# (src/adv_monitor.c, merged_pattern_send_add_pattern), and an eighth makes it write beyond what it has allocated.
_MOST_PATTERNS = 7


class Need(enum.IntEnum):
    """How much of a scan a listener needs. The adapter does the most that anybody needs."""

    WATCH = 0  #: none; only to be told when the adapter is gone
    PASSIVE = 1  #: without asking senders for more; the adapter reports only what has changed
    ACTIVE = 2  #: every advertisement, scan responses too


class Listener(Protocol):
    """Who is told of advertisements."""

    def heard(self, heard: Heard) -> None:
        """One that carried data, of the address listened to."""

    def lost(self, error: DeviceUnreachable) -> None:
        """The adapter is gone; nothing comes any more."""


class Patterns(msgspec.Struct, frozen=True):
    """What a passive scan is to report."""

    services: tuple[int, ...]  #: 16-bit UUIDs
    companies: tuple[int, ...]

    def as_bluez(self) -> list[list[list[object]]]:
        """Each monitor's, as `a(yyay)`: position, AD type, content."""
        wanted = [(_SERVICE_DATA, short) for short in self.services]
        wanted += [(_COMPANY_DATA, number) for number in self.companies]
        told: list[list[object]] = [[0, kind, number.to_bytes(2, "little")] for kind, number in wanted]
        return [told[at : at + _MOST_PATTERNS] for at in range(0, len(told), _MOST_PATTERNS)]


# --------------------------------------------------------------------------------------------------------- D-Bus


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """The seam to D-Bus: all that it raises about the world becomes `DeviceUnreachable`."""
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
    except (DBusFastError, OSError, EOFError) as exc:
        raise DeviceUnreachable(f"{what}: {str(exc) or type(exc).__name__}") from exc


class _Refused(Exception):
    """BlueZ answered with an error."""

    def __init__(self, member: str, name: str, text: str) -> None:
        super().__init__(f"{member}: {name}: {text}")
        self.name = name


class _Session:
    """One D-Bus connection to BlueZ for one adapter: what it signals, and when it goes away."""

    def __init__(self, bus: MessageBus, adapter: str, receiver: _Receiver) -> None:
        self._bus = bus
        self._receiver = receiver
        self.adapter = adapter  #: "hci0"
        self.path = f"/org/bluez/{adapter}"
        self.can_monitor = False
        self._monitors: list[list[list[object]]] = []
        self._root = f"/headgate/{next(_ids)}"
        self.released: asyncio.Future[None] = (
            asyncio.get_running_loop().create_future()
        )  #: the monitor, by BlueZ
        self._gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()  # why
        self._ended = asyncio.create_task(_ended(bus), name=f"ble-bus[{adapter}]")

    @classmethod
    async def open(cls, wanted: str, receiver: _Receiver) -> _Session:
        """`wanted` is an adapter's name, or empty for the first that is powered. Raises `DeviceUnreachable`."""
        from dbus_fast import BusType
        from dbus_fast.aio import MessageBus

        bus = MessageBus(bus_type=BusType.SYSTEM)
        try:
            with translated("D-Bus"):
                async with asyncio.timeout(CALL_S):
                    await bus.connect()
                    return await cls._open(bus, wanted, receiver)
        except BaseException:
            bus.disconnect()
            raise

    @classmethod
    async def _open(cls, bus: MessageBus, wanted: str, receiver: _Receiver) -> _Session:
        await _match(bus, f"sender='org.freedesktop.DBus',member='NameOwnerChanged',arg0='{BLUEZ}'")
        try:
            reply = await _call(bus, BLUEZ, "/", OBJECT_MANAGER, "GetManagedObjects")
        except _Refused as exc:
            raise DeviceUnreachable(
                f"BlueZ does not answer ({exc.name}); is bluetoothd running? systemctl status bluetooth"
            ) from exc
        objects = reply.body[0]
        session = cls(bus, _adapter(objects, wanted), receiver)
        session.can_monitor = MONITORS in objects[session.path]
        for path, interfaces in objects.items():
            if DEVICE in interfaces and path.startswith(session.path):
                receiver.know(path, interfaces[DEVICE])
        bus.add_message_handler(session._on_message)
        signal = f"sender='{BLUEZ}',interface='{PROPERTIES}',member='PropertiesChanged'"
        await _match(bus, f"{signal},path='{session.path}',arg0='{ADAPTER}'")
        await _match(bus, f"{signal},path_namespace='{session.path}',arg0='{DEVICE}'")
        await _match(bus, f"sender='{BLUEZ}',interface='{OBJECT_MANAGER}',arg0path='{session.path}/'")
        await _match(bus, f"sender='{BLUEZ}',member='InterfacesRemoved',arg0path='{session.path}'")
        return session

    def _on_message(self, message: Message) -> Message | bool | None:
        """Every signal of every sender in reach comes through here: keep it short."""
        body = message.body
        match message.member:
            case "PropertiesChanged":
                if body[0] == DEVICE:
                    self._receiver.signalled(message.path or "", body[1])
                elif body[0] == ADAPTER:
                    powered = body[1].get("Powered")
                    if powered is not None and not powered.value:
                        self._say(f"the adapter {self.adapter} is powered off; bluetoothctl power on")
            case "InterfacesAdded" if DEVICE in body[1]:
                self._receiver.appeared(body[0], body[1][DEVICE])
            case "InterfacesRemoved":
                if DEVICE in body[1]:
                    self._receiver.vanished(body[0])
                elif ADAPTER in body[1] and body[0] == self.path:
                    self._say(f"the adapter {self.adapter} is gone; is it plugged in?")
            case "NameOwnerChanged" if body[0] == BLUEZ:
                self._say("bluetoothd has ended" if not body[2] else "bluetoothd was restarted")
            case _:
                return self._on_call(message)
        return None

    def _say(self, why: str) -> None:
        if not self._gone.done():
            self._gone.set_result(why)

    async def wait_gone(self) -> str:
        """Until the adapter, bluetoothd or the bus is gone; says which."""
        waiting: set[asyncio.Future[str] | asyncio.Task[None]] = {self._gone, self._ended}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        return self._gone.result() if self._gone.done() else "the connection to D-Bus is gone"

    @property
    def was_released(self) -> bool:
        return bool(self._monitors) and self.released.done()

    @property
    def is_gone(self) -> bool:
        return self._gone.done() or self._ended.done()

    # ---------------------------------------------------------------------------------------------- the scan

    async def scan(self) -> None:
        """Every advertisement from now on. Raises `DeviceUnreachable`."""
        from dbus_fast import Variant

        # DuplicateData: BlueZ would otherwise signal an advert only when its data change, and a sensor whose value
        # stands still could not be told from one that is dead.
        wish = {"Transport": Variant("s", "le"), "DuplicateData": Variant("b", True)}
        await self._told("SetDiscoveryFilter", "a{sv}", wish)
        for last in (False,) * (START_TRIES - 1) + (True,):
            try:
                await self._told("StartDiscovery")
            except _Refused as exc:
                if last or exc.name != _IN_PROGRESS:
                    raise
                # Always stopped before it is started again: a double start can lock a controller up (habluetooth).
                await self.stop_scan()
                await asyncio.sleep(START_PAUSE_S)
            else:
                return

    async def stop_scan(self) -> None:
        with contextlib.suppress(_Refused):
            await self._told("StopDiscovery")

    async def monitor(self, patterns: Patterns) -> None:
        """The passive scan: only what matches, and only when it has changed. Raises `_Refused` if it cannot be had."""
        self._monitors = patterns.as_bluez()
        await self._told("RegisterMonitor", "o", self._root, interface=MONITORS)

    async def stop_monitor(self) -> None:
        self._monitors = []
        if self.released.done():
            return  # BlueZ has dropped it, and 5.66 stumbles over being asked to
        with contextlib.suppress(_Refused):
            await self._told("UnregisterMonitor", "o", self._root, interface=MONITORS)

    def _on_call(self, message: Message) -> Message | bool | None:
        """BlueZ asks for the monitor's description, and tells it what we hear by signals anyway."""
        from dbus_fast import Message as Reply
        from dbus_fast import MessageType, Variant

        if message.message_type is not MessageType.METHOD_CALL or not (message.path or "").startswith(
            self._root
        ):
            return None
        monitors = {
            f"{self._root}/{number}": {
                MONITOR: {"Type": Variant("s", "or_patterns"), "Patterns": Variant("a(yyay)", patterns)}
            }
            for number, patterns in enumerate(self._monitors)
        }
        match message.member:
            case "GetManagedObjects":
                return Reply.new_method_return(message, "a{oa{sa{sv}}}", [monitors])
            case "GetAll" if message.path in monitors:
                return Reply.new_method_return(message, "a{sv}", [monitors[message.path][MONITOR]])
            case "Release":
                # It cannot have it: the kernel or the adapter refused, after BlueZ had said yes.
                if self._monitors and not self.released.done():
                    self.released.set_result(None)
                return Reply.new_method_return(message)
            case "Activate" | "DeviceFound" | "DeviceLost":
                return Reply.new_method_return(message)
        return None

    async def switch_off_and_on(self) -> None:
        from dbus_fast import Variant

        for on in (False, True):
            await _call(
                self._bus, BLUEZ, self.path, PROPERTIES, "Set", "ssv", ADAPTER, "Powered", Variant("b", on)
            )
            await asyncio.sleep(POWER_PAUSE_S)

    async def forget(self, path: str) -> None:
        """BlueZ drops all that it knows of a device: its stored services too."""
        with contextlib.suppress(_Refused):
            await self._told("RemoveDevice", "o", path)

    async def _told(self, member: str, signature: str = "", *body: object, interface: str = ADAPTER) -> None:
        await _call(self._bus, BLUEZ, self.path, interface, member, signature, *body)

    async def close(self) -> None:
        """Hang up, and wait until the socket is closed. BlueZ ends what this connection had begun."""
        self._bus.disconnect()
        await asyncio.wait({self._ended}, timeout=STOP_S)


_ids = itertools.count(1)


async def _ended(bus: MessageBus) -> None:
    """Until the bus is closed by either side."""
    with contextlib.suppress(Exception):  # by what error it ended is no matter here
        # Never to be cancelled: it awaits a future that the bus itself needs.
        await bus.wait_for_disconnect()  # type: ignore[no-untyped-call]  # dbus-fast leaves this one without types


def _adapter(objects: Mapping[str, Mapping[str, Mapping[str, Variant]]], wanted: str) -> str:
    adapters: dict[str, bool] = {}
    for path, interfaces in sorted(objects.items()):
        if ADAPTER in interfaces:
            powered = interfaces[ADAPTER].get("Powered")
            adapters[path.rpartition("/")[2]] = powered is not None and bool(powered.value)
    if not adapters:
        raise DeviceUnreachable(
            "there is no Bluetooth adapter; is it plugged in? `rfkill` shows if it is blocked"
        )
    if wanted and wanted not in adapters:
        raise DeviceUnreachable(f"there is no adapter {wanted}; there is {', '.join(adapters)}")
    on = [name for name, is_on in adapters.items() if is_on and wanted in ("", name)]
    if not on:
        raise DeviceUnreachable(
            f"the adapter {wanted or ', '.join(adapters)} is powered off; bluetoothctl power on"
        )
    return on[0]


async def _call(
    bus: MessageBus, to: str, path: str, interface: str, member: str, signature: str = "", *body: object
) -> Message:
    """Raises `_Refused`."""
    from dbus_fast import Message, MessageType

    call = Message(
        destination=to, path=path, interface=interface, member=member, signature=signature, body=list(body)
    )
    reply = await bus.call(call)
    if reply is None:
        raise DeviceUnreachable(f"D-Bus: no reply to {member}")
    if reply.message_type is MessageType.ERROR:
        raise _Refused(member, reply.error_name or "", str(reply.body[0]) if reply.body else "")
    return reply


async def _match(bus: MessageBus, rule: str) -> None:
    name = "org.freedesktop.DBus"
    await _call(bus, name, "/org/freedesktop/DBus", name, "AddMatch", "s", f"type='signal',{rule}")


# ------------------------------------------------------------------------------------------------------- hearing


class _Known(msgspec.Struct):
    """What BlueZ told of a sender before, which later signals leave out."""

    name: str = ""
    rssi: int | None = None
    connected: bool = False
    paired: bool = False
    services: Mapping[str, bytes] = {}  #: all data that BlueZ has, where there are several
    companies: Mapping[int, bytes] = {}


class _Receiver:
    """From BlueZ's signals to advertisements, and from these to who listens. No IO."""

    def __init__(self, path: str) -> None:
        self._path = path  #: of the adapter
        self._now_s = asyncio.get_running_loop().time
        self._known: dict[str, _Known] = {}
        self._by_path: dict[str, tuple[Listener, ...]] = {}
        self._everybody: list[Listener] = []
        self._awaited: dict[str, list[asyncio.Future[None]]] = {}
        self.last_data_s = self._now_s()
        self.ever_heard = False

    def settle(self, path: str) -> None:
        """The adapter is known now."""
        self._path = path

    def path_of(self, address: str) -> str:
        """BlueZ' path of a device, as org.bluez.Device(5) has it."""
        return f"{self._path}/dev_{address.replace(':', '_')}"

    # ------------------------------------------------------------------------------------------- listeners

    def add(self, address: str, listener: Listener) -> None:
        path = self.path_of(address)
        self._by_path[path] = (*self._by_path.get(path, ()), listener)

    def remove(self, address: str, listener: Listener) -> None:
        path = self.path_of(address)
        rest = tuple(other for other in self._by_path.get(path, ()) if other is not listener)
        if rest:
            self._by_path[path] = rest
        else:
            self._by_path.pop(path, None)

    def add_for_all(self, listener: Listener) -> None:
        """He hears those without data too."""
        self._everybody.append(listener)

    def remove_for_all(self, listener: Listener) -> None:
        self._everybody.remove(listener)

    async def sighting(self, address: str) -> str:
        """Until this device is in reach, whether it sends data or not; gives its path."""
        path = self.path_of(address)
        known = self._known.get(path)
        if known is not None and known.connected:
            return path
        seen: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._awaited.setdefault(path, []).append(seen)
        try:
            await seen
        finally:
            waiting = self._awaited[path]
            waiting.remove(seen)
            if not waiting:
                del self._awaited[path]
        return path

    # --------------------------------------------------------------------------------------------- signals

    def forget_all(self) -> None:
        """A new connection tells anew."""
        self._known.clear()

    def know(self, path: str, device: Mapping[str, Variant]) -> None:
        """What BlueZ keeps of a device: nothing that was heard now."""
        known = self._known[path] = _Known()
        self._learn(known, device)
        if "ServiceData" in device:
            self._new_services(known, device["ServiceData"])
        if "ManufacturerData" in device:
            self._new_companies(known, device["ManufacturerData"])

    def appeared(self, path: str, device: Mapping[str, Variant]) -> None:
        """A new object: by an advertisement, if there is a signal strength; else out of BlueZ's memory."""
        if "RSSI" in device:
            self._known.pop(path, None)
            self.signalled(path, device)
        else:
            self.know(path, device)

    def vanished(self, path: str) -> None:
        self._known.pop(path, None)

    def signalled(self, path: str, changed: Mapping[str, Variant]) -> None:
        """What has changed of a device; with data, this is an advertisement."""
        known = self._known.get(path)
        if known is None:
            known = self._known[path] = _Known()
        rssi = changed.get("RSSI")
        if rssi is not None:
            known.rssi = rssi.value
        if rssi is None or len(changed) > 2 or "Name" in changed:
            self._learn(known, changed)
        services, companies = changed.get("ServiceData"), changed.get("ManufacturerData")
        if self._awaited and path in self._awaited and (rssi or services or companies):
            for seen in self._awaited[path]:
                if not seen.done():
                    seen.set_result(None)
        if services is None and companies is None:
            if self._everybody and rssi is not None:
                bare = Heard(path[-17:].replace("_", ":"), boot_ns(), known.rssi, name=known.name)
                for listener in self._everybody:
                    listener.heard(bare)
            return
        self.last_data_s = self._now_s()
        self.ever_heard = True
        listeners = self._by_path.get(path, ())
        if not listeners and not self._everybody:
            return
        heard = Heard(
            path[-17:].replace("_", ":"),
            boot_ns(),
            known.rssi,
            self._new_services(known, services) if services is not None else {},
            self._new_companies(known, companies) if companies is not None else {},
            known.name,
        )
        for listener in listeners:
            listener.heard(heard)
        for listener in self._everybody:
            listener.heard(heard)

    def _learn(self, known: _Known, told: Mapping[str, Variant]) -> None:
        for key, value in told.items():
            match key:
                case "Name":
                    known.name = str(value.value)
                case "Connected":
                    known.connected = bool(value.value)
                case "Paired":
                    known.paired = bool(value.value)
                case "RSSI":
                    known.rssi = value.value

    def knows(self, path: str) -> bool:
        return path in self._known

    def is_paired(self, path: str) -> bool:
        known = self._known.get(path)
        return known is not None and known.paired

    @property
    def anybody_connected(self) -> bool:
        return any(known.connected for known in self._known.values())

    @staticmethod
    def _new_services(known: _Known, told: Variant) -> Mapping[str, bytes]:
        found: dict[str, bytes] = {uuid: data.value for uuid, data in told.value.items()}
        before, known.services = known.services, found
        return found if len(found) == 1 else _news(before, found)

    @staticmethod
    def _new_companies(known: _Known, told: Variant) -> Mapping[int, bytes]:
        found: dict[int, bytes] = {number: data.value for number, data in told.value.items()}
        before, known.companies = known.companies, found
        return found if len(found) == 1 else _news(before, found)

    # ------------------------------------------------------------------------------------------------- end

    def lost(self, error: DeviceUnreachable) -> None:
        everybody = [each for listeners in self._by_path.values() for each in listeners] + self._everybody
        for listener in everybody:
            listener.lost(error)
        for waiting in list(self._awaited.values()):
            for seen in waiting:
                if not seen.done():
                    seen.set_exception(error)


_KeyT = TypeVar("_KeyT", str, int)


def _news(before: Mapping[_KeyT, bytes], now: Mapping[_KeyT, bytes]) -> Mapping[_KeyT, bytes]:
    """BlueZ tells all data that a sender ever sent. Those that changed are this advertisement's; if none did, nobody
    can tell which it repeated, and all are as true as before."""
    changed = {key: data for key, data in now.items() if before.get(key) != data}
    return changed or now


# ------------------------------------------------------------------------------------------------------- scanner


class Scanner:
    """One adapter at work for all who listen."""

    def __init__(self, wanted: str, patterns: Patterns, unmonitored: set[str]) -> None:
        """`unmonitored`: the adapters that were found not to scan passively."""
        self._unmonitored = unmonitored
        self._wanted = wanted
        self._patterns = patterns
        self._receiver = _Receiver("")
        self._session: _Session | None = None
        self._need = Need.WATCH  #: what the scan does now
        self._needs: dict[object, Need] = {}  #: of everybody who has joined
        self._loop = asyncio.get_running_loop()
        self._started_s = self._loop.time()
        self._restarts = 0  #: since data were last heard
        self._guard_task: asyncio.Task[None] | None = None
        self._changed: asyncio.Future[None] = (
            self._loop.create_future()
        )  #: the scan, so that the guard looks again
        self._changing = asyncio.Lock()
        self.failure: DeviceUnreachable | None = None

    @classmethod
    async def open(cls, wanted: str, patterns: Patterns, unmonitored: set[str]) -> Scanner:
        """Raises `DeviceUnreachable`."""
        scanner = cls(wanted, patterns, unmonitored)
        scanner._session = await _Session.open(wanted, scanner._receiver)
        scanner._receiver.settle(scanner._session.path)
        scanner._guard_task = asyncio.create_task(scanner._guard(), name=f"ble-guard[{scanner.adapter}]")
        return scanner

    @property
    def adapter(self) -> str:
        return self._open_session.adapter

    @property
    def _open_session(self) -> _Session:
        if self._session is None:
            raise self.failure or DeviceUnreachable("Bluetooth: not connected")
        return self._session

    @property
    def idle(self) -> bool:
        return not self._needs

    async def close(self) -> None:
        guard, self._guard_task = self._guard_task, None
        if guard is not None and guard is not asyncio.current_task():
            guard.cancel()
            await asyncio.wait({guard})
        await self._hang_up()

    # --------------------------------------------------------------------------------------------- listeners

    async def add(self, address: str, listener: Listener, need: Need) -> None:
        """Raises `DeviceUnreachable`, and then `listener` has not joined."""
        self._receiver.add(address, listener)
        try:
            await self.want(listener, need)
        except BaseException:
            self._receiver.remove(address, listener)
            raise

    async def add_for_all(self, listener: Listener) -> None:
        self._receiver.add_for_all(listener)
        try:
            await self.want(listener, Need.ACTIVE)
        except BaseException:
            self._receiver.remove_for_all(listener)
            raise

    def remove(self, address: str, listener: Listener) -> None:
        self._receiver.remove(address, listener)
        self._needs.pop(listener, None)

    def remove_for_all(self, listener: Listener) -> None:
        self._receiver.remove_for_all(listener)
        self._needs.pop(listener, None)

    async def want(self, who: object, need: Need) -> None:
        """From now on `who` needs this much. Raises `DeviceUnreachable`."""
        before = self._needs.get(who)
        self._needs[who] = need
        try:
            await self._adjust()
        except BaseException:
            if before is None:
                self._needs.pop(who, None)
            else:
                self._needs[who] = before
            raise

    async def relax(self) -> None:
        """Somebody has left, who may have been the last to need the scan."""
        if self.failure is None:
            with contextlib.suppress(DeviceUnreachable):  # its guard tells those who listen
                await self._adjust()

    async def _adjust(self) -> None:
        """As much of a scan as is needed; once active it stays so, until nobody needs any."""
        async with self._changing:
            wanted = max(self._needs.values(), default=Need.WATCH)
            if wanted == self._need or Need.WATCH < wanted < self._need:
                return
            await self._change(self._open_session, wanted)

    async def _change(self, session: _Session, wanted: Need) -> None:
        with self._translated(f"scanning on {session.adapter}"):
            async with asyncio.timeout(CALL_S):
                before, self._need = self._need, wanted
                try:
                    await self._start(session, before, wanted)
                except BaseException:
                    self._need = before
                    raise
        self._started_s = self._receiver.last_data_s = self._loop.time()
        if not self._changed.done():
            self._changed.set_result(None)

    async def _start(self, session: _Session, before: Need, wanted: Need) -> None:
        if wanted is Need.PASSIVE:
            if session.adapter in self._unmonitored:
                pass
            elif not session.can_monitor:
                self._not_passive(
                    "bluetoothd has no advertisement monitors (before 5.56, or without --experimental)"
                )
            else:
                try:
                    await session.monitor(self._patterns)
                except _Refused as exc:
                    self._not_passive(str(exc))
                else:
                    return
            self._need = Need.ACTIVE
        if wanted is not Need.WATCH:
            await session.scan()
        if before is Need.ACTIVE and wanted is Need.WATCH:
            await session.stop_scan()
        if before is Need.PASSIVE:
            await session.stop_monitor()

    def _not_passive(self, why: str) -> None:
        """Once and for all: it is not tried again, since some versions of bluetoothd do not survive it for long."""
        adapter = self._open_session.adapter
        if adapter not in self._unmonitored:
            self._unmonitored.add(adapter)
            _log.info("Bluetooth: passive scanning cannot be had on %s, so it is active: %s", adapter, why)

    @contextlib.contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        with translated(what):
            try:
                yield
            except _Refused as exc:
                reason = Reason.BUSY if exc.name == _IN_PROGRESS else Reason.DISCONNECTED
                raise DeviceUnreachable(f"{what}: {exc}", reason) from exc

    async def sighting(self, address: str) -> str:
        """Until this device is in reach; gives BlueZ' path of it. Raises `DeviceUnreachable` if the adapter is lost."""
        return await self._receiver.sighting(address)

    def path_of(self, address: str) -> str:
        return self._receiver.path_of(address)

    def knows(self, address: str) -> bool:
        """Has BlueZ an object for it?"""
        return self._receiver.knows(self.path_of(address))

    async def forget(self, address: str) -> bool:
        """BlueZ is to drop what it stored of a device, and to ask for its services afresh. Never a paired one's."""
        path = self.path_of(address)
        if self._receiver.is_paired(path):
            return False
        with self._translated(f"forgetting {address}"):
            async with asyncio.timeout(CALL_S):
                await self._open_session.forget(path)
        return True

    # ------------------------------------------------------------------------------------------------- guard

    async def _guard(self) -> None:
        """Watch for the end of the adapter, and for a scan that has gone deaf."""
        try:
            while True:
                session = self._open_session
                gone = asyncio.create_task(session.wait_gone(), name=f"ble-gone[{session.adapter}]")
                try:
                    await self._until_deaf(session, gone)
                finally:
                    gone.cancel()
                async with self._changing:
                    await self._afresh(session)
        except DeviceUnreachable as exc:
            self._fail(exc)
        except Exception as exc:  # noqa: BLE001 - a guard that ends unseen would leave all listeners deaf for ever
            self._fail(DeviceUnreachable(f"Bluetooth: {type(exc).__name__}: {exc}"))

    async def _until_deaf(self, session: _Session, gone: asyncio.Task[str]) -> None:
        """Raises `DeviceUnreachable` when the adapter is gone."""
        while True:
            if self._receiver.last_data_s > self._started_s:
                self._restarts = 0
            patience_s = RESTART_AFTER_S if self._restarts != 1 else RESET_AFTER_S
            due_s = self._receiver.last_data_s + patience_s
            scanning = self._need is not Need.WATCH
            if scanning and (due_s <= self._loop.time() or session.was_released):
                return
            self._changed = self._loop.create_future()
            waiting: set[asyncio.Task[str] | asyncio.Future[None]] = {gone, self._changed}
            if self._need is Need.PASSIVE:
                waiting.add(session.released)
            await asyncio.wait(
                waiting,
                timeout=max(due_s - self._loop.time(), 0.01) if scanning else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if gone.done():
                raise DeviceUnreachable(f"Bluetooth: {gone.result()}")

    async def _afresh(self, session: _Session) -> None:
        """A new connection, and the scan anew; the second time in a row the adapter is switched off and on. A passive
        scan that is given back, or hears nothing, goes on as an active one."""
        if self._need is Need.PASSIVE:
            self._not_passive(
                "bluetoothd gave the monitor back" if session.was_released else "nothing was heard that way"
            )
            await self._change(session, Need.ACTIVE)
            return
        quiet_s = self._loop.time() - self._receiver.last_data_s
        self._restarts += 1
        switched = self._restarts == 2 and self._receiver.ever_heard and not self._receiver.anybody_connected
        _log.warning(
            "Bluetooth: no data on %s for %.0f s; %s",
            session.adapter,
            quiet_s,
            "the adapter is switched off and on" if switched else "scanning is started afresh",
        )
        need, self._need = self._need, Need.WATCH
        if switched:
            try:
                with self._translated(f"switching {session.adapter} off and on"):
                    async with asyncio.timeout(CALL_S):
                        await session.switch_off_and_on()
            except DeviceUnreachable as exc:
                _log.warning("%s", exc)
        await self._hang_up()
        self._receiver.forget_all()
        self._session = fresh = await _Session.open(session.adapter, self._receiver)
        await self._change(fresh, need)

    async def _hang_up(self) -> None:
        """End the scan, politely if there is somebody to be polite to."""
        session, self._session = self._session, None
        if session is None:
            return
        if not session.is_gone:
            try:
                with self._translated(f"end of scanning on {session.adapter}"):
                    async with asyncio.timeout(STOP_S):
                        await session.stop_scan()
            except DeviceUnreachable as exc:
                _log.debug("%s", exc)
        await session.close()

    def _fail(self, error: DeviceUnreachable) -> None:
        self.failure = error
        self._receiver.lost(error)


class Slots:
    """The connections that an adapter has at once: who asks first has the first that is free."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._free = asyncio.Semaphore(size)  # serves in the order of asking
        self._making = asyncio.Lock()  # likewise
        self._holders: list[str] = []

    @property
    def holders(self) -> Sequence[str]:
        return tuple(self._holders)

    async def take(self, who: str, timeout_s: float) -> None:
        """Raises `DeviceUnreachable` (BUSY) if none comes free in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._free.acquire()
        except TimeoutError as exc:
            raise DeviceUnreachable(
                f"Bluetooth: no connection came free within {timeout_s:g} s; all {self._size} are held by "
                f"{', '.join(self._holders)}: let some be read less often, or use another adapter for them",
                Reason.BUSY,
            ) from exc
        self._holders.append(who)

    def give_back(self, who: str) -> None:
        self._holders.remove(who)
        self._free.release()

    @contextlib.asynccontextmanager
    async def making(self) -> AsyncIterator[None]:
        """One connection is made at a time: a second attempt meanwhile makes BlueZ give up the first."""
        async with self._making:
            yield


class Hub:
    """The adapters of one event loop. Joining and leaving are one at a time."""

    def __init__(self, patterns: Patterns) -> None:
        self._patterns = patterns
        self._lock = asyncio.Lock()
        self._scanners: dict[str, Scanner] = {}
        self._slots: dict[str, Slots] = {}
        self._unmonitored: set[str] = set()

    @contextlib.asynccontextmanager
    async def scanner(self, adapter: str) -> AsyncIterator[Scanner]:
        """The scanner of an adapter ("": the first that is powered), with the right to join it. Raises
        `DeviceUnreachable`."""
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

    async def leave(self, scanner: Scanner) -> None:
        """The last who leaves ends the scan."""
        async with self._lock:
            if scanner.idle:
                await self._drop(scanner)
            else:
                await scanner.relax()

    def slots(self, adapter: str) -> Slots:
        """`adapter` is its name, as a scanner tells it. They outlive a scanner: a connection does too."""
        return self._slots.setdefault(adapter, Slots(CONNECTIONS))

    async def _open(self, adapter: str) -> Scanner:
        fresh = await Scanner.open(adapter, self._patterns, self._unmonitored)
        # "" and "hci0" may be the same adapter, and one scan of it is enough.
        scanner = self._scanners.get(fresh.adapter)
        if scanner is not None and scanner.failure is None:
            await fresh.close()
        else:
            if scanner is not None:
                await self._drop(scanner)
            scanner = fresh
        self._scanners[adapter] = self._scanners[scanner.adapter] = scanner
        return scanner

    async def _drop(self, scanner: Scanner) -> None:
        for name in [name for name, known in self._scanners.items() if known is scanner]:
            del self._scanners[name]
        await scanner.close()


_hubs: Final[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Hub]] = weakref.WeakKeyDictionary()


def hub() -> Hub:
    """The hub of the running loop."""
    from drivers.advert_formats import FORMATS

    loop = asyncio.get_running_loop()
    known = _hubs.get(loop)
    if known is None:
        services = sorted({int(uuid[4:8], 16) for each in FORMATS for uuid in each.services})
        companies = sorted({number for each in FORMATS for number in each.companies})
        known = _hubs[loop] = Hub(Patterns(tuple(services), tuple(companies)))
    return known
