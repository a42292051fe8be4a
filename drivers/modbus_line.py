"""One owner per physical Modbus line: a serial port, a serial gateway behind TCP, a TCP or a UDP device.

Rules:

1. A line is shared by all who name it (all names of one serial port are one line) and carries one request at a time:
   polls, writes and a technician's probes alike. It opens with its first user and closes with its last.
2. Turns go round. Whoever asks is served in the order of asking; a series lets the others in between its requests, so
   nobody waits longer than one request of each other user. A series ends at its first request without an answer.
3. RTU and ASCII replies carry no transaction id, so a late one looks like the answer to the next request. After a
   request that went unanswered the line stays silent until the latest moment that a reply may still come. That moment
   counts from after the request was written; what came until then is thrown away in the same turn of the event loop
   as the next request is written, so that it is gone even if this process was held up meanwhile. (Measured: without
   this, 20 of 20 late replies were taken for another register's value.)
4. A unit that does not answer is left alone for a growing while (`drivers.modbus_breaker`): asking it fails at once and
   takes none of the line's time. From its first failure on a read begins with a brief one of its first registers, which
   waits no longer than the unit needs to begin a reply. A late reply to that can be taken for the answer to a request
   of the same form only, whatever unit's number it carries: such a request, and any to the unit itself, waits until it
   cannot come any more; the others go on.
5. A technician's request (`force`) is sent to a unit that is left alone, too.

`open_serial` is the seam for a model of a line: put `(SerialPort, protocol factory) -> SerialTransport` in its place.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Coroutine, Sequence
from typing import Any, Final, TypeAlias

from drivers.contract import ConfigError, DeviceUnreachable, Reason, boot_ns
from drivers.modbus_address import Address, HostPort, SerialPort, reply_timeout_s
from drivers.modbus_breaker import Breaker, Verdict
from drivers.modbus_cost import CostMeter
from drivers.modbus_plan import Cost
from drivers.modbus_port import OpenSerial, SerialTransport, open_tty
from drivers.modbus_wire import (
    AsciiWire,
    DatagramWire,
    Failure,
    MbapWire,
    Replies,
    Reply,
    Request,
    RtuWire,
    Wire,
)

__all__ = [
    "Address",
    "Cost",
    "Failure",
    "HostPort",
    "Line",
    "OpenSerial",
    "Replies",
    "Reply",
    "Request",
    "SerialPort",
    "SerialTransport",
    "line_of",
    "open_serial",
    "reply_timeout_s",
]

_BABBLE_S: Final = 2.0  #: a line that never falls silent is used again after this; the checks must do
_PATIENCE: Final = 4.0  #: a probe waits this many times the slowest turnaround seen of its unit,
_LEAST_PATIENCE_S: Final = 0.05  #: but no less than this,
_UNKNOWN_PATIENCE_S: Final = 0.1  #: and this long for one that never answered: most need under 0.05
_NETWORK_PATIENCE_S: Final = 0.3  #: the same behind a host, whose own way there is part of it
_FORGET: Final = 0.95  #: per answer, of the slowest turnaround
_ADAPTER_S: Final = 0.02  #: a USB adapter may hand a byte on this much later (FTDI's latency timer: 16 ms)
_SETTLE_S: Final = 0.005  #: what has arrived is readable by then: a tty's bytes come through a work queue
_SAMPLED: Final = 16  #: with transactions, one of so many requests is measured
_SILENT: Final = (Reason.TIMEOUT, Reason.DISCONNECTED)
_BITS: Final = (1, 2)  #: function codes that read bits (Modbus application protocol 1.1b3, 6.1 and 6.2)
_READS: Final = (*_BITS, 3, 4)  #: and registers (6.3, 6.4)
_READ_SIZE: Final = 5  #: bytes of their PDU: function, address, quantity
_Form: TypeAlias = tuple[bytes, int]
"""What a reply looks like but for its unit's number and its data: its head and size."""

open_serial: OpenSerial = open_tty


class _Job:
    """A series on its way, or (an empty one) a turn for whoever opens the line."""

    __slots__ = ("babble_until_s", "done", "force", "replies", "series", "taken_at_ns")

    def __init__(self, series: Sequence[Request], force: bool, done: asyncio.Future[Replies]) -> None:
        self.series = series
        self.force = force
        self.done = done
        self.replies: list[Reply] = []
        self.taken_at_ns = 0
        self.babble_until_s = 0.0

    def finish(self) -> None:
        if not self.done.done():
            self.done.set_result(Replies(self.replies, self.taken_at_ns))

    def fail(self, err: DeviceUnreachable) -> None:
        """It gets no more answers: what it has is kept."""
        if self.replies:
            self.replies.append(Failure(err.reason))
            self.finish()
        elif not self.done.done():
            self.done.set_exception(err)


