"""A TCP line that misbehaves as told: slow, cut, dead without a word, reset, damaged. Told while it runs.

Rules:
1. What goes wrong is one `Faults`, in force for every connection from the next chunk on; `cut` and `reset` act at once.
2. Randomness is seeded: the same seed damages the same bytes of the same stream.
3. Dead means dead: nothing is read, no end of a connection is passed on, new connections are taken and never served.
   (What TCP itself does when packets are lost is `tests/nightly/packet_loss.py`'s.)
4. Every connection is counted with its time: what a test says of reconnects is what the line has seen.

In a test: `async with fault_proxy(port) as line: line.faults.blackhole = True`. For tests without an event loop, and as
a process of its own: `with proxy_process(port) as line: line.set(delay_s=0.2)`, or by hand, one JSON object a line::

    $ python -m tests.fakes.fault_proxy --to 1883 --listen 1884
    {"port": 1884}
    {"set": {"bytes_per_s": 1000}}
    {"do": "reset"}
    {"do": "heal"}
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, Literal

import msgspec

HOST: Final = "127.0.0.1"
_CHUNK: Final = 4096
_HELD_BYTES: Final = 64 * 1024  #: on its way in one direction: a line holds little, the sender must feel it
_LOOK_S: Final = 0.02
_RESET: Final = struct.pack("ii", 1, 0)  #: SO_LINGER of 0 s: close() sends RST (socket(7))


class Faults(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What goes wrong now; the default is a good line."""

    delay_s: float = 0.0  #: each way
    jitter_s: float = 0.0  #: up to so much more; order is kept, it is a stream
    bytes_per_s: float | None = None  #: each connection, each way
    blackhole: bool = False  #: half-open: both ends believe in it
    refuse: bool = False  #: new connections are reset at once, as by a closed port
    cut_after: int | None = None  #: bytes of one connection, both ways together; then it is closed
    reset_after: int | None = None  #: ... then it is reset
    corrupt_every: int | None = None  #: about every so many bytes, one bit is flipped
    duplicate_every: int | None = None  #: about every so many bytes, a piece comes twice: damage, in a stream
    only: Literal["both", "up", "down"] = "both"  #: which way is damaged, slowed or dead


class Seen(msgspec.Struct, kw_only=True):
    """What went over the line so far."""

    connects: int = 0
    open: int = 0
    up_bytes: int = 0  #: from who connects to the server
    down_bytes: int = 0
    damaged: int = 0  #: bits flipped and pieces doubled


class _Connection:
    def __init__(self, near: asyncio.StreamWriter, far: asyncio.StreamWriter) -> None:
        self.near = near
        self.far = far
        self.carried = 0

    def end(self, *, reset: bool) -> None:
        for writer in (self.near, self.far):
            sock = writer.get_extra_info("socket")
            if reset and sock is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort() if reset else writer.close()


