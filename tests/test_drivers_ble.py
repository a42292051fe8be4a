"""`ble` through the real `bleak`, against a simulated BlueZ on a private D-Bus."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import stat
import sys
import tempfile
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from drivers import ble, ble_radio, conformance
from drivers.advert_formats import PROPERTIES
from drivers.ble import BleDriver, BleOptions, BlePoint
from drivers.contract import (
    ConfigError,
    DeviceUnreachable,
    Found,
    Reason,
    Scan,
    ValueType,
    boot_ns,
    engineering,
)
from drivers.registry import TableError, build
from drivers.scan_queue import ScanQueue
from tests.fakes.bluez import BTHOME_UUID, FakeBlueZ, PrivateBus, private_bus

WAIT_S = 10  # a deadline, never a pause: the machine may be busy
A = "A4:C1:38:00:00:01"
B = "A4:C1:38:00:00:02"


@pytest.fixture(scope="module")
def bus() -> Iterator[PrivateBus]:
    with private_bus() as bus:
        yield bus


@pytest.fixture
async def bluez(bus: PrivateBus, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeBlueZ]:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.address)
    bluez = await FakeBlueZ().start()
    yield bluez
    bluez.stop()
    await asyncio.sleep(0)


def sensor(
    *objects: str, address: str = A, adapter: str = "", stale_after_s: float = 0.0, key_file: str = ""
) -> BleDriver:
    return BleDriver(
        "room",
        BleOptions(address=address, adapter=adapter, stale_after_s=stale_after_s, key_file=key_file),
        [BlePoint(name=name.replace(" ", "_"), object=name) for name in objects],
    )


@asynccontextmanager
async def listening(*drivers: BleDriver) -> AsyncIterator[AsyncIterator[Scan]]:
    """All connected; the scans are the first one's."""
    await asyncio.gather(*(driver.connect() for driver in drivers))
    try:
        yield drivers[0].scans()
    finally:
        await asyncio.gather(*(driver.close() for driver in drivers))


async def following(scans: AsyncIterator[Scan]) -> Scan:
    async with asyncio.timeout(WAIT_S):
        return await anext(scans)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not true():  # noqa: ASYNC110 - what is awaited is on the other side of a bus
            await asyncio.sleep(0.002)


def send(bluez: FakeBlueZ, data: str, *, address: str = A, rssi: int = -60) -> None:
    bluez.advertise(address, rssi=rssi, service_data={BTHOME_UUID: bytes.fromhex(data)})


# ----------------------------------------------------------------------------------------------------------- reading


async def test_an_advert_becomes_one_scan_of_the_points_it_carried(bluez: FakeBlueZ) -> None:
    driver = sensor("temperature", "humidity", "battery", "rssi")
    async with listening(driver) as scans:
        before = boot_ns()
        send(bluez, "40 02CA09 03BF13", rssi=-71)
        both = await following(scans)
        send(bluez, "40 0161 02CA09")
        other = await following(scans)
    assert [point.name for point in both.points] == ["temperature", "humidity", "rssi"]
    assert both.values == [5012, 20220, -71]
    assert [engineering(5012, p.scale, p.offset) for p in both.points[:1]] == [25.06]
    assert [(point.type, point.unit) for point in driver.points] == [
        (ValueType.I32, "Cel"),
        (ValueType.U32, "%"),
        (ValueType.U8, "%"),
        (ValueType.I16, "dBm"),
    ]
    assert [point.name for point in other.points] == ["temperature", "battery", "rssi"]
    assert other.values == [5012, 97, -60]
    assert not both.reasons
    assert not other.reasons
    assert before < both.taken_at_ns < other.taken_at_ns < boot_ns()
    assert set(driver.points) >= set(both.points)


