"""Readings into MariaDB: our sink against the barest `executemany` of ready-made rows by the same driver.

The baseline is asyncmy alone: rows as tuples in memory, one `executemany` (a multi-row INSERT … ON DUPLICATE KEY
UPDATE) and one commit per call, into a table like ours (same key, same partitions). Ours starts from decoded records
(`sink`) or from the journal's bytes (`decode + sink`), and also keeps the latest reading of every point, the gateway's
last sign of life, the gaps' accounts and the cursor, in the same transaction. Both take turns on the same server,
pinned to one core; the measured side has the other. What is compared is the median of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import resource
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence

import asyncmy
import msgspec

from cloud.decode import Decoder
from cloud.journal.contract import Stored
from cloud.sinks.contract import Record
from cloud.sinks.mysql import MySqlSink
from config.cloud import MySQL
from drivers.contract import Point, Scan, ValueType
from sync.wire import ClockRow, Packing, encode_scan, layout_of, seal
from tests.servers import run

S = 1_000_000_000
INSERT = (
    "INSERT INTO bare VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)"
    " ON DUPLICATE KEY UPDATE received_at_ns = bare.received_at_ns"
)
BareRow = tuple[int, int, int, int, float, None, int, int, int]


class Figure(msgspec.Struct):
    rows: int
    seconds: float
    cpu_s: float

    @property
    def rows_per_s(self) -> float:
        return self.rows / self.seconds


def batches(count: int, scans: int, points: int, first: int) -> list[Stored]:
    """What the journal would hold: scaled 16-bit registers, one scan a second."""
    columns = tuple(Point(name=f"p{i}", type=ValueType.U16, scale=0.1, unit="Cel") for i in range(points))
    layout = layout_of("boiler", "modbus", "heating", columns)
    packing = Packing(layout)
    wall_ns = time.time_ns() // S * S - 40_000 * S
    made = []
    for n in range(count):
        start = first + n * scans
        frames = [
            encode_scan(
                packing, Scan(seq * S, columns, [(seq * 7 + i * 13) % 4000 for i in range(points)]), 1
            )
            for seq in range(start, start + scans)
        ]
        sealed = seal(
            "acme/plant-1",
            7,
            start,
            frames,
            [layout],
            [ClockRow(1, "boot", 0, wall_ns, True)],
            scans * points,
        )
        made.append(
            Stored(
                start, "acme/plant-1", 7, start, sealed.last, scans * points, wall_ns + sealed.last * S + S,
                ((start, sealed.last),), sealed.payload,
            )
        )  # fmt: skip
    return made


async def timed(rows: int, work: Callable[[], Awaitable[None]]) -> Figure:
    cpu, wall = time.process_time(), time.perf_counter()
    await work()
    return Figure(rows, time.perf_counter() - wall, time.process_time() - cpu)


class Bare:
    """asyncmy alone."""

    def __init__(self, conn: asyncmy.Connection) -> None:
        self._conn = conn

    async def write(self, calls: Sequence[Sequence[BareRow]]) -> None:
        async with self._conn.cursor() as cursor:
            for rows in calls:
                await cursor.executemany(INSERT, rows)
                await self._conn.commit()


def ready(records: Sequence[Record]) -> list[BareRow]:
    rows: list[BareRow] = []
    for record in records:
        for i, value in enumerate(record.values):  # type: ignore[union-attr]
            rows.append(
                (i + 1, record.taken_at_ns, 7, record.seq, value, None, 0, 1, record.received_at_ns)  # type: ignore[union-attr]
            )
    return sorted(rows, key=lambda row: row[:4])


async def measure(server: run.MariaDb, *, points: int, per_call: int, rounds: int, calls: int) -> None:
    """`per_call` batches of 60 scans go into one call, as the runner would give them."""
    settings = MySQL(
        host=server.host, port=server.port, user=server.user, password_env="UNUSED", database=server.database
    )
    sink = MySqlSink(settings, server.password)
    await sink.open()
    conn = await asyncmy.connect(
        host=server.host,
        port=server.port,
        user=server.user,
        password=server.password,
        database=server.database,
    )
    async with conn.cursor() as cursor:
        await cursor.execute("CREATE TABLE IF NOT EXISTS bare LIKE readings")
    decoder = Decoder()
    figures: dict[str, list[Figure]] = {"bare": [], "sink": [], "decode + sink": []}
    first = 1
    for n in range(rounds + 1):
        groups: dict[str, list[list[Stored]]] = {}
        for name in figures:
            made = batches(calls * per_call, 60, points, first)
            first = made[-1].last + 1
            groups[name] = [made[at : at + per_call] for at in range(0, len(made), per_call)]
        rows = calls * per_call * 60 * points
        bare_calls = [ready(_records(decoder, group)) for group in groups["bare"]]
        sink_calls = [_records(decoder, group) for group in groups["sink"]]

        async def through(calls: Sequence[Sequence[Record]] = sink_calls) -> None:
            for records in calls:
                await sink.write(records, records[-1].offset)

        async def decoded(groups: Sequence[Sequence[Stored]] = groups["decode + sink"]) -> None:
            for group in groups:
                records = _records(decoder, group)
                await sink.write(records, records[-1].offset)

        async def alone(calls: Sequence[Sequence[BareRow]] = bare_calls) -> None:
            await Bare(conn).write(calls)

        figure = {
            "bare": await timed(rows, alone),
            "sink": await timed(rows, through),
            "decode + sink": await timed(rows, decoded),
        }
        if n:  # the first round warms caches and makes partitions
            for name, one in figure.items():
                figures[name].append(one)
    await sink.close()
    conn.close()
    report(figures, points, per_call)


def _records(decoder: Decoder, group: Sequence[Stored]) -> list[Record]:
    return [record for stored in group for record in decoder.decode(stored).records]


def report(figures: dict[str, list[Figure]], points: int, per_call: int) -> None:
    print(f"{points} points, {per_call * 60} scans ({per_call * 60 * points} rows) a call")
    base = statistics.median(f.rows_per_s for f in figures["bare"])
    for name, found in figures.items():
        speed = statistics.median(f.rows_per_s for f in found)
        per_cpu = sum(f.rows for f in found) / sum(f.cpu_s for f in found)
        print(
            f"  {name:14} {speed:9,.0f} rows/s  {speed / base:6.1%} of bare  {per_cpu:9,.0f} rows/CPU-second"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        if len(cores) > 1:
            os.sched_setaffinity(0, {cores[-1]})
            server = stack.enter_context(run.mariadb(extra=("--innodb-buffer-pool-size=256M",)))
            os.sched_setaffinity(0, {cores[0]})
        else:
            server = stack.enter_context(run.mariadb())
        for points, per_call, calls in ((32, 1, 24), (32, 8, 4), (125, 2, 4)):
            asyncio.run(measure(server, points=points, per_call=per_call, rounds=options.rounds, calls=calls))
    print(f"peak RSS {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
