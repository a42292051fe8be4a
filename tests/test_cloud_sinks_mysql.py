"""MySQL/MariaDB: the conformance of every sink on a real MariaDB, and what only a server does."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncmy
import msgspec
import pytest
import trustme
from asyncmy.cursors import RE_INSERT_VALUES
from sqlalchemy.dialects.mysql.asyncmy import dialect as asyncmy_dialect

from cloud.dead_letters import DeadLetters
from cloud.journal.sqlite import SqliteJournal
from cloud.runner import SinkRunner
from cloud.sinks.contract import (
    Record,
    Rejection,
    RetryLater,
    SinkBroken,
    SinkError,
    SinkRefused,
    StoreChanged,
)
from cloud.sinks.embedded import EmbeddedSink
from cloud.sinks.mysql import DAYS_AHEAD, MAX_DAYS, MySqlSink, mysql_registry
from config.cloud import MySQL
from drivers.contract import Reason
from tests.servers import run
from tests.servers.process import wait_until
from tests.sink_conformance import (
    DAY,
    RefusingSinkConformance,
    S,
    ServerSinkConformance,
    Store,
    Told,
    event,
    gap,
    layout,
    now_ns,
    scan,
    some,
)
from tests.test_cloud_runner import batch

AUDIT = """
SELECT concat(g.tenant, '/', g.name), d.name, p.name, r.taken_at_ns,
       CASE p.type WHEN 'str' THEN r.text ELSE r.value END, p.type
FROM readings r JOIN points p ON p.id = r.point_id JOIN devices d ON d.id = p.device_id
JOIN gateways g ON g.id = d.gateway_id
"""
_numbers = itertools.count(1)


class Database(Store):
    """A database of one test's own."""

    remembers = True

    def __init__(self, server: run.MariaDb, name: str) -> None:
        self.server = server
        self.name = name

    def settings(self, *, retention_days: float = 31.0, ca_file: str | None = None) -> MySQL:
        return MySQL(
            host=self.server.host, port=self.server.port, user=self.server.user, password_env="UNUSED",
            database=self.name, retention_days=retention_days, ca_file=ca_file,
        )  # fmt: skip

    def sink(self, *, retention_days: float = 31.0, clock_ns: Callable[[], int] = time.time_ns) -> MySqlSink:
        return MySqlSink(
            self.settings(retention_days=retention_days), self.server.password, clock_ns=clock_ns
        )

    async def rows(self, query: str) -> list[tuple[Any, ...]]:
        conn = await asyncmy.connect(
            host=self.server.host, port=self.server.port, user=self.server.user, password=self.server.password,
            database=self.name, autocommit=True, charset="utf8mb4",
        )  # fmt: skip
        try:
            async with conn.cursor() as cursor:
                await cursor.execute(query)
                return list(await cursor.fetchall())
        finally:
            conn.close()

    async def readings(self) -> list[Told]:
        rows = await self.rows(AUDIT)
        return sorted(
            Told(gateway, device, point, at_ns, value if kind == "str" else _number(value))
            for gateway, device, point, at_ns, value, kind in rows
        )

    async def partitions(self) -> dict[str, int]:
        """Rows by partition, the partitions in order."""
        names = await self.rows(
            "SELECT partition_name FROM information_schema.partitions WHERE table_schema = DATABASE()"
            " AND table_name = 'readings' ORDER BY partition_ordinal_position"
        )
        return {
            name: (await self.rows(f"SELECT count(*) FROM readings PARTITION ({name})"))[0][0]
            for (name,) in names
        }

    def refusable(self) -> Record:
        return scan(99, (1.0,), at_ns=now_ns(), of=layout(("x", "f64", "V"), device="d" * 256))

    def stop(self) -> None:
        self.server.process.kill()

    def start(self) -> None:
        self.server.process.start()


def _number(value: str | None) -> float | None:
    return None if value is None else float(value)


