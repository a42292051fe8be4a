"""The account against planted faults: in each sink a reading that goes by hand, and one that is doubled, is found."""

from __future__ import annotations

import asyncio
import secrets
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from cloud.api.local import local
from cloud.api.models import SinkAccount
from cloud.server import CloudServer
from cloud.sinks.mysql import mysql_registry
from config.cloud import Archive, Cloud, Gateway, InfluxDB, MySQL, Server
from tests.fakes.batches import GATEWAY, POINTS, batch
from tests.servers import run
from tests.servers.process import free_port

BATCHES = 4
READINGS = BATCHES * 3 * len(POINTS)


async def delivered(config: Cloud) -> None:
    """A server takes some batches, every sink has them, and it ends."""
    server = CloudServer(config)
    task = asyncio.create_task(server.run())
    await server.started.wait()
    headers = {"Headgate-Gateway": GATEWAY, "Authorization": "Bearer a-token-that-is-long-enough"}
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{server.address[1]}", headers=headers, timeout=30
    ) as client:
        for n in range(BATCHES):
            assert (await client.post("/v1/ingest", content=batch(1 + 3 * n))).status_code == 200
        async with asyncio.timeout(60):
            while not settled_everywhere((await client.get("/metrics")).text):  # noqa: ASYNC110 - over HTTP
                await asyncio.sleep(0.1)
    server.stop()
    await task


def settled_everywhere(metrics: str) -> bool:
    positions = [line for line in metrics.splitlines() if line.startswith("headgate_sink_position{")]
    return len(positions) == 4 and all(float(line.split()[-1]) >= BATCHES for line in positions)


async def account(config: Cloud) -> dict[str, SinkAccount]:
    async with local(config, journal=True) as operator:
        verdict = await operator.verify()
    assert verdict.trouble == []
    assert verdict.ok == all(row.ok for row in verdict.sinks)
    return {row.sink: row for row in verdict.sinks}


async def test_a_reading_that_goes_or_is_doubled_by_hand_is_found_in_every_sink(
    tmp_path: Path,
    mariadb_server: run.MariaDb,
    influxdb_server: run.InfluxDb,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = f"planted_{secrets.token_hex(4)}"
    monkeypatch.setenv("PLANTED_MYSQL", mariadb_server.password)
    monkeypatch.setenv("PLANTED_INFLUXDB", influxdb_server.token)
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text("a-token-that-is-long-enough")
    mysql = MySQL(
        host=mariadb_server.host, port=mariadb_server.port, user=mariadb_server.user,
        password_env="PLANTED_MYSQL", database=name, retention_days=0.0,
    )  # fmt: skip
    root = mysql_registry(
        MySQL(host=mysql.host, port=mysql.port, user=mysql.user, password_env="PLANTED_MYSQL",
              database=mariadb_server.database),
        mariadb_server.password,
    )  # fmt: skip
    async with root.engine.begin() as conn:
        await conn.exec_driver_sql(f"CREATE DATABASE {name}")
    await root.close()
    influx = InfluxDB(
        url=influxdb_server.url, org=influxdb_server.org, bucket=name, token_env="PLANTED_INFLUXDB"
    )
    config = Cloud(
        server=Server(data_dir=str(tmp_path / "data"), port=free_port(), drain_s=10.0),
        gateway=[Gateway(tenant="acme", name="plant-1", token_file=str(token))],
        archive=Archive(commit_interval_s=0.2), mysql=mysql, influxdb=influx,
    )  # fmt: skip
    await delivered(config)
    before = await account(config)
    for sink, row in before.items():
        assert (row.stored, row.missing, row.doubled) == (READINGS, 0, 0), sink
    assert len(before) == 4

    async def in_embedded(statement: str) -> None:
        with closing(sqlite3.connect(tmp_path / "data/readings.sqlite", timeout=20)) as db, db:
            assert db.execute(statement).rowcount == 1

    async def in_mysql(statement: str) -> None:
        registry = mysql_registry(mysql, mariadb_server.password)
        async with registry.engine.begin() as conn:
            assert (await conn.execute(sa.text(statement))).rowcount == 1
        await registry.close()

    async def in_archive(double: str) -> None:
        from deltalake import DeltaTable, write_deltalake

        where = str(tmp_path / "data/archive/readings")
        table = DeltaTable(where)
        if double:
            rows = table.to_pyarrow_table().slice(0, 1)
            write_deltalake(where, rows, mode="append")
        else:
            table.delete("seq = 2 AND point = 'p1'")

    async def in_influxdb(double: str) -> None:
        headers = {"Authorization": f"Token {influxdb_server.token}"}
        where = {"org": influx.org, "bucket": name}
        async with httpx.AsyncClient(base_url=influx.url, headers=headers, timeout=30) as client:
            if double:
                line = "boiler,tenant=acme,gateway=plant-1,device=boiler p1=1 1700000000000000001"
                answer = await client.post("/api/v2/write", params={**where, "precision": "ns"}, content=line)
            else:
                span = {"start": "1970-01-01T00:00:00Z", "stop": "2200-01-01T00:00:00Z",
                        "predicate": '_measurement="boiler"'}  # fmt: skip
                answer = await client.post("/api/v2/delete", params=where, json=span)
            assert answer.status_code == 204, answer.text

    one = "FROM readings WHERE seq = 2 AND point_id = 1"
    copy = (
        "INSERT INTO readings SELECT point_id, taken_at_ns + 1, epoch + 1, seq, value, text, reason,"
        " clock_synchronized, received_at_ns FROM readings WHERE seq = 3 AND point_id = 1"
    )
    plants: list[tuple[str, Callable[[str], Awaitable[None]], str, str]] = [
        ("embedded", in_embedded, f"DELETE {one}", copy),
        ("mysql", in_mysql, f"DELETE {one}", copy),
        ("archive", in_archive, "", "double"),
        ("influxdb", in_influxdb, "", "double"),
    ]
    # Gone first; then some that stand for nothing received, which must not make up for it in the count.
    for sink, plant, gone, double in plants:
        await plant(gone)
        found = (await account(config))[sink]
        lost = READINGS if sink == "influxdb" else 1
        assert (found.missing, found.doubled, found.ok) == (lost, 0, False), sink
        if sink != "influxdb":
            await plant(double)
            found = (await account(config))[sink]
            assert (found.stored, found.missing, found.doubled, found.ok) == (READINGS, 1, 1, False), sink
            await plant(double.replace("seq = 3", "seq = 4").replace("epoch + 1", "epoch"))
            found = (await account(config))[sink]
            assert found.stored >= READINGS, sink
            assert (found.missing, found.doubled, found.ok) == (1, 2, False), sink
