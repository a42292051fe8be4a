"""The archive in a bucket, on a real S3 server."""

from __future__ import annotations

import asyncio
import http.client
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import msgspec
import pytest
from deltalake import DeltaTable
from minio import Minio
from minio.commonconfig import ENABLED, Filter
from minio.lifecycleconfig import Expiration, LifecycleConfig, Rule
from minio.versioningconfig import VersioningConfig

from cloud.sinks.archive import ArchiveSink
from cloud.sinks.contract import RetryLater, ScanRecord, SinkBroken
from cloud.sinks.minio import RULE_UPLOADS, RULE_VERSIONS, Bucket, Capabilities, notes
from config.cloud import Archive
from sync.wire import Layout, layout_id
from tests.servers import run
from tests.sink_conformance import SinkConformance, Store, Told
from tests.test_cloud_sinks_archive import told

S = 1_000_000_000
AT = 1_795_446_640_123_456_789
ACCESS, SECRET = "HEADGATE_TEST_S3_ACCESS", "HEADGATE_TEST_S3_SECRET"
NO_FOLDER = Path("/nonexistent/never-used")
OF = Layout("boiler", "modbus", "heat", ("a", "b"), ("f64", "f64"), ("", ""), (1.0, 1.0), (0.0, 0.0))


def scan(offset: int, seq: int) -> ScanRecord:
    return ScanRecord(
        offset, "acme", "plant-1", 7, seq, OF, layout_id(OF), AT, True, AT, [float(seq), 2.0], {}
    )


class Place:
    """A bucket of one test's own."""

    def __init__(self, server: run.S3) -> None:
        self.server = server
        self.name = f"test-{time.time_ns()}"
        self.client = Minio(
            server.endpoint, access_key=server.access_key, secret_key=server.secret_key, secure=server.secure,
            region="us-east-1",
        )  # fmt: skip

    def settings(self, endpoint: str | None = None) -> Archive:
        return Archive(
            endpoint=endpoint or self.server.url,
            bucket=self.name,
            access_key_env=ACCESS,
            secret_key_env=SECRET,
        )

    def table(self, name: str = "readings") -> DeltaTable:
        options = {
            "AWS_ENDPOINT_URL": self.server.url, "AWS_ACCESS_KEY_ID": self.server.access_key,
            "AWS_SECRET_ACCESS_KEY": self.server.secret_key, "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true",
        }  # fmt: skip
        return DeltaTable(f"s3://{self.name}/{name}", storage_options=options)

    def identities(self) -> list[tuple[object, ...]]:
        found = self.table().to_pyarrow_table(columns=["tenant", "gateway", "epoch", "seq", "point"])
        return sorted(tuple(row.values()) for row in found.to_pylist())

    def rules(self) -> dict[str | None, Rule]:
        found = self.client.get_bucket_lifecycle(self.name)
        return {rule.rule_id: rule for rule in (found.rules if found else [])}


@contextmanager
def unconditional(server: run.S3) -> Iterator[str]:
    """The server behind something that drops conditions, as stores without conditional PUT do."""
    client = Minio(
        server.endpoint, access_key=server.access_key, secret_key=server.secret_key, secure=server.secure,
        region="us-east-1",
    )  # fmt: skip

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _forward(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            if self.command == "PUT" and "if-none-match" in self.headers.get("Authorization", ""):
                # signed with its condition, so it is signed anew without
                bucket, _, name = unquote(self.path).lstrip("/").partition("/")
                put = client.put_object(bucket, name, io.BytesIO(body), length)
                self.send_response(200)
                self.send_header("ETag", f'"{put.etag}"')
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            headers = {name: value for name, value in self.headers.items() if name.lower() != "if-none-match"}
            there = http.client.HTTPConnection(server.host, server.port, timeout=30)
            there.request(self.command, self.path, body=body, headers=headers)
            answer = there.getresponse()
            text = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name, value)
            stated = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(text))
            self.send_header("Content-Length", stated or "0")
            self.end_headers()
            self.wfile.write(text)
            there.close()

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward  # noqa: N815 - the base's names

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    proxy.daemon_threads = True
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{proxy.server_port}"
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()


