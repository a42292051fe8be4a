"""Records as the columns of the archive's tables: one row per reading, gap or event. Pure: no IO, no clock.

Rules:
1. One row per reading, also where there is no value: `quality` and `reason` say why. `value` is a double (a boolean is
   1 or 0); `text` is a string's value, or the digits of an integer that no double holds (beyond 2^53).
2. (tenant, gateway, epoch, seq, point) names a row for ever; `taken_at_ns` is exact, `taken_at` the same for people.
3. A table's partition is the UTC day that the reading was taken, and its tenant.
4. Rows of one file lie by device, then point, then time: like stands beside like, which packs and reads best.
   Columns are built by numpy from whole scans; no Python object is made per value.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cloud.sinks.contract import EventRecord, GapRecord, ScanRecord
from drivers.contract import Quality, Reason
from sync.wire import Layout

NS_PER_DAY: Final = 86_400_000_000_000
PARTITION: Final = ("day", "tenant")
_AT: Final = pa.timestamp("us", tz="UTC")
_EXACT_BELOW: Final = 2**53

READINGS: Final = pa.schema([
    ("day", pa.date32()), ("tenant", pa.string()),
    ("gateway", pa.string()), ("device", pa.string()), ("point", pa.string()),
    ("taken_at", _AT), ("taken_at_ns", pa.int64()), ("epoch", pa.int64()), ("seq", pa.int64()),
    ("value", pa.float64()), ("text", pa.string()), ("quality", pa.string()), ("reason", pa.string()),
    ("unit", pa.string()), ("type", pa.string()), ("measurement", pa.string()), ("labels", pa.string()),
    ("received_at", _AT), ("clock_synchronized", pa.bool_()), ("boot", pa.int64()), ("boot_ns", pa.int64()),
])  # fmt: skip
GAPS: Final = pa.schema([
    ("day", pa.date32()), ("tenant", pa.string()),
    ("gateway", pa.string()), ("device", pa.string()), ("reason", pa.string()),
    ("from_at", _AT), ("to_at", _AT), ("epoch", pa.int64()), ("seq", pa.int64()),
    ("scans", pa.int64()), ("readings", pa.int64()),
    ("gap_epoch", pa.int64()), ("first", pa.int64()), ("last", pa.int64()), ("held", pa.string()),
    ("received_at", _AT),
])  # fmt: skip
EVENTS: Final = pa.schema([
    ("day", pa.date32()), ("tenant", pa.string()),
    ("gateway", pa.string()), ("device", pa.string()), ("code", pa.string()), ("text", pa.string()),
    ("at", _AT), ("at_ns", pa.int64()), ("epoch", pa.int64()), ("seq", pa.int64()), ("received_at", _AT),
])  # fmt: skip

Partition: TypeAlias = tuple[int, str]
"""Days since 1970, tenant."""
Ints: TypeAlias = npt.NDArray[np.int64]

_REASON_WORDS: Final = [reason.name.lower() for reason in Reason]
_REASON_INDEX: Final = np.zeros(256, np.int32)
_QUALITY_INDEX: Final = np.zeros(256, np.int32)
for _at, _reason in enumerate(Reason):
    _REASON_INDEX[_reason] = _at
    _QUALITY_INDEX[_reason] = _reason.quality
_QUALITY_WORDS: Final = [quality.name.lower() for quality in sorted(Quality)]


class _Scans:
    """Scans of one layout of one gateway, with the columns that differ from scan to scan."""

    __slots__ = ("epoch", "gateway", "layout", "scans")

    def __init__(self, gateway: str, epoch: int, layout: Layout) -> None:
        self.gateway = gateway
        self.epoch = epoch
        self.layout = layout
        self.scans: list[ScanRecord] = []


class _Words:
    """Strings by number, for a dictionary column."""

    __slots__ = ("_numbers",)

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, word: str) -> int:
        return self._numbers.setdefault(word, len(self._numbers))

    def numbers(self, words: Iterable[str]) -> npt.NDArray[np.int32]:
        return np.array([self.number(word) for word in words], np.int32)

    def column(self, numbers: npt.NDArray[np.int32]) -> pa.Array:
        return pa.DictionaryArray.from_arrays(pa.array(numbers), pa.array(list(self._numbers), pa.string()))


def partition_of(record: ScanRecord | GapRecord | EventRecord) -> Partition:
    if isinstance(record, ScanRecord):
        at_ns = record.taken_at_ns
    else:
        at_ns = record.from_ns if isinstance(record, GapRecord) else record.at_ns
    return at_ns // NS_PER_DAY, record.tenant


def readings(scans: Sequence[ScanRecord]) -> dict[Partition, pa.Table]:
    """The rows of these scans by partition, without the partition's own columns."""
    parted: dict[Partition, dict[tuple[str, int, int], _Scans]] = {}
    for scan in scans:
        groups = parted.setdefault((scan.taken_at_ns // NS_PER_DAY, scan.tenant), {})
        key = (scan.gateway, scan.epoch, scan.layout_id)
        group = groups.get(key)
        if group is None:
            group = groups[key] = _Scans(scan.gateway, scan.epoch, scan.layout)
        group.scans.append(scan)
    return {partition: _readings(list(groups.values())) for partition, groups in parted.items()}


def _readings(groups: Sequence[_Scans]) -> pa.Table:
    points, units, types = _Words(), _Words(), _Words()
    gateways, devices, measurements, labels = _Words(), _Words(), _Words(), _Words()
    values: list[npt.NDArray[np.float64]] = []
    reasons: list[npt.NDArray[np.int16]] = []
    columns: list[tuple[list[npt.NDArray[np.int32]], _Words]] = [([], points), ([], units), ([], types)]
    scan_columns: list[list[Ints]] = [[], [], [], [], [], []]
    texts: dict[int, str] = {}
    sizes: list[int] = []
    row = 0
    for group in groups:
        scans, layout = group.scans, group.layout
        n, m = len(scans), len(layout.names)
        values.append(_values(scans, layout, texts, row))
        reasons.append(_reasons(scans, layout, values[-1], n, m))
        for (numbers, words), names in zip(columns, (layout.names, layout.units, layout.types), strict=True):
            numbers.append(np.repeat(words.numbers(names), n))
        for held, column in zip(scan_columns, _per_scan(scans), strict=True):
            held.append(np.tile(column, m))
        sizes.append(n * m)
        row += n * m

    def spread(words: _Words, of: Iterable[str]) -> pa.Array:
        return words.column(np.repeat(words.numbers(of), sizes))

    value, reason = np.concatenate(values), np.concatenate(reasons)
    taken, seq, received, synchronized, boot, boot_ns = (np.concatenate(held) for held in scan_columns)
    bad = reason != 0
    without = boot_ns == 0
    built = {
        "gateway": spread(gateways, (group.gateway for group in groups)),
        "device": spread(devices, (group.layout.device for group in groups)),
        "point": points.column(np.concatenate(columns[0][0])),
        "taken_at": _times(taken),
        "taken_at_ns": pa.array(taken),
        "epoch": pa.array(np.repeat(np.array([group.epoch for group in groups], np.int64), sizes)),
        "seq": pa.array(seq),
        "value": pa.array(value, mask=np.isnan(value)),
        "text": _sparse(texts, row),
        "quality": pa.DictionaryArray.from_arrays(pa.array(_QUALITY_INDEX[reason]), pa.array(_QUALITY_WORDS)),
        "reason": pa.DictionaryArray.from_arrays(
            pa.array(_REASON_INDEX[reason], mask=~bad), pa.array(_REASON_WORDS)
        ),
        "unit": units.column(np.concatenate(columns[1][0])),
        "type": types.column(np.concatenate(columns[2][0])),
        "measurement": spread(measurements, (group.layout.measurement for group in groups)),
        "labels": spread(labels, (_labels(group.layout) for group in groups)),
        "received_at": _times(received),
        "clock_synchronized": pa.array(synchronized.astype(bool)),
        "boot": pa.array(boot, mask=without),
        "boot_ns": pa.array(boot_ns, mask=without),
    }
    return pa.table(built)


def _values(
    scans: Sequence[ScanRecord], layout: Layout, texts: dict[int, str], row: int
) -> npt.NDArray[np.float64]:
    """Point by point, NaN where there is none. What a double does not hold goes to `texts` by row."""
    n = len(scans)
    strings = [i for i, kind in enumerate(layout.types) if kind == "str"]
    wide = [i for i, kind in enumerate(layout.types) if kind in ("i64", "u64")]
    rows = [scan.values for scan in scans]
    if strings:
        numbers = [list(values) for values in rows]
        for i in strings:
            for k, values in enumerate(numbers):
                text = values[i]
                values[i] = None
                if text is not None:
                    texts[row + i * n + k] = str(text)
    else:
        numbers = rows  # type: ignore[assignment]  # read only from here on
    for i in wide:
        for k, values in enumerate(numbers):
            number = values[i]
            if isinstance(number, int) and not -_EXACT_BELOW <= number <= _EXACT_BELOW:
                texts[row + i * n + k] = str(number)
    return np.array(numbers, np.float64).T.ravel()


def _reasons(
    scans: Sequence[ScanRecord], layout: Layout, values: npt.NDArray[np.float64], n: int, m: int
) -> npt.NDArray[np.int16]:
    found = np.zeros((m, n), np.int16)
    for k, scan in enumerate(scans):
        if scan.reasons:
            found[list(scan.reasons), k] = list(scan.reasons.values())
    # A reading without a value has a reason, whoever forgot to give one; a string's value stands in `text`.
    missing = np.isnan(values).reshape(m, n) & (found == 0)
    for i, kind in enumerate(layout.types):
        if kind == "str":
            missing[i] = [scan.values[i] is None and not found[i, k] for k, scan in enumerate(scans)]
    found[missing] = Reason.MISSING
    return found.ravel()


def _per_scan(scans: Sequence[ScanRecord]) -> tuple[Ints, ...]:
    return (
        np.array([scan.taken_at_ns for scan in scans], np.int64),
        np.array([scan.seq for scan in scans], np.int64),
        np.array([scan.received_at_ns for scan in scans], np.int64),
        np.array([scan.clock_synchronized for scan in scans], np.int64),
        np.array([scan.boot for scan in scans], np.int64),
        np.array([scan.boot_ns for scan in scans], np.int64),
    )


def _times(ns: Ints) -> pa.Array:
    return pa.array(ns // 1000).cast(_AT)


def _sparse(texts: dict[int, str], rows: int) -> pa.Array:
    if not texts:
        return pa.nulls(rows, pa.string())
    column: list[str | None] = [None] * rows
    for at, text in texts.items():
        column[at] = text
    return pa.array(column, pa.string())


def _labels(layout: Layout) -> str:
    """The device's labels as JSON."""
    return json.dumps(dict(layout.tags), sort_keys=True, ensure_ascii=False) if layout.tags else "{}"


class _GapRow(msgspec.Struct):
    gateway: str
    device: str
    reason: str
    from_at: int
    to_at: int
    epoch: int
    seq: int
    scans: int
    readings: int
    gap_epoch: int
    first: int
    last: int
    held: str
    received_at: int


class _EventRow(msgspec.Struct):
    gateway: str
    device: str
    code: str
    text: str
    at: int
    at_ns: int
    epoch: int
    seq: int
    received_at: int


def gaps(records: Sequence[GapRecord]) -> dict[Partition, pa.Table]:
    """One row per gap; `held` are the ranges of it that the journal has after all, as `3-5 8-8`."""
    parted: dict[Partition, list[_GapRow]] = {}
    for record in records:
        gap = record.gap
        parted.setdefault(partition_of(record), []).append(_GapRow(
            record.gateway, gap.device, gap.reason, record.from_ns // 1000, record.to_ns // 1000, record.epoch,
            record.seq, gap.scans, gap.readings, gap.epoch, gap.first, gap.last,
            " ".join(f"{first}-{last}" for first, last in record.held), record.received_at_ns // 1000,
        ))  # fmt: skip
    return {partition: _table(rows, GAPS) for partition, rows in parted.items()}


def events(records: Sequence[EventRecord]) -> dict[Partition, pa.Table]:
    """One row per event."""
    parted: dict[Partition, list[_EventRow]] = {}
    for record in records:
        event = record.event
        parted.setdefault(partition_of(record), []).append(_EventRow(
            record.gateway, event.device, event.code, event.text, record.at_ns // 1000, record.at_ns,
            record.epoch, record.seq, record.received_at_ns // 1000,
        ))  # fmt: skip
    return {partition: _table(rows, EVENTS) for partition, rows in parted.items()}


def _table(rows: Sequence[_GapRow] | Sequence[_EventRow], schema: pa.Schema) -> pa.Table:
    fields = [field for field in schema if field.name not in PARTITION]
    columns = {
        field.name: pa.array([getattr(row, field.name) for row in rows], field.type) for field in fields
    }
    return pa.table(columns)
