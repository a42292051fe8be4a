"""Looks at the gateway for `headgate doctor`: facts only, `agent.doctor` judges them.

Rules: nothing is changed, nothing is opened that the agent needs (no port; no MQTT login while the agent is logged in,
which would throw it out); every look has a deadline; what cannot be looked at is said, never left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import grp
import http.client
import os
import pwd
import socket
import ssl
import stat
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, Final

from agent import status as status_file
from agent.clock import SystemClock
from agent.configuration import Checked, check, state_dir_of
from agent.doctor import (
    AS_ROOT,
    BluetoothFacts,
    Certificate,
    DiskFacts,
    Finding,
    Level,
    PortFacts,
    User,
    error,
    judge_bluetooth,
    judge_certificate,
    judge_clock,
    judge_disk,
    judge_packages,
    judge_port,
    judge_skew,
    judge_thieves,
    ok,
    warning,
)
from agent.state import is_locked
from agent.status import AgentStatus, LinkState
from agent.status_now import latest
from config.agent import Agent, Buffer, Gateway, Uplink
from sync.identity import GatewayName, IdentityError, read_secret
from sync.uplink import LinkDown

_BUS_S: Final = 5.0  #: for the system bus to answer
_TIME_SERVICES: Final = ("systemd-timesyncd", "systemd-timesyn", "chronyd", "ntpd", "ntpsec", "ptp4l")
_PLAIN_PORTS: Final = {"https": 8080, "mqtt": 1883}
_TLS_PORTS: Final = {"https": 443, "mqtt": 8883}


def examine(file: Path, state_dir: Path | None, *, with_cloud: bool = True) -> Iterator[Finding]:
    """Every finding, as it is made; the slow ones (the network) come last."""
    running_programs = _programs()
    yield judge_packages(packages_distributions())
    yield from _python()
    checked = check(file)
    yield from _config(file, checked)
    folder = state_dir or state_dir_of(file)
    told = latest(folder)
    running = is_locked(folder)
    yield from _agent(folder, told, running)
    ntp = next((name for name in _TIME_SERVICES if name in running_programs), "")
    yield from judge_clock(SystemClock().read(), told.written_ns if told is not None else 0, ntp)
    user = _agent_user(folder, told if running else None)
    if user is None:
        return
    buffer = Buffer() if checked.config is None else checked.config.buffer
    held = 0 if told is None or told.buffer is None else told.buffer.size_bytes
    yield from judge_disk(
        disk_facts(folder), user, max_mb=buffer.max_mb, free_mb=buffer.free_disk_mb, held_bytes=held
    )
    ports = port_facts(_ports_wanted(checked))
    for port in ports:
        yield from judge_port(port, user)
    if not ports:
        yield ok("port", "no serial port here, and none is wanted")
    usb = any(name in port.name for port in ports for name in ("ttyUSB", "ttyACM", "by-id"))
    yield from judge_thieves(running_programs, usb_ports=usb)
    yield from judge_bluetooth(bluetooth_facts(_bluetooth_wanted(checked.config)))
    if checked.config is not None:
        yield from _door(checked.config, folder, told if running else None, with_cloud=with_cloud)


def _python() -> Iterator[Finding]:
    from drivers.contract import ConfigError
    from drivers.registry import driver_types, load

    try:
        names = sorted(driver_types())
    except ConfigError as err:
        yield error("drivers", str(err), "pip uninstall one of the two")
        return
    bad = 0
    for name in names:
        try:
            load(name)
        except ConfigError as err:
            bad += 1
            yield warning("drivers", str(err), "install what it needs, or uninstall it")
    if not bad:
        yield ok("drivers", ", ".join(names))
    if sys.version_info < (3, 11):  # noqa: UP036 - a hand-made installation
        yield error("python", f"Python {sys.version.split()[0]} is too old", "install Python 3.11 or later")


def _config(file: Path, checked: Checked) -> Iterator[Finding]:
    for wrong in checked.errors:
        hidden = isinstance(wrong.__cause__, PermissionError)
        yield error(
            "config", str(wrong), AS_ROOT if hidden else f"correct it, then: headgate config check {file}"
        )
    if checked.config is None or checked.errors:
        return
    yield ok("config", f"{file}: {len(checked.devices)} devices")
    uplink = checked.config.uplink
    if uplink.kind == "none":
        yield warning("config", 'uplink.kind = "none": readings are kept here and sent nowhere')
        return
    for place, way in uplink.ways.items():
        try:
            read_secret(place, file=way.token_file, env=way.token_env)
        except IdentityError as err:
            yield _of_way(place, error(
                "credential", str(err), "put the gateway's token there, or run the doctor as the agent's user"
            ))  # fmt: skip
        else:
            yield _of_way(place, ok("credential", way.token_file or f"in {way.token_env}"))


def _agent(folder: Path, told: AgentStatus | None, running: bool | None) -> Iterator[Finding]:
    if told is None:
        if running is None or (folder.exists() and not os.access(folder, os.X_OK)):
            yield warning("agent", f"its state in {folder} cannot be read by this user", AS_ROOT)
        else:
            yield warning("agent", "it never ran here", "systemctl enable --now headgate")
        return
    wrong = status_file.problems(told, running=running, now_ns=time.time_ns())
    for problem in wrong:
        yield error("agent", problem.text, problem.remedy)
    if not wrong:
        yield ok("agent", f"headgate {told.version} runs, {len(told.devices)} devices, all well")


# --- this machine ---


def _programs() -> set[str]:
    """The names of all running programs (proc(5), comm: cut at 15 characters)."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            found.add(path.read_text().strip())
    return found


