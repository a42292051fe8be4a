"""`iec62056` against a meter on a pty that hears and speaks at one speed at a time."""

from __future__ import annotations

import asyncio
import re
import tomllib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from drivers import conformance, iec62056, serial_bus
from drivers.contract import ConfigError, DeviceUnreachable, Reason, Scan, ValueType, boot_ns
from drivers.iec62056 import (
    Iec62056Driver,
    Iec62056Options,
    Iec62056Point,
    acknowledgement,
    block_size,
    data_block,
    identification,
    sign_on,
)
from drivers.obis import DataSets, code
from tests.fakes.meters import E350, IecMeter

P = Iec62056Point
POINTS = (
    P(name="import", obis="1.8.0", unit="kWh"),
    P(name="voltage", obis="32.7", unit="V"),
    P(name="serial", obis="C.1.0", type=ValueType.STR),
    P(name="gone", obis="99.8.0"),
)


@pytest.fixture
async def meter(tmp_path: Path) -> AsyncIterator[IecMeter]:
    meter = IecMeter(tmp_path / "meter")
    try:
        yield meter
    finally:
        meter.peer.unplug()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The standard's reaction and silence times are seconds; the meter here is as quick as its driver."""
    monkeypatch.setattr(iec62056, "_REACTION_S", 0.005)
    monkeypatch.setattr(iec62056, "_BETWEEN_S", 0.15)
    yield
    assert not serial_bus._buses


def driver_of(meter: IecMeter, **options: object) -> Iec62056Driver:
    table = {"port": meter.peer.port, "reply_timeout_ms": 1000, **options}
    return Iec62056Driver("meter", msgspec.convert(table, Iec62056Options), POINTS)


@asynccontextmanager
async def opened(driver: Iec62056Driver) -> AsyncIterator[Iec62056Driver]:
    await driver.connect()
    try:
        yield driver
    finally:
        await driver.close()


def judged(scan: Scan) -> None:
    """The E350's readout, as its points ask for it."""
    assert scan.values == [61561.289, 241.0, "13647123", None]
    assert scan.reasons == {3: Reason.MISSING}


# ---------------------------------------------------------------------------------------------------------- handshake


async def test_mode_c_agrees_on_the_meters_speed_and_goes_back(meter: IecMeter) -> None:
    meter.identification = "/LGZ5ZMF100AC.M26"
    async with opened(driver_of(meter)) as driver:
        before_ns = boot_ns()
        scan = await driver.read(driver.points)
        judged(scan)
        assert before_ns < scan.taken_at_ns < boot_ns()
        assert meter.peer.speed == 300
        judged(await driver.read(driver.points))
        assert driver.identification is not None
        assert (driver.identification.maker, driver.identification.type) == ("LGZ", "ZMF100AC.M26")
    assert list(meter.speeds) == [9600, 9600]
    heard = [(speed, said) for speed, said in meter.peer.log if said.strip(b"\0")]
    assert heard[:2] == [
        (300, b"/?!\r\n"),
        (300, b"\x06050\r\n"),
    ]  # the acknowledgement, still at the old speed


@pytest.mark.parametrize(
    ("letter", "options", "speed"),
    [
        ("0", {}, 300),
        ("6", {}, 19200),
        ("6", {"max_baud": 4800}, 300),
        ("5", {"mode": "c"}, 9600),
        ("B", {}, 1200),  # mode B: the meter changes by itself
        (" ", {}, 300),  # mode A
        (" ", {"mode": "a"}, 300),
    ],
)
async def test_the_driver_follows_the_meters_mode(
    meter: IecMeter, letter: str, options: dict[str, object], speed: int
) -> None:
    meter.identification = f"/ABC{letter}METER"
    async with opened(driver_of(meter, **options)) as driver:
        judged(await driver.read(driver.points))
    assert list(meter.speeds) == [speed]
    acknowledged = [said for _, said in meter.peer.log if said.startswith(b"\x06")]
    assert bool(acknowledged) is letter.isdigit()


async def test_an_address_is_called_and_another_meter_keeps_silent(meter: IecMeter) -> None:
    meter.address = "00123"
    async with opened(driver_of(meter, address="00123")) as driver:
        judged(await driver.read(driver.points))
    async with opened(driver_of(meter, address="7", reply_timeout_ms=150)) as driver:
        with pytest.raises(DeviceUnreachable, match="no identification") as silent:
            await driver.read(driver.points)
    assert silent.value.reason is Reason.TIMEOUT
    assert meter.sessions == 1


async def test_an_echoing_head_and_a_head_without_parity_are_read_alike(meter: IecMeter) -> None:
    meter.echo = True
    async with opened(driver_of(meter)) as driver:
        judged(await driver.read(driver.points))
    meter.parity_bit = True
    async with opened(driver_of(meter, data_bits=8, parity="none")) as driver:
        judged(await driver.read(driver.points))
    assert (300, b"\xaf\x3f\x21\x8d\x0a") in meter.peer.log  # "/?!" CR LF with even parity in the eighth bit


