"""A buffer on a file system that is mounted read-only. Run in a mount namespace of its own by
tests/test_agent_sick_disk.py; prints `ok` at the end, or fails.

    start      it is read-only when the agent starts, with a backlog in the file, and heals later
    first      the same before the first start ever: there is no file
    running    ext4 turns itself read-only under the running agent, as it does after an I/O error
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from agent.buffer import Buffer, Condition
from agent.clock import SystemClock
from config.agent import Buffer as BufferSettings
from tests.fakes.buffer import GATEWAY, PACKING, READINGS, ModelCloud, scan

SETTINGS = BufferSettings(max_mb=8, free_disk_mb=0, ballast_kb=0, commit_interval_s=0.05)
HELD = 3000


def sh(*words: str) -> None:
    subprocess.run(words, check=True)


def source_of(folder: Path) -> str:
    words = ["findmnt", "-n", "-o", "SOURCE", str(folder)]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


async def until(what: Callable[[], bool], within_s: float) -> None:
    deadline_s = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < deadline_s, what
        await asyncio.sleep(0.02)


async def opened(folder: Path) -> tuple[Buffer, asyncio.Task[None]]:
    buffer = await Buffer.open(folder / "buffer.db", GATEWAY, SETTINGS, SystemClock())
    buffer.register(PACKING.layout)
    return buffer, asyncio.create_task(buffer.run())


async def closed(buffer: Buffer, task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await buffer.close()


async def fill(buffer: Buffer, begin: int, count: int) -> int:
    """How many were refused."""
    refused = 0
    for number in range(begin, begin + count):
        refused += not buffer.append(scan(number, boot=buffer.boot, size=200), READINGS)
        if number % 100 == 0:
            await asyncio.sleep(0)
    return refused


async def drain(buffer: Buffer, cloud: ModelCloud) -> int:
    """All that it gives; how many batches that were."""
    sent = 0
    for one in buffer.recorded():
        for batch in await buffer.rebuild(one):
            buffer.settle(cloud.take(batch.sealed.payload))
            sent += 1
    while batches := await buffer.claim(4):
        for batch in batches:
            buffer.settle(cloud.take(batch.sealed.payload))
            sent += 1
    return sent


async def refusing(buffer: Buffer, cloud: ModelCloud, number: int) -> int:
    """What is true while the disk takes nothing: how many readings were refused."""
    await until(lambda: buffer.state.condition is Condition.HOLDING, 5.0)
    assert buffer.state.cause == "disk_readonly", buffer.state
    assert "read-only" in buffer.state.detail
    refused = await fill(buffer, number, 20_000)  # more than memory may hold
    assert 0 < refused < 20_000
    assert buffer.state.overrun_scans == refused
    return refused


async def healed(buffer: Buffer, cloud: ModelCloud, number: int, refused: int) -> None:
    await until(lambda: buffer.state.condition is not Condition.HOLDING, 10.0)
    deadline_s = time.monotonic() + 30
    while (
        buffer.state.buffered_frames
        or buffer.state.pending_frames
        or not any(gap.reason == "overrun" for gap in cloud.gaps())
    ):
        await drain(buffer, cloud)
        await buffer.commit()
        assert time.monotonic() < deadline_s, buffer.state
    overrun = sum(gap.scans for gap in cloud.gaps() if gap.reason == "overrun")
    evicted = sum(gap.readings for gap in cloud.gaps() if gap.reason == "evicted") // READINGS
    assert overrun == refused, (overrun, refused)
    numbers = cloud.numbers()
    assert len(numbers) == len(set(numbers))
    assert len(numbers) + overrun + evicted == number, (len(numbers), overrun, evicted, number)


async def start(folder: Path, *, first: bool) -> None:
    cloud = ModelCloud()
    cloud.needs_clocks = False  # the same seqs go again with another clock row
    number = 0
    if not first:
        buffer, task = await opened(folder)
        await fill(buffer, 0, HELD)
        number = HELD
        await closed(buffer, task)
    sh("mount", "-o", "remount,bind,ro", str(folder))
    buffer, task = await opened(folder)
    if not first:
        assert await drain(buffer, cloud) > 0
        assert sorted(cloud.numbers()) == [*range(HELD)]  # what the file holds goes out all the same
        again = [await drain(buffer, cloud) for _ in range(20)]
        assert sum(again) == 0, again  # and not again and again
    refused = await refusing(buffer, cloud, number)
    number += 20_000
    sh("mount", "-o", "remount,bind,rw", str(folder))
    await healed(buffer, cloud, number, refused)
    boots = {frame.boot for frame in cloud.frames()}
    assert len(boots) == 1, boots  # the same start of the machine, whatever was known of it
    await closed(buffer, task)


async def running(image: Path, folder: Path) -> None:
    sh("truncate", "-s", "64M", str(image))
    sh("mkfs.ext4", "-q", "-F", str(image))
    sh("mount", "-o", "loop,errors=remount-ro", str(image), str(folder))
    cloud = ModelCloud()
    cloud.needs_clocks = False
    buffer, task = await opened(folder)
    await fill(buffer, 0, HELD)
    assert await buffer.commit()
    source = source_of(folder)
    Path(f"/sys/fs/ext4/{Path(source).name}/trigger_fs_error").write_text("1\n")
    buffer.append(scan(HELD, boot=buffer.boot), READINGS)
    await until(lambda: buffer.state.condition is Condition.HOLDING, 5.0)
    assert await drain(buffer, cloud) > 0
    assert sorted(cloud.numbers()) == [*range(HELD)]
    assert sum([await drain(buffer, cloud) for _ in range(20)]) == 0
    assert not await buffer.commit()  # it still refuses, and nothing has ended
    await closed(buffer, task)


if __name__ == "__main__":
    what, place = sys.argv[1], Path(sys.argv[2])
    inner = place / "disk"
    inner.mkdir()
    if what == "running":
        asyncio.run(running(place / "image", inner))
    else:
        sh("mount", "--bind", str(inner), str(inner))
        asyncio.run(start(inner, first=what == "first"))
    print("ok")
