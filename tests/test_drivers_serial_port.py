"""Ports by an identity that lasts: what names what, what is ambiguous, and found again after every replug."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import time
import tty
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from drivers import serial_bus, serial_port
from drivers.contract import ConfigError, DeviceUnreachable
from drivers.instrument import SerialLineOptions, SerialLinePoint
from drivers.modbus import ModbusDriver, ModbusOptions, ModbusPoint
from drivers.modbus_address import SerialPort
from drivers.serial_line import SerialLineDriver
from drivers.serial_port import (
    PortInfo,
    PortsAlike,
    PortSettings,
    UsbName,
    matching,
    present_ports,
    resolve,
    usb_name,
)
from tests.fakes.pty_peer import PtyPeer
from tests.fakes.serial_instrument import SerialInstrument
from tests.fakes.unknown_meter import crc16

REPLUGS = int(os.environ.get("HEADGATE_REPLUGS", "10"))
BACK_WITHIN_S = 5.0

FTDI = PortInfo(
    device="/dev/ttyUSB0", vid=0x0403, pid=0x6001, serial="A10K2X", link="/dev/serial/by-id/usb-FTDI-a"
)
OTHER = PortInfo(device="/dev/ttyUSB1", vid=0x0403, pid=0x6001, serial="B20L3Y")
QUAD = [
    PortInfo(device=f"/dev/ttyUSB{2 + n}", vid=0x0403, pid=0x6011, serial="FT4", interface=n)
    for n in range(4)
]
CHEAP = [PortInfo(device=f"/dev/ttyUSB{6 + n}", vid=0x1A86, pid=0x7523) for n in range(2)]
BUILT_IN = PortInfo(device="/dev/ttyAMA0")
PORTS = [FTDI, OTHER, *QUAD, *CHEAP, BUILT_IN]


# ------------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("usb:0403:6001", UsbName(0x0403, 0x6001, "", None)),
        ("usb:0403:6001:A10K2X", UsbName(0x0403, 0x6001, "A10K2X", None)),
        ("USB:1A86:7523", UsbName(0x1A86, 0x7523, "", None)),
        ("usb:0403:6011:FT4:if02", UsbName(0x0403, 0x6011, "FT4", 2)),
        ("usb:0403:6011:if02", UsbName(0x0403, 0x6011, "", 2)),
        ("usb:0403:6001:a:b-c 1", UsbName(0x0403, 0x6001, "a:b-c 1", None)),
        ("/dev/ttyUSB0", None),
        ("COM3", None),
    ],
)
def test_a_name_says_what_it_asks_for(text: str, name: UsbName | None) -> None:
    assert usb_name(text) == name


@pytest.mark.parametrize(
    "text", ["usb:", "usb:403:6001", "usb:0403", "usb:0403:6001:", "usb:0403:60011", "usb:xyzw:6001"]
)
def test_a_name_of_another_form_is_refused_with_the_right_one(text: str) -> None:
    with pytest.raises(ConfigError, match="four hexadecimal digits"):
        usb_name(text)


@pytest.mark.parametrize(
    ("text", "port"),
    [
        ("usb:0403:6001:A10K2X", FTDI),
        ("usb:0403:6001:B20L3Y", OTHER),
        ("usb:0403:6001:nobody", None),
        ("usb:0403:6011:if03", QUAD[3]),
        ("usb:10c4:ea60", None),
    ],
)
def test_the_one_port_that_answers_is_found_in_any_order(text: str, port: PortInfo | None) -> None:
    name = usb_name(text)
    assert name is not None
    for order in itertools.islice(itertools.permutations(PORTS), 0, None, 20_011):
        assert matching(name, order) == port


def test_two_that_answer_alike_are_refused_with_the_list_and_what_tells_them_apart() -> None:
    with pytest.raises(PortsAlike, match="2 ports answer") as alike:
        matching(UsbName(0x0403, 0x6001, "", None), PORTS)
    for word in (
        "/dev/ttyUSB0",
        "usb:0403:6001:A10K2X",
        "usb:0403:6001:B20L3Y",
        "serial number or interface",
    ):
        assert word in str(alike.value)
    with pytest.raises(PortsAlike, match="4 ports answer"):
        matching(UsbName(0x0403, 0x6011, "FT4", None), PORTS)
    with pytest.raises(PortsAlike, match="by-path"):
        matching(UsbName(0x1A86, 0x7523, "", None), PORTS)


def test_every_port_has_a_name_that_finds_it_or_says_that_none_does() -> None:
    for port in PORTS:
        name = usb_name(port.usb) if port.usb else None
        if name is None:
            assert port.stable == port.device
        elif port in CHEAP:
            with pytest.raises(PortsAlike):
                matching(name, PORTS)
        else:
            assert matching(name, PORTS) == port


def test_an_absent_or_doubtful_port_is_unreachable_and_looked_for_again_soon() -> None:
    with pytest.raises(DeviceUnreachable, match="no such port") as absent:
        resolve("usb:10c4:ea60", lambda: PORTS)
    assert absent.value.retry_within_s is not None
    assert absent.value.retry_within_s < BACK_WITHIN_S
    with pytest.raises(DeviceUnreachable, match="2 ports answer"):
        resolve("usb:0403:6001", lambda: PORTS)
    assert resolve("usb:0403:6001:A10K2X", lambda: PORTS) == "/dev/ttyUSB0"
    assert resolve("/dev/anything", lambda: PORTS) == "/dev/anything"


def test_a_doubtful_name_is_refused_when_the_configuration_is_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serial_port, "present_ports", lambda: PORTS)
    with pytest.raises(ConfigError, match=r"options.port usb:0403:6001: 2 ports answer"):
        driver_on("usb:0403:6001").line()
    assert (
        driver_on("usb:0403:6001:A10K2X").line().key == "/dev/ttyUSB0" == driver_on("/dev/ttyUSB0").line().key
    )
    assert not driver_on("/dev/ttyUSB0").line().shared
    assert driver_on("usb:10C4:EA60").line().key == "usb:10c4:ea60"


# ------------------------------------------------------------------------------------------------------------ sysfs


def plugged(sys: Path, dev: Path, tty: str, at: str, **usb: str) -> None:
    """A port as the kernel shows it: usb-serial has one folder more between tty and interface than cdc-acm."""
    below = sys / "devices" / at
    (below / "tty" / tty).mkdir(parents=True)
    (below / "tty" / tty / "device").symlink_to(below)
    (sys / "class" / "tty").mkdir(parents=True, exist_ok=True)
    (sys / "class" / "tty" / tty).symlink_to(below / "tty" / tty)
    interface = below.parent if usb.pop("driver", "") == "usb-serial" else below
    if usb:
        (interface / "bInterfaceNumber").write_text(usb.pop("interface", "00") + "\n")
        for key, text in usb.items():
            (interface.parent / key).write_text(text + "\n")
    if not (dev / tty).is_symlink():
        (dev / tty).touch()


def test_sysfs_tells_usb_ports_from_others_and_leaves_out_what_is_not_fitted(tmp_path: Path) -> None:
    sys, dev = tmp_path / "sys", tmp_path / "dev"
    by_id = dev / "serial" / "by-id"
    by_id.mkdir(parents=True)
    ftdi = {
        "idVendor": "0403",
        "idProduct": "6001",
        "serial": "A10K2X",
        "product": "FT232R",
        "bNumInterfaces": " 1",
    }
    plugged(sys, dev, "ttyUSB10", "usb1/1-1/1-1:1.0/ttyUSB10", driver="usb-serial", **ftdi)
    quad = {"idVendor": "0403", "idProduct": "6011", "serial": "FT4", "bNumInterfaces": " 4"}
    plugged(sys, dev, "ttyUSB9", "usb1/1-2/1-2:1.3/ttyUSB9", driver="usb-serial", interface="03", **quad)
    acm = {"idVendor": "2341", "idProduct": "0043", "bNumInterfaces": " 2"}
    plugged(sys, dev, "ttyACM0", "usb1/1-3/1-3:1.0", interface="00", **acm)
    plugged(sys, dev, "ttyS0", "pnp0/00:01")
    plugged(sys, dev, "ttyS1", "platform/serial8250")
    (sys / "class" / "tty" / "ttyS1" / "type").write_text("0\n")
    (sys / "devices" / "virtual" / "tty0").mkdir(parents=True)
    (sys / "class" / "tty" / "tty0").symlink_to(sys / "devices" / "virtual" / "tty0")
    (by_id / "usb-FTDI_FT232R_A10K2X-if00-port0").symlink_to("../../ttyUSB10")
    found = present_ports(sys, dev)
    assert [port.device.rpartition("/")[2] for port in found] == ["ttyACM0", "ttyS0", "ttyUSB9", "ttyUSB10"]
    assert [port.usb for port in found] == [
        "usb:2341:0043:if00",
        "",
        "usb:0403:6011:FT4:if03",
        "usb:0403:6001:A10K2X",
    ]
    assert found[3].link.endswith("usb-FTDI_FT232R_A10K2X-if00-port0")
    assert found[3].description == "FT232R"


def test_this_machines_own_ports_are_listed_without_an_error() -> None:
    assert all(port.device.startswith("/dev/") for port in present_ports())


def test_settings_say_themselves_in_words() -> None:
    settings = PortSettings(baud=300, data_bits=7, parity="even")
    assert str(settings) == "300 baud, 7E1"
    assert settings.character_s == 10 / 300


# ----------------------------------------------------------------------------------------------------------- replug


def driver_on(port: str) -> SerialLineDriver:
    options = SerialLineOptions(port=port, pattern=r"W=\s*(?P<weight>\S+) kg", stale_after_s=0)
    return SerialLineDriver("scale", options, [SerialLinePoint(name="weight")])


@asynccontextmanager
async def sending(instrument: SerialInstrument) -> AsyncIterator[None]:
    task = asyncio.create_task(instrument.run(0.02, lambda index: b"W=%d kg\r\n" % index))
    try:
        yield
    finally:
        task.cancel()


async def good_reading(driver: SerialLineDriver, rng: random.Random) -> None:
    """Connect and read as the poller does, with its backoff, until a good reading comes."""
    attempt = 0
    while True:
        try:
            await driver.connect()
            async for scan in driver.scans():
                if not scan.reasons:
                    return
        except DeviceUnreachable as err:
            # agent/poller.py: full jitter, up to what the error allows
            cap_s = min(8.0, 2.0**attempt, err.retry_within_s or 8.0)
            attempt += 1
            await asyncio.sleep(rng.uniform(0, cap_s))


@pytest.mark.timeout(0)
@pytest.mark.parametrize("by", ["link", "usb"])
async def test_unplugged_and_replugged_it_is_back_within_five_seconds_under_any_name(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HEADGATE_REPLUGS says how often. Every time the port has another device behind it."""
    rng = random.Random(11)
    instrument = SerialInstrument(tmp_path / "instrument")

    def ports() -> list[PortInfo]:
        if not instrument.link.is_symlink():
            return [OTHER]
        device = os.path.realpath(instrument.link)
        return [OTHER, PortInfo(device=device, vid=0x0403, pid=0x6001, serial="A10K2X")]

    monkeypatch.setattr(serial_port, "present_ports", ports)
    driver = driver_on("usb:0403:6001:A10K2X" if by == "usb" else instrument.port)
    names: set[str] = set()
    held: list[int] = []
    back_s: list[float] = []
    async with sending(instrument):
        await good_reading(driver, rng)
        for _ in range(REPLUGS):
            names.add(os.path.realpath(instrument.link))
            instrument.unplug()
            with pytest.raises(DeviceUnreachable):
                async for _scan in driver.scans():
                    pass
            reader = asyncio.create_task(good_reading(driver, rng))
            # The old number is taken by another device in the meantime, so that the new one is another.
            held += os.openpty()
            await asyncio.sleep(rng.choice([0, 0.05, 0.5, 1.5]))  # how long the plug is out
            instrument.plug()
            back = time.monotonic()
            async with asyncio.timeout(BACK_WITHIN_S):
                await reader
            back_s.append(time.monotonic() - back)
    await driver.close()
    instrument.unplug()
    for fd in held:
        os.close(fd)
    assert len(names) > REPLUGS / 2
    mean_s = sum(back_s) / len(back_s)
    print(f"{REPLUGS} replugs by {by}: back after {max(back_s):.2f} s at most, {mean_s:.2f} s on average")


