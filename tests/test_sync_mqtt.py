"""The MQTT uplink at its edges: versions, TLS, what a broker says and what it does not, slow and dead lines."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme
from paho.mqtt.enums import MQTTProtocolVersion

from config.agent import Uplink as UplinkSettings
from sync.identity import GatewayName, IdentityError
from sync.mqtt import MqttUplink
from sync.uplink import AckTimeout, BatchRefused, LinkDown
from sync.wire import Ack
from tests.fakes.cloud_door import SILENCE, FarSide, acknowledge, mqtt_door, until
from tests.servers import run
from tests.test_sync_uplinks import ACL, USERS
from tests.uplink_conformance import GATEWAY, TOKEN, batch, covers, largest_batch


def settings(port: int, *, host: str = "127.0.0.1", tls: bool = False, ca_file: str | None = None,
             ack_timeout_s: float = 10.0, keepalive_s: float = 20.0) -> UplinkSettings:  # fmt: skip
    return UplinkSettings(
        host=host, port=port, tls=tls, ca_file=ca_file, ack_timeout_s=ack_timeout_s, keepalive_s=keepalive_s,
        connect_timeout_s=5.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def mosquitto() -> Iterator[run.Mosquitto]:
    with run.mosquitto(users=USERS, acl=ACL) as broker:
        yield broker


@asynccontextmanager
async def proxied(port: int) -> AsyncIterator[Proxy]:
    proxy = Proxy(port)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)  # it takes no more than it carries on
    listener.bind(("127.0.0.1", 0))
    server = await asyncio.start_server(proxy.serve, sock=listener, limit=2048)
    proxy.port = listener.getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        for task in proxy.tasks:
            task.cancel()


class Proxy:
    """A line that can be made slow, or go dead without a word."""

    def __init__(self, to_port: int) -> None:
        self.to_port = to_port
        self.port = 0
        self.bytes_per_s: float | None = None
        self.dead = False
        self.tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward, back = await asyncio.open_connection("127.0.0.1", self.to_port)
        for source, sink in ((reader, back), (onward, writer)):
            task = asyncio.create_task(self._carry(source, sink))
            self.tasks.add(task)

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(2048):
                while self.dead:  # noqa: ASYNC110 - swallows everything until the test ends
                    await asyncio.sleep(0.05)
                if self.bytes_per_s is not None:
                    await asyncio.sleep(len(data) / self.bytes_per_s)
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        finally:
            sink.close()


# --- versions ---


async def test_mqtt_5_is_spoken_where_the_broker_does(mosquitto: run.Mosquitto) -> None:
    uplink = MqttUplink(GATEWAY, settings(mosquitto.port), TOKEN)
    await uplink.open()
    assert uplink.protocol == MQTTProtocolVersion.MQTTv5
    await uplink.close()


async def test_mqtt_3_1_1_is_spoken_where_the_broker_refuses_5_and_that_is_remembered() -> None:
    with run.nats(users=USERS) as nats:
        uplink = MqttUplink(GATEWAY, settings(nats.mqtt_port), TOKEN)
        await uplink.open()
        assert uplink.protocol == MQTTProtocolVersion.MQTTv311
        await uplink.open()
        assert uplink.protocol == MQTTProtocolVersion.MQTTv311
        await uplink.close()


async def test_a_wrong_token_does_not_lead_to_an_older_version(mosquitto: run.Mosquitto) -> None:
    uplink = MqttUplink(GatewayName("acme", "stranger"), settings(mosquitto.port), TOKEN)
    with pytest.raises(LinkDown, match="login"):
        await uplink.open()
    assert uplink.protocol == MQTTProtocolVersion.MQTTv5


# --- TLS ---


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def tls_broker(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Iterator[run.Mosquitto]:
    folder = tmp_path_factory.mktemp("tls")
    cert = authority.issue_cert("localhost")
    cert.private_key_pem.write_to_path(folder / "key.pem")
    cert.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    extra = [f"certfile {folder}/cert.pem", f"keyfile {folder}/key.pem"]
    with run.mosquitto(users=USERS, acl=ACL, extra=extra) as broker:
        yield broker


async def test_tls_is_verified_and_then_used(
    tls_broker: run.Mosquitto, authority: trustme.CA, tmp_path: Path
) -> None:
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    made = settings(tls_broker.port, host="localhost", tls=True, ca_file=str(tmp_path / "ca.pem"))
    uplink = MqttUplink(GATEWAY, made, TOKEN)
    await uplink.open()
    await uplink.report(b"{}")
    # A large packet crosses many TLS records, and nobody answers: only the timeout may end this.
    with pytest.raises(AckTimeout):
        await uplink.send(largest_batch())
    await uplink.close()


async def test_an_unknown_authority_ends_the_matter(tls_broker: run.Mosquitto, tmp_path: Path) -> None:
    uplink = MqttUplink(GATEWAY, settings(tls_broker.port, host="localhost", tls=True), TOKEN)
    with pytest.raises(LinkDown, match=r"TLS: .*ca_file"):
        await uplink.open()
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    made = settings(tls_broker.port, host="localhost", tls=True, ca_file=str(tmp_path / "other.pem"))
    with pytest.raises(LinkDown, match="TLS"):
        await MqttUplink(GATEWAY, made, TOKEN).open()


async def test_a_certificate_for_another_host_is_refused(
    tls_broker: run.Mosquitto, authority: trustme.CA, tmp_path: Path
) -> None:
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    made = settings(tls_broker.port, host="127.0.0.1", tls=True, ca_file=str(tmp_path / "ca.pem"))
    with pytest.raises(LinkDown, match="TLS"):
        await MqttUplink(GATEWAY, made, TOKEN).open()


async def test_tls_to_a_plain_broker_fails_and_plaintext_is_never_tried(mosquitto: run.Mosquitto) -> None:
    with pytest.raises(LinkDown):
        await MqttUplink(GATEWAY, settings(mosquitto.port, host="localhost", tls=True), TOKEN).open()


def test_plaintext_to_anywhere_but_loopback_is_refused() -> None:
    with pytest.raises(IdentityError, match="set tls = true"):
        MqttUplink(GATEWAY, settings(1883, host="broker.example"), TOKEN)


async def test_a_missing_ca_file_is_named(mosquitto: run.Mosquitto) -> None:
    made = settings(mosquitto.port, host="localhost", tls=True, ca_file="/nowhere/ca.pem")
    with pytest.raises(LinkDown, match=r"/nowhere/ca\.pem"):
        await MqttUplink(GATEWAY, made, TOKEN).open()


# --- which step failed ---


async def test_the_step_that_failed_is_named(free_port: Callable[[], int]) -> None:
    with pytest.raises(LinkDown, match="connect: Connection refused"):
        await MqttUplink(GATEWAY, settings(free_port()), TOKEN).open()
    made = settings(1883, host="no-such-host.invalid", tls=True)
    with pytest.raises(LinkDown, match=r"DNS: no-such-host\.invalid"):
        await MqttUplink(GATEWAY, made, TOKEN).open()


async def test_a_host_that_is_no_name_is_told_as_such() -> None:
    with pytest.raises(LinkDown, match="no host name"):
        await MqttUplink(GATEWAY, settings(1883, host="a..b", tls=True), TOKEN).open()


async def test_a_listener_that_is_no_broker_is_told_as_such() -> None:
    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(-1)

    server = await asyncio.start_server(mute, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    uplink = MqttUplink(
        GATEWAY, UplinkSettings(host="127.0.0.1", port=port, tls=False, connect_timeout_s=0.3), TOKEN
    )
    with pytest.raises(LinkDown, match="is it an MQTT broker"):
        await uplink.open()
    server.close()


async def test_a_refused_subscription_is_no_open_way() -> None:
    """A broker that grants the login and refuses the topic (SUBACK 0x80; MQTT 3.1.1, 3.9.3)."""

    async def refusing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while header := await reader.readexactly(2):
            body = await reader.readexactly(header[1])
            if header[0] == 0x10:  # CONNECT
                writer.write(b"\x20\x02\x00\x00")
            elif header[0] == 0x82:  # SUBSCRIBE
                writer.write(b"\x90\x03" + body[:2] + b"\x80")

    server = await asyncio.start_server(refusing, "127.0.0.1", 0)
    uplink = MqttUplink(GATEWAY, settings(server.sockets[0].getsockname()[1]), TOKEN)
    uplink.protocol = MQTTProtocolVersion.MQTTv311
    with pytest.raises(LinkDown, match=r"subscribe to headgate/v1/acme/plant-1/ack.*ACL"):
        await uplink.open()
    server.close()


# --- what MQTT 5 tells early ---


async def test_nobody_listening_is_known_at_once(mosquitto: run.Mosquitto) -> None:
    uplink = MqttUplink(GATEWAY, settings(mosquitto.port), TOKEN)
    await uplink.open()
    started_s = time.monotonic()
    with pytest.raises(AckTimeout, match="no cloud is listening"):
        await uplink.send(batch(1))
    assert time.monotonic() - started_s < 5  # of an ack timeout of 10
    await uplink.close()


async def test_a_topic_that_the_broker_forbids_is_named() -> None:
    acl = ACL.replace("pattern write headgate/v1/%u/up\n", "")
    with run.mosquitto(users=USERS, acl=acl) as broker:
        uplink = MqttUplink(GATEWAY, settings(broker.port), TOKEN)
        await uplink.open()
        with pytest.raises(LinkDown, match="headgate/v1/acme/plant-1/up: Not authorized"):
            await uplink.send(batch(1))
        await uplink.close()


async def test_a_packet_larger_than_the_broker_takes_is_refused_before_it_is_sent() -> None:
    with run.mosquitto(users=USERS, acl=ACL, extra=["max_packet_size 2000"]) as broker:
        far = FarSide()
        async with mqtt_door(far, broker.host, broker.port):
            uplink = MqttUplink(GATEWAY, settings(broker.port), TOKEN)
            await uplink.open()
            with pytest.raises(BatchRefused, match="2000") as caught:
                await uplink.send(largest_batch())
            assert caught.value.code == "size"
            assert covers(await uplink.send(batch(1)), batch(1))  # the connection did not suffer
            await uplink.close()


async def test_a_heartbeat_larger_than_the_broker_takes_does_not_end_the_connection() -> None:
    with run.mosquitto(users=USERS, acl=ACL, extra=["max_packet_size 2000"]) as broker:
        far = FarSide()
        async with mqtt_door(far, broker.host, broker.port):
            uplink = MqttUplink(GATEWAY, settings(broker.port), TOKEN)
            await uplink.open()
            await uplink.report(bytes(3000))
            assert covers(await uplink.send(batch(1)), batch(1))
            await uplink.close()


# --- acks and lines ---


async def test_an_ack_that_comes_too_late_answers_the_next_send(mosquitto: run.Mosquitto) -> None:
    far = FarSide()
    async with mqtt_door(far, mosquitto.host, mosquitto.port):
        uplink = MqttUplink(GATEWAY, settings(mosquitto.port, ack_timeout_s=0.3), TOKEN)
        await uplink.open()
        far.gate.clear()
        with pytest.raises(AckTimeout):
            await uplink.send(batch(1))
        far.gate.set()
        await until(lambda: uplink._early)
        assert covers(await uplink.send(batch(1)), batch(1))
        assert len(far.received) == 1
        await uplink.close()


async def test_one_ack_may_answer_several_batches(mosquitto: run.Mosquitto) -> None:
    far = FarSide()
    async with mqtt_door(far, mosquitto.host, mosquitto.port):
        uplink = MqttUplink(GATEWAY, settings(mosquitto.port), TOKEN)
        await uplink.open()
        far.answer = lambda head: Ack(head.epoch, ((1, 100),)) if head.first == 11 else SILENCE
        first = asyncio.create_task(uplink.send(batch(1)))
        await until(lambda: len(far.received) == 1)
        second = await uplink.send(batch(11))
        assert await first == second
        await uplink.close()


async def test_a_slow_line_is_no_silent_cloud(mosquitto: run.Mosquitto) -> None:
    """256 KB at 200 KB/s take 1.3 s, and the ack timeout is 0.5 s: resending would never end."""
    far = FarSide()
    async with mqtt_door(far, mosquitto.host, mosquitto.port), proxied(mosquitto.port) as proxy:
        uplink = MqttUplink(GATEWAY, settings(proxy.port, ack_timeout_s=0.5), TOKEN)
        await uplink.open()
        proxy.bytes_per_s = 200_000
        sent = largest_batch()
        assert covers(await uplink.send(sent), sent)
        assert len(far.received) == 1
        await uplink.close()


async def test_a_line_that_died_silently_is_found_within_one_and_a_half_keepalives(
    mosquitto: run.Mosquitto,
) -> None:
    far = FarSide()
    async with mqtt_door(far, mosquitto.host, mosquitto.port), proxied(mosquitto.port) as proxy:
        uplink = MqttUplink(GATEWAY, settings(proxy.port, ack_timeout_s=60, keepalive_s=3), TOKEN)
        await uplink.open()
        assert covers(await uplink.send(batch(1)), batch(1))
        proxy.dead = True
        started_s = time.monotonic()
        with pytest.raises(LinkDown):
            await uplink.send(batch(11))
        assert time.monotonic() - started_s < 1.5 * 3 + 3  # and what a busy machine takes
        await uplink.close()


async def test_commands_come_to_whoever_asked_for_them(mosquitto: run.Mosquitto) -> None:
    import paho.mqtt.publish

    heard: list[bytes] = []
    acl = ACL + "topic write headgate/v1/+/+/cmd\n"
    with run.mosquitto(users=USERS, acl=acl) as broker:
        uplink = MqttUplink(GATEWAY, settings(broker.port), TOKEN, on_command=heard.append)
        await uplink.open()
        await asyncio.to_thread(
            paho.mqtt.publish.single, "headgate/v1/acme/plant-1/cmd", b"desired", hostname=broker.host,
            port=broker.port, auth={"username": "headgate-cloud", "password": USERS["headgate-cloud"]},
        )  # fmt: skip
        await until(lambda: heard)
        assert heard == [b"desired"]
        await uplink.close()


async def test_rubbish_on_the_ack_topic_harms_nothing(mosquitto: run.Mosquitto) -> None:
    import paho.mqtt.publish

    far = FarSide()
    async with mqtt_door(far, mosquitto.host, mosquitto.port):
        uplink = MqttUplink(GATEWAY, settings(mosquitto.port), TOKEN)
        await uplink.open()
        for rubbish in (b"", b"\x10", b"\xff" * 100, b"\x10\x93\x00"):
            await asyncio.to_thread(
                paho.mqtt.publish.single, "headgate/v1/acme/plant-1/ack", rubbish, hostname=mosquitto.host,
                port=mosquitto.port, auth={"username": "headgate-cloud", "password": USERS["headgate-cloud"]},
            )  # fmt: skip
        far.answer = acknowledge
        assert covers(await uplink.send(batch(1)), batch(1))
        await uplink.close()
