"""Modbus against pymodbus' own server (TCP, RTU over TCP, RTU on a pty) and against slaves that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import struct
import tomllib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
import pytest
import serial
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pymodbus.constants import ExcCodes

from agent.validation import Rules
from drivers import conformance, modbus
from drivers.contract import (
    ConfigError,
    DeviceUnreachable,
    Driver,
    Point,
    PointRefused,
    Reason,
    Scan,
    Value,
    boot_ns,
)
from drivers.modbus import ModbusDriver, ModbusOptions, ModbusPoint
from drivers.modbus_line import Line
from drivers.modbus_plan import Cost, Table
from drivers.registry import build
from tests.fakes.modbus_peer import Peer, ScriptedSlave, ScriptedTcp, Unit, rtu_peer, tcp_peer
from tests.fakes.modbus_wilful import Whim, WilfulTcp

FLOAT = list(struct.unpack(">HH", struct.pack(">f", 3.5)))


def words(fmt: str, *values: float) -> list[int]:
    raw = struct.pack(">" + fmt, *values)
    return list(struct.unpack(f">{len(raw) // 2}H", raw))


def point(name: str, register: int, type_: str = "u16", **keys: object) -> dict[str, object]:
    return {"name": name, "register": register, "type": type_, **keys}


def registers(*numbers: int) -> list[dict[str, object]]:
    return [point(f"r{n}", n) for n in numbers]


@contextlib.asynccontextmanager
async def connected(
    points: Sequence[dict[str, object]], **options: object
) -> AsyncIterator[Driver[ModbusOptions, ModbusPoint]]:
    driver = build(
        "boiler", "modbus", {"host": "127.0.0.1", **options} if "serial" not in options else options, points
    )
    assert isinstance(driver, ModbusDriver)
    try:
        await driver.connect()
        yield driver
    finally:
        await driver.close()


def told(scan: Scan) -> dict[str, Value | Reason | None]:
    """Each point's value, or the reason why it has none."""
    assert len(scan.values) == len(scan.points)
    return {
        p.name: scan.reasons.get(i, v) for i, (p, v) in enumerate(zip(scan.points, scan.values, strict=True))
    }


# ------------------------------------------------------------------------------------------ reading


@contextlib.asynccontextmanager
async def plant(kind: str, unit: Unit, number: int = 1) -> AsyncIterator[tuple[Peer, dict[str, object]]]:
    if kind == "rtu":
        async with rtu_peer({number: unit}) as peer:
            yield peer, {"serial": peer.path, "baud": 115200, "parity": "none", "unit": number}
        return
    async with tcp_peer({number: unit}, rtu=kind == "rtu_over_tcp") as peer:
        yield peer, {"port": peer.port, "framing": kind, "unit": number}


@pytest.mark.parametrize("kind", ["tcp", "rtu", "rtu_over_tcp"])
async def test_all_tables_and_types_are_read_with_one_request_a_table(kind: str) -> None:
    unit = Unit(
        holding=[7, 65535, *FLOAT, *words("d", -2.25), *words("q", -9), 0x4865, 0x6C6F, 0x8001],
        input=[*words("f", 1.5)[::-1], 42],
        coils=[True, False, False, True],
        discrete=[False, True],
    )
    points = [
        point("u16", 0),
        point("i16", 1, "i16"),
        point("f32", 2, "f32"),
        point("f64", 4, "f64"),
        point("i64", 8, "i64"),
        point("text", 12, "str", length=4),
        point("bit15", 14, "bool", bit=15),
        point("bit1", 14, bit=1),
        point("swapped", 0, "f32", table="input", order="CDAB"),
        point("answer", 2, table="input"),
        point("coil", 3, table="coil"),
        point("contact", 1, "bool", table="discrete"),
    ]
    async with plant(kind, unit, 17) as (peer, options), connected(points, **options) as driver:
        scan = await driver.read(driver.points)
        assert scan.values == [7, -1, 3.5, -2.25, -9, "Helo", True, False, 1.5, 42, True, True]
        assert scan.reasons == {}
        assert sorted(peer.asked) == [(17, 1, 3, 1), (17, 2, 1, 1), (17, 3, 0, 15), (17, 4, 0, 3)]


async def test_a_hundred_and_twenty_five_registers_are_one_request_and_a_later_read_sees_new_values() -> None:
    unit = Unit(holding=list(range(200)))
    async with tcp_peer({1: unit}) as peer, connected(registers(*range(125)), port=peer.port) as driver:
        assert list((await driver.read(driver.points)).values) == list(range(125))
        unit.holding[3] = 999
        assert (await driver.read(driver.points)).values[3] == 999
        assert peer.asked == [(1, 3, 0, 125)] * 2


async def test_points_are_read_in_the_order_asked_whatever_their_addresses() -> None:
    async with (
        tcp_peer({1: Unit(holding=list(range(400)))}) as peer,
        connected(registers(300, 5, 299, 1, 150), port=peer.port) as driver,
    ):
        assert list((await driver.read(driver.points)).values) == [300, 5, 299, 1, 150]
        assert list((await driver.read(driver.points[::-1])).values) == [150, 1, 299, 5, 300]
        assert list((await driver.read(driver.points[3:4])).values) == [1]


async def test_a_scan_is_stamped_when_its_last_reply_arrives() -> None:
    async with ScriptedTcp(late_s=0.15) as peer, connected(registers(0, 200), port=peer.port) as driver:
        peer.script = ["late", "late"]
        begun_ns = boot_ns()
        scan = await driver.read(driver.points)
        assert scan.taken_at_ns - begun_ns >= 0.28e9
        assert boot_ns() - scan.taken_at_ns < 0.1e9


async def test_a_block_that_gets_no_answer_does_not_move_the_time_of_those_that_did() -> None:
    async with ScriptedTcp() as peer, connected(registers(0, 200), port=peer.port, timeout_ms=300) as driver:
        peer.script = ["ok", "none"]
        scan = await driver.read(driver.points)
        assert told(scan) == {"r0": 0, "r200": Reason.TIMEOUT}
        assert boot_ns() - scan.taken_at_ns >= 0.25e9


# ------------------------------------------------------------------------------------- the device refuses


