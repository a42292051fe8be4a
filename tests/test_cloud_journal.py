"""The SQLite journal: the conformance suite, and what only a file on a disk can suffer."""

from __future__ import annotations

import asyncio
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from cloud.journal.contract import EntryDamaged, JournalBroken, JournalFull
from cloud.journal.sqlite import SqliteJournal
from tests.journal_conformance import G, JournalConformance, OpenJournal, entry, everything

ROOT = Path(__file__).parent.parent
MIB = 1024 * 1024
T = TypeVar("T")


@pytest.fixture
def open_journal(tmp_path: Path) -> Callable[[], Awaitable[SqliteJournal]]:
    async def opened() -> SqliteJournal:
        journal = SqliteJournal(tmp_path / "journal.db", commit_interval_s=0.0)
        await journal.open()
        return journal

    return opened


class TestSqliteJournal(JournalConformance):
    pass


async def test_commits_are_synchronous_and_in_wal_mode(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "j.db")
    await journal.open()
    assert journal._db is not None
    assert journal._db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert journal._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    await journal.close()


async def test_calls_that_wait_together_share_one_commit(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "j.db", commit_interval_s=0.02)
    await journal.open()
    await asyncio.gather(*(journal.append([entry(n, n)]) for n in range(1, 501)))
    assert journal.commits <= 10
    await journal.close()


async def test_what_is_appended_while_the_state_is_asked_does_not_look_trimmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sink that opened just then was told that it had missed the first batch, and passed over it."""
    journal = SqliteJournal(tmp_path / "j.db", commit_interval_s=0.0)
    await journal.open()
    read = journal._read

    async def overtaken(work: Callable[[sqlite3.Connection], T]) -> T:
        found = await read(work)
        await journal.append([entry(1, 10)])
        return found

    monkeypatch.setattr(journal, "_read", overtaken)
    assert (await journal.state()).first_offset == 1
    await journal.close()


def test_a_process_killed_in_the_middle_loses_nothing_it_had_acknowledged(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import asyncio, sys
        from pathlib import Path
        from cloud.journal.sqlite import SqliteJournal
        from tests.journal_conformance import entry

        async def main():
            journal = SqliteJournal(Path(sys.argv[1]), commit_interval_s=0.001)
            await journal.open()
            n = 1
            while True:
                await asyncio.gather(*(journal.append([entry(n + i, n + i, size_bytes=3000)]) for i in range(20)))
                n += 20
                print(n - 1, flush=True)

        asyncio.run(main())
    """)
    acked = 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "j.db")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        lines = 0
        while lines < 25:
            acked = max(acked, int(process.stdout.readline()))
            lines += 1
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
        acked = max([acked, *(int(line) for line in rest)])
        process.wait()

    async def audit() -> list[int]:
        journal = SqliteJournal(tmp_path / "j.db")
        await journal.open()
        assert await journal.holds(G, 7, 1, acked) == ((1, acked),)
        seqs = [fresh[0][0] for _, fresh in await everything(journal)]
        await journal.close()
        return seqs

    seqs = asyncio.run(audit())
    assert sorted(seqs)[:acked] == list(range(1, acked + 1))
    assert len(seqs) == len(set(seqs))


async def test_a_second_process_is_refused(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "j.db")
    await journal.open()
    with pytest.raises(JournalBroken, match="another process has this journal"):
        await SqliteJournal(tmp_path / "j.db").open()
    await journal.append([entry(1, 1)])
    await journal.close()


async def test_a_file_that_is_no_journal_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "j.db").write_bytes(b"something else entirely" * 1000)
    with pytest.raises(JournalBroken, match="do not delete it"):
        await SqliteJournal(tmp_path / "j.db").open()
    assert (tmp_path / "j.db").read_bytes() == b"something else entirely" * 1000


async def test_a_journal_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "j.db")
    await journal.open()
    await journal.close()
    with sqlite3.connect(tmp_path / "j.db") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(JournalBroken, match="version 99"):
        await SqliteJournal(tmp_path / "j.db").open()


# --- full ---


async def fill(journal: SqliteJournal) -> tuple[int, JournalFull]:
    """Append until it refuses; how many it took, and what it said."""
    for n in range(1, 2000):
        try:
            await journal.append([entry(n, n, size_bytes=20_000)])
        except JournalFull as err:
            return n - 1, err
    raise AssertionError("never full")


