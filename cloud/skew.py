"""Gateways whose clock runs ahead: flagged, counted, told once; their data is kept.

In the times of readings a clock that runs behind cannot be told from data that comes late, and is not looked for. The
agent itself sees both, by the cloud's clock in an ack, and tells it in its heartbeat (`skew_in`).

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


def skew_in(heartbeat: object) -> float | None:
    """What a gateway found by the cloud's last ack: its clock less the cloud's, in seconds; None: not told."""
    link = heartbeat.get("link") if isinstance(heartbeat, dict) else None
    found = link.get("skew_s") if isinstance(link, dict) else None
    return float(found) if isinstance(found, int | float) else None


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
