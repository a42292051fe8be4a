"""Framers: whatever the noise and wherever reads cut, a whole frame comes out once, with its own time, and no other."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivers import obis
from drivers.checks import CHECKS, Check, crc16_modbus, hex_agrees, xor_of
from drivers.contract import Reason
from drivers.framing import (
    Cut,
    DelimiterFramer,
    FixedFramer,
    Framer,
    GapFramer,
    LengthCounts,
    LengthFramer,
    LineCounts,
    Shape,
    StartStopFramer,
)

# ------------------------------------------------------------------------------------------------------------ checks


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        # "123456789" in the catalogue of parametrised CRC algorithms (reveng.sourceforge.io/crc-catalogue)
        ("crc8", 0xF4),
        ("crc8_maxim", 0xA1),
        ("crc8_nrsc5", 0xF7),
        ("crc8_saej1850", 0x4B),
        ("crc16_arc", 0xBB3D),
        ("crc16_modbus", 0x4B37),
        ("crc16_ccitt", 0x29B1),
        ("crc16_xmodem", 0x31C3),
        ("crc16_kermit", 0x2189),
        ("crc16_x25", 0x906E),
        ("crc16_dnp", 0xEA82),
        ("crc16_usb", 0xB4C8),
        ("crc16_maxim", 0x44C2),
        ("crc16_mcrf4xx", 0x6F91),
        ("crc16_genibus", 0xD64E),
        ("crc16_aug_ccitt", 0xE5CC),
        ("crc16_umts", 0xFEE8),
        ("crc16_profibus", 0xA819),
        ("crc16_en13757", 0xC2B7),
        ("crc32", 0xCBF43926),
        ("crc32c", 0xE3069283),
        ("crc32_mpeg2", 0x0376E6E7),
        ("crc32_bzip2", 0xFC891918),
        # by hand: the XOR and the sum (477 = 0x1DD) of the characters 0x31 to 0x39
        ("xor", 0x31),
        ("sum8", 0xDD),
        ("sum8_complement", 0x22),
        ("lrc", 0x23),
        ("sum16", 0x01DD),
        ("none", 0),
    ],
)
def test_checks_agree_with_the_published_check_values(check: Check, expected: int) -> None:
    size, compute = CHECKS[check]
    assert compute(b"123456789") == expected < 1 << max(8 * size, 1)


def test_every_check_has_its_published_value_tested() -> None:
    (mark,) = test_checks_agree_with_the_published_check_values.pytestmark  # type: ignore[attr-defined]
    assert {check for check, _ in mark.args[1]} == set(CHECKS)


def test_a_modbus_frame_of_the_specification_has_its_crc() -> None:
    assert crc16_modbus(bytes.fromhex("02 07")) == 0x1241  # Modbus over serial line 1.02, 6.2.2


def test_two_hexadecimal_digits_and_nothing_else_agree() -> None:
    assert hex_agrees("2a", 0x2A)
    assert hex_agrees(b"2A", 0x2A)
    for wrong in ("2b", "", "2", "02A", "+2", " 2", "zz", "-1"):
        assert not hex_agrees(wrong, 0x2A)
    assert not hex_agrees("+2", 2)
    assert xor_of(b"GPGLL,5057.970,N,00146.110,E,142451,A") == 0x27


# ------------------------------------------------------------------------------------------------------------ framers

Make = Callable[[LineCounts], Framer]
Wrap = Callable[[bytes], bytes]

CRC = Shape(start=b"\xaa\x55", check="crc16_modbus", check_order="little", check_from=2)


def fixed(counts: LineCounts) -> Framer:
    return FixedFramer(CRC, 6, counts)


def wrap_fixed(body: bytes) -> bytes:
    body = (body + bytes(6))[:6]
    return b"\xaa\x55" + body + crc16_modbus(body).to_bytes(2, "little")


def length(counts: LineCounts) -> Framer:
    return LengthFramer(CRC, 64, counts, offset=2, size=1, order="big", length_counts="rest", plus=0)


def wrap_length(body: bytes) -> bytes:
    body = bytes([len(body) + 2]) + body
    return b"\xaa\x55" + body + crc16_modbus(body).to_bytes(2, "little")


def bcc(counts: LineCounts) -> Framer:
    shape = Shape(start=b"\x02", end=b"\x03", check="xor", check_from=1, check_after_end=True)
    return StartStopFramer(shape, 64, counts, escape="none", starts_inside=False)


def wrap_bcc(body: bytes) -> bytes:
    body = bytes(byte | 0x20 for byte in body) or b" "
    return b"\x02" + body + b"\x03" + bytes([xor_of(body + b"\x03")])


def hdlc(counts: LineCounts) -> Framer:
    shape = Shape(start=b"\x7e", end=b"\x7e", check="crc16_x25", check_order="little", check_from=1)
    return StartStopFramer(shape, 200, counts, escape="hdlc", starts_inside=False)


def wrap_hdlc(body: bytes) -> bytes:
    body += CHECKS["crc16_x25"][1](body).to_bytes(2, "little")
    inner = body.replace(b"\x7d", b"\x7d\x5d").replace(b"\x7e", b"\x7d\x5e")  # RFC 1662, 4.2
    return b"\x7e" + inner + b"\x7e"


def slip(counts: LineCounts) -> Framer:
    shape = Shape(start=b"\xc0", end=b"\xc0", check="crc16_xmodem", check_from=1)
    return StartStopFramer(shape, 200, counts, escape="slip", starts_inside=False)


def wrap_slip(body: bytes) -> bytes:
    body += CHECKS["crc16_xmodem"][1](body).to_bytes(2, "big")
    return b"\xc0" + body.replace(b"\xdb", b"\xdb\xdd").replace(b"\xc0", b"\xdb\xdc") + b"\xc0"  # RFC 1055


def dle(counts: LineCounts) -> Framer:
    shape = Shape(start=b"\x10\x02", end=b"\x10\x03", check="crc16_arc", check_from=2)
    return StartStopFramer(shape, 200, counts, escape="dle", starts_inside=True)


def wrap_dle(body: bytes) -> bytes:
    body += CHECKS["crc16_arc"][1](body).to_bytes(2, "big")
    return b"\x10\x02" + body.replace(b"\x10", b"\x10\x10") + b"\x10\x03"


FRAMERS: dict[str, tuple[Make, Wrap]] = {
    "fixed": (fixed, wrap_fixed),
    "length": (length, wrap_length),
    "bcc": (bcc, wrap_bcc),
    "hdlc": (hdlc, wrap_hdlc),
    "slip": (slip, wrap_slip),
    "dle": (dle, wrap_dle),
}
each = pytest.mark.parametrize("kind", FRAMERS)


def whole(cuts: list[Cut]) -> list[bytes]:
    return [body for body, _ in cuts if isinstance(body, bytes)]


def fed(framer: Framer, stream: bytes, sizes: Callable[[], int]) -> list[Cut]:
    """All that comes of a stream in pieces of these sizes. A chunk's time is how many bytes had come with it."""
    cuts: list[Cut] = []
    at = 0
    while at < len(stream):
        size = max(1, sizes())
        cuts += framer.feed(stream[at : at + size], min(at + size, len(stream)))
        at += size
    return cuts


