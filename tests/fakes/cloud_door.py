"""The cloud's real doors with a scripted intake behind them: what they answer is the test's to say.

HTTP and MQTT are the doors of `cloud/`; only the decision (ack, nack, silence) is replaced. By default the far side
dedupes by interval and acknowledges, as the real intake does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import uvicorn

from cloud.http import Credentials, HttpDoor, Receive, Scope, Send
from cloud.intake import Arrival, Intake, Verdict
from cloud.metrics import Metrics
from cloud.mqtt import MqttDoor
from cloud.quotas import Quotas
from config.cloud import MqttDoor as MqttDoorSettings
from sync.identity import GatewayName, Secret
from sync.wire import Ack, Head, Reply, open_head

SILENCE = None
CLOUD_USER = "headgate-cloud"
CLOUD_PASSWORD = Secret("the-cloud-s-own-password")


def acknowledge(head: Head) -> Reply | None:
    return Ack(head.epoch, ((head.first, head.last),))


class FarSide(Intake):
    """What stands where the intake stands."""

    def __init__(self) -> None:
        self.quotas = Quotas()
        self.answer: Callable[[Head], Reply | None] = acknowledge
        self.received: list[tuple[str, bytes]] = []
        self.states: list[tuple[str, bytes]] = []
        self.gate = asyncio.Event()  #: answers wait for it
        self.gate.set()
        self.over = asyncio.Event()  #: lets go of those who wait for an answer that never comes

    async def accept(self, arrivals: Sequence[Arrival], *, door: str) -> list[Verdict]:
        seen = [(arrival.gateway, arrival.payload) in self.received for arrival in arrivals]
        self.received += [(arrival.gateway, arrival.payload) for arrival in arrivals]
        await self.gate.wait()
        verdicts = []
        for arrival, again in zip(arrivals, seen, strict=True):
            reply = self.answer(open_head(arrival.payload)[0])
            if reply is not SILENCE:
                verdicts.append(Verdict(arrival.gateway, reply, again and isinstance(reply, Ack)))
            elif door == "http":
                await self.over.wait()
                raise ConnectionError("the test is over")
        return verdicts

    async def on_state(self, gateway: str, state: bytes, *, door: str) -> None:
        self.states.append((gateway, state))


@asynccontextmanager
async def mqtt_door(far: FarSide, host: str, port: int) -> AsyncIterator[MqttDoor]:
    """The real MQTT door on a broker, connected."""
    settings = MqttDoorSettings(host=host, port=port, tls=False, user=CLOUD_USER)
    door = MqttDoor(settings, CLOUD_PASSWORD, far, Metrics())
    task = asyncio.create_task(door.run())
    try:
        await until(lambda: door.connected)
        yield door
    finally:
        far.over.set()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(happened: Callable[[], object], *, timeout_s: float = 30.0) -> None:
    """Wait for something that others bring about; `TimeoutError` after the deadline."""
    async with asyncio.timeout(timeout_s):
        while not happened():  # noqa: ASYNC110 - what is waited for is in another's hands, often another process
            await asyncio.sleep(0.01)


class HttpServer:
    """The real HTTP door behind uvicorn; may be stopped and started again on its port."""

    def __init__(
        self,
        far: FarSide,
        gateway: GatewayName,
        token: Secret,
        port: int,
        *,
        tls: tuple[str, str] | None = None,
    ) -> None:
        async def rest(scope: object, receive: object, send: Callable[[dict[str, object]], object]) -> None:
            ok: list[dict[str, object]] = [
                {"type": "http.response.start", "status": 204, "headers": []},
                {"type": "http.response.body", "body": b""},
            ]
            for message in ok:
                await send(message)  # type: ignore[misc]  # ASGI's send, whose exact type is its own

        door = HttpDoor(far, Credentials({gateway: token}), Metrics(), rest)
        self.most_bytes: int | None = None  #: as a proxy in front with a limit of its own: 413 above it

        async def limited(scope: Scope, receive: Receive, send: Send) -> None:
            size = int(dict(scope.get("headers", ())).get(b"content-length", b"0"))
            if self.most_bytes is None or size <= self.most_bytes:
                await door(scope, receive, send)
                return
            while (await receive()).get("more_body"):
                pass
            await send({"type": "http.response.start", "status": 413, "headers": []})
            await send({"type": "http.response.body", "body": b"<html>too large</html>"})

        self._app = limited
        self.port = port
        self._tls = tls
        self._server: uvicorn.Server | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        cert, key = self._tls or (None, None)
        config = uvicorn.Config(
            self._app, host="127.0.0.1", port=self.port, log_level="critical", lifespan="off",
            ssl_certfile=cert, ssl_keyfile=key, timeout_graceful_shutdown=0,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._task = asyncio.create_task(self._serve(self._server))
        server = self._server
        await until(lambda: server.started)

    @staticmethod
    async def _serve(server: uvicorn.Server) -> None:
        # Not `serve()`, which takes the process's signal handlers.
        with contextlib.suppress(asyncio.CancelledError):
            await server._serve()

    async def stop(self) -> None:
        """At once, with every connection cut."""
        if self._server is None or self._task is None:
            return
        self._server.should_exit = True
        for connection in list(self._server.server_state.connections):
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.abort()
        await self._task
        self._server = self._task = None
