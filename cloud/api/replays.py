"""`headgate-cloud replay`: a sink gets again what the cloud has received, from the archive and the journal.

Rules:
1. What the journal still holds comes from it, by sending the sink's cursor back; what came before that, from the
   archive. The archive itself is filled from the journal only.
2. Writing again changes nothing, so more may be given than was asked for, and a replay may be repeated at will.
3. Scans that were sent before their gateway's clock was synchronized get their right time, where a later batch of the
   same boot told it (`cloud.clocks`); the rows with the estimate are removed from the sink.
4. `from` and `to` are when the cloud received it: a reading is never received before it is taken, so `from` covers all
   that was taken since.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from cloud.api.models import SinkReplay, SinkReplayRequest
from cloud.api.times import iso
from cloud.clocks import Boot, Clocks, Force, widened
from cloud.decode import readings_in
from cloud.journal.contract import EntryDamaged, Journal
from cloud.runner import SinkRunner
from cloud.sinks.contract import Record, RetryLater, ScanRecord, SinkError
from config.cloud import Cloud
from sync.wire import ClockRow

if TYPE_CHECKING:
    from cloud.sinks.archive_reader import ArchiveReader

log = logging.getLogger(__name__)

LOOK_S: Final = 0.2  #: how often the sink is looked at while it catches up
GIVEN_TRIES: Final = 20  #: a sink that asks for patience so often takes nothing now
MAX_NS: Final = 2**63 - 1


class ReplayError(Exception):
    """It cannot be done; the text says what to change."""


class ReplayLater(ReplayError):
    """The same again later."""


async def offset_before(journal: Journal, at_ns: int) -> int:
    """The offset after which everything was received at or after `at_ns`."""
    state = await journal.state()
    low, high = state.first_offset - 1, state.last_offset
    while low < high:
        middle = (low + high) // 2
        try:
            entries = await journal.read(middle, max_entries=1, max_bytes=1)
        except EntryDamaged:
            # Nothing is known of when it came: on the safe side, it is given again.
            high = middle
            continue
        if not entries or entries[0].received_at_ns >= at_ns:
            high = middle
        else:
            low = entries[0].offset
    return low


async def replay_sink(
    asked: SinkReplayRequest,
    config: Cloud,
    journal: Journal,
    clocks: Clocks,
    runners: Sequence[SinkRunner],
) -> SinkReplay:
    """Raises `ReplayError`, `ReplayLater`, `JournalError`."""
    runner = next((one for one in runners if one.sink.name == asked.sink), None)
    if runner is None:
        names = ", ".join(one.sink.name for one in runners) or "none"
        raise ReplayError(f"sink {asked.sink!r} is not running here; there is {names}")
    started_s = time.monotonic()
    to_ns = asked.to_ns or MAX_NS
    if asked.from_ns >= to_ns:
        raise ReplayError("--from is not before --to")
    state = await journal.state()
    oldest_ns = state.oldest_received_at_ns if state.oldest_received_at_ns is not None else MAX_NS
    archived: _Given = _Given()
    note = ""
    try:
        if asked.from_ns < oldest_ns and state.first_offset > 1:
            upto_ns = min(to_ns, oldest_ns + 1000)  # the archive's times are whole microseconds
            if asked.sink == "archive":
                note = f"the archive is filled from the journal, which begins at {iso(oldest_ns)}"
            elif not config.archive.enabled:
                note = (
                    f"the journal begins at {iso(oldest_ns)}, and there is no archive to take the rest from"
                )
            else:
                reader = _reader(config)
                archived = await _from_archive(
                    reader, runner, clocks, asked.from_ns, upto_ns, asked.gateway, dry_run=asked.dry_run
                )
        start = await offset_before(journal, asked.from_ns)
        sent = await runner.send_back(start, gateway=asked.gateway, to_ns=to_ns, dry_run=asked.dry_run)
    except RetryLater as err:
        raise ReplayLater(str(err)) from err
    except SinkError as err:
        raise ReplayLater(f"sink {asked.sink}: {err}") from err
    if not asked.dry_run:
        log.info("replay of sink %s: %d readings from the archive, %d from the journal, %d with a better time",
                 asked.sink, archived.readings, sent.readings,
                 archived.corrected + sent.corrected_readings)  # fmt: skip
        await _through(runner, sent.upto, asked.wait_s)
    return SinkReplay(
        sink=asked.sink,
        dry_run=asked.dry_run,
        journal_batches=sent.batches,
        journal_readings=sent.readings,
        archive_readings=archived.readings,
        corrected_readings=archived.corrected + sent.corrected_readings,
        left=max(0, sent.upto - runner.position),
        took_s=round(time.monotonic() - started_s, 3),
        note=note,
    )


async def _through(runner: SinkRunner, upto: int, wait_s: float) -> None:
    """Until the sink is where it was, or time is up: it goes on by itself."""
    deadline_s = time.monotonic() + wait_s
    while runner.position < upto and time.monotonic() < deadline_s:  # noqa: ASYNC110 - a position is all it tells
        await asyncio.sleep(LOOK_S)


# --- from the archive ---


class _Given(msgspec.Struct):
    readings: int = 0
    corrected: int = 0


def _reader(config: Cloud) -> ArchiveReader:
    from cloud.sinks.archive_reader import ArchiveReader

    return ArchiveReader(config.archive, Path(config.server.data_dir) / "archive")


async def _from_archive(
    reader: ArchiveReader,
    runner: SinkRunner,
    clocks: Clocks,
    from_ns: int,
    to_ns: int,
    gateway: str | None,
    *,
    dry_run: bool,
) -> _Given:
    given = _Given()
    held = clocks.in_force(
        runner.sink.name
    )  # what its store was written with; a scan may come in several parts
    forces: dict[Boot, Force] = {}
    async for page in reader.records(from_ns, to_ns, gateway=gateway):
        old: list[Record] = []
        new: list[Record] = []
        for record in page:
            given.readings += readings_in(record)
            boot = _boot(record)
            best = clocks.best(boot) if boot is not None else None
            if boot is None or best is None or not isinstance(record, ScanRecord):
                new.append(record)
                continue
            better = _timed(record, best)
            there = held.get(boot)
            was = _timed(record, there.row) if there is not None and there.covers(record.seq) else record
            if was.taken_at_ns != better.taken_at_ns:
                old.append(was)
                given.corrected += readings_in(record)
            new.append(better)
            forces[boot] = widened(forces.get(boot) or there, best, [(record.seq, record.seq)])
        if not dry_run:
            await _give(runner, old, new, {})
    if not dry_run:
        await _give(runner, (), (), forces)
    return given


def _boot(record: Record) -> Boot | None:
    """The boot of a scan whose time is an estimate and may be bettered."""
    if not isinstance(record, ScanRecord) or record.clock_synchronized or not record.boot_ns:
        return None
    return f"{record.tenant}/{record.gateway}", record.epoch, record.boot


def _timed(record: ScanRecord, row: ClockRow) -> ScanRecord:
    return msgspec.structs.replace(
        record,
        taken_at_ns=row.wall_ns + record.boot_ns - row.boot_ns,
        clock_synchronized=True,
        earliest_ns=0,
        latest_ns=0,
    )


async def _give(
    runner: SinkRunner, old: Sequence[Record], new: Sequence[Record], forces: Mapping[Boot, Force]
) -> None:
    """Raises `SinkError` where the sink takes nothing for a while; the same replay again goes on from there."""
    for tries in range(GIVEN_TRIES):
        try:
            await runner.give(old, new, forces)
        except RetryLater as err:
            if tries == GIVEN_TRIES - 1:
                raise
            await asyncio.sleep(min(err.after_s or LOOK_S, 5.0))
        else:
            return
