"""Killed at named places: a few of them in a real run here; all of them by `python -m tests.torture.crash_points`."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.torture.crash_points import DRIVERS, ROOT, SINK, Driven, Result, in_rig, places

SEED = 5


def test_each_name_stands_once_and_each_driver_has_its_place() -> None:
    names = {place.name for place in places()}
    assert len(names) >= 50
    assert set(DRIVERS) <= names
    assert {name.partition(".")[0] for name in names} >= {
        "store", "forwarder", "intake", "journal", "runner", "sql", "influxdb", "archive", "dead_letters",
    }  # fmt: skip
    assert sum(name.startswith(SINK) for name in names) >= 20


def test_a_name_that_stands_twice_is_told_with_both_places(tmp_path: Path) -> None:
    (tmp_path / "agent").mkdir()
    for name in ("one", "two"):
        (tmp_path / f"agent/{name}.py").write_text('reached("store.before_x")\n')
    with pytest.raises(ValueError, match=r"store\.before_x stands twice: agent/one\.py and agent/two\.py"):
        places(tmp_path)


@pytest.mark.parametrize("name", ["store.after_park", "archive.after_compact", "journal.before_trim"])
def test_killed_where_a_driver_is_needed_nothing_is_lost_or_doubled(name: str, tmp_path: Path) -> None:
    place = next(place for place in places() if place.name == name)
    folder = tmp_path / "state"
    folder.mkdir()
    assert Driven(place, folder, random.Random(SEED)).run(2) == []


@pytest.mark.timeout(240)
def test_delivery_killed_at_boundaries_of_sinks_ends_with_each_reading_once_in_each() -> None:
    words = ["-m", "tests.torture.sink_kills", "--kills", "12", "--seed", str(SEED)]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 kills at 12 of" in done.stdout


@pytest.mark.timeout(240)
def test_killed_in_buffer_journal_and_sinks_under_load_nothing_is_lost_or_doubled() -> None:
    rng = random.Random(SEED)
    by_name = {place.name: place for place in places()}
    chosen = [by_name[name] for name in ("store.before_commit", "sql.before_commit", "runner.before_cursor")]
    others = [place for place in by_name.values() if place.driver == "rig" and place not in chosen]
    chosen.append(rng.choice([place for place in others if place.part == "cloud"]))
    result = Result()
    in_rig(chosen, rng, result, stores=False, restart=True, deadline_s=time.monotonic() + 180)
    assert result.wrong == []
    assert len(result.kills) == len(chosen)
    assert result.readings > 1000
