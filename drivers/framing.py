"""Cuts a stream of bytes into frames, and finds its way back after noise. Pure: bytes and times in, frames out.

Rules:

- A frame is whole or it is nothing; what is thrown away is counted.
- A frame carries the time at which its last byte arrived, however much later it could be told from noise.
- Noise never costs the good frame after it: what does not hold from one place is tried again from the next byte.
- No buffer holds more than one frame and one chunk.
- Work is bounded: bytes that come give credit for looking at bytes again, and where noise that begins like a frame at
  every place (a start that repeats, a check over thousands of bytes) has used it up, places are skipped and counted.

A frame that was lost while in step (too long, cut short, its check failed) stands among the frames as its reason, so
that its reader can say so; out of step the same bytes only mean that no frame begins there.

What a frame gives is its body: what stands between its start and its check and end, escapes undone.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections import deque
from typing import Final, Literal, Protocol, TypeAlias

import msgspec

from drivers.checks import CHECKS, ByteOrder, Check
from drivers.contract import Reason

Cut: TypeAlias = tuple[bytes | Reason, int]
"""A frame's body, or why it is lost, and when its last byte arrived (ns)."""

#: How many bytes may be looked at again for each byte that comes (a sixth of a core at 115,200 baud, with a CRC of
#: ours), and how many at once: any place in a frame of 1,024 bytes without a start.
_CREDIT_BYTES: Final = 256
_CREDIT_AT_MOST_BYTES: Final = 1 << 20

Escape = Literal["none", "slip", "hdlc", "dle"]
LengthCounts = Literal["all", "rest", "body"]


@dataclasses.dataclass(slots=True)
class LineCounts:
    """What was seen on a line since its driver was built; never reset."""

    frames: int = 0  #: whole frames
    framing_errors: int = 0  #: too long, cut short, of another form, or out of step
    check_errors: int = 0  #: whole, but the check failed
    ignored: int = 0  #: lines that no point wants
    skipped_bytes: int = 0  #: thrown away to get into step
    requests_unsent: int = 0  #: the line took no bytes (flow control)
    late_replies: int = 0  #: thrown away: they came after their request was given up


class Framer(Protocol):
    """What a line's reader needs of a framer."""

    @property
    def partial(self) -> bool:
        """Is a frame begun and not ended?"""

    def feed(self, chunk: bytes, at_ns: int) -> list[Cut]:
        """The frames that these bytes complete."""

    def silence(self) -> list[Cut]:
        """The line has been still for longer than a frame can be: what is here is all that comes of it."""

    def begins(self) -> None:
        """The line was silent, and what comes next is the beginning of a frame."""


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What stands round a frame's body: start, body, check, end; or start, body, end, check."""

    start: bytes = b""
    end: bytes = b""
    check: Check = "none"
    check_order: ByteOrder = "big"
    check_hex: bool = False  #: the check is written in hexadecimal digits
    check_from: int = 0  #: the first byte that the check covers, counted from the start's first
    check_short: int = 0  #: how many bytes just before the check it does not cover
    check_after_end: bool = False

    @property
    def check_bytes(self) -> int:
        return CHECKS[self.check][0] * (2 if self.check_hex else 1)

    @property
    def around_bytes(self) -> int:
        """A frame's bytes that are not its body."""
        return len(self.start) + len(self.end) + self.check_bytes

    @property
    def plain(self) -> bool:
        return not self.around_bytes

    def body(self, frame: bytes) -> bytes | Reason:
        """The body of a frame that begins and ends just here, or why it is none."""
        size = self.check_bytes
        if len(frame) < self.around_bytes or not frame.startswith(self.start):
            return Reason.FRAMING
        check_at = len(frame) - size - (0 if self.check_after_end else len(self.end))
        body_end = check_at - (len(self.end) if self.check_after_end else 0)
        end_at = body_end if self.check_after_end else check_at + size
        if frame[end_at : end_at + len(self.end)] != self.end:
            return Reason.FRAMING
        if size and self._sent(frame[check_at : check_at + size]) != CHECKS[self.check][1](
            frame[self.check_from : check_at - self.check_short]
        ):
            return Reason.CRC
        return frame[len(self.start) : body_end]

    def _sent(self, digits: bytes) -> int:
        """The check as it was sent; -1 where it is no number."""
        if self.check_hex:
            try:
                digits = bytes.fromhex(digits.decode("ascii"))
            except ValueError:
                return -1
            if len(digits) * 2 != self.check_bytes:  # `fromhex` lets blanks pass
                return -1
        return int.from_bytes(digits, self.check_order)


