"""Modbus TCP, RTU, and RTU over TCP.

Rules:

1. Points are read in blocks (`drivers.modbus_plan`) over the line's one owner (`drivers.modbus_line`) and decoded a
   block at a time (`drivers.codec`).
2. A block that fails makes its own points bad, with the reason; all others are good. Only a device that answered
   nothing at all is unreachable.
3. A block that the device refuses (exceptions 2 and 3: address or quantity) is halved until the refused values stand
   alone. Those stay bad as REFUSED and are not asked for again until the next `connect`.
4. An exception (a busy device too) is never a 0.

Registers are numbered as the protocol does, from 0: a manual's "40001" is `table = "holding"`, `register = 0`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import is_
from typing import Annotated, ClassVar, Final, Literal

import msgspec
from pymodbus.constants import ExcCodes
from pymodbus.pdu import ModbusPDU, ReadCoilsRequest, ReadHoldingRegistersRequest
from pymodbus.pdu.bit_message import ReadDiscreteInputsRequest, WriteSingleCoilRequest
from pymodbus.pdu.register_message import (
    ReadInputRegistersRequest,
    WriteMultipleRegistersRequest,
    WriteSingleRegisterRequest,
)

from drivers import codec, modbus_plan
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
from drivers.modbus_line import Address, Failure, HostPort, Line, Replies, Reply, Request, SerialPort, line_of
from drivers.modbus_plan import LAST_ADDRESS, MAX_BITS, MAX_REGISTERS, Block, Limits, Span, Table

_TCP_TIMEOUT_MS: Final = 1000
_TURNAROUND_S: Final = 0.3  #: what a serial device may take to begin its answer; most need under 0.1
_RTU_OVERHEAD: Final = 5  #: bytes of an RTU reply beside its data: unit, function, byte count, CRC
_MOST_SILENT: Final = 2  #: this many requests in a row without any answer, and the device is unreachable
_NARROWED_BY: Final = (ExcCodes.ILLEGAL_ADDRESS, ExcCodes.ILLEGAL_VALUE)
_BEHIND_GATEWAY: Final = (ExcCodes.GATEWAY_PATH_UNAVIABLE, ExcCodes.GATEWAY_NO_RESPONSE)

Address16 = Annotated[int, msgspec.Meta(ge=0, le=LAST_ADDRESS)]
Positive = Annotated[int, msgspec.Meta(ge=1)]


class ModbusOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`host` for TCP, `serial` for a port of this machine: one of the two."""

    host: str | None = None
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 502
    serial: str | None = None
    baud: Positive = 19200  #: 19200 8E1: the standard's own default (Modbus over serial line 1.02, 2.5.1)
    parity: Literal["none", "even", "odd"] = "even"
    stop_bits: Literal[1, 2] = 1
    framing: Literal["tcp", "rtu", "rtu_over_tcp"] | None = (
        None  #: unset: tcp with a host, rtu on a serial port
    )
    unit: Annotated[int, msgspec.Meta(ge=0, le=255)] = 1
    timeout_ms: Positive | None = (
        None  #: for one request; unset: 1000 on TCP, by baud and length on a serial line
    )
    latest_reply_ms: Positive | None = None  #: RTU: no reply comes later than this; unset: twice the timeout
    connect_timeout_ms: Positive = 3000
    max_registers: Annotated[int, msgspec.Meta(ge=1, le=MAX_REGISTERS)] = MAX_REGISTERS
    max_bits: Annotated[int, msgspec.Meta(ge=1, le=MAX_BITS)] = MAX_BITS
    max_gap: Annotated[int, msgspec.Meta(ge=0, le=MAX_REGISTERS)] = 32
    order: str = "ABCD"  #: of points that do not say their own


