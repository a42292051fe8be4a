"""SDI-12 sensors (soil, water, weather) through an adapter: the specification of version 1.4, January 2019.

The driver wakes the bus with a break, starts a measurement (`aM!`, `aC!`) or reads at once (`aR0!`), waits for the
sensor's service request or the time it said, and fetches the values (`aD0!` and on) until all that were promised are
there.

Rules:

- An answer counts only if it begins with the sensor's address and ends in CR LF; with `crc`, only if its check agrees.
- A command without a proper answer is sent again, three times in all (7.2); then the sensor is unreachable.
- A value that is absent is MISSING, one whose check failed is CRC; a sensor that promises no value says that it cannot
  measure: EXCEPTION. Never 0.
- While a sensor measures by `M`, the bus is its own, as a break would end the measurement (4.4.6); by `C` others are
  read in the meantime.
- The scan's time is that of the last values' arrival.
"""

from __future__ import annotations

import asyncio
import re
import string
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import ClassVar, Final, Literal

import msgspec

from drivers.checks import crc16_arc
from drivers.contract import (
    ConfigError,
    DeviceUnreachable,
    Driver,
    Found,
    LineClaim,
    Point,
    Reason,
    Scan,
    Value,
)
from drivers.fields import parse
from drivers.serial_bus import Bus, Wire, join
from drivers.serial_port import Parity, PortSettings, line_of, refuse_bad_name

ADDRESSES: Final = (
    string.digits + string.ascii_lowercase + string.ascii_uppercase
)  #: table 5; "0" is the factory's
BUS_BAUD: Final = 1200  #: the only speed (7.0)
_TRIES: Final = 3  #: 7.2
_MARKING_S: Final = 0.00833  #: after the break, 8.33 ms at least (7.0)
_SILENCE_S: Final = 0.1
_AT_MOST_S: Final = 2.0
_SERVICE_MARGIN_S: Final = 0.5  #: adapters are late; the sensor itself may not be
_MAX_ANSWER_BYTES: Final = 96  #: address, 75 characters of values (table 11), check, CR LF
_COMMAND: Final = re.compile(r"[MC][1-9]?|R[0-9]")
_VALUE: Final = re.compile(r"[+-]\d{1,9}(?:\.\d{0,8})?|[+-]\.\d{1,8}")
_PROMISE: Final = re.compile(r"(\d{3})(\d{1,2})")


