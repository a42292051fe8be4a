"""What the SQL stores hold, and how to ask them: gateways, devices, points, latest and past readings, events, gaps.

One code for SQLite and MySQL/MariaDB. The tables are made by `cloud/migrations`; `cloud/sinks/sql.py` fills them.

Rules:
1. A point is (device, name, type, unit). A layout that gives a known name another type or unit makes a new version of
   the point beside the old one: no batch is blocked, and no value is read as what it is not.
2. Registering is idempotent, and an old layout that comes late finds its old version.
3. A name that no column holds, or that a layout gives to two points, is refused point by point.
4. New series are limited per gateway and hour (`SeriesGuard`), before any sink sees them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from cloud.sinks.contract import ScanRecord
from drivers.contract import Quality, Reason
from sync.wire import Layout

log = logging.getLogger(__name__)

NAME_CHARS: Final = 255  #: device, driver, measurement, point
UNIT_CHARS: Final = 64
TEXT_BYTES: Final = 65_535  #: MySQL's TEXT
MAX_KNOWN: Final = 20_000  #: layouts whose point ids are kept in memory
PAGE: Final = 5_000  #: rows per query: no cursor stays open while a client reads slowly

metadata = sa.MetaData(naming_convention={"uq": "uq_%(table_name)s"})
_Id: Final = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite counts up an INTEGER only


def _table(name: str, *items: sa.schema.SchemaItem, rowid: bool = True) -> sa.Table:
    return sa.Table(
        name, metadata, *items, sqlite_with_rowid=rowid,
        mysql_engine="InnoDB", mysql_charset="utf8mb4", mysql_collate="utf8mb4_bin",
    )  # fmt: skip


gateways = _table(
    "gateways",
    sa.Column("id", _Id, primary_key=True, autoincrement=True),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("first_seen_ns", sa.BigInteger, nullable=False),
    sa.Column("last_seen_ns", sa.BigInteger, nullable=False),
    sa.UniqueConstraint("tenant", "name"),
)  # fmt: skip
devices = _table(
    "devices",
    sa.Column("id", _Id, primary_key=True, autoincrement=True),
    sa.Column("gateway_id", sa.BigInteger, nullable=False),
    sa.Column("identity", sa.String(32), nullable=False),  # of the name: MySQL compares 'a' and 'a ' as equal
    sa.Column("name", sa.String(NAME_CHARS), nullable=False),
    sa.Column("driver", sa.String(NAME_CHARS), nullable=False),
    sa.Column("measurement", sa.String(NAME_CHARS), nullable=False),
    sa.Column("tags", sa.Text, nullable=False),  # JSON object
    sa.Column("first_seen_ns", sa.BigInteger, nullable=False),
    sa.UniqueConstraint("gateway_id", "identity"),
)  # fmt: skip
points = _table(
    "points",
    sa.Column("id", _Id, primary_key=True, autoincrement=True),
    sa.Column("device_id", sa.BigInteger, nullable=False),
    sa.Column("identity", sa.String(32), nullable=False),  # of (name, type, unit)
    sa.Column("name", sa.String(NAME_CHARS), nullable=False),
    sa.Column("type", sa.String(8), nullable=False),
    sa.Column("unit", sa.String(UNIT_CHARS), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("first_seen_ns", sa.BigInteger, nullable=False),
    sa.UniqueConstraint("device_id", "identity"),
)  # fmt: skip


def _reading_columns() -> list[sa.Column[Any]]:
    return [
        sa.Column("value", sa.Double, nullable=True),
        sa.Column("text", sa.Text, nullable=True),
        sa.Column("reason", sa.SmallInteger, nullable=False),
        sa.Column("clock_synchronized", sa.SmallInteger, nullable=False),
        sa.Column("received_at_ns", sa.BigInteger, nullable=False),
    ]


latest = _table(
    "latest",
    sa.Column("point_id", _Id, primary_key=True, autoincrement=False),
    sa.Column("taken_at_ns", sa.BigInteger, nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("seq", sa.BigInteger, nullable=False),
    *_reading_columns(),
)  # fmt: skip
readings = _table(
    "readings",
    sa.Column("point_id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("taken_at_ns", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("epoch", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    *_reading_columns(),
    rowid=False,
)  # fmt: skip
events = _table(
    "events",
    sa.Column("gateway_id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("epoch", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("at_ns", sa.BigInteger, nullable=False),
    sa.Column("code", sa.String(64), nullable=False),
    sa.Column("device", sa.String(NAME_CHARS), nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("received_at_ns", sa.BigInteger, nullable=False),
)  # fmt: skip
gaps = _table(
    "gaps",
    sa.Column("gateway_id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("epoch", sa.BigInteger, primary_key=True, autoincrement=False),  # of the report
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("gap_epoch", sa.BigInteger, nullable=False),
    sa.Column("first_seq", sa.BigInteger, nullable=False),
    sa.Column("last_seq", sa.BigInteger, nullable=False),
    sa.Column("scans", sa.BigInteger, nullable=False),  # as the gateway reports them
    sa.Column("readings", sa.BigInteger, nullable=False),
    sa.Column("lost_scans", sa.BigInteger, nullable=False),  # less what arrived after all
    sa.Column("lost_readings", sa.BigInteger, nullable=False),
    sa.Column("reason", sa.String(64), nullable=False),
    sa.Column("device", sa.String(NAME_CHARS), nullable=False),
    sa.Column("from_ns", sa.BigInteger, nullable=False),
    sa.Column("to_ns", sa.BigInteger, nullable=False),
    sa.Column("received_at_ns", sa.BigInteger, nullable=False),
    sa.Column("priority", sa.String(16), nullable=False, server_default=""),  # "": unknown, or several
    sa.Column("frames", sa.BigInteger, nullable=False, server_default="0"),  # gone of the range; 0: all
)  # fmt: skip
cursors = _table(
    "cursors",
    sa.Column("sink", sa.String(64), primary_key=True),
    sa.Column("upto_offset", sa.BigInteger, nullable=False),
)  # fmt: skip


# --- registering ---


class Known(msgspec.Struct, frozen=True):
    """A layout of one gateway, registered. `ids[i]` is point i's id, 0 where it is refused (see `refused`)."""

    gateway_id: int
    ids: tuple[int, ...]
    refused: dict[int, str]
    exact: tuple[int, ...]  #: points whose values a DOUBLE may not hold: strings and 64-bit integers


