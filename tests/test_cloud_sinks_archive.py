"""The archive holds each reading once, whatever is repeated, torn or lost on the way (in a bucket: *_minio.py)."""

from __future__ import annotations

import asyncio
import datetime
import errno
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import cast

import duckdb
import pyarrow as pa
import pytest
from deltalake import DeltaTable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloud.sinks import archive_columns
from cloud.sinks.archive import ArchiveSink
from cloud.sinks.contract import (
    EventRecord,
    GapRecord,
    Record,
    RetryLater,
    ScanRecord,
    SinkBroken,
    StoreChanged,
)
from config.cloud import Archive
from drivers.contract import Reason, Value
from sync.wire import EventFrame, GapFrame, Layout, layout_id
from tests.sink_conformance import SinkConformance, Store, Told

S = 1_000_000_000
DAY = 86_400 * S
AT = 1_795_446_640_123_456_789
LOCAL = Archive(commit_interval_s=1.0)


def layout(
    *points: tuple[str, str], device: str = "boiler", tags: tuple[tuple[str, str], ...] = ()
) -> Layout:
    n = len(points)
    return Layout(
        device, "modbus", "heat", tuple(p for p, _ in points), tuple(t for _, t in points),
        tuple("bar" for _ in points), (1.0,) * n, (0.0,) * n, tags,
    )  # fmt: skip


TWO = layout(("flow", "f64"), ("pump", "bool"))


def scan(
    offset: int,
    seq: int,
    *values: Value | None,
    of: Layout = TWO,
    at_ns: int = AT,
    reasons: dict[int, Reason] | None = None,
    tenant: str = "acme",
    gateway: str = "plant-1",
    epoch: int = 7,
) -> ScanRecord:
    return ScanRecord(
        offset, tenant, gateway, epoch, seq, of, layout_id(of), at_ns, True, at_ns + S,
        list(values or (seq + 0.5, seq % 2 == 0)), reasons or {}, 3, 1000 + seq,
    )  # fmt: skip


def gap(offset: int, seq: int) -> GapRecord:
    frame = GapFrame(7, 3, 5, 3, 12, "evicted", "boiler", 1, 0, 1)
    return GapRecord(offset, "acme", "plant-1", 7, seq, frame, AT, AT + S, AT, held=((3, 3), (5, 5)))


def event(offset: int, seq: int) -> EventRecord:
    return EventRecord(offset, "acme", "plant-1", 7, seq, EventFrame(1, 0, "start", "hello"), AT, AT)


def rows(folder: Path, table: str = "readings") -> list[dict[str, object]]:
    found: list[dict[str, object]] = DeltaTable(str(folder / table)).to_pyarrow_table().to_pylist()
    return found


def identities(folder: Path) -> list[tuple[object, ...]]:
    return sorted(
        (row["tenant"], row["gateway"], row["epoch"], row["seq"], row["point"]) for row in rows(folder)
    )


async def opened(folder: Path, archive: Archive = LOCAL) -> ArchiveSink:
    sink = ArchiveSink(archive, folder)
    await sink.open()
    return sink


