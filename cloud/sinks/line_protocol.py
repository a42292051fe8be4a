"""Records as InfluxDB line protocol. Pure: no IO, no clock.

One line per scan: measurement from the device's layout; tags tenant, gateway, device and the configured labels; one
field per point. Rules:

1. Every reading leaves a trace: a value is a field with the point's name; a reading that is not good has
   `<point>.quality` = `"<quality>:<reason>"` ("bad:timeout"), with or without its value. So an auditor counts, per
   series and time, the distinct field names without their `.quality` and `.exact`.
2. One type per field for ever: every number is a float, whatever integer type the point declares. An integer field
   would conflict the day a technician adds a scale, and InfluxDB drops the whole line for one conflicting field.
   What a double cannot hold (64-bit integers beyond 2^53) also stands in `<point>.exact`, as a string.
3. Two scans of one series at the same instant are both kept: InfluxDB keeps one value per series and nanosecond, so
   the last three digits of the stored time are the scan's `seq % 1000` (`stamp`). The same scan always has the same
   time, so writing it again changes nothing; the error is below a microsecond.
4. A scan whose time is an estimate has `time.quality` = `"uncertain:clock"`, once for all of its points.
5. No name is lost to InfluxDB's own: it drops a field called `time` and a line starting with `#` without a word
   (seen on 2.7.12: 204, nothing stored), refuses some tag keys, and cannot query others. Such names are changed:
   a trailing `_` on a field, `label_` before a tag, `_` before a measurement.
6. A gap is a line of `headgate_gaps`, an event one of `headgate_events`.

The fast path is one `%` of a ready-made template per scan; a template is made once per gateway and layout. Numbers and
booleans are written by msgspec's JSON encoder, three to six times as fast as `repr`, and read by InfluxDB all the same.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Final

import msgspec

from cloud.sinks.contract import EventRecord, GapRecord, Record, ScanRecord
from drivers.contract import Reason, Value
from sync.wire import Layout

MIN_NS: Final = -9_223_372_036_854_775_806  #: InfluxDB's own words: "time outside range"
MAX_NS: Final = 9_223_372_036_854_775_806
GAPS: Final = "headgate_gaps"
EVENTS: Final = "headgate_events"
MAX_TEXT_BYTES: Final = 1_048_576  #: a longer string field is refused ("is too long, … > 1048576")
MAX_TEMPLATES: Final = 8_192  #: kept ready; above it the oldest is made anew when met

_encode: Final = msgspec.json.Encoder().encode
_EXACT_BELOW: Final = 2**53  #: every integer up to here is a double
_OURS: Final = ("tenant", "gateway", "device")
_FIELD_TAKEN: Final = re.compile(
    r"(?:time|_time|_start|_stop|_field|_value|_measurement|tenant|gateway|device|.*\.quality|.*\.exact)_*",
    re.DOTALL,
)
_BEFORE_ESCAPED: Final = re.compile(r'\\(?=[,= "]|\Z)')
_CONTROL: Final = {c: f"\\x{c:02x}" for c in (*range(32), 127)}


class Unwritable(ValueError):
    """A record that InfluxDB can never take; the text says why."""


def stamp(at_ns: int, seq: int) -> int:
    """The time under which a record is stored (rule 3)."""
    return at_ns - at_ns % 1000 + seq % 1000


def stored_at(record: Record) -> int:
    """The time under which this record is stored."""
    if isinstance(record, ScanRecord):
        return stamp(record.taken_at_ns, record.seq)
    return stamp(record.from_ns if isinstance(record, GapRecord) else record.at_ns, record.seq)


def quality_word(reason: Reason) -> str:
    """`bad:timeout`: the quality, and the reason's published name."""
    return f"{reason.quality.name.lower()}:{reason.name.lower()}"


def field_name(point: str) -> str:
    """The field of a point's values, before escaping (rule 5)."""
    return f"{point}_" if _FIELD_TAKEN.fullmatch(point) else point or "_"


