"""Every power cut, enumerated: the shipped buffer and the shipped journal, on every disk that a cut may leave.

    python -m tests.torture.power_cuts [--states 10000] [--seed 1] [--only buffer|journal] [--record]

A workload runs once under a recorder of writes and syncs (`recorder.c`, preloaded under an unmodified SQLite). At
cuts over the whole trace the disk's possible states are made up (`recording.Variant`), and each is opened by the
shipped code and held to what the workload had been promised before the cut.

Rules:
1. Passed means: no state is corrupt, none lacks what was promised, no number is given twice.
2. A proof that cannot fail proves nothing: with `synchronous=NORMAL` losses must be found, and with OFF corruption or
   losses, in the same run; where they are not, the run fails.
3. States are counted once: equal disks at one cut are one state.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

import msgspec

from tests.torture import buffer_workload, journal_workload
from tests.torture.buffer_workload import Violation
from tests.torture.recording import Disk, Kind, Operation, RecordingError, Variant, lay_out, record
from tests.torture.report import Finding
from tests.torture.report import record as record_finding

SUBJECTS: Final = ("buffer", "journal")
_GARBAGE_SHM: Final = 0.25  #: share of states that have a WAL index of random bytes beside them


class Outcome(msgspec.Struct):
    """What one subject's states were."""

    subject: str
    synchronous: str
    seed: int
    operations: int = 0
    syncs: int = 0
    calls: int = 0
    states: int = 0
    took_s: float = 0.0
    kinds: dict[str, int] = {}
    first: list[str] = []  #: the first violations, with the cut that reproduces them

    def add(self, other: Outcome) -> None:
        self.states += other.states
        for kind, n in other.kinds.items():
            self.kinds[kind] = self.kinds.get(kind, 0) + n
        self.first = (self.first + other.first)[:10]

    @property
    def lost(self) -> int:
        return sum(self.kinds.get(kind, 0) for kind in ("lost", "reused"))

    @property
    def corrupt(self) -> int:
        return sum(n for kind, n in self.kinds.items() if kind not in ("lost", "reused"))


class _Truth(Protocol):
    def check(self, folder: Path) -> list[Violation]: ...


class _Follower:
    """Takes the trace for one subject: disk and promises side by side."""

    def __init__(self, subject: str) -> None:
        self.disk = Disk()
        self._buffer = buffer_workload.Truth() if subject == "buffer" else None
        self._journal = journal_workload.Truth() if subject == "journal" else None

    def take(self, op: Operation) -> None:
        if op.kind is not Kind.MARK:
            self.disk.take(op)
        elif self._buffer is not None:
            self._buffer.take(buffer_workload.decode_mark(op.data))
        elif self._journal is not None:
            self._journal.take(journal_workload.decode_mark(op.data))

    @property
    def truth(self) -> _Truth:
        truth = self._buffer or self._journal
        assert truth is not None
        return truth

    @property
    def calls(self) -> int:
        return (self._buffer.calls if self._buffer else 0) + (self._journal.calls if self._journal else 0)


def scratch() -> Path:
    """Memory where there is any: a state is written, opened and thrown away."""
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK)
    return Path(tempfile.mkdtemp(prefix="headgate-cuts-", dir=memory if usable else None))


def trace(subject: str, seed: int, steps: int, synchronous: str) -> list[Operation]:
    folder = scratch()
    return record(f"tests.torture.{subject}_workload", [str(seed), str(steps), synchronous], folder)


def check_cuts(
    subject: str, operations: Sequence[Operation], cuts: Sequence[int], repeats: int, seed: int
) -> Outcome:
    """Every variant at each of `cuts` (places in the trace), `repeats` times those that are made by chance."""
    logging.disable(logging.CRITICAL)
    found = Outcome(subject, "", seed)
    wanted = set(cuts)
    follower = _Follower(subject)
    with tempfile.TemporaryDirectory(dir=scratch_parent()) as top:
        for place, op in enumerate(operations):
            follower.take(op)
            if place not in wanted:
                continue
            seen: set[int] = set()
            for repeat in range(repeats):
                for variant in Variant:
                    rnd = random.Random(f"{seed} {place} {variant} {repeat}")
                    files = follower.disk.left(variant, rnd)
                    state = hash(tuple(sorted(files.items())))
                    if state in seen:
                        continue
                    seen.add(state)
                    with tempfile.TemporaryDirectory(dir=top) as name:
                        folder = Path(name)
                        lay_out(files, folder)
                        if rnd.random() < _GARBAGE_SHM:
                            (folder / f"{subject}.db-shm").write_bytes(rnd.randbytes(32768))
                        violations = follower.truth.check(folder)
                    found.states += 1
                    for violation in violations:
                        found.kinds[violation.kind] = found.kinds.get(violation.kind, 0) + 1
                        if len(found.first) < 10:
                            found.first.append(f"cut {place}, {variant}: {violation.kind}: {violation.text}")
    return found


