"""From points to the fewest Modbus requests. Pure: plain values in, plain values out.

Rules:

1. A span (what one value occupies) is never split over two requests.
2. Requests are the fewest that the limits allow: points of all types in one table merge, and a hole of at most
   `max_gap` registers is read along, because a request costs more than a few registers.
3. What is in `avoid` is never read along as a hole.
4. A block knows which spans it carries. Values find their way by that alone, never by position in a stream of
   replies, so a block that fails takes no other block's value along.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Sequence

import msgspec

MAX_REGISTERS = 125  #: Modbus application protocol 1.1b3, 6.3: quantity of registers 1..0x7D
MAX_BITS = 2000  #: same, 6.1: quantity of coils 1..0x7D0
LAST_ADDRESS = 0xFFFF
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
    max_gap: int = 32  #: registers; in a table of bits, 16 times as many

    def of(self, table: Table) -> tuple[int, int]:
        """The longest block and the widest hole, in the table's own addresses."""
        return (self.max_bits, self.max_gap * 16) if table.of_bits else (self.max_registers, self.max_gap)


class Block(msgspec.Struct, frozen=True):
    """One request. `members` are indexes into the spans that were planned, ascending."""

    table: Table
    first: int
    count: int
    members: tuple[int, ...]


def plan(
    spans: Sequence[Span],
    limits: Limits,
    *,
    members: Iterable[int] | None = None,
    avoid: Collection[tuple[Table, int]] = (),
) -> tuple[Block, ...]:
    """The blocks that read `members` (all spans where unset). Raises `ValueError` for a span no request can hold."""
    chosen = sorted(
        range(len(spans)) if members is None else members,
        key=lambda i: (spans[i].table, spans[i].first, spans[i].count),
    )
    blocks: list[Block] = []
    inside: list[int] = []
    first = end = 0
    longest = widest = 0
    for i in chosen:
        span = spans[i]
        if not inside or spans[inside[0]].table is not span.table:
            longest, widest = limits.of(span.table)
        if span.count > longest:
            raise ValueError(f"{span.count} addresses in one value, and one request may read {longest}")
        joins = (
            bool(inside)
            and spans[inside[0]].table is span.table
            and span.first - end <= widest
            and max(end, span.end) - first <= longest
            and not (avoid and any((span.table, hole) in avoid for hole in range(end, span.first)))
        )
        if not joins:
            if inside:
                blocks.append(_block(spans, first, end, inside))
            inside, first, end = [], span.first, span.end
        inside.append(i)
        end = max(end, span.end)
    if inside:
        blocks.append(_block(spans, first, end, inside))
    return tuple(blocks)


def halves(spans: Sequence[Span], limits: Limits, block: Block) -> tuple[Block, ...]:
    """A refused block in two, by its spans. Raises `ValueError` if it holds only one address range to ask for."""
    ordered = sorted(block.members, key=lambda i: (spans[i].first, spans[i].count))
    ranges = sorted({(spans[i].first, spans[i].count) for i in ordered})
    if len(ranges) < 2:
        raise ValueError("a block of one value cannot be halved")
    pivot = ranges[len(ranges) // 2]
    lower = [i for i in ordered if (spans[i].first, spans[i].count) < pivot]
    upper = [i for i in ordered if (spans[i].first, spans[i].count) >= pivot]
    return plan(spans, limits, members=lower) + plan(spans, limits, members=upper)


def _block(spans: Sequence[Span], first: int, end: int, inside: Sequence[int]) -> Block:
    return Block(spans[inside[0]].table, first, end - first, tuple(sorted(inside)))
