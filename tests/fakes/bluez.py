"""A simulated BlueZ on a private D-Bus: what runs against it are our scanner and the real, unmodified `bleak`.

It keeps BlueZ's habits that matter to a client: nothing is heard while nobody scans; a client that scans twice gets
`InProgress`; without `DuplicateData` (and by an advertisement monitor) an unchanged advert is not signalled again; a
change of signal strength alone is signalled without the data; of a sender all data ever heard are signalled together;
devices stay in the object tree after they were heard; a scan ends with its client; services are resolved some time
after a connection, and gone with it. And its failures: adapter pulled or powered off, bluetoothd restarted, D-Bus gone,
calls that are refused, never answered, or done and answered with an error; a controller gone deaf until the scan is
started afresh, or until it is switched off and on; connections refused, hanging, dropped; ATT errors.

    python -m tests.fakes.bluez --folder /tmp/bus --sensors 3 --period-ms 1000 --seed 7

starts a bus and advertises BTHome thermometers on it until SIGTERM. It prints one line of JSON with the bus's address
(for DBUS_SYSTEM_BUS_ADDRESS) and the sensors' when it is ready, and one with its counts at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import math
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Final

from dbus_fast import BusType, DBusFastError, ErrorType, Message, MessageType, Variant
from dbus_fast.aio import MessageBus

ADAPTER: Final = "org.bluez.Adapter1"
DEVICE: Final = "org.bluez.Device1"
OBJECT_MANAGER: Final = "org.freedesktop.DBus.ObjectManager"
PROPERTIES: Final = "org.freedesktop.DBus.Properties"
BTHOME_UUID: Final = "0000fcd2-0000-1000-8000-00805f9b34fb"

SERVICE: Final = "org.bluez.GattService1"
CHARACTERISTIC: Final = "org.bluez.GattCharacteristic1"
MONITORS: Final = "org.bluez.AdvertisementMonitorManager1"
MONITOR: Final = "org.bluez.AdvertisementMonitor1"

RSSI_THRESHOLD_DB = 8  # BlueZ signals a smaller change only with DuplicateData (src/device.c, RSSI_THRESHOLD)

INSTALL = "dbus-daemon is not installed; on Debian: apt-get install dbus-daemon"

_BUS_CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/> <allow own="*"/>
    <allow send_type="method_call"/> <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/> <allow receive_type="method_return"/>
    <allow receive_type="error"/> <allow receive_type="signal"/>
  </policy>
</busconfig>
"""

Properties = dict[str, Variant]


class PrivateBus:
    """A real dbus-daemon of our own. `address` goes into DBUS_SYSTEM_BUS_ADDRESS, and stays over a restart."""

    def __init__(self, folder: Path) -> None:
        self._socket = folder / "bus"
        self._config = folder / "bus.conf"
        self._log = folder / "bus.log"
        self._config.write_text(_BUS_CONFIG.format(socket=self._socket))
        self.address = f"unix:path={self._socket}"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        program = shutil.which("dbus-daemon", path="/usr/bin:/bin:/usr/local/bin")
        if program is None:
            raise RuntimeError(INSTALL)
        self._socket.unlink(missing_ok=True)
        # So that it does not outlive a test that is killed.
        bound = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [
                    *bound,
                    program,
                    f"--config-file={self._config}",
                    "--nofork",
                    "--nopidfile",
                    "--print-address",
                ],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._process.stdout is not None
        if not self._process.stdout.readline():  # it prints its address once it listens
            raise RuntimeError(f"dbus-daemon ended with {self._process.wait()}: {self._log.read_text()}")

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


@contextlib.contextmanager
def private_bus() -> Iterator[PrivateBus]:
    """A bus in a folder of its own; a socket's path may have 107 bytes, which a test's folder can exceed."""
    with tempfile.TemporaryDirectory(prefix="bus-") as folder:
        bus = PrivateBus(Path(folder))
        bus.start()
        try:
            yield bus
        finally:
            bus.stop()


@dataclasses.dataclass(slots=True)
class _Sent:
    """What was last signalled of a device."""

    rssi: int
    data: Mapping[str, bytes]
    companies: Mapping[int, bytes]
    name: str


