"""Agent, cloud, broker and stores killed at random moments, some at once: nothing kept is lost, nothing is doubled.

Rules:
1. SIGKILL, under load; up to three parts are dead at one time. Every part is killed at least twice in a round.
2. After each round the gateway's account is compared with every store, by identity and value. A round is a rig of its
   own with a seed of its own, told before it starts: `--seed S --kills N` goes on where another run has stopped.
3. A part of ours that was killed must work again within 5 s (the cloud listens, the agent commits); a machine that does
   more than this gets `HEADGATE_SLACK` times as long, and what was measured is told.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from agent.store import SKIPPED
from tests.system.rig import Account, Rig, whole_system
from tests.torture.crash_points import SLACK, UP_S, up_after
from tests.torture.report import Finding, record
from tests.torture.soak import balance

MOST_DOWN: Final = 3  #: parts that are dead at one time
ROUND: Final = 100


def order_of(rig: Rig, kills: int, rng: random.Random) -> list[str]:
    """Every part at least twice, the rest at random with our own rather than the stores, in random order."""
    parts = rig.killable()
    order = parts * 2
    order += [rng.choice([*parts, *rig.children, *rig.children]) for _ in range(kills - len(order))]
    rng.shuffle(order)
    return order


def storm(rig: Rig, order: list[str], rng: random.Random, ups: dict[str, list[float]] | None = None) -> None:
    """Kill in this order; all of it lives again when this returns. `ups`: measure there how long ours take."""
    down: list[str] = []

    def revive_all() -> None:
        while down:
            name = down.pop(rng.randrange(len(down)))
            if ups is not None and name in rig.children:
                ups.setdefault(name, []).append(up_after(rig, name))
            else:
                rig.revive(name)

    for name in order:
        if name in down or len(down) == MOST_DOWN:
            revive_all()
        if not down and rng.random() < 0.5:
            rig.wait_for_acks()  # killed at work, not only on the way up
        time.sleep(rng.uniform(0.1, 0.8))  # under load: the moment of the kill is what is random here
        rig.kill(name)
        down.append(name)
        if rng.random() < 0.7:
            time.sleep(rng.uniform(0.0, 0.5))
            revive_all()
    revive_all()


def a_round(transport: str, kills: int, seed: int, ups: dict[str, list[float]], *, light: bool) -> Account:
    rng = random.Random(seed)
    period_ms = 200 if light else 50
    with (
        tempfile.TemporaryDirectory(prefix="kills-") as folder,
        whole_system(Path(folder), transport, period_ms=period_ms) as rig,
    ):
        storm(rig, order_of(rig, kills, rng), rng, ups)
        return rig.finish(timeout_s=180.0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture.kills", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no round after these")
    parser.add_argument("--round", type=int, default=ROUND, help="kills between two audits")
    parser.add_argument(
        "--light", action="store_true", help="a quarter of the load, for a machine that is shared"
    )
    parser.add_argument("--record", action="store_true")
    told = parser.parse_args(argv)
    print(f"seed {told.seed}", flush=True)
    began_s = time.monotonic()
    rng = random.Random(told.seed)
    ups: dict[str, list[float]] = {}
    wrong: list[str] = []
    done = rounds = readings = torn = 0
    while done < told.kills and (not told.minutes or time.monotonic() - began_s < told.minutes * 60):
        seed, count = rng.randrange(2**32), min(told.round, told.kills - done)
        transport = ("mqtt", "https")[rounds % 2]
        try:
            account = a_round(transport, count, seed, ups, light=told.light)
        except (
            TimeoutError,
            AssertionError,
            RuntimeError,
        ) as err:  # the round is lost: it is told, with its seed
            wrong.append(f"round {rounds} ({transport}, seed {seed}): {err}")
            print(wrong[-1], flush=True)
        else:
            wrong += [f"round {rounds} ({transport}, seed {seed}): {text}" for text in balance(account)]
            readings += account.kept
            torn += account.passed_over // SKIPPED
            print(f"{done + count:5d} kills, {transport}: {account}", flush=True)
        done += count
        rounds += 1
    for name, took in ups.items():
        print(f"{name}: up in {statistics.median(took):.2f} s (median), {max(took):.2f} s (longest)")
        if max(took) > UP_S * SLACK:
            wrong.append(f"{name} took {max(took):.1f} s to be up")
    for line in wrong:
        print(f"VIOLATION: {line} (--seed {told.seed})")
    if told.record:
        figures: dict[str, int | float | str] = {
            "kills": done,
            "rounds": rounds,
            "readings kept": readings,
            "torn commits found, and told": torn,
            "violations": len(wrong),
        }
        for name, took in ups.items():
            figures[f"{name} up, median s"] = round(statistics.median(took), 2)
            figures[f"{name} up, longest s"] = round(max(took), 2)
        record(
            Finding(
                proof="kills",
                promise="agent, cloud, broker and stores killed at random: nothing kept is lost or doubled in any sink",
                command=f"python -m tests.torture.kills --kills {told.kills} --seed {told.seed} --record",
                passed=not wrong,
                figures=figures,
                seed=told.seed,
                took_s=time.monotonic() - began_s,
            )
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
