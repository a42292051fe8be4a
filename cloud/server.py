"""`headgate-cloud serve`: the whole cloud in one process, built from its configuration.

Rules:
1. One task group owns every task, and each has a name. A sink's trouble stays with its sink.
2. Start: secrets, journal, dead letters, sinks' tasks, then the doors: nothing is accepted before it can be held.
3. Stop (SIGTERM, SIGINT): the doors first, then the sinks get `drain_s` to finish, then the journal is closed; exit 0.
   What a sink had not finished is in the journal, and goes on from its cursor at the next start.
4. A full journal is trimmed as soon as every sink is past its oldest entries, without anybody's help.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import resource
import signal
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from cloud.accounting import NOT_YET, Accounting
from cloud.backup import UNFINISHED
from cloud.clocks import FILE as CLOCKS_FILE
from cloud.clocks import Clocks
from cloud.dead_letters import DeadLetters, DeadLettersError
from cloud.health import (
    GatewayView,
    Problem,
    SinkView,
    View,
    codes_in,
    heartbeat_of,
    problems,
    silent_after_s,
    words_in,
)
from cloud.http import Credentials, HttpDoor
from cloud.intake import Intake
from cloud.journal.contract import JournalError
from cloud.journal.sqlite import GatewayState, SqliteJournal
from cloud.metrics import Gauges, Metrics, exposition
from cloud.preflight import Secrets, read_secrets
from cloud.quotas import Quota, Quotas
from cloud.runner import MAINTAIN_S, SinkRunner
from cloud.sinks.contract import Sink
from cloud.skew import Skews, skew_in
from config.cloud import Cloud

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from cloud.mqtt import MqttDoor
    from cloud.registry import SeriesGuard

log = logging.getLogger(__name__)

MIB: Final = 1024 * 1024
TRIM_INTERVAL_S: Final = 3600.0
PRESSURE_INTERVAL_S: Final = 5.0
PRESSURE_AT: Final = 0.85  #: of the journal's capacity: trim at once, whatever `keep_hours` says
TRIM_TO: Final = 0.75
ACCOUNT_INTERVAL_S: Final = 3600.0
SKEW_SHOWN_S: Final = 60.0  #: after its last batch of the future a gateway's clock is taken for set
ACCOUNT_FIRST_S: Final = 60.0  #: after the start: the sinks are up by then
MAINTAIN_LEAST_S: Final = 1.0
RESTART_S: Final = 10.0  #: a sink's task that ended by a fault of ours is started again after this
OWN_FILES: Final = 256  #: descriptors kept for databases, brokers and stores
LEAVE_S: Final = 2.0  #: when all is closed, how long threads that wait for a silent store may hold up the end
HTTP_GRACE_S: Final = 3.0  #: requests under way at shutdown


class ServeError(Exception):
    """The server cannot start or go on; the text says what to change."""


@dataclass(frozen=True, slots=True)
class Services:
    """What the operator's API is built on."""

    config: Cloud
    secrets: Secrets
    journal: SqliteJournal
    dead_letters: DeadLetters
    runners: tuple[SinkRunner, ...]
    guard: SeriesGuard
    skews: Skews
    metrics: Metrics
    clocks: Clocks
    on_close: contextlib.AsyncExitStack  #: closed after the doors and the sinks, before the journal


