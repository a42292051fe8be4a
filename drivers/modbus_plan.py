"""From points to the cheapest Modbus requests. Pure: plain values in, plain values out.

Rules:

1. A span (what one value occupies) is never split over two requests.
2. Points of all types in one table merge. A hole is read along where that costs less than another request would
   (`Cost`: the line's baud and turnaround, or its round trip); the plan that comes out is the cheapest there is, not
   merely a good one.
3. What must not be read (`Limits.forbidden`), what the device refused (`avoid`) and where a block was refused for
   what lies between its values (`cuts`) is never bridged.
4. A block knows which spans it carries. Values find their way by that alone, never by position in a stream of
   replies, so a block that fails takes no other block's value along.
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections import deque
from collections.abc import Collection, Iterable, Sequence

import msgspec

MAX_REGISTERS = 125  #: Modbus application protocol 1.1b3, 6.3: quantity of registers 1..0x7D
MAX_BITS = 2000  #: same, 6.1: quantity of coils 1..0x7D0
LAST_ADDRESS = 0xFFFF
_BITS = 16  #: of a register: a bit is this much cheaper to read along
_CHANGED = 2.0  #: a line that costs this many times more or less than was planned for is worth a new plan


class Table(enum.StrEnum):
    """The four tables of the Modbus data model."""

    HOLDING = "holding"
    INPUT = "input"
    COIL = "coil"
    DISCRETE = "discrete"

    @property
    def of_bits(self) -> bool:
        return self in (Table.COIL, Table.DISCRETE)


class Span(msgspec.Struct, frozen=True):
    """The addresses that one value occupies: registers, or bits in a table of bits."""

    table: Table
    first: int
    count: int = 1

    @property
    def end(self) -> int:
        return self.first + self.count


class Cost(msgspec.Struct, frozen=True):
    """What asking costs on a line, so that a hole can be weighed against another request."""

    request_s: float  #: one more request: its frames, the silence between them, the device's turnaround
    register_s: float  #: one more register in a request that is made anyway


NETWORK = Cost(0.005, 0.000_02)
"""Before anything was measured: a round trip in a plant's network to a small device, and what a register takes
there. Holes are bridged up to the longest block."""


def serial_cost(character_s: float, silence_s: float, *, ascii_: bool = False) -> Cost:
    """Before anything was measured, by baud alone. Two frames of RTU carry 8 and 5 bytes beside the data (Modbus over
    serial line 1.02, 2.5.1), each after its silence; ASCII doubles the bytes and has 3 more a frame (2.5.2.1)."""
    turnaround_s = 0.01  # of a common meter, until this line's is known
    byte_s = character_s * (2 if ascii_ else 1)
    frames_s = (6 + 1 + 3 + 1) * byte_s + 6 * character_s if ascii_ else 13 * byte_s
    return Cost(frames_s + 2 * silence_s + turnaround_s, 2 * byte_s)


def worth_replanning(planned: Cost, measured: Cost) -> bool:
    """Whether holes weigh so differently now that another plan may be cheaper."""
    before, now = planned.request_s / planned.register_s, measured.request_s / measured.register_s
    return not before / _CHANGED < now < before * _CHANGED


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one request may ask for."""

    max_registers: int = MAX_REGISTERS
    max_bits: int = MAX_BITS
    max_gap: int | None = None  #: registers (in a table of bits 16 times as many); unset: by cost alone
    forbidden: tuple[Span, ...] = ()  #: never read, nor read along

    def longest(self, table: Table) -> int:
        """The longest block, in the table's own addresses."""
        return self.max_bits if table.of_bits else self.max_registers

    def widest(self, table: Table) -> int:
        """The widest hole, in the table's own addresses."""
        if self.max_gap is None:
            return self.longest(table)
        return self.max_gap * _BITS if table.of_bits else self.max_gap

    def forbids(self, span: Span) -> Span | None:
        """The forbidden range that this span touches, if any."""
        for range_ in self.forbidden:
            if range_.table is span.table and range_.first < span.end and span.first < range_.end:
                return range_
        return None


class Block(msgspec.Struct, frozen=True):
    """One request. `members` are indexes into the spans that were planned, ascending."""

    table: Table
    first: int
    count: int
    members: tuple[int, ...]


def cost_of(blocks: Iterable[Block], cost: Cost) -> float:
    """Seconds on the line."""
    return sum(
        cost.request_s + cost.register_s * block.count / (_BITS if block.table.of_bits else 1)
        for block in blocks
    )


