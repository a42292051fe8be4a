"""The small rows of the buffer's file that other rows rely on: clock rows and recorded batches, each with its CRC.

Rules:
1. A row that fails its CRC is not believed: one flipped bit in a clock row would give wrong times to all the readings
   of its boot. Another row of the boot serves instead, or the cloud estimates.
2. Rows are ordered by what they say, which their CRC covers, and not by their id.
3. Rows of a file of schema 1 have no CRC: they are believed where they can be true.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from sync.wire import ClockRow

_CLOCK: Final = "boot, CAST(boot_id AS BLOB), boot_ns, wall_ns, synchronized, error_ns, next_seq"
"""The text as bytes: one flipped bit makes it no UTF-8, of which SQLite's module would make an error of the file."""


def rows_crc(values: Sequence[object]) -> int:
    """Over a row's values, each with its type: a flipped bit of SQLite's own record header shows, too."""
    return zlib.crc32(repr(tuple(values)).encode())


def has_crc(conn: sqlite3.Connection) -> bool:
    """False for schema 1. Raises `sqlite3.Error`."""
    found = conn.execute("SELECT 1 FROM pragma_table_info('clock') WHERE name = 'crc'").fetchone()
    return found is not None


def insert_clock(conn: sqlite3.Connection, row: ClockRow, next_seq: int) -> int:
    """The id that it has then."""
    values = (
        row.boot,
        row.boot_id.encode(),
        row.boot_ns,
        row.wall_ns,
        int(row.synchronized),
        row.error_ns,
        next_seq,
    )
    done = conn.execute(
        "INSERT INTO clock (boot, boot_id, boot_ns, wall_ns, synchronized, error_ns, next_seq, crc)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (row.boot, row.boot_id, *values[2:], rows_crc(values)),
    )
    return int(done.lastrowid or 0)


def read_clocks(conn: sqlite3.Connection) -> Iterator[tuple[int, ClockRow | None, int]]:
    """Oldest first: id, row and next_seq; None for a row that is damaged. Raises `sqlite3.Error`."""
    crc = "crc" if has_crc(conn) else "NULL"
    for number, *values, told in conn.execute(
        f"SELECT id, {_CLOCK}, {crc} FROM clock ORDER BY boot, boot_ns, id"  # noqa: S608 - our own names
    ):
        good = crc == "NULL" or told == rows_crc(values)
        row = clock_row(values) if good else None
        if isinstance(values[6], int):
            yield number, row, values[6]
        else:
            yield number, None, 0


def clock_row(values: Sequence[object]) -> ClockRow | None:
    """boot, boot_id (text or its bytes), boot_ns, wall_ns, synchronized, error_ns; None where they cannot be true."""
    boot, boot_id, boot_ns, wall_ns, synchronized, error_ns = values[:6]
    if isinstance(boot_id, bytes):
        try:
            boot_id = boot_id.decode()
        except UnicodeDecodeError:
            return None
    numbers = all(isinstance(n, int) for n in (boot, boot_ns, wall_ns, synchronized, error_ns))
    if (
        not numbers
        or not isinstance(boot_id, str)
        or not 0 < len(boot_id) <= 64
        or synchronized not in (0, 1)
    ):
        return None
    if int(boot) < 1 or int(boot_ns) < 0:  # type: ignore[call-overload]  # checked above
        return None
    return msgspec.convert([boot, boot_id, boot_ns, wall_ns, bool(synchronized), error_ns], ClockRow)


def read_batches(conn: sqlite3.Connection) -> Iterator[tuple[tuple[int, int, int, int, bytes], bool]]:
    """The recorded batches in order, and whether each may be believed. Raises `sqlite3.Error`."""
    crc = "crc" if has_crc(conn) else "NULL"
    for *values, told in conn.execute(
        f"SELECT first, last, readings, bytes, clocks, {crc} FROM batches ORDER BY first"  # noqa: S608 - our own names
    ):
        yield tuple(values), crc == "NULL" or told == rows_crc(values)


def fill(conn: sqlite3.Connection) -> None:
    """The CRCs of what has none yet: some hundred rows at most. Raises `sqlite3.Error`."""
    rows = conn.execute(f"SELECT id, {_CLOCK} FROM clock").fetchall()  # noqa: S608 - our own names
    conn.executemany("UPDATE clock SET crc = ? WHERE id = ?", [(rows_crc(row[1:]), row[0]) for row in rows])
    batches = conn.execute("SELECT first, last, readings, bytes, clocks FROM batches").fetchall()
    conn.executemany(
        "UPDATE batches SET crc = ? WHERE first = ?", [(rows_crc(row), row[0]) for row in batches]
    )
