"""A meter that nobody described: a register map made at random from a seed, known to itself alone, and a display.

Values stand at a random base, in holding or input registers, as 16, 32 or 64-bit whole numbers or floats in any order,
scaled or not, among decoys (settings, counters, text) and holes that it refuses to read.

    python -m tests.fakes.unknown_meter --seed 7 --link /tmp/unknown

serves it by Modbus RTU on a pty behind that name until SIGTERM. A line on its stdin (or `--display-file`) makes it tell
its display; its map is told to nobody.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import struct
import sys
import tty
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HOLDING, INPUT = 3, 4
ORDERS = ("ABCD", "CDAB", "BADC", "DCBA")


@dataclass
class Shown:
    """One quantity on the display."""

    name: str
    unit: str
    value: float
    decimals: int
    function: int
    register: int
    kind: str  #: u16, i16, u32, i32, i64, f32
    order: str
    scale: float
    noise: float
    around: float = 0.0

    @property
    def text(self) -> str:
        return f"{self.value_shown:.{self.decimals}f}"

    @property
    def value_shown(self) -> float:
        """What the registers hold, scaled: the display shows what the meter sends."""
        return self.value if self.kind == "f32" else round(self.value / self.scale) * self.scale

    def words(self) -> list[int]:
        if self.kind == "f32":
            data = struct.pack(">f", self.value)
        else:
            bits = int(self.kind[1:])
            data = (round(self.value / self.scale) & (1 << bits) - 1).to_bytes(bits // 8, "big")
        found = [data[i] << 8 | data[i + 1] for i in range(0, len(data), 2)]
        if self.order in ("BADC", "DCBA") and len(found) > 1:
            found = [(word & 0xFF) << 8 | word >> 8 for word in found]
        return found[::-1] if self.order in ("CDAB", "DCBA") else found


QUANTITIES = (
    ("voltage", "V", (219.0, 241.0), 1),
    ("current", "A", (0.5, 31.0), 2),
    ("power", "W", (-2500.0, 9000.0), 0),
    ("frequency", "Hz", (49.9, 50.1), 2),
    ("energy", "kWh", (1200.0, 250000.0), 1),
    ("temperature", "Cel", (-12.0, 65.0), 1),
)


class UnknownMeter:
    """The device: its registers, its display, and its answers."""

    def __init__(self, seed: int, *, moving: bool = False) -> None:
        rng = self._rng = random.Random(seed)
        self._moving = moving
        self.unit = rng.randrange(1, 33)
        self.longest = rng.choice((125, 125, 64, 32))
        self.shown: list[Shown] = []
        self._fixed: dict[tuple[int, int], int] = {}
        function = rng.choice((HOLDING, INPUT))
        base = rng.choice((rng.randrange(0, 2000), rng.randrange(0, 64000)))
        family, order = (
            rng.choice(("16", "i32", "u32", "f32", "i64")),
            rng.choice(ORDERS[:2] * 3 + ORDERS[2:]),
        )
        at = base
        for name, unit, (low, high), decimals in rng.sample(QUANTITIES, 4):
            value = rng.uniform(low, high)
            kind = family
            digits = (
                rng.choice((decimals, decimals, decimals + 1))
                if family in ("i32", "u32", "i64")
                else decimals
            )
            scale = 10.0**-digits
            if family == "16":
                kind = "i16" if low < 0 else "u16"
                if abs(value / scale) > 32000:
                    kind = "u32"
            elif family == "u32" and value < 0:
                kind = "i32"
            if family == "f32":
                digits, scale = decimals, 1.0
            if rng.random() < 0.4:
                at += rng.randrange(1, 7)  # a hole
            if rng.random() < 0.4:
                for _ in range(rng.randrange(1, 4)):  # a decoy
                    self._fixed[function, at] = rng.choice(
                        (0, 1, 9600, rng.randrange(100), rng.randrange(65536))
                    )
                    at += 1
            one = Shown(
                name, unit, value, decimals, function, at, kind, "ABCD" if kind.endswith("16") else order, scale,
                0.002 * abs(value), value,
            )  # fmt: skip
            self.shown.append(one)
            at += len(one.words())
        # Settings, elsewhere and in the other table too.
        other = HOLDING + INPUT - function
        for table, first, count in ((function, base + 1000, 8), (other, rng.randrange(0, 3000), 12)):
            for i in range(count):
                self._fixed[table, (first + i) % 65536] = rng.choice(
                    (0, 1, rng.randrange(300), rng.randrange(65536))
                )
        for i, pair in enumerate(struct.unpack(">4H", b"UM-%05d" % (seed % 100000))):
            self._fixed[other, 5000 + i] = pair

    def registers(self) -> dict[tuple[int, int], int]:
        """As they are now, by function and address."""
        now = dict(self._fixed)
        for one in self.shown:
            for i, word in enumerate(one.words()):
                now[one.function, one.register + i] = word
        return now

    def display(self) -> dict[str, str]:
        """What it shows now: `voltage` -> `230.5 V`."""
        return {one.name: f"{one.text} {one.unit}" for one in self.shown}

    def move(self) -> None:
        if self._moving:
            for one in self.shown:
                one.value = one.around + self._rng.uniform(-one.noise, one.noise)

    def answer(self, pdu: bytes) -> bytes:
        function = pdu[0]
        if function not in (HOLDING, INPUT) or len(pdu) != 5:
            return bytes([function | 0x80, 1])
        first, count = struct.unpack(">HH", pdu[1:])
        if not 1 <= count <= self.longest:
            return bytes([function | 0x80, 3])
        now = self.registers()
        found = [now.get((function, address)) for address in range(first, first + count)]
        if None in found:
            return bytes([function | 0x80, 2])
        return bytes([function, 2 * count]) + struct.pack(f">{count}H", *(word or 0 for word in found))


def crc16(data: bytes) -> bytes:
    """Modbus over serial line 1.02, 6.2.2."""
    crc = 0xFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ 0xA001 if crc & 1 else crc >> 1
    return struct.pack("<H", crc)


def plain(registers: dict[int, int]) -> Callable[[bytes], bytes]:
    """A device with these holding registers and nothing else; a register that is written holds what was written."""

    def answer(pdu: bytes) -> bytes:
        first, count = struct.unpack(">HH", pdu[1:])
        if pdu[0] == 6 and first in registers:
            registers[first] = count
            return pdu
        if pdu[0] != HOLDING:
            return bytes([pdu[0] | 0x80, 1])
        found = [registers.get(address) for address in range(first, first + count)]
        if None in found:
            return bytes([pdu[0] | 0x80, 2])
        return bytes([pdu[0], 2 * count]) + struct.pack(f">{count}H", *(word or 0 for word in found))

    return answer


class OnPty:
    """Devices at the far end of a serial line: unit -> answer to a request's PDU (`None`: silence). `link` is the
    port's name."""

    def __init__(self, units: dict[int, Callable[[bytes], bytes | None]], link: Path) -> None:
        self.units = units
        self.link = link
        self.requests = 0
        self._buffer = b""
        self._master, reader = os.openpty()
        tty.setraw(reader)
        self._reader = reader  # held open, so that the port survives its users
        link.unlink(missing_ok=True)
        link.symlink_to(os.ttyname(reader))
        asyncio.get_running_loop().add_reader(self._master, self._readable)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._master)
        os.close(self._master)
        os.close(self._reader)
        self.link.unlink(missing_ok=True)

    def _readable(self) -> None:
        self._buffer += os.read(self._master, 1024)
        while len(self._buffer) >= 8:
            frame = self._buffer[:8]
            if crc16(frame[:6]) != frame[6:]:
                self._buffer = self._buffer[1:]
                continue
            self._buffer = self._buffer[8:]
            self.requests += 1
            answer = self.units.get(frame[0])
            told = answer(frame[1:6]) if answer is not None else None
            if told is not None:
                body = frame[:1] + told
                os.write(self._master, body + crc16(body))


