"""What travels on a Modbus line: a request as bytes, and the reply to it found among the bytes that come.

Rules:

1. A reply counts only if it is the one asked for: transaction (TCP, UDP), unit, function, length, and check (RTU,
   ASCII). Anything else is skipped and, if nothing better comes, told as the reason.
2. One request at a time. How it went is told once, by `answered` or by `unanswered`.
3. What is kept of what comes is bounded, whatever comes.
4. An adapter on two wires may hear itself: its own request, come back, is no reply. Where the two cannot be told
   apart (the confirmation of a single write is its request), a line that has been heard to echo gives two copies.

pymodbus computes the CRC. Its client is not used to receive: it reports a failed check, a foreign frame and silence
alike as a timeout, and decodes one register at a time.
"""

from __future__ import annotations

import asyncio
import binascii
import os
import random
import struct
from abc import ABC, abstractmethod
from typing import Final, Protocol, TypeAlias, cast

import msgspec
from pymodbus.framer import FramerRTU

from drivers.contract import Reason
from drivers.modbus_port import SerialTransport

_MBAP: Final = struct.Struct(">HHHB")  #: transaction, protocol (0), bytes that follow, unit
_MBAP_SIZE: Final = 7
_LENGTH_AT: Final = 6  #: the length counts what follows it: unit and PDU
_MAX_ADU: Final = 260  #: Modbus messaging on TCP/IP 1.0b, 4.1
_MAX_PDU: Final = 253  #: Modbus application protocol 1.1b3, 4.1
_BUFFER_SIZE: Final = 4 * _MAX_ADU
_MAX_ASCII: Final = 513  #: Modbus over serial line 1.02, 2.5.2.1
_MOST_READS: Final = 64  #: of a flush
_BUSY: Final = (5, 6)  #: acknowledge (it takes long), server device busy (application protocol 1.1b3, 7)
_BEHIND_GATEWAY: Final = (0x0A, 0x0B)  #: path unavailable, target device failed to respond
_WRITES_ONE: Final = (5, 6, 22)  #: function codes whose confirmation is the request, word for word


class Request(msgspec.Struct, frozen=True, gc=False):
    """A request's PDU and the reply it may have."""

    unit: int
    pdu: bytes
    reply_head: bytes  #: what the reply's PDU begins with
    reply_size: int  #: bytes of the reply's PDU; 0: the device decides (identification, 43/14)
    timeout_s: float
    latest_s: float  #: without transactions: no reply comes later than this after the request

    def __post_init__(self) -> None:
        if not 0 <= self.unit <= 255 or not 1 <= len(self.pdu) <= _MAX_PDU or self.timeout_s <= 0:
            raise ValueError(f"no such request: unit {self.unit}, {len(self.pdu)} bytes, {self.timeout_s} s")


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


class Listener(Protocol):
    """Who sends requests over a wire."""

    def answered(self, reply: Reply) -> None:
        """The reply to the request under way is here, or the device's refusal."""

    def unanswered(self, failure: Failure) -> None:
        """The request under way ran out of time, or its connection was lost."""


