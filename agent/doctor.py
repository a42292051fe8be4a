"""Is this gateway fit to run? One finding for each thing looked at: OK, warning or error, with the remedy. Pure.

Rules: a finding says what was seen, and where it is not OK what to do, as a line that can be typed where there is one;
an error means that readings are lost, late or wrong until it is cured; a warning, that they may be. What is looked at
comes in as plain facts (`agent.doctor_look` gathers them).
"""

from __future__ import annotations

import enum
import stat
from collections.abc import Collection, Mapping, Sequence
from typing import Final

import msgspec

from agent.clock import ClockReading
from agent.health import duration_in_words

ROOMS: Final = ("agent", "drivers", "sync", "cloud", "firmware", "config")
#: The day before which no gateway of ours can live: a clock behind it has lost its battery. 2026-01-01, UTC.
EARLIEST_NS: Final = 1_767_225_600 * 10**9
_SKEW_WARN_S: Final = 5.0
_SKEW_ERROR_S: Final = 300.0  #: the cloud flags a gateway from here on (`limits.skew_alarm_s`)
_EXPIRES_SOON_S: Final = 14 * 86_400.0
_MB: Final = 1024 * 1024
AS_ROOT: Final = "run the doctor as root"
#: Programs that open serial ports unasked: ModemManager probes every new one, brltty takes CH340 and CP210x adapters
#: for braille displays.
PORT_THIEVES: Final = {
    "ModemManager": "systemctl disable --now ModemManager",
    "brltty": "apt remove brltty",
}


class Level(enum.StrEnum):
    """How grave a finding is."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at."""

    check: str  #: "clock", "disk", "port", …
    level: Level
    text: str
    remedy: str = ""


def ok(check: str, text: str) -> Finding:
    """All is well with it."""
    return Finding(check, Level.OK, text)


def warning(check: str, text: str, remedy: str = "") -> Finding:
    """It may do harm."""
    return Finding(check, Level.WARNING, text, remedy)


def error(check: str, text: str, remedy: str = "") -> Finding:
    """It does harm."""
    return Finding(check, Level.ERROR, text, remedy)


class DiskFacts(msgspec.Struct, frozen=True):
    """The state folder and the disk it is on."""

    folder: str
    exists: bool
    parent_exists: bool = True
    read_only: bool = False
    free_bytes: int = 0
    mode: int = 0
    uid: int = 0
    gid: int = 0
    hidden: bool = False  #: from whoever looks, by the permissions of a folder above it


class User(msgspec.Struct, frozen=True):
    """Who runs the agent."""

    name: str
    uid: int
    groups: frozenset[int]
    is_me: bool = True


class PortFacts(msgspec.Struct, frozen=True):
    """A serial port, as the file system shows it."""

    name: str  #: as configured or found
    wanted_by: tuple[str, ...] = ()  #: devices of the configuration
    exists: bool = True
    hidden: bool = False  #: from whoever looks
    is_tty: bool = True
    mode: int = 0
    uid: int = 0
    gid: int = 0
    group: str = ""
    is_console: bool = False
    stable_name: str = ""  #: under /dev/serial/by-id, where there is one and it was not used


class BluetoothFacts(msgspec.Struct, frozen=True):
    """What the kernel and bluetoothd say."""

    adapters: tuple[str, ...] = ()  #: that the kernel has
    blocked: tuple[str, ...] = ()  #: by rfkill: "soft" or "hard"
    bus_error: str = ""
    bluez: bool = False
    powered: tuple[str, ...] = ()  #: adapters that bluetoothd has switched on
    wanted_by: tuple[str, ...] = ()


class Certificate(msgspec.Struct, frozen=True):
    """The door's certificate, after it was verified."""

    subject: str
    issuer: str
    not_after_s: float  #: Unix time