class CloudServer:
    """Build, then `run()` once. `started` is set when the doors are open; `stop()` may be called from a signal."""

    def __init__(self, config: Cloud) -> None:
        self.config = config
        self.metrics = Metrics()
        self.started = asyncio.Event()
        self.address: tuple[str, int] = ("", 0)  #: where HTTP listens, once started
        self._began_s = time.monotonic()
        self._stop = asyncio.Event()
        self._trimmed = 0
        self._accounting: Accounting | None = None
        self._mqtt: MqttDoor | None = None
        self._intake: Intake | None = None
        self._skewed_s: dict[
            str, tuple[int, float]
        ] = {}  # by gateway: batches counted, and when there was a new one

    def stop(self) -> None:
        self._stop.set()

    async def run(self) -> None:
        """Until `stop`. Raises `ServeError`, `JournalError`, `DeadLettersError`, `IdentityError`."""
        config = self.config
        secrets = read_secrets(config)
        data_dir = Path(config.server.data_dir)
        if (data_dir / UNFINISHED).exists():
            raise ServeError(
                f"{data_dir / UNFINISHED}: a restore was cut short; run `headgate-cloud restore` again, and then this"
            )
        journal = SqliteJournal(
            data_dir / "journal.db",
            max_bytes=config.journal.max_mb * MIB,
            free_disk_bytes=config.journal.free_disk_mb * MIB,
            commit_interval_s=config.journal.commit_interval_ms / 1000,
        )
        dead_letters = DeadLetters(data_dir / "dead_letters.db")
        async with contextlib.AsyncExitStack() as stack:
            await journal.open()
            stack.push_async_callback(journal.close)
            await dead_letters.open()
            stack.push_async_callback(dead_letters.close)
            # Only after what may refuse the start: it brings SQLAlchemy along.
            from cloud.registry import SeriesGuard

            guard = SeriesGuard(data_dir / "series.db", per_hour=config.limits.new_series_per_hour)
            stack.push_async_callback(guard.close)
            skews = Skews(round(config.limits.skew_alarm_s * 1e9))
            clocks = Clocks(data_dir / CLOCKS_FILE)
            await clocks.open()
            stack.push_async_callback(clocks.close)
            runners = tuple(
                SinkRunner(
                    sink,
                    journal,
                    dead_letters,
                    guard=guard,
                    skews=skews,
                    archived=config.archive.enabled and sink.name != "archive",
                    maintain_s=_maintain_s(sink, config),
                )
                for sink in build_sinks(config, secrets)
            )
            services = Services(
                config, secrets, journal, dead_letters, runners, guard, skews, self.metrics, clocks, stack
            )
            await self._serve(services)

    async def _serve(self, services: Services) -> None:
        config = self.config
        intake = Intake(
            services.journal,
            services.journal,
            self.metrics,
            max_inflight=config.limits.max_inflight,
            # A quarter of what the process may take: the journal's queue, the doors and the sinks have theirs.
            max_inflight_bytes=config.limits.memory_mb * MIB // 4,
            quotas=quotas_of(config),
        )
        self._intake = intake
        door = HttpDoor(
            intake, Credentials(services.secrets.gateways), self.metrics, self._application(services)
        )
        listener = _listen(config)
        self.address = listener.getsockname()[:2]
        http = _http_server(config, door)
        self._mqtt = self._mqtt_door(intake, services.secrets)
        async with asyncio.TaskGroup() as group:
            sinks = [
                group.create_task(_supervise(runner, self._stop), name=f"sink[{runner.sink.name}]")
                for runner in services.runners
            ]
            jobs = self._schedule(services)
            serving = group.create_task(_serve_http(http, listener), name="http")
            mqtt = group.create_task(self._mqtt.run(), name="mqtt") if self._mqtt else None
            scheme = "https" if config.server.tls_cert_file else "http"
            log.info("listening on %s://%s:%d, data in %s", scheme, *self.address, config.server.data_dir)
            self.started.set()
            stopping = group.create_task(self._stop.wait(), name="stop")
            await asyncio.wait((stopping, serving), return_when=asyncio.FIRST_COMPLETED)
            log.info("stopping: the doors are closed, sinks have %g s", config.server.drain_s)
            self._stop.set()
            jobs()
            door.closing = True
            if self._mqtt is not None and mqtt is not None:
                await self._mqtt.stop()
                mqtt.cancel()
            http.should_exit = True
            await self._drain(services)
            for task in sinks:
                task.cancel()
        log.info("stopped")

    async def _drain(self, services: Services) -> None:
        """All sinks at once: each has the whole time."""
        names = [runner.sink.name for runner in services.runners]
        done = await asyncio.gather(
            *(runner.drain(self.config.server.drain_s) for runner in services.runners)
        )
        late = [name for name, settled in zip(names, done, strict=True) if not settled]
        if late:
            log.warning("not drained in time, the journal keeps the rest: %s", ", ".join(late))

    def _mqtt_door(self, intake: Intake, secrets: Secrets) -> MqttDoor | None:
        settings = self.config.mqtt
        if settings is None or secrets.broker is None:
            return None
        from cloud.mqtt import MqttDoor

        limits = self.config.limits
        return MqttDoor(
            settings, secrets.broker, intake, self.metrics,
            max_waiting=limits.max_inflight, max_waiting_bytes=limits.memory_mb * MIB // 8,
        )  # fmt: skip

    # --- jobs ---

    def _schedule(self, services: Services) -> Callable[[], None]:
        """Starts the slow jobs; returns what ends them."""
        from apscheduler.schedulers.asyncio import AsyncIOScheduler

        scheduler = AsyncIOScheduler(timezone="UTC")
        options = {"coalesce": True, "max_instances": 1, "misfire_grace_time": None}
        scheduler.add_job(
            self._trim,
            "interval",
            (services, 1.0),
            seconds=TRIM_INTERVAL_S,
            jitter=60,
            name="trim",
            **options,
        )
        scheduler.add_job(
            self._trim,
            "interval",
            (services, PRESSURE_AT),
            seconds=PRESSURE_INTERVAL_S,
            name="pressure",
            **options,
        )
        self._accounting = _accounting(services)
        scheduler.add_job(
            self._account,
            "interval",
            seconds=ACCOUNT_INTERVAL_S,
            next_run_time=datetime.now(UTC) + timedelta(seconds=ACCOUNT_FIRST_S),
            name="account",
            **options,
        )
        scheduler.start()
        return lambda: scheduler.shutdown(wait=False)

    async def _account(self) -> None:
        """Hourly: does what was received equal what is stored, dead and pending."""
        if self._accounting is None:
            return
        try:
            await self._accounting.check()
        except (JournalError, DeadLettersError) as err:
            log.warning("the hourly account could not be made: %s", err)

    async def _trim(self, services: Services, only_above: float) -> None:
        """Remove what is no longer needed: by age each hour (`only_above` 1.0), by size as soon as it gets tight."""
        journal = services.journal
        hourly = only_above == 1.0
        if not hourly and journal.used_bytes < journal.capacity_bytes * only_above:
            return
        names = [runner.sink.name for runner in services.runners]
        required = self.config.journal.required_sinks
        removed = await journal.trim(
            [name for name in names if required is None or name in required],
            keep_s=self.config.journal.keep_hours * 3600,
            max_bytes=int(journal.capacity_bytes * TRIM_TO),
            optional=[name for name in names if required is not None and name not in required],
        )
        self._trimmed += removed
        if removed:
            log.info("journal trimmed: %d entries", removed)

    # --- what is asked about the server itself ---

    def _application(self, services: Services) -> FastAPI:
        from fastapi import FastAPI, Response

        # No page of its own: FastAPI's loads its scripts from a public server.
        app = FastAPI(
            title="Headgate", version="1", openapi_url="/v1/openapi.json", docs_url=None, redoc_url=None
        )

        async def healthz() -> Response:
            """Alive: the loop turns."""
            return Response("ok\n", media_type="text/plain")

        async def readyz() -> Response:
            """Whether batches can be taken now, and how each sink stands."""
            ready = await self._ready(services)
            return Response(
                msgspec.json.encode(ready),
                status_code=200 if ready.ready else 503,
                media_type="application/json",
            )

        async def metrics() -> Response:
            """Prometheus text."""
            text = exposition(self.metrics, await self._gauges(services))
            return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

        for path, answer in (("/healthz", healthz), ("/readyz", readyz), ("/metrics", metrics)):
            app.add_api_route(path, answer, methods=["GET"], include_in_schema=False)
        if importlib.util.find_spec("cloud.api.routes") is not None:
            importlib.import_module("cloud.api.routes").mount(app, services)
        return app

    async def _view(self, services: Services) -> View:
        """What `cloud.health` judges, as it is now."""
        journal, now_s = services.journal, time.monotonic()
        required = self.config.journal.required_sinks
        lost: Counter[str] = Counter()
        for row in await journal.missed():
            lost[row.sink] += row.readings
        states = [await runner.state() for runner in services.runners]
        over = set(self._intake.quotas.over(now_s)) if self._intake is not None else set()
        beats = {beat.gateway: beat for beat in await journal.states()}
        for name, batches in services.skews.batches.items():
            if batches != self._skewed_s.get(name, (0, 0.0))[0]:
                self._skewed_s[name] = (batches, now_s)
        accounts = self._accounting.last if self._accounting is not None else NOT_YET
        mqtt = self._mqtt
        return View(
            journal_full=journal.full,
            journal_broken=journal.broken or "",
            journal_share=journal.used_bytes / journal.capacity_bytes,
            disk_free_bytes=journal.free_disk_bytes,
            disk_floor_bytes=journal.floor_bytes,
            broker=None if mqtt is None or mqtt.connected else mqtt.trouble,
            sinks=[
                SinkView(
                    s.name, s.word, s.error, s.lag_s, lost[s.name], required is None or s.name in required
                )
                for s in states
            ],
            gateways=[self._gateway(name, beats.get(name), name in over) for name in sorted({*beats, *over})],
            skewed=[
                name for name, (_, at_s) in sorted(self._skewed_s.items()) if now_s - at_s < SKEW_SHOWN_S
            ],
            account_open=[f"{row.gateway} in {row.sink}" for row in accounts.rows if not row.ok],
            holes=[frames.gateway for frames in accounts.frames if frames.missing],
            letters_dropped=(await services.dead_letters.state()).dropped,
        )

    def _gateway(self, name: str, beat: GatewayState | None, over: bool) -> GatewayView:
        now_s = time.monotonic()
        batch_s = self._intake.heard_s(name) if self._intake is not None else None
        if beat is None:
            return GatewayView(name, None if batch_s is None else now_s - batch_s, over)
        told, age_s = heartbeat_of(beat.state), max(0.0, (time.time_ns() - beat.received_at_ns) / 1e9)
        return GatewayView(
            name,
            age_s if batch_s is None else min(age_s, now_s - batch_s),
            over,
            codes_in(told),
            words_in(told),
            silent_after_s(told),
            now_s - self._began_s,
            age_s,
        )

    async def _ready(self, services: Services) -> Ready:
        trouble = services.journal.trouble
        sinks = [
            SinkReady(s.name, s.word, round(s.lag_s, 3), s.error, getattr(runner.sink, "notes", ()))
            for runner in services.runners
            for s in (await runner.state(),)
        ]
        mqtt = None if self._mqtt is None else "connected" if self._mqtt.connected else self._mqtt.trouble
        view = await self._view(services)
        return Ready(
            ready=trouble is None,
            journal="ok" if trouble is None else trouble,
            mqtt=mqtt,
            sinks=sinks,
            problems=problems(view),
            gateways=[GatewayTold(g.name, list(g.problems)) for g in view.gateways if g.problems],
        )

    async def _gauges(self, services: Services) -> Gauges:
        journal = services.journal
        state = await journal.state()
        view = await self._view(services)
        oldest_s = (
            0.0 if state.oldest_received_at_ns is None else time.time() - state.oldest_received_at_ns / 1e9
        )
        letters: dict[str, int] = {runner.sink.name: 0 for runner in services.runners}
        for row in await services.dead_letters.by_gateway():
            letters[row.sink] = letters.get(row.sink, 0) + row.letters
        return Gauges(
            journal_bytes=state.size_bytes,
            journal_max_bytes=journal.max_bytes,
            journal_last_offset=state.last_offset,
            journal_oldest_age_s=max(0.0, oldest_s),
            journal_ok=journal.trouble is None,
            broker_connected=None if self._mqtt is None else self._mqtt.connected,
            sinks=tuple([await runner.state() for runner in services.runners]),
            dead_letters=tuple(sorted(letters.items())),
            dead_letters_dropped=(await services.dead_letters.state()).dropped,
            trimmed=self._trimmed,
            memory_bytes=_resident_bytes(),
            new_series_refused=tuple(sorted(services.guard.refused_total.items())),
            skewed_batches=tuple(sorted(services.skews.batches.items())),
            clock_skew_s=tuple(
                (beat.gateway, seconds)
                for beat in await journal.states()
                if (seconds := skew_in(heartbeat_of(beat.state))) is not None
            ),
            accounts=self._accounting.last if self._accounting is not None else NOT_YET,
            problems=tuple(problem.code for problem in problems(view)),
            gateway_problems=tuple((g.name, code) for g in view.gateways for code in g.problems),
            missed=tuple((row.sink, row.gateway, row.readings) for row in await journal.missed()),
            quota_refused=tuple(sorted(self._intake.quotas.refused.items()))
            if self._intake is not None
            else (),
            gaps=self._accounting.last.gaps if self._accounting is not None else (),
        )