# ------------------------------------------------------------------------------------------------------------- Modbus


class UsbMeter:
    """A Modbus meter behind an adapter, in a sysfs of the test's own: at every plugging in, the kernel calls the port
    by another name."""

    def __init__(self, folder: Path) -> None:
        self.sys, self.dev = folder / "sys", folder / "dev"
        (self.sys / "class" / "tty").mkdir(parents=True)
        self.dev.mkdir()
        self.value = 0
        self.tty = ""
        self._count = 0
        self._peer: PtyPeer | None = None

    def plug(self) -> None:
        self.tty = f"ttyUSB{self._count % 7}"
        at = f"usb1/1-1.{self._count}/1-1.{self._count}:1.0/{self.tty}"
        self._count += 1
        self._peer = PtyPeer(self.dev / self.tty, self._react)
        plugged(
            self.sys, self.dev, self.tty, at, driver="usb-serial", idVendor="0403", idProduct="6001", serial="A10K2X",
            bNumInterfaces=" 1",
        )  # fmt: skip

    def unplug(self) -> None:
        if self._peer is not None:
            (self.sys / "class" / "tty" / self.tty).unlink()
            self._peer.unplug()
            self._peer = None

    def ports(self) -> list[PortInfo]:
        return present_ports(self.sys, self.dev)

    def _react(self, heard: bytes) -> bytes:
        while len(heard) >= 8:
            assert heard[:2] == b"\x01\x03"
            assert self._peer is not None
            heard = heard[8:]
            body = b"\x01\x03\x02" + self.value.to_bytes(2, "big")
            self._peer.say(body + crc16(body))
        return heard