# --------------------------------------------------------------------------------------------------------- delimiter


class DelimiterFramer:
    """Cuts at a delimiter. Unless it starts in step, the first delimiter only says where a line begins, and FRAMING
    stands for the line that it ends."""

    def __init__(
        self,
        delimiter: bytes,
        max_frame_bytes: int,
        counts: LineCounts,
        *,
        in_step: bool,
        shape: Shape | None = None,
    ) -> None:
        self._delimiter = delimiter
        self._max = max_frame_bytes
        self._counts = counts
        self._shape = None if shape is None or shape.plain else shape
        self._in_step = in_step
        self._unknown_begin = not in_step  #: the first line was running before we listened; not yet told
        self._rest = b""
        self._at_ns = 0

    @property
    def partial(self) -> bool:
        return self._in_step and bool(self._rest)

    def feed(self, chunk: bytes, at_ns: int) -> list[Cut]:
        self._at_ns = at_ns
        lines = (self._rest + chunk).split(self._delimiter)
        self._rest = lines.pop()
        frames: list[bytes | Reason] = []
        if lines and not self._in_step:
            tail = lines.pop(0)
            self._counts.skipped_bytes += len(tail) + len(self._delimiter)
            self._in_step = True
            if self._unknown_begin and tail.strip():
                frames.append(Reason.FRAMING)
            self._unknown_begin = False
        frames += [line if len(line) <= self._max else Reason.FRAMING for line in lines if line]
        if not self._in_step:
            self._skip_rest()
        elif len(self._rest) >= self._max + len(self._delimiter):
            self._skip_rest()
            frames.append(Reason.FRAMING)
        self._counts.framing_errors += frames.count(Reason.FRAMING)
        if self._shape is not None:
            frames = [
                frame if isinstance(frame, Reason) else self._body(frame, self._shape) for frame in frames
            ]
        return [(frame, at_ns) for frame in frames]

    def _body(self, line: bytes, shape: Shape) -> bytes | Reason:
        begin = line.rfind(shape.start)  # a line may follow noise, or one that was cut short
        body = shape.body(line[begin:]) if begin >= 0 else Reason.FRAMING
        if body is Reason.CRC:
            self._counts.check_errors += 1
        elif body is Reason.FRAMING:
            self._counts.framing_errors += 1
        return body

    def silence(self) -> list[Cut]:
        """What comes next may be the tail or a new line, so skip to the next delimiter."""
        was_in_step = self._in_step
        self._counts.framing_errors += 1
        self._skip_rest()
        return [(Reason.FRAMING, self._at_ns)] if was_in_step else []

    def begins(self) -> None:
        self._in_step = True

    def _skip_rest(self) -> None:
        """Skip to the next delimiter, of which a read may have cut off the first part."""
        keep = min(len(self._delimiter) - 1, len(self._rest))
        self._counts.skipped_bytes += len(self._rest) - keep
        self._rest = self._rest[len(self._rest) - keep :]
        self._in_step = False


# ----------------------------------------------------------------------------------------------------------- sliding


class More:
    """Not enough bytes yet to tell."""


MORE: Final = More()