class NameRefused(ValueError):
    """The device itself cannot be registered: no column holds its names."""


class Registrar:
    """Makes layouts known in one store, and remembers which are."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str, int], Known] = {}
        self._gateways: dict[tuple[str, str], int] = {}

    def known(self, record: ScanRecord) -> Known | None:
        return self._known.get((record.tenant, record.gateway, record.layout_id))

    def gateway_id(self, tenant: str, gateway: str) -> int | None:
        return self._gateways.get((tenant, gateway))

    def forget(self) -> None:
        """The store may be another one now."""
        self._known.clear()
        self._gateways.clear()

    async def register_gateway(self, conn: AsyncConnection, tenant: str, gateway: str, now_ns: int) -> int:
        """Its id. Runs in the caller's transaction; `remember_*` only after its commit."""
        known = await conn.scalar(
            sa.select(gateways.c.id).where(gateways.c.tenant == tenant, gateways.c.name == gateway)
        )
        if known is None:
            result = await conn.execute(
                sa.insert(gateways).values(
                    tenant=tenant, name=gateway, first_seen_ns=now_ns, last_seen_ns=now_ns
                )
            )
            known = _new_id(result)
        return int(known)

    async def register(self, conn: AsyncConnection, record: ScanRecord) -> Known:
        """The layout's points in this store, made where missing. Raises `NameRefused`."""
        layout = record.layout
        _check_device(layout)
        now_ns = record.received_at_ns
        gateway_id = await self.register_gateway(conn, record.tenant, record.gateway, now_ns)
        device_id = await _register_device(conn, gateway_id, layout, now_ns)
        refused = refused_points(layout)
        by_identity = await _register_points(conn, device_id, layout, refused, now_ns)
        ids = tuple(
            0 if i in refused else by_identity[_point_identity(layout, i)] for i in range(len(layout.names))
        )
        exact = tuple(i for i, kind in enumerate(layout.types) if kind in ("str", "i64", "u64"))
        return Known(gateway_id, ids, refused, exact)

    def remember(self, record: ScanRecord, known: Known) -> None:
        """Only once the registration is committed."""
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        self._known[record.tenant, record.gateway, record.layout_id] = known
        self.remember_gateway(record.tenant, record.gateway, known.gateway_id)

    def remember_gateway(self, tenant: str, gateway: str, gateway_id: int) -> None:
        self._gateways[tenant, gateway] = gateway_id


