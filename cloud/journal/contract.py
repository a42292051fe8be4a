"""The durable log between intake and the sinks.

Rules:
1. `append` is durable when it returns (a power cut after it loses nothing), atomic for the whole call, and dedupes by
   interval of (gateway, epoch, seq) in the same transaction: what it already holds is never held twice.
2. Offsets grow by commit order and are never reused. An entry's bytes never change.
3. Each sink has its own cursor; `trim` removes only what every required sink is past. What an optional sink was not
   past is counted as missed, by gateway, in the same commit.
4. A full journal refuses (`JournalFull`): nothing is dropped to make room. What it holds already needs none, and is
   still told apart (`JournalFull.held`).

Every journal passes `tests/journal_conformance.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

import msgspec

Range: TypeAlias = tuple[int, int]
"""A closed range of seqs, first..last."""


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One batch to append, as it came."""

    gateway: str  #: `<tenant>/<gateway>`, authenticated
    epoch: int
    first: int
    last: int
    readings: int
    received_at_ns: int
    payload: bytes


class Stored(msgspec.Struct, frozen=True):
    """One batch as the journal holds it. Sinks take only the frames whose seq is in `fresh`."""

    offset: int
    gateway: str
    epoch: int
    first: int
    last: int
    readings: int
    received_at_ns: int
    fresh: tuple[Range, ...]
    payload: bytes


class Appended(msgspec.Struct, frozen=True):
    """What became of one entry: `fresh` is empty and `offset` None where all of it was already held."""

    offset: int | None
    fresh: tuple[Range, ...]


class GatewayCount(msgspec.Struct, frozen=True):
    """What one gateway has sent so far, in frames: received = stored + duplicate."""

    gateway: str
    batches: int
    frames_received: int
    frames_duplicate: int
    readings_stored: int


class JournalState(msgspec.Struct, frozen=True):
    first_offset: int  #: the oldest held, `last_offset + 1` where empty
    last_offset: int  #: 0 where nothing was ever appended
    size_bytes: int
    oldest_received_at_ns: int | None


class Missed(msgspec.Struct, frozen=True):
    """What was trimmed before a sink had it, until the sink has been given it again (`headgate-cloud replay`)."""

    sink: str
    gateway: str
    batches: int
    readings: int  #: at most
    first_offset: int
    last_offset: int
    from_ns: int  #: received at
    to_ns: int


class Hole(msgspec.Struct, frozen=True):
    """Seqs between others of the epoch that never came: still at the gateway, reported as a gap, or gone."""

    gateway: str
    epoch: int
    first: int
    last: int


class JournalError(Exception):
    """The root; the text names the remedy."""


class JournalFull(JournalError):
    """No room (the byte cap, or the disk): the door answers retry-after. `held` are the places, among the entries of
    the refused call, of those that were durably held before, whole: these may be acknowledged."""

    def __init__(self, text: str, retry_after_s: float, held: tuple[int, ...] = ()) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s
        self.held = held


class JournalBroken(JournalError):
    """The log cannot be written or read; a human is needed."""


class EntryDamaged(JournalError):
    """The next entry is not what was appended (its CRC disagrees): it is never returned. The reader reports it and
    commits past `offset`; the range is what the damaged row says of itself, and may be wrong too."""

    def __init__(self, text: str, *, offset: int, gateway: str, epoch: int, first: int, last: int) -> None:
        super().__init__(text)
        self.offset = offset
        self.gateway = gateway
        self.epoch = epoch
        self.first = first
        self.last = last


class Journal(Protocol):
    async def open(self) -> None:
        """Raises `JournalBroken`."""

    async def append(self, entries: Sequence[Entry]) -> list[Appended]:
        """All entries in one durable commit, in order. Raises `JournalFull`, `JournalBroken`; then none is held."""

    async def read(self, after: int, *, max_entries: int, max_bytes: int) -> list[Stored]:
        """The entries with offsets above `after`, oldest first, at least one where there is any. Raises
        `EntryDamaged` where the very next one is damaged (those before it are returned first)."""

    async def wait(self, after: int, timeout_s: float) -> bool:
        """Whether there is an entry above `after`, waiting up to `timeout_s` for one."""

    async def cursor(self, sink: str) -> int:
        """The offset up to which `sink` is done; 0 for a new sink."""

    async def commit(self, sink: str, offset: int, *, expired: Mapping[str, int] | None = None) -> None:
        """Durable when it returns. A cursor never moves back (a replay is a `reset`). `expired` are readings, by
        gateway, that the sink did not take because they are older than it keeps anything; counted with the cursor."""

    async def reset(self, sink: str, offset: int) -> None:
        """Move a cursor anywhere, for a replay."""

    async def trim(
        self, sinks: Sequence[str], *, keep_s: float, max_bytes: int, optional: Sequence[str] = ()
    ) -> int:
        """Remove entries that every one of `sinks` is past and that are older than `keep_s`, or, oldest first, until
        the log fits `max_bytes`. What one of `optional` was not past is recorded as missed, and its cursor moved, in
        the same commit. Returns how many were removed."""

    async def note_missed(self, sink: str, after: int, upto: int) -> None:
        """`sink` resumes behind the oldest entry held: what lay between `after` and `upto` it has missed."""

    async def missed(self) -> list[Missed]:
        """By sink and gateway."""

    async def forget_missed(self, sink: str, gateway: str) -> None:
        """The sink has it after all."""

    async def holds(self, gateway: str, epoch: int, first: int, last: int) -> tuple[Range, ...]:
        """Which parts of first..last were ever appended (also after trim)."""

    async def counts(self) -> list[GatewayCount]:
        """Per gateway, since the journal was made."""

    async def state(self) -> JournalState: ...

    async def close(self) -> None: ...
