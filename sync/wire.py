"""The wire format: what a gateway stores, sends, and what the cloud answers. Pure; docs in `sync/WIRE.md`.

Encode once, forward bytes. A scan becomes a *frame* at the edge; frames with consecutive seq are *sealed* into a
batch; buffer, forwarder, door and journal move the bytes, and only a sink decodes them.

Rules:
1. A batch holds exactly the frames `first..last`, no holes; (gateway, epoch, first, last) never changes meaning.
2. The head is readable without decompressing; its CRC covers head and body, so intake refuses damage without decoding.
3. Any batch decodes alone, years later: it carries its layouts and its rows of the clock table.
4. Every limit is checked before memory is spent on what it limits.
5. Fields are only ever added at the end of an array; a reader ignores trailing fields that it does not know, and an
   unknown envelope version or compression is refused by name.

Layout of a sealed batch::

    byte 0        version << 4 | compression          (compression: 0 none, 1 zstd)
    msgpack       Head  [gateway, epoch, first, last, readings, raw_bytes, crc32]
    rest          body, compressed: msgpack Body [layouts, clocks, frames]

Values in a frame are packed little-endian, grouped by width (8, 4, 2, 1 bytes; within a width in layout order) and
each group is stored as byte planes (all lowest bytes first): neighbouring frames then share long runs, and zstd finds
them. Booleans are one byte. Strings travel beside, in layout order.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, TypeAlias

import msgspec
import zstandard

from drivers.contract import Point, Reason, Scan, Value, engineering

VERSION: Final = 1
COMPRESSION_NONE: Final = 0
COMPRESSION_ZSTD: Final = 1
MAX_BATCH_BYTES: Final = 256 * 1024  #: NATS closes at 1 MiB, and cheap links want less
MAX_RAW_BYTES: Final = 4 * 1024 * 1024  #: a body may not grow beyond this when decompressed
MAX_FRAMES: Final = 65_536  #: frames in one batch
MAX_POINTS: Final = 4_096  #: points in one layout
MAX_EPOCH: Final = 2**63 - 1  #: fits a signed 64-bit column
ZSTD_LEVEL: Final = 3


class WireError(ValueError):
    """Bytes that are not what they claim; `code` is one word for counters, the text says what was expected."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


# --- records ---


class Layout(msgspec.Struct, frozen=True, array_like=True):
    """What a device's frames mean: stored once per batch, named in frames by `layout_id` of its content."""

    device: str
    driver: str
    measurement: str
    names: tuple[str, ...]
    types: tuple[str, ...]  #: `ValueType` words
    units: tuple[str, ...]
    scales: tuple[float, ...]
    offsets: tuple[float, ...]
    tags: tuple[tuple[str, str], ...] = ()


class ClockRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One row of the gateway's clock table: at `boot_ns` of boot number `boot`, the wall clock showed `wall_ns`."""

    boot: int  #: the gateway's own small number for this boot, unique within the epoch
    boot_id: str  #: the kernel's /proc/sys/kernel/random/boot_id
    boot_ns: int
    wall_ns: int
    synchronized: bool
    error_ns: int = 0  #: the kernel's maximum error (adjtimex maxerror), 0 where unknown


class ScanFrame(msgspec.Struct, frozen=True, array_like=True, tag=0, gc=False):
    """One scan. `reasons` is packed (u16 index, u8 reason) triples, or one triple with index 0xFFFF for all points."""

    layout: int
    boot: int
    taken_at_ns: int  #: boot clock
    values: bytes
    reasons: bytes = b""
    texts: tuple[str | None, ...] = ()