async def test_a_value_that_stands_still_is_read_again_at_every_advert(bluez: FakeBlueZ) -> None:
    async with listening(sensor("temperature")) as scans:
        for _ in range(5):
            send(bluez, "40 02CA09")
        got = [await following(scans) for _ in range(5)]
    assert [scan.values for scan in got] == [[5012]] * 5
    assert len({scan.taken_at_ns for scan in got}) == 5


async def test_a_change_of_signal_strength_alone_is_no_reading(bluez: FakeBlueZ) -> None:
    driver = sensor("temperature", "rssi")
    async with listening(driver) as scans:
        send(bluez, "40 02CA09")
        assert (await following(scans)).values == [5012, -60]
        bluez.advertise(A, rssi=-90)  # without data: BlueZ still shows the last
        bluez.advertise(A, rssi=-40)
        send(bluez, "40 02CB09", rssi=-50)
        assert (await following(scans)).values == [5014, -50]
    assert driver.counts.adverts == 2


async def test_what_bluez_kept_of_an_earlier_scan_is_no_reading(bluez: FakeBlueZ) -> None:
    bluez.know(A, {BTHOME_UUID: bytes.fromhex("40 02CA09")})
    driver = sensor("temperature", "rssi")
    async with listening(driver) as scans:
        bluez.advertise(A, rssi=-90)
        send(bluez, "40 02CA09")
        assert (await following(scans)).values == [5012, -60]
    assert driver.counts.adverts == 1


async def test_repeats_of_a_packet_are_one_reading_and_are_counted(bluez: FakeBlueZ) -> None:
    driver = sensor("temperature")
    async with listening(driver) as scans:
        for packet, celsius in ((255, 1), (255, 1), (255, 1), (0, 2), (255, 1), (1, 3)):
            send(bluez, f"40 00{packet:02X} 57{celsius:02X}")
        got = [await following(scans) for _ in range(3)]
    assert [scan.values for scan in got] == [[200], [400], [600]]
    assert driver.counts.repeats == 3


async def test_values_that_cannot_be_read_are_reasons_on_their_points(bluez: FakeBlueZ) -> None:
    driver = sensor("temperature", "door", "text")
    async with listening(driver) as scans:
        send(bluez, "40 02CA09 1A07 5302FFFE")
        send(bluez, "40 02CA")
        send(bluez, "20 02CA09")
        send(bluez, "41 02CA09 0011223344556677")
        got = [await following(scans) for _ in range(4)]
    assert got[0].values == [5012, None, None]
    assert got[0].reasons == {1: Reason.DECODE, 2: Reason.DECODE}
    assert [set(scan.reasons.values()) for scan in got[1:]] == [
        {Reason.FRAMING},
        {Reason.FRAMING},
        {Reason.DECRYPT},
    ]
    assert all(scan.values == [None, None, None] for scan in got[1:])
    assert driver.counts.undecodable == 3


async def test_an_advert_without_any_configured_point_is_counted(bluez: FakeBlueZ) -> None:
    driver = sensor("co2", "rssi")
    async with listening(driver):
        send(bluez, "40 02CA09")
        await until(lambda: driver.counts.pointless == 1)
    assert driver.counts.adverts == 0


async def test_adverts_are_for_their_own_device_and_for_every_device_of_their_address(
    bluez: FakeBlueZ,
) -> None:
    first, twin, other = sensor("temperature"), sensor("humidity"), sensor("temperature", address=B.lower())
    async with listening(first, twin, other):
        send(bluez, "40 02CA09 03BF13", address=A)
        send(bluez, "40 02CB09", address=B)
        send(bluez, "40 02CC09", address="A4:C1:38:00:00:03")
        assert (await following(first.scans())).values == [5012]
        assert (await following(twin.scans())).values == [20220]
        assert (await following(other.scans())).values == [5014]
    assert len(first._queue) == len(twin._queue) == len(other._queue) == 0


