"""What the doctor makes of a gateway: each fault is found, named, and has its remedy."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import trustme
from click.testing import CliRunner
from msgspec.structs import replace

from agent import status as status_file
from agent.cli import main
from agent.clock import ClockReading
from agent.doctor import (
    EARLIEST_NS,
    BluetoothFacts,
    Certificate,
    DiskFacts,
    Finding,
    Level,
    PortFacts,
    User,
    exit_code,
    judge_bluetooth,
    judge_certificate,
    judge_clock,
    judge_disk,
    judge_packages,
    judge_port,
    judge_skew,
    judge_thieves,
    may,
)
from agent.doctor_look import disk_facts, examine, port_facts
from agent.health import DeviceHealth, State
from agent.state import StateLock
from agent.status import AgentStatus, LinkHealth, LinkState, RunState
from sync.identity import GatewayName, Secret
from tests.fakes.cloud_door import FarSide, HttpServer

TOKEN = "a-token-long-enough-to-be-taken"
MB = 1024 * 1024
NOW_NS = EARLIEST_NS + 200 * 86_400 * 10**9
PLAIN = User("headgate", 990, frozenset({990, 20}))
STRANGER = User("headgate", 990, frozenset({990}))


def clock(wall_ns: int = NOW_NS, *, synchronized: bool = True) -> ClockReading:
    return ClockReading(10**12, wall_ns, synchronized, 2_000_000)


def only(found: list[Finding]) -> Finding:
    assert len(found) == 1, found
    return found[0]


# --- judging ---


@pytest.mark.parametrize(
    ("reading", "last_ns", "ntp", "level", "words"),
    [
        (clock(), 0, "chronyd", Level.OK, "synchronized within 2 ms"),
        (clock(0), 0, "", Level.ERROR, "1970-01-01"),
        (clock(), NOW_NS + 3_600 * 10**9, "", Level.ERROR, "before the agent's last word"),
        (clock(synchronized=False), 0, "", Level.WARNING, "no time service runs"),
        (clock(synchronized=False), 0, "chronyd", Level.WARNING, "chronyd runs, and has not"),
    ],
)
def test_a_clock_is_judged(reading: ClockReading, last_ns: int, ntp: str, level: Level, words: str) -> None:
    finding = only(judge_clock(reading, last_ns, ntp))
    assert finding.level is level
    assert words in finding.text
    assert bool(finding.remedy) == (level is not Level.OK)


@pytest.mark.parametrize(
    ("skew_s", "level"),
    [(0.9, Level.OK), (-4, Level.OK), (6, Level.WARNING), (-301, Level.ERROR)],
)
def test_the_clouds_clock_is_compared(skew_s: float, level: Level) -> None:
    assert judge_skew(skew_s).level is level


def disk(free_mb: int = 4096, mode: int = 0o750, uid: int = 990, *, read_only: bool = False) -> DiskFacts:
    return DiskFacts("/var/lib/headgate", True, True, read_only, free_mb * MB, mode, uid, uid)


@pytest.mark.parametrize(
    ("facts", "levels", "words"),
    [
        (disk(), [Level.OK], "4,096 MB free"),
        (disk(20), [Level.ERROR], "readings are dropped"),
        (disk(300), [Level.WARNING], "set buffer.max_mb = 236"),
        (disk(read_only=True), [Level.ERROR], "mount -o remount,rw"),
        (disk(uid=0), [Level.ERROR, Level.OK], "chown -R headgate"),
        (DiskFacts("/x/y", exists=False), [Level.WARNING], "install -d -o headgate"),
        (DiskFacts("/x/y", exists=False, parent_exists=False), [Level.ERROR], "install -d -o headgate"),
    ],
)
def test_a_disk_is_judged(facts: DiskFacts, levels: list[Level], words: str) -> None:
    found = judge_disk(facts, PLAIN, max_mb=1024, free_mb=64, held_bytes=0)
    assert [f.level for f in found] == levels
    assert words in " ".join(f"{f.text} {f.remedy}" for f in found)


PORT = PortFacts("/dev/ttyUSB0", ("meter",), mode=0o020660, gid=20, group="dialout")


def test_a_port_that_may_be_opened_is_fine() -> None:
    assert only(judge_port(PORT, PLAIN)).level is Level.OK


def test_a_port_of_a_group_that_the_user_is_not_in_names_the_group_to_join() -> None:
    finding = only(judge_port(PORT, STRANGER))
    assert finding.level is Level.ERROR
    assert "usermod -aG dialout headgate" in finding.remedy


def test_a_port_that_only_root_may_open_needs_a_rule_and_no_group() -> None:
    finding = only(judge_port(replace(PORT, mode=0o020600, gid=0, group="root"), STRANGER))
    assert "udev rule" in finding.remedy
    assert "usermod" not in finding.remedy


def test_a_port_that_nobody_wants_is_a_warning_only() -> None:
    assert only(judge_port(replace(PORT, wanted_by=()), STRANGER)).level is Level.WARNING


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"exists": False}, "is not there"),
        ({"is_tty": False}, "no serial port"),
        ({"is_console": True}, "console"),
        ({"stable_name": "/dev/serial/by-id/usb-X"}, "use /dev/serial/by-id/usb-X"),
    ],
)
def test_what_is_wrong_with_a_port_is_said(changed: dict[str, object], words: str) -> None:
    finding = only(judge_port(replace(PORT, **changed), PLAIN))
    assert finding.level is not Level.OK
    assert words in f"{finding.text} {finding.remedy}"


def test_permissions_are_those_of_owner_group_and_others() -> None:
    assert may(User("root", 0, frozenset()), 0o000, 5, 5, 0o6)
    assert may(PLAIN, 0o600, 990, 0, 0o6)
    assert not may(PLAIN, 0o066, 990, 0, 0o6)  # the owner's bits alone count for the owner
    assert may(PLAIN, 0o060, 0, 20, 0o6)
    assert not may(PLAIN, 0o606, 0, 20, 0o6)
    assert may(STRANGER, 0o006, 0, 20, 0o6)


def test_programs_that_take_ports_are_named_where_there_are_usb_ports() -> None:
    assert only(judge_thieves({"ModemManager", "bash"}, usb_ports=True)).remedy.startswith(
        "systemctl disable"
    )
    assert judge_thieves({"ModemManager"}, usb_ports=False) == []


@pytest.mark.parametrize(
    ("facts", "level", "words"),
    [
        (BluetoothFacts(("hci0",), bluez=True, powered=("hci0",)), Level.OK, "hci0 is on"),
        (BluetoothFacts(("hci0",), ("soft",), wanted_by=("t",)), Level.ERROR, "rfkill unblock"),
        (BluetoothFacts(("hci0",), ("hard",)), Level.WARNING, "switch"),
        (BluetoothFacts(("hci0",), bus_error="no", wanted_by=("t",)), Level.ERROR, "group bluetooth"),
        (BluetoothFacts(("hci0",), wanted_by=("t",)), Level.ERROR, "apt install bluez"),
        (BluetoothFacts(("hci0",), bluez=True, wanted_by=("t",)), Level.ERROR, "power on"),
        (BluetoothFacts((), bluez=True, wanted_by=("t",)), Level.ERROR, "no adapter"),
    ],
)
def test_bluetooth_is_judged(facts: BluetoothFacts, level: Level, words: str) -> None:
    finding = only(judge_bluetooth(facts))
    assert finding.level is level
    assert words in f"{finding.text} {finding.remedy}"


def test_nothing_is_said_of_bluetooth_where_there_is_none_and_nobody_wants_it() -> None:
    assert judge_bluetooth(BluetoothFacts()) == []


def test_a_package_that_took_one_of_our_names_is_named_with_the_way_out() -> None:
    clash = judge_packages({"config": ["headgate", "config"], "agent": ["headgate"]})
    assert clash.level is Level.ERROR
    assert "config installs a package 'config'" in clash.text
    assert "pip uninstall config" in clash.remedy
    assert judge_packages({"config": ["headgate"]}).level is Level.OK


def test_a_certificate_that_ends_soon_is_a_warning() -> None:
    assert judge_certificate(Certificate("c", "ca", 1e9 + 90 * 86_400), 1e9).level is Level.OK
    assert judge_certificate(Certificate("c", "ca", 1e9 + 5 * 86_400), 1e9).level is Level.WARNING


def test_only_an_error_makes_the_exit_status_1() -> None:
    assert exit_code([Finding("x", Level.OK, ""), Finding("x", Level.WARNING, "")]) == 0
    assert exit_code([Finding("x", Level.ERROR, "")]) == 1


# --- looking ---


CONFIG = """
[gateway]
tenant = "acme"
name = "plant-1"
state_dir = "{state}"
[uplink]
kind = "https"
host = "{host}"
port = {port}
tls = {tls}
connect_timeout_s = 3.0
token_file = "{token}"
{more}
[[device]]
name = "boiler"
driver = "simulator"
[[device.point]]
name = "t"
"""


def config_file(
    folder: Path, port: int, *, host: str = "localhost", tls: bool = False, more: str = "", token: str = TOKEN
) -> Path:
    (folder / "state").mkdir(exist_ok=True)
    held = folder / "token"
    held.write_text(token)
    held.chmod(0o600)
    file = folder / "agent.toml"
    file.write_text(
        CONFIG.format(
            state=folder / "state", host=host, port=port, tls=str(tls).lower(), token=held, more=more
        )
    )
    return file


async def found_in(file: Path) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for finding in await asyncio.to_thread(lambda: list(examine(file, None))):
        found.setdefault(finding.check, []).append(finding)
    return found


@pytest.fixture
async def door(free_port: Callable[[], int]) -> AsyncIterator[HttpServer]:
    server = HttpServer(FarSide(), GatewayName("acme", "plant-1"), Secret(TOKEN), free_port())
    await server.start()
    yield server
    await server.stop()


async def test_the_way_to_a_door_that_takes_us_in_is_ok_step_by_step(
    door: HttpServer, tmp_path: Path
) -> None:
    found = await found_in(config_file(tmp_path, door.port))
    for step in ("dns", "tcp", "credential", "config", "packages"):
        assert only(found[step]).level is Level.OK, found[step]
    assert found["door"][-1].level is Level.OK
    assert "takes acme/plant-1 in" in found["door"][-1].text


async def test_the_second_way_is_looked_at_too_and_its_faults_are_warnings(
    door: HttpServer, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    second = f"""[uplink.fallback]
