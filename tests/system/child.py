"""A program of ours as a child process: started, killed, started again, its output in a file of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent  #: where `headgate` and `headgate-cloud` were installed beside this Python


class ChildEnded(RuntimeError):
    """A child ended that nobody had ended; the text holds the last lines of what it said."""


@dataclass
class Child:
    name: str
    command: list[str]
    folder: Path
    env: dict[str, str]
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=self.env)

    def end(self, how: signal.Signals, timeout_s: float = 60.0) -> int:
        """Send the signal, wait for the end; the exit status."""
        assert self.process is not None
        self.process.send_signal(how)
        return self.process.wait(timeout_s)

    def stop_hard(self) -> None:
        """Whatever state it is in, it is gone after this."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def check(self) -> None:
        """Raises `ChildEnded` where it ended by itself."""
        if self.process is not None and self.process.poll() is not None:
            tail = self.log.read_text(errors="replace").splitlines()[-25:]
            raise ChildEnded("\n".join([f"{self.name} ended with {self.process.returncode}:", *tail]))
