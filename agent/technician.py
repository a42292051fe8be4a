"""What the technician's commands share: the way to the field, line options, exit codes, and plain output.

Rules:

1. A command ends with 0 (done, found), 1 (trouble: nothing found, no answer), 2 (cannot be done: wrong usage, a
   configuration or a line that does not allow it) or 130 (stopped by Ctrl-C). An expected error is one line on stderr
   with its remedy, never a traceback.
2. Eighty columns, no colour needed: colour only repeats what stands there in words, and is left out with NO_COLOR, or
   where the output is no terminal.
3. With `--json` stdout holds one JSON document (`watch`: one a line) and nothing else; progress goes to stderr. What
   fails is a document too: `{"error": text, "exit": status}`.
4. Ctrl-C ends a command at every stage, at a question too; a terminal of any encoding shows what it can.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import ipaddress
import os
import shlex
import signal
import struct
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, cast

import click
import msgspec

from agent.cli import DEFAULT_CONFIG
from agent.field import Field, FieldError, LineTaken, UnknownDevice
from drivers.contract import ConfigError, DriverError, PointRefused, Quality, Reason, Value
from drivers.modbus_address import Address, HostPort, SerialPort
from drivers.modbus_line import Failure, Reply, Request
from drivers.modbus_plan import Table

OK: Final = 0
TROUBLE: Final = 1
CANNOT: Final = 2
STOPPED: Final = 130

WIDTH: Final = 80
EXITS: Final = "Exit: 0 done, 1 trouble (nothing found, no answer), 2 cannot be done, 130 stopped by Ctrl-C."

MODBUS_PORT: Final = 502
_PARITIES: Final[Mapping[str, str]] = {"none": "N", "even": "E", "odd": "O", "n": "N", "e": "E", "o": "O"}
PARITY_WORDS: Final[Mapping[str, str]] = {"N": "none", "E": "even", "O": "odd"}
READ_FUNCTION: Final = {Table.COIL: 1, Table.DISCRETE: 2, Table.HOLDING: 3, Table.INPUT: 4}


class Cannot(Exception):
    """This cannot be done; the text has the remedy."""


class Trouble(Exception):
    """It was tried, and did not work out."""


# ------------------------------------------------------------------------------------ the way in


class Way(msgspec.Struct, frozen=True):
    """Which configuration and state folder a command works with."""

    file: Path
    state_dir: Path | None

    @property
    def folder(self) -> Path:
        from agent.configuration import state_dir_of

        return self.state_dir or state_dir_of(self.file)

    def is_there(self) -> bool:
        """Raises `Cannot` for a file that may not be read: it names an agent that may hold the lines."""
        try:
            with self.file.open("rb"):
                return True
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as err:
            raise Cannot(
                f"{self.file}: {err.strerror}; run this as root or as the agent's user: sudo -u headgate headgate ..."
            ) from err

    def missing(self) -> Cannot:
        return Cannot(
            f"{self.file}: there is no such file; name yours with --config, or begin one "
            "(config/samples/first-device.toml shows how)"
        )

    @contextlib.asynccontextmanager
    async def field(self, *, configured: bool = False) -> AsyncIterator[Field]:
        """`configured`: the device must stand in the file. Raises `FieldError`, `Cannot`."""
        from agent.field_open import open_field

        is_there = self.is_there()
        field = await open_field(self.file if is_there else None, self.folder)
        try:
            if configured and not is_there and not field.through_agent:
                raise self.missing()
            yield field
        finally:
            await field.close()


def field_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--config`, `--state-dir` as `way`, and `--json` as `as_json`."""

    @click.option(
        "--config", "config_file", type=click.Path(path_type=Path, dir_okay=False, readable=False),
        default=DEFAULT_CONFIG, show_default=True, help="The configuration.",
    )  # fmt: skip
    @click.option(
        "--state-dir", type=click.Path(path_type=Path, file_okay=False), help="Instead of gateway.state_dir."
    )
    @click.option("--json", "as_json", is_flag=True, help="JSON on stdout, nothing else.")
    @wraps(function)
    def wrapped(*args: Any, config_file: Path, state_dir: Path | None, **kwargs: Any) -> Any:
        return function(*args, way=Way(config_file, state_dir), **kwargs)

    return wrapped


