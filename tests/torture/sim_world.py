"""A gateway, its devices, the network, a cloud and its sinks: the shipped code, but for what it stands on.

Shipped: `DevicePoller`, `Buffer` over `Store`, `Forwarder`, the wire, `Intake` with the doors' `merge`,
`SqliteJournal`, `SinkRunner` with its decoder, `DeadLetters`. Simulated: time, threads (inline), the disk under SQLite,
the network, the devices, the sinks' stores.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any, ClassVar, Final

import msgspec

import agent.buffer
import agent.forwarder
import agent.poller
import agent.store
import cloud.dead_letters
import cloud.intake
import cloud.journal.sqlite
import cloud.runner
import drivers.contract
from agent.buffer import Buffer
from agent.clock import ClockReading
from agent.forwarder import Forwarder
from agent.health import DeviceHealth, Gauge
from agent.poller import DevicePoller, Plan
from agent.status import LinkHealth
from agent.store import Group, Store
from cloud.dead_letters import DeadLetters
from cloud.decode import Decoder
from cloud.intake import Intake
from cloud.journal.contract import Appended, Entry
from cloud.journal.sqlite import SqliteJournal
from cloud.metrics import Metrics
from cloud.runner import SinkRunner
from cloud.sinks.contract import Record, Rejection, RetryLater, ScanRecord, Settled, SinkBroken, SinkRefused
from config.agent import Buffer as BufferSettings
from config.agent import Uplink as UplinkSettings
from drivers.contract import DeviceUnreachable, Driver, Point, Reason, Scan, ValueType
from sync.identity import GatewayName
from sync.wire import Ack, Reply, Sealed
from tests.torture.sim_disk import Disk, SimOs, SimSqlite
from tests.torture.sim_loop import MACHINE, TRUE_START_NS, Machine, SimLoop, VirtualTime, replaced
from tests.torture.sim_network import Network, SimUplink
from tests.torture.sim_oracle import Oracle, SinkSeen, Token

GATEWAY: Final = GatewayName("acme", "plant-1")
SHM: Final = Path("/dev/shm")


class SimClock:
    """The gateway's clocks: the boot clock starts anew with each boot, the wall clock may show anything."""

    def __init__(self, loop: SimLoop) -> None:
        self._loop = loop
        self.boot_id = "boot-0"
        self.boots = 0
        self.booted_at_s = -30.0
        self.off_ns = 0  #: what the wall clock is wrong by
        self.synchronized = True

    def true_ns(self) -> int:
        return TRUE_START_NS + int(self._loop.now_s * 1e9)

    def boot_ns(self) -> int:
        return int((self._loop.now_s - self.booted_at_s) * 1e9)

    def read(self) -> ClockReading:
        error_ns = 1_000_000 if self.synchronized else 0
        return ClockReading(self.boot_ns(), self.true_ns() + self.off_ns, self.synchronized, error_ns)

    def true_of(self, boot_ns: int) -> int:
        """The true time at which this boot's clock showed that."""
        return TRUE_START_NS + int(self.booted_at_s * 1e9) + boot_ns

    def reboot(self, off_ns: int) -> None:
        self.boots += 1
        self.boot_id = f"boot-{self.boots}"
        self.booted_at_s = self._loop.now_s
        self.off_ns = off_ns
        self.synchronized = False


def values_of(number: int, readings: int) -> list[int]:
    """What the simulated device shows at its `number`-th scan."""
    return [number & 0xFFFFFFFF, *((number * 31 + i) & 0xFFFF for i in range(1, readings))]


class SimOptions(msgspec.Struct, frozen=True):
    pass


class SimDriver(Driver[SimOptions, Point]):
    """Counts. It takes a while, times out at times, and some of its scans bear the time of the one before."""

    options_type: ClassVar[type[msgspec.Struct]] = SimOptions
    point_type: ClassVar[type[Point]] = Point

    def __init__(self, world: World, spec: DeviceSpec) -> None:
        super().__init__(spec.name, SimOptions(), spec.points)
        self._world = world
        self._spec = spec

    async def connect(self) -> None:
        if self._world.chance(self._spec.fails):
            raise DeviceUnreachable("simulated: it does not answer", Reason.TIMEOUT)

    async def close(self) -> None:
        return

    async def read(self, points: Sequence[Point]) -> Scan:
        world, spec = self._world, self._spec
        if spec.takes_s:
            await asyncio.sleep(world.devices_rng.uniform(0.1, 1.0) * spec.takes_s)
        if world.chance(spec.fails):
            raise DeviceUnreachable("simulated: no answer", Reason.TIMEOUT)
        spec.number += 1
        now_ns = world.clock.boot_ns()
        if spec.coarse_ns:
            now_ns = max(now_ns - now_ns % spec.coarse_ns, 1)  # stamped by the device: several at one instant
        spec.current = (spec.number, now_ns)
        return Scan(now_ns, tuple(points), values_of(spec.number, len(points)), {})


