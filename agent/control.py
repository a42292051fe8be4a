"""The running agent's door for technicians: a Unix socket in the state folder (in memory where that takes no writes,
`agent.runtime_dir`), and the client that speaks to it.

Rules:
1. Only the agent's own user and root: the socket is mode 0600, and each peer's credentials are asked of the kernel.
2. A message is a length and msgpack, bounded both ways; the server speaks first and says its version.
3. Many calls at once on one connection, each with its number; a client that goes away, or cancels, takes its calls
   with it (what a driver has begun ends by its own deadline; a write that has not begun never happens).
4. A client that reads slowly delays itself alone: it misses scans of a watch, and is thrown out if it reads nothing.
5. Requests on a line go through the line's own queue (`drivers.modbus_line`), reads and writes of a device through its
   own poller: nothing here opens what the agent holds.
6. An error crosses with its kind, text and facts, and is raised on the other side as what it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import os
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Protocol, TypeAlias, TypeVar

import msgspec

from agent import runtime_dir
from agent.field import (
    FieldError,
    LineInUse,
    LineTaken,
    Look,
    Reloaded,
    UnknownDevice,
    point_of,
    raw_of,
    shown,
    wall_ns_of,
)
from agent.poller import DevicePoller
from config.agent import Device
from drivers.contract import (
    ConfigError,
    DeviceUnreachable,
    DriverError,
    LineClaim,
    PointRefused,
    Reason,
    Scan,
    Value,
)
from drivers.modbus_address import Address

if TYPE_CHECKING:
    from agent.field_direct import Lines
    from drivers.modbus_line import Replies, Request

log = logging.getLogger(__name__)

SOCKET_NAME: Final = "control.sock"
VERSION: Final = 1  #: of what is spoken here; another one is refused with the remedy
_LENGTH: Final = struct.Struct(">I")
_MAX_REQUEST: Final = 1024 * 1024  #: bytes; a device's table with thousands of points
_MAX_ANSWER: Final = 16 * 1024 * 1024
_MAX_CLIENTS: Final = 16
_MAX_CALLS: Final = 512  #: under way on one connection; a scan asks 254 hosts at once
_MAX_SERIES: Final = 256  #: requests of one `ask`
_MAX_PDU: Final = 253  #: bytes: Modbus application protocol 1.1b3, 4.1
_SLOW_S: Final = 30.0  #: a client that takes nothing for this long is thrown out
_HELLO_S: Final = 5.0
_LOOKS_KEPT: Final = 256  #: of a watch, for a client that is busy elsewhere
_LONGEST_PATH: Final = 107  #: bytes of a Unix socket's name (unix(7): sun_path is 108 with its NUL)
_PEERCRED: Final = struct.Struct("3i")  #: pid, uid, gid (unix(7), SO_PEERCRED)

Seconds: TypeAlias = Annotated[float, msgspec.Meta(gt=0, le=600)]


class ControlRefused(FieldError):
    """An agent runs, and cannot be talked to."""


# --- what is said ---


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    version: int
    pid: int


class AskLine(msgspec.Struct, frozen=True, tag="ask"):
    address: Address
    series: Annotated[list[msgspec.Raw], msgspec.Meta(min_length=1, max_length=_MAX_SERIES)]
    connect_timeout_s: Seconds


class TellLines(msgspec.Struct, frozen=True, tag="lines"):
    pass


class ReadDevice(msgspec.Struct, frozen=True, tag="read"):
    device: str


class WatchDevice(msgspec.Struct, frozen=True, tag="watch"):
    device: str


class WritePoint(msgspec.Struct, frozen=True, tag="write"):
    device: str
    point: str
    value: Value


class Attempt(msgspec.Struct, frozen=True, tag="attempt"):
    device: Device
    timeout_s: Seconds


class Reload(msgspec.Struct, frozen=True, tag="reload"):
    pass


class TellStatus(msgspec.Struct, frozen=True, tag="status"):
    pass


Op: TypeAlias = AskLine | TellLines | ReadDevice | WatchDevice | WritePoint | Attempt | Reload | TellStatus


class Call(msgspec.Struct, frozen=True, tag="call"):
    id: int
    op: msgspec.Raw  #: an `Op`; decoded by itself, so that a bad one spoils only its own call


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    id: int


class Item(msgspec.Struct, frozen=True, tag="item"):
    """One of several: more come."""

    id: int
    body: msgspec.Raw


class Result(msgspec.Struct, frozen=True, tag="result"):
    """The last word on a call."""

    id: int
    body: msgspec.Raw


class Fault(msgspec.Struct, frozen=True, tag="fault"):
    """The last word on a call that failed."""

    id: int
    kind: str
    text: str
    reason: int = 0
    point: str = ""
    devices: list[str] = []

    def error(self) -> Exception:
        match self.kind:
            case "line-taken":
                return LineTaken(self.text, self.devices)
            case "unknown-device":
                return UnknownDevice(self.text)
            case "unreachable":
                return DeviceUnreachable(self.text, Reason(self.reason))
            case "refused":
                return PointRefused(self.point, self.text)
            case "config":
                return ConfigError(self.text)
            case _:
                return FieldError(self.text)


def fault_of(call: int, err: BaseException) -> Fault:
    """An error as it crosses."""
    match err:
        case LineTaken():
            return Fault(call, "line-taken", str(err), devices=list(err.devices))
        case UnknownDevice():
            return Fault(call, "unknown-device", str(err))
        case FieldError():
            return Fault(call, "field", str(err))
        case DeviceUnreachable():
            return Fault(call, "unreachable", str(err), reason=int(err.reason))
        case PointRefused():
            return Fault(call, "refused", str(err).removeprefix(f"{err.point}: "), point=err.point)
        case DriverError():
            return Fault(call, "config", str(err))
        case _:
            return Fault(call, "internal", f"the agent failed: {type(err).__name__}: {err}")


_encode = msgspec.msgpack.Encoder().encode
_decode_from_client = msgspec.msgpack.Decoder(Call | Cancel).decode
_decode_op = msgspec.msgpack.Decoder(Op).decode
_decode_from_server = msgspec.msgpack.Decoder(Hello | Item | Result | Fault).decode
_NOTHING: Final = msgspec.Raw(_encode(None))


def _raw(body: object) -> msgspec.Raw:
    return msgspec.Raw(_encode(body))


# --- the agent's side ---


class Held(msgspec.Struct, frozen=True):
    """A running device and the line it holds."""

    device: str
    claim: LineClaim
    isolated: bool


class Host(Protocol):
    """What the door opens to: `agent.daemon.Daemon`."""

    def poller_of(self, device: str) -> DevicePoller:
        """Raises `UnknownDevice` with the nearest name."""

    def held_lines(self) -> Sequence[Held]: ...

    async def reload(self) -> Reloaded: ...

    async def until_reloaded(self) -> None:
        """Until no reload is under way."""

    def status_document(self) -> bytes:
        """As JSON, as of now."""


class ControlServer:
    """The door. Lives in the agent's loop; the state folder's lock is held, so an old socket is nobody's."""

    def __init__(self, folder: Path, host: Host) -> None:
        self._folder = self._place = folder
        self._host = host
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """In the state folder, or, where that takes no writes, in memory. Raises `OSError`."""
        try:
            listener = _listening(self._folder)
        except OSError as err:
            self._place = runtime_dir.make(self._folder)
            listener = _listening(self._place)
            log.warning(
                "the control socket is in %s: none can be made in %s (%s)", self._place, self._folder, err
            )
        self._server = await asyncio.start_unix_server(self._came, sock=listener, limit=65_536)

    async def close(self) -> None:
        """Nobody comes in any more, and who is in is shown out."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        with contextlib.suppress(OSError):
            (self._place / SOCKET_NAME).unlink()
        clients = list(self._clients)
        for task in clients:
            task.cancel()
        if clients:
            await asyncio.wait(clients, timeout=1.0)

    async def _came(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        pid, uid = _peer(writer.get_extra_info("socket"))
        if task is None or uid not in (0, os.geteuid()) or len(self._clients) >= _MAX_CLIENTS:
            if uid not in (0, os.geteuid()):
                log.warning("a process of user %d was refused at the control socket", uid)
            writer.transport.abort()
            return
        task.set_name(f"control[{pid}]")
        self._clients.add(task)
        client = _Client(self._host, reader, writer, f"technician (process {pid})")
        try:
            await client.serve()
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            pass  # it went away
        except asyncio.CancelledError:
            pass  # the agent leaves; asyncio's streams would log this task's end as an error
        except msgspec.DecodeError as err:
            log.warning("control socket: process %d speaks another language: %s", pid, err)
        finally:
            self._clients.discard(task)
            client.close()


class _Client:
    """One connection, and what it has asked."""

    def __init__(
        self, host: Host, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str
    ) -> None:
        self._host = host
        self._reader = reader
        self._writer = writer
        self._name = name
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._speaking = asyncio.Lock()
        self._lines: Lines | None = None

    async def serve(self) -> None:
        """Until it goes away. Raises `IncompleteReadError` then; `DecodeError` for what is no message of ours."""
        await self._say(Hello(VERSION, os.getpid()))
        while True:
            await asyncio.sleep(0)  # who sends a thousand calls at once gets no thousand turns at once
            message = _decode_from_client(await _received(self._reader, _MAX_REQUEST))
            if isinstance(message, Cancel):
                task = self._calls.get(message.id)
                if task is not None:
                    task.cancel()
                continue
            if message.id in self._calls or len(self._calls) >= _MAX_CALLS:
                await self._say(
                    Fault(message.id, "field", f"at most {_MAX_CALLS} calls at once, each with its own id")
                )
                continue
            task = asyncio.create_task(self._call(message), name=f"control[{self._name}]")
            self._calls[message.id] = task
            # Not at the end of `_call`: who is cancelled before it began never gets there.
            task.add_done_callback(functools.partial(self._forget, message.id))

    def _forget(self, number: int, _: asyncio.Task[None]) -> None:
        self._calls.pop(number, None)

    def close(self) -> None:
        for task in self._calls.values():
            task.cancel()
        if self._lines is not None:
            self._lines.close()
        self._writer.transport.abort()

    async def _call(self, call: Call) -> None:
        try:
            try:
                body = await self._done(call.id, _decode_op(call.op))
                answer: Result | Fault = Result(call.id, body)
            except msgspec.DecodeError as err:
                answer = Fault(call.id, "field", f"the agent does not understand this: {err}")
            except (FieldError, DriverError) as err:
                answer = fault_of(call.id, err)
            except Exception as err:
                log.exception("control socket: a call failed")
                answer = fault_of(call.id, err)
            await self._say(answer)
        except (OSError, TimeoutError):
            self._writer.transport.abort()  # it went away, or takes nothing; `serve` ends with it

    async def _done(self, call: int, op: Op) -> msgspec.Raw:
        host = self._host
        match op:
            case AskLine():
                return _raw(await self._ask(op))
            case TellLines():
                return _raw(lines_in_use(host.held_lines()))
            case ReadDevice():
                return _look(op.device, await host.poller_of(op.device).ask_read())
            case WatchDevice():
                await self._watch(call, op.device)
                return _NOTHING
            case WritePoint():
                poller = host.poller_of(op.device)
                point = point_of(op.device, poller.points, op.point)
                return _look(op.device, await poller.ask_write(point, raw_of(point, op.value)))
            case Attempt():
                from agent.field_direct import attempt

                taken = {held.claim.key: (held.device, _as_attempted(held)) for held in host.held_lines()}
                return _raw(await attempt(op.device, op.timeout_s, taken))
            case Reload():
                return _raw(await host.reload())
            case TellStatus():
                return _raw(host.status_document())

    async def _ask(self, op: AskLine) -> Replies:
        from agent.field_direct import Lines
        from drivers.modbus_line import Request

        series = [msgspec.msgpack.decode(raw, type=Request) for raw in op.series]
        for request in series:
            if len(request.pdu) > _MAX_PDU or not 0 < request.timeout_s <= 600:
                raise FieldError(f"a request has at most {_MAX_PDU} bytes and a timeout of at most 600 s")
        on_it = [held for held in self._host.held_lines() if held.claim.key == op.address.key]
        names = [held.device for held in on_it]
        for held in on_it:
            if not held.claim.shared or (held.isolated and held.claim.settings != op.address.settings):
                raise LineTaken(
                    f"{op.address}: {held.device} has this line ({held.claim.settings}) for itself; set its "
                    "enabled = false and reload, to try something else on it",
                    names,
                )
            if held.isolated:
                from agent.isolation import IsolatedDriver

                driver = self._host.poller_of(held.device).driver
                if isinstance(driver, IsolatedDriver):  # its process owns the line
                    return await driver.ask_line(op.address, series, op.connect_timeout_s)
        if self._lines is None:
            self._lines = Lines(self._name)
        try:
            return await self._lines.ask(op.address, series, op.connect_timeout_s)
        except LineTaken as err:
            raise LineTaken(str(err), names) from err

    async def _watch(self, call: int, device: str) -> None:
        while True:
            poller = self._host.poller_of(device)
            watch = poller.watch()
            try:
                while (scan := await watch.next()) is not None:
                    await self._say(Item(call, _look(device, scan)))
            finally:
                poller.unwatch(watch)
            # Its poller ended. Where the device was exchanged by a reload, go on with the new one.
            await self._host.until_reloaded()
            if self._host.poller_of(device) is poller:
                raise FieldError(f"{device} is polled no more; see headgate status")

    async def _say(self, message: Hello | Item | Result | Fault) -> None:
        """Raises `TimeoutError` where the other side takes nothing."""
        data = _encode(message)
        if len(data) > _MAX_ANSWER and not isinstance(message, Hello):
            data = _encode(Fault(message.id, "field", f"the answer is larger than {_MAX_ANSWER} bytes"))
        async with self._speaking, asyncio.timeout(_SLOW_S):
            self._writer.write(_LENGTH.pack(len(data)) + data)
            await self._writer.drain()


def lines_in_use(held: Sequence[Held]) -> list[LineInUse]:
    """By line, with the devices on each."""
    by_claim: dict[LineClaim, list[str]] = {}
    for each in held:
        by_claim.setdefault(each.claim, []).append(each.device)
    return [LineInUse(claim, devices) for claim, devices in by_claim.items()]


def _as_attempted(held: Held) -> LineClaim:
    """A line in another process cannot be shared by this one."""
    return msgspec.structs.replace(held.claim, shared=held.claim.shared and not held.isolated)


def _look(device: str, scan: Scan) -> msgspec.Raw:
    return _raw(shown(device, scan, wall_ns=wall_ns_of(scan.taken_at_ns)))


async def _received(reader: asyncio.StreamReader, at_most: int) -> bytes:
    (size,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if size > at_most:
        raise msgspec.DecodeError(f"a message of {size} bytes; at most {at_most} are allowed")
    return await reader.readexactly(size)


def _peer(connection: socket.socket) -> tuple[int, int]:
    """The other side's process and user."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
    pid, uid, _ = _PEERCRED.unpack(data)
    return pid, uid


