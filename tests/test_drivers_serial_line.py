"""`serial_line` against real ptys: whole frames become scans, everything else becomes a reason or a count."""

from __future__ import annotations

import asyncio
import json
import random
import re
import struct
import sys
import termios
import time
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivers import conformance, registry, serial_line
from drivers.contract import ConfigError, DeviceUnreachable, Reason, Scan, Value, ValueType, boot_ns
from drivers.fields import fit, parse
from drivers.instrument import SerialLineOptions, SerialLinePoint
from drivers.scan_queue import ScanQueue
from drivers.serial_line import SerialLineDriver
from tests.fakes.serial_instrument import SerialInstrument, binary_frame, scale_line, serial_instrument

WAIT_S = 10  # a deadline, never a pause: the machine may be busy

P = SerialLinePoint


@pytest.fixture
def instrument(tmp_path: Path) -> Iterator[SerialInstrument]:
    with serial_instrument(tmp_path) as instrument:
        yield instrument


@asynccontextmanager
async def opened(driver: SerialLineDriver) -> AsyncIterator[AsyncIterator[Scan]]:
    await driver.connect()
    try:
        yield driver.scans()
    finally:
        await driver.close()


async def following(scans: AsyncIterator[Scan]) -> Scan:
    async with asyncio.timeout(WAIT_S):
        return await anext(scans)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not true():  # noqa: ASYNC110 - what is awaited is on the other side of a pty
            await asyncio.sleep(0.002)


def text_driver(
    instrument: SerialInstrument,
    *,
    stale_after_s: float = 0.0,
    frame_timeout_ms: int = 0,
) -> SerialLineDriver:
    """Weight and temperature, as `scale_line` writes them."""
    return SerialLineDriver(
        "scale",
        SerialLineOptions(
            port=instrument.port,
            pattern=r"W=\s*(?P<weight>[^ ]+) kg, T=\s*(?P<temperature>[^ ]+) C",
            stale_after_s=stale_after_s,
            frame_timeout_ms=frame_timeout_ms,
        ),
        [P(name="weight", unit="kg"), P(name="temperature", unit="Cel")],
    )


def columns_driver(instrument: SerialInstrument, points: list[SerialLinePoint]) -> SerialLineDriver:
    options = SerialLineOptions(port=instrument.port, separator=";", stale_after_s=0)
    return SerialLineDriver("columns", options, points)


def binary_driver(instrument: SerialInstrument, *, stale_after_s: float = 0.0) -> SerialLineDriver:
    return SerialLineDriver(
        "meter",
        SerialLineOptions(
            port=instrument.port,
            framing="fixed",
            content="binary",
            start_hex="AA 55",
            layout="<HfI",
            check="crc16_modbus",
            check_order="little",
            check_from=2,
            stale_after_s=stale_after_s,
        ),
        [
            P(name="flow", type=ValueType.U16, item=1, scale=0.01),
            P(name="pressure", type=ValueType.F32, item=2),
            P(name="total", type=ValueType.U32, item=3),
        ],
    )


# -------------------------------------------------------------------------------------------------------------- text


async def test_lines_become_scans_in_order_with_the_time_of_their_last_byte(
    instrument: SerialInstrument,
) -> None:
    driver = text_driver(instrument)
    async with opened(driver) as scans:
        instrument.noise(b"\r\n")
        before = boot_ns()
        instrument.send(b"W=  12.5 kg, T= 21.50 C\r\n")
        first = await following(scans)
        instrument.send(b"W= -0.25 kg, T=1e2 C\r\n")
        second = await following(scans)
    assert [first.values, second.values] == [[12.5, 21.5], [-0.25, 100.0]]
    assert not first.reasons
    assert first.points == driver.points
    assert before < first.taken_at_ns < second.taken_at_ns < boot_ns()
    assert driver.counts.frames == 2


async def test_the_line_that_was_running_at_the_opening_is_framing_as_its_beginning_may_be_missing(
    instrument: SerialInstrument,
) -> None:
    driver = text_driver(instrument)
    async with opened(driver) as scans:
        instrument.send(b"W=123.4 kg, T=20 C\r\nW=5 kg, T=21 C\r\n")
        assert (await following(scans)).reasons == {0: Reason.FRAMING, 1: Reason.FRAMING}
        assert (await following(scans)).values == [5.0, 21.0]
    assert driver.counts.skipped_bytes == len(b"W=123.4 kg, T=20 C\r\n")


async def test_a_line_after_a_silence_is_whole_though_it_is_the_first(instrument: SerialInstrument) -> None:
    driver = text_driver(instrument, frame_timeout_ms=20)
    async with opened(driver) as scans:
        await asyncio.sleep(0.1)  # the silence under test
        instrument.send(b"W=5 kg, T=21 C\r\n")
        assert (await following(scans)).values == [5.0, 21.0]


async def test_a_silence_that_nobody_listened_to_makes_no_line_whole(instrument: SerialInstrument) -> None:
    """The event loop is held up from the opening on; the line was running all the time."""
    driver = columns_driver(instrument, [P(name="x", column=1)])
    driver._still_s = 0.05
    async with opened(driver) as scans:
        instrument.noise(b"45.6;\n78")
        time.sleep(0.2)  # noqa: ASYNC251 - blocks the loop on purpose
        instrument.noise(b"9.1;\n")
        got = [await following(scans) for _ in range(2)]
    assert [scan.values for scan in got] == [[None], [789.1]]


