"""Electricity meters' data sets in text: `1-0:1.8.0(00012.345*kWh)` (IEC 62056-21, 6.3; codes: IEC 62056-61).

Used by the driver `iec62056`, which asks, and by `serial_line` with `protocol = "dsmr"` for meters that speak by
themselves (DSMR P1 companion standard 5.0.2, and mode D): `/` identification, data lines, `!` and four hexadecimal
digits of CRC-16.

Rules:

- A point names its code: `1.8.0` fits `1-0:1.8.0` and `1-0:1.8.0*255` too, but never an earlier billing period's
  `1.8.0*01`; where several fit, the first of them counts.
- A data set may hold several values in parentheses; a point takes the last, or the one of its `column`.
- A value in another unit than the point expects is DECODE: the number would be wrong by a factor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from drivers.checks import crc16_arc
from drivers.contract import ConfigError, Point, Reason, ValueType
from drivers.fields import Result, parse, same_unit
from drivers.framing import Cut, Framer, LineCounts
from drivers.instrument import Heard, Said, SerialLineOptions, SerialLinePoint, refuse_keys, refuse_settled

MAX_TELEGRAM_BYTES: Final = 16_384  #: some 10 times the longest example of DSMR 5.0.2
_MAX_SETS: Final = 4_096
#: How a telegram may begin behind noise that holds a "/": with the maker's letters (IEC 62056-21, 6.3.2). No more
#: places than these are tried, the last: each costs a check over all.
_BEGINNING: Final = re.compile(rb"/(?=[A-Za-z]{3})")
_MAX_BEGINNINGS: Final = 16

# Value groups of IEC 62056-61, 4: A-B:C.D.E*F, of which only C.D need be there; C may be a letter (C, F, L, P).
_CODE: Final = re.compile(
    r"(?:(\d{1,3})-(\d{1,3}):)?([0-9A-Z]{1,3})\.([0-9A-Z]{1,3})(?:\.(\d{1,3}))?(?:[*&.](\d{1,3}))?"
)
_SET: Final = re.compile(r"([^()/!\r\n\x00-\x1f]{0,32})((?:\([^()]{0,2048}\)[\r\n]{0,4}){1,64})")
_VALUE: Final = re.compile(r"\(([^()]{0,2048})\)")


class Code(msgspec.Struct, frozen=True):
    """An OBIS code; `None` where a group is left out."""

    medium: str | None
    channel: str | None
    quantity: str
    kind: str
    tariff: str | None
    history: str | None

    def answers(self, wanted: Code) -> bool:
        """Is this the value that `wanted` asks for?"""
        if (self.quantity, self.kind) != (wanted.quantity, wanted.kind):
            return False
        if wanted.medium is not None and (wanted.medium, wanted.channel) != (
            self.medium or "1",
            self.channel or "0",
        ):
            return False
        # Left out, the tariff is 0 (the total) and the billing period 255 (the present one).
        return (self.tariff or "0", self.history or "255") == (wanted.tariff or "0", wanted.history or "255")


def code(text: str) -> Code | None:
    found = _CODE.fullmatch(text)
    if found is None:
        return None
    groups: tuple[str | None, ...] = found.groups()
    # "01" and "1" are one number.
    plain = [group.lstrip("0") or "0" if group is not None and group.isdigit() else group for group in groups]
    medium, channel, quantity, kind, tariff, history = plain
    return Code(medium, channel, quantity or "", kind or "", tariff, history)


class DataSets:
    """The data sets of one telegram, by their code, in the order in which they came."""

    __slots__ = ("_sets",)

    def __init__(self, text: str) -> None:
        self._sets: dict[str, list[str]] = {}
        for address, values in _SET.findall(text[: MAX_TELEGRAM_BYTES * 2])[:_MAX_SETS]:
            self._sets.setdefault(address.strip(), _VALUE.findall(values))

    def __len__(self) -> int:
        return len(self._sets)

    @property
    def sets(self) -> Mapping[str, list[str]]:
        return self._sets

    def values(self, wanted: str) -> list[str] | None:
        """The values of the first data set that answers to this code; `None` if there is none."""
        exact = self._sets.get(wanted)
        if exact is not None:
            return exact
        asked = code(wanted)
        if asked is None:
            return None
        for address, values in self._sets.items():
            here = code(address)
            if here is not None and here.answers(asked):
                return values
        return None

    def result(
        self, wanted: str, kind: ValueType, *, column: int | None = None, unit: str = "", base: int = 10
    ) -> Result:
        """One point's result. `unit`: what the value must be in, where the meter says."""
        values = self.values(wanted)
        if values is None or not values or (column or 1) > len(values):
            return Reason.MISSING
        text, star, said = values[(column or 0) - 1].partition("*")
        text = text.strip()
        if not text:
            return Reason.MISSING
        if star and unit and not same_unit(said, unit):
            return Reason.DECODE
        return parse(text, kind, base=base)


