"""Readings in InfluxDB 2, one line per scan.

Rules:
1. Written means 204. InfluxDB's other answers name one fault where there may be several, and hide some behind others
   (seen on 2.7.12: a type conflict in the same request hides points beyond retention), so whatever was not refused is
   sent again until all of it has had a 204. Lines are idempotent: the same scan always gives the same line.
2. A fault of the data is narrowed down to what is at fault: lines by halving (2·log2 n requests), then the points of
   a line; only these are rejected, the rest is stored.
3. A fault of the server or the network is the runner's to retry (`RetryLater`, obeying Retry-After); a fault of
   the configuration stops the sink (`SinkBroken`) and says what to change.
4. Every call blocks, so it runs in a thread; others post what is ready while the next is being formatted.

What each answer becomes (`judge`; docs.influxdata.com/influxdb/v2/write-data/troubleshoot, and seen):

    204                         written
    400 unable to parse         the whole request was refused: halved down to the line, then the points
    401 403                     SinkBroken: the token
    404                         SinkBroken: organisation or bucket
    413                         halved; smaller requests from then on
    422 field type conflict     the rest was written: the named field is taken out and rejected alone
    422 outside retention       (500 "beyond retention policy" in older ones) the oldest `dropped` lines are rejected
    429 503 and other 5xx       RetryLater
    no answer                   RetryLater; after a timeout, smaller requests
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import email.utils
import enum
import gzip
import logging
import re
import ssl
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import urlsplit

import msgspec

from cloud.sinks.contract import Record, Rejection, RetryLater, ScanRecord, Settled, SinkBroken, Tally
from cloud.sinks.line_protocol import (
    EVENTS,
    GAPS,
    MAX_NS,
    MIN_NS,
    LineWriter,
    Unwritable,
    quality_word,
    stamp,
    stored_at,
)
from config.cloud import InfluxDB
from config.failpoint import reached
from drivers.contract import Reason
from sync.identity import IdentityError, is_loopback, read_secret

if TYPE_CHECKING:
    from influxdb_client.domain.bucket import Bucket
    from influxdb_client.service.write_service import WriteService

T = TypeVar("T")

log = logging.getLogger(__name__)

CHUNK_BYTES: Final = 1024 * 1024  #: of one request; several per call, so that formatting and posting overlap
CALL_REQUESTS: Final = 4  #: of `batch_lines` lines in one call
POSTS: Final = 2  #: requests under way at once: the server has one to work on while the other travels
MIN_CHUNK_BYTES: Final = 32 * 1024
CALL_BYTES: Final = 2 * 1024 * 1024  #: of batch bytes per call, about a million readings
MAX_RETRY_AFTER_S: Final = 300.0  #: a longer Retry-After is a mistake, not a wish
REMOVED_TIMES: Final = 5_000  #: asked for at once, of one device
GZIP_LEVEL: Final = 1
TALLY_TIMEOUT_S: Final = 600.0  #: counting reads everything
MESSAGE_CHARS: Final = 300  #: of an answer, in a reason

_NAMED_FIELD: Final = re.compile(r'input field "(.*?)" on measurement "(.*?)" is ', re.DOTALL)
_DROPPED: Final = re.compile(r"dropped=(\d+)")


class Fault(enum.Enum):
    """What is wrong with a request, as far as the answer tells."""

    MALFORMED = "malformed"  #: a line does not parse; nothing was stored
    FIELD = "field"  #: a field of a measurement is refused; the rest was stored
    TOO_OLD = "too old"  #: beyond the bucket's retention; the rest was stored
    TOO_LARGE = "too large"  #: the request; nothing was stored
    UNKNOWN = "unknown"  #: refused, and not in words known here


class Refusal(msgspec.Struct, frozen=True):
    """An answer that blames the data."""

    fault: Fault
    text: str
    dropped: int | None = None
    measurement: str = ""
    field: str = ""


def judge(status: int, message: str, retry_after: str | None, *, where: str) -> Refusal:
    """What an answer other than 2xx means. Raises `RetryLater`, `SinkBroken`; else the data is to blame."""
    text = message[:MESSAGE_CHARS] or f"HTTP {status}"
    found = _DROPPED.search(message)
    dropped = int(found.group(1)) if found else None
    if status in (400, 422) or (status == 500 and "retention policy" in message):
        if "retention policy" in message:
            return Refusal(Fault.TOO_OLD, text, dropped)
        if named := _NAMED_FIELD.search(message):
            return Refusal(Fault.FIELD, text, dropped, measurement=named.group(2), field=named.group(1))
        return Refusal(Fault.MALFORMED if "unable to parse" in message else Fault.UNKNOWN, text, dropped)
    if status == 413:
        return Refusal(Fault.TOO_LARGE, text)
    if status in (401, 403):
        raise SinkBroken(
            f"{where} refuses the token ({status}: {text}); it needs read and write on the bucket"
        )
    if status == 404:
        raise SinkBroken(f"{where} has no such organisation or bucket ({text}); check org and bucket")
    if status in (408, 429) or status >= 500:
        raise RetryLater(f"{where} answers {status}: {text}", _seconds(retry_after))
    raise SinkBroken(f"{where} answers {status}: {text}; is url the address of an InfluxDB 2?")


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After in seconds or as a date (RFC 9110, 10.2.3), within reason."""
    if not retry_after:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S) if seconds == seconds else None