async def test_a_silence_in_a_line_that_was_running_makes_the_rest_no_line(
    instrument: SerialInstrument,
) -> None:
    driver = columns_driver(instrument, [P(name="x", column=1)])
    driver._still_s = 0.03
    async with opened(driver) as scans:
        instrument.noise(b"45")
        await asyncio.sleep(0.1)  # the silence under test
        instrument.noise(b"6.7;\n8.9;\n")
        got = [await following(scans) for _ in range(2)]
    assert [scan.values for scan in got] == [[None], [8.9]]


async def test_what_waited_before_the_port_was_opened_gets_no_new_time(instrument: SerialInstrument) -> None:
    driver = text_driver(instrument)
    async with opened(driver) as scans:
        instrument.send(b"\nW=1 kg, T=1 C\n")
        assert (await following(scans)).values == [1.0, 1.0]
    for _ in range(500):  # some 9 KB, twice what a tty's own buffer holds
        instrument.send(b"W=666 kg, T=666 C\n")
    async with opened(driver) as scans:
        instrument.send(b"\nW=2 kg, T=2 C\n")
        assert (await following(scans)).values == [2.0, 2.0]


async def test_byte_by_byte_is_the_same_line(instrument: SerialInstrument) -> None:
    driver = text_driver(instrument)
    async with opened(driver) as scans:
        instrument.noise(b"\n")
        await instrument.send_slowly(b"W=7.5 kg, T=20.25 C\r\n")
        assert (await following(scans)).values == [7.5, 20.25]


async def test_a_field_that_does_not_read_is_decode_and_an_absent_one_is_missing(
    instrument: SerialInstrument,
) -> None:
    driver = columns_driver(
        instrument,
        [
            P(name="a", column=1),
            P(name="b", column=2, type=ValueType.I16),
            P(name="c", column=3, type=ValueType.BOOL),
            P(name="d", column=4, type=ValueType.STR),
        ],
    )
    async with opened(driver) as scans:
        instrument.noise(b"\n1.5;-7;ON;ready\n----;;2; \n9;99999;off\nnan;1_0;yes;x\ninf;0x10;1;y\n")
        got = [await following(scans) for _ in range(5)]
    assert [scan.values for scan in got] == [
        [1.5, -7, True, "ready"],
        [None, None, None, None],
        [9.0, None, False, None],
        [None, None, True, "x"],
        [None, None, True, "y"],
    ]
    assert [scan.reasons for scan in got] == [
        {},
        {0: Reason.DECODE, 1: Reason.MISSING, 2: Reason.DECODE, 3: Reason.MISSING},
        {1: Reason.OVERFLOW, 3: Reason.MISSING},
        {0: Reason.NAN, 1: Reason.DECODE},
        {0: Reason.INFINITE, 1: Reason.DECODE},
    ]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
async def test_a_line_with_a_character_of_wrong_parity_is_framing(
    encoding: str, instrument: SerialInstrument
) -> None:
    """A pty has no parity: the port is asked to mark such characters, and here is such a mark."""
    table = {"data_bits": 7, "parity": "even", "encoding": encoding, "pattern": r"(?P<x>\d+)"}
    options = msgspec.convert({"port": instrument.port, **table}, SerialLineOptions)
    driver = SerialLineDriver("parity", options, [P(name="x")])
    async with opened(driver) as scans:
        flags = termios.tcgetattr(driver._fd)[0]
        assert flags & termios.INPCK
        assert flags & termios.PARMRK
        instrument.noise(b"\n12\xff\x0034\n567\n")
        assert [(await following(scans)).values for _ in range(2)] == [[None], [567]]


async def test_binary_frames_hold_any_byte_whatever_the_parity(instrument: SerialInstrument) -> None:
    options = msgspec.structs.replace(binary_driver(instrument).options, parity="even")
    driver = SerialLineDriver("meter", options, binary_driver(instrument).points)
    async with opened(driver) as scans:
        instrument.send(binary_frame(0xFFFF, 2.5, 0xFF00FF00))
        assert (await following(scans)).values == [0xFFFF, 2.5, 0xFF00FF00]


@pytest.mark.parametrize(
    ("separator", "line"),
    [
        (" ", b"1.0 12.0  3.0\r\n"),
        (" ", b"  1.0   2.0 3.0 \r\n"),
        ("\t", b"\t2.0\t3.0\t\r\n"),
        ("\t", b"\t\t3.0\r\n"),
    ],
)
async def test_a_column_is_the_same_however_many_blanks_stand_before_it(
    separator: str, line: bytes, instrument: SerialInstrument
) -> None:
    options = SerialLineOptions(port=instrument.port, separator=separator, stale_after_s=0)
    driver = SerialLineDriver("columns", options, [P(name="x", column=3)])
    async with opened(driver) as scans:
        instrument.noise(b"\n" + line)
        assert (await following(scans)).values == [3.0]


async def test_a_line_of_another_form_is_framing_on_every_point_and_the_next_one_is_read(
    instrument: SerialInstrument,
) -> None:
    driver = text_driver(instrument)
    async with opened(driver) as scans:
        instrument.noise(b"\n\xff\xfe\x80\nOVERLOAD\n\r\n")
        instrument.send(b"W=1 kg, T=2 C\n")
        got = [await following(scans) for _ in range(3)]
    assert [scan.values for scan in got] == [[None, None], [None, None], [1.0, 2.0]]
    assert got[0].reasons == got[1].reasons == {0: Reason.FRAMING, 1: Reason.FRAMING}
    assert (driver.counts.framing_errors, driver.counts.frames) == (2, 1)


