"""One owner per physical Modbus line: a serial port, a serial gateway behind TCP, or a TCP device.

Rules:

1. A line is shared by all devices that name it (two names of one serial port are one line) and carries one request
   at a time, first come first served. It opens with its first user and closes with its last.
2. A reply counts only if it is the one asked for: transaction id (TCP), unit, function, length and check (RTU).
   Anything else is skipped and, if nothing better comes, told as the reason.
3. RTU replies carry no transaction id, so a late one looks like the answer to the next request. After a request that
   went unanswered the line stays silent until the latest moment that a reply may still come, and what came is thrown
   away. (Measured: without this, 20 of 20 late replies were taken for another register's value.)
4. A series of requests is sent without going back to the caller in between; it ends at the first that gets no
   answer, so that a silent unit holds up the others on its line for one timeout only.

pymodbus makes the requests (its PDU classes and framers), computes the CRC and drives the serial port. Its client is
not used to receive: it reports a failed check, a foreign frame and silence alike as a timeout, and decodes one
register at a time.
"""

from __future__ import annotations

import asyncio
import errno
import struct
import termios
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final, TypeAlias, cast

import msgspec
from pymodbus.framer import FramerRTU
from pymodbus.transport.serialtransport import create_serial_connection

from drivers.contract import ConfigError, DeviceUnreachable, Reason, boot_ns
from drivers.modbus_address import Address, HostPort, SerialPort

__all__ = ["Address", "Failure", "HostPort", "Line", "Replies", "Reply", "Request", "SerialPort", "line_of"]

_MBAP: Final = struct.Struct(">HHHB")  #: transaction, protocol (0), bytes that follow, unit
_MBAP_SIZE: Final = 7
_LENGTH_AT: Final = 6  #: the length counts what follows it: unit and PDU
_MAX_ADU: Final = 260  #: Modbus messaging on TCP/IP 1.0b, 4.1
_BUFFER_SIZE: Final = 4 * _MAX_ADU
_BABBLE_S: Final = 2.0  #: a line that never falls silent is used again after this; the checks must do


class Request(msgspec.Struct, frozen=True, gc=False):
    """A request's PDU and the reply it may have."""

    unit: int
    pdu: bytes
    reply_head: bytes  #: what the reply's PDU begins with
    reply_size: int  #: bytes of the reply's PDU
    timeout_s: float
    latest_s: float  #: on RTU: no reply comes later than this after the request


class Failure(msgspec.Struct, frozen=True, gc=False):
    """Why there is no reply. `code` is the exception code where the device sent one."""

    reason: Reason
    code: int = 0


Reply: TypeAlias = bytes | Failure
"""What follows the reply's head, or why there is none."""


class Replies(msgspec.Struct, frozen=True, gc=False):
    """The replies to the first requests of a series, in order: to all, or up to the one that got no answer."""

    replies: list[Reply]
    taken_at_ns: int  #: when the last answer arrived; 0 where there was none