async def _serve(seed: int, link: Path, display_file: Path | None, *, moving: bool) -> None:
    meter = UnknownMeter(seed, moving=moving)
    served = OnPty({meter.unit: meter.answer}, link)
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, over.set)

    def tell() -> None:
        if not sys.stdin.readline():
            loop.remove_reader(sys.stdin)
            return
        print(" | ".join(f"{name} {text}" for name, text in meter.display().items()), flush=True)

    with contextlib.suppress(OSError, ValueError, PermissionError):
        loop.add_reader(sys.stdin, tell)
    print(link, flush=True)
    while not over.is_set():
        meter.move()
        if display_file is not None:
            display_file.write_text("\n".join(f"{n} {t}" for n, t in meter.display().items()) + "\n")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), 1.0)
    served.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=None, help="unset: a new meter every time")
    parser.add_argument("--link", type=Path, required=True, help="name of the port to make")
    parser.add_argument("--display-file", type=Path, help="write the display here once a second")
    parser.add_argument("--moving", action="store_true", help="the values move a little")
    given = parser.parse_args()
    seed = given.seed if given.seed is not None else random.SystemRandom().randrange(1 << 30)
    asyncio.run(_serve(seed, given.link, given.display_file, moving=given.moving))


if __name__ == "__main__":
    main()
