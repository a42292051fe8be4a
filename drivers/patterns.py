"""Patterns (regular expressions) from a configuration, which can cost no more than their text is long.

Rules:
1. Matching is linear in the text, whatever the pattern: RE2 has no backtracking, so `(a+)+$` is as harmless as `a+`
   (github.com/google/re2/wiki/WhyRE2). Python's own `re` would hold the event loop for ever.
2. What RE2 cannot do linearly (look-around, back-references), and a pattern that would need more than `MEMORY_BYTES`,
   is refused when the configuration is checked, with the place.
3. RE2 is loaded with the first pattern: a gateway without patterns never pays for it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Final, Protocol, cast

from drivers.contract import ConfigError

MEMORY_BYTES: Final = 1 << 20  #: of one compiled pattern, its automaton included
MAX_PATTERN_CHARS: Final = 4_096


class _Match(Protocol):
    def span(self, group: int) -> tuple[int, int]: ...


class _Compiled(Protocol):
    groups: int
    groupindex: Mapping[str, int]

    def search(self, text: str | bytes) -> _Match | None: ...


class Found:
    """Where a pattern was found in a text."""

    __slots__ = ("_match", "_named", "_text")

    def __init__(self, match: _Match, text: str, named: Mapping[str, int]) -> None:
        self._match = match
        self._text = text
        self._named = named

    def __getitem__(self, group: str | int) -> str | None:
        """The text of a group, by number or name; `None` where the group took no part."""
        begin, end = self._match.span(self._named[group] if isinstance(group, str) else group)
        return None if begin < 0 else self._text[begin:end]


class Pattern:
    """One compiled pattern. `groups` and `names` tell what it captures."""

    __slots__ = ("_compiled", "groups", "names")

    def __init__(self, compiled: _Compiled) -> None:
        self._compiled = compiled
        self.groups = compiled.groups
        self.names: Mapping[str, int] = dict(compiled.groupindex)

    def search(self, text: str) -> Found | None:
        """The first place where it matches."""
        # As bytes where both count alike: RE2 works on UTF-8 and would translate every position.
        match = self._compiled.search(text.encode() if text.isascii() else text)
        return None if match is None else Found(match, text, self.names)


def compile_pattern(text: str, where: str) -> Pattern:
    """A pattern of the configuration. `where` is the key as its owner knows it. Raises `ConfigError`."""
    if len(text) > MAX_PATTERN_CHARS:
        raise ConfigError(f"{where}: the pattern has {len(text)} characters; at most {MAX_PATTERN_CHARS}")
    try:
        return _compile(text)
    except ImportError as exc:
        raise ConfigError(
            f"{where}: patterns need the package google-re2 (pip install 'headgate[agent]')"
        ) from exc
    except _PatternError as exc:
        raise ConfigError(f"{where}: {text!r} is not a valid pattern: {exc}{_remedy(str(exc))}") from exc


class _PatternError(Exception):
    pass


@functools.lru_cache(maxsize=256)  # a profile's patterns, once for all devices
def _compile(text: str) -> Pattern:
    import re2

    options = re2.Options()
    options.max_mem = MEMORY_BYTES
    options.log_errors = False
    try:
        text.encode()  # a lone surrogate is no text
    except UnicodeEncodeError as exc:
        raise _PatternError("it holds half a character") from exc
    try:
        return Pattern(cast(_Compiled, re2.compile(text, options)))
    except re2.error as exc:
        why = exc.args[0] if exc.args else ""
        raise _PatternError(why.decode(errors="replace") if isinstance(why, bytes) else str(why)) from exc


def _remedy(why: str) -> str:
    if "invalid perl operator" in why or "invalid escape sequence" in why:
        return "; look-around (?=…), (?!…) and back-references \\1 are not offered, because they can take for ever"
    if "too large" in why or "repetition size" in why:
        return "; write smaller repetitions"
    return ""
