"""What was learnt of one Modbus unit: what it refuses, and where its requests may not go on. Pure: time is passed in.

Rules:

1. What is refused is not asked for again but for a trial: one request for that one value, first after a minute, then
   at intervals that double up to a day. Where one succeeds, all others are due at once: a device that was starting
   up refuses much that it has.
2. Where a request was refused for what lies between its values, a cut keeps later ones from going on over it.
3. It survives a restart (`remembered`, `recall`) and belongs to one unit on one line; what was learnt of another, or
   by a version that wrote it otherwise, is ignored.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from drivers.contract import Reason
from drivers.modbus_plan import Span, Table

FIRST_TRIAL_S: Final = 60.0
LAST_TRIAL_S: Final = 86_400.0
_MOST: Final = 1_000  #: of either that are remembered; what is beyond is found anew
_VERSION: Final = 1


class Refused(msgspec.Struct):
    """A value that is not asked for, and when it is tried again."""

    reason: Reason
    wait_s: float
    due_s: float


class _Kept(msgspec.Struct, frozen=True, array_like=True):
    version: int
    about: str
    refused: list[tuple[Table, int, int, int, float]]  #: table, first, count, reason, wait_s
    cuts: list[tuple[Table, int]]


class Learnt:
    """Of one unit. `about` tells it from all others."""

    def __init__(self, about: str) -> None:
        self.about = about
        self.refused: dict[Span, Refused] = {}
        self.cuts: set[tuple[Table, int]] = set()
        self._new = False

    def refuse(self, span: Span, reason: Reason, now_s: float) -> None:
        """The device does not give this value."""
        if span not in self.refused:
            self.refused[span] = Refused(reason, FIRST_TRIAL_S, now_s + FIRST_TRIAL_S)
            self._new = True

    def cut(self, table: Table, address: int) -> None:
        """No request goes on over here."""
        if (table, address) not in self.cuts:
            self.cuts.add((table, address))
            self._new = True

    def mend(self, cuts: Iterable[tuple[Table, int]]) -> None:
        """These cuts were made on the way to what has been found."""
        for cut in cuts:
            if cut in self.cuts:
                self.cuts.discard(cut)
                self._new = True

    def due(self, now_s: float, among: Iterable[Span]) -> Span | None:
        """The value whose trial is due for longest, if any is."""
        waiting = [
            (trial.due_s, span.table, span.first, span.count, span)
            for span in among
            if (trial := self.refused.get(span)) is not None and trial.due_s <= now_s
        ]
        return min(waiting)[-1] if waiting else None

    def failed(self, span: Span, now_s: float) -> None:
        """It is refused still."""
        trial = self.refused[span]
        trial.wait_s = min(2 * trial.wait_s, LAST_TRIAL_S)
        trial.due_s = now_s + trial.wait_s
        self._new = True

    def succeeded(self, span: Span, now_s: float) -> None:
        """The device gives it now."""
        del self.refused[span]
        for trial in self.refused.values():
            trial.due_s = min(trial.due_s, now_s)
        self._new = True

    def remembered(self) -> bytes | None:
        """What there is, if anything is new since the last call; at most 60 kB."""
        if not self._new:
            return None
        self._new = False
        refused = [
            (span.table, span.first, span.count, int(trial.reason), trial.wait_s)
            for span, trial in list(self.refused.items())[:_MOST]
        ]
        return msgspec.msgpack.encode(_Kept(_VERSION, self.about, refused, sorted(self.cuts)[:_MOST]))

    def recall(self, remembered: bytes, now_s: float) -> None:
        """What `remembered` gave. A trial is due after the first wait, however long the last one was: the process may
        have been down for longer. Never raises."""
        try:
            kept = msgspec.msgpack.decode(remembered, type=_Kept)
        except (msgspec.MsgspecError, ValueError):  # the latter for text that is not UTF-8
            return
        if kept.version != _VERSION or kept.about != self.about:
            return
        for table, first, count, reason, wait_s in kept.refused[:_MOST]:
            known = reason in Reason._value2member_map_
            if known and FIRST_TRIAL_S <= wait_s <= LAST_TRIAL_S and first >= 0 and count > 0:
                self.refused[Span(table, first, count)] = Refused(
                    Reason(reason), wait_s, now_s + FIRST_TRIAL_S
                )
        self.cuts.update(kept.cuts[:_MOST])
