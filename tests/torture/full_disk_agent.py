"""The agent as a process on a sick disk: an ext4 of its own as the state folder, simulated devices, HTTPS to the real
cloud. Run by `python -m tests.torture.full_disk --agent`, in a mount namespace.

    running          ext4 turns read-only under the running agent; it is checked, mounted again, the agent restarted
    full             the disk fills up under the running agent, and is given room again
    full-start       the disk is full at the start, with readings held, and gets room while the agent runs
    readonly-start   the state folder is read-only at the start, with readings held, and heals while the agent runs

Rules: all that was kept is in the end in both sinks once, or a gap; the process never ends by itself; status and cloud
show the code; what is held drains; when the disk takes writes again all is well without a restart, but for an ext4 that
gave up: that one the kernel keeps read-only.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tests.servers.process import wait_until
from tests.system.child import BIN, Child
from tests.system.codes import Watch
from tests.system.rig import Rig, whole_system
from tests.torture.full_disk import Disk, FullDiskError, must

WHAT: Final = ("running", "full", "full-start", "readonly-start")
SHOWN_S: Final = 5.0
_FULL_CODES: Final = "disk_full|disk_low|buffer_full"  #: which of them depends on what of it had to go
SLACK: Final = 3.0  #: of a machine that does other things too
AGENT_DISK_MB: Final = 224  #: above what the buffer leaves free by default


class Process:
    """The agent and the three places where its trouble shows."""

    def __init__(self, rig: Rig, disk: Disk) -> None:
        self.rig, self.disk = rig, disk
        self.agent: Child = rig.children["agent"]
        self.watch = Watch(rig)

    def now(self) -> dict[str, Any]:
        """The agent's own word: the file may be old."""
        done = subprocess.run(
            [str(BIN / "headgate"), "status", "--config", str(self.rig.folder / "agent.toml"), "--json"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        told: dict[str, Any] = json.loads(done.stdout)
        return told

    def buffer(self) -> dict[str, Any]:
        found: dict[str, Any] = self.now()["status"]["buffer"]
        return found

    def codes(self) -> set[str]:
        return {problem["code"] for problem in self.now()["problems"]}

    def until(self, holds: Callable[[], bool], within_s: float, what: str) -> float:
        began_s = time.monotonic()

        def looked() -> bool:
            self.agent.check()
            return holds()

        wait_until(looked, timeout_s=within_s * SLACK, what=what)
        return time.monotonic() - began_s

    def shows(self, code: str) -> str:
        here = self.until(lambda: bool(self.codes() & set(code.split("|"))), SHOWN_S, f"status shows {code}")
        far = self.until(
            lambda: bool(self.watch.cloud() & set(code.split("|"))), 15, f"the cloud shows {code}"
        )
        return f"{code} in status after {here:.1f} s, in the cloud {far:.1f} s later"

    def well(self, codes: str) -> float:
        """All that waited is delivered, and new readings are."""
        gone = set(codes.split("|"))
        took = self.until(lambda: not (self.codes() | self.watch.cloud()) & gone, 20, f"{codes} to clear")
        mark = self.buffer()["settled_readings"]
        self.until(lambda: self.buffer()["settled_readings"] > mark + 100, 20, "readings to flow again")
        return took

    def stop(self) -> None:
        must(self.agent.end(signal.SIGTERM) == 0, "the agent must leave in order")

    def hold(self) -> None:
        """A backlog: the cloud is away for a while, and the agent is stopped with what it holds."""
        self.rig.links["uplink"].set(refuse=True)
        self.rig.links["uplink"].cut()
        self.until(lambda: self.waiting() > 3000, 30, "a backlog")
        self.stop()
        self.rig.links["uplink"].heal()

    def answers(self) -> bool:
        """Whether the agent itself says how it is."""
        told = self.now()["status"]
        return bool(told["pid"] == self.pid and told["state"] == "running")

    @property
    def pid(self) -> int:
        return 0 if self.agent.process is None else self.agent.process.pid

    def read_so_far(self) -> int:
        """Kept, in memory, or counted as lost: what the devices gave in any case."""
        held = self.buffer()
        return int(held["kept_readings"] + held["pending_readings"] + held["overrun_readings"])

    def waiting(self) -> int:
        held = self.buffer()
        return int(held["kept_readings"] - held["settled_readings"] - held["gapped_readings"])

    def drains(self) -> float:
        """What was kept before: on a disk that takes no writes the count of what is settled stays in memory."""
        return self.until(lambda: self.stored() >= self.held, 30, f"{self.held} readings in the cloud")

    def stored(self) -> int:
        return self.rig.count_embedded()

    held: int = 0


def _running(one: Process) -> str:
    one.disk.give_up()
    shown = one.shows("disk_readonly")
    in_place = subprocess.run(
        ["mount", "-o", "remount,rw", one.disk.path], capture_output=True, text=True, timeout=60, check=False
    )
    healed = ""
    if in_place.returncode == 0 and os.access(one.disk.path, os.W_OK):
        try:
            healed = f"; mounted for writing in place, well after {one.well('disk_readonly'):.1f} s without a restart"
        except TimeoutError:
            healed = ""
    if not healed:
        one.stop()
        one.disk.repair()
        one.agent.start()
        took_s = one.well("disk_readonly")
        healed = f"; the kernel keeps it read-only; after a check and a restart well in {took_s:.1f} s"
    return shown + healed


def _full(one: Process) -> str:
    one.disk.fill()
    shown = one.shows("disk_full")
    one.disk.free()
    return f"{shown}; well {one.well(_FULL_CODES):.1f} s after there is room"


def _full_start(one: Process) -> str:
    one.hold()
    one.held = kept_by(one)
    one.disk.fill()
    began_s = time.monotonic()
    one.agent.start()
    begun_s = one.until(one.answers, 10, "the agent to answer")
    mark = one.read_so_far()
    one.until(lambda: one.read_so_far() > mark, 5, "devices to be read on a full disk")
    reading_s = time.monotonic() - began_s
    drained_s = one.drains()
    shown = one.shows("disk_full")
    told_s = time.monotonic() - began_s
    must(told_s < 30 * SLACK, f"disk_full after {told_s:.1f} s")
    one.disk.free()
    well_s = one.well(_FULL_CODES)
    return (
        f"answers after {begun_s:.1f} s, reads after {reading_s:.1f} s; {one.held} held readings drained in "
        f"{drained_s:.1f} s more; {shown}, {told_s:.1f} s after the start; well {well_s:.1f} s after there is room"
    )


def _readonly_start(one: Process) -> str:
    one.hold()
    one.held = kept_by(one)
    remount(one.disk, "ro")
    one.agent.start()
    one.until(one.answers, 10, "the agent to answer though its state folder takes no socket")
    shown = one.shows("disk_readonly")
    mark = one.read_so_far()
    one.until(lambda: one.read_so_far() > mark, 5, "devices to be read on a read-only disk")
    drained = one.drains()
    one.agent.check()
    remount(one.disk, "rw")
    return f"{shown}; {one.held} held readings drained in {drained:.1f} s; well {one.well('disk_readonly'):.1f} s after"


def account(rig: Rig) -> str:
    """All that was ever kept is in both sinks once, or in a gap that is there too."""
    account = rig.finish()
    for name, held in account.held.items():
        must(not held.doubled, f"doubled in {name}: {account}")
        must(held.rows == account.kept - account.gapped, f"lost in {name}: {account}")
    gapped: int = rig.status()["buffer"]["gapped_frames"] - account.passed_over
    must(account.holes == gapped, f"holes that {gapped} frames in gaps do not explain: {account}")
    return f"kept {account.kept}, of them {account.gapped} in gaps, the others in each sink once"


def kept_by(one: Process) -> int:
    """By its last word."""
    held = one.rig.status()["buffer"]
    return int(held["kept_readings"] - held["gapped_readings"])


def remount(disk: Disk, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", disk.path], check=True, timeout=60)


def one(what: str, *, ext4: bool) -> str:
    with tempfile.TemporaryDirectory(prefix="headgate-sick-") as name:
        folder = Path(name)
        disk = Disk(folder, "gateway", ext4=ext4, size_mb=AGENT_DISK_MB)
        try:
            with whole_system(folder, "https", stores=False, links=True, devices=4, period_ms=100) as rig:
                process = Process(rig, disk)
                try:
                    shown = {
                        "running": _running,
                        "full": _full,
                        "full-start": _full_start,
                        "readonly-start": _readonly_start,
                    }[what](process)
                    return f"{shown}; {account(rig)}"
                except (TimeoutError, AssertionError, RuntimeError) as err:
                    log = (folder / "agent.log").read_text()[-3000:]
                    raise FullDiskError(f"{what}: {err}\n{log}") from err
        finally:
            subprocess.run(["umount", "-l", disk.path], capture_output=True, check=False, timeout=60)


def every(what: tuple[str, ...], *, ext4: bool) -> dict[str, str]:
    """What each has shown."""
    shown = {}
    for name in what:
        if name == "running" and not ext4:
            print("running: no ext4 on a loop device here: NOT tried", flush=True)
            continue
        shown[name] = one(name, ext4=ext4)
        print(f"{name}: {shown[name]}", flush=True)
    return shown