class Wire(ABC):
    """One open connection, and the request under way on it."""

    has_transactions = True  #: a late reply is known for what it is

    def __init__(self, loop: asyncio.AbstractEventLoop, listener: Listener) -> None:
        self._loop = loop
        self._listener = listener
        self._transport: asyncio.BaseTransport | None = None
        self._request: Request | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._deadline_s = 0.0
        self._sent_s = 0.0
        self._patient = True
        self.lost_because: str | None = None
        self.heard_s = 0.0  #: loop time of the last byte

    # ------------------------------------------------------------------------------- for the line

    @property
    def sent_s(self) -> float:
        """When the last request was handed to the kernel."""
        return self._sent_s

    def send(self, request: Request, first_byte_s: float | None = None) -> None:
        """Ask. With `first_byte_s`: wait no longer than that if not even the beginning of a reply comes."""
        self._request = request
        if self._transport is not None:
            self._write(request)
        # Measured after the write: the request did not leave later than now.
        self._sent_s = now_s = self._loop.time()
        self._patient = first_byte_s is None
        timeout_s = request.timeout_s if first_byte_s is None else min(first_byte_s, request.timeout_s)
        self._deadline_s = deadline_s = now_s + timeout_s
        # One timer serves request after request: it finds the deadline moved and sets itself again.
        if self._timer is not None and self._timer.when() > deadline_s:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self._loop.call_at(deadline_s, self._on_timer)

    def drop(self) -> None:
        """Nobody waits for the reply any more."""
        self._request = None

    def discard_input(self) -> int:
        """Throw away what came and was not read yet; how many bytes it was."""
        transport = self._transport
        if transport is None:
            return 0
        if isinstance(transport, SerialTransport):
            return transport.discard_input()
        return _discard_from(transport)

    def close(self, because: str = "closed") -> None:
        self.lost_because = self.lost_because or because
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        transport, self._transport = self._transport, None
        if transport is not None:
            cast(
                asyncio.Transport, transport
            ).abort()  # a datagram transport has it, too, and is of no common class
        self._unanswered(Reason.DISCONNECTED)

    # ------------------------------------------------------------------------------- asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.close(str(exc) if exc else "the other side closed it")

    # ------------------------------------------------------------------------------- one request

    @abstractmethod
    def _write(self, request: Request) -> None:
        """Frame and write it; make ready for its reply."""

    @abstractmethod
    def _doubt(self) -> Reason:
        """What a request that ran out of time met: silence, or something that was no answer."""

    def _on_timer(self) -> None:
        self._timer = None
        request = self._request
        if request is None:
            return
        now_s = self._loop.time()
        if now_s >= self._deadline_s and not self._patient and self._doubt() is not Reason.TIMEOUT:
            self._patient = True  # something is coming: give it the time that a whole reply takes
            self._deadline_s = self._sent_s + request.timeout_s
        if now_s < self._deadline_s:
            self._timer = self._loop.call_at(self._deadline_s, self._on_timer)
            return
        self._unanswered(self._doubt())

    def _unanswered(self, reason: Reason) -> None:
        if self._request is not None:
            self._listener.unanswered(Failure(reason))

    def _answered(self, reply: Reply) -> None:
        self._request = None
        self._listener.answered(reply)


def _discard_from(transport: asyncio.BaseTransport) -> int:
    """What waits in a socket. asyncio reads it in a callback only, so between callbacks it may be read here."""
    sock = transport.get_extra_info("socket")
    if sock is None:
        return 0
    thrown = 0
    for _ in range(_MOST_READS):
        try:
            data = os.read(sock.fileno(), _BUFFER_SIZE)
        except OSError:
            break  # nothing more, or lost: then asyncio meets the same error
        if not data:
            break
        thrown += len(data)
    return thrown


def _exception(code: int) -> Failure:
    if code in _BUSY:
        return Failure(Reason.BUSY, code)
    return Failure(Reason.BEHIND_GATEWAY if code in _BEHIND_GATEWAY else Reason.EXCEPTION, code)


# ------------------------------------------------------------------------------------- with transactions


class MbapWire(Wire, asyncio.BufferedProtocol):
    """Modbus TCP: a header with a transaction id before every PDU. One buffer receives; nothing is allocated."""

    def __init__(self, loop: asyncio.AbstractEventLoop, listener: Listener) -> None:
        super().__init__(loop, listener)
        self._transaction = 0
        self._head = b""
        self._size = 0
        self._buffer = bytearray(_BUFFER_SIZE)
        self._view = memoryview(self._buffer)
        self._have = 0
        self._foreign = False

    def _write(self, request: Request) -> None:
        self._transaction = transaction = self._transaction % 0xFFFF + 1
        pdu = request.pdu
        self._head = _MBAP.pack(transaction, 0, request.reply_size + 1, request.unit) + request.reply_head
        self._size = request.reply_size + _MBAP_SIZE if request.reply_size else 0
        self._foreign = False
        transport = cast(asyncio.Transport, self._transport)
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
                self._have = 0
                self._unanswered(Reason.FRAMING)
                self.close()
                return
            if self._have < end:
                return
            frame = bytes(self._view[:end])
            rest = self._have - end
            self._buffer[:rest] = self._buffer[end : self._have]
            self._have = rest
            self._take(frame, transaction, unit, end)

    def _take(self, frame: bytes, transaction: int, unit: int, end: int) -> None:
        request = self._request
        if request is None or transaction != self._transaction:
            return  # the reply to a request that nobody waits for
        pdu = frame[_MBAP_SIZE:]
        if frame.startswith(self._head) and end == self._size:
            self._answered(frame[len(self._head) :])
        elif unit == request.unit and len(pdu) == 2 and pdu[0] == request.pdu[0] | 0x80:
            self._answered(_exception(pdu[1]))
        elif not self._size and unit == request.unit and pdu.startswith(request.reply_head):
            self._answered(pdu[len(request.reply_head) :])
        else:
            self._foreign = True


