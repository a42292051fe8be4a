"""`headgate scan modbus`: who answers, what it is, and how long it takes; on a modelled line, ptys and TCP."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import pytest

from agent import commands_scan
from agent.technician import Way
from drivers import modbus_line
from drivers.modbus_scan import COMMON, Heard, Setting, Sweep
from tests.fakes.modbus_peer import ScriptedTcp, Unit, tcp_peer
from tests.fakes.quick_loop import run_quickly
from tests.fakes.serial_line_model import ModelUnit, SerialLineModel
from tests.fakes.technician import Technician, heard
from tests.fakes.unknown_meter import OnPty, plain

DEVICE = "/dev/model"


@pytest.fixture
def technician(tmp_path: Path) -> Technician:
    return Technician(tmp_path)


def scanned(
    model: SerialLineModel, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    *, first: bool = False, full: bool = False, units: str | None = None,
) -> tuple[int, dict[str, object], float]:  # fmt: skip
    """Exit status, JSON, and the time it would have taken."""
    monkeypatch.setattr(modbus_line, "open_serial", model.open)
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "home"))
    wanted = commands_scan.Wanted(
        ports=(DEVICE,), tcp_port=502, turnaround_s=0.2, first=first, full=full, units=units
    )
    code, took_s = run_quickly(
        commands_scan.search_all(
            Way(folder / "agent.toml", folder), as_json=True,
            searches=[lambda search: commands_scan.search_modbus(search, wanted)],
        )
    )  # fmt: skip
    return code, json.loads(capsys.readouterr().out), took_s


# --- a modelled line: parity matters ---


@pytest.mark.parametrize("setting", COMMON, ids=str)
def test_the_last_low_unit_at_any_common_setting_is_found_within_a_minute(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unit = ModelUnit(holding=[1, 2], turnaround_s=0.1)
    model = SerialLineModel({32: unit}, baud=setting.baud, parity=setting.parity, device=DEVICE)
    code, told, took_s = scanned(model, tmp_path, monkeypatch, capsys, first=True)
    assert code == 0
    assert took_s <= 60
    found = told["found"]
    assert isinstance(found, list)
    assert [one["unit"] for one in found] == [32]
    options = found[0]["options"]
    assert (options["baud"], options["parity"][0].upper()) == (setting.baud, setting.parity)


def test_a_full_sweep_takes_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = SerialLineModel({}, device=DEVICE)
    code, told, took_s = scanned(model, tmp_path, monkeypatch, capsys)
    assert code == 1
    assert told["asked"] == 6 * 247
    assert took_s == pytest.approx(told["estimate_s"], rel=0.1)


def test_a_full_sweep_takes_what_it_said_although_devices_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    units = {unit: ModelUnit(holding=[7] * 10, turnaround_s=0.03) for unit in (3, 17, 200)}
    model = SerialLineModel(units, baud=9600, parity="N", device=DEVICE)
    code, told, took_s = scanned(model, tmp_path, monkeypatch, capsys, full=True)
    assert code == 0
    assert took_s == pytest.approx(told["estimate_s"], rel=0.1)


def test_after_a_find_the_rest_takes_what_is_said_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = SerialLineModel({1: ModelUnit(holding=[7] * 10)}, baud=9600, parity="N", device=DEVICE)
    sweep = Sweep(COMMON, range(1, 248), turnaround_s=0.2)
    first = sweep.next()
    assert first is not None
    sweep.told(first, Heard.ANSWER)
    assert sweep.left == 246
    _, _, took_s = scanned(model, tmp_path, monkeypatch, capsys)
    assert took_s == pytest.approx(sweep.left_s(), rel=0.1)


def test_all_units_of_a_line_are_found_at_its_setting_and_say_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    meter = ModelUnit(holding=[7] * 10, identity={0: "ACME", 1: "M-200", 2: "1.4"})
    model = SerialLineModel(
        {3: meter, 17: ModelUnit(), 200: ModelUnit(holding=[1])}, baud=19200, parity="E", device=DEVICE
    )
    _, told, _ = scanned(model, tmp_path, monkeypatch, capsys)
    found = told["found"]
    assert isinstance(found, list)
    assert [one["unit"] for one in found] == [3, 17, 200], "a unit that refuses every register is a find too"
    assert found[0]["what"] == "ACME M-200"
    assert found[0]["identification"] == {"vendor": "ACME", "product": "M-200", "revision": "1.4"}
    assert len(set(model.opened)) == 2, "after a find only its setting is asked"


def test_a_missing_port_is_trouble_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = SerialLineModel({}, device="/dev/other")
    monkeypatch.setattr(modbus_line, "open_serial", model.open)
    wanted = commands_scan.Wanted(ports=(DEVICE,), tcp_port=502, turnaround_s=0.2)
    with pytest.raises(Exception, match="no such port"):
        run_quickly(
            commands_scan.search_all(
                Way(tmp_path / "agent.toml", tmp_path), as_json=True,
                searches=[lambda search: commands_scan.search_modbus(search, wanted)],
            )
        )  # fmt: skip


# --- the command, on a pty and on TCP ---


async def test_a_pty_is_scanned_although_it_has_no_parity_and_the_next_command_is_told(
    technician: Technician,
) -> None:
    port = OnPty({5: plain({0: 1, 1: 2})}, technician.folder / "port")
    ran = await technician.types("scan", "modbus", "--port", str(port.link), "--units", "1-8", "--fast")
    port.close()
    assert ran.code == 0, ran
    assert "unit 5" in ran.out
    assert "headgate probe --found 1" in ran.out
    assert "at most" in ran.err, "the estimate comes first"


async def test_ctrl_c_shows_what_was_found_so_far(technician: Technician) -> None:
    port = OnPty({2: plain({0: 1})}, technician.folder / "port")
    process = await technician.starts(
        "scan", "modbus", "--port", str(port.link), "--slow", "--config", str(technician.config)
    )
    await heard(process, "unit 2 answers")
    ran = await technician.interrupts(process)
    port.close()
    assert ran.code == 130, ran
    assert "stopped" in ran.out
    assert "unit 2" in ran.out


async def test_nothing_there_is_exit_1_and_says_so(technician: Technician) -> None:
    port = OnPty({99: plain({})}, technician.folder / "port")
    ran = await technician.types("scan", "modbus", "--port", str(port.link), "--units", "1-3", "--fast")
    port.close()
    assert ran.code == 1
    assert "nothing found" in ran.out


async def test_a_tcp_device_is_found_with_what_it_is(technician: Technician) -> None:
    async with tcp_peer({1: Unit(holding=[1, 2])}) as peer:
        ran = await technician.types("scan", "modbus", "--host", f"127.0.0.1:{peer.port}", "--json")
    assert ran.code == 0, ran
    (found,) = ran.json["found"]
    assert found["options"] == {"host": "127.0.0.1", "port": peer.port, "unit": 1}


async def test_units_behind_a_gateway_are_each_found(technician: Technician) -> None:
    """It answers 0x0B for whoever is not there: a gateway, whose line is swept."""
    server = await asyncio.start_server(_gateway({3, 8}), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    ran = await technician.types("scan", "modbus", "--host", f"127.0.0.1:{port}", "--json")
    server.close()
    assert ran.code == 0, ran
    assert [one["unit"] for one in ran.json["found"]] == [3, 8]


def _gateway(present: set[int]):  # type: ignore[no-untyped-def]
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readexactly(7)
                pdu = await reader.readexactly(int.from_bytes(head[4:6]) - 1)
                code = 2 if head[6] in present else 0x0B
                writer.write(head[:4] + b"\0\3" + head[6:] + bytes([pdu[0] | 0x80, code]))
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            writer.close()

    return serve


async def test_a_device_that_answers_to_every_unit_is_one_device(technician: Technician) -> None:
    server = await asyncio.start_server(_gateway(set(range(256))), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    ran = await technician.types("scan", "modbus", "--host", f"127.0.0.1:{port}", "--units", "1-20", "--json")
    server.close()
    assert len(ran.json["found"]) == 1, ran
    assert any("every unit" in note for note in ran.json["notes"])


async def test_a_network_of_silent_and_refusing_hosts_is_searched_in_seconds(technician: Technician) -> None:
    """30 loopback addresses: one answers, nine take the connection and are silent, the rest refuse."""
    async with ScriptedTcp() as device:
        silent = []
        for last in range(2, 11):
            listener = socket.socket()
            listener.bind((f"127.0.0.{last}", device.port))
            listener.listen(8)
            silent.append(listener)
        ran = await technician.types(
            "scan", "modbus", "--network", "127.0.0.0/27", "--tcp-port", str(device.port), "--json"
        )
        for listener in silent:
            listener.close()
    assert ran.code == 0, ran
    assert [one["options"]["host"] for one in ran.json["found"]] == ["127.0.0.1"]
    assert ran.json["took_s"] < 15


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--network", "192.0.2.0/33"), "192.0.2.0/24"),
        (("--network", "10.0.0.0/8"), "4096"),
        (("--port", "/dev/x", "--units", "0-300"), "1 to 247"),
        (("--host", "host:name:"), "host"),
    ],
)
async def test_what_cannot_be_meant_is_refused_with_exit_2(
    technician: Technician, words: tuple[str, ...], told: str
) -> None:
    ran = await technician.types("scan", "modbus", *words)
    assert ran.code == 2, ran
    assert told in ran.err


async def test_every_scan_has_help_with_its_exit_codes(technician: Technician) -> None:
    for words in (("modbus",), ("serial",), ("ble",), ("all",)):
        ran = await technician.types("scan", *words, "--config", "x", "--help")
        assert ran.code == 0
        assert "130" in ran.out


# --- beside a running agent ---


async def test_a_line_that_the_agent_holds_is_scanned_through_it_at_its_own_setting(tmp_path: Path) -> None:
    port = OnPty({4: plain(dict.fromkeys(range(8), 11)), 6: plain({0: 5})}, tmp_path / "port")
    technician = Technician(
        tmp_path,
        devices=f"""
