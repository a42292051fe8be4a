"""Any bytes at all into every serial framing and parser: no crash, no value of a wrong type, no memory kept.

HEADGATE_FUZZ says how many inputs each target gets; the seed is printed, and HEADGATE_SEED gives it back.
"""

from __future__ import annotations

import math
import os
import random
import tracemalloc
from collections.abc import Callable

import msgspec
import pytest

from drivers.codec import limits_of
from drivers.contract import Reason, ValueType
from drivers.fields import Doubted, Result, parse
from drivers.framing import LineCounts
from drivers.iec62056 import block_size, data_block, identification
from drivers.instrument import Dialect, SerialLineOptions, SerialLinePoint
from drivers.mbus import MbusDriver, MbusOptions, MbusPoint, Readout
from drivers.mbus_link import Telegram, acknowledged, telegram, telegram_size
from drivers.mbus_records import records
from drivers.obis import DataSets, code
from drivers.sdi12 import answer_in, identity, promise, values
from drivers.serial_detect import recognise
from drivers.serial_line import dialect_of
from tests.fakes.mbus_meter import PAD, rsp_ud
from tests.test_drivers_mbus import AMTRON, POLLUCOM
from tests.test_drivers_serial_detect import SAMPLES, modbus
from tests.test_drivers_serial_protocols import DSMR

INPUTS = int(os.environ.get("HEADGATE_FUZZ", "2000"))
SEED = int(os.environ.get("HEADGATE_SEED", "20261123"))
P = SerialLinePoint

SEEDS: dict[str, bytes] = SAMPLES | {
    "binary": bytes.fromhex("AA 55 0A 00 01 02 03 04 05 06 07 08 00 00") * 3 + SAMPLES["binary"][:60],
    "hdlc": b"\x7e\x01\x7d\x5e\x02\x03\x7e\x7e\x7d\x7e",
    "dle": b"\x10\x02ab\x10\x10cd\x10\x03\x10\x02",
    "text": b"W=  12.5 kg, T= 21.5 C\r\n1;2;;nan;inf;1e999;-0\r\n$A*41\r\n",
}


