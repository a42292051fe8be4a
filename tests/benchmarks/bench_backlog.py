"""A day without a link: 24 h at 100 readings/s in the buffer, then the link comes back while live readings go on.

Ten devices of ten points, once a second; the day is put into the buffer by the buffer itself, then the real agent runs
against the real broker and cloud. Told: how long until all of it is acked by the journal, and how old live readings
were when the journal had them meanwhile (from the journal's own book). Baseline of the same run: copying the buffer's
frames out of SQLite, sealing them and writing them to another SQLite file with a sync per batch group, without a
network.

`bench_backlog [hours]`
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import sqlite3
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from agent.buffer import Buffer
from agent.clock import SystemClock
from config.agent import Buffer as BufferSettings
from drivers.contract import Point, Scan, ValueType, boot_ns
from sync import wire
from sync.identity import GatewayName
from tests.servers import run
from tests.servers.process import free_port, port_open, wait_until
from tests.system.child import BIN, Child

DEVICES: Final = 10
POINTS: Final = 10


async def fill(path: Path, hours: float) -> int:
    """A day of frames, as the agent would have kept them; how many readings."""
    buffer = await Buffer.open(path, GatewayName("bench", "g"), BufferSettings(), SystemClock())
    points = tuple(Point(name=f"p{k}", type=ValueType.F64) for k in range(POINTS))
    packings = [
        buffer.register(wire.layout_of(f"d{d}", "simulator", "simulator", points)) for d in range(DEVICES)
    ]
    scans = int(hours * 3600)
    start = boot_ns() - scans * 10**9
    for k in range(scans):
        for d, packing in enumerate(packings):
            values = [round(20 + d + (k * 7 + p * 13) % 100 / 100, 2) for p in range(POINTS)]
            frame = wire.encode_scan(packing, Scan(start + k * 10**9 + d, points, values), buffer.boot)
            if not buffer.append(frame, POINTS):
                await buffer.commit()
                assert buffer.append(frame, POINTS)
        if k % 200 == 199:
            await buffer.commit()
    await buffer.commit()
    kept = buffer.state.kept_readings
    await buffer.close()
    return kept


def bare(buffer: Path, target: Path) -> float:
    """Seconds to read every frame, seal them 1,000 at a time, and put the batches into a synced SQLite file."""
    began = time.monotonic()
    source, out = sqlite3.connect(f"file:{buffer}?mode=ro", uri=True), sqlite3.connect(target)
    out.executescript(
        "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; CREATE TABLE b(n INTEGER PRIMARY KEY, data BLOB)"
    )
    frames: list[bytes] = []
    first = 1
    for (data,) in source.execute("SELECT data FROM frames ORDER BY seq"):
        frames.append(data)
        if len(frames) == 1000:
            out.execute(
                "INSERT INTO b(data) VALUES (?)", (wire.seal("a/b", 1, first, frames, [], [], 1).payload,)
            )
            out.commit()
            first, frames = first + 1000, []
    out.close()
    source.close()
    return time.monotonic() - began


def live_ages(journal: Path, since_boot_ns: int) -> list[float]:
    """How old each live scan was when the journal had it."""
    ages = []
    with sqlite3.connect(f"file:{journal}?mode=ro", uri=True) as db:
        for received_ns, payload in db.execute("SELECT received_at_ns, payload FROM entry"):
            _, body = wire.open_body(payload)
            clocks = wire.wall_clock(body.clocks)
            for raw in body.frames:
                frame = wire.decode_frame(raw)
                if isinstance(frame, wire.ScanFrame) and frame.taken_at_ns >= since_boot_ns:
                    row = clocks[frame.boot]
                    ages.append((received_ns - (row.wall_ns + frame.taken_at_ns - row.boot_ns)) / 1e9)
    return sorted(ages)


def status(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / "gateway/status.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found


def main() -> None:
    hours = float(sys.argv[1]) if len(sys.argv) > 1 else 24.0
    with tempfile.TemporaryDirectory(prefix="hg-bench-") as name:
        folder = Path(name)
        (folder / "gateway").mkdir(mode=0o700)
        kept = asyncio.run(fill(folder / "gateway/buffer.db", hours))
        size = sum(file.stat().st_size for file in (folder / "gateway").iterdir())
        print(f"{kept:,} readings in {size / 1e6:.0f} MB of buffer", flush=True)
        bare_s = bare(folder / "gateway/buffer.db", folder / "bare.db")
        for who in ("token", "word"):
            (folder / who).touch(0o600)
            (folder / who).write_text(secrets.token_urlsafe(24))
        users = {"bench/g": (folder / "token").read_text(), "headgate-cloud": (folder / "word").read_text()}
        with run.nats(users=users, sync_always=False) as broker:
            port = free_port()
            (folder / "cloud.toml").write_text(
                f'[server]\ndata_dir = "{folder}/cloud"\nport = {port}\n[embedded]\nenabled = false\n'
                f'[mqtt]\nhost = "127.0.0.1"\nport = {broker.mqtt_port}\ntls = false\npassword_file = "{folder}/word"\n'
                "[archive]\ncommit_interval_s = 3600.0\ncommit_mb = 256\n"
            )
            devices = "".join(
                f'[[device]]\nname = "d{d}"\ndriver = "simulator"\n'
                + "".join(f'[[device.point]]\nname = "p{p}"\n' for p in range(POINTS))
                for d in range(DEVICES)
            )
            (folder / "agent.toml").write_text(
                f'[gateway]\ntenant = "bench"\nname = "g"\nstate_dir = "{folder}/gateway"\n'
                f'[uplink]\nhost = "127.0.0.1"\nport = {broker.mqtt_port}\ntls = false\n'
                f'token_file = "{folder}/token"\n{devices}'
            )
            env = dict(os.environ)
            serve = [str(BIN / "headgate-cloud"), "serve", "--config", f"{folder}/cloud.toml"]
            cloud = Child("cloud", serve, folder, env)
            agent = Child(
                "agent", [str(BIN / "headgate"), "run", "--config", f"{folder}/agent.toml"], folder, env
            )
            cloud.start()
            try:
                wait_until(lambda: port_open(port), timeout_s=60, what="the cloud to listen")
                began, began_boot = time.monotonic(), boot_ns()
                agent.start()

                def drained() -> bool:
                    agent.check()
                    return int((status(folder).get("buffer") or {}).get("settled_readings", 0)) >= kept

                wait_until(drained, timeout_s=900, what="the backlog to be acked")
                took = time.monotonic() - began
                agent.end(signal.SIGTERM)
                cloud.end(signal.SIGTERM)
            finally:
                agent.stop_hard()
                cloud.stop_hard()
        ages = live_ages(folder / "cloud/journal.db", began_boot)
        print(
            f"drained in {took:.0f} s, {kept / took:,.0f} readings/s (a bare copy: {bare_s:.1f} s);"
            f" live readings meanwhile: p50 {ages[len(ages) // 2]:.2f} s, p95 {ages[len(ages) * 95 // 100]:.2f} s old"
            f" when the journal had them ({len(ages)} scans)"
        )


if __name__ == "__main__":
    main()
