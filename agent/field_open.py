"""Which way to the field: through the agent where one runs on this state folder, directly where none does."""

from __future__ import annotations

import os
from pathlib import Path

from agent.field import Field, FieldError
from agent.state import is_locked


async def open_field(config_file: Path | None, state_dir: Path) -> Field:
    """The field for a command. Raises `FieldError` with the remedy where an agent runs and cannot be talked to."""
    running = is_locked(state_dir)
    if running is False:
        from agent.field_direct import DirectField

        return DirectField(config_file)
    from agent.control import AgentField, ControlRefused

    try:
        return await AgentField.connect(state_dir)
    except ControlRefused as err:
        raise FieldError(f"{err}; {_remedy(state_dir, running=running)}") from err


def _remedy(state_dir: Path, *, running: bool | None) -> str:
    """What lets this user through. `running` is None where even that cannot be told."""
    try:
        owner = state_dir.stat().st_uid
    except OSError:
        owner = -1
    if owner in (os.geteuid(), -1) and running:
        return "if it was started by an older version, restart it: systemctl restart headgate"
    name = _user_name(owner)
    return f"run this as the agent's user: sudo -u {name} headgate ..."


def _user_name(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return "headgate" if uid < 0 else f"'#{uid}'"