def plan(
    spans: Sequence[Span],
    limits: Limits,
    cost: Cost = NETWORK,
    *,
    members: Iterable[int] | None = None,
    avoid: Collection[Span] = (),
    cuts: Collection[tuple[Table, int]] = (),
) -> tuple[Block, ...]:
    """The blocks that read `members` (all spans where unset) at the least cost. Nothing in `avoid` is read along, and
    no block that begins before a cut goes beyond it. Raises `ValueError` for a span no request can hold."""
    blocks: list[Block] = []
    by_table: dict[Table, list[int]] = {}
    for i in range(len(spans)) if members is None else members:
        by_table.setdefault(spans[i].table, []).append(i)
    for table in sorted(by_table):
        chosen = by_table[table]
        longest = limits.longest(table)
        wide = max((spans[i] for i in chosen), key=lambda span: span.count)
        if wide.count > longest:
            raise ValueError(f"{wide.count} addresses in one value, and one request may read {longest}")
        fences = _Fences(
            [span for span in (*limits.forbidden, *avoid) if span.table is table],
            [address for of, address in cuts if of is table],
        )
        chosen.sort(key=lambda i: (spans[i].first, -spans[i].end))
        blocks += _of_table(spans, chosen, table, limits, cost, fences)
    return tuple(blocks)


def _of_table(
    spans: Sequence[Span],
    chosen: Sequence[int],
    table: Table,
    limits: Limits,
    cost: Cost,
    fences: _Fences,
) -> list[Block]:
    """One table. A span inside another rides along with it; the others stand in order of both ends, and some cheapest
    plan cuts that row into runs (were two blocks to cross, the values of one could move into the other at no cost).
    `best[k]` is what the first k cost; each next is found from a sliding minimum, so the whole is linear."""
    outer: list[Span] = []
    riders: list[list[int]] = []
    for i in chosen:
        span = spans[i]
        if outer and span.end <= outer[-1].end:
            riders[-1].append(i)
        else:
            outer.append(span)
            riders.append([i])
    longest, widest = limits.longest(table), limits.widest(table)
    each_s = cost.register_s / (_BITS if table.of_bits else 1)
    best = [0.0] * (len(outer) + 1)
    begins = [0] * (len(outer) + 1)
    starts: deque[tuple[float, int]] = (
        deque()
    )  # cost up to a run that begins here, less its first address's; rising
    earliest = 0
    for k, span in enumerate(outer):
        before = outer[k - 1].end if k else 0
        if k and (span.first - before > widest or fences.between(outer[k - 1], span)):
            earliest = k
            starts.clear()
        # On a tie the longer run stays: a request less.
        begun_s = best[k] - each_s * span.first
        while starts and starts[-1][0] > begun_s:
            starts.pop()
        starts.append((begun_s, k))
        while span.end - outer[earliest].first > longest:
            earliest += 1
        while starts[0][1] < earliest:
            starts.popleft()
        at_s, begins[k + 1] = starts[0]
        best[k + 1] = at_s + cost.request_s + each_s * span.end
    blocks: list[Block] = []
    upto = len(outer)
    while upto:
        begin = begins[upto]
        inside = sorted(i for k in range(begin, upto) for i in riders[k])
        first = outer[begin].first
        blocks.append(Block(table, first, outer[upto - 1].end - first, tuple(inside)))
        upto = begin
    return blocks[::-1]


def halves(
    spans: Sequence[Span], limits: Limits, cost: Cost, block: Block, cuts: Collection[tuple[Table, int]] = ()
) -> tuple[tuple[Block, ...], tuple[Block, ...]]:
    """A refused block in two, by its spans: the blocks below and above. Raises `ValueError` if it holds only one
    address range to ask for."""
    ordered = sorted(block.members, key=lambda i: (spans[i].first, spans[i].count))
    ranges = sorted({(spans[i].first, spans[i].count) for i in ordered})
    if len(ranges) < 2:
        raise ValueError("a block of one value cannot be halved")
    pivot = ranges[len(ranges) // 2]
    lower = [i for i in ordered if (spans[i].first, spans[i].count) < pivot]
    upper = [i for i in ordered if (spans[i].first, spans[i].count) >= pivot]
    return (
        plan(spans, limits, cost, members=lower, cuts=cuts),
        plan(spans, limits, cost, members=upper, cuts=cuts),
    )


class _Fences:
    """Where a block may not go on from one value to the next."""

    __slots__ = ("_begins", "_cuts", "_ends")

    def __init__(self, kept_out: Iterable[Span], cuts: Iterable[int]) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []
        for span in sorted(kept_out, key=lambda span: span.first):
            if self._ends and span.first <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], span.end)
            else:
                self._begins.append(span.first)
                self._ends.append(span.end)
        self._cuts = sorted(cuts)

    def between(self, left: Span, right: Span) -> bool:
        """Whether the hole between two neighbours has an address to keep out of, or a cut lies before the right one."""
        at = bisect_right(self._ends, left.end)  # the first range that ends beyond the left value
        if at < len(self._begins) and self._begins[at] < right.first and left.end < right.first:
            return True
        at = bisect_right(self._cuts, left.first)
        return at < len(self._cuts) and self._cuts[at] <= right.first
