"""How long a person waits: `--help` of the three commands, and a cold start to the first scan, offline.

Baselines of the same run: `python -c pass`, and Python with click imported.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from tests.system.child import BIN

RUNS: Final = 7


def wall_s(command: list[str]) -> float:
    """The median of several runs, after one that does not count."""
    took = []
    for _ in range(RUNS + 1):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        took.append(time.perf_counter() - began)
    return statistics.median(took[1:])


def first_scan_s() -> float:
    """From starting `headgate run` with no cloud to the first scan's own time."""
    with tempfile.TemporaryDirectory(prefix="hg-bench-") as name:
        config = Path(name) / "agent.toml"
        config.write_text(
            f'[gateway]\ntenant = "a"\nname = "b"\nstate_dir = "{name}/state"\n[uplink]\nkind = "none"\n'
            '[[device]]\nname = "d"\ndriver = "simulator"\nperiod_ms = 100\n[[device.point]]\nname = "p"\n'
        )
        began = time.time_ns()
        agent = subprocess.Popen(
            [str(BIN / "headgate"), "run", "--config", str(config)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert agent.stderr is not None
        for line in agent.stderr:
            if "first scan" in line:
                break
        took = (time.time_ns() - began) / 1e9
        agent.send_signal(signal.SIGTERM)
        agent.wait(10)
        status = json.loads((Path(name) / "state/status.json").read_bytes())
        assert status["buffer"]["kept_readings"] > 0
        return took


def main() -> None:
    bare = wall_s([sys.executable, "-c", "pass"])
    click = wall_s([sys.executable, "-c", "import click"])
    print(f"python -c pass {bare:.3f} s, with click {click:.3f} s")
    for command in ("headgate", "headgate-cloud", "headgate-release"):
        took = wall_s([str(BIN / command), "--help"])
        print(f"{command + ' --help':24} {took:.3f} s ({took / click:.1f} of a bare click)")
    print(
        f"headgate run, offline, to the first scan: {min(first_scan_s() for _ in range(3)):.2f} s (best of three)"
    )


if __name__ == "__main__":
    main()