async def test_a_scan_is_one_row_per_reading_with_all_that_is_known_of_it(tmp_path: Path) -> None:
    sink = await opened(tmp_path)
    of = layout(
        ("a", "f64"), ("b", "bool"), ("c", "str"), ("d", "u64"), ("e", "i16"), tags=(("site", "ä 1"),)
    )
    await sink.write(
        [
            scan(
                1, 1, 1.5, True, 'x "y"', 2**64 - 1, None, of=of, reasons={0: Reason.STUCK, 4: Reason.TIMEOUT}
            )
        ],
        1,
    )
    await sink.close()
    found = {str(row.pop("point")): row for row in rows(tmp_path)}
    assert found["a"] == {
        "day": datetime.date(2026, 11, 23), "tenant": "acme", "gateway": "plant-1", "device": "boiler",
        "taken_at": datetime.datetime(2026, 11, 23, 15, 10, 40, 123456, datetime.UTC), "taken_at_ns": AT,
        "epoch": 7, "seq": 1, "value": 1.5, "text": None, "quality": "uncertain", "reason": "stuck", "unit": "bar",
        "type": "f64", "measurement": "heat", "labels": '{"site": "ä 1"}',
        "received_at": datetime.datetime(2026, 11, 23, 15, 10, 41, 123456, datetime.UTC),
        "clock_synchronized": True, "boot": 3, "boot_ns": 1001, "driver": "modbus",
        "earliest_ns": None, "latest_ns": None,
    }  # fmt: skip
    brief = {name: (r["value"], r["text"], r["quality"], r["reason"]) for name, r in found.items()}
    assert brief == {
        "a": (1.5, None, "uncertain", "stuck"),
        "b": (1.0, None, "good", None),
        "c": (None, 'x "y"', "good", None),
        "d": (float(2**64 - 1), "18446744073709551615", "good", None),
        "e": (None, None, "bad", "timeout"),
    }


async def test_a_reading_without_a_value_has_a_reason_even_where_none_was_given(tmp_path: Path) -> None:
    sink = await opened(tmp_path)
    of = layout(("a", "f64"), ("s", "str"))
    await sink.write([scan(1, 1, None, None, of=of), scan(1, 2, 1.0, "x", of=of)], 1)
    await sink.close()
    reasons = sorted((str(row["point"]), row["seq"], row["reason"]) for row in rows(tmp_path))
    assert reasons == [("a", 1, "missing"), ("a", 2, None), ("s", 1, "missing"), ("s", 2, None)]


async def test_gaps_and_events_have_tables_of_their_own(tmp_path: Path) -> None:
    sink = await opened(tmp_path)
    for _ in range(2):
        await sink.write([gap(1, 1), event(1, 2), scan(1, 3)], 1)
    await sink.write([gap(2, 4), event(3, 5)], 3)
    await sink.close()
    assert [(r["scans"], r["readings"], r["held"], r["seq"]) for r in rows(tmp_path, "gaps")] in (
        [(3, 12, "3-3 5-5", 1), (3, 12, "3-3 5-5", 4)],
        [(3, 12, "3-3 5-5", 4), (3, 12, "3-3 5-5", 1)],
    )
    assert sorted((str(r["code"]), str(r["text"]), r["seq"]) for r in rows(tmp_path, "events")) == [
        ("start", "hello", 2), ("start", "hello", 5),
    ]  # fmt: skip
    assert len(rows(tmp_path)) == 2


async def test_open_tells_the_offset_that_the_store_remembers(tmp_path: Path) -> None:
    sink = ArchiveSink(LOCAL, tmp_path)
    assert await sink.open() == 0
    await sink.write([scan(4, 1)], 5)
    await sink.write([], 9)
    await sink.close()
    assert await ArchiveSink(LOCAL, tmp_path).open() == 9
    shutil.rmtree(tmp_path / "readings")
    assert await ArchiveSink(LOCAL, tmp_path).open() == 0


async def test_the_same_call_again_changes_nothing(tmp_path: Path) -> None:
    records = [scan(offset, offset * 10 + i) for offset in (1, 2) for i in range(3)]
    for _ in range(3):
        sink = await opened(tmp_path)
        await sink.write(records, 2)
        await sink.write(records, 2)
        await sink.close()
    assert len(identities(tmp_path)) == len(set(identities(tmp_path))) == 12


