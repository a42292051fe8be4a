"""Registers, bytes and bits to raw values and back, in every byte and word order.

Rules:

1. A decoder is compiled once per plan; a scan costs one gather and one `struct.unpack` per block, not one call per
   value, so a block of 125 registers stays in C.
2. A value is right or has a reason. Not-a-number, an infinity, text that is not UTF-8: no value, and why.
3. Values are raw: scale and offset are not applied here (see `drivers.contract`). What a register holds otherwise than
   its type says (BCD, dates, a number with its exponent in another register) is turned into that type.

The bytes of a value are named by significance, A the highest. An order spells them as they come over the wire:
`ABCD` is big-endian (Modbus' own), `CDAB` swaps the words, `BADC` the bytes in each word, `DCBA` both. Those four
names serve every width (for 64 bits: words reversed, bytes swapped, or both); a stranger order of 64 bits is spelt
with eight letters, of 32 bits with four.
"""

from __future__ import annotations

import enum
import functools
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from itertools import chain, groupby, pairwise
from operator import itemgetter
from typing import Final, TypeAlias

import msgspec

from drivers.contract import Reason, Value, ValueType

Decoded: TypeAlias = tuple[Sequence[Value | None], dict[int, Reason] | None]
"""Values in the fields' order, and the reasons of those that are not good (`None`: all are)."""

Turned: TypeAlias = tuple[Value | None, Reason | None]
"""One value, or the reason why there is none (or why it is doubtful)."""

Turn: TypeAlias = Callable[[bytes], Turned]

_LETTERS: Final = "ABCDEFGH"
_WORD: Final = 2  #: bytes of a register
_REGISTER_BITS: Final = 16
_MOD: Final = 10_000
_EARLIEST_YEAR: Final = 1970  #: a clock that shows less was not set
_LATEST_S: Final = 253_402_300_799  #: the end of the year 9999

_CODES: Final[dict[ValueType, str]] = {
    ValueType.I8: "b",
    ValueType.U8: "B",
    ValueType.I16: "h",
    ValueType.U16: "H",
    ValueType.I32: "i",
    ValueType.U32: "I",
    ValueType.I64: "q",
    ValueType.U64: "Q",
    ValueType.F32: "f",
    ValueType.F64: "d",
}
_FLOATS: Final = (ValueType.F32, ValueType.F64)
_BITS_OF: Final = tuple(tuple(bool(byte >> bit & 1) for bit in range(8)) for byte in range(256))


class Encoding(enum.StrEnum):
    """How registers hold a value, where that is not simply its type."""

    # With a scale register: what stands there before it is scaled, to travel as f64.
    I16 = "i16"
    U16 = "u16"
    I32 = "i32"
    U32 = "u32"
    I64 = "i64"
    U64 = "u64"
    # Numbers.
    BCD = "bcd"  #: a decimal digit in every 4 bits
    SIGN_MAGNITUDE = "sign_magnitude"  #: the highest bit is the sign, the others the amount
    MOD10000 = "mod10000"  #: registers of 0..9999, four decimal digits each (PowerLogic "MOD10", ION "M10K")
    # Text, one character a register.
    CHAR_HIGH = "char_high"
    CHAR_LOW = "char_low"
    # Instants; they travel as Unix seconds, i64 (whole) or f64 (with their fraction).
    EPOCH_32 = "epoch_32"  #: seconds since 1970
    EPOCH_64 = "epoch_64"
    EPOCH_MS = "epoch_ms"  #: milliseconds since 1970, in 64 bits
    CP56TIME2A = "cp56time2a"  #: IEC 60870-5-4, as power meters have it in 4 registers (Schneider: TI081)
    DATE_BCD = "date_bcd"  #: YY MM DD hh mm ss in BCD, 3 registers
    DATE_BYTES = "date_bytes"  #: the same in plain bytes (CET PMC meters)
    DATE_REGISTERS = "date_registers"  #: year (2024 or 24), month, day, hour, minute, second, a register each