async def test_a_line_without_end_is_dropped_and_the_line_after_it_is_read(
    instrument: SerialInstrument,
) -> None:
    driver = text_driver(instrument)
    async with opened(driver) as scans:
        instrument.noise(b"\n" + b"W=1" * 1000)
        assert set((await following(scans)).reasons.values()) == {Reason.FRAMING}
        instrument.noise(b"W=3 kg, T=3 C\nW=4 kg, T=4 C\n")
        assert (await following(scans)).values == [4.0, 4.0]
    assert driver.counts.framing_errors == 1


async def test_a_line_cut_short_is_never_joined_to_the_next(instrument: SerialInstrument) -> None:
    driver = text_driver(instrument, frame_timeout_ms=30)
    async with opened(driver) as scans:
        instrument.noise(b"\nW=66 kg, T=6")
        await until(lambda: driver._framer.partial)
        await asyncio.sleep(0.1)  # the silence under test
        instrument.noise(b"6 C\n")
        instrument.send(b"W=1 kg, T=2 C\n")
        assert set((await following(scans)).reasons.values()) == {Reason.FRAMING}
        assert (await following(scans)).values == [1.0, 2.0]
    assert driver.counts.framing_errors == 1


async def test_points_of_different_sentences_are_read_from_their_own_lines(
    instrument: SerialInstrument,
) -> None:
    options = SerialLineOptions(port=instrument.port, separator=",", stale_after_s=0)
    driver = SerialLineDriver(
        "weather",
        options,
        [
            P(name="wind", column=2, line=r"^\$WIMWV"),
            P(name="temperature", pattern=r"C,(?P<unused>)(?P<value>[-\d.]+),C", line="XDR"),
        ],
    )
    async with opened(driver) as scans:
        instrument.noise(b"\n$WIMWV,214.8,R\n$GPGGA,1,2\n$WIXDR,C,22.5,C\n")
        got = [await following(scans) for _ in range(2)]
    assert [(scan.points[0].name, scan.values) for scan in got] == [
        ("wind", [214.8]),
        ("temperature", [22.5]),
    ]
    assert driver.counts.ignored == 1


async def test_an_asked_instrument_answers_and_an_unanswered_question_is_timeout(
    instrument: SerialInstrument,
) -> None:
    options = SerialLineOptions(
        port=instrument.port,
        separator=",",
        delimiter="\r",
        decimal=".",
        request="READ?\r",
        request_period_ms=20,
        reply_timeout_ms=150,
    )
    driver = SerialLineDriver("asked", options, [P(name="x", column=1, type=ValueType.I32, base=16)])
    async with opened(driver) as scans, answering(instrument, {b"READ?\r": b"ff\r"}):
        assert (await following(scans)).values == [255]
    async with opened(driver) as scans:
        assert (await following(scans)).reasons == {0: Reason.TIMEOUT}
        async with answering(instrument, {b"READ?\r": b"10\r"}):
            assert (await following(scans)).values == [16]  # and no second word of the silence before


@asynccontextmanager
async def answering(instrument: SerialInstrument, replies: dict[bytes, bytes]) -> AsyncIterator[list[bytes]]:
    """The instrument answers these requests while the block runs; gives what it heard."""
    heard: list[bytes] = []

    async def answer() -> None:
        rest = b""
        while True:
            rest += instrument.heard()
            while (end := rest.find(b"\r")) >= 0:
                asked, rest = rest[: end + 1], rest[end + 1 :]
                heard.append(asked)
                instrument.send(replies[asked])
            await asyncio.sleep(0.002)

    instrument.heard()
    task = asyncio.create_task(answer())
    try:
        yield heard
    finally:
        task.cancel()


async def test_several_questions_are_asked_in_turn_and_answers_stay_with_their_points(
    instrument: SerialInstrument,
) -> None:
    options = SerialLineOptions(
        port=instrument.port,
        delimiter="\r",
        pattern=r"(?P<value>\S+)",
        request_period_ms=10,
        reply_timeout_ms=5000,
    )
    points = [
        P(name="a", field="value", request="KRDG? A\r"),
        P(name="b", field="value", request="KRDG? B\r"),
    ]
    driver = SerialLineDriver("monitor", options, points)
    replies = {b"KRDG? A\r": b"+77.350\r", b"KRDG? B\r": b"+4.2100\r"}
    async with opened(driver) as scans, answering(instrument, replies):
        got = [await following(scans) for _ in range(20)]
    assert {(scan.points[0].name, *scan.values) for scan in got} == {("a", 77.35), ("b", 4.21)}


async def test_a_late_reply_is_never_the_answer_to_another_question(instrument: SerialInstrument) -> None:
    options = SerialLineOptions(
        port=instrument.port,
        delimiter="\r",
        pattern=r"(?P<value>\S+)",
        request_period_ms=10,
        reply_timeout_ms=100,
    )
    driver = SerialLineDriver(
        "monitor",
        options,
        [P(name="a", field="value", request="A\r"), P(name="b", field="value", request="B\r")],
    )
    async with opened(driver) as scans:
        await until(lambda: instrument.heard() == b"A\r")
        assert (await following(scans)).reasons == {0: Reason.TIMEOUT}
        instrument.send(b"1\r")  # the answer to A, after its time
        async with answering(instrument, {b"A\r": b"1\r", b"B\r": b"2\r"}):
            got = [await following(scans) for _ in range(4)]
    assert {(scan.points[0].name, *scan.values) for scan in got} == {("a", 1.0), ("b", 2.0)}
    assert driver.counts.late_replies == 1


