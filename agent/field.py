"""The field as a technician's command reaches it: through the running agent, or, where none runs, directly.

Rules:
1. A line has one owner. While the agent runs, every request of a command goes through the agent's own line, in the
   same queue as its polls; a command never opens a port that the agent holds.
2. Both ways keep one promise and pass one suite (`tests/field_conformance.py`): a command does not know which
   it has.
3. Values are shown as a person sees them (scale and offset applied), with the raw one beside.

`agent.control` is the way through the agent (a Unix socket in the state folder, for the agent's own user and root);
`agent.field_direct` the way without.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from config.agent import Device
from config.load import nearest
from drivers.codec import fitting, limits_of
from drivers.contract import (
    LineClaim,
    Point,
    PointRefused,
    Reason,
    Scan,
    Value,
    ValueType,
    boot_ns,
    engineering,
)

if TYPE_CHECKING:  # pymodbus stays out of an agent that nobody asks and that has no Modbus device
    from drivers.modbus_line import Address, Replies, Request


class Shown(msgspec.Struct, frozen=True):
    """One reading, for a person."""

    point: str
    value: Value | None  #: after scale and offset
    raw: Value | None
    unit: str
    reason: Reason


class Look(msgspec.Struct, frozen=True):
    """One scan, for a person. `taken_at_ns` is the wall clock, computed when it was shown."""

    device: str
    taken_at_ns: int
    readings: list[Shown]


class LineInUse(msgspec.Struct, frozen=True):
    """A line that the agent holds, and by which devices."""

    claim: LineClaim
    devices: list[str]


class Reloaded(msgspec.Struct, frozen=True):
    """What a reload of the configuration did, by device name. `errors`: the file was refused and nothing changed.
    `notes`: what else changed in the file, and takes a restart of the agent."""

    started: list[str] = []
    stopped: list[str] = []
    changed: list[str] = []
    unchanged: int = 0
    errors: list[str] = []
    notes: list[str] = []


class FieldError(Exception):
    """The field cannot be reached this way; the text has the remedy."""


class LineTaken(FieldError):
    """Somebody else has the line, with other settings or for himself. `devices` names them where they are known."""

    def __init__(self, text: str, devices: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.devices = tuple(devices)


class UnknownDevice(FieldError):
    """No such device, or no such point of it, in the configuration; the text names the nearest."""


class Field(Protocol):
    """What a command can do. Every call may raise `FieldError`; those that talk to a device also the `DriverError`s
    of `drivers.contract` (they cross the socket with their text and reason)."""

    through_agent: bool

    async def ask(
        self, address: Address, series: Sequence[Request], *, connect_timeout_s: float = 3.0
    ) -> Replies:
        """Raw Modbus requests on this line, in its owner's queue. Raises `LineTaken`, `DeviceUnreachable`."""

    async def lines(self) -> list[LineInUse]:
        """The lines that the agent holds (none, where no agent runs)."""

    async def read(self, device: str) -> Look:
        """One fresh read of a configured device (a pushing one: its next message)."""

    def watch(self, device: str) -> AsyncIterator[Look]:
        """Every scan of a configured device as it comes, for as long as the caller likes."""

    async def write(self, device: str, point: str, value: Value) -> Look:
        """Write `value` (as a person sees it) to a point, and read that point back. Raises `PointRefused`."""

    async def attempt(self, device: Device, *, timeout_s: float = 10.0) -> Look:
        """Build a device that is not in the configuration, read it once, and let it go."""

    async def reload(self) -> Reloaded:
        """Take the configuration file anew: devices are started, stopped or exchanged, the buffer and all other
        devices go on. Raises `FieldError` where no agent runs."""

    async def close(self) -> None:
        """Give back every line. Never raises."""


