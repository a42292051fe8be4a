"""What bytes look like, at the right speed and, through a model of a UART, at wrong ones."""

from __future__ import annotations

import random
import struct
import time

import msgspec
import pytest

from drivers.checks import crc16_modbus, xor_of
from drivers.instrument import SerialLineOptions
from drivers.serial_detect import recognise
from tests.fakes.meters import E350
from tests.fakes.serial_instrument import binary_frame, scale_line
from tests.fakes.uart import heard_at
from tests.test_drivers_serial_protocols import AIS, DSMR, GGA, GLL, MWV, RMC, A, B, C, toledo_frame

RNG = random.Random(5)


def modbus(body: bytes) -> bytes:
    return body + crc16_modbus(body).to_bytes(2, "little")


def readout() -> bytes:
    block = E350.encode() + b"\x03"
    return b"/LGZ4ZMF100AC.M26\r\n\x02" + block + bytes([xor_of(block)])


def mbus() -> bytes:
    """The example telegram of m-bus.com's documentation, 6.3.1, with its own check."""
    return bytes.fromhex(
        "68 1F 1F 68 08 02 72 78 56 34 12 24 40 01 07 55 00 00 00 03 13 15 31 00 DA 02 3B 13 01 8B 60 04 37 18 02 18 16"
    )


_LINE = scale_line(random.Random(1))
SAMPLES: dict[str, bytes] = {
    "nmea0183": (GGA + RMC + GLL + MWV + AIS) * 3,
    "dsmr": DSMR[900:] + DSMR,
    "iec62056": readout(),
    "toledo": b"".join(toledo_frame(A, B, C, f"{1000 + n:06d}", "000000") for n in range(12)),
    "and": b"".join(b"ST,+%08.2f  g\r\n" % (12.3 + n) for n in range(12)),
    "cas": b"".join(b"ST,GS,1\xc4,%08.1f kg\r\n" % (12.3 + n) for n in range(12)),
    "sbi": b"".join(b"+ %8.2f g  \r\n" % (12.3 + n) for n in range(12)),
    "ohaus": b"".join(b"%10.2f g %s\r\n" % (12.3 + n, b"?" if n % 3 else b"") for n in range(12)),
    "modbus_rtu": b"".join(
        modbus(bytes([7, 3, 0, n, 0, 2])) + modbus(bytes([7, 3, 4]) + struct.pack(">f", 20 + n / 3))
        for n in range(20)
    ),
    "mbus": mbus(),
    "text": b"".join(_LINE(n) for n in range(20)),
    "binary": b"".join(binary_frame(n * 37, n / 3, n * 1000) for n in range(30)),
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_each_kind_is_the_first_guess_at_the_right_speed(kind: str) -> None:
    best = recognise(SAMPLES[kind])[0]
    assert best.kind == kind
    assert not best.seven_bits
    if best.driver == "serial_line" and kind != "binary":
        msgspec.convert({"port": "x", **best.options}, SerialLineOptions)


@pytest.mark.parametrize("cut", [1, 5, 13, 40])
@pytest.mark.parametrize("kind", sorted(SAMPLES.keys() - {"iec62056", "mbus", "dsmr"}))
def test_a_capture_may_begin_and_end_anywhere(kind: str, cut: int) -> None:
    assert recognise(SAMPLES[kind][cut:-cut])[0].kind == kind


@pytest.mark.parametrize("heard", [1200, 2400, 4800, 19200, 38400, 57600, 115200])
@pytest.mark.parametrize("kind", SAMPLES)
def test_at_a_wrong_speed_nothing_is_likely_but_noise(kind: str, heard: int) -> None:
    right = recognise(SAMPLES[kind])[0].likelihood
    guesses = recognise(heard_at(SAMPLES[kind] * 3, 9600, heard))
    best = guesses[0]
    assert best.kind in ("noise", "binary", "silence"), (best, guesses[1])
    likely = max(
        (one.likelihood for one in guesses if one.kind not in ("noise", "silence", "binary")), default=0
    )
    assert likely < right


@pytest.mark.parametrize("kind", ["nmea0183", "dsmr", "iec62056", "toledo", "and", "sbi", "ohaus", "text"])
def test_seven_bits_and_even_parity_heard_as_eight_are_told(kind: str) -> None:
    data = SAMPLES[kind]
    best = recognise(heard_at(data, 9600, 9600, data_bits=7, even=True))[0]
    assert (best.kind, best.seven_bits) == (kind, True)


def test_the_model_of_the_line_passes_what_is_sent_and_heard_alike() -> None:
    data = bytes(range(256))
    assert heard_at(data, 9600, 9600) == data
    assert heard_at(b"U" * 10, 9600, 4800) != b"U" * 10


def test_silence_is_silence_and_noise_is_noise() -> None:
    assert recognise(b"")[0].kind == "silence"
    for size in (1, 10, 500, 20_000):
        best = recognise(RNG.randbytes(size))[0]
        assert best.kind == "noise", best


def test_a_guess_of_binary_frames_tells_their_length_and_beginning() -> None:
    best = recognise(SAMPLES["binary"])[0]
    assert (best.options["frame_bytes"], str(best.options["start_hex"])[:5]) == (14, "AA 55")


def test_columns_and_delimiters_are_told() -> None:
    best = recognise(b"".join(b"%d;%.1f;ok\r" % (n, n / 7) for n in range(20)))[0]
    assert (best.kind, best.options) == ("text", {"delimiter": "\r", "separator": ";"})


def test_recognising_is_quick_whatever_is_heard() -> None:
    """Bounded work: a scan looks at many captures."""
    began_s = time.thread_time()
    for data in (
        RNG.randbytes(100_000),
        b"/" * 50_000,
        b"$" * 50_000,
        b"(" * 50_000,
        b"\x02" * 50_000,
        b"\n" * 50_000,
    ):
        recognise(data)
    assert time.thread_time() - began_s < 20