def day_name(at_ns: int) -> str:
    return f"p{datetime.fromtimestamp(at_ns // S, UTC):%Y%m%d}"


@pytest.fixture(scope="module")
def general_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mariadb") / "general.log"


@pytest.fixture(scope="module")
def server(general_log: Path) -> Iterator[run.MariaDb]:
    """Ours to kill. Not strict by itself: the sink must see to that."""
    with run.mariadb(
        extra=("--general-log=1", f"--general-log-file={general_log}", "--sql-mode=", "--innodb-lock-wait-timeout=1")
    ) as server:  # fmt: skip
        yield server


@pytest.fixture
async def store(server: run.MariaDb) -> Database:
    name = f"headgate_{next(_numbers)}"
    await Database(server, server.database).rows(f"CREATE DATABASE {name} CHARACTER SET utf8mb4")
    return Database(server, name)


class TestMySql(RefusingSinkConformance, ServerSinkConformance):
    """MariaDB holds to what every sink promises."""


async def test_a_batch_is_one_insert_however_many_rows_it_has(store: Database, general_log: Path) -> None:
    sink = store.sink()
    await sink.open()
    at_ns = now_ns()
    of = layout(*((f"p{i}", "u16", "") for i in range(32)))
    for number in range(3):
        first = number * 60 + 1
        records = [scan(n, range(32), at_ns=at_ns + n * S, of=of) for n in range(first, first + 60)]
        before = general_log.stat().st_size
        await sink.write(records, number + 1)
        (only,) = inserts_after(general_log, before)
        assert only.count("),(") == 60 * 32 - 1
        assert "ON DUPLICATE KEY UPDATE" in only
    await sink.close()
    assert len(await store.readings()) == 3 * 60 * 32


def inserts_after(general_log: Path, size: int) -> list[str]:
    with general_log.open() as file:
        file.seek(size)
        return [line for line in file if re.search(r"INSERT INTO readings\b", line)]


async def test_more_than_one_packet_takes_is_several_inserts(store: Database, general_log: Path) -> None:
    sink = store.sink()
    await sink.open()
    sink._statement_bytes = 10_000
    at_ns = now_ns()
    of = layout(("s", "str", ""), ("x", "f64", ""))
    texts = [f"{n} é " * 200 + "%s %(x)s ' \" \\ \0 \n \x1a ; --" for n in range(40)]
    before = general_log.stat().st_size
    await sink.write([scan(n, (text, 1e300), at_ns=at_ns + n, of=of) for n, text in enumerate(texts)], 1)
    await sink.close()
    told = await store.readings()
    assert [t.value for t in told if t.point == "s"] == texts
    assert {t.value for t in told if t.point == "x"} == {1e300}
    assert 4 < general_log.read_bytes()[before:].count(b"INSERT INTO readings") < 40


def test_the_statements_go_as_one_on_mysql_8_too() -> None:
    """There SQLAlchemy writes `AS new`; a driver that does not know the form falls back to row by row."""
    eight = asyncmy_dialect()
    eight.server_version_info = (8, 4, 0)
    eight._requires_alias_for_on_duplicate_key = True  # as `initialize` finds on 8.0.20 and later
    sink = MySqlSink(MySQL(host="localhost", password_env="X"), "secret")
    for statement in msgspec.structs.astuple(sink.statements(eight)):
        found = RE_INSERT_VALUES.match(statement)
        assert found, statement
        assert found.group(3).lstrip().startswith("AS new ON DUPLICATE KEY UPDATE"), statement


