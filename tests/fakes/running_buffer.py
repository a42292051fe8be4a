"""A buffer of the agent with its task, as the daemon has it; closed at the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from agent.buffer import Buffer
from config.agent import Buffer as BufferSettings
from tests.fakes.buffer import GATEWAY, PACKING, StillClock

QUICK = BufferSettings(commit_interval_s=0.02)


@asynccontextmanager
async def running(
    folder: Path, settings: BufferSettings = QUICK, clock: StillClock | None = None
) -> AsyncIterator[Buffer]:
    buffer = await Buffer.open(folder / "buffer.db", GATEWAY, settings, clock or StillClock())
    buffer.register(PACKING.layout)
    task = asyncio.create_task(buffer.run())
    try:
        yield buffer
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await buffer.close()
