"""From the journal's bytes to records that a sink can write. Pure: no IO, no clock.

Rules:
1. Only frames whose seq is in `fresh` become records: the journal dedupes by them, and doubling is not allowed.
2. Whatever cannot be decoded becomes a `Poison` with its reason, and costs nothing else: a frame alone, or, where the
   whole body is unreadable, the batch's fresh ranges.
3. The same entry always gives the same records, however often it is decoded: times are computed from the entry alone.
4. A time that cannot be true never blocks and is never passed on as true. Where the gateway's clock gives a time
   before 2000, or more than a day after the batch was received, or none at all, the scan's time is estimated: the
   newest scan of that boot in the batch was taken when the batch was received, the others as much earlier as the boot
   clock says; `clock_synchronized` is false. A clock that runs ahead by more than `limits.skew_alarm_s` keeps its time
   and is flagged in the same way.
5. An estimated time has bounds, from the batch alone: no earlier than the boot before it was last seen, no later than
   the receipt or the beginning of the boot after it, each by as much as the boot clock says. A clock that shows less
   than the first is one that cannot be true.
6. `forces` are clock rows that a replay has put in force for one sink (`cloud.clocks`): they decide where the batch has
   no synchronized row of that boot, and nowhere else.
7. A value that is not a number never reaches a sink: it becomes no value with its reason.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from typing import Final, cast

import msgspec

from cloud.clocks import Clocks, Forces
from cloud.journal.contract import Range, Stored
from cloud.sinks.contract import EventRecord, GapRecord, Record, ScanRecord
from cloud.skew import Skews
from drivers.contract import Reason, Value
from sync.wire import (
    MAX_EPOCH,
    Body,
    ClockRow,
    Frame,
    GapFrame,
    Layout,
    Packing,
    ScanFrame,
    WireError,
    decode_frame,
    layout_id,
    open_body,
    seal,
    unpack_reasons,
    wall_clock,
)

NS_PER_S: Final = 1_000_000_000
EARLIEST_NS: Final = 946_684_800 * NS_PER_S  #: 2000-01-01: no gateway of ours is older
AHEAD_NS: Final = 86_400 * NS_PER_S  #: a time this far after the receipt is not believed
MAX_LAYOUTS: Final = 4_096  #: compiled layouts kept; above it the oldest goes and is compiled again when met

_FLOATS: Final = frozenset(("f32", "f64"))


class Poison(msgspec.Struct, frozen=True):
    """Frames `first..last` of one entry that do not decode, and why."""

    offset: int
    gateway: str  #: `<tenant>/<gateway>`
    epoch: int
    first: int
    last: int
    reason: str


class Decoded(msgspec.Struct, frozen=True):
    """What one entry of the journal holds: every fresh seq is in one of the two."""

    records: list[Record]
    poison: list[Poison]


class Decoder:
    """Decodes entries; keeps each layout's compiled form by its id. One per sink runner; not for several threads."""

    def __init__(self, skews: Skews | None = None, clocks: Clocks | None = None) -> None:
        self.skews = skews or Skews()
        self.clocks = clocks  #: told what every batch says of its gateway's clock
        self.forces: Forces = {}  #: rule 6
        self._compiled: dict[int, _Compiled] = {}

    def decode(self, stored: Stored) -> Decoded:
        """Never raises for what the bytes are."""
        try:
            head, body = open_body(stored.payload)
        except WireError as err:
            return Decoded([], [_poison(stored, first, last, err) for first, last in stored.fresh])
        if self.clocks is not None:
            self.clocks.note(stored.gateway, stored.epoch, body.clocks)
        batch = _Batch(self, stored, body, head.first)
        for first, last in stored.fresh:
            for seq in range(first, last + 1):
                batch.take(seq)
        self.skews.note(stored.gateway, stored.offset, stored.received_at_ns, batch.ahead_ns)
        return Decoded(batch.records, batch.poison)

    def compiled(self, layout: Layout) -> _Compiled:
        """Raises `WireError` for a layout that no frame can have."""
        known = self._compiled.get(key := layout_id(layout))
        if known is None:
            known = _Compiled(layout)
            if len(self._compiled) >= MAX_LAYOUTS:
                del self._compiled[next(iter(self._compiled))]
            self._compiled[key] = known
        return known


def frame_of(stored: Stored, body: Body, seq: int) -> bytes:
    """The encoded frame with this seq. Raises `WireError`."""
    if not 0 <= seq - stored.first < len(body.frames):
        raise WireError("frame", f"the batch has no frame {seq}")
    return bytes(body.frames[seq - stored.first])


