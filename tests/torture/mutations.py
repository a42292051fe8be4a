"""The gate of the simulation: ten planted bugs, each of which must fail the invariant that is named beside it.

    python -m tests.torture.mutations --record                 all ten, and the control
    python -m tests.torture.mutations --only no_fsync --seeds 9

A bug patches the source of a shipped module as it is imported, in a process of its own. A patch that does not apply is
an error, never a pass: whoever changes that code moves the bug along. A mutant is caught as soon as one seed fails its
invariant; the unmutated control passes every seed that any mutant needed.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import importlib.util
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Final

import msgspec

from tests.torture.report import Finding, record

REPO: Final = Path(__file__).resolve().parents[2]


class Patch(msgspec.Struct, frozen=True):
    """One replacement; `old` stands in the module exactly once."""

    module: str
    old: str
    new: str


class Mutation(msgspec.Struct, frozen=True, kw_only=True):
    """One planted bug."""

    name: str
    why: str  #: who would write that
    patches: tuple[Patch, ...]
    fails: str  #: the invariant that must be violated
    faults: tuple[str, ...] = ()  #: of the story that brings it out; empty: a serial line
    hours: float = 2.0
    between_s: float = 60.0
    small_buffer: bool = False
    sparse: bool = False


MUTATIONS: Final = (
    Mutation(
        name="delete_on_puback",
        why="the broker has it, so it may go",
        patches=(
            Patch(
                "agent.forwarder",
                "        return await self._uplink.send(batch.sealed)\n",
                "        _sealed = batch.sealed\n"
                "        self._buffer.settle(Ack(_sealed.epoch, ((_sealed.first, _sealed.last),)))\n"
                "        return await self._uplink.send(_sealed)\n",
            ),
        ),
        fails="kept_is_stored_or_gapped",
        faults=("bad_weather", "cloud_killed"),
    ),
    Mutation(
        name="no_fsync",
        why="NORMAL is the default that everybody recommends for a WAL",
        patches=(
            Patch("agent.store", '"PRAGMA synchronous = FULL"', '"PRAGMA synchronous = NORMAL"'),
        ),
        fails="kept_is_stored_or_gapped",
        faults=("gateway_unplugged", "outage"),
    ),
    Mutation(
        name="dedupe_by_time",
        why="two scans of one device at one instant must be the same scan",
        patches=(
            Patch(
                "cloud.decode",
                "            self.records.append(self.record(seq, decode_frame(self._body.frames[index])))",
                "            _one = self.record(seq, decode_frame(self._body.frames[index]))\n"
                "            if not (isinstance(_one, ScanRecord) and any(\n"
                "                isinstance(o, ScanRecord) and o.layout_id == _one.layout_id\n"
                "                and o.taken_at_ns == _one.taken_at_ns for o in self.records\n"
                "            )):\n"
                "                self.records.append(_one)",
            ),
        ),
        fails="kept_is_stored_or_gapped",
        faults=("outage",),
        hours=1.0,
    ),
    Mutation(
        name="seq_reuse",
        why="the next seq is one more than the newest in the table",
        patches=(
            Patch(
                "agent.store",
                "        self._check_ledger(led)\n",
                "        self._check_ledger(led)\n        led.next_seq = newest + 1\n",
            ),
        ),
        fails="seq_never_reused",
        faults=("agent_killed",),
        sparse=True,
    ),
    Mutation(
        name="drain_skipped",
        why="what was under way when the link went was surely answered",
        patches=(
            Patch(
                "agent.forwarder", "deque(self._buffer.recorded())", "deque(self._buffer.recorded()[:0])"
            ),
        ),
        fails="drained",
        faults=("outage", "agent_killed"),
        hours=1.0,
    ),
    Mutation(
        name="gap_not_counted",
        why="what is evicted is gone, and that is that",
        patches=(
            Patch(
                "agent.store",
                "            gaps = gap_sums.summed(gaps + more)\n",
                "            gaps = gap_sums.summed(gaps)\n",
            ),
        ),
        fails="kept_is_stored_or_gapped",
        faults=("outage",),
        hours=6.0,
        between_s=600.0,
        small_buffer=True,
    ),
    Mutation(
        name="eviction_of_alarms",
        why="the oldest goes first, whatever it is",
        patches=(
            Patch(
                "agent.store",
                "for priority in (Priority.BULK, Priority.NORMAL, Priority.ALARM):",
                "for priority in (Priority.ALARM, Priority.NORMAL, Priority.BULK):",
            ),
        ),
        fails="alarm_evicted_last",
        faults=("outage",),
        hours=6.0,
        between_s=600.0,
        small_buffer=True,
    ),
    Mutation(
        name="ack_before_commit",
        why="the commit will follow in a moment, and the gateway waits",
        patches=(
            Patch(
                "cloud.intake",
                "            appended = await self._journal.append(entries)\n",
                "            import asyncio as _asyncio\n"
                "            from cloud.journal.contract import Appended as _Appended\n"
                "            self._later = _asyncio.ensure_future(self._journal.append(entries))\n"
                "            self._later.add_done_callback(lambda f: f.cancelled() or f.exception())\n"
                "            appended = [_Appended(1, ((e.first, e.last),)) for e in entries]\n",
            ),
        ),
        fails="ack_after_commit",
        faults=("cloud_killed", "journal_refuses"),
        hours=1.0,
    ),
    Mutation(
        name="cursor_outside_the_transaction",
        why="the cursor is moved first, the records follow",
        patches=(
            Patch(
                "cloud.runner",
                "        rejected = await self._write(part) if part.records or part.upto > self._position else ()\n",
                "        if part.upto > self._position:\n"
                "            await self._journal.commit(self.sink.name, part.upto)\n"
                "        rejected = await self._write(part) if part.records or part.upto > self._position else ()\n",
            ),
        ),
        fails="cursor_after_settled",
        faults=("cloud_killed", "sink_down"),
    ),
    Mutation(
        name="late_reply_accepted",
        why="after a timeout the line is free",
        patches=(
            Patch(
                "drivers.modbus_line",
                "        if wire.has_transactions or sent is None:\n            return\n        due_s = ",
                "        if wire.has_transactions or sent is not None:\n            return\n        due_s = ",
            ),
        ),
        fails="value_belongs_to_its_register",
    ),
)  # fmt: skip


class PatchDoesNotApply(Exception):
    """The shipped code has changed there: the planted bug must be moved along."""


class _Patching(importlib.abc.MetaPathFinder):
    """Patches modules as they are imported."""

    def __init__(self, patches: Sequence[Patch]) -> None:
        self._patches: dict[str, list[Patch]] = {}
        for patch in patches:
            self._patches.setdefault(patch.module, []).append(patch)
        self.applied: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._patches:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.origin is None:
            raise PatchDoesNotApply(f"{fullname} is not there")
        source = patched(Path(spec.origin).read_text(), self._patches[fullname])
        self.applied.add(fullname)
        return importlib.util.spec_from_loader(
            fullname, _Source(fullname, spec.origin, source), origin=spec.origin
        )


class _Source(importlib.abc.InspectLoader):
    def __init__(self, name: str, path: str, source: str) -> None:
        self._name = name
        self._path = path
        self._source = source

    def get_source(self, fullname: str) -> str:
        return self._source

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = self._path
        exec(compile(self._source, self._path, "exec"), module.__dict__)  # noqa: S102 - our own source, patched


def patched(source: str, patches: Sequence[Patch]) -> str:
    """Raises `PatchDoesNotApply`."""
    for patch in patches:
        count = source.count(patch.old)
        if count != 1:
            raise PatchDoesNotApply(
                f"{patch.module}: {patch.old.strip()!r} stands there {count} times, not once: move the bug along"
            )
        source = source.replace(patch.old, patch.new)
    return source


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one mutant."""

    name: str
    fails: str
    caught: bool
    seeds: int  #: tried
    took_s: float
    detail: str = ""
    others: tuple[str, ...] = ()  #: invariants that fell with it
    control_failed: str = ""  #: what the unmutated code failed on the same seeds; must be empty


