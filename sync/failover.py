"""Two ways to the cloud as one uplink: the first wherever it works, the second where it does not, and back.

Rules:
1. Whoever sends sees one `Uplink`. Either way ends in the same journal, and an ack is the cloud's own: a batch that was
   sent on one way may be answered on the other, and a batch sent on both is a duplicate like any other.
2. Away from the first: after `after_failures` failures in a row (it cannot be opened, or is lost before anything was
   answered), or when it stays open and nothing is answered for `silent_s`.
3. Back to the first: it is opened beside the second, which goes on meanwhile; twice in a row, a while apart; then one
   batch goes over it, and only its answer moves the rest. A return that fails makes the next one wait twice as long.
4. What is said is said by answers: one line when batches go over another way than before, none for tries.

`Preference` decides, without IO and with the time passed in; `FailoverUplink` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Iterator
from typing import Final

from sync.uplink import AckTimeout, BatchRefused, LinkDown, RetryLater, Uplink
from sync.wire import Ack, Sealed

log = logging.getLogger(__name__)

FIRST: Final = 0
SECOND: Final = 1

SILENT_S: Final = 60.0  #: open, and not one answer: six ack timeouts
_LONGEST_SILENT_S: Final = 900.0
_LONGEST_RETURN_S: Final = 3600.0
_PROOFS: Final = 2  #: times in a row that the first must open before a batch goes over it
_DRAIN_S: Final = 30.0  #: what is still under way on the second when the first has taken over


class Preference:
    """Which of two ways, from what happened and when. All times are monotonic seconds that the caller tells."""

    def __init__(self, *, after_failures: int, return_s: float, silent_s: float, rng: random.Random) -> None:
        self.using = FIRST
        self.why = ""  #: the first was left; "" while it is used
        self.return_at_s = 0.0  #: when the first is to be tried again
        self._after_failures = after_failures
        self._first_return_s = return_s
        self._return_s = return_s
        self._first_silent_s = silent_s
        self._silent_s = silent_s
        self._rng = rng
        self._failures = 0
        self._opened_s: float | None = None
        self._unanswered_s: float | None = None
        self._proofs = 0
        self._back_s: float | None = None

    def order(self) -> Iterator[int]:
        """The ways to try now, in turn, until one opens; ask for the next only when one has failed."""
        if self.using == SECOND:
            yield SECOND
            yield FIRST
            return
        yield FIRST
        if self._failures >= self._after_failures:
            yield SECOND

    def failed(self, way: int, why: str) -> None:
        """It could not be opened."""
        if way == FIRST:
            self._failures += 1
            self.why = why

    def opened(self, way: int, now_s: float) -> None:
        """It is open and will be used."""
        if way == SECOND and self.using == FIRST:
            self._leave(now_s)
        elif way == FIRST:
            self._arrive(now_s)
        self._opened_s = now_s
        self._unanswered_s = None

    def closed(self, now_s: float) -> None:
        """What was open is not; without an answer since, that counts as a failure to open."""
        if self._opened_s is None:
            return
        if self.using == FIRST:
            if now_s - self._opened_s >= self._first_return_s:
                self._failures = 0
            else:
                self._failures += 1
                self.why = self.why or "it is lost again and again before anything is answered"
        self._opened_s = None

    def answered(self, way: int) -> None:
        """The cloud said something over it, if only that it will not take this."""
        if way != self.using:
            return
        self._unanswered_s = None
        self._silent_s = self._first_silent_s
        self._opened_s = None if way == FIRST else self._opened_s
        if way == FIRST:
            self._failures = 0
            self.why = ""

    def unanswered(self, way: int, now_s: float) -> bool:
        """A batch had no answer in time. True: enough of this silence, the other way is next."""
        if way != self.using:
            return False
        if self._unanswered_s is None:
            self._unanswered_s = now_s
        silent_s = now_s - self._unanswered_s
        if silent_s < self._silent_s:
            return False
        # Where both are silent it is the cloud, and asking round faster helps nobody.
        self._silent_s = min(2 * self._silent_s, _LONGEST_SILENT_S)
        self._unanswered_s = self._opened_s = None
        if way == FIRST:
            self.why = f"it is open, and nothing was answered for {silent_s:.0f} s"
            self._leave(now_s)
        else:
            self.using = FIRST
        return True

    # --- back to the first ---

    def proven(self, now_s: float) -> bool:
        """The first could be opened beside the second. True: let one batch go over it."""
        self._proofs += 1
        if self._proofs >= _PROOFS:
            return True
        self.return_at_s = now_s + self._return_s / 2
        return False

    def not_back(self, now_s: float, *, tried: bool) -> None:
        """The first still does not open, or (`tried`) opens and answers nothing."""
        self._proofs = 0
        if tried:
            self._return_s = min(2 * self._return_s, _LONGEST_RETURN_S)
        self._due(now_s)

    def back(self, now_s: float) -> None:
        """The first has answered."""
        self._arrive(now_s)
        self.answered(FIRST)

    def _leave(self, now_s: float) -> None:
        self.using = SECOND
        self._proofs = 0
        if self._back_s is not None:
            # It came back and did not last: the next return waits longer; one that lasted starts anew.
            lasted = now_s - self._back_s >= 10 * self._return_s
            self._return_s = self._first_return_s if lasted else min(2 * self._return_s, _LONGEST_RETURN_S)
        self._due(now_s)

    def _arrive(self, now_s: float) -> None:
        if self.using == SECOND:
            self._back_s = now_s
        self.using = FIRST
        self._proofs = 0

    def _due(self, now_s: float) -> None:
        self.return_at_s = now_s + self._return_s * self._rng.uniform(0.75, 1.25)  # not all gateways at once


class FailoverUplink:
    """`sync.uplink.Uplink` over two others."""

    def __init__(
        self,
        first: Uplink,
        second: Uplink,
        *,
        after_failures: int,
        return_s: float,
        rng: random.Random,
        silent_s: float = SILENT_S,
    ) -> None:
        self.preference = Preference(
            after_failures=after_failures, return_s=return_s, silent_s=silent_s, rng=rng
        )
        self._ways = (first, second)
        self._told = FIRST  #: which way the log has named last
        self._open: set[int] = set()
        self._under_way = [0, 0]
        self._idle = asyncio.Event()  #: one batch fewer is under way
        self._on_trial = False  #: the first is open beside the second, and waits for one batch
        self._returning: asyncio.Task[None] | None = None
        self._letting_go: set[asyncio.Task[None]] = set()

    @property
    def name(self) -> str:
        """Of the way in use."""
        return self._ways[self.preference.using].name

    @property
    def detour(self) -> str:
        """Why the second is in use; "" while it is not."""
        if self.preference.using == FIRST:
            return ""
        return f"{self._ways[FIRST].name} does not work ({self.preference.why})"

    # --- the contract ---

    async def open(self) -> None:
        await self.close()
        failures: list[LinkDown] = []
        for way in self.preference.order():
            try:
                await self._ways[way].open()
            except LinkDown as err:
                failures.append(err)
                self.preference.failed(way, str(err))
                continue
            self._open.add(way)
            self.preference.opened(way, time.monotonic())
            if way == SECOND:
                self._returning = asyncio.create_task(self._come_back(), name="uplink[first]")
            return
        if len(failures) == 1:
            raise failures[0]
        raise LinkDown("; ".join(str(err) for err in failures), failures[0].cause) from failures[0]

    async def send(self, batch: Sealed) -> Ack:
        way = self.preference.using
        if self._on_trial and self._under_way[FIRST] == 0:
            return await self._try_first(batch)
        self._under_way[way] += 1
        try:
            ack = await self._ways[way].send(batch)
        except AckTimeout as err:
            if self.preference.unanswered(way, time.monotonic()):
                raise LinkDown(
                    f"{self._ways[way].name}: no answer for long; the other way is tried", "silent"
                ) from err
            raise
        except (RetryLater, BatchRefused):
            self._answered(way)
            raise
        except LinkDown as err:
            if way != self.preference.using and self.preference.using in self._open:
                raise AckTimeout(f"{err}; the other way has taken over") from err
            raise
        finally:
            self._under_way[way] -= 1
            self._idle.set()
        self._answered(way)
        return ack

    async def report(self, state: bytes) -> None:
        await self._ways[self.preference.using].report(state)

    async def close(self) -> None:
        returning, self._returning = self._returning, None
        tasks = [*self._letting_go, *([returning] if returning is not None else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.gather(*tasks, return_exceptions=True)
        self._letting_go.clear()
        self._on_trial = False
        self.preference.closed(time.monotonic())
        self._open.clear()
        for way in self._ways:
            await way.close()

    # --- within ---

    def _answered(self, way: int) -> None:
        self.preference.answered(way)
        if way != self.preference.using or way == self._told:
            return
        self._told = way
        if way == SECOND:
            log.warning("the link goes over %s now: %s", self.name, self.detour)
        else:
            log.info("the link goes over %s again", self.name)

    async def _come_back(self) -> None:
        """While the second is used: look whether the first opens, and offer it for a trial."""
        first = self._ways[FIRST]
        while True:
            await asyncio.sleep(max(0.05, self.preference.return_at_s - time.monotonic()))
            if self._on_trial:
                continue
            try:
                await first.open()
            except LinkDown as err:
                log.debug("still no way over %s: %s", first.name, err)
                self.preference.not_back(time.monotonic(), tried=False)
                continue
            if self.preference.proven(time.monotonic()):
                self._on_trial = True
                return  # the next batch is the trial
            await first.close()

    async def _try_first(self, batch: Sealed) -> Ack:
        """The trial: the first has answered once before all goes over it."""
        first = self._ways[FIRST]
        self._under_way[FIRST] += 1
        try:
            try:
                ack = await first.send(batch)
            except (AckTimeout, LinkDown) as err:
                if not self._on_trial:
                    raise LinkDown(f"{first.name}: closed") from err
                self._on_trial = False
                self.preference.not_back(time.monotonic(), tried=True)
                await first.close()
                self._returning = asyncio.create_task(self._come_back(), name="uplink[first]")
                raise AckTimeout(f"{err}; {self._ways[SECOND].name} goes on") from err
            except (RetryLater, BatchRefused):
                self._take_over()
                raise
        finally:
            self._under_way[FIRST] -= 1
        self._take_over()
        return ack

    def _take_over(self) -> None:
        if not self._on_trial:
            return
        self._on_trial = False
        self._open.add(FIRST)
        self.preference.back(time.monotonic())
        self._answered(FIRST)
        task = asyncio.create_task(self._let_go(), name="uplink[second]")
        self._letting_go.add(task)
        task.add_done_callback(self._letting_go.discard)

    async def _let_go(self) -> None:
        """What is still under way on the second may be answered there; then it is closed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                while self._under_way[SECOND]:
                    self._idle.clear()
                    await self._idle.wait()
        self._open.discard(SECOND)
        await self._ways[SECOND].close()
