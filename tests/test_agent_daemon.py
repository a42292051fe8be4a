"""The agent as a process: it starts with what works, says how it is, and leaves in order."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import daemon as daemon_module
from agent import status as status_file
from agent.buffer import Buffer
from agent.clock import SystemClock
from agent.configuration import LAST_GOOD_NAME, load_for_run
from agent.daemon import EXIT_FAILED, EXIT_OK, Daemon
from agent.state import StateDirError, StateLock, is_locked, write_atomically
from agent.status import AgentStatus, LinkState, RunState
from config.agent import Buffer as BufferSettings
from sync.identity import GatewayName
from sync.wire import Ack, Sealed

BIN = Path(sys.executable).parent
POINTS = "".join(
    f'[[device.point]]\nname = "p{n}"\ntype = "u16"\nwave = "ramp"\nlow = 100\nhigh = 2000\n'
    for n in range(10)
)


def config_text(folder: Path, *, uplink: str = 'kind = "none"', devices: str = "") -> str:
    return (
        f'[gateway]\ntenant = "acme"\nname = "plant-1"\nstate_dir = "{folder}"\n'
        f"[buffer]\ncommit_interval_s = 0.1\nballast_kb = 16\n[uplink]\n{uplink}\n"
        f'[[device]]\nname = "boiler"\ndriver = "simulator"\nperiod_ms = 50\n{POINTS}{devices}'
    )


class Agent:
    """`headgate run` as a child, with its words in a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "agent.toml"
        self.state = folder / "state"
        self.log_file = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self.file.write_text(config_text(self.state))

    def start(self, env: dict[str, str] | None = None) -> None:
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [BIN / "headgate", "run", "--config", self.file],
                stdout=log,
                stderr=log,
                env={**os.environ, **(env or {})},
            )

    @property
    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    def until(self, holds: Callable[[], object], within_s: float = 30.0) -> None:
        end = time.monotonic() + within_s
        while not holds():
            assert time.monotonic() < end, f"did not happen in {within_s:g} s; its log:\n{self.log}"
            assert self.process is not None
            assert self.process.poll() is None, f"ended with {self.process.returncode}; its log:\n{self.log}"
            time.sleep(0.01)

    def until_reading(self) -> None:
        self.until(lambda: "running:" in self.log and "first scan" in self.log)

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(how)
        return self.process.wait(30)

    @property
    def status(self) -> AgentStatus:
        found = status_file.read(self.state)
        assert found is not None, self.log
        return found


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    made = Agent(tmp_path)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.kill()
        made.process.wait()


def run_once(file: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "headgate", "run", "--config", file], capture_output=True, text=True, timeout=60, check=False
    )


# --- start and end ---


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_told_to_leave_it_commits_and_leaves_in_order(agent: Agent, how: signal.Signals) -> None:
    agent.start()
    agent.until_reading()
    began = time.monotonic()
    assert agent.end(how) == EXIT_OK
    assert time.monotonic() - began < 5
    status = agent.status
    assert status.state is RunState.STOPPED
    assert status.buffer is not None
    device = status.devices[0]
    assert device.readings == 10 * device.scans > 0
    # Everything that was read is kept: nothing is pending, nothing was lost.
    assert status.buffer.kept_readings == device.readings
    assert status.buffer.pending_frames == 0
    told = (agent.state / "metrics.prom").read_text()
    assert f"headgate_readings_kept_total {device.readings}\n" in told
    assert "headgate_running 0\n" in told


async def test_what_the_status_says_is_kept_is_in_the_buffer(agent: Agent) -> None:
    agent.start()
    await asyncio.to_thread(agent.until_reading)
    await asyncio.to_thread(agent.end)
    buffer = await Buffer.open(
        agent.state / daemon_module.BUFFER_NAME,
        GatewayName("acme", "plant-1"),
        BufferSettings(ballast_kb=16),
        SystemClock(),
    )
    try:
        assert agent.status.buffer is not None
        assert buffer.state.kept_readings == agent.status.buffer.kept_readings > 0
    finally:
        await buffer.close()


def test_it_leaves_in_time_while_a_device_hangs(agent: Agent) -> None:
    # 192.0.2.0/24 is for documentation (RFC 5737): connecting there hangs or fails, and never succeeds.
    hanging = (
        '[[device]]\nname = "far"\ndriver = "modbus"\n[device.options]\nhost = "192.0.2.1"\n'
        "connect_timeout_ms = 60000\n"
        '[[device.point]]\nname = "x"\nregister = 0\n'
    )
    agent.file.write_text(config_text(agent.state, devices=hanging))
    agent.start()
    agent.until_reading()
    began = time.monotonic()
    assert agent.end() == EXIT_OK
    assert time.monotonic() - began < 5.5


