"""`headgate watch`: values as they come: a live table on a terminal, plain lines everywhere else."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import click
import msgspec

from agent import technician
from agent.commands_read import told, utc
from agent.field import Field, FieldError, Look, Shown
from agent.technician import EXITS, Cannot, Trouble, Way
from drivers.contract import DriverError, Quality

if TYPE_CHECKING:
    from rich.console import RenderableType

_SPARKS: Final = "▁▂▃▄▅▆▇█"
_ASCII_SPARKS: Final = "_.-=+*#@"
_REMEMBERED: Final = 60  #: values a point, for its sparkline
_DRAWN_EVERY_S: Final = 0.25
_OLD_S: Final = 10.0


@click.command(epilog=EXITS)
@technician.field_options
@click.argument("devices", nargs=-1)
@click.option("--plain", is_flag=True, help="One line a value, also on a terminal.")
@click.option("--seconds", type=click.FloatRange(0.1), help="End after so long (exit 0).")
@click.option("--count", type=click.IntRange(1), help="End after so many scans (exit 0).")
def watch(
    way: Way,
    devices: tuple[str, ...],
    seconds: float | None,
    count: int | None,
    *,
    plain: bool,
    as_json: bool,
) -> None:
    """See the values of DEVICES (all, unless named) as they come, until Ctrl-C.

    Shows value, unit, quality in words, age, and how the value went. While the agent runs this is what it reads itself;
    nothing is asked twice. With --json: one scan a line.
    """
    technician.run(_watch(way, devices, seconds, count, plain=plain, as_json=as_json))


async def _watch(
    way: Way,
    devices: tuple[str, ...],
    seconds: float | None,
    count: int | None,
    *,
    plain: bool,
    as_json: bool,
) -> int:
    chosen = devices or _configured(way)
    live = not plain and not as_json and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    screen: _Screen = _Live() if live else _JsonLines() if as_json else _Plain()
    async with way.field(configured=True) as field:
        counted = asyncio.Semaphore(0)
        tasks = [
            asyncio.create_task(_follow(field, name, screen, counted), name=f"watch[{name}]")
            for name in chosen
        ]
        ended = asyncio.create_task(_end(seconds, count, counted), name="watch end")
        try:
            screen.begin()
            while not ended.done() and not all(task.done() for task in tasks):
                await asyncio.wait(
                    [*tasks, ended], timeout=_DRAWN_EVERY_S, return_when=asyncio.FIRST_COMPLETED
                )
                screen.draw()
                tasks = [task for task in tasks if not _over(task)]
                if not tasks:
                    break
        finally:
            screen.end()
            for task in (*tasks, ended):
                task.cancel()
            await asyncio.gather(*tasks, ended, return_exceptions=True)
    if not ended.done() or ended.cancelled():
        raise Trouble("there is nothing left to watch")
    return technician.OK


def _configured(way: Way) -> tuple[str, ...]:
    """Every device that is read. Raises `Cannot`."""
    from agent.configuration import check

    if not way.is_there():
        raise way.missing()
    checked = check(way.file)
    if checked.config is None:
        raise Cannot("; ".join(str(error) for error in checked.errors))
    names = tuple(device.name for device in checked.config.device if device.enabled)
    if not names:
        raise Cannot(
            f"{way.file} has no device to watch; `headgate scan` finds some, `headgate add` adds one"
        )
    return names


async def _follow(field: Field, name: str, screen: _Screen, counted: asyncio.Semaphore) -> None:
    async for look in field.watch(name):
        screen.take(look)
        counted.release()


async def _end(seconds: float | None, count: int | None, counted: asyncio.Semaphore) -> None:
    async def enough() -> None:
        for _ in range(count or 0):
            await counted.acquire()
        if count is None:
            await asyncio.Event().wait()

    try:
        await asyncio.wait_for(enough(), seconds)
    except TimeoutError:
        return


def _over(task: asyncio.Task[None]) -> bool:
    """Whether it ended. An error of one device is told; the others go on, if there are others."""
    if not task.done():
        return False
    err = task.exception() if not task.cancelled() else None
    if isinstance(err, FieldError | DriverError):
        technician.note(f"headgate: {err}")
    elif err is not None:
        raise err
    return True


# ---------------------------------------------------------------------------------------- screens


class _Screen:
    """Where looks go."""

    def begin(self) -> None:
        """Before the first look."""

    def take(self, look: Look) -> None:
        """One look has come."""

    def draw(self) -> None:
        """Some time has passed."""

    def end(self) -> None:
        """After the last."""


class _JsonLines(_Screen):
    def take(self, look: Look) -> None:
        technician.say(technician.as_json(told(look), indent=0))


class _Plain(_Screen):
    """One line a value: time, device, point, value, unit, quality. Fits a log as well as a terminal."""

    def take(self, look: Look) -> None:
        at = utc(look.taken_at_ns)[11:23]
        for one in look.readings:
            value = f"{technician.number(one.value)} {one.unit}".rstrip()
            line = f"{at} {look.device} {one.point} {value} {technician.quality_words(one.reason)}"
            quality = one.reason.quality
            good = quality is Quality.GOOD
            technician.say(line if good else technician.painted(line, technician.QUALITY_COLOURS[quality]))


class _Row(msgspec.Struct):
    """One point of one device, as it was seen last."""

    shown: Shown
    at_ns: int
    before: deque[float]


class _Live(_Screen):
    """A table that is drawn again and again."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._rows: dict[tuple[str, str], _Row] = {}
        self._console = Console(no_color=not technician.in_colour(), highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
        self._sparks = _SPARKS if "utf" in (self._console.encoding or "").lower() else _ASCII_SPARKS

    def begin(self) -> None:
        self._live.start()
        self.draw()

    def take(self, look: Look) -> None:
        for one in look.readings:
            row = self._rows.get((look.device, one.point))
            if row is None:
                row = self._rows[look.device, one.point] = _Row(
                    one, look.taken_at_ns, deque(maxlen=_REMEMBERED)
                )
            row.shown, row.at_ns = one, look.taken_at_ns
            if isinstance(one.value, int | float):
                row.before.append(float(one.value))

    def draw(self) -> None:
        self._live.update(self._table(), refresh=True)

    def end(self) -> None:
        self._live.stop()

    def _table(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        width = min(self._console.width, 120)
        table = Table(box=None, pad_edge=False, width=width, expand=True)
        table.add_column("device", max_width=14, no_wrap=True, overflow="ellipsis")
        table.add_column("point", max_width=18, no_wrap=True, overflow="ellipsis")
        table.add_column("value", justify="right", max_width=12, no_wrap=True, overflow="ellipsis")
        table.add_column("unit", max_width=6, no_wrap=True, overflow="ellipsis")
        table.add_column("quality", max_width=20, no_wrap=True, overflow="ellipsis")
        table.add_column("age", justify="right", no_wrap=True)
        table.add_column("", no_wrap=True, ratio=1)
        now_ns = time.time_ns()
        sparks = max(6, width - 76)
        device_before = ""
        room = self._console.height - 2  # the heading, and the line that says what is left out
        fits = len(self._rows) <= room + 1
        for (device, point), row in list(self._rows.items())[: None if fits else max(1, room)]:
            quality = row.shown.reason.quality
            style = "" if quality is Quality.GOOD else technician.QUALITY_COLOURS[quality]
            age_s = max(0.0, (now_ns - row.at_ns) / 1e9)
            words = technician.quality_words(row.shown.reason)
            table.add_row(
                Text(device if device != device_before else ""),
                Text(point),
                Text(technician.number(row.shown.value), style=style),
                Text(row.shown.unit),
                Text(words, style=technician.QUALITY_COLOURS[quality]),
                Text(_age(age_s), style="yellow" if age_s > _OLD_S else ""),
                Text(sparkline(list(row.before)[-sparks:], self._sparks)),
            )
            device_before = device
        if not self._rows:
            table.add_row(Text("waiting…"), *[Text("")] * 6)
        if fits:
            return table
        left = len(self._rows) - max(1, room)
        return Group(table, Text(f"… and {left} more: name devices, or --plain shows all of them"))


def _age(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def sparkline(values: Sequence[float], marks: str = _SPARKS) -> str:
    """How the value went, from its least to its greatest; one that does not change lies in the middle."""
    if not values:
        return ""
    low, high = min(values), max(values)
    if high == low:
        return marks[len(marks) // 2] * len(values)
    return "".join(marks[round((value - low) / (high - low) * (len(marks) - 1))] for value in values)