class SlidingFramer(ABC):
    """Looks for a frame at each place where one may begin."""

    _shared = 0  #: bytes that end a frame and may begin the next

    def __init__(self, shape: Shape, counts: LineCounts) -> None:
        self._shape = shape
        self._counts = counts
        self._in_step = False
        self._buffer = b""
        self._arrivals: deque[tuple[int, int]] = deque()  #: (how many bytes of the buffer were there, when)
        self._credit = _CREDIT_AT_MOST_BYTES
        self._worked = 0  #: bytes that the last look took

    @property
    def partial(self) -> bool:
        return bool(self._buffer)

    @abstractmethod
    def _look(self, buffer: bytes, at: int) -> tuple[int, bytes | Reason | None] | More:
        """Is there a frame from `at` (where its start stands)? How many bytes it takes, and its body or why not; `None`
        where nothing is and nothing is missed."""

    def feed(self, chunk: bytes, at_ns: int) -> list[Cut]:
        self._buffer += chunk
        self._arrivals.append((len(self._buffer), at_ns))
        self._credit = min(_CREDIT_AT_MOST_BYTES, self._credit + _CREDIT_BYTES * len(chunk))
        return self._cut(final=False)

    def silence(self) -> list[Cut]:
        return self._cut(final=True)

    def begins(self) -> None:  # noqa: B027 - for all of these
        """Nothing to do: a frame is known by its start and check."""

    def _cut(self, *, final: bool) -> list[Cut]:
        buffer = self._buffer
        frames: list[Cut] = []
        at = 0
        while at < len(buffer):
            begin = self._next_start(buffer, at)
            if begin > at:
                self._lost_step(begin - at)
                at = begin
                if at == len(buffer):
                    break
            if self._credit <= 0:
                self._counts.skipped_bytes += 1
                self._in_step = False
                at += 1
                continue
            self._worked = 0
            looked = self._look(buffer, at)
            if isinstance(looked, More):
                if not final:
                    break
                looked = (1, Reason.FRAMING)
            size, body = looked
            if isinstance(body, bytes):
                frames.append((body, self._arrival(at + size)))
                self._in_step = True
                at += size - self._shared
                continue
            self._credit -= self._worked
            if body is not None and self._in_step:
                self._in_step = False
                if body is Reason.CRC:
                    self._counts.check_errors += 1
                else:
                    self._counts.framing_errors += 1
                frames.append((body, self._arrival(len(buffer))))
            # Not a frame from here; one may begin at the next byte.
            self._counts.skipped_bytes += body is not None
            at += 1
        if not at:
            return frames
        self._buffer = buffer[at:]
        self._arrivals = deque((there - at, at_ns) for there, at_ns in self._arrivals if there > at)
        return frames

    def _arrival(self, size: int) -> int:
        """When the first `size` bytes of the buffer were complete."""
        return next(at_ns for there, at_ns in self._arrivals if there >= size)

    def _next_start(self, buffer: bytes, at: int) -> int:
        """Where a frame may begin; a start cut in two by a read counts."""
        start = self._shape.start
        if not start:
            return at
        begin = buffer.find(start, at)
        if begin >= 0:
            return begin
        for length in range(min(len(buffer) - at, len(start) - 1), 0, -1):
            if start.startswith(buffer[-length:]):
                return len(buffer) - length
        return len(buffer)

    def _lost_step(self, skipped: int) -> None:
        self._counts.skipped_bytes += skipped
        if self._in_step:
            self._counts.framing_errors += 1
            self._in_step = False


class FixedFramer(SlidingFramer):
    """Frames of one length, found by their start, end and check."""

    def __init__(self, shape: Shape, body_bytes: int, counts: LineCounts) -> None:
        self.frame_bytes = shape.around_bytes + body_bytes
        super().__init__(shape, counts)

    def _look(self, buffer: bytes, at: int) -> tuple[int, bytes | Reason] | More:
        if len(buffer) - at < self.frame_bytes:
            return MORE
        self._worked = self.frame_bytes
        body = self._shape.body(buffer[at : at + self.frame_bytes])
        # A frame of the right length with a wrong end is a damaged one too.
        return self.frame_bytes, Reason.CRC if body is Reason.FRAMING else body


