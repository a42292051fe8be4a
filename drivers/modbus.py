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
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from operator import is_
from typing import ClassVar, Final

import msgspec
from pymodbus.constants import ExcCodes
from pymodbus.pdu import ModbusPDU, ReadCoilsRequest, ReadHoldingRegistersRequest
from pymodbus.pdu.bit_message import ReadDiscreteInputsRequest
from pymodbus.pdu.register_message import ReadInputRegistersRequest

from drivers import codec, modbus_plan, modbus_write
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
)
from drivers.modbus_address import reply_timeout_s
from drivers.modbus_cost import CostMeter
from drivers.modbus_learnt import Learnt
from drivers.modbus_line import Failure, Line, Replies, Reply, Request, line_of
from drivers.modbus_plan import Block, Span, Table
from drivers.modbus_table import (
    ModbusOptions,
    ModbusPoint,
    address_of,
    check_overlaps,
    field_of,
    hull,
    limits_of,
    span_of,
    what_is_wrong,
)
from drivers.modbus_write import Writing, pdu_of

__all__ = ["ModbusDriver", "ModbusOptions", "ModbusPoint"]

_MOST_SILENT: Final = 2  #: this many requests in a row without any answer, and the device is unreachable
_MOST_HALVES: Final = 64  #: requests for halving in one read; what is left waits for the next
_MOST_TRIALS: Final = 16  #: refused values tried in one read, where each of them is there again
_STUBBORN: Final = 3  #: a block that failed so often in a row while others were read is divided,
_MUTE: Final = 10  #: and one value that was met with silence so often is not asked for any more
_WEIGH_EVERY: Final = 256  #: reads, until the line's cost is looked at again
_READ_BACK_AFTER_S: Final = (0.0, 0.2, 0.5)  #: some devices show a new value a moment later
_NARROWED_BY: Final = (ExcCodes.ILLEGAL_ADDRESS, ExcCodes.ILLEGAL_VALUE)
_BUSY: Final = (ExcCodes.ACKNOWLEDGE, ExcCodes.DEVICE_BUSY)
_BEHIND_GATEWAY: Final = (ExcCodes.GATEWAY_PATH_UNAVIABLE, ExcCodes.GATEWAY_NO_RESPONSE)


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
    sentinels: frozenset[float]
    decimals: bool


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
    moments: dict[int, int] = {}  #: by index into the spans: with which block it came, counted from 1


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
        self._address = address_of(options)
        self._limits = limits_of(options)
        for point in self.points:
            wrong = what_is_wrong(point, options.order, self._limits)
            if wrong is not None:
                raise ConfigError(f"point {point.name!r}: {wrong}")
        check_overlaps(self.points)
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
        if not asked.swift or self._fruitless >= _STUBBORN:
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
        modbus_write.allow(point, value)
        writing = await self._writing(line, point, value)
        request = self._request(writing.pdu, writing.confirmation, len(writing.confirmation))
        # From here on it may take effect, and it is sent no second time. (Where this raises, it was not sent.)
        reply = await self._ask_one(line, request)
        unconfirmed = ""
        if isinstance(reply, Failure):
            if reply.code == ExcCodes.DEVICE_BUSY:
                raise PointRefused(point.name, "the device is busy and did not write it; try again")
            if reply.code and reply.code not in (*_BEHIND_GATEWAY, ExcCodes.ACKNOWLEDGE):
                unknown = reply.code == ExcCodes.ILLEGAL_FUNCTION
                remedy = modbus_write.other_way(writing.pdu[0]) if unknown else ""
                raise PointRefused(point.name, f"the device refuses: {_words(reply.code)}{remedy}")
            if reply.code != ExcCodes.ACKNOWLEDGE:  # which says: accepted, and it takes a while
                unconfirmed = _words(reply.code) if reply.code else reply.reason.name.lower()
        if point.read_back:
            await self._read_back(line, point, writing, unconfirmed)
        elif unconfirmed:
            raise DeviceUnreachable(
                modbus_write.unknown(point, writing, unconfirmed, "read_back = false"), _reason_of(reply)
            )

    # ------------------------------------------------------------------------------------ reading

    async def _read_all(self, line: Line, asked: _Asked, first: Replies | None) -> Scan:
        """`first` is what has been asked of the only block already."""
        reading = _Pass([None] * len(asked.spans), dict(asked.refused))
        alone = first is None and self._fruitless >= _STUBBORN and self._fruitless % 2 == 1
        # Nothing came for a while. One value by itself tells whether the device lives and minds the blocks.
        if not alone or await self._lives(line, asked, reading):
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
            self._divide(asked, reading, _STUBBORN if alone else 1)
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
                    reading.moments.update(dict.fromkeys(work.block.members, reading.served))
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
        again_s = line.left_alone_s(self.options.unit)
        if reasons <= {Reason.TIMEOUT, Reason.DISCONNECTED}:
            # Next time begin elsewhere: some devices are silent about addresses they do not have.
            self._turn += len(failures)
            raise DeviceUnreachable(
                f"{line.address}: unit {self.options.unit} does not answer",
                failures[-1].reason,
                retry_within_s=again_s,
            )
        if reasons == {Reason.BEHIND_GATEWAY}:
            raise DeviceUnreachable(
                f"{line.address}: the gateway does not reach unit {self.options.unit} "
                f"({_words(failures[-1].code)})",
                Reason.BEHIND_GATEWAY,
                retry_within_s=again_s,
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
                reason = Reason.DISCONNECTED if reading.lost else Reason.REFUSED
                reading.reasons.update(dict.fromkeys(block.members, reason))
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
        halves = {i for pair in asked.pairs for i in (pair.point, pair.scale)}
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
            # Half of a pair is no value; the next read joins them.
            members = tuple(i for i in asked.refused if asked.spans[i] == span and i not in halves)
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

    def _divide(self, asked: _Asked, reading: _Pass, times: int) -> None:
        """A block that fails again and again while others come: some devices are silent, or fail otherwise, where
        others would refuse."""
        for work in reading.stubborn:
            key = _range_of(work.block)
            self._failing[key] += times
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

    async def _lives(self, line: Line, asked: _Asked, reading: _Pass) -> bool:
        """Ask for one value by itself, each time another. False: silence, and it goes into the reading. (The value
        itself is not kept: its block will bring it.)"""
        wanted = [i for i in range(len(asked.spans)) if i not in asked.refused]
        if len(wanted) < 2:
            return True
        span = asked.spans[wanted[self._fruitless // 2 % len(wanted)]]
        members = tuple(i for i in wanted if asked.spans[i] == span)
        work = self._work(asked, Block(span.table, span.first, span.count, members))
        alone = _Pass([None] * len(asked.spans), {})
        await self._ask_blocks(line, [work], alone)
        if alone.failures and _reason_of(alone.failures[0]) in (Reason.TIMEOUT, Reason.DISCONNECTED):
            reading.failures = alone.failures
            return False
        reading.answers, reading.served = alone.answers, alone.served
        return True

    # ------------------------------------------------------------------------------------ scale registers

    async def _join_pairs(self, line: Line, asked: _Asked, reading: _Pass) -> None:
        """Numbers and exponents that came in different requests. A device may change both between two requests, so a
        number is known only where its exponent is the same before and after it: the number is read once more where
        it came first, and then the exponent."""
        values, reasons, moments = reading.values, reading.reasons, reading.moments
        apart = [p for p in asked.pairs if p.point in moments and p.scale in moments]
        apart = [p for p in apart if moments[p.point] != moments[p.scale]]
        early = {p.point for p in apart if moments[p.point] < moments[p.scale]}
        numbers = await self._once_more(line, asked, reading, early)
        exponents = await self._once_more(line, asked, reading, {p.scale for p in apart})
        for pair in asked.pairs:
            raw, exponent, now = values[pair.point], values[pair.scale], exponents.values[pair.scale]
            failed = reasons.get(pair.scale)
            reason: Reason | None
            if raw is None:
                continue
            if pair not in apart:
                now = exponent
            elif pair.point in early:
                raw = numbers.values[pair.point]
                failed = failed or numbers.reasons.get(pair.point)
            if isinstance(raw, int) and isinstance(exponent, int) and exponent == now:
                known = codec.exponent_of(exponent, decimals=pair.decimals)
                values[pair.point], reason = codec.scaled(raw, known, pair.sentinels)
            else:
                failed = failed or exponents.reasons.get(pair.scale)
                values[pair.point], reason = None, failed or Reason.DECODE
            if reason is not None:
                reasons[pair.point] = reason

    async def _once_more(self, line: Line, asked: _Asked, reading: _Pass, wanted: set[int]) -> _Pass:
        """Ask the blocks again that hold these."""
        again = _Pass([None] * len(asked.spans), {}, answers=1)
        if reading.lost:
            again.reasons = dict.fromkeys(wanted, Reason.DISCONNECTED)
        elif wanted:
            works = [work for work in asked.works if wanted.intersection(work.block.members)]
            await self._ask_blocks(line, works, again)
            reading.taken_at_ns = max(reading.taken_at_ns, again.taken_at_ns)
        return again

    # ------------------------------------------------------------------------------------ planning

    def _weigh(self, line: Line) -> None:
        """Plan anew, before the next read, if the line turned out to cost otherwise than was thought."""
        measured = line.cost()
        if modbus_plan.worth_replanning(self._cost, measured):
            self._cost = measured
            self._asked.stale = True

    def _ask(self, points: tuple[ModbusPoint, ...]) -> _Asked:
        learnt = self._learnt
        spans = [span_of(point) for point in points]
        fields = [field_of(point, self.options.order) for point in points]
        pairs: list[_Pair] = []
        whole: list[Span] = []
        for i, point in enumerate(points):
            if point.exponent_register is None:
                continue
            # Number and exponent in one request are of one moment.
            both = hull(spans[i], point.exponent_register)
            if both in learnt.refused:
                whole.append(both)
            elif both.count <= self._limits.max_registers and self._limits.forbids(both) is None:
                spans[i] = both
                continue
            pairs.append(_Pair(i, len(spans), codec.sentinels_of(fields[i]), fields[i].decimals))
            order = "BA" if codec.swaps_bytes(fields[i].order) else "AB"
            spans.append(Span(point.table, point.exponent_register))
            fields.append(codec.Field(at=2 * point.exponent_register, type=ValueType.I16, order=order))
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
        # Exponents before their numbers: then none has to be read twice.
        scales = {pair.scale for pair in pairs}
        blocks = tuple(sorted(blocks, key=lambda block: scales.isdisjoint(block.members)))
        asked.works = [self._work(asked, block) for block in blocks]
        asked.requests = [work.request for work in asked.works]
        asked.swift = (
            len(blocks) == 1 and asked.works[0].together and len(blocks[0].members) == len(points)
        ) and not (pairs or whole)
        return asked

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

    async def _writing(self, line: Line, point: ModbusPoint, value: Value) -> Writing:
        """Reads the device where what is written depends on what is there. Raises `PointRefused`,
        `DeviceUnreachable`: nothing was written."""
        try:
            if point.table is Table.COIL:
                return modbus_write.switching(point, value, single=self.options.write_single)
            field = field_of(point, self.options.order).moved(-2 * point.register)
            expected = value
            if codec.is_part(field):
                if self.options.write_bits is None:
                    raise ValueError(
                        "it is a part of a register; say in the options how this device lets it be written: "
                        "write_bits = 'mask' (function 22) or 'rewrite' (read, change, write)"
                    )
                masks = codec.masks(value, field)
                if self.options.write_bits == "mask":
                    return modbus_write.masking(point, value, masks, field)
                data = codec.encode_part(value, field, await self._registers(line, point, span_of(point)))
            elif point.exponent_register is not None:
                held = await self._registers(line, point, Span(point.table, point.exponent_register))
                number = int.from_bytes(
                    held, "little" if codec.swaps_bytes(field.order) else "big", signed=True
                )
                exponent = codec.exponent_of(number, decimals=field.decimals)
                data, expected = codec.unscaled(value, exponent, field)
            else:
                data = codec.encode(value, field)
                held_as = codec.RegisterDecoder([field]).decode(data)[0][0]
                expected = value if held_as is None else held_as
        except ValueError as err:
            raise PointRefused(point.name, str(err)) from err
        return modbus_write.whole(point, value, data, expected, single=self.options.write_single)

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

    async def _read_back(self, line: Line, point: ModbusPoint, writing: Writing, unconfirmed: str) -> None:
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
            if found is not None and modbus_write.sticks(writing.expected, found):
                return
        if found is None:
            why = (reason or Reason.DECODE).name.lower()
            raise DeviceUnreachable(
                modbus_write.unknown(point, writing, unconfirmed, why), reason or Reason.DECODE
            )
        if unconfirmed:
            raise PointRefused(
                point.name,
                f"no confirmation ({unconfirmed}), and it reads back as {found!r}: {writing.value!r} was not "
                "written, and it was not sent again",
            )
        raise PointRefused(point.name, f"wrote {writing.value!r}, but it reads back as {found!r}")


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


def _reading(table: Table, first: int, count: int) -> tuple[bytes, bytes, int]:
    """A read's PDU, the head of its reply, and the reply's size."""
    pdu = pdu_of(_READS[table](address=first, count=count))
    data = (count + 7) // 8 if table.of_bits else 2 * count
    return pdu, bytes([pdu[0], data]), 2 + data


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