def _agent_user(folder: Path, told: AgentStatus | None) -> User | None:
    """Who runs the agent, or would: the owner of its process, else of its folder, else whoever asks."""
    me = os.geteuid()
    uid = me
    for path in ([Path(f"/proc/{told.pid}")] if told is not None else []) + [folder]:
        try:
            uid = path.stat().st_uid
            break
        except OSError:
            continue
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:  # a number without a name, as in a container
        return User(str(uid), uid, frozenset({os.getegid()} | set(os.getgroups())), uid == me)
    groups = set(os.getgrouplist(entry.pw_name, entry.pw_gid))
    if uid == me:
        groups |= set(os.getgroups())  # what this login has, and a container or the unit may add
    return User(entry.pw_name, uid, frozenset(groups), uid == me)


def disk_facts(folder: Path) -> DiskFacts:
    """The state folder as it is."""
    try:
        status, disk = folder.stat(), os.statvfs(folder)
    except PermissionError:
        return DiskFacts(str(folder), exists=False, hidden=True)
    except OSError:
        return DiskFacts(str(folder), exists=False, parent_exists=folder.parent.is_dir())
    return DiskFacts(
        str(folder),
        exists=True,
        read_only=bool(disk.f_flag & os.ST_RDONLY),
        free_bytes=disk.f_bavail * disk.f_frsize,
        mode=status.st_mode,
        uid=status.st_uid,
        gid=status.st_gid,
    )


def _ports_wanted(checked: Checked) -> dict[str, list[str]]:
    """Port name -> devices: what a device names under /dev, and the line that its driver says it needs."""
    wanted: dict[str, list[str]] = {}
    seen: set[tuple[str, str]] = set()
    for device in () if checked.config is None else checked.config.device:
        for value in device.options.values():
            if isinstance(value, str) and value.startswith("/dev/"):
                wanted.setdefault(value, []).append(device.name)
                seen.add((os.path.realpath(value), device.name))
    for made in checked.devices:
        claim = made.driver.line()
        if claim is not None and claim.key.startswith("/") and (claim.key, made.plan.name) not in seen:
            wanted.setdefault(claim.key, []).append(made.plan.name)
    return wanted


