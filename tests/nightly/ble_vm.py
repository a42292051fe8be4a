"""`ble`, `ble_gatt` and `ble_gatt_notify` on a real bluetoothd: run by ble_vm.sh, inside its virtual machine.

    our drivers ↔ D-Bus, bleak ↔ bluetoothd ↔ kernel, hci_vhci ↔ bumble's controller ~ air ~ bumble's peripherals

Each step prints a line with its time; the last is "BLE VM OK". What fails is an exception.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import bleak  # noqa: F401 - all is imported before the kernel waits for the controller, for 2 s and no longer
from bumble import hci
from bumble.controller import Controller
from bumble.core import AdvertisingData
from bumble.device import Device, DeviceConfiguration
from bumble.gatt import Characteristic, Service
from bumble.hci import Address
from bumble.link import LocalLink
from bumble.transport import open_transport
from bumble.transport.common import Transport
from dbus_fast import BusType, Message, MessageType, Variant
from dbus_fast.aio import MessageBus

from drivers import ble_radio
from drivers.ble import BleDriver, BleOptions, BlePoint
from drivers.ble_gatt import GattDriver, GattNotifyDriver, GattNotifyOptions, GattOptions, GattPoint
from drivers.ble_survey import survey
from drivers.contract import DeviceUnreachable, Reason, Scan, ValueType

BLUETOOTHD = "/usr/libexec/bluetooth/bluetoothd"
LOG = Path("/tmp/bluetoothd.log")
STEP_S = 90.0  # without KVM all is an order of magnitude slower
RUUVI = bytes.fromhex("0512FC5394C37C0004FFFC040CAC364200CDCBB8334C884F")  # 24.3 °C; docs.ruuvi.com
ENVIRONMENT = "0000181a-0000-1000-8000-00805f9b34fb"
TEMPERATURE = "00002a6e-0000-1000-8000-00805f9b34fb"
FIRMWARE = "00002a26-0000-1000-8000-00805f9b34fb"

_begun = time.monotonic()
_log = LOG.open("ab")


def say(*what: object, sep: str = " ") -> None:
    print(f"[{time.monotonic() - _begun:6.2f}]", *what, sep=sep, flush=True)


class Peripheral:
    """A device in the air, with a controller of its own."""

    def __init__(self, link: LocalLink, name: str, number: int) -> None:
        controller = Controller(name, link=link)
        transport = Transport(controller, controller)
        configuration = DeviceConfiguration(
            name=name,
            address=Address(f"C4:7C:8D:00:00:{number:02X}", Address.RANDOM_DEVICE_ADDRESS),
            advertising_interval_min=200,
            advertising_interval_max=200,
        )
        self.name = name
        self.address = f"C4:7C:8D:00:00:{number:02X}"
        self.device = Device.from_config_with_hci(configuration, transport.source, transport.sink)

    async def advertise(self, kind: int, data: bytes) -> None:
        with contextlib.suppress(Exception):  # the first time there is nothing to stop
            await self.device.stop_advertising()
        told = [(AdvertisingData.FLAGS, b"\x06"), (kind, data)]
        if not data:
            told = [
                (AdvertisingData.FLAGS, b"\x06"),
                (AdvertisingData.COMPLETE_LOCAL_NAME, self.name.encode()),
            ]
        self.device.advertising_data = bytes(AdvertisingData(told))
        await self.device.start_advertising(auto_restart=True)


async def started(*words: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        BLUETOOTHD, "-n", "-d", *words, stdout=asyncio.subprocess.DEVNULL, stderr=_log
    )


async def powered_on() -> None:
    """What `bluetoothctl power on` does."""
    bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
    answer: object = None
    try:
        async with asyncio.timeout(STEP_S):
            while True:
                reply = await bus.call(
                    Message(
                        destination="org.bluez",
                        path="/org/bluez/hci0",
                        interface="org.freedesktop.DBus.Properties",
                        member="Set",
                        signature="ssv",
                        body=["org.bluez.Adapter1", "Powered", Variant("b", True)],
                    )
                )
                if reply.message_type is MessageType.METHOD_RETURN:
                    return
                answer = (reply.error_name, reply.body)
                await asyncio.sleep(0.2)
    except TimeoutError:
        say("the adapter does not go on:", answer)
        raise
    finally:
        bus.disconnect()


@contextlib.asynccontextmanager
async def connected(driver: BleDriver | GattDriver | GattNotifyDriver) -> AsyncIterator[None]:
    async with asyncio.timeout(STEP_S):
        await driver.connect()
    try:
        yield
    finally:
        await driver.close()


async def following(
    driver: BleDriver | GattNotifyDriver, wanted: Callable[[Scan], bool] = lambda scan: True
) -> Scan:
    async with asyncio.timeout(STEP_S):
        async for scan in driver.scans():
            if wanted(scan):
                return scan
    raise AssertionError("scans ended")


def sensor(address: str, *objects: str, **options: str) -> BleDriver:
    given = BleOptions(address=address, stale_after_s=0.0, **options)  # type: ignore[arg-type]  # words of its own
    return BleDriver(address, given, [BlePoint(name=name, object=name) for name in objects])


def must(holds: bool, what: object) -> None:
    if not holds:
        raise AssertionError(what)


# -------------------------------------------------------------------------------------------------------------- steps


async def adverts(bthome: Peripheral, ruuvi: Peripheral) -> None:
    room, tag = (
        sensor(bthome.address, "temperature", "rssi"),
        sensor(ruuvi.address, "temperature", "pressure"),
    )
    async with connected(room), connected(tag):
        must((await following(room)).values[0] == 5012, "25.06 °C")
        must((await following(tag)).values == [4860, 100_044], "24.3 °C, 1000.44 hPa")
        say("active scan: BTHome 25.06 °C, RuuviTag 24.3 °C")
        for celsius in range(20, 25):
            await bthome.advertise(
                AdvertisingData.SERVICE_DATA_16_BIT_UUID, b"\xd2\xfc\x40\x57" + bytes((celsius,))
            )
            await following(room, lambda scan, raw=celsius * 200: scan.values[0] == raw)  # type: ignore[misc]
        say("five changes of a value, each read; adverts:", room.counts.adverts)
        ruuvis = tag.counts
        must(ruuvis.adverts == 1, f"one measurement, heard {ruuvis.adverts} times")
        say("one measurement is one reading; repeats dropped:", ruuvis.repeats)


async def passive(ruuvi: Peripheral) -> None:
    tag = sensor(ruuvi.address, "temperature", "sequence", format="ruuvi")
    async with connected(tag):
        scanner = tag._scanner
        mode = "none" if scanner is None else scanner._need.name
        for sequence in range(300, 303):
            data = RUUVI[:16] + sequence.to_bytes(2, "big") + RUUVI[18:]
            await ruuvi.advertise(AdvertisingData.MANUFACTURER_SPECIFIC_DATA, b"\x99\x04" + data)
            await following(tag, lambda scan, raw=sequence: scan.values[1] == raw)  # type: ignore[misc]
        say("asked for passive, the scan is", mode, "and every new measurement was read")


async def who_is_there(bthome: Peripheral, ruuvi: Peripheral) -> None:
    found = {one.address: one async for one in survey(5.0)}
    must(found[ruuvi.address].options["format"] == "ruuvi", found)
    must("temperature" in found[bthome.address].readings, found)
    say("survey:", {address: one.readings.get("temperature", "") for address, one in found.items()})


async def gatt(box: Peripheral, temperature: Characteristic) -> None:
    points = [
        GattPoint(name="temperature", characteristic="2a6e", scale=0.01),
        GattPoint(name="firmware", characteristic="2a26", type=ValueType.STR),
        GattPoint(name="none", characteristic="2a19"),
    ]
    reader = GattDriver("box", GattOptions(address=box.address, connect_timeout_s=60.0), points)
    async with connected(reader):
        for _ in range(2):
            async with asyncio.timeout(STEP_S):
                scan = await reader.read(reader.points)
            must(scan.values == [2150, "1.2.3", None], (scan.values, scan.reasons))
            must(scan.reasons == {2: Reason.REFUSED}, scan)
    say("ble_gatt: two reads, each with a connection of its own; a missing characteristic is refused alone")

    listener = GattNotifyDriver(
        "box", GattNotifyOptions(address=box.address, connect_timeout_s=60.0, stale_after_s=0.0), points[:1]
    )
    async with connected(listener):
        for n in range(50):
            await box.device.notify_subscribers(temperature, struct.pack("<h", n))
        got = [(await following(listener)).values[0] for _ in range(50)]
        must(got == list(range(50)), got)
        say("ble_gatt_notify: 50 notifications in their order")
        await next(iter(box.device.connections.values())).disconnect()
        try:
            await following(listener)
        except DeviceUnreachable as exc:
            say("the device dropped the link:", exc)
        async with asyncio.timeout(STEP_S):
            await listener.connect()
        await box.device.notify_subscribers(temperature, struct.pack("<h", 77))
        must((await following(listener)).values == [77], "after the new connection")
        say("connected again, and notified")
    must(ble_radio.hub().slots("hci0").holders == (), "places given back")


async def bluetoothd_dies(
    bthome: Peripheral, daemon: asyncio.subprocess.Process
) -> asyncio.subprocess.Process:
    room = sensor(bthome.address, "temperature")
    async with connected(room):
        await following(room)
        daemon.kill()
        await daemon.wait()
        begun_s = time.monotonic()
        try:
            await following(room, lambda scan: False)
        except DeviceUnreachable as exc:
            say(f"bluetoothd killed, told after {time.monotonic() - begun_s:.2f} s:", exc)
        fresh = await started()
        await powered_on()
        async with asyncio.timeout(STEP_S):
            while True:
                with contextlib.suppress(DeviceUnreachable):
                    await room.connect()
                    break
                await asyncio.sleep(0.2)
        await following(room)
        say(f"bluetoothd is back, the sensor is read again after {time.monotonic() - begun_s:.2f} s")
    return fresh


async def switched_off(bthome: Peripheral) -> None:
    room = sensor(bthome.address, "temperature")
    async with connected(room):
        await following(room)
        off = await asyncio.create_subprocess_exec(
            "bluetoothctl", "power", "off", stdout=asyncio.subprocess.DEVNULL
        )
        await off.wait()
        try:
            await following(room, lambda scan: False)
        except DeviceUnreachable as exc:
            say("adapter off:", exc)
        await powered_on()
        async with asyncio.timeout(STEP_S):
            while True:
                with contextlib.suppress(DeviceUnreachable):
                    await room.connect()
                    break
                await asyncio.sleep(0.2)
        await following(room)
        say("adapter on, the sensor is read again")


async def main() -> None:
    async with await open_transport("vhci") as transport:
        link = LocalLink()
        controller = Controller("gateway", host_source=transport.source, host_sink=transport.sink, link=link)
        # bumble's link routes by random address and speaks legacy advertising.
        controller.le_features &= ~(hci.LeFeatureMask.LL_PRIVACY | hci.LeFeatureMask.LE_EXTENDED_ADVERTISING)
        daemon = await started("--experimental")
        await powered_on()
        say("adapter powered; bluetoothd --experimental")
        bthome, ruuvi, box = (
            Peripheral(link, name, n + 1) for n, name in enumerate(("Room", "Ruuvi", "Box"))
        )
        temperature = Characteristic(
            TEMPERATURE,
            Characteristic.Properties.READ | Characteristic.Properties.NOTIFY,
            Characteristic.READABLE,
            struct.pack("<h", 2150),
        )
        firmware = Characteristic(FIRMWARE, Characteristic.Properties.READ, Characteristic.READABLE, b"1.2.3")
        box.device.add_services([Service(ENVIRONMENT, [temperature, firmware])])
        for each in (bthome, ruuvi, box):
            await each.device.power_on()
        await bthome.advertise(AdvertisingData.SERVICE_DATA_16_BIT_UUID, b"\xd2\xfc\x40\x02\xca\x09")
        await ruuvi.advertise(AdvertisingData.MANUFACTURER_SPECIFIC_DATA, b"\x99\x04" + RUUVI)
        await box.advertise(0, b"")
        await adverts(bthome, ruuvi)
        await who_is_there(bthome, ruuvi)
        await gatt(box, temperature)
        await switched_off(bthome)
        await passive(ruuvi)
        daemon = await bluetoothd_dies(bthome, daemon)
        daemon.kill()
        await daemon.wait()
        say("BLE VM OK")


async def told() -> None:
    try:
        await asyncio.wait_for(main(), float(sys.argv[1]) if len(sys.argv) > 1 else 500)
    except BaseException:
        say("bluetoothd's last words:", *LOG.read_text(errors="replace").splitlines()[-40:], sep="\n  ")
        raise


if __name__ == "__main__":
    asyncio.run(told())
