"""Whatever dies, in whatever order: nothing kept is lost, nothing is doubled, in any sink."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from tests.system.rig import whole_system

KILLS = 20


@pytest.mark.timeout(420)
@pytest.mark.parametrize("transport", ["mqtt", "https"])
def test_kept_readings_survive_kills_of_every_part_in_random_order(transport: str, tmp_path: Path) -> None:
    seed = int(os.environ.get("HEADGATE_SEED") or random.SystemRandom().randrange(2**32))
    print(f"HEADGATE_SEED={seed}")
    rng = random.Random(seed)
    with whole_system(tmp_path, transport) as rig:
        # every part at least twice, the rest at random, in random order
        parts = rig.killable()
        order = parts * 2
        order += [rng.choice(parts) for _ in range(KILLS - len(order))]
        rng.shuffle(order)
        for name in order:
            time.sleep(rng.uniform(0.1, 0.8))  # under load: the moment of the kill is what is random here
            rig.kill(name)
            time.sleep(rng.uniform(0.0, 0.5))
            rig.revive(name)
        account = rig.finish()
    assert len(order) >= KILLS
    assert account.kept > 2_000, "the load was no load"
    wanted = account.kept - account.gapped
    assert account.stored == dict.fromkeys(account.stored, wanted), f"{account}, seed {seed}"
    assert account.doubled == dict.fromkeys(account.doubled, 0), f"{account}, seed {seed}"
    assert account.gapped == 0, f"{account}, seed {seed}"
