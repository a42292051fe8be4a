"""Heat, water, gas and electricity meters on a wired M-Bus (EN 13757-2 and -3; m-bus.com/documentation-wired), through
a level converter on a serial port or a gateway that passes its bytes over TCP.

A readout is SND_NKE, for a secondary address the selection, then REQ_UD2 until the meter has no more telegrams; it
answers all points, each by its record.

Rules:

- SND_NKE comes first every time: after it no meter takes our first question for a repeated one, to which it would
  answer with its last telegram, so that an old value had a new time.
- A damaged telegram is asked for again with the same frame count bit, three times in all (EN 13757-2, 5.7); then it is
  CRC or FRAMING on every point. Silence is `DeviceUnreachable`.
- A telegram of another meter (primary address, or identification where it was selected by that) is none.
- One record answers a point, or none does: where several fit, it is DECODE and the log says which, once.
- The raw value is the meter's number in the point's unit, whatever range the meter sends it in; a unit that the record
  cannot be had in is DECODE.
- The meter's own doubt (an application error, a permanent or temporary error in its status) goes on every value as
  DEVICE_DOUBT; a busy meter is BUSY on every point.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from fractions import Fraction
from typing import ClassVar, Final, Literal, TypeAlias

import msgspec

from config.load import nearest
from drivers import mbus_link as link
from drivers import mbus_records as layout
from drivers.contract import (
    ConfigError,
    DeviceUnreachable,
    Driver,
    LineClaim,
    Point,
    Reason,
    Scan,
    Value,
    ValueType,
)
from drivers.fields import Doubted, Result, fit, flagged
from drivers.mbus_link import Telegram
from drivers.mbus_records import QUANTITIES, UNITS, Record
from drivers.serial_bus import Bus, Wire, join, join_line
from drivers.serial_port import Parity, PortSettings, line_of, refuse_bad_name
from drivers.tcp_wire import TcpWire

log = logging.getLogger(__name__)

_BAUD: Final = (300, 600, 1200, 2400, 4800, 9600)
_TRIES: Final = 3  #: EN 13757-2, 5.7: a question is repeated twice
_BETWEEN_S: Final = 0.3  #: between two bytes of a telegram; the standard has none, adapters and gateways do
_AT_MOST_S: Final = 3.0  #: for the line to fall silent after an exchange that went wrong
_MOST_TELEGRAMS: Final = 32  #: of a readout; more, and the meter repeats itself for ever
_NETWORK_MS: Final = 1000  #: the way to a gateway and back
_ADAPTER_MS: Final = 200  #: what converter and USB add
_CONNECT_S: Final = 5.0
#: Encryption modes of the configuration field (EN 13757-7, 7.5); other bits stand there in old meters.
_ENCRYPTED: Final = frozenset({2, 3, 4, 5, 7, 8, 9, 10, 13})

AnyBus: TypeAlias = Bus[Wire] | Bus[TcpWire]
AnyWire: TypeAlias = Wire | TcpWire


class MbusOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[device.options]` of a meter; every key is explained in mbus.toml."""

    port: str = ""
    host: str = ""
    tcp_port: int = 10001
    baud: int = 2400
    data_bits: Literal[8] = 8
    parity: Parity = "even"
    stop_bits: Literal[1, 2] = 1
    address: int | None = None
    secondary: str = ""
    telegrams: int = 0
    reply_timeout_ms: int | None = None

    @property
    def settings(self) -> PortSettings:
        return PortSettings(
            baud=self.baud, data_bits=self.data_bits, parity=self.parity, stop_bits=self.stop_bits
        )

    @property
    def timeout_s(self) -> float:
        """A meter begins its answer within 330 bit times and 50 ms (EN 13757-2, 5.4)."""
        if self.reply_timeout_ms is not None:
            return self.reply_timeout_ms / 1000
        return 330 / self.baud + (50 + _ADAPTER_MS + (_NETWORK_MS if self.host else 0)) / 1000

    @property
    def name(self) -> str:
        return self.port or f"{self.host}:{self.tcp_port}"

    @property
    def meter(self) -> str:
        return f"meter {self.secondary.upper()}" if self.secondary else f"meter {self.address}"