@pytest.mark.parametrize(
    ("answer_s", "rest_s"), [(0.0, 0.005), (0.15, 0.1)], ids=["at_once", "after_the_next_question"]
)
async def test_a_reply_of_more_frames_than_one_never_shifts_the_answers_to_other_questions(
    answer_s: float, rest_s: float, instrument: SerialInstrument
) -> None:
    """`OK` after each value."""
    options = SerialLineOptions(
        port=instrument.port,
        delimiter="\r",
        pattern=r"(?P<value>\S+)",
        request_period_ms=10,
        reply_timeout_ms=300,
    )
    true = {"a": 1.0, "b": 2.0, "c": 3.0}
    points = [P(name=name, field="value", request=f"{name}\r") for name in true]
    driver = SerialLineDriver("monitor", options, points)

    async def answer() -> None:
        loop = asyncio.get_running_loop()
        rest = b""
        while True:
            rest += instrument.heard()
            while (end := rest.find(b"\r")) >= 0:
                asked, rest = rest[:end].decode(), rest[end + 1 :]
                loop.call_later(answer_s, instrument.send, b"%g\r" % true[asked])
                loop.call_later(answer_s + rest_s, instrument.noise, b"OK\r")
            await asyncio.sleep(0.002)

    task = asyncio.create_task(answer())
    async with opened(driver) as scans:
        got = [await following(scans) for _ in range(12)]
    task.cancel()
    good = [(scan.points[0].name, scan.values[0]) for scan in got if not scan.reasons]
    assert set(good) <= set(true.items())
    assert len(good) >= (4 if answer_s else 12)


@pytest.mark.parametrize("questions", [1, 2])
async def test_a_line_that_never_falls_silent_is_not_cut_in_two_by_a_question(
    questions: int, instrument: SerialInstrument
) -> None:
    options = SerialLineOptions(
        port=instrument.port, separator=",", request_period_ms=10, reply_timeout_ms=100
    )
    points = [P(name=name, column=1, request=name) for name in "ab"[:questions]]
    driver = SerialLineDriver("both", options, points)

    async def talk() -> None:
        while True:
            for byte in b"12345.5\r\n":
                instrument.noise(bytes([byte]))
                await asyncio.sleep(0.002)

    task = asyncio.create_task(talk())
    async with opened(driver) as scans:
        got = [await following(scans) for _ in range(20 if questions == 1 else 5)]
    task.cancel()
    assert {scan.values[0] for scan in got} <= {12345.5, None}
    if questions == 1:
        assert got[-1].values == [12345.5]


async def test_an_adapter_that_hears_itself_gives_no_reading_of_the_request(
    instrument: SerialInstrument,
) -> None:
    options = SerialLineOptions(
        port=instrument.port, delimiter="\r", pattern=r"(?P<value>\S+)", request="7\r", request_period_ms=10
    )
    driver = SerialLineDriver("echo", options, [P(name="a", field="value")])
    async with opened(driver) as scans, answering(instrument, {b"7\r": b"7\r42\r"}):
        assert [(await following(scans)).values for _ in range(3)] == [[42.0]] * 3


async def test_silence_says_so_once_and_then_nothing_until_it_speaks(instrument: SerialInstrument) -> None:
    driver = text_driver(instrument, stale_after_s=0.1)
    async with opened(driver) as scans:
        instrument.noise(b"\nW=1 kg, T=2 C\n")
        assert (await following(scans)).values == [1.0, 2.0]
        stale = await following(scans)
        assert stale.values == [None, None]
        assert stale.reasons == {0: Reason.STALE, 1: Reason.STALE}
        await asyncio.sleep(0.5)  # five times as long as it takes to be stale
        assert not driver._queue
        instrument.send(b"W=3 kg, T=4 C\n")
        assert (await following(scans)).values == [3.0, 4.0]
        assert set((await following(scans)).reasons.values()) == {Reason.STALE}


async def test_silence_of_one_sentence_is_seen_while_another_goes_on(instrument: SerialInstrument) -> None:
    options = SerialLineOptions(port=instrument.port, separator=" ", stale_after_s=0.2)
    driver = SerialLineDriver(
        "two", options, [P(name="a", column=2, line="^A"), P(name="b", column=2, line="^B")]
    )
    async with opened(driver) as scans:
        instrument.noise(b"\nB 1\n")
        got: list[Scan] = []
        async with asyncio.timeout(WAIT_S):
            while not any(scan.reasons for scan in got):
                instrument.send(b"A 1\n")
                got.append(await anext(scans))
                await asyncio.sleep(0.02)
    assert [(scan.points[0].name, dict(scan.reasons)) for scan in got if scan.reasons] == [
        ("b", {0: Reason.STALE})
    ]


async def test_pulling_the_plug_ends_the_scans_and_connect_opens_the_line_afresh(
    instrument: SerialInstrument,
) -> None:
    driver = text_driver(instrument)
    async with opened(driver) as scans:
        instrument.noise(b"\nW=1 kg, T=2 C\n")
        await following(scans)
        instrument.unplug()
        with pytest.raises(DeviceUnreachable, match="plugged in") as gone:
            await following(scans)
        assert gone.value.reason is Reason.DISCONNECTED
        with pytest.raises(DeviceUnreachable, match="no such port"):
            await driver.connect()
        instrument.plug()
        await driver.connect()
        instrument.noise(b"\nW=3 kg, T=4 C\n")
        assert (await following(driver.scans())).values == [3.0, 4.0]


async def test_what_came_before_the_plug_was_pulled_is_still_delivered(instrument: SerialInstrument) -> None:
    driver = text_driver(instrument)
    async with opened(driver) as scans:
        instrument.noise(b"\nW=1 kg, T=2 C\n")
        await until(lambda: driver.counts.frames == 1)
        instrument.unplug()
        await until(lambda: driver._serial is None)
        assert (await following(scans)).values == [1.0, 2.0]
        with pytest.raises(DeviceUnreachable):
            await following(scans)


