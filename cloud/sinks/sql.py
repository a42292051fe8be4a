"""What the SQLite and the MySQL sink share: records to rows, one transaction per call, the cursor in it.

Rules:
1. A call is one transaction: readings, latest, events, gaps and the offset are stored together or not at all.
2. A reading's key is (point, taken_at, epoch, seq): written again it changes nothing, and two scans at one instant are
   two readings.
3. `latest` moves forward only.
4. A gap counts as lost only what did not arrive after all; when a scan inside a known gap arrives late, the gap is
   counted again.
5. The offset is moved only from where this sink left it: a store that was restored or emptied under us is noticed in
   the same transaction, and nothing is written into it under stale point ids.
6. Older than the retention is refused as expired; the archive keeps it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

import msgspec
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from cloud import registry
from cloud.decode import overlap
from cloud.registry import NAME_CHARS, TEXT_BYTES, Known, NameRefused, Registrar
from cloud.sinks.contract import (
    EventRecord,
    GapRecord,
    Record,
    Rejection,
    RetryLater,
    ScanRecord,
    Settled,
    SinkError,
    StoreChanged,
)
from drivers.contract import Reason, Value

if TYPE_CHECKING:
    from alembic.config import Config
from config.failpoint import reached

log = logging.getLogger(__name__)

ROWS_PER_STATEMENT: Final = 8_000  #: keeps one job of the database, and what stands in memory for it, short
SEEN_EVERY_NS: Final = 10 * 10**9  #: how exact a gateway's `last_seen_ns` is
MAX_GAPS: Final = 10_000  #: recent gaps watched for late arrivals
GAP_SLACK_NS: Final = 86_400 * 10**9  #: clock rows differ between a scan's batch and the gap's
DAY_NS: Final = 86_400 * 10**9
CANCEL_GRACE_S: Final = 5.0  #: how long a cancelled call may still take to end its transaction
VERSION_TABLE: Final = "schema_version"  #: as `cloud/migrations/env.py` names it to Alembic
EXACT: Final = 2**53  #: integers up to this are exact in a double

Row: TypeAlias = tuple[int, int, int, int, float | None, str | None, int, int, int]
"""point_id, taken_at_ns, epoch, seq, value, text, reason, clock_synchronized, received_at_ns: `registry.readings`."""


T = TypeVar("T")


class Statements(msgspec.Struct, frozen=True):
    """The hot statements as this dialect's text, taking rows as tuples in the tables' column order."""

    latest: str
    seen: str


class _Gap(msgspec.Struct, frozen=True):
    """A gap that scans may still fill."""

    gateway_id: int
    epoch: int
    seq: int
    first: int
    last: int


class SqlSink(ABC):
    """A sink that is a SQL database. A subclass says how to reach it and what its errors mean."""

    max_records = 500
    max_bytes = 256 * 1024
    linger_s = 0.0

    def __init__(
        self, name: str, *, retention_days: float, clock_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self.name = name
        self._retention_ns = int(retention_days * DAY_NS)
        self._clock_ns = clock_ns
        self._engine: AsyncEngine | None = None
        self._statements: Statements | None = None
        self._registrar = Registrar()
        self._offsets: set[int] = set()  # what the store may remember: one, or two after an uncertain commit
        self._seen: dict[int, int] = {}
        self._gaps: dict[tuple[str, int], list[_Gap]] = {}

    # --- what a subclass gives ---

    @abstractmethod
    def make_engine(self) -> AsyncEngine:
        """A new engine; connects to nothing yet. Raises `SinkBroken`."""

    @abstractmethod
    def statements(self, dialect: sa.Dialect) -> Statements:
        """The hot statements for this dialect."""

    @abstractmethod
    def judge(self, err: BaseException) -> SinkError:
        """What a failure of the database means."""

    async def opened(self) -> None:  # noqa: B027 - most stores need nothing more
        """After the schema is up to date."""

    async def prepare(self, rows: Sequence[Row]) -> None:  # noqa: B027 - most stores have nothing to prepare
        """Before the transaction that writes these rows (partitions)."""

    @abstractmethod
    async def insert(self, conn: AsyncConnection, rows: Sequence[Row]) -> None:
        """Insert these readings, in as few statements as the database allows; those it has already stay as they are."""

    @abstractmethod
    async def expire(self, now_ns: int, before_ns: int) -> None:
        """Remove readings taken before `before_ns`."""

    # --- the contract ---

    async def open(self) -> int | None:
        return await whole(self._open())

    async def write(self, records: Sequence[Record], upto_offset: int) -> Settled:
        return await whole(self._write(records, upto_offset))

    async def remove(self, records: Sequence[Record]) -> None:
        await whole(self._remove(records))

    async def maintain(self, now_ns: int) -> None:
        await whole(self._maintain(now_ns))

    async def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            with contextlib.suppress(
                SQLAlchemyError, OSError
            ):  # a connection that is gone need not be closed
                await whole(engine.dispose())

    async def _open(self) -> int:
        await self.close()
        self._registrar.forget()
        self._seen.clear()
        self._engine = self.make_engine()
        with self._translated():
            await _bring_up_to_date(self._engine)
            async with self._engine.begin() as conn:
                self._statements = self.statements(conn.dialect)
                offset = await conn.scalar(
                    sa.select(registry.cursors.c.upto_offset).where(registry.cursors.c.sink == self.name)
                )
                if offset is None:
                    await conn.execute(sa.insert(registry.cursors).values(sink=self.name, upto_offset=0))
                await self._watch_gaps(conn)
            await self.opened()
        self._offsets = {int(offset or 0)}
        return int(offset or 0)

    async def _write(self, records: Sequence[Record], upto_offset: int) -> Settled:
        with self._translated():
            rejected = await self._register(records)
            rows, newest = self._rows(records, rejected)
            await self.prepare(rows)
            before = self._offsets
            self._offsets = before | {upto_offset}
            async with self._connection().begin() as conn:
                await self._move_offset(conn, before, upto_offset)
                await self._store(conn, records, rejected, rows, newest)
                reached("sql.before_commit")
            reached("sql.after_commit")
            self._offsets = {upto_offset}
        return Settled(tuple(sorted(rejected, key=lambda r: r.index)))

    async def _remove(self, records: Sequence[Record]) -> None:
        """One transaction. `latest` then shows the newest of what is left."""
        with self._translated():
            await self._register(records)
            async with self._connection().begin() as conn:
                stale: set[int] = set()
                for record in records:
                    if isinstance(record, ScanRecord):
                        stale |= await self._remove_scan(conn, record)
                        continue
                    gateway_id = self._registrar.gateway_id(record.tenant, record.gateway)
                    table = registry.gaps if isinstance(record, GapRecord) else registry.events
                    c = table.c
                    await conn.execute(
                        sa.delete(table).where(
                            c.gateway_id == gateway_id, c.epoch == record.epoch, c.seq == record.seq
                        )
                    )
                for point_id in sorted(stale):
                    await self._look_up_latest(conn, point_id)

    async def _remove_scan(self, conn: AsyncConnection, record: ScanRecord) -> set[int]:
        """The points whose latest reading this was."""
        known = self._registrar.known(record)
        ids = [point_id for point_id in known.ids if point_id] if known else []
        if not ids:
            return set()
        here = (record.taken_at_ns, record.epoch, record.seq)
        gone = [
            sa.and_(c.point_id.in_(ids), c.taken_at_ns == here[0], c.epoch == here[1], c.seq == here[2])
            for c in (registry.readings.c, registry.latest.c)
        ]
        await conn.execute(sa.delete(registry.readings).where(gone[0]))
        found = (await conn.execute(sa.select(registry.latest.c.point_id).where(gone[1]))).all()
        if found:
            await conn.execute(sa.delete(registry.latest).where(gone[1]))
        return {row.point_id for row in found}

    async def _look_up_latest(self, conn: AsyncConnection, point_id: int) -> None:
        r = registry.readings.c
        names = [c.name for c in registry.latest.columns]
        newest = (
            sa.select(*(r[name] for name in names))
            .where(r.point_id == point_id)
            .order_by(r.taken_at_ns.desc(), r.seq.desc())
            .limit(1)
        )
        await conn.execute(sa.insert(registry.latest).from_select(names, newest))

    async def _maintain(self, now_ns: int) -> None:
        with self._translated():
            await self.expire(now_ns, self._expires_ns(now_ns))

    # --- registering ---

    async def _register(self, records: Sequence[Record]) -> list[Rejection]:
        """Make every layout and gateway known; what cannot be is rejected."""
        layouts: dict[tuple[str, str, int], ScanRecord] = {}
        gateways: dict[tuple[str, str], int] = {}
        for record in records:
            if isinstance(record, ScanRecord):
                if self._registrar.known(record) is None:
                    layouts.setdefault((record.tenant, record.gateway, record.layout_id), record)
            elif self._registrar.gateway_id(record.tenant, record.gateway) is None:
                gateways.setdefault((record.tenant, record.gateway), record.received_at_ns)
        refused: dict[tuple[str, str, int], str] = {}
        if layouts or gateways:
            made: list[tuple[ScanRecord, Known]] = []
            named: list[tuple[str, str, int]] = []
            async with self._connection().begin() as conn:
                for key, record in layouts.items():
                    try:
                        made.append((record, await self._registrar.register(conn, record)))
                    except NameRefused as err:
                        refused[key] = str(err)
                for (tenant, gateway), now_ns in gateways.items():
                    named.append(
                        (
                            tenant,
                            gateway,
                            await self._registrar.register_gateway(conn, tenant, gateway, now_ns),
                        )
                    )
            reached("sql.after_register")
            for record, known in made:
                self._registrar.remember(record, known)
            for tenant, gateway, gateway_id in named:
                self._registrar.remember_gateway(tenant, gateway, gateway_id)
        return [
            Rejection(i, reason)
            for i, record in enumerate(records)
            if isinstance(record, ScanRecord)
            and (reason := refused.get((record.tenant, record.gateway, record.layout_id)))
        ]

    # --- rows ---

    def _rows(self, records: Sequence[Record], rejected: list[Rejection]) -> tuple[list[Row], dict[int, Row]]:
        """Rows in key order, and the newest of each point; adds what is refused to `rejected`."""
        rows: list[Row] = []
        newest: dict[tuple[str, str, int], ScanRecord] = {}
        expired_ns = self._expires_ns(self._clock_ns())
        gone = {rejection.index for rejection in rejected}
        for index, record in enumerate(records):
            if isinstance(record, ScanRecord) and index not in gone:
                known = self._known(record)
                if record.taken_at_ns < expired_ns:
                    rejected.append(Rejection(index, "older than retention", expired=True))
                    continue
                made, refused = _rows_of(record, known)
                rows += made
                for reason, points in refused.items():
                    rejected.append(Rejection(index, reason, tuple(points)))
                key = (record.tenant, record.gateway, record.layout_id)
                held = newest.get(key)
                if held is None or (record.taken_at_ns, record.seq) >= (held.taken_at_ns, held.seq):
                    newest[key] = record
            elif isinstance(record, EventRecord | GapRecord) and (reason := _too_long(record)):
                rejected.append(Rejection(index, reason))
        rows.sort(key=itemgetter(0, 1, 2, 3))
        latest: dict[int, Row] = {}
        for record in newest.values():
            for row in _rows_of(record, self._known(record))[0]:
                kept = latest.get(row[0])
                if kept is None or (row[1], row[3]) >= (kept[1], kept[3]):
                    latest[row[0]] = row
        return rows, latest

    def _known(self, record: ScanRecord) -> Known:
        known = self._registrar.known(record)
        if known is None:
            raise StoreChanged(f"sink {self.name}: a layout was forgotten while it was written")
        return known

    def _expires_ns(self, now_ns: int) -> int:
        return now_ns - self._retention_ns if self._retention_ns else -(2**63)

    # --- the transaction ---

    async def _move_offset(self, conn: AsyncConnection, before: set[int], upto_offset: int) -> None:
        c = registry.cursors.c
        moved = await conn.execute(
            sa.update(registry.cursors)
            .where(c.sink == self.name, c.upto_offset.in_(sorted(before)))
            .values(upto_offset=upto_offset)
        )
        if moved.rowcount != 1:
            raise StoreChanged(
                f"sink {self.name}: the store does not remember offset {sorted(before)}: it was restored, emptied, or "
                "another headgate-cloud writes into it"
            )

    async def _store(
        self,
        conn: AsyncConnection,
        records: Sequence[Record],
        rejected: Sequence[Rejection],
        rows: list[Row],
        newest: dict[int, Row],
    ) -> None:
        statements = self._statements
        if statements is None:
            raise StoreChanged(f"sink {self.name} is not open")
        reached("sql.before_insert")
        await self.insert(conn, rows)
        reached("sql.after_insert")
        last = [newest[point_id] for point_id in sorted(newest)]
        for at in range(0, len(last), ROWS_PER_STATEMENT):
            await conn.exec_driver_sql(statements.latest, last[at : at + ROWS_PER_STATEMENT])
        whole = {rejection.index for rejection in rejected if not rejection.points}
        stored = [record for i, record in enumerate(records) if i not in whole]
        await self._store_seen(conn, statements, stored)
        await self._store_events(conn, [r for r in stored if isinstance(r, EventRecord)])
        await self._store_gaps(conn, [r for r in stored if isinstance(r, GapRecord)])
        await self._recount(conn, [r for r in stored if isinstance(r, ScanRecord)])

    async def _store_seen(
        self, conn: AsyncConnection, statements: Statements, records: Sequence[Record]
    ) -> None:
        newest: dict[tuple[str, str], int] = {}
        for record in records:
            key = (record.tenant, record.gateway)
            newest[key] = max(newest.get(key, 0), record.received_at_ns)
        rows = []
        for (tenant, gateway), seen_ns in sorted(newest.items()):
            gateway_id = self._registrar.gateway_id(tenant, gateway)
            if gateway_id is None or seen_ns < self._seen.get(gateway_id, 0) + SEEN_EVERY_NS:
                continue
            rows.append((gateway_id, tenant, gateway, seen_ns, seen_ns))
        if rows:
            await conn.exec_driver_sql(statements.seen, rows)
            self._seen.update({row[0]: row[4] for row in rows})

    async def _store_events(self, conn: AsyncConnection, records: Sequence[EventRecord]) -> None:
        if not records:
            return
        await self._upsert(
            conn,
            registry.events,
            [
                {
                    "gateway_id": self._registrar.gateway_id(r.tenant, r.gateway), "epoch": r.epoch, "seq": r.seq,
                    "at_ns": r.at_ns, "code": r.event.code, "device": r.event.device, "text": r.event.text,
                    "received_at_ns": r.received_at_ns,
                }
                for r in records
            ],
        )  # fmt: skip

    async def _store_gaps(self, conn: AsyncConnection, records: Sequence[GapRecord]) -> None:
        for r in records:
            said = r.gap
            gateway_id = self._registrar.gateway_id(r.tenant, r.gateway) or 0
            # What a sparse gap reports was never sent: what is held of its range is none of it.
            held = overlap(r.held, said.first, said.last) if said.first and not said.sparse else 0
            arrived = held > 0 and held == said.last - said.first + 1
            row: dict[str, int | str | None] = {
                "gateway_id": gateway_id, "epoch": r.epoch, "seq": r.seq, "gap_epoch": said.epoch,
                "first_seq": said.first, "last_seq": said.last, "scans": said.scans, "readings": said.readings,
                "lost_scans": 0 if arrived else said.scans, "lost_readings": 0 if arrived else said.readings,
                "reason": said.reason, "device": said.device, "from_ns": r.from_ns, "to_ns": r.to_ns,
                "received_at_ns": r.received_at_ns, "priority": said.priority[:16], "frames": said.frames,
            }  # fmt: skip
            await self._upsert(conn, registry.gaps, [row])
            if said.sparse:
                continue
            gap = _Gap(gateway_id, r.epoch, r.seq, said.first, said.last)
            self._watch(f"{r.tenant}/{r.gateway}", said.epoch, gap)
            if held and not arrived:
                await self._count_again(conn, gap)

    async def _upsert(
        self, conn: AsyncConnection, table: sa.Table, rows: Sequence[dict[str, int | str | None]]
    ) -> None:
        """Few rows, rarely: insert those that are new."""
        for row in rows:
            keys = [column == row[column.name] for column in table.primary_key.columns]
            if await conn.scalar(sa.select(sa.literal(1)).select_from(table).where(*keys)) is None:
                await conn.execute(sa.insert(table).values(**row))

    # --- gaps that were none ---

    async def _watch_gaps(self, conn: AsyncConnection) -> None:
        self._gaps.clear()
        g, w = registry.gaps.c, registry.gateways.c
        recent = await conn.execute(
            sa.select(w.tenant, w.name, g.gap_epoch, g.gateway_id, g.epoch, g.seq, g.first_seq, g.last_seq)
            .join(registry.gateways, w.id == g.gateway_id)
            .where(
                g.first_seq > 0,
                g.lost_scans > 0,
                sa.or_(g.frames == 0, g.frames > g.last_seq - g.first_seq),
            )
            .order_by(g.received_at_ns.desc())
            .limit(MAX_GAPS)
        )
        for row in recent:
            self._watch(f"{row.tenant}/{row.name}", row.gap_epoch, _Gap(*row[3:]))

    def _watch(self, gateway: str, gap_epoch: int, gap: _Gap) -> None:
        if gap.first and sum(map(len, self._gaps.values())) < MAX_GAPS:
            watched = self._gaps.setdefault((gateway, gap_epoch), [])
            if gap not in watched:
                watched.append(gap)

    async def _recount(self, conn: AsyncConnection, records: Sequence[ScanRecord]) -> None:
        if not self._gaps:
            return
        touched: dict[_Gap, None] = {}
        for record in records:
            for gap in self._gaps.get((f"{record.tenant}/{record.gateway}", record.epoch), ()):
                if gap.first <= record.seq <= gap.last:
                    touched[gap] = None
        for gap in touched:
            await self._count_again(conn, gap)

    async def _count_again(self, conn: AsyncConnection, gap: _Gap) -> None:
        """Lost is what the gateway says less what is stored of it here."""
        g, r, p, d = registry.gaps.c, registry.readings.c, registry.points.c, registry.devices.c
        here = (g.gateway_id == gap.gateway_id, g.epoch == gap.epoch, g.seq == gap.seq)
        row = (
            await conn.execute(sa.select(g.gap_epoch, g.scans, g.readings, g.from_ns, g.to_ns).where(*here))
        ).one_or_none()
        if row is None:
            return
        stored = (
            await conn.execute(
                sa.select(sa.func.count(), sa.func.count(sa.distinct(r.seq)))
                .select_from(registry.readings)
                .join(registry.points, p.id == r.point_id)
                .join(registry.devices, d.id == p.device_id)
                .where(
                    d.gateway_id == gap.gateway_id,
                    r.taken_at_ns >= row.from_ns - GAP_SLACK_NS,
                    r.taken_at_ns <= row.to_ns + GAP_SLACK_NS,
                    r.epoch == row.gap_epoch,
                    r.seq >= gap.first,
                    r.seq <= gap.last,
                )
            )
        ).one()
        await conn.execute(
            sa.update(registry.gaps)
            .where(*here)
            .values(lost_readings=max(0, row.readings - stored[0]), lost_scans=max(0, row.scans - stored[1]))
        )

    # --- errors ---

    def _connection(self) -> AsyncEngine:
        if self._engine is None:
            raise StoreChanged(f"sink {self.name} is not open")
        return self._engine

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Whatever the database says, as one of the contract's errors."""
        try:
            yield
        except DBAPIError as err:
            raise self.judge(err.orig or err) from err
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as err:
            raise RetryLater(f"{self.name}: {type(err).__name__}: {err}") from err
        except SQLAlchemyError as err:
            raise self.judge(err) from err


