"""The MQTT door: on a real Mosquitto (MQTT 5), a real NATS (3.1.1), and a scripted broker for what those never do."""

from __future__ import annotations

import asyncio
import logging
import random
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest
import trustme
import uvloop

import config.agent
from cloud import mqtt
from cloud.intake import Intake
from cloud.journal.contract import Appended
from cloud.journal.sqlite import SqliteJournal
from cloud.metrics import Metrics
from cloud.mqtt import MqttDoor
from config.cloud import MqttDoor as Settings
from sync.identity import GatewayName, Secret
from sync.mqtt import MqttUplink
from sync.uplink import BatchRefused, RetryLater
from sync.wire import Ack, Nack, Reply, Sealed, decode_reply
from tests.fakes.batches import EPOCH, GATEWAY, batch, largest_batch, spoilt
from tests.fakes.fault_proxy import fault_proxy
from tests.servers import run

WORD = "a-password-that-is-long-enough"
NAMES = [GatewayName("acme", f"plant-{n}") for n in range(1, 5)]
USERS = {"headgate-cloud": WORD, **{str(name): WORD for name in NAMES}}
ACL = """
user headgate-cloud
topic read headgate/v1/+/+/up
topic read headgate/v1/+/+/state
topic write headgate/v1/+/+/ack
pattern readwrite headgate/v1/%u/#
"""
SPOILT = spoilt()


async def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)


class Site:
    """A journal, an intake and a door to the broker on `port`."""

    def __init__(
        self, journal: SqliteJournal, settings: Settings, *, word: str = WORD, max_waiting: int = 4096
    ) -> None:
        self.journal = journal
        self.port = settings.port
        self.speaks_five = True
        self.metrics = Metrics()
        self.door = MqttDoor(
            settings, Secret(word), Intake(journal, journal, self.metrics), self.metrics,
            max_waiting=max_waiting, rng=random.Random(1),
        )  # fmt: skip

    async def stored(self) -> list[tuple[str, int, int]]:
        entries = await self.journal.read(0, max_entries=10_000, max_bytes=2**27)
        return [(e.gateway, e.first, e.last) for e in entries]


@asynccontextmanager
async def running(site: Site) -> AsyncIterator[Site]:
    await site.journal.open()
    task = asyncio.create_task(site.door.run())
    try:
        yield site
        await site.door.stop()
    finally:
        task.cancel()
        await asyncio.wait([task])
        await site.journal.close()
        if not task.cancelled():
            task.result()  # a fault must not pass unseen


def plain(port: int) -> Settings:
    return Settings(host="127.0.0.1", port=port, tls=False)


class Gateway:
    """An agent's uplink, with every reply that comes on its ack topic."""

    def __init__(self, name: GatewayName, port: int) -> None:
        settings = config.agent.Uplink(host="127.0.0.1", port=port, tls=False, ack_timeout_s=20.0)
        self.uplink = MqttUplink(name, settings, Secret(WORD))
        self.name = name
        self.replies: list[Reply] = []

    async def open(self) -> Gateway:
        await self.uplink.open()
        client = self.uplink._client
        assert client is not None
        before = client.on_message
        assert before is not None

        def heard(paho: object, data: object, message: object) -> None:
            self.replies.append(decode_reply(bytes(message.payload)))  # type: ignore[attr-defined]
            before(paho, data, message)  # type: ignore[arg-type]

        client.on_message = heard
        return self

    def publish(self, payload: bytes) -> None:
        """Any bytes, as they are."""
        assert self.uplink._client is not None
        self.uplink._client.publish(self.name.topic("up"), payload, 0)

    async def send(self, first: int, frames: int = 3) -> Ack:
        sealed = Sealed(EPOCH, first, first + frames - 1, batch(first, frames, gateway=str(self.name)))
        return await self.uplink.send(sealed)


@pytest.fixture(params=["mosquitto", "nats"])
async def site(request: pytest.FixtureRequest, start: run.Starter, tmp_path: Path) -> AsyncIterator[Site]:
    if request.param == "mosquitto":
        port = start(run.mosquitto(users=USERS, acl=ACL)).port
    else:
        port = start(run.nats(users=USERS, sync_always=False)).mqtt_port
    async with running(Site(SqliteJournal(tmp_path / "j.db"), plain(port))) as up:
        await until(lambda: up.door.connected)
        up.speaks_five = request.param == "mosquitto"
        yield up


