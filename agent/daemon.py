"""`headgate run`: everything that runs on a gateway, started together, ended together.

Rules:
1. Device tasks contain their own faults. Any other task that ends by itself ends the agent, with a status that is not
   0, and the supervisor starts it again: nothing runs on with a part missing.
2. On SIGTERM or SIGINT: stop reading, commit, say so, leave, within 5 s in all.
3. One agent per state folder; the lock is the kernel's.
4. APScheduler runs the slow jobs, never the polling.
5. The supervisor's watchdog is fed by progress (the loop turns, what is pending gets committed), not by being alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Coroutine, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from agent import metrics as metrics_file
from agent import status as status_file
from agent.buffer import Buffer, BufferUnusable, Condition
from agent.clock import SystemClock
from agent.configuration import Loaded, save_last_good
from agent.devices import all_points
from agent.drain import DrainEstimate
from agent.forwarder import Forwarder, uplink_of
from agent.health import DeviceHealth, Gauge, State
from agent.poller import DevicePoller
from agent.state import StateDirError, StateLock
from agent.status import STATUS_EVERY_S, AgentStatus, LinkHealth, LinkState, RunState
from drivers.contract import ConfigError, boot_ns
from sync.identity import GatewayName, IdentityError

log = logging.getLogger(__name__)

BUFFER_NAME: Final = "buffer.db"
LEAVE_WITHIN_S: Final = 4.8  #: of the promised 5: after this the process ends, come what may
_POLLERS_LEAVE_S: Final = 2.2  #: a little more than a driver may take to close
_TASKS_LEAVE_S: Final = 1.0
_DISK_WATCH_S: Final = 30.0
_CREDENTIAL_AGAIN_S: Final = 15.0
_STUCK_COMMIT_S: Final = 60.0  #: readings pending for this long without a commit: the watchdog goes hungry

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_UNUSABLE: Final = 2  #: configuration or state folder: restarting does not help, a human must


class StartError(Exception):
    """The agent cannot start; the text says what to change."""


def run(loaded: Loaded) -> int:
    """Run until told to leave; the process's exit status. Raises `StartError` before anything is started."""
    folder = Path(loaded.config.gateway.state_dir)
    try:
        lock = StateLock.take(folder)
    except StateDirError as err:
        raise StartError(str(err)) from err
    leaver = Leaver()
    try:
        return asyncio.run(Daemon(loaded, folder, leaver, random.Random()).serve())
    finally:
        lock.release()


class Leaver:
    """Ends the process when leaving takes too long: a thread stuck in a library must not hold up a shutdown."""

    def __init__(self) -> None:
        self.code = EXIT_FAILED
        self._timer: threading.Timer | None = None

    def start(self) -> None:
        if self._timer is None:
            self._timer = threading.Timer(LEAVE_WITHIN_S, self._leave)
            self._timer.daemon = True
            self._timer.start()

    def _leave(self) -> None:
        os._exit(self.code)


