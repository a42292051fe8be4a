"""`headgate add`: a device tried, then written into the configuration, then taken up by the running agent.

The file is edited in `agent.config_edit`; this decides what is written, tries it, and tells what happened.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from agent import commands_read, config_edit, technician
from agent.config_edit import EditError
from agent.field import Field, FieldError, Look
from agent.technician import EXITS, Cannot, LineOptions, Trouble, Way
from config.agent import Device
from config.load import ConfigFileError, convert, parse_toml
from drivers.contract import DriverError, Quality

_WORDS: Final = frozenset(
    {"name", "type", "unit", "order", "table", "encoding", "pattern", "object", "field", "pointer", "select"}
)
"""Keys of a point whose values are words even where they look like numbers."""
_FIRST_VALUE_S: Final = 10.0  #: how long to wait for the first value, beyond the device's period


@click.command(epilog=EXITS)
@technician.field_options
@technician.line_options
@click.argument("name")
@click.option("--found", type=click.IntRange(1), help="The device of this number in the last scan.")
@click.option("--profile", help="Its model, as `headgate profiles` lists it.")
@click.option("--only", help="Of the profile's points, these: voltage_l1,power")
@click.option("--driver", help="Its driver; modbus unless said, with --port or --host.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="One of the driver's options.")
@click.option(
    "--point", "points", multiple=True, metavar="NAME,KEY=VALUE,...",
    help="One value: 'voltage,register=0,type=f32,unit=V'. `headgate probe --expect` writes it.",
)  # fmt: skip
@click.option("--period-ms", type=click.IntRange(0), help="How often it is read; 1000 unless said.")
@click.option("--force", is_flag=True, help="Write it although the test read failed.")
@click.option("--dry-run", is_flag=True, help="Try it and show what would change; write nothing.")
def add(
    way: Way, line: LineOptions, name: str, found: int | None, profile: str | None, only: str | None,
    driver: str | None, options: tuple[str, ...], points: tuple[str, ...], period_ms: int | None, *, force: bool,
    dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Try device NAME with one read, write it into the configuration, and let the running agent take it up.

    \b
    headgate add meter --profile eastron-sdm630 --port /dev/ttyUSB0 --unit 7
    headgate add meter --host 192.0.2.10 --point 'power,register=0,unit=W'
    headgate add meter --found 1

    Only lines are added to the file: its comments and its order stay. It is valid afterwards, or untouched, whatever
    happens in between.
    """
    table = _table(name, line, found, profile, only, driver, options, points, period_ms)
    by_hand = bool(points)
    technician.run(_add(way, table, by_hand=by_hand, force=force, dry_run=dry_run, as_json=as_json))


def _table(
    name: str, line: LineOptions, found: int | None, profile: str | None, only: str | None, driver: str | None,
    options: Sequence[str], points: Sequence[str], period_ms: int | None,
) -> dict[str, Any] | Cannot:  # fmt: skip
    """The device's table, or why there is none."""
    try:
        table: dict[str, Any] = {"name": name}
        reached: dict[str, Any] = {}
        rows = [point_of(text) for text in points]
        if found is not None:
            from agent.found import recall

            it = recall(found).found
            reached = dict(it.options)
            profile = profile or (it.profile if not rows else None)
            if not rows and not profile:
                rows = [dict(row) for row in it.points]
            driver = driver or (None if profile else it.driver)
        elif line.is_given:
            reached = dict(line.options())
            driver = driver or (None if profile else "modbus")
        reached |= dict(map(option_of, options))
        if profile:
            table["profile"] = profile
        if driver:
            table["driver"] = driver
        if not profile and not driver:
            raise Cannot("say what it is: --profile, --driver, or --port or --host of a Modbus device")
        if not profile and not rows:
            raise Cannot(
                "say what to read: --point 'voltage,register=0,type=f32,unit=V' (`headgate probe --expect` writes it), "
                "or a --profile that knows"
            )
        if only:
            table["only"] = [word.strip() for word in only.split(",")]
        table["period_ms"] = 1000 if period_ms is None else period_ms
        if reached:
            table["options"] = reached
        if rows:
            table["point"] = rows
    except Cannot as err:
        return err
    return table


def option_of(text: str) -> tuple[str, Any]:
    """`unit=7`. Raises `Cannot`."""
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise Cannot(f"--option {text!r} is not KEY=VALUE")
    return key.strip(), _value(value)


def point_of(text: str) -> dict[str, Any]:
    """`voltage,register=0,type=f32,unit=V`. Raises `Cannot`."""
    table: dict[str, Any] = {}
    for number, part in enumerate(_parts(text)):
        key, sign, value = part.partition("=")
        key = key.strip()
        if not sign:
            if number or not key:
                raise Cannot(
                    f"--point {text!r}: {part.strip()!r} is not KEY=VALUE; write it as "
                    "'voltage,register=0,type=f32,unit=V'"
                )
            key, value = "name", key
        if key in table:
            raise Cannot(f"--point {text!r}: {key} is given twice")
        is_word = key in _WORDS and not value.strip().startswith(('"', "'"))
        table[key] = value.strip() if is_word else _value(value)
    if not table.get("name"):
        raise Cannot(f"--point {text!r} has no name; it comes first: 'voltage,register=0'")
    return table