def port_facts(wanted: dict[str, list[str]]) -> list[PortFacts]:
    """The ports that devices want, then those that are here besides."""
    from serial.tools import list_ports

    by_id = {os.path.realpath(path): str(path) for path in sorted(Path("/dev/serial/by-id").glob("*"))}
    names = dict.fromkeys(wanted)
    taken = {os.path.realpath(name) for name in wanted}
    for port in sorted(list_ports.comports(include_links=False), key=lambda found: found.device):
        # Without a hardware id it is one of the kernel's placeholders (ttyS0 to ttyS3), wired to nothing.
        if port.device not in taken and port.hwid != "n/a":
            names[by_id.get(os.path.realpath(port.device), port.device)] = None
    return [_port(name, tuple(wanted.get(name, ())), by_id) for name in names]


def _port(name: str, wanted_by: tuple[str, ...], by_id: dict[str, str]) -> PortFacts:
    real = os.path.realpath(name)
    try:
        status = Path(real).stat()
    except PermissionError:
        return PortFacts(name, wanted_by, hidden=True)
    except OSError:
        return PortFacts(name, wanted_by, exists=False)
    try:
        group = grp.getgrgid(status.st_gid).gr_name
    except KeyError:
        group = str(status.st_gid)
    consoles = ""
    with contextlib.suppress(OSError):
        consoles = Path("/proc/cmdline").read_text()
    return PortFacts(
        name,
        wanted_by,
        is_tty=stat.S_ISCHR(status.st_mode),
        mode=status.st_mode,
        uid=status.st_uid,
        gid=status.st_gid,
        group=group,
        is_console=any(word.split(",")[0] == f"console={Path(real).name}" for word in consoles.split()),
        stable_name=by_id.get(real, "") if name == real else "",
    )


def _bluetooth_wanted(config: Agent | None) -> tuple[str, ...]:
    return (
        () if config is None else tuple(d.name for d in config.device if (d.driver or "").startswith("ble"))
    )


def bluetooth_facts(wanted_by: tuple[str, ...]) -> BluetoothFacts:
    """What the kernel shows, and where an adapter is wanted or here, what bluetoothd says."""
    adapters = tuple(
        sorted(path.name for path in Path("/sys/class/bluetooth").glob("hci*") if ":" not in path.name)
    )
    blocked = []
    for switch in Path("/sys/class/rfkill").glob("*"):
        with contextlib.suppress(OSError):
            if (switch / "type").read_text().strip() == "bluetooth":
                blocked += ["hard"] if (switch / "hard").read_text().strip() == "1" else []
                blocked += ["soft"] if (switch / "soft").read_text().strip() == "1" else []
    if not (adapters or wanted_by):
        return BluetoothFacts()
    try:
        bluez, powered = asyncio.run(asyncio.wait_for(_bluez(), _BUS_S))
    except Exception as err:  # noqa: BLE001 - whatever a D-Bus library raises for a bus that is not there
        return BluetoothFacts(adapters, tuple(blocked), str(err) or type(err).__name__, wanted_by=wanted_by)
    return BluetoothFacts(adapters, tuple(blocked), "", bluez, powered, wanted_by)


async def _bluez() -> tuple[bool, tuple[str, ...]]:
    """Whether bluetoothd is on the bus, and its adapters that are on."""
    from dbus_fast import BusType, Message
    from dbus_fast.aio import MessageBus

    bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
    try:
        reply = await bus.call(
            Message(
                destination="org.bluez",
                path="/",
                interface="org.freedesktop.DBus.ObjectManager",
                member="GetManagedObjects",
            )
        )
    finally:
        bus.disconnect()
    if reply.error_name:
        return False, ()
    powered = []
    for path, interfaces in reply.body[0].items():
        adapter = interfaces.get("org.bluez.Adapter1")
        if adapter is not None and adapter["Powered"].value:
            powered.append(str(path).rsplit("/", 1)[1])
    return True, tuple(sorted(powered))


