"""Registers to values. Expected bytes come from IEEE 754, two's complement and the letters of an order."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.codec import BitDecoder, Field, RegisterDecoder, encode, places, registers_of
from drivers.contract import Reason, Value, ValueType

# 123456.0 is 0x47F12000 in IEEE 754 single precision; 305419896 is 0x12345678.
KNOWN = [
    ("f32", "ABCD", "47 f1 20 00", 123456.0),
    ("f32", "CDAB", "20 00 47 f1", 123456.0),
    ("f32", "BADC", "f1 47 00 20", 123456.0),
    ("f32", "DCBA", "00 20 f1 47", 123456.0),
    ("u32", "ABCD", "12 34 56 78", 0x12345678),
    ("u32", "CDAB", "56 78 12 34", 0x12345678),
    ("u32", "BADC", "34 12 78 56", 0x12345678),
    ("u32", "DCBA", "78 56 34 12", 0x12345678),
    ("i32", "CDAB", "ff fe ff ff", -2),
    ("i16", "ABCD", "ff fe", -2),
    ("i16", "BADC", "fe ff", -2),
    ("i16", "BA", "fe ff", -2),
    ("u16", "AB", "ff fe", 65534),
    ("u8", "ABCD", "12 34", 0x34),
    ("u8", "BADC", "12 34", 0x12),
    ("i8", "ABCD", "00 ff", -1),
    ("u64", "ABCD", "01 23 45 67 89 ab cd ef", 0x0123456789ABCDEF),
    ("u64", "CDAB", "cd ef 89 ab 45 67 01 23", 0x0123456789ABCDEF),
    ("u64", "BADC", "23 01 67 45 ab 89 ef cd", 0x0123456789ABCDEF),
    ("u64", "DCBA", "ef cd ab 89 67 45 23 01", 0x0123456789ABCDEF),
    ("u64", "EFGHABCD", "89 ab cd ef 01 23 45 67", 0x0123456789ABCDEF),
    ("i64", "ABCD", "ff ff ff ff ff ff ff ff", -1),
    ("f64", "ABCD", "40 09 21 fb 54 44 2d 18", math.pi),
    ("f64", "CDAB", "2d 18 54 44 21 fb 40 09", math.pi),
]
WIDE = {
    "u16": "H", "i16": "h", "u32": "I", "i32": "i", "u64": "Q", "i64": "q", "f32": "f", "f64": "d",
}  # fmt: skip
SPELT = {
    2: {"ABCD": "AB", "CDAB": "AB", "BADC": "BA", "DCBA": "BA"},
    4: {"ABCD": "ABCD", "CDAB": "CDAB", "BADC": "BADC", "DCBA": "DCBA"},
    8: {"ABCD": "ABCDEFGH", "CDAB": "GHEFCDAB", "BADC": "BADCFEHG", "DCBA": "HGFEDCBA"},
}


def one(type_: str, order: str, data: bytes, **keys: int) -> tuple[Value | None, Reason | None]:
    values, reasons = RegisterDecoder([Field(at=0, type=ValueType(type_), order=order, **keys)]).decode(data)
    return values[0], (reasons or {}).get(0)


@pytest.mark.parametrize(("type_", "order", "wire", "value"), KNOWN)
def test_a_value_is_decoded_in_each_byte_and_word_order(
    type_: str, order: str, wire: str, value: float
) -> None:
    assert one(type_, order, bytes.fromhex(wire)) == (value, None)


@pytest.mark.parametrize(("type_", "order", "wire", "value"), [k for k in KNOWN if k[0] not in ("u8", "i8")])
def test_encoding_gives_the_bytes_that_decode(type_: str, order: str, wire: str, value: float) -> None:
    assert encode(value, Field(at=0, type=ValueType(type_), order=order)) == bytes.fromhex(wire)


@given(
    st.sampled_from(sorted(WIDE)),
    st.sampled_from(["ABCD", "CDAB", "BADC", "DCBA"]),
    st.binary(min_size=8, max_size=8),
)
def test_the_letters_of_an_order_say_where_each_byte_stands(type_: str, order: str, raw: bytes) -> None:
    width = struct.calcsize(WIDE[type_])
    value = struct.unpack(f">{WIDE[type_]}", raw[:width])[0]
    wire = bytes(raw["ABCDEFGH".index(letter)] for letter in SPELT[width][order])
    found, reason = one(type_, order, wire)
    if isinstance(value, float) and not math.isfinite(value):
        assert found is None
        assert reason == (Reason.NAN if math.isnan(value) else Reason.INFINITE)
    else:
        assert (found, reason) == (value, None)


@given(st.data())
def test_a_block_of_mixed_fields_in_any_sequence_decodes_as_each_field_alone(data: st.DataObject) -> None:
    raw = data.draw(st.binary(min_size=40, max_size=40))
    fields = []
    for _ in range(data.draw(st.integers(1, 12))):
        type_ = ValueType(data.draw(st.sampled_from([*WIDE, "u8", "i8", "bool", "str"])))
        length = data.draw(st.integers(1, 9)) if type_ is ValueType.STR else 0
        room = 20 - registers_of(type_, length)
        fields.append(
            Field(
                at=2 * data.draw(st.integers(0, room)),
                type=type_,
                order=data.draw(st.sampled_from(["ABCD", "CDAB", "BADC", "DCBA"])),
                bit=data.draw(st.integers(0, 15)) if type_ is ValueType.BOOL else None,
                length=length,
            )
        )
    values, reasons = RegisterDecoder(fields).decode(raw)
    alone = [RegisterDecoder([field]).decode(raw) for field in fields]
    assert list(values) == [value[0] for value, _ in alone]
    assert (reasons or {}) == {i: why[0] for i, (_, why) in enumerate(alone) if why}


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("7fc00000", Reason.NAN),
        ("ffffffff", Reason.NAN),
        ("7f800000", Reason.INFINITE),
        ("ff800000", Reason.INFINITE),
    ],
)
def test_not_a_number_and_infinities_have_no_value_but_a_reason_and_spare_their_neighbours(
    raw: str, reason: Reason
) -> None:
    fields = [Field(at=at, type=ValueType.F32) for at in (0, 4, 8)]
    values, reasons = RegisterDecoder(fields).decode(bytes.fromhex("3f800000" + raw + "40000000"))
    assert values == [1.0, None, 2.0]
    assert reasons == {1: reason}


def test_opposite_infinities_do_not_hide_each_other() -> None:
    fields = [Field(at=at, type=ValueType.F32) for at in (0, 4)]
    values, reasons = RegisterDecoder(fields).decode(bytes.fromhex("7f800000ff800000"))
    assert values == [None, None]
    assert reasons == {0: Reason.INFINITE, 1: Reason.INFINITE}


def test_the_greatest_doubles_are_good_though_their_sum_is_infinite() -> None:
    greatest = struct.pack(">d", 1.7e308)
    values, reasons = RegisterDecoder([Field(at=at, type=ValueType.F64) for at in (0, 8)]).decode(
        greatest * 2
    )
    assert list(values) == [1.7e308, 1.7e308]
    assert not reasons


def test_bits_of_a_register_count_from_the_lowest() -> None:
    fields = [Field(at=0, type=ValueType.BOOL, bit=bit) for bit in range(16)]
    values, _ = RegisterDecoder(fields).decode(bytes.fromhex("8001"))
    assert values == [True, *[False] * 14, True]


def test_coils_come_lowest_bit_first() -> None:
    # Modbus application protocol 1.1b3, 6.1: coils 20-27 as 0xCD are on, off, on, on, off, off, on, on.
    assert list(BitDecoder(range(8)).decode(b"\xcd")[0]) == [
        True,
        False,
        True,
        True,
        False,
        False,
        True,
        True,
    ]
    assert list(BitDecoder([18, 0, 7]).decode(b"\x80\x00\x04")[0]) == [True, False, True]


@pytest.mark.parametrize(
    ("wire", "order", "text"),
    [
        (b"SDM630\0\0", "ABCD", "SDM630"),
        (b"DS6M03\0\0", "BADC", "SDM630"),
        (b"SDM630\0\0", "CDAB", "SDM630"),
        (b"AB\0XYZ  ", "ABCD", "AB"),
        (b"AB      ", "ABCD", "AB"),
        (b"\xc2\xb0C\0\0\0\0\0", "ABCD", "°C"),
        (b"\0" * 8, "ABCD", ""),
    ],
)
def test_text_ends_at_its_nul_and_loses_its_padding(wire: bytes, order: str, text: str) -> None:
    assert one("str", order, wire, length=8) == (text, None)


def test_text_that_is_not_utf8_is_a_decode_error() -> None:
    assert one("str", "ABCD", b"\xff\xfeab", length=4) == (None, Reason.DECODE)


def test_text_is_encoded_with_its_padding() -> None:
    assert encode("abc", Field(at=0, type=ValueType.STR, length=5)) == b"abc\0\0\0"
    assert encode("abc", Field(at=0, type=ValueType.STR, length=4, order="BADC")) == b"ba\0c"


@pytest.mark.parametrize(
    ("type_", "value"),
    [
        ("u16", -1), ("u16", 65536), ("u16", 1.5), ("i16", 32768), ("u16", True), ("u16", "1"), ("i32", 1 << 31),
        ("f32", 1e39), ("f32", math.nan), ("f64", math.inf), ("u16", math.nan), ("u16", math.inf), ("u8", 1),
        ("bool", True),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_is_not_encoded(type_: str, value: Value) -> None:
    with pytest.raises(ValueError, match=r"fit|number|whole registers"):
        encode(value, Field(at=0, type=ValueType(type_)))


@pytest.mark.parametrize(
    ("order", "width"), [("ABCX", 4), ("AABC", 4), ("ABCDEFG", 8), ("AB", 4), ("", 2), ("ABCDEFGH", 4)]
)
def test_an_order_that_spells_nothing_is_refused_with_what_is_valid(order: str, width: int) -> None:
    with pytest.raises(ValueError, match="valid: ABCD, CDAB, BADC, DCBA"):
        places(order, width)


@given(st.binary(max_size=300), st.lists(st.integers(0, 100), min_size=1, max_size=20))
def test_any_bytes_decode_to_values_or_reasons(raw: bytes, starts: list[int]) -> None:
    types = list(ValueType)
    fields = [
        Field(
            at=2 * start,
            type=types[start % len(types)],
            bit=start % 16 if types[start % len(types)] is ValueType.BOOL else None,
            length=7 if types[start % len(types)] is ValueType.STR else 0,
        )
        for start in starts
    ]
    decoder = RegisterDecoder(fields)
    values, reasons = decoder.decode(raw.ljust(decoder.size, b"\xff"))
    assert len(values) == len(fields)
    for i, value in enumerate(values):
        assert (value is None) == (i in (reasons or {}))