async def test_all_devices_share_one_scan_which_ends_with_the_last(bluez: FakeBlueZ) -> None:
    drivers = [
        sensor("temperature", address=f"A4:C1:38:00:01:{n:02X}", adapter=("", "hci0")[n % 2])
        for n in range(20)
    ]
    async with listening(*drivers):
        assert [member for _, member in bluez.calls].count("StartDiscovery") == 1
        for driver in drivers[1:]:
            await driver.close()
        assert bluez.discovering
    await until(lambda: not bluez.discovering)
    async with listening(drivers[0]) as scans:
        send(bluez, "40 02CA09", address="A4:C1:38:00:01:00")
        assert (await following(scans)).values == [5012]


async def test_a_late_consumer_loses_the_oldest_and_it_is_counted(bluez: FakeBlueZ) -> None:
    driver = sensor("count")
    driver._queue = ScanQueue(10)
    async with listening(driver) as scans:
        for index in range(25):
            send(bluez, f"40 09{index:02X}")
        await until(lambda: driver.counts.adverts == 25)
        got = [await following(scans) for _ in range(10)]
    assert [scan.values[0] for scan in got] == list(range(15, 25))
    assert driver.overruns == 15


# ----------------------------------------------------------------------------------------------------------- silence


async def test_silence_says_so_once_and_then_nothing_until_it_speaks(bluez: FakeBlueZ) -> None:
    driver = sensor("temperature", "rssi", stale_after_s=0.2)
    async with listening(driver) as scans:
        assert (await following(scans)).reasons == {0: Reason.STALE, 1: Reason.STALE}
        await asyncio.sleep(0.8)  # four times as long as it takes to be stale
        assert len(driver._queue) == 0
        send(bluez, "40 02CA09")
        assert (await following(scans)).values == [5012, -60]
        assert (await following(scans)).values == [None, None]


async def test_a_sensor_that_sends_only_when_something_happens_is_not_stale(bluez: FakeBlueZ) -> None:
    driver = sensor("button", stale_after_s=0.1)
    async with listening(driver) as scans:
        send(bluez, "44 3A01")
        assert (await following(scans)).values == [1]
        await asyncio.sleep(0.5)  # five times as long as it would take
        assert len(driver._queue) == 0


async def test_a_point_that_its_sensor_never_sends_is_missing_once(bluez: FakeBlueZ) -> None:
    driver = sensor("temperature", "co2", stale_after_s=0.3)
    got: list[Scan] = []
    async with listening(driver) as scans:
        async with asyncio.timeout(WAIT_S):
            while not any(scan.reasons for scan in got):
                send(bluez, "40 02CA09")
                got.append(await anext(scans))
                await asyncio.sleep(0.02)
        for _ in range(30):
            send(bluez, "40 02CA09")
            assert not (await following(scans)).reasons
            await asyncio.sleep(0.02)
    bad = next(scan for scan in got if scan.reasons)
    assert ([point.name for point in bad.points], bad.values, bad.reasons) == (
        ["co2"],
        [None],
        {0: Reason.MISSING},
    )


# ---------------------------------------------------------------------------------------------------------- failures


async def test_an_adapter_that_is_pulled_ends_all_scans_and_connect_goes_on_when_it_is_back(
    bluez: FakeBlueZ,
) -> None:
    one, two = sensor("temperature"), sensor("temperature", address=B)
    async with listening(one, two) as scans:
        send(bluez, "40 02CA09")
        await following(scans)
        bluez.unplug()
        for driver in (one, two):
            with pytest.raises(DeviceUnreachable, match="adapter hci0 is gone") as gone:
                await following(driver.scans())
            assert gone.value.reason is Reason.DISCONNECTED
        with pytest.raises(DeviceUnreachable, match="no Bluetooth adapter"):
            await one.connect()
        bluez.plug()
        await asyncio.gather(one.connect(), two.connect())
        send(bluez, "40 02CB09")
        send(bluez, "40 02CC09", address=B)
        assert (await following(one.scans())).values == [5014]
        assert (await following(two.scans())).values == [5016]
    assert bluez.delivered == 3


