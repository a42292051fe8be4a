"""Intake: what it accepts, what it refuses and how it says so; bad input, limits and heartbeats."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloud.decode import Decoder
from cloud.intake import MAX_STATE_BYTES, Arrival, Intake, StateError, Verdict, merge
from cloud.journal.contract import Appended, Entry, JournalBroken, JournalFull
from cloud.journal.sqlite import SqliteJournal
from cloud.metrics import Gauges, Metrics, exposition
from cloud.sinks.contract import ScanRecord
from cloud.sinks.line_protocol import stamp
from drivers.contract import Point, Scan, ValueType
from sync.wire import (
    Ack,
    ClockRow,
    Nack,
    Packing,
    Reply,
    decode_reply,
    encode_reply,
    encode_scan,
    layout_of,
    seal,
)
from tests.fakes.batches import EPOCH, GATEWAY, batch, forged, from_the_future, largest_batch, spoilt

NOW_NS = 1_800_000_000 * 10**9
SPOILT = spoilt()


class Bench:
    """An intake on a real journal."""

    def __init__(
        self, journal: SqliteJournal, *, max_inflight: int = 4096, max_inflight_bytes: int = 2**27
    ) -> None:
        self.journal = journal
        self.metrics = Metrics()
        self.intake = Intake(
            journal, journal, self.metrics,
            max_inflight=max_inflight, max_inflight_bytes=max_inflight_bytes, clock_ns=lambda: NOW_NS,
        )  # fmt: skip

    async def verdicts(self, *payloads: bytes, gateway: str = GATEWAY) -> list[Verdict]:
        return await self.intake.accept([Arrival(gateway, p, 0.0) for p in payloads], door="test")

    async def replies(self, *payloads: bytes, gateway: str = GATEWAY) -> list[Reply]:
        return [verdict.reply for verdict in await self.verdicts(*payloads, gateway=gateway)]

    async def stored(self) -> list[tuple[int, int]]:
        entries = await self.journal.read(0, max_entries=10_000, max_bytes=2**27)
        return [(e.first, e.last) for e in entries]


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[SqliteJournal]:
    journal = SqliteJournal(tmp_path / "journal.db", commit_interval_s=0.0)
    await journal.open()
    yield journal
    await journal.close()


@pytest.fixture
def bench(journal: SqliteJournal) -> Bench:
    return Bench(journal)


async def test_an_ack_names_the_batch_and_the_clouds_time_and_the_journal_has_the_same_bytes(
    bench: Bench,
) -> None:
    sent = batch(1, 5)
    [reply] = await bench.replies(sent)
    assert reply == Ack(EPOCH, ((1, 5),), NOW_NS)
    [entry] = await bench.journal.read(0, max_entries=10, max_bytes=2**20)
    assert entry.payload == sent
    assert (entry.gateway, entry.epoch, entry.first, entry.last, entry.readings) == (GATEWAY, EPOCH, 1, 5, 40)
    assert entry.received_at_ns == NOW_NS


async def test_batches_that_come_together_are_told_apart_by_a_microsecond(bench: Bench) -> None:
    # Scans of a gateway without a clock are timed from the receipt: InfluxDB would keep one of two with the same time.
    await bench.replies(batch(1, 500), batch(501, 500), batch(1001, 500))
    entries = await bench.journal.read(0, max_entries=10, max_bytes=2**20)
    assert [e.received_at_ns for e in entries] == [NOW_NS, NOW_NS + 1000, NOW_NS + 2000]
    layout = layout_of("pump", "modbus", "flow", [Point(name="v", type=ValueType.F64)])
    packing = Packing(layout)
    scans = [
        encode_scan(packing, Scan(n * 10**9, (Point(name="v", type=ValueType.F64),), (float(n),)), 1)
        for n in range(1, 2001)
    ]
    stopped = [ClockRow(1, "boot", 0, 0, synchronized=False)]  # 1970
    at = [
        seal(GATEWAY, EPOCH + 1, n, scans[n - 1 : n + 499], [layout], stopped, 500).payload
        for n in (1, 501, 1001, 1501)
    ]
    await bench.replies(*at)
    records = [
        record
        for entry in await bench.journal.read(3, max_entries=10, max_bytes=2**20)
        for record in Decoder().decode(entry).records
        if isinstance(record, ScanRecord)
    ]
    assert len({stamp(record.taken_at_ns, record.seq) for record in records}) == 2000


class Slow(SqliteJournal):
    """Tells when it was asked, and commits when it is let."""

    async def append(self, entries: object) -> list[Appended]:
        self.asked.set()
        await self.let.wait()
        return await super().append(entries)  # type: ignore[arg-type]

    def prepare(self) -> None:
        self.asked, self.let = asyncio.Event(), asyncio.Event()


async def test_nothing_is_acknowledged_before_the_journal_has_it(tmp_path: Path) -> None:
    journal = Slow(tmp_path / "j.db")
    journal.prepare()
    await journal.open()
    bench = Bench(journal)
    sending = asyncio.create_task(bench.verdicts(batch(1)))
    await journal.asked.wait()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not sending.done()
    journal.let.set()
    [verdict] = await sending
    assert isinstance(verdict.reply, Ack)
    await journal.close()


async def test_a_resend_is_an_ack_too_and_told_apart(bench: Bench) -> None:
    sent = batch(1)
    verdicts = [*await bench.verdicts(sent), *await bench.verdicts(sent), *await bench.verdicts(batch(2, 5))]
    assert [isinstance(v.reply, Ack) for v in verdicts] == [True, True, True]
    assert [v.duplicate for v in verdicts] == [False, True, False]
    assert (bench.metrics.duplicate_batches, bench.metrics.duplicate_frames) == (1, 5)
    entries = await bench.journal.read(0, max_entries=10, max_bytes=2**20)
    assert [e.fresh for e in entries] == [((1, 3),), ((4, 6),)]


async def test_a_batch_in_another_gateways_name_is_refused_for_ever(bench: Bench) -> None:
    [reply] = await bench.replies(batch(1), gateway="acme/plant-2")
    assert isinstance(reply, Nack)
    assert (reply.code, reply.retry_after_s, reply.first, reply.last) == ("identity", None, 1, 3)
    assert await bench.stored() == []
    assert bench.metrics.refused == {"identity": 1}


@pytest.mark.parametrize("name", SPOILT)
async def test_bad_input_is_refused_by_code_counted_and_harms_nothing(bench: Bench, name: str) -> None:
    spoilt, code = SPOILT[name]
    replies = await bench.replies(batch(1), spoilt, batch(4))
    assert [type(r) for r in replies] == [Ack, Nack, Ack]
    assert isinstance(replies[1], Nack)
    assert replies[1].code == code
    assert replies[1].retry_after_s is None
    assert replies[1].text
    assert decode_reply(encode_reply(replies[1])) == replies[1]
    assert bench.metrics.refused == {code: 1}
    assert await bench.stored() == [(1, 3), (4, 6)]


async def test_a_refusal_of_damage_names_the_batch_where_its_head_can_be_read(bench: Bench) -> None:
    [reply] = await bench.replies(batch(7)[:-5])
    assert isinstance(reply, Nack)
    assert (reply.epoch, reply.first, reply.last) == (EPOCH, 7, 9)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
async def test_whatever_comes_gets_exactly_one_answer(bench: Bench, data: st.DataObject) -> None:
    good = batch(1)
    kind = data.draw(st.sampled_from(["noise", "cut", "flip", "insert"]))
    if kind == "noise":
        payload = data.draw(st.binary(max_size=200))
    elif kind == "cut":
        payload = good[: data.draw(st.integers(0, len(good) - 1))]
    elif kind == "flip":
        spoilt = bytearray(good)
        spoilt[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
        payload = bytes(spoilt)
    else:
        at = data.draw(st.integers(0, len(good)))
        payload = good[:at] + data.draw(st.binary(min_size=1, max_size=20)) + good[at:]
    [reply] = await bench.replies(payload)
    assert isinstance(reply, Nack), kind
    assert reply.retry_after_s is None or reply.code == "version"


async def test_the_largest_batch_is_taken(bench: Bench) -> None:
    [reply] = await bench.replies(largest_batch())
    assert isinstance(reply, Ack)


async def test_an_uncompressed_batch_is_taken(bench: Bench) -> None:
    [reply] = await bench.replies(forged(b"plain", raw_bytes=5, compression=0))
    assert isinstance(reply, Ack)


# --- full, broken, busy ---


class Unwilling(SqliteJournal):
    trouble_is: Exception | None = None

    async def append(self, entries: object) -> list[Appended]:
        if self.trouble_is:
            raise self.trouble_is
        return await super().append(entries)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("trouble", "code", "retry_after_s"),
    [
        (JournalFull("at /secret/path", 7.0), "full", 7.0),
        (JournalBroken("EIO at /secret/path"), "journal", 30.0),
    ],
)
async def test_a_journal_that_cannot_take_it_means_try_again_and_no_paths_are_told(
    tmp_path: Path, trouble: Exception, code: str, retry_after_s: float
) -> None:
    journal = Unwilling(tmp_path / "j.db")
    await journal.open()
    bench = Bench(journal)
    journal.trouble_is = trouble
    replies = await bench.replies(batch(1), b"garbage", batch(4))
    assert [r.code for r in replies if isinstance(r, Nack)] == [code, "head", code]
    assert isinstance(replies[0], Nack)
    assert replies[0].retry_after_s == retry_after_s
    assert "secret" not in replies[0].text
    assert bench.metrics.retry == {code: 2}
    journal.trouble_is = None
    assert [type(r) for r in await bench.replies(batch(1), batch(4))] == [Ack, Ack]
    assert bench.intake.inflight == bench.intake.inflight_bytes == 0
    await journal.close()


async def test_a_really_full_journal_answers_try_again_and_takes_the_same_batch_later(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "j.db", max_bytes=2**22, free_disk_bytes=0, commit_interval_s=0.0)
    await journal.open()
    bench = Bench(journal)
    acked, n = 0, 1
    while True:
        [reply] = await bench.replies(
            forged(bytes(100_000), raw_bytes=100_000, compression=0, first=n, last=n)
        )
        if isinstance(reply, Nack):
            break
        acked, n = acked + 1, n + 1
    assert (reply.code, reply.first) == ("full", n)
    assert reply.retry_after_s is not None
    assert len(await bench.stored()) == acked
    await journal.commit("s", acked)
    await journal.trim(["s"], keep_s=0, max_bytes=0)
    [reply] = await bench.replies(forged(bytes(100_000), raw_bytes=100_000, compression=0, first=n, last=n))
    assert isinstance(reply, Ack)
    await journal.close()


@pytest.mark.parametrize("limit", ["batches", "bytes"])
async def test_above_the_limit_of_what_is_under_way_the_rest_is_told_to_try_again(
    tmp_path: Path, limit: str
) -> None:
    journal = Slow(tmp_path / "j.db")
    journal.prepare()
    await journal.open()
    sent = [batch(1 + 3 * n) for n in range(10)]
    if limit == "batches":
        bench = Bench(journal, max_inflight=6)
    else:
        bench = Bench(journal, max_inflight_bytes=sum(len(s) for s in sent[:6]))
    first = asyncio.create_task(bench.verdicts(*sent[:4]))
    await journal.asked.wait()
    second = asyncio.create_task(bench.verdicts(*sent[4:]))
    await asyncio.sleep(0)
    journal.let.set()
    assert [type(v.reply) for v in await first] == [Ack] * 4
    replies = [v.reply for v in await second]
    assert [type(r) for r in replies] == [Ack, Ack, Nack, Nack, Nack, Nack]
    assert {r.code for r in replies if isinstance(r, Nack)} == {"busy"}
    assert bench.metrics.retry == {"busy": 4}
    assert all(isinstance(r, Ack) for r in await bench.replies(*sent[6:]))
    await journal.close()


async def test_an_entry_that_the_store_cannot_hold_fails_alone_in_time_and_the_journal_lives_on(
    journal: SqliteJournal,
) -> None:
    with pytest.raises(JournalBroken):
        await journal.append([Entry(GATEWAY, 1, 1, 1, 2**70, 1, b"x")])
    [appended] = await journal.append([Entry(GATEWAY, 1, 1, 1, 5, 1, b"x")])
    assert appended.offset == 1


# --- answers ---


def test_answers_are_merged_into_the_fewest_that_say_the_same() -> None:
    def ack(gateway: str, epoch: int, first: int, last: int) -> Verdict:
        return Verdict(gateway, Ack(epoch, ((first, last),), first))

    nack = Nack(1, 90, 91, "crc", "damaged")
    merged = merge(
        [ack("a/1", 1, 4, 6), ack("a/2", 1, 1, 3), ack("a/1", 1, 1, 3), Verdict("a/1", nack), ack("a/1", 2, 1, 1),
         ack("a/1", 1, 9, 9)]
    )  # fmt: skip
    assert merged == {
        "a/1": [nack, Ack(1, ((1, 6), (9, 9)), 9), Ack(2, ((1, 1),), 1)],
        "a/2": [Ack(1, ((1, 3),), 1)],
    }
    assert merge([]) == {}


# --- heartbeats and counters ---


async def test_the_latest_heartbeat_is_kept_as_it_came(bench: Bench) -> None:
    await bench.intake.on_state(GATEWAY, b'{"uptime_s": 1}', door="test")
    await bench.intake.on_state(GATEWAY, b'{"uptime_s": 2}', door="test")
    [state] = await bench.journal.states()
    assert (state.gateway, state.received_at_ns, state.state) == (GATEWAY, NOW_NS, b'{"uptime_s": 2}')


@pytest.mark.parametrize(
    "state",
    [b"", b"[]", b"17", b"{", b'{"a": \xff}', b"x" * (MAX_STATE_BYTES + 1), b"[" * 60_000],
    ids=["empty", "a list", "a number", "cut", "not UTF-8", "too large", "deep"],
)
async def test_a_heartbeat_that_is_no_small_json_object_is_refused_and_counted(
    bench: Bench, state: bytes
) -> None:
    with pytest.raises(StateError):
        await bench.intake.on_state(GATEWAY, state, door="test")
    assert bench.metrics.states_refused == 1
    assert await bench.journal.states() == []


async def test_the_counters_reach_prometheus_and_add_up(bench: Bench) -> None:
    await bench.verdicts(batch(1), batch(1), batch(2, 4), b"garbage")
    text = exposition(bench.metrics, Gauges(journal_bytes=5, dead_letters=(("mysql", 3),))).decode()
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert lines['headgate_batches_received_total{door="test"}'] == "4.0"
    assert lines['headgate_batches_refused_total{code="head"}'] == "1.0"
    assert lines["headgate_duplicate_batches_total"] == "1.0"
    assert lines["headgate_frames_acknowledged_total"] == "10.0"
    assert lines["headgate_duplicate_frames_total"] == "5.0"
    assert lines["headgate_ack_latency_seconds_count"] == "4.0"
    assert lines['headgate_dead_letters{sink="mysql"}'] == "3.0"
    [counts] = await bench.journal.counts()
    assert (counts.frames_received, counts.frames_duplicate) == (10, 5)


@pytest.mark.parametrize("newer", from_the_future().values(), ids=from_the_future())
async def test_a_version_that_this_cloud_does_not_read_yet_is_put_off_and_never_refused_for_good(
    bench: Bench, newer: bytes
) -> None:
    (reply,) = await bench.replies(newer)
    assert isinstance(reply, Nack)
    assert reply.code == "version"
    assert reply.retry_after_s
    assert await bench.stored() == []