def run_here(mutation: Mutation, seeds: Sequence[int], *, mutated: bool) -> Outcome:
    """In this process, which must not have imported the shipped modules yet where it is to be mutated."""
    began_s = time.perf_counter()
    if mutated:
        loaded = [p.module for p in mutation.patches if p.module in sys.modules]
        if loaded:
            raise PatchDoesNotApply(f"{loaded[0]} was imported before it could be patched")
        finder = _Patching(mutation.patches)
        sys.meta_path.insert(0, finder)
    from tests.torture.sim_line import run_line
    from tests.torture.simulation import Story, run_random

    if mutated and (left := {p.module for p in mutation.patches} - finder.applied):
        raise PatchDoesNotApply(f"{left} is not used by the simulation")
    tried, found = 0, {}
    for seed in seeds:
        tried += 1
        if mutation.faults:
            story = Story(
                hours=mutation.hours, between_s=mutation.between_s, only=mutation.faults,
                small_buffer=mutation.small_buffer, sparse=mutation.sparse,
            )  # fmt: skip
            found = run_random(seed, story).violations
        else:
            found = run_line(seed).violations
        if (mutated and mutation.fails in found) or (found and not mutated):
            break
    return Outcome(
        name=mutation.name, fails=mutation.fails, caught=mutated and mutation.fails in found, seeds=tried,
        took_s=round(time.perf_counter() - began_s, 1), detail=found.get(mutation.fails, ""),
        others=tuple(name for name in found if name != mutation.fails),
        control_failed="" if mutated or not found else f"seed {list(seeds)[tried - 1]}: {found}",
    )  # fmt: skip


