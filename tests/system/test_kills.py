"""Whatever dies, in whatever order: nothing kept is lost, nothing is doubled, in any sink."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.system.rig import whole_system
from tests.torture.kills import order_of, storm

KILLS = 20


@pytest.mark.timeout(600)
@pytest.mark.parametrize("transport", ["mqtt", "https"])
def test_kept_readings_survive_kills_of_every_part_in_random_order(transport: str, tmp_path: Path) -> None:
    seed = int(os.environ.get("HEADGATE_SEED") or random.SystemRandom().randrange(2**32))
    print(f"HEADGATE_SEED={seed}")
    rng = random.Random(seed)
    with whole_system(tmp_path, transport) as rig:
        order = order_of(rig, KILLS, rng)
        storm(rig, order, rng)
        account = rig.finish()
    print(account)
    assert len(order) >= KILLS
    assert account.kept > 10_000, "the load was no load"
    for sink, held in account.held.items():
        assert (held.rows, held.doubled) == (account.kept, 0), f"{sink}: {account}, seed {seed}"
        other = held.values ^ account.held["embedded"].values
        assert not other, f"{sink} holds other values, as {sorted(other)[:4]}; seed {seed}"
    assert (account.gapped, account.holes) == (0, 0), f"{account}, seed {seed}"
