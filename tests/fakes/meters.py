"""An electricity meter by IEC 62056-21 and a bus of SDI-12 sensors, each on a pty, with faults to be switched on.

Both are written from their standards, not from our drivers, and answer only what their standards say they answer.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path

from tests.fakes.pty_peer import PtyPeer

# ------------------------------------------------------------------------------------------------------ IEC 62056-21

#: A readout as a Landis+Gyr E350 sends it (user manual D000027979, series 2), with its letters and blanks.
E350 = (
    "F.F(00)\r\n0.0(          120858)\r\nC.1.0(13647123)\r\nC.1.1(        )\r\n1.8.1(042951.721*kWh)\r\n"
    "1.8.2(018609.568*kWh)\r\n2.8.1(000000.302*kWh)\r\n2.8.2(000010.188*kWh)\r\n1.8.0(061561.289*kWh)\r\n"
    "2.8.0(000010.490*kWh)\r\n15.8.0(061571.780*kWh)\r\nC.7.0(0008)\r\n32.7(241*V)\r\n52.7(243*V)\r\n72.7(242*V)\r\n"
    "31.7(000.35*A)\r\n51.7(000.52*A)\r\n71.7(000.47*A)\r\n82.8.1(0000)\r\n82.8.2(0000)\r\n0.2.0(M26)\r\nC.5.0(0401)\r\n!\r\n"
)
_SPEED_OF = {"0": 0, "1": 600, "2": 1200, "3": 2400, "4": 4800, "5": 9600, "6": 19200,
             "A": 600, "B": 1200, "C": 2400, "D": 4800, "E": 9600, "F": 19200}  # fmt: skip


class IecMeter:
    """Modes A, B and C by its identification's fifth character. What is heard or said at another speed than the line's
    is noise. It answers no sooner than a wire would have carried the question, which a pty passes at once."""

    def __init__(
        self, link: Path, *, identification: str = "/LGZ4ZMF100AC.M26", readout: str = E350, base: int = 300
    ) -> None:
        self.peer = PtyPeer(link, self._react)
        self.identification = identification  #: its fifth character tells the mode and the speed
        self.readout = readout
        self.address = ""
        self.speeds: deque[int] = deque(maxlen=8)  #: at which the last readouts were sent
        self.sessions = 0
        self.reaction_s = 0.005  # 0.2 s in the standard; a test need not wait for it
        self.parity_bit = False
        self.echo = False
        self.break_check = False
        self.stop_after: int | None = None  #: characters of the readout
        self.base = base  #: the speed of the sign-on
        self._speed = base
        self._rng = random.Random(1)

    def _react(self, heard: bytes) -> bytes:
        if self.peer.speed != self._speed:
            return b""  # noise
        if self.echo:
            self.peer.say(heard)
        heard = bytes(byte & 0x7F for byte in heard)
        while (end := heard.find(b"\r\n")) >= 0:
            message, heard = heard[:end], heard[end + 2 :]
            self._message(message.lstrip(b"\0").decode("ascii"))
        return heard

    def _message(self, message: str) -> None:
        if message.startswith("/?") and message.endswith("!"):
            if message[2:-1] in ("", self.address):
                self.sessions += 1
                self.peer.later(self._identify())
        elif message.startswith("\x06") and len(message) == 4:
            self.peer.later(self._acknowledged(_SPEED_OF[message[2]] or self.base))

    async def _acknowledged(self, speed: int) -> None:
        await asyncio.sleep(6 * 10 / self._speed)
        await self._send(speed)

    async def _identify(self) -> None:
        await asyncio.sleep(5 * 10 / self._speed + self.reaction_s)
        self._say(self.identification + "\r\n")
        letter = self.identification[4]
        if letter in "ABCDEF":
            await self._send(_SPEED_OF[letter])
        elif letter not in "0123456":
            await self._send(self.base)

    async def _send(self, speed: int) -> None:
        self._speed = speed
        await asyncio.sleep(max(self.reaction_s, 0.03))
        block = "\x02" + self.readout + "\x03"
        check = 0
        for char in block[1:]:
            check ^= ord(char)
        block += chr(check ^ 1 if self.break_check else check)
        self.speeds.append(speed)
        block = block[: self.stop_after]
        for begin in range(0, len(block), 97):
            await asyncio.sleep(0.001)
            self._say(block[begin : begin + 97])
        self._speed = self.base

    def _say(self, text: str) -> None:
        data = text.encode("latin-1")
        if self.peer.speed != self._speed:
            data = self._rng.randbytes(len(data) // 3 + 1)
        elif self.parity_bit:
            data = bytes(byte | (0x80 if byte.bit_count() % 2 else 0) for byte in data)
        self.peer.say(data)


# ------------------------------------------------------------------------------------------------------------ SDI-12


def sdi12_crc(data: str) -> str:
    """SDI-12 1.4, 4.4.12.1 and 4.4.12.2, as written there."""
    crc = 0
    for char in data:
        crc ^= ord(char)
        for _ in range(8):
            if crc & 1:
                crc >>= 1
                crc ^= 0xA001
            else:
                crc >>= 1
    return chr(0x40 | crc >> 12) + chr(0x40 | ((crc >> 6) & 0x3F)) + chr(0x40 | (crc & 0x3F))


class Sdi12Sensor:
    """One sensor: what it says to each command."""

    def __init__(self, address: str = "0", values: str = "+3.14", *, wait_s: int = 0) -> None:
        self.address = address
        self.identity = "14" + "VENDOR  " + "MODEL " + "1.0" + "SN0042"
        self.groups = [values]  #: for D0, D1, ...
        self.count = sum(group.count("+") + group.count("-") for group in self.groups)
        self.wait_s = wait_s
        self.service_after_s: float | None = 0.02
        self.deaf = 0  #: commands not heard
        self.break_crc = 0  #: answers with a damaged check
        self.silent = False
        self._checked = False

    def answer(self, command: str, later: Callable[[float, str], None]) -> str | None:
        """To a command without address and `!`."""
        if self.silent:
            return None
        if self.deaf:
            self.deaf -= 1
            return None
        if command == "":
            return ""
        if command == "I":
            return self.identity
        kind, rest = command[0], command[1:]
        if kind in "MC":
            self._checked = rest.startswith("C")
            if kind == "M" and self.wait_s and self.service_after_s is not None:
                later(self.service_after_s, self.address)
            return f"{self.wait_s:03d}{self.count:{'02d' if kind == 'C' else 'd'}}"
        if kind == "R":
            self._checked = rest.startswith("C")
            return self._data(int(rest[-1]))
        if kind == "D":
            return self._data(int(rest))
        return None

    def _data(self, number: int) -> str:
        group = self.groups[number] if number < len(self.groups) else ""
        if not self._checked:
            return group
        check = sdi12_crc(self.address + group)
        if self.break_crc:
            self.break_crc -= 1
            check = check[:2] + chr(ord(check[2]) ^ 1)
        return group + check


class Sdi12Bus:
    """Sensors on one pair of wires."""

    def __init__(self, link: Path, *sensors: Sdi12Sensor) -> None:
        self.peer = PtyPeer(link, self._react)
        self.sensors = {sensor.address: sensor for sensor in sensors}
        self.commands: deque[str] = deque(maxlen=64)
        self.echo = False
        self.parity_bit = False
        self.flip = 0  #: bits to be flipped in the last character before CR LF, once for each answer
        self.flips = 0  #: how many answers are damaged so
        self.processor_baud = 0  #: an adapter with a processor: its own speed, and plain characters only

    def _react(self, heard: bytes) -> bytes:
        if self.peer.speed != (self.processor_baud or 1200):
            return b""
        if self.echo:
            self.peer.say(heard)
        if self.processor_baud and any(byte > 0x7F for byte in heard):
            return b""
        heard = bytes(byte & 0x7F for byte in heard)
        while (end := heard.find(b"!")) >= 0:
            command, heard = heard[:end].lstrip(b"\0").decode("ascii"), heard[end + 1 :]
            self.commands.append(command)
            sensor = self.sensors.get(command[:1])
            if sensor is None:
                continue
            answer = sensor.answer(
                command[1:], lambda after_s, text: self.peer.later(self._later(after_s, text))
            )
            if answer is not None:
                self._say(sensor.address + answer)
        return heard

    async def _later(self, after_s: float, text: str) -> None:
        await asyncio.sleep(after_s)
        self._say(text)

    def _say(self, text: str) -> None:
        data = (text + "\r\n").encode("ascii")
        if self.parity_bit:
            data = bytes(byte | (0x80 if byte.bit_count() % 2 else 0) for byte in data)
        if self.flips:
            self.flips -= 1
            data = data[:-3] + bytes([data[-3] ^ self.flip]) + data[-2:]
        self.peer.say(data)
