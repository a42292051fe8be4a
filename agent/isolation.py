"""`isolate = true`: a driver in a process of its own, behind a stand-in that the poller cannot tell from the real one.

Rules:
1. The device's table goes over a socket pair, never over the command line: it may hold secrets.
2. One child per device. It dies with the agent: the kernel kills it (prctl(2), PR_SET_PDEATHSIG), and it leaves when
   the socket ends.
3. A call that is given up is cancelled in the child. A child that does not end it soon is stuck in code that blocks: it
   is killed, and the next `connect` starts another.
4. A child that dies is the driver's fault, as any exception of it would be: the poller starts a new one, with backoff.
5. The scan crosses as columns, stamped where it arrived; both processes read the same boot clock.

What it costs: a process of about 30 MB, and some 0.2 ms per read (`tests/benchmarks/bench_isolation.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import struct
import subprocess
import sys
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final

import msgspec

from drivers.contract import (
    ConfigError,
    DeviceUnreachable,
    Driver,
    DriverError,
    LineClaim,
    Point,
    PointRefused,
    PushDriver,
    Reason,
    Scan,
    Value,
)
from drivers.modbus_address import Address
from drivers.registry import AnyDriver

if TYPE_CHECKING:
    from drivers.modbus_line import Replies, Request

LENGTH: Final = struct.Struct(">I")
MOST_BYTES: Final = 16 * 1024 * 1024  #: of one message, either way
_START_S: Final = 30.0  #: for the child to say its first word; a small board takes seconds to load Python
_SETTLE_S: Final = 1.0  #: for a cancelled call to end in the child, before it is taken for stuck
_CLOSE_S: Final = 1.2  #: for the child to close its device and leave; the poller allows 2 s for all of it
_REAP_S: Final = 0.5  #: for a killed process to be gone
_SCANS_KEPT: Final = 1024  #: of a pushing device, when the agent is busy
_CHILD: Final = "from agent.isolation_child import main; main()"


class DriverProcessDied(Exception):
    """The driver's process ended by itself."""


# --- what is said: to the child ---


class Setup(msgspec.Struct, frozen=True, tag="setup", array_like=True):
    """The first message: the device as the configuration describes it."""

    name: str
    driver: str
    options: dict[str, Any]
    points: list[dict[str, Any]]
    log_level: str


class Recall(msgspec.Struct, frozen=True, tag="recall", array_like=True):
    memory: bytes


class Connect(msgspec.Struct, frozen=True, tag="connect", array_like=True):
    id: int


class Read(msgspec.Struct, frozen=True, tag="read", array_like=True):
    id: int
    points: list[int] | None  #: by their place in the device; `None`: all


class Write(msgspec.Struct, frozen=True, tag="write", array_like=True):
    id: int
    point: int
    value: Value


class Listen(msgspec.Struct, frozen=True, tag="listen", array_like=True):
    id: int


class Ask(msgspec.Struct, frozen=True, tag="ask", array_like=True):
    """A technician's requests on the line that this child owns."""

    id: int
    address: Address
    series: list[msgspec.Raw]
    connect_timeout_s: float


class Cancel(msgspec.Struct, frozen=True, tag="cancel", array_like=True):
    id: int


class Close(msgspec.Struct, frozen=True, tag="close", array_like=True):
    id: int


# --- and by it ---


class Done(msgspec.Struct, frozen=True, tag="done", array_like=True):
    id: int
    body: msgspec.Raw = msgspec.Raw(b"\xc0")  #: nil


class Scanned(msgspec.Struct, frozen=True, tag="scan", array_like=True):
    """A scan; of a listening call more come."""

    id: int
    taken_at_ns: int
    values: list[Value | None]
    reasons: dict[int, Reason]
    points: list[int] | None
    overruns: int


class Failed(msgspec.Struct, frozen=True, tag="failed", array_like=True):
    id: int
    kind: str
    text: str
    reason: Reason = Reason.DRIVER
    point: str = ""
    retry_within_s: float | None = None


class Memory(msgspec.Struct, frozen=True, tag="memory", array_like=True):
    """What the driver wants to remember."""

    data: bytes


encode = msgspec.msgpack.Encoder().encode
decode_in_child = msgspec.msgpack.Decoder(
    Setup | Recall | Connect | Read | Write | Listen | Ask | Cancel | Close
).decode
_decode = msgspec.msgpack.Decoder(Done | Scanned | Failed | Memory).decode
_decode_value = msgspec.msgpack.Decoder(Value).decode


