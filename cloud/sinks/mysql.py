"""MySQL and MariaDB: the registry, latest readings, and history partitioned by day.

Rules:
1. One multi-row INSERT per batch, up to what the server takes as one packet. The small upserts beside it go through
   asyncmy's `executemany`, which also knows MySQL 8's `AS new` form and makes one statement of them.
2. Strict mode, always: what does not fit is an error, never a silently cut value.
3. Every day with readings has its partition, made before the first row that needs it; a stretch of days without any
   is one partition until a late row parts it. `p_before`, in front of them all, is empty unless data is older than
   `MAX_DAYS`. Retention drops whole partitions.
4. TLS with a verified certificate, but for loopback.
5. A deadlock or lock timeout (1213, 1205) repeats the same batch; a value that is refused (1406, 1264, 1366) is the
   runner's to isolate; credentials and missing schemas stop the sink.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import ssl
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import sqlalchemy as sa
from asyncmy.converters import escape_string
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from cloud import registry
from cloud.registry import Registry
from cloud.sinks.contract import Record, RetryLater, Settled, SinkBroken, SinkError, SinkRefused
from cloud.sinks.sql import DAY_NS, Row, SqlSink, Statements, autocommit
from config.cloud import MySQL
from sync.identity import is_loopback

CONNECT_TIMEOUT_S: Final = 10
READ_TIMEOUT_S: Final = 120.0  #: a statement that takes longer is given up and repeated
RECYCLE_S: Final = 1_800  #: below any usual wait_timeout (8 h) and firewall
DAYS_AHEAD: Final = (
    3  #: partitions made before their day begins; a scan is at most one day ahead (`cloud.decode`)
)
MAX_DAYS: Final = 1_000  #: days with a partition of their own, of the 8,192 that a table may have
DEADLOCK_TRIES: Final = 3
DELETE_ROWS: Final = 20_000  #: per transaction of the retention
BEFORE: Final = "p_before"
MAX_STATEMENT_BYTES: Final = 4 * 1024 * 1024  #: of one INSERT, where max_allowed_packet has room for it
_COLUMNS: Final = ", ".join(registry.readings.columns.keys())
_INSERT: Final = f"INSERT INTO readings ({_COLUMNS}) VALUES "  # noqa: S608 - names of ours

# Error numbers: MySQL's "Server Error Message Reference" and "Client Error Message Reference"; MariaDB shares them.
_DEADLOCK: Final = frozenset((1205, 1213))
_LATER: Final = frozenset(
    (
        1021, 1030, 1040, 1053, 1080, 1114, 1129, 1158, 1159, 1160, 1161, 1180, 1203, 1226, 1290, 1317, 1836, 1927,
        1969, 2002, 2003, 2006, 2013, 2055, 3024, 4031,
    )
)  # fmt: skip
"""No room, too many connections, shutting down, read-only, connection lost, statement timed out."""
_BROKEN: Final = frozenset(
    (1044, 1045, 1049, 1054, 1130, 1131, 1133, 1142, 1143, 1146, 1193, 1227, 1251, 1370, 1698, 2026, 2054, 2061)
)  # fmt: skip
"""Access denied, unknown database, table or column, host not allowed, TLS, authentication plugin."""
_REFUSED: Final = frozenset((1048, 1153, 1062, 1264, 1265, 1292, 1366, 1406, 1526, 1690, 3140))
"""A value that does not fit its column."""


class MySqlSink(SqlSink):
    """One database. `password` is the secret itself; it stays out of every text."""

    def __init__(self, settings: MySQL, password: str, *, clock_ns: Callable[[], int] = time.time_ns) -> None:
        super().__init__("mysql", retention_days=settings.retention_days, clock_ns=clock_ns)
        self._settings = settings
        self._password = password
        # The partitions' upper bounds in days since 1970, sorted; the first is that of `p_before`.
        self._bounds: list[int] = []
        self._statement_bytes = MAX_STATEMENT_BYTES

    def make_engine(self) -> AsyncEngine:
        return mysql_engine(self._settings, self._password)

    def statements(self, dialect: sa.Dialect) -> Statements:
        latest = mysql.insert(registry.latest)
        new, old = latest.inserted, registry.latest.c
        newer = sa.or_(
            new.taken_at_ns > old.taken_at_ns,
            sa.and_(new.taken_at_ns == old.taken_at_ns, new.seq >= old.seq),
        )
        # MySQL assigns from left to right: the columns that decide come last.
        names = [c.name for c in registry.latest.columns if c.name not in ("point_id", "seq", "taken_at_ns")]
        latest = latest.on_duplicate_key_update(
            [(name, sa.func.if_(newer, new[name], old[name])) for name in (*names, "seq", "taken_at_ns")]
        )
        seen = mysql.insert(registry.gateways)
        seen = seen.on_duplicate_key_update(
            last_seen_ns=sa.func.greatest(registry.gateways.c.last_seen_ns, seen.inserted.last_seen_ns)
        )
        return Statements(*(str(stmt.compile(dialect=dialect)) for stmt in (latest, seen)))

    async def opened(self) -> None:
        async with self._connection().connect() as conn:
            packet = await conn.scalar(sa.text("SELECT @@max_allowed_packet"))
        self._statement_bytes = min(MAX_STATEMENT_BYTES, int(packet or 0) * 3 // 4)
        await self._read_partitions()
        await self._make_days(_coming(self._clock_ns()))

    async def write(self, records: Sequence[Record], upto_offset: int) -> Settled:
        for _ in range(DEADLOCK_TRIES - 1):
            with contextlib.suppress(_Deadlock):
                return await super().write(records, upto_offset)
        return await super().write(records, upto_offset)

    async def insert(self, conn: AsyncConnection, rows: Sequence[Row]) -> None:
        for text in _inserts(rows, self._statement_bytes):
            # As it is: no placeholder is looked for in it.
            await conn.exec_driver_sql(text, execution_options={"no_parameters": True})

    async def prepare(self, rows: Sequence[Row]) -> None:
        await self._make_days({row[1] // DAY_NS for row in rows})

    async def expire(self, now_ns: int, before_ns: int) -> None:
        await self._read_partitions()
        await self._make_days(_coming(now_ns))
        if before_ns <= 0:
            return
        # A partition goes once all of it is too old; p_before stays.
        old = [bound for bound in self._bounds[1:] if bound * DAY_NS <= before_ns]
        engine = self._connection()
        async with autocommit(engine) as conn:
            if old:
                names = ", ".join(map(_name, old))
                await conn.exec_driver_sql(f"ALTER TABLE readings DROP PARTITION {names}")
            while True:
                gone = await conn.exec_driver_sql(
                    f"DELETE FROM readings PARTITION ({BEFORE}) WHERE taken_at_ns < {before_ns} LIMIT {DELETE_ROWS}"  # noqa: S608 - numbers of ours
                )
                if gone.rowcount < DELETE_ROWS:
                    break
            await conn.execute(sa.delete(registry.events).where(registry.events.c.at_ns < before_ns))
        await self._read_partitions()

    def judge(self, err: BaseException) -> SinkError:
        number = err.args[0] if err.args and isinstance(err.args[0], int) else 0
        text = f"mysql {self._settings.host}:{self._settings.port}: {err}"
        if number in _DEADLOCK:
            return _Deadlock(text, after_s=0.1)
        if "[SSL" in text:  # asyncmy hides it in a 2003
            return SinkBroken(f"{text}; mysql.ca_file must hold the authority of the server's certificate")
        if number in _LATER:
            return RetryLater(text)
        if number in _BROKEN:
            return SinkBroken(
                f"{text}; check [mysql] user, password, database, ca_file and the user's grants"
            )
        if number in _REFUSED:
            return SinkRefused(text)
        if number == 0 or isinstance(err, SQLAlchemyError):
            return RetryLater(text)  # no answer of the server's: the connection
        return SinkRefused(text)

    # --- partitions ---

    async def _read_partitions(self) -> None:
        async with self._connection().connect() as conn:
            found: Sequence[Any] = (
                await conn.exec_driver_sql(
                    "SELECT partition_name, partition_description FROM information_schema.partitions"
                    " WHERE table_schema = DATABASE() AND table_name = 'readings' AND partition_name IS NOT NULL"
                )
            ).all()
        bounds = {str(name): int(bound) // DAY_NS for name, bound in found}
        if BEFORE not in bounds or bounds[BEFORE] != min(bounds.values()):
            raise SinkBroken(
                "mysql: table readings has no partition p_before: restore it, or drop the database"
            )
        self._bounds = sorted(bounds.values())

    async def _make_days(self, days: set[int]) -> None:
        """A partition for each of these days."""
        bounds = self._bounds
        floor = bounds[-1] - MAX_DAYS  # what is older lies in p_before
        missing = sorted(day for day in days if day >= floor and not self._has(day))
        if not missing:
            return
        async with autocommit(self._connection()) as conn:
            for covering, inside in itertools.groupby(missing, lambda day: bisect_right(bounds, day)):
                upper = bounds[covering] if covering < len(bounds) else None
                pieces = _pieces(list(inside), bounds[covering - 1] if covering else None, upper)
                parts = ", ".join(
                    _less(BEFORE if covering == 0 and n == 0 else _name(bound), bound)
                    for n, bound in enumerate(pieces)
                )
                if upper is None:
                    await conn.exec_driver_sql(f"ALTER TABLE readings ADD PARTITION ({parts})")
                else:
                    name = BEFORE if covering == 0 else _name(upper)
                    await conn.exec_driver_sql(
                        f"ALTER TABLE readings REORGANIZE PARTITION {name} INTO ({parts})"
                    )
        await self._read_partitions()

    def _has(self, day: int) -> bool:
        """Whether a partition holds this day and no other."""
        at = bisect_left(self._bounds, day + 1)
        return 0 < at < len(self._bounds) and self._bounds[at] == day + 1 and self._bounds[at - 1] == day


def _inserts(rows: Sequence[Row], max_bytes: int) -> Iterator[str]:
    """The rows as multi-row INSERTs of about `max_bytes`.

    Written out here and not by the driver, which takes four times as long for rows of any kind: these are integers and
    finite floats, and the one text is escaped by the driver's own function (`sql_mode` is ours: backslashes escape).
    """
    # An update that changes nothing: INSERT IGNORE would turn every other error into a warning.
    end = " ON DUPLICATE KEY UPDATE received_at_ns = readings.received_at_ns"
    parts = [
        f"({a},{b},{c},{d},{value!r},NULL,{q},{s},{r})"
        if text is None and value is not None
        else f"({a},{b},{c},{d},{'NULL' if value is None else repr(value)},{_quoted(text)},{q},{s},{r})"
        for a, b, c, d, value, text, q, s, r in rows
    ]
    start = size = 0
    for at, part in enumerate(parts):
        size += len(part) * (4 if not part.isascii() else 1) + 1
        if size > max_bytes and at > start:
            yield _INSERT + ",".join(parts[start:at]) + end
            start, size = at, len(part) + 1
    if parts:
        yield _INSERT + ",".join(parts[start:]) + end


def _quoted(text: str | None) -> str:
    return "NULL" if text is None else f"'{escape_string(text)}'"


def _coming(now_ns: int) -> set[int]:
    today = now_ns // DAY_NS
    return set(range(today, today + DAYS_AHEAD + 1))


def _pieces(days: Sequence[int], lower: int | None, upper: int | None) -> list[int]:
    """The upper bounds that part lower..upper so that each of `days` stands alone; None: open at that end. With no
    `lower` the first piece is what lies before all of them."""
    bounds = {bound for day in days for bound in (day, day + 1)}
    if lower is not None:
        bounds = {bound for bound in bounds if bound > lower}
    if upper is not None:
        bounds.add(upper)
    return sorted(bounds)


class _Deadlock(RetryLater):
    """1205 or 1213: the same batch at once, a few times."""


def _name(bound: int) -> str:
    """A partition is called after the last day it holds."""
    return f"p{datetime.fromtimestamp((bound - 1) * 86_400, UTC):%Y%m%d}"


def _less(name: str, bound: int) -> str:
    return f"PARTITION {name} VALUES LESS THAN ({bound * DAY_NS})"


def _not_alembics_key_name(record: logging.LogRecord) -> bool:
    """MySQL calls every primary key PRIMARY, and warns that it ignores the name Alembic gives to its own."""
    return "schema_version_pkc" not in record.getMessage()


def mysql_engine(settings: MySQL, password: str) -> AsyncEngine:
    """An engine with pooling, strict mode and, but for loopback, verified TLS. Raises `SinkBroken`."""
    logging.getLogger("asyncmy").addFilter(_not_alembics_key_name)  # adding it again changes nothing
    url = sa.URL.create(
        "mysql+asyncmy", settings.user, password, settings.host, settings.port, settings.database,
        query={"charset": "utf8mb4"},
    )  # fmt: skip
    return create_async_engine(
        url,
        pool_size=settings.pool_size,
        max_overflow=0,
        pool_recycle=RECYCLE_S,
        connect_args={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "init_command": "SET SESSION sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION', time_zone = '+00:00'",
            "ssl": _tls(settings),
        },
    )


def mysql_registry(settings: MySQL, password: str) -> Registry:
    """Questions to the database, on connections of their own."""
    return Registry(mysql_engine(settings, password))


def _tls(settings: MySQL) -> ssl.SSLContext | None:
    if settings.ca_file is None and is_loopback(settings.host):
        return None
    try:
        context = ssl.create_default_context(cafile=settings.ca_file)
    except (OSError, ssl.SSLError) as err:
        raise SinkBroken(f"mysql.ca_file {settings.ca_file}: {err}; a PEM file with the authority") from err
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
