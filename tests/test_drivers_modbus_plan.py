"""The planner: fewest requests, within limits, nothing split, nothing read that must not be."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivers.modbus_plan import (
    NETWORK,
    Block,
    Cost,
    Limits,
    Span,
    Table,
    cost_of,
    halves,
    plan,
    serial_cost,
    worth_replanning,
)

H = Table.HOLDING

spans_of = st.lists(
    st.builds(Span, st.sampled_from(list(Table)), st.integers(0, 300), st.integers(1, 4)), max_size=40
)
limits_of = st.builds(
    Limits,
    max_registers=st.integers(4, 125),
    max_bits=st.integers(4, 2000),
    max_gap=st.one_of(st.none(), st.integers(0, 40)),
)
costs = st.builds(Cost, st.floats(0.001, 0.1), st.floats(1e-6, 0.02))
SLOW = serial_cost(11 / 1200, 3.5 * 11 / 1200)


def test_a_hundred_adjacent_registers_are_one_request() -> None:
    assert plan([Span(H, i) for i in range(100)], Limits()) == (Block(H, 0, 100, tuple(range(100))),)


def test_fifty_points_over_120_registers_are_one_request() -> None:
    spans = [Span(H, i * 120 // 50, 2) for i in range(50)]
    assert len(plan(spans, Limits())) == 1


def test_points_of_all_types_in_one_table_merge_and_tables_do_not() -> None:
    spans = [Span(H, 0), Span(H, 1, 2), Span(H, 3, 4), Span(Table.INPUT, 7), Span(Table.COIL, 0)]
    assert [(b.table, b.first, b.count) for b in plan(spans, Limits())] == [
        (Table.COIL, 0, 1),
        (H, 0, 7),
        (Table.INPUT, 7, 1),
    ]


def test_a_hole_is_bridged_up_to_the_limit() -> None:
    spans = [Span(H, 0), Span(H, 11)]
    assert len(plan(spans, Limits(max_gap=10))) == 1
    assert len(plan(spans, Limits(max_gap=9))) == 2


def test_a_hole_to_avoid_is_not_bridged() -> None:
    spans = [Span(H, 0), Span(H, 5)]
    assert len(plan(spans, Limits(), avoid={Span(H, 3)})) == 2
    assert len(plan(spans, Limits(), avoid={Span(Table.INPUT, 3), Span(H, 6)})) == 1


def test_a_value_is_never_split_at_the_limit() -> None:
    spans = [Span(H, i * 4, 4) for i in range(40)]  # 125 is no multiple of 4
    assert [b.count for b in plan(spans, Limits())] == [76, 84]


def test_a_value_wider_than_a_request_is_refused() -> None:
    with pytest.raises(ValueError, match="4 addresses in one value, and one request may read 3"):
        plan([Span(H, 0, 4)], Limits(max_registers=3))


@given(spans_of, limits_of)
def test_each_value_is_in_one_block_and_each_block_is_within_limits(
    spans: list[Span], limits: Limits
) -> None:
    blocks = plan(spans, limits)
    assert sorted(i for block in blocks for i in block.members) == list(range(len(spans)))
    for block in blocks:
        assert block.count <= limits.longest(block.table)
        assert block.members == tuple(sorted(block.members))
        for i in block.members:
            assert spans[i].table is block.table
            assert block.first <= spans[i].first
            assert spans[i].end <= block.first + block.count
        covered = {a for i in block.members for a in range(spans[i].first, spans[i].end)}
        assert min(covered) == block.first
        assert max(covered) == block.first + block.count - 1
        holes = [
            len(list(run))
            for inside, run in itertools.groupby(
                range(block.first, block.first + block.count), covered.__contains__
            )
            if not inside
        ]
        assert max(holes, default=0) <= limits.widest(block.table)


def partitions(items: list[Span]) -> Iterator[list[list[Span]]]:
    """Every way to share them out to requests."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for others in partitions(rest):
        yield [[first], *others]
        for i, group in enumerate(others):
            yield [*others[:i], [first, *group], *others[i + 1 :]]


@given(
    st.lists(st.builds(Span, st.just(H), st.integers(0, 30), st.integers(1, 3)), min_size=1, max_size=7),
    st.integers(3, 12),
    st.lists(st.builds(Span, st.just(H), st.integers(0, 30), st.integers(1, 3)), max_size=2),
    costs,
)
@settings(max_examples=200, deadline=None)
def test_no_other_way_is_cheaper(spans: list[Span], longest: int, forbidden: list[Span], cost: Cost) -> None:
    """Against every way to share the values out to requests, neighbours or not."""
    limits = Limits(max_registers=longest, forbidden=tuple(forbidden))
    spans = [span for span in spans if limits.forbids(span) is None]

    def price(group: list[Span]) -> float:
        first, end = min(s.first for s in group), max(s.end for s in group)
        if end - first > longest or limits.forbids(Span(H, first, end - first)):
            return math.inf
        return cost.request_s + cost.register_s * (end - first)

    best = min(sum(map(price, groups)) for groups in partitions(spans))
    assert cost_of(plan(spans, limits, cost), cost) == pytest.approx(best)


