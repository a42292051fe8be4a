"""What a unit refuses: found once, remembered over connects and restarts, tried again, never in the way of the rest."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivers.contract import DeviceUnreachable, Driver, Reason
from drivers.modbus import ModbusDriver, ModbusOptions, ModbusPoint
from drivers.modbus_learnt import FIRST_TRIAL_S, LAST_TRIAL_S, Learnt
from drivers.modbus_plan import Span, Table
from drivers.registry import build
from tests.fakes.modbus_wilful import Whim, WilfulTcp
from tests.test_drivers_modbus import connected, point, registers, told

H = Table.HOLDING
SPAN = Span(H, 5, 2)


# ------------------------------------------------------------------------------------------ pure


def test_what_is_refused_is_due_after_a_wait_that_doubles_up_to_a_day() -> None:
    learnt = Learnt("a unit 1")
    now_s = 1000.0
    learnt.refuse(SPAN, Reason.REFUSED, now_s)
    waits = []
    for _ in range(14):
        wait_s = learnt.refused[SPAN].wait_s
        assert learnt.due(now_s + wait_s - 1, [SPAN]) is None
        now_s += wait_s
        assert learnt.due(now_s, [SPAN]) == SPAN
        assert learnt.due(now_s, [Span(H, 6)]) is None
        learnt.failed(SPAN, now_s)
        waits.append(wait_s)
    assert waits[:4] == [FIRST_TRIAL_S, 2 * FIRST_TRIAL_S, 4 * FIRST_TRIAL_S, 8 * FIRST_TRIAL_S]
    assert waits[-1] == LAST_TRIAL_S


def test_a_success_makes_all_others_due_at_once() -> None:
    learnt = Learnt("a unit 1")
    spans = [Span(H, n) for n in (3, 1, 2)]
    for span in spans:
        learnt.refuse(span, Reason.REFUSED, 0.0)
    assert learnt.due(10.0, spans) is None
    learnt.succeeded(spans[0], 10.0)
    assert learnt.due(10.0, spans) == Span(H, 1)
    assert spans[0] not in learnt.refused


def test_it_is_remembered_once_and_recalled_for_the_same_unit_alone() -> None:
    learnt = Learnt("10.0.0.1:502 unit 1")
    assert learnt.remembered() is None
    learnt.refuse(SPAN, Reason.REFUSED, 0.0)
    learnt.failed(SPAN, 0.0)
    learnt.cut(H, 9)
    kept = learnt.remembered()
    assert kept is not None
    assert learnt.remembered() is None
    again = Learnt("10.0.0.1:502 unit 1")
    again.recall(kept, 500.0)
    assert again.refused[SPAN].wait_s == 2 * FIRST_TRIAL_S
    assert again.due(500.0 + FIRST_TRIAL_S, [SPAN]) == SPAN  # however long this process was down
    assert again.cuts == {(H, 9)}
    assert again.remembered() is None
    other = Learnt("10.0.0.1:502 unit 2")
    other.recall(kept, 0.0)
    assert not other.refused
    assert not other.cuts


@given(st.binary(max_size=60), st.integers(0, 60), st.binary(max_size=3))
@settings(max_examples=300)
def test_whatever_was_kept_is_recalled_or_ignored(raw: bytes, at: int, scrap: bytes) -> None:
    learnt = Learnt("x")
    learnt.refuse(SPAN, Reason.REFUSED, 0.0)
    kept = learnt.remembered() or b""
    for each in (raw, kept[:at], kept[:at] + scrap + kept[at + len(scrap) :]):
        again = Learnt("x")
        again.recall(each, 0.0)
        for span, trial in again.refused.items():
            assert FIRST_TRIAL_S <= trial.wait_s <= LAST_TRIAL_S
            assert span.count > 0


# ------------------------------------------------------------------------------------------ on the wire


def without(*bad: int, code: int = 2) -> Callable[[int, int, int], Whim]:
    """A device that has no such registers."""
    return lambda function, address, count: code if any(address <= n < address + count for n in bad) else None


class Clock:
    """Time for trials, as a test says."""

    def __init__(self, driver: Driver[ModbusOptions, ModbusPoint]) -> None:
        assert isinstance(driver, ModbusDriver)
        self.now_s = 1000.0
        driver.now_s = lambda: self.now_s


async def test_after_a_restart_nothing_is_halved_again() -> None:
    async with WilfulTcp(list(range(100)), without(17, 90)) as peer:
        async with connected(registers(*range(100)), port=peer.port) as driver:
            first = told(await driver.read(driver.points))
            kept = driver.remembered()
            assert kept is not None
            assert driver.remembered() is None
        # Another unit on the same line is another device.
        for unit in (1, 2):
            options = {"host": "127.0.0.1", "port": peer.port, "unit": unit}
            again = build("boiler", "modbus", options, registers(*range(100)))
            assert isinstance(again, ModbusDriver)
            again.recall(kept)
            peer.asked.clear()
            await again.connect()
            assert told(await again.read(again.points)) == first
            halved = peer.asked[0] == (3, 0, 100)
            assert halved == (unit == 2)
            assert halved or peer.asked == [(3, 0, 17), (3, 18, 72), (3, 91, 9)]
            await again.close()


async def test_a_register_that_is_there_later_is_found_with_one_request_at_a_time() -> None:
    async with (
        WilfulTcp(list(range(40)), without(3, 7)) as peer,
        connected(registers(*range(10)), port=peer.port) as d,
    ):
        clock = Clock(d)
        await d.read(d.points)
        await d.read(d.points)
        peer.asked.clear()
        clock.now_s += FIRST_TRIAL_S
        scan = told(await d.read(d.points))
        assert scan["r3"] is scan["r7"] is Reason.REFUSED
        assert peer.asked == [(3, 0, 3), (3, 4, 3), (3, 8, 2), (3, 3, 1)]  # one trial, after all else
        peer.judge = None
        peer.asked.clear()
        clock.now_s += 2 * FIRST_TRIAL_S
        assert told(await d.read(d.points)) == {f"r{n}": n for n in range(10)}
        peer.asked.clear()
        assert told(await d.read(d.points)) == {f"r{n}": n for n in range(10)}
        assert peer.asked == [(3, 0, 10)]
        assert d.remembered() is not None


async def test_a_device_that_refuses_everything_is_still_there_and_is_read_as_soon_as_it_has_started_up() -> (
    None
):
    async with (
        WilfulTcp(list(range(40)), without(*range(40))) as peer,
        connected(registers(*range(30)), port=peer.port, timeout_ms=100) as driver,
    ):
        clock = Clock(driver)
        assert set(told(await driver.read(driver.points)).values()) == {Reason.REFUSED}
        while set(told(await driver.read(driver.points)).values()) != {Reason.REFUSED}:
            pass
        peer.asked.clear()
        assert set(told(await driver.read(driver.points)).values()) == {Reason.REFUSED}
        assert len(peer.asked) == 1
        peer.judge = lambda function, address, count: "silent"
        with pytest.raises(DeviceUnreachable):
            await driver.read(driver.points)
        peer.judge = None
        clock.now_s += 1.0
        await driver.connect()
        for _ in range(3):
            scan = told(await driver.read(driver.points))
        assert scan == {f"r{n}": n for n in range(30)}


async def test_a_lot_of_refused_registers_are_found_over_several_reads_with_the_others_good_in_each() -> None:
    bad = set(range(1, 250, 2))
    async with (
        WilfulTcp(list(range(300)), without(*bad)) as peer,
        connected(registers(*range(250)), port=peer.port) as driver,
    ):
        requests = []
        for _ in range(12):
            before = len(peer.asked)
            scan = told(await driver.read(driver.points))
            requests.append(len(peer.asked) - before)
            assert all(value == int(name[1:]) or value is Reason.REFUSED for name, value in scan.items())
        assert scan == {f"r{n}": Reason.REFUSED if n in bad else n for n in range(250)}
        assert (
            max(requests) <= 64 + 130
        )  # halving has its bound in each read; then one request a good register
        assert requests[-1] == 125


async def test_holes_the_device_refuses_are_learnt_as_cuts_and_remembered() -> None:
    wanted = [0, 1, 9, 10, 20, 21, 30]
    async with WilfulTcp(list(range(100)), without(5, 15, 25)) as peer:
        async with connected(registers(*wanted), port=peer.port) as driver:
            for _ in range(4):
                assert told(await driver.read(driver.points)) == {f"r{n}": n for n in wanted}
            peer.asked.clear()
            await driver.read(driver.points)
            settled = [(3, 0, 2), (3, 9, 2), (3, 20, 2), (3, 30, 1)]
            assert peer.asked == settled
            kept = driver.remembered()
            assert kept is not None
        again = build("boiler", "modbus", {"host": "127.0.0.1", "port": peer.port}, registers(*wanted))
        assert isinstance(again, ModbusDriver)
        again.recall(kept)
        await again.connect()
        peer.asked.clear()
        await again.read(again.points)
        assert peer.asked == settled
        await again.close()


@pytest.mark.parametrize("whim", ["silent", 4, 1])
async def test_where_a_device_is_silent_or_fails_instead_of_refusing_its_other_points_are_found_too(
    whim: Whim,
) -> None:
    def judge(function: int, address: int, count: int) -> Whim:
        return whim if address <= 50 < address + count else None

    # Register 50 is in a hole between the points; those at 300 are in another request, and always fine.
    wanted = [40, 41, 60, 61, 300]
    async with (
        WilfulTcp(list(range(400)), judge) as peer,
        connected(registers(*wanted), port=peer.port, timeout_ms=60) as driver,
    ):
        for _ in range(10):
            scan = told(await driver.read(driver.points))
            assert scan["r300"] == 300
        assert scan == {f"r{n}": n for n in wanted}
        peer.asked.clear()
        await driver.read(driver.points)
        assert len(peer.asked) == 3


async def test_a_value_that_is_always_met_with_silence_does_not_hold_up_the_others_for_ever() -> None:
    def judge(function: int, address: int, count: int) -> Whim:
        return "silent" if address <= 50 < address + count else None

    wanted = [40, 41, 50, 60, 61, 300]
    async with (
        WilfulTcp(list(range(400)), judge) as peer,
        connected(registers(*wanted), port=peer.port, timeout_ms=30) as driver,
    ):
        for _ in range(40):
            scan = told(await driver.read(driver.points))
            assert scan["r300"] == 300
        assert scan == {**{f"r{n}": n for n in wanted}, "r50": Reason.TIMEOUT}
        peer.asked.clear()
        await driver.read(driver.points)
        assert [(address, count) for _, address, count in peer.asked] == [(40, 2), (60, 2), (300, 1)]


async def test_a_device_whose_only_block_goes_unanswered_is_asked_for_one_value_alone() -> None:
    def judge(function: int, address: int, count: int) -> Whim:
        return "silent" if address <= 5 < address + count else None

    async with (
        WilfulTcp(list(range(400)), judge) as peer,
        connected(registers(0, 1, 9, 10), port=peer.port, timeout_ms=30) as driver,
    ):
        scan = {}
        for _ in range(30):
            try:
                scan = told(await driver.read(driver.points))
            except DeviceUnreachable:
                await driver.connect()
        assert scan == {"r0": 0, "r1": 1, "r9": 9, "r10": 10}
        peer.asked.clear()
        await driver.read(driver.points)
        assert sorted(peer.asked) == [(3, 0, 2), (3, 9, 2)]


async def test_a_busy_device_and_one_behind_a_gateway_teach_nothing() -> None:
    for code, reason in (
        (6, Reason.BUSY),
        (5, Reason.BUSY),
        (11, Reason.BEHIND_GATEWAY),
        (10, Reason.BEHIND_GATEWAY),
    ):
        peer = WilfulTcp(list(range(400)), lambda f, a, n: code if a <= 1 < a + n else None)  # noqa: B023
        async with peer, connected(registers(0, 1, 200), port=peer.port) as driver:
            scan = told(await driver.read(driver.points))
            assert scan == {"r0": reason, "r1": reason, "r200": 200}
            assert driver.remembered() is None


async def test_a_value_of_two_registers_is_tried_again_as_one() -> None:
    points = [point("a", 0, "u32"), point("b", 2, "u32"), point("c", 4, "u32")]
    async with WilfulTcp(list(range(10)), without(3)) as peer, connected(points, port=peer.port) as driver:
        clock = Clock(driver)
        expected = {"a": 1, "b": Reason.REFUSED, "c": (4 << 16) + 5}
        assert told(await driver.read(driver.points)) == expected
        assert told(await driver.read(driver.points)) == expected
        clock.now_s += FIRST_TRIAL_S
        peer.asked.clear()
        await driver.read(driver.points)
        assert peer.asked == [(3, 0, 2), (3, 4, 2), (3, 2, 2)]
