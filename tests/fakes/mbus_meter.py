"""M-Bus meters on a pty or behind TCP, with faults to be switched on. Written from EN 13757-2 and m-bus.com's
documentation (5.4 to 5.7, 7.1), not from our driver: frame count bits, selection, several telegrams."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.fakes.pty_peer import PtyPeer

#: m-bus.com/documentation-wired, 6.3.2's example (also libmbus' test frame manual_frame3): 12565 l, at most 113 l/h in
#: storage 5, 218.37 kWh of subunit 1 at tariff 2.
PAD = "78563412 2440 01 07 55 00 0000 03 13 153100 DA02 3B 1301 8B60 04 371802"


def rsp_ud(data: bytes | str, address: int = 1, ci: int = 0x72, control: int = 0x08) -> bytes:
    """RSP_UD with this data."""
    data = bytes.fromhex(data) if isinstance(data, str) else data
    body = bytes([control, address, ci]) + data
    return bytes([0x68, len(body), len(body), 0x68]) + body + bytes([sum(body) % 256, 0x16])


class MbusMeter:
    """One slave. `telegrams` are its RSP_UDs; the next is sent where the frame count bit has changed."""

    def __init__(self, *telegrams: bytes | str, address: int = 1) -> None:
        self.address = address
        self.ci = 0x72
        self.telegrams: Sequence[bytes] = [bytes.fromhex(t) if isinstance(t, str) else t for t in telegrams]
        self.silent = False
        self.deaf = 0  #: questions not heard
        self.damage: Callable[[bytes], bytes] | None = None
        self.damaged = 0  #: how many replies are damaged
        self.selected = False
        self._last_fcb: int | None = None
        self._at = -1

    @property
    def secondary(self) -> bytes:
        return bytes(self.telegrams[0][:8])

    def short(self, control: int, address: int) -> bytes | None:
        named = address in (self.address, 254) or (address == 253 and self.selected)
        if self.silent or not named:
            return None
        if self.deaf:
            self.deaf -= 1
            return None
        if control == 0x40:
            self._last_fcb, self._at, self.selected = None, -1, self.selected and address != 253
            return b"\xe5"
        if control & 0xCF != 0x4B:
            return None
        fcb = control & 0x20
        if fcb != self._last_fcb:
            self._at = (self._at + 1) % len(self.telegrams)
        self._last_fcb = fcb
        reply = rsp_ud(self.telegrams[max(self._at, 0)], self.address, self.ci)
        if self.damaged and self.damage is not None:
            self.damaged -= 1
            reply = self.damage(reply)
        return reply

    def select(self, mask: bytes) -> bytes | None:
        own = self.secondary
        digits = zip(mask[:4].hex(), own[:4].hex(), strict=True)
        fits = all(want in ("f", have) for want, have in digits) and all(
            want in (0xFF, have) for want, have in zip(mask[4:], own[4:], strict=True)
        )
        self.selected = fits
        if self.silent or not fits:
            return None
        self._last_fcb, self._at = None, -1
        return b"\xe5"


class MbusBus:
    """Meters on one pair of wires. What several say at once is mixed."""

    def __init__(self, *meters: MbusMeter) -> None:
        self.meters = meters
        self.asked: deque[str] = deque(maxlen=200)  #: in hexadecimal
        self.echo = False

    def hear(self, heard: bytes) -> tuple[bytes, bytes]:
        """What is said to what was heard, and what of it is not yet used."""
        said = b""
        while heard:
            size = 5 if heard[0] == 0x10 else heard[1] + 6 if heard[0] == 0x68 and len(heard) > 1 else 1
            if len(heard) < size or heard == b"\x68":
                break
            frame, heard = heard[:size], heard[size:]
            if size == 1:
                continue  # noise
            self.asked.append(frame.hex())
            if self.echo:
                said += frame
            if sum(frame[4:-2] if size > 5 else frame[1:3]) % 256 != frame[-2]:
                continue
            if size == 5:
                replies = [meter.short(frame[1], frame[2]) for meter in self.meters]
            else:
                assert frame[4:7] == b"\x53\xfd\x52"
                replies = [meter.select(frame[7:-2]) for meter in self.meters]
            said += _mixed([reply for reply in replies if reply is not None])
        return said, heard


def _mixed(replies: list[bytes]) -> bytes:
    """On the bus a 0 (more current) of one slave wins over a 1."""
    if not replies:
        return b""
    length = max(map(len, replies))
    out = bytearray(b"\xff" * length)
    for reply in replies:
        for index, byte in enumerate(reply):
            out[index] &= byte
    return bytes(out)


class MbusPty(MbusBus):
    """Behind a level converter on a serial port."""

    def __init__(self, link: Path, *meters: MbusMeter, speed: int = 2400) -> None:
        super().__init__(*meters)
        self.speed = speed
        self.peer = PtyPeer(link, self._react)

    def _react(self, heard: bytes) -> bytes:
        if self.peer.speed != self.speed:
            return b""
        said, rest = self.hear(heard)
        if said:
            self.peer.say(said)
        return rest


class MbusGateway(MbusBus):
    """Behind a gateway that passes bytes through."""

    def __init__(self, *meters: MbusMeter) -> None:
        super().__init__(*meters)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        rest = b""
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while heard := await reader.read(1000):
                said, rest = self.hear(rest + heard)
                for byte in said:  # a gateway sends what it has, in pieces
                    writer.write(bytes([byte]))
        self._writers.discard(writer)
        writer.close()
