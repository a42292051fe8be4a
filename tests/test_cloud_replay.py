"""`headgate-cloud replay`: a sink gets again what was received, with the best times known, and nothing twice.

Each on the real store: SQLite, MariaDB, InfluxDB and the Delta archive.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
import pytest

from cloud.api.models import SinkReplayRequest
from cloud.api.operator import Operator
from cloud.clocks import FILE, Clocks
from cloud.dead_letters import DeadLetters
from cloud.journal.contract import Entry
from cloud.journal.sqlite import SqliteJournal
from cloud.runner import SinkRunner
from cloud.sinks.contract import Record, Settled, Sink
from config.cloud import Archive, Cloud, Embedded, Server
from drivers.contract import Scan
from sync.identity import Secret
from sync.wire import ClockRow, EventFrame, Packing, encode_frame, encode_scan, seal
from tests.servers import run
from tests.sink_conformance import HEATING, Store
from tests.test_cloud_sinks_archive import Folder as ArchiveFolder
from tests.test_cloud_sinks_embedded import Folder as EmbeddedFolder
from tests.test_cloud_sinks_influxdb import TOKEN_ENV, InfluxStore
from tests.test_cloud_sinks_mysql import Database

S = 10**9
EPOCH = 77
GATEWAY = "acme/plant-1"
PACKING = Packing(HEATING)
STORES = ("embedded", "archive", "mysql", "influxdb")


def right_ns(now_ns: int) -> int:
    """What wall minus boot clock really was: the boot began an hour ago."""
    return now_ns - 3_600 * S


def frame(seq: int, boot: int, boot_ns: int) -> bytes:
    return encode_scan(PACKING, Scan(boot_ns, (), (float(seq), 18.25, seq)), boot)


def batch(
    first: int,
    frames: Sequence[bytes],
    clocks: Sequence[ClockRow],
    received_ns: int,
    *,
    gateway: str = GATEWAY,
) -> Entry:
    readings = 3 * sum(1 for one in frames if one[1:2] == b"\x00")
    sealed = seal(gateway, EPOCH, first, frames, [HEATING], clocks, readings)
    return Entry(gateway, EPOCH, first, sealed.last, readings, received_ns, sealed.payload)


def a_boot_that_is_synchronized_late(now_ns: int, *, boot: int = 4, gateway: str = GATEWAY) -> list[Entry]:
    """60 scans and an event sent with a clock of 1970, then 20 with the right one; a second apart each."""
    wrong = ClockRow(boot, f"boot-{boot}", 130 * S, 130 * S, synchronized=False)
    right = ClockRow(
        boot, f"boot-{boot}", 170 * S, right_ns(now_ns) + 170 * S, synchronized=True, error_ns=10**7
    )
    entries = []
    for part in range(3):
        seqs = range(1 + 20 * part, 21 + 20 * part)
        frames = [frame(seq, boot, (100 + seq) * S) for seq in seqs]
        entries.append(batch(seqs[0], frames, [wrong], now_ns - 600 * S + part * 20 * S, gateway=gateway))
    told = encode_frame(EventFrame(boot, 161 * S, "start", "agent 0.1.0"))
    entries.append(batch(61, [told], [wrong], now_ns - 540 * S, gateway=gateway))
    seqs = range(62, 82)
    entries.append(
        batch(
            62,
            [frame(seq, boot, (100 + seq) * S) for seq in seqs],
            [right],
            now_ns - 500 * S,
            gateway=gateway,
        )
    )
    return entries


class Site:
    """A cloud with one store."""

    def __init__(self, kind: str, folder: Path, store: Store, config: Cloud, mysql: Secret | None) -> None:
        self.kind = kind
        self.folder = folder
        self.store = store
        self.config = config
        self.mysql = mysql
        self.journal = SqliteJournal(folder / "journal.db", commit_interval_s=0.0)
        self.letters = DeadLetters(folder / "dead_letters.db")
        self.now_ns = time.time_ns()

    @contextlib.asynccontextmanager
    async def running(self, *sinks: Sink) -> AsyncIterator[Operator]:
        """The sinks (the store's own where none is given), as `CloudServer` runs them."""
        clocks = Clocks(self.folder / FILE)
        await clocks.open()
        runners = [
            SinkRunner(sink, self.journal, self.letters, clocks=clocks, retry_base_s=0.01, retry_cap_s=0.1)
            for sink in sinks or (self.store.sink(),)
        ]
        tasks = [asyncio.create_task(runner.run()) for runner in runners]
        operator = Operator(
            self.config, dead_letters=self.letters, journal=self.journal, runners=runners, mysql=self.mysql,
            clocks=clocks,
        )  # fmt: skip
        try:
            async with asyncio.timeout(60):
                while any([(await r.state()).word != "running" for r in runners]):  # noqa: ASYNC110 - it tells no other way
                    await asyncio.sleep(0.01)
            yield operator
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await operator.close()
            await clocks.close()

    async def settled(self, name: str = "") -> None:
        last = (await self.journal.state()).last_offset
        deadline = time.monotonic() + 60
        while await self.journal.cursor(name or self.kind) < last:
            assert time.monotonic() < deadline, "the sink never came to the journal's end"
            await asyncio.sleep(0.01)

    async def times(self) -> dict[int, list[float]]:
        """Of each scan, told by its third value: how far its time is from the right one, in seconds."""
        found: dict[int, list[float]] = {}
        for told in await self.store.readings():
            if told.point == "starts" and told.gateway == GATEWAY:
                seq = int(told.value or 0)
                off_ns = told.taken_at_ns - right_ns(self.now_ns) - (100 + seq) * S
                found.setdefault(seq, []).append(off_ns / S)
        return found

    async def count(self) -> int:
        return len(await self.store.readings())


@pytest.fixture(params=STORES)
async def site(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Site]:
    kind: str = request.param
    off = Cloud(
        server=Server(data_dir=str(tmp_path)),
        embedded=Embedded(enabled=False),
        archive=Archive(enabled=False),
    )
    mysql: Secret | None = None
    store: Store
    if kind == "embedded":
        store = EmbeddedFolder(tmp_path)
        config = Cloud(server=off.server, archive=off.archive)
    elif kind == "archive":
        store = ArchiveFolder(tmp_path / "archive")
        config = Cloud(server=off.server, embedded=off.embedded, archive=Archive(commit_interval_s=0.05))
    elif kind == "mysql":
        server: run.MariaDb = request.getfixturevalue("mariadb_server")
        name = f"replay_{time.time_ns()}"
        await Database(server, server.database).rows(f"CREATE DATABASE {name} CHARACTER SET utf8mb4")
        store = database = Database(server, name)
        config = Cloud(
            server=off.server, embedded=off.embedded, archive=off.archive, mysql=database.settings()
        )
        mysql = Secret(server.password)
    else:
        influx: run.InfluxDb = request.getfixturevalue("influxdb_server")
        monkeypatch.setenv(TOKEN_ENV, influx.token)
        store = bucket = InfluxStore(influx)
        config = Cloud(
            server=off.server, embedded=off.embedded, archive=off.archive, influxdb=bucket.bucket.settings()
        )
    made = Site(kind, tmp_path, store, config, mysql)
    await made.journal.open()
    await made.letters.open()
    yield made
    await made.letters.close()
    await made.journal.close()


async def test_scans_sent_before_their_clock_was_set_are_right_to_a_second_after_a_replay(site: Site) -> None:
    async with site.running() as operator:
        await site.journal.append(a_boot_that_is_synchronized_late(site.now_ns))
        await site.settled()
        before = await site.times()
        assert sorted(before) == [*range(1, 61), *range(62, 82)]
        assert all(abs(before[seq][0]) > 1 for seq in range(1, 61)), "an estimate is an estimate"
        assert all(abs(before[seq][0]) < 1 for seq in range(62, 82))
        asked = SinkReplayRequest(site.kind, site.now_ns - 3_600 * S)
        would = await operator.replay_sink(
            SinkReplayRequest(site.kind, site.now_ns - 3_600 * S, dry_run=True)
        )
        assert (would.journal_batches, would.journal_readings, would.corrected_readings) == (5, 240, 180)
        assert await site.times() == before, "a dry run changes nothing"
        for again in range(2):
            done = await operator.replay_sink(asked)
            assert (done.corrected_readings, done.left) == (0 if again else 180, 0)
            after = await site.times()
            assert sorted(after) == sorted(before)
            assert all(len(found) == 1 and abs(found[0]) < 0.001 for found in after.values())
            verdict = await operator.verify()
            assert verdict.ok, verdict
    # Whatever is delivered again later gives the same times: after a restart, and from the journal's beginning.
    async with site.running() as operator:
        await site.journal.reset(site.kind, 0)
        done = await operator.replay_sink(asked)
        assert done.left == 0
        await site.settled()
        assert await site.times() == after
        assert (await operator.verify()).ok


async def test_only_what_is_asked_for_gets_a_better_time(site: Site) -> None:
    other = "acme/plant-2"
    async with site.running() as operator:
        await site.journal.append(a_boot_that_is_synchronized_late(site.now_ns))
        await site.journal.append(a_boot_that_is_synchronized_late(site.now_ns, gateway=other))
        await site.settled()
        before = await site.times()
        since_ns = site.now_ns - 3_600 * S
        done = await operator.replay_sink(SinkReplayRequest(site.kind, since_ns, gateway=other))
        assert done.corrected_readings == 180
        assert await site.times() == before
        # A part of a boot: the batches received before a time.
        done = await operator.replay_sink(
            SinkReplayRequest(site.kind, since_ns, to_ns=site.now_ns - 570 * S, gateway=GATEWAY)
        )
        assert done.corrected_readings == 120
        part = await site.times()
        assert all(abs(part[seq][0]) < 0.001 for seq in range(1, 41))
        assert all(part[seq] == before[seq] for seq in range(41, 61))
        assert (await operator.verify()).ok
        done = await operator.replay_sink(SinkReplayRequest(site.kind, since_ns))
        assert done.corrected_readings == 60
        assert all(len(t) == 1 and abs(t[0]) < 0.001 for t in (await site.times()).values())
        assert (await operator.verify()).ok


async def test_a_crash_in_the_middle_of_a_replay_doubles_and_loses_nothing(site: Site) -> None:
    """Where the old times are half removed: the next start puts them back, and the next replay moves them all."""

    class Crash(Exception):
        pass

    async with site.running() as operator:
        await site.journal.append(a_boot_that_is_synchronized_late(site.now_ns))
        await site.settled()
        before = await site.times()
        (runner,) = operator._runners.values()
        remove = runner.sink.remove

        async def half(records: Sequence[Record]) -> None:
            await remove(records[: len(records) // 2])
            raise Crash

        runner.sink.remove = half  # type: ignore[method-assign]  # the process ends here
        with pytest.raises(Crash):
            await runner.send_back(0)
    async with site.running() as operator:
        await site.settled()
        assert await site.times() == before
        assert (await operator.verify()).ok
        await operator.replay_sink(SinkReplayRequest(site.kind, 0))
        assert all(len(t) == 1 and abs(t[0]) < 0.001 for t in (await site.times()).values())
        assert (await operator.verify()).ok


async def test_the_account_holds_while_a_replay_is_under_way(site: Site) -> None:
    async with site.running() as operator:
        await site.journal.append(a_boot_that_is_synchronized_late(site.now_ns))
        await site.settled()
        (runner,) = operator._runners.values()
        write, gate = runner.sink.write, asyncio.Event()

        async def slow(records: Sequence[Record], upto_offset: int) -> Settled:
            await gate.wait()
            return await write(records, upto_offset)

        runner.sink.write = slow  # type: ignore[method-assign]  # a store that takes its time
        done = await operator.replay_sink(SinkReplayRequest(site.kind, 0, wait_s=0))
        assert done.left == 5
        assert await site.journal.cursor(site.kind) == 0
        assert (await operator.verify()).ok
        gate.set()
        await site.settled()
        assert (await operator.verify()).ok
        assert all(len(t) == 1 and abs(t[0]) < 0.001 for t in (await site.times()).values())


async def test_a_batch_of_30_days_ago_replayed_doubles_nothing(site: Site) -> None:
    old_ns = site.now_ns - 30 * 86_400 * S
    clock = ClockRow(1, "boot-1", 0, old_ns, synchronized=True)
    entries = [
        batch(1 + 50 * i, [frame(seq, 1, seq * S) for seq in range(1 + 50 * i, 51 + 50 * i)], [clock], old_ns + 200 * S)
        for i in range(4)
    ]  # fmt: skip
    async with site.running() as operator:
        await site.journal.append(entries)
        await site.settled()
        assert await site.count() == 600
        for since_ns in (old_ns, 0, site.now_ns):
            await operator.replay_sink(SinkReplayRequest(site.kind, since_ns))
        await site.journal.append(entries)  # a gateway that never heard the acks
        await site.settled()
        assert await site.count() == 600
        assert (await operator.verify()).ok


async def test_a_store_that_lost_everything_is_filled_from_the_archive_and_the_journal(
    site: Site, tmp_path: Path
) -> None:
    """The journal has let go of the first batches; the archive has them, with the estimates."""
    if site.kind == "archive":
        return  # it is filled from the journal only: the tests above
    config = msgspec.structs.replace(site.config, archive=Archive(commit_interval_s=0.05))
    site.config = config
    entries = a_boot_that_is_synchronized_late(site.now_ns)
    async with site.running(ArchiveFolder(tmp_path / "archive").sink()) as operator:
        await site.journal.append(entries)
        await site.settled("archive")
    await site.journal.trim(["archive"], keep_s=0, max_bytes=0)
    assert (await site.journal.state()).first_offset == 6
    await site.journal.append(
        [batch(82, [frame(82, 4, 182 * S)], entries_clock(site.now_ns), site.now_ns - 400 * S)]
    )
    async with site.running(site.store.sink(), ArchiveFolder(tmp_path / "archive").sink()) as operator:
        await site.settled()
        assert sorted(await site.times()) == [82]
        done = await operator.replay_sink(SinkReplayRequest(site.kind, 0))
        # The first batch that the journal holds came in the last microsecond of those asked of the archive.
        assert (done.archive_readings, done.corrected_readings, done.note) == (243, 180, "")
        for _ in range(2):
            times = await site.times()
            assert sorted(times) == [*range(1, 61), *range(62, 83)]
            assert all(len(t) == 1 and abs(t[0]) < 0.001 for t in times.values())
            await operator.replay_sink(SinkReplayRequest(site.kind, 0))
        verdict = await operator.verify()
        assert all(row.ok for row in verdict.sinks if row.sink == site.kind and not row.missed), verdict


def entries_clock(now_ns: int) -> list[ClockRow]:
    return [ClockRow(4, "boot-4", 170 * S, right_ns(now_ns) + 170 * S, synchronized=True, error_ns=10**7)]
