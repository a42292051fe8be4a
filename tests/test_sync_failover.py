"""Two ways as one: the second where the first does not work, and back without tearing what works."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest

from config.agent import Fallback
from config.agent import Uplink as UplinkSettings
from sync.failover import FIRST, SECOND, FailoverUplink, Preference
from sync.identity import Secret
from sync.uplink import AckTimeout, LinkDown, Uplink
from tests.fakes.cloud_door import SILENCE, FarSide, HttpServer, acknowledge, mqtt_door, until
from tests.fakes.fault_proxy import FaultProxy, fault_proxy
from tests.fakes.uplink import MemoryUplink
from tests.servers import run
from tests.test_sync_uplinks import ACL, USERS
from tests.uplink_conformance import GATEWAY, TOKEN, UplinkConformance, Way, batch, covers


def preference(*, after_failures: int = 3, return_s: float = 60.0, silent_s: float = 60.0) -> Preference:
    return Preference(
        after_failures=after_failures, return_s=return_s, silent_s=silent_s, rng=random.Random(1)
    )


# --- the decision alone ---


def test_the_second_is_tried_only_after_so_many_failures_of_the_first() -> None:
    choice = preference(after_failures=3)
    for _ in range(2):
        assert list(choice.order()) == [FIRST]
        choice.failed(FIRST, "connect: refused")
    tried = []
    for way in choice.order():
        tried.append(way)
        choice.failed(way, "connect: refused")
    assert tried == [FIRST, SECOND]
    choice.opened(SECOND, 10.0)
    assert choice.using == SECOND
    assert 10 + 0.75 * 60 <= choice.return_at_s <= 10 + 1.25 * 60
    assert list(choice.order()) == [SECOND, FIRST]  # the second is lost: whichever is there


def test_an_answer_forgives_earlier_failures() -> None:
    choice = preference(after_failures=2)
    choice.failed(FIRST, "x")
    choice.opened(FIRST, 1.0)
    choice.answered(FIRST)
    choice.closed(2.0)
    choice.failed(FIRST, "x")
    assert list(choice.order()) == [FIRST]


def test_a_first_that_opens_and_breaks_before_any_answer_is_left_too() -> None:
    choice = preference(after_failures=3)
    for n in range(3):
        assert next(iter(choice.order())) == FIRST
        choice.opened(FIRST, float(n))
        choice.closed(n + 0.5)
    assert list(choice.order()) == [FIRST, SECOND]
    idle = preference(after_failures=3)
    for n in range(5):  # an hour of nothing to send, and then it broke: no fault of the way
        idle.opened(FIRST, n * 3600.0)
        idle.closed(n * 3600.0 + 3000)
    assert list(idle.order()) == [FIRST]


def test_silence_moves_on_and_a_cloud_that_is_silent_on_both_is_asked_ever_more_slowly() -> None:
    choice = preference(silent_s=60.0)
    choice.opened(FIRST, 0.0)
    now_s, moves = 0.0, []
    while now_s < 4 * 3600:
        if choice.unanswered(choice.using, now_s):
            moves.append(now_s)
            choice.closed(now_s)
            choice.opened(choice.using, now_s)
        now_s += 10.0
    assert moves[0] == 60.0
    assert len(moves) <= 25
    assert moves[-1] - moves[-2] >= 900.0


def test_a_return_that_does_not_last_makes_the_next_wait_longer_and_one_that_lasts_forgives() -> None:
    choice = preference(after_failures=1, return_s=60.0)
    now_s, waits = 0.0, []
    for _ in range(8):
        choice.failed(FIRST, "x")
        choice.opened(SECOND, now_s)
        waits.append(choice.return_at_s - now_s)
        now_s = choice.return_at_s
        assert not choice.proven(now_s)  # once is luck
        now_s = choice.return_at_s
        assert choice.proven(now_s)
        choice.back(now_s)
        assert (choice.using, choice.why) == (FIRST, "")
        now_s += 5.0
    assert waits[0] <= 75.0
    assert waits[5] >= 0.75 * 60 * 2**5
    assert max(waits) <= 1.25 * 3600
    choice.failed(FIRST, "x")
    choice.opened(SECOND, now_s + 10 * 3600.0)
    assert choice.return_at_s - (now_s + 10 * 3600.0) <= 75.0


def test_two_proofs_must_be_in_a_row() -> None:
    choice = preference(after_failures=1)
    choice.failed(FIRST, "x")
    choice.opened(SECOND, 0.0)
    assert not choice.proven(60.0)
    choice.not_back(90.0, tried=False)
    assert not choice.proven(150.0)
    assert choice.proven(180.0)


# --- the uplink, in memory ---


def both(first: Uplink, second: Uplink, *, after_failures: int = 2, return_s: float = 0.2,
         silent_s: float = 60.0) -> FailoverUplink:  # fmt: skip
    return FailoverUplink(
        first,
        second,
        after_failures=after_failures,
        return_s=return_s,
        silent_s=silent_s,
        rng=random.Random(1),
    )


@pytest.fixture(params=["the first works", "the second alone works"])
async def way(request: pytest.FixtureRequest) -> AsyncIterator[Way]:
    far = FarSide()
    made: list[tuple[MemoryUplink, MemoryUplink]] = []
    blocked = request.param == "the second alone works"

    def make(_token: Secret, ack_timeout_s: float) -> Uplink:
        pair = (
            MemoryUplink(GATEWAY, far, ack_timeout_s=ack_timeout_s),
            MemoryUplink(GATEWAY, far, ack_timeout_s=ack_timeout_s),
        )
        pair[0].up = not blocked
        made.append(pair)
        return both(*pair, return_s=60.0)

    async def cut() -> None:
        for pair in made:
            for one in pair:
                one.up = False
                one.cut()

    async def mend() -> None:
        for pair in made:
            pair[0].up, pair[1].up = not blocked, True

    yield Way(far, make, cut, mend, refuses_strangers=False)
    far.over.set()


class TestFailover(UplinkConformance):
    """It keeps an uplink's promise, whichever way is used."""