def alone(decoder: Decoder, stored: Stored, body: Body, frame: bytes, record: Record) -> Stored:
    """The frame behind this record as an entry of its own, which decodes to the same record years later.

    It keeps its layout and its boot's clock rows; where the time was estimated from its neighbours in the batch, a
    clock row that says the estimate takes their place. Raises `WireError`.
    """
    decoded = decode_frame(frame)
    layouts = [layout for layout in body.layouts if _names(decoded, layout)]

    def entry(clocks: Sequence[ClockRow]) -> Stored:
        seq, readings = record.seq, readings_in(record)
        sealed = seal(stored.gateway, stored.epoch, seq, [frame], layouts, clocks, readings)
        return msgspec.structs.replace(
            stored, first=seq, last=seq, readings=readings, fresh=((seq, seq),), payload=sealed.payload
        )

    kept = entry(body.clocks)
    again = decoder.decode(kept).records
    if again and (at_ns(again[0]) != at_ns(record) or _latest_ns(again[0]) != _latest_ns(record)):
        # Of its neighbours only this is needed: how long before the newest of them it was taken.
        others = [row for row in body.clocks if row.boot != decoded.boot]
        here_ns, boot_ns = at_ns(record), _boot_ns(decoded)
        newest_ns = _newest_in(body, decoded.boot)
        told = ClockRow(decoded.boot, "", newest_ns, here_ns + newest_ns - boot_ns, synchronized=False)
        return entry([*others, told])
    return kept


def _names(frame: Frame, layout: Layout) -> bool:
    return isinstance(frame, ScanFrame) and layout_id(layout) == frame.layout


def _latest_ns(record: Record) -> int:
    return record.latest_ns if isinstance(record, ScanRecord) else 0


def _newest_in(body: Body, boot: int) -> int:
    """The newest instant of a boot's clock that a batch shows: it was sent, and received, after that."""
    newest_ns = 0
    for raw in body.frames:
        with contextlib.suppress(WireError):  # it becomes poison by itself
            if (frame := decode_frame(raw)).boot == boot:
                newest_ns = max(newest_ns, _newest_ns(frame))
    row = wall_clock(body.clocks).get(boot)
    return max(newest_ns, row.boot_ns) if row is not None and not row.synchronized else newest_ns


def at_ns(record: Record) -> int:
    """When it was, in UTC: a gap's beginning."""
    if isinstance(record, ScanRecord):
        return record.taken_at_ns
    return record.from_ns if isinstance(record, GapRecord) else record.at_ns


def _boot_ns(frame: Frame) -> int:
    if isinstance(frame, ScanFrame):
        return frame.taken_at_ns
    return frame.from_boot_ns if isinstance(frame, GapFrame) else frame.at_boot_ns