class _Unit(msgspec.Struct, frozen=True, gc=False):
    """A line, and what of which record it holds. `points` empty: a record that has none."""

    index: int
    points: tuple[int, ...]
    line: bytes
    at_ns: int


class InfluxSink:
    """The sink. Everything below `write` runs in its threads."""

    name = "influxdb"
    linger_s = 0.0

    def __init__(self, settings: InfluxDB) -> None:
        self.max_records = settings.batch_lines * CALL_REQUESTS
        self.max_bytes = CALL_BYTES
        self._settings = settings
        self._server: _Server | None = None
        self._writer = LineWriter()
        self._chunk_bytes = CHUNK_BYTES
        self._poster: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()  # a cancelled call's thread ends before the next begins

    async def open(self) -> int | None:
        """Connects and makes sure of the bucket. InfluxDB remembers no offset. Raises `RetryLater`, `SinkBroken`."""
        await self.close()
        try:
            token = read_secret(
                "influxdb token", file=self._settings.token_file, env=self._settings.token_env
            )
        except IdentityError as err:
            raise SinkBroken(str(err)) from err
        host = urlsplit(self._settings.url).hostname or ""
        server = _Server(self._settings, token.reveal(), compress=not is_loopback(host))
        try:
            await asyncio.to_thread(server.prepare)
        except BaseException:
            await asyncio.to_thread(server.close)
            raise
        self._server = server
        self._poster = ThreadPoolExecutor(POSTS, thread_name_prefix="influxdb")
        return None

    async def write(self, records: Sequence[Record], upto_offset: int) -> Settled:
        """Raises `RetryLater`, `SinkBroken`."""
        return await asyncio.to_thread(self._write, records)

    async def remove(self, records: Sequence[Record]) -> None:
        """InfluxDB deletes by series and time only. So a stretch of a device's time goes in one request where nothing
        else is in it, is halved where something is, and a scan among others goes alone. Raises `RetryLater`,
        `SinkBroken`."""
        await asyncio.to_thread(self._remove, records)

    async def maintain(self, now_ns: int) -> None:
        """Nothing: InfluxDB applies the bucket's retention itself."""

    async def close(self) -> None:
        server, poster = self._server, self._poster
        self._server = self._poster = None
        if poster is not None:
            await asyncio.to_thread(poster.shutdown)
        if server is not None:
            await asyncio.to_thread(server.close)

    # --- in the thread ---

    def _write(self, records: Sequence[Record]) -> Settled:
        server, poster = self._server, self._poster
        if server is None or poster is None:
            raise RetryLater("influxdb: not open")
        with self._lock:
            call = _Call(server, self._writer, records)
            self._chunk_bytes = min(self._chunk_bytes, server.max_body_bytes)
            under_way: deque[tuple[Future[Refusal | None], range]] = deque()
            try:
                for chunk, body in self._chunks(call):
                    under_way.append((poster.submit(server.post, body), chunk))
                    if len(under_way) > POSTS:
                        self._finish(call, *under_way.popleft())
                while under_way:
                    self._finish(call, *under_way.popleft())
            except _TimedOut as late:
                self._chunk_bytes = max(MIN_CHUNK_BYTES, self._chunk_bytes // 2)
                raise RetryLater(str(late)) from late
            self._chunk_bytes = min(CHUNK_BYTES, self._chunk_bytes + MIN_CHUNK_BYTES)
            return call.settled()

    def _remove(self, records: Sequence[Record]) -> None:
        server = self._server
        if server is None:
            raise RetryLater("influxdb: not open")
        series: dict[tuple[tuple[str, str], ...], set[int]] = {}
        for record in records:
            series.setdefault(self._writer.tags_of(record), set()).add(stored_at(record))
        with self._lock:
            try:
                for tags, times in series.items():
                    _remove_times(server, dict(tags), sorted(t for t in times if MIN_NS <= t <= MAX_NS))
            except _TimedOut as late:
                raise RetryLater(str(late)) from late

    def _chunks(self, call: _Call) -> Iterator[tuple[range, bytes]]:
        """The records' lines in requests of at most `_chunk_bytes`, but for a longer line.

        What can never be a line is rejected at once.
        """
        records, line = call.records, self._writer.line
        lines: list[bytes] = []
        size = start = 0
        for i, record in enumerate(records):
            try:
                text = line(record)
            except Unwritable as err:
                call.reject(i, (), str(err))
                continue
            if lines and (size + len(text) >= self._chunk_bytes or len(lines) >= self._settings.batch_lines):
                yield range(start, i), b"\n".join(lines)
                lines, size, start = [], 0, i
            lines.append(text)
            size += len(text) + 1
        if lines:
            yield range(start, len(records)), b"\n".join(lines)

    @staticmethod
    def _finish(call: _Call, posted: Future[Refusal | None], chunk: range) -> None:
        refusal = posted.result()
        reached("influxdb.after_post")
        if refusal is not None:
            call.narrow(chunk, refusal)


def _remove_times(server: _Server, tags: dict[str, str], times: list[int]) -> None:
    """The lines with these tags at just these times."""
    waiting = [times[at : at + REMOVED_TIMES] for at in range(0, len(times), REMOVED_TIMES)]
    while waiting:
        wanted = waiting.pop()
        if not wanted:
            continue
        found = server.times(tags, wanted[0], wanted[-1])
        if not found & set(wanted):
            continue
        if len(wanted) == 1 or found <= set(wanted):
            server.delete(tags, wanted[0], wanted[-1])
        else:
            middle = len(wanted) // 2
            waiting += [wanted[middle:], wanted[:middle]]


async def tally(settings: InfluxDB) -> dict[str, Tally]:
    """Readings by `<tenant>/<gateway>`, counted by the server: for the audit. Raises `RetryLater`, `SinkBroken`."""

    def count() -> dict[str, Tally]:
        try:
            token = read_secret("influxdb token", file=settings.token_file, env=settings.token_env)
        except IdentityError as err:
            raise SinkBroken(str(err)) from err
        patient = msgspec.structs.replace(settings, timeout_s=max(settings.timeout_s, TALLY_TIMEOUT_S))
        server = _Server(patient, token.reveal(), compress=False)
        try:
            # A line has no seq, so whether two are of one reading cannot be asked.
            return {gateway: Tally(readings) for gateway, readings in server.tally().items()}
        except _TimedOut as late:
            raise RetryLater(str(late)) from late
        finally:
            server.close()

    return await asyncio.to_thread(count)


class _Call:
    """One call of `write`: what has been rejected so far, and the search for what else is at fault."""

    def __init__(self, server: _Server, writer: LineWriter, records: Sequence[Record]) -> None:
        self.records = records
        self._server = server
        self._writer = writer
        self._whole: dict[int, str] = {}
        self._points: dict[int, dict[int, str]] = {}
        self._faulty: set[int] = set()  # refused for more than their age

    def reject(self, index: int, points: Iterable[int], reason: str, *, expired: bool = False) -> None:
        """`points` empty: the whole record."""
        if not expired:
            self._faulty.add(index)
        found = self._points.setdefault(index, {})
        found.update(dict.fromkeys(points, reason))
        record = self.records[index]
        if not points or (isinstance(record, ScanRecord) and len(found) == len(record.values)):
            self._whole.setdefault(index, reason)

    def settled(self) -> Settled:
        rejected = []
        for index in sorted({*self._whole, *self._points}):
            if index in self._whole:
                rejected.append(Rejection(index, self._whole[index], expired=index not in self._faulty))
            else:
                by_point = self._points[index]
                reason = "; ".join(dict.fromkeys(by_point.values()))
                rejected.append(Rejection(index, reason, tuple(sorted(by_point)), index not in self._faulty))
        return Settled(tuple(rejected))

    def narrow(self, chunk: range, refusal: Refusal) -> None:
        """Stores of this chunk what can be stored, and rejects the rest. `refusal` is the answer to all of it."""
        units = [self._unit(i) for i in chunk if i not in self._whole]
        waiting = self._next(units, refusal)
        while waiting:
            units = waiting.pop()
            again = self._server.post(b"\n".join(unit.line for unit in units))
            if again is not None:
                waiting.extend(self._next(units, again))

    def _next(self, units: list[_Unit], refusal: Refusal) -> list[list[_Unit]]:
        """What to post after this refusal: narrower requests. Rejects where nothing narrower is left."""
        if refusal.fault is Fault.UNKNOWN:
            self._server.check()  # a fault that an empty request has too is not one of the data
        if refusal.fault is Fault.TOO_LARGE:
            self._server.shrink(sum(len(unit.line) + 1 for unit in units))
        if refusal.fault is Fault.FIELD:
            return [part for part in self._without_field(units, refusal) if part]
        if refusal.fault is Fault.TOO_OLD:
            dropped = refusal.dropped or 0
            if len(units) == 1 or dropped >= len(units):
                return self._reject_all(units, refusal)
            if dropped and "Upper Bound" not in refusal.text:
                units = sorted(units, key=_at)
                return [units[dropped:], units[:dropped]]
        return self._halves(units, refusal)

    def _halves(self, units: list[_Unit], refusal: Refusal) -> list[list[_Unit]]:
        if len(units) > 1:
            units = sorted(units, key=_at)  # faults that depend on the time then lie together
            middle = len(units) // 2
            return [units[middle:], units[:middle]]
        unit = units[0]
        if len(unit.points) > 1:
            middle = len(unit.points) // 2
            return [[self._part(unit, unit.points[middle:])], [self._part(unit, unit.points[:middle])]]
        return self._reject_all(units, refusal)

    def _reject_all(self, units: list[_Unit], refusal: Refusal) -> list[list[_Unit]]:
        # A scan beyond the upper bound is from the future: that is a fault of its time, and no age.
        expired = refusal.fault is Fault.TOO_OLD and "Upper Bound" not in refusal.text
        for unit in units:
            self.reject(unit.index, unit.points, f"influxdb: {refusal.text}", expired=expired)
        return []

    def _without_field(self, units: list[_Unit], refusal: Refusal) -> list[list[_Unit]]:
        """The units without the fields that are refused, and these fields alone.

        A line is dropped for one field, and the answer names one of perhaps many. So the fields of one line that has
        the named field are tried alone; those refused are then taken out of all lines like it.
        """
        alone = all(len(unit.points) <= 1 for unit in units)
        if alone:
            if len(units) == 1 or refusal.dropped == len(units):
                return self._reject_all(units, refusal)
            return self._halves(units, refusal)
        tried: set[str] = set()
        for unit in sorted(
            units, key=_at, reverse=True
        ):  # the newest is the least likely to be too old as well
            record = self.records[unit.index]
            if not isinstance(record, ScanRecord) or self._writer.measurement(record) != refusal.measurement:
                continue
            point = self._writer.point_of(record, refusal.field)
            if point is None or point not in unit.points or _kind(record, point) in tried:
                continue
            tried.add(_kind(record, point))
            if refused := self._refused_points(unit):
                fields = {(record.layout.names[i], _kind(record, i)) for i in refused}
                return self._parted(units, refusal.measurement, fields)
        return self._halves(units, refusal)

    def _refused_points(self, unit: _Unit) -> list[int]:
        """Which of a line's fields InfluxDB refuses, each tried alone: all at once, then by halves."""
        refused: list[int] = []
        waiting = [unit.points]
        while waiting:
            points = waiting.pop()
            refusal = self._server.post(b"\n".join(self._part(unit, (i,)).line for i in points))
            if refusal is None:
                continue
            if refusal.fault is not Fault.FIELD:
                return []  # the line has another fault as well, and says nothing about its fields
            if len(points) == 1 or refusal.dropped == len(points):
                refused.extend(points)
            else:
                middle = len(points) // 2
                waiting += [points[:middle], points[middle:]]
        return refused

    def _parted(
        self, units: list[_Unit], measurement: str, fields: set[tuple[str, str]]
    ) -> list[list[_Unit]]:
        """All units without these fields of this measurement, and these fields alone."""
        rest: list[_Unit] = []
        only: list[_Unit] = []
        for unit in units:
            record = self.records[unit.index]
            if not isinstance(record, ScanRecord) or self._writer.measurement(record) != measurement:
                rest.append(unit)
                continue
            names = record.layout.names
            out = [i for i in unit.points if (names[i], _kind(record, i)) in fields]
            if not out:
                rest.append(unit)
                continue
            only.extend(self._part(unit, (i,)) for i in out)
            if kept := tuple(i for i in unit.points if i not in set(out)):
                rest.append(self._part(unit, kept))
        return [rest, only]

    def _unit(self, index: int) -> _Unit:
        record = self.records[index]
        line = self._writer.line(record)
        if isinstance(record, ScanRecord):
            return _Unit(index, tuple(range(len(record.values))), line, stamp(record.taken_at_ns, record.seq))
        return _Unit(index, (), line, int(line.rpartition(b" ")[2]))

    def _part(self, unit: _Unit, points: tuple[int, ...]) -> _Unit:
        record = self.records[unit.index]
        assert isinstance(record, ScanRecord)  # noqa: S101 - only scans have points
        return _Unit(unit.index, points, self._writer.part(record, points), unit.at_ns)


def _at(unit: _Unit) -> int:
    return unit.at_ns


def _kind(record: ScanRecord, point: int) -> str:
    """The type that InfluxDB gives the point's field."""
    kind = record.layout.types[point]
    return kind if kind in ("bool", "str") else "float"


class _TimedOut(Exception):
    """No answer within the timeout."""


class _Server:
    """The seam to `influxdb-client`: every foreign error becomes one of ours here. Its calls block."""

    def __init__(self, settings: InfluxDB, token: str, *, compress: bool) -> None:
        from influxdb_client.client.influxdb_client import InfluxDBClient
        from influxdb_client.service.write_service import WriteService as Writes

        self.max_body_bytes = CHUNK_BYTES
        self._settings = settings
        self._where = f"influxdb {settings.url}"
        try:
            self._client = InfluxDBClient(
                settings.url,
                token,
                org=settings.org,
                timeout=int(settings.timeout_s * 1000),
                retries=False,  # the runner retries, and it alone
            )
        except (ValueError, OSError) as err:
            raise SinkBroken(f"{self._where}: {err}; check url") from err
        # Not `write_api`: it would compress at level 9, at 0.5 M values a second; level 1 does 9 M for 20 % more bytes.
        self._write: WriteService = Writes(self._client.api_client)  # type: ignore[no-untyped-call]
        self._encoding = "gzip" if compress else "identity"

    def close(self) -> None:
        self._client.close()  # type: ignore[no-untyped-call]

    def post(self, body: bytes) -> Refusal | None:
        """None: all of it is written. Raises `RetryLater`, `SinkBroken`, `_TimedOut`."""
        reached("influxdb.before_post")
        if self._encoding == "gzip":
            body = gzip.compress(body, GZIP_LEVEL)
        return self._refused(
            lambda: self._write.post_write(  # type: ignore[no-untyped-call]
                self._settings.org, self._settings.bucket, body, precision="ns", content_encoding=self._encoding,
                content_type="text/plain; charset=utf-8",
            )
        )  # fmt: skip

    def check(self) -> None:
        """Whether an empty write is accepted: address, token, organisation and bucket. Raises as `post` does."""
        refusal = self.post(b"")
        if refusal is not None:
            raise SinkBroken(f"{self._where} refuses even an empty write: {refusal.text}")

    def shrink(self, refused_bytes: int) -> None:
        """Requests of this size are refused: send smaller ones from now on."""
        smaller = max(MIN_CHUNK_BYTES, refused_bytes // 2)
        if smaller < self.max_body_bytes:
            log.warning(
                "%s refuses requests of %d bytes; now at most %d", self._where, refused_bytes, smaller
            )
            self.max_body_bytes = smaller

    def prepare(self) -> None:
        """Makes sure that there is a bucket to write to. Raises `RetryLater`, `SinkBroken`."""
        try:
            self._ensure_bucket()
            self.check()
        except _TimedOut as late:
            raise RetryLater(str(late)) from late

    def tally(self) -> dict[str, int]:
        """A reading is a value, or a quality that says that there is none."""
        counted: Counter[str] = Counter()
        absent = ", ".join(f'"{quality_word(reason)}"' for reason in Reason if not reason.has_value)
        everything = (
            f"from(bucket: {_flux_text(self._settings.bucket)})"
            " |> range(start: 1677-09-22T00:00:00Z, stop: 2262-04-11T00:00:00Z)"
            f' |> filter(fn: (r) => r._measurement != "{GAPS}" and r._measurement != "{EVENTS}")'
        )
        values = r"filter(fn: (r) => r._field !~ /\.(quality|exact)$/)"
        qualities = r"filter(fn: (r) => r._field =~ /\.quality$/)"
        none = f"filter(fn: (r) => contains(value: r._value, set: [{absent}]))"
        for part in (values, f"{qualities} |> {none}"):
            query = f"{everything} |> {part} |> count()"
            tables = self._call(lambda query=query: self._client.query_api().query(query))  # type: ignore[misc]
            for table in tables:
                for row in table.records:
                    counted[f"{row.values.get('tenant')}/{row.values.get('gateway')}"] += int(
                        row.values["_value"]
                    )
        return dict(counted)

    def times(self, tags: dict[str, str], first_ns: int, last_ns: int) -> set[int]:
        """When there are lines with these tags, from first to last. Raises as `post` does."""
        same = " and ".join(f"r[{_flux_text(key)}] == {_flux_text(value)}" for key, value in tags.items())
        # Flux' own times are for people; as integers they are exact.
        query = (
            f"from(bucket: {_flux_text(self._settings.bucket)})"
            f" |> range(start: time(v: {first_ns}), stop: time(v: {last_ns + 1}))"
            f" |> filter(fn: (r) => {same})"
            ' |> keep(columns: ["_time"]) |> map(fn: (r) => ({at: int(v: r._time)}))'
            ' |> group() |> distinct(column: "at")'
        )
        tables = self._call(lambda: self._client.query_api().query(query))
        return {int(row.values["_value"]) for table in tables for row in table.records}

    def delete(self, tags: dict[str, str], first_ns: int, last_ns: int) -> None:
        """Every line with these tags from first to last, both of them too. Raises as `post` does."""
        from influxdb_client.domain.delete_predicate_request import DeletePredicateRequest
        from influxdb_client.service.delete_service import DeleteService

        request = DeletePredicateRequest(  # type: ignore[no-untyped-call]
            start=_rfc3339(first_ns),
            stop=_rfc3339(last_ns),
            predicate=" AND ".join(
                f"{_predicate_text(key)}={_predicate_text(value)}" for key, value in tags.items()
            ),
        )
        service = DeleteService(self._client.api_client)  # type: ignore[no-untyped-call]
        self._call(
            lambda: service.post_delete(  # type: ignore[no-untyped-call]
                delete_predicate_request=request, org=self._settings.org, bucket=self._settings.bucket
            )
        )

    def _ensure_bucket(self) -> None:
        settings = self._settings
        found = self._call(self._find_bucket)
        wanted_s = int(settings.retention_days * 86_400)
        if found is not None:
            has_s = sum(rule.every_seconds or 0 for rule in found.retention_rules)
            if has_s != wanted_s:
                log.warning(
                    "%s: bucket %s keeps readings for %s days, the configuration says %s (0: for ever); "
                    "left as it is: change it with `influx bucket update`",
                    self._where, settings.bucket, has_s / 86_400, settings.retention_days,
                )  # fmt: skip
            return
        if not settings.create_bucket:
            return  # a token that may only write does not see the bucket: the empty write decides
        try:
            self._call(lambda: self._create_bucket(wanted_s))
        except SinkBroken:
            self.check()  # it may be there already, and the token only write to it
        else:
            log.info("%s: created bucket %s", self._where, settings.bucket)

    def _find_bucket(self) -> Bucket | None:
        found: Bucket | None = self._client.buckets_api().find_bucket_by_name(  # type: ignore[no-untyped-call]
            self._settings.bucket
        )
        return found

    def _create_bucket(self, retention_s: int) -> None:
        from influxdb_client.domain.bucket_retention_rules import BucketRetentionRules

        rule = BucketRetentionRules(type="expire", every_seconds=retention_s)  # type: ignore[no-untyped-call]
        rules = [rule] if retention_s else None
        self._client.buckets_api().create_bucket(
            bucket_name=self._settings.bucket, org=self._settings.org, retention_rules=rules
        )

    def _refused(self, call: Callable[[], object]) -> Refusal | None:
        from influxdb_client.client.exceptions import InfluxDBError
        from influxdb_client.rest import ApiException

        with self._network_errors():
            try:
                call()
            except ApiException as err:
                status = int(err.status or 0)
                if status == 0:
                    raise _tls_error(self._where, str(err.reason)) from err
                retry_after = err.headers.get("Retry-After") if err.headers else None
                return judge(status, _message(err.body), retry_after, where=self._where)
            except (
                InfluxDBError
            ) as err:  # the client's own refusal, as of an organisation that it does not see
                raise SinkBroken(f"{self._where}: {err}") from err
        return None

    def _call(self, call: Callable[[], T]) -> T:
        """A call of the API other than a write: any refusal is one of the configuration."""
        given: list[T] = []
        refusal = self._refused(lambda: given.append(call()))
        if refusal is not None:
            raise SinkBroken(f"{self._where}: {refusal.text}; check org, bucket and token")
        return given[0]

    @contextlib.contextmanager
    def _network_errors(self) -> Iterator[None]:
        from urllib3.exceptions import HTTPError, LocationParseError
        from urllib3.exceptions import TimeoutError as NoAnswer

        try:
            yield
        except LocationParseError as err:
            raise SinkBroken(f"{self._where}: {err}; check url") from err
        except NoAnswer as err:
            raise _TimedOut(f"{self._where}: no answer within {self._settings.timeout_s} s") from err
        except ssl.SSLError as err:
            raise _tls_error(self._where, str(err)) from err
        except (HTTPError, OSError) as err:
            raise RetryLater(f"{self._where}: {err}") from err


def _flux_text(text: str) -> str:
    """A string literal; what stands in it is never run."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("${", "\\${")
    return f'"{escaped}"'


def _predicate_text(text: str) -> str:
    """A name or a value in a delete predicate."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _rfc3339(at_ns: int) -> str:
    seconds, ns = divmod(at_ns, 10**9)
    whole = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(seconds=seconds)
    return f"{whole:%Y-%m-%dT%H:%M:%S}.{ns:09d}Z"


def _tls_error(where: str, text: str) -> RetryLater | SinkBroken:
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return SinkBroken(f"{where}: its certificate is not trusted ({text}); add its CA to the system's")
    return RetryLater(f"{where}: {text}")


def _message(body: object) -> str:
    """The `message` of InfluxDB's JSON, or the text as it came (a proxy's page)."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or "")
    try:
        return msgspec.json.decode(text, type=_ErrorBody).message or text
    except msgspec.DecodeError:
        return text


class _ErrorBody(msgspec.Struct):
    message: str = ""
