"""What must be right before the cloud starts: the configuration's values together, and its secrets.

Nothing here opens a socket or a database; `headgate-cloud config check` and `serve` say the same.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from config.cloud import Cloud, conflicts
from config.load import ConfigFileError, convert, line_of, read_toml
from sync.identity import GatewayName, IdentityError, Secret, read_secret


class Secrets(msgspec.Struct, frozen=True):
    """What the server needs; the sinks that are not here read their own."""

    gateways: dict[GatewayName, Secret]
    broker: Secret | None
    operator: Secret | None
    mysql: Secret | None = None


def load_config(file: Path) -> Cloud:
    """Raises `ConfigFileError` for the first thing that is wrong: file, line, key, and what to change."""
    table, text = read_toml(file)
    config = convert(table, Cloud, file=str(file), text=text)
    for conflict in conflicts(config):
        raise ConfigFileError(
            conflict.text, file=str(file), line=line_of(text, conflict.path), path=conflict.path
        )
    return config


def read_secrets(config: Cloud) -> Secrets:
    """Raises `IdentityError` naming the secret and where it was looked for."""
    gateways = {
        GatewayName(g.tenant, g.name): read_secret(
            f"gateway[{i}] ({g.tenant}/{g.name})", file=g.token_file, env=g.token_env
        )
        for i, g in enumerate(config.gateway)
    }
    broker = None
    if config.mqtt is not None:
        broker = read_secret("mqtt", file=config.mqtt.password_file, env=config.mqtt.password_env)
    server = config.server
    operator = None
    if server.operator_token_file or server.operator_token_env:
        operator = read_secret(
            "server.operator_token", file=server.operator_token_file, env=server.operator_token_env
        )
    mysql = None
    if config.mysql is not None:
        mysql = read_secret("mysql", file=config.mysql.password_file, env=config.mysql.password_env)
    return Secrets(gateways, broker, operator, mysql)


def missing_secrets(config: Cloud) -> str | None:
    """What `serve` would say of the secrets on this machine, None where they are all here."""
    try:
        read_secrets(config)
    except IdentityError as err:
        return str(err)
    return None