@pytest.mark.parametrize("code", [ExcCodes.DEVICE_BUSY, ExcCodes.DEVICE_FAILURE, ExcCodes.ILLEGAL_FUNCTION])
async def test_an_exception_is_a_reason_and_never_a_zero(code: ExcCodes) -> None:
    unit = Unit(holding=[5] * 300, judge=lambda function, address, count: code if address == 200 else None)
    async with tcp_peer({1: unit}) as peer, connected(registers(0, 200, 201), port=peer.port) as driver:
        scan = await driver.read(driver.points)
        reason = Reason.BUSY if code is ExcCodes.DEVICE_BUSY else Reason.EXCEPTION
        assert told(scan) == {"r0": 5, "r200": reason, "r201": reason}
        assert scan.values == [5, None, None]


async def test_a_refused_address_is_found_by_halving_and_all_others_stay_good() -> None:
    bad = {17, 90}

    def judge(function: int, address: int, count: int) -> ExcCodes | None:
        return ExcCodes.ILLEGAL_ADDRESS if bad & set(range(address, address + count)) else None

    async with (
        tcp_peer({1: Unit(holding=list(range(100)), judge=judge)}) as peer,
        connected(registers(*range(100)), port=peer.port) as driver,
    ):
        first = told(await driver.read(driver.points))
        assert {name for name, value in first.items() if value is Reason.REFUSED} == {"r17", "r90"}
        assert all(first[f"r{n}"] == n for n in range(100) if n not in bad)
        assert len(peer.asked) <= 4 * 7 + 1  # two searches of log2(100) halvings, both halves asked
        peer.asked.clear()
        assert told(await driver.read(driver.points)) == first
        assert sorted(peer.asked) == [
            (1, 3, 0, 17),
            (1, 3, 18, 72),
            (1, 3, 91, 9),
        ]  # joined around them, not asked again
        peer.asked.clear()
        await driver.connect()
        assert told(await driver.read(driver.points)) == first
        assert len(peer.asked) == 3


async def test_a_hole_the_device_refuses_is_read_around() -> None:
    def judge(function: int, address: int, count: int) -> ExcCodes | None:
        return ExcCodes.ILLEGAL_ADDRESS if address <= 5 < address + count else None

    async with (
        tcp_peer({1: Unit(holding=list(range(100)), judge=judge)}) as peer,
        connected(registers(0, 1, 9, 10), port=peer.port) as driver,
    ):
        for _ in range(3):
            assert told(await driver.read(driver.points)) == {"r0": 0, "r1": 1, "r9": 9, "r10": 10}
        peer.asked.clear()
        await driver.read(driver.points)
        assert peer.asked == [(1, 3, 0, 2), (1, 3, 9, 2)]


async def test_a_device_that_takes_shorter_requests_only_is_read_in_parts() -> None:
    def judge(function: int, address: int, count: int) -> ExcCodes | None:
        return ExcCodes.ILLEGAL_VALUE if count > 40 else None

    async with (
        tcp_peer({1: Unit(holding=list(range(125)), judge=judge)}) as peer,
        connected(registers(*range(125)), port=peer.port) as driver,
    ):
        for _ in range(3):
            assert list((await driver.read(driver.points)).values) == list(range(125))


async def test_a_gateway_that_cannot_reach_the_unit_makes_the_device_unreachable() -> None:
    async with ScriptedTcp() as peer, connected(registers(0), port=peer.port) as driver:
        peer.script = ["gateway"]
        with pytest.raises(DeviceUnreachable, match="gateway does not reach unit 1") as failed:
            await driver.read(driver.points)
        assert failed.value.reason is Reason.BEHIND_GATEWAY
        assert told(await driver.read(driver.points)) == {"r0": 0}


# ------------------------------------------------------------------------------------------ faults on TCP


async def test_a_silent_device_is_unreachable_by_timeout() -> None:
    async with (
        ScriptedTcp() as peer,
        connected(registers(0, 200, 400), port=peer.port, timeout_ms=100) as driver,
    ):
        peer.script = ["none"] * 3
        with pytest.raises(DeviceUnreachable, match="unit 1 does not answer") as failed:
            await driver.read(driver.points)
        assert failed.value.reason is Reason.TIMEOUT
        assert peer.requests == 2  # after two silences the rest is not tried


async def test_a_device_that_is_back_is_read_at_the_moment_its_driver_named() -> None:
    """A poller's own backoff on top of the unit's would be twice the wait."""
    async with ScriptedTcp() as peer, connected(registers(0), port=peer.port, timeout_ms=50) as driver:
        peer.script = ["none"] * 99

        async def told_to_retry() -> float | None:
            with pytest.raises(DeviceUnreachable) as failed:
                await driver.read(driver.points)
            return failed.value.retry_within_s

        hints = [await told_to_retry() for _ in range(4)]
        assert hints[:2] == [None, None]  # a miss or two: the poller decides
        assert hints[2] is not None  # it is left alone from here on,
        assert hints[3] is not None  # and asking meanwhile tells what is left of it
        assert 0 < hints[3] <= hints[2] <= 1.0
        peer.script.clear()
        await asyncio.sleep(hints[3])
        assert told(await driver.read(driver.points)) == {"r0": 0}


async def test_a_connection_that_may_be_half_open_is_made_anew() -> None:
    async with ScriptedTcp() as peer, connected(registers(0), port=peer.port, timeout_ms=100) as driver:
        peer.script = ["none"]
        with pytest.raises(DeviceUnreachable):
            await driver.read(driver.points)
        await driver.connect()
        assert told(await driver.read(driver.points)) == {"r0": 0}
        assert peer.connections == 2


async def test_a_device_silent_about_some_addresses_is_read_at_the_others_in_the_end() -> None:
    async with (
        ScriptedTcp() as peer,
        connected(registers(0, 200, 400), port=peer.port, timeout_ms=100) as driver,
    ):
        peer.script = ["none", "none"]
        with pytest.raises(DeviceUnreachable):
            await driver.read(driver.points)
        peer.script = ["ok", "none", "none"]
        assert told(await driver.read(driver.points)) == {
            "r0": Reason.TIMEOUT,
            "r200": Reason.TIMEOUT,
            "r400": 400,
        }


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("stale", None),
        ("split", None),
        ("other_unit", Reason.FRAMING),
        ("other_function", Reason.FRAMING),
        ("short_count", Reason.FRAMING),
        ("busy", Reason.BUSY),
        ("truncated", Reason.FRAMING),
    ],
)
async def test_tcp_only_the_reply_that_was_asked_for_counts(fault: str, reason: Reason | None) -> None:
    async with (
        ScriptedTcp() as peer,
        connected(registers(10, 11, 12), port=peer.port, timeout_ms=150) as driver,
    ):
        peer.script = [fault]
        scan = await driver.read(driver.points)
        assert set(scan.reasons.values()) == ({reason} if reason else set())
        if reason is None:
            assert list(scan.values) == [10, 11, 12]


