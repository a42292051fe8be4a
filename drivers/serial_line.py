"""A free-running instrument on a serial line: text lines or binary frames, turned into scans as they arrive.

Rules:

- A frame is whole or it is nothing. What came before the port was opened is skipped, because its time is unknown; a
  line that was already running then is `FRAMING`; a frame that stops half-way (`frame_timeout_ms`) or grows past
  `max_frame_bytes` is dropped and counted, and reading goes on at the next frame that is provably whole.
- A field that is absent is `MISSING`, one that does not read as the point's type is `DECODE`, a message of another
  form is `FRAMING` and a failed check is `CRC`, on the points it would have carried. Never 0, never the last value.
- Silence of `stale_after_s` gives one scan of `STALE` (`TIMEOUT` where we ask), and then nothing until it speaks.
- A line that is unplugged raises `DeviceUnreachable`; `connect` opens it afresh.

The port's descriptor sits on the event loop (no thread), and bytes are cut into frames by `split` and `find`: no Python
work per byte (drivers/framing.py). Patterns run over one frame at a time, so `max_frame_bytes` bounds what a careless
pattern costs; serial_line.toml says which patterns no bound would help.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import os
import re
import select
import struct
import termios
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import msgspec

from drivers.codec import limits_of
from drivers.contract import (
    ConfigError,
    DeviceUnreachable,
    Found,
    Point,
    PushDriver,
    Reason,
    Scan,
    Value,
    ValueType,
    boot_ns,
)
from drivers.framing import BinaryFramer, ByteOrder, Check, Framer, LineCounts, TextFramer, nmea_agrees
from drivers.scan_queue import ScanQueue

if TYPE_CHECKING:
    import serial

READ_BYTES = 65_536  # one read takes all that a tty holds (N_TTY_BUF_SIZE is 4,096) and more
SETTLE_S = 0.1  # silence before the first request, so that the reply to an earlier one is not taken for ours

Parity = Literal["none", "even", "odd", "mark", "space"]
Flow = Literal["none", "rtscts", "xonxoff", "dsrdtr"]


class SerialLineOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[device.options]` of a serial instrument; every key is explained in serial_line.toml."""

    port: str
    baud: int = 9600
    data_bits: Literal[5, 6, 7, 8] = 8
    parity: Parity = "none"
    stop_bits: Literal[1, 2] = 1
    flow: Flow = "none"
    framing: Literal["text", "binary"] = "text"
    max_frame_bytes: int = 256
    frame_timeout_ms: int = 1000
    stale_after_s: float = 60.0
    request: str = ""
    request_hex: str = ""
    request_period_ms: int = 1000
    # text
    delimiter: str = "\n"
    encoding: Literal["ascii", "latin-1", "utf-8"] = "ascii"
    separator: str = ""
    pattern: str = ""
    decimal: Literal[".", ","] = "."
    nmea_check: bool = False
    # binary
    start_hex: str = ""
    layout: str = ""
    check: Check = "none"
    check_order: ByteOrder = "big"
    check_from: int = 0
    end_hex: str = ""


