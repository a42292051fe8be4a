"""The buffer's file: nothing kept is lost, nothing is sent twice as something else, every drop is told."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agent.store import (
    Batch,
    Group,
    Limits,
    Store,
    StoreFull,
    StoreRefusing,
    StoreUnusable,
    joined,
    parts,
    without,
)
from sync.wire import MAX_BATCH_BYTES, EventFrame, GapFrame, encode_frame, open_body
from tests.fakes.buffer import (
    GATEWAY,
    READINGS,
    Failing,
    ModelCloud,
    StillClock,
    bounds,
    drain,
    group,
    number_of,
    opened,
    scan,
)

EMPTY = Group([], [])


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where the machine has such a place: these tests are about order, not about the disk."""
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    path = Path(tempfile.mkdtemp(prefix="headgate-store-", dir=base))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def rows(store: Store) -> int:
    conn = sqlite3.connect(f"file:{store.path}?mode=ro", uri=True)
    try:
        return int(conn.execute("SELECT count(*) FROM frames").fetchone()[0])
    finally:
        conn.close()


# --- arithmetic ---


def test_frames_are_cut_into_the_fewest_parts_of_about_equal_size() -> None:
    assert parts([], 10) == []
    assert parts([3, 3], 10) == [(0, 2)]
    assert parts([5] * 5, 10) == [(0, 2), (2, 4), (4, 5)]
    assert parts([100, 1, 1], 10) == [(0, 1), (1, 3)]  # too large by itself: alone


def test_ranges_are_taken_out_of_a_range() -> None:
    assert without((1, 10), []) == [(1, 10)]
    assert without((1, 10), [(3, 4), (4, 6)]) == [(1, 2), (7, 10)]
    assert without((1, 10), [(0, 99)]) == []
    assert without((5, 5), [(5, 5)]) == []


def test_neighbouring_gaps_become_one_and_others_do_not() -> None:
    def gap(first: int, last: int, boot: int = 1) -> GapFrame:
        return GapFrame(7, first, last, last - first + 1, last - first + 1, "evicted", "d", boot, first, last)

    assert joined([gap(1, 2)], [gap(3, 5)]) == [gap(1, 5)]
    assert joined([gap(1, 2)], [gap(4, 5)]) == [gap(1, 2), gap(4, 5)]
    assert joined([gap(1, 2)], [gap(3, 5, boot=2)]) == [gap(1, 2), gap(3, 5, boot=2)]


# --- keeping and sending ---


def test_what_is_kept_is_there_after_a_restart_and_goes_out_once(folder: Path) -> None:
    store, cloud = opened(folder), ModelCloud()
    for n in range(0, 100, 10):
        assert store.commit(group(*range(n, n + 10)), [], 0) == []
    epoch = store.ledger.epoch
    store.close()
    store = opened(folder)
    assert store.ledger.epoch == epoch
    assert store.ledger.held_readings == 100 * READINGS
    drain(store, cloud)
    assert cloud.numbers() == list(range(100))
    assert store.ledger.settled_readings == 100 * READINGS
    store.close()


def test_the_live_lane_is_cut_in_the_commit_and_sent_again_with_the_same_bytes(folder: Path) -> None:
    clock = StillClock()
    store = opened(folder, clock)
    [live] = store.commit(group(1, 2, 3), [], 4)
    assert [number_of(f) for f in open_body(live.sealed.payload)[1].frames] == [1, 2, 3]
    clock.pass_s(3600)  # new clock rows must not change a batch that has its bytes
    store.commit(Group([], [], clocks=[clock.read()]), [], 4)
    assert store.rebuild(*bounds(live)) == [live]
    store.close()
    store = opened(folder, clock)
    assert [(r.first, r.last) for r in store.recorded()] == [bounds(live)]
    assert store.rebuild(*bounds(live)) == [live]
    store.close()


def test_seqs_are_never_used_again_after_the_table_empties(folder: Path) -> None:
    store, cloud = opened(folder), ModelCloud()
    store.commit(group(1, 2, 3), [], 0)
    drain(store, cloud)
    store.close()
    store = opened(folder)
    [live] = store.commit(group(4), [], 1)
    assert live.sealed.first == 4
    store.close()


