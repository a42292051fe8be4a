"""`headgate-cloud journal`: what an operator does to the journal of a server that is stopped."""

from __future__ import annotations

from pathlib import Path

import click

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group()
def journal() -> None:
    """The journal of a stopped server."""


@journal.command()
@click.option("--config", "config_file", type=FILE, required=True, help="The configuration (TOML).")
def salvage(config_file: Path) -> None:
    """Make a sound journal of a damaged one, from every entry whose CRC holds.

    The damaged file is kept beside it, with its time in its name. Afterwards each sink is given all that the journal
    holds, of which it takes nothing twice; what could not be read is reported by the server entry by entry.
    """
    from cloud.journal.contract import JournalError
    from cloud.journal.salvage import salvage as run
    from cloud.preflight import load_config
    from config.load import ConfigFileError

    try:
        config = load_config(config_file)
    except ConfigFileError as err:
        raise click.UsageError(str(err)) from err
    try:
        done = run(Path(config.server.data_dir) / "journal.db")
    except JournalError as err:
        raise click.ClickException(str(err)) from err
    click.echo(
        f"{done.entries} entries and {done.intervals} intervals saved, {done.missing} entries not found; the damaged"
        f" journal is kept as {done.damaged}: remove it when nothing is missed any more"
    )
