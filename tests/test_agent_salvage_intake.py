"""A damaged buffer delivered through the real intake into the real journal: what the cloud has is not doubled, what it
lacks arrives under its own epoch and seqs, and each of both is what the gateway took."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.buffer import Buffer
from agent.salvage import damaged_sets
from agent.store import PAGE_BYTES
from cloud.sinks.contract import GapRecord, ScanRecord
from config.agent import Buffer as BufferSettings
from sync.wire import open_body
from tests.fakes.buffer import GATEWAY, PACKING, READINGS, StillClock, scan
from tests.fakes.whole_path import Received, receiving, send_all

SCANS = 6_000
SETTINGS = BufferSettings(commit_interval_s=0.05, ballast_kb=0, free_disk_mb=0)
Key = tuple[int, int]


async def open_buffer(folder: Path) -> Buffer:
    buffer = await Buffer.open(folder / "buffer.db", GATEWAY, SETTINGS, StillClock())
    buffer.register(PACKING.layout)
    return buffer


async def before_the_damage(folder: Path, cloud: Received) -> tuple[int, dict[Key, bytes]]:
    """A buffer of which the cloud has two batches, one of them never acked, as the gateway sees it; its epoch, and
    every frame by its identity."""
    buffer = await open_buffer(folder)
    for n in range(SCANS):
        assert buffer.append(scan(n, boot=buffer.boot, size=100), READINGS)
        if n % 500 == 499:
            await buffer.commit()
    with contextlib.closing(sqlite3.connect(folder / "buffer.db")) as conn:
        frames = {(buffer.epoch, seq): bytes(d) for seq, d in conn.execute("SELECT seq, data FROM frames")}
    first, second, *_ = await buffer.claim(3)  # the third was claimed and never arrived
    buffer.settle(await cloud.take(first))
    await buffer.commit()
    await cloud.take(second)
    await buffer.close()
    return buffer.epoch, frames


def zero(path: Path, *, at: int, size: int) -> None:
    with contextlib.closing(sqlite3.connect(path)) as conn:
        conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes(size))


def header(path: Path) -> None:
    zero(path, at=0, size=100)


def some_pages(path: Path) -> None:
    zero(path, at=0, size=100)
    pages = path.stat().st_size // PAGE_BYTES
    for number in (pages // 2, pages * 2 // 3, pages - 5):
        with path.open("r+b") as file:
            file.seek(number * PAGE_BYTES)
            file.write(bytes(PAGE_BYTES))


async def deliver(folder: Path, buffer: Buffer, cloud: Received, within_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        sent = await send_all(buffer, cloud)
        sets = damaged_sets(folder / "buffer.db")
        told = sets and all(one.told for one in sets) and not buffer.state.old
        if told and not sent and not buffer.state.buffered_frames:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"not all came: {buffer.state}")


@pytest.mark.parametrize(("hurt", "may_lose"), [(header, 0), (some_pages, 200)], ids=["header", "pages"])
async def test_a_salvaged_buffer_arrives_in_the_journal_once_and_as_it_was(
    tmp_path: Path, hurt: Callable[[Path], None], may_lose: int
) -> None:
    async with receiving(tmp_path, GATEWAY) as cloud:
        epoch, before = await before_the_damage(tmp_path, cloud)
        held_before = {
            (s.epoch, seq) for s in await cloud.stored() for a, b in s.fresh for seq in range(a, b + 1)
        }
        hurt(tmp_path / "buffer.db")
        buffer = await open_buffer(tmp_path)
        task = asyncio.create_task(buffer.run())
        try:
            assert buffer.epoch != epoch
            assert buffer.append(scan(SCANS, boot=buffer.boot), READINGS)
            await deliver(tmp_path, buffer, cloud)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await buffer.close()

        journal: dict[Key, bytes] = {}
        for stored in await cloud.stored():
            _, body = open_body(stored.payload)
            for a, b in stored.fresh:
                for seq in range(a, b + 1):
                    assert (stored.epoch, seq) not in journal, f"seq {seq} is in the journal twice"
                    journal[stored.epoch, seq] = bytes(body.frames[seq - stored.first])
        old = {key: frame for key, frame in journal.items() if key[0] == epoch}
        assert held_before <= set(old)
        new = {key for key in old if key not in before}  # what salvage itself has to say, behind all that was
        assert all(old[key][1:2] == b"\x01" and key > max(before) for key in new)
        assert {key: frame for key, frame in old.items() if key not in new and before[key] != frame} == {}

        records = await cloud.records()
        numbers = [r.values[0] for r in records if isinstance(r, ScanRecord)]
        assert len(numbers) == len(set(numbers)), "a reading is there twice"
        assert SCANS in numbers
        lost = set(before) - set(old)
        assert len(lost) <= may_lose
        told = [r.gap for r in records if isinstance(r, GapRecord) and r.gap.epoch == epoch]
        assert {(epoch, s) for gap in told for s in range(gap.first, gap.last + 1)} >= lost
        extra = sum((epoch, s) in old for gap in told for s in range(gap.first, gap.last + 1))
        assert sum(gap.readings for gap in told) == (len(lost) + extra) * READINGS
        # What the cloud had and the salvage could not know of (the ack was lost) came again, and was known for old.
        [count] = await cloud.journal.counts()
        assert count.frames_duplicate > 0
        assert count.readings_stored == len(numbers) * READINGS
