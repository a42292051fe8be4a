"""A sound journal from a damaged one: every entry and interval whose CRC holds, found page by page, not by the tree.

Rules:
1. Only what its own CRC proves is taken. An entry's bytes never change and an interval only grows, so a proven row is
   right wherever it stands: in a page of the tree, in one that was given free, in the WAL or an older part of it.
2. The damaged files are kept, as `journal.db.damaged-TIME`; the sound one takes their place in one rename.
3. Offsets stay, and new ones go on above all that were ever given. Every sink is given the whole journal again: a
   cursor has no CRC, and sinks take nothing twice.
4. Where an interval is lost, a resend is taken again, and the sinks recognise it. Never the other way round.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TypeAlias

import msgspec

from cloud.intervals import IntervalSet
from cloud.journal.contract import JournalBroken, Stored
from cloud.journal.sqlite import _INSERT, PAGE_BYTES, SqliteJournal, _held_crc, _stored, _sync_folder
from config.sqlite_format import local_bytes, varint

Cell: TypeAlias = int | float | bytes | None

_WAL_HEADER: Final = 32  #: https://www.sqlite.org/fileformat2.html#the_write_ahead_log
_FRAME_HEADER: Final = 24
_INDEX_INNER, _INDEX_LEAF, _TABLE_LEAF = 0x02, 0x0A, 0x0D
_MOST_BYTES: Final = 2**24  #: of one row; a larger length is damage
_MARGIN: Final = 100_000  #: above the newest offset found, where the file does not say which it last gave
_COPIED: Final = ("gateway_state", "missed", "expired")


class Salvaged(msgspec.Struct, frozen=True):
    damaged: Path  #: where the damaged file is kept
    entries: int
    missing: int  #: offsets between the oldest and the newest that were not found
    intervals: int


def salvage(path: Path) -> Salvaged:
    """Replace the journal at `path`, which nobody may have open. Raises `JournalBroken`."""
    if not path.exists():
        raise JournalBroken(f"{path}: there is no journal here")
    try:
        lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as err:
        raise JournalBroken(f"{path}: {err.strerror}; the data_dir must be writable") from err
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _salvage(path)
    except BlockingIOError as err:
        raise JournalBroken(f"{path}: a server has this journal; stop it first") from err
    except OSError as err:
        raise JournalBroken(
            f"{path}: {err.strerror}; there must be room for a second journal beside it"
        ) from err
    except sqlite3.Error as err:
        raise JournalBroken(f"{path}: {err}; there must be room for a second journal beside it") from err
    finally:
        os.close(lock)


def _salvage(path: Path) -> Salvaged:
    damaged = _kept_aside(path)
    fresh = path.with_name(path.name + ".salvaging")
    for tail in ("", "-wal", "-shm"):
        fresh.with_name(fresh.name + tail).unlink(missing_ok=True)
    done = _filled(fresh, damaged)
    _sync_folder(
        path.parent
    )  # from here on nobody opens what stands at `path` (SqliteJournal looks for `fresh`)
    for tail in (
        "-wal",
        "-shm",
    ):  # kept under the other name; beside the sound file they would be taken for its own
        path.with_name(path.name + tail).unlink(missing_ok=True)
    _sync_folder(path.parent)
    fresh.replace(path)
    _sync_folder(path.parent)
    return done


def _kept_aside(path: Path) -> Path:
    """A second name for the damaged file and its WAL; the one of a salvage that was cut short is used again."""
    for older in sorted(path.parent.glob(path.name + ".damaged-*")):
        if not older.name.endswith("-wal") and older.samefile(path):
            return older
    damaged = path.with_name(time.strftime(f"{path.name}.damaged-%Y%m%dT%H%M%SZ", time.gmtime()))
    while damaged.exists():
        damaged = damaged.with_name(damaged.name + "-1")
    wal = path.with_name(path.name + "-wal")
    if wal.exists():
        os.link(wal, damaged.with_name(damaged.name + "-wal"))
    os.link(path, damaged)
    _sync_folder(path.parent)
    return damaged


def _filled(fresh: Path, damaged: Path) -> Salvaged:
    held: dict[tuple[str, int], IntervalSet] = {}
    counts: dict[str, list[int]] = {}
    maker = SqliteJournal(fresh)
    db = maker.made()
    try:
        db.execute("PRAGMA synchronous = OFF")  # synced as a whole at the end, before it gets its name
        db.execute("PRAGMA journal_mode = DELETE")
        db.execute("BEGIN")
        intervals = 0
        for found in _rows(damaged):
            if isinstance(found, _Proven):
                row = found.entry
                text = (
                    ""
                    if row.fresh == ((row.first, row.last),)
                    else ",".join(f"{a}-{b}" for a, b in row.fresh)
                )
                put = db.execute(
                    _INSERT.replace("INSERT", "INSERT OR IGNORE", 1),
                    (row.offset, row.gateway, row.epoch, row.first, row.last, row.readings, row.received_at_ns, text,
                     found.crc32, row.payload),
                )  # fmt: skip
                if put.rowcount:
                    count = counts.setdefault(row.gateway, [0, 0])
                    count[0] += 1
                    count[1] += row.readings
                gateway, epoch, first, last = row.gateway, row.epoch, row.first, row.last
            else:
                gateway, epoch, first, last = found
                intervals += 1
            held.setdefault((gateway, epoch), IntervalSet()).add(first, last)
        for (gateway, epoch), ranges in held.items():
            db.executemany(
                "INSERT INTO held (gateway, epoch, first, last, crc32) VALUES (?, ?, ?, ?, ?)",
                [(gateway, epoch, a, b, _held_crc(gateway, epoch, a, b)) for a, b in ranges.ranges()],
            )
            batches, readings = counts.pop(gateway, (0, 0))
            frames = sum(b - a + 1 for a, b in ranges.ranges())
            db.execute(
                "INSERT INTO gateway_count VALUES (?, ?, ?, 0, ?) ON CONFLICT (gateway) DO UPDATE SET"
                " frames_received = frames_received + excluded.frames_received",
                (gateway, batches, frames, readings),
            )
        entries, oldest, newest = db.execute(
            "SELECT count(*), min(offset), max(offset) FROM entry"
        ).fetchone()
        given = _copied(db, damaged)
        top = max(newest or 0, given if given is not None else (newest or 0) + _MARGIN)
        db.execute("DELETE FROM sqlite_sequence WHERE name = 'entry'")
        db.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('entry', ?)", (top,))
        db.execute("UPDATE cursor SET offset = ?", ((oldest or top + 1) - 1,))
        db.execute("COMMIT")
    finally:
        db.close()
    fd = os.open(fresh, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    missing = (newest - oldest + 1 - entries) if entries else 0
    return Salvaged(damaged, entries, missing, intervals)


def _copied(db: sqlite3.Connection, damaged: Path) -> int | None:
    """What the tree still leads to of the small tables, and the newest offset ever given, None where it is lost."""
    given: int | None = None
    with contextlib.suppress(sqlite3.Error):
        old = sqlite3.connect(f"file:{damaged}?mode=ro", uri=True)
        try:
            with contextlib.suppress(sqlite3.Error):
                row = old.execute("SELECT seq FROM sqlite_sequence WHERE name = 'entry'").fetchone()
                given = row[0] if row and 0 <= row[0] < 2**53 else None
            with contextlib.suppress(sqlite3.Error):
                for (sink,) in old.execute("SELECT sink FROM cursor").fetchall():
                    db.execute("INSERT OR IGNORE INTO cursor VALUES (?, 0)", (sink,))
            for table in _COPIED:
                with contextlib.suppress(sqlite3.Error):
                    rows = old.execute(f"SELECT * FROM {table}").fetchall()  # noqa: S608 - a name of ours
                    if rows:
                        marks = ", ".join("?" * len(rows[0]))
                        db.executemany(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", rows)  # noqa: S608
        finally:
            old.close()
    return given


# ------------------------------------------------------------------------------------------------------------- pages


class _Proven(msgspec.Struct, frozen=True):
    entry: Stored
    crc32: int


class _Pages:
    """Every version of every page, newest first."""

    def __init__(self, file: mmap.mmap | bytes, wal: mmap.mmap | bytes) -> None:
        self._file, self._wal = file, wal
        self._in_wal: dict[int, int] = {}
        step = _FRAME_HEADER + PAGE_BYTES
        self._frames = range(_WAL_HEADER, len(wal) - step + 1, step)
        for at in self._frames:
            self._in_wal[int.from_bytes(wal[at : at + 4], "big")] = at + _FRAME_HEADER

    def all(self) -> Iterator[tuple[bytes, int]]:
        """Each with where its own header begins."""
        for at in self._frames:
            first = int.from_bytes(self._wal[at : at + 4], "big") == 1
            yield self._wal[at + _FRAME_HEADER : at + _FRAME_HEADER + PAGE_BYTES], 100 if first else 0
        for at in range(0, len(self._file), PAGE_BYTES):
            yield self._file[at : at + PAGE_BYTES].ljust(PAGE_BYTES, b"\0"), 0 if at else 100

    def versions(self, number: int) -> Iterator[bytes]:
        at = self._in_wal.get(number)
        if at is not None:
            yield self._wal[at : at + PAGE_BYTES]
        begin = (number - 1) * PAGE_BYTES
        if number >= 1 and begin + PAGE_BYTES <= len(self._file):
            yield self._file[begin : begin + PAGE_BYTES]


def _rows(damaged: Path) -> Iterator[_Proven | tuple[str, int, int, int]]:
    with contextlib.ExitStack() as stack:
        pages = _Pages(_mapped(damaged, stack), _mapped(damaged.with_name(damaged.name + "-wal"), stack))
        for page, at in pages.all():
            kind = page[at]
            if kind == _TABLE_LEAF:
                yield from _entries(page, at, pages)
            elif kind in (_INDEX_LEAF, _INDEX_INNER):
                yield from _intervals(page, at)


def _mapped(path: Path, stack: contextlib.ExitStack) -> mmap.mmap | bytes:
    try:
        file = stack.enter_context(path.open("rb"))
    except FileNotFoundError:
        return b""
    if os.fstat(file.fileno()).st_size == 0:
        return b""
    return stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _cells(page: bytes, at: int) -> Iterator[int]:
    """Where the page's cells begin."""
    head = 12 if page[at] == _INDEX_INNER else 8
    count = int.from_bytes(page[at + 3 : at + 5], "big")
    for i in range(min(count, (PAGE_BYTES - at - head) // 2)):
        begin = int.from_bytes(page[at + head + 2 * i : at + head + 2 * i + 2], "big")
        if at + head <= begin < PAGE_BYTES - 4:
            yield begin


def _entries(page: bytes, at: int, pages: _Pages) -> Iterator[_Proven]:
    for begin in _cells(page, at):
        try:
            size, begin = varint(page, begin)
            offset, begin = varint(page, begin)
            if not 0 < size <= _MOST_BYTES or offset < 1:
                continue
            for payload in _whole(page, begin, size, pages):
                row = _record(payload)
                if len(row) != 10:
                    break
                entry = _stored((offset, *row[1:]))  # type: ignore[arg-type]  # ten of them, as counted
                if entry is not None:
                    yield _Proven(entry, int(row[8] or 0))
                    break
        except (IndexError, ValueError):  # no row after all
            continue


def _whole(page: bytes, begin: int, size: int, pages: _Pages) -> Iterator[bytes]:
    """A row's bytes, with the overflow pages of the newest version first."""
    local = local_bytes(size, PAGE_BYTES)
    if local == size:
        yield page[begin : begin + size]
        return
    first = int.from_bytes(page[begin + local : begin + local + 4], "big")
    for newest in (True, False):
        data, number = bytearray(page[begin : begin + local]), first
        while number and len(data) < size:
            versions = list(pages.versions(number))
            if not versions:
                break
            part = versions[0 if newest else -1]
            number = int.from_bytes(part[:4], "big")
            data += part[4:]
        if len(data) >= size:
            yield bytes(data[:size])


def _intervals(page: bytes, at: int) -> Iterator[tuple[str, int, int, int]]:
    for begin in _cells(page, at):
        try:
            size, begin = varint(page, begin + (4 if page[at] == _INDEX_INNER else 0))
            if not 0 < size <= PAGE_BYTES // 8:
                continue
            row = _record(page[begin : begin + size])
            if len(row) != 5 or not isinstance(row[0], bytes):
                continue
            name, (epoch, first, last, crc) = row[0].decode(), row[1:]
            if not (isinstance(epoch, int) and isinstance(first, int) and isinstance(last, int)):
                continue
            if crc == _held_crc(name, epoch, first, last) and first <= last:
                yield name, epoch, first, last
        except (IndexError, ValueError):  # no row after all
            continue


_SIZES: Final = (0, 1, 2, 3, 4, 6, 8, 8, 0, 0)


def _record(data: bytes) -> list[Cell]:
    """https://www.sqlite.org/fileformat2.html#record_format"""
    end, at = varint(data, 0)
    kinds: list[int] = []
    while at < end and len(kinds) <= 16:
        kind, at = varint(data, at)
        kinds.append(kind)
    row: list[Cell] = []
    for kind in kinds:
        size = _SIZES[kind] if kind < 10 else (kind - 12) // 2
        piece = data[at : at + size]
        if len(piece) != size:
            raise ValueError("the row ends early")
        at += size
        match kind:
            case 0 | 7:
                row.append(None)
            case 8 | 9:
                row.append(kind - 8)
            case 1 | 2 | 3 | 4 | 5 | 6:
                row.append(int.from_bytes(piece, "big", signed=True))
            case _:
                row.append(bytes(piece))
    return row
