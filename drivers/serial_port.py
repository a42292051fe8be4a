"""Serial ports by an identity that lasts, opened for one owner, found again after a replug.

A port is named in one of three ways, best first:

- `/dev/serial/by-id/…` or any other path: opened as it stands; a link is followed at every opening.
- `usb:VID:PID`, `usb:VID:PID:SERIAL`, and `:ifNN` after either for one port of an adapter that has several: looked up
  at every opening among the ports that are there now, so the kernel may call it ttyUSB0 today and ttyUSB3 tomorrow.

Rules: two adapters that answer to one identity are never guessed between: the error lists them, each with the name that
would tell it apart. A port has one owner (TIOCEXCL and a lock): two readers would each get half of the bytes. What came
before the port was opened is thrown away and counted, because nobody knows when it came.

`matching` decides on a plain list of ports; `present_ports` reads sysfs and decides nothing.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import select
import termios
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from drivers.contract import ConfigError, DeviceUnreachable, LineClaim
from drivers.port_key import port_key

if TYPE_CHECKING:
    import serial

log = logging.getLogger(__name__)

READ_BYTES: Final = 65_536  #: one read takes all that a tty holds (N_TTY_BUF_SIZE is 4,096) and more
_AWAY_AT_MOST_BYTES: Final = 1 << 20
RETRY_WITHIN_S: Final = (
    3.0  #: looking for a port that is not plugged in costs nothing; back within 5 s of a replug
)

Parity = Literal["none", "even", "odd", "mark", "space"]
Flow = Literal["none", "rtscts", "xonxoff", "dsrdtr"]


class PortSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How characters travel on a line."""

    baud: int = 9600
    data_bits: Literal[5, 6, 7, 8] = 8
    parity: Parity = "none"
    stop_bits: Literal[1, 2] = 1
    flow: Flow = "none"

    @property
    def character_s(self) -> float:
        """Start bit, data bits, parity, stop bits."""
        return (1 + self.data_bits + (self.parity != "none") + self.stop_bits) / self.baud

    def __str__(self) -> str:
        flow = "" if self.flow == "none" else f", {self.flow}"
        return f"{self.baud} baud, {self.data_bits}{self.parity[0].upper()}{self.stop_bits}{flow}"


class PortInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A serial port that is there now."""

    device: str  #: as the kernel calls it today: /dev/ttyUSB0
    link: str = ""  #: its name under /dev/serial/by-id
    vid: int | None = None
    pid: int | None = None
    serial: str = ""
    interface: int | None = None  #: of an adapter with several ports: which
    description: str = ""

    @property
    def usb(self) -> str:
        """Its name by USB identity; empty where it is no USB port."""
        if self.vid is None or self.pid is None:
            return ""
        serial = f":{self.serial}" if self.serial else ""
        interface = f":if{self.interface:02d}" if self.interface is not None else ""
        return f"usb:{self.vid:04x}:{self.pid:04x}{serial}{interface}"

    @property
    def stable(self) -> str:
        """The name to write into a configuration."""
        return self.link or self.usb or self.device

    def __str__(self) -> str:
        names = [name for name in (self.link, self.usb) if name]
        return f"{self.device} ({', '.join(names)})" if names else self.device


class UsbName(msgspec.Struct, frozen=True):
    """What a `usb:` name asks for. `None` and "" ask for nothing."""

    vid: int
    pid: int
    serial: str
    interface: int | None


class PortsAlike(ConfigError):
    """Several ports answer to one name."""


_USB: Final = re.compile(
    r"usb:([0-9a-f]{4}):([0-9a-f]{4})(?::(?!if\d\d$)(.+?))?(?::if(\d\d))?", re.IGNORECASE
)
_SYS: Final = Path("/sys")
_DEV: Final = Path("/dev")


# ---------------------------------------------------------------------------------------------------------- deciding


def usb_name(port: str) -> UsbName | None:
    """What a `usb:` name asks for; `None` for a path. Raises `ConfigError` for a `usb:` name of another form."""
    if not port.lower().startswith("usb:"):
        return None
    parts = _USB.fullmatch(port)
    if parts is None:
        raise ConfigError(
            f"{port!r} is no USB identity; write usb:VENDOR:PRODUCT in four hexadecimal digits each, then "
            'the serial number if there are several, as in "usb:0403:6001:A10K2X"'
        )
    vid, pid, serial, interface = parts.groups()
    return UsbName(
        int(vid, 16), int(pid, 16), serial or "", int(interface) if interface is not None else None
    )


def matching(name: UsbName, ports: Sequence[PortInfo]) -> PortInfo | None:
    """The one port that answers to this name, or `None`. Raises `PortsAlike` with the list where several do."""
    found = [
        port
        for port in ports
        if (port.vid, port.pid) == (name.vid, name.pid)
        and name.serial in ("", port.serial)
        and name.interface in (None, port.interface)
    ]
    if len(found) > 1:
        listed = "; ".join(sorted(map(str, found)))
        distinct = {port.usb for port in found}
        remedy = (
            "name one by its serial number or interface"
            if len(distinct) == len(found)
            else "they cannot be told apart by USB identity: name one by its socket, under /dev/serial/by-path"
        )
        raise PortsAlike(f"{len(found)} ports answer to this USB identity: {listed}; {remedy}")
    return found[0] if found else None


def refuse_bad_name(port: str, option: str = "port") -> None:
    """Raise `ConfigError` for a name that can never be a port's. No IO."""
    if not port:
        raise ConfigError(
            f'options.{option} is empty; name a port, as in "/dev/serial/by-id/usb-…" or "usb:0403:6001:A10K2X", '
            "which stays the same when plugs are swapped"
        )
    try:
        usb_name(port)
    except ConfigError as exc:
        raise ConfigError(f"options.{option} {exc}") from exc


