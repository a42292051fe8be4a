"""What the cloud refused for good is kept for a look, and takes no more than a small part of the cap."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from tests.fakes.buffer import READINGS, ModelCloud, drain, group, opened


def test_parked_frames_are_bounded_in_bytes_and_each_is_counted(tmp_path: Path) -> None:
    store = opened(tmp_path, max_bytes=2 * 2**20)
    bound = store._limits.file_bytes // 16
    refused = 0
    for n in range(30):
        store.commit(group(n, size=20_000), (), 1)
        refused += store.park(store.ledger.next_seq - 1, "malformed", "the cloud says so")
        with closing(sqlite3.connect(f"file:{store.path}?mode=ro", uri=True)) as conn:
            frames, size = conn.execute("SELECT count(*), sum(length(data)) FROM parked").fetchone()
        assert store.parked == frames
        assert size <= bound
    assert 0 < store.parked < 30
    assert refused == 30 * READINGS
    cloud = ModelCloud()
    drain(store, cloud)
    assert sum(gap.readings for gap in cloud.gaps() if gap.reason == "refused") == refused
    store.close()
