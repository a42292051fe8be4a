"""A reload exchanges what changed in the file, and touches nothing else."""

from __future__ import annotations

import asyncio
import re
import signal
import time
from pathlib import Path

import pytest

from agent import status as status_file
from agent.configuration import LAST_GOOD_NAME, check
from agent.control import AgentField
from agent.devices import build_devices
from agent.field import FieldError
from agent.health import DeviceHealth
from agent.status import AgentStatus
from config.agent import Agent as AgentConfig
from config.agent import Device, Gateway
from tests.test_agent_control import Agent, config_text, running


def device(name: str, *, low: int = 100, period_ms: int = 50, more: str = "") -> str:
    return (
        f'[[device]]\nname = "{name}"\ndriver = "simulator"\nperiod_ms = {period_ms}\n{more}'
        f'[[device.point]]\nname = "p"\ntype = "u16"\nwave = "constant"\nlow = {low}\nhigh = 60000\n'
    )


def told(agent: Agent) -> AgentStatus:
    found = status_file.read(agent.state)
    assert found is not None
    return found


def health(agent: Agent, name: str) -> DeviceHealth:
    return next(device for device in told(agent).devices if device.name == name)


async def test_devices_come_go_and_change_and_the_rest_is_not_touched(tmp_path: Path) -> None:
    async with running(tmp_path, device("stays") + device("goes") + device("changes")) as agent:
        field = await AgentField.connect(agent.state)
        looks = field.watch("stays")
        await anext(looks)
        changing = field.watch("changes")
        await anext(changing)
        text = config_text(agent.state, device("changes", low=200) + device("stays") + device("comes"))
        agent.file.write_text(text)
        done = await field.reload()
        assert (done.started, done.stopped, done.changed, done.unchanged) == (
            ["comes"], ["goes"], ["changes"], 1,
        )  # fmt: skip
        assert done.errors == done.notes == []
        assert (await field.read("changes")).readings[0].raw == 200
        assert (await field.read("comes")).readings[0].raw == 100
        with pytest.raises(FieldError, match="no device 'goes'"):
            await field.read("goes")
        # A watch goes on through the exchange, and of an untouched device it misses nothing.
        async with asyncio.timeout(30):
            async for look in changing:
                if look.readings[0].raw == 200:
                    break
        await anext(looks)
        assert await agent.end() == 0
        assert agent.log.count("stays: first scan") == 1
        assert agent.log.count("changes: first scan") == 2
        assert (agent.state / LAST_GOOD_NAME).read_text() == text
        stays = health(agent, "stays")
        assert (stays.overruns, stays.missed, stays.failures) == (0, 0, 0)
        status = told(agent)
        assert status.buffer is not None
        assert status.buffer.kept_readings > sum(device.readings for device in status.devices)
        assert status.buffer.gapped_readings == 0
        await field.close()


async def test_the_counters_of_a_changed_device_go_on(tmp_path: Path) -> None:
    async with running(tmp_path, device("a")) as agent:
        await agent.until(lambda: "a: first scan" in agent.log)
        field = await AgentField.connect(agent.state)
        looks = field.watch("a")
        for _ in range(20):
            await anext(looks)
        agent.file.write_text(config_text(agent.state, device("a", period_ms=60_000)))
        assert (await field.reload()).changed == ["a"]
        assert health(agent, "a").scans >= 20
        await field.close()


async def test_a_bad_file_changes_nothing_and_says_every_error(tmp_path: Path) -> None:
    async with running(tmp_path, device("a")) as agent:
        field = await AgentField.connect(agent.state)
        good = agent.file.read_text()
        agent.file.write_text(good.replace('driver = "simulator"', 'driver = "simulatr"') + device("a"))
        done = await field.reload()
        assert (done.started, done.stopped, done.changed, done.unchanged) == ([], [], [], 1)
        assert len(done.errors) == 2
        assert any("did you mean 'simulator'" in error for error in done.errors)
        assert (await field.read("a")).readings[0].raw == 100
        assert "nothing was changed" in agent.log
        assert (agent.state / LAST_GOOD_NAME).read_text() == good
        await agent.until(lambda: told(agent).config.last_known_good)
        agent.file.unlink()
        assert "cannot be read" in (await field.reload()).errors[0]
        agent.file.write_text(good)
        assert (await field.reload()).errors == []
        await agent.until(lambda: not told(agent).config.last_known_good)
        await field.close()


async def test_what_needs_a_restart_is_said_and_the_devices_change_all_the_same(tmp_path: Path) -> None:
    async with running(tmp_path, device("a")) as agent:
        field = await AgentField.connect(agent.state)
        text = config_text(agent.state, device("a") + device("b"))
        agent.file.write_text(text.replace("commit_interval_s = 0.1", "commit_interval_s = 0.2"))
        done = await field.reload()
        assert done.started == ["b"]
        assert done.notes == ["[buffer] changed, and takes effect when the agent is restarted"]
        problems = status_file.problems(told(agent), running=True, now_ns=time.time_ns())
        assert any("systemctl restart headgate" in problem.remedy for problem in problems)
        agent.file.write_text(text)
        assert (await field.reload()).notes == []
        await field.close()


