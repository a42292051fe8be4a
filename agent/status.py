"""What the agent says of itself: one document, for the state file, the heartbeat and `headgate status`.

Rules: the document is a fact sheet (plain numbers, wall-clock nanoseconds); judging it is `problems`, which is pure
and says in words what is wrong and what to do. A document of a version that is newer is read as far as it is known.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from agent import runtime_dir
from agent.buffer import BufferState, Condition
from agent.health import DeviceHealth, State, duration_in_words
from agent.state import write_atomically

STATUS_NAME: Final = "status.json"
STATUS_EVERY_S: Final = 5.0  #: how often a running agent writes it
_BLOCKED_TOLD_S: Final = 3600  #: for how long a driver that held up the others is a problem
_SILENT_AFTER: Final = 6  #: times that long without a new one: the agent hangs
_MB: Final = 1024 * 1024
_FULL_PART: Final = 8  #: of the floor: whoever left less than that took all there was, but for the ballast


class RunState(enum.StrEnum):
    """What the agent as a whole is doing."""

    STARTING = "starting"
    RUNNING = "running"
    STOPPED = "stopped"  #: left in order
    FAILED = "failed"  #: left because of an error of its own


class LinkState(enum.StrEnum):
    """The way to the cloud."""

    OFF = "off"  #: uplink.kind = "none": readings stay here
    CONNECTING = "connecting"  #: never was up in this run
    UP = "up"
    DOWN = "down"


class LinkHealth(msgspec.Struct, kw_only=True):
    """How the way to the cloud is."""

    state: LinkState = LinkState.CONNECTING
    since_ns: int = 0  #: wall clock
    target: str = ""  #: "mqtt host:port"
    detour: str = ""  #: why the second way is used; "" while it is not
    why: str = ""
    cause: str = ""  #: why, in one word (`sync.uplink.LinkDown`), while it is down
    held: str = ""  #: why and until when the metered link's rules hold back what is not urgent
    in_flight: int = 0
    acked_batches: int = 0  #: in this run
    resent_batches: int = 0
    refused_batches: int = 0
    ack_p50_ms: float | None = None
    ack_p99_ms: float | None = None
    skew_s: float | None = None  #: this machine's clock less the cloud's, by the last ack; None: not told yet
    skew_bound_s: float = 0.0  #: how far that may be off: half of the round trip


class ClockHealth(msgspec.Struct, kw_only=True):
    """How this machine's clock is."""

    synchronized: bool = True  #: the kernel's word
    error_s: float = 0.0  #: the most that it may be off, by the kernel; 0 where unknown
    expected: bool = (
        False  #: not synchronized in this boot, though it was in an earlier one or shows what cannot be
    )
    waiting: bool = False  #: readings wait for it


class ConfigHealth(msgspec.Struct, kw_only=True):
    """Which configuration is in force."""

    file: str = ""
    last_known_good: bool = False  #: the file is bad, and the last good one is in force
    errors: list[str] = []
    notes: list[str] = []  #: what changed in the file since the start, and takes a restart
    reloaded_ns: int | None = None  #: wall clock of the last reload that was taken


class Problem(msgspec.Struct, frozen=True):
    """One thing that is wrong, and what to do about it."""

    text: str
    remedy: str = ""
    code: str = (
        ""  #: one of `Code`, or "device_" and the reason (drivers.contract.Reason): for metrics and the cloud
    )
    device: str = ""

    def __str__(self) -> str:
        return f"{self.text}: {self.remedy}" if self.remedy else self.text