kind = "https"
tls = false
port = {{port}}
token_file = "{tmp_path / "token"}"
"""
    sound = await found_in(config_file(tmp_path, door.port, more=second.format(port=door.port)))
    assert [finding.level for finding in sound["door"]] == [Level.OK, Level.OK], sound
    assert sound["door"][-1].text == "fallback: takes acme/plant-1 in"
    broken = await found_in(config_file(tmp_path, door.port, more=second.format(port=free_port())))
    assert [finding.level for finding in broken["tcp"]] == [Level.OK, Level.WARNING]
    assert broken["tcp"][1].text.startswith("fallback: localhost:")
    assert "uplink.fallback.port" in broken["tcp"][1].remedy


async def test_a_wrong_token_is_an_error_of_the_door(door: HttpServer, tmp_path: Path) -> None:
    found = await found_in(config_file(tmp_path, door.port, token="another-token-that-is-long"))
    assert only(found["tcp"]).level is Level.OK
    assert found["door"][-1].level is Level.ERROR
    assert "refuses the credential" in found["door"][-1].text


async def test_a_name_that_nobody_knows_is_an_error_of_dns(tmp_path: Path) -> None:
    found = await found_in(config_file(tmp_path, 1, host="no-such-host.invalid", tls=True))
    assert only(found["dns"]).level is Level.ERROR
    assert "tcp" not in found


async def test_a_closed_port_is_an_error_of_tcp(tmp_path: Path, free_port: Callable[[], int]) -> None:
    found = await found_in(config_file(tmp_path, free_port()))
    assert only(found["tcp"]).level is Level.ERROR
    assert "refused" in found["tcp"][0].text


def authority_files(
    folder: Path, authority: trustme.CA, host: str, not_after: datetime.datetime | None
) -> tuple[str, str]:
    issued = authority.issue_cert(host, not_after=not_after)
    cert, key = folder / "door.pem", folder / "door.key"
    cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(key)
    return str(cert), str(key)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("none", "valid for another"),
        ("another CA", "uplink.ca_file must hold the CA"),
        ("another name", "must be the name that stands in the certificate"),
        ("expired", "check this clock first"),
        ("no such file", "uplink.ca_file"),
    ],
)
async def test_what_is_wrong_with_tls_is_said_with_its_remedy(
    fault: str, words: str, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    authority = trustme.CA()
    ends = datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC) if fault == "expired" else None
    pair = authority_files(
        tmp_path, authority, "elsewhere.example" if fault == "another name" else "localhost", ends
    )
    ca = tmp_path / "ca.pem"
    (trustme.CA() if fault == "another CA" else authority).cert_pem.write_to_path(ca)
    trusted = tmp_path / "nowhere.pem" if fault == "no such file" else ca
    server = HttpServer(FarSide(), GatewayName("acme", "plant-1"), Secret(TOKEN), free_port(), tls=pair)
    await server.start()
    try:
        found = await found_in(config_file(tmp_path, server.port, tls=True, more=f'ca_file = "{trusted}"'))
    finally:
        await server.stop()
    finding = only(found["tls"])
    assert (finding.level is Level.ERROR) == (fault != "none"), finding
    assert words in f"{finding.text} {finding.remedy}"
    assert ("door" in found) == (fault == "none")


async def test_a_server_that_does_not_speak_tls_is_said(door: HttpServer, tmp_path: Path) -> None:
    found = await found_in(config_file(tmp_path, door.port, tls=True))
    assert only(found["tls"]).level is Level.ERROR
    assert "speaks TLS" in found["tls"][0].remedy


async def test_a_bad_configuration_is_told_with_its_place(tmp_path: Path) -> None:
    file = config_file(tmp_path, 1, more="windw = 3")
    found = await found_in(file)
    assert found["config"][0].level is Level.ERROR
    assert f"{file}:" in found["config"][0].text
    assert "window" in found["config"][0].text


def test_a_port_that_is_not_there_is_told_and_a_pty_is_one(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    try:
        name = os.ttyname(theirs)
        facts = {each.name: each for each in port_facts({name: ["meter"], "/dev/ttyUSB77": ["scale"]})}
        assert facts[name].exists
        assert facts[name].is_tty
        assert facts[name].wanted_by == ("meter",)
        assert not facts["/dev/ttyUSB77"].exists
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_folder_that_is_not_there_is_a_fact(tmp_path: Path) -> None:
    assert not disk_facts(tmp_path / "no").exists
    assert disk_facts(tmp_path / "no").parent_exists
    assert disk_facts(tmp_path).free_bytes > 0


def test_a_running_agent_that_is_logged_in_is_believed_and_not_thrown_out(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """A second MQTT login under the same name would end the first."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        file = config_file(tmp_path, listener.getsockname()[1], host="127.0.0.1")
        file.write_text(file.read_text().replace('kind = "https"', 'kind = "mqtt"'))
        told = AgentStatus(
            gateway="acme/plant-1", state=RunState.RUNNING, pid=os.getpid(), written_ns=time.time_ns()
        )
        told.link = LinkHealth(state=LinkState.UP, acked_batches=1234)
        status_file.write(tmp_path / "state", told)
        lock = StateLock.take(tmp_path / "state")
        try:
            found = {f.check: f for f in examine(file, None)}
            assert "1,234 batches" in found["door"].text
            told.link = LinkHealth(state=LinkState.DOWN, why="login: not authorized", since_ns=time.time_ns())
            status_file.write(tmp_path / "state", told)
            found = {f.check: f for f in examine(file, None)}
            assert "not authorized" in found["door"].text
            assert "stop it" in found["door"].remedy
            more = '[uplink.fallback]\nkind = "mqtt"\nhost = "127.0.0.1"\ntls = false\n'
            more += f"port = {listener.getsockname()[1]}\n"
            file.write_text(
                file.read_text().replace(
                    "[[device]]", more + f'token_file = "{tmp_path / "token"}"\n[[device]]', 1
                )
            )
            told.link = LinkHealth(state=LinkState.UP, acked_batches=5, detour="login: not authorized")
            status_file.write(tmp_path / "state", told)
            doors = [f.text for f in examine(file, None) if f.check == "door"]
            assert "is not asked" in doors[0]
            assert doors[1].startswith("fallback: the agent is logged in; 5 batches")
        finally:
            lock.release()


