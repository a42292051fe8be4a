"""A technician at a shell: the installed `headgate`, with a configuration, a state folder and a home of his own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADGATE = Path(sys.executable).parent / "headgate"
GATEWAY = """# The gateway in hall 2.
[gateway]
tenant = "acme"
name = "plant-1" # this box
state_dir = "{state}"

[uplink]
kind = "none"
"""
ANSWER_WITHIN_S = 60.0  #: eight people may share two cores


@dataclass
class Ran:
    """What came of one command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def __str__(self) -> str:
        return f"exit {self.code}\n{self.out}\n{self.err}"


class Technician:
    """Types commands. `config` is the gateway's configuration."""

    def __init__(self, folder: Path, *, devices: str = "") -> None:
        self.folder = folder
        self.state = folder / "state"
        self.state.mkdir(exist_ok=True)
        self.config = folder / "agent.toml"
        self.config.write_text(GATEWAY.format(state=self.state) + devices)

    @property
    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS")}
        return kept | {"XDG_STATE_HOME": str(self.folder / "home"), "PYTHONUTF8": "1"}

    async def starts(self, *words: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            HEADGATE, *words, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE, env=self.environment,
        )  # fmt: skip

    async def types(self, *words: str, within_s: float = ANSWER_WITHIN_S, plain: bool = True) -> Ran:
        """Run it to its end. Every output fits 80 columns and has no traceback, whatever the command (`plain`)."""
        placed = list(words)
        if "--config" not in words:
            at = words.index("--") if "--" in words else len(words)
            placed[at:at] = ["--config", str(self.config)]
        process = await self.starts(*placed)
        try:
            out, err = await asyncio.wait_for(process.communicate(), within_s)
        except TimeoutError:
            process.kill()
            await process.wait()
            raise AssertionError(f"no end within {within_s} s: {words}") from None
        ran = Ran(process.returncode or 0, out.decode(), err.decode())
        assert "Traceback" not in ran.err + ran.out, ran
        if plain and "--json" not in words:
            # Commands to copy stand on one line however long they are, and so do names of files.
            copied = ("headgate add", str(self.folder))
            long = [
                line
                for line in ran.out.splitlines()
                if len(line) > 80 and not any(word in line for word in copied)
            ]
            assert not long, "\n".join(long)
            assert "\x1b" not in ran.out + ran.err, ran
        return ran

    async def interrupts(self, process: asyncio.subprocess.Process) -> Ran:
        """Ctrl-C."""
        process.send_signal(signal.SIGINT)
        out, err = await asyncio.wait_for(process.communicate(), ANSWER_WITHIN_S)
        return Ran(process.returncode or 0, out.decode(), err.decode())


async def heard(process: asyncio.subprocess.Process, text: str, within_s: float = ANSWER_WITHIN_S) -> str:
    """What it said on stderr up to and with this text."""
    assert process.stderr is not None
    said = b""
    async with asyncio.timeout(within_s):
        while text.encode() not in said:
            more = await process.stderr.read(1)
            assert more, said.decode()
            said += more
    return said.decode()