@given(
    st.lists(st.builds(Span, st.just(H), st.integers(0, 30), st.integers(1, 3)), min_size=1, max_size=7),
    st.integers(3, 12),
    st.integers(0, 6),
)
def test_with_a_gap_of_ones_own_no_other_way_needs_fewer_requests(
    spans: list[Span], longest: int, gap: int
) -> None:
    """Against every way to cut the sorted spans into runs; registers cost next to nothing."""
    limits = Limits(max_registers=longest, max_gap=gap)
    ordered = sorted(spans, key=lambda s: (s.first, -s.count))

    def fits(run: list[Span]) -> bool:
        end = run[0].end
        for span in run[1:]:
            if span.first - end > gap:
                return False
            end = max(end, span.end)
        return end - run[0].first <= longest

    best = [0] + [len(spans)] * len(ordered)
    for upto in range(1, len(ordered) + 1):
        for start in range(upto):
            if fits(ordered[start:upto]):
                best[upto] = min(best[upto], best[start] + 1)
    assert len(plan(spans, limits, Cost(1.0, 1e-9))) == best[-1]


def test_a_hole_is_read_where_that_is_cheaper_than_another_request() -> None:
    spans = [Span(H, 0), Span(H, 40)]
    assert len(plan(spans, Limits(), NETWORK)) == 1  # a round trip buys hundreds of registers
    assert len(plan(spans, Limits(), SLOW)) == 2  # at 1200 baud 39 registers take 0.7 s, a request 0.2 s
    assert len(plan([Span(H, 0), Span(H, 9)], Limits(), SLOW)) == 1
    bits = [Span(Table.COIL, 0), Span(Table.COIL, 150)]
    assert len(plan(bits, Limits(), SLOW)) == 1  # sixteen bits cost what a register does


@pytest.mark.parametrize(("baud", "bits"), [(1200, 11), (9600, 10), (115200, 11)])
def test_the_estimate_of_a_serial_line_counts_its_characters(baud: int, bits: int) -> None:
    """Two frames carry 8 and 5 bytes beside the data; a register is two more (Modbus over serial line 1.02, 2.5.1)."""
    cost = serial_cost(bits / baud, 0.00175)
    assert cost.register_s == pytest.approx(2 * bits / baud)
    assert cost.request_s == pytest.approx(13 * bits / baud + 2 * 0.00175 + 0.01)
    assert serial_cost(bits / baud, 0.0, ascii_=True).register_s == pytest.approx(4 * bits / baud)


def test_only_a_line_that_costs_quite_otherwise_is_worth_a_new_plan() -> None:
    assert not worth_replanning(Cost(0.02, 0.001), Cost(0.03, 0.001))
    assert worth_replanning(Cost(0.02, 0.001), Cost(0.05, 0.001))
    assert worth_replanning(Cost(0.02, 0.001), Cost(0.008, 0.001))


def test_what_is_forbidden_is_not_read_along() -> None:
    limits = Limits(forbidden=(Span(H, 100, 11),))
    blocks = plan([Span(H, n) for n in (95, 99, 111, 120)], limits)
    assert [(b.first, b.count) for b in blocks] == [(95, 5), (111, 10)]
    assert len(plan([Span(Table.INPUT, n) for n in (99, 111)], limits)) == 1
    assert limits.forbids(Span(H, 99, 2)) == limits.forbidden[0]
    assert limits.forbids(Span(H, 99, 1)) is None


def test_a_block_ends_at_a_cut() -> None:
    spans = [Span(H, n) for n in range(10)]
    assert [(b.first, b.count) for b in plan(spans, Limits(), cuts={(H, 4)})] == [(0, 4), (4, 6)]
    assert len(plan(spans, Limits(), cuts={(Table.INPUT, 4), (H, 0), (H, 10)})) == 1


@given(spans_of, limits_of, costs, st.lists(st.integers(0, 300), max_size=4))
def test_no_block_goes_over_a_cut_or_reads_a_hole_to_avoid(
    spans: list[Span], limits: Limits, cost: Cost, marks: list[int]
) -> None:
    cuts = {(table, mark) for table in Table for mark in marks[:2]}
    avoid = {Span(table, mark, 2) for table in Table for mark in marks[2:]}
    for block in plan(spans, limits, cost, cuts=cuts, avoid=avoid):
        members = [spans[i] for i in block.members]
        covered = {a for span in members for a in range(span.first, span.end)}
        holes = set(range(block.first, block.first + block.count)) - covered
        assert not holes & {
            a for span in avoid if span.table is block.table for a in range(span.first, span.end)
        }
        for mark in marks[:2]:
            # A value that straddles the cut goes where it must; what begins after the cut is not joined to it.
            assert not (
                any(span.first < mark for span in members)
                and any(span.first >= mark for span in members)
                and not any(span.first < mark < span.end for span in members)
            )


@given(spans_of, limits_of)
def test_halving_loses_nothing_and_ends(spans: list[Span], limits: Limits) -> None:
    queue = list(plan(spans, limits))
    seen: list[int] = []
    for _ in range(4 * len(spans) + 1):
        if not queue:
            break
        block = queue.pop()
        try:
            lower, upper = halves(spans, limits, NETWORK, block)
        except ValueError:
            assert len({(spans[i].first, spans[i].count) for i in block.members}) == 1
            seen += block.members
            continue
        parts = [*lower, *upper]
        assert sorted(i for part in parts for i in part.members) == sorted(block.members)
        assert all(len(part.members) < len(block.members) for part in parts)
        queue += parts
    assert not queue
    assert sorted(seen) == list(range(len(spans)))


@pytest.mark.parametrize("table", [H, Table.COIL])
def test_ten_thousand_points_are_planned_quickly(table: Table) -> None:
    spans = [Span(table, (i * 7919) % 65000, 1 if table.of_bits else 2) for i in range(10_000)]
    begun = time.process_time()
    plan(spans, Limits(), SLOW)
    assert time.process_time() - begun < 1.0  # measured 0.05 s; the target is 0.1 s on a quiet machine
