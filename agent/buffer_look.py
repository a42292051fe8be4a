"""What the buffer holds, read beside a running agent or without one: the facts, and lines for a person.

Rules: read-only, short snapshots; what is not known is `null`, never 0; a file that cannot be read is told as such, and
the others are told all the same.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from agent.buffer import Condition
from agent.export import buffer_files
from agent.health import duration_in_words
from agent.salvage import damaged_sets
from agent.status import AgentStatus
from agent.store import frame_head, row_priority
from agent.store_rows import read_clocks
from drivers.contract import Priority
from sync.wire import EventFrame, GapFrame, wall_clock

_MB: Final = 1024 * 1024
LIVE: Final = "buffer.db"
_MOST_GAPS: Final = 1000  #: told one by one, the newest; all are counted


class LookError(Exception):
    """The text says what is not there, and what to do."""


class Waiting(msgspec.Struct, frozen=True):
    """Frames of one priority that wait."""

    priority: Priority
    frames: int
    readings: int


class Gap(msgspec.Struct, frozen=True):
    """A counted loss whose report waits to be sent."""

    reason: str
    priority: str
    device: str
    scans: int
    readings: int
    from_ns: int | None  #: wall clock, as far as it is known
    to_ns: int | None


class Held(msgspec.Struct, kw_only=True):
    """One buffer file: the live one, or one with what was salvaged from a damaged file."""

    file: str
    size_bytes: int
    trouble: str = ""  #: why the rest is not known
    epoch: int | None = None
    next_seq: int | None = None
    kept_readings: int | None = None
    delivered_readings: int | None = None
    gapped_readings: int | None = None
    frames: int | None = None  #: that wait, gaps and events among them
    readings: int | None = None
    oldest_ns: int | None = None  #: wall clock when the oldest was taken, as far as it is known
    priorities: list[Waiting] = []
    gaps: int | None = None  #: reports of losses that wait
    newest_gaps: list[Gap] = []
    recorded_batches: int | None = None
    parked_frames: int | None = None


class Damaged(msgspec.Struct, frozen=True):
    """A damaged file that was set aside and is kept."""

    file: str
    size_bytes: int
    told: str  #: what salvage says of it; "" while it is not done


class Told(msgspec.Struct, kw_only=True):
    """All of it."""

    folder: str
    running: bool | None
    files: list[Held]
    damaged: list[Damaged]
    max_bytes: int | None  #: the cap; as the agent last said
    free_disk_bytes: int | None
    condition: str | None  #: as the running agent says
    detail: str = ""
    drain_eta_s: float | None = None  #: at the recent pace; None: not known
    trouble: list[str] = []


def look(folder: Path) -> tuple[list[Held], list[Damaged]]:
    """Every buffer file in the folder. Raises `LookError` where there is none, or it may not be read."""
    files = buffer_files(folder)
    if not files:
        raise LookError(f"there is no buffer in {folder}: the agent never ran there, or give --state-dir")
    return [_held(path) for path in files], damaged_files(folder)


def damaged_files(folder: Path) -> list[Damaged]:
    """What was set aside, each with its write-ahead log, oldest first."""
    return [Damaged(one.path.name, one.size_bytes, one.told) for one in damaged_sets(folder / LIVE)]


def _size(path: Path, tail: str = "") -> int:
    try:
        return path.with_name(path.name + tail).stat().st_size
    except OSError:
        return 0


def _held(path: Path) -> Held:
    held = Held(file=path.name, size_bytes=_size(path) + _size(path, "-wal"))
    try:
        conn = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5.0, isolation_level=None)
    except sqlite3.Error as err:
        held.trouble = str(err)
        return held
    try:
        conn.execute("BEGIN")  # one snapshot: the numbers are those of one instant
        _read(conn, held)
    except sqlite3.Error as err:
        held.trouble = f"{err}; it is read as far as possible when it is sent"
    finally:
        conn.close()
    return held


def _read(conn: sqlite3.Connection, held: Held) -> None:
    row = conn.execute(
        "SELECT epoch, next_seq, kept_frames, settled_frames, gapped_frames, kept_readings, settled_readings,"
        " gapped_readings FROM ledger"
    ).fetchone()
    if row is None:
        held.trouble = "its ledger is empty"
        return
    held.epoch, held.next_seq = row[0], row[1]
    held.frames = row[2] - row[3] - row[4]
    held.kept_readings, held.delivered_readings, held.gapped_readings = row[5], row[6], row[7]
    held.readings = row[5] - row[6] - row[7]
    held.recorded_batches = conn.execute("SELECT count(*) FROM batches").fetchone()[0]
    held.parked_frames = conn.execute("SELECT count(*) FROM parked").fetchone()[0]
    clocks = wall_clock([row for _, row, _ in read_clocks(conn) if row is not None])

    def wall_ns(boot: int, boot_ns: int) -> int | None:
        clock = clocks.get(boot)
        return None if clock is None else clock.wall_ns + boot_ns - clock.boot_ns

    oldest = conn.execute("SELECT seq, readings, data, crc FROM frames ORDER BY seq LIMIT 1").fetchone()
    if oldest is not None and row_priority(*oldest) is not None:
        match frame_head(oldest[2]):
            case GapFrame() as gap:
                held.oldest_ns = wall_ns(gap.boot, gap.to_boot_ns)
            case EventFrame() as event:
                held.oldest_ns = wall_ns(event.boot, event.at_boot_ns)
            case None:
                pass
            case scan:
                held.oldest_ns = wall_ns(scan.boot, scan.taken_at_ns)
    _by_priority(conn, held)
    _gaps(conn, held, wall_ns)


def _by_priority(conn: sqlite3.Connection, held: Held) -> None:
    """Of the two rare kinds the tables know where they are; the rest is normal, gaps and events among it."""
    rest_frames, rest_readings = held.frames or 0, held.readings or 0
    found: dict[Priority, Waiting] = {}
    for priority, table in ((Priority.ALARM, "alarms"), (Priority.BULK, "bulk")):
        frames, readings = conn.execute(
            f"SELECT count(*), total(f.readings) FROM {table} AS t JOIN frames AS f ON f.seq = t.seq"  # noqa: S608 - two names of ours
        ).fetchone()
        found[priority] = Waiting(priority, frames, int(readings))
        rest_frames -= frames
        rest_readings -= int(readings)
    found[Priority.NORMAL] = Waiting(Priority.NORMAL, max(0, rest_frames), max(0, rest_readings))
    held.priorities = [found[priority] for priority in Priority]


def _gaps(conn: sqlite3.Connection, held: Held, wall_ns: Callable[[int, int], int | None]) -> None:
    held.gaps = conn.execute("SELECT count(*) FROM gaps").fetchone()[0]
    rows = conn.execute(
        "SELECT f.seq, f.readings, f.data, f.crc FROM gaps AS t JOIN frames AS f ON f.seq = t.seq"
        " ORDER BY t.seq DESC LIMIT ?",
        (_MOST_GAPS,),
    )
    for row in rows:
        gap = frame_head(row[2])
        if isinstance(gap, GapFrame) and row_priority(*row) is not None:
            held.newest_gaps.append(
                Gap(
                    gap.reason, gap.priority, gap.device, gap.scans, gap.readings,
                    wall_ns(gap.boot, gap.from_boot_ns), wall_ns(gap.boot, gap.to_boot_ns),
                )
            )  # fmt: skip


def account(
    folder: Path,
    files: Sequence[Held],
    damaged: Sequence[Damaged],
    status: AgentStatus | None,
    *,
    running: bool | None,
) -> Told:
    """With what the agent says of itself (`status`: its last word)."""
    buffer = status.buffer if status is not None else None
    live = buffer if running else None
    told = Told(
        folder=str(folder),
        running=running,
        files=list(files),
        damaged=list(damaged),
        max_bytes=buffer.max_bytes if buffer else None,
        free_disk_bytes=status.disk_free_bytes or None if status is not None else None,
        condition=live.condition.value if live else None,
        detail=live.detail if live else "",
        drain_eta_s=status.drain_eta_s if status is not None and running else None,
    )
    told.trouble += [f"{held.file}: {held.trouble}" for held in files if held.trouble]
    if live is not None and live.condition is not Condition.OK:
        told.trouble.append(f"{live.condition.value}: {live.detail}" if live.detail else live.condition.value)
    return told


def lines(told: Told, now_ns: int) -> list[str]:
    """For a person."""
    out: list[str] = []
    for held in told.files:
        cap = f" of {told.max_bytes / _MB:,.0f} MB" if told.max_bytes and held.file == LIVE else ""
        out.append(
            f"{held.file}  {held.size_bytes / _MB:,.1f}{cap or ' MB'} on disk, epoch {_known(held.epoch)}"
        )
        if held.readings is None:
            continue
        oldest = ""
        if held.frames and held.oldest_ns is not None:
            oldest = f", the oldest {duration_in_words(max(0, now_ns - held.oldest_ns) / 1e9)} old"
        out.append(f"  waiting    {held.readings:,} readings in {held.frames or 0:,} frames{oldest}")
        out += [
            f"    {waiting.priority.value:<8} {waiting.readings:,} readings in {waiting.frames:,} frames"
            for waiting in held.priorities
            if waiting.frames
        ]
        if held.file == LIVE and told.running:
            out.append(f"  delivered  {_eta(told.drain_eta_s)}")
        out.append(
            f"  account    kept {held.kept_readings:,} = delivered {held.delivered_readings:,} + in gaps "
            f"{held.gapped_readings:,} + waiting {held.readings:,}"
        )
        if held.parked_frames:
            out.append(f"  parked     {held.parked_frames:,} frames that the cloud refused")
        if held.gaps:
            out.append(f"  gaps       {held.gaps:,} reports wait to be sent; the newest:")
        out += [f"    {_gap(gap)}" for gap in held.newest_gaps[:5]]
    for one in told.damaged:
        what = one.told or "what is good in it is being brought back"
        out.append(f"{one.file}  {one.size_bytes / _MB:,.1f} MB, damaged: {what}")
    if any(one.told for one in told.damaged):
        out.append("  nobody needs what was brought back any more: headgate buffer drop-damaged")
    return out + [f"! {text}" for text in told.trouble]


def _known(number: int | None) -> str:
    return "unknown" if number is None else str(number)


def _eta(eta_s: float | None) -> str:
    if eta_s is None:
        return "when, nobody can say yet: too little has gone out lately, or more comes in than goes out"
    return "as it comes" if eta_s == 0 else f"in about {duration_in_words(eta_s)} at the recent pace"


def _gap(gap: Gap) -> str:
    when = "at a time unknown"
    if gap.from_ns is not None and gap.to_ns is not None:
        first, last = (
            time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(ns / 1e9)) for ns in (gap.from_ns, gap.to_ns)
        )
        when = f"{first} to {last} UTC"
    what = f"{gap.readings:,} readings in {gap.scans:,} scans"
    of = " ".join(word for word in (gap.priority, gap.device) if word)
    return f"{gap.reason}: {what}{f' of {of}' if of else ''}, {when}"