class ModbusPoint(Point, frozen=True, kw_only=True):
    """A value in one of the device's four tables."""

    register: Address16  #: from 0, as on the wire; in a table of bits: the coil's or input's number
    table: Table = Table.HOLDING
    type: ValueType = ValueType.U16  #: in a table of bits, and with `bit`: always a bool
    order: str | None = None
    bit: Annotated[int, msgspec.Meta(ge=0, le=15)] | None = None  #: of the register, 0 the lowest
    length: Annotated[int, msgspec.Meta(ge=1, le=2 * MAX_REGISTERS)] | None = None  #: of a str: its bytes

    def __post_init__(self) -> None:
        if (self.table.of_bits or self.bit is not None) and self.type is ValueType.U16:
            msgspec.structs.force_setattr(self, "type", ValueType.BOOL)


class _Work(msgspec.Struct, frozen=True):
    """A block with all that asking and decoding it takes."""

    block: Block
    request: Request
    decoder: codec.RegisterDecoder | codec.BitDecoder
    begin: int  #: where its values go: from here on, if `together`
    together: bool


class _Asked(msgspec.Struct):
    """The points of a `read`, and the work they make."""

    points: tuple[ModbusPoint, ...]
    spans: list[Span]
    works: list[_Work]
    requests: list[Request]
    refused: set[int]
    halved: bool = False  #: and not yet joined again
    settled: bool = False  #: halved once, joined again around what is refused: from now on it stays as it is