class DeviceSpec:
    """One simulated device, through all restarts of the gateway."""

    def __init__(
        self, name: str, period_s: float, points: int, *, takes_s: float = 0.0, fails: float = 0.0,
        coarse_ns: int = 0, priority: str = "normal",
    ) -> None:  # fmt: skip
        self.name = name
        self.period_s = period_s
        self.points = tuple(
            Point(name=f"p{i}", type=ValueType.U32 if i == 0 else ValueType.U16) for i in range(points)
        )
        self.takes_s = takes_s
        self.fails = fails
        self.coarse_ns = coarse_ns
        self.priority = priority
        self.number = 0
        self.serial = 0
        self.current: tuple[int, int] | None = None


class _Port:
    """The buffer as one poller sees it; notes what was put in."""

    def __init__(self, world: World, buffer: Buffer, spec: DeviceSpec) -> None:
        self._world = world
        self._buffer = buffer
        self._spec = spec
        self.boot = buffer.boot
        self.register = buffer.register
        self.record_event = buffer.record_event
        self.record_gap = buffer.record_gap

    def append(self, frame: bytes, readings: int, *args: Any, **kwargs: Any) -> bool:
        spec, world = self._spec, self._world
        current, spec.current = spec.current, None
        number, boot_ns = current or (-1, world.clock.boot_ns())
        spec.serial += 1
        world.pending[frame] = Token(
            spec.name, spec.serial, number, readings, boot_ns, world.clock.true_of(boot_ns), spec.priority
        )
        if self._buffer.append(frame, readings, *args, **kwargs):
            return True
        del world.pending[frame]
        world.oracle.refused_readings += readings
        return False


class SimStore(Store):
    """The shipped store; the oracle hears of what it puts where, and of what it promises."""

    world: ClassVar[World]

    def _insert(self, conn: Any, led: Any, frames: Sequence[bytes], *args: Any, **kwargs: Any) -> Any:
        world, first = self.world, led.next_seq
        given = super()._insert(conn, led, frames, *args, **kwargs)
        for seq, frame in enumerate(frames, first):
            world.oracle.inserted((led.epoch, seq), world.pending.get(frame))
            world.placed[id(frame)] = (led.epoch, seq)
        return given

    def commit(self, group: Group, *args: Any, **kwargs: Any) -> Any:
        world = self.world
        world.trace("commit", len(group.frames))
        given = super().commit(group, *args, **kwargs)
        for frame in group.frames:
            key = world.placed.pop(id(frame), None)
            if key is not None:
                world.oracle.kept(key, world.pending.pop(frame, None))
        world.placed.clear()
        world.commits += 1
        if world.commits % 32 == 0 and (size := self.size_bytes()) > self._limits.max_bytes:
            world.oracle.violated("buffer_within_cap", f"{size} bytes, the cap is {self._limits.max_bytes}")
        return given


class SimBuffer(Buffer):
    """The shipped buffer; the oracle hears of what it forgets."""

    world: ClassVar[World]

    def settle(self, ack: Ack) -> None:
        self.world.oracle.settled(ack.epoch, ack.ranges)
        super().settle(ack)


class _NoThread:
    """The journal's writer, which runs inline."""

    def join(self) -> None:
        return


class InlineJournal(SqliteJournal):
    """The shipped journal without its thread: the same takes and transactions, in virtual time."""

    async def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._db = await asyncio.to_thread(self._open)
        self._pool = ThreadPoolExecutor(1, "journal-read")
        self._thread = _NoThread()  # type: ignore[assignment]  # never started
        self._writer = ThreadPoolExecutor(1, "journal-write")

    def _submit(self, job: Any) -> None:
        self._jobs.append(job)
        asyncio.get_running_loop().run_in_executor(self._writer, self._turn)

    def _turn(self) -> None:
        if not self._jobs:
            return
        db, loop = self._db, self._loop
        assert db is not None
        assert loop is not None
        group = self._take()
        failed = self._commit_group(db, group)
        loop.call_soon(self._settle, group, self._next - 1, failed)


