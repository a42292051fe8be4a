"""From the buffer to the cloud: who is sent when, and what becomes of every answer.

Rules:
1. Only the cloud's ack settles; everything else means that the batch is still here.
2. Live before backlog: what was just committed goes first; the backlog has at most `backlog_share` of the window.
3. A resend is the same bytes. A batch that is refused for good is halved, down to the one frame that is at fault; that
   one is parked with the reason, and the rest goes on.
4. Trouble that is not the batch's own (credential, version, a cloud that refuses everything) parks nothing: it waits.
5. Waits have full jitter. A silent cloud is asked by one batch at a time. One line when the way goes, one when it is
   back; tries in between are DEBUG.
6. What a metered link holds back waits in the buffer; what is urgent is cut alone and goes all the same.
7. A batch that was alone on the way each time the connection broke is taken for what broke it, and halved: a broker
   may close on a message that it does not like and never say why (NATS above `max_payload`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

import msgspec

from agent.backoff import Backoff, full_jitter
from agent.buffer import Buffer
from agent.metered import HELD_REPORT_S, Meter, Verdict
from agent.status import LinkHealth, LinkState
from agent.store import Batch, Bounds
from config.agent import Uplink as UplinkSettings
from config.failpoint import reached
from sync.failover import FailoverUplink
from sync.identity import GatewayName, Secret, read_secret
from sync.uplink import AckTimeout, BatchRefused, LinkDown, RetryLater, Uplink
from sync.wire import Ack

log = logging.getLogger(__name__)

DAMAGED_ON_THE_WAY: Final = frozenset({"crc", "truncated", "compression"})
"""Refusals that say nothing against the batch itself: sent again, and halved only when that does not help."""
NOT_THE_BATCH: Final = frozenset({"version", "gateway", "identity", "credential", "topic", "unknown_gateway"})
"""Refusals that every batch would meet: nothing is parked for them."""

_DAMAGE_TRIES: Final = 5
_SUSPECT_AFTER: Final = 2  #: links lost with the batch on the way, before it is sent alone
_PARK_AFTER: Final = 3  #: links lost with a single frame alone on the way, before it is taken for the cause
_PROOF_S: Final = 5.0  #: how long to wait for another batch to show that the way works, before a suspect goes
_REFUSALS_IN_A_ROW: Final = 20  #: parked without one ack in between: not the frames' fault
_ASK_AGAIN_S: Final = 1.0  #: how soon the buffer is asked again when it had a backlog but nothing to give
_CLAIM: Final = 4  #: batches cut per transaction: one sync, and at most 1 MiB of bytes in memory
_UNANSWERED_TRIES: Final = 5
"""In a row, while others were answered: a broker may drop what is too large for the cloud's side and never say so."""
_LONGEST_WAIT_S: Final = 3600.0  #: whatever the cloud asks for (as sync.https bounds `Retry-After`)
_LONGEST_SPREAD_S: Final = 600.0  #: whatever the cloud asks for
_TELLS: Final = 10.0  #: losses of the link told at once ...
_TELL_EVERY_S: Final = 60.0  #: ... and then one in so long: 140 lines an hour
_LATENCIES: Final = 256  #: acks over which p50 and p99 are told


class _Lost(Exception):
    """The session is over; `why` in words."""

    def __init__(self, why: str, cause: str = "down") -> None:
        super().__init__(why)
        self.why = why
        self.cause = cause


class _UnderWay(msgspec.Struct):
    """A batch that has been handed to the uplink and not been answered."""

    batch: Batch
    live: bool
    resends: int = 0

    @property
    def bounds(self) -> Bounds:
        return self.batch.bounds


