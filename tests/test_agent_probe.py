"""`headgate probe`: registers that nobody described, and the one that shows a value off the display."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fakes.modbus_peer import Unit, tcp_peer
from tests.fakes.technician import Technician, heard
from tests.fakes.unknown_meter import OnPty, Shown, UnknownMeter, plain

TABLES = {"holding": 3, "input": 4}


@pytest.fixture
def technician(tmp_path: Path) -> Technician:
    return Technician(tmp_path)


async def until(true: Callable[[], bool], within_s: float = 30.0) -> None:
    end_s = asyncio.get_running_loop().time() + within_s
    while not true():
        assert asyncio.get_running_loop().time() < end_s
        await asyncio.sleep(0.05)


def line_of(port: OnPty, unit: int) -> tuple[str, ...]:
    return "--port", str(port.link), "--baud", "115200", "--unit", str(unit)


def same_place(match: dict[str, object], shown: Shown) -> bool:
    """Type, order and scale as the meter has them; signed or not cannot be told from one value."""
    return (
        TABLES[str(match["table"])] == shown.function
        and match["register"] == shown.register
        and str(match["type"])[1:] == shown.kind[1:]
        and match["order"] == shown.order
        and abs(float(str(match["scale"])) - shown.scale) < 1e-12
    )


# --- off the display ---


@pytest.mark.parametrize("seed", range(100, 112))
async def test_every_value_of_an_unknown_meter_is_found_where_it_stands(
    seed: int, technician: Technician
) -> None:
    """Base, table, type, order and scale are random; so are decoys and holes. The display tells four values."""
    meter = UnknownMeter(seed)
    port = OnPty({meter.unit: meter.answer}, technician.folder / "port")
    base = min(one.register for one in meter.shown)
    expects = [word for name, text in meter.display().items() for word in ("--expect", f"{name}={text}")]
    # Where to look is known from the manual's first page; the whole search is tried below.
    near = f"{max(0, base - 40)}-{min(65535, base + 80)}"
    ran = await technician.types(
        "probe", *line_of(port, meter.unit), "--registers", near, "--seconds", "0", "--json", *expects
    )
    port.close()
    assert ran.code == 0, f"seed {seed}: {ran}"
    by_name = {one["name"]: one for one in ran.json["expected"]}
    for shown in meter.shown:
        best = by_name[shown.name]["matches"][0]
        assert same_place(best, shown), f"seed {seed}: {shown} taken for {best}"


@pytest.mark.parametrize("seed", [5, 9, 12, 16])
async def test_the_whole_way_from_scan_to_the_displayed_value(seed: int, technician: Technician) -> None:
    """Nothing is known but the port: scan, probe with a value off the display, add, read."""
    meter = UnknownMeter(seed)
    port = OnPty({meter.unit: meter.answer}, technician.folder / "port")
    scanned = await technician.types(
        "scan", "modbus", "--port", str(port.link), "--units", "1-32", "--fast", "--baud", "115200"
    )
    assert scanned.code == 0, f"seed {seed}: {scanned}"
    expects = [word for name, text in meter.display().items() for word in ("--expect", f"{name}={text}")]
    probed = await technician.types("probe", "--found", "1", *expects, "--json")
    assert probed.code == 0, f"seed {seed}: {probed}"
    command = probed.json["add"].replace("NAME", "meter").split()
    assert command[:2] == ["headgate", "add"]
    added = await technician.types(*[word.strip("'") for word in command[1:]])
    assert added.code == 0, f"seed {seed}: {added}"
    read = await technician.types("read", "meter", "--json")
    port.close()
    values = {one["point"]: one["value"] for one in read.json["readings"]}
    for shown in meter.shown:
        assert f"{values[shown.name]:.{shown.decimals}f}" == shown.text, (
            f"seed {seed}: {shown} reads {values}"
        )


async def test_a_value_that_moves_is_found_near_and_said_to_move(technician: Technician) -> None:
    meter = UnknownMeter(5, moving=True)
    port = OnPty({meter.unit: meter.answer}, technician.folder / "port")
    shown = meter.shown[0]
    text = meter.display()[shown.name]
    meter.move()

    async def move() -> None:
        while True:
            await asyncio.sleep(0.1)
            meter.move()

    moving = asyncio.create_task(move())
    ran = await technician.types(
        "probe", *line_of(port, meter.unit), "--registers", f"{shown.register - 5}-{shown.register + 20}",
        "--expect", f"{shown.name}={text}", "--seconds", "2", "--json",
    )  # fmt: skip
    moving.cancel()
    port.close()
    best = ran.json["expected"][0]["matches"][0]
    assert same_place(best, shown), (best, shown)
    assert best["moves"]


async def test_ctrl_c_ends_the_search_and_shows_what_was_found(technician: Technician) -> None:
    """The value stands at 100, another register far away is never reached."""
    port = OnPty({7: plain({100: 2305, 101: 7, 61234: 1})}, technician.folder / "port")
    process = await technician.starts(
        "probe", *line_of(port, 7), "--expect", "1=987.6", "--config", str(technician.config)
    )
    await heard(process, "Searching")
    await until(lambda: port.requests >= 500)
    ran = await technician.interrupts(process)
    port.close()
    assert ran.code == 130, ran
    assert "registers read" in ran.out
    assert "no register shows it" in ran.out
    assert "Traceback" not in ran.err


async def test_a_value_that_stands_nowhere_is_exit_1(technician: Technician) -> None:
    async with tcp_peer({1: Unit(holding=[1, 1, 3], input=[4, 4])}) as peer:
        ran = await technician.types(
            "probe", "--host", f"127.0.0.1:{peer.port}", "--registers", "0-1", "--expect", "987.6"
        )
    assert ran.code == 1, ran
    assert "0 exact" in ran.out or "no register shows it" in ran.out
    assert "headgate add" not in ran.out


# --- a range ---


async def test_a_range_shows_every_decoding_around_the_holes(technician: Technician) -> None:
    registers = {0: 0x4366, 1: 0x8000, 2: 2305, 4: 0x4142, 5: 0x4344, 6: 0x3132}
    port = OnPty({7: plain(registers)}, technician.folder / "port")
    ran = await technician.types("probe", *line_of(port, 7), "--registers", "0-9")
    everything = await technician.types("probe", *line_of(port, 7), "--registers", "0-9", "--all")
    told = await technician.types("probe", *line_of(port, 7), "--registers", "0-9", "--json")
    port.close()
    assert ran.code == 0, ran
    assert "230.5" in ran.out
    assert "Not there: 3, 7-9" in ran.out
    assert "ABCD12" in ran.out
    assert "BADC" in everything.out
    assert "0100001101100110" in everything.out, "the bit pattern"
    (table,) = told.json["tables"]
    floats = {d["order"]: d["value"] for d in table["registers"][0]["decodings"] if d["type"] == "f32"}
    assert floats["ABCD"] == 230.5
    assert table["refused"] == [[3, 3], [7, 9]]


def silent_about_holes(registers: dict[int, int]) -> Callable[[bytes], bytes | None]:
    answer = plain(registers)

    def answers(pdu: bytes) -> bytes | None:
        told = answer(pdu)
        return None if told[0] & 0x80 else told

    return answers


async def test_a_device_that_is_silent_about_what_it_has_not_is_read_around_the_holes(
    technician: Technician,
) -> None:
    registers = {at: at + 1000 for at in range(40) if at not in (7, 30)}
    port = OnPty({7: silent_about_holes(registers)}, technician.folder / "port")
    ran = await technician.types("probe", *line_of(port, 7), "--registers", "0-39", "--json")
    port.close()
    assert ran.code == 0, ran
    held = {one["register"]: int(one["hex"], 16) for one in ran.json["tables"][0]["registers"]}
    assert held == registers
    assert ran.json["tables"][0]["silent"] == [[7, 7], [30, 30]]


async def test_a_silent_device_is_searched_at_its_own_pace(technician: Technician) -> None:
    """At half a second for each of its requests this would take longer than a command may take here."""
    registers = {0: 1, 1: 2, 2: 3, 10: 4, 100: 5, 101: 6, 1000: 2305, 1001: 4999, 1002: 12345}
    port = OnPty({7: silent_about_holes(registers)}, technician.folder / "port")
    ran = await technician.types(
        "probe", *line_of(port, 7), "--expect", "u=230.5 V", "--expect", "f=49.99 Hz", "--expect", "e=1234.5",
        "--table", "holding", "--json",
    )  # fmt: skip
    port.close()
    found = {one["name"]: one["matches"][0]["register"] for one in ran.json["expected"]}
    assert found == {"u": 1000, "f": 1001, "e": 1002}
    assert ran.json["requests"] > 120


async def test_registers_that_move_are_marked(technician: Technician) -> None:
    registers = {0: 1, 1: 2, 2: 3}
    port = OnPty({7: plain(registers)}, technician.folder / "port")

    async def turn() -> None:
        while True:
            registers[1] += 1
            await asyncio.sleep(0.05)

    turning = asyncio.create_task(turn())
    ran = await technician.types("probe", *line_of(port, 7), "--registers", "0-2", "--seconds", "1")
    turning.cancel()
    port.close()
    marked = [line for line in ran.out.splitlines() if line.startswith("!")]
    assert len(marked) == 1
    assert marked[0].split()[1] == "1"


async def test_bits_are_read_too(technician: Technician) -> None:
    async with tcp_peer({1: Unit(coils=[True, False, True, True])}) as peer:
        ran = await technician.types(
            "probe", "--host", f"127.0.0.1:{peer.port}", "--registers", "0-3", "--table", "coil"
        )
    assert ran.code == 0, ran
    assert "1  0  1  1" in ran.out


# --- what cannot be ---


async def test_nobody_there_is_trouble_with_the_scan_to_run(technician: Technician) -> None:
    port = OnPty({9: plain({0: 1})}, technician.folder / "port")
    ran = await technician.types("probe", *line_of(port, 7), "--registers", "0-9")
    port.close()
    assert ran.code == 1, ran
    assert "headgate scan modbus" in ran.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "--port"),
        (("--host", "127.0.0.1:1", "--registers", "9-3"), "register"),
        (("--host", "127.0.0.1:1", "--registers", "0-70000"), "65535"),
        (("--host", "127.0.0.1:1", "--expect", "volts"), "230.5"),
        (("--host", "127.0.0.1:1", "--table", "coil", "--expect", "1"), "--registers"),
        (("--found", "3"), "scan"),
        (("--host", "127.0.0.1:1", "--framing", "rtu"), "rtu_over_tcp"),
    ],
)
async def test_what_cannot_be_meant_is_refused_with_exit_2(
    technician: Technician, words: tuple[str, ...], told: str
) -> None:
    ran = await technician.types("probe", *words)
    assert ran.code == 2, ran
    assert told in ran.err


async def test_a_port_that_is_not_there_is_exit_1(technician: Technician) -> None:
    ran = await technician.types("probe", "--port", "/dev/ttyNOWHERE", "--registers", "0-3")
    assert ran.code == 1, ran
    assert "/dev/ttyNOWHERE" in ran.err
