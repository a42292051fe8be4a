"""The buffer file's schemas: how a file of one version becomes one of the next, and of the one before.

Rules:
1. A step up rewrites no frame (only some hundred small rows get a CRC), so that an update of the agent costs no time
   at start however full the buffer is; it is one transaction.
2. A step down may touch rows, in transactions of `STEP_ROWS`: killed at any point, the file is one of the newer
   version with fewer rows left to do, and nothing of it is lost. The version changes with the last of them.
3. A file of a version that this code does not know is no damage: it is used where it says that it may be (`usable_by`
   in its table `format`), else refused with both versions and the remedy. Only a version that the file's own `format`
   contradicts is damage (a flipped bit of its header).

An agent of schema 1 takes a newer file for damage and sets it aside. So before its software is put back, the file is
brought down by `python -m agent.store_migrations FILE 1` (or `headgate buffer`), with the agent stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from agent.gap_copies import ADD_COPIES, has_copies
from agent.store_rows import fill, has_crc

SCHEMA_VERSION: Final = 2
STEP_ROWS: Final = 10_000  #: 80 KiB of WAL pages at least, 40 MiB where each row has a page of its own
ALARM_MARK: Final = 0x5A5A5A5A
BULK_MARK: Final = 0xA5A5A5A5
"""What the CRC of a frame of this priority is changed by (exclusive or); that of a normal one is as it is. Any two
differ in 16 bits or more, so no single flip makes one into another."""

_ADDED: Final = ("alarm_frames", "bulk_frames", "gap_frames", "bulk_thinned_to", "normal_thinned_to")
_CRC: Final = tuple(
    f"ALTER TABLE {table} ADD COLUMN crc INTEGER NOT NULL DEFAULT 0" for table in ("clock", "batches")
)
_UP: Final = (
    *(f"ALTER TABLE ledger ADD COLUMN {name} INTEGER NOT NULL DEFAULT 0" for name in _ADDED),
    "CREATE TABLE alarms (seq INTEGER PRIMARY KEY) STRICT",
    "CREATE TABLE bulk (seq INTEGER PRIMARY KEY) STRICT",
    "CREATE TABLE gaps (seq INTEGER PRIMARY KEY, told BLOB) STRICT",
    "CREATE TABLE format (id INTEGER PRIMARY KEY, version INTEGER NOT NULL, usable_by INTEGER NOT NULL) STRICT",
    "INSERT INTO format VALUES (1, 2, 2)",
    "PRAGMA user_version = 2",
)
_DOWN: Final = (
    "DROP TABLE alarms",
    "DROP TABLE bulk",
    "DROP TABLE gaps",
    "DROP TABLE format",
    "ALTER TABLE clock DROP COLUMN crc",
    "ALTER TABLE batches DROP COLUMN crc",
    *(f"ALTER TABLE ledger DROP COLUMN {name}" for name in _ADDED),
    "PRAGMA user_version = 1",
)


class SchemaUnknown(Exception):
    """The file is of a version that this code cannot use; the text names both, and the remedy."""


def fit(conn: sqlite3.Connection, path: Path) -> None:
    """Make the file one that this agent can use. Raises `SchemaUnknown`, and `sqlite3.DatabaseError` for damage."""
    version = version_of(conn)
    if version == SCHEMA_VERSION:
        if not has_crc(conn):  # made before these rows had one
            _in_one(conn, _CRC, fill)
        if not has_copies(conn):  # made before gap frames had a second copy
            _in_one(conn, (ADD_COPIES,))
        return
    if version == 1:
        _in_one(conn, _UP + _CRC, fill)
        return
    told = _format(conn)
    if told is None or told[0] != version:
        raise sqlite3.DatabaseError(f"schema version {version}; this agent knows {SCHEMA_VERSION}")
    if told[1] > SCHEMA_VERSION:
        raise SchemaUnknown(
            f"buffer {path}: it is of schema {version}, made by a newer headgate; this one knows up to schema"
            f" {SCHEMA_VERSION}. Nothing is lost: install the newer headgate again, or with it bring the file back:"
            f" python -m agent.store_migrations {path} {SCHEMA_VERSION}"
        )


def version_of(conn: sqlite3.Connection) -> int:
    return int(conn.execute("PRAGMA user_version").fetchone()[0])


def _format(conn: sqlite3.Connection) -> tuple[int, int] | None:
    try:
        row = conn.execute("SELECT version, usable_by FROM format").fetchone()
    except sqlite3.OperationalError:  # it has no such table
        return None
    return (int(row[0]), int(row[1])) if row else None


def to_version(path: Path, version: int, *, step_rows: int = STEP_ROWS) -> int:
    """Bring a file up or down to this version, with no agent running; how many rows were changed. May be called again
    after it was killed. Raises `SchemaUnknown`, `sqlite3.Error`, and `BlockingIOError` where an agent has the file."""
    if not 1 <= version <= SCHEMA_VERSION:
        raise SchemaUnknown(
            f"buffer {path}: schema {version} is wanted; this headgate knows 1 to {SCHEMA_VERSION}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"buffer {path}: there is no such file")
    with _alone(path), contextlib.closing(sqlite3.connect(path, isolation_level=None)) as conn:
        conn.execute("PRAGMA synchronous = FULL")
        fit(conn, path)
        changed = 0
        if version == 1:
            changed += _unmark(conn, "alarms", "alarm_frames", ALARM_MARK, step_rows)
            changed += _unmark(conn, "bulk", "bulk_frames", BULK_MARK, step_rows)
            _in_one(conn, _DOWN)
        conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return changed


def _unmark(conn: sqlite3.Connection, table: str, count: str, mark: int, step_rows: int) -> int:
    """Make the frames of one priority normal ones, a step at a time."""
    changed = 0
    while True:
        conn.execute("BEGIN IMMEDIATE")
        try:
            seqs = conn.execute(f"SELECT seq FROM {table} ORDER BY seq LIMIT ?", (step_rows,)).fetchall()  # noqa: S608
            if not seqs:
                conn.execute("ROLLBACK")
                return changed
            conn.executemany(
                f"UPDATE frames SET crc = (crc | {mark}) - (crc & {mark}) WHERE seq = ?",  # noqa: S608
                seqs,
            )
            conn.execute(f"DELETE FROM {table} WHERE seq <= ?", seqs[-1])  # noqa: S608 - our own names
            conn.execute(f"UPDATE ledger SET {count} = max(0, {count} - ?)", (len(seqs),))  # noqa: S608
            conn.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                conn.execute("ROLLBACK")
            raise
        changed += len(seqs)
        conn.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()


def _in_one(
    conn: sqlite3.Connection,
    statements: tuple[str, ...],
    then: Callable[[sqlite3.Connection], None] | None = None,
) -> None:
    conn.execute("BEGIN IMMEDIATE")
    try:
        for statement in statements:
            conn.execute(statement)
        if then is not None:
            then(conn)
        conn.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            conn.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """The lock that an agent holds as long as it uses the file."""
    fd = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def main(argv: list[str]) -> int:
    if len(argv) != 2 or not argv[1].isdigit():
        sys.stderr.write("usage: python -m agent.store_migrations FILE VERSION   (with the agent stopped)\n")
        return 2
    path = Path(argv[0])
    try:
        changed = to_version(path, int(argv[1]))
    except BlockingIOError:
        sys.stderr.write(f"buffer {path}: an agent is using it; stop it first: systemctl stop headgate\n")
        return 1
    except (SchemaUnknown, sqlite3.Error, OSError) as err:
        sys.stderr.write(f"{err}\n")
        return 1
    sys.stdout.write(f"buffer {path}: schema {argv[1]}; {changed} rows changed, none removed\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
