"""A real server as a child process: started, waited for, killed, and started again on the same port and data.

Rules: a server dies with the process that started it, even when that one is killed (PR_SET_PDEATHSIG); a
start that does not get ready within its deadline raises with the end of the server's own log; a port is taken
outside the kernel's ephemeral range, so that nobody's outgoing connection sits on it while the server is down.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.servers.locate import Program, on_path

HOST = "127.0.0.1"
# Linux hands out 32768–60999 for outgoing connections (net.ipv4.ip_local_port_range).
PORTS = range(20000, 32000)
READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
POLL_S = 0.02

# PR_SET_PDEATHSIG counts the *thread* that forked as the parent. This one lives as long as the process, so a
# server started from a short-lived worker thread does not die with it.
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawn-servers")


class ServerFailed(RuntimeError):
    """A server did not start, or did not get ready in time; the text ends with its log."""


def free_port() -> int:
    """A loopback port that nobody listens on, outside the kernel's ephemeral range."""
    chosen = random.SystemRandom()
    for _ in range(200):
        port = chosen.choice(PORTS)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise ServerFailed(f"no free port found in {PORTS.start}–{PORTS.stop}: is something holding them all?")


def wait_until(ready: Callable[[], bool], *, timeout_s: float, what: str) -> None:
    """Poll until `ready` says so; `TimeoutError` naming `what` after the deadline."""
    deadline_s = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() >= deadline_s:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(POLL_S)


def port_open(port: int, *, host: str = HOST) -> bool:
    """Whether something accepts a connection."""
    try:
        with socket.create_connection((host, port), timeout=1.0):
            return True
    except OSError:
        return False


def greets(port: int, *, host: str = HOST) -> bool:
    """Whether the server speaks first when connected to, as MariaDB does."""
    try:
        with socket.create_connection((host, port), timeout=1.0) as connection:
            return bool(connection.recv(1))
    except OSError:
        return False


@dataclass(slots=True)
class ServerProcess:
    """The handle that tests use to kill, stop, freeze and restart one server."""

    program: Program
    binary: str
    arguments: tuple[str, ...]
    folder: Path
    ready: Callable[[], bool]
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_signal: signal.Signals = signal.SIGTERM
    _child: subprocess.Popen[bytes] | None = None
    _starts: int = 0

    @property
    def name(self) -> str:
        return self.program.server.name

    @property
    def pid(self) -> int:
        """The process's id; `ServerFailed` where it is not running."""
        if self._child is None:
            raise ServerFailed(f"{self.name} is not running")
        return self._child.pid

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.poll() is None

    @property
    def log_path(self) -> Path:
        return self.folder / f"{self.name}.log"

    def log_tail(self, lines: int = 30) -> str:
        with contextlib.suppress(OSError):
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])
        return ""

    def start(self, *, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Start, or start again on the same port and data, and wait until it is ready."""
        if self.running:
            raise ServerFailed(f"{self.name} runs already, as process {self.pid}")
        command = self._command()
        self._starts += 1
        with self.log_path.open("ab") as log:
            log.write(f"--- start {self._starts}: {' '.join(command)}\n".encode())
            log.flush()

            def spawn() -> subprocess.Popen[bytes]:
                return subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **self.environment},
                    cwd=self.folder,
                    start_new_session=True,  # a Ctrl-C at the terminal is the test runner's, not the server's
                )

            self._child = _spawner.submit(spawn).result()
        deadline_s = time.monotonic() + timeout_s
        while not self.ready():
            if self._child.poll() is not None:
                status = self._child.returncode
                raise ServerFailed(f"{self.name} ended with status {status} unready:\n{self.log_tail()}")
            if time.monotonic() >= deadline_s:
                self.kill()
                raise ServerFailed(f"{self.name} was not ready within {timeout_s:g} s:\n{self.log_tail()}")
            time.sleep(POLL_S)

    def kill(self) -> None:
        """SIGKILL: no goodbye, no flush. Returns when the process is gone."""
        self._end(signal.SIGKILL, timeout_s=STOP_TIMEOUT_S)

    def stop(self, *, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """The polite way; killed where it does not leave within the deadline."""
        self._end(self.stop_signal, timeout_s=timeout_s)

    def pause(self) -> None:
        """Freeze it: connections stay open and nothing answers, as when a disk hangs."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    # -- details

    def _command(self) -> list[str]:
        # setpriv stands in util-linux, which every Debian has.
        dies_with_us = [shutil.which("setpriv") or "setpriv", "--pdeathsig", "KILL", "--"]
        command = program_command(self.program, self.binary, self.folder, variables=self.environment)
        return [*dies_with_us, *command, *self.arguments]

    def _signal(self, number: signal.Signals) -> None:
        if self._child is None or self._child.poll() is not None:
            return
        if self.program.image is not None:
            # The child is Docker's client; the server is a process of the daemon.
            subprocess.run(
                ["docker", "kill", "--signal", number.name, container_name(self.folder)],
                check=False,
                capture_output=True,
                timeout=STOP_TIMEOUT_S,
            )
            return
        self._child.send_signal(number)

    def _end(self, number: signal.Signals, *, timeout_s: float) -> None:
        child = self._child
        if child is None:
            return
        self._signal(number)
        if number is not signal.SIGKILL:
            self._signal(signal.SIGCONT)
        try:
            child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            child.kill()
            child.wait(STOP_TIMEOUT_S)
        self._child = None


class ElsewhereError(RuntimeError):
    """A test wants to kill or restart a server that the user runs elsewhere."""


@dataclass(slots=True)
class ElsewhereProcess(ServerProcess):
    """Stands for a server that the user runs: it is there, and it is not ours to touch."""

    @property
    def running(self) -> bool:
        return self.ready()

    def start(self, *, timeout_s: float = READY_TIMEOUT_S) -> None:
        raise self._not_ours()

    def _end(self, number: signal.Signals, *, timeout_s: float) -> None:
        raise self._not_ours()

    def _signal(self, number: signal.Signals) -> None:
        raise self._not_ours()

    def _not_ours(self) -> ElsewhereError:
        variable = self.program.server.address_variable
        return ElsewhereError(
            f"this test kills or restarts {self.name}: unset {variable} to let it start its own"
        )


def container_name(folder: Path) -> str:
    return f"headgate-{folder.name}"


def program_command(
    program: Program, binary: str, folder: Path, *, variables: Iterable[str] = ()
) -> Sequence[str]:
    """The words that start `binary` of this program: a file beside it, or one inside its image."""
    if program.image is not None:
        # Named only: Docker's client takes the values from its own environment, where no `ps` shows them.
        passed_on = [word for name in variables for word in ("--env", name)]
        return [
            "docker",
            "run",
            "--rm",
            "--init",
            "--name",
            container_name(folder),
            "--network",
            "host",
            "--user",
            f"{os.getuid()}:{os.getgid()}",
            "--volume",
            f"{folder}:{folder}",
            "--workdir",
            str(folder),
            *passed_on,
            "--entrypoint",
            binary,
            program.image,
        ]
    if program.path is None:
        raise ServerFailed(f"{program.server.name}: neither a file nor an image")
    if binary == program.server.binary:
        return [str(program.path)]
    found = on_path(binary)
    if found is None:
        raise ServerFailed(f"{binary} is not here; to get it: {program.server.remedy}")
    return [str(found)]
