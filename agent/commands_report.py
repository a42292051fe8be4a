"""`headgate report`: one archive that tells a colleague far away all that is known here, without secrets."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Final

import click
import msgspec

from agent.cli import DEFAULT_CONFIG
from agent.report import archive, end_of, scrubbed, secrets_in

_COMMAND_S: Final = 15.0
_LOG_LINES: Final = "20000"
_LARGEST_SECRET: Final = 65_536  #: bytes of a file that holds one
#: What this machine says of itself; a program that is not here is said to be missing.
_COMMANDS: Final = {
    "log.txt": ("journalctl", "--unit=headgate", "--no-pager", "--output=short-iso-precise", "--lines", _LOG_LINES),
    "service.txt": ("systemctl", "status", "--no-pager", "--full", "headgate"),
    "kernel.txt": ("dmesg", "--ctime"),
    "disks.txt": ("df", "--human-readable", "--print-type"),
    "mounts.txt": ("findmnt", "--noheadings"),
    "usb.txt": ("lsusb",),
    "network.txt": ("ip", "-brief", "address"),
    "time.txt": ("timedatectl", "show"),
}  # fmt: skip


@click.command()
@click.argument("output", type=click.Path(path_type=Path), required=False)
@click.option(
    "--config", "file", type=click.Path(path_type=Path, dir_okay=False), default=DEFAULT_CONFIG, show_default=True,
    help="The configuration.",
)  # fmt: skip
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Look here instead of gateway.state_dir.",
)
@click.option("--offline", is_flag=True, help="Do not knock at the cloud's door.")
@click.option("--json", "as_json", is_flag=True, help="Say what was written as JSON.")
def report(output: Path | None, file: Path, state_dir: Path | None, *, offline: bool, as_json: bool) -> None:
    """Write a support archive: status, configuration, doctor's findings, logs, this machine.

    Secrets are taken out, and no reading is in it. OUTPUT is a file or a folder; unset, this folder.

    Exit: 0 written, 2 cannot be written.
    """
    from agent.configuration import LAST_GOOD_NAME, state_dir_of
    from agent.state import write_atomically

    made_s = int(time.time())
    folder = state_dir or state_dir_of(file)
    files, left_out = _gathered(file, folder, state_dir, with_cloud=not offline)
    known = _known_secrets([file, folder / LAST_GOOD_NAME])
    kept: dict[str, str] = {}
    for each, text in files.items():
        kept[each], was_cut = end_of(scrubbed(text, known))
        if was_cut:
            left_out.append(f"{each}: only its end is here")
    kept["contents.txt"] = "".join(
        [
            f"made {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(made_s))} UTC by headgate report\n",
            *(f"{each}  {len(text.encode(errors='replace'))} bytes\n" for each, text in sorted(kept.items())),
            *(f"not here: {line}\n" for line in left_out),
        ]
    )
    name = f"headgate-report-{platform.node() or 'gateway'}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(made_s))}"
    target = output or Path()
    try:
        if target.is_dir():
            target = target / f"{name}.tar.gz"
        write_atomically(target, archive(name, kept, made_s=made_s), mode=0o600)
    except OSError as err:
        click.echo(f"headgate: {target}: {err.strerror}; name another place: headgate report /tmp", err=True)
        sys.exit(2)
    if as_json:
        told = {"file": str(target), "contents": sorted(kept), "left_out": left_out}
        click.echo(msgspec.json.format(msgspec.json.encode(told), indent=2).decode())
        return
    click.echo(f"{target}: {target.stat().st_size / 1024:.0f} KB, {len(kept)} files, secrets removed")
    for line in left_out:
        click.echo(f"not in it: {line}")


def _gathered(
    file: Path, folder: Path, state_dir: Path | None, *, with_cloud: bool
) -> tuple[dict[str, str], list[str]]:
    """Name -> text, not yet scrubbed, and what could not be had."""
    from agent.configuration import LAST_GOOD_NAME
    from agent.doctor_look import findings
    from agent.metrics import METRICS_NAME
    from agent.status import STATUS_NAME

    files: dict[str, str] = {}
    left_out: list[str] = []
    here = {
        "config.toml": file,
        "config-last-good.toml": folder / LAST_GOOD_NAME,
        "status.json": folder / STATUS_NAME,
        "metrics.prom": folder / METRICS_NAME,
        "os-release.txt": Path("/etc/os-release"),
        "kernel-command-line.txt": Path("/proc/cmdline"),
        "uptime.txt": Path("/proc/uptime"),
    }
    for name, path in here.items():
        try:
            files[name] = path.read_text(errors="replace")
        except OSError as err:
            left_out.append(f"{name}: {path}: {err.strerror}")
    try:
        found = findings(file, state_dir, with_cloud=with_cloud)
        files["doctor.json"] = msgspec.json.format(msgspec.json.encode(found), indent=2).decode()
    except Exception as err:  # noqa: BLE001 - the worse this machine is, the more the rest is wanted
        left_out.append(f"doctor.json: the doctor failed: {type(err).__name__}: {err}")
    files["state-folder.txt"] = _listing(folder, left_out)
    files["packages.txt"] = "".join(
        sorted(f"{d.metadata['Name']}=={d.version}\n" for d in distributions() if d.metadata["Name"])
    )
    files["machine.txt"] = f"{platform.platform()}\n{platform.machine()}\nPython {sys.version}\n"
    for name, command in _COMMANDS.items():
        try:
            done = subprocess.run(command, capture_output=True, timeout=_COMMAND_S, check=False)
        except FileNotFoundError:
            left_out.append(f"{name}: {command[0]} is not installed")
        except (OSError, subprocess.TimeoutExpired) as err:
            left_out.append(f"{name}: {command[0]}: {err}")
        else:
            files[name] = (done.stdout + done.stderr).decode(errors="replace")
    return files, left_out


def _listing(folder: Path, left_out: list[str]) -> str:
    lines = []
    try:
        for path in sorted(folder.rglob("*")):
            told = path.lstat()
            lines.append(
                f"{told.st_mode:o} {told.st_uid}:{told.st_gid} {told.st_size:>12} {path.relative_to(folder)}\n"
            )
    except OSError as err:
        left_out.append(f"state-folder.txt: {err}")
    return "".join(lines)


def _known_secrets(files: Sequence[Path]) -> list[str]:
    """What these configurations hold or name as a secret's place (a file, a variable): the gateway's token, keys."""
    from config.load import ConfigFileError, read_toml

    found: list[str] = []

    def walk(value: object, key: str = "") -> None:
        if isinstance(value, dict):
            for inner, held in value.items():
                walk(held, str(inner))
        elif isinstance(value, list):
            for held in value:
                walk(held, key)
        elif isinstance(value, str) and key.endswith("_env"):
            found.append(os.environ.get(value, "").strip())
        elif isinstance(value, str) and key.endswith("_file") and "ca_file" not in key:
            with contextlib.suppress(
                OSError
            ):  # not readable by this user: then nothing here has it from there
                path = Path(value)
                if path.is_file() and path.stat().st_size <= _LARGEST_SECRET:
                    found.append(path.read_text(errors="replace").strip())

    for file in files:
        with contextlib.suppress(ConfigFileError):  # the other one may be good
            table, _ = read_toml(file)
            found += secrets_in(table)
            walk(table)
    return found