def shown(device: str, scan: Scan, *, wall_ns: int) -> Look:
    """A scan for a person. `wall_ns` is the wall-clock time of its `taken_at_ns`."""
    readings: list[Shown] = []
    for i, point in enumerate(scan.points):
        raw, reason = scan.values[i], scan.reasons.get(i, Reason.GOOD)
        seen = raw
        if isinstance(raw, int | float) and not isinstance(raw, bool):
            plain = point.scale == 1.0 and not point.offset
            seen = raw if plain else engineering(raw, point.scale, point.offset)
        readings.append(Shown(point.name, seen, raw, point.unit, reason))
    return Look(device, wall_ns, readings)


def wall_ns_of(taken_at_ns: int) -> int:
    """The wall-clock time of a boot-clock stamp, by both clocks as they stand now."""
    return time.time_ns() - (boot_ns() - taken_at_ns)


_NOISE: Final = 1e-9  #: relative: what a decimal number and its scale leave in a double


def raw_of(point: Point, value: Value) -> Value:
    """The raw value that is written for `value`, as a person gives it. Raises `PointRefused`; never rounds away what
    the person meant: a value between two steps is refused, with both neighbours named."""
    if point.type is ValueType.STR:
        if not isinstance(value, str):
            raise PointRefused(point.name, f"{value!r} is not text")
        return value
    if point.type is ValueType.BOOL:
        if isinstance(value, str) or value not in (0, 1):
            raise PointRefused(point.name, f"{value!r} is not true or false")
        return bool(value)
    if isinstance(value, bool | str) or not math.isfinite(value):
        raise PointRefused(point.name, f"{value!r} is not a number")
    _check_range(point, value)
    try:
        raw = _unscaled(point, value)
        if raw in point.not_available:
            raise PointRefused(point.name, f"{value:g} is the device's own code for 'no value here'")
        return fitting(raw, point.type)
    except (ValueError, OverflowError, ZeroDivisionError) as err:
        raise PointRefused(point.name, f"{value:g} cannot be written: {err}") from err


def _check_range(point: Point, value: float) -> None:
    low, high = point.valid_min, point.valid_max
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = " to ".join("any" if limit is None else f"{limit:g}" for limit in (low, high))
        raise PointRefused(
            point.name, f"{value:g} is outside valid_min..valid_max ({bounds} {point.unit}".rstrip() + ")"
        )
    if point.one_of is not None and value not in point.one_of:
        codes = ", ".join(f"{code:g}" for code in point.one_of)
        raise PointRefused(point.name, f"{value:g} is not one of its values ({codes})")


def _unscaled(point: Point, value: float) -> int | float:
    """The inverse of `engineering`. Raises `PointRefused` for what an integer type cannot hold exactly."""
    if point.type in (ValueType.F32, ValueType.F64):
        return (value - point.offset) / point.scale
    if isinstance(value, int) and point.scale == 1.0 and not point.offset:
        return value  # of 64 bits: a double would lose digits
    raw = (value - point.offset) / point.scale
    whole = round(raw)
    if abs(raw - whole) > _NOISE * max(1.0, abs(raw), abs(point.offset / point.scale)):
        low, high = limits_of(point.type)
        near = sorted(
            engineering(n, point.scale, point.offset)
            for n in (math.floor(raw), math.ceil(raw))
            if low <= n <= high
        )
        nearby = " and ".join(f"{n:.12g}" for n in near) or "none that fits"
        raise PointRefused(
            point.name, f"{value:g} falls between two steps of {abs(point.scale):g}; the nearest are {nearby}"
        )
    return whole


def unknown_device(name: str, known: Iterable[str], where: str) -> UnknownDevice:
    """`where`: "agent.toml", or what else was looked in."""
    return UnknownDevice(f"no device {name!r} in {where}{nearest(name, known)}")


def disabled(name: str) -> FieldError:
    return FieldError(f"device {name!r} is disabled; set enabled = true in its table to use it")


def point_of(device: str, points: Iterable[Point], name: str) -> Point:
    """The point of this name. Raises `UnknownDevice` with the nearest."""
    by_name = {point.name: point for point in points}
    if name not in by_name:
        raise UnknownDevice(f"{device} has no point {name!r}{nearest(name, by_name)}")
    return by_name[name]
