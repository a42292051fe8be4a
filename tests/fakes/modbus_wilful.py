"""A Modbus TCP device that does as its judge says, request by request: where a real server would not misbehave so."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Literal, Self, TypeAlias

Whim: TypeAlias = int | Literal["silent", "deaf", "hangup"] | None
"""An exception code; no answer, nothing done; done, and no answer; done, and the connection closed; as it should."""


_MOST_ASKED = 10_000  #: are noted


class WilfulTcp:
    """Holding registers alone (functions 3, 6, 16, 22); `asked` is every request as (function, address, count)."""

    def __init__(self, registers: list[int], judge: Callable[[int, int, int], Whim] | None = None) -> None:
        self.registers = registers
        self.judge = judge
        self.asked: list[tuple[int, int, int]] = []
        self.port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def written(self) -> list[tuple[int, int, int]]:
        return [asked for asked in self.asked if asked[0] != 3]

    async def __aenter__(self) -> Self:
        await self.plug()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.unplug()

    async def plug(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def unplug(self) -> None:
        """The connections are cut, and new ones refused."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while True:
                head = await reader.readexactly(7)
                pdu = await reader.readexactly(struct.unpack(">H", head[4:6])[0] - 1)
                answer = self._answer(pdu)
                if answer is None:
                    writer.close()
                    return
                if answer:
                    writer.write(head[:2] + struct.pack(">HHB", 0, len(answer) + 1, head[6]) + answer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    def _answer(self, pdu: bytes) -> bytes | None:
        function, address = pdu[0], struct.unpack(">H", pdu[1:3])[0]
        count = struct.unpack(">H", pdu[3:5])[0] if function in (3, 16) else 1
        if len(self.asked) < _MOST_ASKED:
            self.asked.append((function, address, count))
        whim = self.judge(function, address, count) if self.judge else None
        if isinstance(whim, int):
            return bytes([function | 0x80, whim])
        if whim == "silent":
            return b""
        held = self.registers
        if function == 3:
            data = struct.pack(f">{count}H", *held[address : address + count])
            answer = bytes([3, len(data)]) + data
        elif function == 16:
            held[address : address + count] = struct.unpack(f">{count}H", pdu[6:])
            answer = pdu[:5]
        else:
            value, last = struct.unpack(">HH", (pdu + b"\0\0")[3:7])
            held[address] = value if function == 6 else held[address] & value | last & ~value
            answer = pdu
        return None if whim == "hangup" else b"" if whim == "deaf" else answer
