"""`headgate report`: one archive that tells a colleague far away all that is known here, without secrets."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Final

import click
import msgspec

from agent.cli import DEFAULT_CONFIG
from agent.report import archive, end_of, scrubbed

_COMMAND_S: Final = 15.0
_LOG_LINES: Final = "20000"
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
    from agent.configuration import state_dir_of
    from agent.state import write_atomically

    made_s = int(time.time())
    files, left_out = _gathered(file, state_dir or state_dir_of(file), state_dir, with_cloud=not offline)
    known = _known_secrets(file)
    kept: dict[str, str] = {}
    for name, text in files.items():
        kept[name], was_cut = end_of(scrubbed(text, known))
        if was_cut:
            left_out.append(f"{name}: only its end is here")
    kept["contents.txt"] = "".join(
        [
            f"made {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(made_s))} UTC by headgate report\n",
            *(f"{name}  {len(text.encode(errors='replace'))} bytes\n" for name, text in sorted(kept.items())),
            *(f"not here: {line}\n" for line in left_out),
        ]
    )
    folder = f"headgate-report-{platform.node() or 'gateway'}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(made_s))}"
    target = output or Path()
    try:
        if target.is_dir():
            target = target / f"{folder}.tar.gz"
        write_atomically(target, archive(folder, kept, made_s=made_s), mode=0o600)
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


def _known_secrets(file: Path) -> list[str]:
    """What stands in the files and variables that the configuration names as a secret's: the gateway's token, keys."""
    import os

    from config.load import ConfigFileError, parse_toml

    try:
        table = parse_toml(file.read_text(errors="replace"))
    except (OSError, ConfigFileError):
        return []
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
            try:
                found.append(Path(value).read_text(errors="replace").strip())
            except OSError:
                return  # not readable by this user: then it cannot have come into the archive from here either

    walk(table)
    return [secret for secret in found if len(secret) >= 4]