def modbus_on(port: str) -> ModbusDriver:
    options = ModbusOptions(serial=port, baud=9600, parity="none")
    return ModbusDriver("meter", options, [ModbusPoint(name="value", register=0)])


@pytest.mark.timeout(0)
async def test_a_modbus_adapter_replugged_under_another_name_is_read_again_within_five_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HEADGATE_REPLUGS says how often."""
    rng = random.Random(12)
    meter = UsbMeter(tmp_path)
    monkeypatch.setattr(serial_port, "present_ports", meter.ports)
    driver = modbus_on("usb:0403:6001:A10K2X")
    meter.plug()
    await driver.connect()
    names: list[str] = []
    back_s: list[float] = []

    async def again() -> None:
        attempt = 0
        while True:
            try:
                await driver.connect()
                scan = await driver.read(driver.points)
                if not scan.reasons:
                    assert [*scan.values] == [meter.value]
                    return
                wait_s = 1.0
            except DeviceUnreachable as err:
                wait_s = rng.uniform(0, min(8.0, 2.0**attempt, err.retry_within_s or 8.0))
                attempt += 1
            await asyncio.sleep(wait_s)

    for meter.value in range(1, REPLUGS + 1):
        assert [*(await driver.read(driver.points)).values] == [meter.value]
        names.append(meter.tty)
        assert driver.line() == modbus_on(str(meter.dev / meter.tty)).line()
        meter.unplug()
        with pytest.raises(DeviceUnreachable):
            await driver.read(driver.points)
        assert driver.line().key == "usb:0403:6001:a10k2x"
        reader = asyncio.create_task(again())
        await asyncio.sleep(rng.choice([0, 0.05, 0.5, 1.5]))
        meter.plug()
        back = time.monotonic()
        async with asyncio.timeout(BACK_WITHIN_S):
            await reader
        back_s.append(time.monotonic() - back)
    await driver.close()
    meter.unplug()
    assert all(one != other for one, other in itertools.pairwise(names))
    print(f"{REPLUGS} replugs: back after {max(back_s):.2f} s at most")


async def test_a_modbus_device_names_its_port_in_any_way_and_two_names_of_it_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = UsbMeter(tmp_path)
    monkeypatch.setattr(serial_port, "present_ports", meter.ports)
    meter.plug()
    meter.value = 7
    by_usb, by_path = modbus_on("usb:0403:6001:A10K2X"), modbus_on(str(meter.dev / meter.tty))
    try:
        await by_usb.connect()
        await by_path.connect()
        for driver in (by_usb, by_path):
            assert [*(await driver.read(driver.points)).values] == [7]
    finally:
        await by_usb.close()
        await by_path.close()
        meter.unplug()


def test_a_modbus_port_of_a_bad_or_doubtful_name_is_refused_when_the_configuration_is_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match=r"options.serial .*four hexadecimal digits"):
        modbus_on("usb:0403")
    with pytest.raises(ConfigError, match=r"options.serial is empty"):
        modbus_on("")
    monkeypatch.setattr(serial_port, "present_ports", lambda: PORTS)
    with pytest.raises(ConfigError, match=r"options.serial usb:0403:6001: 2 ports answer"):
        modbus_on("usb:0403:6001").line()
    # Asked for its key alone (a technician's `--port`), it is nobody's line; opening it tells why.
    assert SerialPort("usb:0403:6001", 9600, "N", 1).key == "usb:0403:6001"


async def test_modbus_adapters_that_swapped_their_kernel_names_keep_their_meters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are pulled out and put back the other way round, and one device notices before the other."""
    names: dict[str, str] = {}
    peers: list[PtyPeer] = []

    def present() -> list[PortInfo]:
        return [
            PortInfo(device=str(tmp_path / node), vid=1, pid=1, serial=serial)
            for serial, node in names.items()
        ]

    def plugged_in(value: int, node: str) -> None:
        body = b"\x01\x03\x02" + value.to_bytes(2, "big")

        def react(heard: bytes) -> bytes:
            if len(heard) < 8:
                return heard
            peer.say(body + crc16(body))
            return heard[8:]

        peer = PtyPeer(tmp_path / node, react)
        peers.append(peer)

    monkeypatch.setattr(serial_port, "present_ports", present)
    monkeypatch.setattr(serial_port, "port_key", lambda device: device)  # a pty's own name does not come back
    names.update(A="ttyUSB0", B="ttyUSB1")
    plugged_in(1111, "ttyUSB0")
    plugged_in(2222, "ttyUSB1")
    a, b = (modbus_on(f"usb:0001:0001:{adapter}") for adapter in "AB")
    for driver, value in ((a, 1111), (b, 2222)):
        await driver.connect()
        assert [*(await driver.read(driver.points)).values] == [value]
    for peer in peers:
        peer.unplug()
    names.update(A="ttyUSB1", B="ttyUSB0")
    plugged_in(1111, "ttyUSB1")
    plugged_in(2222, "ttyUSB0")
    for driver, value in ((a, 1111), (b, 2222)):
        async with asyncio.timeout(20):
            while True:
                try:
                    await driver.connect()
                    scan = await driver.read(driver.points)
                except DeviceUnreachable:
                    await asyncio.sleep(0.05)
                    continue
                assert [*scan.values] in ([value], [None])
                if not scan.reasons:
                    break
    for driver in (a, b):
        await driver.close()
    for peer in peers[2:]:
        peer.unplug()


