"""Disks that fill up and disks that go read-only, for real: ext4 on loop devices under the agent's buffer and the
cloud's journal.

    python -m tests.torture.full_disk [--rounds 5] [--record]        (as root: it mounts, in a namespace of its own)
    python -m tests.torture.full_disk --agent [WHAT] [--record]      (the whole agent as a process: full_disk_agent)
    python -m tests.torture.full_disk --cloud [WHAT] [--record]      (the whole cloud as a process: full_disk_cloud)

A round: readings flow from the buffer into the journal; the gateway's disk is filled to its last byte by a foreign
file, and emptied; then the cloud's; then the gateway's file system gives up (an ext4 error: read-only), is checked and
mounted again, as after a restart.

Rules:
1. Nobody crashes, and nobody is helped: what the disk refuses is refused upward, and all goes on when there is room.
2. At the end: appended = in the journal + in gaps (evicted, overrun), each reading once. A gap is in the journal, too.
3. On a disk that is full or read-only what was sent is still acknowledged and drained, and the buffer says so in 5 s.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from agent.buffer import Buffer, Condition
from agent.clock import SystemClock
from cloud.journal.contract import Entry, JournalFull
from cloud.journal.sqlite import SqliteJournal
from config.agent import Buffer as BufferSettings
from sync.wire import Ack, GapFrame, decode_frame, open_body
from tests.fakes.buffer import GATEWAY, PACKING, READINGS, number_of, scan
from tests.torture.report import Finding, record

DISK_MB: Final = 24
ALARM_S: Final = 5.0
_INSIDE: Final = "HEADGATE_FULL_DISK_INSIDE"
_PROMISES: Final = {
    "agent": "an agent on a full or read-only disk runs on, sends what it holds, and says what is wrong",
    "cloud": "a cloud on a full or read-only disk acknowledges only what it holds, says what is wrong, and goes on",
}


class FullDiskError(AssertionError):
    """What was promised and is not so."""


def must(holds: object, what: object) -> None:
    if not holds:
        raise FullDiskError(str(what))


def _run(*words: str | Path) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    must(done.returncode == 0, f"{' '.join(map(str, words))}: {done.stderr.strip()}")


def loop_fails(folder: Path) -> str:
    """Why an ext4 file cannot be mounted and made to fail here; "" where it can."""
    try:
        disk = Disk(folder, "trial", ext4=True)
    except FullDiskError as err:
        return str(err)
    try:
        return "" if os.access(disk.fault(), os.W_OK) else f"{disk.fault()} cannot be written"
    finally:
        disk.unmount()


class Disk:
    """ext4 in a file; where that cannot be mounted, memory of the same size."""

    def __init__(self, folder: Path, name: str, *, ext4: bool, size_mb: int = DISK_MB) -> None:
        self.image, self.path = folder / f"{name}.img", folder / name
        self.path.mkdir()
        if not ext4:
            _run("mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", self.path)
            return
        with self.image.open("wb") as file:
            file.truncate(size_mb * 2**20)
        _run("mkfs.ext4", "-q", "-F", "-m", "0", self.image)
        self.mount()

    def mount(self) -> None:
        _run("mount", "-o", "loop,errors=remount-ro", self.image, self.path)

    def unmount(self) -> None:
        _run("umount", self.path)

    def fill(self) -> None:
        with (self.path / "foreign").open("wb", buffering=0) as foreign, contextlib.suppress(OSError):
            while True:
                foreign.write(bytes(4096))

    def free(self) -> None:
        (self.path / "foreign").unlink()

    def fault(self) -> Path:
        """What is written to for an error to be found (Linux, Documentation/ABI/testing/sysfs-fs-ext4)."""
        found = subprocess.run(
            ["findmnt", "-n", "-o", "SOURCE", self.path],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        return Path("/sys/fs/ext4", Path(found.stdout.strip()).name, "trigger_fs_error")

    def give_up(self) -> None:
        """The kernel finds an error and makes it read-only, under whoever writes there."""
        self.fault().write_text("1")

    def repair(self) -> None:
        self.unmount()
        subprocess.run(["fsck.ext4", "-p", "-f", self.image], capture_output=True, check=False, timeout=60)
        self.mount()


class Round:
    def __init__(self, folder: Path, *, ext4: bool) -> None:
        self.ext4 = ext4
        self.gateway, self.cloud = Disk(folder, "gateway", ext4=ext4), Disk(folder, "cloud", ext4=ext4)
        self.number = self.refused = self.journal_full = 0
        self.alarm_s = 0.0

    async def open(self) -> None:
        settings = BufferSettings(max_mb=10, free_disk_mb=0, ballast_kb=1024, commit_interval_s=0.01)
        self.buffer = await Buffer.open(self.gateway.path / "buffer.db", GATEWAY, settings, SystemClock())
        self.buffer.register(PACKING.layout)
        self.running = asyncio.create_task(self.buffer.run())

    async def close(self) -> None:
        self.running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.running
        await self.buffer.close()

    async def read(self, scans: int, *, size: int = 600) -> None:
        for _ in range(scans):
            if not self.buffer.append(scan(self.number, boot=self.buffer.boot, size=size), READINGS):
                self.refused += 1
            self.number += 1
        await self.buffer.commit()

    async def send(self, journal: SqliteJournal, *, rounds: int = 1) -> int:
        """As the forwarder does; how many batches the cloud took."""
        taken = 0
        for _ in range(rounds):
            batches = []
            for bounds in self.buffer.recorded():
                batches += await self.buffer.rebuild(bounds)
            batches += await self.buffer.claim(4)
            if not batches:
                break
            for batch in batches:
                s = batch.sealed
                entry = Entry(
                    str(GATEWAY), s.epoch, s.first, s.last, batch.readings, time.time_ns(), s.payload
                )
                try:
                    await journal.append([entry])
                except JournalFull:
                    self.journal_full += 1
                    continue
                self.buffer.settle(Ack(s.epoch, ((s.first, s.last),)))
                taken += 1
            await self.buffer.commit()
        return taken

    async def run(self) -> dict[str, int]:
        journal = SqliteJournal(self.cloud.path / "journal.db", max_bytes=2**30, free_disk_bytes=2**20)
        await journal.open()
        await self.open()
        for _ in range(10):
            await self.read(200)
            await self.send(journal)

        for _ in range(10):
            await self.read(200)  # not sent yet
        self.gateway.fill()
        for _ in range(60):
            await self.read(250)
        state = self.buffer.state
        must(state.condition is not Condition.OK, f"a full disk, and the buffer says {state.condition}")
        must(await self.send(journal, rounds=3), "acknowledged data must drain from a full disk")
        self.gateway.free()
        await self._until_well()

        self.cloud.fill()
        before = journal.last_offset
        for _ in range(10):
            await self.read(50)
            await self.send(journal)
        must(self.journal_full, "a full journal must refuse")
        must(journal.last_offset == before, "a full journal took something")
        held = self.buffer.state.buffered_frames
        must(held >= 500, f"what the cloud refused must wait: {held}")
        self.cloud.free()
        must(await self.send(journal, rounds=3), "the journal must take again when there is room")

        pending, first_lost = 0, self.number
        if self.ext4:
            pending, first_lost = await self._read_only(journal)
        await self.read(100)
        for _ in range(400):
            if not await self.send(journal, rounds=4) and not self.buffer.state.buffered_frames:
                break
            await self.buffer.commit()
        must(self.buffer.state.buffered_frames == 0, self.buffer.state)
        figures = await self._account(journal, pending, first_lost)
        await self.close()
        await journal.close()
        self.gateway.unmount()
        self.cloud.unmount()
        return figures

    async def _read_only(self, journal: SqliteJournal) -> tuple[int, int]:
        """How many frames were in memory when the agent was restarted, and the first number read after that."""
        await self.read(300)
        waiting = await self.buffer.claim(2)
        must(waiting, "there is something to send")
        self.gateway.give_up()
        began_s = time.monotonic()
        while self.buffer.state.condition is not Condition.HOLDING:
            must(time.monotonic() - began_s < ALARM_S, "a read-only disk was not noticed in 5 s")
            await self.read(1)
            await asyncio.sleep(0.02)
        self.alarm_s = max(self.alarm_s, time.monotonic() - began_s)
        must(await self.send(journal), "what is recorded must drain from a read-only disk")
        pending = (
            self.buffer.state.pending_frames
        )  # in memory: a restart loses them, and nobody was promised them
        first_lost = self.number
        await self.close()
        self.gateway.repair()
        await self.open()
        must(self.buffer.state.condition is not Condition.HOLDING, self.buffer.state)
        return pending, first_lost

    async def _until_well(self) -> None:
        deadline_s = time.monotonic() + 30
        while self.buffer.state.condition is Condition.HOLDING or self.buffer.state.pending_frames:
            must(
                time.monotonic() < deadline_s,
                f"the disk has room again, and the buffer does not: {self.buffer.state}",
            )
            await asyncio.sleep(0.05)

    async def _account(self, journal: SqliteJournal, pending: int, first_lost: int) -> dict[str, int]:
        """From what the journal holds, and nothing else."""
        numbers: collections.Counter[int] = collections.Counter()
        gaps: collections.Counter[str] = collections.Counter()
        after = 0
        while rows := await journal.read(after, max_entries=1000, max_bytes=2**24):
            after = rows[-1].offset
            for row in rows:
                _, body = open_body(row.payload)
                for seq, raw in enumerate(body.frames, row.first):
                    if not any(a <= seq <= b for a, b in row.fresh):
                        continue
                    number, frame = number_of(raw), decode_frame(raw)
                    if number is not None:
                        numbers[number] += 1
                    elif isinstance(frame, GapFrame):
                        gaps[frame.reason] += frame.readings
        must(max(numbers.values()) == 1, "a reading came twice")
        told = sum(gaps.values())
        delivered = len(numbers) * READINGS
        silent = self.number * READINGS - delivered - told
        must(
            0 <= silent <= pending * READINGS,
            f"appended {self.number * READINGS}, delivered {delivered}, in gaps {dict(gaps)}: {silent} are neither,"
            f" and {pending * READINGS} were in memory at the restart",
        )
        must(set(gaps) <= {"evicted", "overrun"}, dict(gaps))
        missing = [n for n in range(first_lost, self.number) if n not in numbers]
        must(not missing, f"read after the repair and not delivered: {missing[:5]}")
        return {
            "readings appended": self.number * READINGS, "delivered": delivered, "told as gaps": told,
            "in memory when the disk had died and the agent restarted": silent,
            "refusals by the full journal": self.journal_full,
        }  # fmt: skip


def inside(rounds: int, recorded: bool) -> int:
    began_s = time.monotonic()
    total: collections.Counter[str] = collections.Counter()
    alarm_s, passed = 0.0, True
    with tempfile.TemporaryDirectory(prefix="headgate-full-") as name:
        why = loop_fails(Path(name))
    if why:
        print(f"no ext4 on a loop device here ({why}): in memory, and WITHOUT the read-only part", flush=True)
    for number in range(rounds):
        with tempfile.TemporaryDirectory(prefix="headgate-full-") as name:
            one = Round(Path(name), ext4=not why)
            try:
                total.update(asyncio.run(one.run()))
            except FullDiskError as err:
                print(f"round {number + 1}: VIOLATED: {err}", flush=True)
                passed = False
                for disk in (one.gateway, one.cloud):
                    subprocess.run(["umount", "-l", disk.path], capture_output=True, check=False, timeout=60)
                break
            alarm_s = max(alarm_s, one.alarm_s)
            print(f"round {number + 1}: {dict(total)}; read-only noticed in {alarm_s:.2f} s", flush=True)
    if recorded:
        record(
            Finding(
                proof="full_disk",
                promise="a full or read-only disk stops nothing for good, and every reading dropped is told",
                command=f"python -m tests.torture.full_disk --rounds {rounds}",
                passed=passed,
                figures={
                    "rounds": rounds,
                    "file system": "tmpfs" if why else "ext4",
                    **total,
                    "read-only noticed in at most, s": round(alarm_s, 2),
                },
                took_s=time.monotonic() - began_s,
            )
        )
    print("full_disk:", "passed" if passed else "FAILED", flush=True)
    return 0 if passed else 1


def inside_process(who: str, what: str, recorded: bool) -> int:
    from tests.torture import full_disk_agent, full_disk_cloud
    from tests.torture.full_disk import FullDiskError as Violated

    module = full_disk_agent if who == "agent" else full_disk_cloud
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="headgate-full-") as name:
        why = loop_fails(Path(name))
    shown: dict[str, str] = {}
    passed = True
    try:
        shown = module.every(module.WHAT if what == "all" else (what,), ext4=not why)
    except Violated as err:  # as the main module this one has an error of its own
        print(f"VIOLATED: {err}", flush=True)
        passed = False
    if recorded:
        record(
            Finding(
                proof=f"full_disk_{who}",
                promise=_PROMISES[who],
                command=f"python -m tests.torture.full_disk --{who}",
                passed=passed,
                figures={"file system": "tmpfs" if why else "ext4", **shown},
                took_s=time.monotonic() - began_s,
            )
        )
    print(f"full_disk --{who}:", "passed" if passed else "FAILED", flush=True)
    return 0 if passed else 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture.full_disk", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="write the figures for docs/reliability.md")
    parser.add_argument(
        "--agent", nargs="?", const="all", metavar="WHAT", help="the whole agent: all, or one of them"
    )
    parser.add_argument(
        "--cloud", nargs="?", const="all", metavar="WHAT", help="the whole cloud: all, or one of them"
    )
    args = parser.parse_args(argv)
    for who in ("agent", "cloud"):
        if os.environ.get(_INSIDE) and (what := getattr(args, who)):
            return inside_process(who, what, args.record)
    if os.environ.get(_INSIDE):
        return inside(args.rounds, args.record)
    alone = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    words = [
        *alone,
        sys.executable,
        "-m",
        "tests.torture.full_disk",
        *(sys.argv[1:] if argv is None else argv),
    ]
    return subprocess.run(words, env={**os.environ, _INSIDE: "1"}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
