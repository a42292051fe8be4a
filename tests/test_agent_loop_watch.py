"""A driver that blocks the event loop is named, with its line; whoever does not is left alone."""

from __future__ import annotations

import asyncio
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable
from pathlib import Path

import pytest

from agent import loop_watch
from agent import status as status_file
from agent.health import DeviceHealth
from agent.loop_watch import LoopWatch, Stall
from agent.status import AgentStatus, RunState, problems
from drivers.contract import Driver, Point
from tests.fakes import bad_drivers
from tests.fakes.bad_drivers import Naughty, NaughtyOptions
from tests.test_agent_control import BIN, running
from tests.test_agent_isolation import devices


async def stalls_of(work: Awaitable[object], *, at_least: int = 1) -> list[Stall]:
    """What is told while this runs on the loop."""
    found: list[Stall] = []
    watch = LoopWatch(found.append)
    watch.start()
    try:
        await asyncio.sleep(0.1)
        await work
        async with asyncio.timeout(10):
            while len(found) < at_least:  # noqa: ASYNC110 - what is waited for is told by a thread
                await asyncio.sleep(0.05)
    finally:
        watch.stop()
    return found


def blocking(seconds: float) -> Driver[NaughtyOptions, Point]:
    return Naughty("boiler", NaughtyOptions(marker="/", for_s=seconds), (Point(name="a"),))


async def test_a_driver_that_sleeps_is_named_with_its_line() -> None:
    driver = blocking(1.2)
    [stall] = await stalls_of(driver.read(driver.points))
    assert stall.device == "boiler"
    assert re.fullmatch(r"fakes/bad_drivers\.py:\d+ in misbehave", stall.where), stall
    assert 0.7 < stall.lasted_s < 3.0


async def test_a_driver_that_calculates_is_named_too() -> None:
    class Busy(Naughty):
        async def misbehave(self) -> None:
            end_s = time.monotonic() + 1.2
            while time.monotonic() < end_s:
                sum(range(1000))

    driver = Busy("mill", NaughtyOptions(marker="/"), (Point(name="a"),))
    [stall] = await stalls_of(driver.read(driver.points))
    assert (stall.device, stall.where.split(" in ")[1]) == ("mill", "misbehave")


async def test_one_that_never_lets_the_interpreter_go_is_named_too() -> None:
    """A pattern that backtracks holds the interpreter's lock: no other thread runs meanwhile."""

    class Backtracks(Naughty):
        async def misbehave(self) -> None:
            for length in range(20, 40):
                began_s = time.monotonic()
                re.match(r"(a+)+$", "a" * length + "b")
                if time.monotonic() - began_s > 1.0:
                    return

    driver = Backtracks("scale", NaughtyOptions(marker="/"), (Point(name="a"),))
    stalls = await stalls_of(driver.read(driver.points))
    assert {stall.device for stall in stalls} == {"scale"}, stalls


async def test_the_tasks_name_tells_whose_callback_it_was() -> None:
    async def task() -> None:
        time.sleep(1.0)  # noqa: ASYNC251 - what is to be found

    [stall] = await stalls_of(asyncio.create_task(task(), name="poll[kettle]"))
    assert stall.device == "kettle"
    [stall] = await stalls_of(asyncio.create_task(task(), name="forwarder"))
    assert (stall.device, stall.task) == ("", "forwarder")
    assert "test_agent_loop_watch.py" in stall.where


async def test_a_module_that_takes_long_to_load_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_to_load.py").write_text("import time\ntime.sleep(1.0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    async def task() -> None:
        importlib.import_module("slow_to_load")

    [stall] = await stalls_of(asyncio.create_task(task(), name="forwarder"))
    assert stall.loading
    assert stall.device == ""
    assert "test_agent_loop_watch.py" in stall.where or "importlib" in stall.where


async def test_a_loop_that_turns_is_left_alone() -> None:
    async def work() -> None:
        for _ in range(20):
            time.sleep(0.05)  # noqa: ASYNC251 - long, and short enough
            await asyncio.sleep(0)

    assert await stalls_of(work(), at_least=0) == []


def test_a_process_that_was_stopped_blames_nobody(tmp_path: Path) -> None:
    script = (
        "import asyncio, sys; from agent.loop_watch import LoopWatch\n"
        "async def main():\n"
        "    watch = LoopWatch(lambda stall: print(stall, flush=True)); watch.start()\n"
        "    print('ready', flush=True)\n"
        "    await asyncio.sleep(4)\n"
        "asyncio.run(main())"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.6)
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.0)
    process.send_signal(signal.SIGCONT)
    told = process.stdout.read()
    assert process.wait(30) == 0
    assert "the machine" in told or told == "", told
    assert "device=''" in told or told == "", told