class Sdi12Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[device.options]` of a sensor; every key is explained in sdi12.toml."""

    port: str
    baud: int = 1200
    data_bits: Literal[7, 8] = 7
    parity: Parity = "even"
    stop_bits: Literal[1, 2] = 1
    break_ms: int = 15
    address: str = "0"
    command: str = "M"
    crc: bool = False
    reply_timeout_ms: int = 500

    @property
    def settings(self) -> PortSettings:
        return PortSettings(
            baud=self.baud, data_bits=self.data_bits, parity=self.parity, stop_bits=self.stop_bits
        )

    @property
    def sets_parity(self) -> bool:
        """Is the parity bit ours to set? At another speed than the bus's own the adapter speaks for itself, in plain
        characters."""
        return self.data_bits == 8 and self.baud == BUS_BAUD


class Sdi12Point(Point, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a point stands among the values of the measurement."""

    value: int  #: counted from 1, in the order in which the sensor sends them


class Identity(msgspec.Struct, frozen=True):
    """What a sensor says to `aI!` (4.4.2)."""

    address: str
    version: str  #: of SDI-12: "14" is 1.4
    vendor: str
    model: str
    sensor_version: str
    extra: str  #: a serial number, mostly

    def __str__(self) -> str:
        words = (self.vendor, self.model, self.sensor_version, self.extra)
        return " ".join(filter(None, words)) + f" (SDI-12 {self.version[:1]}.{self.version[1:]})"


# ---------------------------------------------------------------------------------------------------------- deciding


def check_characters(data: bytes) -> bytes:
    """The CRC in three printable characters (4.4.12.2)."""
    crc = crc16_arc(data)
    return bytes((0x40 | crc >> 12, 0x40 | crc >> 6 & 0x3F, 0x40 | crc & 0x3F))


def identity(answer: str) -> Identity | None:
    """From the answer to `aI!`, without CR LF."""
    if not 20 <= len(answer) <= 33 or not answer[1:3].isdigit():
        return None
    return Identity(
        answer[0],
        answer[1:3],
        answer[3:11].strip(),
        answer[11:17].strip(),
        answer[17:20].strip(),
        answer[20:].strip(),
    )


def promise(answer: str) -> tuple[int, int] | None:
    """Seconds to wait and how many values, from the answer to `aM!` (atttn) or `aC!` (atttnn), without the address."""
    found = _PROMISE.fullmatch(answer)
    return None if found is None else (int(found[1]), int(found[2]))


def values(answer: str) -> list[str] | None:
    """The values of an answer to `aD0!`, without the address; `None` if it is of another form."""
    found = _VALUE.findall(answer)
    return found if "".join(found) == answer else None


def answer_in(heard: bytes, command: bytes) -> tuple[bytes, int] | None:
    """The answer in what was heard, without CR LF, and where it ends. A two-wire adapter hears its own command, and the
    break may come in as a NUL before it."""
    begin = 0
    if command and (echo := heard.find(command)) >= 0:
        begin = echo + len(command)
    end = heard.find(b"\r\n", begin)
    if end < 0:
        return None
    line = heard[begin:end].lstrip(b"\0\x7f\xff")
    return line, end + 2


class _Damaged(Exception):
    """An answer came, and it is none: of another form, of another sensor, or its check failed."""

    def __init__(self, text: str, reason: Reason) -> None:
        super().__init__(text)
        self.reason = reason


class _Garbled(DeviceUnreachable):
    """Answers came, and none was proper; the last of them then."""

    def __init__(self, text: str, reason: Reason, at_ns: int) -> None:
        super().__init__(text, reason)
        self.at_ns = at_ns


# ------------------------------------------------------------------------------------------------------------ driver


async def ask(wire: Wire, options: Sdi12Options, command: str, *, checked: bool = False) -> str:
    """The answer to a command, without address and check. Tries three times. Raises `DeviceUnreachable`."""
    address = options.address
    damaged: _Damaged | None = None
    for _ in range(_TRIES):
        try:
            return await _ask_once(wire, options, address, command, checked=checked)
        except TimeoutError:
            pass
        except _Damaged as exc:
            damaged = exc
            await wire.quiet(_SILENCE_S, _AT_MOST_S)
    what = f"{options.port}: sensor {address!r} was asked {command} {_TRIES} times: "
    if damaged is not None:
        raise _Garbled(f"{what}{damaged}", damaged.reason, wire.at_ns)
    raise DeviceUnreachable(f"{what}it does not answer", Reason.TIMEOUT)


async def _ask_once(wire: Wire, options: Sdi12Options, address: str, command: str, *, checked: bool) -> str:
    even = options.sets_parity
    wire.forget()
    if options.break_ms:
        await wire.send_break(options.break_ms / 1000)
        await asyncio.sleep(_MARKING_S)
        wire.forget()  # a break comes in as a character
    request = command.encode("ascii")
    await wire.write(request, even=even)

    def enough(heard: bytes) -> int:
        found = answer_in(heard.translate(_LOW), request)
        return 0 if found is None else found[1]

    heard = await wire.receive(enough, first_s=options.reply_timeout_ms / 1000, between_s=0.2)
    # CR with its parity bit: the characters came as they were sent, and the bit can be verified.
    if even and heard[-2:-1] == b"\x8d" and any(byte.bit_count() % 2 for byte in heard):
        raise _Damaged(f"a character of {heard[:40]!r} has the wrong parity", Reason.FRAMING)
    return _judged(heard, address, request, checked=checked)


def _judged(heard: bytes, address: str, request: bytes, *, checked: bool) -> str:
    """The answer without address and check. Raises `_Damaged`."""
    found = answer_in(heard.translate(_LOW), request)
    line = found[0] if found is not None else b""
    if len(line) > _MAX_ANSWER_BYTES or not line.isascii() or line[:1] != address.encode("ascii"):
        raise _Damaged(f"it answers {line[:40]!r}, which does not begin with its address", Reason.FRAMING)
    if checked:
        if len(line) < 4 or check_characters(line[:-3]) != line[-3:]:
            raise _Damaged(f"the check of {line!r} is wrong", Reason.CRC)
        line = line[:-3]
    return line[1:].decode("ascii")


_LOW: Final = bytes(range(128)) * 2  #: without parity, where the line is read as eight bits


class Sdi12Driver(Driver[Sdi12Options, Sdi12Point]):
    """Reads one measurement of one sensor."""

    options_type: ClassVar[type[msgspec.Struct]] = Sdi12Options
    point_type: ClassVar[type[Point]] = Sdi12Point
    patience_s = 30.0  #: the sensor says how long it takes; most need less than this

    def __init__(self, name: str, options: Sdi12Options, points: Sequence[Sdi12Point]) -> None:
        super().__init__(name, options, points)
        self.identity: Identity | None = None
        self._bus: Bus[Wire] | None = None
        refuse_bad_name(options.port)
        for key, given, low, high in (
            ("baud", options.baud, 300, 921_600),
            ("break_ms", options.break_ms, 0, 100),
            ("reply_timeout_ms", options.reply_timeout_ms, 20, 60_000),
        ):
            if not low <= given <= high:
                raise ConfigError(f"options.{key} is {given}; allowed is {low} to {high}")
        if 0 < options.break_ms < 12:
            raise ConfigError(
                f"options.break_ms is {options.break_ms}; a sensor wakes at 12 and more (0: the adapter does it)"
            )
        if (options.data_bits == 7) == (options.parity == "none"):
            raise ConfigError(
                f'options: {options.data_bits} data bits with parity "{options.parity}"; SDI-12 has 7 and "even"; an '
                'adapter that cannot do that, or speaks for itself, is given 8 and "none"'
            )
        if len(options.address) != 1 or options.address not in ADDRESSES:
            raise ConfigError(f"options.address is {options.address!r}; it is one of 0-9, a-z, A-Z")
        if _COMMAND.fullmatch(options.command) is None:
            raise ConfigError(
                f"options.command is {options.command!r}; it is M, M1 to M9, C, C1 to C9, or R0 to R9"
            )
        if not self.points:
            raise ConfigError("has no points; add a [[device.point]] table")
        most = 9 if options.command[0] == "M" else 99
        for point in self.points:
            if not 1 <= point.value <= most:
                raise ConfigError(
                    f"point {point.name!r}: value is {point.value}; {options.command} gives values 1 to {most}"
                )

    def line(self) -> LineClaim:
        return line_of(self.options.port, f"sdi12, {self.options.settings}", shared=True)

    async def connect(self) -> None:
        await self.close()
        self._bus = join(self.options.port, self.options.settings)
        try:
            async with _turn(self._bus) as wire:
                answer = await ask(wire, self.options, f"{self.options.address}I!")
            self.identity = identity(self.options.address + answer)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        bus, self._bus = self._bus, None
        if bus is not None:
            bus.leave()

    async def read(self, points: Sequence[Sdi12Point]) -> Scan:
        bus = self._bus
        if bus is None:
            raise DeviceUnreachable(f"{self.options.port}: not connected")
        try:
            got, at_ns = await self._measure(bus)
        except _Garbled as exc:
            return _scan(exc.at_ns, points, exc.reason)
        return _scan(at_ns, points, got)

    async def _measure(self, bus: Bus[Wire]) -> tuple[list[str] | Reason, int]:
        """The measurement's values, and when the last of them came."""
        options = self.options
        check = "C" if options.crc else ""
        address, kind, number = options.address, options.command[0], options.command[1:]
        if kind == "R":
            async with _turn(bus) as wire:
                answer = await ask(wire, options, f"{address}R{check}{number}!", checked=options.crc)
                return _listed(answer), wire.at_ns
        async with _turn(bus) as wire:
            answer = await ask(wire, options, f"{address}{kind}{check}{number}!")
            promised = promise(answer)
            if promised is None:
                return Reason.FRAMING, wire.at_ns
            wait_s, count = promised
            if not count:
                return Reason.EXCEPTION, wire.at_ns
            if kind == "M":
                if wait_s:
                    await self._service_request(wire, wait_s)
                return await self._fetch(wire, count)
        await asyncio.sleep(wait_s)
        async with _turn(bus) as wire:
            return await self._fetch(wire, count)

    async def _service_request(self, wire: Wire, wait_s: float) -> None:
        """`a` CR LF as soon as the values are there; where it gets lost, the time that the sensor said is enough."""
        wanted = self.options.address.encode("ascii")

        def enough(heard: bytes) -> int:
            found = answer_in(heard.translate(_LOW), b"")
            return found[1] if found is not None and found[0] == wanted else 0

        try:
            await wire.receive(enough, first_s=wait_s + _SERVICE_MARGIN_S)
        except TimeoutError:
            return

    async def _fetch(self, wire: Wire, count: int) -> tuple[list[str] | Reason, int]:
        """`aD0!`, `aD1!`, … until all promised values are there."""
        options = self.options
        got: list[str] = []
        for number in range(10):
            answer = await ask(wire, options, f"{options.address}D{number}!", checked=options.crc)
            more = _listed(answer)
            if isinstance(more, Reason):
                return more, wire.at_ns
            got += more
            if len(got) >= count or not more:
                break
        return got, wire.at_ns

    @classmethod
    async def identify(
        cls, port: str, options: Sdi12Options | None = None, addresses: str = ADDRESSES
    ) -> AsyncIterator[Found]:
        """The sensors on a bus. Asks each address once; a lone sensor is found at once by `?!` (4.4.5)."""
        options = options or Sdi12Options(port=port)
        bus = join(port, options.settings)
        try:
            for address in addresses:
                one = msgspec.structs.replace(options, address=address)
                try:
                    async with _turn(bus) as wire:
                        answer = await _ask_once(wire, one, address, f"{address}I!", checked=False)
                except (TimeoutError, _Damaged):
                    continue
                said = identity(address + answer)
                yield Found(
                    driver="sdi12",
                    address=f"{port}, address {address}",
                    description=str(said) if said is not None else f"a sensor that says {answer!r}",
                    options={"port": port, "address": address},
                )
        finally:
            bus.leave()


def _turn(bus: Bus[Wire]) -> AbstractAsyncContextManager[Wire]:
    return bus.turn(silence_s=_SILENCE_S, at_most_s=_AT_MOST_S)


def _listed(answer: str) -> list[str] | Reason:
    found = values(answer)
    return Reason.FRAMING if found is None else found


def _scan(at_ns: int, points: Sequence[Sdi12Point], got: list[str] | Reason) -> Scan:
    given: list[Value | None] = []
    reasons: dict[int, Reason] = {}
    for index, point in enumerate(points):
        if isinstance(got, Reason):
            result: Value | Reason = got
        elif point.value > len(got):
            result = Reason.MISSING
        else:
            result = parse(got[point.value - 1], point.type)
        if isinstance(result, Reason):
            reasons[index] = result
            given.append(None)
        else:
            given.append(result)
    return Scan(at_ns, tuple(points), given, reasons)
