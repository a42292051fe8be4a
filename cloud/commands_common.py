"""What the operator's commands share: where to ask, and how to print.

Where: `--url` names a server and `--token-file` or `--token-env` its operator's token. Else `--config` names the
configuration: its files and databases are read here, and where only the running server can answer, it is asked at its
own address with its own token. A secret is never an argument.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import click
import msgspec

if TYPE_CHECKING:
    from cloud.api.operator import Operator
    from cloud.api.remote import Remote
    from config.cloud import Cloud

Source: TypeAlias = "Operator | Remote"

URL_ENV = "HEADGATE_URL"
CONFIG_ENV = "HEADGATE_CLOUD_CONFIG"
TOKEN_ENV = "HEADGATE_OPERATOR_TOKEN"  # noqa: S105 - the name of a variable


class Place(msgspec.Struct, frozen=True):
    """Where to ask."""

    config_file: Path | None
    url: str | None
    token_file: Path | None
    token_env: str
    ca_file: Path | None

    @asynccontextmanager
    async def open(self, *, journal: bool = False, server: bool = False) -> AsyncIterator[Source]:
        """`journal`: the question needs it. `server`: only a running server can do it. Raises `OperatorError`."""
        from cloud.api.local import JournalTaken, address, local, operator_token
        from cloud.api.operator import OperatorError

        if self.url is not None:
            remote = self._remote(self.url)
            try:
                yield remote
            finally:
                await remote.close()
            return
        if self.config_file is None:
            raise OperatorError(
                f"where? give --config FILE (or {CONFIG_ENV}) on the server's machine, or --url (or {URL_ENV})"
            )
        config = self._loaded(self.config_file)
        if not server:
            try:
                async with local(config, journal=journal) as operator:
                    yield operator
                    return
            except JournalTaken:
                pass
        from cloud.api.remote import Remote

        remote = Remote(address(config), operator_token(config), ca_file=self.ca_file)
        try:
            yield remote
        finally:
            await remote.close()

    def _remote(self, url: str) -> Remote:
        from cloud.api.operator import OperatorError
        from cloud.api.remote import Remote
        from sync.identity import IdentityError, read_secret

        try:
            token = read_secret(
                "the operator's token",
                file=str(self.token_file) if self.token_file else None,
                env=None if self.token_file else self.token_env,
            )
        except IdentityError as err:
            raise OperatorError(f"{err}; give --token-file, or set {self.token_env}") from err
        return Remote(url, token, ca_file=self.ca_file)

    @staticmethod
    def _loaded(file: Path) -> Cloud:
        from cloud.api.operator import OperatorError
        from cloud.preflight import load_config
        from config.load import ConfigFileError

        try:
            return load_config(file)
        except ConfigFileError as err:
            raise OperatorError(str(err)) from err


def asks(command: Callable[..., Awaitable[int | None]]) -> Callable[..., None]:
    """Adds the options that say where to ask, runs the command with the `Place`, and turns errors into one line."""

    @click.option(
        "--config",
        "config_file",
        envvar=CONFIG_ENV,
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="The cloud's configuration, on its own machine.",
    )
    @click.option("--url", envvar=URL_ENV, help="A server, as https://cloud.example:8080.")
    @click.option(
        "--token-file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Holds the operator's token, with --url.",
    )
    @click.option(
        "--token-env", default=TOKEN_ENV, show_default=True, help="The variable that holds it, with --url."
    )
    @click.option(
        "--ca-file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="The CA to trust, where it is not the system's.",
    )
    @functools.wraps(command)
    def run(
        config_file: Path | None,
        url: str | None,
        token_file: Path | None,
        token_env: str,
        ca_file: Path | None,
        **given: object,
    ) -> None:
        from cloud.api.operator import OperatorError
        from cloud.api.times import TimeError
        from cloud.dead_letters import DeadLettersError
        from cloud.journal.contract import JournalError
        from cloud.sinks.contract import SinkError

        place = Place(config_file, url, token_file, token_env, ca_file)
        try:
            status = asyncio.run(_awaited(command(place, **given)))
        except (OperatorError, TimeError, SinkError, JournalError, DeadLettersError) as err:
            raise click.ClickException(str(err)) from err
        if status:
            raise SystemExit(status)

    return run


async def _awaited(call: Awaitable[int | None]) -> int | None:
    return await call


def print_json(answer: object) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(answer), indent=2))


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str) -> None:
    """Columns as wide as they must be; what a terminal could take for a command is spelt out."""
    if not rows:
        click.echo(empty)
        return
    cells = [[_plain(cell) for cell in row] for row in rows]
    widths = [max(len(head), *(len(row[i]) for row in cells)) for i, head in enumerate(heads)]
    for row in [list(heads), *cells]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _plain(text: str) -> str:
    """Names and values come from devices: an escape sequence in one is shown, not obeyed."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
