"""Questions to the archive, beside the sink that writes it: a reader has its own handle and sees whole commits.

Calls block; they run in a thread. `DeltaTable.scan` is not used (see `archive.py`, rule 5).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from cloud.sinks.archive_store import FolderStore, Store
from config.cloud import Archive

if TYPE_CHECKING:
    import pyarrow as pa
    from deltalake import DeltaTable

BATCH_ROWS: Final = 2_000
SCAN_ROWS: Final = 1 << 15  #: with little read ahead: pyarrow's own choice holds hundreds of MB
NS_PER_DAY: Final = 86_400_000_000_000


class Row(msgspec.Struct, frozen=True):
    """One row of `readings`, as far as it is asked for."""

    device: str
    point: str
    unit: str
    type: str
    taken_at_ns: int
    value: float | None
    text: str | None
    quality: str
    reason: str | None
    clock_synchronized: bool
    received_at_us: int


class ArchiveReader:
    """Built from the same settings as the sink; opens a table when asked."""

    def __init__(self, settings: Archive, folder: Path) -> None:
        """Raises `SinkBroken` for an address or credentials that cannot work."""
        self._store: Store
        if settings.endpoint:
            from cloud.sinks.minio import Bucket

            self._store = Bucket(settings)
        else:
            self._store = FolderStore(folder)

    async def tally(self, before_ns: int | None = None) -> dict[str, int]:
        """Readings by `<tenant>/<gateway>`, counted row by row; those taken before an instant, where one is given.
        Raises `RetryLater`, `SinkBroken`."""
        return await asyncio.to_thread(self._tally, before_ns)

    async def readings(
        self, tenant: str, gateway: str, *, device: str | None, point: str | None, from_ns: int, to_ns: int
    ) -> AsyncIterator[list[Row]]:
        """Readings with from_ns <= taken_at_ns < to_ns, in pages, file by file. Raises as `tally` does."""
        pages = self._pages(tenant, gateway, device, point, from_ns, to_ns)
        while True:
            page = await asyncio.to_thread(next, pages, None)
            if page is None:
                return
            yield page

    # --- in a thread ---

    def _table(self) -> DeltaTable | None:
        from deltalake import DeltaTable
        from deltalake.exceptions import TableNotFoundError

        try:
            return DeltaTable(self._store.address("readings"), storage_options=self._store.options)
        except TableNotFoundError:
            return None

    def _tally(self, before_ns: int | None) -> dict[str, int]:
        import pyarrow as pa
        import pyarrow.dataset as ds

        from cloud.sinks.archive import date_of, foreign

        wanted = None
        if before_ns is not None:
            last_day = date_of(before_ns // NS_PER_DAY)
            wanted = (ds.field("day") <= last_day) & (ds.field("taken_at_ns") < before_ns)
        counted: Counter[str] = Counter()
        with foreign(self._store.address("readings")):
            table = self._table()
            if table is None:
                return {}
            scanner = table.to_pyarrow_dataset().scanner(
                columns=["tenant", "gateway"],
                filter=wanted,
                batch_size=SCAN_ROWS,
                batch_readahead=2,
                fragment_readahead=1,
            )
            for batch in scanner.to_batches():
                rows = (
                    pa.Table.from_batches([batch])
                    .group_by(["tenant", "gateway"])
                    .aggregate([([], "count_all")])
                )
                for row in rows.to_pylist():
                    counted[f"{row['tenant']}/{row['gateway']}"] += row["count_all"]
        return dict(counted)

    def _pages(
        self, tenant: str, gateway: str, device: str | None, point: str | None, from_ns: int, to_ns: int
    ) -> Iterator[list[Row]]:
        import pyarrow as pa
        import pyarrow.dataset as ds

        from cloud.sinks.archive import date_of, foreign

        wanted = (
            (ds.field("tenant") == tenant)
            & (ds.field("gateway") == gateway)
            & (ds.field("taken_at_ns") >= from_ns)
            & (ds.field("taken_at_ns") < to_ns)
        )
        if from_ns > 0:
            wanted &= ds.field("day") >= date_of(from_ns // NS_PER_DAY)
        if to_ns < 2**63 - 1:
            wanted &= ds.field("day") <= date_of(to_ns // NS_PER_DAY)
        if device is not None:
            wanted &= ds.field("device") == device
        if point is not None:
            wanted &= ds.field("point") == point
        columns = {name: ds.field(name) for name in Row.__struct_fields__ if name != "received_at_us"}
        columns["received_at_us"] = ds.field("received_at").cast(pa.int64())
        with foreign(self._store.address("readings")):
            table = self._table()
            if table is None:
                return
            scanner = table.to_pyarrow_dataset().scanner(
                columns=columns, filter=wanted, batch_size=SCAN_ROWS, batch_readahead=2, fragment_readahead=1
            )
            for batch in scanner.to_batches():
                for at in range(0, batch.num_rows, BATCH_ROWS):
                    yield _rows(batch.slice(at, BATCH_ROWS))


def _rows(batch: pa.RecordBatch) -> list[Row]:
    columns = [batch.column(name).to_pylist() for name in Row.__struct_fields__]
    return [Row(*values) for values in zip(*columns, strict=True)]