@dataclasses.dataclass(slots=True)
class Characteristic:
    """One of a peripheral. `errors` are given out before the value is: (name, text) of a D-Bus error."""

    uuid: str
    value: bytes = b""
    flags: tuple[str, ...] = ("read", "notify")
    errors: list[tuple[str, str]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(slots=True)
class _Monitor:
    """An advertisement monitor of a client: (AD type, content at the start)."""

    client: str
    root: str
    patterns: list[tuple[int, bytes]]


class FakeBlueZ:
    """`org.bluez` with one adapter. `offered` and `delivered` are its own books, whoever listens."""

    def __init__(self, adapter: str = "hci0", *, powered: bool = True, monitors: bool = False) -> None:
        """`monitors`: it was started with --experimental, so that clients can scan passively."""
        self.adapter_path = f"/org/bluez/{adapter}"
        self.offered = 0  #: adverts that sensors sent
        self.delivered = 0  #: of those, signalled to somebody who scans, data and all
        self.calls: deque[tuple[str, str]] = deque(maxlen=200)  #: (path, member) of the last calls
        self.refusals: dict[str, list[tuple[str, str]]] = {}  #: member -> errors still to give, (name, text)
        self.hangs: set[str] = set()  #: members that are never answered
        self.done_but_refused: dict[str, list[tuple[str, str]]] = {}  #: likewise, and done all the same
        self.deaf_until = (
            ""  #: "" or "restart" of the scan, or "power" off and on: no advertisement gets through
        )
        self.connect_s = 0.0  #: that a connection takes
        self.connected: list[str] = []  #: addresses, in the order of connecting
        self.connects: deque[str] = deque(maxlen=200)  #: likewise, and not forgotten when they end
        self.most_connected = self.most_connecting = 0
        self.monitors: list[_Monitor] = []
        self.monitors_fail = False  #: the kernel refuses them, after BlueZ has said yes
        self._has_monitors = monitors
        self._scanned_before = False
        self._connecting = 0
        self._peripherals: dict[str, dict[str, list[Characteristic]]] = {}  #: by path and service
        self._characteristics: dict[str, Characteristic] = {}  #: by path
        self._notifying: set[str] = set()
        self._powered = powered
        self._tree: dict[str, dict[str, Properties]] = {}
        self._sent: dict[str, _Sent] = {}
        self._sessions: set[str] = set()  #: unique names of the clients that scan
        self._filters: dict[str, Properties] = {}
        self._bus: MessageBus | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # ----------------------------------------------------------------------------------------- as a process

    async def start(self) -> FakeBlueZ:
        """Appear on the bus that DBUS_SYSTEM_BUS_ADDRESS names."""
        bus = MessageBus(bus_type=BusType.SYSTEM)
        await bus.connect()
        self._bus = bus
        bus.add_message_handler(self._on_message)
        await bus.call(
            Message(
                destination="org.freedesktop.DBus",
                path="/org/freedesktop/DBus",
                interface="org.freedesktop.DBus",
                member="AddMatch",
                signature="s",
                body=["type='signal',sender='org.freedesktop.DBus',member='NameOwnerChanged'"],
            )
        )
        await bus.request_name("org.bluez")
        self.plug()
        return self

    async def delivered_all(self) -> None:
        """Until the bus has taken and passed on what was sent: the answer to a question asked after it is here."""
        for _ in range(2):
            if self._bus is not None:
                await self._bus.call(
                    Message(
                        destination="org.freedesktop.DBus",
                        path="/org/freedesktop/DBus",
                        interface="org.freedesktop.DBus",
                        member="GetId",
                    )
                )

    def stop(self) -> None:
        """End as a killed bluetoothd does: no farewell, sessions and devices forgotten."""
        for task in self._tasks:
            task.cancel()
        bus, self._bus = self._bus, None
        if bus is not None:
            bus.disconnect()
        self._tree.clear()
        self._sent.clear()
        self._sessions.clear()
        self._filters.clear()
        self.monitors.clear()
        self.connected.clear()
        self._characteristics.clear()
        self._notifying.clear()
        self._connecting = 0

    @property
    def discovering(self) -> bool:
        """Does anybody scan?"""
        return bool(self._sessions)

    # ---------------------------------------------------------------------------------------------- adapter

    def plug(self) -> None:
        """The adapter is there."""
        self._add(
            self.adapter_path,
            ADAPTER,
            {
                "Address": Variant("s", "00:AA:01:00:00:01"),
                "Name": Variant("s", "simulated"),
                "Powered": Variant("b", self._powered),
                "Discovering": Variant("b", False),
                "Roles": Variant("as", ["central"]),
            },
        )
        if self._has_monitors:
            supported = {"SupportedMonitorTypes": Variant("as", ["or_patterns"])}
            self._add(self.adapter_path, MONITORS, supported)

    def unplug(self) -> None:
        """The adapter is pulled out, and its devices with it."""
        self._sessions.clear()
        self.monitors.clear()
        for address in list(self.connected):
            self.drop_link(address)
        for path in [path for path in self._tree if path.startswith(self.adapter_path + "/")]:
            self.forget(path)
        self._remove(self.adapter_path)

    def power(self, on: bool) -> None:
        self._powered = on
        if not on:
            self._sessions.clear()
            for address in list(self.connected):
                self.drop_link(address)
        elif self.deaf_until == "power":
            self.deaf_until = ""
        self._change(
            self.adapter_path,
            ADAPTER,
            {"Powered": Variant("b", on), "Discovering": Variant("b", self.discovering)},
        )

    # ---------------------------------------------------------------------------------------------- sensors

    def path_of(self, address: str) -> str:
        return f"{self.adapter_path}/dev_{address.replace(':', '_')}"

    def advertise(
        self,
        address: str,
        *,
        rssi: int = -60,
        service_data: Mapping[str, bytes] | None = None,
        company_data: Mapping[int, bytes] | None = None,
        name: str = "",
    ) -> bool:
        """One advertisement. True if it was signalled, with its data, to a client that scans."""
        self.offered += 1
        if self._bus is None or self.adapter_path not in self._tree or self.deaf_until or not self._powered:
            return False
        data, companies = dict(service_data or {}), dict(company_data or {})
        if not self.discovering and not self._is_monitored(data, companies):
            return False
        path = self.path_of(address)
        before = self._sent.get(path)
        all_data = dict(before.data if before else {}) | data
        all_companies = dict(before.companies if before else {}) | companies
        self._sent[path] = _Sent(rssi, all_data, all_companies, name or (before.name if before else ""))
        changes: Properties = {}
        duplicates = any(
            (wish := wishes.get("DuplicateData")) is None or wish.value for wishes in self._filters.values()
        )
        if before is None or duplicates or abs(before.rssi - rssi) >= RSSI_THRESHOLD_DB:
            changes["RSSI"] = Variant("n", rssi)
        if name and (before is None or before.name != name):
            changes["Name"] = changes["Alias"] = Variant("s", name)
        if data and (before is None or duplicates or before.data != all_data):
            changes["ServiceData"] = _service_data(all_data)
        if companies and (before is None or duplicates or before.companies != all_companies):
            changes["ManufacturerData"] = _company_data(all_companies)
        if before is None:
            self._add(path, DEVICE, self._device(address, name) | changes)
        elif changes:
            self._change(path, DEVICE, changes)
        heard = "ServiceData" in changes or "ManufacturerData" in changes
        self.delivered += heard
        return heard

    def _is_monitored(self, data: Mapping[str, bytes], companies: Mapping[int, bytes]) -> bool:
        sent = [(0x16, int(uuid[4:8], 16).to_bytes(2, "little") + raw) for uuid, raw in data.items()]
        sent += [(0xFF, number.to_bytes(2, "little") + raw) for number, raw in companies.items()]
        return any(
            kind == wanted and raw.startswith(content)
            for monitor in self.monitors
            for wanted, content in monitor.patterns
            for kind, raw in sent
        )

    def know(self, address: str, service_data: Mapping[str, bytes], name: str = "") -> None:
        """A device heard in some earlier scan, still in BlueZ's memory."""
        path = self.path_of(address)
        self._sent[path] = _Sent(-60, dict(service_data), {}, name)
        self._add(path, DEVICE, self._device(address, name) | {"ServiceData": _service_data(service_data)})

    def forget(self, path: str) -> None:
        self._sent.pop(path, None)
        self._remove(path)

    def _device(self, address: str, name: str) -> Properties:
        # BlueZ makes an alias of the address where there is no name.
        named = {"Name": Variant("s", name)} if name else {}
        return named | {
            "Adapter": Variant("o", self.adapter_path),
            "Address": Variant("s", address),
            "AddressType": Variant("s", "random"),
            "Alias": Variant("s", name or address.replace(":", "-")),
            "Paired": Variant("b", False),
            "Trusted": Variant("b", False),
            "Blocked": Variant("b", False),
            "Connected": Variant("b", False),
            "ServicesResolved": Variant("b", False),
            "UUIDs": Variant("as", []),
        }

    # ---------------------------------------------------------------------------------------- connections

    def peripheral(self, address: str, services: Mapping[str, list[Characteristic]]) -> None:
        """What a device offers to whom connects."""
        self._peripherals[self.path_of(address)] = dict(services)

    def notify(self, address: str, uuid: str, value: bytes) -> bool:
        """The device sends a notification. True if somebody had asked for it."""
        path = self.path_of(address)
        for at, characteristic in self._characteristics.items():
            if at.startswith(path) and characteristic.uuid == uuid:
                characteristic.value = value
                if at in self._notifying:
                    self._change(at, CHARACTERISTIC, {"Value": Variant("ay", value)})
                    return True
        return False

    def drop_link(self, address: str) -> None:
        """The connection is lost."""
        path = self.path_of(address)
        if address in self.connected:
            self.connected.remove(address)
        if path in self._tree:
            off = {"ServicesResolved": Variant("b", False), "Connected": Variant("b", False)}
            self._change(path, DEVICE, off)
        for below in [one for one in self._tree if one.startswith(path + "/")]:
            self._notifying.discard(below)
            self._characteristics.pop(below, None)
            self._remove(below)

    async def _connect(self, message: Message) -> None:
        path = message.path or ""
        address = path[-17:].replace("_", ":")
        self._connecting += 1
        self.most_connecting = max(self.most_connecting, self._connecting)
        await asyncio.sleep(self.connect_s)
        self._connecting -= 1
        if self._bus is None or path not in self._tree:
            return
        if address not in self.connected:
            self.connected.append(address)
            self.connects.append(address)
        self.most_connected = max(self.most_connected, len(self.connected))
        self._change(path, DEVICE, {"Connected": Variant("b", True)})
        self._reply(Message.new_method_return(message))
        await asyncio.sleep(0.01)  # its services are asked for
        if address in self.connected:
            self._resolve(path)

    def _resolve(self, path: str) -> None:
        handle = 0
        for service, characteristics in self._peripherals.get(path, {}).items():
            handle += 1
            at = f"{path}/service{handle:04x}"
            told = {
                "UUID": Variant("s", service),
                "Device": Variant("o", path),
                "Primary": Variant("b", True),
            }
            self._add(at, SERVICE, told)
            for characteristic in characteristics:
                handle += 1
                below = f"{at}/char{handle:04x}"
                self._characteristics[below] = characteristic
                self._add(
                    below,
                    CHARACTERISTIC,
                    {
                        "UUID": Variant("s", characteristic.uuid),
                        "Service": Variant("o", at),
                        "Value": Variant("ay", b""),
                        "Notifying": Variant("b", False),
                        "Flags": Variant("as", list(characteristic.flags)),
                        "MTU": Variant("q", 247),
                    },
                )
        self._change(path, DEVICE, {"ServicesResolved": Variant("b", True)})

    def _answer_characteristic(self, message: Message) -> Message:
        path = message.path or ""
        characteristic = self._characteristics[path]
        match message.member:
            case "ReadValue":
                if characteristic.errors:
                    return Message.new_error(message, *characteristic.errors.pop(0))
                if "read" not in characteristic.flags:
                    return Message.new_error(message, "org.bluez.Error.NotPermitted", "Read not permitted")
                return Message.new_method_return(message, "ay", [characteristic.value])
            case "StartNotify":
                if "notify" not in characteristic.flags:
                    return Message.new_error(
                        message, "org.bluez.Error.NotSupported", "Operation is not supported"
                    )
                self._notifying.add(path)
            case "StopNotify":
                self._notifying.discard(path)
            case member:
                return Message.new_error(message, ErrorType.UNKNOWN_METHOD.value, f"no method {member}")
        return Message.new_method_return(message)

    def _reply(self, message: Message) -> None:
        if self._bus is not None and self._bus.connected:
            with contextlib.suppress(OSError, DBusFastError):
                self._bus.send(message)

    def _later(self, work: Coroutine[object, object, None]) -> bool:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    # ------------------------------------------------------------------------------------------------- tree

    def _signal(self, path: str, interface: str, member: str, signature: str, body: list[object]) -> None:
        if self._bus is not None and self._bus.connected:
            with contextlib.suppress(OSError, DBusFastError):  # the bus may be gone: nobody hears it
                self._bus.send(Message.new_signal(path, interface, member, signature, body))

    def _add(self, path: str, interface: str, properties: Properties) -> None:
        self._tree.setdefault(path, {})[interface] = properties
        self._signal("/", OBJECT_MANAGER, "InterfacesAdded", "oa{sa{sv}}", [path, {interface: properties}])

    def _remove(self, path: str) -> None:
        interfaces = list(self._tree.pop(path, {}))
        self._signal("/", OBJECT_MANAGER, "InterfacesRemoved", "oas", [path, interfaces])

    def _change(self, path: str, interface: str, properties: Properties) -> None:
        self._tree[path][interface].update(properties)
        self._signal(path, PROPERTIES, "PropertiesChanged", "sa{sv}as", [interface, properties, []])

    # ------------------------------------------------------------------------------------------------ calls

    def _on_message(self, message: Message) -> Message | bool | None:
        if message.member == "NameOwnerChanged" and message.body and not message.body[2]:
            self._end_session(message.body[0])
            return None
        bus = self._bus
        if bus is None or message.message_type is not MessageType.METHOD_CALL:
            return None
        if (
            message.destination not in ("org.bluez", bus.unique_name)
            or message.interface == "org.freedesktop.DBus.Peer"
        ):
            return None
        member = message.member or ""
        self.calls.append((message.path or "", member))
        if member in self.hangs:
            return True
        if errors := self.refusals.get(member):
            return Message.new_error(message, *errors.pop(0))
        if errors := self.done_but_refused.get(member):
            self._answer(message)
            return Message.new_error(message, *errors.pop(0))
        if message.interface == DEVICE and member == "Connect":
            return self._later(self._connect(message))
        if message.interface == MONITORS and member == "RegisterMonitor":
            return self._later(self._register(message))
        return self._answer(message)

    async def _register(self, message: Message) -> None:
        """As BlueZ does: the client is asked for what it has under the path that it named."""
        client, root = message.sender or "", str(message.body[0])
        self._reply(Message.new_method_return(message))
        bus = self._bus
        if bus is None:
            return
        asked = await bus.call(
            Message(destination=client, path=root, interface=OBJECT_MANAGER, member="GetManagedObjects")
        )
        if asked.message_type is not MessageType.METHOD_RETURN:
            return
        for path, interfaces in asked.body[0].items():
            if MONITOR in interfaces and interfaces[MONITOR]["Type"].value == "or_patterns":
                patterns = [
                    (kind, bytes(content)) for _, kind, content in interfaces[MONITOR]["Patterns"].value
                ]
                told = "Release" if self.monitors_fail else "Activate"
                if not self.monitors_fail:
                    self.monitors.append(_Monitor(client, root, patterns))
                await bus.call(Message(destination=client, path=path, interface=MONITOR, member=told))

    def _answer(self, message: Message) -> Message:
        path, member = message.path or "", message.member or ""
        if message.interface == OBJECT_MANAGER and member == "GetManagedObjects":
            return Message.new_method_return(message, "a{oa{sa{sv}}}", [self._tree])
        node = self._tree.get(path)
        if node is None:
            return Message.new_error(message, ErrorType.UNKNOWN_OBJECT.value, f"no object at {path}")
        if message.interface == PROPERTIES and member == "GetAll":
            return Message.new_method_return(message, "a{sv}", [node[message.body[0]]])
        if message.interface == PROPERTIES and member == "Get":
            return Message.new_method_return(message, "v", [node[message.body[0]][message.body[1]]])
        if message.interface == PROPERTIES and member == "Set" and message.body[1] == "Powered":
            self.power(bool(message.body[2].value))
            return Message.new_method_return(message)
        if message.interface == ADAPTER:
            return self._answer_adapter(message)
        if message.interface == MONITORS:
            self.monitors = [one for one in self.monitors if one.client != message.sender]
            return Message.new_method_return(message)
        if message.interface == DEVICE and member == "Disconnect":
            self.drop_link(path[-17:].replace("_", ":"))
            return Message.new_method_return(message)
        if message.interface == CHARACTERISTIC:
            return self._answer_characteristic(message)
        return Message.new_error(message, ErrorType.UNKNOWN_METHOD.value, f"no method {member}")

    def _answer_adapter(self, message: Message) -> Message:
        client = message.sender or ""
        match message.member:
            case "SetDiscoveryFilter":
                self._filters[client] = dict(message.body[0])
            case "StartDiscovery":
                if not self._powered:
                    return Message.new_error(message, "org.bluez.Error.NotReady", "Resource Not Ready")
                if client in self._sessions:
                    return Message.new_error(
                        message, "org.bluez.Error.InProgress", "Operation already in progress"
                    )
                self._sessions.add(client)
                if self.deaf_until == "restart" and self._scanned_before:
                    self.deaf_until = ""
                self._scanned_before = True
                self._change(self.adapter_path, ADAPTER, {"Discovering": Variant("b", True)})
            case "RemoveDevice":
                path = str(message.body[0])
                self.drop_link(path[-17:].replace("_", ":"))
                self.forget(path)
            case "StopDiscovery":
                if client not in self._sessions:
                    return Message.new_error(message, "org.bluez.Error.Failed", "No discovery started")
                self._end_session(client)
            case member:
                return Message.new_error(message, ErrorType.UNKNOWN_METHOD.value, f"no method {member}")
        return Message.new_method_return(message)

    def _end_session(self, client: str) -> None:
        self._filters.pop(client, None)
        self.monitors = [one for one in self.monitors if one.client != client]
        if client in self._sessions:
            self._sessions.remove(client)
            self._change(self.adapter_path, ADAPTER, {"Discovering": Variant("b", self.discovering)})


def _service_data(data: Mapping[str, bytes]) -> Variant:
    return Variant("a{sv}", {uuid: Variant("ay", raw) for uuid, raw in data.items()})


def _company_data(data: Mapping[int, bytes]) -> Variant:
    return Variant("a{qv}", {number: Variant("ay", raw) for number, raw in data.items()})


# ---------------------------------------------------------------------------------------------------- sensors at work


def sensor_address(index: int) -> str:
    return "A4:C1:38:00:{:02X}:{:02X}".format(*divmod(index, 256))


def thermometer(rng: random.Random) -> Callable[[int], bytes]:
    """BTHome service data of a room sensor: packet id, battery, temperature, humidity, and a count of its messages."""
    offset = rng.uniform(0, 100)

    def message(index: int) -> bytes:
        celsius = 21 + 3 * math.sin((index + offset) / 40) + rng.gauss(0, 0.02)
        percent = 45 + 10 * math.sin((index + offset) / 90) + rng.gauss(0, 0.1)
        return struct.pack(
            "<BBBBBBhBHBI",
            *(0x40, 0x00, index & 0xFF, 0x01, 90),
            *(0x02, round(celsius * 100), 0x03, round(percent * 100), 0x3E, index),
        )

    return message


async def _sensor(
    bluez: FakeBlueZ, index: int, period_s: float, rng: random.Random, books: dict[str, int]
) -> None:
    address, message, loop = sensor_address(index), thermometer(rng), asyncio.get_running_loop()
    begin_s = loop.time() + rng.uniform(0, period_s)
    count = 0
    while True:
        await asyncio.sleep(max(0.0, begin_s + count * period_s - loop.time()))
        count += 1
        heard = bluez.advertise(address, rssi=-60 - index % 20, service_data={BTHOME_UUID: message(count)})
        books[address] = books.get(address, 0) + heard


async def _serve(folder: Path, sensors: int, period_s: float, seed: int) -> None:
    import os

    folder.mkdir(parents=True, exist_ok=True)
    bus = PrivateBus(folder)
    bus.start()
    os.environ["DBUS_SYSTEM_BUS_ADDRESS"] = bus.address
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    # Falls silent and closes its books, and stays: who compares them can hear the last advert before the end.
    silent = asyncio.Event()
    loop.add_signal_handler(signal.SIGUSR1, silent.set)
    books: dict[str, int] = {}
    try:
        bluez = await FakeBlueZ().start()
        tasks = [
            asyncio.create_task(_sensor(bluez, index, period_s, random.Random(seed + index), books))
            for index in range(sensors)
        ]
        ready = {"address": bus.address, "sensors": [sensor_address(index) for index in range(sensors)]}
        print(json.dumps(ready), flush=True)
        ends = [asyncio.create_task(event.wait()) for event in (stop, silent)]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await bluez.delivered_all()
        print(
            json.dumps({"offered": bluez.offered, "delivered": bluez.delivered, "by_sensor": books}),
            flush=True,
        )
        await (asyncio.sleep(0) if stop.is_set() else stop.wait())
        bluez.stop()
    finally:
        bus.stop()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where the bus's socket is made")
    parser.add_argument("--sensors", type=int, default=3)
    parser.add_argument("--period-ms", type=float, default=1000)
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    try:
        asyncio.run(_serve(given.folder, given.sensors, given.period_ms / 1000, given.seed))
    except RuntimeError as exc:
        sys.exit(str(exc))


if __name__ == "__main__":
    main()