@each
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_noise_without_a_start_costs_no_frame_and_makes_none(kind: str, data: st.DataObject) -> None:
    make, wrap = FRAMERS[kind]
    counts = LineCounts()
    framer = make(counts)
    start = wrap(b"")[:1]
    frames = [wrap(data.draw(st.binary(max_size=12))) for _ in range(data.draw(st.integers(1, 6)))]
    noise = st.binary(max_size=20).map(lambda some: some.replace(start, b"\x00"))
    stream, ends = b"", []
    for frame in frames:
        stream += data.draw(noise) + frame
        ends.append(len(stream))
    cuts = fed(framer, stream, lambda: data.draw(st.integers(1, 9)))
    assert [wrap_again(kind, body) for body in whole(cuts)] == frames
    for (_, at), end in zip([cut for cut in cuts if isinstance(cut[0], bytes)], ends, strict=True):
        assert end <= at < end + 9  # the time of the chunk that its last byte came in


def wrap_again(kind: str, body: bytes) -> bytes:
    """The frame that this body came in."""
    return FRAMERS[kind][1](body[1:] if kind == "length" else body)


@each
def test_any_noise_at_all_costs_no_frame_once_the_line_is_still(kind: str) -> None:
    """Noise that looks like a start, even like a long frame, hides the frame behind it only until silence."""
    make, wrap = FRAMERS[kind]
    rng = random.Random(7)
    lost = 0
    for _ in range(1_500):
        framer = make(LineCounts())
        frame = wrap(rng.randbytes(6))
        noise = rng.choice(
            [rng.randbytes(rng.randrange(20)), frame[: rng.randrange(len(frame))], wrap(b"")[:3]]
        )
        cuts = fed(framer, noise + frame, lambda: rng.randrange(1, 9))
        at = len(noise + frame)
        cuts += framer.silence()
        found = [(body, when) for body, when in cuts if isinstance(body, bytes)]
        if kind in ("hdlc", "slip", "bcc", "dle") and frame not in [
            wrap_again(kind, body) for body, _ in found
        ]:
            lost += 1  # the noise ended in an escape, or swallowed a flag: that frame is damaged indeed
            continue
        assert frame in [wrap_again(kind, body) for body, _ in found]
        assert all(when <= at + 9 for _, when in found)
        assert framer.silence() == []
    assert lost < 30


