"""Judges what was read: puts a reason on every value that cannot be taken as it is, and touches nothing else.

Rules:
1. Nothing is clamped, substituted, repeated or re-timed. A value that cannot be a value (NaN, an infinity, one that
   does not fit its point's type) becomes `None` with its reason; every other value is kept as the device sent it.
2. The driver's own reason wins; of ours the more serious: no value, then SENTINEL, NOT_IN_ENUM, RANGE, RATE, STUCK.
3. The rules are written in the unit a person sees and judged on raw values. Thresholds are found once, by bisection
   over the raw values themselves, so they agree with `engineering` to the last bit, also at a negative scale.
4. Columns first: each rule looks at all its points at once, and only a scan that fails one is looked at point by
   point. A point without rules costs nothing beyond the search for NaN and `None`.

Pure: no clock is read and nothing is logged. What it remembers (last value, when it last changed) is per device.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from operator import ge, itemgetter, le, sub
from typing import Final, TypeAlias, cast

from drivers.contract import ConfigError, Point, Quality, Reason, Scan, Value, ValueType, engineering

Column: TypeAlias = Sequence[Value | None]
Numbers: TypeAlias = Sequence[float]

_INTEGERS: Final[Mapping[ValueType, tuple[int, int]]] = {
    ValueType.BOOL: (0, 1),
    ValueType.I8: (-(2**7), 2**7 - 1),
    ValueType.U8: (0, 2**8 - 1),
    ValueType.I16: (-(2**15), 2**15 - 1),
    ValueType.U16: (0, 2**16 - 1),
    ValueType.I32: (-(2**31), 2**31 - 1),
    ValueType.U32: (0, 2**32 - 1),
    ValueType.I64: (-(2**63), 2**63 - 1),
    ValueType.U64: (0, 2**64 - 1),
}
_FLOATS: Final = frozenset({ValueType.F32, ValueType.F64})
_BITS: Final = frozenset({0, 1})
_SHARED: Final = (
    8  #: from this many points with one pair of thresholds on, min() and max() beat pairwise comparing
)
_MOST_PLANS: Final = (
    256  #: different selections of points that one device's messages carry; beyond, start afresh
)
_MOST_EQUAL: Final = (
    1024  #: raw values that may stand for one allowed value, before the scale is called a mistake
)


class ScanShapeError(ValueError):
    """The driver returned something that is not a scan of the points it was asked for: the driver's fault."""


# --- thresholds: from what a person writes to raw values ---


def _ordered(number: float) -> int:
    """A float as an integer that sorts alike (IEEE 754: the bits of positive floats already do)."""
    bits = cast(int, struct.unpack("<q", struct.pack("<d", number))[0])
    return bits if bits >= 0 else -(bits & 0x7FFF_FFFF_FFFF_FFFF)


