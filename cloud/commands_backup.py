"""`headgate-cloud backup` and `restore`: a copy of what the cloud keeps, and the way back."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from config.cloud import Cloud

_CONFIG = click.option(
    "--config", "config_file", envvar="HEADGATE_CLOUD_CONFIG", required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path), help="The cloud's configuration.",
)  # fmt: skip


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@_CONFIG
def backup(folder: Path, config_file: Path) -> None:
    """Copy journal, dead letters, embedded store and local archive to DIR; the server may run meanwhile.

    Stores elsewhere (InfluxDB, MySQL, a bucket) have backups of their own. Secrets and the configuration are not
    copied.
    """
    from cloud.backup import BackupError, back_up

    try:
        made = back_up(Path(_loaded(config_file).server.data_dir), folder)
    except BackupError as err:
        raise click.ClickException(str(err)) from err
    size = sum(file.size_bytes for file in made.files)
    click.echo(
        f"{folder}: {len(made.files)} files, {size / 1e6:.1f} MB, the journal up to offset {made.last_offset}"
    )


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@_CONFIG
@click.option("--replace", is_flag=True, help="Set aside what is in the data folder, instead of refusing.")
def restore(folder: Path, config_file: Path, replace: bool) -> None:
    """Put the backup in DIR in place; the server must not run. All of it is checked first."""
    from cloud.backup import BackupError
    from cloud.backup import restore as put_back

    try:
        made = put_back(folder, Path(_loaded(config_file).server.data_dir), replace=replace)
    except BackupError as err:
        raise click.ClickException(str(err)) from err
    at = datetime.datetime.fromtimestamp(made.made_at_ns / 1e9, datetime.UTC)
    click.echo(f"restored as of {at:%Y-%m-%d %H:%M:%S} UTC, the journal up to offset {made.last_offset}")
    click.echo(
        "what gateways had acknowledged after that is not in it, and they have let go of it: `headgate-cloud verify` "
        "names these frames once their gateways send again; stores that were not restored still have them"
    )


def _loaded(file: Path) -> Cloud:
    from cloud.preflight import load_config
    from config.load import ConfigFileError

    try:
        return load_config(file)
    except ConfigFileError as err:
        raise click.ClickException(str(err)) from err
