"""How each device is doing: counted on the way of every scan, told in one document.

Rules: counting costs a scan well under a microsecond (plain integers, a ring of durations); a change of state is said
once, in words, with the remedy; what is not known is `null`, never 0.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from drivers.contract import Quality, Reason, Scan

_RING: Final = 512  #: reads whose duration is remembered, for the percentiles


class State(enum.StrEnum):
    """What a device is doing."""

    STARTING = "starting"  #: not read yet
    OK = "ok"
    DOWN = "down"  #: does not answer; tried again with backoff
    FAULT = "fault"  #: its driver failed; restarted with backoff
    MISCONFIGURED = "misconfigured"  #: stopped until a human changes the configuration
    STOPPED = "stopped"  #: the agent is leaving


REMEDY: Final[Mapping[Reason, str]] = {
    Reason.TIMEOUT: "check that it has power, its address (unit) and the wiring, or raise timeout_ms",
    Reason.DISCONNECTED: "check the cable or network, the host, port or serial path, and that nobody else holds it",
    Reason.EXCEPTION: "the device answers but refuses: check register addresses and that it is not busy",
    Reason.CRC: "the line is noisy: check termination, shielding, speed and parity",
    Reason.FRAMING: "the messages have another form: check speed, parity and the configured format",
    Reason.REFUSED: "the device has no such point: check its register list",
    Reason.DRIVER: 'the driver failed: run with log_level = "debug" and report it with the text',
    Reason.STALE: "it has been silent: check its battery, range and power",
    Reason.DECRYPT: "check the device's key",
}


class DeviceHealth(msgspec.Struct, kw_only=True):
    """One device, as `headgate status` and the heartbeat show it. The counters go on through a restart."""

    name: str
    driver: str
    state: State = State.STARTING
    since_ns: int = 0  #: wall clock: since when it is in this state
    why: str = ""  #: in words, empty where all is well
    remedy: str = ""
    reason: str = ""  #: why, in one word (`drivers.contract.Reason`), where there is one
    last_good_ns: int | None = None  #: wall clock of the last scan with a value that is not bad
    points: int = 0
    period_ms: int = 0  #: 0: it speaks by itself, or is read as fast as it answers
    scans: int = 0  #: given to the buffer: read from the device, or kept as bad because it did not answer
    readings: int = 0
    bad_readings: int = 0  #: of these, quality bad
    uncertain_readings: int = 0  #: of these, quality uncertain
    reasons: dict[str, int] = {}  #: readings that were not good, by reason
    overruns: int = (
        0  #: polls skipped because the one before took too long, or scans dropped from a full queue
    )
    missed: int = 0  #: polls not tried while the device was down
    failures: int = 0  #: reads and connects that failed as a whole
    restarts: int = 0  #: of the driver, after a fault of its own
    blocked: int = 0  #: times that its driver held up the whole agent
    blocked_s: float = 0.0  #: for how long in all
    blocked_at: str = ""  #: where it did so last: "file.py:12 in name"
    blocked_ns: int | None = None  #: wall clock of the last time
    p50_ms: float | None = None  #: how long a read takes, of the last few hundred
    p99_ms: float | None = None

    def restore(self, before: DeviceHealth) -> None:
        """Go on counting where an earlier run stopped."""
        for key in _COUNTERS:
            setattr(self, key, getattr(before, key))
        self.last_good_ns = before.last_good_ns
        self.blocked_at, self.blocked_ns = before.blocked_at, before.blocked_ns
        self.reasons = dict(before.reasons)


_COUNTERS: Final = (
    "scans", "readings", "bad_readings", "uncertain_readings", "overruns", "missed", "failures", "restarts",
    "blocked", "blocked_s",
)  # fmt: skip


class Gauge:
    """Counts one device's scans. One poller writes it; anybody may look."""

    __slots__ = ("_count", "_last_good_boot_ns", "_ring", "_wall_ns", "health")

    def __init__(self, health: DeviceHealth, wall_ns: Callable[[], int]) -> None:
        self.health = health
        self._wall_ns = wall_ns
        self._ring: list[int] = []
        self._count = 0
        self._last_good_boot_ns = 0
        health.since_ns = wall_ns()

    def count(self, scan: Scan) -> None:
        """One scan given to the buffer."""
        health = self.health
        health.scans += 1
        health.readings += len(scan.values)
        if scan.reasons:
            self._count_reasons(scan)
        else:
            self._last_good_boot_ns = scan.taken_at_ns

    def _count_reasons(self, scan: Scan) -> None:
        health = self.health
        bad = 0
        for reason in scan.reasons.values():
            health.reasons[reason.name] = health.reasons.get(reason.name, 0) + 1
            if reason.quality is Quality.BAD:
                bad += 1
        health.bad_readings += bad
        health.uncertain_readings += len(scan.reasons) - bad
        if bad < len(scan.values):
            self._last_good_boot_ns = scan.taken_at_ns

    def took(self, duration_ns: int) -> None:
        """How long one read took."""
        ring = self._ring
        if len(ring) < _RING:
            ring.append(duration_ns)
        else:
            ring[self._count % _RING] = duration_ns
        self._count += 1

    def typical_s(self) -> float:
        """How long a read usually takes, or 0 where there was none yet."""
        return percentile(sorted(self._ring), 50) / 1e9 if self._ring else 0.0

    def enter(self, state: State, why: str = "", reason: Reason | None = None) -> bool:
        """The device's new state; True where it is new (so that it is said once)."""
        health = self.health
        changed = health.state is not state
        if changed:
            health.state = state
            health.since_ns = self._wall_ns()
        health.why = why.encode("utf-8", "replace").decode()  # a lone surrogate would end every heartbeat
        health.remedy = "" if reason is None else remedy(reason)
        health.reason = "" if reason is None else reason.name.lower()
        return changed

    def held_up(self, lasted_s: float, where: str, *, again: bool = False) -> None:
        """The driver blocked the agent's event loop. `again`: the rest of a time that was counted before."""
        health = self.health
        health.blocked += not again
        health.blocked_s = round(health.blocked_s + lasted_s, 3)
        health.blocked_at = where.encode("utf-8", "replace").decode()
        health.blocked_ns = self._wall_ns()

    def told(self, now_boot_ns: int) -> DeviceHealth:
        """The health with its times and percentiles filled in."""
        health = self.health
        if self._last_good_boot_ns:
            health.last_good_ns = self._wall_ns() - (now_boot_ns - self._last_good_boot_ns)
        if self._ring:
            ordered = sorted(self._ring)
            health.p50_ms = round(percentile(ordered, 50) / 1e6, 3)
            health.p99_ms = round(percentile(ordered, 99) / 1e6, 3)
        return health


def percentile(ordered: Sequence[int], percent: int) -> int:
    """Of a sorted, non-empty column (nearest rank)."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def remedy(reason: Reason) -> str:
    """What a person can do about a device that fails for this reason."""
    return REMEDY.get(reason, "")


def duration_in_words(seconds: float) -> str:
    """`850 ms`, `4 s`, `4 min`, `3 h`, `2 days`: how long, as a person says it."""
    if seconds < 1:
        return f"{max(seconds, 0) * 1000:.0f} ms"
    for limit, unit_s, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"