class _Template:
    """A layout of one gateway made ready."""

    __slots__ = ("_by_field", "_fields", "fast", "fmt", "measurement", "prefix", "texts", "wide")

    def __init__(self, tenant: str, gateway: str, layout: Layout) -> None:
        self.measurement = _measurement_name(layout.measurement or layout.driver)
        tags = _tags(tenant, gateway, layout.device, layout.tags)
        self.prefix = f"{_escape_measurement(self.measurement)},{tags} "
        names: list[str] = []
        seen: set[str] = set()
        for point in layout.names:
            name = field_name(point)
            while name in seen:
                name += "_"
            seen.add(name)
            names.append(name)
        self._fields = [_escape_key(name) for name in names]
        self._by_field = {name: i for i, name in enumerate(names)}
        self.texts = tuple(i for i, kind in enumerate(layout.types) if kind == "str")
        self.wide = tuple(
            i
            for i, kind in enumerate(layout.types)
            if kind in ("i64", "u64") and layout.scales[i] == 1.0 and layout.offsets[i] == 0.0
        )
        self.fast = not self.texts and not self.wide
        body = ",".join(f"{_literal(field)}=%b" for field in self._fields)
        self.fmt = f"{_literal(self.prefix)}{body} %d".encode()

    def parts(self, scan: ScanRecord, points: Iterable[int]) -> list[str]:
        """`name=value` of these points, with their qualities."""
        out: list[str] = []
        values, reasons, wide, fields = scan.values, scan.reasons, self.wide, self._fields
        for i in points:
            value, field = values[i], fields[i]
            reason = reasons.get(i, Reason.GOOD)
            if value is None:
                reason = reason or Reason.MISSING  # rule 1: no reading without a trace
            else:
                out.append(f"{field}={_text(value) if isinstance(value, str) else _encode(value).decode()}")
                if i in wide and abs(int(value)) > _EXACT_BELOW:
                    out.append(f'{field}.exact="{value}"')
            if reason:
                out.append(f'{field}.quality="{quality_word(reason)}"')
        return out

    def point_of(self, field: str) -> int | None:
        """The point that a field belongs to."""
        found = self._by_field.get(field)
        if found is None:
            base, dot, suffix = field.rpartition(".")
            found = self._by_field.get(base) if dot and suffix in ("quality", "exact") else None
        return found


class LineWriter:
    """Writes lines and keeps the templates it has made. Not for several threads."""

    def __init__(self) -> None:
        self._templates: dict[tuple[str, str, int], _Template] = {}

    def line(self, record: Record) -> bytes:
        """The whole record as one line. Raises `Unwritable`."""
        if not isinstance(record, ScanRecord):
            return (_gap(record) if isinstance(record, GapRecord) else _event(record)).encode()
        template = self._template(record)
        at_ns = record.taken_at_ns
        at_ns += record.seq % 1000 - at_ns % 1000
        values = record.values
        if (
            template.fast
            and not record.reasons
            and record.clock_synchronized
            and MIN_NS <= at_ns <= MAX_NS
            and None not in values
        ):
            return template.fmt % (*_encode(values)[1:-1].split(b","), at_ns)
        return self.part(record, range(len(values)))

    def lines(self, records: Sequence[Record]) -> list[bytes]:
        """All of them, in order. Raises `Unwritable`."""
        line = self.line
        return [line(record) for record in records]

    def part(self, scan: ScanRecord, points: Iterable[int]) -> bytes:
        """One line with these points only. Raises `Unwritable`."""
        at_ns = stamp(scan.taken_at_ns, scan.seq)
        _check_time(at_ns)
        template = self._template(scan)
        parts = template.parts(scan, points)
        if not scan.clock_synchronized:
            parts.append(f'time.quality="{quality_word(Reason.CLOCK)}"')
        return f"{template.prefix}{','.join(parts)} {at_ns}".encode()

    def measurement(self, record: Record) -> str:
        """As InfluxDB names it in its answers."""
        if isinstance(record, ScanRecord):
            return self._template(record).measurement
        return GAPS if isinstance(record, GapRecord) else EVENTS

    def tags_of(self, record: Record) -> tuple[tuple[str, str], ...]:
        """What tells the record's series apart from another device's, `_measurement` first: pairs without an empty
        value, as InfluxDB stores them."""
        more: tuple[tuple[str, str], ...] = ()
        if isinstance(record, ScanRecord):
            device = record.layout.device
        elif isinstance(record, GapRecord):
            device, more = record.gap.device, (("reason", record.gap.reason),)
        else:
            device, more = record.event.device, (("code", record.event.code),)
        tags = (("tenant", record.tenant), ("gateway", record.gateway), ("device", device), *more)
        return (
            ("_measurement", _printable(self.measurement(record))),
            *((key, _printable(value)) for key, value in tags if value),
        )

    def point_of(self, scan: ScanRecord, field: str) -> int | None:
        """Which point a field of an answer belongs to."""
        return self._template(scan).point_of(field)

    def _template(self, scan: ScanRecord) -> _Template:
        key = (scan.tenant, scan.gateway, scan.layout_id)
        template = self._templates.get(key)
        if template is None:
            template = _Template(scan.tenant, scan.gateway, scan.layout)
            if len(self._templates) >= MAX_TEMPLATES:
                del self._templates[next(iter(self._templates))]
            self._templates[key] = template
        return template