class FaultProxy:
    """The line from `port` to a server. `connected_at` are the monotonic times of its connections."""

    def __init__(self, to_port: int, *, to_host: str = HOST, seed: int = 1) -> None:
        self.to_host = to_host
        self.to_port = to_port
        self.port = 0
        self.faults = Faults()
        self.seen = Seen()
        self.connected_at: list[float] = []
        self._rng = random.Random(seed)
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self, port: int = 0) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)  # it takes no more than it carries on
        listener.bind((HOST, port))
        self.port = int(listener.getsockname()[1])
        self._server = await asyncio.start_server(self._serve, sock=listener, limit=_CHUNK, backlog=2048)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        self.reset()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def cut(self) -> None:
        """Close every connection, now, in order."""
        for connection in list(self._connections):
            connection.end(reset=False)

    def reset(self) -> None:
        """Reset every connection, now."""
        for connection in list(self._connections):
            connection.end(reset=True)

    def heal(self) -> None:
        """A good line again; what was held in it goes on."""
        self.faults = Faults()

    # --- within ---

    async def _serve(self, reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # only `stop` cancels
            await self._connection(reader, near)

    async def _connection(self, reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        self.seen.connects += 1
        self.connected_at.append(time.monotonic())
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        far: asyncio.StreamWriter | None = None
        try:
            while self.faults.blackhole:  # noqa: ASYNC110 - until the test says otherwise
                await asyncio.sleep(_LOOK_S)
            if self.faults.refuse:
                _Connection(near, near).end(reset=True)
                return
            onward, far = await asyncio.open_connection(self.to_host, self.to_port)
            connection = _Connection(near, far)
            self._connections.add(connection)
            self.seen.open += 1
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._carry(connection, reader, far, "up"))
                    group.create_task(self._carry(connection, onward, near, "down"))
            finally:
                self._connections.discard(connection)
                self.seen.open -= 1
        except* OSError:
            _Connection(near, far or near).end(reset=True)  # the server is not there, or either end has gone
        finally:
            near.close()
            if far is not None:
                far.close()

    async def _carry(
        self,
        connection: _Connection,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        way: Literal["up", "down"],
    ) -> None:
        """One way of one connection, until its end, which is passed on."""
        held: deque[tuple[float, bytes]] = deque()
        news, room = asyncio.Event(), asyncio.Event()

        async def take() -> None:
            while True:
                data = await source.read(_CHUNK)
                while self._dead(way):  # noqa: ASYNC110 - until the test says otherwise
                    await asyncio.sleep(_LOOK_S)
                faults = self.faults
                late_s = faults.delay_s + self._rng.uniform(0.0, faults.jitter_s) if self._hits(way) else 0.0
                due_s = max(time.monotonic() + late_s, held[-1][0] if held else 0.0)
                held.append((due_s, data))
                news.set()
                if not data:
                    return
                while sum(len(piece) for _, piece in held) >= _HELD_BYTES:
                    room.clear()
                    await room.wait()

        async def give() -> None:
            while True:
                while not held:
                    news.clear()
                    await news.wait()
                due_s, data = held[0]
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                while self._dead(way):  # noqa: ASYNC110 - until the test says otherwise
                    await asyncio.sleep(_LOOK_S)
                held.popleft()
                room.set()
                if not data:
                    sink.write_eof()  # the other way may still have something to say
                    return
                await self._give(connection, sink, data, way)

        async with asyncio.TaskGroup() as group:
            group.create_task(take())
            group.create_task(give())

    async def _give(
        self, connection: _Connection, sink: asyncio.StreamWriter, data: bytes, way: Literal["up", "down"]
    ) -> None:
        faults = self.faults
        if self._hits(way):
            data = self._damaged(data)
            if faults.bytes_per_s is not None:
                await asyncio.sleep(len(data) / faults.bytes_per_s)
        for limit, reset in ((faults.cut_after, False), (faults.reset_after, True)):
            if limit is not None and connection.carried + len(data) >= limit:
                data = data[: max(0, limit - connection.carried)]
                sink.write(data)
                connection.carried += len(data)
                connection.end(reset=reset)
                raise ConnectionAbortedError("the line was cut, as told")
        sink.write(data)
        await sink.drain()
        connection.carried += len(data)
        if way == "up":
            self.seen.up_bytes += len(data)
        else:
            self.seen.down_bytes += len(data)

    def _hits(self, way: Literal["up", "down"]) -> bool:
        return self.faults.only in ("both", way)

    def _dead(self, way: Literal["up", "down"]) -> bool:
        return self.faults.blackhole and self._hits(way)

    def _damaged(self, data: bytes) -> bytes:
        if self._strikes(self.faults.corrupt_every, len(data)):
            damaged = bytearray(data)
            damaged[self._rng.randrange(len(damaged))] ^= 1 << self._rng.randrange(8)
            data = bytes(damaged)
        if self._strikes(self.faults.duplicate_every, len(data)):
            data += data[-self._rng.randrange(1, len(data) + 1) :]
        return data

    def _strikes(self, every: int | None, size: int) -> bool:
        hit = every is not None and self._rng.random() < size / every
        self.seen.damaged += hit
        return hit


@asynccontextmanager
async def fault_proxy(
    to_port: int, *, to_host: str = HOST, port: int = 0, seed: int = 1
) -> AsyncIterator[FaultProxy]:
    """A line to `to_port`, for as long as the block lasts."""
    line = FaultProxy(to_port, to_host=to_host, seed=seed)
    await line.start(port)
    try:
        yield line
    finally:
        await line.stop()


# --- as a process of its own ---


class _Told(msgspec.Struct, forbid_unknown_fields=True):
    set: dict[str, object] = {}
    do: Literal["nothing", "cut", "reset", "heal"] = "nothing"


class _Started(msgspec.Struct):
    port: int


class ProxyProcess:
    """A `FaultProxy` in a process of its own, told over its standard input. It ends with whoever started it."""

    def __init__(self, to_port: int, *, port: int = 0, seed: int = 1) -> None:
        words = ["--to", str(to_port), "--listen", str(port), "--seed", str(seed)]
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.fault_proxy", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).resolve().parents[2],
        )
        self.port = msgspec.json.decode(self._line(), type=_Started).port

    def set(self, **faults: object) -> Seen:
        """Change these, as `Faults` names them; the others stay."""
        return self._say(_Told(set=faults))

    def cut(self) -> Seen:
        return self._say(_Told(do="cut"))

    def reset(self) -> Seen:
        return self._say(_Told(do="reset"))

    def heal(self) -> Seen:
        return self._say(_Told(do="heal"))

    def seen(self) -> Seen:
        return self._say(_Told())

    def close(self) -> None:
        if self._child.stdin is not None:
            self._child.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(5.0)
        self._child.kill()
        self._child.wait()
        if self._child.stdout is not None:
            self._child.stdout.close()

    def _say(self, told: _Told) -> Seen:
        if self._child.stdin is None:
            raise RuntimeError("the proxy has no standard input")
        self._child.stdin.write(msgspec.json.encode(told) + b"\n")
        self._child.stdin.flush()
        return msgspec.json.decode(self._line(), type=Seen)

    def _line(self) -> bytes:
        line = b"" if self._child.stdout is None else self._child.stdout.readline()
        if not line:
            raise RuntimeError(f"the proxy's process ended, with status {self._child.wait()}")
        return line