@pytest.fixture
def place(s3_server: run.S3, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv(ACCESS, s3_server.access_key)
    monkeypatch.setenv(SECRET, s3_server.secret_key)
    return Place(s3_server)


class BucketStore(Store):
    remembers = True

    def __init__(self, place: Place) -> None:
        self.place = place

    def sink(self) -> ArchiveSink:
        return ArchiveSink(self.place.settings(), NO_FOLDER)

    async def readings(self) -> list[Told]:
        rows = await asyncio.to_thread(lambda: self.place.table().to_pyarrow_table().to_pylist())
        found = [told(row) for row in rows]
        return sorted(found, key=lambda one: (one.gateway, one.device, one.point, one.taken_at_ns))


@pytest.fixture
def store(place: Place) -> BucketStore:
    return BucketStore(place)


class TestArchiveBucket(SinkConformance):
    """The archive in a bucket holds to what every sink promises."""


async def test_readings_are_appended_once_and_read_back_through_restarts_and_repeats(place: Place) -> None:
    for _ in range(2):
        sink = ArchiveSink(place.settings(), NO_FOLDER)
        await sink.open()
        await sink.write([scan(i, i) for i in range(1, 51)], 50)
        await sink.write([scan(i, i) for i in range(20, 61)], 60)
        await sink.close()
    sink = ArchiveSink(place.settings(), NO_FOLDER)
    assert await sink.open() == 60
    await sink.maintain(AT)
    await sink.write([scan(61, 61)], 61)
    await sink.close()
    found = place.identities()
    assert len(found) == len(set(found)) == 122
    assert place.table().transaction_version("headgate") == 61


async def test_the_bucket_is_made_and_the_store_asked_what_it_can_do(place: Place) -> None:
    bucket = Bucket(place.settings())
    bucket.prepare()
    assert place.client.bucket_exists(place.name)
    found = bucket.capabilities
    assert found is not None
    assert found.conditional_put
    assert found.versioning is False
    assert not found.object_lock
    assert list(place.client.list_objects(place.name, recursive=True)) == []


def without_lifecycle(place: Place) -> bool:
    """Where the store knows none, as versitygw: that the bucket is used all the same, and the operator told."""
    if place.server.product == "minio":
        return False
    bucket = Bucket(place.settings())
    bucket.prepare()
    assert bucket.capabilities is not None
    assert bucket.capabilities.lifecycle is None
    assert any("no lifecycle" in note for note in bucket.notes)
    return True


async def test_the_lifecycle_is_set_once_and_others_rules_are_left_alone(place: Place) -> None:
    place.client.make_bucket(place.name)
    if without_lifecycle(place):
        return
    others = Rule(
        ENABLED, rule_filter=Filter(prefix="theirs/"), rule_id="theirs", expiration=Expiration(days=9)
    )
    place.client.set_bucket_lifecycle(place.name, LifecycleConfig([others]))
    for _ in range(2):
        bucket = Bucket(place.settings())
        bucket.prepare()
        assert bucket.capabilities is not None
        assert bucket.capabilities.lifecycle is True
        rules = place.rules()
        assert set(rules) - {RULE_UPLOADS, RULE_VERSIONS} == {"theirs"}
        assert len(rules) == 2
        assert all(rule.expiration is None or rule.rule_id == "theirs" for rule in rules.values())


async def test_a_versioned_bucket_gets_a_rule_for_old_versions(place: Place) -> None:
    place.client.make_bucket(place.name)
    place.client.set_bucket_versioning(place.name, VersioningConfig("Enabled"))
    bucket = Bucket(place.settings())
    bucket.prepare()
    assert bucket.capabilities is not None
    assert bucket.capabilities.versioning is True
    if without_lifecycle(place):
        return
    held = place.rules()[RULE_VERSIONS].noncurrent_version_expiration
    assert held is not None
    assert held.noncurrent_days == 30


async def test_an_object_lock_is_found_and_said(place: Place) -> None:
    place.client.make_bucket(place.name, object_lock=True)
    bucket = Bucket(place.settings())
    bucket.prepare()
    assert bucket.capabilities is not None
    assert bucket.capabilities.object_lock is True
    assert any("object lock" in note for note in bucket.notes)


async def test_a_wrong_secret_stops_the_sink(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, "certainly-not-the-secret")
    with pytest.raises(SinkBroken, match="secret key"):
        Bucket(place.settings()).prepare()


@pytest.mark.parametrize("endpoint", ["minio:9000", "ftp://minio", "http://h/with/path"])
def test_an_endpoint_that_is_no_address_is_refused(endpoint: str) -> None:
    with pytest.raises(SinkBroken, match="https://host:port"):
        Bucket(Archive(endpoint=endpoint))


def test_missing_keys_say_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SinkBroken, match="access_key_env"):
        Bucket(Archive(endpoint="http://127.0.0.1:9"))
    monkeypatch.setenv(ACCESS, "abc")
    with pytest.raises(SinkBroken, match="secret_key"):
        Bucket(Archive(endpoint="http://127.0.0.1:9", access_key_env=ACCESS))


async def test_an_unreachable_store_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ACCESS, "abc")
    monkeypatch.setenv(SECRET, "a-secret-of-some-length")
    with pytest.raises(RetryLater):
        Bucket(Archive(endpoint="http://127.0.0.1:9", access_key_env=ACCESS, secret_key_env=SECRET)).prepare()


async def test_a_killed_store_is_retried_and_nothing_doubled(
    start: run.Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(run.s3())
    monkeypatch.setenv(ACCESS, server.access_key)
    monkeypatch.setenv(SECRET, server.secret_key)
    place = Place(server)
    sink = ArchiveSink(place.settings(), NO_FOLDER)
    await sink.open()
    await sink.write([scan(i, i) for i in range(1, 11)], 10)
    server.process.kill()
    with pytest.raises(RetryLater):
        await sink.write([scan(i, i) for i in range(11, 21)], 20)
    server.process.start()
    await sink.write([scan(i, i) for i in range(11, 21)], 20)
    await sink.close()
    found = place.identities()
    assert len(found) == len(set(found)) == 40


async def test_a_store_without_conditional_put_is_used_with_a_note(place: Place) -> None:
    with unconditional(place.server) as endpoint:
        sink = ArchiveSink(place.settings(endpoint), NO_FOLDER)
        await sink.open()
        assert any("no conditional PUT" in note for note in sink.notes)
        await sink.write([scan(i, i) for i in range(1, 11)], 10)
        await sink.write([scan(i, i) for i in range(5, 13)], 12)
        await sink.close()
    found = place.identities()
    assert len(found) == len(set(found)) == 24


def test_what_a_store_cannot_do_is_said_in_words() -> None:
    everything = Capabilities(
        conditional_put=True, versioning=False, object_lock=False, encryption=True, lifecycle=True
    )
    assert notes(everything) == ()
    for name in ("conditional_put", "encryption", "lifecycle"):
        assert len(notes(msgspec.structs.replace(everything, **{name: False}))) == 1
    assert len(notes(msgspec.structs.replace(everything, object_lock=True))) == 1
