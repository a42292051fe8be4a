"""What waits in the buffer as a file, for a gateway whose way to the cloud is a person with a stick.

Rules:
1. Nothing is taken out of the buffer: what is exported is still sent when there is a way, and the cloud dedupes by
   (gateway, epoch, seq). The agent may run meanwhile; no read holds a snapshot for longer than one batch.
2. Every row's CRC is checked; a row that fails is left out and counted, never exported.
3. The file appears under its name only when it is whole and on the medium (written aside, synced, renamed).
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec
import zstandard

from agent.store import BATCH_BYTES, frame_head, row_priority
from agent.store_rows import read_clocks
from sync.wire import (
    MAX_FRAMES,
    ZSTD_LEVEL,
    ClockRow,
    ExportHead,
    ExportWriter,
    Layout,
    Sealed,
    WireError,
    seal,
    wall_clock,
)

_FRAME_OVERHEAD: Final = 16  #: as in the buffer's own batches
_decode_layout = msgspec.msgpack.Decoder(Layout).decode


class ExportError(Exception):
    """The text says what failed and what to do."""


class Exported(msgspec.Struct):
    """What went into the file."""

    file: str
    gateway: str
    epochs: list[int] = []
    batches: int = 0
    frames: int = 0
    readings: int = 0
    damaged_rows: int = 0  #: left out: the agent reports them as a gap when it comes to them
    bytes: int = 0


def buffer_files(folder: Path) -> list[Path]:
    """The buffer's file and those with salvaged rows, the live one last: all that the agent would send."""
    live = folder / "buffer.db"
    salvaged = [
        path
        for path in sorted(folder.glob("buffer.db.salvaged-*"))
        if not path.name.endswith(("-wal", "-shm"))
    ]
    return [*salvaged, *([live] if live.exists() else [])]


def export(folder: Path, target: Path, gateway: str, agent: str, made_ns: int) -> Exported:
    """Write all that waits in `folder` into `target`. Raises `ExportError`; then there is no `target`."""
    files = buffer_files(folder)
    if not files:
        raise ExportError(f"there is no buffer in {folder}: the agent never ran there, or give --state-dir")
    if target.exists():
        raise ExportError(f"{target} exists already: give another name")
    told = Exported(str(target), gateway)
    writer = ExportWriter(ExportHead(gateway, made_ns, agent))
    aside = target.with_name(target.name + ".part")
    try:
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(writer.start)
                for path in files:
                    for sealed in _batches(path, gateway, told):
                        file.write(writer.record(sealed.payload))
                file.write(writer.end())
                file.flush()
                os.fsync(file.fileno())
                told.bytes = file.tell()
            aside.rename(target)
            _sync_folder(target.parent)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
    except OSError as err:
        raise ExportError(
            f"{target} cannot be written: {err.strerror}; nothing was taken out of the buffer"
        ) from err
    except sqlite3.Error as err:
        raise ExportError(f"the buffer in {folder} cannot be read: {err}") from err
    told.batches = writer.batches
    return told


def _sync_folder(folder: Path) -> None:
    """So that the name, too, outlives a stick that is pulled out. Not every file system can (vfat)."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class _Run(msgspec.Struct):
    """Frames without a hole, as many as fit a batch."""

    first: int = 0
    readings: int = 0
    frames: list[bytes] = []
    layouts: list[int] = []
    boots: set[int] = set()
    damaged: int = 0  #: rows passed over in front of it
    cursor: int = 0  #: all up to here is done


def _batches(path: Path, gateway: str, told: Exported) -> Iterator[Sealed]:
    conn = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5.0, isolation_level=None)
    try:
        row = conn.execute("SELECT epoch FROM ledger").fetchone()
        if row is None:
            raise sqlite3.DatabaseError(f"{path.name}: its ledger is empty")
        epoch: int = row[0]
        told.epochs.append(epoch)
        compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
        layouts: dict[int, bytes] = {}
        run = _Run()
        while True:
            run = _next(conn, run.cursor, layouts)
            if any(key not in layouts for key in run.layouts):  # made since, or this is the first run
                after = run.first - 1
                layouts = {
                    int.from_bytes(key, "big"): data
                    for key, data in conn.execute("SELECT id, data FROM layouts")
                }
                damaged, run = run.damaged, _next(conn, after, layouts)  # now with room for them
                run.damaged += damaged
            told.damaged_rows += run.damaged
            if not run.frames:
                if not run.damaged:
                    return
                continue
            known = [_decode_layout(layouts[key]) for key in run.layouts if key in layouts]
            try:
                sealed = seal(
                    gateway, epoch, run.first, run.frames, known, _clocks(conn, run.boots), run.readings,
                    compressor=compressor,
                )  # fmt: skip
            except WireError as err:  # frames and layouts are bounded where they enter
                raise ExportError(f"frames from {run.first} on cannot be sealed: {err}") from err
            told.frames += len(run.frames)
            told.readings += run.readings
            yield sealed
    finally:
        conn.close()


def _next(conn: sqlite3.Connection, after: int, layouts: Mapping[int, bytes]) -> _Run:
    run = _Run(cursor=after)
    size = 0
    rows = conn.execute(
        "SELECT seq, readings, crc, data FROM frames WHERE seq > ? ORDER BY seq LIMIT ?", (after, MAX_FRAMES)
    )
    try:
        for seq, readings, crc, data in rows:
            if row_priority(seq, readings, data, crc) is None:
                if run.frames:
                    break
                run.damaged += 1
                run.cursor = seq
                continue
            if run.frames and seq != run.first + len(run.frames):
                break
            head = frame_head(data)
            layout = getattr(head, "layout", None)
            size += len(data) + _FRAME_OVERHEAD
            if layout is not None and layout not in run.layouts:
                size += len(layouts.get(layout, b""))
            if run.frames and size > BATCH_BYTES:
                break
            if layout is not None and layout not in run.layouts:
                run.layouts.append(layout)
            if head is not None:
                run.boots.add(head.boot)
            run.first = run.first or seq
            run.frames.append(data)
            run.readings += readings
            run.cursor = seq
    finally:
        rows.close()  # no read holds a snapshot longer than it must
    return run


def _clocks(conn: sqlite3.Connection, boots: Collection[int]) -> list[ClockRow]:
    """As they are known now: later than when the frames were taken, so at least as good."""
    rows = [row for _, row, _ in read_clocks(conn) if row is not None]
    best = wall_clock(rows)
    return [best[boot] for boot in sorted(boots) if boot in best]