async def test_a_late_consumer_loses_the_oldest_and_it_is_counted(
    instrument: SerialInstrument,
) -> None:
    driver = text_driver(instrument)
    driver._queue = ScanQueue(10)
    async with opened(driver) as scans:
        instrument.noise(b"\n")
        for index in range(25):
            instrument.send(b"W=%d kg, T=0 C\n" % index)
        await until(lambda: driver.counts.frames == 25)
        got = [await following(scans) for _ in range(10)]
    assert [scan.values[0] for scan in got] == [float(index) for index in range(15, 25)]
    assert driver.overruns == 15


async def test_a_second_reader_of_the_same_port_is_told_so(instrument: SerialInstrument) -> None:
    async with opened(text_driver(instrument)):
        with pytest.raises(DeviceUnreachable, match="in use by another program"):
            await text_driver(instrument).connect()


async def test_close_is_safe_without_connect_and_twice(instrument: SerialInstrument) -> None:
    driver = text_driver(instrument)
    await driver.close()
    with pytest.raises(DeviceUnreachable, match="not connected"):
        await following(driver.scans())
    await driver.connect()
    await driver.close()
    await driver.close()


async def test_a_file_that_is_no_serial_port_is_a_matter_for_the_technician(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    options = SerialLineOptions(port=str(tmp_path / "plain"), separator=",")
    with pytest.raises(ConfigError, match="is not a serial port"):
        await SerialLineDriver("x", options, [P(name="a", column=1)]).connect()


async def test_ten_thousand_noisy_lines_give_no_wrong_value(instrument: SerialInstrument) -> None:
    """Garbage between the lines, lines cut anywhere: a scan is a line that was sent whole, or says why not."""
    rng = random.Random(3)
    driver = text_driver(instrument)
    sent: set[tuple[float, float]] = set()
    got: list[Scan] = []
    line = scale_line(rng)

    async def collect() -> None:
        async for scan in driver.scans():
            got.append(scan)  # noqa: PERF401 - what was got stays when the task is cancelled

    async with opened(driver):
        reader = asyncio.create_task(collect())
        for index in range(10_000):
            frame = line(index)
            match rng.randrange(10):
                case 0:
                    instrument.noise(rng.randbytes(rng.randrange(1, 40)).replace(b"\n", b"") + b"\n")
                case 1:
                    instrument.noise(frame[: rng.randrange(1, 24)] + b"\n")
            instrument.send(frame)
            match = re.match(rb"W=(.*) kg, T=(.*) C", frame)
            assert match is not None
            sent.add((float(match[1]), float(match[2])))
            if index % 20 == 0:
                await asyncio.sleep(0)
                await until(lambda: instrument.frames - driver.counts.frames < 50)
        await until(lambda: driver.counts.frames >= instrument.frames - 1)
        reader.cancel()
    good = [tuple(scan.values) for scan in got if not scan.reasons]
    assert len(good) >= 9_999
    assert set(good) <= sent
    assert instrument.bytes_lost == 0


async def test_an_instrument_in_another_process_is_read_while_it_runs(tmp_path: Path) -> None:
    link = tmp_path / "scale"
    plant = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.fakes.serial_instrument", "--link", str(link), "--period-ms", "10"),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    await until(link.is_symlink)
    driver = SerialLineDriver(
        "scale",
        SerialLineOptions(port=str(link), pattern=r"W=\s*(?P<weight>\S+) kg"),
        [P(name="weight", valid_max=200)],
    )
    async with opened(driver) as scans:
        got = [await following(scans) for _ in range(30)]
        plant.terminate()
        assert plant.stdout is not None
        async with asyncio.timeout(WAIT_S):
            books = json.loads(await plant.stdout.readline())
            await plant.wait()
            with pytest.raises(DeviceUnreachable):
                got += [scan async for scan in scans]
    assert sum(bool(scan.reasons) for scan in got) <= 1  # the line that was running at the opening
    assert 29 <= driver.counts.frames <= books["frames"]


# ------------------------------------------------------------------------------------------------------------ binary


async def test_binary_frames_are_read_as_their_layout_says(instrument: SerialInstrument) -> None:
    driver = binary_driver(instrument)
    async with opened(driver) as scans:
        instrument.send(binary_frame(1234, 2.5, 4_000_000_000))
        instrument.send(binary_frame(0, float("nan"), 0))
        first, second = await following(scans), await following(scans)
    assert first.values == [1234, 2.5, 4_000_000_000]
    assert second.values == [0, None, 0]
    assert second.reasons == {1: Reason.NAN}


async def test_a_failed_check_is_crc_on_every_point_and_the_next_frame_is_read(
    instrument: SerialInstrument,
) -> None:
    driver = binary_driver(instrument)
    broken = bytearray(binary_frame(2, 2.0, 2))
    broken[5] ^= 0x10
    async with opened(driver) as scans:
        instrument.send(binary_frame(1, 1.0, 1))
        instrument.noise(bytes(broken))
        instrument.send(binary_frame(3, 3.0, 3))
        got = [await following(scans) for _ in range(3)]
    assert [scan.values for scan in got] == [[1, 1.0, 1], [None, None, None], [3, 3.0, 3]]
    assert got[1].reasons == {0: Reason.CRC, 1: Reason.CRC, 2: Reason.CRC}
    assert (driver.counts.check_errors, driver.counts.frames) == (1, 2)


async def test_a_truncated_binary_frame_costs_only_itself(instrument: SerialInstrument) -> None:
    driver = binary_driver(instrument)
    async with opened(driver) as scans:
        instrument.noise(b"\x00\xaa\xaa")
        instrument.send(binary_frame(1, 1.0, 1))
        instrument.noise(binary_frame(2, 2.0, 2)[:7])
        instrument.send(binary_frame(3, 3.0, 3))
        instrument.send(binary_frame(4, 4.0, 4))
        got = [await following(scans) for _ in range(4)]
    assert [scan.values for scan in got] == [[1, 1.0, 1], [None] * 3, [3, 3.0, 3], [4, 4.0, 4]]


async def test_binary_byte_by_byte(instrument: SerialInstrument) -> None:
    async with opened(binary_driver(instrument)) as scans:
        await instrument.send_slowly(binary_frame(77, 7.0, 7))
        assert (await following(scans)).values == [77, 7.0, 7]


# --------------------------------------------------------------------------------------------------- other framings


def gap_driver(instrument: SerialInstrument, *, gap_ms: int = 60) -> SerialLineDriver:
    options = SerialLineOptions(
        port=instrument.port,
        framing="gap",
        content="binary",
        gap_ms=gap_ms,
        layout=">BBBHxx",  # unit, function, size, value
        stale_after_s=0,
    )
    return SerialLineDriver("gap", options, [P(name="value", type=ValueType.U16, item=4)])


def gap_frame(value: int) -> bytes:
    return struct.pack(">BBBHxx", 1, 3, 2, value)


async def test_silence_parts_frames_and_their_time_is_that_of_their_last_byte(
    instrument: SerialInstrument,
) -> None:
    driver = gap_driver(instrument)
    async with opened(driver) as scans:
        await asyncio.sleep(0.15)  # the silence under test
        before_ns = boot_ns()
        instrument.send(gap_frame(7)[:3])
        instrument.send(gap_frame(7)[3:])
        scan = await following(scans)
        assert scan.values == [7]
        assert before_ns < scan.taken_at_ns < boot_ns() - 50_000_000  # known only when the silence was over
        instrument.send(gap_frame(8))
        assert (await following(scans)).values == [8]
        instrument.noise(gap_frame(9)[:-1])
        assert (await following(scans)).reasons == {0: Reason.FRAMING}


async def test_halves_that_nobody_saw_apart_are_never_joined(instrument: SerialInstrument) -> None:
    """Two halves with silence between them, while the event loop looks elsewhere."""
    driver = gap_driver(instrument)
    async with opened(driver) as scans:
        await asyncio.sleep(0.15)
        instrument.noise(gap_frame(0x1111)[:4])
        await until(lambda: driver._framer.partial)
        time.sleep(0.2)  # noqa: ASYNC251 - blocks the loop on purpose
        instrument.noise(gap_frame(0x2222)[4:])
        assert (await following(scans)).reasons == {0: Reason.FRAMING}
        await asyncio.sleep(0.2)
        instrument.send(gap_frame(5))
        # The second half is told of too where the timer was asked before the pty had brought it.
        got = [await following(scans)]
        got += [await following(scans)] if got[0].reasons == {0: Reason.FRAMING} else []
        assert got[-1].values == [5]
    assert driver.counts.frames == 1


async def test_a_scale_in_motion_is_doubtful_on_the_line_too(instrument: SerialInstrument) -> None:
    options = SerialLineOptions(port=instrument.port, protocol="and", stale_after_s=0)
    driver = SerialLineDriver(
        "scale", options, [P(name="weight", unit="g"), P(name="stable", type=ValueType.BOOL)]
    )
    async with opened(driver) as scans:
        instrument.noise(b"\nUS,-000183.96  g\r\nST,+000081.72  g\r\nOL,+999999.9  g\r\n")
        got = [await following(scans) for _ in range(3)]
    assert [scan.values for scan in got] == [[-183.96, False], [81.72, True], [999999.9, None]]
    assert [dict(scan.reasons) for scan in got] == [
        {0: Reason.DEVICE_DOUBT},
        {},
        {0: Reason.DEVICE_FAULT, 1: Reason.MISSING},
    ]


async def test_a_pattern_that_would_backtrack_for_ever_holds_nobody_up(instrument: SerialInstrument) -> None:
    options = SerialLineOptions(port=instrument.port, pattern=r"(?P<x>(a+)+)$", stale_after_s=0)
    point = P(name="x", type=ValueType.STR, line=r"(a|aa)+")
    driver = SerialLineDriver("evil", options, [point])
    async with opened(driver) as scans:
        instrument.noise(b"\n" + b"a" * 200 + b"!\n" + b"aaa\n")
        assert (await following(scans)).reasons == {0: Reason.FRAMING}
        assert (await following(scans)).values == ["aaa"]


# ---------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("+1.50", ValueType.F64, 1.5),
        ("1e400", ValueType.F64, Reason.INFINITE),
        ("1e39", ValueType.F32, Reason.OVERFLOW),
        ("-inf", ValueType.F32, Reason.INFINITE),
        ("NaN", ValueType.F64, Reason.NAN),
        ("12.5", ValueType.I32, Reason.DECODE),
        ("256", ValueType.U8, Reason.OVERFLOW),
        ("-1", ValueType.U64, Reason.OVERFLOW),
        ("18446744073709551615", ValueType.U64, 2**64 - 1),
        ("1_000", ValueType.I32, Reason.DECODE),
        ("१२", ValueType.I32, Reason.DECODE),
        ("maybe", ValueType.BOOL, Reason.DECODE),
        ("ERR", ValueType.F64, Reason.DECODE),
        ("ERR", ValueType.STR, "ERR"),
    ],
)
def test_text_is_read_as_the_points_type_or_says_why_not(text: str, kind: ValueType, value: Value) -> None:
    result = parse(text, kind)
    assert result == value
    assert isinstance(result, Reason) is isinstance(value, Reason)


