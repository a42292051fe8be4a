"""`ble_gatt` and `ble_gatt_notify` through the real `bleak`, against a simulated BlueZ on a private D-Bus."""

from __future__ import annotations

import asyncio
import re
import struct
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
import pytest

from drivers import ble_gatt, ble_radio, conformance
from drivers.ble_gatt import GattDriver, GattNotifyDriver, GattNotifyOptions, GattOptions, GattPoint, decode
from drivers.contract import (
    ConfigError,
    DeviceUnreachable,
    Reason,
    Scan,
    Value,
    ValueType,
    boot_ns,
    engineering,
)
from drivers.registry import build
from tests.fakes.bluez import Characteristic, FakeBlueZ, PrivateBus, private_bus

WAIT_S = 20  # a deadline, never a pause: the machine may be busy
A = "C4:7C:8D:00:00:01"
ENVIRONMENT = "0000181a-0000-1000-8000-00805f9b34fb"
TEMPERATURE = "00002a6e-0000-1000-8000-00805f9b34fb"
HUMIDITY = "00002a6f-0000-1000-8000-00805f9b34fb"
FIRMWARE = "00002a26-0000-1000-8000-00805f9b34fb"
SECRET = "0000ff01-0000-1000-8000-00805f9b34fb"


@pytest.fixture(scope="module")
def bus() -> Iterator[PrivateBus]:
    with private_bus() as bus:
        yield bus


@pytest.fixture
async def bluez(bus: PrivateBus, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeBlueZ]:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.address)
    bluez = await FakeBlueZ().start()
    advertising = asyncio.create_task(advertise(bluez))
    yield bluez
    advertising.cancel()
    bluez.stop()
    await asyncio.sleep(0)


def offers(bluez: FakeBlueZ, address: str = A) -> dict[str, Characteristic]:
    """A thermometer that is connected to."""
    found = {
        "temperature": Characteristic(TEMPERATURE, struct.pack("<h", 2150)),
        "humidity": Characteristic(HUMIDITY, struct.pack("<H", 4321)),
        "firmware": Characteristic(FIRMWARE, b"1.2.3", ("read",)),
        "secret": Characteristic(SECRET, b"", ("write",)),
    }
    bluez.peripheral(address, {ENVIRONMENT: list(found.values())})
    return found


async def advertise(bluez: FakeBlueZ) -> None:
    """Every peripheral that is not connected advertises, as they do; without any data."""
    while True:
        for path in list(bluez._peripherals):
            address = path[-17:].replace("_", ":")
            if address not in bluez.connected:
                bluez.advertise(address, name="Box")
        await asyncio.sleep(0.02)


POINTS = {
    "temperature": GattPoint(name="temperature", characteristic="2a6e", scale=0.01, unit="Cel"),
    "humidity": GattPoint(name="humidity", characteristic=HUMIDITY.upper(), type=ValueType.U16, scale=0.01),
    "firmware": GattPoint(name="firmware", characteristic="0x2A26", type=ValueType.STR),
    "secret": GattPoint(name="secret", characteristic="ff01", type=ValueType.U8),
    "none": GattPoint(name="none", characteristic="2a19", type=ValueType.U8),
}


def reader(
    *names: str, address: str = A, stay: bool = False, adapter: str = "", name: str = "box"
) -> GattDriver:
    options = GattOptions(address=address, stay_connected=stay, adapter=adapter, connect_timeout_s=10.0)
    return GattDriver(name, options, [POINTS[each] for each in names])


def notifier(
    *names: str, address: str = A, stale_after_s: float = 0.0, adapter: str = ""
) -> GattNotifyDriver:
    options = GattNotifyOptions(
        address=address, stale_after_s=stale_after_s, adapter=adapter, connect_timeout_s=10.0
    )
    return GattNotifyDriver("box", options, [POINTS[each] for each in names])


@asynccontextmanager
async def connected(driver: GattDriver | GattNotifyDriver) -> AsyncIterator[None]:
    async with asyncio.timeout(WAIT_S):
        await driver.connect()
    try:
        yield
    finally:
        await driver.close()