async def test_at_its_cap_it_refuses_and_recovers_by_itself_once_the_sinks_have_moved_on(
    tmp_path: Path,
) -> None:
    journal = SqliteJournal(tmp_path / "j.db", max_bytes=4 * MIB, free_disk_bytes=0, commit_interval_s=0.0)
    await journal.open()
    held, full = await fill(journal)
    assert full.retry_after_s > 0
    assert "max_mb" in str(full)
    said = journal.trouble
    assert said is not None
    assert held > 50
    assert await journal.holds(G, 7, 1, 5000) == ((1, held),)
    assert len(await everything(journal)) == held
    size = sum(f.stat().st_size for f in tmp_path.iterdir())
    assert size <= 4 * MIB + MIB
    # Cursors and trim work at the cap, and then there is room again.
    await journal.commit("s", held)
    assert await journal.trim(["s"], keep_s=0, max_bytes=MIB) > 0
    [appended] = await journal.append([entry(held + 1, held + 1, size_bytes=20_000)])
    assert appended.offset == held + 1
    assert journal.trouble is None
    await journal.close()


async def test_a_refused_call_leaves_nothing_behind_while_one_that_fits_goes_in(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "j.db", max_bytes=4 * MIB, free_disk_bytes=0)
    await journal.open()
    too_big = [entry(n, n, size_bytes=250_000) for n in range(1, 20)]
    results = await asyncio.gather(
        journal.append(too_big), journal.append([entry(100, 101)]), return_exceptions=True
    )
    assert isinstance(results[0], JournalFull)
    assert not isinstance(results[1], BaseException)
    assert await journal.holds(G, 7, 1, 1000) == ((100, 101),)
    [appended] = await journal.append([entry(1, 1)])
    assert appended.fresh == ((1, 1),)
    await journal.close()


async def test_below_the_free_disk_floor_it_refuses(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    journal = SqliteJournal(tmp_path / "j.db", free_disk_bytes=free + 2**40)
    await journal.open()
    with pytest.raises(JournalFull):
        await journal.append([entry(1, 1)])
    await journal.commit("s", 0)
    assert await everything(journal) == []
    await journal.close()


FULL_DISK = """
import asyncio, os, sys
from pathlib import Path
from cloud.journal.contract import JournalFull
from cloud.journal.sqlite import SqliteJournal
from tests.journal_conformance import G, entry, everything

async def main(folder):
    journal = SqliteJournal(folder / "j.db", max_bytes=1 << 30, free_disk_bytes=0, commit_interval_s=0.0)
    await journal.open()
    held, n, refused = set(), 0, 0
    async def send():
        nonlocal n, refused
        n += 1
        try:
            await journal.append([entry(n, n, size_bytes=30_000)])
            held.add(n)
        except JournalFull:
            refused += 1
    for _ in range(40):
        await send()
    assert held and not refused
    ballast = folder / "ballast"
    with ballast.open("wb") as file:         # somebody else fills the disk to the last byte
        try:
            while True:
                file.write(bytes(65536)); file.flush()
        except OSError:
            pass
    while refused < 5:
        await send()
    journal_said = journal.trouble
    assert {s for _, f in await everything(journal) for s in range(f[0][0], f[0][1] + 1)} == held
    ballast.unlink()
    before = len(held)
    for _ in range(10):
        await send()
    assert len(held) == before + 10, "did not recover"
    assert journal.trouble is None and journal_said
    await journal.close()
    journal = SqliteJournal(folder / "j.db", commit_interval_s=0.0, free_disk_bytes=0)
    await journal.open()
    assert {s for _, f in await everything(journal) for s in range(f[0][0], f[0][1] + 1)} == held
    await journal.close()
    print("ok", len(held), refused)

asyncio.run(main(Path(sys.argv[1])))
"""


def test_on_a_disk_that_is_really_full_nothing_is_acknowledged_and_nothing_lost(tmp_path: Path) -> None:
    # A file system of 8 MB in a name space of our own: needs no root where user name spaces are allowed.
    inside = f'mount -t tmpfs -o size=8m tmpfs {tmp_path} && exec "$0" -c "$1" {tmp_path}'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inside, sys.executable, FULL_DISK],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.startswith("ok "), (
        f"{done.stdout}{done.stderr}\n(needs user name spaces: sysctl kernel.unprivileged_userns_clone=1)"
    )


