"""What the technician's commands share: Ctrl-C at a question, files that may not be read, errors as JSON, terminals
without Unicode."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fakes.technician import ANSWER_WITHIN_S, HEADGATE, Ran, Technician
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
name = "setpoint"
register = 1
writable = true
"""


class Bench:
    """A boiler on a line, and who stands before it."""

    def __init__(self, folder: Path) -> None:
        self.registers = {0: 554, 1: 600, 2: 554, 3: 7}
        self.port = OnPty({7: plain(self.registers)}, folder / "port")
        self.technician = Technician(folder, devices=DEVICE.format(port=self.port.link))


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.port.close()


class Terminal:
    """One command on a terminal of 80 by 24."""

    def __init__(self, technician: Technician, *words: str) -> None:
        self._main, side = pty.openpty()
        self.process = subprocess.Popen(
            [HEADGATE, *words, "--config", str(technician.config)], stdin=side, stdout=side, stderr=side,
            env=technician.environment | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"},
        )  # fmt: skip
        os.close(side)
        os.set_blocking(self._main, False)
        self.shown = ""

    async def shows(self, text: str) -> None:
        async with asyncio.timeout(ANSWER_WITHIN_S):
            while text not in self.shown:
                assert self.process.poll() is None, self.shown
                self._read()
                await asyncio.sleep(0.02)

    def types(self, text: str) -> None:
        os.write(self._main, text.encode())

    async def ends(self) -> int:
        async with asyncio.timeout(ANSWER_WITHIN_S):
            while self.process.poll() is None:
                self._read()
                await asyncio.sleep(0.02)
        self._read()
        os.close(self._main)
        assert "Traceback" not in self.shown
        return self.process.returncode

    async def is_interrupted(self) -> int:
        """Ctrl-C, and nothing typed after it."""
        self.process.send_signal(signal.SIGINT)
        try:
            return await self.ends()
        except TimeoutError:
            self.process.kill()
            raise AssertionError(f"Ctrl-C did not end it: {self.shown}") from None

    def _read(self) -> None:
        try:
            while more := os.read(self._main, 65536):
                self.shown += more.decode()
        except OSError:
            return


# --- questions ---


async def test_ctrl_c_at_the_question_of_a_write_ends_it_and_nothing_is_written(bench: Bench) -> None:
    terminal = Terminal(bench.technician, "write", "boiler", "setpoint", "620")
    await terminal.shows("write 620?")
    assert await terminal.is_interrupted() == 130
    assert bench.registers[1] == 600


@pytest.mark.parametrize(
    ("typed", "code", "holds"), [("y\n", 0, 620), ("\n", 2, 600), ("n\n", 2, 600), ("\x04", 2, 600)]
)
async def test_only_a_yes_is_a_yes(bench: Bench, typed: str, code: int, holds: int) -> None:
    terminal = Terminal(bench.technician, "write", "boiler", "setpoint", "620")
    await terminal.shows("write 620?")
    terminal.types(typed)
    assert await terminal.ends() == code, terminal.shown
    assert bench.registers[1] == holds


async def test_ctrl_c_at_the_question_of_a_probe_shows_what_was_found(bench: Bench) -> None:
    words = ("--port", str(bench.port.link), "--baud", "115200", "--unit", "7", "--registers", "0-3")
    terminal = Terminal(bench.technician, "probe", *words, "--expect", "flow=55.4", "--seconds", "0")
    await terminal.shows("What does the display show now?")
    assert await terminal.is_interrupted() == 130
    assert "flow = 55.4: " in terminal.shown
    assert "headgate add NAME" in terminal.shown


async def test_the_display_read_again_is_typed_at_the_question(bench: Bench) -> None:
    words = ("--port", str(bench.port.link), "--baud", "115200", "--unit", "7", "--registers", "0-3")
    terminal = Terminal(bench.technician, "probe", *words, "--expect", "flow=55.4", "--seconds", "0")
    await terminal.shows("What does the display show now?")
    bench.registers[2] = 612
    terminal.types("61.2\n")
    await terminal.shows("register=2,type=u16,scale=0.1")
    terminal.types("\n")  # if it asks once more: enough
    assert await terminal.ends() == 0, terminal.shown


# --- files and users ---


def as_a_stranger() -> list[str]:
    """Root without its capabilities may read what is its own, like everybody."""
    if os.geteuid():
        return []
    found = shutil.which("setpriv")
    assert found, "setpriv (util-linux) is needed where the tests run as root"
    return [found, "--bounding-set=-all", "--inh-caps=-all"]