def failure_of(call: int, err: BaseException) -> Failed:
    """An error of the driver, as it crosses."""
    match err:
        case DeviceUnreachable():
            return Failed(call, "unreachable", str(err), err.reason, retry_within_s=err.retry_within_s)
        case PointRefused():
            return Failed(call, "refused", str(err).removeprefix(f"{err.point}: "), point=err.point)
        case DriverError():
            return Failed(call, "config", str(err))
        case _:
            return Failed(call, "fault", f"{type(err).__name__}: {err}")


def _error_of(failed: Failed) -> Exception:
    match failed.kind:
        case "unreachable":
            return DeviceUnreachable(failed.text, failed.reason, retry_within_s=failed.retry_within_s)
        case "refused":
            return PointRefused(failed.point, failed.text)
        case "config":
            return ConfigError(failed.text)
        case _:
            return RuntimeError(failed.text)


# --- the child, as the agent sees it ---


class _Child:
    """One process, from its start to its end."""

    def __init__(self, setup: Setup, on_memory: Callable[[bytes], None]) -> None:
        """Raises `OSError` where no process can be started."""
        ours, theirs = socket.socketpair()
        self._on_memory = on_memory
        self._numbers = itertools.count(1)
        self._calls: dict[int, asyncio.Future[Done | Scanned]] = {}
        self._streams: set[int] = set()  #: calls whose scans are not their last word
        self._listener: tuple[int, Callable[[Scanned | Exception], None]] | None = None
        self._spoke = False
        self._unsettled: asyncio.Future[Done | Scanned] | None = None  #: a call given up, not yet ended
        self._buffer = bytearray()
        self.died: str | None = None
        try:
            # -P: what lies in the working folder is not imported (Python 3.11, PYTHONSAFEPATH).
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _CHILD, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno() if _has_file(sys.stderr) else subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        self._socket = ours
        self._out = bytearray()
        loop = asyncio.get_running_loop()
        loop.add_reader(ours, self._readable)
        self.send(setup)

    # --- to it ---

    def send(self, message: msgspec.Struct) -> None:
        """Never waits: the child reads at once, or is stuck and will be killed."""
        if self.died is not None:
            return
        data = encode(message)
        waiting = bool(self._out)
        self._out += LENGTH.pack(len(data)) + data
        if not waiting:
            self._writable()

    def call(self, make: Callable[[int], msgspec.Struct]) -> tuple[int, asyncio.Future[Done | Scanned]]:
        """Raises `DriverProcessDied`."""
        if self.died is not None:
            raise DriverProcessDied(self.died)
        number = next(self._numbers)
        answer: asyncio.Future[Done | Scanned] = asyncio.get_running_loop().create_future()
        self._calls[number] = answer
        self.send(make(number))
        return number, answer

    async def ask(self, make: Callable[[int], msgspec.Struct]) -> Done | Scanned:
        """One call of the driver; calls never overlap. Given up, it is cancelled in the child too."""
        number, answer = self.call(make)
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            self.give_up(number, answer)
            raise

    def give_up(self, number: int, answer: asyncio.Future[Done | Scanned]) -> None:
        if not answer.done():
            self._unsettled = answer
            self.send(Cancel(number))
        answer.add_done_callback(_seen)

    async def settled(self) -> bool:
        """Whether what was given up has ended; it is waited for, but not for long."""
        unsettled = self._unsettled
        if unsettled is not None:
            if not unsettled.done():
                await asyncio.wait([unsettled], timeout=_SETTLE_S if self._spoke else _START_S)
            if not unsettled.done():
                return False
            self._unsettled = None
        return self.died is None

    def listen(self, heard: Callable[[Scanned | Exception], None]) -> int:
        """Raises `DriverProcessDied`."""
        number, answer = self.call(Listen)
        self._streams.add(number)
        self._listener = (number, heard)

        def ended(answer: asyncio.Future[Done | Scanned]) -> None:
            self._streams.discard(number)
            error = answer.exception()
            if isinstance(error, Exception):
                heard(error)

        answer.add_done_callback(ended)
        return number

    def deafen(self, number: int) -> None:
        answer = self._calls.get(number)
        self._listener = None
        if answer is not None:
            self.give_up(number, answer)

    async def end(self) -> None:
        """Ask it to leave, then make it; who is stuck is not asked."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + _CLOSE_S
        try:
            unsettled = self._unsettled
            if (
                unsettled is not None and not unsettled.done()
            ):  # given up a moment ago: a sound child ends it at once
                await asyncio.wait([unsettled], timeout=_CLOSE_S)
            if self.died is None and (unsettled is None or unsettled.done()):
                _, answer = self.call(Close)
                answer.add_done_callback(_seen)
                await asyncio.wait([answer], timeout=end_s - loop.time())
        finally:
            self._lost("closed")
            loop.remove_reader(self._socket)
            loop.remove_writer(self._socket)
            self._socket.close()
            # What it had to say is said, and its device is closed: nothing is lost by it.
            self.process.kill()
            end_s = loop.time() + _REAP_S
            while self.process.poll() is None and loop.time() < end_s:  # noqa: ASYNC110 - a process has no event
                await asyncio.sleep(0.002)

    # --- from it ---

    def _writable(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._out:
                del self._out[: self._socket.send(self._out)]
            loop.remove_writer(self._socket)
        except BlockingIOError:
            loop.add_writer(self._socket, self._writable)
        except OSError:
            loop.remove_writer(self._socket)  # it is gone, and `_readable` hears of it
            self._out.clear()

    def _readable(self) -> None:
        try:
            data = self._socket.recv(262_144)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._lost(_why_it_died(self.process))
            return
        buffer = self._buffer
        buffer += data
        at = 0
        while len(buffer) - at >= LENGTH.size:
            (size,) = LENGTH.unpack_from(buffer, at)
            end = at + LENGTH.size + size
            if size > MOST_BYTES:
                self._lost(f"its process sent a message of {size} bytes")
                self.process.kill()
                return
            if len(buffer) < end:
                break
            try:
                self._heard(_decode(bytes(buffer[at + LENGTH.size : end])))
            except msgspec.DecodeError as err:
                self._lost(f"its process sent what is no message: {err}")
                self.process.kill()
                return
            at = end
        del buffer[:at]

    def _heard(self, message: Done | Scanned | Failed | Memory) -> None:
        self._spoke = True
        if isinstance(message, Memory):
            self._on_memory(message.data)
            return
        if isinstance(message, Scanned) and message.id in self._streams:
            if self._listener is not None and self._listener[0] == message.id:
                self._listener[1](message)
            return
        answer = self._calls.pop(message.id, None)
        if answer is None or answer.done():
            return
        if isinstance(message, Failed):
            answer.set_exception(_error_of(message))
        else:
            answer.set_result(message)

    def _lost(self, why: str) -> None:
        self.died = self.died or why
        calls, self._calls = self._calls, {}
        for answer in calls.values():
            if not answer.done():
                answer.set_exception(DriverProcessDied(self.died))


def _seen(answer: asyncio.Future[Done | Scanned]) -> None:
    """Nobody waits for it: its error is nobody's surprise."""
    if not answer.cancelled():
        answer.exception()


