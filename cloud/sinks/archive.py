"""The archive: Delta tables `readings`, `gaps` and `events`, in a local folder or a bucket, each row appended once.

Rules:
1. A commit of a table holds the files and, as an application transaction, the journal's offset up to which the table
   is complete: both or neither. `open` returns that of `readings`, so a restored or lost archive is filled again from
   the journal.
2. A record above every offset that the table knows cannot be in it, and is appended. Any other (a replay, a call
   repeated after an unknown end, another journal) is looked up first by (tenant, gateway, epoch, seq, point), and only
   what is missing is appended. So writing again changes nothing, whatever the cursor did.
3. The files are made here by pyarrow and stored durably before the log names them (`archive_store`); Delta's log,
   compaction and vacuum are deltalake's. A commit is bounded by what the runner gives: 20 MB for 200,000 readings.
4. Gaps and events are committed before readings: a crash between is found by rule 2.
5. One thread does everything that blocks; there is one writer (a second one is told by a conflicting commit, and the
   call is repeated on what it left). `DeltaTable.is_deltatable` and `.scan` are not used: they keep the interpreter's
   lock while they wait for the network (deltalake 1.6.6), and the doors would stand still.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import errno
import io
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from cloud.intervals import coalesce
from cloud.sinks.archive_store import LOG_FOLDER, FolderStore, Store
from cloud.sinks.contract import (
    EventRecord,
    GapRecord,
    Record,
    RetryLater,
    ScanRecord,
    Settled,
    SinkBroken,
    SinkError,
    StoreChanged,
)
from config.cloud import Archive
from config.failpoint import reached
from sync.wire import Layout, layout_id

if TYPE_CHECKING:
    import pyarrow as pa
    from deltalake import DeltaTable, WriterProperties

    from cloud.sinks.archive_columns import Partition
    from cloud.sinks.minio import Bucket

T = TypeVar("T")

log = logging.getLogger(__name__)

# Both libraries read these once, when they are loaded, so they are set before anything here imports one of them.
# pyarrow: its own choice keeps what it had: 221 MB resident between commits of 200,000 readings and 320 MB at
# compaction, against 171 and 253 so.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "jemalloc")
# deltalake: its allocator keeps an arena and a cache for each of the hundred threads that its runtime starts, and gives
# nothing back from those that sleep: 30 KiB more for each commit of 96 scans, without an end in sight after 900 of
# them; so, one arena and no caches, it is 2 KiB, and some 26 MB less from the start.
os.environ.setdefault("_RJEM_MALLOC_CONF", "narenas:1,tcache:false,dirty_decay_ms:0,muzzy_decay_ms:0")

APP: Final = "headgate"  #: application transaction: complete up to this offset
LATE: Final = "headgate-late"  #: the highest offset appended out of turn, so above APP's
MAX_RECORDS: Final = 65_536  #: per call
FILE_BYTES: Final = 64 * 1024 * 1024  #: what compaction aims at
_RANGES: Final = 200  #: of seqs, in one predicate
ROW_GROUP: Final = (
    128 * 1024
)  #: rows that a writer holds before it lets go of them; bounds compaction's memory
VACUUM_MIN_HOURS: Final = 168.0  #: a reader may hold a version for a week
NS_PER_DAY: Final = 86_400_000_000_000
NS_PER_HOUR: Final = 3_600_000_000_000

#: Columns by which rows are sought: these have statistics, so that a reader passes over what it does not need.
_SOUGHT: Final = frozenset(("gateway", "device", "point", "taken_at", "taken_at_ns", "epoch", "seq"))
_CREDENTIALS: Final = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "403 Forbidden")
_FOR_A_HUMAN: Final = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


class ArchiveSink:
    """The sink. `folder` is used unless the settings name an S3 endpoint."""

    name = "archive"
    max_records = MAX_RECORDS

    def __init__(self, settings: Archive, folder: Path) -> None:
        self.max_bytes = settings.commit_mb * 1024 * 1024
        self.linger_s = settings.commit_interval_s
        self._settings = settings
        self._folder = folder
        self._tables: _Tables | None = None
        self._bucket: Bucket | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._compacted_ns = self._vacuumed_ns = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What the store cannot do and how the archive does without, for `/readyz`."""
        return self._bucket.notes if self._bucket is not None else ()

    async def open(self) -> int | None:
        """Raises `RetryLater`, `SinkBroken`."""
        await self.close()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="archive")
        return await self._in_thread(self._open)

    async def write(self, records: Sequence[Record], upto_offset: int) -> Settled:
        """Raises `RetryLater`, `SinkBroken`."""
        await self._in_thread(lambda: self._write(records, upto_offset))
        return Settled()

    async def remove(self, records: Sequence[Record]) -> None:
        """Raises `RetryLater`, `SinkBroken`, `StoreChanged`."""
        await self._in_thread(lambda: self._remove(records))

    async def maintain(self, now_ns: int) -> None:
        """Compaction, retention and vacuum, each when it is due. Raises `RetryLater`, `SinkBroken`."""
        await self._in_thread(lambda: self._maintain(now_ns))

    async def close(self) -> None:
        thread = self._thread
        self._thread = self._tables = self._bucket = None
        if thread is not None:
            await asyncio.to_thread(thread.shutdown)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        if self._thread is None:
            raise RetryLater("archive: not open")
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    # --- in the thread ---

    def _open(self) -> int:
        store: Store
        if self._settings.endpoint:
            from cloud.sinks.minio import Bucket

            self._bucket = store = Bucket(self._settings)
            self._bucket.prepare()
        else:
            store = FolderStore(self._folder)
            with foreign(str(self._folder)):
                self._folder.mkdir(parents=True, exist_ok=True)
        tables = _Tables(store)
        offset = tables.open()
        self._tables = tables
        return offset

    def _write(self, records: Sequence[Record], upto: int) -> None:
        if self._tables is None:
            raise RetryLater("archive: not open")
        self._tables.store(records, upto)

    def _remove(self, records: Sequence[Record]) -> None:
        if self._tables is None:
            raise RetryLater("archive: not open")
        self._tables.remove(records)

    def _maintain(self, now_ns: int) -> None:
        settings = self._settings
        if self._tables is None:
            raise RetryLater("archive: not open")
        cutoff = (now_ns - round(settings.retention_days * NS_PER_DAY)) // NS_PER_DAY
        for table in self._tables.all:
            removed = table.drop_before(cutoff)
            if removed:
                log.info("archive: %s: %d rows are past their %g days and removed",
                         table.name, removed, settings.retention_days)  # fmt: skip
        if now_ns - self._compacted_ns >= settings.compact_hours * NS_PER_HOUR * 0.9:
            for table in self._tables.all:
                table.compact()
            self._compacted_ns = now_ns
        if now_ns - self._vacuumed_ns >= settings.vacuum_hours * NS_PER_HOUR:
            for table in self._tables.all:
                table.vacuum()
            self._vacuumed_ns = now_ns


