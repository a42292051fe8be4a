"""A start on a disk that is already full: what is held is sent first, and gives way only when nothing else is left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.buffer import PATIENT_S, Buffer, Condition
from agent.store import Limits, Store, StoreWaits
from config.agent import Buffer as BufferSettings
from drivers.contract import Priority
from tests.fakes.buffer import GATEWAY, READINGS, ModelCloud, StillClock, drain, group, scan
from tests.fakes.cloud_door import until
from tests.fakes.running_buffer import running

SETTINGS = BufferSettings(max_mb=16, commit_interval_s=3600, commit_max_kb=4096)
HELD = 6000


@contextmanager
def full_disk() -> Iterator[None]:
    statvfs = os.statvfs

    def no_room(path: Path) -> os.statvfs_result:
        found = list(statvfs(path))
        found[4] = 0  # f_bavail
        return os.statvfs_result(found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "statvfs", no_room)
        yield


async def hold(folder: Path, clock: StillClock) -> None:
    async with running(folder, SETTINGS, clock) as buffer:
        for begin in range(0, HELD, 1000):
            read(buffer, begin, 1000)
            assert await buffer.commit()


async def send(buffer: Buffer, cloud: ModelCloud) -> None:
    for bounds in buffer.recorded():
        for batch in await buffer.rebuild(bounds):
            buffer.settle(cloud.take(batch.sealed.payload))
    while batches := await buffer.claim(4):
        for batch in batches:
            buffer.settle(cloud.take(batch.sealed.payload))


def read(buffer: Buffer, begin: int, count: int, priority: Priority = Priority.NORMAL) -> None:
    for number in range(begin, begin + count):
        assert buffer.append(scan(number, boot=buffer.boot, size=400), READINGS, priority)


async def test_new_readings_wait_until_what_is_held_is_sent_and_nothing_is_lost(tmp_path: Path) -> None:
    clock, cloud = StillClock(), ModelCloud()
    await hold(tmp_path, clock)
    with full_disk():
        async with running(tmp_path, SETTINGS, clock) as buffer:
            read(buffer, HELD, 1000)
            assert not await buffer.commit()
            state = buffer.state
            assert (state.condition, state.cause) == (Condition.HOLDING, "disk_low")
            assert "wait in memory" in state.detail
            assert state.pending_readings >= 1000 * READINGS
            await send(buffer, cloud)
            assert await buffer.commit()
            assert buffer.state.condition is Condition.OK
            await send(buffer, cloud)
            assert buffer.state.gapped_readings == 0
    assert cloud.numbers() == list(range(HELD + 1000))


async def test_what_is_held_gives_way_when_its_time_is_over_and_is_told(tmp_path: Path) -> None:
    clock, cloud = StillClock(), ModelCloud()
    await hold(tmp_path, clock)
    with full_disk():
        async with running(tmp_path, SETTINGS, clock) as buffer:
            read(buffer, HELD, 1000)
            assert not await buffer.commit()
            clock.pass_s(PATIENT_S)
            assert await buffer.commit()
            assert buffer.state.gapped_readings > 0
            await send(buffer, cloud)
            gapped = buffer.state.gapped_readings
    assert cloud.numbers()[-1000:] == list(range(HELD, HELD + 1000))
    assert len(cloud.numbers()) * READINGS + gapped == (HELD + 1000) * READINGS
    assert sum(gap.readings for gap in cloud.gaps()) == gapped


async def test_an_alarm_does_not_wait_for_what_is_held_to_be_sent(tmp_path: Path) -> None:
    clock = StillClock()
    await hold(tmp_path, clock)
    with full_disk():
        async with running(tmp_path, SETTINGS, clock) as buffer:
            read(buffer, HELD, 500)
            assert not await buffer.commit()
            read(buffer, HELD + 500, 1, Priority.ALARM)
            await until(lambda: buffer.state.pending_frames == 0)
            assert buffer.state.gapped_readings > 0


async def test_new_readings_wait_only_while_memory_has_room_for_them(tmp_path: Path) -> None:
    clock = StillClock()
    await hold(tmp_path, clock)
    with full_disk():
        async with running(tmp_path, SETTINGS, clock) as buffer:
            read(buffer, HELD, 100)
            assert not await buffer.commit()
            read(buffer, HELD + 100, buffer._limits.group_bytes // 2 // 400)
            assert await buffer.commit()
            assert buffer.state.overrun_readings == 0
            assert buffer.state.gapped_readings > 0


async def test_readings_that_wait_are_kept_when_the_agent_ends(tmp_path: Path) -> None:
    clock, cloud = StillClock(), ModelCloud()
    await hold(tmp_path, clock)
    with full_disk():
        async with running(tmp_path, SETTINGS, clock) as buffer:
            read(buffer, HELD, 500)
            assert not await buffer.commit()
    async with running(tmp_path, SETTINGS, clock) as buffer:
        await send(buffer, cloud)
    assert cloud.numbers()[-500:] == list(range(HELD, HELD + 500))


def test_acks_are_applied_though_the_group_beside_them_waits(tmp_path: Path) -> None:
    limits, cloud = Limits(max_bytes=2**24), ModelCloud()
    store = Store(tmp_path / "buffer.db", str(GATEWAY), limits, StillClock())
    store.open()
    store.commit(group(*range(2000), size=400), (), 0)
    acked = [r for batch in store.claim(1, ()) for r in cloud.take(batch.sealed.payload).ranges]
    large = group(*range(2000, 2600), size=400)
    with full_disk():
        with pytest.raises(StoreWaits):
            store.commit(large, acked, 0, patient=True)
        assert store.ledger.settled_frames > 0
        assert store.ledger.gapped_frames == 0
        drain(store, cloud)
        store.commit(large, (), 0, patient=True)
        drain(store, cloud)
    assert cloud.numbers() == list(range(2600))
    assert not cloud.gaps()
    store.close()


def test_an_empty_buffer_waits_for_nothing_but_says_that_there_is_no_room(tmp_path: Path) -> None:
    store = Store(tmp_path / "buffer.db", str(GATEWAY), Limits(max_bytes=2**24), StillClock())
    store.open()
    with full_disk(), pytest.raises(Exception, match="holds nothing that it may drop"):
        store.commit(group(*range(2000), size=400), (), 0, patient=True)
    store.close()
