"""`sdi12` against sensors on a pty; expected values from the specification of version 1.4."""

from __future__ import annotations

import asyncio
import re
import tomllib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from drivers import conformance, sdi12, serial_bus
from drivers.contract import ConfigError, DeviceUnreachable, Reason, Scan, ValueType, boot_ns
from drivers.sdi12 import (
    Sdi12Driver,
    Sdi12Options,
    Sdi12Point,
    answer_in,
    check_characters,
    identity,
    promise,
    values,
)
from tests.fakes.meters import Sdi12Bus, Sdi12Sensor

P = Sdi12Point
WAIT_S = 10
Build = Callable[..., Sdi12Bus]


@pytest.fixture
async def bus_of(tmp_path: Path) -> AsyncIterator[Build]:
    built: list[Sdi12Bus] = []

    def build(*sensors: Sdi12Sensor) -> Sdi12Bus:
        built.append(Sdi12Bus(tmp_path / "bus", *sensors))
        return built[-1]

    yield build
    for bus in built:
        bus.peer.unplug()
    assert not serial_bus._buses


def driver_of(bus: Sdi12Bus, *points: Sdi12Point, **options: object) -> Sdi12Driver:
    table = {"port": bus.peer.port, "reply_timeout_ms": 300, **options}
    return Sdi12Driver("sensor", msgspec.convert(table, Sdi12Options), points or (P(name="x", value=1),))


@asynccontextmanager
async def opened(driver: Sdi12Driver) -> AsyncIterator[Sdi12Driver]:
    await driver.connect()
    try:
        yield driver
    finally:
        await driver.close()


async def read(driver: Sdi12Driver) -> Scan:
    async with asyncio.timeout(WAIT_S):
        return await driver.read(driver.points)


# -------------------------------------------------------------------------------------------------------- measurements


async def test_a_measurement_that_is_ready_at_once_is_fetched(bus_of: Build) -> None:
    bus = bus_of(Sdi12Sensor("0", "+3.14"))
    async with opened(driver_of(bus)) as driver:
        before_ns = boot_ns()
        scan = await read(driver)
        assert before_ns < scan.taken_at_ns < boot_ns()
        assert driver.identity is not None
        assert str(driver.identity) == "VENDOR MODEL 1.0 SN0042 (SDI-12 1.4)"
    assert (scan.values, scan.reasons) == ([3.14], {})
    assert list(bus.commands) == ["0I", "0M", "0D0"]


async def test_a_sensor_that_takes_its_time_is_waited_for_until_its_service_request(bus_of: Build) -> None:
    sensor = Sdi12Sensor("0", "+1.11-2.22", wait_s=60)
    bus = bus_of(sensor)
    async with opened(driver_of(bus, P(name="b", value=2), P(name="a", value=1))) as driver:
        scan = await read(driver)
    assert scan.values == [-2.22, 1.11]


async def test_a_lost_service_request_costs_only_the_time_that_the_sensor_said(bus_of: Build) -> None:
    sensor = Sdi12Sensor("0", "+1", wait_s=1)
    sensor.service_after_s = None
    async with opened(driver_of(bus_of(sensor))) as driver:
        assert (await read(driver)).values == [1.0]


async def test_values_that_do_not_fit_one_answer_are_fetched_with_the_next(bus_of: Build) -> None:
    """The specification's example of 9 values, 4.4.12.3 c."""
    sensor = Sdi12Sensor("0")
    sensor.groups = ["+1.11+2.22+3.33+4.44+5.55+6.66", "+7.77+8.88+9.99"]
    sensor.count = 9
    bus = bus_of(sensor)
    points = [P(name=f"v{n}", value=n) for n in range(1, 10)]
    async with opened(driver_of(bus, *points, crc=True)) as driver:
        scan = await read(driver)
    assert scan.values == [1.11, 2.22, 3.33, 4.44, 5.55, 6.66, 7.77, 8.88, 9.99]
    assert list(bus.commands) == ["0I", "0MC", "0D0", "0D1"]