class ModbusDriver(Driver[ModbusOptions, ModbusPoint]):
    """One unit on a Modbus line."""

    options_type: ClassVar[type[msgspec.Struct]] = ModbusOptions
    point_type: ClassVar[type[Point]] = ModbusPoint

    def __init__(self, name: str, options: ModbusOptions, points: Sequence[ModbusPoint]) -> None:
        super().__init__(name, options, points)
        self._address = _address_of(options)
        self._limits = Limits(
            max_registers=options.max_registers, max_bits=options.max_bits, max_gap=options.max_gap
        )
        self._line: Line | None = None
        self._turn = 0
        self._asked = self._ask(self.points)

    async def connect(self) -> None:
        if self._line is None:
            self._line = line_of(self._address, self.name)
        await self._line.open(self.options.connect_timeout_ms / 1000)
        # Perhaps another device stands there now: ask it everything again.
        self._asked = self._ask(self._asked.points)

    async def close(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            line.release(self.name)

    async def read(self, points: Sequence[ModbusPoint]) -> Scan:
        asked = self._asked
        if points is not asked.points and not _the_same(points, asked.points):
            asked = self._asked = self._ask(tuple(points))
        line = self._line
        if line is None:
            raise DeviceUnreachable("not connected")
        if len(asked.works) == 1 and not asked.refused:
            # The usual case, and the one that has to be fast: one request holds all points.
            work = asked.works[0]
            outcome = await line.exchange(asked.requests)
            reply = outcome.replies[0]
            if type(reply) is bytes and work.together:
                values, reasons = work.decoder.decode(reply)
                return Scan(outcome.taken_at_ns, asked.points, values, reasons or {})
            return await self._read_blocks(line, asked, outcome)
        return await self._read_blocks(line, asked, None)

    async def write(self, point: ModbusPoint, value: Value) -> None:
        line = self._line
        if line is None:
            raise DeviceUnreachable("not connected")
        try:
            pdu, expected = self._writing(point, value)
        except ValueError as err:
            raise PointRefused(point.name, str(err)) from err
        _accepted(point, await self._ask_one(line, self._request(pdu, *_echo_of(pdu))))
        span = _span_of(point)
        reading = self._request(*_reading(span.table, span.first, span.count))
        found = _accepted(point, await self._ask_one(line, reading))
        if span.table.of_bits:
            found = bytes([found[0] & 1])  # the rest of the byte is padding
        if found[: len(expected)] != expected:
            raise PointRefused(point.name, f"wrote {value!r}, but it reads back as {found.hex(' ')}")

    # ------------------------------------------------------------------------------------ reading

    async def _read_blocks(self, line: Line, asked: _Asked, first: Replies | None) -> Scan:
        """`first` is what has been asked of the only block already."""
        values: list[Value | None] = [None] * len(asked.points)
        reasons: dict[int, Reason] = dict.fromkeys(asked.refused, Reason.REFUSED)
        turn = self._turn % max(1, len(asked.works))
        queue = asked.works[turn:] + asked.works[:turn]
        answers = silent = 0
        failures: list[Failure] = []
        taken_at_ns = 0
        while queue:
            try:
                outcome, first = first or await line.exchange([work.request for work in queue]), None
            except DeviceUnreachable as err:
                if not answers:
                    raise
                # The line was lost half-way: what came before is good and is kept.
                for work in queue:
                    reasons.update(dict.fromkeys(work.block.members, err.reason))
                break
            taken_at_ns = max(taken_at_ns, outcome.taken_at_ns)
            done, queue = queue[: len(outcome.replies)], queue[len(outcome.replies) :]
            for work, reply in zip(done, outcome.replies, strict=True):
                if isinstance(reply, bytes):
                    answers += 1
                    _place(work, reply, values, reasons)
                    continue
                if reply.code in _NARROWED_BY:
                    answers += 1
                    parts = self._narrowed(asked, work, reply)
                    queue = [*parts, *queue]
                    if parts:
                        continue
                    reason = Reason.REFUSED if reply.code == ExcCodes.ILLEGAL_ADDRESS else Reason.EXCEPTION
                else:
                    reason = reply.reason
                    failures.append(reply)
                reasons.update(dict.fromkeys(work.block.members, reason))
                silent += reason is Reason.TIMEOUT
                if not answers and silent == len(failures) >= _MOST_SILENT:
                    break
            else:
                continue
            break
        self._judge(line, answers, failures)
        if asked.halved:
            self._settle(asked)
        return Scan(taken_at_ns or boot_ns(), asked.points, values, reasons)

    def _judge(self, line: Line, answers: int, failures: Sequence[Failure]) -> None:
        """Raise `DeviceUnreachable` if nothing was an answer of this device."""
        if answers or not failures:
            return
        if all(f.reason in (Reason.TIMEOUT, Reason.DISCONNECTED) for f in failures):
            # Next time begin elsewhere: some devices are silent about addresses they do not have.
            self._turn += len(failures)
            raise DeviceUnreachable(
                f"{line.address}: unit {self.options.unit} does not answer", failures[-1].reason
            )
        if all(f.code in _BEHIND_GATEWAY for f in failures):
            raise DeviceUnreachable(
                f"{line.address}: the gateway does not reach unit {self.options.unit} "
                f"({_words(failures[-1].code)})",
                Reason.EXCEPTION,
            )

    def _narrowed(self, asked: _Asked, work: _Work, refusal: Failure) -> list[_Work]:
        """The halves to ask instead, in the plan from now on; or none, and the block's values are refused."""
        at = asked.works.index(work)
        try:
            blocks = modbus_plan.halves(asked.spans, self._limits, work.block)
        except ValueError:
            if refusal.code != ExcCodes.ILLEGAL_ADDRESS:
                return []
            asked.refused.update(work.block.members)
            blocks = ()
        parts = [self._work(asked.points, asked.spans, block) for block in blocks]
        asked.halved = True
        asked.works[at : at + 1] = parts
        asked.requests = [each.request for each in asked.works]
        return parts

    def _settle(self, asked: _Asked) -> None:
        """Join the halves again around what is refused, once: if that is refused in its turn, a hole is, and the
        narrow blocks stay."""
        asked.halved = False
        if asked.settled:
            return
        asked.settled = True
        lost = [asked.spans[i] for i in asked.refused]
        avoid = {(span.table, address) for span in lost for address in range(span.first, span.end)}
        members = [i for i in range(len(asked.points)) if i not in asked.refused]
        blocks = modbus_plan.plan(asked.spans, self._limits, members=members, avoid=avoid)
        asked.works = [self._work(asked.points, asked.spans, block) for block in blocks]
        asked.requests = [work.request for work in asked.works]

    # ------------------------------------------------------------------------------------ planning

    def _ask(self, points: tuple[ModbusPoint, ...]) -> _Asked:
        """Raises `ConfigError` for a point that no request can read."""
        spans = [_span_of(point) for point in points]
        for point, span in zip(points, spans, strict=True):
            self._check(point, span)
        blocks = modbus_plan.plan(spans, self._limits)
        works = [self._work(points, spans, block) for block in blocks]
        return _Asked(points, spans, works, [work.request for work in works], set())

    def _check(self, point: ModbusPoint, span: Span) -> None:
        wrong = _what_is_wrong(point, span, self._limits)
        if wrong is None and not span.table.of_bits:
            try:
                codec.RegisterDecoder([self._field(point, span.first)])
            except ValueError as err:
                wrong = str(err)
        if wrong is not None:
            raise ConfigError(f"point {point.name!r}: {wrong}")

    def _field(self, point: ModbusPoint, first: int) -> codec.Field:
        return codec.Field(
            at=2 * (point.register - first),
            type=point.type,
            order=point.order or self.options.order,
            bit=point.bit,
            length=point.length or 0,
        )

    def _work(self, points: Sequence[ModbusPoint], spans: Sequence[Span], block: Block) -> _Work:
        members = block.members
        decoder: codec.RegisterDecoder | codec.BitDecoder
        if block.table.of_bits:
            decoder = codec.BitDecoder([spans[i].first - block.first for i in members])
        else:
            decoder = codec.RegisterDecoder([self._field(points[i], block.first) for i in members])
        together = members == tuple(range(members[0], members[-1] + 1))
        request = self._request(*_reading(block.table, block.first, block.count))
        return _Work(block, request, decoder, members[0], together)

    def _request(self, pdu: bytes, reply_head: bytes, reply_size: int) -> Request:
        timeout_s = self._timeout_s(len(pdu), reply_size)
        latest_ms = self.options.latest_reply_ms
        latest_s = max(timeout_s, latest_ms / 1000) if latest_ms else 2 * timeout_s
        return Request(self.options.unit, pdu, reply_head, reply_size, timeout_s, latest_s)

    def _timeout_s(self, sent: int, expected: int) -> float:
        if self.options.timeout_ms is not None:
            return self.options.timeout_ms / 1000
        if not isinstance(self._address, SerialPort):
            return _TCP_TIMEOUT_MS / 1000
        characters = sent + expected + 2 * _RTU_OVERHEAD + 2 * 3.5  # two frames, each after its silence
        return _TURNAROUND_S + characters * self._address.character_s

    # ------------------------------------------------------------------------------------ writing

    async def _ask_one(self, line: Line, request: Request) -> Reply:
        return (await line.exchange([request])).replies[0]

    def _writing(self, point: ModbusPoint, value: Value) -> tuple[bytes, bytes]:
        """The request's PDU, and the data bytes that reading it back must show. Raises `ValueError`."""
        if point.table is Table.COIL:
            if not isinstance(value, bool):
                raise ValueError(f"{value!r} is not true or false")
            return _pdu(WriteSingleCoilRequest(address=point.register, bits=[value])), bytes([value])
        if point.table is not Table.HOLDING:
            raise ValueError(f"a {point.table} is read only")
        data = codec.encode(value, self._field(point, point.register))
        registers = [int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2)]
        kind = WriteSingleRegisterRequest if len(registers) == 1 else WriteMultipleRegistersRequest
        return _pdu(kind(address=point.register, registers=registers)), data


