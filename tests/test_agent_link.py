"""The link that costs, breaks, dies silently or flaps: the real forwarder on it, and what is said about it."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime
from pathlib import Path

from agent import status as status_file
from agent.buffer import Buffer
from agent.forwarder import Forwarder
from agent.metered import Meter
from agent.status import AgentStatus, Code, LinkHealth, RunState
from config.agent import Buffer as BufferSettings
from config.agent import Metered
from config.agent import Uplink as UplinkSettings
from drivers.contract import Priority
from sync.wire import open_body
from tests.fakes.buffer import GATEWAY, PACKING, READINGS, ModelCloud, StillClock, scan
from tests.fakes.cloud_door import FarSide, until
from tests.fakes.uplink import MemoryUplink

FAST = UplinkSettings(backoff_min_s=0.01, backoff_max_s=0.1, ack_timeout_s=0.5, window=8)


def _codes(health: LinkHealth) -> set[str]:
    status = AgentStatus(state=RunState.RUNNING, link=health)
    return {p.code for p in status_file.problems(status, running=True, now_ns=status.written_ns)}


async def test_a_metered_link_holds_back_what_is_not_urgent_and_says_so_and_lets_it_go_in_time(
    tmp_path: Path,
) -> None:
    wall = datetime(2026, 3, 1, 10, 0, tzinfo=UTC)
    buffer = await Buffer.open(
        tmp_path / "buffer.db", GATEWAY, BufferSettings(commit_interval_s=0.02), StillClock()
    )
    buffer.register(PACKING.layout)
    far, cloud, health = FarSide(), ModelCloud(), LinkHealth()
    far.answer = lambda head: cloud.take(next(p for _, p in reversed(far.received) if _is(p, head)))
    meter = Meter(Metered(hours=("22:00-06:00",)), tmp_path, keepalive_s=20.0, now=lambda: wall)
    meter.load()
    uplink = MemoryUplink(GATEWAY, far)
    forwarder = Forwarder(buffer, uplink, FAST, health, random.Random(1), meter)
    for n in range(50):
        buffer.append(scan(n, boot=buffer.boot), READINGS)
    await buffer.commit()
    tasks = [asyncio.create_task(buffer.run()), asyncio.create_task(forwarder.run())]
    try:
        await until(lambda: health.held)
        assert "until 22:00 UTC" in health.held
        assert Code.LINK_METERED in _codes(health)
        for n in range(50, 60):
            buffer.append(scan(n, boot=buffer.boot), READINGS)
        for n in range(60, 63):
            buffer.append(scan(n, boot=buffer.boot), READINGS, Priority.ALARM)
        await until(lambda: len(cloud.numbers()) >= 3)
        uplink.cut()
        forwarder._lose("the line was cut", "down")  # what a dead socket would say
        buffer.append(scan(63, boot=buffer.boot), READINGS, Priority.ALARM)
        await until(lambda: len(cloud.numbers()) >= 4)
        await asyncio.sleep(0.3)
        assert sorted(cloud.numbers()) == [60, 61, 62, 63]
        used = meter.used
        assert used > sum(len(payload) for _, payload in far.received)
        assert await forwarder.report(b"{}")  # one an hour
        assert not await forwarder.report(b"{}")
        wall = wall.replace(hour=22)
        forwarder._wake.set()  # the clock is looked at every half a minute
        await until(lambda: len(cloud.numbers()) == 64)
        assert health.held == ""
        assert Code.LINK_METERED not in _codes(health)
        assert meter.used > used
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await buffer.close()
    again = Meter(Metered(hours=("22:00-06:00",)), tmp_path, keepalive_s=20.0, now=lambda: wall)
    again.load()
    assert again.used == meter.used


def _is(payload: bytes, head: object) -> bool:
    return open_body(payload)[0] == head
