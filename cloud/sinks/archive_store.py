"""Where the archive's files are: a folder on this machine, or a bucket (`cloud/sinks/minio.py`).

A folder keeps what it was told, through a power cut: a data file is on disk before the log entry that names it is
written, and both before the sink's cursor moves (`settle`). What a power cut tore between these is found when the
table is opened and set aside, never deleted; the journal still has its readings (`mend`).
"""

from __future__ import annotations

import logging
import os
import re
import secrets
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import unquote

import msgspec

from config.failpoint import reached

log = logging.getLogger(__name__)

LOG_FOLDER: Final = "_delta_log"
_ENTRY: Final = re.compile(r"(\d{20})\.json")
_CHECKPOINT: Final = re.compile(r"(\d{20})\.checkpoint.*\.parquet")
_PARQUET: Final = b"PAR1"  #: first and last four bytes (Apache Parquet, file format)
MENDED_ENTRIES: Final = (
    8  #: newest log entries looked at; every older one was on disk before the next was begun
)


class Store(Protocol):
    """What the archive needs of the place where it is. Every call blocks; all raise `OSError` or a `SinkError`."""

    def address(self, table: str) -> str:
        """As deltalake takes it."""

    @property
    def options(self) -> dict[str, str] | None:
        """deltalake's storage options."""

    def put(self, table: str, path: str, data: memoryview) -> None:
        """A new file of the table, durable when this returns."""

    def has(self, table: str, path: str) -> bool:
        """Whether the table has this file."""

    def settle(self, table: str) -> None:
        """Makes durable what deltalake has written since the last call."""

    def mend(self, table: str) -> None:
        """Called before the table is opened."""


class FolderStore:
    """A local folder, one sub-folder per table."""

    options: dict[str, str] | None = None

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._settled: dict[str, set[str]] = {}
        self._durable: set[Path] = set()  # put and synced since the last `settle`

    def address(self, table: str) -> str:
        return str(self._folder / table)

    def put(self, table: str, path: str, data: memoryview) -> None:
        target = self._folder / table / path
        made = _make_folders(target.parent, self._folder)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            reached("archive_store.before_rename")
            temporary.rename(target)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)
        for folder in made:
            _sync_folder(folder)
        self._durable.add(target)

    def has(self, table: str, path: str) -> bool:
        return (self._folder / table / path).exists()

    def settle(self, table: str) -> None:
        """Syncs the log's new entries, the files that they name, and the folders of both."""
        root = self._folder / table
        folder = root / LOG_FOLDER
        if not folder.is_dir():
            return
        known = self._settled.get(table)
        names = {one.name for one in folder.iterdir()}
        new = names - known if known is not None else _newest(names)
        if not new:
            return
        folders = {folder} if known is not None else {folder, root, self._folder}
        for name in sorted(new):
            entry = folder / name
            if not entry.is_file():
                continue
            if _ENTRY.fullmatch(name):
                for action in _actions(entry):
                    if action.add:
                        file = root / unquote(action.add.path)
                        if file not in self._durable:
                            _sync_file(file)
                            folders.add(file.parent)
            _sync_file(entry)
        for one in folders:
            _sync_folder(one)
        # `_last_checkpoint` is written anew each time; that it is torn only costs a listing (Delta protocol)
        self._settled[table] = names - {"_last_checkpoint"}
        self._durable.clear()

    def mend(self, table: str) -> None:
        self._settled.pop(table, None)
        root = self._folder / table
        folder = root / LOG_FOLDER
        if not folder.is_dir():
            return
        names = sorted((one.name for one in folder.iterdir()), reverse=True)
        checkpoints = [name for name in names if _CHECKPOINT.fullmatch(name)]
        entries = [name for name in names if _ENTRY.fullmatch(name)]
        for name in checkpoints:
            if not _whole_parquet(folder / name, None):
                self._set_aside(folder / name, "a torn checkpoint")
        removed: set[str] = set()
        for at, name in enumerate(entries[:MENDED_ENTRIES]):
            why = _torn(root, folder / name, removed)
            if why:
                # It is newer than what any cursor says, or it would have been synced; so is all that follows it.
                later = [one for one in checkpoints if one[:20] >= name[:20]]
                for one in (*entries[: at + 1], *later):
                    self._set_aside(folder / one, why)

    @staticmethod
    def _set_aside(file: Path, why: str) -> None:
        if not file.exists():
            return
        target = file.with_name(f"{file.name}.torn-{secrets.token_hex(4)}")
        log.error(
            "archive: %s is %s; set aside as %s, and written again from the journal", file, why, target.name
        )
        file.rename(target)
        if _CHECKPOINT.fullmatch(file.name):
            file.with_name("_last_checkpoint").unlink(missing_ok=True)
        _sync_folder(file.parent)


def _newest(names: set[str]) -> set[str]:
    entries = sorted(name for name in names if _ENTRY.fullmatch(name))
    return set(entries[-MENDED_ENTRIES:]) | {name for name in names if not _ENTRY.fullmatch(name)}


def _torn(root: Path, entry: Path, removed: set[str]) -> str:
    """Why a log entry cannot be what was written; "" where it can. `removed`: files that newer entries let go."""
    try:
        actions = _actions(entry)
    except ValueError:
        return "a torn entry of the log"
    for action in actions:
        if action.add and action.add.path not in removed:
            path = unquote(action.add.path)
            if not _whole_parquet(root / path, action.add.size):
                return f"an entry of the log that names {path}, which is torn"
    removed.update(action.remove.path for action in actions if action.remove)
    return ""


class _File(msgspec.Struct):
    path: str
    size: int = 0


class _Action(msgspec.Struct):
    """What matters here of a line of Delta's log (Delta protocol, actions)."""

    add: _File | None = None
    remove: _File | None = None


def _actions(entry: Path) -> list[_Action]:
    """Raises `ValueError` where the entry does not parse."""
    lines = entry.read_bytes().splitlines()
    if not lines:
        raise ValueError("empty")
    return [msgspec.json.decode(line, type=_Action) for line in lines]  # DecodeError is a ValueError


def _whole_parquet(file: Path, size: int | None) -> bool:
    try:
        actual = file.stat().st_size
        if actual < 12 or (size is not None and actual != size):
            return False
        with file.open("rb") as opened:
            head = opened.read(4)
            opened.seek(-4, os.SEEK_END)
            return head == _PARQUET and opened.read(4) == _PARQUET
    except FileNotFoundError:
        return False


def _make_folders(folder: Path, root: Path) -> list[Path]:
    """Makes `folder`; returns the parents of what was made, which must be synced for it to stay."""
    made: list[Path] = []
    one = folder
    while one != root and not one.exists():
        made.append(one.parent)
        one = one.parent
    folder.mkdir(parents=True, exist_ok=True)
    return made


def _sync_file(file: Path) -> None:
    try:
        number = os.open(file, os.O_RDONLY)
    except FileNotFoundError:  # compacted and vacuumed since
        return
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _sync_folder(folder: Path) -> None:
    _sync_file(folder)