class _Owner:
    """Who holds the line: its connection, whose turn it is, who waits, and which units are left alone."""

    def __init__(self, address: Address, key: str) -> None:
        self.address = address
        self.key = key
        self.users: list[str] = []
        self._loop = asyncio.get_running_loop()
        self._wire: Wire | None = None
        self._waiting: deque[_Job] = deque()
        self._job: _Job | None = None
        self._pause: asyncio.TimerHandle | None = (
            None  #: until the line is silent enough for the job's next request
        )
        self._in_flight = False
        self._sent: Request | None = None
        self._is_brief = (
            False  #: what was sent is not the job's request yet, but a brief one to the same unit
        )
        self._probed: Breaker | None = None
        self._breakers: dict[int, Breaker] = {}
        self._slowest_s: dict[int, float] = {}  #: turnaround, by unit
        self._knows_brief: set[int] = set()  #: units that answered a brief read
        self._silence_s = address.silence_s if isinstance(address, SerialPort) else 0.0
        self.reply_due_s = 0.0  #: until then a reply to a request that nobody waits for may come
        self._form_due_s: dict[_Form, float] = {}  #: the same, of a reply that has this form
        self._quiet_from_s = (
            0.0  #: the line has been seen silent after that, when then nothing waits to be read
        )
        self._owed = False  #: it is yet to be seen silent
        self._unanswered = 0  #: requests since the last proper answer
        self._answers = 0
        self.meter = CostMeter(address)

    # ------------------------------------------------------------------------------- for its users

    async def open(self, timeout_s: float) -> None:
        turn = _Job((), True, self._loop.create_future())
        self._queue(turn)
        try:
            await turn.done
            wire = self._wire
            if wire is not None and wire.lost_because is None and not self._looks_dead():
                return
            if wire is not None:
                wire.close()
            self._wire = None
            opened = await self._opened(timeout_s)
            if not self.users:
                opened.close()
                raise DeviceUnreachable(f"{self.address}: released while it was opened")
            self._wire = opened
            self._unanswered = 0
            for breaker in self._breakers.values():
                breaker.hurry(self._loop.time())
        finally:
            if self._job is turn:
                self._next()
            else:
                turn.done.cancel()

    async def exchange(self, series: Sequence[Request], force: bool) -> Replies:
        if not series:
            return Replies([], 0)
        job = _Job(series, force, self._loop.create_future())
        self._queue(job)
        try:
            if job.done.done():
                await asyncio.sleep(0)  # refused at once: whoever asks in a loop must not hold up all others
            return await job.done
        except asyncio.CancelledError:
            if self._job is job:
                self._abandon()
            raise

    def quiet_until_s(self) -> float:
        """Until when any late reply may come."""
        return max(self.reply_due_s, *self._form_due_s.values(), 0.0)

    def close(self) -> None:
        wire, self._wire = self._wire, None
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        if wire is not None:
            if self._in_flight:
                self._owe_silence(wire)
            wire.close()
        self._in_flight = self._is_brief = False
        if self._job is not None and self._job.series:
            self._proceed_or_next()

    # ------------------------------------------------------------------------------------- turns

    def _queue(self, job: _Job) -> None:
        if self._job is None:
            self._begin(job)
            if self._job is None:
                self._next()
        else:
            self._waiting.append(job)

    def _next(self) -> None:
        self._job = None
        waiting = self._waiting
        while waiting and self._job is None:
            self._begin(waiting.popleft())

    def _begin(self, job: _Job) -> None:
        """Its turn. It may be over at once; then there is no job."""
        if job.done.done():
            return  # nobody waits for it any more
        self._job = job
        if not job.series:
            job.done.set_result(Replies([], 0))
        elif not self._proceed():
            self._job = None

    def _proceed_or_next(self) -> None:
        self._pause = None
        if not self._proceed():
            self._next()

    def _proceed(self) -> bool:
        """Send the job's next request, now or when the line is silent. False: it is over."""
        job = self._job
        if job is None:
            return False
        wire = self._wire
        request = job.series[len(job.replies)]
        if wire is None or wire.lost_because is not None:
            because = wire.lost_because if wire is not None else "not open"
            job.fail(DeviceUnreachable(f"{self.address}: {because}"))
            return False
        breaker = self._breakers.get(request.unit) if self._breakers else None
        if breaker is not None and not job.force and breaker.refuses(now_s := self._loop.time()):
            job.fail(self._left_alone(request.unit, breaker, now_s))
            return False
        if not wire.has_transactions:
            silent_s = self._silent_in_s(wire, job, breaker)
            if silent_s > 0.0:
                self._pause = self._loop.call_later(silent_s, self._proceed_or_next)
                return True
            job.babble_until_s = 0.0
        self._in_flight = True
        if breaker is None or job.force:
            self._send(wire, request, None)
            return True
        verdict = breaker.verdict(self._loop.time())
        if verdict is Verdict.WHOLE_PROBE and (wire.has_transactions or request.unit in self._knows_brief):
            verdict = Verdict.PROBE  # none is brief here, or it minds none
        reads = request.pdu[0] in _READS
        # One failure, and a unit whose turnaround is known gets no more than that, lest it holds up all others. (A
        # write may take its time.)
        suspect = verdict is Verdict.PASS and self._silence_s > 0.0 and request.unit in self._slowest_s
        if suspect or verdict is not Verdict.PASS:
            self._probed = breaker
        if not reads or not (suspect or verdict in (Verdict.PROBE, Verdict.PATIENT_PROBE)):
            self._send(wire, request, None)
            return True
        brief = request if wire.has_transactions else _brief(request)
        self._is_brief = brief is not request
        self._send(wire, brief, None if verdict is Verdict.PATIENT_PROBE else self._patience_s(brief))
        return True

    def _send(self, wire: Wire, request: Request, first_byte_s: float | None) -> None:
        self._sent = request
        wire.send(request, first_byte_s)

    def _left_alone(self, unit: int, breaker: Breaker, now_s: float) -> DeviceUnreachable:
        why = {
            Reason.TIMEOUT: "does not answer",
            Reason.BUSY: "is busy",
            Reason.BEHIND_GATEWAY: "is not reached by its gateway",
        }.get(breaker.reason, f"gives no proper answer ({breaker.reason.name.lower()})")
        again_s = max(0.0, breaker.again_s - now_s)
        return DeviceUnreachable(
            f"{self.address}: unit {unit} {why}; asked again in {again_s:.1f} s",
            breaker.reason,
            retry_within_s=again_s,
        )

    def left_alone_s(self, unit: int) -> float | None:
        breaker = self._breakers.get(unit)
        if breaker is None or not breaker.is_open:
            return None
        return max(0.0, breaker.again_s - self._loop.time())

    def _abandon(self) -> None:
        """Nobody waits for the job whose turn it is."""
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        wire = self._wire
        if self._in_flight and wire is not None:
            self._owe_silence(wire)
            wire.drop()
        self._in_flight = self._is_brief = False
        if self._probed is not None:
            self._probed.released()
            self._probed = None
        self._next()

    # ----------------------------------------------------------------------------- how a request went

    def answered(self, reply: Reply) -> None:
        job = self._job
        if job is None:
            return
        if self._form_due_s and not isinstance(reply, bytes) and self._may_be_late(job):
            self.unanswered(Failure(Reason.FRAMING))
            return
        self._in_flight = False
        self._unanswered = 0
        wire, sent = self._wire, self._sent
        replies, series = job.replies, job.series
        self._answers += 1
        if (
            wire is not None
            and sent is not None
            and (not wire.has_transactions or not self._answers % _SAMPLED)
        ):
            self._measure(wire, sent)
        if type(reply) is not bytes or self._breakers:
            self._judge(series[len(replies)].unit, reply)
        if self._is_brief:
            self._is_brief = False
            self._knows_brief.add(series[len(replies)].unit)
            if not job.done.done() and _lives(reply):
                self._proceed_or_next()
                return
        job.taken_at_ns = boot_ns()
        replies.append(reply)
        if len(replies) == len(series) or job.done.done():
            job.finish()
            self._next()
        elif self._waiting:
            self._waiting.append(job)
            self._next()
        else:
            self._proceed_or_next()

    def _may_be_late(self, job: _Job) -> bool:
        """Whether the exception that came may be a late answer to another unit's brief read: all exceptions to one
        function have the same form."""
        now_s, function = self._loop.time(), job.series[len(job.replies)].pdu[0]
        return any(head[0] == function and now_s < due_s for (head, _), due_s in self._form_due_s.items())

    def unanswered(self, failure: Failure) -> None:
        job, wire = self._job, self._wire
        if job is None or wire is None or not self._in_flight:
            return
        if wire.lost_because is None:
            if not job.force:  # a scan asks units that are not there, and with little patience
                self._judge(job.series[len(job.replies)].unit, failure)
            self._unanswered += 1
        elif self._probed is not None:
            self._probed.released()
        self._owe_silence(wire)
        wire.drop()
        self._in_flight = self._is_brief = False
        self._probed = None
        job.replies.append(failure)
        job.finish()
        self._next()

    def _judge(self, unit: int, reply: Reply) -> None:
        """Leave the unit alone for a while, or forget that it failed."""
        breaker = self._breakers.get(unit)
        if _lives(reply):
            if breaker is not None:
                del self._breakers[unit]
                self._probed = None
            return
        if breaker is None:
            breaker = self._breakers[unit] = Breaker()
        now_s = self._loop.time()
        cost_s = now_s - self._wire.sent_s if self._wire is not None else 0.0
        assert isinstance(reply, Failure)  # noqa: S101 - what is none tells of life
        breaker.failed(Reason.TIMEOUT if reply.reason in _SILENT else reply.reason, now_s, cost_s)
        if reply.code:  # it, or its gateway, answered: nothing is due any more
            self._probed = None

    def _owe_silence(self, wire: Wire) -> None:
        """No answer came. When may none come any more?"""
        sent = self._sent
        if wire.has_transactions or sent is None:
            return
        due_s = wire.sent_s + sent.latest_s
        if isinstance(self.address, SerialPort):
            due_s += _ADAPTER_S
        if self._probed is not None and sent.pdu[0] in _READS:
            self._probed.expects(due_s)
            self._form_due_s[_form_of(sent)] = due_s
        else:
            self.reply_due_s = max(self.reply_due_s, due_s)
            self._owed = True

    def _silent_in_s(self, wire: Wire, job: _Job, breaker: Breaker | None) -> float:
        """How long until the next request may be sent; 0: now, and nothing waits to be read."""
        now_s = self._loop.time()
        due_s = self.reply_due_s
        if breaker is not None:
            due_s = max(due_s, breaker.reply_due_s)
        if self._form_due_s:
            due_s = max(due_s, self._form_due_s.get(_form_of(job.series[len(job.replies)]), 0.0))
        if now_s < due_s:
            self._owed = True
            job.babble_until_s = due_s + _BABBLE_S
            return due_s - now_s
        # What came while this process was held up is still in the kernel: it goes before the request is written.
        if wire.discard_input():
            wire.heard_s = now_s
        if self._owed:
            self._owed = False
            self._quiet_from_s = now_s + max(self._silence_s, _SETTLE_S)
        quiet_s = max(self._quiet_from_s, wire.heard_s + self._silence_s) - now_s
        if quiet_s <= 0.0:
            return 0.0
        if not job.babble_until_s:
            job.babble_until_s = now_s + _BABBLE_S
        return quiet_s if now_s < job.babble_until_s else 0.0

    def _measure(self, wire: Wire, request: Request) -> None:
        took_s = self._loop.time() - wire.sent_s
        self.meter.note(took_s, request.reply_size)
        if isinstance(self.address, SerialPort):
            took_s -= self.address.frame_s(len(request.pdu)) + self.address.frame_s(request.reply_size)
        unit = request.unit
        self._slowest_s[unit] = max(took_s, _FORGET * self._slowest_s.get(unit, 0.0))

    def _patience_s(self, request: Request) -> float:
        """How long a unit that did not answer may take to begin its reply when it is tried again."""
        address, known_s = self.address, self._slowest_s.get(request.unit)
        if isinstance(address, SerialPort):
            waits_s = _UNKNOWN_PATIENCE_S if known_s is None else max(_PATIENCE * known_s, _LEAST_PATIENCE_S)
            return address.frame_s(len(request.pdu)) + _ADAPTER_S + waits_s
        return _NETWORK_PATIENCE_S + (_PATIENCE * known_s if known_s is not None else 0.0)

    # ------------------------------------------------------------------------------------- opening

    def _looks_dead(self) -> bool:
        """A connection that brought nothing may be half open. With other users on it, be slower to blame it."""
        is_stream = isinstance(self.address, HostPort) and self.address.framing != "udp"
        return is_stream and self._unanswered >= (1 if len(self.users) == 1 else 3)

    async def _opened(self, timeout_s: float) -> Wire:
        address, loop = self.address, self._loop
        if isinstance(address, SerialPort):
            serial = AsciiWire(loop, self) if address.framing == "ascii" else RtuWire(loop, self)
            open_serial(address, lambda: serial)
            return serial
        try:
            async with asyncio.timeout(timeout_s):
                if address.framing == "udp":
                    datagrams = DatagramWire(loop, self)
                    await loop.create_datagram_endpoint(
                        lambda: datagrams, remote_addr=(address.host, address.port)
                    )
                    return datagrams
                wire: MbapWire | RtuWire | AsciiWire
                match address.framing:
                    case "rtu_over_tcp":
                        wire = RtuWire(loop, self)
                    case "ascii_over_tcp":
                        wire = AsciiWire(loop, self)
                    case _:
                        wire = MbapWire(loop, self)
                await loop.create_connection(lambda: wire, address.host, address.port)
                return wire
        except TimeoutError as err:
            raise DeviceUnreachable(
                f"{address}: no connection within {timeout_s:g} s", Reason.TIMEOUT
            ) from err
        except OSError as err:
            raise DeviceUnreachable(f"{address}: {err}") from err