COMMANDS = [
    ("read", "boiler"),
    ("watch", "boiler", "--seconds", "1"),
    ("watch", "--plain"),
    ("write", "boiler", "setpoint", "620", "--yes"),
    ("add", "meter", "--host", "127.0.0.1:9", "--point", "v,register=0"),
    ("probe", "--host", "127.0.0.1:9", "--registers", "0"),
    ("scan", "modbus", "--host", "127.0.0.1:9"),
    ("scan", "serial", "--seconds", "0.2"),
    ("scan", "ble", "--seconds", "1"),
    ("scan", "all", "--seconds", "1"),
]


@pytest.mark.parametrize("of_folder", [False, True])
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_configuration_that_may_not_be_read_is_told_with_the_user_to_be(
    words: tuple[str, ...], tmp_path: Path, *, of_folder: bool
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    technician = Technician(closed)
    shut = closed if of_folder else technician.config
    if not os.geteuid():
        os.chown(shut, 65534, 65534)
    shut.chmod(0o700 if of_folder and not os.geteuid() else 0o600 if not os.geteuid() else 0)
    try:
        done = subprocess.run(
            [*as_a_stranger(), HEADGATE, *words, "--config", technician.config],
            env=os.environ | {"XDG_STATE_HOME": str(tmp_path)}, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    finally:
        shut.chmod(0o700)
    assert done.returncode == 2, done
    assert f"{technician.config}: Permission denied; run this as" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", COMMANDS[:5], ids=" ".join)
async def test_a_configuration_that_is_not_there_is_told_with_the_way_to_begin_one(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    technician = Technician(tmp_path)
    technician.config.unlink()
    ran = await technician.types(*words, "--state-dir", str(technician.state))
    assert ran.code == 2, ran
    assert f"{technician.config}: there is no such file; name yours with --config" in ran.err


# --- JSON, terminals ---


@pytest.mark.parametrize(
    "command",
    [
        "",
        "add",
        "probe",
        "read",
        "watch",
        "write",
        "scan",
        "scan modbus",
        "scan serial",
        "scan ble",
        "scan all",
    ],
)
async def test_every_help_fits_a_terminal_of_80_columns(command: str, tmp_path: Path) -> None:
    process = await Technician(tmp_path).starts(*command.split(), "--help")
    out, err = await process.communicate()
    assert process.returncode == 0, err
    assert [line for line in out.decode().splitlines() if len(line) > 80] == []
    assert not command or "130 stopped by" in " ".join(out.decode().split()), "exit codes are told"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("read", "boilr"), 2),
        (("read", "boiler", "setpnt"), 2),
        (("watch", "boilr", "--seconds", "5"), 1),
        (("write", "boiler", "setpoint", "warm", "--yes"), 2),
        (("write", "boiler", "setpoint", "1"), 2),
        (("add", "boiler", "--host", "127.0.0.1:9", "--point", "v,register=0"), 2),
        (("add", "meter", "--host", "127.0.0.1:9", "--point", "v,register=0"), 1),
        (("add", "meter", "--host", "127.0.0.1:9", "--point", "v,register=-1"), 2),
        (("probe", "--host", "127.0.0.1:9"), 1),
        (("probe", "--found", "99"), 2),
        (("probe", "--host", "127.0.0.1:9", "--expect", "warm"), 2),
        (("scan", "modbus", "--port", "/dev/nosuch"), 1),
        (("scan", "modbus", "--network", "nosuch"), 2),
        (("scan", "serial", "--port", "/dev/nosuch", "--seconds", "0.2"), 1),
    ],
    ids=str,
)  # fmt: skip
async def test_with_json_an_error_is_a_document_too(bench: Bench, words: tuple[str, ...], code: int) -> None:
    ran: Ran = await bench.technician.types(*words, "--json")
    assert ran.code == code, ran
    told = json.loads(ran.out)
    if "found" in told:
        assert told["notes"]  # a scan that went through says there what it could not search
    else:
        assert told["exit"] == code
        assert " ".join(told["error"].split()) in " ".join(ran.err.split())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
async def test_a_terminal_without_unicode_gets_what_it_can_show(bench: Bench, encoding: str) -> None:
    environment = bench.technician.environment | {"PYTHONUTF8": "0", "PYTHONIOENCODING": encoding}
    long = "point_" + "x" * 90
    config = bench.technician.config
    config.write_text(
        config.read_text().replace('"setpoint"', f'"{long}"').replace("writable", 'unit = "°C"\nwritable')
    )
    for words in (("read", "boiler"), ("watch", "--count", "1"), ("read", b"boil\xff")):
        done = await asyncio.to_thread(
            subprocess.run, [HEADGATE, *words, "--config", config], env=environment, capture_output=True,
            timeout=ANSWER_WITHIN_S,
        )  # fmt: skip
        assert b"Traceback" not in done.stderr, done
        assert done.returncode == (2 if words[1] == b"boil\xff" else 0), done