def test_a_cold_start_without_a_network_reads_within_three_seconds(agent: Agent) -> None:
    took = []
    for _ in range(3):
        before = agent.log.count("first scan")
        began = time.monotonic()
        agent.start()
        agent.until(lambda before=before: agent.log.count("first scan") > before)  # type: ignore[misc]
        took.append(time.monotonic() - began)
        agent.end()
    assert min(took) <= 3.0, took


def test_killed_it_goes_on_counting_where_it_last_wrote(agent: Agent) -> None:
    agent.start()
    agent.until_reading()
    agent.end()
    before = agent.status
    agent.start()
    agent.until(lambda: agent.log.count("running:") == 2)
    agent.end(signal.SIGKILL)
    assert is_locked(agent.state) is False
    agent.start()
    agent.until(lambda: agent.log.count("running:") == 3)
    agent.end()
    after = agent.status
    assert after.starts == before.starts + 2
    assert after.devices[0].readings > before.devices[0].readings


def test_a_second_agent_never_shares_a_state_folder(agent: Agent) -> None:
    agent.start()
    agent.until_reading()
    second = run_once(agent.file)
    assert second.returncode == 2
    assert agent.process is not None
    assert f"another agent (process {agent.process.pid})" in second.stderr
    assert agent.process.poll() is None


def test_a_state_folder_that_cannot_be_made_is_named(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    agent.file.write_text(config_text(tmp_path / "file" / "state"))
    found = run_once(agent.file)
    assert found.returncode == 2
    assert "state_dir" in found.stderr
    assert "Traceback" not in found.stderr


def test_a_buffer_that_cannot_be_had_is_told_with_the_remedy(agent: Agent) -> None:
    (agent.state / daemon_module.BUFFER_NAME).mkdir(parents=True)
    found = run_once(agent.file)
    assert found.returncode == 2
    assert "buffer" in found.stderr
    assert "Traceback" not in found.stderr


# --- configuration ---


def test_a_bad_configuration_ends_it_with_every_error(agent: Agent) -> None:
    agent.file.write_text(
        config_text(agent.state)
        .replace('driver = "simulator"', 'driver = "simulatr"')
        .replace('kind = "none"', 'kind = "mqtt"\nhost = "cloud.example"\ntls = false')
    )
    found = run_once(agent.file)
    assert found.returncode == 2
    assert "did you mean 'simulator'" in found.stderr
    assert "plaintext is refused" in found.stderr
    assert "token_file" in found.stderr
    assert "3 errors" in found.stderr
    assert not agent.state.exists()


def test_a_bad_new_file_does_not_replace_the_last_good_one(agent: Agent) -> None:
    agent.start()
    agent.until_reading()
    agent.end()
    assert (agent.state / LAST_GOOD_NAME).read_text() == agent.file.read_text()
    agent.file.write_text(agent.file.read_text().replace('driver = "simulator"', "driver = "))
    agent.start()
    agent.until(lambda: agent.log.count("running:") == 2)
    assert agent.end() == EXIT_OK
    assert "is bad; the last good one is in force instead" in agent.log
    assert agent.status.config.last_known_good
    assert "agent.toml" in agent.status.config.errors[0]
    assert "is bad" in subprocess.run(
        [BIN / "headgate", "status", "--config", agent.file], capture_output=True, text=True, check=False
    ).stdout  # fmt: skip
    assert 'driver = "simulator"' in (agent.state / LAST_GOOD_NAME).read_text()


def test_a_missing_credential_does_not_stop_the_readings(agent: Agent, tmp_path: Path) -> None:
    token = tmp_path / "token"
    agent.file.write_text(
        config_text(agent.state, uplink=f'kind = "https"\nport = 9\ntls = false\ntoken_file = "{token}"')
    )
    agent.start()
    agent.until_reading()
    agent.until(lambda: "cannot read" in agent.log)
    agent.end()
    status = agent.status
    assert status.link.state is LinkState.DOWN
    assert str(token) in status.link.why
    assert status.buffer is not None
    assert status.buffer.kept_readings > 0


# --- the supervisor ---


def test_the_supervisor_hears_ready_watchdog_and_stopping(agent: Agent, tmp_path: Path) -> None:
    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(address))
        listener.settimeout(30)
        agent.start({"NOTIFY_SOCKET": str(address), "WATCHDOG_USEC": "200000"})
        heard = [listener.recv(100).decode() for _ in range(3)]
        agent.end()
        while "STOPPING=1" not in heard:
            heard.append(listener.recv(100).decode())
    assert heard[0] == "READY=1"
    assert heard[1:3] == ["WATCHDOG=1"] * 2


def test_below_systemd_each_line_says_its_priority(agent: Agent) -> None:
    agent.start({"JOURNAL_STREAM": "8:1"})
    agent.until_reading()
    agent.end()
    assert agent.log.splitlines()
    assert all(re.match(r"<[3-7]>|    ", line) for line in agent.log.splitlines())


# --- in this process: what a test cannot do from outside ---


