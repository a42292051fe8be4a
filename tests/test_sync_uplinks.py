"""Both uplinks and the fake keep one promise, against a real Mosquitto, a real NATS and the real doors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack

import pytest
from paho.mqtt.enums import MQTTProtocolVersion

from cloud.mqtt import MqttDoor
from config.agent import Uplink as UplinkSettings
from sync.https import HttpsUplink
from sync.identity import Secret
from sync.mqtt import MqttUplink
from sync.uplink import Uplink
from tests.fakes.cloud_door import CLOUD_PASSWORD, CLOUD_USER, FarSide, HttpServer, mqtt_door, until
from tests.fakes.uplink import MemoryUplink
from tests.servers import run
from tests.uplink_conformance import GATEWAY, TOKEN, UplinkConformance, Way

ACL = f"""\
pattern write headgate/v1/%u/up
pattern write headgate/v1/%u/state
pattern read headgate/v1/%u/ack
pattern read headgate/v1/%u/cmd

user {CLOUD_USER}
topic read headgate/v1/+/+/up
topic read headgate/v1/+/+/state
topic write headgate/v1/+/+/ack
"""
USERS = {str(GATEWAY): TOKEN.reveal(), CLOUD_USER: CLOUD_PASSWORD.reveal()}


@pytest.fixture(scope="module")
def brokers() -> Iterator[dict[str, run.Mosquitto | run.Nats]]:
    """One of each for the module: tests cut and mend them, and leave them running."""
    with ExitStack() as stack:
        yield {
            "mosquitto": stack.enter_context(run.mosquitto(users=USERS, acl=ACL)),
            "nats": stack.enter_context(run.nats(users=USERS)),
        }


@pytest.fixture(params=["mosquitto, MQTT 5", "mosquitto, MQTT 3.1.1", "nats", "https", "memory"])
async def way(
    request: pytest.FixtureRequest,
    brokers: dict[str, run.Mosquitto | run.Nats],
    free_port: Callable[[], int],
) -> AsyncIterator[Way]:
    far = FarSide()
    kind = str(request.param)
    async with AsyncExitStack() as stack:
        if kind == "memory":
            yield _memory(far)
        elif kind == "https":
            server = HttpServer(far, GATEWAY, TOKEN, free_port())
            await server.start()
            stack.push_async_callback(server.stop)
            yield _https(far, server)
        else:
            broker = brokers[kind.partition(",")[0]]
            port = broker.mqtt_port if isinstance(broker, run.Nats) else broker.port
            door = await stack.enter_async_context(mqtt_door(far, broker.host, port))
            yield _mqtt(
                far,
                door,
                broker,
                port,
                MQTTProtocolVersion.MQTTv311 if "3.1.1" in kind else MQTTProtocolVersion.MQTTv5,
            )
        far.over.set()


def _memory(far: FarSide) -> Way:
    made: list[MemoryUplink] = []

    def make(_token: Secret, ack_timeout_s: float) -> Uplink:
        made.append(MemoryUplink(GATEWAY, far, ack_timeout_s=ack_timeout_s / 2))
        return made[-1]

    async def cut() -> None:
        made[-1].up = False
        made[-1].cut()

    async def mend() -> None:
        made[-1].up = True

    return Way(far, make, cut, mend, refuses_strangers=False)


def _https(far: FarSide, server: HttpServer) -> Way:
    def make(token: Secret, ack_timeout_s: float) -> Uplink:
        settings = UplinkSettings(
            kind="https", host="127.0.0.1", port=server.port, tls=False, ack_timeout_s=ack_timeout_s
        )
        return HttpsUplink(GATEWAY, settings, token)

    return Way(far, make, server.stop, server.start)


def _mqtt(
    far: FarSide, door: MqttDoor, broker: run.Mosquitto | run.Nats, port: int, protocol: MQTTProtocolVersion
) -> Way:
    def make(token: Secret, ack_timeout_s: float) -> Uplink:
        settings = UplinkSettings(host=broker.host, port=port, tls=False, ack_timeout_s=ack_timeout_s)
        uplink = MqttUplink(GATEWAY, settings, token)
        uplink.protocol = protocol
        return uplink

    async def cut() -> None:
        await asyncio.to_thread(broker.process.kill)

    async def mend() -> None:
        await asyncio.to_thread(broker.process.start)
        await until(lambda: door.connected)

    return Way(far, make, cut, mend)


class TestUplinks(UplinkConformance):
    pass
