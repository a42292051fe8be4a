"""Store and forward: a reading is here from `append` until the cloud's own ack settles it.

What the callers see; the SQLite file behind it is `agent/store.py`.

Rules:
1. `append` costs microseconds, never waits, and is bounded: what does not fit is counted as an overrun and reported
   to the cloud as a gap, never dropped in silence.
2. A reading is *kept* once its group is committed (`commit_interval_s`, `commit_max_kb`; 100 ms at `low_latency`).
   kept = settled + buffered + gapped, always, in frames and in readings.
3. Nothing is claimed before it is committed; a batch's bounds are on disk before its bytes are handed out.
4. Only `settle` (the cloud's ack), `park` (a permanent refusal) and eviction at the cap remove frames; the last two
   leave a gap record that reaches the cloud.
5. One thread writes, each transaction is one job on it, and no job is ever cancelled half-way.
6. A disk that refuses does not stop the gateway: new readings wait in bounded memory (`Condition.HOLDING`). So they do
   for `PATIENT_S` after a start where the disk has no room but in the place of what is held.

All methods are called from the event loop's thread.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import zstandard

from agent.clock import LOOK_S, Clock, ClockReading, ClockWatch, Due
from agent.salvage import Salvages
from agent.salvage import Told as OldEpoch
from agent.store import (
    Batch,
    Bounds,
    Group,
    Limits,
    Range,
    Store,
    StoreError,
    StoreFull,
    StoreRefusing,
    StoreUnusable,
    StoreWaits,
    frame_head,
    parts,
)
from config.agent import Buffer as BufferSettings
from drivers.contract import Priority
from sync.identity import GatewayName
from sync.wire import (
    Ack,
    EventFrame,
    GapFrame,
    Layout,
    Packing,
    WireError,
    encode_frame,
    layout_id,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_FRAME_BYTES: Final = (
    96 * 1024
)  #: with its layout it then fits a batch of 256 KiB, however badly it compresses
MAX_LAYOUT_BYTES: Final = 128 * 1024  #: compressed
LOW_LATENCY_S: Final = 0.1
ALARM_S: Final = 0.03  #: alarms wait so long for others of the same commit, which must be done within 0.1 s
_ROW_BYTES: Final = 16  #: what a frame costs beside its bytes
_EVICTING_FOR_S: Final = (
    60.0  #: evictions come in steps: how long after one the buffer still counts as at its cap
)
_EASE_BYTES: Final = (
    4 * 2**20
)  #: above the floor at least, for a disk that was short to count as having room again
_RETRY_S: Final = 1.0  #: how soon a disk that refused is asked again
PATIENT_S: Final = 30.0
"""After a start on a disk that is short of room, what is held has so long to be sent before it gives way to new
readings. These wait in memory, while they are less than half of the largest group and no alarm is among them."""
_MIB: Final = 2**20


class Condition(enum.StrEnum):
    """How the buffer is."""

    OK = "ok"
    EVICTING = "evicting"  #: at its byte cap or at the free-disk floor: the oldest readings are being dropped
    HOLDING = "holding"  #: the disk refuses writes: new readings wait in bounded memory


class BufferState(msgspec.Struct, frozen=True):
    """What `headgate status` and the heartbeat say of the buffer."""

    condition: Condition
    detail: str  #: in words, what is wrong and what to do; "" where nothing is
    epoch: int
    next_seq: int
    boot: int
    kept_frames: int
    kept_readings: int
    settled_frames: int
    settled_readings: int
    gapped_frames: int
    gapped_readings: int
    pending_frames: int  #: appended, not yet committed
    pending_readings: int
    overrun_scans: int  #: since the start of this run: refused before they were kept
    overrun_readings: int
    parked_frames: int  #: refused by the cloud for good, kept aside with the reason
    size_bytes: int  #: on disk, WAL included
    max_bytes: int
    oldest_age_s: float | None  #: None where the buffer is empty
    commits: int  #: since the start of this run
    commit_s: float  #: how long the last commit took
    commit_max_s: float  #: the longest of this run
    cause: str = ""  #: why it is not well, where that is known: one of `agent.status.Code`
    clock_expected: bool = False  #: this boot has no synchronized clock and should have
    clock_waiting: bool = False  #: all that is left to send waits for it
    old: tuple[OldEpoch, ...] = ()  #: what comes back from damaged files, each under its own epoch

    @property
    def buffered_frames(self) -> int:
        return self.kept_frames - self.settled_frames - self.gapped_frames

    @property
    def buffered_readings(self) -> int:
        return self.kept_readings - self.settled_readings - self.gapped_readings


class BufferUnusable(Exception):
    """The buffer cannot be opened at all (its folder is missing or another agent uses it); a human is told what to do.
    A damaged file is not such a case: it is set aside and a fresh one opened."""


class _Loss(msgspec.Struct):
    """Scans lost in front of the buffer, not yet told."""

    scans: int
    readings: int
    from_boot_ns: int
    to_boot_ns: int


class Buffer:
    """The gateway's buffer: `open`, then `run` as a task, at the end `close`."""

    boot: int  #: this boot's number, for `sync.wire.encode_scan`
    on_live: Callable[[Sequence[Batch]], None] | None  #: called on the loop with the batches a commit has cut
    live_room: (
        int  #: how many batches the next commit may cut for the live lane; 0 leaves its frames to the backlog
    )

    @classmethod
    async def open(cls, path: Path, gateway: GatewayName, settings: BufferSettings, clock: Clock) -> Buffer:
        """Open or make the buffer file. Damage sets the file aside; raises `BufferUnusable` only where no file at all
        can be had or another agent holds it. `run` must be started for commits to happen."""
        limits = Limits(
            max_bytes=settings.max_mb * _MIB,
            free_disk_bytes=settings.free_disk_mb * _MIB,
            ballast_bytes=settings.ballast_kb * 1024,
            max_age_ns=int(settings.max_age_days * 86_400e9),
            thin_keep=settings.thin_keep if settings.when_full == "thin" else 0,
            clock_hold_ns=int(settings.clock_hold_s * 1e9),
            quick_check_s=settings.quick_check_s,
        )
        store = Store(path, str(gateway), limits, clock)
        buffer = cls(store, limits, settings, clock)
        try:
            await buffer._job(store.open)
        except StoreUnusable as err:
            buffer._thread.shutdown(wait=False)
            raise BufferUnusable(str(err)) from err
        buffer.boot = store.ledger.boot
        if (told := store.clock_told) is not None:
            buffer._watch.look(told)  # what has changed since that row is due, though nobody has looked yet
        buffer._look()
        if store.refusing is not None:
            buffer._unwell(store.refusing)
            buffer._wake.set()  # asks the disk again, and again
        return buffer

    def __init__(self, store: Store, limits: Limits, settings: BufferSettings, clock: Clock) -> None:
        """Use `open`."""
        self.boot = 0
        self.on_live = None
        self.live_room = 0
        self._store = store
        self._limits = limits
        self._clock = clock
        self._watch = ClockWatch()
        self._thread = ThreadPoolExecutor(1, "buffer")
        self._loop = asyncio.get_running_loop()
        self._salvages = Salvages(
            store.path,
            store.gateway,
            limits,
            clock,
            settings.keep_damaged_mb * _MIB,
            self._job,
            self._layout_data,
            self.record_event,
            self._lost_with_a_file,
        )
        self._interval_s = LOW_LATENCY_S if settings.low_latency else settings.commit_interval_s
        self._commit_bytes = min(settings.commit_max_kb * 1024, limits.group_bytes)
        self._packings: dict[int, Packing] = {}
        self._layouts: list[Layout] = []  #: registered, not yet stored
        self._frames: list[bytes] = []
        self._readings: list[int] = []
        self._alarms: list[tuple[bytes, int]] = []  #: with their readings: they go first in the group
        self._bulk: list[tuple[bytes, int]] = []  #: these go last
        self._bytes = 0
        self._losses: dict[tuple[str, str], _Loss] = {}  #: by device and reason
        self._settled: dict[
            tuple[int, Range], None
        ] = {}  #: with their epoch: the file may be replaced meanwhile
        self._stuck: deque[Group] = deque()  #: groups that the disk refused: offered again before any other
        self._wake = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._looker: asyncio.TimerHandle | None = None
        self._was_waiting = False
        self._due: list[Due] = []  #: clock rows not yet stored
        self._committing: asyncio.Future[bool] | None = None
        self._patient_until_ns = clock.boot_ns() + int(PATIENT_S * 1e9)
        self._waited = False  #: the last commit left what is held its room
        self._closed = False
        self._condition = Condition.OK
        self._detail = ""
        self._cause = ""
        self._overrun_scans = self._overrun_readings = 0
        self._evicted_s = -_EVICTING_FOR_S
        self._evicted_for_disk = False  #: and not at the cap
        self._commits = 0
        self._commit_s = self._commit_max_s = 0.0
        self._size_bytes = 0

    # --- for the poller ---

    def register(self, layout: Layout) -> Packing:
        """The compiled layout for `encode_scan`. It is stored before the first frame that names it. Cheap when
        called again with an equal layout. Raises `WireError` where it is too large to travel."""
        key = layout_id(layout)
        packing = self._packings.get(key)
        if packing is None:
            packing = Packing(layout)
            size = len(zstandard.compress(msgspec.msgpack.encode(layout)))
            if size > MAX_LAYOUT_BYTES:
                raise WireError("layout", f"device {layout.device!r}: its points' names and units take {size} bytes;"
                                f" the limit is {MAX_LAYOUT_BYTES}: split the device in two")  # fmt: skip
            self._packings[key] = packing
            self._layouts.append(layout)
        return packing

    def append(self, frame: bytes, readings: int, priority: Priority = Priority.NORMAL) -> bool:
        """Put one encoded frame into the pending group. False: it did not fit and is lost, already counted as an
        overrun here (`overrun_scans`, and a gap record goes to the cloud); count it in the device's health too.

        An alarm has the whole group committed within 100 ms, and takes the room of what waits with less priority."""
        size = len(frame) + _ROW_BYTES
        if priority is Priority.ALARM and self._bytes + size > self._limits.group_bytes:
            self._give_way(frame)
        if self._bytes + size > self._limits.group_bytes or size > MAX_FRAME_BYTES or self._closed:
            self._refuse(frame, readings)
            return False
        if priority is Priority.NORMAL:
            self._frames.append(frame)
            self._readings.append(readings)
        elif priority is Priority.BULK:
            self._bulk.append((frame, readings))
        else:
            if not self._alarms:
                self._arm(ALARM_S)
            self._alarms.append((frame, readings))
        self._bytes += size
        if self._timer is None:
            self._arm()
        if self._bytes >= self._commit_bytes:
            self._wake.set()
        return True

    def _give_way(self, alarm: bytes) -> None:
        """Drop of what waits the oldest bulk, then the oldest normal frames, until this alarm fits; nothing where it
        would not fit all the same."""
        over = self._bytes + len(alarm) + _ROW_BYTES - self._limits.group_bytes
        dropped: list[tuple[bytes, int]] = []
        freed = 0
        for one in itertools.chain(self._bulk, zip(self._frames, self._readings, strict=True)):
            if freed >= over:
                break
            freed += len(one[0]) + _ROW_BYTES
            dropped.append(one)
        if freed < over or len(alarm) + _ROW_BYTES > MAX_FRAME_BYTES or self._closed:
            return
        bulk = min(len(dropped), len(self._bulk))
        normal = len(dropped) - bulk
        del self._bulk[:bulk], self._frames[:normal], self._readings[:normal]
        self._bytes -= freed
        for frame, readings in dropped:
            self._refuse(frame, readings)

    def _refuse(self, frame: bytes, readings: int) -> None:
        self._overrun_scans += 1
        self._overrun_readings += readings
        reason = "oversized" if len(frame) > MAX_FRAME_BYTES - _ROW_BYTES else "overrun"
        head = frame_head(frame)
        layout, taken_at_ns = getattr(head, "layout", 0), getattr(head, "taken_at_ns", self._clock.boot_ns())
        packing = self._packings.get(layout)
        self.record_gap(
            reason,
            device=packing.layout.device if packing else "",
            scans=1,
            readings=readings,
            from_boot_ns=taken_at_ns,
            to_boot_ns=taken_at_ns,
        )

    def record_event(self, code: str, text: str, device: str = "") -> None:
        """Keep something worth telling that is not a reading (a start, a driver that failed)."""
        text = _travelling(text[:2000])
        self.append(encode_frame(EventFrame(self.boot, self._clock.boot_ns(), code, text, device)), 0)

    def record_gap(
        self, reason: str, *, device: str, scans: int, readings: int, from_boot_ns: int, to_boot_ns: int
    ) -> None:
        """Report scans lost in front of the buffer (a full push queue). Neighbours of one device and reason within
        one group become one record."""
        loss = self._losses.get((device, reason))
        if loss is None:
            self._losses[device, reason] = _Loss(scans, readings, from_boot_ns, to_boot_ns)
        else:
            loss.scans += scans
            loss.readings += readings
            loss.from_boot_ns = min(loss.from_boot_ns, from_boot_ns)
            loss.to_boot_ns = max(loss.to_boot_ns, to_boot_ns)
        if self._timer is None:
            self._arm()

    # --- for the daemon ---

    @property
    def state(self) -> BufferState:
        """As of the last commit, with the pending group as it is now. Costs nothing to ask."""
        led = self._store.ledger
        stuck_frames = sum(len(group.frames) for group in self._stuck)
        stuck_readings = sum(sum(group.readings) for group in self._stuck)
        return BufferState(
            condition=self._condition,
            detail=self._detail,
            epoch=led.epoch,
            next_seq=led.next_seq,
            boot=led.boot,
            kept_frames=led.kept_frames,
            kept_readings=led.kept_readings,
            settled_frames=led.settled_frames,
            settled_readings=led.settled_readings,
            gapped_frames=led.gapped_frames,
            gapped_readings=led.gapped_readings,
            pending_frames=len(self._frames) + len(self._alarms) + len(self._bulk) + stuck_frames,
            pending_readings=sum(self._readings)
            + sum(n for _, n in self._alarms + self._bulk)
            + stuck_readings,
            overrun_scans=self._overrun_scans,
            overrun_readings=self._overrun_readings,
            parked_frames=self._store.parked,
            size_bytes=self._size_bytes,
            max_bytes=self._limits.max_bytes,
            oldest_age_s=self._store.oldest_age_s(self._clock.read()),
            commits=self._commits,
            commit_s=self._commit_s,
            commit_max_s=self._commit_max_s,
            cause=self._cause,
            clock_expected=self._store.clock_expected,
            clock_waiting=self._store.waiting,
            old=self._salvages.told,
        )

    async def run(self) -> None:
        """Commit on time, for ever: one task of the daemon. Survives a disk that refuses. Beside it damaged files are
        salvaged."""
        self._look_at_clock()
        salvage = self._loop.create_task(self._salvages.run(), name="salvage")
        try:
            while True:
                await self._wake.wait()
                if not await self.commit():
                    self._wake.clear()
                    hurry = self._waited and self._alarms
                    self._timer = self._loop.call_later(ALARM_S if hurry else _RETRY_S, self._wake.set)
        finally:
            salvage.cancel()
            await asyncio.gather(salvage, return_exceptions=True)

    async def commit(self) -> bool:
        """Commit the pending group now. False where the disk refused (the group is still pending)."""
        while self._committing is not None:
            await asyncio.shield(self._committing)
        while not self._closed:
            last = not self._stuck
            if not await asyncio.shield(self._start_commit()):
                return False
            if last:
                break
        return True

    async def close(self) -> None:
        """Commit, apply the acks that came, checkpoint, let go. Never raises; safe to call twice."""
        if self._closed:
            return
        self._patient_until_ns = 0
        if not await self.commit():
            log.warning("the buffer could not be committed at the end: %s", self._detail)
        self._closed = True
        for timer in (self._timer, self._looker):
            if timer is not None:
                timer.cancel()
        await self._job(self._salvages.close)
        await self._job(self._store.close)
        self._look()
        self._thread.shutdown(wait=False)

    # --- for the forwarder ---

    @property
    def epoch(self) -> int:
        return self._store.ledger.epoch

    @property
    def has_backlog(self) -> bool:
        """Whether committed frames are in no batch yet, and do not wait for the clock to be synchronized."""
        if any(store.ledger.loose_frames > 0 for store in self._salvages.stores):
            return True
        return self._store.ledger.loose_frames > 0 and not self._store.waiting

    def recorded(self) -> list[Bounds]:
        """Batches whose bounds are fixed and that no ack has settled, oldest first: after a restart, or when the way
        comes back, all of them are sent again (`rebuild`)."""
        known = [*self._store.bounds(), *(one for store in self._salvages.stores for one in store.bounds())]
        if (
            self._settled
        ):  # a disk that refuses does not forget what is acked, and it must not go again and again
            acked = self._settled
            known = [b for b in known if (b.epoch, (b.first, b.last)) not in acked]
        return known

    async def claim(self, count: int, lowest: Priority = Priority.BULK) -> list[Batch]:
        """Cut up to `count` batches of frames that are in none: alarms first, then the oldest, and none below the
        priority `lowest`. Empty where there are none, or where the disk refuses to record them."""
        settled, self._settled = self._settled, {}
        try:
            batches = await self._job(lambda: self._claim(count, settled, lowest))
        except StoreError as err:
            self._settled = settled | self._settled
            self._arm()
            log.debug("nothing claimed: %s", err)
            return []
        finally:
            self._look()
        return batches

    async def rebuild(self, bounds: Bounds) -> list[Batch]:
        """The same bytes again for a recorded batch; narrower ones where rows have gone bad; empty where settled, or
        where its file has been set aside as damaged."""
        epoch, first, last = bounds
        return await self._sent_again(lambda: [b for s in self._of(epoch) for b in s.rebuild(first, last)])

    async def split(self, bounds: Bounds) -> list[Batch]:
        """Two narrower batches of the same frames, recorded as such, in place of one that was refused."""
        epoch, first, last = bounds
        return await self._sent_again(lambda: [b for s in self._of(epoch) for b in s.split(first, last)])

    async def _sent_again(self, job: Callable[[], list[Batch]]) -> list[Batch]:
        try:
            return await self._job(job)
        except StoreError as err:
            log.warning("the buffer cannot be read now: %s", err)
            return []

    async def park(self, epoch: int, seq: int, code: str, reason: str) -> bool:
        """Take one frame out of the way for good, with the reason that the cloud gave: it stays in the table
        `parked`, a gap record says so to the cloud. False where the disk refused."""
        try:
            readings = await self._job(lambda: sum(s.park(seq, code, reason) for s in self._of(epoch)))
        except StoreError as err:
            log.warning("frame %d cannot be parked now: %s", seq, err)
            return False
        self._look()
        if readings:  # an event about a refused event would go round for ever
            self.record_event(
                "frame_refused", f"frame {seq} ({readings} readings) was refused: {code}: {reason}"
            )
        return True

    def settle(self, ack: Ack) -> None:
        """The cloud has these ranges: forget them, with the next transaction."""
        if self._of(ack.epoch):
            self._settled |= dict.fromkeys((ack.epoch, (first, last)) for first, last in ack.ranges)
            if self._timer is None:
                self._arm()

    # --- within ---

    def _of(self, epoch: int) -> list[Store]:
        """The file that holds this epoch, if one does by now."""
        stores = (self._store, *self._salvages.stores)
        return [store for store in stores if store.ledger.epoch == epoch]

    def _commit(
        self, group: Group, settled: dict[tuple[int, Range], None], room: int, *, patient: bool
    ) -> list[Batch]:
        """On the writer's thread."""
        batches = self._store.commit(group, self._of_this_epoch(settled), room, patient=patient)
        self._settle_old(settled)
        return batches

    def _claim(self, count: int, settled: dict[tuple[int, Range], None], lowest: Priority) -> list[Batch]:
        """On the writer's thread. What was salvaged has what the others leave."""
        acked = self._of_this_epoch(settled)
        try:
            batches = self._store.claim(count, acked, lowest)
        except StoreRefusing:
            batches = self._store.claim_reading(count, acked, lowest)  # the way out stays open
            if not batches:
                raise
            for key in settled:
                self._loop.call_soon_threadsafe(self._settled.setdefault, key, None)
            return batches
        for one in self._of_this_epoch(settled):
            settled.pop((self._store.ledger.epoch, one), None)
        self._settle_old(settled)
        if len(batches) < count and lowest is Priority.BULK:
            batches = [*batches, *self._salvages.claim(count - len(batches))]
        return batches

    def _settle_old(self, settled: Iterable[tuple[int, Range]]) -> None:
        """On the writer's thread."""
        for key in self._salvages.settle(settled):
            self._loop.call_soon_threadsafe(self._settled.setdefault, key, None)

    def _layout_data(self, key: int) -> bytes | None:
        """On the writer's thread: a layout's id is made of its content, so that of any file will do."""
        return self._store.layout_data(key)

    def _lost_with_a_file(self, scans: int, readings: int) -> None:
        now_ns = self._clock.boot_ns()
        self.record_gap(
            "corrupt", device="", scans=scans, readings=readings, from_boot_ns=now_ns, to_boot_ns=now_ns
        )

    def _of_this_epoch(self, settled: Iterable[tuple[int, Range]]) -> list[Range]:
        """On the writer's thread: an ack must never settle the frames of another epoch."""
        return [one for epoch, one in settled if epoch == self._store.ledger.epoch]

    def _arm(self, within_s: float | None = None) -> None:
        """Commit at most one interval from now: what the first frame of a group waits is the published loss window."""
        if not self._closed and within_s is not None:
            self._loop.call_later(within_s, self._wake.set)
        elif not self._closed and self._timer is None:
            self._timer = self._loop.call_later(self._interval_s, self._wake.set)

    def _job(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """One job on the writer's thread. The caller may be cancelled, the job never is."""
        return asyncio.shield(self._loop.run_in_executor(self._thread, work))

    def _take(self) -> Group:
        """The pending group, with what is to be told before its frames."""
        losses, self._losses = self._losses, {}
        for (device, reason), loss in losses.items():
            gap = GapFrame(self.epoch, 0, 0, loss.scans, loss.readings, reason, device, self.boot,
                           loss.from_boot_ns, loss.to_boot_ns)  # fmt: skip
            self._put(encode_frame(gap))
        clocks: list[ClockReading] = []
        self._look_once()
        dues, self._due = self._due, []
        for due in dues:
            clocks.append(due.reading)
            if due.step_ns:
                text = f"the wall clock was set by {due.step_ns / 1e9:+.3f} s"
                log.warning("%s; readings keep their order and their boot time", text)
                self._put(encode_frame(EventFrame(self.boot, due.reading.boot_ns, "clock_step", text)))
        events, self._store.events = self._store.events, []
        for code, text in events:
            self._put(encode_frame(EventFrame(self.boot, self._clock.boot_ns(), code, text)))
        group = Group(self._frames, self._readings, self._layouts, clocks, self._bytes)
        if self._alarms or self._bulk:
            group.frames = [f for f, _ in self._alarms] + self._frames + [f for f, _ in self._bulk]
            group.readings = [n for _, n in self._alarms] + self._readings + [n for _, n in self._bulk]
            group.alarms, group.bulk = len(self._alarms), len(self._bulk)
            self._alarms, self._bulk = [], []
        self._frames, self._readings, self._layouts, self._bytes = [], [], [], 0
        return group

    def _look_once(self) -> Due | None:
        due = self._watch.look(self._clock.read())
        if due is None or due.why == "start":  # the store wrote the first row itself
            return None
        self._due.append(due)
        return due

    def _look_at_clock(self) -> None:
        """Also while nothing is read: a step is stored before what comes after it, and what waited for a synchronized
        clock goes as soon as there is one."""
        if self._closed:
            return
        self._looker = self._loop.call_later(LOOK_S, self._look_at_clock)
        due = self._look_once()
        if due is not None and due.why != "minute":
            self._wake.set()
        waiting = self._store.waiting
        if self._was_waiting and not waiting and self.on_live is not None:
            self.on_live([])
        self._was_waiting = waiting

    def _put(self, frame: bytes) -> None:
        """A frame of our own: it always fits."""
        self._frames.append(frame)
        self._readings.append(0)
        self._bytes += len(frame) + _ROW_BYTES

    def _start_commit(self) -> asyncio.Future[bool]:
        """Hand the stuck or else the pending group to the writer; the future says whether it is kept."""
        self._wake.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        done: asyncio.Future[bool] = self._loop.create_future()
        group = self._stuck.popleft() if self._stuck else self._take()
        settled, self._settled = self._settled, {}
        if group.empty and not settled and self._condition is not Condition.HOLDING:
            done.set_result(True)
            return done
        room = self.live_room if self.on_live is not None else 0
        started_s = time.monotonic()
        patient = self._patient(group)
        job = self._loop.run_in_executor(
            self._thread, lambda: self._commit(group, settled, room, patient=patient)
        )
        self._committing = done

        def ended(job: asyncio.Future[list[Batch]]) -> None:
            self._committing = None
            error = job.exception()
            self._waited = isinstance(error, StoreWaits)
            if error is None:
                self._commits += 1
                self._commit_s = time.monotonic() - started_s
                self._commit_max_s = max(self._commit_max_s, self._commit_s)
                self._well()
                if self.on_live is not None and group.frames:
                    self.on_live(job.result())
                done.set_result(True)
            else:
                # Where it is full, less may fit; in any other case it may yet turn out to be kept, as a whole.
                full = isinstance(error, StoreFull)
                self._stuck.extendleft(reversed(slices(group, self._commit_bytes) if full else [group]))
                self._settled = settled | self._settled
                self._unwell(error)
                if isinstance(error, StoreRefusing):
                    done.set_result(False)
                else:
                    done.set_exception(error)

        job.add_done_callback(ended)
        return done

    def _patient(self, group: Group) -> bool:
        """Whether this group may wait in memory where it would take the room of what is held."""
        if self._clock.boot_ns() >= self._patient_until_ns:
            return False
        waiting = (group, *self._stuck)
        alarms = self._alarms or any(one.alarms for one in waiting)
        size = self._bytes + sum(one.size_bytes for one in waiting)
        return not alarms and 2 * size < self._limits.group_bytes

    def _well(self) -> None:
        self._look()
        if self._condition is Condition.HOLDING:
            log.info("the buffer takes readings again")
        now_s = time.monotonic()
        if self._store.evicting:
            self._evicted_s = now_s
            self._evicted_for_disk = self._store.short_of_disk
        elif self._evicted_for_disk and self._room_again():
            self._evicted_s, self._evicted_for_disk = -_EVICTING_FOR_S, False
        evicting = now_s - self._evicted_s < _EVICTING_FOR_S
        if evicting and self._condition is not Condition.EVICTING:
            log.warning("the buffer is at its cap: the oldest readings are dropped, and reported as gaps")
        elif self._condition is Condition.EVICTING and not evicting:
            log.info("the buffer is below its cap again")
        self._condition = Condition.EVICTING if evicting else Condition.OK
        self._cause = "disk_low" if evicting and self._store.short_of_disk else ""
        self._detail = (
            "at its cap or at the free-disk floor: the oldest readings are dropped; raise buffer.max_mb, free some"
            " space, or see why the link is down"
            if evicting
            else ""
        )

    def _room_again(self) -> bool:
        """Whether others left so much that the next step of evictions is not near."""
        try:
            disk = os.statvfs(self._store.path.parent)
        except OSError:
            return False
        floor = self._limits.free_disk_bytes
        return disk.f_bavail * disk.f_frsize > floor + max(floor // 4, _EASE_BYTES)

    def _unwell(self, error: BaseException) -> None:
        self._look()
        if self._condition is not Condition.HOLDING:
            log.error("the buffer holds new readings in memory: %s", error)
        self._condition = Condition.HOLDING
        self._detail = str(error)
        self._cause = getattr(error, "cause", "")

    def _look(self) -> None:
        self._size_bytes = self._store.size_bytes()


def _travelling(text: str) -> str:
    """Without lone surrogates, which an error of the system may carry and no encoding takes."""
    return text.encode("utf-8", "replace").decode()


def slices(group: Group, most_bytes: int) -> list[Group]:
    """A group as several of at most `most_bytes` each, in order; a single frame is never cut."""
    cut = [(0, len(group.frames))]
    if group.size_bytes > most_bytes:
        cut = parts([len(frame) + _ROW_BYTES for frame in group.frames], most_bytes)
    bulk_from = len(group.frames) - group.bulk
    made = [
        Group(
            frames,
            group.readings[a:b],
            size_bytes=sum(map(len, frames)) + _ROW_BYTES * (b - a),
            alarms=max(0, min(b, group.alarms) - a),
            bulk=max(0, b - max(a, bulk_from)),
        )
        for a, b in cut
        if (frames := group.frames[a:b])
    ]
    if made:
        made[0].layouts, made[0].clocks = group.layouts, group.clocks
    return made or [group]
