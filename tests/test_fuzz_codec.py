"""Register decoders against random bytes: a value of its type, or a reason; never an exception.

`HEADGATE_FUZZ=1000000 pytest tests/test_fuzz_codec.py` for a long run.
"""

from __future__ import annotations

import math
import os
import random
import resource
import struct

import msgspec
import pytest

from drivers.codec import DATES, INSTANTS, Encoding, Field, RegisterDecoder, encode, is_part, what_is_wrong
from drivers.contract import Reason, Value, ValueType

INPUTS = int(os.environ.get("HEADGATE_FUZZ", "2000"))
ORDERS = ("ABCD", "CDAB", "BADC", "DCBA")
PACKED = {
    "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i", "u32": "I", "i64": "q", "u64": "Q",
    "f32": "f", "f64": "d", "bool": "?",
}  # fmt: skip


def fields(rng: random.Random) -> list[Field]:
    """Every type and encoding that there is, each in a random place and order, in one block."""
    found = []
    for type_ in ValueType:
        for encoding in (None, *Encoding):
            draft = Field(
                at=2 * rng.randrange(0, 100),
                type=type_,
                order=rng.choice(ORDERS),
                encoding=encoding,
                bit=rng.randrange(0, 32) if type_ is ValueType.BOOL else None,
                length=rng.randrange(1, 9) if type_ is ValueType.STR else 0,
                not_available=(0x8000, 0xFFFF) if rng.random() < 0.3 else (),
                utc_offset_min=rng.randrange(-840, 840) if encoding in INSTANTS else 0,
            )
            found.append(draft)
            found.append(msgspec.structs.replace(draft, scale_at=2 * rng.randrange(0, 100)))
            found.append(msgspec.structs.replace(draft, length=rng.randrange(1, 9)))
            if type_ in (ValueType.U8, ValueType.U16, ValueType.U32):
                bit = rng.randrange(0, 32)
                bits = rng.randrange(1, 33 - bit)
                found.append(Field(at=draft.at, type=type_, order=draft.order, bit=bit, bits=bits))
    return [field for field in found if what_is_wrong(field) is None]


def block(rng: random.Random, size: int) -> bytes:
    """Random bytes, and those that devices send: all ones, all zeros, decimal digits, near-dates."""
    kind = rng.randrange(5)
    if kind == 0:
        return rng.randbytes(size)
    if kind == 1:
        return rng.choice((b"\xff", b"\0", b"\x80\0", b"\x7f\xff")) * size
    if kind == 2:
        return bytes(rng.randrange(10) << 4 | rng.randrange(10) for _ in range(size))
    if kind == 3:
        return struct.pack(f">{size // 2 + 1}H", *(rng.randrange(0, 70) for _ in range(size // 2 + 1)))
    return struct.pack(
        f">{size // 4 + 1}f", *(rng.choice((math.nan, math.inf, -0.0, 1e38)) for _ in range(size // 4 + 1))
    )


def fits(value: Value, type_: ValueType) -> bool:
    """It can travel as its type."""
    if type_ is ValueType.STR:
        return isinstance(value, str) and bool(value.encode() or not value)
    if isinstance(value, str):
        return False
    struct.pack("<" + PACKED[type_], value)
    return math.isfinite(value)


@pytest.mark.timeout(60 + INPUTS / 5000)
def test_any_registers_give_each_field_a_value_of_its_type_or_a_reason() -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    seen: set[tuple[ValueType, Encoding | None]] = set()
    inputs, before_kb = 0, 0
    while inputs < INPUTS:
        chosen = fields(rng)
        decoder = RegisterDecoder(chosen)
        for _ in range(10):
            data = block(rng, decoder.size)
            values, reasons = decoder.decode(data)
            inputs += len(chosen)
            assert len(values) == len(chosen)
            for i, (field, value) in enumerate(zip(chosen, values, strict=True)):
                reason = (reasons or {}).get(i, Reason.GOOD)
                assert (value is None) <= (reason is not Reason.GOOD), (field, data.hex())
                assert value is None or reason.has_value, (field, data.hex())
                assert value is None or fits(value, field.type), (field, value)
                seen.add((field.type, field.encoding))
                written = field.encoding not in DATES and field.scale_at is None and not is_part(field)
                if value is not None and written:
                    again = RegisterDecoder([field.moved(-field.at)]).decode(encode(value, field))[0][0]
                    assert again == value, (field, value, again)
        if not before_kb and inputs > INPUTS // 4:
            before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert {encoding for _, encoding in seen} == {None, *Encoding}
    assert {type_ for type_, _ in seen} == set(ValueType)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 20_000  # kB