def run(work: Coroutine[Any, Any, int]) -> NoReturn:
    """Run a command to its exit status. Ctrl-C cancels it once, so that it can tell what it has."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no "…" shows "?", not a traceback
    try:
        sys.exit(asyncio.run(_interruptible(work)))
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(STOPPED)
    except (Trouble, DriverError) as err:
        fail(str(err), CANNOT if isinstance(err, ConfigError | PointRefused) else TROUBLE)
    except (Cannot, LineTaken, UnknownDevice, FieldError) as err:
        fail(str(err), CANNOT)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nothing more to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(OK)


async def _interruptible(work: Coroutine[Any, Any, int]) -> int:
    task = asyncio.current_task()
    loop = asyncio.get_running_loop()
    if task is not None:
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(signal.SIGINT, task.cancel)
            loop.add_signal_handler(signal.SIGTERM, task.cancel)
    return await work


def fail(text: str, code: int) -> NoReturn:
    context = click.get_current_context(silent=True)
    if context is not None and context.params.get("as_json"):
        with contextlib.suppress(BrokenPipeError):
            say(as_json({"error": text, "exit": code}, indent=0))
    click.echo(f"headgate: {text}", err=True)
    sys.exit(code)


async def answer_to(question: str) -> str:
    """What the person at the terminal types, nothing at Ctrl-D. Ctrl-C cancels the command here as everywhere: a
    blocking read, or one in a thread, would wait for Enter first."""
    loop = asyncio.get_running_loop()
    typed: asyncio.Future[bytes] = loop.create_future()
    terminal = sys.stdin.fileno()

    def readable() -> None:
        loop.remove_reader(terminal)
        try:
            line = os.read(terminal, 4096)  # of a terminal, one line
        except OSError:
            line = b""  # it is gone
        if not typed.done():
            typed.set_result(line)

    click.echo(f"{question} ", nl=False, err=True)
    loop.add_reader(terminal, readable)
    try:
        line = await typed
        if not line.endswith(b"\n"):
            click.echo(err=True)
    except asyncio.CancelledError:
        click.echo(err=True)
        raise
    finally:
        loop.remove_reader(terminal)
    return line.decode(errors="replace").strip()


# ------------------------------------------------------------------------------------------ lines


class LineOptions(msgspec.Struct, frozen=True):
    """Where a line is, as far as it was said on the command line."""

    port: str | None = None
    host: str | None = None
    baud: int | None = None
    parity: str | None = None
    stop_bits: int | None = None
    data_bits: int | None = None
    framing: str | None = None
    unit: int | None = None

    @property
    def is_given(self) -> bool:
        return self.port is not None or self.host is not None

    def address(self) -> Address:
        """Raises `Cannot`. What was not said of a serial port is as most devices have it: 9600 8N1 (7E1 in ASCII)."""
        if (self.port is None) == (self.host is None):
            raise Cannot("say where: --port /dev/ttyUSB0, or --host 192.0.2.10")
        if self.port is not None:
            if self.framing not in (None, "rtu", "ascii"):
                raise Cannot(f"--framing {self.framing} needs --host; a serial port speaks rtu or ascii")
            is_ascii = self.framing == "ascii"
            return SerialPort(
                self.port, self.baud or 9600, parity_letter(self.parity or ("even" if is_ascii else "none")),
                self.stop_bits or 1, self.data_bits or _usual_bits(self.framing),
                framing=cast(Literal["rtu", "ascii"], self.framing or "rtu"),
            )  # fmt: skip
        assert self.host is not None  # noqa: S101 - one of the two, as just checked
        if self.framing in ("rtu", "ascii"):
            raise Cannot(
                f"--framing {self.framing} needs --port; behind a host it is {self.framing}_over_tcp"
            )
        return host_port(self.host, self.framing or "tcp")

    def options(self) -> dict[str, Value]:
        """As `[device.options]` of a Modbus device."""
        return options_of(self.address(), 1 if self.unit is None else self.unit)


def _usual_bits(framing: str | None) -> int:
    """What the driver takes where nothing is said."""
    return 7 if framing == "ascii" else 8


def options_of(address: Address, unit: int) -> dict[str, Value]:
    told: dict[str, Value]
    if isinstance(address, SerialPort):
        told = {"serial": address.device, "baud": address.baud, "parity": PARITY_WORDS[address.parity]}
        if address.stop_bits != 1:
            told["stop_bits"] = address.stop_bits
        if address.data_bits != _usual_bits(address.framing):
            told["data_bits"] = address.data_bits
        if address.framing != "rtu":
            told["framing"] = address.framing
    else:
        told = {"host": address.host}
        if address.port != MODBUS_PORT:
            told["port"] = address.port
        if address.framing != "tcp":
            told["framing"] = address.framing
    return told | {"unit": unit}


def words_of(address: Address, unit: int | None = None) -> list[str]:
    """The same as command-line words."""
    if isinstance(address, SerialPort):
        words = [
            "--port",
            address.device,
            "--baud",
            str(address.baud),
            "--parity",
            PARITY_WORDS[address.parity],
        ]
        words += ["--stop-bits", str(address.stop_bits)] if address.stop_bits != 1 else []
        words += (
            ["--data-bits", str(address.data_bits)]
            if address.data_bits != _usual_bits(address.framing)
            else []
        )
        words += ["--framing", address.framing] if address.framing != "rtu" else []
    else:
        shown = f"[{address.host}]" if ":" in address.host else address.host
        words = ["--host", address.host if address.port == MODBUS_PORT else f"{shown}:{address.port}"]
        words += ["--framing", address.framing] if address.framing != "tcp" else []
    return words + (["--unit", str(unit)] if unit is not None else [])


def parity_letter(word: str) -> str:
    try:
        return _PARITIES[word.lower()]
    except KeyError:
        raise Cannot(f"parity {word!r} is none, even or odd") from None


def host_port(text: str, framing: str = "tcp") -> HostPort:
    """`192.0.2.10`, `meter.local:1502`, `[2001:db8::1]:502`. Raises `Cannot`."""
    host, port = text, str(MODBUS_PORT)
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        port = rest.removeprefix(":") or port
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    try:
        known = ":" not in host or bool(ipaddress.IPv6Address(host))
    except ValueError:
        known = False
    if not host or not known or not port.isascii() or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise Cannot(f"{text!r} is not a host, nor host:port")
    return HostPort(host, int(port), cast(Literal["tcp", "udp", "rtu_over_tcp", "ascii_over_tcp"], framing))


_LINE_KEYS: Final = ("port", "host", "baud", "parity", "stop_bits", "data_bits", "framing", "unit")


def line_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--port`, `--host`, and what belongs to them, as `line`."""

    @click.option("--port", help="Serial port: /dev/ttyUSB0, /dev/serial/by-id/..., usb:0403:6001:A10K2X.")
    @click.option("--host", help="Modbus TCP: a host, or host:port (502 unless said).")
    @click.option("--baud", type=click.IntRange(50, 4_000_000), help="Serial: 9600 unless said.")
    @click.option(
        "--parity", type=click.Choice(["none", "even", "odd"]), help="Serial: none unless said; ascii: even."
    )
    @click.option("--stop-bits", type=click.IntRange(1, 2), help="Serial: 1 unless said.")
    @click.option("--data-bits", type=click.IntRange(7, 8), help="Serial: 8 unless said; ascii: 7.")
    @click.option(
        "--framing",
        type=click.Choice(["rtu", "ascii", "tcp", "udp", "rtu_over_tcp", "ascii_over_tcp"]),
        help="rtu on a port and tcp to a host unless said.",
    )
    @click.option("--unit", type=click.IntRange(0, 255), help="Unit (slave) address: 1 unless said.")
    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        line = LineOptions(**{key: kwargs.pop(key) for key in _LINE_KEYS})
        return function(*args, line=line, **kwargs)

    return wrapped