class CollectingUplink:
    """A cloud that takes everything."""

    name = "collecting"

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []

    async def open(self) -> None: ...

    async def send(self, batch: Sealed) -> Ack:
        return Ack(batch.epoch, ((batch.first, batch.last),))

    async def report(self, state: bytes) -> None:
        self.states.append(json.loads(state))

    async def close(self) -> None: ...


class Unhurried(daemon_module.Leaver):
    """Ends no process: here it would be the tests' own."""

    def start(self) -> None: ...


def in_process(tmp_path: Path, **changes: str) -> Daemon:
    file = tmp_path / "agent.toml"
    file.write_text(config_text(tmp_path / "state", **changes))
    loaded = load_for_run(file, None)
    (tmp_path / "state").mkdir()
    return Daemon(loaded, tmp_path / "state", Unhurried(), random.Random(1))


async def leave_when(daemon: Daemon, holds: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)
    daemon.leave()


async def test_the_heartbeat_tells_the_cloud_how_each_device_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uplink = CollectingUplink()
    monkeypatch.setattr(daemon_module, "uplink_of", lambda settings, name, rng: uplink)
    token = tmp_path / "token"
    link = f'kind = "mqtt"\ntls = false\nheartbeat_s = 1\ntoken_file = "{token}"'
    daemon = in_process(tmp_path, uplink=link)
    async with asyncio.TaskGroup() as group:
        served = group.create_task(daemon.serve())
        group.create_task(leave_when(daemon, lambda: len(uplink.states) >= 2))
    assert served.result() == EXIT_OK
    told = uplink.states[-1]
    assert told["gateway"] == "acme/plant-1"
    assert told["state"] == "running"
    assert told["link"]["state"] == "up"
    assert told["devices"][0]["state"] == "ok"
    assert told["devices"][0]["p99_ms"] > 0
    assert told["buffer"]["settled_readings"] > 0


async def test_a_part_that_ends_by_itself_ends_the_agent_and_what_was_read_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    daemon = in_process(tmp_path)

    async def fail(self: Daemon, buffer: Buffer) -> None:
        async with asyncio.timeout(30):
            while not buffer.state.pending_readings:  # noqa: ASYNC110 - the buffer has no event for this
                await asyncio.sleep(0.001)
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(Daemon, "_beat", fail)
    assert await daemon.serve() == EXIT_FAILED
    told = status_file.read(tmp_path / "state")
    assert told is not None
    assert told.state is RunState.FAILED
    assert "ZeroDivisionError" in told.why
    assert told.buffer is not None
    assert told.buffer.kept_readings > 0
    assert "the agent ends" in caplog.text


# --- the state folder ---


def test_a_state_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    with pytest.raises(OSError, match="No such file"):
        write_atomically(tmp_path / "none" / "x", b"")


def test_a_reader_never_sees_a_part_of_a_state_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    contents = [bytes([n]) * 100_000 for n in range(3)]
    write_atomically(path, contents[0])
    script = (
        "import sys; from pathlib import Path; from agent.state import write_atomically\n"
        "for n in range(60): write_atomically(Path(sys.argv[1]), bytes([n % 3]) * 100_000)"
    )
    writer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            script,
            path,
        ]
    )
    seen = set()
    while writer.poll() is None:
        data = path.read_bytes()
        assert data in contents
        seen.add(data[0])
    assert writer.returncode == 0
    assert len(seen) > 1


def test_a_file_that_two_threads_replace_at_once_is_always_whole(tmp_path: Path) -> None:
    """The status: every few seconds by a job, and by a reload."""
    path = tmp_path / "x"
    contents = [bytes([n]) * 300_000 for n in range(3)]
    write_atomically(path, contents[0])
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        work = [pool.submit(write_atomically, path, contents[n % 3]) for n in range(150)]
        while not all(each.done() for each in work):
            assert path.read_bytes() in contents
        for each in work:
            each.result()
    assert [found.name for found in tmp_path.iterdir()] == ["x"]


def test_the_lock_ends_with_its_holder(tmp_path: Path) -> None:
    lock = StateLock.take(tmp_path / "new")
    assert is_locked(tmp_path / "new") is True
    with pytest.raises(StateDirError, match=re.escape(f"process {os.getpid()}")):
        StateLock.take(tmp_path / "new")
    lock.release()
    lock.release()
    assert is_locked(tmp_path / "new") is False
    assert is_locked(tmp_path / "absent") is False
    StateLock.take(tmp_path / "new").release()


def test_status_files_of_newer_versions_are_read_as_far_as_known(tmp_path: Path) -> None:
    (tmp_path / status_file.STATUS_NAME).write_text(
        '{"format": 2, "version": "9", "news": [1], "gateway": "a/b"}'
    )
    found = status_file.read(tmp_path)
    assert found is not None
    assert (found.version, found.gateway) == ("9", "a/b")
    (tmp_path / status_file.STATUS_NAME).write_text('{"format": ')
    assert status_file.read(tmp_path) is None