@pytest.mark.parametrize(
    ("command", "crc", "asked"),
    [
        ("M", False, ["0M", "0D0"]),
        ("M3", True, ["0MC3", "0D0"]),
        ("C", False, ["0C", "0D0"]),
        ("C9", True, ["0CC9", "0D0"]),
        ("R0", False, ["0R0"]),
        ("R0", True, ["0RC0"]),
    ],
)
async def test_each_way_to_measure(bus_of: Build, command: str, crc: bool, asked: list[str]) -> None:
    bus = bus_of(Sdi12Sensor("0", "+3.14+2.718"))
    points = (P(name="a", value=1), P(name="b", value=2), P(name="c", value=3))
    async with opened(driver_of(bus, *points, command=command, crc=crc)) as driver:
        scan = await read(driver)
    assert scan.values == [3.14, 2.718, None]
    assert scan.reasons == {2: Reason.MISSING}
    assert list(bus.commands)[1:] == asked


async def test_while_one_measures_concurrently_another_is_read(bus_of: Build) -> None:
    slow, quick = Sdi12Sensor("X", "+1+2+3+4+5", wait_s=1), Sdi12Sensor("Y", "+6")
    bus = bus_of(slow, quick)
    one = driver_of(bus, address="X", command="C")
    other = driver_of(bus, address="Y", command="C")
    async with opened(one), opened(other):
        waiting = asyncio.create_task(read(one))
        while "XC" not in bus.commands:  # noqa: ASYNC110 - what is awaited is on the other side of a pty
            await asyncio.sleep(0.005)
        assert (await read(other)).values == [6.0]
        assert not waiting.done()
        assert (await waiting).values == [1.0]
    assert [said for said in bus.commands if "I" not in said] == ["XC", "YC", "YD0", "XD0"]


async def test_two_sensors_of_one_bus_take_turns(bus_of: Build) -> None:
    bus = bus_of(Sdi12Sensor("0", "+1", wait_s=5), Sdi12Sensor("1", "+2", wait_s=5))
    zero, one = driver_of(bus, address="0"), driver_of(bus, address="1")
    async with opened(zero), opened(one):
        for _ in range(5):
            got = await asyncio.gather(read(zero), read(one))
            assert [scan.values for scan in got] == [[1.0], [2.0]]


# -------------------------------------------------------------------------------------------------------------- faults


async def test_an_answer_that_gets_lost_is_asked_for_again(bus_of: Build) -> None:
    sensor = Sdi12Sensor("0", "+3.14")
    async with opened(driver_of(bus_of(sensor))) as driver:
        sensor.deaf = 2
        assert (await read(driver)).values == [3.14]


async def test_a_damaged_check_is_asked_for_again_and_after_three_times_said(bus_of: Build) -> None:
    sensor = Sdi12Sensor("0", "+3.14")
    async with opened(driver_of(bus_of(sensor), crc=True)) as driver:
        sensor.break_crc = 2
        assert (await read(driver)).values == [3.14]
        sensor.break_crc = 3
        scan = await read(driver)
        assert (scan.values, scan.reasons) == ([None], {0: Reason.CRC})
        assert (await read(driver)).values == [3.14]


async def test_a_sensor_that_cannot_measure_says_so_and_never_gives_zero(bus_of: Build) -> None:
    sensor = Sdi12Sensor("0", "")
    async with opened(driver_of(bus_of(sensor))) as driver:
        scan = await read(driver)
        assert (scan.values, scan.reasons) == ([None], {0: Reason.EXCEPTION})
        sensor.count = 1  # promises one, and then has none
        scan = await read(driver)
        assert (scan.values, scan.reasons) == ([None], {0: Reason.MISSING})
        sensor.groups = ["+3.1x4"]
        scan = await read(driver)
        assert (scan.values, scan.reasons) == ([None], {0: Reason.FRAMING})


async def test_a_silent_sensor_is_unreachable_and_comes_back(bus_of: Build) -> None:
    sensor = Sdi12Sensor("0", "+3.14")
    async with opened(driver_of(bus_of(sensor), reply_timeout_ms=50)) as driver:
        sensor.silent = True
        with pytest.raises(DeviceUnreachable, match="was asked 0M! 3 times: it does not answer") as silent:
            await read(driver)
        assert silent.value.reason is Reason.TIMEOUT
        sensor.silent = False
        assert (await read(driver)).values == [3.14]


async def test_another_sensors_answer_is_never_taken(bus_of: Build) -> None:
    bus = bus_of(Sdi12Sensor("0", "+3.14"))
    async with opened(driver_of(bus)) as driver:
        bus.sensors["0"].answer = lambda command, later: "9+666\r\n"  # type: ignore[method-assign]
        bus._say = lambda text: bus.peer.say(text[1:].encode())  # type: ignore[method-assign]
        scan = await read(driver)
    assert (scan.values, scan.reasons) == ([None], {0: Reason.FRAMING})


