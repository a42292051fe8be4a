"""The hourly account: what was received is in every sink, in its dead letters or still to come, or somebody is told.

Rules:
1. The counting is `Operator.verify`'s: it trusts no counter of a sink. The stores count, on connections of their own
   and in threads; the loop waits, and holds one number for each gateway and sink.
2. An account that does not balance is a warning that names gateway and sink at every check, and a gauge until the next.
3. A sink that cannot be asked keeps its last account; that it could not be asked is a gauge of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

if TYPE_CHECKING:
    from cloud.api.models import FrameAccount, SinkAccount, Verdict
    from cloud.registry import GapTally

log = logging.getLogger(__name__)


class Books(Protocol):
    """Who counts (`cloud.api.operator.Operator`)."""

    async def verify(self) -> Verdict: ...

    async def gap_tally(self) -> list[GapTally]: ...

    async def settle_missed(self, rows: Sequence[SinkAccount]) -> None:
        """Forget what was missed and is there by now."""


class Accounts(msgspec.Struct, frozen=True):
    """The last check."""

    checked_at_s: float = 0.0  #: Unix time; 0: not yet
    took_s: float = 0.0
    ok: bool = True  #: nothing missing, nothing doubled, everybody answered
    unasked: int = 0  #: sinks that could not be asked
    frames: tuple[FrameAccount, ...] = ()  #: received = journaled + duplicate, by gateway
    rows: tuple[SinkAccount, ...] = ()  #: in readings, by gateway and sink
    gaps: tuple[GapTally, ...] = ()  #: what gateways reported as lost, by reason and priority


NOT_YET: Final = Accounts()


class Accounting:
    """One per server; `check` is called by its scheduler, one at a time."""

    def __init__(self, books: Books, *, clock_s: Callable[[], float] = time.time) -> None:
        self._books = books
        self._clock_s = clock_s
        self.last = NOT_YET

    async def check(self) -> None:
        """Count, keep the result, warn of what does not balance. Raises what `verify` raises."""
        started_s = time.monotonic()
        verdict = await self._books.verify()
        answered = {row.sink for row in verdict.sinks}
        rows = [row for row in self.last.rows if row.sink not in answered] if verdict.trouble else []
        rows += verdict.sinks
        took_s = time.monotonic() - started_s
        await self._books.settle_missed(verdict.sinks)
        self.last = Accounts(
            self._clock_s(),
            took_s,
            verdict.ok,
            len(verdict.trouble),
            tuple(verdict.frames),
            tuple(rows),
            tuple(await self._books.gap_tally()),
        )
        for frames in verdict.frames:
            if frames.missing:
                log.warning(
                    "account of %s: %d frames never came, and the gateway holds nothing more: the first are %s",
                    frames.gateway,
                    frames.missing,
                    "; ".join(f"{h.first}..{h.last}" for h in frames.holes[:5]),
                )
        for row in verdict.sinks:
            if not row.ok:
                log.warning(
                    "account of %s in sink %s does not balance: %d journaled, %d stored, %d dead, %d pending, "
                    "%d expired: %d missing, %d doubled",
                    row.gateway, row.sink, row.journaled, row.stored, row.dead, row.pending, row.expired,
                    row.missing, row.doubled,
                )  # fmt: skip
        for text in verdict.trouble:
            log.info("account: a sink could not be asked: %s", text)