def refused_points(layout: Layout) -> dict[int, str]:
    """Points that no table can tell apart or hold, and why."""
    refused: dict[int, str] = {}
    seen: set[str] = set()
    for i, (name, unit) in enumerate(zip(layout.names, layout.units, strict=True)):
        if len(name) > NAME_CHARS or not name:
            refused[i] = f"a point's name has {len(name)} characters; 1 to {NAME_CHARS} are possible"
        elif len(unit) > UNIT_CHARS:
            refused[i] = (
                f"point {name!r}: its unit has {len(unit)} characters; up to {UNIT_CHARS} are possible"
            )
        elif name in seen:
            refused[i] = f"device {layout.device!r} names two points {name!r}: rename one"
        seen.add(name)
    return refused


def _check_device(layout: Layout) -> None:
    for what, text in (
        ("name", layout.device),
        ("driver", layout.driver),
        ("measurement", layout.measurement),
    ):
        if len(text) > NAME_CHARS:
            raise NameRefused(
                f"a device's {what} has {len(text)} characters; up to {NAME_CHARS} are possible"
            )
    if len(_tags(layout).encode()) > TEXT_BYTES:
        raise NameRefused(f"device {layout.device!r}: its tags are longer than {TEXT_BYTES} bytes")


def _tags(layout: Layout) -> str:
    return msgspec.json.encode(dict(sorted(layout.tags))).decode()


def _identity(*parts: str) -> str:
    return hashlib.blake2b(msgspec.json.encode(parts), digest_size=16).hexdigest()


def _point_identity(layout: Layout, i: int) -> str:
    return _identity(layout.names[i], layout.types[i], layout.units[i])


def _new_id(result: sa.CursorResult[Any]) -> int:
    key = result.inserted_primary_key
    if key is None:
        raise RuntimeError("the store gave no id for a row that it took")
    return int(key[0])


async def _register_device(conn: AsyncConnection, gateway_id: int, layout: Layout, now_ns: int) -> int:
    identity = _identity(layout.device)
    row = (
        await conn.execute(
            sa.select(devices.c.id, devices.c.driver, devices.c.measurement, devices.c.tags).where(
                devices.c.gateway_id == gateway_id, devices.c.identity == identity
            )
        )
    ).one_or_none()
    says = {"driver": layout.driver, "measurement": layout.measurement, "tags": _tags(layout)}
    if row is None:
        result = await conn.execute(
            sa.insert(devices).values(
                gateway_id=gateway_id, identity=identity, name=layout.device, first_seen_ns=now_ns, **says
            )
        )
        return _new_id(result)
    if (row.driver, row.measurement, row.tags) != tuple(says.values()):
        await conn.execute(sa.update(devices).where(devices.c.id == row.id).values(**says))
    return int(row.id)


async def _register_points(
    conn: AsyncConnection, device_id: int, layout: Layout, refused: Mapping[int, str], now_ns: int
) -> dict[str, int]:
    """Ids by identity, of all points of the device."""
    held = sa.select(points.c.identity, points.c.id, points.c.name, points.c.version).where(
        points.c.device_id == device_id
    )
    rows = (await conn.execute(held)).all()
    known = {row.identity: int(row.id) for row in rows}
    versions: dict[str, int] = {}
    for row in rows:
        versions[row.name] = max(versions.get(row.name, 0), row.version)
    fresh = []
    for i, name in enumerate(layout.names):
        identity = _point_identity(layout, i)
        if i in refused or identity in known:
            continue
        versions[name] = versions.get(name, 0) + 1
        fresh.append(
            {
                "device_id": device_id, "identity": identity, "name": name, "type": layout.types[i],
                "unit": layout.units[i], "version": versions[name], "first_seen_ns": now_ns,
            }
        )  # fmt: skip
    if fresh:
        await conn.execute(sa.insert(points), fresh)
        known = {row.identity: int(row.id) for row in await conn.execute(held)}
    return known


# --- asking ---


class GatewayRow(msgspec.Struct, frozen=True):
    id: int
    tenant: str
    name: str
    first_seen_ns: int
    last_seen_ns: int


