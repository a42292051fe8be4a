"""The hourly account, on a real server with its embedded store and archive."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path

import httpx
import pytest

from cloud import server as server_module
from cloud.accounting import Accounting
from cloud.api.models import FrameAccount, SinkAccount, Verdict
from cloud.registry import GapTally
from cloud.server import CloudServer
from config.cloud import Archive, Cloud, Gateway, Limits, Server
from drivers.contract import Scan
from sync.wire import ClockRow, encode_scan, seal
from tests.fakes.batches import EPOCH, GATEWAY, PACKING, POINTS, batch
from tests.servers.process import free_port

PLANT = '{gateway="plant-1",tenant="acme"}'
TOKEN = "a-token-that-is-long-enough"


class Asked:
    """A running server's metrics."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client

    async def metrics(self) -> dict[str, float]:
        answer = await self.client.get("/metrics")
        lines = (line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in lines}

    async def until(self, said: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        async with asyncio.timeout(40):
            while not said(found := await self.metrics()):  # noqa: ASYNC110 - asked over HTTP
                await asyncio.sleep(0.1)
        return found


def of(name: str, sink: str) -> str:
    return f'headgate_account_{name}{{gateway="plant-1",sink="{sink}",tenant="acme"}}'


@asynccontextmanager
async def serving(folder: Path, *, limits: Limits | None = None) -> AsyncIterator[Asked]:
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(TOKEN)
    server = CloudServer(
        Cloud(
            server=Server(data_dir=str(folder / "data"), port=free_port(), drain_s=5.0),
            gateway=[Gateway(tenant="acme", name="plant-1", token_file=str(token))],
            archive=Archive(commit_interval_s=0.2),
            limits=limits or Limits(),
        )
    )
    task = asyncio.create_task(server.run())
    await asyncio.wait(
        [asyncio.create_task(server.started.wait()), task], return_when=asyncio.FIRST_COMPLETED
    )
    headers = {"Headgate-Gateway": GATEWAY, "Authorization": f"Bearer {TOKEN}"}
    url = f"http://127.0.0.1:{server.address[1]}"
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=20) as client:
        yield Asked(client)
    server.stop()
    await task


async def test_a_row_that_goes_from_a_store_is_missing_at_the_next_account_and_a_warning_names_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "ACCOUNT_FIRST_S", 0.1)
    monkeypatch.setattr(server_module, "ACCOUNT_INTERVAL_S", 0.3)
    async with serving(tmp_path) as asked:
        for payload in (batch(1), batch(4), batch(4)):  # one of them twice
            await asked.client.post("/v1/ingest", content=payload)
        stored = [of("stored", sink) for sink in ("embedded", "archive")]
        found = await asked.until(lambda m: all(m.get(name) == 48 for name in stored))
        assert found["headgate_account_ok"] == 1
        assert found["headgate_account_checked_timestamp_seconds"] > 1.7e9
        assert found[f"headgate_account_received_frames{PLANT}"] == 9
        assert found[f"headgate_account_duplicate_frames{PLANT}"] == 3
        for sink in ("embedded", "archive"):
            told = {name: found[of(name, sink)] for name in ("journaled", "dead", "missing", "doubled")}
            assert told == {"journaled": 48, "dead": 0, "missing": 0, "doubled": 0}
        assert not any("does not balance" in r.getMessage() for r in caplog.records)
        with closing(sqlite3.connect(tmp_path / "data/readings.sqlite", timeout=20)) as db, db:
            assert db.execute("DELETE FROM readings WHERE seq = 2 AND point_id = 1").rowcount == 1
        found = await asked.until(lambda m: m["headgate_account_ok"] == 0)
        assert found[of("missing", "embedded")] == 1
        assert found[of("stored", "embedded")] == 47
        assert found[of("missing", "archive")] == 0
    warned = [r for r in caplog.records if "does not balance" in r.getMessage()]
    assert {r.levelno for r in warned} == {logging.WARNING}
    assert "account of acme/plant-1 in sink embedded does not balance" in warned[0].getMessage()
    assert "1 missing" in warned[0].getMessage()


async def test_too_many_new_series_and_a_clock_that_runs_ahead_are_told_by_gateway(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tmp_path, limits=Limits(new_series_per_hour=5, skew_alarm_s=60.0)) as asked:
        await asked.client.post("/v1/ingest", content=batch(1))
        # Three scans, of which each of two sinks refuses three points of eight; the boot clock alone says no time.
        found = await asked.until(lambda m: m.get(f"headgate_new_series_refused_total{PLANT}") == 18)
        assert f"headgate_clock_skewed_batches_total{PLANT}" not in found
        ahead = ClockRow(2, "boot", 0, time.time_ns() + 120 * 10**9, True)
        frame = encode_scan(PACKING, Scan(1, POINTS, [1] * 8), 2)
        sealed = seal(GATEWAY, EPOCH, 4, [frame], [PACKING.layout], [ahead], 8)
        await asked.client.post("/v1/ingest", content=sealed.payload)
        found = await asked.until(lambda m: m.get(f"headgate_new_series_refused_total{PLANT}") == 24)
        assert found[f"headgate_clock_skewed_batches_total{PLANT}"] == 1
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert (
        sum("more than 5 new series in an hour" in text and "gateway acme/plant-1" in text for text in warned)
        == 1
    )
    assert sum("its clock is ahead" in text for text in warned) == 1


class Ledger:
    """Says what it is told to."""

    def __init__(self) -> None:
        self.next = Verdict(True, [], [], [])

    async def gap_tally(self) -> list[GapTally]:
        return []

    async def settle_missed(self, rows: Sequence[SinkAccount]) -> None:
        pass

    async def verify(self) -> Verdict:
        return self.next


async def test_a_sink_that_cannot_be_asked_keeps_its_last_account_and_is_counted() -> None:
    def row(sink: str, stored: int) -> SinkAccount:
        return SinkAccount(GATEWAY, sink, stored, stored, 0, 0, 0, 0, 0, 0, True)

    ledger = Ledger()
    accounting = Accounting(ledger, clock_s=lambda: 1234.5)
    frames = [FrameAccount(GATEWAY, 3, 0, 3)]
    ledger.next = Verdict(True, frames, [row("embedded", 8), row("mysql", 8)], [])
    await accounting.check()
    assert (accounting.last.ok, accounting.last.unasked, accounting.last.checked_at_s) == (True, 0, 1234.5)
    ledger.next = Verdict(False, frames, [row("embedded", 16)], ["mysql: it is down"])
    await accounting.check()
    assert (accounting.last.ok, accounting.last.unasked) == (False, 1)
    assert {(a.sink, a.stored) for a in accounting.last.rows} == {("embedded", 16), ("mysql", 8)}
