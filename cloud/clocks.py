"""What the cloud knows of its gateways' clocks, and which of it a replay has put in force for which sink.

A frame that was sent before its gateway's clock was synchronized carries an estimate for ever: frames and batches never
change. A later batch of the same boot tells the right time. It is kept here, and `SinkRunner.rewind` uses it.

Rules:
1. Per (gateway, epoch, boot) one synchronized row: the first that came, or one whose error is less than that one's
   where that was above a second. Rows that are not synchronized are no knowledge.
2. A row is durable before the cursor of the sink that met it moves past its batch.
3. What is in force for a sink is what its store was written with: decoding the same entry for that sink gives the same
   times from then on, however often it is delivered. Only a replay changes it, and removes what stood there before.
4. Where a sink was sent back to is kept until it is through: meanwhile its store holds more than its cursor says, and
   the account allows for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

import msgspec

from cloud.intervals import coalesce
from cloud.journal.contract import JournalBroken, Range
from sync.wire import MAX_EPOCH, ClockRow

log = logging.getLogger(__name__)
T = TypeVar("T")

FILE: Final = "clocks.db"
MAX_BOOTS: Final = 10_000  #: kept of one gateway: a reboot an hour for a year
EXACT_NS: Final = 10**9  #: an error below this is what is promised; no better row is looked for

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS clock (
    gateway TEXT NOT NULL, epoch INTEGER NOT NULL, boot INTEGER NOT NULL, row BLOB NOT NULL,
    PRIMARY KEY (gateway, epoch, boot)) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS in_force (
    sink TEXT NOT NULL, gateway TEXT NOT NULL, epoch INTEGER NOT NULL, boot INTEGER NOT NULL, force BLOB NOT NULL,
    PRIMARY KEY (sink, gateway, epoch, boot)) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rewound (sink TEXT PRIMARY KEY, upto INTEGER NOT NULL) STRICT, WITHOUT ROWID;
"""

Boot: TypeAlias = tuple[str, int, int]
"""`<tenant>/<gateway>`, epoch, and the gateway's number of the boot."""


class Force(msgspec.Struct, frozen=True, array_like=True):
    """The row that decides the times of these seqs of one boot, where their batches have none that is synchronized."""

    row: ClockRow
    ranges: tuple[Range, ...]

    def covers(self, seq: int) -> bool:
        return any(first <= seq <= last for first, last in self.ranges)


Forces: TypeAlias = Mapping[Boot, Force]

_encode = msgspec.msgpack.Encoder().encode
_decode_row = msgspec.msgpack.Decoder(ClockRow).decode
_decode_force = msgspec.msgpack.Decoder(Force).decode


def widened(old: Force | None, row: ClockRow, ranges: Iterable[Range]) -> Force:
    """What is in force once these seqs are written by `row`: all that was, with the new row, and these."""
    return Force(row, coalesce([*(old.ranges if old else ()), *ranges]))


