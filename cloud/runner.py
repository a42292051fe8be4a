"""Delivers the journal to one sink: cursor, backoff, bisection and dead letters, once for all sinks.

Rules:
1. The cursor moves only over what the sink has settled and the dead letters durably hold. A crash anywhere between
   delivers again, and a sink makes nothing of that.
2. A sink that remembers an offset of its own is resumed from the lower of the two: a store restored from a backup gets
   again what it lost, and refusals that a crash kept from the dead letters are met again. No call crosses the offset
   that the store remembers, so a store that knows its calls by offset knows this one too.
3. `RetryLater` means the same call again, after what the store asks for or full-jitter backoff, for ever.
   `SinkRefused` means bisection: one poison record among n is isolated within 2·log2(n)+1 tries, the rest goes on.
   `SinkBroken` stops this sink, says so, and opens it anew every minute.
4. Memory is bounded by the sink's `max_bytes` of batches and by the readings decoded at once, however slow the sink.
5. One runner never waits for another; a sink's calls never overlap.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Final, Literal, Protocol, TypeAlias

import msgspec

from cloud.clocks import Boot, Clocks, Force, widened
from cloud.dead_letters import DeadLetters, DeadLettersError, NewLetter
from cloud.decode import Decoder, Poison, alone, at_ns, frame_of, readings_in
from cloud.journal.contract import EntryDamaged, Journal, JournalError, Stored
from cloud.sinks.contract import (
    GapRecord,
    Record,
    Rejection,
    RetryLater,
    ScanRecord,
    Settled,
    Sink,
    SinkBroken,
    SinkError,
    SinkRefused,
    StoreChanged,
)
from cloud.skew import Skews
from config.failpoint import reached
from sync.wire import Body, Layout, WireError, layout_id, open_body, open_head, wall_clock

log = logging.getLogger(__name__)

MAX_READINGS: Final = 200_000  #: decoded in one call, about 10 MB of objects
LINGER_READINGS: Final = (
    400_000  #: the same for a sink that waits for company, in few and large calls; see test_cloud_memory
)
MAX_LETTERS: Final = 1_000  #: made before they are kept: about 1 MB
MAX_PIECE_BYTES: Final = 256 * 1024  #: of an uncompressed body, decoded at once
MAX_ENTRIES: Final = 4_096  #: batches in hand at once
WAIT_S: Final = 1.0  #: how long one look at an idle journal lasts; bounds how late a drain is noticed
RETRY_BASE_S: Final = 0.5
RETRY_CAP_S: Final = 30.0  #: a store that comes back is used within this time: live lag < 60 s
BROKEN_RETRY_S: Final = 60.0
MAINTAIN_S: Final = 3_600.0
REPLAY_WAIT_S: Final = 10.0  #: how long a replay waits for its turn
CLOSE_S: Final = 6.0  #: after its time to drain, how long a sink may take to let go (a SQL transaction: 5 s)
MAX_FAILURES: Final = 16  #: records that a sink may fail on in one call before it is the sink that is broken

Word: TypeAlias = Literal["starting", "running", "retrying", "broken", "stopped"]


class SinkState(msgspec.Struct, frozen=True):
    """One sink, for metrics and people. Counters are since the start of the process."""

    name: str
    word: Word
    position: int  #: the journal offset up to which all is settled
    lag_s: float  #: the age of the oldest entry not yet settled; 0 where there is none
    accepted_records: int
    accepted_readings: int
    rejected_records: int  #: to the dead letters, in whole or in part
    rejected_readings: int
    retries: int
    missed_entries: int  #: trimmed from the journal before this sink had them: an alarm
    error: str  #: the last one; "" once recovered
    expired_readings: int = 0  #: older than the sink keeps anything, and in the archive


class Replayed(msgspec.Struct, frozen=True):
    """What became of the letters that were to be replayed."""

    delivered: tuple[int, ...]
    refused: tuple[tuple[int, str], ...]  #: id and the new reason; the letter stays
    unknown: tuple[int, ...]  #: no such letter of this sink


class SentBack(msgspec.Struct, frozen=True):
    """What a sink is given once more, and what of it gets a better time."""

    start: int  #: everything after this offset ...
    upto: int  #: ... up to this one
    batches: int = 0  #: of those asked for
    readings: int = 0
    corrected_scans: int = 0
    corrected_readings: int = 0


class Guard(Protocol):
    """Decides which points of a scan may not become new series (`cloud.registry.SeriesGuard`)."""

    async def refused(self, record: ScanRecord) -> tuple[int, ...]:
        """Indices into the layout; empty: all may pass."""

    async def admit(self, record: ScanRecord) -> None:
        """A person replays this one: its points pass from now on."""

    @property
    def reason(self) -> str:
        """Why, for the dead letter."""


class _Part(msgspec.Struct):
    """One call in the making. `origins[i]` are the layout indices that record i still has; None: all."""

    records: list[Record]
    origins: list[tuple[int, ...] | None]
    letters: list[NewLetter]
    sources: dict[int, Stored]
    readings: int
    refused_readings: int
    upto: int


class _Opened:
    """The body of the entry that letters were last made from: refusals come in heaps from one batch."""

    def __init__(self) -> None:
        self._of: tuple[int, Body] | None = None

    def body(self, entry: Stored) -> Body:
        """Raises `WireError`."""
        if self._of is None or self._of[0] != entry.offset:
            self._of = (entry.offset, open_body(entry.payload)[1])
        return self._of[1]


class _NotTaken(SinkRefused):
    """A sink failed in a way that its contract does not know; told apart so that a broken sink does not empty the
    journal into the dead letters."""


class SinkRunner:
    """One sink's way through the journal. `run()` is one task; everything else may be called from others."""

    def __init__(
        self,
        sink: Sink,
        journal: Journal,
        dead_letters: DeadLetters,
        *,
        guard: Guard | None = None,
        skews: Skews | None = None,
        clocks: Clocks | None = None,
        archived: bool = False,
        clock_ns: Callable[[], int] = time.time_ns,
        rng: random.Random | None = None,
        retry_base_s: float = RETRY_BASE_S,
        retry_cap_s: float = RETRY_CAP_S,
        broken_retry_s: float = BROKEN_RETRY_S,
        maintain_s: float = MAINTAIN_S,
    ) -> None:
        self.sink = sink
        self._journal = journal
        self._dead_letters = dead_letters
        self._guard = guard
        self._archived = archived  # an archive keeps what is too old for this sink
        self._clock_ns = clock_ns
        self._rng = rng or random.Random()
        self._retry_base_s = retry_base_s
        self._retry_cap_s = retry_cap_s
        self._broken_retry_s = broken_retry_s
        self._maintain_s = maintain_s
        self._max_readings = LINGER_READINGS if sink.linger_s > 0 else MAX_READINGS
        self._clocks = clocks or Clocks()
        self._skews = skews or Skews()
        self._decoder = Decoder(self._skews, self._clocks)
        self._opened = _Opened()
        self._reduced: dict[tuple[int, tuple[int, ...]], tuple[Layout, int]] = {}
        self._turn = asyncio.Lock()  # a sink's calls never overlap
        self._draining = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._word: Word = "starting"
        self._error = ""
        self._down_since_ns = 0
        self._failures = 0  # records in a row on which the sink itself failed
        self._tries = 0
        self._position = 0
        self._generation = 0  # grows with every rewind: entries in hand are then of the past
        self._fence: int | None = None
        self._oldest_ns: int | None = None
        self._maintain_at = 0.0
        self._accepted_records = self._accepted_readings = 0
        self._rejected_records = self._rejected_readings = 0
        self._retries = self._missed = self._expired = 0

    # --- the story ---

    async def run(self) -> None:
        """Deliver until `drain`, or for ever."""
        self._task = asyncio.current_task()
        try:
            while True:
                try:
                    await self._open()
                    await self._follow()
                except (RetryLater, SinkRefused, StoreChanged, JournalError, DeadLettersError) as err:
                    await self._back_off(err)
                except SinkBroken as err:
                    self._down("broken", err)
                    await self._pause(self._broken_retry_s)
                except (
                    Exception
                ) as err:  # a bug in one sink must not end its runner: it is said, and tried again
                    log.exception("sink %s failed", self.sink.name)
                    self._down("broken", err)
                    await self._pause(self._broken_retry_s)
                if self._draining.is_set():
                    break
                await self.sink.close()
        finally:
            self._word = "stopped"
            await self.sink.close()

    async def drain(self, deadline_s: float) -> bool:
        """Finish what the journal holds and end; whether all of it was settled in time."""
        self._draining.set()
        await asyncio.sleep(0)  # a task made a moment ago begins
        task = self._task
        if task is None:
            return await self._caught_up()
        await asyncio.wait((task,), timeout=max(0.0, deadline_s))
        if not task.done():
            task.cancel()
            await asyncio.wait(
                (task,), timeout=CLOSE_S
            )  # a store that is silent may hold a thread for longer
        return await self._caught_up()

    async def replay(self, ids: Sequence[int]) -> Replayed:
        """Deliver these dead letters of this sink once more; one leaves only once the sink has taken it.

        Raises `RetryLater` or `SinkBroken` where the sink takes nothing now, `DeadLettersError`.
        """
        await self._take_turn()
        try:
            return await self._replay(ids)
        finally:
            self._turn.release()

    async def rewind(self, offset: int) -> None:
        """Deliver again everything after `offset` that the journal still holds. Writing it again changes nothing."""
        async with self._turn:
            await self._journal.reset(self.sink.name, offset)
            self._generation += 1
            self._position = offset
            self._fence = None

    async def send_back(
        self, start: int, *, gateway: str | None = None, to_ns: int = 2**63 - 1, dry_run: bool = False
    ) -> SentBack:
        """`rewind`, and the scans of `gateway` (None: all) received before `to_ns` get the best time that is known by
        now: those whose gateway's clock was synchronized only after they were sent. Their old rows are removed first.

        A crash at any point leaves either the old times or the new ones, and nothing twice: the cursor goes back before
        anything is removed, and the new times are in force only when all is. Raises `RetryLater`, `SinkBroken`,
        `JournalError`.
        """
        await self._take_turn()
        try:
            upto = max(self._position, self._clocks.rewound(self.sink.name))
            if dry_run:
                return await self._correct(start, upto, gateway, to_ns, dry_run=True)
            await self._clocks.flush()
            await self._clocks.set_rewound(self.sink.name, upto)
            await self._journal.reset(self.sink.name, start)
            self._generation += 1
            self._position = start
            self._fence = None
            return await self._correct(start, upto, gateway, to_ns, dry_run=False)
        finally:
            self._turn.release()

    async def give(self, old: Sequence[Record], new: Sequence[Record], forces: Mapping[Boot, Force]) -> None:
        """Records from elsewhere (the archive) to the sink: `old` are removed first, `forces` holds from then on.
        Raises `RetryLater`, `SinkBroken`, `SinkRefused`, `JournalError`."""
        await self._take_turn()
        try:
            for at in range(0, len(old), self.sink.max_records):
                await self.sink.remove(old[at : at + self.sink.max_records])
            for at in range(0, len(new), self.sink.max_records):
                await self.sink.write(new[at : at + self.sink.max_records], self._position)
            await self._clocks.put_in_force(self.sink.name, forces)
            self._decoder.forces = self._clocks.in_force(self.sink.name)
        finally:
            self._turn.release()

    @property
    def position(self) -> int:
        """The journal offset up to which all is settled."""
        return self._position

    async def state(self) -> SinkState:
        return SinkState(
            self.sink.name, self._word, self._position, await self._lag_s(), self._accepted_records,
            self._accepted_readings, self._rejected_records, self._rejected_readings, self._retries, self._missed,
            self._error, self._expired,
        )  # fmt: skip

    # --- opening ---

    async def _open(self) -> None:
        name = self.sink.name
        self._position = cursor = await self._journal.cursor(name)
        self._fence = None
        self._decoder.forces = self._clocks.in_force(name)
        remembered = await self.sink.open()
        state = await self._journal.state()
        if remembered is not None and remembered < cursor:
            log.warning("sink %s remembers offset %d, its cursor is %d: delivering again from there",
                        name, remembered, cursor)  # fmt: skip
            await self._journal.reset(name, remembered)
            self._position = remembered
        elif remembered is not None and cursor < remembered <= state.last_offset:
            self._fence = remembered
        elif remembered is not None and remembered > state.last_offset:
            log.error("sink %s remembers offset %d, the journal ends at %d: this is another journal, or what it held "
                      "last is lost (`headgate-cloud verify` names the holes); delivering all that it holds",
                      name, remembered, state.last_offset)  # fmt: skip
        if self._position < state.first_offset - 1:
            gone = state.first_offset - 1 - self._position
            self._missed += gone
            await self._journal.note_missed(name, self._position, state.first_offset - 1)
            log.error("sink %s: %d batches after offset %d were trimmed from the journal before it had them; "
                      "`headgate-cloud replay --sink %s` gives them to it from the archive",
                      name, gone, self._position, name)  # fmt: skip
        self._up()

    # --- following ---

    async def _follow(self) -> None:
        """Returns once drained."""
        if not self._maintain_at:
            self._maintain_at = time.monotonic() + self._maintain_s
        while True:
            if time.monotonic() >= self._maintain_at:
                await self._maintain()
            generation = self._generation
            entries = await self._gather()
            if not entries:
                if self._stopping():
                    return
                continue
            async with contextlib.aclosing(self._parts(entries)) as parts:
                async for part in parts:
                    async with self._turn:
                        if generation != self._generation:
                            break
                        await self._settle(part)
            self._oldest_ns = None

    async def _gather(self) -> list[Stored]:
        """The next entries, as many as one call takes; none where the journal is idle for a moment."""
        while True:
            try:
                entries = await self._journal.read(
                    self._position, max_entries=MAX_ENTRIES, max_bytes=self.sink.max_bytes
                )
                break
            except EntryDamaged as err:
                await self._pass_damaged(err)
        if not entries:
            self._oldest_ns = None
            if not self._draining.is_set():
                await self._journal.wait(self._position, WAIT_S)
            return entries
        self._oldest_ns = entries[0].received_at_ns
        if self.sink.linger_s > 0:
            await self._fill(entries)
        return entries

    async def _fill(self, entries: list[Stored]) -> None:
        """Wait for company: until the call is full, or the oldest has waited `linger_s`."""
        give_up_at = time.monotonic() + self.sink.linger_s
        size = sum(len(entry.payload) for entry in entries)
        readings = sum(entry.readings for entry in entries)
        while not self._draining.is_set() and size < self.sink.max_bytes and readings < self._max_readings:
            waited_s = (self._clock_ns() - entries[0].received_at_ns) / 1e9
            rest_s = min(self.sink.linger_s - waited_s, give_up_at - time.monotonic())
            if rest_s <= 0 or len(entries) >= MAX_ENTRIES:
                return
            if not await self._journal.wait(entries[-1].offset, min(rest_s, WAIT_S)):
                continue
            try:
                more = await self._journal.read(
                    entries[-1].offset, max_entries=MAX_ENTRIES, max_bytes=self.sink.max_bytes - size
                )
            except EntryDamaged:
                return  # these first; the damaged one is met again as the first of the next
            entries += more
            size += sum(len(entry.payload) for entry in more)
            readings += sum(entry.readings for entry in more)

    async def _parts(self, entries: Sequence[Stored]) -> AsyncGenerator[_Part, None]:
        """Entries as calls, each within the sink's limits; a cursor moves only over whole entries."""
        part = _part(self._position)
        for entry in entries:
            for piece in _pieces(entry):
                decoded = self._decoder.decode(piece)
                await asyncio.sleep(0)  # one batch may take milliseconds: the doors come first
                readings = sum(map(readings_in, decoded.records))
                full = (
                    len(part.records) + len(decoded.records) > self.sink.max_records
                    or part.readings + readings > self._max_readings
                    or (self._fence is not None and part.upto <= self._fence < entry.offset)
                )
                if full and part.sources:
                    yield part
                    part = _part(part.upto)
                part.sources[entry.offset] = entry
                part.letters += [_poisoned(self.sink.name, entry, one) for one in _joined(decoded.poison)]
                for record in decoded.records:
                    if len(part.records) >= self.sink.max_records or len(part.letters) >= MAX_LETTERS:
                        yield part
                        part = _part(part.upto)
                        part.sources[entry.offset] = entry
                    await self._include(part, entry, record)
            part.upto = entry.offset
        if part.sources:
            yield part

    async def _include(self, part: _Part, entry: Stored, record: Record) -> None:
        if isinstance(record, ScanRecord):
            part.readings += len(record.values)
            guard = self._guard
            if guard is not None and (refused := await guard.refused(record)):
                part.letters.append(self._letter(self._opened, entry, record, guard.reason, refused))
                part.refused_readings += len(refused)
                await asyncio.sleep(0)  # a letter is sealed anew, and a batch may be thousands of them
                kept = tuple(i for i in range(len(record.values)) if i not in set(refused))
                if kept:
                    part.records.append(self._without(record, refused, kept))
                    part.origins.append(kept)
                return
        part.records.append(await self._completed(entry.gateway, record))
        part.origins.append(None)

    async def _completed(self, gateway: str, record: Record) -> Record:
        """A gap also says what of it the journal holds after all."""
        if not isinstance(record, GapRecord) or not 0 < record.gap.first <= record.gap.last:
            return record
        held = await self._journal.holds(gateway, record.gap.epoch, record.gap.first, record.gap.last)
        return msgspec.structs.replace(record, held=held)

    def _without(self, record: ScanRecord, refused: tuple[int, ...], kept: tuple[int, ...]) -> ScanRecord:
        key = (record.layout_id, refused)
        known = self._reduced.get(key)
        if known is None:
            if len(self._reduced) >= 1024:
                self._reduced.clear()
            known = self._reduced[key] = _reduced(record.layout, kept)
        layout, identity = known
        return msgspec.structs.replace(
            record,
            layout=layout,
            layout_id=identity,
            values=[record.values[i] for i in kept],
            reasons={at: record.reasons[i] for at, i in enumerate(kept) if i in record.reasons},
        )

    # --- one call ---

    async def _settle(self, part: _Part) -> None:
        """Write, keep what was refused, and only then move the cursor."""
        rejected = await self._write(part) if part.records or part.upto > self._position else ()
        letters = list(part.letters)
        lost = part.refused_readings
        expired: Counter[str] = Counter()
        for rejection in rejected:
            record, origin = part.records[rejection.index], part.origins[rejection.index]
            points = rejection.points
            if origin is not None:
                points = tuple(origin[i] for i in points or range(len(origin)))
            lost += len(points) or readings_in(record)
            if rejection.expired and self._archived:
                expired[f"{record.tenant}/{record.gateway}"] += len(points) or readings_in(record)
                continue
            await asyncio.sleep(0)
            letters.append(
                self._letter(self._opened, part.sources[record.offset], record, rejection.reason, points)
            )
        while letters:
            try:
                reached("runner.before_letters")
                await self._dead_letters.add(letters)
                reached("runner.after_letters")
                self._up()
                break
            except DeadLettersError as err:
                await self._back_off(err)
                self._end_if_draining(err)
        if part.upto > self._position:
            reached("runner.before_cursor")
            await self._journal.commit(self.sink.name, part.upto, expired=expired)
            reached("runner.after_cursor")
            self._position = part.upto
        elif expired:  # the rest of this entry is in a call of its own
            await self._journal.commit(self.sink.name, self._position, expired=expired)
        self._expired += expired.total()
        self._accepted_records += len(part.records) - sum(1 for r in rejected if not r.points)
        self._accepted_readings += part.readings - lost
        self._rejected_records += len(letters)
        self._rejected_readings += lost
        if letters:
            log.warning("sink %s: %d records to the dead letters; the last: %s",
                        self.sink.name, len(letters), letters[-1].reason)  # fmt: skip

    async def _write(self, part: _Part) -> Sequence[Rejection]:
        refused = await self._call(part.records, part.upto)
        if isinstance(refused, Settled):
            return refused.rejected
        log.info(
            "sink %s refused %d records (%s): looking for the one", self.sink.name, len(part.records), refused
        )
        rejected = await self._isolate(part.records, 0, refused)
        reached("runner.after_bisection")
        # The halves were written under the old offset; the new one follows.
        await self._call((), part.upto)
        return rejected

    async def _isolate(self, records: Sequence[Record], start: int, refused: SinkRefused) -> list[Rejection]:
        """What is refused among `records`, which were refused as a whole."""
        if len(records) == 1:
            self._failures += isinstance(refused, _NotTaken)
            if self._failures > MAX_FAILURES:
                raise SinkBroken(f"sink {self.sink.name} fails on whatever it is given: {refused}")
            return [Rejection(start, str(refused))]
        half = len(records) // 2
        rejected, left_settled = await self._half(records[:half], start)
        right, at = records[half:], start + half
        if left_settled and len(right) > 1:
            # Something was refused and it is not on the left: the right need not be tried as a whole.
            return rejected + await self._isolate(right, at, refused)
        return rejected + (await self._half(right, at))[0]

    async def _half(self, records: Sequence[Record], start: int) -> tuple[list[Rejection], bool]:
        reached("runner.before_half")
        refused = await self._call(records, self._position)
        if isinstance(refused, Settled):
            shifted = [msgspec.structs.replace(r, index=r.index + start) for r in refused.rejected]
            return shifted, True
        return await self._isolate(records, start, refused), False

    async def _call(self, records: Sequence[Record], upto: int) -> Settled | SinkRefused:
        """One write, repeated for as long as the store asks for it."""
        while True:
            try:
                reached("runner.before_write")
                settled = await self.sink.write(records, upto)
            except RetryLater as err:
                await self._back_off(err)
                self._end_if_draining(err)
            except SinkRefused as err:
                return err
            except SinkError:
                raise
            except Exception as err:  # a bug over some records is a refusal of them: bisected, never lost
                log.exception("sink %s failed", self.sink.name)
                return _NotTaken(f"the sink failed: {type(err).__name__}: {err}")
            else:
                reached("runner.after_write")
                self._up()
                if records:
                    self._failures = 0
                return settled

    def _letter(
        self, opened: _Opened, entry: Stored, record: Record, reason: str, points: Sequence[int] = ()
    ) -> NewLetter:
        readings = len(points) or readings_in(record)
        try:
            body = opened.body(entry)
            kept = alone(self._decoder, entry, body, frame_of(entry, body, record.seq), record)
        except WireError as err:  # it decoded a moment ago; keep the whole batch rather than nothing
            log.error("frame %d of offset %d cannot be kept alone: %s", record.seq, entry.offset, err)
            kept = msgspec.structs.replace(entry, fresh=((record.seq, record.seq),))
        return NewLetter(self.sink.name, kept, reason, readings, tuple(points))

    async def _pass_damaged(self, err: EntryDamaged) -> None:
        """The journal's own entry is unreadable: count it, say so, go past."""
        log.error("sink %s: %s", self.sink.name, err)
        lost = Stored(
            err.offset, err.gateway, err.epoch, err.first, err.last, 0, 0, ((err.first, err.last),), b""
        )
        async with self._turn:
            await self._dead_letters.add(
                [NewLetter(self.sink.name, lost, f"damaged in the journal: {err}", 0)]
            )
            await self._journal.commit(self.sink.name, err.offset)
            self._position = err.offset
            self._rejected_records += 1

    # --- replay ---

    async def _take_turn(self) -> None:
        """Raises `RetryLater`; else the caller releases it."""
        if self._word != "running":
            raise RetryLater(
                f"sink {self.sink.name} is {self._word}: {self._error or 'not ready'}; replay later"
            )
        try:
            async with asyncio.timeout(REPLAY_WAIT_S):
                await self._turn.acquire()
        except TimeoutError:
            raise RetryLater(f"sink {self.sink.name} is busy; replay later") from None

    async def _correct(
        self, start: int, upto: int, gateway: str | None, to_ns: int, *, dry_run: bool
    ) -> SentBack:
        """Remove what a better clock row moves, and put that row in force. The cursor is back at `start` already."""
        held = self._clocks.in_force(self.sink.name)
        forces: dict[Boot, Force] = {}
        better = Decoder(self._skews)
        gone: list[Record] = []
        batches = readings = scans = corrected = 0
        at = start
        while at < upto:
            try:
                entries = await self._journal.read(at, max_entries=256, max_bytes=self.sink.max_bytes)
            except EntryDamaged as err:
                at = err.offset
                continue
            if not entries:
                break
            for entry in entries:
                at = entry.offset
                if at > upto or entry.received_at_ns >= to_ns or gateway not in (None, entry.gateway):
                    continue
                batches += 1
                readings += entry.readings
                found = self._improved(entry, held, forces)
                if not found:
                    continue
                forces.update(found)
                better.forces = {**held, **forces}
                for piece in _pieces(entry):
                    was = {record.seq: record for record in self._decoder.decode(piece).records}
                    for record in better.decode(piece).records:
                        old = was[record.seq]
                        if at_ns(old) != at_ns(record):
                            gone.append(old)
                            scans += 1
                            corrected += readings_in(old)
                    await asyncio.sleep(0)
                if not dry_run and len(gone) >= self.sink.max_records:
                    await self.sink.remove(gone)
                    gone = []
        if not dry_run:
            if gone:
                await self.sink.remove(gone)
            await self._clocks.put_in_force(self.sink.name, forces)
            self._decoder.forces = self._clocks.in_force(self.sink.name)
        return SentBack(start, upto, batches, readings, scans, corrected)

    def _improved(
        self, entry: Stored, held: Mapping[Boot, Force], more: Mapping[Boot, Force]
    ) -> dict[Boot, Force]:
        """What would be in force with this entry's seqs, for its boots whose clock was synchronized too late for it."""
        try:
            clocks = wall_clock(open_body(entry.payload)[1].clocks)
        except WireError:
            return {}
        found: dict[Boot, Force] = {}
        for number, row in clocks.items():
            boot = (entry.gateway, entry.epoch, number)
            best = None if row.synchronized else self._clocks.best(boot)
            if best is not None:
                found[boot] = widened(more.get(boot) or held.get(boot), best, entry.fresh)
        return found

    async def _replay(self, ids: Sequence[int]) -> Replayed:
        delivered: list[int] = []
        refused: list[tuple[int, str]] = []
        unknown: list[int] = []
        for letter_id in ids:
            found = await self._dead_letters.show(letter_id)
            if found is None or found[0].sink != self.sink.name:
                unknown.append(letter_id)
                continue
            reason = await self._redeliver(found[1])
            if reason:
                await self._dead_letters.refused_again(letter_id, reason)
                refused.append((letter_id, reason))
            else:
                reached("runner.after_replay")
                await self._dead_letters.drop((letter_id,))
                delivered.append(letter_id)
        return Replayed(tuple(delivered), tuple(refused), tuple(unknown))

    async def _redeliver(self, entry: Stored) -> str:
        """Why it is refused again; "" where the sink has taken it."""
        decoded = self._decoder.decode(entry)
        if decoded.poison:
            return decoded.poison[0].reason
        records = [await self._completed(entry.gateway, record) for record in decoded.records]
        for record in records:
            if self._guard is not None and isinstance(record, ScanRecord):
                await self._guard.admit(record)
        for at in range(0, len(records), self.sink.max_records):
            try:
                settled = await self.sink.write(records[at : at + self.sink.max_records], self._position)
            except SinkRefused as err:
                return str(err)
            if settled.rejected:
                return settled.rejected[0].reason
        return ""

    # --- up and down ---

    async def _maintain(self) -> None:
        self._maintain_at = time.monotonic() + self._maintain_s
        async with self._turn:
            try:
                await self.sink.maintain(self._clock_ns())
            except (RetryLater, SinkRefused) as err:
                self._maintain_at = time.monotonic() + min(self._maintain_s, self._broken_retry_s)
                log.warning("sink %s: maintenance put off: %s", self.sink.name, err)

    async def _back_off(self, err: Exception) -> None:
        """Full jitter: anywhere between nothing and twice as long as the last time could have been."""
        first = self._word != "retrying"
        self._down("retrying", err)
        self._tries = 0 if first else self._tries + 1
        self._retries += 1
        ceiling_s = min(self._retry_cap_s, self._retry_base_s * 2 ** min(self._tries, 16))
        wait_s = self._rng.uniform(0.0, ceiling_s)
        if isinstance(err, RetryLater) and err.after_s is not None:
            # As long as it asks; where it asks for nothing, it is not hammered all the same.
            wait_s = max(err.after_s, min(wait_s, self._retry_base_s))
        await self._pause(wait_s)

    def _down(self, word: Word, err: Exception) -> None:
        self._error = str(err) or type(err).__name__
        if self._word in ("retrying", "broken"):
            log.debug("sink %s: %s", self.sink.name, err)
        else:
            self._down_since_ns = self._clock_ns()
            log.warning("sink %s is %s: %s", self.sink.name, word, self._error)
        self._word = word

    def _up(self) -> None:
        if self._word in ("retrying", "broken"):
            down_s = (self._clock_ns() - self._down_since_ns) / 1e9
            log.info("sink %s recovered after %.0f s", self.sink.name, down_s)
        self._word = "running"
        self._error = ""

    def _stopping(self) -> bool:
        return self._draining.is_set()

    def _end_if_draining(self, err: Exception) -> None:
        """A store that takes nothing now is not waited for at the end: the journal keeps it all."""
        if self._draining.is_set():
            raise err

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._draining.wait()

    async def _caught_up(self) -> bool:
        return self._position >= (await self._journal.state()).last_offset

    async def _lag_s(self) -> float:
        oldest_ns = self._oldest_ns
        if oldest_ns is None:
            try:
                waiting = await self._journal.read(self._position, max_entries=1, max_bytes=1)
            except JournalError:
                return 0.0  # the journal's own state tells of it
            if not waiting:
                return 0.0
            oldest_ns = waiting[0].received_at_ns
        return max(0.0, (self._clock_ns() - oldest_ns) / 1e9)


