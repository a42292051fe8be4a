"""A process that commits to an archive and prints its anonymous memory, in KiB, after each hundred commits.

`python -m tests.archive_growth FOLDER COMMITS`; tests/test_cloud_memory.py runs it, as the allocators are set up once.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from cloud.sinks.archive import ArchiveSink
from cloud.sinks.contract import ScanRecord
from config.cloud import Archive
from sync.wire import Layout, layout_id

S = 1_000_000_000
AT = 1_763_000_000 * S
LAYOUT = Layout(
    "boiler", "modbus", "heat", ("flow", "pump"), ("f64", "bool"), ("", ""), (1.0,) * 2, (0.0,) * 2
)
SCANS = 96


def anonymous_kib() -> int:
    # proc(5): what the heaps hold, whoever allocated it; libraries mapped from files are not in it.
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


async def main(folder: Path, commits: int) -> None:
    sink = ArchiveSink(Archive(), folder)
    await sink.open()
    identity = layout_id(LAYOUT)
    for n in range(1, commits + 1):
        seqs = range(n * SCANS, (n + 1) * SCANS)
        scans = [
            ScanRecord(
                seq,
                "acme",
                "plant-1",
                7,
                seq,
                LAYOUT,
                identity,
                AT + seq * S,
                True,
                AT,
                [seq + 0.5, True],
                {},
            )
            for seq in seqs
        ]
        await sink.write(scans, seqs[-1])
        if n % 100 == 0:
            print(anonymous_kib(), flush=True)
    await sink.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
