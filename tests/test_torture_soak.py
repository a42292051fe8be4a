"""What the soak decides by itself: which faults come when, what a trend is, and what counts as a violation."""

from __future__ import annotations

import itertools
import random

import pytest

from tests.system.rig import Account, Held
from tests.torture.soak import (
    CHILDREN,
    LASTS_S,
    RESTARTS,
    Sample,
    Trend,
    schedule,
    slope,
    trend,
    violations,
)


def held(*values: float) -> Held:
    return Held(len(values), len(values), {("d", "p", n, value) for n, value in enumerate(values)})


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


def test_a_trend_is_of_the_last_process_after_its_warm_up() -> None:
    early = [Sample(float(at), 1, 90_000, 50) for at in range(0, 1000, 10)]
    late = [
        Sample(float(at), 2, 102_400 + at * 1024 // 3600, 10 + at // 2000) for at in range(1000, 8000, 10)
    ]
    found = trend(early + late, 2000.0)
    assert found.samples == 600
    assert found.mb_per_h == pytest.approx(1.0, abs=0.05)
    assert found.more_fds == 2
    assert trend([], 0.0).samples == 0


def test_growth_is_judged_in_long_runs_and_losses_in_all() -> None:
    well = Account(3, 0, 1, {"embedded": held(1, 2, 3), "mysql": held(1, 2, 3)}, 0)
    growing = {"cloud": Trend(100, 1.5, 200.0, 209.0, 0.0)}
    assert violations(well, growing, 1.0) == []
    assert violations(well, growing, 6.0) == ["cloud grows by 1.50 MB an hour"]
    leaking = {"agent": Trend(100, 0.0, 40.0, 40.0, 9.0)}
    assert violations(well, leaking, 1.0) == ["agent has 9 descriptors more at the end"]
    short = Account(3, 0, 1, {"embedded": held(1, 2, 3), "mysql": held(1, 2)}, 0)
    assert violations(short, {}, 1.0)[0] == "mysql holds 2 of 3 readings"
    doubled = Account(3, 0, 1, {"embedded": Held(3, 2, set())}, 0)
    assert "embedded holds 1 twice" in violations(doubled, {}, 1.0)
    altered = Account(3, 0, 1, {"embedded": held(1, 2, 3), "mysql": held(1, 2, 4)}, 0)
    assert "differ in 2" in violations(altered, {}, 1.0)[0]