class Code(enum.StrEnum):
    """One word for each thing that can be wrong, the same in the status, the heartbeat and the metrics. A code is
    there while its cause is, and no longer. docs/reliability.md lists them with their remedies."""

    AGENT_STOPPED = "agent_stopped"
    AGENT_FAILED = "agent_failed"
    AGENT_DIED = "agent_died"  #: it did not leave in order
    AGENT_SILENT = "agent_silent"  #: it holds its lock and says nothing
    AGENT_STALLED = "agent_stalled"  #: it stood still through no driver's fault
    CONFIG_BAD = "config_bad"  #: the last good one is in force
    CONFIG_RESTART = "config_restart"  #: a change waits for a restart
    BUFFER_FULL = "buffer_full"  #: at its cap: what is evicted becomes gaps
    BUFFER_HOLDING = "buffer_holding"  #: the disk refuses, for a reason not told apart below
    BUFFER_SALVAGE = "buffer_salvage"  #: a damaged file was set aside, and what is good in it comes back
    BUFFER_PARKED = "buffer_parked"  #: the cloud refused frames for good
    DISK_LOW = "disk_low"  #: at the free-disk floor: what is evicted becomes gaps
    DISK_FULL = "disk_full"
    DISK_READONLY = "disk_readonly"
    DISK_ERROR = "disk_error"
    CLOCK_UNSYNCHRONIZED = "clock_unsynchronized"
    CLOCK_SKEW = "clock_skew"  #: against the cloud's clock
    LINK_DOWN = "link_down"  #: for a reason not told apart below
    LINK_DNS = "link_dns"
    LINK_REFUSED = "link_refused"  #: nothing listens there, or it hangs up
    LINK_TIMEOUT = "link_timeout"  #: nothing answers: a firewall, a dead network
    LINK_TLS = "link_tls"
    LINK_CREDENTIAL = "link_credential"
    LINK_SILENT = "link_silent"  #: the way is open and the cloud says nothing
    LINK_WAITS = "link_waits"  #: the cloud asks to wait
    LINK_METERED = "link_metered"  #: held back by the metered link's rules
    LINK_FALLBACK = "link_fallback"  #: the first uplink is down, the second one is used
    DRIVER_BLOCKS = "driver_blocks"


class AgentStatus(msgspec.Struct, kw_only=True):
    """All of it."""

    format: int = 1
    version: str = ""
    gateway: str = ""
    state: RunState = RunState.STARTING
    why: str = ""
    pid: int = 0
    boot_id: str = ""
    started_ns: int = 0
    written_ns: int = 0
    starts: int = 1  #: of the agent, on this state folder
    heartbeat_s: float = 0.0  #: how often the cloud hears this at least; 0: not told
    config: ConfigHealth = msgspec.field(default_factory=ConfigHealth)
    link: LinkHealth = msgspec.field(default_factory=LinkHealth)
    clock: ClockHealth = msgspec.field(default_factory=ClockHealth)
    buffer: BufferState | None = None
    drain_eta_s: float | None = None  #: until the backlog is delivered at the recent pace; None: not known
    devices: list[DeviceHealth] = []
    rss_bytes: int = 0
    cpu_s: float = 0.0
    disk_free_bytes: int = 0
    disk_floor_bytes: int = 0  #: below this the buffer drops what it must (`buffer.free_disk_mb`)
    stalls: int = 0  #: times that the event loop stood still through no driver's fault
    stalled_s: float = 0.0
    stalled_at: str = ""  #: where, the last time
    stalled_ns: int | None = None  #: wall clock of the last time
    problems: list[
        Problem
    ] = []  #: as the agent judges itself, for whoever only reads (the cloud, the metrics)


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(AgentStatus).decode


def encode(status: AgentStatus) -> bytes:
    """The document as JSON."""
    return _encode(status)


class _Judged(msgspec.Struct, kw_only=True):
    running: bool | None
    problems: list[Problem]
    status: AgentStatus


def as_json(status: AgentStatus, found: list[Problem], *, running: bool | None) -> str:
    """The document with its judgement, for `headgate status --json`."""
    return msgspec.json.format(
        _encode(_Judged(running=running, problems=found, status=status)), indent=2
    ).decode()


def decode(document: bytes) -> AgentStatus:
    """Raises `msgspec.DecodeError`."""
    return _decode(document)


def write(folder: Path, status: AgentStatus) -> None:
    """Replace the state file. Raises `OSError`."""
    # Compact: it is written every few seconds, to flash. `headgate status --json` shows it with indents.
    write_atomically(folder / STATUS_NAME, _encode(status) + b"\n")