async def test_every_day_has_its_partition_also_the_late_ones(store: Database) -> None:
    sink = store.sink(retention_days=0.0)
    await sink.open()
    at_ns = time.time_ns()
    ahead = [day_name(at_ns + n * DAY) for n in range(DAYS_AHEAD + 1)]
    assert list(await store.partitions()) == ["p_before", *ahead]
    seq = itertools.count(1)

    async def write(*days: int) -> None:
        records = [scan(n := next(seq), (1.0, 2.0, n), at_ns=at_ns + day * DAY) for day in days]
        await sink.write(records, 1)

    def expected(days: set[int]) -> dict[str, int]:
        return {day_name(at_ns + day * DAY): 3 for day in days}

    async def filled() -> dict[str, int]:
        return {name: count for name, count in (await store.partitions()).items() if count}

    await write(0, -5, -2)
    assert await filled() == expected({0, -5, -2})
    # A day between, the day before all, a far one, one beyond what is made ahead; each alone, after a restart too.
    await write(-3, -6, -700)
    await sink.open()
    await write(-4, DAYS_AHEAD + 3, -650, -651)
    days = {0, -5, -2, -3, -6, -700, -4, DAYS_AHEAD + 3, -650, -651}
    assert await filled() == expected(days)
    assert len(await store.partitions()) <= 2 * len(days) + DAYS_AHEAD + 2
    await write(-MAX_DAYS - 500)
    assert await filled() == {**expected(days), "p_before": 3}
    await sink.close()


async def test_the_retention_drops_whole_days_and_makes_those_to_come(store: Database) -> None:
    sink = store.sink(retention_days=3.0)
    await sink.open()
    at_ns = time.time_ns()
    await sink.write(
        [scan(n, (1.0, 2.0, n), at_ns=at_ns - n * DAY + S) for n in range(4)]
        + [event(9, at_ns=at_ns), gap(10, 5, 6, 6, at_ns=at_ns)],
        1,
    )
    await sink.maintain(at_ns + 2 * DAY)
    left = await store.partitions()
    await sink.maintain(at_ns + 9 * DAY)
    days = [day_name(at_ns + n * DAY) for n in range(-1, DAYS_AHEAD + 3)]
    assert list(left) == ["p_before", *days]
    assert [left[day] for day in days] == [3, 3, 0, 0, 0, 0, 0]
    assert sum((await store.partitions()).values()) == 0
    assert await store.rows("SELECT count(*) FROM events") == [(0,)]
    assert len(await store.rows("SELECT * FROM gaps")) == 1
    settled = await sink.write([scan(20, (1.0, 2.0, 3), at_ns=at_ns - 4 * DAY)], 2)
    assert settled.rejected == (Rejection(0, "older than retention", expired=True),)
    await sink.close()


async def test_a_value_that_its_column_refuses_is_refused_and_nothing_is_cut(store: Database) -> None:
    sink = store.sink()
    await sink.open()
    at_ns = now_ns()
    of = layout(("s", "str", ""))
    await sink.write([scan(1, ("short",), at_ns=at_ns, of=of)], 1)
    await store.rows("ALTER TABLE readings MODIFY text VARCHAR(8)")
    with pytest.raises(SinkRefused, match="1406"):
        await sink.write(
            [scan(2, ("ok",), at_ns=at_ns, of=of), scan(3, ("far too long",), at_ns=at_ns, of=of)], 2
        )
    assert [t.value for t in await store.readings()] == ["short"]
    await sink.write([scan(2, ("ok",), at_ns=at_ns, of=of)], 2)
    await sink.close()
    assert [t.value for t in await store.readings()] == ["ok", "short"]


async def test_a_lock_held_for_a_moment_repeats_the_same_batch(store: Database) -> None:
    sink = store.sink()
    await sink.open()
    await sink.write(some(2, at_ns=now_ns()), 1)
    conn = await asyncmy.connect(
        host=store.server.host, port=store.server.port, user=store.server.user, password=store.server.password,
        database=store.name,
    )  # fmt: skip
    async with conn.cursor() as cursor:
        await cursor.execute("SELECT * FROM cursors WHERE sink = 'mysql' FOR UPDATE")
        held = asyncio.create_task(sink.write(some(2, at_ns=now_ns(), first=3), 2))
        done, _ = await asyncio.wait((held,), timeout=1.5)  # one lock timeout (1205) passes
        assert not done
        await conn.rollback()
        await held
        await cursor.execute("SELECT * FROM cursors WHERE sink = 'mysql' FOR UPDATE")
        with pytest.raises(RetryLater, match="1205"):
            await sink.write(some(2, at_ns=now_ns(), first=5), 3)
        await conn.rollback()
    conn.close()
    await sink.write(some(2, at_ns=now_ns(), first=5), 3)
    await sink.close()
    assert len(await store.readings()) == 18