class _Tables:
    """The three tables of one archive."""

    def __init__(self, store: Store) -> None:
        from cloud.sinks import archive_columns as columns

        self._columns = columns
        self.readings = Table(store, "readings", columns.READINGS)
        self.gaps = Table(store, "gaps", columns.GAPS)
        self.events = Table(store, "events", columns.EVENTS)
        self.all = (self.gaps, self.events, self.readings)

    def open(self) -> int:
        for table in self.all:
            table.open()
        return self.readings.complete_to

    def store(self, records: Sequence[Record], upto: int) -> None:
        scans = [record for record in records if isinstance(record, ScanRecord)]
        if len(scans) < len(records):
            gaps = [record for record in records if isinstance(record, GapRecord)]
            events = [record for record in records if isinstance(record, EventRecord)]
            if gaps:
                self._append(self.gaps, gaps, _absent, self._columns.gaps, upto)
            if events:
                self._append(self.events, events, _absent, self._columns.events, upto)
        self._append(self.readings, scans, _absent_points, self._columns.readings, upto)

    def remove(self, records: Sequence[Record]) -> None:
        self._take_from(self.readings, [record for record in records if isinstance(record, ScanRecord)])
        self._take_from(self.gaps, [record for record in records if isinstance(record, GapRecord)])
        self._take_from(self.events, [record for record in records if isinstance(record, EventRecord)])

    @staticmethod
    def _take_from(table: Table, records: Sequence[RecordT]) -> None:
        if records:
            table.refresh()
            for who, theirs in _by_identity(records).items():
                table.remove(who, theirs)

    @staticmethod
    def _append(
        table: Table,
        records: Sequence[RecordT],
        absent: Callable[[Table, Sequence[RecordT]], list[RecordT]],
        build: Callable[[Sequence[RecordT]], dict[Partition, pa.Table]],
        upto: int,
    ) -> None:
        """Rule 2."""
        table.refresh()
        known = max(table.complete_to, table.late_to)
        wanted = [record for record in records if record.offset > known]
        if len(wanted) < len(records):
            wanted += absent(table, [record for record in records if record.offset <= known])
        highest = max((record.offset for record in wanted), default=0)
        if wanted or upto > table.complete_to:
            table.append(build(wanted) if wanted else {}, max(upto, table.complete_to), highest)


