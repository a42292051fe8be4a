"""A copy of what the cloud keeps, taken while it runs, and the way back.

Rules:
1. Sinks first, the journal after them, the dead letters last. So every entry that a copied sink lacks is in the copied
   journal or had gone from it before, which is looked at (`_behind`): after a restore a sink is delivered to again, and
   loses nothing. A refusal whose cursor is in the copy has its letter in the copy.
2. Each SQLite file is copied in one read transaction of SQLite's own backup; the archive's folder log first, then the
   files that a log may name, which never change. What this reads, nobody writes; the server is not asked.
3. A backup is whole or not there: it is made in `DIR.partial` and renamed when all of it is on disk. Its manifest has
   size and SHA-256 of every file. Secrets and the configuration are not in it.
4. A restore first checks all of it, and refuses what differs, what is from a newer version, and a folder that holds
   something, unless it is told to set that aside. One that was cut short the server notices, and does not start.
5. What was acknowledged after the backup is not in it, and its gateways have let go of it: `verify` shows those seqs as
   holes. The window is the age of the backup.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Final
from urllib.parse import quote

import msgspec

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
UNFINISHED: Final = "restore.unfinished"  #: in a data folder that a restore has not got through with
JOURNAL: Final = "journal.db"
EMBEDDED: Final = "readings.sqlite"
ARCHIVE: Final = "archive"
BEFORE: Final = (EMBEDDED, "series.db")
AFTER: Final = ("dead_letters.db", "clocks.db")
TRIES: Final = 3
CHUNK_BYTES: Final = 1024 * 1024


class BackupError(Exception):
    """It cannot be made or used; the text says what to change."""


class CopiedFile(msgspec.Struct, frozen=True):
    path: str
    size_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    format: int
    version: str  #: of headgate
    made_at_ns: int  #: when the journal was copied: what was acknowledged later is not in it
    journal_version: int
    first_offset: int
    last_offset: int
    remembered: dict[str, int]  #: by sink: the offset up to which its copy is complete
    files: list[CopiedFile]


def back_up(data_dir: Path, target: Path, *, clock_ns: Callable[[], int] = time.time_ns) -> Manifest:
    """Copy to `target`, which must not be there, or be empty. Raises `BackupError`."""
    if not (data_dir / JOURNAL).exists():
        raise BackupError(f"there is no {data_dir / JOURNAL}: nothing was ever received here")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BackupError(f"{target} is not empty; a backup is never written over another: name a new folder")
    partial = target.with_name(f"{target.name}.partial")
    try:
        for _ in range(TRIES):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True, mode=0o700)
            made = _copy_all(data_dir, partial, clock_ns)
            if made is not None:
                (partial / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(made), indent=2))
                _sync_tree(partial)
                if target.exists():
                    target.rmdir()
                partial.rename(target)
                _sync(target.parent)
                return made
    except (OSError, sqlite3.Error) as err:
        shutil.rmtree(partial, ignore_errors=True)
        raise BackupError(f"{target}: {err}; nothing was left there: free room or correct the path") from err
    raise BackupError(
        f"the journal was trimmed past a sink {TRIES} times while it was copied: raise journal.keep_hours"
    )


def restore(source: Path, data_dir: Path, *, replace: bool = False) -> Manifest:
    """Put a backup in place. `replace` sets what is there aside, in a folder beside it. Raises `BackupError`."""
    manifest = check(source)
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _alone(data_dir):
            _put_in_place(source, data_dir, manifest, replace=replace)
    except OSError as err:
        raise BackupError(f"{data_dir}: {err}; free room or correct the path, then run it again") from err
    return manifest


def check(source: Path) -> Manifest:
    """Whether a backup is what was made. Raises `BackupError`."""
    try:
        manifest = msgspec.json.decode((source / MANIFEST).read_bytes(), type=Manifest)
    except OSError as err:
        raise BackupError(f"{source / MANIFEST}: {err.strerror}; is this a backup?") from err
    except msgspec.DecodeError as err:
        raise BackupError(f"{source / MANIFEST}: {err}; this is no backup, or a damaged one") from err
    from cloud.journal.sqlite import SCHEMA_VERSION

    if manifest.format > FORMAT or manifest.journal_version > SCHEMA_VERSION:
        raise BackupError(
            f"{source} was made by headgate {manifest.version}, which is newer: restore it with that"
        )
    expected = {file.path: file for file in manifest.files}
    found = {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()} - {MANIFEST}
    if strange := sorted(found - set(expected)):
        raise BackupError(
            f"{source / strange[0]} is not in the manifest: take it away, or take another backup"
        )
    for path, file in expected.items():
        place = source / path
        if not place.resolve().is_relative_to(source.resolve()):
            raise BackupError(f"the manifest names {path}, which is outside the backup: it is not ours")
        if not place.is_file():
            raise BackupError(f"{place} is missing: take another backup")
        if place.stat().st_size != file.size_bytes or _digest(place) != file.sha256:
            raise BackupError(
                f"{place} is not what was backed up (its checksum differs): take another backup"
            )
    return manifest


def _copy_all(data_dir: Path, partial: Path, clock_ns: Callable[[], int]) -> Manifest | None:
    """None where the journal was trimmed past a sink meanwhile: once more."""
    with contextlib.ExitStack() as stack:
        running = True
        with contextlib.suppress(BackupError):
            stack.enter_context(_alone(data_dir))
            running = False
        remembered: dict[str, int] = {}
        for name in BEFORE:
            _copy_database(data_dir / name, partial / name, running=running)
        if (partial / EMBEDDED).exists():
            remembered["embedded"] = _ask(
                partial / EMBEDDED, "SELECT upto_offset FROM cursors WHERE sink = 'embedded'"
            )
        if (data_dir / ARCHIVE).is_dir():
            _copy_archive(data_dir / ARCHIVE, partial / ARCHIVE)
            remembered["archive"] = _complete_to(partial / ARCHIVE)
        made_at_ns = clock_ns()
        _copy_database(data_dir / JOURNAL, partial / JOURNAL, running=running)
        for name in AFTER:
            _copy_database(data_dir / name, partial / name, running=running)
    journal = partial / JOURNAL
    last = max(
        _ask(journal, "SELECT seq FROM sqlite_sequence WHERE name = 'entry'"),
        _ask(journal, "SELECT max(offset) FROM entry"),
    )
    first = _ask(journal, "SELECT min(offset) FROM entry") or last + 1
    if _behind(remembered, journal, first):
        return None
    files = [
        CopiedFile(str(p.relative_to(partial)), p.stat().st_size, _digest(p))
        for p in sorted(partial.rglob("*"))
        if p.is_file()
    ]
    return Manifest(
        format=FORMAT, version=metadata.version("headgate"), made_at_ns=made_at_ns,
        journal_version=_ask(journal, "PRAGMA user_version"), first_offset=first, last_offset=last,
        remembered=remembered, files=files,
    )  # fmt: skip


def _behind(remembered: dict[str, int], journal: Path, first: int) -> bool:
    """Whether a copied sink lacks what the copied journal no longer holds and had not trimmed before: its cursor, which
    a trim waits for, tells them apart from a sink that had missed it all along."""
    for sink, offset in remembered.items():
        cursor = _ask(journal, f"SELECT offset FROM cursor WHERE sink = '{sink}'")  # noqa: S608 - a name of ours
        if offset < first - 1 and offset < cursor:
            return True
    return False


def _copy_database(source: Path, target: Path, *, running: bool) -> None:
    if not source.exists():
        return
    # Where a server writes, this one only reads, so that it never checkpoints. Without one there may be no WAL's index,
    # and a reader could not make it.
    uri = f"file:{quote(str(source))}?mode={'ro' if running else 'rw'}"
    with (
        contextlib.closing(sqlite3.connect(uri, uri=True, timeout=30.0)) as there,
        contextlib.closing(sqlite3.connect(target)) as here,
    ):
        target.chmod(0o600)
        there.backup(here)  # all pages in one step: one transaction
        here.execute("PRAGMA journal_mode = DELETE")  # one file, complete in itself
        (word,) = here.execute("PRAGMA quick_check(1)").fetchone()
    if word != "ok":
        raise BackupError(f"{source} is damaged ({word}); salvage it before it is backed up")


def _copy_archive(source: Path, target: Path) -> None:
    """Each table's log before its files: what a log entry names was on disk before it, and stays for a week after."""
    logs = [p for p in sorted(source.rglob("_delta_log/*")) if p.is_file()]
    for path in logs:
        _copy_file(path, target / path.relative_to(source))
    for path in sorted(source.rglob("*")):
        if not path.is_file() or "_delta_log" in path.parts:
            continue
        try:
            _copy_file(path, target / path.relative_to(source))
        except FileNotFoundError:  # vacuumed meanwhile: no version of the last week names it
            (target / path.relative_to(source)).unlink(missing_ok=True)


