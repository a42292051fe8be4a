"""What registers could mean: every decoding of them, which are believable, and which one shows a value off a display.

Rules:

1. Pure: registers in, guesses out; nothing here asks a device.
2. A guess about a displayed value is judged by chance: of all bit patterns that its registers could hold, how many
   would have shown that value as well as this one did? The fewer, the better the evidence. How usual the type, order
   and scale are only weighs what chance leaves open.
3. A display lags, rounds or cuts off, and the value moves: a guess is measured against everything that its registers
   held while they were watched, and against every value read off the display.
4. Believable is not proven: a guess is marked, never hidden.
"""

from __future__ import annotations

import enum
import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Final, TypeAlias

import msgspec

from drivers.modbus_plan import Table

Words: TypeAlias = Mapping[int, int]
"""Registers by address."""
Snapshot: TypeAlias = Mapping[Table, Words]
"""What was read at one time."""

Number: TypeAlias = int | float


class Kind(enum.StrEnum):
    """How registers are read; the names are those of a point's `type`."""

    U16 = "u16"
    I16 = "i16"
    U32 = "u32"
    I32 = "i32"
    F32 = "f32"
    U64 = "u64"
    I64 = "i64"
    F64 = "f64"
    BCD16 = "bcd16"
    BCD32 = "bcd32"

    @property
    def registers(self) -> int:
        return int(self.value.lstrip("bcduif")) // 16

    @property
    def is_float(self) -> bool:
        return self.value.startswith("f")

    @property
    def is_signed(self) -> bool:
        return self.value.startswith("i")


ORDERS: Final = ("ABCD", "CDAB", "BADC", "DCBA")
KINDS: Final = tuple(Kind)
_SINGLE_ORDERS: Final = ("ABCD", "BADC")  #: one register has no word order


def orders_of(kind: Kind) -> tuple[str, ...]:
    return ORDERS if kind.registers > 1 else _SINGLE_ORDERS


# --------------------------------------------------------------------------------------- decoding


def decode(words: Sequence[int], kind: Kind, order: str) -> list[Number | None]:
    """The value at each start within a run of neighbouring registers; `None`: not a number, or no BCD."""
    size = kind.registers
    starts = len(words) - size + 1
    if starts < 1:
        return []
    if order in ("BADC", "DCBA"):
        words = [(word & 0xFF) << 8 | word >> 8 for word in words]
    # Most significant word first for ABCD and BADC; last for CDAB and DCBA.
    shifts = range(16 * (size - 1), -1, -16) if order in ("ABCD", "BADC") else range(0, 16 * size, 16)
    raw = [0] * starts
    for offset, shift in enumerate(shifts):
        for i in range(starts):
            raw[i] |= words[i + offset] << shift
    match kind:
        case Kind.F32 | Kind.F64:
            code, wide = ("f", "I") if kind is Kind.F32 else ("d", "Q")
            floats = struct.unpack(f">{starts}{code}", struct.pack(f">{starts}{wide}", *raw))
            return [value if math.isfinite(value) else None for value in floats]
        case Kind.BCD16 | Kind.BCD32:
            return [_bcd(value) for value in raw]
        case Kind.I16 | Kind.I32 | Kind.I64:
            top, span = 1 << 16 * size - 1, 1 << 16 * size
            return [value - span if value >= top else value for value in raw]
        case _:
            return list(raw)


def _bcd(raw: int) -> int | None:
    digits = f"{raw:x}"
    return int(digits) if digits.isdecimal() else None


def runs(words: Words, wanted: Iterable[int] | None = None) -> list[tuple[int, list[int]]]:
    """Stretches of neighbouring registers: first address, and what they hold."""
    found: list[tuple[int, list[int]]] = []
    for address in sorted(words if wanted is None else wanted):
        if found and address == found[-1][0] + len(found[-1][1]):
            found[-1][1].append(words[address])
        else:
            found.append((address, [words[address]]))
    return found


class Text(msgspec.Struct, frozen=True):
    """Registers that hold text."""

    register: int
    registers: int
    text: str
    swapped: bool  #: the bytes within each register


