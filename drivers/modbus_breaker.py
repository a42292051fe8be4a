"""When to leave a unit alone that does not answer. Pure: time is passed in.

Rules:

1. A unit that failed several times in a row is left alone for a while: a second, then twice as long each time it fails
   again. An outage of minutes ends within seconds of the unit's return; one of more than ten minutes may take a
   minute.
2. The wait is in proportion to what asking a dead unit costs its line: at most a twentieth of the line's time.
3. After the wait one request is let through (a probe). Its answer ends the matter; its failure begins the next wait.
   Most probes have little patience, some wait for as long as a reply may take, and some are sent just as asked.
4. A busy unit is there and will have time soon: its waits are shorter.
5. One proper answer, be it a refusal, and all is forgotten.
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec

from drivers.contract import Reason

IN_A_ROW: Final = {
    Reason.TIMEOUT: 3,  #: some devices are silent about addresses they do not have: two blocks may be such
    Reason.BUSY: 3,
    Reason.BEHIND_GATEWAY: 2,  #: its gateway has tried already
}
IN_A_ROW_ELSE: Final = 6  #: garbled replies: something is there, and noise passes
FIRST_S: Final = 1.0
BUSY_FIRST_S: Final = 0.25
BUSY_LONGEST_S: Final = 2.0
SHARE: Final = 20.0  #: a wait is at least this many times what a failed probe costs the line
LEAST_LONGEST_S: Final = 2.0
MOST_LONGEST_S: Final = 8.0
LONG_DEAD_S: Final = 600.0
LONG_DEAD_LONGEST_S: Final = 60.0
PATIENT_EVERY: Final = 4  #: every so many probes one waits as long as the request may take,
WHOLE_EVERY: Final = 16  #: and one is the whole request, for some devices mind any other:
FIRST_WHOLE: Final = 2  #: this one first


class Verdict(enum.Enum):
    PASS = 0
    PROBE = 1  #: this one request, with little patience, or a brief one in its place
    PATIENT_PROBE = 2  #: the same, and its whole timeout
    WHOLE_PROBE = 3  #: this one request, just as it is
    REFUSE = 4


class Breaker(msgspec.Struct):
    """One unit of one line that failed lately."""

    reason: Reason = Reason.TIMEOUT  #: why it failed last
    since_s: float = 0.0  #: when it failed first
    in_a_row: int = 0
    waits: int = 0  #: begun since it answered
    again_s: float = 0.0  #: when it may be asked again
    probing: bool = False
    reply_due_s: float = 0.0  #: until then a reply to a probe that nobody waits for may come

    @property
    def is_open(self) -> bool:
        return self.waits > 0

    def refuses(self, now_s: float) -> bool:
        return self.waits > 0 and (self.probing or now_s < self.again_s)

    def verdict(self, now_s: float) -> Verdict:
        """May it be asked now? Whoever is told to probe says how it went: `failed`, or `released`."""
        if not self.waits:
            return Verdict.PASS
        if self.refuses(now_s):
            return Verdict.REFUSE
        self.probing = True
        if self.waits % WHOLE_EVERY == FIRST_WHOLE:
            return Verdict.WHOLE_PROBE
        return Verdict.PROBE if self.waits % PATIENT_EVERY else Verdict.PATIENT_PROBE

    def failed(self, reason: Reason, now_s: float, cost_s: float) -> None:
        """It was asked and failed. `cost_s`: how long the line was taken."""
        if not self.in_a_row:
            self.since_s = now_s
        self.reason = reason
        self.in_a_row += 1
        self.probing = False
        if self.waits or self.in_a_row >= IN_A_ROW.get(reason, IN_A_ROW_ELSE):
            self.again_s = now_s + wait_s(reason, self.waits, now_s - self.since_s, cost_s)
            self.waits += 1

    def released(self) -> None:
        """Whoever was to probe went away without asking."""
        self.probing = False

    def expects(self, due_s: float) -> None:
        """A reply to a probe that nobody waits for may come until then: not asked again before."""
        self.reply_due_s = due_s
        self.again_s = max(self.again_s, due_s)

    def hurry(self, now_s: float) -> None:
        """There is a new connection: the unit may be asked now."""
        self.again_s = min(self.again_s, max(now_s, self.reply_due_s))


def wait_s(reason: Reason, waits: int, dead_s: float, cost_s: float) -> float:
    """How long to leave a unit alone that has been dead for `dead_s` and was left alone `waits` times before."""
    grown = 2.0 ** min(waits, 10)
    if reason is Reason.BUSY:
        return min(BUSY_FIRST_S * grown, BUSY_LONGEST_S)
    if dead_s > LONG_DEAD_S:
        longest_s = LONG_DEAD_LONGEST_S
    else:
        longest_s = min(max(SHARE * cost_s, LEAST_LONGEST_S), MOST_LONGEST_S)
    return min(FIRST_S * grown, longest_s)
