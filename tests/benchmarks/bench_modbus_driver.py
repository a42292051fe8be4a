"""The Modbus driver against bare pymodbus in the same run: request rate, and readings per CPU-second of the client's
process; and against a bare client that asks for one register at a time.

    python -m tests.benchmarks.bench_modbus_driver [--seconds 2] [--json]

The peer is in a process of its own, on another core where there is one, and is faster than either client. A reading is
one value with its quality in a `Scan`; the bare client's is one register in its reply's list.
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

_ROOT = Path(__file__).parent.parent.parent
CASES = (("u16", 125), ("u16", 10), ("u16", 1), ("f32", 62), ("i32 CDAB", 62))
ROUNDS = 5


async def _cost_s(once: Callable[[], Awaitable[object]], seconds: float) -> tuple[float, float]:
    """CPU seconds and seconds by the clock of one request."""
    for _ in range(50):
        await once()
    until = time.monotonic() + seconds
    begun_s, begun, requests = time.monotonic(), time.process_time(), 0
    while time.monotonic() < until:
        for _ in range(20):
            await once()
        requests += 20
    return (time.process_time() - begun) / requests, (time.monotonic() - begun_s) / requests


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
        ours_s = bare_s = ours_wall_s = bare_wall_s = float("inf")
        try:
            # In turns, and the best of each: what else runs on the machine costs both alike.
            for _ in range(ROUNDS):
                cpu_s, wall_s = await _cost_s(lambda d=driver: d.read(d.points), seconds / ROUNDS)  # type: ignore[misc]
                ours_s, ours_wall_s = min(ours_s, cpu_s), min(ours_wall_s, wall_s)
                cpu_s, wall_s = await _cost_s(
                    lambda c=client, n=count: c.read_holding_registers(0, count=n, device_id=1),  # type: ignore[misc]
                    seconds / ROUNDS,
                )
                bare_s, bare_wall_s = min(bare_s, cpu_s), min(bare_wall_s, wall_s)
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
                "requests_per_s": round(1 / ours_wall_s),
                "request_rate_ratio": round(bare_wall_s / ours_wall_s, 2),
                "readings_per_s": round(values / ours_wall_s),
                "pymodbus_readings_per_s": round(values / bare_wall_s),
            }
        )
    singly = next(row for row in rows if row["case"] == "1 x u16")["pymodbus_readings_per_s"]
    for row in rows:
        row["ratio_to_one_register_a_request"] = round(float(row["readings_per_s"]) / float(singly), 1)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    peer = subprocess.Popen(
        [sys.executable, "-m", "tests.fakes.fast_modbus"], stdout=subprocess.PIPE, text=True, cwd=_ROOT
    )
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
            f"  ratio {row['ratio']};  {row['requests_per_s']:,} requests/s, {row['request_rate_ratio']} of pymodbus';"
            f"  {row['ratio_to_one_register_a_request']} x the readings/s of one register a request"
        )
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"  peak RSS of the client, with both: {peak_mb:.0f} MB")


if __name__ == "__main__":
    main()
