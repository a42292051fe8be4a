"""How long until the backlog is delivered, from how fast it has been going. Pure: times and counts are passed in.

Rules: by the net rate (what was settled minus what was kept meanwhile) over the last minute; 0 where there is no
backlog; `None` where nobody can know: too little seen, nothing delivered, or it grows.
"""

from __future__ import annotations

from collections import deque
from typing import Final

WINDOW_S: Final = 60.0
_LEAST_S: Final = 4.0  #: less says nothing: batches hold up to a second of readings and more
_NO_BACKLOG_S: Final = 10.0  #: readings younger than this are on their way, not waiting


class DrainEstimate:
    """Fed with the buffer's totals, now and then."""

    __slots__ = ("_seen",)

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int, int]] = deque()  #: when, settled, kept

    def eta_s(
        self, now_s: float, settled: int, kept: int, buffered: int, oldest_age_s: float | None
    ) -> float | None:
        """Seconds until what is buffered is delivered at the recent pace. Readings, all of them."""
        seen = self._seen
        seen.append((now_s, settled, kept))
        while len(seen) > 2 and seen[1][0] <= now_s - WINDOW_S:
            seen.popleft()
        then_s, settled_then, kept_then = seen[0]
        if not buffered:
            return 0.0
        if now_s - then_s < _LEAST_S or settled <= settled_then:
            return None
        if oldest_age_s is not None and oldest_age_s < _NO_BACKLOG_S:
            return 0.0
        net = (settled - settled_then) - (kept - kept_then)
        return round(buffered * (now_s - then_s) / net, 1) if net > 0 else None
