"""Manners toward the hosts that are asked: not too often, not when they said later, not what their robots.txt forbids.

Rules:
1. All devices of one host share its turns: `interval_s` apart, with jitter; a `Retry-After` holds all of them.
2. robots.txt (RFC 9309) is read where a host is public, kept for a day (2.4), and fetched anew then. Where there is
   none (4xx) all is allowed (2.3.1.3); where it cannot be reached (5xx, no network) nothing is (2.3.1.4), until it can,
   or what was known before goes on.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Final

import httpx

from drivers.contract import Reason
from drivers.http_fetch import Document, FetchError

AGENT: Final = "headgate"  #: the product token that a robots.txt may name
ROBOTS_BYTES: Final = 512_000  #: RFC 9309 2.5 asks for 500 kibibytes at least
_KEPT_S: Final = 86_400.0  #: RFC 9309 2.4
_UNREACHABLE_S: Final = 600.0  #: until an unreachable robots.txt is tried again
_JITTER: Final = 0.2  #: of the interval
_MOST_HOSTS: Final = 512
_LONGEST_CRAWL_DELAY_S: Final = 3_600.0


class _Host:
    __slots__ = ("crawl_delay_s", "free_at_s", "lock", "robots", "robots_until_s")

    def __init__(self) -> None:
        self.free_at_s = 0.0
        self.crawl_delay_s = 0.0
        self.robots: Rules | None = None
        self.robots_until_s = 0.0
        self.lock = asyncio.Lock()


class Hosts:
    """What is known of the hosts, for all devices of this process."""

    def __init__(
        self, rng: random.Random | None = None, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._rng = rng or random.Random()
        self._clock_s = clock_s
        self._hosts: dict[str, _Host] = {}

    def _of(self, url: httpx.URL) -> _Host:
        key = f"{url.scheme}://{url.host}:{url.port or ''}"
        if key not in self._hosts and len(self._hosts) >= _MOST_HOSTS:
            now_s = self._clock_s()
            for old in [k for k, host in self._hosts.items() if host.free_at_s + _KEPT_S < now_s]:
                del self._hosts[old]
        return self._hosts.setdefault(key, _Host())

    def hold(self, url: httpx.URL, seconds: float) -> None:
        """The host asked to be left alone for so long."""
        host = self._of(url)
        host.free_at_s = max(host.free_at_s, self._clock_s() + seconds)

    async def turn(self, url: httpx.URL, interval_s: float) -> None:
        """Wait until this host may be asked again; the turn is taken, whatever comes of it."""
        host = self._of(url)
        now_s = self._clock_s()
        start_s = max(now_s, host.free_at_s)
        between_s = max(interval_s, host.crawl_delay_s)
        host.free_at_s = start_s + between_s * (1 + _JITTER * self._rng.random())
        if start_s > now_s:
            await asyncio.sleep(start_s - now_s)

    async def robots_allow(self, url: httpx.URL, fetch: Callable[[httpx.URL], Awaitable[Document]]) -> None:
        """Raises `FetchError` where this host's robots.txt does not allow `url`, or cannot be known."""
        host = self._of(url)
        async with host.lock:
            if host.robots is None or host.robots_until_s <= self._clock_s():
                await self._learn(host, url, fetch)
        if host.robots is None:
            raise FetchError(
                f"{url.host}: its robots.txt cannot be reached, so nothing there is allowed for now (RFC 9309 2.3.1.4)",
                Reason.REFUSED,
                max(0.0, host.robots_until_s - self._clock_s()),
            )
        if not host.robots.allow(url.raw_path.decode("ascii", "replace")):
            raise FetchError(
                f"{url.host}: its robots.txt does not allow {url.path}; ask its owner for permission or another "
                "way, then obey_robots = false",
                Reason.REFUSED,
            )

    async def _learn(
        self, host: _Host, url: httpx.URL, fetch: Callable[[httpx.URL], Awaitable[Document]]
    ) -> None:
        now_s = self._clock_s()
        if host.robots is None and host.robots_until_s > now_s:
            return  # it could not be reached a moment ago
        place = url.copy_with(raw_path=b"/robots.txt", fragment=None, userinfo=b"")
        try:
            body = (await fetch(place)).body
        except FetchError as err:
            if err.reason is Reason.REFUSED:  # 4xx: there is none
                body = b""
            else:
                host.robots_until_s = self._clock_s() + _UNREACHABLE_S
                return
        host.robots = await asyncio.to_thread(Rules, body)  # half a second for one of hostile length
        host.crawl_delay_s = host.robots.crawl_delay_s
        host.robots_until_s = self._clock_s() + _KEPT_S


class Rules:
    """A robots.txt for our agent."""

    def __init__(self, body: bytes) -> None:
        import protego

        self._rules = protego.Protego.parse(body.decode("utf-8", "replace"))
        delay = self._rules.crawl_delay(AGENT)
        self.crawl_delay_s = min(float(delay), _LONGEST_CRAWL_DELAY_S) if delay and delay > 0 else 0.0

    def allow(self, path: str) -> bool:
        return bool(self._rules.can_fetch(f"http://host{path}", AGENT))


_SHARED: Final[list[Hosts]] = []


def shared() -> Hosts:
    """The one of this process."""
    if not _SHARED:
        _SHARED.append(Hosts())
    return _SHARED[0]