def _from_ordered(key: int) -> float:
    bits = key if key >= 0 else -key | -(2**63)
    return cast(float, struct.unpack("<d", struct.pack("<q", bits))[0])


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The smallest integer of `low..high` for which `holds` (false, then true), else `high + 1`."""
    while low <= high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle - 1
        else:
            low = middle + 1
    return low


def raw_range(point: Point) -> tuple[float, float] | None:
    """The lowest and highest raw value that are in `valid_min..valid_max`, or `None` where there is no such rule.

    Exact: `low <= raw <= high` just where `valid_min <= engineering(raw) <= valid_max`. `engineering` never turns
    back (each of its steps rounds monotonically), so each bound is found by bisection. Raises `ConfigError` where
    no raw value at all is within.
    """
    if point.valid_min is None and point.valid_max is None:
        return None
    minimum = -math.inf if point.valid_min is None else point.valid_min
    maximum = math.inf if point.valid_max is None else point.valid_max
    if point.type in _INTEGERS:
        start, stop = _INTEGERS[point.type]
        number: Callable[[int], float] = int
    else:
        start, stop = _ordered(-math.inf), _ordered(math.inf)
        number = _from_ordered

    def seen(key: int) -> float:
        return engineering(number(key), point.scale, point.offset)

    if point.scale > 0:
        low = _first(start, stop, lambda key: seen(key) >= minimum)
        high = _first(start, stop, lambda key: seen(key) > maximum) - 1
    else:
        low = _first(start, stop, lambda key: seen(key) <= maximum)
        high = _first(start, stop, lambda key: seen(key) < minimum) - 1
    if low > high:
        raise ConfigError(
            f"point {point.name!r}: no {point.type.value} value is between valid_min {minimum:g} and valid_max "
            f"{maximum:g} after scale {point.scale:g} and offset {point.offset:g}; correct one of them"
        )
    return number(low), number(high)


def _single(number: float) -> float:
    """The nearest 32-bit float, or the number itself where there is none."""
    try:
        return cast(float, struct.unpack("<f", struct.pack("<f", number))[0])
    except OverflowError:
        return number


def raw_sentinels(point: Point) -> frozenset[float]:
    """The raw values that mean "not available". For a signed type the bit pattern may be given (0x8000 for -32768),
    and for `f32` the nearest 32-bit float is meant, since that is what the device can send."""
    bounds = _INTEGERS.get(point.type)
    found: set[float] = set()
    for number in point.not_available:
        if bounds is None:
            found.add(_single(number) if point.type is ValueType.F32 else number)
            continue
        low, high = bounds
        if number != int(number):
            raise ConfigError(
                f"point {point.name!r}: not_available {number!r} is no {point.type.value} value"
            )
        raw = int(number)
        if low < 0 and high < raw <= 2 * high + 1:  # the bit pattern of a negative number
            raw -= 2 * (high + 1)
        if not low <= raw <= high:
            raise ConfigError(
                f"point {point.name!r}: not_available {number!r} is no {point.type.value} value ({low} to {high})"
            )
        found.add(raw)
    return frozenset(found)


def raw_allowed(point: Point) -> frozenset[float] | None:
    """The raw values whose engineering value is one of `one_of`, or `None` where there is no such rule.

    Raises `ConfigError` for an allowed value that no raw value gives.
    """
    if point.one_of is None:
        return None
    found: set[float] = set()
    for number in point.one_of:
        matches = _raws_of(point, number)
        if not matches:
            raise ConfigError(
                f"point {point.name!r}: one_of has {number!r}, which no {point.type.value} value gives after scale "
                f"{point.scale:g} and offset {point.offset:g}"
            )
        found.update(matches)
    return frozenset(found)


def _raws_of(point: Point, number: float) -> list[float]:
    if point.type in _INTEGERS:
        start, stop = _INTEGERS[point.type]
        key_of: Callable[[int], float] = int
    else:
        start, stop = _ordered(-math.inf), _ordered(math.inf)
        key_of = _from_ordered

    def seen(key: int) -> float:
        return engineering(key_of(key), point.scale, point.offset)

    if point.scale > 0:
        key = _first(start, stop, lambda key: seen(key) >= number)
    else:
        key = _first(start, stop, lambda key: seen(key) <= number)
    raws: list[float] = []
    while key <= stop and seen(key) == number:
        raws.append(key_of(key))
        key += 1
        if len(raws) > _MOST_EQUAL:
            raise ConfigError(
                f"point {point.name!r}: more than {_MOST_EQUAL} raw values give {number!r}; scale {point.scale:g} is "
                f"too small beside offset {point.offset:g} for one_of to tell values apart"
            )
    if point.type in _FLOATS:
        # The device sends the float nearest to what was meant, and the scale rounds once more.
        guess = (number - point.offset) / point.scale
        raws.append(_single(guess) if point.type is ValueType.F32 else guess)
    return raws


def check_point(point: Point) -> None:
    """Refuse rules that can never be judged. Raises `ConfigError` naming the point, the key and the remedy."""
    for key in ("scale", "offset", "valid_min", "valid_max", "max_rate_per_s", "stuck_after_s"):
        number = cast("float | None", getattr(point, key))
        if number is not None and not math.isfinite(number):
            raise ConfigError(f"point {point.name!r}: {key} is {number}; give a finite number")
    if point.scale == 0:
        raise ConfigError(
            f"point {point.name!r}: scale is 0, which makes every value the same; leave it out for 1"
        )
    for key in ("max_rate_per_s", "stuck_after_s"):
        number = cast("float | None", getattr(point, key))
        if number is not None and number <= 0:
            raise ConfigError(f"point {point.name!r}: {key} is {number:g}; give more than 0, or leave it out")
    for key in ("not_available", "one_of"):
        numbers = cast("tuple[float, ...] | None", getattr(point, key)) or ()
        if not all(map(math.isfinite, numbers)):
            raise ConfigError(
                f"point {point.name!r}: {key} has a number that is not finite (NaN is bad by itself)"
            )
    if point.type is ValueType.STR:
        for key in ("valid_min", "valid_max", "max_rate_per_s", "stuck_after_s", "one_of"):
            if getattr(point, key) is not None:
                raise ConfigError(
                    f"point {point.name!r}: {key} is for numbers, and its type is str; remove it"
                )
        if point.not_available:
            raise ConfigError(
                f"point {point.name!r}: not_available is for numbers, and its type is str; remove it"
            )


# --- the compiled rules ---


def _picker(at: Sequence[int], width: int) -> Callable[[Column], Column]:
    """Picks the columns `at` out of a scan's values."""
    if len(at) == width:
        return _whole
    if len(at) == 1:
        only = at[0]
        return lambda values: (values[only],)
    return itemgetter(*at)


