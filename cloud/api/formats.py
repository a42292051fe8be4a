"""Readings as JSON, CSV and Arrow, page by page: a client may take as many as there are, and memory stays small.

CSV is opened in spreadsheets, and a text cell there that starts with = + - @ (or a tab or a carriage return) is run as
a formula: such a cell gets a leading apostrophe. Numbers are ours and are left as they are.
"""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from cloud.api.models import Reading, Value

if TYPE_CHECKING:
    import pyarrow as pa

CSV_TYPE: Final = "text/csv; charset=utf-8"
ARROW_TYPE: Final = "application/vnd.apache.arrow.stream"
JSON_TYPE: Final = "application/json"
COLUMNS: Final = (
    "gateway", "device", "point", "unit", "type", "taken_at", "taken_at_ns", "value", "quality", "reason",
    "clock_synchronized", "received_at",
)  # fmt: skip
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")
_encode: Final = msgspec.json.Encoder().encode


class HasNext(Protocol):
    """Knows where the pages ended, once they are all taken."""

    @property
    def next(self) -> str | None: ...


def safe_cell(text: str) -> str:
    """A text that no spreadsheet runs."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def _cell(value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return safe_cell(value) if isinstance(value, str) else repr(value)


def csv_text(readings: Iterable[Reading]) -> str:
    """Rows without the header."""
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\r\n").writerow  # RFC 4180
    for r in readings:
        write(
            (
                safe_cell(r.gateway), safe_cell(r.device), safe_cell(r.point), safe_cell(r.unit), r.type, r.taken_at,
                r.taken_at_ns, _cell(r.value), r.quality, r.reason or "", _cell(r.clock_synchronized), r.received_at,
            )
        )  # fmt: skip
    return out.getvalue()


async def as_csv(pages: AsyncIterator[Sequence[Reading]]) -> AsyncIterator[bytes]:
    yield (",".join(COLUMNS) + "\r\n").encode()
    async for page in pages:
        yield csv_text(page).encode()


async def as_json(pages: AsyncIterator[Sequence[Reading]], last: HasNext) -> AsyncIterator[bytes]:
    """A `ReadingsPage`, written as it comes."""
    comma = b""
    yield b'{"readings":['
    async for page in pages:
        if page:
            yield comma + b",".join([_encode(reading) for reading in page])
            comma = b","
    yield b'],"next":' + _encode(last.next) + b"}"


def arrow_schema() -> pa.Schema:
    """`value` is a double (a boolean is 1 or 0); `text` is a string's value, or an integer that no double holds."""
    import pyarrow as pa

    word = pa.dictionary(pa.int32(), pa.string())
    at = pa.timestamp("ns", tz="UTC")
    return pa.schema([
        ("gateway", word), ("device", word), ("point", word), ("unit", word), ("type", word), ("taken_at", at),
        ("value", pa.float64()), ("text", pa.string()), ("quality", word), ("reason", word),
        ("clock_synchronized", pa.bool_()),
    ])  # fmt: skip


def arrow_batch(readings: Sequence[Reading]) -> pa.RecordBatch:
    import pyarrow as pa

    schema = arrow_schema()
    columns = {
        "gateway": [r.gateway for r in readings],
        "device": [r.device for r in readings],
        "point": [r.point for r in readings],
        "unit": [r.unit for r in readings],
        "type": [r.type for r in readings],
        "taken_at": [r.taken_at_ns for r in readings],
        "value": [float(r.value) if isinstance(r.value, int | float) else None for r in readings],
        "text": [_exact_text(r.value) for r in readings],
        "quality": [r.quality for r in readings],
        "reason": [r.reason for r in readings],
        "clock_synchronized": [r.clock_synchronized for r in readings],
    }
    arrays = []
    for field in schema:
        if pa.types.is_dictionary(field.type):
            arrays.append(pa.array(columns[field.name], pa.string()).dictionary_encode())
        else:
            arrays.append(pa.array(columns[field.name]).cast(field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _exact_text(value: Value) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**53) <= value <= 2**53:
        return str(value)
    return None


async def as_arrow(pages: AsyncIterator[Sequence[Reading]]) -> AsyncIterator[bytes]:
    """An Arrow IPC stream."""
    import pyarrow as pa

    sink = _Drain()
    # A page has its own dictionaries; a stream may replace them (Arrow IPC, "Dictionary Messages").
    with pa.ipc.new_stream(pa.PythonFile(sink, "w"), arrow_schema()) as writer:
        yield sink.take()
        async for page in pages:
            if page:
                writer.write_batch(arrow_batch(page))
                yield sink.take()
    yield sink.take()


class _Drain(io.RawIOBase):
    """A file that gives back what was written to it."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        part = bytes(memoryview(data))  # type: ignore[arg-type]  # what io calls a bytes-like
        self._parts.append(part)
        return len(part)

    def take(self) -> bytes:
        taken = b"".join(self._parts)
        self._parts.clear()
        return taken
