"""Modbus devices to test against: pymodbus' own server on TCP, on RTU over TCP and on a pty, and a bad slave.

`python tests/fakes/modbus_peer.py PORT` serves TCP in a process of its own (the benchmarks use it).
"""

from __future__ import annotations

import asyncio
import os
import pty
import struct
import sys
import tty
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Self

from pymodbus.constants import ExcCodes
from pymodbus.framer import FramerType
from pymodbus.pdu import ModbusPDU
from pymodbus.server import ModbusSerialServer, ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice

Judge = Callable[[int, int, int], ExcCodes | None]
"""Function code, first address, count: the exception to answer with, or None to serve it."""


@dataclass
class Unit:
    """One unit's tables. Registers keep changing as the test assigns to them."""

    holding: list[int] = field(default_factory=lambda: [0])
    input: list[int] = field(default_factory=lambda: [0])
    coils: list[bool] = field(default_factory=lambda: [False])
    discrete: list[bool] = field(default_factory=lambda: [False])
    judge: Judge | None = None


@dataclass
class Peer:
    """A running server. `asked` is every request as (unit, function, address, count)."""

    port: int = 0
    path: str = ""
    asked: list[tuple[int, int, int, int]] = field(default_factory=list)
    written: list[tuple[int, int, list[int]]] = field(default_factory=list)


def _device(unit: int, tables: Unit) -> SimDevice:
    async def action(
        function: int,
        start: int,
        address: int,
        count: int,
        registers: list[int],
        values: list[int] | list[bool] | None,
    ) -> ExcCodes | None:
        if tables.judge is not None and (refused := tables.judge(function, address, count)):
            return refused
        if values is not None and function in (6, 16):
            tables.holding[address : address + count] = [int(value) for value in values]
        live = {3: tables.holding, 4: tables.input}.get(function)
        if live is not None:
            registers[: len(live)] = live
        return None

    return SimDevice(
        unit,
        (
            [SimData(0, values=list(tables.coils), datatype=DataType.BITS)],
            [SimData(0, values=list(tables.discrete), datatype=DataType.BITS)],
            [SimData(0, values=list(tables.holding), datatype=DataType.REGISTERS)],
            [SimData(0, values=list(tables.input), datatype=DataType.REGISTERS)],
        ),
        action=action,
    )


def _noting(peer: Peer) -> Callable[[bool, ModbusPDU], ModbusPDU]:
    def note(sending: bool, pdu: ModbusPDU) -> ModbusPDU:
        if not sending:
            peer.asked.append((pdu.dev_id, pdu.function_code, pdu.address, pdu.count))
            if pdu.function_code in (5, 6, 15, 16):
                peer.written.append((pdu.function_code, pdu.address, list(pdu.registers)))
        return pdu

    return note


@asynccontextmanager
async def tcp_peer(units: dict[int, Unit], *, rtu: bool = False, port: int = 0) -> AsyncIterator[Peer]:
    """A Modbus TCP server on loopback (or RTU over TCP) on a free port."""
    peer = Peer()
    server = ModbusTcpServer(
        [_device(unit, tables) for unit, tables in units.items()],
        framer=FramerType.RTU if rtu else FramerType.SOCKET,
        address=("127.0.0.1", port),
        trace_pdu=_noting(peer),
    )
    await server.listen()
    peer.port = server.transport.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    try:
        yield peer
    finally:
        await server.shutdown()  # type: ignore[no-untyped-call]


@asynccontextmanager
async def pty_pair() -> AsyncIterator[tuple[str, str]]:
    """Two serial ports joined by a wire."""
    loop = asyncio.get_running_loop()
    ends = [pty.openpty(), pty.openpty()]
    masters = [master for master, _ in ends]
    for master, slave in ends:
        tty.setraw(master)
        tty.setraw(slave)

    def carry(source: int, target: int) -> None:
        try:
            os.write(target, os.read(source, 4096))
        except OSError:
            loop.remove_reader(source)

    for source, target in (masters, masters[::-1]):
        loop.add_reader(source, carry, source, target)
    try:
        yield os.ttyname(ends[0][1]), os.ttyname(ends[1][1])
    finally:
        for master, slave in ends:
            loop.remove_reader(master)
            os.close(master)
            os.close(slave)


@asynccontextmanager
async def rtu_peer(units: dict[int, Unit], *, baud: int = 115200) -> AsyncIterator[Peer]:
    """A Modbus RTU server on a pty; `path` is the other end."""
    async with pty_pair() as (ours, theirs):
        peer = Peer(path=ours)

        def own_only(sending: bool, data: bytes) -> bytes:
            # On a serial line nobody answers for a unit that is not there; pymodbus' server would.
            return data if sending or (data and data[0] in units) else b""

        server = ModbusSerialServer(
            [_device(unit, tables) for unit, tables in units.items()],
            framer=FramerType.RTU,
            port=theirs,
            baudrate=baud,
            trace_packet=own_only,
            trace_pdu=_noting(peer),
        )
        await server.listen()
        try:
            yield peer
        finally:
            await server.shutdown()  # type: ignore[no-untyped-call]


def crc16(data: bytes) -> bytes:
    """The RTU check, from its definition (Modbus over serial line 1.02, 6.2.2), apart from the code under test."""
    crc = 0xFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ 0xA001 if crc & 1 else crc >> 1
    return struct.pack("<H", crc)


def framed(body: bytes) -> bytes:
    return body + crc16(body)


