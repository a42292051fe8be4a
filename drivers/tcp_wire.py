"""A serial line behind a gateway that passes bytes through a TCP connection, for one owner, as
`drivers.serial_bus.Wire` is for a port of this machine.

Rules: speed and form of character are the gateway's affair. A connection whose other end has gone without a word is
noticed within `_UNANSWERED_MS` of a write.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Final

from drivers.contract import DeviceUnreachable, Reason
from drivers.serial_bus import Heard
from drivers.serial_port import PortSettings

_UNANSWERED_MS: Final = 10_000  #: of bytes that nobody acknowledges (tcp(7), TCP_USER_TIMEOUT)


class TcpWire(Heard):
    """A connection: bytes out, bytes in. Made by `connect`."""

    def __init__(self, name: str, settings: PortSettings) -> None:
        super().__init__(name, settings)
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def connect(cls, host: str, port: int, settings: PortSettings, timeout_s: float) -> TcpWire:
        """Raises `DeviceUnreachable`."""
        wire = cls(f"{host}:{port}", settings)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                transport, _ = await loop.create_connection(lambda: _Ear(wire), host, port)
        except TimeoutError as exc:
            raise DeviceUnreachable(
                f"{wire.port}: no connection within {timeout_s:g} s", Reason.TIMEOUT
            ) from exc
        except OSError as exc:
            raise DeviceUnreachable(f"{wire.port}: {exc.strerror or exc}") from exc
        sock = transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNANSWERED_MS)
        wire._transport = transport
        return wire

    async def write(self, data: bytes) -> None:
        """Hand all to the gateway, and wait until it can be on the line."""
        if self._transport is None or self.lost:
            raise self._gone()
        self._transport.write(data)
        await asyncio.sleep(len(data) * self.settings.character_s)

    def rest(self, settings: PortSettings) -> None:
        """Nothing is changed here."""

    def close(self) -> None:
        transport, self._transport = self._transport, None
        if transport is not None:
            self._lost = self._lost or "closed"
            transport.abort()


class _Ear(asyncio.Protocol):
    def __init__(self, wire: TcpWire) -> None:
        self._wire = wire

    def data_received(self, data: bytes) -> None:
        self._wire._take(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._wire._lose(str(exc or "closed by the gateway"))