# --------------------------------------------------------------------------------------- requests

SERIAL_TURNAROUND_S: Final = 0.5  #: what a device may take to begin its answer, where it is known to be there
HOST_TIMEOUT_S: Final = 1.5


def reading(
    address: Address, unit: int, table: Table, first: int, count: int, *, timeout_s: float | None = None
) -> Request:
    """A read of registers or bits, and how long its answer may take on this line."""
    size = (count + 7) // 8 if table.of_bits else 2 * count
    function = READ_FUNCTION[table]
    within_s = timeout_s or answer_s(address, 8, size + 5)
    return Request(
        unit,
        struct.pack(">BHH", function, first, count),
        bytes([function, size]),
        2 + size,
        within_s,
        within_s,
    )


def answer_s(address: Address, sent: int, received: int) -> float:
    """How long an answer of so many bytes may take."""
    if isinstance(address, HostPort):
        return HOST_TIMEOUT_S
    bytes_on_wire = (sent + received) * (2 if address.framing == "ascii" else 1)
    return bytes_on_wire * address.character_s + SERIAL_TURNAROUND_S


def answered(reply: Reply) -> bool:
    """A proper reply or an exception: there is somebody."""
    return isinstance(reply, bytes) or reply.code != 0


def why_not(reply: Failure) -> str:
    """In words, for a person."""
    known = {
        1: "it does not know this function",
        2: "it has no such address",
        3: "it does not take this quantity",
        4: "the device failed",
        5: "it needs longer",
        6: "it is busy",
        10: "the gateway has no way to it",
        11: "the gateway gets no answer from it",
    }
    if reply.code:
        return f"exception {reply.code}: {known.get(reply.code, 'refused')}"
    return REASON_WORDS.get(reply.reason, reply.reason.name.lower())