_SCALED: Final = frozenset(map(Encoding, ("i16", "u16", "i32", "u32", "i64", "u64")))
_CHARACTERS: Final = frozenset({Encoding.CHAR_HIGH, Encoding.CHAR_LOW})
DATES: Final = {
    Encoding.CP56TIME2A: 8,
    Encoding.DATE_BCD: 6,
    Encoding.DATE_BYTES: 6,
    Encoding.DATE_REGISTERS: 12,
}
"""Encodings of a date, and the bytes of each."""
_EPOCHS: Final = {Encoding.EPOCH_32: 4, Encoding.EPOCH_64: 8, Encoding.EPOCH_MS: 8}
INSTANTS: Final = frozenset({*DATES, *_EPOCHS})
"""Encodings of a moment in time."""
_UNSIGNED: Final = (ValueType.U8, ValueType.U16, ValueType.U32, ValueType.U64)
_SIGNED: Final = (ValueType.I16, ValueType.I32, ValueType.I64)
_WIDE: Final = (ValueType.U32, ValueType.I32, ValueType.U64, ValueType.I64)
_NUMBER_TYPES: Final = {
    Encoding.BCD: _UNSIGNED,
    Encoding.SIGN_MAGNITUDE: _SIGNED,
    Encoding.MOD10000: _WIDE,
}
_BIT_FIELDS: Final = (ValueType.U8, ValueType.U16, ValueType.U32)

LEAST_EXPONENT, GREATEST_EXPONENT = -10, 10  #: SunSpec Information Model Specification, sunssf
_NO_EXPONENT: Final = -0x8000  #: same: the scale factor is not available


class Field(msgspec.Struct, frozen=True, kw_only=True):
    """Where one value stands in a block of registers: `at` is its first byte."""

    at: int
    type: ValueType
    order: str = "ABCD"
    encoding: Encoding | None = None
    bit: int | None = None  #: of the register, 0 the lowest (beyond 15: of two registers)
    bits: int | None = None  #: of a bit-field: how many, from `bit` up
    length: int = 0  #: of a str: its bytes; of BCD and MOD10000: bytes where not those of the type
    scale_at: int | None = None  #: the first byte of the register that holds the exponent of 10
    decimals: bool = False  #: what stands there is how many decimals the number has: the exponent, negated
    not_available: tuple[int | float, ...] = ()  #: of a scaled number: what the registers hold for "no value"
    utc_offset_min: int = 0  #: of a moment: how far the device's clock is ahead of UTC

    @property
    def registers(self) -> int:
        """How many registers the value occupies (its scale register apart)."""
        return _width(self) // _WORD

    def moved(self, by: int) -> Field:
        """The same field, so many bytes on."""
        scale_at = None if self.scale_at is None else self.scale_at + by
        return msgspec.structs.replace(self, at=self.at + by, scale_at=scale_at)


def what_is_wrong(field: Field) -> str | None:
    """Why this can never be decoded, beginning with the key to change; `None` where it can."""
    wrong = _wrong_with_type(field)
    if wrong is None:
        try:
            _bytes_of(field)
        except ValueError as err:
            wrong = f"order: {err}"
    return wrong


