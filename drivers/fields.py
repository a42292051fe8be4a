"""A field of text, or an item of a binary frame, as a point's raw value; or the reason why it is none.

Rules: nothing is guessed and nothing is bent. A number that the type cannot hold is OVERFLOW, text that is no number is
DECODE, an absent field is MISSING; 0 comes out only where 0 was sent.
"""

from __future__ import annotations

import math
import struct
from typing import Final, TypeAlias

import msgspec

from drivers.codec import limits_of
from drivers.contract import Reason, Value, ValueType


class Doubted(msgspec.Struct, frozen=True, gc=False):
    """A value that the device itself flags: doubtful (in motion) or bad (overloaded)."""

    value: Value
    reason: Reason


Result: TypeAlias = Value | Reason | Doubted
"""What a message says about a point: a value, a value with the device's own flag, or why there is none."""

_F32: Final = struct.Struct("<f")
_F32_MAX: Final[float] = struct.unpack("<f", b"\xff\xff\x7f\x7f")[0]
#: Blanks and control characters (STX, ETX, CR) round a field.
BLANK: Final = "".join(map(chr, range(33))) + "\x7f"
_TRUE: Final = frozenset({"1", "on", "true", "yes"})
_FALSE: Final = frozenset({"0", "off", "false", "no"})
_LONGEST_NUMBER: Final = 400  #: digits; more are noise, and `int` would take long over them


def fit(value: float | bool | bytes, kind: ValueType) -> Value | Reason:
    """A number from a binary frame as the point's type, or why it does not fit."""
    if isinstance(value, bytes):
        if kind is not ValueType.STR:
            return Reason.DECODE
        try:
            return value.rstrip(b"\0").decode("utf-8")
        except UnicodeDecodeError:
            return Reason.DECODE
    if kind is ValueType.STR:
        return Reason.DECODE
    if kind is ValueType.BOOL:
        return bool(value) if value in (0, 1) else Reason.DECODE
    if isinstance(value, float) and not math.isfinite(value):
        return Reason.NAN if math.isnan(value) else Reason.INFINITE
    if kind is ValueType.F64 or kind is ValueType.F32:
        if abs(value) > _F32_MAX and kind is ValueType.F32:
            return Reason.OVERFLOW
        # A whole number that the mantissa cannot hold would become another number.
        whole = isinstance(value, int)
        try:
            held = float(value) if kind is ValueType.F64 or not whole else _F32.unpack(_F32.pack(value))[0]
        except OverflowError:
            return Reason.OVERFLOW
        return held if not whole or held == value else Reason.OVERFLOW
    if value != int(value):
        return Reason.DECODE
    low, high = limits_of(kind)
    return int(value) if low <= value <= high else Reason.OVERFLOW


def parse(text: str, kind: ValueType, *, base: int = 10, decimal: str = ".") -> Value | Reason:
    """A field of text as the point's type, or why it does not read as one."""
    if kind is ValueType.STR:
        return text
    # `float` and `int` also take "1_000" and digits of other scripts, which no instrument means.
    if not text.isascii() or "_" in text or len(text) > _LONGEST_NUMBER:
        return Reason.DECODE
    if kind is ValueType.BOOL:
        word = text.lower()
        return True if word in _TRUE else False if word in _FALSE else Reason.DECODE
    try:
        if kind is ValueType.F64 or kind is ValueType.F32:
            if decimal != ".":
                if "." in text:
                    return Reason.DECODE
                text = text.replace(decimal, ".")
            return fit(float(text), kind)
        return fit(int(text, base), kind)
    except ValueError:
        return Reason.DECODE


def flagged(result: Value | Reason, flag: Reason | None) -> Result:
    """The result with what the device says of it; a result that is no value keeps its own reason."""
    return result if flag is None or isinstance(result, Reason) else Doubted(result, flag)


#: Ways of writing one unit, all in lower case.
_SAME_UNIT: Final = {
    "m³": "m3",
    "°c": "cel",
    "c": "cel",
    "deg c": "cel",
    "grad c": "cel",
    "pc": "pcs",
    "lbs": "lb",
}


def same_unit(one: str, other: str) -> bool:
    """Capitals do not count ("KG"), but where they tell mega from milli."""
    one, other = one.strip(), other.strip()
    low_one, low_other = (_SAME_UNIT.get(unit.lower(), unit.lower()) for unit in (one, other))
    return low_one == low_other and (low_one[:2] in ("m", "m3") or (one[:1] == "M") == (other[:1] == "M"))
