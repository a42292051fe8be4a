"""The buffer alone: CPU and bytes on disk for what is kept, cut for the live lane, settled by the next commit.

Baseline of the same run: SQLite's own `executemany` of the same frames with the same number per commit (WAL,
`synchronous=FULL`), deleted by the next commit, and nothing else: no CRC, no batches, no accounts, no sealing.
"""

from __future__ import annotations

import random
import sqlite3
import tempfile
import time
from pathlib import Path

from agent.clock import SystemClock
from agent.store import Group, Limits, Store
from drivers.contract import Point, Scan, ValueType
from sync.wire import Packing, encode_scan, layout_of

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


def main() -> None:
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
