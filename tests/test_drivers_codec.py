"""Registers to values. Expected bytes come from IEEE 754, two's complement and the letters of an order."""

from __future__ import annotations

import math
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.codec import (
    GREATEST_EXPONENT,
    LEAST_EXPONENT,
    BitDecoder,
    Field,
    RegisterDecoder,
    encode,
    encode_part,
    is_part,
    limits_of,
    places,
    registers_of,
    unscaled,
    what_is_wrong,
)
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


def one(type_: str, order: str, data: bytes, length: int = 0) -> tuple[Value | None, Reason | None]:
    field = Field(at=0, type=ValueType(type_), order=order, length=length)
    values, reasons = RegisterDecoder([field]).decode(data)
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


# ------------------------------------------------------------------------------------------ encodings

SPRING = 1_710_506_096  # date -u -d 2024-03-15T12:34:56Z +%s
# IEC 60870-5-4 CP56Time2a as Schneider's IM400N manual prints it (7EN02-0423-03, TI081): word 1 the year in bits 6-0;
# word 2 month (11-8), weekday (7-5; Friday is 6), day (4-0); word 3 summer time (15), hour (12-8), invalid (7), minute
# (5-0); word 4 milliseconds of the minute.
TI081 = "0018 03cf 0c22 ddd5"

ENCODED: list[tuple[str, str, str, dict[str, object], Value]] = [
    # A decimal digit in 4 bits.
    ("bcd", "u16", "1234", {}, 1234),
    ("bcd", "u16", "0034", {"length": 1}, 34),
    ("bcd", "u32", "1234 5678", {}, 12345678),
    ("bcd", "u32", "5678 1234", {"order": "CDAB"}, 12345678),
    ("bcd", "u32", "7856 3412", {"order": "DCBA"}, 12345678),
    ("bcd", "u64", "1234 5678 9012", {"length": 6}, 123456789012),
    ("bcd", "u64", "9999 9999 9999 9999", {}, 9999999999999999),
    ("bcd", "u64", "0078 3456 0012", {"length": 6, "order": "CDAB"}, 1234560078),
    # The highest bit is the sign.
    ("sign_magnitude", "i16", "8005", {}, -5),
    ("sign_magnitude", "i16", "7fff", {}, 32767),
    ("sign_magnitude", "i16", "8000", {}, 0),
    ("sign_magnitude", "i32", "8000 0001", {}, -1),
    ("sign_magnitude", "i64", "8000 0000 0001 0000", {}, -65536),
    # Square D PM800 register list: (R4 * 10^12) + (R3 * 10^8) + (R2 * 10^4) + R1, the first register least significant.
    ("mod10000", "u32", "162e 04d2", {"order": "CDAB"}, 12345678),  # 5678, 1234
    ("mod10000", "u64", "162e 04d2 2334", {"order": "CDAB", "length": 6}, 901212345678),  # 5678, 1234, 9012
    ("mod10000", "u64", "270f 270f 270f 270f", {}, 9999999999999999),
    ("mod10000", "u64", "0001 0000 0000 0000", {}, 10**12),
    ("mod10000", "i32", "ffff ffff", {}, -10001),
    ("mod10000", "i32", "0000 d8f1", {}, -9999),
    # Moments.
    ("epoch_32", "i64", "65f4 4070", {}, SPRING),
    ("epoch_32", "i64", "4070 65f4", {"order": "CDAB"}, SPRING),
    ("epoch_64", "i64", "0000 0000 65f4 4070", {}, SPRING),
    ("epoch_ms", "f64", "0000 018e 421b a694", {}, 1_710_506_092.18),
    ("epoch_ms", "i64", "0000 018e 421b a694", {}, 1_710_506_092),
    ("cp56time2a", "i64", TI081, {}, SPRING),
    ("cp56time2a", "f64", TI081, {}, SPRING + 0.789),
    ("cp56time2a", "i64", "0018 030f 0c22 ddd5", {}, SPRING),  # no weekday
    ("cp56time2a", "i64", "d5dd 220c cf03 1800", {"order": "DCBA"}, SPRING),  # IEC's own order of the bytes
    ("cp56time2a", "i64", "0018 03cf 8d22 ddd5", {}, SPRING),  # 13:34 summer time is 12:34
    ("cp56time2a", "i64", TI081, {"utc_offset_min": 60}, SPRING - 3600),
    ("date_bcd", "i64", "2403 1512 3456", {}, SPRING),
    ("date_bcd", "i64", "0324 1215 5634", {"order": "BADC"}, SPRING),
    # CET PMC-512 manual, 5.8: high byte year - 2000, low byte month; day, hour; minute, second.
    ("date_bytes", "i64", "1803 0f0c 2238", {}, SPRING),
    ("date_bytes", "i64", "1803 0f0c 2238", {"utc_offset_min": -300}, SPRING + 18000),
    ("date_registers", "i64", "07e8 0003 000f 000c 0022 0038", {}, SPRING),
    ("date_registers", "i64", "0018 0003 000f 000c 0022 0038", {}, SPRING),
    # Text, one character a register.
    ("char_low", "str", "0041 0042 0000 0043", {"length": 4}, "AB"),
    ("char_high", "str", "4100 4200", {"length": 2}, "AB"),
    ("char_high", "str", "0041 0042", {"length": 2, "order": "BADC"}, "AB"),
]


