"""A serial port, or a connection to a serial gateway, on which devices are asked, one question at a time; shared by all
devices that name it.

Rules:

- A bus has one owner of its port, opened with the first turn and closed with the last user. Turns are first come,
  first served.
- A turn that fails or is cancelled leaves the bus dirty: before the next one the line must have been silent, and what
  came until then is thrown away, or a late reply would be taken for the answer to another question.
- A turn leaves the line's speed as it found it.
- A port that is pulled out raises `DeviceUnreachable`; the next turn looks it up and opens it afresh. Two that were
  pulled out may change their kernel names: nobody joins a bus whose users name another port by now.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import struct
import termios
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from drivers.contract import ConfigError, DeviceUnreachable, boot_ns
from drivers.port_key import port_key
from drivers.serial_port import (
    READ_BYTES,
    RETRY_WITHIN_S,
    PortSettings,
    hung_up,
    open_port,
    read_away,
    resolve,
)

if TYPE_CHECKING:
    import serial

MAX_BYTES: Final = 262_144  #: of one answer; more is noise
_SENT_POLL_S: Final = 0.002
_SENT_MARGIN_S: Final = 0.002
_EVEN: Final = bytes(byte | 0x80 if byte.bit_count() % 2 else byte for byte in range(128)) + bytes(
    range(128, 256)
)


class Heard(ABC):
    """An open line's bytes in, whatever the line is. `port` is its name, for messages."""

    def __init__(self, port: str, settings: PortSettings) -> None:
        self.port = port
        self.settings = settings
        self.skipped_bytes = 0
        self.at_ns = 0  #: boot clock of the last byte that came
        self._loop = asyncio.get_running_loop()
        self._buffer = b""
        self._came: asyncio.Future[None] | None = None
        self._last_byte_s = 0.0
        self._lost: str | None = None

    @abstractmethod
    def close(self) -> None:
        """Give the line back. Never raises; safe to call twice."""

    @abstractmethod
    def rest(self, settings: PortSettings) -> None:
        """Leave the line as it was found."""

    @property
    def lost(self) -> bool:
        return self._lost is not None

    def _take(self, chunk: bytes) -> None:
        self.at_ns = boot_ns()
        self._last_byte_s = self._loop.time()
        self._buffer += chunk
        if len(self._buffer) > MAX_BYTES:
            self.skipped_bytes += len(self._buffer) - MAX_BYTES
            self._buffer = self._buffer[-MAX_BYTES:]
        self._wake()

    def _wake(self) -> None:
        if self._came is not None and not self._came.done():
            self._came.set_result(None)

    def _lose(self, why: str) -> None:
        self._lost = why
        self._wake()

    def _gone(self) -> DeviceUnreachable:
        return DeviceUnreachable(
            f"{self.port}: the line is gone ({self._lost}); is it plugged in?", retry_within_s=RETRY_WITHIN_S
        )

    async def receive(
        self, enough: Callable[[bytes], int], *, first_s: float, between_s: float | None = None
    ) -> bytes:
        """What has come, once `enough` says how much of it is wanted (0: not yet); the rest stays. `first_s`: the wait
        for all of it, or, with `between_s`, for its first byte, and `between_s` for each next. Raises `TimeoutError`,
        `DeviceUnreachable`."""
        deadline_s = self._loop.time() + first_s
        heard = len(self._buffer)
        while True:
            if size := enough(self._buffer):
                taken, self._buffer = self._buffer[:size], self._buffer[size:]
                return taken
            if self._lost is not None:
                raise self._gone()
            if between_s is not None and len(self._buffer) > heard:
                heard = len(self._buffer)
                deadline_s = self._last_byte_s + between_s
            self._came = self._loop.create_future()
            try:
                async with asyncio.timeout_at(deadline_s):
                    await self._came
            finally:
                self._came = None

    @property
    def heard(self) -> bytes:
        """What has come and was not taken."""
        return self._buffer

    def forget(self) -> None:
        """Throw away what has come."""
        self.skipped_bytes += len(self._buffer)
        self._buffer = b""

    async def quiet(self, silence_s: float, at_most_s: float) -> None:
        """Wait until nothing has come for this long; what comes is thrown away."""
        begin_s = self._loop.time()
        give_up_s = begin_s + at_most_s
        while self._lost is None:
            until_s = min(give_up_s, max(begin_s, self._last_byte_s) + silence_s)
            if (now_s := self._loop.time()) >= until_s:
                break
            await asyncio.sleep(until_s - now_s)
        self.forget()