FULL_START = """
import asyncio, sys
from pathlib import Path
from cloud.journal.contract import JournalError
from cloud.journal.sqlite import SqliteJournal
from tests.journal_conformance import entry, everything

async def main(folder):
    journal = SqliteJournal(folder / "j.db", free_disk_bytes=0)
    await journal.open()
    await journal.append([entry(1, 9)])
    await journal.close()
    ballast = folder / "ballast"
    try:
        with ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError:
        pass
    journal = SqliteJournal(folder / "j.db", free_disk_bytes=0)
    try:
        await journal.open()
    except JournalError as err:
        print(err)
    ballast.unlink()
    await journal.open()
    assert [fresh for _, fresh in await everything(journal)] == [((1, 9),)]
    await journal.close()

asyncio.run(main(Path(sys.argv[1])))
"""


def test_a_start_on_a_full_disk_names_the_disk_and_no_damage_and_works_when_there_is_room(
    tmp_path: Path,
) -> None:
    inside = f'mount -t tmpfs -o size=8m tmpfs {tmp_path} && exec "$0" -c "$1" {tmp_path}'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inside, sys.executable, FULL_START],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the disk is full" in done.stdout, done.stdout
    assert "damaged" not in done.stdout
    assert "salvage" not in done.stdout


WRITE_ERROR = """
import asyncio, resource, sys
from pathlib import Path
from cloud.journal.contract import JournalBroken
from cloud.journal.sqlite import SqliteJournal
from tests.journal_conformance import G, entry, everything

async def main(folder):
    journal = SqliteJournal(folder / "j.db", commit_interval_s=0.0)
    await journal.open()
    await asyncio.gather(*(journal.append([entry(n, n, size_bytes=3000)]) for n in range(1, 51)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))      # every write of the files fails, as with a bad disk
    broken = 0
    for n in range(51, 61):
        try:
            await journal.append([entry(n, n, size_bytes=3000)])
        except JournalBroken:
            broken += 1
    said = journal.trouble
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert broken == 10 and said, (broken, said)
    assert await journal.holds(G, 7, 1, 1000) == ((1, 50),)
    [again] = await journal.append([entry(51, 60)])
    assert again.fresh == ((51, 60),) and again.offset == 51 and journal.trouble is None
    await journal.close()
    journal = SqliteJournal(folder / "j.db")
    await journal.open()
    assert sorted(fresh[0] for _, fresh in await everything(journal)) == [(n, n) for n in range(1, 51)] + [(51, 60)]
    await journal.close()
    print("ok")

asyncio.run(main(Path(sys.argv[1])))
"""


def test_while_the_disk_refuses_writes_nothing_is_acknowledged_and_it_goes_on_afterwards(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WRITE_ERROR, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == "ok\n", done.stdout + done.stderr


# --- damage ---


async def test_a_folder_that_cannot_be_looked_into_does_not_end_the_writer(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    journal = SqliteJournal(folder / "j.db", commit_interval_s=0.0)
    await journal.open()
    folder.rename(tmp_path / "elsewhere")
    folder.write_text("a file: to ask for the size of the WAL is refused, also to root")
    async with asyncio.timeout(20):
        for n in range(1, 40):
            assert (await journal.append([entry(n, n)]))[0].offset == n
    with pytest.raises(JournalBroken, match="cannot be read"):
        await journal.state()
    folder.unlink()
    (tmp_path / "elsewhere").rename(folder)
    assert (await journal.state()).last_offset == 39
    await journal.close()


def damage(path: Path, offset: int, column: str, value: object) -> None:
    """Change one column as a flipped bit would: without anybody's knowledge."""
    db = sqlite3.connect(path)
    db.execute(f"UPDATE entry SET {column} = ? WHERE offset = ?", (value, offset))
    db.commit()
    db.close()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("payload", b"x" * 40),
        ("gateway", "acme/plant-2"),
        ("first", 1),
        ("last", 4),
        ("fresh", "2-2"),
        ("readings", 1),
    ],
)
async def test_a_damaged_entry_is_reported_and_never_returned(
    tmp_path: Path, column: str, value: object
) -> None:
    journal = SqliteJournal(tmp_path / "j.db")
    await journal.open()
    await journal.append([entry(1, 1), entry(2, 3), entry(4, 4)])
    await journal.close()
    damage(tmp_path / "j.db", 2, column, value)
    await journal_reports(tmp_path / "j.db", damaged=2)


