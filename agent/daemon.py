"""`headgate run`: everything that runs on a gateway, started together, ended together.

Rules:
1. Device tasks contain their own faults. Any other task that ends by itself ends the agent, with a status that is not
   0, and the supervisor starts it again: nothing runs on with a part missing.
2. On SIGTERM or SIGINT: stop reading, commit, say so, leave, within 5 s in all.
3. One agent per state folder; the lock is the kernel's.
4. APScheduler runs the slow jobs, never the polling.
5. The supervisor's watchdog is fed by progress (the loop turns, what is pending gets committed), not by being alive.
6. A reload (SIGHUP, or asked at the control socket) takes the file whole or not at all. Devices that are the same
   afterwards are not touched: same task, same schedule, same connection. The buffer and the way to the cloud go on in
   any case: what changed in their tables is told, and waits for a restart.
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
from collections.abc import Coroutine, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import msgspec

from agent import metrics as metrics_file
from agent import runtime_dir
from agent import status as status_file
from agent.buffer import Buffer, BufferUnusable, Condition
from agent.clock import SystemClock
from agent.configuration import Loaded, check, save_last_good, waits_for_restart
from agent.control import ControlServer, Held
from agent.devices import Built, all_points
from agent.drain import DrainEstimate
from agent.field import FieldError, Reloaded, disabled, unknown_device
from agent.forwarder import Forwarder, uplink_of
from agent.health import DeviceHealth, Gauge, State
from agent.learnt import Learnt
from agent.loop_watch import LoopWatch, Stall
from agent.metered import Meter
from agent.poller import DevicePoller
from agent.state import StateDirError, StateLock
from agent.status import (
    STATUS_EVERY_S,
    AgentStatus,
    ClockHealth,
    ConfigHealth,
    LinkHealth,
    LinkState,
    RunState,
)
from drivers.contract import ConfigError, LineClaim, boot_ns
from sync.identity import GatewayName, IdentityError

log = logging.getLogger(__name__)

BUFFER_NAME: Final = "buffer.db"
LEAVE_WITHIN_S: Final = 4.8  #: of the promised 5: after this the process ends, come what may
_POLLERS_LEAVE_S: Final = 2.2  #: a little more than a driver may take to close
_TASKS_LEAVE_S: Final = 1.0
_DISK_WATCH_S: Final = 30.0
_LEARNT_EVERY_S: Final = 60.0  #: what drivers learnt is kept this often
_LOADING_S: Final = 5.0  #: a module may take so long to load, once, from a slow card
_STALLS_TOLD: Final = 6  #: stalls of one device in an hour that the log tells
_CREDENTIAL_AGAIN_S: Final = 15.0
_NEWS_S: Final = 5.0  #: a heartbeat for news comes no sooner after the one before
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


class _Device(msgspec.Struct):
    """One enabled device and its task; `poller` is None where its configuration cannot work."""

    built: Built
    gauge: Gauge
    poller: DevicePoller | None = None
    task: asyncio.Task[None] | None = None
    stalls_told_s: list[float] = []


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
        self._devices: dict[str, _Device] = {}
        self._buffer: Buffer | None = None
        self._group: asyncio.TaskGroup | None = None  #: while devices can be started
        self._learnt = Learnt(folder)
        self._control = ControlServer(folder, self)
        self._loop_watch = LoopWatch(self._stood_still, self._stands_still)
        self._reloading = asyncio.Lock()
        self._reloads: set[asyncio.Task[Reloaded]] = set()
        self._in_force = loaded  #: its text is the file as it was last taken
        self._stalls_told_s: list[float] = []
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
        loop.add_signal_handler(signal.SIGHUP, self._told_to_reload)
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
            self._loop_watch.stop()
            await self._control.close()
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
        scheduler = self._slow_jobs(buffer)
        self._buffer = buffer
        async with asyncio.TaskGroup() as group:
            core = [group.create_task(_for_ever("buffer", buffer.run()), name="buffer")]
            core.append(group.create_task(_for_ever("forwarder", self._deliver(buffer)), name="forwarder"))
            core.append(group.create_task(_for_ever("heartbeat", self._beat(buffer)), name="heartbeat"))
            core.append(
                group.create_task(_for_ever("watchdog", self._feed_watchdog(buffer)), name="watchdog")
            )
            self._group = group
            for made in self._loaded.devices:
                self._start_device(made, self._before.get(made.plan.name))
            self._loop_watch.start()
            scheduler.start()
            self.status.state = RunState.RUNNING
            buffer.record_event("start", f"headgate {self.status.version} started")
            if self.status.config.last_known_good:
                buffer.record_event("config-bad", "; ".join(self.status.config.errors))
            await asyncio.to_thread(self._save_config)
            await asyncio.to_thread(self._write, self._told(buffer))
            await self._open_control()
            await asyncio.to_thread(self._learnt.forget_strangers, [d.name for d in self._config.device])
            self._notify.send("READY=1")
            log.info("running: %d devices, %d points", len(self._devices), all_points(self._loaded.devices))
            try:
                await self._stop.wait()
            finally:
                self._notify.send("STOPPING=1")
                self._group = None  # whatever reload is under way starts nothing more
                scheduler.shutdown(wait=False)
            await self._control.close()
            await _cancel(self._device_tasks(), _POLLERS_LEAVE_S)
            await buffer.commit()
            await self._keep_learnt()
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

    def _start_device(self, made: Built, before: DeviceHealth | None) -> None:
        plan, group, buffer = made.plan, self._group, self._buffer
        if group is None or buffer is None:
            return  # leaving
        health = DeviceHealth(
            name=plan.name,
            driver=plan.driver,
            points=len(plan.points),
            period_ms=round(plan.period_s * 1000),
        )
        if before is not None:
            health.restore(before)
        device = self._devices[plan.name] = _Device(made, Gauge(health, time.time_ns))
        memory = self._learnt.load(plan.name, plan.driver)
        try:
            device.poller = DevicePoller(plan, made.driver, buffer, device.gauge, self._rng, memory)
        except ConfigError as err:
            device.gauge.enter(State.MISCONFIGURED, str(err))
            log.error("%s: not started: %s", plan.name, err)
            return
        device.task = group.create_task(device.poller.run(), name=f"poll[{plan.name}]")

    async def _stop_devices(self, names: Sequence[str]) -> None:
        """Their health stays known, for whoever takes their names."""
        stopped = [self._devices[name] for name in names]
        await _cancel([device.task for device in stopped if device.task is not None], _POLLERS_LEAVE_S)
        await self._keep_learnt()
        for device in stopped:
            name = device.built.plan.name
            self._before[name] = device.gauge.told(boot_ns())
            del self._devices[name]

    def _device_tasks(self) -> list[asyncio.Task[None]]:
        return [device.task for device in self._devices.values() if device.task is not None]

    async def _keep_learnt(self) -> None:
        news = [
            (device.built.plan.name, device.built.plan.driver, learnt)
            for device in self._devices.values()
            if device.poller is not None and (learnt := device.poller.learnt()) is not None
        ]
        for name, driver, learnt in news:
            await asyncio.to_thread(self._learnt.save, name, driver, learnt)

    # --- for technicians (`agent.control.Host`) ---

    async def _open_control(self) -> None:
        try:
            await self._control.open()
        except OSError as err:
            log.warning(
                "no control socket in %s (%s): commands cannot reach the running agent", self._folder, err
            )

    def poller_of(self, device: str) -> DevicePoller:
        found = self._devices.get(device)
        if found is not None and found.poller is not None:
            return found.poller
        if found is not None:
            raise FieldError(f"{device}: its configuration cannot work: {found.gauge.health.why}")
        if any(each.name == device for each in self._in_force.config.device):
            raise disabled(device)
        where = "the running agent's configuration (after a change of the file: systemctl reload headgate)"
        raise unknown_device(device, self._devices, where)

    def held_lines(self) -> list[Held]:
        return [
            Held(name, claim, device.built.isolated)
            for name, device in self._devices.items()
            if device.task is not None and not device.task.done() and (claim := _claim_now(device.built))
        ]

    def status_document(self) -> bytes:
        return status_file.encode(self.status if self._buffer is None else self._told(self._buffer))

    async def reload(self) -> Reloaded:
        """Take the file anew. Who asked may go away meanwhile: what was begun is ended."""
        task = asyncio.create_task(self._reload(), name="reload")
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)
        return await asyncio.shield(task)

    async def until_reloaded(self) -> None:
        async with self._reloading:
            pass

    async def _reload(self) -> Reloaded:
        async with self._reloading:
            buffer = self._buffer
            if buffer is None or self._group is None:
                raise FieldError("the agent is starting or leaving; try again")
            file = Path(self.status.config.file)
            checked = await asyncio.to_thread(check, file)
            errors = [str(error) for error in checked.errors]
            if checked.config is None or errors:
                self.status.config = msgspec.structs.replace(
                    self.status.config, last_known_good=True, errors=errors
                )
                log.error("the configuration is bad, nothing was changed: %s", "; ".join(errors))
                buffer.record_event("config-bad", "; ".join(errors))
                return Reloaded(errors=errors, unchanged=len(self._devices))
            wanted = {made.plan.name: made for made in checked.devices}
            known = dict(self._devices)
            same = {
                name
                for name, device in known.items()
                if name in wanted and device.built.is_as(wanted[name]) and _runs(device)
            }
            changed = [name for name in wanted if name in known and name not in same]
            stopped = [name for name in known if name not in wanted]
            started = [name for name in wanted if name not in known]
            # First all that end: their lines may be wanted by others.
            await self._stop_devices([*stopped, *changed])
            for name in (*changed, *started):
                self._start_device(wanted[name], self._before.get(name))
            notes = waits_for_restart(self._loaded.text, checked.config)
            self._in_force = msgspec.structs.replace(
                self._loaded, config=msgspec.structs.replace(self._config, device=checked.config.device),
                text=checked.text, devices=checked.devices, health=ConfigHealth(file=str(file)),
            )  # fmt: skip
            self.status.config = ConfigHealth(file=str(file), notes=notes, reloaded_ns=time.time_ns())
            await asyncio.to_thread(self._save_config)
            told = f"{len(started)} started, {len(stopped)} stopped, {len(changed)} changed, {len(same)} untouched"
            log.info("configuration reloaded: %s%s", told, "".join(f"; {note}" for note in notes))
            buffer.record_event("config-reloaded", told)
            await asyncio.to_thread(self._write, self._told(buffer))
            return Reloaded(started, stopped, changed, len(same), [], notes)

    def _told_to_reload(self) -> None:
        log.info("SIGHUP: reloading the configuration")
        task = asyncio.create_task(self._reload(), name="reload")
        self._reloads.add(task)
        task.add_done_callback(self._reloaded)

    def _reloaded(self, task: asyncio.Task[Reloaded]) -> None:
        self._reloads.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("the configuration was not reloaded: %s", task.exception())

    # --- who holds up the loop ---

    def _stood_still(self, stall: Stall) -> None:
        device = self._devices.get(stall.device)
        if device is None and stall.loading and stall.lasted_s < _LOADING_S:
            log.debug(
                "the agent stood still for %.1f s while it loaded a module at %s", stall.lasted_s, stall.where
            )
            return
        told_s = self._stalls_told_s if device is None else device.stalls_told_s
        text = self._counted(stall, device)
        now_s = time.monotonic()
        told_s[:] = [at_s for at_s in told_s if now_s - at_s < 3600]
        if len(told_s) < _STALLS_TOLD:
            told_s.append(now_s)
            if len(told_s) == _STALLS_TOLD:
                text += "; not told again within the hour, see headgate status"
            log.warning("%s", text)
        else:
            log.debug("%s", text)

    def _stands_still(self, stall: Stall) -> None:
        """Called from a thread, while nothing else runs: the log and the status may be the last that is heard of us."""
        try:
            log.error("%s; it has not ended yet", self._counted(stall, self._devices.get(stall.device)))
            if self._buffer is not None:
                self._write(self._told(self._buffer))
        except RuntimeError as err:  # the loop turns again, and changed under our hands what was looked at
            log.debug("the status is told later: %s", err)

    def _counted(self, stall: Stall, device: _Device | None) -> str:
        """A stall, counted where it belongs, in words."""
        rest_s, lasted = stall.lasted_s - stall.told_s, f"{stall.lasted_s:.1f} s"
        if device is not None:
            device.gauge.held_up(rest_s, stall.where, again=stall.told_s > 0)
            return (
                f"device {stall.device} (driver {device.built.plan.driver}) blocked the agent for {lasted} at "
                f"{stall.where}; give it a process of its own: isolate = true"
            )
        status = self.status
        status.stalls += not stall.told_s
        status.stalled_s = round(status.stalled_s + rest_s, 3)
        status.stalled_at, status.stalled_ns = stall.where, time.time_ns()
        return f"the agent stood still for {lasted} at {stall.where}" + (
            f" (task {stall.task})" if stall.task else ""
        )

    async def _deliver(self, buffer: Buffer) -> None:
        """Send what is kept, for ever. A credential that cannot be read is waited for: reading devices goes on."""
        link = self.status.link
        while True:
            try:
                uplink = uplink_of(self._config.uplink, self._name, self._rng)
                break
            except IdentityError as err:
                if link.state is not LinkState.DOWN:
                    link.state, link.since_ns = LinkState.DOWN, time.time_ns()
                    log.error("no way to the cloud: %s; readings are kept here meanwhile", err)
                link.why, link.cause = str(err), "credential"
            await asyncio.sleep(_CREDENTIAL_AGAIN_S)
        if uplink is None:
            await asyncio.Event().wait()
        else:
            meter = await self._meter()
            self._forwarder = Forwarder(buffer, uplink, self._config.uplink, link, self._rng, meter)
            await self._forwarder.run()

    async def _meter(self) -> Meter | None:
        settings = self._config.uplink
        if not settings.metered.limits:
            return None
        meter = Meter(settings.metered, self._folder, keepalive_s=settings.keepalive_s)
        await asyncio.to_thread(meter.load)
        return meter

    async def _beat(self, buffer: Buffer) -> None:
        """The heartbeat: the status to the cloud, as soon as there is a way, then every `heartbeat_s`, and soon after
        something new is wrong or is well again."""
        every_s = self._config.uplink.heartbeat_s
        told: set[tuple[str, str]] | None = None
        sent_s = 0.0
        while True:
            status, now_s = self._told(buffer), time.monotonic()
            wrong = {(problem.code, problem.device) for problem in status.problems}
            news = wrong != told and now_s - sent_s >= _NEWS_S
            if (told is None or news or now_s - sent_s >= every_s) and self._forwarder is not None:
                if await self._forwarder.report(status_file.encode(status)):
                    told, sent_s = wrong, now_s
                else:
                    told = None
            await asyncio.sleep(min(every_s, 1.0))

    def _slow_jobs(self, buffer: Buffer) -> Any:
        """APScheduler ships no types; nothing but `start` and `shutdown` is asked of it outside."""
        from apscheduler.schedulers.asyncio import AsyncIOScheduler

        scheduler = AsyncIOScheduler(
            timezone="UTC", job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": 60}
        )

        async def write_status() -> None:
            await asyncio.to_thread(self._write, self._told(buffer))

        scheduler.add_job(write_status, "interval", seconds=STATUS_EVERY_S, id="status")
        scheduler.add_job(self._keep_learnt, "interval", seconds=_LEARNT_EVERY_S, id="learnt")
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
        if self._in_force.health.last_known_good:
            return
        try:
            save_last_good(self._in_force)
        except OSError as err:
            log.warning("the last-known-good configuration cannot be kept: %s", err)

    def _told(self, buffer: Buffer) -> AgentStatus:
        """The status as of now."""
        status = self.status
        now_boot_ns = boot_ns()
        status.written_ns = time.time_ns()
        status.heartbeat_s = self._config.uplink.heartbeat_s
        status.buffer = held = buffer.state
        status.drain_eta_s = self._drain.eta_s(
            now_boot_ns / 1e9, held.settled_readings, held.kept_readings, held.buffered_readings, held.oldest_age_s
        )  # fmt: skip
        if self._forwarder is not None:
            status.link = self._forwarder.tell()
        now = self._clock.read()
        status.clock = ClockHealth(
            synchronized=now.synchronized,
            error_s=round(now.error_ns / 1e9, 3),
            expected=held.clock_expected,
            waiting=held.clock_waiting,
        )
        status.devices = [device.gauge.told(now_boot_ns) for device in self._devices.values()]
        status.rss_bytes = rss_bytes()
        status.cpu_s = round(time.process_time(), 3)
        status.disk_floor_bytes = self._config.buffer.free_disk_mb * 1024 * 1024
        with contextlib.suppress(OSError):  # `_watch_disk` tells it
            disk = os.statvfs(self._folder)
            status.disk_free_bytes = disk.f_bavail * disk.f_frsize
        status.problems = status_file.problems(status, running=True, now_ns=status.written_ns)
        return status

    def _write(self, status: AgentStatus) -> None:
        try:
            status_file.write(self._folder, status)
            metrics_file.write(self._folder, status)
        except OSError as err:
            log.debug("the status cannot be written: %s", err)
            try:
                aside = runtime_dir.make(self._folder)
                status_file.write(aside, status)
                metrics_file.write(aside, status)
            except OSError as again:
                log.debug("nor in memory: %s", again)

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


def _runs(device: _Device) -> bool:
    """One that stopped for good over its configuration is given another chance by a reload."""
    return device.task is not None and not device.task.done()


def _claim_now(built: Built) -> LineClaim | None:
    """A port named by its USB identity may not have been there when the device was built."""
    try:
        return built.line()
    except ConfigError:  # two adapters of one identity now; the driver says so when it connects
        return built.claim


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