RecordT = TypeVar("RecordT", ScanRecord, GapRecord, EventRecord)


class Identity(msgspec.Struct, frozen=True):
    """Who sent a run of frames."""

    tenant: str
    gateway: str
    epoch: int


def _absent(table: Table, records: Sequence[RecordT]) -> list[RecordT]:
    """Those of the records that the table does not hold."""
    absent: list[RecordT] = []
    for who, theirs in _by_identity(records).items():
        held = table.held(who, theirs, ())
        absent.extend(record for record in theirs if record.seq not in held)
    return absent


def _absent_points(table: Table, scans: Sequence[ScanRecord]) -> list[ScanRecord]:
    """Those of the scans, and of their points, that the table does not hold."""
    absent: list[ScanRecord] = []
    for who, theirs in _by_identity(scans).items():
        held = table.held(who, theirs, ("point",))
        for scan in theirs:
            points = held.get(scan.seq)
            if points is None:
                absent.append(scan)
                continue
            missing = [i for i, name in enumerate(scan.layout.names) if name not in points]
            if missing:
                absent.append(_part_of(scan, missing))
    return absent


def _by_identity(records: Iterable[RecordT]) -> dict[Identity, list[RecordT]]:
    found: dict[Identity, list[RecordT]] = {}
    for record in records:
        found.setdefault(Identity(record.tenant, record.gateway, record.epoch), []).append(record)
    return found


def _part_of(scan: ScanRecord, points: Sequence[int]) -> ScanRecord:
    whole = scan.layout
    part = Layout(
        whole.device, whole.driver, whole.measurement,
        tuple(whole.names[i] for i in points), tuple(whole.types[i] for i in points),
        tuple(whole.units[i] for i in points), tuple(whole.scales[i] for i in points),
        tuple(whole.offsets[i] for i in points), whole.tags,
    )  # fmt: skip
    return msgspec.structs.replace(
        scan,
        layout=part,
        layout_id=layout_id(part),
        values=[scan.values[i] for i in points],
        reasons={at: scan.reasons[i] for at, i in enumerate(points) if i in scan.reasons},
    )