async def whole(work: Coroutine[object, object, T]) -> T:
    """Run a transaction to its end even if the caller is cancelled meanwhile: a connection that is left between begin
    and commit holds its locks, and makes the next use of it fail."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if not task.done():
            await asyncio.wait((task,), timeout=CANCEL_GRACE_S)
        if not task.done():
            task.cancel()
            await asyncio.wait((task,), timeout=CANCEL_GRACE_S)
        elif not task.cancelled():
            task.exception()  # nobody will ask for it any more
        raise


#: One migration at a time in a loop: Alembic keeps the one that runs in globals of its modules.
_migrating: Final[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock]] = (
    weakref.WeakKeyDictionary()
)


async def _bring_up_to_date(engine: AsyncEngine) -> None:
    """Migrate where that is needed. Where it is not, no other store is waited for."""
    async with engine.begin() as conn:
        if await conn.run_sync(_up_to_date):
            return
    lock = _migrating.setdefault(asyncio.get_running_loop(), asyncio.Lock())
    async with engine.begin() as conn, lock:
        await conn.run_sync(migrate)


def _alembic() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent.parent / "migrations"))
    return config


def _up_to_date(conn: sa.Connection) -> bool:
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    has = MigrationContext.configure(conn, opts={"version_table": VERSION_TABLE}).get_current_revision()
    return has == ScriptDirectory.from_config(_alembic()).get_current_head()


def migrate(conn: sa.Connection) -> None:
    """Bring the schema up to date; never two at a time in one process."""
    from alembic import command

    config = _alembic()
    config.attributes["connection"] = conn
    command.upgrade(config, "head")


@contextlib.asynccontextmanager
async def autocommit(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """A connection for statements that commit by themselves."""
    async with engine.connect() as conn:
        yield await conn.execution_options(isolation_level="AUTOCOMMIT")


def _rows_of(record: ScanRecord, known: Known) -> tuple[list[Row], dict[str, list[int]]]:
    """The readings of one scan, and the points refused by reason."""
    at_ns, epoch, seq, received_ns = record.taken_at_ns, record.epoch, record.seq, record.received_at_ns
    synchronized = int(record.clock_synchronized)
    good = 0 if synchronized else int(Reason.CLOCK)
    if not record.reasons and not known.exact and not known.refused:
        return [
            (point_id, at_ns, epoch, seq, value, None, good, synchronized, received_ns)  # type: ignore[misc]  # no text
            for point_id, value in zip(known.ids, record.values, strict=True)
        ], {}
    rows: list[Row] = []
    refused: dict[str, list[int]] = {}
    reasons = record.reasons
    for i, (point_id, value) in enumerate(zip(known.ids, record.values, strict=True)):
        if i in known.refused:
            refused.setdefault(known.refused[i], []).append(i)
            continue
        number, text = _stored(value)
        if text is not None and len(text) * 4 > TEXT_BYTES and len(text.encode()) > TEXT_BYTES:
            refused.setdefault(f"a text of more than {TEXT_BYTES} bytes", []).append(i)
            continue
        reason = int(reasons.get(i, 0)) or good
        if value is None and not reason >= 128:
            reason = int(Reason.MISSING)
        rows.append((point_id, at_ns, epoch, seq, number, text, reason, synchronized, received_ns))
    return rows, refused


def _stored(value: Value | None) -> tuple[float | None, str | None]:
    """The value and text columns: a text by itself; an integer that no double holds in both."""
    if value is None or isinstance(value, str):
        return None, value
    if isinstance(value, float):
        return (value if value - value == 0.0 else None), None
    if -EXACT <= value <= EXACT:
        return int(value), None
    return float(value), str(value)


def _too_long(record: EventRecord | GapRecord) -> str:
    """Why no column holds it; "" where they do."""
    if isinstance(record, EventRecord):
        event = record.event
        if len(event.code) > 64 or len(event.device) > NAME_CHARS or len(event.text.encode()) > TEXT_BYTES:
            return f"an event with a code above 64, a device above {NAME_CHARS} or a text above {TEXT_BYTES} bytes"
        return ""
    if len(record.gap.reason) > 64 or len(record.gap.device) > NAME_CHARS:
        return f"a gap with a reason above 64 or a device above {NAME_CHARS} characters"
    return ""