def _form_of(request: Request) -> _Form:
    return request.reply_head, request.reply_size


def _brief(request: Request) -> Request:
    """The shortest read of the same kind at the same address that can be told from this one by its reply, or (there is
    none) the same: two registers, since many values take two and some devices keep silent about a half; eight bits."""
    function, quantity = request.pdu[0], int.from_bytes(request.pdu[3:], "big")
    of_bits = function in _BITS
    enough = 8 if of_bits else 2 if quantity > 2 else 1
    if len(request.pdu) != _READ_SIZE or quantity <= enough:
        return request
    data = 1 if of_bits else 2 * enough
    return Request(
        request.unit, request.pdu[:3] + enough.to_bytes(2, "big"), bytes([function, data]), 2 + data,
        request.timeout_s, request.latest_s,
    )  # fmt: skip


def _lives(reply: Reply) -> bool:
    """It is an answer of the unit itself, and it has time for us."""
    return isinstance(reply, bytes) or reply.reason is Reason.EXCEPTION


class Line:
    """A line as one user has it. Made by `line_of`, given back by `release`."""

    def __init__(self, address: Address, user: str) -> None:
        self.address = address
        self._user = user
        self._owner = _owner_of(address, address.key, user)

    async def open(self, timeout_s: float) -> None:
        """Open it, or leave it open. Raises `DeviceUnreachable`; `ConfigError` if the port's name now means a port
        that another user set up otherwise."""
        # A name may mean another port after a replug. Nobody is served by a port that he did not name.
        key = self.address.key
        if key != self._owner.key:
            _leave(self._owner, self._user)
            self._owner = _owner_of(self.address, key, self._user)
        await self._owner.open(timeout_s)

    def exchange(self, series: Sequence[Request], *, force: bool = False) -> Coroutine[Any, Any, Replies]:
        """Ask the series. Raises `DeviceUnreachable` if the line is not open, or the unit is left alone because it
        did not answer; with `force` it is asked all the same."""
        return self._owner.exchange(series, force)

    def cost(self) -> Cost:
        """What a request and a register cost here, as measured."""
        return self._owner.meter.cost

    def left_alone_s(self, unit: int) -> float | None:
        """For how long yet nobody asks this unit, where it failed too often."""
        return self._owner.left_alone_s(unit)

    def release(self, user: str) -> None:
        """One user less; the last closes it."""
        _leave(self._owner, user)


