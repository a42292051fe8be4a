"""What a serial instrument says: its options, its points, and the way from a frame to what each point gets.

A dialect knows one way of speaking: how its frames are cut and what stands in them. `Lines` and `Packets` here are the
two that a configuration spells out (text by pattern or column, binary by layout); `drivers.nmea`, `drivers.scales` and
`drivers.obis` are ready ones. All are pure: bytes in, results out.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Final, Literal, Protocol, TypeAlias

import msgspec

from drivers.checks import ByteOrder, Check
from drivers.contract import ConfigError, Point, Reason
from drivers.fields import BLANK, Result, fit, parse
from drivers.framing import (
    DelimiterFramer,
    Escape,
    FixedFramer,
    Framer,
    GapFramer,
    LengthCounts,
    LengthFramer,
    LineCounts,
    Shape,
    StartStopFramer,
)
from drivers.patterns import Found, Pattern, compile_pattern
from drivers.serial_port import MARK, Flow, Parity, PortSettings, refuse_bad_name

Framing = Literal["delimiter", "fixed", "length", "start_stop", "gap"]
Protocol_ = Literal["none", "nmea0183", "dsmr", "toledo", "and", "cas", "sbi", "ohaus"]

MAX_UNSTARTED_BYTES: Final = 1_024  #: without a start every byte may begin a frame, and each costs one check


class SerialLineOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[device.options]` of a serial instrument; every key is explained in serial_line.toml."""

    #: Keys and values of earlier versions, and what says it now; told with the error that refuses them.
    formerly: ClassVar[Mapping[str, str]] = {
        "nmea_check": 'protocol = "nmea0183" (its points have sentence and column)',
        "framing = text": 'framing = "delimiter" (the default: leave it out)',
        "framing = binary": 'framing = "fixed" with content = "binary"',
    }

    port: str
    baud: int = 9600
    data_bits: Literal[5, 6, 7, 8] = 8
    parity: Parity = "none"
    stop_bits: Literal[1, 2] = 1
    flow: Flow = "none"
    protocol: Protocol_ = "none"
    checked: bool = True
    framing: Framing = "delimiter"
    content: Literal["text", "binary"] = "text"
    max_frame_bytes: int = 256
    frame_timeout_ms: int = 1000
    stale_after_s: float = 60.0
    # asked
    request: str = ""
    request_hex: str = ""
    request_period_ms: int = 1000
    reply_timeout_ms: int = 1000
    # cutting
    delimiter: str = "\n"
    start_hex: str = ""
    end_hex: str = ""
    frame_bytes: int = 0
    length_offset: int = 0
    length_bytes: Literal[1, 2, 4] = 1
    length_order: ByteOrder = "big"
    length_counts: LengthCounts = "all"
    length_plus: int = 0
    escape: Escape = "none"
    gap_ms: int = 20
    check: Check = "none"
    check_order: ByteOrder = "big"
    check_hex: bool = False
    check_from: int = 0
    check_short: int = 0
    check_after_end: bool = False
    # text
    encoding: Literal["ascii", "latin-1", "utf-8"] = "ascii"
    separator: str = ""
    pattern: str = ""
    decimal: Literal[".", ","] = "."
    # binary
    layout: str = ""

    @property
    def settings(self) -> PortSettings:
        return PortSettings(
            baud=self.baud,
            data_bits=self.data_bits,
            parity=self.parity,
            stop_bits=self.stop_bits,
            flow=self.flow,
        )