def test_a_device_that_is_down_is_an_error_of_the_agent(tmp_path: Path) -> None:
    file = config_file(tmp_path, 1)
    told = AgentStatus(
        gateway="acme/plant-1", state=RunState.RUNNING, pid=os.getpid(), written_ns=time.time_ns()
    )
    told.devices = [
        DeviceHealth(
            name="boiler",
            driver="simulator",
            state=State.DOWN,
            why="does not answer",
            since_ns=time.time_ns(),
        )
    ]
    status_file.write(tmp_path / "state", told)
    lock = StateLock.take(tmp_path / "state")
    try:
        words = [f.text for f in examine(file, None, with_cloud=False) if f.check == "agent"]
    finally:
        lock.release()
    assert any("boiler: does not answer" in text for text in words)


# --- the command ---


def test_the_command_fits_80_columns_and_ends_with_1_on_an_error(tmp_path: Path) -> None:
    file = config_file(tmp_path, 1, more="windw = 3")
    done = CliRunner().invoke(main, ["doctor", "--config", str(file), "--offline"], color=False)
    assert done.exit_code == 1
    assert "ERROR config" in done.output
    long = [line for line in done.output.splitlines() if len(line) > 80 and str(tmp_path) not in line]
    assert long == []
    assert "\x1b" not in done.output