async def test_a_replayed_point_joins_the_points_of_its_scan_that_are_there(tmp_path: Path) -> None:
    sink = await opened(tmp_path)
    only_flow = layout(("flow", "f64"))
    await sink.write([scan(1, 1, 1.5, of=only_flow), scan(1, 2)], 1)
    await sink.write([scan(8, 3)], 8)
    await sink.write([scan(1, 1, 1.5, True), scan(1, 2), scan(1, 4)], 8)
    await sink.close()
    assert identities(tmp_path) == [
        ("acme", "plant-1", 7, seq, point) for seq in (1, 2, 3, 4) for point in ("flow", "pump")
    ]
    assert [row["value"] for row in rows(tmp_path) if (row["seq"], row["point"]) == (1, "pump")] == [1.0]


async def test_halves_written_under_the_old_offset_are_not_doubled_by_the_whole(tmp_path: Path) -> None:
    """What the runner does when it bisects, and then dies before the cursor moves."""
    records = [scan(offset, offset) for offset in range(1, 9)]
    sink = await opened(tmp_path)
    await sink.write(records[:4], 0)
    await sink.write(records[4:6], 0)
    await sink.close()
    sink = ArchiveSink(LOCAL, tmp_path)
    assert await sink.open() == 0
    await sink.write(records, 8)
    await sink.close()
    assert len(identities(tmp_path)) == len(set(identities(tmp_path))) == 16


async def test_a_crash_between_the_tables_doubles_no_gap(tmp_path: Path) -> None:
    sink = await opened(tmp_path)
    await sink.write([scan(1, 1)], 1)
    await sink.close()
    shutil.copytree(tmp_path / "readings", tmp_path / "before")
    sink = await opened(tmp_path)
    await sink.write([gap(2, 2), event(2, 3), scan(2, 4)], 2)
    await sink.close()
    shutil.rmtree(tmp_path / "readings")
    (tmp_path / "before").rename(tmp_path / "readings")
    sink = ArchiveSink(LOCAL, tmp_path)
    assert await sink.open() == 1
    await sink.write([gap(2, 2), event(2, 3), scan(2, 4), gap(3, 5)], 3)
    await sink.close()
    assert (len(rows(tmp_path, "gaps")), len(rows(tmp_path, "events")), len(rows(tmp_path))) == (2, 1, 4)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