async def test_tcp_a_late_reply_is_not_the_next_ones() -> None:
    async with (
        ScriptedTcp(late_s=0.15) as peer,
        connected(registers(0, 200), port=peer.port, timeout_ms=100) as driver,
    ):
        for _ in range(5):
            peer.script = ["late", "ok"]
            assert told(await driver.read(driver.points)) == {"r0": Reason.TIMEOUT, "r200": 200}


@pytest.mark.parametrize(("fault", "text"), [("garbage", "not Modbus TCP"), ("close", "closed")])
async def test_a_lost_connection_is_unreachable_until_connected_again(fault: str, text: str) -> None:
    async with ScriptedTcp() as peer, connected(registers(3), port=peer.port) as driver:
        peer.script = [fault]
        scan: Scan | None = None
        try:
            scan = await driver.read(driver.points)
        except DeviceUnreachable as err:
            assert err.reason is Reason.DISCONNECTED  # noqa: PT017 - one of two lawful outcomes
        assert scan is None or told(scan) == {"r3": Reason.FRAMING}
        with pytest.raises(DeviceUnreachable, match=text):
            await driver.read(driver.points)
        await driver.connect()
        assert told(await driver.read(driver.points)) == {"r3": 3}


async def test_what_was_read_before_the_connection_broke_is_kept() -> None:
    async with ScriptedTcp() as peer, connected(registers(3, 200, 400), port=peer.port) as driver:
        peer.script = ["ok", "close"]
        assert told(await driver.read(driver.points)) == {
            "r3": 3,
            "r200": Reason.DISCONNECTED,
            "r400": Reason.DISCONNECTED,
        }


async def test_a_refused_connection_says_so() -> None:
    async with ScriptedTcp() as peer:
        port = peer.port
    driver = build("boiler", "modbus", {"host": "127.0.0.1", "port": port}, registers(0))
    with pytest.raises(DeviceUnreachable, match=rf"127.0.0.1:{port}: .*refused|Connect call failed"):
        await driver.connect()
    await driver.close()


async def test_a_missing_serial_port_says_which() -> None:
    driver = build("boiler", "modbus", {"serial": "/dev/no-such-port"}, registers(0))
    with pytest.raises(DeviceUnreachable, match="/dev/no-such-port"):
        await driver.connect()
    await driver.close()


async def test_a_port_that_may_not_be_opened_says_which_group_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: object, **keys: object) -> None:
        raise serial.SerialException(13, "could not open port /dev/ttyUSB0: Permission denied")

    # Tests may run as root, whom no port refuses; this is what pyserial raises for others.
    monkeypatch.setattr(serial, "Serial", denied)
    driver = build("boiler", "modbus", {"serial": "/dev/ttyUSB0"}, registers(0))
    with pytest.raises(
        DeviceUnreachable, match=r"Permission denied.*; add the gateway's user to the port's group"
    ):
        await driver.connect()
    await driver.close()


async def test_a_port_that_cannot_do_the_settings_is_a_configuration_error() -> None:
    async with rtu_peer({1: Unit()}) as peer:
        driver = build("boiler", "modbus", {"serial": peer.path, "parity": "even"}, registers(0))
        with pytest.raises(ConfigError, match="does not take these settings"):
            await driver.connect()
        await driver.close()


# ------------------------------------------------------------------------------------------ faults on RTU

FAULTS = {
    "none": Reason.TIMEOUT,
    "late": Reason.TIMEOUT,
    "crc": Reason.CRC,
    "noise": None,
    "noise_inside": Reason.CRC,
    "truncated": Reason.FRAMING,
    "other_unit": Reason.FRAMING,
    "other_function": Reason.FRAMING,
    "exception": Reason.EXCEPTION,
    "busy": Reason.BUSY,
    "bytewise": None,
    "echo": None,
    "double": None,
}
TIMEOUT_MS = 60
LATE_S = 0.09  #: after the timeout, before the line may be used again
SLAVE = {"baud": 115200, "parity": "none", "timeout_ms": TIMEOUT_MS, "latest_reply_ms": 200}


@contextlib.asynccontextmanager
async def scripted(late_s: float = LATE_S) -> AsyncIterator[ScriptedSlave]:
    slave = ScriptedSlave({n: 1000 + n for n in range(300)}, late_s=late_s)
    try:
        yield slave
    finally:
        slave.close()


@pytest.mark.parametrize("fault", FAULTS)
async def test_rtu_each_fault_has_its_reason_and_the_next_read_is_right(fault: str) -> None:
    async with scripted() as slave, connected(registers(0, 1), serial=slave.path, **SLAVE) as driver:
        for _ in range(2):
            slave.script = [fault]
            reason = FAULTS[fault]
            if reason is Reason.TIMEOUT:
                with pytest.raises(DeviceUnreachable) as failed:
                    await driver.read(driver.points)
                assert failed.value.reason is Reason.TIMEOUT
            else:
                scan = await driver.read(driver.points)
                assert set(scan.reasons.values()) == ({reason} if reason else set())
            assert told(await driver.read(driver.points)) == {"r0": 1000, "r1": 1001}


async def test_rtu_a_late_reply_is_never_another_registers_value() -> None:
    """The trap: no transaction id, so the late answer about r0 has just the form of the answer about r200."""
    async with scripted() as slave, connected(registers(0, 200), serial=slave.path, **SLAVE) as driver:
        for _ in range(8):
            slave.script = ["late", "ok"]
            assert told(await driver.read(driver.points)) == {"r0": Reason.TIMEOUT, "r200": 1200}


async def test_rtu_the_line_stays_silent_until_no_reply_can_come() -> None:
    async with scripted() as slave, connected(registers(0, 200), serial=slave.path, **SLAVE) as driver:
        slave.script = ["late", "ok"]
        await driver.read(driver.points)
        assert slave.asked_at_s[1] - slave.asked_at_s[0] >= 0.195