class GapFrame(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """A counted hole: what was dropped, when and why. `first..last` are the dropped seqs of `epoch`; a hole in front
    of the buffer (an overrun, a full push queue) has no seqs: `first = last = 0`.

    Where the buffer drops by priority, frames of other priorities stand between those it drops: `frames` then says
    how many of `first..last` are gone, and the others of the range are held, sent or in another gap (`sparse`)."""

    epoch: int
    first: int
    last: int
    scans: int
    readings: int
    reason: str  #: one word: evicted, corrupt, overrun, refused, ...
    device: str  #: "" where it covers several
    boot: int
    from_boot_ns: int
    to_boot_ns: int
    priority: str = ""  #: of all that was dropped: alarm, normal or bulk; "" where unknown or mixed
    frames: int = 0  #: how many of the seqs `first..last` are gone; 0: all of them

    @property
    def sparse(self) -> bool:
        """Whether other frames within `first..last` are none of this gap's. What it reports was never sent."""
        return 0 < self.frames <= self.last - self.first


class EventFrame(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Something worth keeping that is not a reading: a start, a link change, a driver that failed."""

    boot: int
    at_boot_ns: int
    code: str
    text: str
    device: str = ""


Frame: TypeAlias = ScanFrame | GapFrame | EventFrame


class Head(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What intake needs to know about a batch."""

    gateway: str  #: `<tenant>/<gateway>`
    epoch: int
    first: int
    last: int
    readings: int
    raw_bytes: int
    crc32: int


class Body(msgspec.Struct, frozen=True, array_like=True):
    layouts: tuple[Layout, ...]
    clocks: tuple[ClockRow, ...]
    frames: tuple[msgspec.Raw, ...]


class Sealed(msgspec.Struct, frozen=True, gc=False):
    """A batch ready to send: its identity and its bytes."""

    epoch: int
    first: int
    last: int
    payload: bytes


class Ack(msgspec.Struct, frozen=True, array_like=True, tag=0, gc=False):
    """The journal holds all frames of these closed ranges of `epoch`."""

    epoch: int
    ranges: tuple[tuple[int, int], ...]
    cloud_ns: int = 0  #: the cloud's wall clock, for reporting skew; 0 where not told
    spread_s: int = 0  #: over how long the fleet shall spread its return when the way was lost


class Nack(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """The journal does not hold this batch. `retry_after_s` None means: never, as it is."""

    epoch: int
    first: int
    last: int
    code: str
    text: str
    retry_after_s: float | None = None


Reply: TypeAlias = Ack | Nack

_encode = msgspec.msgpack.Encoder().encode
_decode_head = msgspec.msgpack.Decoder(Head).decode
_decode_body = msgspec.msgpack.Decoder(Body).decode
_decode_frame: Callable[[bytes | msgspec.Raw], Frame] = msgspec.msgpack.Decoder(
    ScanFrame | GapFrame | EventFrame
).decode
_decode_reply: Callable[[bytes | memoryview], Reply] = msgspec.msgpack.Decoder(Ack | Nack).decode

# --- layouts and frames ---

_CODE: Final[Mapping[str, str]] = {
    "bool": "B", "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i", "u32": "I",
    "i64": "q", "u64": "Q", "f32": "f", "f64": "d",
}  # fmt: skip
_WIDTHS: Final = (8, 4, 2, 1)
ALL_POINTS: Final = 0xFFFF  #: in a reason triple: every point of the scan
_TRIPLE: Final = struct.Struct("<HB")


def layout_of(
    device: str,
    driver: str,
    measurement: str,
    points: Sequence[Point],
    tags: tuple[tuple[str, str], ...] = (),
) -> Layout:
    """The layout of a scan of these points, in this order. Raises `WireError` where there are too many."""
    if not 0 < len(points) <= MAX_POINTS:
        raise WireError("points", f"device {device!r}: {len(points)} points; 1 to {MAX_POINTS} fit a layout")
    return Layout(
        device, driver, measurement,
        tuple(p.name for p in points), tuple(p.type.value for p in points), tuple(p.unit for p in points),
        tuple(float(p.scale) for p in points), tuple(float(p.offset) for p in points), tags,
    )  # fmt: skip


def layout_id(layout: Layout) -> int:
    """The layout's name in frames: the first 8 bytes of the SHA-256 of its msgpack, as a big-endian integer."""
    return int.from_bytes(hashlib.sha256(_encode(layout)).digest()[:8], "big")


class Packing:
    """The compiled form of one layout: packs and unpacks its values. Build once per layout, use for every scan."""

    __slots__ = ("_groups", "_size", "_texts", "bools", "id", "layout")

    def __init__(self, layout: Layout) -> None:
        sizes = {
            len(layout.types),
            len(layout.units),
            len(layout.scales),
            len(layout.offsets),
            len(layout.names),
        }
        if len(sizes) != 1 or not 0 < len(layout.names) <= MAX_POINTS:
            raise WireError(
                "layout", f"device {layout.device!r}: its layout's columns differ in length or are empty"
            )
        unknown = [t for t in layout.types if t != "str" and t not in _CODE]
        if unknown:
            raise WireError("layout", f"device {layout.device!r}: unknown value type {unknown[0]!r}")
        self.layout = layout
        self.id = layout_id(layout)
        self.bools = tuple(i for i, t in enumerate(layout.types) if t == "bool")
        self._texts = tuple(i for i, t in enumerate(layout.types) if t == "str")
        self._groups: list[tuple[int, struct.Struct, tuple[int, ...], bool]] = []
        for width in _WIDTHS:
            at = tuple(
                i
                for i, t in enumerate(layout.types)
                if t != "str" and struct.calcsize("<" + _CODE[t]) == width
            )
            if at:
                packer = struct.Struct("<" + "".join(_CODE[layout.types[i]] for i in at))
                self._groups.append((width, packer, at, len(at) == len(layout.types)))
        self._size = sum(packer.size for _, packer, _, _ in self._groups)

    def pack(self, values: Sequence[Value | None]) -> tuple[bytes, tuple[str | None, ...]]:
        """The packed numbers and the texts. `None` is packed as zero: its reason says that there is no value.

        Raises `struct.error` or `TypeError` where a value does not fit its type (`fit` finds which).
        """
        parts: list[bytes] = []
        for width, packer, at, whole in self._groups:
            column = values if whole else [values[i] for i in at]
            try:
                packed = packer.pack(*column)
            except (struct.error, TypeError):
                packed = packer.pack(*[0 if v is None else v for v in column])
            if width == 1:
                parts.append(packed)
            else:
                parts.extend(packed[plane::width] for plane in range(width))
        texts = tuple(_text(values[i]) for i in self._texts) if self._texts else ()
        return b"".join(parts), texts

    def unpack(self, packed: bytes, texts: Sequence[str | None]) -> list[Value | None]:
        """The raw values in layout order. Raises `WireError` where the sizes disagree with the layout."""
        if len(packed) != self._size or len(texts) != len(self._texts):
            raise WireError("frame", f"{len(packed)} value bytes and {len(texts)} texts; the layout of device "
                            f"{self.layout.device!r} has {self._size} and {len(self._texts)}")  # fmt: skip
        values: list[Value | None] = [None] * len(self.layout.names)
        start = 0
        for width, packer, at, whole in self._groups:
            group = packed[start : start + packer.size]
            start += packer.size
            if width > 1:
                count = len(at)
                joined = bytearray(packer.size)
                for plane in range(width):
                    joined[plane::width] = group[plane * count : (plane + 1) * count]
                group = bytes(joined)
            column = packer.unpack(group)
            if whole:
                values = list(column)
            else:
                for i, value in zip(at, column, strict=True):
                    values[i] = value
        for i, text in zip(self._texts, texts, strict=True):
            values[i] = text
        for i in self.bools:
            values[i] = bool(values[i])
        return values

    def fit(self, values: Sequence[Value | None]) -> list[int]:
        """The indices of the values that do not fit their point's type."""
        bad = []
        for i, value in enumerate(values):
            kind = self.layout.types[i]
            if value is None or kind == "str":
                if value is not None and not isinstance(value, str):
                    bad.append(i)
                continue
            try:
                struct.pack("<" + _CODE[kind], value)
            except (struct.error, TypeError, OverflowError):
                bad.append(i)
        return bad


def _text(value: Value | None) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise TypeError(f"expected a string, got {type(value).__name__}")


def pack_reasons(reasons: Mapping[int, Reason], points: int) -> bytes:
    """Sparse reasons as (index, reason) triples in index order; one triple where all points share one reason."""
    if not reasons:
        return b""
    if len(reasons) == points and len(set(reasons.values())) == 1:
        return _TRIPLE.pack(ALL_POINTS, next(iter(reasons.values())))
    return b"".join(_TRIPLE.pack(i, reason) for i, reason in sorted(reasons.items()) if reason)


def unpack_reasons(packed: bytes, points: int) -> dict[int, Reason]:
    """The inverse. An unknown reason number keeps its quality by its range: it becomes the nearest of that range's
    plainest reasons. Raises `WireError` for a triple that names no point."""
    if not packed:
        return {}
    if len(packed) % _TRIPLE.size:
        raise WireError("frame", f"{len(packed)} reason bytes; expected a multiple of {_TRIPLE.size}")
    reasons: dict[int, Reason] = {}
    for index, code in _TRIPLE.iter_unpack(packed):
        reason = _reason(code)
        if index == ALL_POINTS:
            return dict.fromkeys(range(points), reason)
        if index >= points:
            raise WireError("frame", f"a reason for point {index}; the layout has {points}")
        reasons[index] = reason
    return reasons


def _reason(code: int) -> Reason:
    try:
        return Reason(code)
    except ValueError:  # a newer agent's reason: keep what its number says about the quality
        return Reason.DEVICE_DOUBT if code < 64 else Reason.DEVICE_FAULT if code < 128 else Reason.DRIVER


def encode_scan(packing: Packing, scan: Scan, boot: int) -> bytes:
    """One scan as a frame. Raises `struct.error` or `TypeError` where a value does not fit (see `Packing.fit`)."""
    packed, texts = packing.pack(scan.values)
    reasons = pack_reasons(scan.reasons, len(scan.points)) if scan.reasons else b""
    return _encode(ScanFrame(packing.id, boot, scan.taken_at_ns, packed, reasons, texts))


def encode_frame(frame: Frame) -> bytes:
    """Any frame as bytes."""
    return _encode(frame)


def decode_frame(data: bytes | msgspec.Raw) -> Frame:
    """Raises `WireError`, also for a kind of frame that this version does not know."""
    try:
        return _decode_frame(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise WireError("frame", f"not a frame this version knows: {err}") from err


# --- batches ---


def seal(
    gateway: str,
    epoch: int,
    first: int,
    frames: Sequence[bytes],
    layouts: Sequence[Layout],
    clocks: Sequence[ClockRow],
    readings: int,
    *,
    compressor: zstandard.ZstdCompressor | None = None,
) -> Sealed:
    """Frames `first..first+len(frames)-1` as one batch. The same arguments always give the same bytes.

    Raises `WireError` ("size") where the batch would be above a limit: seal fewer frames.
    """
    if not 0 < len(frames) <= MAX_FRAMES:
        raise WireError("size", f"{len(frames)} frames; 1 to {MAX_FRAMES} fit a batch")
    body = _encode(Body(tuple(layouts), tuple(clocks), tuple(msgspec.Raw(f) for f in frames)))
    if len(body) > MAX_RAW_BYTES:
        raise WireError("size", f"{len(body)} bytes before compression; the limit is {MAX_RAW_BYTES}")
    packed = (compressor or zstandard.ZstdCompressor(level=ZSTD_LEVEL)).compress(body)
    last = first + len(frames) - 1
    crc = _crc(gateway, epoch, first, last, readings, len(body), packed)
    head = Head(gateway, epoch, first, last, readings, len(body), crc)
    payload = bytes((VERSION << 4 | COMPRESSION_ZSTD,)) + _encode(head) + packed
    if len(payload) > MAX_BATCH_BYTES:
        raise WireError("size", f"{len(payload)} bytes; the limit is {MAX_BATCH_BYTES}")
    return Sealed(epoch, first, last, payload)


def open_head(payload: bytes) -> tuple[Head, int]:
    """The head, checked, and where the body starts. Decompresses nothing. Raises `WireError`."""
    if not payload:
        raise WireError("truncated", "an empty batch")
    if len(payload) > MAX_BATCH_BYTES:
        raise WireError("size", f"{len(payload)} bytes; the limit is {MAX_BATCH_BYTES}")
    version, compression = payload[0] >> 4, payload[0] & 0x0F
    if version != VERSION or compression not in (COMPRESSION_NONE, COMPRESSION_ZSTD):
        if len(payload) > 1 and not 0x90 <= payload[1] <= 0x9F:  # every version's head is a short array
            raise WireError("head", "not a batch: no head follows the first byte")
        raise WireError(
            "version",
            f"envelope version {version}, compression {compression}; this cloud reads version {VERSION},"
            " compression 0 (none) and 1 (zstd)",
        )
    size = _head_size(payload)
    try:
        head = _decode_head(memoryview(payload)[1 : 1 + size])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise WireError("head", f"the head of the batch does not decode: {err}") from err
    if not (0 < head.epoch <= MAX_EPOCH and 0 < head.first <= head.last <= MAX_EPOCH):
        raise WireError("head", f"epoch {head.epoch}, frames {head.first}..{head.last}: not a range")
    if head.last - head.first >= MAX_FRAMES or head.readings < 0:
        raise WireError("head", f"{head.last - head.first + 1} frames; the limit is {MAX_FRAMES}")
    if not 0 <= head.raw_bytes <= MAX_RAW_BYTES:
        raise WireError("size", f"{head.raw_bytes} bytes uncompressed; the limit is {MAX_RAW_BYTES}")
    told = (head.gateway, head.epoch, head.first, head.last, head.readings, head.raw_bytes)
    if _crc(*told, memoryview(payload)[1 + size :]) != head.crc32:
        raise WireError("crc", "the batch's CRC-32 is not the one in its head: damaged on the way")
    return head, 1 + size


def _crc(
    gateway: str, epoch: int, first: int, last: int, readings: int, raw_bytes: int, packed: bytes | memoryview
) -> int:
    """CRC-32 (zlib's) over the head's own fields as text, `gateway|epoch|first|last|readings|raw_bytes`, then the body:
    a flipped bit in an epoch or seq is as fatal as one in a value."""
    told = f"{gateway}|{epoch}|{first}|{last}|{readings}|{raw_bytes}"
    return zlib.crc32(packed, zlib.crc32(told.encode()))


def claimed(payload: bytes) -> tuple[int, int, int]:
    """What a refused batch says of itself, unchecked, to name it in the refusal: epoch, first and last, or zeros."""
    try:
        head = _decode_head(memoryview(payload)[1 : 1 + _head_size(payload)])
    except (WireError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 0, 0, 0
    return head.epoch, head.first, head.last


def _head_size(payload: bytes) -> int:
    """Where the head's msgpack ends. msgspec has no partial decode, so the array is walked here: a handful of
    fields of the plain kinds a head is made of (an unknown trailing field may be any integer, string or bin)."""
    at = 1
    try:
        first = payload[at]
        if not 0x90 <= first <= 0x9F:  # fixarray
            raise WireError("head", "the head of the batch is not an array")
        at += 1
        for _ in range(first & 0x0F):
            at += _item_size(payload, at)
    except (IndexError, struct.error) as err:
        raise WireError("truncated", "the batch ends within its head") from err
    if at > len(payload):
        raise WireError("truncated", "the batch ends within its head")
    return at - 1


_FIXED: Final[Mapping[int, int]] = {
    0xC0: 1, 0xC2: 1, 0xC3: 1, 0xCA: 5, 0xCB: 9, 0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9, 0xD0: 2, 0xD1: 3, 0xD2: 5, 0xD3: 9,
}  # fmt: skip
"""Sizes of nil, booleans, floats and integers (MessagePack specification, formats overview)."""


def _item_size(payload: bytes, at: int) -> int:
    code = payload[at]
    if code < 0x80 or code >= 0xE0:
        return 1
    if 0xA0 <= code <= 0xBF:
        return 1 + (code & 0x1F)
    if code in _FIXED:
        return _FIXED[code]
    if code in (0xC4, 0xD9):
        return 2 + payload[at + 1]
    if code in (0xC5, 0xDA):
        return 3 + int.from_bytes(payload[at + 1 : at + 3], "big")
    raise WireError("head", f"the head of the batch holds a msgpack type 0x{code:02x} that no head has")


def open_body(payload: bytes) -> tuple[Head, Body]:
    """The whole batch, checked. Raises `WireError`; memory is bounded by `MAX_RAW_BYTES`."""
    head, start = open_head(payload)
    packed = payload[start:]
    if payload[0] & 0x0F == COMPRESSION_ZSTD:
        try:
            params = zstandard.get_frame_parameters(packed)
            if params.content_size != head.raw_bytes:
                raise WireError(
                    "size", f"the body grows to {params.content_size} bytes, its head says {head.raw_bytes}"
                )
            raw = zstandard.ZstdDecompressor(max_window_size=2**23).decompress(packed, allow_extra_data=False)
        except zstandard.ZstdError as err:
            raise WireError("compression", f"the body does not decompress: {err}") from err
    else:
        raw = packed
    if len(raw) != head.raw_bytes:
        raise WireError("size", f"the body has {len(raw)} bytes, its head says {head.raw_bytes}")
    try:
        body = _decode_body(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise WireError("body", f"the body does not decode: {err}") from err
    if len(body.frames) != head.last - head.first + 1:
        raise WireError("body", f"{len(body.frames)} frames for seqs {head.first}..{head.last}")
    return head, body


def wall_clock(clocks: Sequence[ClockRow]) -> dict[int, ClockRow]:
    """Per boot the row to compute wall time from: the last one that was synchronized, else the last."""
    best: dict[int, ClockRow] = {}
    for row in clocks:
        held = best.get(row.boot)
        if held is None or row.synchronized or not held.synchronized:
            best[row.boot] = row
    return best


# --- replies ---


def encode_reply(reply: Reply) -> bytes:
    """An ack or a nack as bytes: one version byte, then msgpack."""
    if isinstance(reply, Ack) and not reply.spread_s:  # as small as it was before there was a spread
        return bytes((VERSION << 4,)) + _encode((0, reply.epoch, reply.ranges, reply.cloud_ns))
    return bytes((VERSION << 4,)) + _encode(reply)


def decode_reply(data: bytes) -> Reply:
    """Raises `WireError`."""
    if not data or data[0] >> 4 != VERSION:
        raise WireError("version", "not a reply of a version this agent reads")
    try:
        return _decode_reply(memoryview(data)[1:])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise WireError("reply", f"the reply does not decode: {err}") from err


def shown(layout: Layout, values: Sequence[Value | None]) -> list[Value | None]:
    """The engineering values of a scan's raw values; strings and booleans pass, integers at scale 1 stay integers."""
    out: list[Value | None] = []
    for value, scale, offset in zip(values, layout.scales, layout.offsets, strict=True):
        if value is None or isinstance(value, (bool, str)) or (scale == 1.0 and offset == 0.0):
            out.append(value)
        else:
            out.append(engineering(value, scale, offset))
    return out


# --- batches in a file, carried by hand ---

EXPORT_MAGIC: Final = b"HEADGATE-EXPORT\n"
_MAX_EXPORT_HEAD: Final = 4096
_EXPORT_SIZE: Final = struct.Struct(">I")
_EXPORT_END: Final = struct.Struct(
    ">Q32s"
)  #: how many batches, SHA-256 of every byte before the end's own size


class ExportHead(msgspec.Struct, frozen=True, array_like=True):
    """Who wrote the file, and when."""

    gateway: str
    made_ns: int  #: the gateway's wall clock
    agent: str  #: version of the agent


class ExportWriter:
    """The bytes of an export file, piece by piece: `start`, a `record` for each batch, `end`."""

    def __init__(self, head: ExportHead) -> None:
        self.batches = 0
        self._digest = hashlib.sha256()
        told = _encode(head)
        self.start = self._seen(EXPORT_MAGIC + _EXPORT_SIZE.pack(len(told)) + told)

    def record(self, payload: bytes) -> bytes:
        """One sealed batch."""
        self.batches += 1
        return self._seen(_EXPORT_SIZE.pack(len(payload)) + payload)

    def end(self) -> bytes:
        """A size of 0, then the count and the digest: a file without its end was cut short."""
        return _EXPORT_SIZE.pack(0) + _EXPORT_END.pack(self.batches, self._digest.digest())

    def _seen(self, piece: bytes) -> bytes:
        self._digest.update(piece)
        return piece


def read_export(read: Callable[[int], bytes]) -> tuple[ExportHead, Iterator[bytes]]:
    """An export file's head and its batches, as they come; `read` is a file's. What a batch holds is not looked at
    (`open_head` checks it). Raises `WireError`, the iterator too: "truncated" where the file ends early, "export" where
    it is none, "crc" where all came and the whole is not what was written."""
    digest = hashlib.sha256()

    def take(size: int, what: str) -> bytes:
        piece = read(size)
        if len(piece) != size:
            raise WireError(
                "truncated", f"the file ends within {what}: it was not written to its end, or cut"
            )
        digest.update(piece)
        return piece

    if read(len(EXPORT_MAGIC)) != EXPORT_MAGIC:
        raise WireError("export", "this is no export of a gateway's buffer")
    digest.update(EXPORT_MAGIC)
    (size,) = _EXPORT_SIZE.unpack(take(_EXPORT_SIZE.size, "its head"))
    if not 0 < size <= _MAX_EXPORT_HEAD:
        raise WireError("export", f"its head claims {size} bytes; at most {_MAX_EXPORT_HEAD} are possible")
    try:
        head = msgspec.msgpack.decode(take(size, "its head"), type=ExportHead)
    except (msgspec.DecodeError, UnicodeDecodeError) as err:
        raise WireError("export", f"its head does not decode: {err}") from err

    def batches() -> Iterator[bytes]:
        count = 0
        while True:
            piece = read(_EXPORT_SIZE.size)
            if len(piece) != _EXPORT_SIZE.size:
                raise WireError("truncated", f"the file ends after {count} batches, without its end")
            (size,) = _EXPORT_SIZE.unpack(piece)
            if size == 0:
                break
            if size > MAX_BATCH_BYTES:
                raise WireError(
                    "export", f"after {count} batches one claims {size} bytes: the file is damaged there"
                )
            digest.update(piece)
            yield take(size, f"batch {count + 1}")
            count += 1
        last = read(_EXPORT_END.size)
        if len(last) != _EXPORT_END.size:
            raise WireError("truncated", f"the file ends after {count} batches, within its end")
        if _EXPORT_END.unpack(last) != (count, digest.digest()):
            raise WireError("crc", "the file is not what was written: some batch in it is damaged or missing")

    return head, batches()
