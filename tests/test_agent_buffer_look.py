"""`headgate buffer` says what waits: depth, bytes, oldest, by priority, and the losses, agent running or not."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner, Result

from agent import buffer_look
from agent.cli import main
from agent.store import Group
from drivers.contract import Priority
from tests.fakes.buffer import PACKING, READINGS, StillClock, opened, scan

S = 10**9


def mixed(alarms: list[int], normal: list[int], bulk: list[int]) -> Group:
    """As the buffer hands it over: alarms first, bulk last."""
    frames = [scan(n) for n in [*alarms, *normal, *bulk]]
    return Group(
        frames, [READINGS] * len(frames), [PACKING.layout], size_bytes=sum(len(f) + 16 for f in frames),
        alarms=len(alarms), bulk=len(bulk),
    )  # fmt: skip


def asked(folder: Path, *words: str) -> Result:
    return CliRunner().invoke(
        main, ["buffer", "--state-dir", str(folder), *words], catch_exceptions=False, terminal_width=100
    )


def test_what_waits_is_told_by_priority_with_the_account(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.commit(mixed([1, 2], [3, 4, 5], [6, 7, 8, 9]), (), 0)
    store.commit(Group([], []), [(1, 1)], 0)
    store.close()
    files, damaged = buffer_look.look(tmp_path)
    (held,) = files
    assert damaged == []
    assert [(w.priority, w.frames, w.readings) for w in held.priorities] == [
        (Priority.ALARM, 1, READINGS),
        (Priority.NORMAL, 3, 3 * READINGS),
        (Priority.BULK, 4, 4 * READINGS),
    ]
    assert (held.frames, held.readings) == (8, 8 * READINGS)
    assert (held.kept_readings, held.delivered_readings, held.gapped_readings) == (9 * READINGS, READINGS, 0)
    told = asked(tmp_path)
    assert told.exit_code == 0
    assert "waiting    16 readings in 8 frames" in told.output
    assert "bulk     8 readings in 4 frames" in told.output
    assert "kept 18 = delivered 2 + in gaps 0 + waiting 16" in told.output


def test_losses_are_listed_with_reason_and_time(tmp_path: Path) -> None:
    clock = StillClock()
    store = opened(tmp_path, clock, max_age_ns=3600 * S)
    store.commit(mixed([], [1, 2, 3], []), (), 0)
    clock.pass_s(7200)
    store.commit(Group([], [], clocks=[clock.read()]), (), 0)
    clock.pass_s(7200)
    store.commit(mixed([], [4], []), (), 0)
    store.close()
    (held,), _ = buffer_look.look(tmp_path)
    assert held.gaps == 1
    (gap,) = held.newest_gaps
    assert (gap.reason, gap.priority, gap.scans, gap.readings) == ("expired", "normal", 3, 3 * READINGS)
    assert gap.from_ns is not None
    told = asked(tmp_path)
    assert "expired: 6 readings in 3 scans of normal boiler, 2023-11-14 2" in told.output


def test_json_has_the_same_numbers(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.commit(mixed([1], [2], [3]), (), 0)
    store.close()
    told = json.loads(asked(tmp_path, "--json").output)
    assert told["files"][0]["readings"] == 3 * READINGS
    assert [row["priority"] for row in told["files"][0]["priorities"]] == ["alarm", "normal", "bulk"]
    assert told["running"] is False


def test_a_folder_without_a_buffer_and_a_file_that_is_none_are_told(tmp_path: Path) -> None:
    missing = asked(tmp_path)
    assert missing.exit_code == 2
    assert "give --state-dir" in missing.output
    (tmp_path / "buffer.db").write_bytes(b"not a database at all, but long enough" * 100)
    broken = asked(tmp_path)
    assert broken.exit_code == 1
    assert "! buffer.db: file is not a database" in broken.output


def test_looking_changes_nothing_and_does_not_disturb_a_writer(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.commit(mixed([], [1, 2], []), (), 0)
    before = (tmp_path / "buffer.db").read_bytes()
    assert asked(tmp_path).exit_code == 0
    store.commit(mixed([], [3], []), (), 0)
    assert store.ledger.held_frames == 3
    assert (tmp_path / "buffer.db").read_bytes()[:100] == before[:100]
    store.close()


def test_nothing_is_dropped_that_salvage_is_not_done_with(tmp_path: Path) -> None:
    opened(tmp_path).close()
    aside = tmp_path / "buffer.db.damaged-20261123T101112Z"
    aside.write_bytes(b"x" * 4096)
    told = asked(tmp_path, "drop-damaged", "--yes")
    assert told.exit_code == 0
    assert "stays" in told.output
    assert aside.exists()
    aside.with_name(aside.name + ".told").write_text("100 of 100 readings came back\n")
    assert "100 of 100" in asked(tmp_path).output
    told = asked(tmp_path, "drop-damaged", "--yes")
    assert "1 removed" in told.output
    assert not aside.exists()


def test_the_file_is_brought_to_the_schema_of_an_older_agent_and_back(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.commit(mixed([1], [2], [3]), (), 0)
    refused = asked(tmp_path, "schema", "1")
    assert refused.exit_code == 2
    assert "stop it first" in refused.output
    store.close()
    assert "none removed" in asked(tmp_path, "schema", "1").output
    assert asked(tmp_path, "schema", "99").exit_code == 2
    assert asked(tmp_path, "schema", "2").exit_code == 0
    (held,), _ = buffer_look.look(tmp_path)
    assert held.readings == 3 * READINGS
    assert asked(tmp_path / "nowhere", "schema", "1").exit_code == 2
