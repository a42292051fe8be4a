"""What is wrong with the cloud, as distinct codes with their remedies. Pure: plain values in, a list out.

Rules:
1. One code per cause; what concerns one sink or gateway carries its name after a colon.
2. A code is there while its cause is, and goes with it: nothing is remembered here. The values are at most
   `LOOK_EVERY_S` old, so a code comes and clears within 30 s of its cause; only the account is as old as its last
   check.
3. `grave` codes mean that readings are refused, or will be lost to a sink, unless somebody acts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import msgspec

LOOK_EVERY_S: Final = 5.0
FILLING_AT: Final = 0.85  #: of the journal's capacity, after trimming
SILENT_S: Final = 900.0  #: for an agent that does not tell how often it reports
SILENT_LEAST_S: Final = 90.0
HELD_S: Final = (
    3600.0  #: between the reports of an agent whose metered link's rules hold them back (agent/README.md)
)
CODES_SHOWN: Final = 32  #: of one agent
WORDS_SHOWN: Final = 400  #: letters of what it says of one code
_CODE: Final = re.compile(r"[a-z0-9_]{1,64}")
BEHIND_S: Final = 600.0  #: a sink that runs and is this late


class Problem(msgspec.Struct, frozen=True):
    code: str
    text: str
    remedy: str
    grave: bool = False


class SinkView(msgspec.Struct, frozen=True):
    name: str
    word: str  #: running, retrying, broken, ...
    error: str = ""
    lag_s: float = 0.0
    missed_readings: int = 0  #: trimmed before it had them, and not given to it since
    required: bool = True


class GatewayView(msgspec.Struct, frozen=True):
    name: str
    silent_s: float | None = None  #: since it was last heard; None: never
    over_quota: bool = False
    problems: tuple[str, ...] = ()  #: the agent's own codes, from its heartbeat
    words: tuple[tuple[str, str], ...] = ()  #: (code, the agent's text with its remedy), where it gave one
    silent_after_s: float = SILENT_S  #: `silent_after_s` of its heartbeat
    watched_s: float = float("inf")  #: since this cloud could hear it: it was away itself before
    state_age_s: float = 0.0  #: of its heartbeat


class View(msgspec.Struct, frozen=True):
    """All that is looked at."""

    journal_full: bool = False
    journal_broken: str = ""
    journal_share: float = 0.0  #: of its capacity in use
    disk_free_bytes: int = 2**62
    disk_floor_bytes: int = 0
    broker: str | None = None  #: why the MQTT door is closed; None: it is open, or there is none
    sinks: Sequence[SinkView] = ()
    gateways: Sequence[GatewayView] = ()
    skewed: Sequence[str] = ()  #: gateways whose clock was ahead a moment ago
    account_open: Sequence[str] = ()  #: `<gateway> in <sink>` that did not balance at the last check
    holes: Sequence[str] = ()  #: gateways that say they hold nothing more, with seqs that never came
    letters_dropped: int = 0


def problems(view: View) -> list[Problem]:
    """The gravest first."""
    found = [*_journal(view), *_doors(view)]
    for sink in view.sinks:
        found += _sink(sink)
    found += _accounts(view)
    for gateway in view.gateways:
        found += _gateway(gateway)
    found += [
        Problem(f"skew:{name}", f"the clock of {name} runs ahead", "set its clock, or let it reach a time server")
        for name in view.skewed
    ]  # fmt: skip
    return sorted(found, key=lambda problem: not problem.grave)


def _journal(view: View) -> list[Problem]:
    if view.journal_broken:
        return [
            Problem("journal_broken", view.journal_broken, "check the disk and its permissions", grave=True)
        ]
    if view.disk_free_bytes < view.disk_floor_bytes:
        text = f"{view.disk_free_bytes // 1024**2} MiB are free where the journal lies; batches are put off"
        return [Problem("journal_disk", text, "free disk space; nothing is lost meanwhile", grave=True)]
    if view.journal_full:
        remedy = (
            "look which sink is behind (sink_down), or raise journal.max_mb; gateways keep what they have"
        )
        return [Problem("journal_full", "the journal is full; batches are put off", remedy, grave=True)]
    if view.journal_share >= FILLING_AT:
        text = f"{view.journal_share:.0%} of the journal are in use"
        return [
            Problem("journal_filling", text, "look which required sink is behind, or raise journal.max_mb")
        ]
    return []


def _doors(view: View) -> list[Problem]:
    if view.broker is None:
        return []
    return [Problem("broker_down", f"the MQTT door is closed: {view.broker}", "start the broker, or check [mqtt]",
                    grave=True)]  # fmt: skip


def _sink(sink: SinkView) -> list[Problem]:
    found = []
    if sink.word == "retrying":
        remedy = "look at the store; the journal keeps what it is owed"
        found.append(Problem(f"sink_down:{sink.name}", sink.error, remedy, grave=sink.required))
    elif sink.word == "broken":
        remedy = "correct what the text names (credentials, configuration, the store itself)"
        found.append(Problem(f"sink_refusing:{sink.name}", sink.error, remedy, grave=sink.required))
    elif sink.lag_s >= BEHIND_S and sink.name != "archive":  # that one waits for company by intent
        text = f"{sink.name} runs {sink.lag_s / 60:.0f} min behind"
        found.append(
            Problem(f"sink_behind:{sink.name}", text, "give the store more room to work, or fewer readings")
        )
    if sink.missed_readings:
        text = f"{sink.missed_readings} readings at most were trimmed from the journal before {sink.name} had them"
        found.append(
            Problem(f"missed:{sink.name}", text, f"headgate-cloud replay --sink {sink.name} --from TIME", grave=True)
        )  # fmt: skip
    return found


def _accounts(view: View) -> list[Problem]:
    found = []
    if view.account_open:
        text = f"stored and received do not agree: {_some(view.account_open)}"
        found.append(
            Problem("account_open", text, "headgate-cloud verify tells what; replay the sink", grave=True)
        )
    if view.holes:
        text = f"frames never came, and their gateway has none left: {_some(view.holes)}"
        remedy = (
            "headgate-cloud verify tells which; after a restore they may be in a sink that was not restored"
        )
        found.append(Problem("frames_missing", text, remedy, grave=True))
    if view.letters_dropped:
        text = f"{view.letters_dropped} dead letters had to go for want of room"
        found.append(
            Problem("letters_dropped", text, "replay or drop dead letters, and mend what makes them")
        )
    return found


def _gateway(gateway: GatewayView) -> list[Problem]:
    name, found = gateway.name, []
    if gateway.over_quota:
        text = f"{name} sends more than its quota and is told to wait"
        found.append(
            Problem(f"quota:{name}", text, "raise its quota in [[gateway]], or read its devices less often")
        )
    after_s = gateway.silent_after_s
    silent = gateway.silent_s is not None and gateway.silent_s >= after_s and gateway.watched_s >= after_s
    if silent and gateway.silent_s is not None:
        text = f"{name} was last heard {_ago(gateway.silent_s)} ago"
        found.append(
            Problem(f"gateway_silent:{name}", text, "look at its network and power; it keeps what it reads")
        )
    words = dict(gateway.words)
    as_of = f" (as of {_ago(gateway.state_age_s)} ago)" if silent else ""
    for code in gateway.problems:
        text = f"{name} says: {words.get(code) or code}{as_of}"
        found.append(Problem(f"{code}:{name}", text, "headgate status on the gateway tells more"))
    return found


def _ago(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def heartbeat_of(state: bytes) -> object:
    """What a gateway said, or None where that is no JSON."""
    try:
        return msgspec.json.decode(state)
    except msgspec.DecodeError:
        return None


def codes_in(heartbeat: object) -> tuple[str, ...]:
    """The agent's own codes, as its heartbeat tells them: plain words, or records with a `code`. None is no fault: an
    agent of an older version tells none. Bounded, and only what may be a code: a gateway is not trusted."""
    told = heartbeat.get("problems") if isinstance(heartbeat, dict) else None
    if not isinstance(told, list):
        return ()
    codes = [one.get("code") if isinstance(one, dict) else one for one in told]
    known = dict.fromkeys(code for code in codes if isinstance(code, str) and _CODE.fullmatch(code))
    return tuple(known)[:CODES_SHOWN]


def words_in(heartbeat: object) -> tuple[tuple[str, str], ...]:
    """What the agent says of its codes, one text for each: several devices may have the same."""
    told = heartbeat.get("problems") if isinstance(heartbeat, dict) else None
    texts: dict[str, list[str]] = {}
    for one in told if isinstance(told, list) else ():
        if not isinstance(one, dict):
            continue
        code, text, remedy = one.get("code"), one.get("text"), one.get("remedy")
        if isinstance(code, str) and code and isinstance(text, str) and text:
            texts.setdefault(code, []).append(
                f"{text}: {remedy}" if isinstance(remedy, str) and remedy else text
            )
    return tuple((code, _some(said)[:WORDS_SHOWN]) for code, said in texts.items())


def silent_after_s(heartbeat: object) -> float:
    """After how long without a word a gateway counts as silent: three of its heartbeats."""
    if not isinstance(heartbeat, dict):
        return SILENT_S
    every_s, link = heartbeat.get("heartbeat_s"), heartbeat.get("link")
    if isinstance(every_s, bool) or not isinstance(every_s, int | float) or every_s <= 0:
        return SILENT_S
    if isinstance(link, dict) and link.get("held"):
        every_s = max(every_s, HELD_S)
    return max(SILENT_LEAST_S, 3.0 * every_s)


def nothing_left(heartbeat: object) -> bool:
    """Whether a gateway says that its buffer is empty, with nothing set aside either."""
    buffer = heartbeat.get("buffer") if isinstance(heartbeat, dict) else None
    return (
        isinstance(buffer, dict)
        and buffer.get("oldest_age_s", 0) is None
        and not buffer.get("pending_frames")
        and not buffer.get("parked_frames")
    )