def test_the_command_speaks_json(tmp_path: Path) -> None:
    file = config_file(tmp_path, 1)
    done = CliRunner().invoke(main, ["doctor", "--config", str(file), "--offline", "--json"])
    told = json.loads(done.output)
    assert told["errors"] == sum(f["level"] == "error" for f in told["findings"])
    assert {"packages", "drivers", "config", "clock", "disk", "cloud"} <= {
        f["check"] for f in told["findings"]
    }
    assert done.exit_code == (1 if told["errors"] else 0)


def test_a_port_is_looked_at_by_whatever_name_a_device_gives_it(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    try:
        (tmp_path / "meter").symlink_to(os.ttyname(theirs))
        file = config_file(tmp_path, 1)
        file.write_text(
            file.read_text()
            + f'[[device]]\nname = "meter"\ndriver = "modbus"\n[device.options]\nserial = "{tmp_path / "meter"}"\n'
            '[[device.point]]\nname = "u"\nregister = 0\n'
        )
        words = [f.text for f in examine(file, None, with_cloud=False) if f.check == "port"]
    finally:
        os.close(ours)
        os.close(theirs)
    assert any("(for meter)" in text for text in words), words


# --- who may not look, and doors that never come to an end ---


@pytest.fixture
def hidden(tmp_path: Path) -> Iterator[Path]:
    """A folder that the commands of `as_a_stranger` may not search."""
    folder = tmp_path / "hidden"
    (folder / "within").mkdir(parents=True)
    if os.geteuid() == 0:
        os.chown(folder, 65_534, 65_534)
        folder.chmod(0o700)
    else:
        folder.chmod(0)
    yield folder
    folder.chmod(0o700)


def as_a_stranger(*words: str) -> subprocess.CompletedProcess[str]:
    """Root without the capabilities by which root reads everything; any other user is one already."""
    lowered = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    return subprocess.run(
        [*lowered, sys.executable, "-c", "from agent.cli import main; main()", *words],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip


def test_what_this_user_may_not_look_at_is_said_and_no_traceback(tmp_path: Path, hidden: Path) -> None:
    file = config_file(tmp_path, 1)
    file.write_text(
        file.read_text().replace(str(tmp_path / "state"), str(hidden / "within" / "state"))
        + f'[[device]]\nname = "meter"\ndriver = "modbus"\n[device.options]\nserial = "{hidden / "ttyUSB0"}"\n'
        '[[device.point]]\nname = "u"\nregister = 0\n'
    )
    done = as_a_stranger("doctor", "--offline", "--json", "--config", str(file))
    assert done.stderr == ""
    found = {(f["check"], f["level"]): f for f in json.loads(done.stdout)["findings"]}
    for check in ("agent", "disk", "port"):
        assert "cannot be" in found[check, "warning"]["text"]
        assert found[check, "warning"]["remedy"] == "run the doctor as root"
    done = as_a_stranger("doctor", "--offline", "--json", "--config", str(hidden / "agent.toml"))
    assert done.stderr == ""
    config = next(f for f in json.loads(done.stdout)["findings"] if f["check"] == "config")
    assert config["remedy"] == "run the doctor as root"


@contextlib.asynccontextmanager
async def dripping(*said: bytes) -> AsyncIterator[int]:
    """A door that says this, and then goes on for ever, a byte at a time."""

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):  # the test is over
            for part in said:
                writer.write(part)
            while True:
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.2)

    server = await asyncio.start_server(drip, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize(
    "said", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n", b"\x16\x03\x03\x40\x00"]
)
async def test_a_door_that_never_ends_its_answer_is_left_in_time(
    said: bytes, tmp_path: Path, *, tls: bool
) -> None:
    async with dripping(said) as port:
        file = config_file(tmp_path, port, host="127.0.0.1", tls=tls)
        file.write_text(file.read_text().replace("connect_timeout_s = 3.0", "connect_timeout_s = 1.0"))
        began_s = time.monotonic()
        async with asyncio.timeout(30):
            found = await found_in(file)
        assert time.monotonic() - began_s < 20
        last = found["tls" if tls else "door"][-1]
        assert last.level is Level.ERROR
        assert "no answer" in last.text or tls or not said.startswith(b"HTTP")


async def test_a_host_by_its_ipv6_address_is_looked_at_like_any_other(tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nDate: today\r\nContent-Length: 0\r\n\r\n")

    asked: list[bytes] = []
    server = await asyncio.start_server(answer, "::1", 0)
    try:
        file = config_file(tmp_path, server.sockets[0].getsockname()[1], host="::1")
        found = await found_in(file)
    finally:
        server.close()
    assert only(found["tcp"]).level is Level.OK
    assert b"\r\nHost: [::1]" in asked[0]
    assert "does not say what time" in found["clock"][-1].text
