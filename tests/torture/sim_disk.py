"""The disk of a simulated machine: real SQLite on a real file, and what a full, sick or cut one does to it.

Rules:
1. Every statement of the shipped code passes here. A fault is what SQLite itself would give at that statement, with its
   own code; and before or after any statement the machine may die (`MachineDied`).
2. After a kill the file is as it was written; after a power cut only what was synced is left. What is synced is decided
   by the connection's own `synchronous`: FULL syncs the log at each commit, NORMAL at each checkpoint, OFF never.
3. A machine that comes back finds a copy in a new folder: the dead one's connections still have the old one.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
from pathlib import Path
from typing import IO, Any, Final

from tests.torture.sim_loop import Machine, MachineDied

_WRITES: Final = ("INSERT", "DELETE", "UPDATE", "COMMIT", "CREATE", "VACUUM", "REPLACE")
FULL_SYNC: Final = 2  #: PRAGMA synchronous = FULL
NORMAL_SYNC: Final = 1


class Disk:
    """One machine's disk."""

    def __init__(self, machine: Machine, folder: Path, rng: random.Random) -> None:
        self.machine = machine
        self.folder = folder
        self.rng = rng
        self.free_bytes = 64 * 2**30
        self.fault: str = ""  #: "", "full", "io", "readonly"
        self.dies_in: int | None = None  #: statements until the machine dies
        self.statements = 0
        self.faults_given = 0
        self.level = FULL_SYNC  #: of the writing connection
        self._durable_wal: dict[str, int] = {}  #: by file: what of the log is synced where commits are not
        self._connections: list[SimConnection] = []
        self.descriptors: set[int] = set()  #: of the machine: they go with it

    # --- for the shipped code, in place of its `sqlite3` and `os` ---

    def connect(self, path: Any, **kwargs: Any) -> sqlite3.Connection:
        if self.machine.dead:
            raise MachineDied
        conn = sqlite3.connect(path, factory=SimConnection, **kwargs)
        conn.disk = self
        conn.file = str(path)
        conn.writes = not kwargs.get("uri")
        if conn.writes:
            self._durable_wal.setdefault(conn.file, _size(conn.file + "-wal"))
        self._connections.append(conn)
        return conn

    def before(self, conn: SimConnection, sql: str) -> None:
        """Raises what the disk has to say to this statement."""
        if self.machine.dead:
            raise MachineDied
        self.statements += 1
        if self.dies_in is not None:
            self.dies_in -= 1
            if self.dies_in <= 0:
                self.machine.end()
                raise MachineDied
        if self.fault and sql.lstrip().startswith(_WRITES):
            self.faults_given += 1
            if self.fault == "full":
                raise _error("database or disk is full", sqlite3.SQLITE_FULL)
            if self.fault == "readonly":
                raise _error("attempt to write a readonly database", sqlite3.SQLITE_READONLY)
            if sql == "COMMIT" and self.rng.random() < 0.5:
                conn.carry_out(sql)  # it is done, and the error comes after
            raise _error("disk I/O error", sqlite3.SQLITE_IOERR)

    def after(self, conn: SimConnection, sql: str) -> None:
        if sql.startswith("PRAGMA synchronous"):
            self.level = sqlite3.Connection.execute(conn, "PRAGMA synchronous").fetchone()[0]
        elif sql.startswith("PRAGMA wal_checkpoint") and self.level >= NORMAL_SYNC:
            self._durable_wal[conn.file] = 0

    # --- for the simulation ---

    def left_after(self, folder: Path, *, power_cut: bool) -> None:
        """What the next machine finds, as a copy in `folder`."""
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns("*-shm", "*.lock"))
        if power_cut and self.level < FULL_SYNC:
            for file, synced in self._durable_wal.items():
                wal = folder / (Path(file).name + "-wal")
                if wal.exists():
                    os.truncate(wal, min(synced, wal.stat().st_size))

    def throw_away(self) -> None:
        """The dead machine's files, once they were copied."""
        for conn in self._connections:
            with contextlib.suppress(sqlite3.Error):
                sqlite3.Connection.close(conn)
        self._connections.clear()
        for fd in self.descriptors:
            with contextlib.suppress(OSError):
                os.close(fd)
        self.descriptors.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


class SimConnection(sqlite3.Connection):
    """A connection whose disk has a word in every statement."""

    disk: Disk
    file: str
    writes: bool

    def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
        self.disk.before(self, sql)
        cursor = super().execute(sql, *args)
        if sql.startswith("PRAGMA"):
            self.disk.after(self, sql)
        return cursor

    def executemany(self, sql: str, *args: Any) -> sqlite3.Cursor:
        self.disk.before(self, sql)
        return super().executemany(sql, *args)

    def carry_out(self, sql: str) -> None:
        super().execute(sql)

    def close(self) -> None:
        if self.disk.machine.dead:
            return  # a dead machine closes nothing; its file is copied as it lies there
        super().close()


class SimSqlite:
    """Stands in for a module's `sqlite3`."""

    def __init__(self, disk_of: Any) -> None:
        self._disk_of = disk_of

    def connect(self, path: Any, **kwargs: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = self._disk_of(Path(path)).connect(path, **kwargs)
        return connection

    def __getattr__(self, name: str) -> Any:
        return getattr(sqlite3, name)


class _Room:
    """What statvfs tells, as far as anybody here asks."""

    f_frsize = 4096

    def __init__(self, free_bytes: int, *, read_only: bool) -> None:
        self.f_flag = os.ST_RDONLY if read_only else 0
        self.f_bavail = self.f_bfree = free_bytes // self.f_frsize
        self.f_blocks = 2**24


class SimOs:
    """Stands in for a module's `os`: the room on the disk is the simulation's to say."""

    def __init__(self, disk_of: Any) -> None:
        self._disk_of = disk_of
        self._owners: dict[int, Disk] = {}

    def statvfs(self, path: Any) -> _Room:
        disk = self._disk_of(Path(path))
        return _Room(disk.free_bytes, read_only=disk.fault == "readonly")

    def open(self, path: Any, *args: Any) -> int:
        fd = os.open(path, *args)
        self._disk_of(Path(path)).descriptors.add(fd)
        self._owners[fd] = self._disk_of(Path(path))
        return fd

    def close(self, fd: int) -> None:
        self._disowned(fd)
        os.close(fd)

    def fdopen(self, fd: int, *args: Any, **kwargs: Any) -> IO[Any]:
        """The file object closes it by itself: its number may be SQLite's by the time that the machine dies."""
        self._disowned(fd)
        file: IO[Any] = os.fdopen(fd, *args, **kwargs)
        return file

    def _disowned(self, fd: int) -> None:
        if (disk := self._owners.pop(fd, None)) is not None:
            disk.descriptors.discard(fd)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def _error(text: str, code: int) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError(text)
    error.sqlite_errorcode = code
    return error


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0
