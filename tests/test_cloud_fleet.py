"""The cloud tells gateways over how long to spread their return, by how many they are."""

from __future__ import annotations

import pytest

from cloud.fleet import CONNECTS_PER_S, HEARD_WITHIN_S, LONGEST_SPREAD_S, Fleet, spread_s


@pytest.mark.parametrize(("gateways", "told"), [(0, 0), (1, 0), (14, 0), (100, 6), (1000, 66), (10**6, 600)])
def test_a_small_fleet_is_back_at_once_and_a_large_one_spreads(gateways: int, told: int) -> None:
    assert spread_s(gateways) == told
    if 0 < told < LONGEST_SPREAD_S:
        assert gateways / told <= 2 * CONNECTS_PER_S


def test_who_was_not_heard_for_long_does_not_count() -> None:
    fleet = Fleet()
    for n in range(1000):
        fleet.hear(f"acme/g{n}", 0.0)
    fleet.hear("acme/g0", 11.0)
    assert fleet.spread_s == 66
    fleet.hear("acme/g0", HEARD_WITHIN_S + 12)
    assert fleet.spread_s == 0
