"""Where a Modbus line is: a serial port with its settings, or a host and port. Plain values, made to travel over a
socket (tagged, so that an address is known for what it is).

Two addresses of one `key` are one physical line; all who use it must agree on its `settings`.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import msgspec

from drivers.contract import LineClaim
from drivers.serial_port import key_of, line_of

_FAST_BAUD = 19200
_FAST_SILENCE_S = 0.00175  #: above 19,200 baud (Modbus over serial line 1.02, 2.5.1.1)
_SILENCE_CHARACTERS = 3.5  #: up to there
_NETWORK_TIMEOUT_S = 1.0
TURNAROUND_S = 0.3  #: what a serial device may take to begin its answer; most need under 0.1


class SerialPort(msgspec.Struct, frozen=True, tag="serial"):
    """A serial port and its settings. ASCII is usually sent with 7 data bits, RTU needs 8."""

    device: str  #: a path, or a USB identity that is looked up at every opening (drivers/serial_port.py)
    baud: int
    parity: str  #: N, E or O
    stop_bits: int
    data_bits: int = 8
    framing: Literal["rtu", "ascii"] = "rtu"

    @property
    def character_s(self) -> float:
        """Start bit, data bits, parity, stop bits."""
        return (1 + self.data_bits + (self.parity != "N") + self.stop_bits) / self.baud

    @property
    def silence_s(self) -> float:
        """Between RTU frames. ASCII frames have a start and an end of their own and need none."""
        if self.framing == "ascii":
            return 0.0
        return _FAST_SILENCE_S if self.baud > _FAST_BAUD else _SILENCE_CHARACTERS * self.character_s

    def frame_s(self, pdu_size: int) -> float:
        """What a frame with such a PDU takes: with unit and CRC, or in ASCII two characters a byte with unit and LRC,
        a colon, carriage return and line feed (Modbus over serial line 1.02, 2.5.1 and 2.5.2)."""
        characters = 2 * (1 + pdu_size + 1) + 3 if self.framing == "ascii" else 1 + pdu_size + 2
        return characters * self.character_s

    @property
    def key(self) -> str:
        return key_of(self.device)

    @property
    def settings(self) -> str:
        return f"{self.baud} baud, {self.data_bits}{self.parity}{self.stop_bits}, {self.framing}"

    def claim(self) -> LineClaim:
        """Raises `ConfigError` where the name fits several ports that are there."""
        return line_of(self.device, self.settings, shared=True, option="serial")

    def __str__(self) -> str:
        return f"{self.device} ({self.settings})"


class HostPort(msgspec.Struct, frozen=True, tag="host"):
    """A host and port: a Modbus TCP or UDP device or gateway, or a serial line behind a transparent one."""

    host: str
    port: int
    framing: Literal["tcp", "udp", "rtu_over_tcp", "ascii_over_tcp"] = "tcp"

    @property
    def key(self) -> str:
        """TCP and UDP port numbers are two worlds; what is sent through a TCP port is a setting of it."""
        return f"{self.host.lower()}:{self.port}{'/udp' if self.framing == 'udp' else ''}"

    @property
    def settings(self) -> str:
        return self.framing.replace("_", " ")

    @property
    def has_transactions(self) -> bool:
        """A reply names its request; else a late one looks like the answer to the next."""
        return self.framing in ("tcp", "udp")

    def claim(self) -> LineClaim:
        return LineClaim(self.key, self.settings)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}{'' if self.framing == 'tcp' else f' ({self.settings})'}"


Address: TypeAlias = SerialPort | HostPort


def reply_timeout_s(
    address: Address, sent_size: int, reply_size: int, turnaround_s: float = TURNAROUND_S
) -> float:
    """How long a reply may take, in whole milliseconds: on a serial port both frames (sizes are of their PDUs), each
    after its silence, and the device's turnaround; the way to a host cannot be computed."""
    if isinstance(address, HostPort):
        return _NETWORK_TIMEOUT_S
    on_the_line_s = address.frame_s(sent_size) + address.frame_s(reply_size) + 2 * address.silence_s
    return math.ceil((on_the_line_s + turnaround_s) * 1000) / 1000