def _wrong_with_type(field: Field) -> str | None:
    type_, encoding = field.type, field.encoding
    if field.utc_offset_min and encoding not in INSTANTS:
        return "utc_offset_min: only moments (epoch_..., cp56time2a, date_...) have a time zone; remove it"
    if field.bits is not None and field.bit is None:
        return "bits: say with bit where the bit-field begins (0 the lowest)"
    if field.bit is not None:
        return _wrong_with_bits(field)
    if type_ is ValueType.BOOL:
        return "bit: say which bit of the register it is (0 the lowest, 15 the highest)"
    if (encoding in _SCALED) != (field.scale_at is not None):
        if encoding is None:
            return "encoding: with scale_register, say what the registers hold (i16, u16, i32, u32, i64, u64)"
        if encoding in _SCALED:
            return (
                f"encoding: {encoding} is for numbers with a scale_register; for others, give it as the type"
            )
        return f"scale_register: not with encoding {encoding}"
    if encoding in _SCALED and type_ is not ValueType.F64:
        return f"type: a number with a scale register travels as f64, not {type_}"
    if encoding in INSTANTS and type_ not in (ValueType.I64, ValueType.F64):
        return f"type: {encoding} travels as i64 (Unix seconds) or f64 (with their fraction), not {type_}"
    if encoding in _CHARACTERS and type_ is not ValueType.STR:
        return f"type: {encoding} is for str, not {type_}"
    if encoding in _NUMBER_TYPES and type_ not in _NUMBER_TYPES[encoding]:
        return f"type: {encoding} is one of {', '.join(_NUMBER_TYPES[encoding])}, not {type_}"
    if type_ is ValueType.STR:
        if encoding is not None and encoding not in _CHARACTERS:
            return f"encoding: {encoding} is no text"
        return None if field.length else "length: needed by a str"
    return _wrong_with_length(field)


def _wrong_with_bits(field: Field) -> str | None:
    bit, bits = field.bit or 0, field.bits or 1
    if field.encoding is not None or field.scale_at is not None:
        return "bit: not together with an encoding or a scale_register"
    if field.bits is None:
        return None if field.type is ValueType.BOOL else f"bit: one bit is a bool, not {field.type}"
    if field.type not in _BIT_FIELDS:
        return f"bits: a bit-field is u8, u16 or u32, not {field.type}"
    if bit + bits > 2 * _REGISTER_BITS:
        return f"bits: {bits} bits from bit {bit} on go beyond the {2 * _REGISTER_BITS} bits of two registers"
    if bits > struct.calcsize(_CODES[field.type]) * 8:
        return f"bits: {bits} bits do not fit {field.type}"
    return None


def _wrong_with_length(field: Field) -> str | None:
    if field.encoding not in (Encoding.BCD, Encoding.MOD10000):
        if field.length:
            return "length: needed by a str, and only there (and where bcd or mod10000 is not as long as its type)"
        return None
    length = _length(field)
    if field.encoding is Encoding.MOD10000 and length not in (4, 6, 8):
        return "length: a mod10000 number has 4, 6 or 8 bytes"
    if field.encoding is Encoding.BCD and length not in (1, 2, 4, 6, 8):
        return "length: a bcd number has 1, 2, 4, 6 or 8 bytes"
    digits = 2 * length
    if 10**digits - 1 > limits_of(field.type)[1]:
        return f"type: {digits} decimal digits do not fit {field.type}"
    return None


def _length(field: Field) -> int:
    """Bytes of a number: its own, or those of its type."""
    return field.length or struct.calcsize(">" + _CODES[field.type])


def _width(field: Field) -> int:
    """Bytes of the whole registers that a value occupies."""
    encoding = field.encoding
    if field.bit is not None:
        return _WORD if field.bit + (field.bits or 1) <= _REGISTER_BITS else 2 * _WORD
    if encoding is None:
        return registers_of(field.type, field.length) * _WORD
    if encoding in _CHARACTERS:
        return field.length * _WORD
    if encoding in DATES:
        return DATES[encoding]
    if encoding in _EPOCHS:
        return _EPOCHS[encoding]
    if encoding in _SCALED:
        return registers_of(ValueType(encoding)) * _WORD
    return max(_WORD, _length(field))