async def read(driver: GattDriver) -> Scan:
    async with asyncio.timeout(WAIT_S):
        return await driver.read(driver.points)


async def following(scans: AsyncIterator[Scan]) -> Scan:
    async with asyncio.timeout(WAIT_S):
        return await anext(scans)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not true():  # noqa: ASYNC110 - what is awaited is on the other side of a bus
            await asyncio.sleep(0.002)


# ----------------------------------------------------------------------------------------------------------- reading


async def test_characteristics_are_read_in_one_connection_which_then_ends(bluez: FakeBlueZ) -> None:
    offers(bluez)
    driver = reader("temperature", "firmware", "humidity")
    async with connected(driver):
        assert not bluez.connects  # nobody connects before there is something to read
        for _ in range(3):
            before_ns = boot_ns()
            scan = await read(driver)
            assert scan.values == [2150, "1.2.3", 4321]
            assert not scan.reasons
            assert before_ns < scan.taken_at_ns < boot_ns()
            assert not bluez.connected
    assert engineering(2150, driver.points[0].scale, 0.0) == 21.5
    assert list(bluez.connects) == [A] * 3
    await until(lambda: not bluez.discovering)


async def test_it_scans_only_while_it_looks_for_its_device(bluez: FakeBlueZ) -> None:
    offers(bluez)
    driver = reader("temperature", stay=True)
    async with connected(driver):
        await until(lambda: not bluez.discovering)
        assert (await read(driver)).values == [2150]
        assert not bluez.discovering


async def test_one_connection_serves_all_reads_where_it_is_to_stay(bluez: FakeBlueZ) -> None:
    offers(bluez)
    driver = reader("temperature", stay=True)
    async with connected(driver):
        assert [(await read(driver)).values for _ in range(5)] == [[2150]] * 5
        assert bluez.connected == [A]
    assert list(bluez.connects) == [A]
    await until(lambda: not bluez.connected)


async def test_a_dropped_link_is_unreachable_and_connect_makes_a_new_one(bluez: FakeBlueZ) -> None:
    offers(bluez)
    driver = reader("temperature", stay=True)
    async with connected(driver):
        assert (await read(driver)).values == [2150]
        bluez.drop_link(A)
        await until(lambda: not driver._link.is_open)
        with pytest.raises(DeviceUnreachable, match="was lost"):
            await read(driver)
        await driver.connect()
        assert (await read(driver)).values == [2150]
    assert list(bluez.connects) == [A, A]


async def test_a_characteristic_that_is_refused_or_missing_is_its_own_trouble(bluez: FakeBlueZ) -> None:
    offered = offers(bluez)
    offered["humidity"].errors += [("org.bluez.Error.Failed", "Operation failed with ATT error: 0x0e")]
    driver = reader("temperature", "humidity", "secret", "none")
    async with connected(driver):
        scan = await read(driver)
        assert scan.values == [2150, None, None, None]
        assert scan.reasons == {1: Reason.EXCEPTION, 2: Reason.REFUSED, 3: Reason.REFUSED}
        scan = await read(driver)
        assert scan.values == [2150, 4321, None, None]


async def test_one_that_never_answers_is_a_timeout_and_the_rest_go_on(
    bluez: FakeBlueZ, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ble_gatt, "READ_S", 0.2)
    offered = offers(bluez)
    driver = reader("temperature", stay=True)
    async with connected(driver):
        assert (await read(driver)).values == [2150]
        bluez.hangs.add("ReadValue")
        with pytest.raises(DeviceUnreachable, match="answers no read") as late:
            await read(driver)
        assert late.value.reason is Reason.TIMEOUT
        bluez.hangs.clear()
        assert (await read(driver)).values == [2150]
    assert offered


async def test_services_that_bluez_remembers_wrongly_are_asked_for_afresh_once(bluez: FakeBlueZ) -> None:
    offered = offers(bluez)
    bluez.peripheral(A, {ENVIRONMENT: [offered["humidity"]]})  # as it was before its firmware was updated
    driver = reader("temperature")
    real = bluez.forget

    def forgetting(path: str) -> None:
        offers(bluez)
        real(path)

    bluez.forget = forgetting  # type: ignore[method-assign]
    async with connected(driver):
        assert (await read(driver)).values == [2150]
    assert [member for _, member in bluez.calls].count("RemoveDevice") == 1