class SinkReady(msgspec.Struct, frozen=True):
    name: str
    state: str
    lag_s: float
    error: str
    notes: tuple[str, ...] = ()  #: what the store cannot do, and how the sink does without


class GatewayTold(msgspec.Struct, frozen=True):
    """An agent's own problem codes, from its latest heartbeat."""

    gateway: str
    codes: list[str]


class Ready(msgspec.Struct, frozen=True):
    """The body of /readyz. A sink that is down is shown and does not make the server unready: the journal holds on."""

    ready: bool
    journal: str
    mqtt: str | None
    sinks: list[SinkReady]
    problems: list[Problem] = []  #: all that is wrong, the gravest first (`cloud.health`)
    gateways: list[GatewayTold] = []  #: those that say that something is wrong with them


async def _supervise(runner: SinkRunner, stop: asyncio.Event) -> None:
    """One sink's task. Its own errors it deals with itself; a fault of ours in it must not take the doors along."""
    while not stop.is_set():
        try:
            await runner.run()
        except Exception:  # a bug in one sink must stop neither the doors nor the other sinks
            log.exception(
                "sink %s ended by a fault; it is started again in %g s", runner.sink.name, RESTART_S
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RESTART_S):
                    await stop.wait()


def _accounting(services: Services) -> Accounting:
    """With an operator of its own: what counts for seconds shares no connection with who asks something."""
    from cloud.api.operator import Operator

    operator = Operator(
        services.config, dead_letters=services.dead_letters, journal=services.journal, runners=services.runners,
        mysql=services.secrets.mysql, clocks=services.clocks,
    )  # fmt: skip
    services.on_close.push_async_callback(operator.close)
    return Accounting(operator)