def scratch_parent() -> Path | None:
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and os.access(memory, os.W_OK) else None


def _worker(job: tuple[str, list[Operation], list[int], int, int]) -> Outcome:
    return check_cuts(*job)


def explore(subject: str, *, seed: int, states: int, steps: int, synchronous: str, processes: int) -> Outcome:
    """Record, then check about `states` distinct states, spread evenly over the trace."""
    began_s = time.monotonic()
    operations = trace(subject, seed, steps, synchronous)
    rnd = random.Random(seed)
    follower = _Follower(subject)
    uncertain: list[int] = []
    for place, op in enumerate(operations):
        follower.take(op)
        if follower.disk.uncertain:
            uncertain.append(place)
    total = Outcome(subject, synchronous, seed, len(operations))
    total.syncs = sum(op.kind in (Kind.SYNC, Kind.FOLDER_SYNC) for op in operations)
    total.calls = follower.calls
    left = list(range(len(operations)))
    rnd.shuffle(left)
    # Half of the cuts where something is uncertain, and every place is cut at before any is cut at twice.
    rnd.shuffle(uncertain)
    turn = 0
    while total.states < states:
        want = max(1, (states - total.states) // 5)
        cuts = sorted({*left[:want], *uncertain[:want]})
        left, uncertain = left[want:], uncertain[want:]
        if not cuts:
            turn += 1
            cuts = list(range(len(operations)))
        jobs = [(subject, operations, cuts[i::processes], 1 + turn, seed + turn) for i in range(processes)]
        if processes == 1:
            total.add(check_cuts(*jobs[0]))
        else:
            with multiprocessing.get_context("fork").Pool(processes) as pool:
                for one in pool.imap_unordered(_worker, jobs):
                    total.add(one)
    total.took_s = time.monotonic() - began_s
    return total


def told(outcome: Outcome) -> str:
    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(outcome.kinds.items())) or "no violation"
    return (
        f"{outcome.subject:7} synchronous={outcome.synchronous:6} seed={outcome.seed} operations={outcome.operations}"
        f" syncs={outcome.syncs} calls={outcome.calls} states={outcome.states}: {kinds}"
        f" ({outcome.states / max(outcome.took_s, 0.01):.0f} states/s)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture.power_cuts", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--states", type=int, default=10_000, help="per subject")
    parser.add_argument("--steps", type=int, default=400, help="of the workload")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=SUBJECTS)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--record", action="store_true", help="write the figures for docs/reliability.md")
    args = parser.parse_args(argv)
    began_s = time.monotonic()
    passed = True
    figures: dict[str, int | float | str] = {}
    for subject in [args.only] if args.only else SUBJECTS:
        for synchronous in ("FULL", "NORMAL", "OFF"):
            states = args.states if synchronous == "FULL" else max(100, args.states // 20)
            try:
                outcome = explore(
                    subject, seed=args.seed, states=states, steps=args.steps, synchronous=synchronous,
                    processes=args.processes,
                )  # fmt: skip
            except RecordingError as err:
                print(f"FAILED: {err}", file=sys.stderr)
                return 1
            print(told(outcome), flush=True)
            if synchronous == "FULL":
                figures[f"{subject}: operations recorded"] = outcome.operations
                figures[f"{subject}: states"] = outcome.states
                figures[f"{subject}: corrupt"] = outcome.corrupt
                figures[f"{subject}: acknowledged and lost"] = outcome.lost
                if outcome.kinds:
                    passed = False
                    print("VIOLATED:", *outcome.first, sep="\n  ", flush=True)
            else:
                figures[
                    f"{subject}: of {outcome.states} states with synchronous={synchronous}, violations found"
                ] = outcome.lost + outcome.corrupt
                if not outcome.lost if synchronous == "NORMAL" else not outcome.kinds:
                    passed = False
                    print(
                        f"VIOLATED: with synchronous={synchronous} nothing was found: the tool is blind",
                        flush=True,
                    )
    if args.record:
        record_finding(
            Finding(
                proof="power_cuts",
                promise="after a power cut at any moment the buffer and the journal open, and hold all they promised",
                command=f"python -m tests.torture.power_cuts --states {args.states} --seed {args.seed}",
                passed=passed,
                figures=figures,
                seed=args.seed,
                took_s=time.monotonic() - began_s,
            )
        )
    print("power_cuts:", "passed" if passed else "FAILED", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
