"""What every uplink must do, as tests: `class TestX(UplinkConformance)` with a fixture `way` runs them all.

A `Way` is one uplink's road: the far side that answers, how to make an uplink for it, and how to cut and mend it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest

from drivers.contract import Point, Scan, ValueType
from sync.identity import GatewayName, Secret
from sync.uplink import AckTimeout, BatchRefused, LinkDown, RetryLater, Uplink
from sync.wire import MAX_BATCH_BYTES, Ack, Nack, Packing, Sealed, encode_scan, layout_of, seal
from tests.fakes.cloud_door import SILENCE, FarSide, acknowledge, until

GATEWAY = GatewayName("acme", "plant-1")
TOKEN = Secret("a-token-that-is-long-enough")
WRONG = Secret("a-token-that-is-not-right-at-all")
EPOCH = 4711


@dataclass
class Way:
    far: FarSide
    make: Callable[[Secret, float], Uplink]
    """An uplink with this token and this ack timeout in seconds."""
    cut: Callable[[], Awaitable[None]]
    mend: Callable[[], Awaitable[None]]
    refuses_strangers: bool = True

    def uplink(self, *, token: Secret = TOKEN, ack_timeout_s: float = 10.0) -> Uplink:
        return self.make(token, ack_timeout_s)


POINTS = tuple(Point(name=f"p{i}", type=ValueType.U16) for i in range(8))


def batch(first: int, frames: int = 3, *, epoch: int = EPOCH) -> Sealed:
    packing = Packing(layout_of("boiler", "modbus", "boiler", POINTS))
    data = [
        encode_scan(packing, Scan(1_000_000 * (first + n), POINTS, [first + n] * len(POINTS)), 1)
        for n in range(frames)
    ]
    return seal(str(GATEWAY), epoch, first, data, [packing.layout], [], frames * len(POINTS))


def largest_batch() -> Sealed:
    """As near to the limit as bytes that do not compress come."""
    import random

    return seal(str(GATEWAY), EPOCH, 1, [b"\xc5\xff\x00" + random.Random(7).randbytes(MAX_BATCH_BYTES - 0x200)],
                [], [], 0)  # fmt: skip


def covers(ack: Ack, sent: Sealed) -> bool:
    return ack.epoch == sent.epoch and any(a <= sent.first and sent.last <= b for a, b in ack.ranges)


async def opened(uplink: Uplink) -> Uplink:
    """A broker or server that was just started again may take a moment."""
    async with asyncio.timeout(30):
        while True:
            try:
                await uplink.open()
            except LinkDown:
                await asyncio.sleep(0.05)
            else:
                return uplink


async def _open_and_send(uplink: Uplink) -> None:
    await uplink.open()
    await uplink.send(batch(1))


class UplinkConformance:
    """Inherit, and give the fixture `way`."""

    async def test_send_returns_the_clouds_ack_and_changes_no_byte(self, way: Way) -> None:
        uplink = await opened(way.uplink())
        sent = batch(1)
        assert covers(await uplink.send(sent), sent)
        assert way.far.received == [(str(GATEWAY), sent.payload)]
        await uplink.close()

    async def test_sends_overlap_and_each_gets_its_own_ack(self, way: Way) -> None:
        uplink = await opened(way.uplink())
        way.far.gate.clear()
        sent = [batch(1 + 10 * n) for n in range(8)]
        sends = [asyncio.create_task(uplink.send(s)) for s in sent]
        await until(lambda: len(way.far.received) >= 2)  # at the far side, and none answered
        assert not any(task.done() for task in sends)
        way.far.gate.set()
        for ack, one in zip(await asyncio.gather(*sends), sent, strict=True):
            assert covers(ack, one)
        await uplink.close()

    async def test_a_silent_cloud_is_an_ack_timeout_and_the_resend_is_answered(self, way: Way) -> None:
        uplink = await opened(way.uplink(ack_timeout_s=0.4))
        way.far.answer = lambda _: SILENCE
        sent = batch(1)
        with pytest.raises(AckTimeout):
            await uplink.send(sent)
        way.far.answer = acknowledge
        assert covers(await uplink.send(sent), sent)
        assert {payload for _, payload in way.far.received} == {sent.payload}
        await uplink.close()

    async def test_a_duplicate_is_acknowledged(self, way: Way) -> None:
        uplink = await opened(way.uplink())
        sent = batch(1)
        for _ in range(3):
            assert covers(await uplink.send(sent), sent)
        assert len(way.far.received) == 3
        await uplink.close()

    async def test_the_cloud_may_ask_to_wait(self, way: Way) -> None:
        uplink = await opened(way.uplink())
        way.far.answer = lambda h: Nack(h.epoch, h.first, h.last, "full", "the journal is full", 7.0)
        with pytest.raises(RetryLater) as caught:
            await uplink.send(batch(1))
        assert caught.value.after_s == 7.0
        assert "full" in str(caught.value)
        await uplink.close()

    @pytest.mark.parametrize("code", ["body", "size", "frame", "crc"])
    async def test_a_permanent_refusal_carries_the_clouds_code(self, way: Way, code: str) -> None:
        uplink = await opened(way.uplink())
        way.far.answer = lambda h: Nack(h.epoch, h.first, h.last, code, "it will not do")
        with pytest.raises(BatchRefused) as caught:
            await uplink.send(batch(1))
        assert caught.value.code == code
        way.far.answer = acknowledge
        assert covers(await uplink.send(batch(20)), batch(20))  # and the way is as good as before
        await uplink.close()

    async def test_the_largest_batch_passes(self, way: Way) -> None:
        uplink = await opened(way.uplink())
        sent = largest_batch()
        assert MAX_BATCH_BYTES - 0x200 < len(sent.payload) <= MAX_BATCH_BYTES
        assert covers(await uplink.send(sent), sent)
        assert way.far.received[-1][1] == sent.payload
        await uplink.close()

    async def test_a_cut_link_ends_every_send_and_can_be_opened_again(self, way: Way) -> None:
        uplink = await opened(way.uplink())
        way.far.answer = lambda _: SILENCE
        sends = [asyncio.create_task(uplink.send(batch(1 + 10 * n))) for n in range(3)]
        await until(lambda: len(way.far.received) == len(sends))
        await way.cut()
        for outcome in await asyncio.wait_for(asyncio.gather(*sends, return_exceptions=True), 30):
            assert isinstance(outcome, LinkDown)
        with pytest.raises(LinkDown):
            await uplink.open()
        with pytest.raises(LinkDown):
            await uplink.send(batch(1))
        way.far.answer = acknowledge
        await way.mend()
        await opened(uplink)
        assert covers(await uplink.send(batch(1)), batch(1))
        await uplink.close()

    async def test_close_ends_what_is_under_way_and_is_safe_to_call_twice(self, way: Way) -> None:
        uplink = await opened(way.uplink())
        way.far.answer = lambda _: SILENCE
        sending = asyncio.create_task(uplink.send(batch(1)))
        await until(lambda: way.far.received)
        await uplink.close()
        await uplink.close()
        with pytest.raises(LinkDown):
            await asyncio.wait_for(sending, 10)
        with pytest.raises(LinkDown):
            await uplink.report(b"{}")

    async def test_a_cancelled_send_leaves_the_way_usable(self, way: Way) -> None:
        uplink = await opened(way.uplink())
        way.far.answer = lambda _: SILENCE
        sending = asyncio.create_task(uplink.send(batch(1)))
        await until(lambda: way.far.received)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        way.far.answer = acknowledge
        assert covers(await uplink.send(batch(20)), batch(20))
        await uplink.close()

    async def test_a_heartbeat_arrives(self, way: Way) -> None:
        uplink = await opened(way.uplink())
        await uplink.report(b'{"state": "running"}')
        await until(lambda: way.far.states)
        assert way.far.states == [(str(GATEWAY), b'{"state": "running"}')]
        await uplink.close()

    async def test_a_wrong_token_is_named_without_being_told(self, way: Way) -> None:
        if not way.refuses_strangers:
            return
        uplink = way.uplink(token=WRONG)
        with pytest.raises(LinkDown) as caught:
            await _open_and_send(uplink)
        assert str(GATEWAY) in str(caught.value)
        assert "token" in str(caught.value)
        told = f"{caught.value!r} {uplink!r} {vars(uplink)!r}"
        assert WRONG.reveal() not in told
        assert way.far.received == []
        await uplink.close()
