"""The journal on one machine: SQLite, WAL, `synchronous=FULL`, group commit.

Rules:
1. One thread owns the one writing connection, and each group is one transaction: whatever calls are waiting are
   committed together, so that an fsync is paid per group and not per batch. A call that comes alone is not delayed.
2. The dedupe intervals, the counters and the entries go into the same transaction; what is cached of them in memory
   is thrown away when a transaction fails.
3. Readers have their own read-only connections and threads; nobody but the writer checkpoints (SQLite 3.7 to 3.51.2
   has a WAL-reset race between two checkpointers).
4. Every row carries a CRC over all its columns. SQLite checks none: 127 of 200 flipped bits came back as wrong rows.
5. Full means refused, before anything is written; cursors and trim still work then, so it recovers by itself. What
   is held already is told apart also then: a gateway whose ack was lost need not wait for room.
6. After a failed sync no descriptor is trusted again, and what the log then shows is written anew before it is believed
   (`config.failed_sync`). The writer checkpoints by itself: SQLite tells nobody when its own checkpoint could not sync.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import sqlite3
import sys
import threading
import time
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import quote

import msgspec

from cloud.intervals import IntervalSet, count
from cloud.journal.contract import (
    Appended,
    Entry,
    EntryDamaged,
    GatewayCount,
    Hole,
    JournalBroken,
    JournalError,
    JournalFull,
    JournalState,
    Missed,
    Range,
    Stored,
)
from config.failed_sync import closing_unsynced, write_log_again
from config.failpoint import reached
from config.wal import commits_passed_over

log = logging.getLogger(__name__)
T = TypeVar("T")

SCHEMA_VERSION: Final = 3
PAGE_BYTES: Final = 8192  #: a 2 to 5 KB batch fits a page; 4096 needs an overflow page for most
GROUP_ENTRIES: Final = 8192  #: of one transaction
GROUP_BYTES: Final = 16 * 1024 * 1024
WAL_CHECKPOINT_PAGES: Final = (
    2048  #: 16 MiB; the default 1000 pages checkpoints four times a second under full load
)
_MX_FRAME: Final = 16  #: in the WAL's index: where it says how many frames the log has; native byte order
WAL_MAX_BYTES: Final = 64 * 1024 * 1024  #: above this the writer waits for readers to get out of the way
ROW_OVERHEAD_BYTES: Final = 160  #: columns beside the payload, and the B-tree's share
RETRY_FULL_S: Final = 5.0  #: what is told to gateways; trim looks at a full journal this often
TRIM_CHUNK: Final = 256  #: rows per transaction, so that a trim holds up an append for milliseconds
CACHED_RANGES: Final = 500_000  #: of dedupe, in memory: about 50 MB
CACHED_SETS: Final = 50_000
READERS: Final = 4

#: What brings an empty file to version 1, version 1 to 2, ...
_STEPS: Final = ("sqlite.sql", "sqlite_2.sql", "sqlite_3.sql")

_INSERT = """INSERT INTO entry (offset, gateway, epoch, first, last, readings, received_at_ns, fresh, crc32, payload)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
_COUNT = """INSERT INTO gateway_count (gateway, batches, frames_received, frames_duplicate, readings_stored)
VALUES (?, ?, ?, ?, ?) ON CONFLICT (gateway) DO UPDATE SET
batches = batches + excluded.batches,
frames_received = frames_received + excluded.frames_received,
frames_duplicate = frames_duplicate + excluded.frames_duplicate,
readings_stored = readings_stored + excluded.readings_stored"""
#: What SQLite says when the file system takes no write; which of them, is chance.
_REFUSED_BY_DISK: Final = (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
_SYNC_FAILED: Final = (sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC)
_SALVAGE: Final = (
    "it is damaged: stop the server; `headgate-cloud journal salvage` then makes a sound journal of what can be read"
)  # fmt: skip

_MOVE = """INSERT INTO cursor (sink, offset) VALUES (?, ?)
ON CONFLICT (sink) DO UPDATE SET offset = max(offset, excluded.offset)"""
_EXPIRE = """INSERT INTO expired (sink, gateway, readings) VALUES (?, ?, ?)
ON CONFLICT (sink, gateway) DO UPDATE SET readings = readings + excluded.readings"""
_MISS = """INSERT INTO missed (sink, gateway, batches, readings, first_offset, last_offset, from_ns, to_ns)
VALUES (?, ?, 1, ?, ?, ?, ?, ?) ON CONFLICT (sink, gateway) DO UPDATE SET batches = batches + 1,
readings = readings + excluded.readings, first_offset = min(first_offset, excluded.first_offset),
last_offset = max(last_offset, excluded.last_offset), from_ns = min(from_ns, excluded.from_ns),
to_ns = max(to_ns, excluded.to_ns)"""
# The texts as bytes: a damaged one may not be UTF-8 any more.
_READ = """SELECT offset, CAST(gateway AS BLOB), epoch, first, last, readings, received_at_ns,
CAST(fresh AS BLOB), crc32, payload FROM entry WHERE offset > ? ORDER BY offset LIMIT ?"""

_Insert = tuple[int, str, int, int, int, int, int, str, int, bytes]
# As read: what stands in a damaged row may be of any type.
_Cell = int | float | str | bytes | None
_Row = tuple[int, _Cell, _Cell, _Cell, _Cell, _Cell, _Cell, _Cell, _Cell, _Cell]


class GatewayState(msgspec.Struct, frozen=True):
    """A gateway's latest heartbeat, as it came."""

    gateway: str
    received_at_ns: int
    state: bytes


class _Append:
    """One waiting `append`."""

    __slots__ = ("entries", "future", "refused", "results", "size_bytes")

    def __init__(self, entries: Sequence[Entry], future: asyncio.Future[list[Appended]]) -> None:
        self.entries = entries
        self.future = future
        self.refused: JournalFull | None = None
        self.results: list[Appended] = []
        self.size_bytes = sum(len(e.payload) + ROW_OVERHEAD_BYTES for e in entries)


class _Task:
    """Anything else that writes; `work` runs in the writer's thread, within a transaction."""

    __slots__ = ("future", "result", "work")

    def __init__(self, work: Callable[[sqlite3.Connection], object], future: asyncio.Future[object]) -> None:
        self.work = work
        self.future = future
        self.result: object = None


class _Tally:
    """What one group adds to a gateway's counters."""

    __slots__ = ("batches", "duplicate", "readings", "received")

    def __init__(self) -> None:
        self.batches = self.received = self.duplicate = self.readings = 0


class SqliteJournal:
    """A `Journal`. `max_bytes` bounds the file and its WAL together."""

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int = 10 * 1024**3,
        free_disk_bytes: int = 128 * 1024**2,
        commit_interval_s: float = 0.005,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self._free_disk_bytes = free_disk_bytes
        self._interval_s = commit_interval_s
        self._clock_ns = clock_ns
        self._wal_bytes = min(WAL_MAX_BYTES, max_bytes // 4)
        self._page_bytes = max_bytes - self._wal_bytes  # what entries may take
        self._lock_file: int | None = None
        self._db: sqlite3.Connection | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        # Between the loop and the writer; guarded by `_ready`.
        self._ready = threading.Condition()
        self._jobs: deque[_Append | _Task] = deque()
        self._closing = False
        # The writer's own.
        self._held: OrderedDict[tuple[str, int], IntervalSet] = OrderedDict()
        self._held_ranges = 0
        self._next = 1
        self._used_bytes = 0
        self._committed_s = 0.0
        # The loop's own.
        self._last = 0
        self._grown = asyncio.Event()
        self._cursors: dict[str, int] = {}
        self._broken: str | None = None
        self._full = False
        self._index_file: int | None = (
            None  # the WAL's index, to be closed after the connections: their locks go with it
        )
        self._sync_failed = False
        # Readers; how many are at work, and whether they must wait, is guarded by `_gate`.
        self._gate = threading.Condition()
        self._reading = 0
        self._shut = False
        self._pool: ThreadPoolExecutor | None = None
        self._idle: deque[sqlite3.Connection] = deque()
        # For metrics.
        self.commits = 0

    # --- open and close ---

    async def open(self) -> None:
        """Raises `JournalBroken`: another process has it, it is not ours, it is damaged, it cannot be written."""
        self._loop = asyncio.get_running_loop()
        self._db = await asyncio.to_thread(self._open)
        self._pool = ThreadPoolExecutor(READERS, "journal-read")
        self._thread = threading.Thread(
            target=self._write_forever, args=(self._loop,), name="journal-write", daemon=True
        )
        self._thread.start()

    def _open(self) -> sqlite3.Connection:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock_file = os.open(
                self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            self._unlock()
            raise JournalBroken(
                f"{self.path}: another process has this journal; stop it, or give this one another data_dir"
            ) from err
        except OSError as err:
            self._unlock()
            raise JournalBroken(f"{self.path}: {err.strerror}; the data_dir must be writable") from err
        try:
            db = self._connect()
            self._last = self._next - 1
            return db
        except sqlite3.Error as err:
            self._unlock()
            raise JournalBroken(f"{self.path}: {err}; {self._why_not_opened(err)}") from err
        except OSError as err:
            self._unlock()
            raise JournalBroken(f"{self.path}: {err.strerror}; check the disk") from err
        except JournalError:
            self._unlock()
            raise

    def _why_not_opened(self, err: sqlite3.Error) -> str:
        code = (getattr(err, "sqlite_errorcode", None) or 0) & 0xFF
        if code == sqlite3.SQLITE_FULL or (code in _REFUSED_BY_DISK and self._disk_is_full()):
            return "the disk is full: free some space, and start again; nothing is lost meanwhile"
        first = "check the disk and its permissions first; else it is " if code in _REFUSED_BY_DISK else ""
        return (
            f"{first}not a journal, or damaged: do not delete it (gateways have dropped what it holds)"
            "; `headgate-cloud journal salvage` makes a sound one of what can be read, and keeps this one aside"
        )

    def _connect(self) -> sqlite3.Connection:
        if self.path.with_name(self.path.name + ".salvaging").exists():
            raise JournalBroken(
                f"{self.path}: a salvage was cut short; run `headgate-cloud journal salvage` again"
            )
        write_log_again(self.path)
        passed_over = commits_passed_over(self.path)
        if passed_over:
            raise JournalBroken(
                f"{self.path}: {passed_over} commits stand behind a bad place in its log; {_SALVAGE}"
            )
        new = not self.path.exists()
        db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=1.0)
        try:
            if new:
                self.path.chmod(0o600)
                db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
            mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            if mode != "wal":
                raise JournalBroken(f"{self.path}: SQLite's WAL does not work on this file system")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA wal_autocheckpoint = 0")
            db.execute(f"PRAGMA journal_size_limit = {self._wal_bytes}")
            db.execute("PRAGMA mmap_size = 0")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise JournalBroken(
                    f"{self.path}: version {version}; this program knows version {SCHEMA_VERSION}: run the newer one"
                )
            db.create_function("held_crc", 4, _held_crc, deterministic=True)
            for step in _STEPS[version:]:  # one transaction each: killed in between, it goes on from there
                schema = Path(__file__).with_name(step).read_text()
                db.executescript(f"BEGIN IMMEDIATE;\n{schema}\nCOMMIT;")
            _sync_folder(self.path.parent)
            page = db.execute("PRAGMA page_size").fetchone()[0]
            # The hard stop stands above our own check: cursors and trim must find room when entries do not.
            db.execute(f"PRAGMA max_page_count = {(self._page_bytes + self._page_bytes // 16) // page + 64}")
            row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'entry'").fetchone()
            top = db.execute("SELECT max(offset) FROM entry").fetchone()[0]
            self._next = max(row[0] if row else 0, top or 0) + 1
            self._cursors.update(db.execute("SELECT sink, offset FROM cursor").fetchall())
            self._used_bytes = self._measure(db)
        except BaseException:
            with closing_unsynced(self.path):
                db.close()
            raise
        self._held.clear()
        self._held_ranges = 0
        return db

    def made(self) -> sqlite3.Connection:
        """A new file with the schema and nothing in it, for whoever fills it by other ways (salvage)."""
        return self._connect()

    def _unlock(self) -> None:
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    async def close(self) -> None:
        """Commits what is waiting, then lets go. Safe to call twice."""
        with self._ready:
            self._closing = True
            self._ready.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
            self._thread = None
        if self._pool is not None:
            await asyncio.to_thread(self._pool.shutdown)
            self._pool = None
        while self._idle:
            self._idle.pop().close()
        if self._db is not None:
            try:
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                self._db.close()
            except sqlite3.Error:  # a sick disk: the WAL stays, and is read at the next start
                with closing_unsynced(self.path):
                    self._db.close()
            self._db = None
        self._close_index()
        self._unlock()

    # --- writing, the loop's side ---

    async def append(self, entries: Sequence[Entry]) -> list[Appended]:
        if not entries:
            return []
        future: asyncio.Future[list[Appended]] = self._running().create_future()
        self._submit(_Append(entries, future))
        return await future

    async def _write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        future: asyncio.Future[object] = self._running().create_future()
        self._submit(_Task(work, future))
        return await future  # type: ignore[return-value]  # it is what `work` returned

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._loop is None or self._thread is None or self._closing:
            raise JournalBroken(f"{self.path}: the journal is closed")
        return self._loop

    def _submit(self, job: _Append | _Task) -> None:
        with self._ready:
            self._jobs.append(job)
            self._ready.notify()

    def _settle(self, group: list[_Append | _Task], last: int, failed: JournalError | None) -> None:
        """In the loop: hand the group's results to those who wait. `last` is the newest offset it committed."""
        self._say(group, failed)
        if last > self._last:
            self._last = last
            self._grown.set()
            self._grown = asyncio.Event()
        for job in group:
            if job.future.done():  # its caller has gone; what was committed stays committed
                continue
            if failed is not None:
                refused = (
                    job.refused if isinstance(job, _Append) and isinstance(failed, JournalFull) else None
                )
                job.future.set_exception(refused or _copy(failed))
            elif isinstance(job, _Task):
                job.future.set_result(job.result)
            elif job.refused is not None:
                job.future.set_exception(job.refused)
            else:
                job.future.set_result(job.results)

    def _say(self, group: list[_Append | _Task], failed: JournalError | None) -> None:
        """One line when it goes wrong, one when it is well again."""
        appends = [job for job in group if isinstance(job, _Append)]
        refusal: JournalError | None = next((job.refused for job in appends if job.refused), None)
        if isinstance(failed, JournalFull):
            refusal = failed
        if refusal is not None and not self._full:
            log.warning("journal full, batches are refused with retry-after: %s", refusal)
            self._full = True
        elif self._full and appends and failed is None and refusal is None:
            log.info("journal has room again")
            self._full = False
        broken = str(failed) if isinstance(failed, JournalBroken) else None
        if broken and not self._broken:
            log.error("journal cannot be written: %s", broken)
        elif self._broken and failed is None:
            log.info("journal can be written again")
        self._broken = broken

    @property
    def trouble(self) -> str | None:
        """Why the last writes failed, None where they did not."""
        return self._broken or (str(self._refusal()) if self._full else None)

    def _refusal(self, held: tuple[int, ...] = ()) -> JournalFull:
        return JournalFull(
            f"{self.path}: {self._used_bytes // 1024} KiB of {self._page_bytes // 1024} KiB used, "
            f"{self._free_bytes() // 1024**2} MiB free on the disk; raise journal.max_mb, free the disk, or look why a "
            "sink is behind",
            RETRY_FULL_S,
            held,
        )

    # --- writing, the writer's side ---

    def _write_forever(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            with self._ready:
                while not self._jobs and not self._closing:
                    self._ready.wait()
                if not self._jobs:
                    return
            # Commits come no closer together than the interval: a lone batch goes at once, a stream in groups.
            pause = self._committed_s + self._interval_s - time.monotonic()
            if pause > 0 and not self._closing:
                time.sleep(pause)
            group = self._take()
            failed = self._commit_on_what_syncs(group)
            self._committed_s = time.monotonic()
            with contextlib.suppress(RuntimeError):  # the loop has gone: nobody waits for the results
                loop.call_soon_threadsafe(self._settle, group, self._next - 1, failed)

    def _take(self) -> list[_Append | _Task]:
        group: list[_Append | _Task] = []
        entries = size = 0
        with self._ready:
            while self._jobs and entries < GROUP_ENTRIES and size < GROUP_BYTES:
                job = self._jobs.popleft()
                group.append(job)
                if isinstance(job, _Append):
                    entries += len(job.entries)
                    size += job.size_bytes
        return group

    def _commit_on_what_syncs(self, group: list[_Append | _Task]) -> JournalError | None:
        try:
            db = self._db or self._open_anew()
        except (sqlite3.Error, OSError, JournalError) as err:
            return err if isinstance(err, JournalError) else self._translate(err)
        failed = self._commit_group(db, group)
        if self._sync_failed:
            # At once: what has failed may stand in the log whole, and is then held after all.
            with contextlib.suppress(sqlite3.Error, OSError, JournalError):
                self._open_anew()
        return failed

    def _open_anew(self) -> sqlite3.Connection:
        """With descriptors on which no sync has failed; the readers' are closed, too, as SQLite uses those of a file
        again that is open elsewhere in the process. Raises what `_connect` raises."""
        with self._gate:
            self._shut = True
            self._gate.wait_for(lambda: not self._reading)
        try:
            with closing_unsynced(self.path):
                while self._idle:
                    self._idle.pop().close()
                if self._db is not None:
                    self._db.close()
                    self._db = None
            self._close_index()
            self._db = self._connect()
            self._sync_failed = False
            return self._db
        finally:
            with self._gate:
                self._shut = False
                self._gate.notify_all()

    def _look_at(self, err: Exception) -> None:
        """Whether it was a sync that failed."""
        if getattr(err, "sqlite_errorcode", None) in _SYNC_FAILED:
            self._sync_failed = True

    def _commit_group(self, db: sqlite3.Connection, group: list[_Append | _Task]) -> JournalError | None:
        """One transaction. Returns what failed all of it; a call refused for want of room says so itself."""
        start = self._next
        dirty: dict[tuple[str, int], IntervalSet] = {}
        try:
            db.execute("BEGIN IMMEDIATE")
            rows: list[_Insert] = []
            tallies: dict[str, _Tally] = {}
            need = 0
            floor_hit = self._free_bytes() < self._free_disk_bytes
            for job in group:
                if isinstance(job, _Task):
                    job.result = job.work(db)
                elif floor_hit or self._used_bytes + need + job.size_bytes > self._page_bytes:
                    job.refused = self._refusal(self._known(db, job.entries, dirty))
                else:
                    need += job.size_bytes
                    job.results = [self._admit(db, e, rows, dirty, tallies) for e in job.entries]
            if rows:
                db.executemany(_INSERT, rows)
            reached("journal.after_insert")
            self._persist(db, dirty, tallies)
            reached("journal.before_commit")
            db.execute("COMMIT")
        except Exception as err:  # noqa: BLE001 - nothing was committed, all are told, and the thread lives on
            self._look_at(err)
            with contextlib.suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            self._next = start
            for key in dirty:
                self._forget(key)
            error = self._translate(err)
            if isinstance(error, JournalFull):
                with contextlib.suppress(sqlite3.Error):  # it cannot be read either: nothing is told apart
                    for job in group:
                        if isinstance(job, _Append):
                            job.refused = JournalFull(
                                str(error), error.retry_after_s, self._known(db, job.entries, {})
                            )
            return error
        reached("journal.after_commit")
        self.commits += 1
        with contextlib.suppress(sqlite3.Error):  # it is committed: a failure to look must not take that back
            self._used_bytes = self._measure(db)
        self._shrink_cache()
        self._tidy_wal(db)
        return None

    def _known(
        self, db: sqlite3.Connection, entries: Sequence[Entry], dirty: dict[tuple[str, int], IntervalSet]
    ) -> tuple[int, ...]:
        """Which of them are held already, whole: to say so takes no room."""
        places = []
        for i, entry in enumerate(entries):
            key = (entry.gateway, entry.epoch)
            held = dirty.get(key) or self._load(db, key)
            if not held.missing(entry.first, entry.last):
                places.append(i)
        return tuple(places)

    def _admit(
        self,
        db: sqlite3.Connection,
        entry: Entry,
        rows: list[_Insert],
        dirty: dict[tuple[str, int], IntervalSet],
        tallies: dict[str, _Tally],
    ) -> Appended:
        key = (entry.gateway, entry.epoch)
        held = dirty.get(key)
        if held is None:
            held = dirty[key] = self._load(db, key)
        fresh = held.add(entry.first, entry.last)
        tally = tallies.get(entry.gateway)
        if tally is None:
            tally = tallies[entry.gateway] = _Tally()
        frames = entry.last - entry.first + 1
        tally.batches += 1
        tally.received += frames
        if not fresh:
            tally.duplicate += frames
            return Appended(None, ())
        whole = fresh[0] == (entry.first, entry.last)
        if whole:
            tally.readings += entry.readings
        else:
            new = count(fresh)
            tally.duplicate += frames - new
            # A batch's readings are counted as evenly spread: nothing is decoded here.
            tally.readings += entry.readings * new // frames
        offset = self._next
        self._next += 1
        text = "" if whole else ",".join(f"{a}-{b}" for a, b in fresh)
        rows.append((
            offset, entry.gateway, entry.epoch, entry.first, entry.last, entry.readings, entry.received_at_ns, text,
            _crc(offset, entry.gateway.encode(), entry.epoch, entry.first, entry.last, entry.readings,
                 entry.received_at_ns, text.encode(), entry.payload),
            entry.payload,
        ))  # fmt: skip
        return Appended(offset, fresh)

    def _persist(
        self,
        db: sqlite3.Connection,
        dirty: dict[tuple[str, int], IntervalSet],
        tallies: dict[str, _Tally],
    ) -> None:
        gone: list[tuple[str, int, int]] = []
        kept: list[tuple[str, int, int, int]] = []
        for (gateway, epoch), held in dirty.items():
            for first, last in held.take_changes().items():
                if last is None:
                    gone.append((gateway, epoch, first))
                else:
                    kept.append((gateway, epoch, first, last))
        if gone:
            db.executemany("DELETE FROM held WHERE gateway = ? AND epoch = ? AND first = ?", gone)
        if kept:
            db.executemany(
                "INSERT OR REPLACE INTO held (gateway, epoch, first, last, crc32) VALUES (?, ?, ?, ?, ?)",
                [(*one, _held_crc(*one)) for one in kept],
            )
        if tallies:
            db.executemany(
                _COUNT,
                [(g, t.batches, t.received, t.duplicate, t.readings) for g, t in tallies.items()],
            )

    def _load(self, db: sqlite3.Connection, key: tuple[str, int]) -> IntervalSet:
        held = self._held.get(key)
        if held is None:
            rows = db.execute(
                "SELECT first, last, crc32 FROM held WHERE gateway = ? AND epoch = ? ORDER BY first", key
            ).fetchall()
            good = [(first, last) for first, last, crc in rows if crc == _held_crc(*key, first, last)]
            if len(good) < len(rows):
                log.error(
                    "%s: %d intervals of %s, epoch %d are damaged on the disk and not believed; what they held is taken"
                    " again if it is sent again: check the disk", self.path, len(rows) - len(good), *key,
                )  # fmt: skip
            held = IntervalSet(good)
            self._held[key] = held
        else:
            self._held.move_to_end(key)
        return held

    def _forget(self, key: tuple[str, int]) -> None:
        self._held.pop(key, None)

    def _shrink_cache(self) -> None:
        """Keep the most recently used sets, within bounds. Summing all is only done when there are many."""
        while len(self._held) > CACHED_SETS:
            self._held.popitem(last=False)
        if self.commits % 256 == 0:
            total = sum(len(held) for held in self._held.values())
            while total > CACHED_RANGES and len(self._held) > 1:
                total -= len(self._held.popitem(last=False)[1])

    def _measure(self, db: sqlite3.Connection) -> int:
        """Bytes of pages in use: what trim freed is used again before the file grows."""
        pages: int = db.execute("PRAGMA page_count").fetchone()[0]
        free: int = db.execute("PRAGMA freelist_count").fetchone()[0]
        size: int = db.execute("PRAGMA page_size").fetchone()[0]
        return (pages - free) * size

    def _free_bytes(self) -> int:
        disk = os.statvfs(self.path.parent)
        return disk.f_bavail * disk.f_frsize

    def _disk_is_full(self) -> bool:
        try:
            return self._free_bytes() < PAGE_BYTES * 16
        except OSError:  # a disk so broken that it does not tell its room is not full
            return False

    def _wal_size(self) -> int:
        try:
            return Path(f"{self.path}-wal").stat().st_size
        except OSError:  # not there, or its folder cannot be looked into: to ask must not end the writer
            return 0

    def _tidy_wal(self, db: sqlite3.Connection) -> None:
        """Readers that follow each other closely keep a WAL from ever starting over: above the bound, wait for them."""
        how = ""
        if self.commits % 16 == 0 and self._wal_size() > self._wal_bytes:
            how = "TRUNCATE"
        elif self._wal_frames() >= WAL_CHECKPOINT_PAGES:
            how = "PASSIVE"
        if how:
            try:
                db.execute(f"PRAGMA wal_checkpoint({how})").fetchone()
            except sqlite3.Error as err:  # a full disk, or a reader for longer than the timeout: next time
                self._look_at(err)

    def _wal_frames(self) -> int:
        try:
            if self._index_file is None:
                self._index_file = os.open(f"{self.path}-shm", os.O_RDONLY | os.O_CLOEXEC)
            return int.from_bytes(os.pread(self._index_file, 4, _MX_FRAME), sys.byteorder)
        except OSError:
            return self._wal_size() // PAGE_BYTES

    def _close_index(self) -> None:
        if self._index_file is not None:
            os.close(self._index_file)
            self._index_file = None

    def _translate(self, err: Exception) -> JournalError:
        if isinstance(err, OSError):
            if self._disk_is_full():
                return self._refusal()
            return JournalBroken(f"{self.path}: {err.strerror}; check the disk (nothing was acknowledged)")
        if not isinstance(err, sqlite3.Error):
            return JournalBroken(
                f"{self.path}: {type(err).__name__}: {err}; a fault of ours (nothing was acknowledged)"
            )
        code = (getattr(err, "sqlite_errorcode", None) or 0) & 0xFF
        if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and self._disk_is_full()):
            with contextlib.suppress(OSError):
                return self._refusal()
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return JournalBroken(f"{self.path}: {err}; nothing was acknowledged; {_SALVAGE}")
        return JournalBroken(
            f"{self.path}: {err}; check the disk and its permissions (nothing was acknowledged)"
        )

    # --- reading ---

    async def _read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        if self._pool is None:
            raise JournalBroken(f"{self.path}: the journal is closed")
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._with_reader, work)

    def _with_reader(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with self._gate:
            self._gate.wait_for(lambda: not self._shut)
            self._reading += 1
        try:
            return self._on_reader(work)
        finally:
            with self._gate:
                self._reading -= 1
                self._gate.notify_all()

    def _on_reader(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            db = self._idle.pop()
        except IndexError:
            uri = f"file:{quote(str(self.path))}?mode=ro"
            try:
                db = sqlite3.connect(
                    uri, uri=True, isolation_level=None, check_same_thread=False, timeout=5.0
                )
            except sqlite3.Error as err:  # no descriptor left, or the file is out of reach
                raise JournalBroken(f"{self.path}: {err}; {_unreadable(err)}") from err
            db.text_factory = _lenient
        try:
            return work(db)
        except sqlite3.Error as err:
            raise JournalBroken(f"{self.path}: {err}; {_unreadable(err)}") from err
        finally:
            self._idle.append(db)

    async def read(self, after: int, *, max_entries: int, max_bytes: int) -> list[Stored]:
        if after >= self._last:
            return []
        rows = await self._read(lambda db: _read_rows(db, after, max_entries, max_bytes))
        if not rows and after < self._last and after < await self._read(_newest):
            raise JournalBroken(f"{self.path}: entries {after + 1}..{self._last} are not found; {_SALVAGE}")
        return rows

    async def wait(self, after: int, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                while self._last <= after:
                    await self._grown.wait()
        except TimeoutError:
            return False
        return True

    async def holds(self, gateway: str, epoch: int, first: int, last: int) -> tuple[Range, ...]:
        rows = await self._read(
            lambda db: db.execute(
                "SELECT first, last, crc32 FROM held WHERE gateway = ? AND epoch = ? AND first <= ? AND last >= ? "
                "ORDER BY first",
                (gateway, epoch, last, first),
            ).fetchall()
        )
        return tuple(
            (max(a, first), min(b, last)) for a, b, crc in rows if crc == _held_crc(gateway, epoch, a, b)
        )

    async def counts(self) -> list[GatewayCount]:
        rows = await self._read(
            lambda db: db.execute(
                "SELECT gateway, batches, frames_received, frames_duplicate, readings_stored FROM gateway_count "
                "ORDER BY gateway"
            ).fetchall()
        )
        return [GatewayCount(*row) for row in rows]

    async def state(self) -> JournalState:
        last = self._last  # before the read: what is appended meanwhile must not look trimmed
        rows = await self._read(
            lambda db: db.execute(
                "SELECT offset, received_at_ns FROM entry ORDER BY offset LIMIT 1"
            ).fetchone()
        )
        first, oldest = rows or (last + 1, None)
        return JournalState(first, max(last, first - 1), self._used_bytes + self._wal_size(), oldest)

    @property
    def used_bytes(self) -> int:
        """Of `capacity_bytes`; at that, appends are refused."""
        return self._used_bytes

    @property
    def capacity_bytes(self) -> int:
        return self._page_bytes

    @property
    def full(self) -> bool:
        """Whether the last append was refused for want of room."""
        return self._full

    @property
    def broken(self) -> str | None:
        """Why the last write failed for another reason than room; None where it did not."""
        return self._broken

    @property
    def floor_bytes(self) -> int:
        """Below so much free disk appends are refused."""
        return self._free_disk_bytes

    @property
    def free_disk_bytes(self) -> int:
        try:
            return self._free_bytes()
        except OSError:  # a disk that does not tell its room: `broken` says more
            return 2**62

    @property
    def last_offset(self) -> int:
        """The newest committed offset, 0 where there was never one."""
        return self._last

    # --- cursors, trim, heartbeats ---

    async def cursor(self, sink: str) -> int:
        return self._cursors.get(sink, 0)

    async def commit(self, sink: str, offset: int, *, expired: Mapping[str, int] | None = None) -> None:
        if offset <= self._cursors.get(sink, 0) and sink in self._cursors and not expired:
            return

        def work(db: sqlite3.Connection) -> None:
            db.execute(_MOVE, (sink, offset))
            if expired:
                db.executemany(_EXPIRE, [(sink, gateway, n) for gateway, n in expired.items()])

        await self._write(work)
        self._cursors[sink] = max(offset, self._cursors.get(sink, 0))

    async def reset(self, sink: str, offset: int) -> None:
        if offset < 0:
            raise ValueError(f"offset {offset} is below 0")
        await self._write(
            lambda db: db.execute(
                "INSERT OR REPLACE INTO cursor (sink, offset) VALUES (?, ?)", (sink, offset)
            )
        )
        self._cursors[sink] = offset

    async def trim(
        self, sinks: Sequence[str], *, keep_s: float, max_bytes: int, optional: Sequence[str] = ()
    ) -> int:
        """With no sink named nothing is removed: nobody has read it."""
        if not sinks:
            return 0
        total = 0
        lost: dict[str, list[int]] = {}
        while True:
            before_ns = self._clock_ns() - int(keep_s * 1e9)
            removed, moved = await self._write(
                lambda db: _trim_chunk(db, self._measure(db), sinks, optional, before_ns, max_bytes)  # noqa: B023
            )
            for sink, (cut, batches, readings) in moved.items():
                self._cursors[sink] = max(cut, self._cursors.get(sink, 0))
                counts = lost.setdefault(sink, [0, 0])
                counts[0] += batches
                counts[1] += readings
            total += removed
            if removed < TRIM_CHUNK:
                break
        for sink, (batches, readings) in lost.items():
            log.error(
                "sink %s is not required and too far behind: %d batches with %d readings were trimmed before it had "
                "them; `headgate-cloud replay --sink %s` gives them to it from the archive",
                sink, batches, readings, sink,
            )  # fmt: skip
        return total

    async def note_missed(self, sink: str, after: int, upto: int) -> None:
        def work(db: sqlite3.Connection) -> None:
            db.execute(
                """INSERT INTO missed
                SELECT ?1, c.gateway, 0, c.readings_stored - coalesce(h.readings, 0), ?2, ?3, 0, ?4
                FROM gateway_count AS c LEFT JOIN (
                    SELECT gateway, sum(readings) AS readings FROM entry INDEXED BY entry_account
                    WHERE offset > 0 GROUP BY gateway
                ) AS h USING (gateway) WHERE c.readings_stored > coalesce(h.readings, 0)
                ON CONFLICT (sink, gateway) DO UPDATE SET readings = max(readings, excluded.readings),
                first_offset = min(first_offset, excluded.first_offset),
                last_offset = max(last_offset, excluded.last_offset), to_ns = max(to_ns, excluded.to_ns)""",
                (sink, after + 1, upto, self._clock_ns()),
            )
            db.execute(_MOVE, (sink, upto))

        await self._write(work)
        self._cursors[sink] = max(upto, self._cursors.get(sink, 0))

    async def missed(self) -> list[Missed]:
        rows = await self._read(
            lambda db: db.execute(
                "SELECT sink, gateway, batches, readings, first_offset, last_offset, from_ns, to_ns FROM missed "
                "ORDER BY sink, gateway"
            ).fetchall()
        )
        return [Missed(*row) for row in rows]

    async def forget_missed(self, sink: str, gateway: str) -> None:
        await self._write(
            lambda db: db.execute("DELETE FROM missed WHERE sink = ? AND gateway = ?", (sink, gateway))
        )

    async def expired(self, sink: str) -> dict[str, int]:
        """Readings by gateway that `sink` did not take because they were older than it keeps anything."""
        rows = await self._read(
            lambda db: db.execute("SELECT gateway, readings FROM expired WHERE sink = ?", (sink,)).fetchall()
        )
        return dict(rows)

    async def pending(self, after: int, upto: int) -> dict[str, int]:
        """Readings by gateway in the entries above `after`, up to `upto`; counted without their payloads."""
        return await self._read(lambda db: _pending(db, after, upto))

    async def holes(self, limit: int = 10_000) -> list[Hole]:
        """The first `limit` holes, by gateway, epoch and seq."""
        rows = await self._read(
            lambda db: db.execute(
                "SELECT gateway, epoch, before + 1, first - 1 FROM (SELECT gateway, epoch, first, lag(last) OVER "
                "(PARTITION BY gateway, epoch ORDER BY first) AS before FROM held) WHERE before IS NOT NULL LIMIT ?",
                (limit,),
            ).fetchall()
        )
        return [Hole(*row) for row in rows]

    async def epochs(self) -> set[tuple[str, int]]:
        """(gateway, epoch) of all that was ever taken."""
        rows = await self._read(lambda db: db.execute("SELECT DISTINCT gateway, epoch FROM held").fetchall())
        return {(gateway, epoch) for gateway, epoch in rows}

    async def record_state(self, gateway: str, received_at_ns: int, state: bytes) -> None:
        """Keep a gateway's latest heartbeat (UTF-8 text)."""
        await self._write(
            lambda db: db.execute(
                "INSERT OR REPLACE INTO gateway_state (gateway, received_at_ns, state) VALUES (?, ?, ?)",
                (gateway, received_at_ns, state.decode()),
            )
        )

    async def states(self) -> list[GatewayState]:
        """The latest heartbeat of each gateway that ever sent one."""
        rows = await self._read(
            lambda db: db.execute(
                "SELECT gateway, received_at_ns, state FROM gateway_state ORDER BY gateway"
            ).fetchall()
        )
        return [GatewayState(gateway, at, state.encode()) for gateway, at, state in rows]


def _trim_chunk(
    db: sqlite3.Connection, used: int, required: Sequence[str], optional: Sequence[str], before_ns: int, max_bytes: int
) -> tuple[int, dict[str, tuple[int, int, int]]]:  # fmt: skip
    """One transaction. How many entries went, and for each optional sink that was not past them: where its cursor
    is now, and the batches and readings that it missed. The cursors are those of this transaction."""
    cursors: dict[str, int] = dict(db.execute("SELECT sink, offset FROM cursor").fetchall())
    upto = min(cursors.get(sink, 0) for sink in required)
    rows = db.execute(
        "SELECT offset, received_at_ns, length(payload), gateway, first, last, readings, fresh FROM entry "
        "WHERE offset <= ? ORDER BY offset LIMIT ?",
        (upto, TRIM_CHUNK),
    ).fetchall()
    n = 0
    for _, received_at_ns, size, *_ in rows:
        if received_at_ns >= before_ns and used <= max_bytes:
            break
        used -= size + ROW_OVERHEAD_BYTES
        n += 1
    if not n:
        return 0, {}
    gone = rows[:n]
    cut: int = gone[-1][0]
    moved: dict[str, tuple[int, int, int]] = {}
    for sink in optional:
        behind = [row for row in gone if row[0] > cursors.get(sink, 0)]
        if not behind:
            continue
        counted = [(row, _new_readings(*row[4:])) for row in behind]
        db.executemany(
            _MISS,
            [(sink, row[3], new, row[0], row[0], row[1], row[1]) for row, new in counted],
        )
        db.execute(_MOVE, (sink, cut))
        moved[sink] = (cut, len(behind), sum(new for _, new in counted))
    reached("journal.before_trim")
    db.execute("DELETE FROM entry WHERE offset <= ?", (cut,))
    reached("journal.after_trim")
    return n, moved


def _new_readings(first: int, last: int, readings: int, fresh: str) -> int:
    """As they were counted on the way in: evenly spread over the entry's frames."""
    return readings if not fresh else readings * count(_ranges(first, last, fresh)) // (last - first + 1)


def _pending(db: sqlite3.Connection, after: int, upto: int) -> dict[str, int]:
    found: dict[str, int] = dict(
        db.execute(
            "SELECT gateway, sum(readings) FROM entry INDEXED BY entry_account "
            "WHERE offset > ? AND offset <= ? AND fresh = '' GROUP BY gateway",
            (after, upto),
        ).fetchall()
    )
    for gateway, *entry in db.execute(
        "SELECT gateway, first, last, readings, fresh FROM entry INDEXED BY entry_account "
        "WHERE offset > ? AND offset <= ? AND fresh <> ''",
        (after, upto),
    ):
        found[gateway] = found.get(gateway, 0) + _new_readings(*entry)
    return found


def _unreadable(err: sqlite3.Error) -> str:
    code = (getattr(err, "sqlite_errorcode", None) or 0) & 0xFF
    damaged = code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
    return _SALVAGE if damaged else "the journal cannot be read"


def _held_crc(gateway: str, epoch: int, first: int, last: int) -> int:
    return zlib.crc32(f"held|{gateway}|{epoch}|{first}|{last}".encode(errors="replace"))


def _crc(
    offset: int, gateway: bytes, epoch: int, first: int, last: int, readings: int, received_at_ns: int, fresh: bytes,
    payload: bytes,
) -> int:  # fmt: skip
    columns = b"%a|%b|%a|%a|%a|%a|%a|%b" % (
        offset,
        gateway,
        epoch,
        first,
        last,
        readings,
        received_at_ns,
        fresh,
    )
    return zlib.crc32(payload, zlib.crc32(columns))


def _read_rows(db: sqlite3.Connection, after: int, max_entries: int, max_bytes: int) -> list[Stored]:
    out: list[Stored] = []
    size = 0
    with contextlib.closing(db.execute(_READ, (after, max(max_entries, 1)))) as rows:
        for row in rows:
            # Offsets have no holes but in front of the oldest. One elsewhere is damage to the tree: it led past them.
            if row[0] != after + 1 + len(out) and (out or _has_below(db, row[0])):
                if out:
                    return out
                raise _hole(after, row[0])
            entry = _stored(row)
            if entry is None:
                if out:
                    return out
                raise _damaged(row, after, db.execute(_READ, (after, 2)).fetchall())
            size += len(entry.payload)
            if out and size > max_bytes:
                return out
            out.append(entry)
    return out


def _has_below(db: sqlite3.Connection, offset: int) -> bool:
    oldest = db.execute("SELECT offset FROM entry ORDER BY offset LIMIT 1").fetchone()
    return oldest is not None and oldest[0] < offset


def _newest(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT max(offset) FROM entry").fetchone()[0] or 0)


def _hole(after: int, found: int) -> EntryDamaged:
    text = f"journal entries {after + 1}..{found - 1} cannot be found on the disk; {_SALVAGE}"
    return EntryDamaged(text, offset=found - 1, gateway="", epoch=0, first=0, last=0)


def _stored(row: _Row) -> Stored | None:
    """None where the row is not what was written."""
    offset, gateway, epoch, first, last, readings, received_at_ns, fresh, crc, payload = row
    if not (isinstance(gateway, bytes) and isinstance(fresh, bytes) and isinstance(payload, bytes)):
        return None
    if not (isinstance(epoch, int) and isinstance(first, int) and isinstance(last, int)):
        return None
    if not (isinstance(readings, int) and isinstance(received_at_ns, int)):
        return None
    if _crc(offset, gateway, epoch, first, last, readings, received_at_ns, fresh, payload) != crc:
        return None
    ranges = tuple(_ranges(first, last, fresh.decode()))
    return Stored(offset, gateway.decode(), epoch, first, last, readings, received_at_ns, ranges, payload)


def _damaged(row: _Row, after: int, rows: list[_Row]) -> EntryDamaged:
    """The offset itself may be what is damaged: it must not lead past the entry that follows."""
    offset = max(after + 1, row[0] if len(rows) < 2 else min(row[0], rows[1][0] - 1))
    gateway = bytes(row[1]).decode(errors="replace") if isinstance(row[1], bytes) else str(row[1])
    epoch, first, last = (number if isinstance(number, int) else 0 for number in row[2:5])
    return EntryDamaged(
        f"journal entry {offset} ({gateway}, epoch {epoch}, frames {first}..{last}) is damaged on the disk",
        offset=offset, gateway=gateway, epoch=epoch, first=first, last=last,
    )  # fmt: skip


def _ranges(first: int, last: int, text: str) -> Iterator[Range]:
    if not text:
        yield first, last
        return
    for part in text.split(","):
        a, _, b = part.partition("-")
        yield int(a), int(b)


def _sync_folder(folder: Path) -> None:
    """A file is only as durable as its name in the folder (fsync(2))."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _lenient(text: bytes) -> str:
    """Damaged text must reach the CRC's check, not stop the query."""
    return text.decode(errors="replace")


def _copy(error: JournalError) -> JournalError:
    """A fresh exception for each waiter: a shared one would grow a traceback per raise."""
    if isinstance(error, JournalFull):
        return JournalFull(str(error), error.retry_after_s, error.held)
    return JournalBroken(str(error))