class ScriptedSlave:
    """An RTU slave on a pty that does, for each request, what the script says next ('ok' when it is empty).

    ok · none · late · crc · noise · noise_inside · truncated · other_unit · other_function · exception · busy ·
    bytewise · echo · double
    """

    def __init__(self, registers: dict[int, int], *, late_s: float) -> None:
        self.registers = registers
        self.script: list[str] = []
        self.late_s = late_s
        self.requests = 0
        self.asked_at_s: list[float] = []  #: loop time of each request
        self._loop = asyncio.get_running_loop()
        self._buffer = b""
        self._master, self._slave = pty.openpty()
        tty.setraw(self._master)
        tty.setraw(self._slave)
        self.path = os.ttyname(self._slave)
        self._loop.add_reader(self._master, self._readable)

    def close(self) -> None:
        if self._master < 0:
            return
        self._loop.remove_reader(self._master)
        os.close(self._master)
        os.close(self._slave)
        self._master = -1

    def _readable(self) -> None:
        try:
            self._buffer += os.read(self._master, 1024)
        except OSError:
            self._loop.remove_reader(self._master)
            return
        while len(self._buffer) >= 8:
            request, self._buffer = self._buffer[:8], self._buffer[8:]
            self.requests += 1
            self.asked_at_s.append(self._loop.time())
            self._answer(request, self.script.pop(0) if self.script else "ok")

    def _answer(self, request: bytes, how: str) -> None:
        unit, function, address, count = struct.unpack(">BBHH", request[:6])
        data = b"".join(struct.pack(">H", self.registers.get(address + i, 0)) for i in range(count))
        body = bytes([unit, function, len(data)]) + data
        right = framed(body)
        match how:
            case "ok":
                self._write(right)
            case "none":
                pass
            case "late":
                self._loop.call_later(self.late_s, self._write, right)
            case "crc":
                self._write(right[:-1] + bytes([right[-1] ^ 0xFF]))
            case "noise":
                self._write(b"\xff\x00\x13" + right)
            case "noise_inside":
                self._write(right[:4] + b"\x55" + right[4:])
            case "truncated":
                self._write(right[:4])
            case "other_unit":
                self._write(framed(bytes([unit + 1]) + body[1:]))
            case "other_function":
                self._write(framed(bytes([unit, function ^ 7]) + body[2:]))
            case "exception":
                self._write(framed(bytes([unit, function | 0x80, 4])))
            case "busy":
                self._write(framed(bytes([unit, function | 0x80, 6])))
            case "bytewise":
                for i, byte in enumerate(right):
                    self._loop.call_later(0.001 * i, self._write, bytes([byte]))
            case "echo":
                self._write(request + right)
            case "double":
                self._write(right + right)
            case _:
                raise AssertionError(how)

    def _write(self, data: bytes) -> None:
        if self._master >= 0:
            os.write(self._master, data)


class ScriptedTcp:
    """A Modbus TCP server that does, for each request, what the script says next ('ok' when it is empty).

    ok · none · late · stale · other_unit · other_function · short_count · busy · gateway · split · garbage · close ·
    truncated

    Register n holds n. `async with` serves it; `connections` counts who came.
    """

    def __init__(self, *, late_s: float = 0.0) -> None:
        self.script: list[str] = []
        self.late_s = late_s
        self.requests = 0
        self.connections = 0
        self.port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        try:
            while True:
                head = await reader.readexactly(7)
                pdu = await reader.readexactly(struct.unpack(">H", head[4:6])[0] - 1)
                self.requests += 1
                await self._answer(
                    writer, head[:2], head[6], pdu, self.script.pop(0) if self.script else "ok"
                )
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(
        self, writer: asyncio.StreamWriter, tid: bytes, unit: int, pdu: bytes, how: str
    ) -> None:
        address, count = struct.unpack(">HH", pdu[1:5])
        data = b"".join(struct.pack(">H", (address + i) & 0xFFFF) for i in range(count))
        body = bytes([pdu[0], len(data)]) + data

        def frame(body: bytes, tid: bytes = tid, unit: int = unit) -> bytes:
            return tid + struct.pack(">HHB", 0, len(body) + 1, unit) + body

        right = frame(body)
        match how:
            case "ok":
                writer.write(right)
            case "none":
                pass
            case "late":
                asyncio.get_running_loop().call_later(self.late_s, writer.write, right)
            case "stale":
                before = struct.pack(">H", (struct.unpack(">H", tid)[0] - 1) & 0xFFFF)
                writer.write(frame(bytes([pdu[0], len(data)]) + b"\xee" * len(data), tid=before) + right)
            case "other_unit":
                writer.write(frame(body, unit=unit + 1))
            case "other_function":
                writer.write(frame(bytes([pdu[0] ^ 7]) + body[1:]))
            case "short_count":
                writer.write(frame(bytes([pdu[0], len(data) - 2]) + data[2:]))
            case "busy":
                writer.write(frame(bytes([pdu[0] | 0x80, 6])))
            case "gateway":
                writer.write(frame(bytes([pdu[0] | 0x80, 11])))
            case "split":
                for byte in right:
                    writer.write(bytes([byte]))
                    await asyncio.sleep(0.001)
            case "garbage":
                writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            case "truncated":
                writer.write(right[:-3])
            case "close":
                writer.close()
            case _:
                raise AssertionError(how)


async def _serve(port: int, registers: Sequence[int]) -> None:
    async with tcp_peer({1: Unit(holding=list(registers), input=list(registers))}, port=port) as peer:
        print(peer.port, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), range(1000)))
