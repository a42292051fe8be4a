"""The driver against a sensor on a pty: the conformance suite, and what is its own."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from drivers.conformance import Check, Subject
from drivers.contract import ConfigError, Reason, ValueType
from sensor import Sensor, sensor

from headgate_pms5003 import driver
from headgate_pms5003.driver import Pms5003Driver, Pms5003Options, Pms5003Point, scan

POINTS = (
    Pms5003Point(name="pm2_5", unit="ug/m3", number="pm2_5"),
    Pms5003Point(name="pm10", unit="ug/m3", number="pm10"),
)


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Sensor]:
    with sensor(tmp_path) as made:
        yield made


@pytest.fixture
def subject(it: Sensor) -> Subject:
    def build(port: str = "") -> Pms5003Driver:
        return Pms5003Driver("air", Pms5003Options(port=port or str(it.port)), POINTS)

    return Subject(
        build=build,
        absent=lambda: build("/dev/nobody"),
        provoke=it.speak,
        change=it.change,
        truth=it.truth,
        silence=it.silence(),
        faults=it.faults(),
        try_s=0.5,
        peer_files=("*/sensor.py",),
    )


@pytest.mark.headgate_driver(kind=Pms5003Driver)
async def test_conforms(headgate_check: Check, subject: Subject) -> None:
    await headgate_check(subject)


def test_a_frame_of_the_data_manual_reads_as_it_says() -> None:
    # Written out by hand: PM2.5 in air is 7 ug/m3, PM10 is 11; the sum of the 30 bytes before it is 0x033B.
    sent = bytes.fromhex("424D 001C 0005 0009 000C 0004 0007 000B 0384 00FA 003C 0008 0003 0001 9700 033B")
    assert sum(sent[:-2]) == 0x033B
    assert scan(1, POINTS, sent[2:]).values == [7, 11]


def test_one_flipped_bit_anywhere_gives_no_value() -> None:
    sent = bytearray(bytes.fromhex("001C" + "0007" * 13))
    sent += (sum(b"BM" + sent)).to_bytes(2, "big")
    assert scan(1, POINTS, bytes(sent)).reasons == {}
    for bit in range(len(sent) * 8):
        damaged = bytearray(sent)
        damaged[bit // 8] ^= 1 << bit % 8
        assert scan(1, POINTS, bytes(damaged)).reasons == {0: Reason.CRC, 1: Reason.CRC}


def test_a_type_that_the_sensor_does_not_send_is_refused() -> None:
    with pytest.raises(ConfigError, match="point 'p'"):
        Pms5003Driver(
            "air", Pms5003Options(port="x"), [Pms5003Point(name="p", number="pm1", type=ValueType.F32)]
        )


def test_the_sample_has_every_key() -> None:
    text = Path(driver.__file__).with_name("pms5003.toml").read_text()
    assert tomllib.loads(text)["device"][0]["driver"] == "pms5003"
    for key in Pms5003Options.__struct_fields__:
        assert f"{key} =" in text, key