class Wire(Heard):
    """An open port: bytes out, bytes in, on the event loop."""

    def __init__(self, port: str, settings: PortSettings) -> None:
        super().__init__(port, settings)
        self._serial: serial.Serial = open_port(
            port, settings, self._skip, mark_damaged=settings.data_bits == 7
        )
        self._fd = self._serial.fileno()
        self._loop.add_reader(self._fd, self._readable)

    def _skip(self, size: int) -> None:
        self.skipped_bytes += size

    def _readable(self) -> None:
        try:
            chunk = os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return
        except OSError as exc:
            self._lose(exc.strerror or str(exc))
            return
        if not chunk:
            if hung_up(self._fd):
                self._lose("hung up")
            return
        self._take(chunk)

    def _lose(self, why: str) -> None:
        self._loop.remove_reader(self._fd)
        super()._lose(why)

    def forget(self) -> None:
        """Throw away what has come, what nobody has read yet too."""
        with contextlib.suppress(OSError):
            self.skipped_bytes += read_away(self._fd) if self._fd >= 0 else 0
        super().forget()

    def rest(self, settings: PortSettings) -> None:
        with contextlib.suppress(DeviceUnreachable):
            self.set(settings)

    def close(self) -> None:
        if self._fd < 0:
            return
        self._loop.remove_reader(self._fd)
        self._fd = -1
        self._lost = self._lost or "closed"
        # A tty's close waits for unsent bytes (closing_wait, 30 s by default); throw them away instead.
        with contextlib.suppress(OSError, termios.error):
            self._serial.reset_output_buffer()
        with contextlib.suppress(OSError, termios.error):
            self._serial.close()

    # ------------------------------------------------------------------------------------------------------- out

    async def write(self, data: bytes, *, even: bool = False) -> None:
        """Send all, and return once it is on the line. `even`: the adapter cannot do seven bits and even parity, so the
        parity bit is ours to set."""
        data = data.translate(_EVEN) if even else data
        out_s = self._loop.time() + len(data) * self.settings.character_s + _SENT_MARGIN_S
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                await asyncio.sleep(self.settings.character_s)
            except OSError as exc:
                self._lose(exc.strerror or str(exc))
                raise self._gone() from exc
        while waiting := self._unsent():  # noqa: ASYNC110 - no event tells that a tty has sent all
            await asyncio.sleep(max(_SENT_POLL_S, waiting * self.settings.character_s))
        # What the kernel has handed to the chip may still stand in its FIFO (TIOCOUTQ does not count that).
        await asyncio.sleep(out_s - self._loop.time())

    def _unsent(self) -> int:
        try:
            (size,) = struct.unpack("i", fcntl.ioctl(self._fd, termios.TIOCOUTQ, b"\0\0\0\0"))
        except OSError:
            return 0
        return int(size)

    async def send_break(self, duration_s: float) -> None:
        """Hold the line in the state that is no character."""
        try:
            self._serial.break_condition = True
            await asyncio.sleep(duration_s)
        except OSError as exc:
            self._lose(str(exc))
            raise self._gone() from exc
        finally:
            with contextlib.suppress(OSError):
                self._serial.break_condition = False

    def set(self, settings: PortSettings) -> None:
        """Another speed or form of character, from now on. What is being sent must be out (`write` waits)."""
        old = self.settings
        try:
            # Only what differs: glibc calls it an error where nothing at all is changed by a call.
            if settings.baud != old.baud:
                self._serial.baudrate = settings.baud
            if settings.data_bits != old.data_bits:
                self._serial.bytesize = settings.data_bits
            if settings.parity != old.parity:
                self._serial.parity = settings.parity[0].upper()
            if settings.stop_bits != old.stop_bits:
                self._serial.stopbits = settings.stop_bits
        except (OSError, termios.error) as exc:
            self._lose(str(exc))
            raise self._gone() from exc
        self.settings = settings


