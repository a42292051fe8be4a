"""What is wrong shows as a code of its own, everywhere, within 30 s, and goes when the cause does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(500)
def test_each_fault_shows_its_code_wherever_an_operator_looks_and_clears(tmp_path: Path) -> None:
    alone = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    done = subprocess.run(
        [*alone, sys.executable, "-m", "tests.system.codes", str(tmp_path)],
        capture_output=True, text=True, timeout=480, check=False, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, (
        f"{done.stdout}{done.stderr}\n(needs a mount name space: run as root, or where user name spaces are allowed: "
        "sysctl kernel.unprivileged_userns_clone=1)"
    )
    assert done.stdout.endswith("ok\n")
