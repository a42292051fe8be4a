"""The buffer as the agent uses it: cheap to append to, committed on time, bounded, and alive through everything."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from agent.buffer import MAX_FRAME_BYTES, Buffer, BufferUnusable, Condition
from agent.clock import SystemClock
from agent.store import Batch
from config.agent import Buffer as BufferSettings
from drivers.contract import Point
from sync.wire import Ack, WireError, layout_of
from tests.fakes.buffer import (
    GATEWAY,
    PACKING,
    READINGS,
    Failing,
    ModelCloud,
    StillClock,
    drain,
    opened,
    scan,
)
from tests.fakes.cloud_door import until
from tests.fakes.running_buffer import running


async def deliver(buffer: Buffer, cloud: ModelCloud) -> None:
    """Send and settle all that is committed."""
    for record in buffer.recorded():
        for batch in await buffer.rebuild(record):
            buffer.settle(cloud.take(batch.sealed.payload))
    while batches := await buffer.claim(4):
        for batch in batches:
            buffer.settle(cloud.take(batch.sealed.payload))
    await buffer.commit()


async def test_readings_are_committed_within_the_interval_without_being_asked(tmp_path: Path) -> None:
    async with running(tmp_path) as buffer:
        assert buffer.append(scan(1), READINGS)
        assert buffer.state.pending_readings == READINGS
        await until(lambda: buffer.state.kept_readings == READINGS)
        assert buffer.state.pending_readings == 0
        assert buffer.state.commits == 1


async def test_much_pending_is_committed_before_the_interval_is_over(tmp_path: Path) -> None:
    async with running(tmp_path, BufferSettings(commit_interval_s=3600, commit_max_kb=16)) as buffer:
        assert buffer.append(scan(1), READINGS)
        await asyncio.sleep(0.05)
        assert buffer.state.commits == 0
        for n in range(200):
            assert buffer.append(scan(n, size=100), READINGS)
        await until(lambda: buffer.state.kept_frames == 201)


async def test_one_group_is_one_commit(tmp_path: Path) -> None:
    async with running(tmp_path, BufferSettings(commit_interval_s=3600)) as buffer:
        for n in range(1000):
            assert buffer.append(scan(n), READINGS)
        assert await buffer.commit()
        assert (buffer.state.commits, buffer.state.kept_frames) == (1, 1000)
        assert await buffer.commit()  # nothing pending: no commit
        assert buffer.state.commits == 1


async def test_the_live_lane_gets_what_a_commit_has_cut_and_the_rest_is_backlog(tmp_path: Path) -> None:
    async with running(tmp_path, BufferSettings(commit_interval_s=3600)) as buffer:
        lane: list[Batch] = []
        buffer.on_live = lane.extend
        buffer.append(scan(1), READINGS)
        await buffer.commit()
        assert lane == []  # no room was offered
        assert buffer.has_backlog
        buffer.live_room = 4
        buffer.append(scan(2), READINGS)
        await buffer.commit()
        assert [(b.sealed.first, b.sealed.last) for b in lane] == [(2, 2)]
        [old] = await buffer.claim(4)
        assert (old.sealed.first, old.sealed.last) == (1, 1)
        assert not buffer.has_backlog


async def test_what_does_not_fit_is_counted_and_told_as_a_gap(tmp_path: Path) -> None:
    cloud = ModelCloud()
    async with running(tmp_path, BufferSettings(commit_interval_s=3600, commit_max_kb=10**6)) as buffer:
        taken = refused = 0
        for n in range(20_000):  # the loop gets no turn: nothing can be committed meanwhile
            if buffer.append(scan(n, size=1000), READINGS):
                taken += 1
            else:
                refused += 1
        assert refused > 0
        assert buffer.state.overrun_scans == refused
        await buffer.commit()
        await buffer.commit()
        await deliver(buffer, cloud)
        [gap] = cloud.gaps()
        assert (gap.reason, gap.device, gap.scans, gap.readings) == (
            "overrun", "boiler", refused, refused * READINGS,
        )  # fmt: skip
        assert (gap.first, gap.last) == (0, 0)
        assert len(cloud.numbers()) == taken == 20_000 - refused


async def test_a_frame_too_large_to_travel_is_refused_and_told(tmp_path: Path) -> None:
    cloud = ModelCloud()
    async with running(tmp_path) as buffer:
        assert not buffer.append(scan(1, size=MAX_FRAME_BYTES), READINGS)
        await buffer.commit()
        await deliver(buffer, cloud)
        assert [(g.reason, g.readings) for g in cloud.gaps()] == [("oversized", READINGS)]


async def test_a_layout_too_large_to_travel_is_refused_at_once(tmp_path: Path) -> None:
    rng = random.Random(3)
    names = [f"{rng.getrandbits(400):x}" for _ in range(4000)]
    async with running(tmp_path) as buffer:
        with pytest.raises(WireError, match="split the device"):
            buffer.register(layout_of("big", "test", "big", [Point(name=n) for n in names]))
        largest = layout_of("large", "test", "large", [Point(name=f"point_{n:04}") for n in range(4096)])
        assert buffer.register(largest) is buffer.register(largest)


async def test_gaps_and_events_reach_the_cloud_with_their_neighbours(tmp_path: Path) -> None:
    cloud = ModelCloud()
    async with running(tmp_path, BufferSettings(commit_interval_s=3600)) as buffer:
        for n in range(3):
            buffer.record_gap(
                "push_queue", device="beacon", scans=1, readings=4, from_boot_ns=10 + n, to_boot_ns=20 + n
            )
        buffer.record_event("start", "the agent started")
        await buffer.commit()
        await deliver(buffer, cloud)
    [gap] = cloud.gaps()
    assert (gap.scans, gap.readings, gap.from_boot_ns, gap.to_boot_ns) == (3, 12, 10, 22)
    assert [(e.code, e.text) for e in cloud.events()] == [("start", "the agent started")]


async def test_a_step_of_the_wall_clock_is_written_down_and_told(tmp_path: Path) -> None:
    clock, cloud = StillClock(), ModelCloud()
    async with running(tmp_path, BufferSettings(commit_interval_s=3600), clock) as buffer:
        buffer.append(scan(1), READINGS)
        await buffer.commit()
        clock.offset_ns += 3600 * 10**9
        buffer.append(scan(2), READINGS)
        await buffer.commit()
        await deliver(buffer, cloud)
    [event] = cloud.events()
    assert (event.code, event.text) == ("clock_step", "the wall clock was set by +3600.000 s")
    conn = sqlite3.connect(tmp_path / "buffer.db")
    offsets = [row[0] for row in conn.execute("SELECT wall_ns - boot_ns FROM clock ORDER BY id")]
    conn.close()
    assert offsets[-1] - offsets[0] == 3600 * 10**9


async def test_the_state_adds_up_and_knows_the_oldest(tmp_path: Path) -> None:
    clock = StillClock()
    async with running(tmp_path, BufferSettings(commit_interval_s=3600), clock) as buffer:
        assert buffer.state.oldest_age_s is None
        buffer.append(scan(0), READINGS)
        await buffer.commit()
        clock.pass_s(90)
        state = buffer.state
        assert state.oldest_age_s == 90
        assert state.buffered_readings == READINGS
        assert state.condition is Condition.OK
        assert 0 < state.size_bytes < state.max_bytes


async def test_a_cancelled_wait_for_a_commit_leaves_the_buffer_whole(tmp_path: Path) -> None:
    cloud = ModelCloud()
    async with running(tmp_path, BufferSettings(commit_interval_s=3600)) as buffer:
        for n in range(50):
            buffer.append(scan(n), READINGS)
            waiting = asyncio.create_task(buffer.commit())
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        assert await buffer.commit()
        await deliver(buffer, cloud)
    assert cloud.numbers() == list(range(50))


async def test_a_reader_beside_the_running_agent_sees_whole_commits(tmp_path: Path) -> None:
    async with running(tmp_path, BufferSettings(commit_interval_s=3600)) as buffer:
        reader = sqlite3.connect(f"file:{tmp_path}/buffer.db?mode=ro", uri=True)
        for n in range(20):
            for _ in range(10):
                buffer.append(scan(n), READINGS)
            await buffer.commit()
            frames, kept = reader.execute(
                "SELECT (SELECT count(*) FROM frames), kept_frames FROM ledger"
            ).fetchone()
            assert frames == kept == 10 * (n + 1)
        reader.close()


async def test_close_commits_what_is_pending_and_a_second_close_does_nothing(tmp_path: Path) -> None:
    buffer = await Buffer.open(tmp_path / "buffer.db", GATEWAY, BufferSettings(), StillClock())
    buffer.register(PACKING.layout)
    buffer.append(scan(1), READINGS)
    await buffer.close()
    await buffer.close()
    assert not buffer.append(scan(2), READINGS)  # refused, and counted
    assert buffer.state.overrun_scans == 1
    store, cloud = opened(tmp_path), ModelCloud()
    drain(store, cloud)
    assert cloud.numbers() == [1]
    store.close()


async def test_two_agents_never_share_a_buffer(tmp_path: Path) -> None:
    async with running(tmp_path):
        with pytest.raises(BufferUnusable, match="another agent"):
            await Buffer.open(tmp_path / "buffer.db", GATEWAY, BufferSettings(), StillClock())


async def test_damage_at_start_is_told_to_the_cloud(tmp_path: Path) -> None:
    (tmp_path / "buffer.db").write_bytes(b"this is no database, however long it is" * 1000)
    cloud = ModelCloud()
    async with running(tmp_path) as buffer:
        buffer.append(scan(7), READINGS)
        await buffer.commit()
        await deliver(buffer, cloud)
    assert cloud.numbers() == [7]
    [event] = cloud.events()
    assert event.code == "buffer_damaged"
    assert "damaged-" in event.text


async def test_an_ack_survives_a_disk_that_refuses_and_one_of_another_epoch_settles_nothing(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, BufferSettings(commit_interval_s=3600)) as buffer:
        buffer.append(scan(1), READINGS)
        await buffer.commit()
        [batch] = await buffer.claim(1)
        buffer.settle(Ack(buffer.epoch + 1, ((1, 99),)))
        await buffer.commit()
        assert buffer.state.settled_frames == 0
        store = buffer._store
        assert store._conn is not None
        failing = Failing(store._conn, "COMMIT", sqlite3.SQLITE_READONLY, late=False)
        store._conn = failing  # type: ignore[assignment]  # stands in for it
        buffer.settle(Ack(batch.sealed.epoch, ((1, 1),)))
        assert not await buffer.commit()
        assert buffer.state.condition.value == "holding"
        assert "read-only" in buffer.state.detail
        assert await buffer.commit()
        assert buffer.state.settled_frames == 1
        assert buffer.state.condition is Condition.OK


async def test_an_ack_that_comes_while_the_file_is_replaced_settles_nothing_of_the_new_one(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, BufferSettings(commit_interval_s=3600)) as buffer:
        buffer.append(scan(1), READINGS)
        await buffer.commit()
        epoch = buffer.epoch
        buffer._store._damage = "made"  # as upkeep finds it; the next transaction replaces the file
        buffer.append(scan(2), READINGS)
        release = threading.Event()
        buffer._thread.submit(release.wait, 10.0)  # the commit waits behind it
        commit = asyncio.create_task(buffer.commit())
        await asyncio.sleep(0)
        buffer.settle(Ack(epoch, ((1, 99),)))
        release.set()
        assert await commit
        assert buffer.epoch != epoch
        await buffer.commit()
        assert buffer.state.settled_frames == 0
        cloud = ModelCloud()
        await deliver(buffer, cloud)
        assert cloud.numbers() == [2]


async def test_an_event_with_text_that_no_encoding_takes_is_kept_all_the_same(tmp_path: Path) -> None:
    async with running(tmp_path) as buffer:
        buffer.record_event("driver-fault", "no such file: /dev/\udc80")
        cloud = ModelCloud()
        await buffer.commit()
        await deliver(buffer, cloud)
        assert [event.text for event in cloud.events()] == ["no such file: /dev/?"]


async def test_every_commit_is_synced(tmp_path: Path) -> None:
    """What NORMAL loses at a power cut, FULL does not; nothing short of cutting the power shows it otherwise."""
    async with running(tmp_path) as buffer:

        def pragma(name: str) -> object:
            conn = buffer._store._conn
            assert conn is not None
            return conn.execute(f"PRAGMA {name}").fetchone()[0]

        assert await buffer._job(lambda: pragma("synchronous")) == 2
        assert await buffer._job(lambda: pragma("journal_mode")) == "wal"
        assert await buffer._job(lambda: pragma("wal_autocheckpoint")) == 0


async def test_append_costs_microseconds(tmp_path: Path) -> None:
    """The poller calls it once per scan; 20 µs is far above what it takes, and far below what would hurt."""
    async with running(tmp_path, BufferSettings(commit_interval_s=3600)) as buffer:
        frame = scan(1, size=200)
        count = 10_000
        started_s = time.process_time()
        for _ in range(count):
            buffer.append(frame, READINGS)
        assert (time.process_time() - started_s) / count < 20e-6


KILLS = int(os.environ.get("HEADGATE_KILLS", "12"))  #: 1000 take about six minutes
KILLS_SEED = int(os.environ.get("HEADGATE_KILLS_SEED", "11"))


@pytest.mark.timeout(120 + 3 * KILLS)
def test_sigkill_at_any_moment_loses_nothing_that_was_kept(tmp_path: Path) -> None:
    rng = random.Random(KILLS_SEED)
    kept = -1
    for _ in range(KILLS):
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.buffer_child", str(tmp_path), str(kept + 1)],
            stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent,
        )  # fmt: skip
        assert child.stdout is not None
        for _ in range(rng.randrange(1, 12)):
            kept = int(child.stdout.readline())
        time.sleep(rng.random() / 100)  # anywhere between two commits, or within one
        child.send_signal(signal.SIGKILL)
        told = child.stdout.read().split()
        child.wait()
        kept = max([kept, *map(int, told)])
        store = opened(tmp_path, SystemClock())  # type: ignore[arg-type]  # any clock will do
        conn = sqlite3.connect(f"file:{tmp_path}/buffer.db?mode=ro", uri=True)
        held, scans = conn.execute("SELECT count(*), total(readings > 0) FROM frames").fetchone()
        conn.close()
        assert held == store.ledger.held_frames
        assert scans >= kept + 1
        kept = int(scans) - 1  # what was committed and not yet printed counts as well
        store.close()
    store, cloud = opened(tmp_path), ModelCloud()
    drain(store, cloud)
    assert cloud.numbers() == list(range(kept + 1))
    store.close()


def test_a_full_disk_stops_nothing_for_good_and_every_loss_is_told(tmp_path: Path) -> None:
    alone = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    done = subprocess.run(
        [*alone, sys.executable, "-m", "tests.fakes.full_disk", str(tmp_path)],
        capture_output=True, text=True, timeout=100, check=False, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, (
        f"{done.stdout}{done.stderr}\n(needs a mount name space: run as root, or where user name spaces are allowed: "
        "sysctl kernel.unprivileged_userns_clone=1)"
    )
    assert done.stdout.endswith("ok\n")


async def test_a_clock_synchronized_between_the_opening_and_the_first_look_lets_go_what_waited(
    tmp_path: Path,
) -> None:
    """The row written at the opening says that it was not; no other was due before the next minute."""
    settings = BufferSettings(commit_interval_s=3600, clock_hold_s=3600)
    clock = StillClock()
    buffer = await Buffer.open(tmp_path / "buffer.db", GATEWAY, settings, clock)
    await buffer.close()
    clock.boot_id, clock.synchronized = "boot-b", False
    buffer = await Buffer.open(tmp_path / "buffer.db", GATEWAY, settings, clock)
    buffer.register(PACKING.layout)
    buffer.append(scan(1, boot=buffer.boot), READINGS)
    clock.synchronized = True
    assert await buffer.commit()
    assert [batch.readings for batch in await buffer.claim(4)] == [READINGS]
    await buffer.close()
