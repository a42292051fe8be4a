"""Priorities in the buffer file: who gives way first, what is said of it, who goes first, and that all adds up."""

from __future__ import annotations

import asyncio
import itertools
import random
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import gaps as gap_sums
from agent.buffer import MAX_FRAME_BYTES, Buffer, slices
from agent.store import Batch, Group, Limits, Store, StoreRefusing, row_crc, row_priority
from config.agent import Buffer as Settings
from drivers.contract import Priority
from sync.wire import GapFrame, encode_frame
from tests.fakes.buffer import (
    GATEWAY,
    PACKING,
    READINGS,
    ModelCloud,
    StillClock,
    bounds,
    drain,
    number_of,
    scan,
)
from tests.fakes.running_buffer import running

MIB = 2**20
ALARM, NORMAL, BULK = Priority


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where the machine has such a place: these tests are about order, not about the disk."""
    path = Path(tempfile.mkdtemp(prefix="headgate-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def mixed(alarms: list[int], normal: list[int], bulk: list[int], *, size: int = 300, boot: int = 1) -> Group:
    frames = [scan(n, size=size, boot=boot) for n in (*alarms, *normal, *bulk)]
    return Group(
        frames, [READINGS] * len(frames), [PACKING.layout], size_bytes=sum(len(f) + 16 for f in frames),
        alarms=len(alarms), bulk=len(bulk),
    )  # fmt: skip


def opened(
    folder: Path, clock: StillClock | None = None, *, max_bytes: int = 4 * MIB, thin_keep: int = 0
) -> Store:
    limits = Limits(max_bytes=max_bytes, thin_keep=thin_keep)
    store = Store(folder / "buffer.db", str(GATEWAY), limits, clock or StillClock())
    store.open()
    return store


def adds_up(store: Store) -> None:
    """kept = settled + gapped + held, and the tables that find frames agree with the frames themselves."""
    led = store.ledger
    with sqlite3.connect(f"file:{store.path}?mode=ro", uri=True) as conn:
        rows = conn.execute("SELECT seq, readings, crc, data FROM frames").fetchall()
        named = [{seq for (seq,) in conn.execute(f"SELECT seq FROM {t}")} for t in ("alarms", "bulk", "gaps")]
    conn.close()
    assert led.held_frames == len(rows)
    assert led.held_readings == sum(row[1] for row in rows)
    of = {row[0]: row_priority(row[0], row[1], row[3], row[2]) for row in rows}
    assert None not in of.values()
    assert named[0] == {seq for seq, priority in of.items() if priority is ALARM}
    assert named[1] == {seq for seq, priority in of.items() if priority is BULK}
    assert (led.alarm_frames, led.bulk_frames, led.gap_frames) == tuple(map(len, named))


def told(cloud: ModelCloud) -> dict[str, int]:
    """Scans reported lost, by priority."""
    sums: dict[str, int] = {}
    for gap in cloud.gaps():
        sums[gap.priority] = sums.get(gap.priority, 0) + gap.scans
    return sums


def fill(
    store: Store, commits: int, *, alarms: int = 1, normal: int = 10, bulk: int = 20
) -> dict[int, Priority]:
    """Interleaved commits; the numbers of the scans, with their priorities."""
    made: dict[int, Priority] = {}
    for commit in range(commits):
        at = commit * 1000
        numbers = [list(range(at + k, at + k + n)) for k, n in ((0, alarms), (100, normal), (500, bulk))]
        store.commit(mixed(*numbers), [], 0)
        for some, priority in zip(numbers, Priority, strict=True):
            made |= dict.fromkeys(some, priority)
    return made


def test_bulk_gives_way_first_then_normal_and_every_lost_scan_is_told_with_its_priority(folder: Path) -> None:
    store, cloud = opened(folder), ModelCloud()
    made = fill(store, 900)
    adds_up(store)
    drain(store, cloud)
    adds_up(store)
    held = set(cloud.numbers())
    lost = {n: p for n, p in made.items() if n not in held}
    assert {p for n, p in made.items() if p is ALARM and n not in held} == set()
    assert sum(p is BULK for p in lost.values()) > 1000
    # Bulk is all gone before a normal one goes, but for what came after the last eviction.
    oldest_normal = min((n for n, p in made.items() if p is NORMAL and n in held), default=0)
    if any(p is NORMAL for p in lost.values()):
        assert not [n for n, p in made.items() if p is BULK and n in held and n < oldest_normal]
    assert told(cloud) == {p.value: k for p in Priority if (k := sum(q is p for q in lost.values()))}
    assert sum(g.readings for g in cloud.gaps()) == READINGS * len(lost)


def test_alarms_go_last_and_are_told_too(folder: Path) -> None:
    store, cloud = opened(folder), ModelCloud()
    made = fill(store, 700, alarms=20, normal=1, bulk=1)
    adds_up(store)
    drain(store, cloud)
    held = set(cloud.numbers())
    lost = {n for n in made if n not in held}
    assert any(made[n] is ALARM for n in lost)
    assert sum(told(cloud).values()) == len(lost)
    first_alarm = min(n for n in held if made[n] is ALARM)
    assert not [n for n in held if made[n] is not ALARM and n < first_alarm - 1000]


def test_every_seq_is_received_or_in_a_gap_and_an_exact_gap_covers_nothing_that_was_kept(
    folder: Path,
) -> None:
    store, cloud = opened(folder), ModelCloud()
    fill(store, 900, alarms=1, normal=15, bulk=15)
    drain(store, cloud)
    seqs = {seq for _, seq in cloud.held}
    missing = set(range(1, store.ledger.next_seq)) - seqs
    covered: set[int] = set()
    for gap in cloud.gaps():
        whole = set(range(gap.first, gap.last + 1))
        covered |= whole & missing
        if gap.sparse:
            assert gap.reason in gap_sums.SPARSE
            assert gap.frames <= len(whole & missing)
        else:
            assert not whole & seqs
    assert covered == missing
    assert sum(map(gap_sums.gone, cloud.gaps())) == len(missing) == store.ledger.gapped_frames


def test_interleaved_priorities_never_fill_the_buffer_with_gaps(folder: Path) -> None:
    store = opened(folder)
    fill(store, 3000, alarms=1, normal=3, bulk=20)
    assert store.ledger.gap_frames < 50
    adds_up(store)


def test_gaps_in_front_of_the_buffer_are_summed_up_when_it_is_full(folder: Path) -> None:
    store, cloud = opened(folder, max_bytes=2 * MIB), ModelCloud()
    lost = 0
    for n in range(12_000):
        gap = GapFrame(store.ledger.epoch, 0, 0, 2, 6, "overrun", f"d{n % 3}", 1, n, n + 1)
        few = mixed([], [n], [])
        few.frames, few.readings = [encode_frame(gap), *few.frames], [0, *few.readings]
        few.size_bytes += 100
        store.commit(few, [], 0)
        lost += 2
    adds_up(store)
    assert store.ledger.gap_frames < 5_000
    drain(store, cloud)
    adds_up(store)
    overruns = [g for g in cloud.gaps() if g.reason == "overrun"]
    assert sum(g.scans for g in overruns) == lost
    assert {g.device for g in overruns} == {"d0", "d1", "d2"}
    assert sum(map(gap_sums.gone, cloud.gaps())) == store.ledger.gapped_frames


def test_thinning_keeps_one_scan_in_ten_of_what_is_old_and_reaches_further_back(folder: Path) -> None:
    reach = []
    for thin_keep in (0, 10):
        (folder / str(thin_keep)).mkdir()
        store, cloud = opened(folder / str(thin_keep), thin_keep=thin_keep), ModelCloud()
        made = fill(store, 1200, alarms=0, normal=0, bulk=20)
        adds_up(store)
        drain(store, cloud)
        held = cloud.numbers()
        lost = len(made) - len(held)
        assert sum(g.scans for g in cloud.gaps()) == lost > 0
        assert {g.reason for g in cloud.gaps()} <= ({"thinned", "evicted"} if thin_keep else {"evicted"})
        reach.append(min(held))
        if thin_keep:
            oldest = held[: len(held) // 20]
            assert all(b > a + 5 for a, b in itertools.pairwise(oldest))
    assert reach[1] < reach[0] / 2


def test_alarms_go_out_before_the_backlog_and_in_few_batches_where_they_are_dense(folder: Path) -> None:
    store = opened(folder, max_bytes=64 * MIB)
    store.commit(mixed([], list(range(3000)), []), [], 0)
    store.commit(mixed([90_001], list(range(3000, 6000)), []), [], 0)
    [batch] = store.claim(1, [])
    frames = dict(
        zip(
            range(batch.sealed.first, batch.sealed.last + 1),
            _numbers(store, batch.sealed.first),
            strict=False,
        )
    )
    assert frames[batch.sealed.first] == 90_001
    assert batch.sealed.first == batch.sealed.last == 3001
    for n in range(200):  # dense: one alarm in every small commit
        store.commit(mixed([100_000 + n], [n], []), [], 0)
    [dense] = store.claim(1, [])
    assert dense.sealed.last - dense.sealed.first > 300
    adds_up(store)


def _numbers(store: Store, first: int) -> list[int | None]:
    with sqlite3.connect(f"file:{store.path}?mode=ro", uri=True) as conn:
        return [
            number_of(data) for (data,) in conn.execute("SELECT data FROM frames WHERE seq >= ?", (first,))
        ]


def test_a_claim_may_leave_out_what_is_below_a_priority_and_a_later_one_takes_it(folder: Path) -> None:
    store, cloud = opened(folder, max_bytes=64 * MIB), ModelCloud()
    made = fill(store, 20)
    for lowest, want in ((ALARM, {ALARM}), (NORMAL, {ALARM, NORMAL}), (BULK, set(Priority))):
        while batches := store.claim(8, [], lowest):
            for batch in batches:
                cloud.take(batch.sealed.payload)
        assert set(cloud.numbers()) == {n for n, p in made.items() if p in want}
    drain(store, cloud)
    assert set(cloud.numbers()) == set(made)


def test_when_there_is_little_room_in_the_live_lane_alarms_have_it(folder: Path) -> None:
    store = opened(folder, max_bytes=64 * MIB)
    [batch] = store.commit(mixed([1], list(range(10, 2000)), []), [], 1)
    assert batch.sealed.first == 1
    assert bounds(batch)[1] > 1


def test_no_flip_of_a_bit_makes_one_priority_into_another() -> None:
    data = scan(7)
    for priority in Priority:
        crc = row_crc(5, 2, data, priority)
        assert row_priority(5, 2, data, crc) is priority
        for bit in range(32):
            assert row_priority(5, 2, data, crc ^ 1 << bit) is None
        for other in (4, 6, 5 + 2**31):
            assert row_priority(other, 2, data, crc) is not priority


def test_an_alarm_that_its_table_forgot_is_still_not_evicted(folder: Path) -> None:
    store = opened(folder)
    store.commit(mixed([1, 2, 3], [10, 11], []), [], 0)
    store.close()
    with sqlite3.connect(store.path) as conn:
        conn.execute("DELETE FROM alarms")
        conn.execute("UPDATE ledger SET alarm_frames = 0")
    conn.close()
    store, cloud = opened(folder), ModelCloud()
    for n in range(600):
        store.commit(mixed([], list(range(1000 + n * 20, 1020 + n * 20)), []), [], 0)
    assert store.ledger.gapped_frames > 0
    adds_up(store)
    drain(store, cloud)
    assert {1, 2, 3} <= set(cloud.numbers())


@pytest.mark.parametrize("seed", range(3))
def test_priorities_thinning_acks_and_restarts_in_any_order_lose_nothing_in_silence(
    folder: Path, seed: int
) -> None:
    rng = random.Random(seed)
    clock, cloud = StillClock(), ModelCloud()
    thin_keep = 5 if seed % 2 else 0
    store = opened(folder, clock, max_bytes=2 * MIB, thin_keep=thin_keep)
    number = 0
    made: set[int] = set()
    for _ in range(900):
        counts = [rng.choice((0, 0, 1)), rng.randrange(12), rng.randrange(12)]
        some = [list(range(number + sum(counts[:i]), number + sum(counts[: i + 1]))) for i in range(3)]
        number += sum(counts)
        made |= {n for part in some for n in part}
        settled: list[tuple[int, int]] = []
        if rng.random() < 0.03:
            settled = [bounds(b) for b in store.claim(rng.randrange(1, 3), [], rng.choice(list(Priority)))]
            for first, last in settled:
                for batch in store.rebuild(first, last):
                    cloud.take(batch.sealed.payload)
            if rng.random() < 0.3:
                settled = []
        if sum(counts):
            store.commit(mixed(*some, size=rng.choice((30, 300, 2000)), boot=store.ledger.boot), settled, 0)
        if rng.random() < 0.01:
            store.close()
            store = opened(folder, clock, max_bytes=2 * MIB, thin_keep=thin_keep)
    adds_up(store)
    drain(store, cloud)
    adds_up(store)
    held = cloud.numbers()
    assert len(held) == len(set(held))
    assert sum(g.scans for g in cloud.gaps()) == len(made) - len(held) > 0
    assert sum(map(gap_sums.gone, cloud.gaps())) == store.ledger.gapped_frames


def test_a_group_cut_in_slices_keeps_every_frames_priority() -> None:
    whole = mixed([1, 2], [3, 4, 5], [6, 7])
    cut = slices(whole, 500)
    assert len(cut) > 2
    wanted = [ALARM] * 2 + [NORMAL] * 3 + [BULK] * 2
    found: list[Priority] = []
    for one in cut:
        plain = len(one.frames) - one.alarms - one.bulk
        found += [ALARM] * one.alarms + [NORMAL] * plain + [BULK] * one.bulk
    assert found == wanted


async def test_an_alarm_is_committed_within_100_ms_and_the_rest_waits_for_its_interval(folder: Path) -> None:
    async with running(folder, Settings(commit_interval_s=30.0)) as buffer:
        buffer.append(scan(1), READINGS)
        await asyncio.sleep(0.3)
        assert buffer.state.commits == 0
        took = []
        for n in range(2, 12):
            before = buffer.state.commits
            began_s = time.monotonic()
            buffer.append(scan(n), READINGS, ALARM)
            while buffer.state.commits == before:  # noqa: ASYNC110 - the buffer tells nobody
                await asyncio.sleep(0.001)
            took.append(time.monotonic() - began_s)
        assert sorted(took)[len(took) // 2] < 0.1, took
        assert buffer.state.kept_readings == 11 * READINGS


async def drained(buffer: Buffer, cloud: ModelCloud) -> None:
    while batches := await buffer.claim(4):
        for batch in batches:
            buffer.settle(cloud.take(batch.sealed.payload))
    assert await buffer.commit()


async def test_a_full_group_makes_room_for_alarms_bulk_first_and_tells_what_gave_way(folder: Path) -> None:
    cloud = ModelCloud()
    async with running(folder, Settings(commit_interval_s=3600, commit_max_kb=10**6)) as buffer:
        normal = list(range(1000))
        for n in normal:
            assert buffer.append(scan(n, size=1000), READINGS)
        bulk = list(itertools.takewhile(
            lambda n: buffer.append(scan(n, size=1000), READINGS, BULK), itertools.count(10_000)
        ))  # fmt: skip
        before = buffer.state.overrun_scans
        alarms = list(
            range(50_000, 50_000 + len(bulk) + 100)
        )  # the loop gets no turn: nothing is committed meanwhile
        assert all(buffer.append(scan(n, size=1000), READINGS, ALARM) for n in alarms)
        gone = buffer.state.overrun_scans - before
        assert await buffer.commit()
        assert await buffer.commit()
        await drained(buffer, cloud)
    stored = set(cloud.numbers())
    assert stored.issuperset(alarms)
    assert not stored.intersection(bulk)  # all of these before any normal one
    assert stored.intersection(normal) == set(normal[gone - len(bulk) :])  # and of those the oldest
    assert sum(g.scans for g in cloud.gaps()) == gone + before
    assert sum(g.readings for g in cloud.gaps()) == (gone + before) * READINGS


async def test_a_group_full_of_alarms_takes_no_more_and_drops_nothing_in_vain(folder: Path) -> None:
    async with running(folder, Settings(commit_interval_s=3600, commit_max_kb=10**6)) as buffer:
        assert buffer.append(scan(1), READINGS)
        while buffer.append(scan(2, size=1000), READINGS, ALARM):
            pass
        # The one small frame that waits would not have made room: it stays, the newest alarm is refused and counted.
        assert (buffer.state.overrun_scans, buffer.state.pending_frames) == (1, len(buffer._alarms) + 1)
        assert not buffer.append(
            scan(3, size=MAX_FRAME_BYTES), READINGS, ALARM
        )  # nor for one that cannot travel
        assert (buffer.state.overrun_scans, buffer.state.pending_frames) == (2, len(buffer._alarms) + 1)


async def test_while_the_disk_refuses_alarms_find_room_in_memory_and_all_of_them_arrive(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud = ModelCloud()
    async with running(folder, Settings(commit_interval_s=3600, commit_max_kb=10**6)) as buffer:
        commit = buffer._store.commit

        def refused(*_: object, **__: object) -> list[Batch]:
            raise StoreRefusing("made to refuse")

        monkeypatch.setattr(buffer._store, "commit", refused)
        offered, alarms = 0, []
        for turn in range(12):
            for n in range(1000):
                offered += 1
                buffer.append(scan(turn * 1000 + n, size=1000), READINGS, (NORMAL, BULK)[n % 2])
            alarms.append(100_000 + turn)
            assert buffer.append(scan(alarms[-1], size=1000), READINGS, ALARM)
            assert not await buffer.commit()
        monkeypatch.setattr(buffer._store, "commit", commit)
        assert await buffer.commit()
        assert await buffer.commit()
        lost = buffer.state.overrun_scans
        await drained(buffer, cloud)
    stored = cloud.numbers()
    assert lost > 0
    assert set(stored).issuperset(alarms)
    assert len(stored) + lost == offered + len(alarms)
    assert sum(g.scans for g in cloud.gaps()) == lost


def test_a_reader_that_holds_the_log_never_lets_file_and_log_grow_beyond_the_cap(folder: Path) -> None:
    limit = 8 * MIB
    store = opened(folder, max_bytes=limit)
    reader: sqlite3.Connection | None = None
    rng = random.Random(7)
    highest = refused = 0
    for n in range(1500):
        if n % 500 == 250:
            reader = sqlite3.connect(f"file:{store.path}?mode=ro", uri=True, isolation_level=None)
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM ledger").fetchone()
        elif n % 500 == 0 and reader is not None:
            reader.close()
        size = rng.choice((100, 1000, 4000))
        try:
            store.commit(
                mixed([], [n * 10 + k for k in range(10)], [n * 10 + k for k in range(10)], size=size), [], 0
            )
        except StoreRefusing:
            refused += 1
        highest = max(highest, store.size_bytes())
    assert highest <= limit, (highest, refused)
    if reader is not None:
        reader.close()
    store.commit(mixed([], [1], []), [], 0)
    adds_up(store)
