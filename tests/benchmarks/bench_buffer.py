"""The buffer alone: CPU and bytes on disk for what is kept, cut for the live lane, settled by the next commit.

Baseline of the same run: SQLite's own `executemany` of the same frames with the same number per commit (WAL,
`synchronous=FULL`), deleted by the next commit, and nothing else: no CRC, no batches, no accounts, no sealing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from agent.buffer import Buffer
from agent.clock import SystemClock
from agent.store import Batch, Group, Limits, Store
from config.agent import Buffer as Settings
from drivers.contract import Point, Scan, ValueType
from sync.identity import GatewayName
from sync.wire import Ack, Packing, encode_scan, layout_of

SHAPES = (
    ("1,000 readings/s, commits of 1 s", ValueType.F32, 32, 31, 300),
    ("1,000 readings/s, commits of 5 s", ValueType.F32, 32, 156, 100),
    ("1,000 readings/s of one point each, 1 s", ValueType.F32, 1, 1000, 60),
    ("bulk: 125 UINT16 per frame, 256 KB per commit", ValueType.U16, 125, 880, 60),
)


def written_bytes() -> int:
    """What this process has made the disk write (proc(5), io)."""
    told = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(told["write_bytes"]) - int(told["cancelled_write_bytes"])


def groups(kind: ValueType, points: int, frames: int, commits: int) -> tuple[Packing, list[list[bytes]]]:
    made = tuple(Point(name=f"p{i}", type=kind) for i in range(points))
    packing = Packing(layout_of("device", "bench", "bench", made))
    rng = random.Random(1)
    draw = (lambda: rng.randrange(65_536)) if kind is ValueType.U16 else (lambda: 20 + rng.random())
    return packing, [
        [
            encode_scan(packing, Scan(10**15 + k * 10**9 + i * 10**6, made, [draw() for _ in made]), 1)
            for i in range(frames)
        ]
        for k in range(commits)
    ]


def buffer(folder: Path, packing: Packing, commits: list[list[bytes]], points: int) -> None:
    store = Store(folder / "buffer.db", "acme/plant-1", Limits(max_bytes=2**30), SystemClock())
    store.open()
    store.commit(Group([], [], [packing.layout]), [], 0)
    acked: list[tuple[int, int]] = []
    for frames in commits:
        size = sum(map(len, frames)) + 16 * len(frames)
        live = store.commit(Group(frames, [points] * len(frames), size_bytes=size), acked, 16)
        acked = [(batch.sealed.first, batch.sealed.last) for batch in live]
    store.commit(Group([], []), acked, 0)
    store.close()


def bare(folder: Path, commits: list[list[bytes]]) -> None:
    conn = sqlite3.connect(folder / "bare.db", isolation_level=None)
    conn.execute("PRAGMA journal_mode = WAL")
    conn.execute("PRAGMA synchronous = FULL")
    conn.execute("CREATE TABLE frames (seq INTEGER PRIMARY KEY AUTOINCREMENT, data BLOB NOT NULL)")
    last = 0
    for frames in commits:
        conn.execute("BEGIN IMMEDIATE")
        conn.execute("DELETE FROM frames WHERE seq <= ?", (last,))
        conn.executemany("INSERT INTO frames (data) VALUES (?)", [(frame,) for frame in frames])
        last += len(frames)
        conn.execute("COMMIT")
    conn.close()


SCANS_PER_S = 400
STEADY_POINTS = 125
WINDOW = 16  #: batches on their way at most, as the forwarder's
DAY_COMMITS = 1_000
DAY_READINGS = 10


def rss_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def _steady(folder: Path, seconds: float) -> None:
    points = tuple(Point(name=f"p{i}", type=ValueType.U16) for i in range(STEADY_POINTS))
    values = [[random.Random(k).randrange(65_536) for _ in points] for k in range(64)]
    buffer = await Buffer.open(
        folder / "buffer.db", GatewayName("acme", "plant-1"), Settings(), SystemClock()
    )
    packing = buffer.register(layout_of("device", "bench", "bench", points))
    acks: list[Batch] = []
    sent = refused = 0

    def live(batches: Sequence[Batch]) -> None:
        acks.extend(batches)

    buffer.on_live, buffer.live_room = live, WINDOW
    run = asyncio.create_task(buffer.run())
    began_s, cpu_s = time.monotonic(), time.process_time()
    series: list[tuple[float, float, int, int]] = []  # time, RSS, bytes on disk, frames held and pending
    late_s = 0.0
    try:
        while (now_s := time.monotonic() - began_s) < seconds:
            due = int(now_s * SCANS_PER_S)
            late_s = max(late_s, (due - sent) / SCANS_PER_S)
            for k in range(sent, due):
                scan = Scan(time.clock_gettime_ns(time.CLOCK_BOOTTIME), points, values[k % len(values)])
                refused += not buffer.append(encode_scan(packing, scan, buffer.boot), STEADY_POINTS)
            sent = max(sent, due)
            if buffer.has_backlog:
                acks.extend(await buffer.claim(4))
            done, acks = acks[:WINDOW], acks[WINDOW:]
            for batch in done:  # what the commits of the last turn have cut arrives now
                buffer.settle(Ack(batch.sealed.epoch, ((batch.sealed.first, batch.sealed.last),)))
            if now_s >= len(series):
                state = buffer.state
                series.append(
                    (now_s, rss_mb(), state.size_bytes, state.buffered_frames + state.pending_frames)
                )
            await asyncio.sleep(0.01)
        ran_s, used_s = time.monotonic() - began_s, time.process_time() - cpu_s
        state = buffer.state
        settled = state.settled_readings
        print(
            f"steady, {ran_s:.0f} s: {sent * STEADY_POINTS / ran_s:,.0f} readings/s appended,"
            f" {settled / ran_s:,.0f} settled; {refused} scans refused; at most {late_s:.2f} s late;"
            f" longest commit {state.commit_max_s:.2f} s; {used_s / ran_s:.2f} cores"
        )
        settled_in = [one for one in series if one[0] >= min(30.0, seconds / 3)]
        slope = statistics.linear_regression([s[0] for s in settled_in], [s[1] for s in settled_in]).slope
        print(
            f"RSS {settled_in[0][1]:.1f} MB, at the end {settled_in[-1][1]:.1f} MB: {slope * 3600:+.2f} MB/h"
        )
        for name, column in (("bytes on disk", 2), ("frames held", 3)):
            half = len(settled_in) // 2
            most = [max(int(s[column]) for s in part) for part in (settled_in[:half], settled_in[half:])]
            print(f"{name}: at most {most[0]:,} in the first half, {most[1]:,} in the second")
    finally:
        run.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await run
        await buffer.close()


def per_day(folder: Path) -> None:
    packing, commits = groups(ValueType.F32, 1, DAY_READINGS, DAY_COMMITS)
    disk = written_bytes()
    buffer(folder, packing, commits, 1)
    day = (written_bytes() - disk) * 86_400 / DAY_COMMITS
    print(f"{DAY_READINGS} readings/s of one point each, commits of 1 s, each settled by the next:"
          f" {day / 1e9:.2f} GB written a day (from {DAY_COMMITS} commits back to back)")  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steady", type=float, metavar="SECONDS")
    options.add_argument("--per-day", action="store_true")
    told = options.parse_args(argv)
    if not (told.steady or told.per_day):
        compare()
        return
    with tempfile.TemporaryDirectory(prefix="headgate-bench-", dir=Path.cwd()) as folder:
        if told.per_day:
            per_day(Path(folder))
        if told.steady:
            asyncio.run(_steady(Path(folder), told.steady))


def compare() -> None:
    for name, kind, points, frames, commits in SHAPES:
        packing, made = groups(kind, points, frames, commits)
        readings = points * frames * commits
        figures = []
        for work in ("ours", "bare"):
            with tempfile.TemporaryDirectory(prefix="headgate-bench-", dir=Path.cwd()) as folder:
                disk, cpu_s = written_bytes(), time.process_time()
                if work == "ours":
                    buffer(Path(folder), packing, made, points)
                else:
                    bare(Path(folder), made)
                figures.append((written_bytes() - disk, time.process_time() - cpu_s))
        (ours_bytes, ours_s), (bare_bytes, bare_s) = figures
        print(
            f"{name}: {ours_bytes / readings / 8:.2f} bytes written per payload byte ({ours_bytes / bare_bytes:.2f} x"
            f" bare SQLite); {readings / ours_s / 1e6:.1f} M readings per CPU-second, sealed for sending"
            f" ({ours_s / bare_s:.1f} x bare SQLite's CPU)"
        )


if __name__ == "__main__":
    main()