def _whole(values: Column) -> Column:
    return values


class _Marks:
    """What is remembered of the device's watched points, as columns: each one's last believable value, when it was
    seen, and since when it has been that value."""

    __slots__ = ("at_ns", "count", "last", "same_ns", "since_ns")

    def __init__(self, count: int) -> None:
        self.count = count
        self.last: Sequence[float | None] = [None] * count
        self.at_ns = [0] * count
        self.since_ns = [0] * count
        self.same_ns = 0  #: all were last seen at this instant (and `at_ns` is not kept); 0: see `at_ns`


class _Plan:
    """The rules for one order of points: the whole device, or the points that one message carries."""

    __slots__ = (
        "_allowed", "_bits", "_floats", "_history", "_limits", "_pairs", "_points", "_ranges", "_sentinels",
        "_shared", "width",
    )  # fmt: skip

    def __init__(self, points: Sequence[Point], slots: Mapping[str, int], marks: _Marks) -> None:
        """`slots` tells where the device's marks of a watched point stand, by its name."""
        width = len(points)
        self._points = tuple(points)
        self.width = width
        self._limits = [raw_range(p) for p in points]
        self._sentinels = [raw_sentinels(p) for p in points]
        self._allowed = [raw_allowed(p) for p in points]
        floats = [i for i, p in enumerate(points) if p.type in _FLOATS]
        bits = [i for i, p in enumerate(points) if p.type is ValueType.BOOL]
        self._floats = _picker(floats, width) if floats else None
        self._bits = _picker(bits, width) if bits else None
        # Membership rules: points that share one set are judged together.
        self._shared: list[tuple[Callable[[Column], Column], frozenset[float], bool]] = []
        for sets, inside in ((self._sentinels, False), (self._allowed, True)):
            by_set: dict[frozenset[float], list[int]] = {}
            for i, found in enumerate(sets):
                if found:
                    by_set.setdefault(found, []).append(i)
            self._shared += [(_picker(at, width), found, inside) for found, at in by_set.items()]
        # Ranges: many points with the same thresholds by min() and max(), the others pairwise.
        by_limits: dict[tuple[float, float], list[int]] = {}
        for i, limits in enumerate(self._limits):
            if limits is not None:
                by_limits.setdefault(limits, []).append(i)
        self._ranges = [
            (_picker(at, width), low, high) for (low, high), at in by_limits.items() if len(at) >= _SHARED
        ]
        rest = sorted(i for at in by_limits.values() if len(at) < _SHARED for i in at)
        lows = tuple(limits[0] for i in rest if (limits := self._limits[i]) is not None)
        highs = tuple(limits[1] for i in rest if (limits := self._limits[i]) is not None)
        self._pairs = (_picker(rest, width), lows, highs) if rest else None
        watched = [i for i, p in enumerate(points) if p.name in slots]
        self._history = _History(points, watched, slots, marks) if watched else None

    def apply(self, scan: Scan) -> Scan:
        values = scan.values
        if scan.reasons:
            if len(scan.reasons) == self.width and not any(r.has_value for r in scan.reasons.values()):
                return scan if values.count(None) == self.width else self.judge(scan)
            return self._remember(self.judge(scan))
        if None in values or not self._plausible(values):
            return self._remember(self.judge(scan))
        return self._remember(scan)

    def _plausible(self, values: Column) -> bool:
        """Whether every value passes the rules that need no past; False may mean only that it could not be told."""
        column: Numbers
        try:
            if self._floats is not None and not math.isfinite(sum(cast(Numbers, self._floats(values)))):
                return False
            if self._bits is not None and not _BITS.issuperset(cast(Numbers, self._bits(values))):
                return False
            for pick, members, inside in self._shared:
                column = cast(Numbers, pick(values))
                if not (members.issuperset(column) if inside else members.isdisjoint(column)):
                    return False
            for pick, low, high in self._ranges:
                column = cast(Numbers, pick(values))
                if min(column) < low or max(column) > high:
                    return False
            if self._pairs is not None:
                pick, lows, highs = self._pairs
                column = cast(Numbers, pick(values))
                return all(map(le, lows, column)) and all(map(ge, highs, column))
        except (TypeError, OverflowError):
            return False
        return True

    def judge(self, scan: Scan) -> Scan:
        """Every point by itself; the slow way, for a scan that has something wrong with it."""
        values = list(scan.values)
        reasons = {i: reason for i, reason in scan.reasons.items() if reason}
        for i, value in enumerate(values):
            reason = reasons.get(i)
            if reason is None:
                # The contract asks for a reason with every `None`; where there is none, the driver is at fault.
                reason = Reason.DRIVER if value is None else self._verdict(i, value)
                if reason is not None:
                    reasons[i] = reason
            elif value is not None and reason.has_value and _misfit(self._points[i].type, value) is not None:
                reason = reasons[i] = Reason.OVERFLOW
            if reason is not None and not reason.has_value:
                values[i] = None
        return Scan(scan.taken_at_ns, scan.points, tuple(values), reasons)

    def _verdict(self, i: int, value: Value) -> Reason | None:
        """What is wrong with this value, looked at alone."""
        reason = _misfit(self._points[i].type, value)
        if reason is not None or isinstance(value, str):
            return reason
        if value in self._sentinels[i]:
            return Reason.SENTINEL
        allowed, limits = self._allowed[i], self._limits[i]
        if allowed is not None and value not in allowed:
            return Reason.NOT_IN_ENUM
        if limits is not None and not limits[0] <= value <= limits[1]:
            return Reason.RANGE
        return None

    def _remember(self, scan: Scan) -> Scan:
        return scan if self._history is None else self._history.apply(scan)