def quotas_of(config: Cloud) -> Quotas:
    """As the configuration sets them: by [[gateway]] where it says so, else by [limits]."""
    limits = config.limits
    usual = Quota(limits.gateway_readings_per_s, limits.gateway_batches_per_s, limits.gateway_mb_per_s * 1e6)
    own = {}
    for gateway in config.gateway:
        readings, batches, mb = gateway.readings_per_s, gateway.batches_per_s, gateway.mb_per_s
        quota = Quota(
            usual.readings_per_s if readings is None else readings,
            usual.batches_per_s if batches is None else batches,
            usual.bytes_per_s if mb is None else mb * 1e6,
        )
        if quota != usual:
            own[f"{gateway.tenant}/{gateway.name}"] = quota
    tenant = Quota(limits.tenant_readings_per_s, limits.tenant_batches_per_s, limits.tenant_mb_per_s * 1e6)
    return Quotas(usual, tenant, burst_s=limits.quota_burst_s, own=own)


def build_sinks(config: Cloud, secrets: Secrets) -> list[Sink]:
    """The sinks that the configuration asks for; what a sink needs is imported only then."""
    data_dir = Path(config.server.data_dir)
    sinks: list[Sink] = []
    if config.embedded.enabled:
        from cloud.sinks.embedded import EmbeddedSink

        sinks.append(EmbeddedSink(data_dir, retention_days=config.embedded.retention_days))
    if config.archive.enabled:
        from cloud.sinks.archive import ArchiveSink

        sinks.append(ArchiveSink(config.archive, data_dir / "archive"))
    if config.influxdb is not None:
        from cloud.sinks.influxdb import InfluxSink

        sinks.append(InfluxSink(config.influxdb))
    if config.mysql is not None and secrets.mysql is not None:
        from cloud.sinks.mysql import MySqlSink

        sinks.append(MySqlSink(config.mysql, secrets.mysql.reveal()))
    return sinks


