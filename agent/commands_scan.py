"""`headgate scan`: what is there, on Modbus lines, serial ports and Bluetooth.

In what order a line is searched is decided in `drivers.modbus_scan`; who answers is asked here, through the agent
where it holds the line, and shown with the next command to type.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Final, Literal, TypeAlias, cast

import click
import msgspec

from agent import technician
from agent.field import Field, FieldError, LineInUse, LineTaken
from agent.found import FoundDevice, remember
from agent.technician import EXITS, Cannot, Progress, Trouble, Way
from config.agent import Device
from drivers import modbus_scan as plan
from drivers.contract import ConfigError, DeviceUnreachable, DriverError, Found, Reason
from drivers.modbus_address import Address, HostPort, SerialPort
from drivers.modbus_line import Failure, Reply, Request
from drivers.modbus_plan import Table
from drivers.modbus_scan import Heard, Setting

_TURNAROUND_S: Final = 0.2  #: how long a device may take to begin its answer; nearly all need less than 0.1
_FAST_S: Final = 0.08
_SLOW_S: Final = 0.6
_AT_ONCE: Final = 64  #: hosts asked at the same time
_HOST_CONNECT_S: Final = 1.0
_HOST_REPLY_S: Final = 1.0
_HOST_UNITS: Final = (
    1,
    255,
    0,
)  #: a device of its own, the same as the standard has it (TCP/IP 1.0b, 4.4.2), and either
_GATEWAY: Final = (0x0A, 0x0B)
_GATEWAY_REPLY_S: Final = 1.5
_MOST_HOSTS: Final = 4096
_PROPOSED: Final = 3  #: profiles named for one device


@click.group(epilog=EXITS)
def scan() -> None:
    """Find devices: on Modbus lines, serial ports, Bluetooth; with the command that adds each.

    All of them work while the agent runs: a line that it holds is asked through it, in the same queue as its polls.
    """


@scan.command(epilog=EXITS)
@technician.field_options
@click.option(
    "--port", "ports", multiple=True, help="Serial port; several may be given. Unset: all there are."
)
@click.option(
    "--host", "hosts", multiple=True, help="A host, or host:port (502 unless said); several may be given."
)
@click.option("--network", "networks", multiple=True, help="All hosts of a network: 192.0.2.0/24")
@click.option("--tcp-port", type=click.IntRange(1, 65535), default=502, show_default=True)
@click.option("--units", help="Unit addresses: 1-247 on a serial port unless said (1-32 with --fast).")
@click.option("--baud", "bauds", multiple=True, type=click.IntRange(50, 4_000_000), help="Only this speed.")
@click.option("--parity", "parities", multiple=True, type=click.Choice(["none", "even", "odd"]))
@click.option("--stop-bits", type=click.IntRange(1, 2))
@click.option(
    "--framing", type=click.Choice(["rtu", "ascii", "tcp", "udp", "rtu_over_tcp", "ascii_over_tcp"]),
    help="Unset: rtu on a port (ascii too with --full); tcp to a host, and the others where only one host is named.",
)  # fmt: skip
@click.option(
    "--fast", is_flag=True, help="Units 1-32, and little patience: devices that answer within 80 ms."
)
@click.option("--slow", is_flag=True, help="Much patience: devices that take up to 600 ms.")
@click.option("--full", is_flag=True, help="Rare settings too, and go on at all of them after a find.")
@click.option("--first", is_flag=True, help="Stop at the first device.")
def modbus(
    way: Way, ports: tuple[str, ...], hosts: tuple[str, ...], networks: tuple[str, ...], tcp_port: int,
    units: str | None, bauds: tuple[int, ...], parities: tuple[str, ...], stop_bits: int | None,
    framing: str | None, *, fast: bool, slow: bool, full: bool, first: bool, as_json: bool,
) -> None:  # fmt: skip
    """Find Modbus devices on serial ports and networks, tell what they are, and propose a profile.

    \b
    headgate scan modbus --port /dev/ttyUSB0
    headgate scan modbus --network 192.0.2.0/24

    A serial port is searched at the six commonest settings, low addresses first; once a device answered, only at its
    setting. An estimate is shown first. Ctrl-C ends the search and shows what was found (exit 130).
    """
    wanted = Wanted(
        ports=ports, hosts=hosts, networks=networks, tcp_port=tcp_port, units=units, bauds=bauds,
        parities=tuple(technician.parity_letter(word) for word in parities), stop_bits=stop_bits,
        framing=framing, turnaround_s=_FAST_S if fast else _SLOW_S if slow else _TURNAROUND_S, low_units=fast,
        full=full, first=first,
    )  # fmt: skip
    technician.run(search_all(way, as_json=as_json, searches=[lambda search: search_modbus(search, wanted)]))


@scan.command(epilog=EXITS)
@technician.field_options
@click.option("--port", "ports", multiple=True, help="Only this port; several may be given.")
@click.option(
    "--seconds", type=click.FloatRange(0.2, 600), default=3.0, show_default=True, help="To listen, a port."
)
@click.option(
    "--ask", is_flag=True, help="Also ask in the protocols that need it (IEC 62056-21, SDI-12, NMEA)."
)
def serial(way: Way, ports: tuple[str, ...], seconds: float, *, ask: bool, as_json: bool) -> None:
    """List the serial ports by the name that stays, who holds them, and what speaks there.

    Listens without sending anything, at the likely speeds; with --ask also asks gently.
    """
    technician.run(
        search_all(way, as_json=as_json, searches=[lambda search: _serial(search, ports, seconds, ask=ask)])
    )


@scan.command(epilog=EXITS)
@technician.field_options
@click.option("--seconds", type=click.FloatRange(1, 600), default=20.0, show_default=True, help="To listen.")
def ble(way: Way, seconds: float, *, as_json: bool) -> None:
    """Bluetooth sensors in reach, with what they say now."""
    technician.run(search_all(way, as_json=as_json, searches=[lambda search: _ble(search, seconds)]))


@scan.command("all", epilog=EXITS)
@technician.field_options
@click.option("--network", "networks", multiple=True, help="Also the hosts of a network: 192.0.2.0/24")
@click.option("--seconds", type=click.FloatRange(1, 600), default=10.0, show_default=True, help="To listen.")
def everything(way: Way, networks: tuple[str, ...], seconds: float, *, as_json: bool) -> None:
    """Serial ports, Modbus on each of them (and on a network, if named), and Bluetooth."""
    wanted = Wanted(networks=networks, turnaround_s=_TURNAROUND_S, tcp_port=502, low_units=True)
    searches: list[SearchFor] = [
        lambda search: _serial(search, (), min(seconds, 3.0), ask=False),
        lambda search: search_modbus(search, wanted),
        lambda search: _ble(search, seconds),
    ]
    technician.run(search_all(way, as_json=as_json, searches=searches))


# ---------------------------------------------------------------------------------------- the frame


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What of Modbus is searched."""

    ports: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()
    tcp_port: int
    units: str | None = None
    bauds: tuple[int, ...] = ()
    parities: tuple[str, ...] = ()
    stop_bits: int | None = None
    framing: str | None = None
    turnaround_s: float
    low_units: bool = False
    full: bool = False
    first: bool = False


