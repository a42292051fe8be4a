"""A gateway's buffer and the cloud's real intake and journal, without a network between them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from agent.buffer import Buffer
from agent.store import Batch
from cloud.decode import Decoder
from cloud.intake import Arrival, Intake
from cloud.journal.contract import Stored
from cloud.journal.sqlite import SqliteJournal
from cloud.metrics import Metrics
from cloud.sinks.contract import Record
from sync.identity import GatewayName
from sync.wire import Ack


class Received:
    """What the cloud durably holds."""

    def __init__(self, journal: SqliteJournal, gateway: GatewayName) -> None:
        self.journal = journal
        self.intake = Intake(journal, journal, Metrics())
        self.gateway = gateway
        self.duplicates = 0

    async def take(self, batch: Batch) -> Ack:
        [verdict] = await self.intake.accept(
            [Arrival(str(self.gateway), batch.sealed.payload, 0.0)], door="http"
        )
        assert isinstance(verdict.reply, Ack), verdict.reply
        self.duplicates += verdict.duplicate
        return verdict.reply

    async def stored(self) -> list[Stored]:
        """All entries, as a sink reads them."""
        entries: list[Stored] = []
        while more := await self.journal.read(
            entries[-1].offset if entries else 0, max_entries=256, max_bytes=16 * 2**20
        ):
            entries += more
        return entries

    async def records(self) -> list[Record]:
        """What the runner would give to a sink."""
        decoder = Decoder()
        records: list[Record] = []
        for entry in await self.stored():
            decoded = decoder.decode(entry)
            assert not decoded.poison, decoded.poison
            records += decoded.records
        return records


@contextlib.asynccontextmanager
async def receiving(folder: Path, gateway: GatewayName) -> AsyncIterator[Received]:
    journal = SqliteJournal(folder / "journal.db", free_disk_bytes=0)
    await journal.open()
    try:
        yield Received(journal, gateway)
    finally:
        await journal.close()


async def send_all(buffer: Buffer, cloud: Received) -> int:
    """What is recorded and what can be claimed, once; how many batches that were."""
    batches = [batch for one in buffer.recorded() for batch in await buffer.rebuild(one)]
    batches += await buffer.claim(8)
    for batch in batches:
        buffer.settle(await cloud.take(batch))
    await buffer.commit()
    await asyncio.sleep(0)
    return len(batches)
