"""How long to wait before the next try. Pure: the attempt number and the randomness are passed in.

Full jitter, so that a thousand gateways that lost the same broker do not come back in step
(aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter).
"""

from __future__ import annotations

import random

_LARGEST_EXPONENT = 32  #: 2**32 times any sensible minimum is above any sensible maximum


def full_jitter(attempt: int, min_s: float, max_s: float, rng: random.Random, spread_s: float = 0.0) -> float:
    """Seconds to wait before try `attempt` (0 for the first retry): uniform in 0..min(max_s, min_s * 2**attempt), or
    in 0..`spread_s` where that is longer (a large fleet's spread, told by the cloud)."""
    ceiling_s = min(max_s, min_s * 2.0 ** min(attempt, _LARGEST_EXPONENT))
    return rng.uniform(0.0, max(ceiling_s, spread_s))


class Backoff:
    """The running form: `next_s()` grows with every call, `reset()` once something worked."""

    __slots__ = ("_max_s", "_min_s", "_rng", "attempt")

    def __init__(self, min_s: float, max_s: float, rng: random.Random) -> None:
        self._min_s = min_s
        self._max_s = max_s
        self._rng = rng
        self.attempt = 0

    def next_s(self, spread_s: float = 0.0) -> float:
        wait_s = full_jitter(self.attempt, self._min_s, self._max_s, self._rng, spread_s)
        self.attempt += 1
        return wait_s

    def reset(self) -> None:
        self.attempt = 0