class Search:
    """A scan under way: where it asks, what it has found, what could not be searched and why."""

    def __init__(self, field: Field, way: Way, *, silent: bool) -> None:
        self.field = field
        self.way = way
        self.silent = silent
        self.found: list[FoundDevice] = []
        self.notes: list[str] = []
        self.estimate_s = 0.0
        self.asked = 0
        self.failed = 0  #: places that could not be searched
        self.progress: Progress | None = None

    def note(self, text: str) -> None:
        """Say it beside the result, once."""
        if text not in self.notes:
            self.notes.append(text)
            self.tell(text)

    def tell(self, text: str) -> None:
        """On stderr, for a person only."""
        if not self.silent:
            if self.progress is not None:
                self.progress.clear()
            technician.note(text)

    def begin(self, total_s: float) -> Progress:
        self.progress = Progress(total_s, silent=self.silent)
        return self.progress

    def take(self, device: FoundDevice) -> None:
        self.found.append(device)
        self.tell(technician.cut(f"found: {device.where}: {device.what}"))


SearchFor = Callable[[Search], Coroutine[Any, Any, None]]


async def search_all(way: Way, *, as_json: bool, searches: Sequence[SearchFor]) -> int:
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    stopped = False
    async with way.field() as field:
        search = Search(field, way, silent=as_json)
        for one in searches:
            try:
                await one(search)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None:
                    raise
                task.uncancel()
                stopped = True
            except (Trouble, DriverError, FieldError) as err:
                if len(searches) == 1:
                    raise
                search.failed += 1
                search.note(str(err))
            finally:
                if search.progress is not None:
                    search.progress.clear()
            if stopped:
                break
    took_s = loop.time() - began_s
    try:
        remember(search.found)
    except OSError as err:
        search.note(f"--found will not work: {err}")
    if as_json:
        technician.say(technician.as_json(_told(search, took_s, stopped=stopped)))
    else:
        _show(search, took_s, stopped=stopped)
    return technician.STOPPED if stopped else technician.OK if search.found else technician.TROUBLE