class SimJournal(InlineJournal):
    """The oracle hears of what it holds, and where its cursors go."""

    world: ClassVar[World]

    async def append(self, entries: Sequence[Entry], *args: Any, **kwargs: Any) -> list[Appended]:
        appended = await super().append(entries, *args, **kwargs)
        for entry in entries:
            self.world.oracle.journalled(entry.epoch, entry.first, entry.last)
        return appended

    async def commit(self, sink: str, offset: int, **kwargs: Any) -> None:
        settled = self.world.settled_upto.get(sink, 0)
        if offset > settled:
            self.world.oracle.violated(
                "cursor_after_settled",
                f"sink {sink}: its cursor moves to {offset}, it has settled up to {settled}",
            )
        await super().commit(sink, offset, **kwargs)


class SimSink:
    """A store that takes records by (epoch, seq), and does what stores do when they are unwell."""

    def __init__(self, world: World, name: str, *, remembers: bool) -> None:
        self.name = name
        self.max_records = 2_000
        self.max_bytes = 512 * 1024
        self.linger_s = 0.0
        self.remembers = remembers
        self.offset = 0
        self.down = False
        self.writes = 0
        self._world = world
        self._rng = random.Random(f"{world.seed}:{name}")
        self._faulty = world.faulty_sinks

    async def open(self) -> int | None:
        if self.down:
            raise RetryLater(f"simulated: {self.name} is down")
        return self.offset if self.remembers else None

    async def write(self, records: Sequence[Record], upto_offset: int) -> Settled:
        world, rng = self._world, self._rng
        self.writes += 1
        await asyncio.sleep(rng.uniform(0.001, 0.02))
        if self.down:
            raise RetryLater(f"simulated: {self.name} is down")
        if self._faulty and not world.quiet:
            chance = rng.random()
            if chance < 0.02:  # a part is written before it fails
                for record in records[: rng.randrange(len(records) + 1)]:
                    world.oracle.stored(self.name, record)
                raise RetryLater("simulated: deadlock", rng.choice((None, 0.5, 5.0)))
            if chance < 0.022:
                raise SinkBroken("simulated: the password was changed")
            if chance < 0.03:
                await asyncio.sleep(5.0)
        rejected = []
        for index, record in enumerate(records):
            if self._faulty and isinstance(record, ScanRecord) and record.seq % 4_999 == 17:
                if record.seq % 2:
                    raise SinkRefused("simulated: one of these will not do")
                rejected.append(Rejection(index, "simulated: it will not do"))
        for record in records:
            world.oracle.stored(self.name, record)
        self.offset = max(self.offset, upto_offset)
        world.settled_upto[self.name] = max(world.settled_upto.get(self.name, 0), upto_offset)
        world.trace(self.name, len(records) and records[-1].seq)
        return Settled(tuple(rejected))

    async def remove(self, records: Sequence[Record]) -> None:
        """What is corrected is written again at once, under the same keys."""

    async def maintain(self, now_ns: int) -> None:
        return

    async def close(self) -> None:
        return


class SimLetters(DeadLetters):
    """The shipped dead letters; what they hold counts as stored."""

    world: ClassVar[World]

    async def add(self, letters: Sequence[Any]) -> None:
        await super().add(letters)
        decoder = Decoder()
        for letter in letters:
            self.world.letters += 1
            for record in decoder.decode(letter.entry).records:
                self.world.oracle.stored(letter.sink, record)


class _TracingUplink(SimUplink):
    world: ClassVar[World]

    async def send(self, batch: Sealed) -> Ack:
        self.world.oracle.sent(batch.epoch, batch.first, batch.last, batch.payload)
        self.world.trace("send", batch.first)
        return await super().send(batch)