async def test_rtu_a_cancelled_read_owes_the_line_its_silence_too() -> None:
    async with scripted() as slave, connected(registers(0, 200), serial=slave.path, **SLAVE) as driver:
        for _ in range(5):
            slave.script = ["late"]
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await driver.read(driver.points[:1])
            assert told(await driver.read(driver.points[1:])) == {"r200": 1200}


async def test_rtu_an_unplugged_port_is_unreachable() -> None:
    async with scripted() as slave, connected(registers(0), serial=slave.path, **SLAVE) as driver:
        await driver.read(driver.points)
        slave.close()
        with pytest.raises(DeviceUnreachable):
            await driver.read(driver.points)
        with pytest.raises(DeviceUnreachable):
            await driver.connect()


# ------------------------------------------------------------------------------------------ lines


async def test_units_on_one_tcp_line_share_its_connection_and_never_mix() -> None:
    units = {n: Unit(holding=[100 * n + i for i in range(50)]) for n in (1, 2, 3)}
    async with tcp_peer(units, rtu=True) as peer, contextlib.AsyncExitStack() as stack:
        options = {"port": peer.port, "framing": "rtu_over_tcp"}
        drivers = [
            await stack.enter_async_context(connected(registers(*range(50)), unit=n, **options))
            for n in units
        ]
        for _ in range(20):
            scans = await asyncio.gather(*(driver.read(driver.points) for driver in drivers))
            for n, scan in zip(units, scans, strict=True):
                assert list(scan.values) == units[n].holding


async def test_a_line_opens_once_and_closes_with_its_last_user() -> None:
    async with ScriptedTcp() as peer:
        one, two = (
            build(name, "modbus", {"host": "127.0.0.1", "port": peer.port}, registers(0)) for name in "ab"
        )
        assert isinstance(one, ModbusDriver)
        assert isinstance(two, ModbusDriver)
        await one.connect()
        await two.connect()
        await one.close()
        assert told(await two.read(two.points)) == {"r0": 0}
        assert peer.connections == 1
        await two.close()
        await one.connect()
        assert told(await one.read(one.points)) == {"r0": 0}
        assert peer.connections == 2
        await one.close()


async def test_a_dead_unit_does_not_cost_the_others_their_connection() -> None:
    async with ScriptedTcp() as peer:
        options = {"host": "127.0.0.1", "port": peer.port, "timeout_ms": 50}
        dead = build("dead", "modbus", {**options, "unit": 9}, registers(0))
        alive = build("alive", "modbus", options, registers(0))
        assert isinstance(dead, ModbusDriver)
        assert isinstance(alive, ModbusDriver)
        await alive.connect()
        for _ in range(4):
            await dead.connect()
            peer.script = ["none"]
            with pytest.raises(DeviceUnreachable):
                await dead.read(dead.points)
            peer.script.clear()  # after three silences it is left alone, and nothing is asked
            assert told(await alive.read(alive.points)) == {"r0": 0}
        assert peer.connections == 1
        await dead.close()
        await alive.close()


async def test_two_names_of_one_port_are_one_line_and_must_agree_on_its_settings(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    link = tmp_path_factory.mktemp("by-id") / "usb-adapter"
    async with rtu_peer({1: Unit(holding=[1]), 2: Unit(holding=[2])}) as peer:
        link.symlink_to(peer.path)
        same = {"baud": 115200, "parity": "none"}
        async with (
            connected(registers(0), serial=peer.path, **same) as one,
            connected(registers(0), serial=str(link), unit=2, **same) as two,
        ):
            scans = await asyncio.gather(one.read(one.points), two.read(two.points))
            assert [list(scan.values) for scan in scans] == [[1], [2]]
            other = build(
                "odd", "modbus", {"serial": str(link), "baud": 9600, "parity": "none"}, registers(0)
            )
            with pytest.raises(ConfigError, match=r"odd wants .*9600 baud.*boiler, boiler on the same line"):
                await other.connect()
            await other.close()


# ------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("kind", ["tcp", "rtu"])
async def test_a_written_value_is_read_back(kind: str) -> None:
    unit = Unit(holding=[0] * 20, coils=[False] * 16)
    points = [
        point("setpoint", 0, "i16", writable=True),
        point("level", 2, "f32", order="CDAB", writable=True),
        point("pump", 3, table="coil", writable=True),
    ]
    async with plant(kind, unit) as (_, options), connected(points, **options) as driver:
        await driver.write(driver.points[0], -5)
        await driver.write(driver.points[1], 3.5)
        await driver.write(driver.points[2], True)
        assert unit.holding[:4] == [65531, 0, *FLOAT[::-1]]
        assert told(await driver.read(driver.points)) == {"setpoint": -5, "level": 3.5, "pump": True}


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("speed", 70000, r"speed: 70000 does not fit u16 \(0..65535"),
        ("speed", 1.5, "does not fit"),
        ("speed", -1, "does not fit"),
        ("pump", 1, "not true or false"),
        ("sensor", 1, "input table is read only"),
        ("status", 1, "not writable; .*writable = true"),
        ("low", 1, "part of a register; .*write_bits = 'mask'"),
        ("refused", 1, "the device refuses: exception 2, illegal address"),
        ("limited", 901, r"90.1 is outside valid_min..valid_max \(5..90\)"),
        ("limited", 49, r"4.9 is outside"),
        ("mode", 2, "2 is not one of 0, 1, 3"),
        ("limited", float("nan"), "not a number"),
        ("clock", 1700000000, "encoded as cp56time2a is not written"),
    ],
)
async def test_a_write_that_cannot_be_is_refused_and_nothing_is_written(
    name: str, value: Value, why: str
) -> None:
    points = [
        point("speed", 0, writable=True),
        point("pump", 0, table="coil", writable=True),
        point("sensor", 0, table="input"),
        point("status", 1),
        point("low", 2, "u8", writable=True),
        point("refused", 900, writable=True),
        point("limited", 3, scale=0.1, valid_min=5, valid_max=90, writable=True),
        point("mode", 4, one_of=[0, 1, 3], writable=True),
        point("clock", 5, "i64", encoding="cp56time2a", writable=True),
    ]
    async with tcp_peer({1: Unit(holding=[7] * 10)}) as peer, connected(points, port=peer.port) as driver:
        wanted = next(p for p in driver.points if p.name == name)
        with pytest.raises(PointRefused, match=why):
            await driver.write(wanted, value)
        assert name == "refused" or not peer.written
        assert (await driver.read(driver.points[:1])).values[0] == 7


