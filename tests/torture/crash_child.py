"""The parts that a quiet plant never reaches, driven until they are: a process to be killed by its failpoint.

`python -m tests.torture.crash_child buffer|archive|journal FOLDER FIRST ...`; each prints what it has been promised, a
line at a time, and only after the promise. `tests/torture/crash_points.py` starts it, and audits what is left.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import struct
import time
from pathlib import Path
from typing import Final

from agent.buffer import Buffer
from agent.clock import SystemClock
from agent.forwarder import Forwarder
from agent.status import LinkHealth
from config.agent import Buffer as BufferSettings
from config.agent import Uplink as UplinkSettings
from sync.uplink import BatchRefused, LinkDown
from sync.wire import Ack, Sealed, open_body
from tests.fakes.buffer import GATEWAY, PACKING, READINGS, number_of, scan

POISON: Final = 97  #: every frame whose number this divides is refused
GROUP: Final = 25
CALLS: Final = 12  #: commits of the archive before it is compacted
PER_CALL: Final = 50


class FileUplink:
    """A cloud that is a file: what is in it was acknowledged, or was about to be."""

    def __init__(self, path: Path, *, refuse: bool) -> None:
        self.name = "file"
        self.up = False
        self._file = path.open("ab")
        self._refuse = refuse

    async def open(self) -> None:
        if not self.up:
            raise LinkDown("down")

    async def send(self, batch: Sealed) -> Ack:
        if not self.up:
            raise LinkDown("down")
        if self._refuse:
            for frame in open_body(batch.payload)[1].frames:
                number = number_of(frame)
                if number is not None and number % POISON == 0:
                    raise BatchRefused("it will not do", "body")
        self._file.write(struct.pack(">I", len(batch.payload)) + batch.payload)
        self._file.flush()
        return Ack(batch.epoch, ((batch.first, batch.last),))

    async def report(self, state: bytes) -> None:
        return None

    async def close(self) -> None:
        return None


async def buffer(told: argparse.Namespace) -> None:
    settings = BufferSettings(commit_interval_s=0.01, max_mb=told.max_mb, free_disk_mb=0)
    held = await Buffer.open(told.folder / "buffer.db", GATEWAY, settings, SystemClock())
    held.register(PACKING.layout)
    uplink = FileUplink(told.folder / "cloud.bin", refuse=told.refuse)
    way = UplinkSettings(kind="none", backoff_min_s=0.05, backoff_max_s=0.05)
    forwarder = Forwarder(held, uplink, way, LinkHealth(), random.Random(1))
    tasks = [asyncio.create_task(held.run()), asyncio.create_task(forwarder.run())]
    number: int = told.first
    while True:
        uplink.up = number >= told.first + told.down
        for _ in range(GROUP):
            held.append(scan(number, boot=held.boot, size=told.size), READINGS)
            number += 1
        if await held.commit():
            print(number - 1, flush=True)
        for task in tasks:
            if task.done():
                task.result()
        await asyncio.sleep(0.1 if uplink.up and told.down else 0)


async def archive(told: argparse.Namespace) -> None:
    from cloud.sinks.archive import ArchiveSink
    from cloud.sinks.contract import ScanRecord
    from config.cloud import Archive

    sink = ArchiveSink(Archive(), told.folder / "archive")
    done = await sink.open() or 0
    while True:
        for call in range(done + 1, done + CALLS + 1):
            now_ns = time.time_ns()
            records = [
                ScanRecord(
                    call, "acme", "plant-1", 1, (call - 1) * PER_CALL + n + 1, PACKING.layout, PACKING.id, now_ns + n,
                    True, now_ns, [n, "x"], {},
                )
                for n in range(PER_CALL)
            ]  # fmt: skip
            await sink.write(records, call)
            print(call, flush=True)
        done += CALLS
        sink._compacted_ns = 0
        await sink.maintain(time.time_ns())


async def journal(told: argparse.Namespace) -> None:
    from cloud.journal.contract import Entry
    from cloud.journal.sqlite import SqliteJournal
    from sync.wire import open_head
    from tests.fakes.batches import batch

    held = SqliteJournal(told.folder / "journal.db", free_disk_bytes=0)
    await held.open()
    first: int = told.first
    while True:
        for _ in range(20):
            payload = batch(first)
            head = open_head(payload)[0]
            entry = Entry(
                head.gateway, head.epoch, head.first, head.last, head.readings, time.time_ns(), payload
            )
            await held.append([entry])
            print(head.last, flush=True)
            first = head.last + 1
        await held.commit("embedded", held.last_offset - 5)
        await held.trim(["embedded"], keep_s=0.0, max_bytes=0)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.torture.crash_child")
    parser.add_argument("what", choices=("buffer", "archive", "journal"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("first", type=int)
    parser.add_argument("--max-mb", type=int, default=64)
    parser.add_argument("--down", type=int, default=0, help="frames before the way is there")
    parser.add_argument("--size", type=int, default=10)
    parser.add_argument("--refuse", action="store_true")
    told = parser.parse_args(argv)
    work = {"buffer": buffer, "archive": archive, "journal": journal}[told.what]
    asyncio.run(work(told))


if __name__ == "__main__":
    main()
