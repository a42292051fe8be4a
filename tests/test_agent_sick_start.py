"""The agent as a process on a state folder that takes no writes: it runs, sends what is held and says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("what", ["readonly-start", "full-start"])
def test_an_agent_that_starts_on_a_sick_disk_runs_drains_and_says_so(what: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.torture.full_disk", "--agent", what],
        cwd=ROOT, capture_output=True, text=True, timeout=115, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{what}:" in done.stdout
