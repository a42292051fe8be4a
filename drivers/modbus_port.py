"""A serial port on the event loop, for one owner.

Rules:

1. The port is opened for us alone: locked (flock, as pyserial and most programs do) and closed to whoever opens it
   later (TIOCEXCL). If another program has it, the error names that program.
2. What is written goes to the kernel at once, so that whoever writes knows when.
3. What has come and was not read can be thrown away (`discard_input`), in the same turn of the event loop as a write
   that follows.

`SerialTransport` is the seam: a model of a line stands in for a port by being one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import termios
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeAlias

from drivers.contract import ConfigError, DeviceUnreachable
from drivers.modbus_address import SerialPort
from drivers.serial_port import RETRY_WITHIN_S, resolve

_READ_BYTES: Final = 65_536  #: all that a tty holds (N_TTY_BUF_SIZE is 4,096) and more
_ABSENT: Final = (errno.ENOENT, errno.ENXIO, errno.ENODEV)  #: not plugged in: looking again costs nothing
_MOST_READS: Final = 16  #: of a flush, where a line babbles faster than it is read


class SerialTransport(asyncio.Transport):
    """An open port. It calls its protocol's `connection_made` before it is handed out."""

    @abstractmethod
    def discard_input(self) -> int:
        """Throw away what came and was not read yet; how many bytes it was."""


OpenSerial: TypeAlias = Callable[[SerialPort, Callable[[], asyncio.Protocol]], SerialTransport]
"""Opens a port now, for a protocol. Raises `DeviceUnreachable`, `ConfigError`."""


class TtyTransport(SerialTransport):
    """A port of this machine."""

    def __init__(self, descriptor: int, close: Callable[[], None], protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._fd = descriptor
        self._close = close
        self._protocol = protocol
        self._unwritten = b""
        self._closing = False
        self._loop.add_reader(descriptor, self._readable)
        protocol.connection_made(self)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing:
            return
        if self._unwritten:
            self._unwritten += bytes(data)
            return
        written = self._write(bytes(data))
        if written < len(data):
            self._unwritten = bytes(data[written:])
            self._loop.add_writer(self._fd, self._writable)

    def get_write_buffer_size(self) -> int:
        return len(self._unwritten)

    def discard_input(self) -> int:
        thrown = 0
        if self._closing:
            return 0
        for _ in range(_MOST_READS):
            try:
                data = os.read(self._fd, _READ_BYTES)
            except BlockingIOError:
                break
            except OSError as err:
                self._lost(err)
                break
            if not data:
                self._lost(None)
                break
            thrown += len(data)
        return thrown

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        self._end(None)

    def abort(self) -> None:
        self._end(None)

    def _write(self, data: bytes) -> int:
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            return 0
        except OSError as err:
            self._lost(err)
            return len(data)

    def _writable(self) -> None:
        self._unwritten = self._unwritten[self._write(self._unwritten) :]
        if not self._unwritten and not self._closing:
            self._loop.remove_writer(self._fd)

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return
        except OSError as err:
            self._lost(err)
            return
        if data:
            self._protocol.data_received(data)
        else:
            self._lost(None)

    def _lost(self, err: OSError | None) -> None:
        self._end(err or OSError(errno.EIO, "the port was unplugged"))

    def _end(self, err: OSError | None) -> None:
        if self._closing:
            return
        self._closing = True
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._unwritten = b""
        with contextlib.suppress(OSError, termios.error):  # an unplugged port takes neither
            # Without this, closing waits for what a stuck port has not sent, up to 30 s.
            termios.tcflush(self._fd, termios.TCIOFLUSH)
            fcntl.ioctl(self._fd, termios.TIOCNXCL)
        with contextlib.suppress(OSError):
            self._close()
        self._loop.call_soon(self._protocol.connection_lost, err)


def open_tty(address: SerialPort, protocol_factory: Callable[[], asyncio.Protocol]) -> SerialTransport:
    """Open this machine's port. Raises `DeviceUnreachable`, `ConfigError`."""
    import serial

    if address.data_bits not in (7, 8) or address.parity not in ("N", "E", "O"):
        raise _refused(address, "Modbus has 7 or 8 data bits and parity N, E or O")
    device = resolve(address.device)
    try:
        port = serial.Serial(
            device,
            baudrate=address.baud,
            bytesize=address.data_bits,
            parity=address.parity,
            stopbits=address.stop_bits,
            timeout=0,
            write_timeout=0,
            exclusive=True,
        )
    except OSError as err:  # pyserial's own exception is one, but never a PermissionError
        raise DeviceUnreachable(
            f"{address}: {err}{_remedy(err, device)}",
            retry_within_s=RETRY_WITHIN_S if err.errno in _ABSENT else None,
        ) from err
    except (termios.error, ValueError) as err:
        raise _refused(address, str(err)) from err
    try:
        _settle(port.fileno(), address)
    except (termios.error, OSError) as err:
        port.close()
        raise DeviceUnreachable(f"{address}: {err}") from err
    except ConfigError:
        port.close()
        raise
    with contextlib.suppress(OSError, ValueError):
        # A USB adapter holds a short reply back, FTDI's for 16 ms, if it is not told otherwise.
        port.set_low_latency_mode(True)
    return TtyTransport(port.fileno(), port.close, protocol_factory())


def _settle(descriptor: int, address: SerialPort) -> None:
    """Close it to others, and see that it took its settings: some drop silently what they cannot do."""
    fcntl.ioctl(descriptor, termios.TIOCEXCL)
    settings = termios.tcgetattr(descriptor)
    taken = settings[2] & (termios.CSIZE | termios.PARENB | termios.PARODD | termios.CSTOPB)
    wanted = {7: termios.CS7, 8: termios.CS8}[address.data_bits]
    wanted |= {"N": 0, "E": termios.PARENB, "O": termios.PARENB | termios.PARODD}[address.parity]
    wanted |= termios.CSTOPB if address.stop_bits == 2 else 0
    if taken != wanted:
        raise _refused(address, "it dropped some of them")
    # pyserial asks for reads that give nothing where there is nothing; so does a port that was unplugged.
    settings[6][termios.VMIN] = 1
    termios.tcsetattr(descriptor, termios.TCSANOW, settings)


def _refused(address: SerialPort, why: str) -> ConfigError:
    return ConfigError(
        f"{address}: the port does not take these settings ({why}); a pty, for one, has no parity"
    )


def _remedy(err: OSError, device: str) -> str:
    if err.errno == errno.EACCES:
        return "; add the gateway's user to the port's group (often dialout)"
    if err.errno in (errno.EBUSY, errno.EAGAIN):
        holders = port_holders(device)
        return f"; another program holds it{': ' + ', '.join(holders) if holders else ''}; stop that first"
    return ""


def port_holders(device: str) -> list[str]:
    """The other programs that have the port open, as far as this user may see."""
    try:
        number = Path(device).stat().st_rdev
    except OSError:
        return []
    found: list[str] = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            if any(descriptor.stat().st_rdev == number for descriptor in _open_files(process)):
                name = (process / "comm").read_text(encoding="utf-8", errors="replace").strip()
                found.append(f"{name} (pid {process.name})")
        except OSError:
            continue  # it ended, or is another user's
    return found


def _open_files(process: Path) -> list[Path]:
    """Its open device files; a link is read before it is followed, because following may block."""
    return [link for link in (process / "fd").iterdir() if str(link.readlink()).startswith("/dev/")]