class DatagramWire(Wire, asyncio.DatagramProtocol):
    """Modbus over UDP: a frame of Modbus TCP in each datagram. The socket is connected, so that the kernel lets in
    what the asked host and port sent and nothing else. A lost datagram is a timeout."""

    def __init__(self, loop: asyncio.AbstractEventLoop, listener: Listener) -> None:
        super().__init__(loop, listener)
        # A reply to an earlier socket's request may come to this one, if the port number is used again.
        self._transaction = random.randrange(0x10000)
        self._foreign = False

    def _write(self, request: Request) -> None:
        self._transaction = transaction = self._transaction % 0xFFFF + 1
        self._foreign = False
        pdu = request.pdu
        transport = cast(asyncio.DatagramTransport, self._transport)
        transport.sendto(_MBAP.pack(transaction, 0, len(pdu) + 1, request.unit) + pdu)

    def _doubt(self) -> Reason:
        return Reason.FRAMING if self._foreign else Reason.TIMEOUT

    def datagram_received(self, data: bytes, addr: object) -> None:
        request = self._request
        if request is None:
            return
        if len(data) < _MBAP_SIZE + 1:
            self._foreign = True
            return
        transaction, protocol, length, unit = _MBAP.unpack_from(data)
        if transaction != self._transaction:
            return  # the reply to a request that nobody waits for
        pdu = data[_MBAP_SIZE:]
        if protocol or length != len(data) - _LENGTH_AT or unit != request.unit:
            self._foreign = True
        elif pdu.startswith(request.reply_head) and len(pdu) == (request.reply_size or len(pdu)):
            self._answered(pdu[len(request.reply_head) :])
        elif len(pdu) == 2 and pdu[0] == request.pdu[0] | 0x80:
            self._answered(_exception(pdu[1]))
        else:
            self._foreign = True

    def error_received(self, exc: Exception) -> None:
        """ICMP told that nobody listens there. That is the device's state, not the socket's. It may be told from
        within the write."""
        self._loop.call_soon(self._refused, self._transaction)

    def _refused(self, transaction: int) -> None:
        if transaction == self._transaction:
            self._unanswered(Reason.DISCONNECTED)


# ------------------------------------------------------------------------------------ without transactions


class _PlainWire(Wire, asyncio.Protocol):
    """A serial line, here or behind a transparent gateway. What is expected is known, so it is looked for in all that
    came since the request."""

    has_transactions = False
    _most = _BUFFER_SIZE

    def __init__(self, loop: asyncio.AbstractEventLoop, listener: Listener) -> None:
        super().__init__(loop, listener)
        self._frame = b""  #: the request as sent
        self._echo_like = False  #: the reply may look just like the request
        self._buffer = b""
        self._check_failed = False
        self._echoes: bool | None = None  #: whether the line was heard to echo; None: not known yet

    @abstractmethod
    def _framed(self, request: Request) -> bytes:
        """The request as it travels."""

    @abstractmethod
    def _reply_frame_size(self, request: Request) -> int:
        """The reply as it travels."""

    @abstractmethod
    def _find(self, request: Request, start: int) -> Reply | None:
        """The reply in what came, from `start` on; notes a failed check."""

    def _write(self, request: Request) -> None:
        self._buffer = b""
        self._check_failed = False
        self._frame = frame = self._framed(request)
        head = 1 + len(request.reply_head)
        self._echo_like = (
            self._reply_frame_size(request) == len(frame)
            and (bytes([request.unit]) + request.pdu)[:head] == bytes([request.unit]) + request.reply_head
        )
        cast(asyncio.Transport, self._transport).write(frame)

    def _doubt(self) -> Reason:
        if self._check_failed:
            return Reason.CRC
        return Reason.FRAMING if self._buffer.replace(self._frame, b"", 1) else Reason.TIMEOUT

    def data_received(self, data: bytes) -> None:
        self.heard_s = self._loop.time()
        request = self._request
        if request is None:
            return  # late, or noise between frames
        self._buffer = (self._buffer + data)[-self._most :]
        start, echoed = self._after_echo(request)
        if start < 0:
            return
        reply = self._find(request, start)
        if reply is not None:
            if not self._echo_like:
                self._echoes = echoed
            self._answered(reply)

    def _after_echo(self, request: Request) -> tuple[int, bool]:
        """Where to look from (-1: not yet), and whether the request was heard before that."""
        at = self._buffer.find(self._frame)
        if self._echo_like:
            # Not known yet: a write's confirmation is believed (its driver reads back), a read's values are not.
            if self._echoes is False or (self._echoes is None and request.pdu[0] in _WRITES_ONE):
                return 0, False
            return (at + len(self._frame), True) if at >= 0 else (0, False)
        if at >= 0:
            return at + len(self._frame), True
        partly = self._echoes is not False and self._frame.startswith(self._buffer)
        return (-1, False) if partly else (0, False)


