"""The operator's functions on the files and databases of a configuration, without a server.

Reading needs none. The journal belongs to one process at a time: where the server has it, it is the server that is
asked. Replaying needs a sink, and so the server.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from cloud.api.operator import Operator, OperatorError
from cloud.clocks import FILE as CLOCKS_FILE
from cloud.clocks import Clocks
from cloud.dead_letters import DeadLetters, DeadLettersError
from cloud.journal.contract import JournalBroken, JournalError
from config.cloud import Cloud
from sync.identity import IdentityError, Secret, read_secret


class JournalTaken(OperatorError):
    """Another process has the journal: the server runs."""


@asynccontextmanager
async def local(config: Cloud, *, journal: bool) -> AsyncIterator[Operator]:
    """Raises `JournalTaken` where the journal is wanted and the server has it, `OperatorError`."""
    from cloud.journal.sqlite import SqliteJournal

    data_dir = Path(config.server.data_dir)
    if not data_dir.is_dir():
        raise OperatorError(f"there is no {data_dir}: nothing was ever stored with this configuration")
    async with contextlib.AsyncExitStack() as stack:
        letters = DeadLetters(data_dir / "dead_letters.db")
        stack.push_async_callback(letters.close)
        held: SqliteJournal | None = None
        clocks = Clocks(data_dir / CLOCKS_FILE)
        try:
            # What is not there is not made: it might then belong to the wrong user.
            if (data_dir / "dead_letters.db").exists():
                await letters.open()
            if journal and not (data_dir / "journal.db").exists():
                raise OperatorError(f"there is no {data_dir / 'journal.db'}: nothing was ever received here")
            if journal:
                held = SqliteJournal(data_dir / "journal.db", max_bytes=config.journal.max_mb * 1024 * 1024)
                await held.open()
                stack.push_async_callback(held.close)
                if (data_dir / CLOCKS_FILE).exists():
                    await clocks.open()
                    stack.push_async_callback(clocks.close)
        except JournalBroken as err:
            if "another process" in str(err):
                raise JournalTaken(str(err)) from err
            raise OperatorError(str(err)) from err
        except (JournalError, DeadLettersError) as err:
            raise OperatorError(str(err)) from err
        operator = Operator(config, dead_letters=letters, journal=held, mysql=_mysql(config), clocks=clocks)
        stack.push_async_callback(operator.close)
        yield operator


def _mysql(config: Cloud) -> Secret | None:
    if config.mysql is None:
        return None
    try:
        return read_secret("mysql", file=config.mysql.password_file, env=config.mysql.password_env)
    except IdentityError as err:
        raise OperatorError(str(err)) from err


def address(config: Cloud) -> str:
    """Where the configuration's own server listens, as seen from this machine."""
    host = config.server.host
    if host in ("0.0.0.0", "::", ""):
        host = "127.0.0.1" if host != "::" else "::1"
    scheme = "https" if config.server.tls_cert_file else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{config.server.port}"


def operator_token(config: Cloud) -> Secret:
    """Raises `OperatorError`."""
    server = config.server
    try:
        return read_secret(
            "server.operator_token", file=server.operator_token_file, env=server.operator_token_env
        )
    except IdentityError as err:
        raise OperatorError(f"{err}; the running server answers only to its operator's token") from err