def _literal(text: str) -> str:
    return text.replace("%", "%%")


def _check_time(at_ns: int) -> None:
    if not MIN_NS <= at_ns <= MAX_NS:
        raise Unwritable(f"time {at_ns} ns is beyond what InfluxDB stores (1677 to 2262)")


def _gap(record: GapRecord) -> str:
    gap = record.gap
    at_ns = stamp(record.from_ns, record.seq)
    _check_time(at_ns)
    labels = (("reason", gap.reason), ("priority", gap.priority))
    tags = _tags(record.tenant, record.gateway, gap.device, labels)
    return (
        f"{GAPS},{tags} epoch={gap.epoch}i,first={gap.first}i,last={gap.last}i,scans={gap.scans}i,"
        f"readings={gap.readings}i,frames={gap.frames}i,from_ns={record.from_ns}i,to_ns={record.to_ns}i {at_ns}"
    )


def _event(record: EventRecord) -> str:
    event = record.event
    at_ns = stamp(record.at_ns, record.seq)
    _check_time(at_ns)
    tags = _tags(record.tenant, record.gateway, event.device, (("code", event.code),))
    return f"{EVENTS},{tags} text={_text(event.text)} {at_ns}"


def _tags(tenant: str, gateway: str, device: str, labels: Collection[tuple[str, str]]) -> str:
    """Sorted by key, as InfluxDB likes them; a tag without a value cannot be written and is left out."""
    tags = {"tenant": tenant, "gateway": gateway, "device": device}
    for key, value in sorted(labels):
        if key in _OURS or key == "time" or key.startswith("_") or not key:
            key = f"label_{key}"
        while key in tags:
            key += "_"
        tags[key] = value
    return ",".join(
        f"{_escape_key(key)}={_escape_key(value)}" for key, value in sorted(tags.items()) if value
    )


def _measurement_name(name: str) -> str:
    return f"_{name}" if name.startswith("#") or not name else name


def _printable(name: str) -> str:
    """Control characters spelt out. Nothing escapes a backslash: one at the end, or before what is escaped, makes
    InfluxDB refuse a field, or take a measurement (204) and never give it back (seen on 2.7.12); `_` parts the two."""
    return _BEFORE_ESCAPED.sub(r"\\_", name.translate(_CONTROL))


def _escape_measurement(name: str) -> str:
    return _printable(name).replace(",", r"\,").replace(" ", r"\ ")


def _escape_key(name: str) -> str:
    """A tag's key or value, or a field's key."""
    return _printable(name).replace(",", r"\,").replace(" ", r"\ ").replace("=", r"\=")


def _text(value: Value) -> str:
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