async def test_a_sleeping_meter_is_woken(meter: IecMeter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iec62056, "_WAKE_PAUSE_S", 0.01)
    async with opened(driver_of(meter, wake_up_ms=100)) as driver:
        judged(await driver.read(driver.points))
    assert (
        sum(said.count(0) for _, said in meter.peer.log) == 3
    )  # 100 ms of characters of 10 bits at 300 baud


# ------------------------------------------------------------------------------------------------------------- faults


async def test_a_wrong_check_is_crc_on_every_point_and_the_next_readout_is_read(meter: IecMeter) -> None:
    async with opened(driver_of(meter)) as driver:
        meter.break_check = True
        scan = await driver.read(driver.points)
        assert scan.values == [None] * 4
        assert set(scan.reasons.values()) == {Reason.CRC}
        meter.break_check = False
        judged(await driver.read(driver.points))


async def test_a_readout_that_stops_is_said_and_the_next_session_is_clean(meter: IecMeter) -> None:
    async with opened(driver_of(meter)) as driver:
        meter.stop_after = 150
        with pytest.raises(DeviceUnreachable, match="stopped after 150 bytes") as stopped:
            await driver.read(driver.points)
        assert stopped.value.reason is Reason.FRAMING
        meter.stop_after = None
        judged(await driver.read(driver.points))


async def test_a_meter_that_is_still_sending_to_a_session_given_up_is_waited_out(meter: IecMeter) -> None:
    async with opened(driver_of(meter)) as driver:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.08):
                await driver.read(driver.points)
        judged(await driver.read(driver.points))


async def test_the_plug_is_pulled_in_a_session_and_put_back(meter: IecMeter) -> None:
    async with opened(driver_of(meter)) as driver:
        meter.peer.unplug()
        with pytest.raises(DeviceUnreachable, match="plugged in") as gone:
            await driver.read(driver.points)
        assert gone.value.retry_within_s
        with pytest.raises(DeviceUnreachable, match="no such port"):
            await driver.connect()
        meter.peer.plug()
        await driver.connect()
        judged(await driver.read(driver.points))


async def test_a_value_in_another_unit_is_no_value(meter: IecMeter) -> None:
    meter.readout = "1.8.0(061561289*Wh)\r\n32.7(241*V)\r\nC.1.0()\r\n!\r\n"
    async with opened(driver_of(meter)) as driver:
        scan = await driver.read(driver.points)
    assert scan.values == [None, 241.0, None, None]
    assert scan.reasons == {0: Reason.DECODE, 2: Reason.MISSING, 3: Reason.MISSING}


# ------------------------------------------------------------------------------------------------------------ deciding


def test_messages_are_as_the_standard_writes_them() -> None:
    assert sign_on("") == b"/?!\r\n"
    assert sign_on("12345678") == b"/?12345678!\r\n"
    assert acknowledgement("5") == b"\x06050\r\n"
    said = identification(b"/?!\r\n/ISk5MT174-0001\r\n")
    assert said is not None
    assert (said[0].maker, said[0].speed, said[0].type, said[0].fast) == ("ISk", "5", "MT174-0001", True)
    assert identification(b"/?!\r\n") is identification(b"/LGZ4ZMF") is None


def test_a_block_ends_with_the_character_after_etx_whatever_it_is() -> None:
    block = b"\x02F.F(00)\r\n!\r\n\x03"
    check = bytes([0x01])  # F.F(00) CR LF ! CR LF ETX, all in one by exclusive or, is counted out below
    total = 0
    for byte in block[1:]:
        total ^= byte
    assert block_size(block) == 0
    assert block_size(block + check + b"more") == len(block) + 1
    assert data_block(block + bytes([total]), checked=True) == "F.F(00)\r\n!\r\n"
    assert data_block(block + bytes([total ^ 4]), checked=True) is Reason.CRC
    assert data_block(block, checked=True) is Reason.FRAMING


def test_a_block_without_check_counts_only_where_that_is_allowed() -> None:
    heard = b"1.8.0(1*kWh)\r\n!\r\n"
    assert block_size(heard) == len(heard)
    assert data_block(heard, checked=True) is Reason.FRAMING
    assert data_block(heard, checked=False) == "1.8.0(1*kWh)\r\n"


