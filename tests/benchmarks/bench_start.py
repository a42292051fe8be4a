"""How long a person waits: `--help` of the three commands, and a cold start to the first scan, offline: with an empty
buffer and with a full one of 1 GB (`--full MB`), whose pages are dropped from the cache before.

Baselines of the same run: `python -c pass`, and Python with click imported.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from tests.system.child import BIN

RUNS: Final = 7


def wall_s(command: list[str]) -> float:
    """The median of several runs, after one that does not count."""
    took = []
    for _ in range(RUNS + 1):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        took.append(time.perf_counter() - began)
    return statistics.median(took[1:])


def fill(path: Path, mb: int) -> None:
    """A buffer at its cap, of scans of 32 points, a tenth of them bulk and some alarms; then out of the cache."""
    from agent.clock import SystemClock
    from agent.store import Group, Limits, Store
    from drivers.contract import ValueType
    from tests.benchmarks.bench_buffer import groups

    packing, [frames] = groups(ValueType.F32, 32, 20_000, 1)
    path.parent.mkdir(parents=True)
    store = Store(path, "a/b", Limits(max_bytes=mb * 2**20), SystemClock())
    store.open()
    store.commit(Group([], [], [packing.layout]), [], 0)
    size = sum(map(len, frames)) + 16 * len(frames)
    while not store.evicting:
        store.commit(Group(frames, [32] * len(frames), size_bytes=size, alarms=20, bulk=2_000), [], 0)
    print(f"a buffer of {store.size_bytes() / 2**20:.0f} MiB, {store.ledger.held_frames} frames")
    store.close()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def first_scan_s(full_mb: int = 0) -> float:
    """From starting `headgate run` with no cloud to the first scan's own time."""
    with tempfile.TemporaryDirectory(prefix="hg-bench-", dir=Path.cwd() if full_mb else None) as name:
        if full_mb:
            fill(Path(name) / "state/buffer.db", full_mb)
        config = Path(name) / "agent.toml"
        config.write_text(
            f'[gateway]\ntenant = "a"\nname = "b"\nstate_dir = "{name}/state"\n[uplink]\nkind = "none"\n'
            '[[device]]\nname = "d"\ndriver = "simulator"\nperiod_ms = 100\n[[device.point]]\nname = "p"\n'
        )
        began = time.time_ns()
        agent = subprocess.Popen(
            [str(BIN / "headgate"), "run", "--config", str(config)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert agent.stderr is not None
        for line in agent.stderr:
            if "first scan" in line:
                break
        took = (time.time_ns() - began) / 1e9
        agent.send_signal(signal.SIGTERM)
        agent.wait(10)
        status = json.loads((Path(name) / "state/status.json").read_bytes())
        assert status["buffer"]["kept_readings"] > 0
        return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", type=int, default=64, metavar="MB", help="size of the full buffer (64)")
    full_mb = parser.parse_args().full
    bare = wall_s([sys.executable, "-c", "pass"])
    click = wall_s([sys.executable, "-c", "import click"])
    print(f"python -c pass {bare:.3f} s, with click {click:.3f} s")
    for command in ("headgate", "headgate-cloud", "headgate-release"):
        took = wall_s([str(BIN / command), "--help"])
        print(f"{command + ' --help':24} {took:.3f} s ({took / click:.1f} of a bare click)")
    print(
        f"headgate run, offline, to the first scan: {min(first_scan_s() for _ in range(3)):.2f} s (best of three)"
    )
    print(f"the same with a full buffer of {full_mb} MB, not in the cache: {first_scan_s(full_mb):.2f} s")


if __name__ == "__main__":
    main()
