"""What drivers learnt about their devices, kept through a restart: one small file per device in the state folder.

Rules: it is a convenience, never a need: what is missing, damaged, too large, or another driver's is ignored and
learnt anew. A file is replaced whole or not at all; a device that left the configuration is forgotten after a month.
"""

from __future__ import annotations

import hashlib
import logging
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from agent.state import write_atomically

log = logging.getLogger(__name__)

FOLDER_NAME: Final = "learnt"
MOST_BYTES: Final = 256 * 1024  #: of one device's memory
_FORGET_AFTER_S: Final = 30 * 86_400
_MAGIC: Final = b"HGL1"


class _Kept(msgspec.Struct, frozen=True, array_like=True):
    device: str
    driver: str
    data: bytes


class Learnt:
    """The folder. One agent uses it (the state folder's lock)."""

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / FOLDER_NAME

    def load(self, device: str, driver: str) -> bytes | None:
        """What this driver remembered of this device, or `None`. Never raises."""
        path = self._path(device)
        try:
            if path.stat().st_size > MOST_BYTES + 4096:
                raise ValueError("too large")
            found = path.read_bytes()
            checked = found[len(_MAGIC) + 4 :]
            if not found.startswith(_MAGIC) or zlib.crc32(checked) != int.from_bytes(found[4:8], "big"):
                raise ValueError("damaged")
            kept = msgspec.msgpack.decode(checked, type=_Kept)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, msgspec.DecodeError) as err:
            log.warning("%s: what was learnt about it cannot be used (%s); it is learnt anew", device, err)
            return None
        return kept.data if (kept.device, kept.driver) == (device, driver) else None

    def save(self, device: str, driver: str, data: bytes) -> None:
        """Keep it; told and given up where it cannot be kept."""
        if len(data) > MOST_BYTES:
            log.warning(
                "%s: its driver wants to remember %d bytes; at most %d are kept",
                device,
                len(data),
                MOST_BYTES,
            )
            return
        body = msgspec.msgpack.encode(_Kept(device, driver, data))
        try:
            self._folder.mkdir(mode=0o750, exist_ok=True)
            write_atomically(self._path(device), _MAGIC + zlib.crc32(body).to_bytes(4, "big") + body)
        except OSError as err:
            log.warning("%s: what was learnt about it cannot be kept: %s", device, err)

    def forget_strangers(self, devices: Iterable[str], now_s: float | None = None) -> None:
        """Remove what belongs to none of these devices and is old."""
        known = {self._path(device) for device in devices}
        limit_s = (time.time() if now_s is None else now_s) - _FORGET_AFTER_S
        try:
            for path in self._folder.iterdir():
                if path not in known and path.stat().st_mtime < limit_s:
                    path.unlink()
        except OSError:
            return  # there is nothing to forget, or it stays

    def _path(self, device: str) -> Path:
        return self._folder / f"{hashlib.sha256(device.encode()).hexdigest()[:32]}.bin"
