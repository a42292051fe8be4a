"""Readings into the Delta archive: our sink against bare pyarrow writing the same rows as Parquet.

Three baselines, the same rows and compression in each: `bare` writes a ready Arrow table (dictionary columns, as ours
are) as Parquet and syncs it; `bare plain` the same with plain strings, as a program that knows nothing of
dictionaries would; `deltalake` appends the plain table by `write_deltalake`. Ours starts from decoded records (`sink`)
or from the journal's bytes (`decode + sink`), builds the table, writes and syncs it, commits to Delta's log and syncs
that. All take turns on one core; what is compared is the median of the rounds. At the end: compaction, and the peak
memory of all of it.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, WriterProperties, write_deltalake

from cloud.decode import Decoder
from cloud.journal.contract import Stored
from cloud.sinks import archive_columns
from cloud.sinks.archive import ArchiveSink
from cloud.sinks.contract import Record, ScanRecord
from config.cloud import Archive
from drivers.contract import Point, Scan, ValueType
from sync.wire import ClockRow, Packing, encode_scan, layout_of, seal

S = 1_000_000_000
CALL_READINGS = 200_000  #: what the runner gives in one call
BASE_NS = 1_795_392_000 * S  #: midnight, so that all of a round lies in one day


class Figure(msgspec.Struct):
    rows: int
    seconds: float
    cpu_s: float


class Shape(msgspec.Struct, frozen=True):
    name: str
    points: int
    devices: int
    type: ValueType
    scans: int  #: per round, over all devices


SHAPES = (
    Shape("125 × UINT16, 1 device", 125, 1, ValueType.U16, 4_800),
    Shape("32 × FLOAT32, 20 devices", 32, 20, ValueType.F32, 18_000),
    Shape("4 × FLOAT64, 200 devices", 4, 200, ValueType.F64, 100_000),
)


def batches(shape: Shape, first: int) -> list[Stored]:
    """What the journal would hold: 60 scans a batch, the devices in turn."""
    columns = tuple(
        Point(name=f"p{i}", type=shape.type, scale=0.1 if shape.type is ValueType.U16 else 1.0, unit="V")
        for i in range(shape.points)
    )
    packings = [
        Packing(layout_of(f"device-{n}", "modbus", "power", columns, (("site", "north"),)))
        for n in range(shape.devices)
    ]
    made: list[Stored] = []
    for start in range(first, first + shape.scans, 60):
        seqs = range(start, min(start + 60, first + shape.scans))
        frames = []
        for seq in seqs:
            raw = [(seq * 7 + i * 13) % 4000 for i in range(shape.points)]
            values = raw if shape.type is ValueType.U16 else [v / 7 for v in raw]
            scan = Scan((seq - first) * S // 2, columns, values)
            frames.append(encode_scan(packings[seq % shape.devices], scan, 1))
        used = {seq % shape.devices for seq in seqs}
        count = len(seqs) * shape.points
        sealed = seal(
            "acme/plant-1", 7, start, frames, [packings[n].layout for n in sorted(used)],
            [ClockRow(1, "boot", 0, BASE_NS, True)], count,
        )  # fmt: skip
        made.append(
            Stored(
                start, "acme/plant-1", 7, start, sealed.last, count, BASE_NS + 86_400 * S, ((start, sealed.last),),
                sealed.payload,
            )
        )  # fmt: skip
    return made


def decoded(decoder: Decoder, stored: Sequence[Stored]) -> list[Record]:
    return [record for one in stored for record in decoder.decode(one).records]


def tables(calls: Sequence[Sequence[Record]]) -> list[pa.Table]:
    found: list[pa.Table] = []
    for records in calls:
        scans = [record for record in records if isinstance(record, ScanRecord)]
        found += archive_columns.readings(scans).values()
    return found


def plain(table: pa.Table) -> pa.Table:
    schema = [
        pa.field(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type)
        for f in table.schema
    ]
    return table.cast(pa.schema(schema))


def write_bare(folder: Path, ready: Sequence[pa.Table]) -> None:
    for table in ready:
        file = folder / f"{time.monotonic_ns()}.parquet"
        with file.open("wb") as out:
            pq.write_table(table, out, compression="zstd", compression_level=1)
            out.flush()
            os.fsync(out.fileno())


def write_delta(folder: Path, ready: Sequence[pa.Table]) -> None:
    for table in ready:
        write_deltalake(
            folder, table, mode="append",
            writer_properties=WriterProperties(compression="ZSTD", compression_level=1),
        )  # fmt: skip


async def timed(rows: int, work: Callable[[], Awaitable[None]]) -> Figure:
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    await work()
    return Figure(rows, time.perf_counter() - wall, time.process_time() - cpu)


async def measure(folder: Path, shape: Shape, rounds: int) -> None:
    settings = Archive(commit_interval_s=1.0)
    sinks = {name: ArchiveSink(settings, folder / name) for name in ("sink", "decode + sink")}
    for sink in sinks.values():
        await sink.open()
    (folder / "bare").mkdir()
    figures: dict[str, list[Figure]] = {
        name: [] for name in ("bare", "bare plain", "deltalake", "sink", "decode + sink", "columns")
    }
    decoder = Decoder()
    per_call = CALL_READINGS // shape.points // 60 * 60  # whole batches, as the runner gives them
    for n in range(rounds + 1):
        stored = batches(shape, 1 + n * shape.scans)
        records = decoded(decoder, stored)
        rows = len(records) * shape.points
        calls = [records[at : at + per_call] for at in range(0, len(records), per_call)]
        ready = tables(calls)
        ready_plain = [plain(table) for table in ready]
        step = max(1, per_call // 60)

        async def bare(ready: list[pa.Table] = ready) -> None:
            await asyncio.to_thread(write_bare, folder / "bare", ready)

        async def bare_plain(ready: list[pa.Table] = ready_plain) -> None:
            await asyncio.to_thread(write_bare, folder / "bare", ready)

        async def delta(ready: list[pa.Table] = ready_plain) -> None:
            await asyncio.to_thread(write_delta, folder / "delta", ready)

        async def through(calls: list[list[Record]] = calls) -> None:
            for call in calls:
                await sinks["sink"].write(call, call[-1].offset)

        async def from_bytes(stored: list[Stored] = stored, step: int = step) -> None:
            for at in range(0, len(stored), step):
                call = decoded(decoder, stored[at : at + step])
                await sinks["decode + sink"].write(call, call[-1].offset)

        async def columns(calls: list[list[Record]] = calls) -> None:
            tables(calls)

        work: dict[str, Callable[[], Awaitable[None]]] = {
            "bare": bare, "bare plain": bare_plain, "deltalake": delta, "sink": through, "decode + sink": from_bytes,
            "columns": columns,
        }  # fmt: skip
        for name in list(work) if n % 2 else list(reversed(work)):
            one = await timed(rows, work[name])
            if n:  # the first round loads libraries and makes tables
                figures[name].append(one)
    report(shape, figures)
    started = time.perf_counter()
    await sinks["sink"].maintain(time.time_ns())
    seconds = time.perf_counter() - started
    for sink in sinks.values():
        await sink.close()
    table = DeltaTable(str(folder / "sink" / "readings"))
    size = sum(Path(file).stat().st_size for file in table.file_uris())
    count = table.count()
    print(f"  compacted {count:,} rows in {seconds:.1f} s to {len(table.file_uris())} files, "
          f"{size / count:.1f} bytes a row")  # fmt: skip


def report(shape: Shape, figures: dict[str, list[Figure]]) -> None:
    print(shape.name)
    base = statistics.median(f.rows / f.seconds for f in figures["bare"])
    for name, found in figures.items():
        speed = statistics.median(f.rows / f.seconds for f in found)
        per_cpu = sum(f.rows for f in found) / sum(f.cpu_s for f in found)
        print(
            f"  {name:14} {speed:10,.0f} rows/s  {speed / base:7.1%} of bare  {per_cpu:11,.0f} rows/CPU-second",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", default="", help="only shapes whose name holds this")
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for shape in SHAPES:
        if options.shape in shape.name:
            with tempfile.TemporaryDirectory(prefix="headgate-bench-") as folder:
                asyncio.run(measure(Path(folder), shape, options.rounds))
    print(f"peak RSS {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
