"""`headgate read`: one fresh read of a configured device, through the agent where it runs."""

from __future__ import annotations

import datetime

import click

from agent import technician
from agent.field import Look, Shown, UnknownDevice
from agent.technician import EXITS, Way
from config.load import nearest
from drivers.contract import Quality


@click.command(epilog=EXITS)
@technician.field_options
@click.argument("device")
@click.argument("points", nargs=-1)
@click.option("--raw", is_flag=True, help="Also the raw value, as the device encodes it.")
def read(way: Way, device: str, points: tuple[str, ...], *, raw: bool, as_json: bool) -> None:
    """Read DEVICE once, now, and show its points (or only those named).

    A device that speaks by itself is listened to until its next message. Exit 1 if any value shown is bad.
    """
    technician.run(_read(way, device, points, raw=raw, as_json=as_json))


async def _read(way: Way, device: str, points: tuple[str, ...], *, raw: bool, as_json: bool) -> int:
    async with way.field(configured=True) as field:
        look = chosen(await field.read(device), points)
    if as_json:
        technician.say(technician.as_json(told(look)))
    else:
        for line in lines(look, raw=raw):
            technician.say(line)
    return technician.TROUBLE if any_bad(look) else technician.OK


def chosen(look: Look, points: tuple[str, ...]) -> Look:
    """Only these points, in the order asked. Raises `UnknownDevice`."""
    if not points:
        return look
    by_name = {one.point: one for one in look.readings}
    for name in points:
        if name not in by_name:
            raise UnknownDevice(f"{look.device} has no point {name!r}{nearest(name, by_name)}")
    return Look(look.device, look.taken_at_ns, [by_name[name] for name in points])


def any_bad(look: Look) -> bool:
    return any(one.reason.quality is Quality.BAD for one in look.readings)


def told(look: Look) -> dict[str, object]:
    """As JSON: names for the reason and the quality, and the time as everybody reads it."""
    return {
        "device": look.device,
        "taken_at": utc(look.taken_at_ns),
        "readings": [
            {
                "point": one.point, "value": one.value, "unit": one.unit, "raw": one.raw,
                "quality": one.reason.quality.name.lower(), "reason": one.reason.name.lower(),
            }
            for one in look.readings
        ],
    }  # fmt: skip


def utc(at_ns: int) -> str:
    at = datetime.datetime.fromtimestamp(at_ns / 1e9, datetime.UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def lines(look: Look, *, raw: bool = False) -> list[str]:
    """A look for a person: point, value, unit, quality in words."""
    at = datetime.datetime.fromtimestamp(look.taken_at_ns / 1e9, datetime.UTC).astimezone()
    head = f"{look.device}, {at:%H:%M:%S}"
    rows = [row(one, raw=raw) for one in look.readings]
    widths = technician.columns(rows, lead="  ", right=(1,))
    painted = [
        line if one.reason.quality is Quality.GOOD else colour(line, one)
        for line, one in zip(widths, look.readings, strict=True)
    ]
    return [head, *painted]


def row(one: Shown, *, raw: bool = False) -> list[str]:
    cells = [one.point, technician.number(one.value), one.unit, technician.quality_words(one.reason)]
    return [*cells, f"raw {technician.number(one.raw)}"] if raw else cells


def colour(line: str, one: Shown) -> str:
    return technician.painted(line, technician.QUALITY_COLOURS[one.reason.quality])