def registers_of(type_: ValueType, length: int = 0) -> int:
    """How many registers a plain value occupies. An 8-bit value and a bit take a whole one."""
    if type_ is ValueType.STR:
        return (length + 1) // _WORD
    if type_ is ValueType.BOOL:
        return 1
    return max(1, struct.calcsize(">" + _CODES[type_]) // _WORD)


def places(order: str, width: int) -> tuple[int, ...]:
    """For each byte from the highest to the lowest, its place on the wire. Raises `ValueError` naming what is valid."""
    if order in ("ABCD", "CDAB", "BADC", "DCBA"):
        words = range(0, width, _WORD)
        if order in ("CDAB", "DCBA"):
            words = words[::-1]
        swap = 1 if order in ("BADC", "DCBA") else 0
        # `words` is what comes first on the wire; both permutations are their own inverse.
        return tuple(word + (half ^ swap) for word in words for half in range(_WORD))
    if sorted(order) != list(_LETTERS[:width]):
        spelt = (
            f" or the letters {_LETTERS[:width]} in the order of the wire" if width > _WORD else ", AB, BA"
        )
        raise ValueError(f"order {order!r} is not valid (valid: ABCD, CDAB, BADC, DCBA{spelt})")
    return tuple(order.index(letter) for letter in _LETTERS[:width])


class RegisterDecoder:
    """A block of registers to the values of its fields, in the order given (which need not be the address order)."""

    __slots__ = ("_floats", "_gather", "_pick_floats", "_turned", "_unpack", "size")

    def __init__(self, fields: Sequence[Field]) -> None:
        """Raises `ValueError` for an order that does not fit its type."""
        wanted = [_bytes_of(field) for field in fields]
        self.size = max(chain.from_iterable(wanted), default=-1) + 1
        turns = [_turn_of(field) for field in fields]
        codes = [
            f"{len(places_)}s" if turn else _CODES[field.type]
            for field, turn, places_ in zip(fields, turns, wanted, strict=True)
        ]
        everything = list(chain.from_iterable(wanted))
        self._gather: Callable[[bytes], tuple[int, ...]] | None = None
        if all(a < b for a, b in pairwise(everything)) and all(map(_adjacent, wanted)):
            unpack = struct.Struct(">" + _with_pads(codes, wanted))
        else:
            self._gather = itemgetter(*everything)
            unpack = struct.Struct(">" + _run_lengths(codes))
        self._unpack = unpack.unpack_from
        self._turned = [(i, turn) for i, turn in enumerate(turns) if turn is not None]
        self._floats = [i for i, field in enumerate(fields) if field.type in _FLOATS and turns[i] is None]
        self._pick_floats: Callable[[Sequence[Value]], Sequence[Value]] | None = None
        if self._floats and len(self._floats) < len(fields):
            self._pick_floats = _picker(self._floats)

    def decode(self, data: bytes) -> Decoded:
        """`data` holds at least `size` bytes. Never raises for what the bytes say."""
        found: tuple[Value, ...]
        found = self._unpack(data if self._gather is None else bytes(self._gather(data)))
        doubt = False
        if self._floats:
            floats = found if self._pick_floats is None else self._pick_floats(found)
            total = sum(floats)  # type: ignore[arg-type]
            # A sum is finite only if all its terms are: one pass in C instead of a test per value.
            doubt = total - total != 0.0
        if not (doubt or self._turned):
            return found, None
        values: list[Value | None] = list(found)
        reasons: dict[int, Reason] = {}
        for i, turn in self._turned:
            values[i], reason = turn(found[i])  # type: ignore[arg-type]
            if reason:
                reasons[i] = reason
        if doubt:
            for i in self._floats:
                value = float(found[i])
                if not math.isfinite(value):
                    values[i] = None
                    reasons[i] = Reason.NAN if math.isnan(value) else Reason.INFINITE
        return values, reasons or None


class BitDecoder:
    """Packed bits (coils, discrete inputs; the lowest bit of the first byte comes first) to bools."""

    __slots__ = ("_pick", "size")

    def __init__(self, positions: Sequence[int]) -> None:
        self.size = max(positions, default=-1) // 8 + 1
        self._pick = _picker(positions)

    def decode(self, data: bytes) -> Decoded:
        return self._pick(tuple(chain.from_iterable(map(_BITS_OF.__getitem__, data)))), None


def encode(value: Value, field: Field) -> bytes:
    """The registers that hold this value. Raises `ValueError` saying what the type can hold."""
    encoding = field.encoding
    if field.type is ValueType.STR:
        return _encode_text(value, field)
    if is_part(field):
        raise ValueError(f"a {field.type} is a part of a register, and only whole registers are written")
    if encoding in DATES or encoding in _SCALED:
        raise ValueError(f"a value encoded as {encoding} is not written")
    width = _width(field)
    if encoding is None:
        highest_first = struct.pack(">" + _CODES[field.type], fitting(value, field.type))
    else:
        if field.utc_offset_min and isinstance(value, int | float):
            value += 60 * field.utc_offset_min  # only moments have one: the device's clock is that far ahead
        highest_first = _encode_number(value, encoding, field.type, width)
    return _on_the_wire(highest_first, field.order)


def is_part(field: Field) -> bool:
    """Whether the value is less than its registers: bits, or one byte."""
    if field.bit is not None or field.type is ValueType.BOOL:
        return True
    if field.type is ValueType.STR:
        return False
    return _length(field) == 1 and field.encoding in (None, Encoding.BCD)


def encode_part(value: Value, field: Field, now: bytes) -> bytes:
    """The registers `now`, with this value in its bits. Raises `ValueError` saying what they can hold."""
    clear, put = masks(value, field)
    width = _width(field)
    held = int.from_bytes(bytes(now[place] for place in places(field.order, width)), "big")
    return _on_the_wire((held & ~clear | put).to_bytes(width, "big"), field.order)


def masks(value: Value, field: Field) -> tuple[int, int]:
    """Of a value that is a part of its registers: the bits it takes, and those of them that it sets (as a number, the
    lowest bit of the lowest byte first). Raises `ValueError` saying what they can hold."""
    if field.bit is not None and field.bits is None:
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} is not true or false")
        return 1 << field.bit, int(value) << field.bit
    if field.bit is None:
        clear = 0xFF
        if field.encoding is Encoding.BCD:
            return clear, _encode_number(value, Encoding.BCD, field.type, 1)[0]
        return clear, int(fitting(value, field.type)) & clear
    most = (1 << (field.bits or 1)) - 1
    number = fitting(value, field.type)
    if number > most:
        raise ValueError(f"{value!r} does not fit {field.bits} bits (0..{most}, whole numbers)")
    return most << field.bit, int(number) << field.bit