[[device]]
name = "meter"
driver = "modbus"
[device.options]
serial = "{port.link}"
baud = 9600
parity = "none"
unit = 4
[[device.point]]
name = "x"
register = 0
""",
    )
    agent = await technician.starts("run", "--config", str(technician.config))
    try:
        await heard(agent, "first scan")
        ran = await technician.types("scan", "modbus", "--port", str(port.link), "--units", "1-8", "--json")
    finally:
        agent.terminate()
        await agent.communicate()
        port.close()
    assert ran.code == 0, ran
    assert [one["unit"] for one in ran.json["found"]] == [4, 6]
    assert any("in use by meter" in note for note in ran.json["notes"])


# --- what `headgate simulate` serves ---


@pytest.mark.parametrize(
    ("profile", "framing", "unit"),
    [
        ("eastron-sdm120", "tcp", 1), ("fronius-symo", "tcp", 1), ("siemens-pac3200", "tcp", 1),
        ("eastron-sdm120", "udp", 1), ("eastron-sdm120", "rtu_over_tcp", 1), ("eastron-sdm120", "ascii_over_tcp", 1),
        ("eastron-sdm120", "rtu", 3), ("fronius-symo", "rtu", 3), ("siemens-pac3200", "rtu", 3),
        ("eastron-sdm120", "ascii", 3),
    ],
)  # fmt: skip
async def test_a_simulated_device_is_found_alone_and_added_by_its_profile(
    profile: str, framing: str, unit: int, technician: Technician
) -> None:
    link = technician.folder / "port"
    where = ("--serial", str(link), "--unit", str(unit)) if framing in ("rtu", "ascii") else ("--port", "0")
    simulation = await technician.starts("simulate", profile, *where, "--framing", framing, "--json")
    try:
        assert simulation.stdout is not None
        told = json.loads(await asyncio.wait_for(simulation.stdout.readline(), 60))
        words = (
            ["--port", str(link), "--fast"]
            if where[0] == "--serial"
            else ["--host", "{host}:{port}".format(**told["serving"][0]["options"])]
        )
        if framing == "ascii":
            words += ["--framing", "ascii", "--parity", "none"]  # a pty has no parity
        ran = await technician.types("scan", "modbus", *words, "--json")
        added = await technician.types("add", "it", "--found", "1", "--json")
    finally:
        simulation.terminate()
        await simulation.communicate()
    assert ran.code == 0, ran
    assert [(one["unit"], one["profile"]) for one in ran.json["found"]] == [(unit, profile)], ran
    assert added.code == 0, added
    assert f'profile = "{profile}"' in technician.config.read_text()
    good = [one for one in added.json["reading"]["readings"] if one["quality"] == "good"]
    assert len(good) == len(added.json["reading"]["readings"])
