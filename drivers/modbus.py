"""Modbus over TCP, UDP and serial lines (RTU, ASCII), also behind transparent gateways.

Rules:

1. Points are read in blocks (`drivers.modbus_plan`) over the line's one owner (`drivers.modbus_line`) and decoded a
   block at a time (`drivers.codec`).
2. A block that fails makes its own points bad, with the reason; all others are good. Only a device that answered
   nothing at all is unreachable.
3. A block that the device refuses (exceptions 2 and 3: address or quantity) is halved once, until what is refused
   stands alone. That is remembered, over connects and restarts, and tried again now and then
   (`drivers.modbus_learnt`). A block that stays unanswered, or fails in another way, while others of the device are
   fine is divided too, a cut each few reads.
4. An exception (a busy device too) is never a 0.
5. A write has one effect. It is checked before it is sent, sent once, and read back; where no confirmation came, what
   reads back tells whether it took effect, and it is not sent again.

Registers are numbered as the protocol does, from 0: a manual's "40001" is `table = "holding"`, `register = 0`.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import is_
from typing import Annotated, ClassVar, Final, Literal

import msgspec
from pymodbus.constants import ExcCodes
from pymodbus.pdu import ModbusPDU, ReadCoilsRequest, ReadHoldingRegistersRequest
from pymodbus.pdu.bit_message import (
    ReadDiscreteInputsRequest,
    WriteMultipleCoilsRequest,
    WriteSingleCoilRequest,
)
from pymodbus.pdu.register_message import (
    MaskWriteRegisterRequest,
    ReadInputRegistersRequest,
    WriteMultipleRegistersRequest,
    WriteSingleRegisterRequest,
)

from drivers import codec, modbus_plan
from drivers.codec import Encoding
from drivers.contract import (
    ConfigError,
    DeviceUnreachable,
    Driver,
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
from drivers.modbus_address import Address, HostPort, SerialPort, reply_timeout_s
from drivers.modbus_cost import CostMeter
from drivers.modbus_learnt import Learnt
from drivers.modbus_line import Failure, Line, Replies, Reply, Request, line_of
from drivers.modbus_plan import LAST_ADDRESS, MAX_BITS, MAX_REGISTERS, Block, Limits, Span, Table

_MOST_SILENT: Final = 2  #: this many requests in a row without any answer, and the device is unreachable
_MOST_HALVES: Final = 64  #: requests for halving in one read; what is left waits for the next
_MOST_TRIALS: Final = 16  #: refused values tried in one read, where each of them is there again
_STUBBORN: Final = 3  #: a block that failed so often in a row while others were read is divided,
_MUTE: Final = 10  #: and one value that was met with silence so often is not asked for any more
_WEIGH_EVERY: Final = 256  #: reads, until the line's cost is looked at again
_READ_BACK_AFTER_S: Final = (0.0, 0.2, 0.5)  #: some devices show a new value a moment later
_BROADCAST: Final = 0  #: Modbus over serial line 1.02, 2.2: nobody answers there
_NARROWED_BY: Final = (ExcCodes.ILLEGAL_ADDRESS, ExcCodes.ILLEGAL_VALUE)
_BUSY: Final = (ExcCodes.ACKNOWLEDGE, ExcCodes.DEVICE_BUSY)
_BEHIND_GATEWAY: Final = (ExcCodes.GATEWAY_PATH_UNAVIABLE, ExcCodes.GATEWAY_NO_RESPONSE)
_CONFIRMED: Final = 5  #: bytes that confirm a write: function, address, and value (5, 6) or quantity (15, 16)
_REGISTER_BITS: Final = 16
_RTU_DATA_BITS: Final = 8
_ASCII_DATA_BITS: Final = 7

Address16 = Annotated[int, msgspec.Meta(ge=0, le=LAST_ADDRESS)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
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
    baud: Positive = 19200  #: 19200 8E1: the standard's own default (Modbus over serial line 1.02, 2.5.1)
    parity: Literal["none", "even", "odd"] = "even"
    stop_bits: Literal[1, 2] = 1
    data_bits: Literal[7, 8] | None = None  #: unset: 8; ASCII 7, its standard's own default (same, 2.5.2)
    framing: Literal["tcp", "udp", "rtu", "ascii", "rtu_over_tcp", "ascii_over_tcp"] | None = (
        None  #: unset: tcp with a host, rtu on a serial port
    )
    unit: Annotated[int, msgspec.Meta(ge=0, le=255)] = 1
    timeout_ms: Positive | None = (
        None  #: for one request; unset: 1000 on a network, by baud and length on a serial line
    )
    latest_reply_ms: Positive | None = None  #: RTU, ASCII: no reply comes later; unset: twice the timeout
    connect_timeout_ms: Positive = 3000
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
    register_not_available: tuple[int, ...] = ()  #: `not_available` of a point with `scale_register`
    utc_offset_min: Annotated[int, msgspec.Meta(ge=-1440, le=1440)] = 0  #: of a date: its clock less UTC
    overlap: bool = False  #: it shares registers with another point, and that is meant
    writable: bool = False
    read_back: bool = True  #: of a written point; false for a command register that reads otherwise

    def __post_init__(self) -> None:
        put = msgspec.structs.force_setattr
        if self.type is ValueType.U16:
            if self.table.of_bits or (self.bit is not None and self.bits is None):
                put(self, "type", ValueType.BOOL)
            elif self.scale_register is not None:
                put(self, "type", ValueType.F64)
            elif self.encoding in codec.INSTANTS:
                put(self, "type", ValueType.I64)
            elif self.bits is not None and self.bits > _REGISTER_BITS:
                put(self, "type", ValueType.U32)
        if self.scale_register is not None and self.not_available:
            # What the registers hold for "no value" is told before it is scaled, and judged there.
            put(self, "register_not_available", (*self.register_not_available, *map(int, self.not_available)))
            put(self, "not_available", ())


class _Work(msgspec.Struct, frozen=True):
    """A block with all that asking and decoding it takes."""

    block: Block
    request: Request
    decoder: codec.RegisterDecoder | codec.BitDecoder
    begin: int  #: where its values go: from here on, if `together`
    together: bool


class _Pair(msgspec.Struct, frozen=True):
    """A point whose number and exponent do not come in one request: where the exponent stands."""

    point: int
    scale: int
    field: codec.Field


class _Asked(msgspec.Struct):
    """The points of a `read`, and the work they make. `spans` has one for each point, then those of exponents read
    apart."""

    points: tuple[ModbusPoint, ...]
    spans: list[Span]
    fields: list[codec.Field]  #: with `at` counted from register 0
    works: list[_Work]
    requests: list[Request]
    refused: dict[int, Reason]  #: by index into `spans`
    pairs: list[_Pair]
    whole: list[Span]  #: refused in one request, and therefore read as pairs
    swift: bool  #: one request holds all points, in order
    stale: bool = False  #: something was learnt: plan anew


class _Pass(msgspec.Struct):
    """One read under way."""

    values: list[Value | None]
    reasons: dict[int, Reason]
    answers: int = 0  #: an exception is one too
    served: int = 0  #: blocks that came
    failures: list[Failure] = []
    refused: list[tuple[_Work, int]] = []  #: blocks to be halved, and the exception code
    stubborn: list[_Work] = []  #: blocks that failed in another way
    taken_at_ns: int = 0
    lost: bool = False  #: the line, half-way


class _Writing(msgspec.Struct, frozen=True):
    """A write: the request's PDU, the confirmation it must get, and what it must read back as."""

    value: Value
    pdu: bytes
    confirmation: bytes
    expected: Value