class DeviceRow(msgspec.Struct, frozen=True):
    id: int
    gateway_id: int
    name: str
    driver: str
    measurement: str
    tags: dict[str, str]
    first_seen_ns: int


class PointRow(msgspec.Struct, frozen=True):
    id: int
    device_id: int
    name: str
    type: str
    unit: str
    version: int
    first_seen_ns: int


class Key(msgspec.Struct, frozen=True, order=True):
    """Where a page of readings ends; give it as `after` for the next."""

    point_id: int
    taken_at_ns: int
    epoch: int
    seq: int


class ReadingRow(msgspec.Struct, frozen=True):
    """One reading as a person asks for it."""

    device: str
    point: str
    unit: str
    type: str
    version: int
    taken_at_ns: int
    value: float | int | str | bool | None
    quality: Quality
    reason: int
    clock_synchronized: bool
    received_at_ns: int
    key: Key


class EventRow(msgspec.Struct, frozen=True):
    gateway_id: int
    epoch: int
    seq: int
    at_ns: int
    code: str
    device: str
    text: str
    received_at_ns: int


class GapRow(msgspec.Struct, frozen=True):
    gateway_id: int
    epoch: int
    seq: int
    gap_epoch: int
    first_seq: int
    last_seq: int
    scans: int
    readings: int
    lost_scans: int
    lost_readings: int
    reason: str
    device: str
    from_ns: int
    to_ns: int
    received_at_ns: int
    priority: str = ""
    frames: int = 0


class GapTally(msgspec.Struct, frozen=True):
    """The gaps of one gateway, reason and priority."""

    tenant: str
    gateway: str
    reason: str
    priority: str
    gaps: int
    lost_scans: int
    lost_readings: int


class GatewayTally(msgspec.Struct, frozen=True):
    """For the audit: kept on the gateway = stored here + gaps (+ what retention has removed since)."""

    tenant: str
    gateway: str
    readings: int
    gap_readings: int
    gap_scans: int
    repeated: int = 0  #: of the readings, how many have the identity (epoch, seq, point) of another
    by_epoch: dict[int, int] = {}  #: without the repeated