def test_a_decimal_comma_is_read_and_a_point_is_then_refused() -> None:
    assert parse("1,5", ValueType.F64, decimal=",") == 1.5
    assert parse("1.500,5", ValueType.F64, decimal=",") is Reason.DECODE


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=20), st.sampled_from(list(ValueType)), st.sampled_from([2, 8, 10, 16]))
def test_any_text_gives_a_value_of_the_type_or_a_reason(text: str, kind: ValueType, base: int) -> None:
    result = parse(text, kind, base=base)
    if not isinstance(result, Reason):
        assert type(result) is python_type(kind)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(st.integers(-(2**63), 2**64 - 1), st.floats(), st.booleans(), st.binary(max_size=8)),
    st.sampled_from(list(ValueType)),
)
def test_any_number_fits_the_type_unchanged_or_gives_a_reason(value: float | bytes, kind: ValueType) -> None:
    result = fit(value, kind)
    if isinstance(result, Reason):
        assert not result.has_value
    else:
        assert type(result) is python_type(kind)
        assert isinstance(value, bytes) or result == value


def python_type(kind: ValueType) -> type[Value]:
    match kind:
        case ValueType.BOOL:
            return bool
        case ValueType.STR:
            return str
        case ValueType.F32 | ValueType.F64:
            return float
        case _:
            return int


