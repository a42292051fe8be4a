"""The simulator: deterministic by seed and clock, and never beyond what a type holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest

from drivers.contract import ConfigError, DeviceUnreachable, PointRefused, Reason, Value, ValueType
from drivers.simulator import SimulatorDriver, SimulatorOptions, SimulatorPoint, Wave


class Clock:
    """Seconds since boot, set by the test."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> int:
        return round(self.now_s * 1e9)


def device(points: Sequence[SimulatorPoint], clock: Clock | None = None, **options: int) -> SimulatorDriver:
    return SimulatorDriver("sim", SimulatorOptions(**options), points, clock_ns=clock or Clock())


async def course(point: SimulatorPoint, seconds: Sequence[float], **options: int) -> list[Value | None]:
    clock = Clock()
    driver = device([point], clock, **options)
    await driver.connect()
    values = []
    for clock.now_s in seconds:
        values.append((await driver.read(driver.points)).values[0])
    return values


@pytest.mark.parametrize(
    ("wave", "expected"),
    [
        (Wave.SINE, [60, 70, 60, 50, 60]),
        (Wave.RAMP, [50, 55, 60, 65, 50]),
        (Wave.SQUARE, [50, 50, 70, 70, 50]),
        (Wave.CONSTANT, [50, 50, 50, 50, 50]),
        (Wave.COUNTER, [50, 50, 50, 50, 51]),
    ],
)
async def test_a_wave_is_a_function_of_time(wave: Wave, expected: list[float]) -> None:
    point = SimulatorPoint(name="p", wave=wave, low=50, high=70, period_s=8)
    assert await course(point, [0, 2, 4, 6, 8]) == pytest.approx(expected)


async def test_a_counter_wraps_after_its_highest() -> None:
    point = SimulatorPoint(name="p", type=ValueType.U8, wave=Wave.COUNTER, low=0, high=2, period_s=1)
    assert await course(point, range(7)) == [0, 1, 2, 0, 1, 2, 0]


async def test_one_seed_gives_one_walk_and_another_gives_another() -> None:
    point = SimulatorPoint(name="p", wave=Wave.WALK, low=10, high=20, noise=0.1)
    seconds = [i * 0.5 for i in range(50)]
    first = await course(point, seconds, seed=1)
    assert await course(point, seconds, seed=1) == first
    assert await course(point, seconds, seed=2) != first
    assert len(set(first)) > 20


async def test_a_walk_stays_between_low_and_high_and_moves_by_small_steps() -> None:
    found = await course(SimulatorPoint(name="p", wave=Wave.WALK, low=10, high=20), range(2500))
    walk = [value for value in found if isinstance(value, float)]
    assert len(walk) == 2500
    assert min(walk) == 10
    assert max(walk) == 20
    assert max(abs(a - b) for a, b in pairwise(walk)) < 2  # also where it goes round


async def test_another_point_changes_nothing_about_the_first() -> None:
    point = SimulatorPoint(name="p", wave=Wave.WALK, noise=1)
    other = SimulatorPoint(name="q", wave=Wave.WALK, noise=1)
    alone, both = device([point]), device([other, point])
    await alone.connect()
    await both.connect()
    assert (await alone.read([point])).values[0] == (await both.read([other, point])).values[1]


async def test_what_the_type_cannot_hold_is_an_overflow_and_not_clamped() -> None:
    points = [
        SimulatorPoint(name="u8", type=ValueType.U8, wave=Wave.CONSTANT, low=256, high=300),
        SimulatorPoint(name="f32", type=ValueType.F32, wave=Wave.CONSTANT, low=1e39, high=1e39),
        SimulatorPoint(name="bool", type=ValueType.BOOL, wave=Wave.CONSTANT, low=1),
        SimulatorPoint(name="str", type=ValueType.STR, wave=Wave.CONSTANT, low=1.5),
    ]
    driver = device(points)
    await driver.connect()
    scan = await driver.read(driver.points)
    assert scan.values == [None, None, True, "1.500"]
    assert scan.reasons == {0: Reason.OVERFLOW, 1: Reason.OVERFLOW}


async def test_every_nth_read_fails_as_asked() -> None:
    driver = device([SimulatorPoint(name="p")], fail_every=3)
    await driver.connect()
    for _ in range(2):
        await driver.read(driver.points)
    with pytest.raises(DeviceUnreachable):
        await driver.read(driver.points)
    with pytest.raises(DeviceUnreachable, match="not connected"):
        await driver.read(driver.points)
    await driver.connect()
    await driver.read(driver.points)


async def test_a_written_value_stays_and_must_fit() -> None:
    driver = device(
        [SimulatorPoint(name="p", type=ValueType.U8), SimulatorPoint(name="b", type=ValueType.BOOL)]
    )
    await driver.connect()
    number, flag = driver.points
    await driver.write(number, 9)
    await driver.write(flag, True)
    assert (await driver.read(driver.points)).values == [9, True]
    for point, value in ((number, 256), (number, 1.5), (number, "9"), (number, True), (flag, 1)):
        with pytest.raises(PointRefused):
            await driver.write(point, value)
    assert (await driver.read(driver.points)).values == [9, True]


@pytest.mark.parametrize(
    "point",
    [
        SimulatorPoint(name="p", low=2, high=1),
        SimulatorPoint(name="p", high=float("inf")),
        SimulatorPoint(name="p", low=float("nan")),
    ],
)
def test_a_wave_without_room_is_refused(point: SimulatorPoint) -> None:
    with pytest.raises(ConfigError, match="point 'p'"):
        device([point])
