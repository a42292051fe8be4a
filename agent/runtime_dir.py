"""Where a running agent can be reached when its state folder takes no writes: a folder in memory, its own user's alone.

Rules:
1. It is looked for where the agent makes it: what systemd gave (`RUNTIME_DIRECTORY`), `/run/headgate` where that is,
   else `/tmp/headgate-UID`. In it each state folder has a folder of its own, so that two agents never meet.
2. Nobody else's folder is written to or believed: it is a folder and no link, of the user that owns the state folder
   (or of root, or one's own), and closed to all others.
3. Nothing here needs to outlive the agent: readings are never kept here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_MODE: Final = 0o700
_SYSTEM: Final = Path("/run/headgate")
_TEMPORARY: Final = Path("/tmp")  # noqa: S108 - not TMPDIR: agent and commands must mean the same; see rule 2


def make(state_dir: Path) -> Path:
    """This agent's folder, made where it is missing. Raises `OSError` where none can be had."""
    error: OSError | None = None
    for home in _homes(os.geteuid()):
        try:
            if home.parent == _TEMPORARY:
                with contextlib.suppress(FileExistsError):
                    home.mkdir(_MODE)
            _check(home, {os.geteuid()})
            folder = home / _name(state_dir)
            with contextlib.suppress(FileExistsError):
                folder.mkdir(_MODE)
            _check(folder, {os.geteuid()})
        except OSError as err:
            error = err
        else:
            return folder
    raise error or OSError("no folder in memory")


def found(state_dir: Path) -> list[Path]:
    """Where an agent on this state folder may have gone to, for whoever looks for it."""
    owners = {0, os.geteuid()}
    with contextlib.suppress(OSError):
        owners.add(state_dir.stat().st_uid)
    places: list[Path] = []
    for owner in sorted(owners):
        for home in _homes(owner):
            folder = home / _name(state_dir)
            with contextlib.suppress(OSError):
                _check(home, owners)
                _check(folder, owners)
                if folder not in places:
                    places.append(folder)
    return places


def _homes(uid: int) -> Iterator[Path]:
    given = os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    if given:
        yield Path(given)
    yield _SYSTEM
    yield _TEMPORARY / f"headgate-{uid}"


def _name(state_dir: Path) -> str:
    return hashlib.sha256(os.path.realpath(state_dir).encode(errors="surrogateescape")).hexdigest()[:16]


def _check(folder: Path, owners: set[int]) -> None:
    """Raises `OSError` where it is not a folder of theirs alone."""
    seen = folder.lstat()
    if not stat.S_ISDIR(seen.st_mode):
        raise NotADirectoryError(f"{folder} is no folder")
    if seen.st_uid not in owners or stat.S_IMODE(seen.st_mode) & 0o022:
        raise PermissionError(f"{folder} belongs to others, or others may write to it")
