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

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

import msgspec

from config.agent import Device
from drivers.contract import LineClaim, Reason, Scan, Value, engineering
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
    """What a reload of the configuration did, by device name. `errors`: the file was refused and nothing changed."""

    started: list[str] = []
    stopped: list[str] = []
    changed: list[str] = []
    unchanged: int = 0
    errors: list[str] = []


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
