"""Where an agent is reached when its state folder takes no writes: a folder of its user's alone, found by commands."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from agent import runtime_dir, status
from agent.control import AgentField, ControlRefused, ControlServer
from agent.status import AgentStatus


@pytest.fixture(autouse=True)
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As on a machine where systemd gives the agent nothing."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    monkeypatch.setattr(runtime_dir, "_SYSTEM", tmp_path / "run-headgate")
    monkeypatch.setattr(runtime_dir, "_TEMPORARY", temporary)
    return temporary


def test_what_the_agent_makes_is_found_and_two_state_folders_never_meet(homes: Path, tmp_path: Path) -> None:
    one, other = (runtime_dir.make(tmp_path / name) for name in ("a", "b"))
    assert one != other
    assert one.parent == homes / f"headgate-{os.geteuid()}"
    assert {path.stat().st_mode & 0o777 for path in (one, one.parent)} == {0o700}
    assert runtime_dir.found(tmp_path / "a") == [one] == [runtime_dir.make(tmp_path / "a")]
    assert runtime_dir.found(tmp_path / "c") == []


def test_what_systemd_gives_is_taken_and_run_headgate_is_looked_at_by_everybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "run-headgate"
    given.mkdir(0o700)
    monkeypatch.setenv("RUNTIME_DIRECTORY", f"{given}:/run/another")
    made = runtime_dir.make(tmp_path / "a")
    assert made.parent == given
    monkeypatch.delenv("RUNTIME_DIRECTORY")
    assert runtime_dir.found(tmp_path / "a") == [made]


def test_a_folder_that_others_may_write_to_is_neither_used_nor_believed(homes: Path, tmp_path: Path) -> None:
    home = homes / f"headgate-{os.geteuid()}"
    home.mkdir(0o700)
    home.chmod(0o777)
    with pytest.raises(OSError, match="others may write"):
        runtime_dir.make(tmp_path / "a")
    home.chmod(0o700)
    made = runtime_dir.make(tmp_path / "a")
    home.chmod(0o777)
    assert made.is_dir()
    assert runtime_dir.found(tmp_path / "a") == []


def test_a_link_in_its_place_is_not_followed(homes: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(0o700)
    (homes / f"headgate-{os.geteuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="no folder"):
        runtime_dir.make(tmp_path / "a")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a folder away needs root")
def test_a_folder_of_another_user_is_neither_used_nor_believed(homes: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    home = homes / "headgate-0"
    home.mkdir(0o700)
    os.chown(home, 12_345, 12_345)
    with pytest.raises(OSError, match="belongs to others"):
        runtime_dir.make(tmp_path / "a")
    assert runtime_dir.found(tmp_path / "a") == []


def test_the_newest_status_counts_wherever_it_could_be_written(tmp_path: Path) -> None:
    state, aside = tmp_path / "state", runtime_dir.make(tmp_path / "state")
    state.mkdir()
    assert status.read(state) is None
    now_ns = time.time_ns()
    for place, written_ns in ((state, now_ns), (aside, now_ns + 1)):
        status.write(place, AgentStatus(written_ns=written_ns))
    told = status.read(state)
    assert told is not None
    assert told.written_ns == now_ns + 1
    status.write(state, AgentStatus(written_ns=now_ns + 2))
    told = status.read(state)
    assert told is not None
    assert told.written_ns == now_ns + 2


class Says:
    """A host of whom only the status is asked."""

    def status_document(self) -> bytes:
        return status.encode(AgentStatus(gateway="acme/plant-1"))


async def test_where_the_state_folder_takes_no_socket_commands_find_the_agent_in_memory(
    tmp_path: Path,
) -> None:
    state = tmp_path / "not" / "there"
    server = ControlServer(state, Says())  # type: ignore[arg-type]
    with pytest.raises(ControlRefused):
        await AgentField.connect(state)
    await server.open()
    try:
        field = await AgentField.connect(state)
        assert status.decode(await field.status()).gateway == "acme/plant-1"
        await field.close()
    finally:
        await server.close()
    with pytest.raises(ControlRefused, match=str(state)):
        await AgentField.connect(state)