# --- HTTP ---


def _maintain_s(sink: Sink, config: Cloud) -> float:
    """Hourly, or as often as the archive's files are to be joined: each that is not costs memory."""
    hours = config.archive.compact_hours if sink.name == "archive" else 1.0
    return max(MAINTAIN_LEAST_S, min(MAINTAIN_S, hours * 3600.0))


def _listen(config: Cloud) -> socket.socket:
    host, port = config.server.host, config.server.port
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host.strip("[]"), port), family=family, backlog=2048)
    except OSError as err:
        raise ServeError(
            f"cannot listen on {host}:{port}: {err.strerror}; change server.host or server.port"
        ) from err


def _http_server(config: Cloud, door: HttpDoor) -> uvicorn.Server:
    import uvicorn

    from cloud.http_time import TimedRequests

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # signals are ours (`serve`)

    settings = uvicorn.Config(
        door,
        http=TimedRequests,
        loop="none",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        limit_concurrency=max(64, files - OWN_FILES),  # above it: 503, which an agent takes as "come again"
        timeout_keep_alive=75,  # longer than an agent's heartbeat: its connection stays
        timeout_graceful_shutdown=int(HTTP_GRACE_S),
        ssl_certfile=config.server.tls_cert_file,
        ssl_keyfile=config.server.tls_key_file,
    )
    try:
        settings.load()
    except (OSError, ssl.SSLError) as err:
        raise ServeError(
            f"server.tls_cert_file, server.tls_key_file: {err}; a PEM certificate and its key"
        ) from err
    if settings.ssl is not None:
        settings.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
    return Server(settings)