class Registry:
    """Questions to one SQL store. Every call is short: no transaction stays open between pages."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self._queries: set[asyncio.Future[Sequence[Any]]] = set()

    async def close(self) -> None:
        await asyncio.gather(*self._queries, return_exceptions=True)
        await self.engine.dispose()

    async def gateways(self, *, tenant: str | None = None) -> list[GatewayRow]:
        query = sa.select(gateways).order_by(gateways.c.tenant, gateways.c.name)
        if tenant is not None:
            query = query.where(gateways.c.tenant == tenant)
        return [GatewayRow(*row) for row in await self._all(query)]

    async def gateway(self, tenant: str, name: str) -> GatewayRow | None:
        rows = await self._all(
            sa.select(gateways).where(gateways.c.tenant == tenant, gateways.c.name == name)
        )
        return GatewayRow(*rows[0]) if rows else None

    async def devices(self, gateway_id: int) -> list[DeviceRow]:
        c = devices.c
        rows = await self._all(
            sa.select(c.id, c.gateway_id, c.name, c.driver, c.measurement, c.tags, c.first_seen_ns)
            .where(c.gateway_id == gateway_id)
            .order_by(c.name, c.id)
        )
        return [
            DeviceRow(
                row.id, row.gateway_id, row.name, row.driver, row.measurement,
                msgspec.json.decode(row.tags, type=dict[str, str]), row.first_seen_ns,
            )
            for row in rows
        ]  # fmt: skip

    async def points(self, device_id: int) -> list[PointRow]:
        c = points.c
        rows = await self._all(
            sa.select(c.id, c.device_id, c.name, c.type, c.unit, c.version, c.first_seen_ns)
            .where(c.device_id == device_id)
            .order_by(c.name, c.version)
        )
        return [PointRow(*row) for row in rows]

    async def latest(self, gateway_id: int, *, device: str | None = None) -> list[ReadingRow]:
        """The newest reading of every point of a gateway, or of one of its devices."""
        named = await self._named(gateway_id, device, None)
        found: list[ReadingRow] = []
        ids = sorted(named)
        for at in range(0, len(ids), 500):
            rows = await self._all(sa.select(latest).where(latest.c.point_id.in_(ids[at : at + 500])))
            found += [_reading(named[row.point_id], row) for row in rows]
        return sorted(found, key=lambda r: (r.device, r.point, r.version))

    async def readings(
        self,
        gateway_id: int,
        *,
        device: str | None = None,
        point: str | None = None,
        from_ns: int = 0,
        to_ns: int = 2**63 - 1,
        limit: int | None = None,
        after: Key | None = None,
    ) -> AsyncIterator[ReadingRow]:
        """Readings with from_ns <= taken_at_ns < to_ns, point by point, each in order of time."""
        named = await self._named(gateway_id, device, point)
        left = limit
        c = readings.c
        for point_id in sorted(named):
            if after is not None and point_id < after.point_id:
                continue
            at: Key | None = after if after is not None and after.point_id == point_id else None
            while left is None or left > 0:
                query = (
                    sa.select(readings)
                    .where(c.point_id == point_id, c.taken_at_ns >= from_ns, c.taken_at_ns < to_ns)
                    .order_by(c.taken_at_ns, c.epoch, c.seq)
                    .limit(PAGE if left is None else min(PAGE, left))
                )
                if at is not None:
                    query = query.where(c.taken_at_ns >= at.taken_at_ns).where(
                        sa.or_(
                            c.taken_at_ns > at.taken_at_ns,
                            c.epoch > at.epoch,
                            sa.and_(c.epoch == at.epoch, c.seq > at.seq),
                        )
                    )
                rows = await self._all(query)
                for row in rows:
                    yield _reading(named[point_id], row)
                if left is not None:
                    left -= len(rows)
                if len(rows) < PAGE:
                    break
                at = Key(point_id, rows[-1].taken_at_ns, rows[-1].epoch, rows[-1].seq)

    async def events(
        self, gateway_id: int, *, from_ns: int = 0, to_ns: int = 2**63 - 1, limit: int = 1000
    ) -> list[EventRow]:
        """The newest first."""
        c = events.c
        rows = await self._all(
            sa.select(events)
            .where(c.gateway_id == gateway_id, c.at_ns >= from_ns, c.at_ns < to_ns)
            .order_by(c.at_ns.desc(), c.seq.desc())
            .limit(limit)
        )
        return [EventRow(*row) for row in rows]

    async def gaps(self, gateway_id: int | None, *, since_ns: int = 0, limit: int = 1000) -> list[GapRow]:
        """Told since then, the newest first; None: of all gateways."""
        c = gaps.c
        query = sa.select(gaps).where(c.received_at_ns >= since_ns)
        if gateway_id is not None:
            query = query.where(c.gateway_id == gateway_id)
        rows = await self._all(
            query.order_by(c.received_at_ns.desc(), c.epoch.desc(), c.seq.desc()).limit(limit)
        )
        return [GapRow(*row) for row in rows]

    async def gap_tally(self) -> list[GapTally]:
        """All that gateways have reported as lost, by reason and priority."""
        g, w = gaps.c, gateways.c
        rows = await self._all(
            sa.select(
                w.tenant, w.name, g.reason, g.priority, sa.func.count(), sa.func.sum(g.lost_scans),
                sa.func.sum(g.lost_readings),
            )
            .join(gateways, w.id == g.gateway_id)
            .group_by(w.tenant, w.name, g.reason, g.priority)
            .order_by(w.tenant, w.name, g.reason, g.priority)
        )  # fmt: skip
        return [GapTally(*row[:4], *(int(n) for n in row[4:])) for row in rows]

    async def gap_ranges(self) -> dict[tuple[str, int], list[tuple[int, int]]]:
        """The seqs that were reported as lost, by gateway and epoch."""
        g, w = gaps.c, gateways.c
        found: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for tenant, name, epoch, first, last in await self._all(
            sa.select(w.tenant, w.name, g.gap_epoch, g.first_seq, g.last_seq)
            .join(gateways, w.id == g.gateway_id)
            .where(g.first_seq > 0)
        ):
            found.setdefault((f"{tenant}/{name}", epoch), []).append((first, last))
        return found

    async def tally(self) -> list[GatewayTally]:
        """Readings and gaps per gateway, counted row by row: for the audit, not for a dashboard."""
        r = readings.c
        per_point = (
            sa.select(
                r.point_id, r.epoch, sa.func.count().label("stored"),
                sa.func.count(sa.distinct(r.seq)).label("once"),
            )
            .group_by(r.point_id, r.epoch)
            .subquery()
        )  # fmt: skip
        stored: Counter[int] = Counter()
        by_epoch: defaultdict[int, dict[int, int]] = defaultdict(dict)
        for gateway_id, epoch, rows, once in await self._all(
            sa.select(
                devices.c.gateway_id,
                per_point.c.epoch,
                sa.func.sum(per_point.c.stored),
                sa.func.sum(per_point.c.once),
            )
            .join(points, points.c.id == per_point.c.point_id)
            .join(devices, devices.c.id == points.c.device_id)
            .group_by(devices.c.gateway_id, per_point.c.epoch)
        ):
            stored[gateway_id] += int(rows)
            by_epoch[gateway_id][int(epoch)] = int(once)
        lost = {
            row.gateway_id: row
            for row in await self._all(
                sa.select(
                    gaps.c.gateway_id,
                    sa.func.sum(gaps.c.lost_readings).label("readings"),
                    sa.func.sum(gaps.c.lost_scans).label("scans"),
                ).group_by(gaps.c.gateway_id)
            )
        }
        return [
            GatewayTally(
                row.tenant, row.name, stored[row.id],
                int(lost[row.id].readings) if row.id in lost else 0, int(lost[row.id].scans) if row.id in lost else 0,
                stored[row.id] - sum(by_epoch[row.id].values()), by_epoch[row.id],
            )
            for row in await self.gateways()
        ]  # fmt: skip

    async def cursor(self, sink: str) -> int | None:
        rows = await self._all(sa.select(cursors.c.upto_offset).where(cursors.c.sink == sink))
        return int(rows[0][0]) if rows else None

    async def _named(
        self, gateway_id: int, device: str | None, point: str | None
    ) -> dict[int, tuple[str, PointRow]]:
        c = points.c
        query = (
            sa.select(
                devices.c.name.label("device"),
                c.id,
                c.device_id,
                c.name,
                c.type,
                c.unit,
                c.version,
                c.first_seen_ns,
            )
            .join(devices, devices.c.id == c.device_id)
            .where(devices.c.gateway_id == gateway_id)
        )
        if device is not None:
            query = query.where(devices.c.identity == _identity(device))
        if point is not None:
            query = query.where(c.name == point)
        found = {row.id: (row.device, PointRow(*row[1:])) for row in await self._all(query)}
        return {k: v for k, v in found.items() if point is None or v[1].name == point}

    async def _all(self, query: sa.Select[Any]) -> Sequence[Any]:
        """Rows are as wide as their query; each caller makes its struct of them. A caller that is cancelled (a client
        went away) leaves no transaction open: the query ends by itself."""
        task = asyncio.ensure_future(self._run(query))
        self._queries.add(task)
        task.add_done_callback(self._queries.discard)
        return await asyncio.shield(task)

    async def _run(self, query: sa.Select[Any]) -> Sequence[Any]:
        async with self.engine.connect() as conn:
            rows: Sequence[Any] = (await conn.execute(query)).all()
            return rows


def _reading(named: tuple[str, PointRow], row: sa.Row[Any]) -> ReadingRow:
    device, point = named
    return ReadingRow(
        device, point.name, point.unit, point.type, point.version, row.taken_at_ns,
        _typed(point.type, row.value, row.text), Reason(row.reason).quality, row.reason,
        bool(row.clock_synchronized), row.received_at_ns,
        Key(row.point_id, row.taken_at_ns, row.epoch, row.seq),
    )  # fmt: skip


def _typed(kind: str, value: float | None, text: str | None) -> float | int | str | bool | None:
    if kind == "str":
        return text
    if value is None:
        return None
    if kind == "bool":
        return bool(value)
    return int(text) if text is not None else value  # an integer that no double holds


# --- the limit on new series ---

_GUARD_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS series (
    gateway TEXT NOT NULL,
    identity BLOB NOT NULL,
    first_seen_ns INTEGER NOT NULL,
    PRIMARY KEY (gateway, identity)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS series_age ON series (gateway, first_seen_ns);
"""
_HOUR_NS: Final = 3_600 * 10**9