class Clocks:
    """One per data folder. Without `open` it is a memory only, as tests and questions need it."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = None
        self._one_at_a_time = threading.Lock()
        self._best: dict[Boot, ClockRow] = {}
        self._boots: Counter[str] = Counter()
        self._force: dict[str, dict[Boot, Force]] = {}
        self._rewound: dict[str, int] = {}
        self._fresh: dict[Boot, ClockRow] = {}  # known, not yet durable

    async def open(self) -> None:
        """Raises `JournalBroken`."""
        await asyncio.to_thread(self._locked, self._open)

    async def close(self) -> None:
        """Safe to call twice."""
        await asyncio.to_thread(self._locked, self._close)

    # --- what gateways tell ---

    def note(self, gateway: str, epoch: int, rows: Iterable[ClockRow]) -> None:
        """A batch's rows. Costs a look-up for each."""
        for row in rows:
            if not row.synchronized:
                continue
            boot = (gateway, epoch, row.boot)
            held = self._best.get(boot)
            if held is None:
                if not 0 <= row.boot <= MAX_EPOCH:
                    continue
                if self._boots[gateway] >= MAX_BOOTS:
                    log.warning("gateway %s: %d boots are known, no more are kept", gateway, MAX_BOOTS)
                    continue
                self._boots[gateway] += 1
            elif held.error_ns <= EXACT_NS or row.error_ns >= held.error_ns:
                continue
            self._best[boot] = self._fresh[boot] = row

    async def flush(self) -> None:
        """All that was noted is durable when it returns. Raises `JournalBroken`."""
        if self._fresh:
            fresh, self._fresh = self._fresh, {}
            try:
                await asyncio.to_thread(self._locked, lambda: self._write_rows(fresh))
            except JournalBroken:
                self._fresh = fresh | self._fresh
                raise

    def best(self, boot: Boot) -> ClockRow | None:
        return self._best.get(boot)

    # --- what replays put in force ---

    def in_force(self, sink: str) -> Forces:
        return self._force.get(sink, {})

    async def put_in_force(self, sink: str, forces: Forces) -> None:
        """Durable, all of it, when it returns. Raises `JournalBroken`."""
        if forces:
            await asyncio.to_thread(self._locked, lambda: self._write_forces(sink, forces))
            self._force[sink] = {**self.in_force(sink), **forces}

    def rewound(self, sink: str) -> int:
        """Up to where the sink's store may hold what its cursor is not past; 0: no further than the cursor."""
        return self._rewound.get(sink, 0)

    async def set_rewound(self, sink: str, upto: int) -> None:
        """0: it is through. Raises `JournalBroken`."""
        if upto != self.rewound(sink):
            await asyncio.to_thread(self._locked, lambda: self._write_rewound(sink, upto))
            self._rewound[sink] = upto

    # --- in a thread ---

    def _locked(self, work: Callable[[], T]) -> T:
        with self._one_at_a_time:
            try:
                return work()
            except (sqlite3.Error, OSError) as err:
                raise JournalBroken(f"{self._path}: {err}; the data_dir must be writable") from err

    def _open(self) -> None:
        if self._path is None or self._db is not None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.touch(mode=0o600)
        db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=10.0)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.executescript(_SCHEMA)
            for gateway, epoch, boot, row in db.execute("SELECT gateway, epoch, boot, row FROM clock"):
                self._best[gateway, epoch, boot] = _decode_row(row)
                self._boots[gateway] += 1
            for sink, gateway, epoch, boot, force in db.execute("SELECT * FROM in_force"):
                self._force.setdefault(sink, {})[gateway, epoch, boot] = _decode_force(force)
            self._rewound = dict(db.execute("SELECT sink, upto FROM rewound").fetchall())
        except (sqlite3.Error, msgspec.DecodeError) as err:
            db.close()
            raise JournalBroken(
                f"{self._path}: {err}; set the file aside: times that a replay has corrected are then estimates again"
            ) from err
        self._db = db

    def _close(self) -> None:
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
            self._db = None

    def _write_rows(self, rows: Mapping[Boot, ClockRow]) -> None:
        if self._db is not None:
            with self._transaction(self._db) as db:
                db.executemany(
                    "INSERT OR REPLACE INTO clock VALUES (?, ?, ?, ?)",
                    [(*boot, _encode(row)) for boot, row in rows.items()],
                )

    def _write_forces(self, sink: str, forces: Forces) -> None:
        if self._db is not None:
            with self._transaction(self._db) as db:
                db.executemany(
                    "INSERT OR REPLACE INTO in_force VALUES (?, ?, ?, ?, ?)",
                    [(sink, *boot, _encode(force)) for boot, force in forces.items()],
                )

    def _write_rewound(self, sink: str, upto: int) -> None:
        if self._db is not None:
            with self._transaction(self._db) as db:
                if upto:
                    db.execute("INSERT OR REPLACE INTO rewound VALUES (?, ?)", (sink, upto))
                else:
                    db.execute("DELETE FROM rewound WHERE sink = ?", (sink,))

    @staticmethod
    @contextlib.contextmanager
    def _transaction(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
            db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            raise
