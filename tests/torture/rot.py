"""Rot: bits that flip, pages that turn to zeros, files that end early, in the shipped buffer and the shipped journal.

    python -m tests.torture.rot [--damages 1000] [--seed 1] [--only buffer|journal] [--record]

Each damage is done to a fresh copy of one file set, which the shipped code then opens and delivers from.

Rules:
1. Passed means: 0 wrong readings delivered (each frame, and the clock row that dates it, is as it was written, under
   its own epoch and seq), and of the rows that the damage did not touch at least 95 % are delivered or salvaged.
2. The buffer opens within 5 s, whatever the damage, and the damaged set is kept. What is missing was told: a gap, an
   event or a damaged file that is kept.
3. The journal either serves, or refuses with the command that salvages it; what `cloud.journal.salvage` makes opens.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import logging
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from agent.buffer import Buffer
from agent.store import Group, Limits, Store
from cloud.journal.contract import Entry, EntryDamaged, JournalBroken, JournalError
from cloud.journal.salvage import salvage
from cloud.journal.sqlite import SqliteJournal
from config.agent import Buffer as BufferSettings
from sync.wire import Ack, decode_frame, open_body
from tests.fakes.buffer import GATEWAY, PACKING, READINGS, StillClock, number_of, scan
from tests.torture.power_cuts import scratch_parent
from tests.torture.report import Finding, record

SUBJECTS: Final = ("buffer", "journal")
OPEN_S: Final = 5.0
SHARE: Final = 0.95
_PAGE: Final = 4096
_ROWS: Final = 1500
_ENTRIES: Final = 400


class Damage(msgspec.Struct, frozen=True):
    """What is done to which file; `first..end` are the bytes that are no longer what they were."""

    kind: str  #: flip, zeros, truncated
    name: str
    first: int
    end: int
    bit: int = 0

    def __str__(self) -> str:
        return f"{self.kind} {self.name}[{self.first}:{self.end}] bit {self.bit}"

    def do(self, folder: Path) -> None:
        path = folder / self.name
        with path.open("r+b") as file:
            if self.kind == "truncated":
                file.truncate(self.first)
                return
            file.seek(self.first)
            before = file.read(self.end - self.first)
            file.seek(self.first)
            file.write(bytes(len(before)) if self.kind == "zeros" else bytes((before[0] ^ 1 << self.bit,)))


def damages(folder: Path, count: int, seed: int) -> list[Damage]:
    """Over all files of the set by their size: most are flips."""
    rnd = random.Random(seed)
    files = sorted((path.name, path.stat().st_size) for path in folder.iterdir() if path.stat().st_size)
    names, sizes = [name for name, _ in files], [size for _, size in files]
    made = []
    for i in range(count):
        [name] = rnd.choices(names, sizes)
        size = dict(files)[name]
        at = rnd.randrange(size)
        if i % 10 < 8:
            made.append(Damage("flip", name, at, at + 1, rnd.randrange(8)))
        elif i % 10 == 8:
            at -= at % _PAGE
            made.append(Damage("zeros", name, at, min(size, at + _PAGE)))
        else:
            made.append(Damage("truncated", name, at, size))
    return made


class Outcome(msgspec.Struct):
    damages: int = 0
    wrong: int = 0
    undamaged: int = 0  #: rows that no damage touched, over all damages
    delivered: int = 0  #: of them
    set_aside: int = 0
    silent: int = 0  #: rows missing and nothing said
    slow: int = 0
    failed: int = 0
    first: list[str] = []

    def add(self, other: Outcome) -> None:
        for name in ("damages", "wrong", "undamaged", "delivered", "set_aside", "silent", "slow", "failed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.first = (self.first + other.first)[:20]

    def say(self, damage: Damage, text: str) -> None:
        self.first.append(f"{damage}: {text}")

    @property
    def share(self) -> float:
        return self.delivered / max(1, self.undamaged)

    @property
    def passed(self) -> bool:
        return not (self.wrong or self.silent or self.slow or self.failed) and self.share >= SHARE


def _places(files: dict[str, bytes], pieces: dict[int, bytes]) -> dict[int, list[tuple[str, int, int]]]:
    """Where the bytes of each row are, in every file: a row is damaged where the last of its copies is."""
    found: dict[int, list[tuple[str, int, int]]] = collections.defaultdict(list)
    for name, data in files.items():
        for key, piece in pieces.items():
            at = data.rfind(piece)
            if at >= 0:
                found[key].append((name, at, at + len(piece)))
    return found


def _touched(damage: Damage, places: Sequence[tuple[str, int, int]]) -> bool:
    """Whether any copy is on a page that the damage touches: the row's own header is near its bytes."""
    first, end = damage.first - damage.first % _PAGE, damage.end + _PAGE
    if damage.kind == "flip":
        first, end = damage.first - 32, damage.end
    return any(name == damage.name and at < end and first < to for name, at, to in places)


