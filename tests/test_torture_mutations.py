"""The mutation gate in its short form: every planted bug still applies to the shipped code; the quick ones are caught
here, with their control, and one of the slow ones in turn. `python -m tests.torture.mutations` runs all ten."""

from __future__ import annotations

import importlib.util
import os
import time
from pathlib import Path

import pytest

from tests.torture.mutations import MUTATIONS, Mutation, Patch, PatchDoesNotApply, gate, patched, told

QUICK = ("dedupe_by_time", "drain_skipped", "ack_before_commit", "no_fsync")
SLOW = tuple(m.name for m in MUTATIONS if m.name not in QUICK)
TURN = int(os.environ.get("HEADGATE_SEED", str(int(time.time() // 86_400)))) % len(SLOW)  #: another each day


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_every_planted_bug_still_applies(mutation: Mutation) -> None:
    for module in {patch.module for patch in mutation.patches}:
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        source = Path(spec.origin).read_text()
        there = patched(source, [patch for patch in mutation.patches if patch.module == module])
        compile(there, spec.origin, "exec")
        assert there != source


def test_a_bug_whose_place_has_changed_is_an_error() -> None:
    with pytest.raises(PatchDoesNotApply, match="move the bug along"):
        patched("a = 1\n", [Patch("agent.store", "b = 1", "b = 2")])


def test_ten_bugs_are_planted() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == 10


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [*QUICK, SLOW[TURN]])
def test_a_planted_bug_fails_its_invariant_and_the_shipped_code_does_not(name: str) -> None:
    [outcome] = gate([m for m in MUTATIONS if m.name == name], seeds=5, control=name in QUICK)
    assert outcome.caught, told(outcome)
    assert not outcome.control_failed, told(outcome)
