"""The published list of reasons is the one that the program has."""

from __future__ import annotations

import re
from pathlib import Path

from drivers.contract import Quality, Reason

PAGE = (Path(__file__).parents[1] / "docs" / "quality.md").read_text()


def test_every_reason_is_published_under_its_number() -> None:
    told = {
        name: int(number) for name, number in re.findall(r"^\| ([a-z_]+) \| (\d+) \|", PAGE, re.MULTILINE)
    }
    assert told == {reason.name.lower(): int(reason) for reason in Reason}


def test_the_ranges_that_are_published_are_those_of_the_program() -> None:
    for reason in Reason:
        if reason == 0:
            assert (reason.quality, reason.has_value) == (Quality.GOOD, True)
        elif reason < 64:
            assert (reason.quality, reason.has_value) == (Quality.UNCERTAIN, True)
        else:
            assert (reason.quality, reason.has_value) == (Quality.BAD, reason < 128)