class MbusPoint(Point, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which record of the readout a point is."""

    quantity: str = ""  #: in words: "energy", "volume", "flow_temperature", …; or "status", the header's byte
    vif: str = ""  #: or by the record's own codes, VIF and VIFEs: "FD 48", "84 3C"
    record: int | None = None  #: or by its number in the readout, counted from 1
    function: Literal["instantaneous", "maximum", "minimum", "error"] = "instantaneous"
    storage: int | None = None  #: unset: 0, the present value (with `record`: any)
    tariff: int | None = None  #: unset: 0, the total (with `record`: any)
    subunit: int | None = None  #: unset: 0 (with `record`: any)
    device_unit: str = ""  #: the unit of the raw value; unset: the point's own, where it has no scale

    @property
    def raw_unit(self) -> str:
        """The unit that the raw value is in; empty: the base unit of the record."""
        return self.device_unit or (self.unit if self.scale == 1.0 and not self.offset else "")


class Readout(msgspec.Struct, frozen=True):
    """What a meter said, in all its telegrams."""

    at_ns: int
    secondary: str  #: its secondary address, where it tells; as `options.secondary` takes it
    status: int | None
    records: tuple[Record, ...]
    trouble: Reason | None = None  #: nothing can be read in it, or only what stands before


class MbusDriver(Driver[MbusOptions, MbusPoint]):
    """Reads one meter."""

    options_type: ClassVar[type[msgspec.Struct]] = MbusOptions
    point_type: ClassVar[type[Point]] = MbusPoint
    patience_s = 15.0  #: several telegrams of 255 bytes at 2400 baud

    def __init__(self, name: str, options: MbusOptions, points: Sequence[MbusPoint]) -> None:
        super().__init__(name, options, points)
        self.readout: Readout | None = None  #: the last
        self._bus: AnyBus | None = None
        self._told: set[str] = set()
        _refuse_bad_options(options)
        self._wanted = link.secondary(options.secondary) if options.secondary else None
        self._address = link.NETWORK if self._wanted is not None else options.address or 0
        if not self.points:
            raise ConfigError("has no points; add a [[device.point]] table")
        for point in self.points:
            _refuse_bad_point(point)
        self._codes = {
            point.name: layout.codes_of(bytes.fromhex(point.vif)) for point in self.points if point.vif
        }
        layout.refuse_without_library()

    def line(self) -> LineClaim:
        options = self.options
        shared = options.address != link.ANYBODY
        if options.host:
            return LineClaim(f"{options.host.lower()}:{options.tcp_port}", "mbus", shared)
        return line_of(options.port, f"mbus, {options.settings}", shared=shared)

    async def connect(self) -> None:
        await self.close()
        await asyncio.to_thread(layout.load)  # 0.15 s, on a small gateway 1 s, in which nobody else need wait
        self._bus = self._join()
        try:
            async with self._turn(self._bus) as wire:
                await self._begin(wire)
        except BaseException:
            await self.close()
            raise

    def _join(self) -> AnyBus:
        options = self.options
        if not options.host:
            return join(options.port, options.settings)

        async def open_wire() -> TcpWire:
            return await TcpWire.connect(options.host, options.tcp_port, options.settings, _CONNECT_S)

        return join_line(options.name, self.line().key, options.settings, open_wire)

    def _turn(self, bus: AnyBus) -> AbstractAsyncContextManager[AnyWire]:
        return bus.turn(silence_s=self.options.timeout_s, at_most_s=_AT_MOST_S)

    async def close(self) -> None:
        bus, self._bus = self._bus, None
        if bus is not None:
            bus.leave()

    async def read(self, points: Sequence[MbusPoint]) -> Scan:
        bus = self._bus
        if bus is None:
            raise DeviceUnreachable(f"{self.options.name}: not connected")
        async with self._turn(bus) as wire:
            await self._begin(wire)
            readout = await self._readout(wire)
        self.readout = readout
        return self._scan(points, readout)

    # ------------------------------------------------------------------------------------------------------ exchange

    async def _begin(self, wire: AnyWire) -> None:
        """The meter is there, is the one we talk to, and has forgotten what was asked last."""
        if self._wanted is None:
            await self._acknowledged(wire, link.initialise(self._address))
            return
        # Whoever was selected is no more; where nobody was, nobody answers.
        await self._acknowledged(wire, link.initialise(link.NETWORK), tries=1, needed=False)
        await self._acknowledged(wire, link.select(self._wanted))

    async def _acknowledged(
        self, wire: AnyWire, sent: bytes, *, tries: int = _TRIES, needed: bool = True
    ) -> None:
        for _ in range(tries):
            wire.forget()
            await wire.write(sent)
            try:
                await wire.receive(
                    lambda heard: link.acknowledged(heard, sent),
                    first_s=self.options.timeout_s,
                    between_s=_BETWEEN_S,
                )
            except TimeoutError:
                continue
            # More than one may acknowledge a selection with wildcards; what they say then collides, and is damaged.
            return
        if needed:
            raise self._silent(wire)

    def _silent(self, wire: AnyWire) -> DeviceUnreachable:
        heard = f"{len(wire.heard)} bytes came, and no answer" if wire.heard else "it does not answer"
        return DeviceUnreachable(
            f"{self.options.name}: {self.options.meter} was asked {_TRIES} times: {heard}; check address and speed",
            Reason.TIMEOUT,
        )

    async def _readout(self, wire: AnyWire) -> Readout:
        """All telegrams of the meter, or as many as the options want."""
        records: list[Record] = []
        secondary, status = "", None
        fcb = True
        first = b""
        for _ in range(self.options.telegrams or _MOST_TELEGRAMS):
            came = await self._asked(wire, link.request(self._address, fcb=fcb))
            fcb = not fcb
            at_ns = wire.at_ns
            body = came if isinstance(came, Reason) else self._body(came)
            if isinstance(body, Reason):
                return Readout(at_ns, secondary, status, tuple(records), body)
            if first and body.data == first:  # it has begun again
                return Readout(at_ns, secondary, status, tuple(records))
            first = first or body.data
            secondary, status = body.secondary or secondary, (status or 0) | body.status
            part = layout.records(body.data, len(records) + 1)
            records += part.records
            if part.broken:
                return Readout(at_ns, secondary, status, tuple(records), Reason.FRAMING)
            if not part.more:
                return Readout(at_ns, secondary, status, tuple(records))
        if self.options.telegrams:
            return Readout(wire.at_ns, secondary, status, tuple(records))
        self._tell_once(
            "telegrams",
            f"says after {_MOST_TELEGRAMS} telegrams that more follow; if it repeats itself, say with "
            "options.telegrams how many there are",
        )
        return Readout(wire.at_ns, secondary, status, tuple(records), Reason.FRAMING)

    async def _asked(self, wire: AnyWire, sent: bytes) -> Telegram | Reason:
        """The telegram that answers, or what is wrong with it. Raises `DeviceUnreachable`."""
        damaged: Reason | None = None
        for attempt in range(_TRIES):
            if attempt and damaged is not None:
                await wire.quiet(_BETWEEN_S, _AT_MOST_S)
            wire.forget()
            await wire.write(sent)
            try:
                heard = await wire.receive(
                    lambda heard: link.telegram_size(heard, sent),
                    first_s=self.options.timeout_s,
                    between_s=_BETWEEN_S,
                )
            except TimeoutError:
                # Only its echo came, or nothing, or the begin of something.
                damaged = Reason.FRAMING if len(wire.heard) > len(sent) else damaged
                continue
            came = link.telegram(heard, sent)
            if isinstance(came, Telegram) and not self._is_ours(came):
                came = Reason.FRAMING
            if isinstance(came, Telegram):
                return came
            damaged = came
        if damaged is None:
            raise self._silent(wire)
        return damaged

    def _is_ours(self, came: Telegram) -> bool:
        if self._wanted is None:
            return self._address == link.ANYBODY or came.address == self._address
        header = _header(came)
        return not isinstance(header, _Body) or not header.id or link.answers(self._wanted, header.id)

    def _body(self, came: Telegram) -> _Body | Reason:
        body = _header(came)
        if body is Reason.DECODE:
            self._tell_once(f"ci {came.ci}", f"answers in a form (CI {came.ci:02X}h) that is not read here")
        elif body is Reason.DECRYPT:
            self._tell_once("encrypted", "encrypts its telegrams, and such are not read here")
        return body

    def _tell_once(self, key: str, what: str) -> None:
        if key not in self._told:
            self._told.add(key)
            log.warning("device %r: %s %s", self.name, self.options.meter, what)

    # ---------------------------------------------------------------------------------------------------- the points

    def _scan(self, points: Sequence[MbusPoint], readout: Readout) -> Scan:
        values: list[Value | None] = []
        reasons: dict[int, Reason] = {}
        doubt, busy = _judged(readout.status or 0)
        for index, point in enumerate(points):
            result: Result
            if point.quantity == "status" and readout.status is not None:
                result = fit(readout.status, point.type)
            elif busy:
                result = Reason.BUSY
            else:
                result = self._result(point, readout)
                if not isinstance(result, Doubted):
                    result = flagged(result, doubt)
            if isinstance(result, Reason):
                reasons[index] = result
                values.append(None)
            elif isinstance(result, Doubted):
                reasons[index] = result.reason
                values.append(result.value)
            else:
                values.append(result)
        return Scan(readout.at_ns, tuple(points), values, reasons)

    def _result(self, point: MbusPoint, readout: Readout) -> Result:
        found = self._of(point, readout)
        if isinstance(found, Reason):
            return found
        if isinstance(found.content, Reason):
            return found.content
        if found.function == "error" and point.function != "error":
            return Reason.EXCEPTION
        value = self._value(point, found, found.content)
        return flagged(value, Reason.DEVICE_FAULT if found.flagged or found.function == "error" else None)

    def _of(self, point: MbusPoint, readout: Readout) -> Record | Reason:
        """The one record that a point is, or why there is none."""
        fitting = [
            record
            for record in readout.records
            if _at(point, record)
            and (not point.quantity or (record.quantity == point.quantity and record.plain))
            and (not point.vif or record.codes == self._codes[point.name])
        ]
        # A meter that cannot measure may send the value of its error state in the value's place.
        chosen = [record for record in fitting if record.function == point.function]
        if not chosen and (point.function != "error" or point.record is not None):
            chosen = [record for record in fitting if record.function == "error"]
        if not chosen:
            return readout.trouble or Reason.MISSING
        if len(chosen) > 1:
            listed = "; ".join(map(str, chosen[:8]))
            self._tell_once(
                f"several {point.name}",
                f"has {len(chosen)} records for point {point.name!r}: {listed}; name one by record, vif, storage, "
                "tariff or subunit",
            )
            return Reason.DECODE
        return chosen[0]

    def _value(self, point: MbusPoint, record: Record, content: float | str) -> Value | Reason:
        if isinstance(content, str):
            return content if point.type is ValueType.STR else Reason.DECODE
        if point.type is ValueType.STR:
            if record.unit:
                return Reason.DECODE
            return record.digits or str(content)
        size = layout.conversion(record, point.raw_unit)
        if size is None:
            self._tell_once(
                f"unit {point.name}",
                f"sends point {point.name!r} in {record.unit or 'no unit'}, which is not to be had in "
                f"{point.raw_unit!r}; set its unit (and with a scale, its device_unit)",
            )
            return Reason.DECODE
        exact = Fraction(content) * size
        real = not isinstance(content, int) and point.type in (ValueType.F32, ValueType.F64)
        if exact.denominator == 1 and not real:
            return fit(exact.numerator, point.type)
        if point.type not in (ValueType.F32, ValueType.F64):
            return Reason.DECODE
        try:
            return fit(float(exact), point.type)
        except OverflowError:
            return Reason.OVERFLOW


class _Body(msgspec.Struct, frozen=True):
    """A telegram's data behind its header."""

    id: bytes  #: secondary address; empty where the header has none
    status: int
    data: bytes

    @property
    def secondary(self) -> str:
        return link.secondary_text(self.id) if self.id else ""


#: Bytes of the header, by CI field: of data, and of an application error (EN 13757-7, table 2).
_HEADER: Final = {0x72: 12, 0x7A: 4, 0x78: 0}
_ERROR_HEADER: Final = {0x70: 0, 0x6E: 4, 0x6F: 12}


def _header(came: Telegram) -> _Body | Reason:
    """What stands behind the header, or why nothing does."""
    if came.ci in _ERROR_HEADER:
        code = came.data[_ERROR_HEADER[came.ci] :][:1]
        # 8: too busy to answer a readout, 9: too many readouts (m-bus.com/documentation-wired, 6.6)
        return Reason.BUSY if code in (b"\x08", b"\x09") else Reason.EXCEPTION
    size = _HEADER.get(came.ci)
    if size is None:
        return Reason.DECODE
    head, data = came.data[:size], came.data[size:]
    if len(head) < size:
        return Reason.FRAMING
    if size and head[-1] & 0x1F in _ENCRYPTED:
        return Reason.DECRYPT
    return _Body(head[:8] if size == 12 else b"", head[-3] if size else 0, data)


def _judged(status: int) -> tuple[Reason | None, bool]:
    """What the status byte says of all values: a doubt, and whether the meter was too busy
    (m-bus.com/documentation-wired, 6.2; EN 13757-7, table 6). An alarm and a low battery are no doubt."""
    doubt = Reason.DEVICE_DOUBT if status & 3 == 2 or status & 0x18 else None
    return doubt, status & 3 == 1


def _at(point: MbusPoint, record: Record) -> bool:
    """Does the record stand where the point says?"""
    if point.record is not None and record.number != point.record:
        return False
    for wanted, here in (
        (point.storage, record.storage),
        (point.tariff, record.tariff),
        (point.subunit, record.subunit),
    ):
        if wanted is None and point.record is not None:
            continue
        if (wanted or 0) != here:
            return False
    return True


# ----------------------------------------------------------------------------------------------------- configuration


def _refuse_bad_options(options: MbusOptions) -> None:
    if bool(options.port) == bool(options.host):
        raise ConfigError(
            "options: name a port of this gateway or the host of a serial gateway, one of the two"
        )
    if options.port:
        refuse_bad_name(options.port)
    if options.baud not in _BAUD:
        raise ConfigError(f"options.baud is {options.baud}; M-Bus has {', '.join(map(str, _BAUD))}")
    if not 0 <= options.telegrams <= _MOST_TELEGRAMS:
        raise ConfigError(f"options.telegrams is {options.telegrams}; allowed is 0 to {_MOST_TELEGRAMS}")
    if not 1 <= options.tcp_port <= 65_535:
        raise ConfigError(f"options.tcp_port is {options.tcp_port}; allowed is 1 to 65535")
    if options.reply_timeout_ms is not None and not 20 <= options.reply_timeout_ms <= 60_000:
        raise ConfigError(f"options.reply_timeout_ms is {options.reply_timeout_ms}; allowed is 20 to 60000")
    if (options.address is None) == (not options.secondary):
        raise ConfigError("options: name the meter's address or its secondary address, one of the two")
    if options.address is not None and not (0 <= options.address <= 250 or options.address == link.ANYBODY):
        raise ConfigError(
            f"options.address is {options.address}; allowed is 0 to 250, and 254 for a meter that is alone"
        )
    if options.secondary and link.secondary(options.secondary) is None:
        raise ConfigError(
            f"options.secondary is {options.secondary!r}; it is 8 digits of the identification (F: any), or 16 with "
            "manufacturer, version and medium in hexadecimal as the bus carries them (FF: any)"
        )


def _refuse_bad_point(point: MbusPoint) -> None:
    where = f"point {point.name!r}"
    if point.quantity == "status":
        if point.vif or point.record is not None:
            raise ConfigError(f"{where}: the status stands in the header, and no record is named for it")
        return
    if point.quantity and point.quantity not in QUANTITIES:
        raise ConfigError(
            f"{where}: unknown quantity {point.quantity!r}{nearest(point.quantity, [*QUANTITIES, 'status'])}"
        )
    if not (point.quantity or point.vif or point.record is not None):
        raise ConfigError(f'{where}: names no record; write quantity = "energy", a vif, or record = 1')
    if point.quantity and point.vif:
        raise ConfigError(f"{where}: has both quantity and vif; the vif alone says it")
    for key, value, most in (
        ("record", point.record, 4_000),
        ("storage", point.storage, (1 << 41) - 1),  # 1 bit of the DIF, 4 of each of 10 DIFEs
        ("tariff", point.tariff, (1 << 20) - 1),
        ("subunit", point.subunit, (1 << 10) - 1),
    ):
        if value is not None and not (key == "record") <= value <= most:
            raise ConfigError(f"{where}: {key} is {value}; allowed is {int(key == 'record')} to {most}")
    if point.vif:
        try:
            codes = bytes.fromhex(point.vif)
        except ValueError:
            codes = b""
        if not 1 <= len(codes) <= 11:
            raise ConfigError(
                f'{where}: vif is {point.vif!r}; write its bytes in hexadecimal, as in "13" or "FD 48"'
            )
    if point.scale != 1.0 and not point.device_unit and QUANTITIES.get(point.quantity, ""):
        raise ConfigError(
            f"{where}: has a scale; say with device_unit what unit the value has before it (without a scale the value "
            "comes in the point's own unit, and none is needed)"
        )
    dimension = QUANTITIES.get(point.quantity, "") if point.quantity else ""
    unit = layout.plain_unit(point.raw_unit)
    if dimension and unit and UNITS.get(unit, ("",))[0] != dimension:
        known = [name for name, (kind, _) in UNITS.items() if kind in (dimension, dimension + "_f")]
        if unit not in known:
            raise ConfigError(
                f"{where}: {point.quantity} cannot be had in {unit!r}; it is in {', '.join(known)}"
            )
