"""`headgate-cloud`: one thin group; each command's module is loaded when it is called, so that help answers at once.

Rule: a secret is never an argument; `token` writes one to a file that only its owner can read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from config.commands import LazyGroup

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

#: Commands that live in modules of their own: name -> (module, one line of help). A module holds a click command of
#: the same name (dashes as underscores).
ELSEWHERE: Final = {
    "gaps": ("cloud.commands_gaps", "What gateways told as lost: how much, why, of which priority."),
    "gateways": ("cloud.commands_gateways", "The gateways: when last seen, what they sent, how they are."),
    "journal": ("cloud.commands_journal", "The journal of a stopped server: salvage it where it is damaged."),
    "readings": (
        "cloud.commands_readings",
        "Readings by gateway, device, point and time; as a table, JSON or CSV.",
    ),
    "dead-letters": ("cloud.commands_dead_letters", "What a sink refused: list, show, replay, drop."),
    "import": ("cloud.commands_import", "Take in what a gateway exported to a file."),
    "replay": (
        "cloud.commands_replay",
        "Give a sink again what was received, with the best times known by now.",
    ),
    "backup": ("cloud.commands_backup", "Copy what this cloud keeps to a folder, while it runs."),
    "restore": ("cloud.commands_backup", "Put a backup in place of what this cloud keeps."),
    "status": ("cloud.commands_status", "What is wrong with the running cloud, and what to do about it."),
    "verify": ("cloud.commands_verify", "Check that what was received is in every sink."),
}


class _Unusable(click.ClickException):
    """A configuration that cannot be used; ends with 2, as with `headgate`."""

    exit_code = 2


class _Group(LazyGroup):
    elsewhere = ELSEWHERE


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="headgate", prog_name="headgate-cloud")
def main() -> None:
    """The receiving side of Headgate: takes batches from gateways, keeps them, and fills your databases."""


@main.command()
@click.argument("file", type=FILE, required=False)
@click.option("--config", "config_file", type=FILE, help="The configuration (TOML).")
def serve(file: Path | None, config_file: Path | None) -> None:
    """Run the cloud until SIGTERM: doors, journal, sinks, operator's API.

    FILE is the configuration; `--config FILE` says the same.
    """
    chosen = file or config_file
    if chosen is None:
        raise click.UsageError("which configuration? headgate-cloud serve --config FILE")
    from cloud.dead_letters import DeadLettersError
    from cloud.journal.contract import JournalError
    from cloud.preflight import load_config
    from cloud.server import ServeError, configure_logging
    from cloud.server import serve as run
    from config.load import ConfigFileError
    from sync.identity import IdentityError

    try:
        config = load_config(chosen)
    except ConfigFileError as err:
        raise _Unusable(str(err)) from err
    try:
        configure_logging(config.server.log_level)
        run(config)
    except (IdentityError, JournalError, DeadLettersError, ServeError) as err:
        raise click.ClickException(str(err)) from err


@main.group()
def config() -> None:
    """Look at a configuration without using it."""


@config.command()
@click.argument("file", type=FILE)
def check(file: Path) -> None:
    """Say whether FILE can be used, and if not, where it is wrong and what is allowed there."""
    from cloud.preflight import load_config, missing_secrets
    from config.load import ConfigFileError

    try:
        loaded = load_config(file)
    except ConfigFileError as err:
        raise _Unusable(str(err)) from err
    missing = missing_secrets(loaded)
    if missing:
        click.echo(f"note: on this machine {missing}", err=True)
    click.echo(f"{file}: ok")


@main.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def token(file: Path) -> None:
    """Write a new random credential to FILE, readable by its owner only. An existing file is left alone."""
    import os
    import secrets

    try:
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as err:
        raise click.ClickException(
            f"{file} exists; a credential is never overwritten: remove it first"
        ) from err
    except OSError as err:
        raise click.ClickException(f"{file}: {err.strerror}") from err
    with os.fdopen(fd, "w") as out:
        out.write(secrets.token_urlsafe(32) + "\n")
        out.flush()
        os.fsync(out.fileno())
    click.echo(f"written to {file}")


if __name__ == "__main__":
    main()
