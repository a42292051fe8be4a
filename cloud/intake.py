"""From a door to the journal: authenticate, read the head, dedupe, append, and only then answer.

Rules:
1. An ack is made after the journal's commit, never before. Nothing is decoded beyond the head.
2. The envelope's gateway must be the one that the door authenticated; a batch that names another is refused.
3. Every batch gets an answer: an ack, a permanent nack with its code, or a nack that says when to try again.
4. What waits between the doors and the journal is bounded in batches and bytes; above that: try again. No gateway may
   take all of it, and each has its quota (`cloud.quotas`).
5. Everything is counted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

import msgspec
import zstandard

from cloud.fleet import Fleet
from cloud.intervals import coalesce
from cloud.intervals import count as count_of
from cloud.journal.contract import Entry, Journal, JournalError, JournalFull, Range
from cloud.metrics import Metrics
from cloud.quotas import Quotas
from config.failpoint import reached
from sync.wire import (
    COMPRESSION_ZSTD,
    MAX_FRAMES,
    MAX_POINTS,
    Ack,
    Head,
    Nack,
    Reply,
    WireError,
    claimed,
    open_head,
)

log = logging.getLogger(__name__)

RETRY_BUSY_S: Final = 1.0  #: too much under way: the next commits are milliseconds away
RETRY_VERSION_S: Final = (
    300.0  #: a gateway that was updated before its cloud keeps what it has and asks again
)
RETRY_BROKEN_S: Final = 30.0  #: the journal cannot be written: a human is on the way
_NOTHING: Final = (0, 0)
MAX_STATE_BYTES: Final = 64 * 1024
MAX_READINGS: Final = MAX_FRAMES * MAX_POINTS  #: and the journal's integers have 64 bits


class StateError(ValueError):
    """A heartbeat that is not what it should be."""


class StateStore(Protocol):
    """Where the latest heartbeat of each gateway is kept."""

    async def record_state(self, gateway: str, received_at_ns: int, state: bytes) -> None: ...


class Arrival(msgspec.Struct, frozen=True, gc=False):
    """One batch at a door."""

    gateway: str  #: `<tenant>/<gateway>`, as the door authenticated it
    payload: bytes
    at_s: float  #: monotonic


class Verdict(msgspec.Struct, frozen=True, gc=False):
    """The answer to one batch. `duplicate`: acknowledged, and nothing in it was new."""

    gateway: str
    reply: Reply
    duplicate: bool = False


class Intake:
    def __init__(
        self,
        journal: Journal,
        states: StateStore,
        metrics: Metrics,
        *,
        max_inflight: int = 4096,
        max_inflight_bytes: int = 128 * 1024 * 1024,
        quotas: Quotas | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._journal = journal
        self._states = states
        self._metrics = metrics
        self._max_inflight = max_inflight
        self._max_inflight_bytes = max_inflight_bytes
        self._clock_ns = clock_ns
        self._monotonic_s = monotonic_s
        self.inflight = 0
        self.inflight_bytes = 0
        self.quotas = quotas or Quotas()
        # One gateway may not take all of the window: whoever comes beside it finds room.
        self._share = max_inflight - max_inflight // 8
        self._share_bytes = max_inflight_bytes - max_inflight_bytes // 8
        self._under_way: dict[str, list[int]] = {}  # batches and bytes, by gateway
        self._fleet = Fleet()

    def heard_s(self, gateway: str) -> float | None:
        """When a batch of it last came, monotonic; None: not within `fleet.HEARD_WITHIN_S`."""
        return self._fleet.heard_s(gateway)

    async def accept(self, arrivals: Sequence[Arrival], *, door: str) -> list[Verdict]:
        """One answer per batch, in order, once what can be held is durably held. Never raises for what is in them."""
        now_ns, now_s = self._clock_ns(), self._monotonic_s()
        verdicts: list[Verdict | None] = [None] * len(arrivals)
        entries: list[Entry] = []
        places: list[int] = []
        size = total = 0
        for i, arrival in enumerate(arrivals):
            total += len(arrival.payload)
            judged = self._judge(arrival, now_ns, now_s, len(entries), size)
            if isinstance(judged, Entry):
                entries.append(judged)
                places.append(i)
                size += len(judged.payload)
            else:
                verdicts[i] = Verdict(arrival.gateway, judged)
        self._metrics.batches[door] += len(arrivals)
        self._metrics.bytes[door] += total
        if entries:
            for i, verdict in zip(places, await self._append(entries, size), strict=True):
                verdicts[i] = verdict
        done_s = self._monotonic_s()
        for arrival in arrivals:
            self._metrics.ack_latency.observe(done_s - arrival.at_s)
        return [verdict for verdict in verdicts if verdict is not None]

    def _judge(
        self, arrival: Arrival, now_ns: int, now_s: float, waiting: int, waiting_bytes: int
    ) -> Entry | Nack:
        """Decide by the head alone."""
        payload = arrival.payload
        try:
            head, start = open_head(payload)
            check_body(head, payload, start)
            if head.readings > MAX_READINGS:
                raise WireError("head", f"{head.readings} readings; a batch has at most {MAX_READINGS}")
        except WireError as err:
            return self._refuse(claimed(payload), err.code, str(err))
        if head.gateway != arrival.gateway:
            return self._refuse(
                (head.epoch, head.first, head.last),
                "identity",
                f"the envelope names another gateway than {arrival.gateway}, which sent it",
            )
        self._fleet.hear(arrival.gateway, now_s)
        own, own_bytes = self._under_way.get(arrival.gateway, _NOTHING)
        if (
            self.inflight + waiting >= self._max_inflight
            or self.inflight_bytes + waiting_bytes + len(payload) > self._max_inflight_bytes
            or own >= self._share
            or own_bytes + len(payload) > self._share_bytes
        ):
            self._metrics.retry["busy"] += 1
            return busy(head)
        wait_s = self.quotas.take(arrival.gateway, head.readings, len(payload), now_s)
        if wait_s > 0:
            self._metrics.retry["quota"] += 1
            self.quotas.refuse(arrival.gateway, now_s)
            return over_quota(head, wait_s)
        # A microsecond apart: where a gateway's clock cannot be true, scans are timed from the receipt
        # (`cloud.decode`), and InfluxDB keeps one of those that share a microsecond and the end of their seq.
        received_ns = now_ns + waiting * 1000
        return Entry(head.gateway, head.epoch, head.first, head.last, head.readings, received_ns, payload)

    def _refuse(self, claim: tuple[int, int, int], code: str, text: str) -> Nack:
        self._metrics.refused[code] += 1
        return Nack(*claim, code, text, RETRY_VERSION_S if code == "version" else None)

    async def _append(self, entries: list[Entry], size: int) -> list[Verdict]:
        self.inflight += len(entries)
        self.inflight_bytes += size
        own = self._count_in(entries)
        try:
            reached("intake.before_append")
            appended = await self._journal.append(entries)
        except JournalFull as err:
            # The text may name paths of this machine: gateways are told the remedy's effect only.
            verdicts = self._defer(entries, "full", "the cloud's journal is full", err.retry_after_s)
            return self._acknowledge_held(entries, verdicts, err.held)
        except JournalError:
            return self._defer(entries, "journal", "the cloud's journal cannot be written", RETRY_BROKEN_S)
        finally:
            self.inflight -= len(entries)
            self.inflight_bytes -= size
            self._count_out(own)
        cloud_ns, spread_s = self._clock_ns(), self._fleet.spread_s
        metrics = self._metrics
        verdicts = []
        reached("intake.after_append")
        for entry, held in zip(entries, appended, strict=True):
            frames = entry.last - entry.first + 1
            metrics.frames += frames
            if held.offset is None:
                metrics.duplicate_batches += 1
                metrics.duplicate_frames += frames
            else:
                metrics.readings += entry.readings
                metrics.duplicate_frames += frames - count_of(held.fresh)
            ack = Ack(entry.epoch, ((entry.first, entry.last),), cloud_ns, spread_s)
            verdicts.append(Verdict(entry.gateway, ack, held.offset is None))
        return verdicts

    def _count_in(self, entries: list[Entry]) -> dict[str, list[int]]:
        own: dict[str, list[int]] = {}
        for entry in entries:
            counts = own.setdefault(entry.gateway, [0, 0])
            counts[0] += 1
            counts[1] += len(entry.payload)
        for gateway, (n, size) in own.items():
            total = self._under_way.setdefault(gateway, [0, 0])
            total[0] += n
            total[1] += size
        return own

    def _count_out(self, own: dict[str, list[int]]) -> None:
        for gateway, (n, size) in own.items():
            total = self._under_way[gateway]
            total[0] -= n
            total[1] -= size
            if not total[0]:
                del self._under_way[gateway]

    def _acknowledge_held(
        self, entries: list[Entry], verdicts: list[Verdict], held: tuple[int, ...]
    ) -> list[Verdict]:
        """What a full journal holds already needs no room: its gateway may let go of it."""
        cloud_ns = self._clock_ns()
        metrics = self._metrics
        for i in held:
            entry = entries[i]
            frames = entry.last - entry.first + 1
            metrics.retry["full"] -= 1
            metrics.frames += frames
            metrics.duplicate_batches += 1
            metrics.duplicate_frames += frames
            ack = Ack(entry.epoch, ((entry.first, entry.last),), cloud_ns, self._fleet.spread_s)
            verdicts[i] = Verdict(entry.gateway, ack, True)
        return verdicts

    def _defer(self, entries: list[Entry], code: str, text: str, retry_after_s: float) -> list[Verdict]:
        self._metrics.retry[code] += len(entries)
        return [
            Verdict(e.gateway, Nack(e.epoch, e.first, e.last, code, text, retry_after_s)) for e in entries
        ]

    async def on_state(self, gateway: str, state: bytes, *, door: str) -> None:
        """Keep a heartbeat as the gateway's latest. Raises `StateError`, `JournalError`."""
        self._metrics.states[door] += 1
        try:
            if len(state) > MAX_STATE_BYTES:
                raise StateError(f"{len(state)} bytes; a heartbeat has at most {MAX_STATE_BYTES}")
            try:
                msgspec.json.decode(state, type=dict[str, msgspec.Raw])
                state.decode()
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
                raise StateError(f"a heartbeat must be one JSON object: {err}") from err
        except StateError:
            self._metrics.states_refused += 1
            raise
        await self._states.record_state(gateway, self._clock_ns(), state)