def exponent_of(held: int, *, decimals: bool) -> int:
    """The exponent of 10 that a scale register means, or that so many decimals mean; where there can be none, one that
    `scaled` refuses."""
    if not decimals:
        return held
    return -held if 0 <= held <= GREATEST_EXPONENT else GREATEST_EXPONENT + 1


def scaled(raw: int, exponent: int, sentinels: frozenset[float]) -> Turned:
    """A number with its exponent of 10 (`exponent_of` its scale register); `sentinels_of` its field."""
    number, reason = None, None
    if LEAST_EXPONENT <= exponent <= GREATEST_EXPONENT:
        number = float(raw * 10**exponent) if exponent >= 0 else raw / 10**-exponent
    else:
        reason = Reason.SENTINEL if exponent == _NO_EXPONENT else Reason.DECODE
    if raw in sentinels:
        reason = Reason.SENTINEL
    return number, reason


def unscaled(value: Value, exponent: int, field: Field) -> tuple[bytes, float]:
    """The registers that hold the number nearest to this one, and that number. Raises `ValueError`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a number")
    if not LEAST_EXPONENT <= exponent <= GREATEST_EXPONENT:
        held = "no number of decimals" if field.decimals else f"{exponent}, which is no exponent"
        raise ValueError(f"its scale register holds {held}")
    raw = round(value / 10**exponent if exponent >= 0 else value * 10**-exponent)
    holds = ValueType(field.encoding or Encoding.I16)
    if raw in sentinels_of(field):
        raise ValueError(f"{value!r} would be stored as {raw}, the device's code for no value")
    try:
        number = fitting(raw, holds)
    except ValueError as err:
        raise ValueError(f"{value!r} with exponent {exponent}: {err}") from err
    stored = float(raw * 10**exponent) if exponent >= 0 else raw / 10**-exponent
    return _on_the_wire(struct.pack(">" + _CODES[holds], number), field.order), stored


def _on_the_wire(highest_first: bytes, order: str) -> bytes:
    wire = bytearray(len(highest_first))
    for byte, place in zip(highest_first, places(order, len(wire)), strict=True):
        wire[place] = byte
    return bytes(wire)


def _encode_text(value: Value, field: Field) -> bytes:
    text = value.encode() if isinstance(value, str) else None
    if text is None or len(text) > field.length:
        raise ValueError(f"{value!r} is not text of at most {field.length} bytes")
    swap = 1 if swaps_bytes(field.order) else 0
    if field.encoding in _CHARACTERS:
        place = 0 if field.encoding is Encoding.CHAR_HIGH else 1
        wire = bytearray(_width(field))
        for i, byte in enumerate(text):
            wire[_WORD * i + (place ^ swap)] = byte
        return bytes(wire)
    padded = text.ljust(registers_of(field.type, field.length) * _WORD, b"\0")
    return bytes(padded[i ^ swap] for i in range(len(padded)))


def _encode_number(value: Value, encoding: Encoding, type_: ValueType, width: int) -> bytes:
    """The bytes of a number, the highest first. Raises `ValueError`."""
    if encoding in _EPOCHS:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{value!r} is not a number")
        number = round(value * 1000) if encoding is Encoding.EPOCH_MS else round(value)
        low, high = 0, (1 << 8 * width) - 1
    else:
        number = int(fitting(value, type_))
        digits = 4 * width // _WORD
        low, high = 0, 10**digits - 1
        if encoding is Encoding.MOD10000 and type_ in _SIGNED:
            low = -high
        if encoding is Encoding.SIGN_MAGNITUDE:
            high = (1 << 8 * width - 1) - 1
            low = -high
    if not low <= number <= high:
        raise ValueError(f"{value!r} does not fit {encoding} in {width} bytes ({low}..{high})")
    if encoding is Encoding.BCD:
        return bytes.fromhex(f"{number:0{2 * width}d}")
    if encoding is Encoding.MOD10000:
        amount, sign = abs(number), -1 if number < 0 else 1
        parts = [amount // 10_000**i % 10_000 * sign for i in reversed(range(width // _WORD))]
        return struct.pack(f">{len(parts)}h", *parts)
    if number < 0:
        number = -number | 1 << 8 * width - 1
    return number.to_bytes(width, "big")


def limits_of(type_: ValueType) -> tuple[int, int]:
    """The least and the greatest value of an integer type."""
    bits = int(type_[1:])
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if type_.startswith("i") else (0, (1 << bits) - 1)


def fitting(value: Value, type_: ValueType) -> int | float:
    """The number as this numeric type holds it. Raises `ValueError` saying what the type can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")
    if type_ in _FLOATS:
        try:
            narrowed = struct.unpack(">" + _CODES[type_], struct.pack(">" + _CODES[type_], value))[0]
        except (OverflowError, struct.error):
            narrowed = math.inf
        if not math.isfinite(narrowed):
            raise ValueError(f"{value!r} does not fit {type_}")
        return float(value)
    low, high = limits_of(type_)
    if not math.isfinite(value) or value != int(value) or not low <= value <= high:
        raise ValueError(f"{value!r} does not fit {type_} ({low}..{high}, whole numbers)")
    return int(value)