_owners: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, _Owner]] = weakref.WeakKeyDictionary()
_due_s: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, float]] = weakref.WeakKeyDictionary()
"""Until when a late reply may come on a line that nobody owns any more: its next owner waits for it."""


def line_of(address: Address, user: str) -> Line:
    """The line at this address, with one user more. Raises `ConfigError` if another user set it up otherwise."""
    return Line(address, user)


def _owner_of(address: Address, key: str, user: str) -> _Owner:
    loop = asyncio.get_running_loop()
    owners = _owners.setdefault(loop, {})
    owner = owners.get(key)
    if owner is not None and owner.address.key != key:
        # His port was replugged and has this name no more (two adapters that swapped theirs): who holds him looks anew.
        del owners[key]
        owner.close()
        owner = None
    if owner is None:
        owner = owners[key] = _Owner(address, key)
        owner.reply_due_s = _due_s.get(loop, {}).pop(key, 0.0)
    elif owner.address.settings != address.settings:
        raise ConfigError(
            f"{user} wants {address}, but {', '.join(owner.users)} on the same line has {owner.address}; "
            "all devices of one line need the same settings"
        )
    owner.users.append(user)
    return owner


def _leave(owner: _Owner, user: str) -> None:
    if user in owner.users:
        owner.users.remove(user)
    if not owner.users:
        loop = asyncio.get_running_loop()
        owners = _owners.get(loop, {})
        if owners.get(owner.key) is owner:
            del owners[owner.key]
        owner.close()
        if owner.quiet_until_s() > loop.time():
            _due_s.setdefault(loop, {})[owner.key] = owner.quiet_until_s()
