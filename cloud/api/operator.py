"""What an operator asks and does, as functions: the API and the command line both call these.

Rules:
1. Nothing here knows HTTP; what cannot be answered is an `OperatorError` that says what to change.
2. Reading disturbs nobody: stores are asked page by page, on connections of their own.
3. `verify` trusts no counter of a sink: it counts what the store holds (`Verdict`). On a live system a sink moves
   while it is counted; the account is then held against the journal before and after.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from cloud.api.models import (
    DeadLetter,
    DeadLetterContent,
    DeadLettersPage,
    Device,
    Event,
    FrameAccount,
    Gap,
    Gateway,
    Heartbeat,
    Hole,
    Point,
    Reading,
    Refusal,
    Replay,
    Selection,
    SinkAccount,
    SinkReplay,
    SinkReplayRequest,
    Store,
    Taken,
    Value,
    Verdict,
)
from cloud.api.times import iso
from cloud.clocks import Clocks
from cloud.dead_letters import DeadLetters, DeadLettersError, Letter
from cloud.decode import Decoder
from cloud.health import nothing_left
from cloud.intake import Arrival, Intake
from cloud.intake import Verdict as IntakeVerdict
from cloud.intervals import IntervalSet, coalesce
from cloud.journal.contract import JournalError
from cloud.metrics import Metrics
from cloud.sinks.contract import GapRecord, RetryLater, ScanRecord, SinkError, Tally
from cloud.skew import Skews
from config.cloud import Cloud
from drivers.contract import Quality, Reason
from sync.identity import IdentityError, Secret, parse_name
from sync.wire import Ack, Head, WireError, claimed, open_head

if TYPE_CHECKING:
    from cloud.journal.sqlite import SqliteJournal
    from cloud.registry import GapTally, GatewayRow, Key, ReadingRow, Registry
    from cloud.runner import SinkRunner
    from cloud.sinks.archive_reader import ArchiveReader, Row

PAGE: Final = 1_000  #: readings per page: a few milliseconds of work between two looks at the doors
MAX_LIMIT: Final = 10_000_000
SHOWN_HOLES: Final = 100  #: of a gateway
NS_PER_DAY: Final = 86_400 * 10**9
MAX_LETTERS: Final = 1_000  #: replayed or dropped per call


class OperatorError(Exception):
    """It cannot be answered; the text says what to change."""


class NotFound(OperatorError):
    """No such gateway, device, letter or store."""


class NotNow(OperatorError):
    """The same again later."""

    def __init__(self, text: str, after_s: float | None = None) -> None:
        super().__init__(text)
        self.after_s = after_s


class Query(msgspec.Struct, frozen=True):
    """Which readings: from_ns <= taken_at_ns < to_ns."""

    gateway: str
    device: str | None = None
    point: str | None = None
    from_ns: int = 0
    to_ns: int = 2**63 - 1
    limit: int = 1_000
    after: str | None = None
    store: Store | None = None


class Pages(Protocol):
    """Readings, page by page. `next` is known once they are all taken."""

    next: str | None

    def __aiter__(self) -> AsyncIterator[Sequence[Reading]]: ...


class Operator:
    """Asks and does. Made by the server from what it runs, or by the command line from the files (`local.py`)."""

    def __init__(
        self,
        config: Cloud,
        *,
        dead_letters: DeadLetters,
        journal: SqliteJournal | None = None,
        runners: Sequence[SinkRunner] = (),
        mysql: Secret | None = None,
        intake: Intake | None = None,
        clocks: Clocks | None = None,
    ) -> None:
        self._config = config
        self._journal = journal
        self._dead_letters = dead_letters
        self._runners = {runner.sink.name: runner for runner in runners}
        self._mysql = mysql
        self._registries: dict[str, Registry] = {}
        self._intake = intake
        self._clocks = clocks or Clocks()
        self._decoder = Decoder(Skews(round(config.limits.skew_alarm_s * 1e9)))

    async def close(self) -> None:
        registries, self._registries = self._registries, {}
        for registry in registries.values():
            await registry.close()

    # --- gateways ---

    async def gateways(self) -> list[Gateway]:
        """All that are admitted, or were ever seen."""
        seen = {f"{row.tenant}/{row.name}": row for row in await self._seen()}
        admitted = {f"{g.tenant}/{g.name}" for g in self._config.gateway}
        counts = {}
        beats = {}
        if self._journal is not None:
            counts = {row.gateway: row for row in await self._journal.counts()}
            beats = {row.gateway: row for row in await self._journal.states()}
        found: list[Gateway] = []
        for name in sorted({*seen, *admitted, *counts, *beats}):
            row, count, beat = seen.get(name), counts.get(name), beats.get(name)
            last_ns = max(row.last_seen_ns if row else 0, beat.received_at_ns if beat else 0) or None
            found.append(Gateway(
                gateway=name,
                admitted=name in admitted,
                first_seen=iso(row.first_seen_ns) if row else None,
                last_seen=iso(last_ns) if last_ns else None,
                last_seen_ns=last_ns,
                batches=count.batches if count else 0,
                frames_received=count.frames_received if count else 0,
                frames_duplicate=count.frames_duplicate if count else 0,
                readings=count.readings_stored if count else 0,
                heartbeat=_heartbeat(beat.received_at_ns, beat.state) if beat else None,
            ))  # fmt: skip
        return found

    async def gateway(self, name: str) -> Gateway:
        """Raises `NotFound`."""
        for gateway in await self.gateways():
            if gateway.gateway == name:
                return gateway
        raise NotFound(f"no gateway {name!r} is admitted or was ever seen")

    async def devices(self, gateway: str) -> list[Device]:
        """Its devices with their points. Raises `NotFound`."""
        registry, row = await self._known(gateway)
        found: list[Device] = []
        with _asking():
            for device in await registry.devices(row.id):
                points = [Point(p.name, p.type, p.unit, p.version) for p in await registry.points(device.id)]
                found.append(Device(device.name, device.driver, device.measurement, device.tags, points))
        return found

    async def latest(self, gateway: str, device: str | None = None) -> list[Reading]:
        """The newest reading of every point. Raises `NotFound`."""
        registry, row = await self._known(gateway)
        with _asking():
            return [_from_registry(gateway, r) for r in await registry.latest(row.id, device=device)]

    async def gaps(self, gateway: str | None, limit: int = 1_000, *, since_ns: int = 0) -> list[Gap]:
        """Told since then, the newest first; None: by any gateway. Raises `NotFound`."""
        registry, only = self._registry_of_names(), None
        if gateway is not None:
            registry, row = await self._known(gateway)
            only = row.id
        with _asking():
            names = {row.id: f"{row.tenant}/{row.name}" for row in await registry.gateways()}
            rows = await registry.gaps(only, since_ns=since_ns, limit=limit)
        return [
            Gap(
                names.get(g.gateway_id, "?"), g.device, g.reason, iso(g.from_ns), iso(g.to_ns), g.scans, g.readings,
                g.lost_scans, g.lost_readings, g.gap_epoch, g.first_seq, g.last_seq, iso(g.received_at_ns),
                g.priority, g.frames,
            )
            for g in rows
        ]  # fmt: skip

    async def events(self, gateway: str, from_ns: int, to_ns: int, limit: int = 1_000) -> list[Event]:
        """The newest first. Raises `NotFound`."""
        registry, row = await self._known(gateway)
        with _asking():
            rows = await registry.events(row.id, from_ns=from_ns, to_ns=to_ns, limit=limit)
        return [Event(gateway, e.device, e.code, e.text, iso(e.at_ns), e.at_ns) for e in rows]

    # --- readings ---

    async def readings(self, query: Query) -> Pages:
        """Raises `NotFound` for a gateway or a store that is not there, `OperatorError`."""
        name = _checked_name(query.gateway)
        store = query.store or self._stores()[0]
        if store not in self._stores():
            raise NotFound(f"there is no store {store!r} here; there is {', '.join(self._stores())}")
        if not 0 < query.limit <= MAX_LIMIT:
            raise OperatorError(f"limit {query.limit}: 1 to {MAX_LIMIT} are possible")
        if store == "archive":
            if query.after is not None:
                raise OperatorError("the archive has no pages; narrow the time instead")
            tenant, _, gateway = name.partition("/")
            reader = self._reader()
            rows = reader.readings(
                tenant,
                gateway,
                device=query.device,
                point=query.point,
                from_ns=query.from_ns,
                to_ns=query.to_ns,
            )
            return _ArchivePages(name, rows, query.limit)
        registry = self._registry(store)
        with _asking():
            row = await registry.gateway(*name.split("/"))
        if row is None:
            raise NotFound(f"no readings of a gateway {name!r} in {store}")
        return _RegistryPages(name, registry, row.id, query)

    # --- dead letters ---

    async def dead_letters(
        self, *, sink: str | None = None, gateway: str | None = None, after: int = 0, limit: int = 100
    ) -> DeadLettersPage:
        """The oldest first."""
        rows = await self._dead_letters.letters(sink=sink, gateway=gateway, after_id=after, limit=limit)
        letters = [_letter(row) for row in rows]
        return DeadLettersPage(letters, letters[-1].id if len(letters) == limit else None)

    async def dead_letter(self, letter_id: int) -> DeadLetterContent:
        """A letter and what is in it. Raises `NotFound`."""
        found = await self._dead_letters.show(letter_id)
        if found is None:
            raise NotFound(f"no dead letter {letter_id}")
        letter, entry = found
        decoded = self._decoder.decode(entry)
        readings: list[Reading] = []
        other = [f"frames {p.first} to {p.last}: {p.reason}" for p in decoded.poison]
        for record in decoded.records:
            if isinstance(record, ScanRecord):
                readings += _from_scan(record, letter.points)
            elif isinstance(record, GapRecord):
                other.append(
                    f"a gap of {record.gap.scans} scans, {record.gap.reason}, from {iso(record.from_ns)}"
                )
            else:
                other.append(f"an event at {iso(record.at_ns)}: {record.event.code}: {record.event.text}")
        return DeadLetterContent(_letter(letter), readings, other)

    async def replay(self, selection: Selection) -> Replay:
        """Gives letters to their sinks once more. Raises `NotNow`, `OperatorError`."""
        by_sink: dict[str, list[int]] = defaultdict(list)
        unknown: list[int] = []
        for letter_id in await self._selected(selection):
            found = await self._dead_letters.show(letter_id)
            if found is None:
                unknown.append(letter_id)
            else:
                by_sink[found[0].sink].append(letter_id)
        delivered: list[int] = []
        refused: list[Refusal] = []
        for sink, ids in by_sink.items():
            runner = self._runners.get(sink)
            if runner is None:
                raise OperatorError(f"sink {sink} is not running here, and only it can take its letters")
            try:
                done = await runner.replay(ids)
            except RetryLater as err:
                raise NotNow(str(err), err.after_s) from err
            except SinkError as err:
                raise NotNow(str(err)) from err
            delivered += done.delivered
            refused += [Refusal(letter_id, reason) for letter_id, reason in done.refused]
            unknown += done.unknown
        return Replay(delivered, refused, unknown)

    async def replay_sink(self, asked: SinkReplayRequest) -> SinkReplay:
        """Gives a sink again what was received. Raises `NotNow`, `OperatorError`."""
        from cloud.api.replays import ReplayError, ReplayLater, replay_sink

        if self._journal is None or not self._runners:
            raise OperatorError("a replay needs the running server: it has the sinks")
        try:
            return await replay_sink(
                asked, self._config, self._journal, self._clocks, tuple(self._runners.values())
            )
        except ReplayLater as err:
            raise NotNow(str(err), 5.0) from err
        except ReplayError as err:
            raise OperatorError(str(err)) from err

    async def drop(self, selection: Selection) -> int:
        """Removes letters for good; how many there were."""
        return await self._dead_letters.drop(await self._selected(selection))

    async def _selected(self, selection: Selection) -> list[int]:
        if bool(selection.ids) == (selection.sink is not None):
            raise OperatorError("give either ids or a sink")
        if selection.ids:
            if len(selection.ids) > MAX_LETTERS:
                raise OperatorError(f"{len(selection.ids)} letters; at most {MAX_LETTERS} at a time")
            return selection.ids
        limit = max(1, min(selection.limit, MAX_LETTERS))
        return [letter.id for letter in await self._dead_letters.letters(sink=selection.sink, limit=limit)]

    # --- what is brought by hand ---

    async def take(self, payloads: Sequence[bytes], *, gateway: str | None = None) -> list[Taken]:
        """Batches of an export, through the same intake as those that come by network. `gateway` admits one that is
        not known here yet. Raises `OperatorError`."""
        if self._journal is None:
            raise OperatorError("the journal is not here")
        if self._intake is None:
            self._intake = Intake(self._journal, self._journal, Metrics())
        known = {f"{g.tenant}/{g.name}" for g in self._config.gateway} | ({gateway} if gateway else set())
        known |= {row.gateway for row in await self._journal.counts()}
        arrivals: list[Arrival] = []
        taken: list[Taken | None] = []
        heads: list[Head] = []
        for payload in payloads:
            try:
                head, _ = open_head(payload)
            except WireError as err:
                taken.append(Taken("", *claimed(payload), 0, "refused", f"{err.code}: {err}"))
                continue
            if head.gateway not in known:
                text = f"gateway {head.gateway} is not known here; if it is yours, say so: --gateway {head.gateway}"
                taken.append(
                    Taken(head.gateway, head.epoch, head.first, head.last, head.readings, "refused", text)
                )
                continue
            taken.append(None)
            heads.append(head)
            arrivals.append(Arrival(head.gateway, payload, time.monotonic()))
        verdicts = iter(zip(heads, await self._intake.accept(arrivals, door="import"), strict=True))
        return [one or _taken(*next(verdicts)) for one in taken]

    # --- verify ---

    async def verify(self) -> Verdict:
        """Counts, and holds the counts against each other. Raises `OperatorError`."""
        if self._journal is None:
            raise OperatorError("the journal is not here")
        frames = await self._frame_accounts(self._journal)
        accounts: list[SinkAccount] = []
        trouble: list[str] = []
        for sink, tally in self._tallies().items():
            try:
                accounts += await self._account(sink, tally)
            except (OperatorError, SinkError, IdentityError, JournalError, DeadLettersError) as err:
                trouble.append(f"{sink}: {err}")
        ok = not trouble and all(account.ok for account in accounts) and not any(f.missing for f in frames)
        return Verdict(ok, frames, accounts, trouble)

    async def gap_tally(self) -> list[GapTally]:
        """What gateways have reported as lost, by reason and priority; nothing where no SQL store is enabled."""
        registry = self._sql()
        if registry is None:
            return []
        with contextlib.suppress(NotNow), _asking():
            return await registry.gap_tally()
        return []

    async def settle_missed(self, rows: Sequence[SinkAccount]) -> None:
        """What a sink had missed and a replay has given to it is missed no longer."""
        journal = self._journal
        if journal is None:
            return
        whole = {(row.sink, row.gateway) for row in rows if row.ok and not row.missed}
        for missed in await journal.missed():
            if (missed.sink, missed.gateway) in whole:
                await journal.forget_missed(missed.sink, missed.gateway)

    async def _frame_accounts(self, journal: SqliteJournal) -> list[FrameAccount]:
        """With the seqs that never came, less those that gateways have reported as lost."""
        gaps: dict[tuple[str, int], list[tuple[int, int]]] = {}
        registry = self._sql()
        if registry is not None:
            with contextlib.suppress(NotNow), _asking():
                gaps = await registry.gap_ranges()
        empty = {beat.gateway for beat in await journal.states() if nothing_left(_state_of(beat.state))}
        holes: dict[str, list[Hole]] = defaultdict(list)
        for hole in await journal.holes():
            reported = IntervalSet(coalesce(gaps.get((hole.gateway, hole.epoch), ())))
            holes[hole.gateway] += [
                Hole(hole.epoch, *part) for part in reported.missing(hole.first, hole.last)
            ]
        accounts = []
        for c in await journal.counts():
            absent = sum(hole.last - hole.first + 1 for hole in holes[c.gateway])
            accounts.append(FrameAccount(
                c.gateway, c.frames_received, c.frames_duplicate, c.frames_received - c.frames_duplicate,
                absent, absent if c.gateway in empty else 0, holes[c.gateway][:SHOWN_HOLES],
            ))  # fmt: skip
        return accounts

    async def _account(
        self, sink: str, tally: Callable[[], Awaitable[Mapping[str, Tally]]]
    ) -> list[SinkAccount]:
        before = await self._settled(sink)
        stored = await tally()
        dead: Counter[str] = Counter()
        for row in await self._dead_letters.by_gateway():
            if row.sink == sink:
                dead[row.gateway] += row.readings + row.dropped_readings
        guessed = await self._guessed(sink)
        expirable = await self._expirable(sink)
        journal = self._journal
        assert journal is not None  # noqa: S101 - verify looked
        refused = await journal.expired(sink)
        lost = {row.gateway: row.readings for row in await journal.missed() if row.sink == sink}
        known = await journal.epochs()
        after = await self._settled(sink)
        accounts: list[SinkAccount] = []
        for gateway in sorted({*before.journaled, *after.journaled, *stored}):
            counted = stored.get(gateway, Tally())
            foreign = sum(n for epoch, n in counted.by_epoch.items() if (gateway, epoch) not in known)
            spare = counted.repeated + foreign  # it stands for no reading that was received
            held = counted.readings + dead[gateway]
            # A replay sends a sink back, and it holds then more than its cursor says; it may begin or end meanwhile.
            low, high = min(before.past(gateway), after.past(gateway)), after.most(gateway)
            slack = guessed[gateway]
            # What is spare makes up for nothing: one lost and one doubled are two faults, not none.
            missing, doubled = max(0, low - (held - spare) - slack), max(spare, held - high - slack, 0)
            expired = min(missing, max(expirable.get(gateway, 0), refused.get(gateway, 0)))
            missed = min(missing - expired, lost.get(gateway, 0))
            missing -= expired + missed
            accounts.append(SinkAccount(
                gateway=gateway, sink=sink, journaled=after.journaled[gateway], stored=counted.readings,
                dead=dead[gateway], guessed=slack, pending=after.pending[gateway], expired=expired, missing=missing,
                doubled=doubled, ok=not missing and not doubled, missed=missed,
            ))  # fmt: skip
        return accounts

    async def _guessed(self, sink: str) -> Counter[str]:
        """Readings in letters that do not decode: how many there are is the runner's estimate."""
        guessed: Counter[str] = Counter()
        after = 0
        while letters := await self._dead_letters.letters(sink=sink, after_id=after, limit=500):
            after = letters[-1].id
            for letter in letters:
                found = None if letter.points else await self._dead_letters.show(letter.id)
                if found is not None and self._decoder.decode(found[1]).poison:
                    guessed[letter.gateway] += letter.readings
        return guessed

    async def _settled(self, sink: str) -> _Settled:
        """What the journal has taken, and what of it the sink's cursor is not past."""
        journal = self._journal
        assert journal is not None  # noqa: S101 - verify looked
        while True:
            # What is appended between the two is in one and not in the other: look until nothing is.
            last = (await journal.state()).last_offset
            journaled = Counter({row.gateway: row.readings_stored for row in await journal.counts()})
            if (await journal.state()).last_offset == last:
                break
            await asyncio.sleep(0)
        cursor = await journal.cursor(sink)
        pending = Counter(await journal.pending(cursor, last))
        rewound = min(self._clocks.rewound(sink), last)
        if rewound <= cursor:
            return _Settled(journaled, pending, pending)
        return _Settled(journaled, pending, Counter(await journal.pending(rewound, last)))

    def _tallies(self) -> dict[str, Callable[[], Awaitable[Mapping[str, Tally]]]]:
        config = self._config
        found: dict[str, Callable[[], Awaitable[Mapping[str, Tally]]]] = {}
        for store in self._enabled():
            found[store] = self._tally_archive if store == "archive" else partial(self._tally_sql, store)
        influx = config.influxdb
        if influx is not None:
            from cloud.sinks.influxdb import tally

            found["influxdb"] = partial(tally, influx)
        return found

    async def _tally_archive(self) -> Mapping[str, Tally]:
        return await self._reader().identities(int(time.time() // 3600))

    async def _tally_sql(self, store: str) -> Mapping[str, Tally]:
        with _asking():
            rows = await self._registry(store).tally()
        return {
            f"{row.tenant}/{row.gateway}": Tally(row.readings, row.repeated, row.by_epoch) for row in rows
        }

    async def _expirable(self, sink: str) -> Mapping[str, int]:
        """How many readings the sink's own retention may have removed: those that the archive, which keeps the longest,
        holds from before. Without an archive: all, of a gateway known for longer than the sink keeps anything."""
        config = self._config
        days = {
            "embedded": config.embedded.retention_days,
            "archive": config.archive.retention_days,
            "mysql": config.mysql.retention_days if config.mysql else 0.0,
            "influxdb": config.influxdb.retention_days if config.influxdb else 0.0,
        }[sink]
        if not days:
            return {}
        before_ns = time.time_ns() - round(days * NS_PER_DAY)
        if sink != "archive" and config.archive.enabled:
            return await self._reader().tally(before_ns)
        return {
            f"{row.tenant}/{row.name}": 2**62 for row in await self._seen() if row.first_seen_ns < before_ns
        }

    # --- stores ---

    def _stores(self) -> list[Store]:
        """That readings can be asked of, the first by default. Raises `NotFound` where there is none."""
        if not (found := self._enabled()):
            raise NotFound("no store here can be asked: enable [embedded], [archive] or [mysql]")
        return found

    def _enabled(self) -> list[Store]:
        config = self._config
        found: list[Store] = []
        if config.embedded.enabled:
            found.append("embedded")
        if config.mysql is not None:
            found.append("mysql")
        if config.archive.enabled:
            found.append("archive")
        return found

    def _registry(self, store: str) -> Registry:
        known = self._registries.get(store)
        if known is None:
            known = self._registries[store] = self._made(store)
        return known

    def _made(self, store: str) -> Registry:
        if store == "embedded":
            from cloud.sinks.embedded import FILE, embedded_registry

            data_dir = Path(self._config.server.data_dir)
            if not (data_dir / FILE).exists():
                raise NotFound(f"there is no {data_dir / FILE} yet: nothing was stored here")
            return embedded_registry(data_dir)
        from cloud.registry import Registry
        from cloud.sinks.mysql import mysql_engine

        if self._config.mysql is None or self._mysql is None:
            raise NotFound("no [mysql] is configured, or its password is not here")
        return Registry(mysql_engine(self._config.mysql, self._mysql.reveal()))

    def _reader(self) -> ArchiveReader:
        from cloud.sinks.archive_reader import ArchiveReader

        return ArchiveReader(self._config.archive, Path(self._config.server.data_dir) / "archive")

    def _sql(self) -> Registry | None:
        """The store that knows gateways, devices and points."""
        for store in self._enabled():
            if store != "archive":
                return self._registry(store)
        return None

    async def _seen(self) -> list[GatewayRow]:
        registry = self._sql()
        if registry is None:
            return []
        with _asking():
            return await registry.gateways()

    def _registry_of_names(self) -> Registry:
        """Raises `NotFound`."""
        registry = self._sql()
        if registry is None:
            raise NotFound("devices, points and gaps are kept by [embedded] or [mysql]; enable one")
        return registry

    async def _known(self, gateway: str) -> tuple[Registry, GatewayRow]:
        name = _checked_name(gateway)
        registry = self._registry_of_names()
        with _asking():
            row = await registry.gateway(*name.split("/"))
        if row is None:
            raise NotFound(f"no readings of a gateway {name!r} yet")
        return registry, row


@contextlib.contextmanager
def _asking() -> Iterator[None]:
    """A SQL store that cannot answer is one to ask later."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except SQLAlchemyError as err:
        raise NotNow(f"the store cannot be asked: {err}", 5.0) from err


class _Settled(msgspec.Struct, frozen=True):
    journaled: Counter[str]
    pending: Counter[str]
    never: Counter[str]  #: of the pending: what the sink cannot have from before it was sent back by a replay

    def past(self, gateway: str) -> int:
        """Readings that the cursor is past."""
        return self.journaled[gateway] - self.pending[gateway]

    def most(self, gateway: str) -> int:
        """Readings that it may hold: while a replay is under way, more than the cursor is past."""
        return self.journaled[gateway] - self.never[gateway]


class _RegistryPages:
    def __init__(self, gateway: str, registry: Registry, gateway_id: int, query: Query) -> None:
        self.next: str | None = None
        self._gateway = gateway
        self._registry = registry
        self._gateway_id = gateway_id
        self._query = query
        self._after = _key(query.after)

    async def __aiter__(self) -> AsyncIterator[Sequence[Reading]]:
        query = self._query
        rows = self._registry.readings(
            self._gateway_id, device=query.device, point=query.point, from_ns=query.from_ns, to_ns=query.to_ns,
            limit=query.limit, after=self._after,
        )  # fmt: skip
        page: list[Reading] = []
        count, last = 0, None
        with _asking():
            async for row in rows:
                page.append(_from_registry(self._gateway, row))
                count, last = count + 1, row.key
                if len(page) >= PAGE:
                    yield page
                    page = []
                    await asyncio.sleep(0)
        if count == query.limit and last is not None:
            self.next = f"{last.point_id}.{last.taken_at_ns}.{last.epoch}.{last.seq}"
        yield page


class _ArchivePages:
    next: str | None = None

    def __init__(self, gateway: str, rows: AsyncIterator[list[Row]], limit: int) -> None:
        self._gateway = gateway
        self._rows = rows
        self._limit = limit

    async def __aiter__(self) -> AsyncIterator[Sequence[Reading]]:
        left = self._limit
        async for page in self._rows:
            yield [_from_archive(self._gateway, row) for row in page[:left]]
            left -= len(page)
            if left <= 0:
                return


def _key(after: str | None) -> Key | None:
    from cloud.registry import Key

    if after is None:
        return None
    try:
        point, at, epoch, seq = map(int, after.split("."))
    except ValueError as err:
        raise OperatorError(f"after={after!r}: give the `next` of the page before") from err
    return Key(point, at, epoch, seq)


def _checked_name(gateway: str) -> str:
    try:
        return str(parse_name(gateway))
    except IdentityError as err:
        raise OperatorError(str(err)) from err


def _state_of(state: bytes) -> dict[str, object]:
    try:
        return msgspec.json.decode(state, type=dict[str, object])
    except msgspec.DecodeError:
        return {}


def _heartbeat(received_at_ns: int, state: bytes) -> Heartbeat:
    return Heartbeat(iso(received_at_ns), received_at_ns, _state_of(state))


def _letter(letter: Letter) -> DeadLetter:
    return DeadLetter(
        letter.id, letter.sink, letter.gateway, letter.epoch, letter.first, letter.last, letter.readings, letter.reason,
        letter.tries, iso(letter.received_at_ns), iso(letter.added_at_ns),
    )  # fmt: skip


def _taken(head: Head, verdict: IntakeVerdict) -> Taken:
    told = (head.gateway, head.epoch, head.first, head.last, head.readings)
    reply = verdict.reply
    if isinstance(reply, Ack):
        return Taken(*told, "duplicate" if verdict.duplicate else "new")
    if reply.retry_after_s is not None:
        return Taken(*told, "later", reply.text, reply.retry_after_s)
    return Taken(*told, "refused", f"{reply.code}: {reply.text}")


def _reason_word(reason: int) -> str | None:
    return Reason(reason).name.lower() if reason else None


def _from_registry(gateway: str, row: ReadingRow) -> Reading:
    return Reading(
        gateway, row.device, row.point, row.unit, row.type, iso(row.taken_at_ns), row.taken_at_ns, row.value,
        row.quality.name.lower(), _reason_word(row.reason), row.clock_synchronized, iso(row.received_at_ns),
    )  # fmt: skip


def _from_archive(gateway: str, row: Row) -> Reading:
    value: Value = row.value
    if row.type == "str":
        value = row.text
    elif row.type == "bool":
        value = None if row.value is None else bool(row.value)
    elif row.text is not None:
        value = int(row.text)
    return Reading(
        gateway, row.device, row.point, row.unit, row.type, iso(row.taken_at_ns), row.taken_at_ns, value, row.quality,
        row.reason, row.clock_synchronized, iso(row.received_at_us * 1000),
        iso(row.earliest_ns) if row.earliest_ns else None, iso(row.latest_ns) if row.latest_ns else None,
    )  # fmt: skip


def _from_scan(scan: ScanRecord, points: Sequence[int]) -> list[Reading]:
    layout = scan.layout
    found: list[Reading] = []
    for i in points or range(len(layout.names)):
        reason = scan.reasons.get(i, Reason.GOOD)
        found.append(Reading(
            f"{scan.tenant}/{scan.gateway}", layout.device, layout.names[i], layout.units[i], layout.types[i],
            iso(scan.taken_at_ns), scan.taken_at_ns, scan.values[i], Quality(reason.quality).name.lower(),
            _reason_word(reason), scan.clock_synchronized, iso(scan.received_at_ns),
        ))  # fmt: skip
    return found


def now_ns() -> int:
    return time.time_ns()
