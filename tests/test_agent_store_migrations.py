"""The buffer file's schemas: stored old files open and drain, up and down lose nothing, killed anywhere."""

from __future__ import annotations

import gzip
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from agent.store import Limits, Store, StoreUnusable
from agent.store_migrations import SCHEMA_VERSION, SchemaUnknown, main, to_version
from sync.wire import GapFrame, decode_frame
from tests.fakes.buffer import GATEWAY, ModelCloud, StillClock, drain, scan

OLD = Path(__file__).parent / "fixtures/buffer-1.db.gz"
Row = tuple[int, int, int, bytes]
MIGRATE = """
from pathlib import Path
from agent.store_migrations import to_version
print("go", flush=True)
to_version(Path({path!r}), {want}, step_rows=500)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="headgate-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def old_file(folder: Path) -> Path:
    path = folder / "buffer.db"
    path.write_bytes(gzip.decompress(OLD.read_bytes()))
    return path


def opened(path: Path, *, max_bytes: int = 2**30) -> Store:
    store = Store(path, str(GATEWAY), Limits(max_bytes=max_bytes, quick_check_s=1.0), StillClock("boot-c"))
    store.open()
    return store


def rows(path: Path) -> list[Row]:
    with closing(sqlite3.connect(path)) as conn:
        return conn.execute("SELECT seq, readings, crc, data FROM frames ORDER BY seq").fetchall()


def version(path: Path) -> int:
    with closing(sqlite3.connect(path)) as conn:
        return int(conn.execute("PRAGMA user_version").fetchone()[0])


def schema(path: Path) -> dict[str, list[str]]:
    with closing(sqlite3.connect(path)) as conn:
        names = [name for (name,) in conn.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        return {name: [row[1] for row in conn.execute(f"PRAGMA table_info({name})")] for name in names}


def test_a_file_of_schema_1_opens_drains_and_every_frame_arrives_as_it_was(folder: Path) -> None:
    path = old_file(folder)
    assert version(path) == 1
    before = {seq: data for seq, _, _, data in rows(path)}
    store, cloud = opened(path), ModelCloud()
    assert store.events == []
    assert version(path) == SCHEMA_VERSION
    assert store.ledger.held_frames == len(before)
    assert len(store.recorded()) == 3
    drain(store, cloud)
    assert {seq: data for (_, seq), data in cloud.held.items()} == before
    assert sum(isinstance(decode_frame(data), GapFrame) for data in before.values()) >= 2


def test_a_file_brought_back_to_schema_1_is_the_one_it_was(folder: Path) -> None:
    path = old_file(folder)
    before, tables = rows(path), schema(path)
    opened(path).close()
    assert to_version(path, 1) == 0
    assert (version(path), rows(path), schema(path)) == (1, before, tables)
    store, cloud = opened(path), ModelCloud()
    drain(store, cloud)
    assert {seq: data for (_, seq), data in cloud.held.items()} == {row[0]: row[3] for row in before}


def many(path: Path, count: int) -> None:
    """A schema 2 file of so many frames, a third of each priority, made in one go."""
    store = opened(path)
    store.close()
    data = scan(1)
    with closing(sqlite3.connect(path)) as conn:
        conn.execute("PRAGMA synchronous = OFF")
        crc, marks = zlib.crc32, (0x5A5A5A5A, 0, 0xA5A5A5A5)
        conn.executemany(
            "INSERT INTO frames VALUES (?, 2, ?, ?)",
            ((s, crc(data, s + 2) ^ marks[s % 3], data) for s in range(1, count + 1)),
        )
        for table, rest in (("alarms", 0), ("bulk", 2)):
            conn.execute(f"INSERT INTO {table} SELECT seq FROM frames WHERE seq % 3 = {rest}")
        conn.execute(
            "UPDATE ledger SET next_seq = ?, kept_frames = ?, kept_readings = ?, alarm_frames = ?, bulk_frames = ?",
            (count + 1, count, 2 * count, count // 3, (count + 1) // 3),
        )
        conn.commit()


def test_killed_at_any_point_either_way_nothing_of_the_buffer_is_lost(folder: Path) -> None:
    path, count, seed = folder / "buffer.db", 60_000, 11
    rng = random.Random(seed)
    many(path, count)
    data = scan(1)
    kills = finished = 0
    for attempt in range(40):
        want = 1 if attempt % 2 == 0 or version(path) == SCHEMA_VERSION else SCHEMA_VERSION
        child = subprocess.Popen(
            [sys.executable, "-c", MIGRATE.format(path=str(path), want=want)],
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(rng.uniform(0, 0.05))
        child.send_signal(signal.SIGKILL)
        killed = child.wait(30) != 0
        child.stdout.close()
        kills += killed
        finished += not killed
        if version(path) == 1:
            found = rows(path)
            assert [row[0] for row in found] == list(range(1, count + 1))
            assert all(crc == zlib.crc32(data, s + 2) for s, _, crc, _ in found)
    assert kills >= 5, (kills, finished, seed)
    to_version(path, 1)
    store = opened(path)
    assert store.events == []
    assert store.ledger.held_frames == count
    assert (store.ledger.alarm_frames, store.ledger.bulk_frames) == (0, 0)
    store.close()
    with closing(sqlite3.connect(path)) as conn:
        assert conn.execute("PRAGMA integrity_check").fetchone()[0] == "ok"


def test_a_step_down_that_was_killed_leaves_a_file_that_the_new_agent_uses(folder: Path) -> None:
    path, count = folder / "buffer.db", 3_000
    many(path, count)
    with pytest.raises(ZeroDivisionError):
        _one_step_then_fail(path)
    assert version(path) == SCHEMA_VERSION
    store, cloud = opened(path), ModelCloud()
    assert 0 < store.ledger.alarm_frames < count // 3
    batches = store.claim(10_000, [])
    assert sum(b.sealed.last - b.sealed.first + 1 for b in batches) == count
    assert cloud.gaps() == []
    assert store.ledger.gapped_frames == 0


def _one_step_then_fail(path: Path) -> None:
    from agent import store_migrations

    done = 0

    class Dies(sqlite3.Connection):
        def execute(self, sql: str, *args: object) -> sqlite3.Cursor:
            nonlocal done
            done += sql == "COMMIT"
            if done > 2:
                raise ZeroDivisionError
            return super().execute(sql, *args)  # type: ignore[arg-type]  # passed through as it came

    with closing(sqlite3.connect(path, isolation_level=None, factory=Dies)) as dying:
        store_migrations._unmark(dying, "alarms", "alarm_frames", store_migrations.ALARM_MARK, 200)


def test_a_million_rows_are_brought_up_in_no_time(folder: Path) -> None:
    path, count = folder / "buffer.db", 1_000_000
    many(path, count)
    began_s = time.monotonic()
    assert to_version(path, 1) == pytest.approx(2 * count / 3, abs=1)
    down_s = time.monotonic() - began_s
    began_s = time.monotonic()
    store = opened(path)
    up_s = time.monotonic() - began_s
    assert store.ledger.held_frames == count
    store.close()
    print(f"down {down_s:.1f} s, up and open {up_s:.2f} s")
    assert up_s < 3.0
    with closing(sqlite3.connect(path)) as conn:
        data = scan(1)
        wrong = sum(
            crc != zlib.crc32(data, seq + 2) for seq, crc in conn.execute("SELECT seq, crc FROM frames")
        )
    assert wrong == 0


def test_the_check_at_start_keeps_its_budget_however_large_the_file(folder: Path) -> None:
    path = folder / "buffer.db"
    many(path, 1_000_000)
    with closing(sqlite3.connect(path)) as conn:
        began_s = time.monotonic()
        conn.execute("PRAGMA quick_check(1)").fetchone()
        whole_s = time.monotonic() - began_s
    budget_s = whole_s / 10
    store = Store(path, str(GATEWAY), Limits(max_bytes=2**30, quick_check_s=budget_s), StillClock("boot-c"))
    began_s = time.monotonic()
    store.open()
    took_s = time.monotonic() - began_s
    assert store.ledger.held_frames == 1_000_000
    store.close()
    print(f"whole {whole_s:.2f} s, within the budget of {budget_s:.2f} s: {took_s:.2f} s")
    assert took_s < budget_s + whole_s / 2


def make_newer(path: Path, *, usable_by: int) -> None:
    opened(path).close()
    with closing(sqlite3.connect(path)) as conn:
        conn.execute("UPDATE format SET version = 3, usable_by = ?", (usable_by,))
        conn.execute("CREATE TABLE unheard_of (x)")
        conn.execute("PRAGMA user_version = 3")
        conn.commit()


def test_a_newer_file_is_refused_with_both_versions_and_the_remedy_and_stays_where_it_is(
    folder: Path,
) -> None:
    path = old_file(folder)
    make_newer(path, usable_by=3)
    before = rows(path)
    for _ in range(2):
        with pytest.raises(StoreUnusable, match=r"schema 3.* up to schema 2.*install the newer"):
            opened(path)
    assert rows(path) == before
    assert sorted(p.name for p in folder.iterdir() if "damaged" in p.name) == []
    with pytest.raises(SchemaUnknown):
        to_version(path, 1)


def test_a_newer_file_that_says_so_is_used(folder: Path) -> None:
    path = old_file(folder)
    make_newer(path, usable_by=2)
    count = len(rows(path))
    store, cloud = opened(path), ModelCloud()
    drain(store, cloud)
    assert len(cloud.held) == count
    assert version(path) == 3


def test_a_flipped_bit_in_the_version_is_damage_and_no_newer_file(folder: Path) -> None:
    path = old_file(folder)
    opened(path).close()
    with closing(sqlite3.connect(path)) as conn:
        conn.execute("PRAGMA user_version = 66")
    store = opened(path)
    assert [code for code, _ in store.events] == ["buffer_damaged"]
    store.close()


def test_the_command_says_what_it_did_and_why_it_could_not(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = old_file(folder)
    store = opened(path)
    assert main([str(path), "1"]) == 1
    assert "systemctl stop headgate" in capsys.readouterr().err
    store.close()
    assert main([str(path), "1"]) == 0
    assert "schema 1" in capsys.readouterr().out
    assert main([str(path), "9"]) == 1
    assert "knows 1 to 2" in capsys.readouterr().err
    assert main([str(folder / "none.db"), "1"]) == 1
    assert "no such file" in capsys.readouterr().err
    assert main([]) == 2
    assert path.exists()
