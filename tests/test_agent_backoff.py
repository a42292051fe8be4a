"""Waiting between tries: jittered, capped, and gentle to a broker that a thousand gateways have lost at once."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import forwarder
from agent.backoff import Backoff, full_jitter
from agent.buffer import Buffer
from agent.forwarder import Forwarder
from agent.status import LinkHealth, LinkState
from config.agent import Buffer as BufferSettings
from config.agent import Uplink as UplinkSettings
from sync.https import HttpsUplink
from sync.mqtt import MqttUplink
from sync.uplink import Uplink
from tests.fakes.buffer import GATEWAY, StillClock
from tests.uplink_conformance import TOKEN

SETTINGS = UplinkSettings()


@given(
    attempt=st.integers(0, 10**9),
    min_s=st.floats(0.01, 3600),
    factor=st.floats(1, 1000),
    seed=st.integers(0, 2**32),
)
def test_a_wait_is_between_nothing_and_the_lesser_of_the_cap_and_the_doubled_minimum(
    attempt: int, min_s: float, factor: float, seed: int
) -> None:
    max_s = min_s * factor
    wait_s = full_jitter(attempt, min_s, max_s, random.Random(seed))
    assert 0.0 <= wait_s <= min(max_s, min_s * 2.0 ** min(attempt, 1000))


@pytest.mark.parametrize(("attempt", "ceiling_s"), [(0, 0.5), (1, 1.0), (4, 8.0), (7, 60.0), (5000, 60.0)])
def test_the_jitter_is_full_every_part_of_the_range_is_as_likely(attempt: int, ceiling_s: float) -> None:
    rng = random.Random(7)
    waits_s = [full_jitter(attempt, 0.5, 60.0, rng) for _ in range(10_000)]
    tenths = Counter(int(wait_s / ceiling_s * 10) for wait_s in waits_s)
    assert set(tenths) == set(range(10))
    assert all(850 < count < 1150 for count in tenths.values())  # 1000, and five standard deviations


def test_waits_grow_with_the_tries_and_start_anew_after_a_success() -> None:
    backoff = Backoff(0.5, 60.0, random.Random(1))
    early_s = sum(backoff.next_s() for _ in range(5))
    late_s = sum(backoff.next_s() for _ in range(1000)) / 1000
    assert early_s < 0.5 + 1 + 2 + 4 + 8
    assert 25 < late_s < 35  # half of the cap
    backoff.reset()
    assert backoff.next_s() <= 0.5


@pytest.mark.parametrize("outage_s", [60.0, 600.0, 7_200.0])
def test_a_thousand_agents_that_lost_one_broker_come_back_over_a_minute(outage_s: float) -> None:
    """From the same instant: their tries fail at once until the broker is back. The seeds are fixed, so the figures
    are too; the expectation after a long outage is the residual of a uniform wait, densest at first: 2/60 a second."""
    back_s = []
    for agent in range(1000):
        backoff = Backoff(SETTINGS.backoff_min_s, SETTINGS.backoff_max_s, random.Random(agent))
        now_s = 0.0
        while now_s <= outage_s:
            now_s += backoff.next_s()
        back_s.append(now_s - outage_s)
    busiest = max(Counter(int(s) for s in back_s).values())
    assert 0.95 * 60.0 <= max(back_s) <= 60.0  # none waits longer than the cap
    assert busiest <= 60  # 1000 * 2/60 is 33
    assert sorted(back_s)[500] > 10.0  # not a rush with a few stragglers


class _Asyncio:
    """asyncio as the forwarder sees it, but for sleeping, which takes no time and is added up."""

    def __init__(self) -> None:
        self.slept_s = 0.0
        self.naps = 0
        self.enough = asyncio.Event()

    async def sleep(self, delay_s: float) -> None:
        self.slept_s += delay_s
        self.naps += 1
        if self.slept_s >= 3600.0:
            self.enough.set()
            await asyncio.Event().wait()
        await asyncio.sleep(0)

    def __getattr__(self, name: str) -> object:
        return getattr(asyncio, name)


def _mqtt(settings: UplinkSettings) -> Uplink:
    return MqttUplink(GATEWAY, settings, TOKEN)


def _https(settings: UplinkSettings) -> Uplink:
    return HttpsUplink(GATEWAY, settings, TOKEN)


@pytest.mark.parametrize("make", [_mqtt, _https])
async def test_an_hour_without_a_broker_costs_a_line_and_hardly_any_cpu(
    make: Callable[[UplinkSettings], Uplink],
    tmp_path: Path,
    free_port: Callable[[], int],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The real forwarder and uplinks against a closed port; only the waits in between are skipped."""
    clock = _Asyncio()
    monkeypatch.setattr(forwarder, "asyncio", clock)
    settings = UplinkSettings(host="127.0.0.1", port=free_port(), tls=False)
    buffer = await Buffer.open(tmp_path / "buffer.db", GATEWAY, BufferSettings(), StillClock())
    health = LinkHealth()
    caplog.set_level(logging.INFO)
    begun_s = time.process_time()
    task = asyncio.create_task(Forwarder(buffer, make(settings), settings, health, random.Random(3)).run())
    async with asyncio.timeout(60):
        await clock.enough.wait()
    took_s = time.process_time() - begun_s
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await buffer.close()
    assert clock.naps >= 3600 / 60  # it did try, at least as often as the cap says
    assert health.state is LinkState.DOWN
    told = [record for record in caplog.records if record.levelno >= logging.INFO]
    assert [record.getMessage()[:10] for record in told if record.name == "agent.forwarder"] == ["link down:"]
    assert len(told) <= 200
    assert took_s < 36.0  # a hundredth of the hour