class Table:
    """One Delta table. Every method blocks, and raises `RetryLater` or `SinkBroken` and nothing else."""

    def __init__(self, store: Store, name: str, schema: pa.Schema) -> None:
        self.name = name
        self.complete_to = 0  #: every record up to this offset is in the table
        self.late_to = 0  #: some records up to this offset are
        self._store = store
        self._schema = schema
        self._where = f"archive {store.address(name)}"
        self._delta: DeltaTable | None = None

    def open(self) -> None:
        """Opens the table, and makes it where there is none."""
        from deltalake import DeltaTable
        from deltalake.exceptions import TableNotFoundError

        from cloud.sinks.archive_columns import PARTITION

        address, options = self._store.address(self.name), self._store.options
        with self._foreign():
            self._delta = None
            self._store.mend(self.name)
            try:
                delta = DeltaTable(address, storage_options=options)
            except TableNotFoundError:
                delta = DeltaTable.create(
                    address,
                    self._schema,
                    mode="ignore",
                    partition_by=list(PARTITION),
                    name=self.name,
                    description="Headgate archive",
                    storage_options=options,
                )
                self._store.settle(self.name)
            self._complete_schema(delta)
            self.complete_to = delta.transaction_version(APP) or 0
            self.late_to = delta.transaction_version(LATE) or 0
            self._delta = delta

    def refresh(self) -> None:
        """Opens the table again where a call before ended in the unknown. Raises `StoreChanged` where it is not as it
        was left: a commit on top of what is gone would leave a table that nobody can read."""
        known = self.complete_to
        if self._delta is None:
            self.open()
        elif not self._store.has(self.name, f"{LOG_FOLDER}/{self._delta.version():020d}.json"):
            self._delta = None
            raise StoreChanged(f"{self._where}: its log has gone")
        if self.complete_to < known:
            raise StoreChanged(f"{self._where}: complete to {self.complete_to}, it was to {known}")

    def append(self, parts: Mapping[Partition, pa.Table], complete_to: int, highest: int) -> None:
        """One commit: these rows, and the offset up to which the table is then complete."""
        from deltalake import CommitProperties, Transaction
        from deltalake.transaction import AddAction

        from cloud.sinks.archive_columns import PARTITION

        late_to = max(self.late_to, highest)
        marks = [Transaction(APP, complete_to)]
        if late_to > complete_to:
            marks.append(Transaction(LATE, late_to))
        files = [self._file(partition, rows) for partition, rows in parts.items()]
        with self._foreign():
            actions: list[AddAction] = []
            for file in files:
                reached("archive.before_put")
                self._store.put(self.name, file.path, file.data)
                reached("archive.after_put")
                actions.append(AddAction(
                    path=file.path, size=len(file.data), partition_values=file.partition,
                    modification_time=time.time_ns() // 1_000_000, data_change=True, stats=file.stats,
                ))  # fmt: skip
            reached("archive.before_commit")
            self._opened.create_write_transaction(
                list(actions),
                "append",
                self._schema,
                list(PARTITION),
                commit_properties=CommitProperties(app_transactions=marks),
            )
            reached("archive.after_commit")
            self._opened.update_incremental()  # else the next commit would take this one for another writer's
            self._store.settle(self.name)
        reached("archive.after_settle")
        self.complete_to = complete_to
        self.late_to = late_to

    def held(self, who: Identity, records: Sequence[RecordT], also: tuple[str, ...]) -> dict[int, set[str]]:
        """Which of these records' seqs the table holds, each with the values of the column `also`."""
        import pyarrow.dataset as ds

        from cloud.sinks.archive_columns import partition_of

        seqs = {record.seq for record in records}
        days = sorted({partition_of(record)[0] for record in records})
        wanted = (
            ds.field("day").isin([date_of(day) for day in days])
            & (ds.field("tenant") == who.tenant)
            & (ds.field("gateway") == who.gateway)
            & (ds.field("epoch") == who.epoch)
            & (ds.field("seq") >= min(seqs))
            & (ds.field("seq") <= max(seqs))
        )
        held: dict[int, set[str]] = {}
        with self._foreign():
            scanner = self._opened.to_pyarrow_dataset().scanner(
                columns=["seq", *also],
                filter=wanted,
                batch_size=1 << 15,
                batch_readahead=2,
                fragment_readahead=1,
            )
            for batch in scanner.to_batches():
                found = batch.column("seq").to_pylist()
                words = batch.column(also[0]).to_pylist() if also else [""] * len(found)
                for seq, word in zip(found, words, strict=True):
                    if seq in seqs:
                        held.setdefault(seq, set()).add(word)
        return held

    def remove(self, who: Identity, records: Sequence[RecordT]) -> None:
        """Removes the rows of these records, in the days that they are in: a commit for each day."""
        from cloud.sinks.archive_columns import partition_of

        by_day: dict[int, list[int]] = {}
        for record in records:
            by_day.setdefault(partition_of(record)[0], []).append(record.seq)
        with self._foreign():
            for day, seqs in sorted(by_day.items()):
                ranges = coalesce((seq, seq) for seq in seqs)
                for at in range(0, len(ranges), _RANGES):
                    some = " OR ".join(f"(seq >= {a} AND seq <= {b})" for a, b in ranges[at : at + _RANGES])
                    # Names are [A-Za-z0-9_-] only (`sync.identity`).
                    self._opened.delete(
                        f"day = DATE '{date_of(day).isoformat()}' AND tenant = '{who.tenant}'"
                        f" AND gateway = '{who.gateway}' AND epoch = {who.epoch} AND ({some})"
                    )
            self._store.settle(self.name)

    def drop_before(self, day: int) -> int:
        """Removes the partitions of earlier days; how many rows these held."""
        with self._foreign():
            oldest = min((part["day"] for part in self._opened.partitions()), default=None)
            if oldest is None or oldest >= date_of(day).isoformat():
                return 0
            before = self._opened.count()
            self._opened.delete(f"day < DATE '{date_of(day).isoformat()}'")
            self._store.settle(self.name)
            return before - self._opened.count()

    def compact(self) -> None:
        """Joins small files. Readers see the same rows throughout."""
        with self._foreign():
            reached("archive.before_compact")
            done = self._opened.optimize.compact(
                target_size=FILE_BYTES,
                max_concurrent_tasks=1,
                writer_properties=_joined_properties(self._schema),
            )
            self._store.settle(self.name)
        reached("archive.after_compact")
        if done["numFilesRemoved"]:
            log.info("archive: %s: %s files joined to %s",
                     self.name, done["numFilesRemoved"], done["numFilesAdded"])  # fmt: skip

    def vacuum(self) -> None:
        """Deletes the files that no version of the last week needs, also those that no commit ever named."""
        with self._foreign():
            gone = self._opened.vacuum(retention_hours=int(VACUUM_MIN_HOURS), dry_run=False, full=True)
            self._store.settle(self.name)
        if gone:
            log.info("archive: %s: %d unused files deleted", self.name, len(gone))

    @property
    def _opened(self) -> DeltaTable:
        if self._delta is None:
            raise RetryLater(f"{self._where}: not open")
        return self._delta

    def _file(self, partition: Partition, rows: pa.Table) -> _File:
        """The rows as Parquet in memory, with what a reader needs to pass the file over."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        data = io.BytesIO()
        names = rows.column_names
        pq.write_table(
            rows,
            data,
            compression="zstd",  # at level 1 smaller than snappy, and no slower
            compression_level=1,
            # Times and counters as differences: a tenth of the room, in less time than a dictionary is tried in vain.
            column_encoding=dict.fromkeys(_counters(rows.schema), "DELTA_BINARY_PACKED"),
            use_dictionary=[
                name
                for name in names
                if pa.types.is_dictionary(rows.schema.field(name).type) or name == "value"
            ],
            write_statistics=[name for name in names if name in _SOUGHT],
            store_schema=False,  # readers need not know that pyarrow wrote it
        )
        day = date_of(partition[0]).isoformat()
        path = f"day={day}/tenant={partition[1]}/part-{uuid.uuid4()}.zstd.parquet"
        return _File(path, {"day": day, "tenant": partition[1]}, data.getbuffer(), _stats(rows))

    def _complete_schema(self, delta: DeltaTable) -> None:
        """A table made by an older version gets the columns that it lacks."""
        from deltalake.schema import Schema

        have = {field.name for field in delta.schema().fields}
        missing = [field for field in Schema.from_arrow(self._schema).fields if field.name not in have]
        if missing:
            log.info("%s: adding columns %s", self._where, ", ".join(field.name for field in missing))
            delta.alter.add_columns(missing)
            self._store.settle(self.name)

    @contextlib.contextmanager
    def _foreign(self) -> Iterator[None]:
        try:
            with foreign(self._where):
                yield
        except SinkError:
            self._delta = None  # what was stored is unknown: read it again before the next call
            raise


def _counters(schema: pa.Schema) -> list[str]:
    import pyarrow as pa

    return [
        field.name for field in schema if pa.types.is_int64(field.type) or pa.types.is_timestamp(field.type)
    ]


def _joined_properties(schema: pa.Schema) -> WriterProperties:
    """The same choices as in `Table._file`, for the files that deltalake writes."""
    from deltalake import ColumnProperties, WriterProperties

    counter = ColumnProperties(dictionary_enabled=False, encoding="DELTA_BINARY_PACKED")
    return WriterProperties(
        compression="ZSTD",
        compression_level=1,
        max_row_group_size=ROW_GROUP,
        column_properties=dict.fromkeys(_counters(schema), counter),
    )


class _File(msgspec.Struct, frozen=True):
    path: str
    partition: dict[str, str | None]
    data: memoryview
    stats: str


def _stats(rows: pa.Table) -> str:
    """Smallest and largest values (Delta protocol, per-file statistics)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    low: dict[str, str | int] = {}
    high: dict[str, str | int] = {}
    for name in rows.column_names:
        if name not in _SOUGHT or name == "taken_at":
            continue
        column = rows.column(name).chunk(0)  # a table as `archive_columns` builds it has one
        if pa.types.is_dictionary(column.type):
            column = column.dictionary  # every word of it stands in some row
        found = pc.min_max(column).as_py()
        low[name], high[name] = found["min"], found["max"]
    nulls = dict.fromkeys(low, 0)
    return json.dumps({"numRecords": rows.num_rows, "minValues": low, "maxValues": high, "nullCount": nulls})


def date_of(day: int) -> datetime.date:
    return datetime.date(1970, 1, 1) + datetime.timedelta(days=day)


@contextlib.contextmanager
def foreign(where: str) -> Iterator[None]:
    """Errors of the store and of deltalake become ours."""
    from deltalake.exceptions import DeltaError, DeltaProtocolError, SchemaMismatchError

    try:
        yield
    except SinkError:
        raise
    except (SchemaMismatchError, DeltaProtocolError) as err:
        raise SinkBroken(f"{where}: {err}; is it another program's table?") from err
    except (DeltaError, OSError) as err:
        text = str(err)
        if isinstance(err, OSError) and err.errno in _FOR_A_HUMAN:
            raise SinkBroken(f"{where}: {text}; the folder must be writable") from err
        if any(word in text for word in _CREDENTIALS):
            raise SinkBroken(f"{where}: {text}; check the access key and what it may do") from err
        raise RetryLater(f"{where}: {text}") from err