async def _serve_http(http: uvicorn.Server, listener: socket.socket) -> None:
    try:
        await http.serve(sockets=[listener])
    finally:
        listener.close()


def _resident_bytes() -> int:
    # /proc/self/statm: size, resident, ... in pages (proc(5)).
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- the program ---


def serve(config: Cloud) -> None:
    """Run until SIGTERM or SIGINT. Raises what `CloudServer.run` raises."""
    import uvloop

    with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it, and has then set what it wants
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # one for every connected gateway
    os.umask(0o077)  # what gateways measure is nobody else's business
    leaving = threading.Timer(LEAVE_S, _leave)
    leaving.daemon = True
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_until_signal(config))
        leaving.start()  # the loop's end waits for every thread
    leaving.cancel()


def _leave() -> None:
    """All is closed; what a sink was still doing is in the journal, as after any other end."""
    log.warning("a store still holds a thread: leaving without it")
    logging.shutdown()
    os._exit(0)


async def _until_signal(config: Cloud) -> None:
    server = CloudServer(config)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop)
    await server.run()


def configure_logging(level: str) -> None:
    """One line per event, to stderr: the service manager stamps and keeps it."""
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", force=True
    )
    logging.Formatter.converter = time.gmtime
    for noisy in ("alembic", "apscheduler", "uvicorn", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