def mutated(rng: random.Random, seed: bytes) -> bytes:
    """A piece of something proper, hurt here and there."""
    begin = rng.randrange(len(seed))
    data = bytearray(seed[begin : begin + rng.randrange(1, 400)])
    for _ in range(rng.choice((0, 1, 1, 3, 10))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0:
                data[at:at] = rng.randbytes(rng.randrange(1, 6))
            case 1:
                del data[at : at + rng.randrange(1, 9)]
            case 2 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 3:
                data[at:at] = bytes(
                    [rng.choice(b"\x00\x02\x03\x06\x10\x7d\x7e\xc0\xdb\xff\r\n!/$*()+-.,;0")]
                ) * rng.randrange(1, 70)
            case _:
                other = rng.choice(list(SEEDS.values()))
                data[at:at] = other[: rng.randrange(len(other))][:60]
    return bytes(data)


def proper(result: Result, point: SerialLinePoint) -> None:
    """A value of the point's type, or a reason that tells why there is none."""
    value = result
    if isinstance(result, Doubted):
        assert result.reason.has_value
        assert result.reason is not Reason.GOOD
        value = result.value
    if isinstance(value, Reason):
        assert not value.has_value
        return
    if point.type is ValueType.STR:
        assert isinstance(value, str)
    elif point.type is ValueType.BOOL:
        assert isinstance(value, bool)
    elif point.type in (ValueType.F32, ValueType.F64):
        assert isinstance(value, float)
        assert math.isfinite(value)
    else:
        low, high = limits_of(point.type)
        assert type(value) is int
        assert low <= value <= high


TEXT: dict[str, object] = {"pattern": r"W=\s*(?P<a>[^ ]+) kg(, T=\s*(?P<b>\S+))?", "separator": ";"}
TEXT_POINTS = [P(name="a"), P(name="b", type=ValueType.F32), P(name="c", column=2, type=ValueType.I16)]
BINARY: dict[str, object] = {"content": "binary", "layout": "<HfI"}
BINARY_POINTS = [
    P(name="a", item=1, type=ValueType.U8),
    P(name="b", item=2, type=ValueType.F32),
    P(name="c", item=3),
]
CRC: dict[str, object] = {
    "check": "crc16_modbus",
    "check_order": "little",
    "check_from": 2,
    "start_hex": "AA 55",
}
DIALECTS: dict[str, tuple[dict[str, object], list[SerialLinePoint], str]] = {
    "delimiter": (TEXT, TEXT_POINTS, "text"),
    "checked lines": (TEXT | {"check": "sum8", "check_hex": True}, TEXT_POINTS, "text"),
    "fixed": (BINARY | CRC | {"framing": "fixed"}, BINARY_POINTS, "binary"),
    "length": (
        BINARY | CRC | {"framing": "length", "length_offset": 2, "length_counts": "rest", "layout": "<xHfI"},
        BINARY_POINTS,
        "binary",
    ),
    "hdlc": (
        BINARY
        | {"framing": "start_stop", "start_hex": "7E", "end_hex": "7E", "escape": "hdlc", "check": "xor"},
        BINARY_POINTS,
        "hdlc",
    ),
    "slip": (
        BINARY | {"framing": "start_stop", "start_hex": "C0", "end_hex": "C0", "escape": "slip"},
        BINARY_POINTS,
        "hdlc",
    ),
    "dle": (
        BINARY | {"framing": "start_stop", "start_hex": "10 02", "end_hex": "10 03", "escape": "dle"},
        BINARY_POINTS,
        "dle",
    ),
    "stx etx bcc": (
        TEXT
        | {
            "framing": "start_stop",
            "start_hex": "02",
            "end_hex": "03",
            "check": "xor",
            "check_after_end": True,
        },
        TEXT_POINTS,
        "dle",
    ),
    "gap": (BINARY | {"framing": "gap"} | {"check": "crc16_arc"}, BINARY_POINTS, "binary"),
    "nmea0183": (
        {"protocol": "nmea0183"},
        [
            P(name="a", sentence="RMC", column=3, form="degrees"),
            P(name="b", sentence="GGA", column=7, type=ValueType.U8),
            P(name="c", sentence="MWV", column=3, type=ValueType.STR),
        ],
        "nmea0183",
    ),
    "dsmr": (
        {"protocol": "dsmr", "checked": False},
        [P(name="a", obis="1.8.1"), P(name="b", obis="24.2.1")],
        "dsmr",
    ),
}
DIALECTS |= {
    name: (
        {"protocol": name, "checked": False},
        [P(name="weight", unit="kg"), P(name="tare", type=ValueType.U16), P(name="unit", type=ValueType.STR)],
        name,
    )
    for name in ("toledo", "and", "cas", "sbi", "ohaus")
}


def dialect_for(name: str) -> Dialect:
    options, points, _ = DIALECTS[name]
    return dialect_of(msgspec.convert({"port": "x", **options}, SerialLineOptions), points)


@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", DIALECTS)
def test_a_line_of_anything_gives_values_or_reasons_and_keeps_nothing(name: str) -> None:
    print("seed", SEED)
    rng = random.Random(f"{SEED} {name}")
    dialect = dialect_for(name)
    seed = SEEDS[DIALECTS[name][2]]
    framer = dialect.framer(LineCounts(), in_step=True)
    held = 0
    for number in range(INPUTS):
        if number == min(INPUTS // 2, 1000):
            tracemalloc.start()
        data = mutated(rng, seed)
        cuts = framer.feed(data, number + 1)
        if rng.random() < 0.1 and framer.partial:
            cuts += framer.silence()
        for body, at_ns in cuts:
            assert 0 <= at_ns <= number + 1
            said = dialect.lost(body) if isinstance(body, Reason) else dialect.read(body)
            if said is None:
                continue
            if isinstance(said.results, Reason):
                assert not said.results.has_value
                continue
            for point, result in zip(said.points, said.results, strict=True):
                proper(result, point)
        held = max(held, len(getattr(framer, "_buffer", b"")) + len(getattr(framer, "_rest", b"")))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held <= 16_384 + 1_000  # DSMR's longest telegram, the longest of all
    assert kept < 400_000, f"{kept} bytes are held after {INPUTS} inputs"


Target = Callable[[bytes], object]


def _sdi12(data: bytes) -> object:
    found = answer_in(data, b"0M!")
    text = data.decode("latin-1")
    return found, identity(text), promise(text), values(text)


def _iec(data: bytes) -> object:
    size = block_size(data)
    assert 0 <= size <= len(data)
    found = identification(data)
    assert found is None or 0 < found[1] <= len(data)
    block = data_block(data, checked=bool(len(data) & 1))
    assert isinstance(block, Reason | str)
    return DataSets(block).values("1.8.0") if isinstance(block, str) else None


def _fields(data: bytes) -> object:
    text = data.decode("latin-1")[:40]
    for kind in ValueType:
        proper(parse(text, kind, base=16 if len(data) & 1 else 10), P(name="x", type=kind))
    return code(text)


def _detect(data: bytes) -> object:
    guesses = recognise(data)
    assert guesses
    assert all(0 <= guess.likelihood <= 1 for guess in guesses)
    return guesses


MBUS_POINTS = [
    *(MbusPoint(name=f"r{n}", record=n, type=kind) for n in (1, 2, 5) for kind in ValueType),
    MbusPoint(name="e", unit="GJ", quantity="energy"),
    MbusPoint(name="t", unit="Cel", quantity="flow_temperature", type=ValueType.F32),
    MbusPoint(name="m", unit="l/h", quantity="volume_flow", function="maximum", storage=5),
    MbusPoint(name="d", quantity="date", type=ValueType.STR),
]
MBUS = MbusDriver("m", MbusOptions(port="x", address=1), MBUS_POINTS)
MBUS_DATA = (
    bytes.fromhex(POLLUCOM)[12:-1]
    + bytes.fromhex(AMTRON)[12:]
    + bytes.fromhex(
        PAD[34:]
        + "426C5F1C 046D1A2F6511 04863C2A000000 02FC0348522574D411 0DFD1103636261 8480400601020304 01FD1780 0F"
    )
)


def _mbus_link(data: bytes) -> object:
    sent = data[:5] if len(data) & 1 else b"\x10\x7b\x01\x7c\x16"
    assert 0 <= acknowledged(data, sent) <= len(data)
    size = telegram_size(data, sent)
    assert 0 <= size <= len(data)
    came = telegram(data[:size], sent)
    assert isinstance(came, Telegram | Reason)
    return came if isinstance(came, Reason) else _mbus_records(came.data[12:])


def _mbus_records(data: bytes) -> object:
    part = records(data)
    assert [record.number for record in part.records] == [*range(1, len(part.records) + 1)]
    trouble = Reason.FRAMING if part.broken else None
    scan = MBUS._scan(MBUS_POINTS, Readout(1, "", (data + b"\0")[0], part.records, trouble))
    for index, point in enumerate(MBUS_POINTS):
        value, reason = scan.values[index], scan.reasons.get(index)
        if value is None:
            assert reason is not None
            assert not reason.has_value
        else:
            assert reason is None or reason.has_value
            proper(value, P(name="x", type=point.type))
    return scan


TARGETS: dict[str, tuple[Target, bytes]] = {
    "mbus telegrams": (_mbus_link, rsp_ud(POLLUCOM) + b"\xe5\x10\x7b\x01\x7c\x16" + rsp_ud(PAD)),
    "mbus records": (_mbus_records, MBUS_DATA),
    "sdi12": (_sdi12, b"0+3.14-2.718+1.414Ipz\r\n013NRSYSINC1000001.2101\r\n0M!00013\r\n"),
    "iec62056": (_iec, SAMPLES["iec62056"] + DSMR),
    "fields": (_fields, b"+12.5 -0x1F 1e400 nan inf 18446744073709551616 1_000 on off 1-0:1.8.0*255"),
}


@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", TARGETS)
def test_a_parser_takes_anything(name: str) -> None:
    print("seed", SEED)
    rng = random.Random(f"{SEED} {name}")
    target, seed = TARGETS[name]
    for _ in range(INPUTS):
        target(mutated(rng, seed))


@pytest.mark.timeout(0)
def test_anything_heard_is_recognised_as_something() -> None:
    print("seed", SEED)
    rng = random.Random(SEED)
    seeds = [*SEEDS.values(), modbus(b"\x01\x03\x00\x00\x00\x02") * 20]
    for _ in range(max(INPUTS // 20, 50)):  # each looks at a whole capture
        _detect(b"".join(mutated(rng, rng.choice(seeds)) for _ in range(rng.randrange(1, 6))))