class _Wire(ABC):
    """One open connection, and the series of requests under way on it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, silence_s: float) -> None:
        self._loop = loop
        self._silence_s = silence_s
        self._transport: asyncio.Transport | None = None
        self._series: Sequence[Request] = ()
        self._request: Request | None = None
        self._replies: list[Reply] = []
        self._done: asyncio.Future[Replies] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._taken_at_ns = 0
        self._deadline_s = 0.0
        self._sent_s = 0.0
        self.lost_because: str | None = None
        self.unanswered = 0  #: requests since the last proper answer
        self.answer_due_s = 0.0  #: loop time until which a reply may still come to a request nobody waits for
        self.heard_s = 0.0  #: loop time of the last byte

    # ------------------------------------------------------------------------------- for the line

    @property
    def made(self) -> bool:
        return self._transport is not None

    def ask(self, series: Sequence[Request]) -> asyncio.Future[Replies]:
        """Send the series. The caller holds the line's lock and calls `forget` if it stops waiting."""
        self._done = done = self._loop.create_future()
        self._series = series
        self._replies = []
        self._taken_at_ns = 0
        self._send(series[0])
        return done

    def forget(self) -> None:
        """Nobody waits for the series any more."""
        if self._done is not None:
            self._owe_silence()
            self._done = self._request = None

    def close(self) -> None:
        self.lost_because = self.lost_because or "closed"
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
        self._end(Failure(Reason.DISCONNECTED))

    # ------------------------------------------------------------------------------- asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost_because = self.lost_because or (str(exc) if exc else "the other side closed it")
        self._transport = None
        self.close()

    # ------------------------------------------------------------------------------- one request

    @abstractmethod
    def _write(self, transport: asyncio.Transport, request: Request) -> None:
        """Frame and write it; make ready for its reply."""

    @abstractmethod
    def _doubt(self) -> Reason:
        """What a request that ran out of time met: silence, or something that was no answer."""

    def _send(self, request: Request) -> None:
        self._request = request
        self._sent_s = now_s = self._loop.time()
        self._deadline_s = deadline_s = now_s + request.timeout_s
        # One timer serves request after request: it finds the deadline moved and sets itself again.
        if self._timer is not None and self._timer.when() > deadline_s:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self._loop.call_at(deadline_s, self._on_timer)
        if self._transport is not None:
            self._write(self._transport, request)

    def _on_timer(self) -> None:
        self._timer = None
        if self._request is None:
            return
        if self._loop.time() < self._deadline_s:
            self._timer = self._loop.call_at(self._deadline_s, self._on_timer)
            return
        self._owe_silence()
        self.unanswered += 1
        self._end(Failure(self._doubt()))

    def _answered(self, reply: Reply) -> None:
        """The reply to the request under way is here."""
        self._taken_at_ns = boot_ns()
        self.unanswered = 0
        replies = self._replies
        replies.append(reply)
        sent = len(replies)
        if sent == len(self._series):
            self._finish()
            return
        self._request = None
        if self._silence_s:
            self._loop.call_later(self._silence_s, self._send_next, self._done)
        else:
            self._send(self._series[sent])

    def _send_next(self, series: asyncio.Future[Replies] | None) -> None:
        if series is not None and self._done is series:
            self._send(self._series[len(self._replies)])

    def _end(self, failure: Failure) -> None:
        if self._done is not None:
            self._replies.append(failure)
            self._finish()

    def _finish(self) -> None:
        done = self._done
        self._done = self._request = None
        if done is not None and not done.done():
            done.set_result(Replies(self._replies, self._taken_at_ns))

    def _owe_silence(self) -> None:
        request = self._request
        if request is not None:
            # If this process was held up, the request may have gone out late: then its reply is due later too.
            held_up_s = self._loop.time() + request.latest_s - request.timeout_s
            self.answer_due_s = max(self._sent_s + request.latest_s, held_up_s)