async def test_the_agent_names_it_in_its_log_and_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bad_drivers.install(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(Path.cwd())]))
    async with running(tmp_path, devices(tmp_path, "block", isolate=False)) as agent:
        await agent.until(lambda: "culprit: first scan" in agent.log)
        (tmp_path / "now").touch()
        await agent.until(lambda: "blocked the agent" in agent.log)
        (tmp_path / "now").unlink()
        warning = next(line for line in agent.log.splitlines() if "blocked the agent" in line)
        assert re.search(
            r"WARNING +device culprit \(driver naughty\) blocked the agent for \d+\.\d s at "
            r"fakes/bad_drivers\.py:\d+ in misbehave; .*isolate = true",
            warning,
        ), warning

        def counted() -> bool:
            found = status_file.read(agent.state)
            return found is not None and found.devices[1].blocked > 0

        await agent.until(counted)
        shown = await asyncio.create_subprocess_exec(
            BIN / "headgate", "status", "--config", agent.file, stdout=asyncio.subprocess.PIPE
        )
        output = (await shown.communicate())[0].decode()
        assert "culprit: driver 'naughty' held up all devices" in output
        assert "isolate = true" in output
        await agent.end()
    status = status_file.read(agent.state)
    assert status is not None
    boiler, culprit = status.devices
    assert culprit.blocked_s > 1.0
    assert boiler.blocked == 0


async def test_what_lasts_is_told_while_it_lasts_and_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_watch, "LASTING_S", 1.0)
    told: list[tuple[str, Stall]] = []
    watch = LoopWatch(
        lambda stall: told.append(("ended", stall)), lambda stall: told.append(("lasts", stall))
    )
    watch.start()
    try:
        await asyncio.sleep(0.1)
        driver = blocking(2.5)
        await driver.read(driver.points)
        assert [how for how, _ in told] == ["lasts"]  # by the thread: the loop has not turned since
        async with asyncio.timeout(10):
            while len(told) < 2:  # noqa: ASYNC110 - what is waited for is told by a thread
                await asyncio.sleep(0.05)
    finally:
        watch.stop()
    (_, lasting), (how, ended) = told
    assert how == "ended"
    assert lasting.device == ended.device == "boiler"
    assert lasting.told_s == 0.0
    assert ended.told_s == lasting.lasted_s < ended.lasted_s


async def test_a_driver_that_never_returns_is_named_before_the_agent_is_killed_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bad_drivers.install(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(Path.cwd())]))
    table = devices(tmp_path, "block", isolate=False)
    async with running(tmp_path, table.replace("for_s = 2.0", "for_s = 3600.0")) as agent:
        await agent.until(lambda: "culprit: first scan" in agent.log)
        (tmp_path / "now").touch()
        await agent.until(lambda: "it has not ended yet" in agent.log)
        await agent.until(lambda: (found := status_file.read(agent.state)) and found.devices[1].blocked)
        await agent.end(signal.SIGKILL)
        assert re.search(r"ERROR +device culprit .* at fakes/bad_drivers\.py:\d+ in misbehave", agent.log)
    status = status_file.read(agent.state)
    assert status is not None
    assert status.devices[1].blocked == 1
    assert status.devices[1].blocked_s >= 10.0
    assert any("culprit" in str(p) for p in problems(status, running=True, now_ns=time.time_ns()))


def test_what_blocked_is_a_problem_for_an_hour() -> None:
    health = DeviceHealth(name="a", driver="x", blocked=2, blocked_s=3.0, blocked_at="x.py:1", blocked_ns=0)
    status = AgentStatus(state=RunState.RUNNING, devices=[health], stalls=1, stalled_s=1.0, stalled_ns=0)
    soon = [str(problem) for problem in problems(status, running=True, now_ns=10)]
    assert any("a: driver 'x' held up all devices 2 times, 3 s in all" in text for text in soon)
    assert any("stood still 1 time, 1 s in all" in text for text in soon)
    later = [str(problem) for problem in problems(status, running=True, now_ns=3601 * 10**9)]
    assert not any("held up" in text or "stood still" in text for text in later)


def test_the_watch_costs_next_to_nothing() -> None:
    """No claim of speed: that it does not spin. The figure is in the folder's README."""

    async def idle() -> float:
        watch = LoopWatch(lambda stall: None)
        watch.start()
        began_s = time.process_time()
        await asyncio.sleep(2.0)
        watch.stop()
        return time.process_time() - began_s

    assert asyncio.run(idle()) < 0.2
