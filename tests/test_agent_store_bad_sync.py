"""A sync that fails, wherever the buffer syncs: nothing kept is lost, and no descriptor is trusted again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from config.failed_sync import write_log_again
from tests.torture.recording import library

ROOT = Path(__file__).parent.parent
SHIM = ROOT / "tests" / "torture" / "bad_fsync.c"
EVERY = int(os.environ.get("HEADGATE_BAD_SYNC_EVERY", "3"))  #: 1: each place, in a minute and a half


def tried(folder: Path, at: int, times: int, module: str = "tests.fakes.bad_sync") -> tuple[list[str], int]:
    """What is wrong with a run whose `at`-th sync, and the `times` - 1 after it, fail; and how many syncs it made."""
    folder.mkdir()
    log = folder.with_suffix(".log")
    bad = {
        "BAD_SYNC_FOLDER": str(folder),
        "BAD_SYNC_LOG": str(log),
        "BAD_SYNC_AT": str(at),
        "BAD_SYNC_FOR": str(times),
    }
    done = subprocess.run(
        [sys.executable, "-m", module, str(folder)], cwd=ROOT, timeout=60, check=False,
        capture_output=True, text=True, env={**os.environ, **bad, "LD_PRELOAD": str(library(SHIM))},
    )  # fmt: skip
    assert done.returncode == 0, f"sync {at}, {times} times: {done.stderr}"
    *kept, last = done.stdout.splitlines()
    told = json.loads(last)
    wrong = [f"gap: {gap}" for gap in told["gaps"]]
    numbers = [int(word) for line in kept for word in line.split()[1:]]
    if sorted(told["got"]) != numbers:
        wrong.append(f"kept {len(numbers)} scans, delivered {len(told['got'])}")
    syncs, failed, logged = 0, set(), False
    for what, fd, *more in map(str.split, log.read_text().splitlines()):
        if what == "close":
            failed.discard(fd)
            continue
        syncs += 1
        logged = logged or more[1].endswith("-wal")
        if (
            fd in failed and logged
        ):  # until there is a log, SQLite rolls back by itself, in a file that holds nothing yet
            wrong.append(f"{more[1]} was synced again on a descriptor on which that had failed")
        if more[0] == "-1":
            failed.add(fd)
    return [f"sync {at}, {times} times: {each}" for each in wrong], syncs


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.timeout(300)
def test_a_sync_that_fails_costs_nothing_and_is_never_tried_again_on_its_descriptor(
    tmp_path: Path, times: int
) -> None:
    none, syncs = tried(tmp_path / "sound", 0, 0)
    assert none == []
    assert syncs > 100
    places = range(times, syncs + 1, EVERY * times)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda at: tried(tmp_path / f"at-{at}", at, times)[0], places))
    assert [each for wrong in found for each in wrong] == []


def test_a_log_is_written_over_with_the_same_bytes(tmp_path: Path) -> None:
    log = tmp_path / "buffer.db-wal"
    write_log_again(tmp_path / "buffer.db")
    assert not log.exists()
    data = os.urandom(3 * 2**20 + 17)
    log.write_bytes(data)
    before = log.stat()
    write_log_again(tmp_path / "buffer.db")
    assert log.read_bytes() == data
    assert (log.stat().st_ino, log.stat().st_size) == (before.st_ino, before.st_size)
