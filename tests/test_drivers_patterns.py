"""Patterns of a configuration: what they find, what is refused, and that none can hold the event loop."""

from __future__ import annotations

import time

import pytest

from drivers.contract import ConfigError
from drivers.patterns import MAX_PATTERN_CHARS, compile_pattern


def test_groups_are_found_by_name_and_number() -> None:
    pattern = compile_pattern(r"W=\s*(?P<weight>\S+) kg(, T=(?P<t>\S+))?", "options.pattern")
    found = pattern.search("net W=  12.5 kg")
    assert found is not None
    assert (found["weight"], found[1], found["t"]) == ("12.5", "12.5", None)
    assert (pattern.groups, set(pattern.names)) == (3, {"weight", "t"})
    assert pattern.search("W=kg") is None


def test_a_text_beyond_ascii_is_cut_at_its_characters() -> None:
    found = compile_pattern(r"(?P<value>\d+)°(?P<unit>.)", "p").search("µ 21°C")
    assert found is not None
    assert (found["value"], found["unit"]) == ("21", "C")


@pytest.mark.parametrize(
    "pattern", [r"(a+)+$", r"(a|a)*$", r"(a|aa)+$", r"(.*)*x", r"^(([a-z])+.)+[A-Z]([a-z])+$", r"(\w+\s?)*;$"]
)
def test_a_pattern_that_would_backtrack_for_ever_costs_next_to_nothing(pattern: str) -> None:
    compiled = compile_pattern(pattern, "p")
    began_s = time.thread_time()
    for _ in range(20):
        compiled.search("a" * 4_000 + "!")
    # Python's `re` would need 2**4000 steps. A CPU second is a thousand times what it takes.
    assert time.thread_time() - began_s < 1


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("(x", r"point 'p': pattern: '\(x' is not a valid pattern: missing \)"),
        ("[", "missing ]"),
        ("*", "no argument for repetition"),
        ("(?=x)", "look-around"),
        (r"(a)\1", "back-references"),
        ("x{2000}", "write smaller repetitions"),
        ("((((x{100}){100}){100}){100})", "write smaller repetitions"),
        ("\ud800", "half a character"),
        ("x" * (MAX_PATTERN_CHARS + 1), "at most 4096"),
    ],
)
def test_what_cannot_be_matched_in_linear_time_is_refused_with_the_place(pattern: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        compile_pattern(pattern, "point 'p': pattern")