def test_an_ack_may_cover_more_or_less_than_a_batch(folder: Path) -> None:
    store, cloud = opened(folder), ModelCloud()
    for n in range(4):
        store.commit(group(*range(10 * n, 10 * n + 10)), [], 1)
    assert len(store.recorded()) == 4
    store.commit(EMPTY, [(1, 15), (38, 99)], 0)
    assert [(r.first, r.last, r.readings) for r in store.recorded()] == [
        (16, 20, 5 * READINGS), (21, 30, 10 * READINGS), (31, 37, 7 * READINGS),
    ]  # fmt: skip
    store.commit(EMPTY, [(1, 15)], 0)  # again: nothing is counted twice
    assert store.ledger.settled_frames == 18
    drain(store, cloud)
    assert cloud.numbers() == list(range(15, 37))
    store.close()


def test_a_backlog_is_cut_oldest_first_around_what_is_on_its_way(folder: Path) -> None:
    store = opened(folder)
    store.commit(group(1, 2), [], 0)
    [live] = store.commit(group(3, 4), [], 1)
    store.commit(group(5), [], 0)
    assert [bounds(b) for b in store.claim(9, [])] == [(1, 2), (5, 5)]
    assert store.claim(9, []) == []
    assert bounds(live) == (3, 4)
    store.close()


def test_batches_fit_the_wire_however_large_the_backlog(folder: Path) -> None:
    store, cloud = opened(folder), ModelCloud()
    rng = random.Random(1)
    for n in range(0, 2000, 100):
        store.commit(group(*range(n, n + 100), size=rng.randrange(3000)), [], 1)
    sizes = [len(b.sealed.payload) for b in store.claim(50, [])]
    assert sizes
    assert max(sizes) <= MAX_BATCH_BYTES
    drain(store, cloud)
    assert cloud.numbers() == list(range(2000))
    store.close()


def test_a_refused_batch_is_halved_down_to_the_frame_and_only_that_one_is_parked(folder: Path) -> None:
    store, cloud = opened(folder), ModelCloud()
    [batch] = store.commit(group(*range(16)), [], 1)
    poison, tries = 11, 0
    todo = [batch]
    while todo:
        batch = todo.pop()
        tries += 1
        first, last = bounds(batch)
        if poison not in [number_of(f) for f in open_body(batch.sealed.payload)[1].frames]:
            store.commit(EMPTY, cloud.take(batch.sealed.payload).ranges, 0)
        elif first < last:
            todo += store.split(first, last)
        else:
            assert store.park(first, "body", "it will not do") == READINGS
    assert tries <= 2 * 4 + 1
    drain(store, cloud)
    assert cloud.numbers() == [n for n in range(16) if n != poison]
    [gap] = cloud.gaps()
    assert (gap.first, gap.last, gap.scans, gap.readings, gap.reason) == (12, 12, 1, READINGS, "refused")
    assert store.parked == 1
    store.close()
    conn = sqlite3.connect(folder / "buffer.db")
    assert conn.execute("SELECT seq, code, reason FROM parked").fetchall() == [(12, "body", "it will not do")]
    conn.close()


# --- the cap ---


def test_at_the_cap_the_oldest_go_first_and_every_one_is_told(folder: Path) -> None:
    cap = 2 * 2**20
    store, cloud = opened(folder, max_bytes=cap), ModelCloud()
    largest = 0
    for n in range(0, 6000, 50):
        store.commit(group(*range(n, n + 50), size=1000), [], 0)
        largest = max(largest, store.size_bytes())
    assert largest <= cap
    led = store.ledger
    assert led.gapped_readings > 0
    assert led.kept_frames == led.settled_frames + led.gapped_frames + rows(store)
    gapped, kept = led.gapped_readings, led.kept_readings
    drain(store, cloud)
    stored = cloud.numbers()
    assert stored == list(range(stored[0], 6000))  # the newest, unbroken
    assert sum(g.readings for g in cloud.gaps()) == gapped
    assert len(stored) * READINGS + gapped == kept
    assert {g.reason for g in cloud.gaps()} == {"evicted"}
    assert {g.device for g in cloud.gaps()} == {"boiler"}
    store.close()