@each
@settings(max_examples=150, deadline=None)
@given(chunks=st.lists(st.binary(max_size=300), max_size=20))
def test_no_noise_fills_memory_or_passes_for_a_frame(kind: str, chunks: list[bytes]) -> None:
    make, _ = FRAMERS[kind]
    framer = make(LineCounts())
    for chunk in chunks:
        for body in whole(framer.feed(chunk, 1)):
            assert wrap_again(kind, body) in b"".join(chunks)
        assert len(framer._buffer) <= 512  # type: ignore[attr-defined]
    framer.silence()
    assert not framer.partial


@each
def test_one_flipped_bit_is_told_as_a_loss_and_the_next_frame_is_read(kind: str) -> None:
    make, wrap = FRAMERS[kind]
    first, second, third = wrap(b"first!"), wrap(b"second"), wrap(b"third!")
    for bit in range(8 * len(second)):
        broken = bytearray(second)
        broken[bit // 8] ^= 1 << bit % 8
        counts = LineCounts()
        framer = make(counts)
        cuts = (
            framer.feed(first, 1) + framer.feed(bytes(broken), 2) + framer.feed(third, 3) + framer.silence()
        )
        bodies = [wrap_again(kind, body) for body in whole(cuts)]
        assert first in bodies
        assert set(bodies) <= {first, third}, bit
        if kind in ("fixed", "length"):
            assert third in bodies, bit
        assert counts.check_errors + counts.framing_errors > 0
        lost = [body for body, _ in cuts if isinstance(body, Reason)]
        assert lost or kind != "fixed" or not broken.startswith(b"\xaa\x55")


def test_a_frame_found_late_keeps_its_own_time() -> None:
    """A false start promises 60 bytes; the good frames behind it came at 20 and 30, and are found at silence."""
    framer = length(LineCounts())
    good = wrap_length(b"good")
    assert framer.feed(b"\xaa\x55\x3c", 10) == []
    assert framer.feed(good, 20) == []
    assert framer.feed(good, 30) == []
    assert [at for body, at in framer.silence() if isinstance(body, bytes)] == [20, 30]


@pytest.mark.parametrize(("counted", "value"), [("all", 10), ("rest", 7), ("body", 4)])
def test_a_length_counts_what_it_is_said_to_count(counted: LengthCounts, value: int) -> None:
    """01, a length of two bytes, "data", a sum of two bytes, 04."""
    shape = Shape(start=b"\x01", end=b"\x04", check="sum16", check_from=1)
    framer = LengthFramer(
        shape, 64, LineCounts(), offset=1, size=2, order="little", length_counts=counted, plus=0
    )
    covered = value.to_bytes(2, "little") + b"data"
    frame = b"\x01" + covered + sum(covered).to_bytes(2, "big") + b"\x04"
    assert whole(framer.feed(frame, 1)) == [covered]


def test_a_length_beyond_the_longest_frame_is_noise_at_once() -> None:
    framer = length(LineCounts())
    good = wrap_length(b"good")
    assert whole(framer.feed(b"\xaa\x55\xff" + good, 1)) == [good[2:-2]]


def test_the_ends_own_byte_may_be_the_check() -> None:
    """STX data LRC ETX, where the LRC happens to be 03."""
    shape = Shape(start=b"\x02", end=b"\x03", check="xor", check_from=1)
    framer = StartStopFramer(shape, 32, LineCounts(), escape="none", starts_inside=False)
    body = b"12"
    assert xor_of(body) == 0x03
    assert whole(framer.feed(b"\x02" + body + b"\x03\x03", 1)) == [body]
    assert whole(framer.feed(b"\x02" + b"13" + b"\x02\x03", 2)) == [b"13"]


def test_a_check_in_hexadecimal_digits() -> None:
    shape = Shape(start=b"$", check="sum8", check_hex=True, check_from=1)
    framer = DelimiterFramer(b"\r\n", 64, LineCounts(), in_step=True, shape=shape)
    text = b"12.5kg"
    line = b"$" + text + f"{sum(text) & 0xFF:02x}".encode()
    cuts = framer.feed(b"noise" + line + b"\r\n" + line[:-1] + b"0\r\n" + b"$12.5kg g\r\n", 1)
    assert [body for body, _ in cuts] == [text, Reason.CRC, Reason.CRC]


# --------------------------------------------------------------------------------------------------------- delimiter


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=20), st.sampled_from([b"\n", b"\r\n", b"##"]))
def test_a_delimiter_framer_does_not_care_how_bytes_are_cut(chunks: list[bytes], delimiter: bytes) -> None:
    def frames(pieces: list[bytes]) -> list[bytes]:
        framer = DelimiterFramer(delimiter, 16, LineCounts(), in_step=True)
        return whole([cut for piece in pieces for cut in framer.feed(piece, 1)])

    stream = b"".join(chunks) + delimiter
    once = frames([stream])
    assert once == [line for line in stream.split(delimiter)[:-1] if 0 < len(line) <= 16]
    assert frames([*chunks, delimiter]) == once
    assert frames([stream[i : i + 1] for i in range(len(stream))]) == once


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=20))
def test_a_delimiter_framer_holds_no_more_than_a_frame(chunks: list[bytes]) -> None:
    framer = DelimiterFramer(b"\r\n", 64, LineCounts(), in_step=False)
    for chunk in chunks:
        framer.feed(chunk, 1)
        assert len(framer._rest) < 66