def _the_same(points: Sequence[ModbusPoint], others: Sequence[ModbusPoint]) -> bool:
    return len(points) == len(others) and all(map(is_, points, others))


def _place(work: _Work, reply: bytes, values: list[Value | None], reasons: dict[int, Reason]) -> None:
    decoded, doubts = work.decoder.decode(reply)
    members = work.block.members
    if work.together:
        values[work.begin : work.begin + len(members)] = decoded
    else:
        for i, value in zip(members, decoded, strict=True):
            values[i] = value
    if doubts:
        reasons.update((members[i], reason) for i, reason in doubts.items())


def _address_of(options: ModbusOptions) -> Address:
    """Raises `ConfigError`."""
    if (options.host is None) == (options.serial is None):
        raise ConfigError("options: give either host (Modbus TCP) or serial (a port such as /dev/ttyUSB0)")
    if options.serial is not None:
        if options.framing not in (None, "rtu"):
            raise ConfigError(f"options: framing {options.framing!r} needs a host; a serial port speaks rtu")
        return SerialPort(options.serial, options.baud, options.parity[0].upper(), options.stop_bits)
    if options.framing == "rtu":
        raise ConfigError(
            "options: framing 'rtu' needs serial; for a serial line behind a host: 'rtu_over_tcp'"
        )
    assert options.host is not None  # noqa: S101 - one of the two, as just checked
    return HostPort(options.host, options.port, options.framing or "tcp")


