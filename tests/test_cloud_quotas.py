"""Quotas, the doors' fair queue, and the codes that say what is wrong: plain values in and out."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest

from cloud.fairness import SHARE, FairQueue
from cloud.health import (
    GatewayView,
    SinkView,
    View,
    codes_in,
    nothing_left,
    problems,
    silent_after_s,
    words_in,
)
from cloud.intake import Arrival, Intake
from cloud.journal.sqlite import SqliteJournal
from cloud.metrics import Metrics
from cloud.quotas import Quota, Quotas
from cloud.server import quotas_of
from config.cloud import Cloud, Gateway, Limits
from sync.wire import Ack, Nack
from tests.fakes.batches import GATEWAY, batch

# --- quotas ---


def test_a_gateway_keeps_its_mean_rate_and_its_burst_and_no_more() -> None:
    quotas = Quotas(Quota(batches_per_s=10.0), burst_s=2.0)
    passed = sum(quotas.take("acme/a", 1, 1, now_s=tick / 1000) == 0.0 for tick in range(10_000))
    assert passed == pytest.approx(10 * 10 + 20, abs=2)
    assert quotas.take("acme/b", 1, 1, now_s=10.0) == 0.0  # another one is another one


def test_a_batch_larger_than_the_burst_passes_and_is_waited_for() -> None:
    quotas = Quotas(Quota(readings_per_s=10.0), burst_s=1.0)
    assert quotas.take("acme/a", 110, 1, now_s=0.0) == 0.0
    assert quotas.take("acme/a", 1, 1, now_s=0.0) == pytest.approx(10.0)
    assert quotas.wait_s("acme/a", 9.0) == pytest.approx(1.0)
    assert quotas.take("acme/a", 1, 1, now_s=10.2) == 0.0


def test_a_tenant_is_bounded_as_a_whole_and_an_own_quota_wins() -> None:
    quotas = Quotas(Quota(), Quota(batches_per_s=10.0), burst_s=1.0, own={"acme/a": Quota(batches_per_s=1.0)})
    assert [quotas.take(f"acme/g{n}", 1, 1, now_s=0.0) == 0.0 for n in range(12)].count(True) == 10
    assert quotas.take("other/a", 1, 1, now_s=0.0) == 0.0
    assert quotas.take("acme/a", 1, 1, now_s=1.0) == 0.0
    assert quotas.take("acme/a", 1, 1, now_s=1.0) > 0.0


def test_who_was_refused_is_counted_for_ever_and_shown_for_a_while() -> None:
    quotas = Quotas()
    quotas.refuse("acme/a", 100.0)
    assert quotas.over(110.0) == ["acme/a"]
    assert quotas.over(125.0) == []
    assert quotas.refused == {"acme/a": 1}


def test_the_configuration_says_whose_quota_is_another() -> None:
    own = Gateway(tenant="acme", name="a", token_file="t", batches_per_s=1.0)
    config = Cloud(
        gateway=[own, Gateway(tenant="acme", name="b", token_file="t")], limits=Limits(quota_burst_s=1.0)
    )
    quotas = quotas_of(config)
    assert [quotas.take("acme/a", 1, 1, 0.0) == 0.0 for _ in range(3)] == [True, False, False]
    assert all(quotas.take("acme/b", 1, 1, 0.0) == 0.0 for _ in range(1000))


async def test_over_its_quota_a_batch_is_told_to_wait_counted_and_taken_later(tmp_path: Path) -> None:
    journal, metrics, now = SqliteJournal(tmp_path / "journal.db"), Metrics(), [0.0]
    await journal.open()
    quotas = Quotas(Quota(batches_per_s=1.0), burst_s=1.0)
    intake = Intake(journal, journal, metrics, quotas=quotas, monotonic_s=lambda: now[0])
    two = [Arrival(GATEWAY, batch(n), 0.0) for n in (1, 4)]
    first, second = (verdict.reply for verdict in await intake.accept(two, door="mqtt"))
    assert isinstance(first, Ack)
    assert isinstance(second, Nack)
    assert (second.code, second.retry_after_s) == ("quota", 0.1)
    assert (metrics.retry["quota"], quotas.refused[GATEWAY]) == (1, 1)
    now[0] = 1.1
    (again,) = await intake.accept(two[1:], door="mqtt")
    assert isinstance(again.reply, Ack)
    assert journal.last_offset == 2
    await journal.close()


# --- the fair queue ---


def arrival(gateway: str, size: int = 1000, at_s: float = 0.0) -> Arrival:
    return Arrival(gateway, b"x" * size, at_s)


def test_beside_a_flood_a_newcomer_is_in_the_next_group_and_the_flood_has_its_share_of_it() -> None:
    queue: FairQueue[Arrival] = FairQueue(most=4096, most_bytes=1 << 30)
    for _ in range(3000):
        assert list(queue.put(arrival("flood"))) == []
    for n in range(5):
        assert list(queue.put(arrival(f"v{n}"))) == []
    group = queue.take(2048)
    assert {f"v{n}" for n in range(5)} <= {one.gateway for one in group}
    assert sum(one.gateway == "flood" for one in group) == SHARE


def test_where_there_is_no_room_the_longest_queue_gives_way_not_who_came_last() -> None:
    queue: FairQueue[Arrival] = FairQueue(most=100, most_bytes=1 << 30)
    for _ in range(100):
        list(queue.put(arrival("flood")))
    assert [one.gateway for one in queue.put(arrival("flood"))] == ["flood"]
    assert [one.gateway for one in queue.put(arrival("v"))] == ["flood"]
    assert len(queue) == 100
    assert "v" in {one.gateway for one in queue.take(2048)}


def test_nobody_gains_by_large_batches() -> None:
    queue: FairQueue[Arrival] = FairQueue(most=10_000, most_bytes=1 << 30)
    for _ in range(200):
        list(queue.put(arrival("large", 200_000)))
        list(queue.put(arrival("small", 2_000)))
    sizes = {"large": 0, "small": 0}
    for one in queue.take(60):
        sizes[one.gateway] += len(one.payload)
    assert sizes["large"] <= sizes["small"] + 2 * 200_000


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_each_leaves_once_in_its_gateways_order_within_the_bounds(seed: int) -> None:
    rng = random.Random(seed)
    queue: FairQueue[Arrival] = FairQueue(most=50, most_bytes=200_000)
    put: list[Arrival] = []
    gone: list[Arrival] = []
    left: list[Arrival] = []
    for step in range(2000):
        if rng.random() < 0.7:
            one = arrival(
                f"g{min(rng.randrange(8), rng.randrange(8))}", rng.choice((10, 5_000, 250_000)), step
            )
            put.append(one)
            gone += queue.put(one)
        else:
            left += queue.take(rng.randrange(1, 40))
        assert len(queue) <= 50
        assert 0 <= queue.size_bytes <= 200_000
    while queue:
        left += queue.take(100)
    assert queue.size_bytes == 0
    assert sorted(map(id, gone + left)) == sorted(map(id, put))
    for name in {one.gateway for one in left}:
        times = [one.at_s for one in left if one.gateway == name]
        assert times == sorted(times)


# --- what is wrong ---

WELL = View(
    sinks=[SinkView("mysql", "running")], gateways=[GatewayView("acme/a", 10.0)], journal_share=0.5,
    disk_free_bytes=1 << 40, disk_floor_bytes=1 << 27,
)  # fmt: skip


def test_where_nothing_is_wrong_there_is_no_code() -> None:
    assert problems(WELL) == []
    assert problems(View()) == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"journal_full": True}, "journal_full"),
        ({"journal_broken": "EIO"}, "journal_broken"),
        ({"disk_free_bytes": 1 << 20, "journal_full": True}, "journal_disk"),
        ({"journal_share": 0.9}, "journal_filling"),
        ({"broker": "no connection"}, "broker_down"),
        ({"sinks": [SinkView("mysql", "retrying", "refused")]}, "sink_down:mysql"),
        ({"sinks": [SinkView("mysql", "broken", "no such user")]}, "sink_refusing:mysql"),
        ({"sinks": [SinkView("mysql", "running", lag_s=601.0)]}, "sink_behind:mysql"),
        ({"sinks": [SinkView("influxdb", "running", missed_readings=7)]}, "missed:influxdb"),
        ({"account_open": ["acme/a in mysql"]}, "account_open"),
        ({"holes": ["acme/a"]}, "frames_missing"),
        ({"letters_dropped": 1}, "letters_dropped"),
        ({"gateways": [GatewayView("acme/a", 10.0, over_quota=True)]}, "quota:acme/a"),
        ({"gateways": [GatewayView("acme/a", 901.0)]}, "gateway_silent:acme/a"),
        ({"skewed": ["acme/a"]}, "skew:acme/a"),
    ],
)
def test_each_cause_has_a_code_of_its_own_with_a_remedy(change: dict[str, object], code: str) -> None:
    (found,) = problems(msgspec.structs.replace(WELL, **change))
    assert found.code == code
    assert found.text
    assert found.remedy


def test_what_an_agent_says_is_wrong_is_a_problem_of_the_cloud_with_the_agents_words() -> None:
    told = {"problems": [{"code": "disk_full", "text": "no room", "remedy": "free some"}, "link_waits"]}
    view = View(gateways=[GatewayView("acme/a", 10.0, problems=codes_in(told), words=words_in(told))])
    assert [(one.code, one.text) for one in problems(view)] == [
        ("disk_full:acme/a", "acme/a says: no room: free some"),
        ("link_waits:acme/a", "acme/a says: link_waits"),
    ]


def test_what_a_silent_gateway_said_last_is_marked_with_its_age() -> None:
    gateway = GatewayView("acme/a", 95.0, problems=("disk_full",), silent_after_s=90.0, state_age_s=600.0)
    silent, full = problems(View(gateways=[gateway]))
    assert silent.code == "gateway_silent:acme/a"
    assert full.text == "acme/a says: disk_full (as of 10 min ago)"


def test_a_gateway_is_silent_after_three_of_its_heartbeats_and_not_for_the_clouds_own_absence() -> None:
    assert silent_after_s({"heartbeat_s": 30.0}) == 90.0
    assert silent_after_s({"heartbeat_s": 1}) == 90.0
    assert silent_after_s({"heartbeat_s": 100}) == 300.0
    assert silent_after_s({"heartbeat_s": 30, "link": {"held": "until 06:00"}}) == 3 * 3600.0
    assert silent_after_s({}) == silent_after_s(None) == silent_after_s({"heartbeat_s": "x"}) == 900.0
    back = GatewayView("acme/a", 3600.0, silent_after_s=90.0, watched_s=20.0)
    assert problems(View(gateways=[back])) == []


def test_an_agents_own_codes_are_read_in_either_form_and_may_be_absent() -> None:
    assert codes_in({"problems": ["disk_low", {"code": "clock_skew", "text": "x"}, {"text": "y"}, 3]}) == (
        "disk_low", "clock_skew",
    )  # fmt: skip
    assert codes_in({}) == codes_in(None) == codes_in({"problems": "x"}) == ()
    assert codes_in({"problems": ['a"b', "", "x" * 65, "two\nlines", "link_down"]}) == ("link_down",)
    flood = {"problems": [{"code": f"c{n}", "text": "x" * 10_000} for n in range(500)]}
    assert len(codes_in(flood)) == 32
    assert max(len(text) for _, text in words_in(flood)) == 400
    assert nothing_left({"buffer": {"oldest_age_s": None, "pending_frames": 0}})
    assert not nothing_left({"buffer": {"oldest_age_s": 3.0}})
    assert not nothing_left({"buffer": {"oldest_age_s": None, "parked_frames": 2}})
    assert not nothing_left({"buffer": {}})
    assert not nothing_left({})