# ----------------------------------------------------------------------------------------- output

REASON_WORDS: Final[Mapping[Reason, str]] = {
    Reason.GOOD: "good",
    Reason.RATE: "changed too fast",
    Reason.STUCK: "does not change",
    Reason.CLOCK: "time estimated",
    Reason.DEVICE_DOUBT: "device doubts it",
    Reason.RANGE: "out of range",
    Reason.NOT_IN_ENUM: "no valid code",
    Reason.SENTINEL: "not available",
    Reason.DEVICE_FAULT: "device: fault",
    Reason.TIMEOUT: "no answer",
    Reason.DISCONNECTED: "disconnected",
    Reason.EXCEPTION: "exception",
    Reason.CRC: "damaged (CRC)",
    Reason.FRAMING: "not understood",
    Reason.REFUSED: "refused",
    Reason.NAN: "not a number",
    Reason.INFINITE: "infinite",
    Reason.DECODE: "does not decode",
    Reason.DECRYPT: "wrong key",
    Reason.STALE: "stale",
    Reason.MISSING: "not in message",
    Reason.OVERFLOW: "too large",
    Reason.DRIVER: "driver failed",
    Reason.BUSY: "busy",
    Reason.BEHIND_GATEWAY: "behind gateway",
}
QUALITY_COLOURS: Final[Mapping[Quality, str]] = {
    Quality.GOOD: "green",
    Quality.UNCERTAIN: "yellow",
    Quality.BAD: "red",
}


def in_colour(stream: Any = None) -> bool:
    """Whether to colour what goes there: a terminal, and nobody minds (https://no-color.org)."""
    stream = stream or sys.stdout
    return bool(stream.isatty()) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def painted(text: str, colour: str) -> str:
    return click.style(text, fg=colour) if in_colour() else text


def quality_words(reason: Reason) -> str:
    """`good`, or the quality with its reason: `bad: no answer`."""
    if reason is Reason.GOOD:
        return "good"
    return f"{reason.quality.name.lower()}: {REASON_WORDS.get(reason, reason.name.lower())}"


