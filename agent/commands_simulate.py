"""`headgate simulate`: serve a device, so that a configuration is tried with no hardware.

Exit: 0 ended by Ctrl-C or SIGTERM (or after --for), 2 it cannot be served.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

if TYPE_CHECKING:
    from agent.simulate import Line, Listening, Simulated, Tables
    from drivers.contract import Value
    from drivers.modbus import ModbusDriver

_LAST_PORT: Final = 65535
_CAN_BE_SERVED: Final = ("modbus",)
_WITHOUT: Final = {
    "simulator": "it needs no hardware anyway",
    "serial_line": "write its frames to a pty by a script of your own; only Modbus devices can be simulated",
    "ble": "advertisements need a radio; only Modbus devices can be simulated",
    "http_poll": "serve a file of its answers with any web server; only Modbus devices can be simulated",
}


@click.command()
@click.argument("what", metavar="PROFILE|CONFIG")
@click.option("--device", "only", multiple=True, help="Of a CONFIG: this device only (may be repeated).")
@click.option(
    "--port",
    type=click.IntRange(0, _LAST_PORT),
    default=5020,
    show_default=True,
    help="The first TCP port; 0: any that is free.",
)
@click.option("--bind", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--serial",
    "link",
    is_flag=False,
    flag_value="",
    default=None,
    metavar="[LINK]",
    help="Of a PROFILE: RTU on a new pty, with LINK as a name for it.",
)
@click.option(
    "--framing",
    type=click.Choice(["tcp", "udp", "rtu", "ascii", "rtu_over_tcp", "ascii_over_tcp"]),
    default=None,
    help="Of a PROFILE; unset: tcp, or rtu with --serial.",
)
@click.option("--unit", type=click.IntRange(0, 255), default=None, help="Of a PROFILE: its unit address.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="POINT=VALUE",
    help="This point shows this value ([DEVICE.]POINT=VALUE; may be repeated).",
)
@click.option(
    "--config-out",
    "out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="Write a copy of CONFIG whose devices point here.",
)
@click.option("--seed", default=0, show_default=True, help="Of what is random in the values.")
@click.option("--for", "for_s", type=click.FloatRange(min=0), default=None, help="End after so many seconds.")
@click.option("--json", "as_json", is_flag=True, help="Say what is served, as one line of JSON.")
def simulate(
    what: str,
    only: tuple[str, ...],
    port: int,
    bind: str,
    link: str | None,
    framing: str | None,
    unit: int | None,
    settings: tuple[str, ...],
    out: Path | None,
    seed: int,
    for_s: float | None,
    *,
    as_json: bool,
) -> None:
    """Serve the device of a PROFILE, or every Modbus device of a CONFIG, with moving, plausible values, until Ctrl-C.

    Each host of a configuration becomes a port of its own, from --port on; each serial port a new pty.
    Exit: 0 ended by Ctrl-C, SIGTERM or --for, 2 it cannot be served.
    """
    from agent.simulate import CannotSimulate
    from drivers.contract import ConfigError

    try:
        if Path(what).is_file() and not _is_profile(Path(what)):
            if link is not None or framing is not None or unit is not None:
                _fail("--serial, --framing and --unit are of a PROFILE; a configuration says them itself")
            served, skipped = _of_config(Path(what), only)
        else:
            if only or out is not None:
                _fail("--device and --config-out are of a CONFIG, not of a profile")
            framing = framing or ("tcp" if link is None else "rtu")
            if (link is None) == (framing in ("rtu", "ascii")):
                _fail("--framing rtu and ascii need --serial, and --serial needs one of them")
            served, skipped = _of_profile(what, unit, framing), []
        lines = _laid(served, settings, seed)
        asyncio.run(
            _run(
                lines,
                skipped,
                bind,
                port,
                Path(link) if link else None,
                for_s,
                out,
                Path(what),
                as_json=as_json,
            )
        )
    except (CannotSimulate, ConfigError) as err:
        _fail(str(err))


def _fail(text: str) -> NoReturn:
    click.echo(f"headgate: {text}", err=True)
    sys.exit(2)


# ------------------------------------------------------------------------------------------- what is served


class _Served:
    """A device, and the line it is on."""

    def __init__(self, device: Simulated, framing: str, key: str) -> None:
        self.device = device
        self.framing = framing
        self.key = key


class _Laid:
    """One line with its devices."""

    def __init__(self, line: Line, devices: list[Simulated]) -> None:
        self.line = line
        self.devices = devices

    def tables(self, device: Simulated) -> Tables:
        return self.line.units[device.unit]


def _is_profile(file: Path) -> bool:
    from config.load import ConfigFileError, parse_toml

    try:
        return "profile" in parse_toml(file.read_text(encoding="utf-8"))
    except (ConfigFileError, OSError, UnicodeDecodeError):
        return False  # told in full by whoever loads it


def _of_profile(what: str, unit: int | None, framing: str) -> list[_Served]:
    from agent.simulate import CannotSimulate
    from drivers import profiles, registry
    from drivers.modbus import ModbusDriver

    profile = profiles.load_file(Path(what)) if Path(what).is_file() else profiles.load(what)
    profiles.check(profile)
    if profile.driver not in _CAN_BE_SERVED:
        raise CannotSimulate(
            f"profile {profile.name} is of driver {profile.driver!r}: {_why_not(profile.driver)}"
        )
    own: dict[str, Value] = {"host": "192.0.2.1"} if unit is None else {"host": "192.0.2.1", "unit": unit}
    options, points = profiles.merge(profile, own, [])
    options.pop("framing", None)
    options.pop("serial", None)
    driver = registry.build(profile.name, profile.driver, options, points)
    assert isinstance(driver, ModbusDriver)  # noqa: S101 - as its name says
    return [_Served(_simulated(driver, profile.detect), framing, "the profile's")]


def _of_config(file: Path, only: Sequence[str]) -> tuple[list[_Served], list[tuple[str, str]]]:
    from agent.configuration import check
    from agent.simulate import CannotSimulate
    from config.load import nearest
    from drivers import profiles
    from drivers.modbus import ModbusDriver

    checked = check(file)
    if checked.config is None or checked.errors:
        raise CannotSimulate("\n".join(str(error) for error in checked.errors))
    known = [made.plan.name for made in checked.devices]
    for name in only:
        if name not in known:
            raise CannotSimulate(f"--device: {file} has no enabled device {name!r}{nearest(name, known)}")
    served: list[_Served] = []
    skipped: list[tuple[str, str]] = []
    detects = {
        device.name: profiles.load(device.profile).detect
        for device in checked.config.device
        if device.profile is not None
    }
    for made in checked.devices:
        if only and made.plan.name not in only:
            continue
        driver = made.driver
        if not isinstance(driver, ModbusDriver):
            skipped.append((made.plan.name, f"driver {made.plan.driver!r}: {_why_not(made.plan.driver)}"))
            continue
        options = driver.options
        framing = options.framing or ("rtu" if options.serial is not None else "tcp")
        key = driver.line().key
        served.append(
            _Served(_simulated(driver, detects.get(made.plan.name, profiles.Detect())), framing, key)
        )
    if not served:
        told = "; ".join(f"{name}: {why}" for name, why in skipped) or "it has no enabled device"
        raise CannotSimulate(f"{file}: nothing here can be simulated ({told})")
    return served, skipped


def _why_not(driver: str) -> str:
    return _WITHOUT.get(driver, "only Modbus devices can be simulated")


def _simulated(driver: ModbusDriver, detect: Any) -> Simulated:
    from agent.simulate import Simulated

    return Simulated(
        name=driver.name,
        unit=driver.options.unit,
        points=driver.points,
        order=driver.options.order,
        detect=detect,
    )


def _laid(served: Sequence[_Served], settings: Sequence[str], seed: int) -> list[_Laid]:
    """The lines with their units; every `--set` in its place. Raises `CannotSimulate`."""
    from agent.simulate import Line, Tables

    lines: dict[str, _Laid] = {}
    for one in served:
        laid = lines.setdefault(one.key, _Laid(Line(one.framing, {}), []))
        tables = laid.line.units.setdefault(one.device.unit, Tables(seed))
        tables.add(one.device)
        laid.devices.append(one.device)
        # One process has one identity (43/14): that of a device alone.
        laid.line.identity = _identity(one.device) if len(served) == 1 else {}
    for setting in settings:
        _set(list(lines.values()), setting)
    return list(lines.values())


def _identity(device: Simulated) -> dict[int, str]:
    detect = device.detect
    said = {0: detect.vendor, 1: detect.product, 4: detect.product}
    return {number: text.strip("*") for number, text in said.items() if text}


def _set(lines: Sequence[_Laid], setting: str) -> None:
    from agent.simulate import CannotSimulate
    from config.load import nearest

    where, equals, text = setting.partition("=")
    if not equals:
        raise CannotSimulate(f"--set {setting}: say POINT=VALUE, or DEVICE.POINT=VALUE")
    places = [
        (laid, device, point)
        for laid in lines
        for device in laid.devices
        for point in device.points
        if where in (point.name, f"{device.name}.{point.name}")
    ]
    if not places:
        known = sorted({point.name for laid in lines for device in laid.devices for point in device.points})
        raise CannotSimulate(f"--set {setting}: no point {where!r}{nearest(where, known)}")
    if len(places) > 1:
        names = ", ".join(device.name for _, device, _ in places)
        raise CannotSimulate(
            f"--set {setting}: several devices have {where!r} ({names}); say DEVICE.POINT=VALUE"
        )
    laid, device, point = places[0]
    laid.tables(device).set(device.name, point, _value(text, str(point.type), setting), device.order)


def _value(text: str, type_: str, setting: str) -> Value:
    from agent.simulate import CannotSimulate

    if type_ == "str":
        return text
    if type_ == "bool":
        if text.lower() not in ("true", "false", "1", "0", "on", "off"):
            raise CannotSimulate(f"--set {setting}: {text!r} is not true or false")
        return text.lower() in ("true", "1", "on")
    try:
        return float(text)
    except ValueError as err:
        raise CannotSimulate(f"--set {setting}: {text!r} is not a number") from err


# ------------------------------------------------------------------------------------------- serving it


async def _run(
    lines: Sequence[_Laid],
    skipped: Sequence[tuple[str, str]],
    bind: str,
    port: int,
    link: Path | None,
    for_s: float | None,
    out: Path | None,
    file: Path,
    *,
    as_json: bool,
) -> None:
    import signal

    from agent.simulate import CannotSimulate, serve

    if out is not None and out.exists() and out.samefile(file):
        raise CannotSimulate(f"--config-out {out}: that is the configuration itself; give another file")
    logging.getLogger("pymodbus").addHandler(logging.NullHandler())  # what fails is told once, by us
    if not _is_loopback(bind):
        click.echo(
            f"headgate: warning: Modbus has no authentication: whoever reaches {bind} can read and write here",
            err=True,
        )
    end = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end.set)

    def written(unit: int, table: str, address: int, words: Sequence[int]) -> None:
        if not as_json:
            values = " ".join(f"{word}" for word in words)
            click.echo(f"written to unit {unit}: {table} {address}: {values}")

    async with contextlib.AsyncExitStack() as stack:
        where: list[Listening] = []
        next_port = port
        for laid in lines:
            if next_port > _LAST_PORT:
                raise CannotSimulate(
                    f"--port {port}: {len(lines)} lines need as many ports; begin lower, or give 0"
                )
            where.append(
                await stack.enter_async_context(
                    serve(laid.line, bind=bind, port=next_port, link=link, on_write=written)
                )
            )
            next_port += 1 if next_port and not where[-1].path else 0
        if out is not None:
            _write_config(file, out, lines, where)
        await _tell(lines, where, skipped, out, as_json=as_json)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(for_s):
                await end.wait()


def _is_loopback(bind: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(bind).is_loopback
    except ValueError:
        return bind == "localhost"


async def _tell(
    lines: Sequence[_Laid],
    where: Sequence[Listening],
    skipped: Sequence[tuple[str, str]],
    out: Path | None,
    *,
    as_json: bool,
) -> None:
    import json

    from agent.simulate import shown_now

    told: list[dict[str, Any]] = []
    for laid, at in zip(lines, where, strict=True):
        for device in laid.devices:
            shown = await shown_now(laid.tables(device), device)
            told.append(
                {
                    "device": device.name,
                    "where": str(at),
                    "options": {**at.options(), "unit": device.unit},
                    "points": shown,
                }
            )
    if as_json:
        click.echo(
            json.dumps({"serving": told, "skipped": dict(skipped), "config": str(out) if out else None})
        )
        sys.stdout.flush()
        return
    for one in told:
        click.echo(
            f"{one['device']}: {len(one['points'])} points, unit {one['options']['unit']}, {one['where']}"
        )
        wide = max(map(len, one["points"]))
        for name, text in one["points"].items():
            click.echo(f"  {name:<{wide}}  {text}")
        said = ", ".join(f"{key} = {json.dumps(value)}" for key, value in one["options"].items())
        click.echo(f"  options = {{ {said} }}")
    for name, why in skipped:
        click.echo(f"{name}: not served: {why}")
    if out is not None:
        click.echo(f"{out}: the configuration, with its devices here")
    click.echo("Ctrl-C ends it.")
    sys.stdout.flush()


def _write_config(file: Path, out: Path, lines: Sequence[_Laid], where: Sequence[Listening]) -> None:
    """A copy of the configuration, comments and all, in which the served devices are reached here."""
    import tomlkit

    from agent.simulate import CannotSimulate

    document: Any = tomlkit.parse(file.read_text(encoding="utf-8"))
    to = {device.name: at.options() for laid, at in zip(lines, where, strict=True) for device in laid.devices}
    for table in document["device"]:
        reached = to.get(str(table.get("name")))
        if reached is None:
            continue
        # What only the line needs goes; what the profile says of it is overruled.
        options = table.setdefault("options", tomlkit.table())
        for key in ("host", "port", "serial", "framing", "parity", "data_bits"):
            if key in options:
                del options[key]
        for key, value in reached.items():
            options[key] = value
    try:
        out.write_text(tomlkit.dumps(document), encoding="utf-8")
    except OSError as err:
        raise CannotSimulate(f"--config-out {out}: cannot be written: {err.strerror}") from err