def read(folder: Path) -> AgentStatus | None:
    """The last document written, also where only memory took it; `None` where there is none that can be read."""
    found: list[AgentStatus] = []
    for place in (folder, *runtime_dir.found(folder)):
        with contextlib.suppress(OSError, msgspec.DecodeError):
            found.append(_decode((place / STATUS_NAME).read_bytes()))
    return max(found, key=lambda status: status.written_ns, default=None)


# --- judging it ---

_BUFFER_CODES: Final = {Condition.EVICTING: Code.BUFFER_FULL, Condition.HOLDING: Code.BUFFER_HOLDING}
_LINK_CODES: Final = {
    "dns": Code.LINK_DNS, "refused": Code.LINK_REFUSED, "timeout": Code.LINK_TIMEOUT, "tls": Code.LINK_TLS,
    "credential": Code.LINK_CREDENTIAL, "silent": Code.LINK_SILENT,
}  # fmt: skip


def problems(status: AgentStatus, *, running: bool | None, now_ns: int) -> list[Problem]:
    """Everything that is wrong, the gravest first. `running` is whether the folder's lock is held."""
    found = [*_run(status, running=running, now_ns=now_ns), *_config(status.config)]
    if status.buffer is not None:
        found += _buffer(status.buffer)
    if running is not False and status.disk_free_bytes < status.disk_floor_bytes:
        found += _disk(status, found)
    if running is not False:
        found += _link(status.link, now_ns)
        found += _clock(status.clock, status.link)
        for device in status.devices:
            found += _device(device, now_ns)
            found += _blocking(device, now_ns)
        found += _stalls(status, now_ns)
    return found


def _ago(then_ns: int, now_ns: int) -> str:
    return duration_in_words((now_ns - then_ns) / 1e9)


def _run(status: AgentStatus, *, running: bool | None, now_ns: int) -> Sequence[Problem]:
    age_s = (now_ns - status.written_ns) / 1e9
    if running is False:
        ago = _ago(status.written_ns, now_ns)
        match status.state:
            case RunState.STOPPED:
                return [
                    Problem(
                        f"the agent is not running; it was stopped {ago} ago",
                        "start it: systemctl start headgate",
                        Code.AGENT_STOPPED,
                    )
                ]
            case RunState.FAILED:
                return [
                    Problem(
                        f"the agent is not running; it failed {ago} ago ({status.why})",
                        "see its log: journalctl -u headgate",
                        Code.AGENT_FAILED,
                    )
                ]
            case _:
                return [
                    Problem(
                        f"the agent is not running; it was last seen {ago} ago and did not leave in order",
                        "start it: systemctl start headgate, and see its log: journalctl -u headgate",
                        Code.AGENT_DIED,
                    )
                ]
    if running and age_s > _SILENT_AFTER * STATUS_EVERY_S:
        return [
            Problem(
                f"the agent holds its lock but has said nothing for {duration_in_words(age_s)}",
                f"it hangs or cannot write its state: see its log, then restart it (process {status.pid})",
                Code.AGENT_SILENT,
            )
        ]
    return []


def _config(config: ConfigHealth) -> Sequence[Problem]:
    if not config.last_known_good:
        return [
            Problem(
                f"the configuration {config.file}: {note}", "systemctl restart headgate", Code.CONFIG_RESTART
            )
            for note in config.notes
        ]
    first = config.errors[0] if config.errors else "unknown"
    return [
        Problem(
            f"the configuration {config.file} is bad, and the last good one is in force ({first})",
            f"correct it (headgate config check {config.file}), then systemctl reload headgate",
            Code.CONFIG_BAD,
        )
    ]


def _buffer(buffer: BufferState) -> Sequence[Problem]:
    found: list[Problem] = []
    if buffer.condition is not Condition.OK:
        code = buffer.cause or _BUFFER_CODES[buffer.condition]
        found.append(Problem(f"buffer: {buffer.condition.value}", buffer.detail, code))
    for old in buffer.old:
        if old.phase != "done":
            found.append(
                Problem(
                    f"buffer: {old.name} was damaged and set aside; what is good in it is being looked for",
                    "look at the disk (dmesg, smartctl); see headgate buffer",
                    Code.BUFFER_SALVAGE,
                )
            )
        elif old.held_readings:
            found.append(
                Problem(
                    f"buffer: {old.held_readings:,} readings from the damaged {old.name} wait to be sent",
                    "look at the disk (dmesg, smartctl); see headgate buffer",
                    Code.BUFFER_SALVAGE,
                )
            )
    if buffer.parked_frames:
        found.append(Problem(f"buffer: {buffer.parked_frames:,} frames were refused by the cloud for good",
                             "see the cloud's log for the reason; they are kept aside",
                             Code.BUFFER_PARKED))  # fmt: skip
    return found