async def test_any_order_of_calls_repeats_and_restarts_stores_each_reading_once(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    rng = random.Random(seed)
    folder = tmp_path_factory.mktemp("archive")
    records: list[Record] = [
        scan(offset, offset * 100 + i, at_ns=AT - rng.randrange(3) * DAY, gateway=f"g{rng.randrange(2)}",
             tenant=f"t{rng.randrange(2)}", of=layout(("a", "f64"), ("b", "f64"), device=f"d{rng.randrange(3)}"))
        for offset in range(1, 7) for i in range(rng.randrange(1, 4))
    ]  # fmt: skip
    sink = await opened(folder)
    upto = 0
    while upto < 6:
        move = rng.randrange(5)
        if move == 0:
            await sink.close()
            assert await sink.open() == upto
        elif move == 1:
            await sink.write(rng.sample(records, rng.randrange(len(records))), upto)
        elif move == 2:
            await sink.maintain(AT + rng.randrange(10) * 3600 * S)
        else:
            then = rng.randrange(upto + 1, 7)
            await sink.write([r for r in records if upto < r.offset <= then], then)
            upto = then
    await sink.close()
    found = identities(folder)
    assert len(found) == len(set(found)) == 2 * len(records)


async def test_rows_lie_in_the_partition_of_their_day_and_tenant(tmp_path: Path) -> None:
    sink = await opened(tmp_path)
    await sink.write([scan(1, 1), scan(1, 2, at_ns=AT - DAY), scan(1, 3, tenant="other")], 1)
    await sink.close()
    parts = sorted((p["day"], p["tenant"]) for p in DeltaTable(str(tmp_path / "readings")).partitions())
    assert parts == [("2026-11-22", "acme"), ("2026-11-23", "acme"), ("2026-11-23", "other")]


async def test_duckdb_and_pyarrow_read_what_was_written(tmp_path: Path) -> None:
    sink = await opened(tmp_path)
    await sink.write([scan(i, i) for i in range(1, 101)], 100)
    await sink.maintain(AT)
    await sink.close()
    readings = DeltaTable(str(tmp_path / "readings")).to_pyarrow_dataset()  # noqa: F841 - DuckDB finds it by its name
    found = (
        duckdb.connect()
        .execute(
            "SELECT point, count(*), sum(value), min(taken_at_ns) FROM readings WHERE tenant = 'acme'"
            " AND day = DATE '2026-11-23' GROUP BY point ORDER BY point"
        )
        .fetchall()
    )
    assert found == [("flow", 100, sum(i + 0.5 for i in range(1, 101)), AT), ("pump", 100, 50.0, AT)]
    files = DeltaTable(str(tmp_path / "readings")).file_uris()
    assert duckdb.connect().execute(f"SELECT count(*) FROM read_parquet({files!r})").fetchall() == [(200,)]


async def test_a_reader_passes_over_the_files_that_cannot_hold_what_it_seeks(tmp_path: Path) -> None:
    sink = await opened(tmp_path)
    for i in range(5):
        await sink.write([scan(i + 1, i * 10 + k, gateway=f"g{i}") for k in range(1, 5)], i + 1)
    await sink.close()
    stats = DeltaTable(str(tmp_path / "readings")).get_add_actions(flatten=True)
    table = pa.table(stats)
    assert sorted(zip(table["min.seq"].to_pylist(), table["max.seq"].to_pylist(), strict=True)) == [
        (i * 10 + 1, i * 10 + 4) for i in range(5)
    ]
    assert table["min.gateway"].to_pylist() == table["max.gateway"].to_pylist()
    assert set(table["num_records"].to_pylist()) == {8}


async def test_compaction_joins_files_and_forgets_neither_rows_nor_offset(tmp_path: Path) -> None:
    sink = await opened(tmp_path)
    for i in range(1, 13):
        await sink.write([scan(i, i)], i)
    assert len(DeltaTable(str(tmp_path / "readings")).file_uris()) == 12
    await sink.maintain(AT)
    assert len(DeltaTable(str(tmp_path / "readings")).file_uris()) == 1
    await sink.write([scan(3, 3), scan(13, 13)], 13)
    await sink.close()
    assert len(set(identities(tmp_path))) == len(identities(tmp_path)) == 26
    assert await ArchiveSink(LOCAL, tmp_path).open() == 13


async def test_a_hundred_commits_make_a_checkpoint_that_keeps_the_offset(tmp_path: Path) -> None:
    sink = await opened(tmp_path)
    for i in range(1, 131):
        await sink.write([scan(i, i)] if i % 10 == 0 else [], i)
    await sink.close()
    assert list((tmp_path / "readings" / "_delta_log").glob("*.checkpoint*.parquet"))
    assert await ArchiveSink(LOCAL, tmp_path).open() == 130


async def test_days_past_their_retention_go_and_later_ones_stay(tmp_path: Path) -> None:
    sink = await opened(tmp_path, Archive(retention_days=10))
    await sink.write([scan(1, i, at_ns=AT - i * DAY) for i in range(1, 21)], 1)
    await sink.maintain(AT)
    ages = sorted(
        (AT - int(str(row["taken_at_ns"]))) // DAY for row in rows(tmp_path) if row["point"] == "flow"
    )
    assert ages == list(range(1, 11))
    await sink.close()
    assert await ArchiveSink(LOCAL, tmp_path).open() == 1


async def test_vacuum_keeps_what_the_table_needs_and_a_weeks_versions(tmp_path: Path) -> None:
    sink = await opened(tmp_path)
    for i in range(1, 4):
        await sink.write([scan(i, i)], i)
    await sink.maintain(AT)
    await sink.close()
    assert len(identities(tmp_path)) == 6
    assert (
        len(list((tmp_path / "readings").rglob("*.parquet"))) == 4
    )  # the three that were joined, and the one


# --- the suite of every sink ---


class Folder(Store):
    remembers = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def sink(self) -> ArchiveSink:
        return ArchiveSink(LOCAL, self.folder)

    async def readings(self) -> list[Told]:
        found = [told(row) for row in rows(self.folder)]
        return sorted(found, key=lambda one: (one.gateway, one.device, one.point, one.taken_at_ns))


def told(row: dict[str, object]) -> Told:
    value = row["text"] if row["type"] == "str" else row["value"]
    if row["type"] == "bool" and value is not None:
        value = bool(value)
    gateway = f"{row['tenant']}/{row['gateway']}"
    return Told(
        gateway,
        str(row["device"]),
        str(row["point"]),
        int(str(row["taken_at_ns"])),
        cast("Value | None", value),
    )


@pytest.fixture
def store(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "archive")


class TestArchive(SinkConformance):
    """The archive in a folder holds to what every sink promises."""


# --- what a power cut leaves ---


def newest(folder: Path, pattern: str = "*.json") -> Path:
    return max((folder / "readings" / "_delta_log").glob(pattern))


@pytest.mark.parametrize("left", [b"", b'{"commitInfo":{"timest', b"\0" * 300])
async def test_a_torn_entry_of_the_log_is_set_aside_and_its_rows_written_again(
    tmp_path: Path, left: bytes
) -> None:
    sink = await opened(tmp_path)
    await sink.write([scan(1, 1)], 1)
    await sink.write([scan(2, 2)], 2)
    await sink.close()
    newest(tmp_path).write_bytes(left)
    sink = ArchiveSink(LOCAL, tmp_path)
    assert await sink.open() == 1
    await sink.write([scan(2, 2)], 2)
    await sink.close()
    assert len(identities(tmp_path)) == len(set(identities(tmp_path))) == 4
    assert list((tmp_path / "readings" / "_delta_log").glob("*.torn-*"))


@pytest.mark.parametrize("left", [None, 0, 100])
async def test_an_entry_that_names_a_torn_file_is_set_aside(tmp_path: Path, left: int | None) -> None:
    sink = await opened(tmp_path)
    await sink.write([scan(1, 1)], 1)
    before = set((tmp_path / "readings").rglob("*.parquet"))
    await sink.write([scan(2, 2)], 2)
    await sink.close()
    (file,) = set((tmp_path / "readings").rglob("*.parquet")) - before
    if left is None:
        file.unlink()
    else:
        os.truncate(file, left)
    sink = ArchiveSink(LOCAL, tmp_path)
    assert await sink.open() == 1
    await sink.write([scan(2, 2)], 2)
    await sink.close()
    assert len(identities(tmp_path)) == len(set(identities(tmp_path))) == 4


async def test_a_torn_compaction_gives_back_the_files_that_it_joined(tmp_path: Path) -> None:
    sink = await opened(tmp_path)
    for i in range(1, 6):
        await sink.write([scan(i, i)], i)
    await sink.maintain(AT)
    await sink.close()
    (joined,) = DeltaTable(str(tmp_path / "readings")).file_uris()
    os.truncate(joined, 50)
    sink = ArchiveSink(LOCAL, tmp_path)
    assert await sink.open() == 5
    await sink.close()
    assert len(identities(tmp_path)) == 10


async def test_a_torn_checkpoint_is_set_aside(tmp_path: Path) -> None:
    sink = await opened(tmp_path)
    for i in range(1, 102):
        await sink.write([scan(i, i)] if i < 3 else [], i)
    await sink.close()
    os.truncate(newest(tmp_path, "*.checkpoint*.parquet"), 20)
    sink = ArchiveSink(LOCAL, tmp_path)
    assert await sink.open() == 101
    await sink.close()
    assert len(identities(tmp_path)) == 4


async def test_files_that_were_joined_and_deleted_since_are_no_tear(tmp_path: Path) -> None:
    sink = await opened(tmp_path)
    for i in range(1, 4):
        await sink.write([scan(i, i)], i)
    await sink.maintain(AT)
    await sink.close()
    kept = DeltaTable(str(tmp_path / "readings")).file_uris()
    for file in (tmp_path / "readings").rglob("*.parquet"):
        if str(file) not in kept:
            file.unlink()
    assert await ArchiveSink(LOCAL, tmp_path).open() == 3
    assert not list((tmp_path / "readings" / "_delta_log").glob("*.torn-*"))
    assert len(identities(tmp_path)) == 6


async def test_data_is_on_disk_before_the_log_names_it_and_the_log_before_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = await opened(tmp_path)
    synced: list[str] = []
    real = os.fsync

    def noted(number: int) -> None:
        real(number)
        synced.append(Path(f"/proc/self/fd/{number}").readlink().name)

    monkeypatch.setattr(os, "fsync", noted)
    await sink.write([scan(1, 1)], 1)
    data = next(i for i, name in enumerate(synced) if name.endswith(".tmp"))
    entry = next(i for i, name in enumerate(synced) if name == newest(tmp_path).name)
    assert data < entry
    assert "_delta_log" in synced[entry:]
    assert "tenant=acme" in synced[data:entry]
    assert "day=2026-11-23" in synced[data:entry]
    await sink.close()


WRITER = """
import asyncio, sys
from pathlib import Path
from tests.test_cloud_sinks_archive import LOCAL, AT, ArchiveSink, scan

async def main() -> None:
    sink = ArchiveSink(LOCAL, Path(sys.argv[1]))
    offset = await sink.open() or 0
    while True:
        offset += 1
        await sink.write([scan(offset, offset * 10 + i) for i in range(5)], offset)
        print(offset, flush=True)
        if offset % 7 == 0:
            await sink.maintain(AT + offset * 3600 * 10**9)

asyncio.run(main())
"""


def test_a_writer_that_is_killed_at_any_moment_loses_and_doubles_nothing(tmp_path: Path) -> None:
    rng = random.Random(7)
    told = 0
    for _ in range(6):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert writer.stdout is not None
        for _ in range(rng.randrange(2, 12)):
            line = writer.stdout.readline()
            assert line, "the writer failed"
            told = int(line)
        time.sleep(rng.random() * 0.05)  # anywhere within a commit or a compaction
        writer.kill()
        rest = writer.stdout.read().split()
        told = int(rest[-1]) if rest else told
        writer.wait()
    offset = asyncio.run(ArchiveSink(LOCAL, tmp_path).open()) or 0
    assert offset - told in (0, 1)
    assert sorted({int(str(i[3])) for i in identities(tmp_path)}) == [
        n * 10 + i for n in range(1, offset + 1) for i in range(5)
    ]
    assert len(identities(tmp_path)) == len(set(identities(tmp_path))) == offset * 10


# --- what goes wrong ---


async def test_a_full_disk_is_retried_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = await opened(tmp_path)
    await sink.write([scan(1, 1)], 1)
    real = os.fsync

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RetryLater, match="No space left"):
        await sink.write([scan(2, 2)], 2)
    monkeypatch.setattr(os, "fsync", real)
    assert not list(tmp_path.rglob("*.tmp"))
    await sink.write([scan(2, 2)], 2)
    await sink.close()
    assert len(identities(tmp_path)) == len(set(identities(tmp_path))) == 4