_SHORTEST_TEXT: Final = 4  #: characters; fewer are as likely numbers
_PRINTABLE: Final = re.compile(rb"[\x20-\x7e]{%d,}" % _SHORTEST_TEXT)
_WORDLIKE: Final = re.compile(r"[A-Za-z0-9]")


def texts(words: Words) -> list[Text]:
    """Runs of printable characters, at least four, most of them letters or digits."""
    found: list[Text] = []
    for first, run in runs(words):
        for swapped in (False, True):
            data = struct.pack(f"{'<' if swapped else '>'}{len(run)}H", *run)
            for match in _PRINTABLE.finditer(data):
                begin = match.start() + match.start() % 2
                text = data[begin : match.end()].decode("ascii")
                if len(text) >= _SHORTEST_TEXT and 2 * len(_WORDLIKE.findall(text)) > len(text):
                    found.append(Text(first + begin // 2, (len(text) + 1) // 2, text.rstrip(), swapped))
    # Of a text and its byte-swapped reading, the one that reads like a word.
    kept: list[Text] = []
    for each in sorted(found, key=lambda text: (-_readable(text.text), text.swapped)):
        if all(
            each.register + each.registers <= other.register
            or other.register + other.registers <= each.register
            for other in kept
        ):
            kept.append(each)
    return sorted(kept, key=lambda text: text.register)


def _readable(text: str) -> float:
    """More for letters that follow letters in the usual case, digits digits."""
    good = sum(
        (a.isdigit() and b.isdigit())
        or (a.isalpha() and b.islower())
        or (a.isupper() and b.isupper())
        or (a in " -./" or b in " -./")
        for a, b in pairwise(text)
    )
    return good + 0.1 * len(text)


# ----------------------------------------------------------------------------------- plausibility


class Guess(msgspec.Struct, frozen=True):
    """One decoding of one place."""

    register: int
    kind: Kind
    order: str
    value: Number
    likely: float  #: 0..1
    note: str = ""  #: what it looks like

    @property
    def end(self) -> int:
        return self.register + self.kind.registers


LIKELY: Final = 0.5  #: from here on a guess is marked

_SMALLEST_FLOAT: Final = 1e-3
_LARGEST_FLOAT: Final = 1e7
#: What mains-powered things show, wherever they come from: nominal values and how far they stray.
_USUAL: Final = (
    (50.0, 0.5, "mains frequency, Hz"),
    (60.0, 0.5, "mains frequency, Hz"),
    (230.0, 12.0, "mains voltage, V"),
    (400.0, 20.0, "mains voltage between phases, V"),
    (120.0, 6.0, "mains voltage, V"),
)
_INT_SCALES: Final = (0.1, 0.01, 0.001)


def guesses(words: Words) -> list[Guess]:
    """Every decoding of every place, each with how likely it is. Neighbours of one kind speak for each other."""
    found: list[Guess] = []
    for first, run in runs(words):
        for kind in KINDS:
            for order in orders_of(kind):
                values = decode(run, kind, order)
                alone = [_alone(value, kind, run[i : i + kind.registers]) for i, value in enumerate(values)]
                for i, value in enumerate(values):
                    if value is None:
                        continue
                    likely, note = alone[i]
                    if kind.registers > 1 and likely >= _BELIEVED:
                        weight = 1.0 if kind.is_float else 0.4  # small numbers in pairs look like wide ones
                        likely = min(1.0, likely + weight * _of_neighbours(alone, i, kind.registers))
                    found.append(
                        Guess(first + i, kind, order, value, round(_usual(kind, order) * likely, 3), note)
                    )
    return found


_BELIEVED: Final = 0.35


def _usual(kind: Kind, order: str) -> float:
    if order == "ABCD":
        return 1.0
    if kind.registers == 1:
        return 0.45
    return 0.95 if order == "CDAB" else 0.7


def _of_neighbours(alone: Sequence[tuple[float, str]], i: int, size: int) -> float:
    """A map is made of rows of the same type: what the places before and after say about this one."""
    around = [alone[j][0] for j in (i - 2 * size, i - size, i + size, i + 2 * size) if 0 <= j < len(alone)]
    if not around:
        return 0.0
    return 0.35 * sum(each >= _BELIEVED for each in around) / len(around) - 0.1 * (max(around) < _BELIEVED)


def _alone(value: Number | None, kind: Kind, words: Sequence[int]) -> tuple[float, str]:
    """How believable a value is by itself, and what it looks like."""
    if value is None:
        return 0.0, ""
    if kind.is_float:
        return _float_alone(float(value), kind, words)
    note = ""
    for scale in _INT_SCALES:
        # Nobody sends volts in thousandths, nor hertz without a fraction.
        if (looks := _looks_like(value * scale)) and (
            looks.endswith("Hz") == (scale in (0.01, 0.001)) or scale == 0.1
        ):
            note = looks if scale == 1.0 else f"{looks} (× {scale:g})"
            break
    if kind in (Kind.BCD16, Kind.BCD32):
        return (0.3 if note and value > 99 else 0.1), note
    if kind.registers == 1:
        if value in (0, 0xFFFF, 0x7FFF, -1, -0x8000):
            return 0.2, "no value?" if value in (0xFFFF, 0x7FFF, -0x8000) else ""
        signed_matters = kind is Kind.I16 and value < 0
        if kind is Kind.I16 and not signed_matters:
            return 0.3, note  # the same as u16
        if signed_matters:
            return (0.55 if value > -10_000 else 0.25), note
        return (0.6 if value < 10_000 or note else 0.4 if value < 0x8000 else 0.25), note
    # Wide integers: both halves must say something, and the whole stay within what is counted.
    high, low = divmod(abs(int(value)), 1 << 16)
    if not high:
        return (0.3 if low else 0.1), note
    if all(word in (0, 0xFFFF) for word in words):
        return 0.05, ""
    if kind.registers == 4:
        return (0.4 if high < 1 << 24 and words.count(0) >= 1 else 0.05), note
    if value < 0:
        return (0.4 if value > -10_000_000 else 0.05), note
    if kind is Kind.U32 and value >= 1 << 31:
        return 0.05, ""
    return (0.45 if high < 0x20 else 0.25 if high < 0x400 else 0.1), note


def _float_alone(value: float, kind: Kind, words: Sequence[int]) -> tuple[float, str]:
    if value == 0:
        return 0.1, ""
    size = abs(value)
    if not _SMALLEST_FLOAT <= size <= _LARGEST_FLOAT * (1 if kind is Kind.F32 else 1e5):
        return 0.0, ""
    note = _looks_like(value)
    # A double that happens to be believable is one in fifty; a single, one in eight.
    likely = 0.5 if kind is Kind.F32 else 0.65
    likely += 0.15 * (_digits(value, kind) <= 5) + 0.2 * bool(note) - 0.15 * (size < 0.01)
    return min(1.0, likely), note


def _digits(value: float, kind: Kind) -> int:
    """Significant digits that this value needs."""
    for digits in range(1, 8):
        if kind is Kind.F64:
            if float(f"{value:.{digits}g}") == value:
                return digits
        elif struct.unpack(">f", struct.pack(">f", float(f"{value:.{digits}g}")))[0] == value:
            return digits
    return 9


def _looks_like(value: Number) -> str:
    return next((words for nominal, off, words in _USUAL if abs(value - nominal) <= off), "")


def layout(words: Words) -> list[Guess | Text]:
    """The most believable reading of all registers together: guesses and texts that share no register."""
    choices: list[tuple[float, int, int, Guess | Text]]  # gain, first, end, what
    choices = [
        (0.85 * text.registers, text.register, text.register + text.registers, text) for text in texts(words)
    ]
    choices += [
        (guess.likely * guess.kind.registers, guess.register, guess.end, guess)
        for guess in guesses(words)
        if guess.likely >= 0.2 and guess.kind not in (Kind.BCD16, Kind.BCD32)
    ]
    addresses = sorted(words)
    by_end: dict[int, list[tuple[float, int, int, Guess | Text]]] = {}
    for choice in choices:
        by_end.setdefault(choice[2], []).append(choice)
    # Best gain of all registers below an address.
    best: dict[int, tuple[float, tuple[float, int, int, Guess | Text] | None]] = {}
    before = 0.0
    for address in addresses:
        if address not in best:
            best[address] = (before, None)
        top, top_choice = best[address][0], None
        for choice in by_end.get(address + 1, ()):
            gain = best[choice[1]][0] + choice[0]
            if gain > top:
                top, top_choice = gain, choice
        best[address + 1] = (top, top_choice)
        before = top
    told: list[Guess | Text] = []
    at = addresses[-1] + 1 if addresses else 0
    floor = addresses[0] if addresses else 0
    known = set(addresses)
    while at > floor:
        picked = best[at][1] if at in best else None
        if picked is None:
            at -= 1
            while at > floor and at - 1 not in known:
                at -= 1
            continue
        told.append(picked[3])
        at = picked[1]
    return told[::-1]


def moving(snapshots: Sequence[Snapshot]) -> set[tuple[Table, int]]:
    """The registers that did not always hold the same."""
    first = snapshots[0] if snapshots else {}
    return {
        (table, address)
        for later in snapshots[1:]
        for table, words in later.items()
        for address, word in words.items()
        if first.get(table, {}).get(address, word) != word
    }


# ------------------------------------------------------------------------------- off the display


class Expected(msgspec.Struct, frozen=True):
    """A value read off a display: `230.5`, `voltage=230.5`, `voltage=230.5 V`."""

    name: str
    value: float
    step: float  #: of the display's last digit
    unit: str = ""

    @property
    def decimals(self) -> int:
        return max(0, -round(math.log10(self.step)))


_EXPECTED: Final = re.compile(
    r"(?:(?P<name>[^=]+?)\s*=\s*)?(?P<sign>[-+]?)(?P<whole>\d+)(?:[.,](?P<part>\d+))?\s*(?P<unit>[^\d\s.,=+-][^=]*)?"
)


def parse_expected(text: str) -> Expected:
    """Raises `ValueError` with what is right."""
    found = _EXPECTED.fullmatch(text.strip())
    if found is None:
        raise ValueError(
            f"{text!r} is not a value off a display; write it as it stands there, such as 230.5, voltage=230.5 or "
            "'voltage=230.5 V'"
        )
    part = found["part"] or ""
    value = float(f"{found['sign']}{found['whole']}.{part or 0}")
    return Expected(found["name"] or "", value, 10.0 ** -len(part), (found["unit"] or "").strip())


class Match(msgspec.Struct, frozen=True):
    """Registers that show the value off the display."""

    table: Table
    register: int
    kind: Kind
    order: str
    scale: float
    raw: Number  #: as it was last
    value: float  #: raw * scale + offset
    off: float  #: from the display, in its unit; 0 where it shows the same digits
    score: float  #: decimal digits of evidence; what chance would bring has 0 or less
    moves: bool
    idle: int = (
        0  #: words of it that hold nothing but sign: the wider type explains them, a narrower one does not
    )
    or_kind: Kind | None = None  #: shows the same today, and may be meant: u16 or i16
    offset: float = 0.0  #: value = raw * scale + offset: of a temperature that is held in Kelvin

    @property
    def exact(self) -> bool:
        return self.off == 0.0

    def same_place(self, other: Match) -> bool:
        """Shares a register with the other, and shows the same: only how wide it is, is open."""
        apart = (
            self.register + self.kind.registers <= other.register
            or other.register + other.kind.registers <= self.register
        )
        return self.table is other.table and not apart and math.isclose(self.value, other.value, rel_tol=1e-6)


class Observation(msgspec.Struct, frozen=True):
    """What the registers held around the time at which the display was read."""

    expected: Expected
    snapshots: Sequence[Snapshot]


FARTHEST: Final = 0.05  #: of the value: what the display may be away from the register, where the value moves
_LOG_FARTHEST: Final = math.log10(1 + FARTHEST)
_POWERS: Final = range(-3, 5)  #: raw = value * 10**power
_TYPE_PRIOR: Final = {
    Kind.U16: 0.30, Kind.I16: 0.25, Kind.F32: 0.20, Kind.U32: 0.10, Kind.I32: 0.10, Kind.F64: 0.02, Kind.U64: 0.003,
    Kind.I64: 0.004, Kind.BCD16: 0.005, Kind.BCD32: 0.005,
}  # fmt: skip
_ORDER_PRIOR: Final = {"ABCD": 0.6, "CDAB": 0.3, "BADC": 0.05, "DCBA": 0.05}
_EVIDENCE_OF_LAYOUT: Final = 1.5  #: digits: neighbours laid out alike
_EVIDENCE_OF_IDLE: Final = 0.45  #: digits: beside a value, about one register in three holds nothing
_LN_WORD: Final = math.log(2.0**16)
_INEXACT: Final = 0.7  #: digits taken from what does not show the display's own digits


KELVIN: Final = 273.15
_CELSIUS: Final = ("cel", "c", "°c", "degc", "celsius")
_EVIDENCE_OF_KELVIN: Final = -1.3  #: digits: about one thermometer in twenty


def match(observations: Sequence[Observation]) -> list[Match]:
    """Where the displayed value stands, best first. With several observations (the display read again later), what
    shows all of them. What is shown in Celsius may be held in Kelvin."""
    matches = _match(observations)
    if observations and all(each.expected.unit.lower() in _CELSIUS for each in observations):
        held = [
            msgspec.structs.replace(
                each, expected=msgspec.structs.replace(each.expected, value=each.expected.value + KELVIN)
            )
            for each in observations
        ]
        matches += [
            msgspec.structs.replace(
                each,
                value=each.value - KELVIN,
                offset=-KELVIN,
                score=round(each.score + _EVIDENCE_OF_KELVIN, 2),
            )
            for each in _match(held)
            if each.exact
        ]
    return sorted(matches, key=_rank)


def _match(observations: Sequence[Observation]) -> list[Match]:
    found: dict[_Place, list[_Seen]] = {}
    for observation in observations:
        for key, one in _matches(observation).items():
            found.setdefault(key, []).append(one)
    matches: list[Match] = []
    hints: dict[Table, _Layout] = {}
    for (table, register, kind, order, power), seen in found.items():
        if len(seen) < len(observations):
            continue
        layout_ = hints.get(table)
        if layout_ is None:
            layout_ = hints[table] = _Layout(observations[-1].snapshots[-1][table])
        expected = observations[-1].expected
        score = sum(each[0] for each in seen)
        score += math.log10(_TYPE_PRIOR[kind] * _ORDER_PRIOR[order] * _scale_prior(kind, power, expected))
        idle, hint = layout_.speaks_for(register, kind, order)
        score += hint
        raw = seen[-1][2]
        moves = any(each[3] for each in seen)
        matches.append(
            Match(
                table, register, kind, order, 10.0**-power if power < 0 else 1 / 10**power, raw,
                raw / 10**power, max(each[1] for each in seen), round(score, 2), moves, idle,
            )
        )  # fmt: skip
    return sorted(_joined(matches), key=_rank)


def _rank(match_: Match) -> tuple[float, int, int, str]:
    return (-match_.score, match_.register, KINDS.index(match_.kind), match_.order)


_Place: TypeAlias = tuple[Table, int, Kind, str, int]
"""With the type, the order, and the power of ten in the scale."""
_Seen: TypeAlias = tuple[float, float, Number, bool]
"""Evidence in digits, distance from the display, last raw value, whether it moved."""


def _matches(observation: Observation) -> dict[_Place, _Seen]:
    expected, snapshots = observation.expected, observation.snapshots
    found: dict[_Place, _Seen] = {}
    if not snapshots:
        return found
    for table, words in snapshots[-1].items():
        held = [words]
        held += [snapshot[table] for snapshot in snapshots[:-1] if table in snapshot]
        for first, run in runs(words):
            addresses = range(first, first + len(run))
            series = [run] + [
                [other.get(address, run[i]) for i, address in enumerate(addresses)] for other in held[1:]
            ]
            changed = [[other for other in series[1:] if other != run]]
            for kind in KINDS:
                for order in orders_of(kind):
                    now = decode(run, kind, order)
                    before = [decode(other, kind, order) for other in changed[0]]
                    for i, power in _near(now, before, expected):
                        value = now[i]
                        if value is None:
                            continue
                        history = [value, *(v for each in before if (v := each[i]) is not None)]
                        evidence, off = _evidence(
                            expected, history, kind, power, run[i : i + kind.registers], order
                        )
                        if off and kind in (Kind.BCD16, Kind.BCD32):
                            continue  # so rare that only the very digits speak for it
                        found[table, first + i, kind, order, power] = (
                            evidence, off, value, min(history) != max(history),
                        )  # fmt: skip
    return found


def _near(
    now: Sequence[Number | None], before: Sequence[Sequence[Number | None]], expected: Expected
) -> Iterable[tuple[int, int]]:
    """Places whose value is the expected one, give or take, times a power of ten."""
    wanted = expected.value
    half = expected.step * 0.5
    if wanted == 0:
        for i, value in enumerate(now):
            if value is not None and abs(value) < half:
                yield i, 0
        return
    log10 = math.log10
    columns = [now, *before]
    for i in range(len(now)):
        powers: set[int] = set()
        for column in columns:
            value = column[i]
            if not value or (value > 0) != (wanted > 0):
                continue
            try:
                exponent = log10(value / wanted)
            except (OverflowError, ValueError):
                continue
            power = round(exponent)
            if -3 <= power <= 4 and (
                abs(exponent - power) <= _LOG_FARTHEST or abs(value / 10**power - wanted) <= expected.step
            ):
                powers.add(power)
        for power in powers:
            yield i, power


def _evidence(
    expected: Expected, history: Sequence[Number], kind: Kind, power: int, words: Sequence[int], order: str
) -> tuple[float, float]:
    """Digits of evidence that this is no chance, and how far the registers stayed from the display."""
    unit = 10.0**power
    low, high = min(history) / unit, max(history) / unit
    wanted, half = expected.value, expected.step * 0.5
    distance = max(low - wanted, wanted - high, 0.0)
    spread = min((high - low) / 2, abs(wanted) * FARTHEST)
    slack = half * 1.0000001
    off = doubt = 0.0
    if distance > slack:
        off = distance
        slack = expected.step if distance <= expected.step else distance  # displays that cut off
        doubt = _INEXACT
    slack = max(slack, spread)
    if kind.is_float:
        # How many floats would have done as well, of all there are.
        mantissa = 24 if kind is Kind.F32 else 53
        ulp = 2.0 ** (math.frexp(wanted * unit or half * unit)[1] - mantissa)
        patterns = max(1.0, 2 * slack * unit / ulp)
        # Registers are seldom random: zeros and small numbers abound, and make tiny floats, never these.
        space, common = (2.0**32, 1.0) if kind is Kind.F32 else (2.0**64, 1.5)
        return math.log10(space / patterns) - common - doubt, off
    patterns = max(1.0, 2 * slack * unit)
    # Small numbers are far commoner than large ones: as often 1 to 9 as 1,000 to 9,999 (Benford's law).
    size = max(1.0, abs(wanted * unit))
    bits = min(16.0, math.log2(_LN_WORD * size))
    ordered = words if order in ("ABCD", "BADC") else words[::-1]
    # High words that are nothing but sign say nothing; others must be right too, though small ones are common.
    idle = (0, 0xFFFF) if kind.is_signed else (0,)
    if any(word not in idle for word in ordered[:-1]):
        bits = min(16.0 * kind.registers, math.log2(kind.registers * _LN_WORD * size))
    if kind in (Kind.BCD16, Kind.BCD32):
        bits -= 2.0
    if wanted == 0:
        return 0.0, off
    return bits * math.log10(2) - math.log10(patterns) - doubt, off


def _scale_prior(kind: Kind, power: int, expected: Expected) -> float:
    if kind.is_float:
        return 0.9 if power == 0 else 0.04 if abs(power) == 3 else 0.003
    finer = power - expected.decimals  # digits that the register has and the display has not
    if finer == 0:
        return 0.6
    if finer < 0:
        return 0.02 if power >= 0 else 0.005
    return (0.25, 0.2, 0.05)[finer - 1] if finer <= 3 else 0.01


class _Layout:
    """Whether the registers around a place are laid out as it would have them: two by two, high words idle."""

    def __init__(self, words: Words) -> None:
        self._words = words

    def speaks_for(self, register: int, kind: Kind, order: str) -> tuple[int, float]:
        """How many of its words are idle, and the digits of evidence in that."""
        if kind.registers == 1 or kind.is_float:
            return 0, 0.0
        size = kind.registers
        high = range(size - 1) if order in ("ABCD", "BADC") else range(1, size)
        low = size - 1 if order in ("ABCD", "BADC") else 0
        idle_words = (0, 0xFFFF) if kind.is_signed else (0,)
        alike = others = 0
        for step in (-4, -3, -2, -1, 1, 2, 3, 4):
            at = register + step * size
            group = [self._words.get(at + i) for i in range(size)]
            if None in group:
                continue
            others += 1
            alike += all(group[i] in idle_words for i in high) and bool(group[low])
        idle = sum(self._words.get(register + i) in idle_words for i in high)
        hint = _EVIDENCE_OF_IDLE * idle
        if idle == size - 1 and others >= 3 and alike >= 0.7 * others:
            hint += _EVIDENCE_OF_LAYOUT
        return idle, hint


def _joined(matches: Sequence[Match]) -> list[Match]:
    """Signed and unsigned that show the same become one: what they mean differs on another day only."""
    by_place: dict[tuple[Table, int, int, str, float], Match] = {}
    kept: list[Match] = []
    for each in sorted(matches, key=_rank):
        if each.kind.is_float or each.kind in (Kind.BCD16, Kind.BCD32):
            kept.append(each)
            continue
        key = (each.table, each.register, each.kind.registers, each.order, each.scale)
        first = by_place.get(key)
        if first is None:
            by_place[key] = each
        else:
            by_place[key] = msgspec.structs.replace(first, or_kind=each.kind)
    return [*kept, *by_place.values()]


def match_all(observations: Mapping[str, Sequence[Observation]]) -> dict[str, list[Match]]:
    """Several values off one display, by what they are called. A device keeps to one order and mostly one type: what
    serves many of them is better evidence for each."""
    found = {label: match(each) for label, each in observations.items()}
    if len(found) < 2:
        return found
    served: dict[_Way, dict[str, int]] = {}  # by way: label -> idle words
    for label, matches in found.items():
        for each in matches:
            if each.exact and each.score > 0:
                of_way = served.setdefault(_way(each), {})
                of_way[label] = max(of_way.get(label, 0), each.idle)
    told: dict[str, list[Match]] = {}
    for label, matches in found.items():
        weighed: list[Match] = []
        for each in matches:
            others = {name: idle for name, idle in served.get(_way(each), {}).items() if name != label}
            hint = _EVIDENCE_OF_OTHERS * len(others) + _EVIDENCE_OF_IDLE * sum(others.values())
            weighed.append(msgspec.structs.replace(each, score=round(each.score + min(hint, 4.0), 2)))
        told[label] = sorted(weighed, key=_rank)
    return told


_EVIDENCE_OF_OTHERS: Final = 0.7  #: digits: another value of this display stands there in the same way
_Way: TypeAlias = tuple[
    Table, str, int, bool
]  #: a temperature in Kelvin among others is laid out as they are


def _way(match_: Match) -> _Way:
    return match_.table, match_.order, match_.kind.registers, match_.kind.is_float


SURE: Final = 2.0  #: digits of evidence, after priors, from which a match is worth stopping a search for


_APART: Final = 0.5


def is_sure(matches: Sequence[Match]) -> bool:
    """Whether the best match stands out: shows the display's digits, and no other comes near."""
    if not matches or not matches[0].exact or matches[0].score < SURE:
        return False
    best = matches[0]
    rival = next((each for each in matches[1:] if not each.same_place(best)), None)
    return rival is None or best.score - rival.score >= _APART


def point_table(name: str, unit: str, match_: Match) -> dict[str, str | int | float]:
    """The match as a point of the configuration; only what is not the default."""
    kind = match_.kind.value
    table: dict[str, str | int | float] = {"name": name, "register": match_.register}
    table["type"] = kind.replace("bcd", "u")
    if kind.startswith("bcd"):
        table["encoding"] = "bcd"
    if match_.table is not Table.HOLDING:
        table["table"] = match_.table.value
    if match_.order != "ABCD":
        table["order"] = match_.order
    if match_.scale != 1.0:
        table["scale"] = match_.scale
    if match_.offset:
        table["offset"] = match_.offset
    if unit:
        table["unit"] = unit
    return table