async def test_a_write_that_does_not_stick_is_refused_with_both_values() -> None:
    unit = Unit(holding=[1])
    writable = [point("r0", 0, writable=True)]
    async with tcp_peer({1: unit}) as server, connected(writable, port=server.port) as driver:
        unit.judge = lambda function, address, count: (
            unit.holding.__setitem__(0, 1) if function == 3 else None
        )
        with pytest.raises(PointRefused, match="wrote 6, but it reads back as 1"):
            await driver.write(driver.points[0], 6)
        assert server.written == [(6, 0, [6])]


# ------------------------------------------------------------------------------------------ types


async def test_encoded_values_travel_as_their_type_in_one_request_with_all_others() -> None:
    unit = Unit(
        holding=[
            0x1234, 0x5678,  # 0: BCD
            5678, 1234,  # 2: MOD10, the first register least significant
            0x0018, 0x03CF, 0x0C22, 0xDDD5,  # 4: CP56Time2a, 2024-03-15 12:34:56.789
            0x8005,  # 8: sign and magnitude
            0xB5C3,  # 9: bits
            *words("f", float("nan")),  # 10
            0x7FFF, 0x8000, 0xFFFF,  # 12
            0x0041, 0x0042,  # 15: text
        ]
    )  # fmt: skip
    points = [
        point("bcd", 0, "u32", encoding="bcd"),
        point("mod10", 2, "u32", encoding="mod10000", order="CDAB"),
        {"name": "time", "register": 4, "encoding": "cp56time2a"},
        point("sign", 8, "i16", encoding="sign_magnitude"),
        point("field", 9, "u8", bit=4, bits=8),
        {"name": "bit", "register": 9, "bit": 15},
        point("nan", 10, "f32"),
        point("a", 12, "i16", not_available=[0x7FFF]),
        point("b", 13, "i16", not_available=[0x8000]),
        point("c", 14, "i16", not_available=[0xFFFF]),
        point("c_unsigned", 14, "u16", not_available=[0xFFFF]),
        point("text", 15, "str", encoding="char_low", length=2),
    ]
    async with tcp_peer({1: unit}) as peer, connected(points, port=peer.port) as driver:
        scan = await driver.read(driver.points)
        assert told(Rules(driver.points).apply(scan)) == {
            "bcd": 12345678, "mod10": 12345678, "time": 1_710_506_096, "sign": -5, "field": 0x5C, "bit": True,
            "nan": Reason.NAN, "a": Reason.SENTINEL, "b": Reason.SENTINEL, "c": Reason.SENTINEL,
            "c_unsigned": Reason.SENTINEL, "text": "AB",
        }  # fmt: skip
        assert len(peer.asked) == 1


SCALED = {"name": "power", "register": 10, "encoding": "i16", "scale_register": 14, "not_available": [0x8000]}


async def test_a_number_and_its_exponent_are_read_in_one_request_whatever_else_is() -> None:
    registers_ = [0] * 20
    registers_[10], registers_[14] = 1234, 0xFFFE
    async with WilfulTcp(registers_) as peer, connected([SCALED], port=peer.port, max_gap=0) as driver:
        assert told(await driver.read(driver.points)) == {"power": 12.34}
        assert peer.asked == [(3, 10, 5)]
        registers_[10] = 0x8000
        assert told(await driver.read(driver.points)) == {"power": Reason.SENTINEL}
        registers_[10], registers_[14] = 5, 0x8000
        assert told(await driver.read(driver.points)) == {"power": Reason.SENTINEL}
        registers_[14] = 12
        assert told(await driver.read(driver.points)) == {"power": Reason.DECODE}


async def test_an_exponent_that_is_read_apart_must_be_the_same_before_and_after() -> None:
    registers_ = [0] * 300
    registers_[10], registers_[200] = 1234, 0xFFFE
    flips = False

    def judge(function: int, address: int, count: int) -> None:
        if flips and address == 200:
            registers_[200] ^= 1  # -2, -1, -2, ...

    far = {**SCALED, "scale_register": 200}
    async with WilfulTcp(registers_, judge) as peer, connected([far], port=peer.port) as driver:
        assert told(await driver.read(driver.points)) == {"power": 12.34}
        assert peer.asked == [(3, 200, 1), (3, 10, 1), (3, 200, 1)]
        flips = True
        assert told(await driver.read(driver.points)) == {"power": Reason.DECODE}
        flips = False
        assert told(await driver.read(driver.points))["power"] in (12.34, 123.4)


async def test_an_exponent_that_changes_before_it_is_read_at_all_makes_no_wrong_number() -> None:
    """The device goes over from 12.34 to 123.5, number and exponent at once, at some request."""
    one = {**SCALED, "register": 10, "scale_register": 201}
    two = {**SCALED, "name": "other", "register": 200, "scale_register": 11}  # each in the other's request
    for at in range(9):
        registers_ = [0] * 300
        asked = 0

        def put(number: int, exponent: int) -> None:
            for n, e in ((10, 201), (200, 11)):
                registers_[n], registers_[e] = number, exponent  # noqa: B023

        def judge(function: int, address: int, count: int) -> None:
            nonlocal asked
            if asked == at:  # noqa: B023 - called within the same turn
                put(1235, 0xFFFF)
            asked += 1

        put(1234, 0xFFFE)
        async with WilfulTcp(registers_, judge) as peer, connected([one, two], port=peer.port) as driver:
            for _ in range(2):
                assert set(told(await driver.read(driver.points)).values()) <= {12.34, 123.5, Reason.DECODE}
            put(1235, 0xFFFF)
            assert set(told(await driver.read(driver.points)).values()) == {123.5}


async def test_a_number_and_an_exponent_that_came_before_the_line_was_lost_are_no_value() -> None:
    registers_ = [0] * 600
    registers_[10], registers_[200] = 1234, 0xFFFE
    far = [{**SCALED, "scale_register": 200}, *registers(390, 590)]

    def hangs(function: int, address: int, count: int) -> Whim:
        return "hangup" if address == 390 else None

    async with WilfulTcp(registers_, hangs) as peer, connected(far, port=peer.port) as driver:
        assert set(told(await driver.read(driver.points)).values()) == {Reason.DISCONNECTED}