def run(mutation: Mutation, first: int, seeds: int, *, mutated: bool = True) -> Outcome:
    """In a process of its own. Raises `PatchDoesNotApply`, `RuntimeError`."""
    command = [sys.executable, "-m", "tests.torture.mutations", "--child", mutation.name]
    command += ["--first", str(first), "--seeds", str(seeds)] + ([] if mutated else ["--control"])
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=1_800, check=False)
    if done.returncode == 3:
        raise PatchDoesNotApply(done.stderr.strip().splitlines()[-1])
    if done.returncode != 0:
        raise RuntimeError(f"{mutation.name}: {done.stderr[-2_000:]}")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Outcome)


def gate(
    mutations: Sequence[Mutation], *, first: int = 1, seeds: int = 5, control: bool = True
) -> list[Outcome]:
    """Each mutant until it is caught, and the control on the same seeds."""
    outcomes = []
    for mutation in mutations:
        outcome = run(mutation, first, seeds)
        if control:
            clean = run(mutation, first, outcome.seeds, mutated=False)
            outcome = msgspec.structs.replace(outcome, control_failed=clean.control_failed)
        outcomes.append(outcome)
        print(told(outcome), flush=True)
    return outcomes


def told(outcome: Outcome) -> str:
    if outcome.caught:
        effort = f"with {outcome.seeds} seeds in {outcome.took_s} s"
        text = f"{outcome.name}: caught by {outcome.fails} {effort}: {outcome.detail}"
    else:
        text = f"{outcome.name}: NOT CAUGHT by {outcome.fails} with {outcome.seeds} seeds ({outcome.others})"
    return text + (f"; THE CONTROL FAILED: {outcome.control_failed}" if outcome.control_failed else "")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture.mutations", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--only", action="append", choices=[m.name for m in MUTATIONS])
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--seeds", type=int, default=5, help="at most, for each")
    parser.add_argument("--record", action="store_true", help="write the finding for the report page")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--control", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    by_name = {m.name: m for m in MUTATIONS}
    if args.child:
        try:
            seeds = range(args.first, args.first + args.seeds)
            outcome = run_here(by_name[args.child], seeds, mutated=not args.control)
        except PatchDoesNotApply as err:
            print(err, file=sys.stderr)
            return 3
        print(msgspec.json.encode(outcome).decode())
        return 0
    began_s = time.perf_counter()
    outcomes = gate([by_name[name] for name in args.only] if args.only else MUTATIONS, first=args.first,
                    seeds=args.seeds)  # fmt: skip
    caught = sum(o.caught for o in outcomes)
    clean = all(not o.control_failed for o in outcomes)
    print(f"{caught} of {len(outcomes)} planted bugs caught; the control {'passed' if clean else 'FAILED'}")
    if args.record:
        figures: dict[str, int | float | str] = {"planted": len(outcomes), "caught": caught}
        figures["the control"] = "passed" if clean else "failed"
        figures |= {o.name: f"{o.fails}, {o.seeds} seeds" for o in outcomes}
        record(Finding(
            proof="mutations",
            promise="Each of ten planted bugs fails a named invariant of the simulation, and the shipped code none.",
            command="python -m tests.torture.mutations --record",
            passed=caught == len(outcomes) and clean, figures=figures, seed=args.first,
            took_s=time.perf_counter() - began_s,
        ))  # fmt: skip
    return 0 if caught == len(outcomes) and clean else 1


if __name__ == "__main__":
    raise SystemExit(main())
