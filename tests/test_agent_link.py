"""The link that costs, breaks, dies silently or flaps: the real forwarder on it, and what is said about it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from agent import forwarder as forwarder_module
from agent import status as status_file
from agent.backoff import Backoff
from agent.buffer import Buffer
from agent.forwarder import Forwarder
from agent.metered import Meter
from agent.status import AgentStatus, Code, LinkHealth, LinkState, RunState
from config.agent import Buffer as BufferSettings
from config.agent import Metered
from config.agent import Uplink as UplinkSettings
from drivers.contract import Priority, Scan
from sync.https import HttpsUplink
from sync.mqtt import MqttUplink
from sync.uplink import Uplink
from sync.wire import encode_scan, open_body
from tests.fakes.buffer import (
    GATEWAY,
    PACKING,
    POINTS,
    READINGS,
    START_NS,
    ModelCloud,
    StillClock,
    scan,
)
from tests.fakes.cloud_door import FarSide, HttpServer, mqtt_door, until
from tests.fakes.fault_proxy import FaultProxy, fault_proxy
from tests.fakes.uplink import MemoryUplink
from tests.servers import run
from tests.test_sync_uplinks import ACL, USERS
from tests.uplink_conformance import TOKEN

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


# --- a link that dies silently, and one that flaps: real uplinks, real doors, the line in between ---


class Counted:
    """An uplink whose opens are counted."""

    def __init__(self, uplink: Uplink) -> None:
        self._uplink = uplink
        self.opens = 0
        self.name, self.send, self.report, self.close = uplink.name, uplink.send, uplink.report, uplink.close

    async def open(self) -> None:
        self.opens += 1
        await self._uplink.open()


class Line:
    """A gateway's way over a line that can be misused."""

    def __init__(
        self, line: FaultProxy, buffer: Buffer, forwarder: Forwarder, uplink: Counted, far: FarSide
    ) -> None:
        self.line, self.buffer, self.forwarder, self.uplink, self.far = line, buffer, forwarder, uplink, far
        self.number = 0

    def keep(self) -> None:
        assert self.buffer.append(scan(self.number, boot=self.buffer.boot), READINGS)
        self.number += 1


@asynccontextmanager
async def over_a_line(folder: Path, kind: str, port: int, settings: UplinkSettings) -> AsyncIterator[Line]:
    """Real broker or HTTP door, behind a line; a heartbeat goes as the daemon sends it."""
    async with AsyncExitStack() as stack:
        far, cloud, health = FarSide(), ModelCloud(), LinkHealth()
        far.answer = lambda head: cloud.take(next(p for _, p in reversed(far.received) if _is(p, head)))
        if kind == "mqtt":
            broker = stack.enter_context(run.mosquitto(users=USERS, acl=ACL))
            await stack.enter_async_context(mqtt_door(far, broker.host, broker.port))
            port = broker.port
        else:
            server = HttpServer(far, GATEWAY, TOKEN, port)
            await server.start()
            stack.push_async_callback(server.stop)
        line = await stack.enter_async_context(fault_proxy(port))
        told = UplinkSettings(
            host="127.0.0.1", port=line.port, tls=False, keepalive_s=settings.keepalive_s,
            ack_timeout_s=settings.ack_timeout_s, connect_timeout_s=settings.connect_timeout_s,
            backoff_min_s=settings.backoff_min_s, backoff_max_s=settings.backoff_max_s,
        )  # fmt: skip
        uplink = Counted((MqttUplink if kind == "mqtt" else HttpsUplink)(GATEWAY, told, TOKEN))
        buffer = await Buffer.open(
            folder / "buffer.db", GATEWAY, BufferSettings(commit_interval_s=0.05), StillClock()
        )
        buffer.register(PACKING.layout)
        forwarder = Forwarder(buffer, uplink, told, health, random.Random(1))

        async def beat() -> None:
            while True:
                await forwarder.report(b"{}")
                await asyncio.sleep(settings.heartbeat_s)

        tasks = [asyncio.create_task(work) for work in (buffer.run(), forwarder.run(), beat())]
        try:
            yield Line(line, buffer, forwarder, uplink, far)
        finally:
            far.over.set()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await buffer.close()