async def test_the_loser_of_a_deadlock_writes_the_same_batch_again_and_nothing_is_lost_or_doubled(
    store: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.rows("SET GLOBAL innodb_lock_wait_timeout = 30")  # for connections made from now on
    sink = store.sink()
    await sink.open()
    at_ns = now_ns()
    await sink.write(some(2, at_ns=at_ns), 1)
    await store.rows("CREATE TABLE ballast (n INT PRIMARY KEY) ENGINE=InnoDB")
    numbers: list[object] = []
    judge = sink.judge

    def told(err: BaseException) -> SinkError:
        numbers.append(err.args[0])
        return judge(err)

    monkeypatch.setattr(sink, "judge", told)
    conn = await asyncmy.connect(
        host=store.server.host, port=store.server.port, user=store.server.user, password=store.server.password,
        database=store.name,
    )  # fmt: skip
    async with conn.cursor() as other:
        # InnoDB ends the transaction that has changed less: this one has changed more.
        await other.execute("INSERT INTO ballast VALUES " + ",".join(f"({n})" for n in range(5000)))
        await other.execute("SELECT * FROM latest FOR UPDATE")  # what the sink takes last
        writing = asyncio.create_task(sink.write(some(2, at_ns=at_ns, first=3), 2))
        async with asyncio.timeout(20):
            waiting = "SELECT 1 FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'"
            # InnoDB looks again only when nobody has asked for 0.1 s (trx0i_s.cc, CACHE_MIN_IDLE_TIME_NS).
            while not await store.rows(waiting):  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.25)
        await other.execute("SELECT * FROM cursors WHERE sink = 'mysql' FOR UPDATE")  # what it took first
        await conn.rollback()
    conn.close()
    await writing
    await sink.close()
    await store.rows("SET GLOBAL innodb_lock_wait_timeout = 1")
    assert numbers == [1213]
    assert sorted(await store.rows("SELECT seq, count(*) FROM readings GROUP BY seq")) == [
        (1, 3), (2, 3), (3, 3), (4, 3),
    ]  # fmt: skip
    assert await store.rows("SELECT upto_offset FROM cursors WHERE sink = 'mysql'") == [(2,)]


async def test_latest_moves_forward_only(store: Database) -> None:
    sink = store.sink()
    await sink.open()
    at_ns = now_ns()
    first = [scan(5, (5.0, 1.0, 1), at_ns=at_ns), scan(4, (4.0, 1.0, 1), at_ns=at_ns + S)]
    for number, records in enumerate(
        (first, [scan(6, (6.0, 1.0, 1), at_ns=at_ns - S)], [scan(7, (7.0, 1.0, 1), at_ns=at_ns + S)], first)
    ):
        await sink.write(records, number + 1)
    await sink.close()
    rows = await store.rows("SELECT value, seq, taken_at_ns, epoch FROM latest ORDER BY point_id")
    assert [row[:2] for row in rows] == [(7.0, 7), (1.0, 7), (1.0, 7)]
    assert {row[2] for row in rows} == {at_ns + S}