# ----------------------------------------------------------------------------------------------------------- looking


def present_ports(sys: Path = _SYS, dev: Path = _DEV) -> list[PortInfo]:
    """The serial ports of this machine. What is pulled out while we look is left out."""
    by_id: dict[str, str] = {}
    folder = dev / "serial" / "by-id"
    if folder.is_dir():
        by_id = {os.path.realpath(link): str(link) for link in sorted(folder.iterdir(), reverse=True)}
    return sorted(_ports(sys, dev, by_id), key=lambda port: _numbers(port.device))


def _ports(sys: Path, dev: Path, by_id: dict[str, str]) -> Iterator[PortInfo]:
    for tty in (sys / "class" / "tty").glob("*"):
        if not (tty / "device").exists() or _line(tty / "type") == "0":  # 0: an 8250 that is not fitted
            continue
        device = str(dev / tty.name)
        link = by_id.get(os.path.realpath(device), "")
        above = [Path(os.path.realpath(tty / "device"))]
        above += above[0].parents[:4]  # usb-serial: port, interface, device; cdc-acm: interface, device
        usb = next((at for at in above if (at / "idVendor").exists()), None)
        if usb is None:
            yield PortInfo(device=device, link=link, description=tty.name)
            continue
        number = next(
            (_line(at / "bInterfaceNumber") for at in above if (at / "bInterfaceNumber").exists()), ""
        )
        try:
            vid, pid = int(_line(usb / "idVendor"), 16), int(_line(usb / "idProduct"), 16)
            several = int(_line(usb / "bNumInterfaces") or "1") > 1
            interface = int(number, 16) if several and number else None
        except ValueError:  # gone since it was listed
            continue
        yield PortInfo(
            device=device, link=link, vid=vid, pid=pid, serial=_line(usb / "serial"), interface=interface,
            description=" ".join(filter(None, (_line(usb / "manufacturer"), _line(usb / "product")))) or tty.name,
        )  # fmt: skip


