"""What every way to the field must do, run by `tests/test_agent_control.py` through a real agent's socket and by
`tests/test_agent_field_direct.py` without an agent. A check is given an open field and the plant behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import pytest

from agent.field import Field, FieldError, UnknownDevice
from config.agent import Device
from drivers.contract import ConfigError, DeviceUnreachable, PointRefused, Reason, boot_ns
from drivers.modbus_address import HostPort
from drivers.modbus_line import Failure, Request
from tests.fakes.modbus_peer import Peer, Unit


@dataclass
class Plant:
    """A Modbus TCP peer with unit 1, which the configuration's device `meter` reads; and where nobody listens."""

    peer: Peer
    unit: Unit
    nobody: int  #: a port


#: What the configuration of both ways holds. `silent` is a device whose host is there and refuses connections.
DEVICES: Final = """
[[device]]
name = "meter"
driver = "modbus"
period_ms = 100
[device.options]
host = "127.0.0.1"
port = {port}
timeout_ms = 2000
[[device.point]]
name = "voltage"
register = 0
writable = true
scale = 0.1
unit = "V"
valid_max = 500.0
[[device.point]]
name = "setpoint"
register = 1
writable = true
type = "i16"
scale = 0.5
[[device.point]]
name = "input"
register = 0
table = "input"
[[device]]
name = "silent"
driver = "modbus"
period_ms = 100
[device.options]
host = "127.0.0.1"
port = {nobody}
[[device.point]]
name = "x"
register = 0
writable = true
[[device]]
name = "idle"
driver = "simulator"
enabled = false
[[device.point]]
name = "x"
"""

Check: TypeAlias = Callable[[Field, Plant], Awaitable[None]]


def request_of(unit: int, first: int, count: int, *, timeout_s: float = 2.0) -> Request:
    pdu = bytes([3, first >> 8, first & 255, count >> 8, count & 255])
    return Request(unit, pdu, bytes([3, 2 * count]), 2 + 2 * count, timeout_s, 2 * timeout_s)


#: Of a computed wall-clock time: two clocks are read one after the other, maybe in two processes.
_SLACK_NS: Final = 50_000_000


async def raw_requests_are_answered_by_the_line(field: Field, plant: Plant) -> None:
    plant.unit.holding[0:2] = [2305, 7]
    address = HostPort("127.0.0.1", plant.peer.port)
    began_ns = boot_ns()
    found = await field.ask(address, [request_of(1, 0, 2), request_of(1, 1, 1)])
    assert found.replies == [bytes([9, 1, 0, 7]), bytes([0, 7])]
    assert began_ns < found.taken_at_ns < boot_ns()


async def a_refusal_comes_with_its_exception_code(field: Field, plant: Plant) -> None:
    address = HostPort("127.0.0.1", plant.peer.port)
    [reply] = (await field.ask(address, [request_of(1, 60_000, 1)])).replies
    assert reply == Failure(Reason.EXCEPTION, 2)


async def many_ask_at_once_and_each_gets_its_own(field: Field, plant: Plant) -> None:
    plant.unit.holding[:50] = list(range(100, 150))
    address = HostPort("127.0.0.1", plant.peer.port)
    found = await asyncio.gather(*(field.ask(address, [request_of(1, n, 1)]) for n in range(50)))
    assert [replies.replies[0] for replies in found] == [bytes([0, 100 + n]) for n in range(50)]


async def a_line_where_nobody_is_is_unreachable(field: Field, plant: Plant) -> None:
    with pytest.raises(DeviceUnreachable) as caught:
        await field.ask(HostPort("127.0.0.1", plant.nobody), [request_of(1, 0, 1)])
    assert caught.value.reason is Reason.DISCONNECTED
    assert str(plant.nobody) in str(caught.value)


async def a_read_is_fresh_and_shows_raw_and_seen_values(field: Field, plant: Plant) -> None:
    for volts in (2301, 2302, 2303):
        plant.unit.holding[0:2] = [volts, 40]
        plant.unit.input[0] = volts + 7
        began_ns = time.time_ns()
        look = await field.read("meter")
        assert began_ns - _SLACK_NS < look.taken_at_ns < time.time_ns() + _SLACK_NS
        assert look.device == "meter"
        assert [(r.point, r.value, r.raw, r.unit, r.reason) for r in look.readings] == [
            ("voltage", volts / 10, volts, "V", Reason.GOOD),
            ("setpoint", 20.0, 40, "", Reason.GOOD),
            ("input", volts + 7, volts + 7, "", Reason.GOOD),
        ]


