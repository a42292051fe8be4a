"""`headgate doctor`: each thing that a gateway needs, looked at in turn, with the remedy."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import click
import msgspec

from agent.cli import DEFAULT_CONFIG
from agent.doctor import Finding, Level, exit_code

_WIDTH = 80
_WORDS = {Level.OK: "ok", Level.WARNING: "WARN", Level.ERROR: "ERROR"}
_COLOURS = {Level.OK: "green", Level.WARNING: "yellow", Level.ERROR: "red"}


@click.command()
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
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def doctor(file: Path, state_dir: Path | None, *, offline: bool, as_json: bool) -> None:
    """Check this gateway: packages, drivers, configuration, agent, clock, disk, ports and their permissions, Bluetooth,
    and the way to the cloud (DNS, TCP, TLS, door) step by step. Nothing is changed.

    Exit: 0 no error (there may be warnings), 1 at least one error.
    """
    from agent.doctor_look import examine

    found: list[Finding] = []
    for finding in examine(file, state_dir, with_cloud=not offline):
        found.append(finding)
        if not as_json:
            _show(finding)
    errors = sum(f.level is Level.ERROR for f in found)
    warnings = sum(f.level is Level.WARNING for f in found)
    if as_json:
        told = {"errors": errors, "warnings": warnings, "findings": found}
        click.echo(msgspec.json.format(msgspec.json.encode(told), indent=2).decode())
    elif errors or warnings:
        click.echo(f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}")
    else:
        click.echo("all well")
    sys.exit(exit_code(found))


def _show(finding: Finding) -> None:
    word = click.style(f"{_WORDS[finding.level]:<5}", fg=_COLOURS[finding.level])
    lead = " " * 18
    text = textwrap.wrap(finding.text, _WIDTH - len(lead), break_long_words=False, break_on_hyphens=False)
    click.echo(f"{word} {finding.check:<11} {text[0] if text else ''}")
    for line in text[1:]:
        click.echo(lead + line)
    if finding.remedy:
        remedy = textwrap.wrap(
            f"-> {finding.remedy}", _WIDTH - len(lead), subsequent_indent="   ",
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
        for line in remedy:
            click.echo(lead + line)