def _line(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""


def _numbers(text: str) -> list[tuple[int, str]]:
    """ttyUSB10 after ttyUSB9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", text)]


def resolve(port: str, present: Callable[[], Sequence[PortInfo]] | None = None) -> str:
    """The path to open now. Raises `DeviceUnreachable` (not there, or not to be told from others: plugs change),
    `ConfigError` (no such name can be)."""
    name = usb_name(port)
    if name is None:
        return port
    try:
        found = matching(name, (present or present_ports)())
    except PortsAlike as exc:
        raise DeviceUnreachable(f"{port}: {exc}", retry_within_s=RETRY_WITHIN_S) from exc
    if found is None:
        raise _absent(port)
    return found.device


def line_of(port: str, settings: str, *, shared: bool, option: str = "port") -> LineClaim:
    """The claim of a device on this port. Raises `ConfigError` where its name fits several ports that are there."""
    try:
        return LineClaim(_key_of(port), settings, shared)
    except ConfigError as exc:
        raise ConfigError(f"options.{option} {port}: {exc}") from exc


def key_of(port: str) -> str:
    """One key for all names of one port that is there; of a USB identity that names none, or several, its own."""
    try:
        return _key_of(port)
    except ConfigError:
        return port.lower()


def _key_of(port: str) -> str:
    name = usb_name(port)
    if name is None:
        return port_key(port)
    found = matching(name, present_ports())
    return port_key(found.device) if found is not None else port.lower()


# ----------------------------------------------------------------------------------------------------------- opening


def open_port(
    port: str, settings: PortSettings, skipped: Callable[[int], None], *, mark_damaged: bool = False
) -> serial.Serial:
    """The port, ours alone, never blocking. `skipped` is told how many bytes had been waiting. `mark_damaged`: where
    there is parity, a character that fails it comes as `MARK` and itself. Raises `DeviceUnreachable`, `ConfigError`,
    with the remedy."""
    import serial

    class Port(serial.Serial):
        def _reset_input_buffer(self) -> None:
            """Called at the end of opening. What came before then is skipped: nobody knows when it came, so it can be
            given no time. A flush (TCIFLUSH) would leave behind what the tty has not yet taken over."""
            skipped(read_away(self.fd) if self.fd is not None else 0)

        def _reconfigure_port(self, force_update: bool = False) -> None:
            try:
                super()._reconfigure_port(force_update)  # type: ignore[misc]  # private, so not in its types
            except termios.error as exc:
                # glibc's word for: the port keeps its own bits per character or parity, and nothing else was to be
                # changed. Where something was, it takes the same without a word; so do we, in both cases aloud.
                if exc.args[0] != errno.EINVAL or not _has_speed(self.fd, self.baudrate):
                    raise
            if mark_damaged and settings.parity != "none" and self.fd is not None:
                _mark_damaged(self.fd)
            _say_what_is_dropped(port, self.fd, settings)

    device = resolve(port)
    try:
        return Port(
            device,
            baudrate=settings.baud,
            bytesize=settings.data_bits,
            parity=settings.parity[0].upper(),
            stopbits=settings.stop_bits,
            timeout=0,
            write_timeout=0,
            rtscts=settings.flow == "rtscts",
            xonxoff=settings.flow == "xonxoff",
            dsrdtr=settings.flow == "dsrdtr",
            exclusive=True,  # two readers would each get half of the bytes
        )
    except ValueError as exc:
        raise ConfigError(f"options.port {port}: {exc}") from exc
    except (OSError, termios.error) as exc:  # SerialException is an OSError
        raise _opening_failed(port, exc) from exc


def _has_speed(fd: int | None, baud: int) -> bool:
    return fd is not None and termios.tcgetattr(fd)[5] == getattr(termios, f"B{baud}", None)


_told: set[str] = set()


def _say_what_is_dropped(port: str, fd: int | None, settings: PortSettings) -> None:
    """An adapter without seven bits or parity takes the setting in silence, and the line then carries noise."""
    if fd is None or port in _told:
        return
    cflag = termios.tcgetattr(fd)[2]
    wanted = {5: termios.CS5, 6: termios.CS6, 7: termios.CS7, 8: termios.CS8}[settings.data_bits]
    if cflag & termios.CSIZE != wanted or bool(cflag & termios.PARENB) != (settings.parity != "none"):
        _told.add(port)
        log.warning(
            "%s: the port does not do %s, and carries 8 bits without parity; another adapter may",
            port,
            settings,
        )


#: What stands before a character that came with a wrong parity or stop bit (termios(3), PARMRK).
MARK: Final = b"\xff\0"


def _mark_damaged(fd: int) -> None:
    """pyserial has the parity computed and never looked at: a damaged character would come like any other."""
    attributes = termios.tcgetattr(fd)
    attributes[0] |= termios.INPCK | termios.PARMRK
    termios.tcsetattr(fd, termios.TCSANOW, attributes)


def _absent(port: str) -> DeviceUnreachable:
    return DeviceUnreachable(
        f"{port}: no such port; is it plugged in? `headgate scan serial` lists the ports",
        retry_within_s=RETRY_WITHIN_S,
    )


def _opening_failed(port: str, exc: Exception) -> DeviceUnreachable | ConfigError:
    number = exc.errno if isinstance(exc, OSError) else exc.args[0] if exc.args else None
    text = f"{port}: "
    if number in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        return _absent(port)
    if number == errno.EACCES:
        return DeviceUnreachable(text + "permission denied; add the agent's user to the group `dialout`")
    if number in (errno.EAGAIN, errno.EBUSY):
        return DeviceUnreachable(text + "in use by another program")
    if number == errno.ENOTTY or "Inappropriate ioctl" in str(exc):
        return ConfigError(f"options.port {text}is not a serial port")
    return DeviceUnreachable(text + str(exc), retry_within_s=RETRY_WITHIN_S)


def read_away(fd: int) -> int:
    """How many bytes were waiting; they are gone now. A tty holds no more than this; one that is filled faster than it
    is read does not hold us."""
    skipped = 0
    try:
        while skipped < _AWAY_AT_MOST_BYTES and (chunk := os.read(fd, READ_BYTES)):
            skipped += len(chunk)
    except BlockingIOError:
        pass
    return skipped


def hung_up(fd: int) -> bool:
    """Is the other end of this descriptor gone?"""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return any(event & (select.POLLHUP | select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0))
