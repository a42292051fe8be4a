"""What must hold in every simulated run, by name. It knows what was put in, and looks at what came out; how the
shipped code works is none of its business, but for the moments at which a promise is given.

The invariants:

- kept_is_stored_or_gapped: what a commit has kept is in every sink, or in a gap record that is.
- nothing_doubled: no scan is in a sink under two keys; no gap counts what no frame was.
- seq_never_reused: a seq that was promised or sent never names another frame.
- order_kept: by seq, each device's scans are in the order in which they were taken.
- gap_counted: the gap records count exactly the readings that are missing.
- ack_after_commit: the cloud acknowledges only what its journal holds.
- forgotten_only_when_acked: the gateway settles only what the cloud has acknowledged.
- cursor_after_settled: a sink's cursor moves only over what the sink has settled.
- buffer_within_cap: file and WAL stay within the buffer's cap.
- alarm_evicted_last: no alarm is evicted while there is anything else that may go.
- poll_count_within_0.1_percent: scans kept are as many as the schedule says.
- values_unchanged: every value is what the device gave.
- time_within_bounds: a time that the gateway vouches for is right to one second; an estimate lies within its bounds.
- value_belongs_to_its_register: no late reply is taken for another register's value.
- drained: after the last fault, all that is held is delivered within two hours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

import msgspec

from cloud.intervals import IntervalSet
from cloud.sinks.contract import GapRecord, Record, ScanRecord
from drivers.contract import Value

INVARIANTS: Final = (
    "kept_is_stored_or_gapped", "nothing_doubled", "seq_never_reused", "order_kept", "gap_counted",
    "ack_after_commit", "forgotten_only_when_acked", "cursor_after_settled", "buffer_within_cap",
    "alarm_evicted_last", "poll_count_within_0.1_percent", "values_unchanged", "time_within_bounds",
    "value_belongs_to_its_register", "drained",
)  # fmt: skip
TIME_ERROR_NS: Final = 10**9  #: what a synchronized clock's time may be off

Key = tuple[int, int]
"""(epoch, seq): a frame's identity for ever."""


class Token(NamedTuple):
    """One scan as it was put into the buffer."""

    device: str
    serial: int  #: per device, in the order in which they were put in
    number: int  #: what its values are made of; -1: a failed attempt, without values
    readings: int
    taken_boot_ns: int
    taken_wall_ns: int  #: the true time
    priority: str


class SinkSeen:
    """What one sink holds, by what reached it."""

    def __init__(self) -> None:
        self.frames: dict[int, IntervalSet] = {}
        self.where: dict[tuple[str, int], Key] = {}
        self.gaps: dict[Key, GapRecord] = {}
        self.scans = 0


