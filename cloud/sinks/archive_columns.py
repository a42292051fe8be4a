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
from collections.abc import Sequence
from typing import Final, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cloud.sinks.contract import EventRecord, GapRecord, ScanRecord
from drivers.contract import Quality, Reason, Value
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
    ("driver", pa.string()), ("earliest_ns", pa.int64()), ("latest_ns", pa.int64()),
])  # fmt: skip
GAPS: Final = pa.schema([
    ("day", pa.date32()), ("tenant", pa.string()),
    ("gateway", pa.string()), ("device", pa.string()), ("reason", pa.string()),
    ("from_at", _AT), ("to_at", _AT), ("epoch", pa.int64()), ("seq", pa.int64()),
    ("scans", pa.int64()), ("readings", pa.int64()),
    ("gap_epoch", pa.int64()), ("first", pa.int64()), ("last", pa.int64()), ("held", pa.string()),
    ("received_at", _AT), ("priority", pa.string()), ("frames", pa.int64()),
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


def partition_of(record: ScanRecord | GapRecord | EventRecord) -> Partition:
    if isinstance(record, ScanRecord):
        at_ns = record.taken_at_ns
    else:
        at_ns = record.from_ns if isinstance(record, GapRecord) else record.at_ns
    return at_ns // NS_PER_DAY, record.tenant


def readings(scans: Sequence[ScanRecord]) -> dict[Partition, pa.Table]:
    """The rows of these scans by partition, without the partition's own columns."""
    parted: dict[Partition, dict[tuple[str, int, int], _Scans]] = {}
    groups: dict[tuple[str, int, int], _Scans] = {}
    current: Partition = (-1, "")
    for scan in scans:
        partition = (scan.taken_at_ns // NS_PER_DAY, scan.tenant)
        if partition != current:  # mostly the same as the one before
            groups, current = parted.setdefault(partition, {}), partition
        key = (scan.gateway, scan.epoch, scan.layout_id)
        group = groups.get(key)
        if group is None:
            group = groups[key] = _Scans(scan.gateway, scan.epoch, scan.layout)
        group.scans.append(scan)
    return {partition: _readings(list(groups.values())) for partition, groups in parted.items()}


def _readings(groups: Sequence[_Scans]) -> pa.Table:
    """Per group only what differs in shape; every column is then one look-up by scan, point or group."""
    scans: list[ScanRecord] = []
    names: list[str] = []
    units: list[str] = []
    types: list[str] = []
    first_point: dict[int, int] = {}
    values: list[npt.NDArray[np.float64]] = []
    by_scan: list[Ints] = []
    by_point: list[Ints] = []
    sizes: list[int] = []
    texts: dict[int, str] = {}
    bad: list[tuple[int, int, ScanRecord]] = []
    row = 0
    for group in groups:
        layout, theirs = group.layout, group.scans
        n, m = len(theirs), len(layout.names)
        known = first_point.setdefault(id(layout), len(names))
        if known == len(names):
            names += layout.names
            units += layout.units
            types += layout.types
        values.append(_values(theirs, layout, texts, row))
        by_scan.append(np.tile(np.arange(len(scans), len(scans) + n), m))
        by_point.append(np.repeat(np.arange(known, known + m), n))
        bad += [(row + k, n, scan) for k, scan in enumerate(theirs) if scan.reasons]
        scans += theirs
        sizes.append(n * m)
        row += n * m
    value = np.concatenate(values)
    at_scan, at_point = np.concatenate(by_scan), np.concatenate(by_point)
    at_group = np.repeat(np.arange(len(groups)), sizes)
    reason = _reasons(bad, value, texts)

    def of_scan(column: list[int]) -> Ints:
        return np.array(column, np.int64)[at_scan]

    def of_point(words: list[str]) -> pa.Array:
        return _dictionary(words, at_point)

    def of_group(words: list[str]) -> pa.Array:
        return _dictionary(words, at_group)

    taken = of_scan([scan.taken_at_ns for scan in scans])
    boot_ns = of_scan([scan.boot_ns for scan in scans])
    without = boot_ns == 0
    earliest, latest = (
        of_scan([scan.earliest_ns for scan in scans]),
        of_scan([scan.latest_ns for scan in scans]),
    )
    built = {
        "gateway": of_group([group.gateway for group in groups]),
        "device": of_group([group.layout.device for group in groups]),
        "point": of_point(names),
        "taken_at": _times(taken),
        "taken_at_ns": pa.array(taken),
        "epoch": pa.array(np.array([group.epoch for group in groups], np.int64)[at_group]),
        "seq": pa.array(of_scan([scan.seq for scan in scans])),
        "value": pa.array(value, mask=np.isnan(value)),
        "text": _sparse(texts, row),
        "quality": pa.DictionaryArray.from_arrays(pa.array(_QUALITY_INDEX[reason]), pa.array(_QUALITY_WORDS)),
        "reason": pa.DictionaryArray.from_arrays(
            pa.array(_REASON_INDEX[reason], mask=reason == 0), pa.array(_REASON_WORDS)
        ),
        "unit": of_point(units),
        "type": of_point(types),
        "measurement": of_group([group.layout.measurement for group in groups]),
        "labels": of_group([_labels(group.layout) for group in groups]),
        "received_at": _times(of_scan([scan.received_at_ns for scan in scans])),
        "clock_synchronized": pa.array(of_scan([scan.clock_synchronized for scan in scans]).astype(bool)),
        "boot": pa.array(of_scan([scan.boot for scan in scans]), mask=without),
        "boot_ns": pa.array(boot_ns, mask=without),
        "driver": of_group([group.layout.driver for group in groups]),
        "earliest_ns": pa.array(earliest, mask=earliest == 0),
        "latest_ns": pa.array(latest, mask=latest == 0),
    }
    return pa.table(built)


def _dictionary(words: Sequence[str], at: Ints) -> pa.Array:
    """`words[at]`, each different word once."""
    numbers: dict[str, int] = {}
    index = np.array([numbers.setdefault(word, len(numbers)) for word in words], np.int32)
    return pa.DictionaryArray.from_arrays(pa.array(index[at]), pa.array(list(numbers), pa.string()))


def _values(
    scans: Sequence[ScanRecord], layout: Layout, texts: dict[int, str], row: int
) -> npt.NDArray[np.float64]:
    """Point by point, NaN where there is none. What a double does not hold goes to `texts` by row."""
    n = len(scans)
    numbers: list[Sequence[Value | None]] = [scan.values for scan in scans]
    strings = [i for i, kind in enumerate(layout.types) if kind == "str"]
    if strings:
        copies = [list(values) for values in numbers]
        for i in strings:
            for k, values in enumerate(copies):
                text = values[i]
                values[i] = None
                if text is not None:
                    texts[row + i * n + k] = str(text)
        numbers = list(copies)
    for i, kind in enumerate(layout.types):
        if kind in ("i64", "u64"):
            for k, column in enumerate(numbers):
                number = column[i]
                if isinstance(number, int) and not -_EXACT_BELOW <= number <= _EXACT_BELOW:
                    texts[row + i * n + k] = str(number)
    return np.array(numbers, np.float64).T.ravel()


def _reasons(
    bad: Sequence[tuple[int, int, ScanRecord]], values: npt.NDArray[np.float64], texts: dict[int, str]
) -> npt.NDArray[np.int16]:
    """By row. `bad` are the scans with reasons: the row of their first point, and how far it is to the next."""
    found = np.zeros(len(values), np.int16)
    for row, step, scan in bad:
        found[[row + i * step for i in scan.reasons]] = list(scan.reasons.values())
    # A reading without a value has a reason, whoever forgot to give one; a string's value stands in `texts`.
    missing = np.isnan(values) & (found == 0)
    if missing.any():
        if texts:
            missing[list(texts)] = False
        found[missing] = Reason.MISSING
    return found


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
    priority: str
    frames: int


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
            gap.priority, gap.frames,
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
