"""`headgate` from the outside: answers at once, says what is wrong, and means it with its exit status."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from agent import status as status_file
from agent.cli import main
from agent.health import DeviceHealth, State
from agent.state import StateLock
from agent.status import AgentStatus, LinkHealth, LinkState, RunState

BIN = Path(sys.executable).parent
GOOD = """
[gateway]
tenant = "acme"
name = "plant-1"
state_dir = "{folder}"
[uplink]
kind = "none"
[[device]]
name = "boiler"
driver = "simulator"
[[device.point]]
name = "t"
[[device]]
name = "spare"
driver = "simulator"
enabled = false
[[device.point]]
name = "t"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "agent.toml"
    path.write_text(GOOD.format(folder=tmp_path / "state"))
    (tmp_path / "state").mkdir()
    return path


def said(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def write_status(folder: Path, *, state: State = State.OK, run: RunState = RunState.RUNNING) -> None:
    device = DeviceHealth(
        name="boiler", driver="simulator", state=state, since_ns=time.time_ns() - 240 * 10**9
    )
    if state is State.DOWN:
        device.why, device.remedy = "no answer within 5 s", "check the cable"
    status_file.write(
        folder,
        AgentStatus(
            version="1",
            gateway="acme/plant-1",
            state=run,
            written_ns=time.time_ns(),
            started_ns=time.time_ns() - 10**9,
            link=LinkHealth(state=LinkState.OFF),
            devices=[device],
        ),
    )


# --- at once ---


def test_help_imports_nothing_heavy() -> None:
    """The promise is 0.3 s on any machine; what keeps it is that nothing is imported that is not needed."""
    found = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "from agent.cli import main; main(['--help'])"],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {line.rsplit("|", 1)[1].strip() for line in found.stderr.splitlines() if "|" in line}
    ours = {name for name in loaded if re.match(r"(agent|sync|drivers|config|cloud|firmware)\b", name)}
    assert ours == {"agent", "agent.cli", "config", "config.commands"}
    heavy = {
        "asyncio",
        "msgspec",
        "sqlite3",
        "httpx",
        "paho",
        "apscheduler",
        "pymodbus",
        "importlib.metadata",
    }
    assert not heavy & loaded