async def what_is_out_of_its_range_says_so(field: Field, plant: Plant) -> None:
    plant.unit.holding[0] = 5001
    [voltage, *_] = (await field.read("meter")).readings
    assert (voltage.raw, voltage.reason) == (5001, Reason.RANGE)
    plant.unit.holding[0] = 2300


async def a_watch_sees_every_change_in_order(field: Field, plant: Plant) -> None:
    plant.unit.holding[0] = 0
    seen: list[object] = []
    times: list[int] = []
    async with asyncio.timeout(30):
        async for look in field.watch("meter"):
            seen.append(look.readings[0].raw)
            times.append(look.taken_at_ns)
            plant.unit.holding[0] += 1
            if len(seen) == 5:
                break
    assert seen == sorted(seen, key=lambda raw: raw if isinstance(raw, int) else -1)
    assert len(set(seen)) >= 3
    assert times == sorted(times)


async def a_watch_shows_each_scan_once_whole_and_as_it_was_when_it_was_taken(
    field: Field, plant: Plant
) -> None:
    plant.unit.holding[0] = 0
    before = len(plant.peer.asked)
    changed_ns: dict[int, int] = {}  # what the register holds -> since when
    times: list[int] = []
    async with asyncio.timeout(30):
        async for look in field.watch("meter"):
            now_ns = time.time_ns()
            assert [r.point for r in look.readings] == ["voltage", "setpoint", "input"]
            assert look.taken_at_ns < now_ns + _SLACK_NS
            seen = look.readings[0].raw
            assert isinstance(seen, int)
            # The next value was not there yet when this one was read.
            assert look.taken_at_ns < changed_ns.get(seen + 1, now_ns) + _SLACK_NS
            times.append(look.taken_at_ns)
            if len(times) == 12:
                break
            if len(times) % 4 == 0:
                plant.unit.holding[0] += 1
                changed_ns[plant.unit.holding[0]] = time.time_ns()
    polls = sum(1 for _, function, _, _ in plant.peer.asked[before:] if function == 4)
    assert len(times) <= polls + 1  # the last one before it began may be shown
    assert len(set(times)) == len(times)


async def a_watch_of_a_device_that_is_away_shows_why(field: Field, plant: Plant) -> None:
    async with asyncio.timeout(30):
        async for look in field.watch("silent"):
            assert [(r.value, r.reason) for r in look.readings] == [(None, Reason.DISCONNECTED)]
            break


async def a_write_is_one_effect_and_is_read_back(field: Field, plant: Plant) -> None:
    plant.peer.written.clear()
    plant.peer.asked.clear()
    look = await field.write("meter", "setpoint", -12.5)
    assert [(r.point, r.value, r.raw) for r in look.readings] == [("setpoint", -12.5, -25)]
    assert plant.unit.holding[1] == 65536 - 25
    assert [(function, address) for function, address, _ in plant.peer.written] == [(6, 1)]
    at = next(i for i, (_, function, _, _) in enumerate(plant.peer.asked) if function == 6)
    assert any(
        function == 3 and first <= 1 < first + count for _, function, first, count in plant.peer.asked[at:]
    )


async def a_write_that_cannot_be_never_reaches_the_device(field: Field, plant: Plant) -> None:
    plant.peer.written.clear()
    for point, value, what in (
        ("voltage", 501.0, "outside"),
        ("setpoint", 0.3, "nearest are 0 and 0.5"),
        ("setpoint", 1e6, "i16"),
        ("input", 1, "not writable|read only"),
    ):
        with pytest.raises(PointRefused, match=what) as caught:
            await field.write("meter", point, value)
        assert caught.value.point == point
        assert str(caught.value).count(f"{point}: ") == 1
    assert plant.peer.written == []


async def what_is_unknown_is_told_with_the_nearest(field: Field, plant: Plant) -> None:
    with pytest.raises(UnknownDevice, match="did you mean 'meter'"):
        await field.read("metr")
    with pytest.raises(UnknownDevice, match="did you mean 'voltage'"):
        await field.write("meter", "voltge", 1)
    with pytest.raises(Exception, match="enabled = true"):
        await field.read("idle")


