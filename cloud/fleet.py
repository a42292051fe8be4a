"""How many gateways there are, as far as they are heard, and over how long they shall spread when all come back.

When a broker or a cloud restarts, every gateway loses it in the same second. Who knows how many they are is the cloud;
so each ack says over how many seconds to spread, and a gateway of a small fleet is back at once.
"""

from __future__ import annotations

from typing import Final

CONNECTS_PER_S: Final = 15  #: 1,000 gateways in 67 s; a broker's TLS handshakes take 2 to 5 ms of a core each
LONGEST_SPREAD_S: Final = 600
HEARD_WITHIN_S: Final = 900.0  #: a gateway that has said nothing for longer is away
_COUNT_EVERY_S: Final = 10.0


class Fleet:
    """Who was heard lately. Times are monotonic and told by the caller."""

    __slots__ = ("_counted_s", "_heard", "spread_s")

    def __init__(self) -> None:
        self._heard: dict[str, float] = {}
        self._counted_s = float("-inf")
        self.spread_s = 0  #: for the acks

    def heard_s(self, gateway: str) -> float | None:
        return self._heard.get(gateway)

    def hear(self, gateway: str, now_s: float) -> None:
        self._heard[gateway] = now_s
        if now_s - self._counted_s >= _COUNT_EVERY_S:
            self._counted_s = now_s
            self._heard = {who: at for who, at in self._heard.items() if now_s - at < HEARD_WITHIN_S}
            self.spread_s = spread_s(len(self._heard))


def spread_s(gateways: int) -> int:
    """Seconds over which so many gateways come back at `CONNECTS_PER_S`."""
    return min(LONGEST_SPREAD_S, gateways // CONNECTS_PER_S)
