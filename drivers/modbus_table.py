"""What a Modbus device's table in the configuration may say, and what is refused there. No IO but resolving a port's
name.

Registers are numbered as the protocol does, from 0: a manual's "40001" is `table = "holding"`, `register = 0`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Final, Literal

import msgspec

from drivers import codec
from drivers.codec import Encoding
from drivers.contract import ConfigError, Point, ValueType
from drivers.modbus_address import Address, HostPort, SerialPort
from drivers.modbus_plan import LAST_ADDRESS, MAX_BITS, MAX_REGISTERS, Limits, Span, Table
from drivers.serial_port import refuse_bad_name

_BROADCAST: Final = 0  #: Modbus over serial line 1.02, 2.2: nobody answers there
_REGISTER_BITS: Final = 16
_RTU_DATA_BITS: Final = 8
_ASCII_DATA_BITS: Final = 7

Address16 = Annotated[int, msgspec.Meta(ge=0, le=LAST_ADDRESS)]
Baud = Annotated[int, msgspec.Meta(ge=1, le=12_000_000)]
"""Up to what the fastest USB adapters do (FTDI's FT232H)."""
Wait = Annotated[int, msgspec.Meta(ge=1, le=60_000)]
"""Milliseconds. A poller waits for no read longer than half a minute."""
Range = tuple[Address16, Address16]
"""First and last address, both within."""


class Forbidden(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What must not be read, not even on the way to something else."""

    holding: tuple[Range, ...] = ()
    input: tuple[Range, ...] = ()
    coil: tuple[Range, ...] = ()
    discrete: tuple[Range, ...] = ()

    def spans(self) -> Iterator[Span]:
        """Raises `ConfigError`."""
        for table in Table:
            ranges: tuple[Range, ...] = getattr(self, table)
            for first, last in ranges:
                if last < first:
                    raise ConfigError(
                        f"options.forbidden.{table}: [{first}, {last}] ends before it begins; give [first, last]"
                    )
                yield Span(table, first, last - first + 1)


class ModbusOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`host` for a network, `serial` for a port of this machine: one of the two."""

    host: str | None = None
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 502
    serial: str | None = None
    baud: Baud = 19200  #: 19200 8E1: the standard's own default (Modbus over serial line 1.02, 2.5.1)
    parity: Literal["none", "even", "odd"] = "even"
    stop_bits: Literal[1, 2] = 1
    data_bits: Literal[7, 8] | None = None  #: unset: 8; ASCII 7, its standard's own default (same, 2.5.2)
    framing: Literal["tcp", "udp", "rtu", "ascii", "rtu_over_tcp", "ascii_over_tcp"] | None = (
        None  #: unset: tcp with a host, rtu on a serial port
    )
    unit: Annotated[int, msgspec.Meta(ge=0, le=255)] = 1
    timeout_ms: Wait | None = (
        None  #: for one request; unset: 1000 on a network, by baud and length on a serial line
    )
    latest_reply_ms: Wait | None = None  #: RTU, ASCII: no reply comes later; unset: twice the timeout
    connect_timeout_ms: Wait = 3000
    max_registers: Annotated[int, msgspec.Meta(ge=1, le=MAX_REGISTERS)] = MAX_REGISTERS
    max_bits: Annotated[int, msgspec.Meta(ge=1, le=MAX_BITS)] = MAX_BITS
    max_gap: Annotated[int, msgspec.Meta(ge=0, le=MAX_REGISTERS)] | None = None  #: unset: by the line's cost
    forbidden: Forbidden = Forbidden()
    order: str = "ABCD"  #: of points that do not say their own
    write_single: bool = True  #: functions 5 and 6 for one coil or register; else 15 and 16
    write_bits: Literal["mask", "rewrite"] | None = (
        None  #: how a part of a register is written: function 22, or read, change, write; unset: not at all
    )


class ModbusPoint(Point, frozen=True, kw_only=True):
    """A value in one of the device's four tables."""

    register: Address16  #: from 0, as on the wire; in a table of bits: the coil's or input's number
    table: Table = Table.HOLDING
    type: ValueType = ValueType.U16  #: as it travels; in a table of bits, and with `bit` alone: always a bool
    encoding: Encoding | None = None  #: how the registers hold it, where not simply as `type`
    order: str | None = None
    bit: Annotated[int, msgspec.Meta(ge=0, le=31)] | None = None  #: of the register, 0 the lowest
    bits: Annotated[int, msgspec.Meta(ge=1, le=32)] | None = None  #: of a bit-field, from `bit` up
    length: Annotated[int, msgspec.Meta(ge=1, le=2 * MAX_REGISTERS)] | None = None  #: of a str: its bytes
    scale_register: Address16 | None = None  #: holds an exponent of 10 (i16), as SunSpec's scale factors do
    decimals_register: Address16 | None = None  #: holds how many decimals the number has: 235 with 1 is 23.5
    register_not_available: tuple[int, ...] = ()  #: `not_available` of a point with one of these two
    utc_offset_min: Annotated[int, msgspec.Meta(ge=-1440, le=1440)] = 0  #: of a moment: its clock less UTC
    overlap: bool = False  #: it shares registers with another point, and that is meant
    writable: bool = False
    read_back: bool = True  #: of a written point; false for a command register that reads otherwise

    @property
    def exponent_register(self) -> int | None:
        """The register that its number is not known without."""
        return self.decimals_register if self.scale_register is None else self.scale_register

    def __post_init__(self) -> None:
        put = msgspec.structs.force_setattr
        if self.scale_register is not None and self.decimals_register is not None:
            raise ValueError("decimals_register: a number has either a scale_register or a decimals_register")
        if self.type is ValueType.U16:
            if self.table.of_bits or (self.bit is not None and self.bits is None):
                put(self, "type", ValueType.BOOL)
            elif self.exponent_register is not None:
                put(self, "type", ValueType.F64)
            elif self.encoding in codec.INSTANTS:
                put(self, "type", ValueType.I64)
            elif self.bits is not None and self.bits > _REGISTER_BITS:
                put(self, "type", ValueType.U32)
        if self.exponent_register is not None and self.not_available:
            # What the registers hold for "no value" is told before it is scaled, and judged there.
            if any(number != int(number) for number in self.not_available):
                raise ValueError(
                    "not_available: with a scale_register or decimals_register, whole numbers as registers hold them"
                )
            put(self, "register_not_available", (*self.register_not_available, *map(int, self.not_available)))
            put(self, "not_available", ())


def limits_of(options: ModbusOptions) -> Limits:
    """What one request may ask for. Raises `ConfigError`."""
    return Limits(
        max_registers=options.max_registers,
        max_bits=options.max_bits,
        max_gap=options.max_gap,
        forbidden=tuple(options.forbidden.spans()),
    )


def address_of(options: ModbusOptions) -> Address:
    """The line that the device is on. Raises `ConfigError`."""
    if (options.host is None) == (options.serial is None):
        raise ConfigError("options: give either host (Modbus TCP) or serial (a port such as /dev/ttyUSB0)")
    if options.serial is not None:
        refuse_bad_name(options.serial, "serial")
    else:
        _refuse_bad_host(options.host or "")
    timeout_ms, latest_ms = options.timeout_ms, options.latest_reply_ms
    if timeout_ms is not None and latest_ms is not None and latest_ms < timeout_ms:
        raise ConfigError(
            f"options: latest_reply_ms: {latest_ms} is before timeout_ms, {timeout_ms}; make it longer, or the "
            "timeout shorter"
        )
    framing = options.framing
    address: Address
    if options.serial is not None:
        if framing is None or framing == "rtu":
            if options.data_bits == _ASCII_DATA_BITS:
                raise ConfigError(
                    "options: data_bits: RTU needs 8, its bytes use all of them; 7 is for ASCII"
                )
            framing = "rtu"
        elif framing != "ascii":
            raise ConfigError(f"options: framing {framing!r} needs a host; a serial port speaks rtu or ascii")
        data_bits = options.data_bits or (_ASCII_DATA_BITS if framing == "ascii" else _RTU_DATA_BITS)
        parity = options.parity[0].upper()
        address = SerialPort(options.serial, options.baud, parity, options.stop_bits, data_bits, framing)
    else:
        assert options.host is not None  # noqa: S101 - one of the two, as just checked
        if framing == "rtu" or framing == "ascii":
            raise ConfigError(
                f"options: framing {framing!r} needs serial; for a serial line behind a host: '{framing}_over_tcp'"
            )
        address = HostPort(options.host, options.port, framing or "tcp")
    if options.unit == _BROADCAST and not (isinstance(address, HostPort) and address.has_transactions):
        raise ConfigError(
            "options: unit: 0 is everybody's address on a serial line, and nobody answers there; give the unit's own"
        )
    return address


def _refuse_bad_host(host: str) -> None:
    name, colon, port = host.partition(":")
    if name and colon and port.isdecimal():
        raise ConfigError(f"options: host: give the port apart: host = {name!r}, port = {port}")
    if not host or set(host) & set("/ \t\n"):
        raise ConfigError(f"options: host: {host!r} is no name or address; give it alone, as in '192.0.2.10'")


def span_of(point: ModbusPoint) -> Span:
    """The addresses that its value occupies (the register of its exponent apart)."""
    count = 1 if point.table.of_bits else field_of(point, "ABCD").registers
    return Span(point.table, point.register, count)


def field_of(point: ModbusPoint, order: str) -> codec.Field:
    """Its field, with `at` counted from register 0; `order` where it has none of its own."""
    return codec.Field(
        at=2 * point.register,
        type=point.type,
        order=point.order or order,
        encoding=point.encoding,
        bit=point.bit,
        bits=point.bits,
        length=point.length or 0,
        scale_at=None if point.exponent_register is None else 2 * point.exponent_register,
        decimals=point.decimals_register is not None,
        not_available=point.register_not_available,
        utc_offset_min=point.utc_offset_min,
    )


def hull(span: Span, address: int) -> Span:
    """The span, up to an address beside it."""
    first, end = min(span.first, address), max(span.end, address + 1)
    return Span(span.table, first, end - first)


def what_is_wrong(point: ModbusPoint, order: str, limits: Limits) -> str | None:
    """Why no request can ever read it, beginning with the key to change; `None` where one can."""
    if point.table.of_bits:
        if point.type is not ValueType.BOOL:
            return f"type: a {point.table} is a bool, not {point.type}"
        for key in ("bit", "bits", "length", "encoding", "scale_register", "decimals_register"):
            if getattr(point, key) is not None:
                return f"{key}: a {point.table} is one bit already; remove it"
    else:
        wrong = codec.what_is_wrong(field_of(point, order))
        if wrong is not None:
            return (
                wrong
                if point.decimals_register is None
                else wrong.replace("scale_register", "decimals_register")
            )
        if point.type is not ValueType.STR and point.length is not None and point.encoding is None:
            return "length: needed by a str, and only there; remove it"
    exponent = point.exponent_register
    if point.type is ValueType.STR and point.order not in (None, "AB", "BA", "ABCD", "CDAB", "BADC", "DCBA"):
        return (
            f"order: text has no word order: {point.order!r} is not valid (valid: ABCD, BADC: bytes swapped)"
        )
    if point.register_not_available and exponent is None:
        return "register_not_available: only with a scale_register or decimals_register; say not_available"
    if point.writable and point.table in (Table.INPUT, Table.DISCRETE):
        return f"writable: the {point.table} table is read only; remove it, or see whether it is in another table"
    span = span_of(point)
    if span.end - 1 > LAST_ADDRESS:
        return f"register: {point.register} and {span.count - 1} more go beyond {LAST_ADDRESS}"
    longest = limits.longest(point.table)
    if span.count > longest:
        key = "length" if point.length else "type"
        return (
            f"{key}: it takes {span.count} registers, and max_registers is {longest}; a value is never read in "
            "parts: give it its right size, or raise max_registers if the device allows it"
        )
    spans = [span]
    if exponent is not None:
        if span.first <= exponent < span.end:
            key = "scale_register" if point.decimals_register is None else "decimals_register"
            return f"{key}: lies within the value itself"
        spans.append(Span(point.table, exponent))
    for each in spans:
        range_ = limits.forbids(each)
        if range_ is not None:
            return (
                f"register: {_words(each)} touches options.forbidden.{point.table} "
                f"[{range_.first}, {range_.end - 1}]; remove the point or the range"
            )
    return None


def _words(span: Span) -> str:
    return f"{span.first}" if span.count == 1 else f"{span.first}-{span.end - 1}"


def check_overlaps(points: Sequence[ModbusPoint]) -> None:
    """Two points on the very same registers are two views of them, and so is a bit or a bit-field of another point's
    register. All else that shares a register is a slip in the table. Raises `ConfigError`."""
    spans = [span_of(point) for point in points]
    views = [point.overlap or point.bit is not None or point.table.of_bits for point in points]
    plain = [i for i, view in enumerate(views) if not view]
    reach: int | None = None  # the one before that reaches farthest
    for i in sorted(plain, key=lambda i: (spans[i].table, spans[i].first, spans[i].count)):
        span = spans[i]
        if reach is not None and spans[reach].table is span.table:
            theirs = spans[reach]
            if theirs.end > span.first and theirs != span:
                one, two = sorted((i, reach))
                first = max(span.first, theirs.first)
                shared = Span(span.table, first, min(span.end, theirs.end) - first)
                raise ConfigError(
                    f"point {points[two].name!r}: register: shares {_words(shared)} with point "
                    f"{points[one].name!r} ({points[one].type} at {points[one].register}); correct the register or "
                    "the type of one, or, if that is meant, say overlap = true"
                )
            if span.end <= theirs.end:
                continue
        reach = i
