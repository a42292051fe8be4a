"""The way between a simulated gateway and its cloud, and an uplink that goes over it.

Rules:
1. A message takes its own time, so that messages overtake each other; it may be lost, doubled or damaged, all by the
   seed. What is lost is lost without a word.
2. A way that is cut says so; one that is half-open says nothing until the keepalive finds out.
3. A reply may come after its asker has given up, and answers whoever asks for the same frames then.

`SimUplink` passes `tests/uplink_conformance.py`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from cloud.intake import Arrival, Intake, merge
from sync.identity import GatewayName
from sync.mqtt import refusal
from sync.uplink import AckTimeout, LinkDown
from sync.wire import Ack, Nack, Reply, Sealed

KEEPALIVE_FINDS_S: Final = 30.0  #: 1.5 times `uplink.keepalive_s`
_TOGETHER_S: Final = 0.002  #: what arrives at the door within this is judged together


class Weather(msgspec.Struct, kw_only=True):
    """How the way is at the moment; each share is of messages, in either direction."""

    up: bool = True
    half_open: bool = False
    lost: float = 0.0
    doubled: float = 0.0
    damaged: float = 0.0
    late: float = 0.0  #: take up to a minute
    delay_s: float = 0.05


class Network:
    """Carries batches one way and replies the other."""

    def __init__(self, rng: random.Random, weather: Weather | None = None) -> None:
        self.weather = weather or Weather()
        self.rng = rng
        self.far: Intake | None = None  #: None: the cloud is down
        self.uplink: SimUplink | None = None  #: the one that is connected
        self.on_reply: Callable[[str, Reply], None] = lambda gateway, reply: None  #: as the cloud said it
        self.carried = self.lost = self.doubled = self.damaged = 0
        self._waiting: list[Arrival] = []
        self._door: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def _times(self) -> int:
        """How often a message arrives."""
        weather = self.weather
        if not weather.up or weather.half_open or self.rng.random() < weather.lost:
            self.lost += 1
            return 0
        self.carried += 1
        if weather.doubled and self.rng.random() < weather.doubled:
            self.doubled += 1
            return 2
        return 1

    def _delay_s(self) -> float:
        weather = self.weather
        if weather.late and self.rng.random() < weather.late:
            return self.rng.uniform(0.0, 60.0)
        return self.rng.uniform(0.2, 1.8) * weather.delay_s

    def to_cloud(self, gateway: str, payload: bytes) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(self._times()):
            if self.weather.damaged and self.rng.random() < self.weather.damaged:
                self.damaged += 1
                at = self.rng.randrange(len(payload))
                payload = (
                    payload[:at] + bytes((payload[at] ^ 1 << self.rng.randrange(8),)) + payload[at + 1 :]
                )
            loop.call_later(self._delay_s(), self._arrived, Arrival(gateway, payload, loop.time()))

    def _arrived(self, arrival: Arrival) -> None:
        self._waiting.append(arrival)
        if self._door is None:
            self._door = asyncio.get_running_loop().call_later(_TOGETHER_S, self._open_door)

    def _open_door(self) -> None:
        self._door = None
        arrivals, self._waiting = self._waiting, []
        if self.far is None:
            self.lost += len(arrivals)
            return
        task = asyncio.get_running_loop().create_task(self._judge(self.far, arrivals))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _judge(self, far: Intake, arrivals: Sequence[Arrival]) -> None:
        try:
            verdicts = await far.accept(arrivals, door="mqtt")
        except asyncio.CancelledError:
            if far is self.far:
                raise
            return
        if far is not self.far:
            return  # the cloud died before it could answer
        for gateway, replies in merge(verdicts).items():
            for reply in replies:
                self.on_reply(gateway, reply)
                for _ in range(self._times()):
                    asyncio.get_running_loop().call_later(self._delay_s(), self._answered, reply)

    def _answered(self, reply: Reply) -> None:
        if self.uplink is not None and self.weather.up and not self.weather.half_open:
            self.uplink.answered(reply)

    async def state(self, gateway: str, state: bytes) -> None:
        if self.far is not None and self._times():
            await self.far.on_state(gateway, state, door="mqtt")

    # --- faults ---

    def cut(self) -> None:
        self.weather.up = False
        if self.uplink is not None:
            self.uplink.cut()

    def mend(self) -> None:
        self.weather.up = True
        self.weather.half_open = False

    def half_open(self) -> None:
        """Nothing passes, nobody says so; the keepalive finds it."""
        self.weather.half_open = True
        uplink = self.uplink
        if uplink is not None:
            asyncio.get_running_loop().call_later(KEEPALIVE_FINDS_S, self._found, uplink, uplink.opened)

    def _found(self, uplink: SimUplink, session: int) -> None:
        if self.weather.half_open and uplink is self.uplink and uplink.opened == session:
            uplink.cut()


class SimUplink:
    """`sync.uplink.Uplink` over a `Network`."""

    def __init__(
        self,
        gateway: GatewayName,
        network: Network,
        *,
        ack_timeout_s: float = 10.0,
        connect_timeout_s: float = 10.0,
    ) -> None:
        self.name = "simulated"
        self.opened = 0
        self._gateway = str(gateway)
        self._network = network
        self._ack_timeout_s = ack_timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._open = False
        self._asked: dict[asyncio.Future[Reply], tuple[int, int, int]] = {}

    async def open(self) -> None:
        network = self._network
        await asyncio.sleep(network.rng.uniform(0.5, 3.0) * network.weather.delay_s)
        if network.weather.half_open:
            await asyncio.sleep(self._connect_timeout_s)
        if not network.weather.up or network.weather.half_open:
            raise LinkDown("simulated: connect: no way")
        self.opened += 1
        self._open = True
        network.uplink = self

    async def send(self, batch: Sealed) -> Ack:
        if not self._open:
            raise LinkDown("simulated: not connected")
        asked: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._asked[asked] = (batch.epoch, batch.first, batch.last)
        try:
            self._network.to_cloud(self._gateway, batch.payload)
            async with asyncio.timeout(self._ack_timeout_s):
                reply = await asked
        except TimeoutError:
            raise AckTimeout(f"simulated: no ack for {batch.first}..{batch.last}") from None
        finally:
            del self._asked[asked]
        if isinstance(reply, Ack):
            return reply
        raise refusal(reply)

    def answered(self, reply: Reply) -> None:
        if not self._open:
            return
        for asked, (epoch, first, last) in self._asked.items():
            if asked.done() or reply.epoch != epoch:
                continue
            if isinstance(reply, Nack):
                if (reply.first, reply.last) == (first, last):
                    asked.set_result(reply)
            elif any(a <= first and last <= b for a, b in reply.ranges):
                asked.set_result(reply)

    async def report(self, state: bytes) -> None:
        if not self._open:
            raise LinkDown("simulated: not connected")
        await self._network.state(self._gateway, state)

    def cut(self) -> None:
        self._open = False
        if self._network.uplink is self:
            self._network.uplink = None
        for asked in self._asked:
            if not asked.done():
                asked.set_exception(LinkDown("simulated: the connection ended"))

    async def close(self) -> None:
        self.cut()
