"""`headgate run`, but with every device read again as soon as it has answered: what `bench_agent` measures.

`python -m tests.benchmarks.flat_out agent.toml`
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import msgspec

from agent import daemon
from agent.configuration import load_for_run

if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    loaded = load_for_run(Path(sys.argv[1]), None)
    built = [
        msgspec.structs.replace(made, plan=msgspec.structs.replace(made.plan, period_s=0.0, phase_s=0.0))
        for made in loaded.devices
    ]
    sys.exit(daemon.run(msgspec.structs.replace(loaded, devices=built)))