def number(value: Value | None) -> str:
    """A value as a person writes it: no exponent where none is needed, no digits that are noise."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, int):
        return str(value)
    # Seven digits are all that a 32-bit float has; a scaled 32-bit integer has ten.
    text = f"{value:.7g}" if _is_single(value) else f"{value:.10g}"
    return f"{value:.0f}" if "e+" in text and abs(value) < 1e15 else text


def _is_single(value: float) -> bool:
    try:
        return bool(struct.unpack("f", struct.pack("f", value))[0] == value)
    except OverflowError:
        return False


def as_json(told: object, *, indent: int = 2) -> str:
    raw = msgspec.json.encode(told, enc_hook=str)
    return (msgspec.json.format(raw, indent=indent) if indent else raw).decode()


def say(text: str = "") -> None:
    click.echo(text, color=None if in_colour() else False)


def note(text: str) -> None:
    """Beside the result: on stderr, wrapped."""
    for line in wrapped(text):
        click.echo(line, err=True)


def wrapped(text: str, *, lead: str = "", width: int = WIDTH) -> list[str]:
    return textwrap.wrap(
        printable(text, also="\n\t"),
        width,
        initial_indent=lead,
        subsequent_indent=lead,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [lead]


def columns(rows: Sequence[Sequence[str]], *, lead: str = "", right: Iterable[int] = ()) -> list[str]:
    """Rows as aligned columns, the last as long as it likes up to 80: what is too long before it is cut, so that it is
    always seen."""
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    fixed = len(lead) + 2 * (len(widths) - 1)
    while fixed + sum(widths) > WIDTH and (widest := max(widths[:-1], default=0)) > _LONGEST_NUMBER:
        widths[widths.index(widest)] -= 1
    rows = [
        [*(cut(cell, width) for cell, width in zip(row[:-1], widths, strict=False)), row[-1]] for row in rows
    ]
    to_right = set(right)
    told = []
    for row in rows:
        padded = enumerate(zip(row, widths, strict=True))
        cells = [cell.rjust(width) if i in to_right else cell.ljust(width) for i, (cell, width) in padded]
        told.append(cut((lead + "  ".join(cells)).rstrip()))
    return told


_LONGEST_NUMBER: Final = 20  #: characters (64 bits, signed); a column is cut no shorter, so no number ever is


def cut(text: str, width: int = WIDTH) -> str:
    text = printable(text)
    return text if len(text) <= width else text[: width - 1] + "…"


def printable(text: str, *, also: str = "") -> str:
    """What a device calls itself steers no terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c in also else "?" for c in text)


def command_line(*words: str) -> str:
    """As typed in a shell."""
    return " ".join(shlex.quote(word) for word in words)


def point_words(table: Mapping[str, Value]) -> str:
    """A point as `--point` takes it."""
    rest = [
        f"{key}={str(v).lower() if isinstance(v, bool) else v}" for key, v in table.items() if key != "name"
    ]
    return ",".join([str(table["name"]), *rest])


def duration(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


class Progress:
    """A bar on a terminal; elsewhere a line now and then; nothing where nobody looks."""

    def __init__(self, total_s: float, *, silent: bool, every_s: float = 10.0) -> None:
        self._total_s = total_s
        self._silent = silent
        self._every_s = every_s
        self._loop = asyncio.get_running_loop()
        self._began_s = self._loop.time()
        self._told_s = self._began_s
        self._drawn_s = 0.0
        self._is_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._width = 0

    def at(self, left_s: float, what: str) -> None:
        """Where it is. The bar is time, not requests: they cost differently."""
        if self._silent:
            return
        now_s = self._loop.time()
        spent_s = now_s - self._began_s
        share = spent_s / max(1e-6, spent_s + left_s)
        if self._is_terminal:
            if now_s - self._drawn_s < 0.1:
                return
            self._drawn_s = now_s
            filled = int(24 * share)
            bar = "#" * filled + "-" * (24 - filled)
            line = cut(f"[{bar}] {share:4.0%}  {duration(left_s)} left  {what}", WIDTH - 1)
            click.echo("\r" + line.ljust(self._width), nl=False, err=True)
            self._width = len(line)
        elif now_s - self._told_s >= self._every_s:
            self._told_s = now_s
            click.echo(cut(f"  {share:.0%}, at most {duration(left_s)} left: {what}"), err=True)

    def clear(self) -> None:
        """Before something else is said, and at the end."""
        if self._width:
            click.echo("\r" + " " * self._width + "\r", nl=False, err=True)
            self._width = 0
