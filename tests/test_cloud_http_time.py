"""Clients that hold a connection and say little are let go; those that speak are served meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import httpx
import pytest
import uvicorn

from cloud.http_time import TimedRequests
from tests.fakes.cloud_door import until


class Hasty(TimedRequests):
    head_timeout_s = 0.4
    request_timeout_s = 0.8


async def _app(scope: object, receive: Callable[[], object], send: Callable[[object], object]) -> None:
    while (await receive()).get("more_body"):  # type: ignore[misc]  # ASGI's receive
        pass
    await send({"type": "http.response.start", "status": 204, "headers": []})  # type: ignore[misc]
    await send({"type": "http.response.body", "body": b""})  # type: ignore[misc]


@pytest.fixture
async def port(free_port: Callable[[], int]) -> AsyncIterator[int]:
    chosen = free_port()
    config = uvicorn.Config(
        _app, host="127.0.0.1", port=chosen, log_level="critical", lifespan="off", http=Hasty,
        limit_concurrency=60,
    )  # fmt: skip
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve())
    await until(lambda: server.started)
    yield chosen
    server.should_exit = True
    await task


async def _held_s(port: int, pieces: list[bytes], every_s: float = 0.1) -> float:
    """How long the server keeps a client that sends this, piece by piece, and then nothing."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began_s = time.monotonic()
    try:
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(every_s)
        async with asyncio.timeout(10):
            while await reader.read(1000):
                pass
    except OSError:
        pass
    finally:
        writer.close()
    return time.monotonic() - began_s


@pytest.mark.parametrize(
    ("pieces", "most_s"),
    [
        ([], 0.4),
        ([b"GET / HTTP/1.1\r\n"], 0.4),
        ([b"G", b"E", b"T", b" ", b"/", b" ", b"H", b"T"], 0.4),
        ([b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"GET / HT"], 0.6),  # the second request of a connection
        ([b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n", b"x"], 0.9),
        ([b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", *[b"1\r\nx\r\n"] * 6], 0.9),
    ],
)
async def test_a_request_that_does_not_come_to_its_end_is_let_go(
    port: int, pieces: list[bytes], most_s: float
) -> None:
    assert 0.3 <= await _held_s(port, pieces) < most_s + 1.5  # and what a busy machine takes


async def test_two_hundred_silent_clients_hold_the_door_for_no_longer_than_a_head_may_take(port: int) -> None:
    silent = [asyncio.create_task(_held_s(port, [b"GET /"])) for _ in range(200)]
    served = 0
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client, asyncio.timeout(20):
        while served < 5:
            response = await client.get("/")
            served = served + 1 if response.status_code == 204 else 0
            await asyncio.sleep(0.05)
    await asyncio.gather(*silent)


async def test_one_who_speaks_in_time_keeps_the_connection(port: int) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        for _ in range(4):
            assert (await client.post("/", content=b"x" * 100)).status_code == 204
            await asyncio.sleep(0.5)  # longer than a head may take