async def test_a_number_of_decimals_is_read_before_and_after_too_and_moves_the_point_the_other_way() -> None:
    registers_ = [0] * 300
    registers_[10], registers_[200] = 235, 1
    changes = False

    def judge(function: int, address: int, count: int) -> None:
        if changes and address == 200:
            registers_[200] ^= 1

    point = {"name": "t", "register": 10, "encoding": "i16", "decimals_register": 200}
    async with WilfulTcp(registers_, judge) as peer, connected([point], port=peer.port) as driver:
        assert told(await driver.read(driver.points)) == {"t": 23.5}
        registers_[200] = 0
        assert told(await driver.read(driver.points)) == {"t": 235.0}
        registers_[200] = 47
        assert told(await driver.read(driver.points)) == {"t": Reason.DECODE}
        registers_[200] = 1
        changes = True
        assert told(await driver.read(driver.points)) == {"t": Reason.DECODE}
    near = {**point, "decimals_register": 11}
    registers_[11] = 1
    async with WilfulTcp(registers_) as peer, connected([near], port=peer.port) as driver:
        assert told(await driver.read(driver.points)) == {"t": 23.5}
        assert peer.asked == [(3, 10, 2)]


async def test_a_number_and_its_exponent_are_read_apart_where_the_device_refuses_what_lies_between() -> None:
    registers_ = [0] * 20
    registers_[10], registers_[14] = 1234, 0xFFFE
    refuses = lambda function, address, count: 2 if address <= 12 < address + count else None  # noqa: E731
    async with (
        WilfulTcp(registers_, refuses) as peer,
        connected([SCALED, *registers(3)], port=peer.port) as driver,
    ):
        for _ in range(3):
            scan = told(await driver.read(driver.points))
        assert scan == {"power": 12.34, "r3": 0}
        peer.asked.clear()
        await driver.read(driver.points)
        assert len(peer.asked) == 3  # r3 with the number; the exponent before and after


# ------------------------------------------------------------------------------------------ planning


async def test_what_is_forbidden_is_never_on_the_wire() -> None:
    forbidden = {"holding": [[100, 110], [200, 200]]}
    wanted = registers(95, 99, 111, 199, 201)
    async with (
        WilfulTcp(list(range(300))) as peer,
        connected(wanted, port=peer.port, forbidden=forbidden) as driver,
    ):
        await driver.read(driver.points)
        touched = {n for _, address, count in peer.asked for n in range(address, address + count)}
        assert not touched & {*range(100, 111), 200}
        assert len(peer.asked) == 3
    with pytest.raises(
        ConfigError, match=r"point 'r105': register: 105 touches options.forbidden.holding \[100, 110\]"
    ):
        build("boiler", "modbus", {"host": "h", "forbidden": forbidden}, registers(105))


async def test_the_plan_follows_what_the_line_costs() -> None:
    """On a slow serial line a hole of forty registers costs more than a request; on a network it does not."""
    two = registers(0, 41)
    slow = build("a", "modbus", {"serial": "/dev/ttyS99", "baud": 1200}, two)
    quick = build("b", "modbus", {"host": "h"}, two)
    assert isinstance(slow, ModbusDriver)
    assert isinstance(quick, ModbusDriver)
    assert len(slow._asked.works) == 2
    assert len(quick._asked.works) == 1


async def test_a_line_that_turns_out_to_cost_otherwise_is_planned_anew_between_two_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with WilfulTcp(list(range(100))) as peer, connected(registers(0, 50), port=peer.port) as driver:
        await driver.read(driver.points)
        monkeypatch.setattr(Line, "cost", lambda line: Cost(0.001, 0.000_1))
        await driver.connect()
        await driver.read(driver.points)
        assert peer.asked == [(3, 0, 51), (3, 0, 1), (3, 50, 1)]


# ------------------------------------------------------------------------------------------ bad tables


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (point("a", 0, "f32"), point("b", 1, "f32")),
        (point("a", 0, "u32"), point("b", 1)),
        (point("a", 0, "str", length=20), point("b", 4, "u32")),
        (point("b", 3, "u64"), point("a", 0, "u64")),
    ],
)
def test_points_that_share_registers_by_mistake_are_refused_with_both_names_and_the_remedy(
    one: dict[str, object], two: dict[str, object]
) -> None:
    others = registers(*range(100, 110))
    with pytest.raises(
        ConfigError, match=rf"point '{two['name']}': register: .*'{one['name']}'.*overlap = true"
    ):
        build("boiler", "modbus", {"host": "h"}, [*others, one, two])
    build("boiler", "modbus", {"host": "h"}, [one, {**two, "overlap": True}])
    build("boiler", "modbus", {"host": "h"}, [one, {**two, "table": "input"}])


def test_two_views_of_the_same_registers_are_no_mistake() -> None:
    views = [
        point("whole", 0, "u32"),
        point("signed", 0, "i32"),
        {"name": "bit", "register": 1, "bit": 3},
        point("field", 0, "u8", bit=12, bits=8),
        point("next", 2),
    ]
    build("boiler", "modbus", {"host": "h"}, views)


def test_a_device_claims_its_line_with_its_settings() -> None:
    serial_ = {"serial": "/dev/ttyS99", "baud": 9600, "parity": "none"}
    driver = build("a", "modbus", serial_, registers(0))
    other = build("b", "modbus", {**serial_, "baud": 19200, "unit": 2}, registers(0))
    ascii_ = build("c", "modbus", {"serial": "/dev/ttyS98", "framing": "ascii"}, registers(0))
    claims = [each.line() for each in (driver, other, ascii_)]
    assert all(claim is not None for claim in claims)
    keys, settings_ = zip(*((claim.key, claim.settings) for claim in claims if claim), strict=True)
    assert keys == ("/dev/ttyS99", "/dev/ttyS99", "/dev/ttyS98")
    assert settings_ == ("9600 baud, 8N1, rtu", "19200 baud, 8N1, rtu", "19200 baud, 7E1, ascii")


