"""A simulated BlueZ on a private D-Bus: what runs against it is the real, unmodified `bleak`.

It keeps BlueZ's habits that matter to a scanner: nothing is heard while nobody scans; a client that scans twice gets
`InProgress`; without `DuplicateData` an unchanged advert is not signalled again; a change of signal strength alone is
signalled without the data; devices stay in the object tree after they were heard. And its failures: adapter pulled or
powered off, bluetoothd restarted, D-Bus gone, calls that are refused or never answered.

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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from dbus_fast import BusType, DBusFastError, ErrorType, Message, MessageType, Variant
from dbus_fast.aio import MessageBus

ADAPTER: Final = "org.bluez.Adapter1"
DEVICE: Final = "org.bluez.Device1"
OBJECT_MANAGER: Final = "org.freedesktop.DBus.ObjectManager"
PROPERTIES: Final = "org.freedesktop.DBus.Properties"
BTHOME_UUID: Final = "0000fcd2-0000-1000-8000-00805f9b34fb"

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
        self._process = subprocess.Popen(
            [*bound, program, f"--config-file={self._config}", "--nofork", "--nopidfile", "--print-address"],
            stdout=subprocess.PIPE,
            stderr=self._log.open("w"),
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
    name: str


class FakeBlueZ:
    """`org.bluez` with one adapter. `offered` and `delivered` are its own books, whoever listens."""

    def __init__(self, adapter: str = "hci0", *, powered: bool = True) -> None:
        self.adapter_path = f"/org/bluez/{adapter}"
        self.offered = 0  #: adverts that sensors sent
        self.delivered = 0  #: of those, signalled to somebody who scans, data and all
        self.calls: list[tuple[str, str]] = []  #: (path, member) of every call
        self.refusals: dict[str, list[tuple[str, str]]] = {}  #: member -> errors still to give, (name, text)
        self.hangs: set[str] = set()  #: members that are never answered
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

    def unplug(self) -> None:
        """The adapter is pulled out, and its devices with it."""
        self._sessions.clear()
        for path in [path for path in self._tree if path.startswith(self.adapter_path + "/")]:
            self.forget(path)
        self._remove(self.adapter_path)

    def power(self, on: bool) -> None:
        self._powered = on
        if not on:
            self._sessions.clear()
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
        name: str = "",
    ) -> bool:
        """One advertisement. True if it was signalled, with its data, to a client that scans."""
        self.offered += 1
        if not self.discovering or self._bus is None or self.adapter_path not in self._tree:
            return False
        path = self.path_of(address)
        data = dict(service_data or {})
        before = self._sent.get(path)
        self._sent[path] = _Sent(
            rssi, data or (before.data if before else {}), name or (before.name if before else "")
        )
        changes: Properties = {}
        duplicates = any(
            (wish := wishes.get("DuplicateData")) is None or wish.value for wishes in self._filters.values()
        )
        if before is None or duplicates or abs(before.rssi - rssi) >= RSSI_THRESHOLD_DB:
            changes["RSSI"] = Variant("n", rssi)
        if data and (before is None or duplicates or before.data != data):
            changes["ServiceData"] = Variant(
                "a{sv}", {uuid: Variant("ay", raw) for uuid, raw in data.items()}
            )
        if before is None:
            self._add(path, DEVICE, self._device(address, name) | changes)
        elif changes:
            self._change(path, DEVICE, changes)
        heard = "ServiceData" in changes
        self.delivered += heard
        return heard

    def know(self, address: str, service_data: Mapping[str, bytes], name: str = "") -> None:
        """A device heard in some earlier scan, still in BlueZ's memory."""
        path = self.path_of(address)
        data = Variant("a{sv}", {uuid: Variant("ay", raw) for uuid, raw in service_data.items()})
        self._sent[path] = _Sent(-60, dict(service_data), name)
        self._add(path, DEVICE, self._device(address, name) | {"ServiceData": data})

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
        return self._answer(message)

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
        if message.interface == ADAPTER:
            return self._answer_adapter(message)
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
                self._change(self.adapter_path, ADAPTER, {"Discovering": Variant("b", True)})
            case "StopDiscovery":
                if client not in self._sessions:
                    return Message.new_error(message, "org.bluez.Error.Failed", "No discovery started")
                self._end_session(client)
            case member:
                return Message.new_error(message, ErrorType.UNKNOWN_METHOD.value, f"no method {member}")
        return Message.new_method_return(message)

    def _end_session(self, client: str) -> None:
        self._filters.pop(client, None)
        if client in self._sessions:
            self._sessions.remove(client)
            self._change(self.adapter_path, ADAPTER, {"Discovering": Variant("b", self.discovering)})


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
    books: dict[str, int] = {}
    try:
        bluez = await FakeBlueZ().start()
        tasks = [
            asyncio.create_task(_sensor(bluez, index, period_s, random.Random(seed + index), books))
            for index in range(sensors)
        ]
        ready = {"address": bus.address, "sensors": [sensor_address(index) for index in range(sensors)]}
        print(json.dumps(ready), flush=True)
        await stop.wait()
        for task in tasks:
            task.cancel()
        bluez.stop()
        print(
            json.dumps({"offered": bluez.offered, "delivered": bluez.delivered, "by_sensor": books}),
            flush=True,
        )
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