SKEW_S: Final = 5.0  #: between two clocks that are both right there is less than a second


def _clock(clock: ClockHealth, link: LinkHealth) -> Sequence[Problem]:
    reach = "let it reach a time server (NTP, UDP port 123), or set it: timedatectl set-time"
    found = []
    if clock.expected:
        what = "readings wait for that" if clock.waiting else "the times of readings are estimates until then"
        found.append(
            Problem(f"clock: not set yet since this start; {what}", reach, Code.CLOCK_UNSYNCHRONIZED)
        )
    skew_s = link.skew_s
    if skew_s is not None and abs(skew_s) - link.skew_bound_s > SKEW_S:
        where = "ahead of" if skew_s > 0 else "behind"
        found.append(Problem(f"clock: {abs(skew_s):.0f} s {where} the cloud's", reach, Code.CLOCK_SKEW))
    return found


def _disk(status: AgentStatus, found: Sequence[Problem]) -> Sequence[Problem]:
    told = {problem.code for problem in found}
    if status.disk_free_bytes <= status.disk_floor_bytes // _FULL_PART and Code.DISK_FULL not in told:
        return [
            Problem(
                f"disk: full, {status.disk_free_bytes // _MB} MB free",
                "free some space: what is held is sent all the same, and new readings take the place of old ones",
                Code.DISK_FULL,
            )
        ]
    if told & {Code.DISK_LOW, Code.DISK_FULL}:
        return []  # the buffer says it already, with what follows from it
    return [
        Problem(
            f"disk: {status.disk_free_bytes // _MB} MB free, less than the {status.disk_floor_bytes // _MB} MB "
            "that are to stay free: the buffer grows no more",
            "free some space, or lower buffer.free_disk_mb",
            Code.DISK_LOW,
        )
    ]


def _link(link: LinkHealth, now_ns: int) -> Sequence[Problem]:
    if link.state is LinkState.OFF:
        return []
    if link.state is LinkState.UP:
        return _link_limits(link)
    for_long = _ago(link.since_ns, now_ns)
    if link.state is LinkState.CONNECTING and not link.why:
        return [Problem(f"link: not connected to {link.target} yet, for {for_long}", "", Code.LINK_DOWN)]
    return [Problem(f"link: no way to {link.target} for {for_long} ({link.why or 'no reason given'})",
                    "readings are kept in the buffer meanwhile; check network, host, port and credential",
                    _LINK_CODES.get(link.cause, Code.LINK_DOWN))]  # fmt: skip


def _link_limits(link: LinkHealth) -> Sequence[Problem]:
    """What is not as it should be with a link that works."""
    found = []
    if link.detour:
        found.append(
            Problem(
                f"link: the second way, {link.target}, is used: {link.detour}",
                "nothing is lost; see why the first way does not work: network, host, port, firewall",
                Code.LINK_FALLBACK,
            )
        )
    if link.held:
        found.append(
            Problem(
                f"link: readings are held back: {link.held}",
                "they wait in the buffer; see [uplink.metered]",
                Code.LINK_METERED,
            )
        )
    return found