def _has_file(stream: Any) -> bool:
    try:
        return bool(stream.fileno() >= 0)
    except (AttributeError, OSError, ValueError):  # replaced, closed, or none
        return False


def _why_it_died(process: subprocess.Popen[bytes]) -> str:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(0.05)  # its socket ended a moment before it did
    code = process.returncode
    if code is None:
        return "its process closed the connection"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with status {code}"


# --- the stand-ins ---


class _StandIn:
    """What both kinds share; `_child` is None where no process runs."""

    def __init__(
        self, inner: AnyDriver, driver: str, options: Mapping[str, Any], points: Sequence[Mapping[str, Any]]
    ) -> None:
        from logging import getLevelName, getLogger

        level = str(getLevelName(getLogger("drivers").getEffectiveLevel())).lower()
        self._inner = inner
        self._setup = Setup(inner.name, driver, dict(options), [dict(point) for point in points], level)
        self._child: _Child | None = None
        self._memory: bytes | None = None  #: to recall
        self._news: bytes | None = None  #: remembered, and not asked for yet
        self._places = {point.name: i for i, point in enumerate(inner.points)}

    async def _connected(self) -> None:
        child = self._child
        if child is not None and not await child.settled():
            await self._ended()
            child = None
        if child is None:
            try:
                child = self._child = _Child(self._setup, self._learnt)
            except OSError as err:
                raise DeviceUnreachable(f"no process can be started for it: {err}", Reason.DRIVER) from err
            if self._memory is not None:
                child.send(Recall(self._memory))
        await child.ask(Connect)

    async def _call(self, make: Callable[[int], msgspec.Struct]) -> Done | Scanned:
        child = self._child
        if child is None:
            raise DeviceUnreachable("not connected")
        if not await child.settled():
            if child.died is not None:
                raise DriverProcessDied(child.died)
            await self._ended()
            raise DeviceUnreachable("its driver is stuck; its process was ended", Reason.TIMEOUT)
        return await child.ask(make)

    async def ask_line(
        self, address: Address, series: Sequence[Request], connect_timeout_s: float
    ) -> Replies:
        """A technician's requests on the line that the child owns; beside the driver's own calls, in the line's queue.
        Raises `DeviceUnreachable`."""
        from drivers.modbus_line import Replies

        child = self._child
        if child is None:
            raise DeviceUnreachable("not connected")
        raw = [msgspec.Raw(encode(request)) for request in series]
        number, answer = child.call(lambda number: Ask(number, address, raw, connect_timeout_s))
        try:
            done = await asyncio.shield(answer)
        except asyncio.CancelledError:
            child.send(Cancel(number))
            answer.add_done_callback(_seen)
            raise
        except DriverProcessDied as err:
            raise DeviceUnreachable(str(err), Reason.DRIVER) from err
        if not isinstance(done, Done):
            raise DeviceUnreachable("its process answered something else", Reason.DRIVER)
        return msgspec.msgpack.decode(done.body, type=Replies)

    async def _ended(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await child.end()

    def _learnt(self, data: bytes) -> None:
        self._memory = self._news = data

    def _scan(self, told: Scanned, asked: tuple[Point, ...] | None) -> Scan:
        if asked is None:
            own = self._inner.points
            asked = own if told.points is None else tuple(own[i] for i in told.points)
        return Scan(told.taken_at_ns, asked, told.values, told.reasons)


class IsolatedDriver(_StandIn, Driver[Any, Any]):
    """Stands in for a device that answers when asked."""

    options_type: ClassVar[type[msgspec.Struct]] = msgspec.Struct
    point_type: ClassVar[type[Point]] = Point

    def __init__(
        self, inner: AnyDriver, driver: str, options: Mapping[str, Any], points: Sequence[Mapping[str, Any]]
    ) -> None:
        _StandIn.__init__(self, inner, driver, options, points)
        Driver.__init__(self, inner.name, inner.options, inner.points)

    async def connect(self) -> None:
        await self._connected()

    async def read(self, points: Sequence[Point]) -> Scan:
        asked = points if type(points) is tuple else tuple(points)
        if asked is self.points or asked == self.points:
            indices = None
        else:
            indices = [self._places[point.name] for point in asked]
        told = await self._call(lambda number: Read(number, indices))
        if not isinstance(told, Scanned):
            raise TypeError("the driver's process answered a read with something else")
        return self._scan(told, asked)

    async def write(self, point: Point, value: Value) -> None:
        place = self._places[point.name]
        await self._call(lambda number: Write(number, place, value))

    async def close(self) -> None:
        await self._ended()

    def line(self) -> LineClaim | None:
        return self._inner.line()

    def remembered(self) -> bytes | None:
        news, self._news = self._news, None
        return news

    def recall(self, remembered: bytes) -> None:
        self._memory = remembered


class IsolatedPushDriver(_StandIn, PushDriver[Any, Any]):
    """Stands in for a device that speaks when it likes."""

    options_type: ClassVar[type[msgspec.Struct]] = msgspec.Struct
    point_type: ClassVar[type[Point]] = Point

    def __init__(
        self, inner: AnyDriver, driver: str, options: Mapping[str, Any], points: Sequence[Mapping[str, Any]]
    ) -> None:
        _StandIn.__init__(self, inner, driver, options, points)
        PushDriver.__init__(self, inner.name, inner.options, inner.points)
        self._overruns_there = 0  #: in the present child

    async def connect(self) -> None:
        before = self._child
        await self._connected()
        if self._child is not before:
            self._overruns_there = 0

    async def scans(self) -> AsyncGenerator[Scan, None]:
        child = self._child
        if child is None:
            raise DeviceUnreachable("not connected")
        if not await child.settled():
            await self._ended()
            raise DeviceUnreachable("its driver is stuck; its process was ended", Reason.TIMEOUT)
        heard: deque[Scanned | Exception] = deque()
        wake = asyncio.Event()

        def hear(told: Scanned | Exception) -> None:
            if len(heard) >= _SCANS_KEPT and isinstance(oldest := heard[0], Scanned):
                heard.popleft()
                self.overruns += 1 if oldest.values else 0  # one without points only said that it is well
            heard.append(told)
            wake.set()

        number = child.listen(hear)
        try:
            while True:
                while heard:
                    told = heard.popleft()
                    if isinstance(told, Exception):
                        raise told
                    self.overruns += max(0, told.overruns - self._overruns_there)
                    self._overruns_there = told.overruns
                    yield self._scan(told, None)
                wake.clear()
                await wake.wait()
        finally:
            child.deafen(number)

    async def close(self) -> None:
        await self._ended()

    def line(self) -> LineClaim | None:
        return self._inner.line()

    def remembered(self) -> bytes | None:
        news, self._news = self._news, None
        return news

    def recall(self, remembered: bytes) -> None:
        self._memory = remembered


def isolated(
    inner: AnyDriver, driver: str, options: Mapping[str, Any], points: Sequence[Mapping[str, Any]]
) -> AnyDriver:
    """A stand-in for `inner`, which was built from this table and is itself never connected."""
    kind = IsolatedDriver if isinstance(inner, Driver) else IsolatedPushDriver
    return kind(inner, driver, options, points)