@pytest.fixture
async def mosquitto(start: run.Starter) -> run.Mosquitto:
    return start(run.mosquitto(users=USERS, acl=ACL))


async def gateway(site: Site, n: int = 0) -> Gateway:
    return await Gateway(NAMES[n], site.port).open()


async def test_a_batch_goes_through_the_broker_into_the_journal_and_is_acknowledged(site: Site) -> None:
    agent = await gateway(site)
    ack = await agent.send(1)
    assert ack.ranges == ((1, 3),)
    again = await agent.send(1)
    assert again.ranges == ((1, 3),)
    assert await site.stored() == [(GATEWAY, 1, 3)]
    assert site.metrics.duplicate_batches == 1
    await agent.uplink.close()


async def test_many_gateways_at_once_are_answered_each_for_itself_and_in_few_messages(site: Site) -> None:
    agents = [await gateway(site, n) for n in range(4)]
    acks = await asyncio.gather(*(agent.send(1 + 3 * n) for n in range(100) for agent in agents))
    assert len(acks) == 400
    assert len(await site.stored()) == 400
    assert sum(len(agent.replies) for agent in agents) < 400
    for agent in agents:
        assert all(isinstance(reply, Ack) for reply in agent.replies)
        await agent.uplink.close()


async def test_bad_input_gets_a_nack_is_counted_and_harms_nothing(site: Site) -> None:
    agent = await gateway(site)
    small = {name: pair for name, pair in SPOILT.items() if len(pair[0]) < 200_000}
    for payload, _ in small.values():
        agent.publish(payload)
    await until(lambda: len(agent.replies) == len(small))
    codes = sorted(reply.code for reply in agent.replies if isinstance(reply, Nack))
    assert codes == sorted(code for _, code in small.values())
    assert sum(site.metrics.refused.values()) == len(small)
    assert (await agent.send(1)).ranges == ((1, 3),)
    assert await site.stored() == [(GATEWAY, 1, 3)]
    await agent.uplink.close()


async def test_a_message_far_too_large_is_let_go_and_the_next_is_taken(site: Site) -> None:
    agent = await gateway(site)
    agent.publish(bytes(700_000))  # below what NATS takes, above what a batch may be
    assert (await agent.send(1)).ranges == ((1, 3),)
    # MQTT 5: the broker keeps it to itself, as it was told. 3.1.1: it is skipped as it comes.
    assert site.metrics.door_drops["oversize"] == (0 if site.speaks_five else 1)
    assert sum(site.metrics.batches.values()) == 1
    assert await site.stored() == [(GATEWAY, 1, 3)]
    await agent.uplink.close()


async def test_the_largest_batch_passes(site: Site) -> None:
    agent = await gateway(site)
    ack = await agent.uplink.send(Sealed(EPOCH, 1, 1, largest_batch()))
    assert ack.ranges == ((1, 1),)
    await agent.uplink.close()


async def test_a_batch_in_another_gateways_name_is_refused(site: Site) -> None:
    agent = await gateway(site, 1)
    with pytest.raises(BatchRefused) as refused:
        await agent.uplink.send(Sealed(EPOCH, 1, 3, batch(1)))
    assert refused.value.code == "identity"
    assert await site.stored() == []
    await agent.uplink.close()


async def test_heartbeats_are_kept(site: Site) -> None:
    agent = await gateway(site)
    await agent.uplink.report(b"[not an object]")
    await agent.uplink.report(b'{"n": 1}')
    await until(lambda: site.metrics.states["mqtt"])
    await agent.uplink.report(b'{"n": 2}')
    async with asyncio.timeout(20):
        while [s.state for s in await site.journal.states()] != [b'{"n": 2}']:  # noqa: ASYNC110 - a table
            await asyncio.sleep(0.01)
    await agent.uplink.close()


# --- the broker goes and comes ---