async def test_a_table_that_was_emptied_under_us_is_noticed_and_filled_again(tmp_path: Path) -> None:
    sink = await opened(tmp_path)
    await sink.write([scan(1, 1)], 1)
    shutil.rmtree(tmp_path / "readings")
    with pytest.raises(StoreChanged):
        await sink.write([scan(2, 2)], 2)
    assert await sink.open() == 0
    await sink.write([scan(1, 1), scan(2, 2)], 2)
    await sink.close()
    assert len(identities(tmp_path)) == 4


async def test_a_table_restored_from_a_backup_under_us_is_noticed(tmp_path: Path) -> None:
    sink = await opened(tmp_path)
    await sink.write([scan(1, 1)], 1)
    shutil.copytree(tmp_path / "readings", tmp_path / "backup")
    await sink.write([scan(2, 2)], 2)
    shutil.rmtree(tmp_path / "readings")
    (tmp_path / "backup").rename(tmp_path / "readings")
    with pytest.raises(StoreChanged):
        await sink.write([scan(3, 3)], 3)
    assert await sink.open() == 1
    await sink.write([scan(2, 2), scan(3, 3)], 3)
    await sink.close()
    assert len(identities(tmp_path)) == 6


async def test_a_folder_that_cannot_be_made_stops_the_sink(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SinkBroken, match="folder must be writable"):
        await ArchiveSink(LOCAL, tmp_path / "file" / "archive").open()


