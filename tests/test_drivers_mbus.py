"""`mbus` against meters on a pty and behind TCP. Expected values: the example of m-bus.com/documentation-wired (6.3.2),
telegrams of libmbus' test set with the values that libmbus gives for them (test/test-frames, BSD; named at each), and
the coding rules of EN 13757-3 as that documentation tells them."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from fractions import Fraction
from pathlib import Path

import msgspec
import pytest

from drivers import conformance, mbus_link, mbus_records, registry, serial_bus
from drivers.contract import ConfigError, DeviceUnreachable, Reason, Scan, ValueType, boot_ns
from drivers.mbus import MbusDriver, MbusOptions, MbusPoint
from tests.fakes.mbus_meter import PAD, MbusBus, MbusGateway, MbusMeter, MbusPty, rsp_ud

P = MbusPoint
#: libmbus sen_pollucom_e: 19019 kWh, 1621.119 m3, 0, 0, 35.9 and 23.3 °C, 12.614 K, 63940045.
POLLUCOM = (
    "45009463 AE4C 08 04 F9 00 0000 0C06 19900100 0C13 19116201 0C3B 00000000 0C2B 00000000 025A 6701 025E E900"
    " 0360 463100 0C78 45009463 0CFD10 45009463 1F"
)
#: libmbus example_data_01: 1389817 kWh, 504647 m3, 41.737434 and 35.46365 °C in floating point.
AMTRON = (
    "45585703 B405 34 04 9E 00 27B6 0306 F93415 0315 C6004D 052E 00000000 053D 00000000"
    " 055B 22F32642 055F C7DA0D42"
)
HEAD = "78563412 2440 01 07 55 00 0000 "
ENERGY = P(name="energy", unit="kWh", quantity="energy")
Build = Callable[..., MbusPty]


@pytest.fixture
async def bus_of(tmp_path: Path) -> AsyncIterator[Build]:
    built: list[MbusPty] = []

    def build(*meters: MbusMeter, speed: int = 2400) -> MbusPty:
        built.append(MbusPty(tmp_path / "bus", *meters, speed=speed))
        return built[-1]

    yield build
    for bus in built:
        bus.peer.unplug()
    assert not serial_bus._buses


def driver_of(bus: MbusBus | str, *points: MbusPoint, **options: object) -> MbusDriver:
    # A pty has no parity: what the port drops is told in the log.
    where: dict[str, object] = (
        {"port": bus.peer.port, "parity": "none"}
        if isinstance(bus, MbusPty)
        else {"host": "127.0.0.1", "tcp_port": bus.port}
        if isinstance(bus, MbusGateway)
        else {"port": "/dev/none"}
    )
    table = {"reply_timeout_ms": 200, **where, **options}
    if "secondary" not in table:
        table.setdefault("address", 1)
    return MbusDriver("meter", msgspec.convert(table, MbusOptions), points or (ENERGY,))


@asynccontextmanager
async def opened(driver: MbusDriver) -> AsyncIterator[MbusDriver]:
    await driver.connect()
    try:
        yield driver
    finally:
        await driver.close()


async def read_once(driver: MbusDriver) -> Scan:
    async with opened(driver):
        return await driver.read(driver.points)


async def value_of(bus: MbusPty, data: str, point: MbusPoint) -> object:
    """What a point is of a meter that sends these records: its value, or its reason, or both."""
    bus.meters[0].telegrams = [bytes.fromhex(HEAD + data)]
    scan = await read_once(driver_of(bus, point))
    reason = scan.reasons.get(0)
    if reason is None:
        return scan.values[0]
    return (scan.values[0], reason) if reason.has_value else reason


# -------------------------------------------------------------------------------------------------- published telegrams


async def test_the_documentations_example_is_read_by_storage_tariff_subunit_and_function(
    bus_of: Build,
) -> None:
    bus = bus_of(MbusMeter(PAD))
    points = (
        P(name="volume", unit="m3", quantity="volume"),
        P(name="litres", unit="l", quantity="volume", type=ValueType.U32),
        P(name="peak", unit="l/h", quantity="volume_flow", function="maximum", storage=5),
        P(name="energy", unit="kWh", quantity="energy", tariff=2, subunit=1),
        P(name="third", unit="Wh", record=3, type=ValueType.U32),
        P(name="by_codes", unit="m3", vif="13"),
        P(name="status", quantity="status", type=ValueType.U8),
        P(name="energy_now", unit="kWh", quantity="energy"),
        P(name="flow_now", unit="l/h", quantity="volume_flow", storage=5),
    )
    async with opened(driver_of(bus, *points)) as driver:
        before_ns = boot_ns()
        scan = await driver.read(points)
        assert before_ns < scan.taken_at_ns <= boot_ns()
        assert driver.readout is not None
        assert driver.readout.secondary == "1234567824400107"
    assert scan.values == [12.565, 12565, 113.0, 218.37, 218_370, 12.565, 0, None, None]
    assert scan.reasons == {7: Reason.MISSING, 8: Reason.MISSING}
    assert list(bus.asked) == ["1040014116", "1040014116", "107b017c16"]


async def test_published_telegrams_of_heat_meters_give_their_published_values(bus_of: Build) -> None:
    meter = MbusMeter(POLLUCOM)
    bus = bus_of(meter)
    points = (
        ENERGY,
        P(name="gj", unit="GJ", quantity="energy"),
        P(name="volume", unit="m3", quantity="volume"),
        P(name="flow", unit="m3/h", quantity="volume_flow"),
        P(name="there", unit="°C", quantity="flow_temperature"),
        P(name="back", unit="Cel", quantity="return_temperature"),
        P(name="difference", unit="K", quantity="temperature_difference"),
        P(name="number", quantity="fabrication_number", type=ValueType.STR),
    )
    scan = await read_once(driver_of(bus, *points))
    assert (scan.values, scan.reasons) == (
        [19019.0, 68.4684, 1621.119, 0.0, 35.9, 23.3, 12.614, "63940045"],
        {},
    )
    meter.telegrams = [bytes.fromhex(AMTRON)]
    scan = await read_once(driver_of(bus, *points[:1], *points[2:6]))
    assert scan.reasons == {}
    assert scan.values == pytest.approx([1_389_817.0, 504_647.0, 0.0, 41.737434, 35.46365], rel=1e-8)


def test_quantities_units_and_factors_are_those_of_the_standards_tables() -> None:
    """m-bus.com/documentation-wired, 8.4.3 and 8.4.4: code, unit, and the power of ten of its lowest code."""
    main = [
        (0x00, 8, "energy", "Wh", -3), (0x08, 8, "energy", "J", 0), (0x10, 8, "volume", "m3", -6),
        (0x18, 8, "mass", "kg", -3), (0x28, 8, "power", "W", -3), (0x30, 8, "power", "J/h", 0),
        (0x38, 8, "volume_flow", "m3/h", -6), (0x40, 8, "volume_flow", "m3/min", -7),
        (0x48, 8, "volume_flow", "m3/s", -9),
        (0x50, 8, "mass_flow", "kg/h", -3), (0x58, 4, "flow_temperature", "Cel", -3),
        (0x5C, 4, "return_temperature", "Cel", -3), (0x60, 4, "temperature_difference", "K", -3),
        (0x64, 4, "external_temperature", "Cel", -3), (0x68, 4, "pressure", "bar", -3),
    ]  # fmt: skip
    extended = [
        ("FD", 0x40, 16, "voltage", "V", -9), ("FD", 0x50, 16, "current", "A", -12),
        ("FB", 0x00, 2, "energy", "Wh", 5), ("FB", 0x08, 2, "energy", "J", 8), ("FB", 0x10, 2, "volume", "m3", 2),
        ("FB", 0x18, 2, "mass", "kg", 5), ("FB", 0x1A, 2, "relative_humidity", "%", -1),
        ("FB", 0x28, 2, "power", "W", 5), ("FB", 0x30, 2, "power", "J/h", 8),
        ("FB", 0x74, 4, "temperature_limit", "Cel", -3), ("FB", 0x78, 8, "cumulated_maximum_power", "W", -3),
    ]  # fmt: skip
    cases = [("", *row) for row in main] + extended
    for before, first, count, quantity, unit, power in cases:
        for step in range(count):
            data = bytes.fromhex(f"01 {before} {first + step:02X} 05")
            (record,) = mbus_records.records(data).records
            assert (record.quantity, record.unit) == (quantity, unit), data.hex()
            assert record.factor == Fraction(10) ** (power + step), data.hex()
    for first, seconds in ((0x20, 1), (0x21, 60), (0x22, 3600), (0x23, 86_400)):
        (record,) = mbus_records.records(bytes([1, first, 5])).records
        assert (record.quantity, record.unit, record.factor) == ("on_time", "s", Fraction(seconds))


def test_a_numbers_place_counts_also_where_records_hold_nothing() -> None:
    """The library leaves records without data out; the third stays the third."""
    got = mbus_records.records(bytes.fromhex("00 13 2F 2F 08 5B 0D 78 00 01 FD 17 00"))
    assert [(record.number, record.quantity, record.content) for record in got.records] == [
        (1, "volume", Reason.MISSING),
        (2, "flow_temperature", Reason.MISSING),
        (3, "fabrication_number", Reason.MISSING),
        (4, "error_flags", 0),
    ]
    assert not got.broken


# ------------------------------------------------------------------------------------------------------- what is none


@pytest.mark.parametrize(
    ("data", "point", "expected"),
    [
        ("0C06 FFFFFFFF", ENERGY, Reason.NAN),  # BCD of F: blank on the display
        ("0C06 BBBBBBBB", ENERGY, Reason.NAN),  # B: overflow (EN 13757-3, annex A, type A)
        ("0C06 1234A512", ENERGY, Reason.NAN),
        ("0C06 562300F0", ENERGY, -2356.0),  # F in the highest digit: minus
        ("0406 00000080", ENERGY, Reason.NAN),  # 80…00: invalid (type B)
        ("0406 FFFFFFFF", ENERGY, -1.0),
        ("0506 0000C07F", ENERGY, Reason.NAN),
        ("0506 0000807F", ENERGY, Reason.INFINITE),
        ("0006", ENERGY, Reason.MISSING),
        ("0486 15 2A000000", ENERGY, Reason.MISSING),  # record error: no data available
        ("0486 16 2A000000", ENERGY, Reason.OVERFLOW),
        ("0486 18 2A000000", ENERGY, Reason.EXCEPTION),
        ("0486 04 2A000000", ENERGY, Reason.REFUSED),  # tariff not implemented
        ("0486 00 2A000000", ENERGY, 42.0),  # no error
        ("0486 75 2A000000", ENERGY, 4.2),  # times 10^-1
        ("0486 7D 2A000000", ENERGY, 42_000.0),  # times 1000
        ("0486 78 2A000000", ENERGY, Reason.DECODE),  # something is added to it
        ("0486 3C 2A000000", ENERGY, Reason.MISSING),  # only what was delivered: another quantity
        ("0486 3C 2A000000", P(name="out", unit="kWh", vif="86 3C"), 42.0),
        ("04 86 BC 15 2A000000", P(name="out", unit="kWh", vif="86 3C"), Reason.MISSING),
        ("3406 2A000000", ENERGY, Reason.EXCEPTION),  # value during a state of error, in the value's place
        ("3406 2A000000", P(name="e", unit="kWh", quantity="energy", function="error"), (42.0, Reason.DEVICE_FAULT)),
        ("3406 2A000000", P(name="e", unit="kWh", record=1), Reason.EXCEPTION),
        ("1406 2A000000", P(name="e", unit="kWh", record=1), Reason.MISSING),  # a maximum is no present value
        ("0406 2A000000 0406 2B000000", ENERGY, Reason.DECODE),  # which of the two?
        ("0406 2A000000 0406 2B000000", P(name="e", unit="kWh", record=2), 43.0),
        ("0406 2A000000", P(name="v", unit="m3", record=1), Reason.DECODE),
        ("0413 05000000", P(name="v", unit="m3", quantity="volume", type=ValueType.U32), Reason.DECODE),
        ("0406 2A000000", P(name="e", unit="MWh", scale=0.001, device_unit="kWh", quantity="energy"), 42.0),
        ("0406 2A0000", ENERGY, Reason.FRAMING),  # cut short
        ("0F 0406 2A000000", ENERGY, Reason.MISSING),  # the maker's own is not looked into
        ("0406 2A000000 0DFD48 F0 01020304", ENERGY, 42.0),
        ("0DFD48 F0 0406 2A000000", ENERGY, Reason.FRAMING),  # a length that editions differ about
        ("426C FFFF", P(name="d", quantity="date", storage=1, type=ValueType.STR), Reason.DECODE),
        ("426C 5F1C", P(name="d", quantity="date", storage=1, type=ValueType.STR), "2010-12-31"),
        ("046D 1A2F6511", P(name="d", quantity="date_time", type=ValueType.STR), "2011-01-05T15:26:00"),
        ("046D 9A2F6511", P(name="d", quantity="date_time", type=ValueType.STR),
         ("2011-01-05T15:26:00", Reason.DEVICE_FAULT)),  # the meter says its clock is wrong
        ("046D 1A2F6511", P(name="d", quantity="date_time"), Reason.DECODE),
        ("01FD17 80", P(name="f", quantity="error_flags", type=ValueType.U8), 128),
        ("02FC 03 485225 74 D411", P(name="rh", unit="%", record=1), 45.64),  # libmbus elv_temp_humid: "%RH"
        ("0DFD11 03 636261", P(name="who", quantity="customer", type=ValueType.STR), "abc"),
    ],
)  # fmt: skip
async def test_a_record_is_a_number_or_says_why_it_is_none(
    bus_of: Build, data: str, point: MbusPoint, expected: object
) -> None:
    assert await value_of(bus_of(MbusMeter(PAD)), data, point) == expected


async def test_a_meter_that_changes_its_range_gives_the_same_value(bus_of: Build) -> None:
    bus = bus_of(MbusMeter(PAD))
    for data in ("0406 10270000", "0407 E8030000", "04FB00 64000000", "0C05 00001000"):
        assert await value_of(bus, data, ENERGY) == 10_000.0


@pytest.mark.parametrize(
    ("status", "values", "reasons"),
    [
        (0x00, [12.565], {}),
        (0x01, [None], {0: Reason.BUSY}),
        (0x02, [12.565], {0: Reason.DEVICE_DOUBT}),
        (0x03, [12.565], {}),  # an alarm: water runs, and is measured
        (0x04, [12.565], {}),  # battery low
        (0x08, [12.565], {0: Reason.DEVICE_DOUBT}),
        (0x10, [12.565], {0: Reason.DEVICE_DOUBT}),
        (0xE0, [12.565], {}),  # the maker's own
    ],
)
async def test_the_meters_own_doubt_goes_on_its_values_and_a_busy_one_gives_none(
    bus_of: Build, status: int, values: list[float | None], reasons: dict[int, Reason]
) -> None:
    data = bytearray.fromhex(PAD)
    data[9] = status
    bus = bus_of(MbusMeter(bytes(data)))
    points = (
        P(name="v", unit="m3", quantity="volume"),
        P(name="status", quantity="status", type=ValueType.U8),
    )
    scan = await read_once(driver_of(bus, *points))
    assert scan.values == [*values, status]
    assert scan.reasons == reasons


@pytest.mark.parametrize(
    ("ci", "data", "reason"),
    [
        (0x70, "08", Reason.BUSY),  # libmbus application_busy
        (0x70, "", Reason.EXCEPTION),  # libmbus error: unspecified
        (0x70, "04", Reason.EXCEPTION),  # libmbus premature_end_of_record
        (0x73, "78563412 0A 00 E97E 01000000 35010000", Reason.DECODE),  # fixed structure: manual_frame2
        (0x72, "7856", Reason.FRAMING),
        (0x7A, "55 00 1005 11223344", Reason.DECRYPT),
    ],
)
async def test_what_is_no_readout_is_a_reason_on_every_point(
    bus_of: Build, ci: int, data: str, reason: Reason
) -> None:
    meter = MbusMeter(data)
    meter.ci = ci
    scan = await read_once(driver_of(bus_of(meter), ENERGY, P(name="v", quantity="volume")))
    assert (scan.values, scan.reasons) == ([None, None], {0: reason, 1: reason})


# ------------------------------------------------------------------------------------------------------------ the link


async def test_all_telegrams_of_a_readout_are_fetched_and_a_repeated_question_skips_none(
    bus_of: Build,
) -> None:
    meter = MbusMeter(HEAD + "0406 01000000 1F", HEAD + "4406 02000000 1F", HEAD + "0413 03000000 0F AABB")
    bus = bus_of(meter)
    points = (
        ENERGY,
        P(name="due", unit="kWh", quantity="energy", storage=1),
        P(name="v", unit="l", quantity="volume"),
        P(name="third", unit="l", record=3),
    )
    async with opened(driver_of(bus, *points)) as driver:
        for _ in range(2):
            assert (await driver.read(points)).values == [1.0, 2.0, 3.0, 3.0]
        bus.asked.clear()
        meter.damage, meter.damaged = lambda frame: frame[:-2] + bytes([frame[-2] ^ 1]) + frame[-1:], 2
        assert (await driver.read(points)).values == [1.0, 2.0, 3.0, 3.0]
    # Damaged twice: asked three times with the same frame count bit, then on with the other.
    assert [asked[2:4] for asked in bus.asked] == ["40", "7b", "7b", "7b", "5b", "7b"]


async def test_a_meter_that_begins_again_without_end_is_read_once(bus_of: Build) -> None:
    """Its last telegram says that more follow, and then comes the first."""
    meter = MbusMeter(HEAD + "0406 01000000 1F", HEAD + "0413 02000000 1F")
    points = (ENERGY, P(name="v", unit="l", quantity="volume"), P(name="later", unit="K", record=3))
    bus = bus_of(meter)
    scan = await read_once(driver_of(bus, *points))
    assert (scan.values, scan.reasons) == ([1.0, 2.0, None], {2: Reason.MISSING})
    bus.asked.clear()
    scan = await read_once(driver_of(bus, *points, telegrams=1))
    assert (scan.values, scan.reasons) == ([1.0, None, None], {1: Reason.MISSING, 2: Reason.MISSING})
    assert [asked[2:4] for asked in bus.asked] == ["40", "40", "7b"]


async def test_a_meter_never_takes_a_new_question_for_a_repeated_one(bus_of: Build) -> None:
    """It would answer with its last telegram, and an old value would get a new time."""
    meter = MbusMeter(HEAD + "0406 01000000")
    async with opened(driver_of(bus_of(meter))) as driver:
        for count in range(1, 6):
            meter.telegrams = [bytes.fromhex(f"{HEAD}0406 {count:02X}000000")]
            assert (await driver.read(driver.points)).values == [float(count)]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda frame: frame[:20] + bytes([frame[20] ^ 4]) + frame[21:], Reason.CRC),
        (lambda frame: frame[:-1] + b"\x17", Reason.FRAMING),
        (lambda frame: frame[:-5], Reason.FRAMING),
        (lambda frame: b"\x68\x1f\x1e" + frame[3:], Reason.FRAMING),
        (lambda frame: rsp_ud(frame[7:-2], address=2), Reason.FRAMING),  # somebody else's
        (lambda frame: rsp_ud(frame[7:-2], control=0x53), Reason.FRAMING),  # no reply's C field
    ],
)
async def test_a_damaged_or_foreign_telegram_is_never_a_value(
    bus_of: Build, damage: Callable[[bytes], bytes], reason: Reason
) -> None:
    meter = MbusMeter(PAD)
    meter.damage = damage
    point = P(name="v", unit="m3", quantity="volume")
    async with opened(driver_of(bus_of(meter), point)) as driver:
        meter.damaged = 3
        scan = await driver.read(driver.points)
        assert (scan.values, scan.reasons) == ([None], {0: reason})
        assert (await driver.read(driver.points)).values == [12.565]


async def test_an_echoing_converter_and_noise_before_a_telegram_do_no_harm(bus_of: Build) -> None:
    meter = MbusMeter(PAD)
    bus = bus_of(meter)
    bus.echo = True
    meter.damage = lambda frame: b"\x00\x68\xff\x10" + frame
    point = P(name="v", unit="m3", quantity="volume")
    async with opened(driver_of(bus, point)) as driver:
        meter.damaged = 1
        for _ in range(3):
            assert (await driver.read(driver.points)).values == [12.565]
    by_number = driver_of(bus, point, secondary="12345678")
    assert (await read_once(by_number)).values == [12.565]


async def test_a_silent_meter_is_unreachable_and_a_lost_question_is_repeated(bus_of: Build) -> None:
    meter = MbusMeter(PAD)
    async with opened(driver_of(bus_of(meter), P(name="v", unit="m3", quantity="volume"))) as driver:
        meter.deaf = 2
        assert (await driver.read(driver.points)).values == [12.565]
        meter.silent = True
        with pytest.raises(DeviceUnreachable, match="asked 3 times: it does not answer") as silent:
            await driver.read(driver.points)
        assert silent.value.reason is Reason.TIMEOUT
        meter.silent = False
        assert (await driver.read(driver.points)).values == [12.565]


@pytest.mark.parametrize(
    "secondary", ["12345678", "1234567824400107", "F2345678FFFFFFFF", "FFFFFFFFFFFF0107", "ffffffff2440ffff"]
)
async def test_a_meter_is_selected_by_its_secondary_address(bus_of: Build, secondary: str) -> None:
    other = MbusMeter(POLLUCOM, address=0)
    bus = bus_of(other, MbusMeter(PAD, address=0))
    point = P(name="v", unit="m3", quantity="volume")
    wanted = driver_of(bus, point, secondary=secondary)
    both = driver_of(bus, point, secondary="63940045")
    async with opened(wanted), opened(both):
        for _ in range(2):
            assert (await wanted.read([point])).values == [12.565]
            assert (await both.read([point])).values == [1621.119]
    assert wanted.line() == both.line()


async def test_the_selection_is_sent_as_documented() -> None:
    """m-bus.com/documentation-wired, 7.1: 68h 0Bh 0Bh 68h 53h FDh 52h ID1-4 Man1-2 Gen Med CS 16h."""
    sent = mbus_link.select(mbus_link.secondary("12345678") or b"")
    assert sent.hex(" ") == "68 0b 0b 68 53 fd 52 78 56 34 12 ff ff ff ff b2 16"


async def test_wildcards_that_fit_two_meters_never_give_a_value(bus_of: Build) -> None:
    bus = bus_of(MbusMeter(POLLUCOM, address=0), MbusMeter(PAD, address=0))
    scan = await read_once(driver_of(bus, P(name="v", unit="m3", quantity="volume"), secondary="FFFFFFFF"))
    assert scan.values == [None]
    assert scan.reasons[0] in (Reason.CRC, Reason.FRAMING)


async def test_a_meter_that_answers_for_another_number_is_none(bus_of: Build) -> None:
    """One that stays selected, or answers to 253 whoever is meant."""
    meter = MbusMeter(PAD)
    bus = bus_of(meter)
    driver = driver_of(bus, P(name="v", unit="m3", quantity="volume"), secondary="12345678")
    async with opened(driver):
        meter.damage = lambda frame: rsp_ud(bytes.fromhex(POLLUCOM))
        meter.damaged = 3
        scan = await driver.read(driver.points)
    assert scan.reasons == {0: Reason.FRAMING}


@pytest.mark.parametrize("speed", [300, 9600])
async def test_other_speeds(bus_of: Build, speed: int) -> None:
    bus = bus_of(MbusMeter(PAD), speed=speed)
    assert (await read_once(driver_of(bus, P(name="v", unit="l", quantity="volume"), baud=speed))).values == [
        12_565.0
    ]


async def test_a_meter_behind_a_gateway_is_read_and_found_again_when_the_gateway_was_gone() -> None:
    gateway = MbusGateway(MbusMeter(PAD), MbusMeter(POLLUCOM, address=2))
    await gateway.start()
    point = P(name="v", unit="m3", quantity="volume")
    one, two = driver_of(gateway, point), driver_of(gateway, point, address=2)
    try:
        async with opened(one), opened(two):
            assert (await one.read([point])).values == [12.565]
            assert (await two.read([point])).values == [1621.119]
            await gateway.stop()
            with pytest.raises(DeviceUnreachable):
                await one.read([point])
            with pytest.raises(DeviceUnreachable):
                await one.connect()
            await gateway.start()
            await one.connect()
            assert (await one.read([point])).values == [12.565]
            assert (await two.read([point])).values == [1621.119]
    finally:
        await gateway.stop()
    assert not serial_bus._buses
    assert one.line() == two.line()


async def test_on_a_port_that_was_pulled_out_it_is_read_again(bus_of: Build) -> None:
    bus = bus_of(MbusMeter(PAD))
    point = P(name="v", unit="m3", quantity="volume")
    async with opened(driver_of(bus, point)) as driver:
        for _ in range(3):
            assert (await driver.read([point])).values == [12.565]
            bus.peer.unplug()
            with pytest.raises(DeviceUnreachable):
                await driver.read([point])
            bus.peer.plug()
            await driver.connect()


# ------------------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"port": ""}, "one of the two"),
        ({"host": "h"}, "one of the two"),
        ({"address": None}, "one of the two"),
        ({"secondary": "12345678", "address": 1}, "one of the two"),
        ({"address": 251}, "0 to 250"),
        ({"secondary": "1234567"}, "8 digits"),
        ({"secondary": "1234567A"}, "8 digits"),
        ({"baud": 19200}, "300, 600, 1200"),
        ({"port": "usb:0403"}, "four hexadecimal digits"),
        ({"reply_timeout_ms": 1}, "20 to 60000"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        driver_of("", **options)


@pytest.mark.parametrize(
    ("point", "said"),
    [
        (P(name="x"), "names no record"),
        (P(name="x", quantity="enrgy"), "did you mean 'energy'"),
        (P(name="x", quantity="energy", vif="06"), "the vif alone"),
        (P(name="x", vif="zz"), "hexadecimal"),
        (P(name="x", record=0), "1 to 4000"),
        (P(name="x", quantity="energy", storage=-1), "storage is -1"),
        (P(name="x", quantity="energy", unit="kwh"), "it is in Wh, kWh, MWh"),
        (P(name="x", quantity="volume", unit="kWh"), "it is in m3"),
        (P(name="x", quantity="energy", unit="kWh", scale=0.001), "device_unit"),
        (P(name="x", quantity="status", record=1), "header"),
    ],
)
def test_points_that_cannot_be_are_refused(point: MbusPoint, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"point 'x'.*{said}"):
        driver_of("", point)


def test_without_its_library_it_is_refused_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(registry.TableError, match=r"pip install 'headgate\[mbus\]'"):
        registry.build("m", "mbus", {"port": "/dev/x", "address": 1}, [{"name": "e", "quantity": "energy"}])


def test_the_library_is_loaded_only_where_it_is_used_and_leaves_logging_alone() -> None:
    """Its import calls logging.basicConfig."""
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            ("import logging, sys\n"
            "from drivers.mbus import MbusDriver, MbusOptions, MbusPoint\n"
            "MbusDriver('m', MbusOptions(port='/dev/x', address=1), [MbusPoint(name='e', quantity='energy')])\n"
            "assert 'meterbus' not in sys.modules\n"
            "from drivers import mbus_records\n"
            "mbus_records.load()\n"
            "assert 'meterbus' in sys.modules\n"
            "root = logging.getLogger()\n"
            "print(root.handlers, logging.getLevelName(root.level))\n"),
        ],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert said.stdout.split() == ["[]", "WARNING"]


async def test_what_cannot_be_told_apart_is_said_in_the_log_once(
    bus_of: Build, caplog: pytest.LogCaptureFixture
) -> None:
    bus = bus_of(MbusMeter(HEAD + "0406 2A000000 0406 2B000000"))
    with caplog.at_level(logging.WARNING, "drivers.mbus"):
        async with opened(driver_of(bus)) as driver:
            for _ in range(3):
                assert (await driver.read(driver.points)).reasons == {0: Reason.DECODE}
    told = [record.getMessage() for record in caplog.records if record.name == "drivers.mbus"]
    assert len(told) == 1
    assert "record 1 (instantaneous energy); record 2 (instantaneous energy)" in told[0]


def test_every_key_stands_in_the_sample_with_its_default() -> None:
    sample = Path(mbus_link.__file__).with_name("mbus.toml").read_text()
    shown = tomllib.loads("\n".join(re.findall(r"^# (\w+ = .*)$", sample, re.MULTILINE)))
    options = {field.name: field.default for field in msgspec.structs.fields(MbusOptions)}
    own = {field.name: field.default for field in msgspec.structs.fields(P)[-8:]}
    assert next(iter(own)) == "quantity"
    assert shown.pop("reply_timeout_ms") == round(MbusOptions(port="x").timeout_s * 1000)
    assert shown.pop("record") == 1
    # Unset, they are the present value and the total.
    assert [shown.pop(key) for key in ("storage", "tariff", "subunit")] == [0, 0, 0]
    for key in ("port", "address", "reply_timeout_ms"):  # the sample sets the first two
        options.pop(key)
    for key in ("quantity", "record", "storage", "tariff", "subunit"):
        own.pop(key)
    assert shown == options | own


def test_two_on_one_line_with_other_settings_are_told_by_their_claims() -> None:
    assert driver_of("", baud=2400).line() != driver_of("", baud=300).line()
    assert driver_of("").line() == driver_of("", secondary="12345678").line()
    assert not driver_of("", address=254).line().shared


# -------------------------------------------------------------------------------------------------------- conformance


@pytest.mark.parametrize("check", conformance.PULL, ids=conformance.title)
async def test_the_driver_conforms(check: conformance.Check, bus_of: Build) -> None:
    meter = MbusMeter(PAD)
    bus = bus_of(meter, speed=9600)
    count = 0

    def change() -> None:
        nonlocal count
        count += 1
        meter.telegrams = [bytes.fromhex(f"{HEAD}0413 {count:02X}000000 0406 {count + 1:02X}000000")]

    def damage(how: Callable[[bytes], bytes] | None) -> Callable[[], None]:
        def inject() -> None:
            meter.damage, meter.damaged = how, 10**9 if how is not None else 0

        return inject

    def silence(*, on: bool) -> Callable[[], None]:
        return lambda: setattr(meter, "silent", on)

    change()
    points = (
        P(name="v", unit="l", quantity="volume", type=ValueType.U32),
        P(name="e", unit="kWh", quantity="energy", type=ValueType.U32),
    )
    healed = damage(None)
    await check(
        conformance.Subject(
            build=lambda: driver_of(bus, *points, baud=9600, reply_timeout_ms=100),
            absent=lambda: driver_of(bus, *points, baud=9600, address=9, reply_timeout_ms=100),
            change=change,
            truth=lambda: {"v": count, "e": count + 1},
            silence=conformance.Fault(silence(on=True), silence(on=False)),
            faults={
                "unplugged": conformance.Fault(bus.peer.unplug, bus.peer.plug),
                "a wrong sum": conformance.Fault(
                    damage(lambda f: f[:-2] + bytes([f[-2] ^ 1]) + f[-1:]), healed
                ),
                "cut short": conformance.Fault(damage(lambda f: f[:-4]), healed),
                "noise": conformance.Fault(damage(lambda f: f[::-1] * 5), healed),
                "another meter's": conformance.Fault(damage(lambda f: rsp_ud(f[7:-2], address=7)), healed),
            },
            try_s=2.0,
            peer_files=("pty_peer.py", "mbus_meter.py"),
        )
    )