async def a_device_that_is_away_is_unreachable(field: Field, plant: Plant) -> None:
    with pytest.raises(DeviceUnreachable):
        await field.read("silent")
    with pytest.raises(DeviceUnreachable):
        await field.write("silent", "x", 1)


async def an_attempt_reads_a_device_that_is_not_configured(field: Field, plant: Plant) -> None:
    options = {"host": "127.0.0.1", "port": plant.peer.port}
    point = {"name": "p", "register": 5, "scale": 0.1, "unit": "A", "valid_max": 8.0}
    device = Device(name="new", driver="modbus", options=options, point=[point])
    for amperes, reason in ((77, Reason.GOOD), (81, Reason.RANGE)):
        plant.unit.holding[5] = amperes
        began_ns = time.time_ns()
        look = await field.attempt(device)
        assert began_ns - _SLACK_NS < look.taken_at_ns < time.time_ns() + _SLACK_NS
        assert look.device == "new"
        assert [(r.point, r.value, r.raw, r.unit, r.reason) for r in look.readings] == [
            ("p", amperes / 10, amperes, "A", reason)
        ]


async def an_attempt_that_cannot_work_says_why(field: Field, plant: Plant) -> None:
    device = Device(name="new", driver="modbs", point=[{"name": "p", "register": 5}])
    with pytest.raises(ConfigError, match="did you mean 'modbus'"):
        await field.attempt(device)
    options: dict[str, object] = {"host": "127.0.0.1", "port": plant.nobody}
    device = Device(name="new", driver="modbus", options=options, point=[{"name": "p", "register": 5}])
    with pytest.raises(DeviceUnreachable):
        await field.attempt(device, timeout_s=5.0)


async def a_call_can_be_given_up_and_the_next_works(field: Field, plant: Plant) -> None:
    for turns in (0, 1, 3, 8):
        call = asyncio.ensure_future(field.read("meter"))
        for _ in range(turns):
            await asyncio.sleep(0)
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call
        assert (await field.read("meter")).device == "meter"


async def a_watch_can_be_left_at_any_time(field: Field, plant: Plant) -> None:
    for _ in range(3):
        looks = field.watch("meter")
        async for _look in looks:
            break
        await looks.aclose()  # type: ignore[attr-defined]
    assert (await field.read("meter")).device == "meter"


async def the_lines_and_a_reload_are_the_agents(field: Field, plant: Plant) -> None:
    held = {line.claim.key: line.devices for line in await field.lines()}
    if field.through_agent:
        assert held[f"127.0.0.1:{plant.peer.port}"] == ["meter"]
        done = await field.reload()
        assert (done.errors, done.started, done.stopped, done.changed) == ([], [], [], [])
        assert done.unchanged == len(held) == 2
    else:
        assert held == {}
        with pytest.raises(FieldError, match="no agent runs"):
            await field.reload()


async def closing_twice_is_safe(field: Field, plant: Plant) -> None:
    await field.close()
    await field.close()


CHECKS: Final[tuple[Check, ...]] = (
    raw_requests_are_answered_by_the_line,
    a_refusal_comes_with_its_exception_code,
    many_ask_at_once_and_each_gets_its_own,
    a_line_where_nobody_is_is_unreachable,
    a_read_is_fresh_and_shows_raw_and_seen_values,
    what_is_out_of_its_range_says_so,
    a_watch_sees_every_change_in_order,
    a_watch_shows_each_scan_once_whole_and_as_it_was_when_it_was_taken,
    a_watch_of_a_device_that_is_away_shows_why,
    a_write_is_one_effect_and_is_read_back,
    a_write_that_cannot_be_never_reaches_the_device,
    what_is_unknown_is_told_with_the_nearest,
    a_device_that_is_away_is_unreachable,
    an_attempt_reads_a_device_that_is_not_configured,
    an_attempt_that_cannot_work_says_why,
    a_call_can_be_given_up_and_the_next_works,
    a_watch_can_be_left_at_any_time,
    the_lines_and_a_reload_are_the_agents,
    closing_twice_is_safe,
)
