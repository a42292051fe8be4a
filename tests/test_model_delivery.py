"""Buffer, wire, intake and journal against a model of ten lines: whatever is done to them, in whatever order.

The model is what was promised: each number that a commit has kept, with its bytes. After every step each of them is
still in the buffer, or in the journal with the same bytes, or in a gap that one of the two holds; nothing is in the
journal twice, and no seq ever names two frames. At the end all is sent, and the journal alone must account for it.

`HEADGATE_MODEL_EXAMPLES=2000` runs longer; a failure prints the steps, and how to run them again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import agent.buffer
import agent.store
import cloud.journal.sqlite
from agent.buffer import Buffer
from agent.store import Batch
from cloud.intake import Arrival, Intake
from cloud.metrics import Metrics
from config.agent import Buffer as BufferSettings
from drivers.contract import Priority
from sync.wire import Ack, GapFrame, decode_frame, open_body
from tests.fakes.buffer import GATEWAY, PACKING, READINGS, StillClock, scan
from tests.torture.sim_disk import Disk, SimOs, SimSqlite
from tests.torture.sim_loop import MACHINE, Machine, SimLoop, VirtualTime, replaced
from tests.torture.sim_world import InlineJournal


def told(frame: bytes) -> tuple[int, ...] | None:
    """What a gap frame tells; None for any other."""
    if frame[1:2] != b"\x01":
        return None
    gap = decode_frame(frame)
    assert isinstance(gap, GapFrame)
    return (gap.epoch, gap.first, gap.last, gap.scans, gap.readings)


T = TypeVar("T")
EXAMPLES = int(os.environ.get("HEADGATE_MODEL_EXAMPLES", "300"))
SHM = "/dev/shm" if Path("/dev/shm").is_dir() else None
Key = tuple[int, int]


class Model:
    """What was promised. All there is to know."""

    def __init__(self) -> None:
        self.promised: dict[int, bytes] = {}

    def kept(self, frames: dict[int, bytes]) -> None:
        self.promised |= frames

    def missing(self, held: set[int], gapped: set[int]) -> set[int]:
        return set(self.promised) - held - gapped


class Delivery(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        logging.disable(logging.CRITICAL)
        self.folder = Path(tempfile.mkdtemp(prefix="headgate-model-", dir=SHM))
        self.loop = SimLoop()
        asyncio.set_event_loop(self.loop)
        self.clock = StillClock()
        self.model = Model()
        self.number = 0
        self.pending: dict[int, bytes] = {}  #: appended, and no commit has said anything yet
        self.made: dict[bytes, int] = {}  #: every frame that was ever appended
        self.where: dict[Key, bytes] = {}  #: what each seq names, as last seen
        self.spoiled: set[Key] = set()
        self.on_the_way: list[Batch] = []  #: payloads in the network, which keeps them over every crash
        self.acks: list[Ack] = []
        self.folders = 0
        self.disks: dict[str, Disk] = {}
        self.patches = contextlib.ExitStack()

    @initialize()
    def begin(self) -> None:
        time = VirtualTime(self.loop, lambda: self.clock.read().wall_ns)
        sqlite, room = SimSqlite(self._disk_of), SimOs(self._disk_of)
        self.patches.enter_context(
            replaced(
                (agent.store, "sqlite3", sqlite), (agent.store, "os", room), (agent.store, "time", time),
                (agent.buffer, "time", time), (cloud.journal.sqlite, "sqlite3", sqlite),
                (cloud.journal.sqlite, "os", room), (cloud.journal.sqlite, "time", time),
            )
        )  # fmt: skip
        self._boot_agent(None)
        self._boot_cloud(None)

    # --- the machines ---

    def _disk_of(self, path: Path) -> Disk:
        return self.disks["cloud" if "cloud-" in str(path) else "agent"]

    def _machine(self, name: str, folder: Path | None) -> Path:
        if folder is None:
            folder = self._folder(name)
            folder.mkdir()
        machine = Machine(name)
        self.disks[name] = Disk(machine, folder, random.Random(self.folders))
        return folder

    def _folder(self, name: str) -> Path:
        self.folders += 1
        return self.folder / f"{name}-{self.folders}"

    def _do(self, name: str, work: Coroutine[Any, Any, T]) -> T:
        """On that machine, until it is done."""
        token = MACHINE.set(self.disks[name].machine)
        try:
            return self.loop.run_until_complete(work)
        finally:
            MACHINE.reset(token)

    def _boot_agent(self, folder: Path | None) -> None:
        folder = self._machine("agent", folder)
        settings = BufferSettings(max_mb=4, ballast_kb=0, free_disk_mb=0)

        async def opened() -> Buffer:
            buffer = await Buffer.open(folder / "buffer.db", GATEWAY, settings, self.clock)
            buffer.register(PACKING.layout)
            return buffer

        self.buffer = self._do("agent", opened())
        self.pending.clear()

    def _boot_cloud(self, folder: Path | None) -> None:
        folder = self._machine("cloud", folder)
        self.journal = InlineJournal(folder / "journal.db", max_bytes=64 * 2**20, free_disk_bytes=0)
        self._do("cloud", self.journal.open())
        self.intake = Intake(
            self.journal, self.journal, Metrics(), clock_ns=lambda: self.clock.read().wall_ns
        )

    def _raw(self, name: str) -> sqlite3.Connection:
        """A look past the shipped code, at what the next machine would find."""
        file = {"agent": "buffer.db", "cloud": "journal.db"}[name]
        return sqlite3.connect(self.disks[name].folder / file)

    # --- the gateway ---

    @rule(count=st.integers(1, 6), size=st.integers(0, 300), priority=st.sampled_from(list(Priority)))
    def append(self, count: int, size: int, priority: Priority) -> None:
        for _ in range(count):
            self.number += 1
            frame = scan(self.number, boot=self.buffer.boot, taken_at_ns=self.clock.boot_ns(), size=size)
            if self.buffer.append(frame, READINGS, priority):
                self.pending[self.number] = frame
                self.made[frame] = self.number

    @rule()
    def commit(self) -> None:
        if self._do("agent", self.buffer.commit()):
            self.model.kept(self.pending)
            self.pending = {}

    @rule(count=st.integers(1, 4))
    def claim(self, count: int) -> None:
        self.on_the_way += self._do("agent", self.buffer.claim(count))

    @precondition(lambda self: self.buffer.recorded())
    @rule(data=st.data())
    def send_again(self, data: st.DataObject) -> None:
        bounds = data.draw(st.sampled_from(list(self.buffer.recorded())))
        self.on_the_way += self._do("agent", self.buffer.rebuild(bounds))

    @precondition(lambda self: any(b.first < b.last for b in self.buffer.recorded()))
    @rule(data=st.data())
    def split(self, data: st.DataObject) -> None:
        bounds = data.draw(st.sampled_from([b for b in self.buffer.recorded() if b.first < b.last]))
        self.on_the_way += self._do("agent", self.buffer.split(bounds))

    @precondition(lambda self: any(b.first == b.last for b in self.buffer.recorded()))
    @rule(data=st.data())
    def park(self, data: st.DataObject) -> None:
        bounds = data.draw(st.sampled_from([b for b in self.buffer.recorded() if b.first == b.last]))
        key = (bounds.epoch, bounds.first)
        with contextlib.closing(self._raw("agent")) as conn:
            before = {told(row[0]) for row in conn.execute("SELECT data FROM parked")}
        if told(self.where.get(key, b"")) not in before - {None}:  # a gap is told twice, not for ever
            self._do("agent", self._parked(bounds.epoch, bounds.first))

    async def _parked(self, epoch: int, seq: int) -> bool:
        return await self.buffer.park(epoch, seq, "frame", "the model says so")

    @precondition(lambda self: self.acks)
    @rule(data=st.data())
    def ack(self, data: st.DataObject) -> None:
        """An ack arrives, perhaps the second time, perhaps long after."""
        self._do("agent", self._settled(data.draw(st.sampled_from(self.acks))))

    async def _settled(self, ack: Ack) -> None:
        self.buffer.settle(ack)

    @rule(power_cut=st.booleans(), dies_in=st.integers(0, 25))
    def crash_of_the_gateway(self, power_cut: bool, dies_in: int) -> None:
        """While it commits, or between two commits."""
        disk = self.disks["agent"]
        if dies_in:
            disk.dies_in = dies_in
            self._until_dead(disk)
        if not disk.machine.dead:
            self._settle_pending()
            disk.machine.end()
        folder = self._folder("agent")
        disk.left_after(folder, power_cut=power_cut)
        disk.throw_away()
        if power_cut:
            self.clock.boot_id += "x"
        self._boot_agent(folder)

    def _until_dead(self, disk: Disk) -> None:
        async def busy() -> None:
            committing = asyncio.ensure_future(self.buffer.commit())
            for _ in range(200):
                await asyncio.sleep(0.01)
                if disk.machine.dead or committing.done():
                    break
            committing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await committing

        self._do("agent", busy())
        disk.dies_in = None

    def _settle_pending(self) -> None:
        """A commit that ended before the crash has promised."""
        if not self.buffer.state.pending_frames:
            self.model.kept(self.pending)

    @rule(fault=st.sampled_from(["full", "io", "readonly", ""]))
    def disk_of_the_gateway(self, fault: str) -> None:
        self.disks["agent"].fault = fault

    @rule(at=st.integers(0, 10**6))
    def corrupt_a_row(self, at: int) -> None:
        with contextlib.closing(self._raw("agent")) as conn:
            rows = conn.execute("SELECT seq, data FROM frames ORDER BY seq").fetchall()
            if not rows:
                return
            seq, data = rows[at % len(rows)]
            spoiled = bytearray(data)
            spoiled[at % len(data)] ^= 1 << (at % 8)
            conn.execute("UPDATE frames SET data = ? WHERE seq = ?", (bytes(spoiled), seq))
            conn.commit()
        self.spoiled.add((self.buffer.epoch, seq))

    @rule(step_s=st.sampled_from([-315_360_000, -3_600, 3_600, 315_360_000]), synchronized=st.booleans())
    def step_the_clock(self, step_s: int, synchronized: bool) -> None:
        self.clock.offset_ns += step_s * 10**9
        self.clock.synchronized = synchronized

    @rule(seconds=st.sampled_from([0.5, 30.0, 4_000.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.pass_s(seconds)

    # --- the network and the cloud ---

    @precondition(lambda self: self.on_the_way)
    @rule(data=st.data(), lost=st.booleans(), again=st.booleans())
    def arrive(self, data: st.DataObject, lost: bool, again: bool) -> None:
        """One of what is on the way, in any order; the ack may be lost, the batch may come again."""
        batch = data.draw(st.sampled_from(self.on_the_way))
        if not again:
            self.on_the_way.remove(batch)
        reply = self._judged(batch)
        if isinstance(reply, Ack) and not lost:
            self.acks.append(reply)

    def _judged(self, batch: Batch) -> object:
        arrival = Arrival(str(GATEWAY), batch.sealed.payload, 0.0)
        [verdict] = self._do("cloud", self.intake.accept([arrival], door="http"))
        return verdict.reply

    @rule(power_cut=st.booleans())
    def crash_of_the_cloud(self, power_cut: bool) -> None:
        disk = self.disks["cloud"]
        disk.machine.end()
        folder = self._folder("cloud")
        disk.left_after(folder, power_cut=power_cut)
        disk.throw_away()
        self._boot_cloud(folder)

    @rule(fault=st.sampled_from(["full", "io", "readonly", ""]))
    def disk_of_the_cloud(self, fault: str) -> None:
        self.disks["cloud"].fault = fault

    # --- what must hold ---

    def _journal_frames(self) -> Iterator[tuple[Key, bytes]]:
        with contextlib.closing(self._raw("cloud")) as conn:
            rows = conn.execute("SELECT epoch, first, last, fresh, payload FROM entry").fetchall()
        for epoch, first, last, fresh, payload in rows:
            _, body = open_body(payload)
            ranges = (
                [tuple(map(int, part.split("-"))) for part in fresh.split(",")] if fresh else [(first, last)]
            )
            for a, b in ranges:
                for seq in range(a, b + 1):
                    yield (epoch, seq), bytes(body.frames[seq - first])

    @invariant()
    def what_was_promised_is_held_or_told(self) -> None:
        if not self.disks:
            return
        self._account(buffer_counts=True)

    def _account(self, *, buffer_counts: bool) -> None:
        held: set[int] = set()
        gaps: list[GapFrame] = []
        journal: dict[Key, bytes] = {}
        for key, frame in self._journal_frames():
            assert key not in journal, f"{key} is in the journal twice"
            assert self.where.setdefault(key, frame) == frame, f"{key} names two frames"
            journal[key] = frame
        with contextlib.closing(self._raw("agent")) as conn:
            rows = conn.execute("SELECT seq, data FROM frames").fetchall()
        epoch = self.buffer.epoch
        buffered = {(epoch, seq): bytes(data) for seq, data in rows}
        for key, frame in buffered.items():
            if frame == self.where.get(key):
                self.spoiled.discard(key)  # put back from a copy, or by a second flip
            if key in self.spoiled:
                continue
            if self.where.setdefault(key, frame) != frame:
                # A seq of a transaction that did not hold may be used again, but never one that was sent or promised.
                before = self.made.get(self.where[key])
                assert key not in journal, f"{key} names two frames"
                assert before not in self.model.promised, f"{key} was promised to frame {before}"
                self.where[key] = frame
        sound = [frame for key, frame in buffered.items() if key not in self.spoiled]
        for frame in [*journal.values(), *(sound if buffer_counts else ())]:
            if frame in self.made:
                held.add(self.made[frame])
            elif frame[1:2] == b"\x01":
                gap = decode_frame(frame)
                assert isinstance(gap, GapFrame)
                gaps.append(gap)
        if buffer_counts:
            for spoilt in [self.where[k] for k in self.spoiled & set(buffered) if k in self.where]:
                if spoilt in self.made:
                    held.add(self.made[spoilt])
                elif isinstance(gap := decode_frame(spoilt), GapFrame):
                    gaps.append(gap)
        gapped = {
            self.made[frame]
            for key, frame in self.where.items()
            if frame in self.made and any(g.epoch == key[0] and g.first <= key[1] <= g.last for g in gaps)
        }
        missing = self.model.missing(held, gapped)
        assert not missing, f"promised, and nowhere to be found: {sorted(missing)}"
        wrong = [key for key, frame in journal.items() if frame[1:2] == b"\x00" and frame not in self.made]
        assert not wrong, f"the journal holds scans that nobody took: {wrong}"
        state = self.buffer.state
        assert state.kept_frames == state.settled_frames + state.gapped_frames + state.buffered_frames
        assert state.size_bytes <= state.max_bytes

    def teardown(self) -> None:
        try:
            if self.disks:
                self._drain()
        finally:
            for disk in self.disks.values():
                disk.throw_away()
            self.patches.close()
            self.loop.close()
            asyncio.set_event_loop(None)
            logging.disable(logging.NOTSET)
            shutil.rmtree(self.folder, ignore_errors=True)

    def _drain(self) -> None:
        """All is well again: everything goes out, and the journal alone accounts for it."""
        for disk in self.disks.values():
            disk.fault = ""
        self.clock.synchronized = True
        self.clock.pass_s(1_000_000)  # nothing waits for its clock any longer
        self.commit()
        self.commit()
        for _ in range(200):
            batches = self._do("agent", self.buffer.claim(4))
            for bounds in self.buffer.recorded():
                batches += self._do("agent", self.buffer.rebuild(bounds))
            for batch in batches:
                reply = self._judged(batch)
                assert isinstance(reply, Ack), reply
                self._do("agent", self._settled(reply))
            self.commit()
            if not self.buffer.state.buffered_frames and not batches:
                break
        else:
            raise AssertionError(f"{self.buffer.state.buffered_frames} frames never went out")
        self._account(buffer_counts=False)


TestDelivery = Delivery.TestCase
TestDelivery.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=40,
    deadline=None,
    print_blob=True,
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),  # to explain takes minutes
    derandomize="HEADGATE_MODEL_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