def _bytes_of(field: Field) -> list[int]:
    """The wire places of a field's bytes, the highest first, that its struct code takes."""
    swap = 1 if swaps_bytes(field.order) else 0
    if field.type is ValueType.STR:
        if field.encoding in _CHARACTERS:
            place = 0 if field.encoding is Encoding.CHAR_HIGH else 1
            return [field.at + _WORD * i + (place ^ swap) for i in range(field.length)]
        return [field.at + (i ^ swap) for i in range(field.length)]
    found = [field.at + place for place in places(field.order, _width(field))]
    if field.scale_at is not None:
        return [*found, field.scale_at + swap, field.scale_at + 1 - swap]
    one_byte = field.bit is None and is_part(field) and field.type is not ValueType.BOOL
    return found[-1:] if one_byte else found


def swaps_bytes(order: str) -> bool:
    """Text has no word order: only its bytes within a register may be swapped."""
    return order in ("BADC", "DCBA", "BA")


def _adjacent(wanted: Sequence[int]) -> bool:
    return list(wanted) == list(range(wanted[0], wanted[0] + len(wanted)))


def _with_pads(codes: Sequence[str], wanted: Sequence[Sequence[int]]) -> str:
    parts: list[str] = []
    at = 0
    for code, places_ in zip(codes, wanted, strict=True):
        parts += ["x"] * (places_[0] - at)
        parts.append(code)
        at = places_[-1] + 1
    return _run_lengths(parts)


