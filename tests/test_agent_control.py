"""The running agent's door for technicians: the same promises as without an agent, through a real agent's socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import cast

import msgspec
import pytest

from agent import control
from agent.control import (
    SOCKET_NAME,
    AgentField,
    Call,
    ControlRefused,
    Fault,
    Hello,
    Result,
    fault_of,
)
from agent.field import FieldError, LineTaken, Look, UnknownDevice
from agent.field_direct import DirectField
from agent.field_open import open_field
from agent.status import AgentStatus
from config.agent import Device
from drivers.contract import ConfigError, DeviceUnreachable, PointRefused, Reason
from drivers.modbus_address import HostPort
from tests import field_conformance
from tests.fakes.modbus_peer import Unit, tcp_peer

BIN = Path(sys.executable).parent


def config_text(folder: Path, devices: str) -> str:
    return (
        f'[gateway]\ntenant = "acme"\nname = "plant-1"\nstate_dir = "{folder}"\n'
        f'[buffer]\ncommit_interval_s = 0.1\nballast_kb = 16\n[uplink]\nkind = "none"\n{devices}'
    )


class Agent:
    """`headgate run` as a child, with its words in a file."""

    def __init__(self, folder: Path, devices: str, state: Path | None = None) -> None:
        self.file = folder / "agent.toml"
        self.state = state or folder / "state"
        self.log_file = folder / "log"
        self.file.write_text(config_text(self.state, devices))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [BIN / "headgate", "run", "--config", self.file], stdout=log, stderr=log
            )

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    async def until(self, holds: Callable[[], object], within_s: float = 60.0) -> None:
        end = time.monotonic() + within_s
        while not holds():
            assert time.monotonic() < end, f"did not happen in {within_s:g} s; its log:\n{self.log}"
            assert self.process is not None
            assert self.process.poll() is None, f"ended with {self.process.returncode}; its log:\n{self.log}"
            await asyncio.sleep(0.01)

    async def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(how)
        return await asyncio.to_thread(self.process.wait, 30)


@contextlib.asynccontextmanager
async def running(folder: Path, devices: str, state: Path | None = None) -> AsyncIterator[Agent]:
    agent = Agent(folder, devices, state)
    agent.start()
    try:
        await agent.until(lambda: "running:" in agent.log)
        yield agent
    finally:
        if agent.process is not None and agent.process.poll() is None:
            agent.process.kill()
            await asyncio.to_thread(agent.process.wait)


async def to_its_end(looks: AsyncIterator[Look]) -> None:
    async for _ in looks:
        pass


SIMULATED = """
[[device]]
name = "boiler"
driver = "simulator"
period_ms = 50
[[device.point]]
name = "flow"
type = "i16"
wave = "constant"
low = 234
high = 1000
"""


@contextlib.asynccontextmanager
async def plant(free_port: Callable[[], int]) -> AsyncIterator[field_conformance.Plant]:
    unit = Unit(holding=[0] * 100, input=[0] * 10)
    async with tcp_peer({1: unit}) as peer:
        yield field_conformance.Plant(peer, unit, free_port())


@pytest.mark.parametrize("through_agent", [True, False], ids=["agent", "direct"])
async def test_both_ways_to_the_field_keep_one_promise(
    tmp_path: Path, free_port: Callable[[], int], *, through_agent: bool
) -> None:
    async with plant(free_port) as behind:
        devices = field_conformance.DEVICES.format(port=behind.peer.port, nobody=behind.nobody)
        async with contextlib.AsyncExitStack() as stack:
            if through_agent:
                agent = await stack.enter_async_context(running(tmp_path, devices))
                file, state = agent.file, agent.state
            else:
                file, state = tmp_path / "agent.toml", tmp_path / "state"
                file.write_text(config_text(state, devices))
            for check in field_conformance.CHECKS:
                field = await open_field(file, state)
                assert field.through_agent is through_agent
                try:
                    async with asyncio.timeout(60):
                        await check(field, behind)
                except BaseException as err:
                    err.add_note(f"in the check {check.__name__}")
                    raise
                finally:
                    await field.close()


# --- only through the agent ---


async def test_the_lines_that_the_agent_holds_are_told_and_not_taken(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    async with plant(free_port) as behind:
        devices = field_conformance.DEVICES.format(port=behind.peer.port, nobody=behind.nobody)
        async with running(tmp_path, devices) as agent:
            field = await AgentField.connect(agent.state)
            told = {line.claim.key: line.devices for line in await field.lines()}
            assert told[f"127.0.0.1:{behind.peer.port}"] == ["meter"]
            with pytest.raises(LineTaken, match="meter") as caught:
                await field.ask(
                    HostPort("127.0.0.1", behind.peer.port, "rtu_over_tcp"),
                    [field_conformance.request_of(1, 0, 1)],
                )
            assert caught.value.devices == ("meter",)
            options = {"host": "127.0.0.1", "port": behind.peer.port, "framing": "rtu_over_tcp"}
            point = [{"name": "p", "register": 5}]
            with pytest.raises(LineTaken, match="meter"):
                await field.attempt(Device(name="new", driver="modbus", options=options, point=point))
            await field.close()


async def test_asking_does_not_disturb_the_polls(tmp_path: Path, free_port: Callable[[], int]) -> None:
    async with plant(free_port) as behind:
        devices = field_conformance.DEVICES.format(port=behind.peer.port, nobody=behind.nobody)
        async with running(tmp_path, devices) as agent:
            field = await AgentField.connect(agent.state)
            before = msgspec.json.decode(await field.status(), type=AgentStatus).devices[0]
            began = time.monotonic()
            reads = 0
            while time.monotonic() - began < 2.0:
                await field.read("meter")
                reads += 1
            after = msgspec.json.decode(await field.status(), type=AgentStatus).devices[0]
            took = time.monotonic() - began
            assert reads > 20
            # What a person reads is shown and not kept, and the schedule goes on.
            assert after.scans - before.scans <= took / 0.1 + 2
            assert after.scans - before.scans + after.overruns - before.overruns >= took / 0.1 - 3
            assert after.failures == before.failures
            await field.close()


async def test_a_client_that_goes_away_takes_its_calls_with_it(tmp_path: Path) -> None:
    async with running(tmp_path, SIMULATED) as agent:
        for _ in range(40):  # more than may be connected at once
            field = await AgentField.connect(agent.state)
            looks = field.watch("boiler")
            await anext(looks)
            field._writer.transport.abort()  # as a killed process does
            with pytest.raises(FieldError, match="went away"):
                await to_its_end(looks)
            await field.close()
        field = await AgentField.connect(agent.state)
        assert (await field.read("boiler")).readings[0].raw == 234
        await field.close()


async def test_a_client_that_reads_nothing_holds_up_nobody(tmp_path: Path) -> None:
    async with running(tmp_path, SIMULATED.replace("period_ms = 50", "period_ms = 20")) as agent:
        _, stuck = await asyncio.open_unix_connection(agent.state / SOCKET_NAME)
        for number in range(1, 200):
            op = msgspec.msgpack.encode({"type": "watch", "device": "boiler"})
            call = msgspec.msgpack.encode(Call(number, msgspec.Raw(op)))
            stuck.write(len(call).to_bytes(4, "big") + call)
        field = await AgentField.connect(agent.state)
        took = []
        for _ in range(100):
            began = time.monotonic()
            assert (await field.read("boiler")).readings[0].raw == 234
            took.append(time.monotonic() - began)
        assert sorted(took)[50] < 0.5
        await field.close()
        stuck.transport.abort()


async def test_calls_given_up_before_they_began_leave_room_for_others(tmp_path: Path) -> None:
    async with running(tmp_path, SIMULATED) as agent:
        reader, writer = await asyncio.open_unix_connection(agent.state / SOCKET_NAME)
        op = msgspec.Raw(msgspec.msgpack.encode({"type": "lines"}))
        for number in range(2000):
            for message in (Call(number, op), control.Cancel(number)):
                data = msgspec.msgpack.encode(message)
                writer.write(len(data).to_bytes(4, "big") + data)
        data = msgspec.msgpack.encode(Call(5000, op))
        writer.write(len(data).to_bytes(4, "big") + data)
        async with asyncio.timeout(30):
            while True:
                size = int.from_bytes(await reader.readexactly(4), "big")
                told = msgspec.msgpack.decode(await reader.readexactly(size), type=Hello | Result | Fault)
                assert not isinstance(told, Fault), told
                if isinstance(told, Result) and told.id == 5000:
                    break
        writer.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x03abc",
        b"\x00\x00\x00\x01\xc0",
        b"GET / HTTP/1.1\r\n\r\n",
        (len(x := msgspec.msgpack.encode({"type": "call", "id": "one", "op": 1}))).to_bytes(4, "big") + x,
    ],
)
async def test_what_is_no_message_ends_the_connection_and_nothing_else(tmp_path: Path, sent: bytes) -> None:
    async with running(tmp_path, SIMULATED) as agent:
        reader, writer = await asyncio.open_unix_connection(agent.state / SOCKET_NAME)
        writer.write(sent)
        async with asyncio.timeout(30):
            with contextlib.suppress(ConnectionError):
                await reader.read()
        writer.close()
        field = await AgentField.connect(agent.state)
        assert await field.lines() == []
        await field.close()


async def test_a_call_that_makes_no_sense_spoils_only_itself(tmp_path: Path) -> None:
    async with running(tmp_path, SIMULATED) as agent:
        reader, writer = await asyncio.open_unix_connection(agent.state / SOCKET_NAME)

        async def heard() -> Hello | Fault:
            size = int.from_bytes(await reader.readexactly(4), "big")
            return msgspec.msgpack.decode(await reader.readexactly(size), type=Hello | Fault)

        assert isinstance(await heard(), Hello)
        for number, op in enumerate(
            [{"type": "dance"}, {"type": "read"}, {"type": "attempt", "device": {"name": ""}, "timeout_s": 1}]
        ):
            call = msgspec.msgpack.encode(Call(number, msgspec.Raw(msgspec.msgpack.encode(op))))
            writer.write(len(call).to_bytes(4, "big") + call)
            fault = await heard()
            assert isinstance(fault, Fault)
            assert (fault.id, fault.kind) == (number, "field")
        writer.close()


async def test_the_socket_is_for_its_user_alone(tmp_path: Path) -> None:
    async with running(tmp_path, SIMULATED) as agent:
        found = (agent.state / SOCKET_NAME).stat()
        assert stat.S_IMODE(found.st_mode) == 0o600
        assert await agent.end() == 0
        assert not (agent.state / SOCKET_NAME).exists()


async def test_a_peer_of_another_user_is_shown_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_peer", lambda connection: (4711, os.geteuid() + 1))
    server = control.ControlServer(tmp_path, cast(control.Host, None))
    await server.open()
    try:
        with pytest.raises(ControlRefused, match="refuses this user"):
            await AgentField.connect(tmp_path)
    finally:
        await server.close()


async def test_another_user_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """Even where the file modes would let it in. Only root can be somebody else; any other user has the test above."""
    if os.geteuid() != 0:
        return
    async with running(tmp_path, SIMULATED) as agent:
        for folder in (agent.state, *agent.state.parents):
            if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
                folder.chmod(folder.stat().st_mode | 0o755)
        (agent.state / "agent.lock").chmod(0o644)
        script = (
            "import asyncio, os, sys; from pathlib import Path\n"
            "from agent.field_open import open_field\nfrom agent.field import FieldError\n"
            "import agent.control, agent.field_direct\n"
            "os.setgid(65534); os.setuid(65534)\n"
            "async def main():\n"
            "    try: await open_field(None, Path(sys.argv[1]))\n"
            "    except FieldError as err: print(err)\n"
            "asyncio.run(main())"
        )

        def tried() -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-c", script, str(agent.state)]
            return subprocess.run(command, capture_output=True, text=True, check=False)

        by_mode = await asyncio.to_thread(tried)
        assert "Permission denied" in by_mode.stdout, by_mode.stderr
        assert "sudo -u root headgate" in by_mode.stdout
        (agent.state / SOCKET_NAME).chmod(0o666)
        by_kernel = await asyncio.to_thread(tried)
        assert "refuses this user" in by_kernel.stdout, by_kernel.stderr
        assert "user 65534 was refused" in agent.log


async def test_a_socket_that_a_killed_agent_left_is_replaced(tmp_path: Path) -> None:
    async with running(tmp_path, SIMULATED) as agent:
        await agent.end(signal.SIGKILL)
        assert (agent.state / SOCKET_NAME).exists()
        direct = await open_field(agent.file, agent.state)
        assert isinstance(direct, DirectField)
        await direct.close()
        agent.start()
        await agent.until(lambda: agent.log.count("running:") == 2)
        field = await open_field(agent.file, agent.state)
        assert (await field.read("boiler")).readings[0].raw == 234
        await field.close()


async def test_a_state_folder_with_a_long_name_has_a_socket_all_the_same(tmp_path: Path) -> None:
    state = tmp_path / ("x" * 120) / "state"
    async with running(tmp_path, SIMULATED, state) as agent:
        field = await AgentField.connect(agent.state)
        assert (await field.read("boiler")).readings[0].raw == 234
        await field.close()


async def test_an_agent_that_leaves_says_so_to_who_waits(tmp_path: Path) -> None:
    async with running(tmp_path, SIMULATED) as agent:
        field = await AgentField.connect(agent.state)
        looks = field.watch("boiler")
        await anext(looks)
        began = time.monotonic()
        await agent.end()
        assert time.monotonic() - began < 5
        with pytest.raises(FieldError, match="went away"):
            await to_its_end(looks)
        with pytest.raises(FieldError, match="went away"):
            await field.read("boiler")
        await field.close()


async def test_an_agent_of_another_version_is_refused_with_the_remedy(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello = msgspec.msgpack.encode(Hello(99, 1))
        writer.write(len(hello).to_bytes(4, "big") + hello)
        await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(serve, tmp_path / SOCKET_NAME)
    with pytest.raises(ControlRefused, match="another version; restart it"):
        await AgentField.connect(tmp_path)
    server.close()


def test_errors_cross_as_what_they_were() -> None:
    for err in (
        LineTaken("busy", ["a", "b"]),
        UnknownDevice("no x"),
        FieldError("no"),
        DeviceUnreachable("away", Reason.BUSY),
        PointRefused("p", "read only"),
        ConfigError("wrong"),
    ):
        fault = fault_of(1, err)
        back = msgspec.msgpack.decode(msgspec.msgpack.encode(fault), type=Fault).error()
        assert type(back) is type(err)
        assert str(back) == str(err)
        assert vars(back) == vars(err)
    assert isinstance(fault_of(1, ZeroDivisionError("x")).error(), FieldError)


def test_the_agent_loads_no_modbus_for_its_door(tmp_path: Path) -> None:
    """What nobody asks for costs no memory."""
    script = (
        "import agent.daemon, sys; print([m for m in sys.modules if m.startswith(('pymodbus', 'serial'))])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