async def test_names_that_mysql_would_take_for_equal_stay_apart(store: Database) -> None:
    sink = store.sink()
    await sink.open()
    at_ns = now_ns()
    of = layout(("a", "u16", ""), ("A", "u16", ""), ("a ", "u16", ""), ("ä", "u16", ""))
    await sink.write([scan(1, (1, 2, 3, 4), at_ns=at_ns, of=of)], 1)
    await sink.write([scan(2, (5,), at_ns=at_ns, of=layout(("a", "u16", ""), device="Boiler"))], 2)
    await sink.close()
    assert [(t.device, t.point, t.value) for t in await store.readings()] == [
        ("Boiler", "a", 5), ("boiler", "A", 2), ("boiler", "a", 1), ("boiler", "a ", 3), ("boiler", "ä", 4),
    ]  # fmt: skip
    registry = mysql_registry(store.settings(), store.server.password)
    (gateway,) = await registry.gateways()
    found = [r async for r in registry.readings(gateway.id, device="boiler", point="a")]
    await registry.close()
    assert [(r.point, r.value) for r in found] == [("a", 1)]


async def test_credentials_and_database_that_are_wrong_stop_the_sink(store: Database) -> None:
    wrong = MySqlSink(store.settings(), secrets.token_hex(8))
    with pytest.raises(SinkBroken, match=r"1045.*check \[mysql\] user"):
        await wrong.open()
    await wrong.close()
    nowhere = MySqlSink(msgspec.structs.replace(store.settings(), database="nowhere"), store.server.password)
    with pytest.raises(SinkBroken, match="1049"):
        await nowhere.open()
    await nowhere.close()


async def test_the_password_is_in_no_text(store: Database) -> None:
    password = "hunter2-" + secrets.token_hex(8)
    sink = MySqlSink(store.settings(), password)
    with pytest.raises(SinkBroken) as caught:
        await sink.open()
    assert password not in str(caught.value)
    assert password not in repr(sink.make_engine())


async def test_a_database_emptied_under_the_sink_is_noticed(store: Database) -> None:
    sink = store.sink()
    await sink.open()
    await sink.write(some(2, at_ns=now_ns()), 7)
    await store.rows("DELETE FROM cursors")
    with pytest.raises(StoreChanged):
        await sink.write(some(2, at_ns=now_ns(), first=3), 8)
    assert await sink.open() == 0
    await sink.close()


async def test_killed_in_the_middle_nothing_is_lost_and_nothing_doubled(store: Database) -> None:
    sink = store.sink()
    await sink.open()
    at_ns = now_ns()
    written = 0
    for kill in range(3):
        for number in range(4):
            records = some(40, at_ns=at_ns, first=written + 1)
            if number == 2:
                pending = asyncio.create_task(sink.write(records, written + 40))
                await asyncio.sleep(0.002 * kill)  # anywhere within the call
                store.stop()
                await asyncio.gather(pending, return_exceptions=True)
                store.start()
            await _patiently(sink, records, written + 40)
            written += 40
    assert await store.sink().open() == written
    await sink.close()
    told = await store.readings()
    assert len(told) == written * 3
    assert sorted(t.value for t in told if t.point == "starts") == list(range(1, written + 1))  # type: ignore[type-var]


async def _patiently(sink: MySqlSink, records: Sequence[Record], upto: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            await sink.write(records, upto)
            return
        except RetryLater:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)


async def test_uncertain_and_bad_readings_say_so(store: Database) -> None:
    sink = store.sink()
    await sink.open()
    at_ns = now_ns()
    reasons = {0: Reason.TIMEOUT, 1: Reason.RANGE}
    await sink.write([scan(1, (None, 99.0, 3), at_ns=at_ns, reasons=reasons, synchronized=False)], 1)
    await sink.close()
    assert list(await store.rows("SELECT value, reason, clock_synchronized FROM readings ORDER BY point_id")) == [
        (None, Reason.TIMEOUT, 0), (99.0, Reason.RANGE, 0), (3.0, Reason.CLOCK, 0),
    ]  # fmt: skip


