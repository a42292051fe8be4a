"""Writes: asked for, within limits, sent once, read back."""

from __future__ import annotations

import struct

import pytest

from drivers.contract import DeviceUnreachable, PointRefused, Value
from tests.fakes.modbus_peer import Unit, tcp_peer
from tests.fakes.modbus_wilful import Whim, WilfulTcp
from tests.test_drivers_modbus import connected, point, told, words

QUICK = {"timeout_ms": 150}


def writable(name: str, register: int, type_: str = "u16", **keys: object) -> dict[str, object]:
    return point(name, register, type_, writable=True, **keys)


@pytest.mark.parametrize(
    ("keys", "options", "value", "request_", "after"),
    [
        # One register by the function for one, or by that for many where a device knows no other.
        ({}, {}, 5, (6, 0, 1), [5, 0xAAAA, 0, 0]),
        ({}, {"write_single": False}, 5, (16, 0, 1), [5, 0xAAAA, 0, 0]),
        ({"type": "f32", "order": "CDAB"}, {}, 3.5, (16, 0, 2), [*words("f", 3.5)[::-1], 0, 0]),
        ({"type": "u64"}, {}, 1 << 60, (16, 0, 4), words("Q", 1 << 60)),
        ({"type": "str", "length": 4}, {}, "abc", (16, 0, 2), [0x6162, 0x6300, 0, 0]),
        # In the encoding that the registers have.
        ({"type": "u32", "encoding": "bcd"}, {}, 12345678, (16, 0, 2), [0x1234, 0x5678, 0, 0]),
        ({"type": "i16", "encoding": "sign_magnitude"}, {}, -5, (6, 0, 1), [0x8005, 0xAAAA, 0, 0]),
        ({"type": "u32", "encoding": "mod10000"}, {}, 12345678, (16, 0, 2), [1234, 5678, 0, 0]),
        # A part of a register, by a mask (function 22) or by read, change and write.
        ({"type": "bool", "register": 1, "bit": 0}, {"write_bits": "mask"}, True, (22, 1, 1), [0, 0xAAAB, 0, 0]),
        ({"type": "bool", "register": 1, "bit": 1}, {"write_bits": "mask"}, False, (22, 1, 1), [0, 0xAAA8, 0, 0]),
        (
            {"type": "bool", "register": 1, "bit": 0, "order": "BADC"},
            {"write_bits": "mask"}, True, (22, 1, 1), [0, 0xABAA, 0, 0],
        ),
        ({"type": "bool", "register": 1, "bit": 0}, {"write_bits": "rewrite"}, True, (6, 1, 1), [0, 0xAAAB, 0, 0]),
        (
            {"type": "u8", "register": 1, "bit": 4, "bits": 4}, {"write_bits": "rewrite"},
            3, (6, 1, 1), [0, 0xAA3A, 0, 0],
        ),
        ({"type": "u8", "register": 1}, {"write_bits": "mask"}, 0x12, (22, 1, 1), [0, 0xAA12, 0, 0]),
        ({"type": "i8", "register": 1}, {"write_bits": "rewrite"}, -1, (6, 1, 1), [0, 0xAAFF, 0, 0]),
        (
            {"type": "u32", "bit": 8, "bits": 16}, {"write_bits": "rewrite"},
            0x1234, (16, 0, 2), [0x0012, 0x34AA, 0, 0],
        ),
        # With a scale register: the number nearest to it that the registers can hold (the exponent is -2).
        ({"encoding": "i16", "scale_register": 3}, {}, -1.234, (6, 0, 1), [0xFF85, 0xAAAA, 0, 0xFFFE]),
        # By how many decimals the device shows (here 2).
        ({"encoding": "i16", "decimals_register": 3}, {}, 21.5, (6, 0, 1), [2150, 0xAAAA, 0, 2]),
    ],
)  # fmt: skip
async def test_a_write_has_one_request_of_the_right_function_and_leaves_the_rest_alone(
    keys: dict[str, object],
    options: dict[str, object],
    value: Value,
    request_: tuple[int, int, int],
    after: list[int],
) -> None:
    exponent = 0xFFFE if "scale_register" in keys else 2 if "decimals_register" in keys else 0
    registers = [0, 0xAAAA, 0, exponent]
    async with (
        WilfulTcp(registers) as peer,
        connected([{**writable("p", 0), **keys}], port=peer.port, **options, **QUICK) as driver,
    ):
        await driver.write(driver.points[0], value)
        assert peer.written == [request_]
        assert registers == after
        assert peer.asked[-1][0] == 3  # read back


