"""The shipped buffer at work, telling what it has promised; and the check of a buffer file against those promises.

Used where the power is cut: enumerated (`power_cuts`) and for real (`tests/nightly/power_vm.sh`). The workload goes
through all that writes: append, commit with and without live batches, claim, settle, split, park, eviction, drain,
checkpoint, vacuum, ballast, clock rows, layouts, restarts.

Rules:
1. What is about to be promised is told before the call (`Offered`, `Acked`), what was promised after it (`Kept`,
   `Handed`, `Gone`): at any cut the marks so far are exactly what may be relied upon.
2. `check` uses the shipped code alone: it opens, sends all, and takes more.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import sqlite3
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, TypeAlias

import msgspec

import agent.store
from agent.store import Batch, Group, Limits, Store, StoreError, StoreUnusable
from sync.wire import Ack, GapFrame, Packing, layout_of
from tests.fakes.buffer import (
    GATEWAY,
    PACKING,
    POINTS,
    READINGS,
    ModelCloud,
    StillClock,
    drain,
    number_of,
    scan,
)

#: Small, so that eviction, checkpoints and a growing file come within a few hundred commits.
LIMITS: Final = Limits(max_bytes=768 * 1024, ballast_bytes=64 * 1024)
LEGITIMATE: Final = frozenset(
    {"evicted", "expired", "refused", "skipped"}
)  #: reasons of gaps that lose nothing promised: `skipped` excuses no kept frame


class Row(msgspec.Struct, frozen=True, array_like=True, gc=False):
    seq: int
    digest: int
    number: int | None  #: of a scan


class Opened(msgspec.Struct, frozen=True, tag=True):
    epoch: int


class Offered(msgspec.Struct, frozen=True, tag=True):
    """One commit is about to begin: all of these may be kept, or none."""

    numbers: tuple[int, ...]


class Kept(msgspec.Struct, frozen=True, tag=True):
    """The call returned: these are there, come what may."""

    rows: tuple[Row, ...]


class Gone(msgspec.Struct, frozen=True, tag=True):
    """The call returned: these were evicted or parked, and gaps that were kept with it say so."""

    seqs: tuple[int, ...]


class Handed(msgspec.Struct, frozen=True, tag=True):
    """The bytes of a batch went out: they may never be other ones."""

    first: int
    last: int
    digest: int


class Acked(msgspec.Struct, frozen=True, tag=True):
    """The cloud has these: they may vanish from now on."""

    first: int
    last: int


Mark: TypeAlias = Opened | Offered | Kept | Gone | Handed | Acked
encode_mark = msgspec.json.Encoder().encode
decode_mark = msgspec.json.Decoder(Mark).decode


def digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "big")


def _number(data: bytes) -> int | None:
    try:
        return number_of(data)
    except ValueError:  # damaged: it cannot be one of ours
        return None


class Workload:
    """Steps on one buffer file, chosen by a seed."""

    def __init__(self, folder: Path, seed: int, tell: Callable[[Mark], None], first_number: int = 0) -> None:
        self._folder = folder
        self._rnd = random.Random(seed)
        self._tell = tell
        self._number = first_number
        self._boots = 0
        self._layouts = 0
        self._held: set[int] = set()
        self._handed: list[tuple[int, int]] = []
        self._acked: list[tuple[int, int]] = []
        self.store = self._opened()

    def _opened(self) -> Store:
        self._boots += 1
        self._clock = StillClock(f"boot-{self._rnd.getrandbits(40):x}")
        store = Store(self._folder / "buffer.db", str(GATEWAY), LIMITS, self._clock)
        store.open()
        self._tell(Opened(store.ledger.epoch))
        self._look(store)
        return store

    def _look(self, store: Store) -> None:
        """Tell what the last call has kept and dropped, as it stands in the table."""
        with contextlib.closing(sqlite3.connect(f"file:{store.path}?mode=ro", uri=True)) as db:
            seqs = {seq for (seq,) in db.execute("SELECT seq FROM frames")}
            new = sorted(seqs - self._held)
            if new:
                rows = db.execute("SELECT seq, data FROM frames WHERE seq BETWEEN ? AND ?", (new[0], new[-1]))
                self._tell(
                    Kept(
                        tuple(
                            Row(s, digest(d), _number(d)) for s, d in rows.fetchall() if s not in self._held
                        )
                    )
                )
        gone = self._held - seqs
        for first, last in self._acked:
            gone.difference_update(range(first, last + 1))
        if gone:
            self._tell(Gone(tuple(sorted(gone))))
        self._held = seqs

    def _hand(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            self._tell(Handed(batch.sealed.first, batch.sealed.last, digest(batch.sealed.payload)))
            self._handed.append((batch.sealed.first, batch.sealed.last))

    def _acks(self, share: float) -> list[tuple[int, int]]:
        """What the cloud says it has, of what it was sent."""
        acked = [one for one in self._handed if self._rnd.random() < share]
        self._handed = [one for one in self._handed if one not in acked]
        for first, last in acked:
            self._tell(Acked(first, last))
        self._acked += acked
        return acked

    def commit(self, frames: int, *, acks: float, live_room: int) -> None:
        rnd = self._rnd
        numbers = tuple(range(self._number, self._number + frames))
        self._number += frames
        made = [scan(n, boot=self.store.ledger.boot, size=int(10 ** rnd.uniform(0.5, 2.8))) for n in numbers]
        layouts = [PACKING.layout]
        if rnd.random() < 0.05:
            self._layouts += 1
            layouts.append(Packing(layout_of(f"device-{self._layouts}", "test", "boiler", POINTS)).layout)
        clocks = [self._clock.read()] if rnd.random() < 0.1 else []
        group = Group(made, [READINGS] * frames, layouts, clocks, sum(len(f) + 16 for f in made))
        settled = self._acks(acks)
        self._tell(Offered(numbers))
        batches = self.store.commit(group, settled, live_room)
        self._look(self.store)
        self._hand(batches)
        self._clock.pass_s(rnd.uniform(0.1, 100))

    def claim(self, count: int, *, acks: float) -> int:
        batches = self.store.claim(count, self._acks(acks))
        self._look(self.store)
        self._hand(batches)
        return len(batches)

    def split(self) -> None:
        """As the forwarder after "too large"."""
        for record in self.store.recorded()[:1]:
            before = (record.first, record.last)
            batches = self.store.split(*before)
            self._handed = [one for one in self._handed if one != before]
            self._look(self.store)
            self._hand(batches)

    def park(self) -> None:
        """As the forwarder after a permanent refusal."""
        for record in self.store.recorded()[:1]:
            if record.first == record.last:
                self._handed = [one for one in self._handed if one != (record.first, record.last)]
                self.store.park(record.first, "malformed", "the cloud says so")
                self._look(self.store)

    def drain(self) -> None:
        """All of it out, all of it acknowledged: the file shrinks."""
        for _ in range(200):
            for record in self.store.recorded():
                self._hand(self.store.rebuild(record.first, record.last))
            self.claim(4, acks=1.0)
            self.commit(1, acks=1.0, live_room=0)
            if self.store.ledger.held_frames <= 1:
                break
        for _ in range(
            LIMITS.wal_bytes // 2**15 + 2
        ):  # until the upkeep's turn comes: it checkpoints and vacuums
            self.commit(1, acks=1.0, live_room=1)

    def restart(self) -> None:
        self.store.close()
        self.store = self._opened()
        self._handed = []
        for record in self.store.recorded():
            self._hand(self.store.rebuild(record.first, record.last))

    def run(self, steps: int) -> None:
        rnd = self._rnd
        mood = "flow"
        for step in range(steps):
            if step % 40 == 0:
                mood = rnd.choice(("flow", "flow", "backlog", "storm"))
            match mood:
                case "flow":
                    self.commit(rnd.randint(1, 12), acks=0.9, live_room=rnd.randint(0, 2))
                    if rnd.random() < 0.2:
                        self.claim(2, acks=0.9)
                case "backlog":
                    self.commit(rnd.randint(1, 40), acks=0.05, live_room=0)
                case _:
                    self.commit(rnd.randint(20, 120), acks=0.0, live_room=rnd.randint(0, 1))
            chance = rnd.random()
            if chance < 0.02:
                self.split()
            elif chance < 0.04:
                self.park()
            elif chance < 0.05:
                self.restart()
            elif chance < 0.065:
                self.drain()


class Violation(msgspec.Struct, frozen=True):
    kind: str  #: lost, corrupt, reused, identity, torn, unusable
    text: str


class Truth:
    """What the workload may rely on, at one moment."""

    def __init__(self) -> None:
        self.epoch = 0
        self.kept: dict[int, Row] = {}
        self.outstanding: set[int] = set()  #: kept, neither acknowledged nor told as gone
        self.acked: set[int] = set()
        self.handed: dict[tuple[int, int], int] = {}
        self.offered: tuple[int, ...] = ()
        self.calls = 0

    def take(self, mark: Mark) -> None:
        match mark:
            case Opened():
                if self.epoch and self.epoch != mark.epoch:
                    raise AssertionError("the workload's own buffer was set aside")
                self.epoch = mark.epoch
            case Offered():
                self.offered = mark.numbers
            case Kept():
                self.calls += 1
                for row in mark.rows:
                    self.kept[row.seq] = row
                    self.outstanding.add(row.seq)
                self.offered = ()
            case Gone():
                self.outstanding.difference_update(mark.seqs)
            case Handed():
                self.handed[mark.first, mark.last] = mark.digest
            case Acked():
                acked = range(mark.first, mark.last + 1)
                self.acked.update(acked)
                self.outstanding.difference_update(acked)

    def check(self, folder: Path) -> list[Violation]:
        """Open what the cut has left with the shipped code, and hold it to the promises. The folder is used up."""
        store = Store(folder / "buffer.db", str(GATEWAY), LIMITS, StillClock("boot-after"))
        try:
            store.open()
        except StoreUnusable as err:
            return [Violation("unusable", str(err))]
        try:
            return list(self._violations(store, folder))
        except (StoreError, sqlite3.Error) as err:
            return [Violation("corrupt", str(err))]
        finally:
            store.close()

    def _violations(self, store: Store, folder: Path) -> Iterable[Violation]:
        aside = [path.name for path in folder.iterdir() if ".damaged" in path.name]
        if store.events or aside:
            yield Violation("corrupt", f"the file was set aside: {store.events} {aside}")
            return
        with contextlib.closing(sqlite3.connect(f"file:{store.path}?mode=ro", uri=True)) as db:
            verdict = db.execute("PRAGMA integrity_check").fetchone()[0]
            rows = db.execute("SELECT seq, readings, data FROM frames").fetchall()
        if verdict != "ok":
            yield Violation("corrupt", verdict)
        led = store.ledger
        if (led.held_frames, led.held_readings) != (len(rows), sum(row[1] for row in rows)):
            yield Violation(
                "identity",
                f"the ledger says {led.held_frames} frames, {led.held_readings} readings held; there are {len(rows)},"
                f" {sum(row[1] for row in rows)}",
            )
        if self.epoch and led.epoch != self.epoch:
            if self.outstanding:
                yield Violation("lost", f"a new epoch; {len(self.outstanding)} kept frames are not there")
            return
        yield from self._sent(store)

    def _sent(self, store: Store) -> Iterable[Violation]:
        cloud, led = _Cloud(self), store.ledger
        try:
            drain(store, cloud)
            new = scan(10**9, boot=led.boot)
            store.commit(Group([new], [READINGS], [PACKING.layout], size_bytes=100), (), 1)
            drain(store, cloud)
        except AssertionError as err:
            yield Violation("reused", str(err) or repr(traceback.extract_tb(err.__traceback__)[-1]))
            return
        sent = {seq: raw for (epoch, seq), raw in cloud.held.items() if epoch == store.ledger.epoch}
        gaps = cloud.gaps()
        yield from cloud.found
        for gap in gaps:
            if gap.reason not in LEGITIMATE:
                yield Violation("corrupt", f"a gap that a power cut made: {gap}")
        missing = self.outstanding - sent.keys()
        lost = [
            seq for seq in missing if not any(_covers(gap, seq) for gap in gaps if gap.reason != "skipped")
        ]
        if lost:
            yield Violation(
                "lost", f"{len(lost)} kept frames, of {len(self.outstanding)}: seq {sorted(lost)[:5]}..."
            )
        for seq, raw in sent.items():
            row = self.kept.get(seq)
            # A gap that was not sent may have been summed up with its neighbours; sent batches are compared whole.
            if row is not None and row.number is not None and row.digest != digest(raw):
                yield Violation("reused", f"seq {seq} was number {row.number}, and is now {_number(raw)}")
                return
        if self.offered:
            known = {
                n for seq, raw in sent.items() if seq not in self.kept and (n := _number(raw)) is not None
            }
            landed = known & set(self.offered)
            evicted = any(gap.reason == "evicted" for gap in gaps)
            if landed and len(landed) != len(self.offered) and not evicted:
                yield Violation(
                    "torn", f"{len(landed)} of {len(self.offered)} frames of one commit are there"
                )


class _Cloud(ModelCloud):
    """Knows what went out before the cut."""

    def __init__(self, truth: Truth) -> None:
        super().__init__()
        self._truth = truth
        self.found: list[Violation] = []

    def take(self, payload: bytes) -> Ack:
        ack = super().take(payload)
        if ack.epoch == self._truth.epoch:
            for bounds in ack.ranges:
                before = self._truth.handed.get(bounds)
                if before is not None and before != digest(payload):
                    self.found.append(Violation("reused", f"batch {bounds} went out before with other bytes"))
        return ack


def _covers(gap: GapFrame, seq: int) -> bool:
    return gap.first <= seq <= gap.last


def weaken(synchronous: str) -> None:
    """Let the shipped modules run with another `PRAGMA synchronous`: the control that a proof must fail."""

    class Weak(sqlite3.Connection):
        def execute(self, sql: str, *more: object) -> sqlite3.Cursor:
            return super().execute(sql.replace("synchronous = FULL", f"synchronous = {synchronous}"), *more)  # type: ignore[arg-type]  # passed through

    connect = sqlite3.connect

    def weakly(*words: object, **named: object) -> sqlite3.Connection:
        return connect(*words, **{"factory": Weak, **named})  # type: ignore[call-overload,no-any-return]  # passed through

    sqlite3.connect = weakly  # type: ignore[assignment]  # in this process alone


def main(argv: Sequence[str]) -> None:
    """In the recorded child: FOLDER SEED STEPS SYNCHRONOUS."""
    folder, seed, steps, synchronous = Path(argv[0]), int(argv[1]), int(argv[2]), argv[3]
    if synchronous != "FULL":
        weaken(synchronous)
    agent.store._VACUUM_FREE_PAGES = 24  # type: ignore[misc]  # a file this small has no 8 MiB to give back
    marks = os.open(folder / "marks", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def tell(mark: Mark) -> None:
        os.write(marks, encode_mark(mark))

    work = Workload(folder, seed, tell)
    work.run(steps)
    work.drain()
    work.commit(10, acks=0, live_room=1)
    # No close: the trace ends as a power cut would find it.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
