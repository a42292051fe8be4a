"""The shipped journal at work, telling what it has promised; and the check of a journal file against those promises.

The workload: appends in groups from several gateways, with duplicates and overlaps, cursors, trim, heartbeats. Marks
and rules as in `buffer_workload`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, TypeAlias

import msgspec

from cloud.intervals import IntervalSet
from cloud.journal import sqlite as journal_module
from cloud.journal.contract import Entry, EntryDamaged, JournalError, Stored
from cloud.journal.sqlite import SqliteJournal
from tests.torture.buffer_workload import Violation, digest, weaken

GATEWAYS: Final = ("acme/plant-1", "acme/plant-2", "beta/roof")
SINKS: Final = ("archive", "series")
MAX_BYTES: Final = 64 * 1024 * 1024


class Batch(msgspec.Struct, frozen=True, array_like=True, gc=False):
    gateway: str
    epoch: int
    first: int
    last: int
    digest: int


class Begun(msgspec.Struct, frozen=True, tag=True):
    """One call is about to begin."""

    batches: tuple[Batch, ...]


class Appended(msgspec.Struct, frozen=True, tag=True):
    """The call returned; offsets of those that held something new."""

    batches: tuple[Batch, ...]
    offsets: tuple[int | None, ...]


class Moving(msgspec.Struct, frozen=True, tag=True):
    sink: str
    offset: int


class Moved(msgspec.Struct, frozen=True, tag=True):
    sink: str
    offset: int


class Trimming(msgspec.Struct, frozen=True, tag=True):
    """Everything up to here may vanish from now on."""

    offset: int


class State(msgspec.Struct, frozen=True, tag=True):
    gateway: str
    received_at_ns: int


Mark: TypeAlias = Begun | Appended | Moving | Moved | Trimming | State
encode_mark = msgspec.json.Encoder().encode
decode_mark = msgspec.json.Decoder(Mark).decode


class Workload:
    def __init__(self, folder: Path, seed: int, tell: Callable[[Mark], None]) -> None:
        self._path = folder / "journal.db"
        self._rnd = random.Random(seed)
        self._tell = tell
        self._next = dict.fromkeys(((g, e) for g in GATEWAYS for e in (11, 12)), 1)
        self._cursors = dict.fromkeys(SINKS, 0)
        self._now_ns = 10**18
        self.journal = SqliteJournal(
            self._path, max_bytes=MAX_BYTES, free_disk_bytes=0, clock_ns=lambda: self._now_ns
        )

    def _entry(self) -> Entry:
        rnd = self._rnd
        key = rnd.choice(list(self._next))
        top = self._next[key]
        first = top
        if rnd.random() < 0.2 and top > 1:
            first = rnd.randint(max(1, top - 60), top - 1)  # sent again, or overlapping
        elif rnd.random() < 0.1:
            first = top + rnd.randint(1, 30)  # ahead of what the backlog will bring
        last = first + rnd.randint(0, 40)
        self._next[key] = max(top, last + 1)
        payload = rnd.randbytes(int(10 ** rnd.uniform(1.3, 4.2)))
        return Entry(key[0], key[1], first, last, 2 * (last - first + 1), self._now_ns, payload)

    async def _append(self, count: int) -> None:
        entries = [self._entry() for _ in range(count)]
        batches = tuple(Batch(e.gateway, e.epoch, e.first, e.last, digest(e.payload)) for e in entries)
        self._tell(Begun(batches))
        done = await self.journal.append(entries)
        self._tell(Appended(batches, tuple(one.offset for one in done)))

    async def _move(self, sink: str) -> None:
        last = self.journal.last_offset
        offset = min(last, self._cursors[sink] + self._rnd.randint(1, 30))
        if offset > self._cursors[sink]:
            self._cursors[sink] = offset
            self._tell(Moving(sink, offset))
            await self.journal.commit(sink, offset)
            self._tell(Moved(sink, offset))

    async def run(self, steps: int) -> None:
        rnd = self._rnd
        await self.journal.open()
        for step in range(steps):
            self._now_ns += 10**9
            await self._append(rnd.choice((1, 1, 2, 5, 20)))
            for sink in SINKS:
                if rnd.random() < 0.5:
                    await self._move(sink)
            if rnd.random() < 0.1:
                gateway = rnd.choice(GATEWAYS)
                await self.journal.record_state(gateway, self._now_ns, b'{"ok": true}')
                self._tell(State(gateway, self._now_ns))
            if step % 25 == 24:
                self._tell(Trimming(min(self._cursors.values())))
                await self.journal.trim(
                    SINKS, keep_s=0, max_bytes=MAX_BYTES if rnd.random() < 0.5 else 200_000
                )
            if step % 90 == 89:
                await self.journal.close()
                self.journal = SqliteJournal(
                    self._path, max_bytes=MAX_BYTES, free_disk_bytes=0, clock_ns=lambda: self._now_ns
                )
                await self.journal.open()


class Truth:
    """What the cloud may rely on, at one moment."""

    def __init__(self) -> None:
        self.stored: dict[int, Batch] = {}  #: by offset
        self.held: dict[tuple[str, int], IntervalSet] = {}
        self.begun: tuple[Batch, ...] = ()
        self.moved = dict.fromkeys(SINKS, 0)
        self.moving = dict.fromkeys(SINKS, 0)
        self.trimmed = 0
        self.top = 0
        self.states: dict[str, int] = {}
        self.calls = 0

    def take(self, mark: Mark) -> None:
        match mark:
            case Begun():
                self.begun = mark.batches
            case Appended():
                self.calls += 1
                self.begun = ()
                for batch, offset in zip(mark.batches, mark.offsets, strict=True):
                    self.held.setdefault((batch.gateway, batch.epoch), IntervalSet([])).add(
                        batch.first, batch.last
                    )
                    if offset is not None:
                        self.stored[offset] = batch
                        self.top = max(self.top, offset)
            case Moving():
                self.moving[mark.sink] = mark.offset
            case Moved():
                self.moved[mark.sink] = mark.offset
            case Trimming():
                self.trimmed = max(self.trimmed, mark.offset)
                self.stored = {offset: batch for offset, batch in self.stored.items() if offset > mark.offset}
            case State():
                self.states[mark.gateway] = mark.received_at_ns

    def check(self, folder: Path) -> list[Violation]:
        return asyncio.run(self._check(folder / "journal.db"))

    async def _check(self, path: Path) -> list[Violation]:
        journal = SqliteJournal(path, max_bytes=MAX_BYTES, free_disk_bytes=0, commit_interval_s=0.0)
        try:
            await journal.open()
        except JournalError as err:
            return [Violation("unusable", str(err))]
        try:
            return [one async for one in self._violations(journal)]
        except (JournalError, sqlite3.Error) as err:
            return [Violation("corrupt", str(err))]
        finally:
            await journal.close()

    async def _violations(self, journal: SqliteJournal) -> AsyncIterator[Violation]:
        with contextlib.closing(sqlite3.connect(f"file:{journal.path}?mode=ro", uri=True)) as db:
            verdict = db.execute("PRAGMA integrity_check").fetchone()[0]
        if verdict != "ok":
            yield Violation("corrupt", verdict)
            return
        found: dict[int, Stored] = {}
        after = 0
        while True:
            try:
                rows = await journal.read(after, max_entries=1000, max_bytes=2**24)
            except EntryDamaged as err:
                yield Violation("corrupt", str(err))
                return
            if not rows:
                break
            found |= {row.offset: row for row in rows}
            after = rows[-1].offset
        for one in self._compared(found):
            yield one
        for sink in SINKS:
            cursor = await journal.cursor(sink)
            if not self.moved[sink] <= cursor <= max(self.moved[sink], self.moving[sink]):
                yield Violation("lost", f"cursor of {sink}: {cursor}, was {self.moved[sink]}")
        states = {state.gateway: state.received_at_ns for state in await journal.states()}
        for gateway, at_ns in self.states.items():
            if states.get(gateway, 0) < at_ns:
                yield Violation("lost", f"the heartbeat of {gateway}")
        counts = {count.gateway: count for count in await journal.counts()}
        kept = dict.fromkeys(GATEWAYS, 0)
        for (gateway, epoch), ranges in self.held.items():
            whole = await journal.holds(gateway, epoch, 1, 10**9)
            kept[gateway] += sum(b - a + 1 for a, b in whole)
            have = IntervalSet(whole)
            missing = [r for r in ranges.ranges() if have.missing(*r)]
            if missing:
                yield Violation("lost", f"dedupe of {gateway} epoch {epoch}: {missing[:3]}")
        if not self.begun:
            for gateway, n in kept.items():
                count = counts.get(gateway)
                if count is not None and count.frames_received - count.frames_duplicate != n:
                    yield Violation("identity", f"{gateway}: {count}, and {n} frames are held")
        # Life goes on: a resend is harmless, and no offset is given twice.
        again = [
            Entry(b.gateway, b.epoch, b.first, b.last, 1, 1, b"again")
            for b in list(self.stored.values())[-3:]
        ]
        done = await journal.append([*again, Entry("acme/new", 1, 1, 5, 5, 1, b"new")])
        if any(one.offset is not None for one in done[:-1]):
            yield Violation("reused", "a batch that was acknowledged is taken for a new one")
        new = done[-1].offset
        if new is None or new <= max(self.top, max(found, default=0), *self.moved.values()):
            yield Violation("reused", f"offset {new} was given before")

    def _compared(self, found: dict[int, Stored]) -> Iterable[Violation]:
        lost = self.stored.keys() - found.keys()
        if lost:
            yield Violation("lost", f"{len(lost)} acknowledged entries: offsets {sorted(lost)[:5]}")
        for offset, batch in self.stored.items():
            row = found.get(offset)
            if row is None:
                continue
            told = Batch(row.gateway, row.epoch, row.first, row.last, digest(row.payload))
            if told != batch:
                yield Violation("reused", f"offset {offset} was {batch}, and is now {told}")
                return
        extra = [row for offset, row in found.items() if offset > self.top]
        new = {(b.gateway, b.epoch, b.first, b.last, b.digest) for b in self.begun}
        for row in extra:
            if (row.gateway, row.epoch, row.first, row.last, digest(row.payload)) not in new:
                yield Violation("corrupt", f"an entry that nobody appended: {row.offset}")


def main(argv: Sequence[str]) -> None:
    """In the recorded child: FOLDER SEED STEPS SYNCHRONOUS."""
    folder, seed, steps, synchronous = Path(argv[0]), int(argv[1]), int(argv[2]), argv[3]
    if synchronous != "FULL":
        weaken(synchronous)
    journal_module.WAL_CHECKPOINT_PAGES = 40  # type: ignore[misc]  # checkpoints within a few hundred commits
    marks = os.open(folder / "marks", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def tell(mark: Mark) -> None:
        os.write(marks, encode_mark(mark))

    asyncio.run(Workload(folder, seed, tell).run(steps))
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
