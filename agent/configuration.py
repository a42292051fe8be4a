"""The configuration in force: the file where it is good, else the last one that was.

Rules: a file is judged whole (its keys, its names, its devices with their drivers' own tables) and every error found
is told, each with its place; a bad file never replaces a good configuration, and is never half-used.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from agent.devices import Built, build_devices
from agent.state import write_atomically
from agent.status import ConfigHealth
from config.agent import Agent, Gateway
from config.load import ConfigFileError, convert, line_of, parse_toml, read_toml
from sync.identity import IdentityError, parse_name, require_private

LAST_GOOD_NAME: Final = "config.last-good.toml"


class BadConfig(Exception):
    """The configuration cannot be used, and there is no last-known-good one either."""

    def __init__(self, errors: Sequence[ConfigFileError]) -> None:
        super().__init__("\n".join(str(error) for error in errors))
        self.errors = tuple(errors)


class Checked(msgspec.Struct, frozen=True):
    """A file, judged. With errors, `devices` holds those that could be built all the same."""

    config: Agent | None
    text: str
    devices: list[Built]
    errors: list[ConfigFileError]


class Loaded(msgspec.Struct, frozen=True):
    """A configuration that can run."""

    config: Agent
    text: str
    devices: list[Built]
    health: ConfigHealth


def check(file: Path) -> Checked:
    """Judge a file; devices are built, but nothing is opened."""
    text = ""
    try:
        table, text = read_toml(file)
        config = convert(table, Agent, file=str(file), text=text)
    except ConfigFileError as err:
        return Checked(None, text, [], [err])
    built, errors = build_devices(config, file=str(file), text=text)
    return Checked(config, text, built, [*_check_names(config, str(file), text), *errors])


def _check_names(config: Agent, file: str, text: str) -> list[ConfigFileError]:
    """The gateway's name, its way to the cloud, and names that two devices claim."""
    found: list[ConfigFileError] = []

    def wrong(path: str, what: str) -> None:
        found.append(ConfigFileError(what, file=file, line=line_of(text, path), path=path))

    try:
        parse_name(f"{config.gateway.tenant}/{config.gateway.name}")
    except IdentityError as err:
        wrong("gateway.name", str(err))
    for path, way in config.uplink.ways.items():
        try:
            require_private(path, way.host, tls="on" if way.tls else "off")
        except IdentityError as err:
            wrong(f"{path}.tls", str(err))
        if way.token_file and way.token_env:
            wrong(f"{path}.token_env", "token_file and token_env are both set; keep one of them")
        elif not (way.token_file or way.token_env):
            wrong(
                f"{path}.token_file",
                'no credential; set token_file or token_env (there is no default), or kind = "none"',
            )
    taken: dict[str, int] = {}
    for index, device in enumerate(config.device):
        first = taken.setdefault(device.name, index)
        if first != index:
            wrong(
                f"device[{index}].name",
                f"{device.name!r} is the name of device[{first}] too; a device's name is its identity: choose another",
            )
    return found


def load_for_run(file: Path, state_dir: Path | None) -> Loaded:
    """The file where it is good, else the last-known-good one. Raises `BadConfig` with every error of the file.

    `state_dir` overrides the file's own.
    """
    now = check(file)
    if now.config is not None and not now.errors:
        config = now.config if state_dir is None else _in_folder(now.config, state_dir)
        return Loaded(config, now.text, now.devices, ConfigHealth(file=str(file)))
    folder = state_dir or state_dir_of(file)
    last_good = folder / LAST_GOOD_NAME
    if not last_good.is_file():
        raise BadConfig(now.errors)
    before = check(last_good)
    if before.config is None or before.errors:
        raise BadConfig([*now.errors, *before.errors])
    health = ConfigHealth(file=str(file), last_known_good=True, errors=[str(error) for error in now.errors])
    return Loaded(_in_folder(before.config, folder), before.text, before.devices, health)


def save_last_good(loaded: Loaded) -> None:
    """Keep a configuration that works. Raises `OSError`."""
    path = Path(loaded.config.gateway.state_dir) / LAST_GOOD_NAME
    data = loaded.text.encode()
    if not path.is_file() or path.read_bytes() != data:
        write_atomically(path, data)


def waits_for_restart(text_at_start: str, now: Agent) -> list[str]:
    """What differs from the file that the agent was started with, and cannot change while it runs. `text_at_start` was
    good."""
    before = convert(parse_toml(text_at_start), Agent)
    return [
        f"[{table}] changed, and takes effect when the agent is restarted"
        for table, was, is_ in (
            ("gateway", before.gateway, now.gateway),
            ("buffer", before.buffer, now.buffer),
            ("uplink", before.uplink, now.uplink),
        )
        if was != is_
    ]


def _in_folder(config: Agent, state_dir: Path) -> Agent:
    gateway = msgspec.structs.replace(config.gateway, state_dir=str(state_dir))
    return msgspec.structs.replace(config, gateway=gateway)


def state_dir_of(file: Path) -> Path:
    """The state folder that a bad file names, as far as it can still be read."""
    default = Path(Gateway(tenant="", name="").state_dir)
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return default
    with contextlib.suppress(ConfigFileError):
        gateway = parse_toml(text).get("gateway")
        named = gateway.get("state_dir") if isinstance(gateway, dict) else None
        return Path(named) if isinstance(named, str) else default
    found = re.search(r"^\s*state_dir\s*=\s*[\"']([^\"'\n]+)[\"']", text, re.MULTILINE)
    return Path(found.group(1)) if found else default