def _misfit(kind: ValueType, value: Value) -> Reason | None:
    """Whether a value cannot be one of its type."""
    if kind is ValueType.STR:
        if not isinstance(value, str):
            return Reason.OVERFLOW
        try:
            value.encode()
        except UnicodeEncodeError:  # a lone surrogate: no text that can travel
            return Reason.DECODE
        return None
    if isinstance(value, str):
        return Reason.OVERFLOW
    if kind in _FLOATS:
        if isinstance(value, float) and not math.isfinite(value):
            return Reason.NAN if math.isnan(value) else Reason.INFINITE
        try:
            struct.pack("<f" if kind is ValueType.F32 else "<d", value)
        except (struct.error, OverflowError):
            return Reason.OVERFLOW
        return None
    if isinstance(value, float):
        if math.isnan(value):
            return Reason.NAN
        return Reason.INFINITE if math.isinf(value) else Reason.OVERFLOW
    low, high = _INTEGERS[kind]
    return None if low <= value <= high else Reason.OVERFLOW


class _History:
    """The rules that need a past: rate of change, and stuck. A value is compared with the last one that was
    believable by itself; a sentinel or an impossible value is no base to compare with."""

    __slots__ = ("_any_rate", "_any_stuck", "_at", "_marks", "_pick", "_rates", "_slots", "_stuck", "_whole")

    def __init__(
        self, points: Sequence[Point], watched: Sequence[int], slots: Mapping[str, int], marks: _Marks
    ) -> None:
        chosen = [points[i] for i in watched]
        self._at = tuple(watched)
        self._slots = [slots[p.name] for p in chosen]
        self._whole = self._slots == list(range(marks.count))
        self._pick = _picker(watched, len(points))
        self._marks = marks
        # Raw units per nanosecond; a point without the rule may change without limit.
        self._rates = [p.max_rate_per_s / abs(p.scale) if p.max_rate_per_s else math.inf for p in chosen]
        self._any_rate = any(p.max_rate_per_s for p in chosen)
        self._stuck = [p.stuck_after_s * 1e9 if p.stuck_after_s else math.inf for p in chosen]
        self._any_stuck = any(p.stuck_after_s for p in chosen)

    def apply(self, scan: Scan) -> Scan:
        marks = self._marks
        now = scan.taken_at_ns
        if not (self._whole and marks.same_ns and now > marks.same_ns) or scan.reasons:
            return self._one_by_one(scan)
        column = cast("Sequence[float]", self._pick(scan.values))
        last = cast("Sequence[float]", marks.last)
        if self._any_rate:
            elapsed_s = (now - marks.same_ns) / 1e9
            allowed = [rate * elapsed_s for rate in self._rates]
            if not all(map(le, map(abs, map(sub, column, last)), allowed)):
                return self._one_by_one(scan)
        if self._any_stuck:
            since = [then if a == b else now for a, b, then in zip(column, last, marks.since_ns, strict=True)]
            if not all(map(le, [now - then for then in since], self._stuck)):
                return self._one_by_one(scan)
            marks.since_ns = since
        marks.last = column
        marks.same_ns = now
        return scan

    def _one_by_one(self, scan: Scan) -> Scan:
        marks, now = self._marks, scan.taken_at_ns
        reasons = dict(scan.reasons)
        last = list(marks.last)
        at_ns = [marks.same_ns] * marks.count if marks.same_ns else marks.at_ns
        since_ns = marks.since_ns
        for i, slot, rate, stuck in zip(self._at, self._slots, self._rates, self._stuck, strict=True):
            value, reason = scan.values[i], reasons.get(i, Reason.GOOD)
            if value is None or isinstance(value, str) or reason.quality is Quality.BAD:
                continue
            before, elapsed_ns = last[slot], now - at_ns[slot]
            if before is None or elapsed_ns < 0:
                since_ns[slot] = now
            else:
                if value != before:
                    since_ns[slot] = now
                if reason is Reason.GOOD:
                    # Two scans of one instant tell nothing about a rate.
                    if elapsed_ns > 0 and abs(value - before) > rate * (elapsed_ns / 1e9):
                        reasons[i] = Reason.RATE
                    elif now - since_ns[slot] > stuck:
                        reasons[i] = Reason.STUCK
            last[slot] = value
            at_ns[slot] = now
        marks.last, marks.at_ns = last, at_ns
        marks.same_ns = now if None not in last and all(then == now for then in at_ns) else 0
        if reasons == scan.reasons:
            return scan
        return Scan(now, scan.points, scan.values, reasons)