async def test_another_writer_s_commit_is_seen_and_nothing_doubled(tmp_path: Path) -> None:
    first, second = await opened(tmp_path), await opened(tmp_path)
    await first.write([scan(1, 1)], 1)
    for _ in range(10):
        try:
            await second.write([scan(1, 1), scan(2, 2)], 2)
            break
        except RetryLater:
            continue
    await first.close()
    await second.close()
    assert len(identities(tmp_path)) == len(set(identities(tmp_path))) == 4


async def test_a_table_of_an_older_version_gets_the_columns_that_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = pa.schema([field for field in archive_columns.READINGS if field.name not in ("boot", "boot_ns")])
    DeltaTable.create(str(tmp_path / "readings"), older, partition_by=["day", "tenant"])
    sink = await opened(tmp_path)
    await sink.write([scan(1, 1)], 1)
    await sink.close()
    assert {row["boot_ns"] for row in rows(tmp_path)} == {1001}


async def test_the_limits_given_to_the_runner_are_the_settings(tmp_path: Path) -> None:
    sink = ArchiveSink(Archive(commit_interval_s=7.0, commit_mb=3), tmp_path)
    assert (sink.name, sink.linger_s, sink.max_bytes) == ("archive", 7.0, 3 * 1024 * 1024)
    with pytest.raises(RetryLater):
        await sink.write([scan(1, 1)], 1)


