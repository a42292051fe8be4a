"""A device made of waveforms, to try a configuration with no hardware.

Rules: a value depends on the clock, the seed and the point's own table only, so two runs with one seed on one clock
give the same scans, and adding a point changes no other. Values are raw, in the point's type; a wave that goes beyond
what the type holds is OVERFLOW, never clamped.
"""

from __future__ import annotations

import enum
import math
import random
import struct
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, Final

import msgspec

from drivers.codec import fitting, limits_of
from drivers.contract import (
    ConfigError,
    DeviceUnreachable,
    Driver,
    Point,
    PointRefused,
    Reason,
    Scan,
    Value,
    ValueType,
    boot_ns,
)

_WALK_STEP_S: Final = 1.0  #: a random walk takes one step a second
_WALK_PERIOD: Final = (
    1000  #: and is back at its centre after so many steps, so any instant is found without the past
)


class Wave(enum.StrEnum):
    """What a point does over time, between `low` and `high`."""

    SINE = "sine"
    RAMP = "ramp"  #: rises from low to high, falls back at once
    SQUARE = "square"  #: low for half the period, high for the other half
    CONSTANT = "constant"  #: low
    COUNTER = "counter"  #: one more every period, from low on; back to low above high
    WALK = "walk"  #: a random walk, by the seed


class SimulatorOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of the device as a whole."""

    seed: int = 0
    fail_every: Annotated[int, msgspec.Meta(ge=0)] = (
        0  #: every n-th read finds the device unreachable; 0: none
    )


class SimulatorPoint(Point, frozen=True, kw_only=True):
    """One wave."""

    wave: Wave = Wave.SINE
    low: float = 0.0
    high: float = 100.0
    period_s: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    noise: Annotated[float, msgspec.Meta(ge=0)] = 0.0  #: standard deviation of what is added


class SimulatorDriver(Driver[SimulatorOptions, SimulatorPoint]):
    """Answers at once, with what its waves are at the time on its clock."""

    options_type: ClassVar[type[msgspec.Struct]] = SimulatorOptions
    point_type: ClassVar[type[Point]] = SimulatorPoint

    def __init__(
        self,
        name: str,
        options: SimulatorOptions,
        points: Sequence[SimulatorPoint],
        clock_ns: Callable[[], int] = boot_ns,
    ) -> None:
        super().__init__(name, options, points)
        for point in points:
            if point.high < point.low:
                raise ConfigError(f"point {point.name!r}: high: {point.high:g} is below low, {point.low:g}")
            if not all(map(math.isfinite, (point.low, point.high, point.period_s, point.noise))):
                raise ConfigError(f"point {point.name!r}: low, high, period_s and noise must be finite")
        self._clock_ns = clock_ns
        self._connected = False
        self._reads = 0
        self._written: dict[str, Value] = {}
        self._walks = {p.name: _walk(self._random(p, "walk")) for p in points if p.wave is Wave.WALK}

    async def connect(self) -> None:
        self._connected = True

    async def close(self) -> None:
        self._connected = False

    async def read(self, points: Sequence[SimulatorPoint]) -> Scan:
        if not self._connected:
            raise DeviceUnreachable("not connected")
        self._reads += 1
        every = self.options.fail_every
        if every and self._reads % every == 0:
            self._connected = False
            raise DeviceUnreachable(f"read {self._reads} fails, as fail_every = {every} asks", Reason.TIMEOUT)
        now_ns = self._clock_ns()
        values: list[Value | None] = []
        reasons: dict[int, Reason] = {}
        for i, point in enumerate(points):
            value = self._written.get(point.name)
            if value is None:
                value = _as_type(self._level(point, now_ns), point.type)
            if value is None:
                reasons[i] = Reason.OVERFLOW
            values.append(value)
        return Scan(now_ns, tuple(points), values, reasons)

    async def write(self, point: SimulatorPoint, value: Value) -> None:
        """The point stays at this value from now on."""
        kinds = {ValueType.STR: str, ValueType.BOOL: bool}
        if point.type not in kinds:
            try:
                value = fitting(value, point.type)
            except ValueError as err:
                raise PointRefused(point.name, str(err)) from err
        elif not isinstance(value, kinds[point.type]):
            raise PointRefused(point.name, f"{value!r} is not a {point.type}")
        self._written[point.name] = value

    def _level(self, point: SimulatorPoint, now_ns: int) -> float:
        at_s = now_ns / 1e9
        phase = at_s % point.period_s / point.period_s
        span = point.high - point.low
        match point.wave:
            case Wave.SINE:
                level = point.low + span * (0.5 + 0.5 * math.sin(2 * math.pi * phase))
            case Wave.RAMP:
                level = point.low + span * phase
            case Wave.SQUARE:
                level = point.low if phase < 0.5 else point.high
            case Wave.CONSTANT:
                level = point.low
            case Wave.COUNTER:
                level = point.low + math.floor(at_s / point.period_s) % (math.floor(span) + 1)
            case Wave.WALK:
                level = point.low + span * self._walks[point.name][int(at_s / _WALK_STEP_S) % _WALK_PERIOD]
        if point.noise:
            level += self._random(point, str(now_ns)).gauss(0.0, point.noise)
        return level

    def _random(self, point: SimulatorPoint, what: str) -> random.Random:
        # A string seed does not depend on PYTHONHASHSEED.
        return random.Random(f"{self.options.seed}/{self.name}/{point.name}/{what}")


def _walk(chance: random.Random) -> list[float]:
    """Positions from 0 to 1; the walk ends where it began (a Brownian bridge), so it can go round."""
    steps = [chance.gauss(0.0, 1.0) for _ in range(_WALK_PERIOD)]
    drift = sum(steps) / _WALK_PERIOD
    at = 0.0
    path = []
    for step in steps:
        at += step - drift
        path.append(at)
    low, high = min(path), max(path)
    return [(place - low) / (high - low) for place in path]


def _as_type(level: float, type_: ValueType) -> Value | None:
    """`None` where the type cannot hold it."""
    if type_ is ValueType.STR:
        return f"{level:.3f}"
    if type_ is ValueType.BOOL:
        return round(level) != 0
    if type_ is ValueType.F64:
        return level
    if type_ is ValueType.F32:
        try:
            return float(struct.unpack("<f", struct.pack("<f", level))[0])
        except OverflowError:
            return None
    whole = round(level)
    low, high = limits_of(type_)
    return whole if low <= whole <= high else None