async def opened_on(uplink: FailoverUplink, way: int) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                await uplink.open()
            except LinkDown:
                continue
            assert uplink.preference.using == way
            return


async def _send_until_lost(uplink: FailoverUplink) -> None:
    while True:
        with contextlib.suppress(AckTimeout):
            await uplink.send(batch(1))
        await asyncio.sleep(0)


async def test_batches_go_on_while_it_returns_and_a_return_that_answers_nothing_costs_one_resend(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    far, mute = FarSide(), FarSide()
    mute.answer = lambda _: SILENCE
    first, second = MemoryUplink(GATEWAY, mute, ack_timeout_s=0.1), MemoryUplink(GATEWAY, far)
    first.name, second.name = "mqtt a:1", "https b:2"
    first.up = False
    uplink = both(first, second)
    await opened_on(uplink, SECOND)
    assert covers(await uplink.send(batch(1)), batch(1))
    assert uplink.name == "https b:2"
    assert "mqtt a:1" in uplink.detour
    first.up = True  # it opens, and nothing behind it answers
    timeouts = 0
    deadline_s = time.monotonic() + 20
    while not timeouts and time.monotonic() < deadline_s:
        try:
            await uplink.send(batch(1))
        except AckTimeout:
            timeouts += 1
        await asyncio.sleep(0.01)
    assert timeouts == 1
    assert uplink.preference.using == SECOND
    assert covers(await uplink.send(batch(1)), batch(1))
    mute.answer = acknowledge  # and now it does
    async with asyncio.timeout(20):
        while uplink.preference.using == SECOND:
            assert covers(await uplink.send(batch(10)), batch(10))  # never a LinkDown
            await asyncio.sleep(0.01)
    assert uplink.detour == ""
    assert covers(await uplink.send(batch(20)), batch(20))
    said = [record.getMessage() for record in caplog.records if record.name == "sync.failover"]
    assert len(said) == 2, said
    assert "the link goes over https b:2 now" in said[0]
    assert "again" in said[1]
    await uplink.close()


async def test_what_is_under_way_on_the_second_is_answered_there_when_the_first_takes_over() -> None:
    far, slow = FarSide(), FarSide()
    first = MemoryUplink(GATEWAY, far)
    second = MemoryUplink(GATEWAY, slow, ack_timeout_s=20.0)
    first.up = False
    uplink = both(first, second)
    await opened_on(uplink, SECOND)
    slow.gate.clear()
    waiting = asyncio.create_task(uplink.send(batch(1)))
    await until(lambda: slow.received)
    first.up = True
    async with asyncio.timeout(20):
        while uplink.preference.using == SECOND:
            trial = asyncio.create_task(uplink.send(batch(50)))
            await asyncio.wait((trial,), timeout=0.1)
            if not trial.done():
                trial.cancel()
    slow.gate.set()
    assert covers(await waiting, batch(1))
    await uplink.close()


async def test_a_first_that_falls_silent_is_left_and_the_forwarder_is_told_to_open_anew() -> None:
    far, mute = FarSide(), FarSide()
    mute.answer = lambda _: SILENCE
    uplink = both(
        MemoryUplink(GATEWAY, mute, ack_timeout_s=0.05),
        MemoryUplink(GATEWAY, far),
        silent_s=0.2,
        return_s=60.0,
    )
    await uplink.open()
    with pytest.raises(LinkDown, match="no answer for long"):
        await asyncio.wait_for(_send_until_lost(uplink), 20)
    await uplink.open()
    assert covers(await uplink.send(batch(1)), batch(1))
    assert uplink.preference.using == SECOND
    assert "nothing was answered" in uplink.detour
    await uplink.close()


# --- over real servers: MQTT first, HTTPS when its port is blocked, and back ---


async def test_mqtt_is_left_for_https_when_its_port_is_blocked_and_used_again_when_it_is_not(
    free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from agent.forwarder import uplink_of

    monkeypatch.setenv("FIRST_TOKEN", TOKEN.reveal())
    monkeypatch.setenv("SECOND_TOKEN", "the-second-way-s-own-token")
    far = FarSide()
    async with AsyncExitStack() as stack:
        broker = stack.enter_context(run.mosquitto(users=USERS, acl=ACL))
        await stack.enter_async_context(mqtt_door(far, broker.host, broker.port))
        door = HttpServer(far, GATEWAY, Secret("the-second-way-s-own-token"), free_port())
        await door.start()
        stack.push_async_callback(door.stop)
        line: FaultProxy = await stack.enter_async_context(fault_proxy(broker.port))
        settings = UplinkSettings(
            kind="mqtt", host="127.0.0.1", port=line.port, tls=False, token_env="FIRST_TOKEN",
            connect_timeout_s=1.0, ack_timeout_s=2.0,
            fallback=Fallback(kind="https", host="127.0.0.1", port=door.port, tls=False,
                              token_env="SECOND_TOKEN", after_failures=2, return_s=0.5),
        )  # fmt: skip
        uplink = uplink_of(settings, GATEWAY, random.Random(1))
        assert isinstance(uplink, FailoverUplink)
        await uplink.open()
        assert covers(await uplink.send(batch(1)), batch(1))
        assert uplink.name.startswith("mqtt")

        line.faults.blackhole = True  # a firewall that drops: nothing is refused, nothing answers
        line.reset()
        with pytest.raises(LinkDown):
            await asyncio.wait_for(_send_until_lost(uplink), 20)
        async with asyncio.timeout(30):
            while uplink.preference.using == FIRST:
                try:
                    await uplink.open()
                except LinkDown:
                    await asyncio.sleep(0.01)
        assert uplink.name.startswith("https")
        for n in range(3):
            assert covers(await uplink.send(batch(10 + 10 * n)), batch(10 + 10 * n))

        line.reset()
        line.heal()
        n = 50
        async with asyncio.timeout(30):
            while uplink.preference.using == SECOND:
                n += 10
                assert covers(await uplink.send(batch(n)), batch(n))
                await asyncio.sleep(0.01)
        assert uplink.name.startswith("mqtt")
        assert covers(await uplink.send(batch(n + 10)), batch(n + 10))
        await uplink.close()
        far.over.set()
