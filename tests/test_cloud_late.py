"""Late readings: older than a sink keeps anything is counted, and in the archive; what is wrong shows, and clears."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx
import pytest

from cloud.dead_letters import DeadLetters
from cloud.journal.contract import Entry
from cloud.journal.sqlite import SqliteJournal
from cloud.runner import SinkRunner
from cloud.server import CloudServer
from cloud.sinks.embedded import EmbeddedSink
from config.cloud import Archive, Cloud, InfluxDB, Server, conflicts
from config.cloud import JournalSettings as Journal
from drivers.contract import Scan
from sync.wire import ClockRow, encode_scan, seal
from tests.fakes.batches import EPOCH, GATEWAY, PACKING, POINTS
from tests.servers.process import free_port

DAY_NS = 86_400 * 10**9


def taken(first: int, age_days: float) -> Entry:
    at_ns = time.time_ns() - round(age_days * DAY_NS)
    frame = encode_scan(PACKING, Scan(1, POINTS, [1] * len(POINTS)), 1)
    clock = ClockRow(1, "boot", 1, at_ns, True)
    sealed = seal(GATEWAY, EPOCH, first, [frame], [PACKING.layout], [clock], len(POINTS))
    return Entry(GATEWAY, EPOCH, first, first, len(POINTS), time.time_ns(), sealed.payload)


@pytest.mark.parametrize("archived", [True, False])
async def test_what_is_too_old_for_a_sink_is_expired_where_an_archive_has_it_and_else_a_dead_letter(
    tmp_path: Path, archived: bool
) -> None:
    journal, letters = SqliteJournal(tmp_path / "journal.db"), DeadLetters(tmp_path / "dead_letters.db")
    await journal.open()
    await letters.open()
    # Out of order, 30 days and more: every one is taken, but for those beyond the retention of 31.
    ages = (0.0, 40.0, 29.9, 30.0, 35.0, 1.0)
    await journal.append([taken(n, age) for n, age in enumerate(ages, 1)])
    sink = EmbeddedSink(tmp_path, retention_days=31.0)
    runner = SinkRunner(sink, journal, letters, archived=archived)
    task = asyncio.create_task(runner.run())
    assert await runner.drain(20.0)
    await task
    state = await runner.state()
    assert state.accepted_readings == 4 * len(POINTS)
    expired = 2 * len(POINTS)
    assert (await letters.state()).letters == (0 if archived else 2)
    assert await journal.expired("embedded") == ({GATEWAY: expired} if archived else {})
    assert state.expired_readings == (expired if archived else 0)
    await letters.close()
    await journal.close()


async def test_a_store_that_is_down_shows_as_its_code_at_once_and_goes_with_its_cause(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text("a-token-that-is-long-enough")
    port = free_port()
    server = CloudServer(
        Cloud(
            server=Server(data_dir=str(tmp_path / "data"), port=free_port(), drain_s=1.0),
            archive=Archive(enabled=False),
            influxdb=InfluxDB(url=f"http://127.0.0.1:{port}", org="acme", token_file=str(token)),
        )
    )
    task = asyncio.create_task(server.run())
    await server.started.wait()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.address[1]}", timeout=20) as client:
        async with asyncio.timeout(30):
            while not (found := (await client.get("/readyz")).json()["problems"]):  # noqa: ASYNC110 - over HTTP
                await asyncio.sleep(0.1)
        assert found[0]["code"] == "sink_down:influxdb"
        assert found[0]["grave"]
        assert 'headgate_problem{code="sink_down:influxdb"} 1.0' in (await client.get("/metrics")).text

        async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            """It is back, and has another trouble: the token."""
            await reader.readuntil(b"\r\n\r\n")
            body = b'{"code":"unauthorized","message":"unauthorized access"}'
            writer.write(
                b"HTTP/1.1 401 Unauthorized\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
            )
            writer.write(body)
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(answers, "127.0.0.1", port), asyncio.timeout(60):
            codes: list[str] = []
            while codes != ["sink_refusing:influxdb"]:
                await asyncio.sleep(0.1)
                codes = [p["code"] for p in (await client.get("/readyz")).json()["problems"]]
    server.stop()
    await task


def test_a_required_sink_must_be_enabled_and_there_must_be_one() -> None:
    (wrong,) = conflicts(Cloud(journal=Journal(required_sinks=["mysql"])))
    assert wrong.path == "journal.required_sinks"
    assert "mysql is not enabled here" in wrong.text
    (wrong,) = conflicts(Cloud(journal=Journal(required_sinks=[])))
    assert "is empty" in wrong.text
    assert conflicts(Cloud(journal=Journal(required_sinks=["archive"]))) == []
