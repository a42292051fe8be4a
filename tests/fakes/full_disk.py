"""A buffer on a disk of 12 MB that really fills up. Run in a mount namespace of its own by tests/test_agent_buffer.py;
prints `ok` at the end, or fails.

A foreign file fills the disk to the last byte; acks must still be applied, readings must be kept again once there is
room, and what could not be kept must be counted.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

from agent.buffer import Buffer, Condition
from agent.clock import SystemClock
from config.agent import Buffer as BufferSettings
from sync.wire import Ack
from tests.fakes.buffer import GATEWAY, PACKING, READINGS, ModelCloud, scan


async def main(disk: Path) -> None:
    settings = BufferSettings(max_mb=64, free_disk_mb=0, ballast_kb=1024, commit_interval_s=0.01)
    buffer = await Buffer.open(disk / "buffer.db", GATEWAY, settings, SystemClock())
    buffer.register(PACKING.layout)
    cloud = ModelCloud()
    number = refused = 0
    for _ in range(8):
        for _ in range(500):
            assert buffer.append(scan(number, boot=buffer.boot, size=1000), READINGS)
            number += 1
        assert await buffer.commit()
    with (disk / "foreign").open("wb", buffering=0) as foreign:
        try:
            while True:
                foreign.write(bytes(4096))
        except OSError:
            print("the disk is full to the last byte")
    # New readings are held or refused, never lost in silence, and the agent lives.
    for _ in range(40):
        for _ in range(250):
            if buffer.append(scan(number, boot=buffer.boot, size=1000), READINGS):
                number += 1
            else:
                refused += 1
        await buffer.commit()
    state = buffer.state
    print("full:", state)
    assert state.condition is not Condition.OK or state.gapped_frames
    assert state.overrun_scans == refused
    # Acks still make room, although nothing else on the disk does.
    for _ in range(200):
        batches = await buffer.claim(4)
        if not batches:
            for record in buffer.recorded():
                batches += await buffer.rebuild(record)
        if not batches and not buffer.state.pending_frames:
            break
        for batch in batches:
            buffer.settle(Ack(batch.sealed.epoch, cloud.take(batch.sealed.payload).ranges))
        await buffer.commit()
    (disk / "foreign").unlink()
    for _ in range(20):
        if buffer.append(scan(number, boot=buffer.boot), READINGS):
            number += 1
    assert await buffer.commit()
    for _ in range(200):
        for batch in await buffer.claim(4):
            buffer.settle(cloud.take(batch.sealed.payload))
        await buffer.commit()
    state = buffer.state
    print("drained:", state)
    assert state.condition is not Condition.HOLDING, state
    assert state.buffered_frames == 0
    evicted = sum(gap.readings for gap in cloud.gaps() if gap.reason == "evicted")
    overrun = sum(gap.readings for gap in cloud.gaps() if gap.reason == "overrun")
    assert overrun == refused * READINGS == state.overrun_readings
    assert evicted == state.gapped_readings
    assert len(cloud.numbers()) * READINGS + evicted == number * READINGS
    await buffer.close()
    print("ok")


if __name__ == "__main__":
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", sys.argv[1]], check=True)
    asyncio.run(main(Path(sys.argv[1])))