@pytest.mark.parametrize("single", [True, False])
async def test_a_coil_is_written_by_the_function_that_the_device_knows(single: bool) -> None:
    async with (
        tcp_peer({1: Unit(coils=[False] * 16)}) as peer,
        connected([writable("pump", 3, "bool", table="coil")], port=peer.port, write_single=single) as driver,
    ):
        await driver.write(driver.points[0], True)
        assert told(await driver.read(driver.points)) == {"pump": True}
        assert [asked[1] for asked in peer.asked] == [5 if single else 15, 1, 1]


@pytest.mark.parametrize("whim", ["deaf", "hangup"])
async def test_a_write_without_confirmation_is_not_repeated_and_reading_back_tells_that_it_took_effect(
    whim: Whim,
) -> None:
    registers = [7]
    async with (
        WilfulTcp(registers, lambda function, address, count: whim if function == 6 else None) as peer,
        connected([writable("p", 0)], port=peer.port, **QUICK) as driver,
    ):
        await driver.write(driver.points[0], 9)
        assert registers == [9]
        assert peer.written == [(6, 0, 1)]


async def test_a_write_that_was_lost_is_told_and_not_repeated() -> None:
    registers = [7]
    async with (
        WilfulTcp(registers, lambda function, address, count: "silent" if function == 6 else None) as peer,
        connected([writable("p", 0)], port=peer.port, **QUICK) as driver,
    ):
        with pytest.raises(
            PointRefused, match=r"no confirmation \(timeout\).*reads back as 7: 9 was not written"
        ):
            await driver.write(driver.points[0], 9)
        assert peer.written == [(6, 0, 1)]


async def test_a_write_that_can_be_neither_confirmed_nor_read_back_is_told_as_unknown() -> None:
    def judge(function: int, address: int, count: int) -> Whim:
        return "silent" if 6 in [asked[0] for asked in peer.asked] else None

    async with (
        WilfulTcp([7], judge) as peer,
        connected([writable("p", 0)], port=peer.port, timeout_ms=60) as driver,
    ):
        with pytest.raises(
            DeviceUnreachable, match="whether 9 was written is not known, and it was not sent again"
        ):
            await driver.write(driver.points[0], 9)
        assert peer.written == [(6, 0, 1)]


async def test_a_value_that_shows_a_moment_later_is_waited_for() -> None:
    registers = [7]
    reads = 0

    def judge(function: int, address: int, count: int) -> Whim:
        nonlocal reads
        reads += function == 3
        if reads == 2:
            registers[0] = 9
        elif function == 3:
            registers[0] = 7
        return None

    async with WilfulTcp(registers, judge) as peer, connected([writable("p", 0)], port=peer.port) as driver:
        await driver.write(driver.points[0], 9)
        assert peer.asked == [(6, 0, 1), (3, 0, 1), (3, 0, 1)]


@pytest.mark.parametrize(
    ("code", "why"), [(6, "the device is busy and did not write it"), (3, "exception 3"), (4, "exception 4")]
)
async def test_an_exception_is_told_and_the_write_is_not_repeated(code: int, why: str) -> None:
    async with (
        WilfulTcp([7], lambda function, address, count: code if function == 6 else None) as peer,
        connected([writable("p", 0)], port=peer.port) as driver,
    ):
        with pytest.raises(PointRefused, match=why):
            await driver.write(driver.points[0], 9)
        assert peer.asked == [(6, 0, 1)]


