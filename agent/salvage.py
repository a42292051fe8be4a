"""What a damaged buffer file still holds: found, checked, and sent under its own epoch and seqs.

Beside each damaged set `buffer.db.damaged-STAMP` (never written to) grows a second buffer file,
`buffer.db.salvaged-STAMP`, which takes its rows in portions and is emptied by the forwarder like any other.

Rules:
1. Only a row whose CRC is right is taken: what is in the damaged file may be anything.
2. A row is taken under its old epoch and seq. The cloud dedupes by them, so that it may have had it already.
3. What was found and where the search stands is committed with the rows: a kill at any moment resumes there.
4. First by rowid, ranges that fail being halved (`Wreck.walk`); what that leaves is looked for page by page, in the
   file and its WAL (`Wreck.carve`): one bad inner page hides thousands of good rows from any query.
5. What is missing at the end becomes gaps of the old epoch, reason `corrupt`: counted by the damaged file's own ledger,
   or, where that is lost too, by the holes among the seqs found; then the event says that it is an estimate.
6. A frame whose layout is lost is not guessed at: it counts as missing, and stays in the damaged file.
7. A damaged set goes only when it was salvaged to the end, delivered and told (`.told` beside it).

`Wreck` reads, on a thread of its own; `Salvaged` writes, on the buffer's; neither decides when (`agent/buffer.py`).
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import functools
import logging
import os
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeAlias

import msgspec

from agent.clock import Clock
from agent.store import (
    NOTE,
    PAGE_BYTES,
    TOLD,
    Account,
    Batch,
    Group,
    Ledger,
    Limits,
    Range,
    Store,
    StoreError,
    StoreRefusing,
    _ScanHead,
    frame_head,
    is_set,
    noted_account,
    row_priority,
    without,
)
from agent.store_rows import clock_row, insert_clock, read_clocks, rows_crc
from config.sqlite_format import local_bytes, varint
from sync.wire import MAX_EPOCH, ClockRow, GapFrame, Layout, encode_frame, layout_id

log = logging.getLogger(__name__)

Row: TypeAlias = tuple[int, int, int, bytes]
"""seq, readings, crc, data: as in the table `frames` of every schema."""

CHUNK_BYTES: Final = 256 * 1024  #: taken in one transaction
CHUNK_ROWS: Final = 2000
CARVE_PAGES: Final = 128  #: looked at in one turn: half a megabyte
_PROBES: Final = (
    20_000  #: queries that may fail before the rest is left to the search by page: under a second
)
_UNSURE_JUMP: Final = 2**20  #: seqs left free where the highest one used is not known
_UNSURE_BOOTS: Final = 10_000
_LOOK_AGAIN_S: Final = 1.0
_PAUSE_S: Final = 0.01
_BEGIN_ANEW: Final = 3
_KEEP_SETS: Final = 8
_MAX_DATA_BYTES: Final = 2**20  #: no frame, layout or clock row is larger
_WAL_HEADER: Final = 32  #: https://www.sqlite.org/fileformat2.html#the_write_ahead_log
_WAL_FRAME: Final = 24

_decode_layout = msgspec.msgpack.Decoder(Layout).decode


# --- ranges of seqs ---


class Seqs:
    """A set of seqs as closed ranges: what was kept in order stays a handful of them."""

    def __init__(self, ranges: Sequence[Range] = ()) -> None:
        self._starts = [first for first, _ in ranges]
        self._ends = [last for _, last in ranges]

    def __contains__(self, seq: int) -> bool:
        at = bisect.bisect_right(self._starts, seq) - 1
        return at >= 0 and seq <= self._ends[at]

    def add(self, seq: int) -> bool:
        """False where it was in."""
        at = bisect.bisect_right(self._starts, seq) - 1
        if at >= 0 and seq <= self._ends[at]:
            return False
        joins_left = at >= 0 and self._ends[at] == seq - 1
        joins_right = at + 1 < len(self._starts) and self._starts[at + 1] == seq + 1
        if joins_left and joins_right:
            self._ends[at] = self._ends.pop(at + 1)
            del self._starts[at + 1]
        elif joins_left:
            self._ends[at] = seq
        elif joins_right:
            self._starts[at + 1] = seq
        else:
            self._starts.insert(at + 1, seq)
            self._ends.insert(at + 1, seq)
        return True

    @property
    def ranges(self) -> list[Range]:
        return list(zip(self._starts, self._ends, strict=True))


def missing(found: Seqs, lowest_failed: int, highest_used: int, lost: int | None) -> list[Range]:
    """The seqs that were held and are lost. `highest_used`: the last seq that this epoch gave away, 0 where that is not
    known; `lost`: how many frames, None where that is not known. What was held is the newest, so what is more than
    `lost` is taken off at the old end, and what is less is added there."""
    if lost == 0:
        return []
    ranges = found.ranges
    lowest = min(lowest_failed or MAX_EPOCH, ranges[0][0] if ranges else MAX_EPOCH)
    top = highest_used or (ranges[-1][1] if ranges else 0)
    left = without((lowest, top), [r for r in ranges if r[0] <= top]) if lowest <= top else []
    if lost is None:
        return left
    over = sum(b - a + 1 for a, b in left) - lost
    while over > 0:
        first, last = left[0]
        cut = min(over, last - first + 1)
        left[0] = (first + cut, last)
        over -= cut
        if left[0][0] > last:
            left.pop(0)
    if over < 0:
        end = min(lowest, top + 1) - 1
        first = max(1, end + over + 1)
        if first <= end:
            left.insert(0, (first, end))
            if len(left) > 1 and left[1][0] == end + 1:
                left[:2] = [(first, left[1][1])]
    return left


def shares(total: int, weights: Sequence[int]) -> list[int]:
    """`total` in whole parts by weight, none of it lost."""
    parts, given, seen, whole = [], 0, 0, sum(weights)
    for weight in weights:
        seen += weight
        upto = total * seen // whole if whole else 0
        parts.append(upto - given)
        given = upto
    return parts


# --- where the search stands ---


class Progress(msgspec.Struct):
    """Committed with every portion, in the salvaged file."""

    phase: str = "walk"  #: walk, carve, done
    position: int = 1  #: the next seq to look for, or the next page to look at
    found: list[Range] = []
    found_frames: int = 0
    found_readings: int = 0
    lowest_failed: int = 0  #: the lowest seq that a query failed on; 0: none
    boot: int = 0  #: of the newest scan found, with the span of its boot
    from_boot_ns: int = 0
    to_boot_ns: int = 0
    said: Account | None = None  #: what the damaged file, or the note beside it, said it held
    no_layout: int = 0  #: frames whose layout is lost
    lost_frames: int = 0
    lost_readings: int = 0
    estimated: bool = False
    twice: bool = False  #: the pages are looked at for the second time


class Portion(msgspec.Struct):
    """What one turn of the search has found."""

    rows: list[Row]
    position: int
    ended: bool = False
    failed: bool = False  #: a query raised: something is hidden
    lowest_failed: int = 0
    layouts: dict[int, bytes] = {}
    clocks: list[ClockRow] = []
    account: Account | None = None


class Known(msgspec.Struct):
    """What a damaged file says beside its frames, as far as it can be read."""

    account: Account | None
    boot: int
    layouts: dict[int, bytes]
    clocks: list[ClockRow]


def good_row(row: Sequence[object]) -> Row | None:
    """The row, if its CRC says that it is what was written."""
    if len(row) != 4:
        return None
    seq, readings, crc, data = row
    if not (
        isinstance(seq, int)
        and isinstance(readings, int)
        and isinstance(crc, int)
        and isinstance(data, bytes)
    ):
        return None
    if seq < 1 or readings < 0 or row_priority(seq, readings, data, crc) is None:
        return None
    return seq, readings, crc, data


def _sane(account: Account | None, most_bytes: int) -> Account | None:
    """A ledger has no CRC; its numbers check each other, and the file's size."""
    if account is None or not 0 < account.epoch <= MAX_EPOCH:
        return None
    held = account.kept_frames - account.settled_frames - account.gapped_frames
    readings = account.kept_readings - account.settled_readings - account.gapped_readings
    told = (
        account.next_seq == account.kept_frames + 1
        and 0 <= held <= most_bytes
        and 0 <= readings <= 64 * most_bytes
    )
    return account if told else None