# --------------------------------------------------------------------------------------------------------------- gap


def gap_framer(
    *, check: Check = "crc16_modbus", body_bytes: int | None = None, in_step: bool = True
) -> GapFramer:
    shape = Shape(check=check, check_order="little")
    return GapFramer(shape, 64, LineCounts(), body_bytes=body_bytes, in_step=in_step)


def gap_frame(body: bytes) -> bytes:
    return body + crc16_modbus(body).to_bytes(2, "little")


def test_silence_ends_a_frame_and_its_time_is_that_of_its_last_byte() -> None:
    framer = gap_framer()
    frame = gap_frame(b"\x01\x03\x02\x00\x07")
    assert framer.feed(frame[:3], 10) == framer.feed(frame[3:], 12) == []
    assert framer.silence() == [(b"\x01\x03\x02\x00\x07", 12)]
    assert framer.silence() == []


def test_what_came_before_the_first_silence_is_not_told_as_a_loss() -> None:
    framer = gap_framer(in_step=False)
    framer.feed(gap_frame(b"12345")[2:], 1)
    assert framer.silence() == []
    framer.feed(gap_frame(b"12345")[2:], 2)
    assert framer.silence() == [(Reason.CRC, 2)]


def test_noise_before_a_frame_of_known_length_does_not_cost_it() -> None:
    framer = gap_framer(body_bytes=5)
    framer.feed(bytes(200) + gap_frame(b"12345"), 1)
    assert framer.silence() == [(b"12345", 1)]


def test_a_torn_tail_never_passes_where_no_check_can_tell() -> None:
    framer = gap_framer(check="none", body_bytes=64)
    framer.feed(bytes(range(200)), 1)
    assert framer.silence() == [(Reason.FRAMING, 1)]


