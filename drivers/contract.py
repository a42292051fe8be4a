"""What a driver promises, and all a driver author imports.

A driver reads one kind of device. It is built once per configured device, and then

1. `connect` opens whatever it needs; it is called again after every `DeviceUnreachable`.
2. `read` returns one `Scan` of exactly the points asked, in that order; calls never overlap, and each runs
   under a deadline that the poller sets (a cancelled `read` must leave the driver usable or need a `connect`).
3. `close` is called once, after everything else has ended.

A value is right or its reason says why not: never clamp, never substitute 0 or the last value, never stamp an
old value with a new time. `taken_at_ns` is the boot clock when the response *arrived*.

Values are **raw**: the number as the device encodes it, in the point's `type`. `raw * scale + offset` is the value a
person sees; it is computed where a person or a sink needs it (`engineering`), never on the way there.

Errors, by who acts (no other exception leaves a driver)::

    DriverError
    ├── DeviceUnreachable   the poller retries with backoff, every point goes bad with `reason`
    ├── PointRefused        these points go bad, the rest go on (write only; in a read, set the point's reason)
    └── ConfigError         this device stops and a human is told what to change

Imports the standard library and msgspec only.
"""

from __future__ import annotations

import enum
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

import msgspec

Value: TypeAlias = bool | int | float | str
"""One raw value. `None` in a scan's `values` means: no value, see its reason."""


class Quality(enum.IntEnum):
    """OPC's sense (OPC UA part 8, 6.3.2): may this value be used?"""

    BAD = 0
    UNCERTAIN = 1
    GOOD = 2


class Reason(enum.IntEnum):
    """Why a reading is what it is; the published enumeration, one byte on the wire.

    The number tells the quality: 0 is good, 1-63 uncertain, 64-127 bad with the value still shown, 128-255 bad with
    no value at all.
    """

    GOOD = 0
    # uncertain: there is a value, with a doubt about it
    RATE = 1  #: changed faster than `max_rate_per_s` allows
    STUCK = 2  #: has not changed for `stuck_after_s`
    CLOCK = 3  #: its time is an estimate
    DEVICE_DOUBT = 4  #: the device itself flags the value as doubtful
    # bad, value shown: it was read, and it cannot be true
    RANGE = 64  #: outside `valid_min`..`valid_max`
    NOT_IN_ENUM = 65  #: not one of `one_of`
    SENTINEL = 66  #: the device's code for "not available"
    DEVICE_FAULT = 67  #: the device itself flags the value as bad
    # bad, no value
    TIMEOUT = 128  #: no answer within the deadline
    DISCONNECTED = 129  #: the line, host or adapter is not there
    EXCEPTION = 130  #: the device answered with an exception (a busy device too)
    CRC = 131  #: the check of the message failed
    FRAMING = 132  #: the message is not of the expected form
    REFUSED = 133  #: the device has no such point
    NAN = 134  #: the device sent not-a-number
    INFINITE = 135  #: the device sent an infinity
    DECODE = 136  #: the bytes do not decode as the configured type
    DECRYPT = 137  #: wrong or missing key
    STALE = 138  #: the device has been silent for too long
    MISSING = 139  #: the message has no such field
    OVERFLOW = 140  #: does not fit the point's type
    DRIVER = 141  #: the driver failed; its fault, not the device's
    BUSY = 142  #: the device answered that it is busy (Modbus exceptions 5 and 6)
    BEHIND_GATEWAY = (
        143  #: a gateway answered that the device behind it does not (Modbus exceptions 10 and 11)
    )

    @property
    def quality(self) -> Quality:
        if self == 0:
            return Quality.GOOD
        return Quality.UNCERTAIN if self < 64 else Quality.BAD

    @property
    def has_value(self) -> bool:
        return self < 128


class ValueType(enum.StrEnum):
    """The type of a raw value, as it travels: little-endian, of the width its name says."""

    BOOL = "bool"
    I8 = "i8"
    U8 = "u8"
    I16 = "i16"
    U16 = "u16"
    I32 = "i32"
    U32 = "u32"
    I64 = "i64"
    U64 = "u64"
    F32 = "f32"
    F64 = "f64"
    STR = "str"


class Priority(enum.StrEnum):
    """How much a reading matters where not everything can be kept or sent."""

    ALARM = "alarm"  #: committed within 100 ms, sent first, dropped last
    NORMAL = "normal"
    BULK = "bulk"  #: dropped first


