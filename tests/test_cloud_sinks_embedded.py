"""The embedded store: the conformance of every sink, and what only SQLite does."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from cloud.sinks.contract import Record, Rejection, SinkBroken, StoreChanged
from cloud.sinks.embedded import DELETE_ROWS, FILE, EmbeddedSink, embedded_registry
from cloud.sinks.sql import ROWS_PER_STATEMENT
from drivers.contract import Quality, Reason
from tests.sink_conformance import (
    DAY,
    EPOCH,
    RefusingSinkConformance,
    S,
    Store,
    Told,
    event,
    gap,
    layout,
    now_ns,
    scan,
    some,
)

AUDIT = """
SELECT g.tenant || '/' || g.name, d.name, p.name, r.taken_at_ns,
       CASE p.type WHEN 'str' THEN r.text ELSE r.value END
FROM readings r JOIN points p ON p.id = r.point_id JOIN devices d ON d.id = p.device_id
JOIN gateways g ON g.id = d.gateway_id ORDER BY 1, 2, 3, 4, r.seq
"""


class Folder(Store):
    remembers = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def sink(
        self, *, retention_days: float = 31.0, clock_ns: Callable[[], int] = time.time_ns
    ) -> EmbeddedSink:
        return EmbeddedSink(self.folder, retention_days=retention_days, clock_ns=clock_ns)

    def rows(self, query: str) -> list[tuple[object, ...]]:
        with sqlite3.connect(f"file:{self.folder / FILE}?mode=ro", uri=True) as db:
            found = db.execute(query).fetchall()
        db.close()
        return found

    async def readings(self) -> list[Told]:
        return sorted(msgspec.convert(row, Told) for row in map(_told, self.rows(AUDIT)))

    def refusable(self) -> Record:
        return scan(99, (1.0,), at_ns=now_ns(), of=layout(("x", "f64", "V"), device="d" * 256))


def _told(row: tuple[object, ...]) -> dict[str, object]:
    return dict(zip(Told.__struct_fields__, row, strict=True))


@pytest.fixture
def store(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "data")


class TestEmbedded(RefusingSinkConformance):
    """SQLite holds to what every sink promises."""


async def test_old_readings_go_in_small_transactions_and_the_rest_stays(store: Folder) -> None:
    sink = store.sink(retention_days=2.0)
    await sink.open()
    at_ns = now_ns()
    of = layout(("x", "u16", ""))
    old = [
        scan(n, (n,), at_ns=at_ns - DAY + n, of=of, received_at_ns=at_ns)
        for n in range(1, DELETE_ROWS + 1002)
    ]
    for at in range(0, len(old), 5000):
        await sink.write(old[at : at + 5000], at + 1)
    await sink.write([scan(10**6, (1,), at_ns=at_ns, of=of), event(10**6 + 1, at_ns=at_ns - 2 * DAY)], 10**6)
    await sink.maintain(at_ns + DAY + S)
    assert store.rows("SELECT count(*), max(taken_at_ns) FROM readings") == [(1, at_ns)]
    assert store.rows("SELECT count(*) FROM events") == [(0,)]
    assert store.rows("SELECT seq FROM latest") == [(10**6,)]
    await sink.close()


async def test_older_than_the_retention_is_refused_with_that_reason(store: Folder) -> None:
    sink = store.sink(retention_days=2.0)
    await sink.open()
    at_ns = now_ns()
    records = [scan(1, (1.0, 2.0, 3), at_ns=at_ns - 3 * DAY), scan(2, (1.0, 2.0, 3), at_ns=at_ns)]
    settled = await sink.write(records, 2)
    await sink.close()
    assert settled.rejected == (Rejection(0, "older than retention", expired=True),)
    assert len(await store.readings()) == 3


async def test_no_retention_keeps_the_year_2000(store: Folder) -> None:
    sink = store.sink(retention_days=0.0)
    await sink.open()
    await sink.write([scan(1, (1.0, 2.0, 3), at_ns=946_684_800 * S)], 1)
    await sink.maintain(time.time_ns())
    await sink.close()
    assert len(await store.readings()) == 3


async def test_a_store_swapped_under_the_sink_is_noticed_before_anything_is_written(store: Folder) -> None:
    sink = store.sink()
    await sink.open()
    await sink.write(some(2, at_ns=now_ns()), 5)
    with sqlite3.connect(store.folder / FILE) as db:
        db.execute("UPDATE cursors SET upto_offset = 3")
    db.close()
    with pytest.raises(StoreChanged, match=r"does not remember offset \[5\]"):
        await sink.write(some(2, at_ns=now_ns(), first=3), 6)
    assert len(await store.readings()) == 6
    assert await sink.open() == 3
    await sink.write(some(2, at_ns=now_ns(), first=3), 6)
    await sink.close()
    assert len(await store.readings()) == 12


async def test_latest_moves_forward_only(store: Folder) -> None:
    sink = store.sink()
    await sink.open()
    at_ns = now_ns()
    await sink.write([scan(5, (5.0, 1.0, 1), at_ns=at_ns), scan(4, (4.0, 1.0, 1), at_ns=at_ns + S)], 1)
    await sink.write([scan(6, (6.0, 1.0, 1), at_ns=at_ns - S)], 2)
    await sink.write([scan(7, (7.0, 1.0, 1), at_ns=at_ns + S)], 3)
    await sink.write([scan(5, (5.0, 1.0, 1), at_ns=at_ns), scan(4, (4.0, 1.0, 1), at_ns=at_ns + S)], 4)
    await sink.close()
    registry = embedded_registry(store.folder)
    (gateway,) = await registry.gateways()
    newest = await registry.latest(gateway.id)
    await registry.close()
    assert [(r.point, r.value, r.key.seq) for r in newest] == [
        ("flow", 7.0, 7),
        ("return", 1.0, 7),
        ("starts", 1.0, 7),
    ]


async def test_values_that_no_double_holds_stay_exact_and_bad_ones_say_why(store: Folder) -> None:
    sink = store.sink()
    await sink.open()
    at_ns = now_ns()
    of = layout(
        ("energy", "u64", "Wh"), ("small", "i64", ""), ("t", "f32", "Cel"), ("s", "str", ""), ("b", "bool", "")
    )  # fmt: skip
    await sink.write(
        [
            scan(1, (2**64 - 1, -(2**53), 1.5, "", True), at_ns=at_ns, of=of, synchronized=False),
            scan(2, (2**53 + 1, -5, None, None, False), at_ns=at_ns + S, of=of,
                 reasons={2: Reason.NAN, 3: Reason.MISSING, 4: Reason.STUCK}),
        ],
        1,
    )  # fmt: skip
    await sink.close()
    registry = embedded_registry(store.folder)
    (gateway,) = await registry.gateways()
    found = {(r.point, r.key.seq): r async for r in registry.readings(gateway.id)}
    await registry.close()
    assert {key: r.value for key, r in found.items()} == {
        ("energy", 1): 2**64 - 1, ("energy", 2): 2**53 + 1, ("small", 1): -(2**53), ("small", 2): -5,
        ("t", 1): 1.5, ("t", 2): None, ("s", 1): "", ("s", 2): None, ("b", 1): True, ("b", 2): False,
    }  # fmt: skip
    assert {key: (r.quality, r.reason) for key, r in found.items() if key[1] == 2} == {
        ("energy", 2): (Quality.GOOD, Reason.GOOD), ("small", 2): (Quality.GOOD, Reason.GOOD),
        ("t", 2): (Quality.BAD, Reason.NAN), ("s", 2): (Quality.BAD, Reason.MISSING),
        ("b", 2): (Quality.UNCERTAIN, Reason.STUCK),
    }  # fmt: skip
    assert {(r.quality, r.reason, r.clock_synchronized) for key, r in found.items() if key[1] == 1} == {
        (Quality.UNCERTAIN, Reason.CLOCK, False)
    }


async def test_a_gap_counts_only_what_never_arrived(store: Folder) -> None:
    sink = store.sink()
    await sink.open()
    at_ns = now_ns()

    def lost() -> list[tuple[object, ...]]:
        return store.rows("SELECT seq, lost_scans, lost_readings FROM gaps ORDER BY seq")

    missing = gap(100, 10, 19, 30, at_ns=at_ns)
    wholly_held = msgspec.structs.replace(gap(101, 20, 29, 30, at_ns=at_ns), held=((20, 29),))
    await sink.write([missing, wholly_held], 1)
    assert lost() == [(100, 10, 30), (101, 0, 0)]
    # Three of them come after all, in front of a gap that says so, and behind one that did not know.
    await sink.write(some(3, at_ns=at_ns, first=10), 2)
    assert lost() == [(100, 7, 21), (101, 0, 0)]
    await sink.write(some(2, at_ns=at_ns, first=40), 3)
    partly_held = msgspec.structs.replace(gap(102, 38, 41, 12, at_ns=at_ns), held=((40, 41),))
    await sink.write([partly_held, missing], 4)
    assert lost() == [(100, 7, 21), (101, 0, 0), (102, 2, 6)]
    # A restart forgets no gap.
    await sink.open()
    await sink.write(some(1, at_ns=at_ns, first=13), 5)
    assert lost() == [(100, 6, 18), (101, 0, 0), (102, 2, 6)]
    await sink.close()
    registry = embedded_registry(store.folder)
    (tally,) = await registry.tally()
    await registry.close()
    assert (tally.gateway, tally.readings, tally.gap_readings, tally.gap_scans) == ("plant-1", 18, 24, 8)


async def test_texts_names_and_events_beyond_a_column_are_refused_alone(store: Folder) -> None:
    sink = store.sink()
    await sink.open()
    at_ns = now_ns()
    of = layout(
        ("ok", "u16", ""), ("s", "str", ""), ("n" * 256, "u16", ""), ("ok", "u16", ""), ("", "u16", "")
    )
    records: list[Record] = [
        scan(1, (1, "ß" * 40_000, 3, 4, 5), at_ns=at_ns, of=of),
        event(2, at_ns=at_ns, text="e" * 70_000),
        event(3, at_ns=at_ns),
    ]
    settled = await sink.write(records, 1)
    await sink.close()
    assert sorted((r.index, r.points) for r in settled.rejected) == [
        (0, (1,)),
        (0, (2,)),
        (0, (3,)),
        (0, (4,)),
        (1, ()),
    ]
    assert await store.readings() == [Told("acme/plant-1", "boiler", "ok", at_ns, 1)]
    assert store.rows("SELECT seq FROM events") == [(3,)]


async def test_more_rows_than_one_statement_takes_are_one_transaction(store: Folder) -> None:
    sink = store.sink()
    await sink.open()
    of = layout(*((f"p{i}", "u16", "") for i in range(1000)))
    at_ns = now_ns()
    count = ROWS_PER_STATEMENT // 1000 + 2
    await sink.write([scan(n, range(1000), at_ns=at_ns + n, of=of) for n in range(1, count + 1)], 1)
    await sink.close()
    assert store.rows("SELECT count(*) FROM readings") == [(count * 1000,)]
    assert store.rows("SELECT DISTINCT epoch FROM readings") == [(EPOCH,)]


async def test_a_file_that_is_no_database_stops_the_sink_with_the_remedy(store: Folder) -> None:
    store.folder.mkdir(parents=True)
    (store.folder / FILE).write_bytes(b"not a database, and long enough to look at" * 100)
    with pytest.raises(SinkBroken, match="move it aside"):
        await store.sink().open()


async def test_a_folder_that_cannot_be_made_stops_the_sink_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SinkBroken, match="writable"):
        await EmbeddedSink(tmp_path / "file" / "data").open()


async def test_stores_opened_at_one_time_all_get_their_schema(tmp_path: Path) -> None:
    stores = [Folder(tmp_path / str(n)) for n in range(3)]
    sinks = [store.sink() for store in stores]
    assert await asyncio.gather(*(sink.open() for sink in sinks)) == [0, 0, 0]
    for sink, store in zip(sinks, stores, strict=True):
        assert (await sink.write([scan(1, (1.0, 2.0, 3), at_ns=now_ns())], 1)).rejected == ()
        await sink.close()
        assert len(await store.readings()) == 3