# --- the way to the cloud, step by step ---


def _door(config: Agent, folder: Path, running: AgentStatus | None, *, with_cloud: bool) -> Iterator[Finding]:
    ways = config.uplink.ways
    if ways and not with_cloud:
        yield ok("cloud", "not looked at (--offline)")
        return
    for place, way in ways.items():
        for found in _way(place, way, config.gateway, folder, running):
            yield _of_way(place, found)


def _of_way(place: str, found: Finding) -> Finding:
    """The second way says that it is one; nothing is lost by its faults as long as the first one is open."""
    if place == "uplink":
        return found
    level = Level.WARNING if found.level is Level.ERROR else found.level
    return Finding(found.check, level, f"fallback: {found.text}", found.remedy)


def _way(
    place: str, uplink: Uplink, gateway: Gateway, folder: Path, running: AgentStatus | None
) -> Iterator[Finding]:
    port = uplink.port or (_TLS_PORTS if uplink.tls else _PLAIN_PORTS)[uplink.kind]
    where = f"{uplink.host}:{port}"
    try:
        found = socket.getaddrinfo(uplink.host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as err:
        yield error("dns", f"{uplink.host}: {getattr(err, 'strerror', None) or err}",
                    f"check {place}.host, and the name servers: resolvectl status, cat /etc/resolv.conf")  # fmt: skip
        return
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    yield ok("dns", f"{uplink.host} is {', '.join(addresses)}")
    sock = None
    try:
        sock = socket.create_connection((uplink.host, port), timeout=uplink.connect_timeout_s)
    except OSError as err:
        yield error("tcp", f"{where}: {err.strerror or err}",
                    f"check {place}.port, the firewalls on the way, and that the cloud listens")  # fmt: skip
        return
    yield ok("tcp", f"{where} answers")
    with contextlib.closing(sock):
        if uplink.tls:
            try:
                with _hanging_up(sock, uplink.connect_timeout_s):
                    sock = _secured(sock, uplink)
            except (ssl.SSLError, OSError) as err:
                yield error("tls", _tls_words(err, place), _tls_remedy(err, place, uplink))
                return
            yield judge_certificate(_certificate(sock), time.time())
        if uplink.kind == "https":
            yield _skew(sock, uplink, port)
    yield from _login(place, uplink, gateway, folder, running)


def _secured(sock: socket.socket, uplink: Uplink) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=uplink.ca_file)
    return context.wrap_socket(sock, server_hostname=uplink.host)


def _tls_words(err: OSError, place: str) -> str:
    if isinstance(err, FileNotFoundError):
        return f"{place}.ca_file: {err.strerror}"
    return str(getattr(err, "verify_message", "") or getattr(err, "reason", "") or err)


def _tls_remedy(err: OSError, place: str, uplink: Uplink) -> str:
    code = getattr(err, "verify_code", 0)
    if code in (9, 10):  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED (openssl/x509_vfy.h)
        return "check this clock first; if it is right, the cloud's certificate must be renewed"
    if code in (18, 19, 20, 21):  # self-signed, or an issuer that is not known
        return f"{place}.ca_file must hold the CA that signed it (now: {uplink.ca_file or 'the CAs of this system'})"
    if code in (62, 64):  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
        return f"{place}.host must be the name that stands in the certificate"
    return f"check that this port speaks TLS, and {place}.ca_file"


def _certificate(sock: ssl.SSLSocket | socket.socket) -> Certificate:
    held: dict[str, Any] = {}  # the shape is ssl's: text, and tuples of tuples of pairs
    if isinstance(sock, ssl.SSLSocket):
        held = dict(sock.getpeercert() or {})

    def name(field: str) -> str:
        names: tuple[tuple[tuple[str, str], ...], ...] = held.get(field, ())
        parts = {key: value for entry in names for key, value in entry}
        return str(parts.get("commonName") or parts.get("organizationName") or "unnamed")

    return Certificate(
        name("subject"), name("issuer"), ssl.cert_time_to_seconds(str(held.get("notAfter", "")))
    )


