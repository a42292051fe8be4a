"""The default store: one SQLite file in the data folder, no server at all.

Rules: WAL with `synchronous=FULL`; one connection writes, readers open their own; readings older than the retention
are deleted in small transactions, so that a delivery never waits long.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from cloud import registry
from cloud.registry import Registry
from cloud.sinks.contract import RetryLater, SinkBroken, SinkError, SinkRefused
from cloud.sinks.sql import ROWS_PER_STATEMENT, Row, SqlSink, Statements

FILE: Final = "readings.sqlite"
BUSY_TIMEOUT_S: Final = 30.0
DELETE_ROWS: Final = 20_000  #: per transaction of the retention

_LATER: Final = ("locked", "busy", "full", "I/O error", "interrupted")
_BROKEN: Final = (
    "unable to open",
    "readonly",
    "malformed",
    "not a database",
    "no such table",
    "no such column",
)


_INSERT: Final = str(
    sqlite.insert(registry.readings)
    .on_conflict_do_nothing()
    .compile(dialect=sqlite.dialect(paramstyle="qmark"))
)


class EmbeddedSink(SqlSink):
    """`<data_dir>/readings.sqlite`."""

    def __init__(
        self, data_dir: Path, *, retention_days: float = 30.0, clock_ns: Callable[[], int] = time.time_ns
    ) -> None:
        super().__init__("embedded", retention_days=retention_days, clock_ns=clock_ns)
        self._path = data_dir / FILE

    def make_engine(self) -> AsyncEngine:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch(mode=0o600)
        except OSError as err:
            raise SinkBroken(f"{self._path}: {err.strerror}; make its folder writable for this user") from err
        return sqlite_engine(self._path, begin="BEGIN IMMEDIATE")

    def statements(self, dialect: sa.Dialect) -> Statements:
        latest = sqlite.insert(registry.latest)
        new, old = latest.excluded, registry.latest.c
        newer = sa.or_(
            new.taken_at_ns > old.taken_at_ns,
            sa.and_(new.taken_at_ns == old.taken_at_ns, new.seq >= old.seq),
        )
        latest = latest.on_conflict_do_update(
            index_elements=[old.point_id],
            set_={c.name: new[c.name] for c in registry.latest.columns if c.name != "point_id"},
            where=newer,
        )
        seen = sqlite.insert(registry.gateways)
        seen = seen.on_conflict_do_update(
            index_elements=[registry.gateways.c.id],
            set_={"last_seen_ns": sa.func.max(registry.gateways.c.last_seen_ns, seen.excluded.last_seen_ns)},
        )
        return Statements(*(str(stmt.compile(dialect=dialect)) for stmt in (latest, seen)))

    async def insert(self, conn: AsyncConnection, rows: Sequence[Row]) -> None:
        for at in range(0, len(rows), ROWS_PER_STATEMENT):
            await conn.exec_driver_sql(_INSERT, list(rows[at : at + ROWS_PER_STATEMENT]))

    async def expire(self, now_ns: int, before_ns: int) -> None:
        if before_ns <= 0:
            return
        c = registry.readings.c
        engine = self._connection()
        async with engine.connect() as conn:
            ids = [row.id for row in await conn.execute(sa.select(registry.points.c.id))]
        for point_id in ids:
            expired = (c.point_id == point_id, c.taken_at_ns < before_ns)
            while True:
                async with engine.begin() as conn:
                    upto_ns = await conn.scalar(
                        sa.select(c.taken_at_ns)
                        .where(*expired)
                        .order_by(c.taken_at_ns)
                        .limit(1)
                        .offset(DELETE_ROWS)
                    )
                    less = expired if upto_ns is None else (c.point_id == point_id, c.taken_at_ns <= upto_ns)
                    await conn.execute(sa.delete(registry.readings).where(*less))
                if upto_ns is None:
                    break
        async with engine.begin() as conn:
            await conn.execute(sa.delete(registry.events).where(registry.events.c.at_ns < before_ns))

    def judge(self, err: BaseException) -> SinkError:
        text = f"{self._path}: {err}"
        said = str(err)
        if any(word in said for word in _LATER):
            return RetryLater(text)
        if any(word in said for word in _BROKEN):
            return SinkBroken(
                f"{text}; make it writable, or move it aside to start anew from what the journal holds"
            )
        if isinstance(err, sqlite3.OperationalError | SQLAlchemyError):
            return RetryLater(text)
        return SinkRefused(text)


def sqlite_engine(path: Path, *, begin: Literal["BEGIN", "BEGIN IMMEDIATE"]) -> AsyncEngine:
    """An engine on the file, with the pragmas that the promise needs. A writer begins IMMEDIATE: it waits for its turn
    at once, rather than failing half-way; a reader keeps nobody waiting."""
    engine = create_async_engine(
        f"sqlite+aiosqlite:///{path}", connect_args={"timeout": BUSY_TIMEOUT_S}, pool_size=4
    )

    @event.listens_for(engine.sync_engine, "connect")
    def _connected(connection: Any, record: object) -> None:
        # sqlite3 itself would begin before data only, and leave half a migration behind.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def embedded_registry(data_dir: Path) -> Registry:
    """Questions to the embedded store, on connections of their own."""
    return Registry(sqlite_engine(data_dir / FILE, begin="BEGIN"))