async def test_an_adapter_that_is_powered_off_is_told_with_the_remedy(bluez: FakeBlueZ) -> None:
    driver = sensor("temperature")
    async with listening(driver) as scans:
        bluez.power(on=False)
        with pytest.raises(DeviceUnreachable, match="bluetoothctl power on"):
            await following(scans)
        with pytest.raises(DeviceUnreachable, match="bluetoothctl power on"):
            await driver.connect()
        bluez.power(on=True)
        await driver.connect()
        send(bluez, "40 02CA09")
        assert (await following(driver.scans())).values == [5012]


async def test_bluetoothd_restarted(bluez: FakeBlueZ) -> None:
    driver = sensor("temperature")
    async with listening(driver) as scans:
        send(bluez, "40 02CA09")
        await following(scans)
        bluez.stop()
        with pytest.raises(DeviceUnreachable, match="bluetoothd has ended"):
            await following(scans)
        with pytest.raises(DeviceUnreachable, match="is bluetoothd running"):
            await driver.connect()
        await bluez.start()
        await driver.connect()
        send(bluez, "40 02CB09")
        assert (await following(driver.scans())).values == [5014]


async def test_dbus_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    with private_bus() as bus:
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.address)
        bluez = await FakeBlueZ().start()
        driver = sensor("temperature")
        async with listening(driver) as scans:
            send(bluez, "40 02CA09")
            await following(scans)
            bus.stop()
            with pytest.raises(DeviceUnreachable, match="D-Bus is gone"):
                await following(scans)
            with pytest.raises(DeviceUnreachable, match="D-Bus"):
                await driver.connect()
            bluez.stop()
            bus.start()
            await bluez.start()
            await driver.connect()
            send(bluez, "40 02CB09")
            assert (await following(driver.scans())).values == [5014]
        bluez.stop()


async def test_without_dbus_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/nothing")
    with pytest.raises(DeviceUnreachable, match="systemctl status dbus"):
        await sensor("temperature").connect()


async def test_a_wrong_adapter_is_told_with_those_that_are_there(bluez: FakeBlueZ) -> None:
    with pytest.raises(DeviceUnreachable, match="no adapter hci7; there is hci0"):
        await sensor("temperature", adapter="hci7").connect()


async def test_a_refused_scan_is_unreachable_and_the_next_try_works(bluez: FakeBlueZ) -> None:
    bluez.refusals["StartDiscovery"] = [("org.bluez.Error.Failed", "Not permitted")]
    driver = sensor("temperature")
    with pytest.raises(DeviceUnreachable, match=r"scanning on hci0.*Failed: Not permitted"):
        await driver.connect()
    async with listening(driver) as scans:
        send(bluez, "40 02CA09")
        assert (await following(scans)).values == [5012]


async def test_a_call_that_is_never_answered_ends_in_time(
    bluez: FakeBlueZ, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ble_radio, "CALL_S", 0.2)
    bluez.hangs.add("StartDiscovery")
    driver = sensor("temperature")
    with pytest.raises(DeviceUnreachable) as late:
        await driver.connect()
    assert late.value.reason is Reason.TIMEOUT
    bluez.hangs.clear()
    async with listening(driver) as scans:
        send(bluez, "40 02CA09")
        assert (await following(scans)).values == [5012]


async def test_a_cancelled_connect_leaves_no_scan_behind(bluez: FakeBlueZ) -> None:
    bluez.hangs.add("StartDiscovery")
    driver = sensor("temperature")
    task = asyncio.create_task(driver.connect())
    await until(lambda: any(member == "StartDiscovery" for _, member in bluez.calls))
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    bluez.hangs.clear()
    async with listening(driver) as scans:
        send(bluez, "40 02CA09")
        assert (await following(scans)).values == [5012]
    await until(lambda: not bluez.discovering)


