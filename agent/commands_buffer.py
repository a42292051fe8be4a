"""`headgate buffer`: what waits, how much and how old, what was lost; and the way out without a network."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import NoReturn

import click
import msgspec

from agent.cli import DEFAULT_CONFIG

_FILE = click.Path(path_type=Path, dir_okay=False)
_FOLDER = click.Path(path_type=Path, file_okay=False)
_MB = 1024 * 1024


class _Place(msgspec.Struct):
    folder: Path
    file: Path
    as_json: bool


@click.group(invoke_without_command=True)
@click.option(
    "--config", "file", type=_FILE, default=DEFAULT_CONFIG, show_default=True, help="The configuration."
)
@click.option("--state-dir", type=_FOLDER, default=None, help="Look here instead of gateway.state_dir.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_context
def buffer(context: click.Context, file: Path, state_dir: Path | None, *, as_json: bool) -> None:
    """Show what waits in the buffer: depth, bytes, oldest, by priority, when it will be delivered, and the gaps.

    Works whether the agent runs or not, and changes nothing. Exit: 0 well, 1 trouble, 2 cannot tell.
    """
    from agent.configuration import state_dir_of

    context.obj = _Place(state_dir or state_dir_of(file), file, as_json)
    if context.invoked_subcommand is not None:
        return
    from agent import buffer_look
    from agent.state import is_locked
    from agent.status_now import latest

    place: _Place = context.obj
    try:
        files, damaged = buffer_look.look(place.folder)
    except buffer_look.LookError as err:
        _fail(str(err))
    told = buffer_look.account(
        place.folder, files, damaged, latest(place.folder), running=is_locked(place.folder)
    )
    if place.as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(told), indent=2).decode())
    else:
        for line in buffer_look.lines(told, time.time_ns()):
            click.echo(line)
    sys.exit(1 if told.trouble else 0)


@buffer.command()
@click.argument("target", type=click.Path(path_type=Path))
@click.pass_obj
def export(place: _Place, target: Path) -> None:
    """Write what waits into TARGET (a new file, or a folder), to be carried to the cloud by hand.

    There: headgate-cloud import TARGET. Nothing is taken out of the buffer: what the cloud has already is told apart
    there. The agent may run meanwhile.
    """
    from importlib.metadata import version

    from agent.export import ExportError, export

    gateway = _gateway(place)
    if target.is_dir():
        target = (
            target / f"{gateway.replace('/', '-')}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.headgate"
        )
    try:
        done = export(place.folder, target, gateway, version("headgate"), time.time_ns())
    except ExportError as err:
        _fail(str(err))
    if place.as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(done), indent=2).decode())
    else:
        click.echo(
            f"{done.file}: {done.readings:,} readings in {done.batches} batches, {done.bytes / _MB:.1f} MB; "
            f"on the cloud's side: headgate-cloud import {Path(done.file).name}"
        )
        if done.damaged_rows:
            click.echo(
                f"{done.damaged_rows} damaged rows are left out; the agent reports them as gaps", err=True
            )
    sys.exit(1 if done.damaged_rows else 0)


@buffer.command("drop-damaged")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def drop_damaged(place: _Place, *, yes: bool) -> None:
    """Remove the damaged files that were set aside and brought back as far as they could be."""
    from agent import salvage

    path = place.folder / "buffer.db"
    sets = salvage.damaged_sets(path)
    done = [one for one in sets if one.told]
    for one in sets:
        if not one.told:
            click.echo(f"{one.path.name} stays: the agent is not done with it", err=True)
    if not done:
        click.echo("nothing to drop")
        return
    for one in done:
        click.echo(f"{one.path.name}, {one.size_bytes / _MB:,.1f} MB: {one.told}")
    if not yes and not click.confirm("Remove for good?", default=False):
        sys.exit(1)
    try:
        gone = salvage.drop_damaged(path)
    except OSError as err:
        _fail(f"{err.filename}: {err.strerror}")
    click.echo(f"{len(gone)} removed, {sum(one.size_bytes for one in gone) / _MB:,.1f} MB")


@buffer.command()
@click.argument("version", type=click.IntRange(min=1))
@click.pass_obj
def schema(place: _Place, version: int) -> None:
    """Bring the buffer's file to the schema VERSION of another headgate, before that one is installed.

    The agent must be stopped. No row is removed; what the older schema cannot say (a priority) is forgotten.
    """
    import sqlite3

    from agent.store_migrations import SchemaUnknown, to_version

    path = place.folder / "buffer.db"
    try:
        changed = to_version(path, version)
    except BlockingIOError:
        _fail(f"an agent is using {path}; stop it first: systemctl stop headgate")
    except FileNotFoundError:
        _fail(f"there is no {path}: the agent never ran there, or give --state-dir")
    except (SchemaUnknown, sqlite3.Error, OSError) as err:
        _fail(str(err))
    click.echo(f"{path}: schema {version}; {changed:,} rows changed, none removed")


def _gateway(place: _Place) -> str:
    """Whose buffer it is: as the agent last said, else as the configuration says."""
    from agent import status as status_file

    told = status_file.read(place.folder)
    if told is not None and told.gateway:
        return told.gateway
    from agent.configuration import check

    checked = check(place.file)
    if checked.config is None:
        _fail(
            f"whose buffer is it? The agent left no status in {place.folder}, and {place.file} cannot be used"
        )
    return f"{checked.config.gateway.tenant}/{checked.config.gateway.name}"


def _fail(text: str) -> NoReturn:
    click.echo(f"headgate: {text}", err=True)
    sys.exit(2)
