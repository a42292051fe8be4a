"""The simulation in its short form: as many seeds as fit, each scenario once, and that a seed makes the whole run.

`HEADGATE_SIM_S=300` gives the random days more time; `python -m tests.torture.simulation` is the long form.
"""

from __future__ import annotations

import os

import pytest

from sync.identity import Secret
from tests.fakes.cloud_door import FarSide
from tests.torture.sim_line import run_line
from tests.torture.sim_network import Network, SimUplink
from tests.torture.sim_oracle import INVARIANTS, Oracle, Token
from tests.torture.sim_world import values_of
from tests.torture.simulation import Story, run_poll, run_random, run_seeds, run_week, told
from tests.uplink_conformance import GATEWAY, UplinkConformance, Way

WITHIN_S = float(os.environ.get("HEADGATE_SIM_S", "20"))
FIRST = int(os.environ.get("HEADGATE_SEED", "1"))


class TestSimUplink(UplinkConformance):
    """What is simulated is an uplink as the real ones are."""

    @pytest.fixture
    def way(self) -> Way:
        import random

        far = FarSide()
        network = Network(random.Random(4))
        network.weather.delay_s = 0.005
        network.far = far

        async def cut() -> None:
            network.cut()

        async def mend() -> None:
            network.mend()

        def make(token: Secret, ack_timeout_s: float) -> SimUplink:
            return SimUplink(GATEWAY, network, ack_timeout_s=ack_timeout_s)

        return Way(far, make, cut, mend, refuses_strangers=False)


@pytest.mark.timeout(900)
def test_random_hours_with_all_faults_violate_nothing() -> None:
    verdicts = run_seeds(range(FIRST, FIRST + 10_000), Story(hours=1.0, between_s=90.0), within_s=WITHIN_S)
    for verdict in verdicts:
        print(told(verdict))
    assert not [told(v) for v in verdicts if v.violations]
    assert sum(v.figures["faults"] for v in verdicts) > 10


def test_the_same_seed_is_the_same_run() -> None:
    story = Story(hours=0.2, between_s=30.0)
    assert run_random(3, story).trace == run_random(3, story).trace != run_random(4, story).trace


def test_a_long_outage_is_delivered_at_five_times_its_pace_while_what_is_new_stays_fresh() -> None:
    verdict = run_week(FIRST, days=0.1)
    assert not verdict.violations, told(verdict)
    assert verdict.figures["backlog_readings"] >= 850_000
    assert verdict.figures["times_real_time"] >= 5.0


def test_polls_are_as_many_as_the_schedule_says_whatever_the_wall_clock_does() -> None:
    verdict = run_poll(FIRST, hours=1.0)
    assert not verdict.violations, told(verdict)
    assert verdict.figures["scans"] > 3_600


def test_a_late_reply_is_never_another_registers_value() -> None:
    verdict = run_line(FIRST, hours=0.1)
    assert not verdict.violations, told(verdict)
    assert verdict.figures["late_replies"] > 50


def test_what_is_neither_stored_nor_gapped_is_named() -> None:
    oracle = Oracle(values_of)
    from tests.torture.sim_oracle import SinkSeen

    oracle.sinks["table"] = SinkSeen()
    token = Token("boiler", 1, 1, 3, 0, 0, "normal")
    oracle.inserted((7, 1), token)
    oracle.kept((7, 1), token)
    oracle.judge()
    assert set(oracle.violations) == {"kept_is_stored_or_gapped", "gap_counted"} <= set(INVARIANTS)
