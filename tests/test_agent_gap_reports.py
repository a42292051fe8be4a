"""The account of what is lost is not lost: a gap report that rots, or that the cloud refuses, is told all the same."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.store import Batch, Group, Limits, Store, StoreFull
from agent.store_migrations import to_version
from drivers.contract import Priority
from sync.wire import GapFrame, decode_frame, open_body
from tests.fakes.buffer import GATEWAY, PACKING, READINGS, ModelCloud, StillClock, drain, group, opened, scan

EMPTY = Group([], [])


def spoil(store: Store, seq: int, *, at: int = 3, column: str = "data", table: str = "frames") -> None:
    """Flip one bit of a row."""
    with contextlib.closing(sqlite3.connect(store.path)) as conn:
        [data] = conn.execute(f"SELECT {column} FROM {table} WHERE seq = ?", (seq,)).fetchone()
        spoiled = bytearray(data)
        spoiled[at % len(data)] ^= 1
        conn.execute(f"UPDATE {table} SET {column} = ? WHERE seq = ?", (bytes(spoiled), seq))
        conn.commit()


def gap_seqs(store: Store) -> list[int]:
    with contextlib.closing(sqlite3.connect(store.path)) as conn:
        return [seq for (seq,) in conn.execute("SELECT seq FROM gaps ORDER BY seq")]


def with_a_gap(folder: Path) -> tuple[Store, int]:
    """Six scans, the third of which rotted: a gap of it waits in the buffer, in no batch."""
    store = opened(folder)
    store.commit(group(1, 2, 3, 4, 5, 6), [], 0)
    spoil(store, 3)
    batches = store.claim(2, [])
    assert [(b.sealed.first, b.sealed.last) for b in batches] == [(1, 2), (4, 6)]
    [seq] = gap_seqs(store)
    return store, seq


def told(cloud: ModelCloud) -> list[tuple[int, int, str, int]]:
    return [(gap.first, gap.last, gap.reason, gap.readings) for gap in cloud.gaps()]


@pytest.mark.parametrize("at", range(0, 40, 3))
@pytest.mark.parametrize("sent_before", [False, True])
def test_a_rotten_gap_report_is_restored_from_its_copy(tmp_path: Path, at: int, sent_before: bool) -> None:
    store, seq = with_a_gap(tmp_path)
    if sent_before:
        [lost] = store.claim(1, [])
        assert lost.sealed.first == seq
    spoil(store, seq, at=at)
    cloud = ModelCloud()
    drain(store, cloud)
    assert cloud.numbers() == [1, 2, 4, 5, 6]
    assert told(cloud) == [(3, 3, "corrupt", READINGS)]
    store.close()


def test_where_the_copy_rots_too_the_report_is_told_by_its_own_number(tmp_path: Path) -> None:
    store, seq = with_a_gap(tmp_path)
    spoil(store, seq)
    spoil(store, seq, column="told", table="gaps")
    cloud = ModelCloud()
    drain(store, cloud)
    assert [(first, last) for first, last, _, _ in told(cloud)] == [(seq, seq)]
    store.close()


def test_a_refused_gap_report_is_told_once_more(tmp_path: Path) -> None:
    store, seq = with_a_gap(tmp_path)
    store.claim(1, [])
    store.park(seq, "frame", "refused")
    cloud = ModelCloud()
    drain(store, cloud)
    assert (3, 3, "corrupt", READINGS) in told(cloud)
    assert (seq, seq, "refused", 0) in told(cloud)
    store.close()


def test_a_report_that_is_refused_twice_is_not_told_for_ever(tmp_path: Path) -> None:
    store, _ = with_a_gap(tmp_path)
    rounds = 0
    while gap_seqs(store):
        rounds += 1
        assert rounds < 10
        for batch in store.claim(4, []):
            if batch.sealed.first != batch.sealed.last:
                store.split(batch.sealed.first, batch.sealed.last)
        for record in store.recorded():
            if record.first in gap_seqs(store):
                if record.first != record.last:
                    store.split(record.first, record.last)
                else:
                    store.park(record.first, "frame", "refused")
    assert any(code == "frame_refused" and "1 scans" in text for code, text in store.events)
    led = store.ledger
    assert led.kept_frames == led.settled_frames + led.gapped_frames + led.held_frames
    store.close()


def test_a_rotten_gap_report_is_not_evicted_as_a_reading(tmp_path: Path) -> None:
    store = opened(tmp_path, max_bytes=2 * 2**20)
    for first in range(1, 4_000, 10):
        store.commit(group(*range(first, first + 10), size=600), [], 0)
    [seq, *_] = gap_seqs(store)
    spoil(store, seq, at=1)
    for first in range(4_001, 6_000, 10):
        store.commit(group(*range(first, first + 10), size=600), [], 0)
    assert seq in gap_seqs(store)
    cloud = ModelCloud()
    kept = store.ledger.kept_readings
    drain(store, cloud)
    assert len(cloud.numbers()) * READINGS + sum(gap.readings for gap in cloud.gaps()) == kept
    store.close()


def test_a_file_from_before_the_copies_gets_them(tmp_path: Path) -> None:
    store, seq = with_a_gap(tmp_path)
    path = store.path
    store.close()
    with contextlib.closing(sqlite3.connect(path)) as conn:
        conn.execute("ALTER TABLE gaps DROP COLUMN told")
        conn.commit()
    again = opened(tmp_path)
    assert gap_seqs(again) == [seq]
    again.commit(group(7, 8, 9), [], 0)
    spoil(again, seq + 2)
    cloud = ModelCloud()
    drain(again, cloud)
    assert {(first, last) for first, last, _, _ in told(cloud)} == {(3, 3), (seq + 2, seq + 2)}
    again.close()


def test_a_file_with_copies_goes_down_and_up_again(tmp_path: Path) -> None:
    store, _ = with_a_gap(tmp_path)
    path = store.path
    store.close()
    to_version(path, 1)
    to_version(path, 2)
    again = opened(tmp_path)
    cloud = ModelCloud()
    drain(again, cloud)
    assert cloud.numbers() == [1, 2, 4, 5, 6]
    assert (3, 3, "corrupt", READINGS) in told(cloud)
    again.close()


# ------------------------------------------------------------------------- what was handed out is never rewritten

Step = tuple[str, int]
_STEP = st.one_of(
    st.tuples(st.just("commit"), st.integers(1, 400)),
    st.tuples(st.just("claim"), st.integers(1, 3)),
    st.tuples(st.just("resend"), st.integers(0, 20)),
    st.tuples(st.just("split"), st.integers(0, 20)),
    st.tuples(st.just("park"), st.integers(0, 20)),
    st.tuples(st.just("rot"), st.integers(0, 10_000)),
    st.tuples(st.just("ack"), st.integers(0, 20)),
    st.tuples(st.just("restart"), st.just(0)),
)


def _mixed(first: int, count: int) -> Group:
    """Alarms, normal and bulk: evictions then leave many sparse gaps that grow."""
    frames = [scan(n, size=900) for n in range(first, first + count)]
    return Group(
        frames, [READINGS] * count, [PACKING.layout], size_bytes=sum(len(f) + 16 for f in frames),
        alarms=count // 10, bulk=count // 3,
    )  # fmt: skip


@given(steps=st.lists(_STEP, min_size=4, max_size=40), small=st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True, print_blob=True)
def test_a_gap_that_was_handed_out_never_has_another_content_under_its_number(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Step], small: bool
) -> None:
    """Whatever grows, is summed up, evicted, split, parked, spoiled or restored behind it, and over restarts."""
    folder = tmp_path_factory.mktemp("gaps")
    clock = StillClock()
    limits = Limits(max_bytes=(1 if small else 2) * 2**20)

    def fresh() -> Store:
        store = Store(folder / "buffer.db", str(GATEWAY), limits, clock)
        store.open()
        return store

    sent: dict[int, bytes] = {}
    gaps = 0

    def seen(batches: list[Batch]) -> None:
        nonlocal gaps
        for batch in batches:
            _, body = open_body(batch.sealed.payload)
            for seq, raw in enumerate(body.frames, batch.sealed.first):
                assert sent.setdefault(seq, bytes(raw)) == bytes(raw), (
                    f"seq {seq} was handed out with two contents"
                )
                gaps += isinstance(decode_frame(raw), GapFrame)

    store, number = fresh(), 0
    for what, size in [("commit", 400), ("commit", 400), ("commit", 400), *steps]:
        recorded = store.recorded()
        one = recorded[size % len(recorded)] if recorded else None
        clock.pass_s(1)
        if what == "commit":
            for first in range(number, number + size, 40):
                with contextlib.suppress(StoreFull):  # full of what was sent: nothing of it is kept
                    store.commit(_mixed(first, min(40, number + size - first)), [], 0)
            number += size
        elif what == "claim":
            seen(store.claim(size, [], Priority.BULK))
        elif what == "rot":
            with contextlib.closing(sqlite3.connect(store.path)) as conn:
                seqs = [seq for (seq,) in conn.execute("SELECT seq FROM frames ORDER BY seq")]
            held = [*gap_seqs(store), *seqs]
            if held:
                spoil(store, held[size % len(held)], at=size)
        elif what == "restart":
            store.close()
            store = fresh()
        elif one is None:
            continue
        elif what == "resend":
            seen(store.rebuild(one.first, one.last))
        elif what == "split" and one.first < one.last:
            seen(store.split(one.first, one.last))
        elif what == "park" and one.first == one.last:
            store.park(one.first, "frame", "refused")
        elif what == "ack":
            store.commit(EMPTY, [(one.first, one.last)], 0)
    for record in store.recorded():
        seen(store.rebuild(record.first, record.last))
    for _ in range(100):
        batches = store.claim(8, [])
        seen(batches)
        store.commit(EMPTY, [(b.sealed.first, b.sealed.last) for b in batches], 0)
        if not batches:
            break
    assert gaps, "no gap was handed out: this example shows nothing"
    store.close()
