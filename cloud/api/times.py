"""Instants as people write them. Pure."""

from __future__ import annotations

import datetime
import re
from functools import lru_cache
from typing import Final

S: Final = 1_000_000_000
MAX_NS: Final = 2**63 - 1
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_AGO: Final = re.compile(r"-(\d{1,9})([smhdw])")
_FRACTION: Final = re.compile(r"\.(\d{1,9})(?=Z|[+-]\d\d:?\d\d|$)")
_EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


class TimeError(ValueError):
    """Not an instant; the text says what is one."""


def iso(ns: int) -> str:
    """2026-11-23T15:10:40.123456789Z"""
    seconds, rest = divmod(ns, S)
    return f"{_second(seconds)}.{rest:09d}Z"


@lru_cache(maxsize=4096)
def _second(seconds: int) -> str:
    return (_EPOCH + datetime.timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%S")


def parse(text: str, now_ns: int) -> int:
    """Nanoseconds since 1970 of `now`, `-15m`, `2026-11-23`, `2026-11-23T10:00:00.5+01:00` (UTC where no zone is
    given), or the nanoseconds themselves. Raises `TimeError`."""
    text = text.strip()
    if text == "now":
        return now_ns
    if ago := _AGO.fullmatch(text):
        return max(0, now_ns - int(ago.group(1)) * _UNITS[ago.group(2)] * S)
    if text.isascii() and text.isdigit() and len(text) != 8:  # eight are a date without its dashes
        return _in_range(int(text), text)
    fraction = _FRACTION.search(text)
    whole = text[: fraction.start()] + text[fraction.end() :] if fraction else text
    try:
        at = datetime.datetime.fromisoformat(whole)
    except ValueError as err:
        raise TimeError(
            f"{text!r} is no time; give 2026-11-23, 2026-11-23T10:00:00Z, -15m (s, m, h, d, w), now, or nanoseconds"
        ) from err
    if at.tzinfo is None:
        at = at.replace(tzinfo=datetime.UTC)
    since = at - _EPOCH
    ns = (since.days * 86_400 + since.seconds) * S + int(fraction.group(1).ljust(9, "0") if fraction else 0)
    return _in_range(ns, text)


def _in_range(ns: int, text: str) -> int:
    if not 0 <= ns <= MAX_NS:
        raise TimeError(f"{text!r} is outside 1970 to 2262")
    return ns
