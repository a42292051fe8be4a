"""`isolate = true`: nobody can tell the stand-in from the driver, and what the driver does stays in its process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from agent import status as status_file
from agent.devices import build_device, build_devices
from agent.field_open import open_field
from agent.health import State
from agent.isolation import DriverProcessDied, IsolatedDriver, IsolatedPushDriver, isolated
from agent.status import AgentStatus
from config.agent import Agent as AgentConfig
from config.agent import Device, Gateway
from drivers import conformance
from drivers.conformance import Check, Subject
from drivers.contract import DeviceUnreachable, PointRefused, Reason
from drivers.modbus_address import HostPort
from drivers.registry import build
from tests import field_conformance
from tests.fakes import bad_drivers
from tests.fakes.http_station import Reply, station
from tests.fakes.meter import Meter, meter
from tests.fakes.modbus_peer import Unit, tcp_peer
from tests.test_agent_control import Agent, running


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The strangers' drivers, for this process and its children."""
    folder = bad_drivers.install(tmp_path / "site")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(Path.cwd())]))
    return folder


def stand_in(driver: str, options: dict[str, object], points: tuple[str, ...] = ("a", "b")) -> object:
    tables = [{"name": name, "register": 1} if driver == "modbus" else {"name": name} for name in points]
    return isolated(build("m", driver, options, tables), driver, options, tables)


# --- it is a driver like any other ---


def subject_of(driver: str, device: Meter) -> Subject:
    def made(port: int = 0) -> conformance.Pull | conformance.Push:
        found = stand_in(driver, {"port": port or device.port})
        assert isinstance(found, IsolatedDriver | IsolatedPushDriver)
        return found

    pulled = driver == "fake_meter"
    return Subject(
        build=made,
        absent=lambda: made(1),
        provoke=None if pulled else device.provoke,
        change=device.change,
        truth=device.truth,
        silence=device.silence(),
        faults={name: fault for name, fault in device.faults().items() if pulled or name != "late"},
        deadline_s=10.0,
        recovery_s=10.0,
        try_s=0.5,
        reads_s=0.6,
    )


@pytest.mark.parametrize("check", conformance.PULL, ids=conformance.title)
async def test_a_driver_in_its_own_process_conforms(installed: Path, check: Check) -> None:
    async with meter() as device:
        await check(subject_of("fake_meter", device))


@pytest.mark.parametrize("check", conformance.PUSH, ids=conformance.title)
async def test_a_pushing_driver_in_its_own_process_conforms(installed: Path, check: Check) -> None:
    async with meter() as device:
        await check(subject_of("fake_listener", device))


# --- and what it does wrong is its own affair ---


@contextlib.asynccontextmanager
async def naughty(marker: Path, deed: str) -> AsyncIterator[IsolatedDriver]:
    driver = stand_in("naughty", {"marker": str(marker), "deed": deed, "secret": "hunter2"})
    assert isinstance(driver, IsolatedDriver)
    try:
        async with asyncio.timeout(30):
            await driver.connect()
        yield driver
    finally:
        await driver.close()


def child_of(driver: IsolatedDriver) -> int:
    assert driver._child is not None
    return driver._child.process.pid


