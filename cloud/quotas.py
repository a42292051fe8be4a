"""How much one gateway, and one tenant, may send. Pure: time is passed in.

Rules:
1. Three buckets each, of readings, batches and bytes; they fill by the second and hold `burst_s` seconds' worth.
2. What finds every bucket above zero passes, whatever its size (one batch may be larger than a small quota's burst),
   and what it takes beyond zero is waited for. So the mean is kept, and nothing is refused for ever.
3. Over the quota means a nack with the seconds until there is room again: the gateway keeps what it has. Each is
   counted by gateway.
4. Memory is bounded: a bucket that has been full for long is the same as none.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Final

import msgspec

MAX_BUCKETS: Final = 50_000
MAX_WAIT_S: Final = 60.0  #: asked for at most: a quota that was raised is noticed within this time
MIN_WAIT_S: Final = 0.1
SHOWN_S: Final = 20.0  #: after its last refusal a gateway is no longer shown as over its quota


class Quota(msgspec.Struct, frozen=True):
    """Per second; 0: without limit."""

    readings_per_s: float = 0.0
    batches_per_s: float = 0.0
    bytes_per_s: float = 0.0


UNLIMITED: Final = Quota()


class _Buckets:
    __slots__ = ("at_s", "batches", "bytes", "quota", "readings")

    def __init__(self, quota: Quota, burst_s: float, now_s: float) -> None:
        self.quota = quota
        self.readings = quota.readings_per_s * burst_s
        self.batches = quota.batches_per_s * burst_s
        self.bytes = quota.bytes_per_s * burst_s
        self.at_s = now_s

    def fill(self, burst_s: float, now_s: float) -> None:
        quota, gone_s = self.quota, now_s - self.at_s
        self.at_s = now_s
        self.readings = min(self.readings + quota.readings_per_s * gone_s, quota.readings_per_s * burst_s)
        self.batches = min(self.batches + quota.batches_per_s * gone_s, quota.batches_per_s * burst_s)
        self.bytes = min(self.bytes + quota.bytes_per_s * gone_s, quota.bytes_per_s * burst_s)

    def wait_s(self) -> float:
        """Until every bucket is above zero; 0: they are."""
        quota, longest_s = self.quota, 0.0
        for rate, level in (
            (quota.readings_per_s, self.readings),
            (quota.batches_per_s, self.batches),
            (quota.bytes_per_s, self.bytes),
        ):
            if rate > 0 and level <= 0:
                longest_s = max(longest_s, MIN_WAIT_S, -level / rate)
        return min(longest_s, MAX_WAIT_S)

    def take(self, readings: int, size: int) -> None:
        self.readings -= readings
        self.batches -= 1
        self.bytes -= size


class Quotas:
    """One per server. `gateway` and `tenant` hold for all that `own` (by `<tenant>/<gateway>`) does not name."""

    def __init__(
        self,
        gateway: Quota = UNLIMITED,
        tenant: Quota = UNLIMITED,
        *,
        burst_s: float = 10.0,
        own: Mapping[str, Quota] | None = None,
    ) -> None:
        self._gateway = gateway
        self._tenant = tenant
        self._burst_s = burst_s
        self._own = dict(own or {})
        self._buckets: OrderedDict[str, _Buckets] = OrderedDict()
        self.refused: Counter[str] = Counter()  #: batches, by gateway
        self._refused_at_s: dict[str, float] = {}

    def wait_s(self, gateway: str, now_s: float) -> float:
        """How long this gateway must wait before it may send anything; 0: it may send now. Takes nothing."""
        return max(self._filled(gateway, now_s).wait_s(), self._filled(_tenant(gateway), now_s).wait_s())

    def take(self, gateway: str, readings: int, size: int, now_s: float) -> float:
        """0: the batch passes, and is taken off. Else how long to wait."""
        own, tenants = self._filled(gateway, now_s), self._filled(_tenant(gateway), now_s)
        wait_s = max(own.wait_s(), tenants.wait_s())
        if wait_s == 0.0:
            own.take(readings, size)
            tenants.take(readings, size)
        return wait_s

    def refuse(self, gateway: str, now_s: float) -> None:
        """Count a batch that was told to wait, or let go unanswered."""
        self.refused[gateway] += 1
        self._refused_at_s[gateway] = now_s

    def over(self, now_s: float) -> list[str]:
        """The gateways that were refused a moment ago."""
        self._refused_at_s = {g: at for g, at in self._refused_at_s.items() if now_s - at < SHOWN_S}
        return sorted(self._refused_at_s)

    def _filled(self, who: str, now_s: float) -> _Buckets:
        buckets = self._buckets.get(who)
        if buckets is None:
            quota = self._own.get(who) or (self._gateway if "/" in who else self._tenant)
            buckets = self._buckets[who] = _Buckets(quota, self._burst_s, now_s)
            if len(self._buckets) > MAX_BUCKETS:
                self._buckets.popitem(last=False)
        else:
            buckets.fill(self._burst_s, now_s)
            self._buckets.move_to_end(who)
        return buckets


def _tenant(gateway: str) -> str:
    return gateway.partition("/")[0]
