"""Meters with an optical head or a current loop: IEC 62056-21 (once IEC 1107), data readout.

The driver signs on (`/?` address `!`), reads the identification, agrees on a speed where the meter offers one (mode C),
or follows the meter's own (mode B), or stays (mode A), reads the data block to its end, and checks its block check
character. One readout answers all points, by their OBIS codes (drivers/obis.py).

Rules:

- A block whose check fails is CRC on every point; a data set that is not in the block is MISSING; never 0.
- The scan's time is that of the block's last byte.
- The line goes back to the first speed after every session, also after one that failed, and a session that was given
  up is waited out: the meter may still be sending at the other speed.
- Seven bits and even parity, as the standard has it. An adapter that cannot do that is given 8 bits (`data_bits = 8`,
  `parity = "none"`), and the parity bit is set and taken off here.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import ClassVar, Final, Literal

import msgspec

from drivers.checks import xor_of
from drivers.contract import (
    ConfigError,
    DeviceUnreachable,
    Driver,
    LineClaim,
    Point,
    Reason,
    Scan,
    Value,
)
from drivers.fields import Doubted
from drivers.obis import DataSets, expected_unit, refuse_bad_code
from drivers.serial_bus import Bus, Wire, join
from drivers.serial_port import Parity, PortSettings, line_of, refuse_bad_name

_LOW: Final = bytes(range(128)) * 2
_STX, _ETX, _ACK = b"\x02", b"\x03", b"\x06"
_MAX_BLOCK_BYTES: Final = 65_536
#: Speeds by the identification's baud character (IEC 62056-21, 6.3.14, item 13): mode C and E, then mode B.
_SPEEDS_C: Final = {"0": 300, "1": 600, "2": 1200, "3": 2400, "4": 4800, "5": 9600, "6": 19200}
_SPEEDS_B: Final = {"A": 600, "B": 1200, "C": 2400, "D": 4800, "E": 9600, "F": 19200}
_REACTION_S: Final = (
    0.2  #: a meter answers no sooner (5.4.2: 200 ms, or 20 ms where it says so by a small letter)
)
_BETWEEN_S: Final = 1.5  #: between two characters of a message at most (5.4.2, ta)
_WAKE_PAUSE_S: Final = 1.6  #: after the wake-up message, 1.5 s to 1.7 s (annex B)
_AT_MOST_S: Final = 30.0  #: a meter that is left alone ends its session in 1.5 s; a long readout goes on


class Iec62056Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[device.options]` of a meter; every key is explained in iec62056.toml."""

    port: str
    baud: int = 300
    data_bits: Literal[7, 8] = 7
    parity: Parity = "even"
    stop_bits: Literal[1, 2] = 1
    address: str = ""
    mode: Literal["auto", "a", "c"] = "auto"
    max_baud: int = 19_200
    reply_timeout_ms: int = 2000
    wake_up_ms: int = 0
    checked: bool = True

    @property
    def settings(self) -> PortSettings:
        return PortSettings(
            baud=self.baud, data_bits=self.data_bits, parity=self.parity, stop_bits=self.stop_bits
        )


