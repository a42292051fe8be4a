"""Every answer of InfluxDB, with exact counts: on the real server where it can be provoked, else on a scripted one."""

from __future__ import annotations

import asyncio
import csv
import datetime
import gzip
import io
import json
import re
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest

from cloud.sinks.contract import EventRecord, GapRecord, RetryLater, ScanRecord, SinkBroken, Tally
from cloud.sinks.influxdb import Fault, InfluxSink, _Server, judge, tally
from cloud.sinks.line_protocol import LineWriter
from config.cloud import InfluxDB
from drivers.contract import Reason, Value
from sync.wire import EventFrame, GapFrame, Layout, layout_id
from tests.servers import run
from tests.sink_conformance import RefusingSinkConformance, ServerSinkConformance, Store, Told
from tests.sink_conformance import scan as conform_scan

S = 1_000_000_000
TOKEN_ENV = "HEADGATE_TEST_INFLUX_TOKEN"


def layout(measurement: str, *points: tuple[str, str], device: str = "boiler") -> Layout:
    n = len(points)
    return Layout(
        device, "modbus", measurement, tuple(p for p, _ in points), tuple(t for _, t in points),
        ("",) * n, (1.0,) * n, (0.0,) * n,
    )  # fmt: skip


def scan(
    of: Layout, seq: int, *values: Value | None, at_ns: int, reasons: dict[int, Reason] | None = None
) -> ScanRecord:
    return ScanRecord(
        seq, "acme", "plant-1", 7, seq, of, layout_id(of), at_ns, True, at_ns, list(values), reasons or {}
    )


def now_ns() -> int:
    return time.time_ns() // S * S


# --- the real server ---


