"""What a person sees while the demo runs: a live table on a terminal, a line every few seconds elsewhere.

Everything shown is asked for at the same doors that an operator has: the agent's status file and the cloud's API.
All of it goes to stderr; stdout is for the account.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

LINE_EVERY_S = 3.0
COLOUR = {"good": "green", "uncertain": "yellow", "bad": "red"}


class Buffered(msgspec.Struct, frozen=True):
    """What the audit and the table need from the agent's own account."""

    kept: int
    readings: int  #: waiting in the buffer
    size_bytes: int


def status(state_dir: Path) -> dict[str, Any]:
    """The agent's status file, or nothing where there is none yet."""
    try:
        found: dict[str, Any] = json.loads((state_dir / "status.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found


def buffer_state(state_dir: Path) -> Buffered | None:
    buffer = status(state_dir).get("buffer")
    if not buffer:
        return None
    gone = buffer["settled_readings"] + buffer["gapped_readings"]
    return Buffered(buffer["kept_readings"], buffer["kept_readings"] - gone, buffer["size_bytes"])


class Screen:
    def __init__(self, folder: Path, cloud_port: int, token: Path) -> None:
        self._folder = folder
        self._base = f"http://127.0.0.1:{cloud_port}"
        self._token = token.read_text().strip()
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._notes: deque[str] = deque(maxlen=6)
        self._killed: set[str] = set()
        self._told_s = 0.0
        self._before: tuple[float, int] | None = None
        self._rate = 0.0

    def __enter__(self) -> Self:
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.__exit__(kind, err, trace)

    def note(self, text: str, *, killed: str = "", alive: str = "") -> None:
        """Say what the demo does to its own parts."""
        self._notes.append(f"{time.strftime('%H:%M:%S')} {text}")
        if killed:
            self._killed.add(killed)
        self._killed.discard(alive)
        if not self._live:
            print(f">>> {text}", file=sys.stderr, flush=True)

    def killed(self, name: str) -> bool:
        return name in self._killed

    def show(self, elapsed_s: float, of_s: float) -> None:
        now = time.monotonic()
        if not self._live and now - self._told_s < LINE_EVERY_S:
            return
        self._told_s = now
        agent = status(self._folder / "gateway")
        buffered = buffer_state(self._folder / "gateway")
        kept = buffered.kept if buffered else 0
        if self._before is None or now - self._before[0] >= 1.0:
            if self._before is not None:
                self._rate = max(0.0, (kept - self._before[1]) / (now - self._before[0]))
            self._before = (now, kept)
        ack = (agent.get("link") or {}).get("ack_p50_ms")
        line = (
            f"{elapsed_s:4.0f}/{of_s:.0f} s  agent {'killed' if 'agent' in self._killed else 'runs'}"
            f"  kept {kept:,}  {self._rate:,.0f} readings/s  buffer {buffered.readings if buffered else 0:,} readings"
            f"  ack {'-' if ack is None else f'{ack:.0f} ms'}"
        )
        if not self._live:
            print(line, file=sys.stderr, flush=True)
            return
        table = Table(expand=False)
        for column in ("device", "point", "value", "unit", "quality", "age"):
            table.add_column(column, justify="right" if column in ("value", "age") else "left", no_wrap=True)
        for row in self._latest()[:24]:
            colour = COLOUR.get(row["quality"], "white")
            table.add_row(
                row["device"],
                row["point"],
                row["value"],
                row["unit"],
                f"[{colour}]{row['quality']}{row['reason']}",
                row["age"],
            )
        self._live.update(Group(Text(line, style="bold"), table, *map(Text, self._notes)), refresh=True)

    def _latest(self) -> list[dict[str, str]]:
        """The newest reading of the first points of each device, as the cloud's API has them."""
        request = urllib.request.Request(
            f"{self._base}/v1/gateways/demo/plant-1/latest",
            headers={"Authorization": f"Bearer {self._token}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=1.0) as answer:
                rows = json.load(answer)
        except (urllib.error.URLError, OSError, ValueError, KeyError):
            return []
        shown: list[dict[str, str]] = []
        per_device: dict[str, int] = {}
        for row in rows:
            device = row["device"]
            per_device[device] = per_device.get(device, 0) + 1
            if per_device[device] > 5:
                continue
            value = row["value"]
            shown.append(
                {
                    "device": device,
                    "point": row["point"],
                    "value": f"{value:.6g}" if isinstance(value, float) else str(value),
                    "unit": row.get("unit") or "",
                    "quality": row["quality"],
                    "reason": f" ({row['reason']})" if row["reason"] else "",
                    "age": f"{max(0.0, time.time() - row['taken_at_ns'] / 1e9):.1f} s",
                }
            )
        return shown
