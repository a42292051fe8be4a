"""Registers, bytes and bits to raw values and back, in every byte and word order.

Rules:

1. A decoder is compiled once per plan; a scan costs one gather and one `struct.unpack` per block, not one call per
   value, so a block of 125 registers stays in C.
2. A value is right or has a reason. Not-a-number, an infinity, text that is not UTF-8: no value, and why.
3. Values are raw: scale and offset are not applied here (see `drivers.contract`).

The bytes of a value are named by significance, A the highest. An order spells them as they come over the wire:
`ABCD` is big-endian (Modbus' own), `CDAB` swaps the words, `BADC` the bytes in each word, `DCBA` both. Those four
names serve every width (for 64 bits: words reversed, bytes swapped, or both); a stranger order of 64 bits is spelt
with eight letters, of 32 bits with four.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, groupby, pairwise
from operator import itemgetter
from typing import Final, TypeAlias

import msgspec

from drivers.contract import Reason, Value, ValueType

Decoded: TypeAlias = tuple[Sequence[Value | None], dict[int, Reason] | None]
"""Values in the fields' order, and the reasons of those that are not good (`None`: all are)."""

_LETTERS: Final = "ABCDEFGH"
_WORD: Final = 2  #: bytes of a register

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


class Field(msgspec.Struct, frozen=True, kw_only=True):
    """Where one value stands in a block of registers: `at` is its first byte."""

    at: int
    type: ValueType
    order: str = "ABCD"
    bit: int | None = None  #: of a bool: bit of the register, 0 the lowest
    length: int = 0  #: of a str: its bytes


def registers_of(type_: ValueType, length: int = 0) -> int:
    """How many registers a value occupies. An 8-bit value and a bit take a whole one."""
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

    __slots__ = ("_bits", "_floats", "_gather", "_pick_floats", "_strings", "_unpack", "size")

    def __init__(self, fields: Sequence[Field]) -> None:
        """Raises `ValueError` for an order that does not fit its type."""
        wanted = [_bytes_of(field) for field in fields]
        self.size = max(chain.from_iterable(wanted), default=-1) + 1
        codes = [_code_of(field) for field in fields]
        everything = list(chain.from_iterable(wanted))
        self._gather: Callable[[bytes], tuple[int, ...]] | None = None
        if all(a < b for a, b in pairwise(everything)) and all(map(_adjacent, wanted)):
            unpack = struct.Struct(">" + _with_pads(codes, wanted))
        else:
            self._gather = itemgetter(*everything)
            unpack = struct.Struct(">" + _run_lengths(codes))
        self._unpack = unpack.unpack_from
        self._bits = [(i, field.bit) for i, field in enumerate(fields) if field.bit is not None]
        self._strings = [i for i, field in enumerate(fields) if field.type is ValueType.STR]
        self._floats = [i for i, field in enumerate(fields) if field.type in _FLOATS]
        self._pick_floats: Callable[[Sequence[Value]], Sequence[Value]] | None = None
        if self._floats and len(self._floats) < len(fields):
            self._pick_floats = _picker(self._floats)

    def decode(self, data: bytes) -> Decoded:
        """`data` holds at least `size` bytes. Never raises for what the bytes say."""
        found: tuple[Value, ...]
        found = self._unpack(data if self._gather is None else bytes(self._gather(data)))
        if not (self._floats or self._bits or self._strings):
            return found, None
        if self._floats:
            floats = found if self._pick_floats is None else self._pick_floats(found)
            total = sum(floats)  # type: ignore[arg-type]
            # A sum is finite only if all its terms are: one pass in C instead of a test per value.
            doubt = total - total != 0.0
        else:
            doubt = False
        if not (doubt or self._bits or self._strings):
            return found, None
        values: list[Value | None] = list(found)
        reasons: dict[int, Reason] = {}
        for i, bit in self._bits:
            values[i] = (found[i] >> bit) & 1 == 1  # type: ignore[operator]
        for i in self._strings:
            values[i] = text = _text(found[i])  # type: ignore[arg-type]
            if text is None:
                reasons[i] = Reason.DECODE
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
    if field.type is ValueType.STR:
        text = value.encode() if isinstance(value, str) else None
        if text is None or len(text) > field.length:
            raise ValueError(f"{value!r} is not text of at most {field.length} bytes")
        swap = 1 if _swaps_bytes(field.order) else 0
        padded = text.ljust(registers_of(field.type, field.length) * _WORD, b"\0")
        return bytes(padded[i ^ swap] for i in range(len(padded)))
    if field.type is ValueType.BOOL or struct.calcsize(_CODES[field.type]) < _WORD:
        raise ValueError(f"a {field.type} is a part of a register, and only whole registers are written")
    highest_first = struct.pack(">" + _CODES[field.type], fitting(value, field.type))
    wire = bytearray(len(highest_first))
    for byte, place in zip(highest_first, places(field.order, len(wire)), strict=True):
        wire[place] = byte
    return bytes(wire)


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
    if field.type is ValueType.STR:
        swap = 1 if _swaps_bytes(field.order) else 0
        return [field.at + (i ^ swap) for i in range(field.length)]
    width = registers_of(field.type) * _WORD
    found = [field.at + place for place in places(field.order, width)]
    return found[-1:] if field.type in (ValueType.I8, ValueType.U8) else found


def _swaps_bytes(order: str) -> bool:
    """Text has no word order: only its bytes within a register may be swapped."""
    return order in ("BADC", "DCBA", "BA")


def _code_of(field: Field) -> str:
    if field.type is ValueType.STR:
        return f"{field.length}s"
    return "H" if field.type is ValueType.BOOL else _CODES[field.type]


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


def _text(raw: bytes) -> str | None:
    """Text ends at its first NUL; the blanks that pad it are not part of it."""
    try:
        return raw.split(b"\0", 1)[0].decode().rstrip()
    except UnicodeDecodeError:
        return None
