"""The line that misbehaves does what it is told, and nothing else: tests rest on it."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator

import pytest

from tests.fakes.cloud_door import until
from tests.fakes.fault_proxy import FaultProxy, fault_proxy, proxy_process


@pytest.fixture
async def line() -> AsyncIterator[FaultProxy]:
    """To a server that sends back what it gets."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(4096):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with fault_proxy(server.sockets[0].getsockname()[1]) as line:
        yield line
    server.close()


async def opened(line: FaultProxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", line.port)


async def said_back(line: FaultProxy, data: bytes) -> bytes:
    reader, writer = await opened(line)
    writer.write(data)
    try:
        return await asyncio.wait_for(reader.readexactly(len(data)), 10)
    finally:
        writer.close()


async def test_a_good_line_carries_every_byte_and_the_end(line: FaultProxy) -> None:
    data = bytes(range(256)) * 4096
    reader, writer = await opened(line)

    async def send() -> None:
        writer.write(data)
        await writer.drain()
        writer.write_eof()

    sending = asyncio.create_task(send())
    assert await asyncio.wait_for(reader.read(-1), 30) == data
    await sending
    writer.close()
    await until(lambda: line.seen.open == 0)
    assert line.seen.up_bytes == line.seen.down_bytes == len(data)
    assert line.seen.connects == len(line.connected_at) == 1


async def test_a_delay_is_a_delay_and_no_throttle(line: FaultProxy) -> None:
    line.faults.delay_s = 0.2
    started_s = time.monotonic()
    assert len(await said_back(line, b"x" * 60_000)) == 60_000
    assert 0.4 <= time.monotonic() - started_s < 4.0  # one chunk after the other would take 6 s


async def test_a_slow_line_drips(line: FaultProxy) -> None:
    line.faults.bytes_per_s, line.faults.only = 10_000, "up"
    started_s = time.monotonic()
    await said_back(line, b"x" * 5_000)
    assert time.monotonic() - started_s >= 0.5


async def test_a_dead_line_carries_nothing_and_says_nothing_and_goes_on_when_it_heals(
    line: FaultProxy,
) -> None:
    reader, writer = await opened(line)
    writer.write(b"before")
    assert await reader.readexactly(6) == b"before"
    line.faults.blackhole = True
    writer.write(b"during")
    stranger, other = await opened(line)
    other.write(b"hello")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), 0.3)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(stranger.read(1), 0.1)
    line.heal()
    assert await asyncio.wait_for(reader.readexactly(6), 10) == b"during"
    assert await asyncio.wait_for(stranger.readexactly(5), 10) == b"hello"
    writer.close()
    other.close()


async def test_a_cut_ends_in_order_and_a_reset_does_not(line: FaultProxy) -> None:
    reader, writer = await opened(line)
    await until(lambda: line.seen.open == 1)
    line.cut()
    assert await asyncio.wait_for(reader.read(1), 10) == b""
    writer.close()
    reader, writer = await opened(line)
    await until(lambda: line.seen.open == 1)
    line.reset()
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(1), 10)
    writer.close()


async def test_it_is_cut_after_exactly_so_many_bytes(line: FaultProxy) -> None:
    line.faults.cut_after, line.faults.only = 1000, "up"
    reader, writer = await opened(line)
    writer.write(b"x" * 5000)
    with pytest.raises(asyncio.IncompleteReadError):
        await asyncio.wait_for(reader.readexactly(5000), 10)
    writer.close()


async def test_a_refused_connection_is_reset(line: FaultProxy) -> None:
    line.faults.refuse = True
    with pytest.raises(OSError, match="reset"):
        await said_back(line, b"x")
    line.heal()
    assert await said_back(line, b"x") == b"x"


async def test_damage_is_seeded_and_counted(line: FaultProxy) -> None:
    line.faults.corrupt_every, line.faults.only = 1, "up"
    data = bytes(1000)
    said = await said_back(line, data)
    assert sum((a ^ b).bit_count() for a, b in zip(said, data, strict=True)) == line.seen.damaged == 1
    line.heal()
    line.faults.duplicate_every, line.faults.only = 1, "down"
    reader, writer = await opened(line)
    writer.write(b"abc")
    assert len(await asyncio.wait_for(reader.readexactly(4), 10)) == 4  # and more than was sent
    writer.close()


def test_it_runs_as_a_process_of_its_own() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, proxy_process(server.getsockname()[1]) as line:
        near = socket.create_connection(("127.0.0.1", line.port), timeout=10)
        far, _ = server.accept()
        line.set(delay_s=0.3)
        near.sendall(b"hello")
        started_s = time.monotonic()
        assert far.recv(5) == b"hello"
        assert time.monotonic() - started_s >= 0.25
        assert line.reset().connects == 1
        with pytest.raises(ConnectionResetError):
            near.recv(1)
        line.heal()
        near.close()
        far.close()
