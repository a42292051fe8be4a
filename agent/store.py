"""The buffer's file: every statement that touches it, and the arithmetic of what it holds. Synchronous; one thread.

`agent/buffer.py` is what the rest of the agent sees. Here each public method is one transaction (or none), so that
a power cut finds either all of it or nothing.

Rules:
1. WAL, `synchronous=FULL`. One connection writes, checkpoints and reads; no mmap.
2. kept = settled + gapped + held, in frames and readings, after every transaction.
3. A frame belongs to at most one recorded batch; a recorded batch has no holes and is recorded before it is sealed.
4. Eviction takes the oldest bulk frames first, then the oldest normal ones, alarms last, and only frames that are in no
   recorded batch: what may already have been sent is never evicted, so a gap never counts what the cloud has. What it
   takes is reported by a gap frame in the same transaction; a gap frame that was never sent grows instead of being
   followed by the next, so that gaps never fill the buffer.
5. Every row's CRC is checked when it is read to be sent; a row that fails becomes a gap, never a batch.
6. A damaged file is renamed, never deleted, and a fresh one with a new epoch takes its place.

Errors, by who acts::

    StoreError
    ├── StoreRefusing   the disk refuses (read-only, I/O error): keep the group in memory, try again later
    │   ├── StoreFull   there is no room: the same, and smaller groups may fit
    │   └── StoreWaits  there is, once what is held is sent; who cannot wait says so, and the oldest gives way
    └── StoreUnusable   no file can be had at all: a human is told what to change
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import msgspec
import zstandard

from agent import gaps as gap_sums
from agent.clock import Clock, ClockReading, Hold
from agent.gap_copies import copy_made, copy_of
from agent.store_migrations import ALARM_MARK, BULK_MARK, SCHEMA_VERSION, SchemaUnknown, fit
from agent.store_rows import insert_clock, read_batches, read_clocks, rows_crc
from config.failed_sync import closing_unsynced, write_log_again
from config.failpoint import reached
from config.wal import Log, read_log
from drivers.contract import Priority
from sync.wire import (
    MAX_EPOCH,
    MAX_FRAMES,
    ZSTD_LEVEL,
    ClockRow,
    EventFrame,
    GapFrame,
    Layout,
    Sealed,
    WireError,
    encode_frame,
    layout_id,
    seal,
)

log = logging.getLogger(__name__)

Range: TypeAlias = tuple[int, int]
"""A closed range of seqs."""


class Bounds(NamedTuple):
    """What names a batch: seqs begin anew in every epoch, and a gateway may hold the rows of several."""

    epoch: int
    first: int
    last: int


PAGE_BYTES: Final = 4096  #: a flash sector: a page torn by a power cut then harms no neighbour
BATCH_BYTES: Final = 240 * 1024  #: frames and layouts of one batch, so that it fits 256 KiB even uncompressed
_FRAME_OVERHEAD: Final = 16  #: of a row in its page, and of a frame in a batch
_COMMIT_PAGES: Final = 9  #: pages that a small commit writes beside its frames (measured: bench_buffer.py)
_EVICT_SLACK: Final = 100  #: evict 1/100 of the cap beyond what is needed, so that not every commit has to
_EVICT_STEP_BYTES: Final = 2**20  #: evict in steps of this, which bounds the memory it takes
_EVICT_MOST_BYTES: Final = (
    8 * 2**20
)  #: and in one commit no more than this, or twice what it needs, where the file is larger than its cap
_VACUUM_LIVE_PAGES: Final = (
    1024  #: shrink the file only while what it holds is small: 4 MiB cost nothing to copy
)
_VACUUM_FREE_PAGES: Final = 2048
SKIPPED: Final = 2**20
"""Seqs passed over where a commit may be hidden: a group of 8 MiB at most, of frames that count 17 bytes at least, and
the gaps that it tells beside them."""
_MARK_NS: Final = 3600 * 10**9  #: clock rows older than this one are thinned to one an hour
_PARKED_MAX: Final = 200
"""Parked frames kept for a look, and a sixteenth of the cap in bytes; the oldest go first: a gap has counted each."""

_GAP_TAG: Final = b"\x01"  #: the second byte of a gap frame (sync.wire: array, then the kind)
_GAPS_MOST: Final = 2_048  #: unsent gap frames in a full buffer, until they are summed up
_RUNS_TOLD: Final = 8  #: of so many unbroken runs in one step of eviction each is told by itself
_HOP_BYTES: Final = (
    8 * 1024
)  #: what may travel between two alarms of one batch, so that dense alarms make full batches
_MARKS: Final = {Priority.ALARM: ALARM_MARK, Priority.NORMAL: 0, Priority.BULK: BULK_MARK}
_BY_MARK: Final = {mark: priority for priority, mark in _MARKS.items()}
_TABLES: Final = {Priority.ALARM: "alarms", Priority.BULK: "bulk"}


class StoreError(Exception):
    """The root."""


class StoreRefusing(StoreError):
    """The disk refuses writes; the text says how and what helps, `cause` which of `agent.status.Code` it is."""

    def __init__(self, text: str, cause: str = "buffer_holding") -> None:
        super().__init__(text)
        self.cause = cause


class StoreFull(StoreRefusing):
    """There is no room for this group, and none of it is kept: it may be offered in smaller ones."""


class StoreWaits(StoreRefusing):
    """It fits only in the place of what is held and may be sent in a moment: none of it is kept, offer it again."""


class StoreUnusable(StoreError):
    """There is no file to work with; the text says what to change."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    max_bytes: int  #: file and WAL
    free_disk_bytes: int = 0
    ballast_bytes: int = 0
    max_age_ns: int = 0  #: 0: no limit
    clock_hold_ns: int = (
        0  #: how long frames of an unsynchronized boot may wait for its clock (`agent.clock.Hold`)
    )
    thin_keep: int = (
        0  #: of so many scans of a device one stays when room is wanted; 0: the oldest go at once
    )
    quick_check_s: float = 5.0

    @property
    def wal_bytes(self) -> int:
        """Checkpoint when the WAL may have grown to this: 4 MiB, less under a small cap."""
        return max(16 * PAGE_BYTES, min(4 * 2**20, self.max_bytes // 8))

    @property
    def group_bytes(self) -> int:
        """The largest group that one commit may hold; its WAL comes on top of the threshold."""
        return max(64 * 1024, min(8 * 2**20, self.max_bytes // 8))

    @property
    def file_bytes(self) -> int:
        return max(32 * PAGE_BYTES, self.max_bytes - self.wal_bytes - 2 * self.group_bytes)


class Group(msgspec.Struct):
    """What one commit adds."""

    frames: list[bytes]
    readings: list[int]
    layouts: list[Layout] = []
    clocks: list[ClockReading] = []
    size_bytes: int = 0
    alarms: int = 0  #: the first so many frames are alarms
    bulk: int = 0  #: the last so many are bulk

    @property
    def empty(self) -> bool:
        return not (self.frames or self.layouts or self.clocks)


class Batch(msgspec.Struct, frozen=True):
    """A recorded batch with its bytes."""

    sealed: Sealed
    readings: int

    @property
    def bounds(self) -> Bounds:
        return Bounds(self.sealed.epoch, self.sealed.first, self.sealed.last)


class Recorded(msgspec.Struct, frozen=True, gc=False):
    """The bounds of a batch, as recorded before it was first sent."""

    first: int
    last: int
    readings: int
    size_bytes: int
    clocks: bytes

    @property
    def frames(self) -> int:
        return self.last - self.first + 1


class Ledger:
    """The running totals and the recorded batches: changed on a copy, which replaces it when the transaction holds."""

    __slots__ = (
        "alarm_frames", "boot", "bulk_frames", "bulk_thinned_to", "epoch", "gap_frames", "gapped_frames",
        "gapped_readings", "kept_frames", "kept_readings", "next_seq", "normal_thinned_to", "recorded",
        "settled_frames", "settled_readings",
    )  # fmt: skip

    def __init__(self, epoch: int, boot: int) -> None:
        self.epoch = epoch
        self.next_seq = 1
        self.boot = boot
        self.kept_frames = self.kept_readings = 0
        self.settled_frames = self.settled_readings = 0
        self.gapped_frames = self.gapped_readings = 0
        self.alarm_frames = self.bulk_frames = self.gap_frames = 0  #: held, and found by their tables
        self.bulk_thinned_to = self.normal_thinned_to = 0
        self.recorded: dict[int, Recorded] = {}

    def copy(self) -> Ledger:
        other = Ledger.__new__(Ledger)
        for name in self.__slots__:
            setattr(other, name, getattr(self, name))
        other.recorded = dict(self.recorded)
        return other

    @property
    def held_frames(self) -> int:
        return self.kept_frames - self.settled_frames - self.gapped_frames

    @property
    def held_readings(self) -> int:
        return self.kept_readings - self.settled_readings - self.gapped_readings

    @property
    def loose_frames(self) -> int:
        """Held frames that are in no recorded batch: the backlog."""
        return self.held_frames - sum(r.frames for r in self.recorded.values())


class _ScanHead(msgspec.Struct, array_like=True, tag=0, gc=False):
    """The front of a `ScanFrame`; the decoder skips the values behind it."""

    layout: int
    boot: int
    taken_at_ns: int


Head: TypeAlias = _ScanHead | GapFrame | EventFrame
_Row: TypeAlias = "tuple[int, int, Head | None]"
"""Of a frame: seq, readings, head."""

_decode_head: Callable[[bytes], Head] = msgspec.msgpack.Decoder(_ScanHead | GapFrame | EventFrame).decode
_encode = msgspec.msgpack.Encoder().encode
_decode_clocks = msgspec.msgpack.Decoder(tuple[ClockRow, ...]).decode
_decode_layout = msgspec.msgpack.Decoder(Layout).decode


def frame_head(frame: bytes) -> Head | None:
    """What a frame says of itself, without its values. None for a kind that this version does not know."""
    try:
        return _decode_head(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # a rotten row may be anything
        return None


def row_crc(seq: int, readings: int, data: bytes, priority: Priority = Priority.NORMAL) -> int:
    """Covers the row's numbers and its priority too: any single flipped bit of them gives another value."""
    return zlib.crc32(data, (seq + readings) & 0xFFFFFFFF) ^ _MARKS[priority]


def row_priority(seq: int, readings: int, data: bytes, crc: int) -> Priority | None:
    """What a row's CRC says it is; None: the row is damaged."""
    return _BY_MARK.get(crc ^ zlib.crc32(data, (seq + readings) & 0xFFFFFFFF))


def parts(sizes: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Cut consecutive frames of these sizes into the fewest runs of at most `most` bytes and `MAX_FRAMES` frames, of
    about equal size; each as (start, end). A frame larger than `most` is a run of its own."""
    target = sum(sizes) / max(1, -(-sum(sizes) // most))
    runs: list[tuple[int, int]] = []
    start = size = 0
    for i, one in enumerate(sizes):
        if i > start and (size + one > most or size >= target or i - start >= MAX_FRAMES):
            runs.append((start, i))
            start, size = i, 0
        size += one
    if start < len(sizes):
        runs.append((start, len(sizes)))
    return runs


def without(whole: Range, ranges: Iterable[Range]) -> list[Range]:
    """What is left of `whole` without `ranges`."""
    left = [whole]
    for first, last in ranges:
        pieces: list[Range] = []
        for a, b in left:
            if last < a or b < first:
                pieces.append((a, b))
                continue
            if a < first:
                pieces.append((a, first - 1))
            if last < b:
                pieces.append((last + 1, b))
        left = pieces
    return left


def joined(gaps: list[GapFrame], more: Sequence[GapFrame]) -> list[GapFrame]:
    """Gaps with their neighbours of the same boot and reason made one."""
    out = list(gaps)
    for gap in more:
        last = out[-1] if out else None
        if last and last.last + 1 == gap.first and (last.boot, last.reason) == (gap.boot, gap.reason):
            out[-1] = GapFrame(
                last.epoch, last.first, gap.last, last.scans + gap.scans, last.readings + gap.readings, last.reason,
                last.device if last.device == gap.device else "", last.boot,
                min(last.from_boot_ns, gap.from_boot_ns), max(last.to_boot_ns, gap.to_boot_ns),
            )  # fmt: skip
        else:
            out.append(gap)
    return out


class _Run(NamedTuple):
    """Frames that make a batch."""

    first: int
    frames: list[bytes]
    readings: int
    bad: list[tuple[int, int, None]]  #: rows that fail their CRC: seq, readings
    cursor: int  #: where to go on


class Store:
    """One buffer file."""

    def __init__(self, path: Path, gateway: str, limits: Limits, clock: Clock) -> None:
        self.path = path
        self.ledger = Ledger(0, 0)
        self.events: list[
            tuple[str, str]
        ] = []  #: (code, text) of what happened to the file; the caller reports them
        self.evicting = False
        self.short_of_disk = False  #: the cap is not our own but the free-disk floor
        self.oldest: tuple[int, int] | None = None  #: (boot, boot_ns) of the oldest held frame
        self.parked = 0
        self.gateway = gateway
        self._limits = limits
        self._clock = clock
        self.refusing: StoreRefusing | None = None  #: why the file could only be opened for reading
        self._conn: sqlite3.Connection | None = None
        self._reading: sqlite3.Connection | None = (
            None  #: while the disk takes no writes and there is no other
        )
        self._promised_boot = 0  #: a boot's number that frames in memory have, before any file knows of it
        self._unsaved: set[int] = set()  #: firsts of recorded batches that no file knows of
        self._lock_fd: int | None = None
        self._layouts: dict[int, bytes] = {}  #: msgpack, by id: everything that a frame here may name
        self._clocks: dict[int, ClockRow] = {}  #: by boot: the row to compute wall time from
        self._marks: list[tuple[ClockRow, int]] = []  #: clock rows with their next_seq, oldest first
        self._hold = Hold(limits.clock_hold_ns)
        self._stopped_at_held = False  #: the last claim found nothing but frames that wait for their clock
        self._retiring: dict[
            int, int
        ] = {}  #: boots without own frames: the seq below which gaps may name them
        self._mark_id: int | None = None  #: the newest row, where it may be overwritten by the next minute's
        self._cursor = 1  #: all frames below are recorded, settled or gone
        self._cursor_normal = 1  #: the same of all but bulk, where bulk is not to be sent
        self._cursor_alarm = 1
        self._evictable_from = 1  #: no normal frame below is left to evict
        self._open_gaps: dict[gap_sums.Key, int] = {}  #: seqs of gap frames that may still grow
        self._gaps_after = 0  #: how many gap frames were left when they were last summed up
        self._thinning: dict[int, int] = {}  #: by layout: scans seen while thinning
        self._sum_from = (
            1  #: gap frames below may have been sent: the row that recorded their batch was damaged
        )
        self._oldest_seq = 0
        self._wal_bytes = (
            0  #: how much the WAL may have grown since the last checkpoint (an estimate from above)
        )
        self._doubtful: tuple[Group, int, int] | None = (
            None  #: a commit under way; its epoch and next_seq if it holds
        )
        self._landed: Group | None = (
            None  #: a group whose commit failed and was found in the file all the same
        )
        self._damage = ""  #: why the file must be replaced before it is used again
        self._compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)

    # --- opening ---

    def open(self) -> None:
        """Open, check, and if need be set aside and make the file. Raises `StoreUnusable`."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise StoreUnusable(f"buffer {self.path}: cannot make its folder: {err.strerror}") from err
        self._lock()
        try:
            try:
                self._connect_for_the_first_time()
            except sqlite3.Error as err:
                # At open a plain SQL error is damage too: the schema is ours, and a table is missing.
                if not _damaged(err) and _code(err) != sqlite3.SQLITE_ERROR:
                    raise
                self._replace(str(err))
        except SchemaUnknown as err:
            self.close()
            raise StoreUnusable(str(err)) from err
        except (sqlite3.Error, StoreRefusing) as err:
            if self._open_reading(err):
                return
            self.close()
            raise StoreUnusable(
                f"buffer {self.path}: {err}; check the disk, its space and the folder's owner"
            ) from err
        self._restore_ballast()

    def _open_reading(self, err: sqlite3.Error | StoreRefusing) -> bool:
        """On a disk that takes no writes now: what the file holds can be read and sent, new readings wait in memory
        until it takes them again. Whether that can be done."""
        if not (
            _read_only(self.path.parent) or _code(err) in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR)
        ):
            return False
        self.refusing = self._refusal(err)
        try:
            if self.path.exists():
                self._load(self._reader(), reading=True)
            else:
                self.ledger.boot = self._promised_boot = 1
        except (sqlite3.Error, StoreRefusing, OSError) as again:
            if not _read_only(self.path.parent):
                return False
            log.error("buffer %s: cannot be read either: %s", self.path, again)
            self.ledger.boot = self._promised_boot = _UNSURE_BOOTS
        return True

    def _reader(self) -> sqlite3.Connection:
        """A connection that reads: the writing one, or one that changes nothing. Raises `sqlite3.Error`."""
        if self._conn is not None:
            return self._conn
        if self._reading is None:
            uri = self.path.absolute().as_uri()
            for mode in ("mode=ro", "mode=ro&immutable=1"):  # without a WAL index, where none can be made
                conn = sqlite3.connect(f"{uri}?{mode}", uri=True, isolation_level=None, timeout=1.0)
                try:
                    conn.execute("SELECT epoch FROM ledger").fetchone()
                except sqlite3.Error:
                    conn.close()
                    if "immutable" in mode:
                        raise
                    continue
                self._reading = conn
                break
        assert self._reading is not None  # noqa: S101 - the loop ends with one or raises
        return self._reading

    def _connect_for_the_first_time(self) -> None:
        """A disk that was full when the agent ended is still full: opening needs a little room, too."""
        try:
            self._connect()
        except sqlite3.Error as err:
            disk = os.statvfs(self.path.parent)
            if _damaged(err) or not self._ballast.exists():
                raise
            if disk.f_bavail * disk.f_frsize >= self._limits.ballast_bytes:
                raise
            self._ballast.unlink()
            log.warning("buffer %s: %s; ballast released", self.path, err)
            self._connect()

    def _lock(self) -> None:
        """Two agents on one buffer would both own its seqs: the second is refused."""
        path = self.path.with_name(self.path.name + ".lock")
        try:
            try:
                self._lock_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as err:
                if err.errno != errno.EROFS:
                    raise
                self._lock_fd = os.open(path if path.exists() else path.parent, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            os.close(self._lock_fd or -1)
            self._lock_fd = None
            raise StoreUnusable(
                f"buffer {self.path}: another agent is using it; stop that one first"
            ) from err
        except OSError as err:
            raise StoreUnusable(f"buffer {self.path}: cannot lock {path.name}: {err.strerror}") from err

    def _connect(self) -> None:
        """Open the file and load what is in it; raises `sqlite3.Error` and changes nothing of ours on failure."""
        if not self.path.exists():
            self._finish_setting_aside()
        fresh = not self.path.exists() or self.path.stat().st_size == 0
        try:
            write_log_again(self.path)
        except OSError as err:
            raise _io_error(err) from err
        log = self._read_log()
        self._keep_wal()
        conn = sqlite3.connect(self.path, isolation_level=None, timeout=5.0)
        torn = False
        try:
            if fresh:
                self.path.chmod(0o600)
                conn.execute(f"PRAGMA page_size = {PAGE_BYTES}")
            if conn.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
                raise sqlite3.OperationalError("the file system cannot hold a write-ahead log")
            conn.execute("PRAGMA synchronous = FULL")
            conn.execute("PRAGMA wal_autocheckpoint = 0")
            conn.execute("PRAGMA temp_store = MEMORY")
            # What a checkpoint leaves allocated is overwritten next: no growth is needed on a disk that filled up.
            conn.execute(f"PRAGMA journal_size_limit = {self._limits.wal_bytes}")
            version = conn.execute("PRAGMA user_version").fetchone()[0]
            if version == 0 and not conn.execute("SELECT 1 FROM sqlite_schema").fetchone():
                self._create(conn)
            else:
                torn = self._check_wal(conn, log)
                fit(conn, self.path)
                self._quick_check(conn)
            # Per connection, so set at every open; the last line of defence, as `_make_room` stays well below it.
            most = (self._limits.max_bytes - self._limits.wal_bytes) // PAGE_BYTES
            conn.execute(f"PRAGMA max_page_count = {most}")
            self._load(conn, torn=torn)
        except UnicodeDecodeError as err:  # SQLite quotes a damaged schema, which need not be text
            conn.close()
            raise sqlite3.DatabaseError(f"the schema is damaged: {err.reason}") from err
        except BaseException:
            with closing_unsynced(self.path):
                conn.close()
            raise
        self._conn = conn
        self._unsaved.clear()  # it was loaded anew
        self._stop_reading()
        with contextlib.suppress(OSError):
            self._kept_wal.unlink(missing_ok=True)
        self._note_epoch()
        if self._doubtful is not None:
            group, epoch, next_seq = self._doubtful
            landed = self.ledger.epoch == epoch and self.ledger.next_seq == next_seq
            self._landed = group if landed else None
            self._doubtful = None

    @property
    def _kept_wal(self) -> Path:
        return self.path.with_name(self.path.name + "-wal.kept")

    def _keep_wal(self) -> None:
        """SQLite deletes a WAL in which it believes nothing, and salvage wants it: it keeps a second name until the
        file has been opened well (not every file system can: vfat)."""
        with contextlib.suppress(OSError):
            if not self._kept_wal.exists():
                os.link(self.path.with_name(self.path.name + "-wal"), self._kept_wal)

    def _read_log(self) -> Log | None:
        try:
            return read_log(self.path)
        except OSError:
            return None

    @staticmethod
    def _check_wal(conn: sqlite3.Connection, log: Log | None) -> bool:
        """SQLite reads a WAL up to the first frame whose checksum is wrong, and takes the rest for what a crash has
        torn. A crash tears the last transaction; two or more behind the break were committed, and rot has hidden them.
        Of a single one nobody can tell: whether there is such a rest."""
        _, believed, _ = conn.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        frames, commits = log.behind(max(0, believed)) if log is not None else (0, 0)
        if commits > 1:
            raise sqlite3.DatabaseError(
                f"the WAL is damaged: {commits} committed transactions cannot be read"
            )
        return frames > 0

    def _quick_check(self, conn: sqlite3.Connection) -> None:
        """Within its budget. The walk through the file is one step of SQLite's machine, in which it asks no progress
        handler but does look at `interrupt`: a GB that is not in the cache took 40 s with a handler."""
        if not self._limits.quick_check_s:
            return
        over = threading.Event()

        def interrupt() -> None:
            wait_s = self._limits.quick_check_s
            while not over.wait(wait_s):
                conn.interrupt()
                wait_s = 0.05  # again, should it have come before the statement

        watch = threading.Thread(target=interrupt, name="quick-check", daemon=True)
        watch.start()
        try:
            found = conn.execute("PRAGMA quick_check(1)").fetchone()[0]
        except sqlite3.OperationalError as err:
            if _code(err) != sqlite3.SQLITE_INTERRUPT:
                raise
            log.info("buffer %s: too large to check within %.0f s; every row is checked when it is sent",
                     self.path, self._limits.quick_check_s)  # fmt: skip
            return
        finally:
            over.set()
            watch.join()  # an interrupt that comes late would hit the next statement
        if found != "ok":
            raise sqlite3.DatabaseError(f"quick check: {found}")

    def _create(self, conn: sqlite3.Connection) -> None:
        """The schema, a new epoch, and, where the file replaces a damaged one, what the pending frames rely on."""
        epoch = 0
        while not 0 < epoch <= MAX_EPOCH:
            epoch = secrets.randbits(63)
        schema = resources.files("agent").joinpath("buffer.sql").read_text()
        conn.execute("BEGIN IMMEDIATE")
        statement = ""
        for line in schema.splitlines(keepends=True):
            statement += line
            if sqlite3.complete_statement(statement):
                conn.execute(statement)
                statement = ""
        conn.execute(
            "INSERT INTO ledger (id, epoch, next_seq, boot, kept_frames, kept_readings, settled_frames,"
            " settled_readings, gapped_frames, gapped_readings) VALUES (1, ?, 1, ?, 0, 0, 0, 0, 0, 0)",
            (epoch, self.ledger.boot),
        )
        conn.execute("INSERT INTO format VALUES (1, ?, ?)", (SCHEMA_VERSION, SCHEMA_VERSION))
        conn.executemany(
            "INSERT INTO layouts VALUES (?, ?)",
            [(key.to_bytes(8, "big"), data) for key, data in self._layouts.items()],
        )
        if self.ledger.boot in self._clocks:
            insert_clock(conn, self._clocks[self.ledger.boot], 1)
        conn.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        reached("store.before_create")
        conn.execute("COMMIT")

    def _load(self, conn: sqlite3.Connection, *, reading: bool = False, torn: bool = False) -> None:
        row = conn.execute("SELECT * FROM ledger").fetchone()
        if row is None:
            raise sqlite3.DatabaseError("the ledger is empty")
        led = Ledger(row[1], row[3])
        led.next_seq = row[2]
        (led.kept_frames, led.kept_readings, led.settled_frames, led.settled_readings, led.gapped_frames,
         led.gapped_readings, led.alarm_frames, led.bulk_frames, led.gap_frames, led.bulk_thinned_to,
         led.normal_thinned_to) = row[4:15]  # fmt: skip
        rotten: list[int] = []
        for batch, good in read_batches(conn):
            if good:
                led.recorded[batch[0]] = Recorded(*batch)
            else:
                rotten.append(batch[0])
        newest = conn.execute("SELECT max(seq) FROM frames").fetchone()[0] or 0
        led.next_seq = max(led.next_seq, newest + 1)
        self._check_ledger(led)
        clocks: dict[int, ClockRow] = {}
        marks: list[tuple[ClockRow, int]] = []
        rotten_clocks: list[int] = []
        for number, line, next_seq in read_clocks(conn):
            if line is None:
                rotten_clocks.append(number)
                continue
            _better(clocks, line)
            marks.append((line, next_seq))
        led.boot = max([led.boot, *clocks])  # no number twice, whatever a flipped bit has made of it
        boot_id = self._clock.boot_id
        same = [line.boot for line, _ in marks if line.boot_id == boot_id]
        if reading and not same:  # what it shows may be old: no number that another boot may have
            self._promised_boot = led.boot + _UNSURE_BOOTS
        led.boot = same[-1] if same else self._promised_boot or led.boot + 1
        layouts = {int.from_bytes(k, "big"): d for k, d in conn.execute("SELECT id, data FROM layouts")}
        now = self._clock.read()
        first = _clock_row(now, led.boot, boot_id)
        if not reading:
            conn.execute("BEGIN IMMEDIATE")
            try:
                conn.executemany("DELETE FROM clock WHERE id = ?", zip(rotten_clocks))
                conn.executemany("DELETE FROM batches WHERE first = ?", zip(rotten))
                insert_clock(conn, first, led.next_seq)
                conn.execute("UPDATE ledger SET boot = ?", (led.boot,))
                # With what is known since this start nothing is in doubt.
                if torn and (self.ledger.epoch != led.epoch or self.ledger.next_seq > led.next_seq):
                    self._skip(conn, led)
                conn.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    conn.execute("ROLLBACK")
                raise
            reached("store.after_open")
            self._tell_rot(len(rotten_clocks), len(rotten))
            for line, _ in marks:
                if line.boot != led.boot:
                    self._hold.learn(synchronized=line.synchronized, wall_ns=line.wall_ns)
        _better(clocks, first)
        marks.append((first, led.next_seq))
        self.ledger, self._layouts, self._clocks, self._marks = led, layouts, clocks, marks
        self._mark_id = None
        self._retiring = {}
        self._forget_places()
        self._sum_from = led.next_seq if rotten else self._sum_from
        self.parked = conn.execute("SELECT count(*) FROM parked").fetchone()[0]
        self._look_at_oldest(conn)

    def _tell_rot(self, clocks: int, batches: int) -> None:
        """Rows that failed their CRC at an open and were dropped."""
        if not (clocks or batches):
            return
        text = (
            f"{clocks} clock rows and {batches} recorded batches were damaged and dropped: other clock rows serve, or"
            " times are estimates; the frames of these batches go again, in other bounds"
        )
        log.error("buffer %s: %s", self.path, text)
        self.events.append(("buffer_damaged", text))

    def _skip(self, conn: sqlite3.Connection, led: Ledger) -> None:
        """The log ends in what cannot be read: a commit that a power cut has torn, which nobody was promised, or one
        that rot has hidden, whose seqs the cloud may have. No seq is given out twice; the gap says which were not."""
        first, now_ns = led.next_seq, self._clock.boot_ns()
        led.next_seq += SKIPPED
        led.kept_frames += SKIPPED
        led.gapped_frames += SKIPPED
        gap = GapFrame(led.epoch, first, led.next_seq - 1, 0, 0, "skipped", "", led.boot, now_ns, now_ns)
        self._insert(conn, led, [encode_frame(gap)], [0])
        conn.execute(
            "UPDATE ledger SET next_seq = ?, kept_frames = ?, gapped_frames = ?, gap_frames = ?",
            (led.next_seq, led.kept_frames, led.gapped_frames, led.gap_frames),
        )
        log.warning(
            "buffer %s: its log ends in a commit that cannot be read, torn by a power cut or damaged; seqs %d to %d are"
            " passed over, and may never have held anything", self.path, first, gap.last,
        )  # fmt: skip

    def _check_ledger(self, led: Ledger) -> None:
        """The ledger's row has no CRC, but its numbers check each other: every frame kept has used up one seq. A wrong
        epoch or a seq used twice would cost readings in the cloud and nobody would know."""
        noted = noted_account(self.path)
        if noted is not None and noted.epoch != led.epoch:
            raise sqlite3.DatabaseError("the ledger's epoch is not that of this file")
        if led.next_seq != led.kept_frames + 1 or led.held_frames < 0 or led.held_readings < 0:
            raise sqlite3.DatabaseError("the ledger's numbers contradict each other")

    def _note_epoch(self) -> None:
        """Beside the file, for the day when its ledger cannot be read: without the epoch no row could be sent again."""
        with contextlib.suppress(OSError):
            if noted_account(self.path) is None:
                note_account(self.path, self.ledger, epoch_only=True)

    def _forget_places(self) -> None:
        """What was remembered of where things are, and may not be so any more."""
        self._cursor = self._cursor_normal = self._cursor_alarm = self._evictable_from = 1
        self._open_gaps, self._thinning, self._gaps_after = {}, {}, 0

    def _replace(self, why: str) -> None:
        """Set the damaged file aside and open a fresh one."""
        self._disconnect()
        if self.ledger.epoch:
            with contextlib.suppress(OSError):
                note_account(self.path, self.ledger)
        reached("store.before_set_aside")
        aside = self._set_aside()
        reached("store.after_set_aside")
        held = self.ledger.held_readings
        known = f"about {held} readings in it" if held else "what it held"
        text = f"the buffer was damaged ({why}) and is kept as {aside}; {known} waits there for salvage"
        log.error("buffer %s: %s", self.path, text)
        self.events.append(("buffer_damaged", text))
        self._doubtful = self._landed = None
        self._damage = ""
        self._connect()

    def _set_aside(self) -> str:
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self._clock.read().wall_ns / 1e9))
        name = f"{self.path.name}.damaged-{stamp}"
        copy = 0
        while self.path.with_name(name).exists():
            copy += 1
            name = f"{self.path.name}.damaged-{stamp}-{copy}"
        try:
            for tail in ("", *_TAILS):
                with contextlib.suppress(FileNotFoundError):
                    self.path.with_name(self.path.name + tail).rename(self.path.with_name(name + tail))
                    reached("store.after_rename")
            with contextlib.suppress(FileNotFoundError):
                self._kept_wal.rename(self.path.with_name(name + "-wal"))
        except OSError as err:
            raise StoreRefusing(
                f"the damaged buffer {self.path} cannot be set aside: {err.strerror}"
            ) from err
        return name

    def _finish_setting_aside(self) -> None:
        """Where that was cut short, the file has its new name and its companions do not: without them it lacks its
        newest rows, and SQLite would delete a WAL that it finds beside a new file."""
        aside = [p for p in sorted(self.path.parent.glob(f"{self.path.name}.damaged-*")) if is_set(p)]
        with contextlib.suppress(OSError):
            for tail in _TAILS:
                left = self.path.with_name(self.path.name + tail)
                if not left.exists():
                    continue
                target = aside[-1].with_name(aside[-1].name + tail) if aside else None
                if target is None or target.exists():
                    left.unlink()
                else:
                    left.rename(target)

    # --- the transaction ---

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[tuple[sqlite3.Connection, Ledger]]:
        """All or nothing, on disk and in memory. The ledger is written once, at the end."""
        conn = self._ready()
        led = self.ledger.copy()
        conn.execute("BEGIN IMMEDIATE")
        try:
            yield conn, led
            conn.execute(
                "UPDATE ledger SET next_seq = ?, kept_frames = ?, kept_readings = ?, settled_frames = ?,"
                " settled_readings = ?, gapped_frames = ?, gapped_readings = ?, alarm_frames = ?, bulk_frames = ?,"
                " gap_frames = ?, bulk_thinned_to = ?, normal_thinned_to = ?",
                (led.next_seq, led.kept_frames, led.kept_readings, led.settled_frames, led.settled_readings,
                 led.gapped_frames, led.gapped_readings, led.alarm_frames, led.bulk_frames, led.gap_frames,
                 led.bulk_thinned_to, led.normal_thinned_to),
            )  # fmt: skip
            self._write_batches(conn, led)
            reached("store.before_commit")
            conn.execute("COMMIT")
        except BaseException:
            self._mark_id = None  # its row may be gone with the transaction
            self._forget_places()
            with contextlib.suppress(sqlite3.Error):
                conn.execute("ROLLBACK")
            raise
        reached("store.after_commit")
        self.ledger = led
        self._unsaved.clear()
        self._wal_bytes += _COMMIT_PAGES * PAGE_BYTES

    def _write_batches(self, conn: sqlite3.Connection, led: Ledger) -> None:
        before = {first: r for first, r in self.ledger.recorded.items() if first not in self._unsaved}
        gone = [(first,) for first, r in before.items() if led.recorded.get(first) != r]
        new = [r for first, r in led.recorded.items() if before.get(first) != r]
        if gone:
            conn.executemany("DELETE FROM batches WHERE first = ?", gone)
        if new:
            conn.executemany(
                "INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (*row, rows_crc(row))
                    for r in new
                    for row in [(r.first, r.last, r.readings, r.size_bytes, r.clocks)]
                ],
            )

    # --- keeping ---

    def commit(
        self, group: Group, settled: Sequence[Range], live_room: int, *, patient: bool = False
    ) -> list[Batch]:
        """Keep a group and apply acks, in one transaction; cut up to `live_room` batches of what was kept. A patient
        caller's group never takes the room of what is held where it is the disk that is short: `StoreWaits`.

        Raises `StoreRefusing`: then nothing of it is known to be kept, and the same group must be offered again,
        alone, before any other."""
        landed = False
        try:
            self._ready()
            if landed := self._landed is group:
                group = Group([], [])
            if patient:
                self._leave_room(group, settled)
            return self._commit(group, settled, live_room)
        except (sqlite3.Error, StoreFull) as err:
            try:
                return self._after_failure(err, group, settled, live_room, patient=patient)
            except StoreFull as full:
                if landed:  # it is kept: offered in smaller ones it would be kept twice
                    raise StoreRefusing(str(full)) from full
                raise

    def _commit(self, group: Group, settled: Sequence[Range], live_room: int) -> list[Batch]:
        made: list[Recorded] = []
        self._look_at_log(group.size_bytes)
        with self._transaction() as (conn, led):
            if group.layouts:
                self._add_layouts(conn, group.layouts)
            self._settle(conn, led, settled)
            self._tell(conn, led, self._make_room(conn, led, group.size_bytes))
            first = led.next_seq
            for reading in group.clocks:
                self._add_clock(conn, led, reading)
            frames, readings = group.frames, group.readings
            if frames:
                self._insert(conn, led, frames, readings, group.alarms, group.bulk)
            if live_room > 0 and frames and self._may_record(led):
                count = group.alarms if self._waits(led.boot) else len(frames)
                made = self._cut_live(led, first, frames[:count], readings[:count], live_room, group.alarms)
            if group.alarms:
                self._stopped_at_held = False  # these do not wait for the clock
            self._doubtful = (group, led.epoch, led.next_seq) if group.frames else None
        # The group is kept: from here on nothing may fail any more.
        self._doubtful = self._landed = None
        self._wal_bytes += group.size_bytes + group.size_bytes // 4
        batches = self._seal_all([(r, frames[r.first - first : r.last - first + 1]) for r in made])
        self._after_commit()
        return batches

    def _leave_room(self, group: Group, settled: Sequence[Range]) -> None:
        """Raises `StoreWaits` where a group would evict for the disk's sake. The acks are applied all the same: they
        make the room that is waited for."""
        if not self._takes_room(group):
            return
        with self._transaction() as (conn, led):
            self._settle(conn, led, settled)
        self._after_commit()
        if self._takes_room(group):
            raise StoreWaits(
                "the disk is short of room, and what is held has a moment to be sent before the oldest of it gives way"
                " to new readings, which wait in memory; free some space",
                "disk_low",
            )

    def _takes_room(self, group: Group) -> bool:
        """Whether this group evicts, and for the disk's sake."""
        if not group.frames or not self.ledger.held_frames:
            return False
        conn = self._ready()
        over = _used_pages(conn) + _pages_for(group.size_bytes) - self._cap_pages(conn, group.size_bytes)
        return over > 0 and self.short_of_disk

    def _insert(
        self,
        conn: sqlite3.Connection,
        led: Ledger,
        frames: Sequence[bytes],
        readings: Sequence[int],
        alarms: int = 0,
        bulk: int = 0,
    ) -> None:
        reached("store.before_insert")
        crc = zlib.crc32
        seqs = range(led.next_seq, led.next_seq + len(frames))
        rows = [
            (s, n, crc(f, (s + n) & 0xFFFFFFFF), f) for s, n, f in zip(seqs, readings, frames, strict=True)
        ]
        if alarms:
            rows[:alarms] = [(s, n, c ^ ALARM_MARK, f) for s, n, c, f in rows[:alarms]]
            conn.executemany("INSERT INTO alarms VALUES (?)", zip(seqs[:alarms]))
            led.alarm_frames += alarms
        if bulk:
            rows[-bulk:] = [(s, n, c ^ BULK_MARK, f) for s, n, c, f in rows[-bulk:]]
            conn.executemany("INSERT INTO bulk VALUES (?)", zip(seqs[-bulk:]))
            led.bulk_frames += bulk
        conn.executemany("INSERT INTO frames VALUES (?, ?, ?, ?)", rows)
        if 0 in readings:  # no scan: a gap frame may be among them
            found = [
                (s, copy_made(s, f))
                for s, n, f in zip(seqs, readings, frames, strict=True)
                if not n and f[1:2] == _GAP_TAG
            ]
            if found:
                conn.executemany("INSERT INTO gaps (seq, told) VALUES (?, ?)", found)
                led.gap_frames += len(found)
        led.next_seq = seqs.stop
        led.kept_frames += len(frames)
        led.kept_readings += sum(readings)
        reached("store.after_insert")

    def _forget(self, conn: sqlite3.Connection, led: Ledger, ranges: Sequence[Range]) -> None:
        """Delete frames, and where they are named."""
        conn.executemany("DELETE FROM frames WHERE seq BETWEEN ? AND ?", ranges)
        if led.alarm_frames:
            led.alarm_frames -= conn.executemany(
                "DELETE FROM alarms WHERE seq BETWEEN ? AND ?", ranges
            ).rowcount
        if led.bulk_frames:
            led.bulk_frames -= conn.executemany("DELETE FROM bulk WHERE seq BETWEEN ? AND ?", ranges).rowcount
        if led.gap_frames:
            led.gap_frames -= conn.executemany("DELETE FROM gaps WHERE seq BETWEEN ? AND ?", ranges).rowcount

    def _add_layouts(self, conn: sqlite3.Connection, layouts: Sequence[Layout]) -> None:
        for layout in layouts:
            key = layout_id(layout)
            self._layouts[key] = _encode(layout)
            conn.execute(
                "INSERT OR IGNORE INTO layouts VALUES (?, ?)", (key.to_bytes(8, "big"), self._layouts[key])
            )

    def _add_clock(self, conn: sqlite3.Connection, led: Ledger, reading: ClockReading) -> None:
        """A new row; the row of an ordinary minute gives way to the next one, but for one an hour."""
        row = _clock_row(reading, led.boot, self._clock.boot_id)
        if self._mark_id is not None and len(self._marks) > 1:
            last, before = self._marks[-1][0], self._marks[-2][0]
            if (
                last.boot == row.boot
                and last.synchronized == row.synchronized
                and row.boot_ns - before.boot_ns < _MARK_NS
                and abs((row.wall_ns - row.boot_ns) - (last.wall_ns - last.boot_ns)) < _MARK_NS // 3600
            ):
                conn.execute("DELETE FROM clock WHERE id = ?", (self._mark_id,))
                self._marks.pop()
        self._mark_id = insert_clock(conn, row, led.next_seq)
        self._marks.append((row, led.next_seq))
        _better(self._clocks, row)

    def _cut_live(
        self,
        led: Ledger,
        first: int,
        frames: Sequence[bytes],
        readings: Sequence[int],
        room: int,
        alarms: int,
    ) -> list[Recorded]:
        """The newest, but alarms (which come first in a group) before all."""
        made = []
        runs = parts([len(f) + _FRAME_OVERHEAD for f in frames], self._budget(frames))
        ahead = [run for run in runs if run[0] < alarms][:room]
        rest = runs[len(ahead) :]
        for start, end in ahead + rest[max(0, len(rest) - (room - len(ahead))) :]:
            made.append(self._record(led, first + start, frames[start:end], sum(readings[start:end])))
        return made

    def _budget(self, frames: Sequence[bytes]) -> int:
        """What frames may take in a batch that also carries their layouts."""
        layouts, _ = self._used(frames)
        return max(1, BATCH_BYTES - sum(len(self._layouts.get(key, b"")) for key in layouts))

    def _record(self, led: Ledger, first: int, frames: Sequence[bytes], readings: int) -> Recorded:
        _, boots = self._used(frames)
        clocks = _encode(
            tuple(self._clocks[boot] for boot in sorted(self._telling(boots)) if boot in self._clocks)
        )
        size = sum(map(len, frames)) + _FRAME_OVERHEAD * len(frames)
        record = Recorded(first, first + len(frames) - 1, readings, size, clocks)
        led.recorded[first] = record
        return record

    def _telling(self, boots: set[int]) -> set[int]:
        """These boots, and for one that is not synchronized the synchronized ones before and after it: from their rows
        the cloud computes between which times it was."""
        told = set(boots)
        dated = sorted(boot for boot, row in self._clocks.items() if row.synchronized)
        for boot in boots.difference(dated):
            told.update([other for other in dated if other < boot][-1:], [b for b in dated if b > boot][:1])
        return told

    def _waits(self, boot: int) -> bool:
        """Whether frames of this boot wait for a synchronized clock."""
        row = self._clocks.get(boot)
        if row is not None and row.synchronized:
            return False
        now = self._clocks.get(self.ledger.boot)
        if now is not None and now.synchronized:  # an earlier boot that never was will never be
            return False
        return self._hold.waits(self._clock.read())

    @property
    def clock_told(self) -> ClockReading | None:
        """What the newest clock row says; None where there is none yet."""
        if not self._marks:
            return None
        row = self._marks[-1][0]
        return ClockReading(row.boot_ns, row.wall_ns, row.synchronized, row.error_ns)

    @property
    def clock_expected(self) -> bool:
        """Whether this boot has no synchronized clock and should: until then times are held or estimates."""
        row = self._clocks.get(self.ledger.boot)
        return (row is None or not row.synchronized) and self._hold.expects(self._clock.read())

    @property
    def waiting(self) -> bool:
        """Whether all that is left to claim waits for a synchronized clock. Any thread."""
        return self._stopped_at_held and self._waits(self.ledger.boot)

    def _used(self, frames: Sequence[bytes]) -> tuple[list[int], set[int]]:
        """The layouts (in order of first use) and the boots that frames name."""
        layouts: dict[int, None] = {}
        boots: set[int] = set()
        for frame in frames:
            head = frame_head(frame)
            if head is None:
                continue
            boots.add(head.boot)
            if isinstance(head, _ScanHead):
                layouts[head.layout] = None
        return list(layouts), boots

    def _seal(self, r: Recorded, frames: Sequence[bytes]) -> Batch:
        layouts, _ = self._used(frames)
        sealed = seal(
            self.gateway,
            self.ledger.epoch,
            r.first,
            frames,
            [_decode_layout(self._layouts[key]) for key in layouts if key in self._layouts],
            _decode_clocks(r.clocks),
            r.readings,
            compressor=self._compressor,
        )
        return Batch(sealed, r.readings)

    def _seal_all(self, cut: Sequence[tuple[Recorded, Sequence[bytes]]]) -> list[Batch]:
        batches = []
        for r, frames in cut:
            try:
                batches.append(self._seal(r, frames))
            except WireError:  # frames and layouts are bounded where they enter, so this is a fault of ours
                log.exception("buffer %s: batch %d..%d cannot be sealed", self.path, r.first, r.last)
        return batches

    def _may_record(self, led: Ledger) -> bool:
        """Recorded batches are safe from eviction, so they may fill a quarter of the cap, no more."""
        return sum(r.size_bytes for r in led.recorded.values()) < self._limits.file_bytes // 4

    # --- acks ---

    def _settle(self, conn: sqlite3.Connection, led: Ledger, ranges: Sequence[Range]) -> None:
        for first, last in ranges:
            reached("store.before_settle")
            frames, readings = self._count(conn, first, last)
            if frames:
                self._forget(conn, led, [(first, last)])
                reached("store.after_settle")
                led.settled_frames += frames
                led.settled_readings += readings
            for r in [r for r in led.recorded.values() if r.first <= last and first <= r.last]:
                self._narrow(conn, led, r, without((r.first, r.last), [(first, last)]))

    def _narrow(
        self, conn: sqlite3.Connection, led: Ledger, r: Recorded, left: Sequence[Range]
    ) -> list[Recorded]:
        """Replace a recorded batch by what is left of it, with the same clock rows."""
        del led.recorded[r.first]
        made = []
        for first, last in left:
            _, readings = self._count(conn, first, last)
            size = r.size_bytes * (last - first + 1) // r.frames
            led.recorded[first] = Recorded(first, last, readings, size, r.clocks)
            made.append(led.recorded[first])
        return made

    @staticmethod
    def _count(conn: sqlite3.Connection, first: int, last: int) -> tuple[int, int]:
        row = conn.execute(
            "SELECT count(*), total(readings) FROM frames WHERE seq BETWEEN ? AND ?", (first, last)
        ).fetchone()
        return row[0], int(row[1])

    # --- sending ---

    def recorded(self) -> list[Recorded]:
        """The batches with fixed bounds, oldest first: after a restart, all of them are sent again."""
        return sorted(self.ledger.recorded.values(), key=lambda r: r.first)

    def layout_data(self, key: int) -> bytes | None:
        return self._layouts.get(key)

    def bounds(self) -> list[Bounds]:
        """What names them, for whoever sends."""
        return [Bounds(self.ledger.epoch, r.first, r.last) for r in self.recorded()]

    def claim(self, count: int, settled: Sequence[Range], lowest: Priority = Priority.BULK) -> list[Batch]:
        """Cut and record up to `count` batches of frames that are in none, in one transaction with the acks that came:
        alarms first, then the oldest; none below the priority `lowest`. Raises `StoreRefusing`."""
        with self._refusing():
            return self._claim(count, settled, lowest)

    def _claim(self, count: int, settled: Sequence[Range], lowest: Priority) -> list[Batch]:
        cut: list[tuple[Recorded, list[bytes]]] = []
        alarms, normal, every = self._cursor_alarm, self._cursor_normal, self._cursor
        with self._transaction() as (conn, led):
            self._settle(conn, led, settled)
            gaps: list[GapFrame] = []
            while len(cut) < count and led.loose_frames > 0 and self._may_record(led):
                run = None
                if led.alarm_frames:
                    run, alarms = self._next_alarms(conn, led, alarms, lowest)
                if run is None and lowest is Priority.BULK:
                    run = self._next_run(conn, led, every, lowest)
                    every = run.cursor
                elif run is None and lowest is Priority.NORMAL:
                    run = self._next_run(conn, led, normal, lowest)
                    normal = run.cursor
                if run is None:
                    break
                if run.bad and self._restore(conn, [seq for seq, _, _ in run.bad]):
                    back = run.bad[0][0]  # a gap frame stands there again: it is the next to go
                    alarms, normal, every = min(alarms, back), min(normal, back), min(every, back)
                elif run.bad:
                    gaps += self._discard(conn, led, run.bad, "corrupt")
                if run.frames:
                    cut.append((self._record(led, run.first, run.frames, run.readings), run.frames))
                elif not run.bad:
                    if lowest is Priority.BULK and every >= led.next_seq and not led.recorded:
                        gaps += self._missing(led)
                    break
            self._tell(conn, led, gaps)
        self._cursor_alarm, self._cursor_normal, self._cursor = alarms, normal, every
        batches = self._seal_all(cut)
        self._after_commit()
        return batches

    def _next_alarms(
        self, conn: sqlite3.Connection, led: Ledger, cursor: int, lowest: Priority
    ) -> tuple[_Run | None, int]:
        """The oldest loose alarms as one batch, with what stands closely between them; None where there are none."""
        for first, last in self._loose_ranges(led, cursor):
            row = conn.execute(
                "SELECT min(seq) FROM alarms WHERE seq BETWEEN ? AND ?", (first, last)
            ).fetchone()
            if row[0] is None:
                continue
            run = self._run(
                conn, row[0], last + 1, lowest, hop_bytes=_HOP_BYTES if lowest is not Priority.ALARM else 0
            )
            if run.frames or run.bad:
                return run, row[0]
            conn.execute(
                "DELETE FROM alarms WHERE seq = ?", row
            )  # it names no alarm: damage of the table itself
            led.alarm_frames = max(0, led.alarm_frames - 1)
            return None, row[0]
        return None, led.next_seq

    @staticmethod
    def _loose_ranges(led: Ledger, start: int, below: int | None = None) -> Iterator[Range]:
        """The ranges of seqs between the recorded batches, from `start` on."""
        stop = led.next_seq if below is None else below
        for r in sorted(led.recorded.values(), key=lambda r: r.first):
            if r.last < start:
                continue
            if start < min(r.first, stop):
                yield start, min(r.first, stop) - 1
            start = r.last + 1
        if start < stop:
            yield start, stop - 1

    def _next_run(self, conn: sqlite3.Connection, led: Ledger, cursor: int, lowest: Priority) -> _Run:
        """The next run of loose frames that makes one batch, and the rows at its end that fail their CRC."""
        ahead = led.next_seq
        for r in sorted(led.recorded.values(), key=lambda r: r.first):
            if r.first <= cursor <= r.last:
                cursor = r.last + 1
            elif r.first > cursor:
                # Between two recorded batches there may be nothing at all.
                row = conn.execute(
                    "SELECT 1 FROM frames WHERE seq >= ? AND seq < ? LIMIT 1", (cursor, r.first)
                ).fetchone()
                if row:
                    ahead = r.first
                    break
                cursor = r.last + 1
        return self._run(conn, cursor, ahead, lowest)

    def _run(
        self,
        conn: sqlite3.Connection,
        cursor: int,
        ahead: int,
        lowest: Priority,
        hop_bytes: int | None = None,
    ) -> _Run:
        """Frames from `cursor` on and below `ahead` that make one batch. With `hop_bytes` they begin and end with an
        alarm, and no more than so much stands between two of them."""
        first, readings, size = 0, 0, 0
        frames: list[bytes] = []
        bad: list[tuple[int, int, None]] = []
        known: set[int] = set()
        whole = (0, 0, 0)  #: frames, readings and bytes up to the last alarm
        undated = self._waits(self.ledger.boot)  # an alarm is worth more now than with its exact time
        held = False
        rows = conn.execute(
            "SELECT seq, readings, crc, data FROM frames WHERE seq >= ? AND seq < ? ORDER BY seq",
            (cursor, ahead),
        )
        for seq, n, crc, data in rows:
            priority = row_priority(seq, n, data, crc)
            if priority is None:
                if hop_bytes is None or not frames:
                    bad.append((seq, n, None))
                    cursor = seq + 1
                break
            if frames and seq != first + len(frames):
                break
            if priority is Priority.BULK and lowest is not Priority.BULK:
                if frames or hop_bytes is not None:
                    break
                cursor = seq + 1
                continue
            size += len(data) + _FRAME_OVERHEAD
            head = frame_head(data)
            if undated and priority is not Priority.ALARM and head is not None and self._waits(head.boot):
                held = not frames and hop_bytes is None
                break
            if isinstance(head, _ScanHead) and head.layout not in known:
                known.add(head.layout)
                size += len(self._layouts.get(head.layout, b""))
            if frames and (size > BATCH_BYTES or len(frames) >= MAX_FRAMES):
                break
            if hop_bytes is not None and priority is not Priority.ALARM and size - whole[2] > hop_bytes:
                break
            first = first or seq
            frames.append(data)
            readings += n
            cursor = seq + 1
            if priority is Priority.ALARM:
                whole = (len(frames), readings, size)
        rows.close()
        if hop_bytes is not None:
            del frames[whole[0] :]
            readings = whole[1]
        if hop_bytes is None:
            self._stopped_at_held = held
        if not frames and not bad and not held:
            cursor = ahead
        return _Run(first, frames, readings, bad, cursor)

    def rebuild(self, first: int, last: int) -> list[Batch]:
        """The same bytes again for a recorded batch; where rows have gone bad meanwhile, narrower batches around
        them. Empty where all of it has been settled. Raises `StoreRefusing`."""
        try:
            with self._refusing():
                return self._rebuild(self._ready(), first, last)
        except StoreRefusing:
            with self._only_reading() as conn:
                found = [
                    (r, self._read(conn, r)[0])
                    for r in self.recorded()
                    if r.first <= last and first <= r.last
                ]
                return self._seal_all(
                    [
                        (r, [good[s] for s in range(r.first, r.last + 1)])
                        for r, good in found
                        if len(good) == r.frames
                    ]
                )

    def claim_reading(self, count: int, settled: Sequence[Range], lowest: Priority) -> list[Batch]:
        """As `claim`, on a disk that takes no writes: the bounds are recorded in memory alone. After a restart these
        frames are sent again within other bounds, which the cloud takes. Raises `StoreRefusing`."""
        cut: list[tuple[Recorded, list[bytes]]] = []
        with self._only_reading() as conn:
            led = self.ledger.copy()
            view = led.copy()  # what is acked and cannot be deleted yet is not looked at
            for first, last in settled:
                for r in [r for r in view.recorded.values() if r.first <= last and first <= r.last]:
                    del view.recorded[r.first]
                view.recorded[first] = Recorded(first, last, 0, 0, b"")
            cursor = self._cursor
            while len(cut) < count:
                run = self._next_run(conn, view, cursor, lowest)
                stuck, cursor = run.cursor <= cursor and not run.frames, run.cursor
                if run.frames:
                    record = self._record(led, run.first, run.frames, run.readings)
                    view.recorded[run.first] = record
                    self._unsaved.add(run.first)
                    cut.append((record, run.frames))
                elif stuck or cursor >= led.next_seq:
                    break
            self.ledger = led
        return self._seal_all(cut)

    @contextlib.contextmanager
    def _only_reading(self) -> Iterator[sqlite3.Connection]:
        if self._lock_fd is None or self._damage or not self.path.exists():
            raise StoreRefusing("the buffer cannot be read now")
        try:
            yield self._reader()
        except sqlite3.Error as err:
            self._stop_reading()
            raise self._refusal(err) from err

    def _rebuild(self, conn: sqlite3.Connection, first: int, last: int) -> list[Batch]:
        cut: list[tuple[Recorded, Sequence[bytes]]] = []
        for r in [r for r in self.recorded() if r.first <= last and first <= r.last]:
            good, bad = self._read(conn, r)
            if len(good) < r.frames:
                with self._transaction() as (conn, _):
                    self._restore(conn, [seq for seq in range(r.first, r.last + 1) if seq not in good])
                good, bad = self._read(conn, r)
            if len(good) == r.frames:
                cut.append((r, [good[s] for s in range(r.first, r.last + 1)]))
                continue
            with self._transaction() as (conn, led):
                gone = [s for s in range(r.first, r.last + 1) if s not in good]
                left = without((r.first, r.last), [(s, s) for s in gone])
                held = self._count(conn, r.first, r.last)[1]
                gaps = self._discard(conn, led, [(seq, n, None) for seq, n in bad], "corrupt")
                lost = [s for s in gone if s not in {seq for seq, _ in bad}]
                told = 0
                if lost:  # the tree lost rows: the batch's own count says how many readings went
                    led.gapped_frames += len(lost)
                    led.gapped_readings += max(0, r.readings - held)
                    unsaid = max(0, r.readings - held)  # known of all of them together: an even share each
                    for a, b in without(
                        (lost[0], lost[-1]), [(s, s) for s in good] + [(s, s) for s, _ in bad]
                    ):
                        share = unsaid * (b - a + 1) // len(lost)
                        if b == lost[-1]:
                            share = unsaid - sum(g.readings for g in gaps[-told:]) if told else unsaid
                        gaps.append(self._gap(a, b, b - a + 1, share, "corrupt", []))
                        told += 1
                made = self._narrow(conn, led, r, left)
                self._tell(conn, led, gaps)
            cut += [(m, [good[s] for s in range(m.first, m.last + 1)]) for m in made]
        return self._seal_all(cut)

    def _read(self, conn: sqlite3.Connection, r: Recorded) -> tuple[dict[int, bytes], list[tuple[int, int]]]:
        good: dict[int, bytes] = {}
        bad: list[tuple[int, int]] = []
        for seq, n, crc, data in conn.execute(
            "SELECT seq, readings, crc, data FROM frames WHERE seq BETWEEN ? AND ? ORDER BY seq",
            (r.first, r.last),
        ):
            if row_priority(seq, n, data, crc) is not None:
                good[seq] = data
            else:
                bad.append((seq, n))
        return good, bad

    def split(self, first: int, last: int) -> list[Batch]:
        """Halve a recorded batch into two narrower ones of the same frames. Raises `StoreRefusing`."""
        with self._refusing(), self._transaction() as (conn, led):
            r = led.recorded.get(first)
            if r is not None and r.last == last and first < last:
                middle = (first + last) // 2
                self._narrow(conn, led, r, [(first, middle), (middle + 1, last)])
                reached("store.after_split")
        return self.rebuild(first, last)

    def park(self, seq: int, code: str, reason: str) -> int:
        """Take one frame out of the way for good, with the cloud's reason; returns how many readings it held. The gap
        reaches the cloud; what a refused gap told is told once more. Raises `StoreRefusing`."""
        with self._refusing(), self._transaction() as (conn, led):
            row = conn.execute("SELECT readings, data FROM frames WHERE seq = ?", (seq,)).fetchone()
            if row is None:
                return 0
            copy = copy_of(conn, seq)
            readings, data = (int(row[0]), bytes(row[1])) if copy is None else (0, copy)
            conn.execute(
                "INSERT OR REPLACE INTO parked VALUES (?, ?, ?, ?, ?, ?)",
                (seq, readings, code, reason[:1000], self._clock.read().wall_ns, data),
            )
            conn.execute(
                "DELETE FROM parked WHERE seq IN (SELECT seq FROM (SELECT seq, row_number() OVER newest AS frames,"
                " sum(length(data)) OVER newest AS bytes FROM parked WINDOW newest AS (ORDER BY seq DESC))"
                " WHERE frames > ? OR bytes > ?)",
                (_PARKED_MAX, self._limits.file_bytes // 16),
            )
            parked = conn.execute("SELECT count(*) FROM parked").fetchone()[0]
            for r in [r for r in led.recorded.values() if r.first <= seq <= r.last]:
                self._narrow(conn, led, r, without((r.first, r.last), [(seq, seq)]))
            reached("store.before_park")
            gaps = self._discard(conn, led, [(seq, readings, frame_head(data))], "refused")
            reached("store.after_park")
            if data[1:2] != _GAP_TAG:
                self._tell(conn, led, gaps)
            elif again := self._told_again(conn, data):
                # Never grown into: it is what the other was, and stands for itself.
                self._insert(conn, led, [*map(encode_frame, [again, *gaps])], [0] * (1 + len(gaps)))
        self.parked = parked
        return readings

    # --- gaps ---

    def _discard(
        self, conn: sqlite3.Connection, led: Ledger, rows: Sequence[tuple[int, int, Head | None]], reason: str
    ) -> list[GapFrame]:
        """Delete rows (seq, readings, head), count them as gapped, and say so: one gap per unbroken run and boot."""
        gaps: list[GapFrame] = []
        start = 0
        for i in range(1, len(rows) + 1):
            if (
                i < len(rows)
                and rows[i][0] == rows[i - 1][0] + 1
                and _boot(rows[i][2]) == _boot(rows[start][2])
            ):
                continue
            reached("store.before_evict")
            run = rows[start:i]
            first, last = run[0][0], run[-1][0]
            self._forget(conn, led, [(first, last)])
            reached("store.after_evict")
            heads = [head for _, _, head in run if isinstance(head, _ScanHead)]
            readings = sum(n for _, n, _ in run)
            led.gapped_frames += len(run)
            led.gapped_readings += readings
            unread = sum(head is None for _, _, head in run)  # taken for scans, as nearly all frames are
            gaps.append(self._gap(first, last, len(heads) + unread, readings, reason, heads))
            start = i
        return gaps

    def _gap(
        self, first: int, last: int, scans: int, readings: int, reason: str, heads: Sequence[_ScanHead]
    ) -> GapFrame:
        now_ns = self._clock.boot_ns()
        devices = {self._device(head.layout) for head in heads}
        return GapFrame(
            self.ledger.epoch, first, last, scans, readings, reason,
            devices.pop() if len(devices) == 1 else "",
            heads[0].boot if heads else self.ledger.boot,
            min((head.taken_at_ns for head in heads), default=now_ns),
            max((head.taken_at_ns for head in heads), default=now_ns),
        )  # fmt: skip

    def _device(self, layout: int) -> str:
        data = self._layouts.get(layout)
        return _decode_layout(data).device if data else ""

    def _drop(
        self, conn: sqlite3.Connection, led: Ledger, rows: Sequence[_Row], reason: str, priority: Priority
    ) -> list[GapFrame]:
        """As `_discard`, for frames of one priority that were never sent: where their seqs are torn into many runs,
        one sparse gap per boot says it."""
        reached("store.before_drop")
        runs: list[list[_Row]] = []
        for row in rows:
            if runs and runs[-1][-1][0] + 1 == row[0] and _boot(runs[-1][-1][2]) == _boot(row[2]):
                runs[-1].append(row)
            else:
                runs.append([row])
        self._forget(conn, led, [(run[0][0], run[-1][0]) for run in runs])
        reached("store.after_drop")
        if len(runs) > _RUNS_TOLD:
            by_boot: dict[int, list[_Row]] = {}
            for run in runs:
                by_boot.setdefault(_boot(run[0][2]), []).extend(run)
            runs = list(by_boot.values())
        gaps = []
        for run in runs:
            heads = [head for _, _, head in run if isinstance(head, _ScanHead)]
            unread = sum(head is None for _, _, head in run)
            readings = sum(n for _, n, _ in run)
            gap = self._gap(run[0][0], run[-1][0], len(heads) + unread, readings, reason, heads)
            gaps.append(msgspec.structs.replace(gap, priority=priority.value, frames=len(run)))
            led.gapped_frames += len(run)
            led.gapped_readings += readings
        return gaps

    def _tell(self, conn: sqlite3.Connection, led: Ledger, gaps: list[GapFrame]) -> None:
        """Keep gap records: by letting one that was not sent grow, else as new frames."""
        torn = bool(led.alarm_frames or led.bulk_frames)  # else runs are whole, and stay so
        new = [
            gap
            for gap in gap_sums.summed(gaps, torn=torn)
            if gap.reason not in gap_sums.SPARSE or not self._grow(conn, led, gap, torn=torn)
        ]
        if not new:
            return
        for seq, gap in enumerate(new, led.next_seq):
            if gap.reason in gap_sums.SPARSE:
                self._open_gaps[gap_sums.key_of(gap)] = seq
        self._insert(conn, led, [*map(encode_frame, new)], [0] * len(new))

    def _grow(self, conn: sqlite3.Connection, led: Ledger, gap: GapFrame, *, torn: bool) -> bool:
        seq = self._open_gaps.get(gap_sums.key_of(gap), 0)
        if not seq or any(r.first <= seq <= r.last for r in led.recorded.values()):
            return False
        held = self._gap_at(conn, seq)
        if held is None or not gap_sums.mergeable(held, gap, torn=torn):
            return False
        grown = gap_sums.merged(held, gap)
        if grown.to_boot_ns - grown.from_boot_ns > gap_sums.SPAN_NS:
            return False
        self._rewrite(conn, seq, grown)
        return True

    def _told_again(self, conn: sqlite3.Connection, refused: bytes) -> GapFrame | None:
        """A refused gap report once more, with as little in it as can be refused; None where that was refused too (its
        bytes stay in `parked`, and an event says so), or where no reading was lost with what it told."""
        gap = frame_head(refused)
        if not isinstance(gap, GapFrame) or (gap.reason == "refused" and not gap.scans):
            return None
        plain = msgspec.structs.replace(gap, device="", priority="")
        heads = [frame_head(row[0]) for row in conn.execute("SELECT data FROM parked")]
        told = [h for h in heads if isinstance(h, GapFrame)]
        if sum(msgspec.structs.replace(h, device="", priority="") == plain for h in told) > 1:
            text = (
                f"the cloud refused twice to be told that {gap.scans} scans ({gap.readings} readings) are lost"
                f" ({gap.reason}, seqs {gap.first} to {gap.last}); the buffer's table `parked` keeps the report"
            )
            log.error("buffer %s: %s", self.path, text)
            self.events.append(("frame_refused", text))
            return None
        return plain

    def _restore(self, conn: sqlite3.Connection, seqs: Sequence[int]) -> bool:
        """Put gap frames that have rotted back from their copies; whether all of these are whole again."""
        copies = [(seq, copy_of(conn, seq)) for seq in seqs]
        rows = [(seq, row_crc(seq, 0, frame), frame) for seq, frame in copies if frame is not None]
        if rows:
            log.warning("buffer %s: %d damaged gap reports restored from their copies", self.path, len(rows))
            conn.executemany("INSERT OR REPLACE INTO frames VALUES (?, 0, ?, ?)", rows)
        return len(rows) == len(seqs)

    @staticmethod
    def _gap_at(conn: sqlite3.Connection, seq: int) -> GapFrame | None:
        row = conn.execute("SELECT readings, crc, data FROM frames WHERE seq = ?", (seq,)).fetchone()
        if row is None or row_priority(seq, row[0], row[2], row[1]) is None:
            return None
        head = frame_head(row[2])
        return head if isinstance(head, GapFrame) else None

    @staticmethod
    def _rewrite(conn: sqlite3.Connection, seq: int, gap: GapFrame) -> None:
        """A gap frame in no recorded batch was never sent, so its content is not fixed yet."""
        data = encode_frame(gap)
        conn.execute("UPDATE frames SET crc = ?, data = ? WHERE seq = ?", (row_crc(seq, 0, data), data, seq))
        conn.execute("UPDATE gaps SET told = ? WHERE seq = ?", (copy_made(seq, data), seq))

    def _sum_up(self, conn: sqlite3.Connection, led: Ledger) -> None:
        """Make as few of the unsent gap frames as say the same. The seqs of the others are gone, which a gap says."""
        first: dict[gap_sums.Key, tuple[int, GapFrame]] = {}
        grown: set[gap_sums.Key] = set()
        gone: list[int] = []
        for start, end in self._loose_ranges(led, self._sum_from):
            seqs = conn.execute("SELECT seq FROM gaps WHERE seq BETWEEN ? AND ? ORDER BY seq", (start, end))
            for (seq,) in seqs.fetchall():
                gap = self._gap_at(conn, seq)
                if gap is None:
                    continue
                key = gap_sums.key_of(gap)
                held = first.get(key)
                if held is None or not gap_sums.mergeable(held[1], gap, torn=True):
                    if held is not None and key in grown:
                        self._rewrite(conn, *held)
                        grown.discard(key)
                    first[key] = (seq, gap)
                    continue
                first[key] = (held[0], gap_sums.merged(held[1], gap))
                grown.add(key)
                gone.append(seq)
        for key in grown:
            self._rewrite(conn, *first[key])
        self._open_gaps = {key: seq for key, (seq, _) in first.items()}
        if gone:
            self._forget(conn, led, [(seq, seq) for seq in gone])
            led.gapped_frames += len(gone)
            now_ns = self._clock.boot_ns()
            self._tell(conn, led, [
                GapFrame(led.epoch, gone[0], gone[-1], 0, 0, "merged", "", led.boot, now_ns, now_ns, "", len(gone))
            ])  # fmt: skip
        self._gaps_after = led.gap_frames

    def _missing(self, led: Ledger) -> list[GapFrame]:
        """The table is empty and the ledger says otherwise: rows were lost to damage that no check saw."""
        frames, readings = led.held_frames, led.held_readings
        led.gapped_frames += frames
        led.gapped_readings += readings
        log.error("buffer %s: %d frames are missing; reported as a gap", self.path, frames)
        return [self._gap(0, 0, frames, readings, "corrupt", [])]

    # --- room ---

    def _make_room(self, conn: sqlite3.Connection, led: Ledger, need_bytes: int) -> list[GapFrame]:
        """Evict what is too old, and the oldest until `need_bytes` more fit under the cap and above the disk floor."""
        gaps: list[GapFrame] = []
        if self._limits.max_age_ns:
            gaps += self._evict_older(conn, led)
        cap = self._cap_pages(conn, need_bytes)
        need = _pages_for(need_bytes)
        over = _used_pages(conn) + need - cap
        self.evicting = False
        if over > 0:
            over += cap // _EVICT_SLACK
        if over > 0 and need and led.gap_frames > self._gaps_after + _GAPS_MOST:
            self._sum_up(conn, led)
            over = _used_pages(conn) + need - cap + cap // _EVICT_SLACK
        # Under a cap that was made smaller the file has pages enough: it is brought down over some commits, none long.
        pages: int = conn.execute("PRAGMA page_count").fetchone()[0]
        above = 0 if self.short_of_disk else max(0, pages - cap)
        most = max(_EVICT_MOST_BYTES // PAGE_BYTES, 2 * need)
        start = _used_pages(conn)
        while over > 0 and need:
            if over <= above and start - _used_pages(conn) >= most:
                break
            more = self._give_way(conn, led, min(over * PAGE_BYTES, _EVICT_STEP_BYTES))
            if not more and self.short_of_disk:
                raise StoreFull(
                    f"the disk is short of room ({self._limits.free_disk_bytes >> 20} MiB are to stay free), and the"
                    " buffer holds nothing that it may drop; free some space, or lower buffer.free_disk_mb",
                    "disk_low",
                )
            if not more:
                raise StoreFull(
                    f"the buffer is full ({self._limits.max_bytes >> 20} MiB) of what has been sent and waits"
                    " for its ack; raise buffer.max_mb",
                    "buffer_full",
                )
            self.evicting = True
            gaps = gap_sums.summed(gaps + more)
            over = _used_pages(conn) + need - cap
        return gaps

    def _give_way(self, conn: sqlite3.Connection, led: Ledger, want_bytes: int) -> list[GapFrame]:
        """Drop about so much of the lowest priority of which there is any, thinned first where that is wanted."""
        for priority in (Priority.BULK, Priority.NORMAL, Priority.ALARM):
            if self._limits.thin_keep and priority is not Priority.ALARM:
                thinned = self._thin(conn, led, priority, want_bytes)
                if thinned:
                    return self._drop(conn, led, thinned, "thinned", priority)
            rows = list(self._oldest_loose(conn, led, priority, want_bytes, led.next_seq))
            if rows:
                return self._drop(conn, led, rows, "evicted", priority)
        return []

    def _thin(self, conn: sqlite3.Connection, led: Ledger, priority: Priority, want_bytes: int) -> list[_Row]:
        """The scans to drop of the oldest that were not thinned yet; where there are such, never an empty list."""
        keep = self._limits.thin_keep
        start = led.bulk_thinned_to if priority is Priority.BULK else led.normal_thinned_to
        while True:
            dropped: list[_Row] = []
            seen = 0
            for seq, readings, head in self._oldest_loose(
                conn, led, priority, want_bytes, led.next_seq, start
            ):
                seen, start = seen + 1, seq + 1
                if isinstance(head, _ScanHead):
                    count = self._thinning[head.layout] = self._thinning.get(head.layout, 0) + 1
                    if count % keep:
                        dropped.append((seq, readings, head))
            if priority is Priority.BULK:
                led.bulk_thinned_to = start
            else:
                led.normal_thinned_to = start
            if dropped or not seen:
                return dropped

    def _look_at_log(self, need_bytes: int) -> None:
        """A reader that stays keeps the log from being reset: where file and log would pass the cap, nothing is
        written until it is gone. Raises `StoreRefusing`."""
        conn = self._ready()
        wal = self._wal_size()
        if wal <= self._limits.wal_bytes:
            return
        pages: int = conn.execute("PRAGMA page_count").fetchone()[0]
        need = need_bytes + need_bytes // 4 + 64 * PAGE_BYTES
        if pages * PAGE_BYTES + wal + need <= self._limits.max_bytes:
            return
        conn.execute("PRAGMA busy_timeout = 0")
        try:
            busy = conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        finally:
            conn.execute("PRAGMA busy_timeout = 5000")
        if busy:
            raise StoreRefusing(
                "another program reads the buffer's file and keeps its log from being reset; end that program"
                f" (fuser -v {self.path})"
            )
        self._wal_bytes = 0

    def _cap_pages(self, conn: sqlite3.Connection, need_bytes: int) -> int:
        """The file's cap in pages now: its own, or less where the file may not grow because the disk is short, or
        because a reader keeps the WAL from being reset."""
        pages: int = conn.execute("PRAGMA page_count").fetchone()[0]
        cap = self._limits.file_bytes // PAGE_BYTES
        wal = self._wal_size()
        grown = wal - self._limits.wal_bytes - 2 * self._limits.group_bytes
        if grown > 0:
            cap = max(
                32, min(cap, pages), cap - grown // PAGE_BYTES
            )  # a file that is larger already stays so
        try:
            disk = os.statvfs(self.path.parent)
            written = self.path.stat().st_size
        except OSError:
            return cap
        # What the WAL has yet to grow, and what the checkpoint will write beyond the file's end, is spoken for.
        spoken_for = max(0, pages * PAGE_BYTES - written) + max(0, self._limits.wal_bytes + need_bytes - wal)
        room = disk.f_bavail * disk.f_frsize - self._limits.free_disk_bytes - spoken_for
        floor = pages + max(0, room // PAGE_BYTES)
        self.short_of_disk = floor < cap
        return min(cap, floor)

    def _oldest_loose(
        self,
        conn: sqlite3.Connection,
        led: Ledger,
        priority: Priority,
        want_bytes: int,
        below: int,
        start: int = 1,
    ) -> list[_Row]:
        """The oldest frames of a priority in no recorded batch, `want_bytes` of them; never gap frames: they are the
        account. What a table says of a frame is believed only where its CRC says so too."""
        rows: list[_Row] = []
        astray: list[tuple[int, Priority]] = []
        size = 0
        table = _TABLES.get(priority)
        if (table == "alarms" and not led.alarm_frames) or (table == "bulk" and not led.bulk_frames):
            return rows
        where = "seq BETWEEN ? AND ?"
        if table:
            sql = f"SELECT seq, f.readings, f.crc, f.data FROM {table} CROSS JOIN frames f USING (seq)"  # noqa: S608
        else:
            sql = "SELECT seq, readings, crc, data FROM frames"
            start = max(start, self._evictable_from)
            if led.alarm_frames or led.bulk_frames:
                where += " AND seq NOT IN (SELECT seq FROM alarms) AND seq NOT IN (SELECT seq FROM bulk)"
        for between in self._loose_ranges(led, start, below):
            if size >= want_bytes:
                break
            found = conn.execute(f"{sql} WHERE {where} ORDER BY seq", between)
            for seq, readings, crc, data in found:
                if data[1:2] == _GAP_TAG:
                    continue
                told = row_priority(seq, readings, data, crc)
                if told is not None and told is not priority:
                    astray.append((seq, told))
                    continue
                if told is None and copy_of(conn, seq) is not None:
                    continue  # a gap frame all the same
                rows.append((seq, readings, frame_head(data)))
                size += len(data) + _FRAME_OVERHEAD
                if size >= want_bytes:
                    break
            found.close()
        if astray:
            self._put_right(conn, led, astray, priority)
        return rows

    def _put_right(
        self, conn: sqlite3.Connection, led: Ledger, astray: Sequence[tuple[int, Priority]], was: Priority
    ) -> None:
        """The tables that find alarms and bulk disagree with the frames themselves: a damage that costs nothing."""
        log.warning(
            "buffer %s: %d frames were not where their priority is; put right", self.path, len(astray)
        )
        for seq, told in astray:
            for table, change in (
                (_TABLES.get(was), "DELETE FROM {} WHERE seq = ?"),
                (_TABLES.get(told), "INSERT OR IGNORE INTO {} VALUES (?)"),
            ):
                if table:
                    changed = conn.execute(change.format(table), (seq,)).rowcount
                    changed = -changed if change.startswith("DELETE") else changed
                    if table == "alarms":
                        led.alarm_frames += changed
                    else:
                        led.bulk_frames += changed

    def _evict_older(self, conn: sqlite3.Connection, led: Ledger) -> list[GapFrame]:
        """Age by the clock table: exact within this boot; across boots only where both clocks were synchronized."""
        now = self._clock.read()
        below = 0
        for row, next_seq in self._marks:
            if row.boot == led.boot:
                age_ns = now.boot_ns - row.boot_ns
            elif row.synchronized and now.synchronized:
                age_ns = now.wall_ns - row.wall_ns
            else:
                continue
            if age_ns > self._limits.max_age_ns:
                below = max(below, next_seq)
        if below <= self._oldest_seq or not self._oldest_seq:
            return []
        gaps = []
        for priority in Priority:
            rows = self._oldest_loose(conn, led, priority, _EVICT_STEP_BYTES, below)
            if rows:
                gaps += self._drop(conn, led, rows, "expired", priority)
        return gaps

    # --- upkeep ---

    def _after_commit(self) -> None:
        """Checkpoint and shrink, when it is time. A failure here is no failure of the commit before it."""
        conn = self._conn
        if conn is None:
            return
        try:
            self._look_at_oldest(conn)
            if self._wal_bytes >= self._limits.wal_bytes:
                self.checkpoint()
                self._thin_clock(conn)
                free = conn.execute("PRAGMA freelist_count").fetchone()[0]
                if free >= _VACUUM_FREE_PAGES and _used_pages(conn) <= _VACUUM_LIVE_PAGES:
                    reached("store.before_vacuum")
                    conn.execute("VACUUM")  # cheap now: it copies only what is held; keeps every seq
                    reached("store.after_vacuum")
                    self.checkpoint()
                self._restore_ballast()
        except sqlite3.Error as err:
            log.warning("buffer %s: upkeep failed: %s", self.path, err)
            self._broken(err)

    def checkpoint(self) -> None:
        if self._conn is not None:
            reached("store.before_checkpoint")
            self._conn.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            reached("store.after_checkpoint")
            self._wal_bytes = 0

    def _thin_clock(self, conn: sqlite3.Connection) -> None:
        """Forget the clock rows of boots that no held frame names, but for the last that was synchronized: it bounds
        the times of a later boot that is not. A gap names the boot of what it reports and stands behind later boots'
        frames: a boot is forgotten once all is gone that was held when its own frames were."""
        oldest = min(self.oldest[0] if self.oldest else self.ledger.boot, self.ledger.boot)
        for boot in {row.boot for row, _ in self._marks if row.boot < oldest}:
            self._retiring.setdefault(boot, self.ledger.next_seq)
        held_from = self._oldest_seq or self.ledger.next_seq
        gone = {boot for boot, upto in self._retiring.items() if upto <= held_from}
        gone.discard(max((boot for boot in gone if self._clocks[boot].synchronized), default=-1))
        if gone:
            conn.executemany("DELETE FROM clock WHERE boot = ?", [(boot,) for boot in sorted(gone)])
            self._marks = [mark for mark in self._marks if mark[0].boot not in gone]
            self._clocks = {boot: row for boot, row in self._clocks.items() if boot not in gone}
            for boot in gone:
                del self._retiring[boot]

    def _look_at_oldest(self, conn: sqlite3.Connection) -> None:
        row = conn.execute("SELECT seq, data, readings, crc FROM frames ORDER BY seq LIMIT 1").fetchone()
        if row is None:
            self.oldest, self._oldest_seq = None, 0
        elif row[0] != self._oldest_seq:
            self._oldest_seq = row[0]
            head = frame_head(row[1]) if row[3] == row_crc(row[0], row[2], row[1]) else None
            if isinstance(head, _ScanHead):
                self.oldest = (head.boot, head.taken_at_ns)
            elif isinstance(head, GapFrame):
                self.oldest = (head.boot, head.to_boot_ns)
            elif head is not None:
                self.oldest = (head.boot, head.at_boot_ns)

    def oldest_age_s(self, now: ClockReading) -> float | None:
        """How long ago the oldest held frame was taken; None where the buffer is empty or its clock is unknown."""
        if self.oldest is None:
            return None
        boot, boot_ns = self.oldest
        if boot == self.ledger.boot:
            return max(0.0, (now.boot_ns - boot_ns) / 1e9)
        row = self._clocks.get(boot)
        return max(0.0, (now.wall_ns - row.wall_ns + row.boot_ns - boot_ns) / 1e9) if row else None

    def size_bytes(self) -> int:
        """On disk now, WAL included."""
        try:
            return self.path.stat().st_size + self._wal_size()
        except OSError:
            return 0

    def _wal_size(self) -> int:
        try:
            return self.path.with_name(self.path.name + "-wal").stat().st_size
        except OSError:
            return 0

    @property
    def _ballast(self) -> Path:
        return self.path.with_name(self.path.name + ".ballast")

    def _restore_ballast(self) -> None:
        """Set aside room to delete with: on a full disk DELETE fails as INSERT does."""
        want = self._limits.ballast_bytes
        try:
            if not want or (self._ballast.exists() and self._ballast.stat().st_size == want):
                return
            disk = os.statvfs(self.path.parent)
            if disk.f_bavail * disk.f_frsize < want + self._limits.free_disk_bytes:
                return
            fd = os.open(self._ballast, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, want)
            finally:
                os.close(fd)
        except OSError as err:
            log.debug("buffer %s: no ballast: %s", self.path, err)
            with contextlib.suppress(OSError):
                self._ballast.unlink()

    # --- when the disk refuses ---

    def _after_failure(
        self,
        err: sqlite3.Error | StoreFull,
        group: Group,
        settled: Sequence[Range],
        live_room: int,
        *,
        patient: bool,
    ) -> list[Batch]:
        """Cure what can be cured, and try once more. Raises `StoreRefusing`."""
        full = isinstance(err, StoreFull) or _code(err) == sqlite3.SQLITE_FULL
        try:
            if isinstance(err, sqlite3.Error):
                self._broken(err)
                if self._damage:
                    self._ready()
                    return self._commit(group, (), live_room)
                if full and self._ballast.exists():
                    self._ballast.unlink()
                    log.warning("buffer %s: the disk is full; ballast released", self.path)
            if full:
                # Acked data first: it makes the room that the group needs, and must not wait for it.
                self.checkpoint()
                with self._transaction() as (conn, led):
                    self._settle(conn, led, settled)
                self.checkpoint()
                if patient:
                    self._leave_room(group, ())
                return self._commit(group, (), live_room)
        except (sqlite3.Error, OSError) as again:
            if isinstance(again, sqlite3.Error):
                self._broken(again)
                full = _code(again) == sqlite3.SQLITE_FULL  # after any other error it may be kept after all
            raise (StoreFull(_remedy(again), _cause(again)) if full else self._refusal(again)) from again
        raise self._refusal(err) from err

    def _refusal(self, err: Exception) -> StoreRefusing:
        """In words, and as one of `agent.status.Code`. SQLite cannot always tell why it cannot open a file."""
        if _read_only(self.path.parent):
            return StoreRefusing(_READ_ONLY, "disk_readonly")
        return StoreRefusing(_remedy(err), _cause(err))

    def _broken(self, err: sqlite3.Error) -> None:
        """After an I/O error never use the same descriptor again: its failed pages may be marked clean
        (Rebello et al., ATC 2020). The next call opens anew and looks at what is really there. A read-only file
        system is no such case: reads go on."""
        if _damaged(err):
            self._damage = str(err)
        elif _code(err) in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
            with closing_unsynced(self.path):
                self._disconnect()
            return
        self._doubtful = None  # rolled back for certain

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            self._ready()
            yield
        except sqlite3.Error as err:
            self._broken(err)
            raise self._refusal(err) from err

    def _ready(self) -> sqlite3.Connection:
        """The connection, opened anew where it had to be given up. Raises `sqlite3.Error`, `StoreRefusing`."""
        if self._lock_fd is None:
            raise StoreRefusing("the buffer is closed")
        if self._damage:
            self._replace(self._damage)
        elif self._conn is None:
            self._connect()
        assert self._conn is not None  # noqa: S101 - both ways above end with a connection or raise
        return self._conn

    def _stop_reading(self) -> None:
        if self._reading is not None:
            with contextlib.suppress(sqlite3.Error):
                self._reading.close()
            self._reading = None

    def _disconnect(self) -> None:
        self._stop_reading()
        if self._conn is not None:
            with contextlib.suppress(sqlite3.Error):
                self._conn.close()
            self._conn = None

    def close(self) -> None:
        """Checkpoint and let go. Never raises."""
        if self._conn is not None:
            try:
                self.checkpoint()
            except (sqlite3.Error, StoreError):
                with closing_unsynced(self.path):
                    self._disconnect()
        self._disconnect()
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None


TOLD: Final = ".told"  #: the end of the name of what salvage says of a damaged set when it is done with it
_READ_ONLY: Final = "the buffer's file system is read-only; check the disk (dmesg) and remount it"
_UNSURE_BOOTS: Final = 1000  #: boots left free where the last one's number is not known for certain
NOTE: Final = ".epoch"  #: the end of the name of the note beside a buffer file
_TAILS: Final = ("-wal", "-shm", NOTE)


def _io_error(err: OSError) -> sqlite3.OperationalError:
    """What SQLite would have said."""
    code = {errno.ENOSPC: sqlite3.SQLITE_FULL, errno.EDQUOT: sqlite3.SQLITE_FULL}.get(
        err.errno or 0, sqlite3.SQLITE_IOERR
    )
    error = sqlite3.OperationalError(err.strerror or str(err))
    error.sqlite_errorcode = code
    return error


def _read_only(folder: Path) -> bool:
    try:
        return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
    except OSError:
        return False


def is_set(path: Path) -> bool:
    """Whether this is the file of a damaged set, and not what belongs to one."""
    return not path.name.endswith((*_TAILS, TOLD, ".new", ".kept"))


class Account(msgspec.Struct, frozen=True):
    """What a note or a ledger says of a file. Only the epoch is sure to be there; 0 is unknown for `next_seq`."""

    epoch: int
    next_seq: int = 0
    kept_frames: int = 0
    kept_readings: int = 0
    settled_frames: int = 0
    settled_readings: int = 0
    gapped_frames: int = 0
    gapped_readings: int = 0


def noted_account(path: Path) -> Account | None:
    """What was noted beside a buffer file; None where there is no note, or none that can be believed."""
    try:
        *numbers, crc = map(int, path.with_name(path.name + NOTE).read_text().split())
        if crc == zlib.crc32(" ".join(map(str, numbers)).encode()) and 0 < numbers[0] <= MAX_EPOCH:
            return Account(*numbers)
    except (OSError, ValueError, IndexError, TypeError):
        pass
    return None


def note_account(path: Path, led: Ledger, *, epoch_only: bool = False) -> None:
    """Raises `OSError`."""
    numbers = [led.epoch]
    if not epoch_only:
        numbers += [led.next_seq, led.kept_frames, led.kept_readings, led.settled_frames, led.settled_readings,
                    led.gapped_frames, led.gapped_readings]  # fmt: skip
    text = " ".join(map(str, numbers))
    note = path.with_name(path.name + NOTE)
    fresh = note.with_name(note.name + ".new")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(f"{text} {zlib.crc32(text.encode())}\n")
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(note)


def _boot(head: Head | None) -> int:
    return head.boot if head is not None else 0


def _clock_row(reading: ClockReading, boot: int, boot_id: str) -> ClockRow:
    return ClockRow(boot, boot_id, reading.boot_ns, reading.wall_ns, reading.synchronized, reading.error_ns)


def _better(clocks: dict[int, ClockRow], row: ClockRow) -> None:
    """Keep per boot the row to compute wall time from (as `sync.wire.wall_clock`): the last synchronized, else the
    last."""
    held = clocks.get(row.boot)
    if held is None or row.synchronized or not held.synchronized:
        clocks[row.boot] = row


def _pages_for(need_bytes: int) -> int:
    """A frame of just above half a page leaves the other half empty: twice its bytes covers any size."""
    return 2 * need_bytes // PAGE_BYTES + 4 if need_bytes else 0


def _used_pages(conn: sqlite3.Connection) -> int:
    pages: int = conn.execute("PRAGMA page_count").fetchone()[0]
    free: int = conn.execute("PRAGMA freelist_count").fetchone()[0]
    return pages - free


def _code(err: Exception) -> int:
    """SQLite's primary result code; 0 where the error is the module's own."""
    return getattr(err, "sqlite_errorcode", 0) & 0xFF


def _damaged(err: sqlite3.Error) -> bool:
    """Whether the file itself is bad, as against the disk under it. Our own checks raise a plain `DatabaseError`."""
    code = _code(err)
    own = type(err) is sqlite3.DatabaseError and code == 0
    return own or code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _cause(err: Exception) -> str:
    """The word for what the disk does (`agent.status.Code`)."""
    if isinstance(err, StoreRefusing):
        return err.cause
    known = {
        sqlite3.SQLITE_FULL: "disk_full", sqlite3.SQLITE_READONLY: "disk_readonly", sqlite3.SQLITE_IOERR: "disk_error",
        sqlite3.SQLITE_CANTOPEN: "disk_error",
    }  # fmt: skip
    return known.get(_code(err), "buffer_holding")


def _remedy(err: Exception) -> str:
    match _code(err):
        case sqlite3.SQLITE_FULL:
            return "the disk is full; free some space or lower buffer.max_mb"
        case sqlite3.SQLITE_READONLY:
            return _READ_ONLY
        case sqlite3.SQLITE_IOERR:
            return f"the disk reports an error ({err}); check it (dmesg, smartctl)"
        case _:
            return str(err)
