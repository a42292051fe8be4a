"""What rots: the short form of `python -m tests.torture.rot`, and the journal's salvage at its edges."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest
from click.testing import CliRunner

from cloud.cli import main
from cloud.journal.contract import Entry, JournalBroken
from cloud.journal.salvage import salvage
from cloud.journal.sqlite import SqliteJournal
from config.wal import commits_passed_over
from tests.torture.rot import SHARE, SUBJECTS, Outcome, explore

SEED = 11


@pytest.mark.parametrize("subject", SUBJECTS)
def test_no_wrong_reading_and_what_is_sound_is_delivered(subject: str) -> None:
    found: Outcome = explore(subject, count=25, seed=SEED, processes=2)
    assert found.damages == 25
    assert found.wrong == found.silent == found.slow == found.failed == 0, "\n".join(found.first)
    assert found.share >= SHARE, "\n".join(found.first)


async def _filled(path: Path, groups: int) -> SqliteJournal:
    journal = SqliteJournal(path, free_disk_bytes=0, commit_interval_s=0)
    await journal.open()
    for n in range(groups):
        await journal.append(
            [Entry("acme/a", 1, 10 * n + i, 10 * n + i, 1, n, b"x" * 300) for i in range(1, 11)]
        )
    return journal


async def _left_by_a_crash(path: Path, groups: int) -> None:
    """The journal's files with all of it still in the WAL."""
    journal = await _filled(path, groups)
    files = {p: p.read_bytes() for p in path.parent.iterdir() if not p.name.endswith(("-shm", ".lock"))}
    await journal.close()
    for file, data in files.items():
        file.write_bytes(data)


async def test_a_bad_place_in_the_log_is_told_and_what_stands_behind_it_is_salvaged(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    await _left_by_a_crash(path, 20)
    wal = path.with_name("journal.db-wal")
    data = bytearray(wal.read_bytes())
    data[len(data) // 2] ^= 1
    wal.write_bytes(data)
    assert commits_passed_over(path) > 5
    with pytest.raises(JournalBroken, match="headgate-cloud journal salvage"):
        await SqliteJournal(path).open()
    assert wal.read_bytes() == data, "to look changes nothing"
    config = tmp_path / "cloud.toml"
    config.write_text(f'[server]\ndata_dir = "{tmp_path}"\n')
    done = await asyncio.to_thread(CliRunner().invoke, main, ["journal", "salvage", "--config", str(config)])
    assert done.exit_code == 0, done.output
    assert "kept as" in done.output
    journal = SqliteJournal(path, free_disk_bytes=0)
    await journal.open()
    rows = await journal.read(0, max_entries=1000, max_bytes=2**24)
    assert len(rows) >= 190
    # A resend is recognised, and new offsets go on above all that were given.
    again, new = await journal.append(
        [Entry("acme/a", 1, 1, 10, 10, 1, b"again"), Entry("acme/a", 1, 900, 900, 1, 1, b"new")]
    )
    assert again.offset is None
    assert new.offset is not None
    assert new.offset > 200
    await journal.close()


async def test_a_log_that_merely_ends_in_an_unfinished_commit_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    await _left_by_a_crash(path, 20)
    wal = path.with_name("journal.db-wal")
    wal.write_bytes(wal.read_bytes()[:-4096])
    assert commits_passed_over(path) == 0
    journal = SqliteJournal(path, free_disk_bytes=0)
    await journal.open()
    assert journal.last_offset == 190
    await journal.close()


async def test_an_interval_that_a_bit_made_longer_swallows_nothing(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    await (await _filled(path, 2)).close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE held SET last = last + 1048576")
    db.close()
    journal = SqliteJournal(path, free_disk_bytes=0)
    await journal.open()
    [done] = await journal.append([Entry("acme/a", 1, 500, 505, 6, 1, b"new")])
    assert done.fresh == ((500, 505),)
    await journal.close()


async def test_a_salvage_that_was_cut_short_is_run_again_before_anything_is_served(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    await _left_by_a_crash(path, 20)
    path.with_name("journal.db.salvaging").write_bytes(b"half")
    with pytest.raises(JournalBroken, match="cut short"):
        await SqliteJournal(path).open()
    done = salvage(path)
    assert done.entries == 200
    journal = SqliteJournal(path, free_disk_bytes=0)
    await journal.open()
    assert len(await journal.read(0, max_entries=1000, max_bytes=2**24)) == 200
    await journal.close()


async def test_a_journal_in_use_is_not_salvaged(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    journal = await _filled(path, 1)
    with pytest.raises(JournalBroken, match="stop it first"):
        salvage(path)
    await journal.close()