async def test_sighup_reloads(tmp_path: Path) -> None:
    async with running(tmp_path, device("a")) as agent:
        agent.file.write_text(config_text(agent.state, device("a") + device("b")))
        assert agent.process is not None
        agent.process.send_signal(signal.SIGHUP)
        done = "configuration reloaded: 1 started, 0 stopped, 0 changed, 1 untouched"
        await agent.until(lambda: "b: first scan" in agent.log and done in agent.log)
        agent.file.write_text("nonsense")
        agent.process.send_signal(signal.SIGHUP)
        await agent.until(lambda: "nothing was changed" in agent.log)
        assert await agent.end() == 0


async def test_reloads_at_once_and_a_client_that_leaves_do_no_harm(tmp_path: Path) -> None:
    async with running(tmp_path, device("a")) as agent:
        fields = [await AgentField.connect(agent.state) for _ in range(4)]
        for number in range(6):
            agent.file.write_text(
                config_text(agent.state, device("a", low=200 + number) + device(f"n{number}"))
            )
            reloads = [asyncio.ensure_future(field.reload()) for field in fields]
            await asyncio.sleep(0.002 * number)
            reloads[0].cancel()
            await asyncio.gather(*reloads, return_exceptions=True)
        assert (await fields[1].reload()).errors == []
        assert (await fields[1].read("a")).readings[0].raw == 205
        assert {device.name for device in told(agent).devices} == {"a", "n5"}
        for field in fields:
            await field.close()
        assert await agent.end() == 0
        assert not re.search(r"CRITICAL|Traceback", agent.log), agent.log


async def test_leaving_in_the_middle_of_a_reload_is_in_order(tmp_path: Path) -> None:
    many = "".join(device(f"d{n}") for n in range(40))
    async with running(tmp_path, many) as agent:
        agent.file.write_text(config_text(agent.state, many.replace("low = 100", "low = 101")))
        assert agent.process is not None
        agent.process.send_signal(signal.SIGHUP)
        began = time.monotonic()
        assert await agent.end() == 0
        assert time.monotonic() - began < 6
        assert "left in order" in agent.log


# --- what is judged before anything runs ---


def test_a_device_is_the_same_only_if_all_of_its_table_is() -> None:
    def built(**changes: object) -> AgentConfig:
        table: dict[str, object] = {
            "name": "m", "driver": "modbus", "options": {"host": "h"}, "point": [{"name": "x", "register": 1}],
        }  # fmt: skip
        return AgentConfig(gateway=Gateway(tenant="a", name="b"), device=[Device(**{**table, **changes})])  # type: ignore[arg-type]

    [first] = build_devices(built())[0]
    [again] = build_devices(built())[0]
    assert first.is_as(again)
    for change in (
        {"period_ms": 2000},
        {"phase_ms": 1},
        {"timeout_ms": 100},
        {"measurement": "other"},
        {"tags": {"a": "b"}},
        {"options": {"host": "other"}},
        {"point": [{"name": "x", "register": 2}]},
        {"point": [{"name": "x", "register": 1, "valid_max": 5.0}]},
        {"isolate": True},
        {"driver": "simulator", "options": {}, "point": [{"name": "x"}]},
    ):
        [other] = build_devices(built(**change))[0]
        assert not first.is_as(other), change


def test_two_devices_on_one_line_with_other_settings_are_refused_with_both_names(tmp_path: Path) -> None:
    def meter(name: str, baud: int) -> str:
        return (
            f'[[device]]\nname = "{name}"\ndriver = "modbus"\n[device.options]\nserial = "/dev/ttyUSB9"\n'
            f'baud = {baud}\n[[device.point]]\nname = "x"\nregister = 0\n'
        )

    file = tmp_path / "agent.toml"
    file.write_text(config_text(tmp_path, meter("one", 9600) + meter("two", 9600)))
    assert check(file).errors == []
    file.write_text(config_text(tmp_path, meter("one", 9600) + meter("two", 19200)))
    [error] = check(file).errors
    assert "'two' wants 19200 baud" in str(error)
    assert "'one' has 9600 baud" in str(error)
    assert error.line is not None
    assert file.read_text().splitlines()[error.line - 1] == "[device.options]"
    assert error.path == "device[1].options"
    file.write_text(
        config_text(tmp_path, meter("one", 9600) + meter("two", 19200)).replace(
            'name = "two"', 'name = "two"\nenabled = false'
        )
    )
    assert check(file).errors == []
