"""A buffer at work while its disk does not sync: run as a process, with `tests/torture/bad_fsync.c` preloaded.

Prints the numbers that a commit has kept, then what a cloud received of them at the end.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import agent.store
from agent.store import Limits, Store, StoreRefusing, StoreUnusable
from tests.fakes.buffer import GATEWAY, ModelCloud, StillClock, drain, group, number_of

T = TypeVar("T")
COMMITS = 60
TRIES = 50


def until_taken(work: Callable[[], T]) -> T:
    """As the buffer does: what the disk refuses is kept in memory and tried again."""
    for _ in range(TRIES):
        try:
            return work()
        except (StoreRefusing, StoreUnusable):
            continue
    raise AssertionError(f"refused {TRIES} times")


def opened(folder: Path) -> Store:
    def once() -> Store:
        store = Store(folder / "buffer.db", str(GATEWAY), Limits(max_bytes=2 * 2**20), StillClock())
        try:
            store.open()
        except BaseException:
            store.close()
            raise
        return store

    return until_taken(once)


def main(folder: Path) -> None:
    """Commits, claims and settles through restarts, until all is out."""
    agent.store._VACUUM_FREE_PAGES = 24  # type: ignore[misc]  # a file this small has no 8 MiB to give back
    store, cloud = opened(folder), ModelCloud()
    for at in range(COMMITS):
        numbers = range(at * 10, at * 10 + 10)
        made = group(*numbers, size=400, boot=store.ledger.boot)
        batches = until_taken(partial(store.commit, made, (), 1))
        for batch in batches:
            ack = cloud.take(batch.sealed.payload)
            until_taken(partial(store.claim, 1, ack.ranges))
        print("kept", *numbers, flush=True)
        if at % 20 == 19:
            store.close()
            store = opened(folder)
    until_taken(partial(drain, store, cloud))
    store.close()
    found = [number_of(raw) for _, raw in sorted(cloud.held.items())]
    print(json.dumps({"got": [n for n in found if n is not None], "gaps": [str(g) for g in cloud.gaps()]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
