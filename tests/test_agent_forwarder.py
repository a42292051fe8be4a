"""The forwarder: whatever the way and the cloud do, each reading arrives once, and what cannot is told."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from agent.buffer import Buffer
from agent.forwarder import Forwarder, uplink_of
from agent.status import LinkHealth, LinkState
from config.agent import Buffer as BufferSettings
from config.agent import Uplink as UplinkSettings
from sync.identity import IdentityError
from sync.uplink import Uplink
from sync.wire import Head, Nack, Reply, open_body, open_head
from tests.fakes.buffer import GATEWAY, PACKING, READINGS, ModelCloud, StillClock, number_of, scan
from tests.fakes.cloud_door import CLOUD_PASSWORD, CLOUD_USER, SILENCE, FarSide, HttpServer, mqtt_door, until
from tests.fakes.uplink import MemoryUplink
from tests.servers import run
from tests.test_sync_uplinks import ACL, USERS
from tests.uplink_conformance import TOKEN

FAST = UplinkSettings(backoff_min_s=0.01, backoff_max_s=0.1, ack_timeout_s=0.2, window=8)


class Scene:
    """A buffer, a forwarder and a cloud that can be told how to behave."""

    def __init__(self, buffer: Buffer, far: FarSide) -> None:
        self.buffer = buffer
        self.far = far
        self.cloud = ModelCloud()
        self.judge: Callable[[Head, list[int | None]], Reply | str | None] = lambda head, numbers: "take"
        self.health = LinkHealth()
        self.number = 0
        self.sent: Counter[tuple[int, int]] = Counter()
        self.order: list[list[int | None]] = []
        far.answer = self._answer

    def _answer(self, head: Head) -> Reply | None:
        payload = next(p for _, p in reversed(self.far.received) if open_head(p)[0] == head)
        numbers = [number_of(frame) for frame in open_body(payload)[1].frames]
        self.sent[head.first, head.last] += 1
        self.order.append(numbers)
        match self.judge(head, numbers):
            case "take":
                return self.cloud.take(payload)
            case "take, and lose the ack":
                self.cloud.take(payload)
                return SILENCE
            case str() as unknown:
                raise AssertionError(unknown)
            case reply:
                return reply

    def keep(self, count: int, *, size: int = 10) -> None:
        for _ in range(count):
            assert self.buffer.append(scan(self.number, boot=self.buffer.boot, size=size), READINGS)
            self.number += 1

    async def keep_now(self, count: int, *, size: int = 10) -> None:
        self.keep(count, size=size)
        assert await self.buffer.commit()

    async def all_settled(self, timeout_s: float = 30.0) -> None:
        def empty() -> bool:
            state = self.buffer.state
            return state.buffered_frames == 0 and state.pending_frames == 0

        await until(empty, timeout_s=timeout_s)

    def once_each(self, *, but: set[int] = frozenset()) -> None:  # type: ignore[assignment]  # an empty set
        assert sorted(self.cloud.numbers()) == [n for n in range(self.number) if n not in but]


@asynccontextmanager
async def scene(
    folder: Path,
    uplink: Callable[[FarSide], Uplink],
    *,
    settings: UplinkSettings = FAST,
    before: int = 0,
    commit_s: float = 0.01,
    max_mb: int = 64,
    size: int = 10,
    seed: int = 1,
) -> AsyncIterator[Scene]:
    """`before` readings are kept before the forwarder starts, one group each of 10."""
    buffer = await Buffer.open(
        folder / "buffer.db", GATEWAY, BufferSettings(commit_interval_s=commit_s, max_mb=max_mb), StillClock()
    )
    buffer.register(PACKING.layout)
    far = FarSide()
    made = Scene(buffer, far)
    for _ in range(0, before, 10):
        await made.keep_now(10, size=size)
    forwarder = Forwarder(buffer, uplink(far), settings, made.health, random.Random(seed))
    tasks = [asyncio.create_task(buffer.run()), asyncio.create_task(forwarder.run())]
    try:
        yield made
        for task in tasks:
            assert not task.done(), task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await buffer.close()


def memory(far: FarSide) -> MemoryUplink:
    return MemoryUplink(GATEWAY, far, ack_timeout_s=FAST.ack_timeout_s / 2)


async def test_backlog_and_live_readings_arrive_once_and_leave_the_buffer(tmp_path: Path) -> None:
    async with scene(tmp_path, memory, before=500) as s:
        for _ in range(20):
            s.keep(10)
            await asyncio.sleep(0.005)
        await s.all_settled()
        s.once_each()
        assert s.health.state is LinkState.UP
        assert s.health.in_flight == 0
        assert s.health.acked_batches == len(s.sent)
        assert s.buffer.state.settled_readings == s.buffer.state.kept_readings == 700 * READINGS


async def test_live_goes_ahead_of_a_backlog_that_keeps_to_its_share(tmp_path: Path) -> None:
    made: list[MemoryUplink] = []

    def uplink(far: FarSide) -> Uplink:
        made.append(memory(far))
        made[-1].round_trip_s = 0.02
        return made[-1]

    async with scene(tmp_path, uplink, before=4000, size=5000) as s:
        await until(lambda: s.health.acked_batches >= 2)
        assert made[0].most_at_once == FAST.window * FAST.backlog_share
        first_live = s.number
        for _ in range(5):
            await s.keep_now(5)
        await s.all_settled()
        place = next(i for i, numbers in enumerate(s.order) if first_live in numbers)
        assert place < len(s.order) / 2  # of the backlog, most came later
        assert made[0].most_at_once <= FAST.window
        s.once_each()


async def test_live_readings_do_not_wait_however_fast_a_long_backlog_goes(tmp_path: Path) -> None:
    async with scene(tmp_path, memory, before=10_000, size=2000) as s:
        await until(lambda: s.health.acked_batches >= 2)
        waited_behind = []
        for _ in range(30):  # many more than the window holds
            number, already = s.number, len(s.order)
            await s.keep_now(1)
            await until(lambda: any(number in numbers for numbers in s.order[already:]))  # noqa: B023
            place = next(i for i, numbers in enumerate(s.order) if number in numbers)
            waited_behind.append(place - already)
        assert s.buffer.has_backlog  # or the test has shown nothing
        assert max(waited_behind) <= 2 * FAST.window
        await s.all_settled(60)
        s.once_each()


async def test_a_link_that_goes_and_comes_back_is_told_once_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[MemoryUplink] = []

    def uplink(far: FarSide) -> Uplink:
        made.append(memory(far))
        return made[-1]

    caplog.set_level(logging.DEBUG, logger="agent.forwarder")
    async with scene(tmp_path, uplink) as s:
        await s.keep_now(10)
        await s.all_settled()
        made[0].up = False
        s.judge = lambda head, numbers: SILENCE
        await s.keep_now(10)
        await until(lambda: len(s.far.received) == 2)
        made[0].cut()
        tried = made[0].opened
        await until(lambda: made[0].opened > tried + 5)
        assert (s.health.state.value, s.health.why) == ("down", "memory: connect: refused")
        s.judge = lambda head, numbers: "take"
        made[0].up = True
        await s.all_settled()
        assert s.health.state is LinkState.UP
        s.once_each()
    said = [(r.levelname, r.getMessage()) for r in caplog.records if r.levelno > logging.DEBUG]
    assert [level for level, _ in said] == ["INFO", "WARNING", "INFO"]
    assert "link up" in said[0][1]
    assert "link down" in said[1][1]
    assert f"{10 * READINGS} readings buffered" in said[2][1]


async def test_lost_acks_and_lost_batches_double_nothing(tmp_path: Path) -> None:
    rng = random.Random(4)
    async with scene(tmp_path, memory, before=300) as s:
        s.judge = lambda head, numbers: rng.choice(["take", "take, and lose the ack", SILENCE])
        for _ in range(20):
            await s.keep_now(10)
        await s.all_settled()
        s.once_each()
        assert s.health.resent_batches > 0


async def test_a_silent_cloud_is_asked_by_one_batch_at_a_time(tmp_path: Path) -> None:
    slow = UplinkSettings(backoff_min_s=0.2, backoff_max_s=0.4, window=8)
    async with scene(tmp_path, memory, settings=slow, before=300) as s:
        s.judge = lambda head, numbers: SILENCE
        for _ in range(30):
            await s.keep_now(10)
        await until(lambda: s.health.state is LinkState.DOWN)
        assert "does not answer" in s.health.why
        before = len(s.far.received)
        started_s = time.monotonic()
        await asyncio.sleep(1.5)
        asked = len(s.far.received) - before
        assert asked <= 2 + (time.monotonic() - started_s) / 0.1  # not eight at once each time
        s.judge = lambda head, numbers: "take"
        await s.all_settled()
        s.once_each()
        assert s.health.state is LinkState.UP


async def test_the_cloud_that_asks_to_wait_is_left_alone_for_as_long(tmp_path: Path) -> None:
    async with scene(tmp_path, memory) as s:
        s.judge = lambda head, numbers: Nack(head.epoch, head.first, head.last, "full", "full", 0.5)
        await s.keep_now(10)
        await until(lambda: len(s.far.received) == 1)
        asked_s = time.monotonic()
        s.judge = lambda head, numbers: "take"
        for _ in range(10):
            await s.keep_now(10)
        await s.all_settled()
        assert time.monotonic() - asked_s >= 0.5
        s.once_each()


async def test_a_poison_frame_is_found_by_halving_and_the_rest_goes_on(tmp_path: Path) -> None:
    poison = 777
    async with scene(tmp_path, memory, commit_s=0.02) as s:
        s.judge = lambda head, numbers: (
            Nack(head.epoch, head.first, head.last, "body", "it will not do") if poison in numbers else "take"
        )
        await until(lambda: s.health.state is LinkState.UP)
        await s.keep_now(1024)
        await s.all_settled()
        s.once_each(but={poison})
        refused = sum(count for (first, last), count in s.sent.items() if first <= poison + 1 <= last)
        assert refused <= 10 + 1  # log2(1024), and the first
        [gap] = s.cloud.gaps()
        assert (gap.reason, gap.readings, gap.scans) == ("refused", READINGS, 1)
        [event] = s.cloud.events()
        assert "it will not do" in event.text
        assert s.buffer.state.parked_frames == 1
        assert s.health.state is LinkState.UP


@pytest.mark.parametrize("code", ["identity", "version"])
async def test_a_refusal_that_is_not_the_batchs_own_parks_nothing(tmp_path: Path, code: str) -> None:
    async with scene(tmp_path, memory, before=50) as s:
        s.judge = lambda head, numbers: Nack(head.epoch, head.first, head.last, code, "not you")
        await until(lambda: len(s.far.received) > 20)
        assert s.buffer.state.parked_frames == 0
        assert s.buffer.state.gapped_frames == 0
        assert s.health.state is LinkState.DOWN
        assert code in s.health.why
        s.judge = lambda head, numbers: "take"
        await s.all_settled()
        s.once_each()


async def test_a_cloud_that_refuses_everything_is_not_believed_for_long(tmp_path: Path) -> None:
    async with scene(tmp_path, memory, before=500) as s:
        s.judge = lambda head, numbers: Nack(head.epoch, head.first, head.last, "body", "no")
        await until(lambda: "in a row" in s.health.why)
        assert s.buffer.state.parked_frames <= 25
        s.judge = lambda head, numbers: "take"
        await s.all_settled()
        state = s.buffer.state
        assert 475 <= len(s.cloud.numbers()) < 500
        assert len(s.cloud.numbers()) * READINGS + state.gapped_readings == 500 * READINGS


async def test_a_batch_damaged_on_the_way_is_sent_again_as_it_is(tmp_path: Path) -> None:
    async with scene(tmp_path, memory) as s:
        tries = 0

        def judge(head: Head, numbers: list[int | None]) -> Reply | str:
            nonlocal tries
            tries += 1
            return Nack(head.epoch, head.first, head.last, "crc", "damaged") if tries < 4 else "take"

        s.judge = judge
        await s.keep_now(10)
        await s.all_settled()
        s.once_each()
        assert list(s.sent.values()) == [4]


async def test_a_batch_that_is_never_answered_is_halved_and_holds_up_no_backlog(tmp_path: Path) -> None:
    async with scene(tmp_path, memory, before=300, size=3000) as s:
        s.judge = lambda head, numbers: "take" if head.last - head.first < 40 else SILENCE
        ended = time.monotonic() + 30
        while s.buffer.state.buffered_frames > 5 and time.monotonic() < ended:
            s.keep(1)  # others are answered all the while
            await asyncio.sleep(0.05)
        await s.all_settled()  # and the cloud has never come to answer wide ones
        s.once_each()
        assert s.health.refused_batches == 0


async def test_a_batch_that_breaks_the_connection_is_halved_until_it_passes(tmp_path: Path) -> None:
    made: list[MemoryUplink] = []

    def uplink(far: FarSide) -> Uplink:
        made.append(memory(far))
        made[-1].largest = 4000
        return made[-1]

    rng = random.Random(2)
    async with scene(tmp_path, uplink, before=100) as s:
        for _ in range(60):  # text that does not compress
            assert s.buffer.append(
                scan_of(s.number, f"{rng.getrandbits(1600):x}", boot=s.buffer.boot), READINGS
            )
            s.number += 1
        await s.buffer.commit()
        await s.all_settled()
        s.once_each()
        assert made[0].broken > 0
        assert s.buffer.state.parked_frames == 0


async def test_a_frame_that_breaks_every_connection_is_parked_when_others_pass(tmp_path: Path) -> None:
    made: list[MemoryUplink] = []

    def uplink(far: FarSide) -> Uplink:
        made.append(memory(far))
        made[-1].largest = 4000
        return made[-1]

    rng = random.Random(2)
    async with scene(tmp_path, uplink, before=20) as s:
        giant = s.number
        assert s.buffer.append(scan_of(giant, f"{rng.getrandbits(40_000):x}", boot=s.buffer.boot), READINGS)
        s.number += 1
        await s.buffer.commit()

        async def live() -> None:
            while True:
                s.keep(1)
                await asyncio.sleep(0.02)

        living = asyncio.create_task(live())
        await until(lambda: s.buffer.state.parked_frames)
        living.cancel()
        await asyncio.gather(living, return_exceptions=True)
        await s.all_settled()
        s.once_each(but={giant})
        assert [(g.reason, g.readings) for g in s.cloud.gaps()] == [("refused", READINGS)]


def scan_of(number: int, text: str, *, boot: int) -> bytes:
    from drivers.contract import Scan
    from sync.wire import encode_scan
    from tests.fakes.buffer import POINTS

    return encode_scan(PACKING, Scan(1, POINTS, [number, text]), boot)


async def test_after_a_restart_what_was_on_its_way_is_sent_again_with_the_same_bytes(tmp_path: Path) -> None:
    async with scene(tmp_path, memory, before=50) as s:
        s.judge = lambda head, numbers: "take, and lose the ack"
        await s.keep_now(10)
        await until(lambda: len(s.cloud.numbers()) == 60)
        first = s.cloud
    async with scene(tmp_path, memory) as s:
        s.cloud = first  # the same cloud: it would notice other bytes for the same range
        s.number = 60
        await s.all_settled()
        s.once_each()


async def test_a_heartbeat_goes_only_where_the_way_is_up(tmp_path: Path) -> None:
    far = FarSide()
    buffer = await Buffer.open(tmp_path / "buffer.db", GATEWAY, BufferSettings(), StillClock())
    uplink = memory(far)
    uplink.up = False
    forwarder = Forwarder(buffer, uplink, FAST, LinkHealth(), random.Random(1))
    task = asyncio.create_task(forwarder.run())
    await until(lambda: uplink.opened > 2)
    assert not await forwarder.report(b"{}")
    uplink.up = True
    await until(lambda: forwarder.health.state is LinkState.UP)
    assert await forwarder.report(b"{}")
    assert far.states == [(str(GATEWAY), b"{}")]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await buffer.close()


@pytest.mark.parametrize("seed", range(6))
async def test_anything_at_any_time_ends_with_each_reading_once(tmp_path: Path, seed: int) -> None:
    """Cuts, lost acks, waits, damage, poison and a buffer at its cap, all by chance."""
    rng = random.Random(seed)
    made: list[MemoryUplink] = []
    poison = {rng.randrange(2000) for _ in range(4)}

    def uplink(far: FarSide) -> Uplink:
        made.append(memory(far))
        return made[-1]

    def judge(head: Head, numbers: list[int | None]) -> Reply | str | None:
        if poison & set(numbers):
            return Nack(head.epoch, head.first, head.last, "frame", "poison")
        match rng.randrange(12):
            case 0:
                return SILENCE
            case 1:
                return "take, and lose the ack"
            case 2:
                return Nack(head.epoch, head.first, head.last, "busy", "busy", 0.01)
            case 3:
                return Nack(head.epoch, head.first, head.last, "crc", "damaged")
            case 4:
                made[0].cut()
                return SILENCE
            case _:
                return "take"

    async with scene(tmp_path, uplink, max_mb=1 if seed % 2 else 64, seed=seed) as s:
        s.judge = judge
        for _ in range(100):
            for _ in range(rng.randrange(40)):
                if s.buffer.append(scan(s.number, boot=s.buffer.boot, size=rng.choice([10, 1500])), READINGS):
                    s.number += 1
            made[0].up = rng.random() < 0.8
            await asyncio.sleep(rng.random() / 100)
        made[0].up = True
        s.judge = lambda head, numbers: (
            Nack(head.epoch, head.first, head.last, "frame", "poison") if poison & set(numbers) else "take"
        )
        await s.all_settled(60)
        state = s.buffer.state
        stored = s.cloud.numbers()
        assert len(stored) == len(set(stored))
        assert len(stored) * READINGS + state.gapped_readings == state.kept_readings
        lost = sum(g.readings for g in s.cloud.gaps() if g.first)
        assert lost == state.gapped_readings
        assert not set(stored) & poison


async def test_a_broker_killed_under_load_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """SIGKILL of a Mosquitto that keeps nothing, eight times, with readings coming all the while."""
    from sync.mqtt import MqttUplink

    with run.mosquitto(users=USERS, acl=ACL) as broker:
        settings = UplinkSettings(
            host=broker.host,
            port=broker.port,
            tls=False,
            ack_timeout_s=1.0,
            backoff_min_s=0.02,
            backoff_max_s=0.2,
        )
        async with scene(
            tmp_path, lambda far: MqttUplink(GATEWAY, settings, TOKEN), settings=settings, before=1000
        ) as s, mqtt_door(s.far, broker.host, broker.port):  # fmt: skip
            for _ in range(8):
                for _ in range(20):
                    s.keep(25)
                    await asyncio.sleep(0.01)
                await asyncio.to_thread(broker.process.kill)
                s.keep(25)
                await asyncio.sleep(0.05)
                await asyncio.to_thread(broker.process.start)
            await s.all_settled(60)
            s.once_each()


@pytest.mark.parametrize("way", ["3.1.1", "5, nobody listens", "5, a bystander listens"])
async def test_what_a_broker_says_deletes_nothing(tmp_path: Path, way: str) -> None:
    """The broker takes every publish (a PUBACK says so where there is one: success, or "no matching subscribers"), and
    the cloud is off. Only its own ack empties the buffer."""
    from sync.mqtt import MqttUplink

    said = {
        "3.1.1": r"Received PUBLISH from \S+ \(d\d, q0",
        "5, nobody listens": r"Sending PUBACK to \S+ \(m\d+, rc16\)",
        "5, a bystander listens": r"Sending PUBACK to \S+ \(m\d+, rc0\)",
    }[way]
    with run.mosquitto(users=USERS, acl=ACL) as broker, ExitStack() as stack:
        if "bystander" in way:
            bystander = paho.Client(CallbackAPIVersion.VERSION2)
            bystander.username_pw_set(CLOUD_USER, CLOUD_PASSWORD.reveal())
            bystander.on_connect = lambda client, *_: client.subscribe("headgate/v1/+/+/up")
            bystander.connect(broker.host, broker.port)
            bystander.loop_start()
            stack.callback(bystander.loop_stop)
            await until(lambda: "Sending SUBACK" in broker.process.log_path.read_text())
        settings = UplinkSettings(
            host=broker.host, port=broker.port, tls=False, ack_timeout_s=0.4, backoff_min_s=0.02, backoff_max_s=0.2
        )  # fmt: skip

        def times() -> int:
            return len(re.findall(said, broker.process.log_path.read_text()))

        def uplink(_far: FarSide) -> Uplink:
            made = MqttUplink(GATEWAY, settings, TOKEN)
            made.protocol = MQTTProtocolVersion.MQTTv311 if way == "3.1.1" else MQTTProtocolVersion.MQTTv5
            return made

        async with scene(tmp_path, uplink, settings=settings, before=200) as s:
            s.keep(50)
            await until(lambda: times() >= 3)
            over_s = time.monotonic() + 4.0
            while time.monotonic() < over_s:
                await asyncio.sleep(0.05)
                state = s.buffer.state
                assert (state.settled_frames, state.gapped_frames, state.parked_frames) == (0, 0, 0)
            assert state.buffered_frames == state.kept_frames == 250
            assert times() >= 5
            async with mqtt_door(s.far, broker.host, broker.port):
                await s.all_settled(60)
            s.once_each()


async def test_an_http_door_cut_under_load_loses_and_doubles_nothing(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    from sync.https import HttpsUplink

    port = free_port()
    settings = UplinkSettings(
        kind="https", host="127.0.0.1", port=port, tls=False, ack_timeout_s=1.0, backoff_min_s=0.02, backoff_max_s=0.2
    )  # fmt: skip
    async with scene(
        tmp_path, lambda far: HttpsUplink(GATEWAY, settings, TOKEN), settings=settings, before=1000
    ) as s:
        door = HttpServer(s.far, GATEWAY, TOKEN, port)
        for _ in range(8):
            await door.start()
            for _ in range(20):
                s.keep(25)
                await asyncio.sleep(0.01)
            await door.stop()
            s.keep(25)
            await asyncio.sleep(0.05)
        await door.start()
        await s.all_settled(60)
        s.once_each()
        await door.stop()


async def test_a_broker_that_closes_on_large_messages_gets_smaller_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """NATS closes the connection of whoever publishes more than `max_payload`, and never says why."""
    from sync.mqtt import MqttUplink

    with run.nats(users=USERS, extra=["max_payload: 16KB"]) as broker:
        settings = UplinkSettings(
            host=broker.host, port=broker.mqtt_port, tls=False, ack_timeout_s=5.0, backoff_min_s=0.02,
            backoff_max_s=0.2,
        )  # fmt: skip
        rng = random.Random(2)
        async with scene(
            tmp_path, lambda far: MqttUplink(GATEWAY, settings, TOKEN), settings=settings, before=50
        ) as s, mqtt_door(s.far, broker.host, broker.mqtt_port):  # fmt: skip
            for _ in range(80):
                text = f"{rng.getrandbits(4000):x}"
                assert s.buffer.append(scan_of(s.number, text, boot=s.buffer.boot), READINGS)
                s.number += 1
            await s.buffer.commit()
            await s.all_settled(60)
            s.once_each()
            assert s.buffer.state.parked_frames == 0
            assert "halved" in caplog.text


def test_the_configured_uplink_is_made_and_only_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADGATE_TOKEN", TOKEN.reveal())
    assert uplink_of(UplinkSettings(kind="none"), GATEWAY) is None
    mqtt = uplink_of(UplinkSettings(kind="mqtt", token_env="HEADGATE_TOKEN", tls=False), GATEWAY)
    assert mqtt is not None
    assert mqtt.name == "mqtt localhost:1883"
    https = uplink_of(UplinkSettings(kind="https", host="cloud.example", token_env="HEADGATE_TOKEN"), GATEWAY)
    assert https is not None
    assert https.name == "https cloud.example:443"
    with pytest.raises(IdentityError, match="there is no default"):
        uplink_of(UplinkSettings(kind="mqtt"), GATEWAY)
    with pytest.raises(IdentityError, match="plaintext"):
        uplink_of(
            UplinkSettings(kind="https", host="cloud.example", tls=False, token_env="HEADGATE_TOKEN"), GATEWAY
        )
