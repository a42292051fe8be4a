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
6. A disk that refuses does not stop the gateway: new readings wait in bounded memory (`Condition.HOLDING`).

All methods are called from the event loop's thread.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from agent.clock import Clock
from config.agent import Buffer as BufferSettings
from sync.identity import GatewayName
from sync.wire import Ack, Layout, Packing, Sealed


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

    @property
    def buffered_frames(self) -> int:
        return self.kept_frames - self.settled_frames - self.gapped_frames

    @property
    def buffered_readings(self) -> int:
        return self.kept_readings - self.settled_readings - self.gapped_readings


class BufferError(Exception):
    """The buffer cannot be opened at all (its folder is missing or another agent uses it); a human is told what to do.
    A damaged file is not such a case: it is set aside and a fresh one opened."""


class Buffer:
    """The gateway's buffer. `async with await Buffer.open(...)`, or `open` ... `close`."""

    boot: int  #: this boot's number, for `sync.wire.encode_scan`

    @classmethod
    async def open(cls, path: Path, gateway: GatewayName, settings: BufferSettings, clock: Clock) -> Buffer:
        """Open or make the buffer file. Damage sets the file aside; raises `BufferError` only where no file at all
        can be had or another agent holds it. `run` must be started for commits to happen."""
        raise NotImplementedError

    # --- for the poller ---

    def register(self, layout: Layout) -> Packing:
        """The compiled layout for `encode_scan`. It is stored before the first frame that names it. Cheap when
        called again with an equal layout."""
        raise NotImplementedError

    def append(self, frame: bytes, readings: int) -> bool:
        """Put one encoded frame into the pending group. False: it did not fit and is lost, already counted as an
        overrun here (`overrun_scans`, and a gap record goes to the cloud); count it in the device's health too."""
        raise NotImplementedError

    def record_event(self, code: str, text: str, device: str = "") -> None:
        """Keep something worth telling that is not a reading (a start, a driver that failed)."""
        raise NotImplementedError

    def record_gap(
        self, reason: str, *, device: str, scans: int, readings: int, from_boot_ns: int, to_boot_ns: int
    ) -> None:
        """Report scans lost in front of the buffer (a full push queue). Neighbours of one device and reason within
        one group become one record."""
        raise NotImplementedError

    # --- for the daemon ---

    @property
    def state(self) -> BufferState:
        """As of the last commit, with the pending group as it is now. Costs nothing to ask."""
        raise NotImplementedError

    async def run(self) -> None:
        """Commit on time, for ever: one task of the daemon. Survives a disk that refuses."""
        raise NotImplementedError

    async def commit(self) -> bool:
        """Commit the pending group now. False where the disk refused (the group is still pending)."""
        raise NotImplementedError

    async def close(self) -> None:
        """Commit, apply the acks that came, checkpoint, let go. Never raises; safe to call twice."""
        raise NotImplementedError

    # --- for the forwarder ---

    on_live: Callable[[Sequence[Sealed]], None] | None  #: called on the loop with the batches a commit has cut
    live_room: int  #: how many batches the next commit may cut for the live lane; 0 leaves its frames to the backlog

    def settle(self, ack: Ack) -> None:
        """The cloud has these ranges: forget them, with the next transaction."""
        raise NotImplementedError