def _part(upto: int) -> _Part:
    return _Part([], [], [], {}, 0, 0, upto)


def _pieces(entry: Stored) -> list[Stored]:
    """An entry whose body is large as several, by seq: what is decoded at once stays small."""
    try:
        raw_bytes = open_head(entry.payload)[0].raw_bytes
    except WireError:
        return [entry]  # it becomes poison by itself
    pieces = -(-raw_bytes // MAX_PIECE_BYTES)
    if pieces <= 1:
        return [entry]
    step = -(-(entry.last - entry.first + 1) // pieces)
    return [
        msgspec.structs.replace(entry, fresh=((at, min(at + step - 1, last)),))
        for first, last in entry.fresh
        for at in range(first, last + 1, step)
    ]


def _reduced(layout: Layout, kept: Sequence[int]) -> tuple[Layout, int]:
    less = msgspec.structs.replace(
        layout,
        names=tuple(layout.names[i] for i in kept),
        types=tuple(layout.types[i] for i in kept),
        units=tuple(layout.units[i] for i in kept),
        scales=tuple(layout.scales[i] for i in kept),
        offsets=tuple(layout.offsets[i] for i in kept),
    )
    return less, layout_id(less)


def _joined(poison: Sequence[Poison]) -> list[Poison]:
    """Neighbours with the same reason as one."""
    joined: list[Poison] = []
    for one in poison:
        if joined and joined[-1].last + 1 == one.first and joined[-1].reason == one.reason:
            joined[-1] = msgspec.structs.replace(joined[-1], last=one.last)
        else:
            joined.append(one)
    return joined


def _poisoned(sink: str, entry: Stored, poison: Poison) -> NewLetter:
    frames = poison.last - poison.first + 1
    readings = entry.readings * frames // max(1, entry.last - entry.first + 1)  # the head's count, shared out
    return NewLetter(
        sink, msgspec.structs.replace(entry, fresh=((poison.first, poison.last),)), poison.reason, readings
    )