async def test_two_adapters_that_swapped_their_kernel_names_keep_their_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are pulled out and put back the other way round, and one device notices before the other."""
    names: dict[str, str] = {}

    def present() -> list[PortInfo]:
        return [
            PortInfo(device=str(tmp_path / node), vid=1, pid=1, serial=serial)
            for serial, node in names.items()
        ]

    monkeypatch.setattr(serial_port, "present_ports", present)
    monkeypatch.setattr(serial_bus, "port_key", lambda device: device)  # a pty's own name does not come back

    def plugged(node: str) -> int:
        master, slave = os.openpty()
        tty.setraw(slave)
        os.set_blocking(master, False)
        (tmp_path / node).unlink(missing_ok=True)
        (tmp_path / node).symlink_to(os.ttyname(slave))
        os.close(slave)
        return master

    async def heard_by(bus: serial_bus.Bus[serial_bus.Wire], masters: dict[str, int]) -> str:
        async with bus.turn(silence_s=0.01, at_most_s=0.1) as wire:
            await wire.write(b"?")
            for adapter, master in masters.items():
                with contextlib.suppress(OSError):  # EIO: nobody has the other end open
                    if os.read(master, 10):
                        return adapter
        return "nobody"

    settings = PortSettings()
    masters = {"A": plugged("ttyUSB0"), "B": plugged("ttyUSB1")}
    names.update(A="ttyUSB0", B="ttyUSB1")
    a, b = (serial_bus.join(f"usb:0001:0001:{adapter}", settings) for adapter in "AB")
    assert [await heard_by(bus, masters) for bus in (a, b)] == ["A", "B"]
    for master in masters.values():
        os.close(master)
    masters = {"B": plugged("ttyUSB0"), "A": plugged("ttyUSB1")}
    names.update(A="ttyUSB1", B="ttyUSB0")
    a.leave()
    a = serial_bus.join("usb:0001:0001:A", settings)
    assert await heard_by(a, masters) == "A"
    b.leave()
    b = serial_bus.join("usb:0001:0001:B", settings)
    assert await heard_by(b, masters) == "B"
    a.leave()
    b.leave()
    assert not serial_bus._buses
    for master in masters.values():
        os.close(master)


def test_what_is_thrown_away_is_bounded_though_more_comes_all_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "read", lambda fd, size: bytes(size))  # no real line is as fast
    assert serial_port.read_away(0) <= 2 << 20
