"""A sync that fails, wherever the journal syncs: nothing acknowledged is lost, and no descriptor is trusted again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.test_agent_store_bad_sync import EVERY, tried

JOURNAL = "tests.fakes.bad_sync_journal"


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.timeout(300)
def test_a_sync_that_fails_costs_the_journal_nothing_and_is_never_tried_again_on_its_descriptor(
    tmp_path: Path, times: int
) -> None:
    none, syncs = tried(tmp_path / "sound", 0, 0, JOURNAL)
    assert none == []
    assert syncs > 100
    places = range(times, syncs + 1, EVERY * times)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda at: tried(tmp_path / f"at-{at}", at, times, JOURNAL)[0], places))
    assert [each for wrong in found for each in wrong] == []
