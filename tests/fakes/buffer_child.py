"""A process that keeps readings and tells how far it got, to be killed by a test. `python -m tests.fakes.buffer_child
FOLDER FIRST`: prints the highest number that is kept, after every commit."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from agent.buffer import Buffer
from agent.clock import SystemClock
from config.agent import Buffer as BufferSettings
from tests.fakes.buffer import GATEWAY, PACKING, READINGS, scan


async def main(folder: Path, first: int) -> None:
    settings = BufferSettings(commit_interval_s=0.01, max_mb=64, free_disk_mb=0)
    buffer = await Buffer.open(folder / "buffer.db", GATEWAY, settings, SystemClock())
    buffer.register(PACKING.layout)
    number = first
    while True:
        for _ in range(25):
            if not buffer.append(scan(number, boot=buffer.boot), READINGS):
                raise RuntimeError("refused")
            number += 1
        if await buffer.commit():
            print(number - 1, flush=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
