"""The other end of `agent.isolation`: one driver, alone in its process, told what to do over a socket.

Started by the agent with the socket's descriptor and the agent's process id; all else comes over the socket. It leaves
when the socket ends, and is killed by the kernel with the agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator
from typing import Any, Final

import msgspec

from agent.isolation import (
    LENGTH,
    MOST_BYTES,
    Ask,
    Cancel,
    Close,
    Connect,
    Done,
    Listen,
    Memory,
    Read,
    Recall,
    Scanned,
    Setup,
    Write,
    decode_in_child,
    encode,
    failure_of,
)
from drivers.contract import ConfigError, Driver, PushDriver, Scan
from drivers.registry import AnyDriver, build

_PR_SET_PDEATHSIG: Final = 1  #: linux/prctl.h
_REMEMBER_EVERY_S: Final = 5.0
_CLOSE_S: Final = 1.0


def main() -> None:
    """`python -P -c ... DESCRIPTOR AGENT_PID`."""
    descriptor, agent = int(sys.argv[1]), int(sys.argv[2])
    with contextlib.suppress(OSError, AttributeError):  # without it, the socket's end is what ends us
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != agent:
        return  # it died before the kernel was told
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the agent; it closes us in order
    asyncio.run(_Child(socket.socket(fileno=descriptor)).run())


class _Child:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._driver: AnyDriver | None = None
        self._broken: Exception | None = None  #: why there is none
        self._calls: dict[int, asyncio.Task[msgspec.Struct]] = {}
        self._answering: set[asyncio.Task[None]] = set()
        self._speaking = asyncio.Lock()
        self._remembered_s = -_REMEMBER_EVERY_S
        self._places: dict[str, int] = {}

    async def run(self) -> None:
        reader, self._writer = await asyncio.open_unix_connection(sock=self._connection)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                (size,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
                if size > MOST_BYTES:
                    break
                message = decode_in_child(await reader.readexactly(size))
                match message:
                    case Setup():
                        self._set_up(message)
                        await self._say(Done(0))
                    case Recall():
                        if self._driver is not None:
                            self._driver.recall(message.memory)
                    case Cancel():
                        task = self._calls.get(message.id)
                        if task is not None:
                            task.cancel()
                    case Close():
                        await self._close(message.id)
                        return
                    case _:
                        work = self._calls[message.id] = asyncio.create_task(self._done(message))
                        answering = asyncio.create_task(self._answer(message.id, work))
                        self._answering.add(answering)
                        answering.add_done_callback(self._answering.discard)
        await self._let_go()

    def _set_up(self, setup: Setup) -> None:
        from agent.log import start_logging

        start_logging(setup.log_level if setup.log_level in ("debug", "info", "error") else "warning")
        try:
            self._driver = build(setup.name, setup.driver, setup.options, setup.points)
            self._places = {point.name: i for i, point in enumerate(self._driver.points)}
        except Exception as err:  # noqa: BLE001 - told with the first call, whatever it is
            self._broken = err

    async def _answer(self, call: int, work: asyncio.Task[msgspec.Struct]) -> None:
        """One last word for each call, also for one that was cancelled before it began."""
        await asyncio.wait([work])
        del self._calls[call]
        if work.cancelled():
            answer: msgspec.Struct = failure_of(call, asyncio.CancelledError("cancelled"))
        else:
            error = work.exception()
            answer = work.result() if error is None else failure_of(call, error)
        with contextlib.suppress(OSError):  # the agent is gone; `run` ends
            await self._remember(force=False)
            await self._say(answer)

    async def _done(self, call: Connect | Read | Write | Listen | Ask) -> msgspec.Struct:
        driver = self._driver
        if driver is None:
            raise self._broken or ConfigError("not set up")
        match call:
            case Connect():
                await driver.connect()
            case Read() if isinstance(driver, Driver):
                own = driver.points
                asked = own if call.points is None else tuple(own[i] for i in call.points)
                scan = await driver.read(asked)
                if scan.points is not asked and tuple(scan.points) != asked:
                    raise ValueError(
                        f"asked for {len(asked)} points, given a scan of {len(scan.points)} others"
                    )
                return self._scanned(call.id, scan, 0, asked=True)
            case Write() if isinstance(driver, Driver):
                await driver.write(driver.points[call.point], call.value)
            case Listen() if isinstance(driver, PushDriver):
                await self._listen(call.id, driver)
            case Ask():
                return Done(call.id, msgspec.Raw(encode(await _asked(call))))
            case _:
                raise TypeError(f"{type(call).__name__} is nothing that a {type(driver).__name__} can do")
        return Done(call.id)

    async def _listen(self, call: int, driver: PushDriver[Any, Any]) -> None:
        scans = driver.scans()
        try:
            async for scan in scans:
                await self._say(self._scanned(call, scan, driver.overruns, asked=False))
                await self._remember(force=False)
        finally:
            if isinstance(scans, AsyncGenerator):
                await scans.aclose()
        raise RuntimeError("its driver stopped giving scans without saying why")

    def _scanned(self, call: int, scan: Scan, overruns: int, *, asked: bool) -> Scanned:
        points = None if asked else [self._places[point.name] for point in scan.points]
        return Scanned(call, scan.taken_at_ns, list(scan.values), dict(scan.reasons), points, overruns)

    async def _remember(self, *, force: bool) -> None:
        now_s = time.monotonic()
        if self._driver is None or (not force and now_s - self._remembered_s < _REMEMBER_EVERY_S):
            return
        self._remembered_s = now_s
        with contextlib.suppress(Exception):  # it can learn again
            memory = self._driver.remembered()
            if memory is not None:
                await self._say(Memory(memory))

    async def _close(self, call: int) -> None:
        with contextlib.suppress(OSError):
            await self._remember(force=True)
            await self._let_go()
            await self._say(Done(call))
        self._writer.close()

    async def _let_go(self) -> None:
        for task in self._calls.values():
            task.cancel()
        if self._answering:
            await asyncio.wait(list(self._answering), timeout=_CLOSE_S / 2)
        if self._driver is not None:
            with contextlib.suppress(Exception):  # the process ends, and with it whatever is held
                async with asyncio.timeout(_CLOSE_S / 2):
                    await self._driver.close()

    async def _say(self, message: msgspec.Struct) -> None:
        data = encode(message)
        async with self._speaking:
            self._writer.write(LENGTH.pack(len(data)) + data)
            await self._writer.drain()


async def _asked(call: Ask) -> Any:
    from drivers.modbus_line import Request, line_of

    series = [msgspec.msgpack.decode(raw, type=Request) for raw in call.series]
    line = line_of(call.address, "technician")
    try:
        await line.open(call.connect_timeout_s)
        return await line.exchange(series, force=True)
    finally:
        line.release("technician")
