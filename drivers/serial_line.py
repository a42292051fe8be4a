"""An instrument on a serial line, free-running or asked: its frames, turned into scans as they arrive.

Rules:

- A frame is whole or it is nothing (drivers/framing.py). What came before the port was opened is skipped, because its
  time is unknown; a line that was already running then is `FRAMING`; a frame that stops half-way (`frame_timeout_ms`)
  or grows past `max_frame_bytes` is dropped and counted, and reading goes on at the next that is provably whole.
- A field that is absent is `MISSING`, one that does not read as the point's type is `DECODE`, a message of another
  form is `FRAMING` and a failed check is `CRC`, on the points it would have carried. Never 0, never the last value.
- Silence of `stale_after_s` gives one scan of `STALE` (where we ask: `reply_timeout_ms`, `TIMEOUT`), and then nothing
  until it speaks.
- Where we ask, one question is open at a time. After one that got no answer, or one that does not read, what comes
  until twice its timeout is over and the line is silent is thrown away: a late reply, or the rest of one, would be
  taken for the answer to another question.
- A frame's beginning is known by a delimiter, a start, or a silence that was listened to; never by our own request.
- Where only silence parts frames and nobody looked in time, both frames are dropped: joined or torn they might look
  whole.
- A line that is unplugged raises `DeviceUnreachable`; `connect` looks its port up and opens it afresh.

The port's descriptor sits on the event loop (no thread), and bytes are cut into frames by `split` and `find`: no Python
work per byte. Patterns cost no more than a frame is long (drivers/patterns.py), and `max_frame_bytes` bounds that.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import struct
import termios
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Final

import msgspec

from drivers.contract import (
    DeviceUnreachable,
    Found,
    LineClaim,
    Point,
    PushDriver,
    Reason,
    Scan,
    Value,
    boot_ns,
)
from drivers.fields import BLANK, Doubted, Result
from drivers.framing import Cut, Framer, GapFramer, LineCounts
from drivers.instrument import (
    Dialect,
    Lines,
    Packets,
    SerialLineOptions,
    SerialLinePoint,
    check_options,
    request_bytes,
)
from drivers.nmea import Nmea
from drivers.obis import Dsmr
from drivers.scales import Scale
from drivers.scan_queue import ScanQueue
from drivers.serial_port import (
    READ_BYTES,
    RETRY_WITHIN_S,
    hung_up,
    line_of,
    open_port,
    present_ports,
    read_away,
)

if TYPE_CHECKING:
    import serial

SETTLE_S: Final = 0.1  #: silence before a request, so that the reply to an earlier one is not taken for ours
_SETTLE_AT_MOST_S: Final = 10 * SETTLE_S
_BETWEEN_S: Final = (
    0.05  #: silence after an answer, before the next of several questions: it may have more frames
)
_LATE_S: Final = 0.002  #: a timer of the event loop is no more exact than this


def dialect_of(options: SerialLineOptions, points: Sequence[SerialLinePoint]) -> Dialect:
    """The way this instrument speaks. Raises `ConfigError`."""
    match options.protocol:
        case "nmea0183":
            return Nmea(options, points)
        case "dsmr":
            return Dsmr(options, points)
        case "none":
            return Packets(options, points) if options.content == "binary" else Lines(options, points)
        case _:
            return Scale(options, points)


class _Kind:
    """The points that come in one kind of message, and when such a message was last heard."""

    __slots__ = ("heard_at_s", "points", "silent")

    def __init__(self, points: tuple[SerialLinePoint, ...]) -> None:
        self.points = points
        self.heard_at_s = 0.0
        self.silent = False


class _Question:
    """What is asked for some points (nothing, where the instrument speaks by itself), and how its answers read."""

    def __init__(self, request: bytes, options: SerialLineOptions, points: Sequence[SerialLinePoint]) -> None:
        self.request = request
        self.dialect = dialect_of(options, points)
        self.kinds = [_Kind(of) for of in self.dialect.kinds]
        self.kind_of = {point.name: kind for kind in self.kinds for point in kind.points}


class SerialLineDriver(PushDriver[SerialLineOptions, SerialLinePoint]):
    """Reads one free-running (or periodically asked) instrument on a serial port."""

    options_type: ClassVar[type[msgspec.Struct]] = SerialLineOptions
    point_type: ClassVar[type[Point]] = SerialLinePoint

    def __init__(self, name: str, options: SerialLineOptions, points: Sequence[SerialLinePoint]) -> None:
        super().__init__(name, options, points)
        self.overruns = 0  #: scans dropped because nobody took them in time
        self.counts = LineCounts()
        check_options(options, self.points)
        by_request: dict[bytes, list[SerialLinePoint]] = {}
        for point in self.points:
            by_request.setdefault(request_bytes(options, point), []).append(point)
        self._questions = [_Question(request, options, of) for request, of in by_request.items()]
        self._asks = bool(self._questions[0].request)
        self._question: _Question | None = None  #: the one whose answer may come now
        self._answered: asyncio.Future[None] | None = None
        self._asked_at_s = 0.0
        self._doubted = False  #: is it doubtful whether what was heard was the answer?
        self._framer: Framer = self._questions[0].dialect.framer(self.counts, in_step=self._asks)
        #: A frame that stands still for this long is over.
        self._still_s = (options.gap_ms if self._by_gap else options.frame_timeout_ms) / 1000
        self._serial: serial.Serial | None = None
        self._fd = -1
        self._queue = ScanQueue()
        self._asking: asyncio.Task[None] | None = None
        self._silence_timer: asyncio.TimerHandle | None = None
        self._still_timer: asyncio.TimerHandle | None = None
        self._last_byte_s = 0.0
        self._spoken = False  #: has a byte come since the port was opened?

    @property
    def _by_gap(self) -> bool:
        return isinstance(self._framer, GapFramer)

    def line(self) -> LineClaim:
        """Its own: who else reads here would get half of the bytes. Several points of one port belong in one device."""
        return line_of(self.options.port, f"serial_line, {self.options.settings}", shared=False)

    # --------------------------------------------------------------------------------------------- connection

    async def connect(self) -> None:
        await self.close()
        loop = asyncio.get_running_loop()
        # In a binary frame a mark would be data (0xFF comes twice then): its check must do.
        text = self.options.content == "text"
        port = open_port(self.options.port, self.options.settings, self._skipped, mark_damaged=text)
        self._serial, self._fd = port, port.fileno()
        self._framer = self._questions[0].dialect.framer(self.counts, in_step=False)
        self._question = None if self._asks else self._questions[0]
        self._last_byte_s = loop.time()
        self._spoken = False
        if self._asks:
            try:
                await self._settle()
            except BaseException:
                self._release()
                raise
        now_s = loop.time()
        for question in self._questions:
            for kind in question.kinds:
                kind.heard_at_s = now_s
        self._queue.begin()
        loop.add_reader(self._fd, self._readable)
        if self._still_s:
            self._still_timer = loop.call_later(self._still_s, self._still)
        if self._asks:
            self._asking = asyncio.create_task(self._ask(), name=f"ask[{self.name}]")
        elif self.options.stale_after_s:
            self._silence_timer = loop.call_later(self.options.stale_after_s, self._watch_silence)

    def _skipped(self, size: int) -> None:
        self.counts.skipped_bytes += size

    async def close(self) -> None:
        self._release()
        self._queue.end(DeviceUnreachable(f"{self.options.port}: not connected"))

    def _release(self) -> None:
        for timer in (self._silence_timer, self._still_timer):
            if timer is not None:
                timer.cancel()
        self._silence_timer = self._still_timer = None
        asking, self._asking = self._asking, None
        if asking is not None:
            asking.cancel()
        port, self._serial = self._serial, None
        if port is None:
            return
        asyncio.get_running_loop().remove_reader(self._fd)
        self._fd = -1
        # A tty's close waits for unsent bytes (closing_wait, 30 s by default); throw them away instead.
        with contextlib.suppress(OSError, termios.error):
            port.reset_output_buffer()
        with contextlib.suppress(OSError, termios.error):
            port.close()

    def _fail(self, why: str) -> None:
        self._release()
        self._queue.end(DeviceUnreachable(f"{self.options.port}: {why}", retry_within_s=RETRY_WITHIN_S))

    # -------------------------------------------------------------------------------------------------- bytes

    def _readable(self) -> None:
        try:
            chunk = os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return
        except OSError as exc:
            self._fail(f"the line is gone ({exc.strerror}); is it plugged in?")
            return
        at_ns = boot_ns()
        if not chunk:
            if hung_up(self._fd):
                self._fail("the line is gone; is it plugged in?")
            return
        now_s = asyncio.get_running_loop().time()
        if self._still_s and now_s - self._last_byte_s > self._still_s:
            self._stood_still(now_s)
        self._spoken = True
        self._last_byte_s = now_s
        self._take(self._framer.feed(chunk, at_ns))
        if self._still_timer is None and self._still_s and self._fd >= 0 and self._framer.partial:
            self._still_timer = asyncio.get_running_loop().call_later(self._still_s, self._still)

    def _still(self) -> None:
        """Nothing has come for a while. Is the frame that was begun over?"""
        self._still_timer = None
        loop = asyncio.get_running_loop()
        due_s = self._last_byte_s + self._still_s
        if not self._framer.partial:
            # Since the opening nothing has come, and nothing waits: what comes next is the beginning of a frame.
            if not self._spoken and not _waiting(self._fd):
                self._framer.begins()
            return
        if loop.time() < due_s:
            self._still_timer = loop.call_at(due_s, self._still)
        elif not _waiting(self._fd):  # what waits is read next, and judged with the time it took
            self._take(self._framer.silence())

    def _stood_still(self, now_s: float) -> None:
        """Bytes have come after a silence that no timer has yet told of."""
        if not self._framer.partial:
            return
        if isinstance(self._framer, GapFramer) and now_s - self._last_byte_s > self._still_s + max(
            _LATE_S, self._still_s / 4
        ):
            self._take(self._framer.unsure())  # we were late: the silence may have been on the line, or ours
        else:
            self._take(self._framer.silence())

    # ------------------------------------------------------------------------------------------------- frames

    def _take(self, cuts: list[Cut]) -> None:
        question = self._question
        if question is None:  # nobody has asked: the answer to an earlier question
            self.counts.late_replies += len(cuts)
            return
        for body, at_ns in cuts:
            if isinstance(body, Reason):
                said = question.dialect.lost(body)
            elif question.request and body.strip(_BLANK) == question.request.strip(_BLANK):
                continue  # our own words: many two-wire adapters hear themselves
            else:
                said = question.dialect.read(body)
                if said is None:
                    self.counts.ignored += bool(body.strip(_BLANK))
                elif said.results is Reason.CRC:
                    self.counts.check_errors += 1
                elif said.results is Reason.FRAMING:
                    self.counts.framing_errors += 1
                else:
                    self.counts.frames += 1
            if said is not None and said.points:
                # An answer that is none may be another's, or another one's rest.
                self._doubted |= question.request != b"" and (
                    isinstance(said.results, Reason)
                    or all(isinstance(result, Reason) for result in said.results)
                )
                self._heard(question, said.points)
                self._give(_scan(at_ns, said.points, said.results))

    def _heard(self, question: _Question, points: tuple[SerialLinePoint, ...]) -> None:
        now_s = asyncio.get_running_loop().time()
        for point in points:
            kind = question.kind_of[point.name]
            kind.heard_at_s = now_s
            kind.silent = False
        if self._answered is not None and not self._answered.done():
            begin_s = self._asked_at_s
            if all(kind.heard_at_s >= begin_s for kind in question.kinds):
                self._answered.set_result(None)

    def _give(self, scan: Scan) -> None:
        self.overruns += self._queue.put(scan)

    def _watch_silence(self) -> None:
        """One scan that says so, for the points whose lines have stopped coming; look again when the next is due."""
        loop = asyncio.get_running_loop()
        now_s, stale_after_s = loop.time(), self.options.stale_after_s
        next_s = now_s + stale_after_s
        for kind in self._questions[0].kinds:
            due_s = kind.heard_at_s + stale_after_s
            if due_s > now_s:
                next_s = min(next_s, due_s)
            elif not kind.silent:
                kind.silent = True
                self._give(_scan(boot_ns(), kind.points, Reason.STALE))
        self._silence_timer = loop.call_at(next_s, self._watch_silence)

    # ------------------------------------------------------------------------------------------------- asking

    async def _ask(self) -> None:
        """All questions in turn, then again when the next round is due."""
        loop = asyncio.get_running_loop()
        period_s = self.options.request_period_ms / 1000
        next_s = loop.time()
        while True:
            for question in self._questions:
                if not await self._ask_one(question):
                    return
            next_s = max(next_s + period_s, loop.time())
            await asyncio.sleep(next_s - loop.time())

    async def _ask_one(self, question: _Question) -> bool:
        """False: the line is gone."""
        loop = asyncio.get_running_loop()
        several = len(self._questions) > 1
        if several:
            await self._silent(_BETWEEN_S)
        silent = loop.time() - self._last_byte_s >= _BETWEEN_S and not _waiting(self._fd)
        if several or silent:  # on one that never falls silent, what has been cut so far goes on
            self._framer = question.dialect.framer(self.counts, in_step=silent)
        try:
            if os.write(self._fd, question.request) != len(question.request):
                self._fail("took only a part of the request; check the flow control")
                return False
        except BlockingIOError:
            self.counts.requests_unsent += 1
        except OSError as exc:
            self._fail(f"the line is gone ({exc.strerror}); is it plugged in?")
            return False
        self._asked_at_s = loop.time()
        self._answered = loop.create_future()
        self._question = question
        self._doubted = timed_out = False
        try:
            async with asyncio.timeout(self.options.reply_timeout_ms / 1000):
                await self._answered
        except TimeoutError:
            for kind in question.kinds:
                if kind.heard_at_s < self._asked_at_s and not kind.silent:
                    kind.silent = True
                    self._give(_scan(boot_ns(), kind.points, Reason.TIMEOUT))
            timed_out = True
        finally:
            self._question = self._answered = None
        if timed_out or (self._doubted and several):
            await self._quiet()
        return self._fd >= 0

    async def _quiet(self) -> None:
        """Wait until a late reply is over. Where there is one question only, a late reply is still the reply to it."""
        several = len(self._questions) > 1
        await asyncio.sleep(max(SETTLE_S, self.options.reply_timeout_ms / 1000 if several else 0.0))
        await self._silent(SETTLE_S)

    async def _silent(self, silence_s: float) -> None:
        """Wait until nothing has come for this long; not for ever."""
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + _SETTLE_AT_MOST_S
        while (now_s := loop.time()) < min(give_up_s, self._last_byte_s + silence_s):  # noqa: ASYNC110 - for quiet
            await asyncio.sleep(min(give_up_s, self._last_byte_s + silence_s) - now_s)

    async def _settle(self) -> None:
        """Wait until the line is silent, or the reply to an earlier question would be taken for the reply to ours."""
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + _SETTLE_AT_MOST_S
        while loop.time() < give_up_s:
            await asyncio.sleep(SETTLE_S)
            try:
                skipped = read_away(self._fd)
            except OSError as exc:
                raise DeviceUnreachable(
                    f"{self.options.port}: {exc.strerror}", retry_within_s=RETRY_WITHIN_S
                ) from exc
            self.counts.skipped_bytes += skipped
            if not skipped:
                return
            self._last_byte_s = loop.time()

    # -------------------------------------------------------------------------------------------------- scans

    def scans(self) -> AsyncIterator[Scan]:
        return self._queue.drain()

    @classmethod
    async def discover(cls) -> AsyncIterator[Found]:
        """The serial ports of this machine, by the name that stays when plugs are swapped."""
        for port in await asyncio.to_thread(present_ports):
            yield Found(
                driver="serial_line",
                address=port.stable,
                description=f"{port.description} at {port.device}" + (f", {port.usb}" if port.usb else ""),
                options={"port": port.stable},
                # A bare 8250 port is listed whether or not anything is wired to it.
                likelihood=0.8 if port.usb else 0.2,
            )


_BLANK: Final = BLANK.encode()


def _waiting(fd: int) -> bool:
    """Are there bytes that nobody has read? False where the line is gone: the reader is told of that."""
    try:
        (size,) = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"))
    except OSError:
        return False
    return bool(size)


def _scan(at_ns: int, points: tuple[SerialLinePoint, ...], results: list[Result] | Reason) -> Scan:
    if isinstance(results, Reason):
        return Scan(at_ns, points, [None] * len(points), dict.fromkeys(range(len(points)), results))
    values: list[Value | None] = []
    reasons: dict[int, Reason] = {}
    for index, result in enumerate(results):
        if isinstance(result, Reason):
            reasons[index] = result
            values.append(None)
        elif isinstance(result, Doubted):
            reasons[index] = result.reason
            values.append(result.value)
        else:
            values.append(result)
    return Scan(at_ns, points, values, reasons)
