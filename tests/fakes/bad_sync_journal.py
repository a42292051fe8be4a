"""A journal at work while its disk does not sync: run as a process, with `tests/torture/bad_fsync.c` preloaded.

Prints the numbers that an append has kept, then those that the journal holds at the end.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import cloud.journal.sqlite
from cloud.journal.contract import Entry, JournalError
from cloud.journal.sqlite import SqliteJournal

T = TypeVar("T")
GATEWAY = "acme/plant-1"
APPENDS = 60
TRIES = 50


async def until_taken(work: Callable[[], Awaitable[T]]) -> T:
    """As a gateway does: what is refused is sent again."""
    for _ in range(TRIES):
        try:
            return await work()
        except JournalError:
            continue
    raise AssertionError(f"refused {TRIES} times")


async def opened(folder: Path) -> SqliteJournal:
    async def once() -> SqliteJournal:
        journal = SqliteJournal(folder / "journal.db", free_disk_bytes=0, commit_interval_s=0.0)
        await journal.open()
        return journal

    return await until_taken(once)


async def held(journal: SqliteJournal) -> list[int]:
    numbers: list[int] = []
    after = 0
    while rows := await journal.read(after, max_entries=100, max_bytes=2**24):
        after = rows[-1].offset
        numbers += [n for row in rows for first, last in row.fresh for n in range(first, last + 1)]
    return numbers


async def main(folder: Path) -> None:
    """Appends, cursors and reads through restarts."""
    cloud.journal.sqlite.WAL_CHECKPOINT_PAGES = 48  # type: ignore[misc]  # or there would be none
    journal = await opened(folder)
    for at in range(APPENDS):
        first = at * 10 + 1
        entries = [Entry(GATEWAY, 1, n, n, 1, n, b"%d" % n * 800) for n in range(first, first + 10)]
        await until_taken(lambda: journal.append(entries))  # noqa: B023 - awaited at once
        print("kept", *range(first, first + 10), flush=True)
        await until_taken(lambda: journal.commit("sink", journal.last_offset))  # noqa: B023
        assert len(await held(journal)) == first + 9  # and so a reader is open
        if at % 20 == 19:
            await journal.close()
            journal = await opened(folder)
            assert await journal.cursor("sink") == journal.last_offset
    got = await held(journal)
    assert [(c.frames_received - c.frames_duplicate) for c in await journal.counts()] == [len(got)]
    await journal.close()
    print(json.dumps({"got": got, "gaps": []}))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
