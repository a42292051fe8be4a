"""A PMS5003 on a pty: it frames as the data manual says, and has faults to switch on."""

from __future__ import annotations

import contextlib
import os
import struct
import tty
from collections.abc import Iterator
from pathlib import Path

from drivers.conformance import Fault
from drivers.contract import Value


def frame(numbers: list[int]) -> bytes:
    """Thirteen numbers as the sensor sends them (data manual V2.3, appendix I)."""
    head = struct.pack(">2sH13H", b"BM", 28, *numbers)
    return head + struct.pack(">H", sum(head))


class Sensor:
    """`port` is a link, as udev makes them, so a sensor that was plugged in again keeps its name."""

    def __init__(self, folder: Path) -> None:
        self.port = folder / "sensor"
        self.numbers = [5, 9, 12, 4, 7, 11, 900, 250, 60, 8, 3, 1, 0x9700]
        self.silent = False
        self.damaged = False
        self._fd = -1
        self.plug()

    def plug(self) -> None:
        self._fd, other = os.openpty()
        tty.setraw(other)
        os.set_blocking(self._fd, False)
        self.port.symlink_to(os.ttyname(other))
        os.close(other)

    def unplug(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self.port.unlink()

    def send(self, data: bytes) -> None:
        if self._fd >= 0 and not self.silent:
            with contextlib.suppress(BlockingIOError):
                os.write(self._fd, data)

    # What the conformance suite does to it.

    def speak(self) -> None:
        sent = frame(self.numbers)
        self.send(sent.replace(b"\x00\x07", b"\x00\x17") if self.damaged else sent)

    def change(self) -> None:
        self.numbers = [number + 1 for number in self.numbers]

    def truth(self) -> dict[str, Value]:
        return {"pm2_5": self.numbers[4], "pm10": self.numbers[5]}

    def silence(self) -> Fault:
        return Fault(lambda: setattr(self, "silent", True), lambda: setattr(self, "silent", False))

    def faults(self) -> dict[str, Fault]:
        return {
            "unplugged": Fault(self.unplug, self.plug),
            "damaged": Fault(lambda: setattr(self, "damaged", True), lambda: setattr(self, "damaged", False)),
            "noise": Fault(lambda: self.send(b"\x00\xffB" * 20), lambda: self.send(b"M" * 40)),
            "cut": Fault(lambda: self.send(frame(self.numbers)[:17]), lambda: self.send(bytes(32))),
        }


@contextlib.contextmanager
def sensor(folder: Path) -> Iterator[Sensor]:
    made = Sensor(folder)
    try:
        yield made
    finally:
        made.unplug()