def test_the_sample_shows_every_key_with_its_default_and_builds() -> None:
    text = Path(modbus.__file__).with_suffix(".toml").read_text()
    options = {field.encode_name: field.default for field in msgspec.structs.fields(ModbusOptions)}
    own = {field.encode_name for field in msgspec.structs.fields(ModbusPoint)} - {
        field.encode_name for field in msgspec.structs.fields(Point)
    }
    for key in {*options, *own}:
        assert re.search(rf"^#? ?{key} = ", text, re.MULTILINE), key
    shown = tomllib.loads("\n".join(dict.fromkeys(re.findall(r"^# (\w+ = .*)$", text, re.MULTILINE))))
    for key in ("port", "baud", "parity", "stop_bits", "unit", "connect_timeout_ms", "max_registers", "max_bits",
                "order", "write_single"):  # fmt: skip
        assert shown[key] == options[key], key
    (device,) = tomllib.loads(text)["device"]
    build(device["name"], device["driver"], device["options"], device["point"])


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"type": "bool"}, "say which bit"),
        ({"type": "u32", "bit": 3}, "one bit is a bool"),
        ({"type": "str"}, "length: needed by a str"),
        ({"type": "u16", "length": 4}, "length: needed by a str, and only there"),
        ({"register": 65535, "type": "u32"}, "beyond 65535"),
        ({"table": "coil", "type": "f32"}, "a coil is a bool, not f32"),
        ({"table": "discrete", "bit": 1}, "one bit already"),
        ({"order": "ABDD"}, "order 'ABDD' is not valid"),
        ({"type": "u64", "order": "ABCDEFGX"}, "not valid"),
        ({"type": "str", "length": 80}, "length: it takes 40 registers, and max_registers is 20"),
        ({"type": "f64", "scale_register": 9}, "encoding: with scale_register, say what the registers hold"),
        ({"encoding": "i16"}, "give it as the type"),
        ({"encoding": "bcd", "type": "i32"}, "bcd is one of u8, u16, u32, u64, not i32"),
        ({"encoding": "bcd", "length": 4}, "8 decimal digits do not fit u16"),
        ({"encoding": "mod10000", "type": "u32", "length": 8}, "do not fit u32"),
        ({"encoding": "date_bcd", "type": "u32"}, "travels as i64"),
        ({"encoding": "char_low"}, "is for str"),
        ({"encoding": "bdc"}, "encoding.*bcd"),
        ({"bits": 3}, "say with bit where"),
        ({"bit": 4, "bits": 9, "type": "u8"}, "9 bits do not fit u8"),
        ({"bit": 30, "bits": 3}, "beyond the 32 bits"),
        ({"utc_offset_min": 60}, "only moments .* have a time zone"),
        ({"table": "input", "writable": True}, "input table is read only"),
        ({"table": "coil", "encoding": "bcd"}, "one bit already"),
        ({"encoding": "i32", "scale_register": 1, "type": "f64"}, "lies within the value"),
        ({"encoding": "i32", "decimals_register": 1}, "decimals_register: lies within the value"),
        ({"type": "str", "length": 4, "order": "ABBA"}, "order: text has no word order"),
        ({"decimals_register": 9}, "encoding: with decimals_register, say what the registers hold"),
        (
            {"encoding": "i16", "decimals_register": 9, "scale_register": 8},
            "decimals_register: a number has either",
        ),
        ({"register": 65536}, "register: .*65535"),
    ],
)
def test_a_point_that_cannot_work_is_refused_by_name(keys: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=f"device 'boiler' point 'p': .*{why}"):
        build("boiler", "modbus", {"host": "h", "max_registers": 20}, [{"name": "p", "register": 0, **keys}])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "either host .* or serial"),
        ({"host": "h", "serial": "/dev/ttyS0"}, "either host .* or serial"),
        ({"host": "h", "framing": "rtu"}, "rtu_over_tcp"),
        ({"serial": "/dev/ttyS0", "framing": "tcp"}, "a serial port speaks rtu"),
        ({"serial": "/dev/ttyS0", "framing": "ascii_over_tcp"}, "needs a host"),
        ({"host": "h", "framing": "dup"}, "'dup' is not one of"),
        ({"serial": "/dev/ttyS0", "unit": 0}, "unit: 0 is everybody's address"),
        ({"host": "h", "framing": "rtu_over_tcp", "unit": 0}, "unit: 0 is everybody's address"),
        ({"serial": "/dev/ttyS0", "data_bits": 7}, "RTU needs 8"),
        ({"host": "h", "forbidden": {"holding": [[9, 5]]}}, "ends before it begins"),
        ({"host": "h", "forbidden": {"holdings": [[1, 5]]}}, "holdings"),
        ({"host": "h", "max_registers": 126}, "max_registers: .*125, found 126"),
        ({"host": "h", "unit": -1}, "unit"),
        ({"host": "10.0.0.5:502"}, "host: .* port = 502"),
        ({"host": "tcp://10.0.0.5"}, "host: .*'tcp://10.0.0.5'"),
        ({"host": "10.0.0.5 "}, "host: .*'10.0.0.5 '"),
        ({"host": ""}, "host: .*''"),
        ({"serial": "/dev/ttyS0", "timeout_ms": 500, "latest_reply_ms": 100}, "latest_reply_ms: 100 .*500"),
        ({"serial": "/dev/ttyS0", "baud": 1_234_567_890}, "baud: .*12000000, found 1234567890"),
        ({"host": "h", "timeout_ms": 10**11}, "timeout_ms: .*60000, found"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        build("boiler", "modbus", options, registers(0))


# ------------------------------------------------------------------------------------------ conformance


@pytest.mark.headgate_driver(kind=ModbusDriver)
async def test_the_driver_conforms(headgate_check: conformance.Check) -> None:
    held = list(range(1, 301))
    points = [point("a", 0), point("b", 2, "u32"), point("c", 200), point("read_only", 100, "f32")]

    def change() -> None:
        held[:] = [value % 60_000 + 1 for value in held]

    def truth() -> dict[str, Value]:
        raw = struct.pack(">300H", *held)
        return {
            "a": held[0],
            "b": int.from_bytes(raw[4:8], "big"),
            "c": held[200],
            "read_only": struct.unpack(">f", raw[200:204])[0],
        }

    async with WilfulTcp(held) as peer, WilfulTcp([0]) as gone:
        await gone.unplug()

        def make(port: int) -> ModbusDriver:
            driver = build("x", "modbus", {"host": "127.0.0.1", "port": port, "timeout_ms": 100}, points)
            assert isinstance(driver, ModbusDriver)
            return driver

        def answering(whim: Whim) -> conformance.Fault:
            return conformance.Fault(
                lambda: setattr(peer, "judge", lambda function, address, count: whim),
                lambda: setattr(peer, "judge", None),
            )

        await headgate_check(
            conformance.Subject(
                build=lambda: make(peer.port),
                absent=lambda: make(gone.port),
                change=change,
                truth=truth,
                silence=answering("silent"),
                faults={
                    "unplugged": conformance.Fault(peer.unplug, peer.plug),
                    "busy": answering(6),
                    "failing": answering(4),
                    "behind a gateway": answering(11),
                    "hanging up": answering("hangup"),
                    "starting up": answering(2),
                },
                peer_files=("*/modbus_wilful.py",),
            )
        )


# ------------------------------------------------------------------------------------------ properties


@st.composite
def a_device(draw: st.DrawFn) -> tuple[list[dict[str, object]], set[int], set[int], dict[str, int]]:
    points = []
    for i in range(draw(st.integers(1, 25))):
        type_ = draw(st.sampled_from(["u16", "i16", "u32", "i32", "u64"]))
        table = draw(st.sampled_from(["holding", "input"]))
        points.append(point(f"p{i}", draw(st.integers(0, 240)), type_, table=table, overlap=True))
    refused = draw(st.sets(st.integers(0, 250), max_size=6))
    busy = draw(st.sets(st.integers(0, 250), max_size=2))
    limits = {"max_registers": draw(st.integers(4, 125)), "max_gap": draw(st.integers(0, 40))}
    return points, refused, busy, limits


def test_whatever_block_fails_no_value_lands_on_another_point() -> None:
    """Register n of a table holds a number found nowhere else, so a value in the wrong place shows."""
    holding = [(n * 131 + 7) & 0xFFFF for n in range(260)]
    inputs = [(n * 137 + 30011) & 0xFFFF for n in range(260)]
    refused: set[int] = set()
    busy: set[int] = set()

    def judge(function: int, address: int, count: int) -> ExcCodes | None:
        asked = set(range(address, address + count))
        if asked & refused:
            return ExcCodes.ILLEGAL_ADDRESS
        return ExcCodes.DEVICE_BUSY if asked & busy else None

    def expected(p: ModbusPoint) -> Value:
        cells = holding if p.table is Table.HOLDING else inputs
        width = {"16": 1, "32": 2, "64": 4}[p.type[1:]]
        raw = b"".join(struct.pack(">H", cell) for cell in cells[p.register : p.register + width])
        return int.from_bytes(raw, "big", signed=p.type.startswith("i"))

    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        serving = tcp_peer({1: Unit(holding=holding, input=inputs, judge=judge)})
        peer = runner.run(stack.enter_async_context(serving))

        async def attempt(points: list[dict[str, object]], limits: dict[str, int]) -> None:
            async with connected(points, port=peer.port, **limits) as driver:
                for _ in range(3):
                    scan = await driver.read(driver.points)
                    for i, p in enumerate(driver.points):
                        own = set(range(p.register, p.register + {"16": 1, "32": 2, "64": 4}[p.type[1:]]))
                        if i in scan.reasons:
                            assert scan.values[i] is None
                            assert refused or busy
                        else:
                            assert scan.values[i] == expected(p)
                            assert not own & refused
                        if scan.reasons.get(i) is Reason.REFUSED:
                            assert own & refused
                        if not busy and not own & refused:
                            assert i not in scan.reasons

        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(a_device())
        def run(device: tuple[list[dict[str, object]], set[int], set[int], dict[str, int]]) -> None:
            points, bad, occupied, limits = device
            refused.clear()
            busy.clear()
            refused.update(bad)
            busy.update(occupied)
            runner.run(attempt(points, limits))

        run()
        runner.run(stack.aclose())


DEVICES = int(os.environ.get("HEADGATE_DEVICES", "25"))
WHIMS: list[Whim] = [None, None, None, None, None, 1, 2, 2, 3, 4, 6, 11, "silent", "hangup"]


@pytest.mark.timeout(60 + DEVICES)
def test_whatever_request_fails_however_and_whenever_no_value_lands_on_another_point() -> None:
    """Each request has a fate of its own, drawn anew each time; numbers with exponents beside and afar among the
    points. Register n holds a number found nowhere else."""
    held = [(n * 131 + 7) & 0x7FFF for n in range(260)]
    near, far = 30, 250
    held[near], held[far] = 0xFFFE, 1  # exponents: -2, 1

    def expected(p: ModbusPoint) -> Value:
        if p.scale_register is not None:
            return held[p.register] / 100 if p.scale_register == near else float(held[p.register] * 10)
        width = {"16": 1, "32": 2, "64": 4}[p.type[1:]]
        raw = b"".join(struct.pack(">H", cell) for cell in held[p.register : p.register + width])
        return int.from_bytes(raw, "big", signed=p.type.startswith("i"))

    async def attempt(seed: int) -> tuple[int, int]:
        rng = random.Random(seed)
        points: list[dict[str, object]] = []
        for i in range(rng.randrange(1, 25)):
            register, type_ = rng.randrange(40, 240), rng.choice(["u16", "i16", "u32", "u64"])
            points.append(point(f"p{i}", register, type_, overlap=True))
        for i in range(rng.randrange(0, 4)):
            register, scale = rng.randrange(0, 240), rng.choice([near, far])
            if register not in (near, far):
                keys = {"encoding": "u16", "scale_register": scale, "overlap": True}
                points.append({"name": f"s{i}", "register": register, **keys})
        calm = rng.random() < 0.2
        right = wrong = 0
        async with (
            WilfulTcp(held, lambda function, address, count: None if calm else rng.choice(WHIMS)) as peer,
            connected(points, port=peer.port, timeout_ms=15, max_registers=rng.randrange(4, 126)) as driver,
        ):
            now_s = 0.0
            assert isinstance(driver, ModbusDriver)
            driver.now_s = lambda: now_s
            for _ in range(12):
                now_s += 61.0
                try:
                    scan = await driver.read(driver.points)
                except DeviceUnreachable:
                    with contextlib.suppress(DeviceUnreachable):
                        await driver.connect()
                    continue
                for i, (p, value) in enumerate(zip(driver.points, scan.values, strict=True)):
                    assert (value is None) == (i in scan.reasons)
                    right += value == expected(p)
                    wrong += value not in (None, expected(p))
        return right, wrong

    seed = random.SystemRandom().randrange(1 << 32)
    print("seed", seed)
    outcomes = [asyncio.run(attempt(seed + i)) for i in range(DEVICES)]
    assert sum(wrong for _, wrong in outcomes) == 0
    assert sum(right for right, _ in outcomes) > 100