async def test_an_adapter_that_hears_itself_and_one_without_parity_are_read_alike(bus_of: Build) -> None:
    bus = bus_of(Sdi12Sensor("0", "+3.14"))
    bus.echo = True
    async with opened(driver_of(bus)) as driver:
        assert (await read(driver)).values == [3.14]
    bus.parity_bit = True
    async with opened(driver_of(bus, data_bits=8, parity="none")) as driver:
        assert (await read(driver)).values == [3.14]


async def test_an_adapter_with_a_processor_is_sent_plain_characters(bus_of: Build) -> None:
    bus = bus_of(Sdi12Sensor("1", "+3.14"))
    bus.processor_baud = 9600
    table = {"address": "1", "baud": 9600, "data_bits": 8, "parity": "none", "break_ms": 0}
    async with opened(driver_of(bus, **table)) as driver:
        assert driver.identity is not None
        assert (await read(driver)).values == [3.14]


async def test_a_digit_that_was_damaged_on_the_way_is_seen_by_its_parity(bus_of: Build) -> None:
    """`+3.14` with one bit flipped is `+3.15`; there is no other check."""
    bus = bus_of(Sdi12Sensor("0", "+3.14"))
    bus.parity_bit = True
    async with opened(
        driver_of(bus, P(name="x", value=1), data_bits=8, parity="none", command="R0")
    ) as driver:
        bus.flip, bus.flips = 0x01, 2
        assert (await read(driver)).values == [3.14]  # asked for again, and again
        bus.flips = 3
        scan = await read(driver)
    assert (scan.values, scan.reasons) == ([None], {0: Reason.FRAMING})


