"""Cuts a stream of bytes into frames, and finds its way back after noise. Pure: bytes in, frames out, no clock.

Rules: a frame is whole or it is nothing; what is thrown away is counted; the buffer never holds more than one frame
and one chunk. `None` among the frames stands for one that was lost while in step (too long, or its check failed), so
that its reader can say so; out of step the same bytes only mean that no frame begins there.
"""

from __future__ import annotations

import binascii
import dataclasses
import functools
import operator
import zlib
from collections.abc import Callable
from typing import Literal, Protocol

Check = Literal["none", "xor", "sum8", "lrc", "crc16_modbus", "crc16_ccitt", "crc16_xmodem", "crc32"]
ByteOrder = Literal["little", "big"]


@dataclasses.dataclass(slots=True)
class LineCounts:
    """What was seen on a line since its driver was built; never reset."""

    frames: int = 0  #: whole frames
    framing_errors: int = 0  #: too long, cut short, of another form, or out of step
    check_errors: int = 0  #: whole, but the check failed
    ignored: int = 0  #: lines that no point wants
    skipped_bytes: int = 0  #: thrown away to get into step
    requests_unsent: int = 0  #: the line took no bytes (flow control)


class Framer(Protocol):
    """What a line's reader needs of a framer."""

    @property
    def partial(self) -> bool:
        """Is a frame begun and not ended?"""

    def feed(self, chunk: bytes) -> list[bytes | None]:
        """The frames that these bytes complete."""

    def cut_short(self) -> bool:
        """The line went silent inside a frame: forget it. True if it was lost while in step."""

    def begins(self) -> None:
        """The line was silent, and what comes next is the beginning of a frame."""


def crc16_modbus(data: bytes) -> int:
    """CRC-16/MODBUS: polynomial 0x8005 reflected, start 0xFFFF (Modbus over serial line 1.02, 6.2.2)."""
    crc = 0xFFFF
    for byte in data:
        crc = (crc >> 8) ^ _CRC16_TABLE[(crc ^ byte) & 0xFF]
    return crc


def _crc16_entry(byte: int) -> int:
    for _ in range(8):
        byte = (byte >> 1) ^ 0xA001 if byte & 1 else byte >> 1
    return byte


_CRC16_TABLE = tuple(_crc16_entry(byte) for byte in range(256))

#: How many bytes a check takes, and how it is computed.
CHECKS: dict[Check, tuple[int, Callable[[bytes], int]]] = {
    "none": (0, lambda data: 0),
    "xor": (1, lambda data: functools.reduce(operator.xor, data, 0)),
    "sum8": (1, lambda data: sum(data) & 0xFF),
    "lrc": (1, lambda data: -sum(data) & 0xFF),  # Modbus over serial line 1.02, 6.2.1
    "crc16_modbus": (2, crc16_modbus),
    "crc16_ccitt": (2, lambda data: binascii.crc_hqx(data, 0xFFFF)),  # CRC-16/CCITT-FALSE
    "crc16_xmodem": (2, lambda data: binascii.crc_hqx(data, 0)),
    "crc32": (4, zlib.crc32),
}


def nmea_agrees(text: str, sent: str) -> bool:
    """NMEA 0183: two hexadecimal digits after `*` are the XOR of what stands between `$` and `*`."""
    try:
        return len(sent) == 2 and functools.reduce(operator.xor, text.lstrip("$!").encode(), 0) == int(
            sent, 16
        )
    except ValueError:
        return False


