"""Real power cuts: a guest that keeps readings on a disk of its own, killed at any moment; run by power_vm.sh.

    guest ROLE    runs inside the virtual machine: the shipped buffer on /dev/vda, its promises on the console
    host          cuts the power of one guest after another and checks each disk with the shipped code

The host's QEMU holds the disk's cache; killing it with SIGKILL leaves what the guest had flushed (cache=writeback: the
host's page cache survives, the guest's does not).
"""

from __future__ import annotations

import argparse
import base64
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.torture.buffer_workload import Mark, Truth, Workload, decode_mark, encode_mark
from tests.torture.report import Finding, record

DISK_MB = 64
BOOT_S = 180.0
OWED_S = 30.0


def guest(seed: int) -> None:
    """Work until the power goes."""
    folder = Path("/tmp/disk")
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "/dev/vda", folder], check=True)

    def tell(mark: Mark) -> None:
        # One line, whole or not at all: the last may be cut.
        os.write(1, b"\n@" + base64.b64encode(encode_mark(mark)) + b"$\n")

    print("READY", flush=True)
    work = Workload(folder, seed, tell)
    while True:
        work.run(40)


def cut(command: Sequence[str], work_s: float) -> tuple[Truth, int]:
    """Start a guest, let it work, take its power; what it had been promised, and how many marks it told."""
    guest_process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert guest_process.stdout is not None
    truth, marks, said = Truth(), 0, b""
    deadline_s, ready = time.monotonic() + BOOT_S, False

    def take(lines: Sequence[bytes]) -> None:
        nonlocal marks
        for line in lines:
            line = line.strip(b"\r")
            if line.startswith(b"@") and line.endswith(b"$"):
                truth.take(decode_mark(base64.b64decode(line[1:-1])))
                marks += 1

    try:
        os.set_blocking(guest_process.stdout.fileno(), False)
        # Past its time it goes on until something is owed: a cut after which nothing must be there shows nothing.
        while time.monotonic() < deadline_s or (
            ready and not truth.outstanding and time.monotonic() < deadline_s + OWED_S
        ):
            data = guest_process.stdout.read()
            if data:
                *whole, said = (said + data).split(b"\n")
                take(whole)
            elif guest_process.poll() is not None:
                raise RuntimeError(f"the guest ended: {said[-2000:].decode(errors='replace')}")
            else:
                time.sleep(0.01)
            if not ready and marks:
                ready, deadline_s = True, time.monotonic() + work_s
        if not ready:
            raise RuntimeError(f"the guest never began: {said[-2000:].decode(errors='replace')}")
    finally:
        os.killpg(guest_process.pid, signal.SIGKILL)  # the plug
        os.set_blocking(guest_process.stdout.fileno(), True)
        said += guest_process.stdout.read() or b""
        guest_process.wait()
    take(said.split(b"\n"))
    return truth, marks


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.nightly.power_vm")
    parser.add_argument("role", choices=("guest", "host"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cuts", type=int, default=20)
    parser.add_argument("--record", action="store_true")
    given = list(sys.argv[1:] if argv is None else argv)
    # Behind "--" stands what starts a guest; IMAGE and SEED are filled in.
    end = given.index("--") if "--" in given else len(given)
    args, command = parser.parse_args(given[:end]), given[end + 1 :]
    if args.role == "guest":
        guest(args.seed)
    rnd = random.Random(args.seed)
    began_s = time.monotonic()
    broken = kept = 0
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        image, mounted = top / "disk.img", top / "mounted"
        mounted.mkdir()
        for number in range(args.cuts):
            with image.open("wb") as file:
                file.truncate(DISK_MB * 2**20)
            subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
            seed = args.seed * 1000 + number
            words = [word.replace("IMAGE", str(image)).replace("SEED", str(seed)) for word in command]
            truth, marks = cut(words, rnd.uniform(0.5, 4.0))
            subprocess.run(["mount", "-o", "loop", image, mounted], check=True)
            left = top / "left"
            left.mkdir()
            for path in mounted.iterdir():
                if path.is_file():
                    shutil.copy(path, left)
            subprocess.run(["umount", mounted], check=True)
            violations = truth.check(left)
            shutil.rmtree(left)
            broken += bool(violations)
            kept += len(truth.kept)
            print(
                f"cut {number + 1} (seed {seed}): {marks} marks, {len(truth.kept)} frames kept,"
                f" {len(truth.outstanding)} to be there: {violations or 'all there'}",
                flush=True,
            )
    passed = not broken and kept > 0
    if args.record:
        record(
            Finding(
                proof="power_vm",
                promise="when the power of a whole machine is cut, its buffer opens and holds all it promised",
                command=f"tests/nightly/power_vm.sh --cuts {args.cuts} --seed {args.seed}",
                passed=passed,
                figures={
                    "cuts": args.cuts,
                    "frames kept before them": kept,
                    "cuts that cost or broke anything": broken,
                },
                seed=args.seed,
                took_s=time.monotonic() - began_s,
            )
        )
    print(f"POWER VM {'OK' if passed else 'FAILED'}: {args.cuts} cuts, {broken} with violations", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