class Point(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One configured value of a device; a driver's own point adds where to find it (register, field, object id).

    The rules are in the unit that a person sees (after scale and offset). A rule that is `None` is not checked.
    """

    name: str
    type: ValueType = ValueType.F64
    unit: str = ""  #: UCUM or the plain symbol ("V", "kWh", "Cel")
    scale: float = 1.0
    offset: float = 0.0
    valid_min: float | None = None
    valid_max: float | None = None
    max_rate_per_s: float | None = None  #: largest believable change, units per second
    stuck_after_s: float | None = None  #: unchanged for longer than this is doubtful
    not_available: tuple[int | float, ...] = ()  #: RAW values that mean "no value here" (0x7FFF, 0x8000, ...)
    one_of: tuple[float, ...] | None = None  #: the only values that are valid
    priority: Priority | None = None  #: unset: the device's


class Scan(msgspec.Struct, frozen=True, gc=False):
    """What one read of a device gave, as columns: `values[i]` and `reasons.get(i)` belong to `points[i]`.

    `values` has one raw value per point, `None` where there is none; `reasons` holds only what is not good, and
    has an entry for every `None`. `taken_at_ns` is nanoseconds of `boot_ns()` when the response arrived.
    """

    taken_at_ns: int
    points: tuple[Point, ...]
    values: Sequence[Value | None]
    reasons: Mapping[int, Reason] = {}


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that `discover` found: where it is, what it seems to be, and the device table that would read it."""

    driver: str
    address: str
    description: str
    options: dict[str, Value] = {}
    profile: str | None = None  #: the profile that seems to fit
    points: tuple[dict[str, Any], ...] = ()  #: point tables, where the device itself told what it has
    readings: dict[str, str] = {}  #: what it says now, for a person: name -> value with unit
    likelihood: float = 1.0  #: 0..1, for ordering


class LineClaim(msgspec.Struct, frozen=True):
    """The physical line that a device sits on. Devices of one `key` share it, if all ask for the same `settings`."""

    key: str  #: what tells two lines apart: a resolved port, or a host and port
    settings: str  #: what all on one line must agree on, in words: "9600 baud, 8N1, rtu"
    shared: bool = True  #: False: this device needs the line for itself


class DriverError(Exception):
    """The root of what a driver may raise."""


class DeviceUnreachable(DriverError):
    """The device did not answer, or its line is gone: retried with backoff. `reason` goes on every point.

    `retry_within_s`: the next try comes no later than this, however long the device has been away. For what is cheap to
    look for, such as a port that is not plugged in."""

    def __init__(
        self, text: str, reason: Reason = Reason.DISCONNECTED, *, retry_within_s: float | None = None
    ) -> None:
        super().__init__(text)
        self.reason = reason
        self.retry_within_s = retry_within_s


class PointRefused(DriverError):
    """The device does not let this point be written (or has no such point); other points are untouched."""

    def __init__(self, point: str, text: str) -> None:
        super().__init__(f"{point}: {text}")
        self.point = point


class ConfigError(DriverError):
    """The configuration cannot work, whatever the device does: stop this device and tell a human what to change."""


def boot_ns() -> int:
    """The boot clock in nanoseconds: monotonic, runs through suspend, is never set (clock_gettime(2))."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def engineering(raw: float, scale: float, offset: float) -> float:
    """The value a person sees. A scale of 1/n divides by n, so 234 at 0.1 is 23.4 and not 23.400000000000002."""
    inverse = round(1.0 / scale) if scale and abs(scale) < 1.0 else 0
    scaled = raw / inverse if inverse and abs(inverse * scale - 1.0) < 1e-12 else raw * scale
    return scaled + offset if offset else scaled


OptionsT = TypeVar("OptionsT", bound=msgspec.Struct)
PointT = TypeVar("PointT", bound=Point)


class _Device(ABC, Generic[OptionsT, PointT]):
    """What both kinds of driver share. `options_type` and `point_type` are what the device's table in the
    configuration is checked against, so an unknown or misspelt key is refused with its nearest valid word."""

    options_type: ClassVar[type[msgspec.Struct]]
    point_type: ClassVar[type[Point]]
    patience_s: float = 0.0
    """The deadline that its calls need where the configuration names none: a slow protocol, a connection by radio. The
    class may say it, or an instance by its options. 0: whatever the poller gives (5 s, more with a long period)."""

    def __init__(self, name: str, options: OptionsT, points: Sequence[PointT]) -> None:
        """Keep the configuration; do no IO. Raises `ConfigError` for what can never work."""
        self.name = name
        self.options = options
        self.points = tuple(points)

    @abstractmethod
    async def connect(self) -> None:
        """Open the way to the device. Raises `DeviceUnreachable`, `ConfigError`."""

    @abstractmethod
    async def close(self) -> None:
        """Release everything. Never raises; safe to call twice, or without `connect`."""

    def line(self) -> LineClaim | None:
        """The line that this device needs, by its configuration alone (no IO but resolving a port's name). Two devices
        that cannot share one are refused before anything runs. `None`: it is in nobody's way."""
        return None

    def remembered(self) -> bytes | None:
        """What was learnt about the device and is wanted back after a restart (addresses it refuses, say); small.
        `None`: nothing new since the last call. The agent keeps it beside its buffer."""
        return None

    def recall(self, remembered: bytes) -> None:
        """What `remembered` gave in an earlier life, before the first `connect`. Never raises: what is not
        understood, or is about another device, is ignored."""
        return

    @classmethod
    def discover(cls) -> AsyncIterator[Found]:
        """Optional: yield what is found on this driver's buses. The default finds nothing."""
        return _nothing()


async def _nothing() -> AsyncIterator[Found]:
    return
    yield  # pragma: no cover - makes this an async generator


class Driver(_Device[OptionsT, PointT]):
    """A device that answers when asked."""

    @abstractmethod
    async def read(self, points: Sequence[PointT]) -> Scan:
        """Read exactly these points, once. Raises `DeviceUnreachable`, `ConfigError`; a single point's trouble is
        a reason in the scan, never an exception."""

    async def write(self, point: PointT, value: Value) -> None:
        """Write one raw value. Raises `PointRefused` where the device or the driver does not allow it."""
        raise PointRefused(point.name, "this driver does not write")


class PushDriver(_Device[OptionsT, PointT]):
    """A device that speaks when it likes (adverts, free-running instruments)."""

    overruns: int = 0
    """Scans the driver had to drop because nobody took them in time; only ever grows. The poller reports each as a
    gap."""

    @abstractmethod
    def scans(self) -> AsyncIterator[Scan]:
        """Yield scans as they come, until cancelled. A scan names only the points its message carried, or gives
        a reason for those that the message should have carried. A scan without points says "it was heard and is
        well, there is nothing new": it is kept nowhere, but a device that was down is so no more. Raises
        `DeviceUnreachable`, `ConfigError`."""
