"""What to do with a SQLite file after a sync of it has failed.

A kernel that could not write a page back tells it to one `fsync` and may mark the page clean all the same (Rebello et
al., "Can Applications Recover from fsync Failures?", ATC 2020): a second one on the same descriptor succeeds, and
nothing was written. What is read then comes from memory, and is not on the disk.

Rules:
1. The descriptors are closed without another sync. SQLite checkpoints, and so syncs, as its last connection to a file
   in WAL mode closes; it does not where it cannot lock the whole file, and a lock of ours sees to that.
2. Before a log is believed again its bytes are written over themselves, which makes its pages dirty, and synced on a
   descriptor of its own. Pages of the database itself need no such thing: they are in the log until a sync of them has
   succeeded.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

#: `struct flock`: type, whence, start, length, pid. Some platforms pad it.
_FLOCK: Final = struct.Struct("@hhqqi0q")
#: The bytes that every connection locks, shared, and one that closes, wholly (SHARED_FIRST and SHARED_SIZE of SQLite's
#: os.h, PENDING_BYTE + 2: https://www.sqlite.org/fileformat2.html#the_lock_byte_page).
_SHARED_FIRST: Final = 0x40000002
_SHARED_SIZE: Final = 510
_CHUNK_BYTES: Final = 1024 * 1024


@contextlib.contextmanager
def closing_unsynced(path: Path) -> Iterator[None]:
    """While this lasts, a connection to the database at `path` that closes neither syncs nor deletes its log. All of
    this process's connections to it must be closed by the end: with it go the process's locks on the file. Does
    nothing where the file cannot be opened or locked."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        with contextlib.suppress(OSError):
            # Of the open file, not of the process: it holds against this process's own locks.
            fcntl.fcntl(
                fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, _SHARED_FIRST, _SHARED_SIZE, 0)
            )
        yield
    finally:
        os.close(fd)


def write_log_again(path: Path) -> None:
    """Make sure that what is read from the log of the database at `path` is on the disk, too. Nobody else may write
    it meanwhile. A log that cannot be written, as its file system is read-only, stays as it is. Raises `OSError`."""
    try:
        fd = os.open(path.with_name(path.name + "-wal"), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    except OSError as err:
        if err.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return
        raise
    try:
        at = 0
        while data := os.pread(fd, _CHUNK_BYTES, at):
            written = os.pwrite(fd, data, at)
            if not written:
                raise OSError(errno.EIO, "nothing was written")
            at += written
        if at:
            os.fdatasync(fd)
    finally:
        os.close(fd)