async def test_every_command_is_led_by_a_break_unless_the_adapter_makes_it(
    bus_of: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pty carries no break: what is asked of the port is looked at instead."""
    breaks: list[float] = []
    send_break = serial_bus.Wire.send_break

    async def counted(self: serial_bus.Wire, duration_s: float) -> None:
        breaks.append(duration_s)
        await send_break(self, duration_s)

    monkeypatch.setattr(serial_bus.Wire, "send_break", counted)
    bus = bus_of(Sdi12Sensor("0", "+3.14"))
    async with opened(driver_of(bus)) as driver:
        await read(driver)
    assert breaks == [0.015] * 3
    async with opened(driver_of(bus, break_ms=0)) as driver:
        await read(driver)
    assert len(breaks) == 3


async def test_the_plug_is_pulled_and_put_back(bus_of: Build) -> None:
    bus = bus_of(Sdi12Sensor("0", "+3.14"))
    async with opened(driver_of(bus)) as driver:
        bus.peer.unplug()
        with pytest.raises(DeviceUnreachable, match=r"plugged in|no such port"):
            await read(driver)
        with pytest.raises(DeviceUnreachable, match="no such port"):
            await driver.connect()
        bus.peer.plug()
        await driver.connect()
        assert (await read(driver)).values == [3.14]


async def test_the_sensors_of_a_bus_are_found_by_asking_each_address(bus_of: Build) -> None:
    bus = bus_of(Sdi12Sensor("0", "+1"), Sdi12Sensor("b", "+2"))
    options = Sdi12Options(port=bus.peer.port, reply_timeout_ms=60)
    found = [one async for one in Sdi12Driver.identify(bus.peer.port, options, "0ab")]
    assert [one.options["address"] for one in found] == ["0", "b"]
    assert found[0].description == "VENDOR MODEL 1.0 SN0042 (SDI-12 1.4)"


# ------------------------------------------------------------------------------------------------------------ deciding


@pytest.mark.parametrize(
    "answer",
    [
        # SDI-12 1.4, 4.4.12.3 a to d, and 4.4.8.1
        b"0+3.14OqZ",
        b"0+3.14+2.718+1.414Ipz",
        b"0+1.11+2.22+3.33+4.44+5.55+6.66I]q",
        b"0+7.77+8.88+9.99IvW",
        b"0+3.14+2.718IWO",
        b"0AP@",
    ],
)
def test_the_check_is_that_of_the_specifications_examples(answer: bytes) -> None:
    assert check_characters(answer[:-3]) == answer[-3:]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("+3.14", ["+3.14"]),
        ("+3.14-2.718+1", ["+3.14", "-2.718", "+1"]),
        ("", []),
        ("+1.", ["+1."]),
        ("-.5", ["-.5"]),
        ("3.14", None),
        ("+3.14 ", None),
        ("+3.14+", None),
        ("+1e5", None),
    ],
)
def test_values_are_told_by_their_signs(answer: str, found: list[str] | None) -> None:
    assert values(answer) == found


def test_promises_and_identities_read_as_the_specification_writes_them() -> None:
    assert promise("0013") == (1, 3)  # 00013 of sensor 0: in 1 s, 3 values
    assert promise("00105") == (1, 5)
    assert promise("013") is promise("x013") is None
    said = identity("013NRSYSINC1000001.2101")  # the specification's example of aI!, 4.4.2
    assert said is not None
    assert (said.version, said.vendor, said.model, said.sensor_version, said.extra) == (
        "13",
        "NRSYSINC",
        "100000",
        "1.2",
        "101",
    )
    assert identity("013NRS") is None


def test_an_answer_is_told_from_the_echo_and_the_break_before_it() -> None:
    assert answer_in(b"\x000M!00013\r\nrest", b"0M!") == (b"00013", 11)
    assert answer_in(b"\x0000013\r\n", b"0M!") == (b"00013", 8)
    assert answer_in(b"0M!00013\r", b"0M!") is None


# -------------------------------------------------------------------------------------------------------- conformance


@pytest.mark.parametrize("check", conformance.PULL, ids=conformance.title)
async def test_the_driver_conforms(check: conformance.Check, bus_of: Build) -> None:
    bus = bus_of(Sdi12Sensor("0", "+3.14"))

    def absent() -> Sdi12Driver:
        return Sdi12Driver("gone", Sdi12Options(port=bus.peer.port, address="9", reply_timeout_ms=50), POINTS)

    await check(
        conformance.Subject(build=lambda: driver_of(bus, *POINTS, break_ms=0, command="R0"), absent=absent)
    )


POINTS = (P(name="a", value=1), P(name="b", value=2))


# ------------------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("options", "point", "text"),
    [
        ({"port": ""}, {}, "options.port is empty"),
        ({"baud": 10}, {}, "options.baud is 10"),
        ({"break_ms": 5}, {}, "wakes at 12 and more"),
        ({"data_bits": 8}, {}, "8 data bits with parity"),
        ({"parity": "none"}, {}, "7 data bits with parity"),
        ({"address": "?"}, {}, "one of 0-9, a-z, A-Z"),
        ({"address": "10"}, {}, "one of 0-9, a-z, A-Z"),
        ({"command": "V"}, {}, "it is M, M1 to M9"),
        ({"command": "M0"}, {}, "it is M, M1 to M9"),
        ({}, {"value": 0}, "gives values 1 to 9"),
        ({}, {"value": 10}, "gives values 1 to 9"),
        ({"command": "C"}, {"value": 100}, "gives values 1 to 99"),
    ],
)
def test_what_can_never_work_is_refused_with_the_place(
    options: dict[str, object], point: dict[str, object], text: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        Sdi12Driver(
            "d",
            msgspec.convert({"port": "/dev/null", **options}, Sdi12Options),
            [msgspec.convert({"name": "p", "value": 1, **point}, Sdi12Point)],
        )


def test_sensors_share_their_line() -> None:
    claim = driver_at("/dev/x").line()
    assert (claim.key, claim.shared) == ("/dev/x", True)
    assert claim == driver_at("/dev/x", address="1").line()
    assert claim.settings != driver_at("/dev/x", baud=9600).line().settings


def driver_at(port: str, **options: object) -> Sdi12Driver:
    return Sdi12Driver("d", msgspec.convert({"port": port, **options}, Sdi12Options), POINTS)


def test_every_key_stands_in_the_sample_with_its_default_and_the_sample_builds() -> None:
    sample = Path(sdi12.__file__).with_suffix(".toml").read_text()
    shown = tomllib.loads("\n".join(dict.fromkeys(re.findall(r"^# (\w+ = .*)$", sample, re.MULTILINE))))
    options = {field.name: field.default for field in msgspec.structs.fields(Sdi12Options)}
    options.pop("port")
    assert shown == options
    (device,) = tomllib.loads(sample)["device"]
    driver = Sdi12Driver(
        "s",
        msgspec.convert(device["options"], Sdi12Options),
        msgspec.convert(device["point"], list[Sdi12Point]),
    )
    assert [point.type for point in driver.points] == [ValueType.F64] * 2