def test_a_silence_that_nobody_saw_costs_both_frames() -> None:
    framer = gap_framer(check="none", body_bytes=4)
    framer.feed(b"12", 1)
    assert framer.unsure() == [(Reason.FRAMING, 1)]
    framer.feed(b"34", 2)
    assert framer.silence() == []
    framer.feed(b"5678", 3)
    assert framer.silence() == [(b"5678", 3)]


# ---------------------------------------------------------------------------------------------------------- its work


class Counted:
    """A check that counts the bytes it was given."""

    def __init__(self) -> None:
        self.seen_bytes = 0

    def __call__(self, data: bytes) -> int:
        self.seen_bytes += len(data)
        return crc16_modbus(data)


ENDLESS = Shape(start=b"\x10", check="crc16_modbus")
ENDED = Shape(start=b"\x10", end=b"\x03", check="crc16_modbus")
DLE = Shape(start=b"\x10\x02", end=b"\x10\x03", check="crc16_modbus")


@pytest.mark.parametrize(
    ("build", "noise", "good"),
    [
        (lambda counts: FixedFramer(ENDLESS, 4000, counts), b"\x10" * 20_000, bytes(4000)),
        (
            lambda counts: LengthFramer(
                ENDLESS, 65_536, counts, offset=1, size=2, order="big", length_counts="all", plus=0
            ),
            b"\x10" * 20_000,
            (103).to_bytes(2, "big") + bytes(98),
        ),
        (
            lambda counts: StartStopFramer(ENDED, 4096, counts, escape="none", starts_inside=True),
            (b"\x10" * 4000 + b"\x03" * 40) * 5,
            bytes(100),
        ),
        (
            lambda counts: StartStopFramer(DLE, 4096, counts, escape="dle", starts_inside=True),
            b"\x10\x02" * 10_000,
            bytes(100),
        ),
        (
            lambda counts: GapFramer(ENDLESS, 4096, counts, body_bytes=None, in_step=True),
            b"\x10" * 20_000,
            bytes(100),
        ),
    ],
    ids=["fixed", "length", "start_stop", "dle", "gap"],
)
def test_noise_that_begins_like_a_frame_everywhere_costs_little_and_ends(
    build: Callable[[LineCounts], Framer], noise: bytes, good: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted()
    monkeypatch.setitem(CHECKS, "crc16_modbus", (2, counted))
    counts = LineCounts()
    framer = build(counts)
    for at in range(0, len(noise), 1000):
        framer.feed(noise[at : at + 1000], 1)
    framer.silence()
    assert counted.seen_bytes <= (1 << 20) + 300 * len(noise)
    shape = ENDED if isinstance(framer, StartStopFramer) and framer._escape == "none" else ENDLESS
    shape = DLE if isinstance(framer, StartStopFramer) and framer._escape == "dle" else shape
    inner = shape.start + good
    check = crc16_modbus(inner).to_bytes(2, "big")
    frame = shape.start + (good + check).replace(b"\x10", b"\x10\x10") if shape is DLE else inner + check
    bodies: list[bytes | Reason] = []
    for _ in range(20):
        bodies += [body for body, _ in framer.feed(frame + shape.end, 2)]
        bodies += [body for body, _ in framer.silence()]
    assert bodies[-1] == good
    assert counts.skipped_bytes + counts.framing_errors + counts.check_errors >= 1


def test_slashes_without_end_cost_a_telegrams_reader_few_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted()
    monkeypatch.setattr(obis, "crc16_arc", counted)
    framer = obis.TelegramFramer(LineCounts(), checked=True)
    framer.feed(b"/ABC5" * 3200 + b"\n!AAAA\n", 1)
    assert counted.seen_bytes < 20 * obis.MAX_TELEGRAM_BYTES


def test_a_telegram_that_stops_is_said_with_the_time_of_its_last_byte() -> None:
    framer = obis.TelegramFramer(LineCounts(), checked=False)
    assert framer.feed(b"/ABC5x\r\n\r\n1-0:1.8.1(1*kWh)\r\n!\r\n", 1)[0][1] == 1
    framer.feed(b"/ABC5x\r\n\r\n1-0:1.8.1(", 2)
    assert framer.silence() == [(Reason.FRAMING, 2)]
