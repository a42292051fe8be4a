"""The registry: points by name, type and unit, versions beside each other, and a limit on new series."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from cloud.registry import Key, Registry, SeriesGuard, metadata
from cloud.sinks.contract import ScanRecord
from cloud.sinks.embedded import EmbeddedSink, embedded_registry
from cloud.sinks.mysql import MySqlSink, mysql_registry
from cloud.sinks.sql import SqlSink
from config.cloud import MySQL
from tests.servers import run
from tests.sink_conformance import S, layout, now_ns, scan

_numbers = itertools.count(1)
HOUR = 3_600 * S


@pytest.fixture(params=["sqlite", "mariadb"])
async def pair(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[SqlSink, Registry]]:
    """A sink that fills a registry, and the registry: one code, two databases."""
    sink: SqlSink
    if request.param == "sqlite":
        sink, registry = EmbeddedSink(tmp_path), embedded_registry(tmp_path)
    else:
        server: run.MariaDb = request.getfixturevalue("mariadb_server")
        name = f"headgate_registry_{next(_numbers)}"
        settings = MySQL(
            host=server.host,
            port=server.port,
            user=server.user,
            password_env="UNUSED",
            database=server.database,
        )
        first = mysql_registry(settings, server.password)
        async with first.engine.begin() as conn:
            await conn.exec_driver_sql(f"CREATE DATABASE {name}")
        await first.close()
        settings = msgspec.structs.replace(settings, database=name)
        sink, registry = MySqlSink(settings, server.password), mysql_registry(settings, server.password)
    await sink.open()
    yield sink, registry
    await registry.close()
    await sink.close()


async def test_a_layout_registers_gateway_device_and_points(pair: tuple[SqlSink, Registry]) -> None:
    sink, registry = pair
    at_ns = now_ns()
    await sink.write(
        [scan(1, (1.0, 2.0, 3), at_ns=at_ns), scan(1, (1.0, 2.0, 3), at_ns=at_ns, gateway="b")], 1
    )
    one, two = await registry.gateways()
    assert (one.tenant, one.name, one.first_seen_ns, one.last_seen_ns) == ("acme", "b", at_ns + S, at_ns + S)
    assert two.name == "plant-1"
    assert await registry.gateways(tenant="other") == []
    assert await registry.gateway("acme", "b") == one
    assert await registry.gateway("acme", "c") is None
    (device,) = await registry.devices(one.id)
    assert (device.name, device.driver, device.measurement, device.tags) == (
        "boiler", "modbus", "heating", {"site": "north"},
    )  # fmt: skip
    assert [(p.name, p.type, p.unit, p.version) for p in await registry.points(device.id)] == [
        ("flow", "f64", "Cel", 1), ("return", "f64", "Cel", 1), ("starts", "u32", "", 1),
    ]  # fmt: skip


async def test_another_type_or_unit_is_a_new_version_beside_the_old(pair: tuple[SqlSink, Registry]) -> None:
    sink, registry = pair
    at_ns = now_ns()
    celsius, fahrenheit, integer = (
        layout(("t", kind, unit)) for kind, unit in (("f32", "Cel"), ("f32", "[degF]"), ("i16", "Cel"))
    )
    await sink.write([scan(1, (20.0,), at_ns=at_ns, of=celsius)], 1)
    await sink.write(
        [scan(2, (68.0,), at_ns=at_ns + S, of=fahrenheit), scan(3, (20,), at_ns=at_ns + 2 * S, of=integer)], 2
    )
    # An old layout that comes late finds its old version, also after a restart.
    await sink.open()
    settled = await sink.write([scan(4, (21.0,), at_ns=at_ns - S, of=celsius)], 3)
    assert settled.rejected == ()
    (gateway,) = await registry.gateways()
    (device,) = await registry.devices(gateway.id)
    assert [(p.version, p.type, p.unit) for p in await registry.points(device.id)] == [
        (1, "f32", "Cel"), (2, "f32", "[degF]"), (3, "i16", "Cel"),
    ]  # fmt: skip
    found = [r async for r in registry.readings(gateway.id, device="boiler", point="t")]
    assert [(r.version, r.unit, r.value) for r in found] == [
        (1, "Cel", 21.0), (1, "Cel", 20.0), (2, "[degF]", 68.0), (3, "Cel", 20.0),
    ]  # fmt: skip


async def test_a_device_that_says_otherwise_is_told_as_it_is_now(pair: tuple[SqlSink, Registry]) -> None:
    sink, registry = pair
    await sink.write([scan(1, (1,), at_ns=now_ns(), of=layout(("a", "u16", "")))], 1)
    await sink.write([scan(2, (1,), at_ns=now_ns(), of=layout(("a", "u16", ""), measurement="steam"))], 2)
    (gateway,) = await registry.gateways()
    (device,) = await registry.devices(gateway.id)
    assert device.measurement == "steam"
    assert len(await registry.points(device.id)) == 1


async def test_a_gateways_last_sign_of_life_moves_forward(pair: tuple[SqlSink, Registry]) -> None:
    sink, registry = pair
    at_ns = now_ns()
    for n, seen_ns in enumerate((at_ns, at_ns + 60 * S, at_ns + 30 * S)):
        await sink.write([scan(n, (1.0, 2.0, 3), at_ns=at_ns + n, received_at_ns=seen_ns)], n)
    (gateway,) = await registry.gateways()
    assert (gateway.first_seen_ns, gateway.last_seen_ns) == (at_ns, at_ns + 60 * S)


async def test_readings_come_by_time_and_page_by_page(
    pair: tuple[SqlSink, Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloud.registry.PAGE", 7)
    sink, registry = pair
    at_ns = now_ns()
    # Every third pair of scans is taken at one instant.
    moments = [at_ns + (n - n % 3 // 2) * S for n in range(30)]
    await sink.write([scan(n + 1, (float(n), 0.0, n), at_ns=at) for n, at in enumerate(moments)], 1)
    (gateway,) = await registry.gateways()
    whole = [r async for r in registry.readings(gateway.id)]
    assert [(r.point, r.key.seq) for r in whole] == [
        (p, n + 1) for p in ("flow", "return", "starts") for n in range(30)
    ]
    paged = []
    after: Key | None = None
    while page := [r async for r in registry.readings(gateway.id, limit=11, after=after)]:
        assert len(page) <= 11
        paged += page
        after = page[-1].key
    assert paged == whole
    some = [r async for r in registry.readings(
        gateway.id, device="boiler", point="flow", from_ns=moments[5], to_ns=moments[12]
    )]  # fmt: skip
    assert [r.taken_at_ns for r in some] == [at for at in moments if moments[5] <= at < moments[12]]
    assert [r async for r in registry.readings(gateway.id, device="pump")] == []
    assert [r async for r in registry.readings(gateway.id, point="nothing")] == []
    assert [r async for r in registry.readings(999)] == []


async def test_a_reader_that_goes_away_leaves_nothing_locked(pair: tuple[SqlSink, Registry]) -> None:
    sink, registry = pair
    at_ns = now_ns()
    await sink.write([scan(n, (1.0, 2.0, 3), at_ns=at_ns + n) for n in range(1, 300)], 1)
    (gateway,) = await registry.gateways()

    async def read() -> None:
        async for _ in registry.readings(gateway.id):
            await asyncio.sleep(0)

    for n in range(20):
        task = asyncio.create_task(read())
        await asyncio.sleep(0.001 * n)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await asyncio.wait_for(sink.write([scan(900 + n, (1.0, 2.0, 3), at_ns=at_ns) for n in range(9)], 2), 10)
    assert [t.readings for t in await registry.tally()] == [(299 + 9) * 3]


async def test_the_migrations_make_exactly_what_the_code_expects(pair: tuple[SqlSink, Registry]) -> None:
    def differences(conn: sa.Connection) -> list[object]:
        context = MigrationContext.configure(
            conn, opts={"compare_type": True, "version_table": "schema_version", "include_name": _ours}
        )
        return list(compare_metadata(context, metadata))

    _, registry = pair
    async with registry.engine.connect() as conn:
        assert await conn.run_sync(differences) == []


def _ours(name: str | None, kind: str, parents: object) -> bool:
    return name != "schema_version"


async def test_a_migration_that_was_cut_short_is_finished_at_the_next_start(
    pair: tuple[SqlSink, Registry],
) -> None:
    sink, registry = pair
    await sink.write([scan(1, (1.0, 2.0, 3), at_ns=now_ns())], 1)
    async with (
        registry.engine.begin() as conn
    ):  # as if it had ended before its last tables and its own record
        await conn.exec_driver_sql("DROP TABLE gaps")
        await conn.exec_driver_sql("DROP TABLE cursors")
        await conn.exec_driver_sql("DELETE FROM schema_version")
    assert await sink.open() == 0
    assert (await sink.write([scan(1, (1.0, 2.0, 3), at_ns=now_ns())], 1)).rejected == ()


async def test_stores_that_open_at_the_same_moment_do_not_mix_their_migrations(
    mariadb_server: run.MariaDb, tmp_path: Path
) -> None:
    settings = MySQL(
        host=mariadb_server.host, port=mariadb_server.port, user=mariadb_server.user, password_env="UNUSED",
        database=mariadb_server.database,
    )  # fmt: skip
    admin = mysql_registry(settings, mariadb_server.password)
    names = [f"headgate_registry_{next(_numbers)}" for _ in range(3)]
    async with admin.engine.begin() as conn:
        for name in names:
            await conn.exec_driver_sql(f"CREATE DATABASE {name}")
    await admin.close()
    sinks: list[SqlSink] = [
        MySqlSink(msgspec.structs.replace(settings, database=name), mariadb_server.password) for name in names
    ]
    sinks[1:1] = [EmbeddedSink(tmp_path / str(n)) for n in range(3)]
    assert await asyncio.gather(*(sink.open() for sink in sinks)) == [0] * 6
    for sink in sinks:
        assert (await sink.write([scan(1, (1.0, 2.0, 3), at_ns=now_ns())], 1)).rejected == ()
        await sink.close()


# --- new series ---


class Hours:
    def __init__(self) -> None:
        self.now_ns = 1_795_000_000 * S

    def __call__(self) -> int:
        return self.now_ns


@pytest.fixture
def hours() -> Hours:
    return Hours()


def device(n: int, points: int = 4, gateway: str = "plant-1") -> ScanRecord:
    of = layout(*((f"p{i}", "u16", "") for i in range(points)), device=f"d{n}")
    return scan(n, [0] * points, at_ns=1_795_000_000 * S, of=of, gateway=gateway)


async def test_the_first_refusal_of_a_gateway_is_a_warning_and_again_only_after_a_quiet_hour(
    tmp_path: Path, hours: Hours, caplog: pytest.LogCaptureFixture
) -> None:
    guard = SeriesGuard(tmp_path / "series.db", per_hour=4, clock_ns=hours)
    for n in range(1, 9):
        await guard.refused(device(n))
        await guard.refused(device(n, gateway="plant-2"))
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert [text.partition(":")[0] for text in said] == [
        "gateway acme/plant-1, device d2", "gateway acme/plant-2, device d2",
    ]  # fmt: skip
    assert "more than 4 new series in an hour" in said[0]
    hours.now_ns += HOUR + S
    for n in range(20, 24):
        await guard.refused(device(n))
    assert sum(r.levelname == "WARNING" for r in caplog.records) == 3
    await guard.close()


async def test_new_series_are_limited_by_gateway_and_hour(tmp_path: Path, hours: Hours) -> None:
    guard = SeriesGuard(tmp_path / "series.db", per_hour=10, clock_ns=hours)
    assert await guard.refused(device(1)) == ()
    assert await guard.refused(device(2)) == ()
    assert await guard.refused(device(3)) == (2, 3)
    assert await guard.refused(device(3)) == (2, 3)
    assert await guard.refused(device(4)) == (0, 1, 2, 3)
    assert await guard.refused(device(1)) == ()
    assert await guard.refused(device(4, gateway="plant-2")) == ()
    assert guard.refused_total == {"acme/plant-1": 8}
    hours.now_ns += HOUR + S
    assert await guard.refused(device(3)) == ()
    assert await guard.refused(device(4)) == ()
    assert guard.refused_total == {"acme/plant-1": 8}
    await guard.close()


async def test_known_series_are_known_after_a_restart_and_under_another_layout(
    tmp_path: Path, hours: Hours
) -> None:
    guard = SeriesGuard(tmp_path / "series.db", per_hour=4, clock_ns=hours)
    assert await guard.refused(device(1)) == ()
    await guard.close()
    again = SeriesGuard(tmp_path / "series.db", per_hour=4, clock_ns=hours)
    assert await again.refused(device(1)) == ()
    assert await again.refused(device(1, points=3)) == ()
    assert await again.refused(device(1, points=6)) == (4, 5)
    await again.close()


async def test_a_person_can_admit_what_the_limit_refused(tmp_path: Path, hours: Hours) -> None:
    guard = SeriesGuard(tmp_path / "series.db", per_hour=2, clock_ns=hours)
    assert await guard.refused(device(1)) == (2, 3)
    await guard.admit(device(1))
    assert await guard.refused(device(1)) == ()
    await guard.close()