def encoded(encoding: str, type_: str, **keys: object) -> Field:
    return msgspec.convert({"at": 0, "type": type_, "encoding": encoding, **keys}, Field)


@pytest.mark.parametrize(("encoding", "type_", "wire", "keys", "value"), ENCODED)
def test_registers_that_hold_a_value_in_their_own_way(
    encoding: str, type_: str, wire: str, keys: dict[str, object], value: Value
) -> None:
    field = encoded(encoding, type_, **keys)
    assert what_is_wrong(field) is None
    data = bytes.fromhex(wire)
    assert field.registers * 2 == len(data)
    values, reasons = RegisterDecoder([field]).decode(data)
    assert values[0] == pytest.approx(value) if isinstance(value, float) else values[0] == value
    assert not reasons
    # Beside another value, as everywhere else in a block.
    both = RegisterDecoder([Field(at=0, type=ValueType.U16), field.moved(2)]).decode(b"\x12\x34" + data)[0]
    assert list(both) == [0x1234, values[0]]


@pytest.mark.parametrize(
    ("encoding", "type_", "wire", "reason"),
    [
        ("bcd", "u16", "123a", Reason.DECODE),
        ("bcd", "u16", "ffff", Reason.SENTINEL),
        ("bcd", "u32", "ffff ffff", Reason.SENTINEL),
        ("bcd", "u32", "f000 0001", Reason.DECODE),
        ("mod10000", "u32", "2710 0000", Reason.DECODE),  # 10000 is no remainder of 10000
        ("mod10000", "u32", "ffff ffff", Reason.SENTINEL),
        ("mod10000", "i32", "0001 ffff", Reason.DECODE),  # one register positive, one negative
        ("mod10000", "i32", "8000 0000", Reason.DECODE),
        ("epoch_32", "i64", "ffff ffff", Reason.SENTINEL),
        ("epoch_64", "i64", "7fff ffff ffff ffff", Reason.DECODE),
        ("cp56time2a", "i64", "ffff ffff ffff ffff", Reason.SENTINEL),
        ("cp56time2a", "i64", "0000 0000 0000 0000", Reason.SENTINEL),
        ("cp56time2a", "i64", "0018 0dcf 0c22 ddd5", Reason.DECODE),  # month 13
        ("cp56time2a", "i64", "0018 021e 0c22 ddd5", Reason.DECODE),  # 30 February
        ("cp56time2a", "i64", "0018 03cf 0c3f ddd5", Reason.DECODE),  # minute 63
        ("cp56time2a", "i64", "0018 03cf 0c22 ea60", Reason.DECODE),  # 60,000 ms
        ("date_bcd", "i64", "2413 1512 3456", Reason.DECODE),
        ("date_bcd", "i64", "240a 1512 3456", Reason.DECODE),
        ("date_bcd", "i64", "0000 0000 0000", Reason.SENTINEL),
        ("date_bytes", "i64", "6403 0f0c 2238", Reason.DECODE),  # year 100
        ("date_registers", "i64", "0700 0003 000f 000c 0022 0038", Reason.DECODE),  # year 1792
    ],
)
def test_registers_that_hold_no_such_value_give_a_reason_and_no_value(
    encoding: str, type_: str, wire: str, reason: Reason
) -> None:
    values, reasons = RegisterDecoder([encoded(encoding, type_)]).decode(bytes.fromhex(wire))
    assert (list(values), reasons) == ([None], {0: reason})