def _parts(text: str) -> list[str]:
    """Cut at commas, not at those within brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for each in text:
        if quote:
            quote = "" if each == quote else quote
        elif each in "\"'":
            quote = each
        elif each in "[{":
            depth += 1
        elif each in "]}":
            depth -= 1
        elif each == "," and not depth:
            parts.append("")
            continue
        parts[-1] += each
    return parts


def _value(text: str) -> Any:
    """As TOML has it; a word where it is none."""
    text = text.strip()
    try:
        return parse_toml(f"value = {text}")["value"]
    except (ConfigFileError, KeyError):
        return text


# ---------------------------------------------------------------------------------------------- the work


class _Added(msgspec.Struct):
    """What came of it, for JSON."""

    device: str
    file: str
    written: bool = False
    running: bool = False  #: the agent has taken it up
    reading: dict[str, object] | None = None
    values: dict[str, object] | None = None
    diff: str = ""
    warnings: list[str] = []


async def _add(
    way: Way, table: dict[str, Any] | Cannot, *, by_hand: bool, force: bool, dry_run: bool, as_json: bool
) -> int:
    if isinstance(table, Cannot):
        raise table
    name = table["name"]
    told = _Added(name, str(way.file))

    def warn(text: str) -> None:
        told.warnings.append(text)
        if not as_json:
            technician.note(f"warning: {text}")

    def say(text: str) -> None:
        if not as_json:
            technician.say(text)

    try:
        device = convert(table, Device)
        old = config_edit.read(way.file)
        if name in config_edit.names(old):
            raise Cannot(f"{way.file} has a device {name!r} already; choose another name, or edit that one")
        new = config_edit.with_device(old, table)
        _judge(way.file, old, new)
        told.diff = config_edit.difference(old, new, str(way.file))
        async with way.field() as field:
            look = await _try(field, device, by_hand=by_hand, force=force, warn=warn)
            if look is not None:
                told.reading = commands_read.told(look)
                say("Test read:")
                for line in commands_read.lines(look)[1:]:
                    say(line)
            if dry_run:
                say(told.diff)
                say("Nothing was written (--dry-run).")
            else:
                config_edit.save(way.file, old, new)
                told.written = True
                say(f"{name} is written into {way.file}.")
                await _take_up(field, device, told, say, warn)
    except (EditError, ConfigFileError) as err:
        raise Cannot(str(err)) from err
    if as_json:
        technician.say(technician.as_json(told))
    return technician.OK


def _judge(file: Path, old: str, new: str) -> None:
    """Before anything is asked: would the file be valid? Raises `Cannot`."""
    with tempfile.TemporaryDirectory(prefix="headgate-") as folder:
        aside = Path(folder) / "agent.toml"
        aside.write_bytes(old.encode())
        before = config_edit.problems(aside, shown_as=file)
        if before:
            raise Cannot(
                f"{file} is not valid as it stands; mend it first (headgate config check):\n  "
                + "\n  ".join(before)
            )
        aside.write_bytes(new.encode())
        after = config_edit.problems(aside, shown_as=file)
        if after:
            raise Cannot("this device would not be valid:\n  " + "\n  ".join(after))


async def _try(field: Field, device: Device, *, by_hand: bool, force: bool, warn: Any) -> Look | None:
    """One read. Raises `Trouble` where it failed, unless forced."""
    try:
        look = await field.attempt(device, timeout_s=max(10.0, 2 * device.period_ms / 1000))
    except (DriverError, FieldError) as err:
        if not force:
            raise Trouble(
                f"the test read failed, so nothing was written: {err} (--force writes it all the same)"
            ) from err
        warn(f"the test read failed: {err}")
        return None
    bad = [one for one in look.readings if one.reason.quality is Quality.BAD]
    if bad and (by_hand or len(bad) == len(look.readings)) and not force:
        what = "; ".join(f"{one.point}: {technician.quality_words(one.reason)}" for one in bad[:5])
        raise Trouble(
            f"the test read gave no good value for {what}; nothing was written (--force writes it all the same)"
        )
    if bad:
        some = ", ".join(one.point for one in bad[:5]) + ("…" if len(bad) > 5 else "")
        warn(f"{len(bad)} of {len(look.readings)} points gave no good value ({some})")
    return look


async def _take_up(field: Field, device: Device, told: _Added, say: Any, warn: Any) -> None:
    """Let the running agent read the file again, and wait for the first values."""
    if not field.through_agent:
        say("No agent runs here: it reads the device from its next start (headgate run) on.")
        return
    reloaded = await field.reload()
    if reloaded.errors:
        warn("the agent did not take it up: " + "; ".join(reloaded.errors))
        return
    if device.name not in reloaded.started:
        warn(f"the agent that runs here does not use {told.file}; restart it with this file")
        return
    told.running = True
    wait_s = device.period_ms / 1000 + _FIRST_VALUE_S
    try:
        async with asyncio.timeout(wait_s):
            async for look in field.watch(device.name):
                told.values = commands_read.told(look)
                say("The agent reads it now:")
                for line in commands_read.lines(look)[1:]:
                    say(line)
                say(f"Look on with: headgate watch {technician.command_line(device.name)}")
                return
    except TimeoutError:
        warn(
            f"the agent took it up, and no value came within {technician.duration(wait_s)}; see headgate status"
        )
    except (DriverError, FieldError) as err:
        warn(f"the agent took it up, and it could not be watched: {err}")
