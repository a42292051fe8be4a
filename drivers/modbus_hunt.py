"""Which registers a device has, found by asking. Pure: it says what to ask next, and is told what came.

Rules:

1. What was asked for by range is read in the fewest requests; a refused block is halved until the holes stand alone,
   and first at even places: a device may refuse half of a 32-bit value.
2. Without a range, likely bases come first, then ever closer steps over all 65,536 addresses of every table; wherever
   something answers, its neighbourhood is read in both directions until it ends.
3. A stretch of registers that all hold the same (a device that answers 0 for what it does not have) is no map, and is
   not followed.
4. Some devices are silent about what they have not, instead of refusing it: a range that is not answered is halved
   like one that is refused, unless so many were silent in a row that there is nobody; and of the neighbourhood, where
   each silence costs a timeout, only the near half is asked for.
5. Nothing is asked twice. A table whose function the device does not know is left alone.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import msgspec

from drivers.modbus_plan import LAST_ADDRESS, MAX_REGISTERS, Table

_SPACE: Final = LAST_ADDRESS + 1


class Outcome(enum.Enum):
    """What a request met, beside registers."""

    REFUSED = "refused"  #: exceptions 2, 3, 4: not these addresses
    NO_FUNCTION = "no function"  #: exception 1: not this table
    SILENCE = "silence"
    TROUBLE = "trouble"  #: anything that says nothing about the addresses


class Ask(msgspec.Struct, frozen=True):
    table: Table
    first: int
    count: int

    @property
    def end(self) -> int:
        return self.first + self.count


_NOBODY: Final = (
    16  #: unanswered requests in a row: asking for the parts of a block would cost a timeout each
)


class Reader:
    """Reads given ranges, around holes. `words` is what was found."""

    def __init__(self, ranges: Iterable[Ask], *, longest: int = MAX_REGISTERS) -> None:
        self.words: dict[Table, dict[int, int]] = {}
        self.holes: dict[Table, set[int]] = {}  #: refused
        self.silent: dict[Table, set[int]] = {}  #: not answered
        self.silences = 0  #: in a row
        self._longest = longest
        self._queue: deque[Ask] = deque()
        self._odd: set[Ask] = set()
        for wanted in ranges:
            for first in range(wanted.first, wanted.end, longest):
                self._queue.append(Ask(wanted.table, first, min(longest, wanted.end - first)))

    @property
    def left(self) -> int:
        return len(self._queue)

    def next(self) -> Ask | None:
        return self._queue.popleft() if self._queue else None

    def told(self, ask: Ask, came: Sequence[int] | Outcome) -> None:
        self.silences = self.silences + 1 if came is Outcome.SILENCE else 0
        if not isinstance(came, Outcome):
            self.words.setdefault(ask.table, {}).update(zip(range(ask.first, ask.end), came, strict=True))
            return
        if came is Outcome.NO_FUNCTION:
            self._queue = deque(each for each in self._queue if each.table is not ask.table)
            self._hole(ask, self.holes)
        elif ask.count > 1 and _has_parts(came, self.silences):
            self._queue.extendleft(reversed(halves(ask)))
        else:
            self._hole(ask, self.silent if came is Outcome.SILENCE else self.holes)

    def _hole(self, ask: Ask, where: dict[Table, set[int]]) -> None:
        where.setdefault(ask.table, set()).update(range(ask.first, ask.end))


def _has_parts(came: Outcome, silences: int) -> bool:
    """Whether what was not given as a block may be given in parts."""
    return came is Outcome.REFUSED or (came is Outcome.SILENCE and silences <= _NOBODY)


def halves(ask: Ask) -> tuple[Ask, Ask]:
    """Two parts, cut where no 32-bit value that begins with the block is split."""
    cut = ask.count // 2
    if ask.count > 2:
        cut += cut % 2
    return Ask(ask.table, ask.first, cut), Ask(ask.table, ask.first + cut, ask.count - cut)


#: Where makers begin their maps: the start, round numbers in both counts, SunSpec's 40000 and 50000, and the "40001"
#: of manuals taken at its word.
_BASES: Final = (
    0, 1, 2, 100, 1000, 4096, 256, 512, 40000, 30000, 2000, 3000, 5000, 8192, 300, 200, 400, 500, 50, 10, 20,
    40001, 30001, 10000, 20000, 50000, 60000, 768, 1024, 2048, 12288, 16384, 20480, 24576, 28672, 32768,
    36864, 40960, 45056, 49152,
    53248, 57344, 61440, 4000, 6000, 7000, 8000, 9000, 600, 700, 800, 900, 1280, 1536, 1792, 1100, 1200, 1500,
    40069, 40100,
)  # fmt: skip
_STEPS: Final = (256, 128, 64, 32, 16, 8, 4, 2, 1)
_LOW: Final = 4096
_LOW_STEP: Final = 8
_BEYOND: Final = 12  #: addresses after the end of a stretch that are tried: maps have small gaps
_BLOCK: Final = 32  #: a stretch is followed in blocks so long at first; what answers is asked for more


class Hunt:
    """Searches whole tables for registers. `words` is what was found so far; leave it as soon as that is enough."""

    def __init__(
        self, tables: Sequence[Table], *, longest: int = MAX_REGISTERS, finest_step: int = 4
    ) -> None:
        self.words: dict[Table, dict[int, int]] = {table: {} for table in tables}
        self.asked = 0
        self.silences = 0  #: in a row
        self._tables = list(tables)
        self._longest = longest
        self._known: dict[Table, bytearray] = {
            table: bytearray(_SPACE) for table in tables
        }  #: 1: needs no asking
        self._finest_step = finest_step
        self._pairs = False
        self._points = self._all_points()
        self._follow: deque[tuple[Ask, int]] = deque()  #: what to read around a find, and in which direction
        self._doing: tuple[Ask, int] | None = None

    def next(self) -> Ask | None:
        """What to ask, or `None`: everything was."""
        self.asked += 1
        while self._follow:
            ask, way = self._follow.popleft()
            trimmed = self._trimmed(ask, way)
            if trimmed is not None:
                self._doing = (trimmed, way)
                return trimmed
        for table, address in self._points:
            if table not in self._tables or self._known[table][address]:
                continue
            count = 2 if self._pairs and address < LAST_ADDRESS else 1
            ask = Ask(table, address, count)
            self._doing = (ask, 0)
            return ask
        self._doing = None
        self.asked -= 1
        return None

    @property
    def following(self) -> bool:
        """In the middle of a stretch, whose end is not seen yet."""
        return bool(self._follow)

    def left(self) -> int:
        """An upper bound of the requests that are left."""
        points = sum(_SPACE - sum(known) for table, known in self._known.items() if table in self._tables)
        return points // self._finest_step + len(self._follow)

    def told(self, ask: Ask, came: Sequence[int] | Outcome) -> None:
        way = self._doing[1] if self._doing and self._doing[0] == ask else 0
        if not isinstance(came, Outcome):
            self.silences = 0
            self._found(ask, came, way)
            return
        self.silences = self.silences + 1 if came is Outcome.SILENCE else 0
        if came is Outcome.NO_FUNCTION:
            self._tables = [table for table in self._tables if table is not ask.table]
            self._follow = deque(each for each in self._follow if each[0].table is not ask.table)
        elif ask.count == 1:
            self._known[ask.table][ask.first] = 1
            if way:
                self._beyond(ask, way)
        elif came is Outcome.REFUSED and way:
            near, far = halves(ask) if way > 0 else halves(ask)[::-1]
            self._follow.extendleft([(far, way), (near, way)])
        elif came is Outcome.SILENCE and way:
            self._follow.appendleft((halves(ask)[0 if way > 0 else 1], way))
        elif way:
            self._mark(ask)

    def _found(self, ask: Ask, came: Sequence[int], way: int) -> None:
        words = self.words[ask.table]
        words.update(zip(range(ask.first, ask.end), came, strict=True))
        self._mark(ask)
        if way == 0:
            if ask.first:
                self._reach(ask.table, ask.first, -1, _BLOCK)
            self._reach(ask.table, ask.end, 1, _BLOCK)
        elif ask.count >= _BLOCK and len(set(came)) == 1:
            return  # rule 3
        elif ask.count >= _BLOCK or not self._follow or self._follow[0][1] != way:
            self._reach(ask.table, ask.end if way > 0 else ask.first, way, min(self._longest, 2 * ask.count))

    def _reach(self, table: Table, edge: int, way: int, count: int) -> None:
        """Go on from `edge`."""
        first = edge if way > 0 else max(0, edge - count)
        count = min(count, _SPACE - first) if way > 0 else edge - first
        if count > 0:
            self._follow.appendleft((Ask(table, first, count), way))

    def _beyond(self, hole: Ask, way: int) -> None:
        """A register that is not there, at the edge of a stretch: look a little farther, one by one."""
        words, known = self.words[hole.table], self._known[hole.table]
        last = next((hole.first - way * i for i in range(1, _BEYOND) if hole.first - way * i in words), None)
        if last is None:
            return
        following = hole.first + way
        while 0 <= following < _SPACE and known[following]:
            following += way
        near = 0 <= following < _SPACE and abs(following - last) <= _BEYOND
        # Farther parts of the refused block may wait in the queue already.
        if near and not any(each.first <= following < each.end for each, _ in self._follow):
            self._follow.append((Ask(hole.table, following, 1), way))

    def _mark(self, ask: Ask) -> None:
        self._known[ask.table][ask.first : ask.end] = b"\x01" * ask.count

    def _trimmed(self, ask: Ask, way: int) -> Ask | None:
        """Without what is known at its ends, and up to the next known place."""
        if ask.table not in self._tables:
            return None
        known = self._known[ask.table]
        unknown = [i for i in range(ask.first, ask.end) if not known[i]]
        if not unknown:
            return None
        if way >= 0:
            first = unknown[0]
            end = next((i for i in range(first, ask.end) if known[i]), ask.end)
        else:
            end = unknown[-1] + 1
            first = next((i + 1 for i in range(end - 1, ask.first - 1, -1) if known[i]), ask.first)
        return Ask(ask.table, first, end - first)

    def _all_points(self) -> Iterator[tuple[Table, int]]:
        for self._pairs in (False, True):
            for address in _BASES:
                for table in self._tables:
                    yield table, address
            # Most maps lie low: look there closely before looking everywhere.
            for address in range(0, _LOW, _LOW_STEP):
                for table in self._tables:
                    yield table, address
            for step in _STEPS:
                if step < self._finest_step:
                    break
                for address in range(0, _SPACE, step):
                    for table in self._tables:
                        yield table, address
            if any(self.words.values()):
                return
            # Nothing at all: perhaps it refuses single registers. Ask again for two at a time.
            for known in self._known.values():
                known[:] = bytes(_SPACE)