def test_a_time_that_the_device_marks_as_invalid_is_bad_with_its_value() -> None:
    values, reasons = RegisterDecoder([encoded("cp56time2a", "i64")]).decode(
        bytes.fromhex("0018 03cf 0ca2 ddd5")
    )
    assert (list(values), reasons) == ([SPRING], {0: Reason.DEVICE_FAULT})


@pytest.mark.parametrize(
    ("wire", "bit", "bits", "type_", "value"),
    [
        ("b5 c3", 0, 4, "u8", 0x3),
        ("b5 c3", 4, 8, "u8", 0x5C),
        ("b5 c3", 12, 4, "u16", 0xB),
        ("b5 c3", 0, 16, "u16", 0xB5C3),
        ("12 34 56 78", 12, 8, "u8", 0x45),
        ("56 78 12 34", 12, 8, "u8", None),
        ("12 34 56 78", 4, 28, "u32", 0x1234567),
    ],
)
def test_a_bit_field_is_counted_from_the_lowest_bit(
    wire: str, bit: int, bits: int, type_: str, value: int | None
) -> None:
    data = bytes.fromhex(wire)
    order = "ABCD" if value is not None else "CDAB"
    field = Field(at=0, type=ValueType(type_), bit=bit, bits=bits, order=order)
    assert what_is_wrong(field) is None
    assert list(RegisterDecoder([field]).decode(data)[0]) == [0x45 if value is None else value]


@pytest.mark.parametrize(
    ("holds", "raw", "exponent", "value"),
    [
        # SunSpec Information Model Specification, "scale factors": the value times ten to the power of sunssf.
        ("i16", "04d2", -2, 12.34),
        ("i16", "fb2e", -2, -12.34),
        ("u16", "04d2", 0, 1234.0),
        ("u16", "04d2", 3, 1234000.0),
        ("u32", "0001 0000", -10, 0.0000065536),
        ("i64", "ffff ffff ffff ffff", 10, -1e10),
    ],
)
def test_a_number_is_scaled_by_the_exponent_in_its_other_register(
    holds: str, raw: str, exponent: int, value: float
) -> None:
    data = bytes.fromhex(raw)
    for before in (False, True):  # the scale register may stand on either side, with a hole between
        scale = struct.pack(">h", exponent)
        block = scale + b"\xaa\xaa" + data if before else data + b"\xaa\xaa" + scale
        field = encoded(holds, "f64", scale_at=0 if before else len(data) + 2).moved(0)
        field = msgspec.structs.replace(field, at=4 if before else 0)
        assert list(RegisterDecoder([field]).decode(block)[0]) == [value]


@pytest.mark.parametrize(
    ("raw", "decimals", "value", "reason"),
    [
        ("00eb", 0, 235.0, None),
        ("00eb", 1, 23.5, None),
        ("ffce", 2, -0.5, None),
        ("00eb", -1, None, Reason.DECODE),
        ("00eb", 11, None, Reason.DECODE),
        ("00eb", 0x7FFF, None, Reason.DECODE),
        ("00eb", -0x8000, None, Reason.DECODE),
    ],
)
def test_a_number_is_divided_by_as_many_tens_as_its_other_register_says_it_has_decimals(
    raw: str, decimals: int, value: float | None, reason: Reason | None
) -> None:
    field = encoded("i16", "f64", scale_at=2, decimals=True)
    values, reasons = RegisterDecoder([field]).decode(bytes.fromhex(raw) + struct.pack(">h", decimals))
    assert (list(values), reasons) == ([value], {0: reason} if reason else None)


