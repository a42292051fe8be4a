"""Modbus RTU and ASCII slaves on a pty, in a thread of their own: they keep their time whatever the event loop does.

A register's number is in its value, and a request never asks for the same address again within 60,000: a reply that
belongs to another request shows, be it to the same unit.

The promise that a master relies on is kept: no reply is written later than `latest_s` after its request was. Where this
thread was held up for longer, the reply is dropped and counted (`dropped`).
"""

from __future__ import annotations

import binascii
import heapq
import os
import pty
import random
import select
import struct
import threading
import time
import tty
from collections import Counter, deque
from collections.abc import Callable

from tests.fakes.modbus_peer import crc16

COUNT = 4  #: registers per request
ANSWERED = ("ok", "noise", "bytewise", "echo", "double", "exception", "busy", "early_exception_of_other")
UNANSWERED = (
    "none",
    "late",
    "late_bytewise",
    "crc",
    "noise_inside",
    "truncated",
    "other_unit",
    "other_function",
)
"""All single faults."""


def words_of(unit: int, address: int) -> list[int]:
    return [(address + 7919 * i + 1009 * unit * (i > 0)) & 0xFFFF for i in range(COUNT)]


def rtu_frame(body: bytes) -> bytes:
    return body + crc16(body)


def ascii_frame(body: bytes) -> bytes:
    return b":" + binascii.hexlify(body + bytes([-sum(body) & 0xFF])).upper() + b"\r\n"


class FaultySlave:
    """`fault(unit)` names what to do with the next request; `sent_at` holds when each request was written."""

    def __init__(
        self,
        fault: Callable[[int], str],
        *,
        ascii_: bool = False,
        timeout_s: float,
        latest_s: float,
        echo: bool = False,
        seed: int = 1,
    ) -> None:
        self._fault = fault
        self._frame = ascii_frame if ascii_ else rtu_frame
        self._ascii = ascii_
        self._timeout_s = timeout_s
        self._latest_s = latest_s
        self._echo = echo
        self._chance = random.Random(seed)
        self.sent_at: deque[float] = deque()
        self.did: Counter[str] = Counter()
        self.dropped = 0
        self.requests = 0
        self.late = 0  #: late replies that were written
        self._due: list[tuple[float, int, float, bytes]] = []
        self._order = 0
        self._master, self._slave = pty.openpty()
        tty.setraw(self._master)
        tty.setraw(self._slave)
        self.path = os.ttyname(self._slave)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        os.close(self._master)
        os.close(self._slave)

    def _serve(self) -> None:
        buffer = b""
        while not self._stop.is_set():
            wait_s = max(0.0, self._due[0][0] - time.monotonic()) if self._due else 0.05
            if select.select([self._master], [], [], min(wait_s, 0.05))[0]:
                buffer += os.read(self._master, 4096)
                while frame := self._first(buffer):
                    buffer = buffer[len(frame) :]
                    self._take(frame)
            while self._due and self._due[0][0] <= time.monotonic():
                _, _, sent_s, data = heapq.heappop(self._due)
                if time.monotonic() <= sent_s + self._latest_s:
                    os.write(self._master, data)
                else:
                    self.dropped += 1

    def _first(self, buffer: bytes) -> bytes:
        if self._ascii:
            return buffer[: buffer.find(b"\r\n") + 2] if b"\r\n" in buffer else b""
        return buffer[:8] if len(buffer) >= 8 else b""

    def _put(self, at_s: float, sent_s: float, data: bytes) -> None:
        self._order += 1
        heapq.heappush(self._due, (at_s, self._order, sent_s, data))

    def _take(self, frame: bytes) -> None:
        sent_s = self.sent_at.popleft()
        self.requests += 1
        body = binascii.unhexlify(frame[1:-4]) if self._ascii else frame[:-2]
        unit, function, address, count = struct.unpack(">BBHH", body)
        now_s = time.monotonic()
        if self._echo:
            self._put(now_s, sent_s, frame)
        how = self._fault(unit)
        self.did[how] += 1
        data = struct.pack(f">{count}H", *words_of(unit, address)[:count])
        right = self._frame(bytes([unit, function, len(data)]) + data)
        chance = self._chance
        match how:
            case "ok":
                self._put(now_s, sent_s, right)
            case "none":
                pass
            case "late":
                self.late += 1
                self._put(sent_s + chance.uniform(self._timeout_s, self._latest_s), sent_s, right)
            case "late_of_other_unit":  # two faults at once: of a pair of units, each with the other's number
                self.late += 1
                wrong = self._frame(bytes([3 - unit, function, len(data)]) + data)
                self._put(sent_s + chance.uniform(self._timeout_s, self._latest_s), sent_s, wrong)
            case "late_exception_of_other":
                self.late += 1
                wrong = self._frame(bytes([3 - unit, function | 0x80, 2]))
                self._put(sent_s + chance.uniform(self._timeout_s, self._latest_s), sent_s, wrong)
            case "late_bytewise":
                self.late += 1
                begin_s = sent_s + chance.uniform(0.5, 1.0) * self._timeout_s
                for i, byte in enumerate(right):
                    at_s = begin_s + i * (self._latest_s - self._timeout_s) / len(right)
                    self._put(at_s, sent_s, bytes([byte]))
            case "crc":
                spoilt = bytearray(right)
                spoilt[-3 if self._ascii else -1] ^= 1
                self._put(now_s, sent_s, bytes(spoilt))
            case "noise":
                self._put(now_s, sent_s, self._noise() + right)
            case "noise_inside":
                self._put(now_s, sent_s, self._spoilt(right))
            case "truncated":
                self._put(now_s, sent_s, right[: chance.randrange(1, len(right))])
            case "other_unit":
                self._put(now_s, sent_s, self._frame(bytes([unit % 247 + 1, function, len(data)]) + data))
            case "other_function":
                self._put(now_s, sent_s, self._frame(bytes([unit, function ^ 7, len(data)]) + data))
            case "exception":
                self._put(now_s, sent_s, self._frame(bytes([unit, function | 0x80, 4])))
            case "busy":
                self._put(now_s, sent_s, self._frame(bytes([unit, function | 0x80, 6])))
            case "early_exception_of_other":
                self._put(now_s, sent_s, self._frame(bytes([unit % 247 + 1, function | 0x80, 4])) + right)
            case "bytewise":
                for i, byte in enumerate(right):
                    self._put(now_s + 0.0001 * i, sent_s, bytes([byte]))
            case "echo":
                self._put(now_s, sent_s, frame + right)
            case "double":
                self._put(now_s, sent_s, right + right)
            case _:
                raise AssertionError(how)

    def _noise(self) -> bytes:
        """Bytes that no reply begins with; in ASCII, no beginning of a frame."""
        noise = self._chance.randbytes(self._chance.randrange(1, 6))
        return noise.replace(b":", b";").replace(b"\x01", b"\x00").replace(b"\x02", b"\x00")

    def _spoilt(self, right: bytes) -> bytes:
        """A byte more inside the frame. One in 65,536 such frames would pass the check, which no master could tell."""
        while True:
            at = self._chance.randrange(2, len(right) - 2)
            spoilt = right[:at] + self._chance.randbytes(1) + right[at:]
            if self._ascii:
                if b":" not in spoilt[1:] and spoilt.count(b"\r") == 1:
                    return spoilt
            elif not any(
                spoilt[start : start + size] == rtu_frame(spoilt[start : start + size - 2])
                for size in (5, len(right))
                for start in range(len(spoilt) - size + 1)
            ):
                return spoilt
