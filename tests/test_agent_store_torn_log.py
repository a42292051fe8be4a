"""The buffer whose log ends in what cannot be read: no seq is given out twice, and it is told which are passed over."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from agent.store import PAGE_BYTES, SKIPPED, Store
from config.wal import commits_passed_over, read_log
from tests.fakes.buffer import ModelCloud, StillClock, drain, group, opened

_FRAME = 24 + PAGE_BYTES


def crashed(tmp_path: Path) -> tuple[Path, set[int], int, int]:
    """A copy of the files as a crash leaves them, the seqs that were handed out, next_seq, and the first WAL frame
    of the last commit."""
    before, after = tmp_path / "before", tmp_path / "after"
    store = opened(before)
    for start in range(0, 30, 3):
        store.commit(group(start, start + 1, start + 2), (), 0)
    log = read_log(store.path)
    assert log is not None
    last_begins = len(log.frames)
    batches = store.commit(group(30, 31, 32), (), 1)
    sent = {seq for b in batches for seq in range(b.sealed.first, b.sealed.last + 1)}
    assert sent
    after.mkdir()
    for name in ("buffer.db", "buffer.db-wal"):
        shutil.copy(before / name, after / name)
    next_seq = store.ledger.next_seq
    store.close()
    return after, sent, next_seq, last_begins


def taken_on(folder: Path) -> tuple[Store, ModelCloud]:
    store = opened(folder, StillClock("boot-b"))
    cloud = ModelCloud()
    store.commit(group(100, 101, boot=store.ledger.boot), (), 0)
    drain(store, cloud)
    return store, cloud


@pytest.mark.parametrize("seed", range(8))
def test_after_rot_in_the_last_commit_no_seq_is_given_out_twice(tmp_path: Path, seed: int) -> None:
    folder, sent, next_seq, begins = crashed(tmp_path)
    wal = folder / "buffer.db-wal"
    data = bytearray(wal.read_bytes())
    at = random.Random(seed).randrange(32 + begins * _FRAME, len(data))
    data[at] ^= 1 << (seed % 8)
    wal.write_bytes(data)
    store, cloud = taken_on(folder)
    skipped = [gap for gap in cloud.gaps() if gap.reason == "skipped"]
    assert len(skipped) == 1, (seed, at)
    [gap] = skipped
    assert gap.last - gap.first + 1 == SKIPPED
    assert (gap.scans, gap.readings) == (0, 0), "nobody knows that anything was in it"
    assert all(gap.first <= seq <= gap.last for seq in sent), "what may have gone out is told as passed over"
    assert not {seq for _, seq in cloud.held} & sent
    assert min(seq for _, seq in cloud.held if seq > gap.last) >= next_seq
    assert store.ledger.next_seq == store.ledger.kept_frames + 1
    store.close()


def test_a_log_cut_within_its_last_commit_gives_no_seq_twice_either(tmp_path: Path) -> None:
    folder, sent, _, begins = crashed(tmp_path)
    wal = folder / "buffer.db-wal"
    wal.write_bytes(wal.read_bytes()[: 32 + begins * _FRAME + _FRAME + 100])
    store, cloud = taken_on(folder)
    assert [gap.reason for gap in cloud.gaps()] == ["skipped"]
    assert not {seq for _, seq in cloud.held} & sent
    store.close()


def test_a_crash_that_tore_nothing_passes_over_nothing(tmp_path: Path) -> None:
    folder, sent, next_seq, _ = crashed(tmp_path)
    store, cloud = taken_on(folder)
    assert cloud.gaps() == []
    assert store.ledger.next_seq == next_seq + 2
    assert {seq for _, seq in cloud.held} >= sent
    store.close()
    store, cloud = taken_on(folder)
    assert cloud.gaps() == []
    store.close()


def test_the_doubt_is_told_once(tmp_path: Path) -> None:
    folder, _, _, begins = crashed(tmp_path)
    wal = folder / "buffer.db-wal"
    data = bytearray(wal.read_bytes())
    data[32 + begins * _FRAME + 500] ^= 4
    wal.write_bytes(data)
    assert commits_passed_over(folder / "buffer.db") == 0, "a single one may be torn"
    store = opened(folder, StillClock("boot-b"))
    again = tmp_path / "again"
    again.mkdir()
    for name in ("buffer.db", "buffer.db-wal"):
        shutil.copy(folder / name, again / name)
    store.close()
    store, cloud = taken_on(again)
    assert [gap.reason for gap in cloud.gaps()] == ["skipped"]
    store.close()
