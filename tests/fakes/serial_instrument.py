"""A free-running instrument on a real pty, with its own count of what it offered.

It behaves as a wire does: what nobody takes is lost (and counted), and pulling the plug hangs up the reader's port.
The reader's end is a symbolic link, as udev makes them, so a port that was plugged in again keeps its name.

    python -m tests.fakes.serial_instrument --link /tmp/scale --period-ms 100 --seed 7

writes `W=  123.4 kg, T= 21.56 C` lines until SIGTERM, then prints its counts as one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import signal
import struct
import tty
from collections.abc import Callable, Iterator
from pathlib import Path

from drivers.checks import crc16_modbus


class SerialInstrument:
    """One end of a serial line. `frames` and `bytes_lost` are its own books, whoever reads."""

    def __init__(self, link: Path) -> None:
        self.link = link
        self.frames = 0  #: frames put on the wire whole
        self.bytes_lost = 0  #: bytes that found nobody
        self._fd = -1
        self.plug()

    @property
    def port(self) -> str:
        return str(self.link)

    def plug(self) -> None:
        """Put the port there; after `unplug` it is a new one behind the same name."""
        self._fd, reader = os.openpty()
        tty.setraw(reader)
        os.set_blocking(self._fd, False)
        name = os.ttyname(reader)
        os.close(reader)
        fresh = self.link.with_name(self.link.name + ".new")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(name)
        fresh.replace(self.link)

    def unplug(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self.link.unlink(missing_ok=True)

    def send(self, frame: bytes) -> None:
        """One frame on the wire."""
        if self._write(frame):
            self.frames += 1

    def noise(self, data: bytes) -> None:
        """Bytes that are no frame."""
        self._write(data)

    async def send_slowly(self, frame: bytes, gap_s: float = 0.001) -> None:
        """One frame, byte by byte."""
        for index in range(len(frame)):
            self._write(frame[index : index + 1])
            await asyncio.sleep(gap_s)
        self.frames += 1

    def heard(self) -> bytes:
        """What the reader has sent to us since the last look."""
        try:
            return os.read(self._fd, 65_536)
        except OSError:  # EAGAIN: nothing; EIO: nobody has the port open
            return b""

    def _write(self, data: bytes) -> bool:
        if self._fd < 0:
            self.bytes_lost += len(data)
            return False
        try:
            written = os.write(self._fd, data)
        except BlockingIOError:
            written = 0
        self.bytes_lost += len(data) - written
        return written == len(data)

    async def run(self, period_s: float, frame: Callable[[int], bytes]) -> None:
        """Send `frame(0)`, `frame(1)`, … at their times until cancelled; a late loop catches up, as a clock does."""
        loop = asyncio.get_running_loop()
        begin_s = loop.time()
        index = 0
        while True:
            self.send(frame(index))
            index += 1
            await asyncio.sleep(max(0.0, begin_s + index * period_s - loop.time()))


@contextlib.contextmanager
def serial_instrument(folder: Path) -> Iterator[SerialInstrument]:
    instrument = SerialInstrument(folder / "instrument")
    try:
        yield instrument
    finally:
        instrument.unplug()


def scale_line(rng: random.Random) -> Callable[[int], bytes]:
    """A weighing instrument: a slow swing, one digit of noise."""

    def line(index: int) -> bytes:
        weight_kg = 123.4 + 20 * math.sin(index / 300) + rng.gauss(0, 0.05)
        temperature_c = 21.5 + math.sin(index / 2000) + rng.gauss(0, 0.02)
        return f"W={weight_kg:7.1f} kg, T={temperature_c:6.2f} C\r\n".encode()

    return line


def binary_frame(flow: int, pressure: float, total: int) -> bytes:
    """AA 55, then u16, f32, u32 little-endian, then CRC-16/MODBUS over the values, low byte first."""
    body = struct.pack("<HfI", flow, pressure, total)
    return b"\xaa\x55" + body + crc16_modbus(body).to_bytes(2, "little")


async def _serve(link: Path, period_s: float, seed: int) -> None:
    instrument = SerialInstrument(link)
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(instrument.run(period_s, scale_line(random.Random(seed))))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task
    instrument.unplug()
    print(json.dumps({"frames": instrument.frames, "bytes_lost": instrument.bytes_lost}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--link", type=Path, required=True, help="name of the port to make")
    parser.add_argument("--period-ms", type=float, default=100)
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    asyncio.run(_serve(given.link, given.period_ms / 1000, given.seed))


if __name__ == "__main__":
    main()
