"""The contract itself, and our pull drivers against the suite that any driver may run."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import ClassVar

import msgspec
import pytest

from drivers import conformance
from drivers.contract import (
    DeviceUnreachable,
    Driver,
    Point,
    PointRefused,
    PushDriver,
    Quality,
    Reason,
    Scan,
    ValueType,
    boot_ns,
    engineering,
)
from drivers.registry import build
from tests.fakes.modbus_peer import ScriptedTcp, Unit, rtu_peer, tcp_peer

POINTS: list[dict[str, object]] = [
    {"name": "a", "register": 4},
    {"name": "b", "register": 0, "type": "f32"},
    {"name": "c", "register": 150, "type": "i16"},
    {"name": "d", "register": 3, "table": "coil"},
    {"name": "e", "register": 2, "bit": 3},
]
UNIT = Unit(holding=list(range(200)), coils=[True] * 16)


# ------------------------------------------------------------------------------------ the contract


def test_the_contract_brings_nothing_but_the_standard_library_and_msgspec() -> None:
    script = (
        "import sys, msgspec; before = set(sys.modules); import drivers.contract;"
        "print(*{m.split('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    root = Path(__file__).parent.parent
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["drivers"]


def test_a_reasons_number_tells_its_quality_and_whether_there_is_a_value() -> None:
    for reason in Reason:
        assert reason.has_value == (reason < 128)
        assert reason.quality == (
            Quality.GOOD if reason == 0 else Quality.UNCERTAIN if reason < 64 else Quality.BAD
        )
    assert max(Reason) <= 255
    # Published numbers: they are in stored frames, and never change.
    assert (Reason.RATE, Reason.RANGE, Reason.TIMEOUT, Reason.DRIVER) == (1, 64, 128, 141)


@pytest.mark.parametrize(
    ("raw", "scale", "offset", "seen"),
    [
        (234, 0.1, 0, 23.4),
        (234, 0.01, -40, -37.66),
        (5, 1, 0, 5),
        (3, 2.5, 1, 8.5),
        (7, 0, 0, 0),
        (-1, 0.001, 0, -0.001),
    ],
)
def test_engineering_values_have_no_binary_dust(raw: float, scale: float, offset: float, seen: float) -> None:
    assert math.isclose(engineering(raw, scale, offset), seen, abs_tol=1e-12)
    assert engineering(234, 0.1, 0.0) == 23.4


# ------------------------------------------------------------------------------------ conformance


@pytest.mark.parametrize("check", conformance.PULL, ids=conformance.title)
async def test_modbus_tcp_conforms(check: conformance.Check) -> None:
    async with ScriptedTcp() as gone:
        port = gone.port
    async with tcp_peer({1: UNIT}) as peer:
        options = {"host": "127.0.0.1", "port": peer.port}
        await check(
            conformance.Subject(
                build=lambda: build("d", "modbus", options, POINTS),
                absent=lambda: build("d", "modbus", {**options, "port": port}, POINTS),
                peer_files=("*/modbus_peer.py",),  # it keeps what it was asked
            )
        )


@pytest.mark.parametrize("check", conformance.PULL, ids=conformance.title)
async def test_modbus_rtu_conforms(check: conformance.Check) -> None:
    async with rtu_peer({1: UNIT}) as peer:
        options = {
            "serial": peer.path,
            "baud": 115200,
            "parity": "none",
            "timeout_ms": 500,
            "latest_reply_ms": 500,
        }
        await check(
            conformance.Subject(
                build=lambda: build("d", "modbus", options, POINTS),
                absent=lambda: build("d", "modbus", {**options, "unit": 77, "timeout_ms": 50}, POINTS),
                peer_files=("*/modbus_peer.py",),
            )
        )


@pytest.mark.parametrize("check", conformance.PULL, ids=conformance.title)
async def test_the_simulator_conforms(check: conformance.Check) -> None:
    types = [{"name": str(each), "type": str(each), "high": 1} for each in ValueType]
    await check(conformance.Subject(build=lambda: build("d", "simulator", {}, types)))


# ------------------------------------------------------------- the suite finds what it is there to find


class _Options(msgspec.Struct):
    pass


class _Sound(Driver[_Options, Point]):
    """A driver with nothing wrong; each one below breaks one rule."""

    options_type: ClassVar[type[msgspec.Struct]] = _Options
    point_type: ClassVar[type[Point]] = Point
    open = False

    async def connect(self) -> None:
        self.open = True

    async def close(self) -> None:
        self.open = False

    async def read(self, points: Sequence[Point]) -> Scan:
        if not self.open:
            raise DeviceUnreachable("not connected")
        await asyncio.sleep(0)
        return Scan(boot_ns(), tuple(points), [1.0] * len(points))


class _OwnOrder(_Sound):
    async def read(self, points: Sequence[Point]) -> Scan:
        return await super().read(self.points)


class _SilentNone(_Sound):
    async def read(self, points: Sequence[Point]) -> Scan:
        scan = await super().read(points)
        return Scan(scan.taken_at_ns, scan.points, [None] * len(points))


class _WrongType(_Sound):
    async def read(self, points: Sequence[Point]) -> Scan:
        scan = await super().read(points)
        return Scan(scan.taken_at_ns, scan.points, [1] * len(points))


class _OldTime(_Sound):
    async def read(self, points: Sequence[Point]) -> Scan:
        scan = await super().read(points)
        return Scan(scan.taken_at_ns - 10**9, scan.points, scan.values)


class _Eager(_Sound):
    async def read(self, points: Sequence[Point]) -> Scan:
        return Scan(boot_ns(), tuple(points), [1.0] * len(points))


class _ClosesOnce(_Sound):
    async def close(self) -> None:
        if not self.open:
            raise RuntimeError("closed already")
        self.open = False


class _Leaky(_Sound):
    async def connect(self) -> None:
        await super().connect()
        self.task = asyncio.get_running_loop().create_task(asyncio.sleep(60))


class _BreaksWhenCancelled(_Sound):
    broken = False

    async def read(self, points: Sequence[Point]) -> Scan:
        if self.broken:
            raise RuntimeError("still busy")
        self.broken = True
        scan = await super().read(points)
        self.broken = False
        return scan


class _Mute(PushDriver[_Options, Point]):
    options_type: ClassVar[type[msgspec.Struct]] = _Options
    point_type: ClassVar[type[Point]] = Point

    async def connect(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def scans(self) -> AsyncIterator[Scan]:
        while True:
            await asyncio.sleep(0.001)
            yield Scan(boot_ns(), (Point(name="stranger"),), [1.0])


TWO = (Point(name="a"), Point(name="b"))


@pytest.mark.parametrize("check", conformance.PULL, ids=conformance.title)
async def test_a_sound_driver_passes(check: conformance.Check) -> None:
    await check(conformance.Subject(build=lambda: _Sound("d", _Options(), TWO)))


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        (_OwnOrder, conformance.points_come_in_the_order_asked),
        (_SilentNone, conformance.points_come_in_the_order_asked),
        (_WrongType, conformance.points_come_in_the_order_asked),
        (_OldTime, conformance.a_scan_is_stamped_when_it_arrived),
        (_Eager, conformance.reading_before_connect_is_unreachable),
        (_ClosesOnce, conformance.close_is_safe_at_any_time),
        (_Leaky, conformance.nothing_is_left_behind),
        (_BreaksWhenCancelled, conformance.a_cancelled_read_does_no_harm),
        (_Mute, conformance.scans_tell_what_the_device_said),
    ],
)
async def test_a_driver_that_breaks_a_rule_is_found(
    kind: type[_Sound | _Mute], check: conformance.Check
) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        await check(conformance.Subject(build=lambda: kind("d", _Options(), TWO)))


async def test_an_absent_device_that_is_read_is_found() -> None:
    def sound() -> _Sound:
        return _Sound("d", _Options(), TWO)

    with pytest.raises(AssertionError, match="not there was read"):
        await conformance.an_absent_device_is_unreachable(conformance.Subject(build=sound, absent=sound))


async def test_a_driver_refuses_writes_unless_it_says_otherwise() -> None:
    with pytest.raises(PointRefused, match="a: this driver does not write"):
        await _Sound("d", _Options(), TWO).write(TWO[0], 1.0)
