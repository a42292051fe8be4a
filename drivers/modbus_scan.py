"""In what order a Modbus line is searched, and how long that takes. Pure: it says what to ask next, and is told what
came.

Rules:

1. Likely first: the commonest line settings, and at each of them the low addresses, come before all others.
2. A line has one setting. Once a unit answered, the rest of the addresses are asked at its setting alone (unless the
   whole is wanted), so the sweep that follows a find is short.
3. Any proper reply is a find, an exception too. Noise in the place of an answer is asked again once, and then speaks
   for the settings that share its baud: they come next.
4. The estimate counts what is left at what an unanswered request costs; it is what the search takes where nobody
   answers, and less where somebody does.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final, Literal

import msgspec

LAST_UNIT: Final = 247  #: Modbus over serial line 1.02, 2.2: individual addresses 1 to 247
LOW_UNITS: Final = 32  #: asked first at every setting: installers count from 1

_CHARACTERS: Final = {"rtu": 8 + 7, "ascii": 17 + 15}
"""On the wire: unit, function, address, quantity, check; and unit, function, byte count, one register, check. In ASCII
two characters a byte, a check of one byte, colon, carriage return and line feed."""
SETTLE_S: Final = 0.005  #: the line's own pause after a request that was not answered
OVERHEAD_S: Final = 0.002  #: what a request costs this machine beside the waiting


class Setting(msgspec.Struct, frozen=True):
    """How a serial line is set up."""

    baud: int
    parity: str  #: N, E or O
    stop_bits: int = 1
    data_bits: int = 8
    framing: Literal["rtu", "ascii"] = "rtu"

    @property
    def character_s(self) -> float:
        return (1 + self.data_bits + (self.parity != "N") + self.stop_bits) / self.baud

    @property
    def silence_s(self) -> float:
        """Between frames (Modbus over serial line 1.02, 2.5.1.1)."""
        if self.framing == "ascii":
            return 0.0
        return 0.00175 if self.baud > 19200 else 3.5 * self.character_s

    def __str__(self) -> str:
        return f"{self.baud} {self.data_bits}{self.parity}{self.stop_bits}" + " ascii" * (
            self.framing == "ascii"
        )


#: The six commonest, likeliest first: what meters, inverters and controllers leave the factory with (the standard's own
#: 19200 8E1 is second to 9600 8N1), and what installers turn to for speed.
COMMON: Final = (
    Setting(9600, "N"),
    Setting(19200, "E"),
    Setting(9600, "E"),
    Setting(19200, "N"),
    Setting(115200, "N"),
    Setting(38400, "N"),
)
RARE: Final = (
    Setting(9600, "N", 2),
    Setting(19200, "N", 2),
    Setting(38400, "E"),
    Setting(57600, "N"),
    Setting(4800, "N"),
    Setting(2400, "E"),
    Setting(2400, "N"),
    Setting(4800, "E"),
    Setting(115200, "E"),
    Setting(57600, "E"),
    Setting(9600, "O"),
    Setting(19200, "O"),
    Setting(38400, "O"),
    Setting(1200, "N"),
)
#: Seven bits and even parity are the standard's (Modbus over serial line 1.02, 2.5.2.1); eight are what devices made
#: for RTU are left at.
ASCII: Final = (
    *(Setting(baud, "E", 1, 7, "ascii") for baud in (9600, 19200, 4800, 38400, 2400)),
    *(Setting(baud, "N", 1, 8, "ascii") for baud in (9600, 19200)),
    Setting(9600, "O", 1, 7, "ascii"),
    Setting(9600, "N", 2, 7, "ascii"),
)


class Heard(enum.Enum):
    """What came in answer to one request."""

    ANSWER = "answer"  #: a reply that passes its check, or an exception
    NOISE = "noise"  #: something, and no reply
    SILENCE = "silence"


class Ask(msgspec.Struct, frozen=True):
    """What to ask next."""

    setting: Setting
    unit: int
    timeout_s: float
    again: bool = False  #: because noise came the first time


def timeout_s(setting: Setting, turnaround_s: float) -> float:
    """How long an answer may take: request and reply on the wire, and the device's turnaround."""
    return _CHARACTERS[setting.framing] * setting.character_s + turnaround_s


def cost_s(setting: Setting, turnaround_s: float) -> float:
    """What a request that nobody answers takes."""
    return timeout_s(setting, turnaround_s) + max(SETTLE_S, setting.silence_s) + OVERHEAD_S


def units_of(text: str, *, last: int = LAST_UNIT) -> list[int]:
    """`1-32,100` as numbers. Raises `ValueError` with what is right."""
    return numbers_of(text, 1 if last == LAST_UNIT else 0, last, "unit")


def numbers_of(text: str, lowest: int, highest: int, what: str) -> list[int]:
    """`1-32,100` as numbers, each once, in order. Raises `ValueError`."""
    found: dict[int, None] = {}
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            low = int(first, 0)
            high = int(last, 0) if dash else low
        except ValueError:
            raise ValueError(
                f"{part.strip()!r} is not a {what}, nor a range such as {lowest}-{highest}"
            ) from None
        if not lowest <= low <= high <= highest:
            raise ValueError(f"{part.strip()}: a {what} is {lowest} to {highest}, the lower one first")
        found.update(dict.fromkeys(range(low, high + 1)))
    return list(found)


