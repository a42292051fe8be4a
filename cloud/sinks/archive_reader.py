"""Questions to the archive, beside the sink that writes it: a reader has its own handle and sees whole commits.

Calls block; they run in a thread. `DeltaTable.scan` is not used (see `archive.py`, rule 5).
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from cloud.sinks.archive_store import FolderStore, Store
from cloud.sinks.contract import EventRecord, GapRecord, Record, ScanRecord, Tally
from config.cloud import Archive
from drivers.contract import Reason, Value
from sync.wire import EventFrame, GapFrame, Layout, layout_id

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
    from deltalake import DeltaTable

BATCH_ROWS: Final = 2_000
SCAN_ROWS: Final = 1 << 15  #: with little read ahead: pyarrow's own choice holds hundreds of MB
RECORD_ROWS: Final = 8_000  #: as records, in one page: about 10 MB
IDENTITY_ROWS: Final = 4_000_000  #: looked at for doubles at a time: 32 MB of keys
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
    earliest_ns: int | None  #: bounds of an estimated time
    latest_ns: int | None


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

    async def records(
        self, from_ns: int, to_ns: int, *, gateway: str | None = None
    ) -> AsyncIterator[list[Record]]:
        """What was received at from_ns <= t < to_ns, as records that a sink can take: gaps, events, then scans, page by
        page. A scan may come in several parts, each with some of its points. Raises as `tally` does."""
        pages = self._records(from_ns // 1000, to_ns // 1000, gateway)
        while True:
            page = await asyncio.to_thread(next, pages, None)
            if page is None:
                return
            yield page

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

    def _records(self, from_us: int, to_us: int, gateway: str | None) -> Iterator[list[Record]]:
        import pyarrow as pa
        import pyarrow.dataset as ds

        from cloud.sinks.archive import foreign

        received = ds.field("received_at").cast(pa.int64())
        wanted = (received >= from_us) & (received < to_us)
        if gateway is not None:
            tenant, _, name = gateway.partition("/")
            wanted &= (ds.field("tenant") == tenant) & (ds.field("gateway") == name)
        kinds: tuple[tuple[str, Callable[[list[dict[str, Any]]], list[Record]]], ...] = (
            ("gaps", _gaps_of), ("events", _events_of), ("readings", _scans_of),
        )  # fmt: skip
        for name, made in kinds:
            with foreign(self._store.address(name)):
                table = self._table(name)
                if table is None:
                    continue
                dataset = table.to_pyarrow_dataset()
                columns = {column: ds.field(column) for column in dataset.schema.names}
                for column in ("received_at", "from_at", "to_at"):
                    if column in columns:
                        columns[column] = ds.field(column).cast(pa.int64())
                scanner = dataset.scanner(
                    columns=columns,
                    filter=wanted,
                    batch_size=SCAN_ROWS,
                    batch_readahead=2,
                    fragment_readahead=1,
                )
                for batch in scanner.to_batches():
                    for at in range(0, batch.num_rows, RECORD_ROWS):
                        if page := made(batch.slice(at, RECORD_ROWS).to_pylist()):
                            yield page

    def _table(self, name: str = "readings") -> DeltaTable | None:
        from deltalake import DeltaTable
        from deltalake.exceptions import TableNotFoundError

        try:
            return DeltaTable(self._store.address(name), storage_options=self._store.options)
        except TableNotFoundError:
            return None

    async def identities(self, turn: int = 0) -> dict[str, Tally]:
        """Readings by gateway, with those held twice. What a large archive has is looked at for that in turns, so that
        memory stays bounded: of n turns, this one looks at the seqs that leave `turn` modulo n. Raises as `tally`."""
        return await asyncio.to_thread(self._identities, turn)

    def _identities(self, turn: int) -> dict[str, Tally]:
        import numpy as np

        from cloud.sinks.archive import foreign

        found: dict[str, Tally] = {}
        keys: dict[tuple[str, int], list[npt.NDArray[np.uint64]]] = {}
        words: dict[str, int] = {}
        with foreign(self._store.address("readings")):
            table = self._table()
            if table is None:
                return {}
            scanner = table.to_pyarrow_dataset().scanner(
                columns=["tenant", "gateway", "epoch", "seq", "point"],
                batch_size=SCAN_ROWS,
                batch_readahead=2,
                fragment_readahead=1,
            )
            turns = 1 + table.count() // IDENTITY_ROWS
            for batch in scanner.to_batches():
                seq = batch.column("seq").to_numpy().astype(np.uint64)
                epoch = batch.column("epoch").to_numpy().astype(np.uint64)
                tenants, gateways, points = (
                    _numbered(batch.column(name), words) for name in ("tenant", "gateway", "point")
                )
                looked_at = seq % np.uint64(turns) == np.uint64(turn % turns)
                key = _mixed(_mixed(seq) + points)
                names = list(words)
                for who in np.unique(np.stack((tenants, gateways, epoch)), axis=1).T:
                    theirs = (tenants == who[0]) & (gateways == who[1]) & (epoch == who[2])
                    gateway, one = f"{names[int(who[0])]}/{names[int(who[1])]}", int(who[2].astype(np.int64))
                    tally = found.setdefault(gateway, Tally(by_epoch={}))
                    rows = int(theirs.sum())
                    tally.readings += rows
                    tally.by_epoch[one] = tally.by_epoch.get(one, 0) + rows
                    keys.setdefault((gateway, one), []).append(key[theirs & looked_at])
        for (gateway, one), parts in keys.items():
            all_of_it = np.concatenate(parts)
            repeated = len(all_of_it) - len(np.unique(all_of_it))
            found[gateway].repeated += repeated
            found[gateway].by_epoch[one] -= repeated
        return found

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


def _numbered(column: pa.Array, words: dict[str, int]) -> npt.NDArray[np.uint64]:
    """Each word of a column as its place in `words`, which takes in what is new."""
    import numpy as np
    import pyarrow as pa

    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    places = [words.setdefault(word, len(words)) for word in column.dictionary.to_pylist()]
    numbered: npt.NDArray[np.uint64] = np.array(places, np.uint64)[column.indices.to_numpy()]
    return numbered


def _mixed(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """One to one, and without a pattern (splitmix64's finisher): of 4 M keys two are alike once in 2 M times."""
    import numpy as np

    mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _scans_of(rows: list[dict[str, Any]]) -> list[Record]:
    """Rows of `readings` as scans, each with the points that are among these rows. The values are engineering values
    already, so the layouts have neither scale nor offset."""
    by_scan: dict[tuple[str, str, str, int, int, int], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["tenant"], row["gateway"], row["device"], row["epoch"], row["seq"], row["taken_at_ns"])
        by_scan.setdefault(key, []).append(row)
    made: list[Record] = []
    layouts: dict[Layout, int] = {}
    for (tenant, gateway, device, epoch, seq, taken_at_ns), points in by_scan.items():
        first, n = points[0], len(points)
        tags = tuple(sorted(json.loads(first["labels"] or "{}").items()))
        layout = Layout(
            device, first["driver"] or "", first["measurement"], tuple(p["point"] for p in points),
            tuple(p["type"] for p in points), tuple(p["unit"] for p in points), (1.0,) * n, (0.0,) * n, tags,
        )  # fmt: skip
        identity = layouts.get(layout)
        if identity is None:
            identity = layouts[layout] = layout_id(layout)
        reasons = {i: Reason[p["reason"].upper()] for i, p in enumerate(points) if p["reason"]}
        made.append(ScanRecord(
            0, tenant, gateway, epoch, seq, layout, identity, taken_at_ns, first["clock_synchronized"],
            first["received_at"] * 1000, [_value_of(p) for p in points], reasons, first["boot"] or 0,
            first["boot_ns"] or 0, first["earliest_ns"] or 0, first["latest_ns"] or 0,
        ))  # fmt: skip
    return made


def _value_of(row: dict[str, Any]) -> Value | None:
    kind, value, text = row["type"], row["value"], row["text"]
    if kind == "str":
        return text  # type: ignore[no-any-return]
    if kind == "bool":
        return None if value is None else bool(value)
    return int(text) if text is not None else value


def _gaps_of(rows: list[dict[str, Any]]) -> list[Record]:
    return [
        GapRecord(
            0, row["tenant"], row["gateway"], row["epoch"], row["seq"],
            GapFrame(row["gap_epoch"], row["first"], row["last"], row["scans"], row["readings"], row["reason"],
                     row["device"], 0, 0, 0, priority=row.get("priority") or "", frames=row.get("frames") or 0),
            row["from_at"] * 1000, row["to_at"] * 1000, row["received_at"] * 1000,
            tuple((int(a), int(b)) for a, _, b in (part.partition("-") for part in (row["held"] or "").split())),
        )
        for row in rows
    ]  # fmt: skip


def _events_of(rows: list[dict[str, Any]]) -> list[Record]:
    return [
        EventRecord(
            0, row["tenant"], row["gateway"], row["epoch"], row["seq"],
            EventFrame(0, 0, row["code"], row["text"], row["device"]), row["at_ns"], row["received_at"] * 1000,
        )
        for row in rows
    ]  # fmt: skip


def _rows(batch: pa.RecordBatch) -> list[Row]:
    columns = [batch.column(name).to_pylist() for name in Row.__struct_fields__]
    return [Row(*values) for values in zip(*columns, strict=True)]