class Bucket:
    """A bucket of this test's own, and an auditor that shares nothing with the sink."""

    def __init__(self, server: run.InfluxDb, name: str) -> None:
        self.server = server
        self.name = name

    def settings(self, *, retention_days: float = 0.0, batch_lines: int = 5000) -> InfluxDB:
        return InfluxDB(
            url=self.server.url, org=self.server.org, bucket=self.name, token_env=TOKEN_ENV,
            retention_days=retention_days, batch_lines=batch_lines,
        )  # fmt: skip

    def query(self, flux: str) -> list[dict[str, str]]:
        request = urllib.request.Request(
            f"{self.server.url}/api/v2/query?org={self.server.org}",
            data=flux.encode(),
            headers={
                "Authorization": f"Token {self.server.token}",
                "Content-Type": "application/vnd.flux",
                "Accept": "application/csv",
            },
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read().decode()
        rows: list[dict[str, str]] = []
        for block in text.replace("\r\n", "\n").split("\n\n"):
            rows.extend(csv.DictReader(io.StringIO(block)))
        return rows

    def count(
        self,
        measurement: str,
        field: str,
        *,
        since: str = "1970-01-01T00:00:00Z",
        until: str = "2200-01-01T00:00:00Z",
    ) -> int:
        rows = self.query(
            f'from(bucket: "{self.name}") |> range(start: {since}, stop: {until})'
            f' |> filter(fn: (r) => r._measurement == "{measurement}" and r._field == "{field}")'
            " |> group() |> count()"
        )
        return int(rows[0]["_value"]) if rows else 0

    def values(self, measurement: str) -> dict[tuple[str, str], str]:
        """Value by field and time."""
        rows = self.query(
            f'from(bucket: "{self.name}") |> range(start: 1970-01-01T00:00:00Z, stop: 2200-01-01T00:00:00Z)'
            f' |> filter(fn: (r) => r._measurement == "{measurement}")'
        )
        return {(row["_field"], row["_time"]): row["_value"] for row in rows}

    def fields(self, measurement: str) -> set[str]:
        rows = self.query(
            'import "influxdata/influxdb/schema"\n'
            f'schema.measurementFieldKeys(bucket: "{self.name}", measurement: "{measurement}", '
            "start: 1970-01-01T00:00:00Z)"
        )
        return {row["_value"] for row in rows}

    def post(self, line: str) -> None:
        request = urllib.request.Request(
            f"{self.server.url}/api/v2/write?org={self.server.org}&bucket={self.name}&precision=ns",
            data=line.encode(),
            headers={"Authorization": f"Token {self.server.token}"},
        )
        urllib.request.urlopen(request, timeout=30).close()

    def api(self, path: str, body: object | None = None) -> dict[str, object]:
        request = urllib.request.Request(
            f"{self.server.url}/api/v2/{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Token {self.server.token}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            found: dict[str, object] = json.loads(answer.read())
            return found

    def delete(self, path: str) -> None:
        request = urllib.request.Request(
            f"{self.server.url}/api/v2/{path}",
            method="DELETE",
            headers={"Authorization": f"Token {self.server.token}"},
        )
        urllib.request.urlopen(request, timeout=30).close()


@pytest.fixture
def bucket(
    influxdb_server: run.InfluxDb, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Bucket:
    monkeypatch.setenv(TOKEN_ENV, influxdb_server.token)
    return Bucket(influxdb_server, f"{request.node.name[:60]}-{time.time_ns()}")


@pytest.fixture
async def sink(bucket: Bucket) -> InfluxSink:
    made = InfluxSink(bucket.settings())
    assert await made.open() is None
    return made


async def test_the_bucket_is_made_with_its_retention_and_found_again(bucket: Bucket) -> None:
    for _ in range(2):
        made = InfluxSink(bucket.settings(retention_days=2.0))
        await made.open()
        await made.close()
    found = bucket.api(f"buckets?name={urllib.parse.quote(bucket.name)}")["buckets"]
    assert isinstance(found, list)
    assert [rule["everySeconds"] for rule in found[0]["retentionRules"]] == [2 * 86_400]


async def test_every_reading_is_stored_once_however_often_it_is_written(
    sink: InfluxSink, bucket: Bucket
) -> None:
    of = layout("heat", ("flow", "f64"), ("pump", "bool"), ("state", "str"), ("count", "u64"))
    at = now_ns()
    records = [scan(of, i, i + 0.5, i % 2 == 0, f'n "{i}"', 2**60 + i, at_ns=at) for i in range(1, 501)]
    for _ in range(3):
        assert (await sink.write(records, 500)).rejected == ()
    for field in ("flow", "pump", "state", "count", "count.exact"):
        assert bucket.count("heat", field) == 500, field
    stored = {value for (field, _), value in bucket.values("heat").items() if field == "count.exact"}
    assert stored == {str(2**60 + i) for i in range(1, 501)}
    await sink.close()


async def test_requests_that_leave_the_machine_are_compressed_and_read_all_the_same(
    sink: InfluxSink, bucket: Bucket, scripted: Scripted
) -> None:
    records = [scan(layout("heat", ("a", "f64")), i, float(i), at_ns=now_ns()) for i in range(1, 501)]
    body = b"\n".join(LineWriter().lines(records))
    packed = _Server(bucket.settings(), bucket.server.token, compress=True)
    assert packed.post(body) is None
    packed.close()
    assert bucket.count("heat", "a") == 500
    told = _Server(scripted.settings, "a-token-of-some-length", compress=True)
    told.post(body)
    told.close()
    assert scripted.stored == set(body.decode().split("\n"))
    assert scripted.received_bytes < len(body) / 3
    await sink.close()


async def test_numbers_of_every_size_come_back_as_they_were(sink: InfluxSink, bucket: Bucket) -> None:
    values = (
        0.0, -0.0, 1e16, 1e21, 1e22, 123456789012345680000.0, 1.7976931348623157e308, 2.2250738585072014e-308,
        -1e-7, 0.1, 1 / 3, 65535, -32768, 2**53, True, False,
    )  # fmt: skip
    of = layout("heat", *((f"p{i}", "bool" if isinstance(v, bool) else "f64") for i, v in enumerate(values)))
    assert (await sink.write([scan(of, 1, *values, at_ns=now_ns())], 1)).rejected == ()
    words = {"true": True, "false": False}
    found = {field: words.get(text, text) for (field, _), text in bucket.values("heat").items()}
    assert {f: v if isinstance(v, bool) else float(v) for f, v in found.items()} == {
        f"p{i}": value for i, value in enumerate(values)
    }
    await sink.close()


async def test_names_that_influxdb_drops_or_cannot_query_are_stored_all_the_same(
    sink: InfluxSink, bucket: Bucket
) -> None:
    names = (
        "time",
        "_time",
        "_value",
        "_field",
        "device",
        'a b,c=d"e',
        "back\\",
        "x.quality",
        "100%",
        "ü",
        "#",
    )
    of = msgspec.structs.replace(
        layout("#odd", *((name, "f64") for name in names), device="d\\"),
        tags=(
            ("time", "1"),
            ("_field", "2"),
            ("a b", "c,d=e\\"),
            ("_value", "3"),
            ("nl", "a\nb"),
            ("empty", ""),
        ),
    )
    settled = await sink.write([scan(of, 1, *range(len(names)), at_ns=now_ns())], 1)
    assert settled.rejected == ()
    assert len(bucket.fields("_#odd")) == len(names)
    assert sorted(float(value) for value in bucket.values("_#odd").values()) == [
        float(i) for i in range(len(names))
    ]
    await sink.close()


@pytest.mark.parametrize(
    "special", [",", "=", " ", '"', "\\", ""], ids=["comma", "equals", "space", "quote", "backslash", "end"]
)
async def test_a_backslash_before_what_is_escaped_costs_no_reading(
    sink: InfluxSink, bucket: Bucket, special: str
) -> None:
    odd = f"a\\{special}"
    of = msgspec.structs.replace(
        layout(f"{odd}b", (f"{odd}b", "f64"), (odd, "bool"), device=f"{odd}b"), tags=((f"{odd}b", f"{odd}b"),)
    )
    settled = await sink.write([scan(of, seq, 1.5, True, at_ns=now_ns()) for seq in (1, 2, 3)], 1)
    assert settled.rejected == ()
    assert await tally(bucket.settings()) == {"acme/plant-1": Tally(6)}
    await sink.close()


async def test_bad_readings_gaps_and_events_are_stored_too(sink: InfluxSink, bucket: Bucket) -> None:
    of = layout("heat", ("a", "f64"), ("b", "f64"))
    at = now_ns()
    gone = dict.fromkeys(range(2), Reason.TIMEOUT)
    gap = GapFrame(7, 3, 5, 3, 12, "evicted", "boiler", 1, 0, 1)
    settled = await sink.write(
        [
            scan(of, 1, None, None, at_ns=at, reasons=gone),
            scan(of, 2, 1.0, 2.0, at_ns=at, reasons={1: Reason.RANGE}),
            GapRecord(3, "acme", "plant-1", 7, 3, gap, at, at + S, at),
            EventRecord(4, "acme", "plant-1", 7, 4, EventFrame(1, 0, "start", "hello"), at, at),
        ],
        4,
    )
    assert settled.rejected == ()
    assert bucket.count("heat", "a.quality") == 1
    assert bucket.count("heat", "b.quality") == 2
    assert bucket.count("heat", "b") == 1
    assert bucket.count("headgate_gaps", "scans") == 1
    assert bucket.count("headgate_events", "text") == 1
    await sink.close()


@pytest.mark.parametrize("stuck", [(), (3,)])
async def test_the_query_of_the_readme_runs(sink: InfluxSink, bucket: Bucket, stuck: tuple[int, ...]) -> None:
    page = (Path(__file__).parents[1] / "cloud" / "sinks" / "README.md").read_text()
    (flux,) = re.findall(r"```flux\n(.*?)```", page, re.DOTALL)
    of = layout("heating", ("flow", "f64"))
    at = now_ns() // (60 * S) * 60 * S - 120 * S
    records = [
        scan(of, i, float(i), at_ns=at + i * S, reasons={0: Reason.STUCK} if i in stuck else {})
        for i in range(1, 6)
    ]
    assert (await sink.write(records, 5)).rejected == ()
    rows = bucket.query(flux.replace('"headgate"', f'"{bucket.name}"'))
    good = [i for i in range(1, 6) if i not in stuck]
    assert [float(row["_value"]) for row in rows] == [sum(good) / len(good)]
    await sink.close()


async def test_a_type_conflict_costs_the_conflicting_field_alone(sink: InfluxSink, bucket: Bucket) -> None:
    at = now_ns()
    bucket.post(f'heat,device=other b="text" {at}')
    of = layout("heat", ("a", "f64"), ("b", "f64"), ("c", "f64"))
    other = layout("cold", ("b", "f64"))
    records = [scan(of, i, 1.0, 2.0, 3.0, at_ns=at) for i in range(1, 101)]
    records += [scan(other, i, 2.0, at_ns=at) for i in range(101, 201)]
    settled = await sink.write(records, 200)
    assert [(r.index, r.points) for r in settled.rejected] == [(i, (1,)) for i in range(100)]
    assert all("field type conflict" in r.reason for r in settled.rejected)
    assert bucket.count("heat", "a") == bucket.count("heat", "c") == 100
    assert bucket.count("heat", "b") == 1
    assert bucket.count("cold", "b") == 100
    await sink.close()


async def test_many_conflicting_fields_and_devices_with_the_right_type_are_told_apart(
    sink: InfluxSink, bucket: Bucket
) -> None:
    at = now_ns()
    points = [(f"p{i}", "f64") for i in range(40)]
    wrong = {3, 17, 18, 39}
    bucket.post(f"heat,device=x {','.join(f'p{i}=true' for i in wrong)} {at}")
    floats = layout("heat", *points)
    bools = layout("heat", *((p, "bool") for p, _ in points[:4]), device="pump")
    records = [scan(floats, i, *([1.5] * 40), at_ns=at) for i in range(1, 51)]
    records += [scan(bools, i, None, None, None, True, at_ns=at) for i in range(51, 61)]
    settled = await sink.write(records, 60)
    assert {r.index: r.points for r in settled.rejected} == dict.fromkeys(range(50), tuple(sorted(wrong)))
    assert bucket.count("heat", "p0") == 50
    assert bucket.count("heat", "p3") == 1 + 10
    assert bucket.count("heat", "p17") == 1
    await sink.close()


async def test_a_conflict_within_one_write_and_over_several_weeks_stores_what_can_be(
    sink: InfluxSink, bucket: Bucket
) -> None:
    """A field's type belongs to a shard (a week, here): the same field may conflict in one and not in the other."""
    at = now_ns()
    bucket.post(f'heat,device=x b="text" {at}')
    of = layout("heat", ("a", "f64"), ("b", "f64"))
    records = [scan(of, i, 1.0, 2.0, at_ns=at - (i % 2) * 30 * 86_400 * S) for i in range(1, 41)]
    settled = await sink.write(records, 40)
    assert {r.index: r.points for r in settled.rejected} == dict.fromkeys(range(1, 40, 2), (1,))
    assert bucket.count("heat", "a") == 40
    assert bucket.count("heat", "b", until="-7d") == 20  # Flux shows one type of a field at a time
    assert bucket.count("heat", "b", since="-7d") == 1
    await sink.close()


async def test_a_whole_scan_in_conflict_is_rejected_whole(sink: InfluxSink, bucket: Bucket) -> None:
    at = now_ns()
    bucket.post(f'heat,device=x a="text" {at}')
    settled = await sink.write([scan(layout("heat", ("a", "f64")), 1, 1.0, at_ns=at)], 1)
    assert [(r.index, r.points) for r in settled.rejected] == [(0, ())]
    await sink.close()


async def test_readings_beyond_the_buckets_retention_are_rejected_and_the_rest_is_stored(
    bucket: Bucket,
) -> None:
    sink = InfluxSink(bucket.settings(retention_days=1 / 24))
    await sink.open()
    at = now_ns()
    of = layout("heat", ("a", "f64"), ("b", "f64"))
    old = {0, 7, 8, 19}
    records = [scan(of, i + 1, 1.0, 2.0, at_ns=at - (48 * 3600 * S if i in old else 0)) for i in range(20)]
    settled = await sink.write(records, 20)
    assert {r.index for r in settled.rejected} == old
    assert all("retention policy" in r.reason and r.points == () and r.expired for r in settled.rejected)
    assert bucket.count("heat", "a") == bucket.count("heat", "b") == 16
    await sink.close()


async def test_a_conflict_that_hides_readings_beyond_retention_does_not_hide_them_from_us(
    bucket: Bucket,
) -> None:
    sink = InfluxSink(bucket.settings(retention_days=1 / 24))
    await sink.open()
    at = now_ns()
    bucket.post(f'heat,device=x b="text" {at}')
    of = layout("heat", ("a", "f64"), ("b", "f64"))
    records = [scan(of, i + 1, 1.0, 2.0, at_ns=at - (i % 2) * 48 * 3600 * S) for i in range(10)]
    settled = await sink.write(records, 10)
    assert {r.index: r.points for r in settled.rejected} == {i: () if i % 2 else (1,) for i in range(10)}
    assert bucket.count("heat", "a") == 5
    await sink.close()


async def test_a_line_that_does_not_parse_is_found_and_costs_its_point_alone(
    sink: InfluxSink, bucket: Bucket
) -> None:
    of = layout("heat", ("a", "f64"), ("b", "f64"))
    at = now_ns()
    records = [scan(of, i + 1, 1.0, float("nan") if i == 600 else 2.0, at_ns=at) for i in range(1000)]
    settled = await sink.write(records, 1000)
    assert [(r.index, r.points) for r in settled.rejected] == [(600, (1,))]
    assert "unable to parse" in settled.rejected[0].reason
    assert bucket.count("heat", "a") == 1000
    assert bucket.count("heat", "b") == 999
    await sink.close()


async def test_a_text_above_a_mebibyte_is_rejected_alone(sink: InfluxSink, bucket: Bucket) -> None:
    of = layout("heat", ("a", "f64"), ("s", "str"))
    at = now_ns()
    records = [scan(of, 1, 1.0, "x", at_ns=at), scan(of, 2, 1.0, "x" * 1_100_000, at_ns=at)]
    settled = await sink.write(records, 2)
    assert [(r.index, r.points) for r in settled.rejected] == [(1, (1,))]
    assert "too long" in settled.rejected[0].reason
    assert bucket.count("heat", "a") == 2
    assert bucket.count("heat", "s") == 1
    await sink.close()


async def test_a_time_beyond_2262_is_rejected_before_it_is_sent(sink: InfluxSink, bucket: Bucket) -> None:
    of = layout("heat", ("a", "f64"))
    settled = await sink.write([scan(of, 1, 1.0, at_ns=2**64), scan(of, 2, 1.0, at_ns=now_ns())], 2)
    assert [r.index for r in settled.rejected] == [0]
    assert bucket.count("heat", "a") == 1
    await sink.close()


async def test_a_wrong_token_stops_the_sink(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_ENV, "not-the-token-at-all")
    with pytest.raises(SinkBroken, match="token"):
        await InfluxSink(bucket.settings()).open()


async def test_a_missing_token_says_where_it_was_looked_for(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN_ENV)
    with pytest.raises(SinkBroken, match=TOKEN_ENV):
        await InfluxSink(bucket.settings()).open()


async def test_a_bucket_that_may_not_be_made_stops_the_sink(bucket: Bucket) -> None:
    settings = msgspec.structs.replace(bucket.settings(), create_bucket=False)
    with pytest.raises(SinkBroken, match="bucket"):
        await InfluxSink(settings).open()


async def test_a_bucket_deleted_under_way_stops_the_sink(sink: InfluxSink, bucket: Bucket) -> None:
    found = bucket.api(f"buckets?name={urllib.parse.quote(bucket.name)}")["buckets"]
    assert isinstance(found, list)
    bucket.delete(f"buckets/{found[0]['id']}")
    with pytest.raises(SinkBroken, match="bucket"):
        await sink.write([scan(layout("heat", ("a", "f64")), 1, 1.0, at_ns=now_ns())], 1)
    await sink.close()


async def test_a_token_that_may_only_write_is_enough_for_a_bucket_that_exists(
    sink: InfluxSink, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    await sink.close()
    found = bucket.api(f"buckets?name={urllib.parse.quote(bucket.name)}")["buckets"]
    assert isinstance(found, list)
    resource = {"type": "buckets", "id": found[0]["id"], "orgID": found[0]["orgID"]}
    made = bucket.api(
        "authorizations",
        {"orgID": found[0]["orgID"], "permissions": [{"action": "write", "resource": resource}]},
    )
    monkeypatch.setenv(TOKEN_ENV, str(made["token"]))
    writer = InfluxSink(bucket.settings())
    await writer.open()
    await writer.write([scan(layout("heat", ("a", "f64")), 1, 1.0, at_ns=now_ns())], 1)
    await writer.close()
    assert bucket.count("heat", "a") == 1


async def test_a_stopped_server_is_retried_and_nothing_is_lost(
    start: run.Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(run.influxdb())
    monkeypatch.setenv(TOKEN_ENV, server.token)
    bucket = Bucket(server, "readings")
    sink = InfluxSink(bucket.settings())
    await sink.open()
    of = layout("heat", ("a", "f64"))
    at = now_ns()
    records = [scan(of, i, float(i), at_ns=at) for i in range(1, 101)]
    await sink.write(records[:50], 50)
    server.process.kill()
    with pytest.raises(RetryLater):
        await sink.write(records, 100)
    with pytest.raises(RetryLater):
        await InfluxSink(bucket.settings()).open()
    server.process.start()
    assert (await sink.write(records, 100)).rejected == ()
    assert bucket.count("heat", "a") == 100
    await sink.close()


# --- the suite of every sink ---


class InfluxStore(Store):
    remembers = False

    def __init__(self, server: run.InfluxDb) -> None:
        self.bucket = Bucket(server, f"conformance-{time.time_ns()}")

    def sink(self) -> InfluxSink:
        return InfluxSink(self.bucket.settings())

    async def readings(self) -> list[Told]:
        found: list[Told] = []
        for field in await asyncio.to_thread(self.bucket.fields, "heating"):
            if field.endswith(".quality"):
                continue
            rows = await asyncio.to_thread(
                self.bucket.query,
                f'from(bucket: "{self.bucket.name}") |> range(start: 1970-01-01T00:00:00Z, stop: 2200-01-01T00:00:00Z)'
                f' |> filter(fn: (r) => r._measurement == "heating" and r._field == "{field}")',
            )
            found += [_told(row) for row in rows]
        return sorted(found, key=lambda told: (told.gateway, told.device, told.point, told.taken_at_ns))

    def refusable(self) -> ScanRecord:
        return conform_scan(10**6, (1.0, 2.0, 3), at_ns=2**64)

    def stop(self) -> None:
        self.bucket.server.process.kill()

    def start(self) -> None:
        self.bucket.server.process.start()


def _told(row: dict[str, str]) -> Told:
    text = row["_value"]
    words: dict[str, Value] = {"true": True, "false": False}
    value = text if row["_field"] == "state" else words[text] if text in words else float(text)
    whole, _, part = row["_time"].rstrip("Z").partition(".")
    at = datetime.datetime.fromisoformat(f"{whole}+00:00")
    at_ns = int(at.timestamp()) * S + int(part.ljust(9, "0") or 0)
    gateway = f"{row['tenant']}/{row['gateway']}"
    return Told(gateway, row["device"], row["_field"], at_ns // 1000 * 1000, value)


@pytest.fixture(scope="class")
def own_server() -> Iterator[run.InfluxDb]:
    """To be stopped at will, so no other test's; one for all tests of the suite."""
    with run.influxdb() as server:
        yield server


@pytest.fixture
def store(own_server: run.InfluxDb, monkeypatch: pytest.MonkeyPatch) -> InfluxStore:
    monkeypatch.setenv(TOKEN_ENV, own_server.token)
    return InfluxStore(own_server)


class TestInflux(ServerSinkConformance, RefusingSinkConformance):
    """InfluxDB holds to what every sink promises."""


# --- a scripted server, for what the real one does not do on demand ---


class Scripted:
    """An HTTP server that answers as told and keeps what it accepted."""

    def __init__(self) -> None:
        self.requests: list[list[str]] = []
        self.stored: set[str] = set()
        self.received_bytes = 0
        self.answer: Callable[[list[str]], tuple[int, dict[str, str], str]] = lambda _: (204, {}, "")
        script = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._send(200, {}, json.dumps({"buckets": [{"name": "b", "retentionRules": []}]}))

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                script.received_bytes += len(raw)
                body = (gzip.decompress(raw) if self.headers["Content-Encoding"] == "gzip" else raw).decode()
                lines = body.split("\n") if body else []
                script.requests.append(lines)
                status, headers, text = script.answer(lines)
                if status == 204:
                    script.stored.update(lines)
                self._send(status, headers, text)

            def _send(self, status: int, headers: dict[str, str], text: str) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.send_header("Content-Type", "application/json")
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    @property
    def settings(self) -> InfluxDB:
        url = f"http://127.0.0.1:{self._server.server_port}"
        return InfluxDB(url=url, org="o", bucket="b", token_env=TOKEN_ENV, timeout_s=2.0)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    monkeypatch.setenv(TOKEN_ENV, "a-token-of-some-length")
    server = Scripted()
    yield server
    server.close()


def hundred() -> list[ScanRecord]:
    of = layout("heat", ("a", "f64"), ("b", "f64"))
    return [scan(of, i, float(i), 2.0, at_ns=now_ns()) for i in range(1, 101)]


async def opened(scripted: Scripted) -> InfluxSink:
    sink = InfluxSink(scripted.settings)
    await sink.open()
    scripted.requests.clear()
    return sink


@pytest.mark.parametrize(
    ("status", "headers", "after_s"),
    [(429, {"Retry-After": "7"}, 7.0), (503, {"Retry-After": "0.5"}, 0.5), (503, {}, None), (500, {}, None),
     (502, {}, None), (429, {"Retry-After": "86400"}, 300.0), (429, {"Retry-After": "soon"}, None)],
)  # fmt: skip
async def test_a_busy_server_is_left_alone_for_as_long_as_it_asks(
    scripted: Scripted, status: int, headers: dict[str, str], after_s: float | None
) -> None:
    sink = await opened(scripted)
    scripted.answer = lambda _: (status, headers, '{"message": "later"}')
    with pytest.raises(RetryLater, match="later") as caught:
        await sink.write(hundred(), 100)
    assert caught.value.after_s == after_s
    assert len(scripted.requests) == 1
    scripted.answer = lambda _: (204, {}, "")
    assert (await sink.write(hundred(), 100)).rejected == ()
    assert len(scripted.stored) == 100
    await sink.close()


async def test_a_request_too_large_is_halved_and_later_ones_start_smaller(scripted: Scripted) -> None:
    sink = await opened(scripted)
    of = layout("heat", *((f"p{i}", "f64") for i in range(100)))
    records = [scan(of, i, *([float(i)] * 100), at_ns=now_ns()) for i in range(1, 401)]

    def limited(lines: list[str]) -> tuple[int, dict[str, str], str]:
        return (413, {}, "") if sum(map(len, lines)) > 100_000 else (204, {}, "")

    scripted.answer = limited
    assert (await sink.write(records, 400)).rejected == ()
    assert len(scripted.stored) == 400
    first = len(scripted.requests)
    scripted.requests.clear()
    scripted.stored.clear()
    assert (await sink.write(records, 400)).rejected == ()
    assert len(scripted.stored) == 400
    assert sum(limited(lines)[0] == 413 for lines in scripted.requests) == 0
    assert first > len(scripted.requests)
    await sink.close()


async def test_a_single_line_too_large_is_sent_in_parts_and_a_single_point_is_rejected(
    scripted: Scripted,
) -> None:
    sink = await opened(scripted)
    of = layout("heat", ("a", "f64"), ("s", "str"))
    scripted.answer = lambda lines: (413, {}, "") if sum(map(len, lines)) > 10_000 else (204, {}, "")
    settled = await sink.write([scan(of, 1, 1.0, "x" * 20_000, at_ns=now_ns())], 1)
    assert [(r.index, r.points) for r in settled.rejected] == [(0, (1,))]
    assert len(scripted.stored) == 1
    await sink.close()


async def test_older_servers_500_beyond_retention_is_permanent(scripted: Scripted) -> None:
    sink = await opened(scripted)
    bad = {scan.taken_at_ns + scan.seq for scan in hundred()[30:33]}

    def old(lines: list[str]) -> tuple[int, dict[str, str], str]:
        hit = [line for line in lines if int(line.rpartition(" ")[2]) % 1000 in (31, 32, 33)]
        text = '{"message": "points beyond retention policy"}'
        return (500, {}, text) if hit else (204, {}, "")

    scripted.answer = old
    settled = await sink.write(hundred(), 100)
    assert {r.index for r in settled.rejected} == {30, 31, 32}
    assert len(scripted.stored) == 97
    assert len(bad) == 3
    await sink.close()


async def test_one_bad_line_among_many_is_found_in_few_requests(scripted: Scripted) -> None:
    sink = await opened(scripted)

    def poison(lines: list[str]) -> tuple[int, dict[str, str], str]:
        hit = any(line.endswith("061") for line in lines)
        return (400, {}, '{"message": "unable to parse \'…\': no reason"}') if hit else (204, {}, "")

    scripted.answer = poison
    settled = await sink.write(hundred(), 100)
    assert [(r.index, r.points) for r in settled.rejected] == [(60, ())]
    lines = {line for request in scripted.requests for line in request if not line.endswith("061")}
    assert lines == scripted.stored
    assert len(scripted.stored) == 99
    assert len(scripted.requests) <= 2 * 7 + 1 + 2  # 2·log2(100) + 1, and the two points of the line
    await sink.close()


async def test_a_refusal_in_unknown_words_that_every_request_gets_stops_the_sink(scripted: Scripted) -> None:
    sink = await opened(scripted)
    scripted.answer = lambda _: (400, {}, '{"message": "the moon is full"}')
    with pytest.raises(SinkBroken, match="the moon is full"):
        await sink.write(hundred(), 100)
    assert len(scripted.requests) == 2
    await sink.close()


async def test_a_refusal_in_unknown_words_that_an_empty_request_does_not_get_is_the_datas(
    scripted: Scripted,
) -> None:
    sink = await opened(scripted)

    def odd(lines: list[str]) -> tuple[int, dict[str, str], str]:
        return (422, {}, "whim") if any(line.endswith("005") for line in lines) else (204, {}, "")

    scripted.answer = odd
    settled = await sink.write(hundred(), 100)
    assert [(r.index, r.points, r.reason) for r in settled.rejected] == [(4, (), "influxdb: whim")]
    assert len(scripted.stored) == 99
    await sink.close()


async def test_a_server_that_does_not_answer_in_time_gets_smaller_requests(scripted: Scripted) -> None:
    sink = InfluxSink(msgspec.structs.replace(scripted.settings, timeout_s=0.5))
    await sink.open()
    scripted.requests.clear()
    of = layout("heat", *((f"p{i}", "f64") for i in range(500)))
    records = [scan(of, i, *([1.0] * 500), at_ns=now_ns()) for i in range(1, 201)]
    released = threading.Event()

    def slow(lines: list[str]) -> tuple[int, dict[str, str], str]:
        released.wait(10.0)
        return 204, {}, ""

    scripted.answer = slow
    with pytest.raises(RetryLater, match=r"within 0\.5 s"):
        await sink.write(records, 200)
    released.set()
    largest = max(len(lines) for lines in scripted.requests)
    scripted.requests.clear()
    assert (await sink.write(records, 200)).rejected == ()
    assert max(len(lines) for lines in scripted.requests) < largest
    await sink.close()


async def test_an_address_that_is_not_influxdb_stops_the_sink(scripted: Scripted) -> None:
    sink = await opened(scripted)
    scripted.answer = lambda _: (302, {"Location": "/login"}, "")
    with pytest.raises(SinkBroken, match="is url the address"):
        await sink.write(hundred(), 100)
    await sink.close()


async def test_a_call_is_sent_in_several_requests_and_each_record_once(scripted: Scripted) -> None:
    sink = await opened(scripted)
    of = layout("heat", *((f"p{i}", "f64") for i in range(500)))
    records = [scan(of, i, *([1.0] * 500), at_ns=now_ns()) for i in range(1, 1001)]
    await sink.write(records, 1000)
    assert len(scripted.requests) > 1
    assert sum(len(lines) for lines in scripted.requests) == len(scripted.stored) == 1000
    await sink.close()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_refused_credentials_and_missing_places_are_for_a_human(status: int) -> None:
    with pytest.raises(SinkBroken):
        judge(status, "no", None, where="influxdb")


def test_an_answer_names_the_field_and_how_many_lines_were_dropped() -> None:
    text = (
        "failure writing points to database: partial write: field type conflict: input field "
        '"x" on measurement "m" is type string, already exists as type float dropped=2'
    )
    refusal = judge(422, text, None, where="influxdb")
    assert (refusal.fault, refusal.measurement, refusal.field, refusal.dropped) == (Fault.FIELD, "m", "x", 2)


def test_the_token_is_never_in_what_is_logged_or_raised(
    scripted: Scripted, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    secret = tmp_path / "token"
    secret.write_text("a-very-secret-token")
    secret.chmod(0o600)
    sink = InfluxSink(msgspec.structs.replace(scripted.settings, token_file=str(secret)))
    assert "a-very-secret-token" not in repr(vars(sink)) + caplog.text