# ------------------------------------------------------------------------------------------------------- conformance


@pytest.mark.parametrize("framing", ["text", "binary"])
@pytest.mark.parametrize("check", conformance.PUSH, ids=conformance.title)
async def test_the_driver_conforms(
    check: conformance.Check, framing: str, instrument: SerialInstrument
) -> None:
    def build() -> SerialLineDriver:
        return text_driver(instrument) if framing == "text" else binary_driver(instrument)

    async def provoke() -> None:
        instrument.noise(b"\nW=1 kg, T=2 C\n" if framing == "text" else binary_frame(1, 2.0, 3))

    def absent() -> SerialLineDriver:
        options = msgspec.structs.replace(build().options, port=instrument.port + "-gone")
        return SerialLineDriver("gone", options, build().points)

    await check(conformance.Subject(build=build, absent=absent, provoke=provoke))


# ----------------------------------------------------------------------------------------------------- configuration

BINARY: dict[str, object] = {"framing": "fixed", "content": "binary", "start_hex": "AA"}


@pytest.mark.parametrize(
    ("options", "point", "text"),
    [
        ({"port": ""}, {"column": 1}, "options.port is empty"),
        ({}, {"column": 1}, "needs options.separator"),
        ({"separator": ","}, {"column": 0}, "counted from 1"),
        ({"separator": ","}, {}, "says not where it stands"),
        ({"separator": ",", "decimal": ","}, {"column": 1}, "both ','"),
        ({"separator": ","}, {"column": 1, "pattern": "(x)"}, "keep one"),
        ({}, {"pattern": "(x"}, r"point 'p': pattern: '\(x' is not a valid pattern: missing"),
        ({}, {"pattern": "x"}, "has no group"),
        ({}, {"pattern": "(x)", "line": "*"}, "point 'p': line"),
        ({"pattern": "(?P<q>x)"}, {}, "has no group 'p'; it has q"),
        ({"pattern": "["}, {}, "options.pattern"),
        ({}, {"pattern": "(?=x)(x)"}, "look-around"),
        ({}, {"item": 1}, 'belongs to content = "binary"'),
        ({}, {"sentence": "RMC"}, "sentence has no meaning with"),
        ({"layout": "<H"}, {"column": 1}, 'belongs to content = "binary"'),
        ({"delimiter": ""}, {"pattern": "(x)"}, "delimiter is empty"),
        ({"delimiter": "→"}, {"pattern": "(x)"}, "more than one byte"),
        ({"baud": 1}, {"pattern": "(x)"}, "options.baud is 1; allowed is 50 to"),
        ({"port": "usb:403:6001"}, {"pattern": "(x)"}, "options.port 'usb:403:6001' is no USB identity"),
        ({"request": "a", "request_hex": "61"}, {"pattern": "(x)"}, "both request and request_hex"),
        ({"request_hex": "6"}, {"pattern": "(x)"}, "not hexadecimal"),
        ({"end_hex": "03"}, {"pattern": "(x)"}, "end_hex belongs to framing ="),
        ({"gap_ms": 5}, {"pattern": "(x)"}, 'gap_ms belongs to framing = "gap"'),
        ({"framing": "fixed"}, {"pattern": "(x)"}, "needs start_hex, or a check of two bytes"),
        ({"framing": "fixed", "start_hex": "02"}, {"pattern": "(x)"}, "frame_bytes is 0"),
        ({"framing": "gap"}, {"pattern": "(x)"}, "half a message looks like a whole one"),
        ({"framing": "start_stop", "start_hex": "02"}, {"pattern": "(x)"}, "needs start_hex and end_hex"),
        (
            {"framing": "start_stop", "start_hex": "02", "end_hex": "03", "escape": "dle"},
            {"pattern": "(x)"},
            "of DLE and one more byte",
        ),
        (
            {
                "framing": "length",
                "start_hex": "AA 55",
                "length_offset": 1,
                "content": "binary",
                "layout": "<H",
            },
            {"item": 1},
            "inside the start",
        ),
        (
            {
                "framing": "length",
                "check": "crc16_arc",
                "max_frame_bytes": 2000,
                "content": "binary",
                "layout": "<H",
            },
            {"item": 1},
            "without start_hex at most 1024",
        ),
        ({"content": "binary", "layout": "<H"}, {"item": 1}, 'framing = "delimiter" is for text'),
        (BINARY | {"start_hex": "", "layout": "<H"}, {"item": 1}, "needs start_hex, or a check"),
        (BINARY | {"layout": "H"}, {"item": 1}, "begin with"),
        (BINARY | {"layout": "<Z"}, {"item": 1}, "bad char"),
        (BINARY | {"layout": "<é"}, {"item": 1}, "options.layout '<é'"),
        (BINARY | {"layout": "<H"}, {"item": 2}, "items 1 to 1"),
        (BINARY | {"layout": "<H"}, {}, "items 1 to 1"),
        (BINARY | {"layout": "<H"}, {"column": 1}, "it takes item"),
        (BINARY | {"layout": "<300s"}, {"item": 1}, "above max_frame_bytes"),
        (BINARY | {"layout": "<255s", "check": "xor"}, {"item": 1}, "a frame is 257 bytes, above"),
        (BINARY | {"layout": "<H", "frame_bytes": 9}, {"item": 1}, "leave it out"),
        (BINARY | {"check": "xor", "check_from": 2, "layout": "<H"}, {"item": 1}, "check_from is 2"),
        (BINARY | {"separator": ",", "layout": "<H"}, {"item": 1}, 'belongs to content = "text"'),
        ({"protocol": "nmea0183"}, {"column": 1}, "names no sentence"),
        ({"protocol": "nmea0183"}, {"sentence": "RMC"}, "give the field's number"),
        ({"protocol": "nmea0183"}, {"sentence": "$RMC", "column": 1}, "is no address"),
        ({"protocol": "nmea0183", "delimiter": "x"}, {"sentence": "RMC", "column": 1}, "settled by protocol"),
        (
            {"protocol": "nmea0183"},
            {"sentence": "RMC", "column": 3, "form": "degrees", "type": "u8"},
            "f64 or f32",
        ),
        ({"protocol": "toledo"}, {}, "a scale has no field 'p'"),
        ({"protocol": "cas"}, {"field": "stable"}, 'needs type = "bool"'),
        ({"protocol": "ohaus"}, {"column": 1}, "it takes field"),
        ({"protocol": "dsmr"}, {}, "names no code"),
        ({"protocol": "dsmr"}, {"obis": "1.8.0.0.0.0"}, "is no code"),
    ],
)
def test_what_can_never_work_is_refused_with_the_place_and_the_remedy(
    options: dict[str, object], point: dict[str, object], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        SerialLineDriver(
            "d",
            msgspec.convert({"port": "/dev/null", **options}, SerialLineOptions),
            [msgspec.convert({"name": "p", **point}, SerialLinePoint)],
        )


@pytest.mark.parametrize(
    ("old", "now"),
    [
        (
            {"framing": "binary"},
            'options.*framing.*\'binary\'.*; it is now framing = "fixed" with content = "binary"',
        ),
        ({"framing": "text"}, 'options.*framing.*it is now framing = "delimiter"'),
        ({"nmea_check": True}, 'options.*nmea_check.*it is now protocol = "nmea0183"'),
    ],
)
def test_a_key_of_an_earlier_version_is_refused_with_the_one_that_says_it_now(
    old: dict[str, object], now: str
) -> None:
    with pytest.raises(ConfigError, match=now):
        registry.build("mast", "serial_line", {"port": "/dev/null", **old}, [{"name": "p", "pattern": "(x)"}])


def test_a_device_without_points_is_refused() -> None:
    with pytest.raises(ConfigError, match="no points"):
        SerialLineDriver("d", SerialLineOptions(port="x"), [])


def test_a_layout_may_hold_a_string_and_padding() -> None:
    options = SerialLineOptions(
        port="x", framing="fixed", content="binary", start_hex="02", layout=">x4sh", end_hex="03"
    )
    driver = SerialLineDriver(
        "d", options, [P(name="n", item=2, type=ValueType.I16), P(name="s", item=1, type=ValueType.STR)]
    )
    said = driver._questions[0].dialect.read(struct.pack(">x4sh", b"ab", -2))
    assert said is not None
    assert said.results == [-2, "ab"]


def test_every_default_of_the_sample_is_the_default_of_the_code() -> None:
    sample = (Path(serial_line.__file__).with_suffix(".toml")).read_text()
    defaults = {
        field.encode_name: field.default
        for kind in (SerialLineOptions, SerialLinePoint)
        for field in msgspec.structs.fields(kind)
        if field.default is not msgspec.NODEFAULT and field.default is not None
    }
    shown = tomllib.loads("\n".join(dict.fromkeys(re.findall(r"^# (\w+ = .*)$", sample, re.MULTILINE))))
    options = {field.encode_name for field in msgspec.structs.fields(SerialLineOptions)} - {"port"}
    assert options <= shown.keys()
    assert {key: value for key, value in shown.items() if key in defaults} == {
        key: str(value) if isinstance(value, ValueType) else value
        for key, value in defaults.items()
        if key in shown
    }


def test_the_sample_builds_its_devices() -> None:
    sample = tomllib.loads((Path(serial_line.__file__).with_suffix(".toml")).read_text())
    for device in sample["device"]:
        assert device["driver"] == "serial_line"
        SerialLineDriver(
            device["name"],
            msgspec.convert(device["options"], SerialLineOptions),
            msgspec.convert(device["point"], list[SerialLinePoint]),
        )


async def test_discover_names_ports_as_the_configuration_wants_them() -> None:
    async for found in SerialLineDriver.discover():
        assert found.driver == "serial_line"
        msgspec.convert({**found.options, "separator": ","}, SerialLineOptions)