def test_under_a_smaller_cap_the_oldest_go_over_some_commits_none_long_and_every_one_is_told(
    folder: Path,
) -> None:
    store = opened(folder, max_bytes=64 * 2**20)
    for n in range(0, 40_000, 1000):
        store.commit(group(*range(n, n + 1000), size=1000), [], 0)
    before = store.size_bytes()
    store.close()
    store, most, n = opened(folder, max_bytes=8 * 2**20), 0, 40_000
    while n == 40_000 or store.evicting:
        gapped = store.ledger.gapped_frames
        store.commit(group(n), [], 0)
        most, n = max(most, store.ledger.gapped_frames - gapped), n + 1
        assert n < 40_020
        assert store.size_bytes() <= before + 8 * 2**20  # what goes makes room within the file
        if n == 40_002:  # the power goes half-way
            shutil.copytree(folder, folder / "cut")
    store.commit(group(n), [], 0)
    assert not store.evicting
    assert n > 40_002
    assert most < 10_000
    for each in (store, opened(folder / "cut", max_bytes=8 * 2**20)):
        cloud = ModelCloud()
        drain(each, cloud)
        kept = each.ledger.kept_readings
        stored = cloud.numbers()
        assert stored == list(range(stored[0], kept // READINGS))  # the newest, unbroken
        assert sum(g.readings for g in cloud.gaps()) + len(stored) * READINGS == kept
        assert {g.reason for g in cloud.gaps()} == {"evicted"}
        each.close()


def test_what_may_have_been_sent_is_never_evicted(folder: Path) -> None:
    store, cloud = opened(folder, max_bytes=2 * 2**20), ModelCloud()
    [first] = store.commit(group(*range(50), size=1000), [], 1)
    cloud.take(first.sealed.payload)  # the ack is lost
    for n in range(50, 4000, 50):
        store.commit(group(*range(n, n + 50), size=1000), [], 0)
    assert store.rebuild(*bounds(first)) == [first]
    drain(store, cloud)
    told = {n for g in cloud.gaps() for n in range(g.first, g.last + 1)}
    held = {seq for _, seq in cloud.held}
    assert not told & held
    store.close()


def test_a_buffer_full_of_unacknowledged_batches_refuses_rather_than_forgets(folder: Path) -> None:
    store, cloud = opened(folder, max_bytes=2**20), ModelCloud()
    store._may_record = lambda led: True  # type: ignore[method-assign]  # as if the window knew no bound

    def fill() -> None:
        for n in range(0, 4000, 20):
            store.commit(group(*range(n, n + 20), size=1000), [], 99)

    with pytest.raises(StoreRefusing, match="max_mb"):
        fill()
    assert store.ledger.gapped_frames == 0
    drain(store, cloud)
    store.commit(group(5000), [], 0)  # and with the acks there is room again
    store.close()


def test_the_file_shrinks_once_it_is_drained(folder: Path) -> None:
    store, cloud = opened(folder, max_bytes=64 * 2**20), ModelCloud()
    for n in range(0, 20_000, 1000):
        store.commit(group(*range(n, n + 1000), size=1000), [], 0)
    full = store.size_bytes()
    drain(store, cloud)
    for n in range(2000):
        store.commit(group(n), [], 0)
    assert full > 20 * 2**20
    assert store.size_bytes() < full / 2
    store.close()


def test_readings_beyond_the_age_limit_go_and_are_told(folder: Path) -> None:
    clock, day_ns = StillClock(), 86_400 * 10**9
    store, cloud = opened(folder, clock, max_age_ns=7 * day_ns), ModelCloud()
    store.commit(group(1, 2), [], 0)
    clock.pass_s(3 * 86_400)
    store.commit(Group(*_parts_of(group(3)), clocks=[clock.read()], size_bytes=100), [], 0)
    clock.pass_s(8 * 86_400)
    store.commit(Group(*_parts_of(group(4)), clocks=[clock.read()], size_bytes=100), [], 0)
    drain(store, cloud)
    assert cloud.numbers() == [3, 4]
    [gap] = cloud.gaps()
    assert (gap.reason, gap.scans, gap.readings) == ("expired", 2, 2 * READINGS)
    store.close()


def test_an_unsynchronized_clock_expires_nothing_across_boots(folder: Path) -> None:
    clock = StillClock()
    store, cloud = opened(folder, clock, max_age_ns=10**9), ModelCloud()
    store.commit(group(1), [], 0)
    store.close()
    clock = StillClock("boot-b")
    clock.synchronized = False
    clock.pass_s(10 * 86_400)
    store = opened(folder, clock, max_age_ns=10**9)
    store.commit(group(2, boot=2), [], 0)
    drain(store, cloud)
    assert cloud.numbers() == [1, 2]
    store.close()


def _parts_of(made: Group) -> tuple[list[bytes], list[int]]:
    return made.frames, made.readings


# --- boots and clocks ---


def test_each_boot_has_its_number_and_each_batch_the_clock_row_of_its_boots(folder: Path) -> None:
    clock, cloud = StillClock(), ModelCloud()
    store = opened(folder, clock)
    store.commit(group(1), [], 0)
    store.close()
    store = opened(folder, clock)  # the agent restarts, the machine does not
    assert store.ledger.boot == 1
    store.close()
    later = StillClock("boot-b")
    later.offset_ns += 5 * 10**9
    store = opened(folder, later)
    assert store.ledger.boot == 2
    store.commit(group(2, boot=2), [], 0)
    [batch] = store.claim(1, [])
    clocks = open_body(batch.sealed.payload)[1].clocks
    assert [(row.boot, row.boot_id) for row in clocks] == [(1, "boot-a"), (2, "boot-b")]
    cloud.take(batch.sealed.payload)
    store.close()


def test_the_clock_table_does_not_grow_with_the_minutes(folder: Path) -> None:
    clock = StillClock()
    store = opened(folder, clock)
    for n in range(600):
        clock.pass_s(60)
        store.commit(Group(*_parts_of(group(n)), clocks=[clock.read()]), [], 0)
    store.close()
    conn = sqlite3.connect(folder / "buffer.db")
    assert conn.execute("SELECT count(*) FROM clock").fetchone()[0] <= 600 / 60 + 3
    assert conn.execute("SELECT max(boot_ns) FROM clock").fetchone()[0] == clock.boot_ns()
    conn.close()


# --- damage ---


def flip(path: Path, seq: int) -> None:
    """One bit of one row's data, as SQLite would never notice it."""
    conn = sqlite3.connect(path)
    data = bytearray(conn.execute("SELECT data FROM frames WHERE seq = ?", (seq,)).fetchone()[0])
    data[-1] ^= 1
    conn.execute("UPDATE frames SET data = ? WHERE seq = ?", (bytes(data), seq))
    conn.commit()
    conn.close()


def test_a_flipped_bit_becomes_a_gap_and_is_never_sent(folder: Path) -> None:
    store, cloud = opened(folder), ModelCloud()
    store.commit(group(*range(10)), [], 0)
    [recorded] = store.commit(group(*range(10, 20)), [], 1)
    store.close()
    flip(folder / "buffer.db", 4)
    flip(folder / "buffer.db", 15)
    store = opened(folder)
    assert [bounds(b) for b in store.rebuild(*bounds(recorded))] == [(11, 14), (16, 20)]
    drain(store, cloud)
    assert cloud.numbers() == [n for n in range(20) if n + 1 not in (4, 15)]
    assert sorted((g.first, g.last, g.reason, g.readings) for g in cloud.gaps()) == [
        (4, 4, "corrupt", READINGS), (15, 15, "corrupt", READINGS),
    ]  # fmt: skip
    assert store.ledger.kept_readings == store.ledger.settled_readings + store.ledger.gapped_readings
    store.close()


@pytest.mark.parametrize("column", ["readings", "crc"])
def test_a_flipped_number_in_a_row_is_noticed_too(folder: Path, column: str) -> None:
    store, cloud = opened(folder), ModelCloud()
    store.commit(group(1, 2, 3), [], 0)
    store.close()
    conn = sqlite3.connect(folder / "buffer.db")
    conn.execute(f"UPDATE frames SET {column} = {column} + 64 WHERE seq = 2")
    conn.commit()
    conn.close()
    store = opened(folder)
    [one, two] = store.claim(9, [])[:2]
    assert [bounds(one), bounds(two)] == [(1, 1), (3, 3)]
    cloud.take(one.sealed.payload)
    store.close()


def test_rows_that_vanished_are_told_as_a_gap(folder: Path) -> None:
    store, cloud = opened(folder), ModelCloud()
    store.commit(group(1, 2, 3), [], 0)
    store.close()
    conn = sqlite3.connect(folder / "buffer.db")
    conn.execute("DELETE FROM frames")
    conn.commit()
    conn.close()
    store = opened(folder)
    drain(store, cloud)
    [gap] = cloud.gaps()
    assert (gap.reason, gap.readings) == ("corrupt", 3 * READINGS)
    store.close()


def test_a_damaged_file_is_set_aside_and_never_stops_the_agent(folder: Path) -> None:
    rng = random.Random(5)
    replaced = 0
    for n in range(60):
        here = folder / str(n)
        here.mkdir()
        store = opened(here)
        for k in range(0, 200, 20):
            store.commit(group(*range(k, k + 20), size=200), [], k % 3)
        store.close()
        path = here / "buffer.db"
        data = bytearray(path.read_bytes())
        match n % 4:
            case 0:
                for _ in range(40):
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 1:
                data = data[: rng.randrange(1, len(data))]
            case 2:
                at = rng.randrange(len(data) // 4096) * 4096
                data[at : at + 4096] = bytes(4096)
            case _:
                data = bytearray(rng.randbytes(len(data)))
        path.write_bytes(data)
        store, cloud = opened(here), ModelCloud()
        store.commit(group(1000), [], 0)
        drain(store, cloud)
        assert 1000 in cloud.numbers()
        if store.events:
            replaced += 1
            assert store.events[0][0] == "buffer_damaged"
            assert list(here.glob("buffer.db.damaged-*"))
        store.close()
    assert replaced > 15


def test_a_file_of_a_newer_agent_is_set_aside_unharmed(folder: Path) -> None:
    store = opened(folder)
    store.commit(group(1), [], 0)
    store.close()
    conn = sqlite3.connect(folder / "buffer.db")
    conn.execute("PRAGMA user_version = 99")
    conn.commit()
    conn.close()
    store = opened(folder)
    assert "schema version 99" in store.events[0][1]
    [aside] = folder.glob("buffer.db.damaged-*Z")
    conn = sqlite3.connect(aside)
    assert conn.execute("SELECT count(*) FROM frames").fetchone()[0] == 1
    conn.close()
    store.close()


def test_damage_found_while_running_keeps_the_group_under_a_new_epoch(folder: Path) -> None:
    store, cloud = opened(folder), ModelCloud()
    store.commit(group(*range(2000), size=500), [], 0)
    store.checkpoint()
    epoch = store.ledger.epoch
    size = store.path.stat().st_size
    with store.path.open("r+b") as file:
        file.seek(4096)
        file.write(bytes(size - 4096))
    assert store._conn is not None
    store._conn.execute("PRAGMA shrink_memory")  # forget the pages in memory
    for n in range(5000, 5010):
        store.commit(group(n), [(1, 1)], 0)
    assert store.ledger.epoch != epoch
    drain(store, cloud)
    # The group before the damage was noticed is in the file that was set aside, for salvage; none is in both.
    assert cloud.numbers() in (list(range(5000, 5010)), list(range(5001, 5010)))
    assert store.events[0][0] == "buffer_damaged"
    store.close()


def test_a_second_agent_is_refused_with_the_reason(folder: Path) -> None:
    store = opened(folder)
    with pytest.raises(StoreUnusable, match="another agent"):
        opened(folder)
    store.close()
    opened(folder).close()


def test_a_folder_that_cannot_be_made_is_named(folder: Path) -> None:
    (folder / "file").write_text("")
    with pytest.raises(StoreUnusable, match="file"):
        Store(folder / "file" / "buffer.db", str(GATEWAY), Limits(max_bytes=2**20), StillClock()).open()


# --- a disk that refuses ---


@pytest.mark.parametrize("late", [False, True], ids=["not kept", "kept after all"])
@pytest.mark.parametrize("code", [sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY])
def test_a_commit_that_failed_is_offered_again_and_kept_once(folder: Path, code: int, late: bool) -> None:
    if late and code != sqlite3.SQLITE_IOERR:
        return  # only an I/O error leaves it open whether the commit holds; the others roll back
    store, cloud = opened(folder), ModelCloud()
    store.commit(group(1), [], 0)
    made = group(2, 3)
    assert store._conn is not None
    failing = Failing(store._conn, "COMMIT", code, late=late)
    failing.failures = 2 if code == sqlite3.SQLITE_FULL else 1  # it is cured at once where it can be
    store._conn = failing  # type: ignore[assignment]  # stands in for it
    with pytest.raises(StoreRefusing):
        store.commit(made, [], 0)
    store.claim(1, [])  # the forwarder may come first, and opens the file anew
    store.commit(made, [], 0)
    store.commit(group(4), [], 0)
    drain(store, cloud)
    assert cloud.numbers() == [1, 2, 3, 4]
    store.close()


@pytest.mark.parametrize(
    "commits",
    [
        [sqlite3.SQLITE_FULL, 0, -sqlite3.SQLITE_IOERR],  # the cure itself ends in doubt
        [-sqlite3.SQLITE_IOERR, None, sqlite3.SQLITE_FULL, sqlite3.SQLITE_FULL],  # in doubt, then full
    ],
    ids=["full, then in doubt", "in doubt, then full"],
)
def test_a_group_whose_commit_is_in_doubt_is_never_offered_in_pieces(
    folder: Path, commits: list[int | None]
) -> None:
    """`None` begins a new connection; a negative code is told although the commit holds."""
    store, cloud = opened(folder), ModelCloud()
    store.commit(group(1), [], 0)
    made = group(2, 3)
    runs: list[list[int]] = [[]]
    for code in commits:
        if code is None:
            runs.append([])
        else:
            runs[-1].append(code)
    for run in runs:
        store.claim(1, [])  # opens the file anew where it had to be given up
        scripted = Scripted(store._conn, run)
        store._conn = scripted  # type: ignore[assignment]  # stands in for it
        with pytest.raises(StoreRefusing) as told:
            store.commit(made, [], 0)
        assert not isinstance(told.value, StoreFull)
        scripted.codes.clear()
    store.commit(made, [], 0)
    drain(store, cloud)
    assert cloud.numbers() == [1, 2, 3]
    store.close()


class Scripted:
    """A connection whose commits end as told: 0 well, a code before it holds, a negative code after."""

    def __init__(self, conn: object, codes: list[int]) -> None:
        assert isinstance(conn, sqlite3.Connection)
        self._conn, self.codes = conn, codes

    def execute(self, sql: str, *args: object) -> sqlite3.Cursor:
        code = self.codes.pop(0) if sql == "COMMIT" and self.codes else 0
        if code <= 0:
            done = self._conn.execute(sql, *args)  # type: ignore[arg-type]  # passed through as it came
        if code:
            error = sqlite3.OperationalError("made to fail")
            error.sqlite_errorcode = abs(code)
            raise error
        return done

    def __getattr__(self, name: str) -> object:
        return getattr(self._conn, name)


def test_a_rotten_oldest_row_stops_no_start_and_takes_no_clock_rows(folder: Path) -> None:
    store = opened(folder)
    event = encode_frame(EventFrame(1, 5, "start", "x" * 20))
    store.commit(Group([event], [0], size_bytes=len(event)), [], 0)
    store.close()
    for at, flip in ((-3, 0x80), (2, 0x40)):  # the text is no UTF-8 any more; the boot is another
        rotten = bytearray(event)
        rotten[at] ^= flip
        conn = sqlite3.connect(folder / "buffer.db")
        conn.execute("UPDATE frames SET data = ?", (bytes(rotten),))
        conn.commit()
        conn.close()
        store = opened(folder)
        assert store._conn is not None
        store._thin_clock(store._conn)
        assert store._conn.execute("SELECT count(*) FROM clock").fetchone()[0] > 0
        store.close()


def test_a_start_on_a_full_disk_releases_the_ballast(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(max_bytes=2**26, ballast_bytes=2**16)
    store = Store(folder / "buffer.db", str(GATEWAY), limits, StillClock())
    store.open()
    store.commit(group(1), [], 0)
    store.close()
    ballast = folder / "buffer.db.ballast"
    assert ballast.exists()
    connect, statvfs = Store._connect, os.statvfs

    def full(store: Store) -> None:
        if ballast.exists():
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        connect(store)

    def no_room(path: Path) -> os.statvfs_result:
        found = list(statvfs(path))
        found[4] = 0  # f_bavail
        return os.statvfs_result(found)

    monkeypatch.setattr(Store, "_connect", full)
    monkeypatch.setattr(os, "statvfs", no_room)
    store = Store(folder / "buffer.db", str(GATEWAY), limits, StillClock())
    store.open()
    assert store.ledger.held_readings == READINGS
    store.close()


# --- any order of anything ---


class AnyOrder(RuleBasedStateMachine):
    """Append, commit, send, ack, lost ack, split, park, resend, restart, kill, evict in any order: in the end the
    cloud holds kept minus gapped, each once."""

    def __init__(self) -> None:
        super().__init__()
        base = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self.folder = Path(tempfile.mkdtemp(prefix="headgate-any-", dir=base))
        self.runs = 0
        self.clock = StillClock()
        self.store = self.open()
        self.cloud = ModelCloud()
        self.number = 0
        self.pending: list[tuple[int, int]] = []  #: number and size
        self.kept: dict[int, int] = {}  #: number by seq
        self.flying: list[Batch] = []
        self.acks: list[tuple[int, int]] = []  #: come back, not yet applied

    def open(self) -> Store:
        self.runs += 1
        return opened(self.folder, self.clock, max_bytes=2**20)

    @rule(count=st.integers(1, 40), size=st.sampled_from([1, 100, 1500]))
    def append(self, count: int, size: int) -> None:
        for _ in range(count):
            self.number += 1
            self.pending.append((self.number, size))
        if sum(size + 100 for _, size in self.pending) > 100_000:
            self.commit(0)

    @rule(room=st.integers(0, 3))
    def commit(self, room: int) -> None:
        made = Group([scan(n, size=size) for n, size in self.pending], [READINGS] * len(self.pending))
        made.layouts = group(1).layouts
        made.size_bytes = sum(len(f) + 16 for f in made.frames)
        self.flying += self.store.commit(made, self.acks, room)
        after = self.store.ledger.next_seq
        for seq, (number, _) in zip(range(after - len(self.pending), after), self.pending, strict=True):
            self.kept[seq] = number
        self.pending, self.acks = [], []

    @rule(count=st.integers(1, 4))
    def claim(self, count: int) -> None:
        self.flying += self.store.claim(count, self.acks)
        self.acks = []

    @precondition(lambda self: self.flying)
    @rule(which=st.integers(0, 99), answered=st.booleans(), again=st.booleans())
    def send(self, which: int, answered: bool, again: bool) -> None:
        batch = self.flying[which % len(self.flying)]
        ack = self.cloud.take(batch.sealed.payload)
        if answered:
            self.acks += ack.ranges
            if not again:
                self.flying.remove(batch)

    @precondition(lambda self: self.store.recorded())
    @rule(which=st.integers(0, 99))
    def resend(self, which: int) -> None:
        known = self.store.recorded()
        record = known[which % len(known)]
        self.flying += self.store.rebuild(record.first, record.last)

    @precondition(lambda self: self.store.recorded())
    @rule(which=st.integers(0, 99))
    def split(self, which: int) -> None:
        known = self.store.recorded()
        record = known[which % len(known)]
        if record.first < record.last:
            self.flying += self.store.split(record.first, record.last)

    @precondition(lambda self: self.store.recorded())
    @rule(which=st.integers(0, 99))
    def park(self, which: int) -> None:
        """The cloud refuses a frame for good, so it does not hold it."""
        known = self.store.recorded()
        seq = known[which % len(known)].first
        if (self.store.ledger.epoch, seq) not in self.cloud.held and seq in self.kept:
            self.store.park(seq, "body", "refused")
            self.flying = [b for b in self.flying if not b.sealed.first <= seq <= b.sealed.last]

    @rule(kill=st.booleans())
    def restart(self, kill: bool) -> None:
        if kill:  # what SIGKILL leaves: the files as they are, and nobody's memory
            other = self.folder.with_name(f"{self.folder.name}-{self.runs}")
            shutil.copytree(self.folder, other, ignore=shutil.ignore_patterns("*-shm"))
            self.store.close()
            shutil.rmtree(self.folder)
            self.folder = other
        else:
            self.store.close()
        self.pending, self.flying, self.acks = [], [], []
        self.clock.pass_s(7)
        self.store = self.open()

    @invariant()
    def adds_up(self) -> None:
        led = self.store.ledger
        held = rows(self.store)
        assert led.held_frames == held
        assert led.loose_frames >= 0

    def teardown(self) -> None:
        try:
            self.commit(0)
            drain(self.store, self.cloud)
            told = {seq for gap in self.cloud.gaps() for seq in range(gap.first, gap.last + 1) if gap.first}
            held = {seq for _, seq in self.cloud.held}
            scans = {seq for seq in held if seq in self.kept}
            assert scans | (told & set(self.kept)) == set(self.kept)
            assert not scans & told
            assert sorted(self.cloud.numbers()) == sorted(self.kept[seq] for seq in scans)
            assert sum(gap.readings for gap in self.cloud.gaps()) == self.store.ledger.gapped_readings
            assert self.store.ledger.kept_readings == len(self.kept) * READINGS
        finally:
            self.store.close()
            shutil.rmtree(self.folder, ignore_errors=True)


AnyOrder.TestCase.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAnyOrder = AnyOrder.TestCase


def test_rows_lost_in_several_places_of_a_batch_are_told_as_gaps_that_cover_nothing_kept(
    tmp_path: Path,
) -> None:
    store, cloud = opened(tmp_path), ModelCloud()
    [batch] = store.commit(group(*range(1, 21)), [], 1)
    with sqlite3.connect(store.path) as conn:
        conn.execute("DELETE FROM frames WHERE seq IN (3, 4, 9, 15)")
    conn.close()
    for part in store.rebuild(*bounds(batch)):
        cloud.take(part.sealed.payload)
    drain(store, cloud)
    assert [(g.first, g.last, g.scans) for g in cloud.gaps()] == [(3, 4, 2), (9, 9, 1), (15, 15, 1)]
    assert sum(g.readings for g in cloud.gaps()) == store.ledger.gapped_readings == 4 * READINGS


def test_an_empty_buffer_on_a_disk_that_others_filled_says_so(tmp_path: Path) -> None:
    store = Store(
        tmp_path / "buffer.db", str(GATEWAY), Limits(max_bytes=2**26, free_disk_bytes=2**60), StillClock()
    )
    store.open()
    with pytest.raises(StoreFull, match="the disk is short of room") as told:
        store.commit(group(*range(2000), size=400), (), 0)
    assert told.value.cause == "disk_low"
    store.close()