def test_tls_is_verified_and_only_loopback_may_go_without(tmp_path: Path) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    stranger.cert_pem.write_to_path(str(tmp_path / "stranger.pem"))
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    options = (
        f"--ssl-cert={tmp_path}/cert.pem", f"--ssl-key={tmp_path}/key.pem", f"--ssl-ca={tmp_path}/ca.pem",
        "--require-secure-transport=1",
    )  # fmt: skip

    async def scenario(server: run.MariaDb) -> None:
        settings = MySQL(
            host=server.host, port=server.port, user=server.user, password_env="X", database=server.database,
            ca_file=str(tmp_path / "ca.pem"),
        )  # fmt: skip
        sink = MySqlSink(settings, server.password)
        assert await sink.open() == 0
        await sink.close()
        foreign = MySqlSink(
            msgspec.structs.replace(settings, ca_file=str(tmp_path / "stranger.pem")), server.password
        )
        with pytest.raises(SinkBroken, match="ca_file"):
            await foreign.open()
        await foreign.close()
        missing = MySqlSink(
            msgspec.structs.replace(settings, ca_file=str(tmp_path / "no.pem")), server.password
        )
        with pytest.raises(SinkBroken, match=r"no\.pem"):
            await missing.open()

    with run.mariadb(extra=options) as server:
        asyncio.run(scenario(server))


async def test_a_server_that_answers_no_more_asks_for_patience(
    store: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloud.sinks.mysql.READ_TIMEOUT_S", 1.0)
    sink = store.sink()
    await sink.open()
    store.server.process.pause()
    try:
        with pytest.raises(RetryLater):
            await sink.write(some(1, at_ns=now_ns()), 1)
    finally:
        store.server.process.resume()
    wait_until(lambda: store.server.process.running, timeout_s=10, what="mariadbd")
    await _patiently(sink, some(1, at_ns=now_ns()), 1)
    await sink.close()
    assert len(await store.readings()) == 3


async def test_a_database_killed_under_load_delays_itself_only_and_catches_up_whole(
    store: Database, tmp_path: Path
) -> None:
    journal, letters = SqliteJournal(tmp_path / "journal.db"), DeadLetters(tmp_path / "letters.db")
    await journal.open()
    await letters.open()
    slow = SinkRunner(store.sink(retention_days=0.0), journal, letters, retry_base_s=0.05, retry_cap_s=0.5)
    quick = SinkRunner(EmbeddedSink(tmp_path, retention_days=0.0), journal, letters)
    tasks = [asyncio.create_task(runner.run()) for runner in (slow, quick)]
    first = 1

    async def load(batches: int) -> None:
        nonlocal first
        for _ in range(batches):
            await journal.append([batch(first, 20)])
            first += 20
            await asyncio.sleep(0.002)

    async def reached(sink: str) -> None:
        deadline = time.monotonic() + 40
        last = (await journal.state()).last_offset
        while await journal.cursor(sink) < last:
            assert time.monotonic() < deadline, sink
            await asyncio.sleep(0.01)

    await load(10)
    await reached("mysql")
    for kill in range(2):
        loading = asyncio.create_task(load(60))
        await asyncio.sleep(0.03 * (kill + 1))
        store.stop()
        await loading
        await reached("embedded")
        down = await slow.state()
        assert (down.word, (await quick.state()).word) == ("retrying", "running")
        assert down.lag_s > 0
        store.start()
        await reached("mysql")
        assert (await slow.state()).word == "running"
    for runner in (slow, quick):
        assert await runner.drain(20.0)
    await asyncio.gather(*tasks)
    assert (await letters.state()).letters == 0
    await letters.close()
    await journal.close()
    (count,) = await store.rows("SELECT count(*), count(DISTINCT seq), max(seq) FROM readings")
    assert count == ((first - 1) * 3, first - 1, first - 1)
    with contextlib.closing(sqlite3.connect(tmp_path / "readings.sqlite")) as db:
        assert db.execute("SELECT count(*), count(DISTINCT seq), max(seq) FROM readings").fetchone() == count
