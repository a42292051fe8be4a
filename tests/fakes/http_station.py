"""A web server on loopback that does what a test says, byte by byte where need be, and remembers what it was asked."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable

import h11
import msgspec


class Asked(msgspec.Struct, frozen=True):
    """One request."""

    path: str
    headers: dict[str, str]
    at_s: float


class Reply(msgspec.Struct, frozen=True):
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = {}
    chunks: Callable[[], AsyncIterator[bytes]] | None = None  #: instead of `body`; sent chunked


class Station:
    """`reply` answers every path but those in `paths`."""

    def __init__(self) -> None:
        self.reply: Callable[[Asked], Reply] = lambda asked: Reply(b"{}")
        self.paths: dict[str, Callable[[Asked], Reply]] = {}
        self.asked: list[Asked] = []
        self.sent_bytes = 0
        self.silent = False
        self.port = 0
        self.tls: ssl.SSLContext | None = None
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._new = asyncio.Condition()

    async def plug(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def unplug(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def url(self, path: str = "/", host: str = "127.0.0.1") -> str:
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{path}"

    async def was_asked(self, times: int, limit_s: float = 20.0) -> None:
        async with asyncio.timeout(limit_s), self._new:
            await self._new.wait_for(lambda: len(self.asked) >= times)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(OSError, asyncio.CancelledError, h11.ProtocolError):
            while await self._once(reader, writer):
                pass
        writer.transport.abort()

    async def _once(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        connection = h11.Connection(h11.SERVER)
        asked: Asked | None = None
        while asked is None or connection.their_state is not h11.DONE:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                data = await reader.read(65_536)
                if not data:
                    return False
                connection.receive_data(data)
            elif isinstance(event, h11.Request):
                headers = {key.decode().lower(): value.decode() for key, value in event.headers}
                asked = Asked(event.target.decode(), headers, asyncio.get_running_loop().time())
            elif isinstance(event, h11.ConnectionClosed):
                return False
        async with self._new:
            self.asked.append(asked)
            self._new.notify_all()
        if self.silent:
            await asyncio.sleep(3600)
        reply = self.paths.get(asked.path, self.reply)(asked)
        told = (
            {"Content-Length": str(len(reply.body))}
            if reply.chunks is None
            else {"Transfer-Encoding": "chunked"}
        )
        if reply.status == 304:
            told = {}
        head = "".join(f"{key}: {value}\r\n" for key, value in {**told, **reply.headers}.items())
        writer.write(f"HTTP/1.1 {reply.status} X\r\n{head}\r\n".encode())
        if reply.chunks is None:
            await self._send(writer, reply.body)
            return True
        async for chunk in reply.chunks():
            await self._send(writer, b"%x\r\n%s\r\n" % (len(chunk), chunk))
        await self._send(writer, b"0\r\n\r\n")
        return True

    async def _send(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(data)
        await writer.drain()
        self.sent_bytes += len(data)


@contextlib.asynccontextmanager
async def station(tls: ssl.SSLContext | None = None) -> AsyncIterator[Station]:
    made = Station()
    made.tls = tls
    await made.plug()
    try:
        yield made
    finally:
        await made.unplug()