def _skew(sock: socket.socket, uplink: Uplink, port: int) -> Finding:
    """The door's clock, from the `Date` of its answer (RFC 9110, 6.6.1: whole seconds)."""
    asked = http.client.HTTPConnection(uplink.host, port)
    asked.sock = sock
    try:
        with _hanging_up(sock, uplink.connect_timeout_s):
            before_s = time.time()
            asked.request("GET", "/healthz")
            said = asked.getresponse().getheader("Date", "")
            after_s = time.time()
    except (OSError, http.client.HTTPException) as err:
        return error(
            "door",
            f"{uplink.host} takes the connection and does not answer: {str(err) or type(err).__name__}",
            "is this the cloud's HTTP door, and is it well?",
        )
    try:
        there_s = email.utils.parsedate_to_datetime(said).timestamp()
    except (ValueError, OverflowError):
        return warning(
            "clock", "the cloud does not say what time it has", "see that nothing stands in between"
        )
    return judge_skew(there_s + 0.5 - (before_s + after_s) / 2)


@contextlib.contextmanager
def _hanging_up(sock: socket.socket, after_s: float) -> Iterator[None]:
    """Ends the connection where what is done on it takes longer: a socket's own timeout starts anew with each byte.
    Raises `TimeoutError` then."""
    hung_up = threading.Event()

    def hang_up() -> None:
        hung_up.set()
        with contextlib.suppress(OSError):  # it has ended by itself
            twin.shutdown(socket.SHUT_RDWR)

    with socket.socket(fileno=os.dup(sock.fileno())) as twin:  # whatever TLS makes of `sock` meanwhile
        timer = threading.Timer(after_s, hang_up)
        timer.start()
        try:
            yield
        except (OSError, http.client.HTTPException) as err:
            if hung_up.is_set() or isinstance(err, TimeoutError):
                raise TimeoutError(f"no answer within {after_s:g} s") from err
            raise
        finally:
            timer.cancel()
            timer.join()


def _login(
    place: str, uplink: Uplink, gateway: Gateway, folder: Path, running: AgentStatus | None
) -> Iterator[Finding]:
    from agent.forwarder import way_of

    if running is not None and running.link.state is LinkState.UP:
        if bool(running.link.detour) == (place != "uplink"):
            acked = running.link.acked_batches
            yield ok("door", f"the agent is logged in; {acked:,} batches acknowledged since it started")
            return
        if uplink.kind == "mqtt":
            yield ok(
                "door", f"{uplink.host} is not asked: the agent uses its other way, and tries this one itself"
            )
            return
    elif running is not None and uplink.kind == "mqtt":
        yield warning("door", f"the agent is not logged in: {running.link.why or 'it has not said why'}",
                      "stop it, then run the doctor again: a second login would throw the agent out")  # fmt: skip
        return
    name = GatewayName(gateway.tenant, gateway.name)

    async def knock() -> None:
        way = way_of(uplink, name, place)
        try:
            await way.open()
            told = running or status_file.read(folder) or AgentStatus(gateway=str(name))
            await way.report(status_file.encode(told))
        finally:
            await way.close()

    try:
        asyncio.run(asyncio.wait_for(knock(), 3 * uplink.connect_timeout_s))
    except IdentityError as err:
        yield error("door", str(err), "see credential above")
    except (LinkDown, TimeoutError) as err:
        yield error("door", str(err) or "no answer", "compare tenant, name and token with what the cloud has")
    else:
        yield ok("door", f"takes {name} in")


def findings(file: Path, state_dir: Path | None, *, with_cloud: bool) -> Sequence[Finding]:
    """All of them, for a report."""
    return list(examine(file, state_dir, with_cloud=with_cloud))
