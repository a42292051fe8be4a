"""The cloud's delivery killed at the boundaries of its sinks, hundreds of times over one set of stores.

The shipped journal, dead letters, runners, embedded store and archive, in a process of their own that is forked from
one that has everything imported, and dies at a named place (SIGKILL). Rules:

1. Each life appends batches, delivers, and is killed; the next one goes on with what it finds. A rule of the embedded
   store refuses some rows all the while, so that bisection and dead letters are on the way in every life.
2. At the end one life is left alone: it catches up, the rule goes, the dead letters are replayed.
3. Then every frame that the journal has acknowledged is in each sink exactly once, with its own value.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import importlib
import os
import random
import signal
import sqlite3
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from deltalake import DeltaTable

from cloud.dead_letters import DeadLetters
from cloud.journal.contract import Entry
from cloud.journal.sqlite import SqliteJournal
from cloud.runner import SinkRunner
from cloud.sinks.archive import ArchiveSink
from cloud.sinks.embedded import EmbeddedSink
from config import failpoint
from config.cloud import Archive
from sync.wire import open_head
from tests.fakes.batches import POINTS, batch
from tests.torture.crash_points import SINK, places
from tests.torture.report import Finding, record

#: What is else imported when it is first needed, by each life anew.
PRELOADED: Final = (
    "aiosqlite", "alembic.command", "alembic.runtime.migration", "alembic.script", "cloud.registry",
    "cloud.sinks.archive_columns", "deltalake.transaction", "pyarrow.compute", "pyarrow.parquet",
    "sqlalchemy.dialects.sqlite.aiosqlite",
)  # fmt: skip

LIFE_S: Final = 40.0  #: within which a place must be reached
BATCHES: Final = 6  #: that a life adds at a time
FRAMES: Final = 3
REFUSED_EVERY: Final = 40
LATEST: Final = 5
NOT_HERE: Final = ("influxdb.", "archive.before_compact", "archive.after_compact", "runner.after_replay")


def boundaries() -> list[str]:
    return [p.name for p in places() if p.name.startswith(SINK) and not p.name.startswith(NOT_HERE)]


async def _life(folder: Path, *, last: bool) -> None:
    """Append and deliver: for ever, or until all is settled and replayed."""
    journal = SqliteJournal(folder / "journal.db", free_disk_bytes=0, commit_interval_s=0.0)
    letters = DeadLetters(folder / "dead_letters.db")
    await journal.open()
    await letters.open()
    sinks = (EmbeddedSink(folder), ArchiveSink(Archive(commit_interval_s=0.05), folder / "archive"))
    runners = [SinkRunner(sink, journal, letters, retry_base_s=0.01) for sink in sinks]
    tasks = [asyncio.create_task(runner.run()) for runner in runners]
    held = await journal.holds("acme/plant-1", 4711, 1, 2**40)
    first = held[-1][1] + 1 if held else 1
    while True:
        for _ in range(0 if last else BATCHES):
            payload = batch(first, FRAMES)
            head = open_head(payload)[0]
            now_ns = time.time_ns()
            await journal.append(
                [Entry(head.gateway, head.epoch, head.first, head.last, head.readings, now_ns, payload)]
            )
            first += FRAMES
        while any([(await runner.state()).position < journal.last_offset for runner in runners]):  # noqa: ASYNC110 - asked as anybody would
            await asyncio.sleep(0.005)
        for task in tasks:
            if task.done():
                task.result()
        if not last:
            _refuse(folder)
            continue
        _refuse(folder, no_more=True)
        ids = [letter.id for letter in await letters.letters(limit=100_000)]
        done = await runners[0].replay(ids)
        if done.refused or done.unknown:
            raise RuntimeError(f"replay: {done.refused[:3]}")
        for runner in runners:
            await runner.drain(10.0)
        await letters.close()
        await journal.close()
        return


def _refuse(folder: Path, *, no_more: bool = False) -> None:
    rule = (
        "DROP TRIGGER IF EXISTS refusing"
        if no_more
        else "CREATE TRIGGER IF NOT EXISTS refusing BEFORE INSERT ON readings"
        f" WHEN NEW.seq % {REFUSED_EVERY} = 0 BEGIN SELECT RAISE(ABORT, 'refused by a rule'); END"
    )
    with contextlib.closing(sqlite3.connect(folder / "readings.sqlite", timeout=20.0)) as db, db:
        db.execute(rule)


def fork(folder: Path, point: str | None, log: Path) -> int:
    """One life, armed or the last; its exit status, as `waitpid` tells, -1 where it had to be ended."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(out, 1)
            os.dup2(out, 2)
            if point is not None:
                failpoint._armed = failpoint.Failpoint(point, failpoint._kill)  # type: ignore[misc]
            asyncio.run(_life(folder, last=point is None))
            code = 0
        except BaseException:  # noqa: BLE001 - told, and the process ends whatever it was
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    deadline_s = time.monotonic() + (LIFE_S if point is not None else 10 * LIFE_S)
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        if time.monotonic() > deadline_s:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -1
        time.sleep(0.002)


