"""Notices when something holds up the agent's event loop, and finds out who: a driver that calls a blocking library,
usually, since one such call stops every other device.

Rules:
1. A thread of its own asks the loop, a few times a second, whether it still turns; between stalls that is all the cost.
2. While the loop does not turn, the thread looks at its stack: who is the innermost driver on it, and at which line.
   Nothing is interrupted; what was found is told when the loop turns again. What goes on for ever is told meanwhile,
   once, by the thread itself: the supervisor will end the process, and nobody would learn why.
3. Where the whole process stood still (suspended, out of memory, a stopped container), nobody is blamed: then the
   thread itself was late, and no processor time went by.
"""

from __future__ import annotations

import asyncio
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Final

import msgspec

from drivers.contract import Driver, PushDriver
from drivers.registry import AnyDriver

STALL_S: Final = 0.5  #: from here on it is a stall; the poller promises periods of 20 ms
_ASK_EVERY_S: Final = 0.25
_LOOK_EVERY_S: Final = 0.1  #: while it lasts; the line seen first is told
_LATE_S: Final = (
    0.5  #: the thread itself was held up for this long: by the machine, or by who holds the interpreter
)
_IDLE_SHARE: Final = 0.3  #: of such a time: with less of it on the processor, it was the machine
LASTING_S: Final = (
    10.0  #: from here on it may be for ever; well below what a supervisor waits (60 s in our unit)
)
_IMPORT: Final = "<frozen importlib"
_STDLIB: Final = (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["platstdlib"])


class Stall(msgspec.Struct, frozen=True):
    """The loop stood still."""

    lasted_s: float
    device: str  #: whose driver did it; empty where it was none
    task: str  #: the task that ran, or empty
    where: str  #: "file.py:12 in name", as far as it could be seen
    loading: bool = False  #: a module was being imported: it happens once, on a slow card it takes its time
    told_s: float = 0.0  #: of these seconds, told already while it lasted


class Culprit(msgspec.Struct, frozen=True):
    """What a look at the loop's thread found."""

    device: str
    task: str
    where: str
    loading: bool = False


class LoopWatch:
    """Watches the loop that `start` is called on. `told` is called on it after each stall; `lasting` from the
    watching thread, for a stall that has taken `LASTING_S` and has not ended."""

    def __init__(
        self, told: Callable[[Stall], None], lasting: Callable[[Stall], None] = lambda stall: None
    ) -> None:
        self._told = told
        self._lasting = lasting
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread_id = 0
        self._turned = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread_id = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="loop watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """At once; the thread ends soon after."""
        self._stop.set()
        self._turned.set()

    # --- the thread ---

    def _watch(self) -> None:
        loop = self._loop
        while loop is not None and not self._stop.wait(_ASK_EVERY_S):
            self._turned.clear()
            asked_s, cpu_s = time.monotonic(), time.process_time()
            try:
                loop.call_soon_threadsafe(self._turned.set)
            except RuntimeError:
                return  # the loop is closed
            if self._turned.wait(STALL_S):
                late_s = time.monotonic() - asked_s
                if late_s < STALL_S + _LATE_S:
                    continue
                # The loop has turned by now, but this thread was not let run: too late to see who it was.
                culprit = None
            else:
                culprit = self._look(loop)
            late_s = time.monotonic() - asked_s - STALL_S
            asleep = late_s > _LATE_S and time.process_time() - cpu_s < _IDLE_SHARE * late_s
            told_s = 0.0
            while not self._turned.wait(_LOOK_EVERY_S):
                if self._stop.is_set():
                    return
                culprit = culprit or self._look(loop)
                lasted_s = time.monotonic() - asked_s
                if lasted_s >= LASTING_S and not told_s:
                    stall = _stall(lasted_s, culprit, asleep=asleep)
                    told_s = stall.lasted_s
                    self._lasting(stall)
            if self._stop.is_set():
                return
            stall = _stall(time.monotonic() - asked_s, culprit, asleep=asleep, told_s=told_s)
            try:
                loop.call_soon_threadsafe(self._told, stall)
            except RuntimeError:
                return

    def _look(self, loop: asyncio.AbstractEventLoop) -> Culprit | None:
        frame = sys._current_frames().get(self._thread_id)
        if frame is None:
            return None
        task = asyncio.current_task(loop)
        return culprit_of(list(_outwards(frame)), "" if task is None else task.get_name())


def _stall(lasted_s: float, culprit: Culprit | None, *, asleep: bool, told_s: float = 0.0) -> Stall:
    if asleep:
        found = Culprit("", "", "the machine (suspended, or too little memory or processor)")
    else:
        found = culprit or Culprit("", "", "an unknown place")
    return Stall(round(lasted_s, 3), found.device, found.task, found.where, found.loading, told_s)


def culprit_of(frames: list[FrameType], task: str) -> Culprit:
    """From a stack, the innermost frame first, and the name of the task that runs."""
    driver = next((found for frame in frames if (found := _driver_of(frame)) is not None), None)
    device = driver.name if driver is not None else ""
    if not device and task.startswith("poll[") and task.endswith("]"):
        device = task[len("poll[") : -1]
    own_file = None
    if driver is not None:
        own_file = getattr(sys.modules.get(type(driver).__module__), "__file__", None)
    loading = [i for i, frame in enumerate(frames) if frame.f_code.co_filename.startswith(_IMPORT)]
    if loading and driver is None:  # who imports it, not how
        frames = frames[loading[-1] + 1 :] or frames
    at = next((frame for frame in frames if own_file and frame.f_code.co_filename == own_file), None)
    if at is None:
        at = next((f for f in frames if not f.f_code.co_filename.startswith(_STDLIB)), frames[0])
    return Culprit(device, task, _place(at), bool(loading))


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _driver_of(frame: FrameType) -> AnyDriver | None:
    code = frame.f_code
    if not code.co_argcount or code.co_varnames[0] != "self":
        return None
    owner = frame.f_locals.get("self")
    return owner if isinstance(owner, Driver | PushDriver) else None


def _place(frame: FrameType) -> str:
    shown = "/".join(Path(frame.f_code.co_filename).parts[-2:])
    return f"{shown}:{frame.f_lineno} in {frame.f_code.co_name}"