class _Batch:
    """One entry on its way to records."""

    def __init__(self, decoder: Decoder, stored: Stored, body: Body, first: int) -> None:
        self.records: list[Record] = []
        self.poison: list[Poison] = []
        self.ahead_ns = 0  #: the gateway's clock before ours, at most
        self._decoder = decoder
        self._stored = stored
        self._body = body
        self._first = first
        self._limit_ns = decoder.skews.limit_ns
        self._clocks = wall_clock(body.clocks)
        self._tenant, _, self._gateway = stored.gateway.partition("/")
        self._newest: dict[int, int] = {}
        self._bounds: dict[int, tuple[int, int]] = {}
        self._forces = decoder.forces
        self._layouts: dict[int, _Compiled] = {}
        self._broken: dict[int, WireError] = {}
        for layout in body.layouts:
            try:
                compiled = decoder.compiled(layout)
            except WireError as err:
                self._broken[layout_id(layout)] = err
            else:
                self._layouts[compiled.packing.id] = compiled

    def take(self, seq: int) -> None:
        """The frame with this seq as a record, or as poison."""
        index = seq - self._first
        try:
            if not 0 <= index < len(self._body.frames):
                raise WireError("frame", f"the batch has no frame {seq}")
            self.records.append(self.record(seq, decode_frame(self._body.frames[index])))
        except WireError as err:
            self.poison.append(_poison(self._stored, seq, seq, err))

    def record(self, seq: int, frame: Frame) -> Record:
        """Raises `WireError`."""
        stored = self._stored
        if isinstance(frame, ScanFrame):
            compiled = self._layouts.get(frame.layout)
            if compiled is None:
                raise self._broken.get(frame.layout) or WireError(
                    "layout", f"the batch does not carry layout {frame.layout:016x} that the frame names"
                )
            values, reasons = compiled.convert(frame)
            taken_at_ns, synchronized = self._wall(seq, frame.boot, frame.taken_at_ns)
            earliest_ns, latest_ns = (
                (0, 0) if synchronized else self._between(frame.boot, frame.taken_at_ns, taken_at_ns)
            )
            return ScanRecord(
                stored.offset, self._tenant, self._gateway, stored.epoch, seq, compiled.packing.layout,
                frame.layout, taken_at_ns, synchronized, stored.received_at_ns, values, reasons,
                _column(frame.boot), _column(frame.taken_at_ns), earliest_ns, latest_ns,
            )  # fmt: skip
        if isinstance(frame, GapFrame):
            _check_gap(frame)
            from_ns, _ = self._wall(seq, frame.boot, frame.from_boot_ns)
            to_ns, _ = self._wall(seq, frame.boot, frame.to_boot_ns)
            return GapRecord(
                stored.offset, self._tenant, self._gateway, stored.epoch, seq, frame,
                from_ns, max(from_ns, to_ns), stored.received_at_ns,
            )  # fmt: skip
        at_ns, _ = self._wall(seq, frame.boot, frame.at_boot_ns)
        return EventRecord(
            stored.offset, self._tenant, self._gateway, stored.epoch, seq, frame, at_ns, stored.received_at_ns
        )

    def _wall(self, seq: int, boot: int, boot_ns: int) -> tuple[int, bool]:
        """UTC and whether the gateway's clock vouches for it (rule 4)."""
        row = self._clocks.get(boot)
        if self._forces and (row is None or not row.synchronized):
            force = self._forces.get((self._stored.gateway, self._stored.epoch, boot))
            if force is not None and force.covers(seq):
                row = force.row
        received_ns = self._stored.received_at_ns
        if row is not None:
            wall_ns = row.wall_ns + boot_ns - row.boot_ns
            ahead_ns = wall_ns - received_ns
            if ahead_ns > self.ahead_ns:
                self.ahead_ns = ahead_ns
            if wall_ns >= EARLIEST_NS and ahead_ns <= AHEAD_NS:
                if row.synchronized:
                    return wall_ns, ahead_ns <= self._limit_ns
                if row.wall_ns - row.boot_ns >= self._offsets(boot)[0]:
                    return wall_ns, False
        estimate_ns = self._offsets(boot)[1] + boot_ns
        return (estimate_ns if EARLIEST_NS <= estimate_ns <= received_ns else received_ns), False

    def _between(self, boot: int, boot_ns: int, taken_at_ns: int) -> tuple[int, int]:
        """The bounds of an estimated time (rule 5)."""
        low_ns, high_ns = self._offsets(boot)
        earliest_ns = max(0, low_ns + boot_ns) if low_ns else 0
        return min(earliest_ns, taken_at_ns), max(high_ns + boot_ns, taken_at_ns)

    def _offsets(self, boot: int) -> tuple[int, int]:
        """The least (0: not known) and the most that wall minus boot clock can be in this boot. Both move with the
        boot clock, so that frames of one boot keep their order whichever is taken."""
        known = self._bounds.get(boot)
        if known is None:
            newest_ns = self._newest_of(boot)
            low_ns, high_ns = 0, self._stored.received_at_ns - newest_ns
            for other, row in self._clocks.items():
                if not row.synchronized or row.wall_ns < EARLIEST_NS or _column(boot) != boot:
                    continue
                if other < boot:  # it had shown this before this boot began
                    low_ns = max(low_ns, row.wall_ns)
                elif other > boot:  # it began when this boot had ended
                    high_ns = min(high_ns, row.wall_ns - row.boot_ns - newest_ns)
            known = self._bounds[boot] = (low_ns, max(low_ns, high_ns))
        return known

    def _newest_of(self, boot: int) -> int:
        """The boot clock of the newest frame of this boot in the batch, fresh or not. Only a wrong clock needs it."""
        newest = self._newest.get(boot)
        if newest is None:
            newest = self._newest[boot] = _newest_in(self._body, boot)
        return newest


def _column(number: int) -> int:
    """Fits a signed 64-bit column; 0 (not told) for what no clock shows."""
    return number if 0 <= number <= MAX_EPOCH else 0


def _newest_ns(frame: Frame) -> int:
    return frame.to_boot_ns if isinstance(frame, GapFrame) else _boot_ns(frame)


