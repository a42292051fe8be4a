"""`headgate read`, `watch` and `write`: what a device says now, goes on saying, and takes."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.commands_read import lines
from agent.commands_watch import sparkline
from agent.commands_write import value_of
from agent.field import Look, Shown
from agent.technician import Cannot, duration, number, quality_words
from drivers.contract import Reason
from tests.fakes.technician import HEADGATE, Technician, heard
from tests.fakes.unknown_meter import OnPty, plain

DEVICE = """
[[device]]
name = "boiler"
driver = "modbus"
period_ms = 200
[device.options]
serial = "{port}"
baud = 9600
parity = "none"
unit = 7
[[device.point]]
name = "flow"
register = 0
scale = 0.1
unit = "Cel"
valid_max = 100.0
[[device.point]]
name = "setpoint"
register = 1
type = "i16"
scale = 0.1
unit = "Cel"
writable = true
[[device.point]]
name = "missing"
register = 9
"""


class Bench:
    """A boiler on a line, and who looks at it."""

    def __init__(self, folder: Path) -> None:
        self.registers = {0: 554, 1: 600}
        self.port = OnPty({7: plain(self.registers)}, folder / "port")
        self.technician = Technician(folder, devices=DEVICE.format(port=self.port.link))


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.port.close()


# --- read ---


async def test_a_read_shows_value_unit_and_quality_in_words(bench: Bench) -> None:
    ran = await bench.technician.types("read", "boiler")
    assert ran.code == 1, "one of its points is bad"
    lines = [" ".join(line.split()) for line in ran.out.splitlines()[1:]]
    assert lines == ["flow 55.4 Cel good", "setpoint 60 Cel good", "missing - bad: refused"]


async def test_named_points_only_and_raw_beside(bench: Bench) -> None:
    ran = await bench.technician.types("read", "boiler", "setpoint", "--raw")
    assert ran.code == 0, ran
    assert " ".join(ran.out.splitlines()[1].split()) == "setpoint 60 Cel good raw 600"
    told = (await bench.technician.types("read", "boiler", "flow", "--json")).json
    assert told["readings"] == [
        {"point": "flow", "value": 55.4, "unit": "Cel", "raw": 554, "quality": "good", "reason": "good"}
    ]


async def test_a_value_out_of_range_is_shown_and_is_bad(bench: Bench) -> None:
    bench.registers[0] = 1500
    ran = await bench.technician.types("read", "boiler", "flow")
    assert ran.code == 1
    assert "150  Cel  bad: out of range" in ran.out


@pytest.mark.parametrize(
    ("words", "told"), [(("boilr",), "did you mean 'boiler'"), (("boiler", "flw"), "did you mean 'flow'")]
)
async def test_a_misspelt_name_is_told_the_nearest(bench: Bench, words: tuple[str, ...], told: str) -> None:
    ran = await bench.technician.types("read", *words)
    assert ran.code == 2
    assert told in ran.err


async def test_a_device_that_is_away_is_exit_1_in_one_line(bench: Bench) -> None:
    bench.port.units.clear()
    ran = await bench.technician.types("read", "boiler")
    assert ran.code == 1, ran
    assert ran.out == ""
    assert len(ran.err.splitlines()) == 1


# --- write ---


async def test_a_write_shows_the_old_value_and_what_it_reads_back_as(bench: Bench) -> None:
    ran = await bench.technician.types("write", "boiler", "setpoint", "62.5", "--yes")
    assert ran.code == 0, ran
    assert ran.out.splitlines() == ["boiler setpoint: now 60 Cel", "boiler setpoint: reads back 62.5 Cel"]
    assert bench.registers[1] == 625


async def test_a_write_is_not_done_where_nobody_can_be_asked(bench: Bench) -> None:
    ran = await bench.technician.types("write", "boiler", "setpoint", "62.5")
    assert ran.code == 2
    assert "--yes" in ran.err
    assert bench.registers[1] == 600


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("flow", "50"), "not writable"),
        (("setpoint", "warm"), "not a number"),
        (("setpoint", "62.55"), "between two steps"),
        (("setpnt", "1"), "did you mean 'setpoint'"),
    ],
)
async def test_what_cannot_be_written_is_refused_with_exit_2(
    bench: Bench, words: tuple[str, ...], told: str
) -> None:
    ran = await bench.technician.types("write", "boiler", *words, "--yes")
    assert ran.code == 2, ran
    assert told in ran.err
    assert bench.registers == {0: 554, 1: 600}


async def test_a_write_as_json_is_one_document(bench: Bench) -> None:
    told = (await bench.technician.types("write", "boiler", "setpoint", "--yes", "--json", "--", "-5")).json
    assert told["written"]
    assert (told["before"][0]["value"], told["after"][0]["value"]) == (60.0, -5.0)


def test_what_is_typed_is_taken_by_what_the_point_holds() -> None:
    assert value_of("on", True) is True
    assert value_of("0x10", 5) == 16
    assert value_of("62,5", 1.0) == 62.5
    assert value_of("7", "text") == "7"
    with pytest.raises(Cannot):
        value_of("warm", 1)


# --- watch ---


async def test_plain_lines_come_until_the_count(bench: Bench) -> None:
    ran = await bench.technician.types("watch", "boiler", "--count", "3")
    assert ran.code == 0, ran
    flows = [line for line in ran.out.splitlines() if " flow " in line]
    assert len(flows) >= 3
    assert flows[0].endswith("boiler flow 55.4 Cel good")


async def test_json_is_one_scan_a_line(bench: Bench) -> None:
    ran = await bench.technician.types("watch", "--count", "2", "--json")
    scans = [json.loads(line) for line in ran.out.splitlines()]
    assert len(scans) >= 2
    assert all(one["device"] == "boiler" for one in scans)


async def test_it_works_beside_a_running_agent_and_after_ctrl_c_says_130(bench: Bench) -> None:
    agent = await bench.technician.starts("run", "--config", str(bench.technician.config))
    try:
        await heard(agent, "first scan")
        ran = await bench.technician.types("watch", "--count", "2", "--json")
        read = await bench.technician.types("read", "boiler", "flow")
        written = await bench.technician.types("write", "boiler", "setpoint", "61", "--yes")
        watching = await bench.technician.starts("watch", "--config", str(bench.technician.config))
        assert watching.stdout is not None
        await watching.stdout.readline()
        stopped = await bench.technician.interrupts(watching)
    finally:
        agent.terminate()
        await agent.communicate()
    assert (ran.code, read.code, written.code, stopped.code) == (0, 0, 0, 130), (ran, read, written, stopped)
    assert bench.registers[1] == 610


async def test_a_device_that_goes_away_while_it_is_watched_turns_bad_and_comes_back(bench: Bench) -> None:
    watching = await bench.technician.starts(
        "watch", "--json", "--count", "200", "--config", str(bench.technician.config)
    )
    assert watching.stdout is not None
    answer = bench.port.units.pop(7)
    states: list[str] = []
    for _ in range(60):
        scan = json.loads(await watching.stdout.readline())
        state = scan["readings"][0]["quality"]
        if not states or states[-1] != state:
            states.append(state)
        if state == "bad":
            bench.port.units[7] = answer
        if states[-2:] == ["bad", "good"]:
            break
    watching.kill()
    await watching.communicate()
    assert states[-2:] == ["bad", "good"], states


def on_a_terminal(technician: Technician, *words: str, colour: bool) -> str:
    """What a terminal of 80 columns is sent."""
    main, side = pty.openpty()
    environment = technician.environment | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    if not colour:
        environment["NO_COLOR"] = "1"
    process = subprocess.Popen(
        [HEADGATE, *words, "--config", str(technician.config)],
        stdin=side,
        stdout=side,
        stderr=side,
        env=environment,
    )
    os.close(side)
    told = b""
    while True:
        try:
            more = os.read(main, 65536)
        except OSError:
            break
        if not more:
            break
        told += more
    os.close(main)
    assert process.wait(60) == 0, told
    return told.decode()


SIMULATED = """
[[device]]
name = "tank"
driver = "simulator"
period_ms = 100
[[device.point]]
name = "level"
unit = "mm"
wave = "sine"
low = 0
high = 100
"""


@pytest.mark.parametrize("colour", [True, False])
def test_on_a_terminal_a_live_table_is_drawn_with_colour_only_where_it_is_wanted(
    tmp_path: Path, *, colour: bool
) -> None:
    technician = Technician(tmp_path, devices=SIMULATED)
    told = on_a_terminal(technician, "watch", "--seconds", "2", colour=colour)
    assert "tank" in told
    assert "good" in told
    assert any(mark in told for mark in "▁▂▃▄▅▆▇█")
    assert ("\x1b[32m" in told) is colour


def test_a_table_taller_than_the_terminal_says_what_it_leaves_out(tmp_path: Path) -> None:
    points = "".join(f'[[device.point]]\nname = "level_{i}"\nwave = "counter"\n' for i in range(200))
    simulated = f'[[device]]\nname = "tank"\ndriver = "simulator"\nperiod_ms = 100\n{points}'
    told = on_a_terminal(Technician(tmp_path, devices=simulated), "watch", "--seconds", "2", colour=False)
    assert "… and 178 more" in told
    assert "level_21" in told
    assert "level_22" not in told
    last = told[told.rindex("level_0") :].splitlines()
    assert len(last) <= 24, "taller than the terminal"


def test_the_quality_is_seen_however_long_the_names_are() -> None:
    shown = [
        Shown("p" * 40, 1234567.5, 1234567.5, "Cel", Reason.STUCK),
        Shown("q" * 200, "x" * 300, None, "", Reason.RANGE),
        Shown("n", -(2**63), None, "kvarh", Reason.SENTINEL),
    ]
    told = lines(Look("d", 0, shown))[1:]
    assert all(len(line) <= 80 for line in told)
    for line, words in zip(
        told, ("uncertain: does not change", "bad: out of range", "bad: not available"), strict=True
    ):
        assert line.endswith(words)
    assert str(-(2**63)) in told[2]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (1234567.8, "1234567.8"), (429496729 * 0.1, "42949672.9"), (16777216.0, "16777216"), (230.1, "230.1"),
        (24.314180374145508, "24.31418"), (0.1 + 0.2, "0.3"), (1e20, "1e+20"), (5e-7, "5e-07"), (float("nan"), "nan"),
        (-1e308, "-1e+308"), (60.0, "60"),
    ],
)  # fmt: skip
def test_a_counter_keeps_the_digits_of_its_display(value: float, told: str) -> None:
    assert number(value) == told


def test_what_a_device_says_steers_no_terminal() -> None:
    told = lines(Look("d", 0, [Shown("name", "\x1b[2Jmeter\r\nbad", None, "", Reason.GOOD)]))
    assert told[1].split() == ["name", "?[2Jmeter??bad", "good"]


def test_a_sparkline_goes_from_least_to_greatest() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([5, 5]) == "▅▅"
    assert sparkline([]) == ""
    assert sparkline([1, 2], "_@") == "_@"


def test_words_and_numbers_as_a_person_writes_them() -> None:
    assert [number(v) for v in (230.48370361328125, 5, True, None, "x", 0.1)] == [
        "230.4837", "5", "true", "-", "x", "0.1",
    ]  # fmt: skip
    assert [quality_words(r) for r in (Reason.GOOD, Reason.STUCK, Reason.TIMEOUT)] == [
        "good", "uncertain: does not change", "bad: no answer",
    ]  # fmt: skip
    assert all(quality_words(reason) for reason in Reason)
    assert [duration(s) for s in (0.25, 59.6, 320.2, 3700)] == ["0.2 s", "60 s", "5 min 20 s", "1 h 01 min"]
