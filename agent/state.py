"""Small files that must be whole or absent: written aside, synced, renamed.

Rules: a reader sees the old content or the new, never a part; after `write_atomically` returns, a power cut leaves the
new. The lock is the kernel's (flock): it ends with the process, so no crash leaves a stale one behind.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from pathlib import Path

LOCK_NAME = "agent.lock"


class StateDirError(Exception):
    """The state folder cannot be used; the text says what to do."""


def write_atomically(path: Path, data: bytes, *, mode: int = 0o640) -> None:
    """Replace `path` by `data`. Raises `OSError`; the old content is then untouched."""
    # The thread's own: two that write one file at once never write into each other's.
    aside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}.tmp")
    try:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        aside.rename(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable (a rename is not, before this)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class StateLock:
    """Held while an agent uses a state folder; two never share one."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def take(cls, folder: Path) -> StateLock:
        """Make the folder if need be, and lock it. Raises `StateDirError` saying who holds it or what is missing."""
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o750)
            try:
                descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
            except OSError as err:
                if err.errno != errno.EROFS:
                    raise
                # A disk that takes no writes keeps no agent from sending what it holds. Where there is no file
                # to lock either, the buffer's own lock, then on the folder, keeps a second agent out.
                if not (folder / LOCK_NAME).exists():
                    return cls(-1)
                descriptor = os.open(folder / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as err:
            raise StateDirError(
                f"state_dir {folder}: {err.strerror}; create it for the agent's user, or set another state_dir"
            ) from err
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise StateDirError(
                f"state_dir {folder}: another agent (process {holder}) uses it; stop that one, or give this one a "
                "state_dir of its own"
            ) from err
        with contextlib.suppress(
            OSError
        ):  # full or read-only: the lock holds, only its holder's name is missing
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        return cls(descriptor)

    def release(self) -> None:
        """Let go; safe to call twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def is_locked(folder: Path) -> bool | None:
    """Whether an agent runs on this folder now; `None` where it cannot be told."""
    try:
        try:
            descriptor = os.open(folder / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # then the buffer may have locked the folder (`StateLock.take`)
            descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