def _check_gap(gap: GapFrame) -> None:
    for name in ("epoch", "first", "last", "scans", "readings"):
        if not 0 <= (value := int(getattr(gap, name))) <= MAX_EPOCH:
            raise WireError("frame", f"a gap with {name} {value}; 0 to {MAX_EPOCH} are possible")


def _poison(stored: Stored, first: int, last: int, err: WireError) -> Poison:
    return Poison(stored.offset, stored.gateway, stored.epoch, first, last, f"{err.code}: {err}")


class _Compiled:
    """A layout made ready: how to unpack its frames, and which points to scale by what."""

    __slots__ = ("_checked", "_points", "_scalings", "_total", "packing")

    def __init__(self, layout: Layout) -> None:
        self.packing = Packing(layout)
        self._points = len(layout.names)
        by_scaling: dict[tuple[bool, float, float], list[int]] = {}
        checked = []
        for i, kind in enumerate(layout.types):
            scale, offset = layout.scales[i], layout.offsets[i]
            scaled = kind not in ("bool", "str") and not (scale == 1.0 and offset == 0.0)
            if scaled:
                by_scaling.setdefault((*_scaling(scale), offset), []).append(i)
            if scaled or kind in _FLOATS:
                checked.append(i)
        self._scalings = [
            (divides, by, offset, tuple(at), len(at) == self._points)
            for (divides, by, offset), at in by_scaling.items()
        ]
        self._checked = tuple(checked)
        self._total = _total(self._checked, self._points)

    def convert(self, frame: ScanFrame) -> tuple[list[Value | None], dict[int, Reason]]:
        """The engineering values and the reasons. Raises `WireError`."""
        values = self.packing.unpack(frame.values, frame.texts)
        for divides, by, offset, at, whole in self._scalings:
            _scale(values, divides, by, offset, at, whole)
        reasons = unpack_reasons(frame.reasons, self._points) if frame.reasons else {}
        if self._checked:
            total = self._total(values)
            if total - total != 0.0:  # only an infinity or a NaN among them (or their sum) makes it so
                _no_numbers(values, reasons, self._checked)
        for i, reason in reasons.items():
            if reason >= 128:  # bad, with no value: the frame holds a zero in its place
                values[i] = None
        if None in frame.texts:
            _no_text(values, reasons)
        return values, reasons


def _scaling(scale: float) -> tuple[bool, float]:
    """Whether to divide, and by what: the same decision as `drivers.contract.engineering`, made once per layout."""
    if scale and abs(scale) < 1.0:
        try:
            inverse = round(1.0 / scale)
        except OverflowError:  # a scale below 1e-308
            return False, scale
        if inverse and abs(inverse * scale - 1.0) < 1e-12:
            return True, inverse
    return False, scale


def _scale(
    values: list[Value | None], divides: bool, by: float, offset: float, at: Sequence[int], whole: bool
) -> None:
    numbers = cast("list[float]", values if whole else [values[i] for i in at])  # no text is ever scaled
    if divides:
        scaled = [v / by + offset for v in numbers] if offset else [v / by for v in numbers]
    else:
        scaled = [v * by + offset for v in numbers] if offset else [v * by for v in numbers]
    if whole:
        values[:] = scaled
    else:
        for i, value in zip(at, scaled, strict=True):
            values[i] = value


def _total(at: Sequence[int], points: int) -> Callable[[Sequence[Value | None]], float]:
    """The sum of the values at `at`: one pass in C, to see whether all of them are finite."""
    if len(at) == points:
        return sum  # type: ignore[return-value]  # all are numbers
    if len(at) == 1:
        return operator.itemgetter(at[0])
    pick = operator.itemgetter(*at) if at else tuple
    return lambda values: sum(pick(values))


def _no_numbers(values: list[Value | None], reasons: dict[int, Reason], at: Sequence[int]) -> None:
    for i in at:
        value = values[i]
        if isinstance(value, float) and value - value != 0.0:
            values[i] = None
            if reasons.get(i, Reason.GOOD).has_value:
                reasons[i] = Reason.NAN if value != value else Reason.INFINITE


def _no_text(values: list[Value | None], reasons: dict[int, Reason]) -> None:
    for i, value in enumerate(values):
        if value is None and reasons.get(i, Reason.GOOD).has_value:
            reasons[i] = Reason.MISSING


def readings_in(record: Record) -> int:
    """How many readings a record holds."""
    return len(record.values) if isinstance(record, ScanRecord) else 0


def overlap(ranges: Sequence[Range], first: int, last: int) -> int:
    """How many seqs of first..last the ranges hold."""
    return sum(max(0, min(last, b) - max(first, a) + 1) for a, b in ranges)
