"""Where a server's program is on this machine, without installing anything.

Rules: an address given by the user wins, then a program that is here (the environment's bin folder, our
cache, PATH), then Docker where a daemon answers and already holds the image. Nothing found raises
`ServerMissing` with the line that a person must type; a caller never skips. Where a server has a stand-in
(versitygw for MinIO), that is looked for last, in the same places; the found program says which it is.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.servers.catalogue import Server

# Debian keeps servers where a plain user's PATH does not look.
SYSTEM_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin")
ANSWER_TIMEOUT_S = 20.0


class ServerMissing(RuntimeError):
    """A server that a test needs is not on this machine; the text holds the line that installs it."""

    def __init__(self, server: Server, why: str) -> None:
        self.server = server
        remedy = f"{server.name}: {why}\n    to get it:  {server.remedy}\n    or all:     make servers"
        if server.address_variable is not None:
            remedy += f"\n    or point {server.address_variable} at a server of your own"
        super().__init__(remedy)


@dataclass(frozen=True, slots=True)
class Program:
    """A server's program: a file, or an image that Docker runs."""

    server: Server
    path: Path | None
    image: str | None
    origin: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.path or self.image}"


def cache_folder() -> Path:
    """Where built programs stay between runs; `HEADGATE_CACHE` moves it."""
    given = os.environ.get("HEADGATE_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "headgate"


def cached_path(server: Server) -> Path:
    return cache_folder() / "servers" / f"{server.name}-{server.version}" / server.binary


def address(server: Server) -> str | None:
    """The URL that the user gave for a server that runs elsewhere."""
    if server.address_variable is None:
        return None
    return os.environ.get(server.address_variable) or None


def answers(path: Path, server: Server) -> bool:
    """Whether the program starts and says a version that we can use."""
    try:
        done = subprocess.run(
            [str(path), *server.version_arguments],
            capture_output=True,
            text=True,
            timeout=ANSWER_TIMEOUT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return re.search(server.accept, done.stdout + done.stderr) is not None


def on_path(binary: str) -> Path | None:
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *SYSTEM_FOLDERS))
    found = shutil.which(binary, path=path)
    return Path(found) if found else None


@cache
def docker_answers() -> bool:
    """Whether a Docker daemon can be used by this user."""
    docker = shutil.which("docker")
    if docker is None:
        return False
    try:
        done = subprocess.run(
            [docker, "info", "--format", "{{.ServerVersion}}"],
            capture_output=True,
            timeout=ANSWER_TIMEOUT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _docker_holds(image: str) -> bool:
    done = subprocess.run(
        ["docker", "image", "inspect", image],
        capture_output=True,
        timeout=ANSWER_TIMEOUT_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode == 0


def find(server: Server) -> Program:
    """The program of `server`, else of its stand-in, else `ServerMissing`."""
    try:
        return find_itself(server)
    except ServerMissing:
        if server.stand_in is None:
            raise
        with contextlib.suppress(ServerMissing):
            return find_itself(server.stand_in)
        raise


def find_itself(server: Server) -> Program:
    """The program of `server` and no other, or `ServerMissing`."""
    unusable: list[str] = []
    candidates: list[tuple[str, Path | None]] = [
        ("this environment", Path(sys.executable).parent / server.binary),
        ("cache", cached_path(server)),
        ("PATH", on_path(server.binary)),
    ]
    for origin, path in candidates:
        if path is None or not path.is_file():
            continue
        lacking = [name for name in server.companions if on_path(name) is None]
        if lacking:
            unusable.append(f"{path} is here, but {', '.join(lacking)} is not")
        elif answers(path, server):
            return Program(server=server, path=path, image=None, origin=origin)
        else:
            unusable.append(f"{path} is not a version that the tests can use (wanted: {server.accept!r})")
    if server.image is not None and docker_answers() and _docker_holds(server.image):
        return Program(server=server, path=None, image=server.image, origin="Docker")
    raise ServerMissing(server, "; ".join(unusable) or f"no program {server.binary!r} on this machine")