def judge_clock(now: ClockReading, last_seen_ns: int, ntp: str) -> list[Finding]:
    """`last_seen_ns` is a moment that is surely past (the agent's last status); `ntp` the time service that runs."""
    when = _date(now.wall_ns)
    if now.wall_ns < EARLIEST_NS:
        return [error("clock", f"it says {when}, before this program was made",
                      "set it: timedatectl set-time 'YYYY-MM-DD hh:mm:ss'; see to its battery")]  # fmt: skip
    if now.wall_ns < last_seen_ns - 60 * 10**9:
        ago = duration_in_words((last_seen_ns - now.wall_ns) / 1e9)
        return [
            error(
                "clock", f"it says {when}, {ago} before the agent's last word", "set it: timedatectl set-time"
            )
        ]
    if not now.synchronized:
        what = f"{ntp} runs, and has not synchronized it yet" if ntp else "no time service runs"
        remedy = (
            "wait, or see: timedatectl timesync-status"
            if ntp
            else "timedatectl set-ntp true, or install chrony"
        )
        return [
            warning(
                "clock",
                f"it says {when}, and is not synchronized ({what}): times are marked uncertain",
                remedy,
            )
        ]
    return [ok("clock", f"{when}, synchronized within {now.error_ns / 1e6:.0f} ms")]


def judge_skew(skew_s: float) -> Finding:
    """The door's clock minus ours."""
    text = f"the cloud's clock is {abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} this one"
    remedy = "synchronize this clock: timedatectl set-ntp true"
    if abs(skew_s) > _SKEW_ERROR_S:
        return error("clock", text, remedy)
    if abs(skew_s) > _SKEW_WARN_S:
        return warning("clock", text, remedy)
    return ok("clock", "agrees with the cloud's within a few seconds")