def test_a_captured_readout_has_the_check_it_came_with() -> None:
    """A capture of an E350 that was published with its last two characters, ETX and 01."""
    assert data_block(b"/LGZ4ZMF100AC.M26\r\n\x02" + E350.encode() + b"\x03\x01", checked=True) == E350


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("1.8.0", ["1.0*kWh"]),
        ("1-0:1.8.0", ["1.0*kWh"]),
        ("1-0:1.8.0*255", ["1.0*kWh"]),
        ("1.8.0*01", ["0.9*kWh"]),
        ("1.8", ["1.0*kWh"]),
        ("1.8.1", None),
        ("1.6.0", ["0.5*kW", "2411231200"]),
        ("0.9.1", ["120000"]),
        ("C.1", ["77"]),
        ("C.1.0", ["77"]),
        ("2-0:1.8.0", None),
        ("0-1:24.2.1", ["101209112500W", "12785.123*m3"]),
        ("24.2.1", ["101209112500W", "12785.123*m3"]),
    ],
)
def test_a_code_finds_its_data_set_and_no_other(wanted: str, found: list[str] | None) -> None:
    sets = DataSets(
        "1.8.0*01(0.9*kWh)\r\n1.8.0(1.0*kWh)\r\n1.6.0(0.5*kW)(2411231200)\r\n0.9.1(120000)\r\nC.1.0(77)\r\n"
        "0-1:24.2.1(101209112500W)(12785.123*m3)\r\n"
    )
    assert sets.values(wanted) == found


@pytest.mark.parametrize("text", ["", "1", "1.8.0.0.0.0", "1:1.8.0", "kWh", "1.8.0*", "1-0:", "1000.8.0"])
def test_what_is_no_code_is_none(text: str) -> None:
    assert code(text) is None


# -------------------------------------------------------------------------------------------------------- conformance


@pytest.mark.parametrize("check", conformance.PULL, ids=conformance.title)
async def test_the_driver_conforms(check: conformance.Check, meter: IecMeter) -> None:
    def absent() -> Iec62056Driver:
        options = Iec62056Options(port=meter.peer.port + "-gone")
        return Iec62056Driver("gone", options, POINTS)

    meter.peer.unplug()
    quick = IecMeter(meter.peer.link, identification="/LGZ0ZMF100AC.M26", base=19200)
    try:
        await check(conformance.Subject(build=lambda: driver_of(quick, baud=19200), absent=absent))
    finally:
        quick.peer.unplug()


# ------------------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("options", "point", "text"),
    [
        ({"port": ""}, {"obis": "1.8.0"}, "options.port is empty"),
        ({"baud": 10}, {"obis": "1.8.0"}, "options.baud is 10"),
        ({"address": "a b"}, {"obis": "1.8.0"}, "letters and digits"),
        ({"address": "1" * 33}, {"obis": "1.8.0"}, "at most 32"),
        ({"data_bits": 8}, {"obis": "1.8.0"}, 'is given 8 and "none"'),
        ({"parity": "none"}, {"obis": "1.8.0"}, 'is given 8 and "none"'),
        ({}, {}, "names no code"),
        ({}, {"obis": "1,8,0"}, "is no code"),
        ({}, {"obis": "1.8.0", "column": 0}, "counted from 1"),
    ],
)
def test_what_can_never_work_is_refused_with_the_place(
    options: dict[str, object], point: dict[str, object], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        Iec62056Driver(
            "d",
            msgspec.convert({"port": "/dev/null", **options}, Iec62056Options),
            [msgspec.convert({"name": "p", **point}, Iec62056Point)],
        )


def test_a_meter_without_an_address_needs_its_line_alone() -> None:
    alone = Iec62056Driver("a", Iec62056Options(port="/dev/x"), POINTS).line()
    called = Iec62056Driver("b", Iec62056Options(port="/dev/x", address="7"), POINTS).line()
    assert (alone.key, alone.shared) == ("/dev/x", False)
    assert (called.settings, called.shared) == (alone.settings, True)


def test_every_key_stands_in_the_sample_with_its_default_and_the_sample_builds() -> None:
    sample = Path(iec62056.__file__).with_suffix(".toml").read_text()
    shown = tomllib.loads("\n".join(dict.fromkeys(re.findall(r"^# (\w+ = .*)$", sample, re.MULTILINE))))
    for kind in (Iec62056Options, Iec62056Point):
        for field in msgspec.structs.fields(kind):
            if field.name in msgspec.structs.asdict(P(name="x", obis="1.8.0")) and kind is Iec62056Options:
                continue
            if field.default is not msgspec.NODEFAULT and field.name in shown and field.default is not None:
                assert shown[field.name] == field.default, field.name
    assert {field.name for field in msgspec.structs.fields(Iec62056Options)} - {"port"} <= shown.keys()
    assert {"obis", "column", "base", "device_unit"} <= shown.keys()
    (device,) = tomllib.loads(sample)["device"]
    Iec62056Driver(
        "m",
        msgspec.convert(device["options"], Iec62056Options),
        msgspec.convert(device["point"], list[Iec62056Point]),
    )