class LengthFramer(SlidingFramer):
    """Frames that tell their own length: `size` bytes at `offset` from the frame's first byte."""

    def __init__(
        self,
        shape: Shape,
        max_frame_bytes: int,
        counts: LineCounts,
        *,
        offset: int,
        size: int,
        order: ByteOrder,
        length_counts: LengthCounts,
        plus: int,
    ) -> None:
        super().__init__(shape, counts)
        self._max = max_frame_bytes
        self._field = slice(offset, offset + size)
        self._order: ByteOrder = order
        self._field_end = offset + size
        # From the number in the field to the bytes of the frame.
        self._extra = (
            plus
            + {
                "all": 0,
                "rest": offset + size,
                "body": offset + size + shape.check_bytes + len(shape.end),
            }[length_counts]
        )
        self._least = max(self._field_end, shape.around_bytes)

    def _look(self, buffer: bytes, at: int) -> tuple[int, bytes | Reason] | More:
        if len(buffer) - at < self._field_end:
            return MORE
        size = (
            int.from_bytes(buffer[at + self._field.start : at + self._field.stop], self._order) + self._extra
        )
        if not self._least <= size <= self._max:
            return 1, Reason.FRAMING
        if len(buffer) - at < size:
            return MORE
        self._worked = size
        return size, self._shape.body(buffer[at : at + size])


class StartStopFramer(SlidingFramer):
    """Frames between a start and an end. `starts_inside`: the body may hold the start's bytes (binary, no escape)."""

    def __init__(
        self, shape: Shape, max_frame_bytes: int, counts: LineCounts, *, escape: Escape, starts_inside: bool
    ) -> None:
        super().__init__(shape, counts)
        self._max = max_frame_bytes
        self._escape: Escape = escape
        self._starts_inside = starts_inside
        #: One flag ends a frame and begins the next (HDLC, SLIP).
        self._flag = shape.start == shape.end and not shape.check_after_end
        self._shared = len(shape.end) if self._flag else 0
        self._tail = shape.check_bytes if shape.check_after_end else 0

    @property
    def partial(self) -> bool:
        return len(self._buffer) > (len(self._shape.start) if self._flag else 0)

    def silence(self) -> list[Cut]:
        return self._cut(final=True) if self.partial else []

    def _look(self, buffer: bytes, at: int) -> tuple[int, bytes | Reason | None] | More:
        shape = self._shape
        first = at + len(shape.start)
        if self._flag and buffer.startswith(shape.start, first):
            return 1, None  # two flags in a row: nothing between
        dle = self._escape == "dle"
        end = _dle_end(buffer, first, shape.end) if dle else buffer.find(shape.end, first)
        self._worked = (end if end >= 0 else len(buffer)) - at
        if end < 0:
            return (1, Reason.FRAMING) if len(buffer) - at > self._max + len(shape.end) else MORE
        inner_end = end if shape.check_after_end else end - shape.check_bytes  # a check may be any byte
        if not self._starts_inside and buffer.find(shape.start, at + 1, inner_end) >= 0:
            return 1, Reason.FRAMING  # another frame begins before this one ends: it was cut short
        size = end + len(shape.end) + self._tail - at
        if size > self._max:
            return 1, Reason.FRAMING
        if len(buffer) - at < size:
            return MORE
        body = self._body(buffer, at, end, size)
        # The end's byte may be the check's own: look one or two further.
        further = 0
        while not isinstance(body, bytes) and self._escape == "none" and not self._tail:
            further += 1
            if further > shape.check_bytes:
                break
            if len(buffer) < end + further + len(shape.end):
                return MORE
            if buffer.startswith(shape.end, end + further):
                body = self._body(buffer, at, end + further, size + further)
                if isinstance(body, bytes):
                    return size + further, body
        return size, body

    def _body(self, buffer: bytes, at: int, end: int, size: int) -> bytes | Reason:
        shape = self._shape
        self._worked += size
        if self._escape == "none":
            return shape.body(buffer[at : at + size])
        first = at + len(shape.start)
        inner = _unescaped(buffer[first:end], self._escape)
        if inner is None:
            return Reason.FRAMING
        return shape.body(shape.start + inner + buffer[end : at + size])


def _dle_end(buffer: bytes, first: int, end: bytes) -> int:
    """Where DLE ETX stands that is no DLE of data (which is sent twice)."""
    at = buffer.find(end[:1], first)
    while at >= 0:
        if len(buffer) < at + len(end):
            return -1
        if buffer.startswith(end, at):
            return at
        at = buffer.find(end[:1], at + 2)
    return -1


