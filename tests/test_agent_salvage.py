"""A damaged buffer: what is good in it comes back under its own epoch and seqs, once; what is lost is counted."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.buffer import Buffer
from agent.salvage import (
    Progress,
    Salvaged,
    Seqs,
    Wreck,
    damaged_sets,
    drop_damaged,
    missing,
    salvaged_path,
    shares,
    tell,
)
from agent.store import PAGE_BYTES, Group, Limits, Store, note_account, noted_account
from config.agent import Buffer as BufferSettings
from tests.fakes.buffer import (
    GATEWAY,
    READINGS,
    ModelCloud,
    StillClock,
    group,
    opened,
    scan,
)
from tests.fakes.running_buffer import running

SCANS = 12_000
SETTINGS = BufferSettings(commit_interval_s=0.05, ballast_kb=0, free_disk_mb=0)
EMPTY = Group([], [])
Hurt = Callable[[Path], None]


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where the machine has such a place."""
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    path = Path(tempfile.mkdtemp(prefix="headgate-salvage-", dir=base))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def filled(folder: Path, cloud: ModelCloud, scans: int = SCANS, size: int = 100) -> tuple[int, int]:
    """A buffer file of which the cloud has had the front, and one batch more whose ack never came; its epoch, and how
    many frames it holds."""
    store = opened(folder)
    for n in range(0, scans, 100):
        store.commit(group(*range(n, min(n + 100, scans)), size=size), [], 0)
    [one, two] = store.claim(2, [])
    store.commit(EMPTY, list(cloud.take(one.sealed.payload).ranges), 0)
    cloud.take(two.sealed.payload)
    epoch, held = store.ledger.epoch, store.ledger.held_frames
    store.close()
    return epoch, held


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def root_of(path: Path, table: str) -> int:
    conn = sqlite3.connect(path)
    try:
        page: int = conn.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,)).fetchone()[0]
        conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    finally:
        conn.close()
    return page


def zero_root(table: str) -> Hurt:
    def hurt(path: Path) -> None:
        overwrite(path, (root_of(path, table) - 1) * PAGE_BYTES, bytes(PAGE_BYTES))

    return hurt


def zero_header(path: Path) -> None:
    root_of(path, "frames")
    overwrite(path, 0, bytes(100))


