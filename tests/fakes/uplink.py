"""An uplink in memory, for tests of the forwarder. It passes `tests/uplink_conformance.py` as the real ones do."""

from __future__ import annotations

import asyncio
import contextlib

from cloud.intake import Arrival
from sync.identity import GatewayName
from sync.mqtt import refusal
from sync.uplink import AckTimeout, LinkDown
from sync.wire import Ack, Sealed
from tests.fakes.cloud_door import FarSide


class MemoryUplink:
    """`sync.uplink.Uplink` straight to a far side. `up` False: no way; `largest` bytes: more breaks the connection."""

    def __init__(self, gateway: GatewayName, far: FarSide, *, ack_timeout_s: float = 0.5) -> None:
        self.name = "memory"
        self.up = True
        self.largest: int | None = None  #: above this the connection breaks, without a word
        self.round_trip_s = 0.0
        self.broken = 0
        self.opened = 0
        self.most_at_once = 0
        self._gateway = gateway
        self._far = far
        self._ack_timeout_s = ack_timeout_s
        self._open = False
        self._sending: set[asyncio.Future[None]] = set()

    async def open(self) -> None:
        self.opened += 1
        if not self.up:
            raise LinkDown("memory: connect: refused")
        self._open = True

    async def send(self, batch: Sealed) -> Ack:
        if not self._open:
            raise LinkDown("memory: not connected")
        cut: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sending.add(cut)
        self.most_at_once = max(self.most_at_once, len(self._sending))
        try:
            if self.largest is not None and len(batch.payload) > self.largest:
                await asyncio.sleep(0.001)
                self.broken += 1
                self.cut()
                raise LinkDown("memory: the connection ended")
            if self.round_trip_s:
                await asyncio.wait((cut,), timeout=self.round_trip_s)
            accept = asyncio.ensure_future(
                self._far.accept([Arrival(str(self._gateway), batch.payload, 0.0)], door="memory")
            )
            try:
                await asyncio.wait(
                    (accept, cut), timeout=self._ack_timeout_s, return_when=asyncio.FIRST_COMPLETED
                )
                if cut.done():
                    raise LinkDown("memory: the connection ended")
                if not accept.done() or not accept.result():
                    await asyncio.wait((cut,), timeout=self._ack_timeout_s)
                    if cut.done():
                        raise LinkDown("memory: the connection ended")
                    raise AckTimeout(f"memory: no ack for {batch.first}..{batch.last}")
                reply = accept.result()[0].reply
            finally:
                accept.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await accept
        finally:
            self._sending.discard(cut)
        if isinstance(reply, Ack):
            return reply
        raise refusal(reply)

    async def report(self, state: bytes) -> None:
        if not self._open:
            raise LinkDown("memory: not connected")
        await self._far.on_state(str(self._gateway), state, door="memory")

    def cut(self) -> None:
        """Break the connection, now."""
        self._open = False
        for cut in self._sending:
            if not cut.done():
                cut.set_result(None)

    async def close(self) -> None:
        self.cut()