def audit(folder: Path) -> tuple[int, list[str]]:
    """How many readings were acknowledged, and what is wrong with where they are."""
    with contextlib.closing(sqlite3.connect(folder / "journal.db")) as db:
        held = db.execute("SELECT first, last FROM held").fetchall()
    if len(held) != 1 or held[0][0] != 1:
        return 0, [f"the journal holds {held[:4]}"]
    seqs: int = held[0][1]
    expected = {(seq, point.name, float(seq % 65536)) for seq in range(1, seqs + 1) for point in POINTS}
    with contextlib.closing(sqlite3.connect(folder / "readings.sqlite")) as db:
        embedded = db.execute(
            "SELECT r.seq, p.name, r.value FROM readings r JOIN points p ON p.id = r.point_id"
        ).fetchall()
    with contextlib.closing(sqlite3.connect(folder / "dead_letters.db")) as db:
        left: int = db.execute("SELECT count(*) FROM letters").fetchone()[0]
    columns = DeltaTable(str(folder / "archive/readings")).to_pyarrow_table(columns=["seq", "point", "value"])
    archive = list(zip(*(columns[name].to_pylist() for name in ("seq", "point", "value")), strict=True))
    wrong = [f"{left} dead letters are left"] if left else []
    for name, rows in (("embedded", embedded), ("archive", archive)):
        found = set(rows)
        if len(rows) != len(found):
            wrong.append(f"{name}: {len(rows) - len(found)} doubled")
        if found != expected:
            lost, more = sorted(expected - found), sorted(found - expected)
            wrong.append(f"{name}: {len(lost)} lost as {lost[:2]}, {len(more)} too many as {more[:2]}")
    return len(expected), wrong


def run(
    folder: Path, kills: int, seed: int, deadline_s: float = float("inf")
) -> tuple[collections.Counter[str], list[str], int, list[float]]:
    """Kills by place, what is wrong, readings acknowledged, seconds from one kill to the next."""
    for module in PRELOADED:
        importlib.import_module(module)
    rng = random.Random(seed)
    log = folder / "lives.log"
    names = boundaries()
    counts: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    took: list[float] = []
    order: list[str] = []
    while sum(counts.values()) < kills and time.monotonic() < deadline_s and not wrong:
        if not order:  # every place comes as often as every other
            order = rng.sample(names, len(names))
        name = order.pop()
        nth = rng.randint(1, LATEST)
        began_s = time.monotonic()
        status = fork(folder, f"{name}:{nth}", log)
        if status == -1:
            status = fork(folder, f"{name}:1", log)
        if status != signal.SIGKILL:
            tail = log.read_text(errors="replace")[-1500:] if log.exists() else ""
            wrong.append(f"{name}:{nth} was not reached (status {status}) {tail}")
            break
        counts[name] += 1
        took.append(time.monotonic() - began_s)
        if sum(counts.values()) % 25 == 0:
            print(f"{sum(counts.values()):5d} kills, {statistics.median(took):.2f} s each", flush=True)
    if (status := fork(folder, None, log)) != 0:
        wrong.append(f"the last life ended with {status}: {log.read_text(errors='replace')[-1500:]}")
        return counts, wrong, 0, took
    readings, found = audit(folder)
    return counts, wrong + found, readings, took


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture.sink_kills", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--record", action="store_true")
    told = parser.parse_args(argv)
    print(f"seed {told.seed}", flush=True)
    began_s = time.monotonic()
    deadline_s = began_s + told.minutes * 60 if told.minutes else float("inf")
    with tempfile.TemporaryDirectory(prefix="sink-kills-") as folder:
        counts, wrong, readings, took = run(Path(folder), told.kills, told.seed, deadline_s)
    kills = sum(counts.values())
    print(f"{kills} kills at {len(counts)} of {len(boundaries())} places, {readings} readings acknowledged")
    for line in wrong:
        print(f"VIOLATION: {line} (seed {told.seed})")
    if told.record:
        record(
            Finding(
                proof="sink_kills",
                promise="killed at any boundary of a sink, bisection and dead letters on the way, every acknowledged "
                "reading is in each sink exactly once",
                command=f"python -m tests.torture.sink_kills --kills {told.kills} --seed {told.seed} --record",
                passed=not wrong,
                figures={
                    "kills": kills,
                    "places": len(counts),
                    "readings acknowledged": readings,
                    "from start to kill, median s": round(statistics.median(took), 2) if took else 0.0,
                    "violations": len(wrong),
                },
                seed=told.seed,
                took_s=time.monotonic() - began_s,
            )
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