class SeriesGuard:
    """Lets each gateway make so many new series an hour; one object for all sinks, so that they agree.

    What is above the limit is refused point by point (the runner makes dead letters of it), and asked about again
    after `_ASK_AGAIN_NS`. A file in the data folder remembers which series are known; losing it only means that the
    limit counts known series as new once more.
    """

    _ASK_AGAIN_NS = 60 * 10**9

    def __init__(self, path: Path, *, per_hour: int, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._path = path
        self._per_hour = per_hour
        self._clock_ns = clock_ns
        self._admitted: set[tuple[str, str, int]] = set()
        self._refused: dict[tuple[str, str, int], tuple[int, tuple[int, ...]]] = {}
        self._one_at_a_time = asyncio.Lock()
        self._db: sqlite3.Connection | None = None
        self.refused_total: dict[str, int] = {}  #: readings refused, per gateway, by every sink that asked
        self._alarm_ns: dict[str, int] = {}  #: the last refusal; one warning until an hour passes without any

    @property
    def reason(self) -> str:
        return (
            f"more than {self._per_hour} new series in an hour from this gateway: check its device names, or raise "
            "limits.new_series_per_hour; then replay"
        )

    async def refused(self, record: ScanRecord) -> tuple[int, ...]:
        """Indices of the points that may not become series now."""
        key = (record.tenant, record.gateway, record.layout_id)
        if key in self._admitted:
            return ()
        until_ns, points = self._refused.get(key, (0, ()))
        if self._clock_ns() >= until_ns:
            points = await self._ask(key, record, self._per_hour)
        if points:
            name = f"{record.tenant}/{record.gateway}"
            self.refused_total[name] = self.refused_total.get(name, 0) + len(points)
            self._alarm(name, record)
        return points

    async def admit(self, record: ScanRecord) -> None:
        """All of its points are known from now on, whatever the limit."""
        await self._ask((record.tenant, record.gateway, record.layout_id), record, 2**62)

    async def close(self) -> None:
        async with self._one_at_a_time:
            if self._db is not None:
                self._db.close()
                self._db = None

    def _alarm(self, gateway: str, record: ScanRecord) -> None:
        now_ns = self._clock_ns()
        last_ns = self._alarm_ns.get(gateway)
        self._alarm_ns[gateway] = now_ns
        if last_ns is None or now_ns - last_ns >= _HOUR_NS:
            log.warning("gateway %s, device %s: %s", gateway, record.layout.device, self.reason)

    async def _ask(self, key: tuple[str, str, int], record: ScanRecord, limit: int) -> tuple[int, ...]:
        async with self._one_at_a_time:
            points = await asyncio.to_thread(self._count, record, limit)
        if len(self._admitted) + len(self._refused) >= MAX_KNOWN:
            self._admitted.clear()
            self._refused.clear()
        if points:
            self._refused[key] = (self._clock_ns() + self._ASK_AGAIN_NS, points)
        else:
            self._refused.pop(key, None)
            self._admitted.add(key)
        return points

    def _count(self, record: ScanRecord, limit: int) -> tuple[int, ...]:
        db = self._open()
        gateway = f"{record.tenant}/{record.gateway}"
        now_ns = self._clock_ns()
        layout = record.layout
        fresh: list[tuple[int, bytes]] = []
        for i in range(len(layout.names)):
            identity = bytes.fromhex(
                _identity(layout.device, layout.names[i], layout.types[i], layout.units[i])
            )
            if not db.execute(
                "SELECT 1 FROM series WHERE gateway = ? AND identity = ?", (gateway, identity)
            ).fetchone():
                fresh.append((i, identity))
        if not fresh:
            return ()
        (recent,) = db.execute(
            "SELECT count(*) FROM series WHERE gateway = ? AND first_seen_ns > ?",
            (gateway, now_ns - _HOUR_NS),
        ).fetchone()
        room = max(0, limit - recent)
        with contextlib.closing(db.cursor()) as cursor:
            cursor.execute("BEGIN IMMEDIATE")
            cursor.executemany(
                "INSERT OR IGNORE INTO series VALUES (?, ?, ?)",
                [(gateway, identity, now_ns) for _, identity in fresh[:room]],
            )
            cursor.execute("COMMIT")
        return tuple(i for i, _ in fresh[room:])

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=30.0)
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")  # it holds nothing that cannot be counted again
            db.executescript(_GUARD_SCHEMA)
            self._db = db
        return self._db
