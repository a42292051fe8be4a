"""The gateway's clocks, and what is written down about them.

A scan is stamped with the boot clock, which nobody sets. How that clock stood to the wall clock is recorded in rows
(`sync.wire.ClockRow`), and the cloud computes wall time from them; nothing here ever corrects a stamp.

Rules: a row at the start of a run, every 60 s, whenever the kernel's word on synchronization changes, and at every
step of the wall clock above 500 ms. Whether the clock is synchronized is the kernel's word (adjtimex(2)), never a
guess from the date. `ClockWatch` is pure: it is given readings of the clocks and says which rows are due.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import msgspec

ROW_EVERY_NS: Final = 60 * 10**9  #: so a step or a drift is bounded to a minute of frames
LOOK_S: Final = 1.0  #: how often the clocks are looked at: a step or a synchronization is seen so soon
STEP_NS: Final = 500 * 10**6  #: a larger change of wall minus boot is a step; NTP slews at most 0.5 ms per s
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class ClockReading(msgspec.Struct, frozen=True, gc=False):
    """Both clocks at one instant, and what the kernel says of the wall clock."""

    boot_ns: int
    wall_ns: int
    synchronized: bool
    error_ns: int  #: the kernel's maximum error; 0 where unknown


class Clock(Protocol):
    """Where time comes from; tests pass their own."""

    boot_id: str

    def boot_ns(self) -> int: ...

    def read(self) -> ClockReading: ...


class _Timex(ctypes.Structure):
    """struct timex of adjtimex(2), 64-bit and 32-bit Linux alike; the tail is the kernel's padding."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("constant", ctypes.c_long),
        ("rest", ctypes.c_byte * 256),
    )


_STA_UNSYNC: Final = 0x0040  #: linux/timex.h
_TIME_ERROR: Final = 5  #: adjtimex(2): the clock is not synchronized


class SystemClock:
    """This machine's clocks. adjtimex with modes 0 only reads, and needs no privilege."""

    def __init__(self) -> None:
        try:
            self.boot_id = _BOOT_ID.read_text().strip()
        except OSError:  # no /proc: this run counts as a boot of its own
            self.boot_id = f"run-{time.time_ns():x}"
        self._timex = _Timex()
        self._adjtimex: Callable[[object], int] | None = None
        with contextlib.suppress(OSError, AttributeError):  # a libc without it: never synchronized, then
            self._adjtimex = ctypes.CDLL(None, use_errno=True).adjtimex

    def boot_ns(self) -> int:
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def read(self) -> ClockReading:
        synchronized, error_ns = self._kernel()
        before_ns = self.boot_ns()
        wall_ns = time.time_ns()
        after_ns = self.boot_ns()
        return ClockReading((before_ns + after_ns) // 2, wall_ns, synchronized, error_ns)

    def _kernel(self) -> tuple[bool, int]:
        if self._adjtimex is None:
            return False, 0
        self._timex.modes = 0
        state = self._adjtimex(ctypes.byref(self._timex))
        if state < 0:
            return False, 0
        synchronized = state != _TIME_ERROR and not self._timex.status & _STA_UNSYNC
        return synchronized, max(0, self._timex.maxerror) * 1_000 if synchronized else 0


EARLIEST_NS: Final = (
    1_735_689_600 * 10**9
)  #: 2025-01-01: this was written later, so no right clock shows less


class Hold:
    """Whether frames of a boot that is not synchronized wait for its clock. Pure.

    They wait where a synchronized clock is to be expected: an earlier boot had one, or what the clock shows cannot be
    (before this was written, or before what an earlier boot has shown). They wait at most `hold_ns` of the boot clock,
    counted from when one could have been sent for the first time: a gateway that was offline for a day gets its network
    and its time together, and waits for the second of the two. A gateway that never had a synchronized clock and shows
    a possible time is not made to wait: nothing says that it will ever have one.
    """

    __slots__ = ("_asked_ns", "_floor_ns", "_hold_ns", "expected")

    def __init__(self, hold_ns: int) -> None:
        self._hold_ns = hold_ns
        self._floor_ns = EARLIEST_NS
        self._asked_ns: int | None = None
        self.expected = False

    def learn(self, *, synchronized: bool, wall_ns: int) -> None:
        """What an earlier boot has shown."""
        self.expected = self.expected or synchronized
        self._floor_ns = max(self._floor_ns, wall_ns)

    def expects(self, now: ClockReading) -> bool:
        return self.expected or now.wall_ns < self._floor_ns

    def waits(self, now: ClockReading) -> bool:
        """Asked for a frame that could be sent now, of a boot without a synchronized row."""
        if self._hold_ns <= 0 or not self.expects(now):
            return False
        if self._asked_ns is None:
            self._asked_ns = now.boot_ns
        return now.boot_ns - self._asked_ns < self._hold_ns


class Due(msgspec.Struct, frozen=True):
    """A row is due for this reading; `step_ns` is not 0 where the wall clock was stepped, `why` is one word."""

    reading: ClockReading
    why: str
    step_ns: int = 0


class ClockWatch:
    """Says when a clock row is due. Pure."""

    __slots__ = ("_last", "_offset_ns")

    def __init__(self) -> None:
        self._last: ClockReading | None = None  #: of the last row
        self._offset_ns = 0  #: wall minus boot at the last look, so that slow slewing is no step

    def look(self, now: ClockReading) -> Due | None:
        """The row that `now` makes due, if any."""
        last, offset_ns = self._last, now.wall_ns - now.boot_ns
        step_ns = offset_ns - self._offset_ns
        self._offset_ns = offset_ns
        if last is None:
            due = Due(now, "start")
        elif abs(step_ns) > STEP_NS:
            due = Due(now, "step", step_ns)
        elif now.synchronized != last.synchronized:
            due = Due(now, "sync")
        elif now.boot_ns - last.boot_ns >= ROW_EVERY_NS:
            due = Due(now, "minute")
        else:
            return None
        self._last = now
        return due