def _span_of(point: ModbusPoint) -> Span:
    count = 1 if point.table.of_bits else codec.registers_of(point.type, point.length or 1)
    return Span(point.table, point.register, count)


def _what_is_wrong(point: ModbusPoint, span: Span, limits: Limits) -> str | None:
    if point.table.of_bits:
        if point.type is not ValueType.BOOL:
            return f"a {point.table} is a bool, not {point.type}"
        if point.bit is not None:
            return f"bit: a {point.table} is one bit already"
    elif point.type is ValueType.BOOL and point.bit is None:
        return "bit: say which bit of the register it is (0 the lowest, 15 the highest)"
    elif point.bit is not None and point.type is not ValueType.BOOL:
        return f"bit: one bit is a bool, not {point.type}"
    if (point.type is ValueType.STR) != (point.length is not None):
        return "length: needed by a str, and only there"
    if span.end - 1 > LAST_ADDRESS:
        return f"register: {point.register} and {span.count - 1} more go beyond {LAST_ADDRESS}"
    longest = limits.of(point.table)[0]
    if span.count > longest:
        return f"takes {span.count} registers, and max_registers is {longest}"
    return None


def _reading(table: Table, first: int, count: int) -> tuple[bytes, bytes, int]:
    """A read's PDU, the head of its reply, and the reply's size."""
    pdu = _pdu(_READS[table](address=first, count=count))
    data = (count + 7) // 8 if table.of_bits else 2 * count
    return pdu, bytes([pdu[0], data]), 2 + data


def _echo_of(pdu: bytes) -> tuple[bytes, int]:
    """A write is confirmed by its function, address, and value (5, 6) or quantity (16): its own first five bytes."""
    return pdu[:5], 5


def _pdu(request: ModbusPDU) -> bytes:
    return bytes([request.function_code]) + request.encode()


def _accepted(point: ModbusPoint, reply: Reply) -> bytes:
    if isinstance(reply, bytes):
        return reply
    if reply.code:
        raise PointRefused(point.name, f"the device refuses: {_words(reply.code)}")
    raise DeviceUnreachable(f"{point.name}: no answer ({reply.reason.name})", reply.reason)


def _words(code: int) -> str:
    known: Iterable[int] = list(ExcCodes)
    name = ExcCodes(code).name.lower().replace("_", " ") if code in known else "unknown"
    return f"exception {code}, {name}"


_READS: Final[dict[Table, type[ModbusPDU]]] = {
    Table.HOLDING: ReadHoldingRegistersRequest,
    Table.INPUT: ReadInputRegistersRequest,
    Table.COIL: ReadCoilsRequest,
    Table.DISCRETE: ReadDiscreteInputsRequest,
}
