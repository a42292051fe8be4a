"""What drivers learnt comes back to them after a restart, and never does harm."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from agent.learnt import FOLDER_NAME, MOST_BYTES, Learnt
from tests.fakes import bad_drivers
from tests.test_agent_control import running


def test_what_was_learnt_is_there_again_for_the_same_driver_only(tmp_path: Path) -> None:
    learnt = Learnt(tmp_path)
    assert learnt.load("boiler", "modbus") is None
    learnt.save("boiler", "modbus", b"refuses 40017")
    learnt.save("kettle ü/..", "modbus", b"")
    assert Learnt(tmp_path).load("boiler", "modbus") == b"refuses 40017"
    assert Learnt(tmp_path).load("kettle ü/..", "modbus") == b""
    assert learnt.load("boiler", "serial_line") is None
    learnt.save("boiler", "modbus", b"nothing")
    assert learnt.load("boiler", "modbus") == b"nothing"
    assert {path.parent.name for path in tmp_path.rglob("*.bin")} == {FOLDER_NAME}


def test_a_damaged_file_is_ignored_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    learnt, chance = Learnt(tmp_path), random.Random(5)
    learnt.save("boiler", "modbus", b"refuses 40017")
    [path] = tmp_path.rglob("*.bin")
    sound = path.read_bytes()
    damaged = [b"", sound[:5], sound[:-1], sound + b"x", b"\xff" * 100]
    for _ in range(200):
        bits = bytearray(sound)
        bits[chance.randrange(len(bits))] ^= 1 << chance.randrange(8)
        damaged.append(bytes(bits))
    for data in damaged:
        path.write_bytes(data)
        caplog.clear()
        assert learnt.load("boiler", "modbus") is None
        assert "boiler" in caplog.text
    path.write_bytes(b"\0" * (MOST_BYTES + 5000))
    assert learnt.load("boiler", "modbus") is None


def test_too_much_is_not_kept_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    learnt = Learnt(tmp_path)
    learnt.save("boiler", "modbus", b"x" * (MOST_BYTES + 1))
    assert learnt.load("boiler", "modbus") is None
    assert str(MOST_BYTES) in caplog.text


def test_a_folder_that_cannot_be_written_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FOLDER_NAME).write_text("in the way")
    learnt = Learnt(tmp_path)
    learnt.save("boiler", "modbus", b"x")
    assert learnt.load("boiler", "modbus") is None
    learnt.forget_strangers(["boiler"])
    assert "cannot be kept" in caplog.text


def test_a_device_that_is_gone_is_forgotten_after_a_month(tmp_path: Path) -> None:
    learnt = Learnt(tmp_path)
    learnt.save("here", "modbus", b"x")
    learnt.save("gone", "modbus", b"y")
    now_s = max(path.stat().st_mtime for path in tmp_path.rglob("*.bin"))
    learnt.forget_strangers(["here"], now_s + 29 * 86_400)
    assert learnt.load("gone", "modbus") == b"y"
    learnt.forget_strangers(["here"], now_s + 31 * 86_400)
    assert learnt.load("gone", "modbus") is None
    assert learnt.load("here", "modbus") == b"x"


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("in_a_read", [False, True], ids=["between_reads", "in_a_read"])
async def test_a_driver_goes_on_where_it_was_before_the_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, isolate: bool, in_a_read: bool
) -> None:
    folder = bad_drivers.install(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(Path.cwd())]))
    device = f'[[device]]\nname = "counter"\ndriver = "naughty"\nperiod_ms = 20\nisolate = {str(isolate).lower()}\n'
    if in_a_read:  # each read takes longer than its period: one is always under way
        (tmp_path / "slow").touch()
        device += f'[device.options]\nmarker = "{tmp_path / "slow"}"\ndeed = "hang"\nfor_s = 0.3\n'
    device += '[[device.point]]\nname = "reads"\n'
    async with running(tmp_path, device) as agent:
        await agent.until(lambda: "counter: first scan" in agent.log)
        assert await agent.end() == 0
        kept = Learnt(agent.state).load("counter", "naughty")
        assert kept is not None
        agent.start()
        await agent.until(lambda: agent.log.count("counter: first scan") == 2)
        assert await agent.end() == 0
        after = Learnt(agent.state).load("counter", "naughty")
        assert after is not None
        assert int(after) > int(kept) > 0