WireT = TypeVar("WireT", bound=Heard)


class Bus(Generic[WireT]):
    """The line, its users, and whose turn it is."""

    def __init__(
        self,
        key: tuple[int, str],
        port: str,
        settings: PortSettings,
        open_wire: Callable[[], Awaitable[WireT]],
    ) -> None:
        self._key = key
        self.name = port
        self.settings = settings
        self._open_wire = open_wire
        self._users = 0
        self._turn = asyncio.Lock()
        self._wire: WireT | None = None
        self._dirty = False

    @contextlib.asynccontextmanager
    async def turn(self, *, silence_s: float, at_most_s: float) -> AsyncIterator[WireT]:
        """The wire, for the length of one exchange. After a turn that went wrong the line is first silent for
        `silence_s`, or the wait ends after `at_most_s`: a line that never falls silent is used again, and the checks
        must do. Raises `DeviceUnreachable`, `ConfigError`."""
        async with self._turn:
            if not self._users:
                raise DeviceUnreachable(f"{self.name}: not connected")
            if self._wire is None or self._wire.lost:
                self._shut()
                self._wire = await self._open_wire()
                self._dirty = True  # somebody may have been answering before we came
            wire = self._wire
            if self._dirty:
                await wire.quiet(silence_s, at_most_s)
            wire.forget()
            self._dirty = True
            try:
                yield wire
                self._dirty = False
            finally:
                if wire.lost or not self._users:
                    self._shut()
                else:
                    wire.rest(self.settings)

    def leave(self) -> None:
        self._users -= 1
        if self._users <= 0:
            if _buses.get(self._key) is self:
                del _buses[self._key]
            if not self._turn.locked():
                self._shut()

    def _shut(self) -> None:
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.close()

    def join(self) -> Bus[WireT]:
        self._users += 1
        return self


_buses: dict[tuple[int, str], Bus[Any]] = {}


def join(port: str, settings: PortSettings) -> Bus[Wire]:
    """The bus on this port, until `leave`. Raises `DeviceUnreachable` where the port's name leads nowhere, and
    `ConfigError` where others use the port with other settings."""

    async def open_wire() -> Wire:
        return Wire(port, settings)

    key = port_key(resolve(port))
    at = (id(asyncio.get_running_loop()), key)
    bus = _buses.get(at)
    if bus is not None and not _leads_to(bus.name, key):
        del _buses[at]  # replugged: what its users name is another port now, or none
    return join_line(port, key, settings, open_wire)


def _leads_to(port: str, key: str) -> bool:
    try:
        return port_key(resolve(port)) == key
    except (DeviceUnreachable, ConfigError):
        return False


def join_line(
    name: str, key: str, settings: PortSettings, open_wire: Callable[[], Awaitable[WireT]]
) -> Bus[WireT]:
    """The bus on the line of this key, until `leave`. Raises `ConfigError` where others use it with other settings."""
    at = (id(asyncio.get_running_loop()), key)
    bus = _buses.get(at)
    if bus is None:
        bus = _buses[at] = Bus(at, name, settings, open_wire)
    elif bus.settings != settings:
        raise ConfigError(
            f"options.port {name}: is in use with {bus.settings}; two devices on one line need the same settings"
        )
    return bus.join()
