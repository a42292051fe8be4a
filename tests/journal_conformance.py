"""What every journal must do: `class TestMyJournal(JournalConformance)` with a fixture `open_journal`.

`open_journal()` gives a journal, open, on the same store each time it is called within one test; the one before must
have been closed (or its process killed) first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from cloud.intervals import IntervalSet, count
from cloud.journal.contract import Entry, Journal, Range

OpenJournal = Callable[[], Awaitable[Journal]]
G = "acme/plant-1"


def entry(
    first: int, last: int, *, gateway: str = G, epoch: int = 7, at_ns: int = 1_000, size_bytes: int = 40
) -> Entry:
    payload = (f"{gateway}:{epoch}:{first}-{last};".encode() * size_bytes)[:size_bytes]
    return Entry(gateway, epoch, first, last, (last - first + 1) * 10, at_ns, payload)


async def everything(journal: Journal, after: int = 0) -> list[tuple[int, tuple[Range, ...]]]:
    out: list[tuple[int, tuple[Range, ...]]] = []
    while batch := await journal.read(after, max_entries=100, max_bytes=1 << 20):
        out.extend((stored.offset, stored.fresh) for stored in batch)
        after = batch[-1].offset
    return out


class JournalConformance:
    async def test_what_is_appended_is_read_back_as_it_was(self, open_journal: OpenJournal) -> None:
        journal = await open_journal()
        given = [entry(1, 5), entry(6, 6, epoch=8), entry(1, 2, gateway="b/c", at_ns=77)]
        appended = await journal.append(given)
        stored = await journal.read(0, max_entries=10, max_bytes=1 << 20)
        assert [a.offset for a in appended] == [s.offset for s in stored] == [1, 2, 3]
        for wanted, got in zip(given, stored, strict=True):
            assert (got.gateway, got.epoch, got.first, got.last) == (
                wanted.gateway,
                wanted.epoch,
                wanted.first,
                wanted.last,
            )
            assert (got.readings, got.received_at_ns, got.payload) == (
                wanted.readings,
                wanted.received_at_ns,
                wanted.payload,
            )
            assert got.fresh == ((wanted.first, wanted.last),)
        await journal.close()

    async def test_a_resend_is_held_once_and_only_once(self, open_journal: OpenJournal) -> None:
        journal = await open_journal()
        [first] = await journal.append([entry(1, 5)])
        [again] = await journal.append([entry(1, 5)])
        twice_in_one_call = await journal.append([entry(6, 9), entry(6, 9)])
        assert first.fresh == ((1, 5),)
        assert (again.offset, again.fresh) == (None, ())
        assert [a.fresh for a in twice_in_one_call] == [((6, 9),), ()]
        assert [fresh for _, fresh in await everything(journal)] == [((1, 5),), ((6, 9),)]
        await journal.close()

    async def test_a_partial_overlap_keeps_only_what_is_new(self, open_journal: OpenJournal) -> None:
        journal = await open_journal()
        await journal.append([entry(5, 8), entry(12, 13)])
        [appended] = await journal.append([entry(1, 20)])
        assert appended.fresh == ((1, 4), (9, 11), (14, 20))
        [stored] = await journal.read(2, max_entries=10, max_bytes=1 << 20)
        assert stored.fresh == ((1, 4), (9, 11), (14, 20))
        assert stored.payload == entry(1, 20).payload
        await journal.close()

    async def test_the_same_seqs_of_another_epoch_or_gateway_are_other_frames(
        self, open_journal: OpenJournal
    ) -> None:
        journal = await open_journal()
        appended = await journal.append(
            [entry(1, 5), entry(1, 5, epoch=8), entry(1, 5, gateway="acme/plant-2")]
        )
        assert [len(a.fresh) for a in appended] == [1, 1, 1]
        await journal.close()

    async def test_nothing_is_forgotten_when_it_is_opened_again(self, open_journal: OpenJournal) -> None:
        journal = await open_journal()
        await journal.append([entry(1, 5), entry(9, 9)])
        await journal.commit("influxdb", 1)
        before = await journal.counts()
        await journal.close()
        journal = await open_journal()
        assert await journal.cursor("influxdb") == 1
        assert await journal.counts() == before
        [appended] = await journal.append([entry(4, 10)])
        assert (appended.offset, appended.fresh) == (3, ((6, 8), (10, 10)))
        await journal.close()

    async def test_an_offset_is_never_used_twice_even_after_all_was_trimmed(
        self, open_journal: OpenJournal
    ) -> None:
        journal = await open_journal()
        await journal.append([entry(1, 1), entry(2, 2)])
        await journal.commit("s", 2)
        assert await journal.trim(["s"], keep_s=0, max_bytes=0) == 2
        assert (await journal.state()).first_offset == 3
        await journal.close()
        journal = await open_journal()
        [appended] = await journal.append([entry(3, 3)])
        assert appended.offset == 3
        await journal.close()

    async def test_trim_leaves_what_one_sink_has_not_passed(self, open_journal: OpenJournal) -> None:
        journal = await open_journal()
        await journal.append([entry(n, n) for n in range(1, 11)])
        await journal.commit("fast", 10)
        await journal.commit("slow", 4)
        assert await journal.trim(["fast", "slow"], keep_s=0, max_bytes=0) == 4
        assert [offset for offset, _ in await everything(journal)] == [5, 6, 7, 8, 9, 10]
        assert await journal.trim(["fast", "slow", "new"], keep_s=0, max_bytes=0) == 0
        await journal.close()

    async def test_trim_keeps_what_is_young_while_it_fits(self, open_journal: OpenJournal) -> None:
        journal = await open_journal()
        await journal.append([entry(n, n, at_ns=2**62) for n in range(1, 4)])
        await journal.commit("s", 3)
        assert await journal.trim(["s"], keep_s=3600, max_bytes=1 << 30) == 0
        await journal.close()

    async def test_a_trimmed_batch_is_still_a_duplicate(self, open_journal: OpenJournal) -> None:
        journal = await open_journal()
        await journal.append([entry(1, 100), entry(150, 160)])
        await journal.commit("s", 2)
        await journal.trim(["s"], keep_s=0, max_bytes=0)
        assert await journal.holds(G, 7, 90, 200) == ((90, 100), (150, 160))
        assert await journal.holds(G, 8, 90, 200) == ()
        [appended] = await journal.append([entry(1, 100)])
        assert appended.offset is None
        await journal.close()

    async def test_a_cursor_never_moves_back_but_by_reset(self, open_journal: OpenJournal) -> None:
        journal = await open_journal()
        await journal.append([entry(n, n) for n in range(1, 6)])
        assert await journal.cursor("s") == 0
        await journal.commit("s", 4)
        await journal.commit("s", 2)
        assert await journal.cursor("s") == 4
        await journal.reset("s", 1)
        assert await journal.cursor("s") == 1
        await journal.close()
        journal = await open_journal()
        assert await journal.cursor("s") == 1
        await journal.close()

    async def test_a_read_is_bounded_and_always_moves_on(self, open_journal: OpenJournal) -> None:
        journal = await open_journal()
        await journal.append([entry(n, n, size_bytes=1000) for n in range(1, 11)])
        assert len(await journal.read(0, max_entries=3, max_bytes=1 << 20)) == 3
        assert len(await journal.read(0, max_entries=10, max_bytes=2_500)) == 2
        assert len(await journal.read(0, max_entries=10, max_bytes=1)) == 1
        assert await journal.read(10, max_entries=10, max_bytes=1 << 20) == []
        await journal.close()

    async def test_a_waiting_reader_wakes_when_something_comes(self, open_journal: OpenJournal) -> None:
        journal = await open_journal()
        assert await journal.wait(0, 0.01) is False
        waiting = [asyncio.create_task(journal.wait(0, 20)) for _ in range(3)]
        await asyncio.sleep(0)
        await journal.append([entry(1, 1)])
        assert await asyncio.gather(*waiting) == [True, True, True]
        assert await journal.wait(0, 0) is True
        await journal.close()

    async def test_many_appends_at_once_are_each_answered_for_themselves(
        self, open_journal: OpenJournal
    ) -> None:
        journal = await open_journal()
        calls = [[entry(n * 2, n * 2 + 1), entry(n, n, epoch=9)] for n in range(1, 201)]
        answers = await asyncio.gather(*(journal.append(call) for call in calls))
        offsets = [a.offset for answer in answers for a in answer]
        assert sorted(o for o in offsets if o) == list(range(1, 401))
        stored = {s.offset: s for s in await journal.read(0, max_entries=1000, max_bytes=1 << 20)}
        for call, answer in zip(calls, answers, strict=True):
            for wanted, got in zip(call, answer, strict=True):
                assert got.offset is not None
                assert stored[got.offset].payload == wanted.payload
        await journal.close()

    async def test_the_counts_add_up(self, open_journal: OpenJournal) -> None:
        journal = await open_journal()
        await journal.append([entry(1, 10), entry(6, 15), entry(6, 15), entry(1, 3, gateway="b/c")])
        await journal.append([entry(1, 20)])
        stored = sum(count(fresh) for _, fresh in await everything(journal))
        counts = {c.gateway: c for c in await journal.counts()}
        assert sum(c.frames_received - c.frames_duplicate for c in counts.values()) == stored == 23
        assert counts[G].batches == 4
        assert (counts[G].frames_received, counts[G].frames_duplicate) == (50, 30)
        assert counts[G].readings_stored == 200
        assert counts["b/c"].frames_received == 3
        await journal.close()

    async def test_an_empty_journal_says_so(self, open_journal: OpenJournal) -> None:
        journal = await open_journal()
        state = await journal.state()
        assert (state.first_offset, state.last_offset, state.oldest_received_at_ns) == (1, 0, None)
        assert await journal.append([]) == []
        assert await journal.counts() == []
        await journal.append([entry(1, 1, at_ns=55)])
        state = await journal.state()
        assert (state.first_offset, state.last_offset, state.oldest_received_at_ns) == (1, 1, 55)
        assert state.size_bytes > 0
        await journal.close()

    @pytest.mark.parametrize("seed", range(4))
    async def test_any_order_of_sends_splits_and_restarts_holds_each_frame_once(
        self, open_journal: OpenJournal, seed: int
    ) -> None:
        import random

        rng = random.Random(seed)
        journal = await open_journal()
        model = IntervalSet()
        for _ in range(60):
            call = []
            for _ in range(rng.randint(1, 4)):
                first = rng.randint(1, 400)
                call.append(entry(first, first + rng.randint(0, 40)))
            for given, got in zip(call, await journal.append(call), strict=True):
                assert got.fresh == model.add(given.first, given.last)
            if rng.random() < 0.1:
                await journal.close()
                journal = await open_journal()
        seen = IntervalSet()
        for _, fresh in await everything(journal):
            for first, last in fresh:
                assert seen.add(first, last) == ((first, last),), "held twice"
        assert seen.ranges() == model.ranges()
        await journal.close()