def check_body(head: Head, payload: bytes, start: int) -> None:
    """That the body is compressed as it claims and would grow to what the head says: a bomb is refused here, unopened.
    Raises `WireError`."""
    if payload[0] & 0x0F != COMPRESSION_ZSTD:
        if len(payload) - start != head.raw_bytes:
            raise WireError(
                "size", f"the body has {len(payload) - start} bytes, its head says {head.raw_bytes}"
            )
        return
    try:
        # The longest header of a zstd frame has 18 bytes (RFC 8878, 3.1.1.1).
        grown = zstandard.get_frame_parameters(payload[start : start + 18]).content_size
    except zstandard.ZstdError as err:
        raise WireError("compression", f"the body is not zstd: {err}") from err
    if grown != head.raw_bytes:
        raise WireError("size", f"the body grows to {grown} bytes, its head says {head.raw_bytes}")


def over_quota(head: Head, wait_s: float) -> Nack:
    return Nack(head.epoch, head.first, head.last, "quota", "more than this gateway may send", wait_s)


def busy(head: Head) -> Nack:
    return Nack(head.epoch, head.first, head.last, "busy", "too much is under way", RETRY_BUSY_S)


def merge(verdicts: Iterable[Verdict]) -> dict[str, list[Reply]]:
    """The fewest replies that say the same, by gateway: one ack per epoch with coalesced ranges, and every nack."""
    acks: dict[tuple[str, int], list[Range]] = {}
    latest: dict[tuple[str, int], Ack] = {}
    out: dict[str, list[Reply]] = {}
    for verdict in verdicts:
        reply = verdict.reply
        if isinstance(reply, Ack):
            key = (verdict.gateway, reply.epoch)
            acks.setdefault(key, []).extend(reply.ranges)
            latest[key] = reply
        else:
            out.setdefault(verdict.gateway, []).append(reply)
    for (gateway, epoch), ranges in acks.items():
        last = latest[gateway, epoch]
        out.setdefault(gateway, []).append(Ack(epoch, coalesce(ranges), last.cloud_ns, last.spread_s))
    return out
