"""Whatever dies, in whatever order: nothing kept is lost, nothing is doubled, in any sink."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from tests.system.rig import whole_system

KILLS = 20
MOST_DOWN = 3  #: parts that are dead at one time


@pytest.mark.timeout(600)
@pytest.mark.parametrize("transport", ["mqtt", "https"])
def test_kept_readings_survive_kills_of_every_part_in_random_order(transport: str, tmp_path: Path) -> None:
    seed = int(os.environ.get("HEADGATE_SEED") or random.SystemRandom().randrange(2**32))
    print(f"HEADGATE_SEED={seed}")
    rng = random.Random(seed)
    with whole_system(tmp_path, transport) as rig:
        # every part at least twice, the rest at random with our own rather than the stores, in random order
        parts = rig.killable()
        order = parts * 2
        order += [rng.choice([*parts, *rig.children, *rig.children]) for _ in range(KILLS - len(order))]
        rng.shuffle(order)
        down: list[str] = []
        for name in order:
            if name in down or len(down) == MOST_DOWN:
                while down:
                    rig.revive(down.pop(rng.randrange(len(down))))
            if not down and rng.random() < 0.5:
                rig.wait_for_acks()  # killed at work, not only on the way up
            time.sleep(rng.uniform(0.1, 0.8))  # under load: the moment of the kill is what is random here
            rig.kill(name)
            down.append(name)
            if rng.random() < 0.7:
                time.sleep(rng.uniform(0.0, 0.5))
                while down:
                    rig.revive(down.pop(rng.randrange(len(down))))
        for name in down:
            rig.revive(name)
        account = rig.finish()
    print(account)
    assert len(order) >= KILLS
    assert account.kept > 10_000, "the load was no load"
    for sink, held in account.held.items():
        assert (held.rows, held.doubled) == (account.kept, 0), f"{sink}: {account}, seed {seed}"
        other = held.values ^ account.held["embedded"].values
        assert not other, f"{sink} holds other values, as {sorted(other)[:4]}; seed {seed}"
    assert (account.gapped, account.holes) == (0, 0), f"{account}, seed {seed}"