class SerialLinePoint(Point, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a point stands in a frame: one of `column`, `field`, `pattern` (text) or `item` (binary)."""

    column: int | None = None  #: counted from 1, after splitting at `separator`
    field: str = ""  #: the named group of the device's `pattern`; the point's name if left out
    pattern: str = ""  #: a pattern of its own; the value is its group `value`, else its first group
    line: str = ""  #: only in lines where this pattern is found; other lines say nothing about the point
    base: Literal[2, 8, 10, 16] = 10  #: of a whole number in text
    item: int | None = None  #: counted from 1 over the values of `layout`


# ---------------------------------------------------------------------------------------------------------- decoding

_F32 = struct.Struct("<f")
_F32_MAX = struct.unpack("<f", b"\xff\xff\x7f\x7f")[0]
_BLANK = "".join(map(chr, range(33))) + "\x7f"  # blanks and control characters (STX, ETX, CR) round a field
_TRUE = frozenset({"1", "on", "true", "yes"})
_FALSE = frozenset({"0", "off", "false", "no"})


def fit(value: float | bool | bytes, kind: ValueType) -> Value | Reason:
    """A number from a binary frame as the point's type, or why it does not fit."""
    if isinstance(value, bytes):
        if kind is not ValueType.STR:
            return Reason.DECODE
        try:
            return value.rstrip(b"\0").decode("utf-8")
        except UnicodeDecodeError:
            return Reason.DECODE
    if kind is ValueType.STR:
        return Reason.DECODE
    if kind is ValueType.BOOL:
        return bool(value) if value in (0, 1) else Reason.DECODE
    if isinstance(value, float) and not math.isfinite(value):
        return Reason.NAN if math.isnan(value) else Reason.INFINITE
    if kind is ValueType.F64 or kind is ValueType.F32:
        if abs(value) > _F32_MAX and kind is ValueType.F32:
            return Reason.OVERFLOW
        # A whole number that the mantissa cannot hold would become another number.
        whole = isinstance(value, int)
        held = float(value) if kind is ValueType.F64 or not whole else _F32.unpack(_F32.pack(value))[0]
        return held if not whole or held == value else Reason.OVERFLOW
    if value != int(value):
        return Reason.DECODE
    low, high = limits_of(kind)
    return int(value) if low <= value <= high else Reason.OVERFLOW


def parse(text: str, kind: ValueType, *, base: int = 10, decimal: str = ".") -> Value | Reason:
    """A field of text as the point's type, or why it does not read as one."""
    if kind is ValueType.STR:
        return text
    # `float` and `int` also take "1_000" and digits of other scripts, which no instrument means.
    if not text.isascii() or "_" in text:
        return Reason.DECODE
    if kind is ValueType.BOOL:
        word = text.lower()
        return True if word in _TRUE else False if word in _FALSE else Reason.DECODE
    try:
        if kind is ValueType.F64 or kind is ValueType.F32:
            if decimal != ".":
                if "." in text:
                    return Reason.DECODE
                text = text.replace(decimal, ".")
            return fit(float(text), kind)
        return fit(int(text, base), kind)
    except ValueError:
        return Reason.DECODE


class _Line:
    """The points that stand in the same lines, and when such a line was last heard."""

    def __init__(self, wanted: re.Pattern[str] | None, points: tuple[SerialLinePoint, ...]) -> None:
        self.wanted = wanted
        self.points = points
        self.heard_at_s = 0.0
        self.silent = False

    def heard(self, now_s: float) -> None:
        self.heard_at_s = now_s
        self.silent = False


def _compile(pattern: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as exc:
        spot = "" if exc.pos is None else f" at character {exc.pos + 1}"
        raise ConfigError(f"{where}: {pattern!r} is not a valid pattern: {exc.msg}{spot}") from exc


def _hex(text: str, where: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise ConfigError(
            f'{where}: {text!r} is not hexadecimal; write pairs of digits, as in "AA 55"'
        ) from None


# ------------------------------------------------------------------------------------------------------------ driver


class SerialLineDriver(PushDriver[SerialLineOptions, SerialLinePoint]):
    """Reads one free-running (or periodically asked) instrument on a serial port."""

    options_type: ClassVar[type[msgspec.Struct]] = SerialLineOptions
    point_type: ClassVar[type[Point]] = SerialLinePoint

    def __init__(self, name: str, options: SerialLineOptions, points: Sequence[SerialLinePoint]) -> None:
        super().__init__(name, options, points)
        self.overruns = 0  #: scans dropped because nobody took them in time
        self.counts = LineCounts()
        self._serial: serial.Serial | None = None
        self._fd = -1
        self._queue = ScanQueue()
        self._ask_timer: asyncio.TimerHandle | None = None
        self._silence_timer: asyncio.TimerHandle | None = None
        self._last_byte_s = 0.0
        self._spoken = False  #: has a byte come since the port was opened?
        self._check_common()
        self._request = self._request_bytes()
        if options.framing == "text":
            self._check_text()
        else:
            self._check_binary()
        self._framer: Framer = self._new_framer()

    # ------------------------------------------------------------------------------------------- configuration

    def _check_common(self) -> None:
        options = self.options
        self._bounded("baud", options.baud, 50, 4_000_000)
        self._bounded("max_frame_bytes", options.max_frame_bytes, 1, 65_536)
        self._bounded("frame_timeout_ms", options.frame_timeout_ms, 0, 600_000)
        self._bounded("request_period_ms", options.request_period_ms, 10, 86_400_000)
        self._bounded("stale_after_s", options.stale_after_s, 0, 31_536_000)
        if not options.port:
            raise ConfigError(
                'options.port is empty; name a port, as in "/dev/serial/by-id/usb-…", '
                "which stays the same when plugs are swapped"
            )
        if not self.points:
            raise ConfigError("has no points; add a [[device.point]] table")

    def _bounded(self, key: str, value: float, low: float, high: float) -> None:
        if not low <= value <= high:
            raise ConfigError(f"options.{key} is {value}; allowed is {low} to {high}")

    def _request_bytes(self) -> bytes:
        options = self.options
        if options.request and options.request_hex:
            raise ConfigError("options has both request and request_hex; keep one")
        if options.request_hex:
            return _hex(options.request_hex, "options.request_hex")
        return self._latin1("request", options.request)

    def _latin1(self, key: str, text: str) -> bytes:
        try:
            return text.encode("latin-1")
        except UnicodeEncodeError:
            raise ConfigError(f"options.{key} holds a character that is more than one byte") from None

    def _check_text(self) -> None:
        options = self.options
        for key, given in (
            ("layout", options.layout),
            ("start_hex", options.start_hex),
            ("end_hex", options.end_hex),
        ):
            if given:
                raise ConfigError(f'options.{key} belongs to framing = "binary"')
        if not options.delimiter:
            raise ConfigError('options.delimiter is empty; the usual one is "\\n"')
        if options.decimal == options.separator:
            raise ConfigError(f"options.decimal and options.separator are both {options.decimal!r}")
        self._delimiter = self._latin1("delimiter", options.delimiter)
        self._pattern = _compile(options.pattern, "options.pattern") if options.pattern else None
        self._own: dict[str, tuple[re.Pattern[str], int]] = {}
        by_line: dict[str, list[SerialLinePoint]] = {}
        for point in self.points:
            self._check_text_point(point)
            by_line.setdefault(point.line, []).append(point)
        self._lines = [
            _Line(_compile(line, f"point {points[0].name!r}: line") if line else None, tuple(points))
            for line, points in by_line.items()
        ]

    def _check_text_point(self, point: SerialLinePoint) -> None:
        where = f"point {point.name!r}"
        if point.item is not None:
            raise ConfigError(f'{where}: item belongs to framing = "binary"; use column, field or pattern')
        if point.column is not None:
            if point.column < 1:
                raise ConfigError(f"{where}: column is {point.column}; columns are counted from 1")
            if not self.options.separator:
                raise ConfigError(f'{where}: column needs options.separator, as in separator = ","')
            if point.pattern or point.field:
                raise ConfigError(f"{where}: has column and also field or pattern; keep one")
        elif point.pattern:
            if point.field:
                raise ConfigError(f"{where}: has both field and pattern; keep one")
            own = _compile(point.pattern, f"{where}: pattern")
            if not own.groups:
                raise ConfigError(f"{where}: pattern {point.pattern!r} has no group; put the value in (…)")
            self._own[point.name] = (own, own.groupindex.get("value", 1))
        elif self._pattern is None:
            raise ConfigError(
                f"{where}: says not where it stands; give it column or pattern, or give options.pattern"
            )
        elif (point.field or point.name) not in self._pattern.groupindex:
            known = ", ".join(self._pattern.groupindex) or "none: write (?P<name>…)"
            raise ConfigError(
                f"{where}: options.pattern has no group {point.field or point.name!r}; it has {known}"
            )

    def _check_binary(self) -> None:
        options = self.options
        where = "options"
        for key, given in (("separator", options.separator), ("pattern", options.pattern)):
            if given:
                raise ConfigError(f'{where}.{key} belongs to framing = "text"')
        self._start = _hex(options.start_hex, f"{where}.start_hex")
        self._end = _hex(options.end_hex, f"{where}.end_hex")
        if not self._start and options.check == "none":
            raise ConfigError(
                f"{where}: a binary frame needs start_hex or check, or one lost byte would shift every later value"
            )
        if options.layout[:1] not in ("<", ">", "!"):
            raise ConfigError(
                f'{where}.layout is {options.layout!r}; begin with "<" (little-endian) or ">" (big)'
            )
        try:
            self._struct = struct.Struct(options.layout)
        except struct.error as exc:
            raise ConfigError(f"{where}.layout {options.layout!r}: {exc}") from exc
        items = len(self._struct.unpack(bytes(self._struct.size)))
        frame_bytes = self._binary_framer().frame_bytes
        if frame_bytes > options.max_frame_bytes:
            raise ConfigError(
                f"{where}: a frame is {frame_bytes} bytes, above max_frame_bytes ({options.max_frame_bytes})"
            )
        if not 0 <= options.check_from <= len(self._start):
            raise ConfigError(
                f"{where}.check_from is {options.check_from}; allowed is 0 to {len(self._start)}"
            )
        for point in self.points:
            if point.column is not None or point.field or point.pattern or point.line:
                raise ConfigError(f'point {point.name!r}: framing = "binary" takes item only')
            if point.item is None or not 1 <= point.item <= items:
                raise ConfigError(
                    f"point {point.name!r}: item is {point.item}; the layout has items 1 to {items}"
                )
        self._items = tuple((point.item or 1) - 1 for point in self.points)
        self._lines = [_Line(None, self.points)]

    def _new_framer(self) -> Framer:
        options = self.options
        if options.framing == "binary":
            return self._binary_framer()
        return TextFramer(self._delimiter, options.max_frame_bytes, self.counts, in_step=bool(self._request))

    def _binary_framer(self) -> BinaryFramer:
        options = self.options
        return BinaryFramer(
            start=self._start,
            body_bytes=self._struct.size,
            check=options.check,
            check_order=options.check_order,
            check_from=options.check_from,
            end=self._end,
            counts=self.counts,
        )

    # --------------------------------------------------------------------------------------------- connection

    async def connect(self) -> None:
        await self.close()
        port = self._open()
        self._serial, self._fd = port, port.fileno()
        self._framer = self._new_framer()
        self._last_byte_s = asyncio.get_running_loop().time()
        self._spoken = False
        loop = asyncio.get_running_loop()
        if self._request:
            await self._settle()
        now_s = loop.time()
        for line in self._lines:
            line.heard(now_s)
        self._queue.begin()
        loop.add_reader(self._fd, self._readable)
        if self.options.stale_after_s:
            self._silence_timer = loop.call_later(self.options.stale_after_s, self._watch_silence)
        if self._request:
            self._ask()

    def _open(self) -> serial.Serial:
        import serial

        counts = self.counts

        class Port(serial.Serial):
            def _reset_input_buffer(self) -> None:
                """Called at the end of opening. What came before then is skipped: nobody knows when it came, so it can
                be given no time. A flush (TCIFLUSH) would leave behind what the tty has not yet taken over."""
                counts.skipped_bytes += _read_away(self.fd) if self.fd is not None else 0

        options = self.options
        try:
            return Port(
                options.port,
                baudrate=options.baud,
                bytesize=options.data_bits,
                parity=options.parity[0].upper(),
                stopbits=options.stop_bits,
                timeout=0,
                write_timeout=0,
                rtscts=options.flow == "rtscts",
                xonxoff=options.flow == "xonxoff",
                dsrdtr=options.flow == "dsrdtr",
                exclusive=True,  # two readers would each get half of the bytes
            )
        except ValueError as exc:
            raise ConfigError(f"options.port {options.port}: {exc}") from exc
        except (OSError, termios.error) as exc:  # SerialException is an OSError
            raise _opening_failed(options.port, exc) from exc

    async def _settle(self) -> None:
        """Wait until the line is silent, or the reply to an earlier question would be taken for the reply to ours."""
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + 10 * SETTLE_S
        while loop.time() < give_up_s:
            await asyncio.sleep(SETTLE_S)
            try:
                skipped = _read_away(self._fd)
            except OSError as exc:
                self._release()
                raise DeviceUnreachable(f"{self.options.port}: {exc.strerror}") from exc
            self.counts.skipped_bytes += skipped
            if not skipped:
                return

    async def close(self) -> None:
        self._release()
        self._queue.end(DeviceUnreachable(f"{self.options.port}: not connected"))

    def _release(self) -> None:
        for timer in (self._ask_timer, self._silence_timer):
            if timer is not None:
                timer.cancel()
        self._ask_timer = self._silence_timer = None
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
        self._queue.end(DeviceUnreachable(f"{self.options.port}: {why}"))

    # -------------------------------------------------------------------------------------------------- bytes

    def _readable(self) -> None:
        try:
            chunk = os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return
        except OSError as exc:
            self._fail(f"the line is gone ({exc.strerror}); is it plugged in?")
            return
        taken_at_ns = boot_ns()
        if not chunk:
            if _hung_up(self._fd):
                self._fail("the line is gone; is it plugged in?")
            return
        now_s = asyncio.get_running_loop().time()
        gap_s = self.options.frame_timeout_ms / 1000
        if gap_s and now_s - self._last_byte_s > gap_s:
            if self._framer.partial:
                self._cut_short(taken_at_ns)
            elif not self._spoken:
                self._framer.begins()
        self._spoken = True
        self._last_byte_s = now_s
        decode = self._decode_binary if self.options.framing == "binary" else self._decode_text
        for frame in self._framer.feed(chunk):
            scan = decode(frame, taken_at_ns, now_s)
            if scan is not None:
                self.overruns += self._queue.put(scan)

    def _cut_short(self, taken_at_ns: int) -> None:
        """The line stood still inside a frame, which is lost."""
        if self._framer.cut_short():
            scan = self._unreadable(taken_at_ns)
            if scan is not None:
                self.overruns += self._queue.put(scan)

    def _ask(self) -> None:
        try:
            if os.write(self._fd, self._request) != len(self._request):
                self._fail("took only a part of the request; check the flow control")
                return
        except BlockingIOError:
            self.counts.requests_unsent += 1
        except OSError as exc:
            self._fail(f"the line is gone ({exc.strerror}); is it plugged in?")
            return
        loop = asyncio.get_running_loop()
        self._ask_timer = loop.call_later(self.options.request_period_ms / 1000, self._ask)

    def _watch_silence(self) -> None:
        """One scan that says so, for the points whose lines have stopped coming; look again when the next is due."""
        loop = asyncio.get_running_loop()
        now_s, stale_after_s = loop.time(), self.options.stale_after_s
        next_s = now_s + stale_after_s
        for line in self._lines:
            due_s = line.heard_at_s + stale_after_s
            if due_s > now_s:
                next_s = min(next_s, due_s)
            elif not line.silent:
                line.silent = True
                reason = Reason.TIMEOUT if self._request else Reason.STALE
                self.overruns += self._queue.put(_bad(boot_ns(), line.points, reason))
        self._silence_timer = loop.call_at(next_s, self._watch_silence)

    # ------------------------------------------------------------------------------------------------- frames

    def _decode_binary(self, frame: bytes | None, taken_at_ns: int, now_s: float) -> Scan | None:
        self._lines[0].heard(now_s)
        if frame is None:
            return _bad(taken_at_ns, self.points, Reason.CRC)
        self.counts.frames += 1
        items = self._struct.unpack_from(frame, len(self._start))
        return _scan(
            taken_at_ns,
            self.points,
            [fit(items[item], point.type) for item, point in zip(self._items, self.points, strict=True)],
        )

    def _decode_text(self, frame: bytes | None, taken_at_ns: int, now_s: float) -> Scan | None:
        if frame is None:
            return self._unreadable(taken_at_ns)
        try:
            text = frame.decode(self.options.encoding).strip(_BLANK)
        except UnicodeDecodeError:
            self.counts.framing_errors += 1
            return self._unreadable(taken_at_ns)
        if not text:
            return None
        wanted = [line for line in self._lines if line.wanted is None or line.wanted.search(text)]
        if not wanted:
            self.counts.ignored += 1
            return None
        points = wanted[0].points if len(wanted) == 1 else tuple(p for line in wanted for p in line.points)
        for line in wanted:
            line.heard(now_s)
        if self.options.nmea_check:
            text, _, sent = text.rpartition("*")
            if not nmea_agrees(text, sent):
                self.counts.check_errors += 1
                return _bad(taken_at_ns, points, Reason.CRC)
        results = self._fields(text, points)
        if all(result is Reason.MISSING for result in results):
            self.counts.framing_errors += 1
            return _bad(taken_at_ns, points, Reason.FRAMING)
        self.counts.frames += 1
        return _scan(taken_at_ns, points, results)

    def _unreadable(self, taken_at_ns: int) -> Scan | None:
        """A message that is no whole frame. Where lines differ, which one it was meant to be cannot be told."""
        (first, *others) = self._lines
        if others or first.wanted is not None:
            return None
        first.heard(asyncio.get_running_loop().time())
        return _bad(taken_at_ns, first.points, Reason.FRAMING)

    def _fields(self, text: str, points: tuple[SerialLinePoint, ...]) -> list[Value | Reason]:
        options = self.options
        columns = text.split(options.separator) if options.separator else []
        match = self._pattern.search(text) if self._pattern is not None else None
        results: list[Value | Reason] = []
        for point in points:
            field: str | None
            if point.column is not None:
                field = columns[point.column - 1] if point.column <= len(columns) else None
            elif point.pattern:
                own, group = self._own[point.name]
                found = own.search(text)
                field = found[group] if found is not None else None
            else:
                field = match[point.field or point.name] if match is not None else None
            field = field.strip(_BLANK) if field is not None else None
            results.append(
                parse(field, point.type, base=point.base, decimal=options.decimal)
                if field
                else Reason.MISSING
            )
        return results

    # -------------------------------------------------------------------------------------------------- scans

    def scans(self) -> AsyncIterator[Scan]:
        return self._queue.drain()

    @classmethod
    async def discover(cls) -> AsyncIterator[Found]:
        """The serial ports of this machine, by the name that stays when plugs are swapped."""
        from serial.tools import list_ports

        names = {Path(os.path.realpath(link)): link for link in _by_id()}
        for port in sorted(await asyncio.to_thread(list_ports.comports)):
            address = str(names.get(Path(os.path.realpath(port.device)), port.device))
            usb = (
                f", USB {port.vid:04x}:{port.pid:04x}"
                if port.vid is not None and port.pid is not None
                else ""
            )
            yield Found(
                driver="serial_line",
                address=address,
                description=f"{port.description or port.name or port.device}{usb}",
                options={"port": address},
                # A bare 8250 port is listed whether or not anything is wired to it.
                likelihood=0.8 if usb else 0.2,
            )


def _by_id() -> list[Path]:
    folder = Path("/dev/serial/by-id")
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _read_away(fd: int) -> int:
    """How many bytes were waiting."""
    skipped = 0
    with contextlib.suppress(BlockingIOError):
        while chunk := os.read(fd, READ_BYTES):
            skipped += len(chunk)
    return skipped


def _hung_up(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return any(event & (select.POLLHUP | select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0))


def _opening_failed(port: str, exc: Exception) -> DeviceUnreachable | ConfigError:
    number = exc.errno if isinstance(exc, OSError) else exc.args[0] if exc.args else None
    text = f"{port}: "
    if number == errno.ENOENT:
        return DeviceUnreachable(
            text + "no such port; is it plugged in? `headgate scan serial` lists the ports"
        )
    if number == errno.EACCES:
        return DeviceUnreachable(text + "permission denied; add the agent's user to the group `dialout`")
    if number in (errno.EAGAIN, errno.EBUSY):
        return DeviceUnreachable(text + "in use by another program")
    if number == errno.ENOTTY or "Inappropriate ioctl" in str(exc):
        return ConfigError(f"options.port {text}is not a serial port")
    return DeviceUnreachable(text + str(exc))


def _scan(taken_at_ns: int, points: tuple[SerialLinePoint, ...], results: list[Value | Reason]) -> Scan:
    reasons = {index: result for index, result in enumerate(results) if isinstance(result, Reason)}
    return Scan(taken_at_ns, points, [None if isinstance(r, Reason) else r for r in results], reasons)


def _bad(taken_at_ns: int, points: tuple[SerialLinePoint, ...], reason: Reason) -> Scan:
    return Scan(taken_at_ns, points, [None] * len(points), dict.fromkeys(range(len(points)), reason))