def _told(search: Search, took_s: float, *, stopped: bool) -> dict[str, object]:
    return {
        "found": [
            {
                "number": number, "what": one.what, "where": one.where, "unit": one.unit_, "driver": one.found.driver,
                "options": one.found.options, "profile": one.found.profile, "points": len(one.found.points),
                "readings": one.found.readings, "identification": one.identification,
                "likelihood": one.found.likelihood, "add": add_line(one),
            }
            for number, one in enumerate(search.found, 1)
        ],
        "notes": search.notes, "stopped": stopped, "asked": search.asked,
        "estimate_s": round(search.estimate_s, 1), "took_s": round(took_s, 2),
    }  # fmt: skip


def _show(search: Search, took_s: float, *, stopped: bool) -> None:
    devices = search.found
    word = "stopped" if stopped else "done"
    count = f"{len(devices)} found" if devices else "nothing found"
    technician.say(f"{word} after {technician.duration(took_s)}: {count}")
    for number, one in enumerate(devices, 1):
        technician.say()
        technician.say(technician.cut(f"{number}. {one.what}"))
        for line in technician.wrapped(one.where, lead="   "):
            technician.say(line)
        told = ", ".join(f"{key} {value}" for key, value in one.identification.items())
        for line in technician.wrapped(told, lead="   ") if told else ():
            technician.say(line)
        rows = [["  ", name, value] for name, value in list(one.found.readings.items())[:8]]
        for line in technician.columns(rows, lead=""):
            technician.say(line)
        if len(one.found.readings) > len(rows):
            technician.say(f"    … and {len(one.found.readings) - len(rows)} more (--json has all)")
        for line in _next_steps(number, one):
            technician.say("   " + line)


def add_line(one: FoundDevice) -> str:
    """The whole command, or nothing where more has to be known first."""
    found = one.found
    if one.address_ is not None:
        where = technician.words_of(one.address_, one.unit_)
        return (
            technician.command_line("headgate", "add", "NAME", "--profile", found.profile, *where)
            if found.profile
            else ""
        )
    if not found.points and not found.profile:
        return ""
    words = ["--profile", found.profile] if found.profile else ["--driver", found.driver]
    for key, value in found.options.items():
        words += ["--option", f"{key}={str(value).lower() if isinstance(value, bool) else value}"]
    for point in () if found.profile else found.points:
        words += ["--point", technician.point_words(point)]
    return technician.command_line("headgate", "add", "NAME", *words)


def _next_steps(number: int, one: FoundDevice) -> list[str]:
    if one.found.profile or one.found.points:
        steps = [f"headgate add NAME --found {number}"]
        return [*steps, *([line] if (line := add_line(one)) and len(line) <= technician.WIDTH - 3 else [])]
    if one.address_ is not None:
        return [f"headgate probe --found {number} --expect 230.5    (a value off its display)"]
    if one.found.driver == "modbus":
        return [f"headgate scan modbus --port {one.found.address}"]
    if one.found.driver and one.found.options:
        return [f"headgate add NAME --found {number} --point ...    ({one.found.driver}.toml says what)"]
    return []


