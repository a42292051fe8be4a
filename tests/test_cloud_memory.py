"""`headgate-cloud serve` with every kind of work at once and a database that falls silent: memory, and the end."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cloud.runner import CLOSE_S
from cloud.server import LEAVE_S
from config.cloud import Limits
from drivers.contract import Point, Scan, ValueType
from sync.uplink import RetryLater
from sync.wire import ClockRow, Packing, Sealed, encode_scan, layout_of, seal
from tests.fakes.batches import EPOCH
from tests.servers import run
from tests.test_cloud_server import NAME, Served, secret

POINTS = tuple(Point(name=f"p{i}", type=ValueType.U32) for i in range(4096))
PACKING = Packing(layout_of("wide", "modbus", "wide", POINTS))
FRAME_BYTES = 4 * len(POINTS)
FRAMES = 12  # of 16 KiB that do not compress: batches of 200 kB
BATCHES = 1_050
DRAIN_S = 2.0
S = 1_000_000_000


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def make(*, extra: str = "", server: str = "") -> Served:
        made.append(Served(tmp_path, extra=extra, server=server))
        return made[-1]

    yield make
    for one in made:
        if one.process is not None:
            one.process.kill()
            one.process.wait()


def batches(first: int, last: int, clock: ClockRow) -> Iterator[Sealed]:
    """Each reads as `FRAMES` scans of numbers at random; every eighth batch holds the same frames as new ones."""
    rng = random.Random(7)
    frames = [
        encode_scan(PACKING, Scan(n * S // 20, POINTS, array("I", rng.randbytes(FRAME_BYTES)).tolist()), 1)
        for n in range(FRAMES * 8)
    ]
    for n in range(first, last):
        at = n % 8 * FRAMES
        yield seal(
            str(NAME), EPOCH, n * FRAMES + 1, frames[at : at + FRAMES], [PACKING.layout], [clock],
            FRAMES * len(POINTS),
        )  # fmt: skip


async def flood(up: Served, first: int, last: int, clock: ClockRow) -> int:
    """How many bytes the server has taken and acknowledged."""
    uplink = up.uplink()
    await uplink.open()
    waiting = batches(first, last, clock)
    taken = 0

    async def lane() -> None:
        nonlocal taken
        for sealed in waiting:
            while True:
                try:
                    await uplink.send(sealed)
                    break
                except RetryLater:
                    await asyncio.sleep(0.05)
            taken += len(sealed.payload)

    await asyncio.gather(*(lane() for _ in range(16)))
    await uplink.close()
    return taken


@pytest.mark.timeout(240)  # half a minute, on a machine that does nothing else
def test_two_hundred_megabytes_with_a_database_that_falls_silent_cost_no_more_memory_than_is_allowed(
    served: Callable[..., Served], start: run.Starter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    maria = start(run.mariadb())
    word = secret(tmp_path, "mysql-word", maria.password)
    up = served(
        extra=f'[mysql]\nhost = "127.0.0.1"\nport = {maria.port}\nuser = "{maria.user}"\n'
        f'database = "{maria.database}"\npassword_file = "{word}"\n[archive]\ncommit_interval_s = 2.0\n'
        "[limits]\ngateway_readings_per_s = 0\ngateway_mb_per_s = 0\n"  # as fast as it can
    )
    up.config.write_text(up.config.read_text().replace("drain_s = 20.0", f"drain_s = {DRAIN_S}"))
    up.start()
    clock = ClockRow(1, "boot", 0, time.time_ns() - 7200 * S, True)
    taken = asyncio.run(flood(up, 0, 50, clock))
    deadline = time.monotonic() + 40
    while not up.metrics()['headgate_sink_records_total{sink="mysql"}']:
        assert time.monotonic() < deadline, up.log.read_text()
        time.sleep(0.05)
    maria.process.pause()
    try:
        taken += asyncio.run(flood(up, 50, BATCHES, clock))
        before = up.metrics()
        assert taken > 200e6
        while True:  # the other two go on
            now = up.metrics()
            went = [
                now[key] - before[key]
                for key in (
                    f'headgate_sink_readings_total{{sink="{sink}"}}' for sink in ("embedded", "archive")
                )
            ]
            if min(went) > 100_000:
                break
            assert time.monotonic() < deadline + 30, went
            time.sleep(0.2)
        peak_mb = up.memory_mb("VmHWM")
        with capsys.disabled():
            print(f" [{taken / 1e6:.0f} MB taken, peak {peak_mb:.0f} MiB] ", end="")
        assert peak_mb <= Limits().memory_mb
        began = time.monotonic()
        assert up.end(timeout_s=60) == 0
        took_s = time.monotonic() - began
        with capsys.disabled():
            print(f"[ended in {took_s:.1f} s] ", end="")
        assert took_s < DRAIN_S + CLOSE_S + LEAVE_S + 5.0
    finally:
        maria.process.resume()


def test_the_archives_commits_do_not_make_the_process_grow(tmp_path: Path) -> None:
    """With the allocators as the libraries choose them it is 5 to 10 MiB; and never an end."""
    plain = {name: value for name, value in os.environ.items() if name != "_RJEM_MALLOC_CONF"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.archive_growth", str(tmp_path / "archive"), "200"],
        env=plain, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=110, check=True,
    )  # fmt: skip
    first_kib, second_kib = map(int, done.stdout.split())
    assert second_kib - first_kib < 3 * 1024