class _Node(msgspec.Struct):
    """A refused block that was halved."""

    table: Table
    pivot: int  #: where its upper half begins
    parent: _Node | None
    explained: bool = False  #: something in it is known to be refused
    broken_off: bool = False  #: not all of it was asked


class ModbusDriver(Driver[ModbusOptions, ModbusPoint]):
    """One unit on a Modbus line."""

    options_type: ClassVar[type[msgspec.Struct]] = ModbusOptions
    point_type: ClassVar[type[Point]] = ModbusPoint

    def __init__(self, name: str, options: ModbusOptions, points: Sequence[ModbusPoint]) -> None:
        super().__init__(name, options, points)
        self._address = _address_of(options)
        self._limits = Limits(
            max_registers=options.max_registers,
            max_bits=options.max_bits,
            max_gap=options.max_gap,
            forbidden=tuple(options.forbidden.spans()),
        )
        for point in self.points:
            self._check(point)
        _check_overlaps(self.points, [self._span_of(point) for point in self.points])
        self.now_s: Callable[[], float] = time.monotonic  #: for trials of what is refused
        self._learnt = Learnt(f"{options.serial or f'{options.host}:{options.port}'} unit {options.unit}")
        self._cost = CostMeter(self._address).cost
        self._line: Line | None = None
        self._turn = 0
        self._reads = 0
        self._fruitless = 0  #: reads in a row without one block that came
        self._failing: Counter[Span] = Counter()  #: blocks by how often in a row they failed
        self._soft: set[tuple[Table, int]] = set()  #: cuts on the way to whatever makes a block fail
        self._asked = self._ask(self.points)

    def line(self) -> LineClaim:
        return self._address.claim()

    def remembered(self) -> bytes | None:
        return self._learnt.remembered()

    def recall(self, remembered: bytes) -> None:
        self._learnt.recall(remembered, self.now_s())
        self._asked.stale = True

    async def connect(self) -> None:
        if self._line is None:
            self._line = line_of(self._address, self.name)
        await self._line.open(self.options.connect_timeout_ms / 1000)
        self._weigh(self._line)

    async def close(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            line.release(self.name)

    async def read(self, points: Sequence[ModbusPoint]) -> Scan:
        asked = self._asked
        if asked.stale or (points is not asked.points and not _the_same(points, asked.points)):
            asked = self._asked = self._ask(tuple(points))
        line = self._line
        if line is None:
            raise DeviceUnreachable("not connected")
        self._reads += 1
        if not self._reads % _WEIGH_EVERY:
            self._weigh(line)
        if not asked.swift:
            return await self._read_all(line, asked, None)
        # The usual case, and the one that has to be fast: one request holds all points.
        outcome = await line.exchange(asked.requests)
        reply = outcome.replies[0]
        if type(reply) is not bytes:
            return await self._read_all(line, asked, outcome)
        if self._fruitless or self._failing:
            self._fruitless = 0
            self._failing.clear()
        values, reasons = asked.works[0].decoder.decode(reply)
        return Scan(outcome.taken_at_ns, asked.points, values, reasons or {})

    async def write(self, point: ModbusPoint, value: Value) -> None:
        line = self._line
        if line is None:
            raise DeviceUnreachable("not connected")
        _allow(point, value)
        writing = await self._writing(line, point, value)
        request = self._request(writing.pdu, writing.confirmation, len(writing.confirmation))
        # From here on it may take effect, and it is sent no second time. (Where this raises, it was not sent.)
        reply = await self._ask_one(line, request)
        unconfirmed = ""
        if isinstance(reply, Failure):
            if reply.code == ExcCodes.DEVICE_BUSY:
                raise PointRefused(point.name, "the device is busy and did not write it; try again")
            if reply.code and reply.code not in (*_BEHIND_GATEWAY, ExcCodes.ACKNOWLEDGE):
                raise PointRefused(point.name, f"the device refuses: {_words(reply.code)}")
            if reply.code != ExcCodes.ACKNOWLEDGE:  # which says: accepted, and it takes a while
                unconfirmed = _words(reply.code) if reply.code else reply.reason.name.lower()
        if point.read_back:
            await self._read_back(line, point, writing, unconfirmed)
        elif unconfirmed:
            raise DeviceUnreachable(
                _unknown(point, writing, unconfirmed, "read_back = false"), _reason_of(reply)
            )

    # ------------------------------------------------------------------------------------ reading

    async def _read_all(self, line: Line, asked: _Asked, first: Replies | None) -> Scan:
        """`first` is what has been asked of the only block already."""
        reading = _Pass([None] * len(asked.spans), dict(asked.refused))
        if first is None and self._fruitless >= _STUBBORN and self._fruitless % 2:
            # Nothing came for a while. One value alone tells whether the device lives and minds the blocks.
            await self._ask_alone(line, asked, reading)
        if reading.answers or not reading.failures:
            turn = self._turn % max(1, len(asked.works))
            await self._ask_blocks(line, asked.works[turn:] + asked.works[:turn], reading, first)
        if reading.refused:
            await self._halve(line, asked, reading)
        if asked.pairs:
            await self._join_pairs(line, asked, reading)
        if asked.refused or asked.whole:
            await self._try_refused(line, asked, reading)
        self._fruitless = 0 if reading.served else self._fruitless + 1
        self._judge(line, reading)
        if reading.served:
            self._divide(asked, reading)
        count = len(asked.points)
        if len(asked.spans) > count:
            reading.reasons = {i: why for i, why in reading.reasons.items() if i < count}
        taken_at_ns = reading.taken_at_ns or boot_ns()
        return Scan(taken_at_ns, asked.points, reading.values[:count], reading.reasons)

    async def _ask_blocks(
        self, line: Line, queue: Sequence[_Work], reading: _Pass, first: Replies | None = None
    ) -> None:
        """Ask them and place what comes; set aside what is refused. Raises `DeviceUnreachable` if the line is lost
        before anything came."""
        silent = 0
        while queue:
            try:
                outcome, first = first or await line.exchange([work.request for work in queue]), None
            except DeviceUnreachable as err:
                if not reading.answers:
                    raise
                # The line was lost half-way: what came before is good and is kept.
                for work in queue:
                    reading.reasons.update(dict.fromkeys(work.block.members, err.reason))
                reading.lost = True
                return
            reading.taken_at_ns = max(reading.taken_at_ns, outcome.taken_at_ns)
            done, queue = queue[: len(outcome.replies)], queue[len(outcome.replies) :]
            for work, reply in zip(done, outcome.replies, strict=True):
                if isinstance(reply, bytes):
                    reading.answers += 1
                    reading.served += 1
                    self._failing.pop(_range_of(work.block), None)
                    _place(work, reply, reading.values, reading.reasons)
                elif reply.code in _NARROWED_BY:
                    reading.answers += 1
                    reading.refused.append((work, reply.code))
                else:
                    reason = _reason_of(reply)
                    reading.failures.append(reply)
                    reading.reasons.update(dict.fromkeys(work.block.members, reason))
                    silent += reason is Reason.TIMEOUT
                    if reason in (Reason.TIMEOUT, Reason.EXCEPTION):
                        reading.stubborn.append(work)
            if not reading.answers and silent == len(reading.failures) >= _MOST_SILENT:
                return

    def _judge(self, line: Line, reading: _Pass) -> None:
        """Raise `DeviceUnreachable` if nothing was an answer of this device."""
        failures = reading.failures
        if reading.answers or not failures:
            return
        reasons = {_reason_of(failure) for failure in failures}
        if reasons <= {Reason.TIMEOUT, Reason.DISCONNECTED}:
            # Next time begin elsewhere: some devices are silent about addresses they do not have.
            self._turn += len(failures)
            raise DeviceUnreachable(
                f"{line.address}: unit {self.options.unit} does not answer", failures[-1].reason
            )
        if reasons == {Reason.BEHIND_GATEWAY}:
            raise DeviceUnreachable(
                f"{line.address}: the gateway does not reach unit {self.options.unit} "
                f"({_words(failures[-1].code)})",
                Reason.BEHIND_GATEWAY,
            )

    # ------------------------------------------------------------------------------------ what is refused

    async def _halve(self, line: Line, asked: _Asked, reading: _Pass) -> None:
        """Ask refused blocks by halves, until what is refused stands alone, and learn it. Where both halves are served
        and the whole is not, the device minds what lies between: a cut keeps them apart from now on."""
        stack: list[tuple[_Work, int, _Node | None]] = [(work, code, None) for work, code in reading.refused]
        nodes: list[_Node] = []
        room = _MOST_HALVES
        while stack:
            work, code, parent = stack.pop()
            block = work.block
            try:
                lower, upper = modbus_plan.halves(
                    asked.spans, self._limits, self._cost, block, self._learnt.cuts
                )
            except ValueError:
                reason = Reason.REFUSED if code == ExcCodes.ILLEGAL_ADDRESS else Reason.EXCEPTION
                self._learnt.refuse(_range_of(block), reason, self.now_s())
                reading.reasons.update(dict.fromkeys(block.members, reason))
                asked.stale = True
                if parent is not None:
                    parent.explained = True
                continue
            node = _Node(block.table, upper[0].first, parent)
            nodes.append(node)
            blocks = [*lower, *upper]
            room -= len(blocks)
            if room < 0 or reading.lost:
                reading.reasons.update(dict.fromkeys(block.members, Reason.REFUSED))
                node.broken_off = True
                continue
            reading.refused = []
            await self._ask_blocks(line, [self._work(asked, part) for part in blocks], reading)
            node.broken_off = reading.lost
            stack += [(part, why, node) for part, why in reading.refused]
        for node in reversed(nodes):
            if not (node.explained or node.broken_off):
                self._learnt.cut(node.table, node.pivot)
                node.explained = asked.stale = True
            if node.parent is not None:
                node.parent.explained |= node.explained
                node.parent.broken_off |= node.broken_off

    async def _try_refused(self, line: Line, asked: _Asked, reading: _Pass) -> None:
        """Ask for what was refused once more, where its time has come and nothing else waits: one request, and more
        only as long as each brings something back. If all is refused, one request each time, to see who is there."""
        candidates = [*{asked.spans[i] for i in asked.refused}, *asked.whole]
        for _ in range(_MOST_TRIALS):
            if reading.lost or any(
                _reason_of(failure) is not Reason.EXCEPTION for failure in reading.failures
            ):
                return
            now_s = self.now_s()
            span = self._learnt.due(now_s if asked.works else math.inf, candidates)
            if span is None:
                return
            due = self._learnt.refused[span].due_s <= now_s
            members = tuple(i for i in asked.refused if asked.spans[i] == span)
            request = self._request(*_reading(span.table, span.first, span.count))
            try:
                outcome = await line.exchange([request])
            except DeviceUnreachable:
                if not reading.answers:
                    raise
                return
            reply = outcome.replies[0]
            if isinstance(reply, bytes):
                reading.answers += 1
                reading.served += 1
                reading.taken_at_ns = max(reading.taken_at_ns, outcome.taken_at_ns)
                candidates.remove(span)
                self._learnt.succeeded(span, now_s)
                asked.stale = True
                if members:
                    for i in members:
                        del reading.reasons[i]
                    work = self._work(asked, Block(span.table, span.first, span.count, members))
                    _place(work, reply, reading.values, reading.reasons)
                continue
            reason = _reason_of(reply)
            if reason is Reason.EXCEPTION:
                reading.answers += 1
            elif not asked.works:
                reading.failures.append(reply)
            if due and reason in (Reason.EXCEPTION, Reason.TIMEOUT):
                self._learnt.failed(span, now_s)
            return

    def _divide(self, asked: _Asked, reading: _Pass) -> None:
        """A block that fails again and again while others come: some devices are silent, or fail otherwise, where
        others would refuse."""
        for work in reading.stubborn:
            key = _range_of(work.block)
            self._failing[key] += 1
            if self._failing[key] < _STUBBORN:
                continue
            try:
                _, upper = modbus_plan.halves(
                    asked.spans, self._limits, self._cost, work.block, self._learnt.cuts
                )
            except ValueError:
                silent = reading.reasons.get(work.block.members[0]) is Reason.TIMEOUT
                if not silent or self._failing[key] < _MUTE:
                    continue  # an exception costs no more than an answer: it may go on asking
                self._learnt.refuse(key, Reason.TIMEOUT, self.now_s())
                self._learnt.mend(self._soft)
                self._soft.clear()
            else:
                self._learnt.cut(upper[0].table, upper[0].first)
                self._soft.add((upper[0].table, upper[0].first))
            del self._failing[key]
            asked.stale = True

    async def _ask_alone(self, line: Line, asked: _Asked, reading: _Pass) -> None:
        """One value by itself, each time another."""
        wanted = [i for i in range(len(asked.spans)) if i not in asked.refused]
        if len(wanted) > 1:
            span = asked.spans[wanted[self._fruitless // 2 % len(wanted)]]
            members = tuple(i for i in wanted if asked.spans[i] == span)
            await self._ask_blocks(
                line, [self._work(asked, Block(span.table, span.first, span.count, members))], reading
            )
            reading.refused = []  # the blocks will tell

    # ------------------------------------------------------------------------------------ scale registers

    async def _join_pairs(self, line: Line, asked: _Asked, reading: _Pass) -> None:
        """Numbers and exponents that came in different requests. The exponents are read once more, for a device may
        change both between two requests; only where they are the same is the number known."""
        values, reasons = reading.values, reading.reasons
        before = [values[pair.scale] for pair in asked.pairs]
        wanted = {pair.scale for pair in asked.pairs if values[pair.scale] is not None}
        works = [work for work in asked.works if wanted.intersection(work.block.members)]
        if works and not reading.lost:
            again = _Pass([None] * len(asked.spans), {}, answers=1)
            await self._ask_blocks(line, works, again)
            reading.taken_at_ns = max(reading.taken_at_ns, again.taken_at_ns)
        else:
            again = reading
        for pair, exponent in zip(asked.pairs, before, strict=True):
            raw, now = values[pair.point], again.values[pair.scale]
            reason: Reason | None
            if raw is None:
                continue
            if isinstance(raw, int) and isinstance(exponent, int) and exponent == now:
                values[pair.point], reason = codec.scaled(raw, exponent, pair.field)
            else:
                failed = reasons.get(pair.scale) or again.reasons.get(pair.scale)
                values[pair.point], reason = None, failed or Reason.DECODE
            if reason is not None:
                reasons[pair.point] = reason

    # ------------------------------------------------------------------------------------ planning

    def _weigh(self, line: Line) -> None:
        """Plan anew, before the next read, if the line turned out to cost otherwise than was thought."""
        measured = line.cost()
        if modbus_plan.worth_replanning(self._cost, measured):
            self._cost = measured
            self._asked.stale = True

    def _ask(self, points: tuple[ModbusPoint, ...]) -> _Asked:
        learnt = self._learnt
        spans = [self._span_of(point) for point in points]
        fields = [self._field(point) for point in points]
        pairs: list[_Pair] = []
        whole: list[Span] = []
        for i, point in enumerate(points):
            if point.scale_register is None:
                continue
            # Number and exponent in one request are of one moment.
            hull = _hull(spans[i], point.scale_register)
            if hull in learnt.refused:
                whole.append(hull)
            elif hull.count <= self._limits.max_registers and self._limits.forbids(hull) is None:
                spans[i] = hull
                continue
            pairs.append(_Pair(i, len(spans), fields[i]))
            order = "BA" if codec.swaps_bytes(fields[i].order) else "AB"
            spans.append(Span(point.table, point.scale_register))
            fields.append(codec.Field(at=2 * point.scale_register, type=ValueType.I16, order=order))
            holds = ValueType(point.encoding or Encoding.I16)
            fields[i] = codec.Field(at=fields[i].at, type=holds, order=fields[i].order)
        refused = {
            i: trial.reason for i, span in enumerate(spans) if (trial := learnt.refused.get(span)) is not None
        }
        blocks = modbus_plan.plan(
            spans,
            self._limits,
            self._cost,
            members=[i for i in range(len(spans)) if i not in refused] if refused else None,
            avoid=[spans[i] for i in refused],
            cuts=learnt.cuts,
        )
        asked = _Asked(points, spans, fields, [], [], refused, pairs, whole, swift=False)
        asked.works = [self._work(asked, block) for block in blocks]
        asked.requests = [work.request for work in asked.works]
        asked.swift = (
            len(blocks) == 1 and asked.works[0].together and len(blocks[0].members) == len(points)
        ) and not (pairs or whole)
        return asked

    def _check(self, point: ModbusPoint) -> None:
        """Raises `ConfigError` for a point that no request can read."""
        wrong = self._what_is_wrong(point)
        if wrong is not None:
            raise ConfigError(f"point {point.name!r}: {wrong}")

    def _what_is_wrong(self, point: ModbusPoint) -> str | None:
        if point.table.of_bits:
            if point.type is not ValueType.BOOL:
                return f"type: a {point.table} is a bool, not {point.type}"
            for key in ("bit", "bits", "length", "encoding", "scale_register"):
                if getattr(point, key) is not None:
                    return f"{key}: a {point.table} is one bit already; remove it"
        else:
            wrong = codec.what_is_wrong(self._field(point))
            if wrong is not None:
                return wrong
            if point.type is not ValueType.STR and point.length is not None and point.encoding is None:
                return "length: needed by a str, and only there; remove it"
        if point.utc_offset_min and point.encoding not in codec.DATES:
            return "utc_offset_min: only dates have a time zone; remove it"
        if point.register_not_available and point.scale_register is None:
            return "register_not_available: only with a scale_register; say not_available"
        if point.writable and point.table in (Table.INPUT, Table.DISCRETE):
            return f"writable: a {point.table} is read only; remove it, or see whether it is in another table"
        span = self._span_of(point)
        if span.end - 1 > LAST_ADDRESS:
            return f"register: {point.register} and {span.count - 1} more go beyond {LAST_ADDRESS}"
        longest = self._limits.longest(point.table)
        if span.count > longest:
            return f"takes {span.count} registers, and max_registers is {longest}; a value is never read in parts"
        spans = [span]
        if point.scale_register is not None:
            if span.first <= point.scale_register < span.end:
                return "scale_register: lies within the value itself"
            spans.append(Span(point.table, point.scale_register))
        for each in spans:
            range_ = self._limits.forbids(each)
            if range_ is not None:
                return (
                    f"register: {each.first} is in options.forbidden.{point.table} "
                    f"[{range_.first}, {range_.end - 1}]; remove the point or the range"
                )
        return None

    def _span_of(self, point: ModbusPoint) -> Span:
        count = 1 if point.table.of_bits else self._field(point).registers
        return Span(point.table, point.register, count)

    def _field(self, point: ModbusPoint) -> codec.Field:
        return codec.Field(
            at=2 * point.register,
            type=point.type,
            order=point.order or self.options.order,
            encoding=point.encoding,
            bit=point.bit,
            bits=point.bits,
            length=point.length or 0,
            scale_at=None if point.scale_register is None else 2 * point.scale_register,
            not_available=point.register_not_available,
            utc_offset_min=point.utc_offset_min,
        )

    def _work(self, asked: _Asked, block: Block) -> _Work:
        members = block.members
        decoder: codec.RegisterDecoder | codec.BitDecoder
        if block.table.of_bits:
            decoder = codec.BitDecoder([asked.spans[i].first - block.first for i in members])
        else:
            decoder = codec.RegisterDecoder([asked.fields[i].moved(-2 * block.first) for i in members])
        together = members == tuple(range(members[0], members[-1] + 1))
        request = self._request(*_reading(block.table, block.first, block.count))
        return _Work(block, request, decoder, members[0], together)

    def _request(self, pdu: bytes, reply_head: bytes, reply_size: int) -> Request:
        if self.options.timeout_ms is not None:
            timeout_s = self.options.timeout_ms / 1000
        else:
            timeout_s = reply_timeout_s(self._address, len(pdu), reply_size)
        latest_ms = self.options.latest_reply_ms
        latest_s = max(timeout_s, latest_ms / 1000) if latest_ms else 2 * timeout_s
        return Request(self.options.unit, pdu, reply_head, reply_size, timeout_s, latest_s)

    # ------------------------------------------------------------------------------------ writing

    async def _ask_one(self, line: Line, request: Request) -> Reply:
        return (await line.exchange([request])).replies[0]

    async def _writing(self, line: Line, point: ModbusPoint, value: Value) -> _Writing:
        """Reads the device where what is written depends on what is there. Raises `PointRefused`,
        `DeviceUnreachable`: nothing was written."""
        try:
            if point.table is Table.COIL:
                return _switching(point, value, single=self.options.write_single)
            field = self._field(point).moved(-2 * point.register)
            expected = value
            if codec.is_part(field):
                if self.options.write_bits is None:
                    raise ValueError(
                        "it is a part of a register; say in the options how this device lets it be written: "
                        "write_bits = 'mask' (function 22) or 'rewrite' (read, change, write)"
                    )
                masks = codec.masks(value, field)
                if self.options.write_bits == "mask":
                    return _masking(point, value, masks, field)
                data = codec.encode_part(
                    value, field, await self._registers(line, point, self._span_of(point))
                )
            elif point.scale_register is not None:
                held = await self._registers(line, point, Span(point.table, point.scale_register))
                exponent = int.from_bytes(
                    held, "little" if codec.swaps_bytes(field.order) else "big", signed=True
                )
                data, expected = codec.unscaled(value, exponent, field)
            else:
                data = codec.encode(value, field)
                held_as = codec.RegisterDecoder([field]).decode(data)[0][0]
                expected = value if held_as is None else held_as
        except ValueError as err:
            raise PointRefused(point.name, str(err)) from err
        registers = [int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2)]
        single = len(registers) == 1 and self.options.write_single
        kind = WriteSingleRegisterRequest if single else WriteMultipleRegistersRequest
        pdu = _pdu(kind(address=point.register, registers=registers))
        return _Writing(value, pdu, pdu[:_CONFIRMED], expected)

    async def _registers(self, line: Line, point: ModbusPoint, span: Span) -> bytes:
        """What stands there now. Raises `PointRefused`, `DeviceUnreachable`."""
        reply = await self._ask_one(line, self._request(*_reading(span.table, span.first, span.count)))
        if isinstance(reply, bytes):
            return reply
        if reply.code:
            raise PointRefused(point.name, f"register {span.first} cannot be read: {_words(reply.code)}")
        raise DeviceUnreachable(
            f"{point.name}: no answer ({reply.reason.name.lower()}); nothing was written", reply.reason
        )

    async def _read_back(self, line: Line, point: ModbusPoint, writing: _Writing, unconfirmed: str) -> None:
        """Raises `PointRefused` where another value stands there, `DeviceUnreachable` where it cannot be told."""
        asked = self._ask((point,))
        found: Value | None = None
        reason: Reason | None = None
        for wait_s in _READ_BACK_AFTER_S:
            await asyncio.sleep(wait_s)
            reading = _Pass([None] * len(asked.spans), {})
            try:
                if unconfirmed:
                    await line.open(self.options.connect_timeout_ms / 1000)  # perhaps it was lost
                await self._ask_blocks(line, asked.works, reading)
                await self._join_pairs(line, asked, reading)
            except DeviceUnreachable as err:
                found, reason = None, err.reason
                continue
            if reading.refused or asked.refused:
                raise PointRefused(
                    point.name,
                    f"{writing.value!r} was sent ({unconfirmed or 'confirmed'}), and the device refuses to be read "
                    "there; if that is its nature, say read_back = false",
                )
            found, reason = reading.values[0], reading.reasons.get(0)
            if found is not None and _sticks(writing.expected, found):
                return
        if found is None:
            why = (reason or Reason.DECODE).name.lower()
            raise DeviceUnreachable(_unknown(point, writing, unconfirmed, why), reason or Reason.DECODE)
        if unconfirmed:
            raise PointRefused(
                point.name,
                f"no confirmation ({unconfirmed}), and it reads back as {found!r}: {writing.value!r} was not "
                "written, and it was not sent again",
            )
        raise PointRefused(point.name, f"wrote {writing.value!r}, but it reads back as {found!r}")


def _unknown(point: ModbusPoint, writing: _Writing, unconfirmed: str, why: str) -> str:
    sent = f"no confirmation ({unconfirmed})" if unconfirmed else "the device confirmed the write"
    return (
        f"{point.name}: {sent}, and it cannot be read back ({why}): whether {writing.value!r} was written is not "
        "known, and it was not sent again"
    )


def _allow(point: ModbusPoint, value: Value) -> None:
    """Raises `PointRefused` for what the configuration does not let be written."""
    if point.table in (Table.INPUT, Table.DISCRETE):
        raise PointRefused(point.name, f"a {point.table} is read only")
    if not point.writable:
        raise PointRefused(point.name, "not writable; if it is to be, say so in its table: writable = true")
    if isinstance(value, bool | str):
        return
    shown = engineering(value, point.scale, point.offset)
    if not math.isfinite(shown):
        raise PointRefused(point.name, f"{value!r} is not a number")
    low = -math.inf if point.valid_min is None else point.valid_min
    high = math.inf if point.valid_max is None else point.valid_max
    if not low <= shown <= high:
        raise PointRefused(point.name, f"{shown:g} is outside valid_min..valid_max ({low:g}..{high:g})")
    if point.one_of is not None and shown not in point.one_of:
        raise PointRefused(point.name, f"{shown:g} is not one of {', '.join(f'{n:g}' for n in point.one_of)}")
    if value in point.not_available:
        raise PointRefused(point.name, f"{value!r} is the device's code for no value (not_available)")


def _switching(point: ModbusPoint, value: Value, *, single: bool) -> _Writing:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is not true or false")
    kind = WriteSingleCoilRequest if single else WriteMultipleCoilsRequest
    pdu = _pdu(kind(address=point.register, bits=[value]))
    return _Writing(value, pdu, pdu[:_CONFIRMED], value)


def _masking(point: ModbusPoint, value: Value, masks: tuple[int, int], field: codec.Field) -> _Writing:
    """Function 22: what stands there AND the first mask, OR the second (Modbus application protocol 1.1b3, 6.16)."""
    if field.registers > 1:
        raise ValueError("two registers are not written by one mask; say write_bits = 'rewrite'")
    clear, put = (_swapped(mask) if codec.swaps_bytes(field.order) else mask for mask in masks)
    pdu = _pdu(MaskWriteRegisterRequest(address=point.register, and_mask=0xFFFF & ~clear, or_mask=put))
    return _Writing(value, pdu, pdu, value)  # confirmed by an echo of all of it


def _swapped(register: int) -> int:
    return register >> 8 | (register & 0xFF) << 8


def _sticks(expected: Value, found: Value) -> bool:
    """Whether what reads back is what was written, as the registers can hold it. A device may keep a float with fewer
    digits than it was sent."""
    if isinstance(expected, float) and isinstance(found, float):
        return math.isclose(expected, found, rel_tol=1e-6)
    return expected == found


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


def _range_of(block: Block) -> Span:
    return Span(block.table, block.first, block.count)


def _reason_of(reply: Reply) -> Reason:
    """Why there is no value."""
    if not isinstance(reply, Failure):
        return Reason.GOOD
    if reply.code in _BUSY:
        return Reason.BUSY
    return Reason.BEHIND_GATEWAY if reply.code in _BEHIND_GATEWAY else reply.reason


def _address_of(options: ModbusOptions) -> Address:
    """Raises `ConfigError`."""
    if (options.host is None) == (options.serial is None):
        raise ConfigError("options: give either host (Modbus TCP) or serial (a port such as /dev/ttyUSB0)")
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


def _hull(span: Span, address: int) -> Span:
    """The span, up to an address beside it."""
    first, end = min(span.first, address), max(span.end, address + 1)
    return Span(span.table, first, end - first)


def _check_overlaps(points: Sequence[ModbusPoint], spans: Sequence[Span]) -> None:
    """Two points on the very same registers are two views of them, and so is a bit or a bit-field of another point's
    register. All else that shares a register is a slip in the table. Raises `ConfigError`."""
    open_: list[int] = []  # those that reach farthest, in order of their ends
    views = [point.overlap or point.bit is not None or point.table.of_bits for point in points]
    plain = [i for i, view in enumerate(views) if not view]
    for i in sorted(plain, key=lambda i: (spans[i].table, spans[i].first, spans[i].count)):
        span = spans[i]
        for other in open_:
            theirs = spans[other]
            if theirs.table is span.table and theirs.end > span.first and theirs != span:
                one, two = sorted((i, other))
                shared = f"{max(span.first, theirs.first)}-{min(span.end, theirs.end) - 1}"
                raise ConfigError(
                    f"point {points[two].name!r}: register: shares registers {shared} with point "
                    f"{points[one].name!r} ({points[one].type} at {points[one].register}); correct the register or "
                    "the type of one, or, if that is meant, say overlap = true"
                )
        if not open_ or spans[open_[0]].table is not span.table or span.end > spans[open_[0]].end:
            open_ = [i]


def _reading(table: Table, first: int, count: int) -> tuple[bytes, bytes, int]:
    """A read's PDU, the head of its reply, and the reply's size."""
    pdu = _pdu(_READS[table](address=first, count=count))
    data = (count + 7) // 8 if table.of_bits else 2 * count
    return pdu, bytes([pdu[0], data]), 2 + data


def _pdu(request: ModbusPDU) -> bytes:
    return bytes([request.function_code]) + request.encode()


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