class Daemon:
    """One run of the agent."""

    def __init__(self, loaded: Loaded, folder: Path, leaver: Leaver, rng: random.Random) -> None:
        self._config = loaded.config
        self._loaded = loaded
        self._folder = folder
        self._leaver = leaver
        self._rng = rng
        self._stop = asyncio.Event()
        self._name = GatewayName(self._config.gateway.tenant, self._config.gateway.name)
        self._clock = SystemClock()
        self._notify = Notify.from_environment()
        self._gauges: list[Gauge] = []
        self._forwarder: Forwarder | None = None
        self._drain = DrainEstimate()
        self._progress = (0, time.monotonic())
        self._disk_was_low = False
        before = status_file.read(folder)
        self._before = {} if before is None else {device.name: device for device in before.devices}
        self.status = AgentStatus(
            version=version("headgate"),
            gateway=str(self._name),
            pid=os.getpid(),
            boot_id=self._clock.boot_id,
            started_ns=time.time_ns(),
            starts=1 if before is None else before.starts + 1,
            config=loaded.health,
        )
        uplink = self._config.uplink
        self.status.link = LinkHealth(
            state=LinkState.OFF if uplink.kind == "none" else LinkState.CONNECTING,
            since_ns=time.time_ns(),
            target="" if uplink.kind == "none" else f"{uplink.kind} {uplink.host}",
        )

    async def serve(self) -> int:
        """Start, run, leave. The exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_leave, number)
        self._tell_config()
        try:
            buffer = await Buffer.open(
                self._folder / BUFFER_NAME, self._name, self._config.buffer, self._clock
            )
        except BufferUnusable as err:
            raise StartError(str(err)) from err
        state, why = RunState.FAILED, ""
        try:
            await self._run(buffer)
            state = RunState.STOPPED
        except BaseExceptionGroup as group:
            first = _first(group)
            why = f"{type(first).__name__}: {first}"
            log.critical("the agent ends: %s", why, exc_info=first)
        finally:
            self._leaver.start()
            await buffer.close()
            self.status.state, self.status.why = state, why
            self._write(self._told(buffer))
        kept = buffer.state
        log.info(
            "left%s: %d readings kept, %d delivered, %d waiting",
            " in order" if state is RunState.STOPPED else "",
            kept.kept_readings, kept.settled_readings, kept.buffered_readings,
        )  # fmt: skip
        # Known from here on, whatever thread of a library may still hold up the process.
        self._leaver.code = EXIT_OK if state is RunState.STOPPED else EXIT_FAILED
        return self._leaver.code

    async def _run(self, buffer: Buffer) -> None:
        """Until asked to leave; an `ExceptionGroup` where a part ended by itself."""
        pollers = self._pollers(buffer)
        scheduler = self._slow_jobs(buffer)
        async with asyncio.TaskGroup() as group:
            core = [group.create_task(_for_ever("buffer", buffer.run()), name="buffer")]
            core.append(group.create_task(_for_ever("forwarder", self._deliver(buffer)), name="forwarder"))
            core.append(group.create_task(_for_ever("heartbeat", self._beat(buffer)), name="heartbeat"))
            core.append(
                group.create_task(_for_ever("watchdog", self._feed_watchdog(buffer)), name="watchdog")
            )
            devices = [group.create_task(p.run(), name=f"poll[{p.plan.name}]") for p in pollers]
            scheduler.start()
            self.status.state = RunState.RUNNING
            buffer.record_event("start", f"headgate {self.status.version} started")
            if self.status.config.last_known_good:
                buffer.record_event("config-bad", "; ".join(self.status.config.errors))
            await asyncio.to_thread(self._save_config)
            await asyncio.to_thread(self._write, self._told(buffer))
            self._notify.send("READY=1")
            log.info("running: %d devices, %d points", len(pollers), all_points(self._loaded.devices))
            try:
                await self._stop.wait()
            finally:
                self._notify.send("STOPPING=1")
                scheduler.shutdown(wait=False)
            await _cancel(devices, _POLLERS_LEAVE_S)
            await buffer.commit()
            await _cancel(core, _TASKS_LEAVE_S)

    def _told_to_leave(self, number: int) -> None:
        if not self._stop.is_set():
            log.info("%s: leaving", signal.Signals(number).name)
        self.leave()

    def leave(self) -> None:
        """Stop reading, commit, end; `serve` returns soon after."""
        self._leaver.start()
        self._stop.set()

    # --- parts ---

    def _pollers(self, buffer: Buffer) -> list[DevicePoller]:
        pollers = []
        for made in self._loaded.devices:
            plan = made.plan
            health = DeviceHealth(
                name=plan.name,
                driver=plan.driver,
                points=len(plan.points),
                period_ms=round(plan.period_s * 1000),
            )
            if plan.name in self._before:
                health.restore(self._before[plan.name])
            gauge = Gauge(health, time.time_ns)
            self._gauges.append(gauge)
            try:
                pollers.append(DevicePoller(plan, made.driver, buffer, gauge, self._rng))
            except ConfigError as err:
                gauge.enter(State.MISCONFIGURED, str(err))
                log.error("%s: not started: %s", plan.name, err)
        return pollers

    async def _deliver(self, buffer: Buffer) -> None:
        """Send what is kept, for ever. A credential that cannot be read is waited for: reading devices goes on."""
        link = self.status.link
        while True:
            try:
                uplink = uplink_of(self._config.uplink, self._name)
                break
            except IdentityError as err:
                if link.state is not LinkState.DOWN:
                    link.state, link.since_ns = LinkState.DOWN, time.time_ns()
                    log.error("no way to the cloud: %s; readings are kept here meanwhile", err)
                link.why = str(err)
            await asyncio.sleep(_CREDENTIAL_AGAIN_S)
        if uplink is None:
            await asyncio.Event().wait()
        else:
            self._forwarder = Forwarder(buffer, uplink, self._config.uplink, link, self._rng)
            await self._forwarder.run()

    async def _beat(self, buffer: Buffer) -> None:
        """The heartbeat: the status to the cloud, as soon as there is a way and then every `heartbeat_s`."""
        every_s = self._config.uplink.heartbeat_s
        while True:
            sent = self._forwarder is not None and await self._forwarder.report(
                status_file.encode(self._told(buffer))
            )
            await asyncio.sleep(every_s if sent else min(every_s, 1.0))

    def _slow_jobs(self, buffer: Buffer) -> Any:
        """APScheduler ships no types; nothing but `start` and `shutdown` is asked of it outside."""
        from apscheduler.schedulers.asyncio import AsyncIOScheduler

        scheduler = AsyncIOScheduler(
            timezone="UTC", job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": 60}
        )

        async def write_status() -> None:
            await asyncio.to_thread(self._write, self._told(buffer))

        scheduler.add_job(write_status, "interval", seconds=STATUS_EVERY_S, id="status")
        scheduler.add_job(self._watch_disk, "interval", seconds=_DISK_WATCH_S, id="disk")
        return scheduler

    # --- what is told ---

    def _tell_config(self) -> None:
        health = self._loaded.health
        if health.last_known_good:
            log.error(
                "the configuration %s is bad; the last good one is in force instead: %s",
                health.file, "; ".join(health.errors),
            )  # fmt: skip

    def _save_config(self) -> None:
        if self._loaded.health.last_known_good:
            return
        try:
            save_last_good(self._loaded)
        except OSError as err:
            log.warning("the last-known-good configuration cannot be kept: %s", err)

    def _told(self, buffer: Buffer) -> AgentStatus:
        """The status as of now."""
        status = self.status
        now_boot_ns = boot_ns()
        status.written_ns = time.time_ns()
        status.buffer = held = buffer.state
        status.drain_eta_s = self._drain.eta_s(
            now_boot_ns / 1e9, held.settled_readings, held.kept_readings, held.buffered_readings, held.oldest_age_s
        )  # fmt: skip
        if self._forwarder is not None:
            status.link = self._forwarder.tell()
        status.devices = [gauge.told(now_boot_ns) for gauge in self._gauges]
        status.rss_bytes = rss_bytes()
        status.cpu_s = round(time.process_time(), 3)
        return status

    def _write(self, status: AgentStatus) -> None:
        try:
            status_file.write(self._folder, status)
            metrics_file.write(self._folder, status)
        except OSError as err:
            log.debug("the status cannot be written: %s", err)

    def _watch_disk(self) -> None:
        try:
            stats = os.statvfs(self._folder)
        except OSError as err:
            log.warning("the state folder cannot be looked at: %s", err)
            return
        free = stats.f_bavail * stats.f_frsize
        self.status.disk_free_bytes = free
        low = free < 2 * self._config.buffer.free_disk_mb * 1024 * 1024
        if low and not self._disk_was_low:
            log.warning(
                "%d MB free on the disk of %s; below %d MB the oldest readings are dropped: make room",
                free // 1024**2, self._folder, self._config.buffer.free_disk_mb,
            )  # fmt: skip
        elif self._disk_was_low and not low:
            log.info("%d MB free on the disk of %s again", free // 1024**2, self._folder)
        self._disk_was_low = low

    # --- the supervisor ---

    async def _feed_watchdog(self, buffer: Buffer) -> None:
        interval_s = self._notify.watchdog_s or 30.0
        while True:
            await asyncio.sleep(interval_s)
            if self._progresses(buffer):
                self._notify.send("WATCHDOG=1")
            else:
                log.error("nothing was committed for %g s although readings are pending", _STUCK_COMMIT_S)

    def _progresses(self, buffer: Buffer) -> bool:
        """Whether what is pending gets committed. A disk that refuses is known and told; a restart cures nothing."""
        state, now_s = buffer.state, time.monotonic()
        commits, since_s = self._progress
        if state.commits != commits or not state.pending_frames or state.condition is Condition.HOLDING:
            self._progress = (state.commits, now_s)
            return True
        return now_s - since_s < _STUCK_COMMIT_S


class Notify:
    """sd_notify(3), without the library: one datagram to the socket that the supervisor named."""

    def __init__(self, address: str | None, watchdog_s: float | None) -> None:
        self._address = address
        self.watchdog_s = watchdog_s  #: how often to send WATCHDOG=1

    @classmethod
    def from_environment(cls) -> Notify:
        """As systemd tells it. The variables are taken away, so that no child process speaks for us."""
        address = os.environ.pop("NOTIFY_SOCKET", None)
        timeout_us = os.environ.pop("WATCHDOG_USEC", "")
        meant_for = os.environ.pop("WATCHDOG_PID", str(os.getpid()))
        watchdog_s = None
        if timeout_us.isdigit() and meant_for == str(os.getpid()):
            watchdog_s = int(timeout_us) / 2e6  # sd_watchdog_enabled(3): at half the time
        return cls(address, watchdog_s)

    def send(self, text: str) -> None:
        """Best effort, as sd_notify(3) advises."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as speaker:
            speaker.setblocking(False)
            speaker.sendto(text.encode(), address)


def rss_bytes() -> int:
    """How much memory this process holds now (proc(5), statm)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


async def _for_ever(what: str, work: Coroutine[Any, Any, None]) -> None:
    """A part that must not end by itself."""
    await work
    raise RuntimeError(f"the {what} task ended by itself")


async def _cancel(tasks: Iterable[asyncio.Task[None]], within_s: float) -> None:
    """Ask tasks to end, and wait, but not for ever."""
    asked = [task for task in tasks if not task.done()]
    for task in asked:
        task.cancel()
    if asked:
        _, late = await asyncio.wait(asked, timeout=within_s)
        for task in late:
            log.warning("%s did not end within %g s", task.get_name(), within_s)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
