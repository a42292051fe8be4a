"""A link that costs: what may go over it now, and what has gone over it today.

Rules:
1. `judge` decides, pure: the time, the bytes used and the rules are passed in. `Meter` counts and keeps the count.
2. Never too few: what is counted is an estimate of what the provider counts (payloads, MQTT or HTTP, TLS, TCP and IP,
   both ways), from above; the file on disk is ahead of the count, so that a crash forgets nothing.
3. A wall clock that is set back opens no new day; only a later date does, or a whole day by the clock that only runs.
4. What goes at any time is counted, and may go beyond the day's bytes: it is sent because it must be.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import zoneinfo
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Final

import msgspec

from agent.state import write_atomically
from config.agent import Metered
from drivers.contract import Priority

log = logging.getLogger(__name__)

METER_NAME: Final = "metered.json"
HELD_REPORT_S: Final = 3600.0  #: a heartbeat while all else is held back: the cloud must see that it lives

_SEGMENT: Final = 1400  #: payload of a TCP segment on a link with a tunnel or PPP in it
_SEGMENT_HEAD: Final = 52  #: IPv4 20 and TCP 20 with timestamps 12 (RFC 9293, RFC 7323)
_TLS_RECORD: Final = 16_384
_TLS_HEAD: Final = 29  #: TLS 1.2 with AES-GCM; 1.3 takes 22
_HANDSHAKE_UP, _HANDSHAKE_DOWN = 1_800, 4_500  #: TCP's, TLS with a chain of two certificates, and the login
_MQTT_UP, _MQTT_DOWN = 180, 340  #: topic and head; PUBACK, and the ack with its topic
_HTTPS_UP, _HTTPS_DOWN = 480, 420  #: head lines and the ack
_HTTPS_IDLE_S: Final = 4.0  #: after this a new connection is made (`sync.https`)
_PING: Final = 2 * (2 + _TLS_HEAD + 2 * _SEGMENT_HEAD)  #: PINGREQ and PINGRESP, each acknowledged by TCP
_AHEAD: Final = 0.01  #: of the day's bytes: how far the file is ahead of the count ...
_AHEAD_BYTES: Final = 65_536  #: ... and at least so much
_DAY_S: Final = 86_400.0
_LOOK_AGAIN_S: Final = 30.0  #: the wall clock may be set meanwhile


class Rules(msgspec.Struct, frozen=True):
    """`config.agent.Metered`, in numbers."""

    hours: tuple[tuple[int, int], ...]  #: minutes of the day, from and to; to is less where it is tomorrow's
    zone: tzinfo
    bytes_per_day: int
    lowest: Priority | None  #: goes at any time, with what is above it; None: nothing does


class Verdict(msgspec.Struct, frozen=True):
    """What may go now."""

    held: bool = False  #: but for what goes at any time
    why: str = ""
    again_s: float = _LOOK_AGAIN_S  #: when to ask again at the latest


def rules_of(settings: Metered) -> Rules:
    """The rules that a configuration means."""
    hours = []
    for told in settings.hours:
        first, last = (int(part[:2]) * 60 + int(part[3:]) for part in told.split("-"))
        hours.append((first, last))
    return Rules(
        tuple(hours),
        UTC if settings.timezone == "UTC" else zoneinfo.ZoneInfo(settings.timezone),
        settings.bytes_per_day,
        None if settings.always == "none" else Priority(settings.always),
    )


def judge(now: datetime, used: int, rules: Rules) -> Verdict:
    """Whether all may go now, and if not, why and until when."""
    local = now.astimezone(rules.zone)
    zone = "" if rules.zone is not UTC else " UTC"
    waits: list[tuple[datetime, str]] = []
    if rules.hours and not any(_within(local, *span) for span in rules.hours):
        opens = min(_next(local, first) for first, _ in rules.hours)
        waits.append((opens, f"metered, until {opens:%H:%M}{zone}"))
    if rules.bytes_per_day and used >= rules.bytes_per_day:
        midnight = _next(local, 0)
        told = f"metered, the day's {rules.bytes_per_day:,} bytes are used up, until {midnight:%H:%M}{zone}"
        waits.append((midnight, told))
    if not waits:
        return Verdict()
    until, why = max(waits)
    left_s = (until - local).total_seconds()
    return Verdict(True, why, max(0.1, min(left_s, _LOOK_AGAIN_S)))


def _within(local: datetime, first: int, last: int) -> bool:
    minute = local.hour * 60 + local.minute
    return first <= minute < last if first < last else minute >= first or minute < last


def _next(local: datetime, minute: int) -> datetime:
    """The next time that the wall clock shows this minute of the day."""
    today = local.replace(hour=minute // 60, minute=minute % 60, second=0, microsecond=0, fold=0)
    return today if today > local else today + timedelta(days=1)


# --- what a message costs ---


def message_bytes(payload: int, *, https: bool) -> int:
    """On the wire, both ways, for one batch or heartbeat and its answer."""
    up, down = (_HTTPS_UP, _HTTPS_DOWN) if https else (_MQTT_UP, _MQTT_DOWN)
    return _one_way(payload + up) + _one_way(down)


def connect_bytes() -> int:
    """For one connection: TCP, TLS, login."""
    return _one_way(_HANDSHAKE_UP) + _one_way(_HANDSHAKE_DOWN)


def _one_way(size: int) -> int:
    size += math.ceil(size / _TLS_RECORD) * _TLS_HEAD
    segments = math.ceil(size / _SEGMENT)
    return size + _SEGMENT_HEAD * (segments + math.ceil(segments / 2))


# --- counting ---


class _Kept(msgspec.Struct):
    day: date
    used: int


class Meter:
    """What has gone over the link today."""

    def __init__(
        self,
        settings: Metered,
        folder: Path,
        *,
        keepalive_s: float,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rules = rules_of(settings)
        self.only_fallback = settings.applies_to == "fallback"
        self.used = 0
        self._path = folder / METER_NAME
        self._ping_s = keepalive_s * 0.75
        self._now = now
        self._monotonic_s = monotonic_s
        self._kept = 0  #: what the file says
        self._day = date.min
        self._day_s = monotonic_s()
        self._last_s = monotonic_s()
        self._unkept = False  #: the disk refused, and it was told
        self._writing = asyncio.Lock()

    def load(self) -> None:
        """Go on from the file, which is ahead of the count. A file that cannot be read counts as nothing used."""
        self._day = self._today()
        try:
            kept = msgspec.json.decode(self._path.read_bytes(), type=_Kept)
        except FileNotFoundError:
            return
        except (OSError, msgspec.DecodeError) as err:
            log.warning("%s cannot be read (%s): the day's bytes are counted from 0", self._path, err)
            return
        if kept.day >= self._day:  # the clock may not be set yet
            self._day, self.used, self._kept = kept.day, kept.used, kept.used

    def verdict(self) -> Verdict:
        """As of now."""
        self._turn()
        return judge(self._now(), self.used, self.rules)

    async def connected(self) -> None:
        """A connection was made."""
        self._last_s = self._monotonic_s()
        await self._spend(connect_bytes())

    async def message(self, payload: int, *, https: bool) -> None:
        """A message of so many bytes is about to be sent. Returns when the count is safe on disk."""
        now_s = self._monotonic_s()
        idle_s, self._last_s = now_s - self._last_s, now_s
        cost = message_bytes(payload, https=https)
        if https:
            cost += connect_bytes() if idle_s > _HTTPS_IDLE_S else 0
        else:
            cost += int(idle_s / self._ping_s) * _PING
        await self._spend(cost)

    async def close(self) -> None:
        """Keep the count as it is."""
        if self._kept != self.used:
            await asyncio.shield(self._keep(self.used))

    # --- within ---

    async def _spend(self, cost: int) -> None:
        self._turn()
        self.used += cost
        if self.used > self._kept:
            await self._keep(self.used + max(_AHEAD_BYTES, int(self.rules.bytes_per_day * _AHEAD)))

    async def _keep(self, used: int) -> None:
        async with self._writing:
            data = msgspec.json.encode(_Kept(self._day, used))
            try:
                await asyncio.to_thread(write_atomically, self._path, data)
            except OSError as err:
                if not self._unkept:
                    log.warning("%s: %s; a restart would forget what was sent since", self._path, err)
                self._unkept = True
                return
            self._unkept = False
            self._kept = used

    def _turn(self) -> None:
        """A new day?"""
        today, now_s = self._today(), self._monotonic_s()
        if today == self._day or (today < self._day and now_s - self._day_s < _DAY_S):
            return
        if today < self._day:
            today = self._day  # the clock is behind: a day by the clock that only runs
        self._day, self._day_s, self.used, self._kept = today, now_s, 0, 0

    def _today(self) -> date:
        return self._now().astimezone(self.rules.zone).date()
