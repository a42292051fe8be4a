"""What `isolate = true` costs: a read through the stand-in against the same driver called directly, the memory of the
child, how long it takes to start; and what the watch of the event loop costs.

`bench_isolation [seconds]`
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Final

from agent.devices import build_device
from agent.isolation import IsolatedDriver
from agent.loop_watch import LoopWatch
from config.agent import Device
from drivers.contract import Driver

POINTS: Final = (10, 125, 1000)


def device(points: int, *, isolate: bool) -> Device:
    table = [{"name": f"p{n}", "type": "u16", "wave": "constant"} for n in range(points)]
    return Device(name="bench", driver="simulator", isolate=isolate, point=table)


async def read_s(driver: Driver, seconds: float) -> tuple[float, float]:  # type: ignore[type-arg]
    """Wall time of one read, and this process's processor time of it."""
    points = driver.points
    await driver.read(points)
    reads, began_s, cpu_s = 0, time.perf_counter(), time.process_time()
    while (now_s := time.perf_counter()) - began_s < seconds:
        await driver.read(points)
        reads += 1
    return (now_s - began_s) / reads, (time.process_time() - cpu_s) / reads


async def main(seconds: float) -> None:
    for points in POINTS:
        direct = build_device(device(points, isolate=False)).driver
        apart = build_device(device(points, isolate=True)).driver
        assert isinstance(direct, Driver)
        assert isinstance(apart, IsolatedDriver)
        await direct.connect()
        began_s = time.perf_counter()
        await apart.connect()
        start_s = time.perf_counter() - began_s
        base_s, _ = await read_s(direct, seconds)
        wall_s, cpu_s = await read_s(apart, seconds)
        assert apart._child is not None
        status = Path(f"/proc/{apart._child.process.pid}/status").read_text()
        rss_kb = int(status.split("VmRSS:")[1].split()[0])
        await apart.close()
        await direct.close()
        print(
            f"{points:5} points: {1e6 * base_s:7.0f} us a read in this process, "
            f"{1e6 * wall_s:7.0f} us in one of its own (+{1e6 * (wall_s - base_s):.0f} us; {1e6 * cpu_s:.0f} us of the "
            f"agent's processor); child {rss_kb / 1024:.0f} MB, started in {start_s:.2f} s"
        )
    for watched in (False, True):
        watch = LoopWatch(lambda stall: print(f"  stood still: {stall}"))
        if watched:
            watch.start()
        cpu_s = time.process_time()
        await asyncio.sleep(5 * seconds)
        share = (time.process_time() - cpu_s) / (5 * seconds)
        watch.stop()
        print(f"an idle loop, {'watched' if watched else 'not watched'}: {100 * share:.3f} % of a core")


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1]) if len(sys.argv) > 1 else 2.0))
