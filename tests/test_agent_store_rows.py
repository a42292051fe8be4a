"""The buffer's small rows under rot: one flipped bit in any of them gives no wrong time and loses no frame."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from agent.store import Store
from agent.store_rows import clock_row
from sync.wire import open_body
from tests.fakes.buffer import ModelCloud, StillClock, drain, group, opened

FRAMES = 12


def filled(folder: Path) -> None:
    """Two boots, three recorded batches, some loose frames, one parked."""
    clock = StillClock("boot-a")
    store = opened(folder, clock)
    for start in range(0, 6, 2):
        store.commit(group(start, start + 1, boot=1), (), 1)
    store.park(2, "malformed", "the cloud says so")
    store.close()
    clock = StillClock("boot-b")
    clock.now_ns += 10**9
    store = opened(folder, clock)
    store.commit(group(*range(6, FRAMES), boot=store.ledger.boot), (), 0)
    store.close()


def flipped(value: object) -> Iterator[object]:
    """The value with each one of its bits flipped (of a number, those that SQLite can store)."""
    match value:
        case int():
            for bit in range(63):
                yield value ^ (1 << bit)
        case str() | bytes():
            data = value.encode() if isinstance(value, str) else value
            for bit in range(0, 8 * len(data), 5):
                changed = bytearray(data)
                changed[bit // 8] ^= 1 << (bit % 8)
                yield bytes(changed)


def damaged(path: Path, table: str) -> Iterator[str]:
    """The file again and again, each time with one bit of one row of the table flipped; what was flipped."""
    sound = path.read_bytes()
    with closing(sqlite3.connect(path)) as conn:
        names = [row[1] for row in conn.execute(f"PRAGMA table_info({table})")]
        rows = conn.execute(f"SELECT rowid, * FROM {table} ORDER BY rowid").fetchall()
    number = 0
    for rowid, *values in rows:
        for name, value in zip(names, values, strict=True):
            cast = "CAST(? AS TEXT)" if isinstance(value, str) else "?"
            for changed in flipped(value):
                number += 1
                if number % 11:  # enough of each column within seconds
                    continue
                path.write_bytes(sound)
                try:
                    with closing(sqlite3.connect(path)) as conn, conn:
                        conn.execute(f"UPDATE {table} SET {name} = {cast} WHERE rowid = ?", (changed, rowid))
                except sqlite3.IntegrityError:  # another row has that key
                    continue
                yield f"{name} of row {rowid}: {value!r} became {changed!r}"


class TimedCloud(ModelCloud):
    """Refuses a clock row that says anything but what both boots' clocks showed."""

    def take(self, payload: bytes):  # type: ignore[no-untyped-def]  # as the model's
        for row in open_body(payload)[1].clocks:
            assert row.wall_ns - row.boot_ns == StillClock().offset_ns, row
            assert row.synchronized
            assert (row.boot, row.boot_id) in ((1, "boot-a"), (2, "boot-b"), (3, "boot-c")), row
        return super().take(payload)


def arrived(store: Store) -> list[int]:
    cloud = TimedCloud()
    cloud.needs_clocks = False  # where all rows of a boot are gone the cloud estimates
    drain(store, cloud)
    return cloud.numbers()


@pytest.mark.parametrize("table", ["clock", "batches", "parked"])
def test_no_flipped_bit_of_a_small_row_gives_a_wrong_time_or_loses_a_frame(
    tmp_path: Path, table: str
) -> None:
    filled(tmp_path)
    path = tmp_path / "buffer.db"
    tried = 0
    for what in damaged(path, table):
        store = opened(tmp_path, StillClock("boot-c"))
        told = [code for code, _ in store.events]
        rowid_alone = what.startswith("id of") or table == "parked"  # says nothing that anybody relies on
        assert bool(told) != rowid_alone, (what, told)
        assert arrived(store) == [0, *range(2, FRAMES)], what
        assert store.ledger.boot == 3, what
        store.close()
        tried += 1
    assert tried > 20


def test_what_cannot_be_a_clock_row_is_none() -> None:
    good = [1, b"boot-a", 5, 6, 1, 0]
    assert clock_row(good) is not None
    for at, bad in [(0, 0), (0, None), (1, b"\xff"), (1, b""), (2, -1), (2, 1.5), (4, 2)]:
        assert clock_row([*good[:at], bad, *good[at + 1 :]]) is None