# ------------------------------------------------------------------------------------------- modbus


async def search_modbus(search: Search, wanted: Wanted) -> None:
    hosts = _hosts(wanted)
    if wanted.framing is not None:
        of_port = wanted.framing in ("rtu", "ascii")
        if hosts if of_port else wanted.ports or not hosts:
            raise Cannot(
                f"--framing {wanted.framing} is spoken on a serial port, not by a host" if of_port else
                f"--framing {wanted.framing} needs --host or --network, and no --port"
            )  # fmt: skip
    if not hosts and not wanted.ports:
        ports = await _all_ports(search)
        if not ports:
            raise Trouble(
                "there is no serial port here; name one with --port, or --host, or --network 192.0.2.0/24"
            )
    else:
        ports = list(wanted.ports)
    if ports:
        await _scan_ports(search, wanted, ports)
    if hosts and not (wanted.first and search.found):
        await _scan_hosts(search, wanted, hosts)


_HostFraming: TypeAlias = Literal["tcp", "udp", "rtu_over_tcp", "ascii_over_tcp"]


def _hosts(wanted: Wanted) -> list[HostPort]:
    """Raises `Cannot`."""
    found: dict[HostPort, None] = {}
    framing = cast(_HostFraming, "tcp" if wanted.framing in (None, "rtu", "ascii") else wanted.framing)
    for host in wanted.hosts:
        at = technician.host_port(host)
        port = at.port if at.port != technician.MODBUS_PORT else wanted.tcp_port
        found[HostPort(at.host, port, framing)] = None
    for network in wanted.networks:
        try:
            hosts = ipaddress.ip_network(network, strict=False)
        except ValueError as err:
            raise Cannot(f"--network: {err}; write it as 192.0.2.0/24") from err
        if hosts.num_addresses > _MOST_HOSTS:
            raise Cannot(
                f"--network {network} has {hosts.num_addresses} addresses; at most {_MOST_HOSTS} at once"
            )
        found.update((HostPort(str(host), wanted.tcp_port, framing), None) for host in hosts.hosts())
    return list(found)


async def _all_ports(search: Search) -> list[str]:
    from drivers.serial_port import present_ports

    present = await asyncio.to_thread(present_ports)
    # A bare 8250 port is listed whether or not anything is wired to it.
    return [port.stable for port in present if port.usb] or [port.stable for port in present]


class _Hit(msgspec.Struct, frozen=True):
    """Somebody answered."""

    address: Address
    unit: int
    reply: Reply


async def _scan_ports(search: Search, wanted: Wanted, ports: Sequence[str]) -> None:
    held = {one.claim.key: one for one in await search.field.lines()}
    units = _units(wanted.units, low=wanted.low_units)
    chosen = plan.settings_of(
        wanted.bauds, wanted.parities, wanted.stop_bits, full=wanted.full, framing=wanted.framing
    )
    sweeps: list[tuple[str, plan.Sweep]] = []
    for port in ports:
        settings = _settings_of_held(search, port, chosen, held)
        whole = wanted.full or len(settings) == 1
        sweeps.append((port, plan.Sweep(settings, units, turnaround_s=wanted.turnaround_s, whole=whole)))
    search.estimate_s += sum(sweep.left_s() for _, sweep in sweeps)
    for port, sweep in sweeps:
        search.tell(
            f"{port}: {sweep.left} requests, at most {technician.duration(sweep.left_s())}; likely settings and low "
            "addresses first. Ctrl-C ends it and shows what was found."
        )
    for i, (port, sweep) in enumerate(sweeps):
        rest_s = sum(later.left_s() for _, later in sweeps[i + 1 :])
        hits: list[_Hit] = []
        try:
            await _sweep_port(search, port, sweep, hits, rest_s, first=wanted.first)
        except (DeviceUnreachable, ConfigError, LineTaken) as err:
            search.failed += 1
            if len(sweeps) == 1 and not hits:
                raise
            search.note(str(err))
        finally:
            if search.progress is not None:
                search.progress.clear()
            # Also when it was stopped: what was found is told with what it is. Ctrl-C once more skips that.
            await _identify_all(search, hits)
        if not hits and sweep.noisy:
            at = ", ".join(str(setting) for setting in sweep.noisy)
            search.note(
                f"{port}: something speaks there at {at}, and nothing of it was an answer: another master, or other "
                "settings (--full tries the rare ones)"
            )
        if wanted.first and search.found:
            return


