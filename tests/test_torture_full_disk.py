"""A disk that fills up and one that goes read-only: one round of `python -m tests.torture.full_disk`, and the whole
cloud on a full disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def test_a_full_and_a_read_only_disk_stop_nothing_for_good_and_every_loss_is_told() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.torture.full_disk", "--rounds", "1"],
        capture_output=True, text=True, timeout=110, check=False, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "round 1:" in done.stdout


@pytest.mark.timeout(240)
def test_a_cloud_on_a_full_disk_acknowledges_only_what_it_holds_says_so_and_goes_on_when_there_is_room() -> (
    None
):
    done = subprocess.run(
        [sys.executable, "-m", "tests.torture.full_disk", "--cloud", "https"],
        capture_output=True, text=True, timeout=220, check=False, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "https:" in done.stdout
