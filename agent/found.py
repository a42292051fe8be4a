"""What the last scan found, so that the technician need not type it again: `--found 1`.

A small file of this user's, apart from the agent's state: $XDG_STATE_HOME/headgate/found.json.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from agent.state import write_atomically
from agent.technician import Cannot
from drivers.contract import Found
from drivers.modbus_address import Address


class FoundDevice(msgspec.Struct, frozen=True, kw_only=True):
    """One device that a scan found. `address` and `unit` where it speaks Modbus."""

    what: str  #: in words
    where: str  #: in words
    found: Found
    address_: Address | None = None
    unit_: int | None = None
    identification: dict[str, str] = {}

    @property
    def address(self) -> Address:
        """Raises `Cannot`."""
        if self.address_ is None:
            raise Cannot(f"{self.what} ({self.where}) does not speak Modbus")
        return self.address_

    @property
    def unit(self) -> int:
        return 1 if self.unit_ is None else self.unit_


def file() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "headgate" / "found.json"


def remember(devices: Sequence[FoundDevice]) -> None:
    """Raises `OSError`."""
    path = file()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, msgspec.json.encode(list(devices)), mode=0o600)


def recall(number: int) -> FoundDevice:
    """Raises `Cannot`."""
    try:
        devices = msgspec.json.decode(file().read_bytes(), type=list[FoundDevice])
    except (OSError, msgspec.MsgspecError):
        raise Cannot("--found: no scan is remembered; run `headgate scan` first") from None
    if not 1 <= number <= len(devices):
        raise Cannot(f"--found {number}: the last scan found {len(devices)}")
    return devices[number - 1]
