"""Readings into InfluxDB: our sink against posting ready-made line protocol to the same server.

The baseline has its bodies in memory (the same lines, 5,000 a request) and posts them by `http.client` over one
connection. Ours starts from decoded records (`sink`) or from the journal's bytes (`decode + sink`). All take turns,
each into a bucket of its own, and what is compared is the median of the rounds, and the fastest of each; influxd is
pinned to one core, the measured side has the other. On a busy machine influxd's own CPU time says more than the
wall's. `format` is the line writer alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import http.client
import json
import os
import resource
import statistics
import time
import urllib.request
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec

from cloud.decode import Decoder
from cloud.journal.contract import Stored
from cloud.sinks.contract import Record
from cloud.sinks.influxdb import InfluxSink
from cloud.sinks.line_protocol import LineWriter
from config.cloud import InfluxDB
from drivers.contract import Point, Scan, ValueType
from sync.wire import ClockRow, Packing, encode_scan, layout_of, seal
from tests.servers import run

S = 1_000_000_000
TOKEN_ENV = "HEADGATE_BENCH_INFLUX_TOKEN"
LINES = 5_000  #: of the baseline's request: what InfluxData's documentation advises


class Figure(msgspec.Struct):
    values: int
    seconds: float
    cpu_s: float
    server_cpu_s: float


class Shape(msgspec.Struct, frozen=True):
    name: str
    points: int
    type: ValueType
    scale: float
    scans: int  #: per round


SHAPES = (
    Shape("125 × UINT16, scale 0.1", 125, ValueType.U16, 0.1, 10_000),
    Shape("125 × UINT16, scale 1", 125, ValueType.U16, 1.0, 10_000),
    Shape("32 × FLOAT32", 32, ValueType.F32, 1.0, 20_000),
    Shape("1 × FLOAT64", 1, ValueType.F64, 1.0, 50_000),
)


def batches(shape: Shape, first: int) -> list[Stored]:
    """What the journal would hold: 60 scans a batch, one scan a second."""
    columns = tuple(Point(name=f"p{i}", type=shape.type, scale=shape.scale) for i in range(shape.points))
    layout = layout_of("boiler", "modbus", f"m{shape.points}", columns, (("site", "north"),))
    packing = Packing(layout)
    wall_ns = time.time_ns() // S * S - 100_000 * S
    made = []
    for start in range(first, first + shape.scans, 60):
        seqs = range(start, min(start + 60, first + shape.scans))
        frames = []
        for seq in seqs:
            raw = [(seq * 7 + i * 13) % 4000 for i in range(shape.points)]
            values = raw if shape.type is ValueType.U16 else [v / 7 for v in raw]
            frames.append(encode_scan(packing, Scan((seq - first) * S, columns, values), 1))
        clock = ClockRow(1, "boot", 0, wall_ns, True)
        count = len(seqs) * shape.points
        sealed = seal("acme/plant-1", 7, start, frames, [layout], [clock], count)
        made.append(
            Stored(
                start, "acme/plant-1", 7, start, sealed.last, count, wall_ns + 200_000 * S, ((start, sealed.last),),
                sealed.payload,
            )
        )  # fmt: skip
    return made


def decoded(decoder: Decoder, stored: Sequence[Stored]) -> list[Record]:
    return [record for one in stored for record in decoder.decode(one).records]


def server_cpu_s(server: run.InfluxDb) -> float:
    """User and system time so far (proc(5), stat, fields 14 and 15)."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def timed(server: run.InfluxDb, values: int, work: Callable[[], Awaitable[None]]) -> Figure:
    gc.collect()
    theirs, cpu, wall = server_cpu_s(server), time.process_time(), time.perf_counter()
    await work()
    seconds, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    return Figure(values, seconds, cpu_s, server_cpu_s(server) - theirs)


class Bare:
    """One connection and ready bodies."""

    def __init__(self, server: run.InfluxDb, bucket: str) -> None:
        self._connection = http.client.HTTPConnection(server.host, server.port)
        self._path = f"/api/v2/write?org={server.org}&bucket={bucket}&precision=ns"
        self._headers = {"Authorization": f"Token {server.token}"}

    def post(self, body: bytes) -> None:
        self._connection.request("POST", self._path, body, self._headers)
        answer = self._connection.getresponse()
        text = answer.read()
        if answer.status != 204:
            raise RuntimeError(f"{answer.status}: {text!r}")