def lives(pid: int) -> bool:
    """Zombies do not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


async def until(holds: Callable[[], object], within_s: float = 30.0) -> None:
    async with asyncio.timeout(within_s):
        while not holds():  # noqa: ASYNC110 - another process has no event
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(("deed", "why"), [("crash", "SIGSEGV"), ("exit", "status 3")])
async def test_a_process_that_dies_is_the_drivers_fault_and_says_how(
    installed: Path, tmp_path: Path, deed: str, why: str
) -> None:
    async with naughty(tmp_path / "now", deed) as driver:
        assert (await driver.read(driver.points)).values == [1.0, 1.0]
        (tmp_path / "now").touch()
        with pytest.raises(DriverProcessDied, match=why):
            await driver.read(driver.points)
        (tmp_path / "now").unlink()
        await driver.connect()
        assert (await driver.read(driver.points)).values == [1.0, 1.0]


async def test_a_driver_that_blocks_holds_up_its_own_process_and_is_ended(
    installed: Path, tmp_path: Path
) -> None:
    async with naughty(tmp_path / "now", "block") as driver:
        first = child_of(driver)
        (tmp_path / "now").touch()
        turns = 0

        async def turn() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0.01)
                turns += 1

        turning = asyncio.create_task(turn())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await driver.read(driver.points)
        with pytest.raises(DeviceUnreachable, match="stuck") as caught:
            await driver.read(driver.points)
        assert caught.value.reason is Reason.TIMEOUT
        turning.cancel()
        assert turns > 30  # 1.3 s of a loop that turned
        await until(lambda: not lives(first))
        (tmp_path / "now").unlink()
        await driver.connect()
        assert (await driver.read(driver.points)).values == [1.0, 1.0]
        assert child_of(driver) != first


async def test_an_exception_crosses_with_its_kind(installed: Path, tmp_path: Path) -> None:
    async with naughty(tmp_path / "now", "raise") as driver:
        a, b = driver.points
        await driver.write(a, 7.5)
        assert (await driver.read((b, a))).values == [1.0, 7.5]
        with pytest.raises(PointRefused, match=r"^b: not this one$"):
            await driver.write(b, 13.0)
        (tmp_path / "now").touch()
        with pytest.raises(RuntimeError, match="ZeroDivisionError: division by zero"):
            await driver.read(driver.points)


async def test_an_unreachable_device_of_another_process_says_too_when_it_is_tried_again(
    installed: Path,
) -> None:
    driver = stand_in("modbus", {"serial": "/dev/headgate-no-such-port", "parity": "none"})
    assert isinstance(driver, IsolatedDriver)
    try:
        with pytest.raises(DeviceUnreachable, match="no-such-port") as caught:
            async with asyncio.timeout(30):
                await driver.connect()
        assert caught.value.reason is Reason.DISCONNECTED
        assert caught.value.retry_within_s is not None
    finally:
        await driver.close()


async def test_what_a_driver_prints_never_reaches_the_conversation(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "now").touch()
    async with naughty(tmp_path / "now", "shout") as driver:
        assert (await driver.read(driver.points)).values == [1.0, 1.0]


async def test_the_table_is_on_no_command_line(installed: Path, tmp_path: Path) -> None:
    async with naughty(tmp_path / "now", "raise") as driver:
        shown = Path(f"/proc/{child_of(driver)}/cmdline").read_bytes()
        assert b"isolation_child" in shown
        assert b"hunter2" not in shown
        assert b"hunter2" not in Path(f"/proc/{child_of(driver)}/environ").read_bytes()


async def test_a_config_py_in_the_working_folder_is_not_imported(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    async with naughty(tmp_path / "now", "raise") as driver:
        assert (await driver.read(driver.points)).values == [1.0, 1.0]


async def test_what_it_learnt_comes_back_to_it(installed: Path, tmp_path: Path) -> None:
    async with naughty(tmp_path / "now", "raise") as driver:
        for _ in range(3):
            await driver.read(driver.points)
        await driver.close()
        assert driver.remembered() == b"3"
        assert driver.remembered() is None
        driver.recall(b"41")
        await driver.connect()
        assert (await driver.read(driver.points)).values == [42.0, 42.0]


async def test_a_sign_of_life_crosses_as_one() -> None:
    options: dict[str, object] = {"period_s": 0.1, "jitter": 0.0, "host_interval_s": 0.0}
    async with station() as it:
        it.reply = lambda asked: Reply(b'{"a": 1}')
        tables = [{"name": "a", "pointer": "/a"}]
        options["url"] = it.url()
        driver = isolated(build("m", "http_poll", options, tables), "http_poll", options, tables)
        assert isinstance(driver, IsolatedPushDriver)
        try:
            await driver.connect()
            scans = driver.scans()
            assert (await anext(scans)).values == [1.0]
            await it.unplug()
            with pytest.raises(DeviceUnreachable):
                await anext(scans)
            await it.plug()
            await driver.connect()
            scans = driver.scans()
            alive = await anext(scans)
            assert (alive.points, list(alive.values), dict(alive.reasons)) == ((), [], {})
            await scans.aclose()
        finally:
            await driver.close()


async def test_what_a_pushing_driver_dropped_is_counted_through_restarts(
    installed: Path, tmp_path: Path
) -> None:
    driver = stand_in("chatty", {"marker": str(tmp_path / "now")})
    assert isinstance(driver, IsolatedPushDriver)
    try:
        for lowest in (2, 4):
            await driver.connect()
            scans = driver.scans()
            async for scan in scans:
                assert [p.name for p in scan.points] == ["a"]
                if driver.overruns >= lowest:
                    break
            await scans.aclose()
            scans = driver.scans()
            (tmp_path / "now").touch()
            with pytest.raises(DriverProcessDied, match="status 3"):
                async for _ in scans:
                    pass
            (tmp_path / "now").unlink()
    finally:
        await driver.close()


# --- in a running agent ---


def devices(folder: Path, deed: str, *, isolate: bool) -> str:
    return f"""