async def test_a_device_out_of_reach_is_told_so(bluez: FakeBlueZ, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = reader("temperature", address="C4:7C:8D:00:00:99")
    driver._link._connect_timeout_s = 0.3  # what is configured is at least 10 s
    async with connected(driver):
        with pytest.raises(DeviceUnreachable, match=r"did not advertise within 0\.3 s") as absent:
            await read(driver)
        assert absent.value.reason is Reason.TIMEOUT
    await until(lambda: not bluez.discovering)


async def test_a_connection_that_is_refused_or_hangs_is_unreachable_and_the_next_try_works(
    bluez: FakeBlueZ,
) -> None:
    offers(bluez)
    driver = reader("temperature")
    async with connected(driver):
        bluez.refusals["Connect"] = [("org.bluez.Error.Failed", "le-connection-abort-by-peer")]
        with pytest.raises(DeviceUnreachable, match="connecting to"):
            await read(driver)
        bluez.hangs.add("Connect")
        driver._link._connect_timeout_s = 0.3
        with pytest.raises(DeviceUnreachable) as late:
            await read(driver)
        assert late.value.reason is Reason.TIMEOUT
        bluez.hangs.clear()
        driver._link._connect_timeout_s = 10.0
        assert (await read(driver)).values == [2150]
    assert ble_radio.hub().slots("hci0").holders == ()


async def test_a_connection_outlives_a_reader_who_cannot_wait_for_it(bluez: FakeBlueZ) -> None:
    offers(bluez)
    bluez.connect_s = 0.5
    driver = reader("temperature")
    async with connected(driver):
        tries = 0
        while True:
            tries += 1
            with suppress(TimeoutError):
                async with asyncio.timeout(0.15):
                    scan = await driver.read(driver.points)
                    break
            assert tries < 100
        assert scan.values == [2150]
        assert tries > 1
    assert list(bluez.connects) == [A]


# ------------------------------------------------------------------------------------------------------------- turns


async def test_connections_are_few_at_once_made_one_by_one_and_everybody_has_a_turn(bluez: FakeBlueZ) -> None:
    addresses = [f"C4:7C:8D:00:01:{n:02X}" for n in range(10)]
    for address in addresses:
        offers(bluez, address)
    bluez.connect_s = 0.02
    drivers = [reader("temperature", address=address, name=address) for address in addresses]
    await asyncio.gather(*(driver.connect() for driver in drivers))
    try:
        for _ in range(2):
            scans = await asyncio.gather(*(read(driver) for driver in drivers))
            assert [scan.values for scan in scans] == [[2150]] * 10
    finally:
        await asyncio.gather(*(driver.close() for driver in drivers))
    assert bluez.most_connecting == 1
    assert bluez.most_connected <= ble_radio.CONNECTIONS
    made = list(bluez.connects)
    assert sorted(made[:10]) == sorted(made[10:]) == addresses  # nobody twice before all once


async def test_when_all_places_are_held_it_is_told_by_whom(bluez: FakeBlueZ) -> None:
    addresses = [f"C4:7C:8D:00:02:{n:02X}" for n in range(ble_radio.CONNECTIONS + 1)]
    for address in addresses:
        offers(bluez, address)
    *held, late = [
        reader("temperature", address=address, stay=True, name=f"box-{n}")
        for n, address in enumerate(addresses)
    ]
    await asyncio.gather(*(driver.connect() for driver in held))
    late._link._connect_timeout_s = 0.3
    try:
        with pytest.raises(DeviceUnreachable, match="all 3 are held by box-") as full:
            await late.connect()
        assert full.value.reason is Reason.BUSY
        await held[0].close()
        await late.connect()
        assert (await read(late)).values == [2150]
    finally:
        await asyncio.gather(*(driver.close() for driver in (*held, late)))


# ----------------------------------------------------------------------------------------------------- notifications


async def test_each_notification_is_one_scan_in_order(bluez: FakeBlueZ) -> None:
    offers(bluez)
    driver = notifier("temperature", "humidity")
    async with connected(driver):
        scans = driver.scans()
        for n in range(50):
            assert bluez.notify(A, TEMPERATURE, struct.pack("<h", n))
        got = [await following(scans) for _ in range(50)]
        assert bluez.notify(A, HUMIDITY, b"\x01")
        short = await following(scans)
    assert [scan.values for scan in got] == [[n] for n in range(50)]
    assert {point.name for scan in got for point in scan.points} == {"temperature"}
    assert (short.values, short.reasons) == ([None], {0: Reason.FRAMING})
    await until(lambda: not bluez.connected)


async def test_what_does_not_notify_is_refused_and_the_rest_goes_on(bluez: FakeBlueZ) -> None:
    offers(bluez)
    driver = notifier("temperature", "firmware", "none")
    async with connected(driver):
        scans = driver.scans()
        first = await following(scans)
        assert {point.name for point in first.points} == {"firmware", "none"}
        assert set(first.reasons.values()) == {Reason.REFUSED}
        bluez.notify(A, TEMPERATURE, struct.pack("<h", -5))
        assert (await following(scans)).values == [-5]


async def test_a_device_that_notifies_nothing_at_all_is_unreachable(bluez: FakeBlueZ) -> None:
    offers(bluez)
    driver = notifier("firmware")
    with pytest.raises(DeviceUnreachable, match="none of these characteristics") as refused:
        await driver.connect()
    assert refused.value.reason is Reason.REFUSED
    await driver.close()


async def test_a_silent_device_is_stale_once(bluez: FakeBlueZ) -> None:
    offers(bluez)
    driver = notifier("temperature", stale_after_s=0.2)
    async with connected(driver):
        scans = driver.scans()
        assert (await following(scans)).reasons == {0: Reason.STALE}
        await asyncio.sleep(0.8)  # four times as long as it takes to be stale
        assert len(driver._queue) == 0
        bluez.notify(A, TEMPERATURE, struct.pack("<h", 7))
        assert (await following(scans)).values == [7]
        assert (await following(scans)).reasons == {0: Reason.STALE}


@pytest.mark.parametrize("fault", ["link", "adapter", "bluetoothd"])
async def test_a_link_an_adapter_or_a_bluetoothd_that_ends_is_told_and_connect_goes_on(
    bluez: FakeBlueZ, fault: str
) -> None:
    offers(bluez)
    driver = notifier("temperature")
    async with connected(driver):
        scans = driver.scans()
        bluez.notify(A, TEMPERATURE, struct.pack("<h", 1))
        assert (await following(scans)).values == [1]
        {"link": lambda: bluez.drop_link(A), "adapter": bluez.unplug, "bluetoothd": bluez.stop}[fault]()
        with pytest.raises(DeviceUnreachable, match=r"was lost|is gone|has ended"):
            await following(scans)
        if fault == "adapter":
            bluez.plug()
        elif fault == "bluetoothd":
            await bluez.start()
        async with asyncio.timeout(WAIT_S):
            while True:
                with suppress(DeviceUnreachable):
                    await driver.connect()
                    break
                await asyncio.sleep(0.05)
        bluez.notify(A, TEMPERATURE, struct.pack("<h", 2))
        assert (await following(driver.scans())).values == [2]
    assert ble_radio.hub().slots("hci0").holders == ()


# ------------------------------------------------------------------------------------------------------- conformance


@pytest.mark.parametrize("check", conformance.PULL, ids=conformance.title)
@pytest.mark.parametrize("stay", [False, True], ids=["each", "stay"])
async def test_the_reading_driver_conforms(check: conformance.Check, bluez: FakeBlueZ, stay: bool) -> None:
    offers(bluez)
    await check(
        conformance.Subject(
            build=lambda: reader("temperature", "humidity", "firmware", stay=stay),
            absent=lambda: reader("temperature", adapter="hci9"),
        )
    )


@pytest.mark.parametrize("check", conformance.PUSH, ids=conformance.title)
async def test_the_notifying_driver_conforms(check: conformance.Check, bluez: FakeBlueZ) -> None:
    offers(bluez)

    async def provoke() -> None:
        assert bluez.notify(A, TEMPERATURE, struct.pack("<h", 2150))

    await check(
        conformance.Subject(
            build=lambda: notifier("temperature"),
            absent=lambda: notifier("temperature", adapter="hci9"),
            provoke=provoke,
        )
    )


# ---------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize(
    ("data", "keys", "value", "reason"),
    [
        ("6608", {}, 0x0866, Reason.GOOD),
        ("0866", {"order": "big"}, 0x0866, Reason.GOOD),
        ("FFFF", {}, -1, Reason.GOOD),
        ("00A1860100", {"type": "u32", "at": 1, "size": 3}, 100_001, Reason.GOOD),
        ("00FFFFFF00", {"type": "i32", "at": 1, "size": 3}, -1, Reason.GOOD),
        ("0000AC41", {"type": "f32"}, 21.5, Reason.GOOD),
        ("0000C07F", {"type": "f32"}, None, Reason.NAN),
        ("000080FF", {"type": "f32"}, None, Reason.INFINITE),
        ("08", {"type": "bool", "bit": 3}, True, Reason.GOOD),
        ("F7", {"type": "bool", "bit": 3}, False, Reason.GOOD),
        ("F7", {"type": "bool"}, True, Reason.GOOD),
        ("312E3200", {"type": "str"}, "1.2", Reason.GOOD),
        ("312E3299", {"type": "str"}, None, Reason.DECODE),
        ("312E3299", {"type": "str", "size": 3}, "1.2", Reason.GOOD),
        ("66", {}, None, Reason.FRAMING),
        ("", {"type": "bool"}, None, Reason.FRAMING),
    ],
)
def test_a_part_of_a_characteristic_becomes_a_raw_value(
    data: str, keys: dict[str, object], value: Value | None, reason: Reason
) -> None:
    point = msgspec.convert({"name": "p", "characteristic": "2a6e", **keys}, GattPoint)
    assert decode(point, bytes.fromhex(data)) == (value, reason)


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"characteristic": "temperature"}, "four hexadecimal digits"),
        ({"service": "18"}, "service is '18'"),
        ({"size": 3}, "i16 has 2 bytes"),
        ({"type": "f32", "size": 3}, "f32 has 4 bytes"),
        ({"bit": 1}, 'bit is for type "bool"'),
        ({"type": "bool", "size": 2}, "one byte"),
        ({"type": "str", "scale": 2.0}, "is no number"),
    ],
)
def test_what_can_never_work_is_refused_with_the_place_and_the_remedy(
    keys: dict[str, object], why: str
) -> None:
    point = msgspec.convert({"name": "p", "characteristic": "2a6e", **keys}, GattPoint)
    with pytest.raises(ConfigError, match=f"point 'p'.*{re.escape(why)}"):
        GattDriver("d", GattOptions(address=A), [point])


def test_a_connect_timeout_below_ten_seconds_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match=r">= 10\.0"):
        msgspec.convert({"address": A, "connect_timeout_s": 5.0}, GattOptions)


@pytest.mark.parametrize(("name", "kind"), [("ble_gatt", GattDriver), ("ble_gatt_notify", GattNotifyDriver)])
def test_every_default_of_the_samples_is_the_default_of_the_code_and_their_devices_build(
    name: str, kind: type[GattDriver | GattNotifyDriver]
) -> None:
    text = (Path(ble_gatt.__file__).parent / f"{name}.toml").read_text()
    shown = tomllib.loads("\n".join(dict.fromkeys(re.findall(r"^# (\w+ = .*)$", text, re.MULTILINE))))
    defaults = {
        field.encode_name: field.default
        for field in msgspec.structs.fields(kind.options_type)
        if field.encode_name != "address"
    }
    assert {key: shown[key] for key in defaults} == defaults
    for device in tomllib.loads(text)["device"]:
        assert device["driver"] == name
        assert build(device["name"], name, device["options"], device["point"]).points