async def test_a_scan_gone_deaf_is_started_afresh(bluez: FakeBlueZ, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ble_radio, "RESTART_AFTER_S", 0.2)
    driver = sensor("temperature")
    async with listening(driver) as scans:
        await until(lambda: [member for _, member in bluez.calls].count("StartDiscovery") >= 2)
        monkeypatch.setattr(ble_radio, "RESTART_AFTER_S", 60.0)
        async with asyncio.timeout(WAIT_S):
            while not bluez.discovering or not len(driver._queue):
                send(bluez, "40 02CA09")
                await asyncio.sleep(0.01)
        assert (await following(scans)).values == [5012]


async def test_close_is_safe_without_connect_and_twice_and_after_the_bus_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = sensor("temperature")
    await driver.close()
    with pytest.raises(DeviceUnreachable, match="not connected"):
        await following(driver.scans())
    with private_bus() as bus:
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.address)
        bluez = await FakeBlueZ().start()
        await driver.connect()
        bus.stop()
        await driver.close()
        await driver.close()
        bluez.stop()


# ------------------------------------------------------------------------------------------------------- conformance


@pytest.mark.parametrize("check", conformance.PUSH, ids=conformance.title)
async def test_the_driver_conforms(check: conformance.Check, bluez: FakeBlueZ) -> None:
    async def provoke() -> None:
        send(bluez, "40 02CA09 03BF13")

    await check(
        conformance.Subject(
            build=lambda: sensor("temperature", "battery", "rssi"),
            absent=lambda: sensor("temperature", adapter="hci9"),
            provoke=provoke,
        )
    )


# -------------------------------------------------------------------------------------------------------- encryption

# https://bthome.io/encryption/: 25.06 °C and 50.55 % under this key, from this address
KEY = "231d39c1d7cc1ab1aee224cd096db932"
SENDER = "54:48:E6:8F:80:A5"


def encrypted(objects: str, counter: int, key: str = KEY) -> bytes:
    from cryptography.hazmat.primitives.ciphers.aead import AESCCM

    count = counter.to_bytes(4, "little")
    nonce = bytes.fromhex(SENDER.replace(":", "")) + b"\xd2\xfc\x41" + count
    sealed = AESCCM(bytes.fromhex(key), tag_length=4).encrypt(nonce, bytes.fromhex(objects), None)
    return b"\x41" + sealed[:-4] + count + sealed[-4:]


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    path = tmp_path / "room.key"
    path.write_text(KEY + "\n")
    path.chmod(0o600)
    return str(path)


async def test_encrypted_adverts_are_read_with_the_key_and_nothing_else_is_believed(
    bluez: FakeBlueZ, key_file: str
) -> None:
    driver = sensor("temperature", "humidity", address=SENDER, key_file=key_file)
    async with listening(driver) as scans:
        for data in (
            bytes.fromhex("41 a47266c95f73 00112233 78237214"),  # as published
            encrypted("02CB09", 0x33221101),
            encrypted("02CB09", 0x33221101),  # the same again
            encrypted("02CB09", 0x33221000),  # recorded long ago
            encrypted("02CC09", 0x33221102, key="00" * 16),
            bytes.fromhex("40 02CA09"),
            encrypted("02CD09", 1),  # a new battery
        ):
            bluez.advertise(SENDER, service_data={BTHOME_UUID: data})
        got = [await following(scans) for _ in range(5)]
    assert [scan.values for scan in got] == [[5012, 20220], [5014], [None, None], [None, None], [5018]]
    assert got[2].reasons == got[3].reasons == {0: Reason.DECRYPT, 1: Reason.DECRYPT}
    assert (driver.counts.repeats, driver.counts.replays) == (1, 1)


