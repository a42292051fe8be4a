"""What a sink refused for what it is, kept with its reason until a person replays or drops it.

Rules:
1. A letter is on disk (`synchronous=FULL`) before the sink's cursor moves past it.
2. A letter's identity is (sink, gateway, epoch, first..last, points): adding it again changes its reason only.
3. A letter decodes alone: it holds a sealed batch of its own (frame, layout, clock rows), or, where the body itself
   cannot be read, the whole batch as it came.
4. The file is bounded in letters and bytes. Above that the oldest of the most frequent refusal go, and each is counted
   by sink and gateway in a table that is never trimmed: `state().dropped` is an alarm, never zero by accident.
5. Replaying is the sink runner's work; a letter leaves only once the sink has taken it, or by `drop`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from cloud.journal.contract import Stored
from config.failpoint import reached

MAX_LETTERS: Final = 100_000
MAX_BYTES: Final = 256 * 1024 * 1024
BUSY_TIMEOUT_S: Final = 30.0  #: a CLI may hold the file for a moment
_SCHEMA_VERSION: Final = 1

_SCHEMA: Final = """
CREATE TABLE payloads (
    digest BLOB PRIMARY KEY,
    payload BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE letters (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    sink TEXT NOT NULL,
    gateway TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    first INTEGER NOT NULL,
    last INTEGER NOT NULL,
    points TEXT NOT NULL,
    reason TEXT NOT NULL,
    readings INTEGER NOT NULL,
    journal_offset INTEGER NOT NULL,
    received_at_ns INTEGER NOT NULL,
    added_at_ns INTEGER NOT NULL,
    tries INTEGER NOT NULL,
    digest BLOB NOT NULL REFERENCES payloads (digest),
    size_bytes INTEGER NOT NULL,
    UNIQUE (sink, gateway, epoch, first, last, points)
);
CREATE INDEX letters_digest ON letters (digest);
CREATE TABLE totals (letters INTEGER NOT NULL, size_bytes INTEGER NOT NULL);
INSERT INTO totals VALUES (0, 0);
CREATE TRIGGER letter_in AFTER INSERT ON letters BEGIN UPDATE totals SET letters = letters + 1; END;
CREATE TRIGGER letter_out AFTER DELETE ON letters BEGIN UPDATE totals SET letters = letters - 1; END;
CREATE TRIGGER payload_in AFTER INSERT ON payloads
    BEGIN UPDATE totals SET size_bytes = size_bytes + length(NEW.payload); END;
CREATE TRIGGER payload_out AFTER DELETE ON payloads
    BEGIN UPDATE totals SET size_bytes = size_bytes - length(OLD.payload); END;
CREATE TABLE dropped (
    sink TEXT NOT NULL,
    gateway TEXT NOT NULL,
    letters INTEGER NOT NULL,
    readings INTEGER NOT NULL,
    PRIMARY KEY (sink, gateway)
) WITHOUT ROWID;
"""

T = TypeVar("T")


class DeadLettersError(Exception):
    """The file cannot be read or written; the text names the remedy. A cursor must not move on it."""


class NewLetter(msgspec.Struct, frozen=True):
    """One refusal to keep. `entry` decodes to what was refused; `points` empty means all of it."""

    sink: str
    entry: Stored
    reason: str
    readings: int
    points: tuple[int, ...] = ()


class Letter(msgspec.Struct, frozen=True):
    """One refusal as it is kept."""

    id: int
    sink: str
    gateway: str  #: `<tenant>/<gateway>`
    epoch: int
    first: int
    last: int
    points: tuple[int, ...]  #: indices into the layout; empty: the whole
    reason: str
    readings: int
    received_at_ns: int
    added_at_ns: int
    tries: int  #: how often it was refused
    size_bytes: int


class SinkLetters(msgspec.Struct, frozen=True):
    """One sink's and gateway's part of the file."""

    sink: str
    gateway: str
    letters: int
    readings: int
    dropped_letters: int
    dropped_readings: int


class DeadLettersState(msgspec.Struct, frozen=True):
    """For metrics: `dropped` above 0 is an alarm."""

    letters: int
    size_bytes: int
    dropped: int


class DeadLetters:
    """The file. One object per process; safe to call from several tasks."""

    def __init__(
        self,
        path: Path,
        *,
        max_letters: int = MAX_LETTERS,
        max_bytes: int = MAX_BYTES,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._path = path
        self._max_letters = max_letters
        self._max_bytes = max_bytes
        self._clock_ns = clock_ns
        self._db: sqlite3.Connection | None = None
        self._one_at_a_time = threading.Lock()

    async def open(self) -> None:
        """Raises `DeadLettersError`."""
        await self._run(self._open)

    async def add(self, letters: Sequence[NewLetter]) -> None:
        """Durable when it returns. Raises `DeadLettersError`; then none is kept."""
        if letters:
            await self._run(lambda: self._add(letters))

    async def letters(
        self, *, sink: str | None = None, gateway: str | None = None, after_id: int = 0, limit: int = 100
    ) -> list[Letter]:
        """The oldest first; go on with the last one's id."""
        return await self._run(lambda: self._list(sink, gateway, after_id, limit))

    async def show(self, letter_id: int) -> tuple[Letter, Stored] | None:
        """A letter and the entry to decode it from; None where there is no such letter."""
        return await self._run(lambda: self._show(letter_id))

    async def drop(self, ids: Sequence[int]) -> int:
        """Remove these for good; how many there were. A person's decision, or the end of a replay."""
        return await self._run(lambda: self._drop(ids))

    async def refused_again(self, letter_id: int, reason: str) -> None:
        """A replay was refused: the letter stays, with its new reason."""
        await self._run(lambda: self._refused_again(letter_id, reason))

    async def by_gateway(self) -> list[SinkLetters]:
        """What is kept, and what was dropped for want of room, per sink and gateway."""
        return await self._run(self._by_gateway)

    async def state(self) -> DeadLettersState:
        return await self._run(self._state)

    async def close(self) -> None:
        """Never raises; safe to call twice."""
        await asyncio.to_thread(self._close)

    # --- in the thread ---

    async def _run(self, work: Callable[[], T]) -> T:
        def locked() -> T:
            with self._one_at_a_time, self._translated():
                return work()

        # Shielded: a cancelled caller must not leave a transaction half done.
        return await asyncio.shield(asyncio.to_thread(locked))

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as err:
            raise DeadLettersError(f"{self._path}: {err}; {_remedy(err)}") from err

    def _open(self) -> None:
        if self._db is not None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise DeadLettersError(f"{self._path.parent}: {err.strerror}; make it writable") from err
        db = sqlite3.connect(
            self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        try:
            self._path.chmod(0o600)
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version > _SCHEMA_VERSION:
                raise DeadLettersError(
                    f"{self._path} was written by a newer headgate-cloud (version {version}, this one reads "
                    f"{_SCHEMA_VERSION}): upgrade"
                )
            if version == 0:
                db.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}PRAGMA user_version={_SCHEMA_VERSION};COMMIT;")
        except BaseException:
            db.close()
            raise
        self._db = db

    def _connection(self) -> sqlite3.Connection:
        if self._db is None:
            raise DeadLettersError(f"{self._path} is not open")
        return self._db

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        db = self._connection()
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
        except BaseException:
            db.execute("ROLLBACK")
            raise
        reached("dead_letters.before_commit")
        db.execute("COMMIT")

    def _add(self, letters: Sequence[NewLetter]) -> None:
        now_ns = self._clock_ns()
        with self._transaction() as db:
            for letter in letters:
                entry = letter.entry
                (first, last) = (entry.fresh[0][0], entry.fresh[-1][1]) if entry.fresh else (0, 0)
                digest = hashlib.sha256(entry.payload).digest()
                db.execute("INSERT OR IGNORE INTO payloads VALUES (?, ?)", (digest, entry.payload))
                db.execute(
                    "INSERT INTO letters (sink, gateway, epoch, first, last, points, reason, readings,"
                    " journal_offset, received_at_ns, added_at_ns, tries, digest, size_bytes)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 1, ?, ?)"
                    " ON CONFLICT (sink, gateway, epoch, first, last, points) DO UPDATE SET reason = excluded.reason",
                    (
                        letter.sink, entry.gateway, entry.epoch, first, last, _points_text(letter.points),
                        letter.reason, letter.readings, entry.offset, entry.received_at_ns, now_ns, digest,
                        len(entry.payload),
                    ),
                )  # fmt: skip
                # The same refusal in other bytes (sealed by another zstd): the letter keeps those it has.
                db.execute(_DROP_UNUSED, (digest,))
            self._make_room(db)

    def _make_room(self, db: sqlite3.Connection) -> None:
        while True:
            letters, size = _size(db)
            if letters <= self._max_letters and size <= self._max_bytes:
                return
            by, excess = ("count(*)", letters - self._max_letters)
            if excess <= 0:
                by, excess = "sum(size_bytes)", 1
            # From the largest heap: a flood of one kind must not wash out the few of another.
            heap = db.execute(
                f"SELECT sink, reason FROM letters GROUP BY sink, reason ORDER BY {by} DESC, max(id) LIMIT 1"  # noqa: S608 - a constant
            ).fetchone()
            oldest = db.execute(
                "SELECT id, sink, gateway, readings FROM letters WHERE sink = ? AND reason = ? ORDER BY id LIMIT ?",
                (*heap, excess),
            ).fetchall()
            for _, sink, gateway, readings in oldest:
                db.execute(
                    "INSERT INTO dropped VALUES (?, ?, 1, ?) ON CONFLICT (sink, gateway) DO UPDATE SET"
                    " letters = letters + 1, readings = readings + excluded.readings",
                    (sink, gateway, readings),
                )
            _remove(db, [row[0] for row in oldest])

    def _list(self, sink: str | None, gateway: str | None, after_id: int, limit: int) -> list[Letter]:
        rows = self._connection().execute(
            f"SELECT {_COLUMNS} FROM letters WHERE id > :after AND (:sink IS NULL OR sink = :sink)"  # noqa: S608 - a constant
            " AND (:gateway IS NULL OR gateway = :gateway) ORDER BY id LIMIT :limit",
            {"after": after_id, "sink": sink, "gateway": gateway, "limit": limit},
        )
        return [_letter(row) for row in rows]

    def _show(self, letter_id: int) -> tuple[Letter, Stored] | None:
        row = (
            self._connection()
            .execute(
                f"SELECT {_COLUMNS}, journal_offset, payload FROM letters JOIN payloads USING (digest) WHERE id = ?",  # noqa: S608 - a constant
                (letter_id,),
            )
            .fetchone()
        )
        if row is None:
            return None
        letter = _letter(row[:-2])
        return letter, Stored(
            row[-2], letter.gateway, letter.epoch, letter.first, letter.last, letter.readings,
            letter.received_at_ns, ((letter.first, letter.last),), row[-1],
        )  # fmt: skip

    def _drop(self, ids: Sequence[int]) -> int:
        with self._transaction() as db:
            return _remove(db, ids)

    def _refused_again(self, letter_id: int, reason: str) -> None:
        with self._transaction() as db:
            db.execute("UPDATE letters SET reason = ?, tries = tries + 1 WHERE id = ?", (reason, letter_id))

    def _by_gateway(self) -> list[SinkLetters]:
        rows = self._connection().execute(
            "SELECT sink, gateway, sum(letters), sum(readings), sum(gone), sum(gone_readings) FROM ("
            " SELECT sink, gateway, count(*) AS letters, sum(readings) AS readings, 0 AS gone, 0 AS gone_readings"
            " FROM letters GROUP BY sink, gateway"
            " UNION ALL SELECT sink, gateway, 0, 0, letters, readings FROM dropped"
            ") GROUP BY sink, gateway ORDER BY sink, gateway"
        )
        return [SinkLetters(*row) for row in rows]

    def _state(self) -> DeadLettersState:
        db = self._connection()
        (dropped,) = db.execute("SELECT coalesce(sum(letters), 0) FROM dropped").fetchone()
        letters, size = _size(db)
        return DeadLettersState(letters, size, dropped)

    def _close(self) -> None:
        with self._one_at_a_time:
            if self._db is not None:
                self._db.close()
                self._db = None


_COLUMNS: Final = (
    "id, sink, gateway, epoch, first, last, points, reason, readings, received_at_ns, added_at_ns, tries,"
    " size_bytes"
)

_DROP_UNUSED: Final = (
    "DELETE FROM payloads WHERE digest = ?1 AND NOT EXISTS (SELECT 1 FROM letters WHERE digest = ?1)"
)


def _letter(row: Sequence[object]) -> Letter:
    values = list(row)
    values[6] = tuple(int(part) for part in str(row[6]).split(",") if part)
    return msgspec.convert(dict(zip(Letter.__struct_fields__, values, strict=True)), Letter)


def _points_text(points: Iterable[int]) -> str:
    return ",".join(map(str, sorted(set(points))))


def _size(db: sqlite3.Connection) -> tuple[int, int]:
    letters, size = db.execute("SELECT letters, size_bytes FROM totals").fetchone()
    return letters, size


def _remove(db: sqlite3.Connection, ids: Sequence[int]) -> int:
    removed = 0
    for letter_id in ids:
        row = db.execute("DELETE FROM letters WHERE id = ? RETURNING digest", (letter_id,)).fetchone()
        if row is not None:
            removed += 1
            db.execute(_DROP_UNUSED, row)
    return removed


def _remedy(err: sqlite3.DatabaseError) -> str:
    text = str(err)
    if "full" in text or "I/O" in text:
        return "free some disk space; nothing moves on until then"
    if "locked" in text:
        return "another process holds it; end that one"
    if "readonly" in text or "unable to open" in text:
        return "make its folder writable for this user"
    return "move the file aside (it is kept for repair) and start again"
