"""Time that passes only when nothing is left to do: the event loop under which the shipped code is simulated.

Rules:
1. Nothing waits. Where no callback is ready, the clock jumps to the next timer; where there is none either, the world
   has stopped for ever, and that is an error with its name.
2. What the shipped code gives to a thread runs here too: one job after the other per executor, each taking the virtual
   time that its machine's disk needs. A job of a machine that died meanwhile is never carried out.
3. The same calls give the same run: no thread, no real clock, no address or hash decides anything.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")

TRUE_START_NS: Final = 1_780_000_000 * 10**9  #: what the true wall clock shows when a simulation begins
_MONOTONIC_START_S: Final = 1_000.0  #: no shipped module may rely on a clock that begins at zero


class Stopped(Exception):
    """Nothing will ever happen again: somebody waits for what nobody does."""


class MachineDied(BaseException):
    """The machine that was at work ends here, in the middle of a statement. Never caught by shipped code as an error:
    its handlers run, but whatever they touch is of a dead machine."""


class Machine:
    """What dies at once: its jobs and its open files. `service_s` is how long its disk takes for one job."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = False
        self.service_s: Callable[[], float] = lambda: 0.001
        self.on_death: Callable[[], None] = lambda: None

    def end(self) -> None:
        if not self.dead:
            self.dead = True
            self.on_death()


MACHINE: ContextVar[Machine | None] = ContextVar("MACHINE", default=None)
"""On which machine the present task runs."""


class _NeverWaiting(selectors.BaseSelector):
    """There are no descriptors to watch: whoever would sleep makes the clock jump instead."""

    def __init__(self) -> None:
        self.loop: SimLoop | None = None
        self._map: dict[int, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        key = selectors.SelectorKey(fileobj, fd, events, data)
        self._map[fd] = key
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._map.pop(fileobj if isinstance(fileobj, int) else fileobj.fileno())

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        loop = self.loop
        if loop is not None:
            loop.turns += 1
            if timeout is None:
                raise Stopped("every task waits for another one")
            if timeout > 0:
                loop.now_s += timeout
        return []

    def get_map(self) -> dict[int, selectors.SelectorKey]:  # type: ignore[override]  # asked for by nobody here
        return self._map


class SimLoop(asyncio.SelectorEventLoop):
    """The loop. `events` counts what happened: each callback that was put on it."""

    def __init__(self) -> None:
        selector = _NeverWaiting()
        self.now_s = 0.0
        self.events = 0
        self.turns = 0
        self._busy_until_s: WeakKeyDictionary[Any, float] = WeakKeyDictionary()
        super().__init__(selector)
        selector.loop = self

    def time(self) -> float:
        return self.now_s

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:  # type: ignore[override]
        self.events += 1
        return super().call_soon(callback, *args, context=context)

    def call_at(  # type: ignore[override]  # the types of asyncio's own are its own affair
        self, when: float, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        self.events += 1
        return super().call_at(when, callback, *args, context=context)

    def run_in_executor(  # type: ignore[override]  # what the shipped code passes is all there is
        self,
        executor: Any,
        func: Callable[..., T],
        *args: Any,
    ) -> asyncio.Future[T]:
        machine = MACHINE.get()
        future: asyncio.Future[T] = self.create_future()
        start_s = self.now_s
        if executor is not None:
            start_s = max(start_s, self._busy_until_s.get(executor, 0.0))
        end_s = start_s + (machine.service_s() if machine is not None else 0.0)
        if executor is not None:
            self._busy_until_s[executor] = end_s
        self.call_at(end_s, self._work, machine, future, func, args)
        return future

    @staticmethod
    def _work(
        machine: Machine | None, future: asyncio.Future[T], func: Callable[..., T], args: tuple[Any, ...]
    ) -> None:
        if machine is not None and machine.dead:
            return
        try:
            result = func(*args)
        except MachineDied:
            if machine is not None:
                machine.end()
        except Exception as err:  # noqa: BLE001 - it belongs to who gave the job, as in a real executor
            if not future.done():
                future.set_exception(err)
        else:
            if not future.done():
                future.set_result(result)


class VirtualTime:
    """Stands in for a module's `time`: clocks from the simulation, the rest from the real one."""

    def __init__(self, loop: SimLoop, wall_ns: Callable[[], int]) -> None:
        self._loop = loop
        self.time_ns = wall_ns

    def monotonic(self) -> float:
        return self._loop.now_s + _MONOTONIC_START_S

    def time(self) -> float:
        return self.time_ns() / 1e9

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


@contextmanager
def replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Attributes of modules, for as long as the simulation runs. A name that is not there is an error."""
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in reversed(before):
            setattr(module, name, value)