@pytest.mark.parametrize(
    ("text", "mode", "why"), [("abc", 0o600, "32 hexadecimal"), (KEY, 0o604, "everybody")]
)
async def test_a_key_file_that_cannot_be_used_is_refused(
    tmp_path: Path, text: str, mode: int, why: str
) -> None:
    path = tmp_path / "key"
    path.write_text(text)
    path.chmod(mode)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    with pytest.raises(ConfigError, match=why) as refused:
        await sensor("temperature", key_file=str(path)).connect()
    assert KEY not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (KEY[:-2], "32 hexadecimal digits .*it holds 30 characters"),
        (KEY[:24], "it holds 24 characters"),
        (KEY[:-1] + "g", "characters that are no such digits"),
        ("", "it holds 0 characters"),
    ],
)
def test_a_key_of_the_wrong_length_or_form_is_refused_by_the_check_of_the_configuration(
    tmp_path: Path, text: str, why: str
) -> None:
    path = tmp_path / "key"
    path.write_text(text + "\n")
    with pytest.raises(TableError, match=f"device 'room' options.key_file {path}: .*{why}") as refused:
        build("room", "ble", {"address": A, "key_file": str(path)}, [{"name": "t", "object": "temperature"}])
    assert refused.value.path == "options"
    assert not text or text not in str(refused.value)


def test_the_sample_names_every_property_there_is() -> None:
    words = set(re.findall(r"[a-z_0-9]+", (Path(ble.__file__).with_suffix(".toml")).read_text()))
    assert set(PROPERTIES) <= words


async def test_a_key_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        await sensor("temperature", key_file=str(tmp_path / "none")).connect()


