"""The Modbus driver against bare pymodbus in the same run: readings per CPU-second of the client's process.

    python -m tests.benchmarks.bench_modbus_driver [--seconds 2] [--json]

The peer is pymodbus' server in a process of its own, on another core where there is one. A reading is one value with
its quality in a `Scan`; the bare client's is one register in its reply's list.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from pymodbus.client import AsyncModbusTcpClient

from drivers.registry import build

_PEER = Path(__file__).parent.parent / "fakes" / "modbus_peer.py"
CASES = (("u16", 125), ("u16", 10), ("u16", 1), ("f32", 62), ("i32 CDAB", 62))
ROUNDS = 5


async def _cost_s(once: Callable[[], Awaitable[object]], seconds: float) -> float:
    """CPU seconds of one request."""
    for _ in range(50):
        await once()
    until = time.monotonic() + seconds
    begun, requests = time.process_time(), 0
    while time.monotonic() < until:
        for _ in range(20):
            await once()
        requests += 20
    return (time.process_time() - begun) / requests


async def measure(port: int, seconds: float) -> list[dict[str, float | str]]:
    rows: list[dict[str, float | str]] = []
    for what, values in CASES:
        type_, _, order = what.partition(" ")
        wide = 1 if type_ == "u16" else 2
        points = [{"name": f"p{i}", "register": i * wide, "type": type_} for i in range(values)]
        options: dict[str, object] = {"host": "127.0.0.1", "port": port, "order": order or "ABCD"}
        driver = build("bench", "modbus", options, points)
        client = AsyncModbusTcpClient("127.0.0.1", port=port)
        await driver.connect()
        await client.connect()
        count = values * wide
        ours_s = bare_s = float("inf")
        try:
            # In turns, and the best of each: what else runs on the machine costs both alike.
            for _ in range(ROUNDS):
                ours_s = min(
                    ours_s,
                    await _cost_s(lambda d=driver: d.read(d.points), seconds / ROUNDS),  # type: ignore[misc]
                )
                bare_s = min(
                    bare_s,
                    await _cost_s(
                        lambda c=client, n=count: c.read_holding_registers(0, count=n, device_id=1),  # type: ignore[misc]
                        seconds / ROUNDS,
                    ),
                )
        finally:
            await driver.close()
            client.close()
        rows.append(
            {
                "case": f"{values} x {what}",
                "readings_per_cpu_s": round(values / ours_s),
                "us_per_request": round(ours_s * 1e6, 1),
                "pymodbus_readings_per_cpu_s": round(values / bare_s),
                "pymodbus_us_per_request": round(bare_s * 1e6, 1),
                "ratio": round(bare_s / ours_s, 2),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    peer = subprocess.Popen([sys.executable, _PEER, "0"], stdout=subprocess.PIPE, text=True)
    try:
        os.sched_setaffinity(peer.pid, {cores[-1]})
        os.sched_setaffinity(0, {cores[0]})
        assert peer.stdout is not None
        rows = asyncio.run(measure(int(peer.stdout.readline()), arguments.seconds))
    finally:
        peer.terminate()
        peer.wait()
    if arguments.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(
            f"{row['case']:>14}: {row['readings_per_cpu_s']:>9,} readings/CPU-s ({row['us_per_request']} us/request)"
            f"  bare pymodbus {row['pymodbus_readings_per_cpu_s']:>9,} ({row['pymodbus_us_per_request']} us)"
            f"  ratio {row['ratio']}"
        )
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"  peak RSS of the client, with both: {peak_mb:.0f} MB")


if __name__ == "__main__":
    main()
