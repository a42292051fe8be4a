"""Gateways whose clock runs ahead: flagged, counted, told once; their data is kept.

A clock that runs behind cannot be told from data that comes late, and is not looked for here.

Rules:
1. A batch counts once, however many sinks decode it: a sink that follows later meets offsets that are counted already.
2. A gateway is a warning once, and again after an hour (of the batches' receipt) without any.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Final

log = logging.getLogger(__name__)

SKEW_NS: Final = 300 * 10**9  #: `limits.skew_alarm_s` unless told otherwise
QUIET_NS: Final = 3_600 * 10**9


class Skews:
    """One per server, for all decoders; used in the loop's thread only."""

    def __init__(self, limit_ns: int = SKEW_NS) -> None:
        self.limit_ns = limit_ns
        self.batches: Counter[str] = Counter()  #: by gateway
        self._counted: dict[str, int] = {}  # by gateway: the newest offset counted
        self._last_ns: dict[str, int] = {}

    def note(self, gateway: str, offset: int, received_at_ns: int, ahead_ns: int) -> None:
        """A batch whose newest time is this far after its receipt."""
        if ahead_ns <= self.limit_ns or offset <= self._counted.get(gateway, 0):
            return
        self._counted[gateway] = offset
        self.batches[gateway] += 1
        last_ns = self._last_ns.get(gateway)
        self._last_ns[gateway] = received_at_ns
        if last_ns is None or received_at_ns - last_ns >= QUIET_NS:
            log.warning(
                "gateway %s: its clock is ahead by %.0f s, and %.0f s are tolerated (limits.skew_alarm_s): set its "
                "clock; its readings are kept and flagged",
                gateway, ahead_ns / 1e9, self.limit_ns / 1e9,
            )  # fmt: skip
