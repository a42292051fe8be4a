"""`make bench`: runs every `bench_*.py` beside this file, one after the other, each in a process of its own.

A benchmark prints its figures itself, each as a ratio to a raw baseline of the same run: this machine's speed drifts,
a ratio drifts less. Nothing here passes or fails on a speed; a benchmark that cannot run is a failure.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def main(wanted: list[str]) -> int:
    names = sorted(file.stem for file in HERE.glob("bench_*.py"))
    unknown = [word for word in wanted if not any(word in name for name in names)]
    if unknown:
        print(f"no benchmark is named like {unknown[0]!r}; there are: {', '.join(names)}", file=sys.stderr)
        return 2
    names = [name for name in names if not wanted or any(word in name for word in wanted)]
    print(
        f"# {platform.platform()}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}",
        flush=True,
    )
    failed = []
    for name in names:
        print(f"\n## {name}", flush=True)
        started = time.monotonic()
        if subprocess.run(
            [sys.executable, "-m", f"tests.benchmarks.{name}"], cwd=HERE.parents[1], check=False
        ).returncode:
            failed.append(name)
        print(f"({time.monotonic() - started:.0f} s)", flush=True)
    for name in failed:
        print(f"{name}: did not run to its end", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
