"""Where readings end up, as the sink runner sees it.

The runner owns cursor, backoff, bisection and dead letters, once, for all sinks. A sink owns one thing: to write
records so that writing them again changes nothing.

A sink either settles every record it was given (accepted, or rejected with the reason), or raises:

    SinkError
    ├── RetryLater     the store is down, busy or full: the same call again, no sooner than `after_s`
    ├── SinkRefused    something among these records is refused and the store does not say what: the runner bisects
    ├── StoreChanged   the store is not as it was left (restored, emptied): close, open, resume from what it remembers
    └── SinkBroken     credentials or configuration: stop this sink, alarm, keep the journal

Every sink passes `tests/sink_conformance.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import msgspec

from cloud.journal.contract import Range
from drivers.contract import Reason, Value
from sync.wire import EventFrame, GapFrame, Layout


class ScanRecord(msgspec.Struct, frozen=True, gc=False):
    """One scan, decoded. `values` are what a person sees (scale and offset applied), in layout order."""

    offset: int  #: the journal's
    tenant: str
    gateway: str
    epoch: int
    seq: int
    layout: Layout
    layout_id: int
    taken_at_ns: int  #: UTC, ns since 1970, by the gateway's clock table
    clock_synchronized: bool
    received_at_ns: int
    values: Sequence[Value | None]
    reasons: dict[int, Reason]
    boot: int = 0  #: the gateway's number of its boot, within the epoch
    boot_ns: int = 0  #: its boot clock when taken; 0 where not told
    earliest_ns: int = 0  #: of an estimated time: no earlier than this; 0 where nothing says so
    latest_ns: int = 0  #: of an estimated time: no later than this; 0 where the time is no estimate


class GapRecord(msgspec.Struct, frozen=True):
    """A counted hole, reported by the gateway."""

    offset: int
    tenant: str
    gateway: str
    epoch: int
    seq: int  #: the seq of the report itself
    gap: GapFrame
    from_ns: int  #: UTC
    to_ns: int
    received_at_ns: int
    held: tuple[Range, ...] = ()  #: what of the gap's seqs the journal holds after all (an ack was lost)


class EventRecord(msgspec.Struct, frozen=True):
    """Something worth keeping that is not a reading."""

    offset: int
    tenant: str
    gateway: str
    epoch: int
    seq: int
    event: EventFrame
    at_ns: int
    received_at_ns: int


Record: TypeAlias = ScanRecord | GapRecord | EventRecord


class Rejection(msgspec.Struct, frozen=True):
    """One record refused for what it is. `points` empty means the whole record; else the rest of it is stored.
    `expired`: for nothing but its age, beyond what the store keeps: where an archive keeps it, that is counted and no
    dead letter is made of it."""

    index: int  #: into the records given
    reason: str
    points: tuple[int, ...] = ()
    expired: bool = False


class Settled(msgspec.Struct, frozen=True):
    """Every record given is stored, but for the rejected."""

    rejected: tuple[Rejection, ...] = ()


class Tally(msgspec.Struct):
    """What a store holds of one gateway, counted for the audit."""

    readings: int = 0
    repeated: int = 0  #: of these, how many have the identity (epoch, seq, point) of another
    by_epoch: dict[int, int] = {}  #: without the repeated; empty where the store does not keep the identity


class SinkError(Exception):
    """The root."""


class RetryLater(SinkError):
    def __init__(self, text: str, after_s: float | None = None) -> None:
        super().__init__(text)
        self.after_s = after_s  #: None: the runner's own backoff


class SinkRefused(SinkError):
    """Permanent for at least one of the records given."""


class StoreChanged(SinkError):
    """The runner opens the sink again, which tells where to resume."""


class SinkBroken(SinkError):
    """Stop and tell a human; the text says what to change."""


class Sink(Protocol):
    name: str  #: one of influxdb, mysql, archive, embedded
    max_records: int  #: per call; the runner gives fewer where the journal has fewer
    max_bytes: int  #: of batch bytes per call
    linger_s: float  #: the runner may wait this long to fill a call (0: at once)

    async def open(self) -> int | None:
        """Connect, create what is missing; called again after `close`. Returns the offset the store itself remembers,
        or None. The runner resumes from the lower of it and the journal's cursor, and no call crosses it: what lies
        between is given once more, in calls with an `upto_offset` up to it. Raises `RetryLater`, `SinkBroken`."""

    async def write(self, records: Sequence[Record], upto_offset: int) -> Settled:
        """Store these, and with them, where the store can, `upto_offset` in the same transaction. Writing the same
        records again changes nothing. Raises any `SinkError`; then nothing is known of what was stored.

        The same `upto_offset` may come with different records (a bisection, an entry too large for one call), and
        an empty `records` only moves the offset: what is new is told by (gateway, epoch, seq), never by it alone."""

    async def remove(self, records: Sequence[Record]) -> None:
        """Take away these records as `write` stored them, by identity and time: the same scans are written again at
        once, with a better time. What is not there is no error; nothing else is touched. Raises any `SinkError`."""

    async def maintain(self, now_ns: int) -> None:
        """Retention, partitions, compaction: called about hourly. Raises any `SinkError`."""

    async def close(self) -> None:
        """Release everything. Never raises; safe to call twice, or without `open`."""