def settings_of(
    bauds: Sequence[int],
    parities: Sequence[str],
    stop_bits: int | None,
    *,
    full: bool,
    framing: str | None = None,
) -> list[Setting]:
    """The settings to try, likeliest first, of those that the caller left open. ASCII is rare."""
    known = [*COMMON, *RARE] if full or bauds or parities or stop_bits else list(COMMON)
    if framing == "ascii":
        known = list(ASCII)
    elif full and framing is None:
        known += ASCII
    chosen = [
        setting
        for setting in known
        if (not bauds or setting.baud in bauds)
        and (not parities or setting.parity in parities)
        and (stop_bits is None or setting.stop_bits == stop_bits)
    ]
    # A setting that stands in no list was asked for by name.
    for baud in bauds:
        for parity in parities or ("N", "E"):
            wanted = Setting(baud, parity, stop_bits or 1)
            if framing == "ascii":
                wanted = Setting(baud, parity, stop_bits or 1, 8 if parity == "N" else 7, "ascii")
            if wanted not in chosen and (parities or not any(each.baud == baud for each in known)):
                chosen.append(wanted)
    return chosen


class Sweep:
    """The search of one serial line. `next`, then `told`, until `next` gives `None`; it may be left at any time."""

    def __init__(
        self,
        settings: Sequence[Setting],
        units: Iterable[int],
        *,
        turnaround_s: float,
        whole: bool = False,
    ) -> None:
        self._turnaround_s = turnaround_s
        self.whole = whole
        units = list(units)
        self._units = units
        low = [unit for unit in units if unit <= LOW_UNITS]
        high = [unit for unit in units if unit > LOW_UNITS]
        #: Stretches of (setting, units left), in the order in which they are asked.
        self._queue: deque[tuple[Setting, deque[int]]] = deque()
        for stretch in (low, high):
            for setting in settings:
                if stretch:
                    self._queue.append((setting, deque(stretch)))
        self._again: Ask | None = None
        self.settled: Setting | None = None  #: where a unit answered
        self.noisy: dict[Setting, int] = {}  #: how often something came that was no answer
        self.asked = 0

    @property
    def left(self) -> int:
        """Requests that are left, if nobody answers."""
        return sum(len(units) for _, units in self._queue) + (self._again is not None)

    def left_s(self) -> float:
        """How long they take, if nobody answers."""
        total = sum(len(units) * cost_s(setting, self._turnaround_s) for setting, units in self._queue)
        return total + (cost_s(self._again.setting, self._turnaround_s) if self._again else 0.0)

    def next(self) -> Ask | None:
        if self._again is not None:
            ask, self._again = self._again, None
            self.asked += 1
            return ask
        while self._queue and not self._queue[0][1]:
            self._queue.popleft()
        if not self._queue:
            return None
        setting, units = self._queue[0]
        self.asked += 1
        return Ask(setting, units.popleft(), timeout_s(setting, self._turnaround_s))

    def told(self, ask: Ask, heard: Heard) -> None:
        if heard is Heard.ANSWER:
            if self.settled is None and not self.whole:
                self._settle(ask.setting)
            self.settled = self.settled or ask.setting
        elif heard is Heard.NOISE:
            self.noisy[ask.setting] = self.noisy.get(ask.setting, 0) + 1
            if not ask.again:
                self._again = msgspec.structs.replace(ask, again=True)
            elif self.noisy[ask.setting] == 2:
                self._prefer(ask.setting.baud)

    def drop(self, setting: Setting) -> None:
        """This setting cannot be used on this port."""
        self._queue = deque((each, units) for each, units in self._queue if each != setting)

    def _settle(self, setting: Setting) -> None:
        """Ask the rest of the addresses, low ones first, at this setting only."""
        self._queue = deque((each, units) for each, units in self._queue if each == setting)

    def _prefer(self, baud: int) -> None:
        """Somebody speaks at this baud, and not as we listen: its other settings come next."""
        now, later = list(self._queue)[:1], list(self._queue)[1:]
        later.sort(key=lambda each: each[0].baud != baud)  # stable: else as before
        self._queue = deque([*now, *later])


# --------------------------------------------------------------------------------- who are you

IDENTIFY: Final = 0x2B  #: encapsulated interface transport (application protocol 1.1b3, 6.19)
READ_IDENTIFICATION: Final = 0x0E  #: its MEI type (same, 6.21)
BASIC: Final = 0x01  #: vendor, product code, revision
REGULAR: Final = 0x02  #: those and the vendor's address, product name, model name, application name
_FIXED: Final = 4  #: of a reply, after the code: conformity, more follows, next object, number of objects
OBJECT_WORDS: Final = {
    0: "vendor", 1: "product", 2: "revision", 3: "address", 4: "product name", 5: "model", 6: "application",
}  # fmt: skip


class Identification(msgspec.Struct, frozen=True):
    """One reply: the objects in it, and with which to go on (`None`: that was all)."""

    objects: dict[int, str]
    go_on: int | None


def identification_pdu(code: int, first: int = 0) -> bytes:
    return bytes([IDENTIFY, READ_IDENTIFICATION, code, first])


def parse_identification(reply: bytes) -> Identification:
    """What follows function, MEI type and code in a reply. What does not fit is left out; never raises."""
    if len(reply) < _FIXED:
        return Identification({}, None)
    _, more, following, count = reply[:_FIXED]
    objects: dict[int, str] = {}
    at = _FIXED
    for _ in range(count):
        if at + 2 > len(reply) or at + 2 + reply[at + 1] > len(reply):
            break
        number, size = reply[at], reply[at + 1]
        raw = reply[at + 2 : at + 2 + size]
        text = raw.decode("utf-8", "replace").strip("\0 ")
        objects[number] = "".join(each if each.isprintable() else "?" for each in text)
        at += 2 + size
    return Identification(objects, following if more == 0xFF and objects else None)