def _units(text: str | None, *, low: bool) -> list[int]:
    if text is None:
        return list(range(1, (plan.LOW_UNITS if low else plan.LAST_UNIT) + 1))
    try:
        return plan.units_of(text)
    except ValueError as err:
        raise Cannot(f"--units: {err}") from err


def _settings_of_held(
    search: Search, port: str, chosen: list[Setting], held: dict[str, LineInUse]
) -> list[Setting]:
    """A line that the agent holds is searched at its own setting only."""
    line = held.get(SerialPort(port, 9600, "N", 1).key)
    if line is None:
        return chosen
    words = line.claim.settings.split()
    devices = ", ".join(line.devices)
    try:
        framing = cast(Literal["rtu", "ascii"], {"rtu": "rtu", "ascii": "ascii"}[words[3]])
        setting = Setting(int(words[0]), words[2][1], int(words[2][2]), int(words[2][0]), framing)
    except (ValueError, LookupError):
        raise Cannot(
            f"{port} is in use by {devices} ({line.claim.settings}); it is not a Modbus line"
        ) from None
    search.note(f"{port} is in use by {devices}: searched through the agent, at {setting} only")
    return [setting]


async def _sweep_port(
    search: Search, port: str, sweep: plan.Sweep, hits: list[_Hit], rest_s: float, *, first: bool
) -> None:
    """Ask one after the other. Raises what says that the port itself cannot be used."""
    progress = search.begin(sweep.left_s())
    opened = False
    while (ask := sweep.next()) is not None:
        progress.at(sweep.left_s() + rest_s, f"{ask.setting}, unit {ask.unit}, {len(hits)} found")
        at = ask.setting
        address = SerialPort(port, at.baud, at.parity, at.stop_bits, at.data_bits, at.framing)
        try:
            reply = await _ask_for_anything(search, address, ask.unit, ask.timeout_s)
        except ConfigError as err:
            # A port that does not know this setting (a pty has no parity): the others are tried.
            search.note(f"{ask.setting} is left out: {err}")
            sweep.drop(ask.setting)
            if not opened and sweep.left == 0:
                raise
            continue
        except LineTaken as err:
            search.note(str(err))
            sweep.drop(ask.setting)
            continue
        opened = True
        heard = _heard(reply)
        sweep.told(ask, heard)
        if heard is Heard.ANSWER:
            hits.append(_Hit(address, ask.unit, reply))
            rest = ""
            if len(hits) == 1 and sweep.left and not first:
                until = technician.duration(sweep.left_s())
                rest = f"; {sweep.left} more addresses at this setting, at most {until}"
                rest = rest.replace(" at this setting", "") if sweep.whole else rest
            search.tell(f"{ask.setting}, unit {ask.unit} answers{rest}")
            if first:
                return


async def _ask_for_anything(search: Search, address: Address, unit: int, timeout_s: float) -> Reply:
    """Read holding register 0: every Modbus device has an answer to that, if only an exception."""
    request = technician.reading(address, unit, Table.HOLDING, 0, 1, timeout_s=timeout_s)
    # The reply names its unit, and the next request is to another: no need to wait for a late one.
    request = msgspec.structs.replace(request, latest_s=max(0.001, timeout_s - _ADAPTER_S))
    search.asked += 1
    return (await search.field.ask(address, [request], connect_timeout_s=_HOST_CONNECT_S)).replies[0]


_ADAPTER_S: Final = 0.02  #: the line waits so much longer than told, for adapters that hand bytes on late


def _heard(reply: Reply) -> Heard:
    if technician.answered(reply):
        return Heard.ANSWER
    noise = isinstance(reply, Failure) and reply.reason in (Reason.CRC, Reason.FRAMING)
    return Heard.NOISE if noise else Heard.SILENCE


# --------------------------------------------------------------------------------------------- hosts