@pytest.mark.parametrize(
    ("keys", "options", "value", "function", "remedy"),
    [
        ({}, {}, 9, 6, "write_single = false"),
        ({}, {"write_single": False}, 9, 16, "write_single = true"),
        ({"bit": 3}, {"write_bits": "mask"}, True, 22, "write_bits = 'rewrite'"),
    ],
)
async def test_a_function_that_the_device_does_not_know_is_told_with_the_option_that_may_help(
    keys: dict[str, object], options: dict[str, object], value: Value, function: int, remedy: str
) -> None:
    point: dict[str, object] = {"name": "p", "register": 0, "writable": True, **keys}
    async with (
        WilfulTcp([7], lambda asked, address, count: 1 if asked == function else None) as peer,
        connected([point], port=peer.port, **options) as driver,
    ):
        with pytest.raises(PointRefused, match=f"exception 1.*{remedy}"):
            await driver.write(driver.points[0], value)
        assert [asked for asked, _, _ in peer.asked] == [function]


async def test_a_device_that_needs_a_while_says_so_and_is_read_back() -> None:
    """Exception 5, acknowledge: accepted and being processed (Modbus application protocol 1.1b3, 7)."""
    registers = [7]

    def judge(function: int, address: int, count: int) -> Whim:
        if function == 6:
            registers[0] = 9
            return 5
        return None

    async with WilfulTcp(registers, judge) as peer, connected([writable("p", 0)], port=peer.port) as driver:
        await driver.write(driver.points[0], 9)
        assert peer.written == [(6, 0, 1)]


async def test_a_command_register_is_not_read_back_where_the_table_says_so() -> None:
    def judge(function: int, address: int, count: int) -> Whim:
        return 2 if function == 3 else None

    points = [writable("reset", 0, read_back=False), writable("start", 1)]
    async with WilfulTcp([0, 0], judge) as peer, connected(points, port=peer.port) as driver:
        await driver.write(driver.points[0], 1)
        assert peer.asked == [(6, 0, 1)]
        with pytest.raises(PointRefused, match=r"refuses to be read there; .*read_back = false"):
            await driver.write(driver.points[1], 1)


async def test_a_float_that_the_device_rounds_in_its_last_digits_is_as_written() -> None:
    registers = [0, 0]
    factor = 1.0

    def judge(function: int, address: int, count: int) -> Whim:
        nonlocal factor
        if function == 3:
            held = struct.unpack(">f", struct.pack(">2H", *registers))[0]
            registers[:] = words("f", held * factor)
            factor = 1.0
        return None

    async with (
        WilfulTcp(registers, judge) as peer,
        connected([writable("p", 0, "f32")], port=peer.port) as driver,
    ):
        factor = 1 + 2e-7
        await driver.write(driver.points[0], 21.54)
        factor = 1 - 2e-3
        with pytest.raises(PointRefused, match=r"wrote 21\.54, but it reads back as 21\.49"):
            await driver.write(driver.points[0], 21.54)


async def test_a_scaled_number_that_no_register_can_hold_is_refused_before_anything_is_sent() -> None:
    points = [
        {**writable("p", 0), "encoding": "i16", "scale_register": 3, "not_available": [0x8000]},
        {**writable("q", 1), "encoding": "i16", "scale_register": 2},
    ]
    async with WilfulTcp([0, 0, 0x8000, 0xFFFE]) as peer, connected(points, port=peer.port) as driver:
        for value, why in ((400.0, "does not fit i16"), (-327.68, "code for no value")):
            with pytest.raises(PointRefused, match=why):
                await driver.write(driver.points[0], value)
        with pytest.raises(PointRefused, match="is no exponent"):
            await driver.write(driver.points[1], 1.0)
        assert not peer.written
    point = {**writable("p", 0), "encoding": "i16", "decimals_register": 2}
    async with WilfulTcp([0, 0, 57]) as peer, connected([point], port=peer.port) as driver:
        with pytest.raises(PointRefused, match="holds no number of decimals"):
            await driver.write(driver.points[0], 1.0)
        assert not peer.written