@pytest.mark.parametrize("kind", ["mqtt", "https"])
@pytest.mark.parametrize("sending", [True, False])
async def test_a_half_open_link_is_found_also_when_there_is_nothing_to_send(
    tmp_path: Path, kind: str, sending: bool, free_port: Callable[[], int]
) -> None:
    """All waits a tenth of the defaults, so 45 s are 4.5 s (and what a busy machine takes)."""
    settings = UplinkSettings(
        keepalive_s=2.0, ack_timeout_s=1.0, connect_timeout_s=1.0, heartbeat_s=3.0, backoff_min_s=0.05,
        backoff_max_s=6.0,
    )  # fmt: skip
    async with over_a_line(tmp_path, kind, free_port(), settings) as way:
        way.keep()
        await until(lambda: way.far.received and way.forwarder.health.state is LinkState.UP)
        way.line.faults.blackhole = True
        began_s = time.monotonic()
        while way.forwarder.health.state is not LinkState.DOWN:
            if sending:
                way.keep()
            await asyncio.sleep(0.05)
            assert time.monotonic() - began_s < 30
        assert time.monotonic() - began_s < 4.5 + 3.0
        way.line.reset()
        way.line.heal()
        way.keep()
        await until(lambda: way.buffer.state.buffered_frames == 0 and way.buffer.state.pending_frames == 0)


