"""Trim: by the slowest required sink, never silent; full means refused, and what is held is told apart even then."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from cloud.dead_letters import DeadLetters
from cloud.journal.contract import Entry, Hole, JournalFull
from cloud.journal.sqlite import TRIM_CHUNK, SqliteJournal
from cloud.runner import SinkRunner
from tests.fakes.batches import EPOCH, GATEWAY, POINTS, batch
from tests.fakes.memory_sink import MemorySink

MIB = 1024 * 1024
DAY_NS = 86_400 * 10**9
READINGS = 3 * len(POINTS)


def entry(n: int, *, gateway: str = GATEWAY, at_ns: int = 0, size: int = 0) -> Entry:
    payload = b"x" * size if size else batch(3 * n - 2, 3, gateway=gateway)
    return Entry(gateway, EPOCH, 3 * n - 2, 3 * n, READINGS, at_ns, payload)


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[SqliteJournal]:
    made = SqliteJournal(tmp_path / "journal.db")
    await made.open()
    yield made
    await made.close()


async def test_what_an_optional_sink_had_not_is_recorded_with_the_trim_that_removes_it(
    tmp_path: Path,
) -> None:
    journal = SqliteJournal(tmp_path / "journal.db", clock_ns=lambda: 10 * DAY_NS)
    await journal.open()
    await journal.append([entry(n, at_ns=DAY_NS, gateway=f"acme/g{n % 2}") for n in range(1, 7)])
    await journal.append([entry(7, at_ns=10 * DAY_NS)])
    await journal.commit("archive", 7)
    await journal.commit("influxdb", 2)
    assert await journal.trim(["archive"], keep_s=86_400, max_bytes=1 << 40, optional=["influxdb"]) == 6
    found = [
        (m.gateway, m.batches, m.readings, m.first_offset, m.last_offset) for m in await journal.missed()
    ]
    assert found == [("acme/g0", 2, 2 * READINGS, 4, 6), ("acme/g1", 2, 2 * READINGS, 3, 5)]
    assert await journal.cursor("influxdb") == 6
    # Trimmed again and opened again, it is recorded once.
    assert await journal.trim(["archive"], keep_s=86_400, max_bytes=1 << 40, optional=["influxdb"]) == 0
    await journal.close()
    again = SqliteJournal(tmp_path / "journal.db")
    await again.open()
    assert sum(m.readings for m in await again.missed()) == 4 * READINGS
    assert await again.pending(await again.cursor("influxdb"), 7) == {GATEWAY: READINGS}
    await again.forget_missed("influxdb", "acme/g0")
    assert [m.gateway for m in await again.missed()] == ["acme/g1"]
    await again.close()


async def test_a_required_sink_that_stands_still_fills_the_journal_which_refuses_and_loses_nothing(
    tmp_path: Path,
) -> None:
    journal = SqliteJournal(tmp_path / "journal.db", max_bytes=2 * MIB, free_disk_bytes=0)
    await journal.open()
    await journal.commit("fast", 0)
    n = 0
    refused: JournalFull | None = None
    while refused is None:
        n += 1
        try:
            await journal.append([entry(n, size=8000)])
            await journal.commit("fast", n)
        except JournalFull as err:
            refused = err
    assert refused.retry_after_s > 0
    assert await journal.trim(["fast", "slow"], keep_s=0, max_bytes=0) == 0
    assert await journal.missed() == []
    assert len(await journal.read(0, max_entries=10_000, max_bytes=1 << 30)) == n - 1
    # What is held needs no room: it is told apart from what is new, also within one call.
    with pytest.raises(JournalFull) as mixed:
        await journal.append([entry(1, size=8000), entry(n, size=8000), entry(2, size=8000)])
    assert mixed.value.held == (0, 2)
    assert (await journal.counts())[0].frames_received == 3 * (n - 1)
    # With the sink made optional it is trimmed and told.
    assert await journal.trim(["fast"], keep_s=0, max_bytes=MIB, optional=["slow"]) > 0
    assert (await journal.missed())[0].sink == "slow"
    await journal.append([entry(n, size=8000)])
    await journal.close()


async def test_a_trim_cut_between_its_steps_has_recorded_just_what_it_removed(journal: SqliteJournal) -> None:
    count = 2 * TRIM_CHUNK + 10
    await journal.append([entry(n) for n in range(1, count + 1)])
    await journal.commit("archive", count)
    trimming = asyncio.create_task(journal.trim(["archive"], keep_s=0, max_bytes=0, optional=["influxdb"]))
    while not await journal.missed():  # noqa: ASYNC110 - another task works
        await asyncio.sleep(0)
    trimming.cancel()
    await asyncio.gather(trimming, return_exceptions=True)
    await journal.commit("other", 1)  # whatever was under way is done
    state = await journal.state()
    (missed,) = await journal.missed()
    assert 0 < missed.batches == missed.last_offset == state.first_offset - 1
    with closing(sqlite3.connect(f"file:{journal.path}?mode=ro", uri=True)) as db:
        assert (
            db.execute("SELECT offset FROM cursor WHERE sink = 'influxdb'").fetchone()[0]
            == missed.last_offset
        )


async def test_a_new_sink_starts_at_the_oldest_held_and_is_told_what_was_before(
    journal: SqliteJournal, tmp_path: Path
) -> None:
    await journal.append([entry(n, gateway=f"acme/g{n % 2}") for n in range(1, 7)])
    await journal.commit("old", 4)
    assert await journal.trim(["old"], keep_s=0, max_bytes=0) == 4
    await journal.commit("removed", 1)  # a sink of the past holds nothing up
    letters, sink = DeadLetters(tmp_path / "letters.db"), MemorySink("new")
    await letters.open()
    runner = SinkRunner(sink, journal, letters)
    assert await asyncio.create_task(_run(runner))
    assert len(sink.scans()) == 6
    assert {m.gateway: m.readings for m in await journal.missed()} == {
        "acme/g0": 2 * READINGS, "acme/g1": 2 * READINGS,
    }  # fmt: skip
    assert (await runner.state()).missed_entries == 4
    await letters.close()


async def _run(runner: SinkRunner) -> bool:
    task = asyncio.create_task(runner.run())
    done = await runner.drain(20.0)
    await task
    return done


async def test_a_batch_of_thirty_days_ago_is_known_after_trim_and_restart(tmp_path: Path) -> None:
    now_ns = 100 * DAY_NS
    journal = SqliteJournal(tmp_path / "journal.db", clock_ns=lambda: now_ns)
    await journal.open()
    await journal.append([entry(n, at_ns=now_ns - 30 * DAY_NS) for n in range(1, 50)])
    await journal.commit("s", 49)
    assert await journal.trim(["s"], keep_s=72 * 3600, max_bytes=1 << 40) == 49
    await journal.close()
    again = SqliteJournal(tmp_path / "journal.db")
    await again.open()
    answers = await again.append([entry(n) for n in range(1, 51)])
    assert [a.offset for a in answers] == [*[None] * 49, 50]
    assert await again.holes() == []
    await again.append([entry(60)])
    assert await again.holes() == [Hole(GATEWAY, EPOCH, 151, 177)]
    await again.close()


async def test_a_journal_of_version_1_is_brought_up_to_date_with_all_that_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    first = Path(__file__).parents[1] / "cloud/journal/sqlite.sql"
    made = SqliteJournal(path)
    await made.open()
    await made.append([entry(1), entry(2)])
    await made.commit("s", 1)
    await made.close()
    path.rename(tmp_path / "newer.db")
    with closing(sqlite3.connect(path)) as db:  # as version 1 left it
        db.executescript(first.read_text())
        db.execute("ATTACH ? AS newer", (str(tmp_path / "newer.db"),))
        for table in ("entry", "held", "cursor", "gateway_count"):
            columns = ", ".join(row[1] for row in db.execute(f"PRAGMA main.table_info({table})"))
            db.execute(f"INSERT INTO main.{table} ({columns}) SELECT {columns} FROM newer.{table}")
        db.commit()
    again = SqliteJournal(path)
    await again.open()
    assert await again.pending(1, 2) == {GATEWAY: READINGS}
    assert await again.cursor("s") == 1
    assert [a.offset for a in await again.append([entry(2), entry(3)])] == [None, 3]
    await again.close()
