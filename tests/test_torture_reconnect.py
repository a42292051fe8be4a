"""A hundred gateways lose their broker at once (a thousand: `python -m tests.torture.reconnect`)."""

from __future__ import annotations

from tests.torture.reconnect import prove


def test_a_fleet_that_loses_its_broker_comes_back_spread_and_catches_up() -> None:
    outcome = prove(60, 1, 2.0)
    assert outcome.violations() == []
    assert outcome.told_spread_s == 4
    assert outcome.tries <= 3 * outcome.agents