class Rules:
    """The compiled rules of one device, and what they remember of its values."""

    __slots__ = ("_marks", "_plan", "_plans", "_points", "_slots")

    def __init__(self, points: Sequence[Point]) -> None:
        """Raises `ConfigError` for a rule that no value could ever pass or fail."""
        for point in points:
            check_point(point)
        self._points = tuple(points)
        watched = [p.name for p in points if p.max_rate_per_s or p.stuck_after_s]
        self._slots = {name: slot for slot, name in enumerate(watched)}
        self._marks = _Marks(len(watched))
        self._plan = _Plan(self._points, self._slots, self._marks)
        self._plans: dict[tuple[str, ...], _Plan] = {}

    def apply(self, scan: Scan) -> Scan:
        """The scan with a reason on everything that is not good; the very same object where all is well.

        Raises `ScanShapeError` where values and points do not match.
        """
        plan = self._plan if scan.points is self._points else self._plan_for(scan.points)
        if len(scan.values) != plan.width:
            raise ScanShapeError(f"{len(scan.values)} values for {plan.width} points")
        return plan.apply(scan)

    def glance(self, scan: Scan) -> Scan:
        """`apply`, with nothing remembered: for a scan that is shown and not kept, so that a look changes no judgement
        of what is kept."""
        marks = self._marks
        before = list(marks.last), list(marks.at_ns), marks.same_ns, list(marks.since_ns)
        try:
            return self.apply(scan)
        finally:
            marks.last, marks.at_ns, marks.same_ns, marks.since_ns = before

    def examine(self, scan: Scan) -> Scan:
        """Look at every value by itself, also where no rule asks for it: for a scan that could not be encoded."""
        plan = self._plan if scan.points is self._points else self._plan_for(scan.points)
        return plan.judge(scan)

    def _plan_for(self, points: Sequence[Point]) -> _Plan:
        """The rules for the points that one message carries."""
        names = tuple(point.name for point in points)
        plan = self._plans.get(names)
        if plan is None:
            known = {point.name: point for point in self._points}
            strange = [name for name in names if name not in known]
            if strange or len(set(names)) != len(names) or not names:
                what = (
                    f"unknown {strange[0]!r}"
                    if strange
                    else "one point twice"
                    if names
                    else "no point at all"
                )
                raise ScanShapeError(f"the scan has {what}; the device has {', '.join(known) or 'no points'}")
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            plan = self._plans[names] = _Plan([known[n] for n in names], self._slots, self._marks)
        return plan


def compile_rules(points: Sequence[Point]) -> Rules:
    """The rules of a device with these points. Raises `ConfigError` naming the point and what to change."""
    return Rules(points)
