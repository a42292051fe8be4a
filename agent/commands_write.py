"""`headgate write`: one point, with the old value shown, a question, and the value read back."""

from __future__ import annotations

import sys

import click

from agent import technician
from agent.commands_read import chosen, told
from agent.field import Field, Look
from agent.technician import EXITS, Cannot, Trouble, Way
from drivers.contract import Value

_TRUE = ("true", "on", "yes")
_FALSE = ("false", "off", "no")


@click.command(epilog=EXITS)
@technician.field_options
@click.argument("device")
@click.argument("point")
@click.argument("value")
@click.option("--yes", is_flag=True, help="Do not ask.")
def write(way: Way, device: str, point: str, value: str, *, yes: bool, as_json: bool) -> None:
    """Write VALUE (as `headgate read` shows it: after scale and offset) to POINT of DEVICE, and read it back.

    Shows the old value first and asks. true/false, on/off are for points of bits. A value below zero needs `--` before
    it: headgate write boiler setpoint -- -5. Exit 1 if it reads back as something else.
    """
    technician.run(_write(way, device, point, value, yes=yes, as_json=as_json))


async def _write(way: Way, device: str, point: str, text: str, *, yes: bool, as_json: bool) -> int:
    async with way.field(configured=True) as field:
        before = await _before(field, device, point)
        old = before.readings[0]
        wanted = value_of(text, old.value)
        unit = f" {old.unit}" if old.unit else ""
        shown = technician.number(old.value) if old.reason.has_value else technician.quality_words(old.reason)
        if not as_json:
            technician.say(f"{device} {point}: now {shown}{unit if old.reason.has_value else ''}")
        if not yes:
            await _ask(f"write {technician.number(wanted)}{unit}?")
        after = chosen(await field.write(device, point, wanted), (point,))
    new = after.readings[0]
    same = new.reason.has_value and _same(new.value, wanted)
    if as_json:
        was, is_ = told(before)["readings"], told(after)["readings"]
        document = {
            "device": device,
            "point": point,
            "wanted": wanted,
            "before": was,
            "after": is_,
            "written": same,
        }
        technician.say(technician.as_json(document))
    else:
        reads = technician.number(new.value) if new.reason.has_value else technician.quality_words(new.reason)
        technician.say(f"{device} {point}: reads back {reads}{unit if new.reason.has_value else ''}")
    if not same:
        text = f"{point}: wrote {technician.number(wanted)}, and it does not read back as that"
        if not as_json:
            raise Trouble(text)
        technician.note(f"headgate: {text}")  # the document is out, and says so
    return technician.OK if same else technician.TROUBLE


async def _before(field: Field, device: str, point: str) -> Look:
    """What the point holds now; a point that cannot be read may still be written."""
    return chosen(await field.read(device), (point,))


async def _ask(question: str) -> None:
    if not sys.stdin.isatty():
        raise Cannot("nobody is there to ask; give --yes to write without a question")
    if (await technician.answer_to(f"{question} [y/N]:")).lower() not in ("y", "yes"):
        raise Cannot("nothing was written")


def value_of(text: str, old: Value | None) -> Value:
    """What the person typed, by what the point holds."""
    if isinstance(old, str):
        return text
    word = text.strip().lower()
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    try:
        return int(text, 0)
    except ValueError:
        pass
    try:
        return float(text.replace(",", "."))
    except ValueError:
        if old is None:
            return text
        raise Cannot(f"{text!r} is not a number, nor true or false") from None


def _same(read: Value | None, wanted: Value) -> bool:
    if isinstance(read, str) or isinstance(wanted, str) or read is None:
        return read == wanted
    # A float register holds seven digits of what was typed.
    return abs(float(read) - float(wanted)) <= 1e-6 * max(1.0, abs(float(wanted)))
