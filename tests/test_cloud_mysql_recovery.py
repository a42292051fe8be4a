"""MySQL point-in-time recovery, as docs/operations.md tells it: a full dump, the binary log up to a time, and the sink
goes on from what the restored store remembers."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cloud.dead_letters import DeadLetters
from cloud.journal.contract import Entry
from cloud.journal.sqlite import SqliteJournal
from cloud.runner import SinkRunner
from cloud.sinks.mysql import MySqlSink, mysql_registry
from config.cloud import MySQL
from tests.fakes.batches import EPOCH, GATEWAY, POINTS, batch
from tests.servers import run

FRAMES = 3


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is missing; apt-get install mariadb-client")
    return found


@contextmanager
def server() -> Iterator[run.MariaDb]:
    """With the binary log on, in rows, flushed at every commit."""
    log = ("--log-bin=binlog", "--binlog-format=ROW", "--sync-binlog=1", "--server-id=1")
    with run.mariadb(extra=log) as there:
        yield there


def asked(there: run.MariaDb, name: str, *arguments: str, given: bytes | None = None) -> bytes:
    """A client program's answer; the password goes by the environment."""
    where = [f"--host={there.host}", f"--port={there.port}", f"--user={there.user}", "--protocol=TCP"]
    done = subprocess.run(
        [tool(name), "--no-defaults", *where, *arguments],
        input=given, capture_output=True, timeout=60, check=False,
        env={**os.environ, "MYSQL_PWD": there.password},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def rows(there: run.MariaDb) -> bytes:
    """All readings with their times, as text: what is compared."""
    query = (
        "SELECT p.name, r.taken_at_ns, r.epoch, r.seq, r.value, r.text, r.reason, r.received_at_ns FROM readings r"
        " JOIN points p ON p.id = r.point_id ORDER BY p.name, r.epoch, r.seq"
    )
    return asked(there, "mariadb", "--batch", f"--execute={query}", there.database)


class Flow:
    """A journal and the MySQL sink's runner on it."""

    def __init__(self, folder: Path) -> None:
        self.journal = SqliteJournal(folder / "journal.db")
        self.letters = DeadLetters(folder / "dead_letters.db")
        self.next = 1

    async def append(self, batches: int) -> None:
        for _ in range(batches):
            payload = batch(self.next, FRAMES)
            last = self.next + FRAMES - 1
            entry = Entry(GATEWAY, EPOCH, self.next, last, FRAMES * len(POINTS), time.time_ns(), payload)
            await self.journal.append([entry])
            self.next = last + 1

    async def deliver(self, there: run.MariaDb) -> None:
        """Until all is in the store."""
        settings = MySQL(
            host=there.host, port=there.port, user=there.user, password_env="UNUSED", database=there.database,
            retention_days=0.0,
        )  # fmt: skip
        runner = SinkRunner(MySqlSink(settings, there.password), self.journal, self.letters)
        task = asyncio.create_task(runner.run())
        async with asyncio.timeout(60):
            while (await runner.state()).position < self.journal.last_offset:  # noqa: ASYNC110 - a counter
                await asyncio.sleep(0.05)
        assert await runner.drain(20.0)
        await task


async def test_a_dump_and_the_binary_log_up_to_a_time_give_back_the_rows_and_the_sink_goes_on_without_doubles(
    tmp_path: Path,
) -> None:
    flow = Flow(tmp_path)
    await flow.journal.open()
    await flow.letters.open()
    with server() as there:
        await flow.append(10)
        await flow.deliver(there)
        # The nightly dump; it notes where the binary log was.
        dump = await asyncio.to_thread(
            asked,
            there,
            "mariadb-dump",
            "--single-transaction",
            "--master-data=2",
            "--databases",
            there.database,
        )
        await flow.append(10)
        await flow.deliver(there)
        wanted = await asyncio.to_thread(rows, there)
        assert wanted.count(b"\n") == 20 * FRAMES * len(POINTS) + 1
        await asyncio.sleep(1.1)  # the binary log's times are whole seconds
        stop = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime())
        await asyncio.sleep(1.1)
        # The accident, after which more is stored that must not be lost either.
        await asyncio.to_thread(
            asked, there, "mariadb", "--execute=DELETE FROM readings WHERE seq % 2 = 0", there.database
        )
        await flow.append(5)
        await flow.deliver(there)
        assert (await asyncio.to_thread(rows, there)) != wanted
        logs = await asyncio.to_thread(asked, there, "mariadb", "--batch", "--execute=SHOW BINARY LOGS")
        names = [line.split(b"\t")[0].decode() for line in logs.splitlines()[1:]]
        (note,) = [line for line in dump.decode().splitlines() if line.startswith("-- CHANGE MASTER TO")]
        begin, position = note.split("'")[1], note.split("MASTER_LOG_POS=")[1].rstrip(";")
        copies = [str(there.process.folder / "data" / name) for name in names[names.index(begin) :]]
        done = await asyncio.to_thread(
            subprocess.run,
            [tool("mariadb-binlog"), "--no-defaults", f"--start-position={position}", f"--stop-datetime={stop}",
             *copies],
            capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode()
    # Another machine.
    with server() as again:
        await asyncio.to_thread(asked, again, "mariadb", given=dump)
        await asyncio.to_thread(asked, again, "mariadb", given=done.stdout)
        assert await asyncio.to_thread(rows, again) == wanted
        # The store remembers an offset from before the accident; the journal's cursor is past it.
        assert await flow.journal.cursor("mysql") == 25
        await flow.append(2)
        await flow.deliver(again)
        settings = MySQL(
            host=again.host, port=again.port, user=again.user, password_env="UNUSED", database=again.database
        )
        registry = mysql_registry(settings, again.password)
        (tally,) = await registry.tally()
        await registry.close()
        assert tally.readings == 27 * FRAMES * len(POINTS)  # every row once
    await flow.letters.close()
    await flow.journal.close()
