"""`headgate`: run the agent, see how it is, check its configuration.

Rules: heavy imports happen inside the command that needs them, so `headgate --help` answers at once; exit status 0 is
well, 1 is trouble, 2 is "this cannot be done" (a bad configuration, a state that cannot be read).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final, NoReturn

import click

from config.commands import LazyGroup

DEFAULT_CONFIG = Path("/etc/headgate/agent.toml")

_FILE = click.Path(path_type=Path, dir_okay=False)
_FOLDER = click.Path(path_type=Path, file_okay=False)


def _print_version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"headgate {version('headgate')}")
        context.exit()


#: The technician's and the engineer's commands, each in a module of its own: name -> (module, one line of help).
ELSEWHERE: Final = {
    "scan": ("agent.commands_scan", "Find devices: on Modbus lines, serial ports, Bluetooth."),
    "probe": ("agent.commands_probe", "Read a range of registers and show what they could mean."),
    "add": ("agent.commands_add", "Try a device and write it into the configuration."),
    "read": ("agent.commands_read", "Read a device once, now."),
    "watch": ("agent.commands_watch", "See a device's values as they come."),
    "write": ("agent.commands_write", "Write a point of a device, and read it back."),
    "buffer": ("agent.commands_buffer", "What waits in the buffer, and how to carry it out by hand."),
    "doctor": ("agent.commands_doctor", "Check this gateway, step by step, with what to do about it."),
    "report": ("agent.commands_report", "Write a support archive, without secrets."),
    "simulate": ("agent.commands_simulate", "Serve a device, to try a configuration with no hardware."),
    "profiles": ("agent.commands_profiles", "The device models that are described already."),
    "driver": ("agent.commands_driver", "Write a driver of your own."),
}


class _Group(LazyGroup):
    elsewhere = ELSEWHERE


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and leave.",
)
def main() -> None:
    """Reads field devices, keeps every reading on disk, and delivers each one once."""


@main.command()
@click.option(
    "--config", "file", type=_FILE, default=DEFAULT_CONFIG, show_default=True, help="The configuration."
)
@click.option("--state-dir", type=_FOLDER, default=None, help="Override gateway.state_dir.")
def run(file: Path, state_dir: Path | None) -> None:
    """Read the devices and deliver their readings, until SIGTERM."""
    from agent.configuration import BadConfig, load_for_run
    from agent.daemon import EXIT_UNUSABLE, StartError
    from agent.daemon import run as run_agent
    from agent.log import start_logging

    try:
        loaded = load_for_run(file, state_dir)
    except BadConfig as err:
        _fail([str(error) for error in err.errors])
    start_logging(loaded.config.gateway.log_level)
    try:
        sys.exit(run_agent(loaded))
    except StartError as err:
        click.echo(f"headgate: {err}", err=True)
        sys.exit(EXIT_UNUSABLE)


@main.command()
@click.option(
    "--config", "file", type=_FILE, default=DEFAULT_CONFIG, show_default=True, help="The configuration."
)
@click.option("--state-dir", type=_FOLDER, default=None, help="Look here instead of gateway.state_dir.")
@click.option("--json", "as_json", is_flag=True, help="The whole status as JSON.")
def status(file: Path, state_dir: Path | None, *, as_json: bool) -> None:
    """Say how the agent is and what is wrong, whether it runs or not. Exit: 0 well, 1 trouble, 2 cannot tell."""
    import time

    from agent import status as status_file
    from agent.configuration import state_dir_of
    from agent.state import is_locked
    from agent.status_now import latest

    folder = state_dir or state_dir_of(file)
    told = latest(folder)
    if told is None:
        click.echo(
            f"headgate: no status in {folder}: the agent never ran there, or this user may not read it",
            err=True,
        )
        sys.exit(2)
    running, now_ns = is_locked(folder), time.time_ns()
    wrong = status_file.problems(told, running=running, now_ns=now_ns)
    if as_json:
        click.echo(status_file.as_json(told, wrong, running=running))
    else:
        for line in status_file.lines(told, running=running, now_ns=now_ns):
            click.echo(line)
        click.echo("all well" if not wrong else f"{len(wrong)} wrong:")
        for problem in wrong:
            click.echo(f"  {problem}")
    sys.exit(1 if wrong else 2 if running is None else 0)


@main.group()
def config() -> None:
    """Look at configurations."""


@config.command("check")
@click.argument("file", type=_FILE)
def config_check(file: Path) -> None:
    """Check FILE as `run` would: every key, the devices, and their drivers' own tables."""
    from agent.configuration import check
    from sync.identity import IdentityError, read_secret

    checked = check(file)
    if checked.config is None or checked.errors:
        _fail([str(error) for error in checked.errors])
    points = sum(len(made.plan.points) for made in checked.devices)
    idle = len(checked.config.device) - len(checked.devices)
    uplink = checked.config.uplink
    click.echo(
        f"{file}: OK: gateway {checked.config.gateway.tenant}/{checked.config.gateway.name}, "
        f"{len(checked.devices)} devices{f' ({idle} more disabled)' if idle else ''}, {points} points, uplink "
        + ("none" if uplink.kind == "none" else f"{uplink.kind} to {uplink.host}")
    )
    for way in uplink.ways.values():
        try:
            read_secret("uplink", file=way.token_file, env=way.token_env)
        except IdentityError as err:
            # No error of the file: it may be checked on another machine, or by another user, than it will run.
            click.echo(f"note: the credential cannot be used here and now: {err}", err=True)


@main.command()
def drivers() -> None:
    """List the installed drivers."""
    from drivers.registry import driver_types

    for name, entry in sorted(driver_types().items()):
        click.echo(f"{name:<16} {entry.value}")


def _fail(errors: list[str]) -> NoReturn:
    for error in errors:
        click.echo(error, err=True)
    click.echo(
        f"headgate: {len(errors)} error{'s' if len(errors) != 1 else ''} in the configuration", err=True
    )
    sys.exit(2)