def test_help_takes_no_more_than_a_third_of_a_second_of_a_core() -> None:
    """CPU time, not wall time: what a machine busy with other things adds is not ours to promise."""
    took = []
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([BIN / "headgate", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(took) <= 0.3, took


def test_the_version_is_the_distributions() -> None:
    from importlib.metadata import version

    assert said("--version") == (0, f"headgate {version('headgate')}\n")


def commands(group: click.Group, at: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    found: list[tuple[tuple[str, ...], click.Command]] = []
    for name, command in group.commands.items():
        found.append(((*at, name), command))
        if isinstance(command, click.Group):
            found += commands(command, (*at, name))
    return found


def test_every_command_and_option_has_help() -> None:
    for path, command in commands(main):
        assert command.help, path
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, (path, parameter.name)
        code, text = said(*path, "--help")
        assert code == 0
        assert "Usage" in text


# --- config check ---


def test_a_good_configuration_is_told_with_what_it_holds(file: Path) -> None:
    code, text = said("config", "check", file)
    assert code == 0
    assert "OK: gateway acme/plant-1, 1 devices (1 more disabled), 1 points, uplink none" in text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (('driver = "simulator"', 'driver = "simulatr"'), ["agent.toml:10: ", "device[0].driver", "mean 'simulator'"]),
        (('name = "t"', 'name = "t"\nunti = "V"'), ["device[0].point[0]", "'unti'", "did you mean 'unit'"]),
        (('name = "t"', 'name = "t"\nscale = 0.0'), ["boiler", "'t'", "scale is 0"]),
        (('name = "t"', 'name = "t"\nvalid_min = 5\nvalid_max = 1'), ["valid_min 5", "valid_max 1"]),
        (('[[device.point]]\nname = "t"\n', ""), ["device[0]", "no points"]),
        (('name = "spare"', 'name = "boiler"'), ["device[1].name", "'boiler' is the name of device[0] too"]),
        (('name = "spare"\ndriver = "simulator"', 'name = "spare"\ndriver = "x"'), ["device[1].driver", "'x'"]),
        (('kind = "none"', 'token_env = "T"\ntoken_file = "/x"'), ["uplink.token_env", "both set"]),
        (('kind = "none"', ""), ["uplink.token_file", "no credential"]),
        (('kind = "none"', 'host = "10.1.2.3"\ntls = false\ntoken_env = "T"'), ["uplink.tls", "tls = true"]),
        (('tenant = "acme"', "tenant ="), [":3", "not valid TOML"]),
    ],
)  # fmt: skip
def test_a_bad_configuration_is_refused_with_place_and_remedy(
    file: Path, change: tuple[str, str], told: list[str]
) -> None:
    text = file.read_text()
    assert change[0] in text
    file.write_text(text.replace(*change, 1))
    code, words = said("config", "check", file)
    assert code == 2
    for part in told:
        assert part in words, words
    assert "in the configuration" in words


def test_all_errors_are_told_at_once(file: Path) -> None:
    text = file.read_text().replace('name = "t"', 'name = "t"\nscale = 0.0').replace('kind = "none"', "")
    file.write_text(text)
    code, words = said("config", "check", file)
    assert code == 2
    assert "3 errors" in words


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    code, words = said("config", "check", tmp_path / "none.toml")
    assert code == 2
    assert "none.toml: cannot be read" in words


def test_a_credential_that_cannot_be_read_here_is_noted(file: Path, tmp_path: Path) -> None:
    file.write_text(file.read_text().replace('kind = "none"', f'token_file = "{tmp_path}/none"'))
    code, words = said("config", "check", file)
    assert code == 0
    assert "note: the credential" in words
    assert f"cannot read {tmp_path}/none" in words


# --- status ---


def test_no_status_is_neither_well_nor_ill(file: Path) -> None:
    code, words = said("status", "--config", file)
    assert code == 2
    assert "never ran" in words


def test_a_running_agent_without_trouble_is_well(file: Path, tmp_path: Path) -> None:
    write_status(tmp_path / "state")
    lock = StateLock.take(tmp_path / "state")
    try:
        code, words = said("status", "--config", file)
    finally:
        lock.release()
    assert code == 0
    assert "all well" in words
    assert f"running for 1 s, process {0}" in words


def test_trouble_is_told_in_words_with_the_remedy(file: Path, tmp_path: Path) -> None:
    write_status(tmp_path / "state", state=State.DOWN)
    lock = StateLock.take(tmp_path / "state")
    try:
        code, words = said("status", "--config", file)
        as_json = json.loads(said("status", "--config", file, "--json")[1])
    finally:
        lock.release()
    assert code == 1
    assert "boiler: no answer within 5 s, for 4 min: check the cable" in words
    assert as_json["running"] is True
    assert as_json["problems"][0]["remedy"] == "check the cable"
    assert as_json["status"]["devices"][0]["state"] == "down"


def test_a_stopped_agent_is_trouble(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    write_status(tmp_path / "state", run=RunState.STOPPED)
    code, words = said("status", "--state-dir", tmp_path / "state")
    assert code == 1
    assert "not running; it was stopped" in words


def test_a_lock_that_cannot_be_read_is_not_guessed_about(file: Path, tmp_path: Path) -> None:
    write_status(tmp_path / "state")
    (tmp_path / "state" / "agent.lock").symlink_to("agent.lock")  # a loop: it cannot be opened by anybody
    code, words = said("status", "--config", file)
    assert code == 2
    assert "cannot tell whether it runs" in words


def test_the_state_folder_of_a_broken_file_is_still_found(file: Path, tmp_path: Path) -> None:
    write_status(tmp_path / "state", run=RunState.STOPPED)
    file.write_text(file.read_text() + "\n[[[")
    assert said("status", "--config", file)[0] == 1


# --- drivers ---


def test_the_installed_drivers_are_listed() -> None:
    code, words = said("drivers")
    assert code == 0
    assert {line.split()[0] for line in words.splitlines()} >= {"modbus", "serial_line", "ble", "simulator"}


def test_no_command_takes_a_secret() -> None:
    for path, command in commands(main):
        for parameter in command.params:
            assert not re.search("token|password|secret", parameter.name or ""), path
    assert "HEADGATE_TOKEN" not in os.environ


def test_a_slow_protocol_has_the_time_it_needs_where_none_is_configured(tmp_path: Path) -> None:
    from agent.devices import build_device
    from config.agent import Device

    def deadline_s(driver: str, options: dict[str, object], point: dict[str, object], **more: int) -> float:
        table = Device(name="m", driver=driver, options=options, point=[point], **more)  # type: ignore[arg-type]
        return build_device(table).plan.deadline_s

    port: dict[str, object] = {"port": "/dev/ttyUSB0"}
    energy: dict[str, object] = {"name": "energy", "obis": "1.8.0"}
    assert deadline_s("iec62056", port, energy) == 60.0
    assert deadline_s("iec62056", port, energy, timeout_ms=7000) == 7.0
    assert deadline_s("simulator", {}, {"name": "t"}) == 5.0