def expected_unit(point: Point, device_unit: str) -> str:
    """The unit that a message must say for this point; empty: any. With a scale, the point's unit is another's."""
    if device_unit:
        return device_unit
    return point.unit if point.scale == 1.0 and not point.offset else ""


def refuse_bad_code(point_name: str, text: str) -> None:
    """Raise `ConfigError` where this is no code."""
    if not text:
        raise ConfigError(f'point {point_name!r}: names no code; write one, as in obis = "1.8.0"')
    if code(text) is None:
        raise ConfigError(f'point {point_name!r}: obis {text!r} is no code, as "1.8.0" or "1-0:1.8.0" is')


# ----------------------------------------------------------------------------------------------- meters that speak


class TelegramFramer:
    """Cuts `/ … ! hhhh CR LF`. A telegram that is cut short or overrun by the next `/` is lost; its check is verified
    here, over all from `/` to `!` (DSMR P1 5.0.2, 6.2)."""

    def __init__(self, counts: LineCounts, *, checked: bool) -> None:
        self._counts = counts
        self._checked = checked
        self._buffer = b""
        self._at_ns = 0
        self._in_step = False

    @property
    def partial(self) -> bool:
        return bool(self._buffer)

    def begins(self) -> None:
        """A telegram is known by its `/`."""

    def feed(self, chunk: bytes, at_ns: int) -> list[Cut]:
        self._at_ns = at_ns
        self._buffer += chunk
        cuts: list[Cut] = []
        while True:
            begin = self._buffer.find(b"/")
            self._skip(len(self._buffer) if begin < 0 else begin)
            mark = self._buffer.find(b"\n!")
            end = self._buffer.find(b"\n", mark + 1) if mark >= 0 else -1
            again = self._buffer.find(b"\n/", 0, mark if mark >= 0 else len(self._buffer))
            if again >= 0 or (end < 0 and len(self._buffer) > MAX_TELEGRAM_BYTES) or end > MAX_TELEGRAM_BYTES:
                self._lose(Reason.FRAMING, again + 1 if again >= 0 else len(self._buffer), cuts)
                continue
            if end < 0:
                return cuts
            telegram, sent = self._buffer[: mark + 2], self._buffer[mark + 2 : end].strip()
            if self._agrees(telegram, sent):
                cuts.append((telegram, at_ns))
                self._in_step = True
                self._buffer = self._buffer[end + 1 :]
            elif (inner := self._behind_noise(telegram, sent)) > 0:
                self._skip(inner)  # the first "/" was noise
            else:
                self._lose(Reason.CRC, end + 1, cuts, always=True)

    def silence(self) -> list[Cut]:
        cuts: list[Cut] = []
        if self._buffer:
            self._lose(Reason.FRAMING, len(self._buffer), cuts)
        return cuts

    def _behind_noise(self, telegram: bytes, sent: bytes) -> int:
        """Where in these bytes the telegram begins whose check was sent; 0: nowhere."""
        places = [found.start() for found in _BEGINNING.finditer(telegram, 1)][-_MAX_BEGINNINGS:]
        return next((at for at in places if self._agrees(telegram[at:], sent)), 0)

    def _agrees(self, telegram: bytes, sent: bytes) -> bool:
        if not sent:
            return not self._checked
        try:
            return len(sent) == 4 and int(sent, 16) == crc16_arc(telegram)
        except ValueError:
            return False

    def _skip(self, size: int) -> None:
        self._counts.skipped_bytes += size
        self._buffer = self._buffer[size:]

    def _lose(self, reason: Reason, size: int, cuts: list[Cut], *, always: bool = False) -> None:
        if reason is Reason.CRC:
            self._counts.check_errors += 1
        else:
            self._counts.framing_errors += 1
        self._skip(size)
        if self._in_step or always:
            cuts.append((reason, self._at_ns))
        self._in_step = False


class Dsmr:
    """The dialect of a meter that sends telegrams by itself."""

    def __init__(self, options: SerialLineOptions, points: Sequence[SerialLinePoint]) -> None:
        refuse_settled(options)
        self._checked = options.checked
        for point in points:
            refuse_keys(point, ("obis", "column"), 'protocol = "dsmr"')
            refuse_bad_code(point.name, point.obis)
            if point.column is not None and point.column < 1:
                raise ConfigError(
                    f"point {point.name!r}: column is {point.column}; values are counted from 1"
                )
        self._points = tuple(points)
        self.kinds = [self._points]

    def framer(self, counts: LineCounts, *, in_step: bool) -> Framer:
        return TelegramFramer(counts, checked=self._checked)

    def read(self, body: bytes) -> Said:
        try:
            sets = DataSets(body.decode("ascii"))
        except UnicodeDecodeError:
            return self.lost(Reason.FRAMING)
        if not sets:
            return self.lost(Reason.FRAMING)
        results = [
            sets.result(
                point.obis, point.type, column=point.column, base=point.base,
                unit=expected_unit(point, point.device_unit),
            )
            for point in self._points
        ]  # fmt: skip
        return Heard(self._points, results)

    def lost(self, reason: Reason) -> Said:
        return Heard(self._points, reason)
