"""Dead letters are durable, counted once, bounded out loud, and decode alone."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cloud.dead_letters import DeadLetters, DeadLettersError, NewLetter
from cloud.decode import Decoder
from cloud.journal.contract import Stored
from cloud.sinks.contract import ScanRecord
from drivers.contract import Point, Scan, ValueType
from sync.wire import ClockRow, Packing, encode_scan, layout_of, seal

S = 1_000_000_000
POINTS = (Point(name="a", type=ValueType.U16), Point(name="b", type=ValueType.U16))
PACKING = Packing(layout_of("boiler", "modbus", "heating", POINTS))


def entry(seq: int, *, gateway: str = "acme/plant-1", padding: int = 0) -> Stored:
    frame = encode_scan(PACKING, Scan(seq * S, POINTS, (seq % 60_000, 2)), 1)
    sealed = seal(
        gateway, 7, seq, [frame], [PACKING.layout], [ClockRow(1, "boot", 0, 1_795_000_000 * S, True)], 2
    )
    return Stored(
        seq * 10, gateway, 7, seq, seq, 2, 1_795_001_000 * S, ((seq, seq),), sealed.payload + b"\0" * padding
    )


def letter(
    seq: int, reason: str = "too hot", *, sink: str = "mysql", points: tuple[int, ...] = (), padding: int = 0
) -> NewLetter:
    return NewLetter(sink, entry(seq, padding=padding), reason, len(points) or 2, points)


@pytest.fixture
async def letters(tmp_path: Path) -> AsyncIterator[DeadLetters]:
    opened = DeadLetters(tmp_path / "new" / "dead_letters.db", clock_ns=lambda: 42)
    await opened.open()
    yield opened
    await opened.close()


async def test_a_letter_is_found_again_and_decodes_alone(letters: DeadLetters, tmp_path: Path) -> None:
    await letters.add([letter(5, points=(1,))])
    await letters.close()
    await letters.close()
    again = DeadLetters(tmp_path / "new" / "dead_letters.db")
    await again.open()
    (found,) = await again.letters()
    assert (found.sink, found.gateway, found.epoch, found.first, found.last) == (
        "mysql",
        "acme/plant-1",
        7,
        5,
        5,
    )
    assert (found.points, found.reason, found.readings, found.tries) == ((1,), "too hot", 1, 1)
    assert (found.received_at_ns, found.added_at_ns) == (1_795_001_000 * S, 42)
    shown = await again.show(found.id)
    assert shown is not None
    assert shown[0] == found
    assert shown[1].offset == 50
    (record,) = Decoder().decode(shown[1]).records
    assert isinstance(record, ScanRecord)
    assert (list(record.values), record.taken_at_ns) == ([5, 2], 1_795_000_005 * S)
    assert await again.show(999) is None
    await again.close()


async def test_the_same_refusal_is_one_letter(letters: DeadLetters) -> None:
    await letters.add([letter(5), letter(5, points=(1,)), letter(5, points=(0, 1)), letter(5, points=(1, 0))])
    await letters.add([letter(5, "colder now"), letter(5, sink="influxdb")])
    found = await letters.letters()
    assert [(x.sink, x.points, x.reason, x.tries) for x in found] == [
        ("mysql", (), "colder now", 1),
        ("mysql", (1,), "too hot", 1),
        ("mysql", (0, 1), "too hot", 1),
        ("influxdb", (), "too hot", 1),
    ]


async def test_the_same_refusal_in_other_bytes_takes_no_room(letters: DeadLetters) -> None:
    await letters.add([letter(5)])
    alone = (await letters.state()).size_bytes
    await letters.add([letter(5, padding=n) for n in range(1, 20)])
    assert ((await letters.state()).letters, (await letters.state()).size_bytes) == (1, alone)


async def test_letters_are_listed_by_sink_and_gateway_page_by_page(letters: DeadLetters) -> None:
    await letters.add([letter(n) for n in range(1, 8)] + [letter(8, sink="influxdb")])
    await letters.add([NewLetter("mysql", entry(9, gateway="acme/plant-2"), "too hot", 2)])
    first = await letters.letters(sink="mysql", limit=4)
    rest = await letters.letters(sink="mysql", after_id=first[-1].id)
    assert [x.first for x in first + rest] == [1, 2, 3, 4, 5, 6, 7, 9]
    assert [x.first for x in await letters.letters(gateway="acme/plant-2")] == [9]
    assert [(x.sink, x.gateway, x.letters, x.readings) for x in await letters.by_gateway()] == [
        ("influxdb", "acme/plant-1", 1, 2),
        ("mysql", "acme/plant-1", 7, 14),
        ("mysql", "acme/plant-2", 1, 2),
    ]


async def test_dropping_removes_payloads_that_nobody_needs(letters: DeadLetters, tmp_path: Path) -> None:
    await letters.add([letter(1), letter(1, sink="influxdb"), letter(2)])
    one, other, two = await letters.letters()
    before = (await letters.state()).size_bytes
    assert await letters.drop([one.id, one.id, 999]) == 1
    assert (await letters.state()).size_bytes == before
    assert await letters.drop([other.id, two.id]) == 2
    state = await letters.state()
    assert (state.letters, state.size_bytes, state.dropped) == (0, 0, 0)
    with sqlite3.connect(tmp_path / "new" / "dead_letters.db") as db:
        assert db.execute("SELECT count(*) FROM payloads").fetchone() == (0,)
    db.close()


async def test_a_refused_replay_says_so(letters: DeadLetters) -> None:
    await letters.add([letter(1)])
    (found,) = await letters.letters()
    await letters.refused_again(found.id, "still too hot")
    (found,) = await letters.letters()
    assert (found.reason, found.tries) == ("still too hot", 2)


async def test_above_its_bounds_the_oldest_go_and_are_counted_for_ever(tmp_path: Path) -> None:
    small = DeadLetters(tmp_path / "letters.db", max_letters=10, max_bytes=10_000)
    await small.open()
    await small.add([letter(n) for n in range(1, 14)])
    assert [x.first for x in await small.letters()] == list(range(4, 14))
    assert (await small.state()).dropped == 3
    await small.add([letter(20, padding=9_000)])
    state = await small.state()
    assert state.size_bytes <= 10_000
    assert (await small.letters())[-1].first == 20
    (count,) = await small.by_gateway()
    assert count.letters + count.dropped_letters == 14
    assert count.readings + count.dropped_readings == 28
    await small.drop([x.id for x in await small.letters()])
    await small.close()
    await small.open()
    assert (await small.state()).dropped == state.dropped
    await small.close()


async def test_a_flood_of_one_kind_does_not_wash_out_the_others(tmp_path: Path) -> None:
    small = DeadLetters(tmp_path / "letters.db", max_letters=10)
    await small.open()
    await small.add([letter(1, "a rare one"), letter(2, "older than retention", sink="influxdb")])
    for start in range(100, 200, 20):
        await small.add([letter(n, "older than retention") for n in range(start, start + 20)])
    found = await small.letters()
    assert [(x.sink, x.first) for x in found[:2]] == [("mysql", 1), ("influxdb", 2)]
    assert [x.first for x in found[2:]] == list(range(192, 200))
    assert (await small.state()).dropped == 92
    await small.close()


def test_what_was_added_survives_a_kill(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import asyncio, os
        from pathlib import Path
        from cloud.dead_letters import DeadLetters
        from tests.test_cloud_dead_letters import letter
        async def main():
            opened = DeadLetters(Path({str(tmp_path / "letters.db")!r}))
            await opened.open()
            for n in range(1, 20):
                await opened.add([letter(n)])
                print(n, flush=True)
            os.kill(os.getpid(), 9)
        asyncio.run(main())
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == -9, done.stderr

    async def held() -> list[int]:
        again = DeadLetters(tmp_path / "letters.db")
        await again.open()
        seqs = [x.first for x in await again.letters()]
        await again.close()
        return seqs

    assert asyncio.run(held()) == [int(line) for line in done.stdout.split()]


async def test_a_cancelled_add_is_whole_or_not_at_all(letters: DeadLetters) -> None:
    for n in range(1, 30):
        task = asyncio.create_task(letters.add([letter(n * 10 + k) for k in range(5)]))
        await asyncio.sleep(0.0002 * n)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await letters.add([letter(1)])
    seqs = [x.first for x in await letters.letters(limit=1000)]
    # What was given up on may still come, and then after what was asked later: each whole, in whatever order.
    tens = {seq // 10 for seq in seqs} - {0}
    assert sorted(seqs) == [1, *(n * 10 + k for n in sorted(tens) for k in range(5))]


async def test_the_file_is_for_its_owner_only(letters: DeadLetters, tmp_path: Path) -> None:
    assert (tmp_path / "new" / "dead_letters.db").stat().st_mode & 0o077 == 0


async def test_a_file_that_cannot_be_used_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DeadLettersError, match="is not open"):
        await DeadLetters(tmp_path / "letters.db").letters()
    (tmp_path / "garbage.db").write_bytes(b"this is no database at all, is it? " * 50)
    with pytest.raises(DeadLettersError, match="move the file aside"):
        await DeadLetters(tmp_path / "garbage.db").open()
    (tmp_path / "file").touch()
    with pytest.raises(DeadLettersError, match="writable"):
        await DeadLetters(tmp_path / "file" / "letters.db").open()
    newer = sqlite3.connect(tmp_path / "newer.db")
    newer.execute("PRAGMA user_version = 99")
    newer.close()
    with pytest.raises(DeadLettersError, match="upgrade"):
        await DeadLetters(tmp_path / "newer.db").open()