class RtuWire(_PlainWire):
    """Modbus RTU: unit, PDU, CRC, and nothing that tells where a frame begins."""

    def _framed(self, request: Request) -> bytes:
        body = bytes([request.unit]) + request.pdu
        return body + FramerRTU.compute_CRC(body).to_bytes(2, "big")

    def _reply_frame_size(self, request: Request) -> int:
        return request.reply_size + 3

    def _find(self, request: Request, start: int) -> Reply | None:
        unit = bytes([request.unit])
        if request.reply_size:
            reply = self._checked(unit + request.reply_head, request.reply_size + 3, start)
        else:
            reply = self._of_any_size(unit + request.reply_head, start)
        if reply is not None:
            return reply
        refusal = self._checked(unit + bytes([request.pdu[0] | 0x80]), 5, start)
        return None if refusal is None else _exception(refusal[0])

    def _checked(self, head: bytes, size: int, start: int) -> bytes | None:
        """What follows `head` in the first frame of this size that passes its check."""
        buffer = self._buffer
        start = buffer.find(head, start)
        while start >= 0 and len(buffer) >= start + size:
            body, crc = buffer[start : start + size - 2], buffer[start + size - 2 : start + size]
            if FramerRTU.check_CRC(body, int.from_bytes(crc, "big")):
                return body[len(head) :]
            self._check_failed = True
            start = buffer.find(head, start + 1)
        return None

    def _of_any_size(self, head: bytes, start: int) -> bytes | None:
        """What follows `head` where all that came up to now passes the check: the frame's end is where it does."""
        start = self._buffer.find(head, start)
        body, crc = self._buffer[max(start, 0) : -2], self._buffer[-2:]
        if start < 0 or len(body) <= len(head) or not FramerRTU.check_CRC(body, int.from_bytes(crc, "big")):
            return None
        return body[len(head) :]


class AsciiWire(_PlainWire):
    """Modbus ASCII: a colon, unit, PDU and LRC in hexadecimal, carriage return, line feed (Modbus over serial line
    1.02, 2.5.2)."""

    _most = 4 * _MAX_ASCII

    def _framed(self, request: Request) -> bytes:
        body = bytes([request.unit]) + request.pdu
        return b":" + binascii.hexlify(body + bytes([-sum(body) & 0xFF])).upper() + b"\r\n"

    def _reply_frame_size(self, request: Request) -> int:
        return 2 * (request.reply_size + 2) + 3

    def _find(self, request: Request, start: int) -> Reply | None:
        buffer = self._buffer
        while (end := buffer.find(b"\r\n", start)) >= 0:
            begin = buffer.rfind(b":", start, end)
            start = end + 2
            if begin < 0:
                continue
            try:
                body = binascii.unhexlify(buffer[begin + 1 : end])
            except ValueError:  # a character that is not hexadecimal, or one too few
                self._check_failed = True
                continue
            if len(body) < 4 or sum(body) & 0xFF:
                self._check_failed = True
                continue
            pdu = body[1:-1]
            if body[0] != request.unit:
                continue
            if pdu.startswith(request.reply_head) and len(pdu) == (request.reply_size or len(pdu)):
                return pdu[len(request.reply_head) :]
            if len(pdu) == 2 and pdu[0] == request.pdu[0] | 0x80:
                return _exception(pdu[1])
        return None