def _device(device: DeviceHealth, now_ns: int) -> Sequence[Problem]:
    for_long = _ago(device.since_ns, now_ns)
    match device.state:
        case State.DOWN | State.FAULT:
            code = f"device_{device.reason or device.state.value}"
            return [Problem(f"{device.name}: {device.why}, for {for_long}", device.remedy, code, device.name)]
        case State.MISCONFIGURED:
            return [
                Problem(
                    f"{device.name}: stopped {for_long} ago, its configuration cannot work: {device.why}",
                    device.remedy,
                    "device_misconfigured",
                    device.name,
                )
            ]
        case State.STARTING if now_ns - device.since_ns > 30 * 10**9 and not device.period_ms:
            return [
                Problem(
                    f"{device.name}: nothing heard from it for {for_long}",
                    "check its battery, range and address",
                    "device_silent",
                    device.name,
                )
            ]
        case State.STARTING if now_ns - device.since_ns > max(30 * 10**9, 3 * device.period_ms * 10**6):
            return [
                Problem(
                    f"{device.name}: not read once in {for_long}", "see the agent's log", "device_unread",
                    device.name,
                )
            ]  # fmt: skip
        case _:
            return []


def _blocking(device: DeviceHealth, now_ns: int) -> Sequence[Problem]:
    if device.blocked_ns is None or now_ns - device.blocked_ns > _BLOCKED_TOLD_S * 10**9:
        return []
    return [
        Problem(
            f"{device.name}: driver {device.driver!r} held up all devices {device.blocked} "
            f"time{'s' * (device.blocked != 1)}, {duration_in_words(device.blocked_s)} in all, the last "
            f"{_ago(device.blocked_ns, now_ns)} ago at {device.blocked_at}",
            "give it a process of its own (isolate = true), and tell its author that it blocks the event loop",
            Code.DRIVER_BLOCKS,
            device.name,
        )
    ]


def _stalls(status: AgentStatus, now_ns: int) -> Sequence[Problem]:
    if status.stalled_ns is None or now_ns - status.stalled_ns > _BLOCKED_TOLD_S * 10**9:
        return []
    return [
        Problem(
            f"the agent stood still {status.stalls} time{'s' * (status.stalls != 1)}, "
            f"{duration_in_words(status.stalled_s)} in all, the last {_ago(status.stalled_ns, now_ns)} ago at "
            f"{status.stalled_at}",
            "see what else the machine does: headgate doctor",
            Code.AGENT_STALLED,
        )
    ]


def lines(status: AgentStatus, *, running: bool | None, now_ns: int) -> list[str]:
    """The whole status for a person."""
    buffer, link = status.buffer, status.link
    what = {True: "running", False: "not running", None: "cannot tell whether it runs"}[running]
    out = [f"{status.gateway}  headgate {status.version}  {what}"]
    if running:
        out[0] += (
            f" for {_ago(status.started_ns, now_ns)}, process {status.pid}, {status.rss_bytes / _MB:.0f} MB"
        )
    if link.state is LinkState.OFF:
        out.append('link    off (uplink.kind = "none"): readings stay in the buffer')
    else:
        out.append(f"link    {link.state.value} {link.target} for {_ago(link.since_ns, now_ns)}")
    if buffer is not None:
        oldest = "" if buffer.oldest_age_s is None else f", oldest {duration_in_words(buffer.oldest_age_s)}"
        if running and status.drain_eta_s:
            oldest += f", delivered in about {duration_in_words(status.drain_eta_s)}"
        out.append(
            f"buffer  {buffer.buffered_readings:,} readings waiting{oldest}; {buffer.size_bytes / _MB:.1f} of "
            f"{buffer.max_bytes / _MB:.0f} MB; kept {buffer.kept_readings:,}, delivered {buffer.settled_readings:,}, "
            f"gaps {buffer.gapped_readings:,}"
        )
    # A running agent's word is a few seconds old: what it says is told as of then.
    now_ns = status.written_ns if running else now_ns
    width = max((len(d.name) for d in status.devices), default=0)
    for device in status.devices:
        good = "never" if device.last_good_ns is None else f"{_ago(device.last_good_ns, now_ns)} ago"
        took = (
            ""
            if device.p50_ms is None
            else f", read in {device.p50_ms:.1f} ms (p99 {device.p99_ms or 0:.1f})"
        )
        out.append(
            f"device  {device.name:<{width}}  {device.state.value:<8}  last good {good}; {device.readings:,} readings, "
            f"{device.bad_readings:,} bad, {device.overruns:,} overruns{took}"
        )
    return out
