"""The Plantower PMS5003 particle sensor in its active mode: 9600 baud, 8N1, 32 bytes every 0.2 to 2.3 s.

A frame (PMS5003 series data manual V2.3, appendix I): 0x42 0x4D, the length 28, thirteen 16-bit numbers, then the
sum of all bytes before it; high bytes first. A frame whose sum is wrong gives CRC and no value; silence gives STALE.
"""

from __future__ import annotations

import asyncio
import os
import struct
import termios
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, ClassVar, Literal, get_args

import msgspec
import serial
from drivers.contract import (
    ConfigError, DeviceUnreachable, LineClaim, Point, PushDriver, Reason, Scan, Value, ValueType, boot_ns,
)  # fmt: skip

START, FRAME = b"BM", struct.Struct(">H13HH")
Number = Literal[
    "pm1_factory", "pm2_5_factory", "pm10_factory", "pm1", "pm2_5", "pm10",
    "over_0_3um", "over_0_5um", "over_1um", "over_2_5um", "over_5um", "over_10um",
]  # fmt: skip
NUMBERS: tuple[str, ...] = get_args(Number)  # in the order in which they are sent


class Pms5003Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    port: str
    stale_after_s: Annotated[float, msgspec.Meta(gt=2.3, le=3600)] = 10.0  #: 2.3 s pass between two frames


class Pms5003Point(Point, frozen=True, kw_only=True, forbid_unknown_fields=True):
    number: Number
    type: ValueType = ValueType.U16


class Pms5003Driver(PushDriver[Pms5003Options, Pms5003Point]):
    options_type: ClassVar[type[msgspec.Struct]] = Pms5003Options
    point_type: ClassVar[type[Point]] = Pms5003Point

    def __init__(self, name: str, options: Pms5003Options, points: Sequence[Pms5003Point]) -> None:
        super().__init__(name, options, points)
        self._bytes: asyncio.StreamReader
        self._transport: asyncio.ReadTransport | None = None
        for point in points:
            if point.type is not ValueType.U16:
                raise ConfigError(f"point {point.name!r}: type is {point.type}; the sensor sends u16")

    def line(self) -> LineClaim:
        return LineClaim(os.path.realpath(self.options.port), "9600 baud, 8N1", shared=False)

    async def connect(self) -> None:
        await self.close()
        try:
            port = serial.Serial(self.options.port, 9600, timeout=0, exclusive=True)  # skips what waits there
        except (OSError, termios.error) as err:  # pyserial's own error is an OSError, the system's is not
            raise DeviceUnreachable(f"{self.options.port}: {err}") from err
        self._bytes = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(self._bytes)
        self._transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, port)

    async def close(self) -> None:
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()  # and with it the port
            await asyncio.sleep(0)

    async def scans(self) -> AsyncIterator[Scan]:
        while self._transport is not None:
            try:
                async with asyncio.timeout(self.options.stale_after_s):
                    frame = await self._frame()
            except TimeoutError:
                raise DeviceUnreachable("the sensor is silent", Reason.STALE) from None
            except (OSError, EOFError) as err:
                raise DeviceUnreachable(f"{self.options.port}: the port is gone: {err}") from err
            yield scan(boot_ns(), self.points, frame)
        raise DeviceUnreachable("not connected")

    async def _frame(self) -> bytes:
        """What follows the next start of a frame; a damaged one is judged by its sum."""
        while True:
            try:
                await self._bytes.readuntil(START)
                return await self._bytes.readexactly(FRAME.size)
            except asyncio.LimitOverrunError as err:  # 64 KiB of noise
                await self._bytes.readexactly(err.consumed)


def scan(taken_at_ns: int, points: tuple[Pms5003Point, ...], frame: bytes) -> Scan:
    length, *numbers, told_sum = FRAME.unpack(frame)
    if length != FRAME.size - 2 or told_sum != sum(START + frame[:-2]):
        return Scan(taken_at_ns, points, [None] * len(points), dict.fromkeys(range(len(points)), Reason.CRC))
    values: list[Value | None] = [numbers[NUMBERS.index(point.number)] for point in points]
    return Scan(taken_at_ns, points, values)