def _untellable(damage: Damage, last_commit: int) -> bool:
    """A log that ends early, or whose last commit is torn, is what a power cut leaves of a commit that nobody was
    promised: nothing in it can tell."""
    return damage.name.endswith("-wal") and (damage.kind == "truncated" or damage.end > last_commit)


def _cut_short(damage: Damage) -> bool:
    """Cut where a commit ends, a log is a whole one."""
    return damage.name.endswith("-wal") and damage.kind == "truncated"


# ------------------------------------------------------------------------------------------------------------ buffer


class BufferSet(msgspec.Struct):
    """One buffer as it was before any damage."""

    epoch: int
    frames: dict[int, bytes]  #: by seq
    clocks: set[tuple[int, int, int]]  #: boot, boot_ns, wall_ns
    places: dict[int, list[tuple[str, int, int]]]


LIMITS: Final = Limits(max_bytes=16 * 2**20)


def make_buffer(folder: Path) -> BufferSet:
    """Rows in the file and in the WAL, some in recorded batches, of two boots."""
    store = Store(folder / "buffer.db", str(GATEWAY), LIMITS, StillClock("boot-1"))
    store.open()
    number = 0
    for part in range(30):
        if part == 10:
            store.close()
            clock = StillClock("boot-2")
            clock.pass_s(5000)
            store = Store(folder / "buffer.db", str(GATEWAY), LIMITS, clock)
            store.open()
        frames = [scan(number + i, boot=store.ledger.boot, size=40) for i in range(_ROWS // 30)]
        number += len(frames)
        store.commit(
            Group(frames, [READINGS] * len(frames), [PACKING.layout], size_bytes=5000), (), part % 3 == 0
        )
        if part == 25:
            store.checkpoint()
    conn = store._conn
    assert conn is not None
    frames_by_seq = {seq: bytes(data) for seq, data in conn.execute("SELECT seq, data FROM frames")}
    clocks = {(row.boot, row.boot_ns, row.wall_ns) for row, _ in store._marks}
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith("buffer.db")}
    epoch = store.ledger.epoch
    store.close()
    for path in folder.iterdir():
        path.unlink()
    for name, data in files.items():
        if not name.endswith((".lock", "-shm")):
            (folder / name).write_bytes(data)
    held = {name: data for name, data in files.items() if name.endswith((".db", "-wal"))}
    return BufferSet(epoch, frames_by_seq, clocks, _places(held, frames_by_seq))


class _Receiver:
    """Compares what arrives with what was written."""

    def __init__(self, before: BufferSet) -> None:
        self._before = before
        self._numbers = {number_of(data): data for data in before.frames.values()}
        self.seqs: set[int] = set()
        self.told = 0  #: gaps and events that speak of damage
        self.wrong: list[str] = []

    def take(self, payload: bytes) -> Ack:
        head, body = open_body(payload)
        for row in body.clocks:
            if row.boot <= 2 and (row.boot, row.boot_ns, row.wall_ns) not in self._before.clocks and row.boot_id in (
                "boot-1", "boot-2",
            ):  # fmt: skip
                self.wrong.append(f"clock row {row}")
        layouts = {layout.device for layout in body.layouts}
        if layouts - {"boiler"} or any(layout != PACKING.layout for layout in body.layouts):
            self.wrong.append(f"layout {body.layouts}")
        for seq, raw in enumerate(body.frames, head.first):
            data = bytes(raw)
            if head.epoch == self._before.epoch and seq in self._before.frames:
                if data != self._before.frames[seq]:
                    self.wrong.append(f"seq {seq} is not what it was: {decode_frame(raw)}")
                self.seqs.add(seq)
            elif number_of(data) is not None:
                self.wrong.append(
                    f"a scan that was never written: epoch {head.epoch} seq {seq}: {decode_frame(raw)}"
                )
            else:
                self.told += 1
        return Ack(head.epoch, ((head.first, head.last),))


async def deliver(folder: Path, receiver: _Receiver) -> float:
    """Open, send everything that can be had, close; returns how long the opening took."""
    settings = BufferSettings(max_mb=16, free_disk_mb=0, ballast_kb=0, commit_interval_s=0.001)
    clock = StillClock("boot-after")
    clock.pass_s(9000)
    began_s = time.monotonic()
    buffer = await Buffer.open(folder / "buffer.db", GATEWAY, settings, clock)
    took_s = time.monotonic() - began_s
    run = asyncio.create_task(buffer.run())
    try:
        quiet_s: float | None = None
        deadline_s = time.monotonic() + 30
        while time.monotonic() < deadline_s:
            batches = []
            for bounds in buffer.recorded():
                batches += await buffer.rebuild(bounds)
            batches += await buffer.claim(4)
            for batch in batches:
                buffer.settle(receiver.take(batch.sealed.payload))
            await buffer.commit()
            if batches or buffer.state.buffered_frames:
                quiet_s = None
                continue
            if quiet_s is None:
                quiet_s = time.monotonic()
            salvaging = [
                path
                for path in folder.glob("*.damaged-*")
                if not path.name.endswith((".told", "-wal", "-shm"))
            ]
            waiting = [path for path in salvaging if not path.with_name(path.name + ".told").exists()]
            if time.monotonic() - quiet_s > (3.0 if waiting else 0.0):
                return took_s
            await asyncio.sleep(0.01)
        raise AssertionError(f"30 s after the start not all was delivered: {buffer.state}")
    finally:
        run.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await run
        await buffer.close()


def try_buffer(base: Path, before: BufferSet, damage: Damage) -> Outcome:
    found = Outcome(damages=1)
    with tempfile.TemporaryDirectory(dir=scratch_parent()) as name:
        folder = Path(name)
        for path in base.iterdir():
            shutil.copy(path, folder)
        damage.do(folder)
        receiver = _Receiver(before)
        try:
            took_s = asyncio.run(deliver(folder, receiver))
        except Exception as err:  # noqa: BLE001 - whatever it is, it is the finding
            found.failed = 1
            found.say(damage, f"{type(err).__name__}: {err}")
            return found
        aside = list(folder.glob("*.damaged-*"))
    found.set_aside = bool(aside)
    found.slow = took_s > OPEN_S
    found.wrong = len(receiver.wrong)
    whole = {seq for seq in before.frames if not _touched(damage, before.places.get(seq, ()))}
    found.undamaged = len(whole)
    found.delivered = len(whole & receiver.seqs)
    missing = len(before.frames) - len(receiver.seqs)
    found.silent = bool(missing and not receiver.told and not aside and not _cut_short(damage))
    for text in receiver.wrong[:2]:
        found.say(damage, f"WRONG: {text}")
    if found.slow:
        found.say(damage, f"{took_s:.1f} s to open")
    if found.silent:
        found.say(damage, f"{missing} rows are missing, and nothing says so")
    if found.delivered < SHARE * found.undamaged:
        found.say(damage, f"{found.delivered} of {found.undamaged} undamaged rows delivered")
    return found


# ----------------------------------------------------------------------------------------------------------- journal


class JournalSet(msgspec.Struct):
    entries: dict[int, Entry]  #: by offset
    last_commit: int  #: where in the WAL it begins
    places: dict[int, list[tuple[str, int, int]]]


async def make_journal(folder: Path) -> JournalSet:
    """Entries in the file and in the WAL, small ones and some that overflow their page; a sink half-way."""
    rnd = random.Random(3)
    journal = SqliteJournal(folder / "journal.db", max_bytes=2**27, free_disk_bytes=0, commit_interval_s=0)
    await journal.open()
    entries: dict[int, Entry] = {}
    last_commit = 0
    seq = dict.fromkeys(("acme/plant-1", "acme/plant-2"), 1)
    try:
        for part in range(_ENTRIES // 20):
            group = []
            for _ in range(20):
                gateway = rnd.choice(list(seq))
                last = seq[gateway] + rnd.randint(0, 20)
                payload = rnd.randbytes(int(10 ** rnd.uniform(2, 4.1)))
                group.append(Entry(gateway, 5, seq[gateway], last, 10, 10**18, payload))
                seq[gateway] = last + 1 + (rnd.random() < 0.1)  # holes, so that there are many intervals
            last_commit = (folder / "journal.db-wal").stat().st_size
            for entry, done in zip(group, await journal.append(group), strict=True):
                assert done.offset is not None
                entries[done.offset] = entry
            if part == _ENTRIES // 40:
                await journal.commit("series", journal.last_offset)
        files = {
            p.name: p.read_bytes() for p in folder.iterdir() if p.name in ("journal.db", "journal.db-wal")
        }
    finally:
        await journal.close()
    for path in folder.iterdir():
        path.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    # The ends of a payload: what lies between may be in overflow pages, in pieces.
    places = _places(files, {offset: entry.payload[-60:] for offset, entry in entries.items()})
    return JournalSet(entries, last_commit, places)


async def read_all(path: Path) -> tuple[dict[int, Entry], int]:
    """All that a sink without a cursor is given, and how many damages it was told."""
    journal = SqliteJournal(path, max_bytes=2**27, free_disk_bytes=0, commit_interval_s=0)
    await journal.open()
    found: dict[int, Entry] = {}
    told = after = 0
    try:
        while after < journal.last_offset:
            try:
                rows = await journal.read(after, max_entries=100, max_bytes=2**24)
            except EntryDamaged as err:
                told += 1
                if err.offset <= after:
                    raise AssertionError("a reader would not get past it") from err
                after = err.offset
                continue
            if not rows:
                break
            for row in rows:
                found[row.offset] = Entry(
                    row.gateway, row.epoch, row.first, row.last, row.readings, row.received_at_ns, row.payload
                )
            after = rows[-1].offset
        # What was acknowledged is never taken for new; what never came is never taken for held.
        probe = Entry("acme/plant-1", 5, 10**6, 10**6 + 5, 10, 10**18, b"new")
        [done] = await journal.append([probe])
        if done.fresh != ((10**6, 10**6 + 5),):
            raise AssertionError(f"new frames are taken for held: {done}")
    finally:
        await journal.close()
    return found, told


def try_journal(base: Path, before: JournalSet, damage: Damage) -> Outcome:
    found = Outcome(damages=1)
    with tempfile.TemporaryDirectory(dir=scratch_parent()) as name:
        folder = Path(name)
        for path in base.iterdir():
            shutil.copy(path, folder)
        damage.do(folder)
        path, told = folder / "journal.db", 0
        try:
            try:
                got, told = asyncio.run(read_all(path))
            except JournalBroken as err:
                if "journal salvage" not in str(err):
                    found.failed = 1
                    found.say(damage, f"refused without the remedy: {err}")
                    return found
                found.set_aside = 1
                told += 1
                done = salvage(path)
                got, _ = asyncio.run(read_all(path))
                if not done.damaged.exists():
                    raise AssertionError("the damaged file was not kept") from err
        except (JournalError, AssertionError, OSError) as err:
            found.failed = 1
            found.say(damage, f"{type(err).__name__}: {err}")
            return found
    for offset, entry in got.items():
        if before.entries.get(offset) != entry:
            found.wrong += 1
            found.say(damage, f"WRONG: offset {offset}")
    whole = {offset for offset in before.entries if not _touched(damage, before.places.get(offset, ()))}
    found.undamaged, found.delivered = len(whole), len(whole & got.keys())
    missing = len(before.entries.keys() - got.keys())
    found.silent = bool(missing and not told and not _untellable(damage, before.last_commit))
    if found.silent:
        found.say(damage, f"{missing} entries are missing, and nothing says so")
    if found.delivered < SHARE * found.undamaged:
        found.say(damage, f"{found.delivered} of {found.undamaged} undamaged entries read")
    return found


# --------------------------------------------------------------------------------------------------------------- all


def _share(job: tuple[str, str, BufferSet | JournalSet, list[Damage]]) -> Outcome:
    logging.disable(logging.CRITICAL)
    _, base, before, some = job
    total = Outcome()
    for damage in some:
        if isinstance(before, BufferSet):
            total.add(try_buffer(Path(base), before, damage))
        else:
            total.add(try_journal(Path(base), before, damage))
    return total


def explore(subject: str, *, count: int, seed: int, processes: int) -> Outcome:
    with tempfile.TemporaryDirectory(dir=scratch_parent()) as name:
        base = Path(name)
        before = make_buffer(base) if subject == "buffer" else asyncio.run(make_journal(base))
        chosen = damages(base, count, seed)
        if processes == 1:
            return _share((subject, name, before, chosen))
        total = Outcome()
        jobs = [(subject, name, before, chosen[i::processes]) for i in range(processes)]
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            for one in pool.imap_unordered(_share, jobs):
                total.add(one)
        return total


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture.rot", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--damages", type=int, default=1000, help="per subject")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=SUBJECTS)
    parser.add_argument(
        "--processes", type=int, default=2 * (os.cpu_count() or 1), help="more than cores: some damages wait"
    )
    parser.add_argument("--record", action="store_true", help="write the figures for docs/reliability.md")
    args = parser.parse_args(argv)
    began_s = time.monotonic()
    passed = True
    figures: dict[str, int | float | str] = {}
    print(f"seed {args.seed}", flush=True)
    for subject in [args.only] if args.only else SUBJECTS:
        found = explore(subject, count=args.damages, seed=args.seed, processes=args.processes)
        passed = passed and found.passed
        print(
            f"{subject}: {found.damages} damages, {found.set_aside} set aside; wrong {found.wrong}, silent"
            f" {found.silent}, slow {found.slow}, failed {found.failed}; {found.share:.2%} of {found.undamaged}"
            " undamaged rows delivered",
            *found.first, sep="\n  ", flush=True,
        )  # fmt: skip
        figures |= {
            f"{subject}: damages": found.damages,
            f"{subject}: wrong readings delivered": found.wrong,
            f"{subject}: losses that nothing told": found.silent,
            f"{subject}: undamaged rows delivered, %": round(100 * found.share, 2),
            f"{subject}: starts that failed or took more than {OPEN_S:.0f} s": found.failed + found.slow,
        }
    if args.record:
        finding = Finding(
            proof="rot", promise="what rots on the disk is never delivered as a reading, and what did not rot is",
            command=f"python -m tests.torture.rot --damages {args.damages} --seed {args.seed}",
            passed=passed, figures=figures, seed=args.seed, took_s=time.monotonic() - began_s,
        )  # fmt: skip
        record(finding)
    print("rot:", "passed" if passed else "FAILED", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