@pytest.mark.parametrize("kind", ["mqtt", "https"])
async def test_a_flapping_link_makes_progress_and_one_connect_for_each_backoff(
    tmp_path: Path, kind: str, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 s on, 1 s off, four times; the waits a tenth of the defaults."""
    waits = itertools.count()
    real = Backoff.next_s

    def counted(backoff: Backoff, spread_s: float = 0.0) -> float:
        next(waits)
        return real(backoff, spread_s)

    monkeypatch.setattr(Backoff, "next_s", counted)
    settings = UplinkSettings(
        keepalive_s=2.0, ack_timeout_s=1.0, connect_timeout_s=1.0, heartbeat_s=3.0, backoff_min_s=0.05,
        backoff_max_s=6.0,
    )  # fmt: skip
    async with over_a_line(tmp_path, kind, free_port(), settings) as way:
        for _ in range(4):
            settled = way.buffer.state.settled_frames
            way.line.heal()
            for _ in range(20):
                way.keep()
                await asyncio.sleep(0.05)
            await until(lambda settled=settled: way.buffer.state.settled_frames > settled)  # type: ignore[misc]
            way.line.faults.refuse = True
            way.line.reset()
            for _ in range(20):
                way.keep()
                await asyncio.sleep(0.05)
        way.line.heal()
        await until(lambda: way.buffer.state.buffered_frames == 0 and way.buffer.state.pending_frames == 0)
        backoffs = next(waits)
        assert way.uplink.opens <= 1 + backoffs
        if kind == "mqtt":
            assert way.line.seen.connects <= way.uplink.opens
        else:  # a pool: as many connections as batches are under way
            assert way.line.seen.connects <= way.uplink.opens + len(way.far.received) + len(way.far.states)
        assert way.uplink.opens <= 40  # 4 s of outage, each with waits of 0.05, 0.1, 0.2, 0.4, ... at most


async def test_an_hour_of_flapping_costs_less_than_two_hundred_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 s on, 10 s off: 180 losses."""
    clock = time.monotonic()

    class Hour:
        def __getattr__(self, name: str) -> object:
            return (lambda: clock) if name == "monotonic" else getattr(time, name)

    monkeypatch.setattr(forwarder_module, "time", Hour())
    caplog.set_level(logging.INFO)
    buffer = await Buffer.open(tmp_path / "buffer.db", GATEWAY, BufferSettings(), StillClock())
    health = LinkHealth()
    forwarder = Forwarder(buffer, MemoryUplink(GATEWAY, FarSide()), FAST, health, random.Random(1))
    forwarder._link_is_up()
    caplog.clear()
    for _ in range(180):
        clock += 10.0
        forwarder._link_is_down("connect: refused", "refused")
        assert (health.state, health.cause) == (LinkState.DOWN, "refused")  # the status always says it
        clock += 10.0
        forwarder._link_is_up()
    assert 100 <= len(caplog.records) <= 200
    assert "times more since it was last told" in caplog.text
    await buffer.close()


# --- too large for the way: never a loop ---


@pytest.mark.parametrize("way", ["nats, max_payload", "mosquitto, max_packet_size", "https, 413"])
async def test_frames_larger_than_the_way_takes_are_parked_the_rest_arrives_and_the_link_is_left_alone(
    tmp_path: Path, way: str, free_port: Callable[[], int]
) -> None:
    """The limit is 2 KB, one frame in ten has more: batches are halved, single frames too large for it are parked."""
    limit = 2000
    async with AsyncExitStack() as stack:
        far, cloud, health = FarSide(), ModelCloud(), LinkHealth()
        far.answer = lambda head: cloud.take(next(p for _, p in reversed(far.received) if _is(p, head)))
        if way.startswith("nats"):
            nats = stack.enter_context(run.nats(users=USERS, extra=[f"max_payload: {limit}"]))
            host, port, kind = nats.host, nats.mqtt_port, "mqtt"
            await stack.enter_async_context(mqtt_door(far, host, port))
        elif way.startswith("mosquitto"):
            extra = [f"max_packet_size {limit}"]
            broker = stack.enter_context(run.mosquitto(users=USERS, acl=ACL, extra=extra))
            host, port, kind = broker.host, broker.port, "mqtt"
            await stack.enter_async_context(mqtt_door(far, host, port))
        else:
            host, port, kind = "127.0.0.1", free_port(), "https"
            server = HttpServer(far, GATEWAY, TOKEN, port)
            server.most_bytes = limit
            await server.start()
            stack.push_async_callback(server.stop)
        line = await stack.enter_async_context(fault_proxy(port, to_host=host))
        settings = UplinkSettings(
            host="127.0.0.1", port=line.port, tls=False, ack_timeout_s=3.0, backoff_min_s=0.02, backoff_max_s=0.2
        )  # fmt: skip
        uplink = Counted((MqttUplink if kind == "mqtt" else HttpsUplink)(GATEWAY, settings, TOKEN))
        buffer = await Buffer.open(
            tmp_path / "buffer.db", GATEWAY, BufferSettings(commit_interval_s=0.02), StillClock()
        )
        buffer.register(PACKING.layout)
        rng = random.Random(3)
        large = {7, 18, 29}
        for n in range(40):
            text = f"{rng.getrandbits(24_000 if n in large else 400):x}"
            frame = encode_scan(PACKING, Scan(START_NS + n * 10**6, POINTS, [n, text]), buffer.boot)
            assert buffer.append(frame, READINGS)
        await buffer.commit()
        tasks = [
            asyncio.create_task(buffer.run()),
            asyncio.create_task(Forwarder(buffer, uplink, settings, health, random.Random(1)).run()),
        ]
        try:
            count = 40
            async with asyncio.timeout(90):
                while buffer.state.parked_frames < len(large):  # devices go on meanwhile
                    assert buffer.append(scan(count, boot=buffer.boot), READINGS)
                    count += 1
                    await asyncio.sleep(0.2)
            await until(
                lambda: buffer.state.buffered_frames == 0 and buffer.state.pending_frames == 0, timeout_s=30
            )
            assert sorted(cloud.numbers()) == sorted(set(range(count)) - large)
            settled_opens = uplink.opens
            await asyncio.sleep(1.0)
            assert uplink.opens == settled_opens  # no loop
            if not way.startswith("nats"):
                assert uplink.opens == 1  # told beforehand, or by a status: the way never broke
            assert health.state is LinkState.UP
        finally:
            far.over.set()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await buffer.close()