async def test_a_broker_that_dies_is_met_again_and_said_once(
    mosquitto: run.Mosquitto, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cloud.mqtt")
    async with running(Site(SqliteJournal(tmp_path / "j.db"), plain(mosquitto.port))) as site:
        await until(lambda: site.door.connected)
        for n in range(3):
            agent = await gateway(site)
            await agent.send(1 + 3 * n)
            await asyncio.to_thread(mosquitto.process.kill)
            await until(lambda: not site.door.connected)
            assert site.door.trouble
            await agent.uplink.close()
            await asyncio.sleep(0.5)  # some attempts go nowhere: they must not be told each
            await asyncio.to_thread(mosquitto.process.start)
            await until(lambda: site.door.connected)
        agent = await gateway(site)
        await agent.send(100)
        assert len(await site.stored()) == 4
        await agent.uplink.close()
    said = [
        (r.levelname, r.getMessage().split(" (")[0].split(":")[0].split(" after")[0]) for r in caplog.records
    ]
    down, again = ("WARNING", "mqtt door closed"), ("INFO", "mqtt door open again")
    assert said == [("INFO", "mqtt door open"), down, again, down, again, down, again]


async def test_a_door_opened_before_its_broker_waits_for_it(mosquitto: run.Mosquitto, tmp_path: Path) -> None:
    await asyncio.to_thread(mosquitto.process.kill)
    async with running(Site(SqliteJournal(tmp_path / "j.db"), plain(mosquitto.port))) as site:
        await until(lambda: "no connection" in site.door.trouble)
        await asyncio.to_thread(mosquitto.process.start)
        await until(lambda: site.door.connected)


async def test_a_refused_login_says_what_to_check(mosquitto: run.Mosquitto, tmp_path: Path) -> None:
    async with running(
        Site(SqliteJournal(tmp_path / "j.db"), plain(mosquitto.port), word="not this one")
    ) as site:
        await until(lambda: "check mqtt.user" in site.door.trouble)
        assert not site.door.connected
        assert "not this one" not in site.door.trouble


# --- TLS ---


@pytest.fixture
def tls_broker(start: run.Starter, tmp_path: Path) -> tuple[run.Mosquitto, Path]:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    broker = start(
        run.mosquitto(
            users=USERS, acl=ACL, extra=(f"certfile {tmp_path}/cert.pem", f"keyfile {tmp_path}/key.pem")
        )
    )
    return broker, tmp_path / "ca.pem"


def test_over_tls_batches_of_all_sizes_pass_on_the_loop_that_serve_uses(
    tls_broker: tuple[run.Mosquitto, Path], tmp_path: Path
) -> None:
    broker, ca = tls_broker
    settings = Settings(host="127.0.0.1", port=broker.port, ca_file=str(ca))

    async def talk() -> int:
        async with running(Site(SqliteJournal(tmp_path / "j.db"), settings)) as site:
            await until(lambda: site.door.connected)
            uplink = MqttUplink(
                NAMES[0],
                config.agent.Uplink(host="127.0.0.1", port=broker.port, ca_file=str(ca), ack_timeout_s=20.0),
                Secret(WORD),
            )
            await uplink.open()
            await uplink.send(Sealed(EPOCH, 1, 1, largest_batch()))
            sent = [Sealed(EPOCH, 2 + 3 * n, 4 + 3 * n, batch(2 + 3 * n)) for n in range(200)]
            await asyncio.gather(*(uplink.send(s) for s in sent))
            await uplink.close()
            return len(await site.stored())

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(talk()) == 201


async def test_an_unknown_certificate_ends_in_no_connection_and_never_in_plaintext(
    tls_broker: tuple[run.Mosquitto, Path], tmp_path: Path
) -> None:
    broker, _ = tls_broker
    async with running(
        Site(SqliteJournal(tmp_path / "j.db"), Settings(host="127.0.0.1", port=broker.port))
    ) as site:
        await until(lambda: "TLS failed" in site.door.trouble)
        assert not site.door.connected


# --- overload and order ---


class Gated(SqliteJournal):
    """Commits when it is let."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.let = asyncio.Event()
        self.asked = 0

    async def append(self, entries: object) -> list[Appended]:
        self.asked += 1
        await self.let.wait()
        return await super().append(entries)  # type: ignore[arg-type]


async def test_no_ack_before_the_commit_and_above_the_bound_try_again(
    mosquitto: run.Mosquitto, tmp_path: Path
) -> None:
    journal = Gated(tmp_path / "j.db")
    async with running(Site(journal, plain(mosquitto.port), max_waiting=5)) as site:
        await until(lambda: site.door.connected)
        agent = await gateway(site)
        sends = [asyncio.create_task(agent.send(1 + 3 * n)) for n in range(mqtt.GROUPS)]
        await until(lambda: journal.asked >= 1)
        sends += [asyncio.create_task(agent.send(1000 + 3 * n)) for n in range(40)]
        await until(lambda: site.metrics.retry["busy"])
        await until(lambda: agent.replies)
        assert {reply.code for reply in agent.replies if isinstance(reply, Nack)} == {"busy"}
        assert not any(isinstance(reply, Ack) for reply in agent.replies)
        journal.let.set()
        results = await asyncio.gather(*sends, return_exceptions=True)
        acked = [r for r in results if isinstance(r, Ack)]
        told = [r for r in results if isinstance(r, RetryLater)]
        assert len(acked) + len(told) == len(sends)
        assert len(told) == site.metrics.retry["busy"]
        assert len(acked) >= 1
        assert len(await site.stored()) == len(acked)
        await agent.uplink.close()


async def test_what_came_in_before_the_stop_is_still_answered(
    mosquitto: run.Mosquitto, tmp_path: Path
) -> None:
    journal = Gated(tmp_path / "j.db")
    async with running(Site(journal, plain(mosquitto.port))) as site:
        await until(lambda: site.door.connected)
        agent = await gateway(site)
        sends = [asyncio.create_task(agent.send(1 + 3 * n)) for n in range(20)]
        await until(lambda: journal.asked >= 1 and len(site.door._waiting) + site.door._busy > 1)
        stopping = asyncio.create_task(site.door.stop())
        await asyncio.sleep(0)
        journal.let.set()
        await stopping
        acked = [task for task in (await asyncio.wait(sends, timeout=2))[0] if task.exception() is None]
        assert len(acked) == len(await site.stored()) >= 1
        await agent.uplink.close()
        for task in sends:
            task.cancel()
        await asyncio.wait(sends)


# --- a scripted broker: what real ones hardly ever do ---


def packet(kind: int, body: bytes) -> bytes:
    length, out = len(body), bytearray()
    while True:
        length, digit = divmod(length, 128)
        out.append(digit | (0x80 if length else 0))
        if not length:
            return bytes((kind,)) + bytes(out) + body


def publish(
    payload: bytes, *, topic: str = f"headgate/v1/{GATEWAY}/up", properties: bytes = b"\x00"
) -> bytes:
    name = topic.encode()
    return packet(0x30, struct.pack(">H", len(name)) + name + properties + payload)


class Broker:
    """Admits everybody and then says what the script says."""

    def __init__(
        self, script: list[bytes], *, suback: bytes = b"\x00\x00", connack: bytes = b"\x00\x00\x00"
    ) -> None:
        self.script, self.suback, self.connack = script, suback, connack
        self.connections = 0
        self.heard = bytearray()

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            await reader.read(4096)
            writer.write(packet(0x20, self.connack))
            request = await reader.read(4096)
            if request:
                writer.write(packet(0x90, request[2:4] + b"\x00" + self.suback))
                for piece in self.script:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0.001)
            while data := await reader.read(4096):
                self.heard += data
        except ConnectionError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def scripted(broker: Broker, tmp_path: Path) -> AsyncIterator[Site]:
    server = await asyncio.start_server(broker.talk, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with running(Site(SqliteJournal(tmp_path / "j.db"), plain(port))) as site:
        yield site
    server.close()


@pytest.mark.parametrize("seed", range(5))
async def test_messages_cut_anywhere_are_put_together_again(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    messages = []
    for n in range(60):
        properties = rng.choice([b"\x00", b"\x02\x01\x01", b"\x07\x26\x00\x01k\x00\x01v"])
        messages.append(publish(batch(1 + 3 * n), properties=properties))
        messages += rng.choice([[], [b"\xd0\x00"], [publish(b"{}", topic=f"headgate/v1/{GATEWAY}/state")]])
    stream = b"".join(messages)
    cuts = sorted(rng.randrange(len(stream)) for _ in range(120))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    async with scripted(Broker(pieces), tmp_path) as site:
        await until(lambda: site.metrics.batches["mqtt"] == 60)
        await site.door.stop()
        assert await site.stored() == [(GATEWAY, 1 + 3 * n, 3 + 3 * n) for n in range(60)]


async def test_an_oversized_message_is_skipped_without_being_held(tmp_path: Path) -> None:
    huge = packet(0x30, struct.pack(">H", 2) + b"xx\x00" + bytes(20_000_000))
    pieces = [
        publish(batch(1)),
        *(huge[i : i + 500_000] for i in range(0, len(huge), 500_000)),
        publish(batch(4)),
    ]
    async with scripted(Broker(pieces), tmp_path) as site:
        await until(lambda: site.metrics.batches["mqtt"] == 2)
        assert site.metrics.door_drops == {"oversize": 1}
        session = site.door._session
        assert session is not None
        assert len(session._client._ahead) < 2_000_000


@pytest.mark.parametrize(
    "nonsense",
    [
        packet(0x30, b"\xff\xff" + b"x"),  # a topic longer than its packet
        b"\x30\xff\xff\xff\xff\x01",  # a length of five bytes
        packet(0x30, b"\x00\x01x\xff\xff\xff\xff"),  # properties without end
        packet(0x30, b"\x00\x01x\x09abc"),  # properties longer than the packet
        packet(0x30, b"\x00\x01x"),  # no properties where there must be some
        b"\x00\x00",  # a packet type that is none
        packet(0x90, b"\x00"),  # a SUBACK cut short
    ],
)
async def test_nonsense_from_the_broker_ends_the_connection_and_it_is_tried_again(
    tmp_path: Path, nonsense: bytes
) -> None:
    broker = Broker([publish(batch(1)), nonsense])
    async with scripted(broker, tmp_path) as site:
        await until(lambda: broker.connections >= 2 and site.journal.last_offset)
        assert await site.stored() == [(GATEWAY, 1, 3)]


async def test_topics_that_are_not_ours_are_counted_and_let_go(tmp_path: Path) -> None:
    topics = ["headgate/v1/a b/c/up", "headgate/v1/acme/plant-1", "x", "headgate/v1/acme/plant-1/nonsense"]
    pieces = [publish(batch(1), topic=topic) for topic in topics] + [publish(batch(1))]
    async with scripted(Broker(pieces), tmp_path) as site:
        await until(lambda: site.metrics.batches["mqtt"] == 1)
        assert site.metrics.door_drops == {"topic": 4}


async def test_a_refused_subscription_is_no_open_door(tmp_path: Path) -> None:
    async with scripted(Broker([], suback=b"\x00\x87"), tmp_path) as site:
        await until(lambda: "change its access list" in site.door.trouble)
        assert "headgate/v1/+/+/state" in site.door.trouble
        assert not site.door.connected


async def test_a_broker_that_never_answers_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt, "CONNECT_TIMEOUT_S", 0.2)

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(mute, "127.0.0.1", 0)
    settings = plain(server.sockets[0].getsockname()[1])
    async with running(Site(SqliteJournal(tmp_path / "j.db"), settings)) as site:
        await until(lambda: "did not come within" in site.door.trouble)
    server.close()


@pytest.mark.timeout(150)
@pytest.mark.parametrize("ways", ["both", "up"])
async def test_a_half_open_connection_to_the_broker_is_found_within_45_s_and_made_anew(
    mosquitto: run.Mosquitto, tmp_path: Path, ways: Literal["both", "up"]
) -> None:
    """At the shipped keepalive. `up`: only what the cloud sends is lost, and batches still come."""
    async with fault_proxy(mosquitto.port) as line:
        site = Site(SqliteJournal(tmp_path / "j.db"), plain(line.port))
        async with running(site):
            await until(lambda: site.door.connected)
            agent = await Gateway(NAMES[0], mosquitto.port).open()
            assert (await agent.send(1)).ranges == ((1, 3),)
            line.faults.only = ways
            line.faults.blackhole = True
            began_s, first = time.monotonic(), 4
            while site.door.connected:
                assert time.monotonic() - began_s < 45, "still believed"
                agent.publish(batch(first))  # nobody answers
                first += 3
                await asyncio.sleep(0.1)
            # Where the broker still reaches us, it is the first to notice.
            assert site.door.trouble.startswith(
                "the broker is silent" if ways == "both" else "the broker closed"
            )
            line.heal()
            await until(lambda: site.door.connected)
            assert (await agent.send(1, first - 1)).ranges == ((1, first - 1),)
            await agent.uplink.close()


async def test_a_broker_that_falls_silent_is_left_after_the_keepalive(tmp_path: Path) -> None:
    broker = Broker([])
    server = await asyncio.start_server(broker.talk, "127.0.0.1", 0)
    settings = Settings(host="127.0.0.1", port=server.sockets[0].getsockname()[1], tls=False, keepalive_s=5)
    async with running(Site(SqliteJournal(tmp_path / "j.db"), settings)) as site:
        await until(lambda: site.door.connected)
        await until(lambda: "silent" in site.door.trouble, 40)
    server.close()