class SerialLinePoint(Point, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a point stands in a message; which of these fit is told by `content` and `protocol`."""

    column: int | None = None  #: counted from 1, after splitting at `separator`
    field: str = ""  #: the named group of the device's `pattern`, or a field of the protocol; the point's name if unset
    pattern: str = ""  #: a pattern of its own; the value is its group `value`, else its first group
    line: str = ""  #: only in lines where this pattern is found; other lines say nothing about the point
    base: Literal[2, 8, 10, 16] = 10  #: of a whole number in text
    item: int | None = None  #: counted from 1 over the values of `layout`
    sentence: str = ""  #: NMEA 0183: "RMC" of any talker, or "GPRMC" of one
    form: Literal["number", "degrees"] = "number"  #: NMEA 0183: degrees and minutes, then N, S, E or W
    obis: str = ""  #: IEC 62056-21, DSMR: "1.8.0", or whole, "1-0:1.8.0"
    device_unit: str = (
        ""  #: the unit that the message must say; unset: the point's own, where it has no scale
    )
    request: str = ""  #: what is asked for this point, where it is not what all are asked for


class Heard(msgspec.Struct, frozen=True, gc=False):
    """What a message says about some points: a result for each, or one reason for all. No points: it is damaged, and
    whom it was about cannot be told."""

    points: tuple[SerialLinePoint, ...]
    results: list[Result] | Reason


Said: TypeAlias = Heard | None
"""`None`: the message is about nothing that is asked for."""


class Dialect(Protocol):
    """One way of speaking."""

    @property
    def kinds(self) -> Sequence[tuple[SerialLinePoint, ...]]:
        """The points that come together; each kind of message is missed by itself."""

    def framer(self, counts: LineCounts, *, in_step: bool) -> Framer:
        """`in_step`: the line was silent before, so what comes first is whole."""

    def read(self, body: bytes) -> Said:
        """What a whole frame says."""

    def lost(self, reason: Reason) -> Said:
        """What a frame says that was lost. `None` where kinds differ, and which one it was cannot be told."""


def lost_of_one_kind(kinds: Sequence[tuple[SerialLinePoint, ...]], reason: Reason) -> Said:
    """The usual `Dialect.lost`."""
    return Heard(kinds[0], reason) if len(kinds) == 1 else None


# ------------------------------------------------------------------------------------------------------ the options


def check_options(options: SerialLineOptions, points: Sequence[SerialLinePoint]) -> None:
    """What holds for every dialect. Raises `ConfigError`."""
    _bounded("baud", options.baud, 50, 4_000_000)
    _bounded("max_frame_bytes", options.max_frame_bytes, 1, 65_536)
    _bounded("frame_timeout_ms", options.frame_timeout_ms, 0, 600_000)
    _bounded("request_period_ms", options.request_period_ms, 10, 86_400_000)
    _bounded("reply_timeout_ms", options.reply_timeout_ms, 10, 600_000)
    _bounded("stale_after_s", options.stale_after_s, 0, 31_536_000)
    _bounded("gap_ms", options.gap_ms, 1, 60_000)
    refuse_bad_name(options.port)
    if not points:
        raise ConfigError("has no points; add a [[device.point]] table")
    if options.request and options.request_hex:
        raise ConfigError("options has both request and request_hex; keep one")
    asked = bool(options.request or options.request_hex)
    for point in points:
        if point.request:
            to_bytes(f"point {point.name!r}: request", point.request)
            asked = True
    unasked = [
        point.name for point in points if not (point.request or options.request or options.request_hex)
    ]
    if asked and unasked:
        raise ConfigError(
            f"point {unasked[0]!r}: has no request, and others have; give it one, or give options.request"
        )


def _bounded(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"options.{key} is {value}; allowed is {low} to {high}")


def request_bytes(options: SerialLineOptions, point: SerialLinePoint) -> bytes:
    """What is asked for a point; empty where the instrument speaks by itself."""
    if point.request:
        return to_bytes(f"point {point.name!r}: request", point.request)
    if options.request_hex:
        return from_hex(options.request_hex, "options.request_hex")
    return to_bytes("options.request", options.request)


def to_bytes(where: str, text: str) -> bytes:
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        raise ConfigError(f"{where} holds a character that is more than one byte") from None


def from_hex(text: str, where: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise ConfigError(
            f'{where}: {text!r} is not hexadecimal; write pairs of digits, as in "AA 55"'
        ) from None


#: The keys that say how frames are cut, and the framings that they belong to.
_OF_FRAMING: Final[dict[str, tuple[Framing, ...]]] = {
    "delimiter": ("delimiter",),
    "start_hex": ("delimiter", "fixed", "length", "start_stop", "gap"),
    "end_hex": ("fixed", "length", "start_stop", "gap"),
    "frame_bytes": ("fixed",),
    "length_offset": ("length",),
    "length_bytes": ("length",),
    "length_order": ("length",),
    "length_counts": ("length",),
    "length_plus": ("length",),
    "escape": ("start_stop",),
    "gap_ms": ("gap",),
    "check_after_end": ("fixed", "length", "start_stop", "gap"),
}
#: What a ready protocol settles by itself.
_SETTLED: Final = frozenset(
    {
        *_OF_FRAMING, "framing", "content", "check", "check_order", "check_hex", "check_from", "check_short",
        "encoding", "separator", "pattern", "layout",
    }
)  # fmt: skip


def _given(options: SerialLineOptions, key: str) -> bool:
    return any(
        bool(getattr(options, key) != field.default)
        for field in msgspec.structs.fields(SerialLineOptions)
        if field.name == key
    )


def refuse_settled(options: SerialLineOptions) -> None:
    """A ready protocol's framing is not ours to bend."""
    for key in sorted(_SETTLED):
        if _given(options, key):
            raise ConfigError(f'options.{key} is settled by protocol = "{options.protocol}"; leave it out')


def refuse_keys(point: SerialLinePoint, allowed: Sequence[str], why: str) -> None:
    """A key that says where a value stands, in a message of another kind."""
    for key in ("column", "field", "pattern", "line", "item", "sentence", "obis"):
        if key not in allowed and getattr(point, key) not in (None, ""):
            takes = " or ".join(allowed)
            raise ConfigError(f"point {point.name!r}: {key} has no meaning with {why}; it takes {takes}")


class Cutting:
    """How frames are cut, as the options spell it out."""

    def __init__(self, options: SerialLineOptions, body_bytes: int | None) -> None:
        """`body_bytes`: the size of every body, where a layout tells it. Raises `ConfigError`."""
        self._options = options
        for key, framings in _OF_FRAMING.items():
            if options.framing not in framings and _given(options, key):
                belongs = " or ".join(f'"{framing}"' for framing in framings)
                raise ConfigError(f"options.{key} belongs to framing = {belongs}")
        self.shape = Shape(
            start=from_hex(options.start_hex, "options.start_hex"),
            end=from_hex(options.end_hex, "options.end_hex"),
            check=options.check,
            check_order=options.check_order,
            check_hex=options.check_hex,
            check_from=options.check_from,
            check_short=options.check_short,
            check_after_end=options.check_after_end,
        )
        self._delimiter = to_bytes("options.delimiter", options.delimiter)
        self._body_bytes = body_bytes
        self._check_shape()
        {
            "delimiter": self._check_delimiter,
            "fixed": self._check_fixed,
            "length": self._check_length,
            "start_stop": self._check_start_stop,
            "gap": self._check_gap,
        }[options.framing]()

    def _check_shape(self) -> None:
        options, shape = self._options, self.shape
        if not 0 <= options.check_from <= len(shape.start):
            raise ConfigError(
                f"options.check_from is {options.check_from}; allowed is 0 to {len(shape.start)}, the start's bytes"
            )
        if not 0 <= options.check_short <= 16:
            raise ConfigError(f"options.check_short is {options.check_short}; allowed is 0 to 16")
        if shape.around_bytes >= options.max_frame_bytes:
            raise ConfigError(
                f"options: start, check and end take {shape.around_bytes} bytes, and max_frame_bytes is "
                f"{options.max_frame_bytes}"
            )

    def _needs_beginning(self) -> None:
        """Something must tell where a frame begins. One byte of check agrees by chance once in 256 places."""
        options, shape = self._options, self.shape
        if not shape.start and shape.check_bytes < 2:
            raise ConfigError(
                "options: such a frame needs start_hex, or a check of two bytes, or one lost byte would shift every "
                "later value"
            )
        if not shape.start and options.max_frame_bytes > MAX_UNSTARTED_BYTES:
            raise ConfigError(
                f"options.max_frame_bytes is {options.max_frame_bytes}; without start_hex at most "
                f"{MAX_UNSTARTED_BYTES}, as every byte may then begin a frame"
            )

    def _check_delimiter(self) -> None:
        if not self._delimiter:
            raise ConfigError('options.delimiter is empty; the usual one is "\\n"')
        if self._options.content == "binary":
            raise ConfigError(
                'options.framing = "delimiter" is for text: a delimiter may stand inside a binary value; use fixed, '
                "length, start_stop or gap"
            )

    def _check_fixed(self) -> None:
        self._needs_beginning()
        if self._body_bytes is None:
            self._body_bytes = self._options.frame_bytes - self.shape.around_bytes
            if self._body_bytes < 1:
                raise ConfigError(
                    f'options.frame_bytes is {self._options.frame_bytes}; framing = "fixed" needs the length of a '
                    f"frame, of which start, check and end take {self.shape.around_bytes}"
                )
        elif self._options.frame_bytes not in (0, self._body_bytes + self.shape.around_bytes):
            raise ConfigError(
                f"options.frame_bytes is {self._options.frame_bytes}; start, layout, check and end give "
                f"{self._body_bytes + self.shape.around_bytes}: leave it out"
            )
        self._check_size(self._body_bytes)

    def _check_length(self) -> None:
        options = self._options
        self._needs_beginning()
        _bounded("length_offset", options.length_offset, 0, 64)
        _bounded("length_plus", options.length_plus, -64, 64)
        if options.length_offset < len(self.shape.start):
            raise ConfigError(
                f"options.length_offset is {options.length_offset}, inside the start; it is counted from the frame's "
                "first byte"
            )

    def _check_start_stop(self) -> None:
        shape, escape = self.shape, self._options.escape
        if not shape.start or not shape.end:
            raise ConfigError('options: framing = "start_stop" needs start_hex and end_hex')
        if self._options.content == "binary" and escape == "none" and shape.check == "none":
            raise ConfigError(
                "options: the end may stand inside a binary value; give escape, or check, or use fixed or length"
            )
        wanted = {
            "dle": ("10", shape.start[:1] == shape.end[:1] == b"\x10" and len(shape.end) == 2),
            "slip": ("C0", shape.start == shape.end == b"\xc0"),
            "hdlc": ("7E", shape.start == shape.end == b"\x7e"),
        }.get(escape)
        if wanted is not None and not wanted[1]:
            raise ConfigError(
                f'options: escape = "{escape}" goes with start_hex and end_hex '
                + ('of DLE and one more byte ("10 02", "10 03")' if escape == "dle" else f'= "{wanted[0]}"')
            )

    def _check_gap(self) -> None:
        shape = self.shape
        if shape.check == "none" and self._body_bytes is None and not (shape.start and shape.end):
            raise ConfigError(
                'options: framing = "gap" needs check, or layout, or start_hex and end_hex: half a message looks like '
                "a whole one"
            )
        if self._body_bytes is not None:
            self._check_size(self._body_bytes)

    def _check_size(self, body_bytes: int) -> None:
        size = body_bytes + self.shape.around_bytes
        if size > self._options.max_frame_bytes:
            raise ConfigError(
                f"options: a frame is {size} bytes, above max_frame_bytes ({self._options.max_frame_bytes})"
            )

    def framer(self, counts: LineCounts, *, in_step: bool) -> Framer:
        options, shape = self._options, self.shape
        match options.framing:
            case "delimiter":
                return DelimiterFramer(
                    self._delimiter, options.max_frame_bytes, counts, in_step=in_step, shape=shape
                )
            case "fixed":
                return FixedFramer(shape, self._body_bytes or 0, counts)
            case "length":
                return LengthFramer(
                    shape, options.max_frame_bytes, counts,
                    offset=options.length_offset, size=options.length_bytes, order=options.length_order,
                    length_counts=options.length_counts, plus=options.length_plus,
                )  # fmt: skip
            case "start_stop":
                inside = options.escape == "dle" or (options.content == "binary" and options.escape == "none")
                return StartStopFramer(
                    shape, options.max_frame_bytes, counts, escape=options.escape, starts_inside=inside
                )
            case "gap":
                return GapFramer(
                    shape, options.max_frame_bytes, counts, body_bytes=self._body_bytes, in_step=in_step
                )


# ------------------------------------------------------------------------------------------------------------- text


#: Takes a point's field from a line, from its columns, or from what the device's pattern found in it.
_Take: TypeAlias = Callable[[str, Sequence[str], Found | None], str | None]


class Lines:
    """Text by pattern or column."""

    def __init__(self, options: SerialLineOptions, points: Sequence[SerialLinePoint]) -> None:
        if options.layout:
            raise ConfigError('options.layout belongs to content = "binary"')
        if options.decimal == options.separator:
            raise ConfigError(f"options.decimal and options.separator are both {options.decimal!r}")
        self._options = options
        #: Instruments fill columns up with blanks, as many as it takes. Tabs stand one to a column.
        self._runs = bool(options.separator) and not options.separator.strip(" ")
        #: What is no part of a line. An empty first column is one.
        self._blank = BLANK if self._runs else "".join(set(BLANK) - set(options.separator))
        self._cutting = Cutting(options, None)
        self._pattern = compile_pattern(options.pattern, "options.pattern") if options.pattern else None
        self._fields: dict[str, _Take] = {}
        by_line: dict[str, list[SerialLinePoint]] = {}
        for point in points:
            self._fields[point.name] = self._field_of(point)
            by_line.setdefault(point.line, []).append(point)
        self._lines: list[tuple[Pattern | None, tuple[SerialLinePoint, ...]]] = [
            (compile_pattern(line, f"point {of[0].name!r}: line") if line else None, tuple(of))
            for line, of in by_line.items()
        ]
        self.kinds = [of for _, of in self._lines]

    def _field_of(self, point: SerialLinePoint) -> _Take:
        """How this point's field is taken from a line and its columns."""
        where = f"point {point.name!r}"
        if point.item is not None:
            raise ConfigError(f'{where}: item belongs to content = "binary"; use column, field or pattern')
        refuse_keys(point, ("column", "field", "pattern", "line"), 'protocol = "none"')
        if point.column is not None:
            if point.column < 1:
                raise ConfigError(f"{where}: column is {point.column}; columns are counted from 1")
            if not self._options.separator:
                raise ConfigError(f'{where}: column needs options.separator, as in separator = ","')
            if point.pattern or point.field:
                raise ConfigError(f"{where}: has column and also field or pattern; keep one")
            index = point.column - 1
            return lambda text, columns, found: columns[index] if index < len(columns) else None
        if point.pattern:
            if point.field:
                raise ConfigError(f"{where}: has both field and pattern; keep one")
            own = compile_pattern(point.pattern, f"{where}: pattern")
            if not own.groups:
                raise ConfigError(f"{where}: pattern {point.pattern!r} has no group; put the value in (…)")
            number = own.names.get("value", 1)

            def by_own(text: str, columns: Sequence[str], found: Found | None) -> str | None:
                found = own.search(text)
                return None if found is None else found[number]

            return by_own
        pattern, group = self._pattern, point.field or point.name
        if pattern is None:
            raise ConfigError(
                f"{where}: says not where it stands; give it column or pattern, or give options.pattern"
            )
        if group not in pattern.names:
            known = ", ".join(pattern.names) or "none: write (?P<name>…)"
            raise ConfigError(f"{where}: options.pattern has no group {group!r}; it has {known}")

        return lambda text, columns, found: None if found is None else found[group]

    def framer(self, counts: LineCounts, *, in_step: bool) -> Framer:
        return self._cutting.framer(counts, in_step=in_step)

    def read(self, body: bytes) -> Said:
        options = self._options
        if options.parity != "none" and MARK in body:
            return self.lost(Reason.FRAMING) or Heard((), Reason.FRAMING)
        try:
            text = body.decode(options.encoding).strip(self._blank)
        except UnicodeDecodeError:
            return self.lost(Reason.FRAMING) or Heard((), Reason.FRAMING)
        if not text:
            return None
        wanted = [of for line, of in self._lines if line is None or line.search(text) is not None]
        if not wanted:
            return None
        points = wanted[0] if len(wanted) == 1 else tuple(point for of in wanted for point in of)
        columns = self._columns(text)
        found = self._pattern.search(text) if self._pattern is not None else None
        results: list[Result] = []
        for point in points:
            field = self._fields[point.name](text, columns, found)
            field = field.strip(BLANK) if field is not None else None
            results.append(
                parse(field, point.type, base=point.base, decimal=options.decimal)
                if field
                else Reason.MISSING
            )
        if all(result is Reason.MISSING for result in results):
            return Heard(points, Reason.FRAMING)  # a line of another form
        return Heard(points, results)

    def _columns(self, text: str) -> list[str]:
        separator = self._options.separator
        if not separator:
            return []
        columns = text.split(separator)
        return [column for column in columns if column.strip(" ")] if self._runs else columns

    def lost(self, reason: Reason) -> Said:
        (line, points), *others = self._lines
        return None if others or line is not None else Heard(points, reason)


# ----------------------------------------------------------------------------------------------------------- binary


class Packets:
    """Binary by a layout of Python's `struct` module."""

    def __init__(self, options: SerialLineOptions, points: Sequence[SerialLinePoint]) -> None:
        for key, given in (("separator", options.separator), ("pattern", options.pattern)):
            if given:
                raise ConfigError(f'options.{key} belongs to content = "text"')
        if options.layout[:1] not in ("<", ">", "!"):
            raise ConfigError(
                f'options.layout is {options.layout!r}; begin with "<" (little-endian) or ">" (big)'
            )
        try:
            self._struct = struct.Struct(options.layout)
        except (struct.error, UnicodeEncodeError) as exc:
            raise ConfigError(f"options.layout {options.layout!r}: {exc}") from exc
        size = self._struct.size
        if size > options.max_frame_bytes:
            raise ConfigError(
                f"options: a frame is {size} bytes and more, above max_frame_bytes ({options.max_frame_bytes})"
            )
        items = len(self._struct.unpack(bytes(size)))
        exact = options.framing in ("fixed", "gap")
        self._cutting = Cutting(options, size if exact else None)
        for point in points:
            refuse_keys(point, ("item",), 'content = "binary"')
            if point.item is None or not 1 <= point.item <= items:
                raise ConfigError(
                    f"point {point.name!r}: item is {point.item}; the layout has items 1 to {items}"
                )
        self._points = tuple(points)
        self._items = tuple((point.item or 1) - 1 for point in points)
        self.kinds = [self._points]

    def framer(self, counts: LineCounts, *, in_step: bool) -> Framer:
        return self._cutting.framer(counts, in_step=in_step)

    def read(self, body: bytes) -> Said:
        if len(body) < self._struct.size:
            return Heard(self._points, Reason.FRAMING)
        values = self._struct.unpack_from(body)
        return Heard(
            self._points,
            [fit(values[item], point.type) for item, point in zip(self._items, self._points, strict=True)],
        )

    def lost(self, reason: Reason) -> Said:
        return Heard(self._points, reason)