@contextlib.contextmanager
def _short(folder: Path, name: str) -> Iterator[str]:
    """A name of `folder / name` that fits a socket's address: a long path goes by way of an open descriptor."""
    path = folder / name
    if len(os.fsencode(path)) <= _LONGEST_PATH:
        yield str(path)
        return
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)


def _listening(folder: Path) -> socket.socket:
    """A listening socket of mode 0600, moved into place when it is ready, over whatever a killed agent left."""
    aside = f".{SOCKET_NAME}.new"
    (folder / aside).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.setblocking(False)
        with _short(folder, aside) as address:
            listener.bind(address)
        (folder / aside).chmod(0o600)
        listener.listen(_MAX_CLIENTS)
        (folder / aside).rename(folder / SOCKET_NAME)
    except OSError:
        listener.close()
        raise
    return listener


# --- the technician's side ---

T = TypeVar("T")


class _Waiting:
    """What a call waits for: items, and a last word."""

    def __init__(self) -> None:
        self.items: deque[msgspec.Raw] = deque(maxlen=_LOOKS_KEPT)
        self.last: Result | Fault | None = None
        self.wake = asyncio.Event()


class AgentField:
    """`agent.field.Field` by way of the running agent."""

    through_agent = True

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._numbers = itertools.count(1)
        self._waiting: dict[int, _Waiting] = {}
        self._gone = ""
        self._listening: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, state_dir: Path) -> AgentField:
        """Raises `ControlRefused`."""
        try:
            return await cls._connect(state_dir)
        except ControlRefused:
            for place in runtime_dir.found(state_dir):
                with contextlib.suppress(ControlRefused):
                    return await cls._connect(place)
            raise

    @classmethod
    async def _connect(cls, folder: Path) -> AgentField:
        path = folder / SOCKET_NAME
        try:
            async with asyncio.timeout(_HELLO_S):
                with _short(folder, SOCKET_NAME) as address:
                    reader, writer = await asyncio.open_unix_connection(address)
                hello = _decode_from_server(await _received(reader, _MAX_ANSWER))
        except TimeoutError:
            raise ControlRefused(f"{path}: the agent does not answer") from None
        except asyncio.IncompleteReadError:
            raise ControlRefused(f"{path}: the agent refuses this user, or too many are connected") from None
        except (OSError, msgspec.DecodeError) as err:
            why = err.strerror if isinstance(err, OSError) and err.strerror else str(err)
            raise ControlRefused(f"{path}: {why}") from err
        if not isinstance(hello, Hello) or hello.version != VERSION:
            writer.transport.abort()
            raise ControlRefused(f"{path}: the agent is of another version; restart it")
        field = cls(reader, writer)
        field._listening = asyncio.create_task(field._listen(), name="agent's answers")
        return field

    async def ask(
        self, address: Address, series: Sequence[Request], *, connect_timeout_s: float = 3.0
    ) -> Replies:
        from drivers.modbus_line import Replies

        op = AskLine(address, [_raw(request) for request in series], connect_timeout_s)
        return await self._call(op, Replies)

    async def lines(self) -> list[LineInUse]:
        return await self._call(TellLines(), list[LineInUse])

    async def read(self, device: str) -> Look:
        return await self._call(ReadDevice(device), Look)

    async def watch(self, device: str) -> AsyncIterator[Look]:
        decode = msgspec.msgpack.Decoder(Look).decode
        with self._begun(WatchDevice(device)) as (waiting, sent):
            await sent
            while True:
                while waiting.items:
                    yield decode(waiting.items.popleft())
                if waiting.last is not None:
                    _body(waiting.last)
                    return
                waiting.wake.clear()
                await waiting.wake.wait()

    async def write(self, device: str, point: str, value: Value) -> Look:
        return await self._call(WritePoint(device, point, value), Look)

    async def attempt(self, device: Device, *, timeout_s: float = 10.0) -> Look:
        return await self._call(Attempt(device, timeout_s), Look)

    async def reload(self) -> Reloaded:
        return await self._call(Reload(), Reloaded)

    async def status(self) -> bytes:
        """The agent's status as of now, as JSON."""
        return await self._call(TellStatus(), bytes)

    async def close(self) -> None:
        self._lost("closed")
        self._writer.transport.abort()
        if self._listening is not None:
            self._listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._listening

    # --- inside ---

    async def _call(self, op: Op, to: type[T]) -> T:
        with self._begun(op) as (waiting, sent):
            await sent
            while waiting.last is None:
                await waiting.wake.wait()
            return msgspec.msgpack.decode(_body(waiting.last), type=to)

    @contextlib.contextmanager
    def _begun(self, op: Op) -> Iterator[tuple[_Waiting, Awaitable[None]]]:
        """A call under way; left before its last word, it is cancelled."""
        if self._gone:
            raise FieldError(self._gone)
        number = next(self._numbers)
        waiting = self._waiting[number] = _Waiting()
        try:
            yield waiting, self._say(Call(number, _raw(op)))
        finally:
            del self._waiting[number]
            if waiting.last is None and not self._gone:
                data = _encode(Cancel(number))
                self._writer.write(_LENGTH.pack(len(data)) + data)

    async def _say(self, message: Call) -> None:
        data = _encode(message)
        if len(data) > _MAX_REQUEST:
            raise FieldError(f"this is too much for one call: {len(data)} bytes of {_MAX_REQUEST}")
        self._writer.write(_LENGTH.pack(len(data)) + data)
        with contextlib.suppress(ConnectionError):  # `_listen` tells it
            await self._writer.drain()

    async def _listen(self) -> None:
        why = "the agent went away (it was stopped or restarted); try again"
        try:
            while True:
                message = _decode_from_server(await _received(self._reader, _MAX_ANSWER))
                if isinstance(message, Hello):
                    continue
                waiting = self._waiting.get(message.id)
                if waiting is None:
                    continue  # nobody waits for it any more
                if isinstance(message, Item):
                    waiting.items.append(message.body)
                else:
                    waiting.last = message
                waiting.wake.set()
        except (OSError, asyncio.IncompleteReadError):
            pass
        except msgspec.DecodeError as err:
            why = f"the agent says what is not understood: {err}"
        finally:
            self._lost(why)

    def _lost(self, why: str) -> None:
        self._gone = self._gone or why
        for number, waiting in self._waiting.items():
            if waiting.last is None:
                waiting.last = Fault(number, "field", self._gone)
                waiting.wake.set()


def _body(last: Result | Fault) -> msgspec.Raw:
    """Raises what the agent's side raised."""
    if isinstance(last, Fault):
        raise last.error()
    return last.body