def zero_pages(path: Path) -> None:
    """In the last third, where the rows are that were not settled."""
    root_of(path, "frames")
    pages = path.stat().st_size // PAGE_BYTES
    for number in (pages * 2 // 3, pages * 2 // 3 + 1, pages - 5):
        overwrite(path, number * PAGE_BYTES, bytes(PAGE_BYTES))


def cut_off(path: Path) -> None:
    root_of(path, "frames")
    os.truncate(path, path.stat().st_size * 3 // 4 // PAGE_BYTES * PAGE_BYTES)


def scribble(path: Path) -> None:
    """Noise over a tenth of the pages, the header among them."""
    root_of(path, "frames")
    rng = random.Random(5)
    overwrite(path, 0, rng.randbytes(PAGE_BYTES))
    for number in rng.sample(
        range(1, path.stat().st_size // PAGE_BYTES), path.stat().st_size // PAGE_BYTES // 10
    ):
        overwrite(path, number * PAGE_BYTES + 7, rng.randbytes(PAGE_BYTES - 7))


async def send_all(buffer: Buffer, cloud: ModelCloud) -> None:
    for one in buffer.recorded():
        for batch in await buffer.rebuild(one):
            buffer.settle(cloud.take(batch.sealed.payload))
    for batch in await buffer.claim(8):
        buffer.settle(cloud.take(batch.sealed.payload))
    await buffer.commit()


async def deliver(folder: Path, buffer: Buffer, cloud: ModelCloud, within_s: float = 60.0) -> None:
    """Until every damaged set is told and nothing is held."""
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        await send_all(buffer, cloud)
        sets = damaged_sets(folder / "buffer.db")
        if (
            sets
            and all(one.told for one in sets)
            and not buffer.state.old
            and not buffer.state.buffered_frames
        ):
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"not all came: {buffer.state}, {damaged_sets(folder / 'buffer.db')}")


def lost_by_gaps(cloud: ModelCloud, epoch: int) -> tuple[int, int]:
    """Frames and readings that gaps report of `epoch`, less what the cloud holds of their ranges."""
    frames = readings = 0
    for gap in cloud.gaps():
        if gap.epoch == epoch and gap.reason == "corrupt":
            held = sum((epoch, seq) in cloud.held for seq in range(gap.first, gap.last + 1))
            frames += gap.last - gap.first + 1 - held
            readings += gap.readings - held * READINGS
    return frames, readings


# --- arithmetic ---


def test_seqs_found_in_any_order_are_kept_as_ranges() -> None:
    rng, seqs = random.Random(3), Seqs()
    numbers = rng.sample(range(1, 400), 300)
    assert all(seqs.add(n) for n in numbers)
    assert not seqs.add(numbers[7])
    assert [n for first, last in seqs.ranges for n in range(first, last + 1)] == sorted(numbers)
    assert all((n in seqs) == (n in set(numbers)) for n in range(402))
    assert len(Seqs([(1, 5), (7, 9)]).ranges) == 2


def test_what_is_missing_is_what_was_held_last_and_was_not_found() -> None:
    found = Seqs([(11, 20), (25, 30)])
    assert missing(found, 0, 30, 4) == [(21, 24)]
    assert missing(found, 0, 33, 7) == [(21, 24), (31, 33)]
    assert missing(found, 0, 30, 6) == [(9, 10), (21, 24)]  # more is lost than the holes hold: the oldest
    assert missing(found, 1, 30, 4) == [(21, 24)]  # a query failed from 1 on; what was settled is no loss
    assert missing(found, 0, 30, 0) == []
    assert missing(found, 0, 0, None) == [(21, 24)]
    assert missing(Seqs(), 0, 30, 10) == [(21, 30)]
    assert missing(Seqs(), 0, 0, None) == []


def test_a_total_is_shared_without_losing_any() -> None:
    assert shares(10, [1, 1, 1]) == [3, 3, 4]
    assert shares(7, []) == []
    assert sum(shares(1_000_003, [5, 9, 2, 1])) == 1_000_003


# --- salvage ---


@pytest.mark.parametrize(
    ("hurt", "lost_share"),
    [
        (zero_header, 0.0),
        (zero_root("ledger"), 0.0),
        (zero_root("layouts"), 0.0),
        (zero_root("clock"), 0.0),
        (zero_root("frames"), 0.0),
        (zero_pages, 0.02),
        (cut_off, 0.5),
        (scribble, 0.25),
    ],
    ids=["header", "ledger", "layouts", "clock", "frames", "pages", "cut", "scribble"],
)
async def test_what_is_not_damaged_comes_back_once_and_the_rest_is_a_counted_gap(
    folder: Path, hurt: Hurt, lost_share: float
) -> None:
    cloud = ModelCloud()
    epoch, held = filled(folder, cloud)
    hurt(folder / "buffer.db")
    began_s = time.monotonic()
    cloud.needs_clocks = False
    async with running(folder, SETTINGS) as buffer:
        assert time.monotonic() - began_s < 5.0
        assert buffer.epoch != epoch
        assert buffer.append(scan(SCANS, boot=buffer.boot), READINGS)
        await deliver(folder, buffer, cloud)
    numbers = cloud.numbers()
    assert len(numbers) == len(set(numbers))
    assert SCANS in numbers
    lost = SCANS + 1 - len(numbers)
    assert lost <= held * lost_share
    if hurt is not scribble:  # there the ledger may be gone too, and the loss is an estimate
        assert lost_by_gaps(cloud, epoch) == (lost, lost * READINGS)
    assert not list(folder.glob("*.salvaged-*"))


async def test_the_newest_rows_come_from_the_wal_where_the_file_lacks_them(folder: Path) -> None:
    cloud = ModelCloud()
    filled(folder, cloud)
    clean = folder / "clean"
    clean.mkdir()
    store = opened(folder)
    store.commit(group(*range(SCANS, SCANS + 50)), [], 0)
    for name in ("buffer.db", "buffer.db-wal", "buffer.db.epoch"):  # as a power cut leaves it
        shutil.copy(folder / name, clean / name)
    store.close()
    wal = clean / "buffer.db-wal"
    overwrite(wal, 32 + 24 + PAGE_BYTES // 2, b"rot" * 50)  # its first frame: SQLite believes none behind it
    overwrite(clean / "buffer.db", 0, bytes(16))
    async with running(clean, SETTINGS) as buffer:
        await deliver(clean, buffer, cloud)
    numbers = set(cloud.numbers())
    assert numbers >= set(range(SCANS))
    assert len(numbers & set(range(SCANS, SCANS + 50))) >= 40


async def test_rows_with_a_wrong_crc_are_never_delivered(folder: Path) -> None:
    cloud = ModelCloud()
    epoch, _ = filled(folder, cloud)
    conn = sqlite3.connect(folder / "buffer.db")
    bad = [n for (n,) in conn.execute("SELECT seq FROM frames ORDER BY seq DESC LIMIT 500")][::50]
    conn.executemany("UPDATE frames SET data = zeroblob(length(data)) WHERE seq = ?", [(n,) for n in bad])
    conn.commit()
    conn.close()
    zero_root("parked")(folder / "buffer.db")
    async with running(folder, SETTINGS) as buffer:
        assert buffer.epoch != epoch
        await deliver(folder, buffer, cloud)
    assert not any((epoch, seq) in cloud.held for seq in bad)
    assert len(cloud.numbers()) == SCANS - len(bad)
    assert lost_by_gaps(cloud, epoch) == (len(bad), len(bad) * READINGS)


async def test_what_happens_while_it_runs_is_salvaged_while_new_readings_go_on(folder: Path) -> None:
    cloud = ModelCloud()
    filled(folder, cloud)
    async with running(folder, SETTINGS) as buffer:
        epoch = buffer.epoch
        [under_way] = await buffer.claim(1)
        buffer._store._damage = "made"  # as upkeep finds it; the next transaction replaces the file
        buffer.append(scan(SCANS, boot=buffer.boot), READINGS)
        assert await buffer.commit()
        assert buffer.epoch != epoch
        assert (
            await buffer.rebuild(under_way.bounds) == []
        )  # its file is set aside; it comes again from there
        assert await buffer.park(epoch, under_way.bounds.first, "body", "no") is True
        await deliver(folder, buffer, cloud)
    assert sorted(cloud.numbers()) == [*range(SCANS + 1)]
    assert lost_by_gaps(cloud, epoch) == (0, 0)


async def test_the_live_lane_is_not_held_up_by_salvage(folder: Path) -> None:
    cloud = ModelCloud()
    filled(folder, cloud, scans=40_000)
    zero_header(folder / "buffer.db")
    slowest_s = 0.0
    async with running(folder, SETTINGS) as buffer:
        number = 40_000
        while not any(one.told for one in damaged_sets(folder / "buffer.db")):
            buffer.append(scan(number, boot=buffer.boot), READINGS)
            number += 1
            began_s = time.monotonic()
            await buffer.commit()
            slowest_s = max(slowest_s, time.monotonic() - began_s)
            await asyncio.sleep(0.005)
            await send_all(buffer, cloud)
            assert number < 60_000
    assert slowest_s < 2.0, slowest_s


# --- kills ---


def salvage_store(damaged: Path, wreck: Wreck) -> Salvaged:
    store = Salvaged(
        salvaged_path(damaged), str(GATEWAY), Limits(max_bytes=64 * 2**20), StillClock(), wreck.known()
    )
    store.open()
    return store


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_kill_at_any_moment_of_salvage_resumes_there_and_neither_loses_nor_doubles(
    folder: Path, seed: int
) -> None:
    """The process ends without closing anything: what is on disk is all that the next one has."""
    cloud, rng = ModelCloud(), random.Random(seed)
    _, held = filled(folder, cloud)
    zero_root("frames")(folder / "buffer.db")
    damaged = folder / "buffer.db.damaged-x"
    for tail in ("", ".epoch"):
        (folder / f"buffer.db{tail}").rename(folder / f"buffer.db.damaged-x{tail}")
    kills = 0
    positions: list[tuple[str, int]] = []
    while True:
        wreck = Wreck(damaged)
        wreck.open()
        store = salvage_store(damaged, wreck)
        positions.append((store.progress.phase, store.progress.position))
        for _ in range(rng.randint(1, 4)):
            if store.done:
                break
            look = wreck.walk if store.progress.phase == "walk" else None
            at = store.progress.position
            portion = look(at) if look else wreck.carve(at, store.wanted)
            store.take(portion, lambda key: None)
            if rng.random() < 0.5:
                settled = [r for b in store.claim(1, []) for r in cloud.take(b.sealed.payload).ranges]
                if rng.random() < 0.8:
                    store.commit(EMPTY, settled, 0)
        wreck.close()
        done = store.done
        # What a kill leaves: the files as they are now, no checkpoint, nothing closed.
        left = folder / f"left-{kills}"
        left.mkdir()
        for path in folder.glob("buffer.db.salvaged-x*"):
            shutil.copy(path, left / path.name)
        store.close()
        for path in folder.glob("buffer.db.salvaged-x*"):
            path.unlink()
        for path in left.glob("buffer.db.salvaged-x*"):
            if not path.name.endswith("-shm"):
                shutil.copy(path, folder / path.name)
        kills += 1
        if done:
            break
    assert kills >= 2
    wreck = Wreck(damaged)
    wreck.open()
    store = salvage_store(damaged, wreck)
    assert store.done
    assert store.progress.found_frames == held
    for _ in range(100):
        settled = [r for b in store.claim(8, []) for r in cloud.take(b.sealed.payload).ranges]
        for r in store.recorded():
            settled += [
                x for b in store.rebuild(r.first, r.last) for x in cloud.take(b.sealed.payload).ranges
            ]
        store.commit(EMPTY, settled, 0)
        if store.empty:
            break
    led = store.ledger
    assert led.held_frames == 0
    assert led.kept_frames == led.settled_frames + led.gapped_frames == SCANS
    assert sorted(cloud.numbers()) == [*range(SCANS)]
    store.close()
    wreck.close()


async def test_a_salvaged_file_that_is_damaged_itself_is_made_again(folder: Path) -> None:
    cloud = ModelCloud()
    filled(folder, cloud)
    zero_header(folder / "buffer.db")
    async with running(folder, SETTINGS) as buffer:
        deadline_s = time.monotonic() + 30
        while not buffer.state.old or buffer.state.old[0].phase != "done":
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.01)
    [path] = [p for p in folder.glob("buffer.db.salvaged-*") if not p.name.endswith(("-wal", "-shm"))]
    overwrite(path, 0, bytes(PAGE_BYTES))
    async with running(folder, SETTINGS) as buffer:
        await deliver(folder, buffer, cloud)
    assert sorted(cloud.numbers()) == [*range(SCANS)]


async def test_several_damaged_files_come_back_one_after_the_other(folder: Path) -> None:
    cloud = ModelCloud()
    epochs = []
    for begin in (0, 2000, 4000):
        store = opened(folder)
        epochs.append(store.ledger.epoch)
        for n in range(begin, begin + 2000, 100):
            store.commit(group(*range(n, n + 100), boot=store.ledger.boot), [], 0)
        store.close()
        zero_header(folder / "buffer.db")
    assert len(set(epochs)) == 3
    async with running(folder, SETTINGS) as buffer:
        await deliver(folder, buffer, cloud)
    assert sorted(cloud.numbers()) == [*range(6000)]
    assert len(damaged_sets(folder / "buffer.db")) == 3


async def test_a_file_of_which_nothing_can_be_known_is_told_and_kept(folder: Path) -> None:
    cloud = ModelCloud()
    filled(folder, cloud)
    (folder / "buffer.db.epoch").unlink()
    (folder / "buffer.db").write_bytes(random.Random(1).randbytes(100_000))
    async with running(folder, SETTINGS) as buffer:
        await deliver(folder, buffer, cloud)
    [one] = damaged_sets(folder / "buffer.db")
    assert "nothing can be salvaged" in one.told
    assert any(event.code == "salvage_failed" for event in cloud.events())
    assert any(gap.reason == "corrupt" for gap in cloud.gaps())


def test_the_epoch_is_noted_and_a_note_that_was_changed_is_not_believed(folder: Path) -> None:
    store = opened(folder)
    said = noted_account(store.path)
    assert said is not None
    assert said.epoch == store.ledger.epoch
    note = folder / "buffer.db.epoch"
    note.write_text(note.read_text().replace("1", "2", 1) if "1" in note.read_text() else "7 7")
    assert noted_account(store.path) is None
    note_account(store.path, store.ledger)
    said = noted_account(store.path)
    assert said is not None
    assert said.next_seq == store.ledger.next_seq
    store.close()


@pytest.mark.parametrize("column", ["epoch", "next_seq", "kept_frames"])
def test_a_ledger_that_contradicts_itself_is_damage(folder: Path, column: str) -> None:
    store = opened(folder)
    store.commit(group(1, 2, 3), [], 0)
    epoch = store.ledger.epoch
    store.close()
    conn = sqlite3.connect(folder / "buffer.db")
    conn.execute(f"UPDATE ledger SET {column} = {column} + 8")
    conn.commit()
    conn.close()
    store = opened(folder)
    assert store.ledger.epoch not in (epoch, epoch + 8)
    assert len(damaged_sets(folder / "buffer.db")) == 1
    store.close()


def test_a_renaming_that_was_cut_short_is_finished_at_the_next_start(folder: Path) -> None:
    store = opened(folder)
    store.commit(group(1, 2, 3), [], 0)
    for name in ("buffer.db", "buffer.db-wal", "buffer.db.epoch"):
        shutil.copy(folder / name, folder / f"copy-{name}")
    store.close()
    for name in ("buffer.db", "buffer.db-wal", "buffer.db.epoch"):
        (folder / f"copy-{name}").rename(folder / name)
    (folder / "buffer.db").rename(folder / "buffer.db.damaged-x")
    store = opened(folder)
    assert (folder / "buffer.db.damaged-x-wal").exists()
    wreck = Wreck(folder / "buffer.db.damaged-x")
    wreck.open()
    assert len(wreck.walk(1).rows) == 3
    wreck.close()
    store.close()


def test_only_sets_that_are_done_with_are_dropped_oldest_first(folder: Path) -> None:
    buffer = folder / "buffer.db"
    for name in "abc":
        (folder / f"buffer.db.damaged-{name}").write_bytes(bytes(1000))
    assert drop_damaged(buffer) == []
    tell(folder / "buffer.db.damaged-a", "done")
    tell(folder / "buffer.db.damaged-b", "done")
    assert [one.path.name[-1] for one in drop_damaged(buffer, keep_bytes=2000, keep_sets=8)] == ["a"]
    assert [one.path.name[-1] for one in drop_damaged(buffer)] == ["b"]
    assert [one.path.name[-1] for one in damaged_sets(buffer)] == ["c"]


def test_progress_survives_its_own_encoding() -> None:
    import msgspec

    progress = Progress("carve", 7, [(1, 2)], 3, 6)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(progress), type=Progress) == progress
    assert issubclass(Salvaged, Store)
