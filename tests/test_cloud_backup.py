"""Backup and restore: the drill, on a real server that goes on receiving while it is copied."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path

import httpx
import msgspec
import pytest

from cloud.api.operator import Operator
from cloud.backup import MANIFEST, UNFINISHED, BackupError, Manifest, back_up, check, restore
from cloud.dead_letters import DeadLetters
from cloud.journal.sqlite import SqliteJournal
from cloud.server import CloudServer, ServeError
from config.cloud import Archive, Cloud, Gateway, Server
from tests.fakes.batches import GATEWAY, POINTS, batch
from tests.servers.process import free_port

TOKEN = "a-token-that-is-long-enough"
FRAMES = 3  #: of a batch


class Running:
    def __init__(self, server: CloudServer, client: httpx.AsyncClient) -> None:
        self.server = server
        self.client = client

    async def send(self, first: int) -> int:
        answer = await self.client.post("/v1/ingest", content=batch(first, FRAMES))
        return answer.status_code

    async def metrics(self) -> dict[str, float]:
        text = (await self.client.get("/metrics")).text
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in lines}

    async def until(self, said: Callable[[dict[str, float]], bool]) -> None:
        async with asyncio.timeout(40):
            while not said(await self.metrics()):  # noqa: ASYNC110 - asked over HTTP
                await asyncio.sleep(0.05)

    async def settled(self, offset: int) -> None:
        await self.until(
            lambda m: all(
                m.get(f'headgate_sink_position{{sink="{s}"}}', 0) >= offset for s in ("embedded", "archive")
            )
        )


def config_of(folder: Path) -> Cloud:
    token = folder / "token"
    if not token.exists():
        token.touch(mode=0o600)
        token.write_text(TOKEN)
    return Cloud(
        server=Server(data_dir=str(folder / "data"), port=free_port(), drain_s=5.0),
        gateway=[Gateway(tenant="acme", name="plant-1", token_file=str(token))],
        archive=Archive(commit_interval_s=0.2),
    )


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[Running]:
    server = CloudServer(config_of(folder))
    task = asyncio.create_task(server.run())
    started = asyncio.create_task(server.started.wait())
    await asyncio.wait([started, task], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        started.cancel()
        await task
    headers = {"Headgate-Gateway": GATEWAY, "Authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{server.address[1]}", headers=headers, timeout=20
    ) as client:
        yield Running(server, client)
    server.stop()
    await task


async def verdict_of(folder: Path) -> tuple[bool, list[tuple[str, int, int, int]], int]:
    """Whether all balances, (sink, stored, missing, doubled), and the absent frames; counted in the files."""
    data_dir = folder / "data"
    journal, letters = SqliteJournal(data_dir / "journal.db"), DeadLetters(data_dir / "dead_letters.db")
    await journal.open()
    await letters.open()
    operator = Operator(config_of(folder), dead_letters=letters, journal=journal)
    try:
        verdict = await operator.verify()
    finally:
        await operator.close()
        await letters.close()
        await journal.close()
    assert verdict.trouble == []
    rows = [(a.sink, a.stored, a.missing, a.doubled) for a in verdict.sinks]
    return verdict.ok, rows, sum(f.absent for f in verdict.frames)


async def test_a_backup_of_a_running_server_restores_all_that_was_acknowledged_before_it_and_tells_what_came_after(
    tmp_path: Path,
) -> None:
    copy = tmp_path / "copy"
    async with serving(tmp_path) as running:
        for n in range(40):
            assert await running.send(1 + FRAMES * n) == 200
        sending = True

        async def go_on() -> int:
            n = 40
            while sending:
                assert await running.send(1 + FRAMES * n) == 200
                n += 1
            return n

        more = asyncio.create_task(go_on())
        made = await asyncio.to_thread(back_up, tmp_path / "data", copy)
        sending = False
        total = await more
        for n in range(total, total + 5):  # acknowledged after the backup for certain
            assert await running.send(1 + FRAMES * n) == 200
    assert made == check(copy)
    assert not any(b"a-token-that" in p.read_bytes() for p in copy.rglob("*") if p.is_file())
    kept = made.last_offset
    assert 40 <= kept <= total

    # The machine is lost; another one takes over.
    shutil.rmtree(tmp_path / "data")
    assert restore(copy, tmp_path / "data") == made
    for file in made.files:
        assert hashlib.sha256((tmp_path / "data" / file.path).read_bytes()).hexdigest() == file.sha256

    async with serving(tmp_path) as running:
        await running.settled(kept)  # what the sinks' copies lacked is delivered again
        assert await running.send(1) == 409  # and what it held is known
        for n in range(total + 5, total + 10):
            assert await running.send(1 + FRAMES * n) == 200
        await running.settled(kept + 5)
    ok, rows, absent = await verdict_of(tmp_path)
    readings = (kept + 5) * FRAMES * len(POINTS)
    assert rows == [("archive", readings, 0, 0), ("embedded", readings, 0, 0)] or rows == [
        ("embedded", readings, 0, 0), ("archive", readings, 0, 0),
    ]  # fmt: skip
    # What came between the backup and the loss is a hole that is named.
    assert absent == (total + 5 - kept) * FRAMES
    assert ok  # the gateway has not said yet that it holds nothing more


async def test_a_hole_whose_gateway_holds_nothing_more_is_missing(tmp_path: Path) -> None:
    async with serving(tmp_path) as running:
        assert await running.send(1) == 200
        assert await running.send(10) == 200
        buffer = {"oldest_age_s": None, "pending_frames": 0, "parked_frames": 0}
        state = msgspec.json.encode({"buffer": buffer, "problems": [{"code": "clock_skew"}, "link_waits"]})
        assert (await running.client.post("/v1/state", content=state)).status_code == 204
        await running.settled(2)
        ready = (await running.client.get("/readyz")).json()
        assert ready["gateways"] == [{"gateway": GATEWAY, "codes": ["clock_skew", "link_waits"]}]
    ok, rows, absent = await verdict_of(tmp_path)
    assert (ok, absent) == (False, 6)
    assert all(row[2:] == (0, 0) for row in rows)


@pytest.fixture
async def made(tmp_path: Path) -> Path:
    async with serving(tmp_path) as running:
        for n in range(5):
            assert await running.send(1 + FRAMES * n) == 200
        await running.settled(5)
    back_up(tmp_path / "data", tmp_path / "copy")
    return tmp_path


async def test_a_backup_that_is_not_what_was_made_is_refused_and_touches_nothing(made: Path) -> None:
    copy, target = made / "copy", made / "other"
    manifest = (copy / MANIFEST).read_bytes()
    journal = copy / "journal.db"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(BackupError, match="checksum differs"):
        restore(copy, target)
    journal.write_bytes(whole[:-8192])
    with pytest.raises(BackupError, match="checksum differs"):
        restore(copy, target)
    journal.unlink()
    with pytest.raises(BackupError, match="is missing"):
        restore(copy, target)
    journal.write_bytes(whole)
    (copy / "more").write_text("?")
    with pytest.raises(BackupError, match="not in the manifest"):
        restore(copy, target)
    (copy / "more").unlink()
    newer = msgspec.structs.replace(msgspec.json.decode(manifest, type=Manifest), journal_version=99)
    (copy / MANIFEST).write_bytes(msgspec.json.encode(newer))
    with pytest.raises(BackupError, match="newer"):
        restore(copy, target)
    (copy / MANIFEST).write_bytes(manifest)
    assert not target.exists()
    restore(copy, target)


async def test_a_data_folder_that_holds_something_is_set_aside_only_when_told(made: Path) -> None:
    with pytest.raises(BackupError, match="--replace"):
        restore(made / "copy", made / "data")
    before = (made / "data/journal.db").read_bytes()
    restore(made / "copy", made / "data", replace=True)
    (aside,) = (made / "data").glob("before-*")
    assert (aside / "journal.db").read_bytes() == before
    assert (aside / "archive").is_dir()


async def test_while_a_server_runs_nothing_is_restored_over_it(made: Path) -> None:
    async with serving(made):
        with pytest.raises(BackupError, match="stop it first"):
            restore(made / "copy", made / "data", replace=True)


async def test_a_restore_that_was_cut_short_starts_no_server_and_can_be_run_again(made: Path) -> None:
    (made / "data" / UNFINISHED).touch()
    (made / "data/journal.db").write_bytes(b"half of it")
    with pytest.raises(ServeError, match="cut short"):
        async with serving(made):
            pass
    restore(made / "copy", made / "data")
    assert not (made / "data" / UNFINISHED).exists()
    async with serving(made) as running:
        assert await running.send(1) == 409


async def test_a_backup_is_not_written_over_another_and_a_failed_one_leaves_nothing(made: Path) -> None:
    with pytest.raises(BackupError, match="not empty"):
        back_up(made / "data", made / "copy")
    with closing(sqlite3.connect(made / "data/dead_letters.db")) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    (made / "data/dead_letters.db").write_bytes(b"no database at all" * 1000)
    with pytest.raises(BackupError):
        back_up(made / "data", made / "another")
    assert not (made / "another").exists()
    assert not (made / "another.partial").exists()