def judge_disk(facts: DiskFacts, user: User, *, max_mb: int, free_mb: int, held_bytes: int) -> list[Finding]:
    """`held_bytes` is what the buffer takes already."""
    where = f"state_dir {facts.folder}"
    if facts.hidden:
        return [warning("disk", f"{where} cannot be looked at by this user", AS_ROOT)]
    if not facts.exists:
        remedy = f"install -d -o {user.name} -m 750 {facts.folder}"
        if facts.parent_exists:
            return [warning("disk", f"{where} is not there yet; the agent makes it if it may", remedy)]
        return [error("disk", f"{where} is not there, nor its parent", remedy)]
    if facts.read_only:
        return [error("disk", f"{where} is on a read-only file system: nothing can be kept",
                      "see dmesg for the disk's errors, then: mount -o remount,rw")]  # fmt: skip
    found = []
    if not may(user, facts.mode, facts.uid, facts.gid, 0o3):
        found.append(
            error("disk", f"{user.name} may not write {where}", f"chown -R {user.name} {facts.folder}")
        )
    free, floor, cap = facts.free_bytes, free_mb * _MB, max_mb * _MB
    told = f"{free // _MB:,} MB free for {where}"
    if free < floor:
        found.append(error("disk", f"{told}, less than free_disk_mb = {free_mb}: readings are dropped",
                           "make room, or lower buffer.free_disk_mb"))  # fmt: skip
    elif free - floor < cap - held_bytes:
        fits = max(4, (free - floor + held_bytes) // _MB)
        found.append(warning("disk", f"{told}: the buffer cannot grow to its max_mb = {max_mb}",
                             f"make room, or set buffer.max_mb = {fits}"))  # fmt: skip
    else:
        found.append(ok("disk", told))
    return found


def may(user: User, mode: int, uid: int, gid: int, bits: int) -> bool:
    """Whether this user has all of `bits` (4 read, 2 write, 1 search) on a file, by its owner, group and others."""
    if user.uid == 0:
        return True
    if user.uid == uid:
        return mode >> 6 & bits == bits
    if gid in user.groups:
        return mode >> 3 & bits == bits
    return mode & bits == bits


def judge_port(facts: PortFacts, user: User) -> list[Finding]:
    """One serial port."""
    for_whom = f" (for {', '.join(facts.wanted_by)})" if facts.wanted_by else ""
    grave = error if facts.wanted_by else warning
    if facts.hidden:
        return [warning("port", f"{facts.name}{for_whom} cannot be looked at by this user", AS_ROOT)]
    if not facts.exists:
        return [error("port", f"{facts.name}{for_whom} is not there",
                      "plug it in; headgate scan serial lists what is there")]  # fmt: skip
    if not facts.is_tty:
        return [grave("port", f"{facts.name}{for_whom} is no serial port", "check the name")]
    found = []
    if not may(user, facts.mode, facts.uid, facts.gid, 0o6):
        remedy = f"usermod -aG {facts.group} {user.name}, then restart the agent (or log in again)"
        if not facts.mode & 0o060 or facts.gid == 0:
            remedy = 'give it a group by a udev rule: KERNEL=="ttyUSB*", GROUP="dialout", MODE="0660"'
        found.append(
            grave(
                "port", f"{user.name} may not open {facts.name}{for_whom}; its group is {facts.group}", remedy
            )
        )
    if facts.is_console:
        found.append(grave("port", f"{facts.name}{for_whom} is the kernel's console: its messages go out there",
                           "take console= off the kernel's command line"))  # fmt: skip
    if facts.wanted_by and facts.stable_name:
        found.append(warning("port", f"{facts.name}{for_whom} may have another name after the next start",
                             f"use {facts.stable_name}"))  # fmt: skip
    if not found:
        found.append(ok("port", f"{facts.name}{for_whom}"))
    return found


def judge_thieves(running: Collection[str], *, usb_ports: bool) -> list[Finding]:
    """Programs that take serial ports for their own."""
    if not usb_ports:
        return []
    return [
        warning("port", f"{name} runs: it opens serial ports that it thinks are its own", remedy)
        for name, remedy in PORT_THIEVES.items()
        if name in running
    ]


def judge_bluetooth(facts: BluetoothFacts) -> list[Finding]:
    """Nothing is said where there is no adapter and nobody wants one."""
    if not (facts.adapters or facts.wanted_by):
        return []
    grave = error if facts.wanted_by else warning
    for_whom = f" (for {', '.join(facts.wanted_by)})" if facts.wanted_by else ""
    if "hard" in facts.blocked:
        return [
            grave("bluetooth", f"it is switched off by a switch of this machine{for_whom}", "switch it on")
        ]
    if "soft" in facts.blocked:
        return [grave("bluetooth", f"it is blocked{for_whom}", "rfkill unblock bluetooth")]
    if facts.bus_error:
        return [grave("bluetooth", f"the system bus does not answer{for_whom}: {facts.bus_error}",
                      "systemctl start dbus; or add the agent's user to the group bluetooth")]  # fmt: skip
    if not facts.bluez:
        return [grave("bluetooth", f"bluetoothd does not run{for_whom}",
                      "apt install bluez, then: systemctl enable --now bluetooth")]  # fmt: skip
    if not facts.powered:
        if facts.adapters:
            return [
                grave("bluetooth", f"{', '.join(facts.adapters)} is off{for_whom}", "bluetoothctl power on")
            ]
        return [
            grave("bluetooth", f"there is no adapter{for_whom}", "plug one in; see dmesg for its firmware")
        ]
    return [ok("bluetooth", f"{', '.join(facts.powered)} is on")]


def judge_packages(installed: Mapping[str, Sequence[str]]) -> Finding:
    """`installed`: for each top-level name of ours, the distributions that say they own it."""
    clashes = {
        room: sorted({owner for owner in installed.get(room, ()) if owner != "headgate"}) for room in ROOMS
    }
    taken = {room: owners for room, owners in clashes.items() if owners}
    if not taken:
        return ok("packages", "nobody else claims our names")
    owners = next(iter(taken.values()))
    told = "; ".join(
        f"{owner} installs a package {room!r}" for room, found in taken.items() for owner in found
    )
    return error("packages", f"{told}, which is ours: files were overwritten",
                 f"pip uninstall {owners[0]}, then: pip install --force-reinstall --no-deps headgate")  # fmt: skip


def judge_certificate(certificate: Certificate, now_s: float) -> Finding:
    """A certificate that was verified, so it is valid now."""
    left_s = certificate.not_after_s - now_s
    told = f"{certificate.subject}, by {certificate.issuer}, valid for another {duration_in_words(left_s)}"
    if left_s < _EXPIRES_SOON_S:
        return warning("tls", told, "renew the cloud's certificate: the gateway refuses an expired one")
    return ok("tls", told)


def exit_code(findings: Collection[Finding]) -> int:
    """0: no error (there may be warnings); 1: at least one error."""
    return 1 if any(f.level is Level.ERROR for f in findings) else 0


def readable_by_others(mode: int) -> bool:
    """Whether anybody may read a file of this mode."""
    return bool(stat.S_IMODE(mode) & 0o007)


def _date(wall_ns: int) -> str:
    import datetime

    try:
        return f"{datetime.datetime.fromtimestamp(wall_ns / 1e9, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, ValueError, OSError):
        return f"{wall_ns} ns"
