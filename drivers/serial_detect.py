"""What bytes heard on a serial line look like: for a technician who does not know what is at the other end.

`recognise` is pure: bytes in, guesses out, the likeliest first, each with what a device table would need. Rules: a
check that agrees is worth more than any look; noise of a wrong speed must come out as noise, or the scan would stop at
it; work is bounded by `MAX_BYTES`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from drivers.checks import crc16_arc, crc16_modbus, xor_of
from drivers.contract import Reason, Value
from drivers.framing import LineCounts
from drivers.instrument import SerialLineOptions
from drivers.nmea import split
from drivers.obis import DataSets
from drivers.scales import Parse, Weighing, and_standard, cas, ohaus, sbi, toledo_frames

MAX_BYTES: Final = 8_192  #: looked at; the newest


class Guess(msgspec.Struct, frozen=True, kw_only=True):
    """What it may be."""

    kind: str  #: "nmea0183", "dsmr", "iec62056", "toledo", …, "modbus_rtu", "mbus", "text", "binary", "noise"
    description: str  #: for a person
    likelihood: float  #: 0..1
    driver: str | None = None  #: the driver that would read it
    options: dict[str, Value] = {}  #: for its device table, beside port and speed
    sample: str = ""  #: some of it, readable
    seven_bits: bool = False  #: heard as 8 bits, it is 7 bits and even parity


def recognise(captured: bytes) -> list[Guess]:
    """The guesses, likeliest first; never none. Nothing heard is "silence"."""
    data = captured[-MAX_BYTES:]
    if not data:
        return [Guess(kind="silence", description="nothing was heard", likelihood=1.0)]
    guesses = [guess for look in _LOOKS for guess in look(data)]
    if _even_parity(data):
        low = data.translate(_LOW)
        more = [guess for look in _LOOKS for guess in look(low)]
        guesses[:0] = [
            msgspec.structs.replace(
                guess, seven_bits=True, description=f"{guess.description}; 7 bits, even parity"
            )
            for guess in more
            if guess.kind not in ("modbus_rtu", "mbus", "binary")
        ]
    best = max((guess.likelihood for guess in guesses), default=0.0)
    guesses.append(_noise(data, best))
    return sorted(guesses, key=lambda guess: -guess.likelihood)


_LOW: Final = bytes(range(128)) * 2


def _even_parity(data: bytes) -> bool:
    """All characters have even parity in their eighth bit, and some have it set."""
    return (
        len(data) >= 16 and max(data) > 0x7F and sum(byte.bit_count() % 2 for byte in data) * 50 < len(data)
    )


def _lines(data: bytes) -> list[bytes]:
    """The whole lines; the first and last may be cut."""
    return [line.strip(b"\r\0") for line in data.split(b"\n")[1:-1] if line.strip()] or [
        line.strip(b"\r\0") for line in data.split(b"\n")[:-1] if line.strip()
    ]


def _shown(data: bytes) -> str:
    return data[:60].decode("ascii", "replace").replace("\r", "").strip()


def _sure(good: int, of: int, at_best: float) -> float:
    """More of them, and fewer that are not: likelier. One alone may be chance."""
    return at_best * (good / of) * (1 - 0.3 / good) if good else 0.0


# --------------------------------------------------------------------------------------------------------- each look


def _nmea(data: bytes) -> Iterator[Guess]:
    lines = [line for line in _lines(data) if b"$" in line or b"!" in line]
    checked = [found for line in lines if not isinstance(found := split(line, checked=True), Reason)]
    if checked:
        names = ", ".join(name for name, _ in Counter(address for address, _ in checked).most_common(6))
        yield Guess(
            kind="nmea0183", description=f"NMEA 0183 sentences: {names}",
            likelihood=_sure(len(checked), len(lines), 1.0),
            driver="serial_line", options={"protocol": "nmea0183"},
            sample=_shown(lines[0]),
        )  # fmt: skip


_TELEGRAM: Final = re.compile(rb"/[A-Za-z]{3}[\x20-\x7e]{1,40}\r?\n\r?\n[^/!]{1,8000}!([0-9A-Fa-f]{4})?\r?\n")


def _dsmr(data: bytes) -> Iterator[Guess]:
    for found in _TELEGRAM.finditer(data):
        end = found.start(1) if found[1] else found.end() - len(found[0].rsplit(b"!", 1)[1])
        telegram = data[found.start() : end]
        agrees = bool(found[1]) and int(found[1], 16) == crc16_arc(telegram)
        sets = len(DataSets(telegram.decode("ascii", "replace")))
        if not sets:
            continue
        yield Guess(
            kind="dsmr", description=f"a meter's telegrams (DSMR P1) with {sets} values",
            likelihood=0.99 if agrees else 0.4 if found[1] else 0.85,
            driver="serial_line", options={"protocol": "dsmr"} | ({} if found[1] else {"checked": False}),
            sample=_shown(telegram),
        )  # fmt: skip
        return


_IEC: Final = re.compile(rb"\x02([^\x02\x03]{1,8000}\x03)([\x00-\xff])", re.DOTALL)


def _iec(data: bytes) -> Iterator[Guess]:
    for block, check in _IEC.findall(data):
        sets = len(DataSets(block.decode("ascii", "replace")))
        if sets and xor_of(block) & 0x7F == check[0] & 0x7F:
            yield Guess(
                kind="iec62056", description=f"a meter's readout (IEC 62056-21) with {sets} values", likelihood=0.97,
                driver="iec62056", sample=_shown(block),
            )  # fmt: skip
            return
    if said := re.search(rb"/[A-Z][A-Za-z]{2}[0-9A-F][\x21-\x7e]{3,16}\r\n", data):
        yield Guess(
            kind="iec62056", description=f"a meter that identifies itself (IEC 62056-21): {_shown(said[0])}",
            likelihood=0.8, driver="iec62056", sample=_shown(said[0]),
        )  # fmt: skip


_SCALES: Final[tuple[tuple[str, str, Parse, float], ...]] = (
    ("cas", "CAS scale, 22 bytes", cas, 0.97),
    ("and", "A&D standard format", and_standard, 0.96),
    ("sbi", "Sartorius SBI", sbi, 0.93),
    ("ohaus", "Ohaus scale", ohaus, 0.85),
)


def _scales(data: bytes) -> Iterator[Guess]:
    lines = _lines(data)
    for kind, name, parse, at_best in _SCALES:
        good = [
            line for line in lines if isinstance(said := parse(line), Weighing) and said.weight is not None
        ]
        if len(good) * 2 > len(lines):
            yield Guess(
                kind=kind, description=name, likelihood=_sure(len(good), len(lines), at_best),
                driver="serial_line", options={"protocol": kind}, sample=_shown(good[0]),
            )  # fmt: skip


def _toledo(data: bytes) -> Iterator[Guess]:
    for checked, at_best in ((True, 0.98), (False, 0.9)):
        counts = LineCounts()
        frames = toledo_frames(data, counts, checked=checked)
        if len(frames) >= 2 and len(frames) * (17 + checked) * 2 > len(data):
            options: dict[str, Value] = {"protocol": "toledo"}
            yield Guess(
                kind="toledo", description="Mettler Toledo continuous output" + (" with check" if checked else ""),
                likelihood=_sure(len(frames), max(len(frames), len(data) // (17 + checked)), at_best),
                driver="serial_line", options=options if checked else options | {"checked": False},
                sample=_shown(frames[0]),
            )  # fmt: skip
            return


def _modbus_sizes(data: bytes, at: int) -> Iterator[int]:
    """How long a Modbus RTU request or reply that begins here would be (Modbus application protocol 1.1b3, 6)."""
    function = data[at + 1]
    if function & 0x80:
        yield 5
    elif 1 <= function <= 6:
        yield 8
        if function <= 4 and at + 2 < len(data):
            yield 5 + data[at + 2]
    elif function in (15, 16):
        yield 8
        if at + 6 < len(data):
            yield 9 + data[at + 6]


def _modbus(data: bytes) -> Iterator[Guess]:
    units: Counter[int] = Counter()
    covered = at = 0
    while at + 5 <= len(data):
        for size in _modbus_sizes(data, at):
            frame = data[at : at + size]
            if len(frame) == size and crc16_modbus(frame[:-2]) == int.from_bytes(frame[-2:], "little"):
                units[frame[0]] += 1
                covered += size
                at += size
                break
        else:
            at += 1
    if covered * 2 > len(data) and units:
        names = ", ".join(map(str, sorted(units)[:8]))
        yield Guess(
            kind="modbus_rtu", description=f"Modbus RTU traffic of unit {names}: somebody is asking already",
            likelihood=_sure(units.total(), units.total(), 0.99) * covered / len(data), driver="modbus",
        )  # fmt: skip


def _mbus(data: bytes) -> Iterator[Guess]:
    for found in re.finditer(rb"\x68([\x03-\xff])\1\x68", data):
        size = found[1][0]
        frame = data[found.start() : found.start() + size + 6]
        if len(frame) == size + 6 and frame[-1] == 0x16 and sum(frame[4:-2]) & 0xFF == frame[-2]:
            yield Guess(kind="mbus", description="M-Bus telegrams (EN 13757-2)", likelihood=0.95)
            return


_NUMBER: Final = re.compile(rb"(?<![\w.])[-+]?\d{1,12}(?:[.,]\d{1,12})?(?![\w.])|\d")
_PRINTABLE: Final = frozenset(range(32, 127)) | {9, 10, 13}


def _printable(data: bytes) -> float:
    return sum(byte in _PRINTABLE for byte in data) / len(data)


def _text(data: bytes) -> Iterator[Guess]:
    delimiter = next((mark for mark in (b"\r\n", b"\n", b"\r") if data.count(mark) >= 2), None)
    share = _printable(data)
    if delimiter is None or share < 0.95:
        return
    lines = [line for line in data.split(delimiter)[1:-1] if line.strip()]
    if not lines or max(map(len, lines)) > 512:
        return
    numbers = sum(bool(_NUMBER.search(line)) for line in lines)
    separator = next(
        (
            mark
            for mark in (b";", b",", b"\t")
            if lines[0].count(mark) and len({line.count(mark) for line in lines}) == 1
        ),
        b"",
    )
    shown = repr(delimiter.decode())[1:-1]
    options: dict[str, Value] = {"delimiter": delimiter.decode()}
    if separator:
        options["separator"] = separator.decode()
    yield Guess(
        kind="text",
        description=f"lines of text that end in {shown}"
        + (", with numbers" if numbers else ", without numbers"),
        likelihood=share * (0.75 if numbers * 2 > len(lines) else 0.45) * (1 - 0.3 / len(lines)),
        driver="serial_line",
        options={key: value for key, value in options.items() if value != _DEFAULTS[key]},
        sample=_shown(lines[0]),
    )


_DEFAULTS: Final = {field.name: field.default for field in msgspec.structs.fields(SerialLineOptions)}


_ROWS: Final = 8  #: that many frames are needed to tell what is steady in them


def _binary(data: bytes) -> Iterator[Guess]:
    """Frames of one length: some of their bytes never change from one frame to the next."""
    total = Counter(data)
    best: tuple[float, int, list[int]] = (0.0, 0, [])
    for size in range(3, min(129, len(data) // _ROWS + 1)):
        rows = len(data) // size
        steady: list[int] = []
        for column in range(size):
            byte, count = Counter(data[column::size]).most_common(1)[0]
            # A byte that is everywhere anyway tells nothing by being here.
            if count >= 0.9 * rows and total[byte] < 0.6 * len(data):
                steady.append(column)
        if len(steady) / size > 1.4 * best[0] + 0.01:  # a multiple of the length looks a little steadier
            best = (len(steady) / size, size, steady)
    share, size, steady = best
    if not steady:
        return
    columns = [Counter(data[column::size]).most_common(1)[0] for column in range(size)]
    # The frame begins with the longest run of bytes that never change.
    runs = {
        begin: next((n for n in range(size) if (begin + n) % size not in steady), size) for begin in steady
    }
    begin = max(runs, key=lambda at: runs[at])
    start = bytes(columns[(begin + n) % size][0] for n in range(min(runs[begin], 4)))
    yield Guess(
        kind="binary",
        description=f"binary frames of {size} bytes that seem to begin with {start.hex(' ').upper()}",
        likelihood=min(0.6, 0.5 + 0.3 * share) if runs[begin] > 1 else 0.4,
        driver="serial_line",
        options={
            "framing": "fixed",
            "content": "binary",
            "start_hex": start.hex(" ").upper(),
            "frame_bytes": size,
        },
        sample=data[begin : begin + size].hex(" ")[:60],
    )


def _noise(data: bytes, best: float) -> Guess:
    """What is left where nothing else fits. A wrong speed makes few values of many bytes, or all values of few."""
    few = Counter(data).most_common(4)
    share = sum(count for _, count in few) / len(data)
    strange = 1 - _printable(data)
    return Guess(
        kind="noise",
        description="no form that is known"
        + ("; the speed or parity is wrong, likely" if strange > 0.05 else ""),
        likelihood=(1 - best) * (0.5 + 0.4 * max(strange, share if strange > 0.05 else 0)),
        sample=data[:20].hex(" "),
    )


_LOOKS: Final[tuple[Callable[[bytes], Iterator[Guess]], ...]] = (
    _nmea, _dsmr, _iec, _scales, _toledo, _modbus, _mbus, _text, _binary,
)  # fmt: skip
