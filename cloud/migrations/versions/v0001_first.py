"""Gateways, devices, points, latest and past readings, events, gaps and the sink's cursor.

On MySQL `readings` is partitioned by day; the sink adds the days and drops those beyond the retention. A migration is
one transaction on SQLite; MySQL has none for a schema, so each step bears being repeated after a crash.
"""

import time

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_DAY_NS = 86_400 * 10**9
_BIG = sa.BigInteger()
_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _table(name: str, *items: sa.schema.SchemaItem, rowid: bool = True) -> None:
    op.create_table(
        name, *items, if_not_exists=True, sqlite_with_rowid=rowid,
        mysql_engine="InnoDB", mysql_charset="utf8mb4", mysql_collate="utf8mb4_bin",
    )  # fmt: skip


def _number(name: str) -> sa.Column[int]:
    return sa.Column(name, _BIG, nullable=False)


def _text(name: str, chars: int) -> sa.Column[str]:
    return sa.Column(name, sa.String(chars), nullable=False)


def _key(name: str) -> sa.Column[int]:
    return sa.Column(name, _BIG, primary_key=True, autoincrement=False)


def _id() -> sa.Column[int]:
    return sa.Column("id", _ID, primary_key=True, autoincrement=True)


def _reading() -> tuple[sa.schema.SchemaItem, ...]:
    return (
        sa.Column("value", sa.Double(), nullable=True),
        sa.Column("text", sa.Text(), nullable=True),
        sa.Column("reason", sa.SmallInteger(), nullable=False),
        sa.Column("clock_synchronized", sa.SmallInteger(), nullable=False),
        _number("received_at_ns"),
    )


def upgrade() -> None:
    _table(
        "gateways",
        _id(), _text("tenant", 64), _text("name", 64), _number("first_seen_ns"), _number("last_seen_ns"),
        sa.UniqueConstraint("tenant", "name", name="uq_gateways"),
    )  # fmt: skip
    _table(
        "devices",
        _id(), _number("gateway_id"), _text("identity", 32), _text("name", 255), _text("driver", 255),
        _text("measurement", 255), sa.Column("tags", sa.Text(), nullable=False), _number("first_seen_ns"),
        sa.UniqueConstraint("gateway_id", "identity", name="uq_devices"),
    )  # fmt: skip
    _table(
        "points",
        _id(), _number("device_id"), _text("identity", 32), _text("name", 255), _text("type", 8), _text("unit", 64),
        sa.Column("version", sa.Integer(), nullable=False), _number("first_seen_ns"),
        sa.UniqueConstraint("device_id", "identity", name="uq_points"),
    )  # fmt: skip
    _table(
        "latest",
        sa.Column("point_id", _ID, primary_key=True, autoincrement=False),
        _number("taken_at_ns"), _number("epoch"), _number("seq"), *_reading(),
    )  # fmt: skip
    _table(
        "readings",
        _key("point_id"), _key("taken_at_ns"), _key("epoch"), _key("seq"), *_reading(),
        rowid=False,
    )  # fmt: skip
    _table(
        "events",
        _key("gateway_id"), _key("epoch"), _key("seq"), _number("at_ns"), _text("code", 64), _text("device", 255),
        sa.Column("text", sa.Text(), nullable=False), _number("received_at_ns"),
    )  # fmt: skip
    _table(
        "gaps",
        _key("gateway_id"), _key("epoch"), _key("seq"), _number("gap_epoch"), _number("first_seq"),
        _number("last_seq"), _number("scans"), _number("readings"), _number("lost_scans"), _number("lost_readings"),
        _text("reason", 64), _text("device", 255), _number("from_ns"), _number("to_ns"), _number("received_at_ns"),
    )  # fmt: skip
    _table("cursors", sa.Column("sink", sa.String(64), primary_key=True), _number("upto_offset"))
    if op.get_bind().dialect.name in ("mysql", "mariadb") and not _partitioned():
        today_ns = time.time_ns() // _DAY_NS * _DAY_NS
        op.execute(
            "ALTER TABLE readings PARTITION BY RANGE (taken_at_ns)"
            f" (PARTITION p_before VALUES LESS THAN ({today_ns}))"
        )


def _partitioned() -> bool:
    query = sa.text(
        "SELECT count(*) FROM information_schema.partitions WHERE table_schema = DATABASE()"
        " AND table_name = 'readings' AND partition_name IS NOT NULL"
    )
    return bool(op.get_bind().scalar(query))