# ----------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("options", "point", "text"),
    [
        ({"address": "A4:C1:38"}, {"object": "temperature"}, "six pairs of digits"),
        ({"adapter": "/org/bluez"}, {"object": "temperature"}, 'such as "hci0"'),
        ({"stale_after_s": -1}, {"object": "temperature"}, "allowed is 0 to"),
        ({}, {"object": "temperatures"}, "unknown object 'temperatures'; did you mean 'temperature'"),
        ({}, {"object": "rssi_2"}, "unknown object"),
        ({"format": "ruuvi"}, {"object": "battery"}, "RuuviTag has no object 'battery'; .*pvvx.* has it"),
        ({"format": "ruuvi"}, {"object": "temperatures"}, "did you mean 'temperature'"),
        (
            {"format": "ruuvi", "key_file": "/k"},
            {"object": "voltage"},
            "key_file: RuuviTag is never encrypted",
        ),
        ({}, {"object": "temperature", "type": "u8"}, "temperature is i32; leave type out"),
        ({}, {"object": "door", "scale": 2.0}, "scale and offset mean nothing"),
    ],
)
def test_what_can_never_work_is_refused_with_the_place_and_the_remedy(
    options: dict[str, object], point: dict[str, object], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        BleDriver(
            "d",
            msgspec.convert({"address": A, **options}, BleOptions),
            [msgspec.convert({"name": "p", **point}, BlePoint)],
        )


def test_a_device_without_points_is_refused() -> None:
    with pytest.raises(ConfigError, match="no points"):
        sensor()


def test_a_scale_of_the_configuration_works_on_the_value_and_not_on_its_steps() -> None:
    driver = BleDriver(
        "d",
        BleOptions(address=A),
        [BlePoint(name="f", object="Temperature-1", scale=1.8, offset=32.0, unit="[degF]")],
    )
    (point,) = driver.points
    assert (point.object, point.scale, point.unit) == ("temperature", 0.009, "[degF]")
    assert engineering(5012, point.scale, point.offset) == pytest.approx(77.108)


def test_every_default_of_the_sample_is_the_default_of_the_code_and_its_devices_build() -> None:
    text = (Path(ble.__file__).with_suffix(".toml")).read_text()
    defaults = {field.encode_name: field.default for field in msgspec.structs.fields(BleOptions)}
    shown = tomllib.loads("\n".join(dict.fromkeys(re.findall(r"^# (\w+ = .*)$", text, re.MULTILINE))))
    assert {key: shown[key] for key in defaults if key != "address"} == {
        key: value for key, value in defaults.items() if key != "address"
    }
    for device in tomllib.loads(text)["device"]:
        assert device["driver"] == "ble"
        BleDriver(
            device["name"],
            msgspec.convert(device["options"], BleOptions),
            msgspec.convert(device["point"], list[BlePoint]),
        )


async def test_discover_tells_sensors_and_what_they_send(
    bluez: FakeBlueZ, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ble, "DISCOVER_S", 1.0)
    found: list[Found] = []

    async def discover() -> None:
        found.extend([one async for one in BleDriver.discover()])

    task = asyncio.create_task(discover())
    while not task.done():
        bluez.advertise("11:22:33:44:55:66", rssi=-50, name="Headphones")
        bluez.advertise(B, rssi=-80, name="Door", service_data={BTHOME_UUID: encrypted("1A01", 1)})
        bluez.advertise(A, rssi=-70, name="Room", service_data={BTHOME_UUID: bytes.fromhex("40 02CA09")})
        bluez.advertise(A, rssi=-60, service_data={BTHOME_UUID: bytes.fromhex("40 03BF13")})
        await asyncio.sleep(0.02)
    await task
    assert [(one.address, one.description) for one in found] == [
        (A, "Room; BTHome v2; temperature, humidity; -60 dBm"),
        (B, "Door; BTHome v2, encrypted: needs its key (key_file); -80 dBm"),
        ("11:22:33:44:55:66", "Headphones; -50 dBm"),
    ]
    assert found[0].options == {"address": A, "format": "bthome"}
    assert found[0].readings == {"temperature": "25.06 °C", "humidity": "50.55 %", "rssi": "-60 dBm"}
    assert [point["object"] for point in found[0].points] == ["temperature", "humidity", "rssi"]
    await until(lambda: not bluez.discovering)


async def test_discover_without_an_adapter_says_so(bluez: FakeBlueZ) -> None:
    bluez.unplug()
    with pytest.raises(DeviceUnreachable, match="no Bluetooth adapter"):
        async for _ in BleDriver.discover():
            pass


# -------------------------------------------------------------------------------------------------- a plant of sensors


async def test_what_a_plant_in_another_process_delivered_is_what_was_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their books agree to the advert: every one delivered gave a scan, with the sensor's own counter in it."""
    with tempfile.TemporaryDirectory(prefix="bus-") as folder:
        plant = await asyncio.create_subprocess_exec(
            *(
                sys.executable,
                "-m",
                "tests.fakes.bluez",
                "--folder",
                folder,
                "--sensors",
                "8",
                "--period-ms",
                "20",
            ),
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
        )
        assert plant.stdout is not None
        async with asyncio.timeout(WAIT_S):
            ready = json.loads(await plant.stdout.readline())
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", ready["address"])
        drivers = [sensor("count", "temperature", address=address) for address in ready["sensors"]]
        async with listening(*drivers):
            got = dict.fromkeys(ready["sensors"], 0)

            async def read(driver: BleDriver) -> None:
                last = 0
                async for scan in driver.scans():
                    count = scan.values[0]
                    assert isinstance(count, int)
                    assert count > last
                    last = count
                    got[driver.options.address] += 1

            readers = [asyncio.create_task(read(driver)) for driver in drivers]
            await until(lambda: min(got.values()) >= 20)
            plant.send_signal(signal.SIGUSR1)
            async with asyncio.timeout(WAIT_S):
                books = json.loads(await plant.stdout.readline())
            # The scan begins with the first device: what came before a later one listened, only the plant knows.
            await until(lambda: all(sent - got[of] in (0, 1, 2) for of, sent in books["by_sensor"].items()))
            plant.terminate()
            await asyncio.wait(readers, timeout=WAIT_S)
            async with asyncio.timeout(WAIT_S):
                await plant.wait()
        for reader in readers:
            assert isinstance(reader.exception(), DeviceUnreachable)
    assert all(got[of] <= sent for of, sent in books["by_sensor"].items())
    assert sum(got.values()) <= books["delivered"] <= books["offered"]