def _layout(key: object, data: object) -> tuple[int, bytes] | None:
    """A layout's id is made of its content: a row that does not match is none."""
    if not (isinstance(key, bytes) and isinstance(data, bytes) and len(key) == 8):
        return None
    try:
        number = int.from_bytes(key, "big")
        return (number, data) if layout_id(_decode_layout(data)) == number else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


# --- reading ---


class Wreck:
    """A damaged set, read only. One thread; `close` when done."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._conn: sqlite3.Connection | None = None
        self._probes = 0
        self._file = -1
        self._wal = -1
        self._bytes = 0
        self._wal_frames = 0
        self._newest: dict[int, int] = {}  #: page -> its newest image in the WAL

    def open(self) -> None:
        """Raises `OSError` where there is no file to read."""
        self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        self._bytes = os.fstat(self._file).st_size
        with contextlib.suppress(OSError):
            self._wal = os.open(self.path.with_name(self.path.name + "-wal"), os.O_RDONLY | os.O_CLOEXEC)
            size = os.fstat(self._wal).st_size
            self._wal_frames = max(0, size - _WAL_HEADER) // (_WAL_FRAME + PAGE_BYTES)
            for i in range(self._wal_frames):
                head = os.pread(self._wal, 4, _WAL_HEADER + i * (_WAL_FRAME + PAGE_BYTES))
                self._newest[int.from_bytes(head, "big")] = i
        with contextlib.suppress(sqlite3.Error):
            self._conn = sqlite3.connect(
                f"{self.path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None
            )

    def close(self) -> None:
        if self._conn is not None:
            with contextlib.suppress(sqlite3.Error):
                self._conn.close()
            self._conn = None
        for fd in (self._file, self._wal):
            if fd >= 0:
                os.close(fd)
        self._file = self._wal = -1

    def known(self) -> Known:
        noted = noted_account(self.path)
        account, boot = None, 0
        most_bytes = self._bytes + self._wal_frames * PAGE_BYTES
        for row in self._all("SELECT epoch, next_seq, kept_frames, kept_readings, settled_frames, settled_readings,"
                             " gapped_frames, gapped_readings, boot FROM ledger"):  # fmt: skip
            numbers = [n for n in row if isinstance(n, int)]
            if len(numbers) == len(row):
                account, boot = _sane(Account(*numbers[:8]), most_bytes), numbers[8]
        if noted is not None and (account is None or account.epoch != noted.epoch or noted.next_seq):
            account = noted
        layouts = [_layout(*row) for row in self._all("SELECT id, data FROM layouts")]
        clocks: list[ClockRow] = []
        if self._conn is not None:
            with contextlib.suppress(sqlite3.Error):
                clocks += [row for _, row, _ in read_clocks(self._conn) if row is not None]
        return Known(
            account,
            boot if account is not None and 0 < boot < 2**31 else 0,
            dict(found for found in layouts if found is not None),
            clocks,
        )

    def _all(self, sql: str) -> Iterator[tuple[object, ...]]:
        """Rows until the first that fails."""
        if self._conn is not None:
            with contextlib.suppress(sqlite3.Error):
                yield from self._conn.execute(sql)

    def walk(self, position: int) -> Portion:
        """The next rows by seq. A range that fails is halved until what is whole in it is found."""
        out = Portion([], position)
        if self._conn is None:
            out.ended = out.failed = True
            return out
        size = 0
        ranges = [(position, MAX_EPOCH)]
        while ranges:
            low, high = ranges.pop()
            try:
                rows = self._conn.execute(
                    "SELECT seq, readings, crc, data FROM frames WHERE seq BETWEEN ? AND ? ORDER BY seq",
                    (low, high),
                )
                for row in rows:
                    seq = row[0]
                    if seq < low:  # the tree is out of order
                        raise sqlite3.DatabaseError("rows out of order")
                    low = out.position = seq + 1
                    if (found := good_row(row)) is not None:
                        out.rows.append(found)
                        size += len(found[3])
                    else:
                        out.failed = True
                        out.lowest_failed = out.lowest_failed or seq
                    if size >= CHUNK_BYTES or len(out.rows) >= CHUNK_ROWS:
                        return out
            except (sqlite3.Error, UnicodeDecodeError, OverflowError):
                out.failed = True
                self._probes += 1
                if self._probes > _PROBES:
                    out.ended = True
                    out.lowest_failed = out.lowest_failed or low
                    return out
                if low < high:
                    middle = (low + high) // 2
                    ranges += [(middle + 1, high), (low, middle)]
                elif low == high:
                    out.lowest_failed = out.lowest_failed or low
                    out.position = low + 1
        out.ended = True
        return out

    def carve(self, position: int, wanted: Callable[[int], bool]) -> Portion:
        """The rows in the next pages, whatever points at them; first those of the file, then those of the WAL."""
        out = Portion([], position)
        in_file = -(-self._bytes // PAGE_BYTES)
        size = 0
        for number in range(position, min(position + CARVE_PAGES, in_file + self._wal_frames)):
            if number < in_file:
                page = self._pread(self._file, PAGE_BYTES, number * PAGE_BYTES)
            else:
                at = _WAL_HEADER + (number - in_file) * (_WAL_FRAME + PAGE_BYTES) + _WAL_FRAME
                page = self._pread(self._wal, PAGE_BYTES, at)
            for values in self._cells(page, 100 if number == 0 else 0):
                self._sort(values, wanted, out)
            out.position = number + 1
            size = sum(len(row[3]) for row in out.rows)
            if size >= CHUNK_BYTES or len(out.rows) >= CHUNK_ROWS:
                return out
        out.ended = out.position >= in_file + self._wal_frames
        return out

    @staticmethod
    def _pread(fd: int, size: int, at: int) -> bytes:
        try:
            return os.pread(fd, size, at)
        except OSError:  # a bad sector hides this page, not the next
            return b""

    def _sort(self, values: list[object], wanted: Callable[[int], bool], out: Portion) -> None:
        """What a record is, by its shape and what it says of itself."""
        match values:
            case [int(), int(), int(), bytes()]:
                if wanted(values[0]) and (row := good_row(values)) is not None:  # type: ignore[arg-type]
                    out.rows.append(row)
            case [_, bytes() as key, bytes() as data]:
                if (layout := _layout(key, data)) is not None:
                    out.layouts[layout[0]] = layout[1]
            case [_, int(), str() as boot_id, int(), int(), int(), int(), int(), *crc] if len(crc) <= 1:
                said = [values[1], boot_id.encode(), *values[3:8]]
                if crc in ([], [rows_crc(said)]) and (clock := clock_row(said)) is not None:
                    out.clocks.append(clock)
            case [1, int(), int(), int(), *more] if len(more) >= 6 and all(isinstance(n, int) for n in more):
                account = Account(values[1], values[2], *more[:6])  # type: ignore[arg-type]
                sane = _sane(account, self._bytes + self._wal_frames * PAGE_BYTES)
                if sane is not None and (out.account is None or sane.next_seq > out.account.next_seq):
                    out.account = sane

    def _cells(self, page: bytes, start: int) -> Iterator[list[object]]:
        """The records of a table's leaf page (https://www.sqlite.org/fileformat2.html#b_tree_pages); the first value
        is the rowid where the column is stored as NULL."""
        if len(page) < PAGE_BYTES or page[start] != 0x0D:
            return
        count = int.from_bytes(page[start + 3 : start + 5], "big")
        for i in range(min(count, PAGE_BYTES // 4)):
            at = start + 8 + 2 * i
            where = int.from_bytes(page[at : at + 2], "big")
            if not start + 8 <= where < PAGE_BYTES - 4:
                continue
            with contextlib.suppress(ValueError, IndexError, UnicodeDecodeError, OverflowError):
                size, where = varint(page, where)
                rowid, where = varint(page, where)
                if size > _MAX_DATA_BYTES:
                    continue
                local = local_bytes(size, PAGE_BYTES)
                payload = page[where : where + local]
                if local < size:
                    link = int.from_bytes(page[where + local : where + local + 4], "big")
                    payload += self._overflow(link, size - local)
                if len(payload) < size:
                    continue
                values = _record(payload)
                if values and values[0] is None:
                    values[0] = rowid
                    yield values
                elif len(values) == 2:  # layouts: its key is a blob, the rowid is beside it
                    yield [rowid, *values]

    def _overflow(self, link: int, size: int) -> bytes:
        out = b""
        while link and len(out) < size:
            if link in self._newest:
                at = _WAL_HEADER + self._newest[link] * (_WAL_FRAME + PAGE_BYTES) + _WAL_FRAME
                page = self._pread(self._wal, PAGE_BYTES, at)
            else:
                page = self._pread(self._file, PAGE_BYTES, (link - 1) * PAGE_BYTES)
            if len(page) < PAGE_BYTES:
                break
            out += page[4:]
            link = int.from_bytes(page[:4], "big")
        return out[:size]


def _record(payload: bytes) -> list[object]:
    end, at = varint(payload, 0)
    kinds = []
    while at < end:
        kind, at = varint(payload, at)
        kinds.append(kind)
    values: list[object] = []
    for kind in kinds:
        size = (0, 1, 2, 3, 4, 6, 8, 8, 0, 0)[kind] if kind < 10 else (kind - 12) // 2
        raw = payload[at : at + size]
        if kind in (10, 11, 7) or size < 0 or len(raw) < size:
            raise ValueError("no record of ours")
        at += size
        if kind == 0:
            values.append(None)
        elif kind in (8, 9):
            values.append(kind - 8)
        elif kind < 7:
            values.append(int.from_bytes(raw, "big", signed=True))
        else:
            values.append(raw.decode() if kind % 2 else raw)
    return values


# --- writing ---


def _base(led: Ledger, said: Account, before: Account | None) -> None:
    """What had left the damaged file before, by the ledger that was found later than the file was made."""
    for name in ("settled_frames", "settled_readings", "gapped_frames", "gapped_readings"):
        more = getattr(said, name) - (getattr(before, name) if before else 0)
        setattr(led, name, getattr(led, name) + more)
        kept = "kept_frames" if name.endswith("frames") else "kept_readings"
        setattr(led, kept, getattr(led, kept) + more)


class Salvaged(Store):
    """The second buffer file: the rows of one damaged set, under their own epoch, until the cloud has them."""

    def __init__(self, path: Path, gateway: str, limits: Limits, clock: Clock, known: Known) -> None:
        super().__init__(path, gateway, limits, clock)
        self.progress = Progress()
        self.begun_anew = 0  #: how often this file itself was found damaged
        self._known = known
        self._seqs = Seqs()

    @property
    def done(self) -> bool:
        return self.progress.phase == "done"

    @property
    def empty(self) -> bool:
        return self.done and self.ledger.held_frames == 0

    def wanted(self, seq: int) -> bool:
        return seq not in self._seqs

    def has_room(self) -> bool:
        """Whether another portion fits: what is found is sent, and makes room for more."""
        try:
            disk = os.statvfs(self.path.parent)
        except OSError:
            return False
        free = disk.f_bavail * disk.f_frsize - self._limits.free_disk_bytes
        held = self.size_bytes()
        return held + 16 * CHUNK_BYTES < self._limits.max_bytes and free > 16 * CHUNK_BYTES

    def take(self, portion: Portion, layouts: Callable[[int], bytes | None]) -> None:
        """Keep what was found, and where the search stands, in one transaction. Raises `StoreRefusing`."""
        progress = msgspec.structs.replace(self.progress)
        seqs = Seqs(self._seqs.ranges)
        fresh_layouts = {k: d for k, d in portion.layouts.items() if k not in self._layouts}
        rows: list[Row] = []
        for row in portion.rows:
            if row[0] in seqs:
                continue
            head = frame_head(row[3])
            if isinstance(head, _ScanHead):
                if head.layout not in self._layouts and head.layout not in fresh_layouts:
                    data = layouts(head.layout)
                    if data is None:
                        progress.no_layout += 1
                        continue
                    fresh_layouts[head.layout] = data
                if head.boot > progress.boot:
                    progress.boot, progress.from_boot_ns, progress.to_boot_ns = (
                        head.boot,
                        head.taken_at_ns,
                        head.taken_at_ns,
                    )
                elif head.boot == progress.boot:
                    progress.from_boot_ns = min(progress.from_boot_ns, head.taken_at_ns)
                    progress.to_boot_ns = max(progress.to_boot_ns, head.taken_at_ns)
            elif head is None:
                continue
            seqs.add(row[0])
            rows.append(row)
        progress.found = seqs.ranges
        progress.found_frames += len(rows)
        progress.found_readings += sum(row[1] for row in rows)
        progress.position = portion.position
        progress.lowest_failed = progress.lowest_failed or portion.lowest_failed
        said, newer = progress.said, portion.account
        if newer and said and said.epoch == newer.epoch and said.next_seq < newer.next_seq:
            progress.said = newer  # a ledger found by page: the newest there is
        if portion.ended:
            self._turn(progress, portion)
        clocks = [
            row for row in portion.clocks if row.boot not in self._clocks and row.boot < self.ledger.boot
        ]
        with self._refusing(), self._transaction() as (conn, led):
            conn.executemany(
                "INSERT OR IGNORE INTO layouts VALUES (?, ?)",
                [(key.to_bytes(8, "big"), data) for key, data in fresh_layouts.items()],
            )
            for clock in clocks:
                insert_clock(conn, clock, 1)
            conn.executemany("INSERT INTO frames VALUES (?, ?, ?, ?)", rows)
            if progress.said is not said and progress.said is not None:
                _base(led, progress.said, said)
            led.kept_frames += len(rows)
            led.kept_readings += sum(row[1] for row in rows)
            led.next_seq = max(led.next_seq, max((row[0] for row in rows), default=0) + 1)
            if progress.phase == "done":
                self._account(conn, led, progress, seqs)
            conn.execute("UPDATE salvage SET progress = ?", (msgspec.msgpack.encode(progress),))
        self.progress, self._seqs = progress, seqs
        self._layouts |= fresh_layouts
        for clock in clocks:
            self._clocks.setdefault(clock.boot, clock)
        self._cursor = 1  # rows may have come below it
        self._wal_bytes += sum(len(row[3]) for row in rows) * 5 // 4
        self._after_commit()

    @staticmethod
    def _turn(progress: Progress, portion: Portion) -> None:
        """After the search by seq comes the one by page, unless nothing is missing."""
        said = progress.said
        held = None
        if said is not None and said.next_seq:
            held = said.kept_frames - said.settled_frames - said.gapped_frames
        if progress.found_frames == held or (
            progress.phase == "carve" and (progress.twice or not progress.no_layout)
        ):
            progress.phase = "done"
            return
        # Once more where frames were left for want of a layout: it may have come in a later page.
        progress.twice = progress.phase == "carve"
        progress.phase, progress.position, progress.no_layout = "carve", 0, 0

    def _account(self, conn: sqlite3.Connection, led: Ledger, progress: Progress, seqs: Seqs) -> None:
        """What was held and is not found is a gap, as exactly as it can be said."""
        said = progress.said
        ranges: list[Range]
        if said is not None and said.next_seq:
            held = said.kept_frames - said.settled_frames - said.gapped_frames
            readings = said.kept_readings - said.settled_readings - said.gapped_readings
            lost = max(0, held - progress.found_frames)
            led.next_seq = max(led.next_seq, said.next_seq)
            ranges = missing(seqs, progress.lowest_failed, said.next_seq - 1, lost)
            progress.lost_readings = max(0, readings - progress.found_readings) if lost else 0
            progress.lost_frames = lost
            # Old copies of rows that had left the file come again; the cloud knows them.
            again = max(0, progress.found_frames - held)
            led.kept_frames -= min(again, led.settled_frames)
            led.settled_frames -= min(again, led.settled_frames)
        else:
            ranges = missing(seqs, progress.lowest_failed, 0, None)
            progress.lost_frames = sum(b - a + 1 for a, b in ranges)
            progress.lost_readings = (
                progress.lost_frames * progress.found_readings // max(1, progress.found_frames)
            )
            progress.estimated = True
            led.next_seq += _UNSURE_JUMP
        sizes = [b - a + 1 for a, b in ranges]
        boot = progress.boot or led.boot
        now_ns = self._clock.boot_ns()
        span = (progress.from_boot_ns, progress.to_boot_ns) if progress.boot else (now_ns, now_ns)
        gaps = [
            GapFrame(led.epoch, a, b, frames, readings, "corrupt", "", boot, *span)
            for (a, b), frames, readings in zip(
                ranges,
                shares(progress.lost_frames, sizes),
                shares(progress.lost_readings, sizes),
                strict=True,
            )
        ]
        if not gaps and progress.lost_frames:
            gaps = [
                GapFrame(
                    led.epoch, 0, 0, progress.lost_frames, progress.lost_readings, "corrupt", "", boot, *span
                )
            ]
        led.kept_frames += progress.lost_frames
        led.kept_readings += progress.lost_readings
        led.gapped_frames += progress.lost_frames
        led.gapped_readings += progress.lost_readings
        self._insert(conn, led, [*map(encode_frame, gaps)], [0] * len(gaps))

    def verdict(self) -> str:
        """In words, for the log, the event and the `.told` file."""
        p = self.progress
        text = f"{p.found_frames} frames with {p.found_readings} readings were salvaged"
        if p.lost_frames or p.lost_readings:
            about = "about " if p.estimated else ""
            text += f", {about}{p.lost_frames} frames with {p.lost_readings} readings are lost and reported as a gap"
        if p.no_layout:
            text += f"; the layout of {p.no_layout} of them is lost, they stay in the damaged file"
        if p.estimated:
            text += "; its ledger could not be read, so the loss is an estimate from the holes between what was found"
        return text

    # --- what differs from the live file ---

    def _lock(self) -> None:
        """The live file's lock covers the folder."""
        self._lock_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _note_epoch(self) -> None:
        """The damaged set has it."""

    def _check_ledger(self, led: Ledger) -> None:
        """Its seqs are those of another file, so they say nothing about what this one keeps."""

    def _create(self, conn: sqlite3.Connection) -> None:
        known, said = self._known, self._known.account
        if said is None:
            raise StoreRefusing("the damaged file's epoch is not known")
        # This boot must not be taken for one of the old ones, whose frames would get its clock.
        boot = max([known.boot, *(row.boot for row in known.clocks)])
        self.ledger = Ledger(0, boot if known.boot else boot + _UNSURE_BOOTS)
        self._layouts, self._clocks = dict(known.layouts), {}
        super()._create(conn)
        conn.execute("BEGIN IMMEDIATE")
        conn.execute(
            "UPDATE ledger SET epoch = ?, next_seq = ?, kept_frames = ?, kept_readings = ?, settled_frames = ?,"
            " settled_readings = ?, gapped_frames = ?, gapped_readings = ?",
            (said.epoch, max(1, said.next_seq), said.settled_frames + said.gapped_frames,
             said.settled_readings + said.gapped_readings, said.settled_frames, said.settled_readings,
             said.gapped_frames, said.gapped_readings),
        )  # fmt: skip
        # What was held is counted as kept when it is found or given up: see `take`.
        for row in known.clocks:
            insert_clock(conn, row, 1)
        conn.execute("CREATE TABLE salvage (progress BLOB NOT NULL) STRICT")
        conn.execute("INSERT INTO salvage VALUES (?)", (msgspec.msgpack.encode(Progress(said=said)),))
        conn.execute("COMMIT")

    def _load(self, conn: sqlite3.Connection, *, reading: bool = False, torn: bool = False) -> None:
        try:
            row = conn.execute("SELECT progress FROM salvage").fetchone()
        except sqlite3.OperationalError as err:
            raise sqlite3.DatabaseError(f"it was never finished: {err}") from err
        try:
            self.progress = msgspec.msgpack.decode(row[0], type=Progress)
        except (TypeError, msgspec.DecodeError, UnicodeDecodeError) as err:
            raise sqlite3.DatabaseError("where the search stands cannot be read") from err
        self._seqs = Seqs(self.progress.found)
        super()._load(conn, reading=reading)

    def _replace(self, why: str) -> None:
        """This file can be made again from the damaged set; the cloud knows what it has had already."""
        self._disconnect()
        self.begun_anew += 1
        log.error("salvaged buffer %s was damaged itself (%s); the search begins anew", self.path, why)
        self._doubtful = self._landed = None
        self._damage = ""
        unlink_set(self.path)
        self._connect()

    def remove(self) -> None:
        """All of it was delivered."""
        self.close()
        unlink_set(self.path)


