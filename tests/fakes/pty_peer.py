"""The other end of a serial line, as a pty: hears, speaks, and knows at which speed its reader listens.

A pty passes bytes at any speed and drops parity. `speed` reads the reader's own setting (the two ends share one
termios), so that a peer can do as a wire does: what is said at one speed and heard at another is noise.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import termios
import tty
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

_SPEEDS: Final[dict[int, int]] = {
    getattr(termios, name): int(name[1:]) for name in dir(termios) if name[0] == "B" and name[1:].isdigit()
}


class PtyPeer:
    """One end of a line. `react` is called with what was heard and not yet used, and gives what is still not used."""

    def __init__(self, link: Path, react: Callable[[bytes], bytes] | None = None) -> None:
        self.link = link
        self.react = react
        self.log: deque[tuple[int, bytes]] = deque(maxlen=64)  #: what was heard last, and at which speed
        self._fd = -1
        self._rest = b""
        self._tasks: set[asyncio.Task[None]] = set()
        self.plug()

    @property
    def port(self) -> str:
        return str(self.link)

    def plug(self) -> None:
        """Put the port there; after `unplug` it is a new one behind the same name."""
        self._fd, reader = os.openpty()
        tty.setraw(reader)
        os.set_blocking(self._fd, False)
        name = os.ttyname(reader)
        os.close(reader)
        fresh = self.link.with_name(self.link.name + ".new")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(name)
        fresh.replace(self.link)
        self._poll = asyncio.get_running_loop().create_task(self._listen(), name=f"peer[{self.link.name}]")

    def unplug(self) -> None:
        if self._fd < 0:
            return
        self._poll.cancel()
        for task in self._tasks:
            task.cancel()
        os.close(self._fd)
        self._fd = -1
        self._rest = b""
        self.link.unlink(missing_ok=True)

    @property
    def speed(self) -> int:
        """Baud, as the reader has set it."""
        return _SPEEDS[termios.tcgetattr(self._fd)[5]]

    async def _listen(self) -> None:
        # Polled: a master whose slave nobody has open is always readable (EIO).
        while True:
            with contextlib.suppress(OSError):
                while heard := os.read(self._fd, 4096):
                    self.log.append((self.speed, heard))
                    if self.react is not None:
                        self._rest = self.react(self._rest + heard)
            await asyncio.sleep(0.001)

    def say(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            os.write(self._fd, data)

    def later(self, what: Awaitable[None]) -> None:
        """Run beside the listening, until the plug is pulled."""

        async def run() -> None:
            await what

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