async def test_many_layouts_gateways_and_days_in_one_call_all_arrive(tmp_path: Path) -> None:
    sink = await opened(tmp_path)
    records: list[ScanRecord] = []
    for i in range(1, 400):
        of = layout(*((f"p{k}", "f64") for k in range(1 + i % 7)), device=f"d{i % 11}")
        records.append(
            scan(i, i, *(float(i * 10 + k) for k in range(1 + i % 7)), of=of, gateway=f"g{i % 5}",
                 at_ns=AT + (i % 3) * DAY)
        )  # fmt: skip
    await sink.write(records, 400)
    await sink.close()
    expected = {
        (r.gateway, r.layout.device, r.seq, name, r.taken_at_ns): value
        for r in records
        for name, value in zip(r.layout.names, r.values, strict=True)
    }
    found = {
        (r["gateway"], r["device"], r["seq"], r["point"], r["taken_at_ns"]): r["value"]
        for r in rows(tmp_path)
    }
    assert found == expected


async def test_the_query_of_the_readme_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "cloud" / "sinks" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    sink = await opened(tmp_path)
    await sink.write([scan(1, i, reasons={0: Reason.STUCK} if i == 3 else {}) for i in range(1, 11)], 1)
    await sink.close()
    code = code.replace("cloud-data/archive", str(tmp_path)).replace("duckdb.sql(", "found = duckdb.sql(")
    code = code.replace(").show()", ").fetchall()")
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102 - our own page
    assert names["found"] == [("boiler", "flow", 10, 6.0, 1), ("boiler", "pump", 10, 0.5, 0)]
