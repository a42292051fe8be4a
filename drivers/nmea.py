"""NMEA 0183 sentences: `$` or `!`, the address, fields between commas, `*` and two hexadecimal digits of check.

Rules:

- A point names its sentence ("RMC" of any talker, or "GPRMC" of one) and the column of its field, counted from 1
  after the address, as the standard's tables count them.
- A sentence counts only if its check agrees; one without a check counts only where `checked = false`.
- Where a sentence says itself that its data are void (no fix, "V"), its values are bad; where it says that they are
  estimated, they are uncertain.
- Sentences that no point asks for are counted and left: AIS (`!AIVDM`), proprietary (`$P…`), queries. A tag block
  before a sentence (NMEA 0183 4.0, 7) is skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from drivers.checks import hex_agrees, xor_of
from drivers.contract import ConfigError, Reason, ValueType
from drivers.fields import BLANK, Result, flagged, parse
from drivers.framing import DelimiterFramer, Framer, LineCounts
from drivers.instrument import (
    Heard,
    Said,
    SerialLineOptions,
    SerialLinePoint,
    lost_of_one_kind,
    refuse_keys,
    refuse_settled,
)

#: 82 characters says the standard (5.3); receivers send longer ones, and a tag block adds as many.
MAX_SENTENCE_BYTES: Final = 512

_ESTIMATED: Final = dict.fromkeys("EMS", Reason.DEVICE_DOUBT) | {"N": Reason.DEVICE_FAULT}  # mode indicator
_VOID: Final = {"V": Reason.DEVICE_FAULT}
_HEADING: Final = _ESTIMATED | _VOID
#: Where a sentence says how good it is, what each character there means, and of which columns (none named: of all).
_FLAGS: Final[dict[str, tuple[tuple[int, dict[str, Reason], tuple[int, ...]], ...]]] = {
    "RMC": ((2, _VOID, ()), (12, _ESTIMATED, ())),
    "RMA": ((1, _VOID, ()),),
    "RMB": ((1, _VOID, ()),),
    "GLL": ((6, _VOID, ()), (7, _ESTIMATED, ())),
    "VTG": ((9, _ESTIMATED, ()),),
    "GGA": ((6, {"0": Reason.DEVICE_FAULT} | dict.fromkeys("678", Reason.DEVICE_DOUBT), ()),),
    "GNS": ((6, _ESTIMATED, ()),),
    "MWV": ((5, _VOID, ()),),
    "ROT": ((2, _VOID, ()),),
    "RPM": ((5, _VOID, ()),),
    "THS": ((2, _HEADING, ()),),
    "APB": ((1, _VOID, ()), (2, _VOID, ())),
    "XTE": ((1, _VOID, ()), (2, _VOID, ())),
    "OSD": ((2, _VOID, (1,)),),
    # One rudder's sentence has V for the other: a status is no null field.
    "RSA": ((2, _VOID, (1,)), (4, _VOID, (3,))),
    "ROR": ((2, _VOID, (1,)), (4, _VOID, (3,))),
    "VBW": ((3, _VOID, (1, 2)), (6, _VOID, (4, 5)), (8, _VOID, (7,)), (10, _VOID, (9,))),
}


def split(line: bytes, *, checked: bool) -> tuple[str, list[str]] | Reason:
    """The address of a sentence and its fields, or why this is none."""
    begin = max(line.rfind(b"$"), line.rfind(b"!"))
    if begin < 0:
        return Reason.FRAMING
    body, star, sent = line[begin + 1 :].partition(b"*")
    sent = sent.strip()
    if star or checked:
        if not hex_agrees(sent, xor_of(body)):
            return Reason.CRC
    else:
        body = body.strip()
    try:
        address, *fields = body.decode("ascii").split(",")
    except UnicodeDecodeError:
        return Reason.FRAMING
    if not address.isalnum():
        return Reason.FRAMING
    return address, fields


def answers(address: str, sentence: str) -> bool:
    """Is a sentence of this address one of those that the name asks for?"""
    if address == sentence:
        return True
    return len(address) == 5 and address[0] != "P" and address[2:] == sentence


def degrees(angle: str, hemisphere: str) -> float | Reason:
    """Degrees and minutes as one number, `ddmm.mmm`, with its hemisphere, as degrees."""
    if not angle or not hemisphere:
        return Reason.MISSING
    whole, _, _ = angle.partition(".")
    if (
        not whole.isascii()
        or not whole.isdigit()
        or not 3 <= len(whole) <= 5
        or hemisphere not in tuple("NSEW")
    ):
        return Reason.DECODE
    minutes = parse(angle[len(whole) - 2 :], ValueType.F64)
    if not isinstance(minutes, float) or not 0 <= minutes < 60:
        return Reason.DECODE
    value = int(whole[:-2]) + minutes / 60
    if value > (90 if hemisphere in "NS" else 180):
        return Reason.DECODE
    return -value if hemisphere in "SW" else value


class Nmea:
    """The dialect."""

    def __init__(self, options: SerialLineOptions, points: Sequence[SerialLinePoint]) -> None:
        refuse_settled(options)
        self._checked = options.checked
        by_sentence: dict[str, list[SerialLinePoint]] = {}
        for point in points:
            where = f"point {point.name!r}"
            refuse_keys(point, ("sentence", "column"), 'protocol = "nmea0183"')
            if not point.sentence:
                raise ConfigError(f'{where}: names no sentence; write one, as in sentence = "RMC"')
            if not point.sentence.isalnum() or not point.sentence.isupper():
                raise ConfigError(f'{where}: sentence {point.sentence!r} is no address, as "RMC" or "GPRMC"')
            if point.column is None or not 1 <= point.column <= 200:
                raise ConfigError(
                    f"{where}: column is {point.column}; give the field's number, from 1 after the address"
                )
            if point.form == "degrees" and point.type not in (ValueType.F64, ValueType.F32):
                raise ConfigError(f'{where}: form = "degrees" gives fractions; its type must be f64 or f32')
            by_sentence.setdefault(point.sentence, []).append(point)
        self._by_sentence = {sentence: tuple(of) for sentence, of in by_sentence.items()}
        self.kinds = list(self._by_sentence.values())

    def framer(self, counts: LineCounts, *, in_step: bool) -> Framer:
        return DelimiterFramer(b"\n", MAX_SENTENCE_BYTES, counts, in_step=in_step)

    def read(self, body: bytes) -> Said:
        if not body.strip(BLANK.encode()):
            return None
        sentence = split(body, checked=self._checked)
        if isinstance(sentence, Reason):
            return self._damaged(body, sentence)
        address, fields = sentence
        wanted = [of for name, of in self._by_sentence.items() if answers(address, name)]
        if not wanted:
            return None
        points = wanted[0] if len(wanted) == 1 else tuple(point for of in wanted for point in of)
        return Heard(points, [self._result(point, address, fields) for point in points])

    def _result(self, point: SerialLinePoint, address: str, fields: list[str]) -> Result:
        column = (point.column or 1) - 1
        flag = self._flag(address, fields, column + 1)
        field = fields[column].strip() if column < len(fields) else ""
        if not field:
            return Reason.MISSING
        if point.form == "degrees":
            value = degrees(field, fields[column + 1].strip() if column + 1 < len(fields) else "")
            return value if isinstance(value, Reason) else flagged(value, flag)
        result = parse(field, point.type, base=point.base)
        # The flag is about the data; a text (the flag's own character, say) is what it is.
        return result if point.type is ValueType.STR else flagged(result, flag)

    @staticmethod
    def _flag(address: str, fields: list[str], column: int) -> Reason | None:
        """The worst that the sentence says of this column."""
        found: list[Reason] = []
        for at, meaning, of in _FLAGS.get(address[-3:], ()):
            if at > len(fields) or (of and column not in of):
                continue
            said = {meaning.get(character) for character in fields[at - 1].strip()}
            if (
                len(said) > 1
            ):  # GNS has a character for each system; one without a fix does not harm the others
                said.discard(Reason.DEVICE_FAULT)
            found += [reason for reason in said if reason is not None]
        return max(found, default=None)

    def _damaged(self, line: bytes, reason: Reason) -> Said:
        """Whom the loss concerns can be told where the address is still one that is asked for."""
        begin = max(line.rfind(b"$"), line.rfind(b"!"))
        address = line[begin + 1 :].split(b",")[0].decode("latin-1") if begin >= 0 else ""
        for name, points in self._by_sentence.items():
            if answers(address, name):
                return Heard(points, reason)
        return (self.lost(reason) if begin < 0 else None) or Heard((), reason)

    def lost(self, reason: Reason) -> Said:
        return lost_of_one_kind(self.kinds, reason)
