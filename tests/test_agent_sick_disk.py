"""A disk that is read-only stops nothing: what it holds goes out, new readings wait in memory, losses are told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("what", ["start", "first", "running"])
def test_a_read_only_disk_lets_out_what_it_holds_and_loses_nothing_in_silence(
    what: str, tmp_path: Path
) -> None:
    if what == "running" and not Path("/sys/fs/ext4").is_dir():
        pytest.skip("this kernel has no ext4 that can be made to fail (/sys/fs/ext4)")
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-m", "tests.fakes.sick_disk", what, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("ok\n")
