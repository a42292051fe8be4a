"""What the operator's API answers, as plain records: the same for the server, its OpenAPI document and the client.

Times stand twice: for people (ISO 8601, UTC, to the nanosecond) and exact (`*_ns`, integer nanoseconds since 1970).
Fields are only ever added.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Value: TypeAlias = float | int | str | bool | None
Store: TypeAlias = Literal["embedded", "mysql", "archive"]


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A gateway's latest word about itself, as it came."""

    received_at: str
    received_at_ns: int
    state: dict[str, object]


@dataclass(frozen=True, slots=True)
class Gateway:
    """One gateway: admitted, seen, or both. Counters are since the journal was made."""

    gateway: str
    admitted: bool
    first_seen: str | None
    last_seen: str | None
    last_seen_ns: int | None
    batches: int
    frames_received: int
    frames_duplicate: int
    readings: int
    heartbeat: Heartbeat | None


@dataclass(frozen=True, slots=True)
class Point:
    """One point; a changed type or unit is a new version of it."""

    name: str
    type: str
    unit: str
    version: int


@dataclass(frozen=True, slots=True)
class Device:
    name: str
    driver: str
    measurement: str
    labels: dict[str, str]
    points: list[Point]


@dataclass(frozen=True, slots=True)
class Reading:
    """One reading. `value` is None where `quality` is bad and `reason` says why."""

    gateway: str
    device: str
    point: str
    unit: str
    type: str
    taken_at: str
    taken_at_ns: int
    value: Value
    quality: str
    reason: str | None
    clock_synchronized: bool
    received_at: str
    earliest: str | None = (
        None  #: where `taken_at` is an estimate: no earlier than this, as far as it is known
    )
    latest: str | None = None  #: ... and no later (from the archive; the other stores do not keep them)


@dataclass(frozen=True, slots=True)
class ReadingsPage:
    """`next` goes into `after` for the readings that follow; None: these are the last."""

    readings: list[Reading]
    next: str | None


@dataclass(frozen=True, slots=True)
class Gap:
    """A counted hole, as the gateway reported it; `lost_*` are less what arrived after all."""

    gateway: str
    device: str
    reason: str
    from_time: str
    to_time: str
    scans: int
    readings: int
    lost_scans: int
    lost_readings: int
    epoch: int
    first: int
    last: int
    received_at: str
    priority: str = ""  #: alarm, normal or bulk; "" where unknown or several
    frames: int = 0  #: how many of first..last are gone; 0: all


@dataclass(frozen=True, slots=True)
class Event:
    gateway: str
    device: str
    code: str
    text: str
    at: str
    at_ns: int


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """What a sink refused for what it is."""

    id: int
    sink: str
    gateway: str
    epoch: int
    first: int
    last: int
    readings: int
    reason: str
    tries: int
    received_at: str
    added_at: str


@dataclass(frozen=True, slots=True)
class DeadLetterContent:
    """A letter and what is in it, as far as it decodes."""

    letter: DeadLetter
    readings: list[Reading]
    other: list[str]  #: gaps, events and what does not decode, in words


@dataclass(frozen=True, slots=True)
class DeadLettersPage:
    letters: list[DeadLetter]
    next: int | None


@dataclass(frozen=True, slots=True)
class Selection:
    """Which dead letters: by id, or all of a sink (up to `limit` at a time, the oldest first)."""

    ids: list[int] = field(default_factory=list)
    sink: str | None = None
    limit: int = 1000


@dataclass(frozen=True, slots=True)
class Refusal:
    id: int
    reason: str


@dataclass(frozen=True, slots=True)
class Replay:
    """What became of the letters. The refused stay, with their new reason."""

    delivered: list[int]
    refused: list[Refusal]
    unknown: list[int]


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of one batch that was brought by hand: `outcome` is new, duplicate (held already), later (`text` says
    why, `retry_after_s` when) or refused."""

    gateway: str
    epoch: int
    first: int
    last: int
    readings: int
    outcome: Literal["new", "duplicate", "later", "refused"]
    text: str = ""
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class SinkReplayRequest:
    """What a sink is to be given once more: all that was received at from_ns <= t < to_ns (0: no end)."""

    sink: str
    from_ns: int
    to_ns: int = 0
    gateway: str | None = None
    dry_run: bool = False
    wait_s: float = 3000.0  #: for the sink to catch up; it goes on without


@dataclass(frozen=True, slots=True)
class SinkReplay:
    """What a sink was given, or with `dry_run` would be."""

    sink: str
    dry_run: bool
    journal_batches: int
    journal_readings: int  #: in these
    archive_readings: int  #: received before what the journal holds
    corrected_readings: int  #: whose time was an estimate and is known by now
    left: int  #: batches that the sink is not through yet
    took_s: float
    note: str = ""  #: what cannot be given


@dataclass(frozen=True, slots=True)
class Dropped:
    dropped: int


@dataclass(frozen=True, slots=True)
class Hole:
    """Seqs of an epoch that the journal never held."""

    epoch: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class FrameAccount:
    """received = journaled + duplicate, in frames."""

    gateway: str
    received: int
    duplicate: int
    journaled: int
    absent: int = (
        0  #: between others of their epoch, never came, reported by no gap: still at the gateway, or gone
    )
    missing: int = 0  #: the absent, where the gateway says that it holds nothing more
    holes: list[Hole] = field(default_factory=list)  #: the first of the absent


@dataclass(frozen=True, slots=True)
class SinkAccount:
    """journaled = stored + dead + pending + expired + missed + missing - doubled, in readings; give or take
    `guessed`."""

    gateway: str
    sink: str
    journaled: int
    stored: int
    dead: int  #: in the dead letters, and pushed out of them for want of room
    guessed: int  #: of the dead: in letters that do not decode, so nobody can count them
    pending: int  #: in the journal, the sink's cursor is not past it
    expired: int  #: no longer stored, by the sink's own retention
    missing: int
    doubled: int
    ok: bool
    missed: int = (
        0  #: trimmed from the journal before an optional or new sink had them; a replay gives them to it
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """The accounting identity per gateway and sink."""

    ok: bool
    frames: list[FrameAccount]
    sinks: list[SinkAccount]
    trouble: list[str]  #: sinks that could not be asked, and why
