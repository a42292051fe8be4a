"""Interval sets against plain sets of integers."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.intervals import IntervalSet, coalesce, count

RANGES = st.lists(
    st.tuples(st.integers(1, 60), st.integers(0, 12)).map(lambda p: (p[0], p[0] + p[1])), max_size=40
)


def numbers(ranges: tuple[tuple[int, int], ...]) -> set[int]:
    return {n for first, last in ranges for n in range(first, last + 1)}


@given(RANGES)
def test_add_tells_exactly_what_was_new(ranges: list[tuple[int, int]]) -> None:
    held, model = IntervalSet(), set[int]()
    for first, last in ranges:
        wanted = set(range(first, last + 1))
        assert numbers(held.missing(first, last)) == wanted - model
        assert numbers(held.held(first, last)) == wanted & model
        fresh = held.add(first, last)
        assert numbers(fresh) == wanted - model
        assert count(fresh) == len(wanted - model)
        model |= wanted
        assert numbers(held.ranges()) == model
        assert held.ranges() == coalesce(held.ranges())  # sorted, nothing touches


@given(RANGES, st.integers(1, 7))
def test_a_table_kept_by_the_changes_alone_is_the_same_set(ranges: list[tuple[int, int]], every: int) -> None:
    held, table = IntervalSet(), dict[int, int]()
    for i, (first, last) in enumerate(ranges):
        held.add(first, last)
        if i % every == 0:
            for start, end in held.take_changes().items():
                if end is None:
                    table.pop(start, None)
                else:
                    table[start] = end
    for start, end in held.take_changes().items():
        if end is None:
            table.pop(start, None)
        else:
            table[start] = end
    assert tuple(sorted(table.items())) == held.ranges()
    assert IntervalSet(sorted(table.items())).ranges() == held.ranges()


@given(RANGES)
def test_coalesce_covers_the_same_with_the_fewest(ranges: list[tuple[int, int]]) -> None:
    out = coalesce(ranges)
    assert numbers(out) == numbers(tuple(ranges))
    assert all(b[0] > a[1] + 1 for a, b in itertools.pairwise(out))


def test_a_stream_in_order_stays_one_range() -> None:
    held = IntervalSet()
    for n in range(1, 1000, 10):
        assert held.add(n, n + 9) == ((n, n + 9),)
    assert held.ranges() == ((1, 1000),)
    assert held.take_changes() == {1: 1000}
    assert held.take_changes() == {}


def test_what_is_no_range_is_refused() -> None:
    with pytest.raises(ValueError, match="not a range"):
        IntervalSet().add(5, 4)
    for ranges in ([(1, 2), (3, 4)], [(5, 6), (1, 2)], [(3, 2)]):
        with pytest.raises(ValueError, match="sorted"):
            IntervalSet(ranges)
