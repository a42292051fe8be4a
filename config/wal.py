"""Whether SQLite is about to pass over commits that stand in a write-ahead log.

SQLite applies a WAL up to the first frame whose checksum fails and takes that for the end, as after a power cut. Rot in
the middle looks the same, and all that was committed behind it would vanish without a word. With `synchronous=FULL`
each commit is synced before the next begins: a power cut leaves at most one commit behind the break, rot any number.

https://www.sqlite.org/fileformat2.html#the_write_ahead_log
"""

from __future__ import annotations

import contextlib
import sqlite3
import struct
import sys
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import quote

_HEADER: Final = struct.Struct(
    ">8I"
)  #: magic, format, page size, checkpoint number, two salts, two checksums
_FRAME: Final = struct.Struct(">4I")  #: page number, size of the database after a commit (else 0), two salts
_FRAME_BYTES: Final = 24
_MAGIC: Final = 0x377F0682
_PAGE_SIZES: Final = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
_MX_FRAME: Final = slice(
    16, 20
)  #: in the WAL index: how many frames the recovery has taken; native byte order


class Log(NamedTuple):
    """What a write-ahead log says of its frames, believed or not; its present generation alone, not what an earlier
    one has left behind. Frames are numbered from 0."""

    page_bytes: int
    sound: bool  #: the header's own checksum holds
    frames: tuple[int, ...]
    commits: tuple[int, ...]  #: those that end a transaction

    def behind(self, taken: int) -> tuple[int, int]:
        """How many frames, and how many commits, stand behind the `taken` ones that SQLite believes."""
        return sum(n >= taken for n in self.frames), sum(n >= taken for n in self.commits)


def read_log(path: Path) -> Log | None:
    """Of the database at `path`; None where there is no log, or an empty one. Changes nothing; to be asked before the
    file is opened, as SQLite deletes a log that it does not believe. Raises `OSError`."""
    try:
        wal = path.with_name(path.name + "-wal").open("rb")
    except FileNotFoundError:
        return None
    with wal:
        head = wal.read(_HEADER.size)
        if len(head) < _HEADER.size or not any(head):
            return None
        magic, _, page_bytes, _, *salts, _, _ = _HEADER.unpack(head)
        sound = magic & ~1 == _MAGIC and _checksum(head[:24], big=bool(magic & 1)) == _HEADER.unpack(head)[6:]
        known = {tuple(salts)}
        if not sound:  # what its frames say of themselves is all there is
            if len(first := wal.read(_FRAME.size)) < _FRAME.size:
                return None
            known = {_FRAME.unpack(first)[2:]}
            page_bytes = page_bytes if page_bytes in _PAGE_SIZES else 4096
        frames: list[int] = []
        commits: list[int] = []
        number = 0
        while True:
            wal.seek(_HEADER.size + number * (_FRAME_BYTES + page_bytes))
            frame = wal.read(_FRAME.size)
            if len(frame) < _FRAME.size:
                break
            _, pages, *its = _FRAME.unpack(frame)
            if tuple(its) in known:
                frames.append(number)
                if pages:
                    commits.append(number)
            number += 1
    return Log(page_bytes, sound, tuple(frames), tuple(commits))


def commits_passed_over(path: Path) -> int:
    """How many commits of the database at `path` stand behind a damaged frame of its WAL. Changes nothing; to be asked
    before the file is opened for writing, which overwrites them. A single one may be a commit that never ended: 0."""
    log = read_log(path)
    if log is None:
        return 0
    taken = _taken(path) if log.sound else 0
    if taken is None:
        return 0
    _, passed = log.behind(taken)
    return passed if passed > 1 else 0


def _taken(path: Path) -> int | None:
    """How many frames SQLite's own recovery takes: asked read-only, so that closing does not remove the WAL."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as conn:
            conn.execute("SELECT count(*) FROM sqlite_schema").fetchone()
            index = path.with_name(path.name + "-shm").read_bytes()[:48]
    except (sqlite3.Error, OSError):
        return None  # damaged in a way that is found without this
    return int.from_bytes(index[_MX_FRAME], sys.byteorder) if len(index) == 48 else None


def _checksum(data: bytes, *, big: bool) -> tuple[int, int]:
    one = two = 0
    for x, y in struct.iter_unpack(">2I" if big else "<2I", data):
        one = (one + x + two) & 0xFFFFFFFF
        two = (two + y + one) & 0xFFFFFFFF
    return one, two
