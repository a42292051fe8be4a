"""The agent's status as of now: by its control socket where it runs, else what it last wrote.

A disk that is full or read-only takes no status file; the agent itself can still be asked, and then most of all.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

import msgspec

from agent import status as status_file
from agent.control import AgentField
from agent.field import FieldError
from agent.status import AgentStatus

_ANSWER_S: Final = 3.0  #: an agent that hangs is told by the age of its file


def latest(folder: Path) -> AgentStatus | None:
    """None where nobody answers and no file can be read."""
    try:
        return asyncio.run(_asked(folder))
    except (FieldError, TimeoutError, OSError, msgspec.DecodeError):
        return status_file.read(folder)


async def _asked(folder: Path) -> AgentStatus:
    async with asyncio.timeout(_ANSWER_S):
        field = await AgentField.connect(folder)
        try:
            return status_file.decode(await field.status())
        finally:
            await field.close()
