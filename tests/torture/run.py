"""`make torture`: every proof at full length, one after the other; the report page at the end.

A proof that fails does not stop the others; the exit status says that one did.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Final

from tests.torture.page import main as write_pages

#: Module and arguments of each long form. `--record` writes what it found.
PROOFS: Final[Sequence[tuple[str, ...]]] = (
    ("mutations",),
    ("rot",),
    ("full_disk",),
    ("full_disk", "--agent"),
    ("full_disk", "--cloud"),
    ("power_cuts",),
    ("sinks", "--for-s", "600"),
    ("crash_points", "--each", "5"),
    ("sink_kills", "--kills", "500"),
    ("kills", "--kills", "1000"),
    ("reconnect",),
    ("flood",),
    ("simulation",),
    ("soak", "--hours", "1"),
)


def main() -> int:
    failed: list[str] = []
    for name, *more in PROOFS:
        began_s = time.monotonic()
        print(f"=== {name}", flush=True)
        done = subprocess.run([sys.executable, "-m", f"tests.torture.{name}", *more, "--record"], check=False)
        took_s = time.monotonic() - began_s
        print(f"=== {name}: {'passed' if done.returncode == 0 else 'FAILED'} in {took_s:.0f} s", flush=True)
        if done.returncode:
            failed.append(name)
    write_pages()
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
