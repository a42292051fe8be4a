"""The second copy of each unsettled gap frame: the account of what is lost must not be lost to one rotten row.

Rules:
1. A copy stands in the table `gaps`, in another page than the frame, with a CRC of its own over its seq and its bytes.
2. It is what the frame is, byte for byte: a frame restored from it is the same under the same seq.
3. A gap frame without a copy (of a file that was migrated) is told by its own number alone, should it rot.
"""

from __future__ import annotations

import sqlite3
import zlib
from typing import Final

ADD_COPIES: Final = "ALTER TABLE gaps ADD COLUMN told BLOB"
_CRC_BYTES: Final = 4


def has_copies(conn: sqlite3.Connection) -> bool:
    """False for a file of schema 2 that was made before there were copies. Raises `sqlite3.Error`."""
    return conn.execute("SELECT 1 FROM pragma_table_info('gaps') WHERE name = 'told'").fetchone() is not None


def copy_made(seq: int, frame: bytes) -> bytes:
    """What the table holds for this frame."""
    return frame + zlib.crc32(frame, seq & 0xFFFFFFFF).to_bytes(_CRC_BYTES, "big")


def copy_of(conn: sqlite3.Connection, seq: int) -> bytes | None:
    """The frame as it was; None where no gap frame has this seq, or its copy is damaged too. Raises `sqlite3.Error`."""
    row = conn.execute("SELECT told FROM gaps WHERE seq = ?", (seq,)).fetchone()
    if row is None or not isinstance(row[0], bytes) or len(row[0]) <= _CRC_BYTES:
        return None
    frame = row[0][:-_CRC_BYTES]
    return frame if copy_made(seq, frame) == row[0] else None
