"""Sets of closed integer ranges, coalesced. Pure.

What the journal remembers of a gateway's epoch for ever: which seqs it has held. Frames come nearly in order, so a
set is mostly one range, and adding at its end costs nothing.

Rules: ranges never touch or overlap (4..6 and 7..9 are kept as 4..9); `add` tells exactly what was new.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import TypeAlias

Range: TypeAlias = tuple[int, int]
"""A closed range, first..last."""


class IntervalSet:
    """Mutable. `changes` is what happened since it was last taken, by the first of a range: its new last, or None
    where no range starts there any more; just what a table keyed by `first` needs."""

    __slots__ = ("_firsts", "_lasts", "changes")

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        """`ranges` must be sorted, and must neither touch nor overlap (what `ranges` gives)."""
        pairs = list(ranges)
        self._firsts = [first for first, _ in pairs]
        self._lasts = [last for _, last in pairs]
        if any(f > last for f, last in pairs) or any(
            self._firsts[i + 1] <= self._lasts[i] + 1 for i in range(len(pairs) - 1)
        ):
            raise ValueError("ranges must be sorted and must neither touch nor overlap")
        self.changes: dict[int, int | None] = {}

    def __len__(self) -> int:
        """How many ranges."""
        return len(self._firsts)

    def ranges(self) -> tuple[Range, ...]:
        return tuple(zip(self._firsts, self._lasts, strict=True))

    def add(self, first: int, last: int) -> tuple[Range, ...]:
        """Take first..last in. Returns the parts of it that were not there, in order."""
        if first > last:
            raise ValueError(f"{first}..{last} is not a range")
        firsts, lasts = self._firsts, self._lasts
        if not lasts or first > lasts[-1]:  # the usual case: the stream goes on
            if lasts and first == lasts[-1] + 1:
                lasts[-1] = last
                self.changes[firsts[-1]] = last
            else:
                firsts.append(first)
                lasts.append(last)
                self.changes[first] = last
            return ((first, last),)
        fresh = self.missing(first, last)
        if not fresh:
            return ()
        # Every range that touches first-1..last+1 becomes one.
        low = bisect_left(lasts, first - 1)
        high = bisect_right(firsts, last + 1)
        start = min(first, firsts[low]) if low < high else first
        end = max(last, lasts[high - 1]) if low < high else last
        for gone in firsts[low:high]:
            self.changes[gone] = None
        self.changes[start] = end
        firsts[low:high] = [start]
        lasts[low:high] = [end]
        return fresh

    def missing(self, first: int, last: int) -> tuple[Range, ...]:
        """The parts of first..last that are not in the set."""
        gaps: list[Range] = []
        at = first
        i = bisect_left(self._lasts, first)
        while i < len(self._firsts) and self._firsts[i] <= last:
            if self._firsts[i] > at:
                gaps.append((at, self._firsts[i] - 1))
            at = self._lasts[i] + 1
            i += 1
        if at <= last:
            gaps.append((at, last))
        return tuple(gaps)

    def held(self, first: int, last: int) -> tuple[Range, ...]:
        """The parts of first..last that are in the set."""
        parts: list[Range] = []
        i = bisect_left(self._lasts, first)
        while i < len(self._firsts) and self._firsts[i] <= last:
            parts.append((max(first, self._firsts[i]), min(last, self._lasts[i])))
            i += 1
        return tuple(parts)

    def take_changes(self) -> dict[int, int | None]:
        """The changes since the last call, and forget them."""
        changes, self.changes = self.changes, {}
        return changes


def coalesce(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Any ranges, in any order, as the fewest that cover the same."""
    out: list[Range] = []
    for first, last in sorted(ranges):
        if out and first <= out[-1][1] + 1:
            if last > out[-1][1]:
                out[-1] = (out[-1][0], last)
        else:
            out.append((first, last))
    return tuple(out)


def count(ranges: Iterable[Range]) -> int:
    """How many integers these ranges hold, if they do not overlap."""
    return sum(last - first + 1 for first, last in ranges)
