"""What the soak decides by itself: which faults come when, what a trend is, and what counts as a violation."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from tests.system.rig import Account, Held
from tests.torture.soak import (
    CHILDREN,
    LASTS_S,
    RESTARTS,
    Sample,
    Trend,
    give,
    schedule,
    slope,
    trend,
    violations,
)


def held(*values: float) -> Held:
    return Held(len(values), len(values), {("d", "p", n, value) for n, value in enumerate(values)})


WELL = Account(3, 0, 1, {"embedded": held(1, 2, 3), "mysql": held(1, 2, 3)}, 0)


@pytest.mark.parametrize("seed", range(5))
def test_at_least_a_hundred_faults_an_hour_one_after_the_other(seed: int) -> None:
    faults = schedule(seed, 3.0)
    assert len(faults) >= 300
    assert faults == schedule(seed, 3.0)
    for one, next_ in itertools.pairwise(faults):
        assert one.at_s + one.for_s < next_.at_s
    assert faults[-1].at_s + LASTS_S[1] <= 3.0 * 3600
    assert {fault.kind for fault in faults} == {"kill", "stop", "cut", "reset", "delay", "blackhole", "drip"}


def test_agent_and_cloud_are_killed_early_only_so_that_one_life_can_be_measured() -> None:
    killed = [fault for fault in schedule(1, 8.0) if fault.kind == "kill" and fault.target in CHILDREN]
    assert killed
    assert max(fault.at_s for fault in killed) < 8.0 * 3600 * RESTARTS


def test_a_slope_is_found_under_noise_and_is_nothing_for_one_point() -> None:
    rng = random.Random(1)
    points = [(x / 100, 40.0 + 2.5 * x / 100 + rng.uniform(-0.5, 0.5)) for x in range(1000)]
    assert slope(points) == pytest.approx(2.5, abs=0.05)
    assert slope(points[:1]) == slope([]) == 0.0


def saw(at_s: int, mb_per_h: float, rng: random.Random) -> int:
    """As the cloud's memory goes: 9 MB up in 130 s and down again."""
    return round(1024 * (250.0 + mb_per_h * at_s / 3600 + 9.0 * (at_s % 130) / 130 + rng.uniform(0.0, 0.3)))


def sawtooth(mb_per_h: float, until_s: int, seed: int = 1) -> list[Sample]:
    rng = random.Random(seed)
    return [Sample(float(at), 1, saw(at, mb_per_h, rng), 50) for at in range(0, until_s, 5)]


@pytest.mark.parametrize("mb_per_h", [-2.0, 0.0, 0.3, 3.0, 5.0])
@pytest.mark.parametrize("until_s", [3555, 3600, 3645])  # wherever the last tooth is cut off
def test_an_hour_of_a_sawtooth_tells_growth_from_none(mb_per_h: float, until_s: int) -> None:
    for seed in range(5):
        found = trend(sawtooth(mb_per_h, until_s, seed), 1620.0)
        assert found.floors >= 9
        assert found.mb_per_h == pytest.approx(mb_per_h, abs=1.0)
        assert found.give_mb_per_h < 1.2
        grows = violations(WELL, {"cloud": found}, 1.0)
        assert bool(grows) == (mb_per_h >= 3.0), grows


def test_an_interval_is_narrower_over_a_longer_run_and_unknown_of_a_few_floors() -> None:
    hour, day = trend(sawtooth(0.0, 3600), 1620.0), trend(sawtooth(0.0, 4 * 3600), 6480.0)
    assert day.give_mb_per_h < 0.1 < hour.give_mb_per_h
    assert trend(sawtooth(0.0, 2200), 1620.0).give_mb_per_h == math.inf
    assert give([(x, 2.0 * x) for x in range(10)]) == pytest.approx(0.0, abs=1e-9)
    noisy = [(float(x), y) for x, y in enumerate((0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0))]
    assert give(noisy) == pytest.approx(0.1398, rel=0.01)  # 2.306 times 0.0606, by the textbook


def test_a_trend_is_of_the_last_process_after_its_warm_up() -> None:
    early = [Sample(float(at), 1, 90_000, 50) for at in range(0, 1000, 10)]
    late = [
        Sample(float(at), 2, 102_400 + at * 1024 // 3600, 10 + at // 2000) for at in range(1000, 8000, 10)
    ]
    found = trend(early + late, 2000.0)
    assert (found.samples, found.floors) == (600, 29)
    assert found.mb_per_h == pytest.approx(1.0, abs=0.05)
    assert found.more_fds == 2
    assert trend([], 0.0).samples == 0


def test_growth_is_judged_by_its_interval_and_losses_in_all_runs() -> None:
    well = WELL
    undecided = {"cloud": Trend(100, 9, 0.8, 1.5, 200.0, 209.0, 0.0)}
    assert violations(well, undecided, 1.0) == []
    assert violations(well, undecided, 6.0) == ["cloud may grow: +0.80 ± 1.50 MB an hour"]
    growing = {"cloud": Trend(100, 9, 3.0, 1.5, 200.0, 209.0, 0.0)}
    assert violations(well, growing, 1.0) == ["cloud grows by +3.00 ± 1.50 MB an hour"]
    short = {"cloud": Trend(10, 1, 0.0, math.inf, 200.0, 209.0, 0.0)}
    assert violations(well, short, 0.1) == []
    assert violations(well, short, 4.0) == ["cloud may grow: not known, from 1 floors"]
    leaking = {"agent": Trend(100, 9, 0.0, 0.1, 40.0, 40.0, 9.0)}
    assert violations(well, leaking, 1.0) == ["agent has 9 descriptors more at the end"]
    lost = Account(3, 0, 1, {"embedded": held(1, 2, 3), "mysql": held(1, 2)}, 0)
    assert violations(lost, {}, 1.0)[0] == "mysql holds 2 of 3 readings"
    doubled = Account(3, 0, 1, {"embedded": Held(3, 2, set())}, 0)
    assert "embedded holds 1 twice" in violations(doubled, {}, 1.0)
    altered = Account(3, 0, 1, {"embedded": held(1, 2, 3), "mysql": held(1, 2, 4)}, 0)
    assert "differ in 2" in violations(altered, {}, 1.0)[0]