class Oracle:
    def __init__(
        self, values_of: Callable[[int, int], Sequence[Value]], *, remember_where: bool = True
    ) -> None:
        self.violations: dict[str, str] = {}
        self.tokens: dict[
            Key, Token
        ] = {}  #: every frame that a transaction has put into the file, if it held
        self.promised: dict[Key, Token | None] = {}  #: what a commit has said to be kept; None: no scan
        self.sinks: dict[str, SinkSeen] = {}
        self.acked: dict[int, IntervalSet] = {}
        self.journal: dict[int, IntervalSet] = {}
        self.refused_readings = 0  #: `append` said no
        self.corrupted: set[Key] = set()
        self._sent: dict[tuple[int, int, int], int] = {}
        self._values_of = values_of
        self._remember_where = remember_where

    def violated(self, name: str, detail: str) -> None:
        assert name in INVARIANTS, name
        self.violations.setdefault(name, detail)

    # --- on the gateway ---

    def inserted(self, key: Key, token: Token | None) -> None:
        """A transaction puts this frame there; it may yet fail."""
        if key in self.promised and self.promised[key] is not token:
            self.violated("seq_never_reused", f"seq {key[1]} was promised to another frame")
        if token is not None:
            self.tokens[key] = token
        else:
            self.tokens.pop(key, None)

    def kept(self, key: Key, token: Token | None) -> None:
        self.promised[key] = token

    def sent(self, epoch: int, first: int, last: int, payload: bytes) -> None:
        mark = hash(payload)
        if self._sent.setdefault((epoch, first, last), mark) != mark:
            self.violated("seq_never_reused", f"batch {first}..{last} was sent again with other bytes")

    def settled(self, epoch: int, ranges: Iterable[tuple[int, int]]) -> None:
        acked = self.acked.get(epoch)
        for first, last in ranges:
            if acked is None or acked.missing(first, last):
                self.violated(
                    "forgotten_only_when_acked",
                    f"{first}..{last} settled, and the cloud never acknowledged it",
                )

    # --- in the cloud ---

    def journalled(self, epoch: int, first: int, last: int) -> None:
        self.journal.setdefault(epoch, IntervalSet()).add(first, last)

    def cloud_acks(self, epoch: int, ranges: Iterable[tuple[int, int]]) -> None:
        held = self.journal.get(epoch)
        acked = self.acked.setdefault(epoch, IntervalSet())
        for first, last in ranges:
            if held is None or held.missing(first, last):
                self.violated("ack_after_commit", f"{first}..{last} acknowledged before the journal holds it")
            acked.add(first, last)

    def stored(self, sink: str, record: Record) -> None:
        """A sink has this record now, or its dead letters have."""
        seen = self.sinks[sink]
        seen.frames.setdefault(record.epoch, IntervalSet()).add(record.seq, record.seq)
        if isinstance(record, GapRecord):
            seen.gaps[record.epoch, record.seq] = record
        if not isinstance(record, ScanRecord):
            return
        seen.scans += 1
        key = (record.epoch, record.seq)
        token = self.tokens.get(key)
        if token is None:
            self.violated("values_unchanged", f"seq {record.seq} holds a scan that nobody put there")
            return
        if self._remember_where:
            where = seen.where.setdefault((token.device, token.serial), key)
            if where != key:
                self.violated(
                    "nothing_doubled", f"scan {token.serial} of {token.device} is {where} and {key}"
                )
        if token.number < 0:
            if any(value is not None for value in record.values):
                self.violated("values_unchanged", f"seq {record.seq}: a failed attempt has values")
        elif list(record.values) != list(self._values_of(token.number, token.readings)):
            self.violated("values_unchanged", f"seq {record.seq} of {token.device}: {record.values[:4]}")
        if record.boot_ns and record.boot_ns != token.taken_boot_ns:
            self.violated("order_kept", f"seq {record.seq}: taken at boot time {record.boot_ns}")
        self._judge_time(record, token)

    def _judge_time(self, record: ScanRecord, token: Token) -> None:
        off_ns = record.taken_at_ns - token.taken_wall_ns
        if record.clock_synchronized:
            if abs(off_ns) > TIME_ERROR_NS:
                self.violated(
                    "time_within_bounds", f"seq {record.seq} is vouched for and {off_ns / 1e9:+.3f} s off"
                )
            return
        earliest_ns, latest_ns = getattr(record, "earliest_ns", 0), getattr(record, "latest_ns", 0)
        if earliest_ns and token.taken_wall_ns < earliest_ns - TIME_ERROR_NS:
            self.violated(
                "time_within_bounds",
                f"seq {record.seq} was taken {(earliest_ns - token.taken_wall_ns) / 1e9:.1f} s before its bounds",
            )
        if latest_ns and token.taken_wall_ns > latest_ns + TIME_ERROR_NS:
            self.violated(
                "time_within_bounds",
                f"seq {record.seq} was taken {(token.taken_wall_ns - latest_ns) / 1e9:.1f} s after its bounds",
            )

    # --- at the end ---

    def judge(self) -> None:
        for name, seen in self.sinks.items():
            self._judge_sink(name, seen)
        self._judge_order()

    def _judge_sink(self, name: str, seen: SinkSeen) -> None:
        missing: list[Key] = []
        for key in self.promised:
            held = seen.frames.get(key[0])
            if held is None or held.missing(key[1], key[1]):
                missing.append(key)
        covered: dict[int, list[tuple[int, int]]] = {}
        told = 0
        for record in seen.gaps.values():
            gap = record.gap
            if 0 < gap.first <= gap.last:
                covered.setdefault(gap.epoch, []).append((gap.first, gap.last))
                told += gap.readings
        silent = [key for key in missing if not any(a <= key[1] <= b for a, b in covered.get(key[0], ()))]
        if silent:
            self.violated(
                "kept_is_stored_or_gapped",
                f"sink {name}: {len(silent)} of {len(self.promised)} kept frames are neither stored nor gapped, "
                f"the first is seq {silent[0][1]}",
            )
        lost = sum(token.readings for key in missing if (token := self.promised[key]) is not None)
        # What a dying machine had written and told nobody of was in the file, and may be in a gap all the same.
        at_most = sum(
            token.readings
            for key, token in self.tokens.items()
            if (held := seen.frames.get(key[0])) is None or held.missing(key[1], key[1])
        )
        if not lost <= told <= at_most:
            self.violated(
                "gap_counted", f"sink {name}: {lost} readings kept are missing, the gaps tell of {told}"
            )
        self._judge_eviction(missing, seen)

    def _judge_eviction(self, missing: Sequence[Key], seen: SinkSeen) -> None:
        evicted = [r.gap for r in seen.gaps.values() if r.gap.reason == "evicted"]
        alarms = [
            key for key in missing if (token := self.promised[key]) is not None and token.priority == "alarm"
        ]
        if evicted and alarms and any(any(g.first <= k[1] <= g.last for g in evicted) for k in alarms):
            self.violated(
                "alarm_evicted_last", f"{len(alarms)} alarms were evicted, the first is seq {alarms[0][1]}"
            )

    def _judge_order(self) -> None:
        last: dict[tuple[int, str], tuple[int, int]] = {}
        for key in sorted(key for key, token in self.promised.items() if token is not None):
            token = self.promised[key]
            assert token is not None
            before = last.get((key[0], token.device))
            if before is not None and before[0] >= token.serial:
                self.violated(
                    "order_kept", f"{token.device}: seq {before[1]} and {key[1]} stand the other way round"
                )
            last[key[0], token.device] = (token.serial, key[1])


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    seed: int
    violations: dict[str, str]
    figures: dict[str, int | float]
    trace: str  #: a hash of all that happened: same seed, same trace
