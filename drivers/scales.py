"""Scales that send their display again and again: Mettler Toledo continuous, A&D, CAS, Sartorius SBI, Ohaus.

Rules:

- A point takes one of `FIELDS`, by its name or its `field`.
- A weight in motion is uncertain (DEVICE_DOUBT). One out of range is bad: with the digits that the scale sent, if it
  sent any (DEVICE_FAULT), else EXCEPTION; while it calibrates, BUSY. Never 0, never the last weight.
- A weight in another unit than the point expects is DECODE: on many scales a key press changes pounds for kilograms.
- What is no weighing (a printed total, a clock) is left and counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import msgspec

from drivers.contract import ConfigError, Reason, ValueType
from drivers.fields import Result, fit, flagged, same_unit
from drivers.framing import MORE, Cut, DelimiterFramer, Framer, LineCounts, More, Shape, SlidingFramer
from drivers.instrument import (
    Heard,
    Said,
    SerialLineOptions,
    SerialLinePoint,
    refuse_keys,
    refuse_settled,
)
from drivers.obis import expected_unit

FIELDS: Final = ("weight", "tare", "stable", "overload", "net", "unit")
_MAX_LINE_BYTES: Final = 64


class Weighing(msgspec.Struct, frozen=True, kw_only=True):
    """What one message of a scale says. `None`: it does not say."""

    weight: float | None = None
    tare: float | None = None
    unit: str = ""
    stable: bool | None = None
    overload: bool = False  #: out of its range, above or below
    net: bool | None = None
    trouble: Reason | None = None  #: why there is no weight
    flag: Reason | None = None  #: what the scale says of its weight, beside motion and overload


Parse: TypeAlias = Callable[[bytes], Weighing | Reason | None]
"""`None`: no weighing. A reason: a message of another form."""


# ------------------------------------------------------------------------------------------------ Mettler Toledo

#: Status word C, bits 0-2; 0: see word B. 4 and 5 are troy ounces and pennyweights to some, unused to others, and 7 is
#: a unit of its own (newtons, none): a number in what is not known here is no weight in kilograms.
_TOLEDO_UNITS: Final = ("", "g", "t", "oz", "unit 4", "unit 5", "ton", "unit 7")


def toledo(body: bytes) -> Weighing | Reason:
    """Status words A, B, C, six digits of weight, six of tare (METTLER TOLEDO continuous output: IND445 user manual,
    5.2.2; Wildcat user manual, tables 6-9 to 6-11; Ohaus Defender 5000 manual, tables 5-2 to 5-4, agrees bit by bit,
    the units 4 to 7 of word C excepted)."""
    a, b, c = body[0], body[1], body[2]
    if not a & b & c & 0x20:  # bit 5 of each word is always 1
        return Reason.FRAMING
    shift = 2 - (a & 0x07)  # 0: XXXX00, 1: XXXXX0, 2: XXXXXX, 3: XXXXX.X, ...
    net, out_of_range = bool(b & 0x01), bool(b & 0x04)
    weight, tare = _digits(body[3:9], shift), _digits(body[9:15], shift)
    trouble = None
    if weight is None:
        if not out_of_range:
            return Reason.FRAMING
        trouble = Reason.EXCEPTION
    elif c & 0x10:  # expanded by ten; whether word A already counts the further digit, makers do not say
        weight, trouble = None, Reason.DECODE
    elif b & 0x02:
        weight = -weight
    unit = _TOLEDO_UNITS[c & 0x07] or ("kg" if b & 0x10 else "lb")
    return Weighing(
        weight=weight, tare=tare, unit=unit, stable=not b & 0x08, overload=out_of_range, net=net, trouble=trouble,
        flag=Reason.DEVICE_DOUBT if b & 0x40 else None,  # zero not captured since power-up
    )  # fmt: skip


def _digits(text: bytes, shift: int) -> float | None:
    """Six digits, blanks before them, with the decimal point where the status word has it."""
    digits = text.lstrip(b" ")
    if not digits.isdigit():
        return None
    whole = int(digits)
    return float(whole * 10**shift) if shift >= 0 else whole / 10**-shift


class _ToledoFramer(SlidingFramer):
    """STX, 15 characters, CR, and a check of seven bits: the complement of the sum of all before it."""

    def __init__(self, counts: LineCounts, *, checked: bool) -> None:
        super().__init__(Shape(start=b"\x02"), counts)
        self._checked = checked

    def feed(self, chunk: bytes, at_ns: int) -> list[Cut]:
        return super().feed(bytes(byte & 0x7F for byte in chunk), at_ns)  # parity, where it is read as data

    def _look(self, buffer: bytes, at: int) -> tuple[int, bytes | Reason | None] | More:
        size = 17 + self._checked
        if len(buffer) - at < size:
            return MORE
        frame = buffer[at : at + size]
        if frame[16] != 0x0D:
            return 1, Reason.FRAMING
        if self._checked and frame[17] != -sum(frame[:17]) & 0x7F:
            return 1, Reason.CRC
        return size, frame[1:16]


def toledo_frames(data: bytes, counts: LineCounts, *, checked: bool) -> list[bytes]:
    """The frames in what was heard that read as weighings."""
    cuts = _ToledoFramer(counts, checked=checked).feed(data, 1)
    return [body for body, _ in cuts if isinstance(body, bytes) and isinstance(toledo(body), Weighing)]


# ------------------------------------------------------------------------------------------------ A&D, CAS

_STATES: Final = {b"ST": True, b"QT": True, b"US": False, b"OL": None}
_AND: Final = re.compile(
    rb"(ST|QT|US|OL),(?:([A-Z~-][A-Z ~-]),)?([ +\-0-9.,]{1,12}?(?:E\+19)?) {0,3}([A-Za-z%]{1,3}|)"
)


def and_standard(body: bytes) -> Weighing | Reason | None:
    """`ST,+00123.45  g`: a header, perhaps a second (GS, NT, TR, HI, OK, LO), nine characters of data, the unit (A&D
    EK-L series manual, 9-2; GX/GF series manual, 10.6; AD-4329A manual, 9.1; the 18 bytes "AND" of CAS indicators)."""
    found = _AND.fullmatch(body.strip())
    if found is None:
        return Reason.FRAMING
    state, second, digits, unit = found.groups()
    return _headed(state, second or b"", digits, unit)


def cas(body: bytes) -> Weighing | Reason | None:
    """`ST,GS,` device, lamps, `,` eight characters of data, a blank, the unit (CAS CI-400 series manual, appendix
    1)."""
    body = body.rstrip(b"\r")
    if len(body) != 20 or body[2:3] != b"," or body[5:6] != b"," or body[8:9] != b",":
        return Reason.FRAMING
    if body[:2] not in _STATES:
        return Reason.FRAMING
    return _headed(body[:2], body[3:5], body[9:17], body[18:20])


def _headed(state: bytes, second: bytes, digits: bytes, unit: bytes) -> Weighing | Reason | None:
    if second in (b"TR", b"T ", b"T~", b"PT"):
        return None  # the tare, or a preset one
    weight = _signed(digits)
    overload = state == b"OL"
    if weight is None and not overload:
        return Reason.FRAMING
    net = True if second[:1] == b"N" else False if second[:1] == b"G" else None
    return Weighing(
        weight=weight, unit=unit.decode("ascii", "replace").strip(), stable=_STATES[state], overload=overload, net=net,
        trouble=Reason.EXCEPTION if weight is None else None,
    )  # fmt: skip


_SIGNED: Final = re.compile(rb"([+-]?) *(\d{1,9}(?:[.,]\d{0,9})?|[.,]\d{1,9})")


def _signed(text: bytes) -> float | None:
    found = _SIGNED.fullmatch(text.strip())
    if found is None:
        return None
    value = float(found[2].replace(b",", b"."))
    return -value if found[1] == b"-" else value


# ------------------------------------------------------------------------------------------------ Sartorius

_SBI: Final = re.compile(rb"([+\- ])([ 0-9.,\[\]]{9})[ \]]([A-Za-z% ]{3})")
_SBI_SPECIAL: Final = {
    b"H": Reason.EXCEPTION, b"HH": Reason.EXCEPTION, b"L": Reason.EXCEPTION, b"LL": Reason.EXCEPTION,
    b"C": Reason.BUSY,
}  # fmt: skip


def sbi(body: bytes) -> Weighing | Reason | None:
    """14 characters, or 20 with a name of six before them (Sartorius LE, GC, Signum manuals, "Output format with 16
    characters"): sign, value, unit. The unit is there only while the weight is stable. Digits in brackets are not
    verified, and said to be doubtful."""
    body = body.rstrip(b"\r")
    if len(body) not in (14, 20):
        return Reason.FRAMING
    name, body = body[:-14].strip(), body[-14:]
    words = body.split()
    if not words:
        return Weighing(trouble=Reason.MISSING)
    if words[0] == b"Err" or name == b"Stat" or b"ERR" in words:
        return Weighing(trouble=Reason.EXCEPTION)
    special = _SBI_SPECIAL.get(words[0]) if len(words) == 1 else None
    if special is not None:
        return Weighing(trouble=special, overload=special is Reason.EXCEPTION)
    found = _SBI.fullmatch(body)
    if found is None:
        return Reason.FRAMING
    if name not in (b"", b"N", b"G", b"G#", b"N1"):
        return None  # a tare, a count, a number of a printed record
    unverified = b"[" in body
    weight = _signed(found[2].replace(b"[", b"").replace(b"]", b""))
    if weight is None:
        return Reason.FRAMING
    unit = found[3].strip().decode("ascii")
    return Weighing(
        weight=-weight if found[1] == b"-" else weight,
        unit=unit,
        stable=bool(unit),
        net=name[:1] == b"N" if name else None,
        flag=Reason.DEVICE_DOUBT if unverified else None,
    )


# ------------------------------------------------------------------------------------------------ Ohaus

_OHAUS: Final = re.compile(rb"(-?) *(\d{1,9}(?:\.\d{0,9})?) {1,3}([A-Za-z%:]{1,5}) *(\??) *(\S.{0,16}|)")
_OHAUS_TIME: Final = re.compile(rb"\d\d:\d\d:\d\d")


def ohaus(body: bytes) -> Weighing | Reason | None:
    """Weight, unit, `?` while it moves, perhaps a legend (Ohaus RS232 interface manual, EN-3; Defender 3000 manual,
    5.2). A legend other than gross, net or a time is another value: a total, a tare."""
    body = body.strip()
    if not body:
        return None
    if body.startswith((b"Err", b"Error")) or body.strip(b"-") == b"":
        return Weighing(trouble=Reason.EXCEPTION, overload=True)
    found = _OHAUS.fullmatch(body)
    if found is None:
        return Reason.FRAMING
    sign, digits, unit, moving, legend = found.groups()
    if legend and legend not in (b"G", b"N", b"NET", b"B") and _OHAUS_TIME.fullmatch(legend) is None:
        return None
    weight = float(digits)
    return Weighing(
        weight=-weight if sign else weight,
        unit=unit.decode("ascii"),
        stable=not moving,
        net=legend in (b"N", b"NET") if legend in (b"G", b"B", b"N", b"NET") else None,
    )


# ------------------------------------------------------------------------------------------------ the dialect

_PARSERS: Final[dict[str, Parse]] = {
    "toledo": toledo, "and": and_standard, "cas": cas, "sbi": sbi, "ohaus": ohaus,
}  # fmt: skip


class Scale:
    """The dialect of each of these."""

    def __init__(self, options: SerialLineOptions, points: Sequence[SerialLinePoint]) -> None:
        refuse_settled(options)
        self._protocol = options.protocol
        self._parse = _PARSERS[options.protocol]
        self._checked = options.checked
        for point in points:
            refuse_keys(point, ("field",), f'protocol = "{options.protocol}"')
            field = point.field or point.name
            if field not in FIELDS:
                raise ConfigError(
                    f"point {point.name!r}: a scale has no field {field!r}; it has {', '.join(FIELDS)}: "
                    "name one with field"
                )
            wanted = {
                "stable": ValueType.BOOL,
                "overload": ValueType.BOOL,
                "net": ValueType.BOOL,
                "unit": ValueType.STR,
            }
            if field in wanted and point.type is not wanted[field]:
                raise ConfigError(f'point {point.name!r}: {field} needs type = "{wanted[field]}"')
        self._points = tuple(points)
        self.kinds = [self._points]

    def framer(self, counts: LineCounts, *, in_step: bool) -> Framer:
        if self._protocol == "toledo":
            return _ToledoFramer(counts, checked=self._checked)
        return DelimiterFramer(b"\n", _MAX_LINE_BYTES, counts, in_step=in_step)

    def read(self, body: bytes) -> Said:
        if not body.strip() and (self._protocol != "sbi" or len(body.rstrip(b"\r")) not in (14, 20)):
            return None
        weighing = self._parse(body)
        if weighing is None:
            return None
        if isinstance(weighing, Reason):
            return self.lost(weighing)
        return Heard(self._points, [_result(point, weighing) for point in self._points])

    def lost(self, reason: Reason) -> Said:
        return Heard(self._points, reason)


def _result(point: SerialLinePoint, weighing: Weighing) -> Result:
    field = point.field or point.name
    if field == "weight" or field == "tare":
        return _weight(
            point, weighing, weighing.weight if field == "weight" else weighing.tare, field == "weight"
        )
    if field == "overload":
        return weighing.overload
    if field == "unit":
        return weighing.unit or weighing.trouble or Reason.MISSING
    said = weighing.stable if field == "stable" else weighing.net
    return said if said is not None else weighing.trouble or Reason.MISSING


def _weight(point: SerialLinePoint, weighing: Weighing, value: float | None, weighed: bool) -> Result:
    if value is None:
        return (weighing.trouble if weighed else None) or Reason.MISSING
    wanted = expected_unit(point, point.device_unit)
    if wanted and weighing.unit and not same_unit(weighing.unit, wanted):
        return Reason.DECODE
    result = fit(value, point.type)
    if not weighed:
        return result
    if weighing.overload:
        return flagged(result, Reason.DEVICE_FAULT)
    return flagged(result, weighing.flag or (Reason.DEVICE_DOUBT if weighing.stable is False else None))
