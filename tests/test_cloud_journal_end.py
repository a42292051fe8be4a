"""A journal whose last commit has rotted: it ends before what the sinks have, and gives its next offsets a second time.

That commit cannot be told from one that a power cut tore. What must hold: no sink passes over a record because of its
offset, none has one twice, and what is gone from the journal is a hole in its account.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
from deltalake import DeltaTable

from cloud.dead_letters import DeadLetters
from cloud.journal.contract import Hole
from cloud.journal.sqlite import SqliteJournal
from cloud.runner import SinkRunner
from cloud.sinks.archive import ArchiveSink
from cloud.sinks.contract import Sink
from cloud.sinks.embedded import EmbeddedSink
from config.cloud import Archive
from tests.fakes.memory_sink import MemorySink
from tests.test_cloud_runner import EPOCH, GATEWAY, batch, running, until

Made: TypeAlias = tuple[Sink, Callable[[], list[int]]]


def _memory(folder: Path) -> Made:
    """It remembers nothing, as InfluxDB."""
    sink = MemorySink()
    return sink, lambda: sorted(sink.seqs())


def _remembering(folder: Path) -> Made:
    sink = MemorySink(remembers=True)
    return sink, lambda: sorted(sink.seqs())


def _embedded(folder: Path) -> Made:
    """Its base, `SqlSink`, is MySQL's, too."""

    def seqs() -> list[int]:
        with contextlib.closing(sqlite3.connect(folder / "readings.sqlite")) as db:
            return [row[0] for row in db.execute("SELECT seq FROM readings GROUP BY point_id, seq")]

    def once() -> list[int]:
        with contextlib.closing(sqlite3.connect(folder / "readings.sqlite")) as db:
            (rows,) = db.execute("SELECT count(*) FROM readings").fetchone()
        assert rows == len(seqs()), "doubled"
        return sorted(set(seqs()))

    return EmbeddedSink(folder, retention_days=0.0), once


def _archive(folder: Path) -> Made:
    def once() -> list[int]:
        rows = DeltaTable(str(folder / "archive/readings")).to_pyarrow_table(columns=["point", "seq"])
        pairs = list(zip(rows["point"].to_pylist(), rows["seq"].to_pylist(), strict=True))
        assert len(pairs) == len(set(pairs)), "doubled"
        return sorted({seq for _, seq in pairs})

    return ArchiveSink(Archive(commit_interval_s=0.01), folder / "archive"), once


@pytest.mark.parametrize("sink_first", [True, False], ids=["sink-opens-first", "journal-has-passed-it"])
@pytest.mark.parametrize("make", [_memory, _remembering, _embedded, _archive])
async def test_records_that_get_an_offset_a_sink_has_passed_reach_it_once_and_what_rotted_is_a_hole(
    tmp_path: Path, make: Callable[[Path], Made], sink_first: bool
) -> None:
    path = tmp_path / "journal.db"
    sink, held = make(tmp_path)
    letters = DeadLetters(tmp_path / "dead_letters.db")
    await letters.open()

    def runner(journal: SqliteJournal) -> SinkRunner:
        return SinkRunner(sink, journal, letters, retry_base_s=0.01, retry_cap_s=0.05, broken_retry_s=0.05)

    async def has(one: SinkRunner, journal: SqliteJournal) -> None:
        await until(lambda: one.position == journal.last_offset)

    journal = SqliteJournal(path, free_disk_bytes=0, commit_interval_s=0.0)
    await journal.open()
    first = runner(journal)
    async with running(first):
        await journal.append([batch(1, 10)])
        await has(first, journal)
    await journal.append([batch(11, 10)])
    left = {file: file.read_bytes() for file in (path, Path(f"{path}-wal"))}
    second = runner(journal)
    async with running(second):
        await has(second, journal)
    await journal.close()
    assert held() == list(range(1, 21))

    # The power goes before the cursor is written, and the last commit's end is damaged.
    left[Path(f"{path}-wal")] = left[Path(f"{path}-wal")][:-1] + b"?"
    for file, data in left.items():
        file.write_bytes(data)
    journal = SqliteJournal(path, free_disk_bytes=0, commit_interval_s=0.0)
    await journal.open()
    assert journal.last_offset == 1, "what rotted cannot be told from what never ended"
    assert await journal.cursor(sink.name) == 1

    third = runner(journal)
    if not sink_first:
        await journal.append([batch(21, 10)])
        await journal.append([batch(31, 10)])
        assert journal.last_offset == 3
    async with running(third):
        await until(lambda: third._word == "running")
        if sink_first:
            await journal.append([batch(21, 10)])
            await journal.append([batch(31, 10)])
        await has(third, journal)
    assert held() == list(range(1, 41))
    assert await journal.holes() == [Hole(GATEWAY, EPOCH, 11, 20)]
    await journal.close()
    await letters.close()
