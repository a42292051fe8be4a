"""What a proof has found: written by the proof itself, shown by the report page. No figure is typed by hand.

A proof writes one JSON file under `docs/reliability/`, in its long form only; `python -m tests.torture.page` makes the
tables of `docs/reliability.md` from all of them.
"""

from __future__ import annotations

import os
import platform
import sqlite3
import time
from pathlib import Path
from typing import Final

import msgspec

FOLDER: Final = Path(__file__).resolve().parents[2] / "docs" / "reliability"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One proof's last run."""

    proof: str  #: the module's name: crash_points, power_cuts, ...
    promise: str  #: what was to be shown, one sentence
    command: str  #: what runs it again, as typed
    passed: bool
    figures: dict[str, int | float | str]  #: in words a reader knows: "states" -> 10000
    seed: int | None = None
    took_s: float = 0.0
    at: str = ""  #: UTC, to the second
    machine: str = ""


def record(finding: Finding, folder: Path = FOLDER) -> Path:
    """Write it; the file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = (
        f"{os.cpu_count()} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}, "
        f"SQLite {sqlite3.sqlite_version}"
    )
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    told = msgspec.structs.replace(finding, at=at, machine=machine, took_s=round(finding.took_s, 1))
    path = folder / f"{finding.proof}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(told), indent=2) + b"\n")
    return path


def findings(folder: Path = FOLDER) -> list[Finding]:
    """All of them, by name."""
    return [
        msgspec.json.decode(path.read_bytes(), type=Finding)
        for path in sorted(folder.glob("*.json"))
        if not path.name.endswith(".series.json")
    ]