class World:
    """One run: made, given its devices, started, tormented, quieted, judged."""

    def __init__(
        self,
        seed: int,
        *,
        buffer: BufferSettings | None = None,
        uplink: UplinkSettings | None = None,
        faulty_sinks: bool = True,
        remember_where: bool = True,
    ) -> None:
        self.seed = seed
        self.loop = SimLoop()
        self.buffer_settings = buffer or BufferSettings(ballast_kb=64, free_disk_mb=64)
        self.uplink_settings = uplink or UplinkSettings(ack_timeout_s=10.0)
        self.faulty_sinks = faulty_sinks
        self.oracle = Oracle(values_of, remember_where=remember_where)
        self.clock = SimClock(self.loop)
        self.rng = random.Random(f"{seed}:faults")
        self.devices_rng = random.Random(f"{seed}:devices")
        self.network = Network(random.Random(f"{seed}:network"))
        self.specs: list[DeviceSpec] = []
        self.sinks = [SimSink(self, "table", remembers=True), SimSink(self, "points", remembers=False)]
        self.settled_upto: dict[str, int] = {}
        self.pending: dict[bytes, Token] = {}
        self.placed: dict[int, tuple[int, int]] = {}
        self.quiet = False
        self.talks = False  #: the shipped code's own log, to see what a run did
        self.commits = self.letters = 0
        self.counts: dict[str, int] = {}
        self.agent: Machine | None = None
        self.cloud: Machine | None = None
        self.agent_disk: Disk | None = None
        self.cloud_disk: Disk | None = None
        self.buffer: SimBuffer | None = None
        self.health = LinkHealth()
        self.journal: SimJournal | None = None
        self.runners: list[SinkRunner] = []
        self._agent_tasks: list[asyncio.Task[Any]] = []
        self._poll_tasks: list[asyncio.Task[Any]] = []
        self._cloud_tasks: list[asyncio.Task[Any]] = []
        self._folder = Path(tempfile.mkdtemp(prefix="headgate-sim-", dir=SHM if SHM.is_dir() else None))
        self._folders = 0
        self._trace = hashlib.blake2b(digest_size=12)
        for sink in self.sinks:
            self.oracle.sinks[sink.name] = SinkSeen()
        self.network.on_reply = self._replied

    # --- small things ---

    def chance(self, share: float) -> bool:
        return not self.quiet and share > 0 and self.devices_rng.random() < share

    def trace(self, what: str, number: int) -> None:
        self._trace.update(f"{self.loop.now_s:.6f} {what} {number}\n".encode())

    def counted(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
        self.trace(what, self.counts[what])

    def _replied(self, gateway: str, reply: Reply) -> None:
        if isinstance(reply, Ack):
            self.oracle.cloud_acks(reply.epoch, reply.ranges)

    def _new_folder(self, name: str) -> Path:
        self._folders += 1
        return self._folder / f"{name}-{self._folders}"

    def _disk_of(self, path: Path) -> Disk:
        for disk in (self.agent_disk, self.cloud_disk):
            if disk is not None and disk.folder in (path, *path.parents):
                return disk
        # A reader of the journal gives its path as a URI.
        disk = self.cloud_disk if "cloud-" in str(path) else self.agent_disk
        assert disk is not None
        return disk

    # --- running ---

    def run(self, story: Callable[[World], Coroutine[Any, Any, None]]) -> None:
        for kind in (SimStore, SimBuffer, SimJournal, SimLetters, _TracingUplink):
            kind.world = self
        wall = VirtualTime(self.loop, lambda: self.clock.true_ns() + self.clock.off_ns)
        true = VirtualTime(self.loop, self.clock.true_ns)
        sqlite, room = SimSqlite(self._disk_of), SimOs(self._disk_of)
        epochs = random.Random(f"{self.seed}:epochs")
        changes: list[tuple[Any, str, Any]] = [
            (agent.store, "sqlite3", sqlite), (agent.store, "os", room), (agent.store, "secrets", _Secrets(epochs)),
            (agent.buffer, "Store", SimStore), (agent.poller, "boot_ns", self.clock.boot_ns),
            (drivers.contract, "boot_ns", self.clock.boot_ns),
            (cloud.journal.sqlite, "sqlite3", sqlite), (cloud.journal.sqlite, "os", room),
            (cloud.dead_letters, "sqlite3", sqlite),
        ]  # fmt: skip
        changes += [(module, "time", wall) for module in (agent.store, agent.buffer, agent.forwarder)]
        changes += [(module, "time", true) for module in (cloud.runner, cloud.journal.sqlite, cloud.intake)]
        level = logging.root.manager.disable
        logging.disable(logging.NOTSET if self.talks else logging.CRITICAL)
        asyncio.set_event_loop(self.loop)
        try:
            with replaced(*changes):
                self.loop.run_until_complete(self._told(story))
        finally:
            logging.disable(level)
            for disk in (self.agent_disk, self.cloud_disk):
                if disk is not None:
                    disk.throw_away()
            with contextlib.suppress(RuntimeError):
                self.loop.close()
            asyncio.set_event_loop(None)
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _told(self, story: Callable[[World], Coroutine[Any, Any, None]]) -> None:
        try:
            await self.start_cloud(None)
            await self.start_agent(None)
            await story(self)
        finally:
            for tasks in (self._poll_tasks, self._agent_tasks, self._cloud_tasks):
                await _ended(tasks)

    def _on(self, machine: Machine, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        context = copy_context()
        context.run(MACHINE.set, machine)
        return self.loop.create_task(work, name=name, context=context)

    # --- the gateway ---

    async def start_agent(self, folder: Path | None) -> None:
        folder = folder or self._new_folder("agent")
        folder.mkdir(exist_ok=True)
        machine = self.agent = Machine("agent")
        rng = random.Random(f"{self.seed}:agent:{self._folders}")
        machine.service_s = lambda: rng.uniform(0.0005, 0.004)
        self.agent_disk = Disk(machine, folder, rng)
        await self._on(machine, self._boot_agent(folder, rng), "boot agent")

    async def _boot_agent(self, folder: Path, rng: random.Random) -> None:
        machine = self.agent
        assert machine is not None
        buffer = await SimBuffer.open(folder / "buffer.db", GATEWAY, self.buffer_settings, self.clock)
        assert isinstance(buffer, SimBuffer)
        self.buffer = buffer
        uplink = _TracingUplink(GATEWAY, self.network, ack_timeout_s=self.uplink_settings.ack_timeout_s)
        self.health = LinkHealth()
        forwarder = Forwarder(buffer, uplink, self.uplink_settings, self.health, rng)
        self._agent_tasks = [
            self._on(machine, buffer.run(), "buffer"), self._on(machine, forwarder.run(), "forwarder"),
        ]  # fmt: skip
        self._poll_tasks = []
        for spec in self.specs:
            driver = SimDriver(self, spec)
            plan = Plan(
                name=spec.name, driver="simulated", measurement=spec.name, tags=(), points=spec.points,
                period_s=spec.period_s, phase_s=0.1 * len(self._poll_tasks), deadline_s=5.0,
                build=lambda spec=spec: SimDriver(self, spec),  # type: ignore[misc]  # bound now, not later
            )  # fmt: skip
            if "priority" in Plan.__struct_fields__:
                plan = msgspec.structs.replace(plan, priority=drivers.contract.Priority(spec.priority))
            gauge = Gauge(DeviceHealth(name=spec.name, driver="simulated"), self.clock.true_ns)
            poller = DevicePoller(plan, driver, _Port(self, buffer, spec), gauge, rng)
            self._poll_tasks.append(self._on(machine, poller.run(), spec.name))

    async def kill_agent(self, *, power_cut: bool, down_s: float, wrong_by_ns: int = 0) -> None:
        machine, disk = self.agent, self.agent_disk
        assert machine is not None
        assert disk is not None
        machine.end()
        folder = self._new_folder("agent")
        disk.left_after(folder, power_cut=power_cut)
        if self.network.uplink is not None:
            self.network.uplink.cut()
        await _ended(self._poll_tasks)
        await _ended(self._agent_tasks)
        disk.throw_away()
        self.pending.clear()
        self.placed.clear()
        await asyncio.sleep(down_s)
        if power_cut:
            self.clock.reboot(wrong_by_ns)
        await self.start_agent(folder)

    async def stop_polling(self) -> None:
        await _ended(self._poll_tasks)
        self._poll_tasks = []

    # --- the cloud ---

    async def start_cloud(self, folder: Path | None) -> None:
        folder = folder or self._new_folder("cloud")
        folder.mkdir(exist_ok=True)
        machine = self.cloud = Machine("cloud")
        rng = random.Random(f"{self.seed}:cloud:{self._folders}")
        machine.service_s = lambda: rng.uniform(0.0005, 0.004)
        self.cloud_disk = Disk(machine, folder, rng)
        await self._on(machine, self._boot_cloud(folder, rng), "boot cloud")

    async def _boot_cloud(self, folder: Path, rng: random.Random) -> None:
        machine = self.cloud
        assert machine is not None
        journal = SimJournal(folder / "journal.db", max_bytes=512 * 2**20, clock_ns=self.clock.true_ns)
        await journal.open()
        letters = SimLetters(folder / "letters.db", clock_ns=self.clock.true_ns)
        await letters.open()
        self.journal = journal
        self.runners = [
            SinkRunner(
                sink, journal, letters, clock_ns=self.clock.true_ns, rng=random.Random(rng.random()),
                broken_retry_s=60.0,
            )
            for sink in self.sinks
        ]  # fmt: skip
        self._cloud_tasks = [self._on(machine, r.run(), f"sink {r.sink.name}") for r in self.runners]
        self._cloud_tasks.append(self._on(machine, self._trim(journal), "trim"))
        intake = Intake(journal, journal, Metrics(), clock_ns=self.clock.true_ns, monotonic_s=self.loop.time)
        self.network.far = _OnMachine(self, machine, intake)

    async def _trim(self, journal: SimJournal) -> None:
        while True:
            await asyncio.sleep(3_600)
            await journal.trim([sink.name for sink in self.sinks], keep_s=3_600, max_bytes=256 * 2**20)

    async def kill_cloud(self, *, power_cut: bool, down_s: float) -> None:
        machine, disk = self.cloud, self.cloud_disk
        assert machine is not None
        assert disk is not None
        machine.end()
        far, self.network.far = self.network.far, None
        folder = self._new_folder("cloud")
        disk.left_after(folder, power_cut=power_cut)
        await _ended(self._cloud_tasks)
        if isinstance(far, _OnMachine):
            await _ended(list(far.tasks))
        disk.throw_away()
        await asyncio.sleep(down_s)
        await self.start_cloud(folder)

    # --- the end ---

    async def settle_down(self, limit_s: float = 7_200.0) -> None:
        """No more faults: everything must arrive within `limit_s`."""
        self.quiet = True
        self.network.mend()
        for name in ("lost", "doubled", "damaged", "late"):
            setattr(self.network.weather, name, 0.0)
        self.network.weather.delay_s = 0.05
        for disk in (self.agent_disk, self.cloud_disk):
            assert disk is not None
            disk.fault, disk.dies_in, disk.free_bytes = "", None, 64 * 2**30
        for sink in self.sinks:
            sink.down = False
        self.clock.off_ns, self.clock.synchronized = 0, True
        await asyncio.sleep(5.0)
        await self.stop_polling()
        end_s = self.loop.now_s + limit_s
        while self.loop.now_s < end_s:
            await asyncio.sleep(1.0)
            if await self._all_delivered():
                break
        else:
            state = self.buffer.state if self.buffer is not None else None
            held = state.buffered_frames + state.pending_frames if state is not None else -1
            self.oracle.violated(
                "drained", f"{held} frames are still held {limit_s:.0f} s after the last fault"
            )
        self.oracle.judge()

    async def _all_delivered(self) -> bool:
        buffer, journal = self.buffer, self.journal
        assert buffer is not None
        assert journal is not None
        state = buffer.state
        if state.buffered_frames or state.pending_frames:
            return False
        return all(self.settled_upto.get(sink.name, 0) >= journal.last_offset for sink in self.sinks)

    def digest(self) -> str:
        return self._trace.hexdigest()


class _OnMachine(Intake):
    """The intake of one machine: what it is given runs there."""

    def __init__(self, world: World, machine: Machine, intake: Intake) -> None:
        self._world = world
        self._machine = machine
        self._intake = intake
        self.tasks: set[asyncio.Task[Any]] = set()

    async def accept(self, arrivals: Any, *, door: str) -> Any:
        task = self._world._on(self._machine, self._intake.accept(arrivals, door=door), "accept")
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return await task

    async def on_state(self, gateway: str, state: bytes, *, door: str) -> None:
        await self._world._on(self._machine, self._intake.on_state(gateway, state, door=door), "state")


class _Secrets:
    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def randbits(self, bits: int) -> int:
        return self._rng.getrandbits(bits)


async def _ended(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.gather(*tasks, return_exceptions=True)
