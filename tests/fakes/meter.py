"""A made-up meter on TCP, asked (`READ a b` → `12.5 7*3f`) or speaking by itself, with faults to switch on; sound
drivers for it; and, one rule broken each, the drivers that the conformance suite has to find out.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Sequence
from typing import ClassVar

import msgspec

from drivers.conformance import Fault
from drivers.contract import (
    DeviceUnreachable,
    Driver,
    LineClaim,
    Point,
    PushDriver,
    Reason,
    Scan,
    Value,
    ValueType,
    boot_ns,
)

REPLY_TIMEOUT_S = 0.08


def check_of(text: bytes) -> int:
    check = 0
    for byte in text:
        check ^= byte
    return check


class Meter:
    """The device: `held` is what it measures now."""

    def __init__(self) -> None:
        self.held: dict[str, float] = {"a": 1.5, "b": 2.0}
        self.port = 0
        self.moving = False  #: each answer has new values
        self.late_s = 0.0
        self.silent = False
        self.garbled = False
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._listeners: set[asyncio.StreamWriter] = set()

    async def plug(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def unplug(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._open):
            writer.transport.abort()

    def change(self) -> None:
        self.held = {name: value + 1 for name, value in self.held.items()}

    def truth(self) -> dict[str, Value]:
        return dict(self.held)

    async def provoke(self) -> None:
        for _ in range(100):
            if self._listeners or self.silent or self._server is None:
                break
            await asyncio.sleep(0.005)
        if self.silent:
            return
        for writer in self._listeners:
            writer.write(self._line(b" ".join(b"%g" % value for value in self.held.values())))

    def faults(self) -> dict[str, Fault]:
        return {
            "unplugged": Fault(self.unplug, self.plug),
            "garbled": Fault(lambda: self._set("garbled", True), lambda: self._set("garbled", False)),
            "late": Fault(self._begin_late, self._end_late),
        }

    def silence(self) -> Fault:
        return Fault(lambda: self._set("silent", True), lambda: self._set("silent", False))

    def _set(self, name: str, on: bool) -> None:
        setattr(self, name, on)

    def _begin_late(self) -> None:
        self.late_s, self.moving = 2 * REPLY_TIMEOUT_S, True

    def _end_late(self) -> None:
        self.late_s, self.moving = 0.0, False

    def _line(self, text: bytes) -> bytes:
        line = b"%s*%02x\n" % (text, check_of(text))
        return line.replace(b".", b"8").replace(b"2", b"3", 1) if self.garbled else line

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while line := await reader.readline():
                if line == b"LISTEN\n":
                    self._listeners.add(writer)
                    continue
                if self.silent:
                    continue
                if self.moving:
                    self.change()
                names = line.split()[1:]
                answer = self._line(b" ".join(b"%g" % self.held[name.decode()] for name in names))
                if self.late_s:
                    await asyncio.sleep(self.late_s)
                writer.write(answer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._open.discard(writer)
            self._listeners.discard(writer)
            writer.close()


@contextlib.asynccontextmanager
async def meter() -> AsyncIterator[Meter]:
    device = Meter()
    await device.plug()
    try:
        yield device
    finally:
        await device.unplug()


class MeterOptions(msgspec.Struct, frozen=True):
    port: int


POINTS = (Point(name="a", type=ValueType.F64), Point(name="b", type=ValueType.F64))


# -------------------------------------------------------------------------------------- a sound one


class SoundMeter(Driver[MeterOptions, Point]):
    """Nothing wrong; each one below breaks one rule."""

    options_type: ClassVar[type[msgspec.Struct]] = MeterOptions
    point_type: ClassVar[type[Point]] = Point

    def __init__(self, name: str, options: MeterOptions, points: Sequence[Point]) -> None:
        super().__init__(name, options, points)
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    def line(self) -> LineClaim | None:
        return LineClaim(f"127.0.0.1:{self.options.port}", "plain")

    async def connect(self) -> None:
        self.drop()
        try:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.options.port)
        except OSError as err:
            raise DeviceUnreachable(str(err)) from err

    async def close(self) -> None:
        self.drop()

    def drop(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None

    async def read(self, points: Sequence[Point]) -> Scan:
        try:
            text = await self.asked(points)
        except BaseException:
            self.drop()  # a late answer would be taken for the answer to the next question
            raise
        return self.scan(points, text)

    async def asked(self, points: Sequence[Point]) -> bytes | None:
        """The answer; `None` where its check is wrong."""
        if self.reader is None or self.writer is None:
            raise DeviceUnreachable("not connected")
        self.writer.write(f"READ {' '.join(point.name for point in points)}\n".encode())
        try:
            async with asyncio.timeout(REPLY_TIMEOUT_S):
                line = await self.reader.readline()
        except TimeoutError:
            raise DeviceUnreachable("no answer", Reason.TIMEOUT) from None
        except OSError as err:
            raise DeviceUnreachable(str(err)) from err
        if not line.endswith(b"\n"):
            raise DeviceUnreachable("it hung up")
        text, _, check = line.strip().rpartition(b"*")
        return text if b"%02x" % check_of(text) == check else None

    def scan(self, points: Sequence[Point], text: bytes | None) -> Scan:
        count = len(points)
        if text is None:
            bad = dict.fromkeys(range(count), Reason.CRC)
            return Scan(boot_ns(), tuple(points), [None] * count, bad)
        return Scan(boot_ns(), tuple(points), [float(word) for word in text.split()])


class SoundListener(PushDriver[MeterOptions, Point]):
    """The same meter, speaking by itself."""

    options_type: ClassVar[type[msgspec.Struct]] = MeterOptions
    point_type: ClassVar[type[Point]] = Point

    def __init__(self, name: str, options: MeterOptions, points: Sequence[Point]) -> None:
        super().__init__(name, options, points)
        self.meter = SoundMeter(name, options, points)

    async def connect(self) -> None:
        await self.meter.connect()
        if self.meter.writer is not None:
            self.meter.writer.write(b"LISTEN\n")

    async def close(self) -> None:
        await self.meter.close()

    async def line_of(self) -> bytes | None:
        if self.meter.reader is None:
            raise DeviceUnreachable("not connected")
        try:
            line = await self.meter.reader.readline()
        except OSError as err:
            raise DeviceUnreachable(str(err)) from err
        if not line.endswith(b"\n"):
            self.meter.drop()
            raise DeviceUnreachable("it hung up")
        text, _, check = line.strip().rpartition(b"*")
        return text if b"%02x" % check_of(text) == check else None

    async def scans(self) -> AsyncIterator[Scan]:
        while True:
            yield self.meter.scan(self.points, await self.line_of())


class SaysThatItIsWell(SoundListener):
    """Between its messages, by scans without points."""

    async def scans(self) -> AsyncIterator[Scan]:
        async for scan in super().scans():
            yield Scan(boot_ns(), (), ())
            yield scan


# ------------------------------------------------------------------------------ one rule broken each


class SaysThatItIsWellWithAReason(SoundListener):
    async def scans(self) -> AsyncIterator[Scan]:
        async for scan in super().scans():
            yield Scan(boot_ns(), (), (), {0: Reason.STALE})
            yield scan


class LetsOsErrorOut(SoundMeter):
    async def asked(self, points: Sequence[Point]) -> bytes | None:
        try:
            return await super().asked(points)
        except DeviceUnreachable as err:
            if err.reason is Reason.DISCONNECTED and self.writer is not None:
                raise OSError(str(err)) from err
            raise


class NamesAReasonThatHasAValue(SoundMeter):
    async def asked(self, points: Sequence[Point]) -> bytes | None:
        try:
            return await super().asked(points)
        except DeviceUnreachable as err:
            raise DeviceUnreachable(str(err), Reason.RANGE) from err


class StaysBroken(SoundMeter):
    broken = False

    async def read(self, points: Sequence[Point]) -> Scan:
        if self.broken:
            raise DeviceUnreachable("still broken")
        try:
            return await super().read(points)
        except DeviceUnreachable as err:
            self.broken = "hung up" in str(err)
            raise


class TellsTheLastValueInSilence(SoundMeter):
    last: bytes | None = None

    async def asked(self, points: Sequence[Point]) -> bytes | None:
        try:
            text = await super().asked(points)
        except DeviceUnreachable:
            if self.last is None or len(self.last.split()) != len(points):
                raise
            return self.last
        self.last = text or self.last
        return text


class AnswersFromACache(SoundMeter):
    kept: tuple[float, tuple[str, ...], bytes | None] = (0.0, (), None)

    async def asked(self, points: Sequence[Point]) -> bytes | None:
        names = tuple(point.name for point in points)
        if self.reader is not None and self.kept[1] == names and time.monotonic() - self.kept[0] < 0.1:
            return self.kept[2]
        text = await super().asked(points)
        self.kept = (time.monotonic(), names, text)
        return text

    async def read(self, points: Sequence[Point]) -> Scan:
        try:
            return await super().read(points)
        except BaseException:
            self.kept = (0.0, (), None)
            raise


class BlocksTheLoop(SoundMeter):
    blocked = False

    async def asked(self, points: Sequence[Point]) -> bytes | None:
        try:
            return await super().asked(points)
        except DeviceUnreachable:
            if self.reader is not None and not self.blocked:
                self.blocked = True
                time.sleep(0.6)  # noqa: ASYNC251 - the fault that is planted
            raise


class WaitsForFarewell(SoundMeter):
    async def close(self) -> None:
        try:
            if self.writer is not None and self.reader is not None and not self.writer.is_closing():
                self.writer.write(b"READ a\n")
                with contextlib.suppress(OSError, TimeoutError):
                    async with asyncio.timeout(2.5):
                        await self.reader.readline()
        finally:
            await super().close()


class CannotBeCancelled(SoundMeter):
    async def read(self, points: Sequence[Point]) -> Scan:
        give_up_s = time.monotonic() + 3.5
        while True:
            try:
                return await super().read(points)
            except (asyncio.CancelledError, DeviceUnreachable):
                if time.monotonic() > give_up_s:
                    raise
                with contextlib.suppress(asyncio.CancelledError, DeviceUnreachable):
                    await asyncio.sleep(0.1)
                    await self.connect()


class FinishesInTheBackground(SoundMeter):
    rest: asyncio.Task[None] | None = None

    async def read(self, points: Sequence[Point]) -> Scan:
        try:
            return await super().read(points)
        except asyncio.CancelledError:
            self.rest = asyncio.create_task(asyncio.sleep(1.6))
            raise

    async def close(self) -> None:
        if self.rest is not None:
            self.rest.cancel()
        await super().close()


class FinishesInAThread(SoundMeter):
    async def read(self, points: Sequence[Point]) -> Scan:
        try:
            return await super().read(points)
        except asyncio.CancelledError:
            asyncio.get_running_loop().run_in_executor(None, time.sleep, 1.6)
            raise


class KeepsEveryScan(SoundMeter):
    def __init__(self, name: str, options: MeterOptions, points: Sequence[Point]) -> None:
        super().__init__(name, options, points)
        self.history: list[Scan] = []

    async def read(self, points: Sequence[Point]) -> Scan:
        scan = await super().read(points)
        self.history.append(scan)
        return scan


class OpensAFilePerRead(SoundMeter):
    def __init__(self, name: str, options: MeterOptions, points: Sequence[Point]) -> None:
        super().__init__(name, options, points)
        self.files: list[int] = []

    async def read(self, points: Sequence[Point]) -> Scan:
        self.files.append(os.open("/dev/null", os.O_RDONLY))
        return await super().read(points)

    async def close(self) -> None:
        while self.files:
            os.close(self.files.pop())
        await super().close()


class LeavesATaskBehind(SoundMeter):
    async def close(self) -> None:
        if self.writer is not None:
            self.beat = asyncio.create_task(asyncio.sleep(20))
        await super().close()


class IgnoresTheCheck(SoundMeter):
    async def asked(self, points: Sequence[Point]) -> bytes | None:
        text = await super().asked(points)
        return b"77 78"[: 5 if len(points) > 1 else 2] if text is None else text


class TakesALateAnswer(SoundMeter):
    """Keeps the connection after a timeout, so that what comes late answers the next question."""

    async def read(self, points: Sequence[Point]) -> Scan:
        try:
            text = await self.asked(points)
        except DeviceUnreachable as err:
            if err.reason is not Reason.TIMEOUT:
                self.drop()
            raise
        except BaseException:
            self.drop()
            raise
        if text is not None and len(text.split()) != len(points):
            text = None
        return self.scan(points, text)

    async def connect(self) -> None:
        if self.writer is None or self.writer.is_closing():
            await super().connect()


class OpensWhenBuilt(SoundMeter):
    def __init__(self, name: str, options: MeterOptions, points: Sequence[Point]) -> None:
        super().__init__(name, options, points)
        self.file = os.open("/dev/null", os.O_RDONLY)

    async def close(self) -> None:
        if self.file >= 0:
            os.close(self.file)
            self.file = -1
        await super().close()


class NeedsALoopToBeBuilt(SoundMeter):
    def __init__(self, name: str, options: MeterOptions, points: Sequence[Point]) -> None:
        super().__init__(name, options, points)
        self.clock = asyncio.get_event_loop().time


class ClaimsWhatItFinds(SoundMeter):
    def line(self) -> LineClaim | None:
        return LineClaim("found" if self.writer is not None else "not yet known", "plain")


class TrustsWhatItRemembers(SoundMeter):
    def recall(self, remembered: bytes) -> None:
        msgspec.json.decode(remembered, type=dict[str, int])


class RemembersAgainAndAgain(SoundMeter):
    def remembered(self) -> bytes | None:
        return b"{}"


class WritesAnything(SoundMeter):
    async def write(self, point: Point, value: Value) -> None:
        return


class ClosesOnlyOnce(SoundMeter):
    closed = False

    async def close(self) -> None:
        if self.closed:
            raise RuntimeError("closed already")
        self.closed = True
        await super().close()


class OrdersByName(SoundMeter):
    async def read(self, points: Sequence[Point]) -> Scan:
        return await super().read(sorted(points, key=lambda point: point.name))


class RepeatsInSilence(SoundListener):
    async def scans(self) -> AsyncIterator[Scan]:
        last: bytes | None = None
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1 if last is not None else None):
                    last = await self.line_of()
            yield self.meter.scan(self.points, last)


class StopsAtGarbage(SoundListener):
    async def line_of(self) -> bytes | None:
        text = await super().line_of()
        if text is None:
            raise ValueError("garbage")
        return text


class StampsWhenAsked(SoundListener):
    """The time of the listening, not of the message."""

    async def scans(self) -> AsyncIterator[Scan]:
        begun_ns = boot_ns()
        while True:
            scan = self.meter.scan(self.points, await self.line_of())
            yield msgspec.structs.replace(scan, taken_at_ns=begun_ns)