class _MbapWire(_Wire, asyncio.BufferedProtocol):
    """Modbus TCP: a header with a transaction id before every PDU. One buffer receives; nothing is allocated."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop, silence_s=0.0)
        self._transaction = 0
        self._head = b""
        self._size = 0
        self._buffer = bytearray(_BUFFER_SIZE)
        self._view = memoryview(self._buffer)
        self._have = 0
        self._foreign = False

    def _write(self, transport: asyncio.Transport, request: Request) -> None:
        self._transaction = transaction = self._transaction % 0xFFFF + 1
        pdu = request.pdu
        self._head = _MBAP.pack(transaction, 0, request.reply_size + 1, request.unit) + request.reply_head
        self._size = request.reply_size + _MBAP_SIZE
        self._foreign = False
        transport.write(_MBAP.pack(transaction, 0, len(pdu) + 1, request.unit) + pdu)

    def _doubt(self) -> Reason:
        return Reason.FRAMING if self._have or self._foreign else Reason.TIMEOUT

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view[self._have :] if self._have else self._view

    def buffer_updated(self, nbytes: int) -> None:
        have = self._have + nbytes
        # Nearly always: exactly the reply asked for, in one piece.
        if have == self._size and self._request is not None and self._buffer.startswith(self._head):
            self._have = 0
            self._answered(bytes(self._view[len(self._head) : have]))
            return
        self._have = have
        self._take_frames()

    def _take_frames(self) -> None:
        while self._have >= _MBAP_SIZE:
            transaction, protocol, length, unit = _MBAP.unpack_from(self._buffer)
            end = _LENGTH_AT + length
            if protocol or not 2 <= length <= _MAX_ADU - _LENGTH_AT:
                # Where the next frame begins cannot be told any more.
                self.lost_because = "the other side sent what is not Modbus TCP"
                self._end(Failure(Reason.FRAMING))
                self.close()
                return
            if self._have < end:
                return
            frame = bytes(self._view[:end])
            rest = self._have - end
            self._buffer[:rest] = self._buffer[end : self._have]
            self._have = rest
            request = self._request
            if request is None or transaction != self._transaction:
                continue  # the reply to a request that nobody waits for
            pdu = frame[_MBAP_SIZE:]
            if frame.startswith(self._head) and end == self._size:
                self._answered(frame[len(self._head) :])
            elif unit == request.unit and len(pdu) == 2 and pdu[0] == request.pdu[0] | 0x80:
                self._answered(Failure(Reason.EXCEPTION, pdu[1]))
            else:
                self._foreign = True


class _RtuWire(_Wire, asyncio.Protocol):
    """Modbus RTU: unit, PDU, CRC, and nothing that tells where a frame begins. What is expected is known, so it is
    looked for in all that came since the request."""

    def __init__(self, loop: asyncio.AbstractEventLoop, silence_s: float) -> None:
        super().__init__(loop, silence_s)
        self._buffer = b""
        self._crc_failed = False

    def _write(self, transport: asyncio.Transport, request: Request) -> None:
        self._buffer = b""
        self._crc_failed = False
        transport.write(_framed(request))

    def _doubt(self) -> Reason:
        if self._crc_failed:
            return Reason.CRC
        return Reason.FRAMING if self._buffer else Reason.TIMEOUT

    def data_received(self, data: bytes) -> None:
        self.heard_s = self._loop.time()
        request = self._request
        if request is None:
            return  # late, or noise between frames
        self._buffer = (self._buffer + data)[-_BUFFER_SIZE:]
        unit = bytes([request.unit])
        reply = self._find(unit + request.reply_head, request.reply_size + 3)
        if reply is not None:
            self._answered(reply)
            return
        refusal = self._find(unit + bytes([request.pdu[0] | 0x80]), 5)
        if refusal is not None:
            self._answered(Failure(Reason.EXCEPTION, refusal[0]))

    def _find(self, head: bytes, size: int) -> bytes | None:
        """What follows `head` in the first frame of this size that passes its check."""
        start = self._buffer.find(head)
        while start >= 0 and len(self._buffer) >= start + size:
            body, crc = self._buffer[start : start + size - 2], self._buffer[start + size - 2 : start + size]
            if FramerRTU.check_CRC(body, int.from_bytes(crc, "big")):
                return body[len(head) :]
            self._crc_failed = True
            start = self._buffer.find(head, start + 1)
        return None


def _framed(request: Request) -> bytes:
    body = bytes([request.unit]) + request.pdu
    return body + FramerRTU.compute_CRC(body).to_bytes(2, "big")


class Line:
    """A line and its lock. Made by `line_of`, given back by `release`."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.users: list[str] = []
        self._lock = asyncio.Lock()
        self._wire: _MbapWire | _RtuWire | None = None

    async def open(self, timeout_s: float) -> None:
        """Open it, or leave it open. Raises `DeviceUnreachable`."""
        async with self._lock:
            wire = self._wire
            if wire is not None and wire.lost_because is None and not self._looks_dead(wire):
                return
            if wire is not None:
                wire.close()
            self._wire = await self._opened(timeout_s)
            if wire is not None:
                self._wire.answer_due_s = wire.answer_due_s  # the slave knows nothing of a new connection

    async def exchange(self, series: Sequence[Request]) -> Replies:
        """Ask the series. Raises `DeviceUnreachable` if the line is not open."""
        async with self._lock:
            wire = self._wire
            if isinstance(wire, _RtuWire):
                await self._silence(wire)
            if wire is None or wire.lost_because is not None:
                because = wire.lost_because if wire else "not open"
                raise DeviceUnreachable(f"{self.address}: {because}")
            try:
                return await wire.ask(series)
            finally:
                wire.forget()

    def release(self, user: str) -> None:
        """One user less; the last closes it."""
        if user in self.users:
            self.users.remove(user)
        if not self.users:
            lines = _lines.get(asyncio.get_running_loop(), {})
            if lines.get(self.address.key) is self:
                del lines[self.address.key]
            if self._wire is not None:
                self._wire.close()
                self._wire = None

    def _looks_dead(self, wire: _Wire) -> bool:
        """A connection that brought nothing may be half open. With other users on it, be slower to blame it."""
        return isinstance(self.address, HostPort) and wire.unanswered >= (1 if len(self.users) == 1 else 3)

    async def _opened(self, timeout_s: float) -> _MbapWire | _RtuWire:
        loop = asyncio.get_running_loop()
        address = self.address
        wire: _MbapWire | _RtuWire
        try:
            async with asyncio.timeout(timeout_s):
                if isinstance(address, SerialPort):
                    wire = _RtuWire(loop, address.silence_s)
                    made: _MbapWire | _RtuWire = wire
                    await create_serial_connection(
                        loop,
                        lambda: made,
                        address.device,
                        baudrate=address.baud,
                        bytesize=address.data_bits,
                        parity=address.parity,
                        stopbits=address.stop_bits,
                        timeout=timeout_s,
                    )
                    await asyncio.sleep(
                        0
                    )  # pymodbus' transport says `connection_made` on the loop's next turn
                    await asyncio.sleep(0)
                else:
                    wire = _RtuWire(loop, 0.0) if address.framing == "rtu_over_tcp" else _MbapWire(loop)
                    made = wire
                    await loop.create_connection(lambda: made, address.host, address.port)
        except TimeoutError as err:
            raise DeviceUnreachable(
                f"{address}: no connection within {timeout_s:g} s", Reason.TIMEOUT
            ) from err
        except OSError as err:
            # pyserial's exception is an OSError with the number, but never a PermissionError.
            denied = err.errno == errno.EACCES and isinstance(address, SerialPort)
            remedy = "; add the gateway's user to the port's group (often dialout)" if denied else ""
            raise DeviceUnreachable(f"{address}: {err}{remedy}") from err
        except (termios.error, ValueError) as err:
            raise ConfigError(
                f"{address}: the port does not take these settings ({err}); a pty, for one, has no parity"
            ) from err
        return wire

    async def _silence(self, wire: _RtuWire) -> None:
        """Until no late reply can come, and then until nothing comes."""
        loop = asyncio.get_running_loop()
        give_up_s = max(wire.answer_due_s, loop.time()) + _BABBLE_S
        gap_s = self.address.silence_s if isinstance(self.address, SerialPort) else 0.0
        while True:
            now_s = loop.time()
            quiet_from_s = max(wire.answer_due_s, wire.heard_s + gap_s)
            if now_s >= quiet_from_s or now_s >= give_up_s:
                return
            await asyncio.sleep(quiet_from_s - now_s)
            # If the loop was held up, what came meanwhile is still in the kernel: a whole turn brings it in.
            await asyncio.sleep(0)
            await asyncio.sleep(0)


_lines: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, Line]] = weakref.WeakKeyDictionary()


def line_of(address: Address, user: str) -> Line:
    """The line at this address, with one user more. Raises `ConfigError` if another user set it up otherwise."""
    lines = _lines.setdefault(asyncio.get_running_loop(), {})
    line = lines.setdefault(address.key, Line(address))
    if line.address.settings != address.settings:
        raise ConfigError(
            f"{user} wants {address}, but {', '.join(line.users)} on the same line has {line.address}; "
            "all devices of one line need the same settings"
        )
    line.users.append(user)
    return line