async def _scan_hosts(search: Search, wanted: Wanted, hosts: Sequence[HostPort]) -> None:
    thorough = len(hosts) == 1 and not wanted.networks and wanted.framing is None
    rounds = -(-len(hosts) // _AT_ONCE)
    # The slowest host takes the connection and is silent to each unit; most refuse at once.
    worst_s = rounds * (_HOST_CONNECT_S + len(_HOST_UNITS) * _HOST_REPLY_S)
    if thorough:
        worst_s += (2 + len(_HOST_UNITS)) * _HOST_REPLY_S
    search.estimate_s += worst_s
    search.tell(
        f"{len(hosts)} host{'s' * (len(hosts) != 1)}: at most {technician.duration(worst_s)}, and longer where one of "
        "them is a gateway with many units."
    )
    progress = search.begin(worst_s)
    hits: list[_Hit] = []
    silent: list[HostPort] = []
    done = 0
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one(host: HostPort) -> None:
        nonlocal done
        async with gate:
            hit = await _ask_host(search, host, silent, thorough=thorough)
        done += 1
        if hit is not None:
            hits.append(hit)
        progress.at(worst_s * (len(hosts) - done) / len(hosts), f"{done} of {len(hosts)}, {len(hits)} found")

    try:
        await _all_of([one(host) for host in hosts])
        progress.clear()
        await _units_behind(search, wanted, hits, silent)
    finally:
        progress.clear()
        await _identify_all(search, sorted(hits, key=_by_host))
    if silent and not hits:
        some = ", ".join(str(host) for host in silent[:3])
        search.note(f"{len(silent)} took the connection and did not answer ({some}); try --units")


def _by_host(hit: _Hit) -> tuple[bytes, str, int]:
    at = cast(HostPort, hit.address)
    try:
        return ipaddress.ip_address(at.host).packed, "", hit.unit
    except ValueError:
        return b"", at.host, hit.unit


async def _all_of(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    tasks = [asyncio.create_task(one) for one in work]
    try:
        for task in tasks:
            await task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


_OTHER_FRAMINGS: Final[tuple[_HostFraming, ...]] = ("rtu_over_tcp", "ascii_over_tcp", "udp")


async def _ask_host(search: Search, host: HostPort, silent: list[HostPort], *, thorough: bool) -> _Hit | None:
    """Who answers there. The only host that is asked, where it is silent as Modbus TCP, is asked as a serial line
    behind a transparent gateway, and over UDP."""
    took: HostPort | None = None  #: it was silent there, and there was somebody
    why = ""
    framings = [host]
    if thorough and host.framing == "tcp":
        framings += [HostPort(host.host, host.port, framing) for framing in _OTHER_FRAMINGS]
    for at in framings:
        if why and at.framing != "udp":
            continue  # TCP is refused, whatever is sent over it
        for unit in _HOST_UNITS if at.has_transactions else (1,):
            try:
                reply = await _ask_for_anything(search, at, unit, _HOST_REPLY_S)
            except LineTaken as err:
                search.note(str(err))
                return None
            except (DeviceUnreachable, ConfigError) as err:
                why = why or str(err)
                break
            if technician.answered(reply):
                return _Hit(at, unit, reply)
            if at.framing != "udp":
                took = took or at
            if isinstance(reply, Failure) and reply.reason is Reason.DISCONNECTED:
                break
    if took is not None:
        silent.append(took)
    elif why and thorough:
        search.note(why)
    return None


async def _units_behind(search: Search, wanted: Wanted, hits: list[_Hit], silent: Sequence[HostPort]) -> None:
    """A gateway has many units: asked one after the other, on all gateways at once."""
    asked: list[tuple[Address, int]] = [(hit.address, hit.unit) for hit in hits if _is_gateway(hit.reply)]
    if wanted.units is not None:
        asked = [(hit.address, hit.unit) for hit in hits] + [(host, -1) for host in silent]
    units = plan.units_of(wanted.units, last=255) if wanted.units else list(range(1, plan.LAST_UNIT + 1))
    if not asked:
        return
    progress = search.begin(0)
    began_s = asyncio.get_running_loop().time()
    total, done = len(asked) * len(units), 0
    hits[:] = [
        hit for hit in hits if not (_is_gateway(hit.reply) or any(hit.address == at for at, _ in asked))
    ]

    async def one(address: Address) -> None:
        nonlocal done
        here: list[_Hit] = []
        for unit in units:
            try:
                reply = await _ask_for_anything(search, address, unit, _GATEWAY_REPLY_S)
            except (DeviceUnreachable, ConfigError, FieldError) as err:
                search.note(str(err))
                break
            done += 1
            spent_s = asyncio.get_running_loop().time() - began_s
            progress.at(spent_s / done * (total - done), f"{address}, unit {unit}, {len(hits)} found")
            if technician.answered(reply) and not _is_gateway(reply):
                here.append(_Hit(address, unit, reply))
                if wanted.first:
                    break
        if len(here) == len(units) > 3:
            search.note(f"{address} answers to every unit address: it is one device")
            here = here[:1]
        hits.extend(here)

    await _all_of([one(address) for address, _ in asked])


def _is_gateway(reply: Reply) -> bool:
    return isinstance(reply, Failure) and reply.code in _GATEWAY


# ------------------------------------------------------------------------------------ what it is


async def _identify_all(search: Search, hits: Sequence[_Hit]) -> None:
    """Ask each what it is. Stopped in between, those that are left are told by their address alone."""
    stopped = False
    for hit in hits:
        device = _plain(hit)
        if not stopped:
            try:
                device = await _identified(search, hit)
            except asyncio.CancelledError:
                stopped = True
            except (DriverError, FieldError) as err:
                search.note(f"{device.where}: {err}")
        search.take(device)
    if stopped:
        raise asyncio.CancelledError


def _where(hit: _Hit) -> str:
    return f"{hit.address}, unit {hit.unit}"


def _plain(hit: _Hit) -> FoundDevice:
    options = technician.options_of(hit.address, hit.unit)
    found = Found(driver="modbus", address=str(hit.address), description="Modbus device", options=options)
    return FoundDevice(
        what="a Modbus device that does not say what it is", where=_where(hit), found=found, address_=hit.address,
        unit_=hit.unit,
    )  # fmt: skip


async def _identified(search: Search, hit: _Hit) -> FoundDevice:
    """Identification, SunSpec, and the marks of the profiles."""
    from drivers import profiles, sunspec

    plain = _plain(hit)
    options = plain.found.options
    objects = await _identification(search.field, hit.address, hit.unit)
    told = {
        plan.OBJECT_WORDS.get(number, f"object {number}"): text for number, text in sorted(objects.items())
    }
    name = " ".join(filter(None, (objects.get(0), objects.get(5) or objects.get(4) or objects.get(1))))

    async def ask(register: int, count: int) -> list[int] | None:
        request = technician.reading(hit.address, hit.unit, Table.HOLDING, register, count)
        reply = (await search.field.ask(hit.address, [request])).replies[0]
        if not isinstance(reply, bytes):
            return None
        return [reply[i] << 8 | reply[i + 1] for i in range(0, 2 * count, 2)]

    device = await sunspec.discover(ask)
    if device is not None:
        found = sunspec.found(device, str(hit.address), options)
        return FoundDevice(
            what=found.description, where=_where(hit), found=found, address_=hit.address, unit_=hit.unit,
            identification=told,
        )  # fmt: skip
    likely = [one.profile for one in profiles.by_identification(objects)] if objects else []
    likely += [name for name in await _by_marks(search.field, hit) if name not in likely]
    models = [profiles.load(one) for one in likely[:_PROPOSED]]
    what = name or plain.what
    if models:
        what = " or ".join(f"{one.maker} {one.model}" for one in models) + (f" ({name})" if name else "")
    found = msgspec.structs.replace(
        plain.found,
        description=what,
        profile=likely[0] if likely else None,
        likelihood=0.9 if likely else 0.5,
    )
    return FoundDevice(
        what=what, where=_where(hit), found=found, address_=hit.address, unit_=hit.unit, identification=told
    )


async def _identification(field: Field, address: Address, unit: int) -> dict[int, str]:
    """Vendor, product, revision, … by object id; empty where the device does not tell (most do not)."""
    objects: dict[int, str] = {}
    for code in (plan.BASIC, plan.REGULAR):
        following: int | None = 0
        for _ in range(8):  # a device that says "more follows" for ever
            if following is None:
                break
            within_s = technician.answer_s(address, 7, 128)
            pdu = plan.identification_pdu(code, following)
            request = Request(unit, pdu, pdu[:3], 0, within_s, within_s)
            reply = (await field.ask(address, [request])).replies[0]
            if not isinstance(reply, bytes):
                return objects
            part = plan.parse_identification(reply)
            objects.update(part.objects)
            following = part.go_on
    return objects


async def _by_marks(field: Field, hit: _Hit) -> list[str]:
    """The profiles whose marks stand in the device's registers, the one with most of them first."""
    from drivers import profiles

    marked = profiles.marked()
    points: dict[tuple[object, ...], dict[str, Any]] = {}
    for profile in marked:
        for mark in profile.detect.mark:
            table = mark.point()
            key = tuple(sorted((k, v) for k, v in table.items() if k != "name"))
            points.setdefault(key, {**table, "name": f"mark {len(points)}"})
    if not points:
        return []
    device = Device(
        name="scan",
        driver="modbus",
        options=technician.options_of(hit.address, hit.unit),
        point=list(points.values()),
    )
    try:
        look = await field.attempt(device, timeout_s=30.0)
    except DeviceUnreachable:
        return []
    raw = {one.point: one.raw for one in look.readings}
    fitting: list[tuple[int, str]] = []
    for profile in marked:
        held = []
        for mark in profile.detect.mark:
            key = tuple(sorted((k, v) for k, v in mark.point().items() if k != "name"))
            held.append(mark.fits(raw.get(str(points[key]["name"]))))
        if all(held):
            fitting.append((-len(held), profile.name))
    return [name for _, name in sorted(fitting)]


# -------------------------------------------------------------------------------- serial, Bluetooth


async def _serial(search: Search, ports: Sequence[str], seconds: float, *, ask: bool) -> None:
    from agent.listen import survey_port
    from drivers.serial_port import PortInfo, present_ports

    present = await asyncio.to_thread(present_ports)
    held = {one.claim.key: one for one in await search.field.lines()}
    chosen = [port for port in present if not ports or {port.device, port.link, port.usb} & set(ports)]
    known = {name for port in chosen for name in (port.device, port.link, port.usb)}
    chosen += [PortInfo(device=port, description="named by you") for port in ports if port not in known]
    if not chosen:
        raise Trouble("there is no serial port here; plug the adapter in, and look at `dmesg`")
    for port in chosen:
        line = held.get(SerialPort(port.device, 9600, "N", 1).key)
        name = port.description or port.device
        where = f"{port.stable} ({port.device})" if port.stable != port.device else port.device
        if line is not None:
            text = f"{name}: in use by {', '.join(line.devices)} ({line.claim.settings})"
            one = Found(driver="", address=port.stable, description=text, likelihood=0.0)
        else:
            search.tell(f"{port.stable}: listening")
            try:
                one = await survey_port(port, seconds, ask=ask, tell=search.tell)
            except DriverError as err:
                search.failed += 1
                if ports:
                    search.note(f"{name}: {err}")
                    continue
                one = Found(driver="", address=port.stable, description=f"{name}: {err}", likelihood=0.0)
        search.take(FoundDevice(what=one.description, where=where, found=one))


async def _ble(search: Search, seconds: float) -> None:
    from drivers.ble_survey import survey

    progress = search.begin(seconds)
    loop = asyncio.get_running_loop()
    end_s = loop.time() + seconds
    latest: dict[str, Found] = {}

    async def show() -> None:
        while True:
            progress.at(end_s - loop.time(), f"{len(latest)} heard")
            await asyncio.sleep(0.2)

    shown = asyncio.create_task(show())
    try:
        async for one in survey(seconds):
            latest[one.address] = one
    finally:
        shown.cancel()
        progress.clear()
        for one in sorted(latest.values(), key=lambda found: (-found.likelihood, found.address)):
            search.found.append(FoundDevice(what=one.description, where=one.address, found=one))