async def test_an_entry_whose_offset_is_damaged_does_not_lead_past_the_next(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "j.db")
    await journal.open()
    await journal.append([entry(1, 1), entry(2, 3), entry(4, 4)])
    await journal.append([entry(n, n) for n in range(5, 9)])
    await journal.close()
    damage(tmp_path / "j.db", 2, "offset", 2**40)
    journal = SqliteJournal(tmp_path / "j.db")
    await journal.open()
    assert [s.offset for s in await journal.read(0, max_entries=10, max_bytes=1 << 20)] == [1]
    with pytest.raises(EntryDamaged) as err:
        await journal.read(1, max_entries=10, max_bytes=1 << 20)
    assert err.value.offset == 2  # not found where it should be
    assert [s.offset for s in await journal.read(2, max_entries=10, max_bytes=1 << 20)] == [3, 4, 5, 6, 7]
    with pytest.raises(EntryDamaged):
        await journal.read(7, max_entries=10, max_bytes=1 << 20)
    await journal.close()


async def journal_reports(path: Path, *, damaged: int) -> None:
    journal = SqliteJournal(path)
    await journal.open()
    assert [s.offset for s in await journal.read(0, max_entries=10, max_bytes=1 << 20)] == [1]
    with pytest.raises(EntryDamaged) as err:
        await journal.read(1, max_entries=10, max_bytes=1 << 20)
    assert err.value.offset == damaged
    assert [s.offset for s in await journal.read(damaged, max_entries=10, max_bytes=1 << 20)] == [3]
    await journal.close()


async def test_flipped_bits_in_the_file_never_come_back_as_wrong_bytes(tmp_path: Path) -> None:
    import random

    journal = SqliteJournal(tmp_path / "j.db")
    await journal.open()
    given = {n: entry(n, n, size_bytes=300) for n in range(1, 101)}
    await journal.append(list(given.values()))
    await journal.close()
    sound = (tmp_path / "j.db").read_bytes()
    rng = random.Random(5)
    reported = 0
    for _ in range(60):
        spoilt = bytearray(sound)
        at = rng.randrange(8192 * 2, len(spoilt))
        spoilt[at] ^= 1 << rng.randrange(8)
        (tmp_path / "j.db").write_bytes(spoilt)
        journal = SqliteJournal(tmp_path / "j.db")
        try:
            await journal.open()
            after = 0
            while after < 100:
                try:
                    for stored in await journal.read(after, max_entries=100, max_bytes=1 << 20):
                        assert stored.payload == given[stored.first].payload
                        assert stored.fresh == ((stored.first, stored.last),)
                        after = stored.offset
                except EntryDamaged as err:
                    reported += 1
                    after = max(after + 1, err.offset)
        except JournalBroken:
            reported += 1
        finally:
            await journal.close()
    assert reported > 5


# --- limits of memory, closing, heartbeats ---


async def test_the_dedupe_memory_is_bounded_and_what_was_pushed_out_is_still_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloud.journal.sqlite.CACHED_SETS", 10)
    journal = SqliteJournal(tmp_path / "j.db", commit_interval_s=0.0)
    await journal.open()
    for n in range(50):
        await journal.append([entry(1, 5, gateway=f"t/g{n}")])
    assert len(journal._held) <= 10
    again = await journal.append([entry(1, 5, gateway=f"t/g{n}") for n in range(50)])
    assert all(a.offset is None for a in again)
    await journal.close()


async def test_what_waits_at_close_is_committed_and_later_calls_are_refused(
    open_journal: OpenJournal,
) -> None:
    journal = await open_journal()
    waiting = [asyncio.create_task(journal.append([entry(n, n)])) for n in range(1, 20)]
    await asyncio.sleep(0)
    await journal.close()
    assert len(await asyncio.gather(*waiting)) == 19
    with pytest.raises(JournalBroken, match="closed"):
        await journal.append([entry(50, 50)])
    await journal.close()


async def test_a_caller_that_gave_up_harms_nobody(open_journal: OpenJournal) -> None:
    journal = await open_journal()
    gone = asyncio.create_task(journal.append([entry(1, 1)]))
    stays = asyncio.create_task(journal.append([entry(2, 2)]))
    await asyncio.sleep(0)
    gone.cancel()
    assert (await stays)[0].offset is not None
    assert (await journal.append([entry(3, 3)]))[0].offset is not None
    await journal.close()


async def test_the_latest_heartbeat_of_each_gateway_is_kept(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "j.db")
    await journal.open()
    await journal.record_state("a/b", 1, b'{"n":1}')
    await journal.record_state("a/b", 2, '{"n":"é"}'.encode())
    await journal.record_state("a/c", 3, b"{}")
    states = await journal.states()
    assert [(s.gateway, s.received_at_ns, s.state) for s in states] == [
        ("a/b", 2, '{"n":"é"}'.encode()),
        ("a/c", 3, b"{}"),
    ]
    await journal.close()