class Iec62056Point(Point, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a point stands in the readout."""

    obis: str = ""  #: "1.8.0", or whole, "1-0:1.8.0"
    column: int | None = None  #: which value of the data set, counted from 1; the last, if left out
    base: Literal[2, 8, 10, 16] = 10  #: of a whole number
    device_unit: str = ""  #: the unit that the meter must say; unset: the point's own, where it has no scale


class Identification(msgspec.Struct, frozen=True):
    """What a meter says of itself: three letters of its maker, the character of its speed, and its type."""

    maker: str
    speed: str
    type: str

    @property
    def fast(self) -> bool:
        """A small third letter: the meter answers within 20 ms."""
        return self.maker[2:].islower()


_IDENTIFICATION: Final = re.compile(rb"/([A-Za-z]{3})([ -~])([^\r\n/]{0,32})\r?\n")


def identification(heard: bytes) -> tuple[Identification, int] | None:
    """The identification in what was heard, and where it ends. Our own sign-on (`/?`), which many heads echo, is
    none."""
    found = _IDENTIFICATION.search(heard)
    if found is None:
        return None
    maker, speed, kind = (part.decode("ascii", "replace") for part in found.groups())
    return Identification(maker, speed, kind.strip()), found.end()


def sign_on(address: str) -> bytes:
    return f"/?{address}!\r\n".encode("ascii")


def acknowledgement(speed: str) -> bytes:
    """Normal protocol, this speed, data readout (6.3.2, message 3)."""
    return _ACK + f"0{speed}0\r\n".encode("ascii")


def block_size(heard: bytes) -> int:
    """How many bytes of what was heard are the data block with its check; 0: it goes on."""
    begin = heard.find(_STX)
    end = heard.find(_ETX, begin + 1) if begin >= 0 else -1
    if end >= 0:
        return end + 2 if len(heard) > end + 1 else 0
    if begin < 0:  # mode A may leave out STX, ETX and check
        for mark in (b"!\r\n", b"!\n"):
            at = heard.find(mark)
            if at >= 0 and (at == 0 or heard[at - 1 : at] in (b"\n", b")")):
                return at + len(mark)
    return min(len(heard), _MAX_BLOCK_BYTES) if len(heard) > _MAX_BLOCK_BYTES else 0


def data_block(heard: bytes, *, checked: bool) -> str | Reason:
    """The text of a data block: between STX and ETX, and the check over all after STX to ETX (6.3, item 8)."""
    begin = heard.find(_STX)
    end = heard.find(_ETX, begin + 1) if begin >= 0 else -1
    if begin < 0:
        if checked or b"!" not in heard:
            return Reason.FRAMING
        text = heard[: heard.rfind(b"!")]
    elif end < 0 or len(heard) < end + 2:
        return Reason.FRAMING
    elif heard[end + 1] & 0x7F != xor_of(heard[begin + 1 : end + 1]):
        return Reason.CRC
    else:
        text = heard[begin + 1 : end]
    return text.decode("ascii", "replace")


class Iec62056Driver(Driver[Iec62056Options, Iec62056Point]):
    """Reads one meter."""

    options_type: ClassVar[type[msgspec.Struct]] = Iec62056Options
    point_type: ClassVar[type[Point]] = Iec62056Point
    patience_s = 60.0  #: a readout of 1.5 KB at 300 baud, 10 bits a character

    def __init__(self, name: str, options: Iec62056Options, points: Sequence[Iec62056Point]) -> None:
        super().__init__(name, options, points)
        self.identification: Identification | None = None  #: as of the last session
        self._bus: Bus[Wire] | None = None
        refuse_bad_name(options.port)
        for key, value, low, high in (
            ("baud", options.baud, 50, 115_200),
            ("max_baud", options.max_baud, 300, 115_200),
            ("reply_timeout_ms", options.reply_timeout_ms, 100, 60_000),
            ("wake_up_ms", options.wake_up_ms, 0, 10_000),
        ):
            if not low <= value <= high:
                raise ConfigError(f"options.{key} is {value}; allowed is {low} to {high}")
        if options.address and not (options.address.isascii() and options.address.isalnum()):
            raise ConfigError(f"options.address is {options.address!r}; it has letters and digits only")
        if len(options.address) > 32:
            raise ConfigError(f"options.address has {len(options.address)} characters; at most 32")
        if (options.data_bits == 7) == (options.parity == "none"):
            raise ConfigError(
                f"options: {options.data_bits} data bits with parity {options.parity!r}; the standard's way is 7 and "
                '"even"; an adapter that cannot do that is given 8 and "none"'
            )
        if not self.points:
            raise ConfigError("has no points; add a [[device.point]] table")
        for point in self.points:
            refuse_bad_code(point.name, point.obis)
            if point.column is not None and point.column < 1:
                raise ConfigError(
                    f"point {point.name!r}: column is {point.column}; values are counted from 1"
                )

    def line(self) -> LineClaim:
        """Shared by meters that have each its address; one without answers to every sign-on."""
        settings = f"iec62056, {self.options.settings}"
        return line_of(self.options.port, settings, shared=bool(self.options.address))

    async def connect(self) -> None:
        await self.close()
        self._bus = join(self.options.port, self.options.settings)
        try:
            async with self._turn(self._bus):
                pass
        except BaseException:
            await self.close()
            raise

    def _turn(self, bus: Bus[Wire]) -> AbstractAsyncContextManager[Wire]:
        return bus.turn(silence_s=_BETWEEN_S, at_most_s=_AT_MOST_S)

    async def close(self) -> None:
        bus, self._bus = self._bus, None
        if bus is not None:
            bus.leave()

    async def read(self, points: Sequence[Iec62056Point]) -> Scan:
        bus = self._bus
        if bus is None:
            raise DeviceUnreachable(f"{self.options.port}: not connected")
        async with self._turn(bus) as wire:
            heard, at_ns = await self._session(wire)
        block = data_block(heard, checked=self.options.checked)
        if isinstance(block, Reason):
            return Scan(at_ns, tuple(points), [None] * len(points), dict.fromkeys(range(len(points)), block))
        return self._scan(at_ns, points, DataSets(block))

    async def _session(self, wire: Wire) -> tuple[bytes, int]:
        """The data block as it came, and when its last byte came."""
        options = self.options
        even = options.data_bits == 8
        timeout_s = options.reply_timeout_ms / 1000
        if options.wake_up_ms:
            # Annex B: zeros for 2.1 s to 2.3 s wake a meter that runs on a battery.
            count = max(1, int(options.wake_up_ms / 1000 / options.settings.character_s))
            await wire.write(bytes(count))
            await asyncio.sleep(_WAKE_PAUSE_S)
            wire.forget()
        await wire.write(sign_on(options.address), even=even)
        try:
            signed = await wire.receive(_identified, first_s=timeout_s, between_s=_BETWEEN_S)
        except TimeoutError:
            heard = " (nothing came)" if not wire.heard else f" ({len(wire.heard)} bytes came, and none)"
            raise DeviceUnreachable(
                f"{options.port}: no identification from the meter{heard}; check the head's position, the address "
                "and the speed",
                Reason.TIMEOUT,
            ) from None
        found = identification(_seven(signed))
        assert found is not None  # noqa: S101 - `receive` gave it because `_identified` found it
        self.identification = found[0]
        await self._change_speed(wire, found[0], even=even)
        try:
            block = await wire.receive(_ended, first_s=timeout_s, between_s=_BETWEEN_S)
        except TimeoutError:
            size = len(wire.heard)
            raise DeviceUnreachable(
                f"{options.port}: {found[0].maker} {found[0].type} stopped after {size} bytes of its readout at "
                f"{wire.settings.baud} baud; try max_baud = 300 in its options",
                Reason.TIMEOUT if not size else Reason.FRAMING,
            ) from None
        return _seven(block), wire.at_ns

    async def _change_speed(self, wire: Wire, meter: Identification, *, even: bool) -> None:
        """Agree on a speed, or follow the meter's."""
        options = self.options
        if options.mode == "a":
            return
        if meter.speed in _SPEEDS_C:
            baud = _SPEEDS_C[meter.speed]
            speed = meter.speed if baud <= options.max_baud else "0"
            await asyncio.sleep(0.02 if meter.fast else _REACTION_S)
            await wire.write(acknowledgement(speed), even=even)
            if speed != "0":
                wire.set(msgspec.structs.replace(options.settings, baud=baud))
        elif meter.speed in _SPEEDS_B and options.mode == "auto":
            wire.set(msgspec.structs.replace(options.settings, baud=_SPEEDS_B[meter.speed]))

    def _scan(self, at_ns: int, points: Sequence[Iec62056Point], sets: DataSets) -> Scan:
        values: list[Value | None] = []
        reasons: dict[int, Reason] = {}
        for index, point in enumerate(points):
            unit = expected_unit(point, point.device_unit)
            result = sets.result(point.obis, point.type, column=point.column, unit=unit, base=point.base)
            if isinstance(result, Reason):
                reasons[index] = result
                values.append(None)
            elif isinstance(result, Doubted):
                reasons[index] = result.reason
                values.append(result.value)
            else:
                values.append(result)
        return Scan(at_ns, tuple(points), values, reasons)


def _seven(data: bytes) -> bytes:
    """Without parity, where the line is read as eight bits."""
    return data.translate(_LOW)


def _identified(heard: bytes) -> int:
    found = identification(_seven(heard))
    return 0 if found is None else found[1]


def _ended(heard: bytes) -> int:
    return block_size(_seven(heard))