def _complete_to(archive: Path) -> int:
    """The offset up to which every table of the copy is complete."""
    from deltalake import DeltaTable

    from cloud.sinks.archive import APP

    tables = [log.parent for log in archive.glob("*/_delta_log")]
    return min((DeltaTable(str(table)).transaction_version(APP) or 0 for table in tables), default=0)


def _copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    shutil.copyfile(source, target)


def _put_in_place(source: Path, data_dir: Path, manifest: Manifest, *, replace: bool) -> None:
    marker = data_dir / UNFINISHED
    ours = [data_dir / name for name in (*BEFORE, *AFTER, JOURNAL, ARCHIVE)]
    there = [
        p for path in ours for p in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm")))
    ]
    there = [path for path in there if path.exists()]
    if there and not marker.exists():
        if not replace:
            raise BackupError(
                f"{there[0]} is there: an empty data_dir, or --replace to set what is there aside"
            )
        aside = data_dir / time.strftime("before-%Y%m%dT%H%M%SZ", time.gmtime())
        aside.mkdir(mode=0o700)
        marker.touch()
        _sync(data_dir)
        for path in there:
            path.rename(aside / path.name)
    else:  # what a restore that was cut short has left is gone over again
        marker.touch()
        _sync(data_dir)
        for path in there:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for file in manifest.files:
        target = data_dir / file.path
        _copy_file(source / file.path, target)
        target.chmod(0o600)
        if _digest(target) != file.sha256:
            raise BackupError(f"{target}: not what was read; the disk is sick. Run it again on another")
    _sync_tree(data_dir)
    marker.unlink()
    _sync(data_dir)


@contextlib.contextmanager
def _alone(data_dir: Path) -> Iterator[None]:
    """Holds the journal's own lock: no server runs. Raises `BackupError` where one does."""
    fd = os.open(data_dir / "journal.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BackupError(f"a server runs on {data_dir}: stop it first") from None
        yield
    finally:
        os.close(fd)


def _ask(database: Path, query: str) -> int:
    with contextlib.closing(sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True)) as db:
        row = db.execute(query).fetchone()
    return int(row[0] or 0) if row else 0


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() or path.is_dir():
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