@contextlib.contextmanager
def proxy_process(to_port: int, *, port: int = 0, seed: int = 1) -> Iterator[ProxyProcess]:
    """A line to `to_port` in a process of its own, for as long as the block lasts."""
    line = ProxyProcess(to_port, port=port, seed=seed)
    try:
        yield line
    finally:
        line.close()


def changed(faults: Faults, changes: dict[str, object]) -> Faults:
    """With these changes. Raises `msgspec.ValidationError` naming what is no fault."""
    return msgspec.convert({**msgspec.to_builtins(faults), **changes}, Faults)


async def _obey(line: FaultProxy) -> None:
    """One JSON object a line, each answered with what was seen so far, until the input ends."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(os.dup(0), "rb"))
    while said := await reader.readline():
        told = msgspec.json.decode(said, type=_Told)
        match told.do:
            case "cut":
                line.cut()
            case "reset":
                line.reset()
            case "heal":
                line.heal()
            case "nothing":
                pass
        line.faults = changed(line.faults, told.set)
        _tell(line.seen)


def _tell(said: Seen | _Started) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(said) + b"\n")
    sys.stdout.buffer.flush()


async def _main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fakes.fault_proxy", description="A line that misbehaves."
    )
    parser.add_argument("--to", type=int, required=True, help="the server's port on this machine")
    parser.add_argument("--listen", type=int, default=0, help="the line's own port; 0: any")
    parser.add_argument("--seed", type=int, default=1)
    told = parser.parse_args(argv)
    async with fault_proxy(told.to, port=told.listen, seed=told.seed) as line:
        _tell(_Started(line.port))
        await _obey(line)


if __name__ == "__main__":
    asyncio.run(_main())
