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
class Dropped:
    dropped: int


@dataclass(frozen=True, slots=True)
class FrameAccount:
    """received = journaled + duplicate, in frames."""

    gateway: str
    received: int
    duplicate: int
    journaled: int


@dataclass(frozen=True, slots=True)
class SinkAccount:
    """journaled = stored + dead + pending + expired + missing - doubled, in readings; give or take `guessed`."""

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


@dataclass(frozen=True, slots=True)
class Verdict:
    """The accounting identity per gateway and sink."""

    ok: bool
    frames: list[FrameAccount]
    sinks: list[SinkAccount]
    trouble: list[str]  #: sinks that could not be asked, and why