def _run_lengths(codes: Iterable[str]) -> str:
    """`H H H 4s` as `3H4s`. A string's own count must not be merged."""
    parts = []
    for code, run in groupby(codes):
        times = len(list(run))
        parts.append(code * times if len(code) > 1 else f"{times}{code}")
    return "".join(parts)


def _picker(positions: Sequence[int]) -> Callable[[Sequence[Value]], Sequence[Value]]:
    first, last = positions[0], positions[-1]
    if list(positions) == list(range(first, last + 1)):
        return itemgetter(slice(first, last + 1))
    return itemgetter(*positions)  # more than one: a single position is a range


# --- values that are not simply their type: bytes, the highest first, to a value or a reason ---


def _turn_of(field: Field) -> Turn | None:
    """What turns a field's bytes into its value; `None` where a struct code does."""
    encoding, type_ = field.encoding, field.type
    if field.bit is not None:
        if field.bits is None:
            return functools.partial(_bit, bit=field.bit)
        return functools.partial(_bits, bit=field.bit, mask=(1 << field.bits) - 1)
    if type_ is ValueType.STR:
        return _text
    if type_ is ValueType.BOOL:
        return functools.partial(_bit, bit=0)
    if encoding is None:
        return None
    if encoding in _SCALED:
        unpack = struct.Struct(f">{_CODES[ValueType(encoding)]}h").unpack
        return functools.partial(
            _scaled, unpack=unpack, sentinels=sentinels_of(field), decimals=field.decimals
        )
    if encoding in DATES or encoding in _EPOCHS:
        return functools.partial(
            _instant, encoding=encoding, offset_s=60 * field.utc_offset_min, whole=type_ is ValueType.I64
        )
    if encoding is Encoding.MOD10000:
        return functools.partial(_mod10000, code="h" if type_ in _SIGNED else "H")
    return _bcd if encoding is Encoding.BCD else _sign_magnitude


def _bit(raw: bytes, *, bit: int) -> Turned:
    return int.from_bytes(raw, "big") >> bit & 1 == 1, None


def _bits(raw: bytes, *, bit: int, mask: int) -> Turned:
    return int.from_bytes(raw, "big") >> bit & mask, None


def _text(raw: bytes) -> Turned:
    """Text ends at its first NUL; the blanks that pad it are not part of it."""
    try:
        return raw.split(b"\0", 1)[0].decode().rstrip(), None
    except UnicodeDecodeError:
        return None, Reason.DECODE


def _bcd(raw: bytes) -> Turned:
    digits = raw.hex()
    if digits.isdecimal():
        return int(digits), None
    return None, Reason.SENTINEL if not digits.strip("f") else Reason.DECODE


def _sign_magnitude(raw: bytes) -> Turned:
    number = int.from_bytes(raw, "big")
    sign = 1 << 8 * len(raw) - 1
    return (sign - number if number & sign else number), None


