"""A serial line as a model: what a pty cannot do. It knows baud, data bits, parity and stop bits, takes the time that
characters take, and gives garbage to whoever listens with other settings than the speaker's.

    model = SerialLineModel({7: ModelUnit(holding=[...])}, baud=9600, parity="E", stop_bits=1)
    monkeypatch.setattr(modbus_line, "open_serial", model.open)

`scale` makes its time run faster (0.01: a hundredth); the timeouts of who asks do not.
"""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from drivers.contract import DeviceUnreachable
from drivers.modbus_address import SerialPort
from drivers.modbus_port import SerialTransport
from tests.fakes.modbus_peer import framed

Settings = tuple[int, int, str, int]
"""Baud, data bits, parity, stop bits."""


@dataclass
class ModelUnit:
    """A slave. `identity` is what function 43/14 tells (object id -> text); without it the function is refused."""

    holding: list[int] = field(default_factory=list)
    input: list[int] = field(default_factory=list)
    first: int = 0  #: the address of the first register
    turnaround_s: float = 0.005
    identity: dict[int, str] = field(default_factory=dict)


class SerialLineModel:
    """A line with its slaves. `opened` is every setting it was opened with, `asked` each frame understood by a unit
    (unit, PDU), `heard` counts all frames sent."""

    def __init__(
        self,
        units: dict[int, ModelUnit],
        *,
        baud: int = 9600,
        parity: str = "N",
        stop_bits: int = 1,
        data_bits: int = 8,
        device: str | None = None,
        scale: float = 1.0,
        seed: int = 1,
    ) -> None:
        self.units = units
        self.settings: Settings = (baud, data_bits, parity, stop_bits)
        self.device = device
        self.scale = scale
        self.opened: list[Settings] = []
        self.asked: list[tuple[int, bytes]] = []
        self.heard = 0
        self.chance = random.Random(seed)

    def open(self, address: SerialPort, protocol_factory: Callable[[], asyncio.Protocol]) -> SerialTransport:
        """Stands in for `drivers.modbus_line.open_serial`."""
        if self.device is not None and address.device != self.device:
            raise DeviceUnreachable(f"{address}: no such port in the model")
        settings = (address.baud, address.data_bits, address.parity, address.stop_bits)
        self.opened.append(settings)
        return _ModelTransport(self, address, settings, protocol_factory())

    def understood(self, sent: bytes, settings: Settings) -> bytes:
        """What these bytes, sent with `settings`, are to a listener with the line's own (or the other way round)."""
        mine = self.settings
        baud, data_bits, parity, stop_bits = settings
        if baud != mine[0]:
            # Edges at other moments: some other number of characters, all of them wrong.
            count = (
                max(1, round(len(sent) * mine[0] / baud))
                if baud > mine[0]
                else len(sent) * min(4, mine[0] // baud)
            )
            return self.chance.randbytes(min(count, 600))
        if data_bits != mine[1]:
            return bytes(byte & 0x7F for byte in sent)
        if parity != mine[2]:
            # A UART told to check parity drops (or marks) what fails; the bits themselves are in place only where both
            # or neither send a parity bit. Half of all characters have the other parity.
            if "N" in (parity, mine[2]):
                return bytes(byte for byte in sent if self.chance.random() < 0.5)
            return b""
        if stop_bits != mine[3] and stop_bits < mine[3] and len(sent) > 1:
            # The listener still waits for the second stop bit when the next start bit comes: framing errors.
            return bytes(byte for byte in sent if self.chance.random() < 0.5)
        return sent


class _ModelTransport(SerialTransport):
    def __init__(
        self, model: SerialLineModel, address: SerialPort, settings: Settings, protocol: asyncio.Protocol
    ) -> None:
        super().__init__()
        self._model = model
        self._address = address
        self._settings = settings
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._closing = False
        self._coming = 0
        protocol.connection_made(self)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing:
            return
        model, frame = self._model, bytes(data)
        model.heard += 1
        took_s = len(frame) * self._address.character_s * model.scale
        self._loop.call_later(took_s, self._arrived, model.understood(frame, self._settings))

    def discard_input(self) -> int:
        return 0  # what comes is handed over when it comes

    def is_closing(self) -> bool:
        return self._closing

    def abort(self) -> None:
        self.close()

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._loop.call_soon(self._protocol.connection_lost, None)

    def _arrived(self, frame: bytes) -> None:
        model = self._model
        if len(frame) < 4 or framed(frame[:-2]) != frame or frame[0] not in model.units:
            return
        unit = model.units[frame[0]]
        model.asked.append((frame[0], frame[1:-2]))
        reply = framed(frame[:1] + _answer(unit, frame[1:-2]))
        took_s = (unit.turnaround_s + len(reply) * self._address.character_s) * model.scale
        self._loop.call_later(took_s, self._reply, model.understood(reply, self._settings))

    def _reply(self, data: bytes) -> None:
        if not self._closing and data:
            self._protocol.data_received(data)


def _answer(unit: ModelUnit, pdu: bytes) -> bytes:
    function = pdu[0]
    if function in (3, 4):
        registers = unit.holding if function == 3 else unit.input
        address, count = struct.unpack(">HH", pdu[1:5])
        at = address - unit.first
        if not 1 <= count <= 125:
            return bytes([function | 0x80, 3])
        if at < 0 or at + count > len(registers):
            return bytes([function | 0x80, 2])
        return bytes([function, 2 * count]) + struct.pack(f">{count}H", *registers[at : at + count])
    if function == 6:
        address, value = struct.unpack(">HH", pdu[1:5])
        if not 0 <= address - unit.first < len(unit.holding):
            return bytes([function | 0x80, 2])
        unit.holding[address - unit.first] = cast(int, value)
        return pdu
    if function == 43 and pdu[1:2] == b"\x0e" and unit.identity:
        objects = sorted(unit.identity.items())
        listed = b"".join(bytes([number, len(text)]) + text.encode() for number, text in objects)
        return bytes([43, 14, pdu[2], 1, 0, 0, len(objects)]) + listed
    return bytes([function | 0x80, 1])
