"""The agent's buffer and the cloud's intake and journal, all three real, in any order of what may happen to them.

Promise: in the end the journal holds what was kept minus what was told as a gap, each frame once, to the byte.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import string
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agent.store import Batch, Group, Range, Store
from cloud.intake import Arrival, Intake, Verdict
from cloud.intervals import count as count_of
from cloud.journal.sqlite import SqliteJournal
from cloud.metrics import Metrics
from drivers.contract import Scan
from sync.wire import Ack, GapFrame, Nack, decode_frame, encode_scan, open_body
from tests.fakes.buffer import GATEWAY, PACKING, POINTS, READINGS, StillClock, opened

AGENT_BYTES = 2**20
CLOUD_BYTES = 448 * 1024  #: a few large batches, or some hundred small ones: it is full now and then
SINK = "sink"
LETTERS = string.ascii_letters + string.digits


class AnyOrder(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        base = "/dev/shm" if Path("/dev/shm").is_dir() else None  # thousands of syncs
        self.root = Path(tempfile.mkdtemp(prefix="headgate-system-", dir=base))
        self.copies = 0
        self.rng = random.Random(5)
        self.loop = asyncio.Runner()
        self.clock = StillClock()
        # The agent.
        self.agent_folder = self.root / "agent"
        self.store = self.open_store()
        self.kept: dict[int, bytes] = {}  #: by seq
        self.pending: list[bytes] = []
        self.number = 0
        self.flying: list[Batch] = []  #: handed out to be sent
        self.acks: list[Range] = []  #: come back, not yet applied
        # The cloud.
        self.cloud_folder = self.root / "cloud"
        self.journal = self.open_journal()
        self.acknowledged: set[int] = set()
        self.held: dict[int, bytes] = {}  #: what a sink has read, by seq
        self.refused = 0

    # --- the agent ---

    def open_store(self) -> Store:
        return opened(self.agent_folder, self.clock, max_bytes=AGENT_BYTES)

    @rule(count=st.integers(1, 40), size=st.sampled_from([1, 100, 1500]))
    def append(self, count: int, size: int) -> None:
        for _ in range(count):
            self.number += 1
            text = "".join(self.rng.choices(LETTERS, k=size))
            at_ns = self.clock.now_ns + self.number
            self.pending.append(
                encode_scan(PACKING, Scan(at_ns, POINTS, [self.number, text]), self.store.ledger.boot)
            )
        if sum(map(len, self.pending)) > 100_000:
            self.commit(0)

    @rule(room=st.integers(0, 3))
    def commit(self, room: int) -> None:
        size = sum(len(f) + 16 for f in self.pending)
        made = Group(self.pending, [READINGS] * len(self.pending), [PACKING.layout], size_bytes=size)
        self.flying += self.store.commit(made, self.acks, room)
        after = self.store.ledger.next_seq
        self.kept |= dict(zip(range(after - len(self.pending), after), self.pending, strict=True))
        self.pending, self.acks = [], []

    @rule(count=st.integers(1, 4))
    def claim(self, count: int) -> None:
        self.flying += self.store.claim(count, self.acks)
        self.acks = []

    @precondition(lambda self: self.store.recorded())
    @rule(which=st.integers(0, 99))
    def resend(self, which: int) -> None:
        known = self.store.recorded()
        record = known[which % len(known)]
        self.flying += self.store.rebuild(record.first, record.last)

    @precondition(lambda self: self.store.recorded())
    @rule(which=st.integers(0, 99))
    def split(self, which: int) -> None:
        known = self.store.recorded()
        record = known[which % len(known)]
        if record.first < record.last:
            self.flying += self.store.split(record.first, record.last)

    @precondition(lambda self: self.store.recorded())
    @rule(which=st.integers(0, 99))
    def park(self, which: int) -> None:
        """As if the cloud had refused a frame for good: it then does not hold it."""
        known = self.store.recorded()
        seq = known[which % len(known)].first
        if seq in self.kept and not self.holds(seq, seq):
            self.store.park(seq, "body", "refused")
            self.flying = [b for b in self.flying if not b.sealed.first <= seq <= b.sealed.last]

    @rule(kill=st.booleans())
    def restart_the_agent(self, kill: bool) -> None:
        if kill:
            self.agent_folder = self.as_killed(self.agent_folder)
        self.store.close()
        self.pending, self.flying, self.acks = [], [], []
        self.clock.pass_s(7)
        self.store = self.open_store()

    # --- the way ---

    @precondition(lambda self: self.flying)
    @rule(which=st.integers(0, 99), copies=st.integers(1, 3), answered=st.booleans(), again=st.booleans())
    def send(self, which: int, copies: int, answered: bool, again: bool) -> None:
        """One batch, `copies` times at once; its ack is delivered or lost; it may be sent again all the same."""
        batch = self.flying[which % len(self.flying)]
        acked = self.arrive([batch] * copies)
        if answered:
            self.acks += acked
        if answered and not again:
            self.flying.remove(batch)

    @precondition(lambda self: self.flying)
    @rule(answered=st.booleans())
    def send_all(self, answered: bool) -> None:
        """As one group of arrivals, overlapping ones and all."""
        acked = self.arrive(self.flying)
        if answered:
            self.acks += acked
            self.flying = []

    @precondition(lambda self: self.flying)
    @rule(which=st.integers(0, 99), where=st.integers(0, 10**6), bit=st.integers(0, 7))
    def damage_on_the_way(self, which: int, where: int, bit: int) -> None:
        payload = bytearray(self.flying[which % len(self.flying)].sealed.payload)
        payload[where % len(payload)] ^= 1 << bit
        [verdict] = self.accept([bytes(payload)])
        assert isinstance(verdict.reply, Nack)

    def arrive(self, batches: Sequence[Batch]) -> list[Range]:
        acked: list[Range] = []
        for verdict in self.accept([b.sealed.payload for b in batches]):
            reply = verdict.reply
            if isinstance(reply, Ack):
                assert reply.epoch == self.store.ledger.epoch
                acked += reply.ranges
            else:
                assert reply.code == "full", reply
                assert reply.retry_after_s
                self.refused += 1
        for first, last in acked:
            self.acknowledged.update(range(first, last + 1))
        return acked

    def accept(self, payloads: Sequence[bytes]) -> list[Verdict]:
        arrivals = [Arrival(str(GATEWAY), payload, 0.0) for payload in payloads]
        return self.loop.run(self.intake.accept(arrivals, door="test"))

    # --- the cloud ---

    def open_journal(self) -> SqliteJournal:
        journal = SqliteJournal(
            self.cloud_folder / "journal.db", max_bytes=CLOUD_BYTES, free_disk_bytes=0, commit_interval_s=0.0
        )
        self.loop.run(journal.open())
        self.intake = Intake(journal, journal, Metrics())
        return journal

    @rule(kill=st.booleans())
    def restart_the_cloud(self, kill: bool) -> None:
        if kill:
            self.cloud_folder = self.as_killed(self.cloud_folder)
        self.loop.run(self.journal.close())
        self.journal = self.open_journal()

    @rule()
    def the_disk_fills_up(self) -> None:
        """Below the floor of free space; what is in the journal stays."""
        self.journal._free_disk_bytes = 2**60

    @rule()
    def make_room(self) -> None:
        """The disk has space again, and a sink reads on."""
        self.journal._free_disk_bytes = 0
        self.loop.run(self.read_on())

    async def read_on(self) -> None:
        after = await self.journal.cursor(SINK)
        while entries := await self.journal.read(after, max_entries=100, max_bytes=2**22):
            for entry in entries:
                assert (entry.gateway, entry.epoch) == (str(GATEWAY), self.store.ledger.epoch)
                _, body = open_body(entry.payload)
                assert entry.fresh
                for seq, raw in enumerate(body.frames, entry.first):
                    if any(first <= seq <= last for first, last in entry.fresh):
                        assert seq not in self.held, f"frame {seq} is fresh for the second time"
                        self.held[seq] = bytes(raw)
                after = entry.offset
        await self.journal.commit(SINK, after)
        await self.journal.trim([SINK], keep_s=0.0, max_bytes=0)

    def holds(self, first: int, last: int) -> tuple[Range, ...]:
        return self.loop.run(self.journal.holds(str(GATEWAY), self.store.ledger.epoch, first, last))

    # --- both ---

    def as_killed(self, folder: Path) -> Path:
        """What SIGKILL leaves: the files as they are, and nobody's memory."""
        self.copies += 1
        copy = folder.with_name(f"{folder.name}-{self.copies}")
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*-shm"))
        return copy

    @invariant()
    def the_ledger_adds_up_and_what_was_acknowledged_is_held(self) -> None:
        assert self.store.ledger.loose_frames >= 0
        if self.acknowledged:
            first, last = min(self.acknowledged), max(self.acknowledged)
            held = self.holds(first, last)
            assert count_of(held) >= len(self.acknowledged)

    def teardown(self) -> None:
        try:
            self.commit(0)
            self.drain()
            self.everything_once()
        finally:
            self.store.close()
            self.loop.run(self.journal.close())
            self.loop.close()
            shutil.rmtree(self.root, ignore_errors=True)

    def drain(self) -> None:
        """What the forwarder does: send what is recorded, claim more, until nothing is held."""
        self.flying = []
        for _ in range(1000):
            self.make_room()
            for record in self.store.recorded():
                self.flying += self.store.rebuild(record.first, record.last)
            self.flying += self.store.claim(2, self.acks)
            self.acks = self.arrive(self.flying) if self.flying else []
            self.flying = []
            self.commit(0)
            if not self.store.ledger.held_frames:
                self.make_room()
                return
        raise AssertionError(f"{self.store.ledger.held_frames} frames never went out")

    def everything_once(self) -> None:
        ledger = self.store.ledger
        gaps = [frame for frame in map(decode_frame, self.held.values()) if isinstance(frame, GapFrame)]
        gapped = {seq for gap in gaps for seq in range(gap.first, gap.last + 1)}
        scans = self.held.keys() & self.kept.keys()
        assert not gapped & self.held.keys()
        assert gapped | self.held.keys() == set(range(1, ledger.next_seq))
        assert self.kept.keys() - gapped == scans
        assert all(self.held[seq] == self.kept[seq] for seq in scans)
        assert count_of(self.holds(1, ledger.next_seq)) == len(self.held)
        assert sum(gap.readings for gap in gaps) == ledger.gapped_readings
        assert ledger.kept_readings == len(self.kept) * READINGS
        assert ledger.settled_frames == len(self.held)


AnyOrder.TestCase.settings = settings(
    max_examples=100, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAnyOrder = AnyOrder.TestCase