def _mod10000(raw: bytes, *, code: str) -> Turned:
    """Signed: every register has the number's sign."""
    parts = struct.unpack(f">{len(raw) // _WORD}{code}", raw)
    # Unsigned, no register of a number is 0xFFFF; signed, all of them -1 is one.
    if code == "H" and not raw.strip(b"\xff"):
        return None, Reason.SENTINEL
    if any(abs(part) > _MOD - 1 for part in parts) or (min(parts) < 0 < max(parts)):
        return None, Reason.DECODE
    return functools.reduce(lambda number, part: number * _MOD + part, parts, 0), None


def _scaled(
    raw: bytes, *, unpack: Callable[[bytes], tuple[int, int]], sentinels: frozenset[float], decimals: bool
) -> Turned:
    number, held = unpack(raw)
    return scaled(number, exponent_of(held, decimals=decimals), sentinels)


def sentinels_of(field: Field) -> frozenset[float]:
    """What the registers of a scaled number hold for "no value". A signed number's may be given as a bit pattern
    (0x8000 for -32768)."""
    if field.encoding is None:
        return frozenset()
    high = limits_of(ValueType(field.encoding))[1]
    folds = field.encoding.startswith("i")
    return frozenset(
        number - 2 * (high + 1) if folds and number > high else number for number in field.not_available
    )


def _instant(raw: bytes, *, encoding: Encoding, offset_s: int, whole: bool) -> Turned:
    """Unix seconds. All ones or (of a date) all zeros is a clock that was not set."""
    if not raw.strip(b"\xff") or (encoding in DATES and not any(raw)):
        return None, Reason.SENTINEL
    reason = None
    fraction = 0.0
    if encoding in _EPOCHS:
        seconds = int.from_bytes(raw, "big")
        if encoding is Encoding.EPOCH_MS:
            seconds, milliseconds = divmod(seconds, 1000)
            fraction = milliseconds / 1000
        if seconds > _LATEST_S:
            return None, Reason.DECODE
    elif encoding is Encoding.CP56TIME2A:
        # The registers as vendors print them: year; month, weekday, day; summer time, hour, invalid, minute; ms.
        year, day, hour, milliseconds = struct.unpack(">4H", raw)
        found = _unix_s(
            2000 + (year & 0x7F),
            day >> 8 & 0xF,
            day & 0x1F,
            hour >> 8 & 0x1F,
            hour & 0x3F,
            milliseconds // 1000,
        )
        if found is None:
            return None, Reason.DECODE
        seconds, fraction = found, milliseconds % 1000 / 1000
        if hour & 0x8000:  # summer time: the clock is an hour ahead of its own zone
            seconds -= 3600
        if hour & 0x80:
            reason = Reason.DEVICE_FAULT  # the device says itself that its time is not valid
    else:
        parts: tuple[int, ...]
        if encoding is Encoding.DATE_REGISTERS:
            parts = struct.unpack(">6H", raw)
            parts = (parts[0] + 2000 if parts[0] < 100 else parts[0], *parts[1:])
        else:
            digits = raw.hex()
            if encoding is Encoding.DATE_BYTES:
                parts = tuple(raw)
            elif digits.isdecimal():
                parts = tuple(int(digits[i : i + 2]) for i in range(0, 12, 2))
            else:
                return None, Reason.DECODE
            if parts[0] > 99:
                return None, Reason.DECODE
            parts = (2000 + parts[0], *parts[1:])
        found = _unix_s(*parts)
        if found is None:
            return None, Reason.DECODE
        seconds = found
    seconds -= offset_s
    return (seconds if whole else seconds + fraction), reason


def _unix_s(year: int, month: int, day: int, hour: int, minute: int, second: int) -> int | None:
    if year < _EARLIEST_YEAR:
        return None
    try:
        return int(datetime(year, month, day, hour, minute, second, tzinfo=UTC).timestamp())
    except ValueError:
        return None
