"""The field without an agent: lines and devices opened by this process itself."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.field import FieldError, UnknownDevice, raw_of
from agent.field_direct import DirectField
from config.agent import Device
from drivers.contract import DeviceUnreachable, Point, PointRefused, Reason, ValueType, engineering

CONFIG = """
[gateway]
tenant = "acme"
name = "plant-1"
[uplink]
kind = "none"
[[device]]
name = "boiler"
driver = "simulator"
period_ms = 20
[[device.point]]
name = "flow"
type = "i16"
scale = 0.1
wave = "constant"
low = 234
high = 1000
valid_max = 100.0
unit = "Cel"
[[device]]
name = "idle"
driver = "simulator"
enabled = false
[[device.point]]
name = "x"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "agent.toml"
    path.write_text(CONFIG)
    return path


async def test_a_configured_device_is_read_written_and_watched(file: Path) -> None:
    field = DirectField(file)
    try:
        [reading] = (await field.read("boiler")).readings
        assert (reading.value, reading.raw, reading.unit) == (23.4, 234, "Cel")
        [back] = (await field.write("boiler", "flow", 51.7)).readings
        assert (back.value, back.raw) == (51.7, 517)
        seen = []
        async for look in field.watch("boiler"):
            seen.append(look)
            if len(seen) == 3:
                break
        assert [look.readings[0].raw for look in seen] == [517] * 3
        assert seen[0].taken_at_ns < seen[1].taken_at_ns < seen[2].taken_at_ns
    finally:
        await field.close()


async def test_what_is_not_configured_is_told_with_the_nearest_name(file: Path) -> None:
    field = DirectField(file)
    with pytest.raises(UnknownDevice, match="did you mean 'boiler'"):
        await field.read("boilr")
    with pytest.raises(UnknownDevice, match="did you mean 'flow'"):
        await field.write("boiler", "flw", 1)
    with pytest.raises(FieldError, match="enabled = true"):
        await field.read("idle")
    with pytest.raises(FieldError, match="--config"):
        await DirectField().read("boiler")
    with pytest.raises(FieldError, match="no agent runs"):
        await field.reload()
    await field.close()


async def test_a_value_out_of_range_never_reaches_the_device(file: Path) -> None:
    field = DirectField(file)
    with pytest.raises(PointRefused, match="outside"):
        await field.write("boiler", "flow", 100.1)
    assert (await field.read("boiler")).readings[0].raw == 234
    await field.close()


async def test_a_device_that_is_not_there_is_unreachable_and_a_watch_of_it_shows_why(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text(
        CONFIG.split("[[device]]", maxsplit=1)[0]
        + '[[device]]\nname = "m"\ndriver = "modbus"\nperiod_ms = 20\n[device.options]\nhost = "127.0.0.1"\nport = 1\n'
        '[[device.point]]\nname = "x"\nregister = 0\n'
    )
    field = DirectField(file)
    with pytest.raises(DeviceUnreachable):
        await field.read("m")
    async for look in field.watch("m"):
        assert [(r.value, r.reason) for r in look.readings] == [(None, Reason.DISCONNECTED)]
        break
    await field.close()


async def test_an_attempt_needs_no_configuration_and_leaves_nothing_open() -> None:
    field = DirectField()
    device = Device(name="new", driver="simulator", point=[{"name": "a", "wave": "constant", "low": 7.0}])
    assert [r.value for r in (await field.attempt(device)).readings] == [7.0]
    await field.close()


# --- what a person gives, as it is written ---


@given(
    st.integers(-32768, 32767),
    st.sampled_from([0.1, 0.01, 0.001, 1.0, 10.0, 0.5, 0.3048, -0.1]),
    st.sampled_from([0.0, -40.0, 273.15, 1e4]),
)
def test_every_raw_value_is_written_back_from_what_a_person_sees(
    raw: int, scale: float, offset: float
) -> None:
    point = Point(name="p", type=ValueType.I16, scale=scale, offset=offset)
    assert raw_of(point, engineering(raw, scale, offset)) == raw


@pytest.mark.parametrize(
    ("point", "value", "what"),
    [
        (Point(name="p", type=ValueType.I16, scale=0.1), 23.45, "the nearest are 23.4 and 23.5"),
        (Point(name="p", type=ValueType.U8), 256, "u8"),
        (Point(name="p", type=ValueType.U8), -1, "u8"),
        (Point(name="p", type=ValueType.U16), math.nan, "not a number"),
        (Point(name="p", type=ValueType.F32), math.inf, "not a number"),
        (Point(name="p", type=ValueType.F32), 1e39, "f32"),
        (Point(name="p", type=ValueType.U16), "7", "not a number"),
        (Point(name="p", type=ValueType.U16), True, "not a number"),
        (Point(name="p", type=ValueType.BOOL), 2, "true or false"),
        (Point(name="p", type=ValueType.STR), 2, "not text"),
        (Point(name="p", type=ValueType.U16, not_available=(0xFFFF,)), 65535, "no value here"),
        (Point(name="p", type=ValueType.U16, one_of=(0.0, 1.0)), 2, "0, 1"),
        (Point(name="p", type=ValueType.U16, valid_min=5.0), 4, "outside"),
        (Point(name="p", type=ValueType.U16, scale=0.0), 4, "cannot be written"),
    ],
)
def test_what_a_point_cannot_hold_is_refused_with_the_reason(
    point: Point, value: float | str, what: str
) -> None:
    with pytest.raises(PointRefused, match=what):
        raw_of(point, value)


def test_sixty_four_bits_keep_every_digit() -> None:
    assert raw_of(Point(name="p", type=ValueType.U64), 2**64 - 1) == 2**64 - 1