def make_bucket(server: run.InfluxDb, name: str) -> None:
    def call(path: str, body: object | None = None) -> dict[str, list[dict[str, str]]]:
        request = urllib.request.Request(
            f"{server.url}/api/v2/{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Token {server.token}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            found: dict[str, list[dict[str, str]]] = json.load(answer)
            return found

    org = call(f"orgs?org={server.org}")["orgs"][0]["id"]
    call("buckets", {"name": name, "orgID": org, "retentionRules": []})


async def measure(server: run.InfluxDb, shape: Shape, rounds: int) -> None:
    bucket = f"bare-{shape.points}-{shape.type}-{shape.scale:g}"
    make_bucket(server, bucket)
    bare = Bare(server, bucket)
    os.environ[TOKEN_ENV] = server.token
    sinks = {
        name: InfluxSink(
            InfluxDB(
                url=server.url, org=server.org, bucket=f"{name}-{bucket}", token_env=TOKEN_ENV, timeout_s=60.0
            )
        )
        for name in ("sink", "decode + sink")
    }
    for sink in sinks.values():
        await sink.open()
    per_call = min(sinks["sink"].max_records, 200_000 // shape.points)  # as the runner gives them
    figures: dict[str, list[Figure]] = {"posting": [], "sink": [], "decode + sink": [], "format": []}
    decoder = Decoder()
    for n in range(rounds + 1):
        stored = batches(shape, 1 + n * shape.scans)
        records = decoded(decoder, stored)
        values = len(records) * shape.points
        lines = LineWriter().lines(records)
        bodies = [b"\n".join(lines[at : at + LINES]) for at in range(0, len(lines), LINES)]
        size = sum(map(len, bodies))
        calls = [records[at : at + per_call] for at in range(0, len(records), per_call)]
        batches_per_call = max(1, per_call // 60)

        async def posting(bodies: list[bytes] = bodies) -> None:
            for body in bodies:
                await asyncio.to_thread(bare.post, body)

        async def through(calls: list[list[Record]] = calls) -> None:
            for call in calls:
                await sinks["sink"].write(call, call[-1].offset)

        async def from_bytes(stored: list[Stored] = stored, step: int = batches_per_call) -> None:
            for at in range(0, len(stored), step):
                call = decoded(decoder, stored[at : at + step])
                await sinks["decode + sink"].write(call, call[-1].offset)

        async def formatting(records: list[Record] = records) -> None:
            writer = LineWriter()
            for at in range(0, len(records), 500):
                b"\n".join(writer.lines(records[at : at + 500]))

        del lines
        work: dict[str, Callable[[], Awaitable[None]]] = {
            "posting": posting,
            "sink": through,
            "decode + sink": from_bytes,
            "format": formatting,
        }
        order = list(work) if n % 2 else list(reversed(work))
        for name in order:
            one = await timed(server, values, work[name])
            if n:  # the first round makes series and shards
                figures[name].append(one)
    for sink in sinks.values():
        await sink.close()
    report(shape, figures, size / values)


def report(shape: Shape, figures: dict[str, list[Figure]], bytes_each: float) -> None:
    print(f"{shape.name}: {bytes_each:.1f} bytes a value")
    base = statistics.median(f.values / f.seconds for f in figures["posting"])
    best = max(f.values / f.seconds for f in figures["posting"])
    for name, found in figures.items():
        speeds = [f.values / f.seconds for f in found]
        speed, fastest = statistics.median(speeds), max(speeds)
        values = sum(f.values for f in found)
        per_cpu = values / sum(f.cpu_s for f in found)
        theirs = sum(f.server_cpu_s for f in found) / values * 1e6
        print(
            f"  {name:14} {speed:10,.0f} values/s  {speed / base:7.1%} of posting (fastest {fastest / best:6.1%})"
            f"  {per_cpu:11,.0f} values/CPU-second, influxd {theirs:5.2f} CPU-s a million",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", default="", help="only shapes whose name holds this")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        if len(cores) > 1:
            os.sched_setaffinity(0, {cores[-1]})
            server = stack.enter_context(run.influxdb())
            os.sched_setaffinity(0, {cores[0]})
        else:
            server = stack.enter_context(run.influxdb())
        for shape in SHAPES:
            if options.shape in shape.name:
                asyncio.run(measure(server, shape, options.rounds))
    print(f"peak RSS {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
