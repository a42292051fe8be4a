"""A serial line with Modbus devices on it, modelled: it knows speed, parity and stop bits, as a pty does not; and an
event loop whose waiting takes no time.

`LineModel.open` stands in for `drivers.modbus_line.open_serial`. A device hears only what is sent at its own setting; a
port set up otherwise hears of it, at best, noise.
"""

from __future__ import annotations

import asyncio
import selectors
import struct
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from drivers.contract import DeviceUnreachable
from drivers.modbus_address import SerialPort
from drivers.modbus_port import SerialTransport
from tests.fakes.modbus_peer import framed

T = TypeVar("T")
Answer = Callable[[bytes], bytes | None]
"""A request's PDU to the reply's, or silence."""


def holding(registers: Mapping[int, int]) -> Answer:
    """A device with these holding registers; everything else is refused."""

    def answer(pdu: bytes) -> bytes:
        if pdu[0] != 3 or len(pdu) != 5:
            return bytes([pdu[0] | 0x80, 1])
        first, count = struct.unpack(">HH", pdu[1:])
        words = [registers.get(address) for address in range(first, first + count)]
        if None in words:
            return bytes([0x83, 2])
        return bytes([3, 2 * count]) + struct.pack(f">{count}H", *(word or 0 for word in words))

    return answer


@dataclass
class LineModel:
    """One line. `units` answer at (baud, parity, stop bits) only, after their turnaround."""

    baud: int
    parity: str
    stop_bits: int = 1
    units: dict[int, Answer] = field(default_factory=dict)
    turnaround_s: float = 0.03
    babbles_at: int | None = None  #: whoever asks at this speed with another parity hears noise
    asked: list[tuple[int, str, int]] = field(default_factory=list)  #: baud, parity, unit of every request

    def open(self, address: SerialPort, protocol_factory: Callable[[], asyncio.Protocol]) -> SerialTransport:
        if not address.device.endswith("model"):
            raise DeviceUnreachable(f"{address.device}: no such port")
        return _End(self, address, protocol_factory())


class _End(SerialTransport):
    def __init__(self, line: LineModel, address: SerialPort, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._line = line
        self._address = address
        self._protocol = protocol
        self._closed = False
        self._loop = asyncio.get_running_loop()
        protocol.connection_made(self)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        line, address, frame = self._line, self._address, bytes(data)
        line.asked.append((address.baud, address.parity, frame[0]))
        on_the_line_s = len(frame) * address.character_s
        same_speed = address.baud == line.baud
        if not same_speed or (address.parity, address.stop_bits) != (line.parity, line.stop_bits):
            if line.babbles_at == address.baud:
                self._loop.call_later(on_the_line_s + line.turnaround_s, self._hears, b"\x93\x00\xf5")
            return
        answer = line.units.get(frame[0])
        if answer is None or framed(frame[:-2]) != frame:
            return
        reply = answer(frame[1:-2])
        if reply is not None:
            whole = framed(frame[:1] + reply)
            took_s = on_the_line_s + line.turnaround_s + len(whole) * address.character_s
            self._loop.call_later(took_s, self._hears, whole)

    def _hears(self, data: bytes) -> None:
        if not self._closed:
            self._protocol.data_received(data)

    def discard_input(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self._closed

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.call_soon(self._protocol.connection_lost, None)


class _NoWaiting(selectors.DefaultSelector):
    """Does not wait, and notes how long it should have."""

    skipped_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout:
            self.skipped_s += timeout
        return ready


class QuickLoop(asyncio.SelectorEventLoop):
    """Its clock jumps to the next timer where there is nothing else to do. For programs that wait for nobody outside."""

    def __init__(self) -> None:
        self._no_waiting = _NoWaiting()
        super().__init__(self._no_waiting)

    def time(self) -> float:
        return super().time() + self._no_waiting.skipped_s


def run_quickly(work: Coroutine[Any, Any, T]) -> tuple[T, float]:
    """What it gives, and how long it would have taken."""
    with asyncio.Runner(loop_factory=QuickLoop) as runner:
        loop = runner.get_loop()
        began_s = loop.time()
        return runner.run(work), loop.time() - began_s