class TextFramer:
    """Cuts at a delimiter. Unless it starts in step, the first delimiter only says where a line begins, and `None`
    stands for the line that it ends."""

    def __init__(self, delimiter: bytes, max_frame_bytes: int, counts: LineCounts, *, in_step: bool) -> None:
        self._delimiter = delimiter
        self._max = max_frame_bytes
        self._counts = counts
        self._in_step = in_step
        self._unknown_begin = (
            not in_step
        )  #: the first line was running before we listened; its loss is not yet told
        self._rest = b""

    @property
    def partial(self) -> bool:
        return self._in_step and bool(self._rest)

    def feed(self, chunk: bytes) -> list[bytes | None]:
        lines = (self._rest + chunk).split(self._delimiter)
        self._rest = lines.pop()
        frames: list[bytes | None] = []
        if lines and not self._in_step:
            tail = lines.pop(0)
            self._counts.skipped_bytes += len(tail) + len(self._delimiter)
            self._in_step = True
            if self._unknown_begin and tail.strip():
                frames.append(None)
            self._unknown_begin = False
        frames += [line if len(line) <= self._max else None for line in lines if line]
        if not self._in_step:
            self._skip_rest()
        elif len(self._rest) >= self._max + len(self._delimiter):
            self._skip_rest()
            frames.append(None)
        self._counts.framing_errors += frames.count(None)
        return frames

    def cut_short(self) -> bool:
        """What comes next may be the tail or a new line, so skip to the next delimiter."""
        was_in_step = self._in_step
        self._counts.framing_errors += 1
        self._skip_rest()
        return was_in_step

    def begins(self) -> None:
        self._in_step = True

    def _skip_rest(self) -> None:
        """Skip to the next delimiter, of which a read may have cut off the first part."""
        keep = min(len(self._delimiter) - 1, len(self._rest))
        self._counts.skipped_bytes += len(self._rest) - keep
        self._rest = self._rest[len(self._rest) - keep :]
        self._in_step = False


class BinaryFramer:
    """Finds frames of one length by their start, end and check."""

    def __init__(
        self,
        *,
        start: bytes,
        body_bytes: int,
        check: Check,
        check_order: ByteOrder,
        check_from: int,
        end: bytes,
        counts: LineCounts,
    ) -> None:
        self._start = start
        self._end = end
        self._check_bytes, self._check = CHECKS[check]
        self._check_order: ByteOrder = check_order
        self._check_from = check_from
        self._check_at = len(start) + body_bytes
        self._counts = counts
        self._in_step = False
        self._buffer = b""
        self.frame_bytes = self._check_at + self._check_bytes + len(end)

    @property
    def partial(self) -> bool:
        return bool(self._buffer)

    def feed(self, chunk: bytes) -> list[bytes | None]:
        buffer = self._buffer + chunk
        frames: list[bytes | None] = []
        at = 0
        while True:
            begin = self._next_start(buffer, at)
            if begin > at:
                self._lost_step(begin - at)
                at = begin
            if len(buffer) - at < self.frame_bytes:
                break
            frame = buffer[at : at + self.frame_bytes]
            if self._whole(frame):
                frames.append(frame)
                self._in_step = True
                at += self.frame_bytes
            else:
                if self._in_step:
                    self._counts.check_errors += 1
                    self._in_step = False
                    frames.append(None)
                # Not a frame from here; one may begin at the next byte.
                self._counts.skipped_bytes += 1
                at += 1
        self._buffer = buffer[at:]
        return frames

    def cut_short(self) -> bool:
        """What comes next cannot belong to what came before the silence."""
        was_in_step = self._in_step
        self._counts.framing_errors += 1
        self._counts.skipped_bytes += len(self._buffer)
        self._buffer = b""
        self._in_step = False
        return was_in_step

    def begins(self) -> None:
        """Nothing to do: a frame is known by its start and check."""

    def _next_start(self, buffer: bytes, at: int) -> int:
        """Where a frame may begin; a start cut in two by a read counts."""
        if not self._start:
            return at
        begin = buffer.find(self._start, at)
        if begin >= 0:
            return begin
        for length in range(min(len(buffer) - at, len(self._start) - 1), 0, -1):
            if self._start.startswith(buffer[-length:]):
                return len(buffer) - length
        return len(buffer)

    def _whole(self, frame: bytes) -> bool:
        if not frame.endswith(self._end):
            return False
        if not self._check_bytes:
            return True
        sent = frame[self._check_at : self._check_at + self._check_bytes]
        return self._check(frame[self._check_from : self._check_at]) == int.from_bytes(
            sent, self._check_order
        )

    def _lost_step(self, skipped: int) -> None:
        self._counts.skipped_bytes += skipped
        if self._in_step:
            self._counts.framing_errors += 1
            self._in_step = False