class Forwarder:
    """Owns the uplink: `run` opens it, sends, opens it again. `health` is kept up to date for status and heartbeat."""

    def __init__(
        self,
        buffer: Buffer,
        uplink: Uplink,
        settings: UplinkSettings,
        health: LinkHealth,
        rng: random.Random,
        meter: Meter | None = None,
    ) -> None:
        self.health = health
        self._meter = meter
        self._verdict = Verdict()
        self._urgent: set[Bounds] = set()  #: cut while all else was held back
        self._reported_s = float("-inf")
        self._buffer = buffer
        self._uplink = uplink
        self._settings = settings
        self._rng = rng
        self._backoff = Backoff(settings.backoff_min_s, settings.backoff_max_s, rng)
        self._wake = asyncio.Event()
        self._todo: deque[Bounds] = deque()  #: recorded, to be (re)sent, oldest first
        self._sending: dict[asyncio.Task[None], _UnderWay] = {}
        self._answers = 0  #: acks and refusals: signs of life from the cloud
        self._silent = False
        self._probe = asyncio.Lock()
        self._not_before_s = 0.0  #: monotonic: the cloud asked to wait until then
        self._lost: _Lost | None = None
        self._fallen: list[Bounds] = []  #: whose send ended with the loss of the link
        self._drops: dict[Bounds, int] = {}  #: links lost with this batch on the way
        self._alone: dict[Bounds, tuple[int, int]] = {}  #: ... and nothing else; `_answers` at the first time
        self._refusals = 0  #: parked since the last ack
        self._down_since_s: float | None = None
        self._told_down = False
        self._untold = 0  #: losses that the log kept quiet about
        self._tells = _TELLS
        self._tells_s = time.monotonic()
        self._latencies: deque[float] = deque(maxlen=_LATENCIES)
        self._ask_at_s = 0.0
        self._spread_s = 0.0  #: what the cloud has told last: a large fleet does not come back at once
        health.since_ns = time.time_ns()

    async def run(self) -> None:
        """For ever: one task of the daemon. Ends only by being cancelled."""
        self._buffer.on_live = self._live
        try:
            while True:
                try:
                    await self._uplink.open()
                    if self._meter is not None:
                        await self._meter.connected()
                    await self._session()
                except LinkDown as err:
                    self._link_is_down(str(err), err.cause)
                except _Lost as err:
                    self._link_is_down(err.why, err.cause)
                finally:
                    self._buffer.live_room = 0
                    await self._uplink.close()
                await asyncio.sleep(self._backoff.next_s(self._spread_s))
        finally:
            self._buffer.on_live = None
            if self._meter is not None:
                await self._meter.close()

    async def report(self, state: bytes) -> bool:
        """One heartbeat, best effort; False where the way is down."""
        if self.health.state is not LinkState.UP:
            return False
        now_s = time.monotonic()
        if self._held() and now_s - self._reported_s < HELD_REPORT_S:
            return False
        try:
            await self._pay(len(state))
            await self._uplink.report(state)
            self._reported_s = now_s
        except LinkDown as err:
            self._lose(str(err), err.cause)
            return False
        return True

    # --- one session: from an open uplink to its loss ---

    async def _session(self) -> None:
        self._lost = None
        self._silent = False
        self._todo = deque(self._buffer.recorded())
        self._drops = {bounds: n for bounds, n in self._drops.items() if bounds in self._todo}
        self._alone = {bounds: n for bounds, n in self._alone.items() if bounds in self._todo}
        self._fallen.clear()
        opened_s = time.monotonic()
        first_answers = self._answers
        self._urgent &= set(self._todo)
        if self._held() or (not self._todo and not self._buffer.has_backlog):
            self._link_is_up()  # nothing will be answered now, so an open way has to do
        try:
            while self._lost is None:
                proven = self._answers != first_answers or time.monotonic() - opened_s > _PROOF_S
                self._wake.clear()  # before looking: what happens meanwhile is looked at next time
                await self._fill(proven=proven)
                timeout_s = self._pause_s(proven=proven)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(timeout_s):
                        await self._wake.wait()
            raise self._lost
        finally:
            await self._stop_sending()

    async def _stop_sending(self) -> None:
        """Take back what is under way; the buffer has it all."""
        tasks = list(self._sending)
        on_the_way = self._fallen + [under_way.bounds for under_way in self._sending.values()]
        if self._fallen:
            for bounds in on_the_way:
                self._drops[bounds] = self._drops.get(bounds, 0) + 1
            if len(on_the_way) == 1:
                count, answers = self._alone.get(on_the_way[0], (0, self._answers))
                self._alone[on_the_way[0]] = (count + 1, answers)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.health.in_flight = 0

    def _pause_s(self, *, proven: bool) -> float | None:
        """How long the session may sleep when nothing happens; None: until something does."""
        waits = []
        now_s = time.monotonic()
        if self._not_before_s > now_s:
            waits.append(self._not_before_s - now_s)
        if self._ask_at_s > now_s:
            waits.append(self._ask_at_s - now_s)
        if not proven and self._suspects():
            waits.append(_PROOF_S)
        if self._verdict.held:
            waits.append(self._verdict.again_s)
        return min(waits) if waits else None

    def _suspects(self) -> list[Bounds]:
        """Batches that have seen links break, and are still to be sent."""
        if not self._drops:
            return []
        return [b for b in self._todo if self._drops.get(b, 0) >= _SUSPECT_AFTER]

    async def _fill(self, *, proven: bool) -> None:
        """Hand over as much as the window allows."""
        if time.monotonic() < self._not_before_s:
            self._buffer.live_room = 0
            return
        if any(self._drops.get(u.bounds, 0) >= _SUSPECT_AFTER for u in self._sending.values()):
            self._buffer.live_room = 0  # a suspect is on the way, and must be so alone
            return
        if self._held():
            await self._fill_urgent()
            return
        suspects = self._suspects()
        window = 1 if suspects else max(2, self._settings.window)  # a lane each
        share = min(window, max(1, int(window * self._settings.backlog_share)))
        if suspects and proven and not self._sending:
            self._buffer.live_room = 0
            self._todo.remove(suspects[0])
            await self._send_suspect(suspects[0])
            return
        # A fast cloud may keep this turning for as long as there is a backlog: the live lane is served in every turn.
        while self._lost is None and time.monotonic() >= self._not_before_s:
            backlog = self._offer_live(window, share if not suspects else 0)
            if backlog >= share or len(self._sending) >= window:
                return
            batches = await self._next_backlog(share - backlog, suspects)
            if not batches:
                break
            for batch in batches:
                self._start(batch, live=False)
        if suspects and not self._sending and suspects[0].first < suspects[0].last:
            # Nothing else is there to show that the way works; halving needs no such proof, only parking does.
            self._buffer.live_room = 0
            self._todo.remove(suspects[0])
            await self._send_suspect(suspects[0])
            return

    def _held(self) -> bool:
        """Whether the metered link's rules hold back all but what is urgent."""
        meter = self._meter
        if meter is None or (meter.only_fallback and not self._detour()):
            self._verdict = Verdict()
        else:
            was = self._verdict.held
            self._verdict = meter.verdict()
            if self._verdict.held != was:
                log.info(
                    "%s", f"held back: {self._verdict.why}" if self._verdict.held else "nothing is held back"
                )
        self.health.held = self._verdict.why
        return self._verdict.held

    async def _fill_urgent(self) -> None:
        """While all else is held back. A commit cuts nothing now: it would mix what may go with what may not."""
        self._buffer.live_room = 0
        lowest = None if self._meter is None else self._meter.rules.lowest
        if lowest is None:
            return
        window = max(2, self._settings.window)
        for bounds in [b for b in self._todo if b in self._urgent]:
            if len(self._sending) >= window:
                return
            self._todo.remove(bounds)
            batches = await self._buffer.rebuild(bounds)
            self._urgent.update(b.bounds for b in batches)
            self._todo.extendleft(b.bounds for b in reversed(batches[1:]))
            for batch in batches[:1]:
                self._start(batch, live=False)
        while self._lost is None and len(self._sending) < window and self._buffer.has_backlog:
            if time.monotonic() < self._ask_at_s:
                return
            batches = await self._buffer.claim(_CLAIM, lowest)
            self._ask_at_s = 0.0 if batches else time.monotonic() + _ASK_AGAIN_S
            self._urgent.update(b.bounds for b in batches)
            for batch in batches:
                self._start(batch, live=False)

    async def _pay(self, size: int) -> None:
        if self._meter is not None and (self._detour() or not self._meter.only_fallback):
            await self._meter.message(size, https=self._uplink.name.startswith("https"))

    def _detour(self) -> str:
        return self._uplink.detour if isinstance(self._uplink, FailoverUplink) else ""

    async def _send(self, batch: Batch) -> Ack:
        await self._pay(len(batch.sealed.payload))
        return await self._uplink.send(batch.sealed)

    def _offer_live(self, window: int, share: int) -> int:
        """Let commits cut what the window leaves beside the backlog's share; how much of that is under way."""
        waiting = bool(self._todo) or self._buffer.has_backlog
        backlog = sum(not u.live for u in self._sending.values())
        reserved = max(share, backlog) if waiting else backlog
        self._buffer.live_room = max(0, window - reserved - (len(self._sending) - backlog))
        return backlog

    async def _next_backlog(self, room: int, suspects: Sequence[Bounds]) -> list[Batch]:
        """Batches to send again first, then new ones cut from the oldest readings."""
        for bounds in list(self._todo):
            if bounds in suspects:
                continue
            self._todo.remove(bounds)
            batches = await self._buffer.rebuild(bounds)
            # A rebuild may have come out narrower, and as more than one.
            self._todo.extendleft(b.bounds for b in reversed(batches[1:]))
            if batches:
                return batches[:1]
            if self._still_here(bounds):  # the disk refuses just now
                self._todo.appendleft(bounds)
                self._ask_at_s = time.monotonic() + _ASK_AGAIN_S
                return []
        if not self._buffer.has_backlog or time.monotonic() < self._ask_at_s:
            return []
        batches = await self._buffer.claim(min(room, _CLAIM))
        self._ask_at_s = 0.0 if batches else time.monotonic() + _ASK_AGAIN_S
        return batches

    def _still_here(self, bounds: Bounds) -> bool:
        return bounds in self._buffer.recorded()

    def _live(self, batches: Sequence[Batch]) -> None:
        """What a commit has just cut, straight from memory."""
        for batch in batches:
            bounds = batch.bounds
            if self._lost is None and self._buffer.live_room > 0:
                self._buffer.live_room -= 1
                self._start(batch, live=True)
            elif bounds not in self._todo:  # the room went while the commit was under way
                self._todo.append(bounds)
        self._wake.set()

    def _start(self, batch: Batch, *, live: bool) -> None:
        under_way = _UnderWay(batch, live)
        _, first, last = under_way.bounds
        task = asyncio.get_running_loop().create_task(self._deliver(under_way), name=f"send[{first}-{last}]")
        self._sending[task] = under_way
        self.health.in_flight = len(self._sending)
        task.add_done_callback(self._sent)

    def _sent(self, task: asyncio.Task[None]) -> None:
        under_way = self._sending.pop(task)
        self.health.in_flight = len(self._sending)
        self._wake.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, LinkDown):
                self._fallen.append(under_way.bounds)
            elif not isinstance(error, _Lost):  # a fault of ours ends the session too, and is told in full
                log.error("sending failed unexpectedly", exc_info=error)
            self._lose(str(error) or type(error).__name__, getattr(error, "cause", "down"))

    def _lose(self, why: str, cause: str) -> None:
        if self._lost is None:
            self._lost = _Lost(why, cause)
            self._wake.set()

    # --- one batch, until it is answered ---

    async def _deliver(self, under_way: _UnderWay) -> None:
        """Send until the cloud has said what becomes of it. Raises `LinkDown`."""
        damaged = unanswered = 0
        while True:
            heard = self._answers
            sent_s = time.monotonic()
            ack: Ack | None
            try:
                reached("forwarder.before_send")
                ack = await self._send(under_way.batch)
            except AckTimeout:
                self._drops.pop(under_way.bounds, None)  # the link outlived it
                unanswered = unanswered + 1 if self._answers != heard else 0
                bounds = under_way.bounds
                if unanswered >= _UNANSWERED_TRIES and bounds.first < bounds.last:
                    await self._halve(bounds)
                    return
                ack = await self._ask_again(under_way, heard)
                if ack is None:
                    continue
            except RetryLater as err:
                self._answers += 1
                await self._wait_as_asked(err, under_way.resends)
                under_way.resends += 1
                self.health.resent_batches += 1
                continue
            except BatchRefused as err:
                self._answers += 1
                if err.code in NOT_THE_BATCH:
                    raise _Lost(f"the cloud refuses this gateway ({err.code}): {err}", "credential") from err
                if err.code in DAMAGED_ON_THE_WAY and damaged < _DAMAGE_TRIES:
                    damaged += 1
                    under_way.resends += 1
                    self.health.resent_batches += 1
                    await asyncio.sleep(self._jitter_s(damaged))
                    continue
                await self._divide(under_way.bounds, err.code, str(err))
                return
            self._acked(under_way, ack, time.monotonic() - sent_s)
            return

    async def _ask_again(self, under_way: _UnderWay, heard: int) -> Ack | None:
        """After a timeout. While the cloud is silent altogether, one batch asks it, the others wait for what that one
        hears; None: somebody was answered meanwhile, go on as usual."""
        under_way.resends += 1
        self.health.resent_batches += 1
        if self._answers != heard:  # only this one was lost
            await asyncio.sleep(self._jitter_s(under_way.resends - 1))
            return None
        async with self._probe:
            tries = 0
            while self._answers == heard:
                await asyncio.sleep(self._jitter_s(tries))
                tries += 1
                try:
                    return await self._send(under_way.batch)
                except AckTimeout as err:
                    self._cloud_is_silent(str(err), heard)
                    under_way.resends += 1
                    self.health.resent_batches += 1
                except (RetryLater, BatchRefused):
                    self._answers += 1
                    return None  # it lives; the next send hears the same, and acts on it
        return None

    async def _wait_as_asked(self, err: RetryLater, tries: int) -> None:
        """No sooner than asked, and not all gateways at the same instant."""
        after_s = min(max(0.0, err.after_s), _LONGEST_WAIT_S)
        wait_s = after_s + self._jitter_s(tries)
        self._not_before_s = max(self._not_before_s, time.monotonic() + after_s)
        self._buffer.live_room = 0
        log.debug("the cloud asks to wait %.1f s: %s", err.after_s, err)
        self.health.why = f"the cloud asks to wait: {err}"
        await asyncio.sleep(wait_s)

    def _jitter_s(self, tries: int) -> float:
        return full_jitter(tries, self._settings.backoff_min_s, self._settings.backoff_max_s, self._rng)

    def _acked(self, under_way: _UnderWay, ack: Ack, took_s: float) -> None:
        self._answers += 1
        self._refusals = 0
        reached("forwarder.after_ack")
        self._buffer.settle(ack)
        self._spread_s = min(max(0, ack.spread_s), _LONGEST_SPREAD_S)
        self._drops.pop(under_way.bounds, None)
        self._alone.pop(under_way.bounds, None)
        self._urgent.discard(under_way.bounds)
        self._latencies.append(took_s)
        if ack.cloud_ns:  # the cloud looked at its clock somewhere between sending and now
            self.health.skew_s = round((time.time_ns() - ack.cloud_ns) / 1e9 - took_s / 2, 3)
            self.health.skew_bound_s = round(took_s / 2, 3)
        self.health.acked_batches += 1
        self._backoff.reset()
        self._link_is_up()

    # --- what will never be taken as it is ---

    async def _divide(self, bounds: Bounds, code: str, why: str) -> None:
        epoch, first, last = bounds
        self.health.refused_batches += 1
        self._drops.pop(bounds, None)
        self._alone.pop(bounds, None)
        if first < last:
            await self._halve(bounds)
            return
        if self._refusals >= _REFUSALS_IN_A_ROW:
            self._refusals = 0
            raise _Lost(f"the cloud has refused {_REFUSALS_IN_A_ROW} frames in a row ({code}: {why})")
        self._refusals += 1
        log.warning(
            "frame %d is refused for good (%s: %s); it is parked and reported as a gap", first, code, why
        )
        reached("forwarder.before_park")
        if not await self._buffer.park(epoch, first, code, why):
            raise _Lost("a refused frame cannot be parked now: the buffer's disk refuses")

    async def _halve(self, bounds: Bounds) -> None:
        reached("forwarder.before_split")
        halves = await self._buffer.split(bounds)
        reached("forwarder.after_split")
        if not halves and self._still_here(bounds):
            raise _Lost("a batch cannot be halved now: the buffer's disk refuses")
        self._todo.extendleft(b.bounds for b in reversed(halves))

    async def _send_suspect(self, bounds: Bounds) -> None:
        """A batch that saw links break goes alone; if it was alone each time before, it is halved first."""
        count, answers = self._alone.get(bounds, (0, 0))
        alone_means = f"the connection broke {count} times while this was all that was sent"
        if bounds.first < bounds.last and count >= _SUSPECT_AFTER:
            log.warning("batch %d..%d: %s; halved", bounds.first, bounds.last, alone_means)
            await self._divide(bounds, "poison", alone_means)
            for half in list(self._todo)[:2]:
                self._drops[half] = _SUSPECT_AFTER
            self._wake.set()
            return
        if bounds.first == bounds.last and count >= _PARK_AFTER and self._answers != answers:
            await self._divide(bounds, "poison", alone_means)
            self._wake.set()
            return
        batches = await self._buffer.rebuild(bounds)
        for batch in batches[:1]:
            self._start(batch, live=False)
        self._todo.extendleft(b.bounds for b in reversed(batches[1:]))

    # --- what is told ---

    def _cloud_is_silent(self, why: str, heard: int) -> None:
        if not self._silent and self._answers == heard:
            self._silent = True
            self._link_is_down(f"the cloud does not answer ({why})", "silent")

    def _link_is_down(self, why: str, cause: str = "down") -> None:
        if self.health.state is not LinkState.DOWN:
            self._told_down = self._may_tell()
            if self._told_down:
                often = f" ({self._untold} times more since it was last told)" if self._untold else ""
                log.warning("link down: %s; readings are kept here meanwhile%s", why, often)
                self._untold = 0
            else:
                self._untold += 1
                log.debug("link down: %s", why)
            self.health.state = LinkState.DOWN
            self.health.since_ns = time.time_ns()
            self._down_since_s = time.monotonic()
        else:
            log.debug("link still down: %s", why)
        self.health.why, self.health.cause = why, cause

    def _may_tell(self) -> bool:
        """A link that flaps is told of `_TELLS` times, then once in `_TELL_EVERY_S`: two lines each."""
        now_s = time.monotonic()
        self._tells = min(_TELLS, self._tells + (now_s - self._tells_s) / _TELL_EVERY_S)
        self._tells_s = now_s
        if self._tells < 1.0:
            return False
        self._tells -= 1.0
        return True

    def _link_is_up(self) -> None:
        self._silent = False
        self.health.why = self.health.cause = ""
        if self.health.state is LinkState.UP:
            return
        if self._down_since_s is not None:
            log.log(
                logging.INFO if self._told_down else logging.DEBUG,
                "link back after %.0f s, %d readings buffered",
                time.monotonic() - self._down_since_s, self._buffer.state.buffered_readings,
            )  # fmt: skip
        else:
            log.info("link up: %s", self._uplink.name)
        self._down_since_s = None
        self.health.state = LinkState.UP
        self.health.since_ns = time.time_ns()

    @property
    def told_spread_s(self) -> float:
        """Over how long the fleet is to come back, as the cloud said last."""
        return self._spread_s

    def tell(self) -> LinkHealth:
        """`health`, with the ack latencies computed anew."""
        if self._latencies:
            taken = sorted(self._latencies)
            self.health.ack_p50_ms = round(taken[len(taken) // 2] * 1000, 1)
            self.health.ack_p99_ms = round(taken[min(len(taken) - 1, len(taken) * 99 // 100)] * 1000, 1)
        self.health.target = self._uplink.name
        self.health.detour = self._detour()
        return self.health


def uplink_of(
    settings: UplinkSettings, gateway: GatewayName, rng: random.Random | None = None
) -> Uplink | None:
    """The configured uplink, or None for `kind = "none"`. Only its own library is imported. Raises `IdentityError`
    for a credential or an address that cannot be used."""
    ways = [way_of(way, gateway, place) for place, way in settings.ways.items()]
    match ways:
        case [first, second]:
            return FailoverUplink(
                first,
                second,
                after_failures=settings.fallback.after_failures,
                return_s=settings.fallback.return_s,
                rng=rng or random.Random(),
            )
        case [only]:
            return only
    return None


def way_of(settings: UplinkSettings, gateway: GatewayName, place: str) -> Uplink:
    """One way, of `settings.ways`. Raises `IdentityError`."""
    secret: Secret = read_secret(place, file=settings.token_file, env=settings.token_env)
    if settings.kind == "mqtt":
        from sync.mqtt import MqttUplink

        # A session of its own: a second connection under the same client id would end the first.
        return MqttUplink(gateway, settings, secret, session="" if place == "uplink" else ":2")
    from sync.https import HttpsUplink

    return HttpsUplink(gateway, settings, secret)