def _unescaped(data: bytes, escape: Escape) -> bytes | None:
    """The data as it was before it was made safe; `None` where it cannot have been."""
    if escape == "dle":  # ISO 1745 transparency: DLE is sent twice
        single = data.replace(b"\x10\x10", b"\x10")
        return single if len(data) - len(single) == single.count(b"\x10") else None
    if escape == "slip":  # RFC 1055
        parts = data.split(b"\xdb")
        if any(part[:1] not in (b"\xdc", b"\xdd") for part in parts[1:]):
            return None
        plain = (b"\xc0" + part[1:] if part[:1] == b"\xdc" else b"\xdb" + part[1:] for part in parts[1:])
        return parts[0] + b"".join(plain)
    parts = data.split(b"\x7d")  # RFC 1662, 4.2
    if any(not part for part in parts[1:]):
        return None
    return parts[0] + b"".join(bytes([part[0] ^ 0x20]) + part[1:] for part in parts[1:])


# --------------------------------------------------------------------------------------------------------------- gap


class GapFramer:
    """Frames that only silence parts. The first is whole only if there was silence before it (`begins`)."""

    def __init__(
        self, shape: Shape, max_frame_bytes: int, counts: LineCounts, *, body_bytes: int | None, in_step: bool
    ) -> None:
        self._shape = shape
        self._max = max_frame_bytes
        self._counts = counts
        self._frame_bytes = None if body_bytes is None else body_bytes + shape.around_bytes
        self._in_step = in_step
        self._overflowed = False
        self._buffer = b""
        self._at_ns = 0

    @property
    def partial(self) -> bool:
        return bool(self._buffer)

    def feed(self, chunk: bytes, at_ns: int) -> list[Cut]:
        self._at_ns = at_ns
        self._buffer += chunk
        if len(self._buffer) <= self._max:
            return []
        # Noise before a frame must not cost the frame: where a check can tell, its tail is looked at in the end.
        self._overflowed = True
        self._counts.skipped_bytes += len(self._buffer) - self._max
        self._buffer = self._buffer[-self._max :]
        return []

    def silence(self) -> list[Cut]:
        buffer, self._buffer = self._buffer, b""
        was_in_step, self._in_step = self._in_step, True
        overflowed, self._overflowed = self._overflowed, False
        if not buffer:
            return []
        told = self._shape.check != "none"  # without a check, a piece of the right length looks whole
        body = self._whole(buffer) if told or not overflowed else Reason.FRAMING
        if isinstance(body, bytes):
            return [(body, self._at_ns)]
        credit = _CREDIT_BYTES * len(buffer)
        for begin in self._beginnings(buffer) if told else ():
            credit -= len(buffer) - begin
            if credit < 0:
                break
            tail = self._whole(buffer[begin:])
            if isinstance(tail, bytes):
                self._counts.skipped_bytes += begin
                return [(tail, self._at_ns)]
        if not was_in_step:
            self._counts.skipped_bytes += len(buffer)
            return []
        if body is Reason.CRC:
            self._counts.check_errors += 1
        else:
            self._counts.framing_errors += 1
        return [(body, self._at_ns)]

    def begins(self) -> None:
        self._in_step = True

    def unsure(self) -> list[Cut]:
        """There may have been silence here or not: nobody looked. What is here is lost, and so is what it runs into."""
        if not self._buffer:
            return []
        was_in_step, self._in_step = self._in_step, False
        self._counts.framing_errors += 1
        self._counts.skipped_bytes += len(self._buffer)
        self._buffer = b""
        self._overflowed = False
        return [(Reason.FRAMING, self._at_ns)] if was_in_step else []

    def _whole(self, frame: bytes) -> bytes | Reason:
        if self._frame_bytes is not None and len(frame) != self._frame_bytes:
            return Reason.FRAMING
        return self._shape.body(frame)

    def _beginnings(self, buffer: bytes) -> list[int]:
        """Where a frame that ends here may have begun, after noise."""
        if self._frame_bytes is not None:
            return [len(buffer) - self._frame_bytes] if len(buffer) > self._frame_bytes else []
        if not self._shape.start:
            return []
        found: list[int] = []
        at = buffer.find(self._shape.start, 1)
        while at >= 0:
            found.append(at)
            at = buffer.find(self._shape.start, at + 1)
        return found