@pytest.mark.parametrize(
    ("raw", "exponent", "value", "reason"),
    [
        ("8000", -1, -3276.8, Reason.SENTINEL),
        ("04d2", -0x8000, None, Reason.SENTINEL),
        ("04d2", 11, None, Reason.DECODE),
        ("04d2", -11, None, Reason.DECODE),
        ("8000", -0x8000, None, Reason.SENTINEL),
    ],
)
def test_a_scaled_number_that_is_not_available_says_so(
    raw: str, exponent: int, value: float | None, reason: Reason
) -> None:
    field = encoded("i16", "f64", scale_at=2, not_available=[0x8000])
    values, reasons = RegisterDecoder([field]).decode(bytes.fromhex(raw) + struct.pack(">h", exponent))
    assert (list(values), reasons) == ([value], {0: reason})


@pytest.mark.parametrize(
    ("encoding", "type_", "wire", "keys", "value"),
    [case for case in ENCODED if not case[0].startswith(("cp56", "date")) and case[2] != "8000"],
)
def test_what_is_written_in_an_encoding_is_what_decodes(
    encoding: str, type_: str, wire: str, keys: dict[str, object], value: Value
) -> None:
    field = encoded(encoding, type_, **keys)
    if is_part(field):
        assert encode_part(value, field, b"\xab\x00") == b"\xab" + bytes.fromhex(wire)[1:]
        return
    data = encode(value, field)
    assert len(data) == field.registers * 2
    assert list(RegisterDecoder([field]).decode(data)[0]) == [value]


@pytest.mark.parametrize(
    ("encoding", "type_", "value"),
    [
        ("bcd", "u16", 10000), ("bcd", "u16", -1), ("mod10000", "u32", 10**8), ("mod10000", "u32", -1),
        ("sign_magnitude", "i16", -32768), ("epoch_32", "i64", -1), ("epoch_32", "i64", 1 << 32),
        ("cp56time2a", "i64", SPRING), ("bcd", "u16", True), ("epoch_32", "f64", math.nan), ("char_low", "str", "abc"),
    ],
)  # fmt: skip
def test_what_an_encoding_cannot_hold_is_not_encoded(encoding: str, type_: str, value: Value) -> None:
    keys = {"length": 2} if type_ == "str" else {}
    with pytest.raises(ValueError, match=r"fit|number|not written|text"):
        encode(value, encoded(encoding, type_, **keys))


@given(st.data())
def test_a_part_of_a_register_is_written_without_touching_the_rest(data: st.DataObject) -> None:
    order = data.draw(st.sampled_from(["ABCD", "CDAB", "BADC", "DCBA"]))
    bit = data.draw(st.integers(0, 31))
    bits = data.draw(st.integers(1, 32 - bit))
    field = Field(at=0, type=ValueType.U32, bit=bit, bits=bits, order=order)
    now = data.draw(st.binary(min_size=field.registers * 2, max_size=field.registers * 2))
    value = data.draw(st.integers(0, (1 << bits) - 1))
    after = encode_part(value, field, now)
    whole = Field(at=0, type=ValueType.U32 if len(now) > 2 else ValueType.U16, order=order)
    before_number, number = (int(RegisterDecoder([whole]).decode(each)[0][0] or 0) for each in (now, after))
    mask = ((1 << bits) - 1) << bit
    assert number == before_number & ~mask | value << bit
    assert list(RegisterDecoder([field]).decode(after)[0]) == [value]
    with pytest.raises(ValueError, match="does not fit"):
        encode_part(1 << bits, field, now)


@given(
    st.sampled_from(["i16", "u16", "i32", "u32"]),
    st.integers(LEAST_EXPONENT, GREATEST_EXPONENT),
    st.integers(-1000, 60000),
)
def test_a_scaled_number_is_written_as_the_registers_can_hold_it(holds: str, exponent: int, raw: int) -> None:
    field = encoded(holds, "f64", scale_at=0).moved(0)
    low, high = limits_of(ValueType(holds))
    value = float(raw * 10**exponent) if exponent >= 0 else raw / 10**-exponent
    if not low <= raw <= high:
        with pytest.raises(ValueError, match="does not fit"):
            unscaled(value, exponent, field)
        return
    data, stored = unscaled(value, exponent, field)
    assert int.from_bytes(data, "big", signed=holds.startswith("i")) == raw
    assert stored == value