# --- the sets in a folder ---


class DamagedSet(msgspec.Struct, frozen=True):
    path: Path
    size_bytes: int
    told: str  #: what salvage says of it; "" while it is not done


def damaged_sets(buffer: Path) -> list[DamagedSet]:
    """The damaged sets beside a buffer file, oldest first."""
    found = [path for path in buffer.parent.glob(f"{buffer.name}.damaged-*") if is_set(path)]
    return [_look(path) for path in sorted(found)]


def _look(path: Path) -> DamagedSet:
    size = 0
    for tail in ("", "-wal"):
        with contextlib.suppress(OSError):
            size += path.with_name(path.name + tail).stat().st_size
    told = ""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        told = path.with_name(path.name + TOLD).read_text().strip() or "?"
    return DamagedSet(path, size, told)


def salvaged_path(damaged: Path) -> Path:
    return damaged.with_name(damaged.name.replace(".damaged-", ".salvaged-", 1))


def tell(damaged: Path, text: str) -> None:
    """Salvage is done with this set. Raises `OSError`."""
    path = damaged.with_name(damaged.name + TOLD)
    fresh = path.with_name(path.name + ".new")
    with fresh.open("w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(path)


def unlink_set(path: Path) -> None:
    """Raises `OSError`."""
    for tail in ("-wal", "-shm", NOTE, TOLD, ""):
        path.with_name(path.name + tail).unlink(missing_ok=True)


def drop_damaged(buffer: Path, *, keep_bytes: int = 0, keep_sets: int = 0) -> list[DamagedSet]:
    """Remove the oldest damaged sets that salvage is done with, until what is left is within the bounds; returns what
    was removed. Raises `OSError`."""
    sets = damaged_sets(buffer)
    held, count, gone = sum(one.size_bytes for one in sets), len(sets), []
    for one in sets:
        if held <= keep_bytes and count <= keep_sets:
            break
        if one.told:
            unlink_set(one.path)
            gone.append(one)
            held -= one.size_bytes
            count -= 1
    return gone


# --- all of them, one after the other ---


class Told(msgspec.Struct, frozen=True):
    """What `headgate status` says of one old epoch: kept = settled + gapped + held, once its search is done."""

    name: str  #: of the damaged file
    epoch: int
    phase: str  #: walk or carve: still being searched; done: being sent
    kept_frames: int
    kept_readings: int
    settled_frames: int
    settled_readings: int
    gapped_frames: int
    gapped_readings: int
    held_frames: int
    held_readings: int
    size_bytes: int


class Salvages:
    """Finds damaged sets, searches one after the other, and lets go of what is delivered. `run` is a task of the loop;
    `stores` and what touches them belong to the buffer's thread."""

    def __init__(
        self,
        buffer: Path,
        gateway: str,
        limits: Limits,
        clock: Clock,
        keep_bytes: int,
        job: Callable[[Callable[[], None]], Awaitable[None]],
        layouts: Callable[[int], bytes | None],
        event: Callable[[str, str], None],
        lost: Callable[[int, int], None],
    ) -> None:
        self.stores: tuple[Salvaged, ...] = ()
        self.wake = asyncio.Event()  #: a set may have come
        self._buffer = buffer
        self._gateway = gateway
        self._limits = Limits(
            max_bytes=max(8 * 2**20, limits.max_bytes // 4),
            free_disk_bytes=limits.free_disk_bytes,
            quick_check_s=1.0,
        )
        self._clock = clock
        self._keep_bytes = keep_bytes
        self._job = job
        self._layouts = layouts
        self._event = event
        self._lost = lost
        self._given_up: set[Path] = set()

    async def run(self) -> None:
        """For ever. Survives a disk that refuses: then it is tried again."""
        while True:
            self.wake.clear()
            try:
                for one in await asyncio.to_thread(damaged_sets, self._buffer):
                    if not one.told and one.path not in self._given_up:
                        await self._salvage(one.path)
                await self._job(self._let_go)
                await asyncio.to_thread(self._bound)
            except (OSError, StoreError, sqlite3.Error) as err:
                log.warning("salvage of %s pauses: %s", self._buffer, err)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_AGAIN_S):
                    await self.wake.wait()

    async def _salvage(self, damaged: Path) -> None:
        """Search one set to its end."""
        reader = ThreadPoolExecutor(1, "salvage")
        loop = asyncio.get_running_loop()
        wreck = Wreck(damaged)
        try:
            await loop.run_in_executor(reader, wreck.open)
            known = await loop.run_in_executor(reader, wreck.known)
            if known.account is None and not salvaged_path(damaged).exists():
                await self._cannot(damaged)
                return
            store = next((s for s in self.stores if s.path == salvaged_path(damaged)), None)
            if store is None:
                store = Salvaged(salvaged_path(damaged), self._gateway, self._limits, self._clock, known)
                await self._job(store.open)
                self.stores = (*self.stores, store)
            if not store.done:
                await self._search(store, wreck, reader)
        finally:
            await asyncio.shield(loop.run_in_executor(reader, wreck.close))
            reader.shutdown(wait=False)

    async def _search(self, store: Salvaged, wreck: Wreck, reader: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        log.info(
            "salvage of %s begins at %s %d", wreck.path.name, store.progress.phase, store.progress.position
        )
        while not store.done:
            if store.begun_anew > _BEGIN_ANEW:
                self._given_up.add(wreck.path)
                self._event("salvage_failed", f"{store.path.name} is damaged again and again; check the disk")
                return
            if not store.has_room():  # what was found is being sent, and makes room
                await asyncio.sleep(_LOOK_AGAIN_S)
                continue
            started_s = time.monotonic()
            progress = store.progress
            look = (
                wreck.walk
                if progress.phase == "walk"
                else functools.partial(wreck.carve, wanted=store.wanted)
            )
            portion = await loop.run_in_executor(reader, look, progress.position)
            if store.progress is not progress:  # it was begun anew meanwhile
                continue
            await self._job(functools.partial(store.take, portion, self._layouts))
            # At most half the time, so that what comes in and goes out now is served first.
            await asyncio.sleep(max(_PAUSE_S, time.monotonic() - started_s))
        log.warning("salvage of %s: %s", wreck.path.name, store.verdict())
        self._event("buffer_salvaged", f"{wreck.path.name}: {store.verdict()}")

    async def _cannot(self, damaged: Path) -> None:
        """Nothing can be sent without the epoch: under another one the cloud would double what it has."""
        text = "nothing can be salvaged: neither its ledger nor the note beside it says which epoch it was"
        log.error("salvage of %s: %s", damaged.name, text)
        await asyncio.to_thread(tell, damaged, text)
        self._event("salvage_failed", f"{damaged.name}: {text}; how much was in it is not known")
        self._lost(0, 0)

    def _let_go(self) -> None:
        """On the buffer's thread: what was delivered to the end is told and removed."""
        for store in self.stores:
            if store.empty:
                damaged = store.path.with_name(store.path.name.replace(".salvaged-", ".damaged-", 1))
                if damaged.exists():
                    tell(damaged, store.verdict())
                self.stores = tuple(s for s in self.stores if s is not store)
                store.remove()
        held = {store.path for store in self.stores}
        for one in damaged_sets(self._buffer):
            if one.told and salvaged_path(one.path) not in held and salvaged_path(one.path).exists():
                unlink_set(salvaged_path(one.path))

    def _bound(self) -> None:
        """Old sets go first where the disk is short."""
        disk = os.statvfs(self._buffer.parent)
        short = disk.f_bavail * disk.f_frsize < self._limits.free_disk_bytes
        for one in drop_damaged(
            self._buffer, keep_bytes=0 if short else self._keep_bytes, keep_sets=_KEEP_SETS
        ):
            log.info("%s is dropped: it was salvaged, delivered and told", one.path.name)

    # --- on the buffer's thread ---

    def settle(self, settled: Iterable[tuple[int, Range]]) -> list[tuple[int, Range]]:
        """Apply acks; what could not be applied comes back."""
        left: list[tuple[int, Range]] = []
        for store in self.stores:
            ranges = [one for epoch, one in settled if epoch == store.ledger.epoch]
            if not ranges:
                continue
            try:
                store.commit(Group([], []), ranges, 0)
            except StoreError as err:
                log.debug("acks of epoch %d wait: %s", store.ledger.epoch, err)
                left += [(store.ledger.epoch, one) for one in ranges]
        return left

    def claim(self, count: int) -> list[Batch]:
        """Batches of the oldest epoch that has any."""
        for store in self.stores:
            if store.ledger.loose_frames > 0 and (batches := store.claim(count, ())):
                return batches
        return []

    def close(self) -> None:
        for store in self.stores:
            store.close()
        self.stores = ()

    @property
    def told(self) -> tuple[Told, ...]:
        return tuple(
            Told(
                store.path.name.replace(".salvaged-", ".damaged-", 1), led.epoch, store.progress.phase,
                led.kept_frames, led.kept_readings, led.settled_frames, led.settled_readings, led.gapped_frames,
                led.gapped_readings, led.held_frames, led.held_readings, store.size_bytes(),
            )
            for store in self.stores
            for led in [store.ledger]
        )  # fmt: skip
