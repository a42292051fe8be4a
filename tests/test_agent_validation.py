"""Validation: every value is right or its reason says why not, and nothing else is changed."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.validation import ScanShapeError, compile_rules, raw_range
from drivers.contract import ConfigError, Point, Reason, Scan, Value, ValueType, engineering

S = 1_000_000_000
INTEGERS = {
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


def judged(
    points: Sequence[Point], values: Sequence[Value | None], reasons: dict[int, Reason] | None = None
) -> Scan:
    return compile_rules(points).apply(Scan(S, tuple(points), values, reasons or {}))


def one(point: Point, value: Value) -> tuple[Value | None, Reason]:
    scan = judged([point], [value])
    return scan.values[0], scan.reasons.get(0, Reason.GOOD)


# --- range ---


def test_a_scan_that_passes_all_rules_is_the_very_same_object() -> None:
    points = tuple(Point(name=f"p{i}", type=ValueType.U16, valid_min=0, valid_max=100) for i in range(20))
    scan = Scan(S, points, tuple(range(20)))
    assert compile_rules(points).apply(scan) is scan


@pytest.mark.parametrize(
    ("scale", "offset", "raw", "reason"),
    [
        (0.1, 0.0, 234, Reason.GOOD),  # 23.4
        (0.1, 0.0, 500, Reason.GOOD),  # exactly 50.0
        (0.1, 0.0, 501, Reason.RANGE),
        (0.1, 0.0, -1, Reason.RANGE),
        (-0.1, 0.0, -500, Reason.GOOD),
        (-0.1, 0.0, -501, Reason.RANGE),
        (-0.1, 0.0, 1, Reason.RANGE),
        (1.0, -273.15, 274, Reason.GOOD),
        (1.0, -273.15, 273, Reason.RANGE),
    ],
)
def test_range_is_judged_in_the_unit_a_person_sees(
    scale: float, offset: float, raw: int, reason: Reason
) -> None:
    point = Point(name="t", type=ValueType.I16, scale=scale, offset=offset, valid_min=0.0, valid_max=50.0)
    assert one(point, raw) == (raw, reason)


@settings(max_examples=400)
@given(
    kind=st.sampled_from(sorted(ValueType)),
    scale=st.one_of(
        st.floats(-1e6, 1e6).filter(lambda x: abs(x) > 1e-6), st.sampled_from([0.1, 0.01, -0.1, 0.001])
    ),
    offset=st.one_of(st.just(0.0), st.floats(-1e6, 1e6)),
    bounds=st.tuples(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9)),
    data=st.data(),
)
def test_raw_thresholds_agree_with_the_engineering_value_to_the_last_bit(
    kind: ValueType, scale: float, offset: float, bounds: tuple[float, float], data: st.DataObject
) -> None:
    if kind is ValueType.STR:
        return
    minimum, maximum = sorted(bounds)
    point = Point(name="p", type=kind, scale=scale, offset=offset, valid_min=minimum, valid_max=maximum)
    near = [(edge - offset) / scale for edge in (minimum, maximum)]
    if kind in INTEGERS:
        low, high = INTEGERS[kind]
        close = [round(n) + d for n in near for d in (-1, 0, 1) if low <= round(n) + d <= high]
        raws: list[float] = [*data.draw(st.lists(st.integers(low, high), max_size=5)), *close]
    else:
        raws = [
            *data.draw(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=5)),
            *near,
            *(math.nextafter(n, math.inf) for n in near),
            *(math.nextafter(n, -math.inf) for n in near),
        ]
    try:
        limits = raw_range(point)
    except ConfigError:
        assert not any(minimum <= engineering(raw, scale, offset) <= maximum for raw in raws)
        return
    assert limits is not None
    for raw in raws:
        assert (limits[0] <= raw <= limits[1]) == (minimum <= engineering(raw, scale, offset) <= maximum), raw


def test_one_value_out_of_range_does_not_touch_its_neighbours() -> None:
    points = [Point(name=f"p{i}", type=ValueType.U16, valid_max=100) for i in range(12)]
    values = [5] * 12
    values[7] = 101
    scan = judged(points, values)
    assert list(scan.values) == values
    assert scan.reasons == {7: Reason.RANGE}


def test_points_with_their_own_limits_are_each_held_to_theirs() -> None:
    points = [Point(name=f"p{i}", type=ValueType.U16, valid_min=i, valid_max=i + 10) for i in range(5)]
    assert judged(points, [0, 1, 13, 3, 3]).reasons == {2: Reason.RANGE, 4: Reason.RANGE}


# --- values that are none ---


@pytest.mark.parametrize(
    ("value", "reason"), [(math.nan, Reason.NAN), (math.inf, Reason.INFINITE), (-math.inf, Reason.INFINITE)]
)
@pytest.mark.parametrize("kind", [ValueType.F32, ValueType.F64])
def test_a_number_that_is_none_has_no_value_and_its_reason(
    kind: ValueType, value: float, reason: Reason
) -> None:
    points = [Point(name=f"p{i}", type=kind) for i in range(3)]
    scan = judged(points, [1.5, value, 2.5])
    assert list(scan.values) == [1.5, None, 2.5]
    assert scan.reasons == {1: reason}


def test_huge_but_finite_floats_are_good() -> None:
    points = [Point(name=f"p{i}", type=ValueType.F64) for i in range(3)]
    scan = judged(points, [1.7e308, 1.7e308, 1.7e308])
    assert scan.values == (1.7e308,) * 3
    assert not scan.reasons


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (ValueType.U8, 256),
        (ValueType.U16, -1),
        (ValueType.I16, 40000),
        (ValueType.U64, 2**64),
        (ValueType.U16, 1.5),
        (ValueType.F32, 1e39),
        (ValueType.U16, "12"),
        (ValueType.STR, 12),
        (ValueType.BOOL, 2),
    ],
)
def test_a_value_that_does_not_fit_its_type_is_not_stored(kind: ValueType, value: Value) -> None:
    rules = compile_rules([point := Point(name="p", type=kind)])
    scan = rules.examine(Scan(S, (point,), (value,)))
    assert scan.values == (None,)
    assert scan.reasons == {0: Reason.OVERFLOW}


def test_a_boolean_is_never_anything_but_true_or_false() -> None:
    points = [Point(name=f"p{i}", type=ValueType.BOOL) for i in range(3)]
    scan = judged(points, [True, 2, 0])
    assert list(scan.values) == [True, None, 0]
    assert scan.reasons == {1: Reason.OVERFLOW}


def test_none_without_a_reason_is_the_drivers_fault() -> None:
    points = [Point(name="a", type=ValueType.U16), Point(name="b", type=ValueType.U16)]
    assert judged(points, [1, None]).reasons == {1: Reason.DRIVER}


# --- sentinels and enumerations ---


@pytest.mark.parametrize(
    ("kind", "code", "raw"),
    [
        (ValueType.I16, 0x7FFF, 32767),
        (ValueType.I16, 0x8000, -32768),  # the bit pattern, as data sheets give it
        (ValueType.I16, -32768, -32768),
        (ValueType.U16, 0xFFFF, 65535),
        (ValueType.U64, 2**64 - 1, 2**64 - 1),
        (ValueType.I64, 2**63, -(2**63)),
        (ValueType.F32, -999.9, struct.unpack("<f", struct.pack("<f", -999.9))[0]),
        (ValueType.F64, -999.9, -999.9),
    ],
)
def test_a_sentinel_is_shown_and_bad(kind: ValueType, code: float, raw: float) -> None:
    point = Point(name="p", type=kind, not_available=(code,), valid_min=-10, valid_max=10)
    assert one(point, raw) == (raw, Reason.SENTINEL)


def test_a_large_sentinel_does_not_swallow_its_neighbour() -> None:
    point = Point(name="p", type=ValueType.U64, not_available=(2**64 - 1,))
    assert one(point, 2**64 - 2) == (2**64 - 2, Reason.GOOD)


def test_only_the_listed_values_are_valid() -> None:
    point = Point(name="p", type=ValueType.U8, scale=0.1, one_of=(0.0, 0.1, 0.3))
    assert [one(point, raw)[1] for raw in (0, 1, 2, 3)] == [
        Reason.GOOD,
        Reason.GOOD,
        Reason.NOT_IN_ENUM,
        Reason.GOOD,
    ]


def test_a_float_means_the_nearest_that_the_device_can_send() -> None:
    point = Point(name="p", type=ValueType.F32, one_of=(0.1, 0.2))
    assert one(point, struct.unpack("<f", struct.pack("<f", 0.1))[0])[1] is Reason.GOOD
    assert one(point, 0.15)[1] is Reason.NOT_IN_ENUM


# --- precedence ---


def test_the_drivers_own_reason_wins() -> None:
    points = [
        Point(name="a", type=ValueType.U16, valid_max=10),
        Point(name="b", type=ValueType.U16, valid_max=10),
    ]
    scan = judged(points, [99, 99], {0: Reason.DEVICE_FAULT})
    assert scan.reasons == {0: Reason.DEVICE_FAULT, 1: Reason.RANGE}
    assert list(scan.values) == [99, 99]


def test_a_reason_that_allows_no_value_takes_it_away() -> None:
    assert judged([Point(name="a", type=ValueType.U16)], [5], {0: Reason.TIMEOUT}).values == (None,)


def test_a_scan_without_any_value_passes_untouched() -> None:
    points = tuple(Point(name=f"p{i}", valid_min=0, stuck_after_s=1) for i in range(3))
    scan = Scan(S, points, (None, None, None), dict.fromkeys(range(3), Reason.TIMEOUT))
    assert compile_rules(points).apply(scan) is scan


# --- rate of change and stuck ---


def over_time(
    point: Point, steps: Sequence[tuple[float, Value | None]], reason: Reason = Reason.TIMEOUT
) -> list[Reason]:
    rules, found = compile_rules([point]), []
    for at_s, value in steps:
        scan = Scan(round(at_s * S), (point,), (value,), {} if value is not None else {0: reason})
        found.append(rules.apply(scan).reasons.get(0, Reason.GOOD))
    return found


G, R, K, T = Reason.GOOD, Reason.RATE, Reason.STUCK, Reason.TIMEOUT


def test_a_change_faster_than_allowed_is_doubtful() -> None:
    point = Point(name="t", type=ValueType.I16, scale=0.1, max_rate_per_s=5.0)
    assert over_time(point, [(1, 0), (2, 50), (3, 101), (5, 1), (5.5, 26)]) == [G, G, R, G, G]


def test_the_rate_is_taken_over_the_time_without_values() -> None:
    point = Point(name="t", type=ValueType.I16, max_rate_per_s=5.0)
    assert over_time(point, [(1, 0), (2, None), (3, None), (4, 15)]) == [G, T, T, G]


def test_an_impossible_value_is_no_base_for_a_rate() -> None:
    point = Point(name="t", type=ValueType.U16, max_rate_per_s=5.0, valid_max=1000, not_available=(65535,))
    steps = [(1.0, 10), (2.0, 65535), (3.0, 12), (4.0, 2000), (5.0, 14)]
    assert over_time(point, steps) == [G, Reason.SENTINEL, G, Reason.RANGE, G]


def test_two_scans_of_one_instant_tell_nothing_about_a_rate() -> None:
    point = Point(name="t", type=ValueType.U16, max_rate_per_s=5.0)
    assert over_time(point, [(1, 10), (1, 900), (2, 900)]) == [G, G, G]


def test_a_value_that_does_not_change_is_stuck_after_its_time() -> None:
    point = Point(name="t", type=ValueType.U16, stuck_after_s=2.0)
    steps = [(1, 7), (2, 7), (3, 7), (3.5, 7), (4, 8), (6, 8), (6.1, 8)]
    assert over_time(point, steps) == [G, G, G, K, G, G, K]


def test_silence_does_not_make_a_stuck_value_fresh() -> None:
    point = Point(name="t", type=ValueType.U16, stuck_after_s=2.0)
    assert over_time(point, [(1, 7), (2, None), (4, 7)]) == [G, T, K]


@settings(max_examples=150)
@given(
    data=st.data(),
    width=st.integers(1, 4),
    steps=st.integers(1, 12),
)
def test_columns_find_what_a_point_by_point_model_finds(data: st.DataObject, width: int, steps: int) -> None:
    """The fast way against the rule's plain definition, with holes in the data."""
    points = tuple(
        Point(name=f"p{i}", type=ValueType.I16, max_rate_per_s=3.0, stuck_after_s=2.0) for i in range(width)
    )
    rules = compile_rules(points)
    last: dict[int, tuple[int, int]] = {}
    since: dict[int, int] = {}
    now = S
    for _ in range(steps):
        now += data.draw(st.sampled_from([S // 2, S, 2 * S]))
        values = data.draw(st.lists(st.one_of(st.none(), st.integers(-4, 4)), min_size=width, max_size=width))
        given_reasons = {i: Reason.CRC for i, v in enumerate(values) if v is None}
        want = dict(given_reasons)
        for i, value in enumerate(values):
            if value is None:
                continue
            if i in last:
                before, at = last[i]
                if value != before:
                    since[i] = now
                if abs(value - before) > 3.0 * (now - at) / S:
                    want[i] = Reason.RATE
                elif now - since[i] > 2 * S:
                    want[i] = Reason.STUCK
            else:
                since[i] = now
            last[i] = value, now
        assert dict(rules.apply(Scan(now, points, tuple(values), given_reasons)).reasons) == want


# --- messages that carry only some points ---


def test_a_message_with_some_of_the_points_is_judged_by_their_rules() -> None:
    points = [
        Point(name="a", type=ValueType.U16, valid_max=10),
        Point(name="b", type=ValueType.U16, max_rate_per_s=1.0),
        Point(name="c", type=ValueType.F32),
    ]
    rules = compile_rules(points)
    rules.apply(Scan(S, (points[1],), (5,)))
    scan = rules.apply(Scan(2 * S, (points[2], points[1]), (math.nan, 9)))
    assert scan.reasons == {0: Reason.NAN, 1: Reason.RATE}
    assert rules.apply(Scan(3 * S, (points[0],), (11,))).reasons == {0: Reason.RANGE}


@pytest.mark.parametrize("values", [(1,), (1, 2, 3), ()])
def test_values_that_do_not_match_the_points_are_refused_whole(values: tuple[int, ...]) -> None:
    points = (Point(name="a", type=ValueType.U16), Point(name="b", type=ValueType.U16))
    with pytest.raises(ScanShapeError, match="for 2 points"):
        compile_rules(points).apply(Scan(S, points, values))


def test_a_scan_of_an_unknown_point_is_refused() -> None:
    rules = compile_rules([Point(name="a")])
    with pytest.raises(ScanShapeError, match="unknown 'z'"):
        rules.apply(Scan(S, (Point(name="z"),), (1.0,)))


# --- rules that cannot be ---


@pytest.mark.parametrize(
    ("point", "text"),
    [
        (Point(name="p", scale=0.0), "scale is 0"),
        (Point(name="p", scale=math.nan), "finite"),
        (Point(name="p", max_rate_per_s=0.0), "more than 0"),
        (Point(name="p", stuck_after_s=-1.0), "more than 0"),
        (Point(name="p", type=ValueType.U16, valid_min=10, valid_max=5), "no u16 value is between"),
        (Point(name="p", type=ValueType.U8, valid_min=300), "no u8 value is between"),
        (Point(name="p", type=ValueType.U8, not_available=(256,)), "0 to 255"),
        (Point(name="p", type=ValueType.U8, not_available=(1.5,)), "no u8 value"),
        (Point(name="p", type=ValueType.U8, one_of=(0.5,)), "which no u8 value gives"),
        (Point(name="p", type=ValueType.STR, valid_min=0), "is for numbers"),
        (Point(name="p", not_available=(math.nan,)), "not finite"),
    ],
)
def test_a_rule_that_cannot_be_judged_is_refused_with_the_point_named(point: Point, text: str) -> None:
    with pytest.raises(ConfigError, match="'p'") as caught:
        compile_rules([point])
    assert text in str(caught.value)
