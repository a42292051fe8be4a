"""Drivers that do what a driver must not: block, crash, hang. Installed for a test as a stranger's package would be."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import ClassVar

import msgspec

from drivers.contract import Driver, Point, PointRefused, PushDriver, Scan, Value, boot_ns

_ENTRY_POINTS = """[headgate.drivers]
naughty = tests.fakes.bad_drivers:Naughty
chatty = tests.fakes.bad_drivers:Chatty
fake_meter = tests.fakes.meter:SoundMeter
fake_listener = tests.fakes.meter:SoundListener
"""


def install(folder: Path) -> Path:
    """What pip would write; put the folder on sys.path or PYTHONPATH."""
    info = folder / "bad_drivers-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad-drivers\nVersion: 1\n")
    (info / "entry_points.txt").write_text(_ENTRY_POINTS)
    return folder


class NaughtyOptions(msgspec.Struct, frozen=True, kw_only=True):
    secret: str = ""
    marker: str = ""  #: a file: while it is there, the driver does this:
    deed: str = "block"  #: block, crash, exit, raise, hang, shout
    for_s: float = 30.0


class Naughty(Driver[NaughtyOptions, Point]):
    """Counts its reads and remembers the count; what it was told is read back."""

    options_type: ClassVar[type[msgspec.Struct]] = NaughtyOptions
    point_type: ClassVar[type[Point]] = Point

    def __init__(self, name: str, options: NaughtyOptions, points: Sequence[Point]) -> None:
        super().__init__(name, options, points)
        self.reads = 0
        self.told: dict[str, Value] = {}
        self.news = False

    async def connect(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def read(self, points: Sequence[Point]) -> Scan:
        self.reads += 1
        self.news = True
        if self.options.marker and Path(self.options.marker).exists():
            await self.misbehave()
        values = [self.told.get(point.name, float(self.reads)) for point in points]
        return Scan(boot_ns(), tuple(points), values)

    async def write(self, point: Point, value: Value) -> None:
        if value == 13.0:
            raise PointRefused(point.name, "not this one")
        self.told[point.name] = value

    def remembered(self) -> bytes | None:
        news, self.news = self.news, False
        return str(self.reads).encode() if news else None

    def recall(self, remembered: bytes) -> None:
        if remembered.isdigit():
            self.reads = int(remembered)

    async def misbehave(self) -> None:
        match self.options.deed:
            case "block":
                time.sleep(self.options.for_s)  # noqa: ASYNC251 - the deed
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "exit":
                os._exit(3)
            case "raise":
                raise ZeroDivisionError("division by zero")
            case "hang":
                await asyncio.sleep(self.options.for_s)
            case "shout":
                print("x" * 100_000)


class Chatty(PushDriver[NaughtyOptions, Point]):
    """Speaks every 10 ms."""

    options_type: ClassVar[type[msgspec.Struct]] = NaughtyOptions
    point_type: ClassVar[type[Point]] = Point

    async def connect(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def scans(self) -> AsyncIterator[Scan]:
        said = 0
        while True:
            await asyncio.sleep(0.01)
            if self.options.marker and Path(self.options.marker).exists():
                os._exit(3)
            said += 1
            self.overruns = said // 10
            yield Scan(boot_ns(), self.points[:1], [float(said)])