[[device]]
name = "boiler"
driver = "simulator"
period_ms = 50
[[device.point]]
name = "flow"
[[device]]
name = "culprit"
driver = "naughty"
isolate = {str(isolate).lower()}
period_ms = 100
timeout_ms = 500
[device.options]
marker = "{folder / "now"}"
deed = "{deed}"
for_s = 2.0
[[device.point]]
name = "a"
"""


def told(agent: Agent) -> AgentStatus:
    found = status_file.read(agent.state)
    assert found is not None
    return found


async def test_a_crashing_driver_is_started_again_and_the_others_never_notice(
    installed: Path, tmp_path: Path
) -> None:
    (tmp_path / "now").touch()
    async with running(tmp_path, devices(tmp_path, "crash", isolate=True)) as agent:
        await agent.until(lambda: "SIGSEGV" in agent.log)
        (tmp_path / "now").unlink()
        await agent.until(lambda: "culprit: answers again" in agent.log)
        assert await agent.end() == 0
    boiler, culprit = told(agent).devices
    assert culprit.restarts >= 1
    assert (boiler.failures, boiler.restarts, boiler.bad_readings) == (0, 0, 0)
    assert "Traceback" not in agent.log.split("SIGSEGV")[-1]


async def test_a_blocking_driver_is_down_alone(installed: Path, tmp_path: Path) -> None:
    async with running(tmp_path, devices(tmp_path, "block", isolate=True)) as agent:
        await agent.until(lambda: "culprit: first scan" in agent.log)
        (tmp_path / "now").touch()
        await agent.until(lambda: "culprit: no answer within 0.5 s" in agent.log)
        await asyncio.sleep(2.0)
        (tmp_path / "now").unlink()
        await agent.until(lambda: "culprit: answers again" in agent.log)
        assert await agent.end() == 0
    status = told(agent)
    boiler, culprit = status.devices
    assert (boiler.failures, boiler.restarts, boiler.bad_readings) == (0, 0, 0)
    assert culprit.blocked == status.stalls == 0
    assert culprit.state is State.STOPPED


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_the_process_ends_with_the_agent_whatever_it_does(
    installed: Path, tmp_path: Path, how: signal.Signals
) -> None:
    async with running(tmp_path, devices(tmp_path, "block", isolate=True)) as agent:
        await agent.until(lambda: "culprit: first scan" in agent.log)
        assert agent.process is not None
        children = Path(f"/proc/{agent.process.pid}/task/{agent.process.pid}/children").read_text().split()
        assert children
        (tmp_path / "now").touch()
        await asyncio.sleep(0.3)
        await agent.end(how)
        await until(lambda: not any(lives(int(pid)) for pid in children))


async def test_a_technician_asks_on_the_line_of_an_isolated_device(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    unit = Unit(holding=[7] * 10, input=[0] * 10)
    async with tcp_peer({1: unit}) as peer:
        table = field_conformance.DEVICES.format(port=peer.port, nobody=free_port())
        table = table.replace('name = "meter"', 'name = "meter"\nisolate = true')
        async with running(tmp_path, table) as agent:
            field = await open_field(agent.file, agent.state)
            await agent.until(lambda: "meter: first scan" in agent.log)
            found = await field.ask(HostPort("127.0.0.1", peer.port), [field_conformance.request_of(1, 0, 1)])
            assert found.replies == [b"\x00\x07"]
            assert (await field.write("meter", "setpoint", 2.5)).readings[0].raw == 5
            assert unit.holding[1] == 5
            await field.close()


# --- as configured ---


def test_a_device_that_shares_its_line_cannot_be_isolated() -> None:
    def device(name: str, unit: int, *, isolate: bool) -> Device:
        options = {"host": "10.0.0.1", "unit": unit}
        return Device(
            name=name, driver="modbus", isolate=isolate, options=options, point=[{"name": "x", "register": 0}]
        )

    def errors(*devices: Device) -> list[str]:
        config = AgentConfig(gateway=Gateway(tenant="a", name="b"), device=list(devices))
        return [str(error) for error in build_devices(config)[1]]

    assert errors(device("one", 1, isolate=False), device("two", 2, isolate=False)) == []
    assert errors(device("one", 1, isolate=True)) == []
    [error] = errors(device("one", 1, isolate=False), device("two", 2, isolate=True))
    assert "'two' and 'one' share 10.0.0.1:502" in error
    assert "remove isolate" in error


def test_an_isolated_device_is_checked_like_any_other() -> None:
    device = Device(name="x", driver="simulator", isolate=True, point=[{"name": "p"}])
    assert isinstance(build_device(device).driver, IsolatedDriver)
