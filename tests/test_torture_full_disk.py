"""A disk that fills up and one that goes read-only: one round of `python -m tests.torture.full_disk`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_full_and_a_read_only_disk_stop_nothing_for_good_and_every_loss_is_told() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.torture.full_disk", "--rounds", "1"],
        capture_output=True, text=True, timeout=110, check=False, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "round 1:" in done.stdout
